//! What a scrape tells of every stage.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Instant, UNIX_EPOCH},
};

use super::{carry, connection, flow, sources};
use crate::{
    capture::TcpHealth,
    identity::{CrlStatus, ListStatus, TrustReport},
    policy::{Action, Denial, Rehearsal},
    telemetry::{Sources, metrics::Metrics},
    tunnel::{Direction, Wire},
};

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
        "heddle_capture_repairs_total 4",
        "heddle_cni_installed 1",
        "heddle_connections_older 6",
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

#[test]
fn a_scrape_tells_which_root_alone_vouches_for_a_revocation_list() {
    let list = |roots: &[&str]| ListStatus {
        issuer: "CN=root".to_owned(),
        revoked: 1,
        next_update: UNIX_EPOCH,
        roots: roots.iter().map(|root| (*root).to_owned()).collect(),
    };
    let lists = vec![list(&["0a"]), list(&["0a"]), list(&["0a", "0b"])];
    let crl = CrlStatus { generation: 1, lists, problem: None, refuses: false };
    let trust = move || TrustReport { crl: Some(crl.clone()), ..TrustReport::default() };
    let sources = Sources { trust: Box::new(trust), ..sources(Vec::new()) };
    let text = Metrics::new("Kubernetes".into()).unwrap().scrape(&sources, 0, vec![], Instant::now()).unwrap();
    let told: Vec<_> = text.lines().filter(|line| line.starts_with("heddle_crl_lists_of_one_root{")).collect();
    assert_eq!(told, ["heddle_crl_lists_of_one_root{root_serial=\"0a\"} 2"]);
}
