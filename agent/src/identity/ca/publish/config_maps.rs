//! The trust bundle in a ConfigMap of the CA's own namespace and of every namespace that is enrolled by its label.
//!
//! Two lists a turn, whatever the number of namespaces; a write only where something differs.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use k8s_openapi::{
    api::core::v1::{ConfigMap, Namespace},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, PostParams},
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
        let mut written = 0_u64;
        let mut failing = HashSet::new();
        for namespace in namespaces {
            let there = found.get(&namespace);
            if there.is_some_and(|map| held(map) == Some(bundle)) {
                continue;
            }
            match self.write(&namespace, there, bundle).await {
                Ok(()) => written += 1,
                Err(error) => {
                    if !self.failing.contains(&namespace) {
                        tracing::warn!(namespace, config_map = NAME, %error, "Trust bundle not published; trying again.");
                    }
                    failing.insert(namespace);
                }
            }
        }
        self.failing = failing;
        if written > 0 {
            tracing::info!(config_map = NAME, written, "Trust bundle published to namespaces.");
        }
        self.failing.is_empty()
    }

    /// Namespaces that are to have it, and the ConfigMaps that there are.
    async fn look(&self) -> Result<(BTreeSet<String>, HashMap<String, ConfigMap>), kube::Error> {
        let enrolled = ListParams::default().labels(MESH).limit(limits::KUBE_PAGE);
        let mut namespaces: BTreeSet<String> = BTreeSet::from([self.own.clone()]);
        for namespace in pages(&Api::<Namespace>::all(self.client.clone()), enrolled).await? {
            let ending = namespace.metadata.deletion_timestamp.is_some();
            if !ending && wish(namespace.metadata.labels.as_ref()) == Wish::Enabled {
                namespaces.insert(namespace.name_any());
            }
        }
        let named = ListParams::default().fields(&format!("metadata.name={NAME}")).limit(limits::KUBE_PAGE);
        let maps = pages(&Api::<ConfigMap>::all(self.client.clone()), named).await?;
        let found = maps.into_iter().filter_map(|map| Some((map.metadata.namespace.clone()?, map))).collect();
        Ok((namespaces, found))
    }

    async fn write(&self, namespace: &str, there: Option<&ConfigMap>, bundle: &str) -> Result<(), kube::Error> {
        let api = Api::<ConfigMap>::namespaced(self.client.clone(), namespace);
        let data = Some(BTreeMap::from([(KEY.to_owned(), bundle.to_owned())]));
        match there {
            // With the version that was seen: what was changed meanwhile is looked at again.
            Some(map) => within(api.replace(NAME, &PostParams::default(), &ConfigMap { data, ..map.clone() })).await,
            None => {
                let labels = BTreeMap::from([(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned())]);
                let metadata =
                    ObjectMeta { name: Some(NAME.to_owned()), labels: Some(labels), ..ObjectMeta::default() };
                within(api.create(&PostParams::default(), &ConfigMap { metadata, data, ..ConfigMap::default() })).await
            }
        }
        .map(drop)
    }
}

fn held(map: &ConfigMap) -> Option<&str> {
    map.data.as_ref()?.get(KEY).map(String::as_str)
}

/// Every object of a list, page by page.
async fn pages<K>(api: &Api<K>, mut wanted: ListParams) -> Result<Vec<K>, kube::Error>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let mut all = Vec::new();
    loop {
        let page = within(api.list(&wanted)).await?;
        let more = page.metadata.continue_.filter(|token| !token.is_empty());
        all.extend(page.items);
        match more {
            Some(token) => wanted = wanted.continue_token(&token),
            None => return Ok(all),
        }
    }
}
