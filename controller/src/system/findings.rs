//! What is in the way of a VM at a hypervisor, by name.
//!
//! Owns: the checks of the preflight that need more than the inventory, as pure functions of what the provider told. Never: asks anybody,
//! passes what nobody could say. A crash here costs one answer.

use shared::details::{Details, DiskDetail, Privileges, SnapshotNode};
use shared::vm::Vm;

use super::readiness::{Check, fail, pass, warn};

/// Everything that was found, good or bad.
pub fn of(vm: &Vm, details: &Details) -> Vec<Check> {
    let is_off = vm.power_state == "poweredOff";
    let mut checks = vec![
        snapshots(vm, details),
        raw_devices(details),
        shared_disks(details, is_off),
        independent(details, is_off),
        encrypted(details),
        hardware(details),
        changed_blocks(details),
    ];
    if let Some(privileges) = &details.privileges {
        checks.push(permissions(privileges, vm));
    }
    checks
}

fn snapshots(vm: &Vm, details: &Details) -> Check {
    fn names<'a>(nodes: &'a [SnapshotNode], into: &mut Vec<&'a str>) {
        for node in nodes {
            into.push(&node.name);
            names(&node.children, into);
        }
    }
    let mut all = Vec::new();
    names(&details.snapshot_tree, &mut all);
    let has_deltas = details.disk_details.iter().any(|disk| !disk.parents.is_empty());
    match (all.len(), has_deltas) {
        (0, false) => pass("snapshots", "it has none"),
        (0, true) => warn(
            "snapshots",
            "it has none, and yet its disks are deltas over others: a consolidation is due",
            "consolidate its disks at the source; an export reads over the deltas, by a lease",
        ),
        (count, _) => {
            let shown = all.iter().take(5).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            let more = if count > 5 { format!(" and {} more", count - 5) } else { String::new() };
            let way = if vm.power_state == "poweredOff" { ", by a lease, which is slower than ranges" } else { "" };
            let message = format!("it has {count} ({shown}{more}); an export takes the present state{way}");
            warn("snapshots", message, "remove those that nobody needs, and let the source consolidate")
        }
    }
}

fn labels<'a>(disks: impl Iterator<Item = &'a DiskDetail>) -> String {
    disks.map(|disk| format!("{} ({})", disk.name, disk.label)).collect::<Vec<_>>().join(", ")
}

fn raw_devices(details: &Details) -> Check {
    let found = labels(details.disk_details.iter().filter(|disk| disk.backing == "rdm"));
    if found.is_empty() {
        return pass("raw_device_mappings", "none of its disks is one");
    }
    let fix =
        "turn it into a file of a datastore (migrate its storage in virtual mode), or take it out of the VM and copy the LUN by itself";
    fail("raw_device_mappings", format!("{found}: a device of the storage, not a file; it cannot be exported"), fix)
}

fn shared_disks(details: &Details, is_off: bool) -> Check {
    let written = labels(details.disk_details.iter().filter(|disk| disk.sharing == "sharingMultiWriter"));
    if !written.is_empty() {
        let message = format!("{written}: other VMs may write to it meanwhile (multi-writer)");
        return fail(
            "shared_disks",
            message,
            "power off all VMs that share it and set its sharing to none, or export one that does not share",
        );
    }
    let buses: Vec<String> = details
        .controllers
        .iter()
        .filter(|controller| matches!(controller.sharing.as_str(), "virtualSharing" | "physicalSharing"))
        .map(|controller| format!("{} {} ({})", controller.bus, controller.bus_number, controller.sharing))
        .collect();
    match (buses.is_empty(), is_off) {
        (true, _) => pass("shared_disks", "none of its disks is shared"),
        (false, true) => warn(
            "shared_disks",
            format!("its bus {} is shared: another VM may write meanwhile", buses.join(", ")),
            "power off the other VMs of the cluster, too",
        ),
        (false, false) => fail(
            "shared_disks",
            format!("its bus {} is shared: no snapshot can be taken", buses.join(", ")),
            "power it and the other VMs of the cluster off",
        ),
    }
}

fn independent(details: &Details, is_off: bool) -> Check {
    let found = labels(details.disk_details.iter().filter(|disk| disk.mode.starts_with("independent")));
    match (found.is_empty(), is_off) {
        (true, _) => pass("independent_disks", "none of its disks is independent"),
        (false, true) => warn(
            "independent_disks",
            format!("{found}: no snapshot holds it, so it can be exported only while the VM is off, as now"),
            "leave it off until the export has ended, or set the disk's mode to dependent",
        ),
        (false, false) => fail(
            "independent_disks",
            format!("{found}: no snapshot holds it, and the VM is not off"),
            "power the VM off, or set the disk's mode to dependent (persistent)",
        ),
    }
}

fn encrypted(details: &Details) -> Check {
    let found = labels(details.disk_details.iter().filter(|disk| disk.encrypted));
    let fix = "decrypt it at the source (set its storage policy to one without encryption)";
    match (found.is_empty(), details.encrypted) {
        (true, false) => pass("encryption", "neither it nor a disk of it is encrypted"),
        (true, true) => fail("encryption", "its configuration is encrypted: what leaves the source could not be read", fix),
        (false, _) => fail("encryption", format!("{found}: encrypted; what leaves the source could not be read"), fix),
    }
}

fn hardware(details: &Details) -> Check {
    let odd: Vec<String> = details
        .disk_details
        .iter()
        .filter(|disk| !matches!(disk.backing.as_str(), "flat" | "sparse" | "seSparse" | "rdm"))
        .map(|disk| format!("{} is a {}", disk.name, disk.backing))
        .collect();
    if !odd.is_empty() {
        let message = format!("{}, which is no file of a datastore", odd.join(", "));
        return fail("hardware", message, "move it onto a datastore as a usual disk");
    }
    if !details.left_behind.is_empty() {
        let message = format!("{} stays behind: it is no part of an image", details.left_behind.join(", "));
        return warn("hardware", message, "see that the guest boots without it; keys in a virtual TPM are lost (suspend BitLocker first)");
    }
    let version = &details.hardware_version;
    pass(
        "hardware",
        if version.is_empty() { "nothing of it stays behind".to_owned() } else { format!("{version}; nothing of it stays behind") },
    )
}

/// Tracking came with hardware version 7.
const TRACKS: u32 = 7;

fn changed_blocks(details: &Details) -> Check {
    let version = details.hardware_version.strip_prefix("vmx-").and_then(|number| number.parse::<u32>().ok());
    match (details.changed_block_tracking, version) {
        (Some(true), _) => pass("changed_blocks", "changed blocks are tracked"),
        (_, Some(version)) if version < TRACKS => warn(
            "changed_blocks",
            format!("changed blocks cannot be tracked by hardware version {version}: a backup reads whole disks each time"),
            "upgrade the virtual hardware; an export does not need it",
        ),
        (Some(false), _) => warn(
            "changed_blocks",
            "changed blocks are not tracked: a backup switches tracking on and reads whole disks the first time",
            "nothing for an export; for backups let the account have VirtualMachine.Config.ChangeTracking",
        ),
        (None, _) => warn(
            "changed_blocks",
            "unknown: the server does not say whether changed blocks are tracked",
            "nothing for an export; a backup looks for itself",
        ),
    }
}

fn permissions(privileges: &Privileges, vm: &Vm) -> Check {
    if !privileges.unknown.is_empty() {
        return warn(
            "permissions",
            format!("unknown: the server does not say what the account may do ({})", privileges.unknown),
            "see that its role has VApp.Export, VirtualMachine.State.CreateSnapshot and RemoveSnapshot, Datastore.Browse and FileManagement",
        );
    }
    let lacks = |name: &str| privileges.lacking.iter().any(|lack| lack.privilege == name);
    let mut names: Vec<&str> = privileges.lacking.iter().map(|lack| lack.privilege.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let (no_lease, no_files) = (lacks("VApp.Export"), lacks("Datastore.Browse") || lacks("Datastore.FileManagement"));
    let no_snapshot = lacks("VirtualMachine.State.CreateSnapshot") || lacks("VirtualMachine.State.RemoveSnapshot");
    let is_plain = vm.power_state == "poweredOff" && vm.snapshots == 0;
    let blocks = if is_plain { no_lease && no_files } else { no_lease || (no_snapshot && vm.power_state != "poweredOff") };
    let message = format!("the account lacks {}", names.join(", "));
    let fix = format!("give its role {} at the VM and its datastores", names.join(", "));
    match (names.is_empty(), blocks) {
        (true, _) => pass("permissions", "the account may do what an export and a backup need"),
        (false, true) => fail("permissions", format!("{message}: this VM cannot be exported as it is"), fix),
        (false, false) => warn("permissions", format!("{message}: this VM can be exported, other ways or a backup cannot"), fix),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::details::{Controller, Lack};

    fn vm(power_state: &str) -> Vm {
        Vm { power_state: power_state.into(), ..Vm::default() }
    }

    fn plain() -> Details {
        let disk = DiskDetail { name: "disk-0".into(), label: "Hard disk 1".into(), backing: "flat".into(), ..DiskDetail::default() };
        Details {
            changed_block_tracking: Some(true),
            disk_details: vec![disk],
            privileges: Some(Privileges::default()),
            ..Details::default()
        }
    }

    fn status(vm: &Vm, details: &Details, name: &str) -> &'static str {
        let check = of(vm, details).into_iter().find(|check| check.check == name);
        let check = check.unwrap_or_else(|| fail("none", "no such check", ""));
        assert!(check.status == "pass" || !check.fix.is_empty(), "{check:?}");
        check.status
    }

    #[test]
    fn a_plain_vm_passes_everything() {
        for check in of(&vm("poweredOff"), &plain()) {
            assert_eq!(check.status, "pass", "{check:?}");
        }
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let (off, on) = (vm("poweredOff"), vm("poweredOn"));
        let with = |change: fn(&mut DiskDetail)| {
            let mut details = plain();
            details.disk_details.iter_mut().for_each(change);
            details
        };
        assert_eq!(status(&off, &with(|disk| disk.backing = "rdm".into()), "raw_device_mappings"), "fail");
        assert_eq!(status(&off, &with(|disk| disk.sharing = "sharingMultiWriter".into()), "shared_disks"), "fail");
        assert_eq!(status(&off, &with(|disk| disk.encrypted = true), "encryption"), "fail");
        assert_eq!(status(&off, &with(|disk| disk.backing = "VirtualDiskLocalPMemBackingInfo".into()), "hardware"), "fail");
        let independent = with(|disk| disk.mode = "independent_persistent".into());
        assert_eq!((status(&off, &independent, "independent_disks"), status(&on, &independent, "independent_disks")), ("warn", "fail"));
        let controller = Controller { bus: "scsi".into(), sharing: "physicalSharing".into(), ..Controller::default() };
        let cluster = Details { controllers: vec![controller], ..plain() };
        assert_eq!((status(&off, &cluster, "shared_disks"), status(&on, &cluster, "shared_disks")), ("warn", "fail"));
        assert_eq!(status(&off, &with(|disk| disk.parents = vec!["[d] a.vmdk".into()]), "snapshots"), "warn");
        for tracking in [None, Some(false)] {
            assert_eq!(status(&off, &Details { changed_block_tracking: tracking, ..plain() }, "changed_blocks"), "warn");
        }
        assert_eq!(status(&off, &Details { left_behind: vec!["a TPM".into()], ..plain() }, "hardware"), "warn");
        assert_eq!(status(&off, &Details { encrypted: true, ..plain() }, "encryption"), "fail");
    }

    #[test]
    fn what_an_account_may_do_is_weighed_by_what_the_vm_needs() {
        let lacking = |names: &[&str]| {
            let lack = |name: &&str| Lack { privilege: (*name).into(), at: "vm-1".into() };
            Details { privileges: Some(Privileges { lacking: names.iter().map(lack).collect(), ..Privileges::default() }), ..plain() }
        };
        let (off, on) = (vm("poweredOff"), vm("poweredOn"));
        let deltas = Vm { snapshots: 1, ..vm("poweredOff") };
        for (names, plainly, running, over_deltas) in [
            (&["VApp.Export"][..], "warn", "fail", "fail"),
            (&["VApp.Export", "Datastore.Browse"], "fail", "fail", "fail"),
            (&["Datastore.FileManagement"], "warn", "warn", "warn"),
            (&["VirtualMachine.State.RemoveSnapshot"], "warn", "fail", "warn"),
            (&["VirtualMachine.Provisioning.DiskRandomRead"], "warn", "warn", "warn"),
        ] {
            let details = lacking(names);
            let found = [&off, &on, &deltas].map(|vm| status(vm, &details, "permissions"));
            assert_eq!(found, [plainly, running, over_deltas], "{names:?}");
        }
        let silent = Details { privileges: Some(Privileges { unknown: "NotSupported".into(), ..Privileges::default() }), ..plain() };
        assert_eq!(status(&off, &silent, "permissions"), "warn", "what nobody says is not passed");
    }
}
