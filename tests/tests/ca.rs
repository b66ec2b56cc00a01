//! Does the CA give agents of a cluster what runs on their node, and nobody anything else, by the word of programs that are not ours?

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, ensure};
use heddle_lab::{
    Result,
    apiserver::{ApiServer, Token, pod},
    binaries, needs_program, needs_root,
    process::{Place, Process},
    until,
};
use serde_json::{Value, json};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const PATIENCE: Duration = Duration::from_secs(40);

/// A cluster's API server, a CA that asks it, and a stock client of the CA. All on loopback.
struct Stage {
    _runtime: tokio::runtime::Runtime,
    api: ApiServer,
    folder: tempfile::TempDir,
    metrics: String,
    client: Process,
    ca: Process,
}

/// A free port of loopback, for a moment.
fn free() -> Result<String> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

impl Stage {
    fn set(python: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("heddle-ca-").tempdir()?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let api = runtime.block_on(ApiServer::start())?;
        for pod in [
            pod("heddle-system", "heddle-a", "agent-1", "heddle", "node-1"),
            pod("heddle-system", "heddle-b", "agent-2", "heddle", "node-2"),
            pod("shop", "web-0", "web-0", "web", "node-1"),
            pod("shop", "web-1", "web-1", "web", "node-2"),
            pod("shop", "api-0", "api-0", "api", "node-2"),
        ] {
            api.put(pod);
        }
        let mut done = pod("jobs", "done-0", "done-0", "done", "node-1");
        done["status"]["phase"] = json!("Succeeded");
        api.put(done);
        let mut gone = pod("shop", "gone-0", "gone-0", "gone", "node-1");
        gone["metadata"]["deletionTimestamp"] = json!("2020-01-01T00:00:00Z");
        api.put(gone);
        api.write_kubeconfig(&folder.path().join("kubeconfig"))?;
        let place = Place { netns: None, cgroup: None, logs: folder.path().to_owned(), files: None };
        let (address, metrics, root) = (free()?, free()?, folder.path().join("root.pem"));
        let path = |name: &str| folder.path().join(name).display().to_string();
        let ca = Process::start(
            &place,
            "ca",
            binaries::heddle()?,
            &[
                "ca",
                "--listen",
                &address,
                "--metrics-listen",
                &metrics,
                "--trust-domain",
                "cluster.local",
                "--kubernetes",
                "--kubeconfig",
                &path("kubeconfig"),
                "--publish-root",
                &path("root.pem"),
                "--name",
                "ca.heddle.test",
                "--log-format",
                "json",
            ],
        )?;
        until(PATIENCE, "the CA to be ready", || {
            root.is_file().then(|| get(&metrics, "/healthz/ready").ok()?.contains("ready\n").then_some(()))?
        })
        .with_context(|| ca.stderr())?;
        let proto = binaries::ca_proto();
        let script = binaries::ca_client();
        let texts = [&script, &proto].map(|path| path.display().to_string());
        let args = [&texts[0], &texts[1], &address, &path("root.pem"), "ca.heddle.test"].map(str::to_owned);
        let mut client = Process::start(&place, "client", python, &args)?;
        assert_eq!(client.next_line(PATIENCE)?, "ready");
        Ok(Self { _runtime: runtime, api, folder, metrics, client, ca })
    }

    /// What a stock client hears.
    fn ask(&mut self, token: &str, identity: &str, csr: &str) -> Result<Value> {
        self.client.tell(&json!({"token": token, "identity": identity, "csr": csr}).to_string())?;
        Ok(serde_json::from_str(&self.client.next_line(PATIENCE)?)?)
    }

    /// A request by openssl, with extensions such as `subjectAltName=URI:…`.
    fn request(&self, extensions: &[&str]) -> Result<String> {
        let key = self.folder.path().join("key.pem");
        let mut command = Command::new("openssl");
        command.args([
            "req",
            "-new",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-subj",
            "/",
        ]);
        command.arg("-keyout").arg(&key);
        for extension in extensions {
            command.args(["-addext", extension]);
        }
        run(&mut command)
    }

    /// How many requests were refused for this reason, as the CA's metrics have it.
    fn refused(&self, reason: &str) -> Result<f64> {
        let text = get(&self.metrics, "/metrics")?;
        let scrape = heddle_lab::metrics::Scrape::parse(&text);
        Ok(scrape.sum("heddle_ca_requests_total", &[("result", "refused"), ("reason", reason)]))
    }
}

fn get(address: &str, path: &str) -> Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: ca\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Ok(answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{command:?}: {stdout}{stderr}");
    Ok(stdout.into_owned())
}

fn agent() -> Token {
    Token::of("heddle-system", "heddle", "heddle-a", "agent-1")
}

#[test]
fn a_stock_client_gets_what_runs_on_its_node_and_openssl_verifies_it_and_is_refused_anything_else() -> Result {
    needs_root!();
    needs_program!("openssl");
    let Some(python) = binaries::grpc_python() else {
        heddle_lab::skip("ca", "needs Python with grpcio-tools, which `cargo xtask test` installs");
        return Ok(());
    };
    let mut stage = Stage::set(&python)?;
    let good = stage.api.issue(agent());
    let csr = stage.request(&[])?;
    let answer = stage.ask(&good, WEB, &csr)?;
    assert_eq!(answer["code"], "OK", "{answer} {}", stage.ca.stderr());
    verify(&stage, &answer["chain"])?;
    // Each bad token, each bad request: one answer, and its reason in the CA's metric.
    let other = stage.api.issue(Token::of("heddle-system", "heddle", "heddle-b", "agent-2"));
    let tokens: Vec<(String, &str)> = vec![
        ("nonsense".to_owned(), "token_malformed"),
        (agent().text(99), "token_rejected"),
        (stage.api.issue(Token { expires: -1, ..agent() }), "token_expired"),
        (stage.api.issue(Token { expires: -1, lies: true, ..agent() }), "token_rejected"),
        (stage.api.issue(Token { audiences: vec!["vault".to_owned()], ..agent() }), "token_audience"),
        (stage.api.issue(Token { pod_uid: "another".to_owned(), ..agent() }), "caller_pod_uid"),
        (stage.api.issue(Token { pod: "heddle-z".to_owned(), ..agent() }), "caller_pod_gone"),
        (stage.api.issue(Token::of("shop", "web", "web-0", "web-0")), "caller_account"),
        (stage.api.issue(Token { pod_uid: String::new(), ..agent() }), "token_unbound"),
        (stage.api.issue(Token { node: "node-2".to_owned(), ..agent() }), "caller_node"),
    ];
    let mut tries: Vec<(String, String, String, &str)> = Vec::new();
    for (token, reason) in tokens {
        tries.push((token, WEB.to_owned(), csr.clone(), reason));
    }
    let id = |namespace: &str, account: &str| format!("spiffe://cluster.local/ns/{namespace}/sa/{account}");
    for (identity, reason) in [
        (id("shop", "api"), "not_on_node"),
        (id("jobs", "done"), "pod_ended"),
        (id("shop", "gone"), "pod_ended"),
        (id("shop", "nobody"), "not_on_node"),
        ("spiffe://elsewhere.test/ns/shop/sa/web".to_owned(), "trust_domain"),
        ("spiffe://cluster.local/ns/shop/sa/web\0".to_owned(), "bad_spiffe_id"),
    ] {
        tries.push((good.clone(), identity, stage.request(&[])?, reason));
    }
    let san = |names: &str| format!("subjectAltName={names}");
    for (extensions, reason) in [
        (vec![san(&format!("URI:{WEB},URI:{WEB}"))], "csr_names"),
        (vec![san(&format!("URI:{WEB},DNS:ca.heddle.test"))], "csr_other_name"),
        (vec!["basicConstraints=critical,CA:TRUE".to_owned()], "csr_ca"),
        (vec!["keyUsage=keyCertSign".to_owned()], "csr_ca"),
    ] {
        let extensions: Vec<&str> = extensions.iter().map(String::as_str).collect();
        tries.push((good.clone(), WEB.to_owned(), stage.request(&extensions)?, reason));
    }
    // The first request again, by the agent of the other node, where the same identity runs too.
    tries.push((other.clone(), WEB.to_owned(), csr.clone(), "csr_replayed"));
    tries.push((good.clone(), WEB.to_owned(), format!("{csr}{}", "\n".repeat(10_000)), "csr_too_large"));
    for (token, identity, csr, reason) in tries {
        let before = stage.refused(reason)?;
        let answer = stage.ask(&token, &identity, &csr)?;
        let said = (&answer["code"], &answer["text"]);
        assert_eq!(said, (&json!("UNAUTHENTICATED"), &json!("request authenticate failure")), "{reason}");
        assert_eq!(stage.refused(reason)?, before + 1.0, "{reason}: {}", stage.ca.stderr());
    }
    // And the other agent gets its own, so that none of these was refused for being the second.
    let own = stage.request(&[&format!("subjectAltName=URI:{}", id("shop", "api"))])?;
    assert_eq!(stage.ask(&other, &id("shop", "api"), &own)?["code"], "OK");
    let log = stage.ca.stderr();
    assert!(!log.contains(&good) && !log.contains(&other), "a token is in the log");
    Ok(())
}

/// openssl builds the chain to the published root, for both purposes, and finds the identity in it and our key.
fn verify(stage: &Stage, chain: &Value) -> Result {
    let entries: Vec<&str> = chain.as_array().context("no chain")?.iter().filter_map(Value::as_str).collect();
    let (leaf, rest) = entries.split_first().context("an empty chain")?;
    let write = |name: &str, text: &str| -> Result<String> {
        let path = stage.folder.path().join(name);
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let leaf = write("leaf.pem", leaf)?;
    let (rest, roots) = (write("rest.pem", &rest.concat())?, stage.folder.path().join("root.pem"));
    for purpose in ["sslserver", "sslclient"] {
        let mut command = Command::new("openssl");
        command.args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"]).arg(&roots);
        run(command.args(["-untrusted", &rest, &leaf]))?;
    }
    let text = run(Command::new("openssl").args(["x509", "-in", &leaf, "-noout", "-text"]))?;
    ensure!(text.contains(&format!("URI:{WEB}")) && text.contains("CA:FALSE"), "{text}");
    let of = |args: &[&str]| run(Command::new("openssl").args(args));
    let key = stage.folder.path().join("key.pem").display().to_string();
    assert_eq!(of(&["x509", "-in", &leaf, "-noout", "-pubkey"])?, of(&["pkey", "-in", &key, "-pubout"])?);
    Ok(())
}
