//! Two pods on loopback addresses of their own, served as on a node.
//!
//! `sk_lookup` hands a pod's connections to its listener whatever their destination; here a listener is bound to each
//! destination that a test uses. The app listens at its port plus 10,000, because the listener has the true one.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering},
    },
};

use arc_swap::ArcSwap;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls::{RootCertStore, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use super::{snapshot, workload};
use crate::{
    capture::{CaptureError, ProbeToken, TcpHealth},
    cluster::{Service, Snapshot, View, Workload},
    identity::{IdentityError, Peer, SpiffeId, TrustDomain},
    life::budget::{Budget, Machine},
    policy::Rulebook,
    tunnel::{
        Connection, Direction, End, Flow, Lane, Observer, Program, Registry, Wire,
        edge::Edge,
        listen,
        pod::{Pod, Shared},
    },
};

pub const PORT: u16 = 8_080;
/// Delivery to this port panics.
pub const PANICS: u16 = 6_666;
/// Delivery to this port never comes to an end.
pub const HANGS: u16 = 6_667;
const APP: u16 = 10_000;

/// Two middle octets of loopback addresses that no other test uses, in this process or in one of its own beside it:
/// whoever holds the port of such an address has it.
fn subnet() -> ([u8; 2], std::net::UdpSocket) {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() % 0x4000).unwrap_or_default();
    loop {
        let [high, low] = (start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 0x4000).to_be_bytes();
        if let Ok(claim) = std::net::UdpSocket::bind((Ipv4Addr::new(127, 100 + high, low, 1), PORT)) {
            return ([high, low], claim);
        }
    }
}

#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

impl Authority {
    pub fn new() -> Arc<Self> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().der().clone();
        Arc::new(Self { issuer: Issuer::new(params, key), root })
    }

    /// PEM.
    pub fn root(&self) -> String {
        pem::encode(&pem::Pem::new("CERTIFICATE", self.root.to_vec()))
    }

    /// A revocation list, PEM, with this serial number (hex) if there is one.
    pub fn crl(&self, revoked: Option<&str>) -> String {
        let now = time::OffsetDateTime::now_utc();
        let entry = |serial: &str| {
            let digits: Vec<u8> =
                (0..serial.len() / 2).map(|at| u8::from_str_radix(&serial[2 * at..2 * at + 2], 16).unwrap()).collect();
            RevokedCertParams {
                serial_number: SerialNumber::from(digits),
                revocation_time: now,
                reason_code: None,
                invalidity_date: None,
            }
        };
        let params = CertificateRevocationListParams {
            this_update: now - time::Duration::hours(1),
            next_update: now + time::Duration::hours(1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.into_iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        Arc::new(roots)
    }

    fn leaf(&self, id: &SpiffeId, address: IpAddr) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap()), SanType::IpAddress(address)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())))
    }
}

/// Sockets and certificates without a kernel's help.
#[derive(Debug, Clone)]
pub struct Loopback {
    trust_domain: TrustDomain,
    client: Arc<rustls::ClientConfig>,
    server: Arc<rustls::ServerConfig>,
    /// Of its certificate, in hex.
    pub serial: Arc<str>,
    /// Client addresses that delivery was asked for.
    pub delivered_for: Arc<Mutex<Vec<(IpAddr, SocketAddr)>>>,
    /// What the kernel is said to have chosen of a Service.
    pub chosen: Arc<AtomicU16>,
    /// Whose connections, by source port, the kernel is said to vouch for, and how often it was asked.
    pub attested: Arc<Mutex<HashMap<u16, Arc<str>>>>,
    pub asked: Arc<AtomicU16>,
}

impl Loopback {
    pub fn new(authority: &Authority, trusted: &Authority, name: &str, address: IpAddr) -> Self {
        let trust_domain: TrustDomain = "cluster.local".parse().unwrap();
        let id = SpiffeId::new(&trust_domain, "default", name).unwrap();
        let (chain, key) = authority.leaf(&id, address);
        let serial = crate::identity::serial(&chain[0]).unwrap().into();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let versions = &[&rustls::version::TLS13];
        let mut client = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(trusted.roots())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .unwrap();
        client.alpn_protocols = vec![b"h2".to_vec()];
        let verifier = WebPkiClientVerifier::builder_with_provider(trusted.roots(), provider.clone()).build().unwrap();
        let mut server = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .unwrap();
        server.alpn_protocols = vec![b"h2".to_vec()];
        let (client, server) = (Arc::new(client), Arc::new(server));
        Self {
            trust_domain,
            client,
            server,
            serial,
            delivered_for: Arc::default(),
            chosen: Arc::default(),
            attested: Arc::default(),
            asked: Arc::default(),
        }
    }

    pub fn tls(&self) -> Arc<rustls::ClientConfig> {
        self.client.clone()
    }
}

async fn dial(source: IpAddr, destination: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((source, 0).into())?;
    socket.set_nodelay(true)?;
    socket.connect(destination).await
}

impl Edge for Loopback {
    type Occupied = ();

    fn is_probe(_: SocketAddr, peer: SocketAddr) -> bool {
        peer.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST)
    }

    async fn dial(&self, uid: &str, source: IpAddr, destination: SocketAddr) -> Result<TcpStream, CaptureError> {
        dial(source, destination).await.map_err(|_| CaptureError::NotAttached(uid.into()))
    }

    async fn deliver(&self, uid: &str, client: IpAddr, app: SocketAddr) -> Result<TcpStream, CaptureError> {
        assert_ne!(app.port(), PANICS, "what a defect would do");
        if app.port() == HANGS {
            return std::future::pending().await;
        }
        self.delivered_for.lock().unwrap().push((client, app));
        let app = SocketAddr::new(app.ip(), app.port() + APP);
        dial(client, app).await.map_err(|_| CaptureError::NotAttached(uid.into()))
    }

    fn occupy(&self, _: &str, _: SocketAddr, _: SocketAddr) {}

    fn chosen(&self, _: &TcpStream) -> u16 {
        self.chosen.load(Ordering::Relaxed)
    }

    fn attested(&self, _: &str, client: SocketAddr, _: SocketAddr) -> Option<Arc<str>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.attested.lock().unwrap().get(&client.port()).cloned()
    }

    fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    async fn client(&self, _: &SpiffeId, _: &SpiffeId) -> Result<Arc<rustls::ClientConfig>, IdentityError> {
        Ok(self.client.clone())
    }

    async fn server(&self, _: &SpiffeId) -> Result<Arc<rustls::ServerConfig>, IdentityError> {
        Ok(self.server.clone())
    }

    fn peer(certificate: &CertificateDer<'_>) -> Result<Peer, IdentityError> {
        crate::identity::peer(certificate)
    }

    fn serial(&self, _: &SpiffeId) -> Arc<str> {
        self.serial.clone()
    }

    async fn programs(&self, uid: &str) -> Vec<Program> {
        vec![Program { name: format!("of {uid}"), program: 1, link: 2 }]
    }

    fn handshake_reason(error: &std::io::Error) -> &'static str {
        if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) { "other" } else { "io" }
    }
}

/// What was told.
#[derive(Debug, Clone)]
pub struct Told {
    pub flow: Flow,
    pub bytes: (u64, u64),
    pub end: End,
    pub opened: bool,
}

/// A tunnel's TCP connection at its end: bytes sent and received, and TCP's last word.
pub type Ended = ((u64, u64), Option<TcpHealth>);

#[derive(Debug, Default)]
pub struct Record {
    pub told: Mutex<Vec<Told>>,
    pub opened: Mutex<u64>,
    pub handshakes: Mutex<Vec<(Direction, Result<(), &'static str>)>>,
    pub wires: Mutex<Vec<Ended>>,
}

impl Observer for Record {
    fn opened(&self, _: &Connection) {
        *self.opened.lock().unwrap() += 1;
    }

    fn closed(&self, connection: &Connection, end: &End) {
        let (flow, bytes) = (connection.flow.clone(), connection.bytes());
        self.told.lock().unwrap().push(Told { flow, bytes, end: end.clone(), opened: true });
    }

    fn failed(&self, flow: &Flow, end: &End) {
        self.told.lock().unwrap().push(Told { flow: flow.clone(), bytes: (0, 0), end: end.clone(), opened: false });
    }

    fn handshake(&self, direction: Direction, result: Result<(), &'static str>) {
        self.handshakes.lock().unwrap().push((direction, result));
    }

    fn wire_closed(&self, wire: &Wire, health: Option<TcpHealth>) {
        self.wires.lock().unwrap().push((wire.bytes(), health));
    }
}

/// One pod and what is known of it.
pub struct Served {
    pub address: IpAddr,
    pub record: Arc<Workload>,
    pub pod: Arc<Pod<Loopback>>,
    pub observer: Arc<Record>,
    pub registry: Registry,
    pub stop: CancellationToken,
}

impl Served {
    /// Serves what comes to `address`, as the pod's listener would.
    pub fn serve(&self, address: SocketAddr) {
        let listener = std::net::TcpListener::bind(address).unwrap();
        tokio::spawn(listen::serve(self.pod.clone(), listener));
    }

    /// Waits until `count` ends were told.
    pub async fn told(&self, count: usize) -> Vec<Told> {
        for _ in 0..500 {
            let told = self.observer.told.lock().unwrap().clone();
            if told.len() >= count {
                return told;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("only {:?} were told", self.observer.told.lock().unwrap());
    }
}

const MACHINE: Machine = Machine { descriptors: 20_000, memory: 1 << 34 };

/// Source and destination by uid, and the destination's port.
type Miss = (Arc<str>, Arc<str>, u16);

/// Who connected to whom without a verdict.
#[derive(Debug, Default)]
pub struct Missed(pub Mutex<Vec<Miss>>);

impl Lane for Missed {
    fn missed(&self, source: &Arc<str>, destination: &Arc<str>, port: u16) {
        self.0.lock().unwrap().push((source.clone(), destination.clone(), port));
    }
}

/// Client pod `a`, server pod `b`.
pub struct World {
    /// What the lane was told.
    pub lane: Arc<Missed>,
    pub a: Served,
    pub b: Served,
    pub vip: SocketAddr,
    pub rules: Arc<ArcSwap<Rulebook>>,
    pub snapshots: watch::Sender<Arc<Snapshot>>,
    /// Held while the addresses are in use.
    _claim: std::net::UdpSocket,
}

impl World {
    pub fn new() -> Self {
        let authority = Authority::new();
        Self::trusting(&authority, &authority)
    }

    /// On nodes of this size.
    pub fn on(machine: Machine) -> Self {
        let authority = Authority::new();
        Self::of(&authority, &authority, machine, false)
    }

    /// Both pods served by one agent, whose records are then the same.
    pub fn together() -> Self {
        let authority = Authority::new();
        Self::of(&authority, &authority, MACHINE, true)
    }

    /// `b` has its certificate from, and trusts, `other`.
    pub fn trusting(authority: &Arc<Authority>, other: &Authority) -> Self {
        Self::of(authority, other, MACHINE, false)
    }

    fn of(authority: &Arc<Authority>, other: &Authority, machine: Machine, together: bool) -> Self {
        let ([high, low], claim) = subnet();
        let at = |host: u8| IpAddr::V4(Ipv4Addr::new(127, 100 + high, low, host));
        let (a, b, vip) = (at(1), at(2), at(100));
        let records = [workload("a", &[&a.to_string()], true), workload("b", &[&b.to_string()], true)];
        let service = Service {
            cluster_addresses: vec![vip],
            ports: vec![crate::cluster::ServicePort { name: "".into(), port: PORT }],
            endpoints: [(at(3), true), (b, true)]
                .map(|(address, ready)| crate::cluster::Endpoint {
                    address,
                    ports: [("".into(), PORT)].into(),
                    ready,
                    terminating: false,
                    node: "".into(),
                    zone: "".into(),
                })
                .to_vec(),
            ..Service::named("default", "web")
        };
        let snapshot = snapshot(&records, &[service]);
        let rules = Arc::new(ArcSwap::from_pointee(Rulebook::compile(&snapshot)));
        let (snapshots, receiver) = watch::channel(Arc::new(snapshot));
        let lane = Arc::new(Missed::default());
        let agent = || (Arc::new(Record::default()), Registry::default(), Budget::new(machine));
        let one = agent();
        let served = |record: &Arc<Workload>, edge: Loopback| {
            let (observer, registry, budget) = if together { one.clone() } else { agent() };
            let stop = CancellationToken::new();
            let shared = Shared {
                cluster: View::new(receiver.clone()),
                rules: rules.clone(),
                registry: registry.clone(),
                observer: observer.clone(),
                cluster_id: "Kubernetes".into(),
                budget,
                lane: lane.clone(),
                node: "node-1".into(),
            };
            let pod = Pod::new(edge, shared, record.clone(), ProbeToken([7; 16]), stop.clone());
            let address = record.addresses[0];
            Served { address, record: record.clone(), pod: Arc::new(pod), observer, registry, stop }
        };
        let world = Self {
            lane: lane.clone(),
            a: served(&records[0], Loopback::new(authority, authority, "a", a)),
            b: served(&records[1], Loopback::new(other, other, "b", b)),
            vip: (vip, PORT).into(),
            rules,
            snapshots,
            _claim: claim,
        };
        world.a.serve((b, PORT).into());
        world.a.serve(world.vip);
        world.b.serve((b, 15_008).into());
        world
    }

    /// The app of `b`.
    pub async fn app(&self) -> TcpListener {
        TcpListener::bind((self.b.address, PORT + APP)).await.unwrap()
    }

    /// A connection of `a`'s app to `b`'s.
    pub async fn client(&self) -> TcpStream {
        self.client_to((self.b.address, PORT).into()).await
    }

    pub async fn client_to(&self, destination: SocketAddr) -> TcpStream {
        dial(self.a.address, destination).await.unwrap()
    }
}
