//! A virtual machine as every provider describes it and as the API lists it.
//!
//! Owns: the shape of a VM. Never: knows how a provider finds one. A crash here costs nothing.

use serde::{Deserialize, Serialize};

/// One virtual machine of the inventory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vm {
    /// The provider's own id, stable while the VM exists (a local VM: its path below the root).
    pub id: String,
    /// Display name.
    pub name: String,
    /// Inventory path; unique inside a connection.
    pub path: String,
    /// Operating system family: `linux`, `windows`, `other` or `unknown`.
    pub os: String,
    /// Version in the provider's words, empty where it is not known.
    pub os_version: String,
    /// Virtual CPUs.
    pub cpu: u32,
    /// Memory in MiB.
    pub memory_mb: u64,
    /// `bios` or `uefi`.
    pub firmware: String,
    /// Disks in the order the guest sees them.
    pub disks: Vec<Disk>,
    /// Network cards in order.
    pub nics: Vec<Nic>,
    /// `poweredOn`, `poweredOff` or `suspended`.
    pub power_state: String,
    /// `running`, `notRunning` or `unknown`.
    pub tools_status: String,
    /// Number of snapshots.
    pub snapshots: u32,
    /// Whether it is a template: what VMs are made of, never on.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub template: bool,
    /// Why this VM cannot be exported, empty where it can: a refused or damaged image stays visible with its reason.
    pub problem: String,
}

/// One virtual disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Disk {
    /// `disk-0`, `disk-1`, …
    pub name: String,
    /// Where it lies, in the provider's words (a local VM: the file's path below the root).
    pub source: String,
    /// Capacity of the logical disk in bytes.
    pub capacity: u64,
    /// The provider's own word: `vmdk`, `qcow2`, `raw`.
    pub format: String,
    /// Whether unwritten space takes no room.
    pub thin_provisioned: bool,
    /// The controller it hangs at: `scsi`, `ide`, `sata`, `nvme`, `virtio`; empty where nobody says.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub bus: String,
}

/// An earlier state of a VM's disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The provider's own id, unique for the disk.
    pub id: String,
    /// The name that its maker gave; may be empty.
    pub name: String,
    /// RFC 3339, by the clock of who took it.
    pub created_at: String,
}

/// One network card.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Nic {
    /// `nic-0`, `nic-1`, …
    pub name: String,
    /// The card's model in the provider's own words: `vmxnet3`, `e1000`, `virtio`.
    #[serde(rename = "type")]
    pub model: String,
    /// The network's name at the source.
    pub network: String,
    /// MAC address, lower case with colons; empty where it is not known.
    pub mac: String,
}

/// Whether a VM of the catalogue may bear this name, which is its folder's: 1 to 120 bytes, no separator or control character, no leading dot
/// or blank, and nothing that a job's folder is called.
pub fn is_catalogue_name(name: &str) -> bool {
    let clean = !name.contains(['/', '\\']) && !name.chars().any(char::is_control);
    let job = name.strip_suffix(".part").unwrap_or(name);
    clean && (1..=120).contains(&name.len()) && !name.starts_with('.') && name.trim() == name && job.parse::<crate::ids::JobId>().is_err()
}

#[cfg(test)]
mod tests {
    use super::is_catalogue_name;

    #[test]
    fn a_catalogue_name_is_one_folder() {
        for good in ["web", "Web server 01", "büro", "a.b", "job-x"] {
            assert!(is_catalogue_name(good), "{good}");
        }
        for bad in
            ["", ".", "..", ".hidden", "a/b", "a\\b", "a\0b", " web", "job-0123456789abcdef", "job-0123456789abcdef.part", &"x".repeat(121)]
        {
            assert!(!is_catalogue_name(bad), "{bad}");
        }
    }
}
