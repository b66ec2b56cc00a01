//! Too much of what is allowed in small amounts: silent peers, handshakes, buffers; and what a defect may take with it.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsConnector;

use super::{
    abuse::reasons,
    carry::{by_hand, echo, ping},
    world::{PANICS, PORT, World},
};
use crate::{
    life::{budget::Machine, limits},
    tunnel::Quiet,
};

fn told(world: &World) -> Vec<&'static str> {
    reasons(&world.b.observer.told.lock().unwrap())
}

fn tunnel_port(world: &World) -> SocketAddr {
    (world.b.address, 15_008).into()
}

async fn from(source: IpAddr, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    socket.connect(to).await.unwrap()
}

/// Another address of the world's subnet.
pub fn neighbour(world: &World, host: u8) -> IpAddr {
    let IpAddr::V4(address) = world.a.address else { unreachable!() };
    let [one, two, three, _] = address.octets();
    [one, two, three, host].into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_sockets_are_closed_at_their_deadline_and_hold_nobody_up() {
    const SILENT: usize = 300;
    let world = World::new();
    echo(world.app().await);
    let mut closing = Vec::new();
    for at in 0..SILENT {
        let mut tcp = world.client_to(tunnel_port(&world)).await;
        let began = Instant::now();
        closing.push(tokio::spawn(async move {
            // A third says nothing, a third begins a record, a third says a byte a second.
            match at % 3 {
                0 => {}
                1 => tcp.write_all(&[22, 3, 1, 2, 0, 1, 0]).await.unwrap(),
                _ => {
                    for byte in [22, 3, 1] {
                        tcp.write_all(&[byte]).await.unwrap();
                        sleep(Duration::from_secs(1)).await;
                    }
                }
            }
            let mut rest = Vec::new();
            let _reset_or_end = tcp.read_to_end(&mut rest).await;
            assert!(rest.is_empty());
            began.elapsed()
        }));
    }
    sleep(Duration::from_millis(500)).await;
    let pressure = world.b.pod.shared.budget.pressure();
    assert_eq!((pressure.pods[0].half_open, pressure.pods[0].connections), (SILENT, 0));
    for _ in 0..20 {
        let mut tcp = world.client().await;
        ping(&mut tcp).await.unwrap();
    }
    for closed in closing {
        let after = timeout(Duration::from_secs(10), closed).await.unwrap().unwrap();
        assert!((4_900..6_000).contains(&after.as_millis()), "closed after {after:?}");
    }
    assert_eq!(told(&world).iter().filter(|reason| **reason == "timeout").count(), SILENT);
    timeout(Duration::from_secs(1), async {
        while world.b.pod.shared.budget.pressure().pods[0].half_open > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("what has gone is no longer counted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_descriptors_are_short_the_oldest_silent_socket_goes() {
    let world = World::on(Machine { descriptors: 600, memory: 1 << 34 });
    echo(world.app().await);
    let mut silent = Vec::new();
    for _ in 0..400 {
        silent.push(world.client_to(tunnel_port(&world)).await);
    }
    // The others still get through, and the first to come were the first to go.
    let mut other = from(neighbour(&world, 50), tunnel_port(&world)).await;
    let mut tcp = world.client().await;
    ping(&mut tcp).await.unwrap();
    let gone = timeout(Duration::from_secs(1), silent[0].read(&mut [0])).await.expect("the oldest is still there");
    assert_eq!(gone.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(timeout(Duration::from_millis(50), other.read(&mut [0])).await.is_err(), "the newest is still there");
    assert!(told(&world).contains(&"half_open_budget"));
    let pressure = world.b.pod.shared.budget.pressure();
    assert!(pressure.descriptors.used <= pressure.descriptors.total, "{pressure:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_hog_is_reset_and_takes_nothing_from_others() {
    let world = World::new();
    echo(world.app().await);
    let (tls, server) = (world.a.pod.edge.tls(), ServerName::from(world.b.address));
    let handshake = async |source: IpAddr| {
        let tcp = from(source, tunnel_port(&world)).await;
        TlsConnector::from(tls.clone()).connect(server.clone(), tcp).await
    };
    let deadline = Instant::now() + Duration::from_secs(2);
    let hog = async {
        let (mut made, mut refused) = (0, 0);
        let began = Instant::now();
        while Instant::now() < deadline {
            for one in futures::future::join_all((0..16).map(|_| handshake(neighbour(&world, 60)))).await {
                if one.is_ok() { made += 1 } else { refused += 1 }
            }
            // Far more than the rate, whatever the machine: the refused cost nothing.
            sleep(Duration::from_millis(4)).await;
        }
        (made, refused, began.elapsed())
    };
    let modest = async {
        let mut made = 0;
        for _ in 0..20 {
            handshake(neighbour(&world, 61)).await.expect("a modest peer is let in");
            made += 1;
            sleep(Duration::from_millis(90)).await;
        }
        made
    };
    let ((made, refused, elapsed), modest) = tokio::join!(hog, modest);
    assert_eq!(modest, 20);
    let most = limits::HANDSHAKES.burst + limits::HANDSHAKES.per_second * (elapsed.as_secs_f64().ceil() as u32);
    assert!(made <= most, "{made} of at most {most}");
    if refused > 0 {
        assert!(told(&world).contains(&"handshake_budget"));
    }
    println!("hog: {made} made, {refused} refused in {elapsed:?}");
}

#[tokio::test]
async fn what_is_idle_for_an_hour_is_closed_and_nothing_else() {
    let world = World::new();
    echo(world.app().await);
    let (mut idle, mut busy) = (world.client().await, world.client().await);
    ping(&mut idle).await.unwrap();
    ping(&mut busy).await.unwrap();
    let mut quiet = Quiet::default();
    let start = std::time::Instant::now();
    for minute in 0..=60 {
        if minute % 20 == 10 {
            ping(&mut busy).await.unwrap();
        }
        let now = start + Duration::from_secs(60 * minute);
        let closed = quiet.close(&world.b.registry, limits::STREAM_IDLE, now);
        assert_eq!(closed, usize::from(minute == 60), "minute {minute}");
    }
    let seen = timeout(Duration::from_secs(5), idle.read(&mut [0])).await.unwrap();
    assert_eq!(seen.unwrap_err().kind(), ErrorKind::ConnectionReset);
    ping(&mut busy).await.unwrap();
    assert_eq!(reasons(&world.b.told(1).await), ["idle"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_in_one_connection_leaves_the_others() {
    let world = World::new();
    echo(world.app().await);
    let mut other = world.client().await;
    ping(&mut other).await.unwrap();
    let (send, tunnel) = by_hand(&world).await;
    let ask = async |port: u16| {
        let request = http::Request::builder().method("CONNECT").uri(format!("{}:{port}", world.b.address));
        let (response, stream) =
            send.clone().ready().await.unwrap().send_request(request.body(()).unwrap(), false).unwrap();
        (response.await.map(|response| response.status()), stream)
    };
    let (answer, _stream) = ask(PANICS).await;
    assert!(answer.is_err(), "{answer:?}");
    // The same tunnel, the other connection, and new ones.
    let (answer, _stream) = ask(PORT).await;
    assert_eq!(answer.unwrap(), http::StatusCode::OK);
    assert!(!tunnel.is_finished());
    ping(&mut other).await.unwrap();
    ping(&mut world.client().await).await.unwrap();
    assert!(told(&world).contains(&"aborted"));
    let pressure = world.b.pod.shared.budget.pressure();
    assert_eq!(pressure.pods[0].half_open, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_streams_are_reset_when_buffers_are_used_up() {
    // 64 MiB of memory: 16 MiB for buffers.
    let world = World::on(Machine { descriptors: 20_000, memory: 64 << 20 });
    let app = world.app().await;
    socket2::SockRef::from(&app).set_recv_buffer_size(4_096).unwrap();
    let kept = tokio::spawn(async move {
        let mut kept = Vec::new();
        loop {
            kept.push(app.accept().await.unwrap().0);
        }
    });
    let block = vec![0; 256 << 10];
    let mut sending = Vec::new();
    for _ in 0..60 {
        let mut tcp = world.client().await;
        let block = block.clone();
        sending.push(tokio::spawn(async move { while tcp.write_all(&block).await.is_ok() {} }));
    }
    let mut most = 0;
    for _ in 0..100 {
        sleep(Duration::from_millis(50)).await;
        most = most.max(world.b.pod.shared.budget.pressure().bytes.used);
        if sending.iter().filter(|one| one.is_finished()).count() > 10 {
            break;
        }
    }
    assert!(told(&world).contains(&"buffer_budget"), "{most} bytes at most; {:?}", told(&world));
    assert!(most <= 32 << 20, "{most} bytes at a time");
    // Those that are left hold their equal parts.
    assert!(sending.iter().any(|one| !one.is_finished()));
    sending.iter().for_each(tokio::task::JoinHandle::abort);
    kept.abort();
}
