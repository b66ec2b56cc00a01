//! One line per connection, at its end: who talked to whom, how it was protected, how much, and why it ended.
//!
//! Lines go through a bounded queue to a thread of their own. A reader that can't keep up costs lines, which are
//! counted, never traffic; connections that carried nothing are told of so many times a second, for each pod. Whatever a peer
//! or an error text holds, a line stays one line.
//!
//! A line is made in two steps: its [`Outline`], which connections between the same two ends share, and what is left
//! open in it.

use std::{
    borrow::Cow,
    fs::OpenOptions,
    io::{self, BufWriter, Write},
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use heddle_common::HBONE_PORT;
use serde::Serialize;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};

use super::{
    metrics::{direction_name, security_name},
    suppress::Suppress,
};
use crate::{
    life::limits,
    policy::Denial,
    tunnel::{Direction, End, Flow},
};

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// `time TAB level TAB target TAB message TAB key=value …`.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    Stdout,
    /// Appended to, so that a log rotation that truncates works.
    File(PathBuf),
}

/// The access log.
#[derive(Debug, Clone)]
pub struct AccessLog {
    format: Format,
    writer: NonBlocking,
    dropped: ErrorCounter,
    suppress: Arc<Suppress>,
}

impl AccessLog {
    /// Opens the destination. Dropping the guard writes what is queued.
    ///
    /// # Errors
    /// When the file can't be opened for appending.
    pub fn open(destination: &Destination, format: Format) -> io::Result<(Self, WorkerGuard)> {
        match destination {
            Destination::Stdout => Ok(Self::to(io::stdout(), format, limits::LOG_LINES)),
            Destination::File(path) => {
                Ok(Self::to(OpenOptions::new().append(true).create(true).open(path)?, format, limits::LOG_LINES))
            }
        }
    }

    /// A log that writes to `writer` on a thread of its own and queues at most `lines`.
    pub(super) fn to(writer: impl Write + Send + 'static, format: Format, lines: usize) -> (Self, WorkerGuard) {
        let (writer, guard) = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(lines)
            .thread_name("access-log")
            // The thread flushes whenever it has taken all there is; lines that come fast share a system call, whole.
            .finish(BufWriter::with_capacity(limits::LOG_WRITE, writer));
        (Self { format, dropped: writer.error_counter(), writer, suppress: Arc::default() }, guard)
    }

    /// Queues a connection's line, or drops it and counts that. False where the pod had enough of its kind in this second.
    pub fn write(&self, record: &Record<'_>) -> bool {
        self.write_for(record, 1)
    }

    /// The same for `count` connections that are told of in one line.
    pub fn write_for(&self, record: &Record<'_>, count: u64) -> bool {
        let before = match record.carried {
            Some(_) => Some(count.saturating_sub(1)),
            None => self.suppress.admit(record.flow, record.end, count, Instant::now()),
        };
        let Some(before) = before else { return false };
        self.queue(&record.line_after(before, self.format));
        true
    }

    /// The outline of a line like this one.
    pub(super) fn outline(&self, record: &Record<'_>) -> Outline {
        record.outline(0, self.format)
    }

    /// Queues a line, or drops it and counts that.
    pub(super) fn queue(&self, line: &[u8]) {
        // Lossy: it never blocks, and a line that does not fit is in `dropped`.
        let _always_ok = self.writer.clone().write_all(line);
    }

    /// Lines dropped so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.dropped_lines() as u64
    }
}

/// What one line tells.
#[derive(Debug)]
pub struct Record<'a> {
    pub time: SystemTime,
    /// Name of the cluster that known workloads belong to.
    pub cluster: &'a str,
    pub flow: &'a Flow,
    pub end: &'a End,
    /// Bytes from client to app and from app to client, and the time it lasted; `None` when it failed before a byte.
    pub carried: Option<((u64, u64), Duration)>,
}

enum Value<'a> {
    /// Can hold anything: quoted and escaped in both formats.
    Text(Cow<'a, str>),
    /// Made of characters that need no quotes in the text format: addresses.
    Word(String),
    Number(u64),
    /// Differs between connections of the same two ends.
    Open(Open),
}

/// What an [`Outline`] leaves open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    Time,
    Source,
    ToApp,
    ToClient,
    Lasted,
}

/// What tells a connection's line from that of another one between the same two ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Particulars {
    pub time: SystemTime,
    pub source: SocketAddr,
    /// From client to app and from app to client.
    pub bytes: (u64, u64),
    pub lasted: Duration,
}

/// [`Particulars`] as text, made once for both of a connection's lines; its memory serves the next connection.
#[derive(Debug, Default)]
pub(super) struct Printed {
    text: Vec<u8>,
    /// Where each of [`Open`] ends, in their order.
    ends: [usize; 5],
}

impl Printed {
    pub fn print(&mut self, particulars: &Particulars) {
        let Particulars { time, source, bytes: (to_app, to_client), lasted } = particulars;
        self.text.clear();
        for (open, end) in
            [Open::Time, Open::Source, Open::ToApp, Open::ToClient, Open::Lasted].iter().zip(&mut self.ends)
        {
            let text = &mut self.text;
            // Into a Vec: it can't fail.
            let _always_ok = match open {
                Open::Time => write!(text, "{}", humantime::format_rfc3339_micros(*time)),
                Open::Source => write!(text, "{source}"),
                Open::ToApp => write!(text, "{to_app}"),
                Open::ToClient => write!(text, "{to_client}"),
                Open::Lasted => write!(text, "{}ms", lasted.as_millis()),
            };
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
pub(super) struct Outline {
    text: Vec<u8>,
    /// Where something is left open, in order.
    open: Vec<(usize, Open)>,
}

impl Outline {
    /// Appends the line with its line feed.
    pub fn fill(&self, printed: &Printed, line: &mut Vec<u8>) {
        let mut from = 0;
        for (at, open) in &self.open {
            line.extend_from_slice(self.text.get(from..*at).unwrap_or_default());
            line.extend_from_slice(printed.get(*open));
            from = *at;
        }
        line.extend_from_slice(self.text.get(from..).unwrap_or_default());
    }

    fn leave(&mut self, open: Open) {
        self.open.push((self.text.len(), open));
    }

    fn quoted(&mut self, open: Open) {
        self.text.push(b'"');
        self.leave(open);
        self.text.push(b'"');
    }
}

impl Record<'_> {
    /// The line with its line feed.
    #[must_use]
    pub fn line(&self, format: Format) -> Vec<u8> {
        self.line_after(0, format)
    }

    /// The line, which also tells of `suppressed` ones of its kind.
    fn line_after(&self, suppressed: u64, format: Format) -> Vec<u8> {
        let (bytes, lasted) = self.carried.unwrap_or_default();
        let (mut printed, mut line) = (Printed::default(), Vec::with_capacity(768));
        printed.print(&Particulars { time: self.time, source: self.flow.source, bytes, lasted });
        self.outline(suppressed, format).fill(&printed, &mut line);
        line
    }

    fn outline(&self, suppressed: u64, format: Format) -> Outline {
        let (level, message) = match (self.end, &self.carried) {
            (End::Complete, _) => ("info", "connection complete"),
            (End::Failed { .. }, _) => ("warn", "connection failed"),
            (End::Denied(_), _) => ("warn", "connection denied"),
        };
        let mut fields = self.fields();
        if suppressed > 0 {
            fields.push(("suppressed", Value::Number(suppressed)));
        }
        let mut line = Outline { text: Vec::with_capacity(768), open: Vec::with_capacity(5) };
        match format {
            Format::Text => {
                line.leave(Open::Time);
                line.text.extend_from_slice(format!("\t{level}\taccess\t{message}").as_bytes());
                for (index, (key, value)) in fields.iter().enumerate() {
                    line.text.push(if index == 0 { b'\t' } else { b' ' });
                    line.text.extend_from_slice(key.as_bytes());
                    line.text.push(b'=');
                    match value {
                        Value::Text(text) => quote(&mut line.text, text),
                        Value::Word(word) => line.text.extend_from_slice(word.as_bytes()),
                        Value::Number(number) => line.text.extend_from_slice(number.to_string().as_bytes()),
                        Value::Open(open @ (Open::Time | Open::Lasted)) => line.quoted(*open),
                        Value::Open(open) => line.leave(*open),
                    }
                }
            }
            Format::Json => {
                line.text.push(b'{');
                member(&mut line.text, "time");
                line.quoted(Open::Time);
                for (key, value) in [("level", level), ("target", "access"), ("message", message)] {
                    member(&mut line.text, key);
                    quote(&mut line.text, value);
                }
                for (key, value) in &fields {
                    member(&mut line.text, key);
                    match value {
                        Value::Text(text) => quote(&mut line.text, text),
                        Value::Word(word) => quote(&mut line.text, word),
                        Value::Number(number) => line.text.extend_from_slice(number.to_string().as_bytes()),
                        Value::Open(open @ (Open::ToApp | Open::ToClient)) => line.leave(*open),
                        Value::Open(open) => line.quoted(*open),
                    }
                }
                line.text.push(b'}');
            }
        }
        line.text.push(b'\n');
        line
    }

    /// The fields in order, those without a value left out.
    fn fields(&self) -> Vec<(&'static str, Value<'_>)> {
        let flow = self.flow;
        let authenticated = flow.security.authenticates();
        let text = |value: &str| (!value.is_empty()).then(|| Value::Text(Cow::Owned(value.to_owned())));
        let source = flow.source_workload.as_deref();
        let destination = flow.destination_workload.as_deref();
        let identity = |id: &Option<crate::identity::SpiffeId>| {
            id.as_ref().filter(|_| authenticated).and_then(|id| text(id.as_str()))
        };
        let carried = |open: Open| self.carried.map(|_| Value::Open(open));
        let (sent, received) = match flow.direction {
            Direction::Outbound => (Open::ToApp, Open::ToClient),
            Direction::Inbound => (Open::ToClient, Open::ToApp),
        };
        let (flags, reason, policy, error) = self.outcome();
        let fields = [
            ("src.addr", Some(Value::Open(Open::Source))),
            ("src.workload", source.and_then(|workload| text(&workload.name))),
            ("src.namespace", source.and_then(|workload| text(&workload.namespace))),
            ("src.cluster", source.and_then(|_| text(self.cluster))),
            ("src.identity", identity(&flow.source_principal)),
            ("dst.addr", Some(Value::Word(reached(flow).to_string()))),
            ("dst.hbone_addr", flow.hbone_target.map(|target| Value::Word(target.to_string()))),
            ("dst.service", flow.destination_service.as_deref().and_then(|service| text(&service.hostname))),
            ("dst.workload", destination.and_then(|workload| text(&workload.name))),
            ("dst.namespace", destination.and_then(|workload| text(&workload.namespace))),
            ("dst.cluster", destination.and_then(|_| text(self.cluster))),
            ("dst.identity", identity(&flow.destination_principal)),
            ("direction", text(direction_name(flow.direction))),
            ("security", text(security_name(flow.security))),
            ("bytes_sent", carried(sent)),
            ("bytes_recv", carried(received)),
            ("duration", carried(Open::Lasted)),
            ("response_flags", text(flags)),
            ("reason", text(reason)),
            ("policy", text(&policy)),
            ("error", text(&error)),
            ("trace_id", flow.trace.as_ref().and_then(|trace| text(&trace.to_string()))),
        ];
        fields.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
    }

    /// Response flags, reason, policy that denied, error text.
    fn outcome(&self) -> (&'static str, &'static str, String, String) {
        match self.end {
            End::Complete => (response_flags(self.end), "", String::new(), String::new()),
            End::Failed { reason, detail, .. } => {
                let end = detail.floor_char_boundary(limits::LOG_DETAIL);
                (response_flags(self.end), reason, String::new(), detail[..end].to_owned())
            }
            End::Denied(denial) => {
                let policy = denial.policy().map(|policy| policy.to_string()).unwrap_or_default();
                (response_flags(self.end), denial.reason(), policy, denied(denial, self.carried.is_some()))
            }
        }
    }
}

/// What is said of a denial: at the start, or of a connection that was `carried` until then.
pub(super) fn denied(denial: &Denial, carried: bool) -> String {
    if carried { format!("connection closed due to policy change: {denial}") } else { denial.to_string() }
}

/// `response_flags` of metrics and log: `-`, `DENY`, or what the tunnel says of a failure.
#[must_use]
pub fn response_flags(end: &End) -> &'static str {
    match end {
        End::Complete => super::traffic::NO_FLAGS,
        End::Failed { response_flags, .. } => response_flags,
        End::Denied(_) => "DENY",
    }
}

fn member(line: &mut Vec<u8>, key: &str) {
    if line.len() > 1 {
        line.push(b',');
    }
    quote(line, key);
    line.push(b':');
}

fn quote(line: &mut Vec<u8>, text: &str) {
    let mut serializer = serde_json::Serializer::with_formatter(line, OneLine);
    // A string into a Vec: neither can fail.
    let _always_ok = text.serialize(&mut serializer);
}

/// JSON strings in which also those characters are escaped that a terminal or a log reader may act on: DEL and the
/// C1 controls, line and paragraph separators, and the marks that reverse the direction of text.
struct OneLine;

impl serde_json::ser::Formatter for OneLine {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some((at, found)) = rest.char_indices().find(|(_, character)| acts(*character)) {
            writer.write_all(&rest.as_bytes()[..at])?;
            write!(writer, "\\u{:04x}", u32::from(found))?;
            rest = &rest[at + found.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }
}

/// All of them are in the basic plane, so one `\uXXXX` is enough.
fn acts(character: char) -> bool {
    matches!(character, '\u{7f}'..='\u{9f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// What was connected to on the wire: port 15008 of the pod for a tunnel, on both sides, so that their lines match.
fn reached(flow: &Flow) -> SocketAddr {
    match (flow.direction, flow.hbone_target) {
        (Direction::Outbound, Some(target)) => SocketAddr::new(target.ip(), HBONE_PORT),
        _ => flow.destination,
    }
}
