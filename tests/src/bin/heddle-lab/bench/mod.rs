//! `cargo xtask bench`: what the mesh costs. The same lab, the same tools, one run with and one without it, right after each
//! other, in rounds; figures are medians, and what counts is their ratio.
//!
//! It never hides what disturbed it: where others used the CPU meanwhile, the row says so.

mod chart;
mod figures;
mod hooks;
mod identity;
mod issue;
mod machine;
mod measure;
mod report;
mod rows;
mod stage;

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Result, ensure};

use figures::{Record, Sample, Way};
use machine::Patience;
use measure::{Taken, Times};
use report::Report;
use rows::{Choice, Measurement, Place};
use stage::Stage;

/// Waiting for a quiet machine, in the whole run.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often a run is taken again because others used the CPU meanwhile.
const AGAIN: u32 = 1;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only these rows, such as cross_node/throughput_1, connect_* or same_node/*
    #[arg(long, num_args = 1.., value_name = "PATTERN")]
    rows: Vec<String>,
    /// Repetitions of each measurement, of which the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=50))]
    rounds: u8,
    /// One round of a second each: shows that it works, the figures mean nothing
    #[arg(long)]
    quick: bool,
    /// Measures what each hook of the kernel lane costs by itself, and nothing else
    #[arg(long, conflicts_with_all = ["rows", "rounds", "list"])]
    hooks: bool,
    /// Prints the names of all rows and measures nothing
    #[arg(long)]
    list: bool,
    /// Folder of the report
    #[arg(long, default_value = "target/bench", value_name = "DIR")]
    out: PathBuf,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    if options.list {
        let names = Place::ALL
            .into_iter()
            .flat_map(|place| place.rows().into_iter().map(move |row| format!("{}/{}", place.name(), row.name)));
        names.for_each(|name| println!("{name}"));
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(!cfg!(debug_assertions) || options.quick, "a debug build measures nothing: cargo xtask bench");
    if options.hooks {
        let mut text = String::new();
        hooks::table(&hooks::measure(options.quick)?, &mut text);
        println!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    let choice = Choice::new(&options.rows);
    let rounds = if options.quick { 1 } else { options.rounds };
    let mut bench = Bench {
        times: if options.quick { Times::QUICK } else { Times::FULL },
        patience: Patience::new(if options.quick { Duration::ZERO } else { PATIENCE }),
        again: if options.quick { 0 } else { AGAIN },
        record: Record::default(),
        per_second: BTreeMap::new(),
        notes: Vec::new(),
        failed: false,
    };
    let wanted: Vec<(Place, Measurement)> = Place::ALL
        .into_iter()
        .flat_map(|place| place.measurements().into_iter().map(move |what| (place, what)))
        .filter(|(place, what)| choice.any(*place, &what.rows()))
        .collect();
    let memory: Vec<Place> = Place::ALL
        .into_iter()
        .filter(|place| place.idle_connections().iter().any(|count| choice.any(*place, &rows::memory_rows(*count))))
        .collect();
    let identity = choice.any(Place::Identity, &identity::rows());
    ensure!(!wanted.is_empty() || !memory.is_empty() || identity, "no row fits; --list names them all");
    let transport = bench.time(&wanted, rounds)?;
    bench.memory(&memory, rounds);
    if identity {
        bench.identity(rounds, options.quick);
    }
    let report = Report {
        machine: machine::describe(&transport.0, &transport.1)?,
        lines: bench.record.lines(&choice),
        per_second: bench.per_second,
        hooks: if options.rows.is_empty() { hooks::measure(options.quick)? } else { Vec::new() },
        notes: bench.notes,
        rounds,
        times: bench.times,
        quick: options.quick,
    };
    report.write(&options.out)?;
    println!("\n{}", report.markdown());
    println!("written to {}/report.{{md,svg,json}}", options.out.display());
    Ok(if bench.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// A run of the bench.
struct Bench {
    times: Times,
    patience: Patience,
    again: u32,
    record: Record,
    /// By row and way, a list for each round.
    per_second: BTreeMap<String, BTreeMap<&'static str, Vec<Vec<u64>>>>,
    notes: Vec<String>,
    /// Something could not be measured.
    failed: bool,
}

impl Bench {
    /// Everything that takes time, in one lab; gives its congestion control and MTU.
    fn time(&mut self, wanted: &[(Place, Measurement)], rounds: u8) -> Result<(String, String)> {
        let places: Vec<Place> =
            Place::ALL.into_iter().filter(|place| wanted.iter().any(|(at, _)| at == place)).collect();
        println!("setting up");
        let stage = Stage::build(if places.is_empty() { &Place::TRAFFIC } else { &places })?;
        let transport = stage.transport()?;
        ensure!(transport.0 == "cubic", "pods use {}, not cubic", transport.0);
        for round in 1..=rounds {
            for (place, what) in wanted {
                println!("round {round} of {rounds}  {}/{}", place.name(), what.name());
                // What comes second finds warmer caches: turns are taken.
                let ways = if round % 2 == 1 { [Way::None, Way::Mesh] } else { [Way::Mesh, Way::None] };
                let pair = ways.map(|way| (way, self.take(&stage, *place, way, *what)));
                for (way, taken) in pair {
                    match taken {
                        Ok((taken, quiet)) => self.keep(*place, way, *what, taken, quiet),
                        Err(error) => self.fail(format!("{}/{} {}: {error:#}", place.name(), what.name(), way.name())),
                    }
                }
            }
        }
        stage.lab.remove()?;
        Ok(transport)
    }

    /// One run on a quiet machine, if it becomes quiet; once more where it did not stay so.
    fn take(&mut self, stage: &Stage, place: Place, way: Way, what: Measurement) -> Result<(Taken, bool)> {
        let mut left = self.again;
        loop {
            let quiet = self.patience.wait_quiet(stage.lab.prefix())?;
            let taken = measure::take(stage, place, way, what, self.times)?;
            let stayed = quiet && taken.foreign < machine::QUIET;
            if stayed || !quiet || left == 0 {
                return Ok((taken, stayed));
            }
            println!("    again: others used {:.2} cores meanwhile", taken.foreign);
            left -= 1;
        }
    }

    fn keep(&mut self, place: Place, way: Way, what: Measurement, taken: Taken, quiet: bool) {
        for row in what.rows().iter().filter(|row| row.name.starts_with(&what.name())) {
            if let Some(value) = taken.sample.get(&row.name) {
                println!("    {:4}  {:<28} {value:>12.2} {}", way.name(), row.name, row.unit);
            }
        }
        if !quiet {
            println!("    {:4}  others used {:.2} cores meanwhile", way.name(), taken.foreign);
        }
        if let Some(note) = taken.note {
            self.notes.push(format!("{}/{} {}: {note}", place.name(), what.name(), way.name()));
        }
        if what == Measurement::Sustained {
            let row = format!("{}/{}", place.name(), what.name());
            self.per_second.entry(row).or_default().entry(way.name()).or_default().push(taken.per_second);
        }
        self.record.add(place, way, taken.sample, quiet);
    }

    fn fail(&mut self, what: String) {
        println!("    not measured: {what}");
        self.notes.push(format!("not measured: {what}"));
        self.failed = true;
    }

    /// Memory, in a fresh lab each time. Others' CPU use doesn't change it.
    fn memory(&mut self, places: &[Place], rounds: u8) {
        for round in 1..=rounds {
            for place in places {
                println!("round {round} of {rounds}  {}: memory", place.name());
                match stage::memory(*place) {
                    Ok(seen) => {
                        for (connections, agents) in seen {
                            self.record.add(*place, Way::Mesh, memory_sample(connections, &agents), true);
                        }
                    }
                    Err(error) => self.fail(format!("{} memory: {error:#}", place.name())),
                }
            }
        }
    }
}

impl Bench {
    /// Certificates, in a fresh lab each time.
    fn identity(&mut self, rounds: u8, quick: bool) {
        for round in 1..=rounds {
            println!("round {round} of {rounds}  identity");
            match identity::measure(quick, &mut self.patience) {
                Ok((sample, quiet)) => {
                    for row in identity::rows() {
                        if let Some(value) = sample.get(&row.name) {
                            println!("    mesh  {:<28} {value:>12.2} {}", row.name, row.unit);
                        }
                    }
                    self.record.add(Place::Identity, Way::Mesh, sample, quiet);
                }
                Err(error) => self.fail(format!("identity: {error:#}")),
            }
        }
    }
}

/// Rows of memory: that of the agent that needs most stands for all, the others beside it.
fn memory_sample(connections: u16, agents: &[stage::Resident]) -> Sample {
    let largest = |of: fn(&stage::Resident) -> f64| agents.iter().map(of).fold(0.0, f64::max);
    let both: Option<&[stage::Resident; 2]> = agents.try_into().ok();
    let values = [
        Some(largest(|agent| agent.all)),
        // On one node one agent is both.
        both.map(|[source, _]| source.all),
        both.map(|[_, destination]| destination.all),
        Some(largest(|agent| agent.anonymous)),
    ];
    let rows = rows::memory_rows(connections).into_iter().zip(values);
    rows.filter_map(|(row, value)| {
        let value = value?;
        println!("    mesh  {:<28} {value:>12.2} {}", row.name, row.unit);
        Some((row.name, value))
    })
    .collect()
}
