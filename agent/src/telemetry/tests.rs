//! What must hold of metrics and access log.

use std::{
    collections::{HashMap, HashSet},
    io::Write,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio_util::sync::CancellationToken;

use super::{
    AccessLog, Format, PodReport, Record, Sources, Telemetry, VerdictCounts,
    certificates::IdentityReport,
    metrics::Metrics,
    traffic::{NO_FLAGS, Traffic},
};
use crate::{
    capture::{PodState, TcpHealth},
    cluster::{Locality, Naming, PolicyKind, Service, Workload},
    identity::{CertificateStatus, FetchCounts, IssuerStatus, RootStatus, TrustReport},
    life::budget::{Budget, Machine, Refusal},
    policy::{Action, Denial, Effect, Rehearsal},
    tunnel::{Connection, Direction, End, Flow, Observer, Security, Trace, Wire},
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

#[test]
fn bytes_are_live_while_a_connection_lasts_and_exact_at_its_end() {
    let (traffic, now) = (traffic(1_000), Instant::now());
    let connection = connection(1, flow(Direction::Outbound));
    traffic.opened(&connection, now);
    carry(&connection, 10, 100);
    traffic.fold(&[Arc::clone(&connection)], now);
    assert_eq!((sum(&traffic, RECEIVED, &[]), sum(&traffic, SENT, &[])), (10, 100));
    traffic.fold(&[Arc::clone(&connection)], now);
    carry(&connection, 1, 2);
    traffic.fold(&[Arc::clone(&connection)], now);
    assert_eq!((sum(&traffic, RECEIVED, &[]), sum(&traffic, SENT, &[])), (11, 102));
    carry(&connection, 5, 7);
    traffic.closed(&connection, NO_FLAGS, now);
    // A scrape that took its list of live connections before the close.
    traffic.fold(&[Arc::clone(&connection)], now);
    assert_eq!((sum(&traffic, RECEIVED, &[]), sum(&traffic, SENT, &[])), (16, 109));
    assert_eq!((sum(&traffic, OPENED, &[]), sum(&traffic, CLOSED, &[])), (1, 1));
}

#[test]
fn scrapes_and_closes_at_the_same_time_count_every_byte_once() {
    const CONNECTIONS: u64 = 200;
    const ROUNDS: u64 = 50;
    let (traffic, now) = (Arc::new(traffic(1_000)), Instant::now());
    let live: Vec<_> = (0..CONNECTIONS).map(|id| connection(id, flow(Direction::Inbound))).collect();
    for connection in &live {
        traffic.opened(connection, now);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                traffic.fold(&live, now);
            }
        });
        scope.spawn(|| {
            for connection in &live {
                for _ in 0..ROUNDS {
                    carry(connection, 1, 3);
                }
                traffic.closed(connection, NO_FLAGS, now);
            }
        });
    });
    assert_eq!(sum(&traffic, RECEIVED, &[]), CONNECTIONS * ROUNDS);
    assert_eq!(sum(&traffic, SENT, &[]), CONNECTIONS * ROUNDS * 3);
    assert!(traffic.open().is_empty());
}

#[test]
fn sent_is_the_response_for_either_reporter_as_istio_defines_it() {
    let (traffic, now) = (traffic(1_000), Instant::now());
    for (id, direction) in [(1, Direction::Outbound), (2, Direction::Inbound)] {
        let connection = connection(id, flow(direction));
        traffic.opened(&connection, now);
        carry(&connection, 11, 222);
        traffic.closed(&connection, NO_FLAGS, now);
    }
    for reporter in ["source", "destination"] {
        assert_eq!(sum(&traffic, SENT, &[("reporter", reporter)]), 222, "{reporter}");
        assert_eq!(sum(&traffic, RECEIVED, &[("reporter", reporter)]), 11, "{reporter}");
    }
}

#[test]
fn labels_are_istios_in_istios_order() {
    let (traffic, now) = (traffic(1_000), Instant::now());
    traffic.failed(&flow(Direction::Outbound), "CONNECT", now);
    let samples = samples(&traffic);
    let (name, labels) = samples[0].split_once('{').unwrap();
    let labels: Vec<_> =
        labels.rsplit_once('}').unwrap().0.split(',').filter_map(|pair| pair.split_once('=')).collect();
    let labels: Vec<_> = labels.into_iter().map(|(name, value)| (name, value.trim_matches('"'))).collect();
    assert_eq!(name, FAILED);
    assert_eq!(
        labels,
        [
            ("reporter", "source"),
            ("source_workload", "client"),
            ("source_canonical_service", "client"),
            ("source_canonical_revision", "v1"),
            ("source_workload_namespace", "shop"),
            ("source_principal", "spiffe://cluster.local/ns/shop/sa/client"),
            ("source_app", "client"),
            ("source_version", "unknown"),
            ("source_cluster", "Kubernetes"),
            ("destination_service", "server.shop.svc.cluster.local"),
            ("destination_service_namespace", "shop"),
            ("destination_service_name", "server"),
            ("destination_workload", "server"),
            ("destination_canonical_service", "server"),
            ("destination_canonical_revision", "v1"),
            ("destination_workload_namespace", "shop"),
            ("destination_principal", "spiffe://cluster.local/ns/shop/sa/server"),
            ("destination_app", "server"),
            ("destination_version", "unknown"),
            ("destination_cluster", "Kubernetes"),
            ("request_protocol", "tcp"),
            ("response_flags", "CONNECT"),
            ("connection_security_policy", "mutual_tls"),
        ]
    );
}

#[test]
fn regions_and_zones_are_labels_only_where_they_are_asked_for() {
    let now = Instant::now();
    let place = |region: &str, zone: &str| Locality { region: region.into(), zone: zone.into() };
    let localities = Arc::new(HashMap::from([("node-1".into(), place("west", "west-1"))]));
    let elsewhere = Workload { node: "node-2".into(), ..Workload::clone(&workload("server")) };
    let flow = Flow { destination_workload: Some(Arc::new(elsewhere)), ..flow(Direction::Outbound) };
    let mut traffic = traffic(1_000);
    traffic.learn(&localities);
    traffic.failed(&flow, "CONNECT", now);
    assert!(!text(&traffic).contains("_zone="));
    traffic.add_localities();
    traffic.learn(&localities);
    traffic.failed(&flow, "CONNECT", now);
    let wanted = [
        ("source_region", "west"),
        ("source_zone", "west-1"),
        ("destination_region", "unknown"),
        ("destination_zone", "unknown"),
        ("connection_security_policy", "mutual_tls"),
    ];
    assert_eq!(sum(&traffic, FAILED, &wanted), 1);
}

#[test]
fn plaintext_is_none_and_proves_no_principal() {
    let (traffic, now) = (traffic(1_000), Instant::now());
    traffic.failed(&Flow { security: Security::None, ..flow(Direction::Outbound) }, NO_FLAGS, now);
    let plain =
        [("connection_security_policy", "none"), ("source_principal", "unknown"), ("destination_principal", "unknown")];
    assert_eq!(sum(&traffic, FAILED, &plain), 1);
}

#[test]
fn the_table_stays_within_its_cap_and_counts_the_rest_under_overflow() {
    const CAPACITY: usize = 40;
    let (traffic, now) = (traffic(CAPACITY), Instant::now());
    let mut live = Vec::new();
    for id in 0..100 {
        let flow = Flow { source_workload: Some(workload(&format!("client-{id}"))), ..flow(Direction::Inbound) };
        let connection = connection(id, flow);
        traffic.opened(&connection, now);
        carry(&connection, 1, 2);
        live.push(connection);
    }
    traffic.fold(&live, now);
    for (index, connection) in live.iter().enumerate() {
        traffic.closed(connection, if index % 2 == 0 { NO_FLAGS } else { "CONNECT" }, now);
        traffic.failed(&connection.flow, "DENY", now);
    }
    for (metric, wanted) in [(OPENED, 100), (RECEIVED, 100), (SENT, 200), (CLOSED, 100), (FAILED, 100)] {
        assert_eq!(sum(&traffic, metric, &[]), wanted, "{metric}");
    }
    let overflow =
        [("source_workload", "overflow"), ("reporter", "destination"), ("connection_security_policy", "mutual_tls")];
    assert!(sum(&traffic, OPENED, &overflow) >= 90);
    // What overflow itself shows: opened, sent, received, closed with two flags, failed.
    assert!(lines(&traffic) <= CAPACITY + 6, "{}", lines(&traffic));
}

#[test]
fn label_sets_of_gone_workloads_expire_and_make_room() {
    let (traffic, start) = (traffic(4), Instant::now());
    let (idle, gone) = (Duration::from_secs(600), HashSet::new());
    let present: HashSet<_> =
        [("shop", "client"), ("shop", "server")].map(|(namespace, name)| (namespace.into(), name.into())).into();
    let connection = connection(1, flow(Direction::Inbound));
    traffic.opened(&connection, start);
    traffic.expire(&gone, idle, start + idle * 2);
    assert_eq!(sum(&traffic, OPENED, &[]), 1, "a live connection keeps its set");
    traffic.closed(&connection, NO_FLAGS, start);
    traffic.expire(&present, idle, start + idle * 2);
    assert_eq!(sum(&traffic, OPENED, &[]), 1, "workloads that are there keep their set");
    traffic.expire(&gone, idle, start + idle / 2);
    assert_eq!(sum(&traffic, OPENED, &[]), 1, "not idle for long enough");
    traffic.expire(&gone, idle, start + idle * 2);
    assert_eq!(lines(&traffic), 0);
    traffic.opened(&connection, start);
    assert_eq!(sum(&traffic, OPENED, &[("source_workload", "client")]), 1, "there is room again");
}

#[test]
fn a_scrape_of_a_full_table_takes_less_than_two_seconds_unoptimised() {
    let (traffic, now) = (traffic(crate::life::limits::METRIC_SERIES), Instant::now());
    for id in 0..5_000 {
        let flow = Flow { source_workload: Some(workload(&format!("client-{id}"))), ..flow(Direction::Inbound) };
        traffic.opened(&connection(id, flow), now);
    }
    let start = Instant::now();
    let text = text(&traffic);
    for announced in ["# TYPE istio_tcp_sent_bytes_total ", "# HELP istio_tcp_sent_bytes_total "] {
        assert_eq!(text.matches(announced).count(), 1, "once, however many rows there are");
    }
    assert!(text.lines().count() <= crate::life::limits::METRIC_SERIES + 30);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

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
        identity: Box::new(identity),
        trust: Box::new(TrustReport::default),
        sessions: Arc::default(),
        manifest_problems: Box::new(|| 2),
        policy_problems: Box::new(|| vec![(PolicyKind::AuthorizationPolicy, Effect::Denies); 3]),
        pool: Arc::default(),
        policy_gaps: Box::new(|| 1),
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

#[test]
fn a_scrape_tells_of_every_certificate_root_and_call_to_the_ca() {
    let metrics = Metrics::new("Kubernetes".into()).unwrap();
    let text = metrics.scrape(&sources(Vec::new()), 0, vec![], Instant::now()).unwrap();
    for line in [
        "heddle_certificate_expiry_timestamp_seconds{identity=\"spiffe://cluster.local/ns/shop/sa/server\",serial=\"01\",root_serial=\"0b\"} 1000",
        "heddle_certificate_received_timestamp_seconds{identity=\"spiffe://cluster.local/ns/shop/sa/server\"} 500",
        "heddle_certificate_failing{identity=\"spiffe://cluster.local/ns/shop/sa/waits\",reason=\"ca_unreachable\"} 1",
        "heddle_certificate_fetches_total{result=\"ca_unreachable\"} 3",
        "heddle_certificate_fetches_total{result=\"ok\"} 4",
        "heddle_certificate_fetches_under_way 2",
        "heddle_trust_intermediate_expiry_timestamp_seconds{subject=\"CN=middle\",serial=\"0a\"} 1000",
        "heddle_trust_root_expiry_timestamp_seconds{subject=\"CN=root\",serial=\"0b\"} 3000",
    ] {
        assert_eq!(text.lines().filter(|found| *found == line).count(), 1, "{line}\n{text}");
    }
    assert!(!text.contains("failing{identity=\"spiffe://cluster.local/ns/shop/sa/server\""), "{text}");
}

#[test]
fn a_scrape_tells_what_every_stage_knows() {
    let metrics = Metrics::new("Kubernetes".into()).unwrap();
    let live = connection(1, flow(Direction::Inbound));
    metrics.traffic.opened(&live, Instant::now());
    carry(&live, 5, 6);
    metrics.handshake(Direction::Inbound, Err("expired"));
    metrics.handshake(Direction::Outbound, Ok(()));
    metrics.denied(&Denial::Explicit { policy: "shop/deny".into() }, 1);
    metrics.denied(&Denial::NotAllowed, 1);
    let rehearsal = Rehearsal { policy: "shop/trial".into(), action: Action::Deny };
    let now = Instant::now();
    assert_eq!([metrics.rehearsed(&rehearsal, 1, now), metrics.rehearsed(&rehearsal, 1, now)], [true, false]);
    let text = metrics.scrape(&sources(vec![live]), 4, vec![], Instant::now()).unwrap();
    for line in [
        "# TYPE istio_tcp_sent_bytes_total counter",
        "# TYPE heddle_pod_captured gauge",
        "heddle_pod_captured{namespace=\"shop\",pod=\"one\"} 1",
        "heddle_pod_captured{namespace=\"shop\",pod=\"two\",reason=\"place_unknown\"} 0",
        "heddle_pods_captured 1",
        "heddle_pods_uncaptured{reason=\"place_unknown\"} 1",
        "heddle_pod_kernel_events_total{namespace=\"shop\",pod=\"one\",event=\"captured\"} 7",
        "heddle_certificate_expiry_timestamp_seconds{identity=\"spiffe://cluster.local/ns/shop/sa/server\",serial=\"01\",root_serial=\"0b\"} 1000",
        "heddle_tls_handshakes_total{direction=\"inbound\",result=\"expired\"} 1",
        "heddle_tls_handshakes_total{direction=\"outbound\",result=\"ok\"} 1",
        "heddle_denied_total{policy=\"shop/deny\",reason=\"policy_denied\"} 1",
        "heddle_denied_total{policy=\"\",reason=\"policy_not_allowed\"} 1",
        "heddle_connections_open{direction=\"inbound\",security=\"mutual_tls\"} 1",
        "heddle_connections_open{direction=\"outbound\",security=\"none\"} 0",
        "heddle_log_lines_dropped_total 4",
        "heddle_manifest_problems 2",
        "heddle_policy_problems{kind=\"AuthorizationPolicy\",effect=\"denies\"} 3",
        "heddle_policy_problems{kind=\"PeerAuthentication\",effect=\"refuses_plaintext\"} 0",
        "heddle_app_bytes_total{direction=\"inbound\",security=\"mutual_tls\",towards=\"server\"} 5",
        "heddle_app_bytes_total{direction=\"inbound\",security=\"mutual_tls\",towards=\"client\"} 6",
        "istio_tcp_sockets_open{reporter=\"destination\"} 1",
        "heddle_metric_series_overflow_total 0",
        "heddle_dry_run_total{action=\"deny\",policy=\"shop/trial\"} 2",
        "heddle_tunnel_bytes_total{direction=\"outbound\",towards=\"server\"} 0",
        "heddle_pool_connections_closed_total{reason=\"idle\"} 0",
        "heddle_policy_gaps 1",
        "heddle_lane_events_lost_total 3",
        "heddle_lane_verdicts{action=\"allow\"} 5",
        "heddle_lane_verdicts{action=\"deny\"} 2",
        "heddle_lane_misses_total 9",
        "heddle_lane_table_full_total 0",
        "heddle_lane_paths_unproven 0",
        "heddle_lane_tcp_retransmissions_total{direction=\"inbound\"} 0",
        "heddle_connections_open{direction=\"outbound\",security=\"kernel_attested\"} 0",
        "heddle_budget_used{resource=\"descriptors\"} 2",
        "heddle_budget_available{resource=\"buffer_bytes\"} 104857600",
        "heddle_budget_refused_total{reason=\"handshake_budget\"} 1",
        "heddle_budget_refused_total{reason=\"pod_budget\"} 0",
        "heddle_pod_budget_used{namespace=\"shop\",pod=\"one\",resource=\"connections\"} 1",
        concat!("istio_build{component=\"heddle\",tag=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
    ] {
        assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
    }
    let names: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let unique: HashSet<_> = names.iter().collect();
    assert_eq!(names.len(), unique.len(), "each family is announced once");
}

#[test]
fn a_tunnels_bytes_and_health_are_counted_once_whatever_the_order_of_scrape_and_end() {
    let metrics = Metrics::new("Kubernetes".into()).unwrap();
    let line = |text: &str, name: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        found.unwrap_or_else(|| panic!("{name} is not in\n{text}"))
    };
    let (out, into) = (Arc::new(Wire::new(Direction::Outbound)), Arc::new(Wire::new(Direction::Inbound)));
    let health = |segments, retransmitted, lost| Some(TcpHealth { rtt: 2_000, segments, retransmitted, lost });
    metrics.tunnels.opened(&out);
    metrics.tunnels.opened(&into);
    out.sent(100);
    out.received(7);
    into.received(50);
    metrics.tunnels.health(&out, health(u32::MAX - 1, 3, 2));
    let text = metrics.scrape(&sources(vec![]), 0, vec![], Instant::now()).unwrap();
    assert_eq!(line(&text, "heddle_tunnels_open{direction=\"outbound\"}"), 1.0);
    assert_eq!(line(&text, "heddle_tunnel_tcp_lost_segments{direction=\"outbound\"}"), 2.0);
    out.sent(11);
    // The kernel's counter has wrapped: three segments more.
    metrics.tunnels.closed(&out, health(1, 4, 0));
    metrics.tunnels.closed(&out, health(1, 4, 0));
    for _ in 0..2 {
        let text = metrics.scrape(&sources(vec![]), 0, vec![], Instant::now()).unwrap();
        for (name, value) in [
            ("heddle_tunnel_bytes_total{direction=\"outbound\",towards=\"server\"}", 111.0),
            ("heddle_tunnel_bytes_total{direction=\"outbound\",towards=\"client\"}", 7.0),
            ("heddle_tunnel_bytes_total{direction=\"inbound\",towards=\"server\"}", 50.0),
            ("heddle_tunnel_bytes_total{direction=\"inbound\",towards=\"client\"}", 0.0),
            ("heddle_tunnel_tcp_segments_total{direction=\"outbound\"}", f64::from(u32::MAX) + 2.0),
            ("heddle_tunnel_tcp_retransmissions_total{direction=\"outbound\"}", 4.0),
            ("heddle_tunnel_tcp_lost_segments{direction=\"outbound\"}", 0.0),
            ("heddle_tunnels_open{direction=\"outbound\"}", 0.0),
            ("heddle_tunnels_open{direction=\"inbound\"}", 1.0),
        ] {
            assert_eq!(line(&text, name), value, "{name}");
        }
    }
}

#[test]
fn policies_without_end_do_not_make_series_without_end() {
    let metrics = Metrics::new("Kubernetes".into()).unwrap();
    for number in 0..crate::life::limits::METRIC_DENIALS + 100 {
        metrics.denied(&Denial::Explicit { policy: format!("shop/{number}").into() }, 1);
    }
    let text = metrics.scrape(&sources(vec![]), 0, vec![], Instant::now()).unwrap();
    let lines = text.lines().filter(|line| line.starts_with("heddle_denied_total{")).count();
    assert_eq!(lines, crate::life::limits::METRIC_DENIALS + 1);
    assert!(text.contains("heddle_denied_total{policy=\"overflow\",reason=\"policy_denied\"} 100"));
}

fn record<'a>(flow: &'a Flow, end: &'a End, carried: Option<((u64, u64), Duration)>) -> Record<'a> {
    Record {
        time: UNIX_EPOCH + Duration::from_micros(1_790_000_000_123_456),
        cluster: "Kubernetes",
        flow,
        end,
        carried,
    }
}

fn line(record: &Record<'_>, format: Format) -> String {
    String::from_utf8(record.line(format)).unwrap()
}

#[test]
fn a_complete_connection_reads_like_this() {
    let (flow, carried) = (flow(Direction::Outbound), Some(((11, 222), Duration::from_millis(13))));
    let record = record(&flow, &End::Complete, carried);
    assert_eq!(
        line(&record, Format::Text),
        "2026-09-21T14:13:20.123456Z\tinfo\taccess\tconnection complete\t\
         src.addr=10.1.0.2:40000 src.workload=\"client-0\" src.namespace=\"shop\" src.cluster=\"Kubernetes\" \
         src.identity=\"spiffe://cluster.local/ns/shop/sa/client\" dst.addr=10.2.0.3:15008 dst.hbone_addr=10.2.0.3:8080 \
         dst.service=\"server.shop.svc.cluster.local\" dst.workload=\"server-0\" dst.namespace=\"shop\" dst.cluster=\"Kubernetes\" \
         dst.identity=\"spiffe://cluster.local/ns/shop/sa/server\" direction=\"outbound\" security=\"mutual_tls\" \
         bytes_sent=11 bytes_recv=222 duration=\"13ms\" response_flags=\"-\" \
         trace_id=\"0af7651916cd43dd8448eb211c80319c\"\n"
    );
    assert_eq!(
        line(&record, Format::Json),
        "{\"time\":\"2026-09-21T14:13:20.123456Z\",\"level\":\"info\",\"target\":\"access\",\
         \"message\":\"connection complete\",\"src.addr\":\"10.1.0.2:40000\",\"src.workload\":\"client-0\",\
         \"src.namespace\":\"shop\",\"src.cluster\":\"Kubernetes\",\"src.identity\":\"spiffe://cluster.local/ns/shop/sa/client\",\
         \"dst.addr\":\"10.2.0.3:15008\",\"dst.hbone_addr\":\"10.2.0.3:8080\",\
         \"dst.service\":\"server.shop.svc.cluster.local\",\"dst.workload\":\"server-0\",\"dst.namespace\":\"shop\",\"dst.cluster\":\"Kubernetes\",\
         \"dst.identity\":\"spiffe://cluster.local/ns/shop/sa/server\",\"direction\":\"outbound\",\
         \"security\":\"mutual_tls\",\"bytes_sent\":11,\"bytes_recv\":222,\"duration\":\"13ms\",\
         \"response_flags\":\"-\",\"trace_id\":\"0af7651916cd43dd8448eb211c80319c\"}\n"
    );
}

#[test]
fn the_log_tells_bytes_as_each_side_sees_them() {
    let carried = Some(((11, 222), Duration::from_millis(1)));
    let outbound = line(&record(&flow(Direction::Outbound), &End::Complete, carried), Format::Text);
    let inbound = line(&record(&flow(Direction::Inbound), &End::Complete, carried), Format::Text);
    assert!(outbound.contains(" bytes_sent=11 bytes_recv=222 "), "{outbound}");
    assert!(inbound.contains(" bytes_sent=222 bytes_recv=11 "), "{inbound}");
}

#[test]
fn a_denied_connection_names_the_policy_and_a_revoked_one_says_so() {
    let flow = Flow { security: Security::None, hbone_target: None, trace: None, ..flow(Direction::Inbound) };
    let end = End::Denied(Denial::Explicit { policy: "shop/deny".into() });
    let denied: serde_json::Value = serde_json::from_slice(&record(&flow, &end, None).line(Format::Json)).unwrap();
    for (key, value) in [
        ("level", "warn"),
        ("message", "connection denied"),
        ("policy", "shop/deny"),
        ("reason", "policy_denied"),
        ("response_flags", "DENY"),
        ("security", "none"),
        ("error", "explicitly denied by: shop/deny"),
    ] {
        assert_eq!(denied[key], value, "{key}");
    }
    for absent in ["src.identity", "dst.identity", "bytes_sent", "duration", "trace_id", "dst.hbone_addr"] {
        assert!(denied.get(absent).is_none(), "{absent}");
    }
    let revoked = record(&flow, &end, Some(((1, 1), Duration::ZERO)));
    let revoked: serde_json::Value = serde_json::from_slice(&revoked.line(Format::Json)).unwrap();
    assert_eq!(revoked["error"], "connection closed due to policy change: explicitly denied by: shop/deny");
}

#[test]
fn hostile_text_stays_inside_its_quotes_and_its_line() {
    let hostile = "a\"b\\c\nd\r\te\0f\u{7f}g\u{9b}31mh\u{2028}i\u{202e}j\u{feff} src.identity=\"spiffe://x\" }{";
    let mut server = Workload::clone(&workload("server"));
    server.name = hostile.into();
    let flow = Flow { destination_workload: Some(Arc::new(server)), ..flow(Direction::Inbound) };
    let end = End::Failed { reason: "io", response_flags: "CONNECT", detail: hostile.to_owned() };
    let record = record(&flow, &end, None);
    for format in [Format::Text, Format::Json] {
        let line = line(&record, format);
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        let body = line.strip_suffix('\n').unwrap();
        assert!(!body.chars().any(|c| c.is_control() && c != '\t'), "{line:?}");
        assert!(!body.contains(['\u{2028}', '\u{202e}', '\u{feff}', '\u{9b}']), "{line:?}");
        assert_eq!(body.matches('\t').count(), if format == Format::Text { 4 } else { 0 });
    }
    let json: serde_json::Value = serde_json::from_slice(&record.line(Format::Json)).unwrap();
    assert_eq!(json["error"], hostile, "nothing is lost");
    assert_eq!(json["dst.workload"], hostile);
    assert_eq!(json["src.identity"], "spiffe://cluster.local/ns/shop/sa/client");
}

#[test]
fn a_long_error_is_cut_at_a_character() {
    let detail = "é".repeat(crate::life::limits::LOG_DETAIL);
    let end = End::Failed { reason: "io", response_flags: "CONNECT", detail };
    let line = record(&flow(Direction::Inbound), &end, None).line(Format::Json);
    let json: serde_json::Value = serde_json::from_slice(&line).unwrap();
    assert_eq!(json["error"].as_str().unwrap().len(), crate::life::limits::LOG_DETAIL);
}

proptest::proptest! {
    #[test]
    fn any_text_makes_one_line_of_json_that_gives_it_back(text in "\\PC*|[\\x00-\\x{2fff}]{0,64}") {
        let cut = &text[..text.floor_char_boundary(crate::life::limits::LOG_DETAIL)];
        let end = End::Failed { reason: "io", response_flags: "CONNECT", detail: text.clone() };
        let line = record(&flow(Direction::Inbound), &end, None).line(Format::Json);
        proptest::prop_assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        let json: serde_json::Value = serde_json::from_slice(&line).unwrap();
        proptest::prop_assert_eq!(json["error"].as_str().unwrap_or_default(), cut);
    }
}

/// Takes nothing until it is told to, and keeps what it took.
struct Stuck {
    go: mpsc::Receiver<()>,
    taken: Arc<Mutex<Vec<u8>>>,
}

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // An error means: told to go on for good.
        let _for_good = self.go.recv();
        self.taken.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stuck_log_costs_lines_that_are_counted_and_no_time() {
    const QUEUED: usize = 10;
    const WRITTEN: u64 = 1_000;
    let (let_go, go) = mpsc::channel();
    let taken = Arc::new(Mutex::new(Vec::new()));
    let (log, guard) = AccessLog::to(Stuck { go, taken: Arc::clone(&taken) }, Format::Json, QUEUED);
    let telemetry = Telemetry::new("Kubernetes".into(), log.clone()).unwrap();
    let start = Instant::now();
    // Connections that were carried: those that were refused have a limit of their own before the queue.
    for id in 0..WRITTEN {
        let connection = connection(id, flow(Direction::Outbound));
        telemetry.opened(&connection);
        telemetry.closed(&connection, &End::Complete);
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // What the thread holds for its next write, beside the queue: lines have more than 512 bytes.
    let held = crate::life::limits::LOG_WRITE as u64 / 512;
    assert!(log.dropped() >= WRITTEN - 2 * QUEUED as u64 - held, "{}", log.dropped());
    let text = telemetry.scrape(&sources(vec![])).unwrap();
    assert!(text.contains(&format!("heddle_log_lines_dropped_total {}", log.dropped())));
    drop(let_go);
    drop(guard);
    let written = taken.lock().unwrap().iter().filter(|byte| **byte == b'\n').count() as u64;
    assert_eq!(written + log.dropped(), WRITTEN);
}

#[test]
fn an_access_log_file_is_appended_to() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    std::fs::write(&path, "before\n").unwrap();
    let (log, guard) = AccessLog::open(&super::Destination::File(path.clone()), Format::Text).unwrap();
    log.write(&Record {
        time: SystemTime::now(),
        cluster: "Kubernetes",
        flow: &flow(Direction::Inbound),
        end: &End::Complete,
        carried: None,
    });
    drop(guard);
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.starts_with("before\n") && text.lines().count() == 2, "{text}");
}
