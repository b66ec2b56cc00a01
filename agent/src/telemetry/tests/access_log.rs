//! The lines of the access log, whatever stands in them and however slowly they are taken.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use proptest::prelude::any;

use super::{connection, flow, sources, workload};
use crate::{
    cluster::Workload,
    policy::Denial,
    telemetry::{
        AccessLog, Destination, Format, Record, Telemetry,
        access_log::{Block, Particulars, Printed},
    },
    tunnel::{Direction, End, Flow, Observer, Security},
};

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
    let mut line = Vec::new();
    record.append(0, format, &mut line);
    String::from_utf8(line).unwrap()
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
    let denied: serde_json::Value = serde_json::from_str(&line(&record(&flow, &end, None), Format::Json)).unwrap();
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
    let revoked: serde_json::Value = serde_json::from_str(&line(&revoked, Format::Json)).unwrap();
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
    let json: serde_json::Value = serde_json::from_str(&line(&record, Format::Json)).unwrap();
    assert_eq!(json["error"], hostile, "nothing is lost");
    assert_eq!(json["dst.workload"], hostile);
    assert_eq!(json["src.identity"], "spiffe://cluster.local/ns/shop/sa/client");
}

#[test]
fn a_long_error_is_cut_at_a_character() {
    let detail = "é".repeat(crate::life::limits::LOG_DETAIL);
    let end = End::Failed { reason: "io", response_flags: "CONNECT", detail };
    let line = line(&record(&flow(Direction::Inbound), &end, None), Format::Json);
    let json: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(json["error"].as_str().unwrap().len(), crate::life::limits::LOG_DETAIL);
}

proptest::proptest! {
    #[test]
    fn any_text_makes_one_line_of_json_that_gives_it_back(text in "\\PC*|[\\x00-\\x{2fff}]{0,64}") {
        let cut = &text[..text.floor_char_boundary(crate::life::limits::LOG_DETAIL)];
        let end = End::Failed { reason: "io", response_flags: "CONNECT", detail: text.clone() };
        let line = line(&record(&flow(Direction::Inbound), &end, None), Format::Json);
        proptest::prop_assert_eq!(line.matches('\n').count(), 1);
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        proptest::prop_assert_eq!(json["error"].as_str().unwrap_or_default(), cut);
    }

    #[test]
    fn lines_that_share_an_outline_are_those_of_their_own(
        connections in proptest::collection::vec(
            // Some in the same second, some not; ports and clients' addresses of either family.
            (0_u64..3_000_000, any::<u16>(), any::<(u64, u64)>(), any::<u64>()), 1..20),
        v6 in any::<bool>(),
    ) {
        let host: IpAddr = if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        let shared = Flow { source: SocketAddr::new(host, 0), ..flow(Direction::Inbound) };
        for format in [Format::Text, Format::Json] {
            let outline = {
                let (log, _guard) = AccessLog::to(std::io::sink(), format, 0).unwrap();
                log.outline(&record(&shared, &End::Complete, Some(((0, 0), Duration::ZERO))))
            };
            let mut printed = Printed::default();
            for (since, port, bytes, lasted) in &connections {
                let (time, lasted) = (UNIX_EPOCH + Duration::from_micros(*since), Duration::from_micros(*lasted));
                printed.print(&Particulars { time, port: *port, bytes: *bytes, lasted });
                let mut filled = Vec::new();
                outline.fill(&printed, &mut filled);
                let own = Flow { source: SocketAddr::new(host, *port), ..shared.clone() };
                let own = line(&Record { time, ..record(&own, &End::Complete, Some((*bytes, lasted))) }, format);
                proptest::prop_assert!(own.contains(&humantime::format_rfc3339_micros(time).to_string()));
                proptest::prop_assert!(own.contains(&SocketAddr::new(host, *port).to_string()));
                proptest::prop_assert_eq!(String::from_utf8(filled).unwrap(), own);
            }
        }
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
    /// Bytes; lines have 512 to 1,024.
    const ROOM: usize = 10_240;
    const WRITTEN: u64 = 1_000;
    let (let_go, go) = mpsc::channel();
    let taken = Arc::new(Mutex::new(Vec::new()));
    let (log, guard) = AccessLog::to(Stuck { go, taken: Arc::clone(&taken) }, Format::Json, ROOM).unwrap();
    let telemetry = Telemetry::new("Kubernetes".into(), log.clone()).unwrap();
    let start = Instant::now();
    // Connections that were carried: those that were refused have a limit of their own before the queue.
    for id in 0..WRITTEN {
        let connection = connection(id, flow(Direction::Outbound));
        telemetry.opened(&connection);
        telemetry.closed(&connection, &End::Complete);
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // As much again is what the thread has taken and holds.
    let held = 2 * ROOM as u64 / 512;
    assert!(log.dropped() >= WRITTEN - held && log.dropped() < WRITTEN, "{}", log.dropped());
    let text = telemetry.scrape(&sources(vec![])).unwrap();
    assert!(text.contains(&format!("heddle_log_lines_dropped_total {}", log.dropped())));
    drop(let_go);
    drop(guard);
    let written = taken.lock().unwrap().iter().filter(|byte| **byte == b'\n').count() as u64;
    assert_eq!(written + log.dropped(), WRITTEN);
}

#[test]
fn the_end_does_not_wait_for_a_stuck_log() {
    let (_never, go) = mpsc::channel();
    let (log, guard) = AccessLog::to(Stuck { go, taken: Arc::default() }, Format::Json, 1 << 20).unwrap();
    log.write(&record(&flow(Direction::Inbound), &End::Complete, Some(((1, 1), Duration::ZERO))));
    let start = Instant::now();
    drop(guard);
    assert!(start.elapsed() < 5 * crate::life::limits::LOG_FLUSH, "{:?}", start.elapsed());
}

/// A disk that is full.
struct Full;

impl Write for Full {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::StorageFull.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn lines_that_can_not_be_written_are_counted() {
    let (log, guard) = AccessLog::to(Full, Format::Text, 1 << 20).unwrap();
    let (flow, end) = (flow(Direction::Inbound), End::Complete);
    let record = record(&flow, &end, Some(((1, 1), Duration::ZERO)));
    let mut block = Block::default();
    for _ in 0..7 {
        assert!(log.append(&record, 1, &mut block));
    }
    log.queue(&mut block);
    assert!(block.text.is_empty() && block.lines == 0);
    assert!(log.write(&record));
    drop(guard);
    assert_eq!(log.dropped(), 8);
}

#[test]
fn an_access_log_file_is_appended_to() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    std::fs::write(&path, "before\n").unwrap();
    let (log, guard) = AccessLog::open(&Destination::File(path.clone()), Format::Text).unwrap();
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
