//! What takes minutes or installs much: only `tests/run --long` runs it (it asks for the module by name and sets HYPERSDK_TEST_LONG).
//!
//! Owns: the long proofs. Never: passes in an everyday run: there it is left out by name, and `tests/run` says so.
//! A crash here costs the test.

use std::process::Command;
use std::time::Duration;

use rand::RngExt as _;
use serde_json::json;

use crate::harness::client::{Client, file_of};
use crate::harness::double::{self, Double, Kind, USER};
use crate::harness::fleet::{Fleet, PASSWORD, Plan};
use crate::harness::images::{convert, pattern, written};
use crate::harness::libvirtd::{self, Domain, virsh};
use crate::harness::process::{output, run};
use crate::harness::{lab, random, seconds, wait_for, workspace};

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

/// A Debian whose initrd knows only VMware's hardware: as it is it stops in the initramfs, and the job says so; adapted it comes up as a domain
/// that has its address and answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_debian_of_vcenter_becomes_a_domain_that_answers() {
    only_when_asked();
    let dir = lab().join("debian");
    run(Command::new(workspace().join("tests/lab/guest/debian.sh")).arg(&dir).env("MODULES", "vmware"));
    let payload = std::fs::read_to_string(dir.join("payload.sha256")).unwrap().trim().to_owned();
    let fleet = crate::migrate::fleet("debian", |_| {}).await;
    libvirtd::default_network();
    let double = Double::start(&fleet.scratch, Kind::Vcenter, &dir.join("debian.raw")).await;
    let account =
        json!({"provider": "vsphere", "name": "vc", "host": double.host, "username": USER, "password": double::PASSWORD, "insecure": true});
    fleet.client.post("/providers/connect", account).await.expect(201);
    let vm = Kind::Vcenter.vm();
    let name = format!("debian-{}", shared::ids::random_hex::<4>());
    let order = |adapt: &str| {
        let target = json!({"target": "libvirt", "name": name, "cpu": 2, "memory_mb": 512, "network": "default"});
        let options = json!({"target": target, "adapt": adapt, "boot_proof": {"network": true, "timeout_seconds": 300}});
        json!({"type": "migrate", "provider": "vc", "vm_name": vm, "options": options})
    };

    let plan = {
        let mut body = order("auto");
        body["options"]["dry_run"] = json!(true);
        fleet.client.post("/jobs", body).await.expect(200).body
    };
    println!("{:#}", plan["warnings"]);
    let dead = fleet.client.create_job(order("never")).await;
    let dead = fleet.client.ended(&dead, seconds(400)).await;
    println!("unadapted: {}", dead["error"]);
    assert_eq!((&dead["status"], &dead["error_code"]), (&json!("failed"), &json!("verification_failed")), "{dead:#}");
    assert!(dead["result"]["boot_proof"]["console_tail"].as_str().unwrap().contains("initramfs"), "{dead:#}");

    let id = fleet.client.create_job(order("auto")).await;
    let job = fleet.client.completed(&id, seconds(900)).await;
    println!("{}", fleet.client.log(&id).await);
    let (result, proof) = (&job["result"], &job["result"]["boot_proof"]);
    println!("{:#}\n{:#}", result["adapted"], json!({"sign": proof["sign"], "seconds": proof["seconds"], "address": proof["address"]}));
    let domain = Domain::adopt(&name, result["domain"]["uuid"].as_str().unwrap());
    let console = domain.console();
    assert_eq!(
        (&result["adapted"]["status"], &proof["passed"], &proof["pinged"]),
        (&json!("adapted"), &json!(true), &json!(true)),
        "{result:#}"
    );
    let mac = result["domain"]["mac"].as_str().unwrap();
    let address = wait_for("the domain to have an address", seconds(180), async || {
        let leases = virsh(&["net-dhcp-leases", "default", "--mac", mac]);
        let address = leases.split_whitespace().find_map(|word| word.strip_suffix("/24").map(str::to_owned));
        address.ok_or_else(|| format!("{leases}\n{}", console.said()))
    })
    .await;
    wait_for("the domain to answer", seconds(60), async || {
        let said = output(Command::new("busybox").args(["ping", "-c", "1", "-W", "2", &address]));
        if said.status.success() { Ok(()) } else { Err(format!("{address}\n{}", console.said())) }
    })
    .await;
    let hears = async |line: &str, text: &str| {
        wait_for(&format!("the console to say {text:?} after {line:?}"), seconds(60), async || {
            domain.type_in(line);
            tokio::time::sleep(Duration::from_secs(4)).await;
            let said = console.said();
            if said.contains(text) { Ok(()) } else { Err(said) }
        })
        .await;
    };
    hears("root", "Password").await;
    hears("migrate", "#").await;
    hears("sha256sum ~/payload.bin", &payload).await;
    assert_eq!(fleet.client.get(&format!("/vms/vc/{vm}")).await.expect(200).body["power_state"], "poweredOff");
}

/// A guest that writes is exported while it runs, and the agent is killed at some moment of each export: each job ends well, each copy is a
/// whole file system that has all that the guest was told is safe when the job was made, and nothing is left at the domain.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hot_exports_of_a_guest_that_writes_bear_fifty_kills() {
    only_when_asked();
    let mut fleet = crate::migrate::fleet("hot-kills", |_| {}).await;
    let (domain, _) = crate::migrate::running(&fleet, "hot");
    let console = domain.console();
    let said = || crate::migrate::acknowledged(&console);
    wait_for("the guest to write", seconds(60), async || if said() > 1 { Ok(()) } else { Err(console.said()) }).await;
    wait_for("it to be listed", seconds(15), async || {
        let answer = fleet.client.get(&format!("/vms/kvm/{}", domain.name)).await;
        if answer.status == 200 && answer.body["power_state"] == "poweredOn" { Ok(()) } else { Err(answer.text) }
    })
    .await;
    let mut random = random("hot-kills");
    let mut hits = 0;
    for run in 0..50 {
        let before = said();
        let order = json!({"type": "export", "provider": "kvm", "vm_name": domain.name, "format": "raw"});
        let id = fleet.client.create_job(order).await;
        tokio::time::sleep(Duration::from_millis(random.random_range(0..500))).await;
        hits += u32::from(fleet.client.job(&id).await["status"] == "running");
        fleet.agents[0].kill();
        fleet.agents[0].start();
        let job = fleet.client.completed(&id, seconds(120)).await;
        let log = written(&file_of(&job, ".raw"));
        assert!((before..=said() + 1).contains(&log), "run {run}: {log} is there, {before} was told before, {} by now", said());
        wait_for("nothing to be left", seconds(30), async || {
            let left = domain.left();
            if left == (false, Vec::new(), 0) { Ok(()) } else { Err(format!("run {run}: {left:?}")) }
        })
        .await;
        fleet.client.delete(&format!("/exports/{id}")).await.expect(204);
    }
    println!("{hits} of 50 kills met a running job; the guest wrote {} times", said());
    assert!(hits > 20);
}
