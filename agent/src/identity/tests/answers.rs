//! The agent as a client of other servers of the API: what istiod and cert-manager's istio-csr ask for and answer.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use prost_types::value::Kind;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, IsCa, Issuer,
    KeyPair, SanType,
};
use rustls_pki_types::CertificateDer;
use tokio::{net::TcpListener, time::sleep};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Request, Response, Status,
    transport::{Identity, Server, ServerTlsConfig},
};

use super::support::{Leaf, TOKEN, TestRoot, client_config, handshake, id, within};
use crate::{
    identity::{
        CaClientConfig, CertificateStatus, Certificates,
        ca::pem,
        proto::{
            IstioCertificateRequest, IstioCertificateResponse,
            istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
        },
        roots::span,
    },
    life::limits,
};

/// How a server arranges what it signed, from the leaf up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// istiod, heddle: one certificate an entry, the root last.
    OneEach,
    /// istiod before 1.20: the intermediates in one entry, the roots of a rotation in one entry.
    Bundles,
    /// istio-csr: leaf and intermediates in one entry, then the root.
    LeafWithChain,
    /// istio-csr with an issuer that names no CA.
    NoRoot,
    /// The same, with words around the PEM and Windows line ends, and an empty entry.
    Untidy,
}

/// An issuing intermediate and its root.
struct Stage {
    root: TestRoot,
    other_root: TestRoot,
    intermediate: (CertificateDer<'static>, KeyPair),
}

impl Stage {
    /// The intermediate ends this many seconds from now.
    fn new(intermediate_ends: i64) -> Self {
        let root = TestRoot::new("the root");
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "the intermediate");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let now = time::OffsetDateTime::now_utc();
        (params.not_before, params.not_after) =
            (now - time::Duration::hours(1), now + time::Duration::seconds(intermediate_ends));
        let intermediate = (root.sign(&params, &key), key);
        Self { root, other_root: TestRoot::new("another root"), intermediate }
    }

    /// What comes back for a CSR: exactly as long as `lasts` (seconds).
    fn answer(&self, csr: &str, form: Form, lasts: i64) -> Vec<String> {
        let mut requested = CertificateSigningRequestParams::from_pem(csr).unwrap();
        let uris = requested.params.subject_alt_names.clone();
        assert!(matches!(uris.as_slice(), [SanType::URI(_)]), "{uris:?}");
        requested.params = Leaf { uris: &[], valid: (-60, lasts), ..Leaf::default() }.params();
        requested.params.subject_alt_names = uris;
        let issuer = Issuer::from_ca_cert_der(&self.intermediate.0, &self.intermediate.1).unwrap();
        let leaf = pem(requested.signed_by(&issuer).unwrap().der());
        let (middle, root) = (pem(&self.intermediate.0), self.root.certificate.pem());
        match form {
            Form::OneEach => vec![leaf, middle, root],
            Form::Bundles => vec![leaf, middle, format!("{root}{}", self.other_root.certificate.pem())],
            Form::LeafWithChain => vec![format!("{leaf}{middle}"), root],
            Form::NoRoot => vec![format!("{leaf}{middle}")],
            Form::Untidy => {
                let words = format!("subject=leaf\n{leaf}\nsubject=intermediate\n{middle}");
                vec![words.replace('\n', "\r\n"), String::new()]
            }
        }
    }
}

/// A call as the server saw it.
#[derive(Clone, Default)]
struct Seen {
    headers: BTreeMap<String, String>,
    metadata: BTreeMap<String, String>,
    seconds: i64,
}

/// Another's server of the API.
struct Other {
    stage: Stage,
    form: Form,
    lasts: i64,
    takes: Duration,
    seen: Mutex<Vec<Seen>>,
    under_way: AtomicUsize,
    most: AtomicUsize,
}

/// Shared with the server's task.
struct Service(Arc<Other>);

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let Self(other) = self;
        let now = other.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        other.most.fetch_max(now, Ordering::SeqCst);
        sleep(other.takes).await;
        other.under_way.fetch_sub(1, Ordering::SeqCst);
        let headers = request.metadata().clone().into_headers();
        let headers =
            headers.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect();
        let request = request.into_inner();
        let text = |kind: Option<Kind>| match kind {
            Some(Kind::StringValue(text)) => text,
            other => panic!("{other:?} is no text"),
        };
        let fields = request.metadata.unwrap_or_default().fields;
        let metadata = fields.into_iter().map(|(name, value)| (name, text(value.kind))).collect();
        other.seen.lock().unwrap().push(Seen { headers, metadata, seconds: request.validity_duration });
        let cert_chain = other.stage.answer(&request.csr, other.form, other.lasts);
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

struct Running {
    directory: tempfile::TempDir,
    address: SocketAddr,
    other: Arc<Other>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Running {
    async fn start(form: Form, intermediate_ends: i64, lasts: i64, takes: Duration) -> Self {
        let directory = tempfile::Builder::new().prefix("hi-").tempdir().unwrap();
        let stage = Stage::new(intermediate_ends);
        fs::write(directory.path().join("root.pem"), stage.root.certificate.pem()).unwrap();
        fs::write(directory.path().join("token"), TOKEN).unwrap();
        let key = KeyPair::generate().unwrap();
        let own = stage.root.sign(&Leaf { uris: &[], dns: &["istiod.test"], ..Leaf::default() }.params(), &key);
        let tls = ServerTlsConfig::new().identity(Identity::from_pem(pem(&own), key.serialize_pem()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let other = Arc::new(Other {
            stage,
            form,
            lasts,
            takes,
            seen: Mutex::default(),
            under_way: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
        });
        let service = IstioCertificateServiceServer::new(Service(Arc::clone(&other)));
        let server = Server::builder().tls_config(tls).unwrap().add_service(service);
        let task =
            tokio::spawn(async move { server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap() });
        Self { directory, address, other, task }
    }

    fn config(&self) -> CaClientConfig {
        CaClientConfig {
            server_name: Some("istiod.test".to_owned()),
            cluster_id: "cluster-7".to_owned(),
            cert_signer: Some("clusterissuers.cert-manager.io/shop".to_owned()),
            headers: vec!["x-tenant=shop".parse().unwrap(), "x-tenant= other ".parse().unwrap()],
            ..client_config(self.address, self.directory.path(), Duration::from_secs(24 * 3_600))
        }
    }
}

async fn fetched(node: &Certificates) -> Vec<CertificateStatus> {
    within(Duration::from_secs(8), "every certificate is there", || {
        node.list().iter().all(|status| status.not_after.is_some())
    })
    .await;
    node.list()
}

async fn form_works(form: Form, roots: usize) {
    let ca = Running::start(form, 3_600, 600, Duration::ZERO).await;
    let (web, db) = (id("shop", "web"), id("shop", "db"));
    let node = Certificates::start(ca.config()).unwrap();
    node.keep(HashSet::from([web.clone(), db.clone()]));
    for status in fetched(&node).await {
        let names: Vec<_> = status.intermediates.iter().map(|issuer| issuer.subject.as_str()).collect();
        assert_eq!(names, ["CN=the intermediate"], "{form:?}");
        let root = status.root.unwrap();
        assert_eq!(root.subject, "CN=the root", "{form:?}");
        assert_eq!(root.serial, span(ca.other.stage.root.certificate.der()).unwrap().0);
        assert_eq!((status.last_error.as_str(), status.failed), ("", None));
        assert!(status.received.unwrap() <= SystemTime::now());
    }
    assert_eq!(node.roots().len(), roots, "{form:?}");
    let outcome = handshake(node.client(&web, &db).await.unwrap(), node.server(&db).await.unwrap()).await;
    assert_eq!((outcome.client.unwrap(), outcome.server.unwrap()), (db, web), "{form:?}");
}

#[tokio::test]
async fn an_answer_with_one_certificate_an_entry_is_used() {
    form_works(Form::OneEach, 1).await;
}

#[tokio::test]
async fn an_answer_whose_last_entry_holds_the_roots_of_a_rotation_is_used_and_both_are_trusted() {
    form_works(Form::Bundles, 2).await;
}

#[tokio::test]
async fn an_answer_whose_first_entry_holds_the_whole_chain_is_used() {
    form_works(Form::LeafWithChain, 1).await;
}

#[tokio::test]
async fn an_answer_without_a_root_is_used_if_it_leads_to_one_of_the_bundle() {
    form_works(Form::NoRoot, 1).await;
}

#[tokio::test]
async fn an_answer_with_words_and_empty_entries_is_used() {
    form_works(Form::Untidy, 1).await;
}

#[tokio::test]
async fn a_call_says_what_istiod_and_what_stands_before_it_ask_for() {
    let ca = Running::start(Form::OneEach, 3_600, 600, Duration::ZERO).await;
    let node = Certificates::start(ca.config()).unwrap();
    node.keep(HashSet::from([id("shop", "web")]));
    fetched(&node).await;
    let seen = ca.other.seen.lock().unwrap().first().cloned().unwrap();
    assert_eq!(seen.headers["authorization"], format!("Bearer {TOKEN}"));
    assert_eq!(seen.headers["clusterid"], "cluster-7");
    assert!(["shop", "other"].contains(&seen.headers["x-tenant"].as_str()), "{:?}", seen.headers);
    assert_eq!(seen.metadata["ImpersonatedIdentity"], "spiffe://mesh.test/ns/shop/sa/web");
    assert_eq!(seen.metadata["CertSigner"], "clusterissuers.cert-manager.io/shop");
    assert_eq!(seen.metadata.len(), 2);
    assert_eq!(seen.seconds, 24 * 3_600);
}

#[tokio::test]
async fn without_a_signer_none_is_named() {
    let ca = Running::start(Form::OneEach, 3_600, 600, Duration::ZERO).await;
    let node = Certificates::start(CaClientConfig { cert_signer: None, headers: Vec::new(), ..ca.config() }).unwrap();
    node.keep(HashSet::from([id("shop", "web")]));
    fetched(&node).await;
    let seen = ca.other.seen.lock().unwrap().first().cloned().unwrap();
    assert_eq!(seen.metadata.keys().collect::<Vec<_>>(), ["ImpersonatedIdentity"]);
    assert!(!seen.headers.contains_key("x-tenant"));
}

#[tokio::test]
async fn a_shorter_life_than_asked_for_is_renewed_in_its_own_time() {
    // Asked for are 24 hours.
    let ca = Running::start(Form::OneEach, 3_600, 600, Duration::ZERO).await;
    let node = Certificates::start(ca.config()).unwrap();
    node.keep(HashSet::from([id("shop", "web")]));
    let status = fetched(&node).await.remove(0);
    let next = status.next_try.unwrap().duration_since(SystemTime::now()).unwrap();
    assert!(next > Duration::from_secs(260) && next < Duration::from_secs(335), "{next:?}");
}

#[tokio::test]
async fn a_certificate_is_used_no_longer_than_the_intermediate_above_it() {
    let ca = Running::start(Form::LeafWithChain, 30, 600, Duration::ZERO).await;
    let node = Certificates::start(ca.config()).unwrap();
    node.keep(HashSet::from([id("shop", "web")]));
    let status = fetched(&node).await.remove(0);
    let (leaf, usable) = (status.not_after.unwrap(), status.usable_until.unwrap());
    assert_eq!(usable, status.intermediates[0].not_after);
    assert!(leaf.duration_since(usable).unwrap() > Duration::from_secs(500));
    let next = status.next_try.unwrap().duration_since(SystemTime::now()).unwrap();
    assert!(next < Duration::from_secs(17), "{next:?}");
}

#[tokio::test]
async fn eight_calls_are_under_way_at_most_and_as_many_when_there_is_work() {
    let ca = Running::start(Form::OneEach, 3_600, 600, Duration::from_millis(100)).await;
    let node = Certificates::start(ca.config()).unwrap();
    node.keep((0..40).map(|n| id("shop", &format!("web-{n}"))).collect());
    within(Duration::from_secs(2), "calls are on show", || node.fetches().under_way == limits::FETCHES).await;
    fetched(&node).await;
    assert_eq!(ca.other.most.load(Ordering::SeqCst), limits::FETCHES);
    assert_eq!(node.fetches().ended, [("ok", 40)]);
}

#[tokio::test]
async fn a_fetch_for_an_identity_that_left_is_given_up_and_its_place_is_free() {
    let ca = Running::start(Form::OneEach, 3_600, 600, Duration::from_secs(3)).await;
    let node = Certificates::start(ca.config()).unwrap();
    let first = |from: usize| (0..limits::FETCHES).map(|n| id("shop", &format!("web-{}", from + n))).collect();
    node.keep(first(0));
    within(Duration::from_secs(2), "eight are under way", || node.fetches().under_way == limits::FETCHES).await;
    node.keep(first(100));
    within(Duration::from_secs(1), "they are given up", || {
        node.fetches().ended == [("abandoned", limits::FETCHES as u64)]
    })
    .await;
    within(Duration::from_secs(1), "others have their places", || node.fetches().under_way == limits::FETCHES).await;
    assert!(node.list().iter().all(|status| status.last_error.is_empty()));
}

#[test]
fn a_header_that_would_stand_for_another_is_refused() {
    use crate::identity::{CaHeader, CaHeaderError};
    let parse = |text: &str| text.parse::<CaHeader>().map(drop);
    assert_eq!(parse("x-tenant=a=b"), Ok(()));
    for (text, error) in [
        ("x-tenant", CaHeaderError::NoValue),
        ("=x", CaHeaderError::Name),
        ("x tenant=x", CaHeaderError::Name),
        ("x-bin=x", CaHeaderError::Name),
        ("Authorization=x", CaHeaderError::Taken),
        ("clusterid=x", CaHeaderError::Taken),
        ("grpc-timeout=1S", CaHeaderError::Taken),
        ("x-tenant=a\nb", CaHeaderError::Value),
    ] {
        assert_eq!(parse(text), Err(error), "{text:?}");
    }
    let header: CaHeader = "x-key=secret".parse().unwrap();
    assert!(!format!("{header:?}").contains("secret"));
}
