//! A rotation on a directory: what each step writes, what it refuses, and that one that was broken off is finished.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use axum::{Router, routing::get};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle};

use super::*;
use crate::identity::{
    ca::source::{KeySource, Keys},
    roots::span,
    tests::support::{TestRoot, trust_domain},
};

/// An agent's /metrics, as the test wants it.
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
        let said = Arc::new(Mutex::new(String::new()));
        let text = Arc::clone(&said);
        let router = Router::new().route("/metrics", get(move || async move { text.lock().unwrap().clone() }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
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
}

struct Stage {
    directory: TempDir,
    old: TestRoot,
    agents: [Agent; 2],
    rotation: Rotation,
}

async fn stage() -> Stage {
    let directory = tempfile::Builder::new().prefix("hi-").tempdir().unwrap();
    let old = TestRoot::new("old root");
    fs::write(directory.path().join(CERTIFICATE), old.certificate.pem()).unwrap();
    fs::write(directory.path().join(KEY), old.key.serialize_pem()).unwrap();
    let agents = [Agent::start().await, Agent::start().await];
    let uris = agents.iter().map(|agent| format!("http://{}", agent.address).parse().unwrap()).collect();
    let rotation = Rotation {
        store: Store::Directory(directory.path().to_owned()),
        agents: Agents::Listed(uris),
        trust_domain: trust_domain(),
        lifetime: Duration::from_secs(86_400),
        given: None,
    };
    Stage { directory, old, agents, rotation }
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
            let seen = stage.rotation.agents.ask().await.unwrap();
            let plan = match step {
                Step::Prepare => view.prepare(&stored.held, &stage.rotation.successor(SystemTime::now()).unwrap()),
                Step::Switch => view.switch(&stored.held, &seen),
                Step::Finish => view.finish(&seen),
                Step::Back => view.back(&stored.held, &seen),
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
