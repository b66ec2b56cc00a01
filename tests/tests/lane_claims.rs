//! Can anybody on the node be taken for somebody else by the kernel lane, or pass a DENY by way of it?

use std::time::Duration;

use heddle_common::{MARK, choice, verdict};
use heddle_lab::{
    Lab, Netns, Pod, Result,
    call::Call,
    hostile::Scanned,
    kernel, needs_root,
    reports::{Connected, Event},
    until,
};
use serde_json::json;

/// A server that lets one identity in; that one's verdict is known. The stranger's is, too, and the outsider has none.
struct Stage {
    lab: Lab,
    server: Pod,
    friend: Pod,
    stranger: Pod,
    outsider: Pod,
}

const ECHO: u16 = 7000;
const SINK: u16 = 7001;
const QUICK: &str = "echo+fastopen:7002";
const FASTOPEN: u16 = 7002;
/// The line of a connection that ended is written well within it.
const LINES: Duration = Duration::from_millis(500);

fn stage() -> Result<Stage> {
    let lab = Lab::one_node()?;
    let stage = Stage {
        server: lab.pod("shop", "server").serves(&["echo:7000", "sink:7001", QUICK]).start()?,
        friend: lab.pod("shop", "friend").start()?,
        stranger: lab.pod("street", "stranger").start()?,
        outsider: lab.pod("street", "outsider").outside_the_mesh().start()?,
        lab,
    };
    stage.let_in(&stage.friend)?;
    for port in [ECHO, SINK, FASTOPEN] {
        stage.lab.take_the_lane(&stage.friend, &stage.server, port)?;
    }
    for port in [ECHO, SINK] {
        assert_eq!(stage.lab.learn(&stage.stranger, &stage.server, port)?, verdict::DENY);
    }
    Ok(stage)
}

impl Stage {
    /// Only this identity reaches the server.
    fn let_in(&self, pod: &Pod) -> Result {
        let rule = json!({"from": [{"source": {"principals": [pod.principal()]}}]});
        let selector = json!({"matchLabels": {"app": "server"}});
        self.lab.authorize("shop", "rule", &json!({"selector": selector, "action": "ALLOW", "rules": [rule]}))?;
        until(Duration::from_secs(10), "the policy", || {
            let others = [&self.stranger, &self.outsider].into_iter().filter(|other| other.name() != pod.name());
            let refused = |other: &Pod| self.hello(other).is_ok_and(|seen| seen.was_refused());
            (others.into_iter().all(refused) && self.hello(pod).ok()?.error.is_none()).then_some(())
        })
    }

    fn say<'pod>(&self, pod: &'pod Pod) -> Call<'pod, Connected> {
        pod.connect(self.server.at(ECHO)).say("hello").with("--expect", 5).with("--patience", 1_500)
    }

    fn hello(&self, pod: &Pod) -> Result<Connected> {
        self.say(pod).run()
    }

    fn ports_of_the_lane(&self) -> Result<Vec<u16>> {
        let lanes = self.lab.agent(1)?.kernel().lanes()?;
        Ok(lanes.into_iter().map(|(tuple, _)| tuple.source_port).collect())
    }

    /// Whoever tried got nowhere: no answer, no connection of the lane, no line that names the friend, and the friend
    /// is served as ever.
    fn nobody_was_fooled(&self, what: &str, before: &Before) -> Result {
        let agent = self.lab.agent(1)?;
        for pod in [&self.stranger, &self.outsider] {
            assert!(self.hello(pod)?.was_refused(), "{what}: {} is refused afterwards", pod.name());
        }
        let taken = agent.kernel().counts(&self.stranger)?.lane;
        assert_eq!(taken, before.stranger_lane, "{what}: the stranger never takes the lane");
        std::thread::sleep(LINES);
        let wrong: Vec<_> = agent
            .access_log()
            .into_iter()
            .skip(before.lines)
            .filter(|line| line.get("message") == "connection complete" && line.get("direction") == "inbound")
            .collect();
        assert!(wrong.is_empty(), "{what}: nothing of this was let in: {wrong:?}");
        assert_eq!(self.hello(&self.friend)?.error, None, "{what}: the friend is served");
        Ok(())
    }

    fn before(&self) -> Result<Before> {
        let agent = self.lab.agent(1)?;
        std::thread::sleep(LINES);
        Ok(Before { stranger_lane: agent.kernel().counts(&self.stranger)?.lane, lines: agent.access_log().len() })
    }
}

/// What was there before somebody tried.
struct Before {
    stranger_lane: u64,
    lines: usize,
}

fn refused(seen: &Connected) -> bool {
    // Somebody whose packets carry another's address may also wait in vain.
    (seen.was_refused() || seen.error.as_deref() == Some("timeout")) && seen.received.is_empty()
}

#[test]
fn a_pod_that_forges_anothers_address_with_raw_sockets_reaches_no_app() -> Result {
    needs_root!();
    let stage = stage()?;
    let Stage { lab: _, server, friend, stranger, .. } = &stage;
    let before = stage.before()?;
    // The friend is connected meanwhile, from a port that the forger knows.
    let (mut held, first) = friend.hold(server.at(ECHO), 1).with("--bind-port", 30_000).open()?;
    assert_eq!((first.alive, stage.ports_of_the_lane()?), (1, vec![30_000]));
    let tries = [
        stranger.forge(friend.v4(), server.at(SINK), (30_000, 64), 50).run()?,
        stranger.forge(friend.v4(), server.at(ECHO), (30_000, 64), 50).run()?,
        stranger.forge(friend.v6(), server.at6(SINK), (30_000, 64), 50).run()?,
        stage.outsider.forge(friend.v4(), server.at(SINK), (31_000, 64), 50).run()?,
        // The server itself, and an address of nobody.
        stranger.forge(server.v4(), server.at(SINK), (32_000, 16), 10).run()?,
        stranger.forge([10, 244, 1, 250], server.at(SINK), (32_000, 16), 10).run()?,
    ];
    for (number, met) in tries.iter().enumerate() {
        assert!(met.count("sent") > 150, "try {number}: {met:?}");
        assert_eq!(
            (met.count("syn-ack"), met.count("other")),
            (0, 0),
            "try {number}: answers go to their owner: {met:?}"
        );
    }
    // Its own address is forged as easily, and it is answered: as one whom nothing attests.
    let own = stranger.forge(stranger.v4(), server.at(SINK), (33_000, 16), 10).run()?;
    assert!(own.count("sent") > 150, "{own:?}");
    assert_eq!(held.check()?.alive, 1, "the friend's connection is not hurt");
    assert_eq!(stage.ports_of_the_lane()?, [30_000], "nothing else is attested");
    held.close()?;
    let sunk = |event: &Event| matches!(event, Event::Sunk { bytes, .. } if *bytes > 2);
    assert!(!server.events().iter().any(sunk), "{:?}", server.events());
    let before = Before { lines: stage.before()?.lines, ..before };
    stage.nobody_was_fooled("forged packets", &before)
}

#[test]
fn a_mark_of_the_agents_own_lets_nobody_past_and_keeps_nobody_out() -> Result {
    needs_root!();
    let stage = stage()?;
    let Stage { server, friend, stranger, outsider, .. } = &stage;
    let last = u32::from(choice::FIRST_LOCAL) + 64;
    let upper = (0..=last).chain([0x7fff, 0xfffe, 0xffff]);
    let marks: Vec<u32> = upper.map(|upper| upper << 16 | MARK).chain([0x6864, 0xffff_0000, 1]).collect();
    let all = marks.len() as u64;
    let before = stage.before()?;
    for to in [server.at(ECHO), server.at6(ECHO)] {
        for pod in [stranger, outsider] {
            let met: Scanned = pod.marks(to, &marks).with("--patience", 500).run()?;
            assert_eq!((met.count("open"), met.all()), (0, all), "{}: {met:?}", pod.name());
        }
    }
    stage.nobody_was_fooled("marks", &before)?;
    let met = friend.marks(server.at(ECHO), &marks).run()?;
    assert_eq!((met.count("open"), met.all()), (all, all), "the friend's are let in, whatever it sets: {met:?}");
    Ok(())
}

#[test]
fn a_mark_that_changes_before_the_syn_leaves_attests_nothing() -> Result {
    needs_root!();
    let stage = stage()?;
    let Stage { lab, server, friend, stranger, outsider } = &stage;
    // With Fast Open connect() has decided before the SYN leaves: what was marked goes unmarked, and the other way round.
    let late = |pod: &Pod, mark: u32| {
        let call = pod.connect(server.at(FASTOPEN)).fastopen().say("hello").with("--expect", 5);
        call.with("--patience", 1_500).with("--mark-after", mark).run()
    };
    let before = stage.before()?;
    for mark in [0, 1, MARK, MARK | 1 << 16, MARK | 2 << 16] {
        for pod in [stranger, outsider] {
            let seen = late(pod, mark)?;
            assert!(refused(&seen), "{} with {mark:#x}: {seen:?}", pod.name());
        }
    }
    stage.nobody_was_fooled("late marks", &before)?;
    // The friend marks a connection of the lane: it comes to the agent, which sees the friend, or it is refused.
    let lines = lab.agent(1)?.access_log().len();
    for mark in [MARK, MARK | 2 << 16] {
        let seen = late(friend, mark)?;
        assert!(seen.error.is_none() || refused(&seen), "{mark:#x}: {seen:?}");
    }
    for line in lab.agent(1)?.access_log().into_iter().skip(lines) {
        assert!([friend.identity().as_str(), ""].contains(&line.get("src.identity")), "{line:?}");
    }
    Ok(())
}

#[test]
fn a_pod_that_binds_to_anothers_address_is_not_taken_for_it() -> Result {
    needs_root!();
    let stage = stage()?;
    let Stage { lab, server, friend, stranger, outsider } = &stage;
    let before = stage.before()?;
    for pod in [stranger, outsider] {
        for port in [20_000, 50_000] {
            let seen = stage.say(pod).bind_address(friend.v4()).bind_port(port).run()?;
            assert!(refused(&seen), "{} from {port}: {seen:?}", pod.name());
        }
        let seen =
            pod.connect(server.at6(ECHO)).bind_address(friend.v6()).with("--expect", 1).with("--patience", 1_500);
        let seen = seen.run()?;
        assert!(refused(&seen), "{}: {seen:?}", pod.name());
    }
    assert_eq!(stage.ports_of_the_lane()?, Vec::<u16>::new());
    stage.nobody_was_fooled("bound addresses", &before)?;
    // One that may come in, and says that it is another: it does not take the lane, and is not taken for the other.
    let kernel = lab.agent(1)?.kernel();
    let (taken, lines) = (kernel.counts(friend)?.lane, lab.agent(1)?.access_log().len());
    let seen = stage.say(friend).bind_address(stranger.v4()).run()?;
    assert_eq!(kernel.counts(friend)?.lane, taken, "{seen:?}");
    std::thread::sleep(LINES);
    let lines = lab.agent(1)?.access_log().into_iter().skip(lines);
    assert!(lines.into_iter().all(|line| line.get("src.identity") != stranger.identity()), "{seen:?}");
    Ok(())
}

/// A namespace beside the pods on the node's bridge that has a pod's address, and to which the server sends its answers.
fn twin(stage: &Stage, of: &Pod) -> Result<Netns> {
    let twin = Netns::create(&format!("{}-twin", stage.lab.prefix()))?;
    let node = stage.lab.node(1)?;
    twin.batch(&[
        format!("link add eth0 type veth peer name twin netns {}", node.netns.name()),
        format!("addr add {}/24 dev eth0", of.v4()),
        "link set eth0 up".to_owned(),
        format!("route add default via {}", node.gateway_v4()),
    ])?;
    node.netns.batch(&["link set twin master pods up"])?;
    let link = twin.show(&["-o", "link", "show", "eth0"])?;
    let mac = link.split_once("link/ether ").and_then(|(_, rest)| rest.split_whitespace().next());
    let mac = mac.unwrap_or_default();
    // As if it had answered first: the address of the pod leads to its twin.
    stage.server.netns().batch(&[format!("neigh replace {} lladdr {mac} dev eth0 nud permanent", of.v4())])?;
    Ok(twin)
}

#[test]
fn a_process_of_a_pod_with_another_netns_and_anothers_address_is_not_taken_for_it() -> Result {
    needs_root!();
    let stage = stage()?;
    let Stage { lab, server, friend, stranger, outsider } = &stage;
    let kernel = lab.agent(1)?.kernel();
    let before = stage.before()?;
    let stolen = twin(&stage, friend)?;
    // Whole handshakes with the friend's address, from a process in the cgroup of a stranger, of nobody, of the friend.
    for pod in [stranger, outsider] {
        let seen = stage.say(pod).in_netns(&stolen).run()?;
        assert!(refused(&seen), "{}: {seen:?}", pod.name());
        assert_eq!(stage.ports_of_the_lane()?, Vec::<u16>::new(), "{}: not attested", pod.name());
    }
    let taken = kernel.counts(friend)?.lane;
    let seen = stage.say(friend).in_netns(&stolen).run()?;
    assert!(refused(&seen), "the friend's own process elsewhere: {seen:?}");
    assert_eq!(kernel.counts(friend)?.lane, taken, "only sockets of the pod's own netns take the lane");
    // The way is there: with nobody to decide, the same packets would reach the server.
    server.withdraw()?;
    until(Duration::from_secs(5), "the stolen address to work without the mesh", || {
        stage.say(outsider).in_netns(&stolen).run().ok().filter(|seen| seen.error.is_none())
    })?;
    stolen.batch(&["link del eth0"])?;
    server.netns().batch(&[format!("neigh del {} dev eth0", friend.v4())])?;
    server.enrol()?;
    lab.take_the_lane(friend, server, ECHO)?;
    let before = Before { lines: stage.before()?.lines, ..before };
    stage.nobody_was_fooled("another netns", &before)
}

#[test]
fn processes_of_the_host_and_of_pods_outside_the_mesh_are_nobody() -> Result {
    needs_root!();
    let stage = stage()?;
    let Stage { lab, server, friend, stranger, outsider } = &stage;
    let before = stage.before()?;
    for pod in [stranger, outsider] {
        assert!(refused(&stage.say(pod).on_the_host(lab)?.run()?), "the host's own address");
        let seen = stage.say(pod).on_the_host(lab)?.bind_address(friend.v4()).run()?;
        assert!(refused(&seen), "the friend's address on the host: {seen:?}");
        let met =
            pod.marks(server.at(ECHO), &[MARK, MARK | 2 << 16]).with("--patience", 500).on_the_host(lab)?.run()?;
        assert_eq!(met.count("open"), 0, "{met:?}");
    }
    let met = outsider.forge(friend.v4(), server.at(SINK), (30_000, 64), 20).on_the_host(lab)?.run()?;
    assert!(met.count("sent") > 1_000 && met.count("syn-ack") == 0, "{met:?}");
    assert_eq!(stage.ports_of_the_lane()?, Vec::<u16>::new());
    stage.nobody_was_fooled("the host", &before)
}

#[test]
fn a_connection_opened_while_its_pod_was_enrolled_is_what_it_was_when_it_began() -> Result {
    needs_root!();
    const EARLY: u64 = 20;
    let stage = stage()?;
    let Stage { lab, server, outsider, .. } = &stage;
    lab.unauthorize("shop", "rule")?;
    until(Duration::from_secs(10), "no policy", || stage.hello(outsider).ok().filter(|seen| seen.error.is_none()))?;
    let agent = lab.agent(1)?;
    let opened = |security| agent.opened(&[("reporter", "destination"), ("connection_security_policy", security)]);
    std::thread::sleep(LINES);
    let before = [opened("none")?, opened("kernel_attested")?, opened("mutual_tls")?];
    let (mut early, first) = outsider.hold(server.at(ECHO), EARLY).with("--patience", 3_000).open()?;
    assert_eq!((first.alive, stage.ports_of_the_lane()?.len()), (EARLY, 0));
    let churning = outsider.churn(server.at(ECHO), 4_000, 2).start()?;
    outsider.enrol()?;
    let churned = churning.finish()?;
    assert_eq!((churned.ok, churned.failed), (4_000, 0), "{churned:?}");
    lab.take_the_lane(outsider, server, ECHO)?;
    let (mut late, first) = outsider.hold(server.at(ECHO), EARLY).with("--patience", 3_000).open()?;
    assert_eq!((first.alive, stage.ports_of_the_lane()?.len() as u64), (EARLY, EARLY));
    // Each is counted as one or the other: what the pod's programs saw begin is the pod's, all else is nobody's.
    let counts = agent.kernel().counts(outsider)?;
    #[expect(clippy::cast_precision_loss, reason = "some thousand")]
    let (all, proven) = ((4_000 + 2 * EARLY) as f64, (counts.lane + counts.lane_missed) as f64);
    let mut grown = [0.0; 2];
    until(Duration::from_secs(5), "all of them to be counted", || {
        // Mutual TLS in between, while the agent does not have both as its own pods.
        let attested = opened("kernel_attested").ok()? + opened("mutual_tls").ok()?;
        grown = [opened("none").ok()? - before[0], attested - before[1] - before[2]];
        // And the few that found out whether the kernel knows the pair.
        (grown[1] == proven && (1.0..=20.0).contains(&(grown[0] + grown[1] - all))).then_some(())
    })
    .map_err(|error| error.context(format!("{grown:?} of {all}, {proven} of them proven")))?;
    assert!(grown[0] > 0.0 && counts.lane > 0, "{grown:?}, {counts:?}");
    // Whom nothing proves is cut off: those of before are, those of after are not.
    let nobody = json!({"from": [{"source": {"notPrincipals": ["*"]}}]});
    lab.authorize("shop", "rule", &json!({"action": "DENY", "rules": [nobody]}))?;
    until(Duration::from_secs(10), "the early ones to be closed", || early.check().ok().filter(|now| now.alive == 0))?;
    assert_eq!(late.check()?.alive, EARLY);
    late.close()
}

#[test]
fn a_tuple_that_is_used_again_within_a_second_is_another_connection() -> Result {
    needs_root!();
    const TIMES: u64 = 50;
    let stage = stage()?;
    let Stage { lab, server, friend, stranger, outsider } = &stage;
    let (agent, kernel) = (lab.agent(1)?, lab.agent(1)?.kernel());
    let closed = |labels: &[(&str, &str)]| {
        Ok::<_, anyhow::Error>(agent.metrics()?.sum("istio_tcp_connections_closed_total", labels))
    };
    let mine = [("reporter", "destination"), ("source_workload", "friend")];
    std::thread::sleep(Duration::from_millis(500));
    let (taken, before) = (kernel.counts(friend)?.lane, closed(&mine)?);
    let begun = std::time::Instant::now();
    let met = friend.reuse(server.at(ECHO), 30_000, TIMES).run()?;
    println!("lane: {TIMES} connections of one tuple in {:?}", begun.elapsed());
    assert_eq!((met.count("open"), met.all()), (TIMES, TIMES), "{met:?}");
    assert_eq!(kernel.counts(friend)?.lane - taken, TIMES, "each of them on the lane");
    #[expect(clippy::cast_precision_loss, reason = "fifty")]
    let all = TIMES as f64;
    until(Duration::from_secs(5), "each to be told of", || (closed(&mine).ok()? - before >= all).then_some(()))?;
    assert_eq!(closed(&mine)? - before, all, "once");
    // The same ports, right after the friend's: another address makes another tuple, and with the friend's it is refused.
    let before = stage.before()?;
    for pod in [stranger, outsider] {
        let met = pod.reuse(server.at(ECHO), 30_000, 5).with("--patience", 1_000).run()?;
        assert_eq!((met.count("open"), met.all()), (0, 5), "{}: {met:?}", pod.name());
        let met = pod.reuse(server.at(ECHO), 30_000, 2).bind_address(friend.v4()).with("--patience", 1_000).run()?;
        assert_eq!((met.count("open"), met.all()), (0, 2), "{}: {met:?}", pod.name());
    }
    stage.nobody_was_fooled("a tuple again", &before)
}

#[test]
fn a_full_table_of_attested_connections_sends_them_to_the_agent_or_nowhere() -> Result {
    needs_root!();
    let stage = stage()?;
    let Stage { lab, server, friend, stranger, .. } = &stage;
    let kernel = lab.agent(1)?.kernel();
    let (mut held, first) = friend.hold(server.at(ECHO), 5).open()?;
    assert_eq!(first.alive, 5);
    let (before, counts) = (stage.before()?, kernel.counts(friend)?);
    let stuffing = kernel.fill_attested()?;
    assert!(stuffing.len() > 60_000, "{}", stuffing.len());
    for _ in 0..5 {
        // The agent's own deliveries need a place there, too: without one it refuses.
        let seen = stage.hello(friend)?;
        assert!(seen.error.is_none() || refused(&seen), "{seen:?}");
        assert!(refused(&stage.hello(stranger)?));
    }
    let full = kernel.counts(friend)?.lane_full - counts.lane_full;
    assert!(full >= 5, "{full} found it full");
    assert!(stage.ports_of_the_lane()?.len() <= 5, "only those of before are attested");
    assert_eq!(held.check()?.alive, 5, "these go on");
    drop(stuffing);
    until(Duration::from_secs(5), "the lane again", || {
        let taken = kernel.counts(friend).ok()?;
        stage.hello(friend).ok().filter(|seen| seen.error.is_none())?;
        let now = kernel.counts(friend).ok()?;
        (now.lane > taken.lane && now.lane_full == taken.lane_full).then_some(())
    })?;
    held.close()?;
    let before = Before { lines: stage.before()?.lines, ..before };
    stage.nobody_was_fooled("a full table", &before)
}

#[test]
fn a_full_table_of_verdicts_leaves_new_pairs_to_the_agent() -> Result {
    needs_root!();
    let stage = stage()?;
    let Stage { lab, server, friend, stranger, .. } = &stage;
    let kernel = lab.agent(1)?.kernel();
    let more = ["late", "denied"].map(|name| lab.pod("shop", name).start());
    let [late, denied] = more;
    let (late, denied) = (late?, denied?);
    let both = json!({"principals": [friend.principal(), late.principal()]});
    let selector = json!({"matchLabels": {"app": "server"}});
    let rule = json!({"from": [{"source": both}]});
    lab.authorize("shop", "rule", &json!({"selector": selector, "action": "ALLOW", "rules": [rule]}))?;
    until(Duration::from_secs(10), "the policy", || {
        lab.learn(&late, server, FASTOPEN).is_ok_and(|learned| learned == verdict::ALLOW).then_some(())
    })?;
    lab.take_the_lane(friend, server, ECHO)?;
    let stuffing = kernel.fill_verdicts()?;
    assert!(stuffing.len() > 60_000, "{}", stuffing.len());
    let counts = kernel.counts(&late)?;
    for _ in 0..5 {
        assert_eq!(stage.hello(&late)?.error, None, "the agent carries what has no verdict");
        assert!(stage.hello(&denied)?.was_refused() && stage.hello(stranger)?.was_refused());
    }
    let now = kernel.counts(&late)?;
    assert_eq!((now.lane - counts.lane, now.lane_missed - counts.lane_missed), (0, 5), "{now:?}");
    assert_eq!(stage.hello(friend)?.error, None);
    drop(stuffing);
    lab.take_the_lane(&late, server, ECHO)?;
    assert_eq!(lab.learn(&denied, server, ECHO)?, verdict::DENY);
    let unknown = kernel.verdicts()?.into_iter().filter(|(pair, _)| pair.destination == 1).count();
    assert_eq!(unknown, 0, "nothing of the stuffing is left");
    Ok(())
}

#[test]
fn nobody_elses_address_is_a_residents() -> Result {
    needs_root!();
    let stage = stage()?;
    let kernel = stage.lab.agent(1)?.kernel();
    let ids: Vec<u64> = [&stage.server, &stage.friend, &stage.stranger]
        .into_iter()
        .filter_map(|pod| kernel.resident(pod).ok()?)
        .map(|resident| resident.workload)
        .collect();
    assert!(ids.len() == 3 && ids.iter().all(|id| *id != 0), "{ids:?}");
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2], "{ids:?}");
    assert_eq!(kernel.resident(&stage.outsider)?, None, "a pod outside the mesh");
    // Each connection of the lane is of two residents, by the address that it has.
    let (held, _) = stage.friend.hold(stage.server.at6(ECHO), 3).open()?;
    let lanes = kernel.lanes()?;
    assert_eq!(lanes.len(), 3);
    for (tuple, attestation) in lanes {
        assert_eq!((attestation.source, attestation.destination), (ids[1], ids[0]));
        assert_eq!(tuple.source, kernel::address(stage.friend.v6().into()));
        assert_eq!(tuple.destination, kernel::address(stage.server.v6().into()));
    }
    held.close()
}
