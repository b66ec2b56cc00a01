//! What the agent's own process costs: CPU, memory, descriptors, and how busy the runtime is.
//!
//! Read at the moment of the scrape; nothing runs in between.

use prometheus::{
    Registry,
    process_collector::ProcessCollector,
    proto::{MetricFamily, MetricType},
};
use tokio::runtime::Handle;

use super::families::{as_f64, counter_f64, family, gauge, label};

/// `process_cpu_seconds_total`, `process_resident_memory_bytes`, `process_open_fds` and their like.
pub(super) fn register(registry: &Registry) -> Result<(), prometheus::Error> {
    registry.register(Box::new(ProcessCollector::for_self()))
}

/// The runtime that the caller runs in, if it runs in one.
pub(super) fn runtime_families() -> impl Iterator<Item = MetricFamily> {
    let families = Handle::try_current().map(|handle| {
        let metrics = handle.metrics();
        let workers = metrics.num_workers();
        let each = |value: &dyn Fn(usize) -> f64| {
            (0..workers).map(|worker| counter_f64(vec![label("worker", &worker.to_string())], value(worker))).collect()
        };
        let one = |value: usize| vec![gauge(vec![], as_f64(value as u64))];
        [
            family("tokio_num_workers", "Threads that carry traffic.", MetricType::GAUGE, one(workers)),
            family(
                "tokio_num_alive_tasks",
                "Tasks that are not finished.",
                MetricType::GAUGE,
                one(metrics.num_alive_tasks()),
            ),
            family(
                "tokio_global_queue_depth",
                "Tasks that wait for any worker.",
                MetricType::GAUGE,
                one(metrics.global_queue_depth()),
            ),
            family(
                "tokio_worker_busy_seconds_total",
                "Time that a worker was busy.",
                MetricType::COUNTER,
                each(&|worker| metrics.worker_total_busy_duration(worker).as_secs_f64()),
            ),
            family(
                "tokio_worker_parks_total",
                "How often a worker went to sleep for want of work.",
                MetricType::COUNTER,
                each(&|worker| as_f64(metrics.worker_park_count(worker))),
            ),
        ]
    });
    families.into_iter().flatten().flatten()
}
