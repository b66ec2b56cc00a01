//! The pinned maps, shared by every pod's programs, as this process holds them.
//!
//! Opens what [`super::load`] has made, and reads and writes entries; which entries is decided elsewhere. Every call is a system
//! call of about a microsecond, so the locks are held that long.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues, RingBuf};
use heddle_common::{
    Address, Attestation, Destination, LocalEndpoints, Pair, PodCounts, PodGate, ProbePort, Resident, ServicePort,
    Tuple, Verdict, attested_by, maps,
};

use super::{CaptureError, WorkloadId, kernel};
use crate::causes;

pub struct Maps {
    residents: Mutex<HashMap<MapData, Address, Resident>>,
    verdicts: Mutex<HashMap<MapData, Pair, Verdict>>,
    denials: Mutex<PerCpuArray<MapData, u64>>,
    probe_ports: Mutex<HashMap<MapData, ProbePort, u32>>,
    pub services: Mutex<HashMap<MapData, ServicePort, LocalEndpoints>>,
    /// Where they are pinned.
    folder: PathBuf,
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
        let residents = open(maps::RESIDENTS)?;
        let verdicts = open(maps::VERDICTS)?;
        let denials = open(maps::DENIALS)?;
        let services = open(maps::SERVICES)?;
        let probe_ports = open(maps::PROBE_PORTS)?;
        open(maps::EVENTS)?;
        open(maps::ASKED)?;
        open(maps::ADMITTED)?;
        open(maps::LOOKED)?;
        open(maps::PROBING)?;
        Ok(Self {
            residents: Mutex::new(typed(maps::RESIDENTS, residents)?),
            verdicts: Mutex::new(typed(maps::VERDICTS, verdicts)?),
            denials: Mutex::new(typed(maps::DENIALS, denials)?),
            services: Mutex::new(typed(maps::SERVICES, services)?),
            probe_ports: Mutex::new(typed(maps::PROBE_PORTS, probe_ports)?),
            folder: folder.to_owned(),
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

    /// Vouches for a connection until the result is dropped.
    pub fn attest(&self, tuple: Tuple, attestation: Attestation) -> Result<Attested<'_>, NotAttested> {
        let mut attested = self.attested.lock().unwrap_or_else(PoisonError::into_inner);
        match attested.insert(tuple, attestation, kernel::NO_EXIST) {
            Ok(()) => Ok(Attested { maps: self, tuple }),
            Err(error) => Err(match os_error(&error) {
                Some(libc::E2BIG) => NotAttested::Full,
                Some(libc::EEXIST) => NotAttested::Taken,
                _ => NotAttested::Failed(failed(maps::ATTESTED)(error)),
            }),
        }
    }

    /// Removes the entries for which `stale` holds. Gives how many.
    pub fn sweep_attested(&self, stale: impl Fn(&Attestation) -> bool) -> Result<usize, CaptureError> {
        let mut found = self.all_attested()?;
        found.retain(|(_, by)| stale(by));
        // Locked for each: deliveries wait for the lock.
        for (tuple, _) in &found {
            self.remove_attested(tuple)?;
        }
        Ok(found.len())
    }

    /// The entry of one connection.
    pub fn attested(&self, tuple: &Tuple) -> Option<Attestation> {
        self.attested.lock().unwrap_or_else(PoisonError::into_inner).get(tuple, 0).ok()
    }

    /// Takes the entry of one connection out.
    pub fn remove_attested(&self, tuple: &Tuple) -> Result<(), CaptureError> {
        let mut attested = self.attested.lock().unwrap_or_else(PoisonError::into_inner);
        ignore_absent(attested.remove(tuple)).map_err(failed(maps::ATTESTED))
    }

    /// The same where nobody can be told of a failure.
    pub fn let_go(&self, tuple: &Tuple) {
        if let Err(error) = self.remove_attested(tuple) {
            tracing::warn!(%error, ?tuple, "an attested connection could not be taken out of the kernel's table");
        }
    }

    /// Every attested connection, read bucket by bucket: an entry that is there throughout is not missed.
    pub fn all_attested(&self) -> Result<Vec<(Tuple, Attestation)>, CaptureError> {
        self.read_all(maps::ATTESTED)
    }

    /// Names the pod at its addresses, for the kernel lane.
    pub fn put_resident(&self, workload: WorkloadId, slot: u32, addresses: &[IpAddr]) -> Result<(), CaptureError> {
        let mut residents = self.residents.lock().unwrap_or_else(PoisonError::into_inner);
        for address in addresses {
            let resident = Resident { workload: workload.0, slot, padding: 0 };
            residents.insert(key(*address), resident, 0).map_err(failed(maps::RESIDENTS))?;
        }
        Ok(())
    }

    /// Takes the pod's name off those addresses that are still its own.
    pub fn remove_resident<'a>(
        &self,
        workload: WorkloadId,
        addresses: impl IntoIterator<Item = &'a IpAddr>,
    ) -> Result<(), CaptureError> {
        let mut residents = self.residents.lock().unwrap_or_else(PoisonError::into_inner);
        for address in addresses {
            let address = key(*address);
            match residents.get(&address, 0) {
                Ok(resident) if resident.workload == workload.0 => {
                    ignore_absent(residents.remove(&address)).map_err(failed(maps::RESIDENTS))?;
                }
                Ok(_) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(failed(maps::RESIDENTS)(error)),
            }
        }
        Ok(())
    }

    /// Makes the ports that the kubelet may probe of a pod exactly these. Gives how many found no room.
    pub fn set_probe_ports(&self, workload: WorkloadId, wanted: &BTreeSet<u16>) -> Result<usize, CaptureError> {
        let mut ports = self.probe_ports.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = BTreeSet::new();
        for port in ports.keys() {
            let port = port.map_err(failed(maps::PROBE_PORTS))?;
            if port.workload == workload.0 {
                known.insert(port.port);
            }
        }
        for port in known.difference(wanted) {
            ignore_absent(ports.remove(&ProbePort::new(workload.0, *port))).map_err(failed(maps::PROBE_PORTS))?;
        }
        let mut without_room = 0;
        for port in wanted.difference(&known) {
            match ports.insert(ProbePort::new(workload.0, *port), 1, 0) {
                Ok(()) => {}
                Err(error) if os_error(&error) == Some(libc::E2BIG) => without_room += 1,
                Err(error) => return Err(failed(maps::PROBE_PORTS)(error)),
            }
        }
        Ok(without_room)
    }

    /// Removes what the kernel knows of a pod that is gone: probe ports, verdicts, and connections that its programs tell nothing
    /// of any more.
    pub fn forget(&self, workload: WorkloadId) -> Result<(), CaptureError> {
        self.set_probe_ports(workload, &BTreeSet::new())?;
        let of = |one: u64, other: u64| one == workload.0 || other == workload.0;
        for (pair, _) in self.verdicts()?.iter().filter(|(pair, _)| of(pair.source, pair.destination)) {
            self.remove_verdict(pair)?;
        }
        let its = |by: &Attestation| match by.by {
            attested_by::KERNEL => of(by.source, by.destination),
            attested_by::KUBELET => by.destination == workload.0,
            _ => false,
        };
        self.sweep_attested(its).map(drop)
    }

    /// Every verdict.
    pub fn verdicts(&self) -> Result<Vec<(Pair, Verdict)>, CaptureError> {
        self.read_all(maps::VERDICTS)
    }

    /// Every entry of a hash map, without its lock.
    fn read_all<K: aya::Pod, V: aya::Pod>(&self, map: &'static str) -> Result<Vec<(K, V)>, CaptureError> {
        let unread = |error: io::Error| CaptureError::Map { map, detail: error.to_string() };
        kernel::open_pin(&self.folder.join(map)).and_then(|map| kernel::read_all(&map)).map_err(unread)
    }

    /// Whether there was room for it.
    pub fn put_verdict(&self, pair: Pair, verdict: Verdict) -> Result<bool, CaptureError> {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        match verdicts.insert(pair, verdict, 0) {
            Ok(()) => Ok(true),
            Err(error) if os_error(&error) == Some(libc::E2BIG) => Ok(false),
            Err(error) => Err(failed(maps::VERDICTS)(error)),
        }
    }

    pub fn remove_verdict(&self, pair: &Pair) -> Result<(), CaptureError> {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        ignore_absent(verdicts.remove(pair)).map_err(failed(maps::VERDICTS))
    }

    /// How often a denial was applied, summed over the CPUs.
    pub fn denial(&self, counter: u32) -> Result<u64, CaptureError> {
        let denials = self.denials.lock().unwrap_or_else(PoisonError::into_inner);
        let values = denials.get(&counter, 0).map_err(failed(maps::DENIALS))?;
        Ok(values.iter().fold(0, |sum, one| sum.wrapping_add(*one)))
    }

    /// The ring of ended connections. Its reading position is the map's own: one reader at a time.
    pub fn events(&self) -> Result<RingBuf<MapData>, CaptureError> {
        let data = MapData::from_pin(self.folder.join(maps::EVENTS)).map_err(failed(maps::EVENTS))?;
        typed(maps::EVENTS, data)
    }
}

/// Why nobody vouches for a connection.
#[derive(Debug)]
pub enum NotAttested {
    /// The table is full.
    Full,
    /// Someone vouches for one of the same 4-tuple.
    Taken,
    Failed(CaptureError),
}

/// An entry of `ATTESTED` that goes with this value.
#[derive(Debug)]
pub struct Attested<'a> {
    maps: &'a Maps,
    tuple: Tuple,
}

impl Drop for Attested<'_> {
    fn drop(&mut self) {
        self.maps.let_go(&self.tuple);
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

/// A connection from `client` to a pod's `app`, as the kernel's tables name it.
#[must_use]
pub fn tuple(client: SocketAddr, app: SocketAddr) -> Tuple {
    Tuple {
        source: key(client.ip()),
        destination: key(app.ip()),
        source_port: client.port(),
        destination_port: app.port(),
        padding: 0,
    }
}

fn typed<T: TryFrom<Map, Error = MapError>>(name: &'static str, data: MapData) -> Result<T, CaptureError> {
    Map::from_map_data(data).and_then(T::try_from).map_err(failed(name))
}

pub fn failed(map: &'static str) -> impl Fn(MapError) -> CaptureError {
    move |error| CaptureError::Map { map, detail: causes::told(&error) }
}

/// The code of the system call behind a map's error.
pub fn os_error(error: &MapError) -> Option<i32> {
    causes::chain(error).find_map(|cause| cause.downcast_ref::<io::Error>())?.raw_os_error()
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
        probes: sum.probes.wrapping_add(one.probes),
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
