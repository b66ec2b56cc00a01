use super::*;

const MS: Duration = Duration::from_millis(1);

fn batch(urgent: bool) -> Batch {
    let now = Instant::now();
    Batch { first: now, last: now, urgent }
}

#[test]
fn a_change_waits_for_quiet_and_a_policy_hardly() {
    for (urgent, quiet) in [(false, limits::KUBE_QUIET), (true, limits::KUBE_QUIET_POLICY)] {
        let batch = batch(urgent);
        assert_eq!(batch.due(None), batch.last + quiet);
    }
}

#[test]
fn changes_without_end_are_put_in_force_all_the_same() {
    for urgent in [false, true] {
        let start = batch(urgent);
        let mut late = start;
        late.last = start.first + limits::KUBE_QUIET_MAX - MS;
        assert_eq!(late.due(None), start.first + limits::KUBE_QUIET_MAX);
    }
    assert!(limits::KUBE_QUIET_MAX <= 100 * MS);
}

#[test]
fn what_costs_much_rests_long_but_never_for_a_policy() {
    let waiting = batch(false);
    let over = waiting.last;
    assert_eq!(waiting.due(Some((50 * MS, over))), over + 50 * MS * limits::KUBE_INDEX_REST);
    assert_eq!(waiting.due(Some((10_000 * MS, over))), over + limits::KUBE_INDEX_REST_MAX);
    assert_eq!(waiting.due(Some((MS, over))), waiting.last + limits::KUBE_QUIET, "little costs no wait");
    let policy = batch(true);
    assert_eq!(policy.due(Some((50 * MS, over - 45 * MS))), policy.last + limits::KUBE_QUIET_POLICY);
}

#[tokio::test]
async fn kinds_that_are_recalled_are_those_that_are_not_known_yet() {
    let shared = Shared::default();
    let namespace = |name: &str| {
        let metadata = k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
            name: Some(name.into()),
            ..Default::default()
        };
        Arc::new(k8s_openapi::api::core::v1::Namespace { metadata, ..Default::default() })
    };
    shared.replace(Resource::Namespaces, [("/new".into(), Object::Namespace(namespace("new")))].into());
    let node = Arc::new(k8s_openapi::api::core::v1::Node {
        metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
            name: Some("n".into()),
            ..Default::default()
        },
        ..Default::default()
    });
    shared.recall(Objects { namespaces: vec![namespace("old")], nodes: vec![node], ..Objects::default() });
    let News::Problems(problems) = shared.next(None).await else { panic!("problems come first") };
    assert_eq!(problems, []);
    let News::Objects { objects, .. } = shared.next(None).await else { panic!("no objects") };
    assert_eq!(objects.namespaces[0].metadata.name.as_deref(), Some("new"));
    assert_eq!((objects.namespaces.len(), objects.nodes.len()), (1, 1));
    assert_eq!(shared.known().len(), Resource::ALL.len());
    assert!(!shared.in_step(), "nothing of it was confirmed");
}

#[tokio::test]
async fn policies_of_a_kind_that_is_gone_end_when_it_stays_so() {
    let shared = Shared::default();
    let resource = Resource::PeerAuthentications;
    let policy = Object::Policy(crate::cluster::read::Policy::Peer(Arc::new(
        crate::cluster::kinds::PeerAuthentication::new("p", Default::default()),
    )));
    shared.replace(resource, [("shop/p".into(), policy)].into());
    shared.absent(resource);
    assert_eq!(shared.state().store.len(resource), 1);
    shared.state().absent.insert(resource, Instant::now() - limits::KUBE_ABSENT_HOLD);
    shared.absent(resource);
    assert_eq!(shared.state().store.len(resource), 0);
}
