//! What a proof comes to: a pure function from what was seen to a verdict, in words for people and fields for programs.

use std::{net::SocketAddr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    capture::PodState,
    cluster::Workload,
    policy::Denial,
    tunnel::{Program, Security, Seen, Witness},
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
    /// What the kernel did with it, where it did not come to the agent.
    pub lane: Option<Lane>,
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
            lane: None,
            bytes: Bytes::default(),
            trouble: None,
        }
    }

    /// Counts as the process in the pod has them: of the kernel's nobody else's are known yet, and the agent's come a moment after
    /// the bytes.
    pub fn note_heard(&mut self, to_app: usize, to_client: usize) {
        self.at_least(to_app as u64, to_client as u64);
    }

    fn at_least(&mut self, to_app: u64, to_client: u64) {
        self.bytes.to_app = self.bytes.to_app.max(to_app);
        self.bytes.to_client = self.bytes.to_client.max(to_client);
    }

    /// Counts as they are now: the connection goes away.
    pub fn note_bytes(&mut self) {
        let Some(seen) = &self.seen else { return };
        let carried = seen.connection.as_ref().map(|connection| connection.bytes());
        if let Some(session) = seen.answer.session.as_deref().or(seen.flow.session.as_deref()) {
            (self.bytes.tunnel_sent, self.bytes.tunnel_received) = session.wire.bytes();
        }
        if let Some((to_app, to_client)) = carried {
            self.at_least(to_app, to_client);
        }
    }
}

/// What the kernel did with a connection between two pods of this node, and what policy says of it.
#[derive(Debug)]
pub struct Lane {
    pub kernel: Kernel,
    pub client: SocketAddr,
    pub app: SocketAddr,
    pub client_identity: String,
    pub server_identity: String,
    /// `namespace/name` of the destination pod.
    pub pod: String,
    /// What captures the destination pod.
    pub programs: Vec<Program>,
    /// The deciding policy's name, or why not; by the rules in force.
    pub decision: Result<Option<Arc<str>>, Denial>,
}

/// What was seen of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// It carries the connection, and both ends have it.
    Carries,
    /// It let it out, and the destination has not taken it.
    LetOut,
    /// It refused it: its own count of that pair's denials rose.
    Refused,
    /// It would carry it, and connecting failed.
    WouldCarry,
}

/// What it comes to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Authenticated; encrypted, or never leaving this node; allowed by policy, accepted by the app.
    Proven,
    /// Authenticated, and refused by policy.
    Denied,
    /// Allowed; the app did not accept it.
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
    /// What protects it: `mutual_tls`, `kernel_attested` (both pods are on this node; nothing is encrypted, and nothing leaves it) or
    /// `none`; empty where nobody knows.
    pub security: String,
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
    /// `null` where the kernel did not carry it, nor refuse it, by itself.
    pub lane: Option<OnLane>,
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
    /// In a tunnel, or not.
    pub tunnel: bool,
    /// What protects it: `mutual_tls`, `kernel_attested` (both pods are on this node) or `none`.
    pub security: String,
    /// The app's own address.
    pub client: String,
    /// The pod that was chosen, and its address.
    pub pod: String,
    pub address: String,
    pub tls: String,
    pub cipher: String,
    /// SPIFFE ids as TLS or the kernel proved them, and certificates' serial numbers (lower-case hex).
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

/// What the kernel did by itself, from pod to pod of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnLane {
    /// `carries`, `let_out` (it has not come to the app), `refused` or `would_carry` (connecting failed).
    pub kernel: String,
    /// The app's own address.
    pub client: String,
    /// The pod that was meant, and its address.
    pub pod: String,
    pub address: String,
    /// SPIFFE ids of the two pods that the kernel attests.
    pub client_identity: String,
    pub server_identity: String,
    /// What captures the destination pod. What captures the source pod is in `from`.
    pub programs: Vec<Program>,
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
    let security = security(&facts, near.as_ref(), verdict);
    let allowed = match (verdict, &far, &facts.lane) {
        (_, Some(far), _) if !far.decision.is_empty() => Some(far.decision == "allowed"),
        (Verdict::Disagreement, ..) => None,
        (_, _, Some(lane)) => Some(lane.decision.is_ok()),
        (Verdict::Proven, ..) => Some(true),
        (Verdict::Denied, ..) => Some(false),
        _ => None,
    };
    let of_lane = facts.lane.as_ref().and_then(|lane| match &lane.decision {
        Ok(policy) => policy.as_ref(),
        Err(denial) => denial.policy(),
    });
    let policy = far.as_ref().map(|far| far.policy.clone()).or_else(|| of_lane.map(ToString::to_string));
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
        security: security.to_owned(),
        authenticated: tunnelled || security == KERNEL_ATTESTED,
        encrypted: tunnelled,
        allowed,
        policy: policy.unwrap_or_default(),
        delivered: verdict == Verdict::Proven,
        from: Source { pod: facts.from, state: state.to_owned(), detail, programs: facts.programs },
        to: facts.to,
        address: facts.address.to_string(),
        near,
        lane: facts.lane.map(OnLane::from),
        far,
        bytes: facts.bytes,
    }
}

/// As `security` of a report says it.
const MUTUAL_TLS: &str = "mutual_tls";
const KERNEL_ATTESTED: &str = "kernel_attested";
const NONE: &str = "none";

/// What is known to protect the connection.
fn security(facts: &Facts, near: Option<&Near>, verdict: Verdict) -> &'static str {
    let attested = facts.lane.as_ref().is_some_and(|lane| matches!(lane.kernel, Kernel::Carries | Kernel::Refused))
        || near.is_some_and(|near| near.security == KERNEL_ATTESTED);
    match verdict {
        Verdict::Disagreement => "",
        Verdict::Plain => NONE,
        _ if attested => KERNEL_ATTESTED,
        _ if near.is_some_and(|near| near.tunnel) => MUTUAL_TLS,
        _ => "",
    }
}

impl From<Lane> for OnLane {
    fn from(lane: Lane) -> Self {
        let kernel = match lane.kernel {
            Kernel::Carries => "carries",
            Kernel::LetOut => "let_out",
            Kernel::Refused => "refused",
            Kernel::WouldCarry => "would_carry",
        };
        Self {
            kernel: kernel.to_owned(),
            client: lane.client.to_string(),
            pod: lane.pod,
            address: lane.app.to_string(),
            client_identity: lane.client_identity,
            server_identity: lane.server_identity,
            programs: lane.programs,
        }
    }
}

/// What comes of a connection that the kernel carried, or refused, by itself.
fn on_lane(facts: &Facts, lane: &Lane) -> (Verdict, String) {
    let Lane { kernel, pod, decision, .. } = lane;
    let error = match &facts.connected {
        Some(Err(error)) => error.as_str(),
        _ => "",
    };
    match (kernel, decision) {
        (Kernel::Carries, Ok(_)) => (
            Verdict::Proven,
            format!(
                "authenticated by the kernel and allowed; {pod} is on this node, so nothing leaves it, and nothing is encrypted"
            ),
        ),
        (Kernel::Carries, Err(denial)) => {
            (Verdict::Disagreement, format!("the kernel carries to {pod} what policy refuses: {denial}"))
        }
        (Kernel::Refused, Err(denial)) => {
            (Verdict::Denied, format!("authenticated by the kernel, but refused by policy: {denial}"))
        }
        (Kernel::Refused, Ok(_)) => (Verdict::Disagreement, format!("the kernel refuses to {pod} what policy allows")),
        (Kernel::LetOut, _) => {
            let text = format!("it could not be found out: the kernel let it out, and {pod} has not taken it");
            (Verdict::Unknown, text)
        }
        (Kernel::WouldCarry, Ok(_)) => (
            Verdict::AppRefused,
            format!("allowed, and carried by the kernel, but not accepted by the app of {pod}: {error}"),
        ),
        (Kernel::WouldCarry, Err(denial)) => {
            (Verdict::Disagreement, format!("the kernel would carry to {pod} what policy refuses: {denial}"))
        }
    }
}

/// What comes of a connection to another pod of this node that the agent carried, or refused, in one crossing.
fn in_one_crossing(near: &Near, far: Option<&Witness>) -> (Verdict, String) {
    let Near { pod, reason, detail, .. } = near;
    match far.map(|far| (&*far.decision, far.delivered, far.detail.as_str())) {
        Some(("allowed", true, _)) => (
            Verdict::Proven,
            format!(
                "authenticated by the kernel and allowed; {pod} is on this node, so nothing leaves it, and nothing is encrypted"
            ),
        ),
        Some(("allowed", false, why)) => (
            Verdict::AppRefused,
            format!("authenticated by the kernel and allowed, but not accepted by the app: {why}"),
        ),
        Some(("denied", _, why)) => {
            (Verdict::Denied, format!("authenticated by the kernel, but refused by policy: {why}"))
        }
        _ => (Verdict::Unknown, format!("it could not be found out: {reason}: {detail}")),
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
    if let (None, Some(lane)) = (near, &facts.lane) {
        return on_lane(facts, lane);
    }
    let Some(near) = near else { return unseen(facts) };
    if let Some(trouble) =
        facts.trouble.as_ref().filter(|_| near.status.is_none() && near.reason.is_empty() && far.is_none())
    {
        return (Verdict::Unknown, format!("it could not be found out: {trouble}"));
    }
    if let Some(difference) = far.and_then(|far| difference(near, far)) {
        return (Verdict::Disagreement, format!("the two sides do not agree: {difference}"));
    }
    if near.security == KERNEL_ATTESTED {
        return in_one_crossing(near, far);
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
    let attested = flow.security == Security::KernelAttested;
    let proven = |text: String| if session.is_some() || attested { text } else { String::new() };
    let security = match flow.security {
        _ if session.is_some() => MUTUAL_TLS,
        Security::KernelAttested => KERNEL_ATTESTED,
        Security::None => NONE,
        // Meant, and not come to.
        Security::MutualTls => "",
    };
    let failure = seen.failure.as_ref();
    Near {
        tunnel: session.is_some(),
        security: security.to_owned(),
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
