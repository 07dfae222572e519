//! The rows of the schedules.
//!
//! Owns: what is scheduled, and how a schedule's job goes bad before it runs. Never: waits for a due time (the room's test does).
//! A crash here costs the test.

use serde_json::{Value, json};

use super::rows::{Role, Row, page, row};
use crate::harness::client::Client;
use crate::harness::fleet::Fleet;
use crate::harness::images::{convert, foreign_ova, pattern};

const MIB: u64 = 1 << 20;

fn schedule() -> Value {
    json!({
        "id": "", "name": "", "cron": "", "timezone": "", "job": {}, "enabled": true, "overlap": "", "catch_up": "", "carbon_aware": false,
        "next_run": "", "next_runs": [""], "created_by": "", "created_at": "", "updated_at": ""
    })
}

fn nightly(vm: &str) -> Value {
    json!({"name": format!("nightly {vm}"), "cron": "0 3 * * *", "timezone": "Europe/Berlin",
        "job": {"type": "export", "provider": "local", "vm_name": vm, "format": "qcow2"}})
}

/// The rows; their schedules are made here.
pub async fn rows(fleet: &Fleet, admin: &Client, operator: &Client) -> Vec<Row> {
    let vms = fleet.vms();
    pattern(&vms.join("soon.raw"), MIB, &[(0, MIB)], 4);
    pattern(&vms.join("../later"), MIB, &[(0, MIB)], 5);
    convert(("raw", &vms.join("../later")), ("qcow2", &vms.join("later.qcow2")), &[]);
    admin.get("/vms/list?refresh=true&provider=local").await.expect(200);
    let make = async |vm: &str| {
        let made = operator.post("/schedules", nightly(vm)).await.expect(201).body;
        made["id"].as_str().unwrap().to_owned()
    };
    let [good, going, twin, damaged] = [make("db-server-01").await, make("db-server-01").await, make("soon").await, make("later").await];
    // Between two nights a second VM takes the one's name, and the other's image is no image any more.
    foreign_ova(&vms.join("soon.ova"), "soon", &[&vms.join("soon.raw")]);
    std::fs::write(vms.join("later.qcow2"), b"QFI\xfbthis is no qcow2").unwrap();
    admin.get("/vms/list?refresh=true&provider=local").await.expect(200);
    let first = operator.request(reqwest::Method::POST, "/schedules").header("Idempotency-Key", "used-up");
    operator.send(first.json(&nightly("web-server-01"))).await.unwrap().expect(201);
    let job = |field: &str, value: Value| {
        let mut body = nightly("db-server-01");
        body["job"][field] = value;
        body
    };
    let change = |field: &str, value: Value| json!({"job": job(field, value)["job"]});
    let nobody = json!("nobody");
    use Role::{Operator, Viewer};
    vec![
        row("POST", "/schedules", Operator)
            .json(nightly("db-server-01"))
            .fails_with(400, "bad_request", json!({"name": "x", "cron": "61 3 * * *", "job": nightly("db-server-01")["job"]}))
            .fails_with(403, "outside_roots", job("options", json!({"destination": "/etc"})))
            .fails_with(404, "not_found", job("vm_name", nobody.clone()))
            .fails_with(409, "ambiguous", job("vm_name", json!("soon")))
            .fails_by(409, "idempotency_mismatch", "Idempotency-Key", "used-up")
            .fails_with(422, "not_built", job("options", json!({"destination": "s3://b/x"})))
            .gives(201, schedule()),
        row("GET", "/schedules", Viewer).gives(200, page(schedule())),
        row("GET", "/schedules/{id}", Viewer).at(format!("/schedules/{good}")).gives(200, schedule()),
        row("PATCH", "/schedules/{id}", Operator)
            .at(format!("/schedules/{good}"))
            .json(json!({"enabled": true}))
            .fails_with(403, "outside_roots", change("options", json!({"destination": "/etc"})))
            .fails_with(404, "not_found", change("vm_name", nobody))
            .fails_with(409, "ambiguous", change("vm_name", json!("soon")))
            .fails_with(422, "not_built", change("options", json!({"destination": "s3://b/x"})))
            .gives(200, schedule()),
        row("POST", "/schedules/{id}/run", Operator)
            .at(format!("/schedules/{good}/run"))
            .fails_by(400, "bad_request", "Idempotency-Key", &"k".repeat(1000))
            .fails_at(409, "ambiguous", format!("/schedules/{twin}/run"))
            .fails_at(422, "bad_image", format!("/schedules/{damaged}/run"))
            .gives(201, json!({"run": {"id": "", "schedule": "", "cause": "", "due_at": "", "status": "", "job": ""}, "job": {"id": ""}})),
        row("GET", "/schedules/{id}/runs", Viewer)
            .at(format!("/schedules/{good}/runs"))
            .gives(200, page(json!({"id": "", "schedule": "", "cause": "", "due_at": "", "status": "", "job": ""}))),
        row("DELETE", "/schedules/{id}", Operator).at(format!("/schedules/{going}")).gives(204, Value::Null),
    ]
}
