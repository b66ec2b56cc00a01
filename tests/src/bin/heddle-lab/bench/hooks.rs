//! What each program in the kernel costs by itself: its run time while a pair of pods uses the kernel lane, as the kernel
//! counts it.
//!
//! Counting costs some nanoseconds a run itself, so it is on for this alone.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::{Result, ensure};
use heddle_lab::{
    Pod,
    kernel::{self, Cost, Kernel},
};
use serde::Serialize;

use super::{
    figures::Way,
    rows::Place,
    stage::{IPERF, Pair, REPLY, Stage},
};

/// One program at one end, in one kind of traffic.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hook {
    pub traffic: &'static str,
    /// `client` or `server`.
    pub end: &'static str,
    pub program: String,
    pub runs: u64,
    pub nanoseconds_a_run: f64,
    /// Runs, and nanoseconds, for each connection or megabyte.
    pub runs_a_unit: f64,
    pub nanoseconds_a_unit: f64,
    pub unit: &'static str,
}

/// Everything, in a lab of its own.
pub fn measure(quick: bool) -> Result<Vec<Hook>> {
    println!("the cost of each hook");
    let stage = Stage::build(&[Place::SameNode])?;
    let pair = stage.pair(Place::SameNode, Way::Mesh)?;
    let kernel = stage.lab.agent(1)?.kernel();
    let counted = kernel::measure()?;
    let seconds = if quick { 1 } else { 4 };
    let mut hooks = Vec::new();
    hooks.extend(during(&kernel, pair, "connect, 1 byte, close", "connection", || {
        let seen = pair.client.storm(pair.server.at(REPLY), 16, seconds).run()?;
        ensure!(seen.churned.ok > 0, "{seen:?}");
        Ok(seen.churned.ok)
    })?);
    hooks.extend(during(&kernel, pair, "bulk, 1 stream", "MB", || {
        let (to, time) = (pair.server.v4().to_string(), seconds.to_string());
        let args = ["-c", &to, "-p", &IPERF.to_string(), "-t", &time, "--json"];
        let report: serde_json::Value = serde_json::from_str(&pair.client.output("iperf3", &args)?)?;
        let bytes = report["end"]["sum_received"]["bytes"].as_u64().unwrap_or(0);
        ensure!(bytes > 0, "iperf3 carried nothing");
        Ok(bytes / 1_000_000)
    })?);
    drop(counted);
    stage.lab.remove()?;
    Ok(hooks)
}

/// What the programs of both ends cost while some units of `work` are done.
fn during(
    kernel: &Kernel,
    pair: &Pair,
    traffic: &'static str,
    unit: &'static str,
    work: impl FnOnce() -> Result<u64>,
) -> Result<Vec<Hook>> {
    let ends: [(&'static str, &Pod); 2] = [("client", &pair.client), ("server", &pair.server)];
    let look = || ends.into_iter().map(|(_, pod)| kernel.costs(pod)).collect::<Result<Vec<BTreeMap<String, Cost>>>>();
    let before = look()?;
    #[expect(clippy::cast_precision_loss, reason = "counts of a few seconds")]
    let units = work()?.max(1) as f64;
    let after = look()?;
    let mut hooks = Vec::new();
    for ((end, _), (before, after)) in ends.into_iter().zip(before.into_iter().zip(after)) {
        for (program, cost) in after {
            let earlier = before.get(&program).copied().unwrap_or_default();
            let (runs, time) = (cost.runs - earlier.runs, cost.time.saturating_sub(earlier.time));
            if runs > 0 {
                #[expect(clippy::cast_precision_loss, reason = "counts of a few seconds")]
                let (count, nanoseconds) = (runs as f64, time.as_nanos() as f64);
                hooks.push(Hook {
                    traffic,
                    end,
                    program,
                    runs,
                    nanoseconds_a_run: nanoseconds / count,
                    runs_a_unit: count / units,
                    nanoseconds_a_unit: nanoseconds / units,
                    unit,
                });
            }
        }
    }
    Ok(hooks)
}

/// A Markdown table of them; nothing where there are none.
pub fn table(hooks: &[Hook], text: &mut String) {
    if hooks.is_empty() {
        return;
    }
    text.push_str(
        "\n## Hooks of the kernel lane\n\n| traffic | end | program | runs | ns a run | runs a unit | ns a unit | unit |\n\
         |---|---|---|---:|---:|---:|---:|---|\n",
    );
    for hook in hooks {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {:.0} | {:.2} | {:.0} | {} |",
            hook.traffic,
            hook.end,
            hook.program,
            hook.runs,
            hook.nanoseconds_a_run,
            hook.runs_a_unit,
            hook.nanoseconds_a_unit,
            hook.unit
        );
    }
}

#[cfg(test)]
mod tests {
    use super::{Hook, table};

    #[test]
    fn a_line_for_every_program_and_no_table_without_any() {
        let mut text = String::new();
        table(&[], &mut text);
        assert_eq!(text, "");
        let hook = Hook {
            traffic: "bulk",
            end: "client",
            program: "observe".to_owned(),
            runs: 200,
            nanoseconds_a_run: 51.4,
            runs_a_unit: 0.5,
            nanoseconds_a_unit: 25.7,
            unit: "MB",
        };
        table(&[hook], &mut text);
        assert!(text.ends_with("| bulk | client | observe | 200 | 51 | 0.50 | 26 | MB |\n"), "{text}");
    }
}
