//! Does Prometheus get the pods' own metrics from the agent, while STRICT keeps it away from the pods?

use std::{fs, net::SocketAddr, time::Duration};

use heddle_lab::{
    Lab, Pod, Result, http,
    metrics::Scrape,
    needs_program, needs_root,
    process::{Place, Process},
    until,
};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
const METRICS: u16 = 8_080;
const PROMETHEUS: u16 = 9_090;

/// nginx in a pod: an exposition at one path, its own log of who asked, and a page that is none.
fn nginx(lab: &Lab, pod: &Pod, exposition: &str) -> Result {
    let folder = lab.dir().join(format!("nginx-{}", pod.name()));
    fs::create_dir_all(folder.join("html"))?;
    fs::write(folder.join("html/metrics"), exposition)?;
    fs::write(folder.join("html/page"), "<html>no metrics</html>\n")?;
    let at = folder.display();
    let config = format!(
        "daemon off;\nuser root;\nworker_processes 1;\npid {at}/nginx.pid;\nerror_log stderr;\n\
         events {{ worker_connections 64; }}\n\
         http {{\n log_format who '$remote_addr $uri';\n access_log {at}/access.log who;\n\
         client_body_temp_path {at}/b;\n proxy_temp_path {at}/p;\n fastcgi_temp_path {at}/f;\n uwsgi_temp_path {at}/u;\n scgi_temp_path {at}/s;\n\
         default_type 'text/plain; version=0.0.4';\n\
         server {{ listen {METRICS}; listen [::]:{METRICS}; root {at}/html; }}\n}}\n"
    );
    let file = folder.join("nginx.conf");
    fs::write(&file, config)?;
    pod.runs("nginx", "nginx", &["-c".to_owned(), file.display().to_string(), "-e".to_owned(), "stderr".to_owned()])?;
    let own = SocketAddr::from(([127, 0, 0, 1], METRICS));
    until(SOON, "nginx", || http::get(pod.netns(), own, "/page").ok().filter(|(status, _)| *status == 200))?;
    Ok(())
}

/// A pod that asks to be scraped, by what its annotations say.
fn asking(lab: &Lab, name: &str, annotations: &[(&str, &str)]) -> Result<Pod> {
    let pod = lab.pod("shop", name).annotate("prometheus.io/scrape", "true");
    let pod = annotations.iter().fold(pod, |pod, (key, value)| pod.annotate(&format!("prometheus.io/{key}"), value));
    pod.start()
}

/// Prometheus on the node, with these jobs.
fn prometheus(lab: &Lab, jobs: &Value) -> Result<Process> {
    let folder = lab.dir().join("prometheus");
    fs::create_dir_all(&folder)?;
    let config = json!({
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "scrape_configs": jobs,
    });
    fs::write(folder.join("prometheus.yml"), config.to_string())?;
    let cgroup = lab.claim().cgroup.join("prometheus");
    heddle_lab::cgroup::make(&cgroup)?;
    let place = Place {
        netns: Some(lab.node(1)?.netns.path()),
        cgroup: Some(cgroup),
        logs: lab.dir().join("logs"),
        files: None,
    };
    let args = [
        format!("--config.file={}", folder.join("prometheus.yml").display()),
        format!("--storage.tsdb.path={}", folder.join("data").display()),
        format!("--web.listen-address=127.0.0.1:{PROMETHEUS}"),
    ];
    Process::start(&place, "prometheus", "prometheus", &args)
}

/// The result of an instant query, as Prometheus' API tells it.
fn query(lab: &Lab, what: &str) -> Result<Vec<Value>> {
    let escaped: String = what.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let at = SocketAddr::from(([127, 0, 0, 1], PROMETHEUS));
    let (_, text) = http::get(&lab.node(1)?.netns, at, &format!("/api/v1/query?query={escaped}"))?;
    let answer: Value = serde_json::from_str(&text)?;
    Ok(answer["data"]["result"].as_array().cloned().unwrap_or_default())
}

/// What the agent answers to one who waits for three seconds. A process of the host asks; the pod only lends its name.
fn scrape(lab: &Lab, pod: &Pod) -> Result<(String, Scrape)> {
    let net = format!("--net={}", lab.node(1)?.netns.path().display());
    let url = "http://127.0.0.1:15020/metrics/pods";
    let args = [&*net, "curl", "-sSf", "-H", "X-Prometheus-Scrape-Timeout-Seconds: 3", url];
    let text = pod.output("nsenter", &args)?;
    let scraped = Scrape::parse(&text);
    Ok((text, scraped))
}

const WEB: &str = "# HELP app_requests_total Requests.\n# TYPE app_requests_total counter\n\
                   app_requests_total{code=\"200\",pod=\"imposter\"} 7\n\
                   # TYPE app_latency_seconds histogram\napp_latency_seconds_bucket{le=\"0.1\"} 3\n\
                   app_latency_seconds_bucket{le=\"+Inf\"} 4\napp_latency_seconds_sum 0.5\napp_latency_seconds_count 4\n";

#[test]
fn prometheus_scrapes_the_agent_and_gets_the_pods_metrics_under_strict() -> Result {
    needs_root!();
    needs_program!("prometheus");
    let lab = Lab::one_node()?;
    lab.require("shop", "strict", &json!({"mtls": {"mode": "STRICT"}}))?;
    let web = asking(&lab, "web", &[("port", "8080")])?;
    let api = asking(&lab, "api", &[("port", "8080"), ("path", "/metrics")])?;
    let silent = lab.pod("shop", "silent").start()?;
    nginx(&lab, &web, WEB)?;
    nginx(&lab, &api, WEB)?;
    nginx(&lab, &silent, WEB)?;
    let _prometheus = prometheus(
        &lab,
        &json!([
            {"job_name": "pods", "honor_labels": true, "metrics_path": "/metrics/pods",
             "static_configs": [{"targets": ["127.0.0.1:15020"]}]},
            {"job_name": "direct", "metrics_path": "/metrics",
             "static_configs": [{"targets": [web.at(METRICS).to_string()]}]},
        ]),
    )?;
    let series =
        until(SOON, "both pods' counters", || query(&lab, "app_requests_total").ok().filter(|found| found.len() == 2))?;
    for pod in [&web, &api] {
        let its = series.iter().find(|one| one["metric"]["pod"] == pod.name()).expect("a series of each");
        let labels = &its["metric"];
        assert_eq!((&labels["namespace"], &labels["app"]), (&json!("shop"), &json!(pod.name())), "{its}");
        assert_eq!((&labels["exported_pod"], &its["value"][1]), (&json!("imposter"), &json!("7")), "{its}");
    }
    let quantile = "histogram_quantile(0.5, sum by (le) (app_latency_seconds_bucket{job=\"pods\"}))";
    until(SOON, "a histogram", || query(&lab, quantile).ok().filter(|found| found.len() == 1))?;
    let up = |job: &str| query(&lab, &format!("up{{job=\"{job}\"}}")).ok()?.first().cloned();
    until(SOON, "the direct scrape to be refused", || (up("direct")?["value"][1] == "0").then_some(()))?;
    assert_eq!(up("pods").expect("a target")["value"][1], "1");
    // The app's peer is the pod itself, and it is asked for nothing else.
    let asked = fs::read_to_string(lab.dir().join("nginx-web/access.log"))?;
    let asked: Vec<_> = asked.lines().filter(|line| line.ends_with("/metrics")).collect();
    assert!(!asked.is_empty() && asked.iter().all(|line| line.starts_with(&web.v4().to_string())), "{asked:?}");
    assert!(!fs::read_to_string(lab.dir().join("nginx-silent/access.log"))?.contains("/metrics"));
    let lines = lab.agent(1)?.access_log();
    assert!(lines.iter().all(|line| line.get("message") != "connection complete"), "a scrape is no traffic");
    Ok(())
}

#[test]
fn a_pod_whose_metrics_are_not_there_says_why_and_costs_the_others_nothing() -> Result {
    needs_root!();
    let lab = Lab::one_node()?;
    lab.require("shop", "strict", &json!({"mtls": {"mode": "STRICT"}}))?;
    let web = asking(&lab, "web", &[("port", "8080")])?;
    nginx(&lab, &web, WEB)?;
    let page = asking(&lab, "page", &[("port", "8080"), ("path", "/page")])?;
    nginx(&lab, &page, WEB)?;
    let lost = asking(&lab, "lost", &[("port", "8080"), ("path", "/nowhere")])?;
    nginx(&lab, &lost, WEB)?;
    let _closed = asking(&lab, "closed", &[("port", "9")])?;
    // An app that takes the request and never answers.
    let hangs = lab.pod("shop", "hangs").serves(&["sink:8080"]).annotate("prometheus.io/scrape", "true");
    let _hangs = hangs.annotate("prometheus.io/port", "8080").start()?;
    let (text, scraped) = scrape(&lab, &web)?;
    for (pod, reason) in [("page", "invalid"), ("lost", "status"), ("closed", "connect"), ("hangs", "timeout")] {
        let labels = [("namespace", "shop"), ("pod", pod), ("reason", reason)];
        let found = scraped.with("heddle_scrape_up", &labels).map(|sample| sample.value).collect::<Vec<_>>();
        assert_eq!(found, [0.0], "{pod}: {text}");
    }
    let up = [("namespace", "shop"), ("pod", "web")];
    assert!((scraped.sum("heddle_scrape_up", &up) - 1.0).abs() < 0.1, "{text}");
    assert!((scraped.sum("app_latency_seconds_count", &up) - 4.0).abs() < 0.1, "{text}");
    // promtool reads it as an exposition.
    let file = lab.dir().join("pods.prom");
    fs::write(&file, &text)?;
    let checked = web.output("sh", &["-c", &format!("promtool check metrics < {} || [ $? = 3 ]", file.display())]);
    checked.map(drop)
}
