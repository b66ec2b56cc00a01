use std::{
    collections::HashSet,
    future::pending,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::life::drain::{Carried, Drained, drain};

/// Connections that end when their time has come, or when they are cut.
struct Timed {
    start: Instant,
    ends: Mutex<Vec<(u64, Duration)>>,
    cuts: AtomicUsize,
}

impl Timed {
    fn new(ends: &[Duration]) -> Self {
        let ends = ends.iter().enumerate().map(|(id, end)| (id as u64, *end)).collect();
        Self { start: Instant::now(), ends: Mutex::new(ends), cuts: AtomicUsize::new(0) }
    }
}

impl Carried for Timed {
    fn live(&self) -> HashSet<u64> {
        let (ends, now) = (self.ends.lock().unwrap(), self.start.elapsed());
        ends.iter().filter(|(_, end)| *end > now).map(|(id, _)| *id).collect()
    }

    fn cut(&self) {
        self.cuts.fetch_add(1, Ordering::Relaxed);
        self.ends.lock().unwrap().clear();
    }
}

const SOON: Duration = Duration::from_millis(200);
const NEVER: Duration = Duration::from_secs(3_600);

#[tokio::test]
async fn nothing_carried_ends_at_once() {
    let (carried, start) = (Timed::new(&[]), Instant::now());
    assert_eq!(drain(&carried, NEVER, pending()).await, Drained { completed: 0, cut: 0 });
    assert!(start.elapsed() < SOON);
}

#[tokio::test]
async fn connections_that_end_in_time_are_not_cut() {
    let carried = Timed::new(&[SOON, SOON * 2]);
    assert_eq!(drain(&carried, NEVER, pending()).await, Drained { completed: 2, cut: 0 });
    assert_eq!(carried.cuts.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn what_outlives_the_grace_is_cut_and_counted() {
    let carried = Timed::new(&[SOON, NEVER, NEVER]);
    assert_eq!(drain(&carried, SOON * 5, pending()).await, Drained { completed: 1, cut: 2 });
    assert_eq!(carried.cuts.load(Ordering::Relaxed), 1);
    assert!(carried.start.elapsed() >= SOON * 5);
}

#[tokio::test]
async fn a_second_signal_ends_the_grace() {
    let carried = Timed::new(&[NEVER]);
    assert_eq!(drain(&carried, NEVER, tokio::time::sleep(SOON)).await, Drained { completed: 0, cut: 1 });
}
