//! What plugin and agent say to each other over a Unix socket: one question, one answer, each one JSON object up to the end of
//! that direction.
//!
//! Both sides bound what they read, and wait no longer than they said.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Shutdown},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::mpsc::sync_channel,
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::life::limits;

/// Version of the messages: a plugin that is older or newer than the agent is told to try again, until it is replaced.
pub const VERSION: u32 = 1;

/// A pod, as the runtime names it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
    /// As kubelet has it.
    pub uid: String,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// Is this pod, whose network was just made, captured? Waits until it is.
    Add,
    /// Is it captured now?
    Check,
    /// Its network goes.
    Del,
}

/// The plugin's question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Question {
    pub version: u32,
    pub verb: Verb,
    pub pod: PodName,
    /// The sandbox container.
    pub container: String,
    /// File of the pod's netns, as the runtime sees it; empty where it says none.
    pub netns: PathBuf,
    /// The pod's addresses, as the plugins before have made them.
    pub addresses: Vec<IpAddr>,
    /// How long the answer is waited for (milliseconds).
    pub patience: u64,
}

/// The agent's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "camelCase")]
pub enum Answer {
    /// The pod is not in the mesh.
    NotEnrolled,
    /// The pod's capture is proven, in this netns and with these addresses.
    Captured,
    /// It is not; `reason` is stable, `detail` for people.
    Refused { reason: String, detail: String },
    /// Noted; there is nothing to say.
    Noted,
}

/// Asks the agent at `socket`. Blocks until the answer or the deadline.
///
/// # Errors
/// When nobody answers in time, or what is answered can't be read.
pub fn ask(socket: &Path, question: &Question, deadline: Instant) -> io::Result<Answer> {
    let (answered, answer) = sync_channel(1);
    let (socket, question) = (socket.to_owned(), serde_json::to_vec(question)?);
    // A full backlog keeps connect() waiting, which no option of the socket bounds. The process ends with its main thread.
    thread::Builder::new().name("ask".into()).spawn(move || {
        let _nobody_waits_any_more = answered.send(exchange(&socket, &question, deadline));
    })?;
    let late = || io::Error::new(io::ErrorKind::TimedOut, "the agent did not answer in time");
    answer.recv_timeout(left(deadline)).map_err(|_| late())?
}

fn exchange(socket: &Path, question: &[u8], deadline: Instant) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    // Zero would mean forever.
    let wait = left(deadline).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(wait))?;
    stream.set_write_timeout(Some(wait))?;
    stream.write_all(question)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.take(limits::CNI_MESSAGE as u64 + 1).read_to_end(&mut answer)?;
    read(&answer)
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Reads a message.
///
/// # Errors
/// When it is too long, or is none.
pub fn read<'a, T: Deserialize<'a>>(message: &'a [u8]) -> io::Result<T> {
    let invalid = |error: String| io::Error::new(io::ErrorKind::InvalidData, error);
    if message.len() > limits::CNI_MESSAGE {
        return Err(invalid(format!("a message of more than {} bytes", limits::CNI_MESSAGE)));
    }
    serde_json::from_slice(message).map_err(|error| invalid(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn question() -> Question {
        Question {
            version: VERSION,
            verb: Verb::Add,
            pod: PodName { namespace: "shop".into(), name: "cart".into(), uid: "u".into() },
            container: "c".into(),
            netns: "/run/netns/x".into(),
            addresses: vec!["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            patience: 10_000,
        }
    }

    /// Answers one question with `answer`, after `pause`.
    fn agent(answer: Vec<u8>, pause: Duration) -> (tempfile::TempDir, PathBuf, thread::JoinHandle<Vec<u8>>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cni.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let serving = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            stream.read_to_end(&mut asked).unwrap();
            thread::sleep(pause);
            // Who gave up is not there any more.
            let _ = stream.write_all(&answer);
            asked
        });
        (folder, path, serving)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn a_question_gets_its_answer() {
        for expected in [
            Answer::NotEnrolled,
            Answer::Captured,
            Answer::Noted,
            Answer::Refused { reason: "timeout".into(), detail: "not yet".into() },
        ] {
            let (_folder, path, serving) = agent(serde_json::to_vec(&expected).unwrap(), Duration::ZERO);
            assert_eq!(ask(&path, &question(), soon()).unwrap(), expected);
            assert_eq!(read::<Question>(&serving.join().unwrap()).unwrap(), question());
        }
    }

    #[test]
    fn nobody_and_nonsense_and_silence_are_errors_in_time() {
        assert!(ask(Path::new("/nowhere/cni.sock"), &question(), soon()).is_err());
        for answer in ["", "{}", "{\"answer\":\"maybe\"}", "captured"] {
            let (_folder, path, _serving) = agent(answer.into(), Duration::ZERO);
            assert_eq!(ask(&path, &question(), soon()).unwrap_err().kind(), io::ErrorKind::InvalidData, "{answer}");
        }
        let (_folder, path, _serving) = agent(vec![b' '; limits::CNI_MESSAGE + 2], Duration::ZERO);
        assert_eq!(ask(&path, &question(), soon()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let (_folder, path, _serving) = agent(b"{}".into(), Duration::from_secs(2));
        assert!(ask(&path, &question(), Instant::now() + Duration::from_millis(50)).is_err());
    }
}
