//! The labels of the `istio_tcp_*` metrics: what a connection is called when it is counted.
//!
//! Values come only from the cluster snapshot and from verified identities, never from what a peer wrote, so a peer can't
//! make series. The byte directions are decided in [`super::traffic`].

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher, Hash, Hasher},
    sync::{Arc, LazyLock},
};

use crate::{
    cluster::{Locality, Workload},
    identity::SpiffeId,
    tunnel::{Direction, Flow, Security},
};

/// Label names in Istio's order, without `response_flags`, which is put in at [`FLAGS_AT`]: it changes at the end.
pub(super) const NAMES: [&str; COUNT] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
];
const COUNT: usize = 26;
/// How many of the names there are where localities are not asked for: the last four are.
pub(super) const WITHOUT_LOCALITY: usize = 22;
/// Where the protocol and the security policy stand among the names.
const PROTOCOL_AT: usize = 20;
const SECURITY_AT: usize = 21;
/// Where `response_flags` stands among the names.
pub(super) const FLAGS_AT: usize = 21;

/// What Istio calls a value that it does not know.
const UNKNOWN: &str = "unknown";
/// Value of the labels under which events count once the table is full.
const OVERFLOW: &str = "overflow";

static UNKNOWN_VALUE: LazyLock<Arc<str>> = LazyLock::new(|| UNKNOWN.into());
static OVERFLOW_VALUE: LazyLock<Arc<str>> = LazyLock::new(|| OVERFLOW.into());
static TCP: LazyLock<Arc<str>> = LazyLock::new(|| "tcp".into());
static SOURCE: LazyLock<Arc<str>> = LazyLock::new(|| "source".into());
static DESTINATION: LazyLock<Arc<str>> = LazyLock::new(|| "destination".into());
static MUTUAL_TLS: LazyLock<Arc<str>> = LazyLock::new(|| "mutual_tls".into());
static KERNEL_ATTESTED: LazyLock<Arc<str>> = LazyLock::new(|| "kernel_attested".into());
static NONE: LazyLock<Arc<str>> = LazyLock::new(|| "none".into());

/// Where nodes are, by name.
pub(super) type Localities = HashMap<Arc<str>, Locality>;

/// One label set, values in the order of [`NAMES`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Labels {
    pub values: [Arc<str>; COUNT],
    /// Of the values, which are looked up more often than they are made.
    hash: u64,
}

static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);

impl Hash for Labels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl Labels {
    /// The labels of a flow. `cluster` is the name of the cluster that known workloads belong to; `localities` where
    /// nodes are, if that is asked for.
    pub fn of(flow: &Flow, cluster: &Arc<str>, localities: Option<&Localities>) -> Self {
        let [r1, z1] = locality(flow.source_workload.as_deref(), localities);
        let [r2, z2] = locality(flow.destination_workload.as_deref(), localities);
        let authenticated = flow.security.authenticates();
        let [s1, s2, s3, s4, s5, s6, s7, s8] =
            side(flow.source_workload.as_deref(), flow.source_principal.as_ref().filter(|_| authenticated), cluster);
        let [d1, d2, d3, d4, d5, d6, d7, d8] = side(
            flow.destination_workload.as_deref(),
            flow.destination_principal.as_ref().filter(|_| authenticated),
            cluster,
        );
        let service = flow.destination_service.as_deref();
        Self::new([
            reporter(flow.direction),
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            s8,
            known(service.map(|service| &service.hostname)),
            known(service.map(|service| &service.namespace)),
            known(service.map(|service| &service.name)),
            d1,
            d2,
            d3,
            d4,
            d5,
            d6,
            d7,
            d8,
            Arc::clone(&TCP),
            security(flow.security),
            r1,
            z1,
            r2,
            z2,
        ])
    }

    fn new(values: [Arc<str>; COUNT]) -> Self {
        let hash = KEYS.hash_one(&values);
        Self { values, hash }
    }

    /// The label set that takes what no longer fits: true `reporter`, protocol and security, all else `overflow`.
    pub fn overflow(direction: Direction, security_policy: Security) -> Self {
        let mut values = std::array::from_fn(|_| Arc::clone(&OVERFLOW_VALUE));
        values[0] = reporter(direction);
        values[PROTOCOL_AT] = Arc::clone(&TCP);
        values[SECURITY_AT] = security(security_policy);
        Self::new(values)
    }

    /// `(namespace, workload)` of each end that was known.
    pub fn workloads(&self) -> impl Iterator<Item = (&str, &str)> {
        [(4, 1), (15, 12)]
            .into_iter()
            .map(|(namespace, workload)| (&*self.values[namespace], &*self.values[workload]))
            .filter(|(_, workload)| *workload != UNKNOWN && *workload != OVERFLOW)
    }
}

/// Workload, canonical service and revision, namespace, principal, app, version, cluster of one end.
fn side(workload: Option<&Workload>, principal: Option<&SpiffeId>, cluster: &Arc<str>) -> [Arc<str>; 8] {
    let naming = workload.map(|workload| &workload.naming);
    [
        known(naming.map(|naming| &naming.workload)),
        known(naming.map(|naming| &naming.canonical_name)),
        known(naming.map(|naming| &naming.canonical_revision)),
        known(workload.map(|workload| &workload.namespace)),
        principal.map_or_else(|| Arc::clone(&UNKNOWN_VALUE), |principal| Arc::from(principal.as_str())),
        known(naming.map(|naming| &naming.app)),
        known(naming.map(|naming| &naming.version)),
        known(workload.map(|_| cluster)),
    ]
}

/// Region and zone of one end.
fn locality(workload: Option<&Workload>, localities: Option<&Localities>) -> [Arc<str>; 2] {
    let found = workload.zip(localities).and_then(|(workload, localities)| localities.get(&workload.node));
    [known(found.map(|found| &found.region)), known(found.map(|found| &found.zone))]
}

fn known(value: Option<&Arc<str>>) -> Arc<str> {
    Arc::clone(value.filter(|value| !value.is_empty()).unwrap_or(&UNKNOWN_VALUE))
}

fn reporter(direction: Direction) -> Arc<str> {
    Arc::clone(match direction {
        Direction::Outbound => &SOURCE,
        Direction::Inbound => &DESTINATION,
    })
}

/// Never `unknown`: whether the bytes are protected is the question that the label answers.
fn security(security: Security) -> Arc<str> {
    Arc::clone(match security {
        Security::MutualTls => &MUTUAL_TLS,
        Security::KernelAttested => &KERNEL_ATTESTED,
        Security::None => &NONE,
    })
}
