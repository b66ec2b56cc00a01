//! Is a Service's address carried to the right endpoint? All by the agent: the kernel lane is asked in `lane_services`.

use std::{collections::BTreeMap, time::Duration};

use heddle_lab::{Backend, Lab, Pod, Result, Service, needs_root, until};

struct Stage {
    lab: Lab,
    client: Pod,
    near: Pod,
    far: Pod,
    service: Service,
}

fn stage() -> Result<Stage> {
    let lab = Lab::two_nodes()?;
    let near = lab.pod("shop", "near").on(1).annotate("heddle.dev/same-node", "mtls");
    let near = near.serves(&["who:7000"]).start()?;
    let far = lab.pod("shop", "far").on(2).serves(&["who:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    let service = lab.service("shop", "web", (80, 7000), &[&near, &far])?;
    let stage = Stage { lab, client, near, far, service };
    until(Duration::from_secs(10), "the Service to be known", || {
        stage.asks(1).ok().filter(|seen| !seen.contains_key(""))
    })?;
    Ok(stage)
}

impl Stage {
    /// Who answered how often; those that nobody answered count under "".
    fn asks(&self, times: u32) -> Result<BTreeMap<String, u32>> {
        let mut answers = BTreeMap::new();
        for number in 0..times {
            let to = if number % 2 == 0 { self.service.at() } else { self.service.at6() };
            let seen = self.client.connect(to).run()?;
            let name = seen.who().map(|who| who.name).unwrap_or_default();
            *answers.entry(name).or_default() += 1;
        }
        Ok(answers)
    }

    /// After a change of endpoints, only these answer.
    fn becomes(&self, wanted: &[&str]) -> Result {
        let mut last = BTreeMap::new();
        until(Duration::from_secs(10), "the endpoints", || {
            last = self.asks(16).ok()?;
            (last.keys().map(String::as_str).collect::<Vec<_>>() == wanted).then_some(())
        })
        .map_err(|error| error.context(format!("{last:?} is not {wanted:?}")))
    }
}

#[test]
fn connections_are_balanced_over_ready_endpoints_on_both_nodes() -> Result {
    needs_root!();
    let stage = stage()?;
    let answers = stage.asks(60)?;
    assert_eq!(answers.keys().map(String::as_str).collect::<Vec<_>>(), ["far", "near"]);
    // Even shares of 60: fewer than 10 on one side has a chance below one in a million.
    assert!(answers.values().all(|count| *count >= 10), "{answers:?}");
    let unready = Backend { ready: false, ..Backend::from(&stage.near) };
    stage.service.set_backends(&[unready, Backend::from(&stage.far)])?;
    stage.becomes(&["far"])
}

#[test]
fn a_dead_endpoint_is_passed_over_before_a_byte_was_sent() -> Result {
    needs_root!();
    let stage = stage()?;
    stage.near.stop_servers()?;
    assert_eq!(stage.asks(30)?, BTreeMap::from([("far".to_owned(), 30)]), "an endpoint that refuses");
    let ghost = Backend {
        v4: [10, 244, 2, 200].into(),
        v6: "fd00:244:2::200".parse()?,
        node: "node2".to_owned(),
        pod: None,
        ready: true,
    };
    stage.service.set_backends(&[ghost, Backend::from(&stage.far)])?;
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(stage.asks(6)?, BTreeMap::from([("far".to_owned(), 6)]), "an address that nobody has");
    Ok(())
}

#[test]
fn a_service_without_endpoints_refuses() -> Result {
    needs_root!();
    let stage = stage()?;
    stage.service.set_backends(&[])?;
    let seen = until(Duration::from_secs(10), "the endpoints to go", || {
        stage.client.connect(stage.service.at()).with("--expect", 1).run().ok().filter(|seen| seen.error.is_some())
    })?;
    assert!(seen.was_refused() && seen.total_us < 1_000_000, "{seen:?}");
    Ok(())
}

#[test]
fn a_port_that_the_service_does_not_have_refuses() -> Result {
    needs_root!();
    let stage = stage()?;
    let seen = stage.client.connect((stage.service.v4, 81).into()).with("--expect", 1).run()?;
    assert!(seen.was_refused(), "{seen:?}");
    Ok(())
}

#[test]
fn an_endpoint_outside_the_mesh_is_reached_in_plain_text_and_counted_so() -> Result {
    needs_root!();
    let stage = stage()?;
    let outsider = stage.lab.pod("shop", "outsider").on(2).serves(&["who:7000"]).outside_the_mesh().start()?;
    stage.service.set_backends(&[Backend::from(&outsider)])?;
    stage.becomes(&["outsider"])?;
    let labels = [("reporter", "source"), ("connection_security_policy", "none"), ("destination_workload", "outsider")];
    assert!(stage.lab.agent(1)?.opened(&labels)? >= 16.0);
    let seen = stage.client.connect(stage.service.at()).run()?;
    assert_eq!(seen.who()?.peer.ip().to_canonical(), stage.client.v4(), "also there the client keeps its address");
    Ok(())
}
