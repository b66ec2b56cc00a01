//! What a proof comes to: a pure function from what was seen to a verdict, in words for people and fields for programs.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::{
    capture::PodState,
    cluster::Workload,
    tunnel::{Program, Seen, Witness},
};

/// What was seen.
#[derive(Debug)]
pub struct Facts {
    from: String,
    to: String,
    address: SocketAddr,
    /// The destination is one that the pod's programs hand to the agent.
    mesh: bool,
    pub enrolled: bool,
    pub capture: Option<PodState>,
    pub programs: Vec<Program>,
    /// How connecting went for the process in the pod.
    pub connected: Option<Result<(), String>>,
    /// The connection came to the agent.
    pub arrived: bool,
    pub seen: Option<Seen>,
    bytes: Bytes,
    /// Why nothing more is known.
    pub trouble: Option<String>,
}

impl Facts {
    pub fn new(from: &Workload, to: &str, address: SocketAddr, mesh: bool) -> Self {
        Self {
            from: format!("{}/{}", from.namespace, from.name),
            to: to.to_owned(),
            address,
            mesh,
            enrolled: from.enrolled,
            capture: None,
            programs: Vec::new(),
            connected: None,
            arrived: false,
            seen: None,
            bytes: Bytes::default(),
            trouble: None,
        }
    }

    /// Counts as they are now: the connection goes away.
    pub fn note_bytes(&mut self) {
        let Some(seen) = &self.seen else { return };
        if let Some(connection) = &seen.connection {
            (self.bytes.to_app, self.bytes.to_client) = connection.bytes();
        }
        if let Some(session) = seen.answer.session.as_deref().or(seen.flow.session.as_deref()) {
            (self.bytes.tunnel_sent, self.bytes.tunnel_received) = session.wire.bytes();
        }
    }
}

/// What it comes to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Authenticated and encrypted, allowed by policy, accepted by the app.
    Proven,
    /// Authenticated and encrypted, and refused by policy.
    Denied,
    /// Authenticated, encrypted and allowed; the app did not accept it.
    AppRefused,
    /// The peer could not prove that it is who it should be, or would not believe us.
    NotAuthenticated,
    /// It would go, or went, without TLS, as it should by the manifests.
    Plain,
    /// It is not captured though it should be.
    Uncaptured,
    /// The two sides saw different things.
    Disagreement,
    /// It could not be found out.
    #[default]
    Unknown,
}

impl Verdict {
    /// The status that `heddle proof` ends with.
    #[must_use]
    pub fn status(self) -> u8 {
        match self {
            Self::Proven => 0,
            Self::Unknown => 2,
            _ => 1,
        }
    }
}

/// The JSON of `heddle proof`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub verdict: Verdict,
    /// The verdict in words.
    pub summary: String,
    pub authenticated: bool,
    pub encrypted: bool,
    /// What policy said; `null` where nobody knows.
    pub allowed: Option<bool>,
    /// The policy that decided, `namespace/name`; empty where none did or nobody says.
    pub policy: String,
    pub delivered: bool,
    pub from: Source,
    /// As it was asked for: `namespace/name`, or `service/name.namespace`.
    pub to: String,
    /// What the app connected to.
    pub address: String,
    /// `null` where the connection did not come to the agent.
    pub near: Option<Near>,
    /// What the far agent says; `null` where it says nothing.
    pub far: Option<Witness>,
    pub bytes: Bytes,
}

/// The pod that the connection came from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// `namespace/name`.
    pub pod: String,
    /// `captured`, `attached`, `uncaptured`, or `outside` for a pod that is not in the mesh.
    pub state: String,
    /// Why it is not captured.
    pub detail: String,
    pub programs: Vec<Program>,
}

/// What the near agent saw.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Near {
    /// In a tunnel, or plainly.
    pub tunnel: bool,
    /// The app's own address.
    pub client: String,
    /// The pod that was chosen, and its address.
    pub pod: String,
    pub address: String,
    pub tls: String,
    pub cipher: String,
    /// SPIFFE ids and certificates' serial numbers (lower-case hex) as TLS proved them.
    pub client_identity: String,
    pub client_serial: String,
    pub server_identity: String,
    pub server_serial: String,
    /// The peer's answer to CONNECT; `null` where none came.
    pub status: Option<u16>,
    /// Why it failed: stable; empty when it did not.
    pub reason: String,
    pub detail: String,
}

/// Bytes carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// Of this connection, plain.
    pub to_app: u64,
    pub to_client: u64,
    /// On the wire of the tunnel that carried it, encrypted: of all that it has carried so far.
    pub tunnel_sent: u64,
    pub tunnel_received: u64,
}

/// Concludes.
#[must_use]
pub fn conclude(facts: Facts) -> Report {
    let near = facts.seen.as_ref().map(near);
    let far = facts.seen.as_ref().and_then(|seen| seen.answer.witness.clone());
    let (verdict, summary) = verdict(&facts, near.as_ref(), far.as_ref());
    let tunnelled = near.as_ref().is_some_and(|near| near.tunnel) && verdict != Verdict::Disagreement;
    let allowed = match (verdict, &far) {
        (_, Some(far)) if !far.decision.is_empty() => Some(far.decision == "allowed"),
        (Verdict::Proven, _) => Some(true),
        (Verdict::Denied, _) => Some(false),
        _ => None,
    };
    let state = match &facts.capture {
        _ if !facts.enrolled => "outside",
        Some(PodState::Captured) => "captured",
        Some(PodState::Attached) => "attached",
        Some(PodState::Uncaptured { .. }) | None => "uncaptured",
    };
    let detail = match &facts.capture {
        Some(PodState::Uncaptured { reason, detail }) => format!("{reason}: {detail}"),
        _ => String::new(),
    };
    Report {
        verdict,
        summary,
        authenticated: tunnelled,
        encrypted: tunnelled,
        allowed,
        policy: far.as_ref().map(|far| far.policy.clone()).unwrap_or_default(),
        delivered: verdict == Verdict::Proven,
        from: Source { pod: facts.from, state: state.to_owned(), detail, programs: facts.programs },
        to: facts.to,
        address: facts.address.to_string(),
        near,
        far,
        bytes: facts.bytes,
    }
}

/// The first of these that holds.
fn verdict(facts: &Facts, near: Option<&Near>, far: Option<&Witness>) -> (Verdict, String) {
    let Facts { from, to, .. } = facts;
    if !facts.enrolled {
        return (Verdict::Plain, format!("{from} is not in the mesh: its connections are its own, without TLS"));
    }
    if let (None, Some(PodState::Uncaptured { reason, detail })) = (near, &facts.capture) {
        return (Verdict::Uncaptured, format!("{from} is in the mesh and not captured: {reason}: {detail}"));
    }
    let Some(near) = near else { return unseen(facts) };
    if let Some(trouble) = facts.trouble.as_ref().filter(|_| near.status.is_none() && near.reason.is_empty()) {
        return (Verdict::Unknown, format!("it could not be found out: {trouble}"));
    }
    if let Some(difference) = far.and_then(|far| difference(near, far)) {
        return (Verdict::Disagreement, format!("the two sides do not agree: {difference}"));
    }
    let Near { status, reason, detail, .. } = near;
    match (near.tunnel, status) {
        (false, None) if reason.is_empty() => {
            let pod = if near.pod.is_empty() { to } else { &near.pod };
            if pod == from {
                return (
                    Verdict::Plain,
                    format!("{from} connects to itself: that never leaves it, and is not encrypted"),
                );
            }
            (Verdict::Plain, format!("{pod} is not in the mesh: the connection is carried to it without TLS"))
        }
        (true, Some(200)) => (Verdict::Proven, "authenticated, encrypted and allowed".to_owned()),
        (true, Some(401)) => {
            let by = far.map(|far| far.detail.as_str()).filter(|detail| !detail.is_empty());
            let by = by.unwrap_or("the far side does not say by which policy");
            (Verdict::Denied, format!("authenticated and encrypted, but refused by policy: {by}"))
        }
        (true, Some(503)) => match far.filter(|far| far.decision == "allowed") {
            Some(far) => {
                let text = format!("authenticated, encrypted and allowed, but not accepted by the app: {}", far.detail);
                (Verdict::AppRefused, text)
            }
            None => {
                let why = far.map_or("and does not say whether policy or the app refused it", |far| &far.detail);
                (Verdict::Unknown, format!("authenticated and encrypted; the peer answers 503: {why}"))
            }
        },
        (true, Some(status)) => {
            (Verdict::Unknown, format!("authenticated and encrypted; the peer answers {status}: {detail}"))
        }
        _ if NOT_AUTHENTICATED.contains(&near_kind(facts)) => {
            (Verdict::NotAuthenticated, format!("not authenticated, so nothing was sent: {reason}: {detail}"))
        }
        _ => (Verdict::Unknown, format!("it could not be found out: {reason}: {detail}")),
    }
}

const NOT_AUTHENTICATED: [&str; 2] = ["TLS_FAILURE", "IDENTITY_ERROR"];

/// What kind of failure it was, as `response_flags` has it.
fn near_kind(facts: &Facts) -> &'static str {
    facts.seen.as_ref().and_then(|seen| seen.failure.as_ref()).map(|failure| failure.flags).unwrap_or_default()
}

/// The connection did not come to the agent, or not to an end.
fn unseen(facts: &Facts) -> (Verdict, String) {
    let Facts { from, to, address, mesh, .. } = facts;
    match (&facts.connected, facts.trouble.as_ref()) {
        (_, Some(trouble)) => (Verdict::Unknown, format!("it could not be found out: {trouble}")),
        _ if facts.programs.is_empty() => (Verdict::Uncaptured, format!("{from} is in the mesh and has no programs")),
        _ if facts.arrived => {
            (Verdict::Unknown, "it could not be found out: the agent dropped the connection".to_owned())
        }
        (Some(Ok(())), None) if *mesh => {
            (Verdict::Uncaptured, format!("the connection to {address} went past the agent: {from} is not captured"))
        }
        (Some(Ok(())), None) => {
            (Verdict::Plain, format!("{to} is not in the mesh: the connection went to it past the agent, without TLS"))
        }
        (Some(Err(error)), None) if *mesh => {
            (Verdict::Unknown, format!("it could not be found out: the kernel refused the connection: {error}"))
        }
        (Some(Err(error)), None) => {
            (Verdict::Plain, format!("{to} is not in the mesh: connections to it go without TLS ({error})"))
        }
        (None, None) => (Verdict::Unknown, "it could not be found out: nothing was tried".to_owned()),
    }
}

/// What the two sides saw differently of the session that they share.
fn difference(near: &Near, far: &Witness) -> Option<String> {
    [
        ("client's identity", &near.client_identity, &far.client_identity),
        ("server's identity", &near.server_identity, &far.server_identity),
        ("client's certificate", &near.client_serial, &far.client_serial),
        ("server's certificate", &near.server_serial, &far.server_serial),
        ("TLS version", &near.tls, &far.tls),
        ("cipher", &near.cipher, &far.cipher),
    ]
    .into_iter()
    .find(|(_, near, far)| near != far)
    .map(|(what, near, far)| format!("the {what} is {near:?} here and {far:?} there"))
}

/// What the near side noted of a connection that came to it.
fn near(seen: &Seen) -> Near {
    let flow = &seen.flow;
    let session = seen.answer.session.as_deref().or(flow.session.as_deref());
    let identity = |id: &Option<crate::identity::SpiffeId>| id.as_ref().map(ToString::to_string).unwrap_or_default();
    let proven = |text: String| if session.is_some() { text } else { String::new() };
    let failure = seen.failure.as_ref();
    Near {
        tunnel: session.is_some(),
        client: flow.source.to_string(),
        pod: flow
            .destination_workload
            .as_ref()
            .map(|pod| format!("{}/{}", pod.namespace, pod.name))
            .unwrap_or_default(),
        address: flow.hbone_target.map(|target| target.to_string()).unwrap_or_default(),
        tls: session.map(|session| session.version.to_owned()).unwrap_or_default(),
        cipher: session.map(|session| session.cipher.to_owned()).unwrap_or_default(),
        client_identity: proven(identity(&flow.source_principal)),
        client_serial: session.map(|session| session.own_serial.to_string()).unwrap_or_default(),
        server_identity: proven(identity(&flow.destination_principal)),
        server_serial: session.map(|session| session.peer_serial.to_string()).unwrap_or_default(),
        status: seen.answer.status,
        reason: failure.map(|failure| failure.reason.to_owned()).unwrap_or_default(),
        detail: failure.map(|failure| failure.detail.clone()).unwrap_or_default(),
    }
}
