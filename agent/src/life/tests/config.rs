use std::time::Duration;

use clap::Parser;

use crate::{
    identity::{CrlConfig, CrlFailure, TrustDomain},
    life::config::{Config, ConfigError, Raw, default_workers},
    telemetry::{Destination, Export, Format},
};

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    raw: Raw,
}

fn typed(more: &[&str]) -> Result<Config, ConfigError> {
    let mut line = vec!["agent"];
    for (flag, value) in [
        ("--node", "node-1"),
        ("--manifests", "/"),
        ("--ca-address", "https://ca:15012"),
        ("--ca-root", "/root.pem"),
        ("--ca-token-file", "/token"),
    ] {
        if !more.contains(&flag) {
            line.extend([flag, value]);
        }
    }
    line.extend(more);
    Line::try_parse_from(line).unwrap().raw.validate()
}

#[test]
fn what_must_be_typed_is_enough() {
    let config = typed(&[]).unwrap();
    assert_eq!(config.trust_domain.as_str(), "cluster.local");
    assert_eq!(&*config.root_namespace, "heddle-system");
    assert_eq!(&*config.cluster_id, "Kubernetes");
    assert_eq!(config.certificate_lifetime, Duration::from_secs(3_600));
    assert_eq!(config.drain_grace, Duration::from_secs(30));
    assert_eq!(config.metrics_listen.to_string(), "[::]:15020");
    assert_eq!(config.readiness_listen.to_string(), "[::]:15021");
    assert_eq!(config.access_log, Destination::Stdout);
    assert_eq!(config.log_format, Format::Text);
    assert!(config.workers >= 2);
}

#[test]
fn a_value_that_cannot_work_is_refused_with_its_flag_and_the_fix() {
    let long = format!("/{}", "x".repeat(97));
    for (flag, value) in [
        ("--node", " "),
        ("--kubelet-cgroup", "kubelet.service"),
        ("--manifests", "/does/not/exist"),
        ("--manifests", "/proc/self/status"),
        ("--trust-domain", "Not A Domain"),
        ("--trust-domain-alias", "Not A Domain"),
        ("--trust-domain-alias", "cluster.local"),
        ("--trust-domain-alias", "a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p,q"),
        ("--root-namespace", ""),
        ("--cluster-id", ""),
        ("--ca-cert-signer", " "),
        ("--ca-header", "no-value"),
        ("--ca-header", "authorization=Bearer x"),
        ("--ca-header", "grpc-timeout=1S"),
        ("--ca-header", "x-key-bin=AA"),
        ("--ca-header", "a b=c"),
        ("--ca-header", "a=\u{e9}\n"),
        ("--ca-address", "http://ca:15012"),
        ("--ca-address", "ca:15012"),
        ("--ca-address", "https://ca"),
        ("--ca-address", "https://ca:15012/path"),
        ("--ca-address", "https://ca:99999"),
        ("--ca-name", ""),
        ("--certificate-lifetime", "soon"),
        ("--certificate-lifetime", "1s"),
        ("--drain-grace", "30"),
        ("--bpffs", "relative"),
        ("--admin-socket", "relative.sock"),
        ("--admin-socket", &long),
        ("--metrics-listen", "15020"),
        ("--readiness-listen", "localhost:15021"),
        ("--otlp-endpoint", "https://collector:4317"),
        ("--otlp-endpoint", "collector:4317"),
        ("--otlp-endpoint", "http://collector"),
        ("--otlp-endpoint", "http://collector:4317/v1/traces"),
        ("--otlp-sample-ratio", "1.5"),
        ("--otlp-sample-ratio", "-0.1"),
        ("--otlp-sample-ratio", "NaN"),
        ("--otlp-sample-ratio", "some"),
        ("--workers", "0"),
        ("--workers", "many"),
    ] {
        let error = typed(&[flag, value]).unwrap_err();
        assert_eq!(error.flag, flag, "{error}");
        assert!(!error.problem.is_empty() && !error.fix.is_empty(), "{error}");
        assert!(error.to_string().starts_with(flag), "{error}");
    }
}

#[test]
fn what_is_typed_is_what_it_means() {
    let config =
        typed(&["--access-log", "/var/log/a", "--workers", "3", "--drain-grace", "1m 5s", "--log-format", "json"]);
    let config = config.unwrap();
    assert_eq!(config.access_log, Destination::File("/var/log/a".into()));
    assert_eq!((config.workers, config.drain_grace), (3, Duration::from_secs(65)));
    assert_eq!(config.log_format, Format::Json);
    assert_eq!(config.spans, None, "sent only where asked for");
    assert!(config.crl.is_none() && config.trust_domain_aliases.is_empty());
    let config =
        typed(&["--crl", "/crl.pem", "--trust-domain-alias", "a.test,b.test", "--trust-domain-alias", "c.test"]);
    let config = config.unwrap();
    let aliases: Vec<_> = config.trust_domain_aliases.iter().map(TrustDomain::as_str).collect();
    assert_eq!(aliases, ["a.test", "b.test", "c.test"]);
    assert_eq!(config.crl, Some(CrlConfig { path: "/crl.pem".into(), failure: CrlFailure::Refuse }));
    let config = typed(&["--crl", "/crl.pem", "--crl-failure", "last-good"]).unwrap();
    assert_eq!(config.crl.unwrap().failure, CrlFailure::LastGood);
    let config = typed(&["--otlp-endpoint", "http://127.0.0.1:4317", "--otlp-sample-ratio", "0.25"]).unwrap();
    assert_eq!(config.spans, Some(Export { endpoint: "http://127.0.0.1:4317".into(), ratio: 0.25 }));
}

#[test]
fn workers_are_a_quarter_of_the_cores_and_two_at_least() {
    assert_eq!([1, 2, 8, 9, 64].map(default_workers), [2, 2, 2, 3, 16]);
}
