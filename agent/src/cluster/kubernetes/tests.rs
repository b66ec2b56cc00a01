//! The source against an API server that behaves as the real one does, in what is good and in what is not.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::{
    saved,
    stand_in::{self, Fault},
};
use crate::{
    cluster::{ApiServer, Problem, Settings, Snapshot, Source, SourceError, View},
    life::limits,
};

/// By then everything here is over, on a machine that others use as well.
const PATIENCE: Duration = Duration::from_secs(60);

fn pod(name: &str, address: &str) -> Value {
    let mut pod = stand_in::pod("shop", name, &format!("uid-of-{name}"), name, "node-1");
    pod["status"]["podIP"] = json!(address);
    pod["metadata"]["labels"] = json!({"app": name});
    pod
}

fn policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": "shop", "name": name}, "spec": spec,
    })
}

fn namespace(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"heddle.dev/mesh": "enabled"}}})
}

/// An API server, and where its agent keeps what outlives it.
struct Cluster {
    api: stand_in::ApiServer,
    folder: tempfile::TempDir,
}

impl Cluster {
    async fn start() -> Self {
        let api = stand_in::ApiServer::start().await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        api.write_kubeconfig_of(&folder.path().join("kubeconfig"), "agent").unwrap();
        api.put_all([namespace("shop"), pod("web", "10.0.0.1")]);
        Self { api, folder }
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn config(&self) -> ApiServer {
        ApiServer {
            kubeconfig: Some(self.folder.path().join("kubeconfig")),
            state_dir: self.state(),
            node: "node-1".into(),
            cluster_id: "Kubernetes".into(),
        }
    }

    async fn watch(&self) -> Result<(View, Source), SourceError> {
        Source::watch(self.config(), Settings::default(), |_| ()).await
    }

    async fn known(&self) -> (View, Source) {
        timeout(PATIENCE, self.watch()).await.expect("known in time").unwrap()
    }

    fn saved(&self) -> bool {
        self.state().join(saved::FILE).exists()
    }
}

fn pods(snapshot: &Snapshot) -> Vec<&str> {
    let mut names: Vec<_> = snapshot.workloads.values().map(|workload| &*workload.name).collect();
    names.sort_unstable();
    names
}

fn policies(snapshot: &Snapshot) -> Vec<&str> {
    snapshot.authorization_policies.iter().filter_map(|policy| policy.metadata.name.as_deref()).collect()
}

/// Waits until a snapshot fits.
async fn until(view: &View, what: &str, fits: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
    let mut view = view.clone();
    let waiting = async {
        loop {
            let now = view.load();
            if fits(&now) {
                return now;
            }
            // Looked at again now and then: nothing is missed between two looks.
            let _ = timeout(Duration::from_millis(50), view.next()).await;
        }
    };
    timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("{what}: {:?}", view.load()))
}

async fn within(what: &str, fits: impl Fn() -> bool) {
    let waiting = async {
        while !fits() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("{what} in time"));
}

fn reasons(source: &Source) -> BTreeSet<&'static str> {
    source.problems().borrow().iter().map(|problem: &Problem| problem.error.reason()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_listed_page_by_page_before_anything_is_known() {
    let cluster = Cluster::start().await;
    for number in 2..12 {
        cluster.api.put(pod(&format!("web-{number}"), &format!("10.0.0.{number}")));
    }
    cluster.api.put(policy("deny", &json!({})));
    cluster.api.put(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": "web"},
        "spec": {"clusterIPs": ["10.96.0.1"], "ports": [{"port": 80}]},
    }));
    cluster.api.put(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "shop", "name": "web-x", "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [{"port": 8080}],
        "endpoints": [
            {"addresses": ["10.0.0.1"], "conditions": {"ready": true}},
            {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
        ],
    }));
    cluster.api.put(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "node-1", "labels": {"topology.kubernetes.io/zone": "a", "beta.kubernetes.io/os": "linux"}},
    }));
    let (view, source) = cluster.known().await;
    let snapshot = view.load();
    assert_eq!(snapshot.generation, 1);
    assert_eq!(pods(&snapshot).len(), 11);
    assert!(snapshot.workloads.values().all(|workload| workload.enrolled), "by their namespace's label");
    assert_eq!(policies(&snapshot), ["deny"]);
    assert_eq!(&*snapshot.localities["node-1"].zone, "a");
    let service = &snapshot.services["shop/web"];
    let chosen = crate::cluster::candidates(&snapshot, "node-1", service, 80, "10.96.0.1".parse().unwrap()).unwrap();
    assert_eq!(chosen.iter().map(|one| one.address.to_string()).collect::<Vec<_>>(), ["10.0.0.1:8080"]);
    assert!(cluster.api.count("list", "pods") >= 4, "a page has three");
    within("watches", || cluster.api.count("watch", "pods") == 1).await;
    assert_eq!(reasons(&source), BTreeSet::new());

    // Nothing is asked for but to list and to watch, and that of seven resources.
    let seen = cluster.api.verbs_seen();
    let verbs: BTreeSet<_> = seen.iter().map(|seen| (seen.verb, &*seen.resource)).collect();
    assert!(verbs.iter().all(|(verb, _)| matches!(*verb, "list" | "watch")), "{verbs:?}");
    assert!(seen.iter().all(|seen| seen.user == "agent" && seen.subresource.is_empty()), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_is_in_force_a_moment_later_and_what_nothing_reads_changes_nothing() {
    let cluster = Cluster::start().await;
    let (view, _source) = cluster.known().await;
    cluster.api.put(pod("db", "10.0.0.2"));
    until(&view, "a new pod", |now| pods(now) == ["db", "web"]).await;
    cluster.api.put(policy("allow", &json!({"rules": [{}]})));
    until(&view, "a new policy", |now| policies(now) == ["allow"]).await;
    cluster.api.put(pod("db", "10.0.0.3"));
    until(&view, "another address", |now| now.by_address.contains_key(&"10.0.0.3".parse().unwrap())).await;
    cluster.api.delete("shop", "db");
    let gone = until(&view, "a pod that is gone", |now| pods(now) == ["web"]).await;
    cluster.api.remove("authorizationpolicies", "shop", "allow");
    until(&view, "a policy that is gone", |now| policies(now).is_empty()).await;

    let mut noise = pod("web", "10.0.0.1");
    noise["metadata"]["annotations"] = json!({"example.com/note": "x"});
    noise["spec"]["containers"][0]["image"] = json!("web:2");
    noise["status"]["startTime"] = json!("2026-01-01T00:00:00Z");
    let before = view.load().generation;
    cluster.api.put(noise);
    cluster.api.put(pod("last", "10.0.0.9"));
    let after = until(&view, "the pod after it", |now| pods(now) == ["last", "web"]).await;
    assert!(after.generation <= before + 1, "{before} {}", after.generation);
    let web = |snapshot: &Snapshot| Arc::clone(&snapshot.workloads["uid-of-web"]);
    assert!(Arc::ptr_eq(&web(&gone), &web(&after)), "what did not change was not read again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_goes_on_where_it_was_and_lists_again_only_when_the_history_is_gone() {
    let cluster = Cluster::start().await;
    let (view, source) = cluster.known().await;
    within("watches", || cluster.api.count("watch", "pods") == 1).await;
    let listed = cluster.api.count("list", "pods");
    cluster.api.drop_connections();
    cluster.api.put(pod("db", "10.0.0.2"));
    until(&view, "what changed while nobody watched", |now| pods(now) == ["db", "web"]).await;
    assert_eq!(cluster.api.count("list", "pods"), listed, "resumed, not listed");

    // What went while the history is gone is gone.
    cluster.api.hush_watches(true);
    cluster.api.delete("shop", "db");
    cluster.api.put(policy("late", &json!({})));
    cluster.api.compact();
    cluster.api.hush_watches(false);
    until(&view, "what a list says", |now| pods(now) == ["web"] && policies(now) == ["late"]).await;
    assert!(cluster.api.count("list", "pods") > listed);
    within("no problem left", || reasons(&source).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bookmark_moves_a_quiet_watch_past_history_that_goes() {
    let cluster = Cluster::start().await;
    cluster.api.set_bookmarks(Duration::from_millis(200));
    let (view, _source) = cluster.known().await;
    within("watches", || cluster.api.count("watch", "services") == 1).await;
    let listed = cluster.api.count("list", "services");
    // Services say nothing, while pods fill the history.
    for number in 2..20 {
        cluster.api.put(pod(&format!("web-{number}"), &format!("10.0.0.{number}")));
    }
    until(&view, "pods", |now| pods(now).len() == 19).await;
    sleep(Duration::from_secs(2)).await;
    cluster.api.compact();
    within("watches again", || cluster.api.count("watch", "services") >= 2).await;
    cluster.api.put(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": "web"}, "spec": {},
    }));
    until(&view, "a Service", |now| now.services.len() == 1).await;
    assert_eq!(cluster.api.count("list", "services"), listed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_answers_that_it_will_not_is_asked_ever_more_slowly_and_followed_again() {
    let cluster = Cluster::start().await;
    for code in [429, 500] {
        let (view, source) = cluster.known().await;
        cluster.api.break_down(Some(Fault::Status(code)));
        within("the problem told", || reasons(&source).contains("not_followed")).await;
        assert_eq!(pods(&view.load()), ["web"], "what was known stays");
        let asked =
            |api: &stand_in::ApiServer| ["list", "watch"].map(|verb| api.count(verb, "pods")).iter().sum::<usize>();
        let before = asked(&cluster.api);
        sleep(Duration::from_secs(3)).await;
        // Faults are answered before they are counted; none was let through.
        assert_eq!(asked(&cluster.api), before);
        cluster.api.put(pod("db", "10.0.0.2"));
        cluster.api.break_down(None);
        until(&view, "followed again", |now| pods(now) == ["db", "web"]).await;
        within("no problem left", || reasons(&source).is_empty()).await;
        cluster.api.delete("shop", "db");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_known_before_every_kind_was_listed() {
    let cluster = Cluster::start().await;
    cluster.api.fail("endpointslices", Fault::Status(500), usize::MAX);
    let waits = Arc::new(Mutex::new(BTreeSet::new()));
    struct Wait(&'static str, Arc<Mutex<BTreeSet<&'static str>>>);
    impl Drop for Wait {
        fn drop(&mut self) {
            self.1.lock().unwrap().remove(self.0);
        }
    }
    let block = |what| {
        waits.lock().unwrap().insert(what);
        Wait(what, Arc::clone(&waits))
    };
    let watching = Source::watch(cluster.config(), Settings::default(), block);
    let all_but_one = async {
        while waits.lock().unwrap().len() != 1 {
            sleep(Duration::from_millis(20)).await;
        }
        sleep(Duration::from_secs(2)).await;
        waits.lock().unwrap().clone()
    };
    let waited = tokio::select! {
        _ = watching => panic!("known without EndpointSlices"),
        waited = timeout(PATIENCE, all_but_one) => waited.expect("the others in time"),
    };
    assert_eq!(waited, BTreeSet::from(["the API server's list of endpointslices"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_can_not_be_read_denies_and_is_told_with_its_field() {
    let cluster = Cluster::start().await;
    let spec = json!({"action": "DENY", "rules": [{"from": [{"source": {"principles": ["x"]}}]}]});
    cluster.api.put(policy("typo", &spec));
    let mut strange = policy("strange", &json!({}));
    strange["extra"] = json!(1);
    cluster.api.put(strange);
    let (view, source) = cluster.known().await;
    let invalid: Vec<_> =
        view.load().invalid_policies.iter().map(|one| (one.name.to_string(), one.field.clone(), one.decides)).collect();
    let field = "spec.rules[0].from[0].source.principles".to_owned();
    assert_eq!(invalid, [("strange".to_owned(), "extra".to_owned(), true), ("typo".to_owned(), field, true)]);
    within("told", || source.problems().borrow().len() == 2).await;
    assert_eq!(reasons(&source), BTreeSet::from(["policy_invalid"]));
    // A status, which the real API server keeps beside the spec, is no field too many.
    let mut good = policy("typo", &json!({"action": "DENY"}));
    good["status"] = json!({"conditions": []});
    cluster.api.put(good);
    until(&view, "mended", |now| now.invalid_policies.len() == 1 && policies(now) == ["typo"]).await;
    within("told that it is", || source.problems().borrow().len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_kinds_that_are_not_installed_are_empty_and_told() {
    let cluster = Cluster::start().await;
    for kind in ["authorizationpolicies", "peerauthentications"] {
        cluster.api.set_absent(kind, true);
    }
    let (view, source) = cluster.known().await;
    assert_eq!((policies(&view.load()), pods(&view.load())), (vec![], vec!["web"]));
    within("told", || reasons(&source).contains("no_such_kind")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_whose_kind_disappears_hold_on() {
    let cluster = Cluster::start().await;
    cluster.api.put(policy("deny", &json!({"action": "DENY", "rules": [{}]})));
    let (view, source) = cluster.known().await;
    cluster.api.set_absent("authorizationpolicies", true);
    cluster.api.compact();
    within("told", || reasons(&source).contains("no_such_kind")).await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(policies(&view.load()), ["deny"]);
    cluster.api.remove("authorizationpolicies", "shop", "deny");
    cluster.api.set_absent("authorizationpolicies", false);
    until(&view, "a list says that it is gone", |now| policies(now).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_makes_no_sense_stays_as_it_was_and_is_told() {
    let cluster = Cluster::start().await;
    let (view, source) = cluster.known().await;
    cluster.api.put(pod("web", "not an address"));
    within("told", || reasons(&source) == BTreeSet::from(["object_invalid"])).await;
    let problem = source.problems().borrow()[0].clone();
    assert_eq!(problem.error.object(), Some("pods shop/web"));
    assert_eq!(problem.error.field(), Some("status.podIP"));
    assert!(view.load().by_address.contains_key(&"10.0.0.1".parse().unwrap()));
    cluster.api.put(pod("web", "10.0.0.7"));
    until(&view, "mended", |now| now.by_address.contains_key(&"10.0.0.7".parse().unwrap())).await;
    within("no problem left", || reasons(&source).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_decides_as_before_while_the_api_server_is_away() {
    let cluster = Cluster::start().await;
    cluster.api.put(policy("deny", &json!({"action": "DENY", "rules": [{}]})));
    cluster.api.put(policy("typo", &json!({"acton": "DENY"})));
    let (view, source) = cluster.known().await;
    within("the snapshot on disk", || cluster.saved()).await;
    let before = view.load();
    drop((view, source));

    for fault in [Fault::Status(503), Fault::BlackHole, Fault::Hangup] {
        cluster.api.break_down(Some(fault));
        let (view, source) = cluster.known().await;
        assert!(view.load().same_content(&Snapshot { generation: 1, ..copy(&before) }), "{fault:?}");
        within("told", || reasons(&source).contains("not_followed") || fault == Fault::BlackHole).await;
        cluster.api.break_down(None);
        if fault == Fault::Status(503) {
            // And learns what has changed when it is back.
            cluster.api.put(pod("db", "10.0.0.2"));
            until(&view, "followed", |now| pods(now) == ["db", "web"]).await;
            cluster.api.delete("shop", "db");
            until(&view, "followed", |now| pods(now) == ["web"]).await;
            within("no problem of the API server left", || reasons(&source) == BTreeSet::from(["policy_invalid"]))
                .await;
        }
    }
}

fn copy(snapshot: &Snapshot) -> Snapshot {
    Snapshot {
        generation: snapshot.generation,
        workloads: snapshot.workloads.clone(),
        by_address: snapshot.by_address.clone(),
        services: snapshot.services.clone(),
        by_cluster_address: snapshot.by_cluster_address.clone(),
        authorization_policies: snapshot.authorization_policies.clone(),
        peer_authentications: snapshot.peer_authentications.clone(),
        invalid_policies: snapshot.invalid_policies.clone(),
        policy_gaps: snapshot.policy_gaps.clone(),
        root_namespace: Arc::clone(&snapshot.root_namespace),
        trust_domains: Arc::clone(&snapshot.trust_domains),
        localities: Arc::clone(&snapshot.localities),
        namespaces: Arc::clone(&snapshot.namespaces),
        warnings: snapshot.warnings.clone(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_not_whole_is_refused_and_the_api_server_is_waited_for() {
    let cluster = Cluster::start().await;
    let (view, source) = cluster.known().await;
    within("the snapshot on disk", || cluster.saved()).await;
    drop((view, source));
    let path = cluster.state().join(saved::FILE);
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    cluster.api.break_down(Some(Fault::Status(503)));
    assert!(timeout(limits::SAVED_PATIENCE + Duration::from_secs(2), cluster.watch()).await.is_err());
    let watching = cluster.watch();
    let (known, ()) = tokio::join!(timeout(PATIENCE, watching), async {
        sleep(Duration::from_secs(1)).await;
        cluster.api.break_down(None);
    });
    let (view, _source) = known.expect("known in time").unwrap();
    assert_eq!(pods(&view.load()), ["web"]);
}

#[tokio::test]
async fn a_way_to_the_api_server_that_is_none_is_an_error() {
    let config = ApiServer {
        kubeconfig: Some(Path::new("/does/not/exist").to_owned()),
        state_dir: "/nowhere".into(),
        node: "node-1".into(),
        cluster_id: "Kubernetes".into(),
    };
    let error = Source::watch(config, Settings::default(), |_| ()).await.unwrap_err();
    assert_eq!(error.reason(), "cluster");
    assert!(error.to_string().contains("--kubeconfig /does/not/exist"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_source_ends_its_view_and_its_watches() {
    let cluster = Cluster::start().await;
    let (mut view, source) = cluster.known().await;
    drop(source);
    assert!(timeout(PATIENCE, view.next()).await.expect("in time").is_none());
}
