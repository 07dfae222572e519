//! Access and running it: API tokens, the operator's certificate, lost passwords, backup and restore, on real processes.
//!
//! Owns: these promises. Never: looks into the product but by its files and its doors. A crash here costs the test.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::client::Client;
use crate::harness::fleet::{Database, Fleet, PASSWORD, Plan, ready};
use crate::harness::images::pattern;
use crate::harness::live::Live;
use crate::harness::postgres::Db;
use crate::harness::process::{output, run};
use crate::harness::{binary, seconds, wait_for};

async fn installation(name: &str, database: Database) -> Fleet {
    Fleet::start(name, Plan { database, ..Plan::plain() }, |vms| pattern(&vms.join("web.raw"), 4 << 20, &[(0, 1 << 20)], 1)).await
}

/// A token of this client's user: its id and a client that uses it.
async fn token(client: &Client, body: Value) -> (String, Client) {
    let made = client.post("/auth/tokens", body).await.expect(201).body;
    let text = made["token"].as_str().unwrap();
    assert!(text.starts_with("hsdk_") && text.len() == 77, "{made}");
    (made["id"].as_str().unwrap().to_owned(), client.with_token(text))
}

async fn patch(client: &Client, path: &str, body: Value) -> u16 {
    client.send(client.request(Method::PATCH, path).json(&body)).await.unwrap().status
}

/// Waits at most a second until a client is nobody any more.
async fn ends(what: &str, client: &Client) {
    wait_for(what, seconds(1), async || {
        let status = client.get("/auth/me").await.status;
        if status == 401 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
}

async fn tokens_live_and_end(database: Database) {
    let fleet = installation("tokens", database).await;
    let admin = &fleet.client;
    for (name, role) in [("ann", "operator"), ("bob", "viewer")] {
        admin.post("/users", json!({"username": name, "password": PASSWORD, "role": role})).await.expect(201);
    }
    let (ann, bob) = (admin.login("ann", PASSWORD).await, admin.login("bob", PASSWORD).await);
    let job = json!({"type": "export", "provider": "local", "vm_name": "web", "format": "raw"});

    let (id, whole) = token(&ann, json!({"name": "ci", "ttl": "90d"})).await;
    let me = whole.get("/auth/me").await.expect(200).body;
    assert_eq!((me["username"].as_str(), me["role"].as_str()), (Some("ann"), Some("operator")));
    whole.post("/jobs", job.clone()).await.expect(201);
    let bearer = |client: &Client| ("authorization", format!("Bearer {}", client.token.as_deref().unwrap()));
    let mut live = Live::open(&fleet.endpoints.rest, "/ws", &[bearer(&whole)]).await.unwrap();
    live.until("hello", seconds(5), |frame| frame["type"] == "hello").await;
    let ticket = whole.post("/ws/ticket", json!({})).await.expect(201).body["ticket"].as_str().unwrap().to_owned();
    assert!(Live::open(&fleet.endpoints.rest, &format!("/ws?ticket={ticket}"), &[]).await.is_ok());

    // Smaller than its owner; it makes no token that would outlive it, and ends no other.
    let (_, small) = token(&ann, json!({"name": "look", "role": "viewer", "ttl": "1h"})).await;
    small.post("/jobs", job.clone()).await.refused(403, "forbidden");
    small.post("/auth/refresh", json!({})).await.refused(403, "forbidden");
    whole.post("/auth/tokens", json!({"name": "child", "ttl": "1m"})).await.refused(403, "forbidden");
    small.delete(&format!("/auth/tokens/{id}")).await.refused(403, "forbidden");
    let (own, itself) = token(&ann, json!({"name": "itself", "role": "viewer"})).await;
    itself.delete(&format!("/auth/tokens/{own}")).await.expect(204);
    ends("a token that revoked itself", &itself).await;
    let (_, large) = token(admin, json!({"name": "large"})).await;
    large.delete(&format!("/auth/tokens/{id}")).await.refused(403, "forbidden");
    whole.get("/auth/me").await.expect(200);
    ann.post("/auth/tokens", json!({"name": "boss", "role": "admin"})).await.refused(403, "forbidden");
    ann.post("/auth/tokens", json!({"name": "ci"})).await.refused(409, "conflict");
    for bad in
        [json!({}), json!({"name": ""}), json!({"name": "x", "ttl": "1w"}), json!({"name": "x", "expires_at": "2020-01-01T00:00:00Z"})]
    {
        ann.post("/auth/tokens", bad).await.refused(400, "bad_request");
    }

    // Who sees what, and that nobody sees a token again.
    let mine = ann.get("/auth/tokens").await.expect(200);
    let names: Vec<&str> = mine.body["data"].as_array().unwrap().iter().filter_map(|row| row["name"].as_str()).collect();
    assert_eq!(names, ["ci", "look"]);
    assert!(!mine.text.contains("hsdk_") && !mine.text.contains("hash"), "{}", mine.text);
    bob.get("/auth/tokens?user=ann").await.refused(403, "forbidden");
    assert_eq!(bob.get("/auth/tokens").await.expect(200).body["pagination"]["total"], 0);
    bob.delete(&format!("/auth/tokens/{id}")).await.refused(404, "not_found");
    assert_eq!(admin.get("/auth/tokens?user=ann").await.expect(200).body["pagination"]["total"], 2);
    wait_for("the use to be noted", seconds(3), async || {
        let list = admin.try_get("/auth/tokens?search=ci").await?;
        if list["data"][0]["last_used_at"].is_string() { Ok(()) } else { Err(list.to_string()) }
    })
    .await;

    // Revoked, by an admin: REST and the open WebSocket end.
    admin.delete(&format!("/auth/tokens/{id}")).await.expect(204);
    ends("a revoked token", &whole).await;
    admin.delete(&format!("/auth/tokens/{id}")).await.refused(404, "not_found");
    // Run out; its shape does not help a guess.
    let (_, short) = token(&ann, json!({"name": "short", "ttl": "1s"})).await;
    wait_for(
        "a token to run out",
        seconds(3),
        async || if short.get("/auth/me").await.status == 401 { Ok(()) } else { Err("good".into()) },
    )
    .await;
    admin.with_token(&format!("hsdk_{}", "0".repeat(72))).get("/auth/me").await.refused(401, "unauthorized");
    // Logged out is revoked.
    let (_, once) = token(&ann, json!({"name": "once"})).await;
    once.post("/auth/logout", json!({})).await.expect(204);
    ends("a token that logged out", &once).await;

    // The owner's role counts at once, and the owner's end is the token's: a new user of the name is somebody else.
    let (_, late) = token(&ann, json!({"name": "late"})).await;
    assert_eq!(late.get("/auth/me").await.expect(200).body["role"], "operator");
    assert_eq!(patch(admin, "/users/ann", json!({"role": "viewer"})).await, 200);
    late.post("/jobs", job).await.refused(403, "forbidden");
    admin.delete("/users/ann").await.expect(204);
    ends("a token whose owner went", &late).await;
    admin.post("/users", json!({"username": "ann", "password": PASSWORD, "role": "admin"})).await.expect(201);
    late.get("/auth/me").await.refused(401, "unauthorized");
    let audit = admin.get("/audit?limit=200").await.expect(200).text;
    assert!(audit.contains("token.create") && audit.contains("token.revoke") && !audit.contains("hsdk_"), "{audit}");
    // No byte of the database holds a token.
    if database == Database::Sqlite {
        for file in ["hypersdk.db", "hypersdk.db-wal"] {
            let bytes = std::fs::read(fleet.controller.home().join("data").join(file)).unwrap();
            assert!(!bytes.windows(5).any(|part| part == b"hsdk_"), "{file} holds a token");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_token_is_its_owner_or_less_until_it_is_revoked() {
    tokens_live_and_end(Database::Sqlite).await;
    tokens_live_and_end(Database::Postgres).await;
}

/// A self-signed pair; answers the certificate's fingerprint.
fn certificate(dir: &Path, name: &str) -> String {
    let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    let mut make = Command::new("openssl");
    make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"]);
    run(make
        .args(["-subj", &format!("/CN={name}"), "-addext", "subjectAltName=DNS:localhost"])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&cert));
    let text = run(Command::new("openssl").args(["x509", "-noout", "-fingerprint", "-sha256", "-in"]).arg(&cert));
    text.trim().rsplit('=').next().unwrap().replace(':', "").to_lowercase()
}

/// The fingerprint that a new connection meets.
fn met(rest: &str) -> String {
    let host = rest.trim_start_matches("https://");
    let script = "openssl s_client -connect \"$1\" </dev/null 2>/dev/null | openssl x509 -noout -fingerprint -sha256";
    let text = run(Command::new("sh").args(["-c", script, "sh", host]));
    text.trim().rsplit('=').next().unwrap().replace(':', "").to_lowercase()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_certificate_is_taken_without_dropping_a_connection() {
    let mut fleet = installation("certificate", Database::Sqlite).await;
    let dir = fleet.scratch.dir("tls");
    let first = certificate(&dir, "first");
    fleet.controller.set("TLS_CERT", &dir.join("cert.pem").display().to_string());
    fleet.controller.set("TLS_KEY", &dir.join("key.pem").display().to_string());
    fleet.restart_controller().await;
    assert_eq!(met(&fleet.endpoints.rest), first);
    let bearer = ("authorization", format!("Bearer {}", fleet.client.token.as_deref().unwrap()));
    let mut live = Live::open(&fleet.endpoints.rest, "/ws", &[bearer]).await.unwrap();
    live.until("hello", seconds(5), |frame| frame["type"] == "hello").await;
    // A certificate without its key is not taken, and said.
    let other = fleet.scratch.dir("other");
    let second = certificate(&other, "second");
    std::fs::rename(other.join("cert.pem"), dir.join("cert.pem")).unwrap();
    wait_for("the log to say so", seconds(10), async || {
        let log = fleet.controller.process().log();
        if log.contains("the changed certificate is not taken") { Ok(()) } else { Err(fleet.controller.process().tail()) }
    })
    .await;
    assert_eq!(met(&fleet.endpoints.rest), first);
    std::fs::rename(other.join("key.pem"), dir.join("key.pem")).unwrap();
    wait_for("the new certificate", seconds(10), async || {
        let now = met(&fleet.endpoints.rest);
        if now == second { Ok(()) } else { Err(now) }
    })
    .await;
    let endpoints = std::fs::read_to_string(fleet.controller.home().join("data/endpoints.json")).unwrap();
    assert!(endpoints.contains(&second), "{endpoints}");
    let id = fleet.client.export("web", "raw", json!({})).await;
    live.until("news over the old connection", seconds(20), |frame| frame["data"]["id"] == *id).await;
}

/// `hypersdk admin …` for this installation.
fn admin(fleet: &Fleet, database: Option<&str>, arguments: &[&str]) -> Output {
    admin_at(&fleet.controller.home().join("data"), database, arguments)
}

fn admin_at(data: &Path, database: Option<&str>, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary("hypersdk"));
    command.arg("admin").args(arguments).arg("--data-dir").arg(data).env("HYPERSDK_BCRYPT_COST", "10");
    if let Some(url) = database {
        command.env("HYPERSDK_DATABASE_URL", url);
    }
    if arguments[0] == "reset-password" {
        command.env("HYPERSDK_PASSWORD", "another good password");
    }
    output(&mut command)
}

#[track_caller]
fn done(output: Output) -> String {
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    said
}

#[track_caller]
fn fails(output: Output, why: &str) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains(why), "{said}");
}

async fn connected(client: &Client) {
    wait_for("the agent to come back", seconds(60), async || {
        let agents = client.try_get("/agents").await?;
        if agents["data"][0]["status"] == "connected" { Ok(()) } else { Err(agents.to_string()) }
    })
    .await;
    client.get("/vms/list?refresh=true").await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_brings_everything_back_on_either_database() {
    let mut fleet = installation("backup", Database::Sqlite).await;
    let old = fleet.client.export("web", "qcow2", json!({})).await;
    fleet.client.completed(&old, seconds(60)).await;
    let (_, program) = token(&fleet.client, json!({"name": "ci"})).await;
    let file = fleet.scratch.join("backup.jsonl");
    let path = file.display().to_string();
    // Of a controller that runs.
    println!("{}", done(admin(&fleet, None, &["backup", &path])));
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    fails(admin(&fleet, None, &["backup", &path]), "exists already");
    fails(admin(&fleet, None, &["restore", &path, "--force"]), "stop it first");

    fleet.client.post("/users", json!({"username": "later", "password": PASSWORD, "role": "viewer"})).await.expect(201);
    let lost = fleet.client.export("web", "raw", json!({})).await;
    fleet.client.completed(&lost, seconds(60)).await;
    fleet.controller.process().terminate(seconds(30)).await;
    // Not over what is there; and nothing of a damaged one.
    fails(admin(&fleet, None, &["restore", &path]), "not empty");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let bad = fleet.scratch.join("bad.jsonl");
    std::fs::write(&bad, &bytes).unwrap();
    fails(admin(&fleet, None, &["restore", &bad.display().to_string(), "--force"]), "no whole backup");
    fleet.controller.start();
    ready(&mut fleet.controller, &fleet.client).await;
    fleet.client.get(&format!("/jobs/{lost}")).await.expect(200);

    // Over it, by force: what came later is gone, all else is as it was, the agent knows its controller.
    fleet.controller.process().terminate(seconds(30)).await;
    println!("{}", done(admin(&fleet, None, &["restore", &path, "--force"])));
    fleet.controller.start();
    ready(&mut fleet.controller, &fleet.client).await;
    back(&fleet, &program, &old, &lost).await;

    // Into an empty Postgres, in an empty directory.
    fleet.controller.process().terminate(seconds(30)).await;
    let data = fleet.controller.home().join("data");
    std::fs::rename(&data, fleet.controller.home().join("data.sqlite")).unwrap();
    let db = Db::create();
    println!("{}", done(admin(&fleet, Some(&db.url), &["restore", &path])));
    fails(admin(&fleet, Some(&db.url), &["restore", &path]), "not empty");
    fleet.controller.set("DATABASE_URL", &db.url);
    fleet.controller.start();
    ready(&mut fleet.controller, &fleet.client).await;
    back(&fleet, &program, &old, &lost).await;
    // Not under a controller that is at this database, from whichever directory; and that one goes on.
    let elsewhere = fleet.scratch.dir("elsewhere");
    fails(admin_at(&elsewhere, Some(&db.url), &["restore", &path, "--force"]), "a controller runs on this database; stop it first");
    fleet.client.get("/auth/me").await.expect(200);
    // And from there back into SQLite.
    let second = fleet.scratch.join("second.jsonl").display().to_string();
    println!("{}", done(admin(&fleet, Some(&db.url), &["backup", &second])));
    fleet.controller.process().terminate(seconds(30)).await;
    println!("{}", done(admin(&fleet, None, &["restore", &second, "--force"])));
    fleet.controller.set("DATABASE_URL", &format!("sqlite://{}?mode=rwc", data.join("hypersdk.db").display()));
    fleet.controller.start();
    ready(&mut fleet.controller, &fleet.client).await;
    back(&fleet, &program, &old, &lost).await;
}

/// Everything of the backup is there, nothing else is, and the installation works.
async fn back(fleet: &Fleet, program: &Client, old: &str, lost: &str) {
    program.get("/auth/me").await.expect(200);
    fleet.client.get("/users").await.expect(200);
    fleet.client.login("admin", PASSWORD).await;
    assert_eq!(fleet.client.job(old).await["status"], "completed");
    assert!(!fleet.client.log_lines(old).await.unwrap().is_empty());
    assert_eq!(fleet.client.get(&format!("/jobs?search={old}")).await.expect(200).body["pagination"]["total"], 1);
    fleet.client.get(&format!("/jobs/{lost}")).await.refused(404, "not_found");
    assert!(!fleet.client.get("/users?limit=200").await.expect(200).text.contains("later"));
    connected(&fleet.client).await;
    let id = fleet.client.export("web", "raw", json!({})).await;
    fleet.client.completed(&id, seconds(60)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_password_is_replaced_at_the_machine() {
    let fleet = installation("password", Database::Sqlite).await;
    println!("{}", done(admin(&fleet, None, &["reset-password"])));
    ends("the session of before", &fleet.client).await;
    let body = json!({"username": "admin", "password": PASSWORD});
    fleet.client.anonymous().post("/auth/login", body).await.refused(401, "bad_credentials");
    let client = fleet.client.login("admin", "another good password").await;
    assert!(client.get("/audit?search=reset").await.expect(200).text.contains("user.reset_password"));
    fails(admin(&fleet, None, &["reset-password", "nobody"]), "no user `nobody`");
}
