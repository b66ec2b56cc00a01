//! Node authorization with an API server that is late, away, silent or hostile, through the CA's own listener.

use std::{
    future::pending,
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::task::JoinHandle;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};

use super::{
    HOUR, WEB, api_server,
    apiserver::{ApiServer, Fault, Token, pod},
    config, named,
    off_node::{agent, pods},
    plain_csr, request,
};
use crate::{
    identity::{
        CaClientConfig, Certificates,
        ca::{Authorization, Ca, CaConfig, NodeAuthorization, Vitals},
        proto::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
        tests::support::client_config,
    },
    life::limits,
};

/// Longer than anything here takes on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(20);

/// An API server, and a CA that asks it.
pub(super) struct Cluster {
    pub api: ApiServer,
    directory: tempfile::TempDir,
    address: std::net::SocketAddr,
    channel: Channel,
    vitals: Vitals,
    task: JoinHandle<()>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) fn nodes(directory: &tempfile::TempDir) -> CaConfig {
    CaConfig {
        authorization: Authorization::Nodes(NodeAuthorization {
            kubeconfig: Some(directory.path().join("kubeconfig")),
            audience: "istio-ca".to_owned(),
            agents: vec!["heddle-system/heddle".parse().unwrap()],
            cluster_id: "Kubernetes".to_owned(),
        }),
        ..config(directory)
    }
}

impl Cluster {
    pub async fn start(pods: Vec<serde_json::Value>) -> Self {
        let cluster = Self::start_with(pods, None).await;
        cluster.ready().await;
        cluster
    }

    async fn start_with(pods: Vec<serde_json::Value>, fault: Option<Fault>) -> Self {
        let (api, directory) = api_server().await;
        pods.into_iter().for_each(|pod| api.put(pod));
        api.break_down(fault);
        let ca = Ca::bind(nodes(&directory)).await.unwrap();
        let (address, vitals) = (ca.address(), ca.vitals());
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca.root_pem())).domain_name("ca.test");
        let channel = Channel::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap();
        let task = tokio::spawn(async move { ca.run(pending()).await.unwrap() });
        Self { api, directory, address, channel: channel.connect_lazy(), vitals, task }
    }

    async fn ready(&self) {
        until("the pods", || self.vitals.waiting_for().is_empty()).await;
    }

    pub async fn ask(&self, token: &str, request: IstioCertificateRequest) -> Result<Vec<String>, tonic::Status> {
        let mut request = tonic::Request::new(request);
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        request.metadata_mut().insert("clusterid", "Kubernetes".parse().unwrap());
        let mut client = IstioCertificateServiceClient::new(self.channel.clone());
        client.create_certificate(request).await.map(|answer| answer.into_inner().cert_chain)
    }

    /// Asks for an identity in good form.
    async fn get(&self, token: &str, identity: &str) -> Result<Vec<String>, tonic::Code> {
        self.ask(token, request(plain_csr(), named(identity), 60)).await.map_err(|status| status.code())
    }

    /// `heddle_ca_requests_total`.
    pub fn requests(&self, result: &str, reason: &str) -> f64 {
        let text = self.vitals.exposition().unwrap();
        let line = format!("heddle_ca_requests_total{{reason=\"{reason}\",result=\"{result}\"}} ");
        text.lines().find_map(|one| one.strip_prefix(&line)).map_or(0.0, |value| value.parse().unwrap())
    }
}

async fn until(what: &str, mut look: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !look() {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn identity(account: &str) -> String {
    format!("spiffe://mesh.test/ns/shop/sa/{account}")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_away_is_an_outage_and_no_refusal() {
    let cluster = Cluster::start(pods()).await;
    let token = cluster.api.issue(agent());
    for (fault, reason) in [
        (Fault::Status(500), "api_unavailable"),
        (Fault::Status(429), "api_unavailable"),
        (Fault::Status(403), "api_forbidden"),
        (Fault::Status(401), "api_forbidden"),
        (Fault::Silence, "api_unavailable"),
    ] {
        let before = cluster.requests("unavailable", reason);
        cluster.api.break_down(Some(fault));
        let asked = Instant::now();
        let status = cluster.ask(&token, request(plain_csr(), named(WEB), 60)).await.unwrap_err();
        let took = asked.elapsed();
        assert_eq!((status.code(), status.message()), (tonic::Code::Unavailable, "try again later"), "{fault:?}");
        assert_eq!(cluster.requests("unavailable", reason), before + 1.0, "{fault:?}");
        // The node's own deadline has not passed: it hears of it. With room for a machine that is busy.
        println!("{fault:?}: unavailable after {took:?}");
        assert!(took < limits::FETCH, "{fault:?}: {took:?}");
        cluster.api.break_down(None);
    }
    cluster.ready().await;
    cluster.get(&token, WEB).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_takes_an_outage_of_the_api_server_for_one_of_the_ca_and_goes_on_after_it() {
    let cluster = Cluster::start(pods()).await;
    std::fs::write(cluster.directory.path().join("token"), cluster.api.issue(agent())).unwrap();
    cluster.api.break_down(Some(Fault::Status(503)));
    let web: crate::identity::SpiffeId = WEB.parse().unwrap();
    let config = client_config(cluster.address, cluster.directory.path(), HOUR);
    let certificates =
        Certificates::start(CaClientConfig { server_name: Some("ca.test".to_owned()), ..config }).unwrap();
    certificates.keep([web.clone()].into());
    let last_error = || certificates.list().into_iter().map(|status| status.last_error).collect::<String>();
    until("an error", || last_error().contains("try again later")).await;
    assert!(last_error().starts_with("CA unreachable"), "{}", last_error());
    cluster.api.break_down(None);
    until("a certificate", || certificates.list().iter().any(|status| status.not_after.is_some())).await;
    assert_eq!(last_error(), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_the_watch_has_not_told_of_is_asked_for() {
    let cluster = Cluster::start(pods()).await;
    let token = cluster.api.issue(agent());
    cluster.get(&token, WEB).await.unwrap();
    assert_eq!((cluster.api.asked("pod"), cluster.api.asked("pods")), (0, 0), "the watch knows");
    cluster.api.hush_watches(true);
    cluster.api.put(pod("shop", "late-0", "late-0", "late", "node-1"));
    cluster.get(&token, &identity("late")).await.unwrap();
    assert_eq!((cluster.api.asked("pod"), cluster.api.asked("pods")), (0, 1), "the API server knows");
    cluster.api.hush_watches(false);
    until("the watch", || cluster.vitals.exposition().unwrap().contains("heddle_ca_pods 9")).await;
    cluster.get(&token, &identity("late")).await.unwrap();
    assert_eq!(cluster.api.asked("pods"), 1);
    // A pod that leaves takes its identity with it.
    cluster.api.delete("shop", "late-0");
    until("the watch", || cluster.vitals.exposition().unwrap().contains("heddle_ca_pods 8")).await;
    assert_eq!(cluster.get(&token, &identity("late")).await.unwrap_err(), tonic::Code::Unauthenticated);
    assert_eq!(cluster.requests("refused", "not_on_node"), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_died_silently_gives_nobody_that_left_an_identity() {
    let mut pods = pods();
    pods.push(pod("shop", "stays-0", "stays-0", "stays", "node-1"));
    let cluster = Cluster::start(pods).await;
    let token = cluster.api.issue(agent());
    cluster.get(&token, WEB).await.unwrap();
    cluster.api.hush_watches(true);
    cluster.api.delete("shop", "web-0");
    tokio::time::sleep(limits::CA_WATCH_WORD).await;
    assert!(cluster.vitals.waiting_for().is_empty(), "the watch looks well");
    let since = Instant::now();
    assert_eq!(cluster.get(&token, WEB).await.unwrap_err(), tonic::Code::Unauthenticated);
    assert_eq!(cluster.requests("refused", "not_on_node"), 1.0);
    // What stays costs one question for its pod, and then none for as long as the watch's word holds.
    let before = cluster.api.asked("pod");
    for _ in 0..5 {
        cluster.get(&token, &identity("stays")).await.unwrap();
    }
    let asked = cluster.api.asked("pod") - before;
    assert!(asked == 1 || since.elapsed() >= limits::CA_WATCH_WORD, "{asked}");
    // An agent whose own pod is gone gets nothing any more either, nor does anybody while there is no answer.
    tokio::time::sleep(limits::CA_WATCH_WORD).await;
    cluster.api.break_down(Some(Fault::Silence));
    assert_eq!(cluster.get(&token, &identity("stays")).await.unwrap_err(), tonic::Code::Unavailable);
    cluster.api.delete("heddle-system", "heddle-a");
    cluster.api.break_down(None);
    assert_eq!(cluster.get(&token, &identity("stays")).await.unwrap_err(), tonic::Code::Unauthenticated);
    assert_eq!(cluster.requests("refused", "caller_pod_gone"), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_watch_knew_before_it_broke_gives_nobody_an_identity() {
    let cluster = Cluster::start(pods()).await;
    let token = cluster.api.issue(agent());
    cluster.get(&token, WEB).await.unwrap();
    cluster.api.break_down(Some(Fault::Status(500)));
    until("readiness", || !cluster.vitals.waiting_for().is_empty()).await;
    cluster.api.delete("shop", "web-0");
    cluster.api.break_down(None);
    // Before and after it is listed anew.
    for _ in 0..2 {
        assert_eq!(cluster.get(&token, WEB).await.unwrap_err(), tonic::Code::Unauthenticated);
        cluster.ready().await;
    }
    assert_eq!(cluster.requests("refused", "not_on_node"), 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ca_is_ready_when_it_knows_the_pods_and_says_what_it_waits_for() {
    let cluster = Cluster::start_with(pods(), Some(Fault::Status(503))).await;
    assert_eq!(cluster.vitals.waiting_for(), ["the API server's list of pods"]);
    until("a try", || cluster.vitals.exposition().unwrap().contains("heddle_ca_pods_watched 0")).await;
    cluster.api.break_down(None);
    cluster.ready().await;
    assert!(cluster.vitals.exposition().unwrap().contains("heddle_ca_pods_watched 1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_reviewed_once_for_all_who_ask_at_once_and_one_that_says_what_is_wrong_never() {
    let cluster = Cluster::start(pods()).await;
    let token = cluster.api.issue(agent());
    let all = (0..16).map(|_| cluster.get(&token, WEB));
    assert!(futures::future::join_all(all).await.into_iter().all(|answer| answer.is_ok()));
    assert_eq!(cluster.api.asked("tokenreview"), 1);
    for bad in [
        cluster.api.issue(Token { expires: -1, ..agent() }),
        cluster.api.issue(Token { audiences: vec!["vault".to_owned()], ..agent() }),
        "no.token".to_owned(),
        "a.b.c".to_owned(),
        "x".repeat(1_000),
    ] {
        assert_eq!(cluster.get(&bad, WEB).await.unwrap_err(), tonic::Code::Unauthenticated, "{bad}");
    }
    assert_eq!(cluster.api.asked("tokenreview"), 1);
    // In the right form, but nobody issued it.
    let forged = agent().text(99);
    assert_eq!(cluster.get(&forged, WEB).await.unwrap_err(), tonic::Code::Unauthenticated);
    assert_eq!((cluster.api.asked("tokenreview"), cluster.requests("refused", "token_rejected")), (2, 1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_cluster_s_agents_are_refused() {
    let cluster = Cluster::start(pods()).await;
    let token = cluster.api.issue(agent());
    let mut asked = tonic::Request::new(request(plain_csr(), named(WEB), 60));
    asked.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    asked.metadata_mut().insert("clusterid", "elsewhere".parse().unwrap());
    let mut client = IstioCertificateServiceClient::new(cluster.channel.clone());
    let status = client.create_certificate(asked).await.unwrap_err();
    assert_eq!(status.message(), "request authenticate failure");
    assert_eq!(cluster.requests("refused", "cluster"), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_take_whole_steps_of_time() {
    let cluster = Cluster::start(pods()).await;
    let token = cluster.api.issue(agent());
    for (token, identity) in [("", WEB), (&token, "nobody"), (&token, "spiffe://mesh.test/ns/shop/sa/api")] {
        let asked = Instant::now();
        assert_eq!(cluster.get(token, identity).await.unwrap_err(), tonic::Code::Unauthenticated);
        assert!(asked.elapsed() >= limits::CA_REFUSAL, "{identity}: {:?}", asked.elapsed());
    }
}

#[tokio::test]
async fn a_kubeconfig_that_can_not_be_used_is_named() {
    let directory = tempfile::Builder::new().prefix("hi-").tempdir().unwrap();
    let error = Ca::bind(nodes(&directory)).await.unwrap_err();
    let path = directory.path().join("kubeconfig");
    assert_eq!(error.reason(), "cluster");
    assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
    std::fs::write(&path, json!({"clusters": 7}).to_string()).unwrap();
    let error = Ca::bind(nodes(&directory)).await.unwrap_err();
    assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
}
