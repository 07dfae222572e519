//! Uploads on their way to the agent that needs one.
//!
//! Owns: who may have which. Never: opens anything but what the assignment of the caller names, and that in the root `uploads`.
//! A crash here costs one call; the agent goes on where its part ends.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use shared::error::Code;
use shared::folder;
use shared::job::Status;
use shared::vault::Vault;

use crate::fleet::transfer::{self, Shelved};
use crate::http::reply::Error;
use crate::jobs;
use crate::store::Store;

/// The uploads of this controller, as agents see them.
pub struct Shelf {
    /// The rows of jobs and uploads.
    pub store: Store,
    /// The controller's roots.
    pub vault: Arc<Vault>,
}

impl transfer::Shelf for Shelf {
    fn open<'a>(
        &'a self,
        agent: &'a str,
        job: &'a str,
        epoch: u64,
        path: &'a str,
    ) -> Pin<Box<dyn Future<Output = Result<Shelved, Error>> + Send + 'a>> {
        Box::pin(async move {
            let refused = || Error::new(Code::Forbidden, "no assignment of this agent names this upload");
            if job.contains('\0') {
                return Err(refused());
            }
            let job = jobs::store::load(&self.store, job).await?.ok_or_else(refused)?;
            let is_theirs = job.state.agent.as_deref() == Some(agent) && job.state.epoch == epoch && job.state.status == Status::Running;
            let place = |path: &str| self.vault.locate(path).map(|place| place.named()).ok();
            if !is_theirs || place(path).is_none() || place(path) != place(&job.source) {
                return Err(refused());
            }
            let named = place(path).unwrap_or_default();
            let id = named.split('/').nth(1).unwrap_or_default();
            let upload = super::store::load(&self.store, id).await?.ok_or_else(refused)?;
            if upload.status != super::store::COMPLETE {
                return Err(Error::not_found("this upload is not complete"));
            }
            let sha256 = upload.sha256.unwrap_or_default();
            let (vault, path) = (self.vault.clone(), path.to_owned());
            let opened = tokio::task::spawn_blocking(move || {
                let file = vault.open_file(&path).map_err(|e| Error::new(e.code(), e.to_string()))?;
                let metadata = file.metadata().map_err(Error::internal)?;
                Ok(Shelved { size: metadata.len(), version: folder::version(&metadata), sha256, file })
            });
            opened.await.map_err(Error::internal)?
        })
    }
}
