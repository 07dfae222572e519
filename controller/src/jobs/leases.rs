//! Agents that come, go and fall silent, and what becomes of the jobs that are with them.
//!
//! ```text
//! Hello ─► agent_up: adopt what is held and current, take back the rest ─► Welcome ─► agent_ready: release, dispatch
//! stream ends ─► agent_down: new work waits ─► 40 s silence ─► tick: lease lost
//! ```
//! Owns: adoption by epoch, the lease check, deferred reports, counters and log batches by the clock.
//! Never: measures wall-clock time for a lease. A crash here costs nothing: after a start every agent has the whole time again.

use std::time::{Duration, Instant};

use proto::v1::controller_message::Kind;
use proto::v1::{Acknowledge, Cancel, Held};
use shared::job::{Event, Hold, Status};
use shared::lease;

use super::core::{Agent, Change, Core};
use super::record::{Job, now_millis};
use super::reports::is_discarded;
use super::store;
use crate::store::Error as StoreError;

/// How old counters in the store may be.
const SAVE: Duration = Duration::from_secs(5);
/// How long the checkpoint of a failed job is kept for a retry, in milliseconds.
const RETRY_WINDOW: i64 = 7 * 24 * 3600 * 1000;

/// An agent that said Hello.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Its id.
    pub agent: String,
    /// Number of its session, rising.
    pub session: u64,
    /// What it works on or has to report.
    pub held: Vec<Held>,
    /// It takes no new work.
    pub draining: bool,
    /// Checkpoints on its disk that it does not work on.
    pub parked: Vec<Held>,
}

/// What Welcome and the messages right after it must say.
#[derive(Clone, Debug, Default)]
pub struct Keep {
    /// Assignments to go on with.
    pub keep: Vec<Held>,
    /// Messages to send right after Welcome.
    pub then: Vec<Kind>,
}

impl Core {
    /// Compares what an agent holds with what it should. Nothing is sent to it before [`Core::agent_ready`].
    pub async fn agent_up(&mut self, arrival: Arrival) -> Result<Keep, StoreError> {
        let Arrival { agent, session, held, draining, parked } = arrival;
        let known = self.agents.entry(agent.clone()).or_default();
        if session < known.session {
            return Ok(Keep::default());
        }
        (known.session, known.connected, known.draining) = (session, false, draining);
        let mine: Vec<String> = known.running.iter().cloned().collect();
        let mut answer = Keep::default();
        let mut lost = Vec::new();
        for id in mine {
            let Some(live) = self.jobs.get_mut(&id) else { continue };
            if held.iter().any(|held| held.job == id && held.epoch == live.job.state.epoch) {
                live.leased = Instant::now();
                continue;
            }
            let event = Event::LeaseLost { epoch: live.job.state.epoch, bytes: live.job.safe_bytes() };
            let job = live.job.clone();
            let Ok(mut change) = self.plan(&job, &event) else { continue };
            change.line = Some(("warn", "the agent came back without this assignment; its checkpoint is kept there".to_owned()));
            lost.push(explain_strikes(change));
        }
        self.commit(lost).await?;
        let ids = held.iter().chain(&parked).map(|held| held.job.clone()).collect();
        let stored = store::load_many(&self.ports.store, ids).await?;
        for held in held {
            let Some(job) = self.jobs.get(&held.job).map(|live| &live.job).or_else(|| stored.iter().find(|job| job.id == held.job)) else {
                answer.then.push(cancel(&held, false, "this controller has no such job"));
                continue;
            };
            let its_own = job.state.epoch == held.epoch && job.state.agent.as_deref() == Some(agent.as_str());
            match job.state.status {
                Status::Running if its_own => answer.keep.push(held),
                Status::Cancelling if its_own => {
                    answer.then.push(cancel(&held, true, "cancelled"));
                    answer.keep.push(held);
                }
                Status::Completed | Status::Failed if its_own => {
                    answer.then.push(Kind::Acknowledge(Acknowledge { job: held.job, epoch: held.epoch }));
                }
                _ => answer.then.push(cancel(&held, is_discarded(job, &agent), "this assignment is over")),
            }
        }
        let spent = parked.into_iter().filter(|held| stored.iter().any(|job| job.id == held.job && is_spent(job, &agent)));
        answer.then.extend(
            spent.map(|held| Kind::Cancel(Cancel { job: held.job, epoch: 0, discard: true, reason: "the job has ended".to_owned() })),
        );
        Ok(answer)
    }

    /// Welcome is on its way: what waited for this agent is released.
    pub async fn agent_ready(&mut self, agent: &str, session: u64) -> Result<(), StoreError> {
        let Some(known) = self.agents.get_mut(agent).filter(|known| known.session == session) else { return Ok(()) };
        known.connected = true;
        // A cancel that came between Hello and Welcome found nobody.
        let cancelling: Vec<(String, u64)> = known
            .running
            .iter()
            .filter_map(|id| self.jobs.get(id))
            .filter(|live| live.job.state.status == Status::Cancelling)
            .map(|live| (live.job.id.clone(), live.job.state.epoch))
            .collect();
        // So did a word to cut over.
        let is_told = |job: &Job| job.state.status == Status::Running && job.options.warm.as_ref().is_some_and(|warm| warm.now);
        let told = known.running.iter().filter_map(|id| self.jobs.get(id)).filter(|live| is_told(&live.job));
        for word in told.map(|live| super::core::cutover(&live.job)).collect::<Vec<_>>() {
            self.ports.outbox.send(agent, word);
        }
        for (job, epoch) in cancelling {
            self.stop(agent, &job, epoch, true, "cancelled");
        }
        self.settle(agent).await
    }

    /// A session ended. What runs keeps its lease; what waits for this agent says so.
    pub async fn agent_down(&mut self, agent: &str, session: u64) -> Result<(), StoreError> {
        let Some(known) = self.agents.get_mut(agent).filter(|known| known.session == session && known.connected) else { return Ok(()) };
        known.connected = false;
        for id in known.running.iter().cloned().collect::<Vec<_>>() {
            let Some(job) = self.jobs.get(&id).map(|live| live.job.clone()) else { continue };
            self.write(&job, "warn", "contact with the agent is lost; its lease runs on for 40 s");
        }
        self.settle(agent).await
    }

    /// An agent's process is about to end: as drained, for as long as this session lasts.
    pub async fn agent_leaving(&mut self, agent: &str, session: u64) -> Result<(), StoreError> {
        let Some(known) = self.agents.get_mut(agent).filter(|known| known.session == session) else { return Ok(()) };
        known.draining = true;
        self.settle(agent).await
    }

    /// An agent takes no new work, or does again.
    pub async fn agent_draining(&mut self, agent: &str, draining: bool) -> Result<(), StoreError> {
        self.agents.entry(agent.to_owned()).or_default().draining = draining;
        self.settle(agent).await
    }

    /// Brings the hold of every queued job of an agent in line with whether it is here.
    pub(super) async fn settle(&mut self, agent: &str) -> Result<(), StoreError> {
        let here = self.agents.get(agent).is_some_and(|known| known.connected && !known.draining);
        let wrong = if here { Hold::Agent } else { Hold::None };
        let waiting = self
            .jobs
            .values()
            .map(|live| &live.job)
            .filter(|job| job.owner == agent && job.state.status == Status::Queued && job.state.hold == wrong);
        let changes: Vec<Change> = waiting.filter_map(|job| self.plan(job, &Event::AgentHere(here)).ok()).collect();
        self.commit(changes).await?;
        self.dispatch_due = true;
        self.dispatch().await;
        Ok(())
    }

    /// Once a second: leases, deferred reports, counters, work that could not be given out.
    pub async fn tick(&mut self, now: Instant) {
        self.retry_deferred().await;
        if let Err(error) = self.look_for_unsure(now).await {
            tracing::debug!(%error, "jobs whose commit had no answer are looked for later");
        }
        let resting = self.resting.len();
        self.resting.retain(|_, until| *until > now);
        self.dispatch_due |= self.resting.len() < resting;
        if let Err(error) = self.check_leases(now).await {
            tracing::warn!(%error, "leases could not be checked");
        }
        if let Err(error) = self.tick_holds(now_millis()).await {
            tracing::warn!(%error, "jobs that wait for their time could not be looked at");
        }
        self.save_counters(now).await;
        self.flush_logs().await;
        self.dispatch().await;
    }

    /// Stores waiting log lines.
    pub async fn flush_logs(&mut self) {
        if self.logs.is_dirty()
            && let Err(error) = self.logs.flush(&self.ports.store).await
        {
            tracing::warn!(%error, "log lines wait for the store");
        }
    }

    async fn check_leases(&mut self, now: Instant) -> Result<(), StoreError> {
        let mut lost = Vec::new();
        for live in self.jobs.values().filter(|live| matches!(live.job.state.status, Status::Running | Status::Cancelling)) {
            let agent = live.job.state.agent.as_deref().unwrap_or_default();
            let heard = self.ports.outbox.last_heard(agent).unwrap_or(self.since).max(live.leased).max(self.since);
            let silence = now.saturating_duration_since(heard);
            if silence < lease::REASSIGN {
                continue;
            }
            let event = Event::LeaseLost { epoch: live.job.state.epoch, bytes: live.job.safe_bytes() };
            let Ok(mut change) = self.plan(&live.job, &event) else { continue };
            let name = self.ports.outbox.name(agent);
            change.line = Some((
                "warn",
                format!("agent {name} was silent for {} s: its lease is lost, the checkpoint is kept there", silence.as_secs()),
            ));
            lost.push(explain_strikes(change));
        }
        self.commit(lost).await.map(drop)
    }

    async fn save_counters(&mut self, now: Instant) {
        let due = |since: Option<Instant>| since.is_some_and(|since| now.saturating_duration_since(since) >= SAVE);
        let jobs: Vec<_> = self.jobs.values().filter(|live| due(live.unsaved_since)).map(|live| live.job.clone()).collect();
        if jobs.is_empty() {
            return;
        }
        if let Err(error) = store::save_counters(&self.ports.store, &jobs).await {
            tracing::debug!(%error, "counters wait for the store");
            return;
        }
        for job in jobs {
            if let Some(live) = self.jobs.get_mut(&job.id) {
                live.unsaved_since = None;
            }
        }
    }

    /// No new work from now on; what runs goes on at its agents.
    pub async fn drain(&mut self) {
        self.draining = true;
        self.flush_logs().await;
        self.logs.close();
        let jobs: Vec<_> = self.jobs.values().filter(|live| live.unsaved_since.is_some()).map(|live| live.job.clone()).collect();
        if !jobs.is_empty()
            && let Err(error) = store::save_counters(&self.ports.store, &jobs).await
        {
            tracing::warn!(%error, "counters could not be stored at the end");
        }
    }

    /// Agents by whether they are connected here, for tests.
    pub fn connected(&self) -> usize {
        self.agents.values().filter(|agent: &&Agent| agent.connected).count()
    }
}

/// Whether a checkpoint at this agent is of no more use. A failed job may be retried for a week.
fn is_spent(job: &Job, agent: &str) -> bool {
    let is_old = job.finished_at.is_some_and(|finished| now_millis().saturating_sub(finished) > RETRY_WINDOW);
    match job.state.status {
        Status::Completed => true,
        Status::Failed => is_old,
        _ => is_discarded(job, agent),
    }
}

fn cancel(held: &Held, discard: bool, reason: &str) -> Kind {
    Kind::Cancel(Cancel { job: held.job.clone(), epoch: held.epoch, discard, reason: reason.to_owned() })
}

/// A job that failed because its attempts brought nothing must say so.
fn explain_strikes(mut change: Change) -> Change {
    if change.after.state.status == Status::Failed {
        let last = change.after.error.take().map(|error| format!("; last: {error}")).unwrap_or_default();
        change.after.error = Some(format!("{} attempts in a row brought nothing onto the disk{last}", shared::job::STRIKES));
        change.after.error_code = Some("unavailable".to_owned());
        change.line = Some(("error", change.after.error.clone().unwrap_or_default()));
    }
    change
}
