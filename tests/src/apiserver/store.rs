//! What the stand-in holds: objects with versions, and the history that watches are told from.
//!
//! As in etcd one number counts every change of any object, and old history can be compacted away.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use serde_json::{Value, json};

use super::kinds::Kind;

/// Changes that are remembered at most; a watch that asks for older ones is told that they are gone.
const HISTORY: usize = 200_000;

/// What identifies an object. Ordered as lists are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub group: &'static str,
    pub plural: &'static str,
    pub namespace: String,
    pub name: String,
}

impl Key {
    pub fn new(kind: &Kind, namespace: &str, name: &str) -> Self {
        Self { group: kind.group, plural: kind.plural, namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// Of an object of the kind.
    pub fn of(kind: &Kind, object: &Value) -> Self {
        let part = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
        Self::new(kind, if kind.namespaced { part("namespace") } else { "" }, part("name"))
    }

    pub fn is_of(&self, kind: &Kind) -> bool {
        self.group == kind.group && self.plural == kind.plural
    }
}

/// An object, and its JSON.
#[derive(Debug, Clone)]
pub struct Stored {
    pub value: Arc<Value>,
    pub text: Arc<str>,
}

impl Stored {
    fn new(value: Value) -> Self {
        Self { text: value.to_string().into(), value: Arc::new(value) }
    }
}

/// One change of one object.
#[derive(Debug, Clone)]
pub struct Change {
    pub version: u64,
    pub key: Key,
    /// As it was before; `None` where it was made.
    pub before: Option<Stored>,
    /// As it is now; of one that is gone as it was last.
    pub after: Stored,
    pub gone: bool,
}

#[derive(Debug, Default)]
pub struct Store {
    version: u64,
    objects: BTreeMap<Key, Stored>,
    history: VecDeque<Change>,
    /// Up to this version nothing is remembered.
    compacted: u64,
}

impl Store {
    /// The version of the last change; never 0, which means *any* to a watch.
    pub fn version(&self) -> u64 {
        self.version + 1
    }

    pub fn compacted(&self) -> u64 {
        self.compacted
    }

    pub fn get(&self, key: &Key) -> Option<&Stored> {
        self.objects.get(key)
    }

    /// All of a kind, in order.
    pub fn all<'a>(&'a self, kind: &'a Kind) -> impl Iterator<Item = (&'a Key, &'a Stored)> {
        let first = Key::new(kind, "", "");
        self.objects.range(first..).take_while(|(key, _)| key.is_of(kind))
    }

    /// Makes or replaces an object and gives it as it is stored.
    pub fn put(&mut self, key: Key, mut object: Value) -> Stored {
        let before = self.objects.get(&key).cloned();
        self.version += 1;
        let version = self.version();
        let old = before.as_ref().map_or(&Value::Null, |before| &*before.value);
        let generation = old["metadata"]["generation"].as_u64().unwrap_or(0);
        let same = before.is_some() && old["spec"] == object["spec"];
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.insert("resourceVersion".to_owned(), json!(version.to_string()));
            metadata.insert("generation".to_owned(), json!(if same { generation } else { generation + 1 }));
            for (field, first) in
                [("uid", json!(format!("uid-{version}"))), ("creationTimestamp", json!("2026-01-01T00:00:00Z"))]
            {
                let known = Some(&old["metadata"][field]).filter(|known| !known.is_null()).cloned();
                metadata.entry(field).or_insert_with(|| known.unwrap_or(first));
            }
        }
        let after = Stored::new(object);
        self.objects.insert(key.clone(), after.clone());
        self.remember(Change { version, key, before, after: after.clone(), gone: false });
        after
    }

    /// Takes an object away and gives what it was.
    pub fn remove(&mut self, key: &Key) -> Option<Stored> {
        let before = self.objects.remove(key)?;
        self.version += 1;
        let version = self.version();
        let mut last = Value::clone(&before.value);
        last["metadata"]["resourceVersion"] = json!(version.to_string());
        let after = Stored::new(last);
        self.remember(Change { version, key: key.clone(), before: Some(before), after: after.clone(), gone: true });
        Some(after)
    }

    fn remember(&mut self, change: Change) {
        self.history.push_back(change);
        if self.history.len() > HISTORY
            && let Some(oldest) = self.history.pop_front()
        {
            self.compacted = oldest.version;
        }
    }

    /// Forgets the history: whoever asks for it must list again.
    pub fn compact(&mut self) {
        self.history.clear();
        self.compacted = self.version();
    }

    /// Changes after a version, in order; `None` where they are not remembered any more.
    pub fn since(&self, version: u64) -> Option<impl Iterator<Item = &Change>> {
        if version < self.compacted {
            return None;
        }
        let first = self.history.partition_point(|change| change.version <= version);
        Some(self.history.range(first..))
    }
}
