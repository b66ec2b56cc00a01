//! The set of captured destinations: the kernel's table made equal to what the cluster says, entry by entry.
//!
//! What is wanted before and after is never absent in between: additions go first, and only what is not wanted is removed. The
//! probes' destinations are always wanted.

use std::{collections::HashSet, net::IpAddr, sync::PoisonError};

use heddle_common::{Address, Destination, MAX_DESTINATIONS, maps};

use super::{
    CaptureError,
    maps::{Maps, failed, ignore_absent, key, os_error},
    probe,
};

/// What the kernel's table holds, as far as this process wrote it; unknown at the start and after a failure.
#[derive(Debug, Default)]
pub struct Destinations {
    known: Option<HashSet<Address>>,
    generation: u64,
}

impl Destinations {
    /// Puts the probes' destinations in beside what an earlier agent left, so that a pod can be proven at any time.
    pub fn keep_probes(&mut self, table: &Maps) -> Result<(), CaptureError> {
        let mut map = table.destinations.lock().unwrap_or_else(PoisonError::into_inner);
        for address in probe::DESTINATIONS.map(key) {
            map.insert(address, Destination { generation: self.generation }, 0).map_err(failed(maps::DESTINATIONS))?;
        }
        Ok(())
    }

    /// Makes the table exactly `addresses` and the probes' destinations.
    pub fn set(&mut self, table: &Maps, addresses: &HashSet<IpAddr>) -> Result<(), CaptureError> {
        let wanted: HashSet<Address> = addresses.iter().copied().chain(probe::DESTINATIONS).map(key).collect();
        let mut map = table.destinations.lock().unwrap_or_else(PoisonError::into_inner);
        let known = match self.known.take() {
            Some(known) => known,
            None => map.keys().collect::<Result<_, _>>().map_err(failed(maps::DESTINATIONS))?,
        };
        self.generation += 1;
        let (add, remove) = difference(&known, &wanted);
        let insert = |map: &mut aya::maps::HashMap<_, Address, Destination>, address: &Address| match map.insert(
            address,
            Destination { generation: self.generation },
            0,
        ) {
            Ok(()) => Ok(true),
            Err(error) if os_error(&error) == Some(libc::E2BIG) => Ok(false),
            Err(error) => Err(failed(maps::DESTINATIONS)(error)),
        };
        let mut left = Vec::new();
        for address in &add {
            if !insert(&mut map, address)? {
                left.push(*address);
            }
        }
        for address in &remove {
            ignore_absent(map.remove(address)).map_err(failed(maps::DESTINATIONS))?;
        }
        // A full table has room once the stale entries are gone.
        for address in &left {
            if !insert(&mut map, address)? {
                return Err(CaptureError::DestinationsFull { wanted: wanted.len(), capacity: MAX_DESTINATIONS });
            }
        }
        self.known = Some(wanted);
        Ok(())
    }
}

fn difference(known: &HashSet<Address>, wanted: &HashSet<Address>) -> (Vec<Address>, Vec<Address>) {
    (wanted.difference(known).copied().collect(), known.difference(wanted).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_is_neither_added_nor_removed() {
        let set = |last: &[u8]| last.iter().map(|last| Address::v4([10, 0, 0, *last])).collect::<HashSet<_>>();
        let (add, remove) = difference(&set(&[1, 2]), &set(&[2, 3]));
        assert_eq!(add, [Address::v4([10, 0, 0, 3])]);
        assert_eq!(remove, [Address::v4([10, 0, 0, 1])]);
    }
}
