//! One VM in detail, asked of the server when somebody wants to know: what a list does not show, and what the account may do with it.
//!
//! Owns: which property means what there. Never: is kept: the next question asks again. A crash here costs one answer.
//! Source: vSphere Web Services API, VirtualMachineConfigInfo, VirtualMachineSnapshotTree, GuestInfo, AuthorizationManager.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;

use roxmltree::Node;
use shared::details::{Controller, Details, DiskDetail, Guest, Lack, Network, Privileges, SnapshotNode};

use super::client::{CALL, Client, Error, Session};
use super::collect::{self, property, property_text};
use super::inventory::{self, Found};
use super::wire::{self, Fault, MoRef, child, children, number, quote, text, type_of};

/// What is asked beside what an inventory asks.
const MORE: &[&str] = &[
    "config.version",
    "config.annotation",
    "config.changeTrackingEnabled",
    "config.keyId",
    "config.hardware.device",
    "guest.hostName",
    "guest.ipAddress",
    "guest.net",
    "guest.toolsVersion",
    "guest.guestFullName",
    "snapshot",
    "datastore",
];
/// What exports and backups need at the VM itself.
const AT_VM: &[&str] = &[
    "VApp.Export",
    "VirtualMachine.State.CreateSnapshot",
    "VirtualMachine.State.RemoveSnapshot",
    "VirtualMachine.Config.ChangeTracking",
    "VirtualMachine.Provisioning.DiskRandomRead",
];
/// What reading ranges of files needs at each of its datastores.
const AT_DATASTORE: &[&str] = &["Datastore.Browse", "Datastore.FileManagement"];

/// All that is known of the VM; none where it is gone. `privileges`: what the account may do as well.
pub async fn describe(client: &Client, session: &Session, id: &str, privileges: bool) -> Result<Option<Details>, Error> {
    let Some(found) = inventory::one(client, session, id).await? else { return Ok(None) };
    let this = MoRef::new("VirtualMachine", id);
    let mut seen = None;
    let looked = collect::one(client, session, &this, MORE, |_, object| seen = Some((details(object, &found), datastores(object)))).await;
    match looked {
        Err(Error::Fault(Fault::ManagedObjectNotFound)) => return Ok(None),
        other => other?,
    }
    let Some((mut details, datastores)) = seen else { return Ok(None) };
    details.guest.tools_status.clone_from(&found.vm.tools_status);
    if privileges {
        details.privileges = Some(permitted(client, session, this, datastores).await?);
    }
    Ok(Some(details))
}

fn details(object: Node, found: &Found) -> Details {
    let mut details = Details {
        hardware_version: property_text(object, "config.version").to_owned(),
        annotation: property_text(object, "config.annotation").to_owned(),
        changed_block_tracking: match property_text(object, "config.changeTrackingEnabled") {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        },
        encrypted: property(object, "config.keyId").is_some(),
        guest: Guest {
            tools_version: Some(property_text(object, "guest.toolsVersion")).filter(|text| *text != "0").unwrap_or_default().to_owned(),
            hostname: property_text(object, "guest.hostName").to_owned(),
            os: property_text(object, "guest.guestFullName").to_owned(),
            ..Guest::default()
        },
        ..Details::default()
    };
    if let Some(tree) = property(object, "snapshot") {
        let current = child(tree, "currentSnapshot").and_then(|node| node.text()).unwrap_or_default();
        details.snapshot_tree = snapshots(tree, "rootSnapshotList", current);
    }
    let addresses = addresses(object);
    if let Some(devices) = property(object, "config.hardware.device") {
        hardware(devices, found, &addresses, &mut details);
    }
    let first = property_text(object, "guest.ipAddress");
    let mut all: Vec<String> = Vec::new();
    for address in std::iter::once(first).chain(addresses.values().flatten().map(String::as_str)).filter(|text| !text.is_empty()) {
        if all.iter().all(|known| known != address) {
            all.push(address.to_owned());
        }
    }
    details.guest.addresses = all;
    details
}

fn hardware(devices: Node, found: &Found, addresses: &HashMap<u64, Vec<String>>, details: &mut Details) {
    let (mut disks, mut cards) = (Vec::new(), 0);
    for device in devices.children().filter(Node::is_element) {
        let (kind, key) = (type_of(device), number::<u64>(device, "key").unwrap_or_default());
        let label = child(device, "deviceInfo").map_or(kind, |info| text(info, "label"));
        if let Some(bus) = inventory::bus(kind) {
            details.controllers.push(Controller {
                key,
                bus: bus.to_owned(),
                model: kind.to_owned(),
                bus_number: number(device, "busNumber").unwrap_or_default(),
                sharing: text(device, "sharedBus").to_owned(),
            });
        }
        if stays_behind(kind) {
            details.left_behind.push(format!("{label} ({kind})"));
        }
        let Some(backing) = child(device, "backing") else { continue };
        if kind == "VirtualDisk" {
            disks.push(disk(device, backing, key, label));
        } else if inventory::card(kind).is_some() {
            // The inventory counts them in the same order and knows the networks' names.
            if let Some(nic) = found.vm.nics.get(cards) {
                let connected = child(device, "connectable").is_some_and(|plug| text(plug, "connected") == "true");
                let addresses = addresses.get(&key).cloned().unwrap_or_default();
                let (name, network, mac) = (nic.name.clone(), nic.network.clone(), nic.mac.clone());
                details.networks.push(Network { name, network, mac, connected, addresses });
            }
            cards += 1;
        }
    }
    details.controllers.sort_by(|a, b| (&a.bus, a.bus_number).cmp(&(&b.bus, b.bus_number)));
    for (listed, seat) in found.vm.disks.iter().zip(&found.seats) {
        let Some(place) = disks.iter().position(|disk: &DiskDetail| disk.key == seat.key) else { continue };
        let disk = disks.swap_remove(place);
        details.disk_details.push(DiskDetail {
            name: listed.name.clone(),
            capacity: listed.capacity,
            thin_provisioned: listed.thin_provisioned,
            bus: listed.bus.clone(),
            bus_number: seat.bus,
            unit: seat.unit,
            ..disk
        });
    }
}

fn disk(device: Node, backing: Node, key: u64, label: &str) -> DiskDetail {
    let mut parents = Vec::new();
    let mut above = child(backing, "parent");
    // Deeper than any chain a server allows.
    while let Some(parent) = above.filter(|_| parents.len() < 64) {
        parents.push(text(parent, "fileName").to_owned());
        above = child(parent, "parent");
    }
    DiskDetail {
        label: label.to_owned(),
        key,
        controller: number(device, "controllerKey").unwrap_or_default(),
        mode: text(backing, "diskMode").to_owned(),
        file: text(backing, "fileName").to_owned(),
        parents,
        backing: match type_of(backing) {
            "VirtualDiskFlatVer2BackingInfo" => "flat",
            "VirtualDiskSparseVer2BackingInfo" => "sparse",
            "VirtualDiskSeSparseBackingInfo" => "seSparse",
            "VirtualDiskRawDiskMappingVer1BackingInfo" => "rdm",
            other => other,
        }
        .to_owned(),
        sharing: text(backing, "sharing").to_owned(),
        encrypted: child(backing, "keyId").is_some(),
        ..DiskDetail::default()
    }
}

/// Devices that no file describes and no export takes along.
fn stays_behind(kind: &str) -> bool {
    matches!(
        kind,
        "VirtualPCIPassthrough" | "VirtualSCSIPassthrough" | "VirtualSriovEthernetCard" | "VirtualTPM" | "VirtualNVDIMM" | "VirtualUSB"
    )
}

fn snapshots(node: Node, list: &'static str, current: &str) -> Vec<SnapshotNode> {
    let each = |entry: Node| {
        let id = text(entry, "snapshot").to_owned();
        SnapshotNode {
            name: inventory::unescaped(text(entry, "name")),
            description: text(entry, "description").to_owned(),
            created_at: text(entry, "createTime").to_owned(),
            power_state: text(entry, "state").to_owned(),
            current: !id.is_empty() && id == current,
            children: snapshots(entry, "childSnapshotList", current),
            id,
        }
    };
    children(node, list).map(each).collect()
}

/// A guest's addresses by the key of the card that has them.
fn addresses(object: Node) -> HashMap<u64, Vec<String>> {
    let Some(cards) = property(object, "guest.net") else { return HashMap::new() };
    let each = |card: Node| {
        let found = children(card, "ipAddress").filter_map(|address| address.text()).map(str::to_owned).collect();
        (number::<u64>(card, "deviceConfigId").unwrap_or_default(), found)
    };
    cards.children().filter(Node::is_element).map(each).collect()
}

fn datastores(object: Node) -> Vec<MoRef> {
    property(object, "datastore").map_or_else(Vec::new, |list| list.children().filter(Node::is_element).filter_map(MoRef::of).collect())
}

/// What the session's account lacks. A server that cannot say so is not taken for one that grants it.
async fn permitted(client: &Client, session: &Session, vm: MoRef, datastores: Vec<MoRef>) -> Result<Privileges, Error> {
    let mut found = Privileges::default();
    let Some(manager) = &session.content.authorization else {
        found.unknown = "the server has no authorization manager".to_owned();
        return Ok(found);
    };
    for (entities, wanted) in [(vec![vm], AT_VM), (datastores, AT_DATASTORE)] {
        if entities.is_empty() {
            continue;
        }
        match lacking(client, session, manager, &entities, wanted).await {
            Ok(lacks) => found.lacking.extend(lacks),
            // The session has to be made anew, or the server is away: whoever asked hears that.
            Err(e @ Error::Fault(Fault::NotAuthenticated)) => return Err(e),
            Err(e) if e.is_passing() => return Err(e),
            Err(Error::Fault(fault)) => found.unknown = fault.to_string(),
            Err(e) => found.unknown = format!("{e:?}"),
        }
    }
    Ok(found)
}

async fn lacking(client: &Client, session: &Session, manager: &MoRef, at: &[MoRef], wanted: &[&str]) -> Result<Vec<Lack>, Error> {
    let method = "HasPrivilegeOnEntities";
    let mut body = String::new();
    // Writing into a String cannot fail.
    for entity in at {
        let _ = write!(body, "<entity type=\"{}\">{}</entity>", quote(&entity.kind), quote(&entity.value));
    }
    let _ = write!(body, "<sessionId>{}</sessionId>", quote(session.key.expose()));
    for privilege in wanted {
        let _ = write!(body, "<privId>{privilege}</privId>");
    }
    let answer = client.call(session, method, manager, &body, CALL).await?;
    let document = wire::parse(&answer).map_err(Error::Odd)?;
    let mut lacks = Vec::new();
    // What is not answered is not granted.
    let mut open: BTreeSet<(&str, &str)> = at.iter().flat_map(|at| wanted.iter().map(|id| (at.value.as_str(), *id))).collect();
    for entity in children(wire::response(&document, method)?, "returnval") {
        let place = text(entity, "entity");
        for privilege in children(entity, "privAvailability") {
            let id = text(privilege, "privId");
            if text(privilege, "isGranted") == "true" {
                open.remove(&(place, id));
            }
        }
    }
    lacks.extend(open.into_iter().map(|(at, privilege)| Lack { privilege: privilege.to_owned(), at: at.to_owned() }));
    Ok(lacks)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_of_snapshots_keeps_its_shape() {
        let tree = "<val xmlns=\"urn:vim25\"><currentSnapshot type=\"VirtualMachineSnapshot\">snapshot-3</currentSnapshot><rootSnapshotList>\
            <snapshot type=\"VirtualMachineSnapshot\">snapshot-1</snapshot><name>a%2fb</name><createTime>2026-01-02T03:04:05Z</createTime>\
            <childSnapshotList><snapshot type=\"VirtualMachineSnapshot\">snapshot-2</snapshot><name>x</name></childSnapshotList>\
            <childSnapshotList><snapshot type=\"VirtualMachineSnapshot\">snapshot-3</snapshot><name>y</name></childSnapshotList>\
            </rootSnapshotList></val>";
        let document = wire::parse(tree).unwrap();
        let found = snapshots(document.root_element(), "rootSnapshotList", "snapshot-3");
        assert_eq!((found.len(), found[0].name.as_str(), found[0].current, found[0].children.len()), (1, "a/b", false, 2));
        assert_eq!(found[0].children.iter().map(|node| node.current).collect::<Vec<_>>(), [false, true]);
    }
}
