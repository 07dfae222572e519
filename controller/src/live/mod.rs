//! Live: news of jobs, agents and the system to everybody who watches.
//!
//! ```text
//! publish ─► Hub (ring of the last frames) ─wake─► Session ─pull─► Hub
//!                                                  Session ─frames, ping─► client ─pong─► next pull
//! ```
//! Owns: sequence numbers, the ring, the WebSocket sessions.
//! Never: waits for a reader or keeps frames for one: a session pulls when its client has answered the ping behind the last batch, so a
//! slow one holds at most two batches; its progress is coalesced in the pull, what the ring lost meanwhile is told by `lagged`, and
//! one that keeps lagging is closed.
//! A crash here costs the ring: sequence numbers begin anew, which `hello` shows.

mod hub;
pub mod routes;
mod session;

use actix::{Actor, Addr};
use serde_json::Value;

use crate::access::Role;

/// News.
#[derive(Clone, Debug)]
pub struct Frame {
    /// `job.created`, `job.progress`, `system.metrics`, …
    pub kind: &'static str,
    /// Under which topics: `jobs`, `job:ID`, `metrics`, `alerts`, `agents`.
    pub topics: Vec<String>,
    /// What happened.
    pub data: Value,
    /// Who may see it.
    pub min_role: Role,
}

impl Frame {
    /// News for everybody who may read.
    pub fn new(kind: &'static str, topics: Vec<String>, data: Value) -> Self {
        Self { kind, topics, data, min_role: Role::Viewer }
    }
}

/// The hub, for any thread.
#[derive(Clone)]
pub struct Handle {
    hub: Addr<hub::Hub>,
}

impl Handle {
    /// Starts the hub on the current arbiter.
    pub fn start() -> Self {
        Self { hub: hub::Hub::default().start() }
    }

    /// Tells the watchers. Never waits; frames come in the order of the calls of one thread.
    pub fn publish(&self, frame: Frame) {
        // The mailbox is bounded (see Hub); a frame that finds it full is lost and the next one tells the watchers that they lag.
        if let Err(actix::dev::SendError::Full(_)) = self.hub.try_send(hub::Publish(frame)) {
            tracing::warn!("live hub is behind; a frame is lost");
        }
    }

    /// How long a message waits for the hub now; nothing where it is gone.
    pub async fn ping(&self) -> Option<std::time::Duration> {
        let sent = std::time::Instant::now();
        self.hub.send(hub::Ping).await.ok().map(|()| sent.elapsed())
    }

    /// Tells every session to close; for the drain.
    pub fn close(&self) {
        self.hub.do_send(hub::CloseAll);
    }
}
