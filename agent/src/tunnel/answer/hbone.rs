//! The tunnel's end: mutual TLS as the pod, HTTP/2, and for each CONNECT a decision, a delivery and a relay.

use std::{
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream, server::SendResponse};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{AnswerError, admit, ended, failed, meant_service, target::target, witness};
use crate::{
    identity::SpiffeId,
    life::{
        budget::{Arriving, Refusal},
        limits,
    },
    policy,
    tunnel::{
        Direction, Flow, Security, Session, Trace, Witness,
        buffered::Buffered,
        connections::Carried,
        edge::Edge,
        frames::{Alarm, Flood, Frames, Role},
        hello::hello,
        http2,
        meter::Metered,
        pod::{Pod, workload_at},
        proof,
        relay::{self, Counters},
        sessions::Listed,
    },
};

type Tls = TlsStream<Buffered>;

/// What holds for all streams of one connection.
#[derive(Debug)]
struct Peer {
    client: SocketAddr,
    /// podIP:15008.
    local: SocketAddr,
    principal: SpiffeId,
    own: SpiffeId,
    session: Arc<Session>,
    listed: Listed,
    streams: AtomicUsize,
}

/// Serves one connection to the pod's port 15008, to its end. Small until the peer has said something.
pub(crate) async fn hbone<E: Edge>(
    pod: Arc<Pod<E>>,
    mut tcp: TcpStream,
    client: SocketAddr,
    local: SocketAddr,
    arriving: Arriving,
) {
    let deadline = Instant::now() + limits::TLS_HANDSHAKE;
    let mut bytes = BytesMut::new();
    let heard = tokio::select! {
        biased;
        () = arriving.evicted() => Err(AnswerError::Budget(Refusal::HalfOpen)),
        heard = timeout_at(deadline, hello(&mut tcp, &mut bytes)) => match heard {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(tls_failed::<E>(&error)),
            Err(_) => Err(too_late()),
        },
    };
    let heard = heard.and_then(|()| Ok(pod.account.handshake(client.ip())?));
    match heard {
        Ok(()) => Box::pin(greeted(pod, tcp, bytes, client, local, arriving, deadline)).await,
        Err(error) => {
            pod.shared.observer.handshake(Direction::Inbound, Err(error.reason()));
            tell(&pod, client, local, &error);
            relay::reset(tcp);
        }
    }
}

/// Serves a connection whose peer has sent the beginning of a handshake, in `bytes`.
async fn greeted<E: Edge>(
    pod: Arc<Pod<E>>,
    tcp: TcpStream,
    bytes: BytesMut,
    client: SocketAddr,
    local: SocketAddr,
    arriving: Arriving,
    deadline: Instant,
) {
    let authenticated = tokio::select! {
        biased;
        () = arriving.evicted() => Err(AnswerError::Budget(Refusal::HalfOpen)),
        authenticated = authenticate(&pod, tcp, bytes, client, local, deadline) => authenticated,
    };
    match authenticated.and_then(|(tls, peer)| Ok((tls, peer, arriving.establish()?))) {
        Ok((tls, peer, _held)) => {
            pod.shared.observer.handshake(Direction::Inbound, Ok(()));
            if let Err(error) = streams(&pod, tls, Arc::new(peer)).await {
                tell(&pod, client, local, &error);
            }
        }
        Err(error) => {
            pod.shared.observer.handshake(Direction::Inbound, Err(error.reason()));
            tell(&pod, client, local, &error);
        }
    }
}

fn tls_failed<E: Edge>(error: &std::io::Error) -> AnswerError {
    AnswerError::Tls { reason: E::handshake_reason(error), detail: error.to_string().into() }
}

fn too_late() -> AnswerError {
    AnswerError::Tls { reason: "timeout", detail: "no complete handshake came".into() }
}

/// Tells of a connection that failed before any CONNECT.
fn tell<E: Edge>(pod: &Pod<E>, client: SocketAddr, local: SocketAddr, error: &AnswerError) {
    let snapshot = pod.shared.cluster.load();
    let flow = Flow {
        source_workload: workload_at(&snapshot, client.ip()).cloned(),
        destination_workload: Some(pod.record(&snapshot)),
        ..Flow::new(Direction::Inbound, client, local)
    };
    pod.failed(&flow, &failed(error));
}

async fn authenticate<E: Edge>(
    pod: &Pod<E>,
    tcp: TcpStream,
    bytes: BytesMut,
    client: SocketAddr,
    local: SocketAddr,
    deadline: Instant,
) -> Result<(Tls, Peer), AnswerError> {
    let began = Instant::now();
    let record = pod.record(&pod.shared.cluster.load());
    let own = pod
        .identity(&record)
        .map_err(|error| AnswerError::Identity { reason: "bad_spiffe_id", detail: error.to_string().into() })?;
    // Bounded by `Certificates` itself: it waits for a first certificate as long as limits::HOLD.
    let settings = pod
        .edge
        .server(&own)
        .await
        .map_err(|error| AnswerError::Identity { reason: error.reason(), detail: error.to_string().into() })?;
    let tcp = Metered::new(tcp, Direction::Inbound, Arc::clone(&pod.shared.observer));
    tcp.read_before(bytes.len());
    let tcp = Buffered::new(tcp, bytes, None);
    // The peer is not to blame for the time that our own certificate took.
    let deadline = deadline + began.elapsed();
    let mut tls = match timeout_at(deadline, TlsAcceptor::from(settings).accept(tcp)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => return Err(tls_failed::<E>(&error)),
        Err(_) => return Err(too_late()),
    };
    tls.get_mut().1.set_buffer_limit(Some(limits::TLS_WRITE));
    let (tcp, session) = tls.get_ref();
    let certificate = session.peer_certificates().and_then(|chain| chain.first());
    let certificate = certificate.ok_or_else(|| AnswerError::Tls {
        reason: "no_certificate_presented",
        detail: "the client presented no certificate".into(),
    })?;
    let peer = E::peer(certificate)
        .map_err(|error| AnswerError::Tls { reason: error.reason(), detail: error.to_string().into() })?;
    let principal = peer.identity.clone();
    let (state, session) = (session, Session::new(session, Some(peer), pod.edge.serial(&own), tcp.wire()));
    let listed = pod.shared.registry.sessions().enter(&session, state);
    Ok((tls, Peer { client, local, principal, own, session, listed, streams: AtomicUsize::new(0) }))
}

/// Takes streams until the connection ends. After `stop`, or when it is old, the peer is asked to open new ones elsewhere.
async fn streams<E: Edge>(pod: &Arc<Pod<E>>, tls: Tls, peer: Arc<Peer>) -> Result<(), AnswerError> {
    let began = Instant::now();
    let (io, alarm) = Frames::new(tls, Role::Server);
    let mut connection = match timeout(limits::FIRST_CONNECT, http2::server().handshake::<_, Bytes>(io)).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return Err(AnswerError::Http2(error.to_string().into())),
        Err(_) => return Err(AnswerError::NoConnect),
    };
    let mut dead = pin!(http2::until_dead(connection.ping_pong()));
    let mut flood = pin!(alarm.raised());
    let mut timer = pin!(sleep_until(began + limits::FIRST_CONNECT));
    let (mut first, mut leaving) = (true, false);
    let mut last_used = began;
    loop {
        tokio::select! {
            biased;
            () = peer.listed.revoked() => {
                tracing::info!(peer = %peer.principal, serial = %peer.session.peer_serial, "Tunnel ended: the peer's certificate is revoked");
                return Ok(());
            }
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    if first {
                        first = false;
                        timer.as_mut().reset(Instant::now() + limits::POOL_IDLE);
                    }
                    peer.streams.fetch_add(1, Ordering::AcqRel);
                    let guard = Streaming(Arc::clone(&peer));
                    let (pod, alarm) = (Arc::clone(pod), Arc::clone(&alarm));
                    tokio::spawn(async move { stream(&pod, &guard.0, &alarm, request, respond).await });
                }
                Some(Err(error)) => {
                    match error.reason() {
                        // What h2 itself calls a flood: streams that it had to reset, or that were reset before they were taken.
                        Some(Reason::ENHANCE_YOUR_CALM) if error.is_library() => {
                            return Err(AnswerError::Flood(error.to_string().into()));
                        }
                        Some(_) if error.is_library() => return Err(AnswerError::Protocol(error.to_string().into())),
                        _ => {}
                    }
                    if first {
                        return Err(AnswerError::Http2(error.to_string().into()));
                    }
                    tracing::debug!(peer = %peer.principal, %error, "Tunnel ended");
                    return Ok(());
                }
                None => return Ok(()),
            },
            flood = &mut flood => {
                connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                // Nothing is read any more: only the farewell goes out.
                let _told_or_late = timeout(limits::H2_FAREWELL, async { while connection.accept().await.is_some() {} }).await;
                return Err(AnswerError::Flood(flood.to_string().into()));
            }
            () = &mut dead => {
                tracing::debug!(peer = %peer.principal, "Tunnel ended: the peer does not answer pings");
                return Ok(());
            }
            () = timer.as_mut() => {
                if first {
                    return Err(AnswerError::NoConnect);
                }
                let now = Instant::now();
                timer.as_mut().reset(now + limits::POOL_IDLE);
                if peer.streams.load(Ordering::Acquire) > 0 {
                    last_used = now;
                }
                // The offering side closes idle connections first; twice its time is for one that does not.
                let idle = now.duration_since(last_used) > limits::POOL_IDLE * 2;
                if !leaving && (idle || now.duration_since(began) > limits::TUNNEL_AGE_ANSWER) {
                    leaving = true;
                    connection.graceful_shutdown();
                }
            }
            () = pod.stop.cancelled(), if !leaving => {
                leaving = true;
                // A peer that never asked for anything is not waited for once the pod is leaving.
                first = false;
                timer.as_mut().reset(Instant::now() + limits::POOL_IDLE);
                connection.graceful_shutdown();
            }
        }
    }
}

/// Counts a stream while its task lives.
struct Streaming(Arc<Peer>);

impl Drop for Streaming {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Serves one CONNECT, to its end.
async fn stream<E: Edge>(
    pod: &Pod<E>,
    peer: &Peer,
    alarm: &Alarm,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let snapshot = pod.shared.cluster.load();
    let destination = pod.record(&snapshot);
    let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
    // Without a parent, or with one that can't be read, a trace begins here (W3C Trace Context §4.3).
    let joined = header("traceparent").and_then(Trace::join);
    let trace = joined.unwrap_or_else(|| Trace::begin(pod.shared.observer.sample()));
    let mut flow = Flow {
        security: Security::MutualTls,
        // An address is a workload only if TLS says so too: addresses are used again.
        source_workload: workload_at(&snapshot, peer.client.ip())
            // Of our trust domain by whichever of its names: TLS has seen to that.
            .filter(|workload| pod.identity(workload).is_ok_and(|identity| identity.same_account(&peer.principal)))
            .cloned(),
        source_principal: Some(peer.principal.clone()),
        destination_service: meant_service(&snapshot, header("forwarded"), &destination),
        destination_workload: Some(Arc::clone(&destination)),
        destination_principal: Some(peer.own.clone()),
        trace: Some(trace),
        session: Some(Arc::clone(&peer.session)),
        ..Flow::new(Direction::Inbound, peer.client, peer.local)
    };
    drop(snapshot);
    let asked = asked(&request, peer.local).and_then(|app| Ok((app, pod.account.admit(1)?)));
    let (app, _held) = match asked {
        Ok(asked) => asked,
        Err(error) => {
            refuse(&mut respond, &error, None);
            return pod.failed(&flow, &failed(&error));
        }
    };
    // Boxed: nearly no connection is asked.
    let witness = match request.headers().contains_key(&proof::HEADER) {
        true => Some(Box::new(witness::of(pod, pod.uid(), &flow).await)),
        false => None,
    };
    flow.hbone_target = Some(app);
    let question = policy::Request {
        principal: Some(peer.principal.clone()),
        source_ip: peer.client.ip(),
        destination,
        destination_ip: app.ip(),
        destination_port: app.port(),
    };
    let mut carried = Carried::register(&pod.shared.registry, &pod.shared.observer, flow, Some(question));
    let delivered = tokio::select! {
        biased;
        () = carried.cancel.cancelled() => {
            let end = carried.cancelled();
            match &end {
                super::End::Denied(denial) => refuse(&mut respond, &denial.clone().into(), witness),
                _ => answer(&mut respond, StatusCode::SERVICE_UNAVAILABLE, None),
            }
            return carried.end(&end);
        }
        delivered = admit(pod, &carried, peer.client, app) => delivered,
        // The client no longer waits: no connection to the app is left behind for it.
        _ = std::future::poll_fn(|cx| respond.poll_reset(cx)) => Err(AnswerError::ClientGone),
    };
    let (accepted, witness) = match (&delivered, witness) {
        (Ok(_), Some(seen)) => (witness::delivered(pod, &carried, *seen).header(), None),
        (_, seen) => (None, seen),
    };
    match delivered.and_then(|tcp| accept(&mut respond, accepted).map(|send| (tcp, send))) {
        Ok((tcp, send)) => {
            carried.open();
            let counters = Counters { from_near: &carried.received, to_near: &carried.sent };
            let receive = request.into_body();
            let result =
                relay::tunnel(tcp, send, receive, counters, pod.account.buffers(), &carried.cancel, None).await;
            let end = ended(&carried, &result, true);
            carried.end(&end);
        }
        Err(error) => {
            if matches!(error, AnswerError::ClientGone) && !pod.shared.budget.give_up(&peer.principal) {
                alarm.raise(Flood::GivenUp);
            }
            refuse(&mut respond, &error, witness);
            carried.end(&failed(&error));
        }
    }
}

fn asked(request: &Request<RecvStream>, local: SocketAddr) -> Result<SocketAddr, AnswerError> {
    if request.headers().len() > limits::HEADER_FIELDS {
        return Err(AnswerError::HeaderFields);
    }
    // An extended CONNECT (RFC 8441) is no HBONE, and h2 refuses it: it was not announced.
    if request.method() != Method::CONNECT {
        return Err(AnswerError::Method);
    }
    let authority = request.uri().authority().map(http::uri::Authority::as_str).unwrap_or_default();
    Ok(target(authority, local.ip())?)
}

fn accept(respond: &mut SendResponse<Bytes>, witness: Option<HeaderValue>) -> Result<SendStream<Bytes>, AnswerError> {
    respond.send_response(response(StatusCode::OK, witness), false).map_err(|_| AnswerError::ClientGone)
}

fn refuse(respond: &mut SendResponse<Bytes>, error: &AnswerError, witness: Option<Box<Witness>>) {
    let witness = witness.and_then(|seen| witness::refused(*seen, error).header());
    answer(respond, error.status(), witness);
}

fn response(status: StatusCode, witness: Option<HeaderValue>) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    if let Some(witness) = witness {
        response.headers_mut().insert(proof::HEADER, witness);
    }
    response
}

fn answer(respond: &mut SendResponse<Bytes>, status: StatusCode, witness: Option<HeaderValue>) {
    let response = response(status, witness);
    // A client that is gone needs no answer.
    let _ = respond.send_response(response, true);
}
