//! Which lines of the access log are too many: connections that carried nothing cost their makers nothing, so a pod's are
//! told of a few times a second and counted beyond that. A decision in memory; it never waits and never writes.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    life::limits,
    tunnel::{Direction, End, Flow},
};

/// The time in which lines are counted.
const WINDOW: Duration = Duration::from_secs(1);

/// Pod of this node and what happened to its connection; `None` is every pod beyond the cap.
type Key = Option<(Arc<str>, &'static str)>;

#[derive(Debug)]
struct Window {
    began: Instant,
    lines: u32,
    /// Not written since a line last was.
    suppressed: u64,
}

/// Lines of the last moments, by pod and reason.
#[derive(Debug, Default)]
pub(super) struct Suppress {
    windows: Mutex<HashMap<Key, Window>>,
}

impl Suppress {
    /// Whether this line, which tells of `count` connections, may be written: then how many of its kind have none of their own
    /// since the last one.
    pub fn admit(&self, flow: &Flow, end: &End, count: u64, now: Instant) -> Option<u64> {
        let others = count.saturating_sub(1);
        let reason = match end {
            End::Complete => return Some(others),
            End::Denied(_) => "denied",
            End::Failed { reason, .. } => reason,
        };
        let local = match flow.direction {
            Direction::Inbound => flow.destination_workload.as_ref(),
            Direction::Outbound => flow.source_workload.as_ref(),
        };
        let mut key = local.map(|workload| (Arc::clone(&workload.uid), reason));
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if windows.len() >= limits::LOG_WINDOWS && !windows.contains_key(&key) {
            windows.retain(|_, window| window.suppressed > 0 || now.duration_since(window.began) < WINDOW);
            if windows.len() >= limits::LOG_WINDOWS {
                key = None;
            }
        }
        let window = windows.entry(key).or_insert(Window { began: now, lines: 0, suppressed: 0 });
        if now.duration_since(window.began) >= WINDOW {
            (window.began, window.lines) = (now, 0);
        }
        if window.lines >= limits::LOG_REFUSALS {
            window.suppressed += count;
            return None;
        }
        window.lines += 1;
        Some(std::mem::take(&mut window.suppressed) + others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{policy::Denial, telemetry::tests::flow};

    fn failed(reason: &'static str) -> End {
        End::Failed { reason, response_flags: "-", detail: String::new() }
    }

    #[test]
    fn a_pods_refusals_are_told_of_a_few_times_a_second_and_the_next_line_counts_the_others() {
        let (suppress, start) = (Suppress::default(), Instant::now());
        let flow = flow(Direction::Inbound);
        let (denied, cap) = (End::Denied(Denial::NotAllowed), u64::from(limits::LOG_REFUSALS));
        for _ in 0..cap {
            assert_eq!(suppress.admit(&flow, &denied, 1, start), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(suppress.admit(&flow, &denied, 1, start + WINDOW / 2), None);
        }
        assert_eq!(suppress.admit(&flow, &failed("timeout"), 1, start), Some(0), "another reason has lines of its own");
        assert_eq!(suppress.admit(&flow, &denied, 1, start + WINDOW), Some(5));
        assert_eq!(suppress.admit(&flow, &denied, 1, start + WINDOW), Some(0));
        assert_eq!(suppress.admit(&flow, &denied, 8, start + WINDOW), Some(7), "one line for eight");
    }

    #[test]
    fn connections_that_completed_are_never_too_many() {
        let (suppress, now) = (Suppress::default(), Instant::now());
        let flow = flow(Direction::Outbound);
        for _ in 0..10 * limits::LOG_REFUSALS {
            assert_eq!(suppress.admit(&flow, &End::Complete, 1, now), Some(0));
        }
    }

    #[test]
    fn the_table_is_capped_and_what_does_not_fit_shares_one_window() {
        let (suppress, now) = (Suppress::default(), Instant::now());
        let mut flow = flow(Direction::Inbound);
        let mut written = 0;
        for number in 0..2 * limits::LOG_WINDOWS {
            let mut workload = flow.destination_workload.as_deref().unwrap().clone();
            workload.uid = format!("pod{number}").into();
            flow.destination_workload = Some(Arc::new(workload));
            written += usize::from(suppress.admit(&flow, &failed("timeout"), 1, now).is_some());
        }
        assert_eq!(suppress.windows.lock().unwrap().len(), limits::LOG_WINDOWS + 1);
        assert_eq!(written, limits::LOG_WINDOWS + limits::LOG_REFUSALS as usize);
    }
}
