//! What becomes of connections that a pod had before it was enrolled?

use std::time::Duration;

use heddle_lab::{Lab, Result, needs_root, until};
use serde_json::Value;

const HELD: u64 = 3;

/// What the agent of node 1 lists of them.
fn older(lab: &Lab) -> Result<Vec<Value>> {
    let (_, listed) = lab.agent(1)?.ask_json(&["connections", "--older"])?;
    Ok(listed.as_array().cloned().unwrap_or_default())
}

#[test]
fn older_connections_are_listed_until_they_end_and_go_on_meanwhile() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").outside_the_mesh().start()?;
    let (mut held, _) = client.hold(server.at(7000), HELD).open()?;
    assert_eq!(older(&lab)?, [] as [Value; 0]);
    client.enrol()?;
    let listed = older(&lab)?;
    assert_eq!(listed.len() as u64, HELD, "{listed:?}");
    for line in &listed {
        assert_eq!(line["pod"], "shop/client");
        assert_eq!(line["remote"], server.at(7000).to_string());
    }
    // A new one is the mesh's, and no older one.
    client.connect(server.at(7000)).say("x").with("--expect", 1).run()?;
    assert_eq!(held.check()?.alive, HELD, "nobody asked for a reset");
    // The next agent knows of them as well.
    lab.agent(1)?.restart()?;
    client.wait_captured()?;
    assert_eq!(older(&lab)?.len() as u64, HELD);
    let scraped = lab.agent(1)?.metrics()?.sum("heddle_connections_older", &[]);
    assert!((scraped - HELD as f64).abs() < 0.5, "{scraped}");
    held.close()?;
    until(Duration::from_secs(10), "no older connection", || older(&lab).ok()?.is_empty().then_some(()))?;
    Ok(())
}

#[test]
fn older_connections_are_reset_where_the_pod_asks() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").annotate("heddle.dev/on-enrol", "reset").outside_the_mesh().start()?;
    let (mut held, _) = client.hold(server.at(7000), HELD).open()?;
    assert_eq!(held.check()?.alive, HELD);
    client.enrol()?;
    until(Duration::from_secs(10), "the reset", || held.check().is_ok_and(|held| held.alive == 0).then_some(()))?;
    assert_eq!(older(&lab)?, [] as [Value; 0]);
    client.connect(server.at(7000)).say("x").with("--expect", 1).run()?;
    Ok(())
}
