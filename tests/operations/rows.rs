//! The rows: how each operation is asked so that it answers well, what it answers, and how its particular errors come about.
//!
//! Owns: paths, bodies, fields. Never: the rules for errors that all operations share. A crash here costs the test.

use serde_json::{Value, json};

use super::People;
use crate::harness::client::Client;
use crate::harness::fleet::{Fleet, PASSWORD};
use crate::harness::libvirtd;
use crate::harness::seconds;

/// The smallest role that an operation wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// It is public.
    Nobody,
    /// Reads.
    Viewer,
    /// Runs jobs.
    Operator,
    /// Manages.
    Admin,
}

/// What is sent.
#[derive(Clone, Debug)]
pub enum Body {
    /// Nothing.
    None,
    /// JSON.
    Json(Value),
    /// Bytes of a media type.
    Bytes(&'static str, Vec<u8>),
}

/// A request.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Below the prefix, with its query.
    pub path: String,
    /// What goes with it.
    pub body: Body,
    /// Headers.
    pub headers: Vec<(&'static str, String)>,
}

/// An operation.
pub struct Row {
    /// Its method.
    pub method: &'static str,
    /// Its path as the document writes it.
    pub path: &'static str,
    /// Who may call it.
    pub role: Role,
    /// The request that goes well.
    pub happy: Ask,
    /// What it answers: status, and an example whose fields must all be there; `None` where another test shows it.
    pub answer: Option<(u16, Value)>,
    /// Errors that no rule provokes: status, code, request.
    pub errors: Vec<(u16, &'static str, Ask)>,
}

impl Row {
    /// `METHOD /path`.
    pub fn name(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    pub fn json(mut self, body: Value) -> Self {
        self.happy.body = Body::Json(body);
        self
    }

    pub fn at(mut self, path: impl Into<String>) -> Self {
        self.happy.path = path.into();
        self
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.happy.body = Body::Bytes("application/octet-stream", bytes.to_vec());
        self
    }

    pub fn gives(mut self, status: u16, example: Value) -> Self {
        self.answer = Some((status, example));
        self
    }

    /// A header of every request.
    fn with(mut self, name: &'static str, value: &str) -> Self {
        self.happy.headers.push((name, value.to_owned()));
        self
    }

    /// An error of the happy request at another path.
    pub fn fails_at(mut self, status: u16, code: &'static str, path: impl Into<String>) -> Self {
        let ask = Ask { path: path.into(), ..self.happy.clone() };
        self.errors.push((status, code, ask));
        self
    }

    /// An error of the happy path with another body.
    pub fn fails_with(mut self, status: u16, code: &'static str, body: Value) -> Self {
        let ask = Ask { body: Body::Json(body), ..self.happy.clone() };
        self.errors.push((status, code, ask));
        self
    }

    /// An error of the happy path with other bytes.
    fn fails_of(mut self, status: u16, code: &'static str, kind: &'static str, bytes: &[u8]) -> Self {
        let ask = Ask { body: Body::Bytes(kind, bytes.to_vec()), ..self.happy.clone() };
        self.errors.push((status, code, ask));
        self
    }

    /// An error of the happy request with a header more.
    pub fn fails_by(mut self, status: u16, code: &'static str, name: &'static str, value: &str) -> Self {
        let mut ask = self.happy.clone();
        ask.headers.push((name, value.to_owned()));
        self.errors.push((status, code, ask));
        self
    }
}

/// A domain that could be deployed.
fn deploy(more: Value) -> Value {
    let mut wish =
        json!({"name": "never-made", "disk_path": "vms/db-server-01.raw", "cpu": 1, "memory_mb": 64, "network": "user", "target": "kvm"});
    wish.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    wish
}

/// A row that asks its path without a body.
pub fn row(method: &'static str, path: &'static str, role: Role) -> Row {
    let happy = Ask { path: path.to_owned(), body: Body::None, headers: Vec::new() };
    Row { method, path, role, happy, answer: None, errors: Vec::new() }
}

/// A page with rows like this one.
pub fn page(row: Value) -> Value {
    json!({"data": [row], "pagination": {"offset": 0, "limit": 50, "total": 1, "has_more": false}})
}

fn job() -> Value {
    json!({
        "id": "", "type": "", "status": "", "stage": "", "provider": "", "vm_name": "", "format": "", "progress": 0, "bytes_done": 0,
        "bytes_total": null, "attempt": 0, "created_at": "", "updated_at": "", "options": {}
    })
}

/// A finished job has all of the contract's fields.
fn finished_job() -> Value {
    let mut job = job();
    for (name, value) in [
        ("agent", json!("")),
        ("started_at", json!("")),
        ("finished_at", json!("")),
        ("rate_bps", json!(0)),
        ("result", json!({"files": [{"path": "", "size": 0, "sha256": "", "format": ""}], "verified": true})),
    ] {
        job[name] = value;
    }
    job
}

fn connection() -> Value {
    json!({"name": "", "provider": "", "status": "", "agent": "", "created_at": "", "updated_at": ""})
}

fn agent() -> Value {
    json!({
        "id": "", "name": "", "status": "", "draining": false, "version": "", "hostname": "", "cpus": 0, "formats": [""], "signer": "",
        "roots": [{"name": "", "path": "", "free_bytes": 0, "total_bytes": 0, "writable": true}], "enrolled_at": ""
    })
}

fn vm() -> Value {
    json!({
        "id": "", "name": "", "path": "", "connection": "", "provider": "", "os": "", "os_version": "", "cpu": 0, "memory_mb": 0, "firmware": "",
        "disks": [{"name": "", "size_gb": 0, "format": "", "thin_provisioned": true}],
        "nics": [{"name": "", "type": "", "network": "", "mac": ""}], "power_state": "", "tools_status": "", "last_seen": "", "snapshots": 0
    })
}

fn snapshot() -> Value {
    json!({
        "id": "", "name": "", "description": "", "created_at": "", "power_state": "", "memory": false, "quiesced": null, "parent": null,
        "current": true, "kind": ""
    })
}

/// An upload of these bytes, its one chunk sent where there are any; answers its id.
async fn upload(operator: &Client, size: usize, bytes: &[u8], sha256: Option<&str>) -> String {
    let mut wanted = json!({"filename": "x.raw", "size": size});
    if let Some(sha256) = sha256 {
        wanted["sha256"] = json!(sha256);
    }
    let id = operator.post("/upload/init", wanted).await.expect(201).body["upload_id"].as_str().unwrap().to_owned();
    if !bytes.is_empty() {
        let chunk = operator.request(reqwest::Method::POST, &format!("/upload/chunk?upload_id={id}&index=0"));
        let chunk = chunk.header("Content-Type", "application/octet-stream").body(bytes.to_vec());
        operator.send(chunk).await.unwrap().expect(200);
    }
    id
}

fn user() -> Value {
    json!({"username": "", "role": "", "created_at": "", "updated_at": ""})
}

/// Every row. What they are about is made here; the order is the one in which they are asked.
pub async fn rows(fleet: &Fleet, people: &People) -> Vec<Row> {
    let People { viewer, operator, admin } = people;
    let going_token = viewer.post("/auth/tokens", json!({"name": "going"})).await.expect(201).body["id"].as_str().unwrap().to_owned();
    let export = json!({"type": "export", "provider": "local", "vm_name": "db-server-01", "format": "qcow2"});
    let slow = json!({"type": "export", "provider": "local", "vm_name": "db-server-01", "format": "qcow2",
        "options": {"bandwidth_limit": 4096}});
    let done = operator.create_job(export.clone()).await;
    admin.completed(&done, seconds(30)).await;
    let import = json!({"type": "import", "source": "vms/db-server-01.raw", "format": "raw", "vm_name": "imported"});
    let imported = operator.create_job(import).await;
    admin.completed(&imported, seconds(30)).await;
    let paused = operator.create_job(slow.clone()).await;
    operator.post(&format!("/jobs/{paused}/pause"), json!({})).await.expect(200);
    let [running, held, ended] =
        [operator.create_job(slow.clone()).await, operator.create_job(slow.clone()).await, operator.create_job(slow).await];
    operator.delete(&format!("/jobs/{ended}")).await.expect(202);
    admin.ended(&ended, seconds(30)).await;
    let spare = fleet.vms().join("spare");
    std::fs::create_dir_all(&spare).unwrap();
    let folder = spare.display().to_string();
    admin.post("/providers/connect", json!({"provider": "local", "name": "gone", "path": folder})).await.expect(201);
    let lost = fleet.vms().join("lost");
    std::fs::create_dir_all(&lost).unwrap();
    admin.post("/providers/connect", json!({"provider": "local", "name": "lost", "path": lost.display().to_string()})).await.expect(201);
    std::fs::remove_dir_all(&lost).unwrap();
    libvirtd::standing();
    admin.post("/providers/connect", json!({"provider": "libvirt", "name": "kvm", "uri": libvirtd::URI})).await.expect(201);
    let agents = admin.get("/agents").await.expect(200).body["data"].clone();
    let agent_id = agents[0]["id"].as_str().unwrap().to_owned();
    for name in ["bob", "carol"] {
        admin.post("/users", json!({"username": name, "password": "quite long enough", "role": "viewer"})).await.expect(201);
    }
    // An image that cannot be read, and receivers that are not there.
    std::fs::write(fleet.vms().join("broken.qcow2"), "this is no qcow2").unwrap();
    admin.get("/vms/list?refresh=true&provider=local").await.expect(200);
    let hook = json!({"url": "https://hooks.invalid/x", "events": ["alert"]});
    let first = admin.request(reqwest::Method::POST, "/webhooks").header("Idempotency-Key", "used-up");
    let kept = admin.send(first.json(&json!({"url": "https://hooks.invalid/y", "events": ["alert"]}))).await.unwrap().expect(201).body;
    let going = admin.post("/webhooks", hook.clone()).await.expect(201).body;
    let hook_at = |hook: &Value, more: &str| format!("/webhooks/{}{more}", hook["id"].as_str().unwrap());
    let two = |target: &str, content: bool| {
        let side = |vm_name: &str| json!({"provider": "local", "vm_name": vm_name});
        json!({"source": side("web-server-01"), "target": side(target), "content": content})
    };
    let nowhere = fleet.vms().join("nothing-there").display().to_string();
    let key = |row: Row| row.fails_by(409, "idempotency_mismatch", "Idempotency-Key", "used-up");
    let used = [
        ("/jobs", 201, json!({"type": "export", "provider": "local", "vm_name": "web-server-01", "format": "raw"})),
        ("/jobs/batch", 201, json!({"type": "export", "provider": "local", "vms": ["web-server-01"], "format": "raw"})),
        ("/jobs/submit", 200, json!({"vm_path": "/db-server-01.raw", "format": "raw"})),
        ("/upload/init", 201, json!({"filename": "used", "size": 1})),
    ];
    for (path, status, body) in used {
        let first = operator.request(reqwest::Method::POST, path).header("Idempotency-Key", "used-up").json(&body);
        operator.send(first).await.unwrap().expect(status);
    }
    let zeros = "0".repeat(64);
    let disk = vec![7u8; 1 << 20];
    let [open, bare, whole, taken, spare] = [
        upload(operator, 5, b"", None).await,
        upload(operator, 5, b"", None).await,
        upload(operator, 5, b"12345", None).await,
        upload(operator, disk.len(), &disk, None).await,
        upload(operator, 5, b"", None).await,
    ];
    let damaged = upload(operator, 5, b"12345", Some(&zeros)).await;
    let path = operator.post("/upload/complete", json!({"upload_id": taken})).await.expect(200).body["path"].clone();
    operator.create_job(json!({"type": "convert", "source": path, "format": "raw", "options": {"bandwidth_limit": 4096}})).await;
    let chunk = |id: &str, index: u8| format!("/upload/chunk?upload_id={id}&index={index}");
    use Role::{Admin, Nobody, Operator, Viewer};
    let mut all = super::schedules::rows(fleet, admin, operator).await;
    all.extend([
        row("POST", "/auth/login", Nobody)
            .json(json!({"username": "admin", "password": PASSWORD}))
            .gives(200, json!({"token": "", "token_type": "Bearer", "expires_at": "", "user": {"username": "admin", "role": "admin"}}))
            .fails_with(401, "bad_credentials", json!({"username": "admin", "password": "no"})),
        row("GET", "/auth/me", Viewer).gives(200, json!({"username": "", "role": ""})),
        row("POST", "/auth/tokens", Viewer)
            .json(json!({"name": "nightly", "ttl": "1h"}))
            .fails_with(403, "forbidden", json!({"name": "large", "role": "admin"}))
            .fails_with(409, "conflict", json!({"name": "going"}))
            .gives(201, json!({"token": "", "id": "", "name": "", "user": "", "role": "", "created_at": "", "expires_at": ""})),
        row("GET", "/auth/tokens", Viewer)
            .fails_at(403, "forbidden", "/auth/tokens?user=admin")
            .gives(200, page(json!({"id": "", "name": "", "user": "", "role": "", "created_at": ""}))),
        row("DELETE", "/auth/tokens/{id}", Viewer).at(format!("/auth/tokens/{going_token}")).gives(204, Value::Null),
        row("GET", "/users", Admin).gives(200, page(user())),
        row("POST", "/users", Admin)
            .json(json!({"username": "alice", "password": "quite long enough", "role": "operator"}))
            .fails_with(409, "conflict", json!({"username": "bob", "password": "quite long enough", "role": "viewer"}))
            .gives(201, user()),
        row("PATCH", "/users/{name}", Admin)
            .at("/users/bob")
            .json(json!({"role": "operator"}))
            .fails_at(409, "conflict", "/users/admin")
            .gives(200, user()),
        row("DELETE", "/users/{name}", Admin).at("/users/carol").fails_at(409, "conflict", "/users/admin").gives(204, Value::Null),
        key(row("POST", "/jobs", Operator).json(export))
            .fails_with(
                403,
                "outside_roots",
                json!({"type": "export", "provider": "local", "vm_name": "db-server-01", "format": "raw",
                "options": {"destination": "/etc"}}),
            )
            .fails_with(404, "not_found", json!({"type": "export", "provider": "local", "vm_name": "nobody", "format": "raw"}))
            .fails_with(502, "bad_gateway", json!({"type": "verify", "source": "vms/db-server-01.raw"}))
            .fails_with(422, "not_built", json!({"type": "export", "provider": "local", "vm_name": "db-server-01", "format": "raw", "options": {"destination": "s3://b/x"}}))
            .gives(201, job()),
        key(row("POST", "/jobs/batch", Operator).json(json!({"vms": ["db-server-01"], "type": "export", "provider": "local", "format": "raw",
            "concurrency": 1})))
        .gives(201, json!({"batch_id": "", "concurrency": 1, "created": 1, "failed": 0, "results": [{"index": 0, "status": 201, "job": job()}]})),
        key(row("POST", "/jobs/submit", Operator).json(json!({"vm_path": "/db-server-01.raw", "format": "qcow2"})))
            .gives(200, json!({"job_ids": [""], "accepted": 1, "rejected": 0, "timestamp": ""})),
        row("POST", "/jobs/query", Viewer).json(json!({"job_ids": [done]})).gives(
            200,
            json!({"jobs": [{"definition": {"id": "", "vm_path": "", "format": ""}, "status": "", "progress": {"phase": "", "percent_complete": 0}}],
                "total": 1, "timestamp": ""}),
        ),
        row("POST", "/jobs/cancel", Operator)
            .json(json!({"job_ids": [ended]}))
            .gives(200, json!({"cancelled": [], "failed": [""], "timestamp": ""})),
        row("GET", "/jobs/progress/{id}", Viewer)
            .at(format!("/jobs/progress/{done}"))
            .gives(200, json!({"job_id": "", "status": "", "progress": {"phase": "", "total_bytes": 0}, "timestamp": ""})),
        row("GET", "/status", Viewer).gives(200, json!({"version": "", "uptime": "", "total_jobs": 0, "running_jobs": 0, "timestamp": ""})),
        row("GET", "/jobs", Viewer).at("/jobs?status=completed&type=export").gives(200, page(finished_job())),
        row("GET", "/jobs/stats", Viewer).gives(200, json!({"total": 0, "by_status": {}})),
        row("GET", "/jobs/{id}", Viewer).at(format!("/jobs/{done}")).gives(200, finished_job()),
        row("GET", "/jobs/{id}/logs", Viewer).at(format!("/jobs/{done}/logs")).gives(200, Value::Null),
        row("POST", "/jobs/{id}/pause", Operator)
            .at(format!("/jobs/{held}/pause"))
            .fails_at(409, "conflict", format!("/jobs/{done}/pause"))
            .gives(200, job()),
        // Its happy answer stands in `migrate`: it stops a VM.
        row("POST", "/jobs/{id}/cutover", Operator)
            .at(format!("/jobs/{running}/cutover"))
            .fails_at(409, "conflict", format!("/jobs/{done}/cutover")),
        row("POST", "/jobs/{id}/resume", Operator)
            .at(format!("/jobs/{paused}/resume"))
            .fails_at(409, "conflict", format!("/jobs/{done}/resume"))
            .gives(200, job()),
        row("POST", "/jobs/{id}/retry", Operator)
            .at(format!("/jobs/{ended}/retry"))
            .fails_at(409, "conflict", format!("/jobs/{done}/retry"))
            .gives(200, job()),
        row("DELETE", "/jobs/{id}", Operator)
            .at(format!("/jobs/{running}"))
            .fails_at(409, "conflict", format!("/jobs/{done}"))
            .gives(202, job()),
        row("GET", "/jobs/{id}/manifest", Viewer)
            .at(format!("/jobs/{done}/manifest"))
            .fails_at(409, "conflict", format!("/jobs/{held}/manifest"))
            .gives(200, json!({"manifest": "", "public_key": "", "signature": ""})),
        row("DELETE", "/exports/{id}", Operator)
            .at(format!("/exports/{done}"))
            .fails_at(409, "conflict", format!("/exports/{held}"))
            .fails_at(422, "unprocessable", format!("/exports/{imported}"))
            .gives(204, Value::Null),
        key(row("POST", "/upload/init", Operator).json(json!({"filename": "web.ova", "size": 25_000_000})))
            .fails_with(422, "no_space", json!({"filename": "web.ova", "size": 1u64 << 45}))
            .gives(201, json!({"upload_id": "", "chunk_size": 10_000_000, "chunks": 3, "expires_at": ""})),
        row("POST", "/upload/chunk", Operator)
            .at(chunk(&open, 0))
            .bytes(b"12345")
            .fails_at(400, "bad_request", chunk(&open, 1))
            .fails_at(404, "not_found", chunk("upload-none", 0))
            .fails_at(409, "conflict", chunk(&taken, 0))
            .fails_of(413, "too_large", "application/octet-stream", &vec![0; 10_000_001])
            .fails_of(415, "unsupported_media_type", "text/plain", b"12345")
            .fails_by(422, "verification_failed", "X-Chunk-SHA256", &zeros)
            .gives(200, json!({"upload_id": "", "index": 0, "size": 5, "sha256": ""})),
        row("POST", "/upload/complete", Operator)
            .json(json!({"upload_id": whole}))
            .fails_with(404, "not_found", json!({"upload_id": "upload-none"}))
            .fails_with(409, "conflict", json!({"upload_id": bare}))
            .fails_with(422, "verification_failed", json!({"upload_id": damaged}))
            .gives(200, json!({"path": "", "size": 5, "sha256": ""})),
        row("GET", "/upload/status/{id}", Viewer)
            .at(format!("/upload/status/{bare}"))
            .gives(200, json!({"upload_id": "", "size": 5, "received_bytes": 0, "received": [], "missing": [0], "status": "open"})),
        row("DELETE", "/upload/{id}", Operator)
            .at(format!("/upload/{spare}"))
            .fails_at(409, "conflict", format!("/upload/{taken}"))
            .gives(204, Value::Null),
        row("GET", "/browse/files", Viewer)
            .at("/browse/files?path=vms&search=raw")
            .fails_at(403, "outside_roots", "/browse/files?path=/etc")
            .fails_at(404, "not_found", "/browse/files?path=vms/none")
            .fails_at(422, "unprocessable", "/browse/files?path=vms/db-server-01.raw")
            .gives(200, page(json!({"name": "", "path": "", "type": "file", "size": 0, "modified_at": "", "format": "raw"}))),
        row("GET", "/download", Viewer)
            .at("/download?path=vms/db-server-01.raw")
            .fails_at(403, "outside_roots", "/download?path=/etc/passwd")
            .fails_at(404, "not_found", "/download?path=vms/none")
            .fails_by(416, "range_not_satisfiable", "Range", "bytes=99999999999-")
            .fails_at(422, "unprocessable", "/download?path=vms")
            .gives(200, Value::Null),
        row("GET", "/vms/list", Viewer).fails_at(502, "bad_gateway", "/vms/list?refresh=true").gives(200, page(vm())),
        row("POST", "/vms/browse", Viewer)
            .json(json!({"provider": "local", "vm_name": "web-server-01"}))
            .fails_with(404, "not_found", json!({"provider": "local", "vm_name": "nobody"}))
            .fails_with(409, "ambiguous", json!({"provider": "local", "vm_name": "twin"}))
            .gives(200, vm()),
        row("POST", "/vms/compare", Viewer)
            .json(two("db-server-01", false))
            .fails_with(404, "not_found", two("nobody", false))
            .fails_with(409, "ambiguous", two("twin", false))
            .fails_with(422, "bad_image", two("broken", true))
            .fails_with(502, "bad_gateway", two("db-server-01", true))
            .gives(
                200,
                json!({"match": true, "differences": [{"field": "", "severity": ""}],
                "disks": [{"name": "", "content": "", "source": {"name": "", "size_bytes": 0, "format": ""}}]}),
            ),
        row("GET", "/vms/{provider}/{id}", Viewer)
            .at("/vms/local/web-server-01")
            .fails_at(400, "bad_request", "/vms/vsphere/web-server-01")
            .fails_at(409, "ambiguous", "/vms/local/twin")
            .gives(200, vm()),
        // Its happy answer stands in `deploy` and in the page's commands: it leaves a domain.
        row("POST", "/vms/deploy", Operator)
            .json(deploy(json!({})))
            .fails_with(404, "not_found", deploy(json!({"disk_path": "vms/nowhere.raw"})))
            .fails_with(409, "conflict", deploy(json!({"name": libvirtd::standing()})))
            .fails_with(422, "not_built", deploy(json!({"target": "local"}))),
        row("GET", "/vms/{provider}/{id}/snapshots", Viewer)
            .at(format!("/vms/kvm/{}/snapshots", libvirtd::standing()))
            .fails_at(409, "ambiguous", "/vms/local/twin/snapshots")
            .fails_at(422, "unprocessable", "/vms/local/db-server-01/snapshots")
            .gives(200, page(snapshot())),
        row("POST", "/vms/{provider}/{id}/snapshots", Operator)
            .at(format!("/vms/kvm/{}/snapshots", libvirtd::standing()))
            .json(json!({"name": "by its row"}))
            .fails_with(409, "conflict", json!({"name": libvirtd::STANDING_SNAPSHOT}))
            .fails_with(422, "unprocessable", json!({"name": "x", "memory": true}))
            .gives(201, snapshot()),
        row("DELETE", "/vms/{provider}/{id}/snapshots/{snapshot}", Operator)
            .at(format!("/vms/kvm/{}/snapshots/{}", libvirtd::standing(), libvirtd::STANDING_SNAPSHOT))
            .fails_at(400, "bad_request", format!("/vms/kvm/{}/snapshots/x?colour=red", libvirtd::standing()))
            .fails_at(409, "ambiguous", "/vms/local/twin/snapshots/x")
            .fails_at(422, "unprocessable", "/vms/local/db-server-01/snapshots/x")
            .gives(204, Value::Null),
        // Its happy answer, 101, stands in `console`. Before the next one switches it on.
        row("GET", "/vms/{provider}/{id}/console", Operator)
            .at(format!("/vms/kvm/{}/console", libvirtd::standing()))
            .with("Connection", "Upgrade")
            .with("Upgrade", "websocket")
            .with("Sec-WebSocket-Version", "13")
            .with("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==")
            .fails_by(403, "forbidden", "Origin", "https://elsewhere.example")
            .fails_at(409, "ambiguous", "/vms/local/twin/console")
            .fails_at(409, "conflict", format!("/vms/kvm/{}/console", libvirtd::standing()))
            .fails_at(422, "unprocessable", "/vms/local/db-server-01/console"),
        row("POST", "/vms/{provider}/{id}/power", Operator)
            .json(json!({"action": "start"}))
            .at(format!("/vms/kvm/{}/power", libvirtd::standing()))
            .fails_with(400, "bad_request", json!({"action": "explode"}))
            .fails_at(409, "ambiguous", "/vms/local/twin/power")
            .fails_at(422, "unprocessable", "/vms/local/db-server-01/power")
            .gives(200, json!({"id": "", "name": "", "action": "", "power_state": ""})),
        row("GET", "/providers", Viewer).gives(200, page(connection())),
        row("POST", "/providers/connect", Admin)
            .json(json!({"provider": "local", "name": "new", "path": folder}))
            .fails_with(403, "outside_roots", json!({"provider": "local", "name": "out", "path": "/etc"}))
            .fails_with(409, "conflict", json!({"provider": "local", "name": "gone", "path": folder}))
            .fails_with(422, "not_built", json!({"provider": "warehouse"}))
            .gives(201, connection()),
        row("GET", "/providers/capabilities", Viewer)
            .gives(200, json!({"data": [{"kind": "", "built": true, "available": true, "list": true, "export": true, "missing": []}]})),
        row("GET", "/providers/{name}", Viewer).at("/providers/local").gives(200, connection()),
        row("POST", "/providers/{name}/test", Operator)
            .at("/providers/local/test")
            .fails_at(422, "unprocessable", "/providers/lost/test")
            .gives(200, json!({})),
        row("POST", "/providers/{name}/refresh", Operator)
            .at("/providers/local/refresh")
            .fails_at(422, "unprocessable", "/providers/lost/refresh")
            .gives(200, connection()),
        row("PATCH", "/providers/{name}", Admin)
            .at("/providers/lost")
            .json(json!({"path": folder}))
            .fails_at(409, "conflict", "/providers/local")
            .fails_with(422, "unprocessable", json!({"path": nowhere}))
            .gives(200, connection()),
        row("DELETE", "/providers/{name}", Admin)
            .at("/providers/gone")
            .fails_at(409, "conflict", "/providers/local")
            .gives(204, Value::Null),
        row("GET", "/agents", Viewer).gives(200, page(agent())),
        row("GET", "/agents/{id}", Viewer).at(format!("/agents/{agent_id}")).gives(200, agent()),
        row("POST", "/agents/tokens", Admin).json(json!({"ttl_seconds": 60})).gives(201, json!({"token": "", "expires_at": ""})),
        row("GET", "/health", Nobody).gives(200, json!({"status": "ok", "version": "", "uptime_seconds": 0})),
        row("GET", "/livez", Nobody).gives(200, Value::Null),
        row("GET", "/readyz", Nobody).gives(200, Value::Null),
        row("GET", "/metrics", Viewer).gives(200, Value::Null),
        row("GET", "/audit", Admin).gives(200, page(json!({"id": 0, "time": "", "caller": "", "action": "", "target": ""}))),
        row("GET", "/carbon/intensity", Viewer)
            .at("/carbon/intensity?zone=DE")
            .fails_at(400, "bad_request", "/carbon/intensity?zone=XX")
            .gives(
                200,
                json!({"zone": "DE", "intensity": 1.5, "unit": "", "rating": "", "source": "", "estimated": true, "updated_at": "",
                "forecast": [{"time": "", "intensity": 1.5}]}),
            ),
        row("GET", "/carbon/schedule", Viewer)
            .at("/carbon/schedule?zone=DE&duration=2h")
            .fails_at(400, "bad_request", "/carbon/schedule?zone=DE&deadline=2020-01-01T00:00:00Z")
            .gives(
                200,
                json!({"zone": "DE", "duration": "2h", "source": "", "now": {"start": "", "average_intensity": 1.5},
                "windows": [{"start": "", "end": "", "average_intensity": 1.5, "savings_percent": 1.5, "rank": 1}]}),
            ),
        row("GET", "/system/health", Viewer).gives(
            200,
            json!({"score": 0, "status": "", "cpu": {"score": 0}, "memory": {"score": 0}, "disk": {"score": 0}, "network": {"score": 0},
                "database": {"score": 0, "kind": ""}, "agents": {"score": 0, "total": 0}, "queue": {"score": 0, "depth": 0}, "actors": {"score": 0}}),
        ),
        row("GET", "/system/alerts", Viewer)
            .at("/system/alerts?state=all")
            .gives(200, page(json!({"id": "", "severity": "", "since": "", "message": "", "resource": "", "rule": "", "state": ""}))),
        row("GET", "/readiness", Viewer).gives(200, json!([{"check": "", "status": "", "message": "", "fix": ""}])),
        row("GET", "/webhooks", Admin)
            .gives(200, page(json!({"id": "", "url": "", "events": [""], "created_by": "", "created_at": "", "pending": 0, "failed": 0}))),
        key(row("POST", "/webhooks", Admin).json(hook))
            .fails_with(422, "unprocessable", json!({"url": "https://127.0.0.1/x", "events": ["alert"]}))
            .gives(201, json!({"id": "", "url": "", "events": [""], "created_at": "", "secret": ""})),
        // What a receiver says is shown by `system`.
        row("POST", "/webhooks/{id}/test", Admin).at(hook_at(&kept, "/test")),
        row("DELETE", "/webhooks/{id}", Admin).at(hook_at(&going, "")).gives(204, Value::Null),
        row("POST", "/ws/ticket", Viewer).gives(201, json!({"ticket": "", "expires_at": ""})),
        // The handshake is shown by `contract::the_websocket_wants_to_know_who_comes`.
        row("GET", "/ws", Viewer).fails_at(400, "bad_request", "/ws").fails_by(403, "forbidden", "Origin", "https://elsewhere.example"),
        // What ends something for the others comes last.
        row("POST", "/agents/{id}/drain", Admin).at(format!("/agents/{agent_id}/drain")).gives(200, agent()),
        row("POST", "/agents/{id}/resume", Admin).at(format!("/agents/{agent_id}/resume")).gives(200, agent()),
        row("DELETE", "/agents/{id}", Admin).at(format!("/agents/{agent_id}")).gives(204, Value::Null),
        row("POST", "/auth/refresh", Viewer).gives(200, json!({"token": "", "token_type": "Bearer", "expires_at": ""})),
        // The refreshed token's old one is gone, so this one is `contract`'s: here it is only asked without a token.
        row("POST", "/auth/logout", Viewer),
    ]);
    all
}
