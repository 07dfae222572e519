//! vSphere: vCenter and ESXi, as far as the double plays them, and what goes wrong in front of them.
//!
//! Owns: the promises about this provider. Never: knows a server that is not there: what real ones do differently is not seen here.
//! A crash here costs the test.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::boot::boot;
use crate::harness::client::{Answer, file_of};
use crate::harness::double::{self, Double, Kind, USER};
use crate::harness::faults::{Fault, Faults, Rule};
use crate::harness::fleet::{Fleet, Plan, ready};
use crate::harness::images::{check, guest, identical, pattern, untar};
use crate::harness::{binary, seconds, wait_for};

const MIB: u64 = 1 << 20;

/// A disk with data at its beginning, in its middle and at its end.
fn disk(path: &Path, capacity: u64) {
    pattern(path, capacity, &[(0, 3 * MIB), (capacity / 2, 5 * MIB), (capacity - MIB, MIB)], 7);
}

fn account(host: &str, more: Value) -> Value {
    let mut body = json!({"provider": "vsphere", "name": "vc", "host": host, "username": USER, "password": double::PASSWORD});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

async fn connect(fleet: &Fleet, body: Value) -> Answer {
    fleet.client.post("/providers/connect", body).await
}

/// The 64 hex digits of a sentence.
fn fingerprint_in(sentence: &str) -> String {
    let is_hex = |word: &&str| word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit());
    sentence.split(|c: char| !c.is_ascii_alphanumeric()).find(is_hex).unwrap_or_else(|| panic!("no fingerprint in: {sentence}")).to_owned()
}

async fn vm(fleet: &Fleet, name: &str) -> Value {
    let list = fleet.client.get(&format!("/vms/list?provider=vc&search={name}")).await.expect(200).body;
    list["data"].as_array().unwrap().iter().find(|vm| vm["name"] == name).unwrap_or_else(|| panic!("no {name} in {list:#}")).clone()
}

async fn export(fleet: &Fleet, name: &str, format: &str) -> Answer {
    fleet.client.post("/jobs", json!({"type": "export", "provider": "vc", "vm_name": name, "format": format})).await
}

async fn exported(fleet: &Fleet, name: &str, format: &str) -> Value {
    let made = export(fleet, name, format).await.expect(201).body;
    fleet.client.completed(made["id"].as_str().unwrap(), seconds(90)).await
}

fn qcow2_of(job: &Value) -> PathBuf {
    file_of(job, ".qcow2")
}

async fn whole_way(kind: Kind) {
    let mut fleet = Fleet::start(&format!("vsphere-{kind:?}"), Plan::plain(), |_| {}).await;
    let image = match kind {
        // A guest that boots.
        Kind::Vcenter => guest().raw.clone(),
        Kind::Esxi => fleet.scratch.join("disk.raw"),
    };
    if kind == Kind::Esxi {
        disk(&image, 48 * MIB);
    }
    let double = Double::start(&fleet.scratch, kind, &image).await;

    // What is wrong is told, and nothing is kept of it.
    let missing = connect(&fleet, json!({"provider": "vsphere", "host": double.host, "username": USER})).await.refused(400, "bad_request");
    assert!(missing.contains("`password`"), "{missing}");
    connect(&fleet, account("https://vc/sdk", json!({}))).await.refused(400, "bad_request");
    connect(&fleet, account(&double::free_address(), json!({}))).await.refused(502, "bad_gateway");
    let untrusted = connect(&fleet, account(&double.host, json!({}))).await.refused(422, "unprocessable");
    let fingerprint = fingerprint_in(&untrusted);
    let other = connect(&fleet, account(&double.host, json!({"fingerprint": "0".repeat(64)}))).await.refused(422, "unprocessable");
    assert_eq!(fingerprint_in(&other), fingerprint);
    let wrong = connect(&fleet, account(&double.host, json!({"fingerprint": fingerprint, "password": "nope"}))).await;
    let wrong = wrong.refused(422, "unprocessable");
    assert!(wrong.contains("user and password"), "{wrong}");
    connect(&fleet, account("169.254.169.254", json!({"insecure": true}))).await.refused(422, "unprocessable");
    assert_eq!(fleet.client.get("/providers?provider=vsphere").await.expect(200).body["pagination"]["total"], 0);

    let made = connect(&fleet, account(&double.host, json!({"fingerprint": fingerprint}))).await.expect(201);
    assert_eq!(
        (&made.body["host"], &made.body["username"], &made.body["status"]),
        (&json!(double.host), &json!(USER), &json!("connected"))
    );
    assert_eq!(made.body["fingerprint"], fingerprint.as_str());

    // The inventory.
    let off = vm(&fleet, kind.vm()).await;
    let datacenter = if kind == Kind::Vcenter { "DC0" } else { "ha-datacenter" };
    assert_eq!(off["path"], format!("/{datacenter}/vm/{}", kind.vm()), "{off:#}");
    assert_eq!(
        (&off["power_state"], &off["firmware"], &off["provider"]),
        (&json!("poweredOff"), &json!("bios"), &json!("vsphere")),
        "{off:#}"
    );
    assert_eq!((&off["disks"][0]["format"], &off["disks"][0]["thin_provisioned"]), (&json!("vmdk"), &json!(true)), "{off:#}");
    assert!(off["nics"][0]["type"] == "e1000" && off["nics"][0]["mac"].as_str().is_some_and(|mac| mac.len() == 17), "{off:#}");
    if kind == Kind::Vcenter {
        assert_eq!(off["nics"][0]["network"], "DC0_DVPG0", "a port group is called by its name: {off:#}");
    }
    let asked = json!({"provider": "vc", "vm_name": off["path"]});
    let browsed = fleet.client.post("/vms/browse", asked).await.expect(200).body;
    assert_eq!(browsed["id"], off["id"], "{browsed:#}");
    let inside = &browsed["inspection"];
    if kind == Kind::Vcenter {
        assert_eq!(inside["kernels"][0]["virtio_blk"], "initrd", "{browsed:#}");
    }
    println!("{kind:?}: looked inside in {} ms, {} KiB read", inside["took_ms"], inside["read_bytes"].as_u64().unwrap() >> 10);
    assert_eq!(double.left().await, (0, 0), "leases and snapshots after a look");
    assert_eq!(fleet.client.post("/providers/vc/test", json!({})).await.expect(200).body["ok"], true);
    let capable = fleet.client.get("/providers/capabilities").await.expect(200).body;
    let capable = capable["data"].as_array().unwrap().iter().find(|row| row["kind"] == "vsphere").unwrap().clone();
    assert_eq!((&capable["export"], &capable["hot_export"], &capable["connections"]), (&json!(true), &json!(true), &json!(["vc"])));

    // What is on is read from a temporary snapshot, of which nothing stays.
    let datastore = double.disk(kind, &fleet.scratch);
    let running = vm(&fleet, kind.other()).await;
    assert_eq!(running["power_state"], "poweredOn", "{running:#}");
    for format in ["qcow2", "vmdk"] {
        let job = exported(&fleet, kind.other(), format).await;
        let exported = file_of(&job, &format!(".{format}"));
        identical(("raw", &datastore), (format, &exported));
        assert_eq!(double.left().await, (0, 0), "leases and snapshots after {job:#}");
        if (kind, format) == (Kind::Vcenter, "qcow2") {
            boots(&exported, format, &fleet);
        }
    }
    double.power(running["id"].as_str().unwrap(), false).await;
    let switched = Instant::now();
    wait_for("the inventory to see it off", seconds(5), async || {
        let seen = vm(&fleet, kind.other()).await;
        if seen["power_state"] == "poweredOff" { Ok(()) } else { Err(seen["power_state"].to_string()) }
    })
    .await;
    println!("{kind:?}: a power change shows after {} ms", switched.elapsed().as_millis());

    // Byte for byte.
    let job = exported(&fleet, kind.vm(), "qcow2").await;
    assert_eq!(job["result"]["verified"], true, "{job:#}");
    identical(("raw", &datastore), ("qcow2", &qcow2_of(&job)));
    check("qcow2", &qcow2_of(&job));
    let job = exported(&fleet, kind.vm(), "ova").await;
    let unpacked = fleet.scratch.dir("unpacked");
    let members = untar(&file_of(&job, ".ova"), &unpacked);
    let vmdk = members.iter().find(|name| name.ends_with(".vmdk")).expect("a disk in the OVA");
    identical(("raw", &datastore), ("vmdk", &unpacked.join(vmdk)));
    if kind == Kind::Vcenter {
        boots(&unpacked.join(vmdk), "vmdk", &fleet);
    }

    // Over a snapshot that an operator took, which stays.
    double.snapshot(off["id"].as_str().unwrap(), "before the update").await;
    let job = exported(&fleet, kind.vm(), "qcow2").await;
    identical(("raw", &datastore), ("qcow2", &qcow2_of(&job)));
    assert_eq!(double.left().await, (0, 1), "the operator's snapshot is not ours");

    // Both sides may be killed: the account comes again with the next Welcome.
    fleet.controller.kill();
    fleet.agents[0].kill();
    fleet.controller.start();
    ready(&mut fleet.controller, &fleet.client).await;
    fleet.agents[0].start();
    let job = exported(&fleet, kind.vm(), "raw").await;
    identical(("raw", &datastore), ("raw", &file_of(&job, ".raw")));

    let changed =
        fleet.client.send(fleet.client.request(Method::PATCH, "/providers/vc").json(&json!({"host": double.host}))).await.unwrap();
    assert!(changed.refused(400, "bad_request").contains("password"));
    by_command(&fleet, &double, &fingerprint);
    canary(&fleet).await;
    fleet.client.delete("/providers/vc").await.expect(204);
}

/// The same by the command: the password comes from the environment, never from an argument.
fn by_command(fleet: &Fleet, double: &Double, fingerprint: &str) {
    let hypersdk = |arguments: &[&str]| {
        let mut command = std::process::Command::new(binary("hypersdk"));
        command.args(arguments).env("HYPERSDK_HOME", fleet.scratch.join("cli")).env("COLUMNS", "80");
        command.env("HYPERSDK_PASSWORD", crate::harness::fleet::PASSWORD).env("HYPERSDK_PROVIDER_PASSWORD", double::PASSWORD);
        crate::harness::process::run(&mut command)
    };
    hypersdk(&["login", &fleet.endpoints.rest, "--username", "admin", "--fingerprint", &fleet.endpoints.fingerprint]);
    let host = double.host.as_str();
    let connect =
        ["providers", "connect", "vsphere", "--name", "cli", "--host", host, "--username", USER, "--host-fingerprint", fingerprint];
    let shown = hypersdk(&connect);
    assert!(shown.contains("vsphere") && shown.contains(host) && shown.lines().all(|line| line.chars().count() <= 80), "{shown}");
    let tested: Value = serde_json::from_str(&hypersdk(&["providers", "test", "cli", "--output", "json"])).unwrap();
    assert!(tested["found"]["vms"].as_u64().is_some_and(|vms| vms > 1), "{tested}");
    hypersdk(&["providers", "remove", "cli"]);
}

fn boots(disk: &Path, format: &str, fleet: &Fleet) {
    let console = boot(disk, format, &fleet.scratch.join("console"));
    assert!(console.contains(&format!("TINYGUEST-DATA {}", guest().payload)), "{format}: {console}");
}

/// The password is in nothing that the product wrote or answers.
async fn canary(fleet: &Fleet) {
    let needles = [double::PASSWORD.to_owned(), double::PASSWORD.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")];
    let mut found = Vec::new();
    for path in ["/providers", "/providers/vc", "/audit?limit=200", "/jobs?limit=50", "/agents", "/system/health", "/metrics"] {
        let answer = fleet.client.get(path).await;
        found.extend(needles.iter().filter(|needle| answer.text.contains(*needle)).map(|_| path.to_owned()));
    }
    let mut folders = vec![fleet.scratch.join("controller"), fleet.scratch.join("agent-0")];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
                continue;
            }
            let bytes = std::fs::read(entry.path()).unwrap();
            files += 1;
            let holds = |needle: &String| bytes.windows(needle.len()).any(|window| window == needle.as_bytes());
            found.extend(needles.iter().filter(|needle| holds(needle)).map(|_| entry.path().display().to_string()));
        }
    }
    assert!(files > 5, "{files} files were looked at");
    assert!(found.is_empty(), "the password is in: {found:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vcenter_is_connected_listed_and_exported_from() {
    whole_way(Kind::Vcenter).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_esxi_host_is_connected_listed_and_exported_from() {
    whole_way(Kind::Esxi).await;
}

fn rule(matches: &'static str, after: usize, times: usize, fault: Fault) -> Rule {
    Rule { matches, after, times, fault }
}

/// What goes wrong for a moment costs time; what stays wrong fails the job with its cause; never is a short or wrong disk published.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_goes_wrong_on_the_way_is_borne_or_told() {
    let mut fleet = Fleet::start("vsphere-faults", Plan::plain(), |_| {}).await;
    fleet.agents[0].set("VSPHERE_STREAMS", "4");
    fleet.agents[0].process().terminate(seconds(30)).await;
    fleet.agents[0].start();
    wait_for("the agent to be back", seconds(30), async || {
        let answer = connect(&fleet, account("127.0.0.1:1", json!({}))).await;
        if answer.status == 502 { Ok(()) } else { Err(answer.text) }
    })
    .await;
    let image = fleet.scratch.join("disk.raw");
    disk(&image, 24 * MIB);
    let double = Double::start(&fleet.scratch, Kind::Vcenter, &image).await;
    let proxy = Faults::before(&double.host).await;

    // A host that takes the call and says nothing.
    proxy.script(vec![rule("RetrieveServiceContent", 0, usize::MAX, Fault::Hang(Duration::from_secs(90)))]);
    let began = Instant::now();
    let silent = connect(&fleet, account(&proxy.host, json!({"fingerprint": proxy.fingerprint}))).await.refused(502, "bad_gateway");
    assert!(began.elapsed() < seconds(30) && silent.contains("in time"), "{silent} after {:?}", began.elapsed());
    proxy.script(vec![]);
    connect(&fleet, account(&proxy.host, json!({"fingerprint": proxy.fingerprint}))).await.expect(201);

    let flat = "disk1-flat.vmdk";
    let borne = [
        ("a session that runs out under the copy", vec![rule(flat, 3, 4, Fault::Status(401, None))]),
        ("a session that runs out before it", vec![rule("RetrievePropertiesEx", 0, 1, Fault::Soap("NotAuthenticated"))]),
        ("503 with Retry-After", vec![rule(flat, 2, 3, Fault::Status(503, Some(1)))]),
        ("503 without", vec![rule(flat, 2, 3, Fault::Status(503, None))]),
        ("500", vec![rule(flat, 4, 2, Fault::Status(500, None))]),
        ("200 in place of 206", vec![rule(flat, 2, 2, Fault::Whole)]),
        ("another range", vec![rule(flat, 2, 2, Fault::OtherRange)]),
        ("cut bodies", vec![rule(flat, 2, 4, Fault::Cut(100_000))]),
        ("resets", vec![rule(flat, 2, 4, Fault::Reset)]),
        ("no ranges at all: then by a lease", vec![rule("/folder/", 0, usize::MAX, Fault::Status(401, None))]),
    ];
    let datastore = double.disk(Kind::Vcenter, &fleet.scratch);
    for (what, rules) in borne {
        proxy.script(rules);
        let job = exported(&fleet, Kind::Vcenter.vm(), "raw").await;
        assert!(proxy.met() > 0, "{what}: nothing went wrong");
        identical(("raw", &datastore), ("raw", &file_of(&job, ".raw")));
    }
    // A host is not brought down: so many requests at a time, whatever is copied.
    proxy.script(vec![rule(flat, 0, usize::MAX, Fault::Slow(Duration::from_millis(200)))]);
    let jobs = [export(&fleet, Kind::Vcenter.vm(), "raw").await, export(&fleet, Kind::Vcenter.vm(), "qcow2").await];
    for job in jobs {
        fleet.client.completed(job.expect(201).body["id"].as_str().unwrap(), seconds(60)).await;
    }
    // Two of the four turns may still be the host's, which has asked for patience.
    assert!((2..=4).contains(&proxy.peak()), "{} requests at a time of two jobs", proxy.peak());
    wait_for("the host's streams in /system/health", seconds(15), async || {
        let health = fleet.client.try_get("/system/health").await?;
        let sources = health["agents"]["sources"].as_array().cloned().unwrap_or_default();
        let shown = sources.iter().find(|source| source["host"] == *proxy.host).ok_or_else(|| format!("{sources:?}"))?;
        if shown["streams"] == 4 && shown["running"] == 0 { Ok(()) } else { Err(shown.to_string()) }
    })
    .await;
    let told = [
        ("206", vec![rule(flat, 2, usize::MAX, Fault::Whole)]),
        ("404", vec![rule(flat, 0, usize::MAX, Fault::Status(404, None)), rule("/fakenfc/", 0, usize::MAX, Fault::Status(404, None))]),
    ];
    for (cause, rules) in told {
        proxy.script(rules);
        let made = export(&fleet, Kind::Vcenter.vm(), "raw").await.expect(201).body;
        let id = made["id"].as_str().unwrap();
        // What may pass is tried again as a whole, so its cause stands in the log before the job has ended.
        wait_for(&format!("{id} to tell {cause:?}"), seconds(60), async || {
            let lines = fleet.client.log_lines(id).await?;
            let told = lines.iter().any(|line| line["level"] == "error" && line["message"].as_str().unwrap_or_default().contains(cause));
            if told { Ok(()) } else { Err(format!("{lines:?}")) }
        })
        .await;
        let answer = fleet.client.delete(&format!("/jobs/{id}")).await;
        assert!(matches!(answer.status, 202 | 409), "{}", answer.text);
        let job = fleet.client.ended(id, seconds(60)).await;
        assert_ne!(job["status"], "completed", "{cause}: {job:#}");
        assert!(!fleet.exports().join(id).exists(), "{cause}: something was published");
    }
}

/// Leases and their streams: what breaks is read again, what stays broken is told, and nothing is left at the source, not even by kill -9.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_export_leaves_nothing_behind_whatever_happens() {
    let mut fleet = Fleet::start("vsphere-hot", Plan::plain(), |_| {}).await;
    let image = fleet.scratch.join("disk.raw");
    disk(&image, 24 * MIB);
    let double = Double::start(&fleet.scratch, Kind::Vcenter, &image).await;
    let proxy = Faults::before(&double.host).await;
    connect(&fleet, account(&proxy.host, json!({"fingerprint": proxy.fingerprint}))).await.expect(201);
    let datastore = double.disk(Kind::Vcenter, &fleet.scratch);
    let running = Kind::Vcenter.other();

    let borne = [
        ("a stream that is cut twice", vec![rule("/fakenfc/", 0, 2, Fault::Cut(300_000))]),
        ("a stream that is reset", vec![rule("/fakenfc/", 0, 1, Fault::Reset)]),
        ("503 for a stream", vec![rule("/fakenfc/", 0, 2, Fault::Status(503, Some(1)))]),
        ("a snapshot's answer that is lost", vec![rule("CreateSnapshot_Task", 0, 1, Fault::Lost)]),
        ("a removal's answer that is lost", vec![rule("RemoveSnapshot_Task", 0, 1, Fault::Lost)]),
        ("a session that runs out while a task runs", vec![rule("info.state", 0, 1, Fault::Soap("NotAuthenticated"))]),
    ];
    for (what, rules) in borne {
        proxy.script(rules);
        let job = exported(&fleet, running, "raw").await;
        assert!(proxy.met() > 0, "{what}: nothing went wrong");
        identical(("raw", &datastore), ("raw", &file_of(&job, ".raw")));
        nothing_left(&double, what).await;
    }
    for (cause, rules) in [
        ("times", vec![rule("/fakenfc/", 0, usize::MAX, Fault::Cut(300_000))]),
        ("lease", vec![rule("ExportSnapshot", 0, usize::MAX, Fault::Soap("InvalidState"))]),
    ] {
        proxy.script(rules);
        let made = export(&fleet, running, "raw").await.expect(201).body;
        let id = made["id"].as_str().unwrap();
        wait_for(&format!("{id} to have failed once"), seconds(60), async || {
            let lines = fleet.client.log_lines(id).await?;
            if lines.iter().any(|line| line["level"] == "error") { Ok(()) } else { Err(format!("{lines:?}")) }
        })
        .await;
        fleet.client.delete(&format!("/jobs/{id}")).await;
        let job = fleet.client.ended(id, seconds(60)).await;
        assert_ne!(job["status"], "completed", "{cause}: {job:#}");
        nothing_left(&double, cause).await;
    }
    proxy.script(vec![]);

    // kill -9 in the middle: the next process undoes what the ledger names, and the job is done all the same.
    for round in 0..3 {
        let wish =
            json!({"type": "export", "provider": "vc", "vm_name": running, "format": "raw", "options": {"bandwidth_limit": 4 * MIB}});
        let id = fleet.client.create_job(wish).await;
        wait_for("a snapshot at the source", seconds(30), async || {
            let left = double.left().await;
            if left.1 == 1 && (round == 0 || left.0 == 1) { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
        fleet.agents[0].kill();
        assert_eq!(double.left().await.1, 1, "the kill met it");
        fleet.agents[0].start();
        let job = fleet.client.completed(&id, seconds(90)).await;
        identical(("raw", &datastore), ("raw", &file_of(&job, ".raw")));
        nothing_left(&double, "kill -9").await;
    }

    // Cancelled while the server says nothing: whoever waits for it stops waiting.
    proxy.script(vec![rule("/fakenfc/", 0, usize::MAX, Fault::Hang(Duration::from_secs(50)))]);
    let id = export(&fleet, running, "raw").await.expect(201).body["id"].as_str().unwrap().to_owned();
    fleet.client.in_stage(&id, &["copying"], seconds(30)).await;
    fleet.client.delete(&format!("/jobs/{id}")).await.expect(202);
    let asked = Instant::now();
    assert_eq!(fleet.client.ended(&id, seconds(30)).await["status"], "cancelled");
    assert!(asked.elapsed() < seconds(10), "cancelled after {:?}", asked.elapsed());
    proxy.script(vec![]);
    nothing_left(&double, "cancel before a byte").await;

    // Cancelled: the bytes stop, and the snapshot goes.
    let wish = json!({"type": "export", "provider": "vc", "vm_name": running, "format": "raw", "options": {"bandwidth_limit": 2 * MIB}});
    let id = fleet.client.create_job(wish).await;
    fleet.client.in_stage(&id, &["copying"], seconds(30)).await;
    fleet.client.delete(&format!("/jobs/{id}")).await.expect(202);
    assert_eq!(fleet.client.ended(&id, seconds(30)).await["status"], "cancelled");
    nothing_left(&double, "cancel").await;
}

/// What is undone is undone within moments: a lease after its job's end by a word of its own.
async fn nothing_left(double: &Double, what: &str) {
    wait_for(&format!("nothing to be left at the source: {what}"), seconds(60), async || {
        let left = double.left().await;
        if left == (0, 0) { Ok(()) } else { Err(format!("leases and snapshots: {left:?}")) }
    })
    .await;
}
