//! Connections that were open in a pod's netns when the pod was enrolled: its programs see new ones only, so these go on as they
//! began, outside the mesh.
//!
//! They are known by the cookies of their sockets, as they were found when the programs had just been attached. It never closes one
//! unless it is asked to.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    CaptureError,
    destroy::{Diag, End},
    enrol::blocking,
    netns::Netns,
    pod::Node,
};
use crate::life::limits;

/// One of them that is still open: the pod's own end first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Older {
    pub local: SocketAddr,
    pub remote: SocketAddr,
}

/// The sockets of connections that leave the pod or come to it, by their cookies; no more than are kept.
pub fn found(netns: &Netns, own: &[IpAddr]) -> io::Result<HashSet<u64>> {
    let ends = Diag::open(netns)?.open_connections()?;
    let cookies = ends.iter().filter(|end| leaves(end, own)).filter_map(|end| end.cookie);
    Ok(cookies.take(limits::OLDER).collect())
}

/// Those of these sockets that are still open.
fn still(netns: &Netns, cookies: &HashSet<u64>) -> io::Result<Vec<End>> {
    if cookies.is_empty() {
        return Ok(Vec::new());
    }
    let mut ends = Diag::open(netns)?.open_connections()?;
    ends.retain(|end| end.cookie.is_some_and(|cookie| cookies.contains(&cookie)));
    Ok(ends)
}

/// Not one that the pod has with itself.
fn leaves(end: &End, own: &[IpAddr]) -> bool {
    let (local, remote) = (end.local.ip(), end.remote.ip());
    !(local.is_loopback() || remote.is_loopback() || own.contains(&remote))
}

/// What is still open of each pod's, by uid. Asks the kernel only about pods that have any, and forgets those that ended.
pub fn list(node: &Node) -> Vec<(Arc<str>, Vec<Older>)> {
    let mut listed = Vec::new();
    for pod in node.pods() {
        let (Some(live), cookies) = (pod.live(), pod.older()) else { continue };
        if cookies.is_empty() {
            continue;
        }
        match still(&live.netns, &cookies) {
            Ok(ends) => {
                pod.forget_older(|cookie| ends.iter().any(|end| end.cookie == Some(*cookie)));
                let older = ends.iter().map(|end| Older { local: end.local, remote: end.remote }).collect();
                listed.push((Arc::clone(&pod.uid), older));
            }
            Err(error) => tracing::warn!(pod = %pod.name(), %error, "older connections could not be looked at"),
        }
    }
    listed
}

/// Closes what is still open of a pod's. Gives how many that were.
pub async fn reset(node: &Arc<Node>, uid: &str) -> Result<usize, CaptureError> {
    let (pod, live) = node.live(uid)?;
    blocking(move || {
        let closed = still(&live.netns, &pod.older()).and_then(|ends| Diag::open(&live.netns)?.closed(&ends));
        closed.map_err(|source| CaptureError::Pod {
            pod: Arc::clone(&live.spec.name),
            step: super::error::Step::Older,
            source,
        })
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pod_has_with_itself_is_not_older_than_anything() {
        let own: [IpAddr; 2] = ["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()];
        let end = |local: &str, remote: &str| End {
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
            cookie: Some(1),
        };
        assert!(leaves(&end("10.0.0.7:4000", "10.0.0.8:80"), &own));
        assert!(leaves(&end("[fd00::7]:80", "[fd00::8]:4000"), &own));
        assert!(!leaves(&end("127.0.0.1:4000", "127.0.0.1:80"), &own));
        assert!(!leaves(&end("[::1]:4000", "[::1]:80"), &own));
        assert!(!leaves(&end("10.0.0.7:4000", "10.0.0.7:80"), &own));
    }
}
