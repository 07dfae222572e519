//! Guests that an agent which has died left with frozen file systems.
//!
//! Owns: that they are thawed as soon as an agent is there again, whether or not its controller is. Never: touches what a running attempt has
//! frozen, or a VM that is stopped (it goes on first). A crash here costs nothing: what is noted stays noted, and the reaper knows it, too.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1;

use super::{Touched, noted, write};
use crate::Agent;

/// How long this tries before it leaves the rest to the reaper, and between two tries.
const PATIENCE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_secs(1);

/// Thaws what an earlier run of this agent has left frozen. For a thread that may wait.
pub fn wake(agent: &Arc<Agent>) {
    let end = Instant::now() + PATIENCE;
    while left(agent).into_iter().filter(|job| !is_awake(agent, job)).count() > 0 && Instant::now() < end {
        std::thread::sleep(PAUSE);
    }
}

/// Jobs by whose notes a guest is frozen.
fn left(agent: &Agent) -> Vec<String> {
    let names = agent.ledger.dir().entries().into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let jobs = names.filter_map(|name| name.strip_suffix(".touched").map(str::to_owned));
    jobs.filter(|job| noted(agent, job).ok().flatten().is_some_and(|noted| noted.quiesced_at.is_some() && noted.halted.is_none())).collect()
}

/// False where the same may work a moment later.
fn is_awake(agent: &Agent, job: &str) -> bool {
    // An attempt that runs looks after its guest itself, and one that begins has undone what was noted.
    let Some(_turn) = agent.undoing.take(job, || agent.table.get(job).is_none_or(|held| held.is_over())) else { return true };
    let Ok(Some(noted)) = noted(agent, job) else { return true };
    if noted.quiesced_at.is_none() {
        return true;
    }
    let (name, kind, path) = noted.connection.clone();
    let frozen =
        Touched { connection: noted.connection.clone(), vm: noted.vm.clone(), quiesced_at: noted.quiesced_at, ..Touched::default() };
    let undone = agent.source(&v1::Connection { name, kind, path, account: None }).and_then(|source| source.undo(&frozen));
    match undone {
        Ok(_) => write(agent, job, &Touched { quiesced_at: None, ..noted }).is_ok(),
        Err(e) => {
            if agent.undoing.is_news(job, Some(&e.message)) {
                tracing::warn!(job, vm = noted.vm, error = %e, "a guest that was left frozen is not thawed yet; it is tried again");
            }
            false
        }
    }
}
