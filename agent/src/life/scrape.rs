//! `GET /metrics/pods`: the metrics of this node's pods that ask for it, for Prometheus.
//!
//! Beside `/metrics`, which is the agent's own. It shows nothing that a pod's annotation does not offer.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::get,
};

use super::start::EXPOSITION;
use crate::{
    telemetry::{SCRAPE_TIMEOUT, ScrapedPod, Scraper, patience, scraped_pods},
    tunnel::Context,
};

type Answer = Result<([(&'static str, &'static str); 1], String), (StatusCode, &'static str)>;

pub(super) fn router(context: &Context) -> Router {
    let asked = (context.clone(), Arc::new(Scraper::default()));
    Router::new().route("/metrics/pods", get(scrape)).with_state(asked)
}

async fn scrape(State((context, scraper)): State<(Context, Arc<Scraper>)>, headers: HeaderMap) -> Answer {
    let patience = patience(headers.get(SCRAPE_TIMEOUT).and_then(|value| value.to_str().ok()));
    let pods = scraped_pods(&context.cluster.load(), &context.node);
    let capture = context.capture.clone();
    // From the pod's own address, inside its netns: the app's peer is the pod itself.
    let dial = move |pod: ScrapedPod| {
        let capture = capture.clone();
        async move { capture.dial(&pod.workload.uid, pod.address.ip(), pod.address).await }
    };
    let text = scraper.scrape(pods, patience, dial).await;
    let busy = (StatusCode::SERVICE_UNAVAILABLE, "other scrapes of the pods are under way: come again\n");
    text.map(|text| (EXPOSITION, text)).ok_or(busy)
}
