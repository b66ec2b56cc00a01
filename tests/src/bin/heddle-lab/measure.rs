//! Throughput, connect rate and request latency between the nodes, through the mesh beside no mesh. Simple figures on
//! whatever this machine is doing at the moment: where one starts from, not a benchmark.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use heddle_lab::{Lab, Pod};

/// What was measured of one way.
struct Figures {
    gigabits: f64,
    connects: f64,
    p50_us: u64,
    p99_us: u64,
}

pub fn run() -> Result<ExitCode> {
    let mut lab = Lab::two_nodes()?;
    lab.hush();
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000", "sink:7001"]).outside_the_mesh().start()?;
    let client = lab.pod("shop", "client").outside_the_mesh().start()?;
    let plain = figures(&client, &server)?;
    server.enrol()?;
    client.enrol()?;
    let meshed = figures(&client, &server)?;
    println!("across two nodes             no mesh       heddle");
    println!("one stream, Gbit/s        {:>10.2}   {:>10.2}", plain.gigabits, meshed.gigabits);
    println!("connections/s, 16 at once {:>10.0}   {:>10.0}", plain.connects, meshed.connects);
    println!("1 byte and back, p50 µs   {:>10}   {:>10}", plain.p50_us, meshed.p50_us);
    println!("1 byte and back, p99 µs   {:>10}   {:>10}", plain.p99_us, meshed.p99_us);
    lab.remove()?;
    Ok(ExitCode::SUCCESS)
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn figures(client: &Pod, server: &Pod) -> Result<Figures> {
    // A first connection sets tunnels up; what is measured comes after it.
    client.churn(server.at(7000), 50, 4).run()?;
    let bulk = client.throughput(server.at(7001), 5).run()?;
    ensure!(bulk.error.is_none(), "{bulk:?}");
    let churned = client.churn(server.at(7000), 5_000, 16).run()?;
    ensure!(churned.failed == 0, "{churned:?}");
    let asked = client.latency(server.at(7000), 5_000).run()?;
    ensure!(asked.error.is_none(), "{asked:?}");
    Ok(Figures {
        gigabits: bulk.count as f64 * 8.0 / bulk.seconds / 1e9,
        connects: churned.ok as f64 / churned.seconds,
        p50_us: asked.p50_us,
        p99_us: asked.p99_us,
    })
}
