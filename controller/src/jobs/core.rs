//! What the Queue actor does with a message: one at a time, the store first, effects after.
//!
//! ```text
//! message ─► step (pure) ─► compare-and-set in the store ─► memory, log, watchers ─► messages to agents ─► dispatch
//! ```
//! Owns: the live jobs, which of them are ready for which agent, what each agent runs, the leases, measured rates.
//! Never: changes a job but by `shared::job::step`; sends anything before the store has committed; writes the store for a progress message.
//! A crash here costs at most five seconds of progress counters: jobs, epochs and grants are in the store.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use proto::v1::controller_message::Kind;
use proto::v1::{Cancel, CommitReply};
use shared::ids::JobId;
use shared::job::{Effect, Event, Hold, Refusal, Stage, State, Status, invariant, step};
use tokio::sync::watch;

use super::batches::{Batches, Picked};
use super::board::Board;
use super::holds;
use super::intake::Draft;
use super::logbook::{Logbook, Seen};
use super::record::{Job, NewJob, now_millis};
use super::reports::Report;
use super::store::{self, Rates, Transition};
use super::view::View;
use crate::http::idempotency::Idempotency;
use crate::store::entities::job_logs::Model as Line;
use crate::store::{Error as StoreError, Store};

/// Jobs that one agent runs at a time.
pub const PER_AGENT: usize = 4;
/// Transitions in one transaction.
const BATCH: usize = 500;

/// Why a job could not be made or moved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such job.
    #[error("no job `{0}`")]
    NotFound(String),
    /// The machine does not allow it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Somebody else changed it at the same moment.
    #[error("the job changed at the same moment; look again")]
    Raced,
    /// Its agent is not connected.
    #[error("agent {0} is not connected")]
    Away(String),
    /// The queue takes no new work.
    #[error("the controller is shutting down")]
    Draining,
    /// The queue is gone.
    #[error("the queue is not running")]
    Gone,
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The way to the agents. Sending never waits.
pub trait Outbox: Send + Sync {
    /// Queues a message for a connected agent; false where it is not connected or does not keep up.
    fn send(&self, agent: &str, message: Kind) -> bool;
    /// When the agent was last heard by this controller.
    fn last_heard(&self, agent: &str) -> Option<Instant>;
    /// The agent's name.
    fn name(&self, agent: &str) -> String;
}

/// Tells the watchers: type of the frame, job, data.
pub type News = Arc<dyn Fn(&'static str, &str, serde_json::Value) + Send + Sync>;

/// What the queue stands on.
#[derive(Clone)]
pub struct Ports {
    /// The truth.
    pub store: Store,
    /// The way to the agents.
    pub outbox: Arc<dyn Outbox>,
    /// The watchers.
    pub news: News,
}

/// A live job with what only memory knows.
pub(super) struct Live {
    pub job: Job,
    /// When it was given out or adopted by this process.
    pub leased: Instant,
    /// When this process gave it out; what is older was not measured from the start.
    pub assigned: Option<Instant>,
    /// When its counters were stored last; `None` while nothing is new.
    pub unsaved_since: Option<Instant>,
}

/// What the queue knows of an agent.
#[derive(Default)]
pub(super) struct Agent {
    /// Its current session; an older one's end says nothing.
    pub session: u64,
    /// Welcome is sent: messages reach it.
    pub connected: bool,
    /// It gets no new work.
    pub draining: bool,
    /// Jobs that are with it.
    pub running: HashSet<String>,
    /// Jobs it could take, best first.
    pub ready: BTreeSet<(Reverse<u8>, i64, String)>,
}

impl Agent {
    fn is_here(&self) -> bool {
        self.connected && !self.draining
    }
}

/// A transition that is worked out and not yet stored.
pub(super) struct Change {
    pub before: State,
    pub after: Job,
    pub effects: Vec<Effect>,
    /// A line for the job's log: level and text.
    pub line: Option<(&'static str, String)>,
}

/// The queue's state.
pub struct Core {
    pub(super) ports: Ports,
    pub(super) jobs: HashMap<String, Live>,
    pub(super) agents: HashMap<String, Agent>,
    pub(super) rates: BTreeMap<String, Rates>,
    pub(super) logs: Logbook,
    pub(super) board: Board,
    /// Reports that came while the store was away, to be taken again in order.
    pub(super) deferred: VecDeque<(String, Report)>,
    pub(super) since: Instant,
    /// Jobs whose commit had no answer, and since when: they may be in the store.
    pub(super) unsure: HashMap<String, Instant>,
    /// Jobs whose last attempt failed a moment ago, and until when they rest.
    pub(super) resting: HashMap<String, Instant>,
    pub(super) dispatch_due: bool,
    pub(super) draining: bool,
    pub(super) batches: Batches,
    per_agent: usize,
}

impl Core {
    /// Reads the live jobs. Those that run keep running: their agents have the lease's time from now to come back.
    pub async fn load(ports: Ports, board: Board, per_agent: usize) -> Result<Self, StoreError> {
        let mut core = Self {
            jobs: HashMap::new(),
            agents: HashMap::new(),
            rates: store::load_rates(&ports.store).await?,
            logs: Logbook::default(),
            board,
            deferred: VecDeque::new(),
            since: Instant::now(),
            unsure: HashMap::new(),
            resting: HashMap::new(),
            dispatch_due: false,
            draining: false,
            batches: Batches::default(),
            per_agent,
            ports,
        };
        core.board.set_counts(store::count_by_status(&core.ports.store).await?);
        for (job, last) in store::last_seqs_of_live(&core.ports.store).await? {
            core.logs.resume_at(&job, last);
        }
        for job in store::load_live(&core.ports.store).await? {
            core.remember(job);
        }
        tracing::info!(live = core.jobs.len(), "queue is loaded");
        Ok(core)
    }

    /// Works out a new job and, with an idempotency key, the answer that is stored with it.
    pub(super) fn draft(&self, new: NewJob, key: Option<Idempotency>) -> Result<Draft, Error> {
        if self.draining {
            return Err(Error::Draining);
        }
        let notes = new.notes.clone();
        let mut job = Job::new(JobId::generate().to_string(), new);
        let rate = self.rates.get(&job.owner).and_then(|rates| rates.get(job.rate_word())).copied().unwrap_or_default();
        job.estimate = match (rate.seconds(job.capacity).filter(|_| job.capacity > 0), job.options.bandwidth_limit) {
            (Some(seconds), Some(limit)) => Some(seconds.max(job.capacity / limit.max(1))),
            (seconds, _) => seconds,
        };
        let now = job.created_at;
        holds::begin(&mut job, now);
        job.state = self.settled(&job, job.state.clone(), now);
        let answer = match key {
            Some(key) => {
                let body = serde_json::to_string(&self.view(&job)).map_err(|e| StoreError::Other(e.to_string()))?;
                Some(key.row(201, &format!("/api/v1/jobs/{}", job.id), body))
            }
            None => None,
        };
        Ok(Draft { job, notes, answer })
    }

    /// A person cancels, retries, pauses or resumes.
    pub async fn person(&mut self, id: &str, event: Event, line: &str) -> Result<Job, Error> {
        let mut job = self.find(id).await?.ok_or_else(|| Error::NotFound(id.to_owned()))?;
        if event == Event::Retry {
            holds::begin(&mut job, now_millis());
        }
        let mut change = self.plan(&job, &event)?;
        if event == Event::Retry {
            if let Some(warm) = change.after.options.warm.as_mut().filter(|warm| warm.now) {
                // Of the attempt that failed: whoever tries again says so again.
                warm.now = false;
                store::save_options(&self.ports.store, &change.after).await?;
            }
            (change.after.error, change.after.error_code, change.after.result, change.after.finished_at) = (None, None, None, None);
            self.logs.reopen(id);
            self.number(id).await?;
        }
        if change.effects.is_empty() {
            return Ok(job);
        }
        change.line = Some(("info", line.to_owned()));
        let after = change.after.clone();
        if !self.commit(vec![change]).await? {
            return Err(Error::Raced);
        }
        self.dispatch().await;
        Ok(after)
    }

    /// A person has a warm migration cut over: that stands until the job is tried again by a person, and its agent is told.
    pub async fn cutover(&mut self, id: &str) -> Result<Job, Error> {
        let job = self.find(id).await?.ok_or_else(|| Error::NotFound(id.to_owned()))?;
        let illegal = || Error::Refused(Refusal::Illegal { stage: job.state.public_stage(), verb: "cut over" });
        let mut job = job.clone();
        let is_open = matches!(job.state.status, Status::Queued | Status::Running) && job.state.stage != Stage::Publishing;
        let warm = job.options.warm.as_mut().filter(|_| is_open);
        warm.ok_or_else(illegal)?.now = true;
        // The word stands: an agent that is lost before it has acted on it is told again with its next assignment.
        if !store::save_options(&self.ports.store, &job).await? {
            self.reload(&job.id).await?;
            return Err(illegal());
        }
        if self.jobs.contains_key(&job.id) {
            self.remember(job.clone());
        }
        if let Some(agent) = job.state.agent.clone().filter(|_| job.state.status == Status::Running) {
            // One that is away hears it when it comes back.
            self.ports.outbox.send(&agent, cutover(&job));
        }
        Ok(job)
    }

    /// Follows a job's log.
    pub async fn follow(&mut self, id: &str) -> Result<watch::Receiver<Seen>, Error> {
        let ended = match self.jobs.get(id) {
            Some(_) => false,
            None => store::load(&self.ports.store, id).await?.ok_or_else(|| Error::NotFound(id.to_owned()))?.state.status.is_final(),
        };
        let receiver = self.logs.follow(id, ended);
        self.logs.flush(&self.ports.store).await?;
        Ok(receiver)
    }

    /// A job from memory, else from the store.
    pub(super) async fn find(&self, id: &str) -> Result<Option<Job>, StoreError> {
        match self.jobs.get(id) {
            Some(live) => Ok(Some(live.job.clone())),
            None => store::load(&self.ports.store, id).await,
        }
    }

    /// Works out one transition. What goes back into the queue before its time, or while its agent is away, waits.
    pub(super) fn plan(&self, job: &Job, event: &Event) -> Result<Change, Refusal> {
        let (mut next, mut effects) = step(&job.state, event)?;
        let mut after = job.clone();
        let now = now_millis();
        holds::follow(&mut after, &job.state, &next, event, now);
        if !matches!(event, Event::AgentHere(_)) {
            next = self.settled(&after, next, now);
        }
        debug_assert_eq!(invariant(&next), Ok(()), "after {event:?}");
        after.updated_at = now;
        if matches!(event, Event::Assign { .. }) {
            after.started_at.get_or_insert(now);
            let data = after.counters.data;
            if job.state.is_granted() {
                // All of it is synced and proven, else it would not have been granted; only the rename is open.
                after.counters = shared::progress::Progress { read: 0, resumed: data, ..after.counters };
            } else {
                // What is on the disk already, the agent says again with its first report.
                after.counters = shared::progress::Progress { data, ..Default::default() };
                after.shown = 0;
            }
            after.speed = super::record::Speed::default();
        }
        if next.status.is_final() && !job.state.status.is_final() {
            after.finished_at = Some(now);
        }
        if next == job.state {
            effects.retain(|effect| *effect != Effect::Announce);
        }
        after.state = next;
        Ok(Change { before: job.state.clone(), after, effects, line: None })
    }

    /// Stores changes and then carries out their effects. Answers whether every one of them held.
    pub(super) async fn commit(&mut self, changes: Vec<Change>) -> Result<bool, StoreError> {
        let mut all = true;
        let mut changes = VecDeque::from(changes);
        while !changes.is_empty() {
            let batch: Vec<Change> = changes.drain(..changes.len().min(BATCH)).collect();
            // A message that comes again changes nothing: no need to store that.
            let moved: Vec<Transition> = batch
                .iter()
                .filter(|change| change.before != change.after.state)
                .map(|change| Transition { before: change.before.clone(), after: change.after.clone() })
                .collect();
            let mut held = if moved.is_empty() { Vec::new() } else { store::commit(&self.ports.store, &moved).await? }.into_iter();
            for change in batch {
                if change.before == change.after.state || held.next() == Some(true) {
                    self.apply(change);
                } else {
                    all = false;
                    self.reload(&change.after.id).await?;
                }
            }
        }
        Ok(all)
    }

    fn apply(&mut self, change: Change) {
        let Change { before, after, effects, line } = change;
        self.board.count(Some(before.status), Some(after.state.status));
        if let Some((level, text)) = line {
            self.write(&after, level, &text);
        }
        self.remember(after.clone());
        for effect in effects {
            self.carry_out(&after, effect);
        }
    }

    fn carry_out(&mut self, job: &Job, effect: Effect) {
        let agent = job.state.agent.clone().unwrap_or_default();
        match effect {
            Effect::SendAssign => {
                let now = Instant::now();
                if let Some(live) = self.jobs.get_mut(&job.id) {
                    (live.leased, live.assigned) = (now, Some(now));
                }
                if !self.ports.outbox.send(&agent, Kind::Assign(job.to_assign())) {
                    // Its session is ending; the next Hello comes without the job, and then it is given out again.
                    tracing::warn!(job = job.id, agent, "assignment could not be sent");
                }
            }
            Effect::SendCancel if agent.is_empty() => {}
            Effect::SendCancel => {
                let epoch = if job.state.status == Status::Cancelled { 0 } else { job.state.epoch };
                self.stop(&agent, &job.id, epoch, true, "cancelled");
            }
            Effect::SendPark => self.stop(&agent, &job.id, job.state.epoch, false, job.state.public_stage()),
            Effect::GrantCommit => {
                let footprint = job.carbon.as_ref().and_then(|carbon| carbon.shown(now_millis()));
                let footprint_json = footprint.and_then(|shown| serde_json::to_string(&shown).ok()).unwrap_or_default();
                let reply =
                    CommitReply { job: job.id.clone(), epoch: job.state.epoch, granted: true, reason: String::new(), footprint_json };
                self.ports.outbox.send(&agent, Kind::CommitReply(reply));
            }
            Effect::Acknowledge => self.acknowledge(&agent, &job.id, job.state.epoch),
            Effect::Dispatch => self.dispatch_due = true,
            Effect::Announce => self.announce(job),
        }
    }

    pub(super) fn stop(&self, agent: &str, job: &str, epoch: u64, discard: bool, reason: &str) {
        self.ports.outbox.send(agent, Kind::Cancel(Cancel { job: job.to_owned(), epoch, discard, reason: reason.to_owned() }));
    }

    pub(super) fn acknowledge(&self, agent: &str, job: &str, epoch: u64) {
        self.ports.outbox.send(agent, Kind::Acknowledge(proto::v1::Acknowledge { job: job.to_owned(), epoch }));
    }

    /// Gives ready jobs to agents with room, best first. While the store is away it stays due.
    pub(super) async fn dispatch(&mut self) {
        // Each round gives at least one job away or ends; the count only guards against a defect.
        for _ in 0..10_000 {
            if !self.dispatch_due || self.draining {
                return;
            }
            let changes = self.pick();
            if changes.is_empty() {
                self.dispatch_due = false;
                return;
            }
            if let Err(error) = self.commit(changes).await {
                tracing::warn!(%error, "work could not be given out; trying again in a second");
                return;
            }
        }
    }

    fn pick(&self) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut picked = Picked::default();
        for (id, agent) in self.agents.iter().filter(|(_, agent)| agent.is_here()) {
            let room = self.per_agent.saturating_sub(agent.running.len());
            let rested = agent.ready.iter().filter(|(_, _, job)| !self.resting.contains_key(job));
            let live = rested.filter_map(|(_, _, job)| self.jobs.get(job));
            for live in live.filter(|live| self.batches.admits(&live.job, &mut picked)).take(room) {
                let Ok(mut change) = self.plan(&live.job, &Event::Assign { agent: id.clone() }) else { continue };
                let name = self.ports.outbox.name(id);
                change.line = Some(("info", format!("attempt {} begins at agent {name}", change.after.state.attempt)));
                changes.push(change);
            }
        }
        changes
    }

    pub(super) fn is_here(&self, agent: &str) -> bool {
        self.agents.get(agent).is_some_and(Agent::is_here)
    }

    /// Puts a job where its state belongs: memory and indexes while it is live, nowhere after.
    pub(super) fn remember(&mut self, job: Job) {
        self.batches.note(&job);
        let key = (Reverse(job.priority), job.created_at, job.id.clone());
        self.agents.entry(job.owner.clone()).or_default().ready.remove(&key);
        if let Some(before) = self.jobs.get(&job.id).and_then(|live| live.job.state.agent.clone())
            && let Some(agent) = self.agents.get_mut(&before)
        {
            agent.running.remove(&job.id);
        }
        if job.state.status.is_final() {
            self.jobs.remove(&job.id);
            self.board.remove(&job.id);
            self.logs.end(&job.id);
            return;
        }
        match (&job.state.status, &job.state.agent) {
            (Status::Queued, _) if job.state.hold == Hold::None => {
                self.agents.entry(job.owner.clone()).or_default().ready.insert(key);
            }
            (Status::Running | Status::Cancelling, Some(agent)) => {
                self.agents.entry(agent.clone()).or_default().running.insert(job.id.clone());
            }
            _ => {}
        }
        self.board.put(&job);
        match self.jobs.get_mut(&job.id) {
            Some(live) => {
                live.unsaved_since = None;
                live.job = job;
            }
            None => {
                let live = Live { leased: self.since, assigned: None, unsaved_since: None, job };
                self.jobs.insert(live.job.id.clone(), live);
            }
        }
    }

    /// Somebody else changed it: take what the store says.
    pub(super) async fn reload(&mut self, id: &str) -> Result<(), StoreError> {
        tracing::warn!(job = id, "another controller changed this job");
        match store::load(&self.ports.store, id).await? {
            Some(job) => {
                self.number(id).await?;
                self.remember(job);
            }
            None => {
                self.jobs.remove(id);
                self.board.remove(id);
            }
        }
        Ok(())
    }

    /// Makes sure that the next line of this job's log gets the right number.
    pub(super) async fn number(&mut self, job: &str) -> Result<(), StoreError> {
        if !self.logs.knows(job) {
            let last = store::last_seq(&self.ports.store, job).await?;
            self.logs.resume_at(job, last);
        }
        Ok(())
    }

    /// A line of the queue's own in a job's log.
    pub(super) fn write(&mut self, job: &Job, level: &str, text: &str) {
        self.write_at(&job.id, None, level, job.state.public_stage(), text);
    }

    pub(super) fn write_at(&mut self, job: &str, time: Option<i64>, level: &str, stage: &str, text: &str) {
        let Some(line) = self.logs.write(job, time, level, stage, text) else { return };
        self.tell_line(&line);
    }

    /// Tells the watchers a line of a log.
    pub(super) fn tell_line(&self, line: &Line) {
        let data = serde_json::json!({
            "job": line.job, "seq": line.seq, "time": super::view::time(line.time), "level": line.level, "stage": line.stage, "message": line.message,
        });
        (self.ports.news)("job.log", &line.job, data);
    }

    pub(super) fn view(&self, job: &Job) -> View {
        View::of(job, |agent| self.ports.outbox.name(agent))
    }

    pub(super) fn tell(&self, kind: &'static str, job: &Job) {
        match serde_json::to_value(self.view(job)) {
            Ok(data) => (self.ports.news)(kind, &job.id, data),
            Err(error) => tracing::error!(%error, job = job.id, "a job cannot be shown"),
        }
    }

    fn announce(&self, job: &Job) {
        let kind = match job.state.status {
            Status::Completed => "job.completed",
            Status::Failed => "job.failed",
            Status::Cancelled => "job.cancelled",
            Status::Queued | Status::Running | Status::Cancelling => "job.progress",
        };
        self.tell(kind, job);
    }
}

/// Tells the agent of a warm migration to cut over.
pub(super) fn cutover(job: &Job) -> Kind {
    Kind::Cutover(proto::v1::Cutover { job: job.id.clone(), epoch: job.state.epoch })
}
