//! Are spans of a connection what a stock OpenTelemetry receiver understands, from both sides and in one trace?

use std::time::{Duration, Instant};

use anyhow::Context;
use heddle_lab::{
    Lab, Result, binaries, needs_root,
    process::{Place, Process},
    until,
};
use serde_json::{Value, json};

/// Where both agents send spans: node 1's address on the link.
const COLLECTOR: &str = "http://192.168.244.1:4317";

/// Starts the receiver on node 1; it prints a line of JSON per span.
fn receiver(lab: &Lab, python: &std::path::Path) -> Result<Process> {
    let place =
        Place { netns: Some(lab.node(1)?.netns.path()), cgroup: None, logs: lab.dir().join("logs"), files: None };
    let script = binaries::otlp_receiver();
    let script = script.to_str().context("the receiver's path")?;
    let mut process = Process::start(&place, "otlp-receiver", python, &[script, "0.0.0.0:4317"])?;
    assert_eq!(process.next_line(Duration::from_secs(30))?, "ready");
    Ok(process)
}

fn spans(receiver: &Process) -> Vec<Value> {
    receiver.stdout().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The pair of spans of one connection, client's and server's, of which the client's has this error.
fn pair(receiver: &Process, error: &Value) -> Option<(Value, Value)> {
    let spans = spans(receiver);
    let of = |kind| spans.iter().filter(move |span| span["kind"] == kind);
    let mut clients = of("SPAN_KIND_CLIENT").filter(|span| span["attributes"]["error.type"] == *error);
    clients.find_map(|client| {
        let server = of("SPAN_KIND_SERVER").find(|span| span["trace"] == client["trace"])?;
        Some((client.clone(), server.clone()))
    })
}

#[test]
fn both_sides_of_a_connection_are_spans_of_one_trace_to_an_independent_receiver() -> Result {
    needs_root!();
    let Some(python) = binaries::otlp_python() else {
        heddle_lab::skip("traces", "needs Python with opentelemetry-proto, which `cargo xtask test` installs");
        return Ok(());
    };
    let lab = Lab::builder().agent_args(&["--otlp-endpoint", COLLECTOR]).start()?;
    let collector = receiver(&lab, &python)?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000", "echo:7001"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    let service = lab.service("shop", "web", (80, 7000), &[&server])?;

    let wait = Duration::from_secs(40);
    // A connection before the agent knows the Service goes nowhere, and makes no span.
    until(wait, "the Service to be known", || {
        let seen = client.connect(service.at()).say("hello").with("--expect", 5).run().ok()?;
        seen.error.is_none().then_some(())
    })?;
    let (offered, answered) = until(wait, "a span of either side", || pair(&collector, &Value::Null))?;
    assert_eq!(offered["parent"], "", "the trace begins at the client's side");
    assert_eq!((&offered["status"], &answered["status"]), (&json!("STATUS_CODE_UNSET"), &json!("STATUS_CODE_UNSET")));
    assert_eq!(answered["parent"], offered["span"], "and goes on at the server's");
    assert_ne!(answered["span"], offered["span"]);
    let log = lab.agent(2)?.wait_access("the server's line", |line| line.get("trace_id") == offered["trace"])?;
    assert_eq!(log.get("direction"), "inbound", "spans and access log name the same trace");
    let time = |span: &Value, end: &str| span[end].as_u64().unwrap_or_default();
    for span in [&offered, &answered] {
        assert!(time(span, "start") > 0 && time(span, "end") >= time(span, "start"), "{span}");
        assert_eq!((&span["scope"], &span["name"]), (&json!("heddle"), &json!("CONNECT")));
        let attributes = &span["attributes"];
        assert_eq!(attributes["network.transport"], "tcp");
        assert_eq!(attributes["server.address"], "web.shop.svc.cluster.local");
        assert_eq!((&attributes["server.port"], &attributes["client.address"]), (&json!(7000), &json!(client.v4())));
        assert_eq!(attributes["heddle.source.principal"], client.identity());
        assert_eq!(attributes["heddle.destination.principal"], server.identity());
        assert_eq!((&attributes["heddle.request_bytes"], &attributes["heddle.response_bytes"]), (&json!(5), &json!(5)));
    }
    for (span, own, peer, node) in [(&offered, "client", "server", "node1"), (&answered, "server", "client", "node2")] {
        let resource = &span["resource"];
        assert_eq!((&resource["service.name"], &resource["k8s.pod.name"]), (&json!(own), &json!(own)));
        assert_eq!((&resource["k8s.namespace.name"], &resource["k8s.node.name"]), (&json!("shop"), &json!(node)));
        assert_eq!(span["attributes"]["peer.service"], peer);
    }

    let rule = json!({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["7001"]}}]}]});
    lab.authorize("shop", "no-7001", &rule)?;
    let (offered, answered) = until(wait, "spans of a denied connection", || {
        client.connect(server.at(7001)).say("x").with("--expect", 1).run().ok()?;
        pair(&collector, &json!("denied_by_peer"))
    })?;
    assert_eq!(answered["attributes"]["error.type"], "policy_denied");
    assert_eq!(answered["attributes"]["heddle.policy"], "shop/no-7001");
    assert_eq!(answered["message"], "explicitly denied by: shop/no-7001");
    for span in [&offered, &answered] {
        assert_eq!(span["status"], "STATUS_CODE_ERROR");
    }

    for node in [1, 2] {
        // Counted when the collector has answered, which is after it told of them.
        let scrape = until(wait, "both spans to be counted", || {
            let scrape = lab.agent(node).ok()?.metrics().ok()?;
            (scrape.sum("heddle_spans_exported_total", &[]) >= 2.0).then_some(scrape)
        })?;
        assert_eq!(scrape.sum("heddle_spans_dropped_total", &[]), 0.0);
    }
    Ok(())
}

#[test]
fn a_collector_that_is_not_there_costs_spans_and_nothing_else() -> Result {
    needs_root!();
    let lab = Lab::builder().agent_args(&["--otlp-endpoint", COLLECTOR]).start()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    let churned = client.churn(server.at(7000), 200, 8).run()?;
    assert_eq!((churned.ok, churned.failed), (200, 0), "{churned:?}");
    let agent = lab.agent(1)?;
    until(Duration::from_secs(30), "spans to be given up", || {
        let failed = [("reason", "export_failed")];
        (agent.metrics().ok()?.sum("heddle_spans_dropped_total", &failed) >= 1.0).then_some(())
    })?;
    assert_eq!(agent.metrics()?.sum("heddle_spans_exported_total", &[]), 0.0);
    assert_eq!(client.connect(server.at(7000)).say("x").with("--expect", 1).run()?.error, None);
    // The agent's end waits a second for the last spans, and no more.
    let began = Instant::now();
    agent.daemon.terminate(Duration::from_secs(10))?;
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    Ok(())
}
