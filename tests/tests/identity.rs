//! Is everyone refused who is not whom the other side means?

use std::time::Duration;

use anyhow::Context;
use heddle_lab::{
    Lab, Pod, Result,
    certificates::{Leaf, Root, Wanted},
    needs_root,
    reports::{Event, Tunnelled},
    until,
};
use serde_json::json;

/// A server in the mesh, and an adversary that is not.
struct Stage {
    lab: Lab,
    server: Pod,
    adversary: Pod,
}

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";

fn stage() -> Result<Stage> {
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000", "sink:7001"]).start()?;
    let adversary = lab.pod("shop", "adversary").outside_the_mesh().start()?;
    Ok(Stage { lab, server, adversary })
}

impl Stage {
    fn knock(&self, certificate: Option<&Leaf>) -> Result<Tunnelled> {
        let call =
            self.adversary.speak_hbone(self.server.at(15008), &self.server.at(7000).to_string()).say("let me in");
        match certificate {
            Some(leaf) => call.with("--cert", leaf.certificate.display()).with("--key", leaf.key.display()).run(),
            None => call.run(),
        }
    }

    /// Refused before the CONNECT, the reason in the agent's log or access log, and nothing arrived.
    fn refused(&self, certificate: Option<&Leaf>, reasons: &[&str]) -> Result {
        let met = self.knock(certificate)?;
        assert_eq!((met.status, met.received.as_str()), (None, ""), "{met:?}");
        let agent = self.lab.agent(2)?;
        until(Duration::from_secs(10), &format!("one of {reasons:?} in the log"), || {
            let logged = |reason: &&str| {
                agent.daemon.log().contains(*reason) || agent.access_log().iter().any(|line| line.mentions(reason))
            };
            reasons.iter().any(logged).then_some(())
        })?;
        assert_eq!(agent.opened(&[("reporter", "destination")])?, 0.0, "nothing was delivered");
        Ok(())
    }
}

#[test]
fn a_certificate_of_the_mesh_is_let_in() -> Result {
    needs_root!();
    let stage = stage()?;
    let leaf = stage.lab.root()?.sign(stage.lab.dir(), "good", &Wanted::valid(&[CLIENT]))?;
    let met = stage.knock(Some(&leaf))?;
    assert_eq!((met.error, met.status, met.received.as_str()), (None, Some(200), "let me in"));
    assert_eq!(met.server_names, [stage.server.identity()]);
    Ok(())
}

#[test]
fn a_client_without_a_certificate_is_refused() -> Result {
    needs_root!();
    stage()?.refused(None, &["no_certificate_presented"])
}

#[test]
fn a_client_of_another_root_is_refused() -> Result {
    needs_root!();
    let stage = stage()?;
    let foreign = Root::create(stage.lab.dir(), "foreign", "cluster.local")?;
    let leaf = foreign.sign(stage.lab.dir(), "forged", &Wanted::valid(&[CLIENT]))?;
    stage.refused(Some(&leaf), &["unknown_issuer"])
}

#[test]
fn a_client_of_another_trust_domain_is_refused() -> Result {
    needs_root!();
    let stage = stage()?;
    let leaf = stage.lab.root()?.sign(
        stage.lab.dir(),
        "other",
        &Wanted::valid(&["spiffe://elsewhere.test/ns/shop/sa/client"]),
    )?;
    stage.refused(Some(&leaf), &["trust_domain"])
}

#[test]
fn an_expired_client_is_refused() -> Result {
    needs_root!();
    let stage = stage()?;
    let leaf = stage.lab.root()?.sign(stage.lab.dir(), "expired", &Wanted::expired(&[CLIENT]))?;
    stage.refused(Some(&leaf), &["expired"])
}

#[test]
fn i3_a_certificate_whose_name_is_not_exact_is_refused() -> Result {
    needs_root!();
    let stage = stage()?;
    let root = stage.lab.root()?;
    let (cluster, client) = ("spiffe://cluster.local", "ns/shop/sa/client");
    let long = format!("{CLIENT}/{}", "x".repeat(2_048));
    let texts = [
        format!("{CLIENT}\0"),
        format!("{CLIENT}\0.evil"),
        format!("{cluster}\0.evil/{client}"),
        format!("SPIFFE://cluster.local/{client}"),
        format!("spiffe://user@cluster.local/{client}"),
        format!("{cluster}:443/{client}"),
        format!("{cluster}/ns/shop/sa/%63lient"),
        format!("{cluster}/ns/shop%2fsa/client"),
        format!("{CLIENT}\u{200b}"),
        format!("{cluster}/ns/sh\u{43e}p/sa/client"),
        "https://cluster.local/shop".to_owned(),
    ];
    let texts: Vec<[&[u8]; 1]> = texts.iter().map(|text| [text.as_bytes()]).collect();
    let mut wanted: Vec<Wanted<'_>> =
        texts.iter().map(|text| Wanted { raw_names: text, ..Wanted::valid(&[]) }).collect();
    let (one, two) = ([CLIENT, "spiffe://cluster.local/ns/shop/sa/admin"], [long.as_str()]);
    wanted.extend([
        Wanted::valid(&[]),
        Wanted::valid(&one),
        Wanted::valid(&two),
        Wanted { dns_names: &["client.shop"], ..Wanted::valid(&[]) },
    ]);
    for (number, wanted) in wanted.iter().enumerate() {
        let leaf = root.sign(stage.lab.dir(), &format!("odd{number}"), wanted)?;
        let before = refusals(&stage)?;
        stage.refused(Some(&leaf), &["bad_spiffe_id"])?;
        until(Duration::from_secs(10), "the refusal to be counted", || {
            refusals(&stage).ok().filter(|after| *after > before)
        })
        .with_context(|| format!("{wanted:?}"))?;
    }
    Ok(())
}

fn refusals(stage: &Stage) -> Result<f64> {
    let labels = [("direction", "inbound"), ("result", "bad_spiffe_id")];
    Ok(stage.lab.agent(2)?.metrics()?.sum("heddle_tls_handshakes_total", &labels))
}

#[test]
fn an_identity_that_policy_denies_gets_401_and_no_byte_through() -> Result {
    needs_root!();
    let stage = stage()?;
    let spec = json!({
        "action": "ALLOW",
        "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/shop/sa/friend"]}}]}],
    });
    stage.lab.authorize("shop", "friends-only", &spec)?;
    let root = stage.lab.root()?;
    let client = root.sign(stage.lab.dir(), "client", &Wanted::valid(&[CLIENT]))?;
    let friend = root.sign(stage.lab.dir(), "friend", &Wanted::valid(&["spiffe://cluster.local/ns/shop/sa/friend"]))?;
    let met = until(Duration::from_secs(10), "the policy", || {
        stage.knock(Some(&client)).ok().filter(|met| met.status == Some(401))
    })?;
    assert_eq!(met.received, "");
    assert_eq!(stage.knock(Some(&friend))?.received, "let me in");
    let line = stage.lab.agent(2)?.wait_access("the denial", |line| line.get("src.identity") == CLIENT)?;
    assert_eq!(line.get("response_flags"), "DENY");
    Ok(())
}

#[test]
fn a_server_with_the_identity_of_another_is_refused_by_the_client() -> Result {
    needs_root!();
    // Node 2 has no agent: what answers at the server's 15008 is the adversary.
    let lab = Lab::builder().agents_on(&[1]).start()?;
    let client = lab.pod("shop", "client").start()?;
    let root = lab.root()?;
    let foreign = Root::create(lab.dir(), "foreign", "cluster.local")?;
    let server = "spiffe://cluster.local/ns/shop/sa/server";
    let leaves = [
        (
            "wrong",
            root.sign(lab.dir(), "wrong", &Wanted::valid(&["spiffe://cluster.local/ns/shop/sa/other"]))?,
            "wrong_identity",
        ),
        ("expired", root.sign(lab.dir(), "old", &Wanted::expired(&[server]))?, "expired"),
        ("forged", foreign.sign(lab.dir(), "forged", &Wanted::valid(&[server]))?, "unknown_issuer"),
    ];
    for (name, leaf, reason) in leaves {
        let server = lab.pod("shop", name).on(2).service_account("server").start()?;
        serve_hbone(&server, &leaf)?;
        wait_for_the_tunnel(&lab, &client, &server)?;
        let seen = client.connect(server.at(7000)).say("secret").with("--expect", 1).run()?;
        assert!(seen.was_refused(), "{seen:?}");
        lab.agent(1)?.wait_access(reason, |line| line.mentions(reason))?;
        assert!(!server.events().iter().any(|event| matches!(event, Event::Tunnel { .. })), "{:?}", server.events());
    }
    // And the right one is let through: the refusals above are not for another reason.
    let honest = lab.pod("shop", "honest").on(2).service_account("server").start()?;
    serve_hbone(&honest, &root.sign(lab.dir(), "right", &Wanted::valid(&[server]))?)?;
    until(Duration::from_secs(10), "an echo through the tunnel", || {
        client.connect(honest.at(7000)).say("hello").with("--expect", 5).run().ok().filter(|seen| seen.error.is_none())
    })
    .map(drop)
}

fn serve_hbone(pod: &Pod, leaf: &Leaf) -> Result {
    let binary = std::env!("CARGO_BIN_EXE_lab-peer");
    let args = [
        "hbone-server".to_owned(),
        "--port=15008".to_owned(),
        format!("--cert={}", leaf.certificate.display()),
        format!("--key={}", leaf.key.display()),
    ];
    pod.runs("hbone", binary, &args)?;
    until(Duration::from_secs(10), "the HBONE server", || pod.events().contains(&Event::Ready).then_some(()))
}

/// The client's agent has read the server's manifest: a connection then ends at the adversary's 15008.
fn wait_for_the_tunnel(lab: &Lab, client: &Pod, server: &Pod) -> Result {
    until(Duration::from_secs(10), "the connection to be captured", || {
        client.connect(server.at(7000)).with("--expect", 1).with("--patience", 2_000).run().ok()?;
        let log = lab.agent(1).ok()?.access_log();
        log.iter().any(|line| line.mentions(&server.at(7000).to_string())).then_some(())
    })
}
