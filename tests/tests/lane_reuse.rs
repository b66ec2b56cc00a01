//! Does anything of the kernel lane outlive what it was made for: a pod, a connection, a verdict?

use std::time::{Duration, Instant};

use heddle_common::verdict;
use heddle_lab::{Lab, Result, needs_root, until};
use serde_json::json;

/// A pod's address goes to another pod within half a minute.
const SOON: Duration = Duration::from_secs(30);

/// Only this principal reaches what is labelled so.
fn only(lab: &Lab, app: &str, principal: &str) -> Result {
    let rule = json!({"from": [{"source": {"principals": [principal]}}]});
    let spec = json!({"selector": {"matchLabels": {"app": app}}, "action": "ALLOW", "rules": [rule]});
    lab.authorize("shop", app, &spec)
}

#[test]
fn an_address_that_goes_to_another_identity_brings_no_verdict_with_it() -> Result {
    needs_root!();
    let lab = Lab::one_node()?;
    let server = lab.pod("shop", "server").serves(&["echo:7000"]).start()?;
    let mut friend = lab.pod("shop", "friend").start()?;
    only(&lab, "server", &friend.principal())?;
    let (agent, kernel) = (lab.agent(1)?, lab.agent(1)?.kernel());
    for round in 0..3 {
        lab.take_the_lane(&friend, &server, 7000)?;
        let id = kernel.resident(&friend)?.map(|resident| resident.workload);
        // It goes with connections open, from a port that its successor uses.
        let (_held, first) = friend.hold(server.at(7000), 1).with("--bind-port", 30_000).open()?;
        assert_eq!(first.alive, 1);
        let (slot, address, gone) = (friend.slot(), friend.v4(), Instant::now());
        friend.delete()?;
        let stranger = lab.pod("street", &format!("stranger{round}")).at_slot(slot).unproven().start()?;
        assert_eq!(stranger.v4(), address);
        let hello = || stranger.connect(server.at(7000)).say("hello").with("--expect", 5).with("--patience", 1_500);
        // From its first moment on, while the agent may not know of it yet; then as an enrolled pod.
        let mut tried = 0;
        let mut try_all = || -> Result {
            let seen = [hello().run()?, hello().bind_port(30_000).run()?];
            for seen in seen {
                assert!(seen.error.is_some() && seen.received.is_empty(), "round {round}, try {tried}: {seen:?}");
            }
            tried += 1;
            Ok(())
        };
        for _ in 0..3 {
            try_all()?;
        }
        stranger.wait_captured()?;
        for _ in 0..3 {
            try_all()?;
        }
        assert!(gone.elapsed() < SOON, "{:?}", gone.elapsed());
        let now = kernel.resident(&stranger)?.map(|resident| resident.workload);
        assert!(id.is_some() && now.is_some() && id != now, "{id:?} and {now:?}");
        until(Duration::from_secs(10), "the old verdicts to go", || {
            let verdicts = kernel.verdicts().ok()?;
            verdicts.iter().all(|(pair, _)| Some(pair.source) != id && Some(pair.destination) != id).then_some(())
        })?;
        assert_eq!(lab.learn(&stranger, &server, 7000)?, verdict::DENY);
        assert_eq!(kernel.counts(&stranger)?.lane, 0, "a slot's counts are its new owner's alone");
        until(Duration::from_secs(10), "the entries of its connections to go", || {
            kernel.lanes().ok().filter(Vec::is_empty)
        })?;
        assert!(
            !agent.access_log().iter().any(|line| {
                line.get("src.workload").starts_with("stranger") && line.get("message") == "connection complete"
            }),
            "nothing of a stranger was let in"
        );
        stranger.delete()?;
        friend = lab.pod("shop", &format!("friend{round}")).service_account("friend").at_slot(slot).start()?;
    }
    Ok(())
}

#[test]
fn a_server_that_is_replaced_at_its_address_is_decided_for_anew() -> Result {
    needs_root!();
    let lab = Lab::one_node()?;
    let server = lab.pod("shop", "server").serves(&["who:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    lab.take_the_lane(&client, &server, 7000)?;
    // Nobody may speak to what comes next; the policy is there before it.
    only(&lab, "vault", "cluster.local/ns/shop/sa/nobody")?;
    let (slot, id) = (server.slot(), lab.agent(1)?.kernel().resident(&server)?);
    server.delete()?;
    let vault = lab.pod("shop", "vault").at_slot(slot).serves(&["who:7000"]).unproven().start()?;
    // As networks tell their neighbours of a new one.
    client.netns().batch(&["neigh flush dev eth0"])?;
    let ask = || client.connect(vault.at(7000)).with("--expect", 1).with("--patience", 1_000).run();
    // Before it is in the mesh it is open to everybody, as any pod; from then on it is not, whatever was known of its address.
    let (mut tried, mut captured) = (0, false);
    until(SOON, "five tries once it is captured", || {
        captured = captured
            || matches!(lab.agent(1).ok()?.pod_state(&vault.full_name()), Ok(Some((state, _))) if state == "captured");
        let seen = ask().ok()?;
        if captured {
            assert!(seen.error.is_some() && seen.received.is_empty(), "try {tried}: {seen:?}");
            tried += 1;
        }
        (tried >= 5).then_some(())
    })?;
    assert_eq!(lab.learn(&client, &vault, 7000)?, verdict::DENY);
    assert_ne!(lab.agent(1)?.kernel().resident(&vault)?.map(|now| now.workload), id.map(|before| before.workload));
    Ok(())
}

#[test]
fn after_fifty_thousand_connections_of_the_lane_everything_is_as_it_was() -> Result {
    needs_root!();
    const CONNECTIONS: u64 = 50_000;
    let lab = Lab::one_node()?;
    let server = lab.pod("shop", "server").serves(&["reply:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    // A port is free again after a second: the client is not what is tried out here.
    client.netns().sysctl(&[("net/ipv4/ip_local_port_range", "16000 65000"), ("net/ipv4/tcp_tw_reuse", "1")])?;
    lab.take_the_lane(&client, &server, 7000)?;
    let (agent, kernel) = (lab.agent(1)?, lab.agent(1)?.kernel());
    let churn = |count| -> Result<f64> {
        let churned = client.churn(server.at(7000), count, 32).run()?;
        assert_eq!((churned.ok, churned.failed), (count, 0), "{churned:?}");
        Ok(churned.seconds)
    };
    // What is only made once, is made.
    churn(CONNECTIONS / 5)?;
    let look = || -> Result<_> {
        let usage = agent.usage()?;
        let state = (
            usage.files,
            usage.sockets,
            kernel.attested()?,
            kernel.verdicts()?.len(),
            agent.pins(),
            agent.connections()?,
        );
        Ok((state, usage.rss))
    };
    until(Duration::from_secs(10), "rest", || (look().ok()?.0.5 == 0).then_some(()))?;
    std::thread::sleep(Duration::from_secs(1));
    let (before, memory) = look()?;
    let taken = kernel.counts(&client)?;
    let seconds = churn(CONNECTIONS)?;
    let counts = kernel.counts(&client)?;
    assert_eq!((counts.lane - taken.lane, counts.marked - taken.marked), (CONNECTIONS, 0), "{counts:?}");
    let (mut after, mut rss) = look()?;
    let _settled = until(Duration::from_secs(10), "everything to be given back", || {
        (after, rss) = look().ok()?;
        (after == before && rss <= memory + (4 << 20)).then_some(())
    });
    println!(
        "lane: {CONNECTIONS} connections in {seconds:.1} s; {} attested and {} verdicts before, {} and {} after; {} files before, {} after; memory {:+} KiB",
        before.2,
        before.3,
        after.2,
        after.3,
        before.0,
        after.0,
        (i64::try_from(rss)? - i64::try_from(memory)?) >> 10
    );
    assert_eq!(after, before);
    assert_eq!((after.2, counts.events_lost), (0, 0));
    assert!(rss <= memory + (4 << 20), "{memory} to {rss}");
    Ok(())
}
