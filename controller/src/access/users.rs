//! Users in the store.
//!
//! Owns: the rows of `users`, and that a change or a removal ends the user's sessions. Never: leaves the installation without an admin.
//! A crash here costs nothing: one transaction per change.

use std::collections::BTreeMap;

use sea_orm::sea_query::{Expr, ExprTrait, OnConflict};
use sea_orm::{
    ActiveValue::{NotSet, Set},
    ColumnTrait, ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder,
    QuerySelect, TransactionTrait,
};
use shared::error::Code;

use super::{Role, password};
use crate::http::query::{Paging, Sort};
use crate::http::reply::Error;
use crate::store::entities::{api_tokens, sessions, users};
use crate::store::{self, Store, like};

/// What a user name may be, for messages.
pub const NAME_RULE: &str = "1 to 64 of a-z, 0-9, `.`, `_`, `-`, `@`, beginning with a letter or digit";

/// Whether a name can be a user's.
pub fn is_name(name: &str) -> bool {
    let inner = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-' | b'@'));
    inner && (1..=64).contains(&name.len()) && name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
}

/// How many there are.
pub async fn count(store: &Store) -> Result<u64, store::Error> {
    store.read(|db| async move { Ok(users::Entity::find().count(&db).await?) }).await
}

/// How many users have a role.
pub async fn count_role(store: &Store, role: Role) -> Result<u64, store::Error> {
    store.read(move |db| async move { Ok(users::Entity::find().filter(users::Column::Role.eq(role.word())).count(&db).await?) }).await
}

/// One by name.
pub async fn find(store: &Store, name: &str) -> Result<Option<users::Model>, store::Error> {
    let name = name.to_owned();
    store.read(|db| async move { Ok(users::Entity::find_by_id(name).one(&db).await?) }).await
}

/// One page of them.
pub async fn list(
    store: &Store,
    search: Option<String>,
    role: Option<String>,
    sort: Sort,
    paging: Paging,
) -> Result<(Vec<users::Model>, u64), store::Error> {
    let work = move |db: DatabaseConnection| async move {
        let mut select = users::Entity::find();
        if let Some(search) = search {
            select = select.filter(Expr::col(users::Column::Name).like(like(&search)));
        }
        if let Some(role) = role {
            select = select.filter(users::Column::Role.eq(role));
        }
        let total = select.clone().count(&db).await?;
        let column = match sort.field {
            "role" => users::Column::Role,
            "created_at" => users::Column::CreatedAt,
            _ => users::Column::Name,
        };
        let ordered = select.order_by(column, sort.order.into()).order_by_asc(users::Column::Name);
        Ok((ordered.offset(paging.offset).limit(paging.limit).all(&db).await?, total))
    };
    store.read(work).await
}

fn row(name: &str, hash: String, role: Role) -> users::ActiveModel {
    let now = shared::clock::now().timestamp_millis();
    users::ActiveModel {
        name: Set(name.to_owned()),
        password_hash: Set(hash),
        role: Set(role.word().to_owned()),
        created_at: Set(now),
        updated_at: Set(now),
    }
}

/// Adds one unless the name is there; whether it was added.
pub async fn insert_if_absent(store: &Store, name: &str, hash: String, role: Role) -> Result<bool, store::Error> {
    let row = row(name, hash, role);
    let work = move |db: DatabaseConnection| async move {
        let keep_first = OnConflict::column(users::Column::Name).do_nothing().to_owned();
        Ok(users::Entity::insert(row).on_conflict(keep_first).exec_without_returning(&db).await? == 1)
    };
    store.run(work).await
}

/// Adds one; a name that is there is a conflict.
pub async fn insert(store: &Store, name: &str, hash: String, role: Role) -> Result<users::Model, Error> {
    if !insert_if_absent(store, name, hash, role).await? {
        return Err(Error::new(Code::Conflict, format!("the user `{name}` exists already")));
    }
    find(store, name).await?.ok_or_else(|| unknown(name))
}

/// What most users' hashes cost; nothing where there is none.
pub async fn usual_cost(store: &Store) -> Result<Option<u32>, store::Error> {
    let work = |db: DatabaseConnection| async move {
        let hashes: Vec<String> = users::Entity::find().select_only().column(users::Column::PasswordHash).into_tuple().all(&db).await?;
        let mut counts = BTreeMap::<u32, usize>::new();
        for cost in hashes.iter().filter_map(|hash| password::cost_of(hash)) {
            *counts.entry(cost).or_default() += 1;
        }
        Ok(counts.into_iter().max_by_key(|(_, count)| *count).map(|(cost, _)| cost))
    };
    store.read(work).await
}

/// Puts a new hash of the same password in the place of the old one, unless that is another by now. Sessions stay.
pub async fn rehash(store: &Store, name: &str, old: &str, new: String) -> Result<(), store::Error> {
    let update = users::Entity::update_many()
        .col_expr(users::Column::PasswordHash, Expr::value(new))
        .filter(users::Column::Name.eq(name))
        .filter(users::Column::PasswordHash.eq(old));
    store.run(|db| async move { Ok(update.exec(&db).await.map(drop)?) }).await
}

/// One by name, as they are until this transaction ends: on Postgres nobody changes or removes them meanwhile, on SQLite nobody writes.
pub async fn hold(transaction: &DatabaseTransaction, name: &str) -> Result<Option<users::Model>, store::Error> {
    let find = users::Entity::find_by_id(name);
    let find = match transaction.get_database_backend() {
        DbBackend::Postgres => find.lock_shared(),
        _ => find,
    };
    Ok(find.one(transaction).await?)
}

async fn end_sessions(transaction: &DatabaseTransaction, name: &str) -> Result<(), store::Error> {
    sessions::Entity::delete_many().filter(sessions::Column::UserName.eq(name)).exec(transaction).await?;
    Ok(())
}

/// Changes password or role, and ends their sessions. The last admin stays one.
pub async fn update(store: &Store, name: &str, hash: Option<String>, role: Option<Role>) -> Result<users::Model, Error> {
    let wanted = name.to_owned();
    let work = move |db: DatabaseConnection| async move {
        let transaction = db.begin().await?;
        let Some(user) = users::Entity::find_by_id(&wanted).one(&transaction).await? else { return Ok(Change::Unknown) };
        if role.is_some_and(|role| role != Role::Admin) && is_last_admin(&transaction, &user).await? {
            return Ok(Change::LastAdmin);
        }
        let change = users::ActiveModel {
            name: Set(wanted.clone()),
            password_hash: hash.map_or(NotSet, Set),
            role: role.map_or(NotSet, |role| Set(role.word().to_owned())),
            created_at: NotSet,
            updated_at: Set(shared::clock::now().timestamp_millis()),
        };
        // The user first: who is logging in at this moment holds their row, and the new session is seen after.
        let user = users::Entity::update(change).exec(&transaction).await?;
        end_sessions(&transaction, &wanted).await?;
        transaction.commit().await?;
        Ok(Change::Done(user))
    };
    match store.run(work).await? {
        Change::Done(user) => Ok(user),
        Change::Unknown => Err(unknown(name)),
        Change::LastAdmin => Err(last_admin()),
    }
}

/// Removes one with its sessions and API tokens, but not the last admin.
pub async fn delete(store: &Store, name: &str) -> Result<(), Error> {
    let wanted = name.to_owned();
    let work = move |db: DatabaseConnection| async move {
        let transaction = db.begin().await?;
        let Some(user) = users::Entity::find_by_id(&wanted).one(&transaction).await? else { return Ok(Change::Unknown) };
        if is_last_admin(&transaction, &user).await? {
            return Ok(Change::LastAdmin);
        }
        // The user first: who logs in or makes a token for them at this moment holds their row, and is seen after.
        users::Entity::delete_by_id(&wanted).exec(&transaction).await?;
        api_tokens::Entity::delete_many().filter(api_tokens::Column::UserName.eq(&wanted)).exec(&transaction).await?;
        end_sessions(&transaction, &wanted).await?;
        transaction.commit().await?;
        Ok(Change::Done(user))
    };
    match store.run(work).await? {
        Change::Done(_) => Ok(()),
        Change::Unknown => Err(unknown(name)),
        Change::LastAdmin => Err(last_admin()),
    }
}

enum Change {
    Done(users::Model),
    Unknown,
    LastAdmin,
}

async fn is_last_admin(db: &impl ConnectionTrait, user: &users::Model) -> Result<bool, store::Error> {
    if user.role != Role::Admin.word() {
        return Ok(false);
    }
    // On Postgres the rows are locked, so two admins cannot remove one another at the same moment.
    let admins = users::Entity::find().filter(users::Column::Role.eq(Role::Admin.word()));
    let admins = match db.get_database_backend() {
        DbBackend::Postgres => admins.lock_exclusive().all(db).await?,
        _ => admins.all(db).await?,
    };
    Ok(admins.len() <= 1)
}

fn unknown(name: &str) -> Error {
    let shown: String = name.chars().take(64).collect();
    Error::not_found(format!("no user `{shown}`; GET /users lists them"))
}

fn last_admin() -> Error {
    Error::new(Code::Conflict, "this is the last admin; make another one first")
}
