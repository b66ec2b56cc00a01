//! Puts a pod into the mesh and takes it out again.
//!
//! In this order, so that nothing is ever half captured: record, gate, sysctl, routes, listener, and last the programs, of which
//! `lookup` comes before what marks connections. Withdrawal goes the other way. Established connections of the app are not
//! touched: the programs see new ones only.

use std::{
    collections::HashSet,
    fs, io,
    net::{IpAddr, TcpListener},
    path::Path,
    sync::Arc,
};

use heddle_common::{Address, Pod as PodData, gate};

use super::{
    Attached, CaptureError, PodSpec, PodState, WorkloadId,
    error::Step,
    kernel,
    load::{AttachError, Cgroup, How, PROGRAMS},
    maps::key,
    netns::Netns,
    older,
    pin::{self, Record},
    pod::{Live, Node, Pod, random},
    ports::{self, Rotation},
    probe, route, socket, sysctl,
};
use crate::{cluster::Unattended, life::limits};

const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Runs blocking work off the runtime's workers.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CaptureError> + Send + 'static,
) -> Result<T, CaptureError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| CaptureError::ShuttingDown)?
}

fn at(pod: &Arc<str>, step: Step) -> impl FnOnce(io::Error) -> CaptureError + use<> {
    let pod = Arc::clone(pod);
    move |source| CaptureError::Pod { pod, step, source }
}

/// Enrols a pod or applies its changed spec.
pub async fn attach(node: &Arc<Node>, mut spec: PodSpec) -> Result<Attached, CaptureError> {
    for address in &mut spec.addresses {
        *address = address.to_canonical();
    }
    loop {
        let pod = node.pod_or_new(&spec).map_err(at(&spec.name, Step::Record))?;
        let _turn = pod.turn.lock().await;
        // It may have been withdrawn while this waited.
        if !node.pod(&spec.uid).is_some_and(|current| Arc::ptr_eq(&current, &pod)) {
            continue;
        }
        let result = enrol(node, &pod, &spec).await;
        if let Err(error) = &result {
            pod.set_state(PodState::Uncaptured { reason: error.reason(), detail: error.to_string() });
        }
        return result;
    }
}

async fn enrol(node: &Arc<Node>, pod: &Arc<Pod>, spec: &PodSpec) -> Result<Attached, CaptureError> {
    let name = Arc::clone(&spec.name);
    check(spec)?;
    let previous = pod.live();
    let prepared = {
        let (node, spec, previous) = (Arc::clone(node), spec.clone(), previous.clone());
        blocking(move || prepare(&node, &spec, previous.as_deref())).await?
    };
    let Prepared { ends, record, left, ports } = prepared;
    let netns = Arc::clone(&ends.netns);
    route::put(&netns, &spec.addresses).await.map_err(at(&name, Step::Route))?;

    let same_netns = previous.as_ref().is_some_and(|live| live.netns.inode() == netns.inode());
    let kept = pod.listener().filter(|_| same_netns);
    let known = previous.is_some();
    let (live, listener, older) = {
        let (node, spec) = (Arc::clone(node), spec.clone());
        blocking(move || {
            let (live, listener, how) = hang(&node, spec, ends, ports, kept)?;
            let older = match how {
                How::Attached => Some(note_older(&node, &live, record)),
                // What an earlier agent has found.
                How::Adopted | How::Replaced => (!known).then(|| record.older.into_iter().collect()),
            };
            Ok((live, listener, older))
        })
        .await?
    };
    let attached = Attached { listener: listener.try_clone().map_err(at(&name, Step::Listener))?, token: pod.token };
    pod.set_live(live, listener);
    if let Some(older) = older {
        pod.set_older(older);
    }
    if let Some(left) = left {
        // The pod moved; what it left behind binds nothing and is not worth failing for.
        if let Err(error) = restore(&left.netns, &left.switched_on).await {
            tracing::warn!(pod = %name, %error, "the pod's former network namespace could not be cleaned up");
        }
    }
    Ok(attached)
}

fn check(spec: &PodSpec) -> Result<(), CaptureError> {
    let wrong = |detail: String| CaptureError::Spec { pod: Arc::clone(&spec.name), detail };
    if spec.addresses.is_empty() {
        return Err(wrong("it has no address".into()));
    }
    if spec.addresses.len() > PodData::MAX_ADDRESSES {
        return Err(wrong(format!("it has more than {} addresses", PodData::MAX_ADDRESSES)));
    }
    match spec.addresses.iter().find(|address| address.is_loopback() || address.is_unspecified()) {
        Some(address) => Err(wrong(format!("{address} can't be a pod's address"))),
        None => Ok(()),
    }
}

struct Prepared {
    ends: Ends,
    record: Record,
    /// A netns that the pod was in before.
    left: Option<Left>,
    ports: Rotation,
}

/// Where the programs hang, and as whose.
struct Ends {
    slot: u32,
    workload: WorkloadId,
    /// The name and the addresses that it had before.
    former: Option<(WorkloadId, Vec<IpAddr>)>,
    cookie: Option<u64>,
    netns: Arc<Netns>,
    cgroup: Arc<Cgroup>,
}

struct Left {
    netns: Arc<Netns>,
    switched_on: Vec<String>,
}

/// Opens the pod's place and writes down what a later agent must know, before anything is changed.
fn prepare(node: &Node, spec: &PodSpec, previous: Option<&Live>) -> Result<Prepared, CaptureError> {
    let name = &spec.name;
    let netns = Arc::new(Netns::open(&spec.place.netns, &node.home).map_err(at(name, Step::Netns))?);
    if spec.place.netns_inode.is_some_and(|known| known != netns.inode()) {
        let gone = io::Error::new(io::ErrorKind::NotFound, "it is another network namespace by now");
        return Err(at(name, Step::Netns)(gone));
    }
    let cgroup = Arc::new(Cgroup::open(&spec.place.cgroup).map_err(at(name, Step::Cgroup))?);
    let recorded = node.pins.record(&spec.uid);
    let wanted = previous.map(|live| live.slot).or(recorded.as_ref().map(|record| record.slot));
    let (slot, fresh) = node.slots().take(&spec.uid, wanted)?;
    let cookie = match netns.cookie() {
        Ok(cookie) => Some(cookie),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => None,
        Err(error) => return Err(at(name, Step::Netns)(error)),
    };
    // What is known of the way to a pod is known of its netns and addresses: where they change, so does its name.
    let same = |record: &&Record| record.netns_inode == netns.inode() && record.addresses == spec.addresses;
    let moved = previous.is_some_and(|live| live.cookie != cookie);
    let workload = match recorded.as_ref().filter(same).filter(|_| !moved).map(|record| record.workload) {
        Some(known) => known,
        None => WorkloadId(u64::from_ne_bytes(random().map_err(at(name, Step::Record))?)),
    };
    if fresh {
        node.maps.reset_counts(slot)?;
    }

    let off = sysctl::off(&netns).map_err(at(name, Step::Sysctl))?;
    let same_netns = recorded.as_ref().filter(|record| record.netns_inode == netns.inode());
    let mut switched_on = same_netns.map(|record| record.switched_on.clone()).unwrap_or_default();
    switched_on.extend(off.iter().filter(|name| !switched_on.contains(name)).cloned().collect::<Vec<_>>());
    let left = recorded.as_ref().filter(|record| record.netns_inode != netns.inode()).and_then(|record| {
        let held = previous.filter(|live| live.netns.inode() == record.netns_inode).map(|live| Arc::clone(&live.netns));
        let netns = held.or_else(|| recorded_netns(node, record))?;
        Some(Left { netns, switched_on: record.switched_on.clone() })
    });
    let record = Record {
        uid: spec.uid.to_string(),
        name: spec.name.to_string(),
        slot,
        workload,
        addresses: spec.addresses.clone(),
        netns: spec.place.netns.clone(),
        netns_inode: netns.inode(),
        cgroup: spec.place.cgroup.clone(),
        switched_on,
        older: same_netns.map(|record| record.older.clone()).unwrap_or_default(),
    };
    if recorded.as_ref() != Some(&record) {
        node.pins.write_record(&record).map_err(at(name, Step::Record))?;
    }
    node.maps.set_gate(
        slot,
        match spec.when_unattended {
            Unattended::Closed => 0,
            Unattended::Open => gate::OPEN_WHEN_UNATTENDED,
        },
    )?;
    sysctl::switch(&netns, &off, true).map_err(at(name, Step::Sysctl))?;
    let ephemeral = netns
        .within(|| fs::read_to_string(PORT_RANGE))
        .and_then(|text| ports::parse_ephemeral(&text).ok_or_else(|| io::Error::other(format!("{PORT_RANGE}: {text}"))))
        .map_err(at(name, Step::Netns))?;
    let former = recorded.map(|record| (record.workload, record.addresses));
    let ends = Ends { slot, workload, former, cookie, netns, cgroup };
    Ok(Prepared { ends, record, left, ports: Rotation::new(ports::range(&ephemeral)) })
}

/// Opens the listener and hangs the programs.
fn hang(
    node: &Node,
    spec: PodSpec,
    ends: Ends,
    ports: Rotation,
    kept: Option<Arc<TcpListener>>,
) -> Result<(Live, Arc<TcpListener>, How), CaptureError> {
    let name = Arc::clone(&spec.name);
    let Ends { slot, workload, former, cookie, netns, cgroup } = ends;
    let open = |kept: Option<Arc<TcpListener>>| -> io::Result<Arc<TcpListener>> {
        let slots = node.maps.listeners();
        if let Some(listener) = kept {
            kernel::keep_socket(&slots, slot, &*listener)?;
            return Ok(listener);
        }
        let listener = Arc::new(socket::listener(&netns)?);
        kernel::put_socket(&slots, slot, &*listener)?;
        Ok(listener)
    };
    let listener = open(kept).map_err(at(&name, Step::Listener))?;
    let folder = node.pins.make_pod(&spec.uid).map_err(at(&name, Step::Pins))?;
    let data = pod_data(slot, workload, cookie, &spec.addresses);
    let (programs, how) =
        node.object.attach(&folder, &data, &netns, &cgroup, &node.maps.ids).map_err(|error| match error {
            AttachError::Programs(detail) => CaptureError::Programs { pod: Arc::clone(&name), detail },
            AttachError::Link(source) => CaptureError::Pod { pod: Arc::clone(&name), step: Step::Link, source },
        })?;
    let without_room = node.maps.set_probe_ports(workload, &spec.probes)?;
    if without_room > 0 {
        tracing::warn!(pod = %name, without_room, "the kernel's table of probe ports is full: the kubelet's probes of the others are plaintext");
    }
    // Last: nobody takes the lane to a pod whose programs do not hang yet.
    node.maps.put_resident(workload, slot, &spec.addresses)?;
    if let Some((former, addresses)) = former.filter(|(former, _)| *former != workload) {
        node.maps.remove_resident(former, &addresses)?;
        node.maps.forget(former)?;
    }
    match how {
        How::Attached => tracing::info!(pod = %name, slot, "attached"),
        How::Adopted => tracing::info!(pod = %name, slot, "adopted as it was"),
        How::Replaced => tracing::info!(pod = %name, slot, "programs replaced"),
    }
    Ok((Live { spec, slot, workload, cookie, netns, cgroup, programs, ports }, listener, how))
}

/// Finds the connections that are older than the programs which have just been attached, and records them. A pod is captured whether
/// they can be found or not.
fn note_older(node: &Node, live: &Live, record: Record) -> HashSet<u64> {
    let name = &live.spec.name;
    let found = older::found(&live.netns, &live.spec.addresses).inspect_err(|error| {
        tracing::warn!(pod = %name, %error, "connections that are older than the enrolment could not be looked for");
    });
    let found = found.unwrap_or_default();
    if !found.is_empty() {
        tracing::info!(pod = %name, count = found.len(), "has connections that are older than its enrolment: they go on outside the mesh");
        let recorded = Record { older: found.iter().copied().take(limits::OLDER_RECORDED).collect(), ..record };
        if let Err(error) = node.pins.write_record(&recorded) {
            tracing::warn!(pod = %name, %error, "its older connections could not be recorded: a later agent knows nothing of them");
        }
    }
    found
}

fn pod_data(slot: u32, workload: WorkloadId, cookie: Option<u64>, addresses: &[IpAddr]) -> PodData {
    let mut data = PodData {
        slot,
        addresses_used: 0,
        workload: workload.0,
        netns: cookie.unwrap_or_default(),
        addresses: [Address::v6([0; 16]); PodData::MAX_ADDRESSES],
    };
    for (place, address) in data.addresses.iter_mut().zip(addresses) {
        *place = key(*address);
        data.addresses_used += 1;
    }
    data
}

/// The recorded netns, if it still is the one at that path.
fn recorded_netns(node: &Node, record: &Record) -> Option<Arc<Netns>> {
    let netns = Netns::open(&record.netns, &node.home).ok()?;
    (netns.inode() == record.netns_inode).then(|| Arc::new(netns))
}

/// Leaves a netns as it was found.
async fn restore(netns: &Arc<Netns>, switched_on: &[String]) -> io::Result<()> {
    route::clear(netns).await?;
    sysctl::switch(netns, switched_on, false)
}

/// Takes the programs off, what marks connections first. They are off when this returns: a listener that went before its
/// `connect` program would have connections refused that are the pod's own again.
fn unhang(folder: &Path, name: &Arc<str>) -> Result<(), CaptureError> {
    for (program, _) in PROGRAMS.iter().rev() {
        let pin = folder.join(program);
        match kernel::open_pin(&pin) {
            Ok(link) => kernel::unlink(&link).map_err(at(name, Step::Link))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(at(name, Step::Pins)(error)),
        }
        pin::remove_if_there(&pin).map_err(at(name, Step::Pins))?;
    }
    Ok(())
}

/// Closes capture's own hold on the pod's listener; with `programs`, takes the pod's programs off first, so that its new
/// connections are its own, while routes and record stay for those that are carried.
pub async fn unlisten(node: &Arc<Node>, uid: &str, programs: bool) -> Result<(), CaptureError> {
    let (pod, live) = node.live(uid)?;
    let _turn = pod.turn.lock().await;
    let (node, folder) = (Arc::clone(node), node.pins.pod(uid));
    blocking(move || {
        let name = &live.spec.name;
        if programs {
            node.maps.remove_resident(live.workload, &live.spec.addresses)?;
            unhang(&folder, name)?;
        }
        kernel::take_socket(&node.maps.listeners(), live.slot).map_err(at(name, Step::Listener))
    })
    .await?;
    pod.drop_listener();
    Ok(())
}

/// Takes everything of a pod away. Whether there was anything.
pub async fn withdraw(node: &Arc<Node>, uid: &str) -> Result<bool, CaptureError> {
    let pod = node.pod(uid);
    let _turn = match &pod {
        Some(pod) => Some(pod.turn.lock().await),
        None => None,
    };
    let record = node.pins.record(uid);
    let live = pod.as_ref().and_then(|pod| pod.live());
    if pod.is_none() && record.is_none() {
        return Ok(false);
    }
    let name: Arc<str> = match (&pod, &record) {
        (Some(pod), _) => pod.name(),
        (None, Some(record)) => Arc::from(record.name.as_str()),
        (None, None) => Arc::from(uid),
    };
    let folder = node.pins.pod(uid);
    let slot = live.as_ref().map(|live| live.slot).or(record.as_ref().map(|record| record.slot));
    let workload = live.as_ref().map(|live| live.workload).or(record.as_ref().map(|record| record.workload));
    let netns = {
        let (node, pod, folder, record, live, name) =
            (Arc::clone(node), pod.clone(), folder.clone(), record.clone(), live.clone(), Arc::clone(&name));
        blocking(move || {
            if let Some(workload) = workload {
                let addresses = record.iter().flat_map(|record| &record.addresses);
                node.maps.remove_resident(workload, addresses)?;
            }
            unhang(&folder, &name)?;
            if let Some(workload) = workload {
                node.maps.forget(workload)?;
            }
            if let Some(slot) = slot {
                kernel::take_socket(&node.maps.listeners(), slot).map_err(at(&name, Step::Listener))?;
                node.maps.set_gate(slot, 0)?;
                node.maps.sweep_attested(|by| by.slot == slot)?;
            }
            if let Some(pod) = pod {
                pod.clear();
            }
            // The record names the netns that was changed; of a pod in this process the open one is used, also when its
            // path is gone.
            Ok(match (live, &record) {
                (Some(live), Some(record)) if live.netns.inode() == record.netns_inode => Some(Arc::clone(&live.netns)),
                (_, Some(record)) => recorded_netns(&node, record),
                (live, None) => live.map(|live| Arc::clone(&live.netns)),
            })
        })
        .await?
    };
    if let Some(netns) = netns {
        let switched_on = record.as_ref().map_or(&[][..], |record| &record.switched_on);
        restore(&netns, switched_on).await.map_err(at(&name, Step::Route))?;
    }
    if let Some(record) = &record {
        probe::remove_cgroups(&record.cgroup).await;
    }
    {
        let name = Arc::clone(&name);
        blocking(move || pin::remove(&folder).map_err(at(&name, Step::Pins))).await?;
    }
    node.slots().release(uid);
    node.forget(uid);
    tracing::info!(pod = %name, "withdrawn");
    Ok(true)
}

/// Cleans up after pods of another layout version that are not in the mesh any more, then removes that version.
pub async fn remove_version(node: &Arc<Node>, version: &Path, keep: impl Fn(&str) -> bool) -> Result<(), CaptureError> {
    let failed = |source| CaptureError::Bpffs { path: version.to_owned(), source };
    for (_, record) in pin::pods_below(version).map_err(failed)? {
        let Some(record) = record.filter(|record| !keep(&record.uid)) else {
            continue;
        };
        if let Some(netns) = recorded_netns(node, &record) {
            restore(&netns, &record.switched_on).await.map_err(at(&Arc::from(record.name.as_str()), Step::Route))?;
        }
    }
    let path = version.to_owned();
    blocking(move || pin::remove(&path).map_err(|source| CaptureError::Bpffs { path: path.clone(), source })).await
}
