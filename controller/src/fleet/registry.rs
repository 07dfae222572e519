//! The way to every agent.
//!
//! Owns: which agent is connected through which session, when each was last heard, their names.
//! Never: waits: a session that does not keep up is closed, and its agent comes back and says what it holds.
//! A crash here costs nothing that the store does not know.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use actix::{Actor, Addr, Arbiter, ArbiterHandle};
use proto::v1::browse::Question;
use proto::v1::controller_message::Kind;
use proto::v1::{ControllerMessage, Forget, Root};
use shared::error::Code;
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::ca::{self, Authority};
use super::console;
use super::enroll::{self, Token};
use super::link::{Ask, Link, Snapshot};
use super::store::{self, RootRow};
use super::transfer;
use crate::http::reply::Error;
use crate::jobs::core::Outbox;
use crate::live::{self, Frame};
use crate::store::entities::agents;
use crate::store::sealing::Sealer;
use crate::store::{Error as StoreError, Store};
use crate::system::metrics::Metrics;

/// How long an agent has to answer a question.
const ANSWER: Duration = Duration::from_secs(10);

/// What a session sends.
pub(super) type Outgoing = mpsc::Sender<Result<ControllerMessage, Status>>;

/// A connected agent's session.
#[derive(Clone)]
pub(super) struct Peer {
    pub session: u64,
    pub outgoing: Outgoing,
    /// Says why the session must end.
    pub closer: watch::Sender<Option<Status>>,
    pub link: Addr<Link>,
}

/// An agent with a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// `agent-…`.
    pub id: String,
    /// Its name.
    pub name: String,
}

struct Inner {
    store: Store,
    /// Opens the passwords of connections on their way to their agents.
    sealer: Sealer,
    live: live::Handle,
    metrics: Metrics,
    authority: Arc<Authority>,
    arbiter: ArbiterHandle,
    peers: RwLock<HashMap<String, Peer>>,
    /// Milliseconds after `since` at which each agent was last heard by this process.
    heard: RwLock<HashMap<String, Arc<AtomicU64>>>,
    names: RwLock<HashMap<String, String>>,
    since: Instant,
    sessions: AtomicU64,
    transfers: transfer::Table,
    consoles: console::Table,
}

/// The registry, for any thread.
#[derive(Clone)]
pub struct Handle(Arc<Inner>);

impl Handle {
    /// Reads the fleet and opens (or makes) its CA. Called on the actix system's thread, where the links will run.
    pub async fn open(store: Store, sealer: &Sealer, live: live::Handle, metrics: Metrics) -> Result<Self, ca::Error> {
        let authority = Arc::new(Authority::open(&store, sealer).await?);
        let names = store::all(&store).await?.into_iter().map(|agent| (agent.id, agent.name)).collect();
        Ok(Self(Arc::new(Inner {
            store,
            sealer: sealer.clone(),
            live,
            metrics,
            authority,
            arbiter: Arbiter::current(),
            peers: RwLock::default(),
            heard: RwLock::default(),
            names: RwLock::new(names),
            since: Instant::now(),
            sessions: AtomicU64::new(0),
            transfers: transfer::Table::default(),
            consoles: console::Table::default(),
        })))
    }

    /// The installation's CA.
    pub fn authority(&self) -> &Authority {
        &self.0.authority
    }

    /// What opens the passwords of connections.
    pub(super) fn sealer(&self) -> &Sealer {
        &self.0.sealer
    }

    /// The store that the fleet is kept in.
    pub(super) fn store(&self) -> &Store {
        &self.0.store
    }

    /// The transfers that are waited for.
    pub(super) fn transfers(&self) -> &transfer::Table {
        &self.0.transfers
    }

    /// The consoles that are waited for, and how many are open.
    pub(super) fn consoles(&self) -> &console::Table {
        &self.0.consoles
    }

    /// Makes a join token; see [`enroll::join_token`].
    pub async fn join_token(&self, created_by: &str, name: Option<String>, ttl: Duration) -> Result<Token, StoreError> {
        enroll::join_token(&self.0.store, &self.0.authority, created_by, name, ttl).await
    }

    /// Every agent that was not removed, by name.
    pub async fn agents(&self) -> Result<Vec<agents::Model>, StoreError> {
        store::all(&self.0.store).await
    }

    /// An agent by id or name; 404 where there is none.
    pub async fn resolve(&self, id: &str) -> Result<agents::Model, Error> {
        let found = store::by_id_or_name(&self.0.store, id).await?;
        found.ok_or_else(|| Error::not_found(format!("no agent `{id}`; GET /agents lists them")))
    }

    /// The roots of an agent, as it said them last; also while it is away.
    pub async fn roots(&self, agent: &str) -> Result<Vec<RootRow>, StoreError> {
        Ok(store::by_id(&self.0.store, agent).await?.map(|agent| store::roots(&agent)).unwrap_or_default())
    }

    /// Whether an agent has a session with this controller.
    pub fn is_connected(&self, agent: &str) -> bool {
        self.peer(agent).is_some()
    }

    /// The agents with a session, by name.
    pub fn connected(&self) -> Vec<Connected> {
        let ids: Vec<String> = self.0.peers.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect();
        let mut agents: Vec<Connected> = ids.into_iter().map(|id| Connected { name: self.name(&id), id }).collect();
        agents.sort_by(|a, b| a.name.cmp(&b.name));
        agents
    }

    /// Live figures of a connected agent.
    pub async fn snapshot(&self, agent: &str) -> Option<super::link::Figures> {
        self.peer(agent)?.link.send(Snapshot).await.ok()
    }

    /// Asks an agent; the answer's JSON. 503 where it is away, 502 where it does not answer in 10 s, else the agent's own code and words.
    pub async fn ask(&self, agent: &str, question: Question) -> Result<serde_json::Value, Error> {
        self.ask_within(agent, question, ANSWER).await
    }

    /// The same for a question that takes longer. Whoever stops waiting, by dropping this, stops the agent's work on it, too.
    pub async fn ask_within(&self, agent: &str, question: Question, patience: Duration) -> Result<serde_json::Value, Error> {
        self.asked(agent, question, patience, |what| Error::new(Code::Unavailable, what).retry_after(5)).await
    }

    /// The same for an act that is not to be asked for again by itself: once it was sent and has no answer, it may go on. `look`: what shows it.
    pub async fn order_within(&self, agent: &str, question: Question, patience: Duration, look: &str) -> Result<serde_json::Value, Error> {
        self.asked(agent, question, patience, |what| Error::new(Code::BadGateway, format!("{what}; it may go on: {look}"))).await
    }

    async fn asked(
        &self,
        agent: &str,
        question: Question,
        patience: Duration,
        lost: impl Fn(String) -> Error,
    ) -> Result<serde_json::Value, Error> {
        let name = self.name(agent);
        let peer =
            self.peer(agent).ok_or_else(|| Error::new(Code::Unavailable, format!("agent `{name}` is not connected")).retry_after(5))?;
        let answer = tokio::time::timeout(patience, async {
            let (id, waiting) = peer.link.send(Ask(question)).await.ok().flatten()?;
            let mut open = Open { outgoing: &peer.outgoing, id: Some(id) };
            let reply = waiting.await.ok();
            open.id = None;
            reply
        });
        let reply = match answer.await {
            Ok(Some(reply)) => reply,
            Ok(None) => return Err(lost(format!("agent `{name}` went away before it answered"))),
            Err(_) => {
                let what = format!("agent `{name}` did not answer in {} s", patience.as_secs());
                return Err(Error::new(Code::BadGateway, lost(what).message()));
            }
        };
        if let Some(failure) = reply.failure {
            return Err(Error::new(Code::from_word(&failure.code).unwrap_or(Code::BadGateway), failure.message));
        }
        serde_json::from_str(&reply.json).map_err(|e| Error::new(Code::BadGateway, format!("agent `{name}` answered what is no JSON: {e}")))
    }

    /// Begins a session: its number, and the older session of that agent, where there is one, ends.
    pub(super) fn begin(&self, agent: &str) -> u64 {
        self.close(agent, Status::aborted("a newer session of this agent took over"));
        self.0.sessions.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Starts the actor of a session on the actix system.
    pub(super) fn start_link(&self, link: Link) -> Addr<Link> {
        Link::start_in_arbiter(&self.0.arbiter, |_| link)
    }

    /// The session is ready for messages. False where a newer one was quicker.
    pub(super) fn insert(&self, agent: &str, name: &str, peer: Peer) -> bool {
        let mut peers = self.0.peers.write().unwrap_or_else(PoisonError::into_inner);
        if peers.get(agent).is_some_and(|newer| newer.session > peer.session) {
            return false;
        }
        peers.insert(agent.to_owned(), peer);
        self.0.metrics.agents_connected.set(i64::try_from(peers.len()).unwrap_or(i64::MAX));
        drop(peers);
        self.note_name(agent, name);
        self.publish("agent.connected", agent, name);
        true
    }

    /// The session ended. False where it was not the agent's current one.
    pub(super) fn remove(&self, agent: &str, session: u64) -> bool {
        let mut peers = self.0.peers.write().unwrap_or_else(PoisonError::into_inner);
        if peers.get(agent).is_none_or(|peer| peer.session != session) {
            return false;
        }
        peers.remove(agent);
        self.0.metrics.agents_connected.set(i64::try_from(peers.len()).unwrap_or(i64::MAX));
        drop(peers);
        self.publish("agent.disconnected", agent, &self.name(agent));
        true
    }

    pub(super) fn note_name(&self, agent: &str, name: &str) {
        self.0.names.write().unwrap_or_else(PoisonError::into_inner).insert(agent.to_owned(), name.to_owned());
    }

    /// The agent was heard just now.
    pub(super) fn heard(&self, agent: &str) {
        let now = u64::try_from(self.0.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        if let Some(heard) = self.0.heard.read().unwrap_or_else(PoisonError::into_inner).get(agent) {
            heard.store(now, Ordering::Relaxed);
            return;
        }
        self.0.heard.write().unwrap_or_else(PoisonError::into_inner).insert(agent.to_owned(), Arc::new(AtomicU64::new(now)));
    }

    /// Ends an agent's session, where it has one.
    pub fn close(&self, agent: &str, reason: Status) {
        if let Some(peer) = self.peer(agent) {
            peer.closer.send_replace(Some(reason));
        }
    }

    /// Ends all sessions and consoles, for the drain: agents go on copying and come back.
    pub fn close_all(&self) {
        self.0.consoles.close();
        for peer in self.0.peers.read().unwrap_or_else(PoisonError::into_inner).values() {
            peer.closer.send_replace(Some(Status::unavailable("the controller is shutting down; come back")));
        }
    }

    fn peer(&self, agent: &str) -> Option<Peer> {
        self.0.peers.read().unwrap_or_else(PoisonError::into_inner).get(agent).cloned()
    }

    fn publish(&self, kind: &'static str, agent: &str, name: &str) {
        let data = serde_json::json!({ "id": agent, "name": name });
        self.0.live.publish(Frame::new(kind, vec!["agents".to_owned()], data));
    }
}

impl Outbox for Handle {
    fn send(&self, agent: &str, message: Kind) -> bool {
        let Some(peer) = self.peer(agent) else { return false };
        match peer.outgoing.try_send(Ok(ControllerMessage { kind: Some(message) })) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::warn!(agent, "the agent does not read its messages; its session is closed");
                peer.closer.send_replace(Some(Status::resource_exhausted("messages were not read; come back")));
                false
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }

    fn last_heard(&self, agent: &str) -> Option<Instant> {
        let heard = self.0.heard.read().unwrap_or_else(PoisonError::into_inner);
        let after = heard.get(agent)?.load(Ordering::Relaxed);
        self.0.since.checked_add(Duration::from_millis(after))
    }

    fn name(&self, agent: &str) -> String {
        let names = self.0.names.read().unwrap_or_else(PoisonError::into_inner);
        names.get(agent).cloned().unwrap_or_else(|| agent.to_owned())
    }
}

/// A question that is being waited for. Dropped with its number, it tells the agent to forget it.
struct Open<'a> {
    outgoing: &'a Outgoing,
    id: Option<u64>,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            // A stream that takes nothing ends soon, and the agent's work with it.
            let _ = self.outgoing.try_send(Ok(ControllerMessage { kind: Some(Kind::Forget(Forget { id })) }));
        }
    }
}

/// The newest free space of an agent's roots, where a heartbeat brought it.
pub fn merge_roots(mut rows: Vec<RootRow>, newest: &[Root]) -> Vec<RootRow> {
    for row in &mut rows {
        if let Some(root) = newest.iter().find(|root| root.name == row.name) {
            (row.free_bytes, row.total_bytes) = (root.free_bytes, root.total_bytes);
        }
    }
    rows
}
