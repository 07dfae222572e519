//! What agents report about jobs, and what the queue answers.
//!
//! Owns: the fence at the door: a report of an assignment that is over changes nothing and its sender is told to stop or to forget.
//! Never: answers a grant or an acknowledgement before the store has it; loses a report because the store is away (it waits here).
//! A crash here costs nothing: an agent repeats what was not acknowledged after its next Hello.

use std::time::{Duration, Instant};

use proto::v1::controller_message::Kind;
use proto::v1::{self as wire, CommitReply};
use shared::job::{Event, Outcome, Refusal, Stage, Status};
use shared::progress::Progress;

use super::core::{Change, Core};
use super::record::Job;
use super::store;
use crate::store::Error as StoreError;

/// Reports that wait for a store that is away.
const DEFERRED: usize = 10_000;

/// A message of an agent about a job.
#[derive(Clone, Debug)]
pub enum Report {
    /// Counters.
    Progress(wire::Progress),
    /// A line for the log.
    Log(wire::Log),
    /// May it publish?
    Commit(wire::CommitRequest),
    /// It is over.
    Finished(wire::Finished),
}

impl Core {
    /// Takes a report. While the store is away what must not be lost is kept and taken again each second.
    pub async fn report(&mut self, agent: String, report: Report) {
        // In order: what comes after a deferred report waits behind it.
        let must_wait = !self.deferred.is_empty() && matches!(report, Report::Commit(_) | Report::Finished(_));
        if !must_wait {
            match self.take(&agent, &report).await {
                Ok(()) => return self.dispatch().await,
                Err(error) => tracing::warn!(%error, agent, "a report waits for the store"),
            }
        }
        if matches!(report, Report::Commit(_) | Report::Finished(_)) && self.deferred.len() < DEFERRED {
            self.deferred.push_back((agent, report));
        }
    }

    /// Takes again what waited for the store.
    pub(super) async fn retry_deferred(&mut self) {
        while let Some((agent, report)) = self.deferred.front().cloned() {
            if let Err(StoreError::Away(_)) = self.take(&agent, &report).await {
                return;
            }
            self.deferred.pop_front();
        }
    }

    async fn take(&mut self, agent: &str, report: &Report) -> Result<(), StoreError> {
        match report {
            Report::Progress(progress) => self.progress(agent, progress).await,
            Report::Log(log) => {
                self.log(agent, log);
                Ok(())
            }
            Report::Commit(request) => self.commit_requested(agent, request).await,
            Report::Finished(finished) => self.finished(agent, finished).await,
        }
    }

    async fn progress(&mut self, agent: &str, progress: &wire::Progress) -> Result<(), StoreError> {
        if !self.is_current(agent, &progress.job, progress.epoch) {
            return self.refuse(agent, &progress.job, progress.epoch, "this assignment is over").await;
        }
        let Some(live) = self.jobs.get_mut(&progress.job) else { return Ok(()) };
        if live.job.state.status != Status::Running {
            return Ok(());
        }
        // What was granted is known to be complete; a later attempt that has not looked yet says nothing against that.
        if live.job.state.is_granted() && progress.data == 0 {
            return Ok(());
        }
        let counters = Progress {
            data: progress.data,
            read: progress.read,
            // What is more than everything is a defect of the agent, and shall not show as one of ours.
            durable: progress.durable.min(progress.data),
            verified: progress.verified.min(progress.data),
            resumed: progress.resumed.min(progress.data),
        };
        let before = live.job.counters;
        // The first report of an attempt brings what earlier ones did; that was counted then.
        let first = before.read == 0 && before.durable == 0 && before.resumed == 0;
        let base = if first { counters.resumed } else { before.durable };
        // What an attempt brings is counted from where it began: one that found less than there was before (a part that was cut) and copies
        // it again brings something, too.
        if first {
            live.job.state.mark = live.job.state.mark.min(counters.durable.saturating_add(counters.verified));
        }
        self.board.add_bytes(
            counters.read.saturating_sub(before.read),
            counters.durable.saturating_sub(base),
            counters.verified.saturating_sub(before.verified),
        );
        let now = Instant::now();
        live.job.note_progress(counters, now);
        live.unsaved_since.get_or_insert(now);
        let job = live.job.clone();
        self.board.put(&job);
        let stage = Stage::from_word(&progress.stage);
        if let Some(stage) = stage
            && stage > job.state.stage
            && let Ok(change) = self.plan(&job, &Event::Staged { epoch: progress.epoch, agent: agent.to_owned(), stage })
            && change.before != change.after.state
        {
            return self.commit(vec![change]).await.map(drop);
        }
        self.tell("job.progress", &job);
        Ok(())
    }

    fn log(&mut self, agent: &str, log: &wire::Log) {
        if !self.is_current(agent, &log.job, log.epoch) {
            return;
        }
        let time = chrono::DateTime::parse_from_rfc3339(&log.time).ok().map(|time| time.timestamp_millis());
        self.write_at(&log.job, time, &log.level, &log.stage, &log.message);
    }

    async fn commit_requested(&mut self, agent: &str, request: &wire::CommitRequest) -> Result<(), StoreError> {
        let event = Event::CommitRequested { epoch: request.epoch, agent: agent.to_owned() };
        let job = self.find(&request.job).await?;
        let refusal = match job.as_ref().map(|job| self.plan(job, &event)) {
            Some(Ok(mut change)) => {
                if change.before != change.after.state {
                    change.line = Some(("info", "the output is proven; publication is granted".to_owned()));
                }
                if self.commit(vec![change]).await? {
                    return Ok(());
                }
                "the job changed at the same moment".to_owned()
            }
            Some(Err(refusal)) => refusal.to_string(),
            None => "no such job".to_owned(),
        };
        let reply =
            CommitReply { job: request.job.clone(), epoch: request.epoch, granted: false, reason: refusal.clone(), ..Default::default() };
        self.ports.outbox.send(agent, Kind::CommitReply(reply));
        self.refuse(agent, &request.job, request.epoch, &refusal).await
    }

    async fn finished(&mut self, agent: &str, finished: &wire::Finished) -> Result<(), StoreError> {
        let Some(job) = self.find(&finished.job).await? else {
            self.acknowledge(agent, &finished.job, finished.epoch);
            return Ok(());
        };
        let Some(outcome) = finished.outcome.as_ref() else {
            return self.refuse(agent, &finished.job, finished.epoch, "a Finished without an outcome").await;
        };
        let bytes = finished.durable.saturating_add(finished.verified);
        let event = Event::Finished { epoch: finished.epoch, agent: agent.to_owned(), outcome: outcome_of(outcome), bytes };
        match self.plan(&job, &event) {
            Ok(change) if job.state.status.is_final() => self.commit(vec![change]).await.map(drop),
            Ok(change) => {
                let change = describe(change, finished, outcome);
                let completed = (change.after.state.status == Status::Completed).then(|| change.after.clone());
                let assigned = self.jobs.get(&job.id).and_then(|live| live.assigned);
                // The same attempt a millisecond later would most likely end the same way.
                if change.after.state.status == Status::Queued {
                    let pause = Duration::from_secs(1 << change.after.state.strikes.clamp(1, 5));
                    self.resting.insert(job.id.clone(), Instant::now() + pause);
                }
                let held = self.commit(vec![change]).await?;
                if let (true, Some(job), Some(assigned)) = (held, completed, assigned) {
                    self.measure(agent, &job, assigned).await;
                }
                Ok(())
            }
            Err(Refusal::Fenced { .. }) => {
                // Its report changes nothing any more: it may forget it, and clean up where the job is over.
                if job.state.status == Status::Cancelled {
                    self.stop(agent, &job.id, finished.epoch, true, "the job was cancelled");
                }
                self.acknowledge(agent, &job.id, finished.epoch);
                Ok(())
            }
            Err(refusal @ Refusal::Illegal { .. }) => {
                tracing::error!(job = job.id, agent, %refusal, "an agent reported what cannot be");
                self.stop(agent, &job.id, finished.epoch, false, &refusal.to_string());
                let event = Event::LeaseLost { epoch: finished.epoch, bytes: 0 };
                let Ok(mut change) = self.plan(&job, &event) else { return Ok(()) };
                change.line = Some(("error", format!("the agent's report was refused: {refusal}")));
                self.commit(vec![change]).await.map(drop)
            }
        }
    }

    /// Whether (job, epoch) is the current assignment of this agent.
    fn is_current(&self, agent: &str, job: &str, epoch: u64) -> bool {
        self.jobs.get(job).is_some_and(|live| {
            let state = &live.job.state;
            matches!(state.status, Status::Running | Status::Cancelling) && state.epoch == epoch && state.agent.as_deref() == Some(agent)
        })
    }

    /// Tells the sender to stop. What it has written goes only where the job was cancelled or is with another agent.
    pub(super) async fn refuse(&self, agent: &str, job: &str, epoch: u64, reason: &str) -> Result<(), StoreError> {
        let discard = self.find(job).await?.is_some_and(|job| is_discarded(&job, agent));
        self.stop(agent, job, epoch, discard, reason);
        Ok(())
    }

    /// Learns how fast this agent makes this format, from a job that ran through in one attempt.
    async fn measure(&mut self, agent: &str, job: &Job, assigned: Instant) {
        // The capacity is that of the present disks alone.
        if job.options.include_snapshots == Some(true)
            || job.counters.resumed > 0
            || job.options.bandwidth_limit.is_some()
            || job.counters.data == 0
            || job.capacity == 0
        {
            return;
        }
        let seconds = assigned.elapsed().as_secs_f64();
        let rates = self.rates.entry(agent.to_owned()).or_default();
        rates.entry(job.rate_word().to_owned()).or_default().note(job.capacity, job.counters.data, seconds);
        if let Err(error) = store::save_rates(&self.ports.store, agent, rates).await {
            tracing::warn!(%error, agent, "measured rates could not be stored");
        }
    }
}

/// Whether nothing of what this agent wrote for the job will be needed.
pub(super) fn is_discarded(job: &Job, agent: &str) -> bool {
    let moved = job.state.agent.as_deref().is_some_and(|current| current != agent);
    moved || matches!(job.state.status, Status::Cancelled | Status::Cancelling)
}

fn outcome_of(outcome: &wire::finished::Outcome) -> Outcome {
    match outcome {
        wire::finished::Outcome::Completed(_) => Outcome::Completed,
        wire::finished::Outcome::Failed(failure) => Outcome::Failed { retryable: failure.retryable },
        wire::finished::Outcome::Cancelled(_) => Outcome::Cancelled,
        wire::finished::Outcome::Parked(_) => Outcome::Parked,
    }
}

/// Puts what the report says into the job, and a line into its log.
fn describe(mut change: Change, finished: &wire::Finished, outcome: &wire::finished::Outcome) -> Change {
    // An attempt at what was granted that ended before it looked says nothing against that.
    let said = finished.data > 0 || !change.before.is_granted();
    let job = &mut change.after;
    if said {
        job.counters.data = finished.data;
        job.counters.durable = finished.durable.min(finished.data);
        job.counters.verified = finished.verified.min(finished.data);
    }
    if job.state.status != Status::Completed {
        job.note_progress(job.counters, Instant::now());
    }
    let line = match (outcome, job.state.status) {
        (_, Status::Cancelled) => ("info", "cancelled; nothing was left behind".to_owned()),
        (wire::finished::Outcome::Completed(result), _) => {
            (job.error, job.error_code) = (None, None);
            match serde_json::from_str(result) {
                Ok(result) => {
                    job.result = Some(result);
                    ("info", "completed".to_owned())
                }
                Err(error) => ("warn", format!("completed; the agent's result could not be read: {error}")),
            }
        }
        (wire::finished::Outcome::Failed(failure), status) => {
            job.error = Some(failure.message.clone());
            job.error_code = Some(failure.code.clone());
            job.result = serde_json::from_str(&failure.result_json).ok().or(job.result.take());
            match status {
                Status::Failed => ("error", format!("failed: {}", failure.message)),
                _ => ("warn", format!("the attempt failed and will be repeated: {}", failure.message)),
            }
        }
        (wire::finished::Outcome::Parked(_), _) => ("info", "parked with its checkpoint kept".to_owned()),
        (wire::finished::Outcome::Cancelled(_), _) => ("warn", "the agent stopped without being told; the job will be repeated".to_owned()),
    };
    change.line = Some(line);
    change
}
