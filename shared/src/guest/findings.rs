//! What an inspection means for a move to KVM, in sentences.
//!
//! Owns: which fact is in the way, and what would mend it; pure functions. Never: passes what nobody could say. A crash here costs nothing.

use serde::Serialize;

use super::{Answer, Guest, Kernel, Place};

/// How a finding is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It is right.
    Pass,
    /// It works, or may work, once something is done about it.
    Warn,
    /// It does not work.
    Fail,
}

/// Something that an inspection has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How it is to be taken.
    pub status: Status,
    /// What was found.
    pub message: String,
    /// What would mend it; empty where nothing is to be mended.
    pub fix: String,
}

fn pass(check: &'static str, message: impl Into<String>) -> Finding {
    Finding { check, status: Status::Pass, message: message.into(), fix: String::new() }
}

fn warn(check: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { check, status: Status::Warn, message: message.into(), fix: fix.into() }
}

fn fail(check: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { check, status: Status::Fail, message: message.into(), fix: fix.into() }
}

/// At most this many names stand in a sentence.
const SHOWN: usize = 5;

fn listed(names: impl IntoIterator<Item = String>) -> String {
    let mut names: Vec<String> = names.into_iter().collect();
    let more = names.len().saturating_sub(SHOWN);
    names.truncate(SHOWN);
    let joined = names.join(", ");
    if more > 0 { format!("{joined} and {more} more") } else { joined }
}

impl Guest {
    /// Everything that matters to a move, good or bad. `firmware`: what the VM boots by (`bios`, `uefi`), empty where nobody says.
    pub fn findings(&self, firmware: &str) -> Vec<Finding> {
        let mut findings = vec![self.guest(), self.boots_on_virtio()];
        findings.extend(self.encrypted());
        findings.extend(self.device_names());
        findings.extend(self.interface_names());
        findings.extend(self.boot_loader(firmware));
        findings.extend(self.tools());
        findings
    }

    /// The kernel that boots where nobody chooses: the newest one that is not for rescue.
    pub fn default_kernel(&self) -> Option<&Kernel> {
        self.kernels.iter().find(|kernel| !kernel.rescue)
    }

    fn guest(&self) -> Finding {
        let name = if self.system.pretty_name.is_empty() { self.system.family.clone() } else { self.system.pretty_name.clone() };
        let by = self.default_kernel().map(|kernel| format!(", kernel {}", kernel.version)).unwrap_or_default();
        match self.system.family.as_str() {
            "linux" | "windows" => pass("guest", format!("{name}{by} on {}", self.system.root)),
            _ => {
                let why = if self.notes.is_empty() { "no file system holds one that is known".to_owned() } else { self.notes.join("; ") };
                warn(
                    "guest",
                    format!("its operating system was not recognised: {why}"),
                    "an adaptation may still recognise it; prove the boot",
                )
            }
        }
    }

    fn boots_on_virtio(&self) -> Finding {
        const CHECK: &str = "guest_virtio";
        const ADAPT: &str = "it needs adaptation (virt-v2v), or a bus that it knows";
        let lacking: Vec<String> = self.kernels.iter().filter_map(Kernel::lacks).collect();
        let unknown: Vec<String> = self.kernels.iter().filter_map(Kernel::is_unknown).collect();
        match self.virtio {
            Answer::Yes if lacking.is_empty() && unknown.is_empty() => {
                pass(CHECK, format!("it boots on virtio as it is: {}", listed(self.kernels.iter().map(Kernel::has))))
            }
            Answer::Yes => {
                let others = listed(lacking.into_iter().chain(unknown));
                pass(
                    CHECK,
                    format!("it boots on virtio as it is by the kernel that boots by default; others do not, or nobody can say: {others}"),
                )
            }
            Answer::No if self.system.family == "windows" => {
                warn(CHECK, "Windows has no virtio driver for its disk, so it does not boot on virtio as it is", ADAPT)
            }
            Answer::No => warn(CHECK, format!("it does not boot on virtio as it is: {}", listed(lacking)), ADAPT),
            Answer::Unknown if unknown.is_empty() => warn(
                CHECK,
                "whether it boots on virtio is not known: no kernel of it was found",
                "prove the boot, or have it adapted (virt-v2v)",
            ),
            Answer::Unknown => {
                let message = format!("whether it boots on virtio is not known: {}", listed(unknown));
                warn(CHECK, message, "prove the boot, or have it adapted (virt-v2v)")
            }
        }
    }

    fn encrypted(&self) -> Option<Finding> {
        let locked = |kind: &str| matches!(kind, "luks" | "bitlocker");
        let partitions = self.partitions.iter().filter(|p| locked(&p.content.file_system));
        let partitions = partitions.map(|p| format!("{} ({})", p.place(), p.content.file_system));
        let volumes = self.volume_groups.iter().flat_map(|group| group.volumes.iter().map(move |volume| (group, volume)));
        let volumes = volumes.filter(|(_, volume)| locked(&volume.content.file_system));
        let volumes = volumes.map(|(group, volume)| format!("{}/{} ({})", group.name, volume.name, volume.content.file_system));
        let found: Vec<String> = partitions.chain(volumes).collect();
        (!found.is_empty()).then(|| {
            let fix = "move it as it is where it boots on virtio; else install virtio drivers in it before, or decrypt it";
            warn("guest_encryption", format!("{}: encrypted, so that nobody can look inside or adapt it", listed(found)), fix)
        })
    }

    fn device_names(&self) -> Option<Finding> {
        if self.mounts.is_empty() && self.boot.root_argument.is_empty() {
            return None;
        }
        let mounts = self.mounts.iter().filter(|mount| mount.changes).map(|mount| format!("{} ({})", mount.device, mount.at));
        let argument =
            Some(&self.boot.root_argument).filter(|argument| is_device_name(argument)).map(|argument| format!("root={argument}"));
        let found: Vec<String> = mounts.chain(argument).collect();
        Some(match found.is_empty() {
            true => pass("guest_device_names", "its disks are named by UUID, label or volume, as they are on any hardware"),
            false => warn(
                "guest_device_names",
                format!("{}: names of this hardware's, others on virtio (/dev/vda)", listed(found)),
                "name them by UUID in its fstab and boot loader; an adaptation does so",
            ),
        })
    }

    fn interface_names(&self) -> Option<Finding> {
        if self.interfaces.is_empty() {
            return None;
        }
        let found: Vec<String> =
            self.interfaces.iter().filter(|found| found.changes).map(|found| format!("{} ({})", found.name, found.file)).collect();
        Some(match found.is_empty() {
            true => pass("guest_interfaces", "no interface is configured by a name that changes with the hardware"),
            false => warn(
                "guest_interfaces",
                format!("{}: the name changes with the hardware, so that the network stays down", listed(found)),
                "keep the MAC and bind the name to it (adaptation does so), or configure the interface by its MAC",
            ),
        })
    }

    fn boot_loader(&self, firmware: &str) -> Option<Finding> {
        let needs = self.boot.firmware.as_str();
        if needs == "unknown" || needs.is_empty() {
            return None;
        }
        let loaders = listed(self.boot.loaders.iter().map(|loader| format!("{} ({}) at {}", loader.kind, loader.firmware, loader.at)));
        if needs != "both" && matches!(firmware, "bios" | "uefi") && needs != firmware {
            let message = format!("it is set to boot by {firmware}, and what is on its disks boots by {needs}: {loaders}");
            return Some(fail("guest_firmware", message, format!("deploy it with firmware {needs}")));
        }
        Some(pass("guest_firmware", format!("it boots by {needs}: {loaders}")))
    }

    fn tools(&self) -> Option<Finding> {
        match self.software.vmware_tools {
            Answer::Yes => Some(warn(
                "guest_tools",
                format!("VMware's tools are installed ({}) and have nothing to do on KVM", self.software.vmware_tools_version),
                "remove them after the move, and install qemu-guest-agent",
            )),
            Answer::No => Some(pass("guest_tools", "VMware's tools are not installed")),
            Answer::Unknown => None,
        }
    }
}

/// Whether a device is named by the order in which this hardware shows its disks.
pub(super) fn is_device_name(device: &str) -> bool {
    let rest = ["/dev/sd", "/dev/hd", "/dev/vd", "/dev/xvd", "/dev/nvme"].iter().find_map(|start| device.strip_prefix(start));
    rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
}

impl Kernel {
    fn drivers(&self) -> [(&'static str, Place); 2] {
        [("virtio_pci", self.virtio_pci), ("virtio_blk", self.virtio_blk)]
    }

    fn has(&self) -> String {
        let word = |place: Place| match place {
            Place::BuiltIn => "built in",
            Place::Initrd => "in its initrd",
            _ => "elsewhere",
        };
        let drivers: Vec<String> = self.drivers().iter().map(|(name, place)| format!("{name} {}", word(*place))).collect();
        format!("{} has {}", self.version, drivers.join(", "))
    }

    fn lacks(&self) -> Option<String> {
        (self.virtio == Answer::No).then(|| {
            let lacking = self.drivers().into_iter().filter(|(_, place)| !place.is_early()).map(|(name, _)| name).collect::<Vec<_>>();
            let at = if self.initrd.is_some() { "in its initrd" } else { "built in, and it has no initrd" };
            format!("{} has no {} {at}", self.version, lacking.join(" and no "))
        })
    }

    fn is_unknown(&self) -> Option<String> {
        (self.virtio == Answer::Unknown).then(|| match &self.initrd {
            Some(initrd) if !initrd.unknown.is_empty() => format!("{}: {}", self.version, initrd.unknown),
            _ => format!("{}: what is built in was not found", self.version),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Boot, Content, Initrd, Interface, Loader, Mount, Partition, Software, System};
    use super::*;

    fn kernel(version: &str, place: Place, virtio: Answer) -> Kernel {
        let initrd = Some(Initrd { path: "/boot/initrd".into(), ..Initrd::default() });
        Kernel { version: version.into(), virtio_pci: Place::BuiltIn, virtio_blk: place, virtio, initrd, ..Kernel::default() }
    }

    fn guest() -> Guest {
        Guest {
            virtio: Answer::Yes,
            system: System { family: "linux".into(), pretty_name: "Debian 12".into(), root: "vg/root".into(), ..System::default() },
            kernels: vec![kernel("6.1", Place::Initrd, Answer::Yes)],
            mounts: vec![Mount { device: "UUID=1".into(), at: "/".into(), by: "uuid".into(), ..Mount::default() }],
            interfaces: vec![Interface { name: "e*".into(), ..Interface::default() }],
            boot: Boot {
                firmware: "bios".into(),
                loaders: vec![Loader { kind: "grub".into(), firmware: "bios".into(), at: "disk 0".into() }],
                root_argument: "UUID=1".into(),
                ..Boot::default()
            },
            software: Software { vmware_tools: Answer::No, ..Software::default() },
            ..Guest::default()
        }
    }

    fn found(guest: &Guest, firmware: &str, check: &str) -> (Option<Status>, String) {
        let finding = guest.findings(firmware).into_iter().find(|finding| finding.check == check);
        finding.map_or((None, String::new()), |finding| {
            assert!(finding.status == Status::Pass || !finding.fix.is_empty(), "{finding:?}");
            (Some(finding.status), finding.message)
        })
    }

    #[test]
    fn a_guest_that_is_ready_passes_everything() {
        for finding in guest().findings("bios") {
            assert_eq!(finding.status, Status::Pass, "{finding:?}");
        }
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let mut bad = guest();
        bad.virtio = Answer::No;
        bad.kernels = vec![kernel("6.1", Place::Module, Answer::No)];
        let (status, message) = found(&bad, "", "guest_virtio");
        assert!(status == Some(Status::Warn) && message.contains("6.1 has no virtio_blk in its initrd"), "{message}");
        bad.virtio = Answer::Unknown;
        bad.kernels = Vec::new();
        assert_eq!(found(&bad, "", "guest_virtio").0, Some(Status::Warn));
        bad.mounts[0].device = "/dev/sda1".into();
        bad.mounts[0].changes = true;
        bad.boot.root_argument = "/dev/sda1".into();
        assert!(found(&bad, "", "guest_device_names").1.contains("/dev/sda1 (/), root=/dev/sda1"));
        bad.interfaces[0] = Interface { name: "ens192".into(), changes: true, ..Interface::default() };
        assert_eq!(found(&bad, "", "guest_interfaces").0, Some(Status::Warn));
        assert_eq!(
            (found(&bad, "uefi", "guest_firmware").0, found(&bad, "", "guest_firmware").0),
            (Some(Status::Fail), Some(Status::Pass))
        );
        bad.software.vmware_tools = Answer::Yes;
        assert_eq!(found(&bad, "", "guest_tools").0, Some(Status::Warn));
        assert_eq!(found(&bad, "", "guest_encryption").0, None);
        let content = Content { file_system: "luks".into(), ..Content::default() };
        bad.partitions.push(Partition { number: 3, content, ..Partition::default() });
        assert!(found(&bad, "", "guest_encryption").1.contains("disk 0, partition 3 (luks)"));
        bad.system = System { family: "unknown".into(), ..System::default() };
        assert_eq!(found(&bad, "", "guest").0, Some(Status::Warn));
    }

    #[test]
    fn a_device_is_named_by_its_place_in_a_row_or_not() {
        for device in ["/dev/sda", "/dev/sda1", "/dev/hdb", "/dev/vda2", "/dev/xvda", "/dev/nvme0n1p2"] {
            assert!(is_device_name(device), "{device}");
        }
        for device in ["UUID=1", "/dev/mapper/vg-root", "/dev/vg/root", "/dev/sd", "/dev/disk/by-uuid/1", "tmpfs"] {
            assert!(!is_device_name(device), "{device}");
        }
    }
}
