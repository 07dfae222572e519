//! What the rules look at, gathered from the store, the agents' sessions, the queue and the kernel.
//!
//! Owns: the gathering, and what of it is kept between two looks. Never: decides what is wrong.
//! A crash here costs one look.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect};

use super::rules::{AgentFact, Facts, FailingFact, LateFact, SourceFact, VolumeFact};
use crate::app::App;
use crate::http::tls;
use crate::jobs::board::Waiting;
use crate::jobs::core::{Outbox, PER_AGENT};
use crate::providers;
use crate::store::Store;
use crate::store::entities::jobs;
use crate::system::health::{self, Report};

/// Jobs of the last days count as a row of failures.
const FAILURES: i64 = 7 * 24 * 3600 * 1000;
/// Failed jobs that are looked at, newest first.
const MOST_FAILED: u64 = 1000;
/// How often rows of failures are looked for although no job ended.
const LOOK_AGAIN: Duration = Duration::from_secs(300);
/// Answers of the database that count.
const PINGS: usize = 3;

/// What is kept from look to look.
#[derive(Default)]
pub struct Memory {
    pings: Vec<u64>,
    failing: Vec<FailingFact>,
    /// Totals of ended jobs and when, at the last look for failures.
    looked: Option<(Instant, BTreeMap<&'static str, u64>)>,
    /// When this controller began to listen for agents, milliseconds since 1970.
    began: i64,
}

impl Memory {
    /// Of a controller that starts now.
    pub fn new(now: i64) -> Self {
        Self { began: now, ..Self::default() }
    }
}

/// Gathers everything. A database that is away is a fact, too.
pub async fn gather(app: &App, report: &Report, failures: u64, memory: &mut Memory) -> Facts {
    let now = shared::clock::now().timestamp_millis();
    match from_store(app, report, failures, memory, now).await {
        Ok(facts) => facts,
        Err(e) => {
            memory.pings.clear();
            Facts { now, database_away: Some(e.to_string().chars().take(300).collect()), ..Facts::default() }
        }
    }
}

async fn from_store(app: &App, report: &Report, failures: u64, memory: &mut Memory, now: i64) -> Result<Facts, crate::store::Error> {
    if let Some(error) = &report.database.error {
        return Err(crate::store::Error::Away(error.clone()));
    }
    if let Some(ms) = report.database.ping_ms {
        memory.pings.push(ms.ceil() as u64);
        let extra = memory.pings.len().saturating_sub(PINGS);
        memory.pings.drain(..extra);
    }
    let board = app.queue.board();
    let waiting = board.waiting();
    let (mut agents, mut unseen) = (Vec::new(), BTreeSet::new());
    for row in app.fleet.agents().await? {
        if !report.agents.here.contains(&row.id) {
            unseen.insert(row.name.clone());
        }
        agents.push(agent(app, &row, &waiting, memory.began, now).await);
    }
    let sources = providers::service::all(&app.store).await?.into_iter().filter(|row| row.status == "error");
    let sources = sources.map(|row| SourceFact { error: row.last_error.unwrap_or_default(), name: row.name }).collect();
    let ended = app.queue.observe().by_status;
    let is_old = memory.looked.as_ref().is_none_or(|(when, counts)| when.elapsed() > LOOK_AGAIN || *counts != ended);
    if is_old {
        memory.failing = failing(&app.store, failures, now).await?;
        memory.looked = Some((Instant::now(), ended));
    }
    let volumes = report.disk.volumes.iter().filter(|volume| volume.writable);
    Ok(Facts {
        now,
        agents,
        unseen,
        volumes: volumes
            .map(|volume| VolumeFact { resource: volume.resource(), free: volume.free_bytes, total: volume.total_bytes })
            .collect(),
        failing: memory.failing.clone(),
        certificate_until: tls::valid_until(&app.config),
        sources,
        late: board.late(now).into_iter().map(|(job, vm_name, deadline)| LateFact { job, vm_name, deadline }).collect(),
        database_ms: if memory.pings.len() == PINGS { memory.pings.iter().min().copied() } else { None },
        database_away: None,
    })
}

async fn agent(app: &App, row: &crate::store::entities::agents::Model, waiting: &Waiting, began: i64, now: i64) -> AgentFact {
    let live = app.fleet.snapshot(&row.id).await;
    let heard = app.fleet.last_heard(&row.id).map(|when| now.saturating_sub(i64::try_from(when.elapsed().as_millis()).unwrap_or(i64::MAX)));
    let of = waiting.by_owner.get(&row.id);
    let running = waiting.running.get(&row.id).copied().unwrap_or(0);
    AgentFact {
        name: row.name.clone(),
        connected: live.is_some(),
        last_heard: heard.or_else(|| row.last_seen.map(|seen| seen.max(began))),
        jobs: of.map_or(0, |of| of.live),
        certificate_until: live.as_ref().and_then(|live| live.certificate_until),
        skew_ms: live.as_ref().and_then(|live| live.skew_ms),
        has_room: live.is_some() && !row.draining && running < PER_AGENT as u64,
        ready: of.map_or(0, |of| of.ready),
        oldest_ready: of.and_then(|of| of.oldest_ready),
    }
}

/// VMs whose newest jobs failed, at least `failures` of them in a row.
async fn failing(store: &Store, failures: u64, now: i64) -> Result<Vec<FailingFact>, crate::store::Error> {
    let since = now.saturating_sub(FAILURES);
    let find = jobs::Entity::find()
        .filter(jobs::Column::Status.eq("failed"))
        .filter(jobs::Column::CreatedAt.gt(since))
        .order_by_desc(jobs::Column::CreatedAt)
        .limit(MOST_FAILED);
    let failed = store.read(|db| async move { Ok(find.all(&db).await?) }).await?;
    let mut by_vm: HashMap<(String, String), Vec<jobs::Model>> = HashMap::new();
    for job in failed.into_iter().filter(|job| job.finished_at.is_some()) {
        let what = if job.vm_id.is_empty() { job.source.clone() } else { job.vm_id.clone() };
        by_vm.entry((job.provider.clone(), what)).or_default().push(job);
    }
    by_vm.retain(|_, jobs| jobs.len() as u64 >= failures);
    if by_vm.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<String> = by_vm.values().flatten().map(|job| job.vm_id.clone()).collect::<BTreeSet<_>>().into_iter().collect();
    let done = jobs::Entity::find()
        .filter(jobs::Column::Status.eq("completed"))
        .filter(jobs::Column::CreatedAt.gt(since))
        .filter(jobs::Column::VmId.is_in(ids))
        .order_by_desc(jobs::Column::CreatedAt)
        .limit(MOST_FAILED);
    let done = store.read(|db| async move { Ok(done.all(&db).await?) }).await?;
    Ok(rows_of_failures(by_vm, &done, failures))
}

fn rows_of_failures(by_vm: HashMap<(String, String), Vec<jobs::Model>>, done: &[jobs::Model], failures: u64) -> Vec<FailingFact> {
    let mut found = Vec::new();
    for ((provider, what), mut failed) in by_vm {
        let is_its = |job: &&jobs::Model| job.provider == provider && (job.vm_id == what || (job.vm_id.is_empty() && job.source == what));
        let good = done.iter().filter(is_its).filter_map(|job| job.finished_at).max().unwrap_or(i64::MIN);
        failed.retain(|job| job.finished_at.is_some_and(|end| end > good));
        failed.sort_by_key(|job| std::cmp::Reverse(job.finished_at));
        let count = failed.len() as u64;
        if let Some(last) = failed.first().filter(|_| count >= failures) {
            let name = if last.vm_name.is_empty() { &what } else { &last.vm_name };
            let error = last.error.clone().unwrap_or_default();
            found.push(FailingFact { resource: format!("vm {provider}/{name}"), failures: count, error });
        }
    }
    found.sort_by(|a, b| a.resource.cmp(&b.resource));
    found
}

/// One look at everything: how the installation is, and the facts.
pub async fn look(app: &App, failures: u64, memory: &mut Memory) -> (Report, Facts) {
    let report = health::gather(app).await;
    let facts = gather(app, &report, failures, memory).await;
    (report, facts)
}
