//! What differs between two VMs, ranked, pure.
//!
//! | rank | field | severity |
//! |---|---|---|
//! | 0 | `disks[n].content` | critical |
//! | 1 | `problem` (one cannot be read) | critical |
//! | 2 | `firmware` | critical |
//! | 3 | `disks.count` | critical |
//! | 4 | `disks.order` (the same sizes in another order: the first is booted) | critical |
//! | 5 | `disks[n].size_bytes` | critical where the target is smaller, else warning |
//! | 6 | `disks[n].bus` (both known) | critical for the first disk, else warning |
//! | 7 | `nics.count`, `nics[n].type`, `nics[n].mac` | warning |
//! | 8 | `nics[n].network` | info |
//! | 9 | `cpu`, `memory_mb` | warning |
//! | 10 | `os`, `disks[n].format`, `disks[n].thin_provisioned`, `snapshots`, `power_state`, `name`, `os_version` | info |
//!
//! Two VMs match when nothing worse than info differs.
//! Owns: this table. Never: asks anybody. A crash here costs nothing.

use serde::Serialize;
use serde_json::{Value, json};
use shared::vm::Vm;
use utoipa::ToSchema;

/// Something that differs.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(example = json!({"field": "firmware", "source": "uefi", "target": "bios", "severity": "critical"}))]
pub struct Difference {
    /// Which field.
    pub field: String,
    /// What it is at the source.
    #[schema(value_type = Object)]
    pub source: Value,
    /// What it is at the target.
    #[schema(value_type = Object)]
    pub target: Value,
    /// `critical` breaks a boot, `warning` is seen by the guest, `info` is not.
    pub severity: &'static str,
    /// Position in the table.
    #[serde(skip)]
    pub rank: u8,
}

struct Found(Vec<Difference>);

impl Found {
    fn add(&mut self, rank: u8, severity: &'static str, field: impl Into<String>, source: Value, target: Value) {
        if source != target {
            self.0.push(Difference { field: field.into(), source, target, severity, rank });
        }
    }
}

/// What differs, worst first. `contents`: for each pair of disks whether it holds the same, where that is known.
pub fn differences(source: &Vm, target: &Vm, contents: &[Option<bool>]) -> Vec<Difference> {
    let mut found = Found(Vec::new());
    for (n, _) in contents.iter().enumerate().filter(|(_, same)| **same == Some(false)) {
        found.add(0, "critical", format!("disks[{n}].content"), json!("one content"), json!("another content"));
    }
    found.add(1, "critical", "problem", json!(source.problem), json!(target.problem));
    found.add(2, "critical", "firmware", json!(source.firmware), json!(target.firmware));
    disks(&mut found, source, target);
    nics(&mut found, source, target);
    found.add(9, "warning", "cpu", json!(source.cpu), json!(target.cpu));
    found.add(9, "warning", "memory_mb", json!(source.memory_mb), json!(target.memory_mb));
    found.add(10, "info", "os", json!(source.os), json!(target.os));
    found.add(10, "info", "snapshots", json!(source.snapshots), json!(target.snapshots));
    found.add(10, "info", "power_state", json!(source.power_state), json!(target.power_state));
    found.add(10, "info", "name", json!(source.name), json!(target.name));
    found.add(10, "info", "os_version", json!(source.os_version), json!(target.os_version));
    let mut all = found.0;
    // Stable: inside a rank the order above stays.
    all.sort_by_key(|difference| difference.rank);
    all
}

fn disks(found: &mut Found, source: &Vm, target: &Vm) {
    found.add(3, "critical", "disks.count", json!(source.disks.len()), json!(target.disks.len()));
    let sizes = |vm: &Vm| vm.disks.iter().map(|disk| disk.capacity).collect::<Vec<_>>();
    let (mine, theirs) = (sizes(source), sizes(target));
    let sorted = |mut sizes: Vec<u64>| {
        sizes.sort_unstable();
        sizes
    };
    let moved = mine != theirs && sorted(mine.clone()) == sorted(theirs.clone());
    if moved {
        found.add(4, "critical", "disks.order", json!(mine), json!(theirs));
    }
    for (n, (a, b)) in source.disks.iter().zip(&target.disks).enumerate() {
        let field = |name: &str| format!("disks[{n}].{name}");
        if !moved {
            let severity = if b.capacity < a.capacity { "critical" } else { "warning" };
            found.add(5, severity, field("size_bytes"), json!(a.capacity), json!(b.capacity));
        }
        if !a.bus.is_empty() && !b.bus.is_empty() {
            found.add(6, if n == 0 { "critical" } else { "warning" }, field("bus"), json!(a.bus), json!(b.bus));
        }
        found.add(10, "info", field("format"), json!(a.format), json!(b.format));
        found.add(10, "info", field("thin_provisioned"), json!(a.thin_provisioned), json!(b.thin_provisioned));
    }
}

fn nics(found: &mut Found, source: &Vm, target: &Vm) {
    found.add(7, "warning", "nics.count", json!(source.nics.len()), json!(target.nics.len()));
    for (n, (a, b)) in source.nics.iter().zip(&target.nics).enumerate() {
        found.add(7, "warning", format!("nics[{n}].type"), json!(a.model.to_lowercase()), json!(b.model.to_lowercase()));
        if !a.mac.is_empty() && !b.mac.is_empty() {
            found.add(7, "warning", format!("nics[{n}].mac"), json!(a.mac), json!(b.mac));
        }
        found.add(8, "info", format!("nics[{n}].network"), json!(a.network), json!(b.network));
    }
}

/// Whether nothing differs that matters.
pub fn matches(differences: &[Difference]) -> bool {
    differences.iter().all(|difference| difference.severity == "info")
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::vm::{Disk, Nic};

    fn vm() -> Vm {
        let disk = |n: u64| Disk {
            name: format!("disk-{n}"),
            capacity: (n + 1) << 30,
            format: "vmdk".into(),
            bus: "scsi".into(),
            ..Disk::default()
        };
        Vm {
            name: "web".into(),
            firmware: "uefi".into(),
            cpu: 4,
            memory_mb: 8192,
            disks: vec![disk(0), disk(1)],
            nics: vec![Nic { model: "vmxnet3".into(), mac: "00:50:56:00:00:01".into(), network: "LAN".into(), ..Nic::default() }],
            ..Vm::default()
        }
    }

    fn against(change: impl FnOnce(&mut Vm)) -> Vec<(String, &'static str)> {
        let mut target = vm();
        change(&mut target);
        differences(&vm(), &target, &[]).into_iter().map(|difference| (difference.field, difference.severity)).collect()
    }

    #[test]
    fn what_breaks_a_boot_comes_first() {
        let found = against(|vm| {
            (vm.name, vm.firmware, vm.cpu) = ("web2".into(), "bios".into(), 2);
            vm.disks[0].bus = "virtio".into();
            vm.disks[1].capacity -= 512;
            vm.nics[0].model = "virtio".into();
        });
        let expected = [
            ("firmware", "critical"),
            ("disks[1].size_bytes", "critical"),
            ("disks[0].bus", "critical"),
            ("nics[0].type", "warning"),
            ("cpu", "warning"),
            ("name", "info"),
        ];
        assert_eq!(found, expected.map(|(field, severity)| (field.to_owned(), severity)));
    }

    #[test]
    fn each_kind_has_its_severity() {
        assert_eq!(against(|_| {}), []);
        assert_eq!(against(|vm| vm.disks.swap(0, 1)), [("disks.order".to_owned(), "critical")]);
        assert_eq!(against(|vm| drop(vm.disks.pop())), [("disks.count".to_owned(), "critical")]);
        assert_eq!(against(|vm| vm.disks[0].capacity += 512), [("disks[0].size_bytes".to_owned(), "warning")]);
        assert_eq!(against(|vm| vm.disks[1].bus = "sata".into()), [("disks[1].bus".to_owned(), "warning")]);
        assert_eq!(against(|vm| vm.disks[0].bus = String::new()), [], "what nobody says differs from nothing");
        assert_eq!(against(|vm| vm.nics[0].mac = "00:50:56:00:00:02".into()), [("nics[0].mac".to_owned(), "warning")]);
        assert_eq!(against(|vm| vm.nics.clear()), [("nics.count".to_owned(), "warning")]);
        assert_eq!(against(|vm| vm.problem = "damaged".into()), [("problem".to_owned(), "critical")]);
        let only_info = differences(&vm(), &Vm { name: "copy".into(), ..vm() }, &[Some(true), None]);
        assert!(matches(&only_info) && only_info.len() == 1, "{only_info:?}");
        let content = differences(&vm(), &vm(), &[Some(true), Some(false)]);
        assert!(!matches(&content) && content[0].field == "disks[1].content" && content[0].severity == "critical", "{content:?}");
    }
}
