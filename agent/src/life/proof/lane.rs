//! What the kernel says of a connection that a proof made and that never came to the agent: both pods are on this node.
//!
//! It reads the kernel's tables, and takes for seen only what is of this very connection: its own 4-tuple while it is open, or a
//! counter of denials that rose when it was refused.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use heddle_common::{Attestation, Pair, Verdict, side, verdict};

use crate::{
    capture::{self, CaptureError, ResidentPod},
    cluster::{self, Snapshot, Workload},
};

/// The kernel's tables, as far as they are asked here.
pub(super) trait Kernel {
    fn residents(&self) -> Vec<ResidentPod>;
    fn attested(&self, client: SocketAddr, app: SocketAddr) -> Option<Attestation>;
    fn verdicts(&self) -> Result<Vec<(Pair, Verdict)>, CaptureError>;
    fn denial(&self, counter: u32) -> Result<u64, CaptureError>;
}

impl Kernel for capture::Lane {
    fn residents(&self) -> Vec<ResidentPod> {
        self.residents()
    }

    fn attested(&self, client: SocketAddr, app: SocketAddr) -> Option<Attestation> {
        self.attested(client, app)
    }

    fn verdicts(&self) -> Result<Vec<(Pair, Verdict)>, CaptureError> {
        self.verdicts()
    }

    fn denial(&self, counter: u32) -> Result<u64, CaptureError> {
        self.denial(counter)
    }
}

/// A pod of this node that the kernel may carry the connection to, and the kernel's name of it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Peer {
    pod: Arc<Workload>,
    app: SocketAddr,
    id: u64,
}

/// What the kernel may do with the connection, noted before it is made.
#[derive(Debug, Clone)]
pub(super) struct Ahead {
    source: u64,
    own: Vec<IpAddr>,
    peers: Vec<Peer>,
    /// How often each pair of the source that it denies was denied so far.
    denied: Vec<(Pair, u32, u64)>,
}

/// A connection that the kernel carries by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Carried {
    pub client: SocketAddr,
    pub app: SocketAddr,
    pub pod: Arc<Workload>,
    /// The kernel's names of both pods.
    pub ids: (u64, u64),
    /// The other side's handshake is complete, too: its app has it.
    pub established: bool,
}

impl Ahead {
    /// For a connection of `from`, a pod of `node`, to `to`; `None` where the kernel would carry it to nobody by itself.
    ///
    /// # Errors
    /// When a table can't be read.
    pub fn of(
        kernel: &impl Kernel,
        snapshot: &Snapshot,
        node: &str,
        from: &Workload,
        to: SocketAddr,
    ) -> Result<Option<Self>, CaptureError> {
        let residents = kernel.residents();
        let id = |uid: &str| residents.iter().find(|resident| *resident.uid == *uid).map(|resident| resident.id.0);
        let Some(source) = id(&from.uid) else { return Ok(None) };
        let peers: Vec<Peer> = reachable(snapshot, node, to)
            .into_iter()
            .filter_map(|(app, pod)| Some(Peer { id: id(&pod.uid)?, pod, app }))
            .collect();
        if peers.is_empty() {
            return Ok(None);
        }
        let mut ahead = Self { source, own: from.addresses.clone(), peers, denied: Vec::new() };
        for (pair, Verdict { counter, .. }) in ahead.verdicts(kernel, verdict::DENY)? {
            ahead.denied.push((pair, counter, kernel.denial(counter)?));
        }
        Ok(Some(ahead))
    }

    /// The connection from the source's port, if the kernel carries it at this moment.
    pub fn carried(&self, kernel: &impl Kernel, port: u16) -> Option<Carried> {
        self.peers.iter().find_map(|peer| {
            let own = self.own.iter().filter(|own| own.is_ipv4() == peer.app.is_ipv4());
            own.map(|own| SocketAddr::new(*own, port)).find_map(|client| {
                let found = kernel.attested(client, peer.app)?;
                ((found.source, found.destination) == (self.source, peer.id)).then(|| Carried {
                    client,
                    app: peer.app,
                    pod: Arc::clone(&peer.pod),
                    ids: (found.source, found.destination),
                    established: found.destination_state & side::ESTABLISHED != 0,
                })
            })
        })
    }

    /// The pod, and its address, that the kernel has refused the source since then; `None` where it refused none, or several.
    ///
    /// # Errors
    /// When a table can't be read.
    pub fn refused(&self, kernel: &impl Kernel) -> Result<Option<(Arc<Workload>, SocketAddr)>, CaptureError> {
        let mut refused = Vec::new();
        for (pair, counter, before) in &self.denied {
            if kernel.denial(*counter)? > *before {
                refused.extend(self.peer(pair));
            }
        }
        Ok(only(refused))
    }

    /// The pod, and its address, that the kernel would carry the source's connections to; `None` where that is none, or several.
    ///
    /// # Errors
    /// When a table can't be read.
    pub fn allowed(&self, kernel: &impl Kernel) -> Result<Option<(Arc<Workload>, SocketAddr)>, CaptureError> {
        let allowed = self.verdicts(kernel, verdict::ALLOW)?;
        Ok(only(allowed.iter().filter_map(|(pair, _)| self.peer(pair)).collect()))
    }

    fn verdicts(&self, kernel: &impl Kernel, action: u32) -> Result<Vec<(Pair, Verdict)>, CaptureError> {
        let mut all = kernel.verdicts()?;
        all.retain(|(pair, verdict)| verdict.action == action && self.peer(pair).is_some());
        Ok(all)
    }

    fn peer(&self, pair: &Pair) -> Option<(Arc<Workload>, SocketAddr)> {
        let meant = |peer: &&Peer| *pair == Pair::new(self.source, peer.id, peer.app.port());
        self.peers.iter().find(meant).map(|peer| (Arc::clone(&peer.pod), peer.app))
    }
}

fn only<T>(mut all: Vec<T>) -> Option<T> {
    let first = all.pop();
    first.filter(|_| all.is_empty())
}

/// Enrolled pods of the node that a connection to `to` may reach, with the address of their app.
fn reachable(snapshot: &Snapshot, node: &str, to: SocketAddr) -> Vec<(SocketAddr, Arc<Workload>)> {
    match snapshot.by_cluster_address.get(&to.ip()) {
        Some(service) => {
            let all = cluster::candidates(snapshot, node, service, to.port(), to.ip()).unwrap_or_default();
            let on_lane = cluster::on_lane(&all, node, to.ip());
            on_lane.filter_map(|(_, one)| Some((one.address, Arc::clone(one.workload.as_ref()?)))).collect()
        }
        None => {
            let pod = snapshot.by_address.get(&to.ip()).filter(|pod| pod.enrolled && *pod.node == *node);
            pod.map(|pod| (to, Arc::clone(pod))).into_iter().collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use heddle_common::attested_by;

    use super::*;
    use crate::{capture::WorkloadId, cluster::fuzzing};

    const CLUSTER: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIPs: [10.96.0.1], ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.0.0.2]}, {addresses: [10.0.0.3]}, {addresses: [10.0.0.4]}]
";

    /// Pods a to c of node n1, d of node n2, at 10.0.0.1 to 4.
    fn cluster() -> Snapshot {
        let pods = [("a", "n1", 1), ("b", "n1", 2), ("c", "n1", 3), ("d", "n2", 4)].map(|(name, node, at)| {
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: {name}, labels: {{heddle.dev/mesh: enabled}}}}\n\
                 spec: {{containers: [], nodeName: {node}}}\nstatus: {{podIPs: [{{ip: 10.0.0.{at}}}]}}\n"
            )
        });
        fuzzing::snapshot(&(CLUSTER.to_owned() + &pods.concat()))
    }

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// Pods a, b and c are residents 1, 2 and 3.
    #[derive(Default)]
    struct Tables {
        attested: RefCell<Vec<(SocketAddr, SocketAddr, Attestation)>>,
        verdicts: Vec<(Pair, Verdict)>,
        denials: RefCell<[u64; 4]>,
    }

    impl Kernel for Tables {
        fn residents(&self) -> Vec<ResidentPod> {
            let pods = [("a", 1), ("b", 2), ("c", 3)].into_iter();
            let resident = |(uid, id): (&str, u64)| ResidentPod {
                uid: uid.into(),
                id: WorkloadId(id),
                slot: 0,
                addresses: Vec::new(),
                attestable: true,
            };
            pods.map(resident).collect()
        }

        fn attested(&self, client: SocketAddr, app: SocketAddr) -> Option<Attestation> {
            let attested = self.attested.borrow();
            attested.iter().find(|(from, to, _)| (*from, *to) == (client, app)).map(|(.., found)| *found)
        }

        fn verdicts(&self) -> Result<Vec<(Pair, Verdict)>, CaptureError> {
            Ok(self.verdicts.clone())
        }

        fn denial(&self, counter: u32) -> Result<u64, CaptureError> {
            Ok(self.denials.borrow()[usize::try_from(counter).unwrap()])
        }
    }

    fn ahead(tables: &Tables, to: &str) -> Option<Ahead> {
        let snapshot = cluster();
        Ahead::of(tables, &snapshot, "n1", &snapshot.workloads["a"], at(to)).unwrap()
    }

    fn attestation(source: u64, destination: u64, destination_state: u32) -> Attestation {
        Attestation { by: attested_by::KERNEL, source, destination, destination_state, ..Attestation::by_agent(0) }
    }

    #[test]
    fn the_kernel_carries_to_enrolled_pods_of_its_node_alone() {
        let tables = Tables::default();
        let peers = |to: &str| {
            let peers = ahead(&tables, to).map(|ahead| ahead.peers).unwrap_or_default();
            peers.iter().map(|peer| format!("{} {}", peer.id, peer.app)).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(peers("10.0.0.2:7000"), "2 10.0.0.2:7000");
        assert_eq!(peers("10.96.0.1:80"), "2 10.0.0.2:8080, 3 10.0.0.3:8080");
        for nobody in ["10.0.0.4:7000", "10.9.9.9:7000", "10.96.0.1:81"] {
            assert_eq!(peers(nobody), "", "{nobody}");
        }
        let snapshot = cluster();
        let stranger = &snapshot.workloads["d"];
        assert!(Ahead::of(&tables, &snapshot, "n1", stranger, at("10.0.0.2:7000")).unwrap().is_none());
    }

    #[test]
    fn only_its_own_connection_between_the_two_pods_meant_is_found() {
        let tables = Tables::default();
        let ahead = ahead(&tables, "10.96.0.1:80").unwrap();
        let found = |client: &str, app: &str, attestation: Attestation| {
            *tables.attested.borrow_mut() = vec![(at(client), at(app), attestation)];
            ahead.carried(&tables, 4000)
        };
        let (client, app) = ("10.0.0.1:4000", "10.0.0.3:8080");
        let carried = found(client, app, attestation(1, 3, side::ESTABLISHED)).unwrap();
        assert_eq!((carried.client, carried.app, &*carried.pod.name, carried.ids), (at(client), at(app), "c", (1, 3)));
        assert!(carried.established);
        assert!(!found(client, app, attestation(1, 3, 0)).unwrap().established);
        // Another's, an earlier pod's, another port, another app.
        assert_eq!(found(client, app, attestation(2, 3, side::ESTABLISHED)), None);
        assert_eq!(found(client, app, attestation(1, 2, side::ESTABLISHED)), None);
        assert_eq!(found("10.0.0.1:4001", app, attestation(1, 3, side::ESTABLISHED)), None);
        assert_eq!(found(client, "10.0.0.3:9090", attestation(1, 3, side::ESTABLISHED)), None);
    }

    #[test]
    fn a_refusal_is_the_one_whose_count_rose() {
        let verdict = |source, destination, port, action, counter| {
            (Pair::new(source, destination, port), Verdict { action, counter })
        };
        let tables = Tables {
            verdicts: vec![
                verdict(1, 2, 8080, verdict::DENY, 0),
                verdict(1, 3, 8080, verdict::DENY, 1),
                verdict(2, 3, 8080, verdict::DENY, 2),
                verdict(1, 3, 9090, verdict::DENY, 3),
            ],
            denials: RefCell::new([5; 4]),
            ..Tables::default()
        };
        let ahead = ahead(&tables, "10.96.0.1:80").unwrap();
        let refused = |denials: [u64; 4]| {
            *tables.denials.borrow_mut() = denials;
            ahead.refused(&tables).unwrap().map(|(pod, app)| format!("{} {app}", pod.name))
        };
        assert_eq!(refused([5; 4]), None);
        assert_eq!(refused([5, 6, 5, 5]).as_deref(), Some("c 10.0.0.3:8080"));
        assert_eq!(refused([5, 5, 6, 6]), None, "other pairs'");
        assert_eq!(refused([6, 6, 5, 5]), None, "nobody can say which");
    }

    #[test]
    fn what_would_be_carried_is_said_where_it_is_one() {
        let allow =
            |destination, port| (Pair::new(1, destination, port), Verdict { action: verdict::ALLOW, counter: 0 });
        let allowed = |verdicts: Vec<(Pair, Verdict)>, to: &str| {
            let tables = Tables { verdicts, ..Tables::default() };
            let found = ahead(&tables, to).unwrap().allowed(&tables).unwrap();
            found.map(|(pod, app)| format!("{} {app}", pod.name))
        };
        assert_eq!(allowed(vec![allow(2, 7000)], "10.0.0.2:7000").as_deref(), Some("b 10.0.0.2:7000"));
        assert_eq!(allowed(vec![allow(2, 7001)], "10.0.0.2:7000"), None);
        assert_eq!(allowed(vec![allow(2, 8080), allow(3, 8080)], "10.96.0.1:80"), None);
    }
}
