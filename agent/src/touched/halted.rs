//! A VM that a job has stopped, as it is noted: a warm migration, or any job that was asked to (`power_off`).
//!
//! ```text
//! noted ─► stopped ─► last pass or whole copy ─► committed ─► published ─► the new VM is made ─► the old one is off ─► forgotten
//!   └──────── anything fails: it goes on ─┴──── only where the new VM does not stand, and will not be made
//! ```
//! Owns: whether the old VM may go on. Never: stops one. A crash here costs nothing: what is noted stays noted.

use std::io;

use proto::v1;
use serde::{Deserialize, Serialize};

use super::{Touched, noted, write};
use crate::{Agent, deploy};

/// A VM that is stopped for a job. It goes on when the job has ended, unless that has made a new one in its place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Halted {
    /// Name, kind and path of the connection that the new VM is made at.
    pub target: (String, String, String),
    /// The new VM's UUID; empty: none is made.
    pub uuid: String,
    /// All that it held has arrived and the copy is being published: the new VM will be made, so that the old one waits for it.
    pub committed: bool,
    /// When its guest was asked to shut down, milliseconds since 1970; none once it was seen to be off.
    pub asked_at: Option<i64>,
}

impl Halted {
    /// Whether the VM stays stopped: its successor is there, or will be.
    pub(super) fn stays(&self) -> Result<bool, crate::sources::Error> {
        let (name, kind, path) = self.target.clone();
        if self.uuid.is_empty() {
            return Ok(false);
        }
        Ok(self.committed || deploy::stands(&v1::Connection { name, kind, path, account: None }, &self.uuid)?)
    }
}

/// Changes what is noted of a VM that a job stops; durable when it returns.
pub fn note_halted(agent: &Agent, job: &str, halted: Option<Halted>) -> io::Result<()> {
    let _turn = agent.undoing.wait(job);
    let Some(noted) = noted(agent, job)? else {
        return if halted.is_none() { Ok(()) } else { Err(io::Error::other("nothing is noted of the VM that is to be stopped")) };
    };
    // From now on the order to stop may be on its way.
    let noted_ms = shared::clock::now().timestamp_millis();
    write(agent, job, &Touched { halted, noted_ms, ..noted })
}

/// What is noted of a VM that is stopped for the job.
pub fn halted(agent: &Agent, job: &str) -> io::Result<Option<Halted>> {
    Ok(noted(agent, job)?.and_then(|noted| noted.halted))
}

/// The new VM will not be made by the job: the old one may go on, unless the new one stands.
pub fn let_go(agent: &Agent, job: &str) {
    let _turn = agent.undoing.wait(job);
    let freed = noted(agent, job).and_then(|found| match found {
        Some(Touched { halted: Some(halted), .. }) if !halted.committed => Ok(()),
        Some(touched) => match touched.halted.clone() {
            Some(halted) => write(agent, job, &Touched { halted: Some(Halted { committed: false, ..halted }), ..touched }),
            None => Ok(()),
        },
        None => Ok(()),
    });
    if let Err(e) = freed {
        tracing::error!(job, error = %e, "that a stopped VM may go on could not be noted");
    }
}
