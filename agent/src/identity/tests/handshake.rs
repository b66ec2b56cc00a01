use std::{io, sync::Arc, time::Duration};

use rcgen::ExtendedKeyUsagePurpose;
use rustls::{ClientConfig, HandshakeKind, ServerConfig, sign::SingleCertAndKey};
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::support::{Leaf, Mesh, TestRoot, handshake, id, self_signed, trust};
use crate::identity::{
    handshake_reason, tls,
    verify::{ExpectedServer, MeshClient},
};

const HOUR: Duration = Duration::from_secs(3_600);

fn stranger_client(mesh: &Mesh, own: Arc<SingleCertAndKey>) -> Arc<ClientConfig> {
    let verifier = ExpectedServer { expected: id("shop", "db"), trust: trust(&[&mesh.root]) };
    Arc::new(tls::client_config(Arc::new(verifier), own).unwrap())
}

fn stranger_server(mesh: &Mesh, own: Arc<SingleCertAndKey>) -> Arc<ServerConfig> {
    let verifier = MeshClient { trust: trust(&[&mesh.root]) };
    Arc::new(tls::server_config(Arc::new(verifier), own).unwrap())
}

#[tokio::test]
async fn both_sides_see_who_the_other_is() {
    let mesh = Mesh::start(HOUR).await;
    let (web, db) = (id("shop", "web"), id("shop", "db"));
    let (node1, node2) = (mesh.node(&[&web]), mesh.node(&[&db]));
    let outcome = handshake(node1.client(&web, &db).await.unwrap(), node2.server(&db).await.unwrap()).await;
    assert_eq!(outcome.client.unwrap(), db);
    assert_eq!(outcome.server.unwrap(), web);
}

#[tokio::test]
async fn a_client_that_is_not_of_the_mesh_is_refused_with_the_reason() {
    let mesh = Mesh::start(HOUR).await;
    let db = id("shop", "db");
    let server = mesh.node(&[&db]).server(&db).await.unwrap();
    let signed = |leaf: Leaf<'_>| mesh.root.leaf(&leaf);
    let uri = |uri| mesh.root.leaf(&Leaf { uris: &[uri], ..Leaf::default() });
    let both = [ExtendedKeyUsagePurpose::ServerAuth];
    for (what, own, reason) in [
        ("other trust domain", uri("spiffe://other.test/ns/shop/sa/web"), "trust_domain"),
        ("longer trust domain", uri("spiffe://mesh.test.evil/ns/shop/sa/web"), "trust_domain"),
        ("expired", signed(Leaf { valid: (-60, -2), ..Leaf::default() }), "expired"),
        ("not valid yet", signed(Leaf { valid: (60, 120), ..Leaf::default() }), "not_valid_yet"),
        ("self-signed", self_signed(&Leaf::default()), "unknown_issuer"),
        ("another root", TestRoot::new("other").leaf(&Leaf::default()), "unknown_issuer"),
        ("another root of the same name", TestRoot::new("test root").leaf(&Leaf::default()), "unknown_issuer"),
        ("server only", signed(Leaf { usages: &both, ..Leaf::default() }), "wrong_purpose"),
        (
            "two URI SANs",
            signed(Leaf {
                uris: &["spiffe://mesh.test/ns/shop/sa/web", "spiffe://mesh.test/ns/shop/sa/admin"],
                ..Leaf::default()
            }),
            "bad_spiffe_id",
        ),
        (
            "the same URI SAN twice",
            signed(Leaf {
                uris: &["spiffe://mesh.test/ns/shop/sa/web", "spiffe://mesh.test/ns/shop/sa/web"],
                ..Leaf::default()
            }),
            "bad_spiffe_id",
        ),
        ("DNS SAN only", signed(Leaf { uris: &[], dns: &["web.shop"], ..Leaf::default() }), "bad_spiffe_id"),
        ("no SAN", signed(Leaf { uris: &[], ..Leaf::default() }), "bad_spiffe_id"),
        ("no workload", uri("spiffe://mesh.test/ca"), "bad_spiffe_id"),
    ] {
        let outcome = handshake(stranger_client(&mesh, own), Arc::clone(&server)).await;
        let refused = outcome.server.expect_err(what);
        assert_eq!(handshake_reason(&refused), reason, "{what}: {refused}");
        let told = outcome.client.expect_err(what);
        assert!(handshake_reason(&told).starts_with("alert_"), "{what}: {told}");
    }
}

/// Names that could be taken for `spiffe://mesh.test/ns/shop/sa/NAME` by one who is not exact.
fn odd_names(name: &str) -> Vec<(&'static str, Vec<u8>)> {
    let text = |text: String| text.into_bytes();
    vec![
        ("NUL at the end", text(format!("spiffe://mesh.test/ns/shop/sa/{name}\0"))),
        ("NUL within", text(format!("spiffe://mesh.test/ns/shop/sa/{name}\0.evil"))),
        ("NUL in the trust domain", text(format!("spiffe://mesh.test\0.evil/ns/shop/sa/{name}"))),
        ("upper-case scheme", text(format!("SPIFFE://mesh.test/ns/shop/sa/{name}"))),
        ("upper-case trust domain", text(format!("spiffe://MESH.test/ns/shop/sa/{name}"))),
        ("userinfo", text(format!("spiffe://a@mesh.test/ns/shop/sa/{name}"))),
        ("port", text(format!("spiffe://mesh.test:443/ns/shop/sa/{name}"))),
        ("percent encoding", text(format!("spiffe://mesh.test/ns/shop/sa/%{:02x}{}", name.as_bytes()[0], &name[1..]))),
        ("encoded slash", text(format!("spiffe://mesh.test/ns/shop%2fsa/{name}"))),
        ("query", text(format!("spiffe://mesh.test/ns/shop/sa/{name}?a"))),
        ("dots", text(format!("spiffe://mesh.test/ns/bank/../shop/sa/{name}"))),
        ("unicode", text(format!("spiffe://mesh.test/ns/shop/sa/{name}\u{200b}"))),
        ("a letter of another script", text("spiffe://mesh.test/ns/sh\u{43e}p/sa/web".to_owned())),
        ("no workload", text("spiffe://mesh.test/ca".to_owned())),
    ]
}

fn raw<'a>(raw_uris: &'a [&'a [u8]]) -> Leaf<'a> {
    Leaf { raw_uris, ..Leaf::default() }
}

#[tokio::test]
async fn i3_a_name_that_is_not_exact_is_refused_by_either_side() {
    let mesh = Mesh::start(HOUR).await;
    let (web, db) = (id("shop", "web"), id("shop", "db"));
    let node = mesh.node(&[&web, &db]);
    let (client, server) = (node.client(&web, &db).await.unwrap(), node.server(&db).await.unwrap());
    let mut tried = 0;
    let mut try_both = async |what: &str, as_client: Leaf<'_>, as_server: Leaf<'_>| {
        for refused in [
            handshake(stranger_client(&mesh, mesh.root.leaf(&as_client)), Arc::clone(&server)).await.server,
            handshake(Arc::clone(&client), stranger_server(&mesh, mesh.root.leaf(&as_server))).await.client,
        ] {
            let refused = refused.expect_err(what);
            // A name that is no text can't even be read.
            let reason = if what.contains("UTF-8") { "bad_certificate" } else { "bad_spiffe_id" };
            assert_eq!(handshake_reason(&refused), reason, "{what}: {refused}");
            tried += 1;
        }
    };
    for ((what, as_client), (_, as_server)) in odd_names("web").into_iter().zip(odd_names("db")) {
        let (as_client, as_server) = ([as_client.as_slice()], [as_server.as_slice()]);
        try_both(what, raw(&as_client), raw(&as_server)).await;
    }
    let (web, db): (&[u8], &[u8]) = (b"spiffe://mesh.test/ns/shop/sa/web", b"spiffe://mesh.test/ns/shop/sa/db");
    let broken = b"spiffe://mesh.test/ns/shop/sa/\xff".as_slice();
    try_both("no UTF-8", raw(&[broken]), raw(&[broken])).await;
    try_both("no UTF-8 in a second name", raw(&[web, broken]), raw(&[db, broken])).await;
    try_both("no UTF-8 in a first name", raw(&[broken, web]), raw(&[broken, db])).await;
    let long = |name: &str| format!("spiffe://mesh.test/ns/shop/sa/{name}/{}", "x".repeat(2_048));
    let (long_web, long_db) = (long("web"), long("db"));
    try_both("2 KiB", Leaf { uris: &[&long_web], ..Leaf::default() }, Leaf { uris: &[&long_db], ..Leaf::default() })
        .await;
    let names = ["web", "db"].map(|name| format!("spiffe://mesh.test/ns/shop/sa/{name}"));
    let two: Vec<&str> = names.iter().map(String::as_str).collect();
    let turned: Vec<&str> = two.iter().rev().copied().collect();
    try_both("two URI names", Leaf { uris: &two, ..Leaf::default() }, Leaf { uris: &turned, ..Leaf::default() }).await;
    let dns = Leaf { dns: &["name.shop.svc"], uris: &[], ..Leaf::default() };
    try_both("a DNS name only", dns, Leaf { dns: &["name.shop.svc"], uris: &[], ..Leaf::default() }).await;
    assert_eq!(tried, 2 * (odd_names("web").len() + 6));
}

#[tokio::test]
async fn a_dns_name_beside_the_spiffe_id_changes_nothing() {
    let mesh = Mesh::start(HOUR).await;
    let db = id("shop", "db");
    let server = mesh.node(&[&db]).server(&db).await.unwrap();
    let own = mesh.root.leaf(&Leaf { dns: &["web.shop.svc"], ..Leaf::default() });
    let outcome = handshake(stranger_client(&mesh, own), server).await;
    assert_eq!(outcome.server.unwrap(), id("shop", "web"));
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let mesh = Mesh::start(HOUR).await;
    let db = id("shop", "db");
    let server = mesh.node(&[&db]).server(&db).await.unwrap();
    let mut client = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ExpectedServer { expected: db, trust: trust(&[&mesh.root]) }))
        .with_no_client_auth();
    client.alpn_protocols = vec![b"h2".to_vec()];
    let outcome = handshake(Arc::new(client), server).await;
    assert_eq!(handshake_reason(&outcome.server.unwrap_err()), "no_certificate_presented");
    assert_eq!(handshake_reason(&outcome.client.unwrap_err()), "alert_no_certificate");
}

#[tokio::test]
async fn a_server_that_is_not_the_workload_meant_is_refused_with_the_reason() {
    let mesh = Mesh::start(HOUR).await;
    let (web, db) = (id("shop", "web"), id("shop", "db"));
    let node = mesh.node(&[&web]);
    let client = node.client(&web, &db).await.unwrap();
    let right = Leaf { uris: &["spiffe://mesh.test/ns/shop/sa/db"], ..Leaf::default() };
    let outcome = handshake(Arc::clone(&client), stranger_server(&mesh, mesh.root.leaf(&right))).await;
    assert_eq!(outcome.client.unwrap(), db);
    let client_only = [ExtendedKeyUsagePurpose::ClientAuth];
    for (what, own, reason) in [
        ("another workload", mesh.root.leaf(&Leaf::default()), "wrong_identity"),
        (
            "another trust domain",
            mesh.root.leaf(&Leaf { uris: &["spiffe://other.test/ns/shop/sa/db"], ..Leaf::default() }),
            "wrong_identity",
        ),
        (
            "both",
            mesh.root.leaf(&Leaf {
                uris: &["spiffe://mesh.test/ns/shop/sa/db", "spiffe://mesh.test/ns/shop/sa/web"],
                ..Leaf::default()
            }),
            "bad_spiffe_id",
        ),
        ("expired", mesh.root.leaf(&Leaf { valid: (-60, -2), uris: right.uris, ..Leaf::default() }), "expired"),
        ("self-signed", self_signed(&right), "unknown_issuer"),
        ("another root", TestRoot::new("other").leaf(&right), "unknown_issuer"),
        (
            "client only",
            mesh.root.leaf(&Leaf { usages: &client_only, uris: right.uris, ..Leaf::default() }),
            "wrong_purpose",
        ),
    ] {
        let outcome = handshake(Arc::clone(&client), stranger_server(&mesh, own)).await;
        let refused = outcome.client.expect_err(what);
        assert_eq!(handshake_reason(&refused), reason, "{what}: {refused}");
    }
}

#[tokio::test]
async fn what_is_not_our_tls_is_told_apart() {
    let mesh = Mesh::start(HOUR).await;
    let db = id("shop", "db");
    let server = mesh.node(&[&db]).server(&db).await.unwrap();

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accept = async || TlsAcceptor::from(Arc::clone(&server)).accept(listener.accept().await.unwrap().0).await;
    let plain = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: db\r\n\r\n").await.unwrap();
        stream.read_to_end(&mut Vec::new()).await
    };
    let (refused, _) = tokio::join!(accept(), plain);
    assert_eq!(handshake_reason(&refused.unwrap_err()), "not_tls");

    let mut http1 = ClientConfig::clone(&stranger_client(&mesh, mesh.root.leaf(&Leaf::default())));
    http1.alpn_protocols = vec![b"http/1.1".to_vec()];
    let connect = async {
        let stream = TcpStream::connect(address).await.unwrap();
        TlsConnector::from(Arc::new(http1)).connect(ServerName::from(address.ip()), stream).await
    };
    let (refused, told) = tokio::join!(accept(), connect);
    assert_eq!(handshake_reason(&refused.unwrap_err()), "no_h2");
    assert_eq!(handshake_reason(&told.unwrap_err()), "alert_no_h2");

    assert_eq!(handshake_reason(&io::ErrorKind::TimedOut.into()), "timeout");
    assert_eq!(handshake_reason(&io::ErrorKind::ConnectionReset.into()), "io");
}

#[tokio::test]
async fn no_handshake_is_ever_resumed_and_no_name_is_sent() {
    let mesh = Mesh::start(HOUR).await;
    let (web, db) = (id("shop", "web"), id("shop", "db"));
    let node = mesh.node(&[&web, &db]);
    let (client, server) = (node.client(&web, &db).await.unwrap(), node.server(&db).await.unwrap());
    for _ in 0..2 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connect = async {
            let stream = TcpStream::connect(address).await.unwrap();
            // A name, where callers give an address: even that one does not show.
            let name = ServerName::try_from("db.shop.svc").unwrap();
            let mut stream = TlsConnector::from(Arc::clone(&client)).connect(name, stream).await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
            stream.get_ref().1.handshake_kind()
        };
        let accept = async {
            let accepted = listener.accept().await.unwrap().0;
            let mut stream = TlsAcceptor::from(Arc::clone(&server)).accept(accepted).await.unwrap();
            assert_eq!(stream.get_ref().1.server_name(), None);
            assert_eq!(stream.get_ref().1.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
            stream.write_all(b"x").await.unwrap();
        };
        let (kind, ()) = tokio::join!(connect, accept);
        assert_eq!(kind, Some(HandshakeKind::Full));
    }
}
