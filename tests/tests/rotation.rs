//! Does one root take another's place without a failed handshake?

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use heddle_lab::{Lab, Pod, Result, certificates::Wanted, needs_root, process::Output, until};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);

/// `heddle ca rotate` beside the CA, asking both agents.
fn rotate(lab: &Lab, step: &[&str]) -> Result<Output> {
    let directory = lab.ca()?.root_dir.display().to_string();
    let agents = [1, 2].map(|node| Ok(format!("http://{}:15020", lab.node(node)?.v4())));
    let agents = agents.into_iter().collect::<Result<Vec<_>>>()?.join(",");
    let replicas = format!("http://{}:15014", lab.ca()?.address.ip());
    let mut args = vec!["ca", "rotate"];
    args.extend(step);
    args.extend(["--root-dir", &directory]);
    if step.first() != Some(&"prepare") {
        args.extend(["--agents", &agents, "--replicas", &replicas]);
    }
    lab.agent(1)?.heddle(&args)
}

fn refused(lab: &Lab, step: &[&str], why: &str) -> Result {
    let output = rotate(lab, step)?;
    assert_eq!(output.status.code(), Some(1), "{step:?}: {output:?}");
    assert!(
        output.stderr.lines().all(|line| line.starts_with("refused: ")) && output.stderr.contains(why),
        "{output:?}"
    );
    Ok(())
}

/// Gives the step until it is not refused any more, each time with some patience of its own.
fn done(lab: &Lab, step: &str) -> Result<String> {
    let mut last = String::new();
    let ended = until(PATIENCE, step, || match rotate(lab, &[step, "--wait", "10s"]) {
        Ok(output) if output.status.success() => Some(output.stdout),
        other => {
            last = format!("{other:?}");
            None
        }
    });
    ended.map_err(|error| error.context(last))
}

/// Serial numbers by role.
fn roots(lab: &Lab) -> Result<(String, Vec<(String, String)>)> {
    let status: Value = serde_json::from_str(&rotate(lab, &["status", "--json"])?.ok()?)?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let roots = status["roots"].as_array().into_iter().flatten();
    Ok((text(&status["phase"]), roots.map(|root| (text(&root["role"]), text(&root["serial"]))).collect()))
}

/// Handshakes of all agents: those that went well, and the others.
fn handshakes(lab: &Lab) -> Result<(f64, f64)> {
    let (mut all, mut well) = (0.0, 0.0);
    for node in [1, 2] {
        let metrics = lab.agent(node)?.metrics()?;
        all += metrics.sum("heddle_tls_handshakes_total", &[]);
        well += metrics.sum("heddle_tls_handshakes_total", &[("result", "ok")]);
    }
    Ok((well, all - well))
}

/// New pods connect to every server, from both nodes to the other, until told to stop: each pair makes a handshake of its own.
fn newcomers(lab: &Lab, servers: &[Pod; 4], stop: &AtomicBool, met: &AtomicU64) -> Result {
    let mut round = 0;
    while !stop.load(Ordering::Acquire) {
        for node in [1, 2] {
            round += 1;
            let name = format!("newcomer-{round}");
            let pod = lab.pod("shop", &name).service_account("newcomer").on(node).start()?;
            for server in servers.iter().filter(|server| server.node() != node) {
                let seen = pod.connect(server.at(7000)).say("hello").with("--expect", 5).run()?;
                anyhow::ensure!(seen.error.is_none(), "{name} to {}: {seen:?}", server.name());
                met.fetch_add(1, Ordering::AcqRel);
            }
            pod.delete()?;
        }
    }
    Ok(())
}

#[test]
fn a_root_takes_anothers_place_under_traffic_and_no_handshake_fails() -> Result {
    needs_root!();
    let lab = Lab::builder().certificate_lifetime("24s").start()?;
    let server = |name: &str, node| lab.pod("shop", name).on(node).serves(&["echo:7000"]).start();
    let servers = [server("a", 2)?, server("b", 2)?, server("c", 1)?, server("d", 1)?];
    // A peer with a certificate of the old root, minted before anything began: it is let in until that root is trusted no more.
    let outsider = lab.pod("shop", "outsider").outside_the_mesh().start()?;
    let client = "spiffe://cluster.local/ns/shop/sa/outsider";
    let leaf = lab.root()?.sign(lab.dir(), "outsider", &Wanted::valid(&[client]))?;

    let (_, before) = roots(&lab)?;
    let [(_, old)] = before.as_slice() else { anyhow::bail!("{before:?}") };
    let (stop, met) = (AtomicBool::new(false), AtomicU64::new(0));
    let rotated = thread::scope(|scope| {
        let newcomers = scope.spawn(|| newcomers(&lab, &servers, &stop, &met));
        let steps = || -> Result<String> {
            refused(&lab, &["switch"], "prepare")?;
            let shaking = outsider.shakes(servers[0].at(15008), servers[0].at(7000), 10, 15).as_leaf(&leaf).start()?;
            rotate(&lab, &["prepare"])?.ok()?;
            let (phase, now) = roots(&lab)?;
            assert_eq!((phase.as_str(), now.len()), ("prepared", 2), "{now:?}");
            let new = now.iter().find(|(role, _)| role == "next").map(|(_, serial)| serial.clone()).unwrap_or_default();
            refused(&lab, &["finish"], "switch")?;
            done(&lab, "switch")?;
            refused(&lab, &["finish"], "renewed at half of their life")?;
            let shaken = shaking.finish()?;
            assert!(shaken.failed == 0 && shaken.ok > 0, "a peer with a certificate of the old root: {shaken:?}");
            done(&lab, "finish")?;
            // The agents have read the last bundle, and new pods still come.
            for node in [1, 2] {
                let agent = lab.agent(node)?;
                let alone = || {
                    let roots = agent.metrics().ok()?;
                    let trusted: Vec<_> = roots.with("heddle_trust_root_expiry_timestamp_seconds", &[]).collect();
                    matches!(trusted.as_slice(), [root] if root.labels.get("serial") == Some(&new)).then_some(())
                };
                until(PATIENCE, "the new root alone trusted", alone)?;
            }
            let at_the_end = met.load(Ordering::Acquire);
            until(PATIENCE, "newcomers after the end", || {
                (met.load(Ordering::Acquire) >= at_the_end + 8).then_some(())
            })?;
            Ok(new)
        };
        let rotated = steps();
        stop.store(true, Ordering::Release);
        newcomers.join().map_err(|_| anyhow::anyhow!("newcomers panicked"))??;
        rotated
    })?;

    let (phase, after) = roots(&lab)?;
    assert_eq!((phase.as_str(), after), ("steady", vec![("issuing".to_owned(), rotated.clone())]));
    assert_ne!(*old, rotated);
    let (well, failed) = handshakes(&lab)?;
    println!("{well} handshakes while a root took another's place, {failed} failed");
    assert!(well >= 2.0 * met.load(Ordering::Acquire) as f64, "{well} handshakes for {met:?} pairs");
    assert_eq!(failed, 0.0);
    // The old root is really out: its certificate is refused now, and nothing else was.
    let late =
        outsider.speak_hbone(servers[0].at(15008), &servers[0].at(7000).to_string()).say("x").as_leaf(&leaf).run()?;
    assert_eq!(late.status, None, "{late:?}");
    assert!(handshakes(&lab)?.1 > 0.0);
    Ok(())
}
