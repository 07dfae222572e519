//! How the installation is, in figures.
//!
//! Owns: the answer of `GET /system/health`. Never: waits for what does not answer: that is a finding. A crash here costs one answer.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde::Serialize;
use shared::vault;
use utoipa::ToSchema;

use super::score::{self, Inputs};
use super::{host, process};
use crate::app::App;
use crate::fleet::registry::merge_roots;
use crate::fleet::store as agents;
use crate::jobs::core::PER_AGENT;

/// Longest wait for an actor.
const ACTOR: Duration = Duration::from_secs(5);

/// How the installation is.
#[derive(Serialize, ToSchema)]
#[schema(as = SystemHealth)]
pub struct Report {
    /// 0–100: the weighted mean of the parts, never better than the database and the actors.
    pub score: u8,
    /// `healthy` (80 and more), `degraded` (50 and more), `unhealthy`.
    pub status: &'static str,
    /// When this was looked at.
    #[schema(example = "2026-01-02T03:04:05.678Z")]
    pub checked_at: String,
    /// Processors of the controller's host.
    pub cpu: Cpu,
    /// Its memory.
    pub memory: Memory,
    /// The controller's data directory and the agents' roots.
    pub disk: Disks,
    /// Interfaces of the controller's host.
    pub network: Network,
    /// The database.
    pub database: Database,
    /// The fleet.
    pub agents: Agents,
    /// The jobs.
    pub queue: Queue,
    /// The actors that everything goes through.
    pub actors: Actors,
}

/// Processors.
#[derive(Serialize, ToSchema)]
pub struct Cpu {
    score: u8,
    cores: usize,
    /// Share of all processors that was busy since the last look (some seconds), 0–100.
    percent: f64,
    load_1m: f64,
    /// Processor time of the controller since its start.
    process_seconds: f64,
}

/// Memory.
#[derive(Serialize, ToSchema)]
#[schema(as = HostMemory)]
pub struct Memory {
    score: u8,
    total_bytes: u64,
    available_bytes: u64,
    /// Resident memory of the controller.
    process_bytes: u64,
}

/// File systems.
#[derive(Serialize, ToSchema)]
pub struct Disks {
    score: u8,
    /// Each of them.
    pub volumes: Vec<Volume>,
}

/// A file system.
#[derive(Serialize, ToSchema)]
pub struct Volume {
    /// `controller`, or the agent's name.
    pub host: String,
    /// `data`, or the root's name.
    pub name: String,
    /// Where it lies there.
    pub path: String,
    /// Free bytes; an agent says them each 5 s.
    pub free_bytes: u64,
    /// Its size.
    pub total_bytes: u64,
    /// Whether we write to it.
    pub writable: bool,
}

impl Volume {
    /// As alerts name it.
    pub fn resource(&self) -> String {
        if self.host == "controller" { "controller data".to_owned() } else { format!("agent {} root {}", self.host, self.name) }
    }

    /// 0–100.
    pub fn percent_free(&self) -> f64 {
        self.free_bytes as f64 * 100.0 / self.total_bytes.max(1) as f64
    }
}

/// Network.
#[derive(Serialize, ToSchema)]
pub struct Network {
    score: u8,
    interfaces: Vec<Interface>,
}

/// An interface.
#[derive(Serialize, ToSchema)]
pub struct Interface {
    name: String,
    received_bytes: u64,
    sent_bytes: u64,
    /// Bytes a second since the last look.
    received_bps: u64,
    /// Bytes a second since the last look.
    sent_bps: u64,
    /// Errors and drops since the boot.
    errors: u64,
}

/// The database.
#[derive(Serialize, ToSchema)]
pub struct Database {
    score: u8,
    /// `sqlite` or `postgres`.
    kind: &'static str,
    /// `ok` or `away`.
    status: &'static str,
    /// Time of one answer in milliseconds; null when it is away.
    pub ping_ms: Option<f64>,
    /// Bytes on its disk; null where it cannot be asked.
    size_bytes: Option<u64>,
    /// Why it is away.
    #[serde(skip)]
    pub error: Option<String>,
}

/// The fleet.
#[derive(Serialize, ToSchema)]
pub struct Agents {
    score: u8,
    total: u64,
    connected: u64,
    away: u64,
    draining: u64,
    /// Hypervisors that bytes come from, as of the agents' last heartbeats.
    sources: Vec<SourceHost>,
    /// Ids of those that were asked for their file systems.
    #[serde(skip)]
    pub here: BTreeSet<String>,
}

/// What a hypervisor gives an agent at a time.
#[derive(Serialize, ToSchema)]
pub struct SourceHost {
    /// The agent's name.
    agent: String,
    /// HOST[:PORT].
    #[schema(example = "vcenter.example.org")]
    host: String,
    /// Streams that may run at a time.
    streams: u32,
    /// Streams that run.
    running: u32,
    /// Turns that the host has back for a while because it answered 503.
    withheld: u32,
}

/// The jobs.
#[derive(Serialize, ToSchema)]
pub struct Queue {
    score: u8,
    /// Jobs that wait, for whatever reason.
    depth: u64,
    running: u64,
    /// Since when the oldest waiting job is there; null where none waits.
    oldest_waiting_seconds: Option<u64>,
    /// For how long a job could run at an agent with room and does not; 0 is right.
    oldest_ready_seconds: u64,
}

/// The actors.
#[derive(Serialize, ToSchema)]
pub struct Actors {
    score: u8,
    queue: Mailbox,
    live: Mailbox,
}

/// An actor.
#[derive(Serialize, ToSchema)]
pub struct Mailbox {
    /// Time of a message through the mailbox; null where no answer came in 5 s.
    mailbox_ms: Option<f64>,
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1000.0
}

/// Looks at everything.
pub async fn gather(app: &App) -> Report {
    let rates = app.sampler.rates();
    let (total_bytes, available_bytes) = host::memory();
    let (ping_ms, error) = ping(app).await;
    let rows = if error.is_none() { app.fleet.agents().await.unwrap_or_default() } else { Vec::new() };
    let mut volumes = controller_volume(app);
    let mut here = BTreeSet::new();
    let mut sources = Vec::new();
    for row in &rows {
        let Some(live) = app.fleet.snapshot(&row.id).await else { continue };
        here.insert(row.id.clone());
        sources.extend(live.source_hosts.iter().map(|source| SourceHost {
            agent: row.name.clone(),
            host: source.host.clone(),
            streams: source.streams,
            running: source.running,
            withheld: source.withheld,
        }));
        let roots = merge_roots(agents::roots(row), &live.roots);
        volumes.extend(roots.into_iter().map(|root| Volume {
            host: row.name.clone(),
            name: root.name,
            path: root.path,
            free_bytes: root.free_bytes,
            total_bytes: root.total_bytes,
            writable: root.writable,
        }));
    }
    let (queue_ms, live_ms) = actors(app).await;
    let now = shared::clock::now();
    let seconds = |since: i64| u64::try_from(now.timestamp_millis().saturating_sub(since) / 1000).unwrap_or(0);
    let waiting = app.queue.board().waiting();
    let has_room = |row: &&crate::store::entities::agents::Model| {
        !row.draining && app.fleet.is_connected(&row.id) && waiting.running.get(&row.id).copied().unwrap_or(0) < PER_AGENT as u64
    };
    let ready = rows.iter().filter(has_room).filter_map(|row| waiting.by_owner.get(&row.id)?.oldest_ready).min();
    let (total, connected) = (rows.len() as u64, here.len() as u64);
    let inputs = Inputs {
        cpu_percent: rates.cpu_percent,
        memory_available_percent: (total_bytes > 0).then(|| available_bytes as f64 * 100.0 / total_bytes as f64),
        volumes: volumes.iter().filter(|volume| volume.writable).map(|volume| (volume.percent_free(), volume.free_bytes)).collect(),
        network_errors: rates.interfaces.iter().map(|interface| interface.error_ratio).fold(0.0, f64::max),
        database_ms: ping_ms,
        agents: (connected, total),
        ready_seconds: ready.map_or(0, seconds),
        actors_ms: queue_ms.zip(live_ms).map(|(queue, live)| queue.max(live)),
    };
    let scores = score::score(&inputs);
    let observed = app.queue.observe();
    Report {
        score: scores.total,
        status: score::word(scores.total),
        checked_at: shared::clock::rfc3339(now),
        cpu: Cpu {
            score: scores.cpu,
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            percent: rates.cpu_percent,
            load_1m: host::load(),
            process_seconds: process::cpu_seconds(),
        },
        memory: Memory { score: scores.memory, total_bytes, available_bytes, process_bytes: process::resident_bytes() },
        disk: Disks { score: scores.disk, volumes },
        network: Network { score: scores.network, interfaces: rates.interfaces.into_iter().map(interface).collect() },
        database: Database {
            score: scores.database,
            kind: if app.store.is_postgres() { "postgres" } else { "sqlite" },
            status: if error.is_none() { "ok" } else { "away" },
            ping_ms,
            size_bytes: if error.is_none() { app.store.size().await.ok() } else { None },
            error,
        },
        agents: Agents {
            score: scores.agents,
            total,
            connected,
            away: total.saturating_sub(connected),
            draining: rows.iter().filter(|row| row.draining).count() as u64,
            sources,
            here,
        },
        queue: Queue {
            score: scores.queue,
            depth: observed.queued,
            running: observed.running,
            oldest_waiting_seconds: waiting.oldest.map(seconds),
            oldest_ready_seconds: inputs.ready_seconds,
        },
        actors: Actors { score: scores.actors, queue: Mailbox { mailbox_ms: queue_ms }, live: Mailbox { mailbox_ms: live_ms } },
    }
}

async fn ping(app: &App) -> (Option<f64>, Option<String>) {
    let began = Instant::now();
    match app.store.ping().await {
        Ok(()) => (Some(ms(began.elapsed())), None),
        Err(e) => (None, Some(e.to_string())),
    }
}

async fn actors(app: &App) -> (Option<f64>, Option<f64>) {
    let queue = async { tokio::time::timeout(ACTOR, app.queue.ping()).await.ok()?.ok().map(ms) };
    let live = async { tokio::time::timeout(ACTOR, app.live.ping()).await.ok()?.map(ms) };
    futures_util::future::join(queue, live).await
}

fn controller_volume(app: &App) -> Vec<Volume> {
    let space = vault::open_data_dir(&app.config.data_dir).and_then(|dir| vault::space(&dir));
    let path = app.config.data_dir.display().to_string();
    let of = |(free_bytes, total_bytes)| Volume {
        host: "controller".to_owned(),
        name: "data".to_owned(),
        path,
        free_bytes,
        total_bytes,
        writable: true,
    };
    space.ok().map(of).into_iter().collect()
}

fn interface(seen: host::Interface) -> Interface {
    Interface {
        name: seen.name,
        received_bytes: seen.total.received,
        sent_bytes: seen.total.sent,
        received_bps: seen.received_bps,
        sent_bps: seen.sent_bps,
        errors: seen.total.errors,
    }
}
