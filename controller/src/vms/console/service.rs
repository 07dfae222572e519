//! Opening a console, and looking after it until it has ended.
//!
//! Owns: which kinds have one, the audit's two entries, and that whoever may no longer look is put out within seconds, also where their
//! connection is stuck. Never: touches a byte of it. A crash here costs the outcome of one entry in the audit.

use std::time::{Duration, Instant};

use actix_web::web;
use shared::error::Code;

use crate::access::Caller;
use crate::app::App;
use crate::fleet::console::{self, Ended, Line, Remote, Side};
use crate::http::reply::Error;
use crate::providers;
use crate::store::entities::connections;
use crate::system::audit::{self, Act};
use crate::vms::service::Found;

/// How often it is asked whether a viewer still may.
const TICK: Duration = Duration::from_secs(5);

/// Refuses kinds whose VMs have no console here.
///
/// # Errors
/// 422 that says which kind has one.
pub fn is_offered(kind: &str) -> Result<(), Error> {
    match kind {
        "libvirt" => Ok(()),
        "local" => {
            Err(Error::new(Code::Unprocessable, "a console is for VMs of a hypervisor; these are disk images: deploy one to libvirt"))
        }
        kind => Err(Error::new(Code::NotBuilt, format!("consoles of `{kind}` are not built yet; those of `libvirt` are"))),
    }
}

/// Opens the console of a VM. From then on it is looked after.
///
/// # Errors
/// As [`console::open`]; 503 where it cannot be written into the audit.
pub async fn open(app: &web::Data<App>, caller: Caller, found: Found) -> Result<Remote, Error> {
    let Found { connection, vm } = found;
    let asked = providers::service::told(&connection);
    let subject = format!("{}:{}", connection.name, vm.id);
    let act = audit::begin(&app.store, &caller.name, "vm.console", &subject).await?;
    match console::open(&app.fleet, &connection.agent_id, asked, &vm.id).await {
        Ok(remote) => {
            tracing::info!(user = caller.name, vm = subject, "a console is open");
            actix_web::rt::spawn(look_after(app.clone(), caller, connection, subject, remote.line.clone(), act));
            Ok(remote)
        }
        Err(e) => {
            act.finish(&Err::<(), _>(e.clone())).await;
            Err(e)
        }
    }
}

async fn look_after(
    app: web::Data<App>,
    caller: Caller,
    connection: connections::Model,
    subject: String,
    line: std::sync::Arc<Line>,
    act: Act,
) {
    let began = Instant::now();
    let mut tick = tokio::time::interval(TICK);
    let ended = loop {
        tokio::select! {
            ended = line.ended() => break ended,
            _ = tick.tick() => {
                if let Some(why) = is_over(&app, &caller, &connection).await {
                    line.end(Ended::new(Side::Refused, why));
                }
            }
        }
    };
    let (shown, typed) = line.moved();
    let seconds = began.elapsed().as_secs();
    tracing::info!(user = caller.name, vm = subject, shown, typed, seconds, why = ended.why, "a console has ended");
    act.complete(format!("ok: {shown} bytes shown, {typed} typed, {seconds} s; {}", ended.why)).await;
}

/// Why a viewer must go, where they must. A database that is away ends nobody.
async fn is_over(app: &App, caller: &Caller, connection: &connections::Model) -> Option<&'static str> {
    if !app.access.is_alive(caller).await {
        return Some("the token is no longer valid");
    }
    let is_gone = |e: &Error| matches!(e.code(), Code::NotFound | Code::BadRequest);
    match providers::service::resolve(&app.store, &connection.name).await {
        Ok(now) if now.agent_id == connection.agent_id && now.path == connection.path => {}
        Err(e) if !is_gone(&e) => return None,
        _ => return Some("the connection was removed or moved"),
    }
    let agent = app.fleet.resolve(&connection.agent_id).await;
    agent.is_err_and(|e| e.code() == Code::NotFound).then_some("the agent was removed from the fleet")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_hypervisors_whose_way_is_built_have_a_console() {
        assert!(is_offered("libvirt").is_ok());
        for (kind, code) in [("local", Code::Unprocessable), ("vsphere", Code::NotBuilt), ("proxmox", Code::NotBuilt)] {
            let refused = is_offered(kind).unwrap_err();
            assert!(refused.code() == code && refused.message().contains("libvirt"), "{kind}: {}", refused.message());
        }
    }
}
