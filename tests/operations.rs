//! One row for each operation of the OpenAPI document: its happy answer, every error it documents, who may call it, both prefixes.
//!
//! ```text
//! document ─► rows (tests/operations/rows.rs) ─► happy · errors (general ones by rule, the rest by the row) · access matrix
//! ```
//! Owns: the rules that hold for all of them; what is documented and shown by nobody fails here. Never: what an operation means (its room's
//! test does). A crash here costs the test.

mod rows;
mod schedules;

use std::collections::BTreeMap;

use reqwest::Method;
use serde_json::{Value, json};

use crate::contract::has_shape;
use crate::harness::client::{Answer, Client};
use crate::harness::fleet::{Database, Fleet, PASSWORD, Plan};
use crate::harness::images::{foreign_ova, pattern, qemu_img};
use crate::harness::{libvirtd, seconds, wait_for};
use rows::{Ask, Body, Role, Row, rows};

const MIB: u64 = 1 << 20;

/// An installation with two VMs.
async fn fleet(name: &str) -> Fleet {
    Fleet::start(name, Plan::plain(), |vms| {
        let raw = vms.parent().unwrap().join("source");
        pattern(&raw, 4 * MIB, &[(0, MIB)], 1);
        foreign_ova(&vms.join("web-server-01.ova"), "web-server-01", &[&raw]);
        pattern(&vms.join("db-server-01.raw"), 8 * MIB, &[(0, MIB)], 2);
        pattern(&vms.join("twin.raw"), MIB, &[(0, MIB)], 3);
        foreign_ova(&vms.join("twin.ova"), "twin", &[&raw]);
    })
    .await
}

/// The operations of the document, `METHOD /path`, with the statuses that each documents.
async fn documented(client: &Client) -> BTreeMap<String, Vec<u16>> {
    let document = client.get("/openapi.json").await.expect(200).body;
    let mut found = BTreeMap::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            if !["get", "post", "patch", "put", "delete"].contains(&method.as_str()) {
                continue;
            }
            let statuses = operation["responses"].as_object().unwrap().keys().map(|status| status.parse().unwrap());
            found.insert(format!("{} {path}", method.to_uppercase()), statuses.collect());
        }
    }
    found
}

async fn send(client: &Client, method: &str, ask: &Ask) -> Answer {
    let mut request = client.request(Method::from_bytes(method.as_bytes()).unwrap(), &ask.path);
    request = match &ask.body {
        Body::None => request,
        Body::Json(value) => request.json(value),
        Body::Bytes(kind, bytes) => request.header("Content-Type", *kind).body(bytes.clone()),
    };
    for (name, value) in &ask.headers {
        request = request.header(*name, value);
    }
    client.send(request).await.unwrap()
}

/// The people of an installation, by role.
struct People {
    viewer: Client,
    operator: Client,
    admin: Client,
}

impl People {
    async fn of(fleet: &Fleet) -> Self {
        let admin = fleet.client.clone();
        for role in ["viewer", "operator"] {
            admin.post("/users", json!({"username": format!("a-{role}"), "password": "quite long enough", "role": role})).await.expect(201);
        }
        let viewer = admin.login("a-viewer", "quite long enough").await;
        Self { viewer, operator: admin.login("a-operator", "quite long enough").await, admin }
    }

    fn of_role(&self, role: Role) -> &Client {
        match role {
            Role::Nobody | Role::Viewer => &self.viewer,
            Role::Operator => &self.operator,
            Role::Admin => &self.admin,
        }
    }
}

/// An error that a rule provokes, for whatever operation documents it; `None`: the row has to.
async fn by_rule(people: &People, row: &Row, status: u16) -> Option<Answer> {
    let client = people.of_role(row.role);
    let ask = |ask: Ask| async move { Some(send(client, row.method, &ask).await) };
    let plain = |path: &str| Ask { path: path.to_owned(), body: row.happy.body.clone(), headers: Vec::new() };
    let has_json = matches!(row.happy.body, Body::Json(_));
    match status {
        401 if row.role != Role::Nobody => Some(send(&people.admin.anonymous(), row.method, &row.happy).await),
        403 if row.role > Role::Viewer => {
            let lesser = if row.role == Role::Admin { &people.operator } else { &people.viewer };
            Some(send(lesser, row.method, &row.happy).await)
        }
        404 if row.path.contains('{') => {
            let mut path = row.path.to_owned();
            for name in ["id", "name", "provider", "snapshot", "file"] {
                let value = if name == "provider" { "local" } else { "nothing-there" };
                path = path.replace(&format!("{{{name}}}"), value);
            }
            ask(plain(&path)).await
        }
        400 if row.method == "GET" => {
            let joint = if row.happy.path.contains('?') { '&' } else { '?' };
            ask(plain(&format!("{}{joint}colour=red", row.happy.path))).await
        }
        400 if has_json => ask(Ask { body: Body::Json(json!({"colour": "red"})), ..plain(&row.happy.path) }).await,
        413 if has_json => {
            let large = format!("{{\"colour\": \"{}\"}}", "x".repeat(2 << 20)).into_bytes();
            ask(Ask { body: Body::Bytes("application/json", large), ..plain(&row.happy.path) }).await
        }
        415 if has_json => ask(Ask { body: Body::Bytes("text/plain", b"{}".to_vec()), ..plain(&row.happy.path) }).await,
        _ => None,
    }
}

/// Notes what does not hold and goes on: one run shows all of it.
fn holds(left: &mut Vec<String>, name: &str, check: impl FnOnce()) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).is_err() {
        left.push(name.to_owned());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_gives_what_it_documents() {
    let fleet = fleet("operations").await;
    let people = People::of(&fleet).await;
    let documented = documented(&fleet.client).await;
    let rows = rows(&fleet, &people).await;
    let mut left: Vec<String> = documented.keys().filter(|name| !rows.iter().any(|row| row.name() == **name)).cloned().collect();
    for row in &rows {
        let name = row.name();
        let statuses = documented.get(&name).unwrap_or_else(|| panic!("{name} has a row and is not documented"));
        for status in statuses.iter().copied().filter(|status| *status >= 400) {
            // 429, 502 and 503 have tests of their own, for every operation that documents them; nobody provokes a defect.
            // An API token gets no refresh and revokes only itself: `access` shows it.
            let of_tokens = status == 403 && matches!(name.as_str(), "POST /auth/refresh" | "DELETE /auth/tokens/{id}");
            if matches!(status, 429 | 500 | 502 | 503) || of_tokens {
                continue;
            }
            let given: Vec<_> = row.errors.iter().filter(|(of, _, _)| *of == status).collect();
            let mut answers = Vec::new();
            for (_, code, ask) in &given {
                answers.push((Some(*code), send(people.of_role(row.role), row.method, ask).await));
            }
            if answers.is_empty() {
                answers.extend(by_rule(&people, row, status).await.map(|answer| (None, answer)));
            }
            if answers.is_empty() {
                left.push(format!("{name} documents {status}, and nothing here provokes it"));
            }
            for (code, answer) in answers {
                holds(&mut left, &name, || {
                    let code = code.map_or_else(|| answer.body["code"].as_str().unwrap_or_default().to_owned(), str::to_owned);
                    answer.refused(status, &code);
                    assert!(status != 401 || answer.header("www-authenticate") == Some("Bearer"), "{:?}", answer.headers);
                });
            }
        }
        // Last: some happy answers end what the row is about.
        let Some((status, example)) = &row.answer else { continue };
        let answer = send(people.of_role(row.role), row.method, &row.happy).await;
        holds(&mut left, &name, || {
            assert_eq!(answer.status, *status, "{} answered {} {}", answer.asked, answer.status, answer.text);
            assert!(statuses.contains(status), "it answers {status} and documents {statuses:?}");
            has_shape(example, &answer.body, &name);
        });
    }
    assert!(
        left.is_empty(),
        "{} do not hold (each panicked above), or are documented and shown by nobody:\n{}",
        left.len(),
        left.join("\n")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_call_what() {
    let fleet = fleet("matrix").await;
    let people = People::of(&fleet).await;
    let documented = documented(&fleet.client).await;
    let rows = rows(&fleet, &people).await;
    let good = fleet.client.token.clone().unwrap();
    let mut altered = good.clone().into_bytes();
    let at = altered.len() - 10;
    altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
    // Signed by somebody else, and not at all.
    let none = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.eyJzdWIiOiJhZG1pbiIsInJvbGUiOiJhZG1pbiIsImV4cCI6OTk5OTk5OTk5OX0.";
    let foreign = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJhZG1pbiIsInJvbGUiOiJhZG1pbiIsImV4cCI6OTk5OTk5OTk5OX0.\
                   c2lnbmVkLWJ5LXNvbWVib2R5LWVsc2UtZW50aXJlbHkh";
    let revoked = fleet.client.login("admin", PASSWORD).await;
    revoked.post("/auth/logout", json!({})).await.expect(204);
    let short = fleet.client.post("/auth/tokens", json!({"name": "short", "ttl": "1s"})).await.expect(201).body;
    let short = short["token"].as_str().unwrap().to_owned();
    crate::harness::wait_for("the token to run out", seconds(10), async || {
        let answer = fleet.client.with_token(&short).get("/auth/me").await;
        if answer.status == 401 { Ok(()) } else { Err(answer.text) }
    })
    .await;
    let altered = String::from_utf8(altered).unwrap();
    let strangers: [(&str, Client); 6] = [
        ("nobody", fleet.client.anonymous()),
        ("alg none", fleet.client.with_token(none)),
        ("another key", fleet.client.with_token(foreign)),
        ("an altered byte", fleet.client.with_token(&altered)),
        ("revoked", revoked),
        ("expired", fleet.client.with_token(&short)),
    ];
    let mut wrong = Vec::new();
    for row in rows.iter().filter(|row| documented.contains_key(&row.name())) {
        // Nothing of the body is right, so nothing is done where a caller is let in.
        let mut path = row.path.to_owned();
        for name in ["id", "name", "provider", "snapshot"] {
            path = path.replace(&format!("{{{name}}}"), "nothing-there");
        }
        let body = if row.method == "GET" { Body::None } else { Body::Json(json!({"colour": "red"})) };
        for prefix in ["//api/v1", "/"] {
            let ask = Ask { path: format!("{prefix}{path}"), body: body.clone(), headers: Vec::new() };
            for (who, client) in &strangers {
                let status = send(client, row.method, &ask).await.status;
                // A public path looks at no token; with a bad one it may say so.
                let right = if row.role == Role::Nobody { status != 403 } else { status == 401 };
                if !right {
                    wrong.push(format!("{} for {who} at {prefix}: {status}", row.name()));
                }
            }
            for role in [Role::Viewer, Role::Operator, Role::Admin] {
                // These end the token that they are called with.
                if row.path == "/auth/logout" || row.path == "/auth/refresh" || row.path == "/ws" {
                    continue;
                }
                let answer = send(people.of_role(role), row.method, &ask).await;
                let may = role >= row.role;
                let refused = answer.status == 403 && answer.body["code"] == "forbidden";
                if may == refused || (!may && answer.status != 403) {
                    wrong.push(format!("{} for {role:?} at {prefix}: {} {}", row.name(), answer.status, answer.text));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_asks_too_often_is_told_so_at_every_operation() {
    let mut fleet = fleet("often").await;
    let people = People::of(&fleet).await;
    let rows = rows(&fleet, &people).await;
    // From here on one request an hour, for users and for strangers.
    for (name, value) in [("LIMITS_USER_PER_MINUTE", "1"), ("LIMITS_ANONYMOUS_BURST", "1"), ("LIMITS_ANONYMOUS_REPLENISH_MS", "3600000")] {
        fleet.controller.set(name, value);
    }
    fleet.restart_controller().await;
    let clients = [&people.viewer, &people.operator, &people.admin];
    for client in clients {
        client.get("/auth/me").await;
    }
    let nobody = people.admin.anonymous();
    nobody.get("/livez").await;
    let mut wrong = Vec::new();
    for row in &rows {
        let client = if row.role == Role::Nobody { &nobody } else { people.of_role(row.role) };
        let answer = send(client, row.method, &Ask { headers: Vec::new(), ..row.happy.clone() }).await;
        if answer.status != 429 || answer.body["code"] != "rate_limited" || answer.header("retry-after").is_none() {
            wrong.push(format!("{} answered {} {}", row.name(), answer.status, answer.text));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_hangs_is_a_bad_gateway_and_no_more() {
    let mut fleet = fleet("hangs").await;
    let people = People::of(&fleet).await;
    let documented = documented(&fleet.client).await;
    let rows = rows(&fleet, &people).await;
    fleet.agents[0].process().signal("STOP");
    let asked = rows.iter().filter(|row| documented.get(&row.name()).is_some_and(|statuses| statuses.contains(&502))).map(async |row| {
        let special = row.errors.iter().find(|(status, _, _)| *status == 502);
        let ask = special.map_or(&row.happy, |(_, _, ask)| ask);
        (row.name(), send(people.of_role(row.role), row.method, ask).await)
    });
    let answers = futures_util::future::join_all(asked).await;
    fleet.agents[0].process().signal("CONT");
    assert!(answers.len() > 3, "{answers:?}");
    // What acts at a hypervisor has more time than a silent agent: there the end of its session is the answer. Of nothing else.
    let acts = [
        "POST /vms/deploy",
        "DELETE /exports/{id}",
        "POST /vms/{provider}/{id}/power",
        "GET /vms/{provider}/{id}/snapshots",
        "POST /vms/{provider}/{id}/snapshots",
        "DELETE /vms/{provider}/{id}/snapshots/{snapshot}",
    ];
    let is_told = |name: &str, answer: &Answer| {
        let code = answer.body["code"].as_str().unwrap_or_default();
        (answer.status, code) == (502, "bad_gateway")
            || acts.contains(&name) && (answer.status, code) == (503, "unavailable") && answer.text.contains("went away")
    };
    let wrong: Vec<_> = answers.iter().filter(|(name, answer)| !is_told(name, answer)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_database_every_operation_says_503_and_never_500() {
    let fleet = Fleet::start("away", Plan { database: Database::Postgres, ..Plan::plain() }, |vms| {
        pattern(&vms.join("db-server-01.raw"), 8 * MIB, &[(0, MIB)], 2);
        pattern(&vms.join("web-server-01.raw"), 8 * MIB, &[(0, MIB)], 2);
    })
    .await;
    let people = People::of(&fleet).await;
    let rows = rows(&fleet, &people).await;
    fleet.database_away(true);
    let mut wrong = Vec::new();
    for row in &rows {
        let answer = send(people.of_role(row.role), row.method, &row.happy).await;
        // What is public or not built reads nothing and goes on.
        let unharmed = (row.role == Role::Nobody && answer.status < 400) || answer.body["code"] == "not_built";
        let said = answer.status == 503 && answer.body["code"] == "unavailable" && answer.header("retry-after").is_some();
        if !unharmed && !said {
            wrong.push(format!("{} answered {} {} {:?}", row.name(), answer.status, answer.text, answer.header("retry-after")));
        }
    }
    fleet.database_away(false);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    crate::harness::wait_for("the database's return", seconds(20), async || fleet.client.try_get("/jobs").await.map(drop)).await;
}

/// The published page's own commands, host, port and token filled in, as somebody types them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pages_commands_run_as_they_are_written() {
    libvirtd::start();
    libvirtd::default_network();
    let mut fleet = fleet("page").await;
    // KVM is there and runs no guest everywhere.
    fleet.agents[0].set("LIBVIRT_ACCEL", "tcg");
    fleet.agents[0].process().terminate(seconds(30)).await;
    fleet.agents[0].start();
    let image = fleet.agents[0].home().join("data/images/web-server-01.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "64M"]);
    wait_for("the agent to serve libvirt", seconds(30), async || {
        let answer = fleet.client.post("/providers/connect", json!({"provider": "libvirt", "uri": libvirtd::URI})).await;
        if answer.status == 201 { Ok(()) } else { Err(answer.text) }
    })
    .await;
    let _deployed = libvirtd::Domain::adopt("web-server-01", "");
    // The page's `vsphere` is a name like any other: here it is a folder's.
    let folder = fleet.vms().display().to_string();
    fleet.client.post("/providers/connect", json!({"provider": "local", "name": "vsphere", "path": folder})).await.expect(201);
    fleet.client.get("/vms/list?refresh=true&provider=vsphere").await.expect(200);
    let page = include_str!("lab/page.txt");
    let mut ran = 0;
    for (command, expected) in page.split("\n\n").filter_map(|block| block.trim().rsplit_once("\n=> ")) {
        let host = fleet.endpoints.rest.trim_start_matches("https://");
        let command = command.replace("your-server:5080", host).replace("TOKEN", fleet.client.token.as_ref().unwrap());
        let command = command.replace("\"password\": \"secret\"", &format!("\"password\": \"{PASSWORD}\""));
        // The head line says which command; `-w` adds the status behind the body.
        let shell = command.replacen("curl ", "curl -w '\\n%{http_code}' ", 1);
        let out = crate::harness::process::run(std::process::Command::new("bash").arg("-c").arg(&shell));
        let (body, status) = out.trim_end().rsplit_once('\n').unwrap_or(("", out.trim()));
        let body: Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{command}\nanswered no JSON ({e}): {out}"));
        let (wanted, example) = expected.split_once(' ').unwrap_or((expected, "null"));
        assert_eq!(status, wanted, "{command}\nanswered {body:#}");
        let example: Value = serde_json::from_str(example).unwrap_or_else(|e| panic!("{e}: {example}"));
        if !example.is_null() {
            has_shape(&example, &body, "page");
        }
        ran += 1;
    }
    assert_eq!(ran, 10, "commands of the page");
}

/// Whoever sends much and is refused at once still gets the answer, over either HTTP.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_arrives_however_much_came_with_the_question() {
    let fleet = fleet("much").await;
    let token = fleet.client.token.clone().unwrap();
    let mut lost = Vec::new();
    for size in [100, MIB - 1, 12 * MIB] {
        let body = fleet.vms().parent().unwrap().join(format!("body-{size}"));
        pattern(&body, size, &[(0, size)], 4);
        for version in ["--http2", "--http1.1"] {
            for (path, token, status) in
                [("/jobs/none/retry", token.as_str(), "404"), ("/nowhere", &token, "404"), ("/jobs", "wrong", "401")]
            {
                // Of a stranger at most 1 MiB is listened to, or anybody could keep the controller busy with nothing.
                if status == "401" && size > MIB {
                    continue;
                }
                let mut curl = std::process::Command::new("curl");
                curl.args([version, "-sk", "-o", "/dev/null", "-w", "%{http_code} %{exitcode} %{errormsg}", "--data-binary"]);
                curl.arg(format!("@{}", body.display())).args(["-H", "Content-Type: application/json", "-H"]);
                curl.arg(format!("Authorization: Bearer {token}")).arg(format!("{}/api/v1{path}", fleet.endpoints.rest));
                // Curl's own failure is what is looked for: it is in the text.
                let out = String::from_utf8(curl.output().unwrap().stdout).unwrap();
                if out.trim() != format!("{status} 0") {
                    lost.push(format!("{version} {path} with {size} bytes: {out}, wanted {status}"));
                }
            }
        }
    }
    assert!(lost.is_empty(), "{lost:#?}");
}
