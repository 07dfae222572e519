//! One session of one agent, from its Hello to its end.
//!
//! ```text
//! Hello ─► version, row, connections ─► queue: what to keep ─► Welcome, cancels ─► registry ─► queue: ready ─► messages … ─► end
//! ```
//! Owns: that order; answering heartbeats at once, whatever the rest of the controller is doing.
//! Never: lets a message reach an agent before its Welcome. A crash here costs the session: the agent comes back.

use std::time::Duration;

use actix::Addr;
use actix::dev::SendError;
use proto::v1::agent_message::Kind as FromAgent;
use proto::v1::controller_message::Kind;
use proto::v1::{AgentMessage, ControllerMessage, Hello, Renew, Welcome};
use shared::lease;
use tokio::sync::{mpsc, watch};
use tonic::{Status, Streaming};

use super::enroll::{away, rejoined, wrong_protocol};
use super::link::{Deliver, End, Link};
use super::registry::{Handle, Outgoing, Peer};
use super::store;
use crate::jobs::leases::Arrival;
use crate::jobs::queue;
use crate::providers;
use crate::store::entities::{agents, connections};

/// Messages that an agent may be behind before its session is closed.
pub(super) const OUTGOING: usize = 1024;
/// How long the first message may take.
const HELLO: Duration = Duration::from_secs(10);
/// How long a message that must not be lost may wait for the rooms behind.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most assignments that a Hello may name.
const MOST_HELD: usize = 1000;
/// Longest version, host name or path in a Hello.
const MOST_TEXT: usize = 4096;

/// What a session stands on.
pub(super) struct Session {
    pub registry: Handle,
    pub queue: queue::Handle,
    pub agent: agents::Model,
    pub outgoing: Outgoing,
    /// SHA-256 of the key that its certificate is for.
    pub key_sha256: String,
    /// Last second of its certificate since 1970, where it can be read.
    pub certificate_until: Option<i64>,
}

impl Session {
    /// Runs it to its end. The last thing sent says why.
    pub async fn run(self, mut incoming: Streaming<AgentMessage>) {
        let reason = match self.greet(&mut incoming).await {
            Ok(begun) => self.serve(begun, incoming).await,
            Err(reason) => reason,
        };
        tracing::info!(agent = self.agent.id, name = self.agent.name, reason = reason.message(), "agent session ended");
        // An agent that does not read is not waited for.
        let _ = self.outgoing.try_send(Err(reason));
    }

    async fn send(&self, message: Kind) -> Result<(), Status> {
        let sent = self.outgoing.send_timeout(Ok(ControllerMessage { kind: Some(message) }), PATIENCE).await;
        sent.map_err(|_| Status::resource_exhausted("messages were not read; come back"))
    }

    async fn refuse(&self, reason: String) -> Status {
        let welcome = Welcome { agent_id: self.agent.id.clone(), refused: reason.clone(), ..Default::default() };
        match self.send(Kind::Welcome(welcome)).await {
            Ok(()) => Status::failed_precondition(reason),
            Err(status) => status,
        }
    }

    async fn greet(&self, incoming: &mut Streaming<AgentMessage>) -> Result<Begun, Status> {
        let first = tokio::time::timeout(HELLO, incoming.message()).await.map_err(|_| Status::deadline_exceeded("no Hello in 10 s"))??;
        let Some(FromAgent::Hello(hello)) = first.and_then(|message| message.kind) else {
            return Err(Status::invalid_argument("the first message of a session is Hello"));
        };
        if self.agent.revoked {
            return Err(self.refuse("this agent was removed from the fleet; it needs a new join token".to_owned()).await);
        }
        if hello.protocol != proto::PROTOCOL {
            return Err(self.refuse(wrong_protocol(hello.protocol)).await);
        }
        check(&hello)?;
        // A call may have waited for its Hello: who is out by now gets no connections, and puts out nobody who is in.
        self.still_a_member().await?;
        let (registry, id) = (&self.registry, &self.agent.id);
        let session = registry.begin(id);
        registry.heard(id);
        let db = registry.store();
        store::hello(db, id, &hello).await.map_err(away)?;
        providers::service::ensure(db, id, hello.connections.clone()).await.map_err(away)?;
        providers::service::agent_here(db, id, true).await.map_err(away)?;
        let connections = providers::service::for_agent(db, id).await.map_err(away)?;
        let connections = connections.into_iter().filter(|row| row.origin == "rest");
        let told = |row: connections::Model| match providers::account::told(registry.sealer(), row) {
            Ok(connection) => Some(connection),
            // One whose password cannot be opened must not keep the others from their agent.
            Err(error) => {
                tracing::error!(%error, agent = id, "a connection's account cannot be opened");
                None
            }
        };
        let connections = connections.filter_map(told).collect();
        let draining = self.agent.draining || hello.draining;
        // What is left over is said in a later Hello, when these are gone.
        let parked = hello.parked.iter().take(MOST_HELD).cloned().collect();
        let arrival = Arrival { agent: id.clone(), session, held: hello.held.clone(), draining, parked };
        let keep = self.queue.agent_up(arrival).await.map_err(|e| Status::unavailable(e.to_string()))?;
        let welcome = Welcome { agent_id: id.clone(), refused: String::new(), connections, keep: keep.keep };
        self.send(Kind::Welcome(welcome)).await?;
        for message in keep.then {
            self.send(message).await?;
        }
        Ok(Begun { session, hello })
    }

    /// Carries messages until the stream ends, a newer session takes over, or the agent is silent too long.
    async fn serve(&self, begun: Begun, mut incoming: Streaming<AgentMessage>) -> Status {
        let Begun { session, hello } = begun;
        let id = &self.agent.id;
        let (closer, mut closed) = watch::channel(None);
        let link = Link::new(
            id.clone(),
            self.outgoing.clone(),
            self.queue.clone(),
            self.registry.store().clone(),
            hello.roots,
            self.certificate_until,
        );
        let link = self.registry.start_link(link);
        let peer = Peer { session, outgoing: self.outgoing.clone(), closer, link: link.clone() };
        if !self.registry.insert(id, &self.agent.name, peer) {
            link.do_send(End);
            return Status::aborted("a newer session of this agent took over");
        }
        tracing::info!(agent = id, name = self.agent.name, version = hello.version, instance = hello.instance, "agent is connected");
        // Again, now that it can be closed: a removal or a new key of before is seen here, one of after finds the session.
        let stands = match self.still_a_member().await {
            Ok(()) => self.queue.agent_ready(id.clone(), session).await.map_err(|error| Status::unavailable(error.to_string())),
            Err(status) => Err(status),
        };
        let reason = match stands {
            Ok(()) => loop {
                let message = tokio::select! {
                    message = tokio::time::timeout(lease::REASSIGN, incoming.message()) => message,
                    _ = closed.changed() => break closed.borrow().clone().unwrap_or_else(|| Status::aborted("closed")),
                };
                let message = match message {
                    Ok(Ok(Some(message))) => message,
                    Ok(Ok(None)) => break Status::ok("the agent closed the stream"),
                    Ok(Err(status)) => break status,
                    Err(_) => break Status::deadline_exceeded("no heartbeat in 40 s"),
                };
                self.registry.heard(id);
                // Before whatever it says after this, so that what it parks is not given to it again.
                if let Some(FromAgent::Leaving(_)) = message.kind {
                    tracing::info!(agent = id, name = self.agent.name, "agent is leaving");
                    // Where the store is away it counts as leaving all the same, and what it parks must still be heard.
                    if let Err(error) = self.queue.agent_leaving(id.clone(), session).await {
                        tracing::warn!(%error, agent = id, "what waits for a leaving agent could not be stored");
                    }
                    continue;
                }
                if let Err(status) = self.take(&link, message).await {
                    break status;
                }
            },
            Err(status) => status,
        };
        link.do_send(End);
        if self.registry.remove(id, session) {
            if let Err(error) = self.queue.agent_down(id.clone(), session).await {
                tracing::warn!(%error, agent = id, "the queue could not be told that an agent went");
            }
            if let Err(error) = providers::service::agent_here(self.registry.store(), id, false).await {
                tracing::warn!(%error, agent = id, "connections could not be marked as away");
            }
        }
        reason
    }

    /// Whether the agent is in the fleet still, with the key that it came with.
    async fn still_a_member(&self) -> Result<(), Status> {
        match store::by_id(self.registry.store(), &self.agent.id).await.map_err(away)? {
            Some(row) if row.key_sha256 != self.key_sha256 => Err(rejoined()),
            Some(row) if !row.revoked => Ok(()),
            _ => Err(Status::permission_denied("this agent was removed from the fleet; it needs a new join token")),
        }
    }

    async fn take(&self, link: &Addr<Link>, message: AgentMessage) -> Result<(), Status> {
        // An unknown kind is one of a newer agent of the same protocol: nothing that we must know.
        let Some(kind) = message.kind else { return Ok(()) };
        if let FromAgent::Heartbeat(heartbeat) = &kind {
            let renew = ControllerMessage { kind: Some(Kind::Renew(Renew { sequence: heartbeat.sequence })) };
            match self.outgoing.try_send(Ok(renew)) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(_)) => return Err(Status::resource_exhausted("messages were not read; come back")),
                Err(mpsc::error::TrySendError::Closed(_)) => return Err(Status::cancelled("the agent closed the stream")),
            }
        }
        let may_be_lost = matches!(kind, FromAgent::Progress(_) | FromAgent::Log(_) | FromAgent::Heartbeat(_));
        match link.try_send(Deliver(kind)) {
            Ok(()) => Ok(()),
            Err(SendError::Full(_)) if may_be_lost => Ok(()),
            Err(SendError::Full(deliver)) => match tokio::time::timeout(PATIENCE, link.send(deliver)).await {
                Ok(Ok(())) => Ok(()),
                _ => Err(Status::unavailable("the controller is behind; come back and say it again")),
            },
            Err(SendError::Closed(_)) => Err(Status::unavailable("the controller is shutting down; come back")),
        }
    }
}

struct Begun {
    session: u64,
    hello: Hello,
}

/// What a Hello may hold: an agent is certified, not trusted to be sane.
fn check(hello: &Hello) -> Result<(), Status> {
    let texts = [&hello.version, &hello.instance, &hello.hostname].into_iter().chain(hello.formats.iter());
    let roots = hello.roots.iter().flat_map(|root| [&root.name, &root.path]);
    let connections = hello.connections.iter().flat_map(|connection| [&connection.name, &connection.kind, &connection.path]);
    let bad = texts.chain(roots).chain(connections).any(|text| text.len() > MOST_TEXT || text.contains('\0'));
    if bad || hello.held.len() > MOST_HELD || hello.roots.len() > 64 || hello.connections.len() > MOST_HELD || hello.formats.len() > 64 {
        return Err(Status::invalid_argument("Hello: too many entries, or a text that is too long or holds NUL"));
    }
    Ok(())
}
