//! What one line tells, and how it looks.
//!
//! Whatever a peer or an error text holds, a line stays one line.

use std::{
    borrow::Cow,
    io::{self, Write},
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use heddle_common::HBONE_PORT;
use serde::Serialize;

use super::{
    Format,
    outline::{Open, Outline, Particulars, Printed},
};
use crate::{
    life::limits,
    policy::Denial,
    telemetry::metrics::{direction_name, security_name},
    tunnel::{Direction, End, Flow},
};

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
    /// The client's address up to its port, which differs between connections of the same two ends.
    Client(String),
    /// Differs as well.
    Open(Open),
}

impl Record<'_> {
    /// Appends the line with its line feed; it also tells of `suppressed` ones of its kind.
    pub(in crate::telemetry) fn append(&self, suppressed: u64, format: Format, lines: &mut Vec<u8>) {
        let (bytes, lasted) = self.carried.unwrap_or_default();
        let mut printed = Printed::default();
        printed.print(&Particulars { time: self.time, port: self.flow.source.port(), bytes, lasted });
        self.outline(suppressed, format).fill(&printed, lines);
    }

    pub(super) fn outline(&self, suppressed: u64, format: Format) -> Outline {
        let (level, message) = match (self.end, &self.carried) {
            (End::Complete, _) => ("info", "connection complete"),
            (End::Failed { .. }, _) => ("warn", "connection failed"),
            (End::Denied(_), _) => ("warn", "connection denied"),
        };
        let mut fields = self.fields();
        if suppressed > 0 {
            fields.push(("suppressed", Value::Number(suppressed)));
        }
        let mut line = Outline::default();
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
                        Value::Client(host) => {
                            line.text.extend_from_slice(host.as_bytes());
                            line.leave(Open::Port);
                        }
                        Value::Open(open @ Open::Lasted) => line.quoted(*open),
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
                        Value::Client(host) => {
                            line.text.push(b'"');
                            line.text.extend_from_slice(host.as_bytes());
                            line.leave(Open::Port);
                            line.text.push(b'"');
                        }
                        Value::Open(open @ Open::Lasted) => line.quoted(*open),
                        Value::Open(open) => line.leave(*open),
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
            ("src.addr", Some(Value::Client(without_port(flow.source)))),
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
pub(in crate::telemetry) fn denied(denial: &Denial, carried: bool) -> String {
    if carried { format!("connection closed due to policy change: {denial}") } else { denial.to_string() }
}

/// `response_flags` of metrics and log: `-`, `DENY`, or what the tunnel says of a failure.
#[must_use]
pub fn response_flags(end: &End) -> &'static str {
    match end {
        End::Complete => crate::telemetry::traffic::NO_FLAGS,
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

/// An address up to and with the colon before its port.
fn without_port(address: SocketAddr) -> String {
    let mut text = address.to_string();
    text.truncate(text.rfind(':').map_or(0, |colon| colon + 1));
    text
}

/// What was connected to on the wire: port 15008 of the pod for a tunnel, on both sides, so that their lines match.
fn reached(flow: &Flow) -> SocketAddr {
    match (flow.direction, flow.hbone_target) {
        (Direction::Outbound, Some(target)) => SocketAddr::new(target.ip(), HBONE_PORT),
        _ => flow.destination,
    }
}
