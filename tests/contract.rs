//! The contract as a client meets it: errors, prefixes, pages, limits, and the published page's own examples.
//!
//! Owns: what `rest-api.txt` and the contract say of every operation. Never: what one operation means (the rooms do).
//! A crash here costs the test.

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::client::Client;
use crate::harness::fleet::{Fleet, Plan};
use crate::harness::images::{foreign_ova, pattern};
use crate::harness::live::Live;
use crate::harness::seconds;

const MIB: u64 = 1 << 20;

async fn fleet(name: &str, limited: bool) -> Fleet {
    let plan = Plan { limited, ..Plan::plain() };
    Fleet::start(name, plan, |vms| {
        let raw = vms.parent().unwrap().join("source");
        pattern(&raw, 4 * MIB, &[(0, MIB)], 1);
        foreign_ova(&vms.join("web-server-01.ova"), "web-server-01", &[&raw]);
        pattern(&vms.join("db-server-01.raw"), 8 * MIB, &[(0, MIB)], 2);
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_error_has_the_one_shape_at_both_prefixes() {
    let fleet = fleet("errors", false).await;
    let client = &fleet.client;
    for prefix in ["//api/v1", "/"] {
        let path = |rest: &str| format!("{prefix}{rest}");
        client.get(&path("/no/such/thing")).await.refused(404, "not_found");
        client.get(&path("/jobs/job-00000000")).await.refused(404, "not_found");
        let wrong = client.delete(&path("/jobs")).await;
        let sentence = wrong.refused(405, "method_not_allowed");
        let allow = wrong.header("allow").unwrap_or_default();
        assert!(allow.contains("GET") && allow.contains("POST") && sentence.contains("GET"), "{allow} {sentence}");
        let post = |body: &str, kind: &str| {
            let request = client.request(Method::POST, &path("/jobs")).header("Content-Type", kind).body(body.to_owned());
            client.send(request)
        };
        post("{\"type\":", "application/json").await.unwrap().refused(400, "bad_request");
        post("", "application/json").await.unwrap().refused(400, "bad_request");
        post("{}", "text/plain").await.unwrap().refused(415, "unsupported_media_type");
        let large = format!("{{\"type\": \"{}\"}}", "x".repeat(2 << 20));
        post(&large, "application/json").await.unwrap().refused(413, "too_large");
        let unknown =
            post(r#"{"type":"export","provider":"local","vm_name":"x","format":"raw","speed":"high"}"#, "application/json").await.unwrap();
        assert!(unknown.refused(400, "bad_request").contains("speed"), "an unknown field is named: {}", unknown.text);
        client.anonymous().get(&path("/jobs")).await.refused(401, "unauthorized");
        client.with_token("nonsense").get(&path("/jobs")).await.refused(401, "unauthorized");
    }
    // What the contract names and is not built says so.
    let sentence = client.post("/providers/connect", json!({"provider": "warehouse"})).await.refused(422, "not_built");
    assert!(sentence.contains("not built yet"), "{sentence}");
    // The caller's own request id comes back.
    let answer = client.send(client.request(Method::GET, "/no").header("X-Request-Id", "night-7")).await.unwrap();
    assert_eq!((answer.header("x-request-id"), answer.body["request_id"].as_str()), (Some("night-7"), Some("night-7")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_answers_alike_at_both_prefixes() {
    let fleet = fleet("prefixes", false).await;
    let client = &fleet.client;
    let document = client.get("/openapi.json").await.expect(200).body;
    assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")), "{}", document["openapi"]);
    let mut operations = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let bare = path.strip_prefix("/api/v1").unwrap_or(path).replace(['{', '}'], "");
        for method in
            methods.as_object().unwrap().keys().filter(|method| ["get", "post", "patch", "delete", "put"].contains(&method.as_str()))
        {
            operations += 1;
            let name = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let nobody = client.anonymous();
            let ask = |path: String| nobody.send(nobody.request(name.clone(), &path));
            let (long, short) = (ask(bare.clone()).await.unwrap(), ask(format!("/{bare}")).await.unwrap());
            assert_eq!((long.status, &long.body["code"]), (short.status, &short.body["code"]), "{method} {bare}");
            assert!(long.status != 404 && long.status != 405, "{method} {bare} stands in the document and answers {}", long.text);
            // Whoever has no token learns nothing but from what is public.
            let public =
                ["/health", "/livez", "/readyz", "/auth/login", "/openapi.json", "/docs"].iter().any(|public| bare.starts_with(public));
            assert!(public || long.status == 401, "{method} {bare} answered {} to nobody", long.status);
        }
    }
    assert!(operations > 25, "{operations} operations in the document");
    assert_eq!(client.get("/health").await.expect(200).body["status"], "ok");
    assert_eq!(client.get("//health").await.expect(200).body["status"], "ok");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_have_bounds() {
    let fleet = fleet("pages", false).await;
    let client = &fleet.client;
    for list in ["/jobs", "/vms/list", "/providers", "/agents", "/users", "/audit", "/webhooks", "/system/alerts"] {
        let page = client.get(list).await.expect(200).body;
        assert!(page["data"].is_array() && page["pagination"]["offset"] == 0 && page["pagination"]["limit"] == 50, "{list}: {page:#}");
        assert!(page["pagination"]["total"].is_u64() && page["pagination"]["has_more"].is_boolean(), "{list}: {page:#}");
        assert_eq!(client.get(&format!("{list}?limit=1000")).await.expect(200).body["pagination"]["limit"], 200, "{list}");
        let beyond = client.get(&format!("{list}?offset=1000000")).await.expect(200).body;
        assert_eq!((beyond["data"].as_array().map(Vec::len), &beyond["pagination"]["has_more"]), (Some(0), &json!(false)), "{list}");
        for wrong in ["limit=0", "limit=-1", "limit=ten", "offset=-1", "offset=x", "sort=colour", "order=up", "colour=red"] {
            let answer = client.get(&format!("{list}?{wrong}")).await;
            let sentence = answer.refused(400, "bad_request");
            let name = wrong.split('=').next().unwrap();
            assert!(sentence.contains(name) || sentence.contains("colour") || sentence.contains("up"), "{list}?{wrong}: {sentence}");
        }
    }
    let two = client.get("/vms/list?limit=1").await.expect(200).body;
    assert_eq!((&two["pagination"]["has_more"], &two["pagination"]["total"]), (&json!(true), &json!(2)), "{two:#}");
    let sentence = client.get("/jobs?status=asleep").await.refused(400, "bad_request");
    assert!(sentence.contains("queued") && sentence.contains("cancelled"), "the known ones are listed: {sentence}");
}

/// Every field of the page's example stands in the answer, with the same kind of value; null in the example stands for any.
#[track_caller]
pub fn has_shape(example: &Value, answer: &Value, at: &str) {
    match (example, answer) {
        (Value::Null, _) => {}
        (Value::Object(fields), Value::Object(found)) => {
            for (name, value) in fields {
                let answer = found.get(name).unwrap_or_else(|| panic!("{at}.{name} is missing in {answer:#}"));
                has_shape(value, answer, &format!("{at}.{name}"));
            }
        }
        (Value::Array(items), Value::Array(found)) => {
            for value in found.iter().filter(|_| !items.is_empty()) {
                has_shape(&items[0], value, at);
            }
        }
        _ => assert_eq!(std::mem::discriminant(example), std::mem::discriminant(answer), "{at}: {example} and {answer}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pages_own_examples_work() {
    let fleet = fleet("examples", false).await;
    let client = &fleet.client;
    let list = client.get("/vms/list?provider=local&limit=5").await.expect(200).body;
    let example = json!({
        "data": [{
            "name": "web-server-01", "provider": "vsphere", "os": "linux", "os_version": "RHEL 9.3", "cpu": 4, "memory_mb": 8192,
            "disks": [{"name": "disk-0", "size_gb": 100, "format": "vmdk", "thin_provisioned": true}],
            "nics": [{"name": "nic-0", "type": "vmxnet3", "network": "VM Network", "mac": "00:50:56:ab:cd:ef"}],
            "power_state": "poweredOn", "tools_status": "running", "last_seen": "2025-06-15T10:25:00Z"
        }],
        "pagination": {"offset": 0, "limit": 5, "total": 87, "has_more": true}
    });
    has_shape(&example, &list, "vms");
    let web = &list["data"].as_array().unwrap()[1];
    assert_eq!(
        (&web["name"], &web["nics"][0]["type"], &web["memory_mb"]),
        (&json!("web-server-01"), &json!("vmxnet3"), &json!(768)),
        "{web:#}"
    );
    for field in ["id", "path", "connection", "firmware", "snapshots"] {
        assert!(!web[field].is_null(), "{field}: {web:#}");
    }
    assert_eq!(client.get("/vms/list?search=WEB-SERVER&os=linux").await.expect(200).body["pagination"]["total"], 1);
    assert_eq!(client.get("/vms/list?status=stopped").await.expect(200).body["pagination"]["total"], 2);

    let body = json!({
        "type": "export", "provider": "local", "vm_name": "web-server-01", "format": "ova",
        "options": {"compress": true, "include_snapshots": false, "destination": "exports/"}
    });
    let created = client.post("/jobs", body.clone()).await.expect(201);
    let mut example = body;
    for (field, value) in [
        ("id", json!("job-a1b2c3d4")),
        ("status", json!("queued")),
        ("progress", json!(0)),
        ("created_at", json!("")),
        ("updated_at", json!("")),
    ] {
        example[field] = value;
    }
    has_shape(&example, &created.body, "job");
    let job = &created.body;
    assert_eq!((&job["status"], &job["progress"], &job["options"]), (&json!("queued"), &json!(0), &example["options"]), "{job:#}");
    assert!(job.as_object().unwrap().contains_key("estimated_duration"), "{job:#}");
    let id = job["id"].as_str().unwrap();
    assert!(id.strip_prefix("job-").is_some_and(|hex| hex.len() >= 8 && hex.bytes().all(|byte| byte.is_ascii_hexdigit())), "{id}");
    assert!(created.header("location").is_some_and(|location| location.ends_with(&format!("/jobs/{id}"))), "{:?}", created.headers);
    client.completed(id, seconds(30)).await;
    has_shape(&example, &client.job(id).await, "job");

    // The same folder by the name that the page gives it: the absolute path on the agent's host.
    let absolute = fleet.exports().display().to_string();
    let options = json!({"destination": format!("{absolute}/")});
    let second = client.completed(&client.export("db-server-01", "qcow2", options).await, seconds(30)).await;
    assert!(second["result"]["files"][0]["path"].as_str().is_some_and(|path| path.starts_with(&absolute)), "{second:#}");

    let capabilities = client.get("/providers/capabilities").await.expect(200).text;
    assert!(capabilities.contains("local") && capabilities.contains("vsphere"), "{capabilities}");
    let metrics = client.get("/metrics").await.expect(200).text;
    for name in [
        "hypersdk_jobs{",
        "hypersdk_job_bytes_total{",
        "hypersdk_http_requests_total{",
        "hypersdk_agents_connected 1",
        "hypersdk_build_info{",
    ] {
        assert!(metrics.contains(name), "{name} in:\n{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_101st_of_an_anonymous_burst_is_told_to_wait_and_users_are_counted_apart() {
    let fleet = fleet("limits", true).await;
    let anonymous = fleet.client.anonymous();
    // The start of the installation itself asked anonymously; the burst fills up again within a minute, one each 600 ms.
    let remaining = async |client: &Client| {
        let answer = client.get("/health").await;
        (answer.status, answer.header("x-ratelimit-remaining").and_then(|text| text.parse::<u32>().ok()).unwrap_or_default())
    };
    let (_, left) = remaining(&anonymous).await;
    assert!(left < 100, "/health counts");
    tokio::time::sleep(std::time::Duration::from_millis(600) * (100 - left)).await;
    let answers = join_all((0..103).map(|_| anonymous.get("/health"))).await;
    let refused: Vec<_> = answers.iter().filter(|answer| answer.status == 429).collect();
    // While a hundred are answered one or two may come back.
    assert!((1..=3).contains(&refused.len()), "{} of 103 were refused", refused.len());
    for answer in refused {
        answer.refused(429, "rate_limited");
        let wait = answer.header("retry-after").and_then(|text| text.parse::<u64>().ok());
        assert!(wait.is_some_and(|seconds| (1..=60).contains(&seconds)), "{:?}", answer.headers);
    }
    for answer in &answers {
        let present = ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"].map(|name| answer.header(name).is_some());
        assert_eq!(present, [true; 3], "{} {:?}", answer.status, answer.headers);
    }
    // Who has a token is not in that bucket, and a header that anybody can write opens no other.
    let me = fleet.client.get("/auth/me").await.expect(200);
    assert_eq!(me.header("x-ratelimit-limit"), Some("1000"), "{:?}", me.headers);
    let forged = anonymous.request(Method::GET, "/health").header("X-Forwarded-For", "203.0.113.9");
    let forged = anonymous.send(forged).await.unwrap();
    assert!(forged.status == 429 || forged.header("x-ratelimit-remaining") == Some("0"), "{} {:?}", forged.status, forged.headers);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_websocket_wants_to_know_who_comes() {
    let fleet = fleet("ws", false).await;
    let client = &fleet.client;
    let bearer = ("Authorization", format!("Bearer {}", client.token.as_ref().unwrap()));
    for path in ["/ws", "/api/v1/ws"] {
        assert_eq!(Live::open(&client.base, path, &[]).await.err(), Some(401));
        assert_eq!(Live::open(&client.base, path, &[("Authorization", "Bearer no".into())]).await.err(), Some(401));
        let foreign = [bearer.clone(), ("Origin", "https://elsewhere.example".into())];
        assert_eq!(Live::open(&client.base, path, &foreign).await.err(), Some(403));
    }
    let ticket = client.post("/ws/ticket", json!({})).await.expect(201).body["ticket"].as_str().unwrap().to_owned();
    let path = format!("/ws?ticket={ticket}");
    let mut live = Live::open(&client.base, &path, &[]).await.unwrap();
    live.until("hello", seconds(5), |frame| frame["type"] == "hello").await;
    assert_eq!(Live::open(&client.base, &path, &[]).await.err(), Some(401), "a ticket is good once");

    // A subscription narrows, and metrics come by themselves.
    live.say(json!({"action": "subscribe", "topics": ["metrics"]})).await;
    live.until("metrics", seconds(12), |frame| frame["type"] == "system.metrics").await;
    let id = client.export("db-server-01", "raw", json!({})).await;
    client.completed(&id, seconds(30)).await;
    live.until("more metrics", seconds(12), |frame| frame["type"] == "system.metrics").await;
    assert!(!live.seen.iter().any(|frame| frame["data"]["id"] == *id), "{:#?}", live.seen);
    live.say(json!({"action": "subscribe", "topics": [format!("job:{id}")], "since": 0})).await;
    live.until("the story so far", seconds(5), |frame| frame["type"] == "job.completed" && frame["data"]["id"] == *id).await;
}
