//! Rows of uploads and their chunks.
//!
//! Owns: every query on `uploads` and `upload_chunks`. Never: decides anything. A crash here costs nothing: each call is one transaction.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, OnConflict};
use sea_orm::{
    ColumnTrait, ConnectionTrait as _, DbBackend, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder, QuerySelect, TransactionTrait,
};

use crate::store::entities::{idempotency, upload_chunks, uploads};
use crate::store::{Error, Store};

/// Chunks are coming.
pub const OPEN: &str = "open";
/// It is whole.
pub const COMPLETE: &str = "complete";

/// The advisory lock on Postgres under which uploads begin.
const QUOTA_LOCK: i64 = i64::from_be_bytes(*b"\0\0upload");

/// Begins an upload where all of them together stay within `quota` bytes (0: no quota); else answers how many bytes are taken.
pub async fn begin(
    store: &Store,
    row: uploads::Model,
    quota: u64,
    answer: Option<idempotency::ActiveModel>,
) -> Result<Result<(), u64>, Error> {
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            if quota > 0 {
                // One after the other: two that begin at once do not see each other's rows. SQLite has one writer anyway.
                if db.get_database_backend() == DbBackend::Postgres {
                    transaction.execute_unprepared(&format!("SELECT pg_advisory_xact_lock({QUOTA_LOCK})")).await?;
                }
                let sum = Expr::cust("CAST(COALESCE(SUM(size), 0) AS BIGINT)");
                let taken = uploads::Entity::find().select_only().expr_as(sum, "taken").into_tuple::<i64>().one(&transaction).await?;
                let taken = taken.map_or(0, i64::unsigned_abs);
                if taken.saturating_add(row.size.unsigned_abs()) > quota {
                    return Ok(Err(taken));
                }
            }
            if let Some(answer) = answer {
                idempotency::Entity::insert(answer).exec_without_returning(&transaction).await?;
            }
            uploads::Entity::insert(row.into_active_model()).exec_without_returning(&transaction).await?;
            transaction.commit().await?;
            Ok(Ok(()))
        })
        .await
}

/// An upload.
pub async fn load(store: &Store, id: &str) -> Result<Option<uploads::Model>, Error> {
    let find = uploads::Entity::find_by_id(id);
    store.read(move |db| async move { Ok(find.one(&db).await?) }).await
}

/// The chunks that are on the disk, in order.
pub async fn chunks(store: &Store, id: &str) -> Result<Vec<i64>, Error> {
    let find = upload_chunks::Entity::find()
        .filter(upload_chunks::Column::Upload.eq(id))
        .order_by_asc(upload_chunks::Column::Number)
        .select_only()
        .column(upload_chunks::Column::Number)
        .into_tuple::<i64>();
    store.read(move |db| async move { Ok(find.all(&db).await?) }).await
}

/// A chunk is on the disk, and the upload lives on until `expires_at`.
pub async fn have(store: &Store, id: &str, number: i64, sha256: String, expires_at: i64) -> Result<(), Error> {
    let row = upload_chunks::ActiveModel { upload: Set(id.to_owned()), number: Set(number), sha256: Set(sha256) };
    let twice = OnConflict::columns([upload_chunks::Column::Upload, upload_chunks::Column::Number])
        .update_column(upload_chunks::Column::Sha256)
        .to_owned();
    let longer =
        uploads::Entity::update_many().col_expr(uploads::Column::ExpiresAt, Expr::value(expires_at)).filter(uploads::Column::Id.eq(id));
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            upload_chunks::Entity::insert(row).on_conflict(twice).exec_without_returning(&transaction).await?;
            longer.exec(&transaction).await?;
            Ok(transaction.commit().await?)
        })
        .await
}

/// A chunk is about to be written again: until it is, it is missing.
pub async fn lack(store: &Store, id: &str, number: i64) -> Result<(), Error> {
    let delete =
        upload_chunks::Entity::delete_many().filter(upload_chunks::Column::Upload.eq(id)).filter(upload_chunks::Column::Number.eq(number));
    store.run(move |db| async move { Ok(delete.exec(&db).await.map(drop)?) }).await
}

/// No chunk is on the disk any more.
pub async fn lack_all(store: &Store, id: &str) -> Result<(), Error> {
    let delete = upload_chunks::Entity::delete_many().filter(upload_chunks::Column::Upload.eq(id));
    store.run(move |db| async move { Ok(delete.exec(&db).await.map(drop)?) }).await
}

/// An upload is whole; its chunks need not be remembered.
pub async fn complete(store: &Store, id: &str, sha256: &str, now: i64) -> Result<(), Error> {
    let changes = uploads::ActiveModel {
        status: Set(COMPLETE.to_owned()),
        sha256: Set(Some(sha256.to_owned())),
        finished_at: Set(Some(now)),
        ..Default::default()
    };
    let update = uploads::Entity::update_many().set(changes).filter(uploads::Column::Id.eq(id));
    let chunks = upload_chunks::Entity::delete_many().filter(upload_chunks::Column::Upload.eq(id));
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            update.exec(&transaction).await?;
            chunks.exec(&transaction).await?;
            Ok(transaction.commit().await?)
        })
        .await
}

/// Forgets an upload; one that did not come about, with the row of its Idempotency-Key, so that the same request may try again.
pub async fn remove(store: &Store, id: &str, key: Option<String>) -> Result<(), Error> {
    let chunks = upload_chunks::Entity::delete_many().filter(upload_chunks::Column::Upload.eq(id));
    let upload = uploads::Entity::delete_by_id(id);
    store
        .run(move |db| async move {
            let transaction = db.begin().await?;
            chunks.exec(&transaction).await?;
            upload.exec(&transaction).await?;
            if let Some(key) = key {
                idempotency::Entity::delete_by_id(key).exec(&transaction).await?;
            }
            Ok(transaction.commit().await?)
        })
        .await
}

/// Unfinished uploads whose time is over.
pub async fn expired(store: &Store, now: i64) -> Result<Vec<uploads::Model>, Error> {
    let find = uploads::Entity::find().filter(uploads::Column::Status.eq(OPEN)).filter(uploads::Column::ExpiresAt.lt(now)).limit(100);
    store.read(move |db| async move { Ok(find.all(&db).await?) }).await
}
