//! Temporary snapshots: made, found again by their name, removed.
//!
//! Owns: what becomes of a task: done, failed, or unknown; what is unknown is looked up and never guessed.
//! Never: touches a snapshot that does not bear a name of ours. A crash here leaves a snapshot that the ledger names.
//! Source: vSphere Web Services API, CreateSnapshot_Task, RemoveSnapshot_Task, TaskInfo.

use std::time::{Duration, Instant};

use roxmltree::Node;
use shared::snapshots::Wish;

use super::client::{CALL, Client, Error};
use super::collect::{self, property};
use super::wire::{self, Fault, MoRef, child, children, quote, text};
use crate::sources::Waiting;

/// How long a task may take: a removal consolidates, which copies what was written meanwhile.
const TASK: Duration = Duration::from_secs(900);
/// How long a removal waits for what else the VM is at.
pub(super) const OCCUPIED: Duration = Duration::from_secs(60);
/// Between two looks at a task.
pub(super) const LOOK: Duration = Duration::from_millis(300);

/// A temporary snapshot of the disks alone; where `quiesce`, the guest's tools are asked to calm file systems.
pub fn temporary(name: &str, quiesce: bool) -> Wish {
    Wish { name: name.to_owned(), description: "temporary, of HyperSDK".to_owned(), memory: false, quiesce }
}

/// How long the making of a snapshot is waited for.
pub struct Patience<'a> {
    /// Until when a VM that is at something else is.
    begin: Instant,
    /// Until when its task is, and what a lost answer has made is looked for. None: as long as a task may take, and one look.
    end: Option<Instant>,
    /// Whether nobody wants it any more, so that it must not begin.
    is_unwanted: &'a dyn Fn() -> bool,
}

impl<'a> Patience<'a> {
    /// A job's, whose note the reaper comes back to.
    pub fn of_a_job(is_stopping: &'a dyn Fn() -> bool) -> Self {
        Self { begin: Instant::now() + TASK, end: None, is_unwanted: is_stopping }
    }

    /// Of somebody who waits for the answer.
    pub fn of_a_request(waiting: &Waiting, is_over: &'a dyn Fn() -> bool) -> Self {
        Self { begin: Instant::now() + OCCUPIED, end: Some(waiting.until), is_unwanted: is_over }
    }
}

/// What a person is told whose act was given up while it waited for its turn.
pub(super) fn not_begun() -> Error {
    Error::Odd("nobody waits for it any more; it was not begun".to_owned())
}

/// Makes a snapshot. A VM that is at something else (the removal of another one) is waited for.
pub async fn create(client: &Client, vm: &str, wish: &Wish, patience: &Patience<'_>) -> Result<MoRef, Error> {
    let this = MoRef::new("VirtualMachine", vm);
    let Wish { name, description, memory, quiesce } = wish;
    let body = format!(
        "<name>{}</name><description>{}</description><memory>{memory}</memory><quiesce>{quiesce}</quiesce>",
        quote(name),
        quote(description)
    );
    let done = loop {
        if (patience.is_unwanted)() {
            return Err(not_begun());
        }
        match task(client, "CreateSnapshot_Task", &this, &body, patience.end).await {
            Err(e) if e.is_occupied() && Instant::now() < patience.begin => tokio::time::sleep(LOOK).await,
            done => break done,
        }
    };
    // A clear no.
    if let Err(Error::Fault(Fault::Other(..) | Fault::NoPermission(_) | Fault::InvalidPowerState | Fault::InvalidLogin)) = &done {
        return done.and_then(|()| Err(Error::Odd("a refusal".to_owned())));
    }
    // What was said or not said: it is there or it is not.
    let may_come = done.as_ref().is_err_and(Error::is_lost);
    loop {
        let waits = may_come && patience.end.is_some_and(|end| Instant::now() < end) && !(patience.is_unwanted)();
        match find(client, vm, name).await {
            Ok(Some(made)) => return Ok(made),
            Err(e) if !(waits && e.is_passing()) => return Err(e),
            Ok(None) if !waits => return Err(done.err().unwrap_or_else(|| Error::Odd("a snapshot was made and is not there".to_owned()))),
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

/// What became of a snapshot that was to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// It is gone and will not come again.
    Gone,
    /// It was not there; it may come yet.
    NotSeen,
}

/// Removes the VM's snapshot of that name and waits for the consolidation.
pub async fn remove(client: &Client, vm: &str, name: &str) -> Result<Removed, Error> {
    let end = Instant::now() + OCCUPIED;
    let mut seen = false;
    loop {
        let snapshot = match look(client, vm, name).await {
            // With its VM.
            Err(Error::Fault(Fault::ManagedObjectNotFound)) => return Ok(Removed::Gone),
            Ok(None) => return Ok(if seen { Removed::Gone } else { Removed::NotSeen }),
            Ok(Some(snapshot)) => snapshot,
            Err(e) => return Err(e),
        };
        seen = true;
        let body = "<removeChildren>false</removeChildren><consolidate>true</consolidate>";
        match task(client, "RemoveSnapshot_Task", &snapshot, body, None).await {
            Ok(()) if find(client, vm, name).await?.is_none() => return Ok(Removed::Gone),
            Ok(()) => return Err(Error::Odd(format!("the snapshot {name} was removed and is still there"))),
            // Somebody was quicker, or it goes just now.
            Err(Error::Fault(Fault::ManagedObjectNotFound)) if Instant::now() < end => tokio::time::sleep(LOOK).await,
            Err(e) if e.is_occupied() && Instant::now() < end => tokio::time::sleep(LOOK).await,
            Err(e) => return Err(e),
        }
    }
}

/// Asks for a task and waits for its end, where a time is given no longer than until then.
pub(super) async fn task(client: &Client, method: &str, this: &MoRef, body: &str, until: Option<Instant>) -> Result<(), Error> {
    let answer = client.within(async |session| client.call(session, method, this, body, CALL).await).await?;
    finished_until(client, &collect::returned(&answer, method)?, until).await
}

/// The VM's snapshot of that name; none, too, where the VM is gone.
pub async fn find(client: &Client, vm: &str, name: &str) -> Result<Option<MoRef>, Error> {
    match look(client, vm, name).await {
        Err(Error::Fault(Fault::ManagedObjectNotFound)) => Ok(None),
        other => other,
    }
}

/// Whether the VM's snapshot of that name was taken of a guest that was calmed for it, as the server says.
pub async fn is_quiesced(client: &Client, vm: &str, name: &str) -> Result<bool, Error> {
    Ok(look_at(client, vm, name).await?.is_some_and(|(_, is_quiesced)| is_quiesced))
}

async fn look(client: &Client, vm: &str, name: &str) -> Result<Option<MoRef>, Error> {
    Ok(look_at(client, vm, name).await?.map(|(snapshot, _)| snapshot))
}

async fn look_at(client: &Client, vm: &str, name: &str) -> Result<Option<(MoRef, bool)>, Error> {
    let this = MoRef::new("VirtualMachine", vm);
    client
        .within(async |session| {
            let mut found = None;
            collect::one(client, session, &this, &["snapshot"], |_, object| {
                found = property(object, "snapshot").and_then(|tree| in_tree(tree, "rootSnapshotList", name));
            })
            .await?;
            Ok(found)
        })
        .await
}

/// The snapshot of that name, and whether it is quiesced.
fn in_tree(node: Node, list: &'static str, name: &str) -> Option<(MoRef, bool)> {
    children(node, list).find_map(|entry| {
        let here = (text(entry, "name") == name).then(|| child(entry, "snapshot").and_then(MoRef::of)).flatten();
        let here = here.map(|snapshot| (snapshot, text(entry, "quiesced") == "true"));
        here.or_else(|| in_tree(entry, "childSnapshotList", name))
    })
}

/// Waits for a task. A server that goes away meanwhile is waited for as long as the task may take.
pub(super) async fn finished(client: &Client, task: &MoRef) -> Result<(), Error> {
    finished_until(client, task, None).await
}

async fn finished_until(client: &Client, task: &MoRef, until: Option<Instant>) -> Result<(), Error> {
    let began = Instant::now();
    let end = until.map_or(began + TASK, |until| until.min(began + TASK));
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
            _ if Instant::now() > end => return Err(Error::Late(began.elapsed().as_secs())),
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}
