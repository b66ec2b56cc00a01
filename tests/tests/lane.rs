//! Do pods of one node talk past the agent, and is everything else as it was: policy, identity, metrics, a dead agent?

use std::{net::SocketAddr, time::Duration};

use heddle_lab::{
    Lab, Pod, Result, call::Holding, hostile::now, manifests, metrics::Scrape, needs_root, reports::Connected, until,
};
use serde_json::{Value, json};

const SENT: &str = "istio_tcp_sent_bytes_total";
const RECEIVED: &str = "istio_tcp_received_bytes_total";
const OPENED: &str = "istio_tcp_connections_opened_total";
const CLOSED: &str = "istio_tcp_connections_closed_total";
const REPORTERS: [&str; 2] = ["source", "destination"];
const MIB: u64 = 1 << 20;
/// What a connection without the agent in between costs the kernel's client at most, with room for a busy machine.
const AT_ONCE_US: u64 = 100_000;

/// One node, a server and two clients on it.
struct Stage {
    lab: Lab,
    server: Pod,
    client: Pod,
    other: Pod,
}

fn stage(servers: &[&str]) -> Result<Stage> {
    let lab = Lab::one_node()?;
    Ok(Stage {
        server: lab.pod("shop", "server").serves(servers).start()?,
        client: lab.pod("shop", "client").start()?,
        other: lab.pod("street", "other").start()?,
        lab,
    })
}

fn attested(reporter: &str) -> [(&str, &str); 2] {
    [("reporter", reporter), ("connection_security_policy", "kernel_attested")]
}

fn allow(pods: &[&Pod]) -> Value {
    let principals: Vec<String> = pods.iter().map(|pod| pod.principal()).collect();
    json!({"selector": {"matchLabels": {"app": "server"}}, "action": "ALLOW", "rules": [{"from": [{"source": {"principals": principals}}]}]})
}

fn deny_port(port: u16) -> Value {
    json!({"selector": {"matchLabels": {"app": "server"}}, "action": "DENY", "rules": [{"to": [{"operation": {"ports": [port.to_string()]}}]}]})
}

impl Stage {
    /// Connections that took the lane, as the kernel counts them.
    fn lane(&self) -> Result<u64> {
        Ok(self.lab.agent(1)?.kernel().counts(&self.client)?.lane)
    }

    fn hello(&self, client: &Pod, port: u16) -> Result<Connected> {
        client.connect(self.server.at(port)).say("hello").with("--expect", 5).run()
    }

    fn hold(&self, client: &Pod, count: u64) -> Result<Holding> {
        let (held, first) = client.hold(self.server.at(7000), count).with("--patience", 3_000).open()?;
        assert_eq!((first.alive, first.failed), (count, 0), "{first:?}");
        Ok(held)
    }

    /// Metrics once every connection has ended and been told of: what the kernel reports is read some times a second.
    fn settled(&self) -> Result<Scrape> {
        let agent = self.lab.agent(1)?;
        let mut last = 0.0;
        until(Duration::from_secs(15), "every connection to be counted as closed", || {
            std::thread::sleep(Duration::from_millis(300));
            let scrape = agent.metrics().ok()?;
            let [opened, closed] =
                [OPENED, CLOSED].map(|name| REPORTERS.map(|reporter| scrape.sum(name, &attested(reporter))));
            let before = std::mem::replace(&mut last, opened[0] + opened[1]);
            let at_rest = last > 0.0 && last == before && opened == closed;
            (at_rest && self.lanes().ok()? == 0).then_some(scrape)
        })
    }

    /// Connections that the kernel attests now.
    fn lanes(&self) -> Result<usize> {
        Ok(self.lab.agent(1)?.kernel().lanes()?.len())
    }
}

/// What the counters of either reporter grew by.
fn grown(before: &Scrape, after: &Scrape, name: &str) -> [f64; 2] {
    REPORTERS.map(|reporter| after.sum(name, &attested(reporter)) - before.sum(name, &attested(reporter)))
}

#[test]
fn after_a_first_connection_a_pair_of_one_node_talks_past_its_agent() -> Result {
    needs_root!();
    let stage = stage(&["who:7000", "echo:7001"])?;
    let Stage { lab, server, client, .. } = &stage;
    for port in [7000, 7001] {
        lab.take_the_lane(client, server, port)?;
    }
    let (agent, kernel) = (lab.agent(1)?, lab.agent(1)?.kernel());
    let before = kernel.counts(client)?;
    let ways = [
        (client.connect(server.at(7000)), server.at(7000)),
        (client.connect(server.at6(7000)), server.at6(7000)),
        (client.connect(server.at(7000)).v4_mapped(), server.at(7000)),
        (client.connect(server.at(7000)).bind_port(50_001), server.at(7000)),
    ];
    for (call, asked) in ways {
        let seen = call.run()?;
        let who = seen.who()?;
        let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        // A proxy has a port of its own.
        assert_eq!(Some(plain(who.peer)), seen.local.map(plain), "the client's own address and port at the app");
        assert_eq!(plain(who.local), asked, "the app's own address");
        assert_eq!(seen.peer.map(plain), Some(asked), "getpeername() of the client");
    }
    let after = kernel.counts(client)?;
    assert_eq!((after.lane - before.lane, after.marked - before.marked), (4, 0), "{after:?}");
    // And nothing of them is the agent's.
    let idle = agent.usage()?.sockets;
    let (mut held, first) = client.hold(server.at(7001), 50).open()?;
    assert_eq!((first.alive, first.failed), (50, 0), "{first:?}");
    assert_eq!(kernel.lanes()?.len(), 50, "each is attested by the kernel");
    let held_sockets = agent.usage()?.sockets;
    assert!(held_sockets <= idle + 5, "{idle} sockets of the agent before, {held_sockets} with 50 connections open");
    assert_eq!(held.check()?.alive, 50);
    held.close()?;
    until(Duration::from_secs(5), "the entries to go", || kernel.lanes().ok().filter(Vec::is_empty)).map(drop)
}

#[test]
fn sockets_of_other_kinds_are_carried_as_ever_beside_the_lane() -> Result {
    needs_root!();
    let stage = stage(&["echo:7000", "echo+fastopen:7001", "echo+mptcp:7002"])?;
    let Stage { lab, server, client, .. } = &stage;
    for port in [7000, 7001, 7002] {
        lab.take_the_lane(client, server, port)?;
    }
    let hello = |port| client.connect(server.at(port)).say("in the first packet").with("--expect", 19);
    let before = stage.lane()?;
    let calls =
        [hello(7000).fastopen(), hello(7001).fastopen(), hello(7001).fastopen(), hello(7002), hello(7000).mark(7)];
    for call in calls {
        let seen = call.run()?;
        assert_eq!((seen.error, seen.received.as_str()), (None, "in the first packet"));
    }
    assert_eq!(stage.lane()? - before, 5, "all of them on the lane");
    for (port, mptcp) in [(7000, false), (7002, true)] {
        let seen = hello(port).mptcp().run()?;
        assert_eq!((seen.error.as_deref(), seen.received.as_str()), (None, "in the first packet"));
        // Through the agent it would fall back to TCP where the agent does not speak it.
        assert!(seen.mptcp || !mptcp, "{seen:?}");
    }
    Ok(())
}

#[test]
fn the_lanes_connections_are_in_the_metrics_and_the_log_as_the_agents_own() -> Result {
    needs_root!();
    let stage = stage(&["source:7000"])?;
    let Stage { lab, server, client, .. } = &stage;
    let agent = lab.agent(1)?;
    // The first went through the agent: its series and its lines are what the lane's must be like.
    lab.take_the_lane(client, server, 7000)?;
    let before = stage.settled()?;
    let taken = stage.lane()?;
    let seen = client.connect(server.at(7000)).say("100000\n").run()?;
    assert_eq!((seen.error, seen.received.len()), (None, 100_000));
    assert_eq!(stage.lane()? - taken, 1);
    let local = seen.local.map(|local| local.to_string()).unwrap_or_default();
    let mut lines = Vec::new();
    for direction in ["outbound", "inbound"] {
        lines.push(agent.wait_access("a line of either side", |line| {
            line.get("direction") == direction && line.get("src.addr") == local
        })?);
    }
    let after = stage.settled()?;
    assert_eq!(grown(&before, &after, OPENED), [1.0; 2]);
    // Istio's meaning for either reporter: sent is the answer's bytes, received the request's.
    assert_eq!((grown(&before, &after, SENT), grown(&before, &after, RECEIVED)), ([100_000.0; 2], [7.0; 2]));
    for reporter in REPORTERS {
        let mine = attested(reporter);
        assert_eq!(after.with(OPENED, &mine).count(), 1, "{reporter}: one series for both ways");
        let labels = after.with(OPENED, &mine).next().map(|sample| sample.labels.clone()).unwrap_or_default();
        for (label, value) in [
            ("source_workload", "client"),
            ("source_principal", client.identity().as_str()),
            ("destination_workload", "server"),
            ("destination_principal", server.identity().as_str()),
            ("destination_app", "server"),
            ("request_protocol", "tcp"),
            ("response_flags", "-"),
        ] {
            assert_eq!(labels.get(label).map(String::as_str), Some(value), "{reporter} {label}");
        }
    }
    for (line, sent, received) in [(&lines[0], "7", "100000"), (&lines[1], "100000", "7")] {
        for (key, value) in [
            ("message", "connection complete"),
            ("security", "kernel_attested"),
            ("src.workload", "client"),
            ("src.identity", client.identity().as_str()),
            ("dst.addr", server.at(7000).to_string().as_str()),
            ("dst.workload", "server"),
            ("dst.identity", server.identity().as_str()),
            ("bytes_sent", sent),
            ("bytes_recv", received),
            ("response_flags", "-"),
        ] {
            assert_eq!(line.get(key), value, "{key} of {line:?}");
        }
        assert!(line.get("duration").ends_with("ms"), "{line:?}");
    }
    Ok(())
}

#[test]
fn the_sums_of_many_connections_are_what_the_apps_sent_and_received() -> Result {
    needs_root!();
    const SHORT: u64 = 2_000;
    const LONG: u64 = 16 * MIB;
    let stage = stage(&["echo:7000", "source:7001", "sink:7002", "echo+fastopen:7003"])?;
    let Stage { lab, server, client, .. } = &stage;
    for port in 7000..=7003 {
        lab.take_the_lane(client, server, port)?;
    }
    let (before, taken) = (stage.settled()?, stage.lane()?);
    let churning = client.churn(server.at(7000), SHORT, 16).start()?;
    let moved = client.transfer(server.at6(7000), LONG).run()?;
    assert_eq!((moved.error, moved.received, moved.sent_sha256), (None, LONG, moved.received_sha256));
    let seen = client.connect(server.at(7001)).say("300000\n").run()?;
    assert_eq!((seen.error, seen.received.len()), (None, 300_000));
    let said = "x".repeat(10_000);
    let seen = client.connect(server.at(7002)).say(&said).flag("--half-close").run()?;
    assert_eq!(seen.error, None);
    // Bytes in the SYN are the app's, the SYN itself is nobody's.
    for _ in 0..10 {
        let seen = client.connect(server.at(7003)).fastopen().say("in the first packet").with("--expect", 19).run()?;
        assert_eq!((seen.error, seen.received.as_str()), (None, "in the first packet"));
    }
    let churned = churning.finish()?;
    assert_eq!((churned.ok, churned.failed), (SHORT, 0), "{churned:?}");
    let connections = SHORT + 13;
    assert_eq!(stage.lane()? - taken, connections, "all of them took the lane");
    let after = stage.settled()?;
    let grown = |name| grown(&before, &after, name);
    #[expect(clippy::cast_precision_loss, reason = "some million")]
    let [connections, up, down] =
        [connections, SHORT + LONG + 7 + 10_000 + 190, SHORT + LONG + 300_000 + 190].map(|sum| sum as f64);
    assert_eq!((grown(OPENED), grown(CLOSED)), ([connections; 2], [connections; 2]));
    assert_eq!((grown(RECEIVED), grown(SENT)), ([up; 2], [down; 2]));
    assert_eq!(lab.agent(1)?.kernel().counts(client)?.events_lost, 0);
    Ok(())
}

#[test]
fn bytes_of_a_long_connection_move_while_it_lasts_and_are_exact_at_its_end() -> Result {
    needs_root!();
    let stage = stage(&["sink:7000"])?;
    let Stage { lab, server, client, .. } = &stage;
    lab.take_the_lane(client, server, 7000)?;
    let agent = lab.agent(1)?;
    let before = stage.settled()?;
    let streaming = client.throughput(server.at(7000), 3).start()?;
    let mut seen = Vec::new();
    let end = std::time::Instant::now() + Duration::from_millis(2_500);
    while std::time::Instant::now() < end {
        std::thread::sleep(Duration::from_millis(400));
        let now = agent.metrics()?;
        assert!(grown(&before, &now, CLOSED) == [0.0; 2], "it is open");
        seen.push(grown(&before, &now, RECEIVED));
    }
    let moved = streaming.finish()?;
    assert_eq!(moved.error, None);
    for side in [0, 1] {
        let steps: Vec<f64> = seen.iter().map(|both| both[side]).collect();
        assert!(steps.is_sorted() && steps.windows(2).filter(|pair| pair[1] > pair[0]).count() >= 3, "{steps:?}");
    }
    let after = stage.settled()?;
    #[expect(clippy::cast_precision_loss, reason = "less than 2^52")]
    let bytes = moved.count as f64;
    assert_eq!(grown(&before, &after, RECEIVED), [bytes; 2], "{seen:?}");
    Ok(())
}

#[test]
fn bulk_on_the_lane_takes_no_processor_time_of_the_agent() -> Result {
    needs_root!();
    const BYTES: u64 = 1 << 30;
    let stage = stage(&["sink:7000"])?;
    let Stage { lab, server, client, .. } = &stage;
    lab.take_the_lane(client, server, 7000)?;
    let agent = lab.agent(1)?;
    let mut best = Duration::MAX;
    // The better of three: what the agent does each second falls into one look and not into the other.
    for _ in 0..3 {
        let rest = agent.busy()?;
        std::thread::sleep(Duration::from_secs(2));
        let (idle, taken) = (agent.busy()?.saturating_sub(rest), stage.lane()?);
        let (before, begun) = (agent.busy()?, std::time::Instant::now());
        let mut moved = 0;
        while moved < BYTES && begun.elapsed() < Duration::from_secs(10) {
            let streamed = client.throughput(server.at(7000), 1).run()?;
            assert_eq!(streamed.error, None);
            moved += streamed.count;
        }
        let used = agent.busy()?.saturating_sub(before);
        let share = idle.mul_f64(begun.elapsed().as_secs_f64() / 2.0);
        println!(
            "lane: {} MiB in {:?}: agent {used:?} of processor, {share:?} when idle",
            moved >> 20,
            begun.elapsed()
        );
        assert!(moved >= BYTES && stage.lane()? > taken, "{moved} bytes");
        best = best.min(used.saturating_sub(share));
    }
    assert!(best < Duration::from_millis(10), "{best:?} more than an idle agent");
    Ok(())
}

#[test]
fn a_denied_pair_is_refused_by_the_kernel_at_once_and_counted_by_its_policy() -> Result {
    needs_root!();
    const DENIED: u64 = 500;
    let stage = stage(&["echo:7000", "echo:7001"])?;
    let Stage { lab, server, client, .. } = &stage;
    lab.authorize("shop", "no-7001", &deny_port(7001))?;
    let agent = lab.agent(1)?;
    until(Duration::from_secs(10), "the policy", || stage.hello(client, 7001).ok().filter(Connected::was_refused))?;
    assert_eq!(lab.learn(client, server, 7001)?, heddle_common::verdict::DENY);
    lab.take_the_lane(client, server, 7000)?;
    for to in [server.at(7001), server.at6(7001)] {
        let seen = client.connect(to).run()?;
        assert_eq!((seen.error.as_deref(), seen.connected), (Some("forbidden"), false), "{seen:?}");
        assert!(seen.connect_us < AT_ONCE_US, "{} µs", seen.connect_us);
    }
    assert_eq!(stage.hello(client, 7000)?.error, None, "the other port is let through");
    let policy = [("policy", "shop/no-7001")];
    let failed = [("response_flags", "DENY"), ("source_workload", "client")];
    let counted = |scrape: &Scrape| {
        [scrape.sum("heddle_denied_total", &policy), scrape.sum("istio_tcp_connections_failed_total", &failed)]
    };
    // What came before is told first.
    std::thread::sleep(Duration::from_millis(2_500));
    let (before, lines) = (counted(&agent.metrics()?), agent.access_log().len());
    let refused = client.churn(server.at(7001), DENIED, 8).run()?;
    assert_eq!((refused.ok, refused.errors.get("forbidden")), (0, Some(&DENIED)), "{refused:?}");
    #[expect(clippy::cast_precision_loss, reason = "some hundred")]
    let all = DENIED as f64;
    let mut grown = [0.0; 2];
    until(Duration::from_secs(5), "denials to be counted", || {
        let now = counted(&agent.metrics().ok()?);
        grown = [now[0] - before[0], now[1] - before[1]];
        (grown[0] >= all).then_some(())
    })
    .map_err(|error| error.context(format!("{grown:?} of {all}")))?;
    assert!(grown[0] == all && grown[1] >= all, "{grown:?}: each once");
    let line = agent.wait_access("a line that tells of them", |line| {
        line.get("policy") == "shop/no-7001" && line.number("suppressed").is_some_and(|count| count > 0)
    })?;
    assert_eq!(
        (line.get("response_flags"), line.get("src.identity")),
        ("DENY", client.identity().as_str()),
        "{line:?}"
    );
    let lines = agent.access_log().len() - lines;
    assert!(lines <= 20, "{lines} lines for {DENIED} denials");
    Ok(())
}

const CONNECTIONS: u64 = 1_000;
/// From the moment the rule's file is replaced (p99). Without optimisation agents and client need more than twice the
/// processor time.
const LIMIT: Duration = Duration::from_millis(if cfg!(debug_assertions) { 300 } else { 100 });

#[test]
fn a_policy_change_closes_a_thousand_connections_of_the_lane_that_it_forbids_and_no_other() -> Result {
    needs_root!();
    let stage = stage(&["echo:7000"])?;
    let Stage { lab, server, client, other } = &stage;
    lab.authorize("shop", "friends", &allow(&[client, other]))?;
    for pod in [client, other] {
        lab.take_the_lane(pod, server, 7000)?;
    }
    let kernel = lab.agent(1)?.kernel();
    let mut took = Vec::new();
    // The better of three: a busy machine is not the agent's doing.
    for _ in 0..3 {
        let (fates, held) = client.outlive(server.at(7000), CONNECTIONS, 20).open()?;
        assert_eq!((held.alive, held.failed), (CONNECTIONS, 0), "{held:?}");
        let mut stays = stage.hold(other, 10)?;
        assert!(kernel.lanes()?.len() >= 1_010, "they are on the lane");
        let before = now();
        lab.authorize("shop", "friends", &allow(&[other]))?;
        let fates = fates.finish()?;
        let p99 = fates.tell(&format!("lane: {CONNECTIONS} connections"), before);
        assert_eq!(fates.open, 0, "{fates:?}");
        assert_eq!(stays.check()?.alive, 10, "what is still allowed goes on");
        stays.close()?;
        assert!(stage.hello(client, 7000)?.was_refused(), "and no new one is let in");
        took.push(p99);
        if took.iter().any(|took| *took <= LIMIT) {
            let line = lab.agent(1)?.wait_access("a closed connection", |line| {
                line.get("src.identity") == client.identity() && line.mentions("policy change")
            })?;
            assert_eq!(line.get("response_flags"), "DENY", "{line:?}");
            return until(Duration::from_secs(5), "the entries to go", || {
                kernel.lanes().ok().filter(Vec::is_empty).map(drop)
            });
        }
        lab.authorize("shop", "friends", &allow(&[client, other]))?;
        lab.take_the_lane(client, server, 7000)?;
    }
    anyhow::bail!("{took:?}")
}

/// Switches between the lane and mutual TLS, at run time.
fn switches(stage: &Stage, what: &str, mut switch: impl FnMut(bool) -> Result) -> Result {
    let agent = stage.lab.agent(1)?;
    let mutual = [("reporter", "destination"), ("connection_security_policy", "mutual_tls")];
    let tunnelled = || agent.opened(&mutual).unwrap_or_default();
    // While it changes, every connection still arrives.
    let hello = || {
        let seen = stage.hello(&stage.client, 7000)?;
        anyhow::ensure!(seen.error.is_none(), "{what}: {seen:?}");
        Ok(())
    };
    let (mut told, lane) = (Ok(()), stage.lane()?);
    switch(true)?;
    until(Duration::from_secs(15), &format!("{what}: mutual TLS"), || {
        let before = tunnelled();
        told = hello();
        (told.is_err() || tunnelled() > before).then_some(())
    })?;
    told?;
    let (taken, before) = (stage.lane()?, tunnelled());
    for _ in 0..3 {
        hello()?;
    }
    assert_eq!((stage.lane()?, tunnelled()), (taken, before + 3.0), "{what}: all of them");
    switch(false)?;
    stage.lab.take_the_lane(&stage.client, &stage.server, 7000)?;
    hello()?;
    assert!(stage.lane()? > lane.max(taken), "{what}: the lane again");
    assert_eq!(tunnelled(), tunnelled().min(before + 8.0), "{what}: no tunnel any more");
    Ok(())
}

#[test]
fn same_node_mtls_of_either_pod_or_of_a_namespace_means_real_mutual_tls() -> Result {
    needs_root!();
    let stage = stage(&["echo:7000"])?;
    stage.lab.take_the_lane(&stage.client, &stage.server, 7000)?;
    for pod in [&stage.server, &stage.client] {
        switches(&stage, pod.name(), |on| match on {
            true => pod.annotate("heddle.dev/same-node", "mtls"),
            false => pod.unannotate("heddle.dev/same-node"),
        })?;
    }
    switches(&stage, "namespace", |on| {
        let mut namespace = manifests::namespace("shop", true);
        if on {
            namespace["metadata"]["annotations"] = json!({"heddle.dev/same-node": "mtls"});
        }
        stage.lab.manifests().apply(&namespace)
    })
}

#[test]
fn with_the_agent_dead_known_pairs_go_on_new_ones_are_refused_and_the_next_agent_adopts_them() -> Result {
    needs_root!();
    let stage = stage(&["echo:7000"])?;
    let Stage { lab, server, client, other } = &stage;
    lab.authorize("shop", "friends", &allow(&[client, other]))?;
    lab.take_the_lane(client, server, 7000)?;
    let (agent, kernel) = (lab.agent(1)?, lab.agent(1)?.kernel());
    let mut held = stage.hold(client, 20)?;
    let (taken, id) = (stage.lane()?, kernel.resident(client)?);
    agent.daemon.kill()?;
    assert_eq!(held.check()?.alive, 20, "open ones go on");
    let churned = client.churn(server.at(7000), 200, 4).run()?;
    assert_eq!((churned.ok, churned.failed), (200, 0), "new ones of a known pair: {churned:?}");
    for to in [server.at(7000), server.at6(7000)] {
        let seen = other.connect(to).run()?;
        assert_eq!((seen.error.as_deref(), seen.connected), (Some("forbidden"), false), "a new pair: {seen:?}");
        assert!(seen.connect_us < AT_ONCE_US, "{} µs", seen.connect_us);
    }
    assert_eq!(stage.lane()? - taken, 200);
    agent.start()?;
    for pod in [client, server, other] {
        pod.wait_captured()?;
    }
    assert_eq!(kernel.resident(client)?, id, "the same workload id and slot");
    assert!(stage.lane()? >= taken + 200, "the kernel's counts go on");
    until(Duration::from_secs(10), "the open connections to be listed", || {
        let (_, lines) = agent.ask_json(&["connections"]).ok()?;
        let kernel = lines.as_array()?.iter().filter(|line| line["security"] == "kernel_attested");
        (kernel.filter(|line| line["source_identity"] == client.identity()).count() >= 20).then_some(())
    })?;
    // What ended while nobody looked is not told again, what goes on is told of when it ends.
    lab.take_the_lane(client, server, 7000)?;
    lab.take_the_lane(other, server, 7000)?;
    assert_eq!(held.check()?.alive, 20);
    held.close()?;
    until(Duration::from_secs(10), "their ends", || {
        let closed = agent.metrics().ok()?.sum(CLOSED, &attested("destination"));
        (closed >= 20.0 && stage.lanes().ok()? == 0).then_some(())
    })
}

#[test]
fn a_policy_that_changed_while_the_agent_was_dead_holds_once_there_is_one() -> Result {
    needs_root!();
    let stage = stage(&["echo:7000"])?;
    let Stage { lab, server, client, other } = &stage;
    lab.authorize("shop", "friends", &allow(&[client, other]))?;
    for pod in [client, other] {
        lab.take_the_lane(pod, server, 7000)?;
    }
    let (mut denied, mut allowed) = (stage.hold(client, 20)?, stage.hold(other, 5)?);
    let agent = lab.agent(1)?;
    agent.daemon.kill()?;
    lab.authorize("shop", "friends", &allow(&[other]))?;
    assert_eq!(stage.hello(client, 7000)?.error, None, "nobody knows of it");
    agent.start()?;
    client.wait_captured()?;
    until(Duration::from_secs(10), "the new policy", || stage.hello(client, 7000).ok().filter(Connected::was_refused))?;
    let mut last = None;
    until(Duration::from_secs(10), "the forbidden connections to be closed", || {
        last = denied.check().ok();
        last.as_ref().is_some_and(|now| now.alive == 0).then_some(())
    })
    .map_err(|error| error.context(format!("{last:?}")))?;
    assert!(last.is_some_and(|now| !now.errors.contains_key("timeout")), "closed, not left hanging");
    assert_eq!(allowed.check()?.alive, 5);
    assert_eq!(stage.hello(other, 7000)?.error, None);
    allowed.close()
}
