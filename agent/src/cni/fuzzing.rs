//! Fuzzing of the node's CNI configuration and of what plugin and agent say to each other: see [`crate::fuzzing`].

use std::{io, path::Path, time::Instant};

use serde_json::Value;

use super::{
    PLUGIN,
    known::Known,
    list::{self, Entry},
    plugin::{self, Environment, World},
    protocol::{Answer, Question, read},
};

/// An agent that is not there, and has left nothing.
struct Nobody;

impl World for Nobody {
    fn ask(&self, _: &Path, _: &Question, _: Instant) -> io::Result<Answer> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }

    fn known(&self, _: &Path) -> io::Result<Known> {
        Err(io::ErrorKind::NotFound.into())
    }
}

/// Lists are merged or refused, messages read or refused; and no ADD of a pod passes without an agent.
pub fn cni(data: &[u8]) {
    let _read_or_refused = (read::<Question>(data).is_ok(), read::<Answer>(data).is_ok());
    let environment = |arguments: &str| Environment {
        command: "ADD".into(),
        container: "c".into(),
        netns: "/n".into(),
        arguments: arguments.into(),
    };
    let pod = environment("K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_UID=c");
    assert!(plugin::call(&pod, data, &Nobody).is_err(), "a pod passed that nobody vouched for");
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _any = plugin::call(&environment(text), b"{\"cniVersion\":\"1.0.0\",\"prevResult\":{}}", &Nobody);
    let entry = Entry { socket: "/s".into(), state_dir: "/d".into() };
    if let Ok(merged) = list::merge(text, &entry) {
        let last =
            serde_json::from_str::<Value>(&merged).ok().and_then(|list| list["plugins"].as_array()?.last().cloned());
        assert_eq!(last.map(|last| last["type"].clone()), Some(PLUGIN.into()));
        assert_eq!(list::merge(&merged, &entry).as_deref(), Ok(&*merged));
    }
    if let Ok(made) = list::list_of(text, "x.conf", &entry) {
        assert_eq!(list::merge(&made, &entry).as_deref(), Ok(&*made));
        assert_eq!(list::made_from(&made).as_deref(), Some("x.conf"));
    }
}
