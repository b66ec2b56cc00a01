//! Are connections to a Service as evenly spread as by one balancer, wherever its endpoints are and whoever chooses?

use std::{collections::BTreeMap, time::Duration};

use heddle_lab::{Backend, Lab, Pod, Result, Service, needs_root, reports::Tallied, until};
use serde_json::json;

const SAME_NODE: &str = "heddle.dev/same-node";
/// Standard deviations that a share may be off: by chance one of some ten thousand is.
const SIGMAS: f64 = 4.0;
/// The 99.99 % point of chi-square for as many degrees of freedom.
const CHI_SQUARE: [f64; 4] = [0.0, 15.14, 18.42, 21.11];

/// A client, two endpoints of a Service beside it and two on the other node.
struct Stage {
    lab: Lab,
    client: Pod,
    near: [Pod; 2],
    far: [Pod; 2],
    service: Service,
}

fn stage() -> Result<Stage> {
    let lab = Lab::two_nodes()?;
    let pod = |name: &str, node| lab.pod("shop", name).on(node).serves(&["who:7000"]).start();
    let (near, far) = ([pod("near1", 1)?, pod("near2", 1)?], [pod("far1", 2)?, pod("far2", 2)?]);
    let client = lab.pod("shop", "client").start()?;
    let service = lab.service("shop", "web", (80, 7000), &[&near[0], &near[1], &far[0], &far[1]])?;
    let stage = Stage { lab, client, near, far, service };
    stage.becomes("the Service", &["far1", "far2", "near1", "near2"])?;
    Ok(stage)
}

impl Stage {
    fn tally(&self, count: u64) -> Result<Tallied> {
        let seen = self.client.tally(self.service.at(), count, 16).run()?;
        assert_eq!((seen.strange_peer, seen.strange_client), (0, 0), "addresses at both ends: {seen:?}");
        Ok(seen)
    }

    /// Until exactly these answer, and no connection fails.
    fn becomes(&self, what: &str, wanted: &[&str]) -> Result {
        let mut last = Tallied::default();
        until(Duration::from_secs(15), what, || {
            last = self.tally(40).ok()?;
            (last.failed() == 0 && last.answers.keys().map(String::as_str).eq(wanted.iter().copied())).then_some(())
        })
        .map_err(|error| error.context(format!("{last:?} is not {wanted:?}")))
    }

    /// The kernel knows what policy says of the client and both endpoints beside it.
    fn learned(&self) -> Result {
        self.near.iter().try_for_each(|pod| self.lab.learn(&self.client, pod, 7000).map(drop))
    }

    fn backends(&self) -> Vec<Backend> {
        self.near.iter().chain(&self.far).map(Backend::from).collect()
    }
}

/// All shares are equal, as far as chance lets them be.
fn uniform(what: &str, shares: &BTreeMap<String, u64>) {
    let count = shares.len();
    #[expect(clippy::cast_precision_loss, reason = "some thousand")]
    let (all, of) = (shares.values().sum::<u64>() as f64, count as f64);
    let expected = all / of;
    let deviation = (all / of * (1.0 - 1.0 / of)).sqrt();
    #[expect(clippy::cast_precision_loss, reason = "some thousand")]
    let off: Vec<f64> = shares.values().map(|share| *share as f64 - expected).collect();
    let square: f64 = off.iter().map(|off| off * off / expected).sum();
    let worst = off.iter().map(|off| off.abs() / deviation).fold(0.0, f64::max);
    println!("shares, {what}: {shares:?}, chi-square {square:.2} of {} degrees, at most {worst:.1} sigma", count - 1);
    assert!(worst <= SIGMAS, "{what}: {shares:?}: {worst} sigma");
    assert!(CHI_SQUARE.get(count - 1).is_some_and(|most| square <= *most), "{what}: {shares:?}: chi-square {square}");
}

#[test]
fn a_service_is_spread_evenly_over_both_nodes_before_and_after_the_kernel_knows_the_pairs() -> Result {
    needs_root!();
    const COUNT: u64 = 3_000;
    let stage = stage()?;
    // Nothing of it on the lane: the agent chooses all.
    stage.near.iter().try_for_each(|pod| pod.annotate(SAME_NODE, "mtls"))?;
    until(Duration::from_secs(10), "the agent to carry all", || {
        stage.tally(40).ok().filter(|seen| seen.direct.is_empty() && seen.failed() == 0)
    })?;
    let seen = stage.tally(COUNT)?;
    assert_eq!((seen.answered(), seen.failed(), seen.direct.len()), (COUNT, 0, 0), "{seen:?}");
    uniform("by the agent", &seen.answers);
    // While the kernel learns what it may do, and with that learned.
    stage.near.iter().try_for_each(|pod| pod.unannotate(SAME_NODE))?;
    let seen = stage.tally(COUNT)?;
    assert_eq!((seen.answered(), seen.failed()), (COUNT, 0), "{seen:?}");
    uniform("learning", &seen.answers);
    stage.learned()?;
    until(Duration::from_secs(10), "the Service on the lane", || {
        stage.tally(40).ok().filter(|seen| seen.direct.len() == 2)
    })?;
    let seen = stage.tally(COUNT)?;
    assert_eq!((seen.answered(), seen.failed()), (COUNT, 0), "{seen:?}");
    uniform("by kernel and agent", &seen.answers);
    let near = |name: &String| name.starts_with("near");
    let beside: BTreeMap<_, _> =
        seen.answers.iter().filter(|(name, _)| near(name)).map(|(a, b)| (a.clone(), *b)).collect();
    assert_eq!(seen.direct, beside, "no proxy before those of this node, one before the others");
    // IPv6 as well, and as it looks to the client.
    let seen = stage.client.tally(stage.service.at6(), 200, 8).run()?;
    assert_eq!((seen.answered(), seen.strange_peer, seen.strange_client), (200, 0, 0), "{seen:?}");
    assert_eq!((seen.answers.len(), seen.direct.len()), (4, 2), "{seen:?}");
    Ok(())
}

#[test]
fn a_local_endpoint_keeps_its_share_when_denied_and_loses_it_when_not_ready() -> Result {
    needs_root!();
    const COUNT: u64 = 1_600;
    let stage = stage()?;
    stage.learned()?;
    let rule = json!({"from": [{"source": {"principals": [stage.client.principal()]}}]});
    let spec = json!({"selector": {"matchLabels": {"app": "near1"}}, "action": "DENY", "rules": [rule]});
    stage.lab.authorize("shop", "not-near1", &spec)?;
    until(Duration::from_secs(10), "the denial", || {
        stage.tally(40).ok().filter(|seen| !seen.answers.contains_key("near1"))
    })?;
    stage.learned()?;
    let seen = stage.tally(COUNT)?;
    assert_eq!(seen.answered() + seen.failed(), COUNT, "{seen:?}");
    assert_eq!(seen.errors.keys().collect::<Vec<_>>(), ["forbidden"], "at once, by the kernel: {seen:?}");
    let mut shares = seen.answers.clone();
    shares.insert("near1, denied".to_owned(), seen.failed());
    assert_eq!(shares.len(), 4, "{seen:?}");
    uniform("one denied", &shares);
    stage.lab.unauthorize("shop", "not-near1")?;
    stage.becomes("no denial", &["far1", "far2", "near1", "near2"])?;
    let mut backends = stage.backends();
    backends[0].ready = false;
    stage.service.set_backends(&backends)?;
    stage.becomes("one not ready", &["far1", "far2", "near2"])?;
    stage.learned()?;
    let seen = stage.tally(COUNT)?;
    assert_eq!((seen.answered(), seen.answers.len()), (COUNT, 3), "{seen:?}");
    uniform("one not ready", &seen.answers);
    // One of them by mutual TLS: it has its share, but not on the lane.
    stage.service.set_backends(&stage.backends())?;
    stage.near[0].annotate(SAME_NODE, "mtls")?;
    stage.becomes("all ready", &["far1", "far2", "near1", "near2"])?;
    stage.lab.take_the_lane(&stage.client, &stage.near[1], 7000)?;
    until(Duration::from_secs(10), "one on the lane", || {
        stage.tally(40).ok().filter(|seen| seen.direct.keys().eq(["near2"]))
    })?;
    let seen = stage.tally(COUNT)?;
    assert_eq!((seen.answered(), seen.direct.len()), (COUNT, 1), "{seen:?}");
    uniform("one by mutual TLS", &seen.answers);
    Ok(())
}

#[test]
fn traffic_policies_of_a_service_hold_on_the_lane() -> Result {
    needs_root!();
    const COUNT: u64 = 400;
    let stage = stage()?;
    stage.learned()?;
    let none_near = || {
        let mut backends = stage.backends();
        backends[..2].iter_mut().for_each(|backend| backend.ready = false);
        backends
    };
    stage.service.set_fields(&json!({"internalTrafficPolicy": "Local"}))?;
    stage.becomes("only those of this node", &["near1", "near2"])?;
    let seen = stage.tally(COUNT)?;
    assert_eq!((seen.answered(), &seen.direct), (COUNT, &seen.answers), "all on the lane: {seen:?}");
    uniform("internalTrafficPolicy: Local", &seen.answers);
    stage.service.set_backends(&none_near())?;
    until(Duration::from_secs(10), "nobody to answer", || stage.tally(20).ok().filter(|seen| seen.answered() == 0))?;
    stage.service.set_backends(&stage.backends())?;
    stage.service.set_fields(&json!({"trafficDistribution": "PreferSameNode"}))?;
    stage.becomes("those of this node preferred", &["near1", "near2"])?;
    let seen = stage.tally(COUNT)?;
    assert_eq!((seen.answered(), &seen.direct), (COUNT, &seen.answers), "all on the lane: {seen:?}");
    stage.service.set_backends(&none_near())?;
    stage.becomes("the others, where there is no other way", &["far1", "far2"])
}

#[test]
fn an_app_that_is_gone_refuses_as_without_a_mesh_and_one_behind_the_agent_is_passed_over() -> Result {
    needs_root!();
    const COUNT: u64 = 400;
    let stage = stage()?;
    stage.learned()?;
    stage.far[0].stop_servers()?;
    let seen = stage.tally(COUNT)?;
    assert_eq!((seen.answered(), seen.answers.len()), (COUNT, 3), "the agent goes on to the other one: {seen:?}");
    stage.near[0].stop_servers()?;
    let seen = stage.tally(COUNT)?;
    assert_eq!(seen.answered() + seen.errors.get("refused").copied().unwrap_or(0), COUNT, "at once: {seen:?}");
    // Until its readiness goes, as with any Service.
    let mut backends = stage.backends();
    backends[0].ready = false;
    stage.service.set_backends(&backends)?;
    stage.becomes("one not ready", &["far2", "near2"])
}
