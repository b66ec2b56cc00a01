//! Which source port a delivery takes.
//!
//! A delivery comes from the client's address, so its 4-tuple must differ from every connection that the same client already
//! has to the same app port. Clients take ephemeral ports; deliveries take ports below that range, in turn, and step over
//! what [`Occupancy`] knows of. Never asks the kernel for a port.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use heddle_common::{HBONE_PORT, LISTENER_PORT};

/// Ports below this are for privileged services.
const LOWEST: u16 = 1_024;
/// Fewer ports than this below the ephemeral range, and those above it are taken.
const ENOUGH: u16 = 4_096;

/// The ports for deliveries in a netns whose `ip_local_port_range` is `ephemeral`: below it, else above it, else (when it
/// spans nearly everything) all of what lies outside, or at worst the range itself.
#[must_use]
pub fn range(ephemeral: &RangeInclusive<u16>) -> RangeInclusive<u16> {
    let below = LOWEST..=ephemeral.start().saturating_sub(1);
    let above = ephemeral.end().saturating_add(1).max(LOWEST)..=u16::MAX;
    let above_is_empty = *ephemeral.end() == u16::MAX;
    if count(&below) >= u32::from(ENOUGH) {
        below
    } else if !above_is_empty && (count(&above) >= u32::from(ENOUGH) || count(&above) > count(&below)) {
        above
    } else if count(&below) > 0 {
        below
    } else {
        LOWEST..=u16::MAX
    }
}

fn count(range: &RangeInclusive<u16>) -> u32 {
    (u32::from(*range.end()) + 1).saturating_sub(u32::from(*range.start()))
}

/// Parses `/proc/sys/net/ipv4/ip_local_port_range`.
#[must_use]
pub fn parse_ephemeral(text: &str) -> Option<RangeInclusive<u16>> {
    let mut words = text.split_whitespace().map(str::parse::<u16>);
    let (low, high) = (words.next()?.ok()?, words.next()?.ok()?);
    (low <= high).then_some(low..=high)
}

/// Takes ports of a range in turn, from a random start.
#[derive(Debug)]
pub struct Rotation {
    range: RangeInclusive<u16>,
    next: AtomicU32,
}

impl Rotation {
    #[must_use]
    pub fn new(range: RangeInclusive<u16>) -> Self {
        let next = fastrand::u32(..);
        Self { range, next: AtomicU32::new(next) }
    }

    fn take(&self) -> u16 {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % count(&self.range).max(1);
        self.range.start().saturating_add(u16::try_from(turn).unwrap_or(0))
    }

    /// The next port that is free as far as the agent knows; `None` when all of the range are in use.
    #[must_use]
    pub fn pick(&self, client: IpAddr, app: u16, occupancy: &Occupancy) -> Option<u16> {
        for _ in 0..count(&self.range) {
            let port = self.take();
            if port != LISTENER_PORT && port != HBONE_PORT && !occupancy.holds(client, port, app) {
                return Some(port);
            }
        }
        None
    }
}

type Key = (IpAddr, u16, u16);

/// Client ports of the plaintext connections that the agent holds for one pod, with how often each is held.
#[derive(Debug, Default)]
pub struct Occupancy(Mutex<HashMap<Key, u32>>);

impl Occupancy {
    /// Notes one until the result is dropped.
    #[must_use]
    pub fn hold(self: &Arc<Self>, client: SocketAddr, app: SocketAddr) -> Occupied {
        let key = (client.ip().to_canonical(), client.port(), app.port());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_insert(0) += 1;
        Occupied { held: Some((Arc::clone(self), key)) }
    }

    fn holds(&self, client: IpAddr, port: u16, app: u16) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&(client, port, app))
    }

    fn release(&self, key: &Key) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(times) = held.get_mut(key) {
            *times -= 1;
            if *times == 0 {
                held.remove(key);
            }
        }
    }
}

/// Keeps delivery off the source ports of captured plaintext connections while it lives.
#[derive(Debug)]
pub struct Occupied {
    /// `None` for a pod that is not attached: there is nothing to keep off.
    held: Option<(Arc<Occupancy>, Key)>,
}

impl Occupied {
    /// Of a pod that is not attached.
    #[must_use]
    pub fn nothing() -> Self {
        Self { held: None }
    }
}

impl Drop for Occupied {
    fn drop(&mut self) {
        if let Some((occupancy, key)) = self.held.take() {
            occupancy.release(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delivery_ports_lie_outside_the_ephemeral_range() {
        assert_eq!(range(&(32_768..=60_999)), 1_024..=32_767);
        assert_eq!(range(&(16_000..=65_000)), 1_024..=15_999);
        assert_eq!(range(&(2_000..=50_000)), 50_001..=65_535);
        assert_eq!(range(&(1_024..=65_535)), 1_024..=65_535);
        assert_eq!(range(&(2_000..=65_535)), 1_024..=1_999);
        assert_eq!(range(&(1_030..=65_000)), 65_001..=65_535);
        assert_eq!(range(&(1..=65_535)), 1_024..=65_535);
        assert_eq!(range(&(600..=750)), 1_024..=65_535);
    }

    #[test]
    fn the_port_range_file_is_read_and_nonsense_is_not() {
        assert_eq!(parse_ephemeral("32768\t60999\n"), Some(32_768..=60_999));
        assert_eq!(parse_ephemeral("60999 32768"), None);
        assert_eq!(parse_ephemeral("1"), None);
        assert_eq!(parse_ephemeral("70000 80000"), None);
    }

    #[test]
    fn rotation_takes_every_port_once_before_it_repeats_and_steps_over_held_ones() {
        let occupancy = Arc::new(Occupancy::default());
        let client: SocketAddr = "10.0.0.1:5001".parse().unwrap();
        let app: SocketAddr = "10.0.0.2:80".parse().unwrap();
        let rotation = Rotation::new(5_000..=5_003);
        let held = occupancy.hold("[::ffff:10.0.0.1]:5001".parse().unwrap(), app);
        let again = occupancy.hold(client, app);
        let picks = |times| {
            let mut ports: Vec<_> =
                (0..times).filter_map(|_| rotation.pick(client.ip(), app.port(), &occupancy)).collect();
            ports.sort_unstable();
            ports
        };
        assert_eq!(picks(3), [5_000, 5_002, 5_003]);
        assert!(rotation.pick(client.ip(), 81, &occupancy).is_some());
        drop(held);
        assert!(!picks(3).contains(&5_001));
        drop(again);
        let _realigned = picks(4);
        assert_eq!(picks(4), [5_000, 5_001, 5_002, 5_003]);
    }

    #[test]
    fn a_range_without_a_free_port_ends() {
        let occupancy = Arc::new(Occupancy::default());
        let _held = occupancy.hold("10.0.0.1:6000".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        assert_eq!(Rotation::new(6_000..=6_000).pick("10.0.0.1".parse().unwrap(), 80, &occupancy), None);
        assert_eq!(Rotation::new(15_001..=15_001).pick("10.0.0.1".parse().unwrap(), 80, &occupancy), None);
    }
}
