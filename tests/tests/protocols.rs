//! Do protocols that are not request and answer go through unchanged?

use std::time::Duration;

use heddle_lab::{Lab, Pod, Result, needs_root, reports::Event, until};

fn stage(servers: &[&str]) -> Result<(Lab, Pod, [Pod; 2])> {
    let lab = Lab::two_nodes()?;
    let far = lab.pod("shop", "far").on(2).serves(servers).start()?;
    let near = lab.pod("shop", "near").on(1).serves(servers).start()?;
    let client = lab.pod("shop", "client").on(1).start()?;
    Ok((lab, client, [far, near]))
}

#[test]
fn a_server_that_speaks_first_is_heard_without_delay() -> Result {
    needs_root!();
    let (_lab, client, servers) = stage(&["banner:7000"])?;
    for server in &servers {
        let mut fastest = u64::MAX;
        for _ in 0..5 {
            let seen = client.connect(server.at(7000)).with("--expect", 11).run()?;
            assert_eq!(seen.error, None);
            assert!(seen.received.starts_with("220 ") && seen.received.ends_with("\r\n"), "{seen:?}");
            fastest = fastest.min(seen.first_byte_us.unwrap_or(u64::MAX));
        }
        // A proxy that waits for the client to speak takes seconds, one with a detection window at least 100 ms.
        assert!(fastest < 50_000, "{fastest} µs");
    }
    Ok(())
}

#[test]
fn a_client_that_closes_its_direction_still_gets_the_answer() -> Result {
    needs_root!();
    let (_lab, client, servers) = stage(&["digest:7000"])?;
    for server in &servers {
        let seen = client.connect(server.at(7000)).say("heddle").flag("--half-close").run()?;
        assert_eq!(seen.error, None);
        // sha256 of "heddle"
        assert_eq!(seen.received, "751737768ed4354feb5c30cb5432d7efb608367d9291827772bfd03321e78e95");
    }
    Ok(())
}

#[test]
fn a_server_that_closes_its_direction_still_gets_the_rest() -> Result {
    needs_root!();
    let (_lab, client, servers) = stage(&["farewell:7000"])?;
    for server in &servers {
        let seen = client.connect(server.at(7000)).with("--say-after-end", "still here").run()?;
        assert_eq!((seen.error, seen.received.as_str()), (None, "bye\n"));
        until(Duration::from_secs(5), "the server to get the rest", || {
            server.events().contains(&Event::Farewell { received: 10, text: "still here".to_owned() }).then_some(())
        })?;
    }
    Ok(())
}

#[test]
fn sixty_four_mebibytes_go_both_ways_with_equal_checksums() -> Result {
    needs_root!();
    const SIZE: u64 = 64 << 20;
    let (_lab, client, servers) = stage(&["echo:7000"])?;
    for server in &servers {
        for to in [server.at(7000), server.at6(7000)] {
            let moved = client.transfer(to, SIZE).run()?;
            assert_eq!((moved.error, moved.received), (None, SIZE));
            assert_eq!(moved.sent_sha256, moved.received_sha256);
        }
    }
    Ok(())
}

#[test]
fn a_plaintext_client_moves_bulk_both_ways() -> Result {
    needs_root!();
    const SIZE: u64 = 64 << 20;
    let (lab, _client, [far, _near]) = stage(&["echo:7000"])?;
    let outsider = lab.pod("shop", "outsider").outside_the_mesh().start()?;
    let moved = outsider.transfer(far.at(7000), SIZE).run()?;
    assert_eq!((moved.error, moved.received, moved.sent_sha256), (None, SIZE, moved.received_sha256));
    Ok(())
}
