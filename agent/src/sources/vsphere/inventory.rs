//! What a vCenter or ESXi knows of its VMs, as every provider describes one.
//!
//! Owns: which property means what. Never: dials by itself, keeps anything. A crash here costs one look.
//! Source: vSphere Web Services API, VirtualMachineConfigInfo, VirtualDevice.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use roxmltree::Node;
use shared::vm::{Disk, Nic, Vm};

use super::client::{Client, Error, Session};
use super::collect::{self, property, property_text};
use super::device::Seat;
use super::wire::{self, MoRef, child, children, number, text, type_of};

/// What is asked of a VM.
const VM: &[&str] = &[
    "name",
    "parent",
    "parentVApp",
    "runtime.powerState",
    "runtime.connectionState",
    "config.hardware",
    "config.firmware",
    "config.guestId",
    "config.guestFullName",
    "config.template",
    "config.keyId",
    "config.changeVersion",
    "guest.toolsRunningStatus",
    "snapshot",
];
/// What an inventory's path is made of.
pub const PLACE: &[&str] = &["name", "parent"];
/// The same of a vApp, whose parent is the resource pool that it is, not the folder that it lies in.
pub const VAPP: &[&str] = &["name", "parentFolder", "parentVApp"];
/// A distributed switch's port group, which a card names by its key.
const PORT_GROUP: &[&str] = &["name", "key"];

/// One VM, and what its disks need to be opened.
#[derive(Clone, Debug)]
pub struct Found {
    /// The VM.
    pub vm: Vm,
    /// The path of its datacenter below the root, as the inventory spells it: `DC0`, `Folder/DC0`.
    pub datacenter: String,
    /// Changes whenever its configuration does.
    pub change_version: String,
    /// Where its disks hang, in their order.
    pub seats: Vec<Seat>,
    /// Labels of disks that no snapshot holds.
    pub independent: Vec<String>,
}

/// All VMs below the root.
pub async fn all(client: &Client, session: &Session) -> Result<Vec<Found>, Error> {
    let mut places = Places::default();
    let mut found = Vec::new();
    let mut wanted = placing(session);
    wanted.push(("VirtualMachine", VM));
    collect::all(client, session, &wanted, |reference, object| match reference.kind.as_str() {
        "VirtualMachine" => found.push((reference, parent(object), Raw::of(object))),
        _ => places.add(reference, object),
    })
    .await?;
    Ok(finished(found, &places))
}

/// Those of these VMs that are still there.
pub async fn some(client: &Client, session: &Session, ids: &BTreeSet<String>) -> Result<Vec<Found>, Error> {
    let mut found = Vec::new();
    let references: Vec<MoRef> = ids.iter().map(|id| MoRef::new("VirtualMachine", id)).collect();
    collect::several(client, session, &references, &[("VirtualMachine", VM)], |reference, object| {
        found.push((reference, parent(object), Raw::of(object)));
    })
    .await?;
    let mut places = Places::default();
    if !found.is_empty() {
        collect::all(client, session, &placing(session), |reference, object| places.add(reference, object)).await?;
    }
    Ok(finished(found, &places))
}

/// What paths and networks are named by.
fn placing(session: &Session) -> Vec<(&'static str, &'static [&'static str])> {
    let mut wanted = vec![("Folder", PLACE), ("Datacenter", PLACE), ("VirtualApp", VAPP)];
    if session.content.is_vcenter {
        wanted.push(("DistributedVirtualPortgroup", PORT_GROUP));
    }
    wanted
}

fn finished(found: Vec<(MoRef, Option<MoRef>, Raw)>, places: &Places) -> Vec<Found> {
    let mut vms: Vec<Found> = found.into_iter().map(|(reference, above, raw)| raw.finish(&reference, above, places)).collect();
    vms.sort_by(|a, b| a.vm.path.cmp(&b.vm.path).then_with(|| a.vm.id.cmp(&b.vm.id)));
    vms
}

/// The VM of this id; none where it is gone.
pub async fn one(client: &Client, session: &Session, id: &str) -> Result<Option<Found>, Error> {
    let reference = MoRef::new("VirtualMachine", id);
    let mut raw = None;
    let looked = collect::one(client, session, &reference, VM, |_, object| raw = Some((parent(object), Raw::of(object)))).await;
    match looked {
        Err(Error::Fault(wire::Fault::ManagedObjectNotFound)) => return Ok(None),
        other => other?,
    }
    let Some((above, raw)) = raw else { return Ok(None) };
    let mut places = Places::default();
    let mut next = above.clone();
    // Deeper than any inventory; a circle ends here too.
    for _ in 0..64 {
        let Some(reference) = next.take().filter(|reference| *reference != session.content.root) else { break };
        let mut place = Place::default();
        let wanted = if reference.kind == "VirtualApp" { VAPP } else { PLACE };
        collect::one(client, session, &reference, wanted, |_, object| {
            place = Place { name: property_text(object, "name").to_owned(), parent: parent(object) };
        })
        .await?;
        next.clone_from(&place.parent);
        places.by_reference.insert(reference, place);
    }
    if session.content.is_vcenter {
        collect::all(client, session, &[("DistributedVirtualPortgroup", PORT_GROUP)], |_, object| {
            places.port_groups.insert(property_text(object, "key").to_owned(), unescaped(property_text(object, "name")));
        })
        .await?;
    }
    Ok(Some(raw.finish(&reference, above, &places)))
}

#[derive(Default)]
struct Place {
    name: String,
    parent: Option<MoRef>,
}

#[derive(Default)]
struct Places {
    by_reference: HashMap<MoRef, Place>,
    /// Names of port groups by key.
    port_groups: HashMap<String, String>,
}

impl Places {
    fn add(&mut self, reference: MoRef, object: Node) {
        let name = property_text(object, "name");
        if reference.kind == "DistributedVirtualPortgroup" {
            self.port_groups.insert(property_text(object, "key").to_owned(), unescaped(name));
        } else {
            self.by_reference.insert(reference, Place { name: name.to_owned(), parent: parent(object) });
        }
    }

    /// The path from below the root, `/DC0/vm/web`, and that of the datacenter in it.
    fn path(&self, above: Option<MoRef>, name: &str) -> (String, String) {
        // How many names there were below the datacenter.
        let (mut names, mut below) = (vec![name.to_owned()], None);
        let mut next = above;
        for _ in 0..64 {
            let Some((reference, place)) = next.and_then(|reference| self.by_reference.get(&reference).map(|place| (reference, place)))
            else {
                break;
            };
            // The root folder has no place above it and no part in a path.
            if place.parent.is_some() || reference.kind == "Datacenter" {
                names.push(place.name.clone());
            }
            if reference.kind == "Datacenter" {
                below = Some(names.len() - 1);
            }
            next = place.parent.clone();
        }
        names.reverse();
        let datacenter = below.map_or_else(String::new, |below| names[..names.len() - below].join("/"));
        (format!("/{}", names.join("/")), datacenter)
    }
}

/// What it lies in: a folder, or the vApp that it is part of.
fn parent(object: Node) -> Option<MoRef> {
    ["parent", "parentFolder", "parentVApp"].iter().find_map(|name| property(object, name).and_then(MoRef::of))
}

/// vSphere writes `/`, `\` and `%` in names as `%2f`, `%5c` and `%25`.
pub fn unescaped(name: &str) -> String {
    let mut plain = name.to_owned();
    for (escaped, character) in [("%2f", "/"), ("%2F", "/"), ("%5c", "\\"), ("%5C", "\\"), ("%25", "%")] {
        plain = plain.replace(escaped, character);
    }
    plain
}

/// A VM as far as its own properties tell.
struct Raw {
    vm: Vm,
    name: String,
    change_version: String,
    seats: Vec<Seat>,
    independent: Vec<String>,
    /// Keys of the port groups that cards hang at, by the card's place.
    port_groups: BTreeMap<usize, String>,
}

impl Raw {
    fn of(object: Node) -> Self {
        let mut raw = Self {
            name: property_text(object, "name").to_owned(),
            change_version: property_text(object, "config.changeVersion").to_owned(),
            seats: Vec::new(),
            independent: Vec::new(),
            port_groups: BTreeMap::new(),
            vm: Vm {
                os: family(property_text(object, "config.guestId")).to_owned(),
                os_version: property_text(object, "config.guestFullName").to_owned(),
                firmware: if property_text(object, "config.firmware") == "efi" { "uefi" } else { "bios" }.to_owned(),
                power_state: property_text(object, "runtime.powerState").to_owned(),
                tools_status: match property_text(object, "guest.toolsRunningStatus") {
                    "guestToolsRunning" => "running",
                    "guestToolsNotRunning" => "notRunning",
                    _ => "unknown",
                }
                .to_owned(),
                snapshots: property(object, "snapshot").map_or(0, |tree| count(tree, "rootSnapshotList")),
                template: property_text(object, "config.template") == "true",
                ..Vm::default()
            },
        };
        let mut problems = Vec::new();
        match property(object, "config.hardware") {
            Some(hardware) => raw.hardware(hardware, &mut problems),
            None => problems.push(match property_text(object, "runtime.connectionState") {
                state @ ("orphaned" | "inaccessible" | "invalid" | "disconnected") => {
                    format!("its configuration cannot be read: it is {state}")
                }
                _ => "its configuration cannot be read: the account may not see it".to_owned(),
            }),
        }
        if property(object, "config.keyId").is_some() {
            problems.push("it is encrypted".to_owned());
        }
        raw.vm.problem = problems.join("; ");
        raw
    }

    fn hardware(&mut self, hardware: Node, problems: &mut Vec<String>) {
        self.vm.cpu = number(hardware, "numCPU").unwrap_or_default();
        self.vm.memory_mb = number(hardware, "memoryMB").unwrap_or_default();
        let controllers: HashMap<&str, (&str, &str, u64)> = children(hardware, "device")
            .filter_map(|device| {
                let kind = type_of(device);
                bus(kind).map(|bus| (text(device, "key"), (bus, kind, number(device, "busNumber").unwrap_or_default())))
            })
            .collect();
        let mut disks = Vec::new();
        for device in children(hardware, "device") {
            let Some(backing) = child(device, "backing") else { continue };
            if type_of(device) == "VirtualDisk" {
                let (bus, controller, bus_number) = controllers.get(text(device, "controllerKey")).copied().unwrap_or(("", "", 0));
                let seat = Seat {
                    controller: controller.to_owned(),
                    bus: bus_number,
                    unit: number(device, "unitNumber"),
                    key: number(device, "key").unwrap_or_default(),
                };
                let disk = Disk {
                    name: String::new(),
                    source: text(backing, "fileName").to_owned(),
                    capacity: number(device, "capacityInBytes")
                        .or_else(|| number::<u64>(device, "capacityInKB").and_then(|kib| kib.checked_mul(1024)))
                        .unwrap_or_default(),
                    format: "vmdk".to_owned(),
                    thin_provisioned: text(backing, "thinProvisioned") == "true",
                    bus: bus.to_owned(),
                };
                let label = child(device, "deviceInfo").map_or("a disk", |info| text(info, "label"));
                if let Some(problem) = hindrance(device, backing) {
                    problems.push(format!("{label} {problem}"));
                }
                if text(backing, "diskMode").starts_with("independent") {
                    self.independent.push(label.to_owned());
                }
                disks.push((seat, disk));
            } else if let Some(model) = card(type_of(device)) {
                let place = self.vm.nics.len();
                if let Some(port) = child(backing, "port") {
                    self.port_groups.insert(place, text(port, "portgroupKey").to_owned());
                }
                self.vm.nics.push(Nic {
                    name: format!("nic-{place}"),
                    model,
                    network: [text(backing, "deviceName"), text(backing, "opaqueNetworkId")]
                        .into_iter()
                        .find(|t| !t.is_empty())
                        .unwrap_or_default()
                        .to_owned(),
                    mac: text(device, "macAddress").to_ascii_lowercase(),
                });
            }
        }
        disks.sort_by(|(a, of_a), (b, of_b)| (&of_a.bus, a.bus, a.unit, a.key).cmp(&(&of_b.bus, b.bus, b.unit, b.key)));
        self.seats = disks.iter().map(|(seat, _)| seat.clone()).collect();
        self.vm.disks = disks.into_iter().enumerate().map(|(n, (_, disk))| Disk { name: format!("disk-{n}"), ..disk }).collect();
        if self.vm.disks.is_empty() {
            problems.push("it has no disk".to_owned());
        }
    }

    fn finish(mut self, reference: &MoRef, above: Option<MoRef>, places: &Places) -> Found {
        for (place, key) in &self.port_groups {
            if let Some(nic) = self.vm.nics.get_mut(*place) {
                // A name that cannot be looked up: the key is better than nothing.
                nic.network = places.port_groups.get(key).unwrap_or(key).clone();
            }
        }
        let (path, datacenter) = places.path(above, &self.name);
        self.vm.id.clone_from(&reference.value);
        self.vm.path = path;
        self.vm.name = unescaped(&self.name);
        Found { vm: self.vm, datacenter, change_version: self.change_version, seats: self.seats, independent: self.independent }
    }
}

/// Snapshots of a tree.
fn count(node: Node, name: &'static str) -> u32 {
    children(node, name).map(|snapshot| 1 + count(snapshot, "childSnapshotList")).sum()
}

/// The family of a guest id, as `rhel9_64Guest` or `windows2019srv_64Guest`.
fn family(guest_id: &str) -> &'static str {
    let id = guest_id.to_ascii_lowercase();
    let linux = [
        "linux",
        "rhel",
        "centos",
        "debian",
        "ubuntu",
        "sles",
        "suse",
        "fedora",
        "oraclelinux",
        "redhat",
        "coreos",
        "photon",
        "asianux",
        "mandr",
        "amazonlinux",
        "rocky",
        "almalinux",
        "turbolinux",
        "vmwarephoton",
        "crxpod",
    ];
    match id.as_str() {
        "" => "unknown",
        id if linux.iter().any(|name| id.contains(name)) => "linux",
        id if id.starts_with("win") => "windows",
        _ => "other",
    }
}

/// The bus of a controller's type.
pub fn bus(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "VirtualIDEController" => "ide",
        "VirtualSATAController" | "VirtualAHCIController" => "sata",
        "VirtualNVMEController" => "nvme",
        "ParaVirtualSCSIController"
        | "VirtualLsiLogicController"
        | "VirtualLsiLogicSASController"
        | "VirtualBusLogicController"
        | "VirtualSCSIController" => "scsi",
        _ => return None,
    })
}

/// The model of a network card's type: `vmxnet3` of `VirtualVmxnet3`.
pub fn card(kind: &str) -> Option<String> {
    let model = match kind {
        "VirtualE1000" | "VirtualE1000e" | "VirtualPCNet32" | "VirtualVmxnet" | "VirtualVmxnet2" | "VirtualVmxnet3" => {
            kind.trim_start_matches("Virtual").to_ascii_lowercase()
        }
        "VirtualVmxnet3Vrdma" => "vmxnet3vrdma".to_owned(),
        "VirtualSriovEthernetCard" => "sriov".to_owned(),
        _ => return None,
    };
    Some(model)
}

/// Why a disk cannot be exported.
fn hindrance(device: Node, backing: Node) -> Option<&'static str> {
    if child(backing, "keyId").is_some() {
        return Some("is encrypted");
    }
    if matches!(text(backing, "sharing"), "sharingMultiWriter") {
        return Some("is shared with other VMs (multi-writer)");
    }
    match type_of(backing) {
        "VirtualDiskFlatVer2BackingInfo" | "VirtualDiskSeSparseBackingInfo" | "VirtualDiskSparseVer2BackingInfo" => {}
        "VirtualDiskRawDiskMappingVer1BackingInfo" => return Some("is a raw device mapping (RDM)"),
        _ => return Some("is of a kind that is no file of a datastore"),
    }
    number::<u64>(device, "capacityInKB").is_none().then_some("has no capacity")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_as_people_wrote_them() {
        for (escaped, plain) in [("a%2fb", "a/b"), ("50%25 off", "50% off"), ("x%5cy", "x\\y"), ("plain", "plain"), ("%252f", "%2f")] {
            assert_eq!(unescaped(escaped), plain);
        }
    }

    #[test]
    fn a_path_leads_through_folders_datacenters_and_vapps() {
        let mut places = Places::default();
        let mut add = |kind: &str, id: &str, properties: &str| {
            let object = format!("<o>{properties}</o>");
            places.add(MoRef::new(kind, id), wire::parse(&object).unwrap().root_element());
        };
        let named = |name: &str| format!("<propSet><name>name</name><val>{name}</val></propSet>");
        let lies_in =
            |property: &str, kind: &str, id: &str| format!("<propSet><name>{property}</name><val type=\"{kind}\">{id}</val></propSet>");
        add("Folder", "group-d1", &named("Datacenters"));
        add("Folder", "group-d2", &(named("Süd") + &lies_in("parent", "Folder", "group-d1")));
        add("Datacenter", "datacenter-3", &(named("RZ %2f 1") + &lies_in("parent", "Folder", "group-d2")));
        add("Folder", "group-v4", &(named("vm") + &lies_in("parent", "Datacenter", "datacenter-3")));
        add("VirtualApp", "resgroup-v5", &(named("Shop") + &lies_in("parentFolder", "Folder", "group-v4")));
        add("VirtualApp", "resgroup-v6", &(named("Lager") + &lies_in("parentVApp", "VirtualApp", "resgroup-v5")));
        for (above, path) in [
            (MoRef::new("Folder", "group-v4"), "/Süd/RZ %2f 1/vm/x"),
            (MoRef::new("VirtualApp", "resgroup-v6"), "/Süd/RZ %2f 1/vm/Shop/Lager/x"),
        ] {
            assert_eq!(places.path(Some(above), "x"), (path.to_owned(), "Süd/RZ %2f 1".to_owned()));
        }
        // A host, whose root folder is not seen by everybody.
        let mut host = Places::default();
        let object = named("ha-datacenter");
        host.add(MoRef::new("Datacenter", "ha-datacenter"), wire::parse(&format!("<o>{object}</o>")).unwrap().root_element());
        let found = host.path(Some(MoRef::new("Datacenter", "ha-datacenter")), "x");
        assert_eq!(found, ("/ha-datacenter/x".to_owned(), "ha-datacenter".to_owned()));
    }

    #[test]
    fn a_guest_id_has_a_family() {
        for (id, expected) in [
            ("rhel9_64Guest", "linux"),
            ("windows2019srv_64Guest", "windows"),
            ("winNetEnterpriseGuest", "windows"),
            ("otherGuest", "other"),
            ("otherLinux64Guest", "linux"),
            ("darwin18_64Guest", "other"),
            ("", "unknown"),
        ] {
            assert_eq!(family(id), expected, "{id}");
        }
    }

    #[test]
    fn a_disk_that_cannot_be_exported_says_why() {
        let object = "<objects xmlns=\"urn:vim25\" xmlns:i=\"http://www.w3.org/2001/XMLSchema-instance\"><propSet><name>config.hardware</name><val><numCPU>2</numCPU>\
            <memoryMB>64</memoryMB><device i:type=\"VirtualLsiLogicController\"><key>1000</key><busNumber>0</busNumber></device>\
            <device i:type=\"VirtualDisk\"><key>2001</key><deviceInfo><label>Hard disk 2</label></deviceInfo><backing i:type=\"VirtualDiskRawDiskMappingVer1BackingInfo\">\
            <fileName>[d] w/b.vmdk</fileName></backing><controllerKey>1000</controllerKey><unitNumber>1</unitNumber><capacityInKB>8</capacityInKB></device>\
            <device i:type=\"VirtualDisk\"><key>2000</key><backing i:type=\"VirtualDiskFlatVer2BackingInfo\"><fileName>[d] w/a.vmdk</fileName></backing>\
            <controllerKey>1000</controllerKey><unitNumber>0</unitNumber><capacityInKB>4</capacityInKB></device></val></propSet></objects>";
        let document = wire::parse(object).unwrap();
        let raw = Raw::of(document.root_element());
        let disks: Vec<_> =
            raw.vm.disks.iter().map(|disk| (disk.name.as_str(), disk.source.as_str(), disk.capacity, disk.bus.as_str())).collect();
        assert_eq!(disks, [("disk-0", "[d] w/a.vmdk", 4096, "scsi"), ("disk-1", "[d] w/b.vmdk", 8192, "scsi")]);
        assert_eq!(raw.vm.problem, "Hard disk 2 is a raw device mapping (RDM)");
    }
}
