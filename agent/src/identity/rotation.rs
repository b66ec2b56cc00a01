//! Keeps the node's certificates: runs what `schedule` says, swaps certificates under the TLS settings that use them,
//! and watches the trust bundle.
//!
//! A certificate that can't be renewed stays until it expires; an expired one is never presented.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::{
    ClientConfig, ServerConfig, SignatureScheme,
    client::ResolvesClientCert,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    sync::{Notify, watch},
    task::{AbortHandle, Id, JoinError, JoinSet},
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{
    CaClientConfig, CertificateStatus, FetchCounts, FetchError, IdentityError, RootStatus, SpiffeId, TrustDomain,
    TrustDomains,
    answer::Held,
    certificates::TrustConfig,
    client::CaClient,
    revocation::{self, Revocation},
    roots::{BundleError, TrustBundle, unix_time},
    schedule::{Now, Outcome, Schedule, Ticket},
    tls,
    verify::{ExpectedServer, MeshClient, Trust},
};
use crate::life::limits;

/// Our certificate for one identity, as rustls asks for it at each handshake.
#[derive(Default)]
struct Own(ArcSwapOption<Held>);

impl Own {
    fn certified(&self) -> Option<Arc<CertifiedKey>> {
        let held = self.0.load();
        held.as_ref().filter(|held| held.valid(SystemTime::now())).map(|held| Arc::clone(&held.certified))
    }
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Own").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Own {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }
}

impl ResolvesClientCert for Own {
    fn resolve(&self, _roots: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }

    fn has_certs(&self) -> bool {
        self.certified().is_some()
    }
}

/// One identity that is kept.
pub(super) struct Entry {
    own: Arc<Own>,
    server: Arc<ServerConfig>,
    /// Of the last try, where that failed.
    failure: Mutex<Option<Failure>>,
}

struct Failure {
    error: FetchError,
    at: SystemTime,
}

impl Entry {
    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    fn usable(&self) -> bool {
        self.own.certified().is_some()
    }

    fn failure(&self) -> MutexGuard<'_, Option<Failure>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Entries = HashMap<SpiffeId, Arc<Entry>>;

pub(super) struct Shared {
    trust: Trust,
    ca: CaClient,
    bundle: Arc<TrustBundle>,
    /// Why the bundle file was not taken when it was last looked at.
    bundle_error: Mutex<Option<BundleError>>,
    revocation: Option<Arc<Revocation>>,
    entries: ArcSwap<Entries>,
    schedule: Mutex<Schedule>,
    /// How fetches ended, by reason.
    counts: Mutex<BTreeMap<&'static str, u64>>,
    /// The schedule changed.
    poke: Notify,
    /// A certificate came, or the set changed: connections that wait look again.
    changes: watch::Sender<()>,
    client_template: ClientConfig,
    server_template: ServerConfig,
}

impl Shared {
    /// Follows the revocation lists until `stop`, where there are any.
    pub fn new(config: CaClientConfig, trust: TrustConfig, stop: &CancellationToken) -> Result<Self, IdentityError> {
        let trust_domain = config.trust_domain.clone();
        let bundle = Arc::new(TrustBundle::new(config.root_certificate.clone()));
        let nobody: Arc<Own> = Arc::default();
        let expected = SpiffeId::new(&trust_domain, "none", "none").map_err(super::PeerError::BadSpiffeId)?;
        let roots = Arc::clone(bundle.current());
        let domains = TrustDomains::new(trust_domain, &trust.aliases);
        let crl = trust.crl;
        let trust = Trust { roots, domains, revocation: Arc::default() };
        let revocation = crl.map(|crl| {
            // What the bundle holds already; a broken one is told of when it is next looked at.
            let _told_later = bundle.reload();
            let (roots, standing) = (Arc::clone(&trust.roots), Arc::clone(&trust.revocation));
            let (revocation, follower) = Revocation::new(crl, roots, standing);
            let revocation = Arc::new(revocation);
            tokio::spawn(revocation::follow(Arc::clone(&revocation), follower, stop.clone()));
            revocation
        });
        let servers = ExpectedServer { expected, trust: trust.clone() };
        let clients = MeshClient { trust: trust.clone() };
        Ok(Self {
            trust,
            ca: CaClient::new(config, Arc::clone(&bundle))?,
            bundle,
            bundle_error: Mutex::default(),
            revocation,
            entries: ArcSwap::default(),
            schedule: Mutex::new(Schedule::new(fastrand::Rng::new())),
            counts: Mutex::default(),
            poke: Notify::new(),
            changes: watch::Sender::new(()),
            client_template: tls::client_config(Arc::new(servers), nobody.clone())?,
            server_template: tls::server_config(Arc::new(clients), nobody)?,
        })
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        self.trust.domains.own()
    }

    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    pub fn revocation(&self) -> Option<&Arc<Revocation>> {
        self.revocation.as_ref()
    }

    pub fn bundle_error(&self) -> Option<BundleError> {
        self.bundle_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn keep(&self, mut identities: HashSet<SpiffeId>) {
        identities.retain(|identity| {
            let ours = identity.trust_domain() == self.trust_domain().as_str();
            if !ours {
                tracing::warn!(%identity, trust_domain = %self.trust_domain(), "Identity of another trust domain left out.");
            }
            ours
        });
        // The schedule's lock also orders concurrent calls.
        let mut schedule = self.schedule();
        let old = self.entries.load_full();
        let new: Entries = identities
            .iter()
            .map(|identity| {
                let entry = old.get(identity).cloned().unwrap_or_else(|| Arc::new(self.entry()));
                (identity.clone(), entry)
            })
            .collect();
        schedule.keep(&identities, Now::read());
        self.entries.store(Arc::new(new));
        for (_, entry) in old.iter().filter(|(identity, _)| !identities.contains(identity)) {
            // TLS settings that connections still hold lose their key too.
            entry.own.0.store(None);
        }
        drop(schedule);
        self.poke.notify_one();
        self.changes.send_replace(());
    }

    fn entry(&self) -> Entry {
        let own: Arc<Own> = Arc::default();
        let mut server = self.server_template.clone();
        server.cert_resolver = own.clone();
        Entry { own, server: Arc::new(server), failure: Mutex::default() }
    }

    /// Settings for one connection: a clone of the template (a dozen shared pointers) with the two ends filled in.
    pub fn client(&self, entry: &Entry, peer: &SpiffeId) -> Arc<ClientConfig> {
        let mut config = self.client_template.clone();
        config.client_auth_cert_resolver = entry.own.clone();
        let verifier = ExpectedServer { expected: peer.clone(), trust: self.trust.clone() };
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        Arc::new(config)
    }

    /// The entry of `own` with a valid certificate, waited for up to `limits::HOLD`.
    pub async fn ready(&self, own: &SpiffeId) -> Result<Arc<Entry>, IdentityError> {
        if let Some(entry) = self.usable(own) {
            return Ok(entry);
        }
        if own.trust_domain() != self.trust_domain().as_str() {
            return Err(IdentityError::NotOurs(own.clone()));
        }
        match tokio::time::timeout(limits::HOLD, self.arrival(own)).await {
            Ok(entry) => Ok(entry),
            Err(_) => Err(self.missing(own)),
        }
    }

    fn usable(&self, own: &SpiffeId) -> Option<Arc<Entry>> {
        self.entries.load().get(own).filter(|entry| entry.usable()).cloned()
    }

    async fn arrival(&self, own: &SpiffeId) -> Arc<Entry> {
        let mut changes = self.changes.subscribe();
        loop {
            changes.mark_unchanged();
            if let Some(entry) = self.usable(own) {
                return entry;
            }
            self.schedule().need(own);
            self.poke.notify_one();
            if changes.changed().await.is_err() {
                // The sender is ours, so this does not happen; the caller's deadline ends it.
                std::future::pending::<()>().await;
            }
        }
    }

    fn missing(&self, own: &SpiffeId) -> IdentityError {
        let entries = self.entries.load();
        let Some(entry) = entries.get(own) else {
            return IdentityError::NotOurs(own.clone());
        };
        let error = match &*entry.failure() {
            Some(failure) => failure.error.to_string(),
            None => "the CA has not answered yet".to_owned(),
        };
        match entry.own.0.load().as_ref() {
            Some(_) => IdentityError::Expired(own.clone(), error),
            None => IdentityError::NotYet(own.clone(), error),
        }
    }

    pub fn list(&self) -> Vec<CertificateStatus> {
        let now = Now::read();
        let schedule = self.schedule();
        let entries = self.entries.load();
        let status = |(identity, entry): (&SpiffeId, &Arc<Entry>)| {
            let held = entry.own.0.load();
            let held = held.as_ref();
            let failure = entry.failure();
            CertificateStatus {
                identity: identity.clone(),
                serial: held.map(|held| held.serial.clone()).unwrap_or_default(),
                not_before: held.map(|held| held.not_before),
                not_after: held.map(|held| held.not_after),
                usable_until: held.map(|held| held.usable_until),
                intermediates: held.map(|held| held.intermediates.clone()).unwrap_or_default(),
                root: held.and_then(|held| held.root.clone()),
                received: held.map(|held| held.received),
                last_error: failure.as_ref().map(|failure| failure.error.to_string()).unwrap_or_default(),
                last_reason: failure.as_ref().map_or("", |failure| failure.error.reason()),
                failed: failure.as_ref().map(|failure| failure.at),
                next_try: schedule.next_try(identity, now),
            }
        };
        let mut list: Vec<_> = entries.iter().map(status).collect();
        list.sort_by(|a, b| a.identity.cmp(&b.identity));
        list
    }

    pub fn fetches(&self) -> FetchCounts {
        let under_way = self.schedule().under_way();
        let ended = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        FetchCounts { under_way, ended: ended.iter().map(|(reason, count)| (*reason, *count)).collect() }
    }

    pub fn serial(&self, identity: &SpiffeId) -> Option<String> {
        let entries = self.entries.load();
        entries.get(identity)?.own.0.load().as_ref().map(|held| held.serial.clone())
    }

    pub fn roots(&self) -> Vec<RootStatus> {
        self.bundle.current().load().status()
    }

    fn schedule(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A fetch ended. What it brought is dropped if the identity left the set meanwhile.
    fn finish(&self, identity: &SpiffeId, ticket: Ticket, result: Result<Held, FetchError>) {
        let now = Now::read();
        self.count(&result);
        let mut schedule = self.schedule();
        let outcome = match &result {
            Ok(held) => Outcome::Held { until: held.usable_until, lifetime: held.lifetime() },
            Err(error) => error.outcome(),
        };
        let wanted = schedule.wants(identity, ticket);
        schedule.finished(identity, ticket, outcome, now);
        let Some(entry) = self.entries.load().get(identity).filter(|_| wanted).cloned() else { return };
        match result {
            Ok(held) => {
                tracing::info!(%identity, serial = held.serial, not_after = %humantime::format_rfc3339_seconds(held.not_after), "Certificate received.");
                *entry.failure() = None;
                entry.own.0.store(Some(Arc::new(held)));
                drop(schedule);
                self.changes.send_replace(());
            }
            Err(error) => {
                tracing::warn!(%identity, reason = error.reason(), %error, still_valid = entry.usable(), "No certificate.");
                *entry.failure() = Some(Failure { error, at: now.wall });
            }
        }
    }

    fn count(&self, result: &Result<Held, FetchError>) {
        let reason = result.as_ref().map_or_else(FetchError::reason, |_| "ok");
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
    }

    /// Whether a fetch that is under way is still waited for.
    fn wants(&self, identity: &SpiffeId, ticket: Ticket) -> bool {
        self.schedule().wants(identity, ticket)
    }

    /// Notes how reading the bundle file went, and tells of each new problem once.
    fn bundle_failed(&self, problem: Option<BundleError>) {
        let mut known = self.bundle_error.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(problem) = problem.as_ref().filter(|problem| known.as_ref() != Some(problem)) {
            tracing::warn!(reason = problem.error.reason(), "{problem}. The last good one stays in force.");
        }
        *known = problem;
    }

    /// Certificates that peers with the bundle file of now won't trust are renewed at once.
    fn renew_untrusted(&self) {
        let roots = self.bundle.of_file();
        let wall = unix_time(SystemTime::now());
        let untrusted = |entry: &Entry| {
            entry.own.certified().is_some_and(|held| match held.cert.split_first() {
                Some((leaf, intermediates)) => roots.verify_server(leaf, intermediates, wall).is_err(),
                None => true,
            })
        };
        let entries = self.entries.load();
        let identities = entries.iter().filter(|(_, entry)| untrusted(entry)).map(|(identity, _)| identity.clone());
        let (identities, now) = (identities.collect(), Now::read());
        let mut schedule = self.schedule();
        schedule.trust_changed(now);
        schedule.renew(&identities, now);
    }
}

/// What was last seen of the trust bundle file, so that each change and each new error is reported once.
#[derive(Default)]
struct BundleWatch {
    generation: u64,
}

impl BundleWatch {
    fn look(&mut self, shared: &Shared) {
        match shared.bundle.reload() {
            Ok(generation) => {
                shared.bundle_failed(None);
                if generation != self.generation {
                    self.generation = generation;
                    tracing::info!(roots = shared.roots().len(), "Trust bundle read.");
                    shared.renew_untrusted();
                }
            }
            Err(error) => shared.bundle_failed(Some(shared.bundle.problem(error))),
        }
    }
}

/// Fetches and renews until `stop`.
pub(super) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let mut fetches: JoinSet<Result<Held, FetchError>> = JoinSet::new();
    let mut running: HashMap<Id, (SpiffeId, Ticket, AbortHandle)> = HashMap::new();
    let mut bundle = BundleWatch::default();
    let mut roots = interval(limits::BUNDLE_POLL);
    roots.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let (starts, idle) = {
            let mut schedule = shared.schedule();
            let starts = schedule.start(Now::read());
            (starts, schedule.idle(Now::read()))
        };
        for (identity, ticket) in starts {
            let (shared, asked) = (Arc::clone(&shared), identity.clone());
            let task = fetches.spawn(async move { shared.ca.fetch(&asked).await });
            running.insert(task.id(), (identity, ticket, task));
        }
        // A key that nobody waits for any more must not wait for the CA.
        running.values().filter(|(identity, ticket, _)| !shared.wants(identity, *ticket)).for_each(|run| run.2.abort());
        // The wall clock may be set at any time: look at it again at least this often.
        let idle = idle.unwrap_or(limits::BUNDLE_POLL).min(limits::BUNDLE_POLL);
        tokio::select! {
            () = stop.cancelled() => return,
            () = shared.poke.notified() => {}
            () = sleep(idle) => {}
            _ = roots.tick() => bundle.look(&shared),
            Some(ended) = fetches.join_next_with_id() => {
                let (id, result) = outcome(ended);
                if let Some((identity, ticket, _)) = running.remove(&id) {
                    shared.finish(&identity, ticket, result);
                }
            }
        }
    }
}

fn outcome(ended: Result<(Id, Result<Held, FetchError>), JoinError>) -> (Id, Result<Held, FetchError>) {
    match ended {
        Ok(ended) => ended,
        Err(error) if error.is_cancelled() => (error.id(), Err(FetchError::Abandoned)),
        Err(error) => (error.id(), Err(FetchError::Internal(error.to_string()))),
    }
}
