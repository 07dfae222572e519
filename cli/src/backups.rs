//! `backup` and `restore`: restore points made, listed, and given back as whole disks.
//!
//! Owns: which point a name means, and how points look on the terminal. Never: opens one: the agent that holds it does.
//! A crash here costs one command; the job goes on without it.

use serde_json::{Map, Value, json};
use shared::ids::JobId;

use crate::args::{Backup, Restore, Style};
use crate::client::{Client, Listing};
use crate::failure::{Failure, Outcome};
use crate::jobs;
use crate::output::{self, Column, Table};

/// Most points that are looked through.
const MOST: u32 = 1000;

/// Makes a restore point.
pub async fn backup(client: &Client, backup: &Backup, style: Style) -> Outcome {
    let provider = match &backup.provider {
        Some(provider) => provider.clone(),
        None => jobs::provider_of(client, &backup.vm).await?,
    };
    let mut options = Map::new();
    let given = [
        ("full", backup.full.then_some(Value::Bool(true))),
        ("power_off", backup.power_off.then_some(Value::Bool(true))),
        ("quiesce", backup.quiesce.then_some(Value::Bool(true))),
        ("compression", backup.compression.map(|algorithm| json!(algorithm))),
        ("level", backup.level.map(Value::from)),
        ("destination", backup.destination.clone().map(Value::from)),
        ("bandwidth_limit", backup.bandwidth_limit.map(Value::from)),
        ("priority", backup.priority.map(Value::from)),
    ];
    options.extend(given.into_iter().filter_map(|(name, value)| value.map(|value| (name.to_owned(), value))));
    let body = json!({ "type": "backup", "provider": provider, "vm_name": backup.vm, "options": options });
    let what = format!("backup of {} from {}", output::clean(&backup.vm), output::clean(&provider));
    jobs::make(client, &body, &what, backup.detach, style).await
}

/// Makes whole disks of a restore point, or lists the points.
pub async fn restore(client: &Client, restore: &Restore, style: Style) -> Outcome {
    let wanted = restore.point.as_deref();
    if restore.list {
        return list(&points(client, wanted, restore.provider.as_deref()).await?, style);
    }
    let wanted = wanted.unwrap_or_default();
    let job = match wanted.parse::<JobId>() {
        Ok(id) => client.get(&format!("/jobs/{id}"), &[]).await?,
        Err(_) => newest(points(client, Some(wanted), restore.provider.as_deref()).await?, wanted)?,
    };
    let path = job.pointer("/result/restore_point/path").and_then(Value::as_str).ok_or_else(|| {
        let id = output::text(&job, "id");
        Failure::failed(format!("{id} is no restore point; `hypersdk restore --list` lists them"))
    })?;
    let mut options = Map::new();
    if restore.compress {
        options.insert("compress".to_owned(), Value::Bool(true));
    }
    if let Some(destination) = &restore.destination {
        options.insert("destination".to_owned(), destination.clone().into());
    }
    let mut body = json!({ "type": "convert", "source": path, "format": restore.format, "options": options });
    if let Some(agent) = job.get("agent").and_then(Value::as_str) {
        body["agent"] = agent.into();
    }
    let made = job.pointer("/result/restore_point/created_at").and_then(Value::as_str).unwrap_or_default();
    let what = format!("{} as it was at {made}, as {}", output::clean(&output::text(&job, "vm_name")), restore.format);
    jobs::make(client, &body, &what, restore.detach, style).await
}

/// Restore points that are there, the newest first; of one VM where it is named.
async fn points(client: &Client, vm: Option<&str>, provider: Option<&str>) -> Result<Vec<Value>, Failure> {
    let mut query = vec![("type", "backup".to_owned()), ("status", "completed".to_owned())];
    query.extend(vm.map(|vm| ("search", vm.to_owned())));
    query.extend(provider.map(|provider| ("provider", provider.to_owned())));
    let Listing { rows, .. } = client.list("/jobs", &query, MOST).await?;
    let is_there = |row: &Value| row.pointer("/result/restore_point").is_some() && row.pointer("/result/removed_at").is_none();
    let is_of = |row: &Value| vm.is_none_or(|vm| row.get("vm_name").and_then(Value::as_str) == Some(vm));
    Ok(rows.into_iter().filter(|row| is_there(row) && is_of(row)).collect())
}

/// The newest of the points of one VM.
fn newest(points: Vec<Value>, vm: &str) -> Result<Value, Failure> {
    let mut connections: Vec<String> = points.iter().map(|point| output::text(point, "provider")).collect();
    connections.sort();
    connections.dedup();
    if connections.len() > 1 {
        let connections = connections.join(", ");
        return Err(Failure::usage(format!(
            "{} has restore points from several providers; name one with --provider: {connections}",
            output::clean(vm)
        )));
    }
    let mut paths: Vec<String> = points.iter().map(|point| output::text(&point["result"]["restore_point"], "vm_path")).collect();
    paths.sort();
    paths.dedup();
    if paths.len() > 1 {
        let paths = paths.join(", ");
        return Err(Failure::usage(format!(
            "several VMs are called {}: {paths}; name a restore point, `hypersdk restore --list` has them",
            output::clean(vm)
        )));
    }
    let at = |point: &Value| point.pointer("/result/restore_point/created_at").and_then(Value::as_str).map(str::to_owned);
    points.into_iter().max_by_key(at).ok_or_else(|| {
        Failure::failed(format!("there is no restore point of {}; `hypersdk restore --list` lists what there is", output::clean(vm)))
    })
}

fn list(points: &[Value], style: Style) -> Outcome {
    if style == Style::Json {
        return output::json(&Value::Array(points.to_vec()));
    }
    if points.is_empty() {
        output::remark("No restore points; `hypersdk backup VM` makes one.");
        return Ok(());
    }
    let mut table = Table::new(vec![
        Column::fixed("POINT"),
        Column::shrinks("VM"),
        Column::fixed("KIND"),
        Column::right("MOVED"),
        Column::right("LAYERS"),
        Column::right("AGE"),
    ]);
    for point in points {
        let of = &point["result"]["restore_point"];
        table.row(vec![
            output::text(point, "id"),
            output::text(point, "vm_name"),
            output::text(of, "kind"),
            output::bytes(output::number(of, "bytes_moved")),
            output::text(of, "layers"),
            output::age(&output::text(of, "created_at")),
        ]);
    }
    table.print();
    Ok(())
}
