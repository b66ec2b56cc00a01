//! Token buckets: a rate with a burst, for one thing or for many by key. Pure; time is given.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// Nanoseconds.
const SECOND: u64 = 1_000_000_000;

/// How often something may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Events per second in the long run.
    pub per_second: u32,
    /// Events at once after a pause.
    pub burst: u32,
}

impl Rate {
    /// `count` events per `seconds`, all of them at once if they come so.
    #[must_use]
    pub const fn of(count: u32, seconds: u32) -> Self {
        Self { per_second: count / seconds, burst: count }
    }
}

/// One bucket, full at first.
#[derive(Debug, Clone)]
pub struct Bucket {
    rate: Rate,
    tokens: u32,
    /// Until when tokens were credited; `None` while it is full.
    credited: Option<Instant>,
}

impl Bucket {
    #[must_use]
    pub fn new(rate: Rate) -> Self {
        Self { rate, tokens: rate.burst, credited: None }
    }

    /// Takes a token if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.spend(now)
    }

    /// As [`Self::take`], but looks at the clock only when the bucket seems empty.
    pub fn take_lazily(&mut self, now: impl FnOnce() -> Instant) -> bool {
        if self.tokens > 0 && self.credited.is_some() {
            self.tokens -= 1;
            return true;
        }
        self.take(now())
    }

    /// Adds tokens that were earned by other means than time.
    pub fn earn(&mut self, tokens: u32) {
        self.tokens = self.tokens.saturating_add(tokens).min(self.rate.burst);
    }

    #[must_use]
    pub fn tokens(&mut self, now: Instant) -> u32 {
        self.refill(now);
        self.tokens
    }

    /// How long until there is a token (zero when there is one).
    #[must_use]
    pub fn wait(&mut self, now: Instant) -> Duration {
        self.refill(now);
        if self.tokens > 0 {
            return Duration::ZERO;
        }
        self.credited.map_or(Duration::ZERO, |credited| (credited + self.time_of(1)).saturating_duration_since(now))
    }

    /// Whether it is as full as it can be: then nothing is lost by forgetting it.
    #[must_use]
    pub fn full(&mut self, now: Instant) -> bool {
        self.tokens(now) == self.rate.burst
    }

    fn spend(&mut self, now: Instant) -> bool {
        if self.tokens == 0 {
            return false;
        }
        self.credited.get_or_insert(now);
        self.tokens -= 1;
        true
    }

    fn refill(&mut self, now: Instant) {
        let Some(credited) = self.credited else { return };
        let elapsed = now.saturating_duration_since(credited);
        let earned = elapsed.as_nanos() * u128::from(self.rate.per_second) / u128::from(SECOND);
        if earned >= u128::from(self.rate.burst - self.tokens) {
            self.tokens = self.rate.burst;
            self.credited = None;
        } else if earned > 0 {
            // Less than the burst, so both fit; only whole tokens' time is used up.
            let earned = u32::try_from(earned).unwrap_or(u32::MAX);
            self.tokens += earned;
            self.credited = Some(credited + self.time_of(earned));
        }
    }

    /// In which so many tokens are earned. Rounded up: what is rounded down each time adds up to tokens that nobody earned.
    fn time_of(&self, tokens: u32) -> Duration {
        Duration::from_nanos((u64::from(tokens) * SECOND).div_ceil(self.rate.per_second.max(1).into()))
    }
}

/// Buckets by key, at most `cap`. Where the table is full of keys that are all in use, newcomers share one bucket.
#[derive(Debug)]
pub struct Keyed<K> {
    rate: Rate,
    cap: usize,
    buckets: HashMap<K, Bucket>,
    others: Bucket,
}

impl<K: Hash + Eq + Clone> Keyed<K> {
    #[must_use]
    pub fn new(rate: Rate, cap: usize) -> Self {
        Self { rate, cap, buckets: HashMap::new(), others: Bucket::new(rate) }
    }

    /// Takes one of `key`'s tokens if there is one.
    pub fn take(&mut self, key: &K, now: Instant) -> bool {
        if let Some(bucket) = self.buckets.get_mut(key) {
            return bucket.take(now);
        }
        if self.buckets.len() >= self.cap {
            self.buckets.retain(|_, bucket| !bucket.full(now));
        }
        if self.buckets.len() >= self.cap {
            return self.others.take(now);
        }
        self.buckets.entry(key.clone()).or_insert_with(|| Bucket::new(self.rate)).take(now)
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.buckets.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RATE: Rate = Rate { per_second: 10, burst: 20 };

    #[test]
    fn a_burst_then_the_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(RATE);
        let taken = (0..100).filter(|_| bucket.take(start)).count();
        assert_eq!(taken, 20);
        assert_eq!(bucket.wait(start), Duration::from_millis(100));
        assert!(!bucket.take(start + Duration::from_millis(99)));
        assert!(bucket.take(start + Duration::from_millis(100)));
        let later = start + Duration::from_secs(60);
        assert!(bucket.full(later));
        assert_eq!((0..100).filter(|_| bucket.take(later)).count(), 20);
    }

    #[test]
    fn no_token_comes_before_its_time_however_often_the_bucket_is_asked() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Rate { per_second: 3, burst: 2 });
        assert!(bucket.take(start) && bucket.take(start));
        for token in 1..1_000_u64 {
            let due = (token * SECOND).div_ceil(3);
            assert!(!bucket.take(start + Duration::from_nanos(due - 1)), "{token}");
            // Rounding costs less than a nanosecond a token.
            assert!(bucket.take(start + Duration::from_nanos(due + token)), "{token}");
        }
    }

    #[test]
    fn what_is_earned_fills_up_to_the_burst() {
        let start = Instant::now();
        let mut bucket = Bucket::new(RATE);
        while bucket.take(start) {}
        bucket.earn(5);
        assert_eq!(bucket.tokens(start), 5);
        bucket.earn(u32::MAX);
        assert_eq!(bucket.tokens(start), 20);
    }

    #[test]
    fn keys_have_buckets_of_their_own_and_the_table_its_cap() {
        let start = Instant::now();
        let mut keyed = Keyed::new(RATE, 4);
        for key in 0..4 {
            assert_eq!((0..100).filter(|_| keyed.take(&key, start)).count(), 20, "{key}");
        }
        // No room for more: all of them share one.
        assert_eq!((4..200).filter(|key| keyed.take(key, start)).count(), 20);
        assert_eq!(keyed.len(), 4);
        // Those who have been quiet make room.
        let later = start + Duration::from_secs(2);
        assert_eq!((0..100).filter(|_| keyed.take(&9, later)).count(), 20);
        assert_eq!(keyed.len(), 1);
    }

    proptest! {
        /// In any stretch of time no more is taken than the burst and the rate allow, lazily or not, and never less than
        /// the rate when asked all the time.
        #[test]
        fn never_more_than_rate_and_burst(
            rate in 1_u32..1_000,
            burst in 1_u32..1_000,
            steps in prop::collection::vec((0_u64..200_000, 1_u32..50, any::<bool>()), 1..100),
        ) {
            let start = Instant::now();
            let mut bucket = Bucket::new(Rate { per_second: rate, burst });
            let mut now = start;
            let mut taken = 0_u64;
            for (micros, asks, lazily) in steps {
                now += Duration::from_micros(micros);
                for _ in 0..asks {
                    taken += u64::from(if lazily { bucket.take_lazily(|| now) } else { bucket.take(now) });
                }
                let most = u64::from(burst) + now.duration_since(start).as_micros() as u64 * u64::from(rate) / 1_000_000;
                prop_assert!(taken <= most, "{taken} of at most {most}");
            }
        }
    }
}
