//! Does it hold under many connections? Run one test at a time: each of them wants the machine.

use heddle_lab::{Lab, Pod, Result, needs_root};

fn stage() -> Result<(Lab, Pod, Pod)> {
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    Ok((lab, client, server))
}

/// 1,000 connections of one client to one port stay open while 20,000 more come and go.
fn open_connections_outlive_churn(client: &Pod, server: &Pod) -> Result {
    let (mut held, first) = client.hold(server.at(7000), 1_000).open()?;
    assert_eq!((first.alive, first.failed), (1_000, 0), "{:?}", first.errors);
    let churned = client.churn(server.at(7000), 20_000, 32).within(400).run()?;
    assert_eq!((churned.ok, churned.failed), (20_000, 0), "{:?}", churned.errors);
    let last = held.check()?;
    assert_eq!((last.alive, last.failed), (1_000, 0), "{:?}", last.errors);
    held.close()
}

#[test]
fn two_thousand_connections_one_after_the_other_meet_no_error() -> Result {
    needs_root!();
    let (_lab, client, server) = stage()?;
    let churned = client.churn(server.at(7000), 2_000, 1).run()?;
    assert_eq!((churned.ok, churned.failed), (2_000, 0), "{:?}", churned.errors);
    Ok(())
}

#[test]
fn five_hundred_connections_at_once_meet_no_error() -> Result {
    needs_root!();
    let (_lab, client, server) = stage()?;
    let churned = client.churn(server.at(7000), 500, 500).run()?;
    assert_eq!((churned.ok, churned.failed), (500, 0), "{:?}", churned.errors);
    Ok(())
}

#[test]
fn a_thousand_tunnelled_connections_stay_while_twenty_thousand_come_and_go() -> Result {
    needs_root!();
    let (_lab, client, server) = stage()?;
    open_connections_outlive_churn(&client, &server)
}

#[test]
fn a_thousand_plaintext_connections_stay_while_twenty_thousand_come_and_go() -> Result {
    needs_root!();
    let (lab, _client, server) = stage()?;
    let outsider = lab.pod("shop", "outsider").outside_the_mesh().start()?;
    open_connections_outlive_churn(&outsider, &server)
}
