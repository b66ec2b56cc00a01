//! The scenes, in order. Each asks real programs and checks their answers.

use std::{
    collections::BTreeMap,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use heddle_lab::{Pod, leftovers, until};
use serde_json::json;

use super::{
    report::Report,
    stage::{ECHO, NAMESPACE, QUOTES, Stage, WEB},
};

/// What the first scenes leave for the later ones to compare with.
type Answers = BTreeMap<String, String>;

/// Every scene but the last.
pub fn all(stage: &Stage, report: &mut Report) -> Result<()> {
    let before = without_the_mesh(stage, report)?;
    enrolment(stage, report)?;
    with_the_mesh(stage, report, &before)?;
    identities(stage, report)?;
    policy(stage, report)?;
    same_node(stage, report)?;
    strict(stage, report)?;
    telemetry(stage, report)?;
    agent_killed(stage, report)
}

/// curl's body and the client address that nginx saw; the failure as text.
fn curl(client: &Pod, url: &str) -> Result<String, String> {
    let args = ["-sS", "--max-time", "5", "-w", "\n%header{x-client}", url];
    client.output("curl", &args).map_err(|error| {
        let text = format!("{error:#}");
        text.lines().find(|line| line.contains("curl:")).unwrap_or(&text).trim().to_owned()
    })
}

fn url(pod: &Pod) -> String {
    format!("http://{}/", pod.at(WEB))
}

/// What every client gets of every server: the same questions with and without the mesh.
fn ask_all(stage: &Stage, clients: &[&Pod]) -> Result<Answers> {
    let mut answers = Answers::new();
    for client in clients {
        for server in &stage.web {
            for url in [url(server), format!("http://{}/", server.at6(WEB))] {
                let answer = curl(client, &url).unwrap_or_else(|error| format!("failed: {error}"));
                answers.insert(format!("{} → {url}", client.name()), answer);
            }
        }
        let seen = client.connect(stage.quotes.at(QUOTES)).with("--expect", 18).run()?;
        let answer = seen.error.map_or(seen.received, |error| format!("failed: {error}"));
        answers.insert(format!("{} → quotes {}", client.name(), stage.quotes.at(QUOTES)), answer);
    }
    Ok(answers)
}

fn without_the_mesh(stage: &Stage, report: &mut Report) -> Result<Answers> {
    report.scene("Without the mesh: what the link between the nodes shows");
    let recording = stage.lab.record()?;
    let answers = ask_all(stage, &[&stage.shopper, &stage.visitor, &stage.legacy])?;
    let traffic = recording.finish()?;
    let answered = answers.values().filter(|answer| !answer.starts_with("failed")).count();
    report.check(
        answered == answers.len(),
        "every client gets every answer",
        &format!("{answered} of {}", answers.len()),
    );
    let readable = traffic.holding(b"Good morning from web-2").count();
    report.check(readable > 0, "anyone on the link can read them", &format!("the page in {readable} streams"));
    Ok(answers)
}

fn enrolment(stage: &Stage, report: &mut Report) -> Result<()> {
    report.scene("Five running pods join the mesh by a label; nothing restarts");
    let (mut held, _) = stage.shopper.hold(stage.quotes.at(ECHO), 20).open()?;
    let begun = Instant::now();
    stage.enrol()?;
    let took = begun.elapsed();
    let alive = held.check()?.alive;
    held.close()?;
    report.check(alive == 20, "connections from before go on", &format!("{alive} of 20"));
    for node in [1, 2] {
        let states: Vec<_> = stage
            .members()
            .into_iter()
            .filter(|pod| pod.node() == node)
            .map(|pod| Ok((pod.name(), stage.lab.agent(node)?.pod_state(&pod.full_name())?)))
            .collect::<Result<_>>()?;
        let captured = states.iter().all(|(_, state)| state.as_ref().is_some_and(|(state, _)| state == "captured"));
        let names: Vec<&str> = states.iter().map(|(name, _)| *name).collect();
        report.check(captured, &format!("node{node}: capture is proven in the kernel"), &names.join(", "));
    }
    report.note(&format!("all five in {:.1} s", took.as_secs_f64()));
    report.quote(stage.lab.agent(1)?.status_text()?.stdout.lines().take(12).map(str::to_owned).collect());
    Ok(())
}

fn with_the_mesh(stage: &Stage, report: &mut Report, before: &Answers) -> Result<()> {
    report.scene("With the mesh: the same answers, and nothing to read on the link");
    let recording = stage.lab.record()?;
    let answers = ask_all(stage, &[&stage.shopper, &stage.visitor])?;
    let traffic = recording.finish()?;
    let mut different = Vec::new();
    for (question, answer) in &answers {
        if before.get(question) != Some(answer) {
            different.push(format!("{question}: {answer}"));
        }
    }
    report.check(
        different.is_empty(),
        "byte for byte the answers from before, the client's address included",
        &format!("{} answers, {} different", answers.len(), different.len()),
    );
    report.quote(different);
    let (pages, requests, banners) = (
        traffic.holding(b"Good morning from").count(),
        traffic.holding(b"GET / HTTP/1.1").count(),
        traffic.holding(b"220 quotes ready").count(),
    );
    report.check(
        pages + requests + banners == 0,
        "no byte of an application is on the link",
        &format!("{} packets, {} streams searched", traffic.packets, traffic.streams.len()),
    );
    let hellos = traffic.streams.iter().filter(|stream| stream.is_tls13_server()).count();
    let records: usize = traffic.streams.iter().filter_map(heddle_lab::capture::Stream::tls_application_records).sum();
    report.check(hellos > 0 && records > 0, "TLS 1.3 is", &format!("{hellos} handshakes, {records} encrypted records"));
    let mut names = BTreeMap::<String, u32>::new();
    for _ in 0..12 {
        let answer = curl(&stage.shopper, &format!("http://{}/", stage.service.at())).unwrap_or_else(|error| error);
        let name = answer.split("from ").nth(1).and_then(|rest| rest.split('<').next()).unwrap_or(&answer).to_owned();
        *names.entry(name).or_default() += 1;
    }
    let both = names.keys().map(String::as_str).eq(["web-1", "web-2"]);
    report.check(both, "the Service's address, which nothing routes, reaches both nodes", &format!("{names:?}"));
    Ok(())
}

fn identities(stage: &Stage, report: &mut Report) -> Result<()> {
    report.scene("Who is calling: the identities that the server's side saw");
    for client in [&stage.shopper, &stage.visitor] {
        let line = stage.lab.agent(2)?.wait_access("a connection from a client", |line| {
            line.get("src.workload") == client.name() && line.get("dst.workload") == "web-2"
        });
        let seen = line.as_ref().map_or("none", |line| line.get("src.identity")).to_owned();
        report.check(seen == client.identity(), &format!("{} is", client.name()), &seen);
    }
    Ok(())
}

/// Asks until the answer is as wanted, as agents learn of a change; the last answer counts.
fn settles(client: &Pod, server: &Pod, wanted: bool) -> (bool, String) {
    let mut last = Err(String::new());
    let seen = until(Duration::from_secs(10), "", || {
        last = curl(client, &url(server));
        (last.is_ok() == wanted).then_some(())
    });
    (seen.is_ok(), last.unwrap_or_else(|error| error).lines().next().unwrap_or_default().to_owned())
}

fn policy(stage: &Stage, report: &mut Report) -> Result<()> {
    report.scene("A policy denies one client and not another, then it is removed");
    let spec = json!({
        "selector": {"matchLabels": {"app": "web-2"}},
        "action": "DENY",
        "rules": [{"from": [{"source": {"principals": [stage.visitor.principal()]}}]}],
    });
    report.note(&format!("AuthorizationPolicy {NAMESPACE}/no-visitors: DENY {}", stage.visitor.principal()));
    stage.lab.authorize(NAMESPACE, "no-visitors", &spec)?;
    let (good, seen) = settles(&stage.visitor, &stage.web[1], false);
    report.check(good, "the visitor is turned away", &seen);
    let (good, seen) = settles(&stage.shopper, &stage.web[1], true);
    report.check(good, "the shopper is served", &seen);
    let line = stage.lab.agent(2)?.wait_access("the denial", |line| line.get("policy").contains("no-visitors"));
    let seen = line.as_ref().map(|line| format!("{} · {}", line.get("src.identity"), line.get("error")));
    report.check(line.is_ok(), "the access log names the policy", &seen.unwrap_or_default());
    stage.lab.unauthorize(NAMESPACE, "no-visitors")?;
    let (good, seen) = settles(&stage.visitor, &stage.web[1], true);
    report.check(good, "without the policy the visitor is served again", &seen);
    Ok(())
}

fn same_node(stage: &Stage, report: &mut Report) -> Result<()> {
    const TIMES: u64 = 5;
    report.scene("Pods of one node: the kernel itself connects them, with the same policy and the same metrics");
    let (shopper, visitor, web) = (&stage.shopper, &stage.visitor, &stage.web[0]);
    let agent = stage.lab.agent(1)?;
    let kernel = agent.kernel();
    let mut learned = stage.lab.take_the_lane(shopper, web, WEB);
    let before = kernel.counts(shopper)?;
    for _ in 0..TIMES {
        learned = learned.and_then(|()| curl(shopper, &url(web)).map(drop).map_err(anyhow::Error::msg));
    }
    let after = kernel.counts(shopper)?;
    let (lane, agents) = (after.lane - before.lane, after.marked - before.marked);
    let seen =
        learned.map_or_else(|error| format!("{error:#}"), |()| format!("{lane} past the agent, {agents} through it"));
    report.check((lane, agents) == (TIMES, 0), "after a first one, connections go past the agent", &seen);
    let labels = [
        ("reporter", "destination"),
        ("connection_security_policy", "kernel_attested"),
        ("source_workload", "shopper"),
        ("destination_workload", "web-1"),
    ];
    let counted = until(Duration::from_secs(5), "", || {
        let scrape = agent.metrics().ok()?;
        // Some, and the first one that was carried.
        (scrape.sum("istio_tcp_connections_closed_total", &labels) > 5.0).then_some(scrape)
    });
    let sample = counted.ok().and_then(|scrape| scrape.with("istio_tcp_sent_bytes_total", &labels).next().cloned());
    let principal = sample.as_ref().and_then(|sample| sample.labels.get("source_principal")).cloned();
    report.check(
        principal.as_ref() == Some(&shopper.identity()),
        "the metrics know who it was and how much",
        &sample
            .map_or_else(String::new, |sample| format!("{} bytes for {}", sample.value, principal.unwrap_or_default())),
    );
    let rule = json!({"from": [{"source": {"principals": [visitor.principal()]}}]});
    let spec = json!({"selector": {"matchLabels": {"app": "web-1"}}, "action": "DENY", "rules": [rule]});
    stage.lab.authorize(NAMESPACE, "no-visitors", &spec)?;
    settles(visitor, web, false);
    let learned = stage.lab.learn(visitor, web, WEB);
    let seen = visitor.connect(web.at(WEB)).run()?;
    let what = format!("{} after {:.1} ms", seen.error.as_deref().unwrap_or("served"), micros(seen.total_us));
    let denied = learned.is_ok() && seen.error.as_deref() == Some("forbidden");
    report.check(denied, "whom a policy denies is refused by connect() itself", &what);
    stage.lab.unauthorize(NAMESPACE, "no-visitors")?;
    let (good, seen) = settles(visitor, web, true);
    report.check(good, "without the policy it is served", &seen);
    Ok(())
}

fn strict(stage: &Stage, report: &mut Report) -> Result<()> {
    report.scene("STRICT refuses a client that speaks plain text");
    let (good, seen) = settles(&stage.legacy, &stage.web[1], true);
    report.check(good, "PERMISSIVE: the pod outside the mesh is served", &seen);
    stage.lab.require(NAMESPACE, "default", &json!({"mtls": {"mode": "STRICT"}}))?;
    let (good, seen) = settles(&stage.legacy, &stage.web[1], false);
    report.check(good, "STRICT: it is refused", &seen);
    let (good, seen) = settles(&stage.shopper, &stage.web[1], true);
    report.check(good, "STRICT: the mesh's own clients are served", &seen);
    stage.lab.unrequire(NAMESPACE, "default")?;
    let (good, seen) = settles(&stage.legacy, &stage.web[1], true);
    report.check(good, "PERMISSIVE again", &seen);
    Ok(())
}

fn telemetry(stage: &Stage, report: &mut Report) -> Result<()> {
    report.scene("Metrics and access-log lines of these very connections");
    let agent = stage.lab.agent(2)?;
    let labels = [
        ("reporter", "destination"),
        ("source_workload", "shopper"),
        ("destination_workload", "web-2"),
        ("connection_security_policy", "mutual_tls"),
    ];
    let scrape = agent.metrics()?;
    let mut shown = Vec::new();
    for name in [
        "istio_tcp_connections_opened_total",
        "istio_tcp_connections_closed_total",
        "istio_tcp_received_bytes_total",
        "istio_tcp_sent_bytes_total",
    ] {
        shown.push(format!("{name}{{{}}} {}", pairs(&labels), scrape.sum(name, &labels)));
    }
    let logged: Vec<_> = agent
        .access_log()
        .into_iter()
        .filter(|line| {
            line.get("src.workload") == "shopper"
                && line.get("dst.workload") == "web-2"
                && line.get("response_flags") == "-"
        })
        .collect();
    let opened = scrape.sum("istio_tcp_connections_opened_total", &labels);
    #[expect(clippy::cast_precision_loss, reason = "tens of connections")]
    let agree = opened > 0.0 && opened == logged.len() as f64;
    report.check(agree, "the metrics and the access log count the same connections", &format!("{opened}"));
    report.quote(shown);
    let Some(last) = logged.last() else { return Ok(()) };
    let keys = [
        "src.addr",
        "src.identity",
        "dst.hbone_addr",
        "dst.identity",
        "bytes_recv",
        "bytes_sent",
        "duration",
        "trace_id",
    ];
    report.quote(keys.map(|key| format!("{key}={}", last.get(key))).into());
    Ok(())
}

fn pairs(labels: &[(&str, &str)]) -> String {
    labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect::<Vec<_>>().join(",")
}

fn agent_killed(stage: &Stage, report: &mut Report) -> Result<()> {
    report.scene("The agent is killed: new connections fail closed, then it comes back");
    let agent = stage.lab.agent(1)?;
    agent.daemon.kill()?;
    let recording = stage.lab.record()?;
    let seen = stage.shopper.connect(stage.web[1].at(WEB)).say("GET / HTTP/1.0\r\n\r\n").run()?;
    sleep(Duration::from_millis(50));
    let leaked = recording.finish()?.streams.iter().filter(|stream| stream.to.port() == WEB).count();
    let quick = seen.total_us < 100_000;
    report.check(
        seen.was_refused() && quick,
        "with no agent the shopper is refused at once",
        &format!("{} after {:.1} ms", seen.error.as_deref().unwrap_or("served"), micros(seen.total_us)),
    );
    report.check(leaked == 0, "and nothing left the node in plain text", "");
    let begun = Instant::now();
    agent.start()?;
    stage.shopper.wait_captured()?;
    let (good, seen) = settles(&stage.shopper, &stage.web[1], true);
    report.check(
        good,
        "a new agent adopts the pods and serves them",
        &format!("{seen} after {:.1} s", begun.elapsed().as_secs_f64()),
    );
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "milliseconds for people")]
fn micros(value: u64) -> f64 {
    value as f64 / 1_000.0
}

/// The last scene: everything goes, and a listing proves it.
pub fn removal(stage: Stage, report: &mut Report) -> Result<()> {
    report.scene("Clean removal");
    for pod in stage.members() {
        pod.withdraw()?;
    }
    for node in [1, 2] {
        let agent = stage.lab.agent(node)?;
        let pods = until(Duration::from_secs(10), "", || (pod_pins(agent) == 0).then_some(0))
            .unwrap_or_else(|_| pod_pins(agent));
        report.check(pods == 0, &format!("node{node}: no pin of a pod is left in bpffs"), &format!("{pods}"));
    }
    let mut traces = Vec::new();
    for pod in stage.members() {
        let (own, never) = (pod.kernel_state()?, stage.legacy.kernel_state()?);
        // The pod that never joined shows what a pod looks like; only addresses differ.
        if shape(&own) != shape(&never) {
            traces.push(pod.name().to_owned());
        }
    }
    report.check(traces.is_empty(), "no rule, route or sysctl is left in a pod", &traces.join(", "));
    let (good, seen) = match curl(&stage.shopper, &url(&stage.web[1])) {
        Ok(answer) => (true, answer),
        Err(error) => (false, error),
    };
    report.check(good, "the pods go on without the mesh", seen.lines().next().unwrap_or_default());
    let prefix = stage.lab.prefix().to_owned();
    let Stage { lab, web, quotes, shopper, visitor, legacy, service } = stage;
    drop((web, quotes, shopper, visitor, legacy, service));
    lab.remove().context("removing the lab")?;
    let left: Vec<String> = leftovers()?.into_iter().filter(|line| line.contains(&prefix)).collect();
    report.check(
        left.is_empty(),
        "no namespace, cgroup, mount, folder or process is left on this machine",
        &format!("{} found under {prefix}", left.len()),
    );
    report.quote(left);
    Ok(())
}

/// Pins below a `pods` folder.
fn pod_pins(agent: &heddle_lab::agent::Agent) -> usize {
    agent.pins().iter().filter(|path| path.parent().is_some_and(|parent| parent.ends_with("pods"))).count()
}

/// Rules, routes and sysctls without the pod's own addresses.
fn shape(state: &str) -> String {
    let word = |word: &str| {
        let address = word.split('/').next().unwrap_or_default();
        if address.parse::<std::net::IpAddr>().is_ok() { "ADDRESS".to_owned() } else { word.to_owned() }
    };
    let mut lines: Vec<String> =
        state.lines().map(|line| line.split_whitespace().map(word).collect::<Vec<_>>().join(" ")).collect();
    lines.sort();
    lines.dedup();
    lines.join("\n")
}
