//! What identity costs: certificates a second of one CA, and how long a pod waits for its first connection once it is enrolled.
//! There is nothing to compare it with on a lab without a mesh.

use std::time::Duration;

use anyhow::{Context, Result};
use heddle_lab::{Lab, Pod, hostile::now};
use serde_json::json;

use super::{
    figures::Sample,
    issue,
    machine::{Clock, Patience, QUIET},
    rows::{Better, IDENTITY, Row},
};

const ISSUED: &str = "certificates_per_second";
const WAITS: &str = "enrolment_to_mtls";
const NAMESPACE: &str = "bench";
/// A pod that waits longer is told of: TCP sends a SYN again after a second.
const SLOW: Duration = Duration::from_millis(500);

/// Its rows.
pub fn rows() -> Vec<Row> {
    let row = |name: String, unit, better| Row { name, unit, better, section: IDENTITY };
    let wait = |quantile: &str| row(format!("{WAITS}_{quantile}"), "ms", Better::Lower);
    vec![row(ISSUED.to_owned(), "certificates/s", Better::Higher), wait("p50"), wait("p99")]
}

/// All of them, in a fresh lab, and whether nothing else used the CPU meanwhile.
pub fn measure(quick: bool, patience: &mut Patience) -> Result<(Sample, bool)> {
    let (time, pods) = if quick { (Duration::from_secs(1), 3) } else { (Duration::from_secs(5), 60) };
    let mut lab = Lab::two_nodes()?;
    lab.hush();
    let quiet = patience.wait_quiet(lab.prefix())?;
    let clock = Clock::read(lab.prefix())?;
    let mut sample = Sample::from([(ISSUED.to_owned(), issue::certificates_per_second(&lab, time)?)]);
    let mut waits = (0..pods).map(|number| wait(&lab, number)).collect::<Result<Vec<f64>>>()?;
    waits.sort_by(f64::total_cmp);
    for (quantile, share) in [("p50", 50), ("p99", 99)] {
        // The smallest that this share does not exceed.
        let at = (waits.len() * share).div_ceil(100).saturating_sub(1);
        sample.insert(format!("{WAITS}_{quantile}"), *waits.get(at).context("no pod")?);
    }
    let stayed = Clock::read(lab.prefix())?.foreign_since(&clock) < QUIET;
    lab.remove()?;
    Ok((sample, quiet && stayed))
}

/// From the moment the pod's manifest says that it is enrolled to the first byte that a STRICT server of the other node echoes
/// (ms). Nothing but mutual TLS gets a byte from that, and the identity is one that the agent never had.
fn wait(lab: &Lab, number: usize) -> Result<f64> {
    let (client, server) = (format!("client-{number}"), format!("server-{number}"));
    lab.require(NAMESPACE, "default", &json!({"mtls": {"mode": "STRICT"}}))?;
    let server = lab.pod(NAMESPACE, &server).on(2).service_account("server").serves(&["echo:7000"]).start()?;
    let client = lab.pod(NAMESPACE, &client).outside_the_mesh().start()?;
    let (trying, _) = client.first(server.at(7000), 30).open()?;
    let enrolled = now();
    client.begin_enrolment()?;
    let arrived = trying.finish()?;
    client.wait_captured()?;
    let waited = Duration::from_micros(arrived.at_us.saturating_sub(enrolled));
    if waited > SLOW {
        let (longest, took) = (arrived.longest.0, Duration::from_micros(arrived.longest.1));
        println!(
            "    pod {number} waited {waited:.0?}: {} tries, of which number {longest} took {took:.0?}",
            arrived.tries
        );
        tell(lab, &client)?;
    }
    client.delete()?;
    server.delete()?;
    Ok(waited.as_secs_f64() * 1_000.0)
}

/// Prints what both agents told of a pod.
fn tell(lab: &Lab, pod: &Pod) -> Result<()> {
    for node in [1, 2] {
        let agent = lab.agent(node)?;
        let name = pod.full_name();
        let of_pod = |line: &&str| line.contains(&name);
        agent.daemon.log().lines().filter(of_pod).for_each(|line| println!("      agent {node}: {line}"));
        let lines = agent.access_log();
        let of_pod =
            lines.iter().filter(|line| format!("{}/{}", line.get("src.namespace"), line.get("src.workload")) == name);
        of_pod.for_each(|line| println!("      agent {node}, access log: {line:?}"));
    }
    Ok(())
}
