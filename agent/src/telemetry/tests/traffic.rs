//! What is counted of connections: bytes, labels, and the table that stays within its cap.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    CLOSED, FAILED, OPENED, RECEIVED, SENT, carry, connection, flow, lines, samples, sum, text, traffic, workload,
};
use crate::{
    cluster::{Locality, Workload},
    telemetry::traffic::NO_FLAGS,
    tunnel::{Direction, Flow, Security},
};

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
