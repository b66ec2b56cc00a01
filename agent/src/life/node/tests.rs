//! The node's taint and its pods' events against an API server.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::events::v1::Event;
use kube::{Api, Client, api::ListParams};
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{Node, TAINT, Taint};
use crate::{
    capture::PodState,
    cluster::{
        Workload, api_client,
        kubernetes::stand_in::{ApiServer, Fault},
    },
    life::{
        keeper::Pods,
        limits,
        readiness::{Blocker, Readiness},
    },
};

const SOON: Duration = Duration::from_secs(20);

struct Stage {
    server: ApiServer,
    client: Client,
    readiness: Readiness,
    /// What it waits for from the beginning.
    blocker: Option<Blocker>,
    pods: Pods,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

fn taint(key: &str) -> Value {
    json!({"key": key, "effect": "NoSchedule"})
}

impl Stage {
    async fn start(mode: Taint, taints: &[&str], ready: bool) -> Self {
        let _other_tests_may_have = crate::life::start::install_crypto();
        let server = ApiServer::start().await.unwrap();
        let taints: Vec<_> = taints.iter().map(|key| taint(key)).collect();
        for name in ["node-1", "node-2"] {
            server.put(json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"taints": taints},
            }));
        }
        let folder = tempfile::tempdir().unwrap();
        let kubeconfig = folder.path().join("kubeconfig");
        server.write_kubeconfig_of(&kubeconfig, "agent").unwrap();
        let client = api_client(Some(&kubeconfig)).await.unwrap();
        let (readiness, pods, stop) = (Readiness::default(), Pods::default(), CancellationToken::new());
        let blocker = (!ready).then(|| readiness.block("capture"));
        let node = Node::new("node-1".into(), mode);
        let task = tokio::spawn(node.follow(client.clone(), readiness.clone(), pods.clone(), stop.clone()));
        Self { server, client, readiness, blocker, pods, stop, task: Some(task), _folder: folder }
    }

    fn taints(&self, node: &str) -> Vec<String> {
        let node = self.server.get("nodes", "", node).unwrap();
        let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
        taints.iter().map(|taint| taint["key"].as_str().unwrap().to_owned()).collect()
    }

    async fn becomes(&self, wanted: &[&str]) {
        let deadline = Instant::now() + SOON;
        while self.taints("node-1") != wanted {
            assert!(Instant::now() < deadline, "{:?} and not {wanted:?}", self.taints("node-1"));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn events(&self) -> Vec<Event> {
        let events = Api::<Event>::namespaced(self.client.clone(), "shop");
        events.list(&ListParams::default()).await.unwrap().items
    }

    async fn end(&mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            tokio::time::timeout(SOON, task).await.expect("it ends").unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_startup_taint_goes_when_the_agent_is_ready_and_other_taints_and_nodes_are_left() {
    let mut stage = Stage::start(Taint::TakenOff, &["example.com/gpu", TAINT], true).await;
    stage.becomes(&["example.com/gpu"]).await;
    assert_eq!(stage.taints("node-2"), ["example.com/gpu", TAINT], "another node is another agent's");
    let blocker = stage.readiness.block("something");
    tokio::time::sleep(limits::NODE_LOOK * 3).await;
    assert_eq!(stage.taints("node-1"), ["example.com/gpu"]);
    stage.end().await;
    assert_eq!(stage.taints("node-1"), ["example.com/gpu"], "not put on again unless asked to");
    drop(blocker);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_taint_stays_until_the_agent_is_ready_and_is_put_on_at_its_end_where_it_is_kept() {
    let mut stage = Stage::start(Taint::Kept, &[TAINT], false).await;
    tokio::time::sleep(limits::NODE_LOOK * 3).await;
    assert_eq!(stage.taints("node-1"), [TAINT], "not while capture does not work");
    stage.blocker = None;
    stage.becomes(&[]).await;
    stage.end().await;
    assert_eq!(stage.taints("node-1"), [TAINT]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_refuses_is_asked_again_and_again_and_then_told() {
    let mut stage = Stage::start(Taint::TakenOff, &[TAINT], false).await;
    stage.server.break_down(Some(Fault::Status(500)));
    stage.blocker = None;
    tokio::time::sleep(limits::NODE_LOOK * 3).await;
    assert_eq!(stage.taints("node-1"), [TAINT]);
    stage.server.break_down(None);
    stage.becomes(&[]).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taint_that_nobody_asked_the_agent_to_take_off_stays_and_the_node_is_not_looked_at() {
    let mut stage = Stage::start(Taint::Left, &[TAINT], true).await;
    tokio::time::sleep(limits::NODE_LOOK * 3).await;
    stage.end().await;
    assert_eq!(stage.taints("node-1"), [TAINT]);
    assert_eq!(stage.server.count("get", "nodes"), 0, "it needs no right to");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_stays_uncaptured_has_one_event_that_says_why_and_what_to_do() {
    let mut stage = Stage::start(Taint::TakenOff, &[], true).await;
    let workload = Arc::new(Workload::named("shop", "web"));
    let uncaptured =
        |reason| PodState::Uncaptured { reason, detail: "where the node keeps the pod is not known".to_owned() };
    stage.pods.set(&workload, uncaptured("place_unknown"), None);
    let began = Instant::now();
    let deadline = began + limits::EVENT_AFTER + SOON;
    let events = loop {
        let events = stage.events().await;
        if !events.is_empty() {
            break events;
        }
        assert!(Instant::now() < deadline, "no event");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    assert!(began.elapsed() >= limits::EVENT_AFTER, "not before it lasts");
    let [event] = events.as_slice() else { panic!("{events:?}") };
    let regarding = event.regarding.as_ref().unwrap();
    assert_eq!((regarding.kind.as_deref(), regarding.name.as_deref()), (Some("Pod"), Some("web")));
    assert_eq!(regarding.uid.as_deref(), Some("uid-web"));
    assert_eq!((event.type_.as_deref(), event.reason.as_deref()), (Some("Warning"), Some("NotCaptured")));
    let note = event.note.as_deref().unwrap();
    assert!(note.contains("place_unknown: where the node keeps") && note.contains("/proc"), "{note}");
    assert_eq!(event.reporting_instance.as_deref(), Some("node-1"));
    tokio::time::sleep(limits::NODE_LOOK * 3).await;
    assert_eq!(stage.events().await.len(), 1, "once");
    stage.end().await;
}
