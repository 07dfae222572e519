//! A job from its creation to its end: told truly, stopped at once, found again; on SQLite and on Postgres.
//!
//! Owns: progress, live news, logs, cancel, retry, pause, idempotency, lists, estimates. Never: kills a process (survival does).
//! A crash here costs the test.

use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::client::{brief, file_of};
use crate::harness::fleet::{Database, Fleet, Plan};
use crate::harness::images::{identical, pattern};
use crate::harness::live::Live;
use crate::harness::{seconds, wait_for};

const MIB: u64 = 1 << 20;

/// Each test twice: the same code must hold on both databases.
macro_rules! on_both {
    ($($name:ident,)*) => {
        mod on_sqlite { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() { super::$name(super::Database::Sqlite).await; })* }
        mod on_postgres { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() { super::$name(super::Database::Postgres).await; })* }
    };
}

on_both! {
    progress_is_true_and_the_websocket_tells_the_whole_story,
    cancel_stops_the_bytes_and_leaves_nothing,
    pause_keeps_the_checkpoint_and_resume_goes_on_from_it,
    the_same_key_makes_one_job,
    lists_are_filtered_sorted_and_paged,
}

/// An installation with one VM of this much data at the head of a disk twice as large.
async fn fleet(name: &str, database: Database, data: u64) -> Fleet {
    let plan = Plan { database, ..Plan::plain() };
    Fleet::start(name, plan, |vms| pattern(&vms.join("web.raw"), 2 * data, &[(0, data)], 11)).await
}

/// The contract's formula, with verification.
fn percent(job: &Value) -> u64 {
    let field = |name: &str| job[name].as_u64().unwrap_or_default();
    (99 * (field("bytes_done") + field("bytes_verified"))).checked_div(2 * field("bytes_total")).unwrap_or_default()
}

async fn progress_is_true_and_the_websocket_tells_the_whole_story(database: Database) {
    let data = 160 * MIB;
    let fleet = fleet("progress", database, data).await;
    let client = &fleet.client;
    let bearer = [("Authorization", format!("Bearer {}", client.token.as_ref().unwrap()))];
    let mut live = Live::open(&client.base, "/ws", &bearer).await.unwrap();
    live.until("hello", seconds(5), |frame| frame["type"] == "hello").await;

    let id = client.export("web", "qcow2", json!({"bandwidth_limit": 48 * MIB})).await;
    // The log is followed from the first line to the end of the job, which ends the answer.
    let follow = client.request(Method::GET, &format!("/jobs/{id}/logs?follow=true"));
    let followed = tokio::spawn({
        let client = client.clone();
        async move { client.send(follow).await.unwrap().expect(200) }
    });
    let (mut last, mut seen, mut stages) = (0, 0, Vec::new());
    let job = loop {
        let job = client.job(&id).await;
        let progress = job["progress"].as_u64().unwrap();
        assert!(progress >= last, "progress fell from {last}: {job:#}");
        seen += u32::from(progress > last);
        last = progress;
        if stages.last() != Some(&job["stage"]) {
            stages.push(job["stage"].clone());
        }
        if job["status"] != "running" && job["status"] != "queued" {
            break job;
        }
        assert!(progress < 100, "100 is only for what is published: {job:#}");
        if job["bytes_total"].is_u64() {
            assert_eq!(
                (progress, job["bytes_total"].as_u64()),
                (percent(&job).min(99), Some(data)),
                "progress counts bytes on the disk: {job:#}"
            );
            assert!(job["bytes_done"].as_u64() <= Some(data) && job["bytes_verified"].as_u64() <= job["bytes_done"].as_u64(), "{job:#}");
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
    };
    assert!(job["status"] == "completed" && last == 100, "{job:#}\n{}", client.log(&id).await);
    assert!(seen >= 3, "progress moved in {seen} steps only");
    assert!(stages.contains(&json!("copying")) && stages.last() == Some(&json!("completed")), "{stages:?}");
    for field in ["created_at", "updated_at", "started_at", "finished_at"] {
        assert!(job[field].as_str().is_some_and(|time| time.ends_with('Z') && time.contains('T')), "{field}: {job:#}");
    }
    assert_eq!((&job["attempt"], &job["agent"]), (&json!(1), &json!("agent-0")), "{job:#}");
    identical(("raw", &fleet.vms().join("web.raw")), ("qcow2", &file_of(&job, ".qcow2")));

    live.until("job.completed", seconds(10), |frame| frame["type"] == "job.completed").await;
    let of_job = |frame: &&Value| frame["data"]["id"] == *id || frame["data"]["job"] == *id;
    let told: Vec<&Value> = live.seen.iter().filter(of_job).collect();
    let count = |kind: &str| told.iter().filter(|frame| frame["type"] == kind).count();
    let counts = ["job.created", "job.progress", "job.log", "job.completed"].map(count);
    assert!(counts[0] == 1 && counts[1] >= 3 && counts[2] >= 2 && counts[3] == 1, "{counts:?} {told:#?}");
    let first = |kind: &str| told.iter().position(|frame| frame["type"] == kind);
    assert!(first("job.created") < first("job.progress") && first("job.progress") < first("job.completed"), "{told:#?}");
    assert!(live.seen.windows(2).all(|pair| pair[0]["seq"].as_u64() <= pair[1]["seq"].as_u64()), "frames are numbered in order");
    let progress = |kind: &str| {
        told.iter().filter(|frame| frame["type"] == kind).filter_map(|frame| frame["data"]["progress"].as_u64()).collect::<Vec<_>>()
    };
    assert!(progress("job.progress").is_sorted(), "{:?}", progress("job.progress"));

    let followed = tokio::time::timeout(seconds(10), followed).await.expect("a followed log ends with its job").unwrap();
    assert!(followed.header("content-type").is_some_and(|kind| kind.contains("ndjson")), "{:?}", followed.headers);
    assert_eq!(followed.text, client.log(&id).await, "what was followed is what is stored");
    let lines = client.log_lines(&id).await.unwrap();
    for line in &lines {
        assert!(["time", "level", "stage", "message"].iter().all(|field| line[field].is_string()), "{line}");
    }
    sse(&fleet, &id, lines.len()).await;
}

/// The same log as server-sent events, and again from the middle.
async fn sse(fleet: &Fleet, id: &str, lines: usize) {
    let events = |last: Option<&str>| {
        let mut request = fleet.client.request(Method::GET, &format!("/jobs/{id}/logs")).header("Accept", "text/event-stream");
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        fleet.client.send(request)
    };
    let all = events(None).await.unwrap().expect(200);
    assert!(all.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream")), "{:?}", all.headers);
    let ids: Vec<&str> = all.text.lines().filter_map(|line| line.strip_prefix("id:")).map(str::trim).collect();
    assert_eq!((ids.len(), all.text.lines().filter(|line| line.starts_with("data:")).count() >= lines), (lines, true), "{}", all.text);
    let rest = events(Some(ids[0])).await.unwrap().expect(200);
    assert_eq!(rest.text.lines().filter(|line| line.starts_with("id:")).count(), lines - 1, "{}", rest.text);
}

/// Nothing lies in a folder, or what does.
fn entries(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

async fn cancel_stops_the_bytes_and_leaves_nothing(database: Database) {
    let fleet = fleet("cancel", database, 256 * MIB).await;
    let client = &fleet.client;
    let bearer = [("Authorization", format!("Bearer {}", client.token.as_ref().unwrap()))];
    let mut live = Live::open(&client.base, "/api/v1/ws", &bearer).await.unwrap();
    for (format, options) in [("raw", json!({})), ("qcow2", json!({"compress": true})), ("ova", json!({}))] {
        let mut options = options;
        options["bandwidth_limit"] = json!(24 * MIB);
        let id = client.export("web", format, options).await;
        wait_for("bytes in the part", seconds(20), async || {
            let job = client.job(&id).await;
            if job["stage"] == "copying" && !entries(&fleet.exports()).is_empty() { Ok(()) } else { Err(brief(&job)) }
        })
        .await;
        let start = Instant::now();
        let answer = client.delete(&format!("/jobs/{id}")).await.expect(202);
        assert_eq!((&answer.body["id"], answer.body["status"].as_str()), (&json!(id), Some("running")), "{}", answer.text);
        wait_for("no partial file and the end", seconds(5), async || {
            let job = client.job(&id).await;
            let left = entries(&fleet.exports());
            if job["status"] == "cancelled" && left.is_empty() { Ok(()) } else { Err(format!("{} left: {left:?}", brief(&job))) }
        })
        .await;
        println!("cancelled after {:?}", start.elapsed());
        let journals = entries(&fleet.agents[0].home().join("data/jobs"));
        assert!(!journals.iter().any(|name| name.contains(&id)), "a cancelled job's journal goes: {journals:?}");
        live.until("job.cancelled", seconds(5), |frame| frame["type"] == "job.cancelled" && frame["data"]["id"] == *id).await;
        let sentence = client.delete(&format!("/jobs/{id}")).await.refused(409, "conflict");
        assert!(sentence.contains("cancelled"), "{sentence}");
    }
    // A job that waits is cancelled at once; one that ended well cannot be.
    let waits = client.export("web", "raw", json!({"bandwidth_limit": MIB})).await;
    client.post(&format!("/jobs/{waits}/pause"), json!({})).await.expect(200);
    client.delete(&format!("/jobs/{waits}")).await.expect(202);
    assert_eq!(client.ended(&waits, seconds(5)).await["status"], "cancelled");
    // A cancelled job runs again when somebody wants it to.
    let again = client.post(&format!("/jobs/{waits}/retry"), json!({})).await;
    assert!(again.status == 202 || again.status == 200, "{} {}", again.status, again.text);
    client.in_stage(&waits, &["preparing", "copying"], seconds(20)).await;
    client.delete(&format!("/jobs/{waits}")).await.expect(202);
    let done = client.completed(&client.export("web", "qcow2", json!({})).await, seconds(60)).await;
    client.delete(&format!("/jobs/{}", done["id"].as_str().unwrap())).await.refused(409, "conflict");
    let sentence = client.post(&format!("/jobs/{}/retry", done["id"].as_str().unwrap()), json!({})).await.refused(409, "conflict");
    assert!(sentence.contains("completed"), "{sentence}");
}

async fn pause_keeps_the_checkpoint_and_resume_goes_on_from_it(database: Database) {
    let data = 256 * MIB;
    let fleet = fleet("pause", database, data).await;
    let client = &fleet.client;
    let id = client.export("web", "qcow2", json!({"compress": true, "bandwidth_limit": 64 * MIB})).await;
    wait_for("a checkpoint", seconds(20), async || {
        let job = client.job(&id).await;
        if job["bytes_done"].as_u64() >= Some(64 * MIB) { Ok(()) } else { Err(brief(&job)) }
    })
    .await;
    let paused = client.post(&format!("/jobs/{id}/pause"), json!({})).await.expect(200);
    assert_eq!((paused.body["status"].as_str(), paused.body["stage"].as_str()), (Some("queued"), Some("paused")), "{}", paused.text);
    client.post(&format!("/jobs/{id}/retry"), json!({})).await.refused(409, "conflict");
    let before = client.job(&id).await["bytes_done"].as_u64().unwrap();
    tokio::time::sleep(seconds(2)).await;
    let at_rest = client.job(&id).await;
    assert_eq!((at_rest["status"].as_str(), at_rest["stage"].as_str()), (Some("queued"), Some("paused")), "{at_rest:#}");
    assert!(entries(&fleet.exports()).iter().any(|name| name.contains(&id)), "the part stays while a job is paused");
    client.post(&format!("/jobs/{id}/resume"), json!({})).await.expect(200);
    let job = client.completed(&id, seconds(60)).await;
    assert_eq!(job["attempt"], 2, "{job:#}");
    let resumed = job["bytes_resumed"].as_u64().unwrap();
    assert!(resumed >= before, "{resumed} bytes were taken over, {before} were on the disk: {job:#}");
    let read = job["result"]["counters"]["bytes_read"].as_u64().unwrap_or_else(|| panic!("{job:#}"));
    assert_eq!(read + resumed, data, "the second attempt read what was left, no more: {job:#}");
    identical(("raw", &fleet.vms().join("web.raw")), ("qcow2", &file_of(&job, ".qcow2")));
}

async fn the_same_key_makes_one_job(database: Database) {
    let fleet = fleet("key", database, 4 * MIB).await;
    let client = &fleet.client;
    let body = json!({"type": "export", "provider": "local", "vm_name": "web", "format": "qcow2", "options": {"compress": true}});
    let create = |body: Value| client.send(client.request(Method::POST, "/jobs").header("Idempotency-Key", "night-shift-1").json(&body));
    let answers = join_all((0..8).map(|_| create(body.clone()))).await;
    let ids: std::collections::BTreeSet<String> = answers
        .into_iter()
        .map(|answer| answer.unwrap())
        // While the first of them is still being answered another may be told to come again.
        .filter(|answer| answer.status == 201)
        .map(|answer| answer.body["id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
    let again = create(body.clone()).await.unwrap().expect(201);
    assert!(ids.contains(again.body["id"].as_str().unwrap()), "{}", again.text);
    let location = again.header("location").unwrap();
    assert!(location.ends_with(again.body["id"].as_str().unwrap()), "{location}");
    let mut other = body;
    other["format"] = json!("raw");
    create(other).await.unwrap().refused(409, "idempotency_mismatch");
    assert_eq!(client.get("/jobs").await.body["pagination"]["total"], 1);
}

async fn lists_are_filtered_sorted_and_paged(database: Database) {
    let fleet = fleet("lists", database, 2 * MIB).await;
    let client = &fleet.client;
    pattern(&fleet.vms().join("Prod-DB.raw"), 4 * MIB, &[(0, MIB)], 5);
    assert_eq!(fleet.refresh().await.len(), 2);
    let mut ids = Vec::new();
    for n in 0..7 {
        ids.push(
            client.export(if n < 3 { "web" } else { "Prod-DB" }, if n % 2 == 0 { "raw" } else { "qcow2" }, json!({"priority": n})).await,
        );
    }
    for id in &ids {
        client.completed(id, seconds(60)).await;
    }
    let total = async |query: &str| {
        let page = client.get(&format!("/jobs?{query}")).await.expect(200).body;
        assert_eq!(page["data"].as_array().unwrap().len() as u64, page["pagination"]["total"].as_u64().unwrap(), "{query}: {page:#}");
        page["pagination"]["total"].as_u64().unwrap()
    };
    let middle = client.job(&ids[3]).await["created_at"].as_str().unwrap().to_owned();
    for (query, count) in [
        ("status=completed", 7),
        ("status=failed", 0),
        ("type=export&status=completed&provider=local", 7),
        ("search=PROD", 4),
        (&format!("search={}", &ids[2][6..]), 1),
        (&format!("created_before={middle}"), 3),
        ("created_after=2099-01-01T00:00:00Z", 0),
        ("created_after=2025-01-01T00:00:00Z&created_before=2099-12-31T23:59:59Z", 7),
    ] {
        assert_eq!(total(query).await, count, "{query}");
    }
    // Pages of two, newest first, cover everything once.
    let mut found: Vec<String> = Vec::new();
    loop {
        let page = client.get(&format!("/jobs?offset={}&limit=2", found.len())).await.expect(200).body;
        assert_eq!((&page["pagination"]["limit"], &page["pagination"]["total"]), (&json!(2), &json!(7)), "{page:#}");
        found.extend(page["data"].as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()));
        if page["pagination"]["has_more"] == false {
            break;
        }
    }
    ids.reverse();
    assert_eq!(found, ids);
    let oldest = client.get("/jobs?sort=created_at&order=asc&limit=1").await.expect(200).body;
    assert_eq!(oldest["data"][0]["id"], ids[6]);

    // After a measured job the next one knows how long it will take, before it starts.
    let answer = client.post("/jobs", json!({"type": "export", "provider": "local", "vm_name": "web", "format": "raw"})).await.expect(201);
    let words = answer.body["estimated_duration"].as_str().unwrap_or_else(|| panic!("{}", answer.text)).to_owned();
    assert!(words.ends_with('s') && words.trim_end_matches('s').parse::<u64>().is_ok_and(|seconds| seconds <= 10), "2 MiB take {words}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_of_a_log_holds_nobody_up() {
    let fleet = fleet("reader", Database::Sqlite, 32 * MIB).await;
    let id = fleet.client.export("web", "raw", json!({"bandwidth_limit": 16 * MIB})).await;
    let request = fleet.client.request(Method::GET, &format!("/jobs/{id}/logs?follow=true"));
    let response = request.send().await.unwrap();
    let mut stream = response.bytes_stream();
    let first = stream.next().await.expect("a first line").unwrap();
    assert!(!first.is_empty());
    // Nobody reads on, and the job ends all the same.
    fleet.client.completed(&id, seconds(60)).await;
    assert!(fleet.client.log_lines(&id).await.unwrap().len() >= 2);
}
