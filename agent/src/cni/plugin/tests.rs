//! Calls as runtimes make them, and what the plugin answers, with an agent that is there, refuses, or is not there.

use std::{cell::RefCell, path::Path};

use super::*;
use crate::cluster::{Membership, Snapshot};

/// An agent with one answer for everything, and what it was asked; `None` is one that is not there.
struct Agent {
    answer: Option<Answer>,
    asked: RefCell<Vec<Question>>,
    known: Option<Known>,
}

impl World for Agent {
    fn ask(&self, socket: &Path, question: &Question, _: Instant) -> io::Result<Answer> {
        assert_eq!(socket, Path::new("/run/lab/cni.sock"));
        self.asked.borrow_mut().push(question.clone());
        self.answer.clone().ok_or_else(|| io::ErrorKind::ConnectionRefused.into())
    }

    fn known(&self, state_dir: &Path) -> io::Result<Known> {
        assert_eq!(state_dir, Path::new("/var/lib/lab"));
        self.known.clone().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn agent(answer: Option<Answer>) -> Agent {
    Agent { answer, asked: RefCell::default(), known: None }
}

fn knowing(says: &[(&str, Membership)]) -> Agent {
    let namespaces = says.iter().map(|(name, says)| ((*name).into(), *says)).collect();
    let snapshot = Snapshot { namespaces: std::sync::Arc::new(namespaces), ..Snapshot::default() };
    Agent { known: Some(Known::of(&snapshot, "n")), ..agent(None) }
}

fn refused() -> Answer {
    Answer::Refused { reason: "inbound_probe".into(), detail: "nobody answers".into() }
}

fn environment(command: &str) -> Environment {
    Environment {
        command: command.into(),
        container: "c0ffee".into(),
        netns: "/var/run/netns/cni-1".into(),
        arguments: "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_INFRA_CONTAINER_ID=c0ffee;\
                    K8S_POD_UID=u-1"
            .into(),
    }
}

fn made() -> Value {
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [
            { "name": "cni0", "mac": "aa" },
            { "name": "veth1" },
            { "name": "eth0", "sandbox": "/var/run/netns/cni-1" },
        ],
        "ips": [
            { "address": "10.0.0.1/24", "interface": 0 },
            { "address": "10.0.0.7/24", "interface": 2, "gateway": "10.0.0.1" },
            { "address": "fd00::7/64" },
        ],
        "dns": {},
    })
}

fn configuration() -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "net", "type": "heddle-cni", "socket": "/run/lab/cni.sock",
        "stateDir": "/var/lib/lab", "timeoutSeconds": 3, "prevResult": made(),
    })
}

fn run(command: &str, configuration: &Value, agent: &Agent) -> Result<Option<Value>, Failure> {
    call(&environment(command), configuration.to_string().as_bytes(), agent)
}

#[test]
fn an_add_asks_about_the_pod_and_hands_on_what_was_made() {
    for answer in [Answer::Captured, Answer::NotEnrolled] {
        let agent = agent(Some(answer));
        assert_eq!(run("ADD", &configuration(), &agent).unwrap(), Some(made()));
        let asked = agent.asked.take();
        assert_eq!(asked.len(), 1);
        assert_eq!(asked[0].pod, PodName { namespace: "shop".into(), name: "cart".into(), uid: "u-1".into() });
        assert_eq!((&*asked[0].container, asked[0].verb), ("c0ffee", Verb::Add));
        assert_eq!(asked[0].netns, Path::new("/var/run/netns/cni-1"));
        assert_eq!(asked[0].addresses, ["10.0.0.7".parse::<IpAddr>().unwrap(), "fd00::7".parse().unwrap()]);
        assert_eq!(asked[0].patience, 3_000);
    }
}

#[test]
fn an_add_without_the_agents_word_fails_with_try_again_later() {
    for answer in [refused(), Answer::Noted] {
        let failure = run("ADD", &configuration(), &agent(Some(answer))).unwrap_err();
        assert_eq!(failure.code, Code::TryAgainLater);
        assert!(failure.message.contains("shop/cart"), "{failure:?}");
    }
    for agent in
        [agent(None), knowing(&[("shop", Membership::Enrolled)]), knowing(&[("elsewhere", Membership::Unsaid)])]
    {
        let failure = run("ADD", &configuration(), &agent).unwrap_err();
        assert_eq!(failure.code, Code::TryAgainLater);
        assert!(failure.message.contains("unreachable"), "{failure:?}");
    }
}

#[test]
fn a_pod_that_is_known_not_to_be_in_the_mesh_needs_no_agent() {
    for says in [Membership::Unsaid, Membership::OptedOut] {
        assert_eq!(run("ADD", &configuration(), &knowing(&[("shop", says)])).unwrap(), Some(made()));
    }
    // An agent that is there has the last word.
    let refusing = Agent { answer: Some(refused()), ..knowing(&[("shop", Membership::Unsaid)]) };
    assert_eq!(run("ADD", &configuration(), &refusing).unwrap_err().code, Code::TryAgainLater);
}

#[test]
fn a_container_that_is_no_pod_passes() {
    let agent = agent(None);
    let environment = Environment { arguments: "A=B;K8S_POD_NAME=".into(), ..environment("ADD") };
    assert_eq!(call(&environment, configuration().to_string().as_bytes(), &agent).unwrap(), Some(made()));
    assert!(agent.asked.take().is_empty());
}

#[test]
fn a_call_that_is_not_right_gets_the_code_that_the_specification_has_for_it() {
    let agent = agent(Some(Answer::Captured));
    let with = |key: &str, value: Value| {
        let mut configuration = configuration();
        configuration[key] = value;
        configuration
    };
    let code = |command: &str, configuration: &Value| run(command, configuration, &agent).unwrap_err().code;
    assert_eq!(code("", &configuration()), Code::InvalidEnvironment);
    assert_eq!(code("PURGE", &configuration()), Code::InvalidEnvironment);
    for version in ["0.2.0", "0.3.0", "2.0.0", ""] {
        assert_eq!(code("ADD", &with("cniVersion", version.into())), Code::IncompatibleVersion, "{version}");
    }
    assert_eq!(code("ADD", &with("prevResult", Value::Null)), Code::InvalidConfiguration);
    assert_eq!(code("ADD", &with("prevResult", json!({ "ips": [] }))), Code::InvalidConfiguration);
    assert_eq!(code("ADD", &with("timeoutSeconds", "soon".into())), Code::Decode);
    assert_eq!(call(&environment("ADD"), b"[", &agent).unwrap_err().code, Code::Decode);
    for environment in [
        Environment { container: String::new(), ..environment("ADD") },
        Environment { netns: String::new(), ..environment("ADD") },
        Environment { arguments: "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b".into(), ..environment("ADD") },
    ] {
        let failed = call(&environment, configuration().to_string().as_bytes(), &agent).unwrap_err();
        assert_eq!(failed.code, Code::InvalidEnvironment, "{environment:?}");
    }
    assert!(agent.asked.take().is_empty());
}

#[test]
fn a_del_never_fails() {
    for world in [agent(Some(Answer::Noted)), agent(None), agent(Some(refused()))] {
        assert_eq!(run("DEL", &configuration(), &world).unwrap(), None);
        assert_eq!(world.asked.take()[0].verb, Verb::Del);
        // A runtime that has lost its record of the pod knows neither netns nor result.
        let mut bare = configuration();
        bare["prevResult"] = Value::Null;
        let forgotten = Environment { netns: String::new(), ..environment("DEL") };
        assert_eq!(call(&forgotten, bare.to_string().as_bytes(), &world).unwrap(), None);
        assert_eq!(world.asked.take()[0].container, "c0ffee");
        assert_eq!(call(&environment("DEL"), b"nonsense", &world).unwrap(), None);
        assert_eq!(
            call(&Environment { command: "DEL".into(), ..Environment::default() }, b"{}", &world).unwrap(),
            None
        );
    }
}

#[test]
fn a_check_fails_only_where_the_agent_says_so() {
    for answer in [Some(Answer::Captured), Some(Answer::NotEnrolled), None] {
        assert_eq!(run("CHECK", &configuration(), &agent(answer)).unwrap(), None);
    }
    assert_eq!(run("CHECK", &configuration(), &agent(Some(refused()))).unwrap_err().code, Code::Uncaptured);
}

#[test]
fn version_status_and_gc_need_no_agent() {
    let agent = agent(None);
    let said = run("VERSION", &json!({ "cniVersion": "0.4.0" }), &agent).unwrap().unwrap();
    assert_eq!(said["cniVersion"], "0.4.0");
    assert_eq!(said["supportedVersions"], json!(VERSIONS));
    assert_eq!(run("VERSION", &json!({}), &agent).unwrap().unwrap()["cniVersion"], "1.1.0");
    for command in ["STATUS", "GC"] {
        assert_eq!(run(command, &configuration(), &agent).unwrap(), None);
        assert_eq!(run(command, &json!({ "cniVersion": "9" }), &agent).unwrap_err().code, Code::IncompatibleVersion);
    }
    assert!(agent.asked.take().is_empty());
}

#[test]
fn an_entry_may_not_ask_for_more_patience_than_a_runtime_has() {
    let mut entry: Configuration = serde_json::from_value(configuration()).unwrap();
    entry.timeout_seconds = Some(u64::MAX);
    assert_eq!(entry.patience(), limits::CNI_WAIT_MAX);
    entry.timeout_seconds = None;
    assert_eq!(entry.patience(), limits::CNI_WAIT);
}
