//! A rotation on a directory, and on a Secret: what each step writes, what it refuses, and that one that was broken off is finished.

use std::{
    fs,
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use axum::{Router, routing::get};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle};

use super::*;
use crate::{
    cluster::kubernetes::stand_in::ApiServer,
    identity::{
        ca::{
            source::{KeySource, Keys},
            tests::api_server_and_client,
        },
        roots::span,
        tests::support::{TestRoot, trust_domain, within},
    },
};

/// The /metrics of an agent, or of a replica of the CA, as the test wants them.
struct Agent {
    said: Arc<Mutex<String>>,
    address: std::net::SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Agent {
    async fn start() -> Self {
        Self::listen(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    /// Two at one port of different addresses, as pods are.
    async fn start_two() -> [Self; 2] {
        loop {
            let first = TcpListener::bind("127.0.0.1:0").await.unwrap();
            if let Ok(second) = TcpListener::bind(("127.0.0.2", first.local_addr().unwrap().port())).await {
                return [first, second].map(Self::listen);
            }
        }
    }

    fn listen(listener: TcpListener) -> Self {
        let said = Arc::new(Mutex::new(String::new()));
        let text = Arc::clone(&said);
        let router = Router::new().route("/metrics", get(move || async move { text.lock().unwrap().clone() }));
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { said, address, task }
    }

    fn says(&self, trusts: &[&str], holds: &[&str]) {
        let mut text = String::new();
        for root in trusts {
            text += &format!("heddle_trust_root_expiry_timestamp_seconds{{subject=\"O=x\",serial=\"{root}\"}} 2e9\n");
        }
        for root in holds {
            text += &format!(
                "heddle_certificate_expiry_timestamp_seconds{{identity=\"spiffe://x\",serial=\"1\",root_serial=\"{root}\"}} 2e9\n"
            );
        }
        *self.said.lock().unwrap() = text;
    }

    /// And that a revocation list needs this root.
    fn lists(&self, root: &str) {
        *self.said.lock().unwrap() += &format!("heddle_crl_lists_of_one_root{{root_serial=\"{root}\"}} 1\n");
    }

    /// As a replica of the CA.
    fn issues_from(&self, root: &str) {
        let text = format!("heddle_ca_issuer_expiry_timestamp_seconds{{serial=\"{root}\"}} 2e9\n");
        *self.said.lock().unwrap() = text;
    }
}

fn listed(agents: &[Agent]) -> Places {
    Places::Listed(agents.iter().map(|agent| format!("http://{}", agent.address).parse().unwrap()).collect())
}

struct Stage {
    directory: TempDir,
    old: TestRoot,
    agents: [Agent; 2],
    replicas: [Agent; 2],
    rotation: Rotation,
}

async fn stage() -> Stage {
    let directory = tempfile::Builder::new().prefix("hi-").tempdir().unwrap();
    let old = TestRoot::new("old root");
    fs::write(directory.path().join(CERTIFICATE), old.certificate.pem()).unwrap();
    fs::write(directory.path().join(KEY), old.key.serialize_pem()).unwrap();
    let agents = [Agent::start().await, Agent::start().await];
    let replicas = [Agent::start().await, Agent::start().await];
    replicas.iter().for_each(|replica| replica.issues_from(&serial(old.certificate.der())));
    let rotation = Rotation {
        store: Store::Directory(directory.path().to_owned()),
        agents: Group::agents(listed(&agents)),
        replicas: Group::replicas(listed(&replicas)),
        trust_domain: trust_domain(),
        lifetime: Duration::from_secs(86_400),
        given: None,
    };
    Stage { directory, old, agents, replicas, rotation }
}

impl Stage {
    async fn done(&self, step: Step) -> String {
        match self.rotation.step(step).await.unwrap() {
            Outcome::Done(told) => told,
            Outcome::Refused(lines) => panic!("{step:?} refused: {lines:?}"),
        }
    }

    async fn refused(&self, step: Step) -> Vec<String> {
        let before = contents(self.directory.path());
        match self.rotation.step(step).await.unwrap() {
            Outcome::Done(told) => panic!("{step:?} done: {told}"),
            Outcome::Refused(lines) => {
                assert_eq!(contents(self.directory.path()), before, "{step:?} wrote and refused");
                lines
            }
        }
    }

    async fn phase(&self) -> Phase {
        self.rotation.store.read().await.unwrap().held.view(SystemTime::now()).unwrap().phase
    }

    /// What a CA that starts now has in force: serial numbers of the issuing root and of the trusted ones.
    async fn in_force(&self) -> (String, Vec<String>) {
        let source = KeySource::Directory(self.directory.path().to_owned());
        let keys = Keys::open(source, &trust_domain(), None).await.unwrap();
        let root = keys.current();
        (serial(root.anchor().unwrap()), root.bundle().iter().map(serial).collect())
    }

    fn old(&self) -> String {
        serial(self.old.certificate.der())
    }

    /// What every replica issues from.
    fn all_issue_from(&self, root: &str) {
        self.replicas.iter().for_each(|replica| replica.issues_from(root));
    }

    fn all_say(&self, trusts: &[&str], holds: &[&str]) {
        self.agents.iter().for_each(|agent| agent.says(trusts, holds));
    }
}

fn serial(der: &CertificateDer<'static>) -> String {
    span(der).unwrap().0
}

fn contents(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().flatten();
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

fn names(directory: &Path) -> Vec<String> {
    contents(directory).into_keys().collect()
}

#[tokio::test]
async fn a_rotation_goes_on_only_when_every_agent_is_ready_for_it() {
    let stage = stage().await;
    let old = stage.old();
    assert_eq!(stage.in_force().await, (old.clone(), vec![old.clone()]));
    stage.refused(Step::Switch).await;
    assert_eq!(stage.done(Step::Finish).await, stage.done(Step::Back).await, "nothing is under way");

    stage.done(Step::Prepare).await;
    let (issuing, trusted) = stage.in_force().await;
    assert_eq!((issuing, trusted.len()), (old.clone(), 2));
    let new = trusted.last().unwrap().clone();
    assert!(stage.done(Step::Prepare).await.contains("before"), "again changes nothing");
    assert_eq!(stage.in_force().await.1, [old.clone(), new.clone()]);

    // Nobody said anything yet; then one agent lags behind.
    assert_eq!(stage.refused(Step::Switch).await.len(), 2);
    stage.agents[0].says(&[&old, &new], &[&old]);
    stage.agents[1].says(&[&old], &[&old]);
    let lines = stage.refused(Step::Switch).await;
    assert!(matches!(lines.as_slice(), [line] if line.contains(&stage.agents[1].address.to_string())), "{lines:?}");
    stage.refused(Step::Finish).await;
    stage.all_say(&[&old, &new], &[&old]);
    stage.done(Step::Switch).await;
    assert_eq!(stage.in_force().await, (new.clone(), vec![old.clone(), new.clone()]));
    stage.done(Step::Switch).await;
    stage.all_issue_from(&new);

    assert_eq!(stage.refused(Step::Finish).await.len(), 2);
    stage.agents[0].says(&[&old, &new], &[&new]);
    stage.agents[1].says(&[&old, &new], &[&new, &old, &old]);
    let lines = stage.refused(Step::Finish).await;
    assert!(matches!(lines.as_slice(), [line] if line.contains("2 certificates")), "{lines:?}");
    stage.all_say(&[&old, &new], &[&new]);
    stage.done(Step::Finish).await;
    assert_eq!(stage.in_force().await, (new.clone(), vec![new]));
    assert_eq!(names(stage.directory.path()), [BUNDLE, CERTIFICATE, KEY], "no old key is left");
    assert_eq!(stage.phase().await, Phase::Steady);
}

#[tokio::test]
async fn a_root_stays_while_a_replica_issues_from_it_or_a_revocation_list_needs_it() {
    let stage = stage().await;
    let old = stage.old();
    stage.done(Step::Prepare).await;
    let new = stage.in_force().await.1.pop().unwrap();
    stage.all_say(&[&old, &new], &[&old]);
    stage.done(Step::Switch).await;
    stage.all_say(&[&old, &new], &[&new]);
    // Neither has read its key again; then one has; then the other can't be asked.
    assert_eq!(stage.refused(Step::Finish).await.len(), 2);
    stage.replicas[0].issues_from(&new);
    let late = stage.replicas[1].said.lock().unwrap().clone();
    for text in [late, "# nothing\n".to_owned()] {
        *stage.replicas[1].said.lock().unwrap() = text;
        let lines = stage.refused(Step::Finish).await;
        let named = |line: &String| line.starts_with(&format!("replica http://{}/", stage.replicas[1].address));
        assert!(matches!(lines.as_slice(), [line] if named(line)), "{lines:?}");
    }
    stage.replicas[1].issues_from(&new);
    stage.agents[1].lists(&old);
    let lines = stage.refused(Step::Finish).await;
    let told = |line: &String| line.contains("revocation list") && line.contains(&stage.agents[1].address.to_string());
    assert!(matches!(lines.as_slice(), [line] if told(line)), "{lines:?}");
    stage.agents[1].says(&[&old, &new], &[&new]);
    stage.agents[1].lists(&new);
    stage.done(Step::Finish).await;
    assert_eq!(stage.in_force().await, (new.clone(), vec![new]));
}

const OWN: &str = "heddle-system";
const SECRET: &str = "heddle-ca";
const SOON: Duration = Duration::from_secs(30);

/// A pod of the mesh's own; `address` where it runs.
fn own_pod(api: &ApiServer, component: &str, name: &str, phase: &str, address: Option<IpAddr>) {
    let labels = json!({"app.kubernetes.io/name": "heddle", "app.kubernetes.io/component": component});
    let status = json!({"phase": phase, "podIP": address.map(|address| address.to_string())});
    let metadata = json!({"namespace": OWN, "name": name, "labels": labels});
    api.put_as("pods", json!({"metadata": metadata, "status": status}));
}

#[tokio::test]
async fn a_secret_is_rotated_with_agents_and_replicas_that_are_found_by_their_pods() {
    let (api, client) = api_server_and_client().await;
    // A replica that runs: it makes the Secret, and follows it.
    let source = KeySource::Secret { namespace: OWN.to_owned(), name: SECRET.to_owned(), lifetime: SOON * 1_000 };
    let keys = Arc::new(Keys::open(source, &trust_domain(), Some(&client)).await.unwrap());
    let (following, stop) = (Arc::clone(&keys), tokio_util::sync::CancellationToken::new());
    let _stops = stop.clone().drop_guard();
    tokio::spawn(async move { following.follow(stop).await });
    let issuing = || serial(keys.current().chain.first().unwrap());
    let trusted = || keys.current().bundle().iter().map(serial).collect::<Vec<_>>();
    let [agents, replicas] = [Agent::start_two().await, Agent::start_two().await];
    let pods = |group: &[Agent; 2]| Places::Pods {
        client: client.clone(),
        namespace: OWN.to_owned(),
        port: group[0].address.port(),
    };
    let rotation = Rotation {
        store: Store::Secret { client: client.clone(), namespace: OWN.to_owned(), name: SECRET.to_owned() },
        agents: Group::agents(pods(&agents)),
        replicas: Group::replicas(pods(&replicas)),
        trust_domain: trust_domain(),
        lifetime: Duration::from_secs(86_400),
        given: None,
    };
    let step = async |step| match rotation.step(step).await.unwrap() {
        Outcome::Done(_) => Vec::new(),
        Outcome::Refused(lines) => lines,
    };
    let version = || api.get("secrets", OWN, SECRET).unwrap()["metadata"]["resourceVersion"].clone();
    let all_say = |trusts: &[&str], holds: &[&str]| agents.iter().for_each(|agent| agent.says(trusts, holds));
    let old = issuing();

    assert_eq!(step(Step::Prepare).await, Vec::<String>::new());
    within(SOON, "both roots published", || trusted().len() == 2).await;
    let new = trusted().pop().unwrap();
    assert_eq!(issuing(), old, "nothing is issued from it yet");
    // Somebody else's pods are nobody, and nobody is no agreement.
    own_pod(&api, "ca", "ca-0", "Running", Some(replicas[0].address.ip()));
    own_pod(&api, "ca", "ca-1", "Running", Some(replicas[1].address.ip()));
    let error = rotation.step(Step::Switch).await.unwrap_err().to_string();
    assert!(error.contains("component=agent") && error.contains("--agent-namespace"), "{error}");
    own_pod(&api, "agent", "agent-0", "Running", Some(agents[0].address.ip()));
    own_pod(&api, "agent", "agent-1", "Pending", None);
    own_pod(&api, "agent", "agent-2", "Failed", None);
    all_say(&[&old, &new], &[&old]);
    let before = version();
    let lines = step(Step::Switch).await;
    assert!(matches!(lines.as_slice(), [line] if line.contains("agent-1") && line.contains("Pending")), "{lines:?}");
    assert_eq!(version(), before, "refused, and written");
    own_pod(&api, "agent", "agent-1", "Running", Some(agents[1].address.ip()));
    assert_eq!(step(Step::Switch).await, Vec::<String>::new());
    within(SOON, "the new root issues", || issuing() == new && trusted() == [old.clone(), new.clone()]).await;

    replicas[0].issues_from(&new);
    replicas[1].issues_from(&old);
    all_say(&[&old, &new], &[&new]);
    let lines = step(Step::Finish).await;
    assert!(matches!(lines.as_slice(), [line] if line.contains("replica ca-1")), "{lines:?}");
    replicas[1].issues_from(&new);
    // Somebody else writes between what is read and what is written: nothing of that is lost.
    let stored = rotation.store.read().await.unwrap();
    let mut theirs = api.get("secrets", OWN, SECRET).unwrap();
    theirs["metadata"]["labels"]["theirs"] = json!("yes");
    api.put(theirs);
    let error = rotation.store.write(stored, vec![take_away(PREVIOUS_KEY)]).await.unwrap_err().to_string();
    assert!(error.starts_with("Secret heddle-system/heddle-ca: ") && error.contains("Conflict"), "{error}");
    assert_eq!(step(Step::Finish).await, Vec::<String>::new());
    within(SOON, "the new root alone", || trusted() == [new.clone()]).await;
    let secret = api.get("secrets", OWN, SECRET).unwrap();
    assert_eq!(secret["metadata"]["labels"]["theirs"], "yes");
    let left: Vec<_> = secret["data"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(left, [BUNDLE, CERTIFICATE, KEY], "no old key is left");
    assert_eq!(keys.status().bad, None);
}

/// The labels that pods are looked for by are those that the manifests give them.
#[test]
fn the_manifests_label_pods_as_they_are_looked_for() {
    for (component, text) in [
        ("ca", include_str!("../../../../../deploy/ca/ca.yaml")),
        ("agent", include_str!("../../../../../deploy/agent/daemonset.yaml")),
    ] {
        let documents: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
        let template = documents.iter().find_map(|document| document["spec"].get("template")).unwrap();
        let labels = &template["metadata"]["labels"];
        let found = (&labels["app.kubernetes.io/name"], &labels["app.kubernetes.io/component"]);
        assert_eq!(found, (&json!("heddle"), &json!(component)));
    }
}

#[tokio::test]
async fn going_back_forgets_the_new_root_when_nobody_needs_it() {
    let stage = stage().await;
    let old = stage.old();
    stage.done(Step::Prepare).await;
    let new = stage.in_force().await.1.pop().unwrap();
    stage.all_say(&[&old, &new], &[&old]);
    stage.done(Step::Back).await;
    assert_eq!(stage.in_force().await, (old.clone(), vec![old.clone()]));

    stage.done(Step::Prepare).await;
    let new = stage.in_force().await.1.pop().unwrap();
    stage.all_say(&[&old, &new], &[&old]);
    stage.done(Step::Switch).await;
    stage.all_say(&[&old, &new], &[&new, &old]);
    stage.all_issue_from(&old);
    // Issues from the old root at once; the new one is trusted while something of it is in use.
    let Outcome::Refused(lines) = stage.rotation.step(Step::Back).await.unwrap() else { panic!("went back whole") };
    assert!(lines[0].contains("again") && lines[1].contains("1 certificate of"), "{lines:?}");
    assert_eq!(stage.in_force().await, (old.clone(), vec![old.clone(), new.clone()]));
    stage.all_say(&[&old, &new], &[&old]);
    stage.done(Step::Back).await;
    assert_eq!(stage.in_force().await, (old.clone(), vec![old]));
    assert_eq!(stage.phase().await, Phase::Steady);
}

/// Each step is cut off after each of its writes; given again it ends as if it had not been.
#[tokio::test]
async fn a_step_that_was_broken_off_is_finished_by_giving_it_again() {
    for step in [Step::Prepare, Step::Switch, Step::Finish, Step::Back] {
        for cut in 0.. {
            let stage = stage().await;
            let old = stage.old();
            let before: &[Step] = match step {
                Step::Prepare => &[],
                Step::Switch => &[Step::Prepare],
                Step::Finish | Step::Back => &[Step::Prepare, Step::Switch],
            };
            for step in before {
                let new = stage.in_force().await.1.pop().unwrap();
                stage.all_say(&[&old, &new], &[]);
                stage.done(*step).await;
            }
            let new = stage.in_force().await.1.pop().unwrap();
            stage.all_say(&[&old, &new], &[]);
            let stored = stage.rotation.store.read().await.unwrap();
            let view = stored.held.view(SystemTime::now()).unwrap();
            stage.all_issue_from(if step == Step::Finish { &new } else { &old });
            let seen = stage.rotation.agents.ask(agents::said).await.unwrap();
            let issuing = stage.rotation.issuing().await.unwrap();
            let plan = match step {
                Step::Prepare => view.prepare(&stored.held, &stage.rotation.successor(SystemTime::now()).unwrap()),
                Step::Switch => view.switch(&stored.held, &seen),
                Step::Finish => view.finish(&seen, &issuing),
                Step::Back => view.back(&stored.held, &seen, &issuing),
            };
            let Plan::Do { mut writes, .. } = plan else { panic!("{step:?} has nothing to do") };
            if cut == writes.len() {
                break;
            }
            writes.truncate(cut);
            stage.rotation.store.write(stored, writes).await.unwrap();
            stage.done(step).await;
            let (issuing, trusted) = stage.in_force().await;
            let new = if step == Step::Prepare { trusted.last().unwrap().clone() } else { new };
            let wanted = match step {
                Step::Prepare => (old.clone(), vec![old, new]),
                Step::Switch => (new.clone(), vec![old, new]),
                Step::Finish => (new.clone(), vec![new]),
                Step::Back => (old.clone(), vec![old]),
            };
            assert_eq!((issuing, trusted), wanted, "{step:?} cut after {cut}");
        }
    }
}

#[tokio::test]
async fn a_given_pair_takes_over_and_a_bad_one_does_not() {
    let mut stage = stage().await;
    let (next, other) = (TestRoot::new("given root"), TestRoot::new("other"));
    let given = |certificate: &TestRoot, key: &TestRoot| {
        Some(Given {
            certificate: certificate.certificate.pem().into_bytes(),
            key: Zeroizing::new(key.key.serialize_pem().into_bytes()),
        })
    };
    stage.rotation.given = given(&next, &other);
    let error = stage.rotation.step(Step::Prepare).await.unwrap_err();
    assert!(error.to_string().contains("new root that was given"), "{error}");
    stage.rotation.given = given(&stage.old, &stage.old);
    stage.refused(Step::Prepare).await;
    stage.rotation.given = given(&next, &next);
    stage.done(Step::Prepare).await;
    let new = serial(next.certificate.der());
    assert_eq!(stage.in_force().await.1, [stage.old(), new]);
}

#[tokio::test]
async fn private_keys_are_as_readable_as_the_one_in_use() {
    use std::os::unix::fs::PermissionsExt;
    let stage = stage().await;
    let path = |name: &str| stage.directory.path().join(name);
    fs::set_permissions(path(KEY), fs::Permissions::from_mode(0o640)).unwrap();
    stage.done(Step::Prepare).await;
    assert_eq!(fs::metadata(path(NEXT_KEY)).unwrap().permissions().mode() & 0o777, 0o640);
}
