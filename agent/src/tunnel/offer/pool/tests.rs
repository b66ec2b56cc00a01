use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use http::Response;
use tokio::io::DuplexStream;

use super::*;

/// What the peer does with a stream of the connection that is the n-th.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peering {
    /// Answers 200 and keeps the stream.
    Answer,
    /// Says GOAWAY instead of answering.
    GoAway,
    /// Drops the connection instead of answering.
    Drop,
    /// Never connects.
    Refuse,
}

type Kept = (SendStream<Bytes>, RecvStream);

/// Makes connections to a peer inside this process.
#[derive(Debug, Clone)]
struct InProcess {
    made: Arc<AtomicUsize>,
    /// How the first connections behave; later ones answer.
    first: Arc<Vec<Peering>>,
    max_streams: u32,
    takes: Duration,
    kept: Arc<Mutex<Vec<Kept>>>,
}

impl InProcess {
    fn new(first: &[Peering]) -> Self {
        Self {
            made: Arc::default(),
            first: Arc::new(first.to_vec()),
            max_streams: limits::STREAMS_PER_CONNECTION,
            takes: Duration::from_millis(5),
            kept: Arc::default(),
        }
    }
}

impl Connector for InProcess {
    type Io = DuplexStream;

    async fn connect(&self, _: &Key) -> Result<DuplexStream, OfferError> {
        let number = self.made.fetch_add(1, Ordering::SeqCst);
        let peering = self.first.get(number).copied().unwrap_or(Peering::Answer);
        sleep(self.takes).await;
        if peering == Peering::Refuse {
            return Err(OfferError::DialTimeout);
        }
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let (max_streams, kept) = (self.max_streams, self.kept.clone());
        tokio::spawn(async move {
            let mut builder = h2::server::Builder::new();
            builder.max_concurrent_streams(max_streams);
            let mut connection = builder.handshake::<_, Bytes>(theirs).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                match peering {
                    Peering::Answer | Peering::Refuse => {
                        let send = respond.send_response(Response::new(()), false).unwrap();
                        kept.lock().unwrap().push((send, request.into_body()));
                    }
                    Peering::GoAway => connection.abrupt_shutdown(Reason::NO_ERROR),
                    Peering::Drop => return,
                }
            }
        });
        Ok(ours)
    }
}

fn key(uid: &str) -> Key {
    let id = |name: &str| format!("spiffe://cluster.local/ns/default/sa/{name}").parse().unwrap();
    Key {
        pod: "a".into(),
        own: id("a"),
        source: "10.0.0.1".parse().unwrap(),
        uid: uid.into(),
        peer: id("b"),
        address: "10.0.0.2:15008".parse().unwrap(),
    }
}

fn connect() -> Connect {
    Connect::new("10.0.0.2:80".parse().unwrap(), "10.0.0.1:4000".parse().unwrap(), None, None, None).unwrap()
}

#[tokio::test]
async fn a_burst_opens_few_connections_and_all_of_it_is_served() {
    let pool = Pool::new(InProcess::new(&[]));
    let (key, connect) = (key("b"), connect());
    let opened = futures::future::try_join_all((0..200).map(|_| pool.open(&key, &connect))).await.unwrap();
    let made = pool.connector.made.load(Ordering::SeqCst);
    assert!((2..=limits::CONNECTIONS_PER_PEER + 1).contains(&made), "{made} connections for 200 streams");
    let busiest = opened.iter().map(|opened| opened.slot.tunnel.streams.load(Ordering::SeqCst)).max().unwrap();
    assert!(busiest <= limits::STREAMS_PER_CONNECTION as usize, "{busiest} streams on one connection");
}

#[tokio::test]
async fn streams_spread_before_they_fill_a_connection_up() {
    let pool = Pool::new(InProcess::new(&[]));
    let (key, connect) = (key("b"), connect());
    let mut opened = Vec::new();
    for _ in 0..32 {
        opened.push(pool.open(&key, &connect).await.unwrap());
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(pool.total(), limits::CONNECTIONS_PER_PEER);
    for peer in lock(&pool.peers).values() {
        for tunnel in &peer.lock().tunnels {
            assert_eq!(tunnel.streams.load(Ordering::SeqCst), 32 / limits::CONNECTIONS_PER_PEER);
        }
    }
}

#[tokio::test]
async fn the_peers_own_cap_on_streams_is_kept() {
    let mut connector = InProcess::new(&[]);
    connector.max_streams = 2;
    let pool = Pool::new(connector);
    let (key, connect) = (key("b"), connect());
    // The first answer tells of the cap.
    let mut opened = vec![pool.open(&key, &connect).await.unwrap()];
    for _ in 0..9 {
        opened.push(pool.open(&key, &connect).await.unwrap());
    }
    assert!(pool.total() >= 5, "{} connections of two streams for ten", pool.total());
}

#[tokio::test]
async fn a_connection_that_goes_away_unanswered_is_replaced_once() {
    let (key, connect) = (key("b"), connect());
    for first in [Peering::GoAway, Peering::Drop] {
        let pool = Pool::new(InProcess::new(&[first]));
        pool.open(&key, &connect).await.unwrap();
        assert_eq!(pool.connector.made.load(Ordering::SeqCst), 2, "{first:?}");
        assert_eq!(pool.total(), 1);
    }
    let pool = Pool::new(InProcess::new(&[Peering::Drop, Peering::Drop, Peering::Drop]));
    let error = pool.open(&key, &connect).await.unwrap_err();
    assert_eq!((error.reason(), pool.connector.made.load(Ordering::SeqCst)), ("tunnel_lost", 2));
}

#[tokio::test]
async fn one_failed_connection_is_told_to_all_that_waited_and_the_next_tries_again() {
    let pool = Pool::new(InProcess::new(&[Peering::Refuse; 4]));
    let (key, connect) = (key("b"), connect());
    let results = futures::future::join_all((0..50).map(|_| pool.open(&key, &connect))).await;
    assert!(results.iter().all(|result| matches!(result, Err(OfferError::DialTimeout))), "{results:?}");
    assert_eq!(pool.connector.made.load(Ordering::SeqCst), limits::CONNECTIONS_PER_PEER);
    pool.open(&key, &connect).await.unwrap();
}

#[tokio::test]
async fn a_congested_connection_takes_no_new_stream() {
    let pool = Pool::new(InProcess::new(&[]));
    let (key, connect) = (key("b"), connect());
    let first = pool.open(&key, &connect).await.unwrap();
    let stall = first.slot.stalls().begin();
    let second = pool.open(&key, &connect).await.unwrap();
    assert!(Arc::ptr_eq(&first.slot.tunnel, &second.slot.tunnel), "a moment's wait is no congestion");
    sleep(limits::CONGESTED_AFTER * 2).await;
    let third = pool.open(&key, &connect).await.unwrap();
    assert!(!Arc::ptr_eq(&first.slot.tunnel, &third.slot.tunnel));
    drop(stall);
    drop(third);
    let fourth = pool.open(&key, &connect).await.unwrap();
    assert_eq!(pool.total(), 2);
    drop(fourth);
}

#[tokio::test]
async fn idle_connections_are_closed_and_their_peer_forgotten() {
    let pool = Pool::new(InProcess::new(&[]));
    let (key, connect) = (key("b"), connect());
    let busy = pool.open(&key, &connect).await.unwrap();
    let (peer, tunnel) = (busy.slot.peer.clone(), busy.slot.tunnel.clone());
    peer.release(&tunnel, Duration::ZERO);
    assert_eq!(pool.total(), 1, "a connection with a stream is not idle");
    drop(busy);
    peer.release(&tunnel, Duration::from_secs(60));
    assert_eq!(pool.total(), 1, "not idle for so long");
    peer.release(&tunnel, Duration::ZERO);
    assert_eq!(pool.total(), 0);
    pool.connector.kept.lock().unwrap().clear();
    drop(tunnel);
    for _ in 0..500 {
        if lock(&pool.peers).is_empty() {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("the connection did not end");
}

#[tokio::test]
async fn a_forgotten_peer_keeps_its_streams_and_gets_no_new_ones() {
    let pool = Pool::new(InProcess::new(&[]));
    let connect = connect();
    let (gone, stays) = (key("gone"), key("stays"));
    let mut old = pool.open(&gone, &connect).await.unwrap();
    pool.open(&stays, &connect).await.unwrap();
    pool.retain(|key| *key.uid == *"stays");
    assert_eq!(pool.total(), 1);
    old.send.send_data(Bytes::from_static(b"still here"), false).unwrap();
    let fresh = pool.open(&gone, &connect).await.unwrap();
    assert!(!Arc::ptr_eq(&old.slot.tunnel, &fresh.slot.tunnel));
    let arrived = || {
        let mut kept = pool.connector.kept.lock().unwrap();
        kept.iter_mut().find_map(|(_, body)| futures::FutureExt::now_or_never(body.data()).flatten())
    };
    for _ in 0..500 {
        if let Some(data) = arrived() {
            return assert_eq!(data.unwrap(), "still here");
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("the forgotten connection carries nothing");
}

#[tokio::test]
async fn who_waits_for_a_peer_that_is_forgotten_is_told_at_once_and_connects_no_more() {
    let pool = Pool::new(InProcess { takes: Duration::from_millis(50), ..InProcess::new(&[]) });
    let (gone, connect) = (key("gone"), connect());
    let forgotten = async {
        while pool.connector.made.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        pool.retain(|_| false);
    };
    let (opened, ()) = tokio::join!(timeout(Duration::from_secs(5), pool.open(&gone, &connect)), forgotten);
    assert!(matches!(opened, Ok(Err(OfferError::DestinationReplaced))), "{opened:?}");
    assert_eq!(pool.connector.made.load(Ordering::SeqCst), 1);
}
