//! Guests as they lie on their disks: what browse, the preflight and a dry run say of them.
//!
//! Owns: the looks at real guests: the tiny one, one made here without virtio, and a real Debian (see `long`). Never: starts one.
//! A crash here costs the test.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::client::Client;
use crate::harness::fleet::{Fleet, Plan};
use crate::harness::images::{convert, guest, link, pattern};
use crate::harness::libvirtd::{self, Domain, URI};
use crate::harness::process::run;
use crate::harness::seconds;

async fn inside(client: &Client, provider: &str, vm: &str) -> Value {
    client.post("/vms/browse", json!({"provider": provider, "vm_name": vm})).await.expect(200).body["inspection"].clone()
}

async fn checks(client: &Client, vm: &str) -> Vec<Value> {
    let checks = client.get(&format!("/readiness?provider=local&vm_name={vm}")).await.expect(200).body;
    checks.as_array().unwrap().iter().filter(|check| check["check"].as_str().unwrap().starts_with("guest")).cloned().collect()
}

/// A Debian whose initrd knows VMware's hardware alone, as `tests/lab/guest/debian.sh` makes it with MODULES=vmware.
pub async fn a_debian_without_virtio(raw: &Path) {
    let fleet = Fleet::start("guest-debian", Plan::plain(), |vms| {
        for (format, more) in [("vmdk", &["-o", "subformat=streamOptimized"][..]), ("qcow2", &["-c"])] {
            convert(("raw", raw), (format, &vms.join(format!("debian-{format}.{format}"))), more);
        }
        std::os::unix::fs::symlink(raw, vms.join("outside.raw")).unwrap();
    })
    .await;
    for vm in ["debian-vmdk", "debian-qcow2"] {
        let seen = inside(&fleet.client, "local", vm).await;
        println!("{vm}: {} ms, {} KiB read", seen["took_ms"], seen["read_bytes"].as_u64().unwrap() >> 10);
        assert_eq!(
            (&seen["system"]["id"], &seen["system"]["version"], &seen["system"]["hostname"]),
            (&json!("debian"), &json!("12"), &json!("migguest"))
        );
        assert_eq!(
            (&seen["system"]["architecture"], &seen["system"]["root"]),
            (&json!("x86_64"), &json!("disk 0, partition 1")),
            "{seen:#}"
        );
        let kernel = &seen["kernels"][0];
        assert!(kernel["version"].as_str().unwrap().starts_with("6.1.0-"), "{seen:#}");
        assert_eq!(
            (&seen["virtio"], &kernel["virtio_blk"], &kernel["virtio_net"]),
            (&json!("no"), &json!("module"), &json!("module")),
            "{seen:#}"
        );
        assert_eq!(kernel["initrd"]["unknown"], "", "{seen:#}");
        let mount = &seen["mounts"][0];
        assert_eq!((&mount["by"], &mount["changes"], &mount["at"]), (&json!("uuid"), &json!(false), &json!("/")), "{seen:#}");
        assert_eq!((&seen["interfaces"][0]["name"], &seen["interfaces"][0]["changes"]), (&json!("ens192"), &json!(true)), "{seen:#}");
        assert_eq!((&seen["boot"]["firmware"], &seen["boot"]["loaders"][0]["kind"]), (&json!("bios"), &json!("grub")), "{seen:#}");
        assert_eq!(seen["boot"]["serial_console"], true, "{seen:#}");
        assert_eq!((&seen["software"]["vmware_tools"], &seen["software"]["grub_mkconfig"]), (&json!("no"), &json!("yes")), "{seen:#}");
        assert_eq!(seen["notes"], json!([]), "{seen:#}");
        let bad: Vec<_> = checks(&fleet.client, vm).await.into_iter().filter(|check| check["status"] != "pass").collect();
        assert_eq!(bad.len(), 2, "{bad:#?}");
        assert!(bad[0]["check"] == "guest_virtio" && bad[0]["fix"].as_str().unwrap().contains("virt-v2v"), "{bad:#?}");
        assert!(bad[1]["message"].as_str().unwrap().contains("ens192"), "{bad:#?}");
    }
}

/// Makes `to` a disk with this root at 1 MiB, by other people's tools.
fn disk(scratch: &Path, root: &Path, to: &Path) {
    let fs = scratch.join("root.fs");
    std::fs::File::create(&fs).unwrap().set_len(24 << 20).unwrap();
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-L", "root", "-d"]).arg(root).arg(&fs));
    std::fs::File::create(to).unwrap().set_len(26 << 20).unwrap();
    run(Command::new("sh").arg("-c").arg(format!("printf 'label: gpt\\nstart=2048,size=49152\\n' | sfdisk -q {}", to.display())));
    run(Command::new("dd").arg(format!("if={}", fs.display())).arg(format!("of={}", to.display())).args([
        "bs=1M",
        "seek=1",
        "conv=notrunc",
        "status=none",
    ]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_on_disks_is_told_by_browse_preflight_and_plan() {
    libvirtd::start();
    let fleet = Fleet::start("guest", Plan::plain(), |vms| {
        link(&guest().raw, &vms.join("tiny.raw"));
        convert(("raw", &guest().raw), ("vmdk", &vms.join("packed.vmdk")), &["-o", "subformat=streamOptimized"]);
        pattern(&vms.join("noise.raw"), 4 << 20, &[(0, 4 << 20)], 7);
        std::fs::write(vms.join("broken.qcow2"), "this is no qcow2").unwrap();
        let root = vms.parent().unwrap().join("root");
        for (path, text) in [
            ("etc/os-release", "ID=test\nPRETTY_NAME=\"Test \u{1}Linux\"\n"),
            ("etc/fstab", "/dev/sda1 / ext4\n"),
            ("boot/vmlinuz-6.1.0", "kernel"),
            ("boot/initrd.img-6.1.0", "this is no initrd"),
        ] {
            let file = root.join(path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
        disk(vms.parent().unwrap(), &root, &vms.join("made.raw"));
    })
    .await;
    let client = &fleet.client;

    // The tiny guest: a kernel on a FAT, no root.
    for vm in ["tiny", "packed"] {
        let seen = inside(client, "local", vm).await;
        println!("{vm}: {} ms, {} KiB read", seen["took_ms"], seen["read_bytes"].as_u64().unwrap() >> 10);
        let kernel = &seen["kernels"][0];
        assert!(kernel["version"].as_str().is_some_and(|version| version.contains("cloud-amd64")), "{seen:#}");
        assert_eq!((&kernel["virtio_blk"], &kernel["initrd"]["compression"]), (&json!("initrd"), &json!(["gzip"])), "{seen:#}");
        let systems: Vec<_> =
            seen["partitions"].as_array().unwrap().iter().map(|p| (p["file_system"].clone(), p["label"].clone())).collect();
        assert_eq!(systems, [(json!("vfat"), json!("BOOT")), (json!("ext4"), json!("DATA"))], "{seen:#}");
        assert_eq!((&seen["boot"]["firmware"], &seen["boot"]["loaders"][0]["kind"]), (&json!("bios"), &json!("syslinux")), "{seen:#}");
        assert!(seen["system"]["family"] == "unknown" && !seen["notes"].as_array().unwrap().is_empty(), "{seen:#}");
    }

    // One that was made here, and what cannot be looked into.
    let made = inside(client, "local", "made").await;
    assert_eq!((&made["system"]["pretty_name"], &made["partitions"][0]["scheme"]), (&json!("Test Linux"), &json!("gpt")), "{made:#}");
    assert!(made["virtio"] == "unknown" && made["kernels"][0]["initrd"]["unknown"].as_str().unwrap().contains("no archive"), "{made:#}");
    let found = checks(client, "made").await;
    let status = |name: &str| found.iter().find(|check| check["check"] == name).map(|check| check["status"].clone());
    assert_eq!(
        (status("guest"), status("guest_virtio"), status("guest_device_names")),
        (Some(json!("pass")), Some(json!("warn")), Some(json!("warn")))
    );
    let noise = inside(client, "local", "noise").await;
    assert!(noise["virtio"] == "unknown" && noise["kernels"] == json!([]), "{noise:#}");
    let broken = client.post("/vms/browse", json!({"provider": "local", "vm_name": "broken"})).await.expect(200).body;
    assert!(broken["inspection"].is_null() && broken["inspection_unknown"].is_string(), "{broken:#}");
    assert!(client.get("/vms/list").await.expect(200).text.find("inspection").is_none());

    // A dry run says it, too.
    let plan = client
        .post("/jobs", json!({"type": "export", "provider": "local", "vm_name": "made", "format": "qcow2", "options": {"dry_run": true}}));
    let plan = plan.await.expect(200).body;
    assert_eq!(plan["guest"]["system"]["id"], "test", "{plan:#}");

    // A domain that is off, and the same while it runs.
    let image = fleet.vms().join("domain.qcow2");
    convert(("raw", &guest().raw), ("qcow2", &image), &[]);
    let domain = Domain::define("inspected", &image, "qcow2");
    client.post("/providers/connect", json!({"provider": "libvirt", "name": "kvm", "uri": URI})).await.expect(201);
    let off = inside(client, "kvm", &domain.name).await;
    assert_eq!(off["kernels"][0]["virtio_blk"], "initrd", "{off:#}");
    libvirtd::virsh(&["start", &domain.name]);
    crate::harness::wait_for("the inventory to see it on", seconds(10), async || {
        let on = client.post("/vms/browse", json!({"provider": "kvm", "vm_name": domain.name})).await.expect(200).body;
        let is_told = on["inspection"].is_null() && on["inspection_unknown"].as_str().is_some_and(|why| why.contains("off"));
        if is_told { Ok(()) } else { Err(on["power_state"].to_string()) }
    })
    .await;
}
