//! What is measured: places, measurements, and the rows that each measurement gives. The names are promised: other
//! documents and tools refer to them.

use super::identity;

/// Where client and server are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    CrossNode,
    /// The kernel lane.
    SameNode,
    /// Pods of a node that ask for mutual TLS: through the agent.
    SameNodeMtls,
    /// A client outside the mesh on another node, which policy lets in: through the server's agent.
    Plaintext,
    /// No traffic: certificates.
    Identity,
}

impl Place {
    pub const ALL: [Self; 5] = [Self::CrossNode, Self::SameNode, Self::SameNodeMtls, Self::Plaintext, Self::Identity];
    /// Those where client and server are.
    pub const TRAFFIC: [Self; 4] = [Self::CrossNode, Self::SameNode, Self::SameNodeMtls, Self::Plaintext];

    pub fn name(self) -> &'static str {
        match self {
            Self::CrossNode => "cross_node",
            Self::SameNode => "same_node",
            Self::SameNodeMtls => "same_node_mtls",
            Self::Plaintext => "plaintext",
            Self::Identity => "identity",
        }
    }

    /// What is measured there.
    pub fn measurements(self) -> Vec<Measurement> {
        match self {
            Self::CrossNode | Self::SameNode => Measurement::ALL.into(),
            Self::SameNodeMtls | Self::Plaintext => vec![
                Measurement::Throughput { streams: 1, reverse: false },
                Measurement::Connect { concurrent: 32 },
                Measurement::Http { connections: 16 },
            ],
            Self::Identity => Vec::new(),
        }
    }

    /// How many idle connections memory is read at.
    pub fn idle_connections(self) -> &'static [u16] {
        match self {
            Self::CrossNode | Self::SameNode => &IDLE_CONNECTIONS,
            Self::SameNodeMtls | Self::Plaintext | Self::Identity => &[],
        }
    }

    /// Every row that it has, in the order of the report.
    pub fn rows(self) -> Vec<Row> {
        let measured = self.measurements().into_iter().flat_map(Measurement::rows);
        let identity = (self == Self::Identity).then(identity::rows).into_iter().flatten();
        measured.chain(self.idle_connections().iter().copied().flat_map(memory_rows)).chain(identity).collect()
    }
}

/// What a row has to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// mesh / none, at least or at most.
    AtLeast(f64),
    AtMost(f64),
    /// The mesh's own figure.
    Figure(f64),
}

impl Target {
    /// Of the rows that have one: those of the kernel lane.
    pub fn of(place: Place, row: &str) -> Option<Self> {
        if place != Place::SameNode {
            return None;
        }
        match row {
            "throughput_1" | "throughput_1_reverse" | "throughput_4" | "throughput_4_reverse" => {
                Some(Self::AtLeast(0.97))
            }
            "fixed_1000_p50" | "fixed_1000_p99" => Some(Self::AtMost(1.05)),
            "connect_c1" | "connect_c32" | "connect_60s" => Some(Self::AtLeast(0.90)),
            // None at all: a run of some seconds and ten gigabytes can't tell less than that from nothing.
            "cpu_s_per_gb" | "cpu_s_per_gb_reverse" | "cpu_s_per_gb_4" | "cpu_s_per_gb_4_reverse" => {
                Some(Self::Figure(0.001))
            }
            _ => None,
        }
    }

    /// Whether it is met, by a ratio and the mesh's figure.
    pub fn met(self, ratio: Option<f64>, mesh: f64) -> bool {
        match self {
            Self::AtLeast(least) => ratio.is_some_and(|ratio| ratio >= least),
            Self::AtMost(most) => ratio.is_some_and(|ratio| ratio <= most),
            Self::Figure(most) => mesh <= most,
        }
    }

    pub fn text(self) -> String {
        match self {
            Self::AtLeast(least) => format!("≥ {least:.2}"),
            Self::AtMost(most) => format!("≤ {most:.2}"),
            Self::Figure(most) => format!("≤ {most}"),
        }
    }
}

/// Which way is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Higher,
    Lower,
}

/// One figure of the report, without its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub name: String,
    pub unit: &'static str,
    pub better: Better,
    pub section: &'static str,
}

/// One run of a tool. It gives several rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measurement {
    /// iperf3 with this many streams, from server to client where reversed.
    Throughput { streams: u8, reverse: bool },
    /// Connect, one byte, close, by this many clients.
    Connect { concurrent: u8 },
    /// The same by 32 clients for a minute: long enough to run out of ports, or of anything else.
    Sustained,
    /// wrk on this many kept-open connections.
    Http { connections: u8 },
    /// 1,000 requests a second on 16 connections, open loop.
    Fixed,
}

impl Measurement {
    pub const ALL: [Self; 11] = [
        Self::Throughput { streams: 1, reverse: false },
        Self::Throughput { streams: 1, reverse: true },
        Self::Throughput { streams: 4, reverse: false },
        Self::Throughput { streams: 4, reverse: true },
        Self::Connect { concurrent: 1 },
        Self::Connect { concurrent: 32 },
        Self::Sustained,
        Self::Http { connections: 1 },
        Self::Http { connections: 16 },
        Self::Http { connections: 64 },
        Self::Fixed,
    ];

    /// Its name: that of its main row.
    pub fn name(self) -> String {
        match self {
            Self::Throughput { streams, reverse } => {
                format!("throughput_{streams}{}", if reverse { "_reverse" } else { "" })
            }
            Self::Connect { concurrent } => format!("connect_c{concurrent}"),
            Self::Sustained => "connect_60s".to_owned(),
            Self::Http { connections } => format!("http_c{connections}"),
            Self::Fixed => "fixed_1000".to_owned(),
        }
    }

    /// What its CPU rows have after their names: the measurement that a mesh is usually judged by has nothing there.
    pub fn cpu_suffix(self) -> &'static str {
        match self {
            Self::Throughput { streams: 1, reverse: true } => "_reverse",
            Self::Throughput { streams: 4, reverse: false } => "_4",
            Self::Throughput { streams: 4, reverse: true } => "_4_reverse",
            Self::Http { connections: 1 } => "_c1",
            Self::Http { connections: 64 } => "_c64",
            _ => "",
        }
    }

    /// Rows that it gives, the main one first.
    pub fn rows(self) -> Vec<Row> {
        let name = self.name();
        let row = |name: String, unit, better, section| Row { name, unit, better, section };
        let quantiles = |section| {
            ["p50", "p99"].map(|quantile| row(format!("{name}_{quantile}"), "µs", Better::Lower, section)).into_iter()
        };
        let cpu = |per: &str, unit| -> Vec<Row> {
            let suffix = self.cpu_suffix();
            ["", "_source", "_destination", "_system"]
                .map(|part| row(format!("cpu_s_per_{per}{suffix}{part}"), unit, Better::Lower, CPU))
                .into()
        };
        match self {
            Self::Throughput { .. } => {
                let mut rows = vec![row(name.clone(), "Gbit/s", Better::Higher, THROUGHPUT)];
                rows.extend(cpu("gb", "CPU s/GB"));
                rows
            }
            Self::Connect { .. } => {
                let mut rows = vec![row(name.clone(), "conn/s", Better::Higher, CONNECTIONS)];
                rows.extend(quantiles(CONNECTIONS));
                rows
            }
            Self::Sustained => {
                let mut rows = vec![row(name.clone(), "conn/s", Better::Higher, CONNECTIONS)];
                rows.push(row(format!("{name}_slowest_second"), "conn/s", Better::Higher, CONNECTIONS));
                rows.extend(quantiles(CONNECTIONS));
                rows
            }
            Self::Http { .. } => {
                let mut rows = vec![row(name.clone(), "req/s", Better::Higher, REQUESTS)];
                rows.extend(quantiles(REQUESTS));
                rows.extend(cpu("10k_requests", "CPU s/10k req"));
                rows
            }
            Self::Fixed => quantiles(REQUESTS).collect(),
        }
    }
}

const THROUGHPUT: &str = "Throughput";
const CONNECTIONS: &str = "New connections";
const REQUESTS: &str = "Requests on kept-open connections";
const CPU: &str = "CPU of the agents";
const MEMORY: &str = "Memory of the agents";
pub const IDENTITY: &str = "Certificates";
/// Sections in the order of the report.
pub const SECTIONS: [&str; 6] = [THROUGHPUT, CONNECTIONS, REQUESTS, CPU, MEMORY, IDENTITY];

/// Open idle connections at which memory is read.
pub const IDLE_CONNECTIONS: [u16; 3] = [0, 1_000, 5_000];

/// Rows of memory at so many idle connections.
pub fn memory_rows(connections: u16) -> Vec<Row> {
    let name = if connections == 0 { "rss_idle".to_owned() } else { format!("rss_{connections}") };
    ["", "_source", "_destination", "_anonymous"]
        .map(|part| Row { name: format!("{name}{part}"), unit: "MiB", better: Better::Lower, section: MEMORY })
        .into()
}

/// Which rows were asked for.
#[derive(Debug, Clone)]
pub struct Choice(Vec<String>);

impl Choice {
    /// Patterns with `*`, of `place/row` or of a row in every place; none of them means everything.
    pub fn new(patterns: &[String]) -> Self {
        Self(patterns.to_vec())
    }

    pub fn has(&self, place: Place, row: &str) -> bool {
        let full = format!("{}/{row}", place.name());
        self.0.is_empty() || self.0.iter().any(|pattern| fits(pattern, &full) || fits(pattern, row))
    }

    pub fn any(&self, place: Place, rows: &[Row]) -> bool {
        rows.iter().any(|row| self.has(place, &row.name))
    }
}

/// Whether the text fits a pattern in which `*` is anything.
fn fits(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, rest)) => text
            .strip_prefix(head)
            .is_some_and(|tail| (0..=tail.len()).filter_map(|at| tail.get(at..)).any(|tail| fits(rest, tail))),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Choice, Place, Target};

    #[test]
    fn promised_rows_are_there_and_none_is_there_twice() {
        for place in [Place::CrossNode, Place::SameNode] {
            promised_of(place);
        }
        for place in [Place::SameNodeMtls, Place::Plaintext] {
            let names: Vec<String> = place.rows().into_iter().map(|row| row.name).collect();
            for promised in ["throughput_1", "connect_c32", "http_c16", "cpu_s_per_gb"] {
                assert!(names.iter().any(|name| name == promised), "{promised}");
            }
        }
        let names: Vec<String> = Place::Identity.rows().into_iter().map(|row| row.name).collect();
        assert_eq!(names, ["certificates_per_second", "enrolment_to_mtls_p50", "enrolment_to_mtls_p99"]);
    }

    fn promised_of(place: Place) {
        let names: Vec<String> = place.rows().into_iter().map(|row| row.name).collect();
        for promised in [
            "throughput_1",
            "throughput_1_reverse",
            "throughput_4",
            "throughput_4_reverse",
            "connect_c1",
            "connect_c32",
            "connect_60s",
            "http_c1",
            "http_c16",
            "http_c64",
            "fixed_1000_p50",
            "fixed_1000_p99",
            "cpu_s_per_gb",
            "cpu_s_per_10k_requests",
            "rss_idle",
            "rss_1000",
            "rss_5000",
        ] {
            assert!(names.iter().any(|name| name == promised), "{promised}");
        }
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    }

    #[test]
    fn the_kernel_lane_has_targets_and_a_figure_meets_them_or_not() {
        let ratio = Target::of(Place::SameNode, "throughput_4")
            .map(|target| [0.97, 0.96].map(|ratio| target.met(Some(ratio), 1.0)));
        assert_eq!(ratio, Some([true, false]));
        let time = Target::of(Place::SameNode, "fixed_1000_p99")
            .map(|target| [1.05, 1.06].map(|ratio| target.met(Some(ratio), 1.0)));
        assert_eq!(time, Some([true, false]));
        let cpu =
            Target::of(Place::SameNode, "cpu_s_per_gb").map(|target| [0.0, 0.01].map(|mesh| target.met(None, mesh)));
        assert_eq!(cpu, Some([true, false]));
        assert_eq!(Target::of(Place::CrossNode, "throughput_4"), None);
        // A target of a row that nobody measures would never be missed.
        let rows: BTreeSet<String> = Place::SameNode.rows().into_iter().map(|row| row.name).collect();
        assert_eq!(rows.iter().filter(|row| Target::of(Place::SameNode, row).is_some()).count(), 13);
    }

    #[test]
    fn rows_are_chosen_by_pattern_with_and_without_a_place() {
        let choice = Choice::new(&["cross_node/throughput*".to_owned(), "*_p99".to_owned()]);
        assert!(choice.has(Place::CrossNode, "throughput_1"));
        assert!(!choice.has(Place::SameNode, "throughput_1"));
        assert!(choice.has(Place::SameNode, "http_c1_p99"));
        assert!(!choice.has(Place::CrossNode, "http_c1"));
        assert!(Choice::new(&[]).has(Place::SameNode, "anything"));
    }
}
