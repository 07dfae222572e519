//! Temporary snapshots: made, found again by their name, removed.
//!
//! Owns: what becomes of a task: done, failed, or unknown; what is unknown is looked up and never guessed.
//! Never: touches a snapshot that does not bear a name of ours. A crash here leaves a snapshot that the ledger names.
//! Source: vSphere Web Services API, CreateSnapshot_Task, RemoveSnapshot_Task, TaskInfo.

use std::time::{Duration, Instant};

use roxmltree::Node;

use super::client::{CALL, Client, Error};
use super::collect::{self, property};
use super::wire::{self, Fault, MoRef, child, children, quote, text};

/// How long a task may take: a removal consolidates, which copies what was written meanwhile.
const TASK: Duration = Duration::from_secs(900);
/// Between two looks at a task.
const LOOK: Duration = Duration::from_millis(300);

/// Makes a snapshot of the disks alone, without memory; where `quiesce`, the guest's tools are asked to calm file systems.
pub async fn create(client: &Client, vm: &str, name: &str, quiesce: bool) -> Result<MoRef, Error> {
    let this = MoRef::new("VirtualMachine", vm);
    let body = format!(
        "<name>{}</name><description>temporary, of HyperSDK</description><memory>false</memory><quiesce>{quiesce}</quiesce>",
        quote(name)
    );
    let session = client.session().await?;
    let asked = client.call(&session, "CreateSnapshot_Task", &this, &body, CALL).await;
    let done = match asked {
        Ok(answer) => finished(client, &collect::returned(&answer, "CreateSnapshot_Task")?).await,
        Err(e) => Err(e),
    };
    match done {
        // What was said or not said: it is there or it is not.
        Ok(()) | Err(Error::Unreachable(_) | Error::Busy(_) | Error::Status(_) | Error::Odd(_)) => match find(client, vm, name).await? {
            Some(made) => Ok(made),
            None => Err(done.err().unwrap_or_else(|| Error::Odd("a snapshot was made and is not there".to_owned()))),
        },
        Err(e) => Err(e),
    }
}

/// Removes the VM's snapshot of that name and waits for the consolidation; one that is not there is removed.
pub async fn remove(client: &Client, vm: &str, name: &str) -> Result<(), Error> {
    let Some(snapshot) = find(client, vm, name).await? else { return Ok(()) };
    let session = client.session().await?;
    let body = "<removeChildren>false</removeChildren><consolidate>true</consolidate>";
    let answer = match client.call(&session, "RemoveSnapshot_Task", &snapshot, body, CALL).await {
        Err(Error::Fault(Fault::ManagedObjectNotFound)) => return Ok(()),
        other => other?,
    };
    finished(client, &collect::returned(&answer, "RemoveSnapshot_Task")?).await?;
    match find(client, vm, name).await? {
        None => Ok(()),
        Some(_) => Err(Error::Odd(format!("the snapshot {name} was removed and is still there"))),
    }
}

/// The VM's snapshot of that name; none, too, where the VM is gone.
pub async fn find(client: &Client, vm: &str, name: &str) -> Result<Option<MoRef>, Error> {
    let this = MoRef::new("VirtualMachine", vm);
    let looked = client
        .within(async |session| {
            let mut found = None;
            collect::one(client, session, &this, &["snapshot"], |_, object| {
                found = property(object, "snapshot").and_then(|tree| in_tree(tree, "rootSnapshotList", name));
            })
            .await?;
            Ok(found)
        })
        .await;
    match looked {
        Err(Error::Fault(Fault::ManagedObjectNotFound)) => Ok(None),
        other => other,
    }
}

fn in_tree(node: Node, list: &'static str, name: &str) -> Option<MoRef> {
    children(node, list).find_map(|entry| {
        let here = (text(entry, "name") == name).then(|| child(entry, "snapshot").and_then(MoRef::of)).flatten();
        here.or_else(|| in_tree(entry, "childSnapshotList", name))
    })
}

/// Waits for a task. A server that goes away meanwhile is waited for as long as the task may take.
pub(super) async fn finished(client: &Client, task: &MoRef) -> Result<(), Error> {
    let end = Instant::now() + TASK;
    loop {
        let looked = client
            .within(async |session| {
                let mut state = (String::new(), String::new());
                collect::one(client, session, task, &["info.state", "info.error"], |_, object| {
                    let error = property(object, "info.error").map(|error| {
                        let kind = child(error, "fault").map(|fault| wire::type_of(fault).to_owned()).unwrap_or_default();
                        format!("{kind} {}", text(error, "localizedMessage"))
                    });
                    state = (collect::property_text(object, "info.state").to_owned(), error.unwrap_or_default());
                })
                .await?;
                Ok(state)
            })
            .await;
        match looked {
            Ok((state, _)) if state == "success" => return Ok(()),
            Ok((state, error)) if state == "error" => return Err(Error::Fault(Fault::Other("task".to_owned(), error.trim().to_owned()))),
            Err(e) if !e.is_passing() => return Err(e),
            Err(e) if Instant::now() > end => return Err(e),
            _ if Instant::now() > end => return Err(Error::Unreachable(format!("a task is not done after {} s", TASK.as_secs()))),
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}
