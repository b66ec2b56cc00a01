//! One run of one tool, and its rows.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use heddle_lab::reports::Storm;
use serde::Deserialize;

use super::{
    figures::{Sample, Way},
    machine::{Clock, cpu_seconds},
    rows::{Measurement, Place},
    stage::{self, IPERF, Pair, REPLY, Stage, WEB},
};

/// How long each kind runs (seconds).
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub throughput: u64,
    pub connect: u64,
    pub sustained: u64,
    pub http: u64,
    pub fixed: u64,
}

impl Times {
    pub const FULL: Self = Self { throughput: 4, connect: 4, sustained: 60, http: 4, fixed: 5 };
    /// For seeing that everything works.
    pub const QUICK: Self = Self { throughput: 1, connect: 1, sustained: 4, http: 1, fixed: 2 };
}

/// What one run gave.
#[derive(Debug, Default)]
pub struct Taken {
    pub sample: Sample,
    /// Connections in each second, of the sustained run.
    pub per_second: Vec<u64>,
    /// Cores that others used meanwhile.
    pub foreign: f64,
    /// Something that the reader has to know, such as connections that failed.
    pub note: Option<String>,
}

/// Most connections that proofs of capture make from a pod while one measurement runs: one a family and proof.
const PROOFS: u64 = 16;

/// Runs it once, and attributes the CPU time of the agents.
pub fn take(stage: &Stage, place: Place, way: Way, what: Measurement, times: Times) -> Result<Taken> {
    let pair = stage.pair(place, way)?;
    stage.forget_logs()?;
    let agents = if way == Way::Mesh { stage.agents(place)? } else { Vec::new() };
    let cpu = || agents.iter().map(|pid| cpu_seconds(*pid)).collect::<Result<Vec<f64>>>();
    let lane = stage::takes_the_lane(place, way);
    let ways = lane.then(|| stage.counts(pair)).transpose()?;
    let (clock, before) = (Clock::read(stage.lab.prefix())?, cpu()?);
    let done = run(pair, what, times)?;
    let (after, clock_after) = (cpu()?, Clock::read(stage.lab.prefix())?);
    if let Some(earlier) = ways {
        let now = stage.counts(pair)?;
        let (lane, marked) = (now.lane - earlier.lane, now.marked - earlier.marked);
        let (missed, full) = (now.lane_missed - earlier.lane_missed, now.lane_full - earlier.lane_full);
        // A figure of something else would be worse than none. The agent's own proofs of capture connect from the pod, too.
        ensure!(
            lane > 0 && missed + full == 0 && marked <= PROOFS,
            "{lane} connections took the kernel lane, but {marked} went through the agent ({missed} had no verdict), and {full} \
             for want of room"
        );
    }
    let mut taken = Taken { sample: done.sample, per_second: done.per_second, note: done.note, foreign: 0.0 };
    taken.foreign = clock_after.foreign_since(&clock);
    let Some((per, units)) = done.work.filter(|(_, units)| *units > 0.0) else { return Ok(taken) };
    let name = |part: &str| format!("cpu_s_per_{per}{}{part}", what.cpu_suffix());
    taken.sample.insert(name("_system"), clock_after.busy_since(&clock) / units);
    let used: Vec<f64> = before.iter().zip(&after).map(|(before, after)| (after - before) / units).collect();
    if !used.is_empty() {
        taken.sample.insert(name(""), used.iter().sum());
    }
    // On one node one agent is both.
    if let [source, destination] = used.as_slice() {
        taken.sample.insert(name("_source"), *source);
        taken.sample.insert(name("_destination"), *destination);
    }
    Ok(taken)
}

/// What a tool reported.
#[derive(Default)]
struct Done {
    sample: Sample,
    per_second: Vec<u64>,
    /// Unit in the names of CPU rows, and how many of them were done.
    work: Option<(&'static str, f64)>,
    note: Option<String>,
}

fn run(pair: &Pair, what: Measurement, times: Times) -> Result<Done> {
    match what {
        Measurement::Throughput { streams, reverse } => iperf(pair, what, streams, reverse, times.throughput),
        Measurement::Connect { concurrent } => storm(pair, what, concurrent.into(), times.connect),
        Measurement::Sustained => storm(pair, what, 32, times.sustained),
        Measurement::Http { connections } => wrk(pair, what, connections, times.http),
        Measurement::Fixed => paced(pair, what, times.fixed),
    }
}

/// The part of `iperf3 --json` that is read.
#[derive(Deserialize)]
struct Iperf {
    end: IperfEnd,
}

#[derive(Deserialize)]
struct IperfEnd {
    sum_received: IperfSum,
}

#[derive(Deserialize)]
struct IperfSum {
    bytes: f64,
    bits_per_second: f64,
}

fn iperf(pair: &Pair, what: Measurement, streams: u8, reverse: bool, seconds: u64) -> Result<Done> {
    let (to, port) = (pair.server.v4().to_string(), IPERF.to_string());
    let (seconds_text, streams) = (seconds.to_string(), streams.to_string());
    let mut args = vec!["-c", &to, "-p", &port, "-t", &seconds_text, "-P", &streams, "--json"];
    args.extend(reverse.then_some("--reverse"));
    let report = run_tool(pair, "iperf3", &args, seconds)?;
    let sum = serde_json::from_str::<Iperf>(&report).with_context(|| report.clone())?.end.sum_received;
    ensure!(sum.bytes > 0.0, "iperf3 carried nothing: {report}");
    let sample = Sample::from([(what.name(), sum.bits_per_second / 1e9)]);
    Ok(Done { sample, work: Some(("gb", sum.bytes / 1e9)), ..Done::default() })
}

fn storm(pair: &Pair, what: Measurement, concurrent: u32, seconds: u64) -> Result<Done> {
    let Storm { churned: seen, per_second } = pair.client.storm(pair.server.at(REPLY), concurrent, seconds).run()?;
    ensure!(seen.ok > 0, "no connection succeeded: {:?}", seen.errors);
    let (name, [p50, p99]) = (what.name(), [seen.p50_us, seen.p99_us].map(exact));
    let mut sample = Sample::from([
        (name.clone(), exact(seen.ok) / seen.seconds),
        (format!("{name}_p50"), p50),
        (format!("{name}_p99"), p99),
    ]);
    if what == Measurement::Sustained {
        let slowest = per_second.iter().min().copied().unwrap_or(0);
        sample.insert(format!("{name}_slowest_second"), exact(slowest));
    }
    let failed = (seen.failed > 0)
        .then(|| format!("{} of {} connections failed: {:?}", seen.failed, seen.ok + seen.failed, seen.errors));
    Ok(Done { sample, per_second, note: failed, ..Done::default() })
}

fn paced(pair: &Pair, what: Measurement, seconds: u64) -> Result<Done> {
    let seen = pair.client.paced(pair.server.at(REPLY), (1_000, 16), seconds).run()?;
    ensure!(seen.error.is_none(), "{seen:?}");
    let (name, [p50, p99]) = (what.name(), [seen.p50_us, seen.p99_us].map(exact));
    let sample = Sample::from([(format!("{name}_p50"), p50), (format!("{name}_p99"), p99)]);
    Ok(Done { sample, ..Done::default() })
}

fn wrk(pair: &Pair, what: Measurement, connections: u8, seconds: u64) -> Result<Done> {
    let (url, time) = (format!("http://{}/", pair.server.at(WEB)), format!("{seconds}s"));
    let (threads, connections) = (connections.min(2).to_string(), connections.to_string());
    let args = ["-t", &threads, "-c", &connections, "-d", &time, "--latency", &url];
    let text = run_tool(pair, "wrk", &args, seconds)?;
    let seen = Wrk::read(&text).with_context(|| format!("wrk says: {text}"))?;
    let name = what.name();
    let sample = Sample::from([
        (name.clone(), seen.rate),
        (format!("{name}_p50"), seen.p50_us),
        (format!("{name}_p99"), seen.p99_us),
    ]);
    Ok(Done { sample, work: Some(("10k_requests", seen.requests / 1e4)), note: seen.errors, ..Done::default() })
}

/// Runs a tool in the client pod and gives what it printed.
fn run_tool(pair: &Pair, program: &str, args: &[&str], seconds: u64) -> Result<String> {
    let process = pair.client.start_process(program, program, args)?;
    process.wait(Duration::from_secs(seconds + 30))?.ok()
}

/// What wrk prints.
#[derive(Debug, PartialEq)]
struct Wrk {
    requests: f64,
    rate: f64,
    p50_us: f64,
    p99_us: f64,
    errors: Option<String>,
}

impl Wrk {
    fn read(text: &str) -> Result<Self> {
        let after = |label: &str| {
            let line = text.lines().map(str::trim).find_map(|line| line.strip_prefix(label));
            line.map(str::trim).with_context(|| format!("no line {label}"))
        };
        let requests = text.lines().find_map(|line| line.trim().split_once(" requests in ")).context("no requests")?.0;
        let errors = ["Socket errors:", "Non-2xx or 3xx responses:"];
        let errors: Vec<String> =
            errors.iter().filter_map(|label| after(label).ok().map(|rest| format!("{label} {rest}"))).collect();
        Ok(Self {
            requests: requests.parse()?,
            rate: after("Requests/sec:")?.parse()?,
            p50_us: micros(after("50%")?)?,
            p99_us: micros(after("99%")?)?,
            errors: (!errors.is_empty()).then(|| format!("wrk: {}", errors.join("; "))),
        })
    }
}

/// `123.45us`, `1.2ms` or `3s` in microseconds.
fn micros(text: &str) -> Result<f64> {
    for (unit, factor) in [("us", 1.0), ("ms", 1e3), ("m", 60e6), ("s", 1e6)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Ok(number.trim().parse::<f64>()? * factor);
        }
    }
    bail!("{text} is no time")
}

/// Counts and microseconds of a run are far below 2^52.
#[expect(clippy::cast_precision_loss, reason = "small enough to be exact")]
fn exact(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::Wrk;

    const REPORT: &str = "Running 1s test @ http://10.244.2.10:8080/
  2 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   639.10us  100.22us   2.01ms   80.00%
    Req/Sec    11.70k     1.01k   13.00k    70.00%
  Latency Distribution
     50%  639.00us
     75%  700.00us
     90%    0.90ms
     99%    1.75ms
  23224 requests in 1.00s, 6.01MB read
  Socket errors: connect 0, read 1, write 0, timeout 0
Requests/sec:  23224.50
Transfer/sec:      6.00MB
";

    #[test]
    fn a_report_of_wrk_is_read() -> anyhow::Result<()> {
        let seen = Wrk::read(REPORT)?;
        assert_eq!((seen.requests, seen.rate, seen.p50_us, seen.p99_us), (23_224.0, 23_224.5, 639.0, 1_750.0));
        assert_eq!(seen.errors.as_deref(), Some("wrk: Socket errors: connect 0, read 1, write 0, timeout 0"));
        assert!(Wrk::read("unable to connect").is_err());
        Ok(())
    }
}
