//! Measures whether a pod is captured: links and listener as the kernel has them, then a connection each way.
//!
//! What is not proven is blocked: the listener is taken out of the pod's slot, so `lookup` refuses instead of handing
//! connections to something that does not work. The next proof puts it back first.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path, sync::Arc};

use super::{
    PodState,
    enrol::blocking,
    kernel, load,
    pod::{Live, Node, Pod},
    probe,
};

/// Why a pod is not proven.
struct Failure {
    reason: &'static str,
    detail: String,
}

fn failure(reason: &'static str) -> impl FnOnce(String) -> Failure {
    move |detail| Failure { reason, detail }
}

pub async fn prove(node: &Arc<Node>, uid: &str) -> PodState {
    let Some(pod) = node.pod(uid) else {
        return PodState::Uncaptured { reason: "not_attached", detail: format!("pod {uid} is not attached") };
    };
    let _turn = pod.turn.lock().await;
    let Some(live) = pod.live() else {
        return match pod.state() {
            uncaptured @ PodState::Uncaptured { .. } => uncaptured,
            _ => PodState::Uncaptured { reason: "not_attached", detail: format!("pod {uid} is not attached") },
        };
    };
    let state = match measure(node, &pod, &live).await {
        Ok(()) => PodState::Captured,
        Err(Failure { reason, detail }) => {
            tracing::warn!(pod = %live.spec.name, reason, %detail, "not captured: new connections are refused");
            block(node, &pod, &live).await;
            PodState::Uncaptured { reason, detail }
        }
    };
    pod.set_state(state.clone());
    state
}

async fn measure(node: &Arc<Node>, pod: &Arc<Pod>, live: &Arc<Live>) -> Result<(), Failure> {
    {
        let (node, pod, live) = (Arc::clone(node), Arc::clone(pod), Arc::clone(live));
        blocking(move || Ok(read_back(&node, &pod, &live)))
            .await
            .map_err(|error| failure(error.reason())(error.to_string()))??;
    }
    let place = &live.spec.place;
    for v6 in [false, true] {
        let mut own = live.spec.addresses.iter().copied().filter(|address| address.is_ipv6() == v6).peekable();
        if own.peek().is_none() {
            continue;
        }
        for address in own {
            probe::inbound(&live.netns, address, pod.token).await.map_err(failure("inbound_probe"))?;
        }
        probe::outbound(&node.config.probe, &place.netns, &place.cgroup, v6, pod.token)
            .await
            .map_err(failure("outbound_probe"))?;
    }
    Ok(())
}

/// Compares the kernel with what was attached, and puts the listener where it belongs.
fn read_back(node: &Node, pod: &Pod, live: &Live) -> Result<(), Failure> {
    let place = &live.spec.place;
    // The programs hang on what was opened; the pod must still be there.
    let netns = inode(&place.netns).map_err(|error| failure("netns")(error))?;
    if netns != live.netns.inode() {
        return Err(failure("netns")(format!("{} is another network namespace by now", place.netns.display())));
    }
    let cgroup = inode(&place.cgroup).map_err(|error| failure("cgroup")(error))?;
    if cgroup != live.cgroup.id() {
        return Err(failure("cgroup")(format!("{} is another cgroup by now", place.cgroup.display())));
    }
    load::read_back(&node.pins.pod(&live.spec.uid), netns, cgroup, &live.programs).map_err(failure("link"))?;

    let listener = pod.listener().ok_or_else(|| failure("listener")("the agent has closed the listener".into()))?;
    let slot = node.maps.listeners();
    let broken = |error: io::Error| failure("listener")(format!("slot {}: {error}", live.slot));
    // Another's in our place is found out by the connections that follow: only ours knows the token.
    if !kernel::keep_socket(&slot, live.slot, &*listener).map_err(broken)? && pod.state() == PodState::Captured {
        tracing::warn!(pod = %live.spec.name, slot = live.slot, "the listener was missing from its slot; put back");
    }
    Ok(())
}

fn inode(path: &Path) -> Result<u64, String> {
    fs::metadata(path).map(|found| found.ino()).map_err(|error| format!("{}: {error}", path.display()))
}

/// Takes the listener out of the pod's slot.
async fn block(node: &Arc<Node>, pod: &Arc<Pod>, live: &Arc<Live>) {
    // A listener that is not ours is another agent's business.
    if pod.listener().is_none() {
        return;
    }
    let (node, slot) = (Arc::clone(node), live.slot);
    let taken = blocking(move || Ok(kernel::take_socket(&node.maps.listeners(), slot))).await;
    if let Ok(Err(error)) = taken {
        tracing::error!(pod = %live.spec.name, slot, %error, "the listener could not be taken out of its slot");
    }
}
