//! One answer to whoever gets no certificate, from the gRPC library too: a request that it can't take (too large, broken, compressed)
//! never reaches `authority`, which would have counted it and told of it.
//!
//! Between the listener in `server` and the generated service.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response};
use tokio::time::Instant;
use tonic::{Code, Status, body::Body, server::NamedService, transport::server::TcpConnectInfo};
use tower_service::Service;

use super::{authority::Authority, refusal::Refusal};
use crate::life::limits;

/// The one method.
const CREATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The generated service, and who tells of what it refuses by itself.
#[derive(Clone)]
pub(super) struct Opaque<S> {
    pub inner: S,
    pub authority: Arc<Authority>,
}

impl<S: NamedService> NamedService for Opaque<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Opaque<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let began = Instant::now();
        if request.uri().path() != CREATE {
            return Box::pin(self.inner.call(request));
        }
        let peer = request.extensions().get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
        let (answering, authority) = (self.inner.call(request), Arc::clone(&self.authority));
        Box::pin(async move {
            let answer = answering.await?;
            let Some(refusal) = Status::from_header_map(answer.headers()).and_then(|status| of_the_library(&status))
            else {
                return Ok(answer);
            };
            let peer = peer.map(|peer| peer.to_string()).unwrap_or_default();
            Ok(authority.unread(&refusal, &peer, began).await.into_http())
        })
    }
}

/// What the library says of a request, if it is not what `authority` says of one.
fn of_the_library(status: &Status) -> Option<Refusal> {
    match status.code() {
        Code::Ok | Code::Unauthenticated | Code::Unavailable => None,
        Code::OutOfRange => Some(Refusal::Oversize(limits::CA_REQUEST_BYTES)),
        _ => Some(Refusal::Unread(status.message().chars().take(limits::LOG_DETAIL).collect())),
    }
}
