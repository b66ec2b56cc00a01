//! Does heddle take everything away with it?

use std::time::Duration;

use heddle_lab::{Lab, Pod, Result, needs_root, until};

/// What `nft list ruleset` prints in the pod; heddle never adds to it.
fn netfilter(pod: &Pod) -> Result<String> {
    pod.output("nft", &["list", "ruleset"])
}

#[test]
fn a_withdrawn_pod_is_as_it_was_before() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let pod = lab.pod("shop", "pod").outside_the_mesh().start()?;
    let agent = lab.agent(1)?;
    let (before, pins) = (pod.kernel_state()?, agent.pins());
    pod.enrol()?;
    assert_eq!(pod.connect(server.at(7000)).say("x").with("--expect", 1).run()?.error, None);
    assert_ne!(pod.kernel_state()?, before, "enrolment leaves traces while it lasts");
    pod.withdraw()?;
    until(Duration::from_secs(10), "the pins to go", || (agent.pins() == pins).then_some(()))?;
    assert_eq!(pod.kernel_state()?, before);
    Ok(())
}

#[test]
fn there_is_never_a_netfilter_rule() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    assert_eq!(client.connect(server.at(7000)).say("x").with("--expect", 1).run()?.error, None);
    for pod in [&server, &client] {
        assert_eq!(netfilter(pod)?.trim(), "", "{}", pod.name());
    }
    Ok(())
}

#[test]
fn uninstall_removes_what_a_dead_agent_left() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").outside_the_mesh().start()?;
    let before = client.kernel_state()?;
    client.enrol()?;
    let agent = lab.agent(1)?;
    agent.daemon.kill()?;
    let without_an_agent = client.connect(server.at(7000)).run()?;
    assert!(without_an_agent.was_refused(), "closed while pins are there: {without_an_agent:?}");
    let bpffs = agent.bpffs.to_str().unwrap_or_default().to_owned();
    agent.heddle(&["uninstall", "--bpffs", &bpffs])?.ok()?;
    assert_eq!(agent.pins(), Vec::<std::path::PathBuf>::new());
    assert_eq!(client.kernel_state()?, before);
    assert_eq!(
        client.connect(server.at(7000)).say("x").with("--expect", 1).run()?.error,
        None,
        "plain, as before heddle"
    );
    Ok(())
}
