//! Rows of jobs and their logs.
//!
//! Owns: every query on `jobs` and `job_logs` but those of the list ([`super::lists`]), and the measured rates in `agents.rates`. A transition is a compare-and-set on
//! (id, epoch, status, hold): where another controller was quicker, it does nothing and says so.
//! Never: decides a transition. A crash here costs nothing: each call is one transaction.

use std::collections::BTreeMap;

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, OnConflict};
use sea_orm::{ColumnTrait, Condition, EntityTrait, FromQueryResult, QueryFilter, QueryOrder, QuerySelect, TransactionTrait};
use serde::{Deserialize, Serialize};
use shared::job::{State, Status};
use shared::options::JobType;

use super::record::{Job, stored};
use crate::store::entities::{agents, idempotency, job_logs, jobs};
use crate::store::{Error, Store};

/// Statuses of jobs that the queue keeps in memory.
const LIVE: [Status; 3] = [Status::Queued, Status::Running, Status::Cancelling];

/// Jobs with files that are read at a time.
const FILES: u64 = 1000;

/// A transition to store: from which state, to which job.
pub struct Transition {
    /// What the store must still hold.
    pub before: State,
    /// What it shall hold.
    pub after: Job,
}

/// Speed of finished jobs at one agent into one format, exponentially weighted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Bytes of capacity a second, verification included.
    pub capacity: f64,
    /// Bytes of data a second, verification included.
    pub data: f64,
    /// Jobs that were measured.
    pub samples: u64,
}

impl Rate {
    /// Takes one more finished job; the first counts whole.
    pub fn note(&mut self, capacity: u64, data: u64, seconds: f64) {
        if seconds <= 0.0 {
            return;
        }
        let weight = if self.samples == 0 { 1.0 } else { 0.3 };
        self.capacity += weight * (capacity as f64 / seconds - self.capacity);
        self.data += weight * (data as f64 / seconds - self.data);
        self.samples += 1;
    }

    /// Seconds for so much data; `None` before any measurement.
    pub fn seconds_of_data(&self, data: u64) -> Option<u64> {
        (self.samples > 0 && self.data > 0.0).then(|| (data as f64 / self.data).ceil() as u64)
    }

    /// Seconds for a disk of this capacity; `None` before any measurement.
    pub fn seconds(&self, capacity: u64) -> Option<u64> {
        (self.samples > 0 && self.capacity > 0.0).then(|| (capacity as f64 / self.capacity).ceil() as u64)
    }
}

/// Rates of one agent by output format.
pub type Rates = BTreeMap<String, Rate>;

/// What `GET /jobs` filters by.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Statuses as stored.
    pub status: Vec<Status>,
    /// Connection name or kind.
    pub provider: Option<String>,
    /// Job type.
    pub kind: Option<String>,
    /// Milliseconds since 1970, exclusive.
    pub created_after: Option<i64>,
    /// Milliseconds since 1970, exclusive.
    pub created_before: Option<i64>,
    /// Part of the VM's name or the job's id.
    pub search: Option<String>,
}

/// What it sorts by.
#[derive(Clone, Copy, Debug)]
pub enum SortBy {
    /// Time of making.
    Created,
    /// Time of the last change.
    Updated,
    /// VM name, without regard to case.
    VmName,
    /// Status word.
    Status,
    /// Priority.
    Priority,
}

/// Every job that is not final.
pub async fn load_live(store: &Store) -> Result<Vec<Job>, Error> {
    let live = LIVE.map(Status::word);
    let rows =
        store.read(move |db| async move { Ok(jobs::Entity::find().filter(jobs::Column::Status.is_in(live)).all(&db).await?) }).await?;
    Ok(rows.into_iter().filter_map(readable).collect())
}

/// One job.
pub async fn load(store: &Store, id: &str) -> Result<Option<Job>, Error> {
    let id = id.to_owned();
    let row = store.read(move |db| async move { Ok(jobs::Entity::find_by_id(id).one(&db).await?) }).await?;
    Ok(row.and_then(readable))
}

/// A job that is not final and reads one of these sources.
pub async fn live_by_source(store: &Store, sources: Vec<String>) -> Result<Option<String>, Error> {
    let sources = sources.into_iter().filter(|source| !source.is_empty());
    let find = jobs::Entity::find()
        .filter(jobs::Column::Status.is_in(LIVE.map(Status::word)))
        .filter(jobs::Column::Source.is_in(sources))
        .select_only()
        .column(jobs::Column::Id)
        .limit(1)
        .into_tuple();
    store.read(move |db| async move { Ok(find.one(&db).await?) }).await
}

/// Several jobs by id.
pub async fn load_many(store: &Store, ids: Vec<String>) -> Result<Vec<Job>, Error> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let rows = store.read(move |db| async move { Ok(jobs::Entity::find().filter(jobs::Column::Id.is_in(ids)).all(&db).await?) }).await?;
    Ok(rows.into_iter().filter_map(readable).collect())
}

pub(super) fn readable(row: jobs::Model) -> Option<Job> {
    let id = row.id.clone();
    let job = Job::from_row(row);
    if job.is_none() {
        tracing::error!(job = id, "the row of a job holds words of another version; it is left alone");
    }
    job
}

/// A new job with what is stored beside it.
pub struct NewRow {
    /// The job.
    pub job: Job,
    /// Where its request had an Idempotency-Key: the answer to give again.
    pub answer: Option<idempotency::ActiveModel>,
    /// The first lines of its log.
    pub lines: Vec<job_logs::Model>,
}

/// Inserts new jobs in one transaction: all or none.
pub async fn insert_all(store: &Store, new: &[NewRow]) -> Result<(), Error> {
    let rows: Vec<_> = new.iter().map(|new| new.job.to_row()).collect();
    let answers: Vec<_> = new.iter().filter_map(|new| new.answer.clone()).collect();
    let lines: Vec<_> = new.iter().flat_map(|new| new.lines.iter().cloned().map(log_row)).collect();
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            if !answers.is_empty() {
                idempotency::Entity::insert_many(answers).exec_without_returning(&transaction).await?;
            }
            // SQLite takes 32,766 parameters in a statement; a job has about forty.
            for rows in rows.chunks(200) {
                jobs::Entity::insert_many(rows.to_vec()).exec_without_returning(&transaction).await?;
            }
            for lines in lines.chunks(1000) {
                job_logs::Entity::insert_many(lines.to_vec()).exec_without_returning(&transaction).await?;
            }
            Ok(transaction.commit().await?)
        })
        .await
}

/// Stores transitions in one transaction. For each: whether the store still held what it came from.
pub async fn commit(store: &Store, transitions: &[Transition]) -> Result<Vec<bool>, Error> {
    let updates: Vec<_> = transitions
        .iter()
        .map(|transition| (transition.after.id.clone(), transition.before.clone(), transition.after.to_changes()))
        .collect();
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            let mut held = Vec::with_capacity(updates.len());
            for (id, before, changes) in updates {
                let update = jobs::Entity::update_many().set(changes).filter(still(&id, &before));
                held.push(update.exec(&transaction).await?.rows_affected == 1);
            }
            transaction.commit().await?;
            Ok(held)
        })
        .await
}

/// That the store still holds a job in this state.
fn still(id: &str, state: &State) -> Condition {
    Condition::all()
        .add(jobs::Column::Id.eq(id))
        .add(jobs::Column::Epoch.eq(stored(state.epoch)))
        .add(jobs::Column::Status.eq(state.status.word()))
        .add(jobs::Column::Hold.eq(state.hold.word()))
}

/// Changes what is said of a finished job's output.
pub async fn save_result(store: &Store, id: &str, result: &serde_json::Value) -> Result<(), Error> {
    let text = result.to_string();
    let update = jobs::Entity::update_many()
        .col_expr(jobs::Column::Result, Expr::value(Some(text)))
        .filter(jobs::Column::Id.eq(id))
        .filter(jobs::Column::Status.is_in([Status::Completed.word(), Status::Failed.word()]));
    store.run(move |db| async move { Ok(update.exec(&db).await.map(drop)?) }).await
}

/// Completed jobs of these types at these agents that ended before a time (milliseconds since 1970) and whose result does not hold the field
/// `without`; the oldest first, 1,000 at most, behind the job (end, id) where one is given.
pub async fn with_files(
    store: &Store,
    kinds: &[JobType],
    agents: Vec<String>,
    before: i64,
    behind: Option<(i64, String)>,
    without: &str,
) -> Result<Vec<Job>, Error> {
    if agents.is_empty() {
        return Ok(Vec::new());
    }
    let mut find = jobs::Entity::find()
        .filter(jobs::Column::Status.eq(Status::Completed.word()))
        .filter(jobs::Column::Kind.is_in(kinds.iter().map(|kind| kind.word())))
        .filter(jobs::Column::Agent.is_in(agents))
        .filter(jobs::Column::FinishedAt.lt(before))
        .filter(jobs::Column::Result.is_not_null())
        .filter(jobs::Column::Result.not_like(format!("%\"{without}\"%")))
        .order_by_asc(jobs::Column::FinishedAt)
        .order_by_asc(jobs::Column::Id)
        .limit(FILES);
    if let Some((finished, id)) = behind {
        let later = Condition::all().add(jobs::Column::FinishedAt.eq(finished)).add(jobs::Column::Id.gt(id));
        find = find.filter(Condition::any().add(jobs::Column::FinishedAt.gt(finished)).add(later));
    }
    let rows = store.read(move |db| async move { Ok(find.all(&db).await?) }).await?;
    Ok(rows.into_iter().filter_map(readable).collect())
}

/// Stores the counters of running jobs; a job whose assignment is over keeps what it has.
pub async fn save_counters(store: &Store, jobs_now: &[Job]) -> Result<(), Error> {
    let updates: Vec<_> = jobs_now.iter().map(|job| (job.id.clone(), job.state.epoch, job.to_counters())).collect();
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            for (id, epoch, counters) in updates {
                let update =
                    jobs::Entity::update_many().set(counters).filter(jobs::Column::Id.eq(id)).filter(jobs::Column::Epoch.eq(stored(epoch)));
                update.exec(&transaction).await?;
            }
            Ok(transaction.commit().await?)
        })
        .await
}

/// Stores what changed of a job beside its state. Whether the store still held that state.
pub async fn save_hold(store: &Store, job: &Job) -> Result<bool, Error> {
    let update = jobs::Entity::update_many().set(job.to_holds()).filter(still(&job.id, &job.state));
    store.run(move |db| async move { Ok(update.exec(&db).await?.rows_affected == 1) }).await
}

/// Stores a live job's options, whose state stays. False where that is another by now.
pub async fn save_options(store: &Store, job: &Job) -> Result<bool, Error> {
    let row = jobs::ActiveModel { options: Set(serde_json::to_string(&job.options).unwrap_or_default()), ..Default::default() };
    let update = jobs::Entity::update_many().set(row).filter(still(&job.id, &job.state));
    store.run(move |db| async move { Ok(update.exec(&db).await?.rows_affected == 1) }).await
}

#[derive(FromQueryResult)]
struct StatusCount {
    status: String,
    count: i64,
}

/// Number of jobs in each stored status.
pub async fn count_by_status(store: &Store) -> Result<BTreeMap<Status, u64>, Error> {
    let rows = store
        .read(|db| async move {
            let select = jobs::Entity::find().select_only().column(jobs::Column::Status).column_as(jobs::Column::Id.count(), "count");
            Ok(select.group_by(jobs::Column::Status).into_model::<StatusCount>().all(&db).await?)
        })
        .await?;
    Ok(rows.into_iter().filter_map(|row| Some((Status::from_word(&row.status)?, u64::try_from(row.count).unwrap_or(0)))).collect())
}

/// Appends lines.
pub async fn append_logs(store: &Store, lines: Vec<job_logs::Model>) -> Result<(), Error> {
    let rows: Vec<_> = lines.into_iter().map(log_row).collect();
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            // SQLite takes 32,766 parameters in a statement; a line has six. A line that is there already came in a commit whose
            // answer was lost.
            for rows in rows.chunks(1000) {
                let twice = OnConflict::columns([job_logs::Column::Job, job_logs::Column::Seq]).do_nothing().to_owned();
                job_logs::Entity::insert_many(rows.to_vec()).on_conflict(twice).exec_without_returning(&transaction).await?;
            }
            Ok(transaction.commit().await?)
        })
        .await
}

fn log_row(line: job_logs::Model) -> job_logs::ActiveModel {
    job_logs::ActiveModel {
        job: Set(line.job),
        seq: Set(line.seq),
        time: Set(line.time),
        level: Set(line.level),
        stage: Set(line.stage),
        message: Set(line.message),
    }
}

/// Lines of a job after `seq`, in order.
pub async fn logs_after(store: &Store, job: &str, seq: i64, limit: u64) -> Result<Vec<job_logs::Model>, Error> {
    let find = job_logs::Entity::find().filter(job_logs::Column::Job.eq(job)).filter(job_logs::Column::Seq.gt(seq));
    store.read(move |db| async move { Ok(find.order_by_asc(job_logs::Column::Seq).limit(limit).all(&db).await?) }).await
}

/// The last line's number of a job; 0 where it has none.
pub async fn last_seq(store: &Store, job: &str) -> Result<i64, Error> {
    let find = job_logs::Entity::find().filter(job_logs::Column::Job.eq(job)).order_by_desc(job_logs::Column::Seq);
    let last = store.read(move |db| async move { Ok(find.one(&db).await?) }).await?;
    Ok(last.map_or(0, |line| line.seq))
}

#[derive(FromQueryResult)]
struct LastSeq {
    job: String,
    last: i64,
}

/// The last line's number of every live job that has lines.
pub async fn last_seqs_of_live(store: &Store) -> Result<Vec<(String, i64)>, Error> {
    let live = sea_orm::sea_query::Query::select()
        .column(jobs::Column::Id)
        .from(jobs::Entity)
        .and_where(jobs::Column::Status.is_in(LIVE.map(Status::word)))
        .to_owned();
    let select = job_logs::Entity::find()
        .select_only()
        .column(job_logs::Column::Job)
        .column_as(job_logs::Column::Seq.max(), "last")
        .filter(job_logs::Column::Job.in_subquery(live))
        .group_by(job_logs::Column::Job);
    let rows = store.read(move |db| async move { Ok(select.into_model::<LastSeq>().all(&db).await?) }).await?;
    Ok(rows.into_iter().map(|row| (row.job, row.last)).collect())
}

/// Measured rates of every agent.
pub async fn load_rates(store: &Store) -> Result<BTreeMap<String, Rates>, Error> {
    let rows = store.read(|db| async move { Ok(agents::Entity::find().all(&db).await?) }).await?;
    Ok(rows.into_iter().map(|row| (row.id, serde_json::from_str(&row.rates).unwrap_or_default())).collect())
}

/// Stores one agent's rates.
pub async fn save_rates(store: &Store, agent: &str, rates: &Rates) -> Result<(), Error> {
    let text = serde_json::to_string(rates).unwrap_or_else(|_| "{}".to_owned());
    let update = agents::Entity::update_many().col_expr(agents::Column::Rates, Expr::value(text)).filter(agents::Column::Id.eq(agent));
    store.run(move |db| async move { Ok(update.exec(&db).await.map(drop)?) }).await
}
