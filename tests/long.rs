//! What takes minutes or installs much: only `tests/run --long` runs it (it asks for the module by name and sets HYPERSDK_TEST_LONG).
//!
//! Owns: the long proofs. Never: passes in an everyday run: there it is left out by name, and `tests/run` says so.
//! A crash here costs the test.

use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::harness::client::{Client, file_of};
use crate::harness::fleet::{Fleet, PASSWORD, Plan};
use crate::harness::images::{convert, pattern};
use crate::harness::process::run;
use crate::harness::{lab, seconds, workspace};

/// `cargo test` without `tests/run` must not start what takes half an hour; it is told so instead.
fn only_when_asked() {
    assert!(std::env::var_os("HYPERSDK_TEST_LONG").is_some(), "this one takes minutes and installs packages: run `tests/run --long`");
}

/// virt-v2v takes our OVA as it takes VMware's: it reads the package, inspects the guest, and makes it boot on KVM.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn virt_v2v_imports_our_ova() {
    only_when_asked();
    let dir = lab().join("debian");
    run(Command::new(workspace().join("tests/lab/guest/debian.sh")).arg(&dir).env("MODULES", "vmware"));
    let fleet = Fleet::start("v2v", Plan::plain(), |vms| {
        convert(("raw", &dir.join("debian.raw")), ("vmdk", &vms.join("debian.vmdk")), &["-o", "subformat=streamOptimized"]);
    })
    .await;
    let id = fleet.client.export("debian", "ova", json!({})).await;
    let job = fleet.client.completed(&id, seconds(180)).await;
    let out = fleet.scratch.dir("v2v");
    let mut import = Command::new("virt-v2v");
    import.env("LIBGUESTFS_BACKEND", "direct").env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg");
    let said = run(import.args(["-i", "ova"]).arg(file_of(&job, ".ova")).args(["-o", "local", "-of", "qcow2", "-os"]).arg(&out));
    println!("{said}");
    let disk =
        std::fs::read_dir(&out).unwrap().flatten().map(|entry| entry.path()).find(|path| path.to_string_lossy().ends_with("-sda")).unwrap();
    let drive = format!("file={},format=qcow2,if=virtio,snapshot=on", disk.display());
    let mut boot = Command::new(workspace().join("tests/lab/guest/boot-until.sh"));
    boot.arg(fleet.scratch.join("console")).args(["login:", "300", "-accel", "tcg,thread=multi", "-m", "1024", "-drive", &drive]);
    run(&mut boot);
}

/// The same Debian, looked into: no virtio in its initrd, an interface that will have another name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_debian_of_vmware_is_looked_into() {
    only_when_asked();
    let raw = std::env::var_os("HYPERSDK_TEST_DEBIAN").map(std::path::PathBuf::from).unwrap_or_else(|| {
        let dir = lab().join("debian");
        run(Command::new(workspace().join("tests/lab/guest/debian.sh")).arg(&dir).env("MODULES", "vmware"));
        dir.join("debian.raw")
    });
    crate::guest::a_debian_without_virtio(&raw).await;
}

/// A token that has run out by the clock, not by a revocation.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_runs_out() {
    only_when_asked();
    let mut fleet = Fleet::start("runs-out", Plan::plain(), |vms| pattern(&vms.join("web.raw"), 1 << 20, &[(0, 4096)], 1)).await;
    fleet.controller.set("TOKEN_MINUTES", "1");
    fleet.restart_controller().await;
    let client = Client::new(&fleet.endpoints.rest).login("admin", PASSWORD).await;
    client.get("/auth/me").await.expect(200);
    tokio::time::sleep(Duration::from_secs(63)).await;
    client.get("/auth/me").await.refused(401, "unauthorized");
}
