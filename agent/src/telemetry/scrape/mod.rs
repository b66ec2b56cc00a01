//! `GET /metrics/pods`: the metrics of this node's enrolled pods, scraped inside each pod's netns and told as one exposition.
//!
//! The pod's app sees a connection from itself, so no policy needs an exception for Prometheus. Each pod has its own caps and
//! the deadline: one that hangs, lies or floods costs itself, and says so in `heddle_scrape_up`.

mod exposition;
mod fetch;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod merge;
#[cfg(test)]
mod tests;

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
    time::{Instant, timeout_at},
};

use crate::{
    capture::CaptureError,
    cluster::{ScrapeTarget, Snapshot, Workload},
    life::limits,
};
use exposition::{ExpositionError, Family, escape};
pub use fetch::TIMEOUT as SCRAPE_TIMEOUT;

/// Why a pod's metrics are not there.
#[derive(Debug, thiserror::Error)]
pub enum ScrapeError {
    #[error("the deadline is over")]
    Timeout,
    #[error(transparent)]
    Dial(#[from] CaptureError),
    #[error("{0}")]
    Http(String),
    #[error("it answers {0}")]
    Status(http::StatusCode),
    #[error("its answer is encoded, and was not asked to be")]
    Encoding,
    #[error("its answer is no UTF-8")]
    Text,
    #[error("its answer has more than {} bytes", limits::SCRAPE_BYTES_PER_POD)]
    TooLarge,
    #[error(
        "the answers of all pods have more than {} bytes or {} samples",
        limits::SCRAPE_BYTES,
        limits::SCRAPE_SAMPLES
    )]
    TotalTooLarge,
    #[error(transparent)]
    Exposition(#[from] ExpositionError),
}

impl ScrapeError {
    /// Stable name: metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Dial(error) => error.reason(),
            Self::Http(_) => "http",
            Self::Status(_) => "status",
            Self::Encoding => "encoding",
            Self::Text => "invalid",
            Self::TooLarge => "too_large",
            Self::TotalTooLarge => "total_too_large",
            Self::Exposition(error) => error.reason(),
        }
    }
}

/// A pod that asks to be scraped.
#[derive(Debug, Clone)]
pub struct ScrapedPod {
    pub workload: Arc<Workload>,
    pub target: ScrapeTarget,
    /// Where its app listens: the pod's own address.
    pub address: SocketAddr,
}

/// The enrolled pods of this node whose annotations ask for it.
#[must_use]
pub fn scraped_pods(snapshot: &Snapshot, node: &str) -> Vec<ScrapedPod> {
    let local = snapshot.workloads.values().filter(|pod| pod.enrolled && &*pod.node == node);
    let asking = local.filter_map(|workload| {
        let target = workload.metrics.clone()?;
        let address = SocketAddr::new(*workload.addresses.first()?, target.port);
        Some(ScrapedPod { workload: Arc::clone(workload), target, address })
    });
    let mut pods: Vec<_> = asking.collect();
    pods.sort_by(|one, other| {
        let name = |pod: &ScrapedPod| (Arc::clone(&pod.workload.namespace), Arc::clone(&pod.workload.name));
        name(one).cmp(&name(other))
    });
    pods
}

/// How long a scrape may take, by what Prometheus says of itself in [`SCRAPE_TIMEOUT`]: less than it waits, so that it gets what
/// is there.
#[must_use]
pub fn patience(said: Option<&str>) -> Duration {
    let said = said.and_then(|text| text.parse::<f64>().ok()).filter(|seconds| seconds.is_finite() && *seconds > 0.0);
    let said = said.map_or(limits::SCRAPE_DEFAULT, |seconds| {
        Duration::from_secs_f64(seconds.min(limits::SCRAPE_MAX.as_secs_f64()))
    });
    said.mul_f64(limits::SCRAPE_SHARE).min(limits::SCRAPE_MAX)
}

/// Scrapes the pods of one node.
#[derive(Debug)]
pub struct Scraper {
    /// One permit for each request that is answered.
    requests: Arc<Semaphore>,
    /// Pods that used the whole deadline last time: they come last, so that they hold up nobody.
    slow: Mutex<HashSet<Arc<str>>>,
}

impl Default for Scraper {
    fn default() -> Self {
        Self { requests: Arc::new(Semaphore::new(limits::SCRAPES)), slow: Mutex::default() }
    }
}

/// What came of one pod.
#[derive(Debug)]
struct Scraped {
    pod: ScrapedPod,
    took: Duration,
    result: Result<Vec<Family>, ScrapeError>,
}

impl Scraper {
    /// The exposition of all of them; `None` while as many requests as may be are answered already. `dial` opens a connection
    /// to a pod as the pod itself.
    pub async fn scrape<D, F, S>(&self, mut pods: Vec<ScrapedPod>, patience: Duration, dial: D) -> Option<String>
    where
        D: Fn(ScrapedPod) -> F + Clone,
        F: Future<Output = Result<S, CaptureError>>,
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let _request = self.requests.try_acquire().ok()?;
        let deadline = Instant::now() + patience;
        {
            let slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
            pods.sort_by_key(|pod| slow.contains(&pod.workload.uid));
        }
        let all = Arc::new(All::default());
        let scrape = move |pod: ScrapedPod| {
            let (dial, all) = (dial.clone(), Arc::clone(&all));
            async move {
                let began = Instant::now();
                let one = one(&pod, dial(pod.clone()), deadline, &all);
                let result = timeout_at(deadline, one).await.unwrap_or(Err(ScrapeError::Timeout));
                Scraped { pod, took: began.elapsed(), result }
            }
        };
        let scraped: Vec<Scraped> =
            stream::iter(pods).map(scrape).buffer_unordered(limits::SCRAPES_AT_A_TIME).collect().await;
        {
            let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
            slow.clear();
            // Not those that only waited for their turn.
            let late = |one: &&Scraped| matches!(one.result, Err(ScrapeError::Timeout)) && one.took >= patience / 2;
            let late = scraped.iter().filter(late);
            slow.extend(late.map(|one| Arc::clone(&one.pod.workload.uid)));
        }
        // Some ten megabytes of text at the most: nothing for a worker that carries bytes.
        tokio::task::spawn_blocking(move || text(scraped)).await.ok()
    }
}

/// What the pods of one scrape have answered with.
#[derive(Debug, Default)]
struct All {
    bytes: AtomicUsize,
    samples: AtomicUsize,
}

async fn one<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    pod: &ScrapedPod,
    dialled: impl Future<Output = Result<S, CaptureError>>,
    deadline: Instant,
    all: &All,
) -> Result<Vec<Family>, ScrapeError> {
    let stream = dialled.await?;
    let left = deadline.saturating_duration_since(Instant::now());
    let (text, format) = fetch::fetch(stream, &pod.address.to_string(), &pod.target, left, &all.bytes).await?;
    let pod = pod.clone();
    let parsed = tokio::task::spawn_blocking(move || exposition::read(&text, format, &labels(&pod.workload)));
    let families = parsed.await.map_err(|_| CaptureError::ShuttingDown)??;
    let samples = families.iter().map(|family| family.samples.len()).sum();
    if all.samples.fetch_add(samples, Ordering::Relaxed) + samples > limits::SCRAPE_SAMPLES {
        all.samples.fetch_sub(samples, Ordering::Relaxed);
        return Err(ScrapeError::TotalTooLarge);
    }
    Ok(families)
}

/// What every sample of a pod carries.
fn labels(workload: &Workload) -> Vec<(&str, &str)> {
    let mut labels = vec![("namespace", &*workload.namespace), ("pod", &*workload.name)];
    if !workload.naming.app.is_empty() {
        labels.push(("app", &*workload.naming.app));
    }
    labels
}

/// How each pod's scrape went, then what they said.
fn text(mut scraped: Vec<Scraped>) -> String {
    scraped.sort_by(|one, other| {
        let name = |one: &Scraped| (Arc::clone(&one.pod.workload.namespace), Arc::clone(&one.pod.workload.name));
        name(one).cmp(&name(other))
    });
    let families: Vec<Vec<Family>> =
        scraped.iter_mut().map(|one| one.result.as_mut().map(std::mem::take).unwrap_or_default()).collect();
    let (body, dropped) = merge::merge(&families);
    let samples = families.iter().map(|families| families.iter().map(|family| family.samples.len()).sum::<usize>());
    let told: Vec<_> = scraped.iter().zip(samples).zip(dropped).collect();
    let mut text = String::with_capacity(body.len() + 512 * told.len());
    let mut family = |name: &str, help: &str, row: &dyn Fn(&Scraped, usize, usize) -> (String, String)| {
        if told.is_empty() {
            return;
        }
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} gauge\n"));
        for ((one, samples), dropped) in &told {
            let (namespace, pod) = (escape(&one.pod.workload.namespace), escape(&one.pod.workload.name));
            let (more, value) = row(one, *samples, *dropped);
            text.push_str(&format!("{name}{{namespace=\"{namespace}\",pod=\"{pod}\"{more}}} {value}\n"));
        }
    };
    let none = String::new;
    family("heddle_scrape_up", "1 if the pod's metrics were scraped, else 0 with the reason.", &|one, _, _| match &one
        .result
    {
        Ok(_) => (none(), "1".to_owned()),
        Err(error) => (format!(",reason=\"{}\"", error.reason()), "0".to_owned()),
    });
    family("heddle_scrape_duration_seconds", "How long the scrape of the pod took.", &|one, _, _| {
        (none(), format!("{:.6}", one.took.as_secs_f64()))
    });
    family("heddle_scrape_samples", "Samples that the pod answered with.", &|_, samples, _| {
        (none(), samples.to_string())
    });
    let help = "Samples left out because other pods of the node have another type for their name.";
    family("heddle_scrape_samples_dropped", help, &|_, _, dropped| (none(), dropped.to_string()));
    text.push_str(&body);
    text
}
