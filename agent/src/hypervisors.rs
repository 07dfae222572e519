//! The hypervisors that this agent has a session with, and who listens to them.
//!
//! ```text
//! Welcome, probe ─► keep ─► listen ─change─► stale ─► the session to the controller looks again and tells
//! ```
//! Owns: one client for each connection of kind `vsphere`, its listener, and that sessions end when nobody needs them.
//! Never: writes a password anywhere. A crash here leaves sessions that end by their idle time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use proto::v1;
use shared::error::Code;
use shared::secret::Secret;

use crate::Agent;
use crate::egress::Trust;
use crate::exec::Next;
use crate::sources::vsphere::budget::Budget;
use crate::sources::vsphere::{Client, Listener, News, Settings, Vsphere};
use crate::sources::{Error, Source};

/// A kind of connections that are served here.
pub const VSPHERE: &str = "vsphere";
/// The other one.
pub const LIBVIRT: &str = "libvirt";
/// Between two tries to listen to a server that does not answer.
const PAUSE: Duration = Duration::from_secs(2);
/// VMs that are looked at one by one.
const MOST: usize = 500;
/// Changes closer together than this are told at once.
const CALM: Duration = Duration::from_secs(1);

/// Clients by connection.
#[derive(Default)]
pub struct Hypervisors {
    /// Turns by host: two connections to one host share them.
    budgets: Mutex<BTreeMap<String, Arc<Budget>>>,
    kept: Mutex<BTreeMap<String, Kept>>,
    listening: Mutex<BTreeSet<String>>,
    /// The process goes: nobody listens any more.
    leaving: AtomicBool,
    /// Connections whose inventory has changed, and what of it.
    stale: Mutex<BTreeMap<String, Stale>>,
}

/// What of an inventory is to be looked at again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stale {
    /// These VMs.
    Vms(BTreeSet<String>),
    /// Everything.
    All,
}

impl Stale {
    /// Both of them. Where so many have changed that a look at everything costs less, it is that.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Vms(mut these), Self::Vms(those)) if these.len() + those.len() <= MOST => {
                these.extend(those);
                Self::Vms(these)
            }
            _ => Self::All,
        }
    }
}

struct Kept {
    client: Arc<Client>,
    connection: v1::Connection,
}

impl Hypervisors {
    /// The client of a connection whose account is known; a new one where its settings are others than before.
    fn client(&self, connection: &v1::Connection, streams: usize) -> Result<Arc<Client>, Error> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(standing) = kept.get(&connection.name).filter(|standing| standing.connection == *connection) {
            return Ok(standing.client.clone());
        }
        let client = Arc::new(client(connection, self.budget(&connection.path, streams))?);
        kept.insert(connection.name.clone(), Kept { client: client.clone(), connection: connection.clone() });
        Ok(client)
    }

    fn budget(&self, host: &str, streams: usize) -> Arc<Budget> {
        let mut budgets = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
        budgets.entry(host.to_ascii_lowercase()).or_insert_with(|| Arc::new(Budget::new(streams))).clone()
    }

    /// What each host gives now, for the heartbeat.
    pub fn hosts(&self) -> Vec<v1::SourceHost> {
        let budgets = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
        let small = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let host = |(host, budget): (&String, &Arc<Budget>)| {
            let (streams, running, withheld) = budget.figures();
            v1::SourceHost { host: host.clone(), streams: small(streams), running: small(running), withheld: small(withheld) }
        };
        budgets.iter().map(host).collect()
    }

    /// Takes away the clients of connections that are not among these; their sessions are to be ended.
    fn without(&self, served: &BTreeMap<String, v1::Connection>) -> Vec<Arc<Client>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<String> =
            kept.iter().filter(|(name, standing)| served.get(*name) != Some(&standing.connection)).map(|(name, _)| name.clone()).collect();
        gone.into_iter().filter_map(|name| kept.remove(&name)).map(|standing| standing.client).collect()
    }

    /// Connections whose inventory has changed since this was asked last.
    pub fn take_stale(&self) -> BTreeMap<String, Stale> {
        std::mem::take(&mut *self.stale.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note(&self, connection: &str, what: Stale) {
        let mut stale = self.stale.lock().unwrap_or_else(PoisonError::into_inner);
        let before = stale.remove(connection).unwrap_or_else(|| Stale::Vms(BTreeSet::new()));
        stale.insert(connection.to_owned(), before.and(what));
    }
}

/// A client for a connection that bears its account.
fn client(connection: &v1::Connection, budget: Arc<Budget>) -> Result<Client, Error> {
    let Some(account) = &connection.account else {
        let message =
            format!("the account of {:?} is not known to this agent yet; the controller tells it with its next word", connection.name);
        return Err(Error { code: Code::Unavailable, message, retryable: true });
    };
    let fingerprint = account.fingerprint.replace(':', "").to_ascii_lowercase();
    let settings = Settings {
        host: connection.path.clone(),
        username: account.username.clone(),
        password: Secret::new(account.password.clone()),
        trust: Trust { insecure: account.insecure, fingerprint: Some(fingerprint).filter(|text| !text.is_empty()), thumbprint: None },
    };
    Client::new(settings, budget)
}

/// Opens a connection of this kind. One that comes without its account goes by what its name stands for here.
pub fn source(agent: &Agent, connection: &v1::Connection) -> Result<Arc<dyn Source>, Error> {
    Ok(Arc::new(Vsphere::new(agent.hypervisors.client(&known(agent, connection), agent.config.vsphere_streams)?, agent.runtime.clone())))
}

fn known(agent: &Agent, connection: &v1::Connection) -> v1::Connection {
    let connections = agent.connections.lock().unwrap_or_else(PoisonError::into_inner);
    match connections.get(&connection.name) {
        Some(known) if connection.account.is_none() && known.path == connection.path => known.clone(),
        _ => connection.clone(),
    }
}

/// Whether a connection can be served: a real log-in and a look at all VMs. With an account in it nothing of it stays behind.
pub fn probe(agent: &Agent, connection: &v1::Connection) -> Result<serde_json::Value, Error> {
    let counted = |source: &dyn Source| source.inventory().map(|vms| serde_json::json!({"vms": vms.len()}));
    if connection.account.is_none() {
        return counted(source(agent, connection)?.as_ref());
    }
    let client = Arc::new(client(connection, agent.hypervisors.budget(&connection.path, agent.config.vsphere_streams))?);
    let found = counted(&Vsphere::new(client.clone(), agent.runtime.clone()));
    agent.runtime.block_on(client.log_out());
    found
}

/// Listens to every connection of this kind that is served, and ends the sessions of those that are not any more.
pub fn attend(agent: &Arc<Agent>) {
    let served = agent.connections.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for client in agent.hypervisors.without(&served) {
        agent.runtime.spawn(async move { client.log_out().await });
    }
    for (name, kind) in served.values().map(|connection| (connection.name.clone(), connection.kind.clone())) {
        if !matches!(kind.as_str(), VSPHERE | LIBVIRT) {
            continue;
        }
        if agent.hypervisors.listening.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone()) {
            let agent = agent.clone();
            tokio::task::spawn_blocking(move || {
                match kind.as_str() {
                    LIBVIRT => listen_to_libvirt(&agent, &name),
                    _ => listen(&agent, &name),
                }
                agent.hypervisors.listening.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
            });
        }
    }
}

/// Listens until the connection is not served any more.
fn listen(agent: &Arc<Agent>, name: &str) {
    let mut listener = Listener::default();
    let mut of: Option<Arc<Client>> = None;
    loop {
        let connection = agent.connections.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        let Some(connection) = connection.filter(|connection| connection.kind == VSPHERE) else { break };
        if agent.hypervisors.leaving.load(Ordering::Acquire) {
            return;
        }
        let client = match agent.hypervisors.client(&connection, agent.config.vsphere_streams) {
            Ok(client) => client,
            Err(_) => break,
        };
        if of.as_ref().is_none_or(|before| !Arc::ptr_eq(before, &client)) {
            (listener, of) = (Listener::default(), Some(client.clone()));
        }
        let began = Instant::now();
        match Vsphere::new(client, agent.runtime.clone()).changed(&mut listener) {
            Ok(News::Nothing) => {}
            Ok(news) => {
                // What came between the last look and the beginning of the listening is seen by one more look.
                let what = if let News::Vms(vms) = news { Stale::Vms(vms) } else { Stale::All };
                is_stale(agent, name, what);
                wait(agent, CALM.saturating_sub(began.elapsed()));
            }
            Err(_) if agent.hypervisors.leaving.load(Ordering::Acquire) => return,
            Err(e) => {
                tracing::debug!(connection = name, error = %e, "nobody listens to this hypervisor for a moment");
                wait(agent, PAUSE);
            }
        }
    }
    if let Some(client) = of {
        agent.runtime.block_on(listener.end(&client));
    }
}

fn is_stale(agent: &Agent, name: &str, what: Stale) {
    agent.hypervisors.note(name, what);
    agent.catalogue.notify_one();
}

/// Listens until the connection is not served any more. Between two processes that listen nobody does, so each begins with a look.
fn listen_to_libvirt(agent: &Arc<Agent>, name: &str) {
    let mut is_first = true;
    loop {
        let connection = agent.connections.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        let Some(connection) = connection.filter(|connection| connection.kind == LIBVIRT) else { return };
        let listening = agent.libvirt(&connection).ok().and_then(|libvirt| libvirt.uri().listen().ok());
        if !std::mem::take(&mut is_first) {
            is_stale(agent, name, Stale::All);
        }
        let Some(listening) = listening else {
            wait(agent, PAUSE);
            if agent.hypervisors.leaving.load(Ordering::Acquire) {
                return;
            }
            continue;
        };
        let began = Instant::now();
        loop {
            let is_served = || agent.connections.lock().unwrap_or_else(PoisonError::into_inner).get(name) == Some(&connection);
            // One that cannot even connect does not end by itself.
            let is_overdue = began.elapsed() > crate::sources::libvirt::virsh::LISTEN + PAUSE * 5;
            if agent.hypervisors.leaving.load(Ordering::Acquire) || !is_served() || is_overdue {
                break;
            }
            match listening.next(CALM) {
                Next::Line(_) => {
                    // What comes together is told together.
                    wait(agent, CALM / 4);
                    while let Next::Line(_) = listening.next(Duration::ZERO) {}
                    is_stale(agent, name, Stale::All);
                }
                Next::Nothing => {}
                Next::End => break,
            }
        }
        if agent.hypervisors.leaving.load(Ordering::Acquire) {
            return;
        }
        // One that cannot listen at all is not asked without a pause.
        wait(agent, PAUSE.saturating_sub(began.elapsed()));
    }
}

fn wait(agent: &Agent, pause: Duration) {
    agent.runtime.block_on(tokio::time::sleep(pause));
}

/// Ends all sessions: the process goes.
pub async fn leave(agent: &Agent) {
    // With its session a question for changes ends, too.
    agent.hypervisors.leaving.store(true, Ordering::Release);
    for client in agent.hypervisors.without(&BTreeMap::new()) {
        client.log_out().await;
    }
}
