//! `POST /vms/deploy`.
//!
//! Owns: who may deploy, to which connection, once for each key, and that it stands in the audit. Never: looks at a disk or a hypervisor: its
//! agent does. A crash here costs one answer; the agent's domain is whole or gone, and the inventory says which.

use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, web};
use proto::v1;
use proto::v1::browse::Question;
use serde::Deserialize;
use serde_json::Value;
use shared::deploy::{Card, Wish};
use shared::error::Code;
use utoipa::ToSchema;

use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::Operator;
use crate::http::idempotency::Idempotency;
use crate::http::reply::{Error, ErrorBody};
use crate::providers;
use crate::system::audit;

/// How long the copying of disks into a pool may take.
const COPYING: Duration = Duration::from_secs(12 * 3600);

/// What is to be deployed where.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Deploy, example = json!({
    "name": "web-server-01", "disk_path": "/var/lib/libvirt/images/web-server-01.qcow2", "cpu": 4, "memory_mb": 8192, "network": "default",
    "autostart": true, "target": "libvirt"
}))]
pub struct Deploy {
    /// Name of the VM; one that exists is a conflict.
    name: String,
    /// The first disk, `ROOT/…` or absolute, inside a root of the agent: `.qcow2` or `.raw`.
    disk_path: String,
    /// Further disks, in order.
    #[serde(default)]
    disks: Vec<String>,
    /// A storage pool (of type dir, fs or netfs, in a writable root of the agent) that the disks are copied into; absent: they are used where
    /// they lie.
    pool: Option<String>,
    cpu: u32,
    memory_mb: u64,
    /// A libvirt network's name, or `user`; absent, and without `bridge`: `default`.
    network: Option<String>,
    /// A bridge of the host, in place of `network`.
    bridge: Option<String>,
    /// `new` or an address; `keep` belongs to a migration, which knows the old one.
    mac: Option<String>,
    /// Further cards, in order.
    #[serde(default)]
    nics: Vec<NewCard>,
    /// `bios` (default) or `uefi`.
    firmware: Option<String>,
    /// `virtio` (default), `scsi`, `sata` or `ide`.
    disk_bus: Option<String>,
    /// `virtio` (default), `e1000`, `e1000e`, `rtl8139` or `vmxnet3`.
    nic_model: Option<String>,
    /// Default false.
    autostart: Option<bool>,
    /// Default true.
    start: Option<bool>,
    /// A connection's name, or its kind: `libvirt`.
    target: String,
}

/// A further network card.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = DeployNic)]
pub struct NewCard {
    /// A libvirt network's name, or `user`; absent, and without `bridge`: `default`.
    network: Option<String>,
    /// A bridge of the host, in place of `network`.
    bridge: Option<String>,
    /// `new` (default) or an address.
    mac: Option<String>,
}

/// Makes a VM of disks that lie on the hypervisor's host, and starts it. A failure leaves no domain and no volume; the disks stay in any case.
/// With `pool` the answer comes when the disks are copied and were read back; whoever hangs up before that gets no VM.
#[utoipa::path(post, path = "/vms/deploy", tag = "VMs", security(("token" = [])), request_body = Deploy, responses(
    (status = 201, description = "the VM", body = Value, example = json!({
        "name": "web-server-01", "uuid": "f47ac10b-58cc-4372-a567-0e02b2c3d479", "status": "running", "target": "libvirt", "cpu": 4,
        "memory_mb": 8192, "disk_path": "/var/lib/libvirt/images/web-server-01.qcow2", "network": "default", "mac": "52:54:00:ab:cd:ef",
        "nics": [{"network": "default", "bridge": null, "mac": "52:54:00:ab:cd:ef"}], "autostart": true, "accelerator": "kvm", "created_at": "2025-06-15T10:45:00Z", "vnc_port": 5901
    })),
    (status = 400, description = "the body cannot be read, a field is wrong, or no or several connections of that kind", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator, or a disk outside the roots", body = ErrorBody),
    (status = 404, description = "a disk is not there", body = ErrorBody),
    (status = 409, description = "the name, a disk, a volume or an address is another VM's", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 422, description = "a damaged disk, a format that does not run, no such network or pool, too few CPUs or too little memory, or a kind \
        that is not deployed to", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the agent or the hypervisor did not answer", body = ErrorBody),
    (status = 503, description = "the database or the agent is away", body = ErrorBody),
))]
pub async fn deploy(caller: Operator, request: HttpRequest, app: web::Data<App>, body: Json<Deploy>) -> Result<HttpResponse, Error> {
    let key = Idempotency::of(&request, &caller, &body.digest)?;
    if let Some(key) = &key
        && let Some(first) = key.replay(&app.store).await?
    {
        return Ok(first);
    }
    let wanted = body.value;
    let target = wanted.target.clone();
    let wish = wish(wanted)?;
    let connection = providers::service::resolve(&app.store, &target).await?;
    if connection.kind != "libvirt" {
        return Err(Error::not_built(format!("deploying to `{}`", connection.kind)));
    }
    let wish_json = serde_json::to_string(&wish).map_err(Error::internal)?;
    let question = v1::Deploy { connection: Some(providers::service::told(&connection)), wish_json };
    let act = audit::begin(&app.store, &caller.name, "vm.deploy", &format!("{}:{}", connection.name, wish.name)).await?;
    let patience = if wish.pool.is_some() { COPYING } else { providers::service::patience(&connection.kind) };
    let answered = app.fleet.ask_within(&connection.agent_id, Question::Deploy(question), patience).await;
    act.finish(&answered).await;
    let mut made: Value = answered?;
    // As the caller called it, a kind or a name.
    made["target"] = target.into();
    let location = format!("/api/v1/vms/{}/{}", connection.name, made.get("uuid").and_then(Value::as_str).unwrap_or_default());
    if let Some(key) = key {
        key.keep(&app.store, 201, &location, &made).await?;
    }
    Ok(HttpResponse::Created().insert_header(("Location", location)).json(made))
}

/// The address that is asked for; none: a new one.
fn address(word: Option<&str>) -> Result<Option<String>, Error> {
    match word {
        Some("keep") => {
            Err(Error::new(Code::Unprocessable, "`keep` is for a migration, which knows the address; give `new` or an address"))
        }
        Some("new") | None => Ok(None),
        Some(address) => Ok(Some(address.to_owned())),
    }
}

fn wish(wanted: Deploy) -> Result<Wish, Error> {
    let card = |card: NewCard| Ok(Card { network: card.network, bridge: card.bridge, mac: address(card.mac.as_deref())? });
    let wish = Wish {
        name: wanted.name,
        disk_path: wanted.disk_path,
        disks: wanted.disks,
        pool: wanted.pool,
        cpu: wanted.cpu,
        memory_mb: wanted.memory_mb,
        network: wanted.network,
        bridge: wanted.bridge,
        mac: address(wanted.mac.as_deref())?,
        nics: wanted.nics.into_iter().map(card).collect::<Result<_, Error>>()?,
        firmware: wanted.firmware,
        disk_bus: wanted.disk_bus,
        nic_model: wanted.nic_model,
        autostart: wanted.autostart.unwrap_or(false),
        start: wanted.start.unwrap_or(true),
    };
    match wish.flaw() {
        Some(flaw) => Err(Error::bad_request(flaw)),
        None => Ok(wish),
    }
}
