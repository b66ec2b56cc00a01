//! Where a pod serves metrics, by the annotations that Prometheus' own example configuration made usual. Pure.
//!
//! Over HTTP alone: the agent scrapes inside the pod, where nobody listens in. What is said badly scrapes nothing and is warned of.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;

use super::{ScrapeTarget, Warning, index};
use crate::life::limits;

const SCRAPE: &str = "prometheus.io/scrape";
const PORT: &str = "prometheus.io/port";
const PATH: &str = "prometheus.io/path";
const SCHEME: &str = "prometheus.io/scheme";
/// What Prometheus asks for where nothing is said.
const DEFAULT_PATH: &str = "/metrics";

/// What the pod's annotations ask for.
pub fn target(pod: &Pod, warnings: &mut Vec<Warning>) -> Option<ScrapeTarget> {
    let annotations = pod.metadata.annotations.as_ref()?;
    if annotations.get(SCRAPE).map(String::as_str) != Some("true") {
        return None;
    }
    match read(annotations, pod) {
        Ok(target) => Some(target),
        Err(message) => {
            let object = index::object("Pod", &pod.metadata);
            warnings.push(Warning { object, field: "metadata.annotations", message });
            None
        }
    }
}

fn read(annotations: &BTreeMap<String, String>, pod: &Pod) -> Result<ScrapeTarget, String> {
    let said = |key: &str| annotations.get(key).map(String::as_str).filter(|text| !text.is_empty());
    if let Some(scheme) = said(SCHEME).filter(|scheme| *scheme != "http") {
        return Err(format!("{SCHEME}: {scheme:?} is not http: it is not scraped by way of the agent"));
    }
    let path = said(PATH).unwrap_or(DEFAULT_PATH);
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    if path.len() > limits::SCRAPE_PATH || path.parse::<http::uri::PathAndQuery>().is_err() {
        return Err(format!(
            "{PATH} is no path of a URL, or longer than {} bytes: it is not scraped",
            limits::SCRAPE_PATH
        ));
    }
    let port = match said(PORT) {
        Some(text) => text.parse().ok().filter(|port| *port != 0),
        None => first_port(pod),
    };
    let fix = "write the number of the port that serves the metrics: it is not scraped";
    let port = port.ok_or_else(|| match said(PORT) {
        Some(text) => format!("{PORT}: {text:?} is no port; {fix}"),
        None => format!("{PORT} is missing and no container names a port; {fix}"),
    })?;
    Ok(ScrapeTarget { port, path: path.into() })
}

/// The first TCP port that a container names, as Prometheus' discovery would try it.
fn first_port(pod: &Pod) -> Option<u16> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    let port = ports.find(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"))?;
    u16::try_from(port.container_port).ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(annotations: serde_json::Value) -> (Option<(u16, String)>, Vec<String>) {
        let pod = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop", "annotations": annotations},
            "spec": {"containers": [{"name": "web", "ports": [
                {"containerPort": 53, "protocol": "UDP"}, {"containerPort": 8080},
            ]}]},
        }));
        let mut warnings = Vec::new();
        let target = target(&pod.unwrap(), &mut warnings).map(|target| (target.port, target.path.to_string()));
        (target, warnings.into_iter().map(|warning| warning.message).collect())
    }

    #[test]
    fn annotations_are_read_as_prometheus_users_write_them() {
        let asked = |more: serde_json::Value| {
            let mut all = json!({"prometheus.io/scrape": "true"});
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            of(all)
        };
        assert_eq!(of(json!({})).0, None);
        assert_eq!(of(json!({"prometheus.io/scrape": "false", "prometheus.io/port": "1"})), (None, vec![]));
        assert_eq!(asked(json!({})).0, Some((8080, "/metrics".into())));
        assert_eq!(
            asked(json!({"prometheus.io/port": "9102", "prometheus.io/path": "stats?all=1"})).0,
            Some((9102, "/stats?all=1".into()))
        );
        for (bad, word) in [
            (json!({"prometheus.io/port": "http"}), "no port"),
            (json!({"prometheus.io/port": "0"}), "no port"),
            (json!({"prometheus.io/scheme": "https"}), "https"),
            (json!({"prometheus.io/path": "/a b"}), "no path"),
        ] {
            let (target, warnings) = asked(bad);
            assert_eq!(target, None);
            assert!(warnings.len() == 1 && warnings[0].contains(word), "{warnings:?}");
        }
    }
}
