//! One request, from its token to its certificate: each question in its turn, and one answer to all who get none.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::time::{sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, metadata::MetadataMap};
use zeroize::Zeroizing;

use super::{
    Authorization, CaConfig, CaError,
    admission::Admission,
    authorize::{Authorized, Caller, holder},
    issue::{Issued, examine, identity, sign},
    kubernetes::Nodes,
    refusal::Refusal,
    root::Root,
    source::Keys,
    vitals::Vitals,
};
use crate::{
    identity::{
        SpiffeId, TrustDomain,
        proto::{
            IstioCertificateRequest, IstioCertificateResponse,
            istio_certificate_service_server::IstioCertificateService,
        },
        roots::read_capped,
    },
    life::{
        budget::{Keyed, Rate},
        limits,
    },
};

/// Who signs, for whom, and how long.
pub(super) struct Authority {
    keys: Arc<Keys>,
    trust_domain: TrustDomain,
    max_lifetime: Duration,
    gate: Gate,
    admission: Admission,
    vitals: Vitals,
    /// Lines about refusals, by reason.
    lines: Mutex<Keyed<&'static str>>,
}

/// Who may ask.
enum Gate {
    /// Whoever holds the token in this file.
    Token(PathBuf),
    /// Agents, for what runs on their node.
    Nodes(Box<Nodes>),
}

/// What is known of a request when it is refused, for the log.
#[derive(Default)]
struct Trail {
    identity: Option<SpiffeId>,
    caller: Option<Caller>,
}

impl Authority {
    /// Nothing is asked yet. `client` is of the API server, where there is one to ask.
    pub fn new(
        keys: Arc<Keys>,
        config: CaConfig,
        client: Option<kube::Client>,
        vitals: Vitals,
    ) -> Result<Self, CaError> {
        let gate = match config.authorization {
            Authorization::Token(file) => Gate::Token(file),
            Authorization::Nodes(nodes) => {
                vitals.add_pods()?;
                Gate::Nodes(Box::new(Nodes::new(nodes, client.ok_or(CaError::NoCluster)?, &vitals)))
            }
        };
        let refusals = Rate { per_second: limits::LOG_REFUSALS, burst: limits::LOG_REFUSALS };
        Ok(Self {
            keys,
            trust_domain: config.trust_domain,
            max_lifetime: config.max_lifetime,
            gate,
            admission: Admission::new(config.max_lifetime),
            vitals,
            lines: Mutex::new(Keyed::new(refusals, limits::LOG_WINDOWS)),
        })
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub fn keys(&self) -> &Arc<Keys> {
        &self.keys
    }

    /// Begins to follow what it decides by, until `stop`.
    pub fn follow(&self, stop: CancellationToken) {
        if let Gate::Nodes(nodes) = &self.gate {
            nodes.follow(self.vitals.clone(), stop);
        }
    }

    async fn create(
        &self,
        root: &Root,
        metadata: &MetadataMap,
        request: &IstioCertificateRequest,
        trail: &mut Trail,
    ) -> Result<Issued, Refusal> {
        let authorizing = self.authorize(metadata, request, trail);
        let authorized = timeout(limits::CA_AUTHORIZE, authorizing)
            .await
            .unwrap_or_else(|_| Err(Refusal::ApiUnavailable(format!("no answer within {:?}", limits::CA_AUTHORIZE))))?;
        let examined = examine(request, authorized, self.max_lifetime)?;
        let approved = self.admission.admit(examined, Instant::now())?;
        sign(root, &approved, SystemTime::now())
    }

    /// The caller may have the identity that it asks for.
    async fn authorize(
        &self,
        metadata: &MetadataMap,
        request: &IstioCertificateRequest,
        trail: &mut Trail,
    ) -> Result<Authorized, Refusal> {
        let token = bearer(metadata)?;
        match &self.gate {
            Gate::Token(file) => {
                let expected = Zeroizing::new(
                    read_capped(file, limits::TOKEN_BYTES)
                        .map_err(|error| Refusal::TokenUnreadable(error.to_string()))?,
                );
                let holder = holder(token, expected.trim_ascii())?;
                let identity = identity(request, &self.trust_domain)?;
                trail.identity = Some(identity.clone());
                Ok(Authorized::holder(holder, identity))
            }
            Gate::Nodes(nodes) => {
                let cluster = metadata.get("clusterid").map(|value| value.to_str().unwrap_or_default());
                let caller = nodes.caller(token, cluster).await?;
                trail.caller = Some(caller.clone());
                let identity = identity(request, &self.trust_domain)?;
                trail.identity = Some(identity.clone());
                nodes.authorize(&caller, &identity, &self.admission).await
            }
        }
    }

    /// A request that could not be read at all is told of and answered like any other that is refused.
    pub async fn unread(&self, refusal: &Refusal, peer: &str, began: tokio::time::Instant) -> Status {
        self.refuse(refusal, peer, &Trail::default(), began).await
    }

    async fn refuse(&self, refusal: &Refusal, peer: &str, trail: &Trail, began: tokio::time::Instant) -> Status {
        self.told(refusal, peer, trail);
        if !refusal.outage() {
            sleep_until(began + step(began.elapsed(), limits::CA_REFUSAL)).await;
        }
        refusal.status()
    }

    /// Counts a refusal, and writes a line about it if there were few of its kind lately.
    fn told(&self, refusal: &Refusal, peer: &str, trail: &Trail) {
        let reason = refusal.reason();
        self.vitals.refused(reason, refusal.outage());
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if !lines.take(&reason, Instant::now()) {
            return;
        }
        drop(lines);
        let caller = trail.caller.as_ref();
        let node = caller.and_then(Caller::node).map_or("", |node| node);
        let pod = caller.map_or("", Caller::pod);
        let identity = trail.identity.as_ref().map_or("", SpiffeId::as_str);
        tracing::warn!(peer, node, pod, identity, reason, error = %refusal, "Certificate refused.");
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Authority {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let began = tokio::time::Instant::now();
        let peer = request.remote_addr().map(|address| address.to_string()).unwrap_or_default();
        let mut trail = Trail::default();
        // A certificate and its chain are of one root, whatever is put in force meanwhile.
        let root = self.keys.current();
        match self.create(&root, request.metadata(), request.get_ref(), &mut trail).await {
            Ok(issued) => {
                let took = began.elapsed();
                self.vitals.issued(took);
                let caller = trail.caller.as_ref();
                let node = caller.and_then(Caller::node).map_or("", |node| node);
                let identity = trail.identity.as_ref().map_or("", SpiffeId::as_str);
                let not_after = humantime::format_rfc3339_seconds(issued.not_after);
                tracing::info!(peer, node, identity, serial = issued.serial, %not_after, "Certificate issued.");
                let cert_chain = std::iter::once(issued.pem()).chain(root.chain_pem()).collect();
                Ok(Response::new(IstioCertificateResponse { cert_chain }))
            }
            Err(refusal) => Err(self.refuse(&refusal, &peer, &trail, began).await),
        }
    }
}

/// The next whole number of steps: what took 3 ms and what took 90 look alike.
fn step(elapsed: Duration, step: Duration) -> Duration {
    let done = elapsed.as_nanos() / step.as_nanos().max(1);
    step.saturating_mul(u32::try_from(done).unwrap_or(u32::MAX - 1) + 1)
}

/// The one token that was presented.
fn bearer(metadata: &MetadataMap) -> Result<&[u8], Refusal> {
    let mut presented = metadata.get_all("authorization").iter();
    let (Some(token), None) = (presented.next(), presented.next()) else {
        return Err(Refusal::NoToken);
    };
    let token = token.as_bytes().strip_prefix(b"Bearer ").ok_or(Refusal::NoToken)?;
    if token.is_empty() { Err(Refusal::NoToken) } else { Ok(token) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::step;

    #[test]
    fn refusals_take_whole_steps() {
        let ms = Duration::from_millis;
        for (elapsed, answered) in [(0, 100), (3, 100), (99, 100), (100, 200), (101, 200), (250, 300)] {
            assert_eq!(step(ms(elapsed), ms(100)), ms(answered), "{elapsed}");
        }
    }
}
