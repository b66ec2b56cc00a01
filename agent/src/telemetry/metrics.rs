//! What `/metrics` answers: the traffic counters, and what the other stages know at the moment of the scrape.
//!
//! Nothing here blocks the data plane: stages are asked through [`Sources`], events only add to counters.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Instant, SystemTime},
};

use prometheus::{
    IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
    proto::{MetricFamily, MetricType},
};

use super::{
    certificates::{self, IdentityReport},
    families::{as_f64, counter, family, gauge, label},
    kubelet::{self, KubeletReport},
    lane::{Health, LaneTable},
    pods::{PodReport, named},
    pressure, process, revocation,
    traffic::Traffic,
    tunnels::Tunnels,
    verdicts::{self, VerdictCounts},
};
use crate::{
    cluster::PolicyKind,
    identity::TrustReport,
    life::{budget::Budget, limits},
    policy::{Action, Denial, Effect, Rehearsal},
    tunnel::{Connection, Direction, PoolCounts, Security, Sessions},
};

/// Where a scrape reads what other stages know right now.
pub struct Sources {
    pub live: Box<dyn Fn() -> Vec<Arc<Connection>> + Send + Sync>,
    /// The kernel lane's connections; `None` where they can't be read.
    pub lane: Box<dyn Fn() -> Option<LaneTable> + Send + Sync>,
    /// Records of the kernel lane that found no room, of the pods that are enrolled.
    pub lane_lost: Box<dyn Fn() -> u64 + Send + Sync>,
    /// What the kernel lane's decisions come to.
    pub verdicts: Box<dyn Fn() -> VerdictCounts + Send + Sync>,
    pub pods: Box<dyn Fn() -> Vec<PodReport> + Send + Sync>,
    /// Whether the kubelet's probes are let through.
    pub kubelet: Box<dyn Fn() -> KubeletReport + Send + Sync>,
    /// Certificates, roots and calls to the CA.
    pub identity: Box<dyn Fn() -> IdentityReport + Send + Sync>,
    /// What is wrong with what peers are verified with, and what revocation ended.
    pub trust: Box<dyn Fn() -> TrustReport + Send + Sync>,
    pub sessions: Arc<Sessions>,
    /// Manifest objects that are not in force as written.
    pub manifest_problems: Box<dyn Fn() -> usize + Send + Sync>,
    /// Kind and effect of every policy, or part of one, that is not enforced as written.
    pub policy_problems: Box<dyn Fn() -> Vec<(PolicyKind, Effect)> + Send + Sync>,
    /// What the pods' pools of tunnels count.
    pub pool: Arc<PoolCounts>,
    /// Files that can't be read and may hold policies: connections are denied for want of them.
    pub policy_gaps: Box<dyn Fn() -> usize + Send + Sync>,
    /// How often a pod's capture was found wanting and put in order.
    pub repairs: Box<dyn Fn() -> u64 + Send + Sync>,
    /// Open connections that are older than their pod's enrolment.
    pub older: Box<dyn Fn() -> usize + Send + Sync>,
    /// Whether the runtime asks before it starts a pod; `None` where there is no CNI to do so.
    pub cni: Box<dyn Fn() -> Option<bool> + Send + Sync>,
    /// How much of the budgets is used.
    pub budget: Budget,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

/// Counters that events add to.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    pub traffic: Traffic,
    handshakes: IntCounterVec,
    denied: IntCounterVec,
    rehearsed: IntCounterVec,
    pub tunnels: Tunnels,
    pub lane: Health,
    pub served: IntCounter,
    pub left: IntCounter,
    /// Access-log lines that were not written because the pod had enough of their kind in that second.
    pub suppressed: IntCounter,
    /// Pairs of reason and policy seen, to keep `denied` within its cap.
    denials: Mutex<HashSet<(&'static str, Arc<str>)>>,
    /// The same for `rehearsed`, with the time when each was last logged.
    rehearsals: Mutex<HashMap<(&'static str, Arc<str>), Instant>>,
}

impl Metrics {
    /// # Errors
    /// Never in practice: only when two metrics had the same name.
    pub fn new(cluster: Arc<str>) -> Result<Self, prometheus::Error> {
        let handshakes = IntCounterVec::new(
            Opts::new("heddle_tls_handshakes_total", "TLS handshakes by direction and result (ok or the reason)."),
            &["direction", "result"],
        )?;
        let denied = IntCounterVec::new(
            Opts::new("heddle_denied_total", "Connections that policy refused or closed, by reason and policy."),
            &["reason", "policy"],
        )?;
        let rehearsed = IntCounterVec::new(
            Opts::new("heddle_dry_run_total", "Connections that a dry-run policy matched; it decides nothing."),
            &["policy", "action"],
        )?;
        let served = IntCounter::new("workload_manager_proxies_started_total", "Pods whose listener was served.")?;
        let left = IntCounter::new(
            "workload_manager_proxies_stopped_total",
            "Pods whose listener was served and is no more.",
        )?;
        let suppressed = IntCounter::new(
            "heddle_log_lines_suppressed_total",
            "Access log lines of refused and failed connections beyond what one pod may write in a second.",
        )?;
        let registry = Registry::new();
        registry.register(Box::new(suppressed.clone()))?;
        process::register(&registry)?;
        for counter in [&served, &left] {
            registry.register(Box::new(counter.clone()))?;
        }
        registry.register(Box::new(rehearsed.clone()))?;
        let (tunnels, lane) = (Tunnels::new(&registry)?, Health::new(&registry)?);
        registry.register(Box::new(handshakes.clone()))?;
        registry.register(Box::new(denied.clone()))?;
        let traffic = Traffic::new(cluster, limits::METRIC_SERIES);
        Ok(Self {
            registry,
            traffic,
            handshakes,
            denied,
            rehearsed,
            suppressed,
            tunnels,
            lane,
            served,
            left,
            denials: Mutex::default(),
            rehearsals: Mutex::default(),
        })
    }

    pub fn handshake(&self, direction: Direction, result: Result<(), &'static str>) {
        let result = result.map_or_else(|reason| reason, |()| "ok");
        self.handshakes.with_label_values(&[direction_name(direction), result]).inc();
    }

    pub fn denied(&self, denial: &Denial, count: u64) {
        let policy = denial.policy().cloned().unwrap_or_default();
        let mut seen = self.denials.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (denial.reason(), policy);
        let fits = seen.contains(&key) || seen.len() < limits::METRIC_DENIALS && seen.insert(key.clone());
        drop(seen);
        self.denied.with_label_values(&[key.0, if fits { &*key.1 } else { "overflow" }]).inc_by(count);
    }

    /// Counts what a dry-run policy would have done. Whether it is to be logged too.
    pub fn rehearsed(&self, rehearsal: &Rehearsal, count: u64, now: Instant) -> bool {
        let action = action_name(rehearsal.action);
        let key = (action, Arc::clone(&rehearsal.policy));
        let mut seen = self.rehearsals.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = seen.contains_key(&key) || seen.len() < limits::METRIC_DENIALS;
        let due = match seen.get(&key) {
            Some(logged) => now.duration_since(*logged) >= limits::DRY_RUN_LOG,
            None => fits,
        };
        if due {
            seen.insert(key, now);
        }
        drop(seen);
        let policy = if fits { &*rehearsal.policy } else { "overflow" };
        self.rehearsed.with_label_values(&[policy, action]).inc_by(count);
        due
    }

    /// The exposition in Prometheus' text format 0.0.4.
    ///
    /// # Errors
    /// When a family can't be written.
    pub fn scrape(
        &self,
        sources: &Sources,
        dropped_lines: u64,
        more: Vec<MetricFamily>,
        now: Instant,
    ) -> Result<String, prometheus::Error> {
        self.traffic.fold(&(sources.live)(), now);
        let mut families = self.registry.gather();
        families.extend(more);
        let pods = (sources.pods)();
        families.extend(pressure::families(&sources.budget.pressure(), &pods));
        families.extend(pod_families(&pods));
        families.extend(kubelet::families(&(sources.kubelet)(), &pods));
        families.extend(self.open_families());
        families.extend(self.tunnels.families(&sources.pool));
        families.extend(self.lane.lost((sources.lane_lost)()));
        families.extend(verdicts::families(&(sources.verdicts)()));
        families.extend(process::runtime_families());
        families.extend(policy_family(&(sources.policy_problems)()));
        families.extend(certificates::families(&(sources.identity)()));
        families.extend(revocation::families(&(sources.trust)(), sources.sessions.ended()));
        families.extend(build_families());
        let single = [
            (
                "heddle_log_lines_dropped_total",
                "Access log lines dropped because the log could not keep up.",
                MetricType::COUNTER,
                dropped_lines,
            ),
            (
                "heddle_manifest_problems",
                "Manifest objects that are not in force as written.",
                MetricType::GAUGE,
                (sources.manifest_problems)() as u64,
            ),
            (
                "heddle_metric_series_overflow_total",
                "Events of connections that count under the label value overflow, as the table of label sets was full.",
                MetricType::COUNTER,
                self.traffic.overflowed(),
            ),
            (
                "heddle_pods_served",
                "Pods of this node whose connections the agent takes.",
                MetricType::GAUGE,
                self.served.get().saturating_sub(self.left.get()),
            ),
            (
                "heddle_policy_gaps",
                "Manifests that can't be read and may hold policies: what they may be for is denied.",
                MetricType::GAUGE,
                (sources.policy_gaps)() as u64,
            ),
            (
                "heddle_capture_repairs_total",
                "Times that a pod's capture was found wanting and put in order.",
                MetricType::COUNTER,
                (sources.repairs)(),
            ),
        ];
        let older = (
            "heddle_connections_older",
            "Open connections of this node's pods that are older than their enrolment, and so outside the mesh.",
            MetricType::GAUGE,
            (sources.older)() as u64,
        );
        let cni = (sources.cni)().map(|installed| {
            let help = "Whether the container runtime asks the agent before it starts a pod.";
            ("heddle_cni_installed", help, MetricType::GAUGE, u64::from(installed))
        });
        families.extend(single.into_iter().chain([older]).chain(cni).filter_map(|(name, help, kind, value)| {
            let row = match kind {
                MetricType::COUNTER => counter(vec![], value),
                _ => gauge(vec![], as_f64(value)),
            };
            family(name, help, kind, vec![row])
        }));
        families.sort_by(|one, other| one.name().cmp(other.name()));
        let mut text = TextEncoder::new().encode_to_string(&families)?;
        self.traffic.write(&mut text)?;
        Ok(text)
    }

    fn open_families(&self) -> impl Iterator<Item = MetricFamily> + use<> {
        let open = self.traffic.open();
        let carried = self.traffic.carried();
        let every = [Direction::Inbound, Direction::Outbound]
            .into_iter()
            .flat_map(|direction| Security::ALL.map(|security| (direction, security)));
        let rows = every.clone().map(|(direction, security)| {
            let labels =
                vec![label("direction", direction_name(direction)), label("security", security_name(security))];
            gauge(labels, as_f64(open.get(&(direction, security)).copied().unwrap_or_default() as u64))
        });
        let of = |direction| Security::ALL.map(|security| open.get(&(direction, security)).copied()).into_iter();
        let sockets = [("source", Direction::Outbound), ("destination", Direction::Inbound)].map(|(reporter, side)| {
            let count: usize = of(side).flatten().sum();
            gauge(vec![label("reporter", reporter)], as_f64(count as u64))
        });
        let bytes = every.clone().flat_map(|(direction, security)| {
            let (to_server, to_client) = carried.get(&(direction, security)).copied().unwrap_or_default();
            [("server", to_server), ("client", to_client)].map(|(towards, value)| {
                let (direction, security) = (direction_name(direction), security_name(security));
                let labels =
                    vec![label("direction", direction), label("security", security), label("towards", towards)];
                counter(labels, value)
            })
        });
        let bytes = bytes.collect();
        [
            family(
                "heddle_connections_open",
                "Connections that the agent carries, and those of the kernel lane.",
                MetricType::GAUGE,
                rows.collect(),
            ),
            family(
                "heddle_app_bytes_total",
                "Plain bytes of apps; security tells how they went between the pods.",
                MetricType::COUNTER,
                bytes,
            ),
            family(
                "istio_tcp_sockets_open",
                "Connections of apps that go on, by the side that reports.",
                MetricType::GAUGE,
                sockets.to_vec(),
            ),
        ]
        .into_iter()
        .flatten()
    }
}

fn pod_families(pods: &[PodReport]) -> impl Iterator<Item = MetricFamily> {
    let mut uncaptured = std::collections::BTreeMap::<&'static str, u64>::new();
    for pod in pods.iter().filter(|pod| !pod.captured()) {
        *uncaptured.entry(pod.reason()).or_default() += 1;
    }
    let captured = pods.iter().filter(|pod| pod.captured()).count() as u64;
    let identity = |pod: &PodReport| vec![label("namespace", &pod.namespace), label("pod", &pod.name)];
    let each = pods.iter().map(|pod| {
        let mut labels = identity(pod);
        if !pod.captured() {
            labels.push(label("reason", pod.reason()));
        }
        gauge(labels, f64::from(u8::from(pod.captured())))
    });
    let events = pods.iter().flat_map(|pod| {
        named(&pod.counts).map(|(event, value)| {
            let mut labels = identity(pod);
            labels.push(label("event", event));
            counter(labels, value)
        })
    });
    let reasons = uncaptured.iter().map(|(reason, count)| gauge(vec![label("reason", reason)], as_f64(*count)));
    [
        family(
            "heddle_pod_captured",
            "1 while the pod's capture is proven in the kernel, else 0 with the reason.",
            MetricType::GAUGE,
            each.collect(),
        ),
        family(
            "heddle_pod_kernel_events_total",
            "The kernel programs' counters of the pod.",
            MetricType::COUNTER,
            events.collect(),
        ),
        family(
            "heddle_pods_captured",
            "Pods of this node that are proven captured.",
            MetricType::GAUGE,
            vec![gauge(vec![], as_f64(captured))],
        ),
        family(
            "heddle_pods_uncaptured",
            "Enrolled pods of this node that are not proven captured.",
            MetricType::GAUGE,
            reasons.collect(),
        ),
    ]
    .into_iter()
    .flatten()
}

/// A row per kind and effect, zeros included, so that an alert has something to compare.
fn policy_family(problems: &[(PolicyKind, Effect)]) -> Option<MetricFamily> {
    let kinds = [PolicyKind::AuthorizationPolicy, PolicyKind::PeerAuthentication];
    let effects = [Effect::Denies, Effect::RefusesPlaintext, Effect::Nothing];
    let every = kinds.into_iter().flat_map(|kind| effects.map(|effect| (kind, effect)));
    let rows = every.map(|(kind, effect)| {
        let count = problems.iter().filter(|problem| **problem == (kind, effect)).count();
        gauge(vec![label("kind", kind.as_str()), label("effect", effect.as_str())], as_f64(count as u64))
    });
    let help = "Policies, or parts of them, that are not enforced as written, by what that does to connections.";
    family("heddle_policy_problems", help, MetricType::GAUGE, rows.collect())
}

fn build_families() -> impl Iterator<Item = MetricFamily> {
    let version = env!("CARGO_PKG_VERSION");
    let istio = vec![label("component", "heddle"), label("tag", version)];
    [
        family(
            "heddle_build_info",
            "The agent's version.",
            MetricType::GAUGE,
            vec![gauge(vec![label("version", version)], 1.0)],
        ),
        family(
            "istio_build",
            "The agent's version, where Istio's dashboards look for it.",
            MetricType::GAUGE,
            vec![gauge(istio, 1.0)],
        ),
    ]
    .into_iter()
    .flatten()
}

/// `inbound` or `outbound`.
#[must_use]
pub fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "inbound",
        Direction::Outbound => "outbound",
    }
}

/// `allow` or `deny`.
pub(super) fn action_name(action: Action) -> &'static str {
    match action {
        Action::Allow => "allow",
        Action::Deny => "deny",
    }
}

/// `mutual_tls`, `kernel_attested` or `none`.
#[must_use]
pub fn security_name(security: Security) -> &'static str {
    match security {
        Security::MutualTls => "mutual_tls",
        Security::KernelAttested => "kernel_attested",
        Security::None => "none",
    }
}

/// Seconds from now until `moment`, negative when it has passed.
#[must_use]
pub fn seconds_until(moment: SystemTime, now: SystemTime) -> i64 {
    let seconds = |duration: std::time::Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    moment.duration_since(now).map_or_else(|error| -seconds(error.duration()), seconds)
}
