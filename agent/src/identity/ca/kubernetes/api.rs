//! Three questions to the API server: whose token is this, what is this pod, which pods are here. Bounded, and never told of.

use std::sync::Arc;

use k8s_openapi::api::core::v1;
use kube::{
    Client,
    api::{ListParams, PostParams, Request},
};
use serde_json::json;
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use super::pods;
use crate::{
    causes,
    identity::ca::{authorize::Pod, refusal::Refusal, review::Review, vitals::Vitals},
    life::limits,
};

pub(super) struct Api {
    client: Client,
    reviews: Arc<Semaphore>,
    pods: Arc<Semaphore>,
    vitals: Vitals,
}

impl Api {
    pub fn new(client: Client, vitals: Vitals) -> Self {
        let questions = || Arc::new(Semaphore::new(limits::CA_QUESTIONS));
        Self { client, reviews: questions(), pods: questions(), vitals }
    }

    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// `POST tokenreviews`. Neither question nor answer is ever written anywhere: both hold the token.
    pub async fn review(&self, token: &[u8], audience: &str) -> Result<Review, Refusal> {
        let _place = place(&self.reviews).await?;
        let token = std::str::from_utf8(token).map_err(|_| Refusal::TokenMalformed("it is no text"))?;
        let review = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": { "token": token, "audiences": [audience] },
        });
        let body = serde_json::to_vec(&review).map_err(|_| Refusal::TokenMalformed("it is no text"))?;
        let request = Request::new("/apis/authentication.k8s.io/v1/tokenreviews")
            .create(&PostParams::default(), body)
            .map_err(|error| Refusal::ApiUnavailable(error.to_string()))?;
        let answer = self.client.request_text(request).await.map(Zeroizing::new);
        self.vitals.asked("tokenreview", answer.is_ok());
        Review::read(&answer.map_err(|error| away(&error))?)
    }

    /// `GET` of one pod; `None` where there is none.
    pub async fn pod(&self, namespace: &str, name: &str) -> Result<Option<Pod>, Refusal> {
        let _place = place(&self.pods).await?;
        let api: kube::Api<v1::Pod> = kube::Api::namespaced(self.client.clone(), namespace);
        let answer = api.get_opt(name).await;
        self.vitals.asked("pod", answer.is_ok());
        Ok(answer.map_err(|error| away(&error))?.as_ref().and_then(pods::read))
    }

    /// `LIST` of the pods of an account on a node that have not finished.
    pub async fn pods_at(&self, node: &str, namespace: &str, account: &str) -> Result<Vec<Pod>, Refusal> {
        let _place = place(&self.pods).await?;
        let api: kube::Api<v1::Pod> = kube::Api::namespaced(self.client.clone(), namespace);
        // Of those that have finished some are asked for too: the log then says that they have.
        let only = format!("spec.nodeName={node},spec.serviceAccountName={account}");
        let answer = api.list(&ListParams::default().fields(&only).limit(limits::CA_PODS_ASKED)).await;
        self.vitals.asked("pods", answer.is_ok());
        Ok(answer.map_err(|error| away(&error))?.items.iter().filter_map(pods::read).collect())
    }
}

async fn place(places: &Semaphore) -> Result<tokio::sync::SemaphorePermit<'_>, Refusal> {
    places.acquire().await.map_err(|_| Refusal::ApiUnavailable("the CA is stopping".to_owned()))
}

/// An error of the API server, or of the way to it: none says anything about who asked us.
fn away(error: &kube::Error) -> Refusal {
    match error {
        kube::Error::Api(status) if matches!(status.code, 401 | 403) => Refusal::ApiForbidden(status.message.clone()),
        kube::Error::Api(status) => Refusal::ApiUnavailable(format!("{} {}", status.code, status.message)),
        // Its text may be that of an answer.
        kube::Error::SerdeError(_) => Refusal::ApiUnavailable("its answer can't be read".to_owned()),
        other => Refusal::ApiUnavailable(causes::told(other)),
    }
}
