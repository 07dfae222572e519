//! Figures for Prometheus. The names are used by a dashboard: they stay as they are.
//!
//! Owns: the registry and its families. Never: carries a name that a user chose as a label (cardinality, secrets).
//! A crash here costs the counters since the start, which Prometheus expects.

use prometheus::{Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

/// All families. Cheap to clone: every family is shared.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// `hypersdk_jobs{status}`: jobs by public status.
    pub jobs: IntGaugeVec,
    /// `hypersdk_job_bytes_total{stage}`: bytes by `read`, `durable`, `verified`.
    pub job_bytes: IntCounterVec,
    /// `hypersdk_http_requests_total{method,route,status}`.
    pub http_requests: IntCounterVec,
    /// `hypersdk_http_request_duration_seconds{route}`.
    pub http_duration: HistogramVec,
    /// `hypersdk_agents_connected`.
    pub agents_connected: IntGauge,
    /// `hypersdk_queue_depth`: jobs that wait.
    pub queue_depth: IntGauge,
    resident: IntGauge,
}

impl Metrics {
    /// Registers all of them. Fails only when two families bear one name, which the tests would see.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let jobs = IntGaugeVec::new(Opts::new("hypersdk_jobs", "Jobs by public status."), &["status"])?;
        let job_bytes = IntCounterVec::new(Opts::new("hypersdk_job_bytes_total", "Bytes of job data by stage."), &["stage"])?;
        let requests = Opts::new("hypersdk_http_requests_total", "HTTP requests answered.");
        let http_requests = IntCounterVec::new(requests, &["method", "route", "status"])?;
        let buckets = vec![0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
        let duration = HistogramOpts::new("hypersdk_http_request_duration_seconds", "Time to the head of the answer.").buckets(buckets);
        let http_duration = HistogramVec::new(duration, &["route"])?;
        let agents_connected = IntGauge::new("hypersdk_agents_connected", "Agents with a live session.")?;
        let queue_depth = IntGauge::new("hypersdk_queue_depth", "Jobs that wait.")?;
        let build_info = IntGaugeVec::new(Opts::new("hypersdk_build_info", "The running version."), &["version"])?;
        let resident = IntGauge::new("process_resident_memory_bytes", "Resident memory of this process.")?;
        registry.register(Box::new(jobs.clone()))?;
        registry.register(Box::new(job_bytes.clone()))?;
        registry.register(Box::new(http_requests.clone()))?;
        registry.register(Box::new(http_duration.clone()))?;
        registry.register(Box::new(agents_connected.clone()))?;
        registry.register(Box::new(queue_depth.clone()))?;
        registry.register(Box::new(build_info.clone()))?;
        registry.register(Box::new(resident.clone()))?;
        build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        for status in ["queued", "running", "completed", "failed", "cancelled"] {
            jobs.with_label_values(&[status]).set(0);
        }
        for stage in ["read", "durable", "verified"] {
            job_bytes.with_label_values(&[stage]).inc_by(0);
        }
        Ok(Self { registry, jobs, job_bytes, http_requests, http_duration, agents_connected, queue_depth, resident })
    }

    /// The text format.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        self.resident.set(i64::try_from(super::process::resident_bytes()).unwrap_or(i64::MAX));
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|e| prometheus::Error::Msg(e.to_string()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_dashboards_names_are_there() {
        let metrics = Metrics::new().unwrap();
        metrics.http_requests.with_label_values(&["GET", "/health", "200"]).inc();
        metrics.http_duration.with_label_values(&["/health"]).observe(0.01);
        let text = metrics.render().unwrap();
        for name in [
            "hypersdk_jobs{status=\"queued\"}",
            "hypersdk_job_bytes_total{stage=\"verified\"}",
            "hypersdk_http_requests_total{method=\"GET\",route=\"/health\",status=\"200\"}",
            "hypersdk_http_request_duration_seconds_bucket",
            "hypersdk_agents_connected",
            "hypersdk_queue_depth",
            "hypersdk_build_info{version=",
            "process_resident_memory_bytes",
        ] {
            assert!(text.contains(name), "{name} is missing in\n{text}");
        }
    }
}
