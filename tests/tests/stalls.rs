//! Does a connection whose receiver stops reading hold up another one of the same pods?

use std::time::Duration;

use heddle_lab::{Lab, Pod, Result, needs_root, reports::Churned, until};

/// What every other connection answers within (microseconds, p99); where this machine is so busy that it takes longer
/// without any stalled connection, so many times what it takes then. A stall takes seconds.
const LIMIT: u64 = 5_000;
const BUSY: u64 = 3;

struct Stage {
    lab: Lab,
    client: Pod,
    server: Pod,
}

fn stage() -> Result<Stage> {
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000", "deaf:7001", "source:7002"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    let churned = client.churn(server.at(7000), 200, 4).run()?;
    assert_eq!(churned.failed, 0, "{churned:?}");
    Ok(Stage { lab, client, server })
}

impl Stage {
    /// New connections one after the other, and requests on one that was there before: there may be three looks at
    /// them, because this machine has other things to do as well.
    fn others(&self, old: heddle_lab::call::Running<Churned>) -> Result<(Churned, Churned)> {
        let new = self.client.pace(self.server.at(7000), 50, 3).run()?;
        Ok((old.finish()?, new))
    }

    /// Until both agents rest: what is still being filled is not stalled.
    fn wait_full(&self) -> Result {
        let used = || Ok::<_, anyhow::Error>(self.lab.agent(1)?.usage()?.cpu + self.lab.agent(2)?.usage()?.cpu);
        until(Duration::from_secs(3), "the agents to rest", || {
            let before = used().ok()?;
            std::thread::sleep(Duration::from_millis(200));
            (used().ok()?.saturating_sub(before) < Duration::from_millis(100)).then_some(())
        })
    }

    fn go_on(&self, stalled: u64, what: &str, stuff: impl Fn() -> Result<heddle_lab::call::Holding>) -> Result {
        let (mut last, mut old_quick, mut new_quick) = (String::new(), false, false);
        for _ in 0..3 {
            let old = self.client.pace(self.server.at(7000), 50, 3).flag("--kept").start()?;
            let alone = self.others(old)?;
            let old = self.client.pace(self.server.at(7000), 50, 3).flag("--kept").with("--after", 4).start()?;
            let holding = stuff()?;
            self.wait_full()?;
            let (old, new) = self.others(old)?;
            holding.close()?;
            last = format!(
                "{stalled} {what}: old connection p50 {} p99 {} µs (alone {}), new ones p50 {} p99 {} µs (alone {})",
                old.p50_us, old.p99_us, alone.0.p99_us, new.p50_us, new.p99_us, alone.1.p99_us
            );
            println!("stalls: {last}");
            assert!(old.failed + new.failed == 0 && old.ok > 100 && new.ok > 50, "{old:?} {new:?}");
            let quick = |now: &Churned, alone: &Churned| now.p99_us <= LIMIT.max(BUSY * alone.p99_us);
            old_quick |= quick(&old, &alone.0);
            new_quick |= quick(&new, &alone.1);
            if old_quick && new_quick {
                return Ok(());
            }
        }
        anyhow::bail!("{last}")
    }
}

#[test]
fn connections_whose_server_stops_reading_hold_up_no_other() -> Result {
    needs_root!();
    let stage = stage()?;
    for count in [4, 16, 64] {
        stage.go_on(count, "not read by the server", || {
            let (holding, stuffed) = stage.client.stuff(stage.server.at(7001), count).open()?;
            // With less than a window's room for each of them a pod's budget resets some: the others are stalled.
            assert_eq!(stuffed.connections + stuffed.reset, count);
            assert!(stuffed.bytes > 0 && stuffed.connections >= count / 2, "{stuffed:?}");
            Ok(holding)
        })?;
    }
    Ok(())
}

#[test]
fn connections_whose_client_stops_reading_hold_up_no_other() -> Result {
    needs_root!();
    let stage = stage()?;
    for count in [4, 16, 64] {
        stage.go_on(count, "not read by the client", || {
            let call = stage.client.stuff(stage.server.at(7002), count).with("--ask", 1_000_000_000);
            Ok(call.open()?.0)
        })?;
    }
    Ok(())
}
