use super::{Manifest, read};
use crate::cluster::PolicyKind;

fn good(text: &str) -> Manifest {
    let manifest = read(text);
    assert_eq!(manifest.errors, []);
    assert_eq!(manifest.invalid, []);
    manifest
}

/// The errors as people see them.
fn errors(text: &str) -> Vec<String> {
    read(text).errors.iter().map(ToString::to_string).collect()
}

const POD: &str = "{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop}, status: {podIP: 10.0.0.1}}";

#[test]
fn documents_of_one_file_are_all_read() {
    let manifest = good(
        "# shop\n%YAML 1.2\n---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n---\n# nothing\n---\n\
         apiVersion: v1\nkind: Node\nmetadata: {name: node-1}\n--- {apiVersion: v1, kind: Service, metadata: {name: web}}\n...\n",
    );
    assert_eq!(manifest.objects.namespaces.len(), 1);
    assert_eq!(manifest.objects.nodes.len(), 1);
    assert_eq!(manifest.objects.services[0].metadata.namespace.as_deref(), Some("default"));
}

#[test]
fn empty_files_hold_nothing() {
    for text in ["", "\n", "---\n", "# only a comment\n", "---\n---\n"] {
        assert_eq!(good(text).objects.pods.len(), 0, "{text:?}");
    }
}

#[test]
fn lists_are_flattened_typed_or_not() {
    let list =
        format!("apiVersion: v1\nkind: List\nitems:\n- {POD}\n- {{apiVersion: v1, kind: List, items: [{POD}]}}\n");
    assert_eq!(good(&list).objects.pods.len(), 2);
    let typed = "apiVersion: v1\nkind: PodList\nitems:\n- metadata: {name: a}\n- metadata: {name: b}\n";
    assert_eq!(good(typed).objects.pods.len(), 2);
    let deep = (0..10).fold(POD.to_owned(), |inner, _| format!("{{apiVersion: v1, kind: List, items: [{inner}]}}"));
    assert_eq!(errors(&deep).len(), 1);
}

#[test]
fn json_is_read_with_tabs_and_escapes() {
    let json = "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"Pod\",\n\t\"metadata\": {\"name\": \"web\", \"annotations\": {\"x\": \"a\\/b\\u00e9\\\"\"}}\n}\n";
    let annotations = good(json).objects.pods[0].metadata.annotations.clone().unwrap();
    assert_eq!(annotations["x"], "a/b\u{e9}\"");
}

#[test]
fn kinds_of_no_use_are_passed_over() {
    let manifest = good("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: Anything Goes}\nspec: 7\n");
    assert_eq!(manifest.objects.pods.len(), 0);
}

#[test]
fn errors_name_line_object_and_field() {
    let table = [
        ("a: [1\n", "line "),
        ("- 1\n", "document at line 1: document: : is no object"),
        ("kind: Pod\n", "document at line 1: Pod without a name: apiVersion: is missing"),
        ("apiVersion: v1\nmetadata: {name: x}\n", "object x: kind: is missing"),
        ("apiVersion: v1\nkind: Pod\n", "Pod without a name: metadata: is missing"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: Web}\n", "Pod Web: metadata.name: "),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: ../web}\n", "metadata.name: "),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: 'a/b'}\n", "metadata.namespace: "),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: web, uid: ../../etc}\n", "metadata.uid: "),
        (
            "# a\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop}\nspec: {hostNetwork: maybe}\n",
            "document at line 2: Pod shop/web: spec.hostNetwork: ",
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: web}, status: {podIP: ten}}",
            "Pod default/web: status.podIP: \"ten\"",
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: web}, status: {podIPs: [{ip: 10.0.0.1}, {ip: x}]}}",
            "status.podIPs[1].ip: ",
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: web}, spec: {containers: [], serviceAccountName: a/b}}",
            "spec.serviceAccountName: ",
        ),
        (
            "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [{port: 70000}]}}",
            "spec.ports[0].port: 70000",
        ),
        ("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {clusterIP: x}}", "spec.clusterIP: "),
        (
            "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: w}, addressType: IPv5, endpoints: []}",
            "addressType: ",
        ),
        (
            "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: w}, addressType: IPv4, endpoints: [{addresses: [x]}]}",
            "endpoints[0].addresses: \"x\"",
        ),
        ("apiVersion: v2\nkind: Pod\nmetadata: {name: web}\n", "Pod default/web: apiVersion: is not known"),
        ("apiVersion: v1\nkind: Pod\nkind: Pod\nmetadata: {name: web}\n", "duplicate"),
    ];
    for (text, expected) in table {
        let errors = errors(text);
        assert_eq!(errors.len(), 1, "{text}: {errors:?}");
        assert!(errors[0].contains(expected), "{text}: {errors:?}");
    }
}

#[test]
fn line_of_a_syntax_error_is_the_files() {
    let text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\nkind: x\n  bad: [\n";
    let errors = errors(text);
    assert!(errors.len() == 1 && (errors[0].starts_with("line 6") || errors[0].starts_with("line 7")), "{errors:?}");
}

#[test]
fn malformed_document_costs_no_other() {
    let manifest =
        read(&format!("{POD}\n---\na: [\n---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: shop}}}}\n"));
    assert_eq!(manifest.errors.len(), 1);
    assert_eq!((manifest.objects.pods.len(), manifest.objects.namespaces.len()), (1, 1));
}

#[test]
fn documents_that_would_exhaust_the_agent_are_refused() {
    let deep = format!("{}{}", "[".repeat(5_000), "]".repeat(5_000));
    assert_eq!(errors(&deep).len(), 1);
    let mut bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
    for level in 1..10 {
        let inner = format!("*a{}", level - 1);
        bomb.push_str(&format!("a{level}: &a{level} [{}]\n", [inner.as_str(); 10].join(",")));
    }
    assert_eq!(errors(&bomb).len(), 1);
}

#[test]
fn policies_of_both_versions_are_read() {
    for version in ["v1", "v1beta1"] {
        let manifest = good(&format!(
            "apiVersion: security.istio.io/{version}\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\n\
             spec: {{action: DENY, rules: [{{}}]}}\nstatus: {{anything: [at, all]}}\n---\n\
             apiVersion: security.istio.io/{version}\nkind: PeerAuthentication\nmetadata: {{name: p}}\nspec: {{mtls: {{mode: STRICT}}}}\n"
        ));
        assert_eq!(manifest.objects.authorization_policies[0].spec.action.as_deref(), Some("DENY"));
        assert_eq!(manifest.objects.peer_authentications.len(), 1);
    }
}

#[test]
fn policy_without_a_spec_has_an_empty_one() {
    for spec in ["", "spec:\n", "spec: {}\n"] {
        let manifest = good(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\n{spec}"
        ));
        assert_eq!(manifest.objects.authorization_policies[0].spec.rules, None);
    }
}

/// The one policy that is carried as invalid: its error and what is known of it.
fn carried(rest: &str) -> (String, crate::cluster::InvalidPolicy) {
    let text = format!("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n{rest}");
    let manifest = read(&text);
    assert_eq!(manifest.errors, [], "a policy is no reason to refuse the file");
    assert_eq!(manifest.objects.authorization_policies.len(), 0);
    assert_eq!((manifest.invalid.len(), manifest.objects.invalid_policies.len()), (1, 1), "{text}");
    (manifest.invalid[0].to_string(), (*manifest.objects.invalid_policies[0]).clone())
}

#[test]
fn policy_with_an_unknown_field_is_carried_with_selector_and_path() {
    let (error, policy) = carried(
        "metadata: {name: p, namespace: shop}\nspec:\n  selector: {matchLabels: {app: web}}\n  action: DENY\n  rules:\n  \
         - from:\n    - source: {principles: ['*']}\n",
    );
    assert!(error.contains("AuthorizationPolicy shop/p: spec.rules[0].from[0].source.principles: "), "{error}");
    assert_eq!(policy.kind, PolicyKind::AuthorizationPolicy);
    assert_eq!((&*policy.namespace, &*policy.name), ("shop", "p"));
    assert_eq!(policy.selector, Some([("app".to_owned(), "web".to_owned())].into()));
    assert!(policy.decides);
}

#[test]
fn policy_of_the_wrong_shape_is_carried() {
    let table = [
        (
            "metadata: {name: p}\nspec: {rules: [{to: [{operation: {ports: [80]}}]}]}\n",
            "spec.rules[0].to[0].operation.ports[0]",
        ),
        ("metadata: {name: p}\nspec: {selector: {matchLabels: [app]}}\n", "spec.selector.matchLabels"),
        ("metadata: {name: p}\nspec: [1]\n", "spec"),
        // Each of these is a policy to serde, which takes lists for structs.
        ("metadata: {name: p}\nspec: []\n", "spec"),
        ("metadata: {name: p}\nspec: {action: DENY, rules: [[]]}\n", "spec.rules[0]"),
        (
            "metadata: {name: p}\nspec: {action: DENY, rules: [{from: [{source: []}]}]}\n",
            "spec.rules[0].from[0].source",
        ),
        ("metadata: {name: p}\nspec: {selector: []}\n", "spec.selector"),
        ("metadata: {name: p}\nspec: {rules: [null]}\n", "spec.rules[0]"),
        ("metadata: {name: p}\nspecs: {action: DENY}\n", "specs"),
    ];
    for (text, field) in table {
        let (_, policy) = carried(text);
        assert_eq!(policy.field, field, "{text}");
        assert_eq!(policy.selector, None);
        assert!(policy.decides);
    }
}

#[test]
fn policy_of_an_unknown_version_is_carried() {
    let manifest = read("apiVersion: security.istio.io/v2\nkind: PeerAuthentication\nmetadata: {name: p}\n");
    assert_eq!(manifest.objects.invalid_policies[0].kind, PolicyKind::PeerAuthentication);
    assert_eq!(manifest.objects.invalid_policies[0].field, "apiVersion");
}

#[test]
fn invalid_policy_that_is_dry_run_or_for_a_gateway_decides_nothing() {
    let (_, policy) = carried("metadata: {name: p, annotations: {istio.io/dry-run: 'true'}}\nspec: {x: 1}\n");
    assert!(!policy.decides);
    let (_, policy) = carried("metadata: {name: p}\nspec: {x: 1, targetRefs: [{kind: Gateway, name: g}]}\n");
    assert!(!policy.decides);
    let (_, policy) = carried("metadata: {name: p}\nspec: {x: 1, targetRefs: []}\n");
    assert!(policy.decides);
}

/// Namespaces of the gaps that a text leaves.
fn gaps(text: &str) -> Vec<Option<String>> {
    read(text).gaps.into_iter().map(|gap| gap.map(|namespace| namespace.to_string())).collect()
}

#[test]
fn what_may_have_been_a_policy_leaves_a_gap_as_wide_as_nobody_can_say_less() {
    let torn = |namespace: &str, end: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\n  \
             namespace: {namespace}\nspec: {{action: [{end}"
        )
    };
    let shop = vec![Some("shop".to_owned())];
    let table = [
        // Not YAML.
        (torn("shop", "\n"), shop.clone()),
        (torn("shop", ""), shop.clone()),
        (torn("'shop' # ours", "\n"), shop.clone()),
        (torn("Shop", "\n"), vec![None]),
        ("kind: [\n".into(), vec![None]),
        ("kind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: [\n".into(), vec![None]),
        // Only a namespace of the object itself counts, and half a word does not.
        ("kind: AuthorizationPolicy\nspec:\n  namespace: shop\n  x: [\n".into(), vec![None]),
        ("kind: AuthorizationPolicy\nmetadata:\n  labels:\n    namespace: shop\nspec: [\n".into(), vec![None]),
        ("spec: [\nkind: AuthorizationPolicy\nmetadata:\n  namespace: sh".into(), vec![None]),
        ("kind: List\nmetadata:\n  namespace: shop\nitems: [\n".into(), vec![None]),
        // YAML, and no object.
        ("AuthorizationPo".into(), vec![None]),
        ("apiVersion: security.istio.io/v1\nmetadata: {name: p, namespace: shop}\n".into(), shop.clone()),
        ("apiVersion: security.istio.io/v1\nmetadata: {name: p, namespace: shop}".into(), vec![None]),
        (
            "apiVersion: security.istio.io\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n".into(),
            shop.clone(),
        ),
        (
            "apiVersion: security.istio.io/v1\nkind: AuthorisationPolicy\nmetadata: {name: p, namespace: shop}\n"
                .into(),
            shop.clone(),
        ),
        (
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: P_, namespace: shop}\n"
                .into(),
            shop,
        ),
        ("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: p\n".into(), vec![None]),
        ("apiVersion: v1\nkind: List\nitems: 7\n".into(), vec![None]),
        // No policy is lost here.
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {hostNetwork: 7}\n".into(), vec![]),
        ("apiVersion: v1\nkind: PodList\nitems: 7\n".into(), vec![]),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: [\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: p}\n".into(),
            vec![],
        ),
        ("apiVersion: policy.linkerd.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p}\n".into(), vec![]),
        ("apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: p}\n".into(), vec![]),
        // The last document may be the torn one of a file that goes on.
        ("apiVersion: v1\nkind: Pod\nmetadata: [\n".into(), vec![None]),
    ];
    for (text, expected) in table {
        assert_eq!(gaps(&text), expected, "{text}");
    }
}

#[test]
fn policies_are_found_where_they_stand() {
    let text = "# nothing\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\napiVersion: security.istio.io/v1\n\
        kind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n---\n\
        apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: q}\nspec: {x: 1}\n";
    let found: Vec<_> = read(text).policies.into_iter().map(|found| (found.line, found.kind, found.name)).collect();
    let expected = [
        (6, PolicyKind::AuthorizationPolicy, "shop/p".to_owned()),
        (10, PolicyKind::PeerAuthentication, "default/q".to_owned()),
    ];
    assert_eq!(found, expected);
}
