//! A VM's snapshots as people make them: listed, taken, removed.
//!
//! Owns: which property means what, what a server's refusal means, and that what is unknown is looked up. Never: decides whether a snapshot may
//! go, removes more than the one that is named (or, where asked, those above it). A crash here leaves a task that the server ends by itself.
//! Source: vSphere Web Services API, VirtualMachineSnapshotTree, VirtualMachineFileLayoutExSnapshotLayout, CreateSnapshot_Task, RemoveSnapshot_Task.

use std::collections::HashMap;
use std::time::Instant;

use roxmltree::Node;
use shared::error::Code;
use shared::snapshots::{Snapshot, Wish};

use super::client::{Client, Error};
use super::collect::{self, property};
use super::inventory::unescaped;
use super::snapshot::{self, LOOK, OCCUPIED, Patience};
use super::wire::{Fault, MoRef, child, children, number, text};
use crate::sources::{self, Waiting};

/// The VM's snapshots; none where the VM is gone.
pub async fn list(client: &Client, vm: &str) -> Result<Option<Vec<Snapshot>>, Error> {
    let this = MoRef::new("VirtualMachine", vm);
    let looked = client
        .within(async |session| {
            let mut found = None;
            collect::one(client, session, &this, &["snapshot", "layoutEx.snapshot"], |_, object| found = Some(of(object))).await?;
            Ok(found)
        })
        .await;
    match looked {
        Err(Error::Fault(Fault::ManagedObjectNotFound)) => Ok(None),
        other => other,
    }
}

fn of(object: Node) -> Vec<Snapshot> {
    let Some(tree) = property(object, "snapshot") else { return Vec::new() };
    let layouts = property(object, "layoutEx.snapshot");
    let with_memory: HashMap<&str, bool> = layouts
        .iter()
        .flat_map(|layouts| layouts.children().filter(Node::is_element))
        .filter_map(|layout| Some((text(layout, "key"), number::<i64>(layout, "memoryKey")? >= 0)))
        .collect();
    let current = child(tree, "currentSnapshot").and_then(|node| node.text()).unwrap_or_default();
    let mut all = Vec::new();
    gather(tree, &mut all);
    for snapshot in &mut all {
        snapshot.current = snapshot.id == current;
        snapshot.memory = with_memory.get(snapshot.id.as_str()).copied();
    }
    all
}

/// Walks a tree of any depth without the stack's help: a server may have more levels than it should.
fn gather(tree: Node, all: &mut Vec<Snapshot>) {
    let mut open: Vec<(Node, Option<String>)> = children(tree, "rootSnapshotList").map(|node| (node, None)).collect();
    while let Some((node, parent)) = open.pop() {
        let id = text(node, "snapshot").trim().to_owned();
        open.extend(children(node, "childSnapshotList").map(|above| (above, Some(id.clone()))));
        let quiesced = match text(node, "quiesced") {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        };
        let time = chrono::DateTime::parse_from_rfc3339(text(node, "createTime"));
        all.push(Snapshot {
            id,
            name: unescaped(text(node, "name")),
            description: text(node, "description").to_owned(),
            created_at: time.map(|time| shared::clock::rfc3339(time.to_utc())).unwrap_or_default(),
            power_state: text(node, "state").to_owned(),
            quiesced,
            parent,
            ..Snapshot::default()
        });
    }
}

/// Takes one.
pub async fn take(client: &Client, vm: &str, wish: &Wish, waiting: &Waiting) -> Result<(), Error> {
    let is_over = || waiting.is_over();
    snapshot::create(client, vm, wish, &Patience::of_a_request(waiting, &is_over)).await.map(drop)
}

/// Removes one, and where asked all that were taken over it; waits for the consolidation. What a lost answer has done is looked for as long as
/// there is time.
pub async fn remove(client: &Client, vm: &str, id: &str, children: bool, waiting: &Waiting) -> Result<(), Error> {
    let this = MoRef::new("VirtualMachineSnapshot", id);
    let body = format!("<removeChildren>{children}</removeChildren><consolidate>true</consolidate>");
    let is_there = async || list(client, vm).await.map(|all| all.is_some_and(|all| all.iter().any(|snapshot| snapshot.id == id)));
    let end = Instant::now() + OCCUPIED;
    let lost = loop {
        if waiting.is_over() {
            return Err(snapshot::not_begun());
        }
        match snapshot::task(client, "RemoveSnapshot_Task", &this, &body, Some(waiting.until)).await {
            // Somebody was quicker.
            Ok(()) | Err(Error::Fault(Fault::ManagedObjectNotFound)) if !is_there().await? => return Ok(()),
            Ok(()) => return Err(Error::Odd("the snapshot was removed and is still there".to_owned())),
            Err(e) if e.is_occupied() && Instant::now() < end => tokio::time::sleep(LOOK).await,
            Err(e) if e.is_lost() => break e,
            Err(e) => return Err(e),
        }
    };
    loop {
        let waits = !waiting.is_over();
        match is_there().await {
            Ok(false) => return Ok(()),
            Ok(true) if !waits => return Err(lost),
            Err(e) if !(waits && e.is_passing()) => return Err(e),
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Faults about what somebody else does with the VM.
const OTHERS: &[&str] = &["TaskInProgress", "ConcurrentAccess", "FileLocked", "InvalidState", "InvalidPowerState"];
/// Faults that say that this cannot be done as it was asked.
const REFUSALS: &[&str] = &[
    "ApplicationQuiesceFault",
    "CannotAccessVmComponent",
    "FilesystemQuiesceFault",
    "InvalidName",
    "InvalidSnapshotFormat",
    "MemorySnapshotOnIndependentDisk",
    "MultipleSnapshotsNotSupported",
    "NotSupported",
    "RestrictedVersion",
    "SnapshotDisabled",
    "SnapshotFault",
    "SnapshotIncompatibleDeviceInVm",
    "SnapshotLocked",
    "TooManySnapshotLevels",
    "ToolsUnavailable",
    "VirtualDiskModeNotSupported",
];

/// For whoever asked: what a refusal means.
pub fn told(client: &Client, e: &Error) -> sources::Error {
    let plain = e.told(client.host());
    if e.is_lost() {
        let message = format!("{}; it may go on all the same: the list of snapshots will show what has become of it", plain.message);
        return sources::Error { message, ..plain };
    }
    sources::Error { code: code(e).unwrap_or(plain.code), ..plain }
}

/// The code of a refusal that means something else here than elsewhere.
fn code(e: &Error) -> Option<Code> {
    let (kind, message) = match e {
        Error::Fault(Fault::InvalidPowerState) => return Some(Code::Conflict),
        Error::Fault(Fault::Other(kind, message)) => (kind.as_str(), message),
        _ => return None,
    };
    // A task's fault stands before its sentence.
    let kind = if kind == "task" { message.split(' ').next().unwrap_or_default() } else { kind };
    match kind {
        "NoDiskSpace" | "InsufficientStorageSpace" => Some(Code::NoSpace),
        kind if OTHERS.contains(&kind) => Some(Code::Conflict),
        kind if REFUSALS.contains(&kind) => Some(Code::Unprocessable),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sources::vsphere::wire;

    #[test]
    fn a_refusal_is_told_by_what_it_means() {
        let other = |kind: &str, message: &str| Error::Fault(Fault::Other(kind.to_owned(), message.to_owned()));
        for (e, expected) in [
            (Error::Fault(Fault::InvalidPowerState), Some(Code::Conflict)),
            (other("task", "InvalidPowerState The VM is on."), Some(Code::Conflict)),
            (other("task", "NoDiskSpace The datastore is full."), Some(Code::NoSpace)),
            (other("InsufficientStorageSpace", ""), Some(Code::NoSpace)),
            (other("task", "TooManySnapshotLevels 32"), Some(Code::Unprocessable)),
            (other("SystemError", ""), None),
            (Error::Late(1), None),
        ] {
            assert_eq!(code(&e), expected, "{e:?}");
        }
    }

    #[test]
    fn a_tree_is_told_as_a_list_that_knows_its_parents() {
        let object = "<o xmlns=\"urn:vim25\"><propSet><name>snapshot</name><val><currentSnapshot type=\"VirtualMachineSnapshot\">snapshot-3</currentSnapshot>\
            <rootSnapshotList><snapshot type=\"VirtualMachineSnapshot\">snapshot-1</snapshot><name>a%2fb</name><createTime>2026-01-02T03:04:05+01:00</createTime>\
            <state>poweredOn</state><quiesced>true</quiesced>\
            <childSnapshotList><snapshot type=\"VirtualMachineSnapshot\">snapshot-2</snapshot><name>x</name><quiesced>false</quiesced></childSnapshotList>\
            <childSnapshotList><snapshot type=\"VirtualMachineSnapshot\">snapshot-3</snapshot><name>x</name></childSnapshotList></rootSnapshotList></val></propSet>\
            <propSet><name>layoutEx.snapshot</name><val><VirtualMachineFileLayoutExSnapshotLayout><key>snapshot-1</key><memoryKey>7</memoryKey>\
            </VirtualMachineFileLayoutExSnapshotLayout><VirtualMachineFileLayoutExSnapshotLayout><key>snapshot-2</key><memoryKey>-1</memoryKey>\
            </VirtualMachineFileLayoutExSnapshotLayout></val></propSet></o>";
        let document = wire::parse(object).unwrap();
        let mut all = of(document.root_element());
        all.sort_by(|a, b| a.id.cmp(&b.id));
        let brief: Vec<_> = all.iter().map(|s| (s.name.as_str(), s.parent.as_deref(), s.current, s.memory, s.quiesced)).collect();
        assert_eq!(
            brief,
            [
                ("a/b", None, false, Some(true), Some(true)),
                ("x", Some("snapshot-1"), false, Some(false), Some(false)),
                ("x", Some("snapshot-1"), true, None, None)
            ]
        );
        assert_eq!((all[0].created_at.as_str(), all[0].power_state.as_str()), ("2026-01-02T02:04:05.000Z", "poweredOn"));
        assert!(of(wire::parse("<o/>").unwrap().root_element()).is_empty());
    }
}
