//! How a connection of the kernel lane ended, by what its two sockets came to. Pure.

use heddle_common::{Attestation, side};

use crate::{
    policy::Denial,
    telemetry::{response_flags, traffic::NO_FLAGS},
    tunnel::End,
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ending {
    /// Both sides have finished.
    Complete,
    ClientReset,
    AppReset,
    /// Before either side had finished: nobody can say by whom.
    Reset,
    /// It never was established.
    Refused,
    NoAnswer,
    /// One of its pods is no longer enrolled.
    PodLeft,
    /// It left the kernel's table, and there was no room for the record of its end.
    Unreported,
    /// Policy withdrew its leave.
    Denied(Denial),
}

/// Whether the app's socket has taken it. Where the source alone thinks so, the agent may have taken it for want of a verdict, and
/// tells of it.
pub(super) fn accepted(attestation: &Attestation) -> bool {
    attestation.destination_state & side::ESTABLISHED != 0
}

/// Whether an ended connection could carry something. An app whose listener was made outside its pod's cgroup acknowledges
/// bytes without a word of the handshake.
pub(super) fn established(attestation: &Attestation) -> bool {
    accepted(attestation) || attestation.sent > 0
}

impl Ending {
    /// How many endings are the same for every connection that carried bytes.
    pub const PLAIN: usize = 6;

    /// Of a connection that both sides have closed.
    pub fn of(attestation: &Attestation) -> Self {
        let finished = |state: u32| state & side::FINISHED != 0;
        if !established(attestation) {
            // TCP sends a SYN again until it is answered.
            return if attestation.source_retransmissions == 0 { Self::Refused } else { Self::NoAnswer };
        }
        match (finished(attestation.source_state), finished(attestation.destination_state)) {
            (true, true) => Self::Complete,
            (false, true) => Self::ClientReset,
            (true, false) => Self::AppReset,
            (false, false) => Self::Reset,
        }
    }

    /// Its number among the plain ones.
    pub fn plain(&self) -> Option<usize> {
        match self {
            Self::Complete => Some(0),
            Self::ClientReset => Some(1),
            Self::AppReset => Some(2),
            Self::Reset => Some(3),
            Self::PodLeft => Some(4),
            Self::Unreported => Some(5),
            Self::Refused | Self::NoAnswer | Self::Denied(_) => None,
        }
    }

    /// `response_flags` of the metrics.
    pub fn flags(&self) -> &'static str {
        match self {
            Self::Refused | Self::NoAnswer => "CONNECT",
            Self::Denied(_) => "DENY",
            _ => NO_FLAGS,
        }
    }

    /// As the log tells it.
    pub fn end(&self) -> End {
        let (reason, detail) = match self {
            Self::Complete => return End::Complete,
            Self::Denied(denial) => return End::Denied(denial.clone()),
            Self::ClientReset => ("client_reset", "the client ended it without finishing"),
            Self::AppReset => ("app_reset", "the app ended it without finishing"),
            Self::Reset => ("reset", "ended before either side had finished"),
            Self::Refused => ("refused", "the app's port refused it, or the client gave up at once"),
            Self::NoAnswer => ("no_answer", "the app's pod did not answer"),
            Self::PodLeft => ("pod_left", "a pod has left the mesh: what it still carries is not seen"),
            Self::Unreported => ("unreported", "its end was not recorded: there were too many at once"),
        };
        let end = End::Failed { reason, response_flags: self.flags(), detail: detail.to_owned() };
        debug_assert_eq!(response_flags(&end), self.flags());
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: u32 = side::ESTABLISHED;
    const DONE: u32 = side::ESTABLISHED | side::FINISHED | side::ACKNOWLEDGED | side::CLOSED;

    fn ended(source_state: u32, destination_state: u32, source_retransmissions: u32) -> Ending {
        Ending::of(&Attestation { source_state, destination_state, source_retransmissions, ..Attestation::by_agent(0) })
    }

    #[test]
    fn the_missing_fin_tells_who_reset() {
        for (source, destination, retransmissions, expected) in [
            (DONE, DONE, 3, "complete"),
            (DONE, UP | side::FINISHED | side::CLOSED, 0, "complete"),
            (UP | side::CLOSED, DONE, 0, "client_reset"),
            (DONE, UP | side::CLOSED, 0, "app_reset"),
            (UP | side::CLOSED, UP | side::CLOSED, 0, "reset"),
            (side::CLOSED, 0, 0, "refused"),
            (UP | side::CLOSED, 0, 3, "no_answer"),
            (side::CLOSED, 0, 6, "no_answer"),
        ] {
            let ending = ended(source, destination, retransmissions);
            let reason = match ending.end() {
                End::Failed { reason, .. } => reason,
                _ => "complete",
            };
            assert_eq!(reason, expected);
            assert_eq!(
                ending.plain().is_some(),
                destination & UP != 0,
                "{expected}: only what carried bytes has an outline"
            );
        }
    }

    #[test]
    fn plain_endings_have_numbers_of_their_own() {
        let plain = [
            Ending::Complete,
            Ending::ClientReset,
            Ending::AppReset,
            Ending::Reset,
            Ending::PodLeft,
            Ending::Unreported,
        ];
        let numbers: Vec<_> = plain.iter().filter_map(Ending::plain).collect();
        assert_eq!(numbers, (0..Ending::PLAIN).collect::<Vec<_>>());
    }
}
