//! `snapshots`: a VM's snapshots, listed, taken, removed.
//!
//! Owns: how they look on the terminal. Never: guesses which one is meant: the server refuses a name that several bear.
//! A crash here costs one command; what was ordered goes on.

use std::time::Duration;

use serde_json::{Map, Value};
use shared::segment::segment;

use crate::args::{OfVm, Snapshots, SnapshotsAction, Style};
use crate::client::Client;
use crate::failure::{Failure, Outcome};
use crate::jobs;
use crate::output::{self, Column, Table};

/// How long an answer may take: with the memory of a large VM it takes minutes, and so does the removal of what held much.
pub const PATIENCE: Duration = Duration::from_secs(960);
/// Most rows of a list.
const MOST: u32 = 1000;

/// One of the three.
pub async fn snapshots(client: &Client, snapshots: &Snapshots, style: Style) -> Outcome {
    match &snapshots.action {
        SnapshotsAction::List(of) => {
            let listing = client.list(&path(client, of).await?, &[], MOST).await?;
            if style == Style::Json {
                return output::json(&Value::Array(listing.rows));
            }
            if listing.rows.is_empty() {
                output::remark("No snapshots; `hypersdk snapshots create VM NAME` takes one.");
                return Ok(());
            }
            table(&listing.rows);
            Ok(())
        }
        SnapshotsAction::Create(wanted) => {
            let mut body = Map::from_iter([("name".to_owned(), Value::from(wanted.name.clone()))]);
            if let Some(description) = &wanted.description {
                body.insert("description".to_owned(), description.clone().into());
            }
            for (name, is_wanted) in [("memory", wanted.memory), ("quiesce", wanted.quiesce)] {
                if is_wanted {
                    body.insert(name.to_owned(), Value::Bool(true));
                }
            }
            let made = client.post(&path(client, &wanted.of).await?, Some(&Value::Object(body))).await?;
            if style == Style::Json {
                return output::json(&made);
            }
            table(&[made]);
            Ok(())
        }
        SnapshotsAction::Delete(wanted) => {
            let children = if wanted.children { "?children=true" } else { "" };
            let path = format!("{}/{}{children}", path(client, &wanted.of).await?, segment(&wanted.snapshot));
            client.delete(&path).await?;
            output::remark(format!("{} is removed.", output::clean(&wanted.snapshot)));
            Ok(())
        }
    }
}

async fn path(client: &Client, of: &OfVm) -> Result<String, Failure> {
    let provider = match &of.provider {
        Some(provider) => provider.clone(),
        None => jobs::provider_of(client, &of.vm).await?,
    };
    Ok(format!("/vms/{}/{}/snapshots", segment(&provider), segment(&of.vm)))
}

fn table(rows: &[Value]) {
    let mut table = Table::new(vec![
        Column::fixed("ID"),
        Column::shrinks("NAME"),
        Column::fixed("STATE"),
        Column::fixed("MEMORY"),
        Column::shrinks("OVER"),
        Column::fixed("NOW"),
        Column::right("AGE"),
    ]);
    let is_yes = |value: &Value, field: &str| value.get(field).and_then(Value::as_bool);
    for snapshot in rows {
        let memory = is_yes(snapshot, "memory").map_or("", |memory| if memory { "yes" } else { "no" });
        let now = if is_yes(snapshot, "current") == Some(true) { "*" } else { "" };
        table.row(vec![
            output::text(snapshot, "id"),
            output::text(snapshot, "name"),
            output::text(snapshot, "power_state"),
            memory.to_owned(),
            output::text(snapshot, "parent"),
            now.to_owned(),
            output::age(&output::text(snapshot, "created_at")),
        ]);
    }
    table.print();
}
