//! What is wrong with a signing key that was offered: which file or Secret key, what about it, and what to do.

/// Why what a source holds can't be signed with. Its text is the one line that an operator gets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}; {}", .problem.fix())]
pub struct KeyError {
    /// A path, or the key of a Secret.
    pub place: String,
    pub problem: KeyProblem,
}

/// What about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyProblem {
    #[error("is missing")]
    Missing,
    #[error("can't be read: {0}")]
    Unreadable(String),
    #[error("holds no certificates in PEM: {0}")]
    Certificates(String),
    #[error("certificate {0} is no CA certificate")]
    NotCa(usize),
    #[error("holds no private key in PEM: {0}")]
    Key(String),
    #[error("is not the key of the certificate in {0}")]
    Mismatch(String),
    #[error("certificate {0} is not signed by the one after it")]
    Chain(usize),
    #[error("the chain ends at {0:?}, and who signed that is not there")]
    NoRoot(String),
    #[error("lacks {0:?}, the root of the issuing certificate")]
    NotInBundle(String),
    #[error("{subject:?} expired at {at}")]
    Expired { subject: String, at: String },
    #[error("{subject:?} is not valid before {at}")]
    NotYet { subject: String, at: String },
}

impl KeyError {
    pub(in crate::identity::ca) fn new(place: impl Into<String>, problem: KeyProblem) -> Self {
        Self { place: place.into(), problem }
    }

    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self.problem {
            KeyProblem::Missing => "missing",
            KeyProblem::Unreadable(_) => "unreadable",
            KeyProblem::Certificates(_) => "certificate_invalid",
            KeyProblem::NotCa(_) => "not_a_ca",
            KeyProblem::Key(_) => "key_invalid",
            KeyProblem::Mismatch(_) => "key_mismatch",
            KeyProblem::Chain(_) => "chain_broken",
            KeyProblem::NoRoot(_) => "no_root",
            KeyProblem::NotInBundle(_) => "bundle_lacks_root",
            KeyProblem::Expired { .. } => "expired",
            KeyProblem::NotYet { .. } => "not_yet_valid",
        }
    }
}

impl KeyProblem {
    fn fix(&self) -> &'static str {
        match self {
            Self::Missing => "put it there",
            Self::Unreadable(_) => "make it a small file that heddle's user may read",
            Self::Certificates(_) => "put PEM certificates there: the issuing one first, then each one's signer",
            Self::NotCa(_) => "leave only CA certificates in it",
            Self::Key(_) => "put the issuing certificate's key there, unencrypted, in PEM",
            Self::Mismatch(_) => "put certificate and key of one pair there",
            Self::Chain(_) => "order it: the issuing certificate first, then each one's signer",
            Self::NoRoot(_) => "add the certificates up to the root, here or in the trust bundle",
            Self::NotInBundle(_) => "add that root",
            Self::Expired { .. } => "put one that is valid there",
            Self::NotYet { .. } => "look at this machine's clock",
        }
    }
}
