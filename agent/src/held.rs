//! What this process holds for the controller: running assignments, and ends that the controller has not acknowledged yet.
//!
//! ```text
//! Assign ─► running ─► ended (kept until Acknowledge) ─► forgotten
//!              │ Cancel{discard}, Cancel, silence of 20 s: the stop flag; the worker sees it within 100 ms
//! ```
//! Owns: the table through which session and workers speak. It is level-triggered: a session asks what there is to say, so that a lost
//! connection loses nothing but log lines beyond the backlog.
//! Never: touches a file, talks to the network.
//! A crash here costs nothing durable: the journals and the ledger say what was going on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use proto::v1;
use shared::progress::Progress;
use tokio::sync::Notify;

/// Log lines that wait for a connection; the oldest go first when there are more.
const BACKLOG: usize = 4096;

/// How a worker is asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Keep the checkpoint.
    Park,
    /// Remove what was written.
    Discard,
}

/// One assignment.
pub struct Assignment {
    /// The job.
    pub job: String,
    /// Its epoch.
    pub epoch: u64,
    stop: Arc<AtomicU8>,
    /// Somebody wants the VM of a warm migration to be stopped now.
    cutover: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stage: String,
    progress: Progress,
    /// Progress that the current session has not sent.
    unsent_progress: bool,
    /// The worker waits for a commit reply; whether this session has asked.
    commit: Option<Commit>,
    end: Option<v1::Finished>,
    /// Whether this session has sent the end.
    end_sent: bool,
    thread_gone: bool,
}

#[derive(Clone)]
struct Commit {
    asked: bool,
    reply: Option<(bool, String)>,
    /// What the controller has counted, as JSON.
    footprint: String,
}

/// What a worker is told when it asks to publish.
pub enum Grant {
    /// Go on.
    Yes,
    /// No, with the reason.
    No(String),
    /// Stop instead.
    Stopped(Stop),
}

impl Assignment {
    /// What the job has cost the grid until its commit was granted, as the controller counts it; null where it does not.
    pub fn footprint(&self) -> serde_json::Value {
        let told = self.lock().commit.as_ref().map(|commit| commit.footprint.clone());
        told.and_then(|told| serde_json::from_str(&told).ok()).unwrap_or_default()
    }

    /// What the worker is asked to do.
    pub fn stop(&self) -> Option<Stop> {
        match self.stop.load(Ordering::Acquire) {
            0 => None,
            1 => Some(Stop::Park),
            _ => Some(Stop::Discard),
        }
    }

    /// The flag itself, for whoever waits where the worker cannot look.
    pub fn stopping(&self) -> Arc<AtomicU8> {
        self.stop.clone()
    }

    /// Asks the worker to stop; a discard is not taken back by a later park.
    pub fn ask_to_stop(&self, stop: Stop) {
        self.stop.fetch_max(if stop == Stop::Park { 1 } else { 2 }, Ordering::AcqRel);
        self.changed.notify_all();
    }

    /// Asks a warm migration to cut over.
    pub fn ask_to_cut_over(&self) {
        self.cutover.store(true, Ordering::Release);
    }

    /// Whether it was asked to.
    pub fn is_to_cut_over(&self) -> bool {
        self.cutover.load(Ordering::Acquire)
    }

    /// Waits until the worker's thread has ended.
    pub fn wait_gone(&self) {
        let mut state = self.lock();
        while !state.thread_gone {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// The worker has ended.
    pub fn is_over(&self) -> bool {
        self.lock().end.is_some()
    }

    /// The worker has published.
    pub fn is_completed(&self) -> bool {
        matches!(self.lock().end.as_ref().and_then(|end| end.outcome.as_ref()), Some(v1::finished::Outcome::Completed(_)))
    }

    /// Last counters.
    pub fn progress(&self) -> Progress {
        self.lock().progress
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The table.
#[derive(Default)]
pub struct Table {
    assignments: Mutex<BTreeMap<String, Arc<Assignment>>>,
    logs: Mutex<VecDeque<v1::Log>>,
    /// Wakes the session when there is something to say.
    pub news: Notify,
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Assignment>>> {
        self.assignments.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes an assignment; answers it and the one of the same job that it replaces. `None` when this one is already held.
    pub fn take(&self, job: &str, epoch: u64) -> Option<(Arc<Assignment>, Option<Arc<Assignment>>)> {
        let mut table = self.lock();
        if table.get(job).is_some_and(|held| held.epoch >= epoch) {
            return None;
        }
        let assignment = Arc::new(Assignment {
            job: job.to_owned(),
            epoch,
            stop: Arc::default(),
            cutover: AtomicBool::default(),
            state: Mutex::new(State { stage: "preparing".to_owned(), ..State::default() }),
            changed: Condvar::new(),
        });
        let replaced = table.insert(job.to_owned(), assignment.clone());
        Some((assignment, replaced))
    }

    /// The assignment of a job.
    pub fn get(&self, job: &str) -> Option<Arc<Assignment>> {
        self.lock().get(job).cloned()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Assignment>> {
        self.lock().values().cloned().collect()
    }

    /// Forgets an ended assignment; a running one stays.
    pub fn forget(&self, job: &str, epoch: u64) {
        let mut table = self.lock();
        if table.get(job).is_some_and(|held| held.epoch == epoch && held.lock().end.is_some()) {
            table.remove(job);
        }
    }

    /// Whether any worker's thread still runs.
    pub fn any_running(&self) -> bool {
        self.all().iter().any(|held| !held.lock().thread_gone)
    }

    /// Whether an end is still to be acknowledged.
    pub fn any_unacknowledged(&self) -> bool {
        self.all().iter().any(|held| held.is_over())
    }

    /// Asks every worker to stop.
    pub fn stop_all(&self, stop: Stop) {
        for held in self.all() {
            held.ask_to_stop(stop);
        }
    }

    /// Counters from a worker.
    pub fn progress(&self, held: &Assignment, stage: &str, progress: Progress) {
        let mut state = held.lock();
        if state.stage == stage && state.progress == progress {
            return;
        }
        let stage_changed = state.stage != stage;
        stage.clone_into(&mut state.stage);
        state.progress = progress;
        state.unsent_progress = true;
        drop(state);
        if stage_changed {
            self.news.notify_one();
        }
    }

    /// A line for the job's log.
    pub fn log(&self, held: &Assignment, level: &str, stage: &str, message: String) {
        tracing::debug!(job = held.job, stage, "{message}");
        let line = v1::Log {
            job: held.job.clone(),
            epoch: held.epoch,
            time: shared::clock::rfc3339(shared::clock::now()),
            level: level.to_owned(),
            stage: stage.to_owned(),
            message,
        };
        let mut logs = self.logs.lock().unwrap_or_else(|e| e.into_inner());
        if logs.len() == BACKLOG {
            logs.pop_front();
        }
        logs.push_back(line);
        drop(logs);
        self.news.notify_one();
    }

    /// Asks the controller whether to publish and waits for its answer, over as many sessions as it takes.
    pub fn request_commit(&self, held: &Assignment) -> Grant {
        let mut state = held.lock();
        state.commit = Some(Commit { asked: false, reply: None, footprint: String::new() });
        self.news.notify_one();
        loop {
            if let Some((granted, reason)) = state.commit.as_ref().and_then(|commit| commit.reply.clone()) {
                return if granted { Grant::Yes } else { Grant::No(reason) };
            }
            if let Some(stop) = held.stop() {
                // No answer was seen; if it was granted all the same, the controller gives the job to this agent again.
                state.commit = None;
                return Grant::Stopped(stop);
            }
            state = held.changed.wait_timeout(state, Duration::from_millis(100)).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// The controller's answer.
    pub fn commit_reply(&self, reply: &v1::CommitReply) {
        let Some(held) = self.get(&reply.job).filter(|held| held.epoch == reply.epoch) else { return };
        if let Some(commit) = &mut held.lock().commit {
            commit.reply = Some((reply.granted, reply.reason.clone()));
            commit.footprint.clone_from(&reply.footprint_json);
        }
        held.changed.notify_all();
    }

    /// The worker's last word.
    pub fn end(&self, held: &Assignment, outcome: v1::finished::Outcome) {
        let mut state = held.lock();
        let p = state.progress;
        state.end = Some(v1::Finished {
            job: held.job.clone(),
            epoch: held.epoch,
            data: p.data,
            durable: p.durable,
            verified: p.verified,
            outcome: Some(outcome),
        });
        state.thread_gone = true;
        drop(state);
        held.changed.notify_all();
        self.news.notify_one();
    }

    /// A new session begins: everything that needs an answer is said again.
    pub fn new_session(&self) {
        for held in self.all() {
            let mut state = held.lock();
            state.unsent_progress = true;
            state.end_sent = false;
            if let Some(commit) = &mut state.commit {
                commit.asked = false;
            }
        }
    }

    /// What Hello says: running assignments and unacknowledged ends.
    pub fn hello(&self) -> Vec<v1::Held> {
        self.all().iter().map(|held| v1::Held { job: held.job.clone(), epoch: held.epoch }).collect()
    }

    /// What there is to say now: logs, progress, commit requests, ends, in this order. `with_progress` is set a few times a second.
    pub fn to_say(&self, with_progress: bool) -> Vec<v1::AgentMessage> {
        use v1::agent_message::Kind;
        let mut kinds: Vec<Kind> = self.logs.lock().unwrap_or_else(|e| e.into_inner()).drain(..).map(Kind::Log).collect();
        for held in self.all() {
            let mut state = held.lock();
            let ending = state.end.is_some() || state.commit.is_some();
            if state.unsent_progress && (with_progress || ending) {
                state.unsent_progress = false;
                let p = state.progress;
                kinds.push(Kind::Progress(v1::Progress {
                    job: held.job.clone(),
                    epoch: held.epoch,
                    stage: state.stage.clone(),
                    data: p.data,
                    read: p.read,
                    durable: p.durable,
                    verified: p.verified,
                    resumed: p.resumed,
                }));
            }
            if let Some(commit) = &mut state.commit
                && !commit.asked
                && commit.reply.is_none()
            {
                commit.asked = true;
                kinds.push(Kind::CommitRequest(v1::CommitRequest { job: held.job.clone(), epoch: held.epoch }));
            }
            if !state.end_sent
                && let Some(end) = state.end.clone()
            {
                state.end_sent = true;
                kinds.push(Kind::Finished(end));
            }
        }
        kinds.into_iter().map(|kind| v1::AgentMessage { kind: Some(kind) }).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use v1::agent_message::Kind;

    #[test]
    fn an_end_is_said_in_every_session_until_it_is_acknowledged() {
        let table = Table::default();
        let (held, replaced) = table.take("job-00000001", 1).unwrap();
        assert!(replaced.is_none() && table.take("job-00000001", 1).is_none());
        table.end(&held, v1::finished::Outcome::Parked(true));
        let says_end = |table: &Table| table.to_say(true).iter().any(|m| matches!(m.kind, Some(Kind::Finished(_))));
        assert!(says_end(&table) && !says_end(&table));
        table.new_session();
        assert!(says_end(&table));
        table.forget("job-00000001", 2);
        assert_eq!(table.hello().len(), 1);
        table.forget("job-00000001", 1);
        assert!(table.hello().is_empty());
    }

    #[test]
    fn a_discard_is_not_weakened_by_a_park_and_ends_the_wait_for_a_commit() {
        let table = Table::default();
        let (held, _) = table.take("job-00000001", 3).unwrap();
        held.ask_to_stop(Stop::Discard);
        held.ask_to_stop(Stop::Park);
        assert_eq!(held.stop(), Some(Stop::Discard));
        assert!(matches!(table.request_commit(&held), Grant::Stopped(Stop::Discard)));
    }
}
