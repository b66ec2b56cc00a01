//! How long a peer or an app may keep the answering side waiting, and what it is told that it may have.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use http::{Method, Request, StatusCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, timeout},
};

use super::{
    abuse::{connect, frame, raw, reasons},
    carry::{by_hand, echo},
    world::{HANGS, PORT, World},
};
use crate::life::limits;

/// One HTTP/2 frame as it is on the wire (RFC 9113 §4.1): type, flags, stream, payload.
type Frame = (u8, u8, u32, Vec<u8>);

async fn next_frame(from: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<Frame> {
    let mut head = [0; 9];
    from.read_exact(&mut head).await?;
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    from.read_exact(&mut payload).await?;
    Ok((head[3], head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff, payload))
}

/// Reads on to the end; how long that took.
async fn ended(mut tls: impl AsyncReadExt + Unpin, since: Instant) -> Duration {
    let mut heard = Vec::new();
    // Closed without a TLS goodbye is closed, too.
    let _how = timeout(Duration::from_secs(30), tls.read_to_end(&mut heard)).await.expect("the connection goes on");
    since.elapsed()
}

/// From `limit`, with what a busy machine needs.
fn around(limit: Duration) -> Range<Duration> {
    limit.saturating_sub(Duration::from_millis(200))..limit + Duration::from_secs(2)
}

fn told(world: &World) -> Vec<&'static str> {
    reasons(&world.b.observer.told.lock().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_asks_for_nothing_is_closed() {
    let world = World::new();
    let tls = raw(&world).await;
    let after = ended(tls, Instant::now()).await;
    assert!(around(limits::FIRST_CONNECT).contains(&after), "closed after {after:?}");
    assert_eq!(told(&world), ["no_connect"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_answers_no_ping_is_closed() {
    let world = World::new();
    echo(world.app().await);
    let mut tls = raw(&world).await;
    tls.write_all(&connect(1, &format!("{}:{PORT}", world.b.address))).await.unwrap();
    let after = ended(tls, Instant::now()).await;
    assert!(around(limits::PING_INTERVAL + limits::PING_TIMEOUT).contains(&after), "closed after {after:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_does_not_accept_is_not_waited_for() {
    let world = World::new();
    let (mut send, _connection) = by_hand(&world).await;
    let began = Instant::now();
    let request = Request::builder().method(Method::CONNECT).uri(format!("{}:{HANGS}", world.b.address));
    let (response, _stream) = send.send_request(request.body(()).unwrap(), false).unwrap();
    let response = timeout(Duration::from_secs(30), response).await.unwrap().unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    let after = began.elapsed();
    assert!(around(limits::CONNECT_APP).contains(&after), "answered after {after:?}");
    assert_eq!(told(&world), ["app_timeout"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_is_told_its_limits_and_held_to_them() {
    const SETTINGS: u8 = 4;
    const WINDOW_UPDATE: u8 = 8;
    const RST_STREAM: u8 = 3;
    const REFUSED_STREAM: u32 = 7;
    let world = World::new();
    echo(world.app().await);
    let mut tls = raw(&world).await;
    let (mut settings, mut window) = (BTreeMap::new(), 0);
    while settings.is_empty() || window == 0 {
        match next_frame(&mut tls).await.unwrap() {
            (SETTINGS, 0, 0, payload) => settings.extend(payload.chunks(6).map(|pair| {
                let value = pair[2..].try_into().unwrap();
                (u16::from_be_bytes([pair[0], pair[1]]), u32::from_be_bytes(value))
            })),
            (WINDOW_UPDATE, _, 0, payload) => window = u32::from_be_bytes(payload.try_into().unwrap()),
            _ => {}
        }
    }
    // RFC 9113 §6.5.2: concurrent streams, initial window, frame size, header list.
    let expected =
        [(3, limits::STREAMS_PER_CONNECTION), (4, limits::STREAM_WINDOW), (5, limits::FRAME), (6, limits::HEADER_LIST)];
    for (setting, value) in expected {
        assert_eq!(settings.get(&setting), Some(&value), "{setting} of {settings:?}");
    }
    assert_eq!(window, limits::CONNECTION_WINDOW - 65_535);
    const { assert!(limits::CONNECTION_WINDOW > limits::STREAM_WINDOW * limits::STREAMS_PER_CONNECTION) };

    // Acknowledged (§6.5.3): from now on it counts.
    tls.write_all(&frame(SETTINGS, 1, 0, &[])).await.unwrap();
    let authority = format!("{}:{PORT}", world.b.address);
    let over = 2 * limits::STREAMS_PER_CONNECTION + 1;
    for stream in (1..=over).step_by(2) {
        tls.write_all(&connect(stream, &authority)).await.unwrap();
    }
    let refused = async {
        loop {
            if let (RST_STREAM, _, stream, code) = next_frame(&mut tls).await.unwrap() {
                return (stream, u32::from_be_bytes(code.try_into().unwrap()));
            }
        }
    };
    assert_eq!(timeout(Duration::from_secs(10), refused).await.unwrap(), (over, REFUSED_STREAM));
}
