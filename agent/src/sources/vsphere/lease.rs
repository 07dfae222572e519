//! An export lease: begun, kept alive as long as somebody reads, ended.
//!
//! ```text
//! ExportVm, ExportSnapshot ─► id noted ─► ready ─► progress, well inside its time-out … ─► complete            anything else: abort
//! ```
//! Owns: the lease's life. Never: does anything with a lease whose id is not noted. A crash here leaves a lease that the ledger names and that
//! ends by its time-out.
//! Source: vSphere Web Services API, HttpNfcLease.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use roxmltree::Node;
use tokio::runtime::Handle;

use super::client::{CALL, Client, Error, Session};
use super::collect::{self, property};
use super::device;
use super::wire::{Fault, MoRef, children, number, text};
use crate::sources::Stopping;

/// How long somebody else's lease is waited for: an orphan's time-out is 5 minutes at real servers.
const TAKEN: Duration = Duration::from_secs(330);
/// How long a server may take to make a lease ready.
const READY: Duration = Duration::from_secs(120);

/// Where a disk of a lease is.
#[derive(Clone)]
pub struct DeviceUrl {
    /// Which device it is, in the server's words.
    pub key: String,
    /// Its URL; the host is `*` where it is the one that was called.
    pub url: String,
    /// SHA-1 of the certificate of a host that was not called yet.
    pub thumbprint: String,
}

/// A lease that is ready.
pub struct Lease {
    reference: MoRef,
    /// Its disks in order.
    pub disks: Vec<DeviceUrl>,
    /// Whom it is from.
    pub client: Arc<Client>,
    /// What its streams run on.
    pub runtime: Handle,
    /// Bytes of all disks that have been passed, and of how many.
    pub passed: AtomicU64,
    total: u64,
    /// Streams that were read to their end.
    whole: AtomicU64,
    is_ended: AtomicBool,
}

impl Lease {
    /// Waits until the lease that `method` of `this` gave is ready. `note` is told its id before anything else is done with it. `total`:
    /// bytes of all its disks. A VM that somebody else holds is waited for, until `stopping`.
    pub async fn begin(
        client: &Arc<Client>,
        runtime: &Handle,
        method: &str,
        this: &MoRef,
        total: u64,
        note: &dyn Fn(&str) -> io::Result<()>,
        stopping: &Stopping,
    ) -> Result<Arc<Self>, Error> {
        let end = Instant::now() + TAKEN;
        let answer = loop {
            match client.within(async |session| client.call(session, method, this, "", CALL).await).await {
                // Somebody has a lease of it, perhaps one of ours whose id a crash has eaten: that ends by its time-out.
                Err(e) if e.is_occupied() && Instant::now() < end && stopping.load(Ordering::Acquire) == 0 => {
                    tokio::time::sleep(Duration::from_secs(1)).await
                }
                answered => break answered?,
            }
        };
        let reference = collect::returned(&answer, method)?;
        note(&reference.value).map_err(|e| Error::Odd(format!("the ledger cannot be written: {e}")))?;
        let (disks, timeout) = match ready(client, &reference).await {
            Ok(ready) => ready,
            Err(e) => {
                // It may be no more.
                let _ = abort(client, &reference.value).await;
                return Err(e);
            }
        };
        let lease = Arc::new(Self {
            reference,
            disks,
            client: client.clone(),
            runtime: runtime.clone(),
            passed: AtomicU64::new(0),
            total: total.max(1),
            whole: AtomicU64::new(0),
            is_ended: AtomicBool::new(false),
        });
        runtime.spawn(keep(Arc::downgrade(&lease), timeout));
        Ok(lease)
    }

    /// A stream was read to its end; with the last one the lease is complete. For threads that may wait.
    pub fn passed_whole(&self) {
        if self.whole.fetch_add(1, Ordering::AcqRel) + 1 < self.disks.len() as u64 {
            return;
        }
        let complete = async |session: &Session| self.client.call(session, "HttpNfcLeaseComplete", &self.reference, "", CALL).await;
        let completed = self.runtime.block_on(self.client.within(complete));
        match completed {
            Ok(_) => self.is_ended.store(true, Ordering::Relaxed),
            Err(e) => tracing::debug!(lease = self.reference.value, error = ?e, "a lease could not be completed"),
        }
    }

    fn percent(&self) -> u64 {
        (self.passed.load(Ordering::Relaxed).saturating_mul(100) / self.total).min(99)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.is_ended.load(Ordering::Relaxed) {
            return;
        }
        let (client, reference) = (self.client.clone(), self.reference.clone());
        // One that cannot be ended now is in the ledger, and ends by its time-out.
        self.runtime.spawn(async move {
            let Ok(session) = client.session().await else { return };
            if let Err(e) = client.call(&session, "HttpNfcLeaseAbort", &reference, "", CALL).await {
                tracing::debug!(lease = reference.value, error = ?e, "a lease could not be aborted");
            }
        });
    }
}

/// Aborts a lease by its id, where it still is.
pub async fn abort(client: &Client, id: &str) -> Result<(), Error> {
    let reference = MoRef::new("HttpNfcLease", id);
    match client.within(async |session| client.call(session, "HttpNfcLeaseAbort", &reference, "", CALL).await.map(drop)).await {
        Err(Error::Fault(Fault::ManagedObjectNotFound)) => Ok(()),
        // Ended already, by its time-out or by whoever held it.
        Err(Error::Fault(Fault::Other(kind, _))) if kind == "InvalidState" => Ok(()),
        other => other,
    }
}

/// Tells the server that somebody still reads.
async fn keep(lease: std::sync::Weak<Lease>, timeout: Duration) {
    let pause = (timeout / 4).clamp(Duration::from_secs(1), Duration::from_secs(30));
    loop {
        tokio::time::sleep(pause).await;
        let Some(lease) = lease.upgrade() else { return };
        let Ok(session) = lease.client.session().await else { continue };
        let body = format!("<percent>{}</percent>", lease.percent());
        match lease.client.call(&session, "HttpNfcLeaseProgress", &lease.reference, &body, CALL).await {
            Err(Error::Fault(Fault::NotAuthenticated)) => lease.client.forget(&session).await,
            Err(e) => tracing::debug!(lease = lease.reference.value, error = ?e, "a lease could not be kept alive"),
            Ok(_) => {}
        }
    }
}

type Ready = (Vec<DeviceUrl>, Duration);

async fn ready(client: &Client, lease: &MoRef) -> Result<Ready, Error> {
    let end = Instant::now() + READY;
    loop {
        match client.within(async |session| look(client, session, lease).await).await {
            Ok((state, Some(ready), _)) if state == "ready" => return Ok(ready),
            Ok((state, _, error)) if state == "error" => return Err(Error::Odd(format!("the lease failed: {error}"))),
            Ok((state, ..)) if Instant::now() > end => {
                return Err(Error::Unreachable(format!("the lease is {state} after {} s", READY.as_secs())));
            }
            Err(Error::Fault(Fault::ManagedObjectNotFound)) => return Err(Error::Odd("the lease ended before it was ready".to_owned())),
            Err(e) if !e.is_passing() || Instant::now() > end => return Err(e),
            _ => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// The lease's state, what it gives, and what is wrong with it.
async fn look(client: &Client, session: &Session, lease: &MoRef) -> Result<(String, Option<Ready>, String), Error> {
    let (mut state, mut found, mut error) = (String::new(), None, String::new());
    collect::one(client, session, lease, &["state", "info", "error"], |_, object| {
        state = collect::property_text(object, "state").to_owned();
        error = property(object, "error").map(|fault| text(fault, "localizedMessage").to_owned()).unwrap_or_default();
        found = property(object, "info").map(|info| {
            let is_disk = |device: &Node| match text(*device, "disk").trim() {
                "" => device::may_be_disk(text(*device, "key")),
                said => matches!(said, "true" | "1"),
            };
            let urls = children(info, "deviceUrl").filter(is_disk).map(|device| {
                let told = |name: &str| text(device, name).to_owned();
                DeviceUrl { key: told("key"), url: told("url"), thumbprint: told("sslThumbprint") }
            });
            (urls.collect(), Duration::from_secs(number(info, "leaseTimeout").unwrap_or(300)))
        });
    })
    .await?;
    Ok((state, found, error))
}
