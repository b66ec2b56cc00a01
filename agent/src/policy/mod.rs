//! May this connection reach the app? One pure function over compiled rules; only it can make the [`Permit`] that
//! forwarding needs.
//!
//! After identity and before the tunnel forwards a byte. It never does I/O, and it never turns what it can't
//! understand into *allow*.
//!
//! ```text
//! Snapshot ── parse ──► rules, strictness ── rulebook ──► Rulebook ─┐
//!                                                        Request ───┴─ decide ──► Permit or Denial
//! ```

mod decide;
mod explain;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod model;
mod parse;
mod question;
mod rulebook;
mod rules;
pub mod status;
mod strictness;
mod verdicts;

pub use decide::{Rehearsal, decide, rehearse};
pub use explain::{Considered, Explanation, Miss, PlaintextRule, Role, explain};
pub use model::{Denial, Outcome, Permit, Request};
pub use question::{Explained, Question, QuestionError, answer, find_pod};
pub use rulebook::{Effect, Rulebook, Unenforceable};
pub use rules::Action;
pub use verdicts::{Ends, Verdict, verdict};

#[cfg(test)]
pub(crate) mod tests;
