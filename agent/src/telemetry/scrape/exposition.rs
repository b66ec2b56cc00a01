//! What a pod answered → families of samples that carry the pod's labels, or why it is no exposition.
//!
//! Pure. It takes Prometheus' text format 0.0.4 and OpenMetrics 1.0 and gives the former, so what only the latter has (exemplars,
//! units) is left out. A pod is not believed: a line that is not to the letter makes the whole answer invalid, as it does for
//! Prometheus, and a label that says another pod's name is renamed. Values are passed on as they are written.

use std::{borrow::Cow, collections::HashMap};

use crate::life::limits;

/// Names that are the agent's own.
pub const RESERVED: &str = "heddle_scrape_";
/// What Prometheus puts before a label of the target's that has the name of one of its own.
const EXPORTED: &str = "exported_";

/// Types of the text format 0.0.4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
    Summary,
    Untyped,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Summary => "summary",
            Self::Untyped => "untyped",
        }
    }

    /// Endings that samples of a family of this type have; the empty one is the family's own name.
    pub fn suffixes(self) -> &'static [&'static str] {
        match self {
            Self::Histogram => &["_bucket", "_sum", "_count"],
            Self::Summary => &["", "_sum", "_count"],
            _ => &[""],
        }
    }
}

/// Which of the two formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Text,
    OpenMetrics,
}

impl Format {
    /// By the answer's `Content-Type`.
    pub fn of(content_type: &str) -> Self {
        let media = content_type.split(';').next().unwrap_or_default().trim();
        if media.eq_ignore_ascii_case("application/openmetrics-text") { Self::OpenMetrics } else { Self::Text }
    }
}

/// Samples of one name and their description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Family {
    pub name: String,
    pub kind: Kind,
    /// As it is written, escapes included; empty where there is none.
    pub help: String,
    pub samples: Vec<Sample>,
}

/// One line, without its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// What its name has beyond the family's.
    pub suffix: &'static str,
    pub line: String,
}

/// Why an answer is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExpositionError {
    #[error("line {0} is no sample, no TYPE and no HELP of the text format")]
    Line(usize),
    #[error("line {0}: names that begin with {RESERVED} are the agent's")]
    Reserved(usize),
    #[error("it has more than {} samples", limits::SCRAPE_SAMPLES_PER_POD)]
    TooMany,
}

impl ExpositionError {
    /// Stable name: metric label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Line(_) | Self::Reserved(_) => "invalid",
            Self::TooMany => "too_many_samples",
        }
    }
}

/// What `# TYPE`, `# HELP` said of a name.
#[derive(Debug, Default)]
struct Described<'a> {
    kind: Option<&'a str>,
    help: Cow<'a, str>,
}

/// Reads an answer; every sample gets `own` labels (names that are labels, values that are not escaped yet).
pub fn read(text: &str, format: Format, own: &[(&str, &str)]) -> Result<Vec<Family>, ExpositionError> {
    let mut described = HashMap::<&str, Described>::new();
    let mut families = Vec::<Family>::new();
    let mut places = HashMap::<(String, Kind), usize>::new();
    let prefix = own.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect::<Vec<_>>().join(",");
    let mut samples = 0;
    for (number, line) in (1..).zip(text.split('\n')) {
        let line = line.trim_matches([' ', '\t', '\r']);
        if line.is_empty() {
            continue;
        }
        if let Some(comment) = line.strip_prefix('#') {
            if format == Format::OpenMetrics && comment == " EOF" {
                break;
            }
            comment_of(comment, &mut described).ok_or(ExpositionError::Line(number))?;
            continue;
        }
        let sample = Raw::read(line, format).ok_or(ExpositionError::Line(number))?;
        if sample.name.starts_with(RESERVED) {
            return Err(ExpositionError::Reserved(number));
        }
        samples += 1;
        if samples > limits::SCRAPE_SAMPLES_PER_POD {
            return Err(ExpositionError::TooMany);
        }
        let (name, suffix, kind, help) = place(sample.name, &described, format);
        let at = *places.entry((name.to_owned(), kind)).or_insert_with(|| {
            families.push(Family { name: name.to_owned(), kind, help: help.to_owned(), samples: Vec::new() });
            families.len() - 1
        });
        if let Some(family) = families.get_mut(at) {
            family.samples.push(Sample { suffix, line: sample.write(&prefix, own) });
        }
    }
    Ok(families)
}

/// Takes note of a comment; `None` where it begins as a description and is none.
fn comment_of<'a>(comment: &'a str, described: &mut HashMap<&'a str, Described<'a>>) -> Option<()> {
    let comment = comment.trim_start_matches([' ', '\t']);
    let (word, rest) = comment.split_once([' ', '\t']).unwrap_or((comment, ""));
    if !matches!(word, "TYPE" | "HELP" | "UNIT") {
        return Some(());
    }
    let rest = rest.trim_start_matches([' ', '\t']);
    let (name, text) = rest.split_once([' ', '\t']).unwrap_or((rest, ""));
    if name_end(name, true) != name.len() || name.is_empty() {
        return None;
    }
    let known = described.entry(name).or_default();
    match word {
        "TYPE" => {
            let kind = text.trim();
            const KINDS: [&str; 9] = [
                "counter",
                "gauge",
                "histogram",
                "summary",
                "untyped",
                "unknown",
                "info",
                "stateset",
                "gaugehistogram",
            ];
            known.kind = Some(KINDS.contains(&kind).then_some(kind)?);
        }
        // OpenMetrics escapes quotes too.
        "HELP" => known.help = if text.contains("\\\"") { text.replace("\\\"", "\"").into() } else { text.into() },
        _ => {}
    }
    Some(())
}

/// The family of a sample: its name, the rest of the sample's, its type and its help.
fn place<'a>(
    sample: &'a str,
    described: &'a HashMap<&str, Described<'_>>,
    format: Format,
) -> (&'a str, &'static str, Kind, &'a str) {
    const SUFFIXES: [&str; 9] = ["", "_bucket", "_sum", "_count", "_total", "_created", "_info", "_gsum", "_gcount"];
    for suffix in SUFFIXES {
        let Some(base) = sample.strip_suffix(suffix) else { continue };
        let Some(Described { kind: Some(kind), help }) = described.get(base) else { continue };
        let kind = match *kind {
            "histogram" => Kind::Histogram,
            "summary" => Kind::Summary,
            // Of OpenMetrics' counter `x` the samples are `x_total` and `x_created`.
            "counter" if suffix == "_total" || suffix.is_empty() => return (sample, "", Kind::Counter, help),
            "gauge" | "stateset" if suffix.is_empty() => Kind::Gauge,
            "info" if suffix == "_info" => return (sample, "", Kind::Gauge, help),
            "counter" if suffix == "_created" => return (sample, "", Kind::Gauge, ""),
            "untyped" | "unknown" if suffix.is_empty() => Kind::Untyped,
            _ => continue,
        };
        if kind.suffixes().contains(&suffix) {
            return (base, suffix, kind, help);
        }
        if suffix == "_created" && format == Format::OpenMetrics {
            return (sample, "", Kind::Gauge, "");
        }
    }
    (sample, "", Kind::Untyped, "")
}

/// A sample's line, taken apart.
#[derive(Debug)]
struct Raw<'a> {
    name: &'a str,
    /// Names, and values as they are written between their quotes.
    labels: Vec<(&'a str, &'a str)>,
    value: &'a str,
    /// Milliseconds.
    timestamp: Option<u64>,
}

impl<'a> Raw<'a> {
    fn read(line: &'a str, format: Format) -> Option<Self> {
        let end = name_end(line, true);
        let (name, rest) = line.split_at_checked(end)?;
        if name.is_empty() {
            return None;
        }
        let rest = rest.trim_start_matches([' ', '\t']);
        let (labels, rest) = match rest.strip_prefix('{') {
            Some(inside) => labels(inside)?,
            None => (Vec::new(), rest),
        };
        let rest = match format {
            Format::OpenMetrics => rest.split_once(" # ").map_or(rest, |(sample, _exemplar)| sample),
            Format::Text => rest,
        };
        let mut words = rest.split_ascii_whitespace();
        let value = words.next().filter(|value| is_value(value))?;
        let timestamp = words.next().map(|text| timestamp(text, format).ok_or(())).transpose().ok()?;
        words.next().is_none().then_some(Self { name, labels, value, timestamp })
    }

    fn write(&self, prefix: &str, own: &[(&str, &str)]) -> String {
        let mut line = String::with_capacity(self.name.len() + prefix.len() + 32 * (1 + self.labels.len()));
        line.push_str(self.name);
        line.push('{');
        line.push_str(prefix);
        for (name, value) in &self.labels {
            line.push(',');
            let taken = |name: &str| own.iter().any(|(mine, _)| *mine == name);
            let exists = |name: &str| self.labels.iter().any(|(other, _)| *other == name);
            if taken(name) {
                let mut renamed = format!("{EXPORTED}{name}");
                while taken(&renamed) || exists(&renamed) {
                    renamed.insert_str(0, EXPORTED);
                }
                line.push_str(&renamed);
            } else {
                line.push_str(name);
            }
            line.push_str("=\"");
            push_escaped(&mut line, value);
            line.push('"');
        }
        line.push_str("} ");
        line.push_str(self.value);
        if let Some(timestamp) = self.timestamp {
            line.push_str(&format!(" {timestamp}"));
        }
        line
    }
}

/// Labels after the opening brace, and what stands after the closing one.
fn labels(mut rest: &str) -> Option<(Vec<(&str, &str)>, &str)> {
    let mut labels: Vec<(&str, &str)> = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t']);
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (name, after) = rest.split_at_checked(name_end(rest, false))?;
        let after = after.trim_start_matches([' ', '\t']).strip_prefix('=')?;
        let inside = after.trim_start_matches([' ', '\t']).strip_prefix('"')?;
        let end = closing_quote(inside)?;
        let (value, after) = inside.split_at_checked(end)?;
        // Two of one name, or one for the name itself, are no label set.
        if name.is_empty() || name == "__name__" || labels.iter().any(|(other, _)| *other == name) {
            return None;
        }
        if labels.len() == limits::SCRAPE_LABELS {
            return None;
        }
        labels.push((name, value));
        rest = after.strip_prefix('"')?.trim_start_matches([' ', '\t']);
        rest = match rest.strip_prefix(',') {
            Some(after) => after,
            None if rest.starts_with('}') => rest,
            None => return None,
        };
    }
}

fn closing_quote(inside: &str) -> Option<usize> {
    let mut escaped = false;
    inside.bytes().position(|byte| match (escaped, byte) {
        (true, _) => {
            escaped = false;
            false
        }
        (false, b'\\') => {
            escaped = true;
            false
        }
        (false, byte) => byte == b'"',
    })
}

/// Where a name ends: of a metric (with colons) or a label.
fn name_end(text: &str, metric: bool) -> usize {
    let fits = |(at, byte): (usize, u8)| {
        byte.is_ascii_alphabetic() || byte == b'_' || metric && byte == b':' || at > 0 && byte.is_ascii_digit()
    };
    text.bytes().enumerate().position(|each| !fits(each)).unwrap_or(text.len())
}

/// A float that Go reads too, which knows no NaN with a sign.
fn is_value(text: &str) -> bool {
    text.parse::<f64>().is_ok_and(|value| !value.is_nan() || !text.starts_with(['+', '-']))
}

/// In milliseconds; OpenMetrics writes seconds. Nothing was measured before 1970, and Prometheus takes no sign.
fn timestamp(text: &str, format: Format) -> Option<u64> {
    match format {
        Format::Text => text.parse().ok().filter(|milliseconds| *milliseconds <= i64::MAX.unsigned_abs()),
        Format::OpenMetrics => {
            let milliseconds = text.parse::<f64>().ok()? * 1_000.0;
            // A millisecond is no more exact beyond.
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in range, as was looked")]
            (0.0..=9_007_199_254_740_992.0).contains(&milliseconds).then(|| milliseconds.round() as u64)
        }
    }
}

/// A value as it is written between quotes.
pub fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Writes a value that is escaped already; a backslash before what needs none is one by itself.
fn push_escaped(line: &mut String, value: &str) {
    let mut rest = value;
    while let Some((before, after)) = rest.split_once('\\') {
        line.push_str(before);
        match after.chars().next() {
            Some(escaped @ ('\\' | '"' | 'n')) => {
                line.push('\\');
                line.push(escaped);
                rest = after.get(1..).unwrap_or_default();
            }
            _ => {
                line.push_str("\\\\");
                rest = after;
            }
        }
    }
    line.push_str(rest);
}
