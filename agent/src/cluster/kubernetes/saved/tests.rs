use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
};

use super::*;
use crate::cluster::{PolicyKind, read::read};

const HOUR: Duration = Duration::from_secs(3_600);

fn saved(folder: &Path) -> Saved {
    Saved::new(folder.join("state"), "node-1".into(), "Kubernetes".into())
}

fn objects() -> Objects {
    let text = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, uid: u1}, status: {podIP: 10.0.0.1}}
---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIPs: [10.96.0.1]}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: web, namespace: shop}, addressType: IPv4, endpoints: []}
---
{apiVersion: v1, kind: Node, metadata: {name: node-1}}
---
{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: a, namespace: shop}, spec: {action: DENY}}
---
{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: p, namespace: shop}, spec: {mtls: {mode: STRICT}}}
---
{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: bad, namespace: shop}, spec: {acton: DENY}}
";
    let manifest = read(text);
    assert_eq!((manifest.errors.len(), manifest.invalid.len()), (0, 1));
    manifest.objects
}

#[test]
fn what_was_written_is_read_with_every_kind() {
    let folder = tempfile::tempdir().unwrap();
    let (saved, now) = (saved(folder.path()), SystemTime::now());
    assert!(saved.read(now).unwrap().is_none(), "nothing there is no error");
    saved.write(&objects(), now).unwrap();
    let (read, written) = saved.read(now + HOUR).unwrap().unwrap();
    let (wanted, age) = (objects(), now.duration_since(written).unwrap());
    assert!(age < Duration::from_secs(1), "{age:?}");
    assert_eq!(read.namespaces, wanted.namespaces);
    assert_eq!(read.pods, wanted.pods);
    assert_eq!(read.services, wanted.services);
    assert_eq!(read.endpoint_slices, wanted.endpoint_slices);
    assert_eq!(read.nodes, wanted.nodes);
    assert_eq!(read.authorization_policies, wanted.authorization_policies);
    assert_eq!(read.peer_authentications, wanted.peer_authentications);
    assert_eq!(read.invalid_policies, wanted.invalid_policies);
    assert_eq!(read.invalid_policies[0].kind, PolicyKind::AuthorizationPolicy);
}

#[test]
fn it_is_replaced_whole_and_nobody_else_may_read_it() {
    let folder = tempfile::tempdir().unwrap();
    let saved = saved(folder.path());
    for _ in 0..2 {
        saved.write(&objects(), SystemTime::now()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&saved.path()), mode(&saved.directory)), (0o600, 0o700));
        let files: Vec<_> = fs::read_dir(&saved.directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files, [FILE]);
    }
    // A directory that can't be written leaves what was there.
    fs::create_dir(saved.directory.join(format!("{FILE}.new"))).unwrap();
    saved.write(&Objects::default(), SystemTime::now()).unwrap_err();
    assert_eq!(saved.read(SystemTime::now()).unwrap().unwrap().0.pods.len(), 1);
}

#[test]
fn any_byte_that_is_another_makes_it_useless() {
    let folder = tempfile::tempdir().unwrap();
    let (saved, now) = (saved(folder.path()), SystemTime::now());
    saved.write(&objects(), now).unwrap();
    let whole = fs::read(saved.path()).unwrap();
    for at in 0..whole.len() {
        let mut broken = whole.clone();
        broken[at] ^= 1;
        fs::write(saved.path(), &broken).unwrap();
        let head = whole.iter().position(|byte| *byte == b'\n').unwrap();
        match saved.read(now) {
            Err(_) => {}
            // A digit of the time is as good as another.
            Ok(Some(_)) if at < head && whole[at].is_ascii_digit() => {}
            other => panic!("byte {at}: {other:?}"),
        }
    }
    for length in [0, 1, whole.len() / 2, whole.len() - 1] {
        fs::write(saved.path(), &whole[..length]).unwrap();
        saved.read(now).unwrap_err();
    }
    fs::write(saved.path(), [&whole[..], b"x"].concat()).unwrap();
    saved.read(now).unwrap_err();
}

#[test]
fn too_old_another_nodes_or_another_versions_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (saved, now) = (saved(folder.path()), SystemTime::now());
    saved.write(&objects(), now).unwrap();
    saved.read(now + limits::SAVED_AGE - HOUR).unwrap().unwrap();
    assert!(matches!(saved.read(now + limits::SAVED_AGE + HOUR), Err(SavedError::Old(_))));
    assert!(matches!(saved.read(now - HOUR), Err(SavedError::Future(_))));
    let other = Saved { node: "node-2".into(), ..saved.clone() };
    assert!(matches!(other.read(now), Err(SavedError::Elsewhere { .. })));
    let other = Saved { cluster: "other".into(), ..saved.clone() };
    assert!(matches!(other.read(now), Err(SavedError::Elsewhere { .. })));
    let text = fs::read_to_string(saved.path()).unwrap();
    fs::write(saved.path(), text.replacen("\"version\":1", "\"version\":2", 1)).unwrap();
    assert!(matches!(saved.read(now), Err(SavedError::Version(2))));
}

#[test]
fn what_somebody_else_may_have_written_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (saved, now) = (saved(folder.path()), SystemTime::now());
    saved.write(&objects(), now).unwrap();
    fs::set_permissions(saved.path(), fs::Permissions::from_mode(0o666)).unwrap();
    assert!(matches!(saved.read(now), Err(SavedError::NotOurs)));
    fs::set_permissions(saved.path(), fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(saved.path(), saved.directory.join("elsewhere")).unwrap();
    symlink("elsewhere", saved.path()).unwrap();
    assert!(matches!(saved.read(now), Err(SavedError::NotOurs)));
    fs::remove_file(saved.path()).unwrap();
    nix::unistd::mkfifo(&saved.path(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(saved.read(now), Err(SavedError::NotOurs)), "and is not waited for");
}
