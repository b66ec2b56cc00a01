//! Spans of tunnelled connections, sent to an OpenTelemetry collector (OTLP over gRPC), where that is asked for. Connections of
//! the kernel lane have none: without a tunnel no `traceparent` goes with them.
//!
//! Told at a connection's end, like the access log. A span goes into a bounded queue; one task batches and sends. A
//! collector that is slow or dead costs spans, which are counted, never traffic, and the agent's end waits for it only
//! for [`limits::SPAN_FLUSH`]. The SDK's own batch processor is not used: it keeps its count of dropped spans to itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use opentelemetry::{
    InstrumentationScope, KeyValue, SpanId, TraceFlags, TraceId, Value,
    trace::{SpanContext, SpanKind, Status, TraceState},
};
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanEvents, SpanExporter, SpanLinks},
};
use prometheus::proto::{MetricFamily, MetricType};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::{
    TelemetryError,
    families::{counter, family, label},
    metrics::direction_name,
};
use crate::{
    cluster::Workload,
    life::limits,
    tunnel::{Direction, End, Flow},
};

/// Where spans go, and how many.
#[derive(Debug, Clone, PartialEq)]
pub struct Export {
    /// `http://HOST:PORT` of the collector.
    pub endpoint: String,
    /// Share of traces that begin here and are exported, 0 to 1. A peer that began a trace decides for it.
    pub ratio: f64,
}

/// A span with the pod that it is told for.
struct Told {
    own: Option<Arc<Workload>>,
    span: SpanData,
}

/// The way to the collector.
#[derive(Debug)]
pub(super) struct Spans {
    queue: mpsc::Sender<Told>,
    ratio: f64,
    scope: InstrumentationScope,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    exported: AtomicU64,
    queue_full: AtomicU64,
    export_failed: AtomicU64,
}

/// What sends them, until told to stop.
#[derive(Debug)]
pub struct Exporting {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Exporting {
    /// Sends what is queued and ends, within [`limits::SPAN_FLUSH`].
    pub async fn finish(self) {
        self.stop.cancel();
        if timeout(limits::SPAN_FLUSH, self.task).await.is_err() {
            tracing::warn!("The last spans could not be sent in time");
        }
    }
}

/// What is the same for all spans of this agent.
#[derive(Debug, Clone)]
struct Place {
    node: Arc<str>,
    cluster: Arc<str>,
}

impl Spans {
    /// Begins to export. To be called in the runtime. It connects when the first span is to be sent.
    ///
    /// # Errors
    /// When the endpoint can't be one.
    pub fn start(export: &Export, node: Arc<str>, cluster: Arc<str>) -> Result<(Self, Exporting), TelemetryError> {
        let failed = |error: String| TelemetryError::Spans { endpoint: export.endpoint.clone(), error };
        // A channel of our own, as the exporter's would wait for a silent host as long as the kernel does.
        let channel = Channel::from_shared(export.endpoint.clone()).map_err(|error| failed(error.to_string()))?;
        let channel = channel.connect_timeout(limits::SPAN_EXPORT).timeout(limits::SPAN_EXPORT).connect_lazy();
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_channel(channel)
            .with_timeout(limits::SPAN_EXPORT)
            .build()
            .map_err(|error| failed(error.to_string()))?;
        Ok(Self::to(exporter, export.ratio, Place { node, cluster }))
    }

    fn to(exporter: impl SpanExporter + 'static, ratio: f64, place: Place) -> (Self, Exporting) {
        let (queue, receiver) = mpsc::channel(limits::SPANS_QUEUED);
        let (counts, stop) = (Arc::<Counts>::default(), CancellationToken::new());
        let sender = Sender { exporter, place, counts: Arc::clone(&counts), well: true };
        let task = tokio::spawn(sender.run(receiver, stop.clone()));
        let scope = InstrumentationScope::builder("heddle").with_version(env!("CARGO_PKG_VERSION")).build();
        (Self { queue, ratio, scope, counts }, Exporting { stop, task })
    }

    /// Whether a trace that begins here is exported.
    pub fn sample(&self) -> bool {
        fastrand::f64() < self.ratio
    }

    /// Queues the span of a connection that ended, if its trace is exported; `carried` as in the access log.
    pub fn told(&self, flow: &Flow, end: &End, carried: Option<(u64, u64)>) {
        let Some(span) = span(flow, end, carried, SystemTime::now(), &self.scope) else { return };
        let own = match flow.direction {
            Direction::Outbound => &flow.source_workload,
            Direction::Inbound => &flow.destination_workload,
        };
        if self.queue.try_send(Told { own: own.clone(), span }).is_err() {
            self.counts.queue_full.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn families(&self) -> impl Iterator<Item = MetricFamily> {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let dropped =
            [("queue_full", read(&self.counts.queue_full)), ("export_failed", read(&self.counts.export_failed))]
                .map(|(reason, count)| counter(vec![label("reason", reason)], count));
        [
            family(
                "heddle_spans_exported_total",
                "Spans that the collector took.",
                MetricType::COUNTER,
                vec![counter(vec![], read(&self.counts.exported))],
            ),
            family(
                "heddle_spans_dropped_total",
                "Spans that never reached the collector, by reason.",
                MetricType::COUNTER,
                dropped.to_vec(),
            ),
        ]
        .into_iter()
        .flatten()
    }
}

struct Sender<E> {
    exporter: E,
    place: Place,
    counts: Arc<Counts>,
    /// Whether the last batch was taken; a change is logged, not each failure.
    well: bool,
}

impl<E: SpanExporter + 'static> Sender<E> {
    async fn run(mut self, mut queue: mpsc::Receiver<Told>, stop: CancellationToken) {
        let mut batch = Vec::new();
        loop {
            let more = tokio::select! {
                more = collect(&mut queue, &mut batch) => more,
                () = stop.cancelled(), if !queue.is_closed() => {
                    // What is queued still comes out; nothing new goes in.
                    queue.close();
                    continue;
                }
            };
            self.send(std::mem::take(&mut batch)).await;
            if !more {
                return;
            }
        }
    }

    /// Sends a batch, one request per pod: a resource in OTLP is who the span is told for.
    async fn send(&mut self, mut batch: Vec<Told>) {
        let uid = |told: &Told| told.own.as_ref().map(|own| Arc::clone(&own.uid));
        batch.sort_by_cached_key(uid);
        let mut batch = batch.into_iter().peekable();
        while let Some(first) = batch.next() {
            let (own, group) = (first.own.clone(), uid(&first));
            let mut spans = vec![first.span];
            while let Some(told) = batch.next_if(|told| uid(told) == group) {
                spans.push(told.span);
            }
            let count = spans.len() as u64;
            self.exporter.set_resource(&resource(own.as_deref(), &self.place));
            let taken = match timeout(limits::SPAN_EXPORT, self.exporter.export(spans)).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("no answer in time".to_owned()),
            };
            self.note(&taken);
            let count_as = if taken.is_ok() { &self.counts.exported } else { &self.counts.export_failed };
            count_as.fetch_add(count, Ordering::Relaxed);
        }
    }

    fn note(&mut self, taken: &Result<(), String>) {
        match taken {
            Ok(()) if !self.well => tracing::info!("The collector takes spans again"),
            Err(error) if self.well => tracing::warn!(%error, "The collector does not take spans"),
            _ => {}
        }
        self.well = taken.is_ok();
    }
}

/// Fills a batch: waits for a first span, then for others, but not for long. False when the queue has ended.
async fn collect(queue: &mut mpsc::Receiver<Told>, batch: &mut Vec<Told>) -> bool {
    if batch.is_empty() && queue.recv_many(batch, limits::SPANS_BATCH).await == 0 {
        return false;
    }
    let deadline = Instant::now() + limits::SPAN_DELAY;
    while let Some(room @ 1..) = limits::SPANS_BATCH.checked_sub(batch.len()) {
        match timeout_at(deadline, queue.recv_many(batch, room)).await {
            Ok(0) => return false,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    true
}

/// The span of one side of a tunnelled connection; `None` for plaintext and for traces that are not exported.
/// Attributes by OpenTelemetry's semantic conventions 1.3x (general, network, error) where they have a name.
fn span(
    flow: &Flow,
    end: &End,
    carried: Option<(u64, u64)>,
    now: SystemTime,
    scope: &InstrumentationScope,
) -> Option<SpanData> {
    let trace = flow.trace.filter(|trace| trace.sampled)?;
    let mut attributes = Vec::with_capacity(20);
    let mut text = |key: &'static str, value: &str| {
        if !value.is_empty() {
            attributes.push(KeyValue::new(key, value.to_owned()));
        }
    };
    let target = flow.hbone_target.unwrap_or(flow.destination);
    let (kind, peer) = match flow.direction {
        Direction::Outbound => (SpanKind::Client, flow.destination_workload.as_deref()),
        Direction::Inbound => (SpanKind::Server, flow.source_workload.as_deref()),
    };
    let status = match end {
        End::Complete => Status::Unset,
        End::Failed { reason, detail, .. } => {
            text("error.type", reason);
            Status::error(detail[..detail.floor_char_boundary(limits::LOG_DETAIL)].to_owned())
        }
        End::Denied(denial) => {
            text("error.type", denial.reason());
            text("heddle.policy", denial.policy().map_or("", |policy| policy));
            Status::error(super::access_log::denied(denial, carried.is_some()))
        }
    };
    text("network.transport", "tcp");
    text("network.type", if target.is_ipv6() { "ipv6" } else { "ipv4" });
    text("network.protocol.name", "hbone");
    text("client.address", &flow.source.ip().to_string());
    text(
        "server.address",
        &match flow.destination_service.as_deref() {
            Some(service) => service.hostname.to_string(),
            None => target.ip().to_string(),
        },
    );
    let far = if flow.direction == Direction::Outbound { target } else { flow.source };
    text("network.peer.address", &far.ip().to_string());
    text("peer.service", peer.map_or("", |peer| &peer.naming.canonical_name));
    text("heddle.peer.namespace", peer.map_or("", |peer| &peer.namespace));
    text("heddle.peer.pod", peer.map_or("", |peer| &peer.name));
    text("heddle.direction", direction_name(flow.direction));
    text("heddle.source.principal", flow.source_principal.as_ref().map_or("", |id| id.as_str()));
    text("heddle.destination.principal", flow.destination_principal.as_ref().map_or("", |id| id.as_str()));
    let mut number = |key: &'static str, value: u64| {
        attributes.push(KeyValue::new(key, Value::I64(i64::try_from(value).unwrap_or(i64::MAX))));
    };
    number("client.port", u64::from(flow.source.port()));
    number("server.port", u64::from(target.port()));
    number("network.peer.port", u64::from(far.port()));
    if let Some((to_server, to_client)) = carried {
        number("heddle.request_bytes", to_server);
        number("heddle.response_bytes", to_client);
    }
    Some(SpanData {
        span_context: SpanContext::new(
            TraceId::from_bytes(trace.trace_id.to_be_bytes()),
            SpanId::from_bytes(trace.span_id.to_be_bytes()),
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        ),
        parent_span_id: SpanId::from_bytes(trace.parent.unwrap_or_default().to_be_bytes()),
        parent_span_is_remote: trace.parent.is_some(),
        span_kind: kind,
        name: "CONNECT".into(),
        start_time: trace.began,
        // A clock that was set back makes no span that ends before it begins.
        end_time: now.max(trace.began),
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status,
        instrumentation_scope: scope.clone(),
    })
}

/// Who a span is told for: the pod, as its own sidecar would say it.
fn resource(own: Option<&Workload>, place: &Place) -> Resource {
    let mut attributes = Vec::with_capacity(10);
    let mut text = |key: &'static str, value: &str| {
        if !value.is_empty() {
            attributes.push(KeyValue::new(key, value.to_owned()));
        }
    };
    text("k8s.node.name", &place.node);
    text("k8s.cluster.name", &place.cluster);
    if let Some(own) = own {
        text("service.namespace", &own.namespace);
        text("service.version", &own.naming.canonical_revision);
        text("k8s.namespace.name", &own.namespace);
        text("k8s.pod.name", &own.name);
        text("k8s.pod.uid", &own.uid);
        match own.naming.workload_kind {
            "deployment" => text("k8s.deployment.name", &own.naming.workload),
            "cronjob" => text("k8s.cronjob.name", &own.naming.workload),
            "job" => text("k8s.job.name", &own.naming.workload),
            _ => {}
        }
    }
    let name = own.map_or("heddle", |own| &own.naming.canonical_name).to_owned();
    Resource::builder_empty().with_service_name(name).with_attributes(attributes).build()
}

#[cfg(test)]
mod tests;
