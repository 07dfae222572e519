//! `GET /system/alerts`.
//!
//! Owns: how an alert is shown, here, on the WebSocket and to webhooks. Never: changes one. A crash here costs one answer.

use actix_web::{HttpRequest, web};
use serde::Serialize;
use utoipa::ToSchema;

use super::rules::{Rule, Severity};
use super::store::{self, Filter};
use crate::app::App;
use crate::http::guard::Viewer;
use crate::http::query::{Order, Query};
use crate::http::reply::{Error, ErrorBody, Page};
use crate::http::rfc3339;
use crate::store::entities::alerts;

/// An alert.
#[derive(Serialize, ToSchema)]
#[schema(as = Alert, example = json!({
    "id": "alert-5f0c2a9be1d34c77", "rule": "agent_lost", "resource": "agent kvm-1", "severity": "critical", "state": "active",
    "message": "agent `kvm-1` is away for 61 s; 2 jobs wait for it; start it again, or remove it",
    "since": "2026-01-02T03:04:05.678Z", "resolved_at": null
}))]
pub struct AlertView {
    id: String,
    /// Which rule found it: agent_lost, disk_low, queue_stuck, job_failing, certificate_expiring, source_unreachable, clock_skew,
    /// database_slow, database_away, deadline_missed.
    rule: String,
    /// What it is about.
    resource: String,
    /// `info`, `warning` or `critical`.
    severity: String,
    /// `active` or `resolved`.
    state: String,
    /// What is wrong and what would mend it.
    message: String,
    /// When it was raised.
    since: String,
    /// When it was over; null while it is active.
    resolved_at: Option<String>,
}

impl From<alerts::Model> for AlertView {
    fn from(row: alerts::Model) -> Self {
        Self {
            id: row.id,
            rule: row.rule,
            resource: row.resource,
            severity: row.severity,
            state: row.state,
            message: row.message,
            since: rfc3339(row.since),
            resolved_at: row.resolved_at.map(rfc3339),
        }
    }
}

impl AlertView {
    /// As frames and webhooks carry it.
    pub fn json(row: &alerts::Model) -> serde_json::Value {
        serde_json::to_value(Self::from(row.clone())).unwrap_or_default()
    }
}

/// What is wrong now, or was.
#[utoipa::path(get, path = "/system/alerts", tag = "System", security(("token" = [])), params(
    ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "since (default, newest first), severity, rule, resource"), ("order" = Option<String>, Query),
    ("state" = Option<String>, Query, description = "active (default), resolved, all"),
    ("severity" = Option<String>, Query, description = "info, warning, critical"), ("rule" = Option<String>, Query),
    ("search" = Option<String>, Query, description = "substring of id, rule, resource or message"),
    ("since" = Option<String>, Query, description = "raised at or after this time"),
    ("created_after" = Option<String>, Query), ("created_before" = Option<String>, Query),
), responses(
    (status = 200, description = "a page of alerts", body = Page<AlertView>),
    (status = 400, description = "an unknown parameter or value", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn list(_: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Page<AlertView>>, Error> {
    let query = Query::of(&request, &["state", "severity", "rule", "search", "since", "created_after", "created_before"])?;
    let (paging, sort) = (query.paging()?, query.sort(&["since", "severity", "rule", "resource"], "since", Order::Desc)?);
    let time = |name: &str| Ok::<_, Error>(query.time(name)?.map(|time| time.timestamp_millis()));
    let filter = Filter {
        state: match query.word("state", &["active", "resolved", "all"])? {
            Some("all") => None,
            word => Some(word.unwrap_or("active").to_owned()),
        },
        severity: query.word("severity", Severity::ALL)?.map(str::to_owned),
        rule: query.word("rule", Rule::ALL)?.map(str::to_owned),
        search: query.text("search").map(str::to_owned),
        since: time("since")?,
        created_after: time("created_after")?,
        created_before: time("created_before")?,
    };
    let (rows, total) = store::list(&app.store, filter, sort, paging).await?;
    Ok(web::Json(paging.page(rows.into_iter().map(AlertView::from).collect(), total)))
}
