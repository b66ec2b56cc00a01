//! The pinned maps, shared by every pod's programs, as this process holds them.
//!
//! Opens what [`super::load`] has made, and reads and writes entries; which entries is decided elsewhere. Every call is a system
//! call of about a microsecond, so the locks are held that long.

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    os::fd::AsFd,
    path::Path,
    sync::{Mutex, PoisonError},
};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues};
use heddle_common::{Address, Attestation, Destination, PodCounts, PodGate, Tuple, maps};

use super::CaptureError;

pub struct Maps {
    pub destinations: Mutex<HashMap<MapData, Address, Destination>>,
    attested: Mutex<HashMap<MapData, Tuple, Attestation>>,
    listeners: MapData,
    gates: Mutex<Array<MapData, PodGate>>,
    counts: Mutex<PerCpuArray<MapData, PodCounts>>,
    /// Kernel ids of all of them.
    pub ids: BTreeSet<u32>,
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Maps").field("ids", &self.ids).finish_non_exhaustive()
    }
}

impl Maps {
    /// Opens the pinned maps.
    pub fn open(folder: &Path) -> Result<Self, CaptureError> {
        let mut ids = BTreeSet::new();
        let mut open = |name: &'static str| -> Result<MapData, CaptureError> {
            let data = MapData::from_pin(folder.join(name)).map_err(failed(name))?;
            ids.insert(data.info().map_err(failed(name))?.id());
            Ok(data)
        };
        let destinations = open(maps::DESTINATIONS)?;
        let attested = open(maps::ATTESTED)?;
        let listeners = open(maps::LISTENERS)?;
        let gates = open(maps::GATES)?;
        let counts = open(maps::COUNTS)?;
        Ok(Self {
            destinations: Mutex::new(typed(maps::DESTINATIONS, destinations)?),
            attested: Mutex::new(typed(maps::ATTESTED, attested)?),
            listeners,
            gates: Mutex::new(typed(maps::GATES, gates)?),
            counts: Mutex::new(typed(maps::COUNTS, counts)?),
            ids,
        })
    }

    /// The sockmap of listeners, for [`super::kernel`].
    pub fn listeners(&self) -> impl AsFd {
        self.listeners.fd().as_fd()
    }

    pub fn set_gate(&self, slot: u32, flags: u32) -> Result<(), CaptureError> {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        gates.set(slot, PodGate { flags, padding: 0 }, 0).map_err(failed(maps::GATES))
    }

    /// A pod's counters, summed over the CPUs.
    pub fn counts(&self, slot: u32) -> Result<PodCounts, CaptureError> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let values = counts.get(&slot, 0).map_err(failed(maps::COUNTS))?;
        Ok(values.iter().fold(PodCounts::default(), add))
    }

    pub fn reset_counts(&self, slot: u32) -> Result<(), CaptureError> {
        let cpus = aya::util::nr_cpus()
            .map_err(|(file, error)| CaptureError::Map { map: maps::COUNTS, detail: format!("{file}: {error}") })?;
        let zeros = PerCpuValues::try_from(vec![PodCounts::default(); cpus])
            .map_err(|error| CaptureError::Map { map: maps::COUNTS, detail: error.to_string() })?;
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.set(slot, zeros, 0).map_err(failed(maps::COUNTS))
    }

    /// Vouches for a connection until the result is dropped. `Err(None)`: the table is full.
    pub fn attest(&self, tuple: Tuple, attestation: Attestation) -> Result<Attested<'_>, Option<CaptureError>> {
        let mut attested = self.attested.lock().unwrap_or_else(PoisonError::into_inner);
        match attested.insert(tuple, attestation, 0) {
            Ok(()) => Ok(Attested { maps: self, tuple }),
            Err(error) if os_error(&error) == Some(libc::E2BIG) => Err(None),
            Err(error) => Err(Some(failed(maps::ATTESTED)(error))),
        }
    }

    /// Removes the entries for which `stale` holds. Gives how many.
    pub fn sweep_attested(&self, stale: impl Fn(&Attestation) -> bool) -> Result<usize, CaptureError> {
        let mut attested = self.attested.lock().unwrap_or_else(PoisonError::into_inner);
        let found: Vec<Tuple> = attested
            .iter()
            .filter_map(|entry| entry.ok())
            .filter(|(_, by)| stale(by))
            .map(|(tuple, _)| tuple)
            .collect();
        for tuple in &found {
            ignore_absent(attested.remove(tuple)).map_err(failed(maps::ATTESTED))?;
        }
        Ok(found.len())
    }

    #[cfg(test)]
    pub fn attested_count(&self) -> usize {
        self.attested.lock().unwrap().keys().count()
    }
}

/// An entry of `ATTESTED` that goes with this value.
#[derive(Debug)]
pub struct Attested<'a> {
    maps: &'a Maps,
    tuple: Tuple,
}

impl Drop for Attested<'_> {
    fn drop(&mut self) {
        let mut attested = self.maps.attested.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = ignore_absent(attested.remove(&self.tuple)) {
            tracing::warn!(%error, tuple = ?self.tuple, "an attested connection could not be taken out of the kernel's table");
        }
    }
}

/// The key of an address in the kernel's maps.
#[must_use]
pub fn key(address: IpAddr) -> Address {
    match address.to_canonical() {
        IpAddr::V4(address) => Address::v4(address.octets()),
        IpAddr::V6(address) => Address::v6(address.octets()),
    }
}

fn typed<T: TryFrom<Map, Error = MapError>>(name: &'static str, data: MapData) -> Result<T, CaptureError> {
    Map::from_map_data(data).and_then(T::try_from).map_err(failed(name))
}

pub fn failed(map: &'static str) -> impl Fn(MapError) -> CaptureError {
    move |error| CaptureError::Map { map, detail: chain(&error) }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = inner.source();
    }
    text
}

/// The code of the system call behind a map's error.
pub fn os_error(error: &MapError) -> Option<i32> {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        cause = inner.source();
    }
    None
}

pub fn ignore_absent(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(error) if os_error(&error) == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

fn add(sum: PodCounts, one: &PodCounts) -> PodCounts {
    PodCounts {
        marked: sum.marked.wrapping_add(one.marked),
        unmarkable: sum.unmarkable.wrapping_add(one.unmarkable),
        captured: sum.captured.wrapping_add(one.captured),
        attested: sum.attested.wrapping_add(one.attested),
        unattended_dropped: sum.unattended_dropped.wrapping_add(one.unattended_dropped),
        unattended_passed: sum.unattended_passed.wrapping_add(one.unattended_passed),
        direct: sum.direct.wrapping_add(one.direct),
        udp_connects: sum.udp_connects.wrapping_add(one.udp_connects),
        udp_datagrams: sum.udp_datagrams.wrapping_add(one.udp_datagrams),
        lane: sum.lane.wrapping_add(one.lane),
        lane_denied: sum.lane_denied.wrapping_add(one.lane_denied),
        lane_missed: sum.lane_missed.wrapping_add(one.lane_missed),
        lane_full: sum.lane_full.wrapping_add(one.lane_full),
        events_lost: sum.events_lost.wrapping_add(one.events_lost),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_address_is_the_key_of_its_ipv4_address() {
        assert_eq!(key("::ffff:10.1.2.3".parse().unwrap()), key("10.1.2.3".parse().unwrap()));
        assert_ne!(key("::1".parse().unwrap()), key("0.0.0.1".parse().unwrap()));
    }
}
