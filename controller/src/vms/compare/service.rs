//! Finding two VMs and, where asked, the digests of their disks.
//!
//! Owns: the question to the agents and its limit. Never: reads a disk. A crash here costs one answer.

use std::time::Duration;

use proto::v1;
use proto::v1::browse::Question;
use serde::Deserialize;
use shared::error::Code;

use crate::app::App;
use crate::http::reply::Error;
use crate::providers;
use crate::vms::service::{self, Found};

/// How long agents may read disks that have no manifest. A caller who goes away ends it sooner.
pub const READING: u32 = 300;

/// The root digest of one disk.
#[derive(Clone, Debug, Deserialize)]
pub struct Digest {
    /// Bytes of the logical disk.
    pub capacity: u64,
    /// BLAKE3 root, hex.
    pub root: String,
    /// `manifest` or `read`.
    pub how: String,
}

#[derive(Deserialize)]
struct Digests {
    disks: Vec<Digest>,
}

/// A VM by provider and name.
pub async fn find(app: &App, provider: &str, vm_name: &str) -> Result<Found, Error> {
    let connection = providers::service::resolve(&app.store, provider).await?;
    service::resolve(&app.store, &connection, vm_name).await
}

/// The digests of a VM's disks, from its agent.
pub async fn digests(app: &App, found: &Found) -> Result<Vec<Digest>, Error> {
    if !found.vm.problem.is_empty() {
        let message = format!("the disks of `{}` cannot be read: {}", found.vm.name, found.vm.problem);
        return Err(Error::new(Code::BadImage, message));
    }
    let trusted = app.fleet.agents().await?.into_iter().map(|agent| shared::manifest::fingerprint(&agent.signing_key)).collect();
    let row = &found.connection;
    let question =
        v1::Digests { connection: Some(crate::providers::service::told(row)), vm_id: found.vm.id.clone(), trusted, seconds: READING };
    // Whether it is there at all is known in seconds, and not after the whole time for reading. What it says does not matter.
    if let Err(e) = app.fleet.ask(&row.agent_id, Question::FreeSpace("exports".to_owned())).await
        && matches!(e.code(), Code::BadGateway | Code::Unavailable)
    {
        return Err(e);
    }
    let patience = Duration::from_secs(u64::from(READING) + 10);
    let answer = app.fleet.ask_within(&row.agent_id, Question::Digests(question), patience).await.map_err(|e| match e.code() {
        // An agent of an older build does not know the question.
        Code::BadRequest => Error::new(Code::Unprocessable, format!("the agent of `{}` cannot digest disks: {}", row.name, e.message())),
        _ => e,
    })?;
    let answer: Digests = serde_json::from_value(answer)
        .map_err(|e| Error::new(Code::BadGateway, format!("the agent of `{}` answered oddly: {e}", row.name)))?;
    Ok(answer.disks)
}
