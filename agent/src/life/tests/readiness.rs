use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

use crate::life::{
    http, limits,
    readiness::{Readiness, router},
};

async fn serve(readiness: &Readiness) -> (SocketAddr, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
    tokio::spawn(http::serve(listener, router(readiness.clone()), |_| true, stop.clone()));
    (address, stop)
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn ready_only_when_nothing_is_waited_for_and_says_what_it_is() {
    let readiness = Readiness::default();
    let (address, _stop) = serve(&readiness).await;
    let (maps, pods) = (readiness.block("the maps"), readiness.block("the pods"));
    let answer = get(address, "/healthz/ready").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.ends_with("waiting for the maps\nwaiting for the pods\n"), "{answer}");
    drop(maps);
    assert!(get(address, "/healthz/ready").await.ends_with("\r\n\r\nwaiting for the pods\n"));
    drop(pods);
    assert!(get(address, "/healthz/ready").await.starts_with("HTTP/1.1 200 "));
    let _draining = readiness.block("the end");
    assert!(get(address, "/healthz/ready").await.starts_with("HTTP/1.1 503 "));
    assert!(get(address, "/").await.starts_with("HTTP/1.1 404 "));
}

#[test]
fn a_blocker_of_a_task_that_panicked_is_gone_and_others_stay() {
    let readiness = Readiness::default();
    let _stays = readiness.block("one");
    let blocker = readiness.block("one");
    let panicked = std::thread::spawn(move || {
        let _blocker = blocker;
        std::panic::resume_unwind(Box::new("on purpose"));
    });
    assert!(panicked.join().is_err());
    assert_eq!(readiness.waiting_for(), ["one"]);
}

#[tokio::test]
async fn clients_that_say_nothing_hold_their_places_for_a_moment_only() {
    let readiness = Readiness::default();
    let (address, _stop) = serve(&readiness).await;
    let mut silent = Vec::new();
    for _ in 0..limits::ADMIN_REQUESTS / 2 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let answer = tokio::time::timeout(limits::ADMIN_CONNECTION, get(address, "/healthz/ready")).await;
    assert!(answer.unwrap().starts_with("HTTP/1.1 200 "));
}
