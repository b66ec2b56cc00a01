use std::path::PathBuf;

use super::{
    explain,
    lint::{Effect, Report, lint, text},
};
use crate::{
    cluster::{self, ManifestError, Settings},
    policy::{Explained, Explanation, Question, Rulebook, answer},
};

const POD: &str = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, labels: {app: web}}\n\
    spec: {serviceAccountName: web}\nstatus: {podIP: 10.0.0.9}\n";

fn settings() -> Settings {
    Settings { root_namespace: "heddle-system".into(), ..Settings::default() }
}

fn authorization(spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\n\
         spec: {spec}\n"
    )
}

fn checked(text: &str) -> Report {
    lint(vec![(PathBuf::from("a.yaml"), Ok(text.to_owned()))], &settings())
}

/// How a client is answered by an agent that read this text.
fn decided(text: &str, from: &str) -> Explained {
    let snapshot = cluster::index(&[cluster::read(text).objects.into()], &settings(), 1);
    let question = Question { from: from.into(), to: "shop/web:8080".into(), ip: Some("10.0.1.1".parse().unwrap()) };
    answer(&question, &snapshot, &Rulebook::compile(&snapshot), &"cluster.local".parse().unwrap()).unwrap()
}

/// What L4 can't enforce, and the field at fault: each is reported before it is applied, and denies when it is applied.
#[test]
fn what_l4_cant_enforce_is_reported_and_fails_closed() {
    let rule = |rule: &str| format!("{{action: ALLOW, rules: [{{}}, {rule}]}}");
    let source = |source: &str| rule(&format!("{{from: [{{source: {{{source}}}}}]}}"));
    let operation = |operation: &str| rule(&format!("{{to: [{{operation: {{{operation}}}}}]}}"));
    let table = [
        ("methods", operation("methods: [GET]"), "spec.rules[1].to[0].operation.methods"),
        ("paths", operation("paths: [/admin]"), "spec.rules[1].to[0].operation.paths"),
        ("hosts", operation("hosts: [x.example]"), "spec.rules[1].to[0].operation.hosts"),
        ("JWT", source("requestPrincipals: ['*']"), "spec.rules[1].from[0].source.requestPrincipals"),
        ("JWT claim", rule("{when: [{key: 'request.auth.claims[iss]', values: [x]}]}"), "spec.rules[1].when[0].key"),
        ("header", rule("{when: [{key: 'request.headers[x]', values: [x]}]}"), "spec.rules[1].when[0].key"),
        ("CUSTOM", "{action: CUSTOM, provider: {name: x}, rules: [{}]}".into(), "spec.provider"),
        ("AUDIT", "{action: AUDIT, rules: [{}]}".into(), "spec.action"),
        ("trustDomains", source("namespaces: [a], trustDomains: [b]"), "spec.rules[1].from[0].source.trustDomains"),
        ("bad port", operation("ports: ['0']"), "spec.rules[1].to[0].operation.ports[0]"),
        ("bad CIDR", source("ipBlocks: [10.0.0.0/33]"), "spec.rules[1].from[0].source.ipBlocks[0]"),
        ("unknown field", source("principles: [a]"), "spec.rules[1].from[0].source.principles"),
        ("unknown field of the spec", "{ruels: [{}]}".into(), "spec.ruels"),
        (
            "spiffe://",
            source("principals: ['spiffe://cluster.local/ns/shop/sa/web']"),
            "spec.rules[1].from[0].source.principals[0]",
        ),
    ];
    for (what, spec, field) in table {
        let policy = authorization(&spec);
        let report = checked(&(POD.to_owned() + &policy));
        let found = report.problems.iter().find(|problem| problem.field == field);
        let found = found.unwrap_or_else(|| panic!("{what}: {field} is not in {:?}", report.problems));
        assert_eq!((found.line, found.object.as_str()), (Some(7), "AuthorizationPolicy shop/p"), "{what}");
        assert_eq!((found.effect, report.status()), (Effect::Denies, 1), "{what}");
        assert!(!found.fix.is_empty(), "{what}");
        // Beside a policy that allows everything, and for those that its readable part would let in.
        let allow = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
            metadata: {name: all, namespace: shop}\nspec: {rules: [{}]}\n";
        for from in ["shop/web", "none"] {
            assert!(decided(&(POD.to_owned() + allow), from).explanation.allowed);
            let decided = decided(&(POD.to_owned() + allow + &policy), from).explanation;
            assert_eq!(
                (decided.reason.as_str(), decided.policy.as_str()),
                ("policy_unenforceable", "shop/p"),
                "{what}"
            );
        }
    }
}

#[test]
fn a_peer_authentication_that_is_not_understood_refuses_plaintext() {
    let policy = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
        metadata: {name: p, namespace: shop}\nspec: {mtls: {mode: STRCIT}}\n";
    let report = checked(&(policy.to_owned() + POD));
    assert_eq!((report.problems[0].effect, report.problems[0].line), (Effect::RefusesPlaintext, Some(1)));
    assert_eq!(report.status(), 1);
    assert_eq!(decided(&(policy.to_owned() + POD), "none").explanation.reason, "mtls_required");
}

#[test]
fn what_can_be_enforced_is_clean_and_what_changes_nothing_costs_no_status() {
    let report = checked(&authorization("{rules: [{from: [{source: {namespaces: [shop]}}]}]}"));
    assert_eq!((report.problems.len(), report.policies, report.status()), (0, 1, 0));
    assert_eq!(text(&report), "no problem in 1 file with 1 policy\n");
    let gateway = authorization("{targetRefs: [{kind: Gateway, name: g}], rules: [{}]}");
    let foreign = "---\napiVersion: policy.linkerd.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: l}\n";
    let report = checked(&(gateway + foreign));
    assert_eq!(report.problems.iter().map(|problem| problem.effect).collect::<Vec<_>>(), [Effect::Nothing; 2]);
    assert_eq!(report.status(), 0);
}

#[test]
fn what_cant_be_read_is_worse_than_what_cant_be_enforced() {
    let unreadable = (PathBuf::from("b.yaml"), Err(ManifestError::Unreadable("permission denied".into())));
    let bad = (PathBuf::from("a.yaml"), Ok(authorization("{action: AUDIT}") + "---\nkind: [\n"));
    let report = lint(vec![bad, unreadable], &settings());
    let told: Vec<_> = report.problems.iter().map(|problem| (&*problem.file, problem.line, problem.effect)).collect();
    let expected = [
        ("a.yaml", Some(1), Effect::Denies),
        ("a.yaml", Some(7), Effect::Unreadable),
        ("b.yaml", None, Effect::Unreadable),
    ];
    assert_eq!(told, expected);
    assert_eq!(report.status(), 2);
    let text = text(&report);
    assert!(text.starts_with("a.yaml:1: AuthorizationPolicy shop/p: spec.action: "), "{text}");
    assert!(text.ends_with("3 problems in 2 files with 1 policy\n"), "{text}");
}

#[test]
fn an_object_in_two_files_is_reported() {
    let one = |name: &str| (PathBuf::from(name), Ok(authorization("{rules: [{}]}")));
    let report = lint(vec![one("a.yaml"), one("b.yaml")], &settings());
    assert_eq!((report.problems.len(), report.status()), (1, 1));
    assert_eq!((&*report.problems[0].file, report.problems[0].effect), ("b.yaml", Effect::NotInForce));
    assert!(report.problems[0].fix.contains("also in a.yaml"));
}

#[test]
fn the_json_of_a_report_is_stable() {
    let report = checked(&authorization("{action: AUDIT}"));
    let expected = serde_json::json!({
        "files": 1, "policies": 1,
        "problems": [{
            "file": "a.yaml", "line": 1, "object": "AuthorizationPolicy shop/p", "field": "spec.action",
            "fix": "\"AUDIT\" can't be enforced at L4: use ALLOW or DENY", "effect": "denies",
        }],
    });
    assert_eq!(serde_json::to_value(&report).unwrap(), expected);
}

#[test]
fn an_explanation_reads_well() {
    let spec = "{action: DENY, rules: [{from: [{source: {namespaces: [bank]}}]}]}";
    let allowed = decided(&(POD.to_owned() + &authorization(spec)), "shop/web");
    assert_eq!(
        explain::text(&allowed),
        "spiffe://cluster.local/ns/shop/sa/web at 10.0.1.1 -> shop/web (10.0.0.9) port 8080\n\
         allowed: no ALLOW policy is for it\n\
         plaintext to the port: let in: no PeerAuthentication says anything\n\
         \n\
         POLICY  ACTION  ROLE     MATCHES  WHY NOT\n\
         shop/p  DENY    decides  no       spec.rules[0].from[0].source.namespaces wants bank, and this is shop\n"
    );
    let denied = Explained {
        explanation: Explanation {
            reason: "policies_incomplete".into(),
            detail: "policies may be missing".into(),
            gaps: vec!["/m/x.yaml".into()],
            ..Explanation::default()
        },
        ..Explained::default()
    };
    let text = explain::text(&denied);
    assert!(text.contains("plaintext at an unknown address (give --ip)"), "{text}");
    assert!(text.contains("denied: policies may be missing [policies_incomplete]\n"), "{text}");
    assert!(text.contains("policies may be missing: /m/x.yaml can't be read\n"), "{text}");
}

#[test]
fn the_command_line_ends_with_the_status_of_the_worst_and_64_without_a_file() {
    use clap::Parser;
    let folder = tempfile::tempdir().unwrap();
    let (clean, bad) = (folder.path().join("clean.yaml"), folder.path().join("bad.yaml"));
    std::fs::write(&clean, authorization("{rules: [{}]}").replace("name: p", "name: q")).unwrap();
    std::fs::write(&bad, authorization("{action: AUDIT}")).unwrap();
    let run = |files: &[&std::path::Path]| {
        let line = ["heddle", "policy", "lint"].map(std::ffi::OsStr::new);
        let line = line.into_iter().chain(files.iter().map(|file| file.as_os_str()));
        format!("{:?}", crate::cli::Cli::try_parse_from(line).unwrap().run().unwrap())
    };
    let code = |status: u8| format!("{:?}", std::process::ExitCode::from(status));
    assert_eq!(run(&[&clean]), code(0));
    assert_eq!(run(&[&clean, &bad]), code(1));
    assert_eq!(run(&[folder.path()]), code(1));
    assert_eq!(run(&[&folder.path().join("none.yaml"), &bad]), code(2));
    assert!(crate::cli::Cli::try_parse_from(["heddle", "policy", "lint"]).is_err());
}
