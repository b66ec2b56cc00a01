//! The sample application as containers of two nodes: does the shop work, and does anybody get past its policies?

use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, ensure};
use heddle_lab::{
    Lab, Result,
    containerd::{ContainerPod, Containerd},
    needs_program, needs_root, until,
};
use serde_json::{Value, json};

use super::{deploy, documents, run};

/// Cluster addresses of the Services, by the names under which the workloads look for them.
const SERVICES: [(&str, Ipv4Addr); 2] =
    [("storefront", Ipv4Addr::new(10, 96, 0, 80)), ("ledger", Ipv4Addr::new(10, 96, 0, 54))];
const HOSTS: [(&str, Ipv4Addr); 2] = [("storefront.shop.svc", SERVICES[0].1), ("ledger.shop.svc", SERVICES[1].1)];
const WELCOME: &str = "welcome to the shop";
const PATIENCE: Duration = Duration::from_secs(40);

fn sample(file: &str) -> Result<Vec<Value>> {
    documents(&fs::read_to_string(deploy().join("sample").join(file))?)
}

/// The image, under the name that the workloads give it, as a runtime completes it.
fn image(folder: &Path) -> Result<PathBuf> {
    let archive = folder.join("sample.tar");
    let mut build = Command::new(deploy().join("image/build.sh"));
    build.args(["--tag", "docker.io/library/heddle-sample:latest", "--output"]).arg(&archive).arg("sample");
    run(&mut build, "")?;
    Ok(archive)
}

/// Pods of one of the sample's Deployments, as many as it wants.
fn workload<'a>(lab: &'a Lab, node: &'a Containerd, name: &str) -> Result<Vec<ContainerPod<'a>>> {
    let all = sample("workloads.yaml")?;
    let deployment = all.iter().find(|one| one["kind"] == "Deployment" && one["metadata"]["name"] == name);
    let deployment = deployment.with_context(|| format!("no Deployment {name}"))?;
    let replicas = deployment["spec"]["replicas"].as_u64().context("no replicas")?;
    let pod = |number| {
        let pod = node.pod(lab, "shop", &format!("{name}-{number}"), &[]);
        pod.template(&deployment["spec"]["template"], &HOSTS)?.start()
    };
    (0..replicas).map(pod).collect()
}

/// Writes a Service as the API server completes it, and the slice that its controller would write.
fn serve(lab: &Lab, name: &str, pods: &[ContainerPod<'_>]) -> Result {
    let address = SERVICES.iter().find(|(service, _)| *service == name).context("no such Service")?.1;
    let all = sample("shop.yaml")?;
    let service = all.iter().find(|one| one["kind"] == "Service" && one["metadata"]["name"] == name);
    let mut service = service.with_context(|| format!("no Service {name}"))?.clone();
    service["spec"]["clusterIP"] = json!(address);
    service["spec"]["clusterIPs"] = json!([address]);
    lab.manifests().apply(&service)?;
    let endpoints: Vec<Value> = pods
        .iter()
        .map(|pod| {
            json!({
                "addresses": [pod.address()], "nodeName": pod.node(),
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": "shop", "name": pod.full_name().trim_start_matches("shop/")},
            })
        })
        .collect();
    let port = &service["spec"]["ports"][0];
    lab.manifests().apply(&json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{name}-a"), "namespace": "shop", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": port["name"], "port": port["targetPort"], "protocol": "TCP"}],
        "endpoints": endpoints,
    }))
}

/// What a container of the sample says to a script.
fn says(pod: &ContainerPod<'_>, script: &str) -> Result<String> {
    let done = pod.execute(&["sh", "-c", script].map(str::to_owned))?;
    Ok(String::from_utf8(done.stdout)?)
}

#[test]
fn the_sample_shop_works_in_mutual_tls_and_its_ledger_answers_the_storefront_alone() -> Result {
    needs_root!();
    needs_program!("containerd");
    needs_program!("buildah");
    needs_program!("busybox");
    needs_program!("readelf");
    let lab = Lab::builder().containers().start()?;
    let archive = image(lab.dir())?;
    let (here, there) = (Containerd::start(&lab, 1)?, Containerd::start(&lab, 2)?);
    for node in [&here, &there] {
        node.import_archive(&archive)?;
    }
    let objects = [sample("shop.yaml")?, sample("policies.yaml")?].concat();
    for object in objects.iter().filter(|object| object["kind"] != "Service") {
        lab.manifests().apply(object)?;
    }
    let recording = lab.record()?;
    // Every step of a page is between nodes.
    let (ledgers, storefronts) = (workload(&lab, &there, "ledger")?, workload(&lab, &here, "storefront")?);
    serve(&lab, "ledger", &ledgers)?;
    serve(&lab, "storefront", &storefronts)?;
    let visitor = workload(&lab, &there, "visitor")?.pop().context("no visitor")?;

    // Pages come, each with an entry of a ledger, and every ledger has its turn.
    let entry = |line: &String| Some(line.strip_prefix("ledger ")?.split_once(" at ")?.0.to_owned());
    until(PATIENCE, "pages with entries of both ledgers", || {
        let said = visitor.said();
        let ledgers: BTreeSet<String> = said.iter().filter_map(entry).collect();
        (said.iter().any(|line| line == WELCOME) && ledgers.len() == 2).then_some(())
    })
    .with_context(|| format!("the visitor says {:?}", visitor.said()))?;

    // Whoever is not the storefront gets nothing of a ledger.
    const ASK: &str = "timeout 5 nc -w 2 ";
    assert_eq!(says(&visitor, &format!("{ASK} ledger.shop.svc 5432 </dev/null"))?, "");
    let line = lab.agent(2)?.wait_access("the denial", |line| {
        line.get("src.identity") == visitor.identity() && line.get("message") == "connection denied"
    })?;
    assert_eq!(line.get("dst.identity"), ledgers[0].identity());
    // That it was not for want of a way is shown by the one who may.
    ensure!(says(&storefronts[0], &format!("{ASK} ledger.shop.svc 5432 </dev/null"))?.starts_with("ledger ledger-"));

    // For who looks at the link there are tunnels and nothing else.
    let traffic = recording.finish()?;
    ensure!(traffic.to_port(15008).count() > 0, "no tunnel on the link");
    for port in [80, 8080, 5432] {
        assert_eq!(traffic.to_port(port).count(), 0, "port {port} on the link");
    }
    assert_eq!(traffic.holding(WELCOME.as_bytes()).count(), 0);

    // From outside the mesh both are shut, and from the namespace that the policies shut out.
    let outsider = here.pod(&lab, "street", "outsider", &["pause"]).mesh("disabled").start()?;
    for target in [ledgers[0].at(5432), storefronts[0].at(8080)] {
        let seen = outsider.connect(target, "GET / HTTP/1.0\r\n\r\n")?;
        ensure!(seen.was_refused() && seen.received.is_empty(), "{target}: {seen:?}");
    }
    let sandboxed = here.pod(&lab, "sandbox", "guest", &["pause"]).start()?;
    let seen = sandboxed.connect(storefronts[0].at(8080), "GET / HTTP/1.0\r\n\r\n")?;
    ensure!(seen.was_refused() && seen.received.is_empty(), "{seen:?}");

    // All that was carried was in mutual TLS.
    for node in [1, 2] {
        let carried = lab.agent(node)?.access_log();
        let carried: Vec<_> = carried.iter().filter(|line| line.get("message") == "connection complete").collect();
        ensure!(!carried.is_empty(), "node {node} carried nothing");
        for line in carried {
            assert_eq!(line.get("security"), "mutual_tls", "{line:?}");
        }
    }
    Ok(())
}
