//! What lies on a guest's disks: partitions, file systems, the operating system, its kernels and what they can drive.
//!
//! Owns: the shape of an inspection, and what follows from it ([`findings`]). Never: reads a disk. A crash here costs nothing.
//!
//! What could not be found out is `unknown` with a reason in [`Guest::notes`], never a guess.

mod findings;

use serde::{Deserialize, Serialize};

pub use findings::{Finding, Status};

/// Yes, no, or nobody can say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is so.
    Yes,
    /// It is not.
    No,
    /// It could not be found out.
    #[default]
    Unknown,
}

/// Where a kernel has a driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// In the kernel itself.
    BuiltIn,
    /// A module in its initrd: there before the root file system is.
    Initrd,
    /// A module on the root file system: too late for the disk that holds it, early enough for the network.
    Module,
    /// Nowhere.
    Absent,
    /// It could not be found out.
    #[default]
    Unknown,
}

impl Place {
    /// Whether the driver is there before the root file system is.
    pub fn is_early(self) -> bool {
        matches!(self, Self::BuiltIn | Self::Initrd)
    }
}

/// An inspection of a VM's disks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Guest {
    /// Milliseconds that it took.
    pub took_ms: u64,
    /// Bytes of the disks that were read for it.
    pub read_bytes: u64,
    /// Whether it boots on virtio as it is, by the kernel that boots without anybody's choice.
    pub virtio: Answer,
    /// The operating system.
    pub system: System,
    /// How it is booted.
    pub boot: Boot,
    /// Its kernels, the newest first; rescue kernels last.
    pub kernels: Vec<Kernel>,
    /// What its fstab mounts.
    pub mounts: Vec<Mount>,
    /// Network interfaces that are configured by name or address.
    pub interfaces: Vec<Interface>,
    /// Software that matters to a move.
    pub software: Software,
    /// In the order of the disks and their tables.
    pub partitions: Vec<Partition>,
    /// LVM's, by name.
    pub volume_groups: Vec<VolumeGroup>,
    /// What could not be found out, and why; what was left out.
    pub notes: Vec<String>,
}

/// An operating system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct System {
    /// `linux`, `windows` or `unknown`.
    pub family: String,
    /// os-release's `ID`: `debian`, `rhel`; empty where it is not known.
    pub id: String,
    /// os-release's `VERSION_ID`.
    pub version: String,
    /// os-release's `PRETTY_NAME`.
    pub pretty_name: String,
    /// By /etc/hostname.
    pub hostname: String,
    /// `x86_64`, `i686`, `aarch64`, …
    pub architecture: String,
    /// Where its root file system lies: `disk 0, partition 1`, `vg/root`.
    pub root: String,
}

/// How a guest is booted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Boot {
    /// What its boot loaders need: `bios`, `uefi`, `both` (either will do) or `unknown`.
    pub firmware: String,
    /// Those that were found.
    pub loaders: Vec<Loader>,
    /// The `root=` of the first kernel command line of its boot loader's configuration; empty where none was found.
    pub root_argument: String,
    /// Whether interfaces keep the kernel's own names (`net.ifnames=0`).
    pub kernel_names: bool,
    /// Whether the kernel speaks on a serial port (`console=ttyS…`), where a boot proof can hear it.
    pub serial_console: bool,
}

/// A boot loader.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Loader {
    /// `grub`, `syslinux`, `extlinux`, `windows`, `systemd-boot`, `other`.
    pub kind: String,
    /// `bios` or `uefi`.
    pub firmware: String,
    /// `disk 0`, or its file: `disk 0, partition 1: /EFI/debian/grubx64.efi`.
    pub at: String,
}

/// A Linux kernel that can be booted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Kernel {
    /// `6.1.0-56-amd64`.
    pub version: String,
    /// Its file.
    pub path: String,
    /// Whether it is for rescue only: it boots only by choice.
    pub rescue: bool,
    /// Its initrd; none where there is none.
    pub initrd: Option<Initrd>,
    /// The transport of all virtio devices.
    pub virtio_pci: Place,
    /// Disks at bus `virtio`.
    pub virtio_blk: Place,
    /// Disks at bus `scsi`.
    pub virtio_scsi: Place,
    /// Network cards.
    pub virtio_net: Place,
    /// Whether a root file system on a virtio disk (`virtio_blk`) is found by it.
    pub virtio: Answer,
}

/// What a kernel unpacks before there is a root file system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Initrd {
    /// Its file.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// How its parts are packed, in order: `none`, `gzip`, `zstd`, `xz`, `lz4`, …
    pub compression: Vec<String>,
    /// Why it was not looked through; empty where it was.
    pub unknown: String,
}

/// A line of fstab.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mount {
    /// As it stands there: `UUID=…`, `/dev/sda1`.
    pub device: String,
    /// Where it is mounted; `none` for swap.
    pub at: String,
    /// `ext4`, `swap`, …
    pub file_system: String,
    /// How the device is named: `uuid`, `label`, `partuuid`, `partlabel`, `lvm`, `device` (`/dev/sda1`), `path` (`/dev/disk/by-path/…` and
    /// `by-id`: of the hardware), `other`.
    pub by: String,
    /// Whether the name is another one on other hardware.
    pub changes: bool,
}

/// A network interface's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Interface {
    /// `ens192`; a pattern where one stands there; empty where it goes by its address only.
    pub name: String,
    /// The address that it is bound to, lower case with colons; empty where it goes by its name only.
    pub mac: String,
    /// `dhcp`, `static` or `unknown`.
    pub method: String,
    /// The file that says so.
    pub file: String,
    /// Whether the name is another one on other hardware and nothing binds it to the address.
    pub changes: bool,
}

/// Software that matters to a move.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Software {
    /// Whether VMware's tools are installed.
    pub vmware_tools: Answer,
    /// Which: `open-vm-tools 2:12.2.0-1`, `/usr/bin/vmtoolsd`.
    pub vmware_tools_version: String,
    /// Whether QEMU's guest agent is installed.
    pub guest_agent: Answer,
    /// Whether cloud-init is installed.
    pub cloud_init: Answer,
    /// Whether `grub-mkconfig` (or `grub2-mkconfig`) is there, which an adaptation calls.
    pub grub_mkconfig: Answer,
}

impl Software {
    /// The same from a look that did not see everything: what was found is there, what was not may be.
    #[must_use]
    pub fn only_yes(mut self) -> Self {
        for answer in [&mut self.vmware_tools, &mut self.guest_agent, &mut self.cloud_init, &mut self.grub_mkconfig] {
            if *answer == Answer::No {
                *answer = Answer::Unknown;
            }
        }
        self
    }
}

/// A partition, or a disk without any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Partition {
    /// Number of the disk, from 0 on.
    pub disk: u32,
    /// Number of the partition, from 1 on; 0: the whole disk.
    pub number: u32,
    /// `mbr`, `gpt` or `none`.
    pub scheme: String,
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// The table's own word: `83`, or a GUID.
    pub kind: String,
    /// The name in a GPT.
    pub name: String,
    /// Whether its boot flag is set (`mbr`), or legacy BIOSes may boot it (`gpt`).
    pub bootable: bool,
    /// `PARTUUID`, as Linux tells it.
    pub partuuid: String,
    /// What lies in it.
    #[serde(flatten)]
    pub content: Content,
}

impl Partition {
    /// Where it is, in words: `disk 0, partition 1`; `disk 0` where that has none.
    pub fn place(&self) -> String {
        if self.number == 0 { format!("disk {}", self.disk) } else { format!("disk {}, partition {}", self.disk, self.number) }
    }
}

/// What lies in a partition or a logical volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Content {
    /// `ext2`, `ext3`, `ext4`, `xfs`, `btrfs`, `ntfs`, `vfat`, `exfat`, `swap`, `lvm2`, `luks`, `bitlocker`, `raid`; empty where nothing known.
    pub file_system: String,
    /// Its label.
    pub label: String,
    /// Its UUID as `blkid` tells it.
    pub uuid: String,
    /// Why its files were not read where they might matter; empty where they were, or where it has none.
    pub unknown: String,
}

/// A volume group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeGroup {
    /// Its name.
    pub name: String,
    /// Its logical volumes.
    pub volumes: Vec<LogicalVolume>,
}

/// A logical volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogicalVolume {
    /// Its name in the group.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// What lies in it.
    #[serde(flatten)]
    pub content: Content,
}
