//! In which order a Service's endpoints are tried. Pure.

use crate::life::limits;

/// Picks at most [`limits::ENDPOINT_TRIES`] of `count` endpoints, each at most once, every order equally likely.
/// `random` gives a number below its argument.
pub(crate) fn pick(count: usize, mut random: impl FnMut(usize) -> usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    let tries = count.min(limits::ENDPOINT_TRIES);
    for at in 0..tries {
        let other = at + random(count - at).min(count - at - 1);
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
            let order = pick(5, |below| random.usize(..below));
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
        assert_eq!(pick(0, |_| 0), Vec::<usize>::new());
        assert_eq!(pick(1, |_| 0), [0]);
        assert_eq!(pick(2, |below| below - 1), [1, 0]);
    }
}
