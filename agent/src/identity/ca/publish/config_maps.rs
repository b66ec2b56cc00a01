//! The trust bundle in a ConfigMap of the CA's own namespace and of every namespace that is enrolled by its label, or has a pod
//! that is. Taken away again, where it was made here, from a namespace that has left the mesh.
//!
//! Three lists a turn, whatever the number of namespaces; a write only where something differs.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, ObjectList, PostParams, Preconditions},
    core::PartialObjectMeta,
};

use crate::{
    cluster::{MESH, Wish, wish},
    identity::ca::secret::{MANAGED_BY, within},
    life::limits,
};

/// Its name in every namespace, and the key in it.
pub(super) const NAME: &str = "heddle-ca-root";
pub(super) const KEY: &str = "root-cert.pem";

pub(super) struct ConfigMaps {
    client: Client,
    own: String,
    /// Namespaces whose last write failed, so that each failure is told once.
    failing: HashSet<String>,
    away: bool,
}

impl ConfigMaps {
    pub fn new(client: Client, own: &str) -> Self {
        Self { client, own: own.to_owned(), failing: HashSet::new(), away: false }
    }

    /// Brings all of them up to date; whether that worked everywhere.
    pub async fn publish(&mut self, bundle: &str) -> bool {
        let (namespaces, found) = match self.look().await {
            Ok(looked) => looked,
            Err(error) => {
                if !self.away {
                    tracing::warn!(config_map = NAME, %error, "Trust bundle not published to namespaces; trying again.");
                }
                self.away = true;
                return false;
            }
        };
        self.away = false;
        let (mut written, mut removed) = (0_u64, 0_u64);
        let mut failing = HashSet::new();
        for namespace in namespaces.iter().chain(left(&namespaces, &found)) {
            let there = found.get(namespace);
            let done = if !namespaces.contains(namespace) {
                self.remove(namespace, there).await.map(|()| removed += 1)
            } else if there.is_some_and(|map| held(map) == Some(bundle)) {
                Ok(())
            } else {
                self.write(namespace, there, bundle).await.map(|()| written += 1)
            };
            if let Err(error) = done {
                if !self.failing.contains(namespace) {
                    tracing::warn!(namespace, config_map = NAME, %error, "Trust bundle not published; trying again.");
                }
                failing.insert(namespace.clone());
            }
        }
        self.failing = failing;
        if written + removed > 0 {
            tracing::info!(config_map = NAME, written, removed, "Trust bundle published to namespaces.");
        }
        self.failing.is_empty()
    }

    /// Namespaces that are to have it, and the ConfigMaps that there are.
    async fn look(&self) -> Result<(BTreeSet<String>, HashMap<String, ConfigMap>), kube::Error> {
        let page = |params: ListParams| params.limit(limits::KUBE_PAGE);
        let (all, said) = (Api::<Namespace>::all(self.client.clone()), page(ListParams::default().labels(MESH)));
        let mut namespaces: BTreeSet<String> = BTreeSet::from([self.own.clone()]);
        let mut apart = HashSet::new();
        for namespace in pages(said, |wanted| listed(all.clone(), wanted)).await? {
            let ending = namespace.metadata.deletion_timestamp.is_some();
            match wish(namespace.metadata.labels.as_ref()) {
                Wish::Enabled if !ending => drop(namespaces.insert(namespace.name_any())),
                Wish::Disabled => drop(apart.insert(namespace.name_any())),
                _ => {}
            }
        }
        // A pod's own label enrols it wherever its namespace does not say no.
        let (all, said) = (Api::<Pod>::all(self.client.clone()), format!("{MESH}=enabled"));
        let said = page(ListParams::default().labels(&said));
        let pods = pages(said, |wanted| named(all.clone(), wanted)).await?;
        let theirs = pods.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
        let theirs = theirs.filter_map(|pod| pod.metadata.namespace);
        namespaces.extend(theirs.filter(|namespace| !apart.contains(namespace)));
        let all = Api::<ConfigMap>::all(self.client.clone());
        let ours = page(ListParams::default().fields(&format!("metadata.name={NAME}")));
        let maps = pages(ours, |wanted| listed(all.clone(), wanted)).await?;
        let found = maps.into_iter().filter_map(|map| Some((map.metadata.namespace.clone()?, map))).collect();
        Ok((namespaces, found))
    }

    /// Takes away what was seen, and nothing that somebody put in its place since.
    async fn remove(&self, namespace: &str, there: Option<&ConfigMap>) -> Result<(), kube::Error> {
        let Some(there) = there else { return Ok(()) };
        let seen = Preconditions { uid: there.uid(), resource_version: there.resource_version() };
        let params = DeleteParams { preconditions: Some(seen), ..DeleteParams::default() };
        let api = Api::<ConfigMap>::namespaced(self.client.clone(), namespace);
        match within(api.delete(NAME, &params)).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            deleted => deleted.map(drop),
        }
    }

    async fn write(&self, namespace: &str, there: Option<&ConfigMap>, bundle: &str) -> Result<(), kube::Error> {
        let api = Api::<ConfigMap>::namespaced(self.client.clone(), namespace);
        let data = Some(BTreeMap::from([(KEY.to_owned(), bundle.to_owned())]));
        let mut map = ConfigMap { data, ..there.cloned().unwrap_or_default() };
        map.metadata.name = Some(NAME.to_owned());
        map.labels_mut().insert(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned());
        match there {
            // With the version that was seen: what was changed meanwhile is looked at again.
            Some(_) => within(api.replace(NAME, &PostParams::default(), &map)).await,
            None => within(api.create(&PostParams::default(), &map)).await,
        }
        .map(drop)
    }
}

fn held(map: &ConfigMap) -> Option<&str> {
    map.data.as_ref()?.get(KEY).map(String::as_str)
}

/// Namespaces that have what was made here, and are to have it no more.
fn left<'a>(
    wanted: &'a BTreeSet<String>,
    found: &'a HashMap<String, ConfigMap>,
) -> impl Iterator<Item = &'a String> + 'a {
    let ours = |map: &ConfigMap| map.labels().get(MANAGED_BY.0).is_some_and(|by| by == MANAGED_BY.1);
    found
        .iter()
        .filter(move |(namespace, map)| !wanted.contains(*namespace) && ours(map))
        .map(|(namespace, _)| namespace)
}

async fn listed<K>(api: Api<K>, wanted: ListParams) -> Result<ObjectList<K>, kube::Error>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    within(api.list(&wanted)).await
}

/// Names and labels alone.
async fn named(api: Api<Pod>, wanted: ListParams) -> Result<ObjectList<PartialObjectMeta<Pod>>, kube::Error> {
    within(api.list_metadata(&wanted)).await
}

/// Every object of a list, page by page.
async fn pages<K: Clone, L>(mut wanted: ListParams, list: impl Fn(ListParams) -> L) -> Result<Vec<K>, kube::Error>
where
    L: Future<Output = Result<ObjectList<K>, kube::Error>>,
{
    let mut all = Vec::new();
    loop {
        let page = list(wanted.clone()).await?;
        let more = page.metadata.continue_.filter(|token| !token.is_empty());
        all.extend(page.items);
        match more {
            Some(token) => wanted = wanted.continue_token(&token),
            None => return Ok(all),
        }
    }
}
