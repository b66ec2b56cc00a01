use super::*;

fn pod(name: &str, label: &str) -> Object {
    let labels = Some([("app".to_owned(), label.to_owned())].into());
    let metadata =
        ObjectMeta { name: Some(name.into()), namespace: Some("shop".into()), labels, ..ObjectMeta::default() };
    Object::Pod(Arc::new(Pod { metadata, ..Pod::default() }))
}

fn names(store: &Store) -> Vec<String> {
    store.objects().pods.iter().map(|pod| pod.metadata.name.clone().unwrap_or_default()).collect()
}

#[test]
fn only_what_is_another_than_before_is_a_change() {
    let mut store = Store::default();
    assert!(store.put(Resource::Pods, "shop/a".into(), pod("a", "x")));
    let first = Arc::clone(&store.objects().pods[0]);
    assert!(!store.put(Resource::Pods, "shop/a".into(), pod("a", "x")));
    assert!(Arc::ptr_eq(&first, &store.objects().pods[0]), "the one that is there stays");
    assert!(store.put(Resource::Pods, "shop/a".into(), pod("a", "y")));
    assert!(!store.remove(Resource::Pods, "shop/b"));
    assert!(store.remove(Resource::Pods, "shop/a"));
    assert!(names(&store).is_empty());
}

#[test]
fn a_list_replaces_its_kind_and_no_other() {
    let mut store = Store::default();
    for name in ["a", "b"] {
        store.put(Resource::Pods, format!("shop/{name}").into(), pod(name, "x"));
    }
    store.put(Resource::Nodes, "/n".into(), Object::Node(Arc::default()));
    let listed = |names: &[&str]| names.iter().map(|name| (format!("shop/{name}").into(), pod(name, "x"))).collect();
    assert!(!store.replace(Resource::Pods, listed(&["a", "b"])));
    assert!(store.replace(Resource::Pods, listed(&["b", "c"])));
    assert_eq!((names(&store), store.objects().nodes.len()), (vec!["b".to_owned(), "c".to_owned()], 1));
    assert!(store.replace(Resource::Pods, BTreeMap::new()));
    assert!(names(&store).is_empty());
}

#[test]
fn what_finds_no_room_is_told_and_a_policy_among_it_is_a_gap() {
    let mut store = Store::default();
    let policy = || {
        Object::Policy(Policy::Peer(Arc::new(crate::cluster::kinds::PeerAuthentication::new("p", Default::default()))))
    };
    for number in 0..limits::KUBE_OBJECTS {
        store.put(Resource::PeerAuthentications, number.to_string().into(), policy());
    }
    assert!(store.objects().policy_gaps.is_empty());
    assert!(store.put(Resource::PeerAuthentications, "one more".into(), policy()));
    assert_eq!(store.len(Resource::PeerAuthentications), limits::KUBE_OBJECTS);
    assert_eq!(store.overfull().collect::<Vec<_>>(), [(Resource::PeerAuthentications, 1)]);
    let gaps = store.objects().policy_gaps;
    assert_eq!((gaps.len(), &gaps[0].namespace), (1, &None));
    store.replace(Resource::PeerAuthentications, BTreeMap::new());
    assert!(store.objects().policy_gaps.is_empty());
}
