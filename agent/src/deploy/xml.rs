//! A domain's description.
//!
//! Owns: every element that a deployed domain has. Never: reads anything, quotes nothing unquoted. A crash here costs nothing.
//! Source: libvirt, Domain XML format (formatdomain).

use std::fmt::Write as _;
use std::path::Path;

use shared::deploy::Wish;

use crate::sources::libvirt::quoted;

/// The network that needs nothing of the host.
pub const USER: &str = "user";
/// The network that libvirt brings.
pub const DEFAULT: &str = "default";

/// What a domain has that is started apart from everything, for a proof and not to stay.
pub struct Apart<'a> {
    /// Pipes of this name and `.in`, `.out` are its serial console.
    pub console: &'a Path,
    /// Where a UEFI's variables go.
    pub variables: &'a Path,
    /// The network that it may have; none: its card has no link.
    pub network: Option<&'a str>,
}

/// The XML of a domain: its disks (file and format) in order, its cards (as many as there are addresses), a serial console, a display on the loopback. One that is started
/// apart has no display to look at from elsewhere, and its disks need not survive the host.
pub fn domain(wish: &Wish, uuid: &str, macs: &[String], disks: &[(&Path, &str)], accelerator: &str, apart: Option<&Apart>) -> String {
    let bus = wish.disk_bus.as_deref().unwrap_or("virtio");
    let is_uefi = wish.firmware.as_deref() == Some("uefi");
    // IDE is the older board's; everything else wants the newer one.
    let machine = if bus == "ide" { "pc" } else { "q35" };
    let (kind, cpu) = if accelerator == "kvm" { ("kvm", "<cpu mode='host-passthrough'/>") } else { ("qemu", "<cpu mode='maximum'/>") };
    let firmware = if is_uefi { " firmware='efi'" } else { "" };
    // What the firmware says is part of what a proof hears.
    let (os, crash) = match apart {
        Some(apart) if is_uefi => (format!("<nvram>{}</nvram>", quoted(&apart.variables.display().to_string())), "destroy"),
        Some(_) => ("<bios useserial='yes'/>".to_owned(), "destroy"),
        None => (String::new(), "restart"),
    };
    let mut xml = format!(
        "<domain type='{kind}'><name>{}</name><uuid>{}</uuid><memory unit='MiB'>{}</memory><vcpu>{}</vcpu>\
         <os{firmware}><type arch='x86_64' machine='{machine}'>hvm</type>{os}</os><features><acpi/><apic/></features>{cpu}<clock offset='utc'/>\
         <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>{crash}</on_crash><devices>",
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
    let cache = if apart.is_some() { " cache='unsafe'" } else { "" };
    for (n, (letter, (path, format))) in ('a'..='z').zip(disks).enumerate() {
        let file = quoted(&path.display().to_string());
        let _ = write!(
            xml,
            "<disk type='file' device='disk'><driver name='qemu' type='{format}'{cache} discard='unmap'/><source file='{file}'/>\
             <target dev='{prefix}{letter}' bus='{bus}'/><boot order='{}'/></disk>",
            n + 1
        );
    }
    let model = wish.nic_model.as_deref().unwrap_or("virtio");
    for (card, mac) in wish.cards().iter().zip(macs) {
        let (kind, source) = match (apart.map(|apart| apart.network), card.network.as_deref(), card.bridge.as_deref()) {
            (Some(None), _, _) => ("user", "<link state='down'/>".to_owned()),
            (Some(Some(name)), _, _) => ("network", format!("<source network='{}'/>", quoted(name))),
            (None, Some(USER), _) => ("user", String::new()),
            (None, _, Some(bridge)) => ("bridge", format!("<source bridge='{}'/>", quoted(bridge))),
            (None, name, None) => ("network", format!("<source network='{}'/>", quoted(name.unwrap_or(DEFAULT)))),
        };
        let _ = write!(xml, "<interface type='{kind}'><mac address='{}'/>{source}<model type='{model}'/></interface>", quoted(mac));
    }
    match apart {
        Some(apart) => {
            let _ = write!(xml, "<serial type='pipe'><source path='{}'/></serial>", quoted(&apart.console.display().to_string()));
        }
        None => xml.push_str("<serial type='pty'/><console type='pty'/><graphics type='vnc' autoport='yes' listen='127.0.0.1'/>"),
    }
    xml.push_str(
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel><input type='tablet' bus='usb'/>\
         <video><model type='vga'/></video><rng model='virtio'><backend model='random'>/dev/urandom</backend></rng></devices></domain>",
    );
    xml
}

#[cfg(test)]
mod tests {
    use shared::deploy::Card;

    use super::*;

    fn macs(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("52:54:00:00:00:{n:02x}")).collect()
    }

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
        let xml = domain(
            &wish,
            "u",
            &["52:54:00:00:00:01".to_owned()],
            &[(Path::new("/x/a'b.qcow2"), "qcow2"), (Path::new("/x/c.raw"), "raw")],
            "tcg",
            None,
        );
        let document = roxmltree::Document::parse(&xml).expect("well-formed");
        let text =
            |name: &str| document.descendants().find(|node| node.has_tag_name(name)).and_then(|node| node.text()).unwrap_or_default();
        assert_eq!((text("name"), text("vcpu"), text("memory")), ("a'<b>&", "2", "512"));
        let targets: Vec<_> =
            document.descendants().filter(|node| node.has_tag_name("target")).filter_map(|node| node.attribute("dev")).collect();
        assert_eq!(targets, ["hda", "hdb"]);
        assert!(xml.contains("type='qemu'") && xml.contains("machine='pc'") && xml.contains("<source bridge='br0'/>"), "{xml}");
        let uefi =
            domain(&Wish { firmware: Some("uefi".into()), network: Some(USER.into()), ..wish.clone() }, "u", &macs(1), &[], "kvm", None);
        assert!(uefi.contains("firmware='efi'") && uefi.contains("<domain type='kvm'>"), "{uefi}");

        // Each card where it belongs, and apart none of them.
        let second = Card { network: Some("inner".into()), ..Card::default() };
        let two = Wish { nics: vec![second, Card::default()], ..wish.clone() };
        let cards = |apart: Option<&Apart>| {
            let xml = domain(&two, "u", &macs(3), &[], "tcg", apart);
            let pieces: Vec<String> =
                xml.split("<interface ").skip(1).map(|rest| rest.split("</interface>").next().unwrap_or_default().to_owned()).collect();
            pieces
        };
        let placed = cards(None);
        assert!(placed.len() == 3 && placed[0].contains("bridge='br0'") && placed[1].contains("network='inner'"), "{placed:?}");
        assert!(placed[2].contains("network='default'") && placed[2].contains("52:54:00:00:00:02"), "{placed:?}");
        let alone = cards(Some(&Apart { console: Path::new("/x/c"), variables: Path::new("/x/v"), network: None }));
        assert!(alone.len() == 3 && alone.iter().all(|card| card.contains("<link state='down'/>")), "{alone:?}");

        // Apart, whatever network was wished for is not reached, and nobody looks in.
        let apart = |network| Apart { console: Path::new("/x/c"), variables: Path::new("/x/v"), network };
        let alone = domain(&wish, "u", &macs(1), &[(Path::new("/x/o.qcow2"), "qcow2")], "tcg", Some(&apart(None)));
        assert!(roxmltree::Document::parse(&alone).is_ok() && !alone.contains("br0") && !alone.contains("vnc"), "{alone}");
        assert!(
            alone.contains("<link state='down'/>") && alone.contains("cache='unsafe'") && alone.contains("<source path='/x/c'/>"),
            "{alone}"
        );
        let netted = domain(&wish, "u", &macs(1), &[], "tcg", Some(&apart(Some("n"))));
        assert!(netted.contains("<source network='n'/>") && !netted.contains("br0") && !netted.contains("link state"), "{netted}");
    }
}
