//! libvirt: a real daemon, real domains under TCG.
//!
//! Owns: the promises about this provider. Never: knows another hypervisor. A crash here costs the test.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use crate::harness::client::{Answer, file_of};
use crate::harness::fleet::{Fleet, Plan};
use crate::harness::images::{convert, guest, identical, link, pattern, qemu_img};
use crate::harness::libvirtd::{self, Domain, URI, virsh};
use crate::harness::{binary, seconds, wait_for};

const MIB: u64 = 1 << 20;

async fn connect(fleet: &Fleet, uri: &str) -> Answer {
    fleet.client.post("/providers/connect", json!({"provider": "libvirt", "name": "kvm", "uri": uri})).await
}

async fn vm(fleet: &Fleet, name: &str) -> Option<Value> {
    let list = fleet.client.get(&format!("/vms/list?provider=kvm&search={name}")).await.expect(200).body;
    list["data"].as_array().unwrap().iter().find(|vm| vm["name"] == name).cloned()
}

/// Waits until the inventory says so by itself; answers after how long.
async fn shows(fleet: &Fleet, name: &str, state: Option<&str>) -> u128 {
    let began = Instant::now();
    wait_for(&format!("{name} to show as {state:?}"), seconds(5), async || {
        let seen = vm(fleet, name).await.map(|vm| vm["power_state"].as_str().unwrap().to_owned());
        if seen.as_deref() == state { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
    began.elapsed().as_millis()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn domains_are_listed_as_they_change_and_exported_when_they_are_off() {
    libvirtd::start();
    let fleet = Fleet::start("libvirt", Plan::plain(), |_| {}).await;
    let image = fleet.vms().join("guest.raw");
    link(&guest().raw, &image);
    let overlay = fleet.vms().join("guest.img");
    convert(("raw", &image), ("qcow2", &overlay), &["-c"]);
    // qcow2, whatever its name says.
    let web = Domain::define("web", &overlay, "qcow2");

    for (uri, status) in [
        ("qemu+tls://127.0.0.1:1/system", 502),
        ("qemu:///nowhere", 400),
        ("qemu+ssh://169.254.169.254/system", 400),
        ("qemu:///system?x=y", 400),
    ] {
        let answer = connect(&fleet, uri).await;
        assert_eq!(answer.status, status, "{uri}: {}", answer.text);
    }
    let made = connect(&fleet, URI).await.expect(201).body;
    assert_eq!((&made["status"], &made["uri"]), (&json!("connected"), &json!(URI)), "{made:#}");
    let off = vm(&fleet, &web.name).await.unwrap_or_else(|| panic!("{} is not listed", web.name));
    assert_eq!((&off["id"], &off["power_state"], &off["provider"]), (&json!(web.id), &json!("poweredOff"), &json!("libvirt")), "{off:#}");
    assert_eq!((&off["disks"][0]["format"], &off["disks"][0]["size_bytes"]), (&json!("qcow2"), &json!(256 * MIB)), "{off:#}");
    assert_eq!((&off["nics"][0]["mac"], &off["nics"][0]["network"]), (&json!("52:54:00:12:34:56"), &json!("user")), "{off:#}");
    let capable = fleet.client.get("/providers/capabilities").await.expect(200).body;
    let capable = capable["data"].as_array().unwrap().iter().find(|row| row["kind"] == "libvirt").unwrap().clone();
    assert_eq!((&capable["export"], &capable["hot_export"], &capable["connections"]), (&json!(true), &json!(true), &json!(["kvm"])));

    // It tells itself what happens at the host.
    let other = Domain::define("other", &fleet.scratch.join("outside.raw"), "raw");
    let defined = shows(&fleet, &other.name, Some("poweredOff")).await;
    virsh(&["start", &web.name]);
    let started = shows(&fleet, &web.name, Some("poweredOn")).await;
    println!("a domain that was defined shows after {defined} ms, one that was started after {started} ms");

    let wish = |vm: &str, format: &str| json!({"type": "export", "provider": "kvm", "vm_name": vm, "format": format});
    virsh(&["destroy", &web.name]);
    shows(&fleet, &web.name, Some("poweredOff")).await;
    for format in ["qcow2", "ova"] {
        let id = fleet.client.create_job(wish(&web.name, format)).await;
        let job = fleet.client.completed(&id, seconds(90)).await;
        assert_eq!(job["result"]["verified"], true, "{job:#}");
        if format == "qcow2" {
            let file = file_of(&job, ".qcow2");
            assert!(file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&web.name)), "{}", file.display());
            identical(("qcow2", &overlay), ("qcow2", &file));
        }
    }

    // A disk outside the roots is nobody's to read, whatever a domain's XML names.
    pattern(&fleet.scratch.join("outside.raw"), MIB, &[(0, MIB)], 3);
    let id = fleet.client.create_job(wish(&other.name, "raw")).await;
    let job = fleet.client.ended(&id, seconds(30)).await;
    assert_eq!((&job["status"], &job["error_code"]), (&json!("failed"), &json!("outside_roots")), "{job:#}");
    assert!(job["error"].as_str().unwrap().contains("outside.raw"), "{job:#}");
    let gone = other.name.clone();
    drop(other);
    shows(&fleet, &gone, None).await;
    by_command(&fleet);
    fleet.client.delete("/providers/kvm").await.expect(204);
}

fn by_command(fleet: &Fleet) {
    let hypersdk = |arguments: &[&str]| {
        let mut command = std::process::Command::new(binary("hypersdk"));
        command.args(arguments).env("HYPERSDK_HOME", fleet.scratch.join("cli")).env("COLUMNS", "80");
        command.env("HYPERSDK_PASSWORD", crate::harness::fleet::PASSWORD);
        crate::harness::process::run(&mut command)
    };
    hypersdk(&["login", &fleet.endpoints.rest, "--username", "admin", "--fingerprint", &fleet.endpoints.fingerprint]);
    let shown = hypersdk(&["providers", "connect", "libvirt", "--name", "cli", "--uri", URI]);
    assert!(shown.contains("libvirt") && shown.contains(URI) && shown.lines().all(|line| line.chars().count() <= 80), "{shown}");
    hypersdk(&["providers", "remove", "cli"]);
}

fn kept(fleet: &Fleet, name: &str, disk: (&str, &Path)) -> PathBuf {
    kept_at(fleet.scratch.join(name), disk)
}

fn kept_at(kept: PathBuf, disk: (&str, &Path)) -> PathBuf {
    qemu_img(&["convert", "-U", "-f", disk.0, "-O", "raw", disk.1.to_str().unwrap(), kept.to_str().unwrap()]);
    kept
}

/// What runs is read as it was at one moment, and nothing of that stays: no job, no scratch file, no checkpoint that nobody needs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_domain_is_exported_and_backed_up_while_it_goes_on() {
    libvirtd::start();
    let mut fleet = Fleet::start("libvirt-hot", Plan::plain(), |_| {}).await;
    let (first, second) = (fleet.scratch.join("a.qcow2"), fleet.scratch.join("b.raw"));
    let source = fleet.scratch.join("source.raw");
    pattern(&source, 48 * MIB, &[(0, 3 * MIB), (24 * MIB, 5 * MIB), (47 * MIB, MIB)], 7);
    convert(("raw", &source), ("qcow2", &first), &[]);
    pattern(&second, 8 * MIB, &[(MIB, MIB)], 8);
    let pair = Domain::with_disks("pair", &[(&first, "qcow2"), (&second, "raw")]);
    virsh(&["start", &pair.name]);
    connect(&fleet, URI).await.expect(201);
    let wish = |kind: &str, vm: &str, options: Value| {
        let mut wish = json!({"type": kind, "provider": "kvm", "vm_name": vm, "options": options});
        if kind == "export" {
            wish["format"] = "qcow2".into();
        }
        wish
    };

    // Both disks as they were, whatever is written meanwhile.
    let (was_a, was_b) = (kept(&fleet, "was-a", ("qcow2", &first)), kept(&fleet, "was-b", ("raw", &second)));
    let id = fleet.client.create_job(wish("export", &pair.name, json!({"bandwidth_limit": 6 * MIB}))).await;
    fleet.client.in_stage(&id, &["copying"], seconds(30)).await;
    pair.write('a', 47 * MIB, MIB, 99);
    pair.write('b', 7 * MIB, 64 << 10, 98);
    let job = fleet.client.completed(&id, seconds(60)).await;
    let disk = |n: usize| PathBuf::from(job["result"]["files"][n]["path"].as_str().unwrap());
    identical(("raw", &was_a), ("qcow2", &disk(0)));
    identical(("raw", &was_b), ("qcow2", &disk(1)));
    assert_eq!(pair.left(), (false, vec![], 0), "after {job:#}");

    // kill -9 in the middle, and a cancel.
    for round in 0..2 {
        let id = fleet.client.create_job(wish("export", &pair.name, json!({"bandwidth_limit": 2 * MIB}))).await;
        fleet.client.in_stage(&id, &["copying"], seconds(30)).await;
        assert!(pair.left().0, "there is a backup job");
        if round == 0 {
            fleet.agents[0].kill();
            fleet.agents[0].start();
            let again = kept(&fleet, "again", ("qcow2", &first));
            let job = fleet.client.completed(&id, seconds(90)).await;
            identical(("raw", &again), ("qcow2", &PathBuf::from(job["result"]["files"][0]["path"].as_str().unwrap())));
        } else {
            fleet.client.delete(&format!("/jobs/{id}")).await.expect(202);
            assert_eq!(fleet.client.ended(&id, seconds(30)).await["status"], "cancelled");
        }
        assert_eq!(pair.left(), (false, vec![], 0), "round {round}");
    }

    // Restore points by dirty bitmaps.
    let image = fleet.vms().join("c.qcow2");
    convert(("raw", &source), ("qcow2", &image), &[]);
    let single = Domain::define("single", &image, "qcow2");
    virsh(&["start", &single.name]);
    shows(&fleet, &single.name, Some("poweredOn")).await;
    let mut points: Vec<(Value, PathBuf)> = Vec::new();
    let rounds = [
        ("full", ""),
        ("incremental", ""),
        ("incremental", ""),
        ("compared", "off"),
        ("compared", "on"),
        ("compared", "killed"),
        ("incremental", ""),
    ];
    for (n, (kind, act)) in rounds.into_iter().enumerate() {
        let at = n as u64 * MIB;
        match act {
            "off" => _ = virsh(&["destroy", &single.name]),
            "on" => _ = virsh(&["start", &single.name]),
            // What QEMU held in memory of the bitmaps is lost.
            "killed" => {
                single.kill_qemu();
                shows(&fleet, &single.name, Some("poweredOff")).await;
                virsh(&["start", &single.name]);
            }
            _ => {}
        }
        if n > 0 && act != "off" {
            single.write('a', at, 100 << 10, 40 + n as u8);
            single.write('a', 30 * MIB + at, 64 << 10, 0);
        }
        let was = kept(&fleet, &format!("was-{n}"), ("qcow2", &image));
        shows(&fleet, &single.name, Some(if act == "off" { "poweredOff" } else { "poweredOn" })).await;
        let id = fleet.client.create_job(wish("backup", &single.name, json!({}))).await;
        let point = fleet.client.completed(&id, seconds(60)).await;
        let told = &point["result"]["restore_point"];
        assert_eq!(told["kind"], kind, "point {n}: {point:#}");
        if kind == "incremental" {
            // 100 KiB touch two grains of 64 KiB, the zeros one.
            assert_eq!((&told["bytes_changed"], &told["bytes_moved"]), (&json!(192 << 10), &json!(192 << 10)), "point {n}: {point:#}");
        }
        println!("libvirt: point {n} is {kind}: {} bytes came", told["bytes_moved"]);
        let (job, files, checkpoints) = single.left();
        assert!(!job && files.is_empty() && (act == "off" || checkpoints == 1), "point {n}: {files:?}, {checkpoints} checkpoints");
        points.push((point, was));
    }
    for (point, was) in &points {
        identical(("raw", was), ("qcow2", &file_of(point, ".qcow2")));
        let wish = json!({"type": "convert", "source": point["result"]["restore_point"]["path"], "format": "raw"});
        let whole = fleet.client.completed(&fleet.client.create_job(wish).await, seconds(60)).await;
        identical(("raw", was), ("raw", &file_of(&whole, ".raw")));
    }
}

/// A client that knows no backup jobs, with the words of libvirt 6 over QEMU 4.2; all else is the real one's. For this agent alone.
async fn without_backup_jobs(fleet: &mut Fleet) {
    let folder = fleet.scratch.dir("old-host");
    let (real, wrapper) = (folder.join("virsh"), folder.join("wrapper"));
    std::fs::copy("/usr/bin/virsh", &real).unwrap();
    let words = "error: Operation not supported: incremental backup is not supported yet";
    let script = format!(
        "#!/bin/sh\nfor word in \"$@\"; do [ \"$word\" != backup-begin ] || {{ echo '{words}' >&2; exit 1; }}; done\nexec '{}' \"$@\"\n",
        real.display()
    );
    std::fs::write(&wrapper, script).unwrap();
    std::fs::set_permissions(&wrapper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mount = format!("mount --bind '{}' /usr/bin/virsh && exec \"$0\" \"$@\"", wrapper.display());
    fleet.agents[0].within(&["unshare", "--mount", "sh", "-c", &mount]);
    fleet.agents[0].process().terminate(seconds(30)).await;
    fleet.agents[0].start();
}

/// The files that a domain's disks are now.
fn sources(domain: &Domain) -> Vec<PathBuf> {
    let said = virsh(&["domblklist", &domain.name, "--details"]);
    let path = |line: &str| line.split_whitespace().nth(3).filter(|path| path.starts_with('/')).map(PathBuf::from);
    said.lines().filter_map(path).collect()
}

/// Where backup jobs are not known a running domain is read under overlays, and what it wrote meanwhile is back in its disks afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_backup_jobs_a_running_domain_is_read_under_overlays_that_go() {
    libvirtd::start();
    let mut fleet = Fleet::start("libvirt-overlays", Plan::plain(), |_| {}).await;
    without_backup_jobs(&mut fleet).await;
    let (first, second) = (fleet.vms().join("a.qcow2"), fleet.vms().join("b.raw"));
    let source = fleet.scratch.join("source.raw");
    pattern(&source, 48 * MIB, &[(0, 3 * MIB), (24 * MIB, 5 * MIB), (47 * MIB, MIB)], 7);
    convert(("raw", &source), ("qcow2", &first), &[]);
    pattern(&second, 8 * MIB, &[(MIB, MIB)], 8);
    let pair = Domain::with_disks("old", &[(&first, "qcow2"), (&second, "raw")]);
    virsh(&["start", &pair.name]);
    wait_for("the agent to serve libvirt", seconds(30), async || {
        let answer = connect(&fleet, URI).await;
        if answer.status == 201 { Ok(()) } else { Err(answer.text) }
    })
    .await;
    let order = |rate: u64| json!({"type": "export", "provider": "kvm", "vm_name": pair.id, "format": "qcow2", "options": {"bandwidth_limit": rate}});
    let bases = vec![first.clone(), second.clone()];
    let (vms, scratch) = (fleet.vms(), fleet.scratch.join("seen"));
    let left = || {
        let files = std::fs::read_dir(&vms).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        (sources(&pair), files.filter(|name| name.starts_with("hypersdk-")).collect::<Vec<_>>())
    };
    let clean = async |limit: u64, what: &str| {
        wait_for(&format!("nothing to be left after {what}"), seconds(limit), async || {
            let left = left();
            if left == (bases.clone(), Vec::new()) { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    };
    // What the guest sees: the top of each chain.
    let seen = |name: &str| {
        let tops = sources(&pair).into_iter().enumerate();
        let copy = |(n, top): (usize, PathBuf)| {
            let format = if top.extension().is_some_and(|ending| ending == "raw") { "raw" } else { "qcow2" };
            kept_at(scratch.with_file_name(format!("{name}-{n}")), (format, &top))
        };
        tops.map(copy).collect::<Vec<_>>()
    };
    let equal = |job: &Value, was: &[PathBuf]| {
        for (n, was) in was.iter().enumerate() {
            identical(("raw", was), ("qcow2", &PathBuf::from(job["result"]["files"][n]["path"].as_str().unwrap())));
        }
    };
    let byte_at = |file: &Path, at: u64| std::fs::read(file).unwrap()[at as usize];

    // One moment of both disks, and what comes after it is not lost.
    let was = seen("was");
    let id = fleet.client.create_job(order(6 * MIB)).await;
    fleet.client.in_stage(&id, &["copying"], seconds(30)).await;
    assert_eq!(left().1.len(), 2, "an overlay for each disk: {:?}", left());
    pair.write('a', 46 * MIB, MIB, 99);
    pair.write('b', 7 * MIB, 64 << 10, 98);
    let job = fleet.client.completed(&id, seconds(60)).await;
    equal(&job, &was);
    clean(10, "an export").await;
    let now = seen("now");
    assert_eq!((byte_at(&now[0], 46 * MIB), byte_at(&now[1], 7 * MIB)), (99, 98));
    assert!(fleet.client.log(&id).await.contains("has no backup jobs"));

    let id = fleet.client.create_job(order(MIB)).await;
    fleet.client.in_stage(&id, &["copying"], seconds(30)).await;
    fleet.client.delete(&format!("/jobs/{id}")).await.expect(202);
    assert_eq!(fleet.client.ended(&id, seconds(30)).await["status"], "cancelled");
    clean(10, "a cancel").await;

    // kill -9 whenever; once with one of the disks back already.
    let mut hits = 0;
    for round in 0..10u8 {
        let id = fleet.client.create_job(order(12 * MIB)).await;
        let pause = std::time::Duration::from_millis(u64::from(round) * 90);
        tokio::time::sleep(pause).await;
        pair.write('a', 30 * MIB, MIB, 100 + round);
        hits += usize::from(!left().1.is_empty());
        fleet.agents[0].kill();
        if round == 6 && left().1.len() == 2 {
            virsh(&["blockcommit", &pair.name, "vda", "--shallow", "--active", "--pivot", "--wait"]);
        }
        let was = seen("killed");
        fleet.agents[0].start();
        equal(&fleet.client.completed(&id, seconds(90)).await, &was);
        clean(20, &format!("kill {round}")).await;
    }
    println!("{hits} of 10 kills met overlays");
    assert!(hits > 2);

    // Its QEMU dies: the copy is whole, and what was written waits until the domain runs again.
    let was = seen("before");
    let id = fleet.client.create_job(order(6 * MIB)).await;
    fleet.client.in_stage(&id, &["copying"], seconds(30)).await;
    pair.write('a', 46 * MIB, MIB, 77);
    pair.kill_qemu();
    equal(&fleet.client.completed(&id, seconds(60)).await, &was);
    assert_eq!(left().1.len(), 2, "{:?}", left());
    shows(&fleet, &pair.name, Some("poweredOff")).await;
    let sentence = fleet.client.post(&format!("/vms/kvm/{}/snapshots", pair.id), json!({"name": "x"})).await.refused(409, "conflict");
    assert!(sentence.contains(&id), "{sentence}");
    virsh(&["start", &pair.name]);
    clean(30, "a QEMU that was killed").await;
    assert_eq!(byte_at(&seen("after")[0], 46 * MIB), 77);

    let backup = fleet.client.create_job(json!({"type": "backup", "provider": "kvm", "vm_name": pair.id})).await;
    let failed = fleet.client.ended(&backup, seconds(60)).await;
    assert!(failed["status"] == "failed" && failed["error"].as_str().unwrap().contains("no backup jobs"), "{failed:#}");
    clean(10, "a backup that cannot be").await;
}
