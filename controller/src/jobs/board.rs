//! What readers may see of the queue without asking it: newest counters of live jobs, and totals.
//!
//! Owns: a copy for `GET /jobs`, the metrics and the tests. The Queue writes it, everybody reads it, nobody waits for a mailbox.
//! Never: is read by the queue to decide anything. A crash here costs nothing.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use shared::job::{Hold, Status};

use super::lists::memory::Memory;
use super::record::Job;
use crate::system::metrics::Metrics;

/// Jobs by status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// Jobs in each stored status.
    pub by_status: BTreeMap<&'static str, u64>,
    /// Jobs that wait, for whatever reason.
    pub queued: u64,
    /// Jobs that are with an agent.
    pub running: u64,
}

/// What waits at one agent.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// Jobs that are not over.
    pub live: u64,
    /// Jobs that could run now.
    pub ready: u64,
    /// Since when the oldest of these could, milliseconds since 1970.
    pub oldest_ready: Option<i64>,
}

/// What waits and what runs.
#[derive(Clone, Debug, Default)]
pub struct Waiting {
    /// By the agent that must run it.
    pub by_owner: BTreeMap<String, Line>,
    /// Jobs that are with an agent.
    pub running: BTreeMap<String, u64>,
    /// When the oldest waiting job was made, whatever it waits for.
    pub oldest: Option<i64>,
}

fn earlier(known: Option<i64>, time: i64) -> Option<i64> {
    Some(known.map_or(time, |known| known.min(time)))
}

struct Inner {
    metrics: Metrics,
    live: RwLock<HashMap<String, Job>>,
    counts: RwLock<BTreeMap<Status, u64>>,
    lists: Memory,
}

/// The board; clones show the same.
#[derive(Clone)]
pub struct Board(Arc<Inner>);

impl Board {
    /// An empty one that also keeps the figures for Prometheus.
    pub fn new(metrics: Metrics) -> Self {
        Self(Arc::new(Inner { metrics, live: RwLock::default(), counts: RwLock::default(), lists: Memory::default() }))
    }

    /// Newest state of a live job.
    pub fn get(&self, id: &str) -> Option<Job> {
        self.0.live.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// The live jobs whose grams are counted: the carbon-aware ones, and migrations.
    pub fn counted(&self) -> Vec<Job> {
        let live = self.0.live.read().unwrap_or_else(PoisonError::into_inner);
        live.values().filter(|job| job.carbon.is_some()).cloned().collect()
    }

    /// Puts the newest counters into a job that was read from the store, where it is the same assignment.
    pub fn freshen(&self, job: Job) -> Job {
        let live = self.0.live.read().unwrap_or_else(PoisonError::into_inner);
        match live.get(&job.id) {
            Some(newer) if newer.state.epoch == job.state.epoch && newer.state.status == job.state.status => newer.clone(),
            _ => job,
        }
    }

    /// What is remembered for the lists of jobs.
    pub fn lists(&self) -> &Memory {
        &self.0.lists
    }

    /// Totals.
    pub fn observe(&self) -> Observation {
        let counts = self.0.counts.read().unwrap_or_else(PoisonError::into_inner);
        let of = |status: Status| counts.get(&status).copied().unwrap_or(0);
        let statuses = [Status::Queued, Status::Running, Status::Cancelling, Status::Completed, Status::Failed, Status::Cancelled];
        Observation {
            by_status: statuses.iter().map(|status| (status.word(), of(*status))).collect(),
            queued: of(Status::Queued),
            running: of(Status::Running) + of(Status::Cancelling),
        }
    }

    /// What waits and what runs, by agent.
    pub fn waiting(&self) -> Waiting {
        let live = self.0.live.read().unwrap_or_else(PoisonError::into_inner);
        let mut waiting = Waiting::default();
        for job in live.values() {
            let owner = waiting.by_owner.entry(job.owner.clone()).or_default();
            owner.live += 1;
            match (job.state.status, &job.state.agent) {
                (Status::Queued, _) => {
                    waiting.oldest = earlier(waiting.oldest, job.created_at);
                    if job.state.hold == Hold::None {
                        owner.ready += 1;
                        owner.oldest_ready = earlier(owner.oldest_ready, job.updated_at);
                    }
                }
                (_, Some(agent)) => *waiting.running.entry(agent.clone()).or_default() += 1,
                _ => {}
            }
        }
        waiting
    }

    /// Live jobs whose deadline is over: id, VM and deadline in milliseconds since 1970.
    pub fn late(&self, now: i64) -> Vec<(String, String, i64)> {
        let live = self.0.live.read().unwrap_or_else(PoisonError::into_inner);
        let late = |job: &Job| {
            let deadline = job.deadline.filter(|deadline| *deadline < now)?;
            Some((job.id.clone(), job.vm_name.clone(), deadline))
        };
        live.values().filter_map(late).collect()
    }

    pub(super) fn put(&self, job: &Job) {
        self.0.live.write().unwrap_or_else(PoisonError::into_inner).insert(job.id.clone(), job.clone());
    }

    pub(super) fn remove(&self, id: &str) {
        self.0.live.write().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    pub(super) fn set_counts(&self, counts: BTreeMap<Status, u64>) {
        *self.0.counts.write().unwrap_or_else(PoisonError::into_inner) = counts;
        self.show();
    }

    pub(super) fn count(&self, before: Option<Status>, after: Option<Status>) {
        let mut counts = self.0.counts.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = before {
            let count = counts.entry(before).or_default();
            *count = count.saturating_sub(1);
        }
        if let Some(after) = after {
            *counts.entry(after).or_default() += 1;
        }
        drop(counts);
        if before != after {
            self.0.lists.changed();
            self.show();
        }
    }

    /// Brings the gauges up to date.
    fn show(&self) {
        let counts = self.0.counts.read().unwrap_or_else(PoisonError::into_inner);
        let of = |status: Status| counts.get(&status).map_or(0, |count| i64::try_from(*count).unwrap_or(i64::MAX));
        self.0.metrics.queue_depth.set(of(Status::Queued));
        for status in [Status::Queued, Status::Completed, Status::Failed, Status::Cancelled] {
            self.0.metrics.jobs.with_label_values(&[status.word()]).set(of(status));
        }
        self.0.metrics.jobs.with_label_values(&["running"]).set(of(Status::Running).saturating_add(of(Status::Cancelling)));
    }

    pub(super) fn add_bytes(&self, read: u64, durable: u64, verified: u64) {
        for (stage, bytes) in [("read", read), ("durable", durable), ("verified", verified)] {
            self.0.metrics.job_bytes.with_label_values(&[stage]).inc_by(bytes);
        }
    }
}
