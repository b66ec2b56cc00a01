//! Where a pod is said to be, by what was found and what was announced; and the thread, on this machine.

use std::time::Duration;

use k8s_openapi::{api::core::v1::PodSpec, apimachinery::pkg::apis::meta::v1::ObjectMeta};

use super::*;

const MOUNT: &str = "/sys/fs/cgroup";

fn netns() -> File {
    File::open("/proc/self/ns/net").unwrap()
}

fn announced(inode: u64, netns: File) -> Announced {
    let addresses = vec!["10.0.0.7".parse().unwrap()];
    Announced { container: "c".into(), netns, inode, addresses, since: Instant::now(), seen: None }
}

fn found(pid: u32, netns: u64) -> Found {
    Found { pid, netns, folder: "/kubepods/podu".into() }
}

fn place(told: Option<Announced>, seen: Option<Found>, folder: Option<&str>) -> Option<Place> {
    let map = |value: Option<_>| value.into_iter().map(|value| ("u".to_owned(), value)).collect();
    let seen: BTreeMap<_, _> = seen.into_iter().map(|seen| ("u".to_owned(), seen)).collect();
    let folders: BTreeMap<_, _> = folder.into_iter().map(|folder| ("u".to_owned(), folder.to_owned())).collect();
    places(&map(told), &seen, &folders, Path::new(MOUNT)).remove("u")
}

#[test]
fn a_running_pod_is_where_its_process_is() {
    let place = place(None, Some(found(7, 20)), None).unwrap();
    assert_eq!(place.netns, Path::new("/proc/7/ns/net"));
    assert_eq!((place.netns_inode, place.addresses), (Some(20), Vec::new()));
    assert_eq!(place.cgroup, Path::new("/sys/fs/cgroup/kubepods/podu"));
}

#[test]
fn an_announced_pod_is_where_it_was_announced_until_a_process_is_there() {
    let file = netns();
    let descriptor = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let before = place(Some(announced(20, file)), None, Some("/kubepods/podu")).unwrap();
    assert_eq!(before.netns, Path::new(&descriptor));
    assert_eq!(before.addresses, ["10.0.0.7".parse::<IpAddr>().unwrap()]);
    let after = place(Some(announced(20, netns())), Some(found(7, 20)), None).unwrap();
    assert_eq!(after, Place { netns: "/proc/7/ns/net".into(), ..before });
}

#[test]
fn an_announced_pod_is_not_taken_for_its_earlier_sandbox() {
    let place = place(Some(announced(21, netns())), Some(found(7, 20)), None).unwrap();
    assert_eq!(place.netns_inode, Some(21));
    assert!(place.netns.starts_with(format!("/proc/{}/fd", std::process::id())));
    assert_eq!(place.cgroup, Path::new("/sys/fs/cgroup/kubepods/podu"));
}

#[test]
fn an_announced_pod_without_a_cgroup_has_no_place() {
    assert_eq!(place(Some(announced(20, netns())), None, None), None);
}

#[test]
fn an_announcement_outlives_a_look_that_misses_its_processes_and_ends_when_they_are_gone() {
    let mut told = announced(20, netns());
    let start = told.since;
    assert!(holds(&mut told, None, start), "nothing runs yet");
    assert!(holds(&mut told, Some(&found(7, 19)), start), "that of an earlier sandbox");
    assert!(!holds(&mut told, None, start + limits::PLACES_ANNOUNCED_AGE), "it never started");
    let seen = start + Duration::from_secs(1);
    assert!(holds(&mut told, Some(&found(8, 20)), seen));
    let soon = seen + limits::PLACES_GONE / 2;
    assert!(holds(&mut told, None, soon), "one look may miss it");
    assert!(holds(&mut told, Some(&found(9, 20)), soon));
    assert!(!holds(&mut told, None, soon + limits::PLACES_GONE));
    assert!(!holds(&mut told, Some(&found(9, 21)), soon + limits::PLACES_GONE));
}

fn pod(node: &str, uid: &str, annotations: &[(&str, &str)]) -> Pod {
    let annotations = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Pod {
        metadata: ObjectMeta { uid: Some(uid.to_owned()), annotations: Some(annotations), ..ObjectMeta::default() },
        spec: Some(PodSpec { node_name: Some(node.to_owned()), ..PodSpec::default() }),
        ..Pod::default()
    }
}

#[test]
fn a_static_pod_is_looked_for_by_kubelets_own_uid() {
    assert_eq!(kubelet_uid(&pod("n", "u", &[])), Some("u"));
    assert_eq!(kubelet_uid(&pod("n", "u", &[(MIRROR, "hash"), (STATIC_POD, "hash")])), Some("hash"));
    assert_eq!(kubelet_uid(&pod("n", "u", &[(STATIC_POD, "hash")])), Some("u"));
}

#[test]
fn the_thread_looks_and_ends_with_its_places() {
    let Ok(places) = NodePlaces::start("node-1".into()) else { return };
    assert_eq!(places.locate(&pod("node-1", "no-such-pod", &[])), None);
    assert_eq!(places.locate(&pod("node-2", "no-such-pod", &[])), None);
    let weak = Arc::downgrade(&places.0);
    let inode = 7;
    for number in 0..=limits::PLACES_ANNOUNCED {
        let told = Announcement { container: "c".into(), netns: netns(), inode, addresses: Vec::new() };
        places.announce(&number.to_string(), told);
    }
    assert!(places.0.announced().len() <= limits::PLACES_ANNOUNCED);
    places.forget("1", "another");
    places.forget("2", "c");
    assert!(places.0.announced().contains_key("1") && !places.0.announced().contains_key("2"));
    drop(places);
    let deadline = Instant::now() + Duration::from_secs(20);
    while weak.upgrade().is_some() {
        assert!(Instant::now() < deadline, "the thread holds on to its places");
        thread::sleep(Duration::from_millis(5));
    }
}
