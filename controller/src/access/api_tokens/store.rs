//! Rows of `api_tokens`.
//!
//! Owns: every query on the table. Never: sees a token. A crash here costs nothing: each call is one statement or one transaction.

use sea_orm::sea_query::{Expr, ExprTrait, Func};
use sea_orm::{
    ActiveValue::Set, ColumnTrait, Condition, ConnectionTrait, DatabaseConnection, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder,
    QuerySelect, TransactionTrait,
};

use crate::http::query::{Paging, Sort};
use crate::store::entities::{api_tokens, users};
use crate::store::{Error, Store, like};

/// Most tokens of a user.
pub const MOST: u64 = 200;

/// How an insert ended.
pub enum Inserted {
    /// It is there.
    Done,
    /// Its owner has too many.
    TooMany,
    /// Its owner is gone.
    NoOwner,
}

/// Adds one; a name that its owner has already is a conflict.
pub async fn insert(store: &Store, row: api_tokens::Model) -> Result<Inserted, Error> {
    let work = move |db: DatabaseConnection| async move {
        let transaction = db.begin().await?;
        // A user who goes takes the row along or finds it: see `users::delete`.
        let owner = users::Entity::find_by_id(&row.user_name);
        let owner = match transaction.get_database_backend() {
            sea_orm::DbBackend::Postgres => owner.lock_exclusive().one(&transaction).await?,
            _ => owner.one(&transaction).await?,
        };
        if owner.is_none() {
            return Ok(Inserted::NoOwner);
        }
        let count = api_tokens::Entity::find().filter(api_tokens::Column::UserName.eq(&row.user_name)).count(&transaction).await?;
        if count >= MOST {
            return Ok(Inserted::TooMany);
        }
        let row = api_tokens::ActiveModel {
            id: Set(row.id),
            user_name: Set(row.user_name),
            name: Set(row.name),
            role: Set(row.role),
            hash: Set(row.hash),
            created_at: Set(row.created_at),
            expires_at: Set(row.expires_at),
            last_used_at: Set(row.last_used_at),
        };
        api_tokens::Entity::insert(row).exec_without_returning(&transaction).await?;
        transaction.commit().await?;
        Ok(Inserted::Done)
    };
    store.run(work).await
}

/// One by id.
pub async fn find(store: &Store, id: &str) -> Result<Option<api_tokens::Model>, Error> {
    let find = api_tokens::Entity::find_by_id(id);
    store.read(move |db| async move { Ok(find.one(&db).await?) }).await
}

/// One page of one owner's, or of everybody's.
pub async fn list(
    store: &Store,
    owner: Option<String>,
    search: Option<String>,
    sort: Sort,
    paging: Paging,
) -> Result<(Vec<api_tokens::Model>, u64), Error> {
    let mut select = api_tokens::Entity::find();
    if let Some(owner) = owner {
        select = select.filter(api_tokens::Column::UserName.eq(owner));
    }
    if let Some(search) = search {
        let word = like(&search);
        let named = Expr::expr(Func::lower(Expr::col(api_tokens::Column::Name))).like(word.clone());
        select = select.filter(Condition::any().add(named).add(Expr::col(api_tokens::Column::Id).like(word)));
    }
    let column = match sort.field {
        "created_at" => api_tokens::Column::CreatedAt,
        "user" => api_tokens::Column::UserName,
        _ => api_tokens::Column::Name,
    };
    let work = move |db: DatabaseConnection| async move {
        let total = select.clone().count(&db).await?;
        let ordered = select.order_by(column, sort.order.into()).order_by_asc(api_tokens::Column::Id);
        Ok((ordered.offset(paging.offset).limit(paging.limit).all(&db).await?, total))
    };
    store.read(work).await
}

/// Removes one; whether it was there.
pub async fn delete(store: &Store, id: &str) -> Result<bool, Error> {
    let delete = api_tokens::Entity::delete_by_id(id);
    store.run(move |db| async move { Ok(delete.exec(&db).await?.rows_affected == 1) }).await
}

/// Notes that one was used, at most once a minute whoever asks.
pub async fn used(store: &Store, id: &str, now: i64) -> Result<(), Error> {
    let before = Condition::any()
        .add(api_tokens::Column::LastUsedAt.is_null())
        .add(api_tokens::Column::LastUsedAt.lte(now.saturating_sub(super::service::USED_EVERY)));
    let update = api_tokens::Entity::update_many()
        .col_expr(api_tokens::Column::LastUsedAt, Expr::value(Some(now)))
        .filter(api_tokens::Column::Id.eq(id))
        .filter(before);
    store.run(move |db| async move { Ok(update.exec(&db).await.map(drop)?) }).await
}
