//! An OVF description, read (DSP0243 1.1, and what 2.0 shares with it).
//!
//! Owns: which files are disks, in which order, and the VM's hardware. Never: opens a file that the text names.
//! A crash here costs nothing: pure functions over at most 1 MiB of text.

use std::collections::HashMap;

use roxmltree::{Document, Node, ParsingOptions};
use shared::vm::{Disk, Nic, Vm};

use super::super::disk::{FormatError, Result};
use super::{MAX_ENTRIES, MAX_OVF, bare, corrupt, guard, refused, shown};

/// Nodes of the XML tree at most; a real description has some hundred.
const MAX_NODES: u32 = 100_000;
/// Most hardware items that are looked at.
const MAX_ITEMS: usize = 1024;

/// A disk that the description names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRef {
    /// `ovf:diskId`.
    pub id: String,
    /// The file's bare name.
    pub file: String,
    /// `ovf:size` of the file, where it is given.
    pub size: Option<u64>,
    /// Capacity in bytes.
    pub capacity: u64,
    /// `ovf:format`, a URI.
    pub format: String,
    /// What it hangs at: `scsi`, `ide`, `sata`, `nvme`; empty where no item says.
    pub bus: String,
}

/// A description.
#[derive(Clone, Debug, PartialEq)]
pub struct Ovf {
    /// The VM; its `id` is left to the caller.
    pub vm: Vm,
    /// Its disks, in the order the guest sees them; as many as `vm.disks`.
    pub disks: Vec<DiskRef>,
}

fn bad(reason: impl Into<String>) -> FormatError {
    corrupt("OVF", 0, 0, reason)
}

/// Reads a description. A DTD, a path, a compressed or chunked file, a delta disk or several VMs are refused by name.
pub fn parse(bytes: &[u8]) -> Result<Ovf> {
    if bytes.len() as u64 > MAX_OVF {
        return Err(refused(format!("its OVF is over {MAX_OVF} bytes")));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| refused("its OVF is not UTF-8"))?;
    // An OVF slot may be padded with NULs by other tools.
    let text = text.trim_start_matches('\u{feff}').trim_end_matches('\0');
    guard::check(text)?;
    let options = ParsingOptions { allow_dtd: false, nodes_limit: MAX_NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options).map_err(|e| bad(format!("not well-formed XML: {e}")))?;
    let root = document.root_element();
    if root.tag_name().name() != "Envelope" {
        return Err(bad(format!("its root is {}, Envelope would be right", shown(root.tag_name().name()))));
    }
    let systems: Vec<Node> = root.descendants().filter(|node| node.tag_name().name() == "VirtualSystem").take(2).collect();
    let [system] = systems[..] else {
        return Err(match systems.len() {
            0 => bad("no VirtualSystem"),
            _ => FormatError::Unsupported("ova: an OVF of several VMs is not built yet; give each VM its own".to_owned()),
        });
    };
    let known = disks(root)?;
    let hardware = child(system, "VirtualHardwareSection");
    let items = hardware.map(|section| items(section, &default_configuration(root))).transpose()?.unwrap_or_default();
    let disks = in_order(known, &items)?;
    let vm = describe(system, hardware, &items, &disks);
    Ok(Ovf { vm, disks })
}

fn children<'a, 'i: 'a>(node: Node<'a, 'i>, name: &'static str) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| child.is_element() && child.tag_name().name() == name)
}

fn child<'a, 'i: 'a>(node: Node<'a, 'i>, name: &'static str) -> Option<Node<'a, 'i>> {
    children(node, name).next()
}

fn child_text<'a>(node: Node<'a, '_>, name: &'static str) -> &'a str {
    child(node, name).and_then(|child| child.text()).unwrap_or_default().trim()
}

/// An attribute of the OVF namespace or of none; foreign ones of the same name (`vmw:id`) do not count.
fn attribute<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    let mine = |namespace: &str| namespace.contains("/ovf/envelope/") || namespace.ends_with("/ovf/1/envelope");
    node.attributes().find(|a| a.name() == name && a.namespace().is_none_or(mine)).map(|a| a.value().trim())
}

/// An attribute of any namespace.
fn any_attribute<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    node.attributes().find(|a| a.name() == name).map(|a| a.value().trim())
}

/// All disks of the DiskSection that have a file, by id, in the section's order.
fn disks(root: Node<'_, '_>) -> Result<Vec<DiskRef>> {
    let mut files: HashMap<&str, Node> = HashMap::new();
    for file in child(root, "References").into_iter().flat_map(|section| children(section, "File")) {
        let id = attribute(file, "id").ok_or_else(|| bad("a File without an id"))?;
        if files.len() == MAX_ENTRIES {
            return Err(refused(format!("its OVF names over {MAX_ENTRIES} files")));
        }
        if files.insert(id, file).is_some() {
            return Err(bad(format!("two files have the id {}", shown(id))));
        }
    }
    let mut out: Vec<DiskRef> = Vec::new();
    for disk in child(root, "DiskSection").into_iter().flat_map(|section| children(section, "Disk")) {
        let id = attribute(disk, "diskId").ok_or_else(|| bad("a Disk without a diskId"))?;
        if out.len() == MAX_ENTRIES {
            return Err(refused(format!("its OVF has over {MAX_ENTRIES} disks")));
        }
        let entry = disk_ref(disk, id, &files)?;
        if out.iter().any(|other| other.id == entry.id || other.file == entry.file) {
            return Err(bad(format!("the disk {} or its file stands there twice", shown(id))));
        }
        out.push(entry);
    }
    Ok(out)
}

fn disk_ref(disk: Node<'_, '_>, id: &str, files: &HashMap<&str, Node>) -> Result<DiskRef> {
    if attribute(disk, "parentRef").is_some() {
        return Err(refused(format!("the disk {} is a delta over another one; consolidate the snapshots first", shown(id))));
    }
    let Some(file_id) = attribute(disk, "fileRef").filter(|file| !file.is_empty()) else {
        return Err(FormatError::Unsupported(format!("ova: the disk {} has no file (an empty disk), which is not built yet", shown(id))));
    };
    let file = files
        .get(file_id)
        .ok_or_else(|| bad(format!("the disk {} names the file id {}, which is not in References", shown(id), shown(file_id))))?;
    let name = attribute(*file, "href").unwrap_or_default();
    bare(name, "its OVF")?;
    if let Some(compression) = attribute(*file, "compression").filter(|method| !method.is_empty() && *method != "identity") {
        return Err(FormatError::Unsupported(format!(
            "ova: {} has compression {}, which is not built yet; uncompressed files are read",
            shown(name),
            shown(compression)
        )));
    }
    if attribute(*file, "chunkSize").is_some() {
        return Err(FormatError::Unsupported(format!(
            "ova: {} is cut into chunks, which is not built yet; whole files are read",
            shown(name)
        )));
    }
    let number = |text: &str| text.parse::<u64>().map_err(|_| bad(format!("{} is not a number of the disk {}", shown(text), shown(id))));
    let size = attribute(*file, "size").map(number).transpose()?;
    let factor = unit(attribute(disk, "capacityAllocationUnits").unwrap_or("byte"))?;
    let capacity = number(attribute(disk, "capacity").unwrap_or_default())?;
    let capacity = capacity.checked_mul(factor).filter(|bytes| *bytes <= i64::MAX as u64);
    let capacity = capacity.ok_or_else(|| bad(format!("the capacity of the disk {} overflows", shown(id))))?;
    let format = attribute(disk, "format").unwrap_or_default().to_owned();
    Ok(DiskRef { id: id.to_owned(), file: name.to_owned(), size, capacity, format, bus: String::new() })
}

/// Bytes in an allocation unit: `byte * 2^20`, `byte * 1024`, and the names that old tools write.
fn unit(text: &str) -> Result<u64> {
    let unknown = || bad(format!("the unit {} is not like \"byte * 2^20\"", shown(text)));
    let mut factors = text.split('*').map(str::trim);
    let base: u64 = match factors.next().unwrap_or_default().to_ascii_lowercase().as_str() {
        "" | "byte" | "bytes" => 1,
        "kb" | "kilobyte" | "kilobytes" => 1 << 10,
        "mb" | "megabyte" | "megabytes" => 1 << 20,
        "gb" | "gigabyte" | "gigabytes" => 1 << 30,
        _ => return Err(unknown()),
    };
    factors.try_fold(base, |product, factor| {
        let (number, power) = factor.split_once('^').unwrap_or((factor, "1"));
        let number: u64 = number.trim().parse().map_err(|_| unknown())?;
        let power: u32 = power.trim().parse().map_err(|_| unknown())?;
        number.checked_pow(power).and_then(|value| product.checked_mul(value)).ok_or_else(unknown)
    })
}

/// The deployment option that counts when nobody chooses: the one marked as default, else the first.
fn default_configuration(root: Node<'_, '_>) -> String {
    let options = || child(root, "DeploymentOptionSection").into_iter().flat_map(|section| children(section, "Configuration"));
    let marked = options().find(|option| attribute(*option, "default") == Some("true"));
    marked.or_else(|| options().next()).and_then(|option| attribute(option, "id")).unwrap_or_default().to_owned()
}

/// The hardware items that count: normal bounds, the default configuration.
fn items<'a, 'i: 'a>(section: Node<'a, 'i>, configuration: &str) -> Result<Vec<Node<'a, 'i>>> {
    let all = section.children().filter(|node| matches!(node.tag_name().name(), "Item" | "StorageItem" | "EthernetPortItem"));
    let chosen =
        |item: &Node| attribute(*item, "configuration").is_none_or(|names| names.split_whitespace().any(|name| name == configuration));
    let normal = |item: &Node| matches!(attribute(*item, "bound"), None | Some("" | "normal"));
    let out: Vec<Node> = all.filter(chosen).filter(normal).take(MAX_ITEMS + 1).collect();
    if out.len() > MAX_ITEMS {
        return Err(refused(format!("its OVF has over {MAX_ITEMS} hardware items")));
    }
    Ok(out)
}

fn kind(item: Node<'_, '_>) -> u32 {
    child_text(item, "ResourceType").parse().unwrap_or(0)
}

/// Sorts the disks as the guest sees them: controller after controller as they first appear, by address on each. Disks that no item
/// attaches come last rather than be lost.
fn in_order(mut known: Vec<DiskRef>, items: &[Node]) -> Result<Vec<DiskRef>> {
    let mut parents: Vec<&str> = Vec::new();
    let mut places: Vec<(usize, u64, String)> = Vec::new();
    for item in items.iter().copied().filter(|item| kind(*item) == 17) {
        let resource = child_text(item, "HostResource");
        let id = resource.trim_start_matches("ovf:").trim_start_matches('/').strip_prefix("disk/");
        let Some(id) = id else {
            return Err(FormatError::Unsupported(format!(
                "ova: a disk with the resource {} is not built yet; ovf:/disk/ID is read",
                shown(resource)
            )));
        };
        if !known.iter().any(|disk| disk.id == id) {
            return Err(bad(format!("an item names the disk {}, which is not in the DiskSection", shown(id))));
        }
        if places.iter().any(|(_, _, other)| other == id) {
            continue;
        }
        let parent = child_text(item, "Parent");
        let bus = parents.iter().position(|other| *other == parent).unwrap_or_else(|| {
            parents.push(parent);
            parents.len() - 1
        });
        places.push((bus, child_text(item, "AddressOnParent").parse().unwrap_or(u64::MAX), id.to_owned()));
    }
    places.sort_by_key(|(bus, address, _)| (*bus, *address));
    let mut out = Vec::with_capacity(known.len());
    for (parent, _, id) in places {
        if let Some(at) = known.iter().position(|disk| disk.id == id) {
            let bus = parents.get(parent).map_or("", |parent| bus(items, parent)).to_owned();
            out.push(DiskRef { bus, ..known.remove(at) });
        }
    }
    out.append(&mut known);
    Ok(out)
}

/// The API's word for the controller with this InstanceID.
fn bus(items: &[Node], instance: &str) -> &'static str {
    let Some(item) = items.iter().find(|item| child_text(**item, "InstanceID") == instance) else { return "" };
    let subtype = child_text(*item, "ResourceSubType").to_ascii_lowercase();
    match kind(*item) {
        5 => "ide",
        6 if subtype.contains("virtio") => "virtio",
        6 => "scsi",
        20 if subtype.contains("nvme") => "nvme",
        20 => "sata",
        _ => "",
    }
}

/// The VM as the items describe it. What they do not say stays at its default.
fn describe(system: Node<'_, '_>, hardware: Option<Node<'_, '_>>, items: &[Node], disks: &[DiskRef]) -> Vm {
    let name = Some(child_text(system, "Name")).filter(|name| !name.is_empty());
    let mut vm = Vm {
        name: name.or_else(|| attribute(system, "id")).unwrap_or_default().to_owned(),
        firmware: if hardware.is_some_and(efi) { "uefi" } else { "bios" }.to_owned(),
        power_state: "poweredOff".to_owned(),
        tools_status: "unknown".to_owned(),
        ..Vm::default()
    };
    (vm.os, vm.os_version) = guest(system);
    for item in items {
        let quantity: u64 = child_text(*item, "VirtualQuantity").parse().unwrap_or(0);
        match kind(*item) {
            3 => vm.cpu = u32::try_from(quantity).unwrap_or(u32::MAX),
            4 => {
                let units = Some(child_text(*item, "AllocationUnits")).filter(|units| !units.is_empty());
                let factor = units.map_or(Ok(1 << 20), unit).unwrap_or(1 << 20);
                vm.memory_mb = quantity.saturating_mul(factor) >> 20;
            }
            10 => vm.nics.push(nic(*item, vm.nics.len())),
            _ => {}
        }
    }
    vm.disks = disks
        .iter()
        .enumerate()
        .map(|(k, disk)| Disk {
            name: format!("disk-{k}"),
            source: disk.file.clone(),
            capacity: disk.capacity,
            format: format(&disk.format),
            thin_provisioned: true,
            bus: disk.bus.clone(),
        })
        .collect();
    vm
}

/// The API's word for a format URI; the content decides in the end.
fn format(uri: &str) -> String {
    let uri = uri.to_ascii_lowercase();
    ["vmdk", "qcow2", "vhd", "raw"].into_iter().find(|word| uri.contains(word)).unwrap_or("vmdk").to_owned()
}

fn nic(item: Node<'_, '_>, number: usize) -> Nic {
    let subtype = child_text(item, "ResourceSubType").split_whitespace().next().unwrap_or_default().to_ascii_lowercase();
    let address = child_text(item, "Address").to_ascii_lowercase().replace('-', ":");
    let mac =
        address.split(':').count() == 6 && address.split(':').all(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
    Nic {
        name: format!("nic-{number}"),
        model: subtype,
        network: child_text(item, "Connection").to_owned(),
        mac: if mac { address } else { String::new() },
    }
}

/// True when the hardware section asks for EFI, in VMware's words or VirtualBox's.
fn efi(hardware: Node<'_, '_>) -> bool {
    let vmware = hardware.children().filter(|node| matches!(node.tag_name().name(), "Config" | "ExtraConfig")).any(|node| {
        any_attribute(node, "key") == Some("firmware")
            && any_attribute(node, "value").is_some_and(|value| value.eq_ignore_ascii_case("efi"))
    });
    let system = hardware.parent();
    let machine = system.and_then(|system| child(system, "Machine")).and_then(|machine| child(machine, "Hardware"));
    let firmware = machine.and_then(|hardware| child(hardware, "Firmware")).and_then(|node| any_attribute(node, "type"));
    vmware || firmware.is_some_and(|kind| kind.to_ascii_uppercase().starts_with("EFI"))
}

/// Family and version of the guest, from VMware's type, the CIM number, or the words.
fn guest(system: Node<'_, '_>) -> (String, String) {
    let Some(section) = child(system, "OperatingSystemSection") else {
        return ("unknown".to_owned(), String::new());
    };
    let described = child_text(section, "Description").to_owned();
    let id: u32 = attribute(section, "id").and_then(|id| id.parse().ok()).unwrap_or(0);
    let words = format!("{} {described}", any_attribute(section, "osType").unwrap_or_default()).to_ascii_lowercase();
    let has = |names: &[&str]| names.iter().any(|name| words.contains(name));
    let linux = [
        "linux", "ubuntu", "debian", "centos", "rhel", "red hat", "fedora", "suse", "sles", "photon", "alma", "rocky", "oracle", "coreos",
        "amazon",
    ];
    // CIM_OperatingSystem.OSType.
    let windows_id = matches!(id, 15..=19 | 58 | 63 | 67 | 69..=74 | 76..=77 | 103 | 105 | 111..=113);
    let linux_id = matches!(id, 36 | 79..=101 | 106..=110);
    let family = match () {
        () if has(&["windows", "winnet", "winxp", "winlonghorn", "winvista"]) => "windows",
        () if has(&linux) => "linux",
        () if windows_id => "windows",
        () if linux_id => "linux",
        () if id == 0 && words.trim().is_empty() => "unknown",
        () => "other",
    };
    (family.to_owned(), described)
}
