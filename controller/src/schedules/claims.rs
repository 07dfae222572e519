//! Rows of runs: who makes the job of one, and what came of it.
//!
//! ```text
//! pending ─claim─► claimed ─settle─► started │ failed        pending ─claim─► skipped: overlap, switched off
//!    ▲──give_back────┘ └─take_over─► claimed by another
//! ```
//! Owns: the claim. It is a compare-and-set under a lock on the schedule's row, so that two controllers never take two runs of one schedule
//! at once. Never: makes a job. A crash here costs nothing: each call is one transaction.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, ExprTrait, Query};
use sea_orm::{
    ColumnTrait, Condition, DatabaseConnection, DatabaseTransaction, EntityTrait, Order, PaginatorTrait, QueryFilter, QueryOrder,
    QuerySelect, Statement, TransactionTrait,
};
use shared::job::Status as JobStatus;

use super::plan::Overlap;
use super::store::{CLAIMED, FAILED, PENDING, SKIPPED, STARTED, cause, new_row, note_last};
use crate::store::entities::{jobs, schedule_runs as runs, schedules};
use crate::store::{Error, Store};

/// Runs of one schedule that may wait for another to end; more are left out.
pub const QUEUE: u64 = 10;
/// Open runs of one schedule that are looked at; more than may wait, so that what is one too many is seen.
pub const AT_ONCE: u64 = 2 * QUEUE;

/// Inserts a run that somebody asked for. A unique violation means that it is there already.
pub async fn insert(store: &Store, run: runs::Model) -> Result<(), Error> {
    let row = new_row(run);
    store.run(move |db| async move { Ok(runs::Entity::insert(row).exec_without_returning(&db).await.map(drop)?) }).await
}

/// One run.
pub async fn by_id(store: &Store, id: &str) -> Result<Option<runs::Model>, Error> {
    let find = runs::Entity::find_by_id(id);
    store.read(move |db| async move { Ok(find.one(&db).await?) }).await
}

/// Runs that are not settled, the oldest first: of each schedule the first [`AT_ONCE`] pending and the first claimed ones, so that no
/// schedule's stand in another's way.
pub async fn open(store: &Store) -> Result<Vec<runs::Model>, Error> {
    let sql = format!(
        "SELECT * FROM (SELECT *, row_number() OVER (PARTITION BY schedule, status ORDER BY due_at, id) AS place \
         FROM schedule_runs WHERE status IN ('{PENDING}', '{CLAIMED}')) AS waiting WHERE place <= {AT_ONCE} ORDER BY due_at, id"
    );
    let find = move |db: DatabaseConnection| async move {
        Ok(runs::Entity::find().from_raw_sql(Statement::from_string(db.get_database_backend(), sql)).all(&db).await?)
    };
    store.read(find).await
}

/// One page of a schedule's runs, and how many there are.
pub async fn list(
    store: &Store,
    schedule: &str,
    status: Option<Vec<&'static str>>,
    order: Order,
    offset: u64,
    limit: u64,
) -> Result<(Vec<runs::Model>, u64), Error> {
    let mut find = runs::Entity::find().filter(runs::Column::Schedule.eq(schedule));
    if let Some(status) = status {
        find = find.filter(runs::Column::Status.is_in(status));
    }
    store
        .read(move |db| async move {
            let total = find.clone().count(&db).await?;
            let ordered = find.order_by(runs::Column::DueAt, order.clone()).order_by(runs::Column::Id, order);
            Ok((ordered.offset(offset).limit(limit).all(&db).await?, total))
        })
        .await
}

/// What came of an attempt to take a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is the caller's; this is its schedule now.
    Mine(Box<schedules::Model>),
    /// It waits for the job of another run.
    Waits,
    /// Somebody else has it, or it is settled.
    Gone,
}

/// Takes a pending run for `me`, where its schedule's policy lets it, or leaves it out, where that says so.
pub async fn claim(store: &Store, run: &runs::Model, me: &str) -> Result<Claim, Error> {
    Ok(decide(store, run, Some(me.to_owned())).await?.unwrap_or(Claim::Gone))
}

/// Whether its schedule's policy would let a pending run be taken now. Where not, it waits or is left out as [`claim`] would have it.
pub async fn is_free(store: &Store, run: &runs::Model) -> Result<bool, Error> {
    Ok(decide(store, run, None).await?.is_none())
}

/// Carries the policy's word out; nothing where a run may be taken and there is nobody to take it.
async fn decide(store: &Store, run: &runs::Model, me: Option<String>) -> Result<Option<Claim>, Error> {
    let (id, schedule, due_at, manual) = (run.id.clone(), run.schedule.clone(), run.due_at, run.cause == cause::MANUAL);
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            let Some(row) = lock(&transaction, &schedule).await? else { return Ok(Some(Claim::Gone)) };
            let verdict = if manual {
                Verdict::Take
            } else if !row.enabled {
                Verdict::Skip("the schedule was switched off before it could run".to_owned())
            } else {
                verdict(&transaction, &row, &id, due_at).await?
            };
            let (status, owner, reason, answer) = match verdict {
                Verdict::Take if me.is_none() => return Ok(None),
                Verdict::Take => (CLAIMED, me, None, Claim::Mine(Box::new(row.clone()))),
                Verdict::Wait(reason) => (PENDING, None, Some(reason), Claim::Waits),
                Verdict::Skip(reason) => (SKIPPED, None, Some(reason), Claim::Gone),
            };
            let changes =
                runs::ActiveModel { status: Set(status.to_owned()), claimed_by: Set(owner), reason: Set(reason), ..Default::default() };
            let take = runs::Entity::update_many().set(changes).filter(runs::Column::Id.eq(&id)).filter(runs::Column::Status.eq(PENDING));
            if take.exec(&transaction).await?.rows_affected != 1 {
                return Ok(Some(Claim::Gone));
            }
            if status == SKIPPED {
                note_last(&transaction, &schedule, due_at, SKIPPED, None).await?;
            }
            transaction.commit().await?;
            Ok(Some(answer))
        })
        .await
}

enum Verdict {
    Take,
    Wait(String),
    Skip(String),
}

/// Locks a schedule's row for the rest of the transaction, and reads it. On SQLite the transaction becomes the writer.
async fn lock(transaction: &DatabaseTransaction, schedule: &str) -> Result<Option<schedules::Model>, Error> {
    let turn = schedules::Entity::update_many()
        .col_expr(schedules::Column::Turn, Expr::col(schedules::Column::Turn).add(1i64))
        .filter(schedules::Column::Id.eq(schedule));
    if turn.exec(transaction).await?.rows_affected != 1 {
        return Ok(None);
    }
    Ok(schedules::Entity::find_by_id(schedule).one(transaction).await?)
}

/// What the overlap policy says to a run, as the other runs stand.
async fn verdict(transaction: &DatabaseTransaction, schedule: &schedules::Model, run: &str, due_at: i64) -> Result<Verdict, Error> {
    let overlap = Overlap::from_word(&schedule.overlap).unwrap_or(Overlap::Skip);
    if overlap == Overlap::Allow {
        return Ok(Verdict::Take);
    }
    let others = runs::Entity::find().filter(runs::Column::Schedule.eq(&schedule.id)).filter(runs::Column::Id.ne(run));
    let live = [JobStatus::Queued, JobStatus::Running, JobStatus::Cancelling].map(JobStatus::word);
    let live_jobs = Query::select().column(jobs::Column::Id).from(jobs::Entity).and_where(jobs::Column::Status.is_in(live)).to_owned();
    let working = Condition::any()
        .add(runs::Column::Status.eq(CLAIMED))
        .add(Condition::all().add(runs::Column::Status.eq(STARTED)).add(runs::Column::Job.in_subquery(live_jobs)));
    let working = others.clone().filter(working).order_by_desc(runs::Column::DueAt).one(transaction).await?;
    let working = working.map(|other| match other.job {
        Some(job) => format!("{job} of another run is not finished"),
        None => "the job of another run is being made".to_owned(),
    });
    if overlap == Overlap::Skip {
        return Ok(working.map_or(Verdict::Take, Verdict::Skip));
    }
    let older = others.filter(runs::Column::Status.eq(PENDING)).filter(runs::Column::DueAt.lt(due_at)).count(transaction).await?;
    Ok(match working {
        _ if older >= QUEUE => Verdict::Skip(format!("{older} runs wait already")),
        Some(reason) => Verdict::Wait(reason),
        None if older > 0 => Verdict::Wait(format!("older runs wait: {older}")),
        None => Verdict::Take,
    })
}

/// Takes over a run whose controller fell silent between claim and job.
pub async fn take_over(store: &Store, run: &runs::Model, me: &str) -> Result<bool, Error> {
    let update = runs::Entity::update_many()
        .col_expr(runs::Column::ClaimedBy, Expr::value(Some(me.to_owned())))
        .filter(runs::Column::Id.eq(&run.id))
        .filter(runs::Column::Status.eq(CLAIMED))
        .filter(runs::Column::ClaimedBy.eq(run.claimed_by.clone()));
    store.run(move |db| async move { Ok(update.exec(&db).await?.rows_affected == 1) }).await
}

/// Gives a claimed run back: its job could not be made for now.
pub async fn give_back(store: &Store, run: &str, me: &str) -> Result<(), Error> {
    let changes = runs::ActiveModel { status: Set(PENDING.to_owned()), claimed_by: Set(None), ..Default::default() };
    let update = mine(run, me).set(changes);
    store.run(move |db| async move { Ok(update.exec(&db).await.map(drop)?) }).await
}

fn mine(run: &str, me: &str) -> sea_orm::UpdateMany<runs::Entity> {
    runs::Entity::update_many()
        .filter(runs::Column::Id.eq(run))
        .filter(runs::Column::Status.eq(CLAIMED))
        .filter(runs::Column::ClaimedBy.eq(me))
}

/// What came of a claimed run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It made this job.
    Job(String),
    /// Its job was refused.
    Failed(String),
}

/// Settles a run that is `me`'s. Where somebody took it over, that one settles it.
pub async fn settle(store: &Store, run: &runs::Model, me: &str, outcome: Outcome, now: i64) -> Result<(), Error> {
    let (status, job, reason) = match outcome {
        Outcome::Job(job) => (STARTED, Some(job), None),
        Outcome::Failed(reason) => (FAILED, None, Some(reason)),
    };
    let changes = runs::ActiveModel {
        status: Set(status.to_owned()),
        job: Set(job.clone()),
        reason: Set(reason),
        started_at: Set(job.is_some().then_some(now)),
        claimed_by: Set(None),
        ..Default::default()
    };
    let update = mine(&run.id, me).set(changes);
    let (schedule, due_at) = (run.schedule.clone(), run.due_at);
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            if update.exec(&transaction).await?.rows_affected == 1 {
                note_last(&transaction, &schedule, due_at, status, job).await?;
            }
            Ok(transaction.commit().await?)
        })
        .await
}
