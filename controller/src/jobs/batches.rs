//! Jobs that are made together, and how many of them run at once.
//!
//! ```text
//! POST /jobs/batch ─► one transaction for all of them ─► ready ─► pick: admitted while fewer than `limit` of the batch are with agents
//! ```
//! Owns: the count of a batch's jobs that are with agents. It is an index over the live jobs: id and limit of the batch lie in each row, so a
//! restart finds them again. Never: changes a job. A crash here costs nothing.

use std::collections::{HashMap, HashSet};

use shared::job::Status;

use super::core::{Core, Error};
use super::record::{Batch, Job, NewJob};
use super::store;
use super::view::View;
use crate::store::Error as StoreError;
use crate::store::entities::idempotency;

/// Makes, of the jobs as they are shown, the answer to give again where there is a key; it is stored together with them.
pub type Answer = Box<dyn FnOnce(&[View]) -> Result<Option<idempotency::ActiveModel>, StoreError> + Send>;

/// How many of each batch this round has taken so far.
pub(super) type Picked = HashMap<String, usize>;

/// Which jobs of each batch are with agents.
#[derive(Default)]
pub(super) struct Batches(HashMap<String, HashSet<String>>);

impl Batches {
    /// Takes a job's newest state.
    pub(super) fn note(&mut self, job: &Job) {
        let Some(batch) = &job.batch else { return };
        if matches!(job.state.status, Status::Running | Status::Cancelling) {
            self.0.entry(batch.id.clone()).or_default().insert(job.id.clone());
        } else if let Some(running) = self.0.get_mut(&batch.id) {
            running.remove(&job.id);
            if running.is_empty() {
                self.0.remove(&batch.id);
            }
        }
    }

    /// Whether a ready job may begin beside those of its batch that run and those that were picked; if so it counts as picked.
    pub(super) fn admits(&self, job: &Job, picked: &mut Picked) -> bool {
        let Some(Batch { id, limit: Some(limit) }) = &job.batch else { return true };
        let begun = picked.get(id).copied().unwrap_or(0);
        let running = self.0.get(id).map_or(0, HashSet::len);
        if running + begun >= usize::try_from(*limit).unwrap_or(usize::MAX) {
            return false;
        }
        picked.insert(id.clone(), begun + 1);
        true
    }
}

impl Core {
    /// Takes new jobs, all or none. When this returns, they are in the store, and the answer to give again with them.
    pub async fn submit_all(&mut self, new: Vec<NewJob>, batch: Option<Batch>, answer: Option<Answer>) -> Result<Vec<Job>, Error> {
        let mut drafts = new.into_iter().map(|new| self.draft(new, None)).collect::<Result<Vec<_>, _>>()?;
        for (n, draft) in drafts.iter_mut().enumerate() {
            draft.job.batch.clone_from(&batch);
            // Equal times would leave the order in a batch to the ids.
            draft.job.created_at += i64::try_from(n).unwrap_or(0);
        }
        let answer = match answer {
            Some(answer) => answer(&drafts.iter().map(|draft| self.view(&draft.job)).collect::<Vec<_>>())?,
            None => None,
        };
        let mut rows: Vec<store::NewRow> = drafts.into_iter().map(|draft| self.with_lines(draft)).collect();
        if let Some(first) = rows.first_mut() {
            first.answer = answer;
        }
        if let Err(error) = store::insert_all(&self.ports.store, &rows).await {
            rows.iter().for_each(|row| self.doubt(&row.job.id, &error));
            return Err(error.into());
        }
        let jobs = rows.into_iter().map(|row| self.enter(row)).collect();
        self.dispatch_due = true;
        self.dispatch().await;
        Ok(jobs)
    }
}
