//! Who is at the other end: Kubernetes objects turned into one immutable snapshot that every other stage reads.
//!
//! Two sources feed the same types: a directory of manifests, and the API server. Nothing here decides about traffic.
//!
//! ```text
//! files ── manifests ── read ──┐
//!                              ├─► Objects ── index ──► Snapshot ── View ──► every other stage
//! API server ── kubernetes ────┘
//! ```

mod endpoints;
mod enrolment;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod index;
pub mod kinds;
pub(crate) mod kubernetes;
mod manifests;
mod naming;
mod objects;
mod places;
mod probes;
mod read;
mod scrape;
mod services;
mod snapshot;
mod watch;

pub use endpoints::{Candidate, Unavailable, candidates, on_lane};
pub(crate) use enrolment::{MESH, Wish, enrolled, wish};
pub use index::{Settings, index};
pub(crate) use kubernetes::policies;
pub use kubernetes::{ApiServer, ClientError, api_client};
pub(crate) use manifests::{Directory, duplicates, list, text};
pub use manifests::{InForce, ManifestError, Problem};
pub use objects::Objects;
pub use places::{AnnotatedPlaces, Announcement, NodePlaces, Places};
pub(crate) use read::{Found, Manifest, read};
pub use snapshot::{
    Distribution, Endpoint, InvalidPolicy, Locality, Membership, Naming, Place, PolicyGap, PolicyKind, SameNode,
    ScrapeTarget, Service, ServicePort, Snapshot, Unattended, View, Warning, Workload,
};
pub use watch::{Source, SourceError};
