//! Schedules as a client meets them, and their clock on real processes: two controllers over one Postgres, and kills.
//!
//! Owns: what the contract says of `/schedules`. Never: turns a clock (the room's own tests do that). A crash here costs the test.

use std::collections::BTreeSet;
use std::time::Instant;

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::client::Client;
use crate::harness::fleet::{Database, Fleet, PASSWORD, Plan, ready};
use crate::harness::images::pattern;
use crate::harness::{seconds, wait_for};

const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_life_of_a_schedule_on_sqlite() {
    whole_life(Database::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_life_of_a_schedule_on_postgres() {
    whole_life(Database::Postgres).await;
}

async fn fleet(name: &str, database: Database) -> Fleet {
    let plan = Plan { database, ..Plan::plain() };
    Fleet::start(name, plan, |vms| {
        pattern(&vms.join("web.raw"), 4 * MIB, &[(0, MIB)], 1);
        pattern(&vms.join("gone.raw"), 4 * MIB, &[(0, MIB)], 2);
    })
    .await
}

fn job(vm: &str) -> Value {
    json!({"type": "export", "provider": "local", "vm_name": vm, "format": "raw", "options": {"destination": "exports/night"}})
}

async fn patch(client: &Client, path: &str, body: Value) -> crate::harness::client::Answer {
    client.send(client.request(Method::PATCH, path).json(&body)).await.unwrap()
}

async fn keyed(client: &Client, path: &str, key: &str, body: Option<&Value>) -> crate::harness::client::Answer {
    let request = client.request(Method::POST, path).header("Idempotency-Key", key);
    client
        .send(match body {
            Some(body) => request.json(body),
            None => request,
        })
        .await
        .unwrap()
}

async fn whole_life(database: Database) {
    let fleet = fleet("schedules", database).await;
    let client = &fleet.client;
    let nightly =
        json!({"name": "Nightly web", "cron": "30 2 * * mon-fri", "timezone": "Europe/Berlin", "job": job("web"), "catch_up": "once"});
    let made = keyed(client, "/schedules", "night", Some(&nightly)).await.expect(201);
    let id = made.body["id"].as_str().unwrap().to_owned();
    assert!(id.strip_prefix("sched-").is_some_and(|hex| hex.len() >= 8 && hex.bytes().all(|byte| byte.is_ascii_hexdigit())), "{id}");
    assert!(made.header("location").is_some_and(|location| location.ends_with(&format!("/schedules/{id}"))), "{:?}", made.headers);
    for (field, value) in [
        ("name", json!("Nightly web")),
        ("cron", json!("30 2 * * mon-fri")),
        ("timezone", json!("Europe/Berlin")),
        ("job", job("web")),
        ("enabled", json!(true)),
        ("overlap", json!("skip")),
        ("catch_up", json!("once")),
        ("carbon_aware", json!(false)),
        ("last_run", json!(null)),
        ("created_by", json!("admin")),
    ] {
        assert_eq!(made.body[field], value, "{field}: {:#}", made.body);
    }
    let next: Vec<&str> = made.body["next_runs"].as_array().unwrap().iter().map(|time| time.as_str().unwrap()).collect();
    assert!(next.len() == 5 && next.is_sorted() && made.body["next_run"] == next[0], "{:#}", made.body);
    // 02:30 in Berlin is 01:30 or 00:30 in UTC.
    assert!(next.iter().all(|time| time.ends_with("T01:30:00.000Z") || time.ends_with("T00:30:00.000Z")), "{next:?}");
    assert_eq!(client.get(&format!("/schedules/{id}")).await.expect(200).body, made.body);
    // The same key makes no second one; another body is refused.
    let again = keyed(client, "/schedules", "night", Some(&nightly)).await.expect(201);
    assert_eq!((&again.body["id"], again.header("idempotent-replayed")), (&json!(id), Some("true")));
    let mut other = nightly.clone();
    other["name"] = json!("Other");
    keyed(client, "/schedules", "night", Some(&other)).await.refused(409, "idempotency_mismatch");

    refusals(client, &nightly).await;

    // A list: filters, search, order, pages.
    let hourly = json!({"name": "an hourly one", "cron": "@hourly", "job": job("gone"), "enabled": false, "overlap": "queue"});
    let hourly = client.post("/schedules", hourly).await.expect(201).body;
    assert_eq!((&hourly["next_run"], &hourly["next_runs"], &hourly["timezone"]), (&json!(null), &json!([]), &json!("UTC")), "{hourly:#}");
    let names = async |query: &str| {
        let page = client.get(&format!("/schedules{query}")).await.expect(200).body;
        page["data"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let (web, hour) = ("Nightly web", "an hourly one");
    assert_eq!(names("").await, [hour, web], "by name, without regard to case");
    assert_eq!(names("?sort=created_at&order=desc").await, [hour, web]);
    assert_eq!(names("?sort=next_run").await, [web, hour], "what does not come stands last");
    assert_eq!(names("?limit=1&offset=1").await, [web]);
    assert_eq!(names("?search=NIGHTLY").await, [web]);
    assert_eq!(names(&format!("?search={}", &id[6..])).await, [web]);
    assert_eq!(names("?enabled=false").await, [hour]);
    assert_eq!(names("?provider=local&created_after=2020-01-01T00:00:00Z").await.len(), 2);
    assert_eq!(names("?created_before=2020-01-01T00:00:00Z").await.len(), 0);
    assert_eq!(names("?provider=vsphere").await.len(), 0);
    for wrong in ["colour=red", "sort=cron", "enabled=maybe", "created_after=soon", "limit=0"] {
        client.get(&format!("/schedules?{wrong}")).await.refused(400, "bad_request");
        if !wrong.starts_with("created") && !wrong.starts_with("enabled") {
            client.get(&format!("/schedules/{id}/runs?{wrong}")).await.refused(400, "bad_request");
        }
    }

    // Run now: a job, and the run says which; the same key makes no second one.
    let run = keyed(client, &format!("/schedules/{id}/run"), "now", None).await.expect(201).body;
    assert_eq!((&run["run"]["status"], &run["run"]["cause"], &run["run"]["schedule"]), (&json!("started"), &json!("manual"), &json!(id)));
    assert_eq!(run["run"]["job"], run["job"]["id"], "{run:#}");
    assert_eq!((&run["job"]["vm_name"], &run["job"]["created_by"]), (&json!("web"), &json!("admin")), "{run:#}");
    let same = keyed(client, &format!("/schedules/{id}/run"), "now", None).await.expect(201).body;
    assert_eq!(same["job"]["id"], run["job"]["id"]);
    let done = client.completed(run["job"]["id"].as_str().unwrap(), seconds(30)).await;
    assert!(done["result"]["files"][0]["path"].as_str().is_some_and(|path| path.contains("/night/")), "{done:#}");
    let shown = client.get(&format!("/schedules/{id}")).await.expect(200).body;
    assert_eq!(
        (&shown["last_run"], &shown["last_status"], &shown["last_job"]),
        (&run["run"]["due_at"], &json!("started"), &run["job"]["id"])
    );

    // A VM that vanished: the answer and the run say so. The schedule can still be changed.
    let hour = hourly["id"].as_str().unwrap();
    std::fs::remove_file(fleet.vms().join("gone.raw")).unwrap();
    fleet.refresh().await;
    client.post(&format!("/schedules/{hour}/run"), json!({})).await.refused(404, "not_found");
    let runs = client.get(&format!("/schedules/{hour}/runs?status=failed")).await.expect(200).body;
    assert_eq!((&runs["pagination"]["total"], &runs["data"][0]["job"]), (&json!(1), &json!(null)), "{runs:#}");
    assert!(runs["data"][0]["error"].as_str().is_some_and(|error| error.contains("gone")), "{runs:#}");
    assert_eq!(client.get(&format!("/schedules/{hour}/runs?status=started")).await.expect(200).body["pagination"]["total"], 0);

    // Changes.
    let path = format!("/schedules/{hour}");
    let changed =
        patch(client, &path, json!({"enabled": true, "cron": "0 0 1 1 0", "name": "yearly", "overlap": "allow"})).await.expect(200).body;
    assert_eq!(
        (&changed["name"], &changed["overlap"], &changed["enabled"]),
        (&json!("yearly"), &json!("allow"), &json!(true)),
        "{changed:#}"
    );
    assert!(changed["next_run"].as_str().is_some_and(|time| time.ends_with("T00:00:00.000Z")), "{changed:#}");
    assert!(patch(client, &path, json!({"cron": "0 0 32 * *"})).await.refused(400, "bad_request").contains("day of month"));
    assert!(patch(client, &path, json!({"colour": "red"})).await.refused(400, "bad_request").contains("colour"));
    assert!(patch(client, &path, json!({"job": job("gone")})).await.refused(404, "not_found").starts_with("job: "));
    assert_eq!(client.get(&path).await.expect(200).body, changed, "what was refused changed nothing");

    // Who may only read, reads.
    client.post("/users", json!({"username": "eve", "password": PASSWORD, "role": "viewer"})).await.expect(201);
    let eve = client.login("eve", PASSWORD).await;
    eve.get("/schedules").await.expect(200);
    eve.post("/schedules", nightly.clone()).await.refused(403, "forbidden");
    eve.post(&format!("{path}/run"), json!({})).await.refused(403, "forbidden");
    patch(&eve, &path, json!({"enabled": false})).await.refused(403, "forbidden");
    eve.delete(&path).await.refused(403, "forbidden");

    client.delete(&path).await.expect(204);
    for path in [path.clone(), format!("{path}/runs"), "/schedules/sched-%00".to_owned(), "/schedules/nonsense".to_owned()] {
        client.get(&path).await.refused(404, "not_found");
    }
    client.delete(&path).await.refused(404, "not_found");
    let audit = client.get("/audit?search=schedule.&limit=200").await.expect(200).body;
    let acts: BTreeSet<&str> = audit["data"].as_array().unwrap().iter().filter_map(|row| row["action"].as_str()).collect();
    assert_eq!(acts.into_iter().collect::<Vec<_>>(), ["schedule.create", "schedule.delete", "schedule.run", "schedule.update"]);
}

/// Every field that is wrong is named, with what would be right.
async fn refusals(client: &Client, good: &Value) {
    let with = |option: &str| {
        let mut job = job("web");
        job["options"][option] = json!("2999-01-01T00:00:00Z");
        job
    };
    for (field, value, status, words) in [
        ("name", json!(""), 400, ["name", "1 to 200"]),
        ("name", json!("a\u{0}b"), 400, ["name", "control"]),
        ("cron", json!("60 * * * *"), 400, ["field 1 (minute)", "0 to 59"]),
        ("cron", json!("0 2 * * 8"), 400, ["field 5 (day of week)", "0 and 7 are Sunday"]),
        ("cron", json!("0 0 30 2 *"), 400, ["never comes", "field 3"]),
        ("cron", json!("0 2 * *"), 400, ["five fields", "not 4"]),
        ("cron", json!(5), 400, ["string", "integer"]),
        ("timezone", json!("Berlin"), 400, ["`Berlin`", "Europe/Berlin"]),
        ("overlap", json!("maybe"), 400, ["`maybe`", "skip, queue, allow"]),
        ("catch_up", json!("all"), 400, ["`all`", "skip, once"]),
        ("job", json!("export"), 400, ["job", "object"]),
        ("job", json!({"type": "export", "speed": 3}), 400, ["job", "speed"]),
        ("job", json!({"type": "export", "format": "raw", "provider": "local"}), 400, ["job", "vm_name"]),
        ("job", with("not_before"), 400, ["job", "`not_before`"]),
        ("job", with("deadline"), 400, ["job", "`deadline`"]),
        ("job", job("nobody"), 404, ["job", "nobody"]),
        ("carbon", json!(true), 400, ["carbon", "carbon_aware"]),
    ] {
        let mut body = good.clone();
        body[field] = value.clone();
        let answer = client.post("/schedules", body).await;
        let message = answer.refused(status, if status == 404 { "not_found" } else { "bad_request" });
        assert!(words.iter().all(|word| message.contains(word)), "{field} {value}: {message}");
    }
    assert_eq!(client.get("/schedules").await.expect(200).body["pagination"]["total"], 1, "what is refused leaves nothing");
}

/// The started runs' due times, and their jobs; each once.
fn tally(runs: &Value) -> (Vec<String>, BTreeSet<String>) {
    let rows = runs["data"].as_array().unwrap();
    let due: Vec<String> = rows.iter().map(|run| run["due_at"].as_str().unwrap().to_owned()).collect();
    let jobs: BTreeSet<String> = rows.iter().filter_map(|run| run["job"].as_str()).map(str::to_owned).collect();
    assert_eq!(due.iter().collect::<BTreeSet<_>>().len(), due.len(), "a due time runs once: {runs:#}");
    assert_eq!(jobs.len(), rows.len(), "each run has a job of its own: {runs:#}");
    assert!(rows.iter().all(|run| run["status"] == "started" && run["cause"] == "cron"), "{runs:#}");
    assert!(due.iter().all(|time| time.ends_with(":00.000Z")), "{due:?}");
    (due, jobs)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_controllers_make_one_job_each_minute_and_both_are_killed_between() {
    let mut fleet = fleet("schedules-two", Database::Postgres).await;
    let (mut second, other) = fleet.second_controller().await;
    let start = Instant::now();
    let body = json!({"name": "each minute", "cron": "* * * * *", "job": job("web"), "overlap": "allow", "catch_up": "once"});
    // Made at the controller that has no agent.
    let made = other.post("/schedules", body).await.expect(201).body;
    let runs = format!("/schedules/{}/runs?order=asc", made["id"].as_str().unwrap());
    let started = async |client: &Client, count: usize| {
        wait_for(&format!("{count} runs"), seconds(100), async || {
            let page = client.try_get(&runs).await?;
            let started = page["data"].as_array().unwrap().iter().filter(|run| run["status"] == "started").count();
            if started >= count { Ok(page) } else { Err(page.to_string()) }
        })
        .await
    };
    let (due, jobs) = tally(&started(&fleet.client, 1).await);
    assert_eq!((Some(due[0].as_str()), jobs.len()), (made["next_run"].as_str(), 1), "{made:#}");
    for job in &jobs {
        fleet.client.completed(job, seconds(30)).await;
    }
    // Both are killed, and come back.
    second.kill();
    fleet.restart_controller().await;
    second.start();
    ready(&mut second, &other).await;
    let (due, jobs) = tally(&started(&other, 2).await);
    assert_eq!(Some(due[1].as_str()), made["next_runs"][1].as_str());
    for job in &jobs {
        fleet.client.completed(job, seconds(30)).await;
    }
    let all = fleet.client.get("/jobs?limit=200").await.expect(200).body;
    let made: BTreeSet<String> = all["data"].as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(made, jobs, "no job but those of the runs");
    println!("{} due times, {} jobs, two controllers, {:?}", due.len(), jobs.len(), start.elapsed());
}
