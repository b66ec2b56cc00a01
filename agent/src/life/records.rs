//! Reads what the kernel says of its lane's connections, and gives it to telemetry: the ring of those that have ended, and now
//! and then the table of those that go on.
//!
//! Beside the journey. Nothing waits for it: where it is late the kernel counts what it had no room for. It has a thread of its
//! own, away from the runtime's workers, which carry bytes: one thread also finds the memory of its last lines again.

use std::{io, sync::Arc, thread, time::Instant};

use heddle_common::{EVENTS_BYTES, Ended};
use tokio::{runtime, time::sleep};
use tokio_util::sync::CancellationToken;

use super::limits;
use crate::{
    capture::{EndedRing, Lane},
    telemetry::{Around, LaneTable, Telemetry},
    tunnel::Context,
};

/// As many as the ring holds.
const ALL: usize = EVENTS_BYTES as usize / size_of::<Ended>();

/// Reads until `stop`. `begin` is done when the node's pods are known, without whose names there is little to tell.
///
/// # Errors
/// When there is no thread for it.
pub(super) fn start(
    telemetry: Arc<Telemetry>,
    context: Context,
    begin: impl Future<Output = ()> + Send + 'static,
    stop: CancellationToken,
) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let reading = async move {
        let _stopped = stop.run_until_cancelled(follow(&telemetry, &context, begin)).await;
    };
    thread::Builder::new().name("lane-records".into()).spawn(move || runtime.block_on(reading))?;
    Ok(())
}

async fn follow(telemetry: &Telemetry, context: &Context, begin: impl Future<Output = ()>) {
    // What the lane's decisions tell does not wait for the pods.
    telemetry.lane().learn(around(context), &[]);
    begin.await;
    let lane = context.capture.lane();
    let mut ring = open(&lane).await;
    let mut wait = limits::LANE_RECORDS_LOOK;
    let mut settled: Option<Instant> = None;
    loop {
        tokio::select! {
            () = sleep(wait) => {}
            ready = ring.readable() => if ready.is_err() { return },
        }
        let settle = settled.is_none_or(|settled| settled.elapsed() >= limits::LANE_LOOK);
        let told = read(telemetry, &lane, context, &mut ring, settle);
        wait = if told > limits::LANE_RECORDS { limits::LANE_RECORDS_BUSY } else { limits::LANE_RECORDS_LOOK };
        if settle {
            settled = Some(Instant::now());
        }
    }
}

async fn open(lane: &Lane) -> EndedRing {
    loop {
        match lane.ended() {
            Ok(ring) => return ring,
            Err(error) => {
                tracing::error!(%error, reason = error.reason(), "Kernel-lane connections can't be told of");
                sleep(limits::ENROL_BACKOFF_MAX).await;
            }
        }
    }
}

fn around(context: &Context) -> Around {
    Around {
        snapshot: context.cluster.load(),
        rules: context.rules.load_full(),
        trust_domain: context.certificates.trust_domain().clone(),
    }
}

/// Tells of what the ring holds; how many there were.
fn read(telemetry: &Telemetry, lane: &Lane, context: &Context, ring: &mut EndedRing, settle: bool) -> usize {
    let mut records: Vec<Ended> = ring.by_ref().take(limits::LANE_RECORDS).collect();
    if records.is_empty() && !settle {
        return 0;
    }
    let told = telemetry.lane();
    let residents: Vec<_> = lane.residents().into_iter().map(|pod| (pod.id.0, pod.uid)).collect();
    told.learn(around(context), &residents);
    let mut count = 0;
    while !records.is_empty() && count < ALL {
        told.ended(&records);
        count += records.len();
        records.clear();
        records.extend(ring.by_ref().take(limits::LANE_RECORDS));
    }
    if settle {
        told.settle(|| table(lane));
    }
    count
}

/// The connections that go on; `None` where that can't be read.
pub(super) fn table(lane: &Lane) -> Option<LaneTable> {
    lane.connections()
        .inspect_err(|error| tracing::warn!(%error, reason = error.reason(), "Kernel-lane connections can't be read"))
        .ok()
}
