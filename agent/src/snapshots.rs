//! Snapshots of VMs, as people ask for them.
//!
//! ```text
//! the VM is nobody's ─► its snapshots ─► which one, and is it a job's? ─► the act at the source ─► its inventory is told ─► the answer
//! ```
//! Owns: that no act meets a job that has the VM frozen, that a job's own snapshot stays its own, and that the inventory is right before the
//! answer is. Never: retries an act: the next look says what has become of it. A crash here leaves what the hypervisor makes of the order.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use proto::v1;
use serde_json::{Value, json};
use shared::error::Code;
use shared::snapshots::{self, Snapshot, Wish};
use tokio::sync::mpsc;

use crate::sources::{Error, Waiting, named};
use crate::{Agent, touched};

/// How long an act may take, so that its answer comes before the controller gives up: taking one writes the memory while the guest stands
/// still, removing one writes what it held.
const ACT: Duration = Duration::from_secs(840);

type Tell = mpsc::Sender<v1::AgentMessage>;

fn told<T: serde::Serialize>(value: &T) -> Result<Value, Error> {
    serde_json::to_value(value).map_err(|e| Error::fatal(Code::Internal, e.to_string()))
}

/// All of a VM.
pub fn list(agent: &Agent, asked: &v1::Snapshots) -> Result<Value, Error> {
    told(&agent.source(named(asked.connection.as_ref())?)?.snapshots(&asked.vm_id)?)
}

fn waiting(stop: &Arc<AtomicBool>) -> Waiting {
    Waiting { until: Instant::now() + ACT, given_up: stop.clone() }
}

/// Takes one; answers it. Set, `stop` keeps it from beginning.
pub fn take(agent: &Agent, tell: &Tell, wanted: &v1::TakeSnapshot, stop: &Arc<AtomicBool>) -> Result<Value, Error> {
    let (connection, waiting) = (named(wanted.connection.as_ref())?, waiting(stop));
    let (name, description) = (wanted.name.clone(), wanted.description.clone());
    let wish = Wish { name, description, memory: wanted.memory, quiesce: wanted.quiesce };
    if let Some(flaw) = wish.flaw() {
        return Err(Error::fatal(Code::BadRequest, flaw));
    }
    let source = agent.source(connection)?;
    let is_it = |snapshot: &&Snapshot| snapshot.name == wish.name;
    let made = act(agent, tell, connection, &wanted.vm_id, &waiting, || {
        if source.snapshots(&wanted.vm_id)?.iter().any(|snapshot| is_it(&snapshot)) {
            let message = format!("the VM has a snapshot {:?} already; choose another name, or remove that one first", wish.name);
            return Err(Error::fatal(Code::Conflict, message));
        }
        source.take_snapshot(&wanted.vm_id, &wish, &waiting)?;
        source.snapshots(&wanted.vm_id)
    })?;
    let made = made.iter().find(is_it);
    told(made.ok_or_else(|| Error::fatal(Code::BadGateway, "the snapshot was taken and is not there; somebody may have removed it"))?)
}

/// Removes one, where asked with those above it. Set, `stop` keeps it from beginning. Where a name is a job's of which the question does not say
/// that it has ended, nothing is removed, and the answer names it: the controller knows what has become of it.
pub fn remove(agent: &Agent, tell: &Tell, wanted: &v1::RemoveSnapshot, stop: &Arc<AtomicBool>) -> Result<Value, Error> {
    let (connection, waiting) = (named(wanted.connection.as_ref())?, waiting(stop));
    let source = agent.source(connection)?;
    act(agent, tell, connection, &wanted.vm_id, &waiting, || {
        let all = source.snapshots(&wanted.vm_id)?;
        let found = found(&all, &wanted.snapshot)?;
        let ids = if wanted.children { snapshots::with_those_above(&all, &found.id) } else { BTreeSet::from([found.id.clone()]) };
        is_nobodys(agent, connection, &wanted.vm_id, &all, &ids)?;
        let going = all.iter().filter(|snapshot| ids.contains(&snapshot.id));
        let jobs: BTreeSet<&str> = going.filter_map(|snapshot| snapshots::job_of(&snapshot.name)).collect();
        let unknown: Vec<&str> = jobs.into_iter().filter(|job| !wanted.ended.iter().any(|ended| ended == job)).collect();
        if !unknown.is_empty() {
            return Ok(json!({ "jobs": unknown }));
        }
        source.remove_snapshot(&wanted.vm_id, found, &ids, &waiting)?;
        let still: Vec<String> =
            source.snapshots(&wanted.vm_id)?.into_iter().map(|snapshot| snapshot.id).filter(|id| ids.contains(id)).collect();
        match still.first() {
            None => Ok(json!({})),
            Some(id) => {
                Err(Error::fatal(Code::BadGateway, format!("the hypervisor says that it is done, and the snapshot {id} is still there")))
            }
        }
    })
}

fn found<'a>(all: &'a [Snapshot], wanted: &str) -> Result<&'a Snapshot, Error> {
    match snapshots::find(all, wanted) {
        Ok(Some(found)) => Ok(found),
        Ok(None) => {
            let shown: String = wanted.chars().take(100).collect();
            Err(Error::fatal(Code::NotFound, format!("the VM has no snapshot {shown:?}")))
        }
        Err(ids) => Err(Error::fatal(
            Code::Ambiguous,
            format!("several snapshots are called that, by name or by id: name one by its id, or another one first: {}", ids.join(", ")),
        )),
    }
}

/// Refuses what a job has made and will remove.
fn is_nobodys(agent: &Agent, connection: &v1::Connection, vm: &str, all: &[Snapshot], ids: &BTreeSet<String>) -> Result<(), Error> {
    let names: BTreeSet<&str> = all.iter().filter(|snapshot| ids.contains(&snapshot.id)).map(|snapshot| snapshot.name.as_str()).collect();
    let noted = touched::maker(agent, &connection.name, vm, &names);
    match noted.map_err(|e| Error::fatal(Code::Internal, format!("the ledger cannot be read: {e}")))? {
        None => Ok(()),
        Some((job, name)) => Err(Error::fatal(Code::Conflict, format!("the snapshot {name} is of {job}, which removes it by itself"))),
    }
}

/// Does something about a VM's snapshots while no job has it frozen, and tells its inventory.
fn act<T>(
    agent: &Agent,
    tell: &Tell,
    connection: &v1::Connection,
    vm: &str,
    waiting: &Waiting,
    act: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    waiting.check()?;
    let taken = agent.freezing.try_take(&touched::frozen_name(&connection.name, vm));
    let _taken = taken.map_err(|holder| {
        let who = if holder.starts_with("job-") { holder } else { "another request".to_owned() };
        Error::fatal(Code::Conflict, format!("{who} is at this VM's snapshots or reads its disks; try it again when that has ended"))
    })?;
    // Taken inside an overlay it would go with that.
    let noted = touched::has_overlays(agent, &connection.name, vm);
    if let Some(job) = noted.map_err(|e| Error::fatal(Code::Internal, format!("the ledger cannot be read: {e}")))? {
        let message = format!("what the VM wrote while {job} read it is not back in its disks yet; that happens by itself while it runs");
        return Err(Error::fatal(Code::Conflict, message));
    }
    let done = act();
    // Whatever has become of it: a failure may have changed something, too.
    if !agent.scan_some_now(tell, &connection.name, &BTreeSet::from([vm.to_owned()])) {
        tracing::debug!(connection = connection.name, vm, "a VM could not be looked at after an act; the next look shows it");
    }
    done
}
