//! The AgentLink actor: one per session, from Welcome to the stream's end.
//!
//! Owns: questions that wait for this agent's answer, its newest figures; it carries the agent's messages to the rooms they are for,
//! one at a time and in order.
//! Never: answers heartbeats (the session does, so that a slow store delays none). A crash here costs the session.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use actix::{Actor, ActorContext, ActorFutureExt, AsyncContext, AtomicResponse, Context, Handler, Message, MessageResult, WrapFuture};
use proto::v1::agent_message::Kind as FromAgent;
use proto::v1::browse::Question;
use proto::v1::controller_message::Kind;
use proto::v1::{Browse, BrowseReply, ControllerMessage, Heartbeat, Inventory, InventoryChanges, Root, SourceHost};
use shared::vm::Vm;
use tokio::sync::oneshot;

use super::registry::Outgoing;
use super::store;
use crate::jobs::queue;
use crate::jobs::reports::Report;
use crate::store::{Error as StoreError, Store};
use crate::vms;

/// Messages that wait before the session is held up.
const MAILBOX: usize = 512;
/// After an inventory that could not be stored.
const AGAIN: Duration = Duration::from_secs(10);
/// Questions that one agent may owe an answer to.
const QUESTIONS: usize = 256;
/// `last_seen` in the store is this old at most.
const SEEN: Duration = Duration::from_secs(60);

/// Hypervisors of an agent that are shown.
const MOST_HOSTS: usize = 100;

/// The newest that is known of a connected agent.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Resident memory of its process.
    pub resident_bytes: u64,
    /// Its roots with their free space.
    pub roots: Vec<Root>,
    /// Since when this session lasts, milliseconds since 1970.
    pub connected_at: i64,
    /// Last second of the certificate that this session came with, since 1970.
    pub certificate_until: Option<i64>,
    /// The agent's clock less ours at the last heartbeat, in milliseconds; nothing where an older agent does not say its time.
    pub skew_ms: Option<i64>,
    /// Hypervisors that its bytes come from.
    pub source_hosts: Vec<SourceHost>,
}

/// The actor.
pub struct Link {
    agent: String,
    outgoing: Outgoing,
    queue: queue::Handle,
    store: Store,
    figures: Figures,
    questions: HashMap<u64, oneshot::Sender<BrowseReply>>,
    next_question: u64,
    seen_stored: Instant,
}

impl Link {
    /// Of a session that is about to begin.
    pub(super) fn new(
        agent: String,
        outgoing: Outgoing,
        queue: queue::Handle,
        store: Store,
        roots: Vec<Root>,
        certificate_until: Option<i64>,
    ) -> Self {
        let connected_at = shared::clock::now().timestamp_millis();
        let figures = Figures { roots, connected_at, certificate_until, ..Figures::default() };
        Self { agent, outgoing, queue, store, figures, questions: HashMap::new(), next_question: 0, seen_stored: Instant::now() }
    }
}

impl Actor for Link {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX);
    }
}

/// A message of the agent.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Deliver(pub FromAgent);

impl Handler<Deliver> for Link {
    type Result = AtomicResponse<Self, ()>;

    fn handle(&mut self, Deliver(message): Deliver, ctx: &mut Self::Context) -> Self::Result {
        let report = match message {
            FromAgent::Progress(progress) => Some(Report::Progress(progress)),
            FromAgent::Log(log) => Some(Report::Log(log)),
            FromAgent::CommitRequest(request) => Some(Report::Commit(request)),
            FromAgent::Finished(finished) => Some(Report::Finished(finished)),
            FromAgent::Heartbeat(heartbeat) => {
                self.heartbeat(heartbeat, ctx);
                None
            }
            FromAgent::BrowseReply(reply) => {
                // Who asked may have given up.
                if let Some(waiting) = self.questions.remove(&reply.id) {
                    let _ = waiting.send(reply);
                }
                None
            }
            FromAgent::Inventory(inventory) => {
                let (store, agent) = (self.store.clone(), self.agent.clone());
                return self.storing(inventory.connection.clone(), take_inventory(store, agent, inventory));
            }
            FromAgent::InventoryChanges(changes) => {
                let (store, agent) = (self.store.clone(), self.agent.clone());
                return self.storing(changes.connection.clone(), take_changes(store, agent, changes));
            }
            FromAgent::Leaving(_) => None,
            FromAgent::Hello(_) => {
                tracing::warn!(agent = self.agent, "a second hello in one session is ignored");
                None
            }
        };
        let (queue, agent) = (self.queue.clone(), self.agent.clone());
        let work = async move {
            if let Some(report) = report
                && let Err(error) = queue.report(agent, report).await
            {
                tracing::error!(%error, "a report could not be handed over");
            }
        };
        AtomicResponse::new(Box::pin(work.into_actor(self)))
    }
}

impl Link {
    /// Waits until an inventory is stored. Where it is not, the agent is asked again: it may have been a change that nobody tells twice.
    fn storing(&self, connection: String, work: impl Future<Output = Result<(), StoreError>> + 'static) -> AtomicResponse<Self, ()> {
        let stored = work.into_actor(self).map(move |stored, link, ctx: &mut Context<Self>| {
            if let Err(error) = stored {
                tracing::warn!(%error, agent = link.agent, connection, "an inventory could not be stored; the agent is asked again");
                ctx.run_later(AGAIN, move |link, _| link.ask_again(connection));
            }
        });
        AtomicResponse::new(Box::pin(stored))
    }

    /// Asks for a whole inventory; it comes as a message of its own, nobody waits for the answer.
    fn ask_again(&mut self, connection: String) {
        self.next_question += 1;
        let browse = Browse { id: self.next_question, question: Some(Question::Refresh(connection)) };
        // A stream that is full or closed: the next session begins with everything.
        let _ = self.outgoing.try_send(Ok(ControllerMessage { kind: Some(Kind::Browse(browse)) }));
    }

    fn heartbeat(&mut self, heartbeat: Heartbeat, ctx: &mut Context<Self>) {
        self.figures.resident_bytes = heartbeat.resident_bytes;
        if heartbeat.time_ms > 0 {
            self.figures.skew_ms = Some(heartbeat.time_ms.saturating_sub(shared::clock::now().timestamp_millis()));
        }
        // An agent is certified, not trusted to be sane.
        self.figures.source_hosts = heartbeat.source_hosts.into_iter().take(MOST_HOSTS).filter(|host| host.host.len() <= 300).collect();
        if !heartbeat.roots.is_empty() {
            self.figures.roots = heartbeat.roots;
        }
        if self.seen_stored.elapsed() < SEEN {
            return;
        }
        self.seen_stored = Instant::now();
        let (store, agent) = (self.store.clone(), self.agent.clone());
        let work = async move {
            if let Err(error) = store::seen(&store, &agent).await {
                tracing::debug!(%error, agent, "last_seen could not be stored");
            }
        };
        ctx.spawn(work.into_actor(self));
    }
}

/// Takes over what has changed of what an agent sees through a connection.
async fn take_changes(store: Store, agent: String, changes: InventoryChanges) -> Result<(), StoreError> {
    match serde_json::from_str::<Vec<Vm>>(&changes.vms_json) {
        Ok(list) => vms::service::merge(&store, &agent, &changes.connection, list, changes.gone).await,
        Err(error) => Err(StoreError::Other(format!("it cannot be read: {error}"))),
    }
}

/// Takes over what an agent sees through a connection, or why it sees nothing.
async fn take_inventory(store: Store, agent: String, inventory: Inventory) -> Result<(), StoreError> {
    if !inventory.error.is_empty() {
        vms::service::failed(&store, &agent, &inventory.connection, &inventory.error).await
    } else {
        match serde_json::from_str::<Vec<Vm>>(&inventory.vms_json) {
            Ok(list) => vms::service::replace(&store, &agent, &inventory.connection, list).await,
            Err(error) => {
                let message = format!("the agent's inventory could not be read: {error}");
                vms::service::failed(&store, &agent, &inventory.connection, &message).await
            }
        }
    }
}

/// A question; answered with its number and where the reply will come, or nothing where it could not be sent.
#[derive(Message)]
#[rtype(result = "Option<(u64, oneshot::Receiver<BrowseReply>)>")]
pub(super) struct Ask(pub Question);

impl Handler<Ask> for Link {
    type Result = MessageResult<Ask>;

    fn handle(&mut self, Ask(question): Ask, _: &mut Self::Context) -> Self::Result {
        self.questions.retain(|_, waiting| !waiting.is_closed());
        if self.questions.len() >= QUESTIONS {
            return MessageResult(None);
        }
        self.next_question += 1;
        let (sender, receiver) = oneshot::channel();
        let browse = Browse { id: self.next_question, question: Some(question) };
        if self.outgoing.try_send(Ok(ControllerMessage { kind: Some(Kind::Browse(browse)) })).is_err() {
            return MessageResult(None);
        }
        self.questions.insert(self.next_question, sender);
        MessageResult(Some((self.next_question, receiver)))
    }
}

/// The newest figures.
#[derive(Message)]
#[rtype(result = "Figures")]
pub(super) struct Snapshot;

impl Handler<Snapshot> for Link {
    type Result = MessageResult<Snapshot>;

    fn handle(&mut self, _: Snapshot, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.figures.clone())
    }
}

/// The session ended.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct End;

impl Handler<End> for Link {
    type Result = ();

    fn handle(&mut self, _: End, ctx: &mut Self::Context) {
        ctx.stop();
    }
}
