//! Jobs that read a file, plans, batches, and the paths of the first API, on real processes.
//!
//! Owns: convert, import and verify from request to file, with qemu-img as the judge; what a dry run leaves behind; whether a batch keeps its
//! limit. Never: looks into a process. A crash here costs the test.

use std::path::Path;

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::client::{Client, brief, file_of};
use crate::harness::fleet::{Database, Fleet, Plan};
use crate::harness::images::{convert, flip, foreign_ova, identical, pattern, qemu_img};
use crate::harness::{seconds, wait_for};

const MIB: u64 = 1 << 20;

/// Nothing lies in a folder, or what does.
fn entries(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

async fn jobs_in_all(client: &Client) -> u64 {
    client.get("/jobs?limit=1").await.expect(200).body["pagination"]["total"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_converted_as_a_vm_is_exported_and_a_killed_agent_goes_on() {
    let mut fleet = Fleet::start("convert", Plan::plain(), |vms| {
        std::fs::create_dir(vms.join("in")).unwrap();
        let raw = vms.join("in/disk.raw");
        pattern(&raw, 192 * MIB, &[(0, 64 * MIB), (100 * MIB, 32 * MIB)], 21);
        convert(("raw", &raw), ("qcow2", &vms.join("in/disk.qcow2")), &["-c"]);
        convert(("raw", &raw), ("vmdk", &vms.join("in/disk.vmdk")), &["-o", "subformat=streamOptimized"]);
        foreign_ova(&vms.join("in/pack.ova"), "pack", &[&raw]);
    })
    .await;
    let client = fleet.client.clone();
    let raw = fleet.vms().join("in/disk.raw");
    let absolute = fleet.vms().join("in/disk.vmdk").canonicalize().unwrap().display().to_string();
    for (source, format, ending) in [
        ("vms/in/disk.qcow2", "vmdk", ".vmdk"),
        (absolute.as_str(), "qcow2", ".qcow2"),
        ("vms/in/disk.raw", "vhdx", ".vhdx"),
        ("vms/in/pack.ova", "raw", ".raw"),
    ] {
        let answer = client.post("/jobs", json!({"type": "convert", "source": source, "format": format})).await.expect(201);
        let made = &answer.body;
        assert_eq!((&made["type"], &made["provider"], &made["format"]), (&json!("convert"), &Value::Null, &json!(format)), "{made:#}");
        assert!(made["source"].as_str().is_some_and(|path| path.starts_with("vms/in/")), "{made:#}");
        let job = client.completed(made["id"].as_str().unwrap(), seconds(60)).await;
        let file = file_of(&job, ending);
        let parent = file.parent().unwrap().file_name().unwrap().to_str().unwrap();
        assert_eq!(json!(parent), job["id"], "a conversion has a folder of its own");
        assert!(job["result"]["verified"] == true && Path::new(job["result"]["manifest"].as_str().unwrap()).is_file(), "{job:#}");
        identical(("raw", &raw), (format, &file));
    }

    // kill -9 in the middle: the same job goes on from its checkpoint.
    let body = json!({
        "type": "convert", "source": "vms/in/disk.qcow2", "format": "qcow2",
        "options": {"compress": true, "compression": "zstd", "bandwidth_limit": 24 * MIB, "destination": "exports/night"}
    });
    let id = client.create_job(body).await;
    let before = wait_for("a checkpoint", seconds(30), async || {
        let job = client.job(&id).await;
        if job["bytes_done"].as_u64() >= Some(24 * MIB) { Ok(job["bytes_done"].as_u64().unwrap()) } else { Err(brief(&job)) }
    })
    .await;
    fleet.agents[0].kill();
    fleet.agents[0].start();
    let job = client.completed(&id, seconds(90)).await;
    assert!(job["attempt"] == 2 && job["bytes_resumed"].as_u64() >= Some(before), "{before} bytes were safe: {job:#}");
    identical(("raw", &raw), ("qcow2", &file_of(&job, ".qcow2")));
    assert_eq!(entries(&fleet.exports().join("night")), [id.as_str()], "one folder, nothing beside it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_becomes_a_vm_of_the_catalogue_and_exports_again() {
    let mut fleet = Fleet::start("import", Plan::plain(), |vms| {
        pattern(&vms.join("web.raw"), 96 * MIB, &[(0, 48 * MIB)], 31);
        convert(("raw", &vms.join("web.raw")), ("vmdk", &vms.join("web.vmdk")), &["-o", "subformat=streamOptimized"]);
        std::fs::rename(vms.join("web.raw"), vms.join("web.bytes")).unwrap();
        foreign_ova_of(vms);
    })
    .await;
    let client = fleet.client.clone();
    let raw = fleet.vms().join("web.bytes");
    let images = fleet.scratch.join("agent-0/data/images");
    for (source, format, name) in
        [("vms/web.vmdk", "qcow2", None), ("vms/web.vmdk", "ovf", Some("as package")), ("vms/pack.ova", "ova", Some("pack"))]
    {
        let mut body = json!({"type": "import", "source": source, "format": format});
        if let Some(name) = name {
            body["vm_name"] = json!(name);
        }
        let job = client.completed(&client.create_job(body.clone()).await, seconds(60)).await;
        let name = name.unwrap_or("web");
        assert_eq!((&job["vm_name"], &job["result"]["vm"]["connection"]), (&json!(name), &json!("images")), "{job:#}");
        assert!(images.join(name).is_dir(), "{:?}", entries(&images));
        // It tells itself, without being asked to look.
        wait_for(&format!("{name} in the inventory"), seconds(10), async || {
            let list = client.get("/vms/list?provider=images").await.expect(200).body;
            let found = list["data"].as_array().unwrap().iter().any(|vm| vm["name"] == name && vm["connection"] == "images");
            if found { Ok(()) } else { Err(list.to_string()) }
        })
        .await;
        let again = json!({"type": "export", "provider": "images", "vm_name": name, "format": "raw"});
        let exported = client.completed(&client.create_job(again).await, seconds(60)).await;
        identical(("raw", &raw), ("raw", &file_of(&exported, ".raw")));
        // What it made is the catalogue's, and is no export to be removed.
        let id = job["id"].as_str().unwrap();
        let sentence = client.delete(&format!("/exports/{id}")).await.refused(422, "unprocessable");
        assert!(sentence.contains("catalogue") && images.join(name).is_dir(), "{sentence}");
        assert_eq!(client.job(id).await["result"].get("removed_at"), None);
        // The name is taken now.
        let sentence = client.post("/jobs", body).await.refused(409, "conflict");
        assert!(sentence.contains(name) && sentence.contains("vm_name"), "{sentence}");
    }
    // The catalogue does not make the kind `local` ambiguous.
    client
        .post("/jobs", json!({"type": "export", "provider": "local", "vm_name": "web", "format": "raw", "options": {"dry_run": true}}))
        .await
        .expect(200);
    client
        .post("/jobs", json!({"type": "import", "source": "vms/web.vmdk", "format": "raw", "vm_name": "../x"}))
        .await
        .refused(400, "bad_request");

    // A crash while it grows leaves no VM behind, and the end is the same.
    let body =
        json!({"type": "import", "source": "vms/web.vmdk", "format": "qcow2", "vm_name": "slow", "options": {"bandwidth_limit": 12 * MIB}});
    let id = client.create_job(body).await;
    wait_for("a checkpoint", seconds(30), async || {
        let job = client.job(&id).await;
        if job["bytes_done"].as_u64() >= Some(16 * MIB) { Ok(()) } else { Err(brief(&job)) }
    })
    .await;
    assert!(fleet.refresh().await.iter().all(|vm| vm["name"] != "slow" && !vm["name"].as_str().unwrap().starts_with("job-")));
    fleet.agents[0].kill();
    fleet.agents[0].start();
    let job = client.completed(&id, seconds(90)).await;
    assert!(job["attempt"] == 2 && job["bytes_resumed"].as_u64() > Some(0), "{job:#}");
    identical(("raw", &raw), ("qcow2", &images.join("slow/slow.qcow2")));
    assert!(entries(&images).iter().all(|name| !name.ends_with(".part")), "{:?}", entries(&images));
}

/// A package over the same bytes, which are not a VM's by their name.
fn foreign_ova_of(vms: &Path) {
    foreign_ova(&vms.join("pack.ova"), "pack", &[&vms.join("web.bytes")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_passes_what_is_whole_and_names_the_flipped_block() {
    let fleet = Fleet::start("verify", Plan::plain(), |vms| pattern(&vms.join("web.raw"), 64 * MIB, &[(0, 32 * MIB)], 41)).await;
    let client = &fleet.client;
    let check = async |source: &str| {
        let id = client.create_job(json!({"type": "verify", "source": source})).await;
        client.ended(&id, seconds(60)).await
    };
    for (format, ending) in [("raw", ".raw"), ("qcow2", ".qcow2"), ("ova", ".ova")] {
        let job = client.completed(&client.export("web", format, json!({})).await, seconds(60)).await;
        let id = job["id"].as_str().unwrap().to_owned();
        let file = file_of(&job, ending);
        let named = format!("exports/{id}/web{ending}");
        let whole = check(&named).await;
        assert_eq!(
            (&whole["status"], &whole["progress"]),
            (&json!("completed"), &json!(100)),
            "{whole:#}\n{}",
            client.log(whole["id"].as_str().unwrap()).await
        );
        let result = &whole["result"];
        assert_eq!(
            (&result["verified"], &result["checked"]["against"], &result["checked"]["signature"]),
            (&json!(true), &json!("manifest"), &json!("good")),
            "{whole:#}"
        );
        assert!(result["checked"]["blocks"].as_u64() >= Some(8) && result["checked"]["signer_is_this_agent"] == true, "{whole:#}");
        assert_eq!(check(&format!("{named}.manifest.json")).await["status"], "completed", "by its manifest's own name");
        if format == "raw" {
            // Byte 9 MiB lies in block 2 of 4 MiB.
            flip(&file, 9 * MIB + 17);
            let bad = check(&named).await;
            assert_eq!((&bad["status"], &bad["error_code"]), (&json!("failed"), &json!("verification_failed")), "{bad:#}");
            let sentence = bad["error"].as_str().unwrap();
            assert!(sentence.contains("block 2 at byte 8388608") && sentence.contains("web.raw"), "{sentence}");
            assert!(!sentence.contains("block 1 ") && !sentence.contains("block 3 "), "{sentence}");
        }
    }
    // Without a manifest: the structure and the digests, and it says that nothing was compared.
    convert(("raw", &fleet.vms().join("web.raw")), ("qcow2", &fleet.vms().join("lone.qcow2")), &["-c"]);
    let lone = check("vms/lone.qcow2").await;
    assert_eq!(
        (&lone["status"], &lone["result"]["verified"], &lone["result"]["checked"]["against"]),
        (&json!("completed"), &json!(false), &json!("structure")),
        "{lone:#}"
    );
    assert_eq!(lone["result"]["files"][0]["sha256"], crate::harness::images::sha256(&fleet.vms().join("lone.qcow2")));
    flip(&fleet.vms().join("lone.qcow2"), 1 << 20);
    let bad = check("vms/lone.qcow2").await;
    assert_eq!(
        (&bad["status"], &bad["error_code"]),
        (&json!("failed"), &json!("verification_failed")),
        "a damaged cluster is no disk: {bad:#}"
    );
    assert!(bad["error"].as_str().unwrap().contains("block "), "{bad:#}");
    // An altered manifest is not believed.
    let job = client.completed(&client.export("web", "raw", json!({})).await, seconds(60)).await;
    let manifest = Path::new(job["result"]["manifest"].as_str().unwrap()).to_owned();
    let text = std::fs::read_to_string(&manifest).unwrap().replacen("67108864", "67108865", 1);
    std::fs::write(&manifest, text).unwrap();
    let bad = check(&format!("exports/{}/web.raw", job["id"].as_str().unwrap())).await;
    assert!(bad["status"] == "failed" && bad["error"].as_str().unwrap().contains("signature"), "{bad:#}");
    // A check that runs is stopped like any other job, and writes nothing.
    let id = client.create_job(json!({"type": "verify", "source": "vms/web.raw", "options": {"bandwidth_limit": 4 * MIB}})).await;
    client.in_stage(&id, &["verifying"], seconds(20)).await;
    client.delete(&format!("/jobs/{id}")).await.expect(202);
    assert_eq!(client.ended(&id, seconds(5)).await["status"], "cancelled");
    client
        .post("/jobs", json!({"type": "verify", "source": "vms/web.raw", "options": {"destination": "exports"}}))
        .await
        .refused(422, "unprocessable");
    client.post("/jobs", json!({"type": "verify", "source": "vms/web.raw", "format": "qcow2"})).await.refused(422, "unprocessable");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_tells_everything_and_makes_nothing() {
    let fleet = Fleet::start("dry", Plan::plain(), |vms| {
        pattern(&vms.join("web.raw"), 64 * MIB, &[(0, 24 * MIB)], 51);
        qemu_img(&["create", "-q", "-f", "qcow2", vms.join("huge.qcow2").to_str().unwrap(), "1T"]);
    })
    .await;
    let client = &fleet.client;
    // One job, so that something was measured.
    client.completed(&client.export("web", "raw", json!({})).await, seconds(60)).await;
    let before = (entries(&fleet.exports()), entries(&fleet.scratch.join("agent-0/data/images")), jobs_in_all(client).await);
    let plan = async |body: Value| {
        let answer = client.post("/jobs", body).await.expect(200);
        assert_eq!(answer.body["dry_run"], true, "{}", answer.text);
        answer.body
    };
    let dry = json!({"dry_run": true});
    let export = plan(json!({"type": "export", "provider": "local", "vm_name": "web", "format": "raw", "options": dry})).await;
    assert_eq!((export["data_bytes"].as_u64(), export["capacity_bytes"].as_u64()), (Some(24 * MIB), Some(64 * MIB)), "{export:#}");
    let stages: Vec<&str> = export["steps"].as_array().unwrap().iter().map(|step| step["stage"].as_str().unwrap()).collect();
    assert_eq!(stages, ["preparing", "copying", "verifying", "publishing"]);
    assert_eq!(
        (&export["files"], &export["agent"], &export["fits"]),
        (&json!(["web.raw", "web.raw.manifest.json"]), &json!("agent-0"), &json!(true)),
        "{export:#}"
    );
    assert!(
        export["destination"]["free_bytes"].as_u64() > Some(0)
            && export["estimated_seconds"].is_u64()
            && export["estimated_duration"].is_string(),
        "{export:#}"
    );
    let convert =
        plan(json!({"type": "convert", "source": "vms/web.raw", "format": "ovf", "options": {"dry_run": true, "verify": false}})).await;
    assert_eq!(convert["files"], json!(["web.ovf", "web.mf", "web.vmdk", "web.ovf.manifest.json"]), "{convert:#}");
    assert!(convert["estimated_seconds"].is_null() && convert["warnings"].to_string().contains("measured"), "{convert:#}");
    let import = plan(json!({"type": "import", "source": "vms/web.raw", "format": "qcow2", "vm_name": "fresh", "options": dry})).await;
    assert_eq!((&import["destination"]["root"], &import["files"][0]), (&json!("images"), &json!("fresh.qcow2")), "{import:#}");
    let verify = plan(json!({"type": "verify", "source": "vms/web.raw", "options": dry})).await;
    assert!(verify["destination"].is_null() && verify["warnings"].to_string().contains("no manifest"), "{verify:#}");
    let huge = plan(json!({"type": "convert", "source": "vms/huge.qcow2", "format": "raw", "options": dry})).await;
    assert_eq!((huge["capacity_bytes"].as_u64(), huge["data_bytes"].as_u64()), (Some(1 << 40), Some(0)), "{huge:#}");
    let after = (entries(&fleet.exports()), entries(&fleet.scratch.join("agent-0/data/images")), jobs_in_all(client).await);
    assert_eq!(before, after, "a dry run made something");
    // What would be refused is refused.
    client
        .post("/jobs", json!({"type": "export", "provider": "local", "vm_name": "none", "format": "raw", "options": dry}))
        .await
        .refused(404, "not_found");
}

async fn a_batch_never_runs_more_than_its_limit(database: Database) {
    let mut fleet = Fleet::start("batch", Plan { database, ..Plan::plain() }, |vms| {
        for n in 0..6 {
            pattern(&vms.join(format!("vm-{n}.raw")), 24 * MIB, &[(0, 24 * MIB)], 60 + n);
        }
    })
    .await;
    let client = fleet.client.clone();
    let body = json!({
        "type": "export", "provider": "local", "format": "raw", "options": {"bandwidth_limit": 12 * MIB}, "concurrency": 2,
        "vms": ["vm-0", "vm-1", "vm-2"], "jobs": [{"vm_name": "vm-3"}, {"vm_name": "vm-4", "format": "qcow2"}, {"vm_name": "vm-5"}]
    });
    let request = || client.request(Method::POST, "/jobs/batch").header("Idempotency-Key", "night").json(&body);
    let answer = client.send(request()).await.unwrap().expect(201);
    let results = answer.body["results"].as_array().unwrap().clone();
    assert_eq!((answer.body["created"].as_u64(), answer.body["failed"].as_u64(), results.len()), (Some(6), Some(0), 6), "{}", answer.text);
    let again = client.send(request()).await.unwrap().expect(201);
    assert_eq!(again.body, answer.body, "the same key gives the same jobs");
    assert_eq!(jobs_in_all(&client).await, 6);
    let ids: Vec<String> = results.iter().map(|result| result["job"]["id"].as_str().unwrap().to_owned()).collect();
    for (n, result) in results.iter().enumerate() {
        assert_eq!(
            (&result["index"], &result["status"], &result["job"]["vm_name"]),
            (&json!(n), &json!(201), &json!(format!("vm-{n}"))),
            "{result:#}"
        );
        assert_eq!(result["job"]["batch"], answer.body["batch_id"]);
    }
    let (mut most, mut restarted) = (0, false);
    wait_for("the whole batch", seconds(120), async || {
        let list = client.try_get("/jobs?limit=200").await?;
        let jobs = list["data"].as_array().unwrap().clone();
        let with = |status: &str| jobs.iter().filter(|job| job["status"] == status).count();
        most = most.max(with("running"));
        assert!(with("running") <= 2, "{}", jobs.iter().map(brief).collect::<Vec<_>>().join("\n"));
        assert_eq!(with("failed"), 0, "{}", jobs.iter().map(brief).collect::<Vec<_>>().join("\n"));
        if with("completed") >= 1 && !restarted {
            restarted = true;
            fleet.restart_controller().await;
        }
        if with("completed") == 6 { Ok(()) } else { Err(jobs.iter().map(brief).collect::<Vec<_>>().join("\n")) }
    })
    .await;
    assert!(most == 2 && restarted, "{most} ran at once");
    for (n, id) in ids.iter().enumerate() {
        let job = client.job(id).await;
        let ending = if n == 4 { "qcow2" } else { "raw" };
        identical(("raw", &fleet.vms().join(format!("vm-{n}.raw"))), (ending, &file_of(&job, &format!(".{ending}"))));
    }
}

mod batch {
    use super::Database;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn never_runs_more_than_its_limit_on_sqlite() {
        super::a_batch_never_runs_more_than_its_limit(Database::Sqlite).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn never_runs_more_than_its_limit_on_postgres() {
        super::a_batch_never_runs_more_than_its_limit(Database::Postgres).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_answers_for_each_and_the_first_api_still_speaks() {
    let fleet = Fleet::start("legacy", Plan::plain(), |vms| pattern(&vms.join("web.raw"), 8 * MIB, &[(0, 8 * MIB)], 71)).await;
    let client = &fleet.client;
    let body = json!({"type": "export", "provider": "local", "format": "raw", "vms": ["web", "none"], "jobs": [{"type": "verify", "source": "/etc/passwd.raw"}]});
    let answer = client.post("/jobs/batch", body).await.expect(207);
    let codes: Vec<_> = answer.body["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|result| (result["status"].as_u64().unwrap(), result["error"]["code"].clone()))
        .collect();
    assert_eq!(codes, [(201, Value::Null), (404, json!("not_found")), (403, json!("outside_roots"))], "{}", answer.text);
    let error = &answer.body["results"][1]["error"];
    assert!(error["error"].is_string() && error["status"] == 404 && error["request_id"].is_string(), "{error:#}");
    for (bad, word) in [
        (json!({}), "empty"),
        (json!({"vms": ["web"], "concurrency": 0}), "concurrency"),
        (json!({"vms": vec!["web"; 501]}), "500"),
        (json!({"vms": ["web"], "speed": 1}), "speed"),
    ] {
        let sentence = client.post("/jobs/batch", bad).await.refused(400, "bad_request");
        assert!(sentence.contains(word), "{word}: {sentence}");
    }

    let answer = client
        .post(
            "/jobs/submit",
            json!({"jobs": [{"vm_path": "/web.raw", "format": "qcow2", "output_dir": "exports/old"}, {"vm_path": "none"}]}),
        )
        .await;
    let answer = answer.expect(200).body;
    assert_eq!((&answer["accepted"], &answer["rejected"]), (&json!(1), &json!(1)), "{answer:#}");
    assert!(answer["errors"][0].as_str().unwrap().contains("none"), "{answer:#}");
    let id = answer["job_ids"][0].as_str().unwrap().to_owned();
    client.completed(&id, seconds(60)).await;
    let answer = client.post("/jobs/query", json!({"job_ids": [id]})).await.expect(200).body;
    let job = &answer["jobs"][0];
    assert_eq!(
        (&answer["total"], &job["status"], &job["definition"]["id"], &job["result"]["success"]),
        (&json!(1), &json!("completed"), &json!(id), &json!(true)),
        "{answer:#}"
    );
    assert!(job["result"]["files"][0].as_str().unwrap().contains("/old/"), "{answer:#}");
    let far = client.get(&format!("//jobs/progress/{id}")).await.expect(200).body;
    assert_eq!((&far["job_id"], &far["progress"]["percent_complete"]), (&json!(id), &json!(100)), "{far:#}");
    // A job that waits is `pending`, and is cancelled in the old way.
    let waits = client.export("web", "raw", json!({"bandwidth_limit": MIB})).await;
    client.post(&format!("/jobs/{waits}/pause"), json!({})).await.expect(200);
    let pending = client.post("/jobs/query", json!({"status": ["pending"], "all": false})).await.expect(200).body;
    assert_eq!((&pending["jobs"][0]["definition"]["id"], &pending["jobs"][0]["status"]), (&json!(waits), &json!("pending")), "{pending:#}");
    let answer = client.post("/jobs/cancel", json!({"job_ids": [waits, id, "nonsense"]})).await.expect(200).body;
    assert_eq!((&answer["cancelled"], &answer["failed"]), (&json!([waits]), &json!([id, "nonsense"])), "{answer:#}");
    let status = client.get("/status").await.expect(200).body;
    assert!(status["total_jobs"].as_u64() >= Some(3) && status["version"].is_string() && status["uptime"].is_string(), "{status:#}");
    let sentence = client.post("/jobs/submit", json!({"vm_path": "web", "password": "x"})).await.refused(400, "bad_request");
    assert!(sentence.contains("password"), "{sentence}");
    let openapi = client.get("/openapi.json").await.expect(200).body;
    for (path, method) in
        [("/jobs/submit", "post"), ("/jobs/query", "post"), ("/jobs/cancel", "post"), ("/jobs/progress/{id}", "get"), ("/status", "get")]
    {
        assert_eq!(openapi["paths"][path][method]["deprecated"], true, "{path}");
    }
    assert!(openapi["paths"]["/jobs/batch"]["post"]["deprecated"].is_null());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sources_that_are_none_are_refused_before_anything_is_made() {
    let fleet = Fleet::start("sources", Plan { agents: 2, ..Plan::plain() }, |vms| {
        pattern(&vms.join("good.raw"), 4 * MIB, &[(0, MIB)], 81);
        std::fs::create_dir(vms.join("folder")).unwrap();
        std::fs::write(vms.join("notes.txt"), b"no disk").unwrap();
        let base = vms.join("good.raw");
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.to_str().unwrap(), vms.join("hostile.qcow2").to_str().unwrap()]);
        std::fs::write(vms.join("junk.vmdk"), vec![7u8; 70_000]).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", vms.join("link.raw")).unwrap();
    })
    .await;
    let client = &fleet.client;
    let body = |source: &str| json!({"type": "convert", "source": source, "format": "qcow2", "agent": "agent-0"});
    for (source, status, code, word) in [
        ("/etc/passwd", 403, "outside_roots", "vms/"),
        ("vms/../secret.raw", 403, "outside_roots", "roots"),
        ("nowhere/x.raw", 403, "outside_roots", "exports/"),
        ("vms/link.raw", 403, "outside_roots", "root"),
        ("vms/missing.raw", 404, "not_found", "missing.raw"),
        ("vms/none/x.raw", 404, "not_found", "x.raw"),
        ("vms/folder", 422, "unprocessable", "folder"),
        ("vms", 422, "unprocessable", "folder"),
        ("vms/hostile.qcow2", 422, "bad_image", "backing"),
        ("vms/junk.vmdk", 422, "bad_image", "vmdk"),
        ("vms/notes.txt", 422, "bad_image", ".qcow2"),
        ("vms/a\0b.raw", 403, "outside_roots", "roots"),
        ("", 400, "bad_request", "source"),
    ] {
        for kind in ["convert", "import"] {
            let mut body = body(source);
            body["type"] = json!(kind);
            let sentence = client.post("/jobs", body).await.refused(status, code);
            assert!(sentence.contains(word), "{source:?}: {word:?} is not in {sentence:?}");
        }
    }
    // Two agents have a root of that name.
    let answer = client.post("/jobs", json!({"type": "convert", "source": "vms/good.raw", "format": "qcow2"})).await;
    let sentence = answer.refused(409, "ambiguous");
    assert!(sentence.contains("agent-0") && sentence.contains("agent-1") && sentence.contains("`agent`"), "{sentence}");
    assert_eq!(answer.body["detail"]["agents"], json!(["agent-0", "agent-1"]));
    client
        .post("/jobs", json!({"type": "convert", "source": "vms/good.raw", "format": "qcow2", "agent": "agent-7"}))
        .await
        .refused(400, "bad_request");
    let job = client.completed(&client.create_job(body("vms/good.raw")).await, seconds(30)).await;
    assert_eq!(job["agent"], "agent-0");
    // The second agent's catalogue is listed nowhere, since its name is taken: said with what to do.
    let import = json!({"type": "import", "source": "exports/x.raw", "format": "raw", "agent": "agent-1"});
    let sentence = client.post("/jobs", import).await.refused(422, "unprocessable");
    assert!(sentence.contains("/providers/connect") && sentence.contains("images-agent-1"), "{sentence}");
    assert_eq!(jobs_in_all(client).await, 1);
}

/// Uploads a file in its chunks; answers the path that a job names it by, of one that is left open its folder.
async fn uploaded(client: &Client, file: &Path, whole: bool) -> String {
    let content = std::fs::read(file).unwrap();
    let name = file.file_name().unwrap().to_str().unwrap();
    let begun = client.post("/upload/init", json!({"filename": name, "size": content.len()})).await.expect(201).body;
    let (id, size) = (begun["upload_id"].as_str().unwrap(), begun["chunk_size"].as_u64().unwrap() as usize);
    for (index, chunk) in content.chunks(size).enumerate() {
        let request = client.request(Method::POST, &format!("/upload/chunk?upload_id={id}&index={index}"));
        client.send(request.header("Content-Type", "application/octet-stream").body(chunk.to_vec())).await.unwrap().expect(200);
    }
    if !whole {
        return format!("uploads/{id}");
    }
    let done = client.post("/upload/complete", json!({"upload_id": id})).await.expect(200).body;
    done["path"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_is_a_source_for_any_agent() {
    let mut fleet = Fleet::start("fetched", Plan { agents: 2, ..Plan::plain() }, |vms| {
        pattern(&vms.join("web.raw"), 96 * MIB, &[(0, 64 * MIB)], 91);
    })
    .await;
    let client = fleet.client.clone();
    let raw = fleet.vms().join("web.raw");
    let work = fleet.scratch.dir("work");
    convert(("raw", &raw), ("qcow2", &work.join("web.qcow2")), &[]);
    let base = fleet.vms().join("web.raw");
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.to_str().unwrap(), work.join("hostile.qcow2").to_str().unwrap()]);
    let web = uploaded(&client, &work.join("web.qcow2"), true).await;
    let hostile = uploaded(&client, &work.join("hostile.qcow2"), true).await;
    let open = uploaded(&client, &work.join("hostile.qcow2"), false).await;
    let body = |kind: &str, source: &str| json!({"type": kind, "source": source, "format": "qcow2", "agent": "agent-1"});
    // Both agents could: somebody has to say which.
    let sentence = client.post("/jobs", json!({"type": "convert", "source": web, "format": "raw"})).await.refused(409, "ambiguous");
    assert!(sentence.contains("agent-0, agent-1"), "{sentence}");
    let sentence = client.post("/jobs", body("convert", &format!("{open}/hostile.qcow2"))).await.refused(409, "conflict");
    assert!(sentence.contains("complete"), "{sentence}");
    client.post("/jobs", body("convert", "uploads/none.qcow2")).await.refused(404, "not_found");
    client.post("/jobs", body("convert", "uploads/../admin.qcow2")).await.refused(403, "outside_roots");
    client.post("/jobs", body("convert", "uploads/.parts/x.qcow2")).await.refused(404, "not_found");

    let mut dry = body("convert", &web);
    dry["options"] = json!({"dry_run": true});
    let plan = client.post("/jobs", dry).await.expect(200).body;
    assert!(plan["destination"]["free_bytes"].as_u64() > Some(0) && plan["warnings"].to_string().contains("fetched"), "{plan:#}");

    let mut slow = body("convert", &web);
    slow["options"] = json!({"bandwidth_limit": 24 * MIB, "compress": true});
    let id = client.create_job(slow).await;
    wait_for("a checkpoint", seconds(30), async || {
        let job = client.job(&id).await;
        if job["bytes_done"].as_u64() >= Some(16 * MIB) { Ok(()) } else { Err(brief(&job)) }
    })
    .await;
    let sentence = client.delete(&format!("/upload/{}", web.split('/').nth(1).unwrap())).await.refused(409, "conflict");
    assert!(sentence.contains(&id), "{sentence}");
    // A drain parks it: what was fetched stays, and so the checkpoint that hangs on it.
    fleet.agents[1].process().terminate(seconds(20)).await;
    assert!(fleet.scratch.join(&format!("agent-1/data/pulled/{id}/whole/web.qcow2")).is_file());
    fleet.agents[1].start();
    wait_for("the copy to go on", seconds(30), async || {
        let job = client.job(&id).await;
        if job["bytes_resumed"].as_u64() >= Some(8 * MIB) { Ok(()) } else { Err(brief(&job)) }
    })
    .await;
    fleet.agents[1].kill();
    fleet.agents[1].start();
    let job = client.completed(&id, seconds(90)).await;
    assert!(job["agent"] == "agent-1" && job["attempt"] == 3 && job["bytes_resumed"].as_u64() >= Some(8 * MIB), "{job:#}");
    identical(("raw", &raw), ("qcow2", &file_of(&job, ".qcow2")));

    let verified =
        client.completed(&client.create_job(json!({"type": "verify", "source": web, "agent": "agent-0"})).await, seconds(60)).await;
    assert_eq!(
        (&verified["result"]["checked"]["against"], &verified["result"]["files"][0]["path"]),
        (&json!("structure"), &json!(web)),
        "{verified:#}"
    );
    let mut import = body("import", &web);
    import["agent"] = json!("agent-0");
    let imported = client.completed(&client.create_job(import).await, seconds(60)).await;
    identical(("raw", &raw), ("qcow2", &file_of(&imported, ".qcow2")));
    // What a hostile upload names stays unread.
    let bad = client.ended(&client.create_job(body("convert", &hostile)).await, seconds(60)).await;
    assert_eq!((&bad["status"], &bad["error_code"]), (&json!("failed"), &json!("bad_image")), "{bad:#}");
    for agent in ["agent-0", "agent-1"] {
        wait_for("what was fetched to go", seconds(10), async || {
            let left = entries(&fleet.scratch.join(&format!("{agent}/data/pulled")));
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    }
}
