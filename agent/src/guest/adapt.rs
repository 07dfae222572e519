//! Adaptation: virt-v2v-in-place makes the guest ready for KVM, and the names of its network interfaces are bound to its cards.
//!
//! ```text
//! verified disks ─► overlays ─► names bound (guestfish, pin.sh) ─► virt-v2v-in-place ─► adapted: the overlays
//!                      │ not recognised, a tool missing, it failed ──────────────────► the overlays go; the disks are as they were
//!                      └ the job is to stop ─────────────────────────────────────────► the same, and every process is gone
//! ```
//! Names come first: what v2v then does to the initrd and to SELinux's labels takes them in.
//! Owns: that order, the description that v2v reads, the words by which it says what it did. Never: writes to a verified disk, calls a guest
//! adapted that was not. A crash here leaves overlays and a folder in the job's part folder, which the next attempt removes.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shared::error::Code;
use shared::guest::{Answer, Guest};
use shared::vault::{self, Dir};

use super::{GuestDisk, Subject, failed, overlay};
use crate::Agent;
use crate::deploy;
use crate::exec::{self, Long, Tool};
use crate::held::Assignment;
use crate::sources::Error;
use crate::sources::libvirt::quoted;

/// Where the tools keep what they need meanwhile, inside the subject's folder.
const FOLDER: &str = "adapt";
/// The appliance's folder in the agent's own: it is made once.
const APPLIANCE: &str = "libguestfs";
/// How long each tool may take.
const LONGEST: Duration = Duration::from_secs(3600);
/// What libguestfs says of disks on which it knows no system.
const NO_SYSTEM: &str = "no operating system was found on this disk";
/// What binds names, run inside the guest.
const PIN: &str = include_str!("pin.sh");

/// A guest that was adapted.
#[derive(Clone, Debug, Default)]
pub struct Done {
    /// Overlays over the subject's disks, in order, beside them. They name what lies beneath by its path from there.
    pub disks: Vec<GuestDisk>,
    /// `NAME ADDRESS` of interfaces that keep their names.
    pub pinned: Vec<String>,
    /// Whether v2v found or put virtio's drivers in; none where it did not say.
    pub virtio: Option<bool>,
    /// What should be known of it.
    pub warnings: Vec<String>,
}

/// How an adaptation ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// v2v did it.
    Adapted(Done),
    /// v2v does not know this guest: its words.
    NotRecognised(String),
    /// There is no such tool here: what to install.
    Missing(String),
    /// v2v failed: its last words.
    Failed(String),
}

/// Why a guest needs no adaptation, where a look at its disks shows that: it boots on virtio by the kernel that boots by default, and nothing
/// in it goes by a name that other hardware changes.
pub fn is_ready(guest: &Guest) -> Option<String> {
    let changes = guest.mounts.iter().any(|mount| mount.changes) || guest.interfaces.iter().any(|interface| interface.changes);
    if guest.system.family != "linux" || guest.virtio != Answer::Yes || changes {
        return None;
    }
    let name = if guest.system.pretty_name.is_empty() { &guest.system.family } else { &guest.system.pretty_name };
    let kernel = guest.default_kernel().map(|kernel| format!(" with kernel {}", kernel.version)).unwrap_or_default();
    Some(format!("{name}{kernel} boots on virtio, and nothing in it goes by a name that changes"))
}

/// Adapts the subject. `bus` is that of its disks at the source (`scsi`, `sata`, `ide`, `virtio`): files in the guest may name them by it.
/// Interfaces are bound to the addresses in the subject's wish; without one they are left as they are. `log` gets the tools' lines.
///
/// # Errors
/// When the agent's own folders fail, or the job is to stop. Whatever the guest or a tool is to blame for is an outcome.
pub fn adapt(agent: &Agent, held: &Assignment, subject: &Subject<'_>, bus: &str, log: &mut dyn FnMut(&str)) -> Result<Outcome, Error> {
    let scratch = scratch(subject)?;
    let done = run(agent, held, subject, &scratch, bus, log);
    let cleared = clear(subject, FOLDER);
    match done {
        Ok(Outcome::Adapted(done)) => cleared.map(|()| Outcome::Adapted(done)),
        other => {
            remove_overlays(subject)?;
            cleared?;
            other
        }
    }
}

/// The overlay's name: of `disk-0.qcow2` it is `disk-0.adapted.qcow2`.
fn name_of(disk: &GuestDisk) -> String {
    let stem = disk.path.file_stem().and_then(OsStr::to_str).unwrap_or("disk");
    format!("{stem}.adapted.qcow2")
}

fn clear(subject: &Subject<'_>, folder: &str) -> Result<(), Error> {
    match subject.folder.remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("the folder of an adaptation")(e)),
        _ => Ok(()),
    }
}

fn remove_overlays(subject: &Subject<'_>) -> Result<(), Error> {
    for disk in subject.disks {
        match subject.folder.remove_file(name_of(disk)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("an overlay")(e)),
            _ => {}
        }
    }
    Ok(())
}

/// A new folder; what a crash has left goes.
fn scratch(subject: &Subject<'_>) -> Result<Dir, Error> {
    clear(subject, FOLDER)?;
    remove_overlays(subject)?;
    subject.folder.create_dir(FOLDER).and_then(|()| subject.folder.open_dir(FOLDER)).map_err(failed("the folder of an adaptation"))
}

fn run(
    agent: &Agent,
    held: &Assignment,
    subject: &Subject<'_>,
    scratch: &Dir,
    bus: &str,
    log: &mut dyn FnMut(&str),
) -> Result<Outcome, Error> {
    let mut disks = Vec::with_capacity(subject.disks.len());
    for disk in subject.disks {
        // The folder gets another name once it is published.
        let beneath = disk.path.strip_prefix(subject.path).ok().and_then(Path::to_str);
        let beneath = beneath.map_or_else(|| disk.path.display().to_string(), str::to_owned);
        let name = name_of(disk);
        overlay(subject.folder, &name, &beneath, disk.format, disk.capacity)?;
        disks.push(GuestDisk { path: subject.path.join(name), format: "qcow2", capacity: disk.capacity });
    }
    agent.home.dir.create_dir_all(APPLIANCE).map_err(failed("the agent's own folder"))?;
    let temporary = subject.path.join(FOLDER);
    let appliance = agent.config.data_dir.join(APPLIANCE);
    let settings = if deploy::accelerator(agent) == "tcg" { "force_tcg" } else { "" };
    let environment = [
        ("LIBGUESTFS_BACKEND", OsStr::new("direct")),
        ("LIBGUESTFS_BACKEND_SETTINGS", OsStr::new(settings)),
        ("TMPDIR", temporary.as_os_str()),
        ("LIBGUESTFS_CACHEDIR", appliance.as_os_str()),
    ];
    let is_stopped = || held.stop().is_some();
    let how = Long { environment: &environment, time: LONGEST, is_stopped: &is_stopped };
    let mut done = Done { disks, ..Done::default() };

    let macs: Vec<String> =
        subject.wish.cards().into_iter().filter_map(|card| card.mac).filter(|mac| shared::deploy::is_mac(mac)).collect();
    if macs.is_empty() {
        done.warnings.push("the cards' addresses are not known yet: the names of network interfaces were not bound to them".to_owned());
    } else {
        match pin(&done.disks, &macs, &how, log) {
            Ok((pinned, left)) => {
                done.pinned = pinned;
                done.warnings.extend(left.into_iter().map(|why| format!("names of network interfaces: {why}")));
            }
            Err(e @ exec::Error::Stopped(_)) => return Err(stopped(&e)),
            // v2v looks for systems as this tool does.
            Err(exec::Error::Failed(words)) if words == NO_SYSTEM => return Ok(Outcome::NotRecognised(words)),
            // v2v may know better what this guest is; without the names it is adapted all the same, and whoever asks is told.
            Err(e) => done.warnings.push(format!("the names of its network interfaces were not bound to their cards: {e}")),
        }
    }

    vault::write_whole(scratch, "guest.xml", description(subject, &done.disks, bus).as_bytes()).map_err(failed("the description"))?;
    let description = temporary.join("guest.xml");
    let arguments = [OsStr::new("-i"), OsStr::new("libvirtxml"), description.as_os_str()];
    let mut complaint = String::new();
    let ended = exec::follow(Tool::V2v, &arguments, &how, &mut |line| {
        log(line);
        let words = said(line);
        if let Some(warning) = words.strip_prefix("warning: ") {
            done.warnings.push(warning.to_owned());
        } else if let Some(error) = words.strip_prefix("error: ") {
            error.clone_into(&mut complaint);
        } else if words.contains("virtio drivers installed") {
            done.virtio = Some(!words.contains("does not have"));
        }
    });
    Ok(match ended {
        Ok(()) => Outcome::Adapted(done),
        Err(e @ exec::Error::Stopped(_)) => return Err(stopped(&e)),
        Err(e @ exec::Error::Missing { .. }) => Outcome::Missing(e.to_string()),
        Err(exec::Error::Failed(words)) => {
            let words = if complaint.is_empty() { said(&words).to_owned() } else { complaint };
            if is_unknown(&words) { Outcome::NotRecognised(words) } else { Outcome::Failed(words) }
        }
        Err(e) => Outcome::Failed(e.to_string()),
    })
}

fn stopped(e: &exec::Error) -> Error {
    Error { code: Code::Conflict, message: e.to_string(), retryable: true }
}

/// A line of v2v without its name.
fn said(line: &str) -> &str {
    line.strip_prefix("virt-v2v-in-place: ").unwrap_or(line).trim()
}

/// Whether v2v's words mean that it does not know what is on the disks, or nothing of that kind.
fn is_unknown(words: &str) -> bool {
    let words = words.to_ascii_lowercase();
    [
        "no root device found",
        "inspection could not detect",
        "unable to convert this guest type",
        "multi-boot",
        "could not detect the source",
    ]
    .iter()
    .any(|word| words.contains(word))
}

/// Binds names to addresses; answers the pairs, and what was left and why.
fn pin(disks: &[GuestDisk], macs: &[String], how: &Long, log: &mut dyn FnMut(&str)) -> Result<(Vec<String>, Vec<String>), exec::Error> {
    let script = script("", &macs.iter().map(String::as_str).collect::<Vec<_>>());
    let mut arguments: Vec<PathBuf> = vec!["--rw".into()];
    for disk in disks {
        arguments.extend(["--format=qcow2".into(), "-a".into(), disk.path.clone()]);
    }
    arguments.extend(["-i".into(), "sh".into(), script.into()]);
    let (mut pinned, mut left, mut knows_none) = (Vec::new(), Vec::new(), false);
    let ended = exec::follow(Tool::Guestfish, &arguments, how, &mut |line| {
        knows_none |= line.contains(NO_SYSTEM);
        if let Some(pair) = line.strip_prefix("pinned ") {
            log(&format!("the interface keeps its name: {pair}"));
            pinned.push(pair.to_owned());
        } else if let Some(why) = line.strip_prefix("left ") {
            log(&format!("names of interfaces: {why}"));
            left.push(why.to_owned());
        } else if !line.is_empty() && !knows_none {
            // Behind these words the tool explains itself.
            log(line);
        }
    });
    match ended {
        Err(exec::Error::Failed(_)) if knows_none => Err(exec::Error::Failed(NO_SYSTEM.to_owned())),
        ended => ended.map(|()| (pinned, left)),
    }
}

/// The script for these addresses, in lower case.
fn script(root: &str, macs: &[&str]) -> String {
    format!("MACS='{}'\nROOT='{root}'\n{PIN}", macs.join(" ").to_ascii_lowercase())
}

/// What v2v is told of the guest: it looks at its disks and at nothing else here.
fn description(subject: &Subject<'_>, disks: &[GuestDisk], bus: &str) -> String {
    let wish = subject.wish;
    let bus = if shared::deploy::BUSES.contains(&bus) { bus } else { "scsi" };
    let prefix = match bus {
        "virtio" => "vd",
        "ide" => "hd",
        _ => "sd",
    };
    let loader = if wish.firmware.as_deref() == Some("uefi") { " firmware='efi'" } else { "" };
    let mut xml = format!(
        "<domain type='kvm'><name>guest</name><memory unit='MiB'>{}</memory><vcpu>{}</vcpu>\
         <os{loader}><type arch='x86_64'>hvm</type><boot dev='hd'/></os><features><acpi/><apic/></features><devices>",
        wish.memory_mb, wish.cpu
    );
    // Writing into a String cannot fail.
    for (letter, disk) in ('a'..='z').zip(disks) {
        let file = quoted(&disk.path.display().to_string());
        let _ = write!(
            xml,
            "<disk type='file' device='disk'><driver name='qemu' type='{}'/><source file='{file}'/><target dev='{prefix}{letter}' bus='{bus}'/></disk>",
            disk.format
        );
    }
    for card in wish.cards() {
        let mac = card.mac.map(|mac| format!("<mac address='{}'/>", quoted(&mac))).unwrap_or_default();
        let _ = write!(xml, "<interface type='network'><source network='default'/>{mac}</interface>");
    }
    xml.push_str("</devices></domain>");
    xml
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// Runs the script over a guest's files as a guest would; answers what it says and the files it writes.
    fn pinned(files: &[(&str, &str)], macs: &[&str]) -> (Vec<String>, Vec<(String, String)>) {
        let root = vault::temporary_dir("pin").unwrap();
        for (name, text) in files {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let ran = Command::new("sh").args(["-c", &script(root.to_str().unwrap(), macs)]).output().unwrap();
        assert!(ran.status.success() && ran.stderr.is_empty(), "{}", String::from_utf8_lossy(&ran.stderr));
        let mut written = Vec::new();
        for folder in ["etc/systemd/network", "etc/udev/rules.d"] {
            for entry in std::fs::read_dir(root.join(folder)).into_iter().flatten().flatten() {
                let name = entry.file_name().into_string().unwrap();
                if !files.iter().any(|(path, _)| Path::new(path).file_name().unwrap() == name.as_str()) {
                    written.push((name, std::fs::read_to_string(entry.path()).unwrap()));
                }
            }
        }
        std::fs::remove_dir_all(root).unwrap();
        written.sort();
        (String::from_utf8(ran.stdout).unwrap().lines().map(str::to_owned).collect(), written)
    }

    const A: &str = "52:54:00:aa:bb:01";
    const B: &str = "52:54:00:aa:bb:02";
    const SYSTEMD: (&str, &str) = ("usr/lib/systemd/systemd-udevd", "");

    #[test]
    fn the_name_by_which_a_network_is_configured_is_bound_to_its_card() {
        let interfaces = "auto lo\niface lo inet loopback\nallow-hotplug ens192\niface ens192 inet dhcp\niface ens192 inet6 auto\n";
        let (said, written) = pinned(&[SYSTEMD, ("etc/network/interfaces", interfaces)], &[A]);
        assert_eq!(said, [format!("pinned ens192 {A}")]);
        let link = format!("[Match]\nMACAddress={A}\nPath=*pci-*\n\n[Link]\nName=ens192\n");
        assert_eq!(written, [("10-hypersdk-ens192.link".to_owned(), link)]);

        // Several, in the order of VMware's slots; what is no card is none.
        let more =
            "iface ens161 inet dhcp\niface ens224 inet dhcp\niface ens192 inet dhcp\niface br0 inet dhcp\niface ens224.7 inet dhcp\n";
        let (said, _) = pinned(&[SYSTEMD, ("etc/network/interfaces.d/x", more)], &[A, B]);
        assert_eq!(said, [format!("pinned ens192 {A}"), format!("pinned ens224 {B}")]);

        for (file, text, name) in [
            ("etc/sysconfig/network-scripts/ifcfg-ens33", "TYPE=Ethernet\nDEVICE=\"ens33\"\n", "ens33"),
            ("etc/sysconfig/network/ifcfg-eth0", "BOOTPROTO='dhcp'\n", "eth0"),
            ("etc/NetworkManager/system-connections/w.nmconnection", "[connection]\nid=w\ninterface-name=eno1\n", "eno1"),
            ("etc/netplan/50-cloud-init.yaml", "network:\n    ethernets:\n        ens160:\n            dhcp4: true\n", "ens160"),
            ("etc/systemd/network/20-wired.network", "[Match]\nName=enp11s0\n\n[Network]\nDHCP=yes\n", "enp11s0"),
        ] {
            assert_eq!(pinned(&[SYSTEMD, (file, text)], &[A]).0, [format!("pinned {name} {A}")], "{file}");
        }
        // Whoever says which card it is, is believed.
        let (first, second) = (format!("DEVICE=eth1\nHWADDR={}\n", A.to_uppercase()), "DEVICE=eth0\nHWADDR=00:50:56:00:00:09\n".to_owned());
        let files = [("etc/sysconfig/network-scripts/ifcfg-eth1", first.as_str()), ("etc/sysconfig/network-scripts/ifcfg-eth0", &second)];
        let (said, written) = pinned(&files, &[A]);
        assert_eq!(said[0], format!("pinned eth1 {A}"));
        assert!(said[1].contains("eth0 is configured for the address 00:50:56:00:00:09 alone"), "{said:?}");
        // One that knows no systemd.
        assert!(written[0].0 == "70-persistent-net.rules" && written[0].1.contains(&format!("\"{A}\"")), "{written:?}");
    }

    #[test]
    fn a_name_is_not_guessed() {
        let two = "iface enp3s0 inet dhcp\niface enp4s0 inet dhcp\n";
        let (said, written) = pinned(&[SYSTEMD, ("etc/network/interfaces", two)], &[A, B]);
        assert_eq!((said, written.len()), (vec!["left which card has which name is not known: enp3s0 enp4s0".to_owned()], 0));
        let (said, written) = pinned(&[SYSTEMD], &[A]);
        assert_eq!((said, written.len()), (vec!["left no interface is configured by its name".to_owned()], 0));
        let bound = format!("[Match]\nMACAddress={}\n[Link]\nName=lan\n", A.to_uppercase());
        let files = [SYSTEMD, ("etc/systemd/network/10-lan.link", bound.as_str()), ("etc/network/interfaces", "iface lan inet dhcp\n")];
        let (said, written) = pinned(&files, &[A]);
        assert_eq!((said, written.len()), (vec![format!("left {A} is bound to a name already")], 0));
    }

    #[test]
    fn a_guest_that_is_ready_is_left_alone_and_no_other() {
        use shared::guest::{Interface, Mount, System};
        let system = |family: &str| System { family: family.into(), pretty_name: "Debian 12".into(), ..System::default() };
        let ready = Guest { virtio: Answer::Yes, system: system("linux"), ..Guest::default() };
        assert!(is_ready(&ready).is_some_and(|why| why.contains("Debian 12 boots on virtio")));
        let interface = Interface { name: "ens192".into(), changes: true, ..Interface::default() };
        let mount = Mount { device: "/dev/sda1".into(), changes: true, ..Mount::default() };
        for other in [
            Guest { virtio: Answer::No, ..ready.clone() },
            Guest { virtio: Answer::Unknown, ..ready.clone() },
            Guest { system: system("windows"), ..ready.clone() },
            Guest { interfaces: vec![interface], ..ready.clone() },
            Guest { mounts: vec![mount], ..ready.clone() },
        ] {
            assert_eq!(is_ready(&other), None, "{other:?}");
        }
    }

    #[test]
    fn what_v2v_does_not_know_is_told_from_what_it_fails_at() {
        for words in [
            "inspection could not detect the source guest (or physical machine).",
            "virt-v2v is unable to convert this guest type (linux/arch)",
            "no root device found in this operating system image.",
            "multi-boot operating systems are not supported by virt-v2v.",
        ] {
            assert!(is_unknown(words), "{words}");
        }
        assert!(!is_unknown("libguestfs error: write: No space left on device"));
        assert_eq!(said("virt-v2v-in-place: warning: x"), "warning: x");
    }
}
