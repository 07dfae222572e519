//! New jobs on their way into the store, many in one transaction.
//!
//! ```text
//! POST /jobs ─► waiting ─┐
//! POST /jobs ─► waiting ─┼─► the queue takes all that wait ─► one commit ─► 201, 201, 201
//! POST /jobs ─► waiting ─┘    (while it commits, the next ones gather)
//! ```
//! Owns: what waits, and the commit. A job, its idempotency key's answer and the first lines of its log are one transaction.
//! Never: answers before the commit; lets one request's conflict fail another's. Each is then tried alone.
//! A commit whose answer is lost may have come about: its requesters are told that it failed, and the jobs are looked for until the store
//! says of each whether it is there.
//! A crash here costs what was not answered.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::core::{Core, Error};
use super::record::{Job, NewJob};
use super::store;
use crate::http::idempotency::Idempotency;
use crate::store::Error as StoreError;
use crate::store::entities::{idempotency, job_logs};

/// How long after its answer was lost a commit may still come about; a statement takes no longer than 15 s.
const DOUBT: Duration = Duration::from_secs(60);
/// Jobs that are looked for at a time.
const LOOK: usize = 500;

/// A request that waits for its job to be in the store.
pub struct Waiting {
    new: NewJob,
    key: Option<Idempotency>,
    tell: oneshot::Sender<Result<Job, Error>>,
}

/// What waits. Cheap to clone.
#[derive(Clone, Default)]
pub struct Intake(Arc<Mutex<Vec<Waiting>>>);

impl Intake {
    /// Puts a request in; whether it is the first, for whom the queue must be called, and where its answer comes.
    pub fn push(&self, new: NewJob, key: Option<Idempotency>) -> (bool, oneshot::Receiver<Result<Job, Error>>) {
        let (tell, answer) = oneshot::channel();
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push(Waiting { new, key, tell });
        (waiting.len() == 1, answer)
    }

    /// Takes all that wait.
    pub fn take(&self) -> Vec<Waiting> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A job that is worked out and not yet stored.
pub(super) struct Draft {
    pub job: Job,
    /// What was accepted but does nothing here.
    pub notes: Vec<String>,
    /// The answer that goes with its idempotency key.
    pub answer: Option<idempotency::ActiveModel>,
}

/// A draft with its log's first lines and who waits for it.
struct Entry {
    row: store::NewRow,
    tell: oneshot::Sender<Result<Job, Error>>,
}

impl Core {
    /// Takes one new job. When this returns, it is in the store. With an idempotency key, the answer goes with it.
    pub async fn submit(&mut self, new: NewJob, key: Option<Idempotency>) -> Result<Job, Error> {
        let intake = Intake::default();
        let (_, answer) = intake.push(new, key);
        self.take_in(intake.take()).await;
        answer.await.map_err(|_| Error::Gone)?
    }

    /// Takes new jobs, in one transaction; each requester is answered when it is committed.
    pub async fn take_in(&mut self, waiting: Vec<Waiting>) {
        let mut entries = Vec::with_capacity(waiting.len());
        for Waiting { new, key, tell } in waiting {
            match self.draft(new, key) {
                Ok(draft) => entries.push(Entry { row: self.with_lines(draft), tell }),
                Err(error) => drop(tell.send(Err(error))),
            }
        }
        if entries.is_empty() {
            return;
        }
        let (rows, tells): (Vec<_>, Vec<_>) = entries.into_iter().map(|entry| (entry.row, entry.tell)).unzip();
        match store::insert_all(&self.ports.store, &rows).await {
            Err(StoreError::Conflict(_)) if rows.len() > 1 => {
                for (row, tell) in rows.into_iter().zip(tells) {
                    let stored = store::insert_all(&self.ports.store, std::slice::from_ref(&row)).await;
                    self.admit(row, tell, stored);
                }
            }
            stored => rows.into_iter().zip(tells).for_each(|(row, tell)| self.admit(row, tell, stored.clone())),
        }
        self.dispatch_due = true;
        self.dispatch().await;
    }

    pub(super) fn with_lines(&mut self, draft: Draft) -> store::NewRow {
        let Draft { job, notes, answer } = draft;
        let queued = ("info", format!("{} of {} into {} is queued", job.kind, job.subject(), job.format));
        let lines = std::iter::once(queued).chain(notes.into_iter().map(|note| ("warn", note)));
        let lines = self.logs.begin(&job.id, job.state.public_stage(), lines);
        store::NewRow { job, answer, lines }
    }

    /// A job is stored, or is not: memory, watchers and the requester learn it.
    pub(super) fn admit(&mut self, row: store::NewRow, tell: oneshot::Sender<Result<Job, Error>>, stored: Result<(), StoreError>) {
        // Who asked may have gone; the job stands all the same.
        let _ = match stored {
            Ok(()) => tell.send(Ok(self.enter(row))),
            Err(error) => {
                self.doubt(&row.job.id, &error);
                tell.send(Err(error.into()))
            }
        };
    }

    /// A job whose commit failed is forgotten; where it may have come about all the same, it is looked for.
    pub(super) fn doubt(&mut self, job: &str, error: &StoreError) {
        self.logs.forget(job);
        if !matches!(error, StoreError::Conflict(_)) {
            self.unsure.insert(job.to_owned(), Instant::now());
        }
    }

    /// Looks for the jobs whose commit may have come about. Each is looked for until a read finds it, or finds that it is not there and
    /// will not be.
    pub(super) async fn look_for_unsure(&mut self, now: Instant) -> Result<(), StoreError> {
        if self.unsure.is_empty() {
            return Ok(());
        }
        let all: Vec<(String, Instant)> = self.unsure.iter().map(|(id, since)| (id.clone(), *since)).collect();
        let mut owners = BTreeSet::new();
        for some in all.chunks(LOOK) {
            let ids = some.iter().map(|(id, _)| id.clone()).collect();
            let mut found: HashMap<String, Job> =
                store::load_many(&self.ports.store, ids).await?.into_iter().map(|job| (job.id.clone(), job)).collect();
            for (id, since) in some {
                match found.remove(id) {
                    Some(job) => drop(owners.insert(self.adopt(job).await?)),
                    None if now.saturating_duration_since(*since) < DOUBT => continue,
                    None => {}
                }
                self.unsure.remove(id);
            }
        }
        if owners.is_empty() {
            return Ok(());
        }
        self.board.set_counts(store::count_by_status(&self.ports.store).await?);
        for owner in owners {
            self.settle(&owner).await?;
        }
        Ok(())
    }

    /// Takes a job that is in the store although nobody said so; answers whose it is.
    async fn adopt(&mut self, job: Job) -> Result<String, StoreError> {
        // Somebody may have cancelled it by then.
        if self.jobs.contains_key(&job.id) || job.state.status.is_final() {
            return Ok(job.owner);
        }
        tracing::warn!(job = job.id, "a job is there whose commit had no answer");
        self.number(&job.id).await?;
        self.tell("job.created", &job);
        let owner = job.owner.clone();
        self.remember(job);
        Ok(owner)
    }

    /// A job is stored: memory and watchers learn it.
    pub(super) fn enter(&mut self, row: store::NewRow) -> Job {
        let store::NewRow { job, lines, .. } = row;
        self.board.count(None, Some(job.state.status));
        lines.iter().for_each(|line: &job_logs::Model| self.tell_line(line));
        self.tell("job.created", &job);
        self.remember(job.clone());
        job
    }
}
