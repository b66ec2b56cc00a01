//! How an API server can be of no use.

use super::Known;

/// One way of failing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Every request is answered with this status; 429 says when to come again. Watches end.
    Status(u16),
    /// None is answered. Watches end.
    Silence,
    /// None is answered, and open watches say nothing any more without ending: not even when it is over.
    BlackHole,
    /// Every connection is closed instead of an answer.
    Hangup,
}

/// Those in force.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub all: Option<Fault>,
    /// Resource, what happens, how often it still does.
    pub some: Vec<(String, Fault, usize)>,
}

impl Known {
    /// What becomes of a request for this resource.
    pub(super) fn fault(&mut self, plural: &str) -> Option<Fault> {
        if self.faults.all.is_some() {
            return self.faults.all;
        }
        let (_, fault, left) = self.faults.some.iter_mut().find(|(of, _, left)| of == plural && *left > 0)?;
        *left -= 1;
        Some(*fault)
    }
}
