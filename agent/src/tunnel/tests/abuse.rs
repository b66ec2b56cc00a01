//! Peers with a good certificate and bad frames.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    carry::{by_hand, echo, ping},
    world::{PORT, Told, World},
};
use crate::{
    life::limits,
    tunnel::{Direction, End},
};

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// `:method: CONNECT`, `:authority: AUTHORITY`, as literals without indexing (RFC 7541 §6.2.2).
pub fn connect(stream: u32, authority: &str) -> Vec<u8> {
    let mut block = vec![0x02, 7];
    block.extend(b"CONNECT");
    block.extend([0x01, u8::try_from(authority.len()).unwrap()]);
    block.extend(authority.as_bytes());
    frame(1, 0x4, stream, &block)
}

/// A TLS connection to `b` on which the preface and empty settings were sent.
pub async fn raw(world: &World) -> TlsStream<TcpStream> {
    let tcp = world.client_to((world.b.address, 15_008).into()).await;
    let name = ServerName::from(world.b.address);
    let mut tls = TlsConnector::from(world.a.pod.edge.tls()).connect(name, tcp).await.unwrap();
    let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    hello.extend(frame(4, 0, 0, &[]));
    tls.write_all(&hello).await.unwrap();
    tls
}

/// What became of a flood.
#[derive(Debug)]
struct Ended {
    /// From the first frame to the end of the connection.
    after: Duration,
    sent: usize,
    /// The error code of the GOAWAY, if one came.
    goaway: Option<u32>,
}

/// Sends `next()` as fast as it can until the connection ends.
async fn flood(world: &World, mut next: impl FnMut() -> Vec<u8>) -> Ended {
    let (mut reader, mut writer) = tokio::io::split(raw(world).await);
    let began = Instant::now();
    let heard = tokio::spawn(async move {
        let mut bytes = Vec::new();
        let _how = reader.read_to_end(&mut bytes).await;
        (bytes, Instant::now())
    });
    let mut sent = 0;
    let sending = async {
        loop {
            let bytes = next();
            if writer.write_all(&bytes).await.is_err() || heard.is_finished() {
                break;
            }
            sent += bytes.len();
        }
    };
    timeout(Duration::from_secs(10), sending).await.expect("the connection goes on");
    let (bytes, ended) = timeout(Duration::from_secs(10), heard).await.expect("the connection goes on").unwrap();
    Ended { after: ended - began, sent, goaway: goaway(&bytes) }
}

fn goaway(mut bytes: &[u8]) -> Option<u32> {
    while let Some((head, rest)) = bytes.split_at_checked(9) {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let payload = rest.get(..length)?;
        if head[3] == 7 {
            return Some(u32::from_be_bytes(payload.get(4..8)?.try_into().unwrap()));
        }
        bytes = &rest[length..];
    }
    None
}

const ENHANCE_YOUR_CALM: u32 = 0xb;

pub fn reasons(told: &[Told]) -> Vec<&'static str> {
    told.iter().map(|told| if let End::Failed { reason, .. } = &told.end { reason } else { "complete" }).collect()
}

/// The flood ends within a second, is told of as one, and the pod's other connections don't notice.
async fn ends(name: &str, next: impl FnMut() -> Vec<u8>) -> Ended {
    ends_as("h2_flood", name, next).await
}

async fn ends_as(reason: &str, name: &str, next: impl FnMut() -> Vec<u8>) -> Ended {
    let world = World::new();
    echo(world.app().await);
    let mut other = world.client().await;
    ping(&mut other).await.unwrap();
    let ended = flood(&world, next).await;
    assert!(ended.after < Duration::from_secs(2), "{name}: {ended:?}");
    ping(&mut other).await.unwrap();
    drop(other);
    for _ in 0..500 {
        if reasons(&world.b.observer.told.lock().unwrap()).contains(&reason) {
            return ended;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{name}: told {:?}", reasons(&world.b.observer.told.lock().unwrap()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_frame_floods_end_the_connection() {
    let cases: [(&str, Vec<u8>); 5] = [
        ("ping", frame(6, 0, 0, &[1; 8])),
        ("answered ping", frame(6, 1, 0, &[1; 8])),
        ("settings", frame(4, 0, 0, &[])),
        ("priority", frame(2, 0, 1, &[0, 0, 0, 0, 7])),
        ("unknown", frame(0xee, 0, 0, &[0; 40])),
    ];
    for (name, bytes) in cases {
        let ended = ends(name, || bytes.repeat(50)).await;
        assert_eq!(ended.goaway, Some(ENHANCE_YOUR_CALM), "{name}: {ended:?}");
        assert!(ended.sent < 4 << 20, "{name}: {ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_continuation_flood_ends_the_connection() {
    let mut first = true;
    let ended = ends("continuation", || {
        let head = if std::mem::take(&mut first) { frame(1, 0, 1, &[]) } else { Vec::new() };
        [head, frame(9, 0, 1, &[]).repeat(100)].concat()
    })
    .await;
    assert_eq!(ended.goaway, Some(ENHANCE_YOUR_CALM), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rapid_reset_ends_the_connection() {
    let mut stream = 1;
    ends("rapid reset", || {
        let mut bytes = Vec::new();
        for _ in 0..64 {
            bytes.extend(connect(stream, "127.9.9.9:80"));
            bytes.extend(frame(3, 0, stream, &8_u32.to_be_bytes()));
            stream += 2;
        }
        bytes
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn making_us_reset_ends_the_connection() {
    // A request without a method is an error of its stream, which we then reset (CVE-2025-8671).
    let mut stream = 1;
    ends("malformed requests", || {
        let mut bytes = Vec::new();
        for _ in 0..32 {
            bytes.extend(frame(1, 0x4, stream, b"\x01\x01x"));
            stream += 2;
        }
        bytes
    })
    .await;
    // h2 takes these as errors of the connection.
    let mut stream = 1;
    ends_as("h2_protocol", "data after the end", || {
        let mut open = connect(stream, "127.9.9.9:80");
        open[4] |= 0x1;
        open.extend(frame(0, 0, stream, b"x"));
        stream += 2;
        open
    })
    .await;
    let mut stream = 1;
    ends_as("h2_protocol", "window update of nothing", || {
        let bytes = [connect(stream, "127.9.9.9:80"), frame(8, 0, stream, &[0; 4])].concat();
        stream += 2;
        bytes
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_given_up_one_by_one_count_for_the_identity() {
    let world = World::new();
    // Nothing listens at the app's address, but its answer takes a moment: each stream is given up before.
    let mut ended = 0;
    for round in 0..limits::H2_GIVEN_UP.burst * 2 {
        // A few on each connection, so that no single one is at a limit of its own.
        let mut tls = raw(&world).await;
        let mut bytes = Vec::new();
        for stream in 0..10 {
            bytes.extend(connect(stream * 2 + 1, &format!("{}:{PORT}", world.b.address)));
            bytes.extend(frame(3, 0, stream * 2 + 1, &8_u32.to_be_bytes()));
        }
        let _may_be_closed = tls.write_all(&bytes).await;
        let mut heard = Vec::new();
        if timeout(Duration::from_millis(30), tls.read_to_end(&mut heard)).await.is_ok() {
            ended += 1;
            if ended == 3 {
                assert!(round >= limits::H2_GIVEN_UP.burst / 10 - 1, "only after {round} connections");
                break;
            }
        }
    }
    assert_eq!(ended, 3, "each further connection ends by its first stream given up");
    assert!(reasons(&world.b.observer.told.lock().unwrap()).contains(&"h2_flood"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn apps_may_reset_their_connections_at_any_rate() {
    let world = World::new();
    echo(world.app().await);
    for _ in 0..u64::from(limits::H2_GIVEN_UP.burst) * 3 {
        let mut tcp = world.client().await;
        ping(&mut tcp).await.unwrap();
        tcp.set_zero_linger().unwrap();
    }
    let handshakes = world.b.observer.handshakes.lock().unwrap().clone();
    assert!(handshakes.len() <= limits::CONNECTIONS_PER_PEER, "tunnels were replaced: {}", handshakes.len());
    assert!(handshakes.iter().all(|(direction, result)| (*direction, *result) == (Direction::Inbound, Ok(()))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn header_fields_and_bytes_have_a_cap() {
    let world = World::new();
    echo(world.app().await);
    let (send, connection) = by_hand(&world).await;
    let ask = async |fields: usize, bytes: usize| {
        let mut request =
            Request::builder().method(Method::CONNECT).uri(format!("{}:{PORT}", world.b.address)).body(()).unwrap();
        for field in 0..fields {
            let name = http::HeaderName::try_from(format!("x-{field}")).unwrap();
            request.headers_mut().insert(name, "v".repeat(bytes).try_into().unwrap());
        }
        let (response, _send) = send.clone().ready().await.unwrap().send_request(request, false).unwrap();
        response.await.map(|response| response.status())
    };
    assert_eq!(ask(limits::HEADER_FIELDS, 10).await.unwrap(), StatusCode::OK);
    assert_eq!(ask(limits::HEADER_FIELDS + 1, 10).await.unwrap(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let told = world.b.told(1).await;
    assert!(reasons(&told).contains(&"header_fields"), "{told:?}");
    // h2 itself answers what decodes to more than the cap.
    let large = ask(4, limits::HEADER_LIST as usize / 4).await;
    assert_eq!(large.unwrap(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    assert_eq!(ask(1, 10).await.unwrap(), StatusCode::OK, "the connection goes on");
    drop((send, connection));
}

/// A small block that refers to a large field of the table again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_bomb_is_refused_and_does_not_grow() {
    let world = World::new();
    let mut tls = raw(&world).await;
    // `x: <4,000 bytes>` with incremental indexing: entry 62. Then 8,000 times entry 62.
    let mut block = vec![0x02, 7];
    block.extend(b"CONNECT");
    block.extend([0x40, 1, b'x', 0x7f]);
    block.extend([0xa1, 0x1e]);
    block.extend([b'v'; 4_000]);
    block.extend([0xbe; 8_000]);
    tls.write_all(&frame(1, 0x5, 1, &block)).await.unwrap();
    let mut heard = vec![0; 4_096];
    let mut all = Vec::new();
    // The answer is 431 or the end; nothing is decoded beyond the cap.
    while let Ok(Ok(read)) = timeout(Duration::from_millis(500), tls.read(&mut heard)).await {
        if read == 0 {
            break;
        }
        all.extend_from_slice(&heard[..read]);
    }
    assert!(!all.is_empty());
    assert!(world.b.observer.told.lock().unwrap().iter().all(|told| !told.opened));
    assert_eq!(world.b.registry.count(), 0);
}

#[tokio::test]
async fn a_flooding_server_loses_its_clients() {
    let world = World::new();
    // `b` as a server that answers CONNECT and then pings without end.
    let listener = tokio::net::TcpListener::bind((world.b.address, 0)).await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (io, alarm) = crate::tunnel::frames::Frames::new(near.unwrap(), crate::tunnel::frames::Role::Client);
    let (_send, connection) = crate::tunnel::http2::client().handshake::<_, Bytes>(io).await.unwrap();
    let driving = tokio::spawn(connection);
    let mut server = far.unwrap().0;
    server.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    let _full = timeout(Duration::from_secs(1), server.write_all(&frame(6, 0, 0, &[2; 8]).repeat(10_000))).await;
    let flood = timeout(Duration::from_secs(1), alarm.raised()).await.unwrap();
    assert_eq!(flood, crate::tunnel::frames::Flood::Pings);
    driving.abort();
}
