//! Peers that misbehave, and honest ones beside them: what `lab-peer`'s hostile verbs are asked and what they report.

use std::{
    collections::BTreeMap,
    fmt::Display,
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{
    call::Call,
    certificates::{Leaf, Root},
    pod::Pod,
    reports::{Arrived, Churned, Event, Held},
};

/// A flood of HTTP/2 frames, all connections together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flooded {
    /// Connections whose handshake came to its end, and that sent hostile frames.
    pub connections: u64,
    /// Those of them that the other side ended.
    pub ended: u64,
    /// The longest that one of these lasted (milliseconds from the first hostile frame).
    pub longest_ms: u64,
    /// The longest that one lasted that nobody ended (milliseconds).
    pub unended_ms: u64,
    pub frames: u64,
    /// Bytes of frames, before TLS.
    pub sent: u64,
    pub received: u64,
    /// Streams that the other side reset, refused with a status, accepted with 200.
    pub resets: u64,
    pub refusals: u64,
    pub accepted: u64,
    pub goaways: u64,
    /// How connections ended.
    pub endings: BTreeMap<String, u64>,
    /// Connections that were not let in.
    pub refused: BTreeMap<String, u64>,
}

/// One request, exactly as written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    pub status: Option<u16>,
    /// Error code of RST_STREAM and of GOAWAY (RFC 9113 §7).
    pub reset: Option<u8>,
    pub goaway: Option<u8>,
    pub received: String,
    pub error: Option<String>,
}

/// Connections that say nothing are open.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dripped {
    pub open: u64,
}

/// What became of connections that said nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Silenced {
    pub closed: u64,
    /// Closed within a second: not let in.
    pub at_once: u64,
    /// Still open at the end.
    pub open: u64,
    /// When the others were closed, from their own connect (milliseconds).
    pub first_ms: u64,
    pub p50_ms: u64,
    pub last_ms: u64,
    pub endings: BTreeMap<String, u64>,
    /// Failed connects.
    pub refused: BTreeMap<String, u64>,
}

/// When connections ended (microseconds since the epoch).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fates {
    pub open: u64,
    pub endings: BTreeMap<String, u64>,
    pub first_us: u64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub last_us: u64,
}

impl Fates {
    /// Prints how long after `before`, a moment of [`now`], the connections ended, and gives the 99th percentile.
    pub fn tell(&self, what: &str, before: u64) -> Duration {
        let after = |at: u64| Duration::from_micros(at.saturating_sub(before));
        println!(
            "{what}: the first closed after {:?}, p50 {:?}, p99 {:?}, the last {:?}",
            after(self.first_us),
            after(self.p50_us),
            after(self.p99_us),
            after(self.last_us)
        );
        after(self.p99_us)
    }
}

/// Microseconds since the epoch, as [`Fates`] has them.
#[must_use]
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Connections that are full.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stuffed {
    pub connections: u64,
    /// Those that were reset while they were filled.
    pub reset: u64,
    pub bytes: u64,
}

/// What one end of each story met.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scripted {
    pub met: BTreeMap<u64, String>,
}

/// How many tries met what.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scanned {
    pub met: BTreeMap<String, u64>,
}

impl Scanned {
    /// All tries.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.met.values().sum()
    }

    #[must_use]
    pub fn count(&self, how: &str) -> u64 {
        self.met.get(how).copied().unwrap_or_default()
    }
}

impl<T> Call<'_, T> {
    /// Presents this certificate.
    pub fn as_leaf(self, leaf: &Leaf) -> Self {
        self.with("--cert", leaf.certificate.display()).with("--key", leaf.key.display())
    }

    /// One header field of a request.
    pub fn field(self, name: &str, value: impl Display) -> Self {
        self.with("--field", format!("{name}={value}"))
    }
}

impl Pod {
    /// HTTP/2 abuse of a tunnel's port with a good certificate, by an attacker that yields to everyone else on this
    /// machine: it stands for one on another machine.
    pub fn flood(&self, to: SocketAddr, authority: SocketAddr, leaf: &Leaf, attack: &str) -> Call<'_, Flooded> {
        let flood = self.call("flood").with("--to", to).with("--authority", authority).with("--attack", attack);
        flood.as_leaf(leaf).yielding()
    }

    /// One HBONE request, its fields exactly as given.
    pub fn ask(&self, to: SocketAddr) -> Call<'_, Asked> {
        self.call("ask").with("--to", to)
    }

    /// `count` connections that never end their handshake; those that stand after `seconds` are left by themselves.
    pub fn silent(&self, to: SocketAddr, count: u64, seconds: u64) -> Call<'_, Silenced> {
        self.call("silent").with("--to", to).with("--count", count).with("--seconds", seconds).within(60 + seconds)
    }

    /// An honest client: `rate` new connections a second, each with an echoed byte.
    pub fn pace(&self, to: SocketAddr, rate: u64, seconds: u64) -> Call<'_, Churned> {
        self.call("pace").with("--to", to).with("--rate", rate).with("--seconds", seconds).within(60 + seconds)
    }

    /// `rate` new mutual TLS connections a second, each with a CONNECT that is answered.
    pub fn shakes(&self, to: SocketAddr, authority: SocketAddr, rate: u64, seconds: u64) -> Call<'_, Churned> {
        let call = self.call("shakes").with("--to", to).with("--authority", authority);
        call.with("--rate", rate).with("--seconds", seconds).within(60 + seconds)
    }

    /// `count` connections that tell when they were ended.
    pub fn outlive(&self, to: SocketAddr, count: u64, seconds: u64) -> Call<'_, Fates> {
        self.call("outlive").with("--to", to).with("--count", count).with("--seconds", seconds).within(60 + seconds)
    }

    /// `count` connections, filled until nothing more goes in.
    pub fn stuff(&self, to: SocketAddr, count: u64) -> Call<'_, Stuffed> {
        self.call("stuff").with("--to", to).with("--count", count).within(60)
    }

    /// Stories from number `first` on, with a `script` server.
    pub fn script(&self, to: SocketAddr, first: u64, count: u64) -> Call<'_, Scripted> {
        let call = self.call("script").with("--to", to).with("--first", first).with("--count", count);
        call.with("--concurrent", 64).within(120)
    }

    /// Connects to `count` ports from that of `to` on.
    pub fn scan(&self, to: SocketAddr, count: u16) -> Call<'_, Scanned> {
        self.call("ports").with("--to", to).with("--count", count).within(60)
    }

    /// `rate` SYNs a second from addresses of a /24 where nobody is.
    pub fn syns(&self, to: SocketAddr, sources: std::net::Ipv4Addr, rate: u64, seconds: u64) -> Call<'_, Scanned> {
        let call = self.call("syns").with("--to", to).with("--sources", sources);
        call.with("--rate", rate).with("--seconds", seconds)
    }

    /// Packets of `count` connections with another's source address: a SYN for each port from `port` on, and `guesses`
    /// segments with data after it.
    pub fn forge(
        &self,
        source: impl Into<IpAddr>,
        to: SocketAddr,
        (port, count): (u16, u16),
        guesses: u32,
    ) -> Call<'_, Scanned> {
        let call = self.call("forge").with("--source", source.into()).with("--to", to);
        call.with("--port", port).with("--count", count).with("--guesses", guesses)
    }

    /// A connection with each of these marks.
    pub fn marks(&self, to: SocketAddr, marks: &[u32]) -> Call<'_, Scanned> {
        let marks: Vec<String> = marks.iter().map(u32::to_string).collect();
        self.call("marks").with("--to", to).with("--marks", marks.join(",")).within(60)
    }

    /// `count` connections from one port, each reset, one right after the other.
    pub fn reuse(&self, to: SocketAddr, port: u16, count: u64) -> Call<'_, Scanned> {
        self.call("reuse").with("--to", to).with("--bind-port", port).with("--count", count).within(60)
    }

    /// `count` connections that end badly.
    pub fn aborts(&self, to: SocketAddr, count: u64, concurrent: u64) -> Call<'_, Scanned> {
        self.call("aborts").with("--to", to).with("--count", count).with("--concurrent", concurrent).within(120)
    }

    /// One request of each of `count` identities to the tunnels of these pods in turn.
    pub fn many(&self, to: &[&Pod], port: u16, root: &Root, count: u64) -> Call<'_, Scanned> {
        let call = self.call("many").with("--port", port).with("--count", count);
        let call = call.with("--cert", root.certificate.display()).with("--key", root.key.display()).within(120);
        to.iter().fold(call, |call, pod| call.with("--to", pod.at(15008)))
    }
}

impl Call<'_, Fates> {
    /// Opens the connections, and goes on in the background until they have ended.
    pub fn open(self) -> crate::Result<(crate::call::Running<Fates>, Held)> {
        self.begin()
    }
}

impl Call<'_, Arrived> {
    /// Goes on in the background from its first try.
    pub fn open(self) -> crate::Result<(crate::call::Running<Arrived>, Event)> {
        self.begin()
    }
}

impl Call<'_, Silenced> {
    /// Opens the connections, and goes on in the background until they have ended.
    pub fn open(self) -> crate::Result<(crate::call::Running<Silenced>, Dripped)> {
        self.begin()
    }
}

impl Call<'_, Stuffed> {
    /// Fills the connections; they stay until [`crate::call::Holding::close`].
    pub fn open(self) -> crate::Result<(crate::call::Holding, Stuffed)> {
        self.holding()
    }
}
