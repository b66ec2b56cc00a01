//! Are the manifests of `deploy/` what Kubernetes takes, what `heddle install` prints, and enough for an agent to run with?

mod api;
mod capabilities;
mod cluster;
mod node;
mod rights;
mod sample;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};
use heddle_lab::{Lab, Result, binaries, needs_program, needs_root};
use serde_json::Value;

/// Ends the test that it stands in, with a note, where there is no kubectl, or one whose kustomize is of before 2021.
macro_rules! needs_kubectl {
    () => {
        needs_program!("kubectl");
        if kubectl_minor()? < 21 {
            fn here() {}
            let test = std::any::type_name_of_val(&here).trim_end_matches("::here");
            heddle_lab::skip(test, "needs kubectl 1.21 or newer: Debian's package kubernetes-client is older");
            return Ok(());
        }
    };
}

/// 32 of kubectl 1.32.
fn kubectl_minor() -> Result<u32> {
    let told = run(Command::new("kubectl").args(["version", "--client", "-o", "json"]), "")?;
    let told: Value = serde_json::from_str(&told)?;
    let minor = told["clientVersion"]["minor"].as_str().unwrap_or_default();
    let digits: String = minor.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().with_context(|| told.to_string())
}

/// `deploy/` of the repository.
fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Every folder that is for `kubectl apply -k`, or `create -k`.
fn deployable() -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = ["crds", "monitoring", "sample"].map(|name| deploy().join(name)).into();
    for entry in fs::read_dir(deploy().join("overlays"))? {
        found.push(entry?.path());
    }
    found.sort();
    ensure!(found.len() > 8, "overlays are missing: {found:?}");
    Ok(found)
}

/// Runs to the end, with a text on stdin; its stdout.
fn run(command: &mut Command, input: &str) -> Result<String> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let text = input.to_owned();
    // What does not read it all has its reasons, and says them.
    let writer = std::thread::spawn(move || drop(stdin.write_all(text.as_bytes())));
    let output = child.wait_with_output()?;
    writer.join().ok().context("the writer broke off")?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{command:?}: {}\n{stdout}{stderr}", output.status);
    Ok(stdout.into_owned())
}

fn rendered(folder: &Path) -> Result<Vec<Value>> {
    documents(&run(Command::new("kubectl").arg("kustomize").arg(folder), "")?)
}

fn documents(text: &str) -> Result<Vec<Value>> {
    let all: Vec<Value> = serde_saphyr::from_multiple(text)?;
    Ok(all.into_iter().filter(|document| !document.is_null()).collect())
}

/// Lists that Kubernetes merges by a key, in whatever order they come.
fn order(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                order(field);
                let keyed = ["volumes", "volumeMounts", "env", "containers"].contains(&name.as_str());
                if let (true, Value::Array(items)) = (keyed, field) {
                    items.sort_by_key(ToString::to_string);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(order),
        _ => {}
    }
}

/// By kind, namespace and name.
fn by_name(mut objects: Vec<Value>) -> BTreeMap<(String, String, String), Value> {
    let key = |object: &Value| {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        (text("/kind"), text("/metadata/namespace"), text("/metadata/name"))
    };
    objects.iter_mut().for_each(order);
    objects.into_iter().map(|object| (key(&object), object)).collect()
}

fn install(args: &[&str]) -> Result<String> {
    run(Command::new(binaries::heddle()?).arg("install").args(["--crds", "no"]).args(args), "")
}

#[test]
fn every_overlay_renders_and_no_field_is_unknown_to_kubernetes() -> Result {
    needs_kubectl!();
    for folder in deployable()? {
        let objects = rendered(&folder).with_context(|| folder.display().to_string())?;
        ensure!(!objects.is_empty(), "{}: nothing", folder.display());
        for object in &objects {
            api::strictly(object).with_context(|| folder.display().to_string())?;
        }
    }
    Ok(())
}

#[test]
fn heddle_install_prints_what_the_default_overlay_renders() -> Result {
    needs_kubectl!();
    let overlay = by_name(rendered(&deploy().join("overlays/default"))?);
    let printed = by_name(documents(&install(&[])?)?);
    assert_eq!(printed.keys().collect::<Vec<_>>(), overlay.keys().collect::<Vec<_>>());
    for (name, object) in &overlay {
        assert_eq!(&printed[name], object, "{name:?}");
    }
    // Options and overlays that say the same make the same.
    for (name, args) in [
        ("same-node-mtls", &["--same-node=mtls"][..]),
        ("taint", &["--taint"]),
        ("no-cni", &["--no-cni"]),
        (
            "k3s",
            &["--cni-bin-dir=/var/lib/rancher/k3s/data/cni", "--cni-conf-dir=/var/lib/rancher/k3s/agent/etc/cni/net.d"],
        ),
        (
            "istiod",
            &["--ca=external", "--ca-address=https://istiod.istio-system.svc:15012", "--ca-root=istio-ca-root-cert"],
        ),
    ] {
        let overlay = by_name(rendered(&deploy().join("overlays").join(name))?);
        assert_eq!(by_name(documents(&install(args)?)?), overlay, "{name}");
    }
    Ok(())
}

#[test]
fn kubectl_is_content_with_what_is_printed_for_installing_and_uninstalling() -> Result {
    needs_kubectl!();
    let server = api::Discovery::start()?;
    let home = tempfile::tempdir()?;
    let kubectl = |args: &[&str], text: &str| {
        let mut command = Command::new("kubectl");
        command.env("HOME", home.path()).env("KUBECONFIG", "/dev/null").args(["--server", &server.url()]).args(args);
        run(&mut command, text)
    };
    let apply = ["apply", "--dry-run=client", "--validate=false", "-f", "-"];
    let printed = install(&[])?;
    let said = kubectl(&apply, &printed)?;
    assert_eq!(said.lines().filter(|line| line.ends_with("(dry run)")).count(), documents(&printed)?.len(), "{said}");
    let crds = run(Command::new(binaries::heddle()?).args(["install", "--crds", "yes"]), "")?;
    ensure!(kubectl(&apply, &crds)?.contains("customresourcedefinition"), "no CRDs");
    let uninstall = |step: &str| run(Command::new(binaries::heddle()?).args(["uninstall", "manifests", step]), "");
    let nodes = uninstall("nodes")?;
    assert_eq!(documents(&nodes)?.len(), 1);
    api::strictly(&documents(&nodes)?[0])?;
    ensure!(kubectl(&apply, &nodes)?.contains("daemonset.apps/heddle-agent"), "{nodes}");
    // Everything that was installed goes, the namespace last.
    let gone = documents(&uninstall("cluster")?)?;
    assert_eq!(by_name(gone.clone()), by_name(documents(&printed)?));
    assert_eq!(gone.last().and_then(|last| last["kind"].as_str()), Some("Namespace"));
    Ok(())
}

#[test]
fn each_metric_of_the_dashboard_is_exported() -> Result {
    needs_root!();
    let text = fs::read_to_string(deploy().join("monitoring/dashboard.json"))?;
    let dashboard: Value = serde_json::from_str(&text)?;
    let mut wanted = BTreeSet::new();
    metrics_of(&dashboard, &mut wanted);
    ensure!(wanted.len() > 20, "{wanted:?}");
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    assert_eq!(client.connect(server.at(7000)).say("x").with("--expect", 1).run()?.error, None);
    lab.authorize("shop", "none", &serde_json::json!({}))?;
    heddle_lab::until(std::time::Duration::from_secs(10), "a denial", || {
        let refused = client.connect(server.at(7000)).say("x").with("--expect", 1).run().ok()?.error.is_some();
        (refused && lab.agent(2).ok()?.metrics().ok()?.has("heddle_denied_total")).then_some(())
    })?;
    let mut exported = BTreeSet::new();
    for node in [1, 2] {
        exported.extend(lab.agent(node)?.metrics()?.0.into_iter().map(|sample| sample.name));
    }
    // Of things that go well there is none; of the CA's own, its tests show each.
    let source = |name: &str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent/src");
        let found = Command::new("grep").args(["-rqF", &format!("\"{name}\"")]).arg(folder).status();
        found.is_ok_and(|status| status.success())
    };
    for name in wanted {
        let family = name.strip_suffix("_bucket").unwrap_or(&name);
        ensure!(exported.contains(&name) || source(family), "{name} is in the dashboard, and nobody exports it");
    }
    Ok(())
}

/// Names of metrics in every `expr`.
fn metrics_of(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            if let Some(expression) = fields.get("expr").and_then(Value::as_str) {
                let words = expression.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
                let ours = |word: &&str| ["heddle_", "istio_", "process_"].iter().any(|start| word.starts_with(start));
                into.extend(words.filter(ours).map(str::to_owned));
            }
            fields.values().for_each(|field| metrics_of(field, into));
        }
        Value::Array(items) => items.iter().for_each(|item| metrics_of(item, into)),
        _ => {}
    }
}

#[test]
fn the_image_is_built_from_scratch_and_holds_the_binaries_alone() -> Result {
    needs_root!();
    for program in ["buildah", "readelf", "strip"] {
        if let Some(why) = heddle_lab::not_installed(program) {
            heddle_lab::skip("deploy::the_image_is_built_from_scratch_and_holds_the_binaries_alone", &why);
            return Ok(());
        }
    }
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("heddle.tar");
    let heddle = binaries::heddle()?;
    let binaries = heddle.parent().context("no folder")?;
    let build = |more: &[&str]| {
        let mut command = Command::new(deploy().join("image/build.sh"));
        command.arg("--binaries").arg(binaries).arg("--output").arg(&image).args(["--tag", "heddle:test"]).args(more);
        command
    };
    // A debug binary needs a C library, which this image does not have.
    let refused = build(&[]).output()?;
    ensure!(
        !refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("needs a C library"),
        "{refused:?}"
    );
    let said = run(&mut build(&["--dynamic"]), "")?;
    ensure!(said.contains("bytes compressed"), "{said}");
    let unpacked = folder.path().join("oci");
    fs::create_dir(&unpacked)?;
    run(Command::new("tar").arg("-xf").arg(&image).arg("-C").arg(&unpacked), "")?;
    let read = |path: &Path| -> Result<Value> { Ok(serde_json::from_str(&fs::read_to_string(path)?)?) };
    let blob = |digest: &Value| unpacked.join("blobs").join(digest.as_str().unwrap_or_default().replace(':', "/"));
    let manifest = read(&blob(&read(&unpacked.join("index.json"))?["manifests"][0]["digest"]))?;
    let config = read(&blob(&manifest["config"]["digest"]))?;
    assert_eq!(config["config"]["Entrypoint"], serde_json::json!(["/heddle"]));
    assert_eq!(manifest["layers"].as_array().map(Vec::len), Some(1));
    let files = run(Command::new("tar").arg("-tzf").arg(blob(&manifest["layers"][0]["digest"])), "")?;
    let files: BTreeSet<&str> =
        files.lines().map(|line| line.trim_end_matches('/')).filter(|line| !line.is_empty()).collect();
    assert_eq!(files, BTreeSet::from(["heddle", "heddle-cni"]));
    Ok(())
}
