//! Rows of alerts.
//!
//! Owns: every query on `alerts`. A change and what the webhooks are to be told of it are one transaction.
//! Never: decides what is wrong. A crash here costs nothing: the next look makes the same change.

use sea_orm::sea_query::{Expr, ExprTrait, OnConflict};
use sea_orm::{
    ActiveValue::Set, ColumnTrait, DatabaseConnection, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, TransactionTrait,
};

use super::rules::{Change, Finding, Key};
use crate::http::query::{Paging, Sort};
use crate::store::entities::alerts;
use crate::store::{Error, Store, fold, like};
use crate::webhooks;

/// How long resolved alerts are kept, in milliseconds.
const HISTORY: i64 = 90 * 24 * 3600 * 1000;
/// Longest message that is kept, in characters.
const MESSAGE: usize = 1000;

/// What a list is narrowed by.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// `active` or `resolved`; absent: both.
    pub state: Option<String>,
    /// `info`, `warning`, `critical`.
    pub severity: Option<String>,
    /// A rule's word.
    pub rule: Option<String>,
    /// Substring of rule, resource, message or id.
    pub search: Option<String>,
    /// Raised at or after, milliseconds since 1970.
    pub since: Option<i64>,
    /// Raised after.
    pub created_after: Option<i64>,
    /// Raised before.
    pub created_before: Option<i64>,
}

/// Every active alert.
pub async fn active(store: &Store) -> Result<Vec<alerts::Model>, Error> {
    let find = alerts::Entity::find().filter(alerts::Column::State.eq("active"));
    store.read(|db| async move { Ok(find.all(&db).await?) }).await
}

fn open_key(key: &Key) -> String {
    format!("{}\n{}", key.rule.word(), key.resource)
}

fn clean(text: &str, most: usize) -> String {
    text.replace('\0', "").chars().take(most).collect()
}

/// The row of a new alert.
pub fn row(finding: &Finding, now: i64) -> alerts::Model {
    let (rule, resource, message) = (finding.key.rule.word(), finding.key.resource.clone(), clean(&finding.message, MESSAGE));
    let id = format!("alert-{}", shared::ids::random_hex::<8>());
    alerts::Model {
        search: fold(&format!("{rule}\n{resource}\n{message}\n{id}")),
        open_key: Some(open_key(&finding.key)),
        rule: rule.to_owned(),
        severity: finding.severity.word().to_owned(),
        state: "active".to_owned(),
        since: now,
        resolved_at: None,
        id,
        resource,
        message,
    }
}

/// Carries changes out; answers the rows that changed, as they are now. What another controller has done already is not among them.
/// `raised`: the rows of what is new, in the order of the changes.
pub async fn apply(store: &Store, changes: Vec<Change>, raised: Vec<alerts::Model>, now: i64) -> Result<Vec<alerts::Model>, Error> {
    let work = move |db: DatabaseConnection| async move {
        let transaction = db.begin().await?;
        let (mut told, mut raised) = (Vec::new(), raised.into_iter());
        for change in changes {
            let changed = match change {
                Change::Raise(_) => {
                    let Some(row) = raised.next() else { continue };
                    let once = OnConflict::column(alerts::Column::OpenKey).do_nothing().to_owned();
                    let insert = alerts::Entity::insert(to_active(&row)).on_conflict(once);
                    (insert.exec_without_returning(&transaction).await? == 1).then_some(row)
                }
                Change::Restate(id, finding) => {
                    // Once, whichever of several controllers says it.
                    let update = alerts::Entity::update_many()
                        .filter(alerts::Column::Severity.ne(finding.severity.word()))
                        .col_expr(alerts::Column::Severity, Expr::value(finding.severity.word()))
                        .col_expr(alerts::Column::Message, Expr::value(clean(&finding.message, MESSAGE)));
                    changed(&transaction, update, &id).await?
                }
                Change::Resolve(id, _) => {
                    let update = alerts::Entity::update_many()
                        .col_expr(alerts::Column::State, Expr::value("resolved"))
                        .col_expr(alerts::Column::OpenKey, Expr::value(None::<String>))
                        .col_expr(alerts::Column::ResolvedAt, Expr::value(Some(now)));
                    changed(&transaction, update, &id).await?
                }
            };
            if let Some(row) = changed {
                // With the moment: one that got critical, better and critical again is told each time.
                let key = format!("alert {} {} {} {now}", row.id, row.state, row.severity);
                webhooks::store::enqueue(&transaction, "alert", &key, &super::routes::AlertView::json(&row), now).await?;
                told.push(row);
            }
        }
        transaction.commit().await?;
        Ok(told)
    };
    store.run(work).await
}

async fn changed(
    db: &impl sea_orm::ConnectionTrait,
    update: sea_orm::UpdateMany<alerts::Entity>,
    id: &str,
) -> Result<Option<alerts::Model>, Error> {
    let update = update.filter(alerts::Column::Id.eq(id)).filter(alerts::Column::State.eq("active"));
    if update.exec(db).await?.rows_affected != 1 {
        return Ok(None);
    }
    Ok(alerts::Entity::find_by_id(id).one(db).await?)
}

fn to_active(row: &alerts::Model) -> alerts::ActiveModel {
    let row = row.clone();
    alerts::ActiveModel {
        id: Set(row.id),
        rule: Set(row.rule),
        resource: Set(row.resource),
        severity: Set(row.severity),
        message: Set(row.message),
        state: Set(row.state),
        open_key: Set(row.open_key),
        search: Set(row.search),
        since: Set(row.since),
        resolved_at: Set(row.resolved_at),
    }
}

/// Removes what was over long ago.
pub async fn forget_old(store: &Store, now: i64) -> Result<(), Error> {
    let old = alerts::Entity::delete_many()
        .filter(alerts::Column::State.eq("resolved"))
        .filter(alerts::Column::Since.lt(now.saturating_sub(HISTORY)))
        .filter(alerts::Column::ResolvedAt.lt(now.saturating_sub(HISTORY)));
    store.run(|db| async move { Ok(old.exec(&db).await.map(drop)?) }).await
}

/// One page of them.
pub async fn list(store: &Store, filter: Filter, sort: Sort, paging: Paging) -> Result<(Vec<alerts::Model>, u64), Error> {
    let mut select = alerts::Entity::find();
    for (column, wanted) in
        [(alerts::Column::State, filter.state), (alerts::Column::Severity, filter.severity), (alerts::Column::Rule, filter.rule)]
    {
        if let Some(wanted) = wanted {
            select = select.filter(column.eq(wanted));
        }
    }
    if let Some(search) = filter.search {
        select = select.filter(Expr::col(alerts::Column::Search).like(like(&search)));
    }
    if let Some(since) = filter.since {
        select = select.filter(alerts::Column::Since.gte(since));
    }
    if let Some(after) = filter.created_after {
        select = select.filter(alerts::Column::Since.gt(after));
    }
    if let Some(before) = filter.created_before {
        select = select.filter(alerts::Column::Since.lt(before));
    }
    // By how bad it is, not by the alphabet: critical is the largest.
    let severity = Expr::case(Expr::col(alerts::Column::Severity).eq("critical"), 2)
        .case(Expr::col(alerts::Column::Severity).eq("warning"), 1)
        .finally(0);
    let key: sea_orm::sea_query::SimpleExpr = match sort.field {
        "severity" => severity.into(),
        "rule" => Expr::col(alerts::Column::Rule),
        "resource" => Expr::col(alerts::Column::Resource),
        _ => Expr::col(alerts::Column::Since),
    };
    let work = move |db: DatabaseConnection| async move {
        let total = select.clone().count(&db).await?;
        let ordered = select.order_by(key, sort.order.into()).order_by(alerts::Column::Id, sort.order.into());
        Ok((ordered.offset(paging.offset).limit(paging.limit).all(&db).await?, total))
    };
    store.read(work).await
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
