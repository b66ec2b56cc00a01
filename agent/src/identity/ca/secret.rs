//! A signing key in a Kubernetes Secret: made once, whichever replica comes first, and followed by all of them.
//!
//! A Secret that exists is never overwritten here, however little sense it makes: it may be the only copy of a key.

use std::{collections::BTreeMap, pin::pin, time::Duration};

use futures::StreamExt;
use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Client,
    api::PostParams,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use zeroize::Zeroizing;

use super::{
    CaError,
    root::{Generated, KeyError, KeyProblem, Material, Part},
    source::{BUNDLE, CERTIFICATE, KEY, blank},
};
use crate::{identity::TrustDomain, life::limits};

/// Who made it: on every object that the CA makes.
pub(super) const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "heddle");

/// One Secret.
pub(super) struct SecretSource {
    api: Api<Secret>,
    namespace: String,
    name: String,
}

impl SecretSource {
    pub fn new(client: Client, namespace: &str, name: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// What it holds; where it is absent it is made with a new root. Of several replicas one makes it, the others read that.
    pub async fn ensure(&self, lifetime: Duration, trust_domain: &TrustDomain) -> Result<Material, CaError> {
        let found = within(self.api.get_opt(&self.name)).await.map_err(|error| self.unreadable(error))?;
        if let Some(secret) = found {
            return Ok(self.material(&secret));
        }
        let generated = Generated::new(lifetime, trust_domain)?;
        match within(self.api.create(&PostParams::default(), &self.new_secret(&generated))).await {
            Ok(made) => {
                tracing::info!(secret = self.place(), "Secret made, with a new root.");
                Ok(self.material(&made))
            }
            // Another replica was faster: its root is everyone's.
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                let secret = within(self.api.get(&self.name)).await.map_err(|error| self.unreadable(error))?;
                Ok(self.material(&secret))
            }
            Err(error) => Err(self.unreadable(error).into()),
        }
    }

    /// Hands every state of it to `offer`. Ends never: an API server that is away is tried again.
    pub async fn follow(&self, offer: impl Fn(Material)) {
        let wanted =
            watcher::Config::default().fields(&format!("metadata.name={}", self.name)).timeout(limits::KUBE_WATCH);
        let mut events = pin!(watcher(self.api.clone(), wanted).default_backoff());
        let (mut away, mut listed) = (false, false);
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    away = false;
                    match event {
                        Event::Init => listed = false,
                        Event::InitApply(secret) | Event::Apply(secret) => {
                            listed = true;
                            offer(self.material(&secret));
                        }
                        Event::InitDone if listed => {}
                        Event::InitDone | Event::Delete(_) => offer(self.missing()),
                    }
                }
                Err(error) => {
                    if !away {
                        tracing::warn!(secret = self.place(), %error, "Secret can't be followed, what it held stays in force.");
                    }
                    away = true;
                }
            }
        }
    }

    fn new_secret(&self, generated: &Generated) -> Secret {
        let certificate = generated.certificate.clone().into_bytes();
        let data =
            [(CERTIFICATE, certificate.clone()), (KEY, generated.key.as_bytes().to_vec()), (BUNDLE, certificate)];
        Secret {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                labels: Some(BTreeMap::from([(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned())])),
                ..ObjectMeta::default()
            },
            type_: Some("kubernetes.io/tls".to_owned()),
            data: Some(data.into_iter().map(|(key, bytes)| (key.to_owned(), ByteString(bytes))).collect()),
            ..Secret::default()
        }
    }

    fn material(&self, secret: &Secret) -> Material {
        let part = |key: &str| {
            let bytes =
                secret.data.as_ref().and_then(|data| data.get(key)).map(|bytes| Zeroizing::new(bytes.0.clone()));
            self.part(key, bytes.ok_or(KeyProblem::Missing))
        };
        Material {
            certificate: part(CERTIFICATE),
            key: part(KEY),
            bundle: Some(part(BUNDLE)).filter(|part| !blank(part)),
        }
    }

    fn missing(&self) -> Material {
        let part = |key| self.part(key, Err(KeyProblem::Missing));
        Material { certificate: part(CERTIFICATE), key: part(KEY), bundle: None }
    }

    fn part(&self, key: &str, content: Result<Zeroizing<Vec<u8>>, KeyProblem>) -> Part {
        Part { place: format!("{key} of Secret {}", self.place()), content }
    }

    fn unreadable(&self, error: kube::Error) -> KeyError {
        KeyError::new(format!("Secret {}", self.place()), KeyProblem::Unreadable(error.to_string()))
    }

    fn place(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// One call to the API server, with a deadline.
pub(super) async fn within<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, kube::Error> {
    match tokio::time::timeout(limits::KUBE_CALL, call).await {
        Ok(result) => result,
        Err(_) => Err(kube::Error::Service(format!("no answer within {:?}", limits::KUBE_CALL).into())),
    }
}
