//! Which handshakes come now: a rate per pod, shared fairly between the addresses that ask. Pure; time is given.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use super::bucket::{Bucket, Rate};

/// Addresses are counted over this long.
const WINDOW: Duration = Duration::from_secs(1);

/// One pod's inbound handshakes.
#[derive(Debug)]
pub(super) struct Handshakes {
    rate: Rate,
    bucket: Bucket,
    /// Addresses counted at most.
    cap: usize,
    window: Option<Instant>,
    /// Addresses in the window before.
    before: usize,
    counts: HashMap<IpAddr, u32>,
}

impl Handshakes {
    pub fn new(rate: Rate, cap: usize) -> Self {
        Self { rate, bucket: Bucket::new(rate), cap, window: None, before: 0, counts: HashMap::new() }
    }

    /// Whether `source` may begin one. Half of the burst is for whoever comes; once that is used up an address gets its equal
    /// part of three quarters of the rate, so one that asks for more than its part takes nothing from the others, and the last
    /// quarter is there for those who come new. What they leave fills the first half again.
    pub fn admit(&mut self, source: IpAddr, now: Instant) -> bool {
        if self.window.is_none_or(|began| now.saturating_duration_since(began) >= WINDOW) {
            self.window = Some(now);
            self.before = self.counts.len();
            self.counts.clear();
        }
        let so_far = self.counts.get(&source).copied();
        let addresses = self.before.max(self.counts.len() + usize::from(so_far.is_none()));
        let part = self.rate.per_second / 4 * 3 / u32::try_from(addresses).unwrap_or(u32::MAX).max(1);
        let fair = part.max(1);
        let scarce = self.bucket.tokens(now) <= self.rate.burst / 2;
        if scarce && so_far.is_some_and(|count| count >= fair) || !self.bucket.take(now) {
            return false;
        }
        if so_far.is_some() || self.counts.len() < self.cap {
            *self.counts.entry(source).or_default() += 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const RATE: Rate = Rate { per_second: 200, burst: 400 };

    fn at(host: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, host).into()
    }

    /// `asks` per second and address over `seconds`: how many of each address were let in.
    fn run(asks: &[u32], seconds: u32) -> Vec<u32> {
        let start = Instant::now();
        let mut gate = Handshakes::new(RATE, 64);
        let mut admitted = vec![0; asks.len()];
        for milli in 0..seconds * 1_000 {
            let now = start + Duration::from_millis(milli.into());
            for (host, per_second) in asks.iter().enumerate() {
                let due = |milli: u32| milli * per_second / 1_000;
                for _ in due(milli)..due(milli + 1) {
                    admitted[host] += u32::from(gate.admit(at(u8::try_from(host).unwrap()), now));
                }
            }
        }
        admitted
    }

    #[test]
    fn a_hog_takes_nothing_from_the_modest() {
        let admitted = run(&[2_000, 20], 10);
        assert_eq!(admitted[1], 200, "every one of the modest address");
        assert!((1_700..=2_300).contains(&admitted[0]), "{admitted:?}");
        let admitted = run(&[2_000, 2_000, 2_000, 20, 20], 10);
        assert_eq!(admitted[3..], [200, 200]);
        // Each hog its part of three quarters; the rest is whose comes first.
        assert!(admitted[..3].iter().all(|count| *count >= 300), "{admitted:?}");
    }

    #[test]
    fn one_address_alone_has_the_whole_rate_and_burst() {
        let alone = run(&[2_000], 10)[0];
        assert!((2_000..=2_450).contains(&alone), "{alone}");
        assert_eq!(run(&[190], 10), [1_900]);
        let now = Instant::now();
        let mut gate = Handshakes::new(RATE, 64);
        assert!((0..400).filter(|_| gate.admit(at(1), now)).count() >= 200);
    }

    #[test]
    fn the_table_of_addresses_is_capped() {
        let now = Instant::now();
        let mut gate = Handshakes::new(RATE, 4);
        for host in 0..100 {
            gate.admit(at(host), now);
        }
        assert_eq!(gate.counts.len(), 4);
    }
}
