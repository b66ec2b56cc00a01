//! From repetitions to figures: medians, ratios of pairs, spread. Pure.

use std::collections::BTreeMap;

use serde::Serialize;

use super::rows::{Better, Choice, Place, Row, Target};

/// Without the mesh or through it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    None,
    Mesh,
}

impl Way {
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Mesh => "mesh",
        }
    }
}

/// What one run gave, by row name. A row of the agents alone has no value without the mesh.
pub type Sample = BTreeMap<String, f64>;

/// Repetitions of one row, in the order of the rounds; a pair is a run of each way, one right after the other.
#[derive(Debug, Clone, Default)]
struct Series {
    none: Vec<f64>,
    mesh: Vec<f64>,
    noisy: bool,
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Record(BTreeMap<(Place, String), Series>);

impl Record {
    pub fn add(&mut self, place: Place, way: Way, sample: Sample, quiet: bool) {
        for (name, value) in sample {
            let series = self.0.entry((place, name)).or_default();
            match way {
                Way::None => series.none.push(value),
                Way::Mesh => series.mesh.push(value),
            }
            series.noisy |= !quiet;
        }
    }

    /// The report's lines, of the rows that were chosen and measured.
    pub fn lines(&self, choice: &Choice) -> Vec<Line> {
        let wanted = Place::ALL.into_iter().flat_map(|place| place.rows().into_iter().map(move |row| (place, row)));
        wanted
            .filter(|(place, row)| choice.has(*place, &row.name))
            .filter_map(|(place, row): (Place, Row)| {
                let series = self.0.get(&(place, row.name.clone()))?;
                let pairs: Vec<f64> =
                    series.none.iter().zip(&series.mesh).filter(|(none, _)| **none > 0.0).map(|(a, b)| b / a).collect();
                let (mesh, ratio) = (median(&series.mesh)?, median(&pairs));
                let target = Target::of(place, &row.name);
                Some(Line {
                    name: format!("{}/{}", place.name(), row.name),
                    unit: row.unit,
                    better: if row.better == Better::Higher { "higher" } else { "lower" },
                    section: row.section,
                    none: median(&series.none),
                    mesh,
                    ratio,
                    target: target.map(Target::text),
                    met: target.map(|target| target.met(ratio, mesh)),
                    spread: spread(&series.mesh),
                    quiet: !series.noisy,
                    none_rounds: series.none.clone(),
                    mesh_rounds: series.mesh.clone(),
                })
            })
            .collect()
    }
}

/// One row of the report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// `place/row`.
    pub name: String,
    pub unit: &'static str,
    /// `higher` or `lower`.
    pub better: &'static str,
    #[serde(skip)]
    pub section: &'static str,
    /// Median without the mesh; null where only agents have such a thing.
    pub none: Option<f64>,
    /// Median through the mesh.
    pub mesh: f64,
    /// Median over the rounds of mesh / none.
    pub ratio: Option<f64>,
    /// What it has to reach, where that is said, and whether it did.
    pub target: Option<String>,
    pub met: Option<bool>,
    /// (largest - smallest) / median of the mesh's rounds.
    pub spread: f64,
    /// Nothing else ran on the machine in any of its rounds.
    pub quiet: bool,
    pub none_rounds: Vec<f64>,
    pub mesh_rounds: Vec<f64>,
}

impl Line {
    /// How many times as dear as without the mesh: 1 is free, whether high or low is good.
    pub fn cost(&self) -> Option<f64> {
        let ratio = self.ratio.filter(|ratio| *ratio > 0.0)?;
        Some(if self.better == "higher" { 1.0 / ratio } else { ratio })
    }
}

/// The middle value; of an even count the mean of the two in the middle.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 { upper } else { f64::midpoint(*sorted.get(middle - 1)?, upper) })
}

fn spread(values: &[f64]) -> f64 {
    let (low, high) =
        values.iter().fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(*value), high.max(*value)));
    match median(values) {
        Some(middle) if middle > 0.0 => (high - low) / middle,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::{Choice, Place, Record, Sample, Way, median, spread};
    #[test]
    fn medians_of_odd_even_and_nothing() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
        assert_eq!(median(&[]), None);
        assert_eq!(spread(&[1.0, 2.0, 3.0]), 1.0);
    }

    #[test]
    fn a_ratio_is_the_median_of_pairs_and_a_noisy_round_marks_its_row() {
        let mut record = Record::default();
        for (none, mesh, quiet) in [(10.0, 5.0, true), (20.0, 4.0, false), (10.0, 6.0, true)] {
            for (way, value) in [(Way::None, none), (Way::Mesh, mesh)] {
                let sample = Sample::from([("connect_c1".to_owned(), value), ("other".to_owned(), value)]);
                record.add(Place::CrossNode, way, sample, quiet);
            }
            let agents = Sample::from([("cpu_s_per_gb".to_owned(), 1.0)]);
            record.add(Place::CrossNode, Way::Mesh, agents, true);
        }
        let lines = record.lines(&Choice::new(&[]));
        let [cpu, connect] = lines.as_slice() else { panic!("{lines:?}") };
        assert_eq!((connect.none, connect.mesh, connect.ratio), (Some(10.0), 5.0, Some(0.5)));
        assert_eq!((connect.cost(), connect.quiet), (Some(2.0), false));
        assert_eq!((cpu.none, cpu.mesh, cpu.ratio, cpu.quiet), (None, 1.0, None, true));
    }
}
