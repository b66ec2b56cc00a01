//! Do metrics, access log and status say what happened?

use std::{
    io::Write,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::Context;
use heddle_lab::{Lab, Pod, Result, needs_program, needs_root, reports::Datagrams, until};
use serde_json::json;

/// What the metrics carry, in Istio's words.
const LABELS: [&str; 23] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
];
const SENT: &str = "istio_tcp_sent_bytes_total";
const RECEIVED: &str = "istio_tcp_received_bytes_total";

fn stage(servers: &[&str]) -> Result<(Lab, Pod, Pod)> {
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(servers).start()?;
    let client = lab.pod("shop", "client").start()?;
    Ok((lab, client, server))
}

#[test]
fn metrics_carry_every_label_and_the_bytes_that_the_apps_sent() -> Result {
    needs_root!();
    let (lab, client, server) = stage(&["echo:7000", "source:7001"])?;
    // 7 bytes up ("100000\n"), 100,000 down.
    let seen = client.connect(server.at(7001)).say("100000\n").run()?;
    assert_eq!((seen.error, seen.received.len()), (None, 100_000));
    for (node, reporter) in [(1, "source"), (2, "destination")] {
        let mine = [("reporter", reporter), ("connection_security_policy", "mutual_tls")];
        let agent = lab.agent(node)?;
        let scrape = until(Duration::from_secs(10), "the connection to be counted as closed", || {
            agent.metrics().ok().filter(|scrape| scrape.sum("istio_tcp_connections_closed_total", &mine) >= 1.0)
        })?;
        assert_eq!(scrape.sum("istio_tcp_connections_opened_total", &mine), 1.0);
        // Istio's meaning for either reporter: sent is the answer's bytes, received the request's.
        assert_eq!((scrape.sum(SENT, &mine), scrape.sum(RECEIVED, &mine)), (100_000.0, 7.0), "{reporter}");
        let sample = scrape.with(SENT, &mine).next().cloned();
        let labels = sample.map(|sample| sample.labels).unwrap_or_default();
        for label in LABELS {
            assert!(labels.get(label).is_some_and(|value| !value.is_empty()), "{label} in {labels:?}");
        }
        for (label, value) in [
            ("source_workload", "client"),
            ("source_workload_namespace", "shop"),
            ("source_principal", client.identity().as_str()),
            ("source_app", "client"),
            ("destination_workload", "server"),
            ("destination_workload_namespace", "shop"),
            ("destination_principal", server.identity().as_str()),
            ("request_protocol", "tcp"),
            ("response_flags", "-"),
        ] {
            assert_eq!(labels.get(label).map(String::as_str), Some(value), "{label}");
        }
    }
    Ok(())
}

#[test]
fn promtool_has_nothing_to_say_about_a_live_scrape() -> Result {
    needs_root!();
    needs_program!("promtool");
    let (lab, client, server) = stage(&["echo:7000"])?;
    let plain = lab.pod("shop", "outsider").outside_the_mesh().start()?;
    lab.authorize(
        "shop",
        "no-7001",
        &json!({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["7001"]}}]}]}),
    )?;
    // Something of everything: a tunnel, plaintext, a denial, a failure.
    assert_eq!(client.connect(server.at(7000)).say("x").with("--expect", 1).run()?.error, None);
    assert_eq!(plain.connect(server.at(7000)).say("x").with("--expect", 1).run()?.error, None);
    for port in [7001, 7999] {
        client.connect(server.at(port)).say("x").with("--expect", 1).run()?;
    }
    for node in [1, 2] {
        let agent = lab.agent(node)?;
        until(Duration::from_secs(10), "a tunnel's health", || {
            agent.metrics().ok().filter(|scrape| scrape.has("istio_tcp_connections_failed_total"))
        })?;
        let text = agent.metrics_text()?;
        let checked = promtool(&text)?;
        assert!(checked.is_empty(), "node {node}: {checked}\n{text}");
    }
    Ok(())
}

/// What `promtool check metrics` complains of; empty when it is content.
fn promtool(text: &str) -> Result<String> {
    let mut check = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    check.stdin.take().context("a pipe")?.write_all(text.as_bytes())?;
    let output = check.wait_with_output()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    Ok(if output.status.success() { said } else { format!("{}: {said}", output.status) })
}

#[test]
fn encrypted_bytes_pool_and_tcp_health_are_in_the_metrics() -> Result {
    needs_root!();
    let (lab, client, server) = stage(&["echo:7000"])?;
    const BYTES: u64 = 4 << 20;
    let seen = client.transfer(server.at(7000), BYTES).run()?;
    assert_eq!((seen.error, seen.received), (None, BYTES));
    let (mut held, _) = client.hold(server.at(7000), 2).open()?;
    for (node, direction) in [(1, "outbound"), (2, "inbound")] {
        let agent = lab.agent(node)?;
        let mine = [("direction", direction)];
        // TCP is asked once a second, when the tunnel sends something.
        let scrape = until(Duration::from_secs(20), "a sample of TCP's health", || {
            held.check().ok()?;
            let scrape = agent.metrics().ok()?;
            (scrape.sum("heddle_tunnel_tcp_rtt_seconds_count", &mine) >= 1.0).then_some(scrape)
        })?;
        let rtt = scrape.sum("heddle_tunnel_tcp_rtt_seconds_sum", &mine);
        assert!(rtt > 0.0 && rtt < 60.0, "{rtt}");
        assert!(scrape.sum("heddle_tunnel_tcp_segments_total", &mine) > 0.0);
        assert!(scrape.has("heddle_tunnel_tcp_retransmissions_total") && scrape.has("heddle_tunnel_tcp_lost_segments"));
        for towards in ["server", "client"] {
            let way = [("direction", direction), ("towards", towards)];
            let (wire, app) =
                (scrape.sum("heddle_tunnel_bytes_total", &way), scrape.sum("heddle_app_bytes_total", &way));
            assert!(app >= BYTES as f64 && wire > app && wire < app * 1.1 + 100_000.0, "{towards}: {wire} of {app}");
        }
        assert!(scrape.sum("heddle_tunnels_open", &mine) >= 1.0);
    }
    let scrape = lab.agent(1)?.metrics()?;
    assert!(scrape.sum("heddle_pool_connections_open", &[]) >= 1.0);
    assert_eq!(scrape.sum("heddle_pool_streams_open", &[]), 2.0);
    assert_eq!(scrape.sum("heddle_pool_streams_total", &[]), 3.0);
    assert!(scrape.sum("heddle_pool_streams_total", &[("connection", "reused")]) >= 1.0);
    assert_eq!(scrape.sum("istio_tcp_sockets_open", &[("reporter", "source")]), 2.0);
    for name in ["process_open_fds", "process_max_fds", "process_resident_memory_bytes", "tokio_num_alive_tasks"] {
        assert!(scrape.sum(name, &[]) > 0.0, "{name}");
    }
    held.close()
}

#[test]
fn a_dry_run_policy_is_counted_and_logged_and_decides_nothing() -> Result {
    needs_root!();
    let (lab, client, server) = stage(&["echo:7000"])?;
    let mut policy =
        heddle_lab::manifests::authorization_policy("shop", "trial", &json!({"action": "DENY", "rules": [{}]}));
    policy["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    lab.manifests().apply(&policy)?;
    let agent = lab.agent(2)?;
    let matched = [("policy", "shop/trial"), ("action", "deny")];
    until(Duration::from_secs(10), "the rehearsal to be counted", || {
        let seen = client.connect(server.at(7000)).say("x").with("--expect", 1).run().ok()?;
        assert_eq!(seen.error, None, "it decides nothing");
        (agent.metrics().ok()?.sum("heddle_dry_run_total", &matched) >= 1.0).then_some(())
    })?;
    agent.wait_log("Dry-run policy matches")?;
    assert_eq!(agent.metrics()?.sum("heddle_denied_total", &[]), 0.0);
    Ok(())
}

#[test]
fn bytes_are_counted_while_a_connection_lasts() -> Result {
    needs_root!();
    let (lab, client, server) = stage(&["echo:7000"])?;
    let (mut held, _) = client.hold(server.at(7000), 3).open()?;
    for round in 1..4_u32 {
        for (node, reporter) in [(1, "source"), (2, "destination")] {
            let mine = [("reporter", reporter)];
            let agent = lab.agent(node)?;
            until(Duration::from_secs(5), "live bytes", || {
                let scrape = agent.metrics().ok()?;
                (scrape.sum(SENT, &mine) == f64::from(3 * round)).then_some(())
            })?;
            assert_eq!(agent.metrics()?.sum("istio_tcp_connections_closed_total", &mine), 0.0);
        }
        held.check()?;
    }
    held.close()
}

#[test]
fn the_access_log_names_both_ends_of_a_connection() -> Result {
    needs_root!();
    let (lab, client, server) = stage(&["echo:7000"])?;
    let seen = client.connect(server.at(7000)).say("hello").with("--expect", 5).run()?;
    let local = seen.local.map(|local| local.to_string()).unwrap_or_default();
    let source = lab.agent(1)?.wait_access("the source's line", |line| line.get("src.addr") == local)?;
    let destination = lab
        .agent(2)?
        .wait_access("the destination's line", |line| line.get("dst.hbone_addr") == server.at(7000).to_string())?;
    for (line, direction) in [(&source, "outbound"), (&destination, "inbound")] {
        for (key, value) in [
            ("direction", direction),
            ("message", "connection complete"),
            ("src.workload", "client"),
            ("src.namespace", "shop"),
            ("src.cluster", "Kubernetes"),
            ("dst.cluster", "Kubernetes"),
            ("src.identity", client.identity().as_str()),
            ("dst.workload", "server"),
            ("dst.namespace", "shop"),
            ("dst.identity", server.identity().as_str()),
            ("dst.hbone_addr", server.at(7000).to_string().as_str()),
            ("bytes_sent", "5"),
            ("bytes_recv", "5"),
        ] {
            assert_eq!(line.get(key), value, "{key} of {line:?}");
        }
        assert!(line.get("duration").ends_with("ms"), "{line:?}");
    }
    assert_eq!(source.get("trace_id"), destination.get("trace_id"), "one connection, one id");
    Ok(())
}

#[test]
fn a_pod_that_can_not_be_captured_is_reported_with_the_reason() -> Result {
    needs_root!();
    let (lab, client, server) = stage(&["echo:7000"])?;
    let lost = lab.pod("shop", "lost").annotate("lab.heddle.dev/cgroup", "/nowhere/at/all").unproven().start()?;
    let reason = lost.wait_state("uncaptured")?;
    assert!(!reason.is_empty());
    let agent = lab.agent(1)?;
    let scrape = until(Duration::from_secs(5), "the gauge", || {
        agent.metrics().ok().filter(|scrape| scrape.sum("heddle_pods_uncaptured", &[]) >= 1.0)
    })?;
    assert_eq!(scrape.sum("heddle_pods_uncaptured", &[("reason", reason.as_str())]), 1.0);
    let status = agent.status_text()?;
    assert!(status.stdout.lines().any(|line| line.contains("lost") && line.contains("uncaptured")), "{status:?}");
    assert!(!status.status.success(), "scripts can tell");
    // It is the only one: others of the node are served as ever.
    assert_eq!(client.connect(server.at(7000)).say("x").with("--expect", 1).run()?.error, None);
    Ok(())
}

#[test]
fn certificate_expiry_and_captured_pods_are_in_the_metrics() -> Result {
    needs_root!();
    let (lab, _client, _server) = stage(&["echo:7000"])?;
    let agent = lab.agent(1)?;
    let scrape = until(Duration::from_secs(10), "a certificate in the metrics", || {
        agent.metrics().ok().filter(|scrape| scrape.has("heddle_certificate_expiry_timestamp_seconds"))
    })?;
    assert_eq!(scrape.sum("heddle_pods_captured", &[]), 1.0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs_f64();
    let expiries: Vec<f64> =
        scrape.with("heddle_certificate_expiry_timestamp_seconds", &[]).map(|sample| sample.value).collect();
    assert!(
        !expiries.is_empty() && expiries.iter().all(|at| *at > now && *at < now + 3_700.0),
        "{expiries:?} at {now}"
    );
    Ok(())
}

#[test]
fn a_connection_that_fails_is_counted_and_logged_with_its_reason() -> Result {
    needs_root!();
    let (lab, client, server) = stage(&["echo:7000"])?;
    client.connect(server.at(7999)).say("x").with("--expect", 1).run()?;
    let agent = lab.agent(1)?;
    let line = agent.wait_access("the failure", |line| line.get("message") == "connection failed")?;
    assert_ne!((line.get("reason"), line.get("response_flags")), ("", "-"), "{line:?}");
    assert!(agent.metrics()?.sum("istio_tcp_connections_failed_total", &[("reporter", "source")]) >= 1.0);
    Ok(())
}

#[test]
fn regions_and_zones_of_nodes_are_labels_where_they_are_asked_for() -> Result {
    needs_root!();
    let lab = Lab::builder().agent_args(&["--metrics-locality"]).start()?;
    let nodes = [("west", "west-1"), ("east", "east-2")];
    for (number, (region, zone)) in (1..).zip(nodes) {
        let node = lab.node(number)?;
        let mut manifest = heddle_lab::manifests::node(&node.name(), &node.addresses());
        manifest["metadata"]["labels"] =
            json!({"topology.kubernetes.io/region": region, "topology.kubernetes.io/zone": zone});
        lab.manifests().apply(&manifest)?;
    }
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    let labels = [
        ("source_region", "west"),
        ("source_zone", "west-1"),
        ("destination_region", "east"),
        ("destination_zone", "east-2"),
    ];
    for node in [1, 2] {
        until(Duration::from_secs(10), "localities in the labels", || {
            let seen = client.connect(server.at(7000)).say("x").with("--expect", 1).run().ok()?;
            assert_eq!(seen.error, None);
            (lab.agent(node).ok()?.opened(&labels).ok()? >= 1.0).then_some(())
        })?;
        assert_eq!(promtool(&lab.agent(node)?.metrics_text()?)?, "");
    }
    Ok(())
}

/// Connected sockets and single datagrams that left the pod past the mesh, as metrics and status have it.
fn unprotected(lab: &Lab, pod: &Pod) -> Result<[f64; 2]> {
    let agent = lab.agent(1)?;
    let (scrape, status) = (agent.metrics()?, agent.status()?);
    let counted = |event: &str| scrape.sum("heddle_pod_kernel_events_total", &[("pod", pod.name()), ("event", event)]);
    let events = ["udp_unprotected_connects", "udp_unprotected_datagrams"].map(counted);
    let line = status["pods"].as_array().and_then(|pods| pods.iter().find(|line| line["name"] == pod.name()));
    let counters = line.map(|line| line["counters"].clone()).unwrap_or_default();
    assert_eq!(counters["udp_unprotected_connects"].as_f64(), Some(events[0]), "{status}");
    Ok(events)
}

#[test]
fn udp_of_an_enrolled_pod_is_counted_as_unprotected_and_left_alone() -> Result {
    needs_root!();
    let (lab, client, server) = stage(&["echo:7000"])?;
    for pod in [&client, &server] {
        pod.echoes_datagrams(9000)?;
    }
    let whole = |count: u64| Datagrams { sent: count, echoed: count, error: None };
    assert_eq!(unprotected(&lab, &client)?, [0.0, 0.0]);
    // The pod itself, by any of its names, is not outside.
    for own in [client.at(9000), client.at6(9000), "127.0.0.1:9000".parse()?, "[::1]:9000".parse()?] {
        assert_eq!(client.datagrams(own, 2).run()?, whole(2), "{own}");
        assert_eq!(client.datagrams(own, 2).flag("--connected").run()?, whole(2), "{own}");
    }
    assert_eq!(unprotected(&lab, &client)?, [0.0, 0.0]);
    // A connected socket counts once, whatever it sends; on any other each datagram counts.
    for to in [server.at(9000), server.at6(9000)] {
        assert_eq!(client.datagrams(to, 5).flag("--connected").run()?, whole(5), "{to}");
    }
    assert_eq!(unprotected(&lab, &client)?, [2.0, 0.0]);
    for to in [server.at(9000), server.at6(9000)] {
        assert_eq!(client.datagrams(to, 5).run()?, whole(5), "{to}");
    }
    assert_eq!(unprotected(&lab, &client)?, [2.0, 10.0]);
    // The next agent takes the programs over as they hang, and their counts with them.
    lab.agent(1)?.restart()?;
    client.wait_captured()?;
    assert_eq!(client.datagrams(server.at(9000), 1).run()?, whole(1));
    assert_eq!(unprotected(&lab, &client)?, [2.0, 11.0]);
    // What left the mesh is nobody's business.
    client.withdraw()?;
    assert_eq!(client.datagrams(server.at(9000), 1).run()?, whole(1));
    assert!(!lab.agent(1)?.metrics_text()?.contains("udp_unprotected"));
    Ok(())
}
