//! When to ask the API server again: at once when it answers again, and ever more slowly where it answers that it won't.
//!
//! While it can't be reached one knocks for all: seven watches of each of a thousand nodes would be a storm.

use std::{
    sync::PoisonError,
    time::{Duration, Instant},
};

use kube::Client;
use tokio::{
    sync::{Mutex, watch},
    time::{sleep, sleep_until, timeout},
};

use crate::life::limits;

/// The pause after a failure: twice the last one, with jitter, and no less than was asked for.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    pub fn next(&mut self, asked: Option<Duration>) -> Duration {
        let longest = limits::KUBE_BACKOFF_MIN.saturating_mul(1 << self.failures.min(16)).min(limits::KUBE_BACKOFF_MAX);
        self.failures = self.failures.saturating_add(1);
        let pause = longest.mul_f64(0.5 + fastrand::f64() / 2.0);
        // Those who were told the same time come back spread over half of it.
        asked.map_or(pause, |asked| pause.max(asked.min(limits::KUBE_RETRY_AFTER).mul_f64(1.0 + fastrand::f64() / 2.0)))
    }

    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Whether the API server answers.
pub(super) struct Reach {
    client: Client,
    /// When it last did, to a knock.
    answered: Mutex<Option<Instant>>,
    /// When a watch last heard anything.
    heard: std::sync::Mutex<Instant>,
    /// Rises when its connections are found dead.
    dead: watch::Sender<u64>,
}

impl Reach {
    pub fn new(client: Client) -> Self {
        let heard = std::sync::Mutex::new(Instant::now());
        Self { client, answered: Mutex::new(None), heard, dead: watch::Sender::new(0) }
    }

    /// Notes that a watch has heard something.
    pub fn heard(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Changes when connections that say nothing are found dead.
    pub fn dead(&self) -> watch::Receiver<u64> {
        self.dead.subscribe()
    }

    /// Asks whether it lives whenever nothing was heard for long. For ever.
    pub async fn pulse(&self) {
        loop {
            let heard = *self.heard.lock().unwrap_or_else(PoisonError::into_inner);
            let due = heard + limits::KUBE_PULSE;
            if Instant::now() < due {
                sleep_until(due.into()).await;
                continue;
            }
            // The first may have been lost with a connection that only it had.
            if !self.knock().await && !self.knock().await {
                self.dead.send_modify(|times| *times += 1);
                self.wait(Instant::now()).await;
            }
            self.heard();
        }
    }

    /// Waits until it has answered anything, even that it won't, after `failed`.
    pub async fn wait(&self, failed: Instant) {
        let mut answered = self.answered.lock().await;
        while answered.is_none_or(|at| at <= failed) {
            sleep(limits::KUBE_KNOCK.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            if self.knock().await {
                *answered = Some(Instant::now());
            }
        }
    }

    async fn knock(&self) -> bool {
        let knock = timeout(limits::KUBE_KNOCK_ANSWER, self.client.apiserver_version()).await;
        // An answer that is no version is one.
        matches!(knock, Ok(Ok(_) | Err(kube::Error::Api(_) | kube::Error::SerdeError(_))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew_after_success() {
        let mut backoff = Backoff::default();
        for round in 0..40 {
            let longest = limits::KUBE_BACKOFF_MIN.saturating_mul(1 << round.min(16)).min(limits::KUBE_BACKOFF_MAX);
            let pause = backoff.next(None);
            assert!(pause >= longest / 2 && pause <= longest, "{round}: {pause:?}");
        }
        backoff.reset();
        assert!(backoff.next(None) <= limits::KUBE_BACKOFF_MIN);
    }

    #[test]
    fn who_is_told_when_to_come_again_does_not_come_before() {
        let mut backoff = Backoff::default();
        assert!(backoff.next(Some(Duration::from_secs(7))) >= Duration::from_secs(7));
        assert!(backoff.next(Some(Duration::MAX)) <= limits::KUBE_RETRY_AFTER * 2, "but nobody is put off for ever");
    }
}
