//! What a hypervisor knows of one VM beyond what a list shows.
//!
//! Owns: the shape of the answer that agents give to `describe`. Never: is stored: it is asked when somebody wants it. A crash here costs
//! nothing.

use serde::{Deserialize, Serialize};

/// One VM in detail.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Details {
    /// `vmx-19`; empty where it is not known.
    pub hardware_version: String,
    /// What people wrote about it.
    pub annotation: String,
    /// Whether changed blocks are tracked; nothing where the server does not say.
    pub changed_block_tracking: Option<bool>,
    /// Whether its configuration is encrypted.
    pub encrypted: bool,
    /// What its disks hang at.
    pub controllers: Vec<Controller>,
    /// Its disks in the order of the list.
    pub disk_details: Vec<DiskDetail>,
    /// The oldest snapshots, each with those that were taken after it.
    pub snapshot_tree: Vec<SnapshotNode>,
    /// Its cards and what they are plugged into.
    pub networks: Vec<Network>,
    /// What the guest says of itself by its tools.
    pub guest: Guest,
    /// Devices that no export takes along: passed-through hardware, a virtual TPM.
    pub left_behind: Vec<String>,
    /// What the account may do; absent where nobody asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub privileges: Option<Privileges>,
}

/// What disks hang at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Controller {
    /// The device's key.
    pub key: u64,
    /// `scsi`, `sata`, `ide`, `nvme`.
    pub bus: String,
    /// The provider's own word: `ParaVirtualSCSIController`.
    pub model: String,
    /// Its number among those of its bus.
    pub bus_number: u64,
    /// Whether the bus is shared with other VMs: `noSharing`, `virtualSharing`, `physicalSharing`; empty where it cannot be.
    pub sharing: String,
}

/// One virtual disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskDetail {
    /// `disk-0`, as the list calls it.
    pub name: String,
    /// `Hard disk 1`, as the provider calls it.
    pub label: String,
    /// The device's key.
    pub key: u64,
    /// Bytes.
    pub capacity: u64,
    /// Whether unwritten space takes no room.
    pub thin_provisioned: bool,
    /// The key of its controller.
    pub controller: u64,
    /// The controller's bus.
    pub bus: String,
    /// The controller's number among those of its bus.
    pub bus_number: u64,
    /// Its place at the controller; nothing where nobody says.
    pub unit: Option<u64>,
    /// `persistent`, `independent_persistent`, …
    pub mode: String,
    /// `[datastore] folder/file.vmdk`.
    pub file: String,
    /// The files it is a delta over, the nearest first.
    pub parents: Vec<String>,
    /// `flat`, `sparse`, `seSparse`, `rdm`, or the provider's own word.
    pub backing: String,
    /// `sharingMultiWriter` where other VMs write to it as well.
    pub sharing: String,
    /// Whether it is encrypted.
    pub encrypted: bool,
}

/// One snapshot and those that were taken after it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SnapshotNode {
    /// The provider's own id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What its maker wrote.
    pub description: String,
    /// RFC 3339, by the provider's clock.
    pub created_at: String,
    /// The VM's power state when it was taken.
    pub power_state: String,
    /// Whether the VM goes on from here.
    pub current: bool,
    /// Those that were taken after it.
    pub children: Vec<SnapshotNode>,
}

/// A network card.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Network {
    /// `nic-0`, as the list calls it.
    pub name: String,
    /// The network's name.
    pub network: String,
    /// Lower case with colons.
    pub mac: String,
    /// Whether it is plugged in.
    pub connected: bool,
    /// The addresses that the guest has there.
    pub addresses: Vec<String>,
}

/// What a guest says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Guest {
    /// `running`, `notRunning`, `unknown`.
    pub tools_status: String,
    /// Version of the tools; empty where there are none.
    pub tools_version: String,
    /// Its name.
    pub hostname: String,
    /// All its addresses.
    pub addresses: Vec<String>,
    /// The operating system as it tells it.
    pub os: String,
}

/// What an account may do with a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Privileges {
    /// Why nobody can say; empty where it is known.
    pub unknown: String,
    /// What it lacks, and where.
    pub lacking: Vec<Lack>,
}

/// A privilege that an account lacks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lack {
    /// `VirtualMachine.State.CreateSnapshot`, …
    pub privilege: String,
    /// The VM's or the datastore's id.
    pub at: String,
}
