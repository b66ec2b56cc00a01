//! Does anything stay behind when connections and pods come and go, well and badly?

use std::time::Duration;

use heddle_lab::{Lab, Pod, Result, needs_root, until, usage::Usage};

/// Connections that come and go, all kinds together.
const CONNECTIONS: u64 = 24_000;

/// How long an agent may take to find out that a client is gone: its keepalive's idle time and what a loaded machine adds.
const KEEPALIVE: Duration = Duration::from_secs(75);

/// Everything that could leak, on one node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    files: usize,
    sockets: usize,
    connections: usize,
    /// Entries of each pinned map.
    entries: Vec<(String, usize)>,
    /// TCP sockets of the pods that are not only waiting for late packets.
    tcp: usize,
}

fn entries(lab: &Lab, node: u8) -> Result<Vec<(String, usize)>> {
    let maps = lab.agent(node)?.pins().into_iter().filter(|pin| pin.parent().is_some_and(|dir| dir.ends_with("maps")));
    maps.filter(|pin| pin.is_file())
        .map(|pin| {
            let output =
                std::process::Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(&pin).output()?;
            let dump: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            // Only hashes have entries that come and go; of an array or a ring the number is constant.
            let count = dump.as_array().map_or(0, Vec::len);
            Ok((pin.file_name().unwrap_or_default().to_string_lossy().into_owned(), count))
        })
        .collect()
}

fn held(lab: &Lab, node: u8, pods: &[&Pod]) -> Result<(Held, Usage)> {
    let agent = lab.agent(node)?;
    let usage = agent.usage()?;
    let mut tcp = 0;
    for pod in pods {
        tcp += pod.output("ss", &["-Htan", "state", "connected", "exclude", "time-wait"])?.lines().count();
    }
    let held = Held {
        files: usage.files,
        sockets: usage.sockets,
        connections: agent.connections()?,
        entries: entries(lab, node)?,
        tcp,
    };
    Ok((held, usage))
}

#[test]
fn l1_nothing_stays_behind_after_connections_and_pods_came_and_went() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000", "sink:7001"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    let outsider = lab.pod("shop", "outsider").outside_the_mesh().start()?;
    let pods = [&server, &client];
    // `share` of all the connections there are to be, of every kind.
    let churn = |share: u64| -> Result {
        let count = CONNECTIONS / share;
        let mut running = vec![client.churn(server.at(7000), count / 2, 16).start()?];
        running.push(outsider.churn(server.at(7000), count / 4, 8).start()?);
        let aborted = [
            client.aborts(server.at(7000), count / 8, 8).start()?,
            outsider.aborts(server.at(7000), count / 8, 8).start()?,
        ];
        let silent = outsider.silent(server.at(15008), 100, 8).start()?;
        // Pods that are deleted with their connections open, on both ends of them.
        for number in 0..4 {
            let name = format!("guest{share}-{number}");
            let guest = lab.pod("shop", &name).on(1 + number % 2).serves(&["echo:7000"]).start()?;
            let (outgoing, first) = guest.hold(server.at(7000), 20).open()?;
            assert_eq!(first.alive, 20, "{first:?}");
            let (incoming, first) = client.hold(guest.at(7000), 20).open()?;
            assert_eq!(first.alive, 20, "{first:?}");
            guest.delete()?;
            drop(outgoing);
            drop(incoming);
        }
        for churned in running {
            let churned = churned.finish()?;
            assert_eq!(churned.failed, 0, "{churned:?}");
        }
        for aborted in aborted {
            let aborted = aborted.finish()?;
            assert!(aborted.count("aborted") > 0 && aborted.count("timeout") == 0, "{aborted:?}");
        }
        silent.finish().map(drop)
    };
    churn(4)?;
    // A client's reset is sent once. One that comes while the kernel puts the accepted socket in its request's place meets
    // the listener, which drops it (kernels before 6.19): keepalive finds such a connection out.
    let quiet = || -> Result<[(Held, Usage); 2]> {
        std::thread::sleep(Duration::from_secs(5));
        until(KEEPALIVE, "the last connection to end", || {
            let idle = |node| lab.agent(node).and_then(|agent| agent.connections()).is_ok_and(|count| count == 0);
            (idle(1) && idle(2)).then_some(())
        })?;
        Ok([held(&lab, 1, &pods)?, held(&lab, 2, &pods)?])
    };
    let before = quiet()?;
    churn(1)?;
    let mut after = quiet()?;
    // A tunnel may be one more or less; connections of the pool are given up after minutes, so a moment is allowed for
    // everything else alone.
    let _settled = until(Duration::from_secs(10), "everything to be given back", || {
        after = [held(&lab, 1, &pods).ok()?, held(&lab, 2, &pods).ok()?];
        (after[0].0 == before[0].0 && after[1].0 == before[1].0).then_some(())
    });
    for (node, ((before, memory), (after, now))) in before.iter().zip(&after).enumerate() {
        println!(
            "L1 node {}: {} descriptors ({} sockets) before and {} ({}) after, {} and {} connections, memory {:+} KiB, maps {:?}",
            node + 1,
            before.files,
            before.sockets,
            after.files,
            after.sockets,
            before.connections,
            after.connections,
            (i64::try_from(now.rss)? - i64::try_from(memory.rss)?) >> 10,
            after.entries
        );
    }
    for ((before, memory), (after, now)) in before.iter().zip(&after) {
        assert_eq!(after, before);
        assert_eq!(after.connections, 0);
        assert!(now.rss <= memory.rss + (4 << 20), "{} to {}", memory.rss, now.rss);
    }
    Ok(())
}
