//! An OVF description, written (DSP0243 1.1) as virt-v2v, VMware and VirtualBox take it.
//!
//! Owns: the envelope's text and its escaping. Never: touches a file. A crash here costs nothing: same input, same text.
//!
//! The children of each item stand in alphabetical order, which the schema demands and ovftool checks.

use std::fmt::Write;

use shared::vm::{Nic, Vm};

/// One disk file of the description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFile {
    /// Bare name of the file.
    pub name: String,
    /// Length of the file in bytes.
    pub size: u64,
    /// Size of the logical disk in bytes.
    pub capacity: u64,
    /// Bytes of the logical disk that hold data.
    pub populated: u64,
}

/// Disks that one lsilogic controller takes: addresses 0 to 15 without its own, 7.
const PER_CONTROLLER: usize = 15;
const STREAM: &str = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";

/// The text for this VM with these disks, all of them streamOptimized VMDKs.
pub fn generate(vm: &Vm, disks: &[DiskFile]) -> String {
    let mut out = String::from(
        r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData" xmlns:vmw="http://www.vmware.com/schema/ovf">
"#,
    );
    // Writing to a String cannot fail, so the results carry nothing.
    let _ = files(&mut out, disks);
    let _ = networks(&mut out, &vm.nics);
    let _ = system(&mut out, vm, disks.len());
    out.push_str("</Envelope>\n");
    out
}

fn files(out: &mut String, disks: &[DiskFile]) -> std::fmt::Result {
    writeln!(out, "  <References>")?;
    for (k, disk) in disks.iter().enumerate() {
        writeln!(out, r#"    <File ovf:href="{}" ovf:id="file{}" ovf:size="{}"/>"#, escaped(&disk.name), k + 1, disk.size)?;
    }
    writeln!(out, "  </References>\n  <DiskSection>\n    <Info>Virtual disks</Info>")?;
    for (k, disk) in disks.iter().enumerate() {
        let (number, capacity, populated) = (k + 1, disk.capacity, disk.populated);
        writeln!(
            out,
            r#"    <Disk ovf:capacity="{capacity}" ovf:capacityAllocationUnits="byte" ovf:diskId="vmdisk{number}" ovf:fileRef="file{number}" ovf:format="{STREAM}" ovf:populatedSize="{populated}"/>"#
        )?;
    }
    writeln!(out, "  </DiskSection>")
}

/// A NIC's network; one without a name still needs one.
fn network(nic: &Nic) -> &str {
    if nic.network.is_empty() { "VM Network" } else { &nic.network }
}

fn networks(out: &mut String, nics: &[Nic]) -> std::fmt::Result {
    writeln!(out, "  <NetworkSection>\n    <Info>Logical networks</Info>")?;
    let mut known: Vec<&str> = Vec::new();
    for name in nics.iter().map(network) {
        if known.contains(&name) {
            continue;
        }
        known.push(name);
        let name = escaped(name);
        writeln!(out, "    <Network ovf:name=\"{name}\">\n      <Description>{name}</Description>\n    </Network>")?;
    }
    writeln!(out, "  </NetworkSection>")
}

fn system(out: &mut String, vm: &Vm, disks: usize) -> std::fmt::Result {
    let name = escaped(&vm.name);
    // CIM_OperatingSystem.OSType: 101 Linux 64-bit, 103 Windows Server 2008 R2 (the newest that all importers know), 102 other 64-bit.
    let (id, kind) = match vm.os.as_str() {
        "linux" => (101, "otherLinux64Guest"),
        "windows" => (103, "windows9Server64Guest"),
        _ => (102, "otherGuest64"),
    };
    writeln!(out, "  <VirtualSystem ovf:id=\"{name}\">\n    <Info>A virtual machine</Info>\n    <Name>{name}</Name>")?;
    writeln!(out, "    <OperatingSystemSection ovf:id=\"{id}\" vmw:osType=\"{kind}\">\n      <Info>The guest's operating system</Info>")?;
    if !vm.os_version.is_empty() {
        writeln!(out, "      <Description>{}</Description>", escaped(&vm.os_version))?;
    }
    writeln!(out, "    </OperatingSystemSection>\n    <VirtualHardwareSection>\n      <Info>Virtual hardware</Info>")?;
    writeln!(
        out,
        "      <System>\n        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>\n        <vssd:InstanceID>0</vssd:InstanceID>\n        \
         <vssd:VirtualSystemIdentifier>{name}</vssd:VirtualSystemIdentifier>\n        <vssd:VirtualSystemType>vmx-13</vssd:VirtualSystemType>\n      </System>"
    )?;
    let (cpu, memory) = (vm.cpu.max(1), vm.memory_mb.max(1));
    item(
        out,
        1,
        3,
        &[("AllocationUnits", "hertz * 10^6"), ("ElementName", &format!("{cpu} virtual CPU(s)"))],
        &[("VirtualQuantity", &cpu.to_string())],
    )?;
    item(
        out,
        2,
        4,
        &[("AllocationUnits", "byte * 2^20"), ("ElementName", &format!("{memory} MB of memory"))],
        &[("VirtualQuantity", &memory.to_string())],
    )?;
    let controllers = disks.div_ceil(PER_CONTROLLER);
    for k in 0..controllers {
        let (address, title) = (k.to_string(), format!("SCSI controller {k}"));
        let before = [("Address", address.as_str()), ("Description", "SCSI Controller"), ("ElementName", &title)];
        item_of(out, 3 + k, 6, &before, None, Some("lsilogic"), &[])?;
    }
    for k in 0..disks {
        let (bus, slot) = (k / PER_CONTROLLER, k % PER_CONTROLLER);
        let (address, title) = ((slot + usize::from(slot >= 7)).to_string(), format!("Hard disk {}", k + 1));
        let resource = format!("ovf:/disk/vmdisk{}", k + 1);
        let before = [("AddressOnParent", address.as_str()), ("ElementName", &title), ("HostResource", &resource)];
        item_of(out, 3 + controllers + k, 17, &before, Some(3 + bus), None, &[])?;
    }
    for (k, nic) in vm.nics.iter().enumerate() {
        let (address, network, title) = ((7 + k).to_string(), network(nic), format!("Network adapter {}", k + 1));
        let mut before =
            vec![("AddressOnParent", address.as_str()), ("AutomaticAllocation", "true"), ("Connection", network), ("ElementName", &title)];
        if !nic.mac.is_empty() {
            before.insert(0, ("Address", &nic.mac));
        }
        item_of(out, 3 + controllers + disks + k, 10, &before, None, Some(card(&nic.model)), &[])?;
    }
    let firmware = if vm.firmware == "uefi" { "efi" } else { "bios" };
    writeln!(out, r#"      <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="{firmware}"/>"#)?;
    writeln!(out, "    </VirtualHardwareSection>\n  </VirtualSystem>")
}

/// The card as importers spell it. What only KVM knows becomes vmxnet3, the card that VMware and virt-v2v replace most easily.
fn card(model: &str) -> &'static str {
    match model.to_ascii_lowercase().as_str() {
        "e1000" => "E1000",
        "e1000e" => "E1000e",
        "pcnet32" => "PCNet32",
        _ => "VmxNet3",
    }
}

fn item(out: &mut String, instance: usize, kind: u32, before: &[(&str, &str)], after: &[(&str, &str)]) -> std::fmt::Result {
    item_of(out, instance, kind, before, None, None, after)
}

/// One item; `before` sorts before InstanceID, `after` behind ResourceType.
fn item_of(
    out: &mut String,
    instance: usize,
    kind: u32,
    before: &[(&str, &str)],
    parent: Option<usize>,
    subtype: Option<&str>,
    after: &[(&str, &str)],
) -> std::fmt::Result {
    writeln!(out, "      <Item>")?;
    let mut line = |name: &str, value: &str| writeln!(out, "        <rasd:{name}>{}</rasd:{name}>", escaped(value));
    for (name, value) in before {
        line(name, value)?;
    }
    line("InstanceID", &instance.to_string())?;
    if let Some(parent) = parent {
        line("Parent", &parent.to_string())?;
    }
    if let Some(subtype) = subtype {
        line("ResourceSubType", subtype)?;
    }
    line("ResourceType", &kind.to_string())?;
    for (name, value) in after {
        line(name, value)?;
    }
    writeln!(out, "      </Item>")
}

/// Text for an element or an attribute. What XML 1.0 cannot hold at all becomes U+FFFD.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\t' => out.push_str("&#9;"),
            '\n' => out.push_str("&#10;"),
            '\r' => out.push_str("&#13;"),
            '\u{0}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}
