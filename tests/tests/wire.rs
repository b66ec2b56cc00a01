//! What can someone read who listens on the link between the nodes?

use heddle_lab::{Lab, Result, needs_root};

const SECRET: &str = "the wheat is in the north barn";

#[test]
fn no_byte_of_an_application_is_on_the_link_and_tls_1_3_is() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000", "banner:7001"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    let recording = lab.record()?;
    for to in [server.at(7000), server.at6(7000)] {
        let seen = client.connect(to).say(SECRET).with("--expect", SECRET.len()).run()?;
        assert_eq!(seen.received, SECRET);
    }
    let banner = client.connect(server.at(7001)).with("--expect", 18).run()?.received;
    let traffic = recording.finish()?;
    assert_eq!(traffic.holding(SECRET.as_bytes()).count(), 0, "what client and server said");
    assert_eq!(traffic.holding(&banner.as_bytes()[..10]).count(), 0, "what the server said first");
    assert_eq!(
        traffic.to_port(7000).count() + traffic.to_port(7001).count(),
        0,
        "no connection to the app's own ports"
    );
    let tunnels: Vec<_> = traffic.to_port(15008).collect();
    assert!(!tunnels.is_empty());
    for stream in tunnels {
        let records = stream.tls_application_records();
        assert!(records.is_some_and(|count| count >= 3), "{} to {}: {records:?}", stream.from, stream.to);
    }
    let mut answers = traffic.streams.iter().filter(|stream| stream.from.port() == 15008);
    assert!(answers.all(heddle_lab::capture::Stream::is_tls13_server), "every tunnel is TLS 1.3");
    Ok(())
}

#[test]
fn a_tunnel_comes_from_the_pods_own_address() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    let recording = lab.record()?;
    client.connect(server.at(7000)).say("x").with("--expect", 1).run()?;
    let traffic = recording.finish()?;
    let mut count = 0;
    for stream in traffic.to_port(15008).filter(|stream| stream.to.ip() == server.v4()) {
        assert_eq!(stream.from.ip(), client.v4());
        count += 1;
    }
    assert!(count >= 1);
    Ok(())
}
