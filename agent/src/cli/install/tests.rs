use clap::Parser;
use serde_json::{Value, json};

use super::{Options, crds, manifests, objects::strictly, parse, yaml};

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    options: Options,
}

/// The objects that a command line prints, as values.
fn printed(line: &[&str]) -> Vec<Value> {
    let options = Line::try_parse_from([&["install"], line].concat()).unwrap().options;
    let text = yaml(&manifests(&options).unwrap()).unwrap();
    parse(&text).unwrap().iter().map(|object| object.value().unwrap()).collect()
}

fn one<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let is = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
    let found: Vec<_> = objects.iter().filter(is).collect();
    assert_eq!(found.len(), 1, "{kind} {name}");
    found[0]
}

fn pod<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    &one(objects, kind, name)["spec"]["template"]["spec"]
}

fn args(pod: &Value) -> Vec<&str> {
    pod["containers"][0]["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect()
}

fn refused(line: &[&str]) -> String {
    match Line::try_parse_from([&["install"], line].concat()) {
        Ok(line) => format!("{:#}", manifests(&line.options).unwrap_err()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_field_that_kubernetes_does_not_have_is_refused_with_its_place() {
    let refused = |text: &str| format!("{:#}", parse(text).unwrap_err());
    let misspelt = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, lables: {b: c}}\n";
    assert!(refused(misspelt).contains("Namespace a: unknown field .metadata.lables"), "{}", refused(misspelt));
    let deep = "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {name: a}\nspec:\n  selector: {}\n  template:\n    spec:\n      \
                containers:\n      - {name: b, privileged: true}\n";
    assert!(refused(deep).ends_with("unknown field .spec.template.spec.containers[0].privileged"), "{}", refused(deep));
    let typed = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: many}]}\n";
    assert!(refused(typed).contains("spec.ports[0].port"), "{}", refused(typed));
    assert!(refused("apiVersion: v1\nkind: Pod\n").contains("v1 Pod is no kind"));
    assert!(strictly::<Value>(&json!({"a": 1})).is_ok());
}

#[test]
fn every_object_says_whose_it_is_and_what_is_printed_is_what_is_read() {
    let objects = printed(&[]);
    assert!(objects.len() >= 15);
    for object in &objects {
        assert_eq!(object["metadata"]["labels"]["app.kubernetes.io/name"], "heddle", "{object}");
    }
    assert_eq!(printed(&["--namespace", "heddle-system", "--same-node", "kernel", "--ca", "built-in"]), objects);
}

#[test]
fn a_namespace_of_another_name_is_everywhere() {
    let objects = printed(&["--namespace", "mesh"]);
    let text = serde_json::to_string(&objects).unwrap();
    assert!(!text.contains("heddle-system"), "{text}");
    let agent = args(pod(&objects, "DaemonSet", "heddle-agent"));
    assert!(agent.contains(&"--ca-address=https://heddle-ca.mesh.svc:15012"), "{agent:?}");
    assert!(agent.contains(&"--root-namespace=mesh"));
    let ca = args(pod(&objects, "Deployment", "heddle-ca"));
    for arg in
        ["--root-secret=mesh/heddle-ca", "--name=heddle-ca.mesh.svc", "--agent-service-account=mesh/heddle-agent"]
    {
        assert!(ca.contains(&arg), "{ca:?}");
    }
}

#[test]
fn what_operators_change_is_changed_and_nothing_else() {
    let plain = printed(&[]);
    let objects = printed(&[
        "--image=registry.example/heddle:9",
        "--image-pull-secret=pull",
        "--trust-domain=prod.example",
        "--cluster-id=c1",
        "--cni-bin-dir=/a/bin",
        "--cni-conf-dir=/a/conf",
        "--cpu=20m",
        "--memory=64Mi",
        "--memory-limit=256Mi",
        "--same-node=mtls",
        "--taint",
        "--log-format=text",
        "--agent-arg=--drain-grace=60s",
    ]);
    for (kind, name) in [("DaemonSet", "heddle-agent"), ("Deployment", "heddle-ca")] {
        let pod = pod(&objects, kind, name);
        assert_eq!(pod["containers"][0]["image"], "registry.example/heddle:9");
        assert_eq!(pod["imagePullSecrets"], json!([{"name": "pull"}]));
        let args = args(pod);
        assert!(args.contains(&"--trust-domain=prod.example") && args.contains(&"--log-format=text"), "{args:?}");
        assert!(args.contains(&"--cluster-id=c1") && !args.contains(&"--log-format=json"), "{args:?}");
    }
    let agent = pod(&objects, "DaemonSet", "heddle-agent");
    let given = args(agent);
    for arg in ["--same-node=mtls", "--startup-taint", "--drain-grace=60s"] {
        assert!(given.contains(&arg), "{given:?}");
    }
    let resources = &agent["containers"][0]["resources"];
    assert_eq!(*resources, json!({"requests": {"cpu": "20m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}}));
    let volume =
        |name: &str| agent["volumes"].as_array().unwrap().iter().find(|volume| volume["name"] == name).unwrap();
    assert_eq!(volume("cni-bin")["hostPath"], json!({"path": "/a/bin", "type": "DirectoryOrCreate"}));
    assert_eq!(volume("cni-conf")["hostPath"]["path"], "/a/conf");
    let may = one(&objects, "ClusterRole", "heddle-agent")["rules"].as_array().unwrap().clone();
    assert!(may.contains(&json!({"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]})), "{may:?}");
    // Of the rest nothing differs.
    for kind in ["Namespace", "Service", "Role", "NetworkPolicy", "PodDisruptionBudget"] {
        let of = |objects: &[Value]| -> Vec<Value> {
            objects.iter().filter(|object| object["kind"] == kind).cloned().collect()
        };
        assert_eq!(of(&objects), of(&plain), "{kind}");
    }
}

#[test]
fn without_cni_nothing_of_the_nodes_cni_is_touched() {
    let objects = printed(&["--no-cni"]);
    let agent = serde_json::to_string(pod(&objects, "DaemonSet", "heddle-agent")).unwrap();
    assert!(!agent.contains("cni"), "{agent}");
}

#[test]
fn the_ca_is_heddles_own_or_an_intermediates_or_somebody_elses() {
    let objects = printed(&["--ca=secret", "--ca-secret=intermediate"]);
    let ca = pod(&objects, "Deployment", "heddle-ca");
    let given = args(ca);
    assert!(given.contains(&"--root-dir=/etc/heddle/ca-key") && !given.iter().any(|arg| arg.contains("root-secret")));
    assert_eq!(ca["volumes"][0]["secret"]["secretName"], "intermediate");
    assert_eq!(ca["containers"][0]["volumeMounts"][0]["mountPath"], "/etc/heddle/ca-key");

    let address = "--ca-address=https://istiod.istio-system.svc:15012";
    let objects = printed(&["--ca=external", address, "--ca-root=roots/ca.pem", "--ca-audience=other"]);
    assert!(!objects.iter().any(|object| object["metadata"]["name"] == "heddle-ca"));
    let agent = pod(&objects, "DaemonSet", "heddle-agent");
    assert!(args(agent).contains(&address));
    let text = serde_json::to_string(&agent["volumes"]).unwrap();
    assert!(
        text.contains(r#""name":"roots""#) && text.contains(r#"{"key":"ca.pem","path":"root-cert.pem"}"#),
        "{text}"
    );
    assert!(text.contains(r#""audience":"other""#) && !text.contains("heddle-ca-root"), "{text}");
}

#[test]
fn an_option_that_cannot_work_is_refused_by_its_flag() {
    for (line, flag) in [
        (&["--namespace=Mesh"][..], "--namespace"),
        (&["--image="], "--image"),
        (&["--image=a b"], "--image"),
        (&["--trust-domain=Not A Domain"], "--trust-domain"),
        (&["--cluster-id="], "--cluster-id"),
        (&["--cni-bin-dir=opt"], "--cni-bin-dir"),
        (&["--no-cni", "--cni-bin-dir=/opt"], "--no-cni"),
        (&["--cpu=much"], "--cpu"),
        (&["--memory=-1"], "--memory"),
        (&["--memory-limit=1MB"], "--memory-limit"),
        (&["--same-node=plain"], "--same-node"),
        (&["--ca=secret"], "--ca-secret"),
        (&["--ca=external"], "--ca-address"),
        (&["--ca-secret=x"], "--ca-secret"),
        (&["--ca=secret", "--ca-secret=x", "--ca-root=y"], "--ca-root"),
        (&["--ca=external", "--ca-address=http://a:1", "--ca-root=y"], "--ca-address"),
        (&["--agent-arg=drain"], "--agent-arg"),
        (&["--agent-arg=--no-such-flag"], "--no-such-flag"),
        (&["--agent-arg=--drain-grace=soon"], "--drain-grace"),
    ] {
        let said = refused(line);
        assert!(said.contains(flag), "{line:?}: {said}");
    }
}

#[test]
fn the_crds_are_those_of_deploy_and_fit_the_structural_rules() {
    let crds = crds::all().unwrap();
    let text = yaml(&crds.iter().cloned().map(Into::into).collect::<Vec<_>>()).unwrap();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/crds/policies.yaml");
    let kept = std::fs::read_to_string(file).unwrap_or_default();
    let documents = kept.split_once("\n---").map(|(_, rest)| format!("---{rest}")).unwrap_or_default();
    assert_eq!(documents, text, "write `heddle install --crds=yes`'s first two documents to deploy/crds/policies.yaml");
    for crd in &crds {
        assert_eq!(crd.spec.versions.iter().filter(|version| version.storage).count(), 1);
        for version in &crd.spec.versions {
            assert!(version.subresources.as_ref().unwrap().status.is_some());
            structural(&serde_json::to_value(&version.schema).unwrap()["openAPIV3Schema"], "");
        }
    }
    assert_eq!(crds[0].metadata.name.as_deref(), Some("authorizationpolicies.security.istio.io"));
    assert_eq!(crds[1].metadata.name.as_deref(), Some("peerauthentications.security.istio.io"));
}

#[test]
fn a_misspelt_field_of_a_policy_reaches_heddle() {
    let level = |schema: &Value| schema["x-kubernetes-preserve-unknown-fields"] == true;
    for crd in crds::all().unwrap() {
        for version in &crd.spec.versions {
            let schema = serde_json::to_value(&version.schema).unwrap();
            let spec = &schema["openAPIV3Schema"]["properties"]["spec"];
            assert!(level(spec));
            if crd.spec.names.kind == "AuthorizationPolicy" {
                let rule = &spec["properties"]["rules"]["items"];
                let source = &rule["properties"]["from"]["items"]["properties"]["source"];
                assert!(level(rule) && level(source), "{rule}");
            }
        }
    }
}

/// The rules of structural schemas that the API server enforces: a type everywhere, and properties beside no others.
fn structural(schema: &Value, place: &str) {
    let object = schema.as_object().unwrap_or_else(|| panic!("{place}: no schema"));
    let free = object.get("x-kubernetes-int-or-string").is_some()
        || object.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
    assert!(object.contains_key("type") || free, "{place}: no type");
    assert!(!(object.contains_key("properties") && object.contains_key("additionalProperties")), "{place}");
    assert!(!object.contains_key("$ref") && !object.contains_key("definitions"), "{place}");
    for (name, property) in object.get("properties").and_then(Value::as_object).into_iter().flatten() {
        structural(property, &format!("{place}.{name}"));
    }
    if let Some(items) = object.get("items") {
        structural(items, &format!("{place}[]"));
    }
    if let Some(more) = object.get("additionalProperties").filter(|more| more.is_object()) {
        structural(more, &format!("{place}.*"));
    }
}
