//! The export boots: not "qemu-img says so" but a kernel that comes up, finds its partitions and prints its payload's digest.
//!
//! Owns: the boot promise, under TCG. Never: uses KVM, which may be there and run no guest. A crash here costs the test.

use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::harness::client::file_of;
use crate::harness::fleet::{Fleet, Plan};
use crate::harness::images::{convert, guest, untar};
use crate::harness::process::run;
use crate::harness::{seconds, workspace};

/// Boots a disk to the guest's marker on a copy-on-write layer; answers the serial console.
pub fn boot(disk: &Path, format: &str, log: &Path) -> String {
    let drive = format!("file={},format={format},if=virtio,snapshot=on", disk.display());
    let mut command = Command::new(workspace().join("tests/lab/guest/boot-until.sh"));
    command.arg(log).args(["TINYGUEST-LOGIN ready", "120"]);
    run(command.args(["-accel", "tcg,thread=multi", "-m", "256", "-drive", &drive]));
    String::from_utf8_lossy(&std::fs::read(log).unwrap()).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_exported_qcow2_and_the_disk_inside_the_ova_boot_and_print_the_payloads_digest() {
    let fleet = Fleet::start("boot", Plan::plain(), |vms| {
        convert(("raw", &guest().raw), ("vmdk", &vms.join("guest.vmdk")), &["-o", "subformat=streamOptimized"]);
    })
    .await;
    let qcow2 = fleet.client.export("guest", "qcow2", json!({"compress": true})).await;
    let ova = fleet.client.export("guest", "ova", json!({})).await;
    let qcow2 = fleet.client.completed(&qcow2, seconds(60)).await;
    let ova = fleet.client.completed(&ova, seconds(60)).await;
    let opened = fleet.scratch.join("opened");
    let members = untar(&file_of(&ova, ".ova"), &opened);
    let disk = members.iter().find(|member| member.ends_with(".vmdk")).unwrap();
    for (disk, format) in [(file_of(&qcow2, ".qcow2"), "qcow2"), (opened.join(disk), "vmdk")] {
        let console = boot(&disk, format, &fleet.scratch.join("console"));
        let expected = format!("TINYGUEST-DATA {}", guest().payload);
        assert!(console.contains(&expected), "{format}: no {expected:?} in:\n{console}");
    }
}
