//! W3C trace context of a tunnelled connection: one trace per connection, one span on each side of it. Pure.
//!
//! The offering side begins the trace and says so in `traceparent`; the answering side's span is a child of it. A trace
//! names nobody and proves nothing: it is for logs and for spans.

use std::{fmt, time::SystemTime};

/// This side's span of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trace {
    /// 16 octets, not zero.
    pub trace_id: u128,
    /// This side's span, 8 octets, not zero.
    pub span_id: u64,
    /// The span that this one is a child of; `None` for the one that began the trace.
    pub parent: Option<u64>,
    /// Whether whoever began the trace exports its spans; then this side does too, if it exports any.
    pub sampled: bool,
    /// When this side began to work on the connection.
    pub began: SystemTime,
}

impl Trace {
    /// A new trace.
    #[must_use]
    pub fn begin(sampled: bool) -> Self {
        let (trace_id, span_id) = (fastrand::u128(1..), fastrand::u64(1..));
        Self { trace_id, span_id, parent: None, sampled, began: SystemTime::now() }
    }

    /// This side's span of the trace that `traceparent` (W3C Trace Context §3.2) names; `None` where it is malformed.
    #[must_use]
    pub fn join(traceparent: &str) -> Option<Self> {
        let mut parts = traceparent.split('-');
        let mut part = |length: usize| parts.next().filter(|part| part.len() == length && part.bytes().all(is_digit));
        let (version, trace_id, parent, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        // Version ff is forbidden; version 00 has these four parts and no more, later ones may have more.
        if version == "ff" || version == "00" && parts.next().is_some() {
            return None;
        }
        let trace_id = u128::from_str_radix(trace_id, 16).ok().filter(|id| *id != 0)?;
        let parent = u64::from_str_radix(parent, 16).ok().filter(|id| *id != 0)?;
        let sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
        Some(Self { trace_id, parent: Some(parent), ..Self::begin(sampled) })
    }

    /// The other side's span, where that is this agent's too.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { trace_id: self.trace_id, parent: Some(self.span_id), ..Self::begin(self.sampled) }
    }

    /// The value of `traceparent` that makes the peer's span a child of this one.
    #[must_use]
    pub fn traceparent(&self) -> String {
        format!("00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled))
    }
}

/// The trace id, 32 hex digits.
impl fmt::Display for Trace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:032x}", self.trace_id)
    }
}

/// Lower-case hex only (§3.2.2).
fn is_digit(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    #[test]
    fn a_traceparent_is_joined_as_its_child() {
        let joined = Trace::join(&format!("00-{ID}-{SPAN}-01")).unwrap();
        assert_eq!(
            (joined.to_string().as_str(), joined.parent, joined.sampled),
            (ID, Some(0xb7ad_6b71_6920_3331), true)
        );
        assert_ne!(joined.parent, Some(joined.span_id));
        assert!(!Trace::join(&format!("00-{ID}-{SPAN}-00")).unwrap().sampled);
        assert!(Trace::join(&format!("00-{ID}-{SPAN}-03")).unwrap().sampled, "other flags are left alone");
        assert!(Trace::join(&format!("cc-{ID}-{SPAN}-01-what-the-future-brings")).is_some());
    }

    #[test]
    fn what_one_side_says_the_other_joins() {
        for sampled in [false, true] {
            let offered = Trace::begin(sampled);
            let answered = Trace::join(&offered.traceparent()).unwrap();
            assert_eq!((answered.trace_id, answered.parent), (offered.trace_id, Some(offered.span_id)));
            assert_eq!((answered.sampled, offered.parent), (sampled, None));
            let child = offered.child();
            assert_eq!((child.trace_id, child.parent, child.sampled), (answered.trace_id, answered.parent, sampled));
            assert_ne!(child.span_id, offered.span_id);
        }
    }

    #[test]
    fn a_malformed_traceparent_is_no_trace() {
        for bad in [
            String::new(),
            ID.to_owned(),
            format!("00-{ID}"),
            format!("00-{ID}-{SPAN}"),
            format!("00-{ID}-{SPAN}-"),
            format!("00-{ID}-{SPAN}-1"),
            format!("00-{ID}-{SPAN}-01-more"),
            format!("ff-{ID}-{SPAN}-01"),
            format!("0-{ID}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{ID}-{}-01", "0".repeat(16)),
            format!("00-{}-{SPAN}-01", ID.to_uppercase()),
            format!("00-{}g-{SPAN}-01", &ID[..31]),
            format!("00-+{}-{SPAN}-01", &ID[..31]),
            format!("00-{ID}-{SPAN}-zz"),
            format!(" 00-{ID}-{SPAN}-01"),
        ] {
            assert_eq!(Trace::join(&bad), None, "{bad:?}");
        }
    }
}
