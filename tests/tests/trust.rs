//! What becomes of a peer whose certificate counts no more, and of everyone while nobody can say whose counts?

use std::{fs, time::Duration};

use heddle_lab::{
    Lab, Pod, Result,
    agent::Agent,
    certificates::{Root, replace},
    hostile::now,
    needs_root, until,
};

const CONNECTIONS: u64 = 1_000;
/// From the moment the list's file is replaced (p99). Agents and client of a build without optimisation need more than twice
/// the processor time for a thousand ends on two cores.
const LIMIT: Duration = Duration::from_millis(if cfg!(debug_assertions) { 1_000 } else { 500 });
/// How long an agent may take to notice what does not hurry.
const NOTICED: Duration = Duration::from_secs(10);

fn reaches(client: &Pod, server: &Pod) -> Result<bool> {
    let seen = client.connect(server.at(7000)).say("x").with("--expect", 1).run()?;
    anyhow::ensure!(seen.error.is_none() || seen.was_refused(), "neither let in nor refused: {seen:?}");
    Ok(seen.error.is_none())
}

#[test]
fn i5_a_thousand_connections_end_with_the_certificate_of_either_end() -> Result {
    needs_root!();
    let lab = Lab::builder().revocation("refuse").start()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let honest = lab.pod("shop", "honest").start()?;
    let (mut stays, first) = honest.hold(server.at(7000), 10).open()?;
    assert_eq!(first.alive, 10);
    let (mut revoked, mut took) = (Vec::new(), Vec::new());
    // The better of three, with a client each: a busy machine is not the agent's doing.
    for round in 0..3 {
        let client = lab.pod("shop", &format!("client-{round}")).start()?;
        let (fates, held) = client.outlive(server.at(7000), CONNECTIONS, 20).open()?;
        assert_eq!((held.alive, held.failed), (CONNECTIONS, 0), "{held:?}");
        revoked.push(lab.agent(1)?.serial(&client.identity())?);
        let before = now();
        lab.revoke(&revoked)?;
        let fates = fates.finish()?;
        took.push(fates.tell(&format!("I5 {CONNECTIONS} connections of a revoked client"), before));
        assert_eq!(fates.open, 0, "{fates:?}");
        assert!(!reaches(&client, &server)?, "a revoked client is let in");
        let line = lab.agent(2)?.wait_access("a closed connection", |line| {
            line.get("src.identity") == client.identity() && line.mentions("was revoked")
        })?;
        assert!(line.mentions("peer_revoked"), "{line:?}");
        assert_eq!(stays.check()?.alive, 10, "others go on");
        if took.iter().any(|took| *took <= LIMIT) {
            break;
        }
    }
    assert!(took.iter().any(|took| *took <= LIMIT), "{took:?}");
    stays.close()?;
    let ended = |node: u8, what| -> Result<f64> {
        Ok(lab.agent(node)?.metrics()?.sum("heddle_revoked_ended_total", &[("what", what)]))
    };
    assert!(ended(2, "connections")? >= 1_000.0 && ended(2, "sessions")? >= 1.0);
    assert!(lab.agent(2)?.metrics()?.sum("heddle_tls_handshakes_total", &[("result", "revoked")]) >= 1.0);
    assert!(lab.agent(1)?.ready() && lab.agent(2)?.ready());

    // And the other way round: the server's certificate, under connections that this side opened.
    let other = lab.pod("shop", "other").on(2).serves(&["echo:7000"]).start()?;
    let (mut stays, _) = honest.hold(other.at(7000), 10).open()?;
    let (fates, held) = honest.outlive(server.at(7000), CONNECTIONS, 20).open()?;
    assert_eq!((held.alive, held.failed), (CONNECTIONS, 0), "{held:?}");
    revoked.push(lab.agent(2)?.serial(&server.identity())?);
    let before = now();
    lab.revoke(&revoked)?;
    let fates = fates.finish()?;
    // Only told: what is shown to be fast above is the same work.
    fates.tell(&format!("I5 {CONNECTIONS} connections to a revoked server"), before);
    assert_eq!(fates.open, 0, "{fates:?}");
    assert!(!reaches(&honest, &server)?, "a revoked server is reached");
    assert!(reaches(&honest, &other)?);
    assert_eq!(stays.check()?.alive, 10, "others go on");
    stays.close()?;
    assert!(ended(1, "connections")? >= 1_000.0 && ended(1, "sessions")? >= 1.0);
    assert!(lab.agent(1)?.metrics()?.sum("heddle_pool_connections_closed_total", &[("reason", "revoked")]) >= 1.0);
    Ok(())
}

/// The agent says what is wrong: not ready, a metric, and one line with the file and what to do.
fn is_loud(agent: &Agent, reason: &str) -> Result {
    until(NOTICED, &format!("{reason} to be noticed"), || (!agent.ready()).then_some(()))?;
    until(NOTICED, reason, || {
        let metrics = agent.metrics().ok()?;
        (metrics.sum("heddle_crl_problems", &[("reason", reason)]) == 1.0).then_some(())
    })?;
    let told = agent.status()?;
    let told = told["trust_problems"][0].as_str().unwrap_or_default().to_owned();
    assert!(told.contains("crl.pem") && told.contains("; "), "{told:?}");
    let log = agent.daemon.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains(&format!("\"{reason}\""))).collect();
    assert!(lines.iter().any(|line| line.contains("crl.pem")), "{reason} in {log}");
    Ok(())
}

fn is_well(agent: &Agent) -> Result {
    until(NOTICED, "the agent to be well again", || agent.ready().then_some(()))?;
    assert_eq!(agent.metrics()?.sum("heddle_crl_problems", &[]), 0.0);
    Ok(())
}

#[test]
fn i5_a_list_that_is_missing_or_broken_is_loud_and_lets_nobody_new_in() -> Result {
    needs_root!();
    let lab = Lab::builder().revocation("refuse").start()?;
    let (first, second) = (lab.agent(1)?, lab.agent(2)?);
    let pair = |name: &str| -> Result<(Pod, Pod)> {
        let server = lab.pod("shop", &format!("{name}-server")).on(2).serves(&["echo:7000"]).start()?;
        Ok((lab.pod("shop", &format!("{name}-client")).start()?, server))
    };
    let (client, server) = pair("early")?;
    let (mut held, report) = client.hold(server.at(7000), 10).open()?;
    assert_eq!(report.alive, 10);
    let good = fs::read_to_string(lab.crl())?;
    let foreign = Root::create(lab.dir(), "foreign", "cluster.local")?;
    let hour = time::Duration::hours(1);
    for (reason, text) in [
        ("crl_unreadable", None),
        ("crl_invalid", Some(good.replace("-----END", "-----ENT"))),
        ("crl_untrusted", Some(foreign.crl(&[], hour)?)),
        ("crl_expired", Some(lab.root()?.crl(&[], -hour)?)),
    ] {
        match text {
            None => fs::remove_file(lab.crl())?,
            Some(text) => replace(&lab.crl(), &text)?,
        }
        is_loud(first, reason)?;
        is_loud(second, reason)?;
        // A pair that has no tunnel yet.
        let (client, server) = pair(&reason.replace('_', "-"))?;
        assert!(!reaches(&client, &server)?, "{reason}: let in");
        assert_eq!(held.check()?.alive, 10, "{reason}: what is open goes on");
        replace(&lab.crl(), &good)?;
        is_well(first)?;
        is_well(second)?;
        until(NOTICED, "a connection again", || reaches(&client, &server).ok().filter(|reached| *reached))?;
    }
    held.close()
}

#[test]
fn i5_the_last_good_list_may_stay_in_force_while_it_is_missing() -> Result {
    needs_root!();
    let lab = Lab::builder().revocation("last-good").start()?;
    let (agent, other) = (lab.agent(1)?, lab.agent(2)?);
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let (bad, good) = (lab.pod("shop", "bad").start()?, lab.pod("shop", "good").start()?);
    lab.revoke(&[agent.serial(&bad.identity())?])?;
    until(NOTICED, "the list to be in force", || {
        let metrics = other.metrics().ok()?;
        (metrics.sum("heddle_crl_revoked_certificates", &[]) == 1.0).then_some(())
    })?;
    fs::remove_file(lab.crl())?;
    is_loud(agent, "crl_unreadable")?;
    is_loud(other, "crl_unreadable")?;
    assert!(!reaches(&bad, &server)?, "what was revoked stays revoked");
    assert!(reaches(&good, &server)?, "others are let in");
    Ok(())
}

#[test]
fn a_peer_with_another_name_of_the_trust_domain_is_the_same_to_policy() -> Result {
    needs_root!();
    let lab = Lab::builder().agent_args(&["--trust-domain-alias", "old.test"]).start()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let stranger = lab.pod("shop", "stranger").outside_the_mesh().start()?;
    let spec = serde_json::json!({
        "action": "ALLOW",
        "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/shop/sa/friend"]}}]}],
    });
    lab.authorize("shop", "friends-only", &spec)?;
    let knock = |name: &str, id: &str| -> Result<Option<u16>> {
        let leaf = lab.root()?.sign(lab.dir(), name, &heddle_lab::certificates::Wanted::valid(&[id]))?;
        let call = stranger.speak_hbone(server.at(15008), &server.at(7000).to_string()).say("x");
        Ok(call.with("--cert", leaf.certificate.display()).with("--key", leaf.key.display()).run()?.status)
    };
    let other = "spiffe://old.test/ns/shop/sa/other";
    until(NOTICED, "the policy", || knock("other", other).ok().filter(|status| *status == Some(401)))?;
    assert_eq!(knock("friend", "spiffe://old.test/ns/shop/sa/friend")?, Some(200));
    assert_eq!(knock("foreign", "spiffe://foreign.test/ns/shop/sa/friend")?, None, "no handshake");
    Ok(())
}
