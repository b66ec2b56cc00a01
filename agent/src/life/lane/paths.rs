//! Between which pods packets were shown to go straight, and where they were not. Pure: others make the proofs.

use std::{
    collections::{HashMap, HashSet},
    time::Instant,
};

use super::kernel::LaneFault;
use crate::life::limits;

#[derive(Debug)]
enum Path {
    UnderWay,
    Proven,
    Failed { fault: LaneFault, at: Instant },
}

/// Paths by the ids of source and destination.
#[derive(Debug, Default)]
pub(super) struct Paths(HashMap<(u64, u64), Path>);

impl Paths {
    pub fn proven(&self, ids: (u64, u64)) -> bool {
        matches!(self.0.get(&ids), Some(Path::Proven))
    }

    /// Whether it is to be tried now; then it counts as under way. One that failed is left alone for a while.
    pub fn begin(&mut self, ids: (u64, u64), now: Instant) -> bool {
        let due = match self.0.get(&ids) {
            None => self.0.len() < limits::LANE_PATHS,
            Some(Path::UnderWay | Path::Proven) => false,
            Some(Path::Failed { at, .. }) => now.duration_since(*at) >= limits::LANE_PATH_RETRY,
        };
        if due {
            self.0.insert(ids, Path::UnderWay);
        }
        due
    }

    pub fn end(&mut self, ids: (u64, u64), result: Result<(), LaneFault>, now: Instant) {
        let path = match result {
            Ok(()) => Path::Proven,
            Err(fault) => Path::Failed { fault, at: now },
        };
        self.0.insert(ids, path);
    }

    /// Forgets those of pods that are gone.
    pub fn retain(&mut self, ids: &HashSet<u64>) {
        self.0.retain(|(source, destination), _| ids.contains(source) && ids.contains(destination));
    }

    /// Those that could not be proven.
    pub fn failed(&self) -> impl Iterator<Item = ((u64, u64), &LaneFault)> {
        self.0.iter().filter_map(|(ids, path)| match path {
            Path::Failed { fault, .. } => Some((*ids, fault)),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_tried_once_and_again_only_a_while_after_it_failed() {
        let (mut paths, start) = (Paths::default(), Instant::now());
        assert!(paths.begin((1, 2), start));
        assert!(!paths.begin((1, 2), start), "under way");
        assert!(paths.begin((2, 1), start), "the way back is another path");
        paths.end((1, 2), Err(LaneFault::Probe("no answer".into())), start);
        assert!(!paths.proven((1, 2)) && !paths.begin((1, 2), start + limits::LANE_PATH_RETRY / 2));
        assert_eq!(paths.failed().map(|(ids, fault)| (ids, fault.reason())).collect::<Vec<_>>(), [((1, 2), "probe")]);
        assert!(paths.begin((1, 2), start + limits::LANE_PATH_RETRY));
        paths.end((1, 2), Ok(()), start);
        assert!(paths.proven((1, 2)) && !paths.begin((1, 2), start + 2 * limits::LANE_PATH_RETRY));
        paths.retain(&HashSet::from([1]));
        assert!(!paths.proven((1, 2)));
    }

    #[test]
    fn no_more_paths_are_tried_than_are_remembered() {
        let (mut paths, now) = (Paths::default(), Instant::now());
        let tried = (0..limits::LANE_PATHS as u64 + 10).filter(|id| paths.begin((*id, 0), now)).count();
        assert_eq!(tried, limits::LANE_PATHS);
    }
}
