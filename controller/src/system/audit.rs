//! Audit: who did what. A row stands before the act and is completed after it; one that a crash left open shows as "timed out".
//!
//! Owns: the rows of `audit`. Never: holds a secret. A crash here costs the outcome of one act.

use sea_orm::sea_query::{Expr, ExprTrait};
use sea_orm::{
    ActiveValue::NotSet, ActiveValue::Set, ColumnTrait, DatabaseConnection, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder,
    QuerySelect,
};

use crate::http::query::{Paging, Sort};
use crate::http::reply::Error;
use crate::store::entities::audit;
use crate::store::{self, Store};

/// An act that was begun.
pub struct Act {
    store: Store,
    id: i32,
}

/// Writes the row; the act must not happen where this fails.
pub async fn begin(store: &Store, caller: &str, action: &str, target: &str) -> Result<Act, Error> {
    let row = audit::ActiveModel {
        id: NotSet,
        time: Set(shared::clock::now().timestamp_millis()),
        caller: Set(caller.to_owned()),
        action: Set(action.to_owned()),
        target: Set(target.replace('\0', "").chars().take(500).collect()),
        outcome: Set(None),
        finished_at: Set(None),
    };
    let id = store.run(|db| async move { Ok(audit::Entity::insert(row).exec(&db).await?.last_insert_id) }).await?;
    Ok(Act { store: store.clone(), id })
}

impl Act {
    /// Completes the row. The act is done, so a database that is away now only costs the outcome.
    pub async fn finish<T>(self, outcome: &Result<T, Error>) {
        let word = match outcome {
            Ok(_) => "ok".to_owned(),
            Err(e) => format!("{}: {}", e.code().word(), e.message()),
        };
        self.complete(word).await;
    }

    /// Completes the row of an act that has more to say than that it went well.
    pub async fn complete(self, word: String) {
        let id = self.id;
        let work = move |db: DatabaseConnection| async move {
            audit::Entity::update_many()
                .col_expr(audit::Column::Outcome, Expr::value(Some(word)))
                .col_expr(audit::Column::FinishedAt, Expr::value(Some(shared::clock::now().timestamp_millis())))
                .filter(audit::Column::Id.eq(id))
                .exec(&db)
                .await?;
            Ok(())
        };
        if let Err(e) = self.store.run(work).await {
            tracing::warn!(audit = id, cause = %e, "outcome of an act is not written");
        }
    }
}

/// One page of it. `search` looks in caller, action and target.
pub async fn list(store: &Store, search: Option<String>, sort: Sort, paging: Paging) -> Result<(Vec<audit::Model>, u64), store::Error> {
    let work = move |db: DatabaseConnection| async move {
        let mut select = audit::Entity::find();
        if let Some(search) = search {
            let word = store::like(&search);
            let found = [audit::Column::Caller, audit::Column::Action, audit::Column::Target]
                .into_iter()
                .fold(sea_orm::Condition::any(), |any, column| {
                    any.add(Expr::expr(sea_orm::sea_query::Func::lower(Expr::col(column))).like(word.clone()))
                });
            select = select.filter(found);
        }
        let total = select.clone().count(&db).await?;
        let column = match sort.field {
            "caller" => audit::Column::Caller,
            "action" => audit::Column::Action,
            _ => audit::Column::Time,
        };
        let ordered = select.order_by(column, sort.order.into()).order_by(audit::Column::Id, sort.order.into());
        Ok((ordered.offset(paging.offset).limit(paging.limit).all(&db).await?, total))
    };
    store.read(work).await
}
