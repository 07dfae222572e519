//! Figures for Prometheus. The names are used by a dashboard: they stay as they are.
//!
//! Owns: the registry and its families. Never: carries a name that a user chose as a label (cardinality, secrets).
//! A crash here costs the counters since the start, which Prometheus expects.

use prometheus::{Encoder, Gauge, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

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
    /// `hypersdk_alerts{severity}`: active alerts.
    pub alerts: IntGaugeVec,
    /// `hypersdk_health_score`: 0–100, as `GET /system/health` says it.
    pub health_score: IntGauge,
    /// `hypersdk_database_ping_seconds`: the last answer of the database.
    pub database_ping: Gauge,
    /// `hypersdk_webhook_calls_total{outcome}`: `delivered`, `retried`, `failed`.
    pub webhook_calls: IntCounterVec,
    /// `hypersdk_webhook_deliveries_pending`.
    pub webhook_pending: IntGauge,
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
        let alerts = IntGaugeVec::new(Opts::new("hypersdk_alerts", "Active alerts by severity."), &["severity"])?;
        let health_score = IntGauge::new("hypersdk_health_score", "How the installation is, 0 to 100.")?;
        let database_ping = Gauge::new("hypersdk_database_ping_seconds", "The last answer of the database.")?;
        let calls = Opts::new("hypersdk_webhook_calls_total", "Calls of webhooks by outcome.");
        let webhook_calls = IntCounterVec::new(calls, &["outcome"])?;
        let webhook_pending = IntGauge::new("hypersdk_webhook_deliveries_pending", "Webhook deliveries that wait.")?;
        registry.register(Box::new(alerts.clone()))?;
        registry.register(Box::new(health_score.clone()))?;
        registry.register(Box::new(database_ping.clone()))?;
        registry.register(Box::new(webhook_calls.clone()))?;
        registry.register(Box::new(webhook_pending.clone()))?;
        for severity in ["info", "warning", "critical"] {
            alerts.with_label_values(&[severity]).set(0);
        }
        for outcome in ["delivered", "retried", "failed"] {
            webhook_calls.with_label_values(&[outcome]).inc_by(0);
        }
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
        Ok(Self {
            registry,
            jobs,
            job_bytes,
            http_requests,
            http_duration,
            agents_connected,
            queue_depth,
            alerts,
            health_score,
            database_ping,
            webhook_calls,
            webhook_pending,
            resident,
        })
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
            "hypersdk_alerts{severity=\"critical\"} 0",
            "hypersdk_health_score",
            "hypersdk_database_ping_seconds",
            "hypersdk_webhook_calls_total{outcome=\"delivered\"} 0",
            "hypersdk_webhook_deliveries_pending",
            "process_resident_memory_bytes",
        ] {
            assert!(text.contains(name), "{name} is missing in\n{text}");
        }
    }
}
