//! `quiesce` and `power_off`: what a copy of a VM that runs is like, and that the VM is afterwards as it was.
//!
//! Owns: the promises about these two options, on a real libvirt with a guest that freezes its file system, and on the vSphere double.
//! Never: stands for a guest that is not there. A crash here costs the test; domains go with it.

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::cli::{done, hypersdk};
use crate::harness::client::file_of;
use crate::harness::double::{self, Double, Kind, USER};
use crate::harness::fleet::{Fleet, PASSWORD};
use crate::harness::images::{agent, convert, guest, identical, is_at_rest, written};
use crate::harness::libvirtd::{Console, Domain, virsh};
use crate::harness::{seconds, wait_for};
use crate::migrate::{ADDRESS, acknowledged, fleet, listed, new_name, order, running, said};

fn export(provider: &str, vm: &str, options: Value) -> Value {
    json!({"type": "export", "provider": provider, "vm_name": vm, "format": "qcow2", "options": options})
}

async fn finding(fleet: &Fleet, provider: &str, vm: &str, check: &str) -> String {
    let checks = fleet.client.get(&format!("/readiness?provider={provider}&vm_name={vm}")).await.expect(200).body;
    let found = checks.as_array().unwrap().iter().find(|row| row["check"] == check);
    found.map_or_else(|| format!("no {check}"), |row| row["status"].as_str().unwrap().to_owned())
}

async fn tools(fleet: &Fleet, provider: &str, vm: &str, state: &str) {
    wait_for(&format!("the tools of {vm} to be {state}"), seconds(60), async || {
        let seen = fleet.client.get(&format!("/vms/{provider}/{vm}")).await.expect(200).body["guest_tools"].clone();
        if seen == state { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
}

async fn is_on(fleet: &Fleet, provider: &str, vm: &str, state: &str) {
    wait_for(&format!("{vm} to be {state}"), seconds(30), async || {
        let seen = fleet.client.get(&format!("/vms/{provider}/{vm}")).await.expect(200).body["power_state"].clone();
        if seen == state { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
}

/// The raw disk of a job's output.
fn raw_of(fleet: &Fleet, job: &Value) -> std::path::PathBuf {
    let raw = fleet.scratch.join(&format!("{}.raw", job["id"].as_str().unwrap()));
    convert(("qcow2", &file_of(job, ".qcow2")), ("raw", &raw), &[]);
    raw
}

async fn gone(double: &Double) {
    wait_for("nothing to be left at the double", seconds(30), async || {
        let left = double.left().await;
        if left == (0, 0) { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_of_vcenter_is_quiesced_by_its_tools_or_the_job_says_why_not() {
    let _alone = ADDRESS.lock().await;
    let fleet = fleet("consistency-vc", |_| {}).await;
    let double = Double::start(&fleet.scratch, Kind::Vcenter, &guest().raw).await;
    let account =
        json!({"provider": "vsphere", "name": "vc", "host": double.host, "username": USER, "password": double::PASSWORD, "insecure": true});
    fleet.client.post("/providers/connect", account).await.expect(201);
    let (off, vm) = (Kind::Vcenter.vm(), Kind::Vcenter.other());
    let post = async |body: Value| fleet.client.post("/jobs", body).await;
    let run = async |body: Value| {
        let id = fleet.client.create_job(body).await;
        fleet.client.ended(&id, seconds(90)).await
    };
    let quiesced = || export("vc", vm, json!({"quiesce": true}));

    // Without tools: told at the door.
    assert!(post(quiesced()).await.refused(422, "unprocessable").contains("VMware Tools"));
    assert!(post(export("vc", vm, json!({"power_off": true}))).await.refused(422, "unprocessable").contains("shut it down yourself"));
    assert_eq!(finding(&fleet, "vc", vm, "quiesce").await, "warn");
    assert_eq!(finding(&fleet, "vc", off, "quiesce").await, "no quiesce");
    assert_eq!(run(export("vc", vm, json!({}))).await["result"]["consistency"], "crash-consistent");
    assert_eq!(double.tools("").await, 0);

    double.tools(&format!("vm={vm}&running=true")).await;
    tools(&fleet, "vc", vm, "running").await;
    assert_eq!(finding(&fleet, "vc", vm, "quiesce").await, "pass");
    let job = run(quiesced()).await;
    assert_eq!((&job["status"], &job["result"]["consistency"]), (&json!("completed"), &json!("application-consistent")), "{job:#}");
    let backup = run(json!({"type": "backup", "provider": "vc", "vm_name": vm, "options": {"quiesce": true}})).await;
    assert_eq!(backup["result"]["consistency"], "application-consistent", "{backup:#}");
    assert_eq!(double.tools("").await, 2);
    let idle = run(export("vc", off, json!({"quiesce": true, "power_off": true}))).await;
    assert_eq!((&idle["result"]["consistency"], double.tools("").await), (&json!("off"), 2), "{idle:#}");
    assert!(fleet.client.log(idle["id"].as_str().unwrap()).await.contains("quiesce does nothing here"));

    // What the server refuses is the job's failure, and so is what it would do without: never crash-consistent silently.
    double.tools("refuse=true").await;
    let refused = run(quiesced()).await;
    double.tools("refuse=false").await;
    let error = refused["error"].as_str().unwrap();
    assert!(
        refused["status"] == "failed" && error.contains("ApplicationQuiesceFault") && error.contains("crash-consistent copy"),
        "{error}"
    );
    let soon = shared::clock::rfc3339(shared::clock::now() + seconds(3));
    let later = fleet.client.create_job(export("vc", vm, json!({"quiesce": true, "not_before": soon}))).await;
    double.tools(&format!("vm={vm}&running=false")).await;
    let late = fleet.client.ended(&later, seconds(60)).await;
    assert!(late["status"] == "failed" && late["error"].as_str().unwrap().contains("VMware Tools do not run"), "{late:#}");
    gone(&double).await;

    // Shut down by its tools, read as it lies there, and on again.
    double.tools(&format!("vm={vm}&running=true")).await;
    tools(&fleet, "vc", vm, "running").await;
    let job = run(export("vc", vm, json!({"power_off": true}))).await;
    assert_eq!((&job["status"], &job["result"]["consistency"]), (&json!("completed"), &json!("off")), "{job:#}");
    let log = fleet.client.log(job["id"].as_str().unwrap()).await;
    assert!(log.contains("is asked to shut down") && log.contains("is off after") && log.contains("by ranges"), "{log}");
    is_on(&fleet, "vc", vm, "poweredOn").await;

    // A migration leaves it off, and its address goes along; one whose new VM does not boot switches it on again.
    let warm = order("vc", vm, &new_name(), json!({"power_off": true, "warm": true}));
    assert!(post(warm).await.refused(422, "unprocessable").contains("power_off"));
    assert!(post(order("vc", vm, &new_name(), json!({"target": {"mac": "keep"}}))).await.refused(409, "conflict").contains("running"));
    let name = new_name();
    let more = json!({"power_off": true, "target": {"mac": "keep"}, "boot_proof": {"sign": "never said", "timeout_seconds": 10}});
    let failed = run(order("vc", vm, &name, more)).await;
    assert!(failed["error_code"] == "verification_failed" && failed["error"].as_str().unwrap().contains("switched on again"), "{failed:#}");
    is_on(&fleet, "vc", vm, "poweredOn").await;
    assert!(!virsh(&["list", "--all", "--name"]).contains(&name));

    let plan = post(order("vc", vm, &name, json!({"power_off": true, "dry_run": true}))).await.expect(200).body;
    assert!(plan["steps"][0]["does"].as_str().unwrap().contains("shut down"), "{plan:#}");
    let home = fleet.scratch.dir("home");
    let login = ["login", &fleet.endpoints.rest, "--fingerprint", &fleet.endpoints.fingerprint];
    done(hypersdk(&home, &login, &[("HYPERSDK_PASSWORD", PASSWORD)]));
    let arguments = ["migrate", vm, "--name", &name, "--cpu", "1", "--memory", "256", "--network", "user", "--adapt", "never"];
    let more = ["--sign", "TINYGUEST-LOGIN ready", "--mac", "keep", "--power-off", "--no-start"];
    let shown = done(hypersdk(&home, &[&arguments[..], &more].concat(), &[]));
    println!("{shown}");
    let jobs = fleet.client.get("/jobs?type=migrate&status=completed").await.expect(200).body;
    let job = &jobs["data"][0];
    let domain = Domain::adopt(&name, job["result"]["domain"]["uuid"].as_str().unwrap());
    let mac = fleet.client.get(&format!("/vms/vc/{vm}")).await.expect(200).body["nics"][0]["mac"].clone();
    assert_eq!((&job["result"]["domain"]["mac"], &job["result"]["consistency"]), (&mac, &json!("off")), "{job:#}");
    is_on(&fleet, "vc", vm, "poweredOff").await;
    let receipt = std::fs::read(job["result"]["migration_receipt"].as_str().unwrap()).unwrap();
    let receipt: shared::manifest::Signed = serde_json::from_slice(&receipt).unwrap();
    let told: Value = serde_json::from_str(&receipt.manifest).unwrap();
    assert_eq!(told["source"]["consistency"], "off", "{told:#}");
    identical(("raw", &double.disk_of(Kind::Vcenter, vm, &fleet.scratch)), ("qcow2", &file_of(job, ".qcow2")));
    drop(domain);
    gone(&double).await;
}

/// A domain whose guest writes and has an agent.
async fn calmable(fleet: &Fleet, name: &str) -> (Domain, std::path::PathBuf, Console) {
    let disk = fleet.vms().join(format!("{name}.qcow2"));
    convert(("raw", agent()), ("qcow2", &disk), &[]);
    let domain = Domain::with_agent(name, &disk, "qcow2");
    virsh(&["start", &domain.name]);
    let console = domain.console();
    writes_on(&console).await;
    tools(fleet, "kvm", &domain.name, "running").await;
    (domain, disk, console)
}

/// Waits until the guest says that it has written what it had not before.
async fn writes_on(console: &Console) {
    let before = acknowledged(console);
    wait_for("the guest to write on", seconds(60), async || if acknowledged(console) > before + 1 { Ok(()) } else { Err(console.said()) })
        .await;
}

fn mode(domain: &Domain, mode: &str) {
    virsh(&["qemu-agent-command", &domain.name, &format!("{{\"execute\":\"test-mode\",\"arguments\":{{\"mode\":\"{mode}\"}}}}")]);
}

fn count(console: &Console, what: &str) -> usize {
    console.said().matches(what).count()
}

async fn heard(console: &Console, what: &str, times: usize) {
    wait_for(
        &format!("the guest to say {what}"),
        seconds(60),
        async || {
            if count(console, what) >= times { Ok(()) } else { Err(console.said()) }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_is_frozen_for_a_moment_and_never_stays_so() {
    let mut fleet = fleet("consistency-kvm", |_| {}).await;
    let (vm, _disk, console) = calmable(&fleet, "calm").await;
    let name = vm.name.clone();
    assert_eq!(finding(&fleet, "kvm", &name, "quiesce").await, "pass");
    let quiesced = || export("kvm", &name, json!({"quiesce": true}));

    // One without an agent is told of at the door.
    let (mute, _) = running(&fleet, "mute");
    listed(&fleet, &mute.name, "poweredOn").await;
    let said_no = fleet.client.post("/jobs", export("kvm", &mute.name, json!({"quiesce": true}))).await.refused(422, "unprocessable");
    assert!(said_no.contains("qemu-guest-agent"), "{said_no}");
    assert_eq!(finding(&fleet, "kvm", &mute.name, "quiesce").await, "warn");
    drop(mute);

    // As it is, its journal has to be replayed; quiesced it is at rest. What was acknowledged before is in both.
    let mut states = Vec::new();
    for (options, state, rests) in [(json!({}), "crash-consistent", false), (json!({"quiesce": true}), "application-consistent", true)] {
        let told = acknowledged(&console);
        let id = fleet.client.create_job(export("kvm", &name, options)).await;
        let job = fleet.client.completed(&id, seconds(90)).await;
        assert_eq!(job["result"]["consistency"], state, "{job:#}");
        let raw = raw_of(&fleet, &job);
        assert_eq!(is_at_rest(&raw), rests, "{state}: {}", fleet.client.log(&id).await);
        let arrived = written(&raw);
        assert!(arrived >= told, "{told} were told, {arrived} arrived");
        states.push((state, arrived));
        writes_on(&console).await;
    }
    println!("{states:?}");
    assert_eq!((count(&console, "TINYGUEST-FROZEN"), count(&console, "TINYGUEST-THAWED 1")), (1, 1));
    let backup = json!({"type": "backup", "provider": "kvm", "vm_name": name, "options": {"quiesce": true}});
    let backup = fleet.client.create_job(backup).await;
    assert_eq!(fleet.client.completed(&backup, seconds(90)).await["result"]["consistency"], "application-consistent");
    heard(&console, "TINYGUEST-THAWED 1", 2).await;

    // A guest that does not freeze, and one that thaws too early: failures that say so.
    for (how, word) in [("refuse", "does not freeze"), ("thaw", "thawed by itself")] {
        mode(&vm, how);
        let id = fleet.client.create_job(quiesced()).await;
        let job = fleet.client.ended(&id, seconds(60)).await;
        let error = job["error"].as_str().unwrap();
        assert!(job["status"] == "failed" && error.contains(word) && error.contains("crash-consistent copy"), "{error}");
        writes_on(&console).await;
        let (is_reading, files, _) = vm.left();
        assert!(!is_reading && files.is_empty(), "{how}: {files:?}");
    }

    // kill -9 while it is frozen: the next agent thaws it, before anything else, and the job goes on.
    mode(&vm, "slow");
    let (frozen, thawed) = (count(&console, "TINYGUEST-FROZEN"), count(&console, "TINYGUEST-THAWED 1"));
    let id = fleet.client.create_job(quiesced()).await;
    heard(&console, "TINYGUEST-FROZEN", frozen + 1).await;
    fleet.agents[0].kill();
    let killed = Instant::now();
    assert_eq!(count(&console, "TINYGUEST-THAWED 1"), thawed);
    fleet.agents[0].start();
    heard(&console, "TINYGUEST-THAWED 1", thawed + 1).await;
    println!(
        "killed while the guest was frozen: thawed after {:.1} s, of which it took 6 to say that it was",
        killed.elapsed().as_secs_f64()
    );
    let thawed_after = killed.elapsed();
    let woken = "a guest that was left frozen is thawed";
    wait_for("the agent to say so", seconds(10), async || {
        let log = fleet.agents[0].process().log();
        if log.contains(woken) { Ok(()) } else { Err(log) }
    })
    .await;
    assert!(thawed_after < seconds(20), "{thawed_after:?}");
    let job = fleet.client.completed(&id, seconds(120)).await;
    assert!(job["attempt"].as_u64() >= Some(2) && job["result"]["consistency"] == "application-consistent", "{job:#}");
    assert!(is_at_rest(&raw_of(&fleet, &job)));
    mode(&vm, "plain");
    writes_on(&console).await;

    // Frozen, then stopped between two instructions: the last pass of a warm migration is at rest as well.
    let moved = new_name();
    let proof = json!({"sign": "TINYGUEST-WRITE 2", "timeout_seconds": 120});
    let wanted = order("kvm", &name, &moved, json!({"quiesce": true, "warm": true, "target": {"start": false}, "boot_proof": proof}));
    let id = fleet.client.create_job(wanted).await;
    let job = fleet.client.completed(&id, seconds(180)).await;
    let target = Domain::adopt(&moved, job["result"]["domain"]["uuid"].as_str().unwrap());
    assert_eq!(job["result"]["consistency"], "application-consistent", "{job:#}");
    let raw = fleet.scratch.join("warm.raw");
    convert(("qcow2", Path::new(job["result"]["domain"]["disk_path"].as_str().unwrap())), ("raw", &raw), &[]);
    assert!(is_at_rest(&raw));
    drop(target);
    // Where it is not to be made the old one goes on, thawed.
    listed(&fleet, &name, "poweredOff").await;
    virsh(&["start", &name]);
    let console = vm.console();
    writes_on(&console).await;
    tools(&fleet, "kvm", &name, "running").await;
    let lost = json!({"quiesce": true, "warm": {"cutover": "manual"}, "target": {"bridge": "nobridge0", "network": null}});
    let mut lost = order("kvm", &name, &new_name(), lost);
    lost["options"]["boot_proof"]["sign"] = json!("TINYGUEST-WRITE 2");
    let id = fleet.client.create_job(lost).await;
    said(&fleet, &id, "pass-1: ").await;
    fleet.client.post(&format!("/jobs/{id}/cutover"), json!({})).await.expect(202);
    assert_eq!(fleet.client.ended(&id, seconds(60)).await["status"], "failed");
    writes_on(&console).await;
    assert_eq!(vm.left().1, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_is_shut_down_for_a_job_is_on_again_afterwards() {
    let mut fleet = fleet("power-off", |_| {}).await;
    let (vm, _disk, console) = calmable(&fleet, "off").await;
    let name = vm.name.clone();
    let state = || virsh(&["domstate", &name]).trim().to_owned();
    let runs = async || {
        wait_for("the VM to run again", seconds(40), async || if state() == "running" { Ok(()) } else { Err(state()) }).await;
    };
    let wanted = |more: Value| {
        let mut options = json!({"power_off": true});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        export("kvm", &name, options)
    };

    // A guest that does not react is not switched off hard (looked at in the end).
    let (deaf, _) = running(&fleet, "deaf");
    listed(&fleet, &deaf.name, "poweredOn").await;
    let in_vain = fleet.client.create_job(export("kvm", &deaf.name, json!({"power_off": true}))).await;

    // Given up while it shuts down: it does so, and is switched on again.
    let number = virsh(&["domid", &name]);
    let id = fleet.client.create_job(wanted(json!({}))).await;
    heard(&console, "TINYGUEST-SHUTDOWN", 1).await;
    fleet.client.delete(&format!("/jobs/{id}")).await.expect(202);
    assert_eq!(fleet.client.ended(&id, seconds(20)).await["status"], "cancelled");
    wait_for("the VM to be off and on again", seconds(40), async || {
        let now = (virsh(&["domid", &name]), state());
        if now.0 != number && now.1 == "running" { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
    let console = vm.console();
    writes_on(&console).await;
    tools(&fleet, "kvm", &name, "running").await;

    // Off, read, on again; what it has written last is there.
    let told = acknowledged(&console);
    let began = Instant::now();
    let id = fleet.client.create_job(wanted(json!({}))).await;
    wait_for("the guest to shut down", seconds(60), async || {
        let log = fleet.client.log(&id).await;
        if log.contains("is off after") { Ok(()) } else { Err(format!("{log}\n{}", console.said())) }
    })
    .await;
    let job = fleet.client.completed(&id, seconds(90)).await;
    println!("shut down, exported and on again in {:.1} s", began.elapsed().as_secs_f64());
    assert_eq!((&job["result"]["consistency"], state().as_str()), (&json!("off"), "running"), "{job:#}");
    let raw = raw_of(&fleet, &job);
    assert!(is_at_rest(&raw) && written(&raw) >= told);

    // kill -9 of the agent while it is off: it is not lost, and the job goes on.
    let console = vm.console();
    writes_on(&console).await;
    tools(&fleet, "kvm", &name, "running").await;
    let id = fleet.client.create_job(wanted(json!({"bandwidth_limit": 4 << 20}))).await;
    wait_for("the VM to be off", seconds(60), async || if state() == "shut off" { Ok(()) } else { Err(state()) }).await;
    said(&fleet, &id, "is off after").await;
    fleet.agents[0].kill();
    assert_eq!(state(), "shut off");
    let killed = Instant::now();
    fleet.agents[0].start();
    runs().await;
    println!("killed while the VM was off: on again after {:.1} s", killed.elapsed().as_secs_f64());
    let job = fleet.client.completed(&id, seconds(180)).await;
    assert!(job["attempt"].as_u64() >= Some(2) && job["result"]["consistency"] == "off", "{job:#}");
    runs().await;

    let job = fleet.client.ended(&in_vain, seconds(150)).await;
    assert!(job["status"] == "failed" && job["error"].as_str().unwrap().contains("not switched off hard"), "{job:#}");
    assert_eq!(virsh(&["domstate", &deaf.name]).trim(), "running");
}
