//! Job verbs: export, list, show, cancel, retry, pause, resume.
//!
//! Owns: what is asked of the jobs API and how a job looks on the terminal. Never: follows a job (see [`crate::watch`]).
//! A crash here costs one command; the job goes on without it.

use serde_json::{Map, Value, json};
use shared::error::Code;

use crate::args::{Export, JobFilter, Jobs, JobsAction, Style};
use crate::client::{Client, Listing};
use crate::failure::{Exit, Failure, Outcome};
use crate::output::{self, Column, Table};
use crate::{migrate, watch};

/// Creates an export job and, unless told otherwise, stays until it has ended.
pub async fn export(client: &Client, export: &Export, style: Style) -> Outcome {
    let provider = match &export.provider {
        Some(provider) => provider.clone(),
        None => provider_of(client, &export.vm).await?,
    };
    let mut options = Map::new();
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            options.insert(name.to_owned(), value);
        }
    };
    // To name an algorithm or a level is to ask for compression.
    let compress = export.compress || export.compression.is_some() || export.level.is_some();
    set("compress", compress.then_some(Value::Bool(true)));
    set("include_snapshots", export.include_snapshots.then_some(Value::Bool(true)));
    set("power_off", export.power_off.then_some(Value::Bool(true)));
    set("quiesce", export.quiesce.then_some(Value::Bool(true)));
    set("compression", export.compression.map(|algorithm| json!(algorithm)));
    set("level", export.level.map(Value::from));
    set("destination", export.destination.clone().map(Value::from));
    set("verify", export.no_verify.then_some(Value::Bool(false)));
    set("bandwidth_limit", export.bandwidth_limit.map(Value::from));
    set("priority", export.priority.map(Value::from));
    let body = json!({ "type": "export", "provider": provider, "vm_name": export.vm, "format": export.format, "options": options });
    let what = format!("{} from {} as {}", output::clean(&export.vm), output::clean(&provider), export.format);
    make(client, &body, &what, export.detach, style).await
}

/// Makes a job and, unless told otherwise, stays until it has ended.
pub async fn make(client: &Client, body: &Value, what: &str, detach: bool, style: Style) -> Outcome {
    let job = client.post("/jobs", Some(body)).await?;
    let id = id_of(&job)?;
    if detach {
        return match style {
            Style::Json => output::json(&job),
            Style::Table => {
                output::line(&id);
                Ok(())
            }
        };
    }
    if style == Style::Table {
        output::remark(format!("{id}: {what}"));
    }
    let job = watch::follow(client, &id, watch::POLL).await?;
    conclude(&job, style)
}

/// The one connection that has a VM of this name, path or id.
pub async fn provider_of(client: &Client, vm: &str) -> Result<String, Failure> {
    // A path is not searched for, its last part is; what comes back is compared whole.
    let part = vm.rsplit('/').next().unwrap_or(vm);
    let Listing { rows, .. } = client.list("/vms/list", &[("search", part.to_owned())], 1000).await?;
    let bears = |row: &&Value| ["name", "path", "id"].iter().any(|field| row.get(field).and_then(Value::as_str) == Some(vm));
    let mut connections: Vec<String> = rows.iter().filter(bears).map(|row| output::text(row, "connection")).collect();
    connections.sort();
    connections.dedup();
    match connections.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(Failure::failed(format!("no connected provider has a VM {}; `hypersdk vms --refresh` lists them", output::clean(vm)))),
        several => Err(Failure::usage(format!(
            "several providers have a VM {}; choose one with --provider: {}",
            output::clean(vm),
            several.join(", ")
        ))),
    }
}

/// The list, or what is done with one job.
pub async fn jobs(client: &Client, jobs: &Jobs, style: Style) -> Outcome {
    let act = |id: &shared::ids::JobId, verb: &str| format!("/jobs/{id}/{verb}");
    match &jobs.action {
        None => list(client, &jobs.filter, style).await,
        Some(JobsAction::List(filter)) => list(client, filter, style).await,
        Some(JobsAction::Get { id }) => show(&client.get(&format!("/jobs/{id}"), &[]).await?, style),
        Some(JobsAction::Cancel { id }) => changed(&client.delete(&format!("/jobs/{id}")).await?, style),
        Some(JobsAction::Retry { id }) => changed(&client.post(&act(id, "retry"), None).await?, style),
        Some(JobsAction::Pause { id }) => changed(&client.post(&act(id, "pause"), None).await?, style),
        Some(JobsAction::Cutover { id }) => changed(&client.post(&act(id, "cutover"), None).await?, style),
        Some(JobsAction::Resume { id }) => changed(&client.post(&act(id, "resume"), None).await?, style),
    }
}

async fn list(client: &Client, filter: &JobFilter, style: Style) -> Outcome {
    let given = [("status", &filter.status), ("provider", &filter.provider), ("type", &filter.kind), ("search", &filter.search)];
    let query: Vec<(&str, String)> = given.into_iter().filter_map(|(name, value)| value.clone().map(|value| (name, value))).collect();
    let listing = client.list("/jobs", &query, filter.limit).await?;
    if style == Style::Json {
        return output::json(&Value::Array(listing.rows));
    }
    if listing.rows.is_empty() {
        output::remark("No jobs.");
        return Ok(());
    }
    table(&listing.rows).print();
    rest(&listing, "jobs");
    Ok(())
}

/// Says that a list was cut.
pub fn rest(listing: &Listing, what: &str) {
    let shown = listing.rows.len() as u64;
    if listing.total > shown {
        output::remark(format!("{shown} of {} {what}; --limit {} shows all", listing.total, listing.total));
    }
}

/// Jobs as a table. The finer word (`copying`, `waiting`) stands in place of the status, which follows from it.
pub fn table(rows: &[Value]) -> Table {
    let mut table = Table::new(vec![
        Column::fixed("ID"),
        Column::fixed("STATUS"),
        Column::right("%"),
        Column::shrinks("VM"),
        Column::shrinks("PROVIDER"),
        Column::fixed("FORMAT"),
        Column::right("AGE"),
    ]);
    for job in rows {
        table.row(vec![
            output::text(job, "id"),
            output::text(job, "stage"),
            output::text(job, "progress"),
            output::text(job, "vm_name"),
            output::text(job, "provider"),
            output::text(job, "format"),
            output::age(&output::text(job, "created_at")),
        ]);
    }
    table
}

fn changed(job: &Value, style: Style) -> Outcome {
    if style == Style::Json {
        return output::json(job);
    }
    output::line(format!("{} {}", output::text(job, "id"), output::text(job, "stage")));
    Ok(())
}

fn show(job: &Value, style: Style) -> Outcome {
    if style == Style::Json {
        return output::json(job);
    }
    let status = output::text(job, "status");
    let stage = output::text(job, "stage");
    let status = if status == stage { status } else { format!("{status}, {stage}") };
    let data = match output::number(job, "bytes_total") {
        0 => String::new(),
        total => format!(
            "{} of {} on disk, {} read back and compared",
            output::bytes(output::number(job, "bytes_done")),
            output::bytes(total),
            output::bytes(output::number(job, "bytes_verified")),
        ),
    };
    let rate = match output::number(job, "rate_bps") {
        0 => String::new(),
        rate => format!("{}/s", output::bytes(rate)),
    };
    output::pairs(
        11,
        &[
            ("id", output::text(job, "id")),
            ("status", status),
            ("waiting for", output::text(job, "waiting_for")),
            ("error", output::text(job, "error")),
            ("progress", format!("{} %", output::text(job, "progress"))),
            ("data", data),
            ("rate", rate),
            ("duration", output::text(job, "estimated_duration")),
            ("type", output::text(job, "type")),
            ("vm", output::text(job, "vm_name")),
            ("provider", output::text(job, "provider")),
            ("format", output::text(job, "format")),
            ("options", options_text(job)),
            ("agent", output::text(job, "agent")),
            ("attempt", output::text(job, "attempt")),
            ("created", output::text(job, "created_at")),
            ("started", output::text(job, "started_at")),
            ("finished", output::text(job, "finished_at")),
        ],
    );
    results(job, 11);
    Ok(())
}

fn options_text(job: &Value) -> String {
    let Some(options) = job.get("options").and_then(Value::as_object) else { return String::new() };
    let words: Vec<String> = options.keys().map(|name| format!("{name}={}", output::text(&job["options"], name))).collect();
    words.join(" ")
}

/// The files that a job published, each with what identifies it.
fn results(job: &Value, least: usize) {
    let Some(result) = job.get("result").filter(|result| result.is_object()) else { return };
    for file in result.get("files").and_then(Value::as_array).into_iter().flatten() {
        output::pairs(
            least,
            &[
                ("file", output::text(file, "path")),
                ("size", output::bytes(output::number(file, "size"))),
                ("sha256", output::text(file, "sha256")),
            ],
        );
    }
    let verified = match result.get("verified").and_then(Value::as_bool) {
        Some(true) => "yes: read back and equal to the source, block by block",
        Some(false) => "no",
        None => "",
    };
    let state = output::text(result, "consistency");
    output::pairs(least, &[("state", state), ("manifest", output::text(result, "manifest")), ("verified", verified.to_owned())]);
    migrate::results(result, least);
}

/// The end of a followed job: its files, or its error as this command's own.
pub fn conclude(job: &Value, style: Style) -> Outcome {
    if style == Style::Json {
        output::json(job)?;
    }
    let id = output::text(job, "id");
    match output::text(job, "status").as_str() {
        "completed" => {
            if style == Style::Table {
                let data = output::bytes(output::number(job, "bytes_total"));
                output::line(format!("Completed in {}, {data} of data.", output::text(job, "estimated_duration")));
                results(job, 8);
            }
            Ok(())
        }
        "cancelled" => Err(Failure::failed(format!("{id} was cancelled"))),
        _ => {
            let exit = job.get("error_code").and_then(Value::as_str).and_then(Code::from_word).map_or(Exit::Failed, exit_of_job);
            Err(Failure::new(exit, format!("{id} failed: {}", output::text(job, "error"))))
        }
    }
}

/// A job that failed is "failed", whatever stood in its way; only a failed proof has a code of its own.
fn exit_of_job(code: Code) -> Exit {
    match code {
        Code::VerificationFailed => Exit::VerificationFailed,
        _ => Exit::Failed,
    }
}

/// The id in a job that the server answered.
pub fn id_of(job: &Value) -> Result<String, Failure> {
    let id = job.get("id").and_then(Value::as_str).and_then(|id| id.parse::<shared::ids::JobId>().ok());
    id.map(String::from).ok_or_else(|| Failure::failed("the answer holds no job; is this server a HyperSDK controller?"))
}
