//! An event on a pod that stays uncaptured: why, and what to do about it, where `kubectl describe pod` shows it.
//!
//! Which pods are told of and when is decided by a pure table: a pod that is just being captured is not told of, the same reason not
//! again before long, and a node full of failures no faster than the API server likes.

use std::{collections::HashMap, sync::Arc, time::Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

use crate::{
    life::{budget::Bucket, limits},
    telemetry::PodReport,
};

/// Who writes the events.
const CONTROLLER: &str = "heddle.dev/agent";
const REASON: &str = "NotCaptured";
const ACTION: &str = "Capture";

pub(super) fn recorder(client: Client, node: &str) -> Recorder {
    Recorder::new(client, Reporter { controller: CONTROLLER.to_owned(), instance: Some(node.to_owned()) })
}

/// What to do where a pod is not captured for this reason.
#[must_use]
pub fn fix(reason: &str) -> &'static str {
    match reason {
        "place_unknown" | "netns" | "cgroup" => {
            "see whether the agent's pod mounts the host's /proc, /sys/fs/cgroup and /run/netns, and whether the node has cgroup v2"
        }
        "no_address" => "wait until the pod has an address; if it gets none, see the node's CNI plugin",
        "programs" | "link" => {
            "run `heddle check` on the node: its kernel refuses a program, or another holds the hook"
        }
        "bpffs" | "pins" | "record" | "map" => {
            "see whether /sys/fs/bpf of the host is a bpffs that the agent's pod mounts writable"
        }
        "route" | "sysctl" | "listener" | "socket" => {
            "see the agent's log: the pod's network namespace does not take what it needs"
        }
        "slots_full" | "destinations_full" => "spread the pods over more nodes: a table of this node's kernel is full",
        "probe" | "unproven" | "not_served" => {
            "see the agent's log, and whether other eBPF programs on the node (`heddle check`) change connections of the pod"
        }
        _ => "run `heddle status` on the node, and see the agent's log",
    }
}

/// What is to be told of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Uncaptured {
    uid: Arc<str>,
    namespace: Arc<str>,
    name: Arc<str>,
    reason: &'static str,
    detail: String,
}

impl Uncaptured {
    pub fn pod(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// For people; at most what an event's note may have.
    pub fn note(&self) -> String {
        let fix = fix(self.reason);
        let head = format!("heddle does not capture this pod: {}: ", self.reason);
        let tail = format!("; {fix}");
        let mut detail = self.detail.clone();
        let room = limits::EVENT_NOTE.saturating_sub(head.len() + tail.len());
        while detail.len() > room {
            detail.pop();
        }
        head + &detail + &tail
    }

    pub async fn publish(&self, recorder: &Recorder) -> Result<(), kube::Error> {
        let event = Event {
            type_: EventType::Warning,
            reason: REASON.to_owned(),
            note: Some(self.note()),
            action: ACTION.to_owned(),
            secondary: None,
        };
        let pod = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(self.namespace.to_string()),
            name: Some(self.name.to_string()),
            uid: Some(self.uid.to_string()),
            ..ObjectReference::default()
        };
        recorder.publish(&event, &pod).await
    }
}

/// Since when a pod is uncaptured, and what was told of it last.
#[derive(Debug)]
struct Page {
    since: Instant,
    told: Option<(&'static str, Instant)>,
}

/// What was told. A pod that is captured, or gone, is forgotten.
#[derive(Debug)]
pub(super) struct Book {
    pages: HashMap<Arc<str>, Page>,
    rate: Bucket,
}

impl Default for Book {
    fn default() -> Self {
        Self { pages: HashMap::new(), rate: Bucket::new(limits::EVENTS) }
    }
}

impl Book {
    /// What is to be told now, the longest uncaptured first; as much as the rate allows.
    pub fn due(&mut self, pods: &[PodReport], now: Instant) -> Vec<Uncaptured> {
        let uncaptured: HashMap<_, _> =
            pods.iter().filter(|pod| !pod.captured()).map(|pod| (Arc::clone(&pod.uid), pod)).collect();
        self.pages.retain(|uid, _| uncaptured.contains_key(uid));
        for uid in uncaptured.keys() {
            self.pages.entry(Arc::clone(uid)).or_insert(Page { since: now, told: None });
        }
        let mut due: Vec<_> = self
            .pages
            .iter()
            .filter(|(_, page)| now.duration_since(page.since) >= limits::EVENT_AFTER)
            .filter_map(|(uid, page)| uncaptured.get(uid).map(|pod| (page, *pod)))
            .filter(|(page, pod)| match page.told {
                Some((reason, at)) => reason != pod.reason() || now.duration_since(at) >= limits::EVENT_AGAIN,
                None => true,
            })
            .collect();
        due.sort_by_key(|(page, _)| page.since);
        let due: Vec<Uncaptured> = due
            .into_iter()
            .map(|(_, pod)| Uncaptured {
                uid: Arc::clone(&pod.uid),
                namespace: Arc::clone(&pod.namespace),
                name: Arc::clone(&pod.name),
                reason: pod.reason(),
                detail: pod.detail().to_owned(),
            })
            .collect();
        due.into_iter().take_while(|_| self.rate.take(now)).collect()
    }

    /// Notes that it was told.
    pub fn told(&mut self, event: &Uncaptured, now: Instant) {
        if let Some(page) = self.pages.get_mut(&event.uid) {
            page.told = Some((event.reason, now));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::capture::PodState;

    fn pod(name: &str, reason: &'static str) -> PodReport {
        let state = match reason {
            "" => PodState::Captured,
            reason => PodState::Uncaptured { reason, detail: "nobody knows".to_owned() },
        };
        PodReport {
            uid: format!("uid-{name}").into(),
            namespace: "shop".into(),
            name: name.into(),
            state,
            counts: heddle_common::PodCounts::default(),
        }
    }

    #[test]
    fn a_pod_that_stays_uncaptured_is_told_of_once_for_each_reason_and_again_after_long() {
        let (start, mut book) = (Instant::now(), Book::default());
        let mut look = |seconds: u64, reason| {
            let now = start + Duration::from_secs(seconds);
            let due = book.due(&[pod("web", reason)], now);
            due.iter().for_each(|event| book.told(event, now));
            due.iter().map(|event| event.reason).collect::<Vec<_>>()
        };
        let after = limits::EVENT_AFTER.as_secs();
        let again = limits::EVENT_AGAIN.as_secs();
        assert!(look(0, "place_unknown").is_empty());
        assert!(look(after - 1, "place_unknown").is_empty(), "it may just be starting");
        assert_eq!(look(after, "place_unknown"), ["place_unknown"]);
        assert!(look(after + 1, "place_unknown").is_empty());
        assert_eq!(look(after + 2, "probe"), ["probe"], "another reason");
        assert_eq!(look(after + 2 + again, "probe"), ["probe"]);
        assert!(look(2 * after + again, "").is_empty());
        assert!(look(2 * after + again + 1, "probe").is_empty(), "its time begins anew");
    }

    #[test]
    fn a_node_full_of_failures_tells_of_them_slowly_and_of_each() {
        let (start, mut book) = (Instant::now(), Book::default());
        let pods: Vec<_> = (0..100).map(|number| pod(&format!("web-{number}"), "programs")).collect();
        assert!(book.due(&pods, start).is_empty());
        let mut told = std::collections::HashSet::new();
        let mut now = start + limits::EVENT_AFTER;
        let first = book.due(&pods, now);
        assert_eq!(first.len(), limits::EVENTS.burst as usize);
        for event in &first {
            book.told(event, now);
            told.insert(event.pod());
        }
        for _ in 0..100 {
            now += Duration::from_secs(1);
            for event in book.due(&pods, now) {
                book.told(&event, now);
                assert!(told.insert(event.pod()), "each once");
            }
        }
        assert_eq!(told.len(), 100);
    }

    #[test]
    fn a_note_says_why_and_what_to_do_within_its_length() {
        let event = |detail: &str| Uncaptured {
            uid: "u".into(),
            namespace: "shop".into(),
            name: "web".into(),
            reason: "place_unknown",
            detail: detail.to_owned(),
        };
        let note = event("nobody knows").note();
        assert!(note.contains("place_unknown: nobody knows; see whether"), "{note}");
        let long = event(&"ä".repeat(4_000)).note();
        assert!(long.len() <= limits::EVENT_NOTE && long.ends_with("cgroup v2"), "{long}");
    }
}
