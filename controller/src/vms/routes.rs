//! `GET /vms/list`, `GET /vms/{provider}/{id}`, `POST /vms/browse`.

use actix_web::{HttpRequest, web};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::error::Code;
use shared::guest::{Finding, Guest};
use utoipa::ToSchema;

use super::service::{self, Filter, Found};
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::Viewer;
use crate::http::query::{Order, Query};
use crate::http::reply::{Error, ErrorBody, Page};
use crate::http::rfc3339;
use crate::providers;
use crate::store::entities::vms;

/// A virtual machine.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "web-server-01.ova", "name": "web-server-01", "path": "web-server-01.ova", "provider": "local", "connection": "vms", "os": "linux",
    "os_version": "RHEL 9.3", "cpu": 4, "memory_mb": 8192, "firmware": "uefi",
    "disks": [{"name": "disk-0", "size_gb": 100, "size_bytes": 107374182400u64, "format": "vmdk", "thin_provisioned": true}],
    "nics": [{"name": "nic-0", "type": "vmxnet3", "network": "VM Network", "mac": "00:50:56:ab:cd:ef"}],
    "power_state": "poweredOff", "status": "stopped", "tools_status": "unknown", "guest_tools": "unknown", "snapshots": 0, "template": false,
    "last_seen": "2026-01-02T03:04:05.678Z"
}))]
pub struct VmView {
    id: String,
    name: String,
    path: String,
    /// The connection's kind.
    provider: String,
    connection: String,
    os: String,
    os_version: String,
    cpu: u32,
    memory_mb: u64,
    /// `bios` or `uefi`.
    firmware: String,
    disks: Vec<DiskView>,
    nics: Vec<NicView>,
    /// `poweredOn`, `poweredOff` or `suspended`.
    power_state: String,
    /// The same as the filter takes it: `running`, `stopped`, `suspended`.
    status: String,
    /// `running`, `notRunning` or `unknown`.
    tools_status: String,
    /// The same.
    guest_tools: String,
    snapshots: u32,
    /// Whether it is a template.
    template: bool,
    /// Why it cannot be exported, where it cannot.
    #[serde(skip_serializing_if = "String::is_empty")]
    problem: String,
    last_seen: String,
}

/// A virtual disk.
#[derive(Serialize, ToSchema)]
pub struct DiskView {
    name: String,
    /// GiB; whole where the capacity is.
    #[schema(value_type = f64)]
    size_gb: Value,
    size_bytes: u64,
    /// The provider's own word.
    format: String,
    thin_provisioned: bool,
}

/// A network card.
#[derive(Serialize, ToSchema)]
pub struct NicView {
    name: String,
    /// The model in the provider's own words.
    #[serde(rename = "type")]
    model: String,
    network: String,
    mac: String,
}

/// GiB: whole numbers as such (100, not 100.0), else two decimals, never 0 for what is there.
fn size_gb(bytes: u64) -> Value {
    const GIB: u64 = 1 << 30;
    if bytes.is_multiple_of(GIB) {
        return json!(bytes / GIB);
    }
    let hundredths = (bytes as f64 / GIB as f64 * 100.0).round().max(1.0);
    if hundredths % 100.0 == 0.0 { json!((hundredths / 100.0) as u64) } else { json!(hundredths / 100.0) }
}

impl VmView {
    fn new(vm: shared::vm::Vm, provider: String, connection: String, last_seen: i64) -> Self {
        let disks = vm.disks.into_iter().map(|disk| DiskView {
            name: disk.name,
            size_gb: size_gb(disk.capacity),
            size_bytes: disk.capacity,
            format: disk.format,
            thin_provisioned: disk.thin_provisioned,
        });
        let nics = vm.nics.into_iter().map(|nic| NicView { name: nic.name, model: nic.model, network: nic.network, mac: nic.mac });
        Self {
            id: vm.id,
            name: vm.name,
            path: vm.path,
            provider,
            connection,
            os: vm.os,
            os_version: vm.os_version,
            cpu: vm.cpu,
            memory_mb: vm.memory_mb,
            firmware: vm.firmware,
            disks: disks.collect(),
            nics: nics.collect(),
            status: service::status(&vm.power_state).to_owned(),
            power_state: vm.power_state,
            guest_tools: vm.tools_status.clone(),
            tools_status: vm.tools_status,
            snapshots: vm.snapshots,
            template: vm.template,
            problem: vm.problem,
            last_seen: rfc3339(last_seen),
        }
    }

    fn of_row(row: vms::Model) -> Result<Self, Error> {
        let vm = serde_json::from_str(&row.detail).map_err(Error::internal)?;
        Ok(Self::new(vm, row.kind, row.connection, row.last_seen))
    }

    fn of_found(found: Found) -> Self {
        let seen = found.connection.last_seen.unwrap_or(found.connection.created_at);
        Self::new(found.vm, found.connection.kind, found.connection.name, seen)
    }
}

/// The VMs of all connections.
#[utoipa::path(get, path = "/vms/list", tag = "VMs", security(("token" = [])), params(
    ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "name, id, path, provider, os, status, cpu, memory_mb, last_seen"), ("order" = Option<String>, Query),
    ("status" = Option<String>, Query, description = "running, stopped, suspended"),
    ("provider" = Option<String>, Query, description = "kind or connection"), ("os" = Option<String>, Query, description = "linux, windows, other, unknown"),
    ("search" = Option<String>, Query, description = "substring of name or id"), ("refresh" = Option<bool>, Query, description = "waits for a fresh inventory"),
), responses(
    (status = 200, description = "a page of VMs", body = Page<VmView>),
    (status = 400, description = "an unknown parameter or value", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "an agent could not refresh", body = ErrorBody),
    (status = 503, description = "the database or an agent is away", body = ErrorBody),
))]
pub async fn list(_: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Page<VmView>>, Error> {
    let query = Query::of(&request, &["status", "provider", "os", "search", "refresh"])?;
    let paging = query.paging()?;
    let fields = ["name", "id", "path", "provider", "os", "status", "cpu", "memory_mb", "last_seen"];
    let sort = query.sort(&fields, "name", Order::Asc)?;
    let filter = Filter {
        status: query.word("status", &["running", "stopped", "suspended"])?.map(str::to_owned),
        provider: known_provider(&query, &app).await?,
        os: query.word("os", &["linux", "windows", "other", "unknown"])?.map(str::to_owned),
        search: query.text("search").map(str::to_owned),
    };
    if query.flag("refresh")? {
        providers::routes::refresh_all(&app, filter.provider.as_deref()).await?;
    }
    let (rows, total) = service::list(&app.store, filter, sort, paging).await?;
    let rows = rows.into_iter().map(VmView::of_row).collect::<Result<Vec<_>, _>>()?;
    Ok(web::Json(paging.page(rows, total)))
}

/// The `provider` filter: a kind of the contract or a connection's name; anything else is refused with the known ones.
async fn known_provider(query: &Query, app: &App) -> Result<Option<String>, Error> {
    let Some(wanted) = query.text("provider") else { return Ok(None) };
    let connections = providers::service::all(&app.store).await?;
    let names = connections.iter().map(|row| row.name.as_str());
    let known: Vec<&str> = providers::service::KINDS.iter().copied().chain(names).collect();
    query.word("provider", &known)?;
    Ok(Some(wanted.to_owned()))
}

/// One VM.
#[utoipa::path(get, path = "/vms/{provider}/{id}", tag = "VMs", security(("token" = [])), params(
    ("provider" = String, Path, description = "connection or kind"), ("id" = String, Path, description = "id, path or name; `/` as %2F"),
), responses(
    (status = 200, description = "the VM", body = VmView),
    (status = 400, description = "no or several connections of that kind", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such VM", body = ErrorBody),
    (status = 409, description = "several bear the name", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn get(_: Viewer, path: web::Path<(String, String)>, app: web::Data<App>) -> Result<web::Json<VmView>, Error> {
    let (provider, id) = path.into_inner();
    Ok(web::Json(VmView::of_found(find(&app, &provider, &id).await?)))
}

async fn find(app: &App, provider: &str, vm: &str) -> Result<Found, Error> {
    let connection = providers::service::resolve(&app.store, provider).await?;
    service::resolve(&app.store, &connection, vm).await
}

/// Which VM.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"provider": "local", "vm_name": "web-server-01"}))]
pub struct Which {
    /// A connection's name, or a kind that one connection has.
    pub provider: String,
    /// Name, inventory path or id.
    pub vm_name: String,
}

/// All details of a VM.
#[derive(Serialize, ToSchema)]
pub struct Details {
    #[serde(flatten)]
    vm: VmView,
    /// Where each disk lies, in the provider's words.
    sources: Vec<Source>,
    /// What the provider knows beyond that now, where it is one that does: `hardware_version`, `annotation`, `changed_block_tracking`,
    /// `encrypted`, `controllers`, `disk_details`, `snapshot_tree`, `networks`, `guest`, `left_behind`.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    more: Option<shared::details::Details>,
    /// Why the provider could not be asked; what stands here then is what the inventory knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    unasked: Option<String>,
    /// What lies on its disks: `system`, `kernels` with their virtio drivers, `virtio` (`yes`, `no`, `unknown`), `mounts`, `interfaces`, `boot`,
    /// `software`, `partitions`, `volume_groups`, `notes`, and `findings`, what of it matters to a move. Null where nobody could look.
    #[schema(value_type = Option<Object>)]
    inspection: Option<Inspection>,
    /// Why nobody could look.
    #[serde(skip_serializing_if = "Option::is_none")]
    inspection_unknown: Option<String>,
}

/// What lies on a VM's disks, and what of it matters.
#[derive(Serialize)]
struct Inspection {
    #[serde(flatten)]
    guest: Guest,
    findings: Vec<Finding>,
}

/// Where a disk lies.
#[derive(Serialize, ToSchema)]
pub struct Source {
    disk: String,
    path: String,
}

/// All details of one VM.
#[utoipa::path(post, path = "/vms/browse", tag = "VMs", security(("token" = [])), request_body = Which, responses(
    (status = 200, description = "the VM", body = Details),
    (status = 400, description = "the body cannot be read, or no or several connections of that kind", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such VM", body = ErrorBody),
    (status = 409, description = "several bear the name", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn browse(_: Viewer, app: web::Data<App>, body: Json<Which>) -> Result<web::Json<Details>, Error> {
    let found = find(&app, &body.value.provider, &body.value.vm_name).await?;
    let sources = found.vm.disks.iter().map(|disk| Source { disk: disk.name.clone(), path: disk.source.clone() }).collect();
    let (described, inside) = tokio::join!(service::describe(&app, &found, false), service::look_inside(&app, &found));
    let (more, unasked) = match described {
        Ok(more) => (more, None),
        // It is gone, though the inventory does not know it yet.
        Err(e) if e.code() == Code::NotFound => return Err(e),
        Err(e) => (None, Some(e.message().to_owned())),
    };
    let (inspection, inspection_unknown) = match inside {
        Ok(guest) => (Some(Inspection { findings: guest.findings(&found.vm.firmware), guest }), None),
        Err(e) => (None, Some(e.message().to_owned())),
    };
    Ok(web::Json(Details { vm: VmView::of_found(found), sources, more, unasked, inspection, inspection_unknown }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_where_the_capacity_is() {
        assert_eq!(size_gb(100 << 30).to_string(), "100");
        assert_eq!(size_gb(3 << 29).to_string(), "1.5");
        assert_eq!(size_gb(1).to_string(), "0.01");
        assert_eq!(size_gb(0).to_string(), "0");
        assert_eq!(size_gb((1 << 30) + 1).to_string(), "1");
    }
}
