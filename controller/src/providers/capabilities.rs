//! What this installation can do now, per kind of provider.
//!
//! Owns: the answer of `GET /providers/capabilities`. Never: promises: a thing is true only when it is built and an agent is there that
//! does it; else the missing piece is named. A crash here costs nothing.

use serde::Serialize;
use shared::options::Format;
use utoipa::ToSchema;

use super::service;
use crate::app::App;
use crate::http::reply::Error;
use crate::vms;

/// What can be done with one kind now.
#[derive(Serialize, ToSchema)]
pub struct Capability {
    /// `local`, `libvirt`, `vsphere`.
    #[schema(example = "local")]
    kind: &'static str,
    /// Whether this version has it at all.
    built: bool,
    /// Whether an agent is connected that does it.
    available: bool,
    /// Inventory.
    list: bool,
    /// Export of VMs that are off.
    export: bool,
    /// Export of running VMs.
    hot_export: bool,
    /// Incremental backup.
    changed_blocks: bool,
    /// Listing, taking and removing snapshots of VMs.
    snapshots: bool,
    /// Deploying VMs.
    deploy: bool,
    /// Migrating VMs of this kind to libvirt: needs a connection of that kind.
    migrate: bool,
    /// Consoles of running VMs.
    console: bool,
    /// Output formats.
    formats: Vec<&'static str>,
    /// Agents that can.
    agents: Vec<String>,
    /// Its connections.
    connections: Vec<String>,
    /// What is missing for the rest.
    missing: Vec<String>,
}

/// All kinds.
#[derive(Serialize, ToSchema)]
pub struct Capabilities {
    data: Vec<Capability>,
}

/// Finds out.
pub async fn detect(app: &App) -> Result<Capabilities, Error> {
    let connections = service::all(&app.store).await?;
    let has_target = connections.iter().any(|row| row.kind == "libvirt");
    let mut data = Vec::new();
    for kind in service::KINDS.iter().copied() {
        let of_kind = connections.iter().filter(|row| row.kind == kind);
        let names: Vec<String> = of_kind.map(|row| row.name.clone()).collect();
        let mut capability = match kind {
            "local" => local(app, names).await?,
            "vsphere" => {
                hypervisor(app, (kind, "vCenter or ESXi"), names, false, "deploy: nothing is deployed to vSphere; consoles").await?
            }
            "libvirt" => {
                let lacks =
                    "export of a remote host's domains, their consoles, and deploying there: run an agent on it and connect qemu:///system";
                hypervisor(app, (kind, "libvirt"), names, true, lacks).await?
            }
            kind => unbuilt(kind),
        };
        capability.migrate = capability.export && has_target;
        capability.console = capability.list && vms::console::service::is_offered(kind).is_ok();
        if capability.export && !has_target {
            capability
                .missing
                .push("migrate: no libvirt is connected that the VM could go to; POST /providers/connect connects one".to_owned());
        }
        data.push(capability);
    }
    Ok(Capabilities { data })
}

async fn local(app: &App, connections: Vec<String>) -> Result<Capability, Error> {
    // Every agent can serve folders; so whoever is connected can.
    let agents = app.connected_agents().await?;
    let available = !agents.is_empty();
    let formats = Format::ALL.iter().copied();
    let mut missing = vec![
        "hot_export, changed_blocks, snapshots: a folder of images has no running VM".to_owned(),
        "deploy: nothing runs in a folder; connect libvirt".to_owned(),
    ];
    if !available {
        missing.insert(0, "list, export: no agent is connected; POST /agents/tokens gives a join token for one".to_owned());
    } else if connections.is_empty() {
        missing.insert(0, "list, export: no folder is connected; POST /providers/connect connects one".to_owned());
    }
    let usable = available && !connections.is_empty();
    Ok(Capability {
        kind: "local",
        built: true,
        available,
        list: usable,
        export: usable,
        hot_export: false,
        changed_blocks: false,
        snapshots: false,
        deploy: false,
        migrate: false,
        console: false,
        formats: if available { formats.collect() } else { Vec::new() },
        agents: agents.into_iter().map(|agent| agent.name).collect(),
        connections,
        missing,
    })
}

/// A kind whose agents speak with hypervisors that they reach; `lacks` is what nobody has built of it.
async fn hypervisor(
    app: &App,
    (kind, word): (&'static str, &str),
    connections: Vec<String>,
    deploys: bool,
    lacks: &str,
) -> Result<Capability, Error> {
    let agents = app.connected_agents().await?;
    let available = !agents.is_empty();
    let mut missing = vec![lacks.to_owned()];
    if !available {
        missing.insert(0, "list, export: no agent is connected; POST /agents/tokens gives a join token for one".to_owned());
    } else if connections.is_empty() {
        missing.insert(0, format!("list, export: no {word} is connected; POST /providers/connect connects one"));
    }
    let usable = available && !connections.is_empty();
    Ok(Capability {
        kind,
        built: true,
        available,
        list: usable,
        export: usable,
        hot_export: usable,
        changed_blocks: usable,
        snapshots: usable,
        deploy: usable && deploys,
        migrate: false,
        console: false,
        formats: if available { Format::ALL.to_vec() } else { Vec::new() },
        agents: agents.into_iter().map(|agent| agent.name).collect(),
        connections,
        missing,
    })
}

fn unbuilt(kind: &'static str) -> Capability {
    Capability {
        kind,
        built: false,
        available: false,
        list: false,
        export: false,
        hot_export: false,
        changed_blocks: false,
        snapshots: false,
        deploy: false,
        migrate: false,
        console: false,
        formats: Vec::new(),
        agents: Vec::new(),
        connections: Vec::new(),
        missing: vec![format!("{kind} is not built yet")],
    }
}
