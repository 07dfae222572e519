//! Jobs that wait for their time or for a clean grid, over real processes; the grid is a server of ours that speaks Electricity Maps' words.
//!
//! Owns: the starts of held jobs, their deadlines, what a park and a restart of the controller leave of them, the two `/carbon` operations.
//! Never: calls a real source. A crash here costs the test.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::client::{brief, file_of};
use crate::harness::fleet::{Database, Fleet, Plan};
use crate::harness::images::{identical, pattern};
use crate::harness::{seconds, wait_for};

const MIB: u64 = 1 << 20;
const HOUR: i64 = 3_600_000;

fn now() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as i64
}

/// Milliseconds since 1970 as RFC 3339, by our own clock's vocabulary.
fn at(millis: i64) -> String {
    let (days, rest) = (millis.div_euclid(86_400_000), millis.rem_euclid(86_400_000));
    // Civil from days (the proleptic Gregorian calendar, from 0000-03-01).
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let (hour, minute, second) = (rest / 3_600_000, rest / 60_000 % 60, rest / 1000 % 60);
    format!("{:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", era * 400 + year + carry, rest % 1000)
}

/// What the grid does: now, and from so many milliseconds after the question.
#[derive(Clone)]
struct Sky {
    now: f64,
    ahead: Vec<(i64, f64)>,
}

/// The grid of a test.
struct Grid {
    url: String,
    sky: Arc<Mutex<Sky>>,
}

impl Grid {
    async fn start(sky: Sky) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v3", listener.local_addr().unwrap());
        let sky = Arc::new(Mutex::new(sky));
        let shared = sky.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let sky = shared.lock().unwrap().clone();
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        let mut byte = [0];
                        if stream.read(&mut byte).await.unwrap_or(0) == 0 {
                            return;
                        }
                        head.push(byte[0]);
                    }
                    let head = String::from_utf8(head).unwrap();
                    let knows_key = head.to_lowercase().contains("auth-token: sesame");
                    let time = now();
                    let body = if head.starts_with("GET /v3/carbon-intensity/latest?zone=DE ") {
                        json!({"zone": "DE", "carbonIntensity": sky.now, "datetime": at(time), "isEstimated": false})
                    } else if head.starts_with("GET /v3/carbon-intensity/forecast?zone=DE ") {
                        let points = [(0, sky.now)].into_iter().chain(sky.ahead);
                        let points = points.map(|(after, intensity)| json!({"carbonIntensity": intensity, "datetime": at(time + after)}));
                        json!({"zone": "DE", "forecast": points.collect::<Vec<_>>(), "updatedAt": at(time)})
                    } else {
                        Value::Null
                    };
                    let status = if body.is_null() {
                        404
                    } else if knows_key {
                        200
                    } else {
                        401
                    };
                    let body = body.to_string();
                    let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                    let _ = stream.write_all((head + &body).as_bytes()).await;
                });
            }
        });
        Self { url, sky }
    }

    fn turn(&self, now: f64, ahead: &[(i64, f64)]) {
        *self.sky.lock().unwrap() = Sky { now, ahead: ahead.to_vec() };
    }
}

/// A grid that is the same for three days.
fn flat(intensity: f64) -> Sky {
    Sky { now: intensity, ahead: (1..72).map(|hour| (hour * HOUR, intensity)).collect() }
}

/// Dirty for an hour, then clean.
fn clears() -> Sky {
    Sky { now: 500.0, ahead: (1..72).map(|hour| (hour * HOUR, 100.0)).collect() }
}

/// An installation with one VM whose controller looks at this grid each second.
async fn fleet(name: &str, database: Database, data: u64, grid: &Grid) -> Fleet {
    let plan = Plan { database, ..Plan::plain() };
    let mut fleet = Fleet::start(name, plan, |vms| pattern(&vms.join("web.raw"), 2 * data, &[(0, data)], 23)).await;
    for (setting, value) in [
        ("CARBON_ZONE", "DE"),
        ("CARBON_SOURCE", "electricity-maps"),
        ("CARBON_ELECTRICITY_MAPS_URL", &grid.url),
        ("CARBON_ELECTRICITY_MAPS_KEY", "sesame"),
        ("CARBON_POLL_SECONDS", "1"),
    ] {
        fleet.controller.set(setting, value);
    }
    fleet.restart_controller().await;
    fleet
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_starts_at_its_time_and_no_earlier() {
    let plan = Plan { database: Database::Postgres, ..Plan::plain() };
    let fleet = Fleet::start("not-before", plan, |vms| pattern(&vms.join("web.raw"), 16 * MIB, &[(0, 8 * MIB)], 29)).await;
    let client = &fleet.client;
    let start = now() + 3000;
    let id = client.export("web", "raw", json!({"not_before": at(start), "deadline": at(start + HOUR)})).await;
    let held = client.job(&id).await;
    assert_eq!((held["status"].as_str(), held["stage"].as_str()), (Some("queued"), Some("not_before")), "{held:#}");
    assert_eq!((&held["options"]["not_before"], held["started_at"].is_null()), (&json!(at(start)), true), "{held:#}");
    let other = client.export("web", "raw", json!({"not_before": at(now() + HOUR)})).await;
    let never = client.export("web", "raw", json!({"not_before": at(now() + HOUR)})).await;
    client.delete(&format!("/jobs/{never}")).await.expect(202);
    assert_eq!(client.job(&never).await["status"], "cancelled");
    let job = client.completed(&id, seconds(30)).await;
    let started = job["started_at"].as_str().unwrap();
    assert!(started >= at(start).as_str() && started < at(start + 5000).as_str(), "{started}, not before {}", at(start));
    assert_eq!(client.job(&other).await["stage"], "not_before");
    client.post(&format!("/jobs/{other}/resume"), json!({})).await.expect(200);
    client.completed(&other, seconds(30)).await;
    // A deadline that is missed ends nothing and is told.
    let slow = client.export("web", "raw", json!({"deadline": at(now() + 1500), "bandwidth_limit": 2 * MIB})).await;
    let job = client.completed(&slow, seconds(60)).await;
    assert_eq!(job["deadline_missed"], true, "{job:#}");
    assert!(client.log(&slow).await.contains("the deadline"), "{}", client.log(&slow).await);
    for (options, word) in [
        (json!({"not_before": "tonight"}), "2025-01-31T22:00:00Z"),
        (json!({"deadline": at(now() - 1000)}), "later than now"),
        (json!({"deadline": at(start + HOUR), "not_before": at(start + 2 * HOUR)}), "later than not_before"),
    ] {
        let body = json!({"type": "export", "provider": "local", "vm_name": "web", "format": "raw", "options": options});
        let sentence = client.post("/jobs", body).await.refused(400, "bad_request");
        assert!(sentence.contains(word), "{sentence}");
    }
    // Without a source the profile answers, and says what it is.
    let grid = client.get("/carbon/intensity?zone=GB").await.expect(200).body;
    assert_eq!((&grid["source"], &grid["estimated"], &grid["unit"]), (&json!("embedded-profile"), &json!(true), &json!("gCO2eq/kWh")));
    assert!(grid["forecast"].as_array().is_some_and(|steps| steps.len() >= 48), "{grid:#}");
    client.get("/carbon/intensity").await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_carbon_aware_job_waits_for_a_clean_grid_over_a_restart() {
    let grid = Grid::start(clears()).await;
    let mut fleet = fleet("carbon-waits", Database::Sqlite, 8 * MIB, &grid).await;
    let client = fleet.client.clone();
    let shown = client.get("/carbon/intensity").await.expect(200).body;
    for (field, value) in [
        ("zone", json!("DE")),
        ("intensity", json!(500.0)),
        ("rating", json!("very_high")),
        ("source", json!("electricity-maps")),
        ("estimated", json!(false)),
    ] {
        assert_eq!(shown[field], value, "{field}: {shown:#}");
    }
    let best = client.get(&format!("/carbon/schedule?duration=1h30m&deadline={}", at(now() + 4 * HOUR))).await.expect(200).body;
    let first = &best["windows"][0];
    // An hour of 500 and half an hour of 100, against 100 all along.
    assert!((best["now"]["average_intensity"].as_f64().unwrap() - 366.7).abs() < 1.0, "{best:#}");
    assert_eq!((&first["average_intensity"], &first["rank"], &best["duration"]), (&json!(100.0), &json!(1), &json!("1h 30m")), "{best:#}");
    assert!((first["savings_percent"].as_f64().unwrap() - 72.7).abs() < 0.3, "{best:#}");
    for (query, word) in [
        ("zone=XX", "US-CAL-CISO"),
        ("duration=soon", "1h30m"),
        ("duration=300h", "duration"),
        ("deadline=2020-01-01T00:00:00Z", "no room"),
        ("colour=red", "zone, duration, deadline"),
    ] {
        let sentence = client.get(&format!("/carbon/schedule?{query}")).await.refused(400, "bad_request");
        assert!(sentence.contains(word), "{sentence}");
    }
    client.send(client.anonymous().request(Method::GET, "/carbon/intensity")).await.unwrap().refused(401, "unauthorized");

    let id = client.export("web", "qcow2", json!({"carbon_aware": true})).await;
    let planned = async |job: &Value| {
        if job["stage"] == "carbon" && job["carbon"]["planned_start"].is_string() { Ok(job.clone()) } else { Err(brief(job)) }
    };
    let job = wait_for("a plan", seconds(10), async || planned(&client.job(&id).await).await).await;
    let start = job["carbon"]["planned_start"].as_str().unwrap().to_owned();
    assert!(start > at(now() + 50 * 60_000) && start < at(now() + 61 * 60_000), "{job:#}");
    // Reading the log has it stored: lines of the last quarter of a second may die with the process.
    assert!(client.log(&id).await.contains("waits for a cleaner grid"), "{}", client.log(&id).await);
    fleet.restart_controller().await;
    let job = wait_for("the plan again", seconds(20), async || planned(&client.try_get(&format!("/jobs/{id}")).await?).await).await;
    assert!(job["started_at"].is_null() && job["attempt"] == 0, "{job:#}");
    let clean = flat(90.0);
    let turned = now();
    grid.turn(clean.now, &clean.ahead);
    let job = client.completed(&id, seconds(30)).await;
    assert!(job["started_at"].as_str().unwrap() >= at(turned).as_str(), "{job:#}");
    let carbon = &job["carbon"];
    assert_eq!(
        (&carbon["zone"], &carbon["source"], &carbon["started_intensity"]),
        (&json!("DE"), &json!("electricity-maps"), &json!(90.0))
    );
    let field = |name: &str| carbon[name].as_f64().unwrap_or_else(|| panic!("{name}: {job:#}"));
    // 500 at once, 90 now: the formula's ratio, whatever the run took.
    assert!(field("grams") > 0.0 && (field("grams_if_at_once") / field("grams") - 500.0 / 90.0).abs() < 0.1, "{carbon:#}");
    assert!((field("grams_saved") - (field("grams_if_at_once") - field("grams"))).abs() < 1e-5, "{carbon:#}");
    identical(("raw", &fleet.vms().join("web.raw")), ("qcow2", &file_of(&job, ".qcow2")));
    let log = client.log(&id).await;
    assert!(log.contains("waits for a cleaner grid") && log.contains("as clean as it will be for the run: 90 g/kWh"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_job_is_parked_when_the_grid_turns_dirty_and_completes_the_same() {
    let grid = Grid::start(flat(100.0)).await;
    let data = 256 * MIB;
    let fleet = fleet("carbon-parks", Database::Sqlite, data, &grid).await;
    let client = &fleet.client;
    let id = client.export("web", "qcow2", json!({"carbon_aware": true, "compress": true, "bandwidth_limit": 32 * MIB})).await;
    wait_for("a checkpoint", seconds(30), async || {
        let job = client.job(&id).await;
        if job["bytes_done"].as_u64() >= Some(32 * MIB) { Ok(()) } else { Err(brief(&job)) }
    })
    .await;
    let dirty = clears();
    grid.turn(dirty.now, &dirty.ahead);
    let parked = client.in_stage(&id, &["carbon"], seconds(10)).await;
    assert_eq!((&parked["status"], &parked["carbon"]["parked"]), (&json!("queued"), &json!(1)), "{parked:#}");
    let before = client.job(&id).await["bytes_done"].as_u64().unwrap();
    assert!(before > 0 && before < data, "{parked:#}");
    tokio::time::sleep(Duration::from_secs(2)).await;
    let at_rest = client.job(&id).await;
    assert_eq!((&at_rest["stage"], at_rest["bytes_done"].as_u64()), (&json!("carbon"), Some(before)), "{at_rest:#}");
    let clean = flat(80.0);
    grid.turn(clean.now, &clean.ahead);
    let job = client.completed(&id, seconds(60)).await;
    assert_eq!((&job["attempt"], &job["carbon"]["parked"]), (&json!(2), &json!(1)), "{job:#}");
    assert!(job["bytes_resumed"].as_u64() >= Some(before), "{before} bytes were on the disk: {job:#}");
    identical(("raw", &fleet.vms().join("web.raw")), ("qcow2", &file_of(&job, ".qcow2")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_deadline_stands_above_the_grid() {
    // Clean always begins three seconds from now, and never comes.
    let ahead = [(3000, 100.0), (3 * HOUR, 100.0)];
    let grid = Grid::start(Sky { now: 500.0, ahead: ahead.to_vec() }).await;
    let fleet = fleet("carbon-deadline", Database::Postgres, 8 * MIB, &grid).await;
    let client = &fleet.client;
    let made = now();
    let deadline = made + 12_000;
    let id = client.export("web", "raw", json!({"carbon_aware": true, "deadline": at(deadline)})).await;
    client.in_stage(&id, &["carbon"], seconds(5)).await;
    let job = client.completed(&id, seconds(30)).await;
    let (started, finished) = (job["started_at"].as_str().unwrap(), job["finished_at"].as_str().unwrap());
    assert!(started > at(made + 4000).as_str(), "it waited while waiting could help: {job:#}");
    assert!(
        started < at(deadline - 1000).as_str() && finished <= at(deadline).as_str(),
        "made {} deadline {}: {job:#}",
        at(made),
        at(deadline)
    );
    assert_eq!(job["carbon"]["started_intensity"], 500.0, "{job:#}");
    assert!(job["deadline_missed"].is_null(), "{job:#}");
}
