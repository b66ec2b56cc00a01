//! Takes a pod's connections from its listener and gives each a task of its own.
//!
//! What a task does, or how it dies, touches no other. A listener that can't accept waits, longer each time, instead of
//! spinning; what exceeds the pod's budget is reset at once.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    time::timeout,
};

use super::{
    Direction, End, Flow, answer,
    classify::{Arrival, canonical, classify},
    edge::Edge,
    offer,
    pod::{Pod, workload_at},
    relay,
};
use crate::cluster::Workload;
use crate::life::{
    budget::{Arriving, Held},
    limits,
};

/// Accepts until the pod's `stop`, then takes what the kernel has already queued, and returns.
pub(super) async fn serve<E: Edge>(pod: Arc<Pod<E>>, listener: std::net::TcpListener) {
    let listener = match listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener)) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(pod = %pod.uid(), %error, "Listener can't be served");
            return;
        }
    };
    let present = pod.shared.registry.neighbours().enter(pod.uid(), &pod.account);
    let mut view = pod.shared.cluster.clone();
    let mut snapshots_end = false;
    let mut trouble = Trouble::default();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((tcp, peer)) => {
                    trouble.over();
                    take(&pod, tcp, peer, &mut trouble);
                }
                Err(error) => {
                    let pause = trouble.accept(&pod, &error);
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = pod.stop.cancelled() => {}
                    }
                }
            },
            snapshot = view.next(), if !snapshots_end => match snapshot {
                Some(snapshot) => pod.pool.retain(|key| {
                    // Kept as long as the address is still that workload's, by uid and by identity.
                    workload_at(&snapshot, key.address.ip()).is_some_and(|workload| {
                        workload.uid == key.uid && pod.identity(workload).is_ok_and(|identity| identity == key.peer)
                    })
                }),
                None => snapshots_end = true,
            },
            () = pod.stop.cancelled() => break,
        }
    }
    drop(present);
    // Connections whose handshake the kernel has finished would be reset with the listener.
    for _ in 0..limits::LISTEN_BACKLOG {
        match tokio::time::timeout(Duration::ZERO, listener.accept()).await {
            Ok(Ok((tcp, peer))) => take(&pod, tcp, peer, &mut trouble),
            _ => break,
        }
    }
}

fn take<E: Edge>(pod: &Arc<Pod<E>>, tcp: TcpStream, peer: SocketAddr, trouble: &mut Trouble) {
    let Ok(local) = tcp.local_addr() else {
        return relay::reset(tcp);
    };
    let (local, peer) = (canonical(local), canonical(peer));
    let snapshot = pod.shared.cluster.load();
    let record = pod.record(&snapshot);
    let arrival = classify(local, peer, &record.addresses, E::is_probe);
    if arrival == Arrival::Probe {
        let token = pod.token.0;
        tokio::spawn(async move { timeout(limits::PROBE, answer_probe(tcp, token)).await });
        return;
    }
    if arrival == Arrival::Stray {
        trouble.log(pod, || format!("connection from {peer} to {local} is neither to nor from the pod: reset"));
        return relay::reset(tcp);
    }
    let admitted = match arrival {
        // One descriptor until it is known whether the endpoint takes another.
        Arrival::Outbound { .. } => pod.account.admit(1).map(Admitted::Held),
        Arrival::Hbone => pod.account.arrive(peer.ip()).map(Admitted::Arriving),
        _ => pod.account.admit(limits::DESCRIPTORS_PER_CONNECTION).map(Admitted::Held),
    };
    let admitted = match admitted {
        Ok(admitted) => admitted,
        Err(refusal) => {
            trouble.log(pod, || format!("connection from {peer} to {local} reset: {refusal}"));
            let flow = unadmitted(arrival, local, peer, record);
            let detail = refusal.to_string();
            pod.failed(&flow, &End::Failed { reason: refusal.reason(), response_flags: "-", detail });
            return relay::reset(tcp);
        }
    };
    // Without it small answers wait for a delayed acknowledgement. A socket that refuses it is broken, and says so when used.
    let _ = tcp.set_nodelay(true);
    let pod = Arc::clone(pod);
    // A task of its own size for each kind: one that has said nothing yet is to cost next to nothing.
    match (arrival, admitted) {
        (Arrival::Outbound { destination }, Admitted::Held(held)) => {
            tokio::spawn(async move {
                let _held = held;
                offer::carry(&pod, tcp, peer, destination).await;
            });
        }
        (Arrival::Plaintext { app }, Admitted::Held(held)) => {
            tokio::spawn(async move {
                let _held = held;
                answer::plaintext(&pod, tcp, peer, app).await;
            });
        }
        (_, Admitted::Arriving(arriving)) => {
            tokio::spawn(answer::hbone(pod, tcp, peer, local, arriving));
        }
        (_, Admitted::Held(_)) => {}
    }
}

/// What a connection is let in by.
enum Admitted {
    Held(Held),
    Arriving(Arriving),
}

async fn answer_probe(mut tcp: TcpStream, token: [u8; 16]) -> io::Result<()> {
    tcp.write_all(&token).await?;
    tcp.shutdown().await
}

/// What is told of a connection that was not let in: the pod, and the addresses.
fn unadmitted(arrival: Arrival, local: SocketAddr, peer: SocketAddr, pod: Arc<Workload>) -> Flow {
    match arrival {
        Arrival::Outbound { .. } => Flow { source_workload: Some(pod), ..Flow::new(Direction::Outbound, peer, local) },
        _ => Flow { destination_workload: Some(pod), ..Flow::new(Direction::Inbound, peer, local) },
    }
}

/// Trouble at the listener: how long to pause, and what to log, once in a while.
#[derive(Debug, Default)]
struct Trouble {
    pause: Duration,
    logged: Option<Instant>,
    unlogged: u64,
}

impl Trouble {
    fn over(&mut self) {
        self.pause = Duration::ZERO;
    }

    fn accept<E: Edge>(&mut self, pod: &Pod<E>, error: &io::Error) -> Duration {
        self.log(pod, || format!("accept failed: {error}"));
        self.longer()
    }

    /// The next pause: twice the last.
    fn longer(&mut self) -> Duration {
        self.pause = (self.pause * 2).clamp(limits::ACCEPT_PAUSE_MIN, limits::ACCEPT_PAUSE_MAX);
        self.pause
    }

    fn log<E: Edge>(&mut self, pod: &Pod<E>, message: impl FnOnce() -> String) {
        if self.logged.is_some_and(|at| at.elapsed() < limits::ACCEPT_LOG) {
            self.unlogged += 1;
            return;
        }
        tracing::warn!(pod = %pod.uid(), unlogged = self.unlogged, "{}", message());
        self.logged = Some(Instant::now());
        self.unlogged = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_pauses_double_up_to_the_cap_and_start_again_when_over() {
        let mut trouble = Trouble::default();
        let pauses: Vec<Duration> = (0..12).map(|_| trouble.longer()).collect();
        assert_eq!(pauses.first(), Some(&limits::ACCEPT_PAUSE_MIN));
        assert!(pauses.windows(2).all(|pair| pair[1] == (pair[0] * 2).min(limits::ACCEPT_PAUSE_MAX)));
        assert_eq!(pauses.last(), Some(&limits::ACCEPT_PAUSE_MAX));
        trouble.over();
        assert_eq!(trouble.longer(), limits::ACCEPT_PAUSE_MIN);
    }
}
