//! The inventory: taken over from agents, listed, looked up.
//!
//! Owns: the rows of `vms`. Never: keeps a VM that its connection no longer tells. A crash here costs nothing: one transaction per inventory.

use proto::v1;
use proto::v1::browse::Question;
use sea_orm::sea_query::{Expr, ExprTrait};
use sea_orm::{
    ActiveValue::Set, ColumnTrait, Condition, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, TransactionTrait,
};
use shared::details::Details;
use shared::error::Code;
use shared::guest::Guest;
use shared::vm::Vm;

use crate::app::App;
use crate::http::query::{Paging, Sort};
use crate::http::reply::Error;
use crate::store::entities::{connections, vms};
use crate::store::{self, Store, fold, like};

/// Rows of one INSERT: 12 values each, far under the limits of both databases.
const CHUNK: usize = 200;

/// A VM and how it is reached.
#[derive(Clone, Debug)]
pub struct Found {
    /// Through this connection.
    pub connection: connections::Model,
    /// As its provider told it.
    pub vm: Vm,
}

/// What a list is narrowed by.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// `running`, `stopped`, `suspended`.
    pub status: Option<String>,
    /// Kind or connection name.
    pub provider: Option<String>,
    /// OS family.
    pub os: Option<String>,
    /// Substring of name or id.
    pub search: Option<String>,
}

/// The filter word of a power state.
pub fn status(power_state: &str) -> &'static str {
    match power_state {
        "poweredOn" => "running",
        "suspended" => "suspended",
        _ => "stopped",
    }
}

/// What the provider knows of a VM beyond its inventory, asked now; nothing where the provider's kind knows no more. `privileges`: with what
/// the connection's account may do.
pub async fn describe(app: &App, found: &Found, privileges: bool) -> Result<Option<Details>, Error> {
    if found.connection.kind != "vsphere" {
        return Ok(None);
    }
    let row = &found.connection;
    let connection = crate::providers::service::told(row);
    let question = Question::Describe(v1::Describe { connection: Some(connection), vm_id: found.vm.id.clone(), privileges });
    let answer = app.fleet.ask_within(&row.agent_id, question, crate::providers::service::patience(&row.kind)).await?;
    serde_json::from_value(answer).map(Some).map_err(|e| Error::new(Code::BadGateway, format!("the agent's answer cannot be read: {e}")))
}

/// What lies on a VM's disks, looked at now. Refused where that would touch its source: while it is not off.
pub async fn look_inside(app: &App, found: &Found) -> Result<Guest, Error> {
    let (row, vm) = (&found.connection, &found.vm);
    if !vm.problem.is_empty() {
        return Err(Error::new(Code::Unprocessable, vm.problem.clone()));
    }
    if vm.power_state != "poweredOff" {
        let message = format!("`{}` is {}: its disks are looked at while it is off", vm.name, vm.power_state);
        return Err(Error::new(Code::Unprocessable, message));
    }
    let connection = crate::providers::service::told(row);
    let question = Question::LookInside(v1::LookInside { connection: Some(connection), vm_id: vm.id.clone() });
    let answer = app.fleet.ask_within(&row.agent_id, question, crate::providers::service::patience(&row.kind)).await?;
    serde_json::from_value(answer).map_err(|e| Error::new(Code::BadGateway, format!("the agent's answer cannot be read: {e}")))
}

/// Takes the inventory of a connection over. Nothing happens when the connection is not that agent's (any more).
pub async fn replace(store: &Store, agent_id: &str, connection: &str, list: Vec<Vm>) -> Result<(), store::Error> {
    let (agent_id, connection) = (agent_id.to_owned(), connection.to_owned());
    let now = shared::clock::now().timestamp_millis();
    let work = move |db: sea_orm::DatabaseConnection| async move {
        let transaction = db.begin().await?;
        let row = connections::Entity::find_by_id(&connection).one(&transaction).await?;
        let Some(row) = row.filter(|row| row.agent_id == agent_id) else {
            tracing::warn!(agent_id, connection, "inventory of a connection that is not this agent's is dropped");
            return Ok(());
        };
        vms::Entity::delete_many().filter(vms::Column::Connection.eq(&connection)).exec(&transaction).await?;
        insert(&transaction, &row, &list, now).await?;
        seen(&transaction, &connection, now).await?;
        transaction.commit().await?;
        Ok(())
    };
    store.run(work).await
}

/// Takes over what has changed of a connection's inventory: VMs that are others now or new, and the ids of those that have gone. Nothing
/// happens when the connection is not that agent's (any more).
pub async fn merge(store: &Store, agent_id: &str, connection: &str, list: Vec<Vm>, gone: Vec<String>) -> Result<(), store::Error> {
    let (agent_id, connection) = (agent_id.to_owned(), connection.to_owned());
    let now = shared::clock::now().timestamp_millis();
    let work = move |db: sea_orm::DatabaseConnection| async move {
        let transaction = db.begin().await?;
        let row = connections::Entity::find_by_id(&connection).one(&transaction).await?;
        let Some(row) = row.filter(|row| row.agent_id == agent_id) else {
            tracing::warn!(agent_id, connection, "changes of a connection that is not this agent's are dropped");
            return Ok(());
        };
        let old: Vec<String> = list.iter().map(|vm| &vm.id).chain(&gone).map(|id| clean(id)).collect();
        for chunk in old.chunks(CHUNK) {
            let those = vms::Column::Connection.eq(&connection).and(vms::Column::Id.is_in(chunk));
            vms::Entity::delete_many().filter(those).exec(&transaction).await?;
        }
        insert(&transaction, &row, &list, now).await?;
        seen(&transaction, &connection, now).await?;
        transaction.commit().await?;
        Ok(())
    };
    store.run(work).await
}

async fn insert(db: &sea_orm::DatabaseTransaction, connection: &connections::Model, list: &[Vm], now: i64) -> Result<(), store::Error> {
    let mut rows = Vec::with_capacity(list.len());
    let mut seen = std::collections::HashSet::new();
    for vm in list {
        // An id twice would be the provider's defect; the first one stays, the inventory is not lost for it.
        if seen.insert(vm.id.as_str()) {
            rows.push(row_of(connection, vm, now)?);
        }
    }
    for chunk in rows.chunks(CHUNK) {
        vms::Entity::insert_many(chunk.to_vec()).exec(db).await?;
    }
    Ok(())
}

/// The connection answers.
async fn seen(db: &sea_orm::DatabaseTransaction, connection: &str, now: i64) -> Result<(), store::Error> {
    connections::Entity::update_many()
        .col_expr(connections::Column::Status, Expr::value("connected"))
        .col_expr(connections::Column::LastError, Expr::value(None::<String>))
        .col_expr(connections::Column::LastSeen, Expr::value(Some(now)))
        .filter(connections::Column::Name.eq(connection))
        .exec(db)
        .await?;
    Ok(())
}

/// Postgres refuses NUL in text; no provider means one.
fn clean(text: &str) -> String {
    text.replace('\0', "")
}

fn row_of(connection: &connections::Model, vm: &Vm, now: i64) -> Result<vms::ActiveModel, store::Error> {
    let detail = serde_json::to_string(vm).map_err(|e| store::Error::Other(e.to_string()))?;
    Ok(vms::ActiveModel {
        connection: Set(connection.name.clone()),
        id: Set(clean(&vm.id)),
        name: Set(clean(&vm.name)),
        path: Set(clean(&vm.path)),
        kind: Set(connection.kind.clone()),
        os: Set(clean(&vm.os)),
        status: Set(status(&vm.power_state).to_owned()),
        cpu: Set(i64::from(vm.cpu)),
        memory_mb: Set(i64::try_from(vm.memory_mb).unwrap_or(i64::MAX)),
        search: Set(fold(&format!("{}\n{}", clean(&vm.name), clean(&vm.id)))),
        detail: Set(detail),
        last_seen: Set(now),
    })
}

/// Notes that a connection's inventory could not be read. What was seen before stays listed with its old `last_seen`.
pub async fn failed(store: &Store, agent_id: &str, connection: &str, error: &str) -> Result<(), store::Error> {
    let (agent_id, connection, error) = (agent_id.to_owned(), connection.to_owned(), error.replace('\0', ""));
    let work = move |db: sea_orm::DatabaseConnection| async move {
        connections::Entity::update_many()
            .col_expr(connections::Column::Status, Expr::value("error"))
            .col_expr(connections::Column::LastError, Expr::value(Some(error)))
            .filter(connections::Column::Name.eq(connection))
            .filter(connections::Column::AgentId.eq(agent_id))
            .exec(&db)
            .await?;
        Ok(())
    };
    store.run(work).await
}

/// One page of the inventory.
pub async fn list(store: &Store, filter: Filter, sort: Sort, paging: Paging) -> Result<(Vec<vms::Model>, u64), store::Error> {
    let work = move |db: sea_orm::DatabaseConnection| async move {
        let mut select = vms::Entity::find();
        if let Some(status) = filter.status {
            select = select.filter(vms::Column::Status.eq(status));
        }
        if let Some(provider) = filter.provider {
            select = select.filter(Condition::any().add(vms::Column::Kind.eq(&provider)).add(vms::Column::Connection.eq(provider)));
        }
        if let Some(os) = filter.os {
            select = select.filter(vms::Column::Os.eq(os));
        }
        if let Some(search) = filter.search {
            select = select.filter(Expr::col(vms::Column::Search).like(like(&search)));
        }
        let total = select.clone().count(&db).await?;
        let column = match sort.field {
            "id" => vms::Column::Id,
            "path" => vms::Column::Path,
            "provider" => vms::Column::Kind,
            "os" => vms::Column::Os,
            "status" => vms::Column::Status,
            "cpu" => vms::Column::Cpu,
            "memory_mb" => vms::Column::MemoryMb,
            "last_seen" => vms::Column::LastSeen,
            _ => vms::Column::Name,
        };
        let ordered = select.order_by(column, sort.order.into()).order_by_asc(vms::Column::Id).order_by_asc(vms::Column::Connection);
        let rows = ordered.offset(paging.offset).limit(paging.limit).all(&db).await?;
        Ok((rows, total))
    };
    store.read(work).await
}

/// Whether a VM of the connection bears this name.
pub async fn is_named(store: &Store, connection: &str, name: &str) -> Result<bool, Error> {
    let (connection, name) = (connection.to_owned(), name.to_owned());
    let work = move |db: sea_orm::DatabaseConnection| async move {
        let those = vms::Column::Connection.eq(connection).and(vms::Column::Name.eq(name));
        Ok(vms::Entity::find().filter(those).count(&db).await? > 0)
    };
    Ok(store.read(work).await?)
}

/// Finds a VM of a connection by name, inventory path or id. A name that several bear is refused with their paths.
pub async fn resolve(store: &Store, connection: &connections::Model, vm_name: &str) -> Result<Found, Error> {
    let (name, wanted) = (connection.name.clone(), vm_name.to_owned());
    let work = move |db: sea_orm::DatabaseConnection| async move {
        let matches =
            Condition::any().add(vms::Column::Id.eq(&wanted)).add(vms::Column::Path.eq(&wanted)).add(vms::Column::Name.eq(&wanted));
        let select = vms::Entity::find().filter(vms::Column::Connection.eq(name)).filter(matches);
        Ok(select.order_by_asc(vms::Column::Path).limit(20).all(&db).await?)
    };
    let rows = if vm_name.contains('\0') { Vec::new() } else { store.read(work).await? };
    // An id or a path says exactly which; only names can be shared.
    let exact: Vec<&vms::Model> = rows.iter().filter(|row| row.id == vm_name || row.path == vm_name).collect();
    let row = match (exact.as_slice(), rows.as_slice()) {
        ([row], _) => *row,
        ([], [row]) => row,
        ([], []) => {
            let message = format!("no VM `{vm_name}` in `{}`; GET /vms/list?provider={} lists them", connection.name, connection.name);
            return Err(Error::not_found(message));
        }
        (_, several) => {
            let paths: Vec<&str> = several.iter().map(|row| row.path.as_str()).collect();
            let message = format!("several VMs bear the name `{vm_name}`; name one by its path: {}", paths.join(", "));
            return Err(Error::new(Code::Ambiguous, message).detail(serde_json::json!({ "paths": paths })));
        }
    };
    let vm = serde_json::from_str(&row.detail).map_err(Error::internal)?;
    Ok(Found { connection: connection.clone(), vm })
}
