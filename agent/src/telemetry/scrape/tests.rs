//! What must hold of the pods' metrics.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::{
    ScrapedPod, Scraper,
    exposition::{ExpositionError, Format, Kind, read},
    merge::merge,
    patience, scraped_pods,
};
use crate::{
    capture::CaptureError,
    cluster::{ScrapeTarget, Snapshot, Workload},
    life::limits,
};

const OWN: [(&str, &str); 2] = [("namespace", "shop"), ("pod", "web-0")];

fn told(text: &str) -> String {
    merge(&[read(text, Format::Text, &OWN).unwrap()]).0
}

#[test]
fn a_pods_families_are_told_as_they_are_with_its_labels() {
    let said = "# HELP http_requests_total Requests with \\\\ and \\n.\n# TYPE http_requests_total counter\n\
                http_requests_total{code=\"200\"} 1027 1395066363000\nhttp_requests_total 3\n\
                # TYPE latency histogram\nlatency_bucket{le=\"0.5\"} 1\nlatency_bucket{le=\"+Inf\"} 2\nlatency_sum 0.75\n\
                latency_count 2\nbare +Inf\n";
    assert_eq!(
        told(said),
        "bare{namespace=\"shop\",pod=\"web-0\"} +Inf\n".replacen("bare", "# TYPE bare untyped\nbare", 1)
            + "# HELP http_requests_total Requests with \\\\ and \\n.\n# TYPE http_requests_total counter\n\
               http_requests_total{namespace=\"shop\",pod=\"web-0\",code=\"200\"} 1027 1395066363000\n\
               http_requests_total{namespace=\"shop\",pod=\"web-0\"} 3\n\
               # TYPE latency histogram\n\
               latency_bucket{namespace=\"shop\",pod=\"web-0\",le=\"0.5\"} 1\n\
               latency_bucket{namespace=\"shop\",pod=\"web-0\",le=\"+Inf\"} 2\n\
               latency_sum{namespace=\"shop\",pod=\"web-0\"} 0.75\n\
               latency_count{namespace=\"shop\",pod=\"web-0\"} 2\n"
    );
}

#[test]
fn a_label_that_claims_to_be_another_pods_is_renamed() {
    assert_eq!(
        told("up{pod=\"other\",namespace=\"kube-system\",exported_pod=\"x\"} 1\n"),
        "# TYPE up untyped\nup{namespace=\"shop\",pod=\"web-0\",exported_exported_pod=\"other\",\
         exported_namespace=\"kube-system\",exported_pod=\"x\"} 1\n"
    );
    assert_eq!(
        told("a{x=\"\\d\\\\ \\\"q\\\" \\n\"} 1\n"),
        "# TYPE a untyped\na{namespace=\"shop\",pod=\"web-0\",x=\"\\\\d\\\\ \\\"q\\\" \\n\"} 1\n"
    );
}

#[test]
fn openmetrics_is_told_in_the_text_format() {
    let said = "# TYPE foo counter\n# HELP foo All \\\"of\\\" it.\nfoo_total 17.0 1520879607.789 # {trace_id=\"a b\"} 0.67\n\
                foo_created 1520430000.123\n# TYPE build info\nbuild_info{v=\"1\"} 1\n# TYPE s unknown\ns 1\n# EOF\n";
    let families = read(said, Format::OpenMetrics, &[]).unwrap();
    let of = |name: &str| families.iter().find(|family| family.name == name).unwrap();
    assert_eq!((of("foo_total").kind, &*of("foo_total").help), (Kind::Counter, "All \"of\" it."));
    assert_eq!(of("foo_total").samples[0].line, "foo_total{} 17.0 1520879607789");
    assert_eq!(
        (of("foo_created").kind, of("build_info").kind, of("s").kind),
        (Kind::Gauge, Kind::Gauge, Kind::Untyped)
    );
    assert_eq!(Format::of("application/openmetrics-text; version=1.0.0"), Format::OpenMetrics);
    assert_eq!(Format::of("text/plain; version=0.0.4"), Format::Text);
}

#[test]
fn an_answer_that_prometheus_would_refuse_is_refused_whole() {
    for bad in [
        "<html>",
        "a{",
        "a{x=\"1\"",
        "a{x=1} 1",
        "a{x=\"1\" y=\"2\"} 1",
        "a{x=\"1\",x=\"2\"} 1",
        "a{__name__=\"b\"} 1",
        "a",
        "a one",
        "a -NaN",
        "a 1 soon",
        "a 1 -5",
        "a 1 2 3",
        "1a 1",
        "# TYPE a thing",
        "# TYPE",
        "# HELP ä text",
        "a 1 # {} 1",
    ] {
        let error = read(&format!("ok 1\n{bad}\n"), Format::Text, &OWN).unwrap_err();
        assert_eq!(error, ExpositionError::Line(2), "{bad}");
    }
    let error = read("heddle_scrape_up 1\n", Format::Text, &OWN).unwrap_err();
    assert_eq!((error, error.reason()), (ExpositionError::Reserved(1), "invalid"));
    let many = "a 1\n".repeat(limits::SCRAPE_SAMPLES_PER_POD + 1);
    assert_eq!(read(&many, Format::Text, &OWN).unwrap_err().reason(), "too_many_samples");
    for fine in ["", "# a comment\n# TYPE a gauge\n", "a 1", "a{} NaN\r\n", "a{x=\"\",} 1e3\n"] {
        assert!(read(fine, Format::Text, &OWN).is_ok(), "{fine:?}");
    }
}

#[test]
fn a_pod_that_says_otherwise_of_a_name_loses_the_description_and_the_others_lose_nothing() {
    let of = |pod: &str, text: &str| read(text, Format::Text, &[("pod", pod)]).unwrap();
    let honest = "# TYPE a counter\na 1\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n";
    let liar = "# TYPE a histogram\na_bucket{le=\"+Inf\"} 1\na_sum 1\na_count 1\n# TYPE h gauge\nh 1\n# TYPE h_count gauge\nh_count 7\n";
    let (text, dropped) = merge(&[of("liar", liar), of("one", honest), of("two", honest)]);
    assert_eq!(dropped, [1, 0, 0], "{text}");
    for line in [
        "# TYPE a counter\na{pod=\"one\"} 1\na{pod=\"two\"} 1\n",
        "a_bucket{pod=\"liar\",le=\"+Inf\"} 1\n",
        "# TYPE h histogram\nh_bucket{pod=\"one\",le=\"+Inf\"} 1\n",
        "h_count{pod=\"liar\"} 7\n",
    ] {
        assert!(text.contains(line), "{line}\n---\n{text}");
    }
    assert_eq!(text.matches("# TYPE ").count(), 2, "{text}");
}

fn pod(name: &str, port: u16) -> ScrapedPod {
    let target = ScrapeTarget { port, path: "/metrics".into() };
    let address = "10.0.0.7".parse().unwrap();
    let workload =
        Workload { addresses: vec![address], metrics: Some(target.clone()), ..Workload::named("shop", name) };
    ScrapedPod { workload: Arc::new(workload), target, address: (address, port).into() }
}

#[test]
fn the_enrolled_pods_of_this_node_that_ask_for_it_are_scraped() {
    let asks = |name: &str| (*pod(name, 80).workload).clone();
    let workloads = [
        asks("yes"),
        Workload { enrolled: false, ..asks("outside") },
        Workload { node: "node-2".into(), ..asks("elsewhere") },
        Workload { metrics: None, ..asks("silent") },
        Workload { addresses: vec![], ..asks("unborn") },
    ];
    let workloads: HashMap<_, _> = workloads.into_iter().map(|pod| (Arc::clone(&pod.uid), Arc::new(pod))).collect();
    let found = scraped_pods(&Snapshot { workloads, ..Snapshot::default() }, "node-1");
    assert_eq!(found.iter().map(|pod| &*pod.workload.name).collect::<Vec<_>>(), ["yes"]);
    assert_eq!(found[0].address.to_string(), "10.0.0.7:80");
}

#[test]
fn prometheus_own_patience_bounds_a_scrape() {
    assert_eq!(patience(None), Duration::from_secs(9));
    assert_eq!(patience(Some("1.000000")), Duration::from_millis(900));
    for far in ["60", "1e300"] {
        assert!(patience(Some(far)) <= limits::SCRAPE_MAX, "{far}");
    }
    for odd in ["-1", "soon", "NaN", "0", "inf"] {
        assert_eq!(patience(Some(odd)), Duration::from_secs(9), "{odd}");
    }
}

/// A pod's app, by its name.
async fn app(name: String, mut stream: DuplexStream) {
    let mut asked = vec![0; 4_096];
    let length = stream.read(&mut asked).await.unwrap_or_default();
    let asked = String::from_utf8_lossy(&asked[..length]).into_owned();
    let answer = |status: &str, kind: &str, body: &str| {
        format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    };
    let text = match name.as_str() {
        _ if asked.is_empty() => return,
        "good" => {
            assert!(asked.starts_with("GET /metrics HTTP/1.1\r\n"), "{asked}");
            assert!(asked.contains("host: 10.0.0.7:80\r\n") && asked.contains("x-prometheus-scrape-timeout-seconds: "));
            answer("200 OK", "text/plain; version=0.0.4", "# TYPE a gauge\na 1\n")
        }
        "failing" => answer("500 Internal Server Error", "text/plain", "no"),
        "moved" => "HTTP/1.1 302 Found\r\nLocation: http://10.0.0.8/\r\nContent-Length: 0\r\n\r\n".to_owned(),
        "html" => answer("200 OK", "text/html", "<html></html>"),
        "binary" => return drop(stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\na \xff").await),
        "noise" => "\0\0\0".repeat(99),
        "gone" => String::new(),
        "flood" => {
            let head = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
            let mut sent = stream.write_all(head.as_bytes()).await;
            while sent.is_ok() {
                sent = stream.write_all(&[b'#'; 1 << 16]).await;
            }
            return;
        }
        // One that says nothing.
        _ => return std::future::pending().await,
    };
    let _told = stream.write_all(text.as_bytes()).await;
}

async fn dial(pod: ScrapedPod) -> Result<DuplexStream, CaptureError> {
    if &*pod.workload.name == "unattached" {
        return Err(CaptureError::NotAttached(Arc::clone(&pod.workload.uid)));
    }
    let (near, far) = duplex(1 << 16);
    tokio::spawn(app(pod.workload.name.to_string(), far));
    Ok(near)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_hangs_lies_or_floods_costs_only_itself_and_says_why() {
    let expected = [
        ("binary", "invalid"),
        ("failing", "status"),
        ("flood", "too_large"),
        ("gone", "http"),
        ("hangs", "timeout"),
        ("html", "invalid"),
        ("moved", "status"),
        ("noise", "http"),
        ("unattached", "not_attached"),
    ];
    let mut pods: Vec<_> = expected.iter().map(|(name, _)| pod(name, 80)).collect();
    pods.push(pod("good", 80));
    let scraper = Scraper::default();
    for _ in 0..2 {
        let text = scraper.scrape(pods.clone(), Duration::from_secs(3), dial).await.unwrap();
        for (name, reason) in expected {
            let line = format!("heddle_scrape_up{{namespace=\"shop\",pod=\"{name}\",reason=\"{reason}\"}} 0\n");
            assert!(text.contains(&line), "{line}\n{text}");
        }
        assert!(text.contains("heddle_scrape_up{namespace=\"shop\",pod=\"good\"} 1\n"), "{text}");
        assert!(text.contains("heddle_scrape_samples{namespace=\"shop\",pod=\"good\"} 1\n"), "{text}");
        assert!(text.ends_with("# TYPE a gauge\na{namespace=\"shop\",pod=\"good\"} 1\n"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_hung_last_time_keep_nobody_waiting_and_requests_are_bounded() {
    let hanging = (0..limits::SCRAPES_AT_A_TIME).map(|number| pod(&format!("hangs-{number:03}"), 80));
    let pods: Vec<_> = hanging.chain([pod("good", 80)]).collect();
    let scraper = Arc::new(Scraper::default());
    let good = |text: &str| text.contains("heddle_scrape_up{namespace=\"shop\",pod=\"good\"} 1\n");
    let first = scraper.scrape(pods.clone(), Duration::from_millis(500), dial).await.unwrap();
    assert!(first.contains("reason=\"timeout\""));
    let second = scraper.scrape(pods.clone(), Duration::from_millis(1_500), dial).await.unwrap();
    assert!(good(&second), "it comes first now");
    let busy: Vec<_> = (0..limits::SCRAPES)
        .map(|_| {
            let (scraper, pods) = (Arc::clone(&scraper), pods.clone());
            tokio::spawn(async move { scraper.scrape(pods, Duration::from_secs(2), dial).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(scraper.scrape(vec![], Duration::from_secs(1), dial).await.is_none(), "as many as may be are under way");
    for one in busy {
        assert!(one.await.unwrap().is_some());
    }
    assert_eq!(scraper.scrape(vec![], Duration::from_secs(1), dial).await.unwrap(), "");
}
