//! When something is wrong: the settings `alerts.*` (`HYPERSDK_ALERTS_*`).
//!
//! Owns: names, defaults and checks. Never: looks at anything. A crash here costs nothing.

use serde::Deserialize;

/// The thresholds.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Thresholds {
    /// How often the rules are applied, in seconds.
    pub interval_seconds: u64,
    /// An agent that is away longer is lost.
    pub agent_lost_seconds: u64,
    /// A file system with less free space than this percentage is low; resolved at a fifth more.
    pub disk_free_percent: u64,
    /// The same in GiB; either is enough.
    pub disk_free_gib: u64,
    /// A job that could run and does not for longer is stuck.
    pub queue_stuck_seconds: u64,
    /// So many jobs of one VM that failed in a row.
    pub job_failures: u64,
    /// Days before the end of the REST certificate.
    pub certificate_days: u64,
    /// Days before the end of an agent's certificate. It is renewed when 10 of its 30 days are left, so more would cry over every healthy agent.
    pub agent_certificate_days: u64,
    /// Seconds by which an agent's clock may differ.
    pub clock_skew_seconds: u64,
    /// Three answers of the database in a row that take longer mean that it is slow.
    pub database_slow_ms: u64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            interval_seconds: 5,
            agent_lost_seconds: 60,
            disk_free_percent: 10,
            disk_free_gib: 10,
            queue_stuck_seconds: 600,
            job_failures: 3,
            certificate_days: 14,
            agent_certificate_days: 7,
            clock_skew_seconds: 30,
            database_slow_ms: 500,
        }
    }
}

impl Thresholds {
    /// Takes `HYPERSDK_ALERTS_*`; the error names the variable.
    pub fn take_environment(&mut self, get: &dyn Fn(&str) -> Option<String>) -> Result<(), String> {
        let fields = [
            (&mut self.interval_seconds, "INTERVAL_SECONDS"),
            (&mut self.agent_lost_seconds, "AGENT_LOST_SECONDS"),
            (&mut self.disk_free_percent, "DISK_FREE_PERCENT"),
            (&mut self.disk_free_gib, "DISK_FREE_GIB"),
            (&mut self.queue_stuck_seconds, "QUEUE_STUCK_SECONDS"),
            (&mut self.job_failures, "JOB_FAILURES"),
            (&mut self.certificate_days, "CERTIFICATE_DAYS"),
            (&mut self.agent_certificate_days, "AGENT_CERTIFICATE_DAYS"),
            (&mut self.clock_skew_seconds, "CLOCK_SKEW_SECONDS"),
            (&mut self.database_slow_ms, "DATABASE_SLOW_MS"),
        ];
        for (field, name) in fields {
            let name = format!("ALERTS_{name}");
            if let Some(text) = get(&name) {
                *field = text.parse().map_err(|_| format!("HYPERSDK_{name}"))?;
            }
        }
        Ok(())
    }

    /// Refuses what cannot work: the setting's name and what would be right.
    pub fn check(&self) -> Result<(), (&'static str, &'static str)> {
        // A year in seconds; larger ones overflow where they are turned into milliseconds.
        const MOST: u64 = 366 * 24 * 3600;
        let rules = [
            ("alerts.interval_seconds", (1..=3600).contains(&self.interval_seconds), "must be from 1 to 3600"),
            ("alerts.agent_lost_seconds", (1..=MOST).contains(&self.agent_lost_seconds), "must be from 1 to 31622400"),
            ("alerts.disk_free_percent", self.disk_free_percent <= 80, "must be from 0 to 80"),
            ("alerts.disk_free_gib", self.disk_free_gib <= 1 << 20, "must be from 0 to 1048576"),
            ("alerts.queue_stuck_seconds", (1..=MOST).contains(&self.queue_stuck_seconds), "must be from 1 to 31622400"),
            ("alerts.job_failures", (1..=1000).contains(&self.job_failures), "must be from 1 to 1000"),
            ("alerts.certificate_days", self.certificate_days <= 3650, "must be from 0 to 3650"),
            ("alerts.agent_certificate_days", self.agent_certificate_days <= 30, "must be from 0 to 30"),
            ("alerts.clock_skew_seconds", (1..=MOST).contains(&self.clock_skew_seconds), "must be from 1 to 31622400"),
            ("alerts.database_slow_ms", (1..=60_000).contains(&self.database_slow_ms), "must be from 1 to 60000"),
        ];
        match rules.into_iter().find(|(_, good, _)| !good) {
            Some((name, _, right)) => Err((name, right)),
            None => Ok(()),
        }
    }
}
