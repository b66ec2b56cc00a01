//! What must hold of metrics and access log. Here is what the tests share, those of the lane too.

mod access_log;
mod scrape;
mod traffic;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, UNIX_EPOCH},
};

use tokio_util::sync::CancellationToken;

use super::{PodReport, Sources, VerdictCounts, certificates::IdentityReport, traffic::Traffic};
use crate::{
    capture::PodState,
    cluster::{Naming, PolicyKind, Service, Workload},
    identity::{CertificateStatus, FetchCounts, IssuerStatus, RootStatus, TrustReport},
    life::budget::{Budget, Machine, Refusal},
    policy::Effect,
    tunnel::{Connection, Direction, Flow, Security, Trace},
};

pub(super) fn workload(name: &str) -> Arc<Workload> {
    Arc::new(Workload {
        name: format!("{name}-0").into(),
        naming: Naming {
            workload: name.into(),
            workload_kind: "deployment",
            canonical_name: name.into(),
            canonical_revision: "v1".into(),
            app: name.into(),
            version: "".into(),
        },
        ..Workload::named("shop", name)
    })
}

pub(super) fn flow(direction: Direction) -> Flow {
    Flow {
        direction,
        security: Security::MutualTls,
        source: "10.1.0.2:40000".parse().unwrap(),
        destination: "10.2.0.3:15008".parse().unwrap(),
        hbone_target: Some("10.2.0.3:8080".parse().unwrap()),
        source_workload: Some(workload("client")),
        source_principal: Some("spiffe://cluster.local/ns/shop/sa/client".parse().unwrap()),
        destination_workload: Some(workload("server")),
        destination_principal: Some("spiffe://cluster.local/ns/shop/sa/server".parse().unwrap()),
        destination_service: Some(Arc::new(Service::named("shop", "server"))),
        trace: Trace::join("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        session: None,
    }
}

fn connection(id: u64, flow: Flow) -> Arc<Connection> {
    Arc::new(Connection {
        id,
        flow,
        opened: Instant::now(),
        sent: AtomicU64::new(0),
        received: AtomicU64::new(0),
        request: None,
        cancel: CancellationToken::new(),
        revoked: OnceLock::new(),
        idle: false.into(),
        disowned: false.into(),
    })
}

fn carry(connection: &Connection, to_app: u64, to_client: u64) {
    connection.sent.fetch_add(to_app, Ordering::Relaxed);
    connection.received.fetch_add(to_client, Ordering::Relaxed);
}

fn traffic(capacity: usize) -> Traffic {
    Traffic::new("Kubernetes".into(), capacity)
}

fn text(traffic: &Traffic) -> String {
    let mut text = String::new();
    traffic.write(&mut text).unwrap();
    text
}

/// Its samples as lines.
fn samples(traffic: &Traffic) -> Vec<String> {
    text(traffic).lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
}

/// Sum of a metric over the samples that have all of these labels.
pub(super) fn sum(traffic: &Traffic, metric: &str, labels: &[(&str, &str)]) -> u64 {
    let fits = |line: &&String| {
        line.starts_with(&format!("{metric}{{"))
            && labels.iter().all(|(name, value)| {
                [",", "{"].iter().any(|before| line.contains(&format!("{before}{name}=\"{value}\"")))
            })
    };
    let value = |line: &String| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64;
    samples(traffic).iter().filter(fits).map(value).sum()
}

fn lines(traffic: &Traffic) -> usize {
    samples(traffic).len()
}

pub(super) const SENT: &str = "istio_tcp_sent_bytes_total";
pub(super) const RECEIVED: &str = "istio_tcp_received_bytes_total";
pub(super) const OPENED: &str = "istio_tcp_connections_opened_total";
pub(super) const CLOSED: &str = "istio_tcp_connections_closed_total";
pub(super) const FAILED: &str = "istio_tcp_connections_failed_total";
/// Pod one holds a connection; pod two has been refused one.
fn budget() -> Budget {
    let budget = Budget::new(Machine { descriptors: 1_000, memory: 400 << 20 });
    let one = budget.enrol("one".into());
    std::mem::forget(one.admit(2));
    budget.enrol("two".into()).refused(Refusal::Handshake);
    budget
}

pub(super) fn sources(live: Vec<Arc<Connection>>) -> Sources {
    Sources {
        live: Box::new(move || live.clone()),
        lane: Box::new(|| None),
        lane_lost: Box::new(|| 3),
        verdicts: Box::new(|| VerdictCounts { allowed: 5, denied: 2, misses: 9, ..VerdictCounts::default() }),
        pods: Box::new(|| {
            let pod = |name: &str, state| PodReport {
                uid: name.into(),
                namespace: "shop".into(),
                name: name.into(),
                state,
                counts: heddle_common::PodCounts { captured: 7, ..Default::default() },
            };
            let place_unknown = PodState::Uncaptured { reason: "place_unknown", detail: "nobody knows".to_owned() };
            vec![pod("one", PodState::Captured), pod("two", place_unknown)]
        }),
        kubelet: Box::new(super::KubeletReport::default),
        identity: Box::new(identity),
        trust: Box::new(TrustReport::default),
        sessions: Arc::default(),
        manifest_problems: Box::new(|| 2),
        policy_problems: Box::new(|| vec![(PolicyKind::AuthorizationPolicy, Effect::Denies); 3]),
        pool: Arc::default(),
        policy_gaps: Box::new(|| 1),
        repairs: Box::new(|| 4),
        older: Box::new(|| 6),
        cni: Box::new(|| Some(true)),
        budget: budget(),
    }
}

fn identity() -> IdentityReport {
    let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
    let issuer =
        |name: &str, end| IssuerStatus { subject: format!("CN={name}"), serial: "0a".to_owned(), not_after: at(end) };
    let server = CertificateStatus {
        identity: "spiffe://cluster.local/ns/shop/sa/server".parse().unwrap(),
        serial: "01".to_owned(),
        not_before: Some(UNIX_EPOCH),
        not_after: Some(at(2_000)),
        usable_until: Some(at(1_000)),
        intermediates: vec![issuer("middle", 1_000)],
        root: Some(IssuerStatus { serial: "0b".to_owned(), ..issuer("root", 3_000) }),
        received: Some(at(500)),
        last_error: String::new(),
        last_reason: "",
        failed: None,
        next_try: None,
    };
    let waits = CertificateStatus {
        identity: "spiffe://cluster.local/ns/shop/sa/waits".parse().unwrap(),
        serial: String::new(),
        usable_until: None,
        received: None,
        intermediates: Vec::new(),
        root: None,
        last_error: "CA unreachable: x".to_owned(),
        last_reason: "ca_unreachable",
        ..server.clone()
    };
    // A second certificate of the same intermediate makes no second row of it.
    let other =
        CertificateStatus { identity: "spiffe://cluster.local/ns/shop/sa/other".parse().unwrap(), ..server.clone() };
    IdentityReport {
        certificates: vec![server, waits, other],
        roots: vec![RootStatus { subject: "CN=root".to_owned(), serial: "0b".to_owned(), not_after: at(3_000) }],
        fetches: FetchCounts { under_way: 2, ended: vec![("ca_unreachable", 3), ("ok", 4)] },
    }
}
