//! What people, guests and disks get wrong: each its status, the error format and a sentence that helps; and nothing is lost by it.
//!
//! Owns: the list of bad input. Never: accepts "some error": the sentence must name what was wrong.
//! A crash here costs the test.

use std::path::{Path, PathBuf};
use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::client::{Client, brief, file_of};
use crate::harness::fleet::{Fleet, Plan, Service};
use crate::harness::images::{convert, flip, guest, identical, link, ovf, pattern, qemu_img};
use crate::harness::process::run;
use crate::harness::{seconds, wait_for};

const MIB: u64 = 1 << 20;

fn text<'a>(vm: &'a Value, field: &str) -> &'a str {
    vm[field].as_str().unwrap_or_default()
}

/// The VM with this path among those of a list.
#[track_caller]
fn at_path<'a>(vms: &'a [Value], path: &str) -> &'a Value {
    vms.iter().find(|vm| vm["path"] == path).unwrap_or_else(|| panic!("no {path} in {vms:#?}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_request_gets_wrong_is_named() {
    let fleet = Fleet::start("requests", Plan::plain(), |vms| {
        pattern(&vms.join("web.raw"), 4 * MIB, &[(0, MIB)], 1);
        link(&vms.join("web.raw"), &vms.join("twin.raw"));
        convert(("raw", &vms.join("web.raw")), ("qcow2", &vms.join("twin.qcow2")), &[]);
    })
    .await;
    let client = &fleet.client;
    let with = |change: Value| {
        let mut body = json!({"type": "export", "provider": "local", "vm_name": "web", "format": "raw", "options": {}});
        for (name, value) in change.as_object().unwrap() {
            match value {
                Value::Null => drop(body.as_object_mut().unwrap().remove(name)),
                value => body[name] = value.clone(),
            }
        }
        body
    };
    let secret = "/etc/shadow";
    for (change, status, code, words) in [
        (json!({"vm_name": "nobody"}), 404, "not_found", vec!["nobody", "/vms/list"]),
        (json!({"vm_name": "twin"}), 409, "ambiguous", vec!["/twin.qcow2", "/twin.raw"]),
        (json!({"vm_name": null}), 400, "bad_request", vec!["vm_name"]),
        (json!({"format": "vhdz"}), 400, "bad_request", vec!["vhdz", "qcow2", "ova"]),
        (json!({"format": "vhdx", "options": {"compression": "deflate"}}), 422, "unprocessable", vec!["vhdx has no compression", "qcow2"]),
        (json!({"type": "exprot"}), 400, "bad_request", vec!["exprot", "export"]),
        (json!({"type": "migrate"}), 400, "bad_request", vec!["libvirt", "connected"]),
        (json!({"provider": "vsphere"}), 400, "bad_request", vec!["vsphere", "local"]),
        (json!({"options": {"destination": "/etc"}}), 403, "outside_roots", vec!["exports/"]),
        (json!({"options": {"destination": "exports/../../etc"}}), 403, "outside_roots", vec!["exports/"]),
        (json!({"options": {"destination": "vms/"}}), 403, "outside_roots", vec!["exports/"]),
        (json!({"options": {"destination": secret}}), 403, "outside_roots", vec!["exports/"]),
        (json!({"options": {"destination": "s3://bucket/x"}}), 422, "not_built", vec!["not built yet"]),
        (json!({"options": {"compression": "lzma"}}), 400, "bad_request", vec!["lzma", "deflate", "zstd"]),
        (json!({"options": {"priority": 101}}), 400, "bad_request", vec!["priority", "100"]),
        (json!({"options": {"bandwidth_limit": 0}}), 400, "bad_request", vec!["bandwidth_limit"]),
        (json!({"options": {"speed": "high"}}), 400, "bad_request", vec!["speed", "bandwidth_limit"]),
        (json!({"options": {"target": {}}}), 400, "bad_request", vec!["target", "migrate"]),
        (json!({"source": "exports/x.raw"}), 400, "bad_request", vec!["source", "convert", "vm_name"]),
        (json!({"type": "convert"}), 400, "bad_request", vec!["provider", "source"]),
    ] {
        let sentence = client.post("/jobs", with(change.clone())).await.refused(status, code);
        for word in words {
            assert!(sentence.contains(word), "{change}: {word:?} is not in {sentence:?}");
        }
    }
    // A VM whose name another bears is told by its path.
    let vms = fleet.refresh().await;
    let id = client.create_job(with(json!({"vm_name": text(at_path(&vms, "/twin.raw"), "path")}))).await;
    client.completed(&id, seconds(30)).await;
    for (body, status, words) in [
        (json!({"provider": "local", "path": "/nowhere/at/all"}), 403, vec!["/nowhere/at/all"]),
        (json!({"provider": "warehouse"}), 422, vec!["warehouse", "local"]),
        (json!({"provider": "libvirt"}), 400, vec!["`uri`", "qemu:///system"]),
        (json!({"provider": "libvirt", "uri": "qemu:///system", "password": "sesame"}), 400, vec!["`password`"]),
        (json!({"provider": "libvirt", "uri": "qemu+ext:///system?command=/bin/sh"}), 400, vec!["qemu+ssh"]),
    ] {
        let answer = client.post("/providers/connect", body.clone()).await;
        assert_eq!(answer.status, status, "{body}: {}", answer.text);
        assert!(words.iter().all(|word| answer.text.contains(word)) && !answer.text.contains("sesame"), "{body}: {}", answer.text);
    }
    client.get("/jobs/job-0000000000000000/logs").await.refused(404, "not_found");
    client.delete("/jobs/job-0000000000000000").await.refused(404, "not_found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_and_roles() {
    let mut fleet = Fleet::start("tokens", Plan::plain(), |vms| pattern(&vms.join("web.raw"), 4 * MIB, &[(0, MIB)], 1)).await;
    let client = fleet.client.clone();
    let good = client.token.clone().unwrap();
    let mut altered = good.clone().into_bytes();
    let at = altered.len() - 10;
    altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
    let none = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.eyJzdWIiOiJhZG1pbiIsInJvbGUiOiJhZG1pbiIsImV4cCI6OTk5OTk5OTk5OX0.";
    for wrong in ["", "nonsense", none, std::str::from_utf8(&altered).unwrap(), &good[..good.len() - 1]] {
        client.with_token(wrong).get("/jobs").await.refused(401, "unauthorized");
    }
    let wrong =
        client.anonymous().post("/auth/login", json!({"username": "admin", "password": "no"})).await.refused(401, "bad_credentials");
    let unknown =
        client.anonymous().post("/auth/login", json!({"username": "nobody", "password": "no"})).await.refused(401, "bad_credentials");
    assert_eq!(wrong, unknown, "who is there is nobody's business");
    let logged_out = client.login("admin", crate::harness::fleet::PASSWORD).await;
    let answer = logged_out.post("/auth/logout", json!({})).await;
    assert_eq!(answer.status, 204, "{}", answer.text);
    logged_out.get("/auth/me").await.refused(401, "unauthorized");

    let mut clients: Vec<Client> = Vec::new();
    for role in ["viewer", "operator"] {
        client.post("/users", json!({"username": role, "password": "quite long enough", "role": role})).await.expect(201);
        clients.push(client.login(role, "quite long enough").await);
    }
    let [viewer, operator] = &clients[..] else { unreachable!() };
    let body = json!({"type": "export", "provider": "local", "vm_name": "web", "format": "raw"});
    let sentence = viewer.post("/jobs", body.clone()).await.refused(403, "forbidden");
    assert!(sentence.contains("operator"), "the role that is needed: {sentence}");
    let id = operator.create_job(body).await;
    viewer.get(&format!("/jobs/{id}")).await.expect(200);
    viewer.delete(&format!("/jobs/{id}")).await.refused(403, "forbidden");
    for (method, path) in
        [(Method::POST, "/users"), (Method::POST, "/agents/tokens"), (Method::POST, "/providers/connect"), (Method::GET, "/audit")]
    {
        let request = operator.request(method.clone(), path).json(&json!({}));
        let answer = if method == Method::GET { operator.get(path).await } else { operator.send(request).await.unwrap() };
        answer.refused(403, "forbidden");
    }
    client.completed(&id, seconds(30)).await;

    // Join tokens: good once, and not for ever.
    let used = fleet.join_token().await;
    let first = joiner(&fleet, "joiner-1", &used);
    let mut first = started(first);
    wait_for("joiner-1", seconds(20), async || {
        let agents = client.try_get("/agents?search=joiner-1&status=connected").await?;
        if agents["pagination"]["total"] == 1 { Ok(()) } else { Err(agents.to_string()) }
    })
    .await;
    let expired = client.post("/agents/tokens", json!({"ttl_seconds": 1})).await.expect(201).body["token"].as_str().unwrap().to_owned();
    tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
    for (name, token, word) in
        [("joiner-2", used.as_str(), "already used"), ("joiner-3", expired.as_str(), "expired"), ("joiner-4", "bm90IGEgdG9rZW4", "token")]
    {
        let mut late = started(joiner(&fleet, name, token));
        let status = late.process().wait(seconds(20)).await;
        let said = late.process().log();
        assert!(!status.success() && said.contains(word), "{name} ended with {status}: {word:?} is not in\n{said}");
        assert!(!said.contains(token), "a token is in a log");
        assert_eq!(client.get(&format!("/agents?search={name}")).await.expect(200).body["pagination"]["total"], 0);
    }
    // Who has joined comes back without a token.
    first.kill();
    first.set("TOKEN", "");
    first.start();
    wait_for("joiner-1 again", seconds(30), async || {
        let agents = client.try_get("/agents?search=joiner-1&status=connected").await?;
        let process = first.process();
        assert!(process.ended().is_none(), "{}", process.tail());
        if agents["pagination"]["total"] == 1 { Ok(()) } else { Err(agents.to_string()) }
    })
    .await;
    assert!(fleet.agents[0].process().ended().is_none() && fleet.controller.process().ended().is_none());
}

/// Another agent of this installation, without VMs.
fn joiner(fleet: &Fleet, name: &str, token: &str) -> Service {
    let home = fleet.scratch.dir(name);
    let mut service = Service::agent(name, &home, &fleet.endpoints.grpc, token);
    service.set("EXPORTS_DIR", &home.join("exports").display().to_string());
    service
}

fn started(mut service: Service) -> Service {
    service.start();
    service
}

/// Images that are damaged or that reach for what is not theirs.
fn damaged(vms: &Path) {
    let good = vms.parent().unwrap().join("good.raw");
    pattern(&good, 64 * MIB, &[(0, 40 * MIB)], 4);
    link(&good, &vms.join("good.raw"));
    // A table that lies behind the end of the file, and data that does.
    convert(("raw", &good), ("qcow2", &vms.join("cut-table.qcow2")), &[]);
    std::fs::File::options().write(true).open(vms.join("cut-table.qcow2")).unwrap().set_len(70_000).unwrap();
    convert(("raw", &good), ("vmdk", &vms.join("cut-stream.vmdk")), &["-o", "subformat=streamOptimized"]);
    let cut = std::fs::File::options().write(true).open(vms.join("cut-stream.vmdk")).unwrap();
    cut.set_len(cut.metadata().unwrap().len() / 2).unwrap();
    // A grain and a cluster whose bytes changed.
    convert(("raw", &good), ("vmdk", &vms.join("bad-grain.vmdk")), &["-o", "subformat=streamOptimized"]);
    flip(&vms.join("bad-grain.vmdk"), std::fs::metadata(vms.join("bad-grain.vmdk")).unwrap().len() / 2);
    convert(("raw", &good), ("qcow2", &vms.join("bad-cluster.qcow2")), &["-c"]);
    // Raw deflate has no checksum, so a flipped literal is just another disk; a whole run of ones is no deflate at all.
    let cluster = std::fs::File::options().write(true).open(vms.join("bad-cluster.qcow2")).unwrap();
    let middle = cluster.metadata().unwrap().len() / 2;
    std::os::unix::fs::FileExt::write_all_at(&cluster, &[0xff; 65536], middle).unwrap();
    // A host file as a backing file, and as a data file.
    let secret = vms.parent().unwrap().join("secret");
    std::fs::write(&secret, vec![7u8; 65536]).unwrap();
    let path = |name: &str| vms.join(name).to_str().unwrap().to_owned();
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret.to_str().unwrap(), &path("backing.qcow2"), "1M"]);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &format!("data_file={},data_file_raw=on", path("data-file.bin")),
        &path("data-file.qcow2"),
        "1M",
    ]);
    std::fs::write(
        vms.join("far.vmdk"),
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 128 FLAT \"{}\" 0\nddb.adapterType = \"ide\"\n",
            secret.display()
        ),
    )
    .unwrap();
    std::fs::write(vms.join("text.qcow2"), "this is no qcow2").unwrap();
    for (name, href) in [("climbs", "../climbs-disk.vmdk"), ("absolute", "/etc/passwd")] {
        hostile_ova(vms, name, href);
    }
}

/// An OVA whose description and archive name a file outside of it.
fn hostile_ova(vms: &Path, name: &str, href: &str) {
    let work = vms.parent().unwrap().join(format!("{name}-work"));
    std::fs::create_dir(&work).unwrap();
    convert(("raw", &vms.join("good.raw")), ("vmdk", &work.join("disk.vmdk")), &["-o", "subformat=streamOptimized"]);
    std::fs::write(work.join(format!("{name}.ovf")), ovf(name, &[href.to_owned()], &[64 * MIB])).unwrap();
    let rename = format!("s,^disk.vmdk,{href},");
    let mut tar = Command::new("tar");
    tar.args(["--format=ustar", "-P", "--transform", &rename, "-cf"]).arg(vms.join(format!("{name}.ova"))).arg("-C").arg(&work);
    run(tar.args([&format!("{name}.ovf"), "disk.vmdk"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_and_hostile_images_are_refused_with_the_place_and_cost_nothing_else() {
    let mut fleet = Fleet::start("damaged", Plan::plain(), damaged).await;
    let client = fleet.client.clone();
    let vms = fleet.refresh().await;
    // What can be seen without reading it all stays in the list, with the reason, and is refused at the door.
    for (path, words) in [
        ("/cut-table.qcow2", vec!["qcow2"]),
        ("/backing.qcow2", vec!["backing"]),
        ("/data-file.qcow2", vec!["data"]),
        ("/far.vmdk", vec!["extent"]),
        ("/text.qcow2", vec!["qcow2"]),
        ("/climbs.ova", vec![".."]),
        ("/absolute.ova", vec!["/etc/passwd"]),
    ] {
        let vm = at_path(&vms, path);
        let problem = text(vm, "problem").to_lowercase();
        assert!(words.iter().all(|word| problem.contains(word)), "{path}: {words:?} in {problem:?}");
        let body = json!({"type": "export", "provider": "local", "vm_name": path, "format": "raw"});
        let sentence = client.post("/jobs", body).await.refused(422, "bad_image");
        println!("{path}: {sentence}");
    }
    // What only reading finds fails the job, which says where; by every format, so that none writes what it could not read.
    for (path, unit) in [("/bad-grain.vmdk", "grain"), ("/cut-stream.vmdk", "grain"), ("/bad-cluster.qcow2", "cluster")] {
        for format in ["raw", "qcow2", "ova"] {
            let id = client.create_job(json!({"type": "export", "provider": "local", "vm_name": path, "format": format})).await;
            let job = client.ended(&id, seconds(60)).await;
            let error = text(&job, "error");
            let names_place = error.contains(unit) && error.bytes().any(|byte| byte.is_ascii_digit());
            assert!(
                job["status"] == "failed" && job["error_code"] == "bad_image" && names_place,
                "{}",
                serde_json::to_string_pretty(&job).unwrap()
            );
            assert!(client.log(&id).await.contains(unit), "the log says so, too");
            println!("{path} to {format}: {error}");
        }
    }
    assert_eq!(std::fs::read_dir(fleet.exports()).unwrap().count(), 0, "what failed leaves nothing");
    // The agent has lived through all of it and does the next job.
    let id = client.export("good", "qcow2", json!({})).await;
    let job = client.completed(&id, seconds(60)).await;
    identical(("raw", &fleet.vms().join("good.raw")), ("qcow2", &file_of(&job, ".qcow2")));
    assert!(fleet.agents[0].process().ended().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_writes_a_header_into_its_raw_disk_stays_a_raw_disk() {
    let mut trojan = PathBuf::new();
    let fleet = Fleet::start("trojan", Plan::plain(), |vms| {
        trojan = vms.join("trojan.raw");
        let secret = vms.parent().unwrap().join("secret");
        std::fs::write(&secret, vec![7u8; 65536]).unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret.to_str().unwrap(), trojan.to_str().unwrap(), "1M"]);
    })
    .await;
    let id = fleet.client.export("trojan", "raw", json!({})).await;
    let job = fleet.client.completed(&id, seconds(30)).await;
    // A raw disk is its bytes, whatever they look like, and whole sectors.
    let (found, expected) = (std::fs::read(file_of(&job, ".raw")).unwrap(), std::fs::read(&trojan).unwrap());
    let (head, rest) = found.split_at(expected.len());
    assert!(head == expected && rest.len() < 512 && rest.iter().all(|byte| *byte == 0), "{} and {} bytes", found.len(), expected.len());
}

/// A small file system of its own; it goes when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: PathBuf, mib: u64) -> Self {
        std::fs::create_dir_all(&at).unwrap();
        // Needs root: there is no other way to a file system that is full.
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"]).arg(&at));
        Self(at)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_space_is_known_beforehand_or_met_on_the_way_and_the_next_job_passes() {
    let place = crate::harness::Scratch::new("full");
    let disk = Tmpfs::mount(place.join("exports"), 160);
    let plan = Plan { exports: Some(disk.0.clone()), ..Plan::plain() };
    let mut fleet = Fleet::start("space", plan, |vms| {
        pattern(&vms.join("fits.raw"), 128 * MIB, &[(0, 96 * MIB)], 6);
        pattern(&vms.join("large.raw"), 512 * MIB, &[(0, 300 * MIB)], 6);
        link(&guest().raw, &vms.join("small.raw"));
    })
    .await;
    let client = fleet.client.clone();
    // Beforehand: nothing is written for a disk that cannot fit.
    let id = client.export("large", "raw", json!({})).await;
    let job = client.ended(&id, seconds(30)).await;
    let error = text(&job, "error").to_owned();
    assert!(job["status"] == "failed" && job["error_code"] == "no_space" && error.contains("300 MiB") && error.contains("free"), "{job:#}");
    assert_eq!(job["bytes_done"], 0, "known beforehand: {job:#}");
    println!("beforehand: {error}");

    // On the way: somebody else fills the disk while the copy runs.
    for (format, options) in [("raw", json!({})), ("qcow2", json!({"compress": true})), ("ova", json!({}))] {
        let mut options = options;
        options["bandwidth_limit"] = json!(32 * MIB);
        let id = client.export("fits", format, options).await;
        wait_for("bytes in the part", seconds(20), async || {
            let job = client.job(&id).await;
            if job["stage"] == "copying" && disk.0.join(format!("{id}.part")).is_dir() { Ok(()) } else { Err(brief(&job)) }
        })
        .await;
        let filler = disk.0.join("filler");
        let _ = std::fs::write(&filler, vec![1u8; 160 << 20]);
        let job = client.ended(&id, seconds(30)).await;
        let error = text(&job, "error").to_owned();
        assert!(job["status"] == "failed" && job["error_code"] == "no_space" && error.contains("no space left"), "{job:#}");
        println!("on the way, {format}: {error}");
        assert!(!disk.0.join(format!("{id}.part")).exists(), "its part gives the space back");
        std::fs::remove_file(filler).unwrap();
        // Somebody made room: the same job, again.
        client.post(&format!("/jobs/{id}/retry"), json!({})).await;
        let job = client.completed(&id, seconds(60)).await;
        assert_eq!(job["error"], Value::Null, "{job:#}");
        std::fs::remove_dir_all(disk.0.join(&id)).unwrap();
    }
    client.completed(&client.export("small", "ova", json!({})).await, seconds(60)).await;
    assert!(fleet.agents[0].process().ended().is_none(), "the agent lives");
    drop(fleet);
    drop(disk);
}
