//! `migrate`: a VM goes to another hypervisor; its plan before, its steps meanwhile, its receipt in the end.
//!
//! Owns: what is asked of the API for it, and how plan and receipt look on the terminal. Never: checks a receipt's signature.
//! A crash here costs one command; the job goes on without it.

use serde_json::{Map, Value, json};

use crate::args::{Migrate, Style};
use crate::client::Client;
use crate::failure::Outcome;
use crate::output;
use crate::{jobs, watch};

/// Makes the job, or shows its plan.
pub async fn migrate(client: &Client, wanted: &Migrate, style: Style) -> Outcome {
    let provider = match &wanted.provider {
        Some(provider) => provider.clone(),
        None => jobs::provider_of(client, &wanted.vm).await?,
    };
    let body = json!({
        "type": "migrate", "provider": provider, "vm_name": wanted.vm, "format": wanted.format, "options": options(wanted),
    });
    if wanted.dry_run {
        let plan = client.post("/jobs", Some(&body)).await?;
        return show(&plan, style);
    }
    let what = format!("{} from {} to {}", output::clean(&wanted.vm), output::clean(&provider), output::clean(&wanted.to));
    if !wanted.watch {
        return jobs::make(client, &body, &what, wanted.detach, style).await;
    }
    let job = client.post("/jobs", Some(&body)).await?;
    let id = jobs::id_of(&job)?;
    if style == Style::Table {
        output::remark(format!("{id}: {what}"));
    }
    let job = watch::follow_log(client, &id, watch::POLL).await?;
    jobs::conclude(&job, style)
}

fn options(wanted: &Migrate) -> Value {
    let some = |pairs: Vec<(&str, Option<Value>)>| {
        pairs.into_iter().filter_map(|(name, value)| value.map(|value| (name.to_owned(), value))).collect::<Map<_, _>>()
    };
    let target = some(vec![
        ("target", Some(wanted.to.clone().into())),
        ("name", wanted.name.clone().map(Value::from)),
        ("cpu", wanted.cpu.map(Value::from)),
        ("memory_mb", wanted.memory.map(Value::from)),
        ("network", wanted.network.clone().map(Value::from)),
        ("bridge", wanted.bridge.clone().map(Value::from)),
        ("networks", (!wanted.map_network.is_empty()).then(|| Value::Object(networks(wanted)))),
        ("pool", wanted.pool.clone().map(Value::from)),
        ("mac", wanted.mac.clone().map(Value::from)),
        ("start", wanted.no_start.then_some(Value::Bool(false))),
    ]);
    let proof = some(vec![
        ("enabled", wanted.no_boot_proof.then_some(Value::Bool(false))),
        ("sign", wanted.sign.clone().map(Value::from)),
        ("timeout_seconds", wanted.boot_timeout.map(Value::from)),
        ("network", wanted.prove_network.then_some(Value::Bool(true))),
    ]);
    Value::Object(some(vec![
        ("target", Some(target.into())),
        ("adapt", Some(wanted.adapt.clone().into())),
        ("boot_proof", (!proof.is_empty()).then_some(Value::Object(proof))),
        ("warm", wanted.warm.then(|| Value::Object(warm(wanted)))),
        ("power_off", wanted.power_off.then_some(Value::Bool(true))),
        ("quiesce", wanted.quiesce.then_some(Value::Bool(true))),
        ("destination", wanted.destination.clone().map(Value::from)),
        ("bandwidth_limit", wanted.bandwidth_limit.map(Value::from)),
        ("dry_run", wanted.dry_run.then_some(Value::Bool(true))),
    ]))
}

fn networks(wanted: &Migrate) -> Map<String, Value> {
    wanted.map_network.iter().map(|(from, to)| (from.clone(), to.clone().into())).collect()
}

fn warm(wanted: &Migrate) -> Map<String, Value> {
    let mut warm = Map::new();
    if let Some(seconds) = wanted.max_downtime {
        warm.insert("max_downtime_seconds".to_owned(), seconds.into());
    }
    if wanted.manual_cutover {
        warm.insert("cutover".to_owned(), "manual".into());
    }
    warm
}

fn show(plan: &Value, style: Style) -> Outcome {
    if style == Style::Json {
        return output::json(plan);
    }
    let told = |name: &str| output::text(plan, name);
    let bytes = |value: &Value| value.as_u64().map_or_else(|| "not counted".to_owned(), output::bytes);
    output::line(format!("{} of {}: nothing was made.", told("type"), told("vm_name")));
    for (number, step) in plan["steps"].as_array().into_iter().flatten().enumerate() {
        let size = step["bytes"].as_u64().map(|size| format!(" ({})", output::bytes(size))).unwrap_or_default();
        wrapped(&output::text(step, "stage"), &format!("{}. {}{size}", number + 1, output::text(step, "does")));
    }
    output::pairs(
        11,
        &[
            ("data", format!("{} of {}", bytes(&plan["data_bytes"]), bytes(&plan["capacity_bytes"]))),
            ("time", plan["estimated_duration"].as_str().unwrap_or("not known").to_owned()),
            ("room", bytes(&plan["destination"]["free_bytes"])),
        ],
    );
    for warning in plan["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        wrapped("warning", warning);
    }
    Ok(())
}

/// A name and what is to be said of it, in lines of 80 columns.
fn wrapped(name: &str, text: &str) {
    const NAME: usize = 13;
    let mut line = format!("{name:<NAME$}");
    let mut is_empty = true;
    for word in text.split_whitespace() {
        if !is_empty && line.chars().count() + 1 + word.chars().count() > 80 {
            output::line(std::mem::replace(&mut line, " ".repeat(NAME)));
            is_empty = true;
        }
        if !is_empty {
            line.push(' ');
        }
        line.push_str(word);
        is_empty = false;
    }
    output::line(line);
}

/// What a migration's result says beyond an export's.
pub fn results(result: &Value, least: usize) {
    let Some(domain) = result.get("domain").filter(|domain| domain.is_object()) else { return };
    let told = |value: &Value, name: &str| output::text(value, name);
    let adapted = &result["adapted"];
    let status = told(adapted, "status").replace('_', " ");
    let proof = &result["boot_proof"];
    let proven = match proof["passed"].as_bool() {
        Some(true) => {
            let seconds = proof["seconds"].as_f64().unwrap_or_default();
            let address = proof["address"].as_str().map(|address| format!(", {address} answers")).unwrap_or_default();
            format!("yes, {} after {seconds:.0} s{address}", told(proof, "sign"))
        }
        _ => "not tried".to_owned(),
    };
    output::pairs(
        least,
        &[
            (
                "domain",
                format!("{} at {}, {}, {}", told(domain, "name"), told(domain, "target"), told(domain, "status"), told(domain, "uuid")),
            ),
            ("address", told(domain, "mac")),
            ("adapted", if status == "adapted" { told(adapted, "reason") } else { format!("{status}: {}", told(adapted, "reason")) }),
            ("booted", proven),
            ("picture", told(proof, "screenshot")),
            ("away", result["warm"]["downtime_seconds"].as_f64().map(|seconds| format!("{seconds:.1} s")).unwrap_or_default()),
            ("receipt", told(result, "migration_receipt")),
        ],
    );
}
