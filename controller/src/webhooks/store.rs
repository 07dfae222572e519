//! Rows of webhooks and of what they are to be told.
//!
//! Owns: every query on `webhooks` and `webhook_deliveries`, and how far the ended jobs were looked through.
//! Never: calls anybody. A crash here costs nothing: an event is noted once for each webhook, however often it is said.

use sea_orm::sea_query::{Expr, ExprTrait, OnConflict};
use sea_orm::{
    ActiveValue::{NotSet, Set},
    ColumnTrait, ConnectionTrait, DatabaseConnection, EntityTrait, FromQueryResult, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect,
    TransactionTrait,
};
use serde_json::{Value, json};

use crate::http::idempotency::Idempotency;
use crate::http::query::{Paging, Sort};
use crate::http::rfc3339;
use crate::store::entities::{idempotency, jobs, settings, webhook_deliveries as deliveries, webhooks};
use crate::store::{Error, Store};

/// Name of the setting that says how far ended jobs were looked through.
const CURSOR: &str = "webhooks.jobs";
/// A job's end is written down a moment before it is committed; so far back is looked again.
pub const OVERLAP: i64 = 60_000;
/// How long deliveries are kept after their end, in milliseconds.
const HISTORY: i64 = 7 * 24 * 3600 * 1000;
/// Jobs of one page of a look.
pub const MOST_JOBS: usize = 500;

/// Every webhook, by id.
pub async fn all(store: &Store) -> Result<Vec<webhooks::Model>, Error> {
    store.read(|db| async move { Ok(webhooks::Entity::find().order_by_asc(webhooks::Column::Id).all(&db).await?) }).await
}

/// One webhook.
pub async fn by_id(store: &Store, id: &str) -> Result<Option<webhooks::Model>, Error> {
    let id = id.to_owned();
    store.read(|db| async move { Ok(webhooks::Entity::find_by_id(id).one(&db).await?) }).await
}

/// One page of them, and for each how many deliveries wait and were given up.
pub async fn list(store: &Store, sort: Sort, paging: Paging) -> Result<(Vec<(webhooks::Model, u64, u64)>, u64), Error> {
    let work = move |db: DatabaseConnection| async move {
        let select = webhooks::Entity::find();
        let total = select.clone().count(&db).await?;
        let column = if sort.field == "url" { webhooks::Column::Url } else { webhooks::Column::CreatedAt };
        let ordered = select.order_by(column, sort.order.into()).order_by(webhooks::Column::Id, sort.order.into());
        let rows = ordered.offset(paging.offset).limit(paging.limit).all(&db).await?;
        let mut counted = Vec::with_capacity(rows.len());
        for row in rows {
            let count = |state: &'static str| {
                let mine = deliveries::Entity::find().filter(deliveries::Column::Webhook.eq(&row.id));
                mine.filter(deliveries::Column::State.eq(state)).count(&db)
            };
            let (pending, failed) = (count("pending").await?, count("failed").await?);
            counted.push((row, pending, failed));
        }
        Ok((counted, total))
    };
    store.read(work).await
}

/// Adds one, with the answer to give again where the request had a key.
pub async fn insert(store: &Store, row: webhooks::Model, answer: Option<idempotency::ActiveModel>) -> Result<(), Error> {
    let row = webhooks::ActiveModel {
        id: Set(row.id),
        url: Set(row.url),
        events: Set(row.events),
        secret: Set(row.secret),
        created_by: Set(row.created_by),
        created_at: Set(row.created_at),
        last_at: Set(None),
        last_status: Set(None),
        last_ms: Set(None),
        last_error: Set(None),
    };
    let work = |db: DatabaseConnection| async move {
        let transaction = db.begin().await?;
        if let Some(answer) = answer {
            idempotency::Entity::insert(answer).exec_without_returning(&transaction).await?;
        }
        webhooks::Entity::insert(row).exec_without_returning(&transaction).await?;
        Ok(transaction.commit().await?)
    };
    store.run(work).await
}

/// The row that gives an answer again, see [`Idempotency::row`].
pub fn answer(key: Option<&Idempotency>, location: &str, body: String) -> Option<idempotency::ActiveModel> {
    key.map(|key| key.row(201, location, body))
}

/// Removes one and all that it was to be told. False where it was not there.
pub async fn remove(store: &Store, id: &str) -> Result<bool, Error> {
    let id = id.to_owned();
    let work = |db: DatabaseConnection| async move {
        let transaction = db.begin().await?;
        deliveries::Entity::delete_many().filter(deliveries::Column::Webhook.eq(&id)).exec(&transaction).await?;
        let gone = webhooks::Entity::delete_by_id(id).exec(&transaction).await?.rows_affected;
        transaction.commit().await?;
        Ok(gone == 1)
    };
    store.run(work).await
}

fn wants(webhook: &webhooks::Model, kind: &str) -> bool {
    serde_json::from_str::<Vec<String>>(&webhook.events).unwrap_or_default().iter().any(|event| event == kind)
}

/// The body of a call: a WebSocket frame without its number.
pub fn body(kind: &str, time: i64, data: &Value) -> String {
    json!({"type": kind, "time": rfc3339(time), "data": data}).to_string()
}

/// Notes an event for every webhook that wants it; an event that is noted already is not noted again.
pub async fn enqueue(db: &impl ConnectionTrait, kind: &'static str, key: &str, data: &Value, now: i64) -> Result<(), Error> {
    for webhook in webhooks::Entity::find().all(db).await? {
        note(db, &webhook, kind, key, data, now).await?;
    }
    Ok(())
}

async fn note(db: &impl ConnectionTrait, webhook: &webhooks::Model, kind: &str, key: &str, data: &Value, now: i64) -> Result<(), Error> {
    if !wants(webhook, kind) {
        return Ok(());
    }
    let row = deliveries::ActiveModel {
        id: NotSet,
        webhook: Set(webhook.id.clone()),
        event_key: Set(key.to_owned()),
        kind: Set(kind.to_owned()),
        body: Set(body(kind, now, data)),
        state: Set("pending".to_owned()),
        attempt: Set(0),
        next_at: Set(now),
        created_at: Set(now),
        finished_at: Set(None),
        outcome: Set(None),
    };
    let once = OnConflict::columns([deliveries::Column::Webhook, deliveries::Column::EventKey]).do_nothing().to_owned();
    deliveries::Entity::insert(row).on_conflict(once).exec_without_returning(db).await?;
    Ok(())
}

/// How far the ended jobs were looked through, milliseconds since 1970; `None` before the first look.
pub async fn cursor(store: &Store) -> Result<Option<i64>, Error> {
    let row = store.read(|db| async move { Ok(settings::Entity::find_by_id(CURSOR).one(&db).await?) }).await?;
    Ok(row.and_then(|row| row.value.parse().ok()))
}

/// A page of the jobs that ended since a cursor, the earliest first.
pub async fn ended(store: &Store, since: i64, page: u64) -> Result<Vec<jobs::Model>, Error> {
    let find = jobs::Entity::find()
        .filter(jobs::Column::FinishedAt.gte(since.saturating_sub(OVERLAP)))
        .filter(jobs::Column::Status.is_in(["completed", "failed", "cancelled"]))
        .order_by_asc(jobs::Column::FinishedAt)
        .order_by_asc(jobs::Column::Id)
        .offset(page.saturating_mul(MOST_JOBS as u64))
        .limit(MOST_JOBS as u64);
    store.read(|db| async move { Ok(find.all(&db).await?) }).await
}

/// An ended job as it is told.
pub struct Ended {
    /// The event.
    pub kind: &'static str,
    /// Its key.
    pub key: String,
    /// When it ended.
    pub time: i64,
    /// The job as the API shows it.
    pub data: Value,
}

/// Notes ended jobs for the webhooks that want them and were there then, and how far this went; both or neither.
pub async fn note_ended(store: &Store, events: Vec<Ended>, cursor: i64) -> Result<(), Error> {
    let work = move |db: DatabaseConnection| async move {
        let transaction = db.begin().await?;
        for webhook in webhooks::Entity::find().all(&transaction).await? {
            for event in events.iter().filter(|event| event.time >= webhook.created_at) {
                note(&transaction, &webhook, event.kind, &event.key, &event.data, event.time).await?;
            }
        }
        let row = settings::ActiveModel {
            name: Set(CURSOR.to_owned()),
            value: Set(cursor.to_string()),
            updated_at: Set(shared::clock::now().timestamp_millis()),
        };
        let newest =
            OnConflict::column(settings::Column::Name).update_columns([settings::Column::Value, settings::Column::UpdatedAt]).to_owned();
        settings::Entity::insert(row).on_conflict(newest).exec_without_returning(&transaction).await?;
        Ok(transaction.commit().await?)
    };
    store.run(work).await
}

#[derive(FromQueryResult)]
struct Head {
    head: i32,
}

/// For each webhook the first delivery in line, where its time has come.
pub async fn heads(store: &Store, now: i64) -> Result<Vec<deliveries::Model>, Error> {
    let work = move |db: DatabaseConnection| async move {
        let heads = deliveries::Entity::find()
            .select_only()
            .column_as(deliveries::Column::Id.min(), "head")
            .filter(deliveries::Column::State.eq("pending"))
            .group_by(deliveries::Column::Webhook)
            .into_model::<Head>()
            .all(&db)
            .await?;
        let ids: Vec<i32> = heads.into_iter().map(|head| head.head).collect();
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        Ok(deliveries::Entity::find()
            .filter(deliveries::Column::Id.is_in(ids))
            .filter(deliveries::Column::NextAt.lte(now))
            .all(&db)
            .await?)
    };
    store.read(work).await
}

/// What a call came to.
#[derive(Clone, Debug)]
pub struct Called {
    /// The receiver's status, where it answered.
    pub status: Option<u16>,
    /// How long it took, in milliseconds.
    pub milliseconds: u64,
    /// Why it does not count; nothing for a 2xx.
    pub error: Option<String>,
}

/// Notes what a call came to. `next_at`: when to call again; nothing: it is delivered, or given up.
pub async fn settle(store: &Store, delivery: &deliveries::Model, called: &Called, next_at: Option<i64>) -> Result<(), Error> {
    let now = shared::clock::now().timestamp_millis();
    let state = match (&called.error, next_at) {
        (None, _) => "delivered",
        (Some(_), Some(_)) => "pending",
        (Some(_), None) => "failed",
    };
    let outcome = called.error.clone().unwrap_or_else(|| "ok".to_owned());
    let changes = deliveries::ActiveModel {
        state: Set(state.to_owned()),
        attempt: Set(delivery.attempt.saturating_add(1)),
        next_at: Set(next_at.unwrap_or(delivery.next_at)),
        finished_at: Set((state != "pending").then_some(now)),
        outcome: Set(Some(outcome.replace('\0', "").chars().take(250).collect())),
        ..Default::default()
    };
    let last = last_call(called, now);
    let (id, webhook) = (delivery.id, delivery.webhook.clone());
    let work = move |db: DatabaseConnection| async move {
        let transaction = db.begin().await?;
        deliveries::Entity::update_many().set(changes).filter(deliveries::Column::Id.eq(id)).exec(&transaction).await?;
        webhooks::Entity::update_many().set(last).filter(webhooks::Column::Id.eq(webhook)).exec(&transaction).await?;
        Ok(transaction.commit().await?)
    };
    store.run(work).await
}

/// Notes a call that was a test.
pub async fn tested(store: &Store, id: &str, called: &Called) -> Result<(), Error> {
    let last = last_call(called, shared::clock::now().timestamp_millis());
    let update = webhooks::Entity::update_many().set(last).filter(webhooks::Column::Id.eq(id));
    store.run(|db| async move { Ok(update.exec(&db).await.map(drop)?) }).await
}

fn last_call(called: &Called, now: i64) -> webhooks::ActiveModel {
    webhooks::ActiveModel {
        last_at: Set(Some(now)),
        last_status: Set(called.status.map(i32::from)),
        last_ms: Set(Some(i32::try_from(called.milliseconds).unwrap_or(i32::MAX))),
        last_error: Set(called.error.as_ref().map(|error| error.replace('\0', ""))),
        ..Default::default()
    }
}

/// Deliveries that wait.
pub async fn pending(store: &Store) -> Result<u64, Error> {
    let count = deliveries::Entity::find().filter(deliveries::Column::State.eq("pending"));
    store.read(|db| async move { Ok(count.count(&db).await?) }).await
}

/// Removes what ended long ago. What the next look at ended jobs finds once more stays: it is known by its row.
pub async fn forget_old(store: &Store, now: i64) -> Result<(), Error> {
    let again = cursor(store).await?.map_or(i64::MAX, |cursor| cursor.saturating_sub(OVERLAP));
    let old = deliveries::Entity::delete_many()
        .filter(deliveries::Column::State.ne("pending"))
        .filter(Expr::col(deliveries::Column::FinishedAt).lt(now.saturating_sub(HISTORY)))
        .filter(deliveries::Column::CreatedAt.lt(again));
    store.run(|db| async move { Ok(old.exec(&db).await.map(drop)?) }).await
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
