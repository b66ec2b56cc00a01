//! One kind of object, followed: listed page by page, then watched from there on, for ever.
//!
//! A watch that ends or breaks goes on from the last version it was told; only when that is gone, or something could not be
//! read, is everything listed again. Until a list is whole, what was known before it is in force. This is kube's `watcher` with
//! three differences: it tells when a watch is up again, a page has a deadline, and a 410 that answers a watch's beginning means
//! a list as well.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt;
use kube::{
    Api,
    api::{ListParams, WatchParams},
    core::WatchEvent,
};
use serde::de::DeserializeOwned;
use tokio::time::{sleep, timeout};

use super::{
    reach::{Backoff, Reach},
    shared::Shared,
    store::{Name, Object, Resource},
};
use crate::{causes, cluster::read::Fault, life::limits};

/// Why the API server's word can't be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The version to go on from is gone: all is to be listed.
    Gone(String),
    /// There is no such kind.
    Absent,
    /// It answers that it won't; with when to come again, if it says so.
    Refused { code: u16, message: String, after: Option<Duration> },
    /// It can't be reached, or breaks off.
    Away(String),
    /// Nothing is heard of it any more.
    Silent,
    /// What it said can't be read.
    Unreadable(String),
}

impl Trouble {
    pub fn of(error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => match status.code {
                410 => Self::Gone(status.message.clone()),
                404 => Self::Absent,
                code => {
                    let after = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
                    let after = (after > 0).then(|| Duration::from_secs(after.into()));
                    Self::Refused { code, message: status.message.clone(), after }
                }
            },
            kube::Error::SerdeError(error) => Self::Unreadable(error.to_string()),
            other => Self::Away(causes::told(other)),
        }
    }

    /// For people.
    pub fn told(&self) -> String {
        match self {
            Self::Gone(message) => format!("the history is gone ({message})"),
            Self::Absent => "there is no such kind".to_owned(),
            Self::Refused { code: 401, .. } => "the API server does not know the agent's token (401)".to_owned(),
            Self::Refused { code: 403, message, .. } => format!("RBAC does not allow it: {message}"),
            Self::Refused { code, message, .. } => format!("the API server answers {code}: {message}"),
            Self::Silent => "the API server does not answer any more".to_owned(),
            Self::Away(message) => format!("the API server can't be reached: {message}"),
            Self::Unreadable(message) => format!("what the API server says can't be read: {message}"),
        }
    }
}

/// What becomes of an object that was sent: its name, and the object or why it can't be one.
pub(super) type Taken = (Name, Result<Object, Fault>);

/// Does `work` unless the connections to the API server are found dead before it is done.
async fn until_dead<T>(
    work: impl Future<Output = Result<T, Trouble>>,
    dead: impl Future<Output = ()>,
) -> Result<T, Trouble> {
    tokio::select! {
        done = work => done,
        () = dead => Err(Trouble::Silent),
    }
}

/// How a kind is followed.
pub(super) struct Followed<K> {
    pub resource: Resource,
    /// One for each version of its group, the preferred one first.
    pub apis: Vec<Api<K>>,
    pub take: Box<dyn Fn(K) -> Taken + Send + Sync>,
}

impl<K> Followed<K>
where
    K: kube::Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    /// For ever.
    pub async fn run(self, shared: Arc<Shared>, reach: Arc<Reach>) {
        let resource = self.resource;
        let mut backoff = Backoff::default();
        let mut version: Option<String> = None;
        // Which of the versions of the group is asked, and how many in a row were not there.
        let (mut served, mut missing) = (0, 0);
        // A list whose pages outlive the history is taken whole.
        let mut paged = true;
        let mut away = 0_u32;
        loop {
            let Some(api) = self.apis.get(served % self.apis.len().max(1)) else { return };
            let began = Instant::now();
            let mut dead = reach.dead();
            let lives = async {
                // Its other end is as long as we are.
                let _changed = dead.changed().await;
            };
            let trouble = match &mut version {
                None => match until_dead(self.list(api, paged, &shared), lives).await {
                    Ok(listed) => {
                        (version, paged, missing) = (Some(listed), true, 0);
                        continue;
                    }
                    Err(trouble) => trouble,
                },
                Some(at) => match until_dead(self.watch(api, at, &shared, &reach), lives).await {
                    Ok(()) => {
                        away = 0;
                        if began.elapsed() >= limits::KUBE_BACKOFF_MIN {
                            backoff.reset();
                        } else {
                            // One that ends as soon as it began is not to be begun as fast as it ends.
                            sleep(backoff.next(None)).await;
                        }
                        continue;
                    }
                    Err(trouble) => trouble,
                },
            };
            let pause = match &trouble {
                Trouble::Gone(message) => {
                    tracing::info!(resource = resource.name(), message, "Listing again: the history is gone");
                    paged = version.take().is_some();
                    Some(backoff.next(None))
                }
                Trouble::Absent if resource.policy().is_some() => {
                    (version, served, missing) = (None, served + 1, missing + 1);
                    // Another version of the group may be all there is.
                    (missing >= self.apis.len()).then(|| {
                        shared.absent(resource);
                        missing = 0;
                        limits::KUBE_ABSENT_LOOK.mul_f64(0.5 + fastrand::f64() / 2.0)
                    })
                }
                Trouble::Away(_) | Trouble::Silent => {
                    shared.failed(resource, trouble.told());
                    away += 1;
                    // A connection that ended is made again at once; after that, when anything answers there.
                    if away > 1 || trouble == Trouble::Silent {
                        reach.wait(Instant::now()).await;
                    }
                    (away > 2).then(|| backoff.next(None))
                }
                Trouble::Absent | Trouble::Unreadable(_) => {
                    shared.failed(resource, trouble.told());
                    version = None;
                    Some(backoff.next(None))
                }
                Trouble::Refused { after, .. } => {
                    shared.failed(resource, trouble.told());
                    Some(backoff.next(*after))
                }
            };
            if let Some(pause) = pause {
                sleep(pause).await;
            }
        }
    }

    /// Every object, put in force at once; gives the version that it is of.
    async fn list(&self, api: &Api<K>, paged: bool, shared: &Shared) -> Result<String, Trouble> {
        let mut wanted = ListParams { limit: paged.then_some(limits::KUBE_PAGE), ..ListParams::default() };
        let mut listed = BTreeMap::new();
        let mut version = None;
        loop {
            let page = timeout(limits::KUBE_LIST, api.list(&wanted)).await;
            let page = page.map_err(|_| Trouble::Away(format!("no page within {:?}", limits::KUBE_LIST)))?;
            let page = page.map_err(|error| Trouble::of(&error))?;
            for object in page.items {
                let (name, taken) = (self.take)(object);
                if let Some(object) = shared.judge(self.resource, &name, taken) {
                    listed.insert(name, object);
                }
                // Beyond it nothing is kept, but counted.
                if listed.len() > 2 * limits::KUBE_OBJECTS {
                    return Err(Trouble::Unreadable(format!("more than {} objects", 2 * limits::KUBE_OBJECTS)));
                }
            }
            // That of the first page is that of the list.
            version = version.or(page.metadata.resource_version.filter(|version| !version.is_empty()));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => wanted = wanted.continue_token(&token),
                None => break,
            }
        }
        let version = version.ok_or_else(|| Trouble::Unreadable("a list without resourceVersion".to_owned()))?;
        tracing::debug!(resource = self.resource.name(), objects = listed.len(), version, "Listed");
        shared.replace(self.resource, listed);
        Ok(version)
    }

    /// What changes after version `at`, until the watch ends; `at` is moved on.
    async fn watch(&self, api: &Api<K>, at: &mut String, shared: &Shared, reach: &Reach) -> Result<(), Trouble> {
        // Spread, so that not every agent's watches end at once.
        let seconds = limits::KUBE_AGENT_WATCH;
        let wanted = WatchParams { bookmarks: true, ..WatchParams::default() };
        let wanted = wanted.timeout(fastrand::u32(seconds..=seconds + seconds / 2));
        let events = timeout(limits::KUBE_CALL, api.watch(&wanted, at)).await;
        let events = events.map_err(|_| Trouble::Away(format!("no answer within {:?}", limits::KUBE_CALL)))?;
        let mut events = pin!(events.map_err(|error| Trouble::of(&error))?);
        shared.well(self.resource);
        loop {
            let event = match timeout(limits::KUBE_SILENCE, events.next()).await {
                // What went dead without a word looks like what has nothing to say: going on elsewhere costs little.
                Err(_) | Ok(None) => return Ok(()),
                Ok(Some(event)) => event.map_err(|error| Trouble::of(&error))?,
            };
            reach.heard();
            let moved = match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    let moved = object.meta().resource_version.clone();
                    let (name, taken) = (self.take)(object);
                    if let Some(object) = shared.judge(self.resource, &name, taken) {
                        shared.put(self.resource, name, object);
                    }
                    moved
                }
                WatchEvent::Deleted(object) => {
                    let moved = object.meta().resource_version.clone();
                    shared.remove(self.resource, &super::store::name(object.meta()));
                    moved
                }
                WatchEvent::Bookmark(bookmark) => Some(bookmark.metadata.resource_version),
                WatchEvent::Error(status) => return Err(Trouble::of(&kube::Error::Api(status))),
            };
            match moved.filter(|version| !version.is_empty()) {
                Some(version) => *at = version,
                None => return Err(Trouble::Unreadable("an event without resourceVersion".to_owned())),
            }
        }
    }
}
