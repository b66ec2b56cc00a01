//! What the plugin is answered, by what is known of the pod; and over the socket, to whom.

use std::{collections::HashMap, net::IpAddr};

use tokio::sync::watch;

use super::*;
use crate::{
    capture::PodSpec,
    cluster::{Membership, Place, Unattended},
    cni::protocol::PodName,
};

/// An agent's knowledge; `None` where this machine has no cgroup v2 hierarchy to look for pods in.
fn asked(pods: &[(&str, bool)]) -> Option<(Asked, watch::Sender<Arc<Snapshot>>)> {
    let (sender, receiver) = watch::channel(Arc::new(snapshot(pods)));
    let places = NodePlaces::start("node-1".into()).ok()?;
    let asked = Asked { node: "node-1".into(), view: View::new(receiver), places, pods: Pods::default() };
    Some((asked, sender))
}

fn snapshot(pods: &[(&str, bool)]) -> Snapshot {
    let pod = |(name, enrolled): &(&str, bool)| {
        let pod = Workload { enrolled: *enrolled, ..Workload::named("shop", name) };
        (Arc::clone(&pod.uid), Arc::new(pod))
    };
    let namespaces = [("shop", Membership::Enrolled), ("plain", Membership::Unsaid)];
    Snapshot {
        workloads: pods.iter().map(pod).collect::<HashMap<_, _>>(),
        namespaces: Arc::new(namespaces.map(|(name, says)| (name.into(), says)).into()),
        ..Snapshot::default()
    }
}

const NETNS: &str = "/proc/self/ns/net";

fn question(namespace: &str, name: &str) -> Question {
    Question {
        version: VERSION,
        verb: Verb::Add,
        pod: PodName { namespace: namespace.into(), name: name.into(), uid: format!("uid-{name}") },
        container: "c".into(),
        netns: NETNS.into(),
        addresses: vec![address()],
        patience: 1_000,
    }
}

fn address() -> IpAddr {
    "10.0.0.7".parse().unwrap()
}

fn spec(inode: Option<u64>, addresses: &[IpAddr]) -> PodSpec {
    PodSpec {
        uid: "uid-cart".into(),
        name: "shop/cart".into(),
        addresses: addresses.to_vec(),
        place: Place { netns_inode: inode, ..Place::default() },
        when_unattended: Unattended::Closed,
        probes: std::collections::BTreeSet::new(),
    }
}

fn own_inode() -> u64 {
    netns(None, Path::new(NETNS)).unwrap().1
}

fn reason(answer: &Answer) -> &str {
    match answer {
        Answer::Refused { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_pod_outside_the_mesh_starts_at_once_and_an_unknown_one_as_its_namespace_says() {
    let Some((asked, _sender)) = asked(&[("out", false)]) else { return };
    assert_eq!(asked.answer(&question("shop", "out"), None).await, Answer::NotEnrolled);
    assert_eq!(asked.answer(&question("plain", "new"), None).await, Answer::NotEnrolled);
    for namespace in ["shop", "unheard-of"] {
        let answer = asked.answer(&question(namespace, "new"), None).await;
        assert_eq!(reason(&answer), "pod_unknown");
    }
}

#[tokio::test]
async fn a_pod_of_the_mesh_starts_when_just_this_network_of_it_is_proven() {
    let Some((asked, sender)) = asked(&[]) else { return };
    let pod = Workload::named("shop", "cart");
    let asking = {
        let asked = asked.clone();
        tokio::spawn(
            async move { asked.answer(&Question { patience: 60_000, ..question("shop", "cart") }, None).await },
        )
    };
    let pause = Duration::from_millis(120);
    sleep(pause).await;
    sender.send_replace(Arc::new(snapshot(&[("cart", true)])));
    // Of an earlier sandbox; without its address; attached only.
    for (state, of) in [
        (PodState::Captured, spec(Some(own_inode() + 1), &[address()])),
        (PodState::Captured, spec(None, &[address()])),
        (PodState::Captured, spec(Some(own_inode()), &["10.0.0.6".parse().unwrap()])),
        (PodState::Attached, spec(Some(own_inode()), &[address()])),
    ] {
        asked.pods.set(&pod, state, Some(&of));
        sleep(pause).await;
        assert!(!asking.is_finished(), "{of:?}");
    }
    asked.pods.set(&pod, PodState::Captured, Some(&spec(Some(own_inode()), &[address()])));
    assert_eq!(asking.await.unwrap(), Answer::Captured);
}

#[tokio::test]
async fn a_pod_that_is_not_captured_in_time_is_refused_with_the_reason() {
    let Some((asked, _sender)) = asked(&[("cart", true)]) else { return };
    assert_eq!(reason(&asked.answer(&question("shop", "cart"), None).await), "unproven");
    let uncaptured = PodState::Uncaptured { reason: "inbound_probe", detail: "nobody".into() };
    asked.pods.set(&Workload::named("shop", "cart"), uncaptured, None);
    assert_eq!(reason(&asked.answer(&question("shop", "cart"), None).await), "inbound_probe");
    for path in ["/etc/passwd", "/nowhere", "relative", ""] {
        let question = Question { netns: path.into(), ..question("shop", "cart") };
        assert_eq!(reason(&asked.answer(&question, None).await), "netns", "{path}");
    }
}

#[tokio::test]
async fn a_check_looks_and_a_del_is_noted() {
    let Some((asked, _sender)) = asked(&[("cart", true)]) else { return };
    let check = |name: &str| Question { verb: Verb::Check, ..question("shop", name) };
    assert_eq!(reason(&asked.answer(&check("cart"), None).await), "unproven");
    assert_eq!(asked.answer(&check("new"), None).await, Answer::Noted);
    asked.pods.set(&Workload::named("shop", "cart"), PodState::Captured, Some(&spec(Some(own_inode()), &[address()])));
    assert_eq!(asked.answer(&check("cart"), None).await, Answer::Captured);
    let del = Question { verb: Verb::Del, ..question("shop", "cart") };
    assert_eq!(asked.answer(&del, None).await, Answer::Noted);
}

#[test]
fn a_static_pod_is_found_by_its_name_and_no_other_is() {
    let snapshot = snapshot(&[("cart", true)]);
    let ask = |uid: &str| {
        let pod = PodName { uid: uid.into(), ..question("shop", "cart").pod };
        workload(&snapshot, &Question { pod, ..question("shop", "cart") }, "node-1").is_some()
    };
    assert!(ask("uid-cart"));
    assert!(ask("0123456789abcdef0123456789abcdef"), "what kubelet calls a static pod");
    assert!(!ask("8f5bc6a5-7d62-4f19-9ad5-0b1c7a5c1e11"), "an earlier pod of the name");
}

#[tokio::test]
async fn the_socket_answers_one_question_and_refuses_nonsense() {
    let Some((asked, _sender)) = asked(&[("out", false)]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run/cni.sock");
    let mut socket = Socket::bind(&path).await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    let stop = CancellationToken::new();
    let serving = tokio::spawn(serve(socket.take_listener().unwrap(), asked, stop.clone()));
    let exchange = async |message: Vec<u8>| {
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.write_all(&message).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        protocol::read::<Answer>(&answer).unwrap()
    };
    let whole = serde_json::to_vec(&question("shop", "out")).unwrap();
    assert_eq!(exchange(whole).await, Answer::NotEnrolled);
    assert_eq!(reason(&exchange(b"{}".to_vec()).await), "question");
    assert_eq!(reason(&exchange(vec![b' '; limits::CNI_MESSAGE + 1]).await), "question");
    let newer = serde_json::to_vec(&Question { version: VERSION + 1, ..question("shop", "out") }).unwrap();
    assert_eq!(reason(&exchange(newer).await), "version");
    stop.cancel();
    serving.await.unwrap();
}

#[tokio::test]
async fn what_is_known_is_left_on_disk_and_follows_the_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let (sender, receiver) = watch::channel(Arc::new(snapshot(&[])));
    let stop = CancellationToken::new();
    let state = folder.path().join("state");
    let remembering = tokio::spawn(remember(state.clone(), View::new(receiver), "node-1".into(), stop.clone()));
    let out = question("shop", "out").pod;
    let becomes = async |expected: Option<bool>| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Known::read(&state).ok().map(|known| known.enrolled(&out)) != Some(expected) {
            assert!(Instant::now() < deadline, "{expected:?}");
            sleep(Duration::from_millis(5)).await;
        }
    };
    becomes(Some(true)).await;
    sender.send_replace(Arc::new(snapshot(&[("out", false)])));
    becomes(Some(false)).await;
    stop.cancel();
    remembering.await.unwrap();
}
