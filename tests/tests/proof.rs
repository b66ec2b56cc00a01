//! Does `heddle proof` say what is so, of every way in which a pair of pods can be connected?

use std::time::Duration;

use heddle_lab::{Lab, Pod, Result, agent::Agent, certificates::Wanted, needs_root, reports::Event, until};
use serde_json::{Value, json};

/// What `heddle proof A B` ends with and says.
fn proof(agent: &Agent, from: &Pod, to: &str) -> Result<(i32, Value)> {
    let (code, report) = agent.ask_json(&["proof", &from.full_name(), to])?;
    Ok((code.unwrap_or(-1), report))
}

fn names(programs: &Value) -> Vec<&str> {
    let programs = programs.as_array().map(Vec::as_slice).unwrap_or_default();
    let live = |program: &&Value| program["program"].as_u64() > Some(0) && program["link"].as_u64() > Some(0);
    programs.iter().filter(live).filter_map(|program| program["name"].as_str()).collect()
}

/// Serial number of the certificate that an agent holds for a pod.
fn serial(agent: &Agent, pod: &Pod) -> Result<Value> {
    let (_, certificates) = agent.ask_json(&["certs"])?;
    let mut lines = certificates.as_array().into_iter().flatten();
    Ok(lines.find(|line| line["identity"] == pod.identity()).map(|line| line["serial"].clone()).unwrap_or_default())
}

#[test]
fn a_pair_in_the_mesh_is_proven_from_both_sides_across_nodes_and_on_one_that_asks_for_tls() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let client = lab.pod("shop", "client").start()?;
    let far = lab.pod("shop", "far").on(2).serves(&["echo:7000"]).start()?;
    let near = lab.pod("shop", "near").annotate("heddle.dev/same-node", "mtls").serves(&["echo:7000"]).start()?;
    let agent = lab.agent(1)?;
    for (server, node) in [(&far, 2), (&near, 1)] {
        let to = format!("{}:7000", server.full_name());
        let (code, report) = agent.ask_json(&["proof", &client.full_name(), &to, "--say", "hello"])?;
        assert_eq!((code, &report["verdict"]), (Some(0), &json!("proven")), "{report:#}");
        for field in ["authenticated", "encrypted", "allowed", "delivered"] {
            assert_eq!(report[field], true, "{field}: {report:#}");
        }
        let (mine, theirs) = (&report["near"], &report["far"]);
        assert_eq!((&report["security"], &mine["security"]), (&json!("mutual_tls"), &json!("mutual_tls")));
        assert_eq!((&mine["tls"], &report["lane"]), (&json!("TLSv1_3"), &Value::Null));
        assert_eq!(mine["cipher"], "TLS13_AES_256_GCM_SHA384");
        assert_eq!(
            (&mine["client_identity"], &mine["server_identity"]),
            (&json!(client.identity()), &json!(server.identity()))
        );
        assert_eq!(mine["client_serial"], serial(agent, &client)?);
        assert_eq!(mine["server_serial"], serial(lab.agent(node)?, server)?);
        for field in ["tls", "cipher", "client_identity", "server_identity", "client_serial", "server_serial"] {
            assert_eq!(mine[field], theirs[field], "{field}");
        }
        assert_eq!((&theirs["node"], &theirs["pod"]), (&json!(format!("node{node}")), &json!(server.full_name())));
        assert_eq!((&theirs["decision"], &theirs["delivered"]), (&json!("allowed"), &json!(true)));
        for programs in [&report["from"]["programs"], &theirs["programs"]] {
            let names = names(programs);
            assert!(["lookup", "connect4", "connect6"].iter().all(|name| names.contains(name)), "{report:#}");
        }
        assert_eq!((&report["bytes"]["to_app"], &report["bytes"]["to_client"]), (&json!(5), &json!(5)));
        assert!(report["bytes"]["tunnel_sent"].as_u64() > Some(5), "{report:#}");
    }
    let text = agent.ask(&["proof", &client.full_name(), &format!("{}:7000", far.full_name())])?.ok()?;
    assert!(text.starts_with("verdict       proven: authenticated, encrypted and allowed\n"), "{text}");
    Ok(())
}

#[test]
fn a_pair_of_one_node_is_proven_by_the_kernel_on_the_lane_and_in_one_crossing_and_never_called_encrypted() -> Result {
    needs_root!();
    let lab = Lab::one_node()?;
    let client = lab.pod("shop", "client").start()?;
    let server = lab.pod("shop", "server").serves(&["echo:7000"]).start()?;
    let agent = lab.agent(1)?;
    let to = format!("{}:7000", server.full_name());
    // The first may come to the agent for want of a verdict; the kernel knows what to do with one of the next.
    let mut crossings = 0;
    until(Duration::from_secs(20), "a connection on the lane", || {
        let (code, report) = agent.ask_json(&["proof", &client.full_name(), &to, "--say", "hello"]).ok()?;
        assert_eq!((code, &report["verdict"]), (Some(0), &json!("proven")), "{report:#}");
        assert_eq!((&report["security"], &report["encrypted"]), (&json!("kernel_attested"), &json!(false)));
        for field in ["authenticated", "allowed", "delivered"] {
            assert_eq!(report[field], true, "{field}: {report:#}");
        }
        let on_lane = report["lane"].is_object();
        crossings += u32::from(!on_lane);
        let (side, theirs) = if on_lane { ("lane", &report["lane"]) } else { ("near", &report["far"]) };
        assert_eq!(report["near"].is_object(), !on_lane, "{report:#}");
        assert_eq!(
            (&report[side]["client_identity"], &report[side]["server_identity"], &report[side]["pod"]),
            (&json!(client.identity()), &json!(server.identity()), &json!(server.full_name()))
        );
        for (programs, wanted) in [(&report["from"]["programs"], "connect4"), (&theirs["programs"], "lookup")] {
            assert!(names(programs).contains(&wanted), "{report:#}");
        }
        assert_eq!((&report["bytes"]["to_app"], &report["bytes"]["to_client"]), (&json!(5), &json!(5)));
        on_lane.then_some(())
    })?;
    assert!(crossings > 0, "nothing had decided about the pair before");
    let text = agent.ask(&["proof", &client.full_name(), &to])?.ok()?;
    assert!(text.contains("\nkernel lane   carried by the kernel alone, from "), "{text}");
    lab.authorize("shop", "nobody", &json!({"action": "DENY", "rules": [{}]}))?;
    // By the kernel, or by the agent where the kernel has not learned it yet.
    let (code, report) = until(Duration::from_secs(20), "a denial", || {
        proof(agent, &client, &to).ok().filter(|(_, report)| report["verdict"] == "denied")
    })?;
    assert_eq!((code, &report["allowed"], &report["policy"]), (1, &json!(false), &json!("shop/nobody")), "{report:#}");
    assert_eq!((&report["security"], &report["encrypted"]), (&json!("kernel_attested"), &json!(false)), "{report:#}");
    Ok(())
}

#[test]
fn what_is_carried_is_listed_by_pod_with_its_session_and_policy() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    lab.authorize("shop", "all", &json!({"rules": [{}]}))?;
    let (held, first) = client.hold(server.at(7000), 2).open()?;
    assert_eq!(first.alive, 2);
    let mut ends = Vec::new();
    for (node, pod, direction) in [(1, &client, "outbound"), (2, &server, "inbound")] {
        let agent = lab.agent(node)?;
        let line = until(Duration::from_secs(10), "two connections and their policy", || {
            let (_, lines) = agent.ask_json(&["connections", "--pod", &pod.full_name()]).ok()?;
            let lines = lines.as_array()?.clone();
            let known = direction == "outbound" || lines.iter().all(|line| line["policy"] == "shop/all");
            (lines.len() == 2 && known).then(|| lines[0].clone())
        })?;
        assert_eq!((&line["pod"], &line["direction"]), (&json!(pod.full_name()), &json!(direction)));
        assert_eq!((&line["cipher"], &line["tls"]), (&json!("TLS13_AES_256_GCM_SHA384"), &json!("TLSv1_3")));
        assert_eq!(line["own_serial"], serial(agent, pod)?);
        ends.push((line["own_serial"].clone(), line["peer_serial"].clone()));
        let (_, none) = agent.ask_json(&["connections", "--pod", "shop/nobody"])?;
        assert_eq!(none, json!([]));
    }
    assert_eq!(ends[0], (ends[1].1.clone(), ends[1].0.clone()), "each side's own is the other's peer");
    held.close()
}

#[test]
fn what_is_not_proven_says_why_and_ends_otherwise() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let client = lab.pod("shop", "client").start()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let outside = lab.pod("street", "outside").on(2).serves(&["echo:7000"]).outside_the_mesh().start()?;
    let lost = lab.pod("shop", "lost").annotate("lab.heddle.dev/cgroup", "/nowhere/at/all").unproven().start()?;
    let agent = lab.agent(1)?;

    let (code, report) = proof(agent, &client, &format!("{}:7999", server.full_name()))?;
    assert_eq!((code, &report["verdict"]), (1, &json!("app_refused")), "{report:#}");
    assert_eq!(
        (&report["encrypted"], &report["allowed"], &report["delivered"]),
        (&json!(true), &json!(true), &json!(false))
    );

    // The agent waits for no pod that is not its own.
    let (code, report) = until(Duration::from_secs(10), "the pod outside", || {
        proof(agent, &client, &format!("{}:7000", outside.full_name())).ok()
    })?;
    assert_eq!((code, &report["verdict"], &report["near"]), (1, &json!("plain"), &Value::Null), "{report:#}");
    assert_eq!((&report["encrypted"], &report["authenticated"]), (&json!(false), &json!(false)));

    // Through a Service it comes to the agent, and goes on plainly.
    lab.service("street", "web", (80, 7000), &[&outside])?;
    lab.service("shop", "web", (80, 7000), &[&server])?;
    let plain = until(Duration::from_secs(10), "the Service", || {
        proof(agent, &client, "service/web.street:80").ok().filter(|(_, report)| report["near"] != Value::Null)
    })?;
    assert_eq!((plain.0, &plain.1["verdict"], &plain.1["near"]["tunnel"]), (1, &json!("plain"), &json!(false)));
    let (code, report) = proof(agent, &client, "service/web.shop:80")?;
    assert_eq!((code, &report["near"]["pod"]), (0, &json!(server.full_name())), "{report:#}");
    // The port that a Service names.
    let (code, report) = proof(agent, &client, &server.full_name())?;
    assert_eq!((code, &report["address"]), (0, &json!(server.at(7000).to_string())), "{report:#}");

    lost.wait_state("uncaptured")?;
    let (code, report) = proof(agent, &lost, &format!("{}:7000", server.full_name()))?;
    assert_eq!((code, &report["verdict"]), (1, &json!("uncaptured")), "{report:#}");

    lab.authorize(
        "shop",
        "closed",
        &json!({"action": "DENY", "rules": [{"from": [{"source": {"principals": [client.principal()]}}]}]}),
    )?;
    let to = format!("{}:7000", server.full_name());
    let (code, report) = until(Duration::from_secs(10), "the denial", || {
        proof(agent, &client, &to).ok().filter(|(code, _)| *code == 1)
    })?;
    assert_eq!(
        (code, &report["verdict"], &report["policy"]),
        (1, &json!("denied"), &json!("shop/closed")),
        "{report:#}"
    );
    for (field, wanted) in [("authenticated", true), ("encrypted", true), ("allowed", false), ("delivered", false)] {
        assert_eq!(report[field], wanted, "{field}: {report:#}");
    }
    assert_eq!(report["far"]["reason"], "policy_denied");

    // What can't be found out.
    for args in [
        ["proof", "shop/nobody", "shop/server:7000"],
        ["proof", "shop/client", "shop/nobody:1"],
        ["proof", "shop/server", "shop/client:1"],
    ] {
        let output = agent.ask(&args)?;
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        assert!(output.stderr.starts_with("heddle: "), "{output:?}");
    }
    lab.agent(1)?.daemon.terminate(Duration::from_secs(20))?;
    assert_eq!(agent.ask(&["proof", "shop/client", "shop/server:7000"])?.status.code(), Some(2));
    Ok(())
}

#[test]
fn a_peer_that_is_not_heddle_is_proven_from_the_near_side_alone() -> Result {
    needs_root!();
    // Node 2 has no agent: what answers at the pods' 15008 is another program.
    let lab = Lab::builder().agents_on(&[1]).start()?;
    let client = lab.pod("shop", "client").start()?;
    let agent = lab.agent(1)?;
    let id = "spiffe://cluster.local/ns/shop/sa/server";
    let answer = |name: &str, presents: &str| -> Result<(i32, Value)> {
        let leaf = lab.root()?.sign(lab.dir(), name, &Wanted::valid(&[presents]))?;
        let server = lab.pod("shop", name).on(2).service_account("server").start()?;
        let (cert, key) = (leaf.certificate.display(), leaf.key.display());
        let args =
            ["hbone-server".to_owned(), "--port=15008".to_owned(), format!("--cert={cert}"), format!("--key={key}")];
        server.runs("hbone", std::env!("CARGO_BIN_EXE_lab-peer"), &args)?;
        until(Duration::from_secs(10), "the server", || server.events().contains(&Event::Ready).then_some(()))?;
        let to = format!("{}:7000", server.full_name());
        // Until the agent knows the pod as one of the mesh.
        let found = until(Duration::from_secs(10), "a captured connection", || {
            proof(agent, &client, &to).ok().filter(|(code, report)| *code != 2 && report["near"] != Value::Null)
        })?;
        if found.0 == 0 {
            let text = agent.ask(&["proof", &client.full_name(), &to])?.ok()?;
            assert!(text.contains("far side      does not say\n"), "{text}");
        }
        Ok(found)
    };
    let (code, report) = answer("honest", id)?;
    assert_eq!((code, &report["verdict"], &report["far"]), (0, &json!("proven"), &Value::Null), "{report:#}");
    assert_eq!(report["near"]["server_identity"], id);
    let (code, report) = answer("other", "spiffe://cluster.local/ns/shop/sa/other")?;
    assert_eq!(
        (code, &report["verdict"], &report["encrypted"]),
        (1, &json!("not_authenticated"), &json!(false)),
        "{report:#}"
    );
    Ok(())
}
