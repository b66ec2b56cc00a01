use std::sync::{Mutex, PoisonError};

use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};

use super::{
    super::tests::{flow, workload},
    *,
};
use crate::policy::Denial;

/// Keeps what it is given, with the resource it is given it under; or refuses; or never answers.
/// What was exported, batch by batch.
type Taken = Vec<(Resource, Vec<SpanData>)>;

#[derive(Debug, Clone, Default)]
struct Kept {
    resource: Option<Resource>,
    taken: Arc<Mutex<Taken>>,
    stuck: bool,
    refuses: bool,
}

impl SpanExporter for Kept {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        if self.stuck {
            std::future::pending::<()>().await;
        }
        if self.refuses {
            return Err(OTelSdkError::InternalFailure("no".to_owned()));
        }
        let resource = self.resource.clone().unwrap();
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).push((resource, batch));
        Ok(())
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.resource = Some(resource.clone());
    }
}

fn place() -> Place {
    Place { node: "node-1".into(), cluster: "Kubernetes".into() }
}

fn told(flow: &Flow, end: &End) -> Option<SpanData> {
    let now = SystemTime::now() + std::time::Duration::from_secs(1);
    span(flow, end, Some((11, 222)), now, &InstrumentationScope::builder("heddle").build())
}

fn attribute(span: &SpanData, key: &str) -> String {
    let found = span.attributes.iter().find(|attribute| attribute.key.as_str() == key);
    found.map(|attribute| attribute.value.to_string()).unwrap_or_default()
}

#[test]
fn a_span_tells_the_connection_in_the_words_of_the_conventions() {
    let (client, server) = (flow(Direction::Outbound), flow(Direction::Inbound));
    let (out, into) = (told(&client, &End::Complete).unwrap(), told(&server, &End::Complete).unwrap());
    assert_eq!((&out.span_kind, &into.span_kind), (&SpanKind::Client, &SpanKind::Server));
    let trace = client.trace.unwrap();
    assert_eq!(out.span_context.trace_id().to_string(), trace.to_string());
    assert_eq!(out.span_context.span_id().to_string(), format!("{:016x}", trace.span_id));
    assert_eq!(out.parent_span_id.to_string(), "b7ad6b7169203331");
    assert_eq!(out.start_time, trace.began);
    assert!(out.end_time > out.start_time);
    for (key, value) in [
        ("network.transport", "tcp"),
        ("network.type", "ipv4"),
        ("network.peer.address", "10.2.0.3"),
        ("network.peer.port", "8080"),
        ("client.address", "10.1.0.2"),
        ("client.port", "40000"),
        ("server.address", "server.shop.svc.cluster.local"),
        ("server.port", "8080"),
        ("peer.service", "server"),
        ("heddle.peer.pod", "server-0"),
        ("heddle.source.principal", "spiffe://cluster.local/ns/shop/sa/client"),
        ("heddle.request_bytes", "11"),
        ("heddle.response_bytes", "222"),
        ("error.type", ""),
    ] {
        assert_eq!(attribute(&out, key), value, "{key}");
    }
    assert_eq!(
        (attribute(&into, "peer.service"), attribute(&into, "network.peer.address")),
        ("client".into(), "10.1.0.2".into())
    );
}

#[test]
fn an_end_with_an_error_makes_a_span_with_an_error() {
    let flow = flow(Direction::Inbound);
    let denied = told(&flow, &End::Denied(Denial::Explicit { policy: "shop/deny".into() })).unwrap();
    assert_eq!(denied.status, Status::error("connection closed due to policy change: explicitly denied by: shop/deny"));
    assert_eq!(
        (attribute(&denied, "error.type"), attribute(&denied, "heddle.policy")),
        ("policy_denied".into(), "shop/deny".into())
    );
    let end = End::Failed { reason: "app_timeout", response_flags: "CONNECT", detail: "no answer".into() };
    let failed = told(&flow, &end).unwrap();
    assert_eq!(
        (failed.status.clone(), attribute(&failed, "error.type")),
        (Status::error("no answer"), "app_timeout".into())
    );
}

#[test]
fn what_is_not_sampled_or_not_tunnelled_makes_no_span() {
    let mut flow = flow(Direction::Inbound);
    flow.trace = flow.trace.map(|trace| crate::tunnel::Trace { sampled: false, ..trace });
    assert_eq!(told(&flow, &End::Complete), None);
    flow.trace = None;
    assert_eq!(told(&flow, &End::Complete), None);
}

#[tokio::test]
async fn spans_are_sent_in_batches_as_the_pods_they_are_told_for() {
    let exporter = Kept::default();
    let taken = Arc::clone(&exporter.taken);
    let (spans, exporting) = Spans::to(exporter, 1.0, place());
    assert!(spans.sample());
    let other = Flow { source_workload: Some(workload("other")), ..flow(Direction::Outbound) };
    for _ in 0..3 {
        spans.told(&flow(Direction::Outbound), &End::Complete, None);
        spans.told(&other, &End::Complete, None);
        spans.told(&flow(Direction::Inbound), &End::Complete, None);
    }
    exporting.finish().await;
    let taken = taken.lock().unwrap();
    let mut services: Vec<_> = taken
        .iter()
        .map(|(resource, spans)| {
            let get = |key: &'static str| resource.get(&key.into()).map(|value| value.to_string()).unwrap_or_default();
            assert_eq!((get("k8s.node.name"), get("k8s.cluster.name")), ("node-1".into(), "Kubernetes".into()));
            assert_eq!(get("k8s.pod.name"), format!("{}-0", get("service.name")));
            assert_eq!(get("k8s.deployment.name"), get("service.name"));
            (get("service.name"), spans.len())
        })
        .collect();
    services.sort();
    assert_eq!(services, [("client".into(), 3), ("other".into(), 3), ("server".into(), 3)]);
    assert_eq!(spans.counts.exported.load(Ordering::Relaxed), 9);
}

#[tokio::test]
async fn a_dead_collector_costs_spans_that_are_counted_and_holds_up_nobody() {
    let (spans, exporting) = Spans::to(Kept { stuck: true, ..Kept::default() }, 0.0, place());
    assert!(!spans.sample());
    let began = std::time::Instant::now();
    let count = 3 * limits::SPANS_QUEUED as u64;
    for _ in 0..count {
        spans.told(&flow(Direction::Outbound), &End::Complete, None);
    }
    assert!(began.elapsed() < std::time::Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(spans.counts.queue_full.load(Ordering::Relaxed), count - limits::SPANS_QUEUED as u64);
    let asked = Instant::now();
    exporting.finish().await;
    assert!(asked.elapsed() <= limits::SPAN_FLUSH * 5, "{:?}", asked.elapsed());
}

#[tokio::test]
async fn what_a_collector_refuses_counts_as_failed() {
    let (spans, exporting) = Spans::to(Kept { refuses: true, ..Kept::default() }, 1.0, place());
    spans.told(&flow(Direction::Outbound), &End::Complete, None);
    exporting.finish().await;
    assert_eq!(spans.counts.export_failed.load(Ordering::Relaxed), 1);
    assert_eq!(spans.counts.exported.load(Ordering::Relaxed), 0);
}
