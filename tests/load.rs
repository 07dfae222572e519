//! Many at once: long lists, many new jobs, many watchers.
//!
//! Owns: what must hold under load, and in the room `long` the figures. Never: fails an everyday run because the machine was slow: what is
//! timed is in `long`. A crash here costs the test.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::client::Client;
use crate::harness::fleet::{Database, Fleet, Plan, ready};
use crate::harness::images::pattern;
use crate::harness::live::{Live, Socket, connect};
use crate::harness::process::run;
use crate::harness::{seconds, wait_for};

async fn installation(name: &str, database: Database, agents: usize) -> Fleet {
    let plan = Plan { database, agents, ..Plan::plain() };
    Fleet::start(name, plan, |vms| pattern(&vms.join("web.raw"), 1 << 20, &[(0, 4096)], 1)).await
}

/// Finished jobs as if they had run: `vm-000001` and on, one status in five, three connections of two kinds.
const SEED: &str = include_str!("lab/seed.sql");

/// Puts so many finished jobs into a stopped installation.
fn seed(fleet: &Fleet, count: u64) {
    match &fleet.db {
        Some(db) => {
            let numbers = format!("(SELECT n FROM generate_series(1, {count}) AS n) AS numbers");
            let sql = SEED
                .replace("CHAR10", "chr(10)")
                .replace("ID AS", "lpad(to_hex(n), 16, '0') AS")
                .replace("NAME AS", "lpad(n::text, 6, '0') AS");
            db.sql(&sql.replace("NUMBERS", &numbers));
            db.sql("VACUUM ANALYZE jobs");
        }
        None => {
            let numbers = format!("(WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {count}) SELECT n FROM c)");
            let sql =
                SEED.replace("CHAR10", "char(10)").replace("ID AS", "printf('%016x', n) AS").replace("NAME AS", "printf('%06d', n) AS");
            let file = fleet.controller.home().join("data/hypersdk.db");
            run(std::process::Command::new("sqlite3").arg(file).arg(sql.replace("NUMBERS", &numbers)));
        }
    }
}

async fn seeded(name: &str, database: Database, count: u64) -> Fleet {
    let mut fleet = installation(name, database, 0).await;
    fleet.controller.process().terminate(seconds(30)).await;
    seed(&fleet, count);
    fleet.controller.start();
    ready(&mut fleet.controller, &fleet.client).await;
    fleet
}

/// Queries of the API and the index that each stands on.
const QUERIES: [(&str, &str); 10] = [
    ("", "jobs_by_created"),
    ("status=completed", "jobs_list_status"),
    ("status=completed&sort=updated_at&order=desc", "jobs_list_status_updated"),
    ("provider=vsphere", "jobs_list_kind"),
    ("provider=dc1", "jobs_list_provider"),
    ("provider=vsphere&status=failed", "jobs_list_kind_status"),
    ("provider=dc1&status=failed", "jobs_list_provider_status"),
    ("sort=vm_name", "jobs_list_name"),
    ("sort=priority&order=desc", "jobs_list_priority"),
    ("search=vm-004242", "jobs_search"),
];

/// What the running product asks is answered from the index that was made for it: Postgres counts each index's uses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_stand_on_indexes_on_postgres() {
    let fleet = seeded("indexes", Database::Postgres, 20_000).await;
    let db = fleet.db.as_ref().unwrap();
    let uses = |index: &str| {
        let names = format!("indexrelname IN ('{index}', 'jobs_by_created')");
        db.sql(&format!("SELECT sum(idx_scan) FROM pg_stat_user_indexes WHERE {names}")).trim().parse::<u64>().unwrap()
    };
    let whole = || db.sql("SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'jobs'").trim().parse::<u64>().unwrap();
    let mut read_whole = None;
    for (query, index) in QUERIES {
        let before = uses(index);
        let page = fleet.client.get(&format!("/jobs?{query}")).await.expect(200).body;
        assert!(!page["data"].as_array().unwrap().is_empty() && page["pagination"]["total"].as_u64().unwrap() > 0, "{query}: {page:#}");
        // What most rows have, the planner finds sooner by walking the list's own order: that is an index, too.
        wait_for(&format!("{query} to use {index}"), seconds(15), async || {
            // A page more: the first may have been counted before its time.
            fleet.client.get(&format!("/jobs?{query}")).await.expect(200);
            if uses(index) > before {
                Ok(())
            } else {
                Err(db.sql("SELECT indexrelname, idx_scan FROM pg_stat_user_indexes WHERE relname = 'jobs'"))
            }
        })
        .await;
        // The first wait has brought the start's own look at all jobs into the figures.
        let (now, was) = (whole(), read_whole.unwrap_or_else(&whole));
        assert!(now - was < 10_000, "{query} read the whole table: {was} rows before, {now} after");
        read_whole = Some(now);
    }
}

/// Pages by counting while clients make jobs: every job that stood before comes once.
async fn pages_hold_together(database: Database) {
    let mut fleet = installation("pages", database, 1).await;
    // Nothing runs, nothing ends: jobs are made, and that is all.
    fleet.agents[0].kill();
    fleet.controller.process().terminate(seconds(30)).await;
    seed(&fleet, 1_000);
    fleet.controller.start();
    ready(&mut fleet.controller, &fleet.client).await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (client, stopped) = (fleet.client.clone(), stop.clone());
    let writer = tokio::spawn(async move {
        let mut made = 0;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            client.export("web", "raw", json!({"verify": false})).await;
            made += 1;
        }
        made
    });
    let stood: BTreeSet<String> = (1..=1_000).map(|n| format!("job-{n:016x}")).collect();
    for sort in ["", "&sort=created_at&order=asc", "&sort=vm_name", "&sort=priority&order=desc"] {
        let (mut seen, mut offset) = (Vec::new(), 0);
        loop {
            let page = fleet.client.get(&format!("/jobs?limit=40&offset={offset}{sort}")).await.expect(200).body;
            let rows = page["data"].as_array().unwrap();
            seen.extend(rows.iter().map(|row| row["id"].as_str().unwrap().to_owned()));
            offset += rows.len();
            if page["pagination"]["has_more"] == false {
                break;
            }
        }
        let once: BTreeSet<String> = seen.iter().cloned().collect();
        assert_eq!(once.len(), seen.len(), "{sort}: a job was shown twice");
        assert_eq!(stood.difference(&once).count(), 0, "{sort}: a job that stood all along was skipped");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(writer.await.unwrap() > 10, "nobody wrote");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_hold_together_while_jobs_are_made() {
    pages_hold_together(Database::Sqlite).await;
    pages_hold_together(Database::Postgres).await;
}

/// So many jobs by so many clients; answers their ids and how long it took.
async fn create(client: &Client, clients: usize, each: usize) -> (Vec<String>, Duration) {
    let start = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut ids = Vec::new();
                for _ in 0..each {
                    ids.push(client.export("web", "raw", json!({"priority": 1})).await);
                }
                ids
            })
        })
        .collect();
    let mut ids = Vec::new();
    for task in tasks {
        ids.extend(task.await.unwrap());
    }
    (ids, start.elapsed())
}

/// What was answered 201 is there after a kill, with its log; twins with one key are one job, whoever else is in their transaction.
async fn many_jobs_are_made_at_once(database: Database) {
    let mut fleet = installation("intake", database, 1).await;
    // Nothing runs: what is counted is what was made.
    fleet.agents[0].kill();
    let body = json!({"type": "export", "provider": "local", "vm_name": "web", "format": "raw"});
    let twin = |key: usize| {
        let request = fleet.client.request(reqwest::Method::POST, "/jobs").header("Idempotency-Key", format!("k{key}")).json(&body);
        let client = fleet.client.clone();
        tokio::spawn(async move { client.send(request).await.unwrap().expect(201).body["id"].as_str().unwrap().to_owned() })
    };
    let twins: Vec<_> = (0..40).map(|n| (n / 4, twin(n / 4))).collect();
    let (mut ids, _) = create(&fleet.client, 16, 20).await;
    let mut by_key = std::collections::BTreeMap::<usize, BTreeSet<String>>::new();
    for (key, twin) in twins {
        by_key.entry(key).or_default().insert(twin.await.unwrap());
    }
    assert!(by_key.len() == 10 && by_key.values().all(|ids| ids.len() == 1), "{by_key:?}");
    ids.extend(by_key.into_values().flatten());
    fleet.restart_controller().await;
    let page = fleet.client.get("/jobs?limit=1").await.expect(200).body;
    assert_eq!(page["pagination"]["total"], ids.len());
    for id in &ids {
        fleet.client.get(&format!("/jobs/{id}")).await.expect(200);
        let lines = fleet.client.log_lines(id).await.unwrap();
        assert!(lines.first().is_some_and(|line| line["message"].as_str().unwrap().contains("is queued")), "{id}: {lines:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_jobs_are_made_at_once_and_each_is_kept() {
    many_jobs_are_made_at_once(Database::Sqlite).await;
    many_jobs_are_made_at_once(Database::Postgres).await;
}

/// Resident memory of the controller in KiB.
fn resident(fleet: &mut Fleet) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", fleet.controller.process().pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

/// Makes a job and waits until every watcher heard of it; the longest wait since the answer.
async fn everybody_hears(fleet: &Fleet, watchers: &mut [Live]) -> Duration {
    let id = fleet.client.export("web", "raw", json!({})).await;
    let start = Instant::now();
    let mut last = Duration::ZERO;
    for watcher in watchers {
        watcher.until("the new job", seconds(30), |frame| frame["type"] == "job.created" && frame["data"]["id"] == *id).await;
        watcher.seen.clear();
        last = last.max(start.elapsed());
    }
    last
}

/// Watchers of whom a tenth never reads: what everybody heard after how long, and KiB for each watcher after a first and a second flood.
async fn watched(fleet: &mut Fleet, clients: usize, flood: usize) -> (Duration, f64, f64) {
    let bearer = [("authorization", format!("Bearer {}", fleet.client.token.as_deref().unwrap()))];
    create(&fleet.client, 4, 20).await;
    let before = resident(fleet);
    let mut deaf: Vec<Socket> = Vec::new();
    let mut watchers = Vec::new();
    for number in 0..clients {
        if number % 10 == 0 {
            deaf.push(connect(&fleet.endpoints.rest, "/ws", &bearer).await.unwrap());
        } else {
            watchers.push(Live::open(&fleet.endpoints.rest, "/ws", &bearer).await.unwrap());
        }
    }
    let mut longest = Duration::ZERO;
    let mut after = [0.0; 2];
    for round in &mut after {
        create(&fleet.client, 4, flood / 4).await;
        // Who reads has read all of the flood by then; the next ones are timed.
        everybody_hears(fleet, &mut watchers).await;
        for _ in 0..5 {
            longest = longest.max(everybody_hears(fleet, &mut watchers).await);
        }
        *round = resident(fleet).saturating_sub(before) as f64 / clients as f64;
    }
    (longest, after[0], after[1])
}

/// Deaf watchers hold nobody up; what they cost is bounded. The agent is away, so that the news are those of the flood alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deaf_watchers_hold_nobody_up() {
    let mut fleet = installation("watchers", Database::Sqlite, 1).await;
    fleet.agents[0].kill();
    let (longest, first, second) = watched(&mut fleet, 100, 400).await;
    println!("100 watchers, 10 deaf: all heard within {longest:?}; {first:.0} KiB for each, {second:.0} KiB after the second flood");
}
