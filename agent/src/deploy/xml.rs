//! A domain's description.
//!
//! Owns: every element that a deployed domain has. Never: reads anything, quotes nothing unquoted. A crash here costs nothing.
//! Source: libvirt, Domain XML format (formatdomain).

use std::fmt::Write as _;
use std::path::Path;

use shared::deploy::Wish;

/// The network that needs nothing of the host.
pub const USER: &str = "user";

fn quoted(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;").replace('"', "&quot;")
}

/// The XML of a domain: its disks (file and format) in order, its card, a serial console, a display on the loopback.
pub fn domain(wish: &Wish, uuid: &str, mac: &str, disks: &[(&Path, &str)], accelerator: &str) -> String {
    let bus = wish.disk_bus.as_deref().unwrap_or("virtio");
    let is_uefi = wish.firmware.as_deref() == Some("uefi");
    // IDE is the older board's; everything else wants the newer one.
    let machine = if bus == "ide" { "pc" } else { "q35" };
    let (kind, cpu) = if accelerator == "kvm" { ("kvm", "<cpu mode='host-passthrough'/>") } else { ("qemu", "<cpu mode='maximum'/>") };
    let firmware = if is_uefi { " firmware='efi'" } else { "" };
    let mut xml = format!(
        "<domain type='{kind}'><name>{}</name><uuid>{}</uuid><memory unit='MiB'>{}</memory><vcpu>{}</vcpu>\
         <os{firmware}><type arch='x86_64' machine='{machine}'>hvm</type></os><features><acpi/><apic/></features>{cpu}<clock offset='utc'/>\
         <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>restart</on_crash><devices>",
        quoted(&wish.name),
        quoted(uuid),
        wish.memory_mb,
        wish.cpu
    );
    // Writing into a String cannot fail.
    if bus == "scsi" {
        xml.push_str("<controller type='scsi' index='0' model='virtio-scsi'/>");
    }
    let prefix = match bus {
        "virtio" => "vd",
        "ide" => "hd",
        _ => "sd",
    };
    for (n, (letter, (path, format))) in ('a'..='z').zip(disks).enumerate() {
        let file = quoted(&path.display().to_string());
        let _ = write!(
            xml,
            "<disk type='file' device='disk'><driver name='qemu' type='{format}' discard='unmap'/><source file='{file}'/>\
             <target dev='{prefix}{letter}' bus='{bus}'/><boot order='{}'/></disk>",
            n + 1
        );
    }
    let (kind, source) = match (wish.network.as_deref(), wish.bridge.as_deref()) {
        (Some(USER), _) => ("user", String::new()),
        (_, Some(bridge)) => ("bridge", format!("<source bridge='{}'/>", quoted(bridge))),
        (name, None) => ("network", format!("<source network='{}'/>", quoted(name.unwrap_or("default")))),
    };
    let model = wish.nic_model.as_deref().unwrap_or("virtio");
    let _ = write!(xml, "<interface type='{kind}'><mac address='{}'/>{source}<model type='{model}'/></interface>", quoted(mac));
    xml.push_str(
        "<serial type='pty'/><console type='pty'/><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
         <input type='tablet' bus='usb'/><graphics type='vnc' autoport='yes' listen='127.0.0.1'/><video><model type='vga'/></video>\
         <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng></devices></domain>",
    );
    xml
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_has_what_was_wished_and_nothing_breaks_out() {
        let wish = Wish {
            name: "a'<b>&".into(),
            cpu: 2,
            memory_mb: 512,
            bridge: Some("br0".into()),
            disk_bus: Some("ide".into()),
            ..Wish::default()
        };
        let xml = domain(&wish, "u", "52:54:00:00:00:01", &[(Path::new("/x/a'b.qcow2"), "qcow2"), (Path::new("/x/c.raw"), "raw")], "tcg");
        let document = roxmltree::Document::parse(&xml).expect("well-formed");
        let text =
            |name: &str| document.descendants().find(|node| node.has_tag_name(name)).and_then(|node| node.text()).unwrap_or_default();
        assert_eq!((text("name"), text("vcpu"), text("memory")), ("a'<b>&", "2", "512"));
        let targets: Vec<_> =
            document.descendants().filter(|node| node.has_tag_name("target")).filter_map(|node| node.attribute("dev")).collect();
        assert_eq!(targets, ["hda", "hdb"]);
        assert!(xml.contains("type='qemu'") && xml.contains("machine='pc'") && xml.contains("<source bridge='br0'/>"), "{xml}");
        let uefi = domain(&Wish { firmware: Some("uefi".into()), network: Some(USER.into()), ..wish }, "u", "m", &[], "kvm");
        assert!(uefi.contains("firmware='efi'") && uefi.contains("<domain type='kvm'>"), "{uefi}");
    }
}
