//! A domain's XML as every provider describes a VM.
//!
//! Owns: which element means what. Never: starts a process, opens a disk. A crash here costs one look.
//! Source: libvirt, Domain XML format (formatdomain).

use std::collections::HashMap;

use roxmltree::{Document, Node, ParsingOptions};
use shared::vm::{Disk, Nic, Vm};

/// Most nodes of a domain's description: that of 64 disks has some thousand.
const NODES: u32 = 100_000;

/// What belongs to a domain beside its XML.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// In libvirt's words: `running`, `shut off`, `paused`, …
    pub state: String,
    /// Number of snapshots.
    pub snapshots: u32,
    /// Bytes by target device.
    pub capacities: HashMap<String, u64>,
    /// Paths of volumes, by pool and name.
    pub volumes: HashMap<(String, String), String>,
}

/// Pools and names of the volumes that a domain's disks are.
pub fn volumes(xml: &str) -> Vec<(String, String)> {
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES, ..ParsingOptions::default() };
    let Ok(document) = Document::parse_with_options(xml, options) else { return Vec::new() };
    let sources = document.descendants().filter(|node| node.has_tag_name("source"));
    let volume = |source: Node| Some((source.attribute("pool")?.to_owned(), source.attribute("volume")?.to_owned()));
    sources.filter_map(volume).collect()
}

/// One domain, and what its disks need to be opened.
#[derive(Clone, Debug)]
pub struct Domain {
    /// The VM.
    pub vm: Vm,
    /// By disk: the format that the XML declares.
    pub formats: Vec<String>,
    /// By disk: the target device, by which libvirt calls it.
    pub targets: Vec<String>,
    /// Target devices of drives that are no disks of the VM: CD-ROMs, floppies.
    pub others: Vec<String>,
    /// Target devices of the VM's disks that the guest only reads.
    pub read_only: Vec<String>,
    /// Whether its UEFI keeps its variables in an image that holds no snapshots.
    pub raw_variables: bool,
    /// Its number, as long as it exists in memory.
    pub number: Option<u32>,
    /// Whether nobody can be writing to its files: libvirt says `shut off`, and it has no number.
    pub is_off: bool,
}

impl Domain {
    /// Target devices and formats of the disks that the guest writes to.
    pub fn written(&self) -> impl Iterator<Item = (&str, &str)> {
        let all = self.targets.iter().zip(&self.formats);
        all.filter(|(target, _)| !self.read_only.contains(target)).map(|(target, format)| (target.as_str(), format.as_str()))
    }
}

/// Reads a domain's XML.
///
/// # Errors
/// When it is no XML of a domain with a UUID and a name.
pub fn read(xml: &str, facts: &Facts) -> Result<Domain, String> {
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(xml, options).map_err(|e| format!("a domain's XML cannot be read: {e}"))?;
    let root = document.root_element();
    let (id, name) = (text(root, "uuid"), text(root, "name"));
    if !root.has_tag_name("domain") || id.is_empty() || name.is_empty() {
        return Err("that is no domain with a name and a UUID".to_owned());
    }
    let os = child(root, "os");
    let guest = os_of(root);
    let mut vm = Vm {
        id: id.to_owned(),
        name: name.to_owned(),
        path: format!("/{name}"),
        os: family(guest).to_owned(),
        os_version: guest.rsplit_once("//").map_or(guest, |(_, rest)| rest).to_owned(),
        cpu: text(root, "vcpu").parse().unwrap_or_default(),
        memory_mb: child(root, "memory").map_or(0, mebibytes),
        firmware: if os.is_some_and(is_uefi) { "uefi" } else { "bios" }.to_owned(),
        power_state: power(&facts.state).to_owned(),
        tools_status: tools(root).to_owned(),
        snapshots: facts.snapshots,
        ..Vm::default()
    };
    let (mut problems, mut formats, mut targets, mut read_only) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let devices = child(root, "devices");
    let all = |name: &'static str| devices.into_iter().flat_map(move |devices| children(devices, name));
    // A LUN that is passed through is a disk, too, of a type that is not read.
    let is_disk = |disk: &Node| !matches!(disk.attribute("device"), Some("cdrom" | "floppy"));
    let target_of = |disk: Node| child(disk, "target").and_then(|target| target.attribute("dev")).map(str::to_owned);
    let others = all("disk").filter(|disk| !is_disk(disk)).filter_map(target_of).collect();
    for device in all("disk").filter(is_disk) {
        let target = child(device, "target").and_then(|target| target.attribute("dev")).unwrap_or("a disk");
        let (kind, place) = (device.attribute("type").unwrap_or("unknown"), child(device, "source"));
        let named = |name: &str| place.and_then(|place| place.attribute(name)).unwrap_or_default().to_owned();
        let source = match kind {
            "file" => named("file"),
            "block" => named("dev"),
            "volume" => facts.volumes.get(&(named("pool"), named("volume"))).cloned().unwrap_or_default(),
            // QEMU reads it while the domain runs; nobody here does.
            "network" => format!("{}:{}", named("protocol"), named("name")),
            _ => String::new(),
        };
        let format = child(device, "driver").and_then(|driver| driver.attribute("type")).unwrap_or("raw");
        match kind {
            "file" | "block" if source.is_empty() => problems.push(format!("{target} has no file")),
            "volume" if source.is_empty() => {
                problems.push(format!("libvirt does not find the volume {} of the pool {} ({target})", named("volume"), named("pool")));
            }
            "network" if facts.state == "shut off" => {
                problems.push(format!("{target} is {source}, which QEMU alone reads: export it while the domain runs"));
            }
            "file" | "block" | "volume" | "network" => {}
            other => problems.push(format!("{target} is of type {other:?}; disks of type file, block, volume and network are read")),
        }
        if child(device, "encryption").is_some() || child(device, "source").is_some_and(|source| child(source, "encryption").is_some()) {
            problems.push(format!("{target} is encrypted"));
        }
        if child(device, "shareable").is_some() {
            problems.push(format!("{target} is shared with other domains"));
        }
        if child(device, "readonly").is_some() {
            read_only.push(target.to_owned());
        }
        formats.push(format.to_owned());
        targets.push(target.to_owned());
        vm.disks.push(Disk {
            name: format!("disk-{}", vm.disks.len()),
            source,
            capacity: facts.capacities.get(target).copied().unwrap_or_default(),
            format: format.to_owned(),
            thin_provisioned: format != "raw",
            bus: child(device, "target").and_then(|target| target.attribute("bus")).unwrap_or_default().to_owned(),
        });
    }
    for device in all("interface") {
        let source = child(device, "source");
        let network = ["network", "bridge", "dev"].into_iter().find_map(|name| source.and_then(|source| source.attribute(name)));
        vm.nics.push(Nic {
            name: format!("nic-{}", vm.nics.len()),
            model: child(device, "model").and_then(|model| model.attribute("type")).unwrap_or_default().to_owned(),
            network: network.unwrap_or(device.attribute("type").unwrap_or_default()).to_owned(),
            mac: child(device, "mac").and_then(|mac| mac.attribute("address")).unwrap_or_default().to_ascii_lowercase(),
        });
    }
    if vm.disks.is_empty() {
        problems.push("it has no disk".to_owned());
    }
    vm.problem = problems.join("; ");
    let number = root.attribute("id").and_then(|id| id.parse().ok());
    let is_off = facts.state == "shut off" && number.is_none();
    let raw_variables = os.is_some_and(|os| is_uefi(os) && child(os, "nvram").and_then(|file| file.attribute("format")) != Some("qcow2"));
    Ok(Domain { vm, formats, targets, others, read_only, raw_variables, number, is_off })
}

/// The child of that name.
pub fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.is_element() && child.tag_name().name() == name)
}

/// The children of that name.
pub fn children<'a, 'input>(node: Node<'a, 'input>, name: &'static str) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children().filter(move |child| child.is_element() && child.tag_name().name() == name)
}

/// The text of the child of that name, empty where there is none.
pub fn text<'a>(node: Node<'a, '_>, name: &str) -> &'a str {
    child(node, name).and_then(|child| child.text()).map(str::trim).unwrap_or_default()
}

/// A memory size in MiB; libvirt's default unit is KiB, and `KB` is 1000 bytes.
fn mebibytes(node: Node) -> u64 {
    let value: u64 = node.text().map(str::trim).unwrap_or_default().parse().unwrap_or_default();
    let unit: u64 = match node.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => 1 << 10,
    };
    value.saturating_mul(unit) >> 20
}

fn is_uefi(os: Node) -> bool {
    let loader = child(os, "loader");
    os.attribute("firmware") == Some("efi") || loader.is_some_and(|loader| loader.attribute("type") == Some("pflash"))
}

/// The id that virt-install and virt-manager leave: `http://debian.org/debian/12`.
fn os_of<'a>(root: Node<'a, '_>) -> &'a str {
    let metadata = child(root, "metadata");
    let os = metadata.into_iter().flat_map(|metadata| metadata.descendants()).find(|node| {
        node.tag_name().name() == "os" && node.tag_name().namespace().is_some_and(|namespace| namespace.contains("libosinfo"))
    });
    os.and_then(|os| os.attribute("id")).unwrap_or_default()
}

fn family(id: &str) -> &'static str {
    match id {
        "" => "unknown",
        id if id.contains("microsoft.com") => "windows",
        id if ["bsd", "solaris", "haiku", "apple.com", "illumos", "msdos"].iter().any(|other| id.contains(other)) => "other",
        _ => "linux",
    }
}

/// A domain that exists in memory is on, unless nobody runs it.
fn power(state: &str) -> &'static str {
    match state {
        "running" | "idle" | "in shutdown" | "blocked" => "poweredOn",
        "paused" | "pmsuspended" => "suspended",
        _ => "poweredOff",
    }
}

/// Whether the guest's agent has its channel open.
fn tools(root: Node) -> &'static str {
    let targets = root.descendants().filter(|node| node.is_element() && node.tag_name().name() == "target");
    let agent = targets.filter(|target| target.attribute("name") == Some("org.qemu.guest_agent.0")).find_map(|t| t.attribute("state"));
    match agent {
        Some("connected") => "running",
        Some(_) => "notRunning",
        None => "unknown",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const XML: &str = "<domain type='kvm' id='3'><name>web 01</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>\
        <metadata><libosinfo:libosinfo xmlns:libosinfo='http://libosinfo.org/xmlns/libvirt/domain/1.0'>\
        <libosinfo:os id='http://debian.org/debian/12'/></libosinfo:libosinfo></metadata>\
        <memory unit='KiB'>2097152</memory><vcpu placement='static'>2</vcpu>\
        <os firmware='efi'><type arch='x86_64'>hvm</type></os><devices>\
        <disk type='file' device='cdrom'><target dev='sda'/></disk>\
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/srv/a.qcow2'/><target dev='vda' bus='virtio'/></disk>\
        <disk type='block' device='disk'><driver type='raw'/><source dev='/dev/sdb'/><target dev='vdb' bus='virtio'/><readonly/></disk>\
        <interface type='bridge'><mac address='52:54:00:AA:bb:cc'/><source bridge='br0'/><model type='virtio'/></interface>\
        <interface type='user'><mac address='52:54:00:00:00:01'/></interface>\
        <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel></devices></domain>";

    #[test]
    fn a_domain_is_described_as_a_vm() {
        let capacities = HashMap::from([("vda".into(), 5 << 30)]);
        let facts = Facts { state: "running".into(), snapshots: 2, capacities, ..Facts::default() };
        let domain = read(XML, &facts).unwrap();
        assert_eq!((domain.raw_variables, domain.written().collect::<Vec<_>>()), (true, vec![("vda", "qcow2")]));
        let Domain { vm, formats, targets, others, number, is_off, .. } = domain;
        assert_eq!((vm.name.as_str(), vm.path.as_str(), vm.cpu, vm.memory_mb, vm.snapshots), ("web 01", "/web 01", 2, 2048, 2));
        assert_eq!((vm.firmware.as_str(), vm.power_state.as_str(), vm.tools_status.as_str()), ("uefi", "poweredOn", "running"));
        assert_eq!((vm.os.as_str(), vm.os_version.as_str()), ("linux", "debian.org/debian/12"));
        assert_eq!((vm.disks.len(), vm.disks[0].capacity, vm.disks[0].source.as_str()), (2, 5 << 30, "/srv/a.qcow2"));
        assert_eq!(formats, ["qcow2", "raw"]);
        assert_eq!((number, is_off), (Some(3), false));
        assert_eq!((targets, others), (vec!["vda".to_owned(), "vdb".to_owned()], vec!["sda".to_owned()]));
        let nics: Vec<_> = vm.nics.iter().map(|nic| (nic.model.as_str(), nic.network.as_str(), nic.mac.as_str())).collect();
        assert_eq!(nics, [("virtio", "br0", "52:54:00:aa:bb:cc"), ("", "user", "52:54:00:00:00:01")]);
        assert_eq!((vm.disks[1].source.as_str(), vm.problem.as_str()), ("/dev/sdb", ""));

        let volume = XML.replace("type='block'", "type='volume'").replace("dev='/dev/sdb'", "pool='p&amp;' volume='v 1'");
        let key = ("p&".to_owned(), "v 1".to_owned());
        assert_eq!(volumes(&volume), std::slice::from_ref(&key));
        assert!(read(&volume, &facts).unwrap().vm.problem.contains("does not find the volume v 1 of the pool p&"));
        let found = Facts { volumes: HashMap::from([(key, "/srv/p/v 1".to_owned())]), ..facts.clone() };
        let vm = read(&volume, &found).unwrap().vm;
        assert_eq!((vm.disks[1].source.as_str(), vm.problem.as_str()), ("/srv/p/v 1", ""));
        let odd = XML.replace("type='block'", "type='vhostuser'");
        let problem = read(&odd, &facts).unwrap().vm.problem;
        assert!(problem.contains("vdb") && problem.contains("vhostuser"), "{problem}");
    }

    #[test]
    fn what_is_no_domain_is_refused() {
        for bad in
            ["", "<domain/>", "<network><name>a</name><uuid>b</uuid></network>", "<!DOCTYPE a [<!ENTITY b 'c'>]><domain>&b;</domain>"]
        {
            assert!(read(bad, &Facts::default()).is_err(), "{bad}");
        }
        for (value, unit, mib) in
            [("1", "GiB", 1024), ("2048", "KiB", 2), ("1048576", "b", 1), ("18446744073709551615", "TiB", u64::MAX >> 20)]
        {
            let xml = format!("<memory unit='{unit}'>{value}</memory>");
            let document = Document::parse(&xml).unwrap();
            assert_eq!(mebibytes(document.root_element()), mib, "{xml}");
        }
    }
}
