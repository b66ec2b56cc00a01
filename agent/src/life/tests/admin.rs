use std::{
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use tokio_util::sync::CancellationToken;

use crate::{
    life::admin::{
        AdminError, Answers, CertificateLine, ConnectionLine, OlderLine, PodLine, Socket, Status, Trust,
        TrustProblemLine, may_ask,
    },
    life::proof::{self, ProofError},
    policy::{Explained, QuestionError},
};

fn answers() -> Answers {
    Answers {
        status: Box::new(|| Status {
            node: "node-1".to_owned(),
            pods: vec![PodLine { name: "a".to_owned(), state: "captured".to_owned(), ..PodLine::default() }],
            ..Status::default()
        }),
        connections: Box::new(|| vec![ConnectionLine { id: 7, ..ConnectionLine::default() }]),
        certificates: Box::new(|| vec![CertificateLine { serial: "0a".to_owned(), ..CertificateLine::default() }]),
        trust: Box::new(|| Trust {
            problems: vec![TrustProblemLine { what: "trust bundle".to_owned(), ..TrustProblemLine::default() }],
            ..Trust::default()
        }),
        explain: Box::new(|question| match &*question.to {
            "" => Err(QuestionError::To(String::new())),
            to => Ok(Explained { to: to.to_owned(), ..Explained::default() }),
        }),
        prove: Box::new(|request| {
            Box::pin(async move {
                match &*request.to {
                    "" => Err(ProofError::Destination(request.to)),
                    _ => Ok(proof::Report { to: request.to, ..proof::Report::default() }),
                }
            })
        }),
        older: Box::new(|| vec![OlderLine { pod: "shop/a".to_owned(), ..OlderLine::default() }]),
    }
}

async fn ask(path: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(path).await.unwrap();
    stream.write_all(format!("{request} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

fn json<T: serde::de::DeserializeOwned>(answer: &str) -> T {
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

#[tokio::test]
async fn the_socket_answers_questions_to_its_owner_only_and_goes_with_the_agent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run/admin.sock");
    let stop = CancellationToken::new();
    let socket = Socket::bind(&path).await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
    let serving = tokio::spawn(socket.serve(answers(), stop.clone()));
    let status: Status = json(&ask(&path, "GET /status").await);
    assert_eq!(status, (answers().status)());
    assert_eq!(json::<Vec<ConnectionLine>>(&ask(&path, "GET /connections").await)[0].id, 7);
    assert_eq!(json::<Vec<CertificateLine>>(&ask(&path, "GET /certificates").await)[0].serial, "0a");
    assert_eq!(json::<Trust>(&ask(&path, "GET /trust").await), (answers().trust)());
    let explained: Explained = json(&ask(&path, "GET /policy/explain?from=none&to=shop/web:80").await);
    assert_eq!(explained.to, "shop/web:80");
    let refused = ask(&path, "GET /policy/explain?from=none&to=").await;
    assert!(refused.starts_with("HTTP/1.1 400 ") && refused.contains("is no destination"), "{refused}");
    let report: proof::Report = json(&ask(&path, "POST /proof?from=shop/a&to=shop/b:80").await);
    assert_eq!(report.to, "shop/b:80");
    assert!(ask(&path, "POST /proof?from=shop/a&to=").await.starts_with("HTTP/1.1 400 "));
    assert!(ask(&path, "GET /proof?from=shop/a&to=shop/b:80").await.starts_with("HTTP/1.1 405 "));
    let older: Vec<OlderLine> = json(&ask(&path, "GET /older").await);
    assert_eq!(older[0].pod, "shop/a");
    assert!(ask(&path, "POST /status").await.starts_with("HTTP/1.1 405 "), "read-only");
    assert!(ask(&path, "GET /elsewhere").await.starts_with("HTTP/1.1 404 "));
    assert!(matches!(Socket::bind(&path).await, Err(AdminError::Taken(_))), "a running agent keeps its socket");
    stop.cancel();
    serving.await.unwrap();
    assert!(!path.exists());
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_another_file_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let (stale, file) = (folder.path().join("stale.sock"), folder.path().join("file"));
    // What a killed agent leaves: a socket that nobody listens on.
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let before = std::fs::metadata(&stale).unwrap().ino();
    let socket = Socket::bind(&stale).await.unwrap();
    assert!(UnixStream::connect(&stale).await.is_ok());
    assert_ne!(std::fs::metadata(&stale).unwrap().ino(), before);
    drop(socket);
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(Socket::bind(&file).await, Err(AdminError::NotASocket(_))));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn only_root_and_the_agents_own_user_may_ask() {
    assert!(may_ask(0, 1_000) && may_ask(1_000, 1_000) && may_ask(0, 0));
    assert!(!may_ask(1_001, 1_000) && !may_ask(1_000, 0));
}
