//! Do pods of a real container runtime start captured?

use std::time::Duration;

use heddle_lab::{Lab, Result, containerd::Containerd, manifests, needs_program, needs_root, until};

const SECRET: &str = "the barley is in the south barn";

#[test]
fn pods_start_captured_and_stay_so_over_restarts_of_agent_and_runtime() -> Result {
    needs_root!();
    needs_program!("containerd");
    let lab = Lab::builder().containers().start()?;
    let (mut here, there) = (Containerd::start(&lab, 1)?, Containerd::start(&lab, 2)?);
    let recording = lab.record()?;
    let server = there.pod(&lab, "shop", "server", &["serve", "echo:7000"]).start()?;
    let to = server.at(7000);
    {
        let client = here.pod(&lab, "shop", "client", &["pause"]).start()?;
        assert_eq!(client.refusals, [] as [String; 0]);
        // Its sandbox was there only once it was captured, so nothing is waited for here.
        assert_eq!(lab.agent(1)?.pod_state("shop/client")?.map(|(state, _)| state).as_deref(), Some("captured"));
        let talk = || -> Result {
            until(Duration::from_secs(10), "an answer over the mesh", || {
                client.connect(to, SECRET).ok().filter(|seen| seen.received == SECRET)
            })
            .map(drop)
        };
        talk()?;
        let line = lab.agent(2)?.wait_access("the connection", |line| line.get("src.identity") == client.identity())?;
        assert_eq!(line.get("security"), "mutual_tls");
        for _ in 0..2 {
            lab.agent(1)?.restart()?;
            client.wait_captured()?;
            talk()?;
        }
    }
    // The pods are forgotten by this process, and run on.
    here.restart()?;
    let client = here.pod(&lab, "shop", "after", &["pause"]).start()?;
    let address = client.address();
    assert_eq!(client.connect(to, SECRET)?.received, SECRET);
    client.delete()?;
    until(Duration::from_secs(20), "the deleted pod to be withdrawn", || {
        lab.agent(1).ok()?.pod_state("shop/after").ok()?.is_none().then_some(())
    })?;
    // Its address, in another pod's hands.
    here.give_addresses_again()?;
    let heir = here.pod(&lab, "shop", "heir", &["pause"]).start()?;
    assert_eq!(heir.address(), address);
    assert_eq!(heir.connect(to, SECRET)?.received, SECRET);
    let identity = heir.identity();
    lab.agent(2)?.wait_access("the heir's connection", |line| line.get("src.identity") == identity)?;
    let traffic = recording.finish()?;
    assert_eq!(traffic.holding(SECRET.as_bytes()).count(), 0);
    assert_eq!(traffic.to_port(7000).count(), 0, "no connection to the app's own port");
    assert!(traffic.to_port(15008).count() > 0);
    Ok(())
}

#[test]
fn pods_that_run_before_their_namespace_is_enrolled_are_found_by_their_cgroups() -> Result {
    needs_root!();
    needs_program!("containerd");
    let lab = Lab::builder().containers().start()?;
    lab.need_namespace("shop")?;
    lab.manifests().apply(&manifests::namespace("shop", false))?;
    // Once it has no entry, the runtime asks nobody: pods are found among the processes alone.
    let (here, there) = (Containerd::start(&lab, 1)?, Containerd::start(&lab, 2)?);
    let server = there.pod(&lab, "shop", "server", &["serve", "echo:7000"]).start()?;
    let client = here.pod(&lab, "shop", "client", &["pause"]).start()?;
    let recording = lab.record()?;
    assert_eq!(client.connect(server.at(7000), SECRET)?.received, SECRET);
    let plain = recording.finish()?;
    assert!(plain.holding(SECRET.as_bytes()).count() > 0, "outside the mesh it is plain, and the recording sees that");
    assert_eq!(lab.agent(1)?.pod_state("shop/client")?, None);
    lab.manifests().apply(&manifests::namespace("shop", true))?;
    client.wait_captured()?;
    server.wait_captured()?;
    let recording = lab.record()?;
    assert_eq!(client.connect(server.at(7000), SECRET)?.received, SECRET);
    let traffic = recording.finish()?;
    assert_eq!(traffic.holding(SECRET.as_bytes()).count(), 0);
    assert_eq!(traffic.to_port(7000).count(), 0);
    Ok(())
}
