//! What the CA tells of itself: counters for `/metrics`, and what its readiness waits for.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus::{GaugeVec, Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};

use super::source::{KeyStatus, Keys};

/// Cheap to clone.
#[derive(Clone)]
pub struct Vitals {
    registry: Registry,
    requests: IntCounterVec,
    seconds: Histogram,
    questions: IntCounterVec,
    pods: IntGauge,
    watching: IntGauge,
    waits: Arc<Mutex<BTreeSet<&'static str>>>,
    keys: Arc<Keys>,
}

impl Vitals {
    /// # Errors
    /// Never in practice: only when two metrics had the same name.
    pub(super) fn new(keys: Arc<Keys>) -> Result<Self, prometheus::Error> {
        let vitals = Self {
            registry: Registry::new(),
            requests: IntCounterVec::new(
                Opts::new(
                    "heddle_ca_requests_total",
                    "Requests for a certificate: issued, refused, or unavailable (an outage of what the CA asks), and why.",
                ),
                &["result", "reason"],
            )?,
            seconds: Histogram::with_opts(
                HistogramOpts::new("heddle_ca_issue_seconds", "From a request to its certificate.").buckets(vec![
                    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
                ]),
            )?,
            questions: IntCounterVec::new(
                Opts::new("heddle_ca_api_requests_total", "Questions to the API server, by kind and result."),
                &["request", "result"],
            )?,
            pods: IntGauge::new("heddle_ca_pods", "Pods that the CA knows by its watch.")?,
            watching: IntGauge::new("heddle_ca_pods_watched", "Whether the watch of the pods is up (1) or not (0).")?,
            waits: Arc::default(),
            keys,
        };
        vitals.registry.register(Box::new(vitals.requests.clone()))?;
        vitals.registry.register(Box::new(vitals.seconds.clone()))?;
        vitals.registry.register(Box::new(vitals.questions.clone()))?;
        Ok(vitals)
    }

    pub(super) fn issued(&self, took: Duration) {
        self.requests.with_label_values(&["issued", ""]).inc();
        self.seconds.observe(took.as_secs_f64());
    }

    pub(super) fn refused(&self, reason: &str, outage: bool) {
        self.requests.with_label_values(&[if outage { "unavailable" } else { "refused" }, reason]).inc();
    }

    pub(super) fn asked(&self, request: &str, good: bool) {
        self.questions.with_label_values(&[request, if good { "ok" } else { "failed" }]).inc();
    }

    /// There are pods to know: adds their metrics.
    ///
    /// # Errors
    /// When it was called before.
    pub(super) fn add_pods(&self) -> Result<(), prometheus::Error> {
        self.registry.register(Box::new(self.pods.clone()))?;
        self.registry.register(Box::new(self.watching.clone()))
    }

    pub(super) fn watched(&self, pods: usize, up: bool) {
        self.pods.set(i64::try_from(pods).unwrap_or(i64::MAX));
        self.watching.set(up.into());
    }

    /// The CA is not ready until `what` is there.
    pub(super) fn wait(&self, what: &'static str) {
        self.waits().insert(what);
    }

    pub(super) fn ready(&self, what: &'static str) {
        self.waits().remove(what);
    }

    /// What readiness waits for; empty when the CA is ready.
    #[must_use]
    pub fn waiting_for(&self) -> Vec<&'static str> {
        self.waits().iter().copied().collect()
    }

    fn waits(&self) -> MutexGuard<'_, BTreeSet<&'static str>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The metrics in Prometheus' text format 0.0.4.
    ///
    /// # Errors
    /// When a family can't be written.
    pub fn exposition(&self) -> Result<String, prometheus::Error> {
        let mut families = self.registry.gather();
        families.extend(signing_key(&self.keys.status())?.gather());
        TextEncoder::new().encode_to_string(&families)
    }
}

impl fmt::Debug for Vitals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vitals").field("waiting_for", &self.waiting_for()).finish_non_exhaustive()
    }
}

/// The signing key in force, and what was wrong with others.
fn signing_key(status: &KeyStatus) -> Result<Registry, prometheus::Error> {
    let registry = Registry::new();
    let end = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let bad = IntGauge::new(
        "heddle_ca_key_bad",
        "Whether what the source of the signing key holds can't be signed with (1): the last good one is in force.",
    )?;
    bad.set(status.bad.is_some().into());
    let errors =
        Opts::new("heddle_ca_key_errors_total", "States of the signing key that could not be taken, by reason.");
    let errors = IntCounterVec::new(errors, &["reason"])?;
    for (reason, count) in &status.errors {
        errors.with_label_values(&[reason]).inc_by(*count);
    }
    let issuer = Opts::new("heddle_ca_issuer_expiry_timestamp_seconds", "When nothing can be issued any more.");
    let issuer = GaugeVec::new(issuer, &["serial"])?;
    issuer.with_label_values(&[&status.issuing]).set(end(status.not_after));
    let roots = Opts::new("heddle_ca_root_expiry_timestamp_seconds", "End of each root of the trust bundle.");
    let roots = GaugeVec::new(roots, &["subject", "serial"])?;
    for root in &status.roots {
        roots.with_label_values(&[&root.subject, &root.serial]).set(end(root.not_after));
    }
    registry.register(Box::new(bad))?;
    registry.register(Box::new(errors))?;
    registry.register(Box::new(issuer))?;
    registry.register(Box::new(roots))?;
    Ok(registry)
}
