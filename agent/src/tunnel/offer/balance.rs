//! In which order a Service's endpoints are tried. Pure.
//!
//! The kernel may have drawn already, among all of them, and kept what it could carry itself: then its draw holds, so that both
//! together are one balancer.

use heddle_common::choice;

use crate::life::limits;

/// Picks at most [`limits::ENDPOINT_TRIES`] of `count` endpoints, each at most once, every order that the kernel's choice leaves
/// equally likely. `chosen` is one of [`choice`], `on_lane` the endpoints that it counts, ascending. A choice that no longer makes sense is
/// none. `random` gives a number below its argument.
pub(crate) fn pick(count: usize, on_lane: &[usize], chosen: u16, mut random: impl FnMut(usize) -> usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    // How many come first, in any order among themselves.
    let first = match chosen {
        choice::NONE => count,
        choice::REST => {
            let is_local = |at: &usize| on_lane.binary_search(at).is_ok();
            order.sort_by_key(is_local);
            order.iter().take_while(|at| !is_local(at)).count()
        }
        local => {
            let meant = on_lane.get(usize::from(local - choice::FIRST_LOCAL)).filter(|at| **at < count);
            meant.map_or(count, |at| {
                order.swap(0, *at);
                1
            })
        }
    };
    let tries = count.min(limits::ENDPOINT_TRIES);
    for at in 0..tries {
        let end = if at < first { first } else { count };
        let other = at + random(end - at).min(end - at - 1);
        order.swap(at, other);
    }
    order.truncate(tries);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_endpoint_is_first_about_equally_often_and_never_twice_in_one_order() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut first = [0_u32; 5];
        for _ in 0..10_000 {
            let order = pick(5, &[], choice::NONE, |below| random.usize(..below));
            assert_eq!(order.len(), limits::ENDPOINT_TRIES);
            let mut unique = order.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), order.len(), "{order:?}");
            first[order[0]] += 1;
        }
        assert!(first.iter().all(|count| (1_700..2_300).contains(count)), "{first:?}");
    }

    #[test]
    fn few_endpoints_are_all_tried() {
        assert_eq!(pick(0, &[], choice::NONE, |_| 0), Vec::<usize>::new());
        assert_eq!(pick(1, &[], choice::NONE, |_| 0), [0]);
        assert_eq!(pick(2, &[], choice::NONE, |below| below - 1), [1, 0]);
    }

    #[test]
    fn what_the_kernel_chose_comes_first_and_the_others_after_it() {
        let mut random = fastrand::Rng::with_seed(3);
        let mut tried = |count, on_lane: &[usize], chosen| {
            let mut seen = vec![std::collections::BTreeSet::new(); limits::ENDPOINT_TRIES];
            for _ in 0..500 {
                let order = pick(count, on_lane, chosen, |below| random.usize(..below));
                let unique: std::collections::BTreeSet<_> = order.iter().collect();
                assert_eq!((unique.len(), order.len()), (order.len(), count.min(limits::ENDPOINT_TRIES)), "{order:?}");
                order.iter().enumerate().for_each(|(at, endpoint)| _ = seen[at].insert(*endpoint));
            }
            seen.into_iter().map(Vec::from_iter).collect::<Vec<_>>()
        };
        let first = |at: u16| choice::FIRST_LOCAL + at;
        let all = vec![0, 1, 2, 3, 4];
        assert_eq!(tried(5, &[1, 3], first(0)), [vec![1], vec![0, 2, 3, 4], vec![0, 2, 3, 4]]);
        assert_eq!(tried(5, &[1, 3], first(1)), [vec![3], vec![0, 1, 2, 4], vec![0, 1, 2, 4]]);
        assert_eq!(tried(5, &[1, 3], choice::REST), [vec![0, 2, 4], vec![0, 2, 4], vec![0, 2, 4]]);
        assert_eq!(tried(4, &[1, 3], choice::REST), [vec![0, 2], vec![0, 2], vec![1, 3]], "and then those of the node");
        // What it counted has changed since.
        for (on_lane, chosen) in [(&[1, 3][..], first(2)), (&[], first(0)), (&[7], first(0)), (&[1], u16::MAX)] {
            assert_eq!(tried(5, on_lane, chosen), [all.clone(), all.clone(), all.clone()], "{on_lane:?} {chosen}");
        }
        assert_eq!(tried(2, &[0, 1], choice::REST)[0], [0, 1], "there is no rest");
    }

    #[test]
    fn kernel_and_agent_together_give_every_endpoint_the_same_share() {
        const DRAWS: u32 = 60_000;
        let mut random = fastrand::Rng::with_seed(11);
        for (count, on_lane) in [(6_usize, &[1_usize, 4][..]), (6, &[]), (6, &[0, 1, 2, 3, 4, 5]), (5, &[4]), (2, &[0])]
        {
            let mut share = vec![0_u32; count];
            for _ in 0..DRAWS {
                // As `connect` draws: below the number of local ones it is one of them, else the agent chooses.
                let drawn = usize::try_from(random.u32(..) % u32::try_from(count).unwrap()).unwrap();
                let chosen = if drawn < on_lane.len() {
                    choice::FIRST_LOCAL + u16::try_from(drawn).unwrap()
                } else {
                    choice::REST
                };
                share[pick(count, on_lane, chosen, |below| random.usize(..below))[0]] += 1;
            }
            // Pearson's statistic; with at most 5 degrees of freedom 25.7 is exceeded once in 10,000.
            let expected = f64::from(DRAWS) / f64::from(u32::try_from(count).unwrap());
            let off: f64 = share.iter().map(|seen| (f64::from(*seen) - expected).powi(2) / expected).sum();
            assert!(off < 25.7, "{share:?} of {count} with {on_lane:?} on the node: {off}");
        }
    }
}
