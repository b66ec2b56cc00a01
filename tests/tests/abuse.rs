//! Does the agent hold against peers with a good certificate that abuse it, and do their neighbours notice?
//!
//! Sizes are for two cores: reliability.md §8.4 names them for larger machines. Attackers yield the processor, because they
//! stand for peers on other machines.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use heddle_lab::{
    Lab, Pod, Result,
    certificates::{Leaf, Wanted},
    hostile::{Asked, Flooded},
    needs_root,
    reports::{Churned, Event},
    until,
    usage::Usage,
};
use serde_json::json;

const MIB: u64 = 1 << 20;
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";

/// Node 2 has the attacked pod and its neighbour; on node 1 each has an honest client, and the attacker is there too.
struct Stage {
    attacked: Pod,
    neighbour: Pod,
    honest: Pod,
    attacker: Pod,
    leaf: Leaf,
    lab: Lab,
}

fn stage() -> Result<Stage> {
    let lab = Lab::two_nodes()?;
    let stage = Stage {
        attacked: lab.pod("shop", "attacked").on(2).serves(&["echo:7000", "source:7002", "sink:7001"]).start()?,
        neighbour: lab.pod("shop", "neighbour").on(2).serves(&["echo:7000", "sink:7001"]).start()?,
        honest: lab.pod("shop", "honest").start()?,
        attacker: lab.pod("shop", "attacker").outside_the_mesh().start()?,
        leaf: lab.root()?.sign(lab.dir(), "attacker", &Wanted::valid(&[CLIENT]))?,
        lab,
    };
    // Tunnels and memory are warm before anything is measured.
    for pod in [&stage.attacked, &stage.neighbour] {
        let churned = stage.honest.churn(pod.at(7000), 200, 8).run()?;
        assert_eq!(churned.failed, 0, "{churned:?}");
    }
    Ok(stage)
}

/// Requests of honest clients that all succeeded.
fn unharmed(who: &str, churned: &Churned) {
    assert!(churned.failed == 0 && churned.ok > 0, "{who}: {churned:?}");
}

fn mib(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let bytes = bytes as f64;
    bytes / 1_048_576.0
}

/// What a flood did to the agent and to the two honest clients while it lasted.
struct Flooding {
    flooded: Flooded,
    /// Resident memory at the most, beyond what it was before (bytes).
    grown: u64,
    /// Processor time of the agent.
    cpu: Duration,
    /// Of the attacked pod's own client and of the neighbour's.
    honest: [Churned; 2],
}

impl Stage {
    /// Floods the attacked pod for some seconds.
    fn flood(&self, attack: &str, connections: u64, seconds: u64) -> Result<Flooding> {
        let agent = self.lab.agent(2)?;
        let before = agent.usage()?;
        let peak = agent.peak()?;
        let flood = self.attacker.flood(self.attacked.at(15008), self.attacked.at(7000), &self.leaf, attack);
        let flooding = flood.with("--connections", connections).with("--seconds", seconds).start()?;
        let own = self.honest.pace(self.attacked.at(7000), 50, seconds).start()?;
        let neighbour = self.honest.pace(self.neighbour.at(7000), 50, seconds).start()?;
        let honest = [own.finish()?, neighbour.finish()?];
        let flooded = flooding.finish()?;
        let after = agent.usage()?;
        Ok(Flooding {
            flooded,
            grown: peak.most().saturating_sub(before.rss),
            cpu: after.cpu.saturating_sub(before.cpu),
            honest,
        })
    }

    /// An attack after which each connection is ended in time, that costs little memory, and that no honest client notices.
    fn is_ended(&self, id: &str, attack: &str) -> Result {
        const CONNECTIONS: u64 = 10;
        const DEADLINE_MS: u64 = 2_000;
        let Flooding { flooded, grown, cpu, honest } = self.flood(attack, CONNECTIONS, 4)?;
        println!(
            "{id} {attack}: {} connections, {} ended, the longest after {} ms ({:?}), {} not let in; {} frames, {:.1} MiB sent; \
             agent +{:.1} MiB, {cpu:?} of processor; honest p99 {} and {} µs",
            flooded.connections,
            flooded.ended,
            flooded.longest_ms.max(flooded.unended_ms),
            flooded.endings,
            flooded.refused.values().sum::<u64>(),
            flooded.frames,
            mib(flooded.sent),
            mib(grown),
            honest[0].p99_us,
            honest[1].p99_us,
        );
        assert!(flooded.connections >= CONNECTIONS, "{flooded:?}");
        assert!(flooded.longest_ms.max(flooded.unended_ms) <= DEADLINE_MS, "ended in time: {flooded:?}");
        assert!(grown <= (10 * flooded.sent).clamp(8 * MIB, 32 * MIB), "+{grown} for {} bytes", flooded.sent);
        for (who, churned) in ["the pod's own client", "the neighbour's"].into_iter().zip(&honest) {
            unharmed(who, churned);
            assert!(churned.p99_us < 250_000, "{who}: {churned:?}");
        }
        Ok(())
    }
}

#[test]
fn a1_slow_handshakes_are_closed_at_their_deadline() -> Result {
    needs_root!();
    const SOCKETS: u64 = 5_000;
    let stage = stage()?;
    let agent = stage.lab.agent(2)?;
    let before = agent.usage()?;
    let (silent, open) = stage.attacker.silent(stage.attacked.at(15008), SOCKETS, 12).yielding().open()?;
    // Those that are half open by now, and what they cost.
    let during = agent.usage()?;
    let half_open = u64::try_from(during.files.saturating_sub(before.files))?;
    let own = stage.honest.pace(stage.attacked.at(7000), 50, 4).start()?;
    let neighbour = stage.honest.pace(stage.neighbour.at(7000), 50, 4).start()?;
    // A peer that has no tunnel yet, to the attacked pod itself.
    let stranger = stage.attacker.speak_hbone(stage.attacked.at(15008), &stage.attacked.at(7000).to_string());
    let stranger = stranger.say("hello").as_leaf(&stage.leaf).run()?;
    let (own, neighbour) = (own.finish()?, neighbour.finish()?);
    let report = silent.finish()?;
    let each = during.rss.saturating_sub(before.rss) / half_open.max(1);
    println!(
        "A1 {} sockets: {half_open} half open at {each} bytes each, {} not let in; closed after {} to {} ms (p50 {}); honest p99 {} and {} µs",
        open.open, report.at_once, report.first_ms, report.last_ms, report.p50_ms, own.p99_us, neighbour.p99_us
    );
    assert_eq!((report.open, report.closed), (0, open.open), "{report:?}");
    assert!(report.closed > report.at_once, "some were let in: {report:?}");
    assert!((4_900..5_900).contains(&report.first_ms), "{report:?}");
    assert!((4_900..6_000).contains(&report.last_ms), "{report:?}");
    assert!(each <= 6 << 10, "{each} bytes for each of {half_open}");
    unharmed("the pod's own client", &own);
    unharmed("the neighbour's", &neighbour);
    assert_eq!(stranger.received, "hello", "a new peer is let in beside them: {stranger:?}");
    agent.wait_access("their reason", |line| {
        line.get("reason") == "timeout" || line.get("reason") == "handshake_budget"
    })?;
    until(Duration::from_secs(5), "their descriptors to be given back", || {
        agent.usage().ok().filter(|now| now.files <= before.files + 64)
    })
    .map(drop)
}

#[test]
fn a2_rapid_resets_end_the_connection() -> Result {
    needs_root!();
    stage()?.is_ended("A2", "rapid-reset")
}

#[test]
fn a3_an_endless_header_block_ends_the_connection() -> Result {
    needs_root!();
    stage()?.is_ended("A3", "continuation")
}

#[test]
fn a4_a_peer_that_makes_the_agent_reset_is_ended() -> Result {
    needs_root!();
    let stage = stage()?;
    stage.is_ended("A4", "window-zero")?;
    stage.is_ended("A4", "window-overflow")?;
    stage.is_ended("A4", "data-on-closed")
}

#[test]
fn a5_frames_that_only_make_work_end_the_connection() -> Result {
    needs_root!();
    let stage = stage()?;
    for attack in ["settings", "ping", "priority", "empty-data", "unknown"] {
        stage.is_ended("A5", attack)?;
    }
    Ok(())
}

#[test]
fn a6_a_header_bomb_is_not_unpacked() -> Result {
    needs_root!();
    stage()?.is_ended("A6", "hpack-bomb")
}

#[test]
fn a7_a_peer_that_never_reads_holds_little_memory() -> Result {
    needs_root!();
    const STREAMS: u64 = 64;
    let stage = stage()?;
    let agent = stage.lab.agent(2)?;
    for attack in ["never-read", "no-window"] {
        let before = agent.usage()?;
        let peak = agent.peak()?;
        let flood = stage.attacker.flood(stage.attacked.at(15008), stage.attacked.at(7002), &stage.leaf, attack);
        let stalling = flood.with("--streams", STREAMS).with("--seconds", 4).start()?;
        let own = stage.honest.pace(stage.attacked.at(7000), 50, 4).start()?;
        let neighbour = stage.honest.pace(stage.neighbour.at(7000), 50, 4).run()?;
        let own = own.finish()?;
        let stalled = stalling.finish()?;
        let each = peak.most().saturating_sub(before.rss) / STREAMS;
        println!(
            "A7 {attack}: {} of {STREAMS} streams accepted, {} KiB held for each; honest p99 {} and {} µs",
            stalled.accepted,
            each >> 10,
            own.p99_us,
            neighbour.p99_us
        );
        assert!(each <= 320 << 10, "{each} bytes for each stream; {stalled:?}");
        unharmed("the pod's own client", &own);
        unharmed("the neighbour's", &neighbour);
    }
    Ok(())
}

/// One line of the table of A8.
struct Row {
    fields: Vec<(&'static str, String)>,
    reason: &'static str,
}

fn connect_to(authority: impl ToString, reason: &'static str) -> Row {
    Row { fields: vec![(":method", "CONNECT".to_owned()), (":authority", authority.to_string())], reason }
}

#[test]
fn a8_only_the_pods_own_app_can_be_asked_for() -> Result {
    needs_root!();
    let stage = stage()?;
    let (own, other) = (stage.attacked.v4(), &stage.neighbour);
    let node = stage.lab.node(2)?.v4();
    let rows = [
        connect_to(other.at(7001), "address_mismatch"),
        connect_to(other.at6(7001), "address_mismatch"),
        connect_to(format!("{node}:7001"), "address_mismatch"),
        connect_to(format!("{}:15020", Ipv4Addr::LOCALHOST), "address_mismatch"),
        connect_to("127.0.0.1:7001", "address_mismatch"),
        connect_to("[::1]:7001", "address_mismatch"),
        connect_to("[::]:7001", "address_mismatch"),
        connect_to("0.0.0.0:7001", "address_mismatch"),
        connect_to("169.254.169.254:80", "address_mismatch"),
        connect_to("10.96.0.1:443", "address_mismatch"),
        connect_to(format!("[::ffff:{}]:7001", other.v4()), "address_mismatch"),
        connect_to("[::ffff:127.0.0.1]:7001", "address_mismatch"),
        connect_to(format!("{own}:15001"), "refused_port"),
        connect_to(format!("{own}:15006"), "refused_port"),
        connect_to(format!("{own}:15008"), "refused_port"),
        connect_to(format!("[::ffff:{own}]:15008"), "refused_port"),
        connect_to(format!("{own}:0"), "refused_port"),
        connect_to(format!("{own}:65536"), "bad_authority"),
        connect_to(format!("{own}"), "bad_authority"),
        connect_to("localhost:7001", "bad_authority"),
        connect_to("attacked.shop.svc.cluster.local:7001", "bad_authority"),
        connect_to(format!("{own}.:7001"), "bad_authority"),
        connect_to("0x7f000001:7001", "bad_authority"),
        Row {
            fields: vec![
                (":method", "GET".to_owned()),
                (":scheme", "https".to_owned()),
                (":path", "/".to_owned()),
                (":authority", format!("{own}:7001")),
            ],
            reason: "bad_method",
        },
        Row {
            fields: vec![
                (":method", "POST".to_owned()),
                (":scheme", "http".to_owned()),
                (":path", "/x".to_owned()),
                (":authority", format!("{own}:7001")),
            ],
            reason: "bad_method",
        },
    ];
    let agent = stage.lab.agent(2)?;
    let (opened, mut lines) = (agent.opened(&[])?, agent.access_log().len());
    for Row { fields, reason } in &rows {
        // The log tells of ten refusals a second.
        std::thread::sleep(Duration::from_millis(110));
        let met = stage.asks(fields)?;
        assert_eq!((met.status, met.received.as_str()), (Some(400), ""), "{fields:?}: {met:?}");
        let line = until(Duration::from_secs(5), "a line of the access log", || {
            agent.access_log().into_iter().skip(lines).find(|line| line.get("reason") == *reason)
        })?;
        assert_eq!(line.get("src.identity"), CLIENT, "{fields:?}");
        lines = agent.access_log().len();
    }
    // What HTTP/2 itself forbids (RFC 9113 §8.3, RFC 8441 §4) is a reset, and no line: nothing was asked for.
    let connect = (":method", "CONNECT".to_owned());
    let own = (":authority", format!("{own}:7001"));
    let malformed = [
        vec![connect.clone()],
        vec![connect.clone(), (":authority", String::new())],
        vec![connect.clone(), (":scheme", "https".into()), (":path", "/".into()), own.clone()],
        vec![connect, (":protocol", "websocket".into()), (":scheme", "https".into()), (":path", "/".into()), own],
    ];
    for fields in &malformed {
        let met = stage.asks(fields)?;
        let refused = met.reset.is_some() || met.goaway.is_some() || met.status.is_some_and(|status| status >= 400);
        assert!(refused && met.received.is_empty(), "{fields:?}: {met:?}");
    }
    let request = "GET / HTTP/1.1\\r\\nHost: attacked\\r\\n\\r\\n";
    let met = stage.attacker.ask(stage.attacked.at(15008)).as_leaf(&stage.leaf).with("--http1", request).run()?;
    assert!(!met.received.contains("HTTP/1.1 2") && met.error.as_deref() != Some("timeout"), "{met:?}");
    agent.wait_access("HTTP/1.1", |line| line.get("reason") == "h2_handshake")?;
    // And nothing arrived anywhere.
    assert_eq!(agent.opened(&[])?, opened, "nothing was delivered");
    for pod in [&stage.attacked, &stage.neighbour] {
        assert!(!pod.events().iter().any(|event| matches!(event, Event::Sunk { .. })), "{:?}", pod.events());
    }
    // The right one is let through: the others are not refused for another reason.
    let met = stage.asks(&[(":method", "CONNECT".into()), (":authority", stage.attacked.at(7000).to_string())])?;
    assert_eq!((met.status, met.received.as_str()), (Some(200), "x"), "{met:?}");
    println!(
        "A8 {} targets refused with 400 and their reason, {} malformed ones reset",
        rows.len(),
        malformed.len() + 1
    );
    Ok(())
}

impl Stage {
    fn asks(&self, fields: &[(&str, String)]) -> Result<Asked> {
        let ask = self.attacker.ask(self.attacked.at(15008)).as_leaf(&self.leaf).with("--say", "x");
        fields.iter().fold(ask, |ask, (name, value)| ask.field(name, value)).run()
    }
}

#[test]
fn a9_at_the_limit_of_descriptors_the_agent_neither_spins_nor_forgets_its_other_pods() -> Result {
    needs_root!();
    const FILES: u64 = 1_024;
    let lab = Lab::builder().nodes(1).files(FILES).start()?;
    let hog = lab.pod("shop", "hog").serves(&["echo:7000"]).start()?;
    let other = lab.pod("shop", "other").serves(&["echo:7000"]).start()?;
    let (attacker, honest) = (
        lab.pod("shop", "attacker").outside_the_mesh().start()?,
        lab.pod("shop", "honest").outside_the_mesh().start()?,
    );
    let agent = lab.agent(1)?;
    unharmed("before", &honest.churn(other.at(7000), 100, 4).run()?);
    let before = agent.usage()?;
    let call = attacker.hold(hog.at(7000), 2 * FILES).with("--patience", 3_000).yielding();
    let (holding, held) = call.open()?;
    // Full: silent connects go on beside it for as long as it is looked at.
    let silent = attacker.silent(hog.at(15008), 500, 8).yielding().start()?;
    let full = agent.usage()?;
    let log = agent.daemon.log().lines().count();
    let from = Instant::now();
    let (reserved, first) = honest.hold(other.at(7000), 64).open()?;
    assert_eq!((first.alive, first.failed), (64, 0), "the reserved ones of another pod: {first:?}");
    assert!(agent.ready() && agent.metrics().is_ok(), "readiness and metrics answer");
    std::thread::sleep(Duration::from_secs(3).saturating_sub(from.elapsed()));
    let (seconds, after) = (from.elapsed().as_secs_f64(), agent.usage()?);
    let load = after.cpu.saturating_sub(full.cpu).as_secs_f64() / seconds;
    let lines = agent.daemon.log().lines().count() - log;
    holding.close()?;
    let left = Instant::now();
    until(Duration::from_secs(5), "a connection to the attacked pod", || {
        honest.connect(hog.at(7000)).say("x").with("--expect", 1).run().ok().filter(|seen| seen.error.is_none())
    })?;
    let recovered = left.elapsed();
    println!(
        "A9 {} of {FILES} descriptors at {} of {} connections; {load:.2} cores and {lines} log lines in {seconds:.1} s; back after {recovered:?}",
        full.files,
        held.alive,
        2 * FILES
    );
    assert!(full.files > before.files + 300, "the attacker took what there is: {full:?}");
    assert!(held.alive < 2 * FILES, "the limit was met: {held:?}");
    assert!(load <= 0.2, "{load} of a core");
    #[expect(clippy::cast_precision_loss, reason = "a few lines")]
    let rate = lines as f64 / seconds;
    assert!(rate <= 2.0, "{rate} lines/s of the agent's own log (one per pod)");
    assert!(recovered <= Duration::from_secs(1), "{recovered:?}");
    reserved.close()?;
    silent.finish().map(drop)
}

#[test]
fn a11_scans_and_syn_floods_wake_no_one() -> Result {
    needs_root!();
    const SYNS: u64 = 20_000;
    let stage = stage()?;
    let agent = stage.lab.agent(2)?;
    // The listener's queue: Send-Q of `ss -l`.
    let listening = stage.attacked.output("ss", &["-Hltn", "sport = :15001"])?;
    let backlog: u64 = listening.split_whitespace().nth(2).and_then(|text| text.parse().ok()).unwrap_or_default();
    assert!(backlog >= 1_024, "{listening}");
    let quiet = |before: Usage| {
        until(Duration::from_secs(10), "the agent to be as before", || {
            let now = agent.usage().ok()?;
            (now.files <= before.files && agent.connections().ok()? == 0).then_some(())
        })
    };
    std::thread::sleep(Duration::from_millis(200));
    let before = agent.usage()?;
    let flood = stage.attacker.syns(stage.attacked.at(7000), Ipv4Addr::new(10, 244, 1, 0), SYNS, 3).yielding();
    let flooding = flood.start()?;
    std::thread::sleep(Duration::from_secs(1));
    let during = agent.usage()?;
    let neighbour = stage.honest.pace(stage.neighbour.at(7000), 50, 2).run()?;
    let sent = flooding.finish()?;
    let after = agent.usage()?;
    let cpu = after.cpu.saturating_sub(before.cpu);
    println!(
        "A11 {} SYNs: agent {cpu:?} of processor, {} descriptors before and {} during; backlog {backlog}; neighbour p99 {} µs",
        sent.count("sent"),
        before.files,
        during.files,
        neighbour.p99_us
    );
    assert!(sent.count("sent") > SYNS, "{sent:?}");
    assert!(during.files <= before.files + 8, "no descriptor for a handshake that did not end: {before:?} {during:?}");
    unharmed("the neighbour's client", &neighbour);
    until(Duration::from_secs(10), "the attacked pod to be reached again", || {
        stage.honest.churn(stage.attacked.at(7000), 20, 2).run().ok().filter(|churned| churned.failed == 0)
    })?;
    // A scan of closed ports: each is asked of the app, and refused as the app does.
    let scanned = stage.attacker.scan(stage.attacked.at(20_000), 1_000).run()?;
    println!("A11 scan of 1,000 closed ports: {:?}", scanned.met);
    assert_eq!(scanned.count("open") + scanned.count("timeout"), 0, "{scanned:?}");
    quiet(before)
}

#[test]
fn a12_what_peers_make_up_makes_no_metrics() -> Result {
    needs_root!();
    const IDENTITIES: u64 = 3_000;
    let stage = stage()?;
    let more: Vec<Pod> = ["one", "two"]
        .into_iter()
        .map(|name| stage.lab.pod("shop", name).on(2).serves(&["echo:7000"]).start())
        .collect::<Result<_>>()?;
    let agent = stage.lab.agent(2)?;
    let scrape = || -> Result<_> {
        let start = Instant::now();
        let scrape = agent.metrics()?;
        Ok((scrape.0.len(), start.elapsed()))
    };
    let (before, usage) = (scrape()?, agent.usage()?);
    let pods = [&stage.attacked, &stage.neighbour, &more[0], &more[1]];
    let asked = stage.attacker.many(&pods, 7000, stage.lab.root()?, IDENTITIES).run()?;
    std::thread::sleep(Duration::from_millis(500));
    let series = scrape()?.0;
    // The quickest of some: what the agent needs, not what the machine is busy with. Making text of 10,000 lines takes a
    // build without optimisation many times as long.
    let mut quickest = Duration::MAX;
    for _ in 0..5 {
        quickest = quickest.min(scrape()?.1);
    }
    // The allocator gives back what scrapes and handshakes took after some seconds.
    let mut grown = u64::MAX;
    let _settled = until(Duration::from_secs(15), "memory to be given back", || {
        grown = agent.usage().ok()?.rss.saturating_sub(usage.rss);
        (grown <= 20 * MIB).then_some(())
    });
    println!(
        "A12 {IDENTITIES} identities ({:?}): {} series before, {series} after, scraped in {quickest:?}, +{:.1} MiB",
        asked.met,
        before.0,
        mib(grown)
    );
    assert!(asked.count("200") >= IDENTITIES * 9 / 10, "{asked:?}");
    assert!(series <= 10_000, "{series} series");
    let text = format!("{:?}", agent.metrics()?);
    assert!(text.contains("overflow"), "what does not fit is counted");
    for made_up in ["made-up", "203.0.113", "service.version"] {
        assert!(!text.contains(made_up), "{made_up} in a metric");
    }
    assert!(quickest <= Duration::from_millis(if cfg!(debug_assertions) { 1_000 } else { 100 }), "{quickest:?}");
    assert!(grown <= 20 * MIB, "+{grown}");
    unharmed("the honest client", &stage.honest.churn(stage.neighbour.at(7000), 100, 4).run()?);
    Ok(())
}

#[test]
fn a13_denied_connections_fill_no_log() -> Result {
    needs_root!();
    let stage = stage()?;
    let agent = stage.lab.agent(2)?;
    let alone = stage.honest.pace(stage.neighbour.at(7000), 0, 3).with("--bytes", 64).flag("--kept").run()?;
    unharmed("alone", &alone);
    let rule = json!({"from": [{"source": {"notPrincipals": ["*"]}}]});
    let spec = json!({"selector": {"matchLabels": {"app": "attacked"}}, "action": "DENY", "rules": [rule]});
    stage.lab.authorize("shop", "no-strangers", &spec)?;
    until(Duration::from_secs(10), "the policy", || {
        stage.attacker.connect(stage.attacked.at(7000)).with("--expect", 1).run().ok().filter(|seen| seen.was_refused())
    })?;
    let denials = || agent.access_log().iter().filter(|line| line.get("response_flags") == "DENY").count();
    let (lines, start) = (denials(), Instant::now());
    let denied = stage.attacker.pace(stage.attacked.at(7000), 2_000, 4).yielding().start()?;
    let beside = stage.honest.pace(stage.neighbour.at(7000), 0, 3).with("--bytes", 64).flag("--kept").run()?;
    let denied = denied.finish()?;
    std::thread::sleep(Duration::from_millis(500));
    let (lines, seconds) = (denials() - lines, start.elapsed().as_secs_f64());
    let suppressed = agent.metrics()?.sum("heddle_log_lines_suppressed_total", &[]);
    let counted = agent.metrics()?.sum("heddle_denied_total", &[]);
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let (ratio, per_second) = (beside.p50_us as f64 / alone.p50_us.max(1) as f64, lines as f64 / seconds);
    println!(
        "A13 {} denied in {seconds:.1} s: {lines} lines, {suppressed} suppressed; honest p50 {} µs beside {} alone ({ratio:.2}), p99 {} beside {}",
        denied.failed, beside.p50_us, alone.p50_us, beside.p99_us, alone.p99_us
    );
    assert!(denied.ok == 0 && denied.failed > 1_000, "{denied:?}");
    assert!(lines > 0 && per_second <= 12.0, "{per_second} lines/s");
    #[expect(clippy::cast_precision_loss, reason = "counts of thousands")]
    let all = (denied.failed as f64, lines as f64 + suppressed);
    assert!((all.0 - all.1).abs() <= 16.0, "each denial is a line or counted as suppressed: {all:?}");
    assert!(counted >= all.0, "{counted} of {}", all.0);
    unharmed("the honest client", &beside);
    Ok(())
}
