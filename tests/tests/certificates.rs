//! What happens to keys and certificates while pods, the CA and time come and go?

use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context;
use heddle_lab::{
    Lab, Pod, Result,
    agent::Agent,
    memory::Secret,
    needs_program, needs_root,
    process::{Place, Process},
    reports::Connected,
    until,
};
use serde_json::Value;

fn hello(client: &Pod, server: &Pod) -> Result<Connected> {
    client.connect(server.at(7000)).say("hello").with("--expect", 5).run()
}

/// `heddle certs --json` of one identity.
fn certificate(agent: &Agent, pod: &Pod) -> Result<Value> {
    let (_, list) = agent.ask_json(&["certs"])?;
    let list = list.as_array().cloned().unwrap_or_default();
    Ok(list.into_iter().find(|line| line["identity"] == pod.identity().as_str()).unwrap_or_default())
}

fn serial(agent: &Agent, pod: &Pod) -> Result<String> {
    Ok(certificate(agent, pod)?["serial"].as_str().unwrap_or_default().to_owned())
}

/// Waits for another certificate than this one; gives its serial.
fn wait_serial(agent: &Agent, pod: &Pod, before: &str, patience: Duration) -> Result<String> {
    until(patience, &format!("another certificate of {}", pod.full_name()), || {
        serial(agent, pod).ok().filter(|serial| !serial.is_empty() && serial != before)
    })
}

/// The keys of this pod's identity that its agent has.
fn keys_of(pid: u32, pod: &Pod) -> Result<Vec<Secret>> {
    Ok(Secret::all_of(pid)?.into_iter().filter(|secret| secret.identity == pod.identity()).collect())
}

/// What strace saw written: its hex strings, as bytes.
fn written(trace: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for string in trace.split('"').skip(1).step_by(2) {
        bytes.extend(string.split("\\x").skip(1).filter_map(|byte| u8::from_str_radix(byte.get(..2)?, 16).ok()));
        bytes.push(b'\n');
    }
    bytes
}

#[test]
fn i2_keys_are_in_memory_only_and_gone_from_there_with_the_last_pod() -> Result {
    needs_root!();
    needs_program!("strace");
    let lab = Lab::builder().certificate_lifetime("40s").start()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let stays = lab.pod("shop", "stays").start()?;
    let leaves = lab.pod("shop", "leaves").start()?;
    let other = lab.pod("shop", "other").service_account("leaves").start()?;
    assert_eq!(hello(&leaves, &server)?.error, None);
    let agent = lab.agent(1)?;
    let pid = agent.daemon.pid().unwrap_or_default();

    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap_or_default();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");

    // Everything that the agent writes from here on, through two rotations and a pod's end.
    let trace = lab.dir().join("written.strace");
    let calls = "trace=write,writev,pwrite64,pwritev,pwritev2,sendto,sendmsg,sendmmsg";
    let (output, pid_text) = (trace.display().to_string(), pid.to_string());
    let place = Place { netns: None, cgroup: None, logs: lab.dir().join("logs"), files: None };
    let args = ["-f", "-qq", "-xx", "-s", "1048576", "-e", "signal=none", "-e", calls, "-o", &output, "-p", &pid_text];
    let strace = Process::start(&place, "strace", "strace", &args)?;
    until(Duration::from_secs(10), "strace", || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0")).then_some(())
    })?;

    // Looked for until no rotation came in between.
    let looked = Instant::now();
    let (before, mut all) = until(Duration::from_secs(90), "the key of a certificate", || {
        let before = serial(agent, &leaves).ok()?;
        let secrets = keys_of(pid, &leaves).ok()?;
        (serial(agent, &leaves).ok()? == before && !secrets.is_empty()).then_some((before, secrets))
    })?;
    println!("I2 found {} keys of {} after {:?}", all.len(), leaves.identity(), looked.elapsed());
    let copies = all.iter().map(|secret| secret.copies(pid)).sum::<Result<usize>>()?;
    assert!(copies >= 1, "what was found is there");
    wait_serial(agent, &leaves, &before, Duration::from_secs(40))?;
    until(Duration::from_secs(1), "a replaced key to be gone", || {
        all.iter().all(|secret| secret.copies(pid).is_ok_and(|copies| copies == 0)).then_some(())
    })?;

    let (kept, last) = (keys_of(pid, &stays)?, keys_of(pid, &leaves)?);
    assert!(!kept.is_empty() && !last.is_empty(), "{kept:?} {last:?}");
    other.delete()?;
    std::thread::sleep(Duration::from_secs(1));
    assert!(!serial(agent, &leaves)?.is_empty(), "one pod of the service account is left");
    let last: Vec<Secret> = [last, keys_of(pid, &leaves)?].concat();
    let identity = leaves.identity();
    leaves.delete()?;
    let gone = Instant::now();
    until(Duration::from_secs(1), "the last pod's keys to be gone", || {
        let copies: usize = last.iter().map(|secret| secret.copies(pid).unwrap_or(1)).sum();
        (copies == 0).then_some(())
    })?;
    println!("I2 no copy of the keys of {identity} {:?} after its last pod", gone.elapsed());
    assert!(!keys_of(pid, &stays)?.is_empty(), "the other identity's key is in use");

    all.extend(kept);
    all.extend(last);
    for secret in &all {
        assert_eq!(secret.in_files(lab.dir(), pid)?, Vec::<String>::new(), "{secret:?}");
    }
    strace.terminate(Duration::from_secs(10))?;
    let written = written(&fs::read_to_string(&trace)?);
    let text = String::from_utf8_lossy(&written);
    assert!(text.contains("Certificate received"), "strace saw nothing of {} bytes", written.len());
    for secret in &all {
        assert!(!secret.is_in(&written), "a key was written: {secret:?}");
    }
    println!("I2 {} keys, none of them in {} bytes that were written", all.len(), written.len());
    Ok(())
}

#[test]
fn a_process_with_keys_can_not_be_dumped() -> Result {
    use std::os::unix::fs::MetadataExt;
    needs_root!();
    needs_program!("setpriv");
    // As a user that is not root, because what belongs to root looks the same either way.
    const NOBODY: u32 = 65_534;
    let folder = tempfile::Builder::new().prefix("hd-").tempdir()?;
    fs::write(folder.path().join("token"), "x")?;
    let heddle = heddle_lab::binaries::heddle()?.display().to_string();
    let place = Place { netns: None, cgroup: None, logs: folder.path().to_owned(), files: None };
    let token = folder.path().join("token").display().to_string();
    let user = NOBODY.to_string();
    let ids = ["--reuid", &user, "--regid", &user, "--clear-groups"];
    let command = [&ids[..], &[&heddle, "ca", "--listen", "127.0.0.1:0", "--token-file", &token]].concat();
    let ca = Process::start(&place, "ca", "setpriv", &command)?;
    let sleeper = Process::start(&place, "sleep", "setpriv", &[&ids[..], &["sleep", "60"]].concat())?;
    let owner =
        |process: &Process, file: &str| fs::metadata(format!("/proc/{}/{file}", process.pid())).map(|file| file.uid());
    let is = |process: &Process, name: &str| {
        let comm = fs::read_to_string(format!("/proc/{}/comm", process.pid())).unwrap_or_default();
        (comm.trim_end() == name).then_some(())
    };
    until(Duration::from_secs(10), "sleep", || is(&sleeper, "sleep"))?;
    assert_eq!(owner(&sleeper, "mem")?, NOBODY, "a process that can be dumped belongs to its user");
    until(Duration::from_secs(10), "the CA", || ca.stderr().contains("CA listens").then_some(()))?;
    for file in ["mem", "environ", "maps", "fd"] {
        assert_eq!(owner(&ca, file)?, 0, "/proc/<pid>/{file} is root's");
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", ca.pid()))?;
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap_or_default();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    Ok(())
}

#[test]
fn an_agents_memory_is_closed_to_root_itself_without_the_right_to_trace() -> Result {
    needs_root!();
    needs_program!("setpriv");
    let lab = Lab::two_nodes()?;
    let agent = lab.agent(1)?;
    agent.daemon.terminate(Duration::from_secs(20))?;
    // Whoever may trace may read any memory, so neither the agent nor its readers may: what is left is whether it can be dumped.
    agent.daemon.spawn_without("sys_ptrace")?;
    until(Duration::from_secs(20), "the agent", || agent.ready().then_some(()))?;
    const LACKS: [&str; 4] = ["--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"];
    let folder = tempfile::Builder::new().prefix("hd-").tempdir()?;
    let place = Place { netns: None, cgroup: None, logs: folder.path().to_owned(), files: None };
    let sleeper = Process::start(&place, "sleep", "setpriv", &[&LACKS[..], &["sleep", "60"]].concat())?;
    let comm = |pid: u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    until(Duration::from_secs(10), "sleep", || (comm(sleeper.pid()).trim_end() == "sleep").then_some(()))?;
    let opens = |pid: u32, file: &str| -> Result<bool> {
        let path = format!("/proc/{pid}/{file}");
        let command = [&LACKS[..], &["sh", "-c", ": <\"$0\"", &path]].concat();
        Ok(Command::new("setpriv").args(command).stderr(Stdio::null()).status()?.success())
    };
    let pid = agent.daemon.pid().context("the agent runs")?;
    // Not `environ` or `maps`: CAP_PERFMON is enough to read those, and the agent has it.
    if !opens(sleeper.pid(), "mem")? {
        heddle_lab::skip("certificates", "nobody may trace anybody here (kernel.yama.ptrace_scope)");
        return Ok(());
    }
    assert!(!opens(pid, "mem")?, "/proc/<pid>/mem of an agent");
    Ok(())
}

#[test]
fn a_connection_before_the_first_certificate_is_held_until_it_comes_and_no_longer_than_five_seconds() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    // Fetched when it was enrolled, before it had a connection.
    wait_serial(lab.agent(2)?, &server, "", Duration::from_secs(10))?;
    lab.ca()?.daemon.kill()?;
    let early = lab.pod("shop", "early").start()?;
    assert_eq!(certificate(lab.agent(1)?, &early)?["state"], "missing");
    let since = Instant::now();
    let refused = hello(&early, &server)?;
    assert!(refused.was_refused(), "{refused:?}");
    let held = since.elapsed();
    assert!(held >= Duration::from_millis(4_900) && held < Duration::from_secs(9), "{held:?}");
    lab.agent(1)?.wait_access("the reason", |line| line.mentions("no_certificate"))?;
    // Now it comes in time: of several tries one must be held across the CA's return, as a probe may take 3.6 s and the CA its start.
    let waiting = early.connect(server.at(7000)).say("hello").with("--expect", 5).start()?;
    let since = Instant::now();
    lab.ca()?.start()?;
    let seen = waiting.finish()?;
    assert_eq!((seen.error, seen.received.as_str()), (None, "hello"), "after {:?}", since.elapsed());
    assert!(seen.total_us > 20_000, "it waited");
    Ok(())
}

#[test]
fn o1_while_the_ca_is_down_certificates_serve_to_their_end_and_are_renewed_soon_after_its_return() -> Result {
    needs_root!();
    let lab = Lab::builder().certificate_lifetime("40s").start()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    let (first, second) = (lab.agent(1)?, lab.agent(2)?);
    assert_eq!(hello(&client, &server)?.error, None);
    let before = [serial(first, &client)?, serial(second, &server)?];
    assert!(before.iter().all(|serial| !serial.is_empty()));
    let down = Instant::now();
    lab.ca()?.daemon.kill()?;
    let shaken = |agent: &Agent, direction: &str| {
        Ok::<_, anyhow::Error>(
            agent.metrics()?.sum("heddle_tls_handshakes_total", &[("direction", direction), ("result", "ok")]),
        )
    };
    let handshakes = [shaken(first, "outbound")?, shaken(second, "inbound")?];
    // Every connection is a handshake of its own: the tunnel before it is closed under it. Until after the latest renewal point
    // (22 s), and well before the end (40 s).
    let mut count = 0.0;
    while down.elapsed() < Duration::from_secs(27) {
        let tunnel = server.at(15008).to_string();
        client.output("ss", &["-K", "-t", "dst", &tunnel])?;
        let seen = hello(&client, &server)?;
        assert_eq!(seen.error, None, "after {:?} without a CA: {seen:?}", down.elapsed());
        count += 1.0;
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(shaken(first, "outbound")? - handshakes[0] >= count / 2.0, "{count} connections, too few handshakes");
    assert!(shaken(second, "inbound")? - handshakes[1] >= count / 2.0);
    for (agent, pod, before) in [(first, &client, &before[0]), (second, &server, &before[1])] {
        let line = certificate(agent, pod)?;
        assert_eq!(
            (line["serial"].as_str(), line["state"].as_str()),
            (Some(before.as_str()), Some("not_renewed")),
            "{line}"
        );
        assert_eq!(line["last_reason"], "ca_unreachable", "{line}");
        assert!(agent.metrics()?.sum("heddle_certificate_failing", &[("reason", "ca_unreachable")]) >= 1.0);
    }
    lab.ca()?.start()?;
    let back = Instant::now();
    wait_serial(first, &client, &before[0], Duration::from_secs(5))?;
    wait_serial(second, &server, &before[1], Duration::from_secs(5).saturating_sub(back.elapsed()))?;
    println!("O1 {count} handshakes without a CA, renewed {:?} after its return", back.elapsed());
    assert_eq!(certificate(first, &client)?["state"], "valid");
    assert_eq!(hello(&client, &server)?.error, None);
    Ok(())
}

#[test]
fn check_tells_what_fails_and_what_will_by_its_exit_status_too() -> Result {
    needs_root!();
    let lab = Lab::builder().nodes(1).certificate_lifetime("6s").start()?;
    let pod = lab.pod("shop", "web").start()?;
    let agent = lab.agent(1)?;
    let reasons = |found: &Value| -> Vec<String> {
        found.as_array().into_iter().flatten().filter_map(|one| one["reason"].as_str().map(str::to_owned)).collect()
    };
    // The lab's root lasts 30 days, less what has passed since.
    wait_serial(agent, &pod, "", Duration::from_secs(10))?;
    let (status, found) = agent.ask_json(&["check", "--area", "agent"])?;
    assert_eq!((status, reasons(&found)), (Some(0), vec!["root_ends_soon".to_owned()]), "{found}");
    let scrape = agent.metrics()?;
    let identity = pod.identity();
    let held = scrape.with("heddle_certificate_expiry_timestamp_seconds", &[("identity", &identity)]).next().cloned();
    let root = held.and_then(|sample| sample.labels.get("root_serial").cloned()).unwrap_or_default();
    assert!(
        scrape.with("heddle_trust_root_expiry_timestamp_seconds", &[("serial", &root)]).next().is_some(),
        "{root:?}"
    );
    assert!(scrape.sum("heddle_certificate_fetches_total", &[("result", "ok")]) >= 1.0);
    let shown = agent.ask(&["certs"])?.ok()?;
    assert!(shown.contains(&root) && shown.contains("NEXT TRY"), "{shown}");

    lab.ca()?.daemon.kill()?;
    let expired = until(Duration::from_secs(20), "the certificate's end", || {
        let (status, found) = agent.ask_json(&["check", "--area", "agent"]).ok()?;
        (status == Some(1)).then_some(found)
    })?;
    assert_eq!(reasons(&expired), ["certificate_expired", "root_ends_soon"], "{expired}");
    let text = agent.ask(&["check", "--area", "agent"])?;
    assert!(!text.status.success() && text.stdout.contains("1 errors, 1 warnings, 0 passed"), "{text:?}");
    lab.ca()?.start()?;
    until(Duration::from_secs(20), "the certificate again", || {
        agent.ask_json(&["check", "--area", "agent"]).ok().filter(|(status, _)| *status == Some(0)).map(drop)
    })?;

    // A trust bundle that is none is an error, and what was trusted stays in force. The CA would publish a good one again.
    lab.ca()?.daemon.kill()?;
    let bundle = lab.ca()?.root.clone();
    fs::write(bundle.with_extension("new"), "nonsense")?;
    fs::rename(bundle.with_extension("new"), &bundle)?;
    until(Duration::from_secs(10), "the broken bundle", || {
        let (status, found) = agent.ask_json(&["check", "--area", "agent"]).ok()?;
        (status == Some(1) && reasons(&found).iter().any(|reason| reason == "roots_invalid")).then_some(())
    })?;
    assert_eq!(agent.metrics()?.sum("heddle_trust_bundle_problems", &[("reason", "roots_invalid")]), 1.0);
    assert!(agent.metrics()?.has("heddle_trust_root_expiry_timestamp_seconds"));
    Ok(())
}
