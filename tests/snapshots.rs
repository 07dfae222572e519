//! Snapshots of VMs: libvirt's inside real images of real domains, vSphere's as far as the double plays them.
//!
//! Owns: the promises about them, and that exports and backups stay right beside them. Never: asks the product what virsh, qemu-img or the
//! double can say. A crash here costs the test.

use std::path::{Path, PathBuf};

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::client::{Answer, Client, file_of};
use crate::harness::double::{self, Double, Kind, USER};
use crate::harness::fleet::{Fleet, PASSWORD, Plan};
use crate::harness::images::{convert, guest, identical, pattern, qemu_img};
use crate::harness::libvirtd::{self, Domain, URI, virsh};
use crate::harness::{binary, seconds, wait_for};

const MIB: u64 = 1 << 20;

async fn take(client: &Client, vm: &str, body: Value) -> Answer {
    client.post(&format!("{vm}/snapshots"), body).await
}

async fn list(client: &Client, vm: &str, query: &str) -> Vec<Value> {
    client.get(&format!("{vm}/snapshots{query}")).await.expect(200).body["data"].as_array().unwrap().clone()
}

fn names(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["name"].as_str().unwrap()).collect()
}

/// How many the inventory knows, right now.
async fn counted(client: &Client, vm: &str) -> u64 {
    client.get(vm).await.expect(200).body["snapshots"].as_u64().unwrap()
}

/// The names that QEMU's own tool finds inside an image.
fn inside(image: &Path) -> Vec<String> {
    let said = qemu_img(&["info", "-U", "--output=json", image.to_str().unwrap()]);
    let said: Value = serde_json::from_str(&said).unwrap();
    said["snapshots"].as_array().into_iter().flatten().map(|row| row["name"].as_str().unwrap().to_owned()).collect()
}

/// What the disk was at a snapshot, by QEMU's own tool.
fn content(fleet: &Fleet, image: &Path, snapshot: &str, name: &str) -> PathBuf {
    let out = fleet.scratch.join(name);
    let of = format!("snapshot.name={snapshot}");
    qemu_img(&["convert", "-U", "-l", &of, "-f", "qcow2", "-O", "raw", image.to_str().unwrap(), out.to_str().unwrap()]);
    out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_domains_snapshots_are_taken_listed_and_removed_one_by_one() {
    libvirtd::start();
    let fleet = Fleet::start("snapshots", Plan::plain(), |_| {}).await;
    let client = &fleet.client;
    let image = fleet.vms().join("guest.qcow2");
    convert(("raw", &guest().raw), ("qcow2", &image), &[]);
    let raw = fleet.vms().join("raw.raw");
    pattern(&raw, MIB, &[(0, MIB)], 3);
    let (domain, plain) = (Domain::define("snap", &image, "qcow2"), Domain::define("rawsnap", &raw, "raw"));
    client.post("/providers/connect", json!({"provider": "libvirt", "name": "kvm", "uri": URI})).await.expect(201);
    let vm = format!("/vms/kvm/{}", domain.id);

    // Off: the disks.
    assert_eq!(list(client, &vm, "").await, Vec::<Value>::new());
    let asked = || client.request(Method::POST, &format!("{vm}/snapshots")).header("Idempotency-Key", "first-one");
    let wish = json!({"name": "first", "description": "before <all> & \"the\" rest"});
    let made = client.send(asked().json(&wish)).await.unwrap().expect(201);
    assert_eq!(made.header("location"), Some(format!("/api/v1{vm}/snapshots/first").as_str()));
    let first = made.body.clone();
    for (field, value) in [
        ("id", json!("first")),
        ("description", json!("before <all> & \"the\" rest")),
        ("power_state", json!("poweredOff")),
        ("memory", json!(false)),
        ("parent", Value::Null),
        ("current", json!(true)),
        ("kind", json!("internal")),
    ] {
        assert_eq!(first[field], value, "{field} of {first:#}");
    }
    assert_eq!((list(client, &vm, "").await, counted(client, &vm).await), (vec![first.clone()], 1));
    let again = client.send(asked().json(&wish)).await.unwrap().expect(201);
    assert_eq!((&again.body, again.header("idempotent-replayed")), (&first, Some("true")));
    client.send(asked().json(&json!({"name": "other"}))).await.unwrap().refused(409, "idempotency_mismatch");
    for (body, status, code, word) in [
        (json!({"name": "first"}), 409, "conflict", "first"),
        (json!({"name": "x", "memory": true}), 422, "unprocessable", "off"),
        (json!({"name": "x", "quiesce": true}), 422, "unprocessable", "quiesce"),
        (json!({"name": "x", "memory": true, "quiesce": true}), 400, "bad_request", "exclude"),
        (json!({"name": "a/b"}), 400, "bad_request", "name"),
        (json!({"name": "hypersdk-x"}), 400, "bad_request", "hypersdk-"),
        (json!({"name": "snapshot-12"}), 400, "bad_request", "snapshot-"),
        (json!({"name": "x", "description": "\u{fffe}"}), 400, "bad_request", "description"),
        (json!({"name": "x", "colour": "red"}), 400, "bad_request", "colour"),
        (json!({"description": "x"}), 400, "bad_request", "name"),
    ] {
        let sentence = take(client, &vm, body.clone()).await.refused(status, code);
        assert!(sentence.contains(word), "{body}: {sentence}");
    }
    let sentence = take(client, &format!("/vms/kvm/{}", plain.id), json!({"name": "x"})).await.refused(422, "unprocessable");
    assert!(sentence.contains("raw") && sentence.contains("qcow2"), "{sentence}");

    // On: with the memory or not at all.
    virsh(&["start", &domain.name]);
    wait_for("the domain to show as on", seconds(10), async || {
        let state = client.get(&vm).await.expect(200).body["power_state"].clone();
        if state == "poweredOn" { Ok(()) } else { Err(state.to_string()) }
    })
    .await;
    let sentence = take(client, &vm, json!({"name": "second"})).await.refused(422, "unprocessable");
    assert!(sentence.contains("`memory`: true"), "{sentence}");
    domain.write('a', 200 * MIB, MIB, 17);
    let second = take(client, &vm, json!({"name": "second", "memory": true})).await.expect(201).body;
    assert_eq!((&second["power_state"], &second["memory"], &second["parent"]), (&json!("poweredOn"), &json!(true), &json!("first")));
    domain.write('a', 200 * MIB, MIB, 18);
    let odd = "Dritter, 3. März (it's <b> & 'c') #2?+;=";
    let third = take(client, &vm, json!({"name": odd, "memory": true})).await.expect(201);
    let at = third.header("location").unwrap().strip_prefix("/api/v1").unwrap().to_owned();
    domain.write('a', 200 * MIB, MIB, 19);
    let mut found = inside(&image);
    found.sort();
    assert_eq!(found, [odd, "first", "second"], "by QEMU");
    assert_eq!((names(&list(client, &vm, "").await), counted(client, &vm).await), (vec![odd, "first", "second"], 3));
    assert_eq!(names(&list(client, &vm, "?order=desc&sort=name&limit=2").await), ["second", "first"]);
    assert_eq!(names(&list(client, &vm, "?search=SEC").await), ["second"]);
    let page = client.get(&format!("{vm}/snapshots?limit=1&offset=1")).await.expect(200).body;
    assert_eq!(page["pagination"], json!({"offset": 1, "limit": 1, "total": 3, "has_more": true}));

    // The one in the middle goes, and the others are what they were.
    let was = [content(&fleet, &image, "first", "was-first"), content(&fleet, &image, "second", "was-second")];
    client.delete(&format!("{vm}/snapshots/second")).await.expect(204);
    client.delete(&format!("{vm}/snapshots/second")).await.refused(404, "not_found");
    let mut found = inside(&image);
    found.sort();
    assert_eq!((found, counted(client, &vm).await), (vec![odd.to_owned(), "first".to_owned()], 2));
    assert_eq!(virsh(&["snapshot-list", &domain.name, "--name"]).lines().filter(|line| !line.trim().is_empty()).count(), 2);
    let left = list(client, &vm, "?sort=created_at").await;
    assert_eq!((names(&left), &left[1]["parent"]), (vec!["first", odd], &json!("first")));
    identical(("raw", &was[0]), ("raw", &content(&fleet, &image, "first", "is-first")));
    assert_eq!(virsh(&["domstate", &domain.name]).trim(), "running");
    // Back to the third by libvirt itself: its write, not the one after it.
    virsh(&["snapshot-revert", &domain.name, "--snapshotname", odd]);
    let now = fleet.scratch.join("now");
    qemu_img(&["convert", "-U", "-f", "qcow2", "-O", "raw", image.to_str().unwrap(), now.to_str().unwrap()]);
    let bytes = std::fs::read(&now).unwrap();
    assert!(bytes[200 * MIB as usize..201 * MIB as usize].iter().all(|byte| *byte == 18), "the third's content");

    client.delete(&at).await.expect(204);
    by_command(&fleet, &domain.name);
    client.delete(&format!("{vm}/snapshots/first?children=true")).await.expect(204);
    assert_eq!((list(client, &vm, "").await.len(), inside(&image), counted(client, &vm).await), (0, vec![], 0));
    let audited = client.get("/audit?search=vm.snapshot").await.expect(200).body;
    let is_ok = |row: &&Value| row["outcome"] == "ok";
    assert_eq!(audited["data"].as_array().unwrap().iter().filter(is_ok).count(), 10, "{audited:#}");
}

/// Takes two over the one that is there, and leaves them.
fn by_command(fleet: &Fleet, vm: &str) {
    let hypersdk = |arguments: &[&str]| {
        let mut command = std::process::Command::new(binary("hypersdk"));
        command.args(arguments).env("HYPERSDK_HOME", fleet.scratch.join("cli")).env("COLUMNS", "80").env("HYPERSDK_PASSWORD", PASSWORD);
        crate::harness::process::run(&mut command)
    };
    let narrow = |said: String| {
        assert!(said.lines().all(|line| line.chars().count() <= 80), "{said}");
        said
    };
    hypersdk(&["login", &fleet.endpoints.rest, "--username", "admin", "--fingerprint", &fleet.endpoints.fingerprint]);
    for verb in [
        &["snapshots", "--help"][..],
        &["snapshots", "create", "--help"],
        &["snapshots", "delete", "--help"],
        &["snapshots", "list", "--help"],
    ] {
        narrow(hypersdk(verb));
    }
    let made = hypersdk(&["snapshots", "create", vm, "by command", "--memory", "--description", "x", "--output", "json"]);
    let made: Value = serde_json::from_str(&made).unwrap();
    assert_eq!((&made["name"], &made["parent"]), (&json!("by command"), &json!("first")), "{made:#}");
    for name in ["over it", "over both"] {
        hypersdk(&["snapshots", "create", vm, name, "--memory"]);
    }
    let shown = narrow(hypersdk(&["snapshots", "list", vm]));
    assert!(["first", "by command", "over it", "over both", "poweredOn"].iter().all(|word| shown.contains(word)), "{shown}");
    hypersdk(&["snapshots", "delete", vm, "over it"]);
    let left: Value = serde_json::from_str(&hypersdk(&["snapshots", "list", vm, "--provider", "kvm", "--output", "json"])).unwrap();
    assert_eq!(names(left.as_array().unwrap()), ["by command", "first", "over both"]);
}

/// Snapshots beside restore points and exports: nothing wrong is copied, and neither undoes the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restore_points_are_right_whatever_snapshots_come_go_and_are_gone_back_to() {
    libvirtd::start();
    let fleet = Fleet::start("snapshots-backup", Plan::plain(), |_| {}).await;
    let client = &fleet.client;
    let (source, image) = (fleet.scratch.join("source.raw"), fleet.vms().join("disk.qcow2"));
    pattern(&source, 48 * MIB, &[(0, 3 * MIB), (24 * MIB, 5 * MIB), (47 * MIB, MIB)], 7);
    convert(("raw", &source), ("qcow2", &image), &[]);
    let domain = Domain::define("snapback", &image, "qcow2");
    virsh(&["start", &domain.name]);
    client.post("/providers/connect", json!({"provider": "libvirt", "name": "kvm", "uri": URI})).await.expect(201);
    let vm = format!("/vms/kvm/{}", domain.id);
    let kept = |name: &str| {
        let kept = fleet.scratch.join(name);
        qemu_img(&["convert", "-U", "-f", "qcow2", "-O", "raw", image.to_str().unwrap(), kept.to_str().unwrap()]);
        kept
    };
    let backup = json!({"type": "backup", "provider": "kvm", "vm_name": domain.id});
    let memory = |name: &str| json!({"name": name, "memory": true});
    let acts = ["", "take", "write", "revert", "remove", "more"];
    for (n, act) in acts.into_iter().enumerate() {
        let at = (2 + n as u64) * MIB;
        match act {
            // QEMU goes back to no snapshot while a checkpoint stands, so it is given up.
            "take" => _ = take(client, &vm, memory("between")).await.expect(201),
            "revert" => _ = virsh(&["snapshot-revert", &domain.name, "between"]),
            "remove" => _ = client.delete(&format!("{vm}/snapshots/between")).await.expect(204),
            _ => {}
        }
        if act != "revert" {
            domain.write('a', at, 100 << 10, 40 + n as u8);
        }
        let was = kept(&format!("was-{n}"));
        let point = client.completed(&client.create_job(backup.clone()).await, seconds(60)).await;
        let told = &point["result"]["restore_point"];
        // A point that the VM had snapshots at says nothing of what a revert has brought back since.
        let expected = ["full", "compared", "compared", "compared", "compared", "incremental"][n];
        let checkpoints = usize::from(!matches!(act, "take" | "write" | "revert"));
        assert_eq!(domain.left(), (false, vec![], checkpoints), "{act}");
        assert_eq!(told["kind"], expected, "{act}: {point:#}");
        identical(("raw", &was), ("qcow2", &file_of(&point, ".qcow2")));
        println!("libvirt: after {act:?} the point is {expected}: {} bytes came", told["bytes_moved"]);
    }

    // Somebody else's checkpoint is not ours to give up.
    let checkpoint = fleet.scratch.join("checkpoint.xml");
    std::fs::write(&checkpoint, "<domaincheckpoint><name>theirs</name></domaincheckpoint>").unwrap();
    virsh(&["checkpoint-create", &domain.name, checkpoint.to_str().unwrap()]);
    assert!(take(client, &vm, memory("kept")).await.refused(409, "conflict").contains("theirs"));
    virsh(&["checkpoint-delete", &domain.name, "theirs"]);
    // A job that has the VM is not disturbed, and says its name.
    take(client, &vm, memory("kept")).await.expect(201);
    let was = kept("was-hot");
    let slow =
        json!({"type": "export", "provider": "kvm", "vm_name": domain.id, "format": "qcow2", "options": {"bandwidth_limit": 4 * MIB}});
    let id = client.create_job(slow).await;
    client.in_stage(&id, &["copying"], seconds(30)).await;
    for answer in [take(client, &vm, memory("x")).await, client.delete(&format!("{vm}/snapshots/kept")).await] {
        let sentence = answer.refused(409, "conflict");
        assert!(sentence.contains(&id), "{sentence}");
    }
    assert_eq!(names(&list(client, &vm, "").await), ["kept"]);
    let job = client.completed(&id, seconds(60)).await;
    identical(("raw", &was), ("qcow2", &file_of(&job, ".qcow2")));

    // Off, with a checkpoint that nobody can give up now.
    virsh(&["checkpoint-create", &domain.name, checkpoint.to_str().unwrap()]);
    virsh(&["destroy", &domain.name]);
    let sentence = take(client, &vm, json!({"name": "off"})).await.refused(409, "conflict");
    assert!(sentence.contains("checkpoint") && sentence.contains("start it"), "{sentence}");
    client.delete(&format!("{vm}/snapshots/kept")).await.expect(204);
    assert_eq!((inside(&image), counted(client, &vm).await), (vec![], 0));
    let cold = client
        .completed(
            &client.create_job(json!({"type": "export", "provider": "kvm", "vm_name": domain.id, "format": "raw"})).await,
            seconds(60),
        )
        .await;
    identical(("qcow2", &image), ("raw", &file_of(&cold, ".raw")));
}

/// The names in a VM's tree as the double tells them, the oldest first.
async fn tree(double: &Double, vm: &str) -> Vec<String> {
    let body = format!(
        "<specSet><propSet><type>VirtualMachine</type><pathSet>snapshot</pathSet></propSet><objectSet><obj type=\"VirtualMachine\">{vm}</obj></objectSet>\
         </specSet><options/>"
    );
    let told = double.soap("PropertyCollector", "propertyCollector", "RetrievePropertiesEx", &body).await;
    let names = told.split("<name>").skip(1).filter_map(|rest| rest.split_once("</name>"));
    names.map(|(name, _)| name.to_owned()).filter(|name| name != "snapshot").collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_at_vsphere_are_removed_alone_or_with_those_above_them() {
    let fleet = Fleet::start("snapshots-vsphere", Plan::plain(), |_| {}).await;
    let client = &fleet.client;
    let image = fleet.scratch.join("disk.raw");
    pattern(&image, 24 * MIB, &[(0, 3 * MIB), (12 * MIB, 5 * MIB)], 7);
    let double = Double::start(&fleet.scratch, Kind::Vcenter, &image).await;
    let account =
        json!({"provider": "vsphere", "name": "vc", "host": double.host, "username": USER, "password": double::PASSWORD, "insecure": true});
    client.post("/providers/connect", account.clone()).await.expect(201);
    let again = serde_json::Map::from_iter(account.as_object().unwrap().clone().into_iter().chain([("name".to_owned(), json!("again"))]));
    client.post("/providers/connect", Value::Object(again)).await.expect(201);
    let id = |name: &str| {
        let path = format!("/vms/vc/{name}");
        async move { client.get(&path).await.expect(200).body["id"].as_str().unwrap().to_owned() }
    };
    let (off, on) = (id(Kind::Vcenter.vm()).await, id(Kind::Vcenter.other()).await);
    let (vm, running) = (format!("/vms/vc/{off}"), format!("/vms/vc/{on}"));

    // Nothing is done to the snapshots of a VM whose disks a job reads, not of one that is off either.
    let slow =
        |vm: &str| json!({"type": "export", "provider": "vc", "vm_name": vm, "format": "qcow2", "options": {"bandwidth_limit": 2 * MIB}});
    let job = client.create_job(slow(&off)).await;
    client.in_stage(&job, &["copying"], seconds(30)).await;
    assert!(take(client, &vm, json!({"name": "x"})).await.refused(409, "conflict").contains(&job));
    client.completed(&job, seconds(60)).await;

    // A task takes its time.
    double.task_time(std::time::Duration::from_millis(700)).await;
    let odd = "Zweiter (ü & <b> 'c') #2?+";
    let first = take(client, &vm, json!({"name": "first", "description": "a\nb"})).await.expect(201).body;
    assert_eq!(
        (&first["power_state"], &first["memory"], &first["quiesced"]),
        (&json!("poweredOff"), &json!(false), &json!(false)),
        "{first:#}"
    );
    assert_eq!((&first["description"], &first["parent"], &first["kind"]), (&json!("a\nb"), &Value::Null, &Value::Null), "{first:#}");
    assert_eq!(counted(client, &vm).await, 1);
    let second = take(client, &vm, json!({"name": odd})).await.expect(201).body;
    let third = take(client, &vm, json!({"name": "third"})).await.expect(201).body;
    assert_eq!((&second["parent"], &third["parent"], &third["current"]), (&first["id"], &second["id"], &json!(true)));
    assert_eq!(names(&list(client, &vm, "").await), [odd, "first", "third"]);
    assert_eq!(tree(&double, &off).await.len(), 3);
    take(client, &vm, json!({"name": "third"})).await.refused(409, "conflict");
    let sentence = take(client, &vm, json!({"name": "x", "memory": true})).await.refused(422, "unprocessable");
    assert!(sentence.contains("poweredOff"), "{sentence}");
    // The one in the middle, by its name.
    let path = reqwest::Url::parse_with_params("http://x/", [("q", odd)]).unwrap();
    let segment = path.query().unwrap().strip_prefix("q=").unwrap().replace('+', "%20");
    client.delete(&format!("{vm}/snapshots/{segment}")).await.expect(204);
    assert_eq!((tree(&double, &off).await, counted(client, &vm).await), (vec!["first".to_owned(), "third".to_owned()], 2));
    let left = list(client, &vm, "?sort=created_at").await;
    assert_eq!((&left[0]["current"], &left[1]["parent"], &left[1]["current"]), (&json!(false), &first["id"], &json!(true)), "{left:#?}");
    // What others call theirs, twice.
    double.task_time(std::time::Duration::ZERO).await;
    for _ in 0..2 {
        double.snapshot(&off, "a%2fb").await;
    }
    wait_for("the double's snapshots", seconds(10), async || {
        let found = tree(&double, &off).await;
        if found.len() == 4 { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    let sentence = client.delete(&format!("{vm}/snapshots/a%2Fb")).await.refused(409, "ambiguous");
    let twins = list(client, &vm, "?search=A/b").await;
    assert!(names(&twins) == ["a/b", "a/b"] && twins.iter().all(|twin| sentence.contains(twin["id"].as_str().unwrap())), "{sentence}");
    client.delete(&format!("{vm}/snapshots/{}", twins[0]["id"].as_str().unwrap())).await.expect(204);
    assert_eq!(tree(&double, &off).await, ["first", "third", "a%2fb"]);
    client.delete(&format!("{vm}/snapshots/third?children=true")).await.expect(204);
    assert_eq!((tree(&double, &off).await, counted(client, &vm).await), (vec!["first".to_owned()], 1));
    client.delete(&format!("{vm}/snapshots/{}", third["id"].as_str().unwrap())).await.refused(404, "not_found");
    assert_eq!(take(client, &vm, json!({"name": "again"})).await.expect(201).body["parent"], first["id"]);

    // On: with the memory, and never with a calm that no tools can bring.
    let warm = take(client, &running, json!({"name": "warm", "memory": true})).await.expect(201).body;
    assert_eq!((&warm["power_state"], &warm["memory"]), (&json!("poweredOn"), &json!(true)), "{warm:#}");
    let sentence = take(client, &running, json!({"name": "calm", "quiesce": true})).await.refused(422, "unprocessable");
    assert!(sentence.contains("Tools"), "{sentence}");
    // A job's own snapshot is the job's.
    let job = client.create_job(slow(&on)).await;
    client.in_stage(&job, &["copying"], seconds(30)).await;
    let rows = list(client, &running, "").await;
    let ours = rows.iter().find(|row| row["name"].as_str().unwrap().starts_with("hypersdk-")).unwrap_or_else(|| panic!("{rows:#?}"));
    let ours = ours["id"].as_str().unwrap();
    // By another connection to the same server, too.
    for path in [
        format!("{running}/snapshots/{ours}"),
        format!("{running}/snapshots/warm?children=true"),
        format!("/vms/again/{on}/snapshots/{ours}"),
        format!("/vms/again/{on}/snapshots/warm?children=true"),
    ] {
        let sentence = client.delete(&path).await.refused(409, "conflict");
        assert!(sentence.contains(&job), "{sentence}");
    }
    client.completed(&job, seconds(60)).await;
    assert_eq!(names(&list(client, &running, "").await), ["warm"], "the job's is gone, the operator's stays");
    // What an ended job has left may go; of a job that is nobody's here nobody knows whether it has ended.
    let (left, foreign) = (format!("hypersdk-{job}-0a1b2c3d"), "hypersdk-job-00000000deadbeef-0a1b2c3d");
    for name in [left.as_str(), foreign] {
        double.snapshot(&on, name).await;
    }
    let sentence = client.delete(&format!("{running}/snapshots/{foreign}")).await.refused(409, "conflict");
    assert!(sentence.contains("job-00000000deadbeef") && sentence.contains("does not know"), "{sentence}");
    client.delete(&format!("{running}/snapshots/{left}")).await.expect(204);
    assert_eq!(tree(&double, &on).await, ["warm", foreign]);
    client.delete(&format!("{running}/snapshots/warm")).await.expect(204);
    assert_eq!((double.left().await, counted(client, &running).await), ((0, 3), 1));
}
