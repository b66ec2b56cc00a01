//! A line in two steps: its outline, which connections between the same two ends share, and what is left open in it.
//!
//! Two lines of each connection are made of these, thousands of them a second: nothing here asks for memory once it has some.

use std::{
    io::Write,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// What an [`Outline`] leaves open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Open {
    Time,
    /// The client's.
    Port,
    ToApp,
    ToClient,
    Lasted,
}

/// What tells a connection's line from that of another one between the same two ends.
#[derive(Debug, Clone, Copy)]
pub(in crate::telemetry) struct Particulars {
    pub time: SystemTime,
    /// The client's.
    pub port: u16,
    /// From client to app and from app to client.
    pub bytes: (u64, u64),
    pub lasted: Duration,
}

/// [`Particulars`] as text, made once for both of a connection's lines; its memory serves the next connection.
#[derive(Debug, Default)]
pub(in crate::telemetry) struct Printed {
    text: Vec<u8>,
    /// Where each of [`Open`] ends, in their order.
    ends: [usize; 5],
    time: Time,
}

/// A time of day as text. Times that follow each other mostly differ in their microseconds alone.
#[derive(Debug, Default)]
struct Time {
    /// Since the epoch; what `text` was made of.
    seconds: u64,
    /// Empty until there is one.
    text: Vec<u8>,
}

impl Time {
    /// Where the microseconds are in `2026-09-21T14:13:20.123456Z`.
    const MICROSECONDS: std::ops::Range<usize> = 20..26;

    fn print(&mut self, time: SystemTime) -> &[u8] {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.text.is_empty() || self.seconds != since.as_secs() {
            self.text.clear();
            // Into a Vec: it can't fail.
            let _always_ok = write!(self.text, "{}", humantime::format_rfc3339_micros(UNIX_EPOCH + since));
            self.seconds = since.as_secs();
        } else if let Some(digits) = self.text.get_mut(Self::MICROSECONDS) {
            let mut rest = since.subsec_micros();
            for digit in digits.iter_mut().rev() {
                *digit = b'0' + (rest % 10) as u8;
                rest /= 10;
            }
        }
        &self.text
    }
}

impl Printed {
    pub fn print(&mut self, particulars: &Particulars) {
        let Particulars { time, port, bytes: (to_app, to_client), lasted } = particulars;
        let Self { text, ends, time: clock } = self;
        let mut number = itoa::Buffer::new();
        text.clear();
        for (open, end) in [Open::Time, Open::Port, Open::ToApp, Open::ToClient, Open::Lasted].iter().zip(ends) {
            match open {
                Open::Time => text.extend_from_slice(clock.print(*time)),
                Open::Port => text.extend_from_slice(number.format(*port).as_bytes()),
                Open::ToApp => text.extend_from_slice(number.format(*to_app).as_bytes()),
                Open::ToClient => text.extend_from_slice(number.format(*to_client).as_bytes()),
                Open::Lasted => {
                    text.extend_from_slice(number.format(lasted.as_millis()).as_bytes());
                    text.extend_from_slice(b"ms");
                }
            }
            *end = text.len();
        }
    }

    fn get(&self, open: Open) -> &[u8] {
        let at = open as usize;
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        self.text.get(start..self.ends[at]).unwrap_or_default()
    }
}

/// A line but for its [`Particulars`].
#[derive(Debug)]
pub(in crate::telemetry) struct Outline {
    pub(super) text: Vec<u8>,
    /// Where something is left open, in order.
    open: Vec<(usize, Open)>,
}

impl Default for Outline {
    fn default() -> Self {
        Self { text: Vec::with_capacity(768), open: Vec::with_capacity(5) }
    }
}

impl Outline {
    /// Appends the line with its line feed.
    pub fn fill(&self, printed: &Printed, line: &mut Vec<u8>) {
        line.reserve(self.text.len() + printed.text.len());
        let mut from = 0;
        for (at, open) in &self.open {
            line.extend_from_slice(self.text.get(from..*at).unwrap_or_default());
            line.extend_from_slice(printed.get(*open));
            from = *at;
        }
        line.extend_from_slice(self.text.get(from..).unwrap_or_default());
    }

    pub(super) fn leave(&mut self, open: Open) {
        self.open.push((self.text.len(), open));
    }

    pub(super) fn quoted(&mut self, open: Open) {
        self.text.push(b'"');
        self.leave(open);
        self.text.push(b'"');
    }
}
