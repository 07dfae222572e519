//! The agent: stands beside the hypervisor; streams, converts, proves and publishes disks.
//!
//! ```text
//! session ─► worker ─► pipeline ─► formats        sources: where VMs come from
//!    held: what runs and what must still be said   journal, ledger: what a crash leaves behind
//! ```
//! Owns: the wiring, the roots and connections of this host. Imports run only rightwards: session → worker → pipeline → formats.
//! Never: decides about a job (the controller's queue does), reads a path but through the vault.
//! A crash here costs one checkpoint of each running job.

mod browse;
pub mod config;
mod console;
pub mod convert;
mod deploy;
mod digests;
mod egress;
mod exec;
pub mod formats;
mod guest;
mod held;
mod hypervisors;
mod identity;
mod inspect;
pub mod journal;
mod ledger;
pub mod pipeline;
mod points;
mod proof;
mod pull;
mod session;
mod snapshots;
pub mod sources;
mod touched;
mod transfer;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proto::v1::{self, agent_message};
use sha2::{Digest as _, Sha256};
use shared::error::Code;
use shared::manifest::SigningKey;
use shared::vault::{Root, Vault};
use shared::vm::Vm;
use tokio::sync::{Semaphore, mpsc, watch};

use crate::config::Config;
pub use crate::identity::Error;
use crate::identity::{Home, Identity};
use crate::sources::Source;
use crate::sources::libvirt::{self, Libvirt};
use crate::sources::local::Local;

/// What the engine writes, as the API spells it.
pub const OUTPUT_FORMATS: &[&str] = &["ova", "ovf", "vmdk", "qcow2", "raw", "vhdx", "vhd", "vdi"];

/// The controller's root of uploads.
const UPLOADS: &str = "uploads";

/// Whether a source lies at the controller and has to be fetched.
fn is_upload(source: &str) -> bool {
    source.split('/').next() == Some(UPLOADS)
}

/// Everything that session and workers share.
struct Agent {
    config: Config,
    home: Home,
    signing: SigningKey,
    /// New with every process.
    instance: String,
    vault: Vault,
    ledger: ledger::Ledger,
    table: held::Table,
    /// The connections of this host's own settings.
    own: Vec<v1::Connection>,
    /// An inventory has changed, by an import or at a hypervisor: the session is to tell it.
    catalogue: tokio::sync::Notify,
    hypervisors: hypervisors::Hypervisors,
    /// Held by whoever undoes what earlier attempts have left.
    reaping: Mutex<()>,
    undoing: touched::Undoing,
    freezing: touched::Freezing,
    needed: points::Needed,
    /// Connections by name: those of this host's settings and those that people made by REST.
    connections: Mutex<BTreeMap<String, v1::Connection>>,
    /// A digest of the inventory as it was sent last, to send only what is another one.
    sent: Mutex<BTreeMap<String, [u8; 32]>>,
    /// Looks at one connection come one after another: an older one must not be told behind a newer.
    looking: Mutex<BTreeMap<String, Arc<Mutex<()>>>>,
    last_heard: Mutex<Instant>,
    /// As whom bytes are sent and fetched; none before the first session.
    identity: Mutex<Option<Arc<Identity>>>,
    /// Transfers that may run at a time.
    transfers: Arc<Semaphore>,
    /// Consoles that may be open at a time.
    consoles: Arc<Semaphore>,
    /// Looks into guests that may run at a time.
    looks: Semaphore,
    /// For threads of workers that have to dial.
    runtime: tokio::runtime::Handle,
    /// Questions of this session that take long, by number; set to true they are given up.
    asked: Mutex<BTreeMap<u64, Arc<AtomicBool>>>,
}

impl Agent {
    fn open(config: Config) -> Result<Self, Error> {
        let home = Home::open(&config)?;
        let mut vault = Vault::default();
        vault.add(Root::open("exports", &config.exports_dir, true)?);
        let mut own = BTreeMap::new();
        if let Some(local) = &config.local_root {
            let root = Root::open("vms", local, false)?;
            let connection =
                v1::Connection { name: "local".to_owned(), kind: "local".to_owned(), path: root.path.display().to_string(), account: None };
            own.insert(connection.name.clone(), connection);
            vault.add(root);
        }
        let images = Root::open(config::IMAGES, &config.images_dir, true)?;
        let path = images.path.display().to_string();
        let connection = v1::Connection { name: config.images_connection.clone(), kind: "local".to_owned(), path, account: None };
        own.insert(connection.name.clone(), connection);
        vault.add(images);
        if config.roots.contains_key(UPLOADS) {
            let message = format!("no root of an agent may be called {UPLOADS:?}: that is the controller's");
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, message).into());
        }
        for (name, path) in &config.roots {
            vault.add(Root::open(name, path, false)?);
        }
        home.dir.create_dir_all("jobs")?;
        let ledger = ledger::Ledger::new(home.dir.open_dir("jobs")?);
        Ok(Self {
            signing: identity::signing_key(&home.dir)?,
            instance: shared::ids::random_hex::<8>(),
            table: held::Table::default(),
            own: own.values().cloned().collect(),
            catalogue: tokio::sync::Notify::new(),
            hypervisors: hypervisors::Hypervisors::default(),
            reaping: Mutex::default(),
            undoing: touched::Undoing::default(),
            freezing: touched::Freezing::default(),
            needed: points::Needed::default(),
            connections: Mutex::new(own),
            sent: Mutex::default(),
            looking: Mutex::default(),
            last_heard: Mutex::new(Instant::now()),
            identity: Mutex::default(),
            transfers: Arc::new(Semaphore::new(transfer::AT_ONCE)),
            consoles: Arc::new(Semaphore::new(console::AT_ONCE)),
            looks: Semaphore::new(inspect::AT_ONCE),
            runtime: tokio::runtime::Handle::current(),
            asked: Mutex::default(),
            vault,
            ledger,
            home,
            config,
        })
    }

    /// The controller answered something.
    fn heard(&self) {
        *self.last_heard.lock().unwrap_or_else(|e| e.into_inner()) = Instant::now();
    }

    /// Bytes go by this identity from now on.
    fn go_by(&self, identity: Arc<Identity>) {
        *self.identity.lock().unwrap_or_else(|e| e.into_inner()) = Some(identity);
    }

    /// A connection of its own for bytes, so that they never hold a heartbeat up.
    async fn dial(&self) -> Result<tonic::transport::Channel, Error> {
        let identity = self.identity.lock().unwrap_or_else(|e| e.into_inner()).clone();
        match identity {
            Some(identity) => identity.dial(&self.config).await,
            None => Err(Error::Away("there was no session yet".to_owned())),
        }
    }

    /// For how long it has not.
    fn silence(&self) -> Duration {
        self.last_heard.lock().unwrap_or_else(|e| e.into_inner()).elapsed()
    }

    /// The connections of this host's own settings.
    fn own_connections(&self) -> Vec<v1::Connection> {
        self.own.clone()
    }

    /// The connections of a kind.
    pub fn serves(&self, kind: &str) -> Vec<v1::Connection> {
        let connections = self.connections.lock().unwrap_or_else(|e| e.into_inner());
        connections.values().filter(|connection| connection.kind == kind).cloned().collect()
    }

    /// Serves the connections that people made by REST beside its own.
    fn serve(&self, more: Vec<v1::Connection>) {
        let own = self.own_connections();
        let mut connections = self.connections.lock().unwrap_or_else(|e| e.into_inner());
        *connections = more.into_iter().chain(own).map(|connection| (connection.name.clone(), connection)).collect();
    }

    /// A connection that the controller is about to make or to move: the next Welcome says whether it stands.
    fn remember(&self, connection: v1::Connection) {
        let own = self.own_connections();
        let mut connections = self.connections.lock().unwrap_or_else(|e| e.into_inner());
        if own.iter().all(|own| own.name != connection.name) {
            connections.insert(connection.name.clone(), connection);
        }
    }

    /// Begins a question that may take long; the flag says when nobody waits for it any more.
    fn begin_question(&self, id: u64) -> Arc<AtomicBool> {
        let stop = Arc::new(AtomicBool::new(false));
        self.asked.lock().unwrap_or_else(|e| e.into_inner()).insert(id, stop.clone());
        stop
    }

    /// Forgets a question that was answered. One of the same number is another where a new session asked it meanwhile, and stays.
    fn end_question(&self, id: u64, stop: &Arc<AtomicBool>) {
        let mut asked = self.asked.lock().unwrap_or_else(|e| e.into_inner());
        if asked.get(&id).is_some_and(|current| Arc::ptr_eq(current, stop)) {
            asked.remove(&id);
        }
    }

    /// Gives a question up.
    fn forget_question(&self, id: u64) {
        if let Some(stop) = self.asked.lock().unwrap_or_else(|e| e.into_inner()).remove(&id) {
            stop.store(true, Ordering::Relaxed);
        }
    }

    /// Gives all of them up: their session is over.
    fn forget_questions(&self) {
        for stop in std::mem::take(&mut *self.asked.lock().unwrap_or_else(|e| e.into_inner())).values() {
            stop.store(true, Ordering::Relaxed);
        }
    }

    /// Opens a connection.
    fn source(&self, connection: &v1::Connection) -> Result<Arc<dyn Source>, sources::Error> {
        match connection.kind.as_str() {
            "local" => {}
            hypervisors::VSPHERE => return hypervisors::source(self, connection),
            hypervisors::LIBVIRT => return Ok(Arc::new(self.libvirt(connection)?)),
            kind => {
                let message = format!("provider {kind:?} is not built yet; `local`, `libvirt` and `vsphere` are");
                return Err(sources::Error::fatal(Code::NotBuilt, message));
            }
        }
        let place = self.vault.locate(&connection.path).map_err(|e| sources::Error::fatal(Code::OutsideRoots, e.to_string()))?;
        let dir = match place.below.as_os_str().is_empty() {
            true => place.root.dir().try_clone(),
            false => place.root.dir().open_dir(&place.below),
        };
        let dir = dir.map_err(|e| {
            sources::Error::fatal(Code::Unprocessable, format!("{} is not a folder that can be read: {e}", connection.path))
        })?;
        Ok(Arc::new(Local::new(dir)))
    }

    /// The libvirt of a URI.
    fn libvirt(&self, connection: &v1::Connection) -> Result<Libvirt, sources::Error> {
        let failed = |e: std::io::Error| sources::Error::fatal(Code::Internal, format!("the agent's own folder: {e}"));
        let notes = self.home.dir.open_dir("jobs").map_err(failed)?;
        let folders = libvirt::Folders { qemu: self.config.libvirt_dir.clone(), notes, notes_path: self.config.data_dir.join("jobs") };
        // Others may have restore points of the same domains.
        let owner = blake3::hash(format!("{}\n{}", self.signing.public_hex(), connection.name).as_bytes());
        Libvirt::new(&connection.path, &self.vault, folders, &owner.to_hex()[..8])
    }

    /// Sends the inventory of one connection, or of all; unless `always`, only where it changed. In the background.
    fn scan(self: &Arc<Self>, tell: &mpsc::Sender<v1::AgentMessage>, only: Option<String>, always: bool) {
        let (agent, tell) = (self.clone(), tell.clone());
        tokio::task::spawn_blocking(move || agent.scan_now(&tell, only.as_deref(), always));
    }

    fn scan_now(&self, tell: &mpsc::Sender<v1::AgentMessage>, only: Option<&str>, always: bool) {
        let connections = self.connections.lock().unwrap_or_else(|e| e.into_inner()).clone();
        // A hypervisor says itself when something changes.
        let is_due = |connection: &&v1::Connection| match only {
            Some(name) => name == connection.name,
            None => always || connection.kind == "local",
        };
        for connection in connections.values().filter(is_due) {
            let turn = self.looking.lock().unwrap_or_else(|e| e.into_inner()).entry(connection.name.clone()).or_default().clone();
            let _turn = turn.lock().unwrap_or_else(|e| e.into_inner());
            let (vms, error) = match self.source(connection).and_then(|source| source.inventory()) {
                Ok(vms) => (vms, String::new()),
                Err(e) => (Vec::<Vm>::new(), e.message),
            };
            let vms_json = serde_json::to_string(&vms).unwrap_or_default();
            let signature: [u8; 32] = Sha256::new().chain_update(&error).chain_update([0]).chain_update(&vms_json).finalize().into();
            let mut sent = self.sent.lock().unwrap_or_else(|e| e.into_inner());
            if !always && sent.get(&connection.name) == Some(&signature) {
                continue;
            }
            tracing::debug!(connection = connection.name, vms = vms.len(), bytes = vms_json.len(), "an inventory is told");
            let inventory = v1::Inventory { connection: connection.name.clone(), vms_json, error };
            if tell.blocking_send(session::message(agent_message::Kind::Inventory(inventory))).is_ok() {
                sent.insert(connection.name.clone(), signature);
            }
        }
    }

    /// Sends what has become of some VMs of a connection. In the background.
    fn scan_some(self: &Arc<Self>, tell: &mpsc::Sender<v1::AgentMessage>, name: String, vm_ids: BTreeSet<String>) {
        let (agent, tell) = (self.clone(), tell.clone());
        tokio::task::spawn_blocking(move || {
            if !agent.scan_some_now(&tell, &name, &vm_ids) {
                // A look at everything says what is in the way.
                agent.scan_now(&tell, Some(&name), false);
            }
        });
    }

    fn scan_some_now(&self, tell: &mpsc::Sender<v1::AgentMessage>, name: &str, vm_ids: &BTreeSet<String>) -> bool {
        let Some(connection) = self.connections.lock().unwrap_or_else(|e| e.into_inner()).get(name).cloned() else { return true };
        let turn = self.looking.lock().unwrap_or_else(|e| e.into_inner()).entry(name.to_owned()).or_default().clone();
        let _turn = turn.lock().unwrap_or_else(|e| e.into_inner());
        let Ok(vms) = self.source(&connection).and_then(|source| source.some(vm_ids)) else { return false };
        let gone = vm_ids.iter().filter(|id| vms.iter().all(|vm| vm.id != **id)).cloned().collect();
        let vms_json = serde_json::to_string(&vms).unwrap_or_default();
        tracing::debug!(connection = name, vms = vms.len(), bytes = vms_json.len(), "changes of an inventory are told");
        // The controller has another inventory now than the one that was sent last as a whole.
        self.sent.lock().unwrap_or_else(|e| e.into_inner()).remove(name);
        let changes = v1::InventoryChanges { connection: name.to_owned(), vms_json, gone };
        // A stream that has closed: the next one begins with everything.
        let _ = tell.blocking_send(session::message(agent_message::Kind::InventoryChanges(changes)));
        true
    }

    fn free_space(&self, path: &str) -> Result<serde_json::Value, sources::Error> {
        let place = self.vault.locate(path).map_err(|e| sources::Error::fatal(Code::OutsideRoots, e.to_string()))?;
        let (free_bytes, total_bytes) =
            place.root.space().map_err(|e| sources::Error { code: Code::BadGateway, message: e.to_string(), retryable: true })?;
        Ok(serde_json::json!({"root": place.root.name, "path": place.named(), "free_bytes": free_bytes, "total_bytes": total_bytes}))
    }
}

/// Runs an agent until `shutdown` becomes true: enrols when it must, then keeps a session.
///
/// # Errors
/// When the data directory is in use, or the controller refuses the join token. A controller that is away is waited for.
pub async fn run(config: Config, shutdown: watch::Receiver<bool>) -> Result<(), Error> {
    let agent = Arc::new(tokio::task::spawn_blocking(move || Agent::open(config)).await.map_err(|e| Error::Key(e.to_string()))??);
    // A guest that was left frozen waits for no controller.
    let waking = agent.clone();
    tokio::task::spawn_blocking(move || touched::wake(&waking));
    let Some(identity) = enrolled(&agent, shutdown.clone()).await? else { return Ok(()) };
    tracing::info!(agent = identity.agent_id, name = agent.config.name, "enrolled");
    session::keep(&agent, identity, shutdown).await;
    Ok(())
}

async fn enrolled(agent: &Agent, mut shutdown: watch::Receiver<bool>) -> Result<Option<identity::Identity>, Error> {
    let mut pause = Duration::from_millis(200);
    loop {
        if let Some(identity) = agent.home.identity()? {
            return Ok(Some(identity));
        }
        match agent.home.enroll(&agent.config).await {
            Ok(identity) => return Ok(Some(identity)),
            // A token file is written anew by whoever provides it: a used one is no last word.
            Err(e @ (Error::Away(_) | Error::Refused(_))) if matches!(e, Error::Away(_)) || agent.config.token.is_none() => {
                tracing::warn!(error = %e, "not enrolled yet");
            }
            Err(e) => return Err(e),
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_secs(5)),
            _ = shutdown.wait_for(|stop| *stop) => return Ok(None),
        }
    }
}
