//! UDP, which the mesh leaves alone: an echo server, and a client that sends connected or not.

use std::{
    net::{Ipv6Addr, SocketAddr},
    time::Duration,
};

use heddle_lab::reports::{Datagrams, Event};
use tokio::{net::UdpSocket, time::timeout};

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(5);

/// Answers every datagram with itself, until killed.
pub async fn echo(port: u16) -> anyhow::Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).await?;
    crate::tell(&Event::Ready)?;
    let mut buffer = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).await?;
        socket.send_to(&buffer[..length], from).await?;
    }
}

/// Sends `count` datagrams from one socket and counts the answers.
pub async fn send(to: SocketAddr, count: u64, connected: bool) -> Datagrams {
    let mut report = Datagrams::default();
    if let Err(error) = talk(to, count, connected, &mut report).await {
        report.error = Some(error.to_string());
    }
    report
}

async fn talk(to: SocketAddr, count: u64, connected: bool, report: &mut Datagrams) -> std::io::Result<()> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).await?;
    if connected {
        socket.connect(to).await?;
    }
    for number in 0..count {
        let said = number.to_be_bytes();
        if connected {
            socket.send(&said).await?;
        } else {
            socket.send_to(&said, to).await?;
        }
        report.sent += 1;
        let mut heard = [0; 16];
        if let Ok(length) = timeout(ANSWER, socket.recv(&mut heard)).await?
            && heard[..length] == said
        {
            report.echoed += 1;
        }
    }
    Ok(())
}
