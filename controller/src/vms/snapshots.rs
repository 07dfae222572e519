//! `GET`, `POST /vms/{provider}/{id}/snapshots`, `DELETE /vms/{provider}/{id}/snapshots/{snapshot}`.
//!
//! Owns: who may do what, that it stands in the audit, once for each key, and the page of the list. Never: keeps a snapshot's row: its agent
//! asks the hypervisor each time. A crash here costs one answer; the agent's act is done or not, and the list says which.

use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, web};
use proto::v1;
use proto::v1::browse::Question;
use serde::{Deserialize, Serialize};
use shared::error::Code;
use shared::segment::segment;
use shared::snapshots::{Snapshot, Wish};
use utoipa::ToSchema;

use super::service::{self, Found};
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::{Operator, Viewer};
use crate::http::idempotency::Idempotency;
use crate::http::query::{Order, Query};
use crate::http::reply::{Error, ErrorBody, Page};
use crate::jobs;
use crate::providers;
use crate::store::fold;
use crate::system::audit;

/// How long an act may take: a snapshot with the memory writes all of it, a removal consolidates. The agent gives up a little before.
const ACT: Duration = Duration::from_secs(930);

/// What shows what an act has done that nobody has answered.
const LOOK: &str = "list the VM's snapshots";

/// A snapshot of a VM.
#[derive(Serialize, ToSchema)]
#[schema(as = Snapshot, example = json!({
    "id": "snapshot-12", "name": "before the update", "description": "", "created_at": "2026-01-02T03:04:05.000Z", "power_state": "poweredOn",
    "memory": true, "quiesced": false, "parent": "snapshot-11", "current": true
}))]
pub struct SnapshotView {
    /// The provider's own id. At libvirt that is the name.
    id: String,
    /// Several of a VM may bear one at vSphere.
    name: String,
    description: String,
    /// By the provider's clock.
    created_at: String,
    /// The VM's when it was taken: `poweredOn`, `poweredOff`, `suspended`.
    power_state: String,
    /// Whether it holds the memory; null where the provider does not say.
    memory: Option<bool>,
    /// Whether the guest calmed its file systems for it; null where the provider does not say.
    quiesced: Option<bool>,
    /// The id of the one that it was taken over.
    parent: Option<String>,
    /// Whether the VM goes on from here.
    current: bool,
    /// `internal` (inside the disks' images) or `external`, at libvirt.
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
}

impl From<Snapshot> for SnapshotView {
    fn from(snapshot: Snapshot) -> Self {
        let Snapshot { id, name, description, created_at, power_state, memory, quiesced, parent, current, kind } = snapshot;
        Self { id, name, description, created_at, power_state, memory, quiesced, parent, current, kind }
    }
}

/// A VM of a hypervisor.
async fn find(app: &App, provider: &str, vm: &str) -> Result<Found, Error> {
    let connection = providers::service::resolve(&app.store, provider).await?;
    let found = service::resolve(&app.store, &connection, vm).await?;
    if !matches!(connection.kind.as_str(), "libvirt" | "vsphere") {
        let message =
            format!("snapshots are of VMs of a hypervisor (libvirt, vsphere); `{}` is of kind `{}`", connection.name, connection.kind);
        return Err(Error::new(Code::Unprocessable, message));
    }
    Ok(found)
}

fn unreadable(e: serde_json::Error) -> Error {
    Error::new(Code::BadGateway, format!("the agent's answer cannot be read: {e}"))
}

/// A VM's snapshots as its provider knows them now.
#[utoipa::path(get, path = "/vms/{provider}/{id}/snapshots", tag = "VMs", security(("token" = [])), params(
    ("provider" = String, Path, description = "connection or kind"), ("id" = String, Path, description = "id, path or name; `/` as %2F"),
    ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "name, id, created_at"), ("order" = Option<String>, Query),
    ("search" = Option<String>, Query, description = "substring of name or id"),
), responses(
    (status = 200, description = "a page of snapshots", body = Page<SnapshotView>),
    (status = 400, description = "an unknown parameter or value, or no or several connections of that kind", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such VM", body = ErrorBody),
    (status = 409, description = "several VMs bear the name", body = ErrorBody),
    (status = 422, description = "a kind that is no hypervisor", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the agent or the hypervisor did not answer", body = ErrorBody),
    (status = 503, description = "the database or the agent is away", body = ErrorBody),
))]
pub async fn list(
    _: Viewer,
    request: HttpRequest,
    path: web::Path<(String, String)>,
    app: web::Data<App>,
) -> Result<web::Json<Page<SnapshotView>>, Error> {
    let query = Query::of(&request, &["search"])?;
    let paging = query.paging()?;
    let sort = query.sort(&["name", "id", "created_at"], "name", Order::Asc)?;
    let search = query.text("search").map(fold);
    let (provider, id) = path.into_inner();
    let found = find(&app, &provider, &id).await?;
    let row = &found.connection;
    let question = Question::Snapshots(v1::Snapshots { connection: Some(providers::service::told(row)), vm_id: found.vm.id.clone() });
    let answer = app.fleet.ask_within(&row.agent_id, question, providers::service::patience(&row.kind)).await?;
    let all = serde_json::from_value(answer).map_err(unreadable)?;
    let rows = sorted(all, search.as_deref(), (sort.field, sort.order));
    Ok(web::Json(paging.cut(rows.into_iter().map(SnapshotView::from).collect())))
}

/// Those that are searched for, in order; equal keys by id.
fn sorted(mut all: Vec<Snapshot>, search: Option<&str>, (field, order): (&str, Order)) -> Vec<Snapshot> {
    if let Some(search) = search {
        all.retain(|snapshot| fold(&format!("{}\n{}", snapshot.name, snapshot.id)).contains(search));
    }
    all.sort_by(|a, b| {
        let by = match field {
            "id" => a.id.cmp(&b.id),
            "created_at" => a.created_at.cmp(&b.created_at),
            _ => a.name.cmp(&b.name),
        };
        let by = if order == Order::Desc { by.reverse() } else { by };
        by.then_with(|| a.id.cmp(&b.id))
    });
    all
}

/// A snapshot to take.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "before the update", "description": "nightly", "memory": false, "quiesce": false}))]
pub struct TakeSnapshot {
    /// 1 to 80 characters; one that the VM has is a conflict.
    name: String,
    /// For people. Default: empty.
    #[serde(default)]
    description: String,
    /// With what the memory holds. Default false; a running domain of libvirt is taken with it only.
    #[serde(default)]
    memory: bool,
    /// With the guest's file systems calmed by its tools (vSphere). Default false.
    #[serde(default)]
    quiesce: bool,
}

/// Takes a snapshot of a VM. Answers when it is there, which with the memory of a large VM takes minutes.
#[utoipa::path(post, path = "/vms/{provider}/{id}/snapshots", tag = "VMs", security(("token" = [])), params(
    ("provider" = String, Path, description = "connection or kind"), ("id" = String, Path, description = "id, path or name; `/` as %2F"),
    ("Idempotency-Key" = Option<String>, Header, description = "the same key and body give the first answer again"),
), request_body = TakeSnapshot, responses(
    (status = 201, description = "it is there", body = SnapshotView, headers(("Location" = String, description = "its path"))),
    (status = 400, description = "the body cannot be read, a field is wrong, or no or several connections of that kind", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such VM", body = ErrorBody),
    (status = 409, description = "several VMs bear the name, the VM has a snapshot of that name, or something else is at it (a job, a checkpoint)",
        body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 422, description = "the hypervisor takes no such snapshot of it, or a kind that is no hypervisor", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the agent or the hypervisor did not answer", body = ErrorBody),
    (status = 503, description = "the database or the agent is away", body = ErrorBody),
))]
pub async fn take(
    caller: Operator,
    request: HttpRequest,
    path: web::Path<(String, String)>,
    app: web::Data<App>,
    body: Json<TakeSnapshot>,
) -> Result<HttpResponse, Error> {
    let (provider, id) = path.into_inner();
    let (digest, store) = (body.digest, &app.store);
    Idempotency::once(&request, &caller, &digest, store, async |key| {
        let TakeSnapshot { name, description, memory, quiesce } = body.value;
        let wish = Wish { name, description, memory, quiesce };
        if let Some(flaw) = wish.flaw() {
            return Err(Error::bad_request(flaw));
        }
        let found = find(&app, &provider, &id).await?;
        let row = &found.connection;
        let question = Question::TakeSnapshot(v1::TakeSnapshot {
            connection: Some(providers::service::told(row)),
            vm_id: found.vm.id.clone(),
            name: wish.name.clone(),
            description: wish.description,
            memory,
            quiesce,
        });
        let subject = format!("{}:{} {}", row.name, found.vm.id, wish.name);
        let act = audit::begin(&app.store, &caller.name, "vm.snapshot.take", &subject).await?;
        let answered = app.fleet.order_within(&row.agent_id, question, ACT, LOOK).await;
        act.finish(&answered).await;
        let made: Snapshot = serde_json::from_value(answered?).map_err(unreadable)?;
        let location = format!("/api/v1/vms/{}/{}/snapshots/{}", row.name, segment(&found.vm.id), segment(&made.id));
        let made = SnapshotView::from(made);
        if let Some(key) = key {
            key.keep(&app.store, 201, &location, &made).await?;
        }
        Ok(HttpResponse::Created().insert_header(("Location", location)).json(made))
    })
    .await
}

/// Removes a snapshot; those that were taken over it stay, unless `children`. The VM is as it was.
#[utoipa::path(delete, path = "/vms/{provider}/{id}/snapshots/{snapshot}", tag = "VMs", security(("token" = [])), params(
    ("provider" = String, Path, description = "connection or kind"), ("id" = String, Path, description = "id, path or name; `/` as %2F"),
    ("snapshot" = String, Path, description = "its id, or its name where no other of the VM bears it"),
    ("children" = Option<bool>, Query, description = "with those that were taken over it"),
), responses(
    (status = 204, description = "it is gone"),
    (status = 400, description = "an unknown parameter or value, or no or several connections of that kind", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such VM or snapshot", body = ErrorBody),
    (status = 409, description = "several bear the name, it is a running job's, or something else is at the VM", body = ErrorBody),
    (status = 422, description = "the hypervisor does not remove it, or a kind that is no hypervisor", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the agent or the hypervisor did not answer", body = ErrorBody),
    (status = 503, description = "the database or the agent is away", body = ErrorBody),
))]
pub async fn remove(
    caller: Operator,
    request: HttpRequest,
    path: web::Path<(String, String, String)>,
    app: web::Data<App>,
) -> Result<HttpResponse, Error> {
    let children = Query::only(&request, &["children"])?.flag("children")?;
    let (provider, id, snapshot) = path.into_inner();
    let found = find(&app, &provider, &id).await?;
    let row = &found.connection;
    let subject = format!("{}:{} {snapshot}{}", row.name, found.vm.id, if children { " with those above it" } else { "" });
    let wanted = v1::RemoveSnapshot {
        connection: Some(providers::service::told(row)),
        vm_id: found.vm.id.clone(),
        snapshot,
        children,
        ended: Vec::new(),
    };
    let act = audit::begin(&app.store, &caller.name, "vm.snapshot.remove", &subject).await?;
    let answered = removed(&app, &row.agent_id, wanted).await;
    act.finish(&answered).await;
    answered?;
    Ok(HttpResponse::NoContent().finish())
}

/// Has it removed. Where its name, or that of one above it, is a job's, that job has to have ended first, whichever agent it is with.
async fn removed(app: &App, agent: &str, wanted: v1::RemoveSnapshot) -> Result<(), Error> {
    let ask = async |ended: Vec<String>| {
        let question = Question::RemoveSnapshot(v1::RemoveSnapshot { ended, ..wanted.clone() });
        let answer = app.fleet.order_within(agent, question, ACT, LOOK).await?;
        let jobs = answer.get("jobs").and_then(|jobs| jobs.as_array()).into_iter().flatten();
        Ok::<_, Error>(jobs.filter_map(|job| job.as_str().map(str::to_owned)).collect::<Vec<_>>())
    };
    let mut ended = Vec::new();
    // Another job may have begun between the two.
    for _ in 0..3 {
        let jobs = ask(ended.clone()).await?;
        let Some(first) = jobs.first() else { return Ok(()) };
        let known = jobs::store::load_many(&app.store, jobs.clone()).await?;
        for id in &jobs {
            let why = match known.iter().find(|job| job.id.as_str() == id) {
                Some(job) if job.state.status.is_final() => continue,
                Some(_) => "which has not ended and removes it by itself",
                None => "which this controller does not know: remove it with the hypervisor's own tools where that job has ended",
            };
            return Err(Error::new(Code::Conflict, format!("a snapshot that would go is of {id}, {why}")));
        }
        tracing::debug!(job = first.as_str(), "an ended job's snapshot is removed");
        ended.extend(jobs);
    }
    Err(Error::new(Code::Conflict, "jobs begin and end at this VM all the time; try it again later"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_searched_and_in_order() {
        let one = |id: &str, name: &str, at: &str| Snapshot {
            id: id.to_owned(),
            name: name.to_owned(),
            created_at: at.to_owned(),
            ..Snapshot::default()
        };
        let all = vec![one("s-2", "b", "2"), one("s-3", "ÄB", "1"), one("s-1", "b", "3")];
        let ids = |search: Option<&str>, sort: (&str, Order)| {
            sorted(all.clone(), search.map(fold).as_deref(), sort).into_iter().map(|snapshot| snapshot.id).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(ids(None, ("name", Order::Asc)), "s-1 s-2 s-3");
        assert_eq!(ids(None, ("name", Order::Desc)), "s-3 s-1 s-2");
        assert_eq!(ids(None, ("created_at", Order::Asc)), "s-3 s-2 s-1");
        assert_eq!((ids(Some("äb"), ("id", Order::Asc)), ids(Some("S-1"), ("id", Order::Asc))), ("s-3".into(), "s-1".into()));
    }
}
