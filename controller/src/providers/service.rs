//! Connections: configured on an agent or made by people; found by name or kind.
//!
//! Owns: the rows of `connections`. Never: gives one connection to two agents. A crash here costs nothing.

use std::collections::HashMap;
use std::time::Duration;

use proto::v1;
use sea_orm::sea_query::Expr;
use sea_orm::{ActiveValue::Set, ColumnTrait, Condition, DatabaseConnection, EntityTrait, QueryFilter, QueryOrder, TransactionTrait};
use shared::error::Code;

use super::account::Kept;
use crate::http::reply::Error;
use crate::store::entities::{connections, vms};
use crate::store::{self, Store};

/// Kinds of the contract.
pub const KINDS: &[&str] = &["local", "libvirt", "vsphere"];

/// How long an agent may take to look at a connection of a kind: a hypervisor that hangs is told within 30 s, a folder sooner.
pub fn patience(kind: &str) -> Duration {
    Duration::from_secs(if kind == "local" { 10 } else { 28 })
}

/// A connection as an agent is told of it in a question; the account it has from its Welcome.
pub fn told(row: &connections::Model) -> v1::Connection {
    v1::Connection { name: row.name.clone(), kind: row.kind.clone(), path: row.path.clone(), account: None }
}

/// The connection that every agent offers over its root `images`.
pub const CATALOGUE: &str = "images";

/// Whether a name can be a connection's: 1 to 63 of `[a-z0-9-_.]`, beginning with a letter or digit.
pub fn is_name(name: &str) -> bool {
    let inner = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_' | b'.'));
    inner && (1..=63).contains(&name.len()) && name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
}

/// Every connection, by name.
pub async fn all(store: &Store) -> Result<Vec<connections::Model>, store::Error> {
    let work =
        |db: DatabaseConnection| async move { Ok(connections::Entity::find().order_by_asc(connections::Column::Name).all(&db).await?) };
    store.read(work).await
}

/// The connections that an agent serves.
pub async fn for_agent(store: &Store, agent_id: &str) -> Result<Vec<connections::Model>, store::Error> {
    let agent_id = agent_id.to_owned();
    let work = |db: DatabaseConnection| async move {
        let select = connections::Entity::find().filter(connections::Column::AgentId.eq(agent_id));
        Ok(select.order_by_asc(connections::Column::Name).all(&db).await?)
    };
    store.read(work).await
}

/// A connection by name, or by kind where just one of that kind is connected; else 400 that lists them.
pub async fn resolve(store: &Store, provider: &str) -> Result<connections::Model, Error> {
    let list = all(store).await?;
    if let Some(row) = list.iter().find(|row| row.name == provider) {
        return Ok(row.clone());
    }
    let mut of_kind: Vec<&connections::Model> = list.iter().filter(|row| row.kind == provider).collect();
    // The catalogue of imports is of kind `local` and always there: it makes no other one ambiguous.
    if of_kind.len() > 1 {
        of_kind.retain(|row| row.name != CATALOGUE || row.origin != "agent");
    }
    if let [only] = of_kind.as_slice() {
        return Ok((*only).clone());
    }
    let names = |rows: &mut dyn Iterator<Item = &connections::Model>| {
        rows.map(|row| format!("`{}` ({})", row.name, row.kind)).collect::<Vec<_>>().join(", ")
    };
    let message = match (of_kind.len(), list.len()) {
        (0, 0) => format!("provider `{provider}` is unknown: nothing is connected yet; POST /providers/connect connects one"),
        (0, _) => format!("provider `{provider}` is no connection's name and no connected kind; connected: {}", names(&mut list.iter())),
        _ => format!("several connections are of kind `{provider}`; name one: {}", names(&mut of_kind.iter().copied())),
    };
    Err(Error::bad_request(message))
}

/// Takes over what an agent says it has configured: new ones are added, known ones updated, those it no longer has are removed.
///
/// A name that another agent serves already is not taken from it: the newcomer's is refused with a warning, and its operator gives it
/// another one. Returns the names that were refused.
pub async fn ensure(store: &Store, agent_id: &str, configured: Vec<v1::Connection>) -> Result<Vec<String>, store::Error> {
    let agent_id = agent_id.to_owned();
    let now = shared::clock::now().timestamp_millis();
    let work = move |db: DatabaseConnection| async move {
        let transaction = db.begin().await?;
        let known: HashMap<String, connections::Model> =
            connections::Entity::find().all(&transaction).await?.into_iter().map(|row| (row.name.clone(), row)).collect();
        let mut refused = Vec::new();
        for connection in &configured {
            let taken = known.get(&connection.name).is_some_and(|row| row.agent_id != agent_id || row.origin != "agent");
            if taken || !is_name(&connection.name) || !KINDS.contains(&connection.kind.as_str()) || connection.path.contains('\0') {
                tracing::warn!(
                    agent_id,
                    connection = connection.name,
                    kind = connection.kind,
                    "connection of the agent is refused: taken or malformed"
                );
                refused.push(connection.name.clone());
                continue;
            }
            let row = row(connection, None, &agent_id, "agent", now);
            if known.contains_key(&connection.name) {
                let same =
                    connections::ActiveModel { created_at: sea_orm::ActiveValue::NotSet, last_seen: sea_orm::ActiveValue::NotSet, ..row };
                connections::Entity::update(same).exec(&transaction).await?;
            } else {
                connections::Entity::insert(row).exec(&transaction).await?;
            }
        }
        let gone: Vec<String> = known
            .values()
            .filter(|row| row.agent_id == agent_id && row.origin == "agent")
            .filter(|row| !configured.iter().any(|connection| connection.name == row.name))
            .map(|row| row.name.clone())
            .collect();
        for name in gone {
            remove_rows(&transaction, &name).await?;
        }
        transaction.commit().await?;
        Ok(refused)
    };
    store.run(work).await
}

fn row(connection: &v1::Connection, account: Option<Kept>, agent_id: &str, origin: &str, now: i64) -> connections::ActiveModel {
    connections::ActiveModel {
        name: Set(connection.name.clone()),
        kind: Set(connection.kind.clone()),
        agent_id: Set(agent_id.to_owned()),
        path: Set(connection.path.clone()),
        origin: Set(origin.to_owned()),
        status: Set("connected".to_owned()),
        last_error: Set(None),
        last_seen: Set(None),
        created_at: Set(now),
        updated_at: Set(now),
        settings: Set(account.as_ref().map(|kept| kept.settings.clone())),
        secret: Set(account.map(|kept| kept.secret)),
    }
}

/// Marks the connections of an agent that went away (`away`) or came back (`connected`).
pub async fn agent_here(store: &Store, agent_id: &str, here: bool) -> Result<(), store::Error> {
    let agent_id = agent_id.to_owned();
    let (from, to) = if here { ("away", "connected") } else { ("connected", "away") };
    let work = move |db: DatabaseConnection| async move {
        connections::Entity::update_many()
            .col_expr(connections::Column::Status, Expr::value(to))
            .filter(connections::Column::AgentId.eq(agent_id))
            .filter(connections::Column::Status.eq(from))
            .exec(&db)
            .await?;
        Ok(())
    };
    store.run(work).await
}

/// A connection by name.
pub async fn by_name(store: &Store, name: &str) -> Result<connections::Model, Error> {
    let wanted = name.to_owned();
    let work = |db: DatabaseConnection| async move { Ok(connections::Entity::find_by_id(wanted).one(&db).await?) };
    let row = if is_name(name) { store.read(work).await? } else { None };
    row.ok_or_else(|| Error::not_found(format!("no connection `{name}`; GET /providers lists them")))
}

/// Adds a connection that a person made; a name that exists is a conflict. The row of `replay` is inserted in the same transaction.
pub async fn add(
    store: &Store,
    agent_id: &str,
    connection: &v1::Connection,
    account: Option<Kept>,
    replay: impl FnOnce(&connections::Model) -> Option<store::entities::idempotency::ActiveModel> + Send + 'static,
) -> Result<connections::Model, store::Error> {
    let (agent_id, connection) = (agent_id.to_owned(), connection.clone());
    let now = shared::clock::now().timestamp_millis();
    let work = move |db: DatabaseConnection| async move {
        let transaction = db.begin().await?;
        connections::Entity::insert(row(&connection, account, &agent_id, "rest", now)).exec(&transaction).await?;
        let made = connections::Entity::find_by_id(&connection.name).one(&transaction).await?;
        let made = made.ok_or_else(|| store::Error::Other("the row just inserted is not there".to_owned()))?;
        if let Some(extra) = replay(&made) {
            store::entities::idempotency::Entity::insert(extra).exec(&transaction).await?;
        }
        transaction.commit().await?;
        Ok(made)
    };
    store.run(work).await
}

/// Moves a connection to another folder, host, account or agent, if it is still as it was read; what was seen through it before goes.
pub async fn change(store: &Store, row: &connections::Model, agent_id: &str, path: &str, account: Option<Kept>) -> Result<(), Error> {
    let (row, agent_id, path) = (row.clone(), agent_id.to_owned(), path.to_owned());
    let (settings, secret) = account.map_or((None, None), |kept| (Some(kept.settings), Some(kept.secret)));
    let work = move |db: DatabaseConnection| async move {
        let transaction = db.begin().await?;
        let update = connections::Entity::update_many()
            .col_expr(connections::Column::AgentId, Expr::value(agent_id))
            .col_expr(connections::Column::Path, Expr::value(path))
            .col_expr(connections::Column::Settings, Expr::value(settings))
            .col_expr(connections::Column::Secret, Expr::value(secret))
            .col_expr(connections::Column::Status, Expr::value("connected"))
            .col_expr(connections::Column::LastError, Expr::value(None::<String>))
            .col_expr(connections::Column::LastSeen, Expr::value(None::<i64>))
            .col_expr(connections::Column::UpdatedAt, Expr::value(shared::clock::now().timestamp_millis()))
            .filter(connections::Column::Name.eq(&row.name))
            .filter(connections::Column::AgentId.eq(&row.agent_id))
            .filter(connections::Column::Path.eq(&row.path));
        if update.exec(&transaction).await?.rows_affected != 1 {
            return Ok(false);
        }
        vms::Entity::delete_many().filter(vms::Column::Connection.eq(&row.name)).exec(&transaction).await?;
        transaction.commit().await?;
        Ok(true)
    };
    match store.run(work).await? {
        true => Ok(()),
        false => Err(Error::new(Code::Conflict, "the connection was changed at the same moment; look again")),
    }
}

/// Removes a connection and what was seen through it; one that an agent has configured is that agent's to remove.
pub async fn remove(store: &Store, row: &connections::Model) -> Result<(), Error> {
    if row.origin == "agent" {
        let message = format!("`{}` is configured on its agent; remove it there", row.name);
        return Err(Error::new(Code::Conflict, message));
    }
    let name = row.name.clone();
    let work = |db: DatabaseConnection| async move {
        let transaction = db.begin().await?;
        remove_rows(&transaction, &name).await?;
        transaction.commit().await?;
        Ok(())
    };
    Ok(store.run(work).await?)
}

async fn remove_rows(db: &impl sea_orm::ConnectionTrait, name: &str) -> Result<(), store::Error> {
    vms::Entity::delete_many().filter(vms::Column::Connection.eq(name)).exec(db).await?;
    connections::Entity::delete_many().filter(Condition::all().add(connections::Column::Name.eq(name))).exec(db).await?;
    Ok(())
}
