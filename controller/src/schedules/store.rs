//! Rows of schedules and of their runs.
//!
//! Owns: every query on `schedules` and `schedule_runs`. A due time becomes a row together with the schedule's next one, both or neither;
//! a run changes hands by compare-and-set under a lock on its schedule's row, so that two controllers never take two of one schedule at once.
//! Never: decides when something is due or makes a job. A crash here costs nothing: each call is one transaction.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, ExprTrait, Func, OnConflict, Query, SimpleExpr};
use sea_orm::{
    ColumnTrait, Condition, DatabaseTransaction, EntityTrait, Order, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, TransactionTrait,
};
use shared::job::Status as JobStatus;

use super::plan::Overlap;
use crate::store::entities::{idempotency, jobs, schedule_runs as runs, schedules};
use crate::store::{Error, Store, like};

/// Runs of one schedule that may wait for another to end; more are left out.
pub const QUEUE: u64 = 10;
/// Runs of one schedule that are kept. By number and not by age: a clock that runs ahead for a moment must not cost the history.
const KEPT: u64 = 10_000;

/// A run that waits for a controller.
pub const PENDING: &str = "pending";
/// A controller makes its job.
pub const CLAIMED: &str = "claimed";
/// It has a job.
pub const STARTED: &str = "started";
/// It was left out.
pub const SKIPPED: &str = "skipped";
/// Its job could not be made.
pub const FAILED: &str = "failed";

/// What a run is for.
pub mod cause {
    /// Its time came.
    pub const CRON: &str = "cron";
    /// Its time had come while nobody was there.
    pub const CATCH_UP: &str = "catch_up";
    /// Somebody asked for it.
    pub const MANUAL: &str = "manual";
}

/// What `GET /schedules` filters by.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Connection name or kind.
    pub provider: Option<String>,
    /// Switched on or off.
    pub enabled: Option<bool>,
    /// Milliseconds since 1970, exclusive.
    pub created_after: Option<i64>,
    /// Milliseconds since 1970, exclusive.
    pub created_before: Option<i64>,
    /// Part of the name or the id.
    pub search: Option<String>,
}

/// What it sorts by.
#[derive(Clone, Copy, Debug)]
pub enum SortBy {
    /// Name, without regard to case.
    Name,
    /// Time of making.
    Created,
    /// Time of the last change.
    Updated,
    /// The next due time; those without one come last.
    NextRun,
}

/// Inserts a schedule and, where its request had a key, the answer to give again. Both or neither.
pub async fn insert(store: &Store, row: schedules::Model, answer: Option<idempotency::ActiveModel>) -> Result<(), Error> {
    let row = whole(row);
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            if let Some(answer) = answer {
                idempotency::Entity::insert(answer).exec_without_returning(&transaction).await?;
            }
            schedules::Entity::insert(row).exec_without_returning(&transaction).await?;
            Ok(transaction.commit().await?)
        })
        .await
}

fn whole(row: schedules::Model) -> schedules::ActiveModel {
    schedules::ActiveModel {
        id: Set(row.id),
        name: Set(row.name),
        folded: Set(row.folded),
        cron: Set(row.cron),
        timezone: Set(row.timezone),
        job: Set(row.job),
        provider: Set(row.provider),
        provider_kind: Set(row.provider_kind),
        enabled: Set(row.enabled),
        overlap: Set(row.overlap),
        catch_up: Set(row.catch_up),
        carbon_aware: Set(row.carbon_aware),
        next_run: Set(row.next_run),
        last_run: Set(row.last_run),
        last_status: Set(row.last_status),
        last_job: Set(row.last_job),
        version: Set(row.version),
        turn: Set(row.turn),
        created_by: Set(row.created_by),
        created_at: Set(row.created_at),
        updated_at: Set(row.updated_at),
    }
}

/// One schedule.
pub async fn by_id(store: &Store, id: &str) -> Result<Option<schedules::Model>, Error> {
    let find = schedules::Entity::find_by_id(id);
    store.read(move |db| async move { Ok(find.one(&db).await?) }).await
}

/// One page of schedules and how many there are.
pub async fn list(
    store: &Store,
    filter: Filter,
    sort: (SortBy, Order),
    offset: u64,
    limit: u64,
) -> Result<(Vec<schedules::Model>, u64), Error> {
    let find = schedules::Entity::find().filter(condition(filter));
    let (by, order) = sort;
    let key: SimpleExpr = match by {
        SortBy::Name => Func::lower(Expr::col(schedules::Column::Name)).into(),
        SortBy::Created => Expr::col(schedules::Column::CreatedAt),
        SortBy::Updated => Expr::col(schedules::Column::UpdatedAt),
        // The databases disagree where a null belongs.
        SortBy::NextRun => Func::coalesce([Expr::col(schedules::Column::NextRun), Expr::val(i64::MAX)]).into(),
    };
    store
        .read(move |db| async move {
            let total = find.clone().count(&db).await?;
            let rows =
                find.order_by(key, order.clone()).order_by(schedules::Column::Id, order).offset(offset).limit(limit).all(&db).await?;
            Ok((rows, total))
        })
        .await
}

fn condition(filter: Filter) -> Condition {
    let mut all = Condition::all();
    if let Some(provider) = filter.provider {
        let either = Condition::any().add(schedules::Column::Provider.eq(provider.clone()));
        all = all.add(either.add(schedules::Column::ProviderKind.eq(provider)));
    }
    if let Some(enabled) = filter.enabled {
        all = all.add(schedules::Column::Enabled.eq(enabled));
    }
    if let Some(after) = filter.created_after {
        all = all.add(schedules::Column::CreatedAt.gt(after));
    }
    if let Some(before) = filter.created_before {
        all = all.add(schedules::Column::CreatedAt.lt(before));
    }
    if let Some(search) = filter.search {
        all = all.add(Expr::col(schedules::Column::Folded).like(like(&search)));
    }
    all
}

/// Stores a schedule that a person changed, where it is still the version that was read. What the runs have written stays.
pub async fn update(store: &Store, row: schedules::Model) -> Result<bool, Error> {
    let (id, version) = (row.id.clone(), row.version);
    let changes = schedules::ActiveModel {
        name: Set(row.name),
        folded: Set(row.folded),
        cron: Set(row.cron),
        timezone: Set(row.timezone),
        job: Set(row.job),
        provider: Set(row.provider),
        provider_kind: Set(row.provider_kind),
        enabled: Set(row.enabled),
        overlap: Set(row.overlap),
        catch_up: Set(row.catch_up),
        carbon_aware: Set(row.carbon_aware),
        next_run: Set(row.next_run),
        version: Set(version.wrapping_add(1)),
        updated_at: Set(row.updated_at),
        ..Default::default()
    };
    let update =
        schedules::Entity::update_many().set(changes).filter(schedules::Column::Id.eq(id)).filter(schedules::Column::Version.eq(version));
    store.run(move |db| async move { Ok(update.exec(&db).await?.rows_affected == 1) }).await
}

/// Removes a schedule and its runs; the jobs that they made go on. Whether it was there.
pub async fn delete(store: &Store, id: &str) -> Result<bool, Error> {
    let id = id.to_owned();
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            runs::Entity::delete_many().filter(runs::Column::Schedule.eq(&id)).exec(&transaction).await?;
            let gone = schedules::Entity::delete_by_id(&id).exec(&transaction).await?.rows_affected == 1;
            transaction.commit().await?;
            Ok(gone)
        })
        .await
}

/// Schedules whose next due time has come.
pub async fn due(store: &Store, now: i64) -> Result<Vec<schedules::Model>, Error> {
    let find = enabled().filter(schedules::Column::NextRun.lte(now)).order_by_asc(schedules::Column::NextRun).limit(500);
    store.read(move |db| async move { Ok(find.all(&db).await?) }).await
}

/// Every schedule that waits for a time.
pub async fn waiting(store: &Store) -> Result<Vec<schedules::Model>, Error> {
    let find = enabled().filter(schedules::Column::NextRun.is_not_null());
    store.read(move |db| async move { Ok(find.all(&db).await?) }).await
}

fn enabled() -> sea_orm::Select<schedules::Entity> {
    schedules::Entity::find().filter(schedules::Column::Enabled.eq(true))
}

/// Gives due times their rows and a schedule its next one, where nobody else did. Whether it was done.
///
/// A due time that has a row keeps it: it was met before the clock went back. Only where it was counted as missed, by a clock that ran
/// ahead, and comes now, is it pending again.
pub async fn advance(store: &Store, schedule: &schedules::Model, next: Option<i64>, new: Vec<runs::Model>) -> Result<bool, Error> {
    let (id, version) = (schedule.id.clone(), schedule.version);
    let gives_rows = !new.is_empty();
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            let changes = schedules::ActiveModel { next_run: Set(next), version: Set(version.wrapping_add(1)), ..Default::default() };
            let moved = schedules::Entity::update_many()
                .set(changes)
                .filter(schedules::Column::Id.eq(&id))
                .filter(schedules::Column::Version.eq(version));
            if moved.exec(&transaction).await?.rows_affected != 1 {
                return Ok(false);
            }
            for run in new {
                give_row(&transaction, run).await?;
            }
            if gives_rows {
                forget_old(&transaction, &id).await?;
            }
            transaction.commit().await?;
            Ok(true)
        })
        .await
}

/// Removes settled runs beyond those that are kept.
async fn forget_old(transaction: &DatabaseTransaction, schedule: &str) -> Result<(), Error> {
    let of_it = runs::Entity::find().filter(runs::Column::Schedule.eq(schedule));
    let Some(last) = of_it.order_by_desc(runs::Column::DueAt).offset(KEPT).one(transaction).await? else { return Ok(()) };
    let old = Condition::all()
        .add(runs::Column::Schedule.eq(schedule))
        .add(runs::Column::DueAt.lte(last.due_at))
        .add(runs::Column::Status.is_in([STARTED, SKIPPED, FAILED]));
    runs::Entity::delete_many().filter(old).exec(transaction).await?;
    Ok(())
}

async fn give_row(transaction: &DatabaseTransaction, run: runs::Model) -> Result<(), Error> {
    let (schedule, due_at, comes) = (run.schedule.clone(), run.due_at, run.status == PENDING);
    let (status, reason) = (run.status.clone(), run.reason.clone());
    let twice = OnConflict::columns([runs::Column::Schedule, runs::Column::DueAt]).do_nothing().to_owned();
    let inserted = runs::Entity::insert(new_row(run)).on_conflict(twice).exec_without_returning(transaction).await?;
    if inserted == 0 && comes {
        let again = runs::ActiveModel { status: Set(PENDING.to_owned()), reason: Set(None), missed: Set(0), ..Default::default() };
        let missed = runs::Entity::update_many()
            .set(again)
            .filter(runs::Column::Schedule.eq(schedule))
            .filter(runs::Column::DueAt.eq(due_at))
            .filter(runs::Column::Status.eq(SKIPPED))
            .filter(runs::Column::Missed.gt(0));
        missed.exec(transaction).await?;
    } else if inserted == 1 && !comes {
        note_last(transaction, &schedule, due_at, &status, None).await?;
        tracing::info!(schedule, due_at, reason, "a run of a schedule is left out");
    }
    Ok(())
}

fn new_row(run: runs::Model) -> runs::ActiveModel {
    runs::ActiveModel {
        id: Set(run.id),
        schedule: Set(run.schedule),
        due_at: Set(run.due_at),
        cause: Set(run.cause),
        status: Set(run.status),
        claimed_by: Set(run.claimed_by),
        missed: Set(run.missed),
        job: Set(run.job),
        reason: Set(run.reason),
        created_at: Set(run.created_at),
        started_at: Set(run.started_at),
    }
}

/// Inserts a run that somebody asked for. A unique violation means that it is there already.
pub async fn insert_run(store: &Store, run: runs::Model) -> Result<(), Error> {
    let row = new_row(run);
    store.run(move |db| async move { Ok(runs::Entity::insert(row).exec_without_returning(&db).await.map(drop)?) }).await
}

/// One run.
pub async fn run_by_id(store: &Store, id: &str) -> Result<Option<runs::Model>, Error> {
    let find = runs::Entity::find_by_id(id);
    store.read(move |db| async move { Ok(find.one(&db).await?) }).await
}

/// Runs that are not settled, the oldest first.
pub async fn open_runs(store: &Store) -> Result<Vec<runs::Model>, Error> {
    let find = runs::Entity::find().filter(runs::Column::Status.is_in([PENDING, CLAIMED]));
    let find = find.order_by_asc(runs::Column::DueAt).order_by_asc(runs::Column::Id).limit(500);
    store.read(move |db| async move { Ok(find.all(&db).await?) }).await
}

/// One page of a schedule's runs, and how many there are.
pub async fn list_runs(
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
    let (id, schedule, due_at, manual) = (run.id.clone(), run.schedule.clone(), run.due_at, run.cause == cause::MANUAL);
    let me = me.to_owned();
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            let Some(row) = lock(&transaction, &schedule).await? else { return Ok(Claim::Gone) };
            let verdict = if manual {
                Verdict::Take
            } else if !row.enabled {
                Verdict::Skip("the schedule was switched off before it could run".to_owned())
            } else {
                verdict(&transaction, &row, &id, due_at).await?
            };
            let (status, owner, reason, answer) = match verdict {
                Verdict::Take => (CLAIMED, Some(me), None, Claim::Mine(Box::new(row.clone()))),
                Verdict::Wait(reason) => (PENDING, None, Some(reason), Claim::Waits),
                Verdict::Skip(reason) => (SKIPPED, None, Some(reason), Claim::Gone),
            };
            let changes =
                runs::ActiveModel { status: Set(status.to_owned()), claimed_by: Set(owner), reason: Set(reason), ..Default::default() };
            let take = runs::Entity::update_many().set(changes).filter(runs::Column::Id.eq(&id)).filter(runs::Column::Status.eq(PENDING));
            if take.exec(&transaction).await?.rows_affected != 1 {
                return Ok(Claim::Gone);
            }
            if status == SKIPPED {
                note_last(&transaction, &schedule, due_at, SKIPPED, None).await?;
            }
            transaction.commit().await?;
            Ok(answer)
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

/// Keeps what came of the newest run at its schedule, for lists.
async fn note_last(transaction: &DatabaseTransaction, schedule: &str, due_at: i64, status: &str, job: Option<String>) -> Result<(), Error> {
    let changes = schedules::ActiveModel {
        last_run: Set(Some(due_at)),
        last_status: Set(Some(status.to_owned())),
        last_job: Set(job),
        ..Default::default()
    };
    let newer = Condition::any().add(schedules::Column::LastRun.is_null()).add(schedules::Column::LastRun.lte(due_at));
    schedules::Entity::update_many().set(changes).filter(schedules::Column::Id.eq(schedule)).filter(newer).exec(transaction).await?;
    Ok(())
}
