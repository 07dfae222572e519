//! Switching a VM.
//!
//! Owns: which call does what, and that its end is waited for. Never: switches because a job wants to: people ask for it.
//! A crash here leaves a task that the server ends by itself.
//! Source: vSphere Web Services API, PowerOnVM_Task, ShutdownGuest, PowerOffVM_Task, ResetVM_Task.

use shared::options::Action;

use super::client::{CALL, Client, Error};
use super::collect;
use super::snapshot::finished;
use super::wire::MoRef;

/// Switches a VM and waits until the server has done it. A guest is only asked to shut down.
pub async fn switch(client: &Client, vm: &str, action: Action) -> Result<(), Error> {
    let this = MoRef::new("VirtualMachine", vm);
    let method = match action {
        Action::Start => "PowerOnVM_Task",
        Action::Shutdown => "ShutdownGuest",
        Action::Stop => "PowerOffVM_Task",
        Action::Reset => "ResetVM_Task",
    };
    let session = client.session().await?;
    let answer = client.call(&session, method, &this, "", CALL).await?;
    if action == Action::Shutdown { Ok(()) } else { finished(client, &collect::returned(&answer, method)?).await }
}
