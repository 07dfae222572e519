//! Verbs about what the installation knows: VMs, provider connections, agents.
//!
//! Owns: their tables. Never: reaches a provider itself. A crash here costs one command.

use serde_json::{Map, Value, json};
use shared::segment::segment;

use crate::args::{Agents, AgentsAction, Connect, Providers, ProvidersAction, Style, Vms};
use crate::client::Client;
use crate::failure::{Failure, Outcome};
use crate::jobs::rest;
use crate::login;
use crate::output::{self, Column, Table};

/// Rows of short lists that are asked for.
const ALL: u32 = 1000;

/// The inventory.
pub async fn vms(client: &Client, vms: &Vms, style: Style) -> Outcome {
    let refresh = vms.refresh.then(|| "true".to_owned());
    let given = [
        ("provider", vms.provider.clone()),
        ("search", vms.search.clone()),
        ("os", vms.os.clone()),
        ("status", vms.status.clone()),
        ("refresh", refresh),
    ];
    let query: Vec<(&str, String)> = given.into_iter().filter_map(|(name, value)| value.map(|value| (name, value))).collect();
    let listing = client.list("/vms/list", &query, vms.limit).await?;
    if style == Style::Json {
        return output::json(&Value::Array(listing.rows));
    }
    if listing.rows.is_empty() {
        output::remark("No VMs. `hypersdk providers` shows what is connected; `hypersdk vms --refresh` asks anew.");
        return Ok(());
    }
    let mut table = Table::new(vec![
        Column::shrinks("NAME"),
        Column::shrinks("PROVIDER"),
        Column::fixed("STATE"),
        Column::shrinks("OS"),
        Column::right("CPU"),
        Column::right("MEMORY"),
        Column::right("DISKS"),
        Column::right("SIZE"),
    ]);
    for vm in &listing.rows {
        let disks = vm.get("disks").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let size = disks.iter().fold(0u64, |sum, disk| sum.saturating_add(capacity(disk)));
        let problem = output::text(vm, "problem");
        let state = if problem.is_empty() { output::text(vm, "power_state") } else { "refused".to_owned() };
        table.row(vec![
            output::text(vm, "name"),
            output::text(vm, "connection"),
            state,
            [output::text(vm, "os"), output::text(vm, "os_version")].join(" ").trim_end().to_owned(),
            output::text(vm, "cpu"),
            output::bytes(output::number(vm, "memory_mb").saturating_mul(1 << 20)),
            disks.len().to_string(),
            output::bytes(size),
        ]);
    }
    table.print();
    for vm in &listing.rows {
        let problem = output::text(vm, "problem");
        if !problem.is_empty() {
            output::remark(format!("{}: {problem}", output::text(vm, "path")));
        }
    }
    rest(&listing, "VMs");
    Ok(())
}

/// A disk's size in bytes; the exact field where the server gives it, else the page's `size_gb`.
fn capacity(disk: &Value) -> u64 {
    match output::number(disk, "size_bytes") {
        0 => disk.get("size_gb").and_then(Value::as_f64).map_or(0, |gb| (gb * f64::from(1u32 << 30)) as u64),
        bytes => bytes,
    }
}

/// Connections and what they can do.
pub async fn providers(client: &Client, providers: &Providers, style: Style) -> Outcome {
    match &providers.action {
        None | Some(ProvidersAction::List) => {
            let listing = client.list("/providers", &[], ALL).await?;
            if style == Style::Json {
                return output::json(&Value::Array(listing.rows));
            }
            if listing.rows.is_empty() {
                output::remark("No providers. Connect one: hypersdk providers connect local --path DIR --name NAME");
                return Ok(());
            }
            connections(&listing.rows);
            rest(&listing, "connections");
            Ok(())
        }
        Some(ProvidersAction::Connect(wanted)) => {
            let connection = client.post("/providers/connect", Some(&connect(wanted)?)).await?;
            if style == Style::Json {
                return output::json(&connection);
            }
            connections(&[connection]);
            Ok(())
        }
        Some(ProvidersAction::Test { name }) => {
            let answer = client.post(&format!("/providers/{}/test", segment(name)), None).await?;
            if style == Style::Json {
                return output::json(&answer);
            }
            output::remark(format!("{}: {} VMs are seen through it.", output::clean(name), answer["found"]["vms"]));
            Ok(())
        }
        Some(ProvidersAction::Remove { name }) => {
            client.delete(&format!("/providers/{}", segment(name))).await?;
            output::remark(format!("{} is removed.", output::clean(name)));
            Ok(())
        }
        Some(ProvidersAction::Capabilities) => {
            let answer = client.get("/providers/capabilities", &[]).await?;
            if style == Style::Json {
                return output::json(&answer);
            }
            capabilities(&answer);
            Ok(())
        }
    }
}

/// What is asked for. The password of a hypervisor is never an argument.
fn connect(wanted: &Connect) -> Result<Value, Failure> {
    let mut body = Map::from_iter([("provider".to_owned(), Value::from(wanted.kind.clone()))]);
    let texts = [
        ("name", &wanted.name),
        ("path", &wanted.path),
        ("uri", &wanted.uri),
        ("host", &wanted.host),
        ("username", &wanted.username),
        ("fingerprint", &wanted.host_fingerprint),
        ("agent", &wanted.agent),
    ];
    for (field, value) in texts {
        if let Some(value) = value {
            body.insert(field.to_owned(), Value::from(value.clone()));
        }
    }
    if wanted.host_insecure {
        body.insert("insecure".to_owned(), Value::from(true));
    }
    if let Some(username) = &wanted.username {
        let password = login::password("HYPERSDK_PROVIDER_PASSWORD", username)?;
        body.insert("password".to_owned(), Value::from(password.expose()));
    }
    Ok(Value::Object(body))
}

fn connections(rows: &[Value]) {
    let mut table = Table::new(vec![
        Column::shrinks("NAME"),
        Column::fixed("KIND"),
        Column::fixed("STATUS"),
        Column::shrinks("AGENT"),
        Column::shrinks("WHERE"),
        Column::right("SEEN"),
    ]);
    for row in rows {
        let place = ["path", "host", "uri"].iter().map(|field| output::text(row, field)).find(|text| !text.is_empty());
        table.row(vec![
            output::text(row, "name"),
            first(row, &["kind", "provider", "type"]),
            output::text(row, "status"),
            first(row, &["agent", "agent_name", "agent_id"]),
            place.unwrap_or_default(),
            output::age(&output::text(row, "last_seen")),
        ]);
    }
    table.print();
    for row in rows {
        let error = output::text(row, "last_error");
        if !error.is_empty() {
            output::remark(format!("{}: {error}", output::text(row, "name")));
        }
    }
}

fn first(row: &Value, fields: &[&str]) -> String {
    fields.iter().map(|field| output::text(row, field)).find(|text| !text.is_empty()).unwrap_or_default()
}

/// One line for each kind: a yes or no for each ability; below, what is missing for the rest.
fn capabilities(answer: &Value) {
    let Some(rows) = answer.get("data").or(Some(answer)).and_then(Value::as_array) else {
        let _ = output::json(answer);
        return;
    };
    let abilities: [(&'static str, &str); 5] =
        [("LIST", "list"), ("EXPORT", "export"), ("HOT", "hot_export"), ("CBT", "changed_blocks"), ("DEPLOY", "deploy")];
    let mut columns = vec![Column::fixed("KIND")];
    columns.extend(abilities.iter().map(|(title, _)| Column::fixed(title)));
    columns.extend([Column::shrinks("FORMATS"), Column::shrinks("AGENTS")]);
    let mut table = Table::new(columns);
    for row in rows {
        let mut cells = vec![first(row, &["provider", "kind"])];
        cells.extend(abilities.iter().map(|(_, field)| match row.get(*field).and_then(Value::as_bool) {
            Some(true) => "yes".to_owned(),
            _ => "no".to_owned(),
        }));
        cells.extend([list(row, "formats"), list(row, "agents")]);
        table.row(cells);
    }
    table.print();
    output::line("");
    for row in rows {
        let kind = first(row, &["provider", "kind"]);
        for missing in words(row, "missing") {
            output::line(format!("{kind}: {missing}"));
        }
    }
}

/// A field that holds a list of words.
fn list(row: &Value, field: &str) -> String {
    words(row, field).collect::<Vec<_>>().join(" ")
}

fn words<'a>(row: &'a Value, field: &str) -> impl Iterator<Item = String> + 'a {
    row.get(field).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).map(output::clean)
}

/// Agents, and what an operator does with them.
pub async fn agents(client: &Client, agents: &Agents, style: Style) -> Outcome {
    let answer = match &agents.action {
        None | Some(AgentsAction::List) => return list_agents(client, style).await,
        Some(AgentsAction::Token) => {
            let answer = client.post("/agents/tokens", Some(&json!({}))).await?;
            if style == Style::Table {
                output::line(output::text(&answer, "token"));
                output::remark(
                    "Shown once, good for one agent. On its host:\n  hypersdk-agent --controller https://THIS-HOST:5443   (token in HYPERSDK_TOKEN)",
                );
                return Ok(());
            }
            answer
        }
        Some(AgentsAction::Drain { id }) => client.post(&format!("/agents/{}/drain", segment(id)), None).await?,
        Some(AgentsAction::Resume { id }) => client.post(&format!("/agents/{}/resume", segment(id)), None).await?,
    };
    if style == Style::Json {
        return output::json(&answer);
    }
    agent_table(&[answer]).print();
    Ok(())
}

async fn list_agents(client: &Client, style: Style) -> Outcome {
    let listing = client.list("/agents", &[], ALL).await?;
    if style == Style::Json {
        return output::json(&Value::Array(listing.rows));
    }
    if listing.rows.is_empty() {
        output::remark("No agents. Make a join token for one: hypersdk agents token");
        return Ok(());
    }
    agent_table(&listing.rows).print();
    rest(&listing, "agents");
    Ok(())
}

fn agent_table(rows: &[Value]) -> Table {
    let mut table = Table::new(vec![
        Column::fixed("ID"),
        Column::shrinks("NAME"),
        Column::fixed("STATUS"),
        Column::fixed("VERSION"),
        Column::right("JOBS"),
        Column::right("SEEN"),
    ]);
    for row in rows {
        table.row(vec![
            output::text(row, "id"),
            output::text(row, "name"),
            output::text(row, "status"),
            output::text(row, "version"),
            first(row, &["running", "jobs"]),
            output::age(&first(row, &["last_seen", "last_heartbeat"])),
        ]);
    }
    table
}
