//! What the API server said last, trimmed: objects by kind and name, and how they change. Pure.
//!
//! An object that is sent again as it was stays the one that is there, so that indexing knows it again.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    sync::Arc,
};

use k8s_openapi::{
    api::{
        core::v1::{Namespace, Node, Pod, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::{
    cluster::{
        InvalidPolicy, Objects, PolicyGap, PolicyKind,
        index::{name_of, namespace_of},
        read::Policy,
    },
    life::limits,
};

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Resource {
    Namespaces,
    Nodes,
    Pods,
    Services,
    EndpointSlices,
    AuthorizationPolicies,
    PeerAuthentications,
}

impl Resource {
    pub const ALL: [Self; 7] = [
        Self::Namespaces,
        Self::Nodes,
        Self::Pods,
        Self::Services,
        Self::EndpointSlices,
        Self::AuthorizationPolicies,
        Self::PeerAuthentications,
    ];

    /// The plural of the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Nodes => "nodes",
            Self::Pods => "pods",
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
            Self::AuthorizationPolicies => "authorizationpolicies",
            Self::PeerAuthentications => "peerauthentications",
        }
    }

    /// What readiness waits for.
    pub fn wait(self) -> &'static str {
        match self {
            Self::Namespaces => "the API server's list of namespaces",
            Self::Nodes => "the API server's list of nodes",
            Self::Pods => "the API server's list of pods",
            Self::Services => "the API server's list of services",
            Self::EndpointSlices => "the API server's list of endpointslices",
            Self::AuthorizationPolicies => "the API server's list of authorizationpolicies",
            Self::PeerAuthentications => "the API server's list of peerauthentications",
        }
    }

    pub fn policy(self) -> Option<PolicyKind> {
        match self {
            Self::AuthorizationPolicies => Some(PolicyKind::AuthorizationPolicy),
            Self::PeerAuthentications => Some(PolicyKind::PeerAuthentication),
            _ => None,
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `namespace/name`.
pub(super) type Name = Box<str>;

pub(super) fn name(metadata: &ObjectMeta) -> Name {
    format!("{}/{}", namespace_of(metadata), name_of(metadata)).into()
}

/// An object of a kind that is watched, trimmed.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Object {
    Namespace(Arc<Namespace>),
    Node(Arc<Node>),
    Pod(Arc<Pod>),
    Service(Arc<Service>),
    EndpointSlice(Arc<EndpointSlice>),
    Policy(Policy),
}

/// Everything that is known.
#[derive(Debug, Default)]
pub(super) struct Store {
    tables: BTreeMap<Resource, BTreeMap<Name, Object>>,
    /// Kinds of which there were more than may be kept.
    overfull: BTreeMap<Resource, usize>,
}

impl Store {
    /// An object is there, or has changed. Whether anything is another than before.
    pub fn put(&mut self, resource: Resource, name: Name, object: Object) -> bool {
        let table = self.tables.entry(resource).or_default();
        let full = table.len() >= limits::KUBE_OBJECTS;
        match table.entry(name) {
            Entry::Occupied(known) if *known.get() == object => false,
            Entry::Occupied(mut known) => {
                known.insert(object);
                true
            }
            Entry::Vacant(_) if full => {
                *self.overfull.entry(resource).or_default() += 1;
                true
            }
            Entry::Vacant(free) => {
                free.insert(object);
                true
            }
        }
    }

    /// An object is gone. Whether it was there.
    pub fn remove(&mut self, resource: Resource, name: &str) -> bool {
        self.tables.get_mut(&resource).is_some_and(|table| table.remove(name).is_some())
    }

    /// These are all that there are. Whether anything is another than before.
    pub fn replace(&mut self, resource: Resource, listed: BTreeMap<Name, Object>) -> bool {
        let table = self.tables.entry(resource).or_default();
        let before = table.len();
        table.retain(|name, _| listed.contains_key(name));
        let mut changed = table.len() != before;
        self.overfull.remove(&resource);
        for (name, object) in listed {
            changed |= self.put(resource, name, object);
        }
        changed
    }

    /// Takes all objects of a kind from another store.
    pub fn adopt(&mut self, resource: Resource, other: &mut Self) {
        self.tables.insert(resource, other.tables.remove(&resource).unwrap_or_default());
    }

    pub fn get(&self, resource: Resource, name: &str) -> Option<&Object> {
        self.tables.get(&resource)?.get(name)
    }

    pub fn len(&self, resource: Resource) -> usize {
        self.tables.get(&resource).map_or(0, BTreeMap::len)
    }

    /// Kinds of which some could not be kept, with how many.
    pub fn overfull(&self) -> impl Iterator<Item = (Resource, usize)> {
        self.overfull.iter().map(|(resource, count)| (*resource, *count))
    }

    /// All of them, as they are indexed.
    pub fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        for object in self.tables.values().flat_map(BTreeMap::values).cloned() {
            match object {
                Object::Namespace(one) => objects.namespaces.push(one),
                Object::Node(one) => objects.nodes.push(one),
                Object::Pod(one) => objects.pods.push(one),
                Object::Service(one) => objects.services.push(one),
                Object::EndpointSlice(one) => objects.endpoint_slices.push(one),
                Object::Policy(Policy::Authorization(one)) => objects.authorization_policies.push(one),
                Object::Policy(Policy::Peer(one)) => objects.peer_authentications.push(one),
                Object::Policy(Policy::Invalid(one)) => objects.invalid_policies.push(one),
            }
        }
        // A policy that is not kept may be one that denies.
        let lost = self.overfull.keys().filter(|resource| resource.policy().is_some());
        let gap = |resource: &Resource| Arc::new(PolicyGap { source: resource.name().into(), namespace: None });
        objects.policy_gaps = lost.map(gap).collect();
        objects
    }

    /// What was read from elsewhere.
    pub fn of(objects: Objects) -> Self {
        let mut store = Self::default();
        macro_rules! take {
            ($field:ident, $resource:ident, $make:expr) => {
                for one in objects.$field {
                    store.put(Resource::$resource, name(&one.metadata), $make(one));
                }
            };
        }
        take!(namespaces, Namespaces, Object::Namespace);
        take!(nodes, Nodes, Object::Node);
        take!(pods, Pods, Object::Pod);
        take!(services, Services, Object::Service);
        take!(endpoint_slices, EndpointSlices, Object::EndpointSlice);
        take!(authorization_policies, AuthorizationPolicies, |one| Object::Policy(Policy::Authorization(one)));
        take!(peer_authentications, PeerAuthentications, |one| Object::Policy(Policy::Peer(one)));
        for one in objects.invalid_policies {
            let resource = match one.kind {
                PolicyKind::AuthorizationPolicy => Resource::AuthorizationPolicies,
                PolicyKind::PeerAuthentication => Resource::PeerAuthentications,
            };
            store.put(resource, invalid_name(&one), Object::Policy(Policy::Invalid(one)));
        }
        store
    }

    /// Policies that can't be read as their kind.
    pub fn invalid(&self) -> impl Iterator<Item = &Arc<InvalidPolicy>> {
        let policies = [Resource::AuthorizationPolicies, Resource::PeerAuthentications];
        policies.into_iter().filter_map(|resource| self.tables.get(&resource)).flat_map(BTreeMap::values).filter_map(
            |object| match object {
                Object::Policy(Policy::Invalid(policy)) => Some(policy),
                _ => None,
            },
        )
    }
}

fn invalid_name(policy: &InvalidPolicy) -> Name {
    format!("{}/{}", policy.namespace, policy.name).into()
}

#[cfg(test)]
mod tests;
