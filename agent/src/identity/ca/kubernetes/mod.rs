//! Node authorization in a Kubernetes cluster: who calls, and may its node have this identity?
//!
//! Asks `review` and `authorize`, which decide, and brings them the API server's words. What the watch knows answers at once;
//! before anybody is refused by it, or let in by what a silent watch knew, the API server is asked itself. An API server that is away
//! is an outage, not a refusal.

mod api;
mod pods;
mod watch;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Instant, SystemTime},
};

use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

#[cfg(test)]
pub(super) use self::pods::read;
use self::{api::Api, pods::Pods};
use super::{
    NodeAuthorization,
    admission::Admission,
    authorize::{Authorized, Bound, Caller, Pod, Rules, bound, here},
    recent::Recent,
    refusal::Refusal,
    review::claims,
    vitals::Vitals,
};
use crate::{identity::SpiffeId, life::limits};

/// What the API server said of a token, and how long that holds.
#[derive(Debug)]
struct Kept {
    until: Instant,
    outcome: Result<Bound, Refusal>,
}

/// One question for all who ask it at once.
type Review = Arc<OnceCell<Kept>>;

pub(super) struct Nodes {
    api: Api,
    pods: Arc<Pods>,
    rules: Rules,
    cluster_id: String,
    /// By the token's SHA-256.
    reviews: Mutex<Recent<[u8; 32], Review>>,
}

impl Nodes {
    /// Nothing is asked yet.
    pub fn new(config: NodeAuthorization, client: kube::Client, vitals: &Vitals) -> Self {
        vitals.wait(watch::WAIT);
        Self {
            api: Api::new(client, vitals.clone()),
            pods: Arc::new(Pods::new()),
            rules: Rules { audience: config.audience, agents: config.agents },
            cluster_id: config.cluster_id,
            reviews: Mutex::new(Recent::new(limits::CA_REVIEWS)),
        }
    }

    /// Follows the cluster's pods until `stop`.
    pub fn follow(&self, vitals: Vitals, stop: CancellationToken) {
        let (pods, client) = (Arc::clone(&self.pods), self.api.client());
        tokio::spawn(stop.run_until_cancelled_owned(watch::follow(pods, client, vitals)));
    }

    /// Who calls: the agent of which node. `cluster` is where the caller thinks it is.
    pub async fn caller(&self, token: &[u8], cluster: Option<&str>) -> Result<Caller, Refusal> {
        if let Some(other) = cluster.filter(|name| *name != self.cluster_id) {
            return Err(Refusal::Cluster(other.chars().take(limits::LOG_DETAIL).collect()));
        }
        let bound = self.review(token).await?;
        let known = self.pods.named(bound.namespace(), bound.pod());
        if let Some(known) = &known
            && self.pods.certain(known, Instant::now())
            && let Ok(caller) = bound.stand(Some(known), SystemTime::now())
        {
            return Ok(caller);
        }
        let pod = self.ask(bound.namespace(), bound.pod(), known.as_deref()).await?;
        bound.stand(pod.as_ref(), SystemTime::now())
    }

    /// What the API server says of a pod now. Where that is what is known of it, what is known holds for a while.
    async fn ask(&self, namespace: &str, name: &str, known: Option<&Pod>) -> Result<Option<Pod>, Refusal> {
        let asked = Instant::now();
        let pod = self.api.pod(namespace, name).await?;
        if let Some(known) = known.filter(|known| pod.as_ref() == Some(known)) {
            self.pods.confirm(known, asked);
        }
        Ok(pod)
    }

    /// Whether the caller's node may have the identity.
    pub async fn authorize(
        &self,
        caller: &Caller,
        identity: &SpiffeId,
        admission: &Admission,
    ) -> Result<Authorized, Refusal> {
        let node = caller.node().ok_or(Refusal::Token)?;
        let (namespace, account) = (identity.namespace(), identity.service_account());
        let (known, mut doubtful) = (self.pods.at(node, namespace, account), None);
        for pod in &known {
            let Ok(authorized) = here(caller, identity, [&**pod], SystemTime::now()) else { continue };
            if self.pods.certain(pod, Instant::now()) {
                return Ok(authorized);
            }
            doubtful.get_or_insert(pod);
        }
        if let Some(known) = doubtful {
            let pod = self.ask(&known.namespace, &known.name, Some(known)).await?;
            if let Ok(authorized) = here(caller, identity, &pod, SystemTime::now()) {
                return Ok(authorized);
            }
        }
        admission.question(node, Instant::now())?;
        let pods = self.api.pods_at(node, namespace, account).await?;
        here(caller, identity, &pods, SystemTime::now())
    }

    async fn review(&self, token: &[u8]) -> Result<Bound, Refusal> {
        let claims = claims(token, &self.rules.audience, SystemTime::now())?;
        let left = claims.expires.duration_since(SystemTime::now()).map_err(|_| Refusal::TokenExpired)?;
        let review = self.slot(Sha256::digest(token).into(), Instant::now());
        let ask = async || {
            let outcome = self.api.review(token, &self.rules.audience).await?;
            let outcome = bound(&self.rules, &outcome);
            let holds = if outcome.is_ok() { limits::CA_REVIEW.min(left) } else { limits::CA_REVIEW_REFUSED };
            Ok::<_, Refusal>(Kept { until: Instant::now() + holds, outcome })
        };
        review.get_or_try_init(ask).await?.outcome.clone()
    }

    /// Where the answer about a token is, or will be.
    fn slot(&self, token: [u8; 32], now: Instant) -> Review {
        let mut reviews = self.reviews.lock().unwrap_or_else(PoisonError::into_inner);
        let holds = |review: &&Review| review.get().is_none_or(|kept| now < kept.until);
        if let Some(review) = reviews.get(&token, now).filter(holds) {
            return Arc::clone(review);
        }
        let review = Review::default();
        reviews.put(token, Arc::clone(&review), now + limits::CA_REVIEW, now);
        review
    }
}
