//! What an error was caused by. Beside the journey: every stage tells of errors of libraries.

use std::{error::Error, iter::successors};

/// The error, what caused it, and so on.
pub(crate) fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    successors(Some(error), |error| (**error).source())
}

/// All of them in one line; what an error has already said of its cause is not said again.
pub(crate) fn told(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    for more in chain(error).map(ToString::to_string) {
        if text.is_empty() {
            text = more;
        } else if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Outer(&'static str, #[source] io::Error);

    #[test]
    fn each_cause_is_told_once() {
        let refused = || io::Error::other("refused");
        assert_eq!(told(&refused()), "refused");
        assert_eq!(told(&Outer("no map", refused())), "no map: refused");
        assert_eq!(told(&Outer("no map: refused", refused())), "no map: refused");
        assert_eq!(chain(&Outer("no map", refused())).count(), 2);
    }
}
