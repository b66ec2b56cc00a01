//! Watches: a line of JSON for each change after a version, bookmarks in between, and an end after their time.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
    time::Duration,
};

use axum::{
    body::Body,
    http::header,
    response::{IntoResponse, Response},
};
use futures::stream;
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{
    Cluster, Fault, Known,
    kinds::{Kind, Target},
    requests::status,
    select::Selection,
    store::Change,
};

struct Watch {
    cluster: Arc<Cluster>,
    changed: watch::Receiver<()>,
    kind: &'static Kind,
    api_version: String,
    selection: Selection,
    since: u64,
    lines: VecDeque<String>,
    bookmark: Option<Instant>,
    end: Instant,
    /// What it asked for is gone: this was its last word.
    over: bool,
}

/// A watch from a resource version on, until its time is over or the server breaks.
pub(super) fn follow(
    cluster: Arc<Cluster>,
    target: &Target,
    selection: Selection,
    query: &BTreeMap<String, String>,
) -> Response {
    let number = |key: &str| query.get(key).and_then(|text| text.parse::<u64>().ok());
    let now = Instant::now();
    let changed = cluster.changed.subscribe();
    let mut watch = {
        let known = cluster.known();
        let bookmarks = query.get("allowWatchBookmarks").is_some_and(|wanted| wanted == "true");
        Watch {
            changed,
            kind: target.kind,
            api_version: target.api_version(),
            since: number("resourceVersion").unwrap_or(0),
            lines: VecDeque::new(),
            bookmark: bookmarks.then(|| now + known.bookmarks),
            end: now + Duration::from_secs(number("timeoutSeconds").unwrap_or(300)),
            over: false,
            selection,
            cluster: Arc::clone(&cluster),
        }
    };
    if watch.since == 0 {
        // From any version: everything there is comes first.
        let known = cluster.known();
        let all = known.store.all(watch.kind).filter(|(key, stored)| watch.selection.fits(key, &stored.value));
        watch.lines = all.map(|(_, stored)| line("ADDED", &stored.text)).collect();
        watch.since = known.store.version();
    }
    let lines = stream::unfold(watch, |mut watch| async move {
        let line = watch.next().await?;
        Some((Ok::<_, io::Error>(line), watch))
    });
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(lines)).into_response()
}

fn line(kind: &str, object: &str) -> String {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}

impl Watch {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Some(line);
            }
            if self.over {
                return None;
            }
            self.changed.mark_unchanged();
            match self.fault() {
                Some(Fault::BlackHole) => std::future::pending().await,
                Some(_) => return None,
                None => self.look(),
            }
            if !self.lines.is_empty() {
                continue;
            }
            let until = self.bookmark.map_or(self.end, |bookmark| bookmark.min(self.end));
            match timeout_at(until, self.changed.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return None,
                Err(_) if until == self.end => return None,
                Err(_) => self.mark(),
            }
        }
    }

    fn fault(&self) -> Option<Fault> {
        self.cluster.known().faults.all
    }

    /// Takes what is new.
    fn look(&mut self) {
        let known: &Known = &self.cluster.known();
        if known.hushed {
            return;
        }
        let Some(changes) = known.store.since(self.since) else {
            let gone = status(410, "Expired", &format!("too old resource version: {}", self.since));
            self.lines.push_back(line("ERROR", &gone.to_string()));
            self.over = true;
            return;
        };
        let ours = changes.filter(|change| change.key.is_of(self.kind));
        self.lines.extend(ours.filter_map(|change| event(&self.selection, change)));
        self.since = known.store.version();
    }

    fn mark(&mut self) {
        let known = self.cluster.known();
        self.bookmark = Some(Instant::now() + known.bookmarks);
        // Nothing before it may be missing: what is new and not told yet comes first.
        if known.hushed || known.store.since(self.since).is_none_or(|mut new| new.next().is_some()) {
            return;
        }
        let bookmark = json!({
            "kind": self.kind.kind,
            "apiVersion": self.api_version,
            "metadata": {"resourceVersion": self.since.to_string()},
        });
        self.lines.push_back(line("BOOKMARK", &bookmark.to_string()));
    }
}

/// How a change looks to who selects: what begins to fit was made, what ceases to is gone.
fn event(selection: &Selection, change: &Change) -> Option<String> {
    let fits = |object: &Value| selection.fits(&change.key, object);
    let before = change.before.as_ref().is_some_and(|before| fits(&before.value));
    let after = !change.gone && fits(&change.after.value);
    let kind = match (before, after) {
        (false, false) => return None,
        (false, true) => "ADDED",
        (true, true) => "MODIFIED",
        (true, false) => "DELETED",
    };
    Some(line(kind, &change.after.text))
}
