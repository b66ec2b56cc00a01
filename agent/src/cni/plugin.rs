//! What the plugin does with a call of the container runtime (CNI specification 0.3.1 to 1.1.0): it changes nothing of a network,
//! asks the agent whether the pod is captured, and hands on what the plugins before it have made.
//!
//! It never lets a pod of the mesh start that nobody vouches for: an ADD without the agent's word ends with *try again later*, which is
//! what kubelet does. Only a pod that is known not to be in the mesh passes without it.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::IpAddr,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    SOCKET, STATE_DIR,
    known::Known,
    protocol::{self, Answer, PodName, Question, VERSION, Verb},
};
use crate::life::limits;

/// Versions of the CNI specification that are spoken.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// What a call ends with when it fails: the specification's error object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: Code,
    pub message: String,
    pub details: String,
}

/// The specification's error codes, and one of our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    IncompatibleVersion = 1,
    InvalidEnvironment = 4,
    Io = 5,
    Decode = 6,
    InvalidConfiguration = 7,
    TryAgainLater = 11,
    /// Of CHECK: the pod is in the mesh and its capture is not proven.
    Uncaptured = 100,
}

fn failure(code: Code, message: impl Into<String>) -> Failure {
    Failure { code, message: message.into(), details: String::new() }
}

/// What the runtime says of a call in the environment; absent is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    pub command: String,
    pub container: String,
    pub netns: String,
    pub arguments: String,
}

impl Environment {
    /// That of this process.
    #[must_use]
    pub fn of_process() -> Self {
        let get = |name| std::env::var(name).unwrap_or_default();
        Self {
            command: get("CNI_COMMAND"),
            container: get("CNI_CONTAINERID"),
            netns: get("CNI_NETNS"),
            arguments: get("CNI_ARGS"),
        }
    }
}

/// The plugin's entry as the runtime hands it over, with what the list and the plugins before add.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Configuration {
    #[serde(default)]
    cni_version: String,
    #[serde(default)]
    prev_result: Option<Value>,
    /// Where the agent answers.
    #[serde(default = "socket")]
    socket: PathBuf,
    /// Where it leaves what it knows.
    #[serde(default = "state_dir")]
    state_dir: PathBuf,
    /// How long it is waited for (seconds).
    #[serde(default)]
    timeout_seconds: Option<u64>,
}

fn socket() -> PathBuf {
    SOCKET.into()
}

fn state_dir() -> PathBuf {
    STATE_DIR.into()
}

impl Configuration {
    fn patience(&self) -> Duration {
        self.timeout_seconds.map_or(limits::CNI_WAIT, Duration::from_secs).min(limits::CNI_WAIT_MAX)
    }
}

/// Whom the plugin asks.
pub trait World {
    /// # Errors
    /// When the agent does not answer in time.
    fn ask(&self, socket: &std::path::Path, question: &Question, deadline: Instant) -> io::Result<Answer>;
    /// # Errors
    /// When nothing that was left can be read.
    fn known(&self, state_dir: &std::path::Path) -> io::Result<Known>;
}

/// The agent of this node.
#[derive(Debug, Clone, Copy)]
pub struct Node;

impl World for Node {
    fn ask(&self, socket: &std::path::Path, question: &Question, deadline: Instant) -> io::Result<Answer> {
        protocol::ask(socket, question, deadline)
    }

    fn known(&self, state_dir: &std::path::Path) -> io::Result<Known> {
        Known::read(state_dir)
    }
}

/// The whole program: reads the call, answers on stdout, gives the status to end with.
#[must_use]
pub fn main() -> ExitCode {
    let environment = Environment::of_process();
    let mut stdin = Vec::new();
    let read = io::stdin().lock().take(limits::CNI_STDIN as u64 + 1).read_to_end(&mut stdin);
    let result = match read {
        Err(error) => Err(failure(Code::Io, format!("stdin: {error}"))),
        Ok(_) if stdin.len() > limits::CNI_STDIN => {
            Err(failure(Code::Decode, format!("a configuration of more than {} bytes", limits::CNI_STDIN)))
        }
        Ok(_) => call(&environment, &stdin, &Node),
    };
    let (said, status) = match result {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(said)) => (said, ExitCode::SUCCESS),
        Err(Failure { code, message, details }) => {
            let version = version(&stdin);
            let error = json!({ "cniVersion": version, "code": code as u32, "msg": message, "details": details });
            (error, ExitCode::FAILURE)
        }
    };
    match writeln!(io::stdout().lock(), "{said}") {
        Ok(()) => status,
        // Who can't be told of success must not take silence for it.
        Err(_) => ExitCode::FAILURE,
    }
}

/// The version that a call's configuration asks for; the newest where it can't be read.
fn version(stdin: &[u8]) -> String {
    let asked = serde_json::from_slice::<Value>(stdin).ok();
    let asked = asked.as_ref().and_then(|asked| asked["cniVersion"].as_str());
    asked.filter(|asked| VERSIONS.contains(asked)).unwrap_or(VERSIONS[VERSIONS.len() - 1]).to_owned()
}

/// One call. Gives what is said on stdout.
///
/// # Errors
/// With what the specification has for it.
pub fn call(environment: &Environment, stdin: &[u8], world: &impl World) -> Result<Option<Value>, Failure> {
    let decode = |error: serde_json::Error| failure(Code::Decode, format!("the configuration on stdin: {error}"));
    match &*environment.command {
        "VERSION" => {
            return Ok(Some(json!({ "cniVersion": version(stdin), "supportedVersions": VERSIONS })));
        }
        // Whatever is wrong with the call, there is nothing that would be left behind.
        "DEL" => {
            if let Ok(configuration) = serde_json::from_slice::<Configuration>(stdin) {
                del(environment, &configuration, world);
            }
            return Ok(None);
        }
        "ADD" | "CHECK" | "STATUS" | "GC" => {}
        "" => return Err(failure(Code::InvalidEnvironment, "CNI_COMMAND is not set")),
        other => return Err(failure(Code::InvalidEnvironment, format!("CNI_COMMAND {other:?} is not known"))),
    }
    let configuration: Configuration = serde_json::from_slice(stdin).map_err(decode)?;
    if !VERSIONS.contains(&&*configuration.cni_version) {
        let message = format!("cniVersion {:?} is none of {}", configuration.cni_version, VERSIONS.join(", "));
        return Err(failure(Code::IncompatibleVersion, message));
    }
    match &*environment.command {
        "ADD" => add(environment, configuration, world).map(Some),
        "CHECK" => check(environment, &configuration, world).map(|()| None),
        // Pods that are not in the mesh start without the agent, and it keeps nothing that would have to be collected.
        _ => Ok(None),
    }
}

fn add(environment: &Environment, configuration: Configuration, world: &impl World) -> Result<Value, Failure> {
    let Some(made) = &configuration.prev_result else {
        let message = "there is no prevResult: heddle-cni must stand behind the plugin that makes the interface";
        return Err(failure(Code::InvalidConfiguration, message));
    };
    let question = question(Verb::Add, environment, &configuration)?;
    // Not a pod: of nobody's mesh.
    let Some(question) = question else { return Ok(made.clone()) };
    if question.addresses.is_empty() {
        return Err(failure(Code::InvalidConfiguration, "prevResult has no address of the pod"));
    }
    let deadline = Instant::now() + configuration.patience();
    let (reason, detail) = match world.ask(&configuration.socket, &question, deadline) {
        Ok(Answer::NotEnrolled | Answer::Captured) => return Ok(made.clone()),
        Ok(Answer::Refused { reason, detail }) => (reason, detail),
        Ok(Answer::Noted) => ("protocol".to_owned(), "the agent answers another question".to_owned()),
        Err(unreachable) => {
            let unreachable = format!("agent at {}: {unreachable}", configuration.socket.display());
            match world.known(&configuration.state_dir) {
                Ok(known) => match known.enrolled(&question.pod) {
                    Some(false) => return Ok(made.clone()),
                    Some(true) => ("unreachable".to_owned(), unreachable),
                    None => {
                        ("unreachable".to_owned(), format!("{unreachable}; whether the pod is enrolled is not known"))
                    }
                },
                Err(error) => {
                    let folder = configuration.state_dir.display();
                    (
                        "unreachable".to_owned(),
                        format!("{unreachable}; nor is it known who is enrolled: {folder}: {error}"),
                    )
                }
            }
        }
    };
    let PodName { namespace, name, .. } = &question.pod;
    let message = format!("heddle: pod {namespace}/{name} is not captured, so it can't start yet: {reason}");
    Err(Failure { code: Code::TryAgainLater, message, details: detail })
}

/// An agent that does not answer is no fault of the pod's network: the programs that were proven are pinned.
fn check(environment: &Environment, configuration: &Configuration, world: &impl World) -> Result<(), Failure> {
    let Some(question) = question(Verb::Check, environment, configuration)? else { return Ok(()) };
    let deadline = Instant::now() + configuration.patience();
    match world.ask(&configuration.socket, &question, deadline) {
        Ok(Answer::Refused { reason, detail }) => {
            let PodName { namespace, name, .. } = &question.pod;
            let message = format!("heddle: pod {namespace}/{name} is not captured: {reason}");
            Err(Failure { code: Code::Uncaptured, message, details: detail })
        }
        _ => Ok(()),
    }
}

/// The agent finds out by itself, later, what it is not told.
fn del(environment: &Environment, configuration: &Configuration, world: &impl World) {
    if let Ok(Some(question)) = question(Verb::Del, environment, configuration) {
        let deadline = Instant::now() + limits::CNI_QUESTION;
        let _noted_or_found_out_later = world.ask(&configuration.socket, &question, deadline);
    }
}

/// What to ask; `None` for a container that is no pod of Kubernetes.
fn question(verb: Verb, environment: &Environment, configuration: &Configuration) -> Result<Option<Question>, Failure> {
    let arguments = arguments(&environment.arguments);
    let argument = |name: &str| arguments.get(name).map(|value| (*value).to_owned());
    let (Some(namespace), Some(name)) = (argument("K8S_POD_NAMESPACE"), argument("K8S_POD_NAME")) else {
        return Ok(None);
    };
    let missing = |what: &str| failure(Code::InvalidEnvironment, format!("{what} is not set"));
    let uid = argument("K8S_POD_UID").ok_or_else(|| missing("K8S_POD_UID (in CNI_ARGS; the runtime is too old)"))?;
    if environment.container.is_empty() {
        return Err(missing("CNI_CONTAINERID"));
    }
    if verb == Verb::Add && environment.netns.is_empty() {
        return Err(missing("CNI_NETNS"));
    }
    Ok(Some(Question {
        version: VERSION,
        verb,
        pod: PodName { namespace, name, uid },
        container: environment.container.clone(),
        netns: whole(&environment.netns),
        addresses: configuration.prev_result.as_ref().map(addresses).unwrap_or_default(),
        patience: u64::try_from(configuration.patience().as_millis()).unwrap_or(u64::MAX),
    }))
}

/// The path without links: the agent, which opens it by way of this process, would follow an absolute one in its own file system.
fn whole(path: &str) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.into())
}

/// `CNI_ARGS`: `KEY=VALUE;KEY=VALUE`. Empty values are absent.
fn arguments(text: &str) -> BTreeMap<&str, &str> {
    text.split(';').filter_map(|pair| pair.split_once('=')).filter(|(_, value)| !value.is_empty()).collect()
}

/// The pod's addresses in a result: those of interfaces inside a sandbox, and those of none.
fn addresses(result: &Value) -> Vec<IpAddr> {
    let inside = |ip: &Value| match ip["interface"].as_u64() {
        Some(index) => {
            let sandbox = usize::try_from(index).ok().and_then(|index| result["interfaces"][index]["sandbox"].as_str());
            sandbox.is_some_and(|sandbox| !sandbox.is_empty())
        }
        None => true,
    };
    let address = |ip: &Value| {
        let text = ip["address"].as_str()?;
        text.split_once('/').map_or(text, |(address, _)| address).parse::<IpAddr>().ok()
    };
    let mut found = Vec::new();
    for address in result["ips"].as_array().into_iter().flatten().filter(|ip| inside(ip)).filter_map(address) {
        let address = address.to_canonical();
        if !found.contains(&address) {
            found.push(address);
        }
    }
    found
}

#[cfg(test)]
mod tests;
