//! Deploy: a VM of disks that lie at a libvirt host.
//!
//! Owns: each field of the page's example, each refusal, and that a failure leaves no domain. Never: adapts a guest.
//! A crash here costs the test.

use serde_json::{Value, json};

use crate::harness::client::file_of;
use crate::harness::fleet::{Fleet, Plan};
use crate::harness::images::{guest, link, qemu_img};
use crate::harness::libvirtd::{self, Domain, URI, virsh};
use crate::harness::{seconds, wait_for};

fn domains() -> Vec<String> {
    virsh(&["list", "--all", "--name"]).lines().filter(|line| line.starts_with("deploy-")).map(|line| line.trim().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exported_guest_is_deployed_boots_and_is_switched() {
    libvirtd::start();
    let mut fleet = Fleet::start("deploy", Plan::plain(), |vms| link(&guest().raw, &vms.join("guest.raw"))).await;
    // KVM is there and runs no guest everywhere.
    fleet.agents[0].set("LIBVIRT_ACCEL", "tcg");
    fleet.agents[0].process().terminate(seconds(30)).await;
    fleet.agents[0].start();
    let id = fleet.client.export("guest", "qcow2", json!({})).await;
    let job = fleet.client.completed(&id, seconds(60)).await;
    let disk = file_of(&job, ".qcow2");
    let path = disk.to_str().unwrap().to_owned();
    wait_for("the agent to serve libvirt", seconds(30), async || {
        let answer = fleet.client.post("/providers/connect", json!({"provider": "libvirt", "name": "kvm", "uri": URI})).await;
        if answer.status == 201 { Ok(()) } else { Err(answer.text) }
    })
    .await;

    let name = format!("deploy-{}", shared::ids::random_hex::<4>());
    let wish = |more: Value| {
        let mut wish =
            json!({"name": name, "disk_path": path, "cpu": 1, "memory_mb": 256, "network": "user", "autostart": true, "target": "libvirt"});
        wish.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        wish
    };
    let deploy = async |more: Value| fleet.client.post("/vms/deploy", wish(more)).await;

    // What would not fit is refused before anything is made.
    std::fs::write(fleet.vms().join("not.qcow2"), b"nothing").unwrap();
    let layered = fleet.exports().join("layer.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &path, layered.to_str().unwrap()]);
    for (more, status, word) in [
        (json!({"memory_mb": 1}), 400, "memory_mb"),
        (json!({"memory_mb": 15_000_000}), 422, "MiB of memory"),
        (json!({"cpu": 0}), 400, "cpu"),
        (json!({"cpu": 500}), 422, "CPUs"),
        (json!({"name": "a/b"}), 400, "name"),
        (json!({"network": "nowhere"}), 422, "nowhere"),
        (json!({"bridge": "br0"}), 400, "exclude"),
        (json!({"mac": "keep"}), 422, "migration"),
        (json!({"mac": "01:00:00:00:00:01"}), 400, "mac"),
        (json!({"firmware": "efi"}), 400, "uefi"),
        (json!({"disk_path": "exports/nowhere.qcow2"}), 404, "nowhere"),
        (json!({"disk_path": "/etc/passwd.raw"}), 403, "outside"),
        (json!({"disk_path": "vms/not.qcow2"}), 422, "qcow2"),
        (json!({"disk_path": "exports/layer.qcow2"}), 422, "backing"),
        (json!({"disk_path": path.replace(".qcow2", ".vmdk")}), 422, "convert"),
        (json!({"disks": [path]}), 422, "twice"),
        (json!({"target": "local"}), 422, "local"),
        (json!({"colour": "red"}), 400, "colour"),
    ] {
        let answer = deploy(more.clone()).await;
        assert!(answer.status == status && answer.text.contains(word), "{more}: {} {}", answer.status, answer.text);
    }
    // Refused by libvirt at its start: then there is no domain.
    let answer = deploy(json!({"network": null, "bridge": "nobridge0"})).await;
    assert!(answer.status == 422 && answer.text.contains("nobridge0"), "{}", answer.text);
    assert!(domains().is_empty() && disk.is_file(), "{:?}", domains());

    // Nor is what another domain's disk lies over.
    let over = Domain::define("over", &layered, "qcow2");
    let refused = deploy(json!({})).await.refused(409, "conflict");
    assert!(refused.contains("beneath") && refused.contains(&over.name), "{refused}");
    drop(over);

    let began = std::time::Instant::now();
    let made = deploy(json!({})).await.expect(201);
    let domain = Domain::adopt(&name, made.body["uuid"].as_str().unwrap());
    let console = domain.console();
    println!("deployed in {} ms: {}", began.elapsed().as_millis(), made.body);
    for (field, value) in [
        ("name", json!(name)),
        ("status", json!("running")),
        ("target", json!("libvirt")),
        ("cpu", json!(1)),
        ("memory_mb", json!(256)),
        ("disk_path", json!(path)),
        ("network", json!("user")),
        ("autostart", json!(true)),
        ("accelerator", json!("tcg")),
    ] {
        assert_eq!(made.body[field], value, "{field}: {}", made.body);
    }
    assert!(made.body["mac"].as_str().is_some_and(|mac| mac.starts_with("52:54:00:")) && made.body["vnc_port"].as_u64() >= Some(5900));
    assert!(made.body["created_at"].as_str().is_some_and(|time| time.ends_with('Z')));
    deploy(json!({})).await.refused(409, "conflict");
    deploy(json!({"name": format!("{name}-2")})).await.refused(409, "conflict");
    assert!(virsh(&["dominfo", &name]).contains("Autostart:      enable"));
    wait_for("the deployed guest to print its digest", seconds(90), async || {
        let said = console.said();
        if said.contains(&format!("TINYGUEST-DATA {}", guest().payload)) { Ok(()) } else { Err(said) }
    })
    .await;
    println!("the deployed guest has booted after {} s", began.elapsed().as_secs());

    // Its disk's export stays as long as it does.
    let kept = fleet.client.delete(&format!("/exports/{id}")).await.refused(409, "conflict");
    assert!(kept.contains(&name) && disk.is_file(), "{kept}");

    // Switched, by the name that it has now.
    wait_for("it to be listed", seconds(5), async || {
        let answer = fleet.client.get(&format!("/vms/kvm/{name}")).await;
        if answer.status == 200 && answer.body["power_state"] == "poweredOn" { Ok(()) } else { Err(answer.text) }
    })
    .await;
    let power = async |action: &str| fleet.client.post(&format!("/vms/kvm/{name}/power"), json!({"action": action})).await;
    power("start").await.refused(409, "conflict");
    power("explode").await.refused(400, "bad_request");
    assert_eq!(power("reset").await.expect(200).body["power_state"], "poweredOn");
    assert_eq!(power("stop").await.expect(200).body["power_state"], "poweredOff");
    power("shutdown").await.refused(409, "conflict");
    assert_eq!(power("start").await.expect(200).body["power_state"], "poweredOn");
    let audit = fleet.client.get("/audit?limit=200").await.expect(200).text;
    assert!(audit.contains("vm.deploy") && audit.contains("vm.stop"), "{audit}");
    fleet.client.post("/vms/local/guest/power", json!({"action": "start"})).await.refused(422, "unprocessable");
}
