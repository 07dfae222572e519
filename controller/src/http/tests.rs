//! The real route table over a real store: the contract's shapes.

use actix_web::body::to_bytes;
use actix_web::dev::Service;
use actix_web::http::Method;
use actix_web::test::{TestRequest, init_service};
use actix_web::{HttpResponse, web};
use sea_orm::EntityTrait;
use serde_json::{Value, json};
use shared::secret::Secret;
use shared::vm::{Disk, Vm};
use utoipa::OpenApi;

use super::{application, limits, openapi::Document};
use crate::app::{Running, run};
use crate::config::{Config, Limits};
use crate::store::entities::idempotency;

const PASSWORD: &str = "a password for tests";

async fn start(limits: Limits) -> Running {
    let config = Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        grpc_listen: "127.0.0.1:0".parse().unwrap(),
        data_dir: shared::vault::temporary_dir("controller").unwrap(),
        admin_password: Some(Secret::new(PASSWORD)),
        bcrypt_cost: 10,
        workers: 1,
        limits,
        ..Config::default()
    };
    run(config).await.unwrap()
}

fn generous() -> Limits {
    Limits { anonymous_burst: 100_000, user_per_minute: 100_000, ..Limits::default() }
}

async fn stop(running: Running) {
    let data = running.app.config.data_dir.clone();
    running.drain().await;
    std::fs::remove_dir_all(data).unwrap();
}

struct Answer {
    status: u16,
    headers: actix_web::http::header::HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The error shape, and its code.
    fn code(&self) -> String {
        let body = self.json();
        assert_eq!(body["status"], self.status, "{body}");
        assert_eq!(body["request_id"], self.header("x-request-id"), "{body}");
        assert!(body["error"].as_str().is_some_and(|error| !error.is_empty()), "{body}");
        body["code"].as_str().unwrap().to_owned()
    }
}

macro_rules! ask {
    ($service:expr, $request:expr) => {{
        let request = $request.peer_addr("192.0.2.1:1000".parse().unwrap()).to_request();
        match $service.call(request).await {
            Ok(response) => answer(response.into_parts().1).await,
            Err(error) => answer(error.error_response()).await,
        }
    }};
}

async fn answer(response: HttpResponse) -> Answer {
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let bytes = to_bytes(response.into_body()).await.unwrap();
    Answer { status, headers, text: String::from_utf8(bytes.to_vec()).unwrap() }
}

fn get(path: &str, token: &str) -> TestRequest {
    TestRequest::get().uri(path).insert_header(("Authorization", format!("Bearer {token}")))
}

fn post(path: &str, token: &str, body: &Value) -> TestRequest {
    TestRequest::post().uri(path).insert_header(("Authorization", format!("Bearer {token}"))).set_json(body)
}

macro_rules! service {
    ($running:expr) => {{
        let (anonymous, users) = limits::limiters(&$running.app.config).unwrap();
        init_service(application($running.app.clone(), &anonymous, &users)).await
    }};
}

macro_rules! log_in {
    ($service:expr, $name:expr, $password:expr) => {{
        let body = json!({"username": $name, "password": $password});
        let answer = ask!($service, TestRequest::post().uri("/auth/login").set_json(&body));
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()["token"].as_str().unwrap().to_owned()
    }};
}

#[actix_web::test]
async fn a_token_opens_until_it_is_ended() {
    let running = start(generous()).await;
    let service = service!(running);
    for body in [json!({"username": "admin", "password": "wrong"}), json!({"username": "nobody", "password": "wrong"})] {
        let answer = ask!(service, TestRequest::post().uri("/auth/login").set_json(&body));
        assert_eq!((answer.status, answer.code().as_str()), (401, "bad_credentials"));
        assert_eq!(answer.json()["error"], "wrong username or password");
    }
    let token = log_in!(service, "admin", PASSWORD);
    for prefix in ["", "/api/v1"] {
        let answer = ask!(service, get(&format!("{prefix}/auth/me"), &token));
        assert_eq!(answer.json(), json!({"username": "admin", "role": "admin"}));
        let answer = ask!(service, TestRequest::get().uri(&format!("{prefix}/auth/me")));
        assert_eq!((answer.status, answer.code().as_str(), answer.header("www-authenticate")), (401, "unauthorized", "Bearer"));
    }
    let answer = ask!(service, post("/auth/refresh", &token, &json!({})));
    let fresh = answer.json()["token"].as_str().unwrap().to_owned();
    assert_eq!(ask!(service, get("/auth/me", &token)).status, 401, "the token that was refreshed still opens");
    assert_eq!(ask!(service, post("/auth/logout", &fresh, &json!({}))).status, 204);
    assert_eq!(ask!(service, get("/auth/me", &fresh)).status, 401);
    stop(running).await;
}

#[actix_web::test]
async fn every_error_has_the_one_shape() {
    let running = start(generous()).await;
    let service = service!(running);
    let token = log_in!(service, "admin", PASSWORD);
    let answer = ask!(service, TestRequest::get().uri("/nowhere").insert_header(("X-Request-Id", "my-id_1")));
    assert_eq!((answer.status, answer.code().as_str(), answer.header("x-request-id")), (404, "not_found", "my-id_1"));
    let answer = ask!(service, TestRequest::get().uri("/health").insert_header(("X-Request-Id", "bad id\"")));
    assert_ne!(answer.header("x-request-id"), "bad id\"");
    let answer = ask!(service, TestRequest::put().uri("/api/v1/jobs"));
    assert_eq!((answer.status, answer.code().as_str(), answer.header("allow")), (405, "method_not_allowed", "GET, HEAD, POST"));
    let login = || TestRequest::post().uri("/auth/login");
    let cases = [
        (login().set_payload("{}"), 415, "unsupported_media_type"),
        (login().insert_header(("Content-Type", "application/json")).set_payload("{"), 400, "bad_request"),
        (login().insert_header(("Content-Type", "application/json")).set_payload("a".repeat((1 << 20) + 1)), 413, "too_large"),
        (get("/vms/list?colour=red", &token), 400, "bad_request"),
        (get("/vms/list?limit=0", &token), 400, "bad_request"),
        (get("/vms/list?provider=unheard-of", &token), 400, "bad_request"),
        (get("/vms/%ff/x", &token), 400, "bad_request"),
        (get("/jobs/none", &token), 404, "not_found"),
        (get("/vms/local/x/snapshots?colour=red", &token), 400, "bad_request"),
        (TestRequest::get().uri("/schedules"), 401, "unauthorized"),
        (get("/ws", &token), 400, "bad_request"),
        (get("/ws", &token).insert_header(("Origin", "https://elsewhere.example")).insert_header(("Host", "here")), 403, "forbidden"),
        (post("/providers/connect", &token, &json!({"provider": "warehouse"})), 422, "not_built"),
        (post("/providers/connect", &token, &json!({"provider": "libvirt"})), 400, "bad_request"),
        (post("/providers/connect", &token, &json!({"provider": "local", "path": "/srv"})), 503, "unavailable"),
        (TestRequest::get().uri("/metrics"), 401, "unauthorized"),
    ];
    for (number, (request, status, code)) in cases.into_iter().enumerate() {
        let answer = ask!(service, request);
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "case {number}: {}", answer.text);
    }
    let answer = ask!(service, login().set_json(json!({"username": "a", "password": "b", "colour": 1})));
    assert!(answer.json()["error"].as_str().unwrap().contains("unknown field `colour`"));
    let answer = ask!(service, TestRequest::get().uri("/health"));
    assert_eq!((answer.status, answer.json()["status"].as_str()), (200, Some("ok")));
    assert_eq!((answer.header("x-content-type-options"), answer.header("cache-control")), ("nosniff", "no-store"));
    stop(running).await;
}

#[actix_web::test]
async fn roles_and_users_are_kept() {
    let running = start(generous()).await;
    let service = service!(running);
    let admin = log_in!(service, "admin", PASSWORD);
    let alice = json!({"username": "alice", "password": "correct horse", "role": "viewer"});
    let create = |body: &Value| post("/users", &admin, body).insert_header(("Idempotency-Key", "one"));
    let first = ask!(service, create(&alice));
    assert_eq!((first.status, first.header("location")), (201, "/api/v1/users/alice"));
    let again = ask!(service, create(&alice));
    assert_eq!((again.status, again.json()), (201, first.json()));
    let other = ask!(service, create(&json!({"username": "bob", "password": "correct horse", "role": "viewer"})));
    assert_eq!((other.status, other.code().as_str()), (409, "idempotency_mismatch"));
    assert_eq!(ask!(service, post("/users", &admin, &alice)).status, 409);
    let viewer = log_in!(service, "alice", "correct horse");
    assert_eq!(ask!(service, get("/users", &viewer)).status, 403);
    let job = json!({"type": "export", "provider": "local", "vm_name": "x", "format": "raw"});
    assert_eq!(ask!(service, post("/jobs", &viewer, &job)).status, 403);
    let page = ask!(service, get("/users?limit=1", &admin)).json();
    assert_eq!(page["pagination"], json!({"offset": 0, "limit": 1, "total": 2, "has_more": true}));
    let patch = TestRequest::patch().uri("/users/alice").insert_header(("Authorization", format!("Bearer {admin}")));
    assert_eq!(ask!(service, patch.set_json(json!({"role": "operator"}))).json()["role"], "operator");
    assert_eq!(ask!(service, get("/auth/me", &viewer)).status, 401, "a session outlived the change of its role");
    let delete =
        |name: &str| TestRequest::delete().uri(&format!("/users/{name}")).insert_header(("Authorization", format!("Bearer {admin}")));
    assert_eq!(ask!(service, delete("admin")).status, 409, "the last admin went");
    assert_eq!((ask!(service, delete("alice")).status, ask!(service, delete("alice")).status), (204, 404));
    let audit = ask!(service, get("/audit?search=USER.delete", &admin)).json();
    assert_eq!((audit["pagination"]["total"].as_u64(), audit["data"][0]["action"].as_str()), (Some(3), Some("user.delete")), "{audit}");
    stop(running).await;
}

#[actix_web::test]
async fn the_inventory_is_listed_filtered_and_found() {
    let running = start(generous()).await;
    let service = service!(running);
    let token = log_in!(service, "admin", PASSWORD);
    let store = &running.app.store;
    let connection = proto::v1::Connection { name: "vms".into(), kind: "local".into(), path: "/srv/vms".into(), account: None };
    assert!(crate::providers::service::ensure(store, "agent-1", vec![connection.clone()]).await.unwrap().is_empty());
    assert_eq!(crate::providers::service::ensure(store, "agent-2", vec![connection]).await.unwrap(), ["vms"]);
    let vm = |id: &str, name: &str, os: &str| Vm {
        id: id.into(),
        name: name.into(),
        path: id.into(),
        os: os.into(),
        cpu: 2,
        memory_mb: 1024,
        firmware: "bios".into(),
        disks: vec![Disk { name: "disk-0".into(), capacity: 10 << 30, format: "qcow2".into(), ..Disk::default() }],
        power_state: "poweredOff".into(),
        ..Vm::default()
    };
    let list = vec![vm("a/web.qcow2", "Web_Server", "linux"), vm("b/web.qcow2", "db", "windows"), vm("c.ova", "db", "linux")];
    crate::vms::service::replace(store, "agent-1", "vms", list).await.unwrap();
    crate::vms::service::replace(store, "agent-2", "vms", vec![]).await.unwrap();
    let total = |answer: Answer| answer.json()["pagination"]["total"].as_u64().unwrap();
    for (query, expected) in [
        ("", 3),
        ("?search=web_s", 1),
        ("?search=WEB.Q", 2),
        ("?search=%25", 0),
        ("?os=linux&provider=local&status=stopped", 2),
        ("?provider=vms", 3),
        ("?provider=vsphere", 0),
    ] {
        assert_eq!(total(ask!(service, get(&format!("/vms/list{query}"), &token))), expected, "{query}");
    }
    let page = ask!(service, get("/vms/list?sort=name&order=desc&limit=2", &token)).json();
    assert_eq!((page["data"][0]["id"].as_str(), page["data"][1]["id"].as_str()), (Some("b/web.qcow2"), Some("c.ova")), "{page}");
    assert_eq!(
        (page["data"][0]["provider"].as_str(), page["data"][0]["disks"][0]["size_gb"].to_string()),
        (Some("local"), "10".to_owned())
    );
    let found = ask!(service, get("/vms/local/a%2Fweb.qcow2", &token));
    assert_eq!((found.status, found.json()["name"].as_str()), (200, Some("Web_Server")), "{}", found.text);
    let twice = ask!(service, post("/vms/browse", &token, &json!({"provider": "vms", "vm_name": "db"})));
    assert_eq!((twice.status, twice.code().as_str()), (409, "ambiguous"));
    assert_eq!(twice.json()["detail"]["paths"], json!(["b/web.qcow2", "c.ova"]));
    assert_eq!(total(ask!(service, get("/providers?search=VM", &token))), 1);
    assert_eq!(ask!(service, get("/vms/list?refresh=true", &token)).status, 503, "the agent is not there");
    let capabilities = ask!(service, get("/providers/capabilities", &token)).json();
    for kind in capabilities["data"].as_array().unwrap() {
        assert_eq!((kind["built"].as_bool(), kind["available"].as_bool()), (Some(true), Some(false)), "{kind}");
    }
    stop(running).await;
}

#[actix_web::test]
async fn the_101st_of_a_burst_is_refused_and_only_a_valid_token_is_a_user() {
    let running = start(Limits::default()).await;
    let service = service!(running);
    let token = log_in!(service, "admin", PASSWORD);
    let mut last = None;
    for n in 2..=100 {
        let request = TestRequest::get().uri("/health");
        // Half of them come with a token that is none: they are anonymous all the same.
        let request = if n % 2 == 0 { request.insert_header(("Authorization", "Bearer forged")) } else { request };
        let answer = ask!(service, request);
        assert_eq!((answer.status, answer.header("x-ratelimit-limit")), (200, "100"), "request {n}");
        last = Some(answer);
    }
    let last = last.unwrap();
    assert!(last.header("x-ratelimit-remaining").parse::<u32>().unwrap() <= 2, "{:?}", last.headers);
    assert!(last.header("x-ratelimit-reset").parse::<i64>().unwrap() > chrono::Utc::now().timestamp());
    // What came back during the log-in and the requests before may be used up first.
    let mut refused = None;
    for _ in 0..20 {
        let answer = ask!(service, TestRequest::get().uri("/health"));
        if answer.status != 200 {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.expect("no request was refused");
    assert_eq!((refused.status, refused.code().as_str(), refused.header("x-ratelimit-remaining")), (429, "rate_limited", "0"));
    assert!(refused.header("retry-after").parse::<u32>().unwrap() >= 1);
    let user = ask!(service, get("/auth/me", &token));
    assert_eq!((user.status, user.header("x-ratelimit-limit")), (200, "1000"));
    stop(running).await;
}

/// Every documented operation is in the table, and every operation of the table that is built is documented.
#[actix_web::test]
async fn the_document_and_the_table_are_one() {
    let running = start(generous()).await;
    let service = service!(running);
    let document = serde_json::to_value(Document::openapi()).unwrap();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    let served = ask!(service, TestRequest::get().uri("/api/v1/openapi.json")).json();
    assert_eq!(served, document);
    let mut table = Vec::new();
    super::table(&mut |path, operations| table.extend(operations.into_iter().map(|(method, _)| (path.to_owned(), method))));
    let token = log_in!(service, "admin", PASSWORD);
    for (path, method) in table.iter().filter(|(path, _)| !path.starts_with("/docs") && path != "/openapi.json") {
        let documented = document["paths"][path].get(method.as_str().to_lowercase()).is_some();
        let uri = path.replace("{provider}", "x").replace("{name}", "x").replace("{id}", "x").replace("{snapshot}", "x");
        // A log-out would end the walk.
        if path == "/auth/logout" || path == "/auth/refresh" {
            assert!(documented, "{method} {path}");
            continue;
        }
        let request = TestRequest::default().method(method.clone()).uri(&uri).insert_header(("Authorization", format!("Bearer {token}")));
        let answer = ask!(service, request);
        let is_built = !(answer.status == 422 && answer.code() == "not_built");
        assert!(documented || !is_built, "{method} {path}: {}", answer.text);
        if answer.status >= 400 {
            answer.code();
            let responses = &document["paths"][path][method.as_str().to_lowercase()]["responses"];
            assert!(
                !documented || responses.get(answer.status.to_string()).is_some(),
                "{method} {path} answers {} without saying so",
                answer.status
            );
        }
    }
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            assert!(table.contains(&(path.clone(), method.clone())), "{method} {path} is documented and not in the table");
        }
    }
    let page = ask!(service, TestRequest::get().uri("/docs/"));
    assert_eq!((page.status, page.header("content-type").starts_with("text/html")), (200, true));
    stop(running).await;
}

#[actix_web::test]
async fn a_user_may_be_called_livez_and_a_stored_digest_is_none_of_the_body() {
    let running = start(generous()).await;
    let service = service!(running);
    let token = log_in!(service, "admin", PASSWORD);
    let body = json!({"username": "livez", "password": "quite long enough", "role": "viewer"});
    let twice = || post("/users", &token, &body).insert_header(("Idempotency-Key", "once"));
    for _ in 0..2 {
        assert_eq!(ask!(service, twice()).status, 201);
    }
    let rows = running.app.store.read(|db| async move { Ok(idempotency::Entity::find().all(&db).await?) }).await.unwrap();
    assert!(!rows.is_empty() && rows.iter().all(|row| row.digest != super::body::digest(body.to_string().as_bytes())), "{rows:?}");
    let answer = ask!(service, TestRequest::delete().uri("/users/livez").insert_header(("Authorization", format!("Bearer {token}"))));
    assert_eq!(answer.status, 204, "{}", answer.text);
    stop(running).await;
}

#[actix_web::test]
async fn a_panic_is_an_answer() {
    let running = start(generous()).await;
    async fn panics() -> &'static str {
        panic!("a secret of the handler")
    }
    let app = actix_web::App::new()
        .app_data(running.app.clone())
        .wrap(actix_web::middleware::from_fn(super::outer::outer))
        .route("/panics", web::get().to(panics));
    let service = init_service(app).await;
    let answer = ask!(service, TestRequest::get().uri("/panics"));
    assert_eq!((answer.status, answer.code().as_str()), (500, "internal"));
    assert!(!answer.text.contains("secret"));
    stop(running).await;
}
