//! Migrations: from a VM at the source to one that has booted at libvirt.
//!
//! Owns: the promises about this job type on a real libvirt. Never: knows an ESXi that is not there: the double stands for it.
//! A crash here costs the test; domains go with it.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::cli::{done, hypersdk};
use crate::harness::client::file_of;
use crate::harness::double::{self, Double, Kind, USER};
use crate::harness::fleet::{Fleet, PASSWORD, Plan};
use crate::harness::images::{convert, guest, identical, link, writer, written};
use crate::harness::libvirtd::{self, Domain, URI, virsh};
use crate::harness::{seconds, wait_for};

/// What the tiny guest says last.
const UP: &str = "TINYGUEST-LOGIN ready";

/// A fleet whose agent serves libvirt and emulates CPUs (KVM is there and runs no guest everywhere).
pub async fn fleet(name: &str, fill: impl FnOnce(&Path)) -> Fleet {
    libvirtd::start();
    let mut fleet = Fleet::start(name, Plan::plain(), fill).await;
    fleet.agents[0].set("LIBVIRT_ACCEL", "tcg");
    fleet.agents[0].process().terminate(seconds(30)).await;
    fleet.agents[0].start();
    wait_for("the agent to serve libvirt", seconds(30), async || {
        let answer = fleet.client.post("/providers/connect", json!({"provider": "libvirt", "name": "kvm", "uri": URI})).await;
        if answer.status == 201 { Ok(()) } else { Err(answer.text) }
    })
    .await;
    fleet
}

pub fn new_name() -> String {
    format!("moved-{}", shared::ids::random_hex::<4>())
}

pub fn order(provider: &str, vm: &str, name: &str, more: Value) -> Value {
    let mut options = json!({
        "target": {"target": "libvirt", "name": name, "cpu": 1, "memory_mb": 256, "network": "user"},
        "adapt": "never", "boot_proof": {"sign": UP, "timeout_seconds": 120},
    });
    for (key, value) in more.as_object().unwrap() {
        match value.as_object() {
            Some(fields) if options[key].is_object() => options[key].as_object_mut().unwrap().extend(fields.clone()),
            _ => options[key] = value.clone(),
        }
    }
    json!({"type": "migrate", "provider": provider, "vm_name": vm, "options": options})
}

/// Domains and networks of proofs, and part folders.
fn left(fleet: &Fleet, job: &str) -> Vec<String> {
    let lines = |arguments: &[&str]| virsh(arguments).lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>();
    let proofs = lines(&["list", "--all", "--name"]).into_iter().filter(|name| name.contains(job));
    let networks = lines(&["net-list", "--all", "--name"]).into_iter().filter(|name| name.starts_with("hypersdk"));
    let parts = std::fs::read_dir(fleet.exports()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    proofs.chain(networks).chain(parts.filter(|name| name.contains(job) && name.ends_with(".part"))).collect()
}

/// Waits until a job's log says so.
pub async fn said(fleet: &Fleet, id: &str, text: &str) {
    wait_for(&format!("{id} to say {text:?}"), seconds(90), async || {
        let log = fleet.client.log(id).await;
        if log.contains(text) { Ok(()) } else { Err(log) }
    })
    .await;
}

async fn boots(console: &libvirtd::Console) {
    wait_for("the migrated guest to print its digest", seconds(90), async || {
        let said = console.said();
        if said.contains(&format!("TINYGUEST-DATA {}", guest().payload)) { Ok(()) } else { Err(said) }
    })
    .await;
}

/// The VMs of all doubles bear the same addresses, and no two domains may.
pub static ADDRESS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_of_vcenter_becomes_a_running_domain() {
    let _alone = ADDRESS.lock().await;
    let fleet = fleet("migrate-vc", |_| {}).await;
    let double = Double::start(&fleet.scratch, Kind::Vcenter, &guest().raw).await;
    let account =
        json!({"provider": "vsphere", "name": "vc", "host": double.host, "username": USER, "password": double::PASSWORD, "insecure": true});
    fleet.client.post("/providers/connect", account).await.expect(201);
    let vm = Kind::Vcenter.vm();
    let source = fleet.client.get(&format!("/vms/vc/{vm}")).await.expect(200).body;
    let mac = source["nics"][0]["mac"].as_str().unwrap().to_owned();
    let name = new_name();
    let post = async |body: Value| fleet.client.post("/jobs", body).await;

    // What would not fit is refused before a byte is copied.
    let other = Kind::Vcenter.other();
    let others = fleet.client.get(&format!("/vms/vc/{other}")).await.expect(200).body["nics"][0]["mac"].as_str().unwrap().to_uppercase();
    for (vm, more, status, word) in [
        (other, json!({"target": {"mac": "keep"}}), 409, "running"),
        (other, json!({"target": {"mac": others}}), 409, "running"),
        (vm, json!({"target": {"name": "hypersdk-proof-1"}}), 400, "boot proof"),
        (vm, json!({"target": {"mac": "odd"}}), 400, "mac"),
        (vm, json!({"target": {"name": "a/b"}}), 400, "name"),
        (vm, json!({"target": {"target": "vc"}}), 422, "vsphere"),
        (vm, json!({"target": {"colour": "red"}}), 400, "colour"),
        (vm, json!({"boot_proof": {"timeout_seconds": 1}}), 400, "timeout_seconds"),
        (vm, json!({"adapt": "perhaps"}), 400, "auto"),
        (vm, json!({"include_snapshots": true}), 422, "include_snapshots"),
    ] {
        let answer = post(order("vc", vm, &name, more.clone())).await;
        assert!(answer.status == status && answer.text.contains(word), "{more}: {} {}", answer.status, answer.text);
    }
    let foreign = json!({"type": "export", "provider": "vc", "vm_name": vm, "format": "raw", "options": {"adapt": "never"}});
    assert!(post(foreign).await.refused(400, "bad_request").contains("migrate"));
    let nowhere = post(order("vc", vm, &name, json!({"target": {"network": "nowhere"}}))).await.expect(201).body;
    let failed = fleet.client.ended(nowhere["id"].as_str().unwrap(), seconds(30)).await;
    assert!(
        failed["status"] == "failed" && failed["error"].as_str().unwrap().contains("nowhere") && failed["bytes_done"] == 0,
        "{failed:#}"
    );

    let plan = post(order("vc", vm, &name, json!({"dry_run": true}))).await.expect(200).body;
    let stages: Vec<&str> = plan["steps"].as_array().unwrap().iter().map(|step| step["stage"].as_str().unwrap()).collect();
    assert_eq!(stages, ["preparing", "copying", "verifying", "deploying", "publishing"], "{plan:#}");

    // As a person does it.
    let home = fleet.scratch.dir("home");
    let login = ["login", &fleet.endpoints.rest, "--fingerprint", &fleet.endpoints.fingerprint];
    done(hypersdk(&home, &login, &[("HYPERSDK_PASSWORD", PASSWORD)]));
    let arguments = [
        "migrate",
        vm,
        "--to",
        "libvirt",
        "--name",
        &name,
        "--cpu",
        "1",
        "--memory",
        "256",
        "--network",
        "user",
        "--adapt",
        "never",
        "--sign",
        UP,
    ];
    let plan = done(hypersdk(&home, &[&arguments[..], &["--dry-run"]].concat(), &[]));
    println!("{plan}");
    assert!(plan.contains("deploying") && plan.lines().all(|line| line.chars().count() <= 80), "{plan}");
    let began = std::time::Instant::now();
    let (code, said, steps) = hypersdk(&home, &[&arguments[..], &["--watch"]].concat(), &[]);
    println!("{steps}\n{said}");
    assert_eq!(code, 0, "{said}\n{steps}");
    for word in ["receipt", "booted", "yes", "domain", &mac] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert!(steps.contains("boot proof passed") && steps.contains("publishing"), "{steps}");
    let id = steps.split(':').next().unwrap();
    let job = fleet.client.completed(id, seconds(10)).await;
    println!("migrated in {} s, boot proof {} s", began.elapsed().as_secs(), job["result"]["boot_proof"]["seconds"]);
    let result = &job["result"];
    let domain = Domain::adopt(&name, result["domain"]["uuid"].as_str().unwrap());
    let console = domain.console();
    assert_eq!(
        (&result["verified"], &result["adapted"]["status"], &result["boot_proof"]["passed"]),
        (&json!(true), &json!("off"), &json!(true))
    );
    assert_eq!((&result["domain"]["mac"], &result["domain"]["status"]), (&json!(mac), &json!("running")), "{result:#}");
    assert!(result["boot_proof"]["console_tail"].as_str().unwrap().contains(&guest().payload), "{result:#}");
    let picture = std::fs::read(result["boot_proof"]["screenshot"].as_str().unwrap()).unwrap();
    assert!(picture.starts_with(b"\x89PNG\r\n\x1a\n") && picture.len() > 200, "{} bytes", picture.len());
    boots(&console).await;

    // The receipt is signed, and says what left and what arrived.
    let receipt = std::fs::read(result["migration_receipt"].as_str().unwrap()).unwrap();
    let receipt: shared::manifest::Signed = serde_json::from_slice(&receipt).unwrap();
    assert!(receipt.is_good(), "{receipt:?}");
    let told: Value = serde_json::from_str(&receipt.manifest).unwrap();
    assert_eq!(
        (&told["job"], &told["source"]["name"], &told["source"]["consistency"]),
        (&json!(id), &json!(vm), &json!("off")),
        "{told:#}"
    );
    assert_eq!((&told["disks"], &told["target"]["domain"]["uuid"]), (&result["disks"], &result["domain"]["uuid"]));

    // The source is as it was; the proof has left nothing; what runs is not removed.
    assert_eq!(fleet.client.get(&format!("/vms/vc/{vm}")).await.expect(200).body["power_state"], "poweredOff");
    assert_eq!(double.left().await, (0, 0));
    assert!(left(&fleet, id).is_empty(), "{:?}", left(&fleet, id));
    wait_for("the new domain to be listed", seconds(10), async || {
        let answer = fleet.client.get(&format!("/vms/kvm/{name}")).await;
        if answer.status == 200 { Ok(()) } else { Err(answer.text) }
    })
    .await;
    assert!(fleet.client.delete(&format!("/exports/{id}")).await.refused(409, "conflict").contains(&name));
    assert!(post(order("vc", vm, &name, json!({}))).await.refused(409, "conflict").contains(&name));
    let base = double.disk(Kind::Vcenter, &fleet.scratch);

    // Nor where the controller does not know it any more; and without its VM it goes.
    fleet.client.delete("/providers/kvm").await.expect(204);
    assert!(fleet.client.delete(&format!("/exports/{id}")).await.refused(409, "conflict").contains(&name));
    drop(domain);
    identical(("raw", &base), ("qcow2", &file_of(&job, ".qcow2")));
    fleet.client.delete(&format!("/exports/{id}")).await.expect(204);
    assert!(!fleet.exports().join(id).exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_does_not_boot_is_not_handed_over_and_a_retry_copies_nothing_again() {
    let fleet = fleet("migrate-dead", |vms| {
        std::fs::File::create(vms.join("blank.raw")).unwrap().set_len(8 << 20).unwrap();
        link(&guest().raw, &vms.join("guest.raw"));
    })
    .await;
    let mut fleet = fleet;
    let name = new_name();
    let made = fleet.client.post("/jobs", order("local", "blank", &name, json!({}))).await.expect(201).body;
    let id = made["id"].as_str().unwrap().to_owned();
    let job = fleet.client.ended(&id, seconds(120)).await;
    assert_eq!((&job["status"], &job["error_code"]), (&json!("failed"), &json!("verification_failed")), "{job:#}");
    let error = job["error"].as_str().unwrap();
    assert!(error.contains("boot proof failed") && error.to_lowercase().contains("bootable"), "{error}");
    assert_eq!(job["result"]["boot_proof"]["passed"], false, "{job:#}");
    let log = fleet.client.log(&id).await;
    assert!(log.contains("the end of its console"), "{log}");
    assert!(!virsh(&["list", "--all", "--name"]).contains(&name));

    // A retry begins at the proof.
    fleet.client.post(&format!("/jobs/{id}/retry"), json!({})).await.expect(200);
    let again = fleet.client.ended(&id, seconds(120)).await;
    assert_eq!((&again["status"], &again["attempt"]), (&json!("failed"), &json!(2)), "{again:#}");
    assert!(fleet.client.log(&id).await.contains("copied and verified by an earlier attempt"));

    // Nobody wants to retry it.
    assert!(!left(&fleet, &id).is_empty());
    fleet.client.delete(&format!("/exports/{id}")).await.expect(204);
    assert!(left(&fleet, &id).is_empty(), "{:?}", left(&fleet, &id));
    assert!(fleet.client.delete(&format!("/exports/{id}")).await.refused(404, "not_found").contains("removed at"));

    // A proof that is waited for is cancelled at once.
    let waits = order("local", "blank", &name, json!({"boot_proof": {"sign": "never said"}, "target": {"memory_mb": 128}}));
    let waits = {
        let mut waits = waits;
        waits["vm_name"] = json!("guest");
        fleet.client.post("/jobs", waits).await.expect(201).body["id"].as_str().unwrap().to_owned()
    };
    said(&fleet, &waits, "is started (tcg)").await;
    let began = std::time::Instant::now();
    fleet.client.delete(&format!("/jobs/{waits}")).await.expect(202);
    assert_eq!(fleet.client.ended(&waits, seconds(15)).await["status"], "cancelled");
    println!("cancelled in {} ms", began.elapsed().as_millis());
    wait_for("nothing to be left", seconds(10), async || {
        let left = left(&fleet, &waits);
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;

    // kill -9 of the agent in the middle of a proof: the next attempt goes on from the sealed copy, and nothing is left of the first.
    let made = fleet.client.post("/jobs", order("local", "guest", &name, json!({}))).await.expect(201).body;
    let id = made["id"].as_str().unwrap().to_owned();
    said(&fleet, &id, "is started (tcg)").await;
    fleet.agents[0].kill();
    fleet.agents[0].start();
    let job = fleet.client.completed(&id, seconds(180)).await;
    let domain = Domain::adopt(&name, job["result"]["domain"]["uuid"].as_str().unwrap());
    assert!(job["attempt"].as_u64() >= Some(2) && fleet.client.log(&id).await.contains("copied and verified by an earlier attempt"));
    wait_for("nothing to be left", seconds(30), async || {
        let left = left(&fleet, &id);
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    boots(&domain.console()).await;
    let disk: PathBuf = file_of(&job, ".qcow2");
    drop(domain);
    identical(("raw", &guest().raw), ("qcow2", &disk));
}

/// A domain that runs and writes, with its disk's file.
pub fn running(fleet: &Fleet, name: &str) -> (Domain, PathBuf) {
    let disk = fleet.vms().join(format!("{name}.qcow2"));
    convert(("raw", writer()), ("qcow2", &disk), &[]);
    let domain = Domain::define(name, &disk, "qcow2");
    virsh(&["start", &domain.name]);
    (domain, disk)
}

/// What the guest says it has written last.
pub fn acknowledged(console: &libvirtd::Console) -> u64 {
    let said = console.said();
    let numbers = said.lines().filter_map(|line| line.trim().strip_prefix("TINYGUEST-WRITE ")?.parse().ok());
    numbers.max().unwrap_or(0)
}

pub async fn listed(fleet: &Fleet, vm: &str, state: &str) {
    wait_for(&format!("{vm} to be {state}"), seconds(15), async || {
        let answer = fleet.client.get(&format!("/vms/kvm/{vm}")).await;
        if answer.status == 200 && answer.body["power_state"] == state { Ok(()) } else { Err(answer.text) }
    })
    .await;
}

fn warm(vm: &str, name: &str, more: Value) -> Value {
    let mut body = order("kvm", vm, name, more);
    body["options"]["boot_proof"]["sign"] = json!("TINYGUEST-WRITE 2");
    if body["options"]["warm"].is_null() {
        body["options"]["warm"] = json!(true);
    }
    body
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_runs_is_copied_while_it_writes_and_is_away_for_seconds() {
    let mut fleet = fleet("migrate-warm", |_| {}).await;
    let (source, disk) = running(&fleet, "warm");
    let console = source.console();
    wait_for("the guest to write", seconds(60), async || if acknowledged(&console) > 1 { Ok(()) } else { Err(console.said()) }).await;
    listed(&fleet, &source.name, "poweredOn").await;
    let off = json!({"warm": {"max_downtime_seconds": 0}});
    fleet.client.post("/jobs", warm(&source.name, &new_name(), off)).await.refused(400, "bad_request");

    let mut raw = warm(&source.name, &new_name(), json!({}));
    raw["format"] = json!("raw");
    assert!(fleet.client.post("/jobs", raw).await.refused(422, "unprocessable").contains("qcow2"));

    // It is copied, and what it writes follows, until somebody says so; the new VM is not started, so that it can be compared.
    let name = new_name();
    let more = json!({"warm": {"cutover": "manual"}, "target": {"start": false}});
    let made = fleet.client.post("/jobs", warm(&source.name, &name, more)).await.expect(201).body;
    let id = made["id"].as_str().unwrap().to_owned();
    // What is acknowledged while it is rehearsed, and what is acknowledged between two passes.
    said(&fleet, &id, "is started (tcg)").await;
    source.write('a', 200 << 20, 3 << 20, 0x5a);
    said(&fleet, &id, "pass-1: ").await;
    source.write('a', (210 << 20) + 4096, 64 << 10, 0x77);
    fleet.client.post(&format!("/jobs/{id}/cutover"), json!({})).await.expect(202);
    let job = fleet.client.completed(&id, seconds(90)).await;
    let told = &job["result"]["warm"];
    println!("{told:#}");
    let passes = told["passes"].as_array().unwrap();
    assert!(passes[0]["kind"] == "full" && passes[1..].iter().all(|pass| pass["kind"] == "incremental"), "{told:#}");
    assert!(passes[1..].iter().all(|pass| pass["bytes_moved"] == pass["bytes_changed"]), "{told:#}");
    let changed = |passes: &[Value]| passes.iter().map(|pass| pass["bytes_changed"].as_u64().unwrap()).sum::<u64>();
    // Whole clusters of 64 KiB: the second write touches two.
    assert!(changed(&passes[1..2]) >= 3 << 20 && changed(&passes[2..]) >= 128 << 10, "{told:#}");
    assert!(told["downtime_seconds"].as_f64().is_some_and(|seconds| seconds < 5.0), "{told:#}");
    let target = Domain::adopt(&name, job["result"]["domain"]["uuid"].as_str().unwrap());
    listed(&fleet, &source.name, "poweredOff").await;
    assert_eq!((source.left(), target.left().0), ((false, Vec::new(), 0), false));
    let copy = PathBuf::from(job["result"]["domain"]["disk_path"].as_str().unwrap());
    identical(("qcow2", &disk), ("qcow2", &copy));
    // By the guest's own word: nothing that it was told is safe is missing.
    let raw = fleet.scratch.join("copy.raw");
    convert(("qcow2", &copy), ("raw", &raw), &[]);
    let (told, arrived) = (acknowledged(&console), written(&raw));
    println!("the guest said {told}, {arrived} arrived");
    assert!(arrived >= told && told > 2, "the guest said {told}, {arrived} arrived");
    drop(target);

    // The same by itself; and an agent that is killed while the VM is stopped lets it go on, and compares.
    virsh(&["start", &source.name]);
    listed(&fleet, &source.name, "poweredOn").await;
    let name = new_name();
    let made = fleet.client.post("/jobs", warm(&source.name, &name, json!({"target": {"start": false}}))).await.expect(201).body;
    let id = made["id"].as_str().unwrap().to_owned();
    let end = std::time::Instant::now() + seconds(60);
    while virsh(&["domstate", &source.name]).trim() != "paused" {
        assert!(std::time::Instant::now() < end, "{}", fleet.client.log(&id).await);
    }
    fleet.agents[0].kill();
    assert_eq!(virsh(&["domstate", &source.name]).trim(), "paused");
    fleet.agents[0].start();
    let job = fleet.client.completed(&id, seconds(120)).await;
    assert!(job["attempt"].as_u64() >= Some(2), "{job:#}");
    println!("killed while it was stopped, attempt {}: {:#}", job["attempt"], job["result"]["warm"]);
    let target = Domain::adopt(&name, job["result"]["domain"]["uuid"].as_str().unwrap());
    listed(&fleet, &source.name, "poweredOff").await;
    assert_eq!(source.left(), (false, Vec::new(), 0));
    let copy = PathBuf::from(job["result"]["domain"]["disk_path"].as_str().unwrap());
    identical(("qcow2", &disk), ("qcow2", &copy));
    drop(target);

    // Where the new VM cannot be made the old one goes on.
    virsh(&["start", &source.name]);
    listed(&fleet, &source.name, "poweredOn").await;
    let name = new_name();
    let more = json!({"warm": {"cutover": "manual"}, "target": {"bridge": "nobridge0", "network": null}});
    let made = fleet.client.post("/jobs", warm(&source.name, &name, more)).await.expect(201).body;
    let id = made["id"].as_str().unwrap().to_owned();
    said(&fleet, &id, "pass-1: ").await;
    // The word stands, whatever becomes of the agent that heard it.
    fleet.agents[0].kill();
    fleet.client.post(&format!("/jobs/{id}/cutover"), json!({})).await.expect(202);
    fleet.agents[0].start();
    let failed = fleet.client.ended(&id, seconds(120)).await;
    assert!(failed["status"] == "failed" && failed["error"].as_str().unwrap().contains("nobridge0"), "{failed:#}");
    wait_for("the source to go on", seconds(15), async || {
        let state = virsh(&["domstate", &source.name]);
        if state.trim() == "running" { Ok(()) } else { Err(state) }
    })
    .await;
    assert_eq!(source.left(), (false, Vec::new(), 0));
    assert!(!virsh(&["list", "--all", "--name"]).contains(&name));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_of_vcenter_that_runs_is_switched_off_only_for_the_last_pass() {
    let _alone = ADDRESS.lock().await;
    let fleet = fleet("migrate-vc-warm", |_| {}).await;
    let double = Double::start(&fleet.scratch, Kind::Vcenter, &guest().raw).await;
    let account =
        json!({"provider": "vsphere", "name": "vc", "host": double.host, "username": USER, "password": double::PASSWORD, "insecure": true});
    fleet.client.post("/providers/connect", account).await.expect(201);
    let vm = Kind::Vcenter.other();
    let flat = double.disk_of(Kind::Vcenter, vm, &fleet.scratch);
    let write = |offset: u64, length: usize, byte: u8| {
        let file = std::fs::OpenOptions::new().write(true).open(&flat).unwrap();
        file.write_all_at(&vec![byte; length], offset).unwrap();
    };
    let power = async || fleet.client.get(&format!("/vms/vc/{vm}")).await.expect(200).body["power_state"].clone();
    let mac = fleet.client.get(&format!("/vms/vc/{vm}")).await.expect(200).body["nics"][0]["mac"].clone();
    let begin = async |name: &str, target: Value| {
        let more = json!({"warm": {"cutover": "manual"}, "target": target});
        let made = fleet.client.post("/jobs", order("vc", vm, name, more)).await.expect(201).body;
        made["id"].as_str().unwrap().to_owned()
    };

    // Where the new VM cannot be made the old one is switched on again.
    let id = begin(&new_name(), json!({"bridge": "nobridge0", "network": null})).await;
    said(&fleet, &id, "pass-1: ").await;
    fleet.client.post(&format!("/jobs/{id}/cutover"), json!({})).await.expect(202);
    let failed = fleet.client.ended(&id, seconds(90)).await;
    assert!(failed["status"] == "failed" && failed["error"].as_str().unwrap().contains("nobridge0"), "{failed:#}");
    wait_for("the source to be on again", seconds(15), async || {
        let state = power().await;
        if state == "poweredOn" { Ok(()) } else { Err(state.to_string()) }
    })
    .await;

    let name = new_name();
    let id = begin(&name, json!({"start": false, "mac": "keep"})).await;
    said(&fleet, &id, "is started (tcg)").await;
    write(200 << 20, 3 << 20, 0x5a);
    said(&fleet, &id, "pass-1: ").await;
    write((210 << 20) + 4096, 64 << 10, 0x77);
    assert_eq!(power().await, "poweredOn");
    fleet.client.post(&format!("/jobs/{id}/cutover"), json!({})).await.expect(202);
    let job = fleet.client.completed(&id, seconds(90)).await;
    let told = &job["result"]["warm"];
    println!("{told:#}");
    let passes = told["passes"].as_array().unwrap();
    assert!(passes[0]["kind"] == "full" && passes[1..].iter().all(|pass| pass["kind"] == "incremental"), "{told:#}");
    let changed: u64 = passes[1..].iter().map(|pass| pass["bytes_changed"].as_u64().unwrap()).sum();
    assert_eq!(changed, (3 << 20) + (128 << 10), "{told:#}");
    assert!(passes[1..].iter().all(|pass| pass["bytes_moved"] == pass["bytes_changed"]), "{told:#}");
    let target = Domain::adopt(&name, job["result"]["domain"]["uuid"].as_str().unwrap());
    assert_eq!(job["result"]["domain"]["mac"], mac);
    assert_eq!(power().await, "poweredOff");
    wait_for("nothing to be left at the source", seconds(30), async || {
        let left = (double.left().await, double.tracked().await);
        if left == ((0, 0), 0) { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    let copy = PathBuf::from(job["result"]["domain"]["disk_path"].as_str().unwrap());
    identical(("raw", &flat), ("qcow2", &copy));
    // And as the API compares them, by content: the new VM's disk is a chain of passes.
    let vm = |provider: &str, name: &str| json!({"provider": provider, "vm_name": name});
    let ask = json!({"source": vm("vc", Kind::Vcenter.other()), "target": vm("kvm", &name), "content": true});
    wait_for("both to be compared", seconds(15), async || {
        let answer = fleet.client.post("/vms/compare", ask.clone()).await;
        if answer.status == 200 && answer.body["disks"][0]["content"] == "equal" { Ok(()) } else { Err(answer.text) }
    })
    .await;
    drop(target);
}
