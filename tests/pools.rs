//! Volumes and cards: a VM of several disks and network cards goes into a storage pool.
//!
//! Owns: that copies are whole, each card is where it was sent, and what fails leaves no volume. Never: looks inside a guest.
//! A crash here costs the test; pools and networks go with it.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::fleet::Fleet;
use crate::harness::images::{convert, guest, identical, link};
use crate::harness::libvirtd::{Domain, URI, virsh};
use crate::harness::{seconds, wait_for};
use crate::migrate::fleet;

/// A pool that goes with its test.
struct Pool(String);

impl Pool {
    fn new(folder: &Path) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let name = format!("pool-{}", shared::ids::random_hex::<4>());
        virsh(&["pool-define-as", &name, "dir", "--target", folder.to_str().unwrap()]);
        virsh(&["pool-start", &name]);
        Self(name)
    }

    fn volumes(&self) -> Vec<String> {
        virsh(&["pool-refresh", &self.0]);
        let listed = virsh(&["vol-list", &self.0]);
        listed.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for act in ["pool-destroy", "pool-undefine"] {
            // It may be off.
            let _ = said(&[act, &self.0]);
        }
    }
}

/// A network without a way out, which goes with its test.
struct Network(String);

impl Network {
    fn new(fleet: &Fleet) -> Self {
        let name = format!("inner-{}", shared::ids::random_hex::<4>());
        let file = fleet.scratch.join("network.xml");
        let bridge = format!("hst{}", shared::ids::random_hex::<4>());
        std::fs::write(&file, format!("<network><name>{name}</name><bridge name='{bridge}' stp='off' delay='0'/></network>")).unwrap();
        virsh(&["net-create", file.to_str().unwrap()]);
        Self(name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = said(&["net-destroy", &self.0]);
    }
}

/// What libvirt's client says, whatever becomes of it.
fn said(arguments: &[&str]) -> std::io::Result<std::process::Output> {
    std::process::Command::new("virsh").args(["-q", "-c", URI]).args(arguments).output()
}

fn hidden(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

async fn listed(fleet: &Fleet, name: &str) {
    wait_for("it to be listed", seconds(15), async || {
        let answer = fleet.client.get(&format!("/vms/kvm/{name}")).await;
        if answer.status == 200 { Ok(()) } else { Err(answer.text) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_are_copied_into_a_pool_and_cards_go_where_they_are_sent() {
    let mut fleet = fleet("pools", |vms| link(&guest().raw, &vms.join("guest.raw"))).await;
    let folder = fleet.exports().join("pool");
    let (pool, network) = (Pool::new(&folder), Network::new(&fleet));

    // A domain that is off, with two disks and two cards.
    let (first, second) = (fleet.vms().join("a.qcow2"), fleet.vms().join("b.raw"));
    convert(("raw", &guest().raw), ("qcow2", &first), &[]);
    std::fs::write(&second, [vec![0x5a; 1 << 20], vec![0; 7 << 20]].concat()).unwrap();
    let source = Domain::with_disks("two", &[(&first, "qcow2"), (&second, "raw")]);
    virsh(&["attach-interface", &source.name, "network", &network.0, "--model", "virtio", "--mac", "52:54:00:aa:00:02", "--config"]);
    wait_for("it to be listed with both cards", seconds(15), async || {
        let answer = fleet.client.get(&format!("/vms/kvm/{}", source.name)).await;
        if answer.body["nics"].as_array().is_some_and(|nics| nics.len() == 2) { Ok(()) } else { Err(answer.text) }
    })
    .await;

    let name = format!("pooled-{}", shared::ids::random_hex::<4>());
    let order = |more: Value| {
        let mut target = json!({"name": name, "pool": pool.0, "start": false, "network": "user", "networks": {&network.0: network.0}});
        target.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"type": "migrate", "provider": "kvm", "vm_name": source.name, "options": {
            "target": target, "adapt": "never", "boot_proof": {"sign": "TINYGUEST-LOGIN ready", "timeout_seconds": 120}
        }})
    };
    let post = async |more: Value| fleet.client.post("/jobs", order(more)).await;

    // What would not fit is refused: at once, or before a byte is copied.
    assert!(post(json!({"networks": {"nowhere": "user"}})).await.refused(400, "bad_request").contains(&network.0));
    assert!(post(json!({"pool": "a/b"})).await.refused(400, "bad_request").contains("pool"));
    let far = Pool::new(&fleet.scratch.dir("far"));
    for (pool, word) in [("nowhere", pool.0.as_str()), (far.0.as_str(), "roots")] {
        let made = post(json!({"pool": pool})).await.expect(201).body;
        let failed = fleet.client.ended(made["id"].as_str().unwrap(), seconds(30)).await;
        let error = failed["error"].as_str().unwrap_or_default();
        assert!(failed["status"] == "failed" && error.contains(word) && failed["bytes_done"] == 0, "{failed:#}");
    }
    let plan = fleet.client.post("/jobs", {
        let mut dry = order(json!({}));
        dry["options"]["dry_run"] = json!(true);
        dry
    });
    let plan = plan.await.expect(200).body;
    assert!(plan["steps"].to_string().contains(&pool.0) && plan["warnings"].to_string().contains(&network.0), "{plan:#}");

    // kill -9 of the agent while it copies into the pool, or right behind it.
    let id = post(json!({})).await.expect(201).body["id"].as_str().unwrap().to_owned();
    wait_for("the pool to be filled", seconds(90), async || {
        let log = fleet.client.log(&id).await;
        if log.contains("are copied into the pool") { Ok(()) } else { Err(log) }
    })
    .await;
    fleet.agents[0].kill();
    fleet.agents[0].start();
    let job = fleet.client.completed(&id, seconds(120)).await;
    let result = &job["result"];
    let domain = Domain::adopt(&name, result["domain"]["uuid"].as_str().unwrap());
    println!("attempt {}: {}", job["attempt"], result["domain"]);
    let volumes = [0, 1].map(|n| format!("{name}-disk-{n}.qcow2"));
    assert_eq!((pool.volumes(), hidden(&folder)), (volumes.to_vec(), Vec::<String>::new()));
    let copies: Vec<PathBuf> = volumes.iter().map(|volume| folder.join(volume)).collect();
    let named: Vec<String> = copies.iter().map(|path| path.display().to_string()).collect();
    assert_eq!((&result["domain"]["disks"], &result["domain"]["pool"]), (&json!(named), &json!(pool.0)), "{result:#}");
    identical(("qcow2", &first), ("qcow2", &copies[0]));
    identical(("raw", &second), ("qcow2", &copies[1]));
    let nics = result["domain"]["nics"].as_array().unwrap();
    assert_eq!((&nics[0]["network"], &nics[1]["network"], nics.len()), (&json!("user"), &json!(network.0), 2), "{result:#}");
    let xml = virsh(&["dumpxml", &name]);
    assert!(xml.matches("<interface ").count() == 2 && xml.contains(&format!("<source network='{}'/>", network.0)), "{xml}");
    let receipt: shared::manifest::Signed =
        serde_json::from_slice(&std::fs::read(result["migration_receipt"].as_str().unwrap()).unwrap()).unwrap();
    let told: Value = serde_json::from_str(&receipt.manifest).unwrap();
    assert!(receipt.is_good() && told["carbon"]["grams"].as_f64().is_some_and(|grams| grams > 0.0), "{told:#}");

    // The same by content; and it needs the job's folder no more.
    listed(&fleet, &name).await;
    let vm = |name: &str| json!({"provider": "kvm", "vm_name": name});
    let compared = fleet.client.post("/vms/compare", json!({"source": vm(&source.name), "target": vm(&name), "content": true})).await;
    let disks = compared.expect(200).body["disks"].clone();
    assert!(disks.as_array().unwrap().len() == 2 && disks.as_array().unwrap().iter().all(|disk| disk["content"] == "equal"), "{disks:#}");
    fleet.client.delete(&format!("/exports/{id}")).await.expect(204);
    assert!(!fleet.exports().join(&id).exists() && copies.iter().all(|copy| copy.is_file()));

    // A name that is taken in the pool, and a VM that cannot be started: nothing of it stays.
    let before = pool.volumes();
    let export = fleet.client.export("guest", "qcow2", json!({})).await;
    let disk = crate::harness::client::file_of(&fleet.client.completed(&export, seconds(60)).await, ".qcow2");
    std::fs::write(folder.join("taken.raw"), b"somebody's").unwrap();
    let deploy = async |name: &str, more: Value| {
        let mut wish =
            json!({"name": name, "disk_path": disk, "cpu": 1, "memory_mb": 256, "network": "user", "target": "kvm", "pool": pool.0});
        wish.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        fleet.client.post("/vms/deploy", wish).await
    };
    assert!(deploy("taken", json!({})).await.refused(409, "conflict").contains("taken.raw"));
    assert!(deploy("fails", json!({"network": null, "bridge": "nobridge0"})).await.refused(422, "unprocessable").contains("nobridge0"));
    assert!(deploy("fails", json!({"nics": [{"network": "nowhere"}]})).await.refused(422, "unprocessable").contains("nowhere"));
    std::fs::remove_file(folder.join("taken.raw")).unwrap();
    assert_eq!((pool.volumes(), hidden(&folder)), (before, Vec::<String>::new()));
    assert!(!virsh(&["list", "--all", "--name"]).contains("fails"));
    let deployed = format!("pooled-{}", shared::ids::random_hex::<4>());
    let made = deploy(&deployed, json!({"start": false, "nics": [{"network": network.0, "mac": "52:54:00:bb:00:02"}]})).await.expect(201);
    let second = Domain::adopt(&deployed, made.body["uuid"].as_str().unwrap());
    assert_eq!(made.body["nics"][1], json!({"network": network.0, "bridge": null, "mac": "52:54:00:bb:00:02"}), "{}", made.body);
    assert_eq!(made.body["disk_path"], json!(folder.join(format!("{deployed}.qcow2"))), "{}", made.body);
    identical(("raw", &guest().raw), ("qcow2", &folder.join(format!("{deployed}.qcow2"))));

    // A domain whose disk is a volume by name is read as one whose disk is a file.
    let xml = virsh(&["dumpxml", "--inactive", &deployed]);
    let (before, after) = xml.split_once("<disk type='file'").unwrap();
    let (driver, rest) = after.split_once("<source file='").unwrap();
    let rest = rest.split_once("'/>").unwrap().1;
    let volume = format!("{before}<disk type='volume'{driver}<source pool='{}' volume='{deployed}.qcow2'/>{rest}", pool.0);
    let file = fleet.scratch.join("volume.xml");
    std::fs::write(&file, volume).unwrap();
    virsh(&["define", file.to_str().unwrap()]);
    assert!(virsh(&["dumpxml", &deployed]).contains("type='volume'"));
    listed(&fleet, &deployed).await;
    let export = fleet.client.post("/jobs", json!({"type": "export", "provider": "kvm", "vm_name": deployed, "format": "raw"}));
    let export = fleet.client.completed(export.await.expect(201).body["id"].as_str().unwrap(), seconds(60)).await;
    identical(("raw", &guest().raw), ("raw", &crate::harness::client::file_of(&export, ".raw")));
    drop((domain, second));
}
