//! The hub actor: the ring of the last frames and who is to be woken.
//!
//! Owns: sequence numbers. Never: holds a frame for a particular session. A crash here costs the ring.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use actix::{Actor, Context, Handler, Message, Recipient};

use super::Frame;
use crate::access::Role;

/// Frames that are kept.
const RING_FRAMES: usize = 8192;
/// Bytes of frames that are kept.
const RING_BYTES: usize = 16 << 20;
/// A pull ends with the frame that fills so many bytes: what a reader who does not read costs is twice that.
const PULL_BYTES: usize = 48 << 10;
/// Messages that may wait for the hub.
const MAILBOX: usize = 16_384;

/// A frame with its number, written out once for all sessions.
pub(super) struct Numbered {
    pub seq: u64,
    pub topics: Vec<String>,
    pub min_role: Role,
    /// Frames with the same key replace one another for a reader that is behind.
    pub coalesce: Option<String>,
    pub text: String,
}

/// Publishes a frame.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Publish(pub Frame);

/// There is something to pull.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Wake {
    /// The server goes away.
    pub close: bool,
}

/// Asks nothing: the time to its answer is the mailbox's.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Ping;

/// Closes all sessions.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct CloseAll;

/// A session begins; answered with its number and where the ring stands.
#[derive(Message)]
#[rtype(result = "Joined")]
pub(super) struct Join(pub Recipient<Wake>);

#[derive(actix::MessageResponse)]
pub(super) struct Joined {
    pub id: u64,
    /// Number of the last frame.
    pub head: u64,
    /// Number of the oldest frame that is still there.
    pub oldest: u64,
}

/// A session ends.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Leave(pub u64);

/// Frames after a number.
#[derive(Message)]
#[rtype(result = "Pulled")]
pub(super) struct Pull {
    pub id: u64,
    pub after: u64,
    pub most: usize,
}

#[derive(actix::MessageResponse)]
pub(super) struct Pulled {
    pub frames: Vec<Arc<Numbered>>,
    /// Frames that the ring lost before they were pulled.
    pub missed: u64,
    /// There are more.
    pub more: bool,
}

struct Watcher {
    wake: Recipient<Wake>,
    /// A wake is on its way; it needs no second.
    woken: bool,
}

#[derive(Default)]
pub(super) struct Hub {
    ring: VecDeque<Arc<Numbered>>,
    bytes: usize,
    head: u64,
    watchers: HashMap<u64, Watcher>,
    next_id: u64,
}

impl Actor for Hub {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(MAILBOX);
    }
}

impl Hub {
    fn oldest(&self) -> u64 {
        self.ring.front().map_or(self.head.saturating_add(1), |frame| frame.seq)
    }
}

impl Handler<Publish> for Hub {
    type Result = ();

    fn handle(&mut self, Publish(frame): Publish, _: &mut Self::Context) {
        self.head += 1;
        let time = shared::clock::rfc3339(shared::clock::now());
        let text = serde_json::json!({"type": frame.kind, "time": time, "seq": self.head, "data": frame.data}).to_string();
        let coalesce = match frame.kind {
            "job.progress" | "system.metrics" => Some(format!("{} {}", frame.kind, frame.topics.last().map_or("", String::as_str))),
            _ => None,
        };
        self.bytes += text.len();
        self.ring.push_back(Arc::new(Numbered { seq: self.head, topics: frame.topics, min_role: frame.min_role, coalesce, text }));
        while self.ring.len() > RING_FRAMES || self.bytes > RING_BYTES {
            let Some(old) = self.ring.pop_front() else { break };
            self.bytes -= old.text.len();
        }
        for watcher in self.watchers.values_mut().filter(|watcher| !watcher.woken) {
            watcher.woken = watcher.wake.try_send(Wake { close: false }).is_ok();
        }
    }
}

impl Handler<Ping> for Hub {
    type Result = ();

    fn handle(&mut self, _: Ping, _: &mut Self::Context) {}
}

impl Handler<CloseAll> for Hub {
    type Result = ();

    fn handle(&mut self, _: CloseAll, _: &mut Self::Context) {
        for watcher in self.watchers.values() {
            watcher.wake.do_send(Wake { close: true });
        }
    }
}

impl Handler<Join> for Hub {
    type Result = Joined;

    fn handle(&mut self, Join(wake): Join, _: &mut Self::Context) -> Joined {
        self.next_id += 1;
        self.watchers.insert(self.next_id, Watcher { wake, woken: false });
        Joined { id: self.next_id, head: self.head, oldest: self.oldest() }
    }
}

impl Handler<Leave> for Hub {
    type Result = ();

    fn handle(&mut self, Leave(id): Leave, _: &mut Self::Context) {
        self.watchers.remove(&id);
    }
}

impl Handler<Pull> for Hub {
    type Result = Pulled;

    fn handle(&mut self, pull: Pull, _: &mut Self::Context) -> Pulled {
        if let Some(watcher) = self.watchers.get_mut(&pull.id) {
            watcher.woken = false;
        }
        let oldest = self.oldest();
        let missed = oldest.saturating_sub(pull.after.saturating_add(1));
        let skip = usize::try_from(pull.after.saturating_add(1).saturating_sub(oldest)).unwrap_or(usize::MAX);
        let (mut frames, mut bytes) = (Vec::new(), 0);
        let mut rest = self.ring.iter().skip(skip);
        for frame in rest.by_ref() {
            bytes += frame.text.len();
            frames.push(Arc::clone(frame));
            // One that is larger goes alone.
            if frames.len() >= pull.most || bytes >= PULL_BYTES {
                break;
            }
        }
        Pulled { frames, missed, more: rest.next().is_some() }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    struct Deaf;
    impl Actor for Deaf {
        type Context = Context<Self>;
    }
    impl Handler<Wake> for Deaf {
        type Result = ();
        fn handle(&mut self, _: Wake, _: &mut Self::Context) {}
    }

    #[actix_web::test]
    async fn the_ring_is_bounded_and_tells_what_was_missed() {
        let hub = Hub::default().start();
        let joined = hub.send(Join(Deaf.start().recipient())).await.unwrap();
        let frames = RING_FRAMES as u64 + 10;
        for n in 0..frames {
            hub.send(Publish(Frame::new("job.log", vec!["jobs".into()], serde_json::json!({ "n": n })))).await.unwrap();
        }
        let pulled = hub.send(Pull { id: joined.id, after: joined.head, most: 5 }).await.unwrap();
        assert_eq!((pulled.missed, pulled.frames.len(), pulled.frames.first().unwrap().seq), (10, 5, 11));
        let pulled = hub.send(Pull { id: joined.id, after: frames - 1, most: 5 }).await.unwrap();
        assert_eq!((pulled.missed, pulled.frames.len()), (0, 1));
        let pulled = hub.send(Pull { id: joined.id, after: frames + 100, most: 5 }).await.unwrap();
        assert_eq!((pulled.missed, pulled.frames.len()), (0, 0));
    }
}
