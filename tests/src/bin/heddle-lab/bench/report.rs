//! The report: Markdown for people, JSON for programs, a chart.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{
    chart,
    figures::Line,
    hooks::{self, Hook},
    measure::Times,
    rows::SECTIONS,
};

pub struct Report {
    pub machine: Value,
    pub lines: Vec<Line>,
    pub per_second: BTreeMap<String, BTreeMap<&'static str, Vec<Vec<u64>>>>,
    pub hooks: Vec<Hook>,
    pub notes: Vec<String>,
    pub rounds: u8,
    pub times: Times,
    pub quick: bool,
}

impl Report {
    /// `report.md`, `report.svg` and `report.json` in the folder.
    pub fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        fs::write(folder.join("report.md"), self.markdown())?;
        fs::write(folder.join("report.svg"), chart::draw(&self.lines, self.quick)?)?;
        Ok(fs::write(folder.join("report.json"), serde_json::to_string_pretty(&self.json())? + "\n")?)
    }

    fn quiet(&self) -> bool {
        self.lines.iter().all(|line| line.quiet)
    }

    fn json(&self) -> Value {
        let mut machine = self.machine.clone();
        machine["quiet"] = self.quiet().into();
        let seconds = json!({
            "throughput": self.times.throughput, "connect": self.times.connect, "connect_60s": self.times.sustained,
            "http": self.times.http, "fixed_1000": self.times.fixed,
        });
        json!({
            "machine": machine,
            "settings": {
                "rounds": self.rounds, "quick": self.quick, "seconds": seconds,
                "ratio": "median over the rounds of mesh / none",
                "spread": "(largest - smallest) / median of the mesh's rounds",
            },
            "rows": self.lines,
            "per_second": self.per_second,
            "hooks": self.hooks,
            "notes": self.notes,
        })
    }

    pub fn markdown(&self) -> String {
        let mut text = String::from("# heddle: what the mesh costs\n\n");
        if self.quick {
            text.push_str(
                "**QUICK: one round of a second each. It shows that the bench works; the figures mean nothing.**\n\n",
            );
        }
        let of = |key: &str| match &self.machine[key] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let versions: Vec<String> = self.machine["versions"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(_, version)| version.as_str().unwrap_or_default().to_owned())
            .collect();
        let _ = write!(
            text,
            "{}, commit {}, {} build. {} cores of {}, {} MiB, Linux {}. Congestion control {} in every network namespace, \
             MTU {}. {}. Clients, agents and servers share the cores: ratios and CPU seconds carry over to other \
             machines, the rest does not.\n\nMedians of {} rounds; in each round a run without the mesh and one through \
             it follow one another on the same lab. ",
            of("date"),
            of("commit"),
            of("build"),
            of("cores"),
            of("cpu"),
            of("memory_mib"),
            of("kernel"),
            of("congestion_control"),
            of("mtu"),
            versions.join(", "),
            self.rounds,
        );
        text.push_str(if self.quiet() {
            "Nothing else used the CPU meanwhile.\n"
        } else {
            "Rows with a **!** were measured while other processes used the CPU.\n"
        });
        for section in SECTIONS {
            let lines: Vec<&Line> = self.lines.iter().filter(|line| line.section == section).collect();
            if lines.is_empty() {
                continue;
            }
            let _ = write!(
                text,
                "\n## {section}\n\n| row | unit | no mesh | mesh | mesh / none | target | spread |\n|---|---|---:|---:|---:|---|---:|\n"
            );
            for line in lines {
                let _ = writeln!(
                    text,
                    "| {}{} | {} | {} | **{}** | {} | {} | {:.0} % |",
                    line.name,
                    if line.quiet { "" } else { " **!**" },
                    line.unit,
                    line.none.map_or_else(|| "-".to_owned(), figure),
                    figure(line.mesh),
                    line.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
                    line.target.as_deref().zip(line.met).map_or_else(
                        || "-".to_owned(),
                        |(target, met)| { format!("{target}: {}", if met { "met" } else { "**not met**" }) }
                    ),
                    line.spread * 100.0,
                );
            }
        }
        self.seconds(&mut text);
        hooks::table(&self.hooks, &mut text);
        if !self.notes.is_empty() {
            text.push_str("\n## Notes\n\n");
            self.notes.iter().for_each(|note| text.push_str(&format!("- {note}\n")));
        }
        text
    }

    /// The sustained run second by second, where a cliff would show.
    fn seconds(&self, text: &mut String) {
        for (row, ways) in &self.per_second {
            let _ = write!(text, "\n## {row}, connections in each second\n\n```\n");
            for (way, rounds) in ways {
                for seconds in rounds {
                    let seconds: Vec<String> = seconds.iter().map(u64::to_string).collect();
                    let _ = writeln!(text, "{way}  {}", seconds.join(" "));
                }
            }
            text.push_str("```\n");
        }
    }
}

/// Three digits that count, and all of a large number.
fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::{Report, figure};
    use crate::bench::{
        figures::{Record, Sample, Way},
        measure::Times,
        rows::{Choice, Place},
    };

    fn report(quiet: bool) -> Report {
        let mut record = Record::default();
        let sample = |value| Sample::from([("throughput_1".to_owned(), value)]);
        record.add(Place::CrossNode, Way::None, sample(20.0), true);
        record.add(Place::CrossNode, Way::Mesh, sample(10.0), quiet);
        record.add(Place::CrossNode, Way::Mesh, Sample::from([("rss_idle".to_owned(), 12.5)]), true);
        Report {
            machine: json!({"kernel": "6", "versions": {"wrk": "wrk 4"}}),
            lines: record.lines(&Choice::new(&[])),
            per_second: BTreeMap::new(),
            hooks: Vec::new(),
            notes: Vec::new(),
            rounds: 1,
            times: Times::QUICK,
            quick: false,
        }
    }

    #[test]
    fn rows_have_the_promised_shape() {
        let json = report(true).json();
        let row = &json["rows"][0];
        assert_eq!(row["name"], "cross_node/throughput_1");
        assert_eq!((&row["unit"], &row["none"], &row["mesh"]), (&json!("Gbit/s"), &json!(20.0), &json!(10.0)));
        assert_eq!((&row["ratio"], &row["spread"]), (&json!(0.5), &json!(0.0)));
        assert!(json["rows"][1]["none"].is_null() && json["rows"][1]["ratio"].is_null());
        assert_eq!(json["machine"]["quiet"], true);
    }

    #[test]
    fn a_row_that_was_disturbed_says_so() {
        assert!(!report(true).markdown().contains("**!**"));
        let text = report(false).markdown();
        assert!(text.contains("| cross_node/throughput_1 **!** | Gbit/s | 20.0 | **10.0** | 0.50 | - |"), "{text}");
    }

    #[test]
    fn a_row_with_a_target_says_whether_it_is_met() {
        let of = |mesh| {
            let mut record = Record::default();
            for (way, value) in [(Way::None, 20.0), (Way::Mesh, mesh)] {
                record.add(Place::SameNode, way, Sample::from([("throughput_1".to_owned(), value)]), true);
            }
            Report { lines: record.lines(&Choice::new(&[])), ..report(true) }.markdown()
        };
        assert!(of(19.6).contains("| **19.6** | 0.98 | ≥ 0.97: met |"), "{}", of(19.6));
        assert!(of(10.0).contains("| **10.0** | 0.50 | ≥ 0.97: **not met** |"), "{}", of(10.0));
    }

    #[test]
    fn figures_are_short() {
        assert_eq!([1_234.56, 12.34, 1.234, 0.1234].map(figure), ["1235", "12.3", "1.23", "0.123"]);
    }
}
