//! Rows of schedules, and how a due time becomes a row.
//!
//! Owns: every query on `schedules`. A due time gets its row together with the schedule's next one, both or neither.
//! Never: decides when something is due; changes a run that has its row (claims does). A crash here costs nothing: each call is one
//! transaction.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, ExprTrait, Func, OnConflict, SimpleExpr};
use sea_orm::{
    ColumnTrait, Condition, DatabaseTransaction, EntityTrait, Order, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, TransactionTrait,
};

use crate::store::entities::{idempotency, schedule_runs as runs, schedules};
use crate::store::{Error, Store, like};

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

pub(super) fn new_row(run: runs::Model) -> runs::ActiveModel {
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

/// Keeps what came of the newest run at its schedule, for lists.
pub(super) async fn note_last(
    transaction: &DatabaseTransaction,
    schedule: &str,
    due_at: i64,
    status: &str,
    job: Option<String>,
) -> Result<(), Error> {
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
