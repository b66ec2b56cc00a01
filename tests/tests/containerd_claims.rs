//! Can a pod of the mesh run a byte before it is captured?

use std::{thread, time::Duration};

use heddle_lab::{
    Lab, Result,
    containerd::{CniFolders, ContainerPod, Containerd, LIST},
    manifests, needs_program, needs_root,
    reports::Arrived,
    until,
};

const PODS: usize = 50;

#[test]
fn fifty_pods_at_once_send_at_once_and_nothing_of_it_is_plain() -> Result {
    needs_root!();
    needs_program!("containerd");
    let lab = Lab::builder().containers().start()?;
    let (here, there) = (Containerd::start(&lab, 1)?, Containerd::start(&lab, 2)?);
    let server = there.pod(&lab, "shop", "server", &["serve", "reply:7000"]).start()?;
    let to = server.at(7000).to_string();
    // What the recording must see: a pod of this node that is not in the mesh.
    let recording = lab.record()?;
    let outside =
        here.pod(&lab, "shop", "outside", &["first", "--to", &to, "--seconds", "60"]).mesh("disabled").start()?;
    arrived(&outside)?;
    assert!(recording.finish()?.to_port(7000).count() > 0);
    let recording = lab.record()?;
    let begin = std::time::Instant::now();
    let started: Vec<Result<ContainerPod<'_>>> = thread::scope(|scope| {
        let start = |number: usize| {
            let (lab, here, to) = (&lab, &here, &to);
            let args = ["first", "--to", to, "--seconds", "120"];
            scope.spawn(move || here.pod(lab, "shop", &format!("pod-{number}"), &args).start())
        };
        let starting: Vec<_> = (0..PODS).map(start).collect();
        starting.into_iter().map(|pod| pod.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?).collect()
    });
    let pods = started.into_iter().collect::<Result<Vec<_>>>()?;
    let all = begin.elapsed();
    for pod in &pods {
        arrived(pod)?;
    }
    let traffic = recording.finish()?;
    // The last words of the one that is not in the mesh may come late.
    let plain: Vec<_> =
        traffic.to_port(7000).map(|stream| stream.from).filter(|from| from.ip() != outside.address()).collect();
    let log = lab.agent(1)?.daemon.log();
    let left: Vec<_> = log.lines().filter(|line| line.contains("withdrawn") || line.contains("replaced")).collect();
    assert!(plain.is_empty(), "a pod connected plainly: {plain:?}, outside {}: {left:#?}", outside.address());
    let mut sources: Vec<_> = traffic.to_port(15008).map(|stream| stream.from.ip()).collect();
    sources.sort();
    sources.dedup();
    assert_eq!(sources.len(), PODS, "every pod has a tunnel of its own");
    let refused: usize = pods.iter().map(|pod| pod.refusals.len()).sum();
    let slowest = pods.iter().map(|pod| pod.took).max().unwrap_or_default();
    println!("{PODS} pods in {all:?}, the slowest sandbox in {slowest:?}, {refused} refused and tried again");
    Ok(())
}

fn arrived(pod: &ContainerPod<'_>) -> Result<Arrived> {
    until(Duration::from_secs(120), &format!("{} to be answered", pod.full_name()), || {
        pod.said().iter().find_map(|line| serde_json::from_str(line).ok())
    })
}

#[test]
fn without_an_agent_only_pods_outside_the_mesh_start() -> Result {
    needs_root!();
    needs_program!("containerd");
    let lab = Lab::builder().nodes(1).containers().start()?;
    lab.need_namespace("plain")?;
    lab.manifests().apply(&manifests::namespace("plain", false))?;
    lab.need_namespace("shop")?;
    let here = Containerd::start(&lab, 1)?;
    let before = here.pod(&lab, "shop", "before", &["serve", "echo:7000"]).start()?;
    // What the agent knows of the namespaces is on disk by now, and stays there.
    let known = lab.dir().join("state-node1/enrolment.json");
    until(Duration::from_secs(10), "what is known on disk", || {
        std::fs::read_to_string(&known).ok().filter(|text| text.contains("plain") && text.contains("shop"))
    })?;
    lab.agent(1)?.daemon.kill()?;
    let outside = here.pod(&lab, "plain", "outside", &["pause"]).start()?;
    assert_eq!(outside.refusals, [] as [String; 0]);
    for (namespace, name) in [("shop", "inside"), ("unheard-of", "stranger")] {
        let error = here.pod(&lab, namespace, name, &["pause"]).tries(Duration::ZERO).start().map(drop).unwrap_err();
        assert!(format!("{error:#}").contains("is not captured, so it can't start yet: unreachable"), "{error:#}");
    }
    // Pods that ran go on running, and are closed to what is new.
    let closed = before.connect(before.at(7000), "itself");
    assert!(closed.is_ok(), "a pod's own address is its own: {closed:?}");
    let starting = thread::scope(|scope| {
        let starting = scope.spawn(|| here.pod(&lab, "shop", "late", &["pause"]).start().map(|pod| pod.refusals));
        thread::sleep(Duration::from_secs(1));
        lab.agent(1)?.start()?;
        starting.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
    })?;
    assert!(!starting.is_empty(), "it was refused until the agent came");
    lab.agent(1)?.wait_state("shop/late", "captured")?;
    Ok(())
}

#[test]
fn the_plugin_is_in_the_list_whatever_the_cni_writes() -> Result {
    needs_root!();
    needs_program!("containerd");
    let lab = Lab::builder().nodes(1).containers().start()?;
    let folders = CniFolders::of(lab.dir(), "node1");
    let list = || std::fs::read_to_string(folders.conf.join(LIST)).unwrap_or_default();
    // The agent is ready, so the list names the plugin.
    assert!(list().contains("heddle-cni"), "{}", list());
    assert!(folders.bin.join("heddle-cni").is_file());
    folders.write_list(lab.node(1)?)?;
    until(Duration::from_secs(10), "the entry again", || list().contains("heddle-cni").then_some(()))?;
    let here = Containerd::start(&lab, 1)?;
    here.pod(&lab, "shop", "client", &["pause"]).start()?.wait_captured()?;
    lab.agent(1)?.daemon.terminate(Duration::from_secs(20))?;
    assert!(list().contains("heddle-cni"), "an agent that goes leaves the gate closed");
    Ok(())
}

#[test]
fn a_node_that_has_lost_agent_and_pins_has_every_pod_captured_again() -> Result {
    needs_root!();
    needs_program!("containerd");
    const ALIVE: usize = 12;
    let lab = Lab::builder().containers().start()?;
    let (here, there) = (Containerd::start(&lab, 1)?, Containerd::start(&lab, 2)?);
    let server = there.pod(&lab, "shop", "server", &["serve", "reply:7000"]).start()?;
    let pods = (0..ALIVE)
        .map(|number| here.pod(&lab, "shop", &format!("pod-{number}"), &["pause"]).start())
        .collect::<Result<Vec<_>>>()?;
    // As after a reboot: no agent, none of its programs, and of its memory only what is on disk.
    let agent = lab.agent(1)?;
    agent.daemon.kill()?;
    std::fs::remove_dir_all(&agent.bpffs)?;
    let begin = std::time::Instant::now();
    agent.start()?;
    for pod in &pods {
        pod.wait_captured()?;
    }
    println!("{ALIVE} pods captured again in {:?}", begin.elapsed());
    assert_eq!(agent.status_text()?.status.code(), Some(0), "uncaptured: 0");
    let recording = lab.record()?;
    for pod in &pods {
        assert_eq!(pod.connect(server.at(7000), "x")?.received, "x");
    }
    assert_eq!(recording.finish()?.to_port(7000).count(), 0);
    Ok(())
}

#[test]
fn what_somebody_takes_out_of_a_pods_netns_is_put_back() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    let whole = client.kernel_state()?;
    for line in ["-4 rule flush", "-4 rule add pref 32766 lookup main", "-4 rule add pref 32767 lookup default"] {
        let args: Vec<&str> = line.split(' ').collect();
        client.netns().show(&args)?;
    }
    let tampered = client.kernel_state()?;
    assert_ne!(tampered, whole);
    // A marked connection finds no way but the main table's, and there policy can't follow: it is refused as soon as that is seen.
    until(Duration::from_secs(90), "the repair", || {
        lab.agent(1)
            .ok()?
            .metrics()
            .ok()
            .filter(|scrape| scrape.sum("heddle_capture_repairs_total", &[]) > 0.5)
            .map(drop)
    })?;
    client.wait_captured()?;
    let repaired = client.kernel_state()?;
    for line in whole.lines().filter(|line| line.contains("fwmark")) {
        assert!(repaired.contains(line), "{line} is not in\n{repaired}");
    }
    assert!(lab.agent(1)?.status_text()?.stdout.contains("put in order"));
    client.connect(server.at(7000)).say("x").with("--expect", 1).run()?;
    Ok(())
}
