//! Between which pods packets were shown to go straight, and where they were not. Pure: others make the proofs.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use crate::{capture::LaneFault, life::limits};

#[derive(Debug)]
enum Path {
    /// With the pause before the next try, should this one fail.
    UnderWay {
        pause: Duration,
    },
    Proven,
    Failed {
        fault: LaneFault,
        due: Instant,
        pause: Duration,
    },
}

/// Paths by the ids of source and destination.
#[derive(Debug, Default)]
pub(super) struct Paths(HashMap<(u64, u64), Path>);

impl Paths {
    pub fn proven(&self, ids: (u64, u64)) -> bool {
        matches!(self.0.get(&ids), Some(Path::Proven))
    }

    /// Whether it is to be tried now; then it counts as under way. One that failed is left alone for a while, longer each time.
    pub fn begin(&mut self, ids: (u64, u64), now: Instant) -> bool {
        let pause = match self.0.get(&ids) {
            None if self.0.len() < limits::LANE_PATHS => limits::LANE_PATH_RETRY_MIN,
            Some(Path::Failed { due, pause, .. }) if *due <= now => (*pause * 2).min(limits::LANE_PATH_RETRY_MAX),
            _ => return false,
        };
        self.0.insert(ids, Path::UnderWay { pause });
        true
    }

    pub fn end(&mut self, ids: (u64, u64), result: Result<(), LaneFault>, now: Instant) {
        let path = match (result, self.0.get(&ids)) {
            (Ok(()), _) => Path::Proven,
            (Err(fault), Some(Path::UnderWay { pause })) => Path::Failed { fault, due: now + *pause, pause: *pause },
            // Its pods are gone.
            (Err(_), _) => return,
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
        assert!(!paths.proven((1, 2)) && !paths.begin((1, 2), start + limits::LANE_PATH_RETRY_MIN / 2));
        assert_eq!(paths.failed().map(|(ids, fault)| (ids, fault.reason())).collect::<Vec<_>>(), [((1, 2), "probe")]);
        assert!(paths.begin((1, 2), start + limits::LANE_PATH_RETRY_MIN));
        paths.end((1, 2), Ok(()), start);
        assert!(paths.proven((1, 2)) && !paths.begin((1, 2), start + 2 * limits::LANE_PATH_RETRY_MAX));
        paths.retain(&HashSet::from([1]));
        assert!(!paths.proven((1, 2)));
    }

    #[test]
    fn the_pause_doubles_up_to_its_end() {
        let (mut paths, mut now) = (Paths::default(), Instant::now());
        let mut pauses = Vec::new();
        assert!(paths.begin((1, 2), now));
        for _ in 0..10 {
            paths.end((1, 2), Err(LaneFault::Probe("no answer".into())), now);
            let failed = now;
            while !paths.begin((1, 2), now) {
                now += Duration::from_millis(500);
            }
            pauses.push(now - failed);
        }
        assert_eq!(pauses[..3], [1, 2, 4].map(|times| times * limits::LANE_PATH_RETRY_MIN));
        assert_eq!(pauses.last(), Some(&limits::LANE_PATH_RETRY_MAX));
    }

    #[test]
    fn no_more_paths_are_tried_than_are_remembered() {
        let (mut paths, now) = (Paths::default(), Instant::now());
        let tried = (0..limits::LANE_PATHS as u64 + 10).filter(|id| paths.begin((*id, 0), now)).count();
        assert_eq!(tried, limits::LANE_PATHS);
    }
}
