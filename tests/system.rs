//! How the installation tells that something is wrong: health, alerts, webhooks, readiness; and what two VMs have in common.
//!
//! Owns: alerts over real deaths, signed and repeated calls, the addresses that are never called, scores, checks, compare.
//! Never: fakes a state: agents are killed, disks are flipped. A crash here costs the test.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::harness::fleet::{Database, Fleet, PASSWORD, Plan};
use crate::harness::images::{convert, flip, foreign_ova, ovf, pattern};
use crate::harness::live::Live;
use crate::harness::{seconds, wait_for};

const MIB: u64 = 1 << 20;

macro_rules! on_both {
    ($($name:ident,)*) => {
        mod on_sqlite { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() { super::$name(super::Database::Sqlite).await; })* }
        mod on_postgres { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() { super::$name(super::Database::Postgres).await; })* }
    };
}

on_both! {
    an_agents_death_is_told_everywhere_once_and_its_return_too,
    webhooks_get_ended_jobs_once_and_reach_no_private_address,
}

/// A call that a receiver got.
#[derive(Clone, Debug)]
struct Call {
    headers: BTreeMap<String, String>,
    body: String,
    answered: u16,
}

impl Call {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// A plain HTTP server that answers what it is told to, then 200, and keeps what it got.
#[derive(Clone)]
struct Receiver {
    url: String,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Receiver {
    async fn start(answers: &[(u16, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let calls: Arc<Mutex<Vec<Call>>> = Arc::default();
        let answers: VecDeque<(u16, String)> = answers.iter().map(|(status, header)| (*status, (*header).to_owned())).collect();
        let (answers, kept) = (Arc::new(Mutex::new(answers)), calls.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (answers, kept) = (answers.clone(), kept.clone());
                tokio::spawn(async move {
                    let mut bytes = Vec::new();
                    let (head, length) = loop {
                        let mut piece = [0u8; 4096];
                        let n = stream.read(&mut piece).await.unwrap_or(0);
                        if n == 0 {
                            return;
                        }
                        bytes.extend_from_slice(&piece[..n]);
                        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                            let head = String::from_utf8(bytes[..at].to_vec()).unwrap();
                            let headers = headers(&head);
                            let length: usize = headers["content-length"].parse().unwrap();
                            while bytes.len() < at + 4 + length {
                                let n = stream.read(&mut piece).await.unwrap();
                                bytes.extend_from_slice(&piece[..n]);
                            }
                            break (headers, at + 4);
                        }
                    };
                    let body = String::from_utf8(bytes[length..].to_vec()).unwrap();
                    let (answered, header) = answers.lock().unwrap().pop_front().unwrap_or((200, String::new()));
                    kept.lock().unwrap().push(Call { headers: head, body, answered });
                    let answer = format!("HTTP/1.1 {answered} X\r\n{header}Content-Length: 0\r\nConnection: close\r\n\r\n");
                    let _ = stream.write_all(answer.as_bytes()).await;
                });
            }
        });
        Self { url, calls }
    }

    fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    /// Waits until it has got so many calls.
    async fn got(&self, what: &str, fits: impl Fn(&[Call]) -> bool) -> Vec<Call> {
        wait_for(what, seconds(30), async || {
            let calls = self.calls();
            if fits(&calls) { Ok(calls) } else { Err(format!("{calls:#?}")) }
        })
        .await
    }
}

fn headers(head: &str) -> BTreeMap<String, String> {
    let line = |line: &str| line.split_once(':').map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()));
    head.lines().skip(1).filter_map(line).collect()
}

/// HMAC-SHA256 by its definition (RFC 2104), from another library than the product's.
fn hmac(key: &[u8], message: &[u8]) -> String {
    let mut block = [0u8; 64];
    match key.len() {
        ..=64 => block[..key.len()].copy_from_slice(key),
        _ => block[..32].copy_from_slice(&Sha256::digest(key)),
    }
    let pad = |byte: u8| block.map(|b| b ^ byte);
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(message).finalize();
    hex::encode(Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize())
}

/// The call is signed as the documentation says, a moment ago.
#[track_caller]
fn is_signed(call: &Call, secret: &str) {
    let header = &call.headers["x-hypersdk-signature"];
    let (time, tag) = header.split_once(',').unwrap();
    let (time, tag) = (time.strip_prefix("t=").unwrap(), tag.strip_prefix("v1=").unwrap());
    assert_eq!(tag, hmac(secret.as_bytes(), format!("{time}.{}", call.body).as_bytes()), "{call:?}");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(now.abs_diff(time.parse().unwrap()) < 60, "{header}");
}

/// Thresholds of seconds, this host's disk left out, receivers on this host allowed.
async fn quick(fleet: &mut Fleet) {
    for (name, value) in [
        ("ALERTS_INTERVAL_SECONDS", "1"),
        ("ALERTS_AGENT_LOST_SECONDS", "3"),
        ("ALERTS_DISK_FREE_PERCENT", "0"),
        ("ALERTS_DISK_FREE_GIB", "0"),
        ("WEBHOOKS_ALLOWED", "127.0.0.0/8"),
    ] {
        fleet.controller.set(name, value);
    }
    fleet.restart_controller().await;
    connected(fleet).await;
}

async fn connected(fleet: &Fleet) {
    wait_for("the agent to be here", seconds(40), async || {
        let agents = fleet.client.try_get("/agents").await?;
        if agents["data"][0]["status"] == "connected" { Ok(()) } else { Err(agents.to_string()) }
    })
    .await;
}

async fn live(fleet: &Fleet) -> Live {
    let bearer = [("Authorization", format!("Bearer {}", fleet.client.token.as_ref().unwrap()))];
    let mut live = Live::open(&fleet.client.base, "/ws", &bearer).await.unwrap();
    live.until("hello", seconds(5), |frame| frame["type"] == "hello").await;
    live
}

/// Alerts of lost agents in a state.
async fn lost(fleet: &Fleet, state: &str) -> Vec<Value> {
    let page = fleet.client.get(&format!("/system/alerts?state={state}&rule=agent_lost")).await.expect(200).body;
    page["data"].as_array().unwrap().clone()
}

async fn an_agents_death_is_told_everywhere_once_and_its_return_too(database: Database) {
    let mut fleet =
        Fleet::start("alerts", Plan { database, ..Plan::plain() }, |vms| pattern(&vms.join("web.raw"), MIB, &[(0, MIB)], 1)).await;
    quick(&mut fleet).await;
    let secret = "a secret of the receiver's";
    let receiver = Receiver::start(&[(500, ""), (500, "")]).await;
    let hook = json!({"url": receiver.url, "events": ["alert"], "secret": secret});
    let hook = fleet.client.post("/webhooks", hook).await.expect(201).body;
    assert_eq!(hook["secret"], secret, "{hook:#}");
    assert!(!fleet.client.get("/webhooks").await.expect(200).text.contains(secret), "a secret is shown once");
    assert_eq!(lost(&fleet, "all").await, Vec::<Value>::new(), "a healthy agent is no alert");

    let mut watcher = live(&fleet).await;
    watcher.say(json!({"action": "subscribe", "topics": ["alerts"]})).await;
    let died = std::time::Instant::now();
    fleet.agents[0].kill();
    let frame = watcher.until("the alert", seconds(15), |frame| frame["type"] == "alert" && frame["data"]["rule"] == "agent_lost").await;
    println!("{database:?}: told {:.1} s after the death, threshold 3 s", died.elapsed().as_secs_f64());
    let alert = frame["data"].clone();
    assert_eq!((&alert["severity"], &alert["state"], &alert["resource"]), (&json!("critical"), &json!("active"), &json!("agent agent-0")));
    assert_eq!(lost(&fleet, "active").await, std::slice::from_ref(&alert), "list and frame say the same");
    let found = fleet.client.get("/system/alerts?severity=critical&search=AGENT-0&sort=severity&order=desc").await.expect(200).body;
    assert_eq!(found["data"][0]["id"], alert["id"], "{found:#}");
    let metrics = fleet.client.get("/metrics").await.expect(200).text;
    assert!(metrics.lines().any(|line| line == "hypersdk_alerts{severity=\"critical\"} 1"), "{metrics}");
    let health = fleet.client.get("/system/health").await.expect(200).body;
    assert_eq!((&health["agents"]["away"], &health["agents"]["score"]), (&json!(1), &json!(0)), "{health:#}");

    // The receiver refuses, the controller dies in between: the call comes again, the same one, signed anew.
    receiver.got("the first call", |calls| !calls.is_empty()).await;
    fleet.restart_controller().await;
    let calls = receiver.got("a call that was taken", |calls| calls.iter().any(|call| call.answered == 200)).await;
    let refused = calls.iter().filter(|call| call.answered == 500).count();
    assert_eq!(refused, 2, "{calls:#?}");
    for call in &calls {
        is_signed(call, secret);
        assert_eq!((&call.body, &call.headers["x-hypersdk-delivery"]), (&calls[0].body, &calls[0].headers["x-hypersdk-delivery"]));
        assert_eq!(call.headers["x-hypersdk-event"], "alert");
    }
    let body = calls[0].json();
    assert_eq!((&body["type"], &body["data"]), (&json!("alert"), &alert), "{body:#}");
    assert!(body["time"].is_string(), "{body:#}");

    // Several looks after the restart it is still the same one.
    let mut watcher = live(&fleet).await;
    wait_for("looks after the restart", seconds(20), async || {
        let metrics = fleet.client.get("/metrics").await.expect(200).text;
        if metrics.contains("hypersdk_alerts{severity=\"critical\"} 1") { Ok(()) } else { Err("not counted yet".to_owned()) }
    })
    .await;
    assert_eq!(lost(&fleet, "all").await, std::slice::from_ref(&alert), "a restart raises nothing again");

    fleet.agents[0].start();
    let frame = watcher.until("the end", seconds(40), |frame| frame["type"] == "alert" && frame["data"]["state"] == "resolved").await;
    assert_eq!((&frame["data"]["id"], &frame["data"]["since"]), (&alert["id"], &alert["since"]));
    assert_eq!(lost(&fleet, "active").await, Vec::<Value>::new());
    let history = lost(&fleet, "resolved").await;
    assert!(history.len() == 1 && history[0]["resolved_at"].is_string(), "{history:#?}");
    let calls = receiver.got("the end by HTTP", |calls| calls.iter().any(|call| call.json()["data"]["state"] == "resolved")).await;
    is_signed(calls.last().unwrap(), secret);
    assert_eq!(calls.iter().filter(|call| call.answered == 200).count(), 2, "each event is taken once: {calls:#?}");
    wait_for("the outcome to be kept", seconds(10), async || {
        let list = fleet.client.try_get("/webhooks").await?;
        let shown = &list["data"][0];
        let is_kept = shown["pending"] == 0 && shown["failed"] == 0 && shown["last_call"]["status"] == 200;
        if is_kept { Ok(()) } else { Err(shown.to_string()) }
    })
    .await;
}

async fn webhooks_get_ended_jobs_once_and_reach_no_private_address(database: Database) {
    let mut fleet =
        Fleet::start("webhooks", Plan { database, ..Plan::plain() }, |vms| pattern(&vms.join("web.raw"), MIB, &[(0, MIB)], 1)).await;
    let client = fleet.client.clone();
    let create = |url: &str| client.post("/webhooks", json!({"url": url, "events": ["job.completed"]}));
    for private in [
        "http://127.0.0.1:9/x",
        "https://127.0.0.1/x",
        "https://localhost/x",
        "https://[::1]/x",
        "https://[::ffff:10.0.0.1]/x",
        "https://10.0.0.1/x",
        "https://192.168.1.1/x",
        "https://169.254.169.254/latest/meta-data",
        "https://0x7f000001/x",
        "https://2130706433/x",
        "http://example.org/x",
        "https://user:password@example.org/x",
        "ftp://example.org/x",
    ] {
        let sentence = create(private).await.refused(422, "unprocessable");
        assert!(sentence.contains("url"), "{private}: {sentence}");
    }
    create("nonsense").await.refused(400, "bad_request");
    let events = |events: Value| client.post("/webhooks", json!({"url": "https://example.org/x", "events": events}));
    assert!(events(json!(["jobs"])).await.refused(400, "bad_request").contains("job.completed"), "the known ones are listed");
    events(json!([])).await.refused(400, "bad_request");
    let short = json!({"url": "https://example.org/x", "events": ["alert"], "secret": "short"});
    client.post("/webhooks", short).await.refused(400, "bad_request");
    client.delete("/webhooks/hook-0").await.refused(404, "not_found");
    client.post("/users", json!({"username": "op", "password": PASSWORD, "role": "operator"})).await.expect(201);
    client.login("op", PASSWORD).await.get("/webhooks").await.refused(403, "forbidden");

    quick(&mut fleet).await;
    // No setting allows the metadata service.
    create("http://169.254.169.254/x").await.refused(422, "unprocessable");
    let receiver = Receiver::start(&[]).await;
    // One that never answers well must not hold up the other.
    let elsewhere = Receiver::start(&[]).await;
    let location = format!("Location: {}\r\n", elsewhere.url);
    let redirecting = Receiver::start(&vec![(302, location.as_str()); 50]).await;
    let with_key = async || {
        let body = json!({"url": receiver.url, "events": ["job.completed", "job.failed"]});
        client.send(client.request(Method::POST, "/webhooks").header("Idempotency-Key", "hook-1").json(&body)).await.unwrap().expect(201)
    };
    let hook = with_key().await.body;
    let again = with_key().await;
    assert!(again.body["id"] == hook["id"] && again.body["secret"].is_null(), "{} {hook}", again.text);
    let secret = hook["secret"].as_str().unwrap().to_owned();
    let bad = create(&redirecting.url).await.expect(201).body;

    let id = |hook: &Value| hook["id"].as_str().unwrap().to_owned();
    let test = client.post(&format!("/webhooks/{}/test", id(&hook)), json!({})).await.expect(200).body;
    assert!(test["delivered"] == true && test["status"] == 200 && test["milliseconds"].is_u64(), "{test:#}");
    is_signed(&receiver.calls()[0], &secret);
    let test = client.post(&format!("/webhooks/{}/test", id(&bad)), json!({})).await.expect(200).body;
    assert_eq!((&test["delivered"], &test["status"]), (&json!(false), &json!(302)), "{test:#}");
    let closed = create("http://127.0.0.1:1/x").await.expect(201).body;
    client.post(&format!("/webhooks/{}/test", id(&closed)), json!({})).await.refused(502, "bad_gateway");

    let mut jobs = Vec::new();
    for format in ["raw", "qcow2"] {
        let job = client.export("web", format, json!({})).await;
        client.completed(&job, seconds(60)).await;
        jobs.push(job);
    }
    let ended =
        |calls: &[Call]| calls.iter().filter(|call| call.headers["x-hypersdk-event"] == "job.completed").cloned().collect::<Vec<_>>();
    let calls = receiver.got("both jobs", |calls| ended(calls).len() >= 2).await;
    let told: Vec<Value> = ended(&calls).iter().map(|call| call.json()["data"]["id"].clone()).collect();
    assert_eq!(told, jobs, "in their order, once each");
    for call in ended(&calls) {
        is_signed(&call, &secret);
        let (told, shown) = (call.json()["data"].clone(), client.job(call.json()["data"]["id"].as_str().unwrap()).await);
        assert_eq!(told, shown, "a call carries what the API shows");
    }
    // A restart finds what ended before it, and does not tell it again.
    fleet.restart_controller().await;
    let job = client.export("web", "raw", json!({})).await;
    client.completed(&job, seconds(60)).await;
    let calls = receiver.got("the third", |calls| ended(calls).len() >= 3).await;
    assert_eq!(ended(&calls).len(), 3, "{calls:#?}");
    assert!(redirecting.calls().len() >= 2 && elsewhere.calls().is_empty(), "a redirect is never followed");
    client.delete(&format!("/webhooks/{}", id(&bad))).await.expect(204);
    client.delete(&format!("/webhooks/{}", id(&bad))).await.refused(404, "not_found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_away_is_told_at_once_and_kept_when_it_is_back() {
    let plan = Plan { database: Database::Postgres, ..Plan::plain() };
    let mut fleet = Fleet::start("away-alert", plan, |vms| pattern(&vms.join("web.raw"), MIB, &[(0, MIB)], 1)).await;
    quick(&mut fleet).await;
    let mut watcher = live(&fleet).await;
    fleet.database_away(true);
    let is_about_it = |frame: &Value| frame["type"] == "alert" && frame["data"]["rule"] == "database_away";
    let told = watcher.until("the alert", seconds(30), is_about_it).await["data"].clone();
    assert_eq!((&told["severity"], &told["state"]), (&json!("critical"), &json!("active")), "{told:#}");
    fleet.database_away(false);
    let end =
        watcher.until("its end", seconds(40), |frame| is_about_it(frame) && frame["data"]["state"] == "resolved").await["data"].clone();
    assert_eq!((&end["id"], &end["since"]), (&told["id"], &told["since"]));
    let kept = fleet.client.get("/system/alerts?state=resolved&rule=database_away").await.expect(200).body;
    assert_eq!(kept["data"], json!([end]), "the row came when the database was back");
}

/// The checks of a readiness by name.
#[track_caller]
fn checks(body: &Value) -> BTreeMap<String, Value> {
    let list = body.as_array().unwrap_or_else(|| panic!("a list, not {body}"));
    for check in list {
        let is_whole = ["check", "status", "message", "fix"].iter().all(|field| check[field].is_string());
        let mends = check["status"] == "pass" || check["fix"].as_str().is_some_and(|fix| fix.len() > 8);
        assert!(is_whole && mends && ["pass", "warn", "fail"].iter().any(|word| check["status"] == *word), "{check:#}");
    }
    list.iter().map(|check| (check["check"].as_str().unwrap().to_owned(), check.clone())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_has_its_parts_and_readiness_says_what_to_mend() {
    let mut fleet = Fleet::start("health", Plan::plain(), |vms| {
        pattern(&vms.join("web.raw"), 8 * MIB, &[(0, MIB)], 1);
        std::fs::write(vms.join("broken.qcow2"), "this is no qcow2").unwrap();
        let huge = std::fs::File::create(vms.join("huge.raw")).unwrap();
        huge.set_len(1 << 50).unwrap_or_else(|_| huge.set_len(1 << 43).unwrap());
    })
    .await;
    let client = fleet.client.clone();
    // A heartbeat brings clock and memory of the agent.
    let clock = wait_for("the agent's clock", seconds(20), async || {
        let body = client.get("/readiness").await.expect(200).body;
        let clock = checks(&body)["clock"].clone();
        if clock["status"] == "pass" { Ok(clock) } else { Err(clock.to_string()) }
    })
    .await;
    assert!(clock["message"].as_str().unwrap().contains("ms at most"), "{clock}");
    let health = client.get("/system/health").await.expect(200).body;
    assert!(health["score"].as_u64().is_some_and(|score| score <= 100) && health["status"].is_string(), "{health:#}");
    for part in ["cpu", "memory", "disk", "network", "database", "agents", "queue", "actors"] {
        assert!(health[part]["score"].as_u64().is_some_and(|score| score <= 100), "{part}: {health:#}");
    }
    assert_eq!((&health["agents"]["connected"], &health["database"]["kind"]), (&json!(1), &json!("sqlite")), "{health:#}");
    assert!(health["database"]["ping_ms"].is_f64() && health["database"]["size_bytes"].as_u64() > Some(4096), "{health:#}");
    assert!(health["actors"]["queue"]["mailbox_ms"].is_f64() && health["actors"]["live"]["mailbox_ms"].is_f64(), "{health:#}");
    assert!(health["memory"]["total_bytes"].as_u64() > health["memory"]["available_bytes"].as_u64(), "{health:#}");
    let volumes: Vec<&Value> = health["disk"]["volumes"].as_array().unwrap().iter().map(|volume| &volume["name"]).collect();
    assert!(["data", "exports", "vms"].iter().all(|name| volumes.contains(&&json!(name))), "{health:#}");
    assert!(health["network"]["interfaces"].is_array() && health["cpu"]["percent"].is_number(), "{health:#}");

    let ready = checks(&client.get("/readiness").await.expect(200).body);
    let status = |name: &str| ready[name]["status"].as_str().unwrap_or("absent").to_owned();
    for name in ["database", "agents", "versions", "providers", "metrics"] {
        assert_eq!(status(name), "pass", "{name}: {ready:#?}");
    }
    // The password stands in the environment, the certificate is our own, one admin: real findings.
    assert_eq!([status("admin_password"), status("certificate"), status("admins")], ["warn", "warn", "warn"], "{ready:#?}");
    assert!(ready.contains_key("exports") && ready.contains_key("data_directory") && ready.contains_key("alerts"), "{ready:#?}");
    client.post("/users", json!({"username": "second", "password": PASSWORD, "role": "admin"})).await.expect(201);
    assert_eq!(checks(&client.get("/readiness").await.expect(200).body)["admins"]["status"], "pass");

    let preflight = async |vm: &str| checks(&client.get(&format!("/readiness?provider=local&vm_name={vm}")).await.expect(200).body);
    let web = preflight("web").await;
    for name in ["provider", "vm", "disk_types", "firmware", "snapshots", "changed_blocks", "power", "permissions", "space"] {
        assert_eq!(web[name]["status"], "pass", "{name}: {web:#?}");
    }
    assert_eq!(preflight("huge").await["space"]["status"], "warn", "a thin disk larger than the room");
    let broken = preflight("broken").await;
    assert_eq!((&broken["vm"]["status"], &broken["disk_types"]["status"]), (&json!("fail"), &json!("fail")), "{broken:#?}");
    assert_eq!(preflight("nobody").await["vm"]["status"], "fail");
    let nowhere = checks(&client.get("/readiness?provider=vsphere&vm_name=web").await.expect(200).body);
    assert_eq!(nowhere["provider"]["status"], "fail");
    client.get("/readiness?provider=local").await.refused(400, "bad_request");
    client.get("/system/health?verbose=true").await.refused(400, "bad_request");

    fleet.agents[0].kill();
    let away = wait_for("readiness to see it", seconds(20), async || {
        let ready = checks(&client.get("/readiness").await.expect(200).body);
        if ready["agents"]["status"] == "fail" { Ok(ready) } else { Err(ready["agents"].to_string()) }
    })
    .await;
    assert_eq!(away["exports"]["status"], "fail", "{away:#?}");
    assert_eq!(preflight("web").await["permissions"]["status"], "fail");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compare_ranks_hardware_and_proves_content_by_digest() {
    let fleet = Fleet::start("compare", Plan::plain(), |vms| {
        pattern(&vms.join("web.raw"), 64 * MIB, &[(0, 8 * MIB), (40 * MIB, 4 * MIB)], 7);
        let disk = vms.parent().unwrap().join("small");
        pattern(&disk, 4 * MIB, &[(0, MIB)], 3);
        foreign_ova(&vms.join("old.ova"), "app", &[&disk]);
        // The same machine as a folder, for UEFI, with another card and fewer processors.
        let folder = vms.join("new");
        std::fs::create_dir(&folder).unwrap();
        convert(("raw", &disk), ("vmdk", &folder.join("app-disk1.vmdk")), &["-o", "subformat=streamOptimized"]);
        let efi = "<vmw:Config xmlns:vmw=\"http://www.vmware.com/schema/ovf\" ovf:required=\"false\" vmw:key=\"firmware\" vmw:value=\"efi\"/></VirtualHardwareSection>";
        let text = ovf("app", &["app-disk1.vmdk".to_owned()], &[4 * MIB]);
        let text = text.replace("</VirtualHardwareSection>", efi).replace("VmxNet3", "E1000").replace(">3</rasd:VirtualQuantity>", ">2</rasd:VirtualQuantity>");
        std::fs::write(folder.join("app.ovf"), text).unwrap();
    })
    .await;
    let client = &fleet.client;
    let compare = async |source: (&str, &str), target: (&str, &str), content: bool| {
        let side = |(provider, vm_name): (&str, &str)| json!({"provider": provider, "vm_name": vm_name});
        let body = json!({"source": side(source), "target": side(target), "content": content});
        client.post("/vms/compare", body).await
    };
    let hardware = compare(("local", "old.ova"), ("local", "new"), false).await.expect(200).body;
    let fields: Vec<(&str, &str)> = hardware["differences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|difference| (difference["field"].as_str().unwrap(), difference["severity"].as_str().unwrap()))
        .collect();
    assert_eq!(fields, [("firmware", "critical"), ("nics[0].type", "warning"), ("cpu", "warning")], "{hardware:#}");
    assert_eq!((&hardware["match"], &hardware["disks"][0]["content"]), (&json!(false), &json!("not compared")), "{hardware:#}");
    let content = compare(("local", "old.ova"), ("local", "new"), true).await.expect(200).body;
    assert_eq!(content["disks"][0]["content"], "equal", "one disk in two packages: {content:#}");

    let mut exports = Vec::new();
    for format in ["qcow2", "raw", "ova"] {
        let job = client.export("web", format, json!({})).await;
        client.completed(&job, seconds(60)).await;
        exports.push(job);
    }
    let connect = json!({"provider": "local", "name": "out", "path": fleet.exports()});
    client.post("/providers/connect", connect).await.expect(201);
    fleet.refresh().await;
    let root = |body: &Value, side: &str| (body["disks"][0][side]["how"].clone(), body["disks"][0][side]["digest"].clone());
    for job in &exports[..2] {
        let same = compare(("local", "web"), ("out", job), true).await.expect(200).body;
        assert_eq!((&same["match"], &same["disks"][0]["content"]), (&json!(true), &json!("equal")), "{same:#}");
        assert_eq!((root(&same, "source").0, root(&same, "target").0), (json!("read"), json!("manifest")), "{same:#}");
    }
    // A byte flipped in the export is found although a manifest lies beside it: the file is newer than its manifest.
    let raw = &client.job(&exports[1]).await["result"]["files"][0]["path"].as_str().unwrap().to_owned();
    flip(std::path::Path::new(raw), 41 * MIB);
    let flipped = compare(("local", "web"), ("out", &exports[1]), true).await.expect(200).body;
    assert_eq!((&flipped["match"], &flipped["disks"][0]["content"]), (&json!(false), &json!("different")), "{flipped:#}");
    assert_eq!(
        (&flipped["differences"][0]["field"], root(&flipped, "target").0),
        (&json!("disks[0].content"), json!("read")),
        "{flipped:#}"
    );
    // And one at the source.
    flip(&fleet.vms().join("web.raw"), 100);
    let flipped = compare(("local", "web"), ("out", &exports[0]), true).await.expect(200).body;
    assert_eq!((&flipped["disks"][0]["content"], root(&flipped, "target").0), (&json!("different"), json!("manifest")), "{flipped:#}");
    compare(("local", "nobody"), ("local", "new"), false).await.refused(404, "not_found");
    client.post("/vms/compare", json!({"source": {"provider": "local", "vm_name": "web"}})).await.refused(400, "bad_request");

    // A connection moves to another folder of its agent.
    let change = |name: &str, body: Value| client.send(client.request(Method::PATCH, &format!("/providers/{name}")).json(&body));
    let one = fleet.exports().join(&exports[0]);
    let moved = change("out", json!({"path": one})).await.unwrap().expect(200).body;
    assert_eq!(moved["path"], json!(one), "{moved:#}");
    let vms = client.get("/vms/list?provider=out").await.expect(200).body;
    assert_eq!((vms["pagination"]["total"].clone(), &vms["data"][0]["disks"][0]["format"]), (json!(1), &json!("qcow2")), "{vms:#}");
    change("out", json!({"path": "/etc"})).await.unwrap().refused(403, "outside_roots");
    change("out", json!({"path": "etc"})).await.unwrap().refused(400, "bad_request");
    change("out", json!({"path": fleet.exports().join("nothing-there")})).await.unwrap().refused(422, "unprocessable");
    change("out", json!({"agent": "nobody"})).await.unwrap().refused(400, "bad_request");
    change("out", json!({})).await.unwrap().refused(400, "bad_request");
    change("local", json!({"path": one})).await.unwrap().refused(409, "conflict");
    change("nobody", json!({"path": one})).await.unwrap().refused(404, "not_found");
    assert_eq!(client.get("/providers/out").await.expect(200).body["path"], json!(one), "what was refused changed nothing");
}
