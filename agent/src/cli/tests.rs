use clap::{CommandFactory, Parser};

use super::{
    Cli, certs,
    check::{self, Severity},
    connections, exit_code, parse_exit_code, status,
    table::{span, table},
    uninstall,
};
use crate::life::{
    admin::{
        CertificateLine, ConnectionLine, IssuerLine, KubeletLine, PathLine, PodLine, Status, Trust, TrustProblemLine,
    },
    config::EXIT_USAGE,
};

fn pod(name: &str, state: &str, reason: &str, detail: &str) -> PodLine {
    let (name, state, reason, detail) = (name.into(), state.into(), reason.into(), detail.into());
    PodLine { namespace: "shop".into(), name, state, reason, detail, ..PodLine::default() }
}

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn what_cannot_be_parsed_or_cannot_work_ends_with_64_and_help_with_0() {
    let code = |code: std::process::ExitCode| format!("{code:?}");
    let usage = code(std::process::ExitCode::from(EXIT_USAGE));
    for line in [&["heddle"][..], &["heddle", "nonsense"], &["heddle", "agent"], &["heddle", "ca", "--root-key", "k"]] {
        assert_eq!(code(parse_exit_code(&Cli::try_parse_from(line).unwrap_err())), usage, "{line:?}");
    }
    for line in [
        &["heddle", "ca"][..],
        &["heddle", "ca", "--token-file", "t", "--kubernetes"],
        &["heddle", "ca", "--token-file", "t", "--kubeconfig", "k"],
    ] {
        assert_eq!(code(parse_exit_code(&Cli::try_parse_from(line).unwrap_err())), usage, "{line:?}");
    }
    let line = ["heddle", "ca", "--kubernetes", "--agent-service-account", "heddle"];
    let error = Cli::try_parse_from(line).unwrap().run().unwrap_err();
    assert!(error.to_string().starts_with("--agent-service-account"), "{error}");
    for line in [["heddle", "--help"], ["heddle", "--version"]] {
        let error = Cli::try_parse_from(line).unwrap_err();
        assert_eq!(code(parse_exit_code(&error)), code(std::process::ExitCode::SUCCESS));
    }
    let line = ["heddle", "ca", "--token-file", "t", "--max-lifetime", "soon"];
    let error = Cli::try_parse_from(line).unwrap().run().unwrap_err();
    assert!(error.to_string().starts_with("--max-lifetime"), "{error}");
    assert_eq!(code(exit_code(&error)), usage);
    assert_eq!(code(exit_code(&anyhow::anyhow!("else"))), code(std::process::ExitCode::FAILURE));
}

#[test]
fn status_names_each_pod_its_reason_and_the_totals() {
    let mut answer = Status {
        node: "node-1".into(),
        version: "0.1.0".into(),
        ready: true,
        pods: vec![
            PodLine { lane: "on".into(), ..pod("web-0", "captured", "", "") },
            PodLine {
                lane: "off".into(),
                lane_reason: "uncaptured".into(),
                lane_detail: "the pod's capture is not proven".into(),
                ..pod("db-0", "uncaptured", "place_unknown", "nobody knows")
            },
            PodLine {
                lane: "off".into(),
                lane_reason: "same_node_mtls".into(),
                lane_detail: "heddle.dev/same-node asks for it".into(),
                ..pod("api-0", "captured", "", "")
            },
        ],
        unproven_paths: vec![PathLine {
            from: "shop/web-0".into(),
            to: "shop/api-0".into(),
            reason: "rewritten".into(),
            detail: "the source was 10.0.0.9".into(),
        }],
        kubelet: KubeletLine {
            state: "unattested".into(),
            reason: "no_kubelet".into(),
            detail: "there is none".into(),
            ..KubeletLine::default()
        },
        manifest_problems: vec!["a.yaml: broken".into()],
        ..Status::default()
    };
    assert_eq!(
        status::text(&answer),
        "POD         STATE       LANE                  REASON\n\
         shop/web-0  captured    on                    -\n\
         shop/db-0   uncaptured  off (uncaptured)      place_unknown: nobody knows\n\
         shop/api-0  captured    off (same_node_mtls)  heddle.dev/same-node asks for it\n\
         \n\
         2 of 3 enrolled pods captured on node node-1 (heddle 0.1.0, ready)\n\
         no lane from shop/web-0 to shop/api-0: rewritten: the source was 10.0.0.9\n\
         probes of the kubelet are not let through: no_kubelet: there is none\n\
         manifest problem: a.yaml: broken\n"
    );
    assert!(!status::all_captured(&answer));
    answer.pods.truncate(1);
    assert!(status::all_captured(&answer));
}

#[test]
fn a_cell_cannot_write_to_the_terminal() {
    let text = table(&["A"], &[vec!["x\x1b[31m\ny\u{9b}z".to_owned()]]);
    assert_eq!(text, "A\nx?[31m?y?z\n");
}

#[test]
fn connections_and_certificates_read_well() {
    assert_eq!(connections::text(&[]), "0 connections\n");
    let one = ConnectionLine {
        direction: "outbound".into(),
        pod: "shop/web-0".into(),
        security: "mutual_tls".into(),
        cipher: "TLS13_AES_256_GCM_SHA384".into(),
        source: "10.0.0.1:1".into(),
        source_workload: "shop/web-0".into(),
        destination: "10.0.0.2:15008".into(),
        destination_workload: "shop/db-0".into(),
        hbone_target: "10.0.0.2:80".into(),
        open_seconds: 61,
        ..ConnectionLine::default()
    };
    let text = connections::text(std::slice::from_ref(&one));
    assert!(text.contains("outbound   shop/web-0  10.0.0.1:1  10.0.0.2:80 shop/db-0  -"), "{text}");
    assert!(text.contains("  TLS13_AES_256_GCM_SHA384  -       0       0          1m 1s  -    -\n"), "{text}");
    assert!(text.ends_with("1 connections\n"), "{text}");
    for (pod, is) in [("shop/web-0", true), ("web-0", true), ("shop/db-0", false), ("web", false), ("", false)] {
        assert_eq!(connections::is_of(&one, pod), is, "{pod}");
    }
    let inbound = ConnectionLine { direction: "inbound".into(), cipher: String::new(), policy: "shop/p".into(), ..one };
    let text = connections::text(&[inbound]);
    assert!(text.contains("10.0.0.2:80  10.0.0.1:1 shop/web-0  -              mutual_tls  shop/p"), "{text}");
    let lane = ConnectionLine {
        security: "kernel_attested".into(),
        rtt_microseconds: Some(35),
        retransmissions: Some(2),
        ..ConnectionLine::default()
    };
    let text = connections::text(&[lane]);
    assert!(text.contains("RTT   RETRANSMITTED\n") && text.contains("0s    35us  2\n"), "{text}");
    let certificate =
        |left| CertificateLine { identity: "spiffe://a".into(), seconds_left: left, ..CertificateLine::default() };
    let text = certs::text(&[certificate(Some(7_300)), certificate(Some(-5)), certificate(None)]);
    assert!(text.contains("2h 1m") && text.contains("expired 5s ago"), "{text}");
    assert!(text.ends_with("1 of 3 certificates valid\n"), "{text}");
    assert_eq!([span(0), span(59), span(3_599), span(3_600)], ["0s", "59s", "59m 59s", "1h 0m"]);
}

const DAY: i64 = 86_400;

fn issuer(kind: &str, name: &str, left: i64) -> IssuerLine {
    let (kind, subject, serial) = (kind.into(), format!("CN={name}"), format!("0{name}"));
    IssuerLine { kind, subject, serial, not_after: "then".into(), seconds_left: left }
}

fn certificate(name: &str, state: &str, left: Option<i64>, error: &str) -> CertificateLine {
    CertificateLine {
        identity: format!("spiffe://{name}"),
        state: state.into(),
        seconds_left: left,
        last_error: error.into(),
        chain: if left.is_some() {
            vec![issuer("intermediate", "m", 90 * DAY), issuer("root", "r", 400 * DAY)]
        } else {
            vec![]
        },
        next_try_seconds: Some(7),
        ..CertificateLine::default()
    }
}

#[test]
fn certificates_are_shown_with_their_issuers_and_their_next_try() {
    let two = [certificate("a", "valid", Some(1_800), ""), certificate("b", "not_renewed", Some(60), "CA unreachable")];
    let text = certs::text(&two);
    assert!(text.contains("0m      intermediate  CN=m     then       2160h 0m  2\n"), "{text}");
    assert!(text.contains("0r      root          CN=r     then       9600h 0m  2\n"), "{text}");
    assert!(text.contains("in 7s     CA unreachable\n"), "{text}");
    assert!(text.ends_with("2 of 2 certificates valid\n"), "{text}");
}

#[test]
fn a_check_of_what_is_well_finds_nothing_and_of_each_fault_exactly_that() {
    let roots = |left| Trust { roots: vec![issuer("root", "r", left)], ..Trust::default() };
    let sound = [certificate("a", "valid", Some(1_800), "")];
    let of = |certificates: &[CertificateLine], trust: &Trust| -> Vec<(Severity, String)> {
        check::findings(certificates, trust).into_iter().map(|finding| (finding.severity, finding.reason)).collect()
    };
    use Severity::{Error, Warning};
    let well = roots(400 * DAY);
    assert_eq!(of(&sound, &well), []);
    assert_eq!(check::text(&[]), "0 errors, 0 warnings, 0 passed\n");
    for (certificate, severity, reason) in [
        (certificate("a", "missing", None, ""), Warning, "certificate_missing"),
        (certificate("a", "missing", None, "CA refused"), Error, "certificate_missing"),
        (certificate("a", "expired", Some(-5), "CA refused"), Error, "certificate_expired"),
        (certificate("a", "not_renewed", Some(5), "CA refused"), Warning, "certificate_not_renewed"),
        (
            CertificateLine { chain: vec![issuer("root", "other", 400 * DAY)], ..sound[0].clone() },
            Error,
            "certificate_untrusted",
        ),
        (
            CertificateLine {
                chain: vec![issuer("intermediate", "m", 29 * DAY), issuer("root", "r", 400 * DAY)],
                ..sound[0].clone()
            },
            Warning,
            "intermediate_ends_soon",
        ),
    ] {
        assert_eq!(of(std::slice::from_ref(&certificate), &well), [(severity, reason.to_owned())], "{certificate:?}");
        // Two of a kind: two certificates, but one intermediate.
        let count = if reason.starts_with("intermediate") { 1 } else { 2 };
        let other = CertificateLine { identity: "spiffe://b".into(), ..certificate.clone() };
        assert_eq!(of(&[certificate, other], &well).len(), count);
    }
    // The chain tells of the root as it was; the bundle's own says what counts.
    let brief = |left| [CertificateLine { chain: vec![issuer("root", "r", left)], ..sound[0].clone() }];
    assert_eq!(of(&brief(30 * DAY), &roots(30 * DAY)), []);
    assert_eq!(of(&brief(30 * DAY - 1), &roots(30 * DAY - 1)), [(Warning, "root_ends_soon".to_owned())]);
    assert_eq!(of(&brief(0), &roots(0)), [(Error, "root_expired".to_owned())]);
    assert_eq!(of(&[], &Trust::default()), [(Error, "no_roots".to_owned())]);
    let crl =
        TrustProblemLine { what: "revocation lists".into(), reason: "crl_expired".into(), error: "since 1h".into() };
    let troubled = Trust { problems: vec![crl], ..well };
    let soon = certificate("a", "not_renewed", Some(5), "CA refused");
    let found = check::findings(&[soon], &troubled);
    assert_eq!(found.iter().map(|finding| finding.severity).collect::<Vec<_>>(), [Error, Warning], "errors first");
    let text = check::text(&found);
    assert!(text.contains("error     crl_expired              revocation lists  since 1h\n"), "{text}");
    assert!(text.ends_with("\n1 errors, 1 warnings, 0 passed\n"), "{text}");
}

#[test]
fn an_agent_that_does_not_run_is_said_plainly() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("none.sock");
    let line = ["heddle", "status", "--admin-socket", socket.to_str().unwrap()];
    let error = Cli::try_parse_from(line).unwrap().run().unwrap_err();
    assert!(error.to_string().starts_with("no agent answers at"), "{error:#}");
}

#[test]
fn removing_follows_no_link() {
    let folder = tempfile::tempdir().unwrap();
    let (outside, inside) = (folder.path().join("outside"), folder.path().join("inside"));
    std::fs::create_dir_all(inside.join("v1/pods")).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("precious"), "").unwrap();
    std::fs::write(inside.join("v1/map"), "").unwrap();
    std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
    let mut removed = Vec::new();
    uninstall::remove(&inside, &mut removed).unwrap();
    assert!(!inside.exists() && outside.join("precious").exists());
    assert_eq!(removed.len(), 5);
    assert_eq!(removed.last(), Some(&inside));
}

#[test]
fn the_json_of_what_the_agent_answers_is_stable() {
    let keys = |value: serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    let table = [
        (
            serde_json::to_value(Status::default()).unwrap(),
            "cni_problem kubelet manifest_problems node pods policy_problems ready repairs trust_problems unproven_paths version waiting_for",
        ),
        (
            serde_json::to_value(PodLine::default()).unwrap(),
            "counters detail lane lane_detail lane_reason name namespace reason state uid",
        ),
        (serde_json::to_value(KubeletLine::default()).unwrap(), "cgroup detail reason state"),
        (serde_json::to_value(PathLine::default()).unwrap(), "detail from reason to"),
        (
            serde_json::to_value(ConnectionLine::default()).unwrap(),
            "bytes_to_app bytes_to_client cipher destination destination_identity destination_service \
             destination_workload direction hbone_target id open_seconds own_serial peer_serial pod policy retransmissions \
             rtt_microseconds security source source_identity source_workload tls trace_id",
        ),
        (
            serde_json::to_value(CertificateLine::default()).unwrap(),
            "chain failed identity last_error last_reason next_try next_try_seconds not_after not_before received \
             seconds_left serial state",
        ),
        (serde_json::to_value(IssuerLine::default()).unwrap(), "kind not_after seconds_left serial subject"),
        (serde_json::to_value(Trust::default()).unwrap(), "problems roots"),
        (serde_json::to_value(TrustProblemLine::default()).unwrap(), "error reason what"),
    ];
    for (value, expected) in table {
        assert_eq!(keys(value), expected);
    }
}
