//! Reads what the kernel says of its lane's connections, and gives it to telemetry: the ring of those that have ended, and now
//! and then the table of those that go on.
//!
//! Beside the journey. Nothing waits for it: where it is late the kernel counts what it had no room for. Its work is done off
//! the runtime's workers, which carry bytes.

use std::{sync::Arc, time::Instant};

use heddle_common::{EVENTS_BYTES, Ended};
use tokio::{
    task::spawn_blocking,
    time::{MissedTickBehavior, interval, sleep},
};
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
pub(super) async fn follow(
    telemetry: Arc<Telemetry>,
    context: Context,
    begin: impl Future<Output = ()>,
    stop: CancellationToken,
) {
    let reading = async {
        // What the lane's decisions tell does not wait for the pods.
        telemetry.lane().learn(around(&context), &[]);
        begin.await;
        let lane = context.capture.lane();
        let mut ring = open(&lane).await;
        let mut due = interval(limits::LANE_RECORDS_LOOK);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut settled: Option<Instant> = None;
        loop {
            tokio::select! {
                _ = due.tick() => {}
                ready = ring.readable() => if ready.is_err() { return },
            }
            let settle = settled.is_none_or(|settled| settled.elapsed() >= limits::LANE_LOOK);
            let first = ring.next();
            if first.is_none() && !settle {
                continue;
            }
            let (telemetry, lane, around) = (Arc::clone(&telemetry), lane.clone(), around(&context));
            let read = move || {
                read(&telemetry, &lane, around, first.into_iter().chain(&mut ring).take(ALL), settle);
                ring
            };
            // The runtime ends, or telemetry is broken: then a restart is all that helps.
            let Ok(back) = spawn_blocking(read).await else { return };
            ring = back;
            if settle {
                settled = Some(Instant::now());
            }
        }
    };
    let _stopped = stop.run_until_cancelled(reading).await;
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

fn read(telemetry: &Telemetry, lane: &Lane, around: Around, records: impl Iterator<Item = Ended>, settle: bool) {
    let told = telemetry.lane();
    let residents: Vec<_> = lane.residents().into_iter().map(|pod| (pod.id.0, pod.uid)).collect();
    told.learn(around, &residents);
    let mut records = records.peekable();
    while records.peek().is_some() {
        told.ended(&records.by_ref().take(limits::LANE_RECORDS).collect::<Vec<_>>());
    }
    if settle {
        told.settle(|| table(lane));
    }
}

/// The connections that go on; `None` where that can't be read.
pub(super) fn table(lane: &Lane) -> Option<LaneTable> {
    lane.connections()
        .inspect_err(|error| tracing::warn!(%error, reason = error.reason(), "Kernel-lane connections can't be read"))
        .ok()
}
