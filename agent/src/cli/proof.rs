//! `heddle proof`: how a pair of pods is protected, shown by a connection.

use std::{fmt::Write as _, process::ExitCode, time::Duration};

use super::{
    ask::{Ask, json, print, query},
    table::plain,
};
use crate::{
    life::{
        limits,
        proof::{Near, OnLane, Report, Verdict},
    },
    tunnel::{Program, Witness},
};

/// What ending the process in the pod may take on top of the proof itself.
const MORE: Duration = Duration::from_secs(5);
/// When it could not be found out.
const UNKNOWN: u8 = 2;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The pod to connect from: NAMESPACE/POD.
    #[arg(value_name = "A")]
    from: String,
    /// The pod to connect to: NAMESPACE/POD:PORT, or service/NAME.NAMESPACE:PORT. Without a port, the first one by which a
    /// Service reaches the pod.
    #[arg(value_name = "B")]
    to: String,
    /// Say this to the app and wait for an answer, so that bytes are carried.
    #[arg(long, value_name = "TEXT", default_value = "")]
    say: String,
    #[command(flatten)]
    ask: Ask,
}

impl Args {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let parts = [("from", Some(&*self.from)), ("to", Some(&*self.to)), ("say", Some(&*self.say))];
        let report: Report = match self.ask.post(&query("/proof", &parts), limits::PROOF + MORE) {
            Ok(report) => report,
            Err(error) => {
                eprintln!("heddle: {error:#}");
                return Ok(ExitCode::from(UNKNOWN));
            }
        };
        print(&if self.ask.json { json(&report)? } else { text(&report) })?;
        Ok(ExitCode::from(report.verdict.status()))
    }
}

pub(super) fn text(report: &Report) -> String {
    let Report { summary, from, to, address, near, lane, far, bytes, policy, allowed, .. } = report;
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            // Writing to a String can't fail.
            let _ = writeln!(text, "{name:14}{}", plain(value));
        }
    };
    line("verdict", &format!("{}: {summary}", verdict(report.verdict)));
    line("from", &format!("{} ({}{})", from.pod, from.state, reason(&from.detail)));
    line("to", &format!("{to} at {address}"));
    line("captured by", &programs(&from.programs));
    match (near, lane) {
        (Some(near), _) => of_near(near, &mut line),
        (None, Some(lane)) => of_lane(lane, &mut line),
        (None, None) => line("near side", "the agent did not see the connection"),
    }
    match far {
        // The kernel is both sides.
        None if lane.is_some() => {}
        None => line("far side", "does not say"),
        Some(far) => of_far(far, &mut line),
    }
    let decision = match allowed {
        None => String::new(),
        Some(allowed) => {
            let by = if policy.is_empty() { "no policy is named".to_owned() } else { format!("by {policy}") };
            format!("{}, {by}", if *allowed { "allowed" } else { "denied" })
        }
    };
    line("policy", &decision);
    if near.is_some() || lane.is_some() {
        line("bytes", &format!("{} to the app, {} back", bytes.to_app, bytes.to_client));
    }
    if bytes.tunnel_sent > 0 {
        let (sent, received) = (bytes.tunnel_sent, bytes.tunnel_received);
        line("on the wire", &format!("{sent} sent, {received} received, encrypted, by this tunnel so far"));
    }
    text
}

fn of_near(near: &Near, line: &mut impl FnMut(&str, &str)) {
    let Near { tunnel, client, pod, address, tls, cipher, status, reason, detail, .. } = near;
    if *tunnel {
        line("near side", &format!("tunnel from {client} to {pod} at {address}, {tls} {cipher}"));
        line("  client", &format!("{} certificate {}", near.client_identity, near.client_serial));
        line("  server", &format!("{} certificate {}", near.server_identity, near.server_serial));
        line("  answer", &status.map(|status| status.to_string()).unwrap_or_default());
    } else if near.security == "kernel_attested" {
        line("near side", &format!("attested by the kernel, in one crossing of the agent, from {client} to {pod}"));
        line("  client", &near.client_identity);
        line("  server", &near.server_identity);
    } else if reason.is_empty() {
        line("near side", &format!("plain from {client} to {pod}"));
    }
    if !reason.is_empty() {
        line("  failure", &format!("{reason}: {detail}"));
    }
}

fn of_lane(lane: &OnLane, line: &mut impl FnMut(&str, &str)) {
    let OnLane { kernel, client, pod, address, .. } = lane;
    let done = match &**kernel {
        "carries" => "carried by the kernel alone",
        "let_out" => "let out by the kernel, and not taken by the other side",
        "refused" => "refused by the kernel",
        "would_carry" => "left to the kernel alone, and not accepted",
        other => other,
    };
    line("kernel lane", &format!("{done}, from {client} to {pod} at {address}"));
    line("  client", &lane.client_identity);
    line("  server", &lane.server_identity);
    line("  taken in by", &programs(&lane.programs));
}

fn of_far(far: &Witness, line: &mut impl FnMut(&str, &str)) {
    let Witness { node, pod, client, tls, cipher, decision, reason, detail, delivered, .. } = far;
    if tls.is_empty() {
        line("far side", &format!("the same agent, of {node}, for {pod}"));
    } else {
        line("far side", &format!("agent of {node} for {pod}: tunnel from {client}, {tls} {cipher}"));
        line("  client", &format!("{} certificate {}", far.client_identity, far.client_serial));
        line("  server", &format!("{} certificate {}", far.server_identity, far.server_serial));
    }
    line("  captured by", &programs(&far.programs));
    let outcome = match (&**decision, *delivered) {
        (_, true) => "allowed and accepted by the app".to_owned(),
        ("", false) => format!("not delivered: {reason}: {detail}"),
        (decision, false) => format!("{decision}, not delivered: {reason}: {detail}"),
    };
    line("  outcome", &outcome);
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Proven => "proven",
        Verdict::Denied => "denied",
        Verdict::AppRefused => "not accepted by the app",
        Verdict::NotAuthenticated => "not authenticated",
        Verdict::Plain => "plain",
        Verdict::Uncaptured => "uncaptured",
        Verdict::Disagreement => "disagreement",
        Verdict::Unknown => "unknown",
    }
}

fn reason(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(": {detail}") }
}

fn programs(programs: &[Program]) -> String {
    let named = |program: &Program| format!("{} (program {}, link {})", program.name, program.program, program.link);
    programs.iter().map(named).collect::<Vec<_>>().join(", ")
}
