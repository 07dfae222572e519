//! What lies in the roots of the controller and of its agents: looked at, downloaded by ranges, removed; and no way out of a root.
//!
//! Owns: `/browse/files`, `/download`, `/jobs/{id}/manifest`, `/exports/{id}`. Never: shares a file system with the agent (it compares only).
//! A crash here costs the test.

use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::client::{Client, brief, file_of};
use crate::harness::fleet::{Fleet, Plan};
use crate::harness::images::{pattern, sha256};
use crate::harness::process::run;
use crate::harness::{seconds, wait_for};

const MIB: u64 = 1 << 20;

async fn fetch(client: &Client, method: Method, path: &str, headers: &[(&str, &str)]) -> reqwest::Response {
    let mut request = client.request(method, &format!("/download?path={path}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.send().await.unwrap()
}

fn header<'a>(response: &'a reqwest::Response, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_is_downloaded_from_its_agent_and_goes_when_it_is_told_to() {
    let mut fleet = Fleet::start("files", Plan::plain(), |vms| {
        pattern(&vms.join("web.raw"), 64 * MIB, &[(0, 24 * MIB)], 3);
        std::fs::write(vms.parent().unwrap().join("secret.raw"), b"secret").unwrap();
        std::os::unix::fs::symlink("../secret.raw", vms.join("way-out.raw")).unwrap();
        std::os::unix::fs::symlink("..", vms.join("folder-out")).unwrap();
    })
    .await;
    let client = fleet.client.clone();
    let job = client.completed(&client.export("web", "qcow2", json!({})).await, seconds(60)).await;
    let (id, path) = (job["id"].as_str().unwrap().to_owned(), file_of(&job, ".qcow2"));
    let content = std::fs::read(&path).unwrap();
    let (size, absolute) = (content.len(), path.display().to_string());
    let named = format!("exports/{id}/web.qcow2");

    // Whole, by both kinds of path.
    let whole = fetch(&client, Method::GET, &absolute, &[]).await;
    assert_eq!((whole.status().as_u16(), header(&whole, "accept-ranges")), (200, "bytes"));
    assert_eq!(header(&whole, "content-length"), size.to_string());
    assert!(header(&whole, "content-disposition").starts_with("attachment; filename=\"web.qcow2\""), "{:?}", whole.headers());
    assert!(whole.headers().get("content-encoding").is_none());
    let (tag, modified) = (header(&whole, "etag").to_owned(), header(&whole, "last-modified").to_owned());
    assert!(tag.starts_with('"') && modified.ends_with("GMT"), "{tag} {modified}");
    assert!(whole.bytes().await.unwrap() == content);
    assert!(fetch(&client, Method::GET, &named, &[]).await.bytes().await.unwrap() == content);
    let head = fetch(&client, Method::HEAD, &named, &[]).await;
    assert_eq!(
        (head.status().as_u16(), header(&head, "content-length"), header(&head, "etag")),
        (200, size.to_string().as_str(), tag.as_str())
    );
    assert!(head.bytes().await.unwrap().is_empty());

    // Ranges, over the seams of what is read at a time.
    for (range, from, to) in [
        ("bytes=0-0".to_owned(), 0, 1),
        ("bytes=262143-262145".to_owned(), 262_143, 262_146),
        ("bytes=100-3000099".to_owned(), 100, 3_000_100),
        (format!("bytes={}-", size - 7), size - 7, size),
        ("bytes=-1000".to_owned(), size - 1000, size),
        (format!("bytes=5-{}", size * 2), 5, size),
    ] {
        let part = fetch(&client, Method::GET, &named, &[("Range", &range), ("If-Range", &tag)]).await;
        assert_eq!(part.status(), 206, "{range}");
        assert_eq!(header(&part, "content-range"), format!("bytes {from}-{}/{size}", to - 1));
        assert!(part.bytes().await.unwrap() == content[from..to], "{range}");
    }
    for (headers, status) in [
        (vec![("Range", "bytes=0-1,5-6")], 200),
        (vec![("Range", "bytes=0-1"), ("If-Range", "\"other\"")], 200),
        (vec![("Range", "bytes=0-1"), ("If-Range", modified.as_str())], 206),
        (vec![("If-None-Match", tag.as_str())], 304),
    ] {
        assert_eq!(fetch(&client, Method::GET, &named, &headers).await.status(), status, "{headers:?}");
    }
    let beyond = fetch(&client, Method::GET, &named, &[("Range", "bytes=99999999999-")]).await;
    assert_eq!((beyond.status().as_u16(), header(&beyond, "content-range")), (416, format!("bytes */{size}").as_str()));
    let body: Value = beyond.json().await.unwrap();
    assert_eq!(body["code"], "range_not_satisfiable");

    // curl goes on where it was cut off.
    let file = fleet.scratch.join("resumed");
    let curl = |more: &[&str]| {
        let url = format!("{}/api/v1/download?path={named}", client.base);
        let bearer = format!("Authorization: Bearer {}", client.token.as_ref().unwrap());
        run(Command::new("curl").args(["-sSkf", "-H", &bearer, "-o"]).arg(&file).args(more).arg(url))
    };
    curl(&["-r", "0-1234566"]);
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 1_234_567);
    curl(&["-C", "-"]);
    assert_eq!(sha256(&file), sha256(&path));

    no_way_out(&fleet).await;
    listings(&fleet, &id).await;

    // The manifest, and what is gone.
    let manifest = client.get(&format!("/jobs/{id}/manifest")).await.expect(200);
    assert_eq!(manifest.text.as_bytes(), std::fs::read(job["result"]["manifest"].as_str().unwrap()).unwrap());
    client.get("/jobs/job-0000000000000000/manifest").await.refused(404, "not_found");
    let running = client.export("web", "raw", json!({"bandwidth_limit": MIB})).await;
    client.in_stage(&running, &["copying"], seconds(20)).await;
    client.get(&format!("/jobs/{running}/manifest")).await.refused(409, "conflict");
    client.delete(&format!("/exports/{running}")).await.refused(409, "conflict");
    client.delete(&format!("/jobs/{running}")).await.expect(202);
    client.ended(&running, seconds(20)).await;
    client.delete(&format!("/exports/{running}")).await.refused(404, "not_found");
    client.delete(&format!("/exports/{id}")).await.expect(204);
    assert!(!path.parent().unwrap().exists());
    client.delete(&format!("/exports/{id}")).await.refused(404, "not_found");
    client.get(&format!("/jobs/{id}/manifest")).await.refused(404, "not_found");
    client.get(&format!("/download?path={named}")).await.refused(404, "not_found");
    assert!(client.job(&id).await["result"]["removed_at"].is_string());
    let audit = client.get("/audit?search=export.delete").await.expect(200).body;
    assert!(audit["data"].as_array().unwrap().iter().any(|row| row["target"] == id && row["outcome"] == "ok"), "{audit:#}");

    // Retention does the same by itself. Then the agent goes: that is told as such.
    let job = client.completed(&client.export("web", "qcow2", json!({})).await, seconds(60)).await;
    fleet.controller.set("EXPORTS_RETENTION_DAYS", "0.00002");
    fleet.restart_controller().await;
    let gone = file_of(&job, ".qcow2");
    wait_for("the retention to remove an export", seconds(40), async || if gone.exists() { Err(brief(&job)) } else { Ok(()) }).await;
    fleet.agents[0].kill();
    wait_for("the agent to be missed", seconds(30), async || {
        let answer = client.get("/download?path=vms/web.raw").await;
        if answer.status == 503 { Ok(answer.refused(503, "unavailable")) } else { Err(format!("{} {}", answer.status, answer.text.len())) }
    })
    .await;
}

/// Every way out of a root is a 403, whatever its spelling.
async fn no_way_out(fleet: &Fleet) {
    let client = &fleet.client;
    let above = fleet.scratch.join("agent-0/secret.raw").display().to_string();
    for path in [
        "/etc/passwd",
        "%2Fetc%2Fpasswd",
        "vms/../secret.raw",
        "vms%2F..%2Fsecret.raw",
        "vms/%2e%2e/secret.raw",
        "vms/sub/../../secret.raw",
        "exports/../../../../etc/passwd",
        "uploads/../hypersdk.db",
        "uploads%2f%2e%2e%2fhypersdk.db",
        "vms/way-out.raw",
        "vms/folder-out/secret.raw",
        "vmsx/web.raw",
        "..",
        "file:///etc/passwd",
        above.as_str(),
    ] {
        for operation in ["download", "browse/files"] {
            let answer = client.get(&format!("/{operation}?path={path}")).await;
            let sentence = answer.refused(403, "outside_roots");
            assert!(sentence.contains("vms/"), "{operation} {path}: {sentence}");
        }
    }
    // What was encoded twice is a plain name that is not there.
    client.get("/download?path=vms/%252e%252e/secret.raw").await.refused(404, "not_found");
    client.get("/download?path=vms/web.raw%00").await.refused(400, "bad_request");
    client.get("/download").await.refused(400, "bad_request");
    client.get("/download?path=vms/none").await.refused(404, "not_found");
    client.get("/download?path=vms").await.refused(422, "unprocessable");
    client.get("/download?path=vms/web.raw&agent=nobody").await.refused(404, "not_found");
    client.get("/browse/files?path=vms/web.raw").await.refused(422, "unprocessable");
    client.anonymous().get("/download?path=vms/web.raw").await.refused(401, "unauthorized");
}

async fn listings(fleet: &Fleet, job: &str) {
    let client = &fleet.client;
    let roots = client.get("/browse/files").await.expect(200).body;
    let shown: Vec<(&str, Option<&str>)> =
        roots["data"].as_array().unwrap().iter().map(|row| (row["path"].as_str().unwrap(), row["agent"].as_str())).collect();
    let there = Some("agent-0");
    assert_eq!(shown, [("exports", there), ("images", there), ("uploads", None), ("vms", there)], "{roots:#}");
    let page = client.get("/browse/files?path=vms").await.expect(200).body;
    let row = |name: &str| page["data"].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{page:#}"));
    let web = row("web.raw");
    assert_eq!((&web["type"], &web["size"], &web["format"]), (&json!("file"), &json!(64 * MIB), &json!("raw")));
    assert!(web["path"] == "vms/web.raw" && web["modified_at"].as_str().is_some_and(|time| time.ends_with('Z')), "{web}");
    assert_eq!(
        (&row("way-out.raw")["type"], &row("way-out.raw")["size"], &row("folder-out")["type"]),
        (&json!("link"), &json!(0), &json!("link"))
    );
    let one = client.get("/browse/files?path=vms&sort=size&order=desc&limit=1&agent=agent-0").await.expect(200).body;
    assert_eq!(
        (&one["data"][0]["name"], &one["pagination"]["total"], &one["pagination"]["has_more"]),
        (&json!("web.raw"), &json!(3), &json!(true))
    );
    assert_eq!(client.get("/browse/files?path=vms&search=WEB").await.expect(200).body["pagination"]["total"], 1);
    let folder = client.get(&format!("/browse/files?path=exports/{job}&search=qcow2")).await.expect(200).body;
    assert_eq!((&folder["data"][0]["name"], &folder["data"][0]["format"]), (&json!("web.qcow2"), &json!("qcow2")), "{folder:#}");
    for wrong in ["sort=colour", "limit=0", "colour=red"] {
        client.get(&format!("/browse/files?path=vms&{wrong}")).await.refused(400, "bad_request");
    }
}
