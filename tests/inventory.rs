//! What inventories are like after some years: odd names, several datacenters, many disks, many VMs; and what is in the way of an export.
//!
//! Owns: that each VM is found, shown and read as itself, whatever it is called and wherever it lies. Never: measures (the README's figures
//! come from `ten_thousand` by hand). A crash here costs the test.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};

use crate::harness::client::{Answer, file_of};
use crate::harness::double::{self, Double, Kind, USER};
use crate::harness::faults::{Fault, Faults, Rule};
use crate::harness::fleet::{Database, Fleet, Plan};
use crate::harness::images::{identical, pattern};
use crate::harness::{seconds, wait_for};

const MIB: u64 = 1 << 20;
/// As people write it; the inventory spells it `three off %2f 100%25 …`.
const OFF: &str = "three off / 100% & <ü> 'a' \"b\"";
const ON: &str = "three on / 100% & <ü> 'a' \"b\"";

async fn connect(fleet: &Fleet, proxy: &Faults) -> Answer {
    let account = json!({
        "provider": "vsphere", "name": "vc", "host": proxy.host, "username": USER, "password": double::PASSWORD,
        "fingerprint": proxy.fingerprint,
    });
    fleet.client.post("/providers/connect", account).await
}

async fn scenery(kind: Kind, name: &str, more: &[&str]) -> (Fleet, Double, Faults) {
    let fleet = Fleet::start(name, Plan::plain(), |_| {}).await;
    let image = fleet.scratch.join("disk.raw");
    pattern(&image, 8 * MIB, &[(0, MIB)], 3);
    let arguments: Vec<&str> = ["-scenery"].iter().chain(more).copied().collect();
    let double = Double::start_with(&fleet.scratch, kind, &image, &arguments).await;
    let proxy = Faults::before(&double.host).await;
    connect(&fleet, &proxy).await.expect(201);
    (fleet, double, proxy)
}

async fn browse(fleet: &Fleet, name: &str) -> Answer {
    fleet.client.post("/vms/browse", json!({"provider": "vc", "vm_name": name})).await
}

async fn export(fleet: &Fleet, name: &str) -> Answer {
    fleet.client.post("/jobs", json!({"type": "export", "provider": "vc", "vm_name": name, "format": "raw"})).await
}

async fn exported(fleet: &Fleet, name: &str) -> Value {
    let made = export(fleet, name).await.expect(201).body;
    fleet.client.completed(made["id"].as_str().unwrap(), seconds(90)).await
}

/// The flat file that a descriptor's datastore path names.
fn flat(fleet: &Fleet, kind: Kind, source: &str) -> PathBuf {
    let (_, path) = source.split_once("] ").unwrap();
    let flat = path.replace(".vmdk", "-flat.vmdk");
    let stores = std::fs::read_dir(fleet.scratch.join(&format!("double-{kind:?}"))).unwrap().map(|entry| entry.unwrap().path());
    let found = stores.map(|store| store.join(&flat)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("no {flat}"))
}

/// Each disk is its own file of the datastore, whatever the way was.
async fn each_is_itself(fleet: &Fleet, kind: Kind, vm: &str, way: &str) {
    let browsed = browse(fleet, vm).await.expect(200).body;
    let sources = browsed["sources"].as_array().unwrap();
    let job = exported(fleet, vm).await;
    let log = fleet.client.log(job["id"].as_str().unwrap()).await;
    assert!(log.contains(way), "{vm} was not read {way:?}:\n{log}");
    for source in sources {
        let name = source["disk"].as_str().unwrap();
        let file = if sources.len() == 1 { file_of(&job, ".raw") } else { file_of(&job, &format!("-{name}.raw")) };
        identical(("raw", &flat(fleet, kind, source["path"].as_str().unwrap())), ("raw", &file));
    }
}

fn rule(matches: &'static str, times: usize, fault: Fault) -> Rule {
    Rule { matches, after: 0, times, fault }
}

async fn three_disks(kind: Kind) {
    let (fleet, double, proxy) = scenery(kind, &format!("inventory-{kind:?}"), &["-page", "3"]).await;
    let (off, on) = if kind == Kind::Vcenter { (OFF, ON) } else { ("three off", "three on") };
    let browsed = browse(&fleet, off).await.expect(200).body;
    let sizes: Vec<u64> = browsed["disks"].as_array().unwrap().iter().filter_map(|disk| disk["size_bytes"].as_u64()).collect();
    assert_eq!(sizes, [16 * MIB; 3], "a swap would not show by size: {browsed:#}");
    each_is_itself(&fleet, kind, off, "read by ranges").await;
    each_is_itself(&fleet, kind, on, "by a lease of the temporary snapshot").await;
    proxy.script(vec![rule("/folder/", usize::MAX, Fault::Status(401, None))]);
    each_is_itself(&fleet, kind, off, "read by a lease, because").await;
    proxy.script(vec![]);
    double.snapshot(browsed["id"].as_str().unwrap(), "before the update").await;
    each_is_itself(&fleet, kind, off, "read by a lease").await;
    wait_for("nothing of ours to be left", seconds(30), async || match double.left().await {
        (0, 1) => Ok(()),
        left => Err(format!("leases and snapshots: {left:?}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_disks_of_one_size_come_from_a_vcenter_as_themselves() {
    three_disks(Kind::Vcenter).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_disks_of_one_size_come_from_an_esxi_host_as_themselves() {
    three_disks(Kind::Esxi).await;
}

/// The failure of a job that was refused at once or has failed.
async fn refusal(fleet: &Fleet, vm: &str) -> String {
    let answer = export(fleet, vm).await;
    if answer.status != 201 {
        return answer.refused(422, "bad_image");
    }
    let job = fleet.client.ended(answer.body["id"].as_str().unwrap(), seconds(60)).await;
    assert_eq!(job["status"], "failed", "{job:#}");
    job["error"].to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_vm_is_found_whatever_it_is_called_and_wherever_it_lies() {
    let (mut fleet, double, _proxy) = scenery(Kind::Vcenter, "inventory-names", &[]).await;
    let list = fleet.client.get("/vms/list?provider=vc&limit=200").await.expect(200).body;
    let all = list["data"].as_array().unwrap().clone();
    assert_eq!(list["pagination"]["total"], 32, "{list:#}");
    let one = |name: &str| all.iter().find(|vm| vm["name"] == name).unwrap_or_else(|| panic!("no {name}")).clone();

    let odd = one(OFF);
    let path = "/Büro & <Süd>/RZ %2f 50%25 ü/vm/Kunden %2f \"A & B\"/three off %2f 100%25 & <ü> 'a' \"b\"";
    assert_eq!(odd["path"], path, "a path is spelled as the inventory spells it");
    for way in [path, OFF, odd["id"].as_str().unwrap()] {
        assert_eq!(browse(&fleet, way).await.expect(200).body["id"], odd["id"], "by {way}");
    }
    let escaped =
        OFF.replace('%', "%25").replace('/', "%2F").replace('&', "%26").replace('<', "%3C").replace('>', "%3E").replace('"', "%22");
    let by_url = fleet.client.get(&format!("/vms/vc/{}", escaped.replace(' ', "%20").replace('ü', "%C3%BC"))).await.expect(200).body;
    assert_eq!(by_url["id"], odd["id"]);
    let found = fleet.client.get("/vms/list?provider=vc&search=100%25%20%26%20%3C%C3%9C").await.expect(200).body;
    assert_eq!(found["pagination"]["total"], 2, "{found:#}");

    // Two of one name.
    let twice = browse(&fleet, "twin").await;
    let sentence = twice.refused(409, "ambiguous");
    let twins: Vec<Value> = all.iter().filter(|vm| vm["name"] == "twin").cloned().collect();
    assert_eq!(twins.len(), 2);
    assert!(export(&fleet, "twin").await.refused(409, "ambiguous").contains("/DC0/vm/zwei/twin"));
    for (twin, path) in twins.iter().zip(["/DC0/vm/eins/twin", "/DC0/vm/zwei/twin"]) {
        assert!(sentence.contains(path) && twin["path"] == path, "{sentence} {twin:#}");
        assert_eq!(browse(&fleet, path).await.expect(200).body["id"], twin["id"]);
        each_is_itself(&fleet, Kind::Vcenter, path, "read by ranges").await;
        each_is_itself(&fleet, Kind::Vcenter, twin["id"].as_str().unwrap(), "read by ranges").await;
    }

    // A template is what is off; what has no disk or no configuration is listed with the reason.
    assert_eq!((&one("golden")["template"], &one("twin")["template"]), (&json!(true), &json!(false)));
    each_is_itself(&fleet, Kind::Vcenter, "golden", "read by ranges").await;
    for (name, why) in [("no disks", "it has no disk"), ("lost", "orphaned")] {
        assert!(one(name)["problem"].as_str().unwrap_or_default().contains(why), "{:#}", one(name));
        let told = refusal(&fleet, name).await;
        assert!(told.contains("cannot be exported") && told.contains(why), "{name}: {told}");
    }

    // One that goes between the list and the job, while nobody was there to see it go.
    fleet.agents[0].kill();
    let made = export(&fleet, "soon gone").await.expect(201).body;
    double.soap("VirtualMachine", one("soon gone")["id"].as_str().unwrap(), "Destroy_Task", "").await;
    fleet.agents[0].start();
    let job = fleet.client.ended(made["id"].as_str().unwrap(), seconds(60)).await;
    assert!(job["status"] == "failed" && job["error"].to_string().contains("is not at"), "{job:#}");
    wait_for("it to be gone from the list", seconds(20), async || {
        let list = fleet.client.try_get("/vms/list?provider=vc&search=soon%20gone").await?;
        if list["pagination"]["total"] == 0 { Ok(()) } else { Err(list.to_string()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_inventory_comes_in_pages_and_its_changes_alone() {
    large(Database::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_inventory_comes_in_pages_into_postgres_too() {
    large(Database::Postgres).await;
}

/// All of an inventory comes, page by page, and what changes comes alone. `HYPERSDK_TEST_LONG` makes it 10,000 VMs; the figures are printed.
async fn large(database: Database) {
    let count: u64 = if std::env::var_os("HYPERSDK_TEST_LONG").is_some() { 10_000 } else { 1_000 };
    let mut fleet = Fleet::start(&format!("inventory-large-{database:?}"), Plan { database, ..Plan::plain() }, |_| {}).await;
    let image = fleet.scratch.join("disk.raw");
    pattern(&image, 8 * MIB, &[(0, MIB)], 3);
    let double = Double::start_with(&fleet.scratch, Kind::Vcenter, &image, &["-vms", &(count / 2).to_string(), "-page", "70"]).await;
    let proxy = Faults::before(&double.host).await;
    // It says how much it tells.
    fleet.agents[0].set("LOG", "info,agent=debug");
    fleet.agents[0].kill();
    fleet.agents[0].start();
    wait_for("the agent to be back", seconds(30), async || {
        let agents = fleet.client.try_get("/agents").await?;
        if agents["data"][0]["status"] == "connected" { Ok(()) } else { Err(agents.to_string()) }
    })
    .await;
    let began = Instant::now();
    connect(&fleet, &proxy).await.expect(201);
    println!("connected after {} ms", began.elapsed().as_millis());
    let total = async |query: &str| {
        let list = fleet.client.try_get(&format!("/vms/list?provider=vc&{query}")).await.unwrap();
        list["pagination"]["total"].as_u64().unwrap()
    };
    wait_for("all of them", seconds(90), async || match total("limit=1").await {
        all if all == count => Ok(()),
        other => Err(other.to_string()),
    })
    .await;
    println!("{count} VMs are listed after {} ms", began.elapsed().as_millis());
    // The listening has begun with one more look.
    wait_for("the looks to be over", seconds(90), async || {
        let before = double.inventory("").await["pages"].as_u64();
        tokio::time::sleep(seconds(2)).await;
        if before == double.inventory("").await["pages"].as_u64() { Ok(()) } else { Err("pages are still read".to_owned()) }
    })
    .await;

    // A page of another session is refused, so everything is asked again within the new one.
    proxy.script(vec![Rule { matches: "ContinueRetrievePropertiesEx", after: 2, times: 1, fault: Fault::Soap("NotAuthenticated") }]);
    let began = Instant::now();
    fleet.client.post("/providers/vc/refresh", json!({})).await.expect(200);
    println!("refreshed after {} ms", began.elapsed().as_millis());
    assert_eq!((proxy.met(), total("limit=1").await), (1, count));
    proxy.script(vec![]);

    // Pages, filters, search.
    let mut seen = std::collections::BTreeSet::new();
    for offset in (0..count).step_by(200) {
        let page = fleet.client.get(&format!("/vms/list?provider=vc&limit=200&offset={offset}")).await.expect(200).body;
        seen.extend(page["data"].as_array().unwrap().iter().map(|vm| vm["id"].as_str().unwrap().to_owned()));
    }
    assert_eq!(seen.len() as u64, count, "no VM twice, none left out");
    assert_eq!(total("status=stopped").await, 1, "one is off");
    assert_eq!(total("status=running").await, count - 1);
    assert_eq!(total("search=dc0_h0_vm7").await, (0..count / 2).filter(|n| n.to_string().starts_with('7')).count() as u64);

    let mut changes = Vec::new();
    let id = vm_id(&fleet, "DC0_H0_VM77").await;
    for on in [false, true, false, true, false] {
        let pages = double.inventory("").await["pages"].as_u64().unwrap();
        double.power(&id, on).await;
        let switched = Instant::now();
        let wanted = if on { "poweredOn" } else { "poweredOff" };
        wait_for("a power change to show", seconds(5), async || {
            let vm = fleet.client.try_get(&format!("/vms/vc/{id}")).await?;
            if vm["power_state"] == wanted { Ok(()) } else { Err(vm["power_state"].to_string()) }
        })
        .await;
        changes.push(switched.elapsed().as_millis());
        let read = double.inventory("").await["pages"].as_u64().unwrap() - pages;
        assert!(read < 6, "{read} pages were read for one VM");
    }
    println!("a power change shows after {changes:?} ms");
    let log = fleet.agents[0].process().log();
    let bytes = |what: &str| {
        let lines = log.lines().filter(|line| line.contains(what) && line.contains("connection=\"vc\""));
        lines.filter_map(|line| line.split_once("bytes=")?.1.split(' ').next()?.parse().ok()).collect::<Vec<u64>>()
    };
    let (whole, some) = (bytes("an inventory is told"), bytes("changes of an inventory are told"));
    println!("told to the controller: {whole:?} bytes for all VMs, {some:?} for one");
    assert!(some.len() >= 5 && some.iter().all(|bytes| *bytes < 4096) && whole.iter().any(|bytes| *bytes > 100 * count), "{log}");
    assert_eq!(total("status=stopped").await, 2);
    // One that goes, and one that is called otherwise.
    let renamed = vm_id(&fleet, "DC0_H0_VM78").await;
    double.soap("VirtualMachine", &id, "Destroy_Task", "").await;
    double.soap("VirtualMachine", &renamed, "Rename_Task", "<newName>anders</newName>").await;
    wait_for("both to show", seconds(10), async || match (total("search=anders").await, total("limit=1").await) {
        (1, all) if all == count - 1 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    for query in ["", "status=running", "search=vm7", "provider=vc&os=other&sort=memory_mb&order=desc", "sort=path"] {
        let mut times: Vec<u128> = Vec::new();
        for n in 0..200 {
            let began = Instant::now();
            fleet.client.get(&format!("/vms/list?offset={}&{query}", n * 17 % 500)).await.expect(200);
            times.push(began.elapsed().as_micros());
        }
        times.sort_unstable();
        println!("{database:?}: GET /vms/list of {count} with {query:?}: median {} us, p99 {} us", times[100], times[197]);
    }
    let resident = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name).map(str::trim).map(str::to_owned)).unwrap_or_default();
        format!("{} ({} at most)", line("VmRSS:"), line("VmHWM:"))
    };
    println!("agent {}, controller {}", resident(fleet.agents[0].process().pid()), resident(fleet.controller.process().pid()));
}

async fn vm_id(fleet: &Fleet, name: &str) -> String {
    browse(fleet, name).await.expect(200).body["id"].as_str().unwrap().to_owned()
}

/// Each finding by its name, with what would mend it; what the server does not say is not passed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_the_way_of_an_export_is_named() {
    let (fleet, double, proxy) = scenery(Kind::Vcenter, "inventory-preflight", &[]).await;
    let checks = async |vm: &str| {
        let answer = fleet.client.get(&format!("/readiness?provider=vc&vm_name={}", vm.replace(' ', "%20"))).await.expect(200).body;
        let all: Vec<Value> = serde_json::from_value(answer["data"].clone()).or_else(|_| serde_json::from_value(answer.clone())).unwrap();
        for check in &all {
            assert!(check["status"] == "pass" || check["fix"].as_str().is_some_and(|fix| !fix.is_empty()), "{vm}: {check:#}");
        }
        move |name: &str| all.iter().find(|check| check["check"] == name).unwrap_or_else(|| panic!("no {name} in {all:#?}")).clone()
    };
    for (vm, name, status, says) in [
        ("golden", "permissions", "pass", "may do"),
        ("golden", "snapshots", "pass", "none"),
        ("golden", "raw_device_mappings", "pass", ""),
        ("golden", "shared_disks", "pass", ""),
        ("golden", "independent_disks", "pass", ""),
        ("golden", "encryption", "pass", ""),
        ("golden", "hardware", "pass", ""),
        ("golden", "changed_blocks", "warn", "unknown"),
        ("golden", "space", "pass", "GiB are free"),
        ("rich", "changed_blocks", "pass", ""),
        ("with an RDM", "raw_device_mappings", "fail", "disk-0"),
        ("shared", "shared_disks", "fail", "multi-writer"),
        ("independent", "independent_disks", "fail", "not off"),
        ("encrypted", "encryption", "fail", "encrypted"),
        ("with a passed-through card", "hardware", "warn", "PCI device 0"),
        ("huge", "space", "fail", "1048576.0 GiB"),
        ("no disks", "vm", "fail", "no disk"),
        ("lost", "vm", "fail", "orphaned"),
        ("twin", "vm", "fail", "/DC0/vm/zwei/twin"),
        ("nobody", "vm", "fail", "no VM"),
    ] {
        let check = checks(vm).await(name);
        assert!(check["status"] == status && check["message"].as_str().unwrap().contains(says), "{vm}: {check:#}");
    }
    for vm in ["with an RDM", "shared", "encrypted"] {
        assert!(refusal(&fleet, vm).await.contains("cannot be exported"));
    }

    double.inventory("lacks=Datastore.Browse").await;
    assert_eq!(checks("golden").await("permissions")["status"], "warn", "a lease is left");
    double.inventory("lacks=VApp.Export,Datastore.Browse").await;
    let lacking = checks("golden").await("permissions");
    let named = lacking["message"].as_str().unwrap();
    assert!(lacking["status"] == "fail" && named.contains("VApp.Export") && named.contains("Datastore.Browse"), "{lacking:#}");
    double.inventory("silent=true").await;
    let silent = checks("golden").await("permissions");
    assert!(silent["status"] == "warn" && silent["message"].as_str().unwrap().starts_with("unknown"), "{silent:#}");
    double.inventory("lacks=").await;
    proxy.script(vec![rule("HasPrivilegeOnEntities", usize::MAX, Fault::Reset)]);
    assert_eq!(checks("golden").await("permissions")["status"], "fail", "nobody answers");
    proxy.script(vec![rule("HasPrivilegeOnEntities", 1, Fault::Soap("NotAuthenticated"))]);
    assert_eq!(checks("golden").await("permissions")["status"], "pass", "a session that ran out is made anew");
    proxy.script(vec![]);

    // What browse tells.
    let id = vm_id(&fleet, "rich").await;
    for name in ["before / after", "<late>"] {
        double.snapshot(&id, &name.replace('/', "%2f").replace('<', "&lt;").replace('>', "&gt;")).await;
    }
    let rich = browse(&fleet, "rich").await.expect(200).body;
    for (field, expected) in [
        ("hardware_version", json!("vmx-19")),
        ("annotation", json!("kept by Änne & co")),
        ("changed_block_tracking", json!(true)),
        ("encrypted", json!(false)),
        ("firmware", json!("bios")),
        ("left_behind", json!([])),
        ("template", json!(false)),
    ] {
        assert_eq!(rich[field], expected, "{field}: {rich:#}");
    }
    let guest = &rich["guest"];
    assert_eq!(
        (&guest["hostname"], &guest["tools_status"], &guest["tools_version"]),
        (&json!("rich.example"), &json!("running"), &json!("12352"))
    );
    assert_eq!(guest["addresses"], json!(["192.0.2.7", "fe80::1"]));
    assert_eq!((&rich["networks"][0]["network"], &rich["networks"][0]["mac"]), (&rich["nics"][0]["network"], &rich["nics"][0]["mac"]));
    assert_eq!((&rich["networks"][0]["connected"], &rich["networks"][0]["addresses"]), (&json!(false), &json!(["192.0.2.7", "fe80::1"])));
    let (first, second) = (&rich["snapshot_tree"][0], &rich["snapshot_tree"][0]["children"][0]);
    assert_eq!((&first["name"], &first["current"]), (&json!("before / after"), &json!(false)), "{rich:#}");
    assert_eq!((&second["name"], &second["current"]), (&json!("<late>"), &json!(true)), "{rich:#}");
    assert!(second["created_at"].as_str().unwrap().starts_with("20"), "{second:#}");
    let warned = checks("rich").await("snapshots");
    assert!(warned["status"] == "warn" && warned["message"].as_str().unwrap().contains("`<late>`"), "{warned:#}");

    let three = browse(&fleet, OFF).await.expect(200).body;
    let seats: Vec<Value> = three["disk_details"]
        .as_array()
        .unwrap()
        .iter()
        .map(|disk| {
            json!([disk["name"], disk["bus"], disk["bus_number"], disk["unit"], disk["mode"], disk["backing"], disk["thin_provisioned"]])
        })
        .collect();
    assert_eq!(
        json!(seats),
        json!([
            ["disk-0", "sata", 0, 3, "persistent", "flat", true],
            ["disk-1", "scsi", 0, 0, "persistent", "flat", true],
            ["disk-2", "scsi", 2, 1, "persistent", "flat", true],
        ]),
        "{three:#}"
    );
    let models: Vec<&str> = three["controllers"].as_array().unwrap().iter().filter_map(|row| row["model"].as_str()).collect();
    for model in ["VirtualAHCIController", "ParaVirtualSCSIController", "VirtualLsiLogicController", "VirtualIDEController"] {
        assert!(models.contains(&model), "{models:?}");
    }

    // The agent away: what the inventory knows, and why there is no more. A VM that is gone: 404, whether the inventory knows it or not.
    proxy.script(vec![rule("RetrievePropertiesEx", usize::MAX, Fault::Reset)]);
    let poor = browse(&fleet, "rich").await.expect(200).body;
    assert!(poor["id"] == id.as_str() && poor["unasked"].is_string() && poor["snapshot_tree"].is_null(), "{poor:#}");
    proxy.script(vec![]);
    let gone = vm_id(&fleet, "soon gone").await;
    double.soap("VirtualMachine", &gone, "Destroy_Task", "").await;
    browse(&fleet, &gone).await.refused(404, "not_found");
}
