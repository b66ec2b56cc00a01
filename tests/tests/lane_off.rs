//! Does the kernel lane turn itself off, and say so, where packets may leave the node or come changed?

use std::time::Duration;

use heddle_lab::{Lab, Pod, Result, needs_root, until};
use serde_json::Value;

/// Ten connections that all work, and none of them on the lane.
fn through_the_agent(lab: &Lab, client: &Pod, server: &Pod) -> Result {
    let kernel = lab.agent(1)?.kernel();
    for _ in 0..10 {
        let seen = client.connect(server.at(7000)).say("hello").with("--expect", 5).run()?;
        assert_eq!(seen.error, None);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(kernel.verdict(client, server, 7000)?, None, "nothing to remember");
    assert_eq!(kernel.counts(client)?.lane, 0);
    Ok(())
}

fn pod_line(status: &Value, pod: &Pod) -> Value {
    let mut lines = status["pods"].as_array().into_iter().flatten();
    lines.find(|line| line["name"] == pod.name()).cloned().unwrap_or_default()
}

#[test]
fn a_pod_with_another_way_in_is_off_the_lane_and_the_others_are_not() -> Result {
    needs_root!();
    let lab = Lab::one_node()?;
    let server = lab.pod("shop", "server").serves(&["echo:7000"]).start()?;
    let odd = lab.pod("shop", "odd").serves(&["echo:7000"]).outside_the_mesh().start()?;
    let client = lab.pod("shop", "client").start()?;
    let node = lab.node(1)?.netns.name();
    odd.netns().batch(&[
        format!("link add eth1 type veth peer name odd1 netns {node}"),
        format!("addr add {}/32 dev eth1", odd.v4()),
        "link set eth1 up".to_owned(),
    ])?;
    lab.node(1)?.netns.batch(&["link set odd1 up"])?;
    odd.enrol()?;
    let agent = lab.agent(1)?;
    let status = until(Duration::from_secs(10), "the reason in the status", || {
        agent.status().ok().filter(|status| pod_line(status, &odd)["lane"] == "off")
    })?;
    assert_eq!(pod_line(&status, &odd)["lane_reason"], "device", "{status:#}");
    assert_eq!(
        (&pod_line(&status, &client)["lane"], &pod_line(&status, &server)["lane"]),
        (&"on".into(), &"on".into())
    );
    assert!(agent.status_text()?.stdout.contains("device"), "{}", agent.status_text()?.stdout);
    through_the_agent(&lab, &client, &odd)?;
    through_the_agent(&lab, &odd, &server)?;
    lab.take_the_lane(&client, &server, 7000)
}

#[test]
fn a_pair_between_which_addresses_are_rewritten_goes_through_the_agent() -> Result {
    needs_root!();
    let lab = Lab::one_node()?;
    let server = lab.pod("shop", "server").serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").outside_the_mesh().start()?;
    let other = lab.pod("shop", "other").start()?;
    // By way of the node, which puts its own address in the client's place.
    let gateway = lab.node(1)?.gateway_v4();
    client.netns().batch(&[format!("route add {}/32 via {gateway}", server.v4())])?;
    let rules = format!(
        "table ip lab {{\n chain out {{\n type nat hook postrouting priority srcnat\n ip saddr {} ip daddr {} masquerade\n }}\n}}\n",
        client.v4(),
        server.v4()
    );
    // A process of the host sets the rule; the pod only lends its name.
    let file = lab.dir().join("rewrite.nft");
    std::fs::write(&file, rules)?;
    let node = lab.node(1)?.netns.path();
    let nsenter = [format!("--net={}", node.display()), "nft".to_owned(), "-f".to_owned(), file.display().to_string()];
    other.output("nsenter", &nsenter)?;
    client.enrol()?;
    through_the_agent(&lab, &client, &server)?;
    let agent = lab.agent(1)?;
    let status = until(Duration::from_secs(10), "the reason in the status", || {
        let status = agent.status().ok()?;
        let paths = status["unproven_paths"].as_array()?;
        paths.iter().find(|path| path["from"] == client.full_name() && path["to"] == server.full_name()).cloned()
    })?;
    let reason = status["reason"].as_str().unwrap_or_default();
    assert!(["route", "rewritten"].contains(&reason), "{status:#}");
    lab.take_the_lane(&other, &server, 7000)
}
