//! Backups: restore points of a VM while its disk changes, and what becomes of them.
//!
//! Owns: that a point is the disk as it was, whatever happened to the tracking of changes, to the agent or to the points beneath.
//! Never: knows a server that is not there: what real ones do differently is not seen here. A crash here costs the test.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::client::file_of;
use crate::harness::double::{self, Double, Kind, USER};
use crate::harness::faults::{Fault, Faults, Rule};
use crate::harness::fleet::{Fleet, Plan};
use crate::harness::images::{identical, pattern, untar};
use crate::harness::{binary, seconds, wait_for};

const MIB: u64 = 1 << 20;
const KIB: u64 = 1 << 10;
/// What the double tracks: its areas are whole blocks of this size.
const GRAIN: u64 = 64 * KIB;
const CAPACITY: u64 = 48 * MIB;

/// A VM whose disk changes, and copies of what it was.
struct Source {
    fleet: Fleet,
    double: Double,
    vm: &'static str,
    id: String,
    flat: PathBuf,
}

impl Source {
    async fn start(name: &str, kind: Kind) -> Self {
        let fleet = Fleet::start(name, Plan::plain(), |_| {}).await;
        let image = fleet.scratch.join("disk.raw");
        pattern(&image, CAPACITY, &[(0, 3 * MIB), (CAPACITY / 2, 5 * MIB), (CAPACITY - MIB, MIB)], 7);
        let double = Double::start(&fleet.scratch, kind, &image).await;
        let vm = kind.other();
        let flat = double.disk_of(kind, vm, &fleet.scratch);
        Self { fleet, double, vm, id: String::new(), flat }
    }

    async fn connect(&mut self, host: &str, fingerprint: Option<&str>) {
        let mut body = json!({"provider": "vsphere", "name": "vc", "host": host, "username": USER, "password": double::PASSWORD});
        match fingerprint {
            Some(fingerprint) => body["fingerprint"] = fingerprint.into(),
            None => body["insecure"] = true.into(),
        }
        self.fleet.client.post("/providers/connect", body).await.expect(201);
        let list = self.fleet.client.get(&format!("/vms/list?provider=vc&search={}", self.vm)).await.expect(200).body;
        self.id = list["data"][0]["id"].as_str().unwrap().to_owned();
    }

    /// The guest writes: bytes of `value`, or zeros.
    fn write(&self, areas: &[(u64, u64, u8)]) {
        let file = std::fs::OpenOptions::new().write(true).open(&self.flat).unwrap();
        for (offset, len, value) in areas {
            let bytes: Vec<u8> = (0..*len).map(|i| if *value == 0 { 0 } else { value.wrapping_add((i % 251) as u8) }).collect();
            file.write_all_at(&bytes, *offset).unwrap();
        }
    }

    /// The disk as it is now, to compare with later.
    fn keep(&self, name: &str) -> PathBuf {
        let kept = self.fleet.scratch.join(name);
        std::fs::copy(&self.flat, &kept).unwrap();
        kept
    }

    async fn begin(&self, options: Value) -> String {
        self.fleet.client.create_job(json!({"type": "backup", "provider": "vc", "vm_name": self.vm, "options": options})).await
    }

    async fn backup(&self, options: Value) -> Value {
        let id = self.begin(options).await;
        let job = self.fleet.client.completed(&id, seconds(90)).await;
        assert_eq!(job["result"]["verified"], true, "{job:#}");
        job
    }

    async fn convert(&self, point: &Value, format: &str) -> Value {
        let wish = json!({"type": "convert", "source": point["result"]["restore_point"]["path"], "format": format});
        let id = self.fleet.client.create_job(wish).await;
        self.fleet.client.completed(&id, seconds(90)).await
    }

    /// The point, whole again, equals what the disk was: by our reader, and by QEMU's over the chain as it lies there.
    async fn holds(&self, point: &Value, kept: &Path) {
        let whole = self.convert(point, "raw").await;
        identical(("raw", kept), ("raw", &file_of(&whole, ".raw")));
        identical(("raw", kept), ("qcow2", &file_of(point, ".qcow2")));
    }

    async fn nothing_left(&self, what: &str) {
        wait_for(&format!("nothing to be left at the source: {what}"), seconds(60), async || {
            let left = self.double.left().await;
            if left == (0, 0) { Ok(()) } else { Err(format!("leases and snapshots: {left:?}")) }
        })
        .await;
    }
}

fn of(point: &Value, field: &str) -> Value {
    point["result"]["restore_point"][field].clone()
}

/// Bytes of the grains that two images do not share.
fn differing(a: Option<&Path>, b: &Path) -> u64 {
    let old = a.map(|path| std::fs::read(path).unwrap());
    let new = std::fs::read(b).unwrap();
    let zeros = vec![0; GRAIN as usize];
    let grain = |n: usize, grain: &[u8]| match &old {
        Some(old) => old[n * GRAIN as usize..][..grain.len()] != *grain,
        None => grain != &zeros[..grain.len()],
    };
    new.chunks(GRAIN as usize).enumerate().filter(|(n, bytes)| grain(*n, bytes)).map(|(_, bytes)| bytes.len() as u64).sum()
}

async fn chain(kind: Kind) {
    let mut source = Source::start(&format!("backup-{kind:?}"), kind).await;
    let host = source.double.host.clone();
    source.connect(&host, None).await;
    let client = &source.fleet.client;

    // What is no restore point is told before a job is made.
    let wish = |more: Value| {
        let mut wish = json!({"type": "backup", "provider": "vc", "vm_name": source.vm});
        wish.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        wish
    };
    let other = client.post("/jobs", wish(json!({"format": "ova"}))).await.refused(422, "unprocessable");
    assert!(other.contains("qcow2") && other.contains("convert"), "{other}");
    client.post("/jobs", wish(json!({"options": {"compress": false}}))).await.refused(422, "unprocessable");
    client
        .post("/jobs", json!({"type": "export", "provider": "vc", "vm_name": source.vm, "format": "raw", "options": {"full": true}}))
        .await
        .refused(400, "bad_request");
    let plan = client.post("/jobs", wish(json!({"options": {"dry_run": true}}))).await.expect(200).body;
    assert!(plan["steps"][1]["does"].as_str().unwrap().contains("changed since"), "{plan:#}");

    // All of it, then what changed, twice; the server is asked for that and for nothing else.
    assert_eq!(source.double.tracked().await, 0);
    let mut points = Vec::new();
    let changes: [&[(u64, u64, u8)]; 3] = [
        &[],
        // In the middle of data, at its edge, where nothing was, and to zeros.
        &[(512, 512, 9), (3 * MIB - 100, 200 * KIB, 5), (10 * MIB, 64 * KIB, 3), (CAPACITY / 2, 2 * MIB, 0)],
        &[(10 * MIB + 5, 1, 200), (CAPACITY - 512, 512, 77), (CAPACITY / 2 + MIB, 3 * MIB, 8)],
    ];
    for (n, areas) in changes.into_iter().enumerate() {
        source.write(areas);
        let kept = source.keep(&format!("kept-{n}"));
        source.double.moved().await;
        let point = source.backup(json!({})).await;
        let expected = differing(points.last().map(|(_, kept): &(Value, PathBuf)| kept.as_path()), &kept);
        // One byte of each file is asked for to learn its size.
        let moved = source.double.moved().await;
        assert_eq!((of(&point, "bytes_moved"), moved - 1), (json!(expected), expected), "point {n}: {point:#}");
        let (word, changed) = if n == 0 { ("full", Value::Null) } else { ("incremental", json!(expected)) };
        assert_eq!((of(&point, "kind"), of(&point, "bytes_changed"), of(&point, "layers")), (json!(word), changed, json!(n)), "{point:#}");
        let parent = points.last().map_or(Value::Null, |(point, _)| point["id"].clone());
        assert_eq!(of(&point, "parent"), parent, "{point:#}");
        println!("{kind:?}: point {n}: {expected} bytes changed, {moved} came, the file has {}", point["result"]["files"][0]["size"]);
        assert_eq!(source.double.left().await, (0, 0), "after {point:#}");
        points.push((point, kept));
    }
    assert_eq!(source.double.tracked().await, 1, "the restore points rely on it");
    for (point, kept) in &points {
        source.holds(point, kept).await;
    }
    let (last, kept) = &points[2];
    let package = source.convert(last, "ova").await;
    let unpacked = source.fleet.scratch.dir("unpacked");
    let members = untar(&file_of(&package, ".ova"), &unpacked);
    identical(("raw", kept), ("vmdk", &unpacked.join(members.iter().find(|name| name.ends_with(".vmdk")).unwrap())));
    let description = std::fs::read_to_string(unpacked.join(members.iter().find(|name| name.ends_with(".ovf")).unwrap())).unwrap();
    assert!(description.contains(source.vm), "the VM as it was: {description}");

    // What lies beneath stays as long as something lies over it.
    let first = points[0].0["id"].as_str().unwrap();
    let second = points[1].0["id"].as_str().unwrap();
    let refused = client.delete(&format!("/exports/{first}")).await.refused(409, "conflict");
    assert!(refused.contains(second), "{refused}");
    let fourth = by_command(&source, second, &points[1].1, kept);

    // `full` begins anew; the older chain may go then, from its top.
    let anew = source.backup(json!({"full": true, "compression": "zstd"})).await;
    assert_eq!((of(&anew, "kind"), of(&anew, "parent")), (json!("full"), Value::Null), "{anew:#}");
    source.holds(&anew, kept).await;
    for point in std::iter::once(fourth.as_str()).chain(points.iter().rev().map(|(point, _)| point["id"].as_str().unwrap())) {
        client.delete(&format!("/exports/{point}")).await.expect(204);
    }
    source.holds(&anew, kept).await;
}

/// Made, listed, restored and checked by the command. Answers the point that was made.
fn by_command(source: &Source, point: &str, kept: &Path, newest: &Path) -> String {
    let hypersdk = |arguments: &[&str]| {
        let mut command = std::process::Command::new(binary("hypersdk"));
        command.args(arguments).env("HYPERSDK_HOME", source.fleet.scratch.join("cli")).env("COLUMNS", "80");
        command.env("HYPERSDK_PASSWORD", crate::harness::fleet::PASSWORD);
        crate::harness::process::run(&mut command)
    };
    hypersdk(&["login", &source.fleet.endpoints.rest, "--username", "admin", "--fingerprint", &source.fleet.endpoints.fingerprint]);
    let made: Value = serde_json::from_str(&hypersdk(&["backup", source.vm, "--output", "json"])).unwrap();
    assert_eq!((of(&made, "kind"), of(&made, "bytes_moved")), (json!("incremental"), json!(0)), "nothing has changed: {made:#}");
    let list = hypersdk(&["restore", "--list", source.vm]);
    assert!(list.contains(point) && list.contains("incremental") && list.lines().all(|line| line.chars().count() <= 80), "{list}");
    let whole: Value = serde_json::from_str(&hypersdk(&["restore", point, "--format", "raw", "--output", "json"])).unwrap();
    identical(("raw", kept), ("raw", &file_of(&whole, ".raw")));
    let whole: Value = serde_json::from_str(&hypersdk(&["restore", source.vm, "--output", "json"])).unwrap();
    identical(("raw", newest), ("qcow2", &file_of(&whole, ".qcow2")));
    // Without a server: a layer is checked with what lies beneath it.
    let checked = hypersdk(&["verify", file_of(&made, ".qcow2").to_str().unwrap()]);
    assert!(checked.contains("Intact"), "{checked}");
    made["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_point_is_the_disk_as_it_was_and_moves_what_changed_vcenter() {
    chain(Kind::Vcenter).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_point_is_the_disk_as_it_was_and_moves_what_changed_esxi() {
    chain(Kind::Esxi).await;
}

/// Whatever happens to the tracking of changes: the point is the disk as it was, and the log says why all of it was read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_server_does_not_surely_know_is_compared() {
    let mut source = Source::start("backup-lost", Kind::Vcenter).await;
    let proxy = Faults::before(&source.double.host).await;
    let (host, fingerprint) = (proxy.host.clone(), proxy.fingerprint.clone());
    source.connect(&host, Some(&fingerprint)).await;
    let rule = |matches, fault| vec![Rule { matches, after: 0, times: usize::MAX, fault }];
    let first = source.backup(json!({})).await;
    let mut points = vec![(first, source.keep("kept-0"))];
    for (n, (what, word)) in [
        ("reset", "reset"),
        ("back", "went back"),
        ("forget", "does not say what changed"),
        ("operator", "was off"),
        ("fault", "does not say what changed"),
        ("lease", "by a lease"),
        ("snapshot", "may have been reverted"),
    ]
    .into_iter()
    .enumerate()
    {
        let n = n as u64 + 1;
        source.write(&[(n * MIB, 100 * KIB, 50 + n as u8), (CAPACITY / 2 + n * 256 * KIB, 128 * KIB, 0)]);
        match what {
            "operator" => source.double.track(&source.id, false).await,
            "fault" => proxy.script(rule("QueryChangedDiskAreas", Fault::Soap("FileFault"))),
            // The server gives no ranges: then all of it comes, and only what changed is kept.
            "lease" => proxy.script(rule("/folder/", Fault::Status(401, None))),
            // From now on the VM may go back to it, and the next point cannot know whether it did.
            "snapshot" => {
                source.double.snapshot(&source.id, "before the update").await;
                assert_eq!(of(&source.backup(json!({})).await, "kind"), "incremental");
            }
            how => source.double.lose_track(&source.id, how).await,
        }
        let kept = source.keep(&format!("kept-{n}"));
        let point = source.backup(json!({})).await;
        proxy.script(vec![]);
        let log = source.fleet.client.log(point["id"].as_str().unwrap()).await;
        assert_eq!(of(&point, "kind"), "compared", "{what}: {point:#}");
        assert!(log.contains(word), "{what}: {log}");
        let size = |point: &Value| point["result"]["files"][0]["size"].as_u64().unwrap();
        assert!(size(&point) * 4 < size(&points[0].0) && size(&point) < 2 * MIB, "{what}: only what differs is kept: {point:#}");
        points.push((point, kept));
    }
    for (point, kept) in &points {
        source.holds(point, kept).await;
    }
    assert_eq!(source.double.left().await, (0, 1), "the operator's own snapshot stays");

    // A point that is damaged is told so, and nothing is built on one that is not what it was.
    let beneath = file_of(&points[0].0, ".qcow2");
    let manifest = file_of(&points[0].0, ".qcow2").with_extension("qcow2.manifest.json");
    std::fs::rename(&manifest, manifest.with_extension("away")).unwrap();
    let check = json!({"type": "verify", "source": of(&points[6].0, "path")});
    let refused = source.fleet.client.post("/jobs", check.clone()).await;
    assert!(matches!(refused.status, 201 | 404 | 422), "{}", refused.text);
    if refused.status == 201 {
        let job = source.fleet.client.ended(refused.body["id"].as_str().unwrap(), seconds(60)).await;
        assert_eq!((&job["status"], &job["error_code"]), (&json!("failed"), &json!("verification_failed")), "{job:#}");
    }
    let anew = source.backup(json!({})).await;
    assert_eq!((of(&anew, "kind"), of(&anew, "parent")), (json!("full"), Value::Null), "{anew:#}");
    std::fs::rename(manifest.with_extension("away"), &manifest).unwrap();
    crate::harness::images::flip(&beneath, std::fs::metadata(&beneath).unwrap().len() / 2);
    let id = source.fleet.client.create_job(check).await;
    let job = source.fleet.client.ended(&id, seconds(60)).await;
    assert_eq!((&job["status"], &job["error_code"]), (&json!("failed"), &json!("verification_failed")), "{job:#}");
    assert!(job["error"].as_str().unwrap().contains("block"), "{job:#}");
}

/// kill -9 and cancel: what was touched is undone, the tracking too where no point relies on it, and the next point is right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_ends_early_leaves_nothing_behind() {
    let mut source = Source::start("backup-killed", Kind::Vcenter).await;
    let host = source.double.host.clone();
    source.connect(&host, None).await;
    let slow = json!({"bandwidth_limit": 2 * MIB});
    let id = source.begin(slow.clone()).await;
    source.fleet.client.in_stage(&id, &["copying"], seconds(30)).await;
    assert_eq!((source.double.tracked().await, source.double.left().await.1), (1, 1), "it has touched the VM");
    source.fleet.client.delete(&format!("/jobs/{id}")).await.expect(202);
    assert_eq!(source.fleet.client.ended(&id, seconds(30)).await["status"], "cancelled");
    source.nothing_left("cancel").await;
    untracked(&source).await;

    // Killed in the first pass, and cancelled while nobody is there.
    let id = source.begin(slow.clone()).await;
    source.fleet.client.in_stage(&id, &["copying"], seconds(30)).await;
    source.fleet.agents[0].kill();
    source.fleet.client.delete(&format!("/jobs/{id}")).await.expect(202);
    source.fleet.agents[0].start();
    source.nothing_left("kill -9 and cancel").await;
    untracked(&source).await;

    // Killed in the first and in the second pass, which go on.
    let mut points: Vec<(Value, PathBuf)> = Vec::new();
    for n in 0..2 {
        source.write(&[(n * 7 * MIB, 6 * MIB, 11 + n as u8)]);
        let kept = source.keep(&format!("kept-{n}"));
        let id = source.begin(slow.clone()).await;
        source.fleet.client.in_stage(&id, &["copying"], seconds(30)).await;
        source.fleet.agents[0].kill();
        source.fleet.agents[0].start();
        let point = source.fleet.client.completed(&id, seconds(120)).await;
        assert_eq!(of(&point, "kind"), if n == 0 { "full" } else { "incremental" }, "{point:#}");
        points.push((point, kept));
    }
    for (point, kept) in &points {
        source.holds(point, kept).await;
    }
    source.nothing_left("kill -9").await;
    assert_eq!(source.double.tracked().await, 1);

    // Two at once: the VM is frozen by one after the other.
    source.write(&[(20 * MIB, MIB, 99)]);
    let kept = source.keep("kept-both");
    let both = [source.begin(slow.clone()).await, source.begin(slow).await];
    for id in &both {
        let point = source.fleet.client.completed(id, seconds(120)).await;
        source.holds(&point, &kept).await;
    }
    source.nothing_left("two at once").await;
}

async fn untracked(source: &Source) {
    wait_for("the tracking to be off again", seconds(30), async || {
        let tracked = source.double.tracked().await;
        if tracked == 0 { Ok(()) } else { Err(format!("{tracked} VMs are tracked")) }
    })
    .await;
}
