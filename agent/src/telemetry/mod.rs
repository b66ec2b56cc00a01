//! What happened: metrics, the access log, and spans for a collector.
//!
//! After the tunnel, which tells of each connection's start and end. It never decides about traffic and never makes it wait.

mod access_log;
mod certificates;
mod families;
mod kubelet;
mod labels;
mod lane;
mod metrics;
mod pods;
mod pressure;
mod process;
mod revocation;
pub(crate) mod scrape;
mod spans;
mod suppress;
#[cfg(test)]
mod tests;
mod traffic;
mod tunnels;
mod verdicts;

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

pub use access_log::{AccessLog, Destination, Format, LogGuard, Record, response_flags};
pub use certificates::IdentityReport;
pub use kubelet::KubeletReport;
pub use lane::{Around, Lane, LaneConnection, LaneTable};
pub use metrics::{Sources, direction_name, seconds_until, security_name};
pub use pods::{PodReport, named};
pub use scrape::{SCRAPE_TIMEOUT, ScrapeError, ScrapedPod, Scraper, patience, scraped_pods};
pub use spans::{Export, Exporting};
pub use verdicts::VerdictCounts;

use crate::{
    capture::TcpHealth,
    cluster::Snapshot,
    life::limits,
    policy::Rehearsal,
    tunnel::{Connection, Direction, End, Flow, Observer, Wire},
};

/// Why telemetry could not start, or a scrape could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("access log {path}: {error}")]
    AccessLog { path: String, error: std::io::Error },
    #[error("spans can't be sent to {endpoint}: {error}")]
    Spans { endpoint: String, error: String },
}

impl TelemetryError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Metrics(_) => "metrics",
            Self::AccessLog { .. } => "access_log",
            Self::Spans { .. } => "spans",
        }
    }
}

/// Metrics, access log and spans of one agent.
#[derive(Debug)]
pub struct Telemetry {
    metrics: metrics::Metrics,
    cluster: Arc<str>,
    log: AccessLog,
    spans: Option<spans::Spans>,
    lane: lane::State,
}

impl Telemetry {
    /// `cluster` is the name that labels give to the cluster of known workloads.
    ///
    /// # Errors
    /// Never in practice: only when two metrics had the same name.
    pub fn new(cluster: Arc<str>, log: AccessLog) -> Result<Self, TelemetryError> {
        let metrics = metrics::Metrics::new(Arc::clone(&cluster))?;
        Ok(Self { metrics, cluster, log, spans: None, lane: lane::State::default() })
    }

    /// Adds the labels of regions and zones to the metrics of connections, from what [`Telemetry::learn`] is told.
    pub fn add_localities(&mut self) {
        self.metrics.traffic.add_localities();
    }

    /// Takes note of a new snapshot.
    pub fn learn(&self, snapshot: &Snapshot) {
        self.metrics.traffic.learn(&snapshot.localities);
    }

    /// Sends spans to a collector. To be called in the runtime, before anything is told.
    ///
    /// # Errors
    /// When the endpoint can't be one.
    pub fn export(&mut self, export: &Export, node: Arc<str>, cluster: Arc<str>) -> Result<Exporting, TelemetryError> {
        let (spans, exporting) = spans::Spans::start(export, node, cluster)?;
        self.spans = Some(spans);
        Ok(exporting)
    }

    /// The metrics in Prometheus' text format 0.0.4, live connections included.
    ///
    /// # Errors
    /// When a family can't be written.
    pub fn scrape(&self, sources: &Sources) -> Result<String, TelemetryError> {
        self.lane().look(&sources.lane);
        let spans = self.spans.iter().flat_map(spans::Spans::families).collect();
        Ok(self.metrics.scrape(sources, self.log.dropped(), spans, Instant::now())?)
    }

    /// Forgets label sets of workloads that are gone from the cluster and idle for [`limits::METRIC_IDLE`].
    pub fn expire(&self, snapshot: &Snapshot) {
        let present: HashSet<_> = snapshot
            .workloads
            .values()
            .map(|workload| (Arc::clone(&workload.namespace), Arc::clone(&workload.naming.workload)))
            .collect();
        self.metrics.traffic.expire(&present, limits::METRIC_IDLE, Instant::now());
    }

    fn tell(&self, flow: &Flow, end: &End, carried: Option<((u64, u64), Duration)>) {
        if let End::Denied(denial) = end {
            self.metrics.denied(denial, 1);
        }
        if let Some(spans) = &self.spans {
            spans.told(flow, end, carried.map(|(bytes, _)| bytes));
        }
        if !self.log.write(&Record { time: SystemTime::now(), cluster: &self.cluster, flow, end, carried }) {
            self.metrics.suppressed.inc();
        }
    }

    /// A dry-run policy matched so many connections.
    fn rehearse(&self, flow: &Flow, rehearsal: &Rehearsal, count: u64) {
        if self.metrics.rehearsed(rehearsal, count, Instant::now()) {
            tracing::info!(
                policy = %rehearsal.policy,
                action = metrics::action_name(rehearsal.action),
                source = %flow.source,
                identity = flow.source_principal.as_ref().map_or("", |id| id.as_str()),
                destination = %flow.hbone_target.unwrap_or(flow.destination),
                "Dry-run policy matches"
            );
        }
    }
}

fn told_opened(flow: &Flow, source: SocketAddr) {
    tracing::debug!(
        target: "access",
        src = %source,
        dst = %flow.hbone_target.unwrap_or(flow.destination),
        direction = direction_name(flow.direction),
        security = security_name(flow.security),
        "connection opened"
    );
}

impl Observer for Telemetry {
    fn opened(&self, connection: &Connection) {
        self.metrics.traffic.opened(connection, Instant::now());
        told_opened(&connection.flow, connection.flow.source);
    }

    fn closed(&self, connection: &Connection, end: &End) {
        self.metrics.traffic.closed(connection, response_flags(end), Instant::now());
        self.tell(&connection.flow, end, Some((connection.bytes(), connection.opened.elapsed())));
    }

    fn failed(&self, flow: &Flow, end: &End) {
        self.metrics.traffic.failed(flow, response_flags(end), Instant::now());
        self.tell(flow, end, None);
    }

    fn handshake(&self, direction: Direction, result: Result<(), &'static str>) {
        self.metrics.handshake(direction, result);
    }

    fn sample(&self) -> bool {
        self.spans.as_ref().is_some_and(spans::Spans::sample)
    }

    fn rehearsed(&self, connection: &Connection, rehearsal: &Rehearsal) {
        self.rehearse(&connection.flow, rehearsal, 1);
    }

    fn wire_opened(&self, wire: &Arc<Wire>) {
        self.metrics.tunnels.opened(wire);
    }

    fn wire_health(&self, wire: &Wire, health: Option<TcpHealth>) {
        self.metrics.tunnels.health(wire, health);
    }

    fn wire_closed(&self, wire: &Wire, health: Option<TcpHealth>) {
        self.metrics.tunnels.closed(wire, health);
    }

    fn pod_served(&self) {
        self.metrics.served.inc();
    }

    fn pod_left(&self) {
        self.metrics.left.inc();
    }
}
