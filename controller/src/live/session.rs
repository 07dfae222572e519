//! One WebSocket session.
//!
//! Owns: its subscription, its position, the count of batches that its client has not acknowledged.
//! Never: has more than two batches in its socket's buffer: it pulls again when the pong behind a batch came.
//! A crash here costs one connection; the client comes back with `since`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use actix_web::web;
use actix_web_actors::ws::{self, CloseCode, CloseReason, ProtocolError, WebsocketContext};
use serde::Deserialize;
use serde_json::{Value, json};

use super::hub::{Hub, Join, Leave, Numbered, Pull, Pulled, Wake};
use crate::access::Caller;
use crate::app::App;

/// Frames of one batch.
const BATCH: usize = 256;
/// Batches that may be unacknowledged.
const WINDOW: u32 = 2;
/// How often a session looks after itself.
const TICK: Duration = Duration::from_secs(5);
/// A client that has not been heard from this long is gone.
const SILENCE: Duration = Duration::from_secs(60);
/// A client that lagged this often in a row is closed.
const LAGS: u32 = 3;
/// Most topics of a session.
const TOPICS: usize = 1000;

/// What a client says.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Command {
    action: Action,
    topics: Vec<String>,
    #[serde(default)]
    since: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    Subscribe,
    Unsubscribe,
}

pub(super) struct Session {
    app: web::Data<App>,
    hub: Addr<Hub>,
    caller: Caller,
    id: u64,
    /// Number of the last frame that was pulled.
    cursor: u64,
    /// `None`: everything that the role may see.
    topics: Option<HashSet<String>>,
    unacknowledged: u32,
    batch: u64,
    is_pulling: bool,
    has_news: bool,
    lags: u32,
    heard: Instant,
}

impl Session {
    pub(super) fn new(app: web::Data<App>, caller: Caller) -> Self {
        let hub = app.live.hub.clone();
        Self {
            app,
            hub,
            caller,
            id: 0,
            cursor: 0,
            topics: None,
            unacknowledged: 0,
            batch: 0,
            is_pulling: false,
            has_news: false,
            lags: 0,
            heard: Instant::now(),
        }
    }

    /// A frame of this session's own; it has the number of the last frame before it.
    fn say(&self, context: &mut WebsocketContext<Self>, kind: &str, data: Value) {
        let time = shared::clock::rfc3339(shared::clock::now());
        context.text(json!({"type": kind, "time": time, "seq": self.cursor, "data": data}).to_string());
    }

    fn end(&self, context: &mut WebsocketContext<Self>, code: CloseCode, why: &str) {
        context.close(Some(CloseReason { code, description: Some(why.to_owned()) }));
        context.stop();
    }

    fn pull(&mut self, context: &mut WebsocketContext<Self>) {
        if self.is_pulling || self.unacknowledged >= WINDOW || self.id == 0 {
            self.has_news = true;
            return;
        }
        self.is_pulling = true;
        self.has_news = false;
        let pull = self.hub.send(Pull { id: self.id, after: self.cursor, most: BATCH });
        let then = |pulled: Result<Pulled, MailboxError>, session: &mut Self, context: &mut WebsocketContext<Self>| {
            session.is_pulling = false;
            match pulled {
                Ok(pulled) => session.deliver(pulled, context),
                Err(_) => session.end(context, CloseCode::Away, "the server goes away"),
            }
        };
        context.spawn(pull.into_actor(self).map(then));
    }

    fn deliver(&mut self, pulled: Pulled, context: &mut WebsocketContext<Self>) {
        if pulled.missed > 0 {
            self.cursor = self.cursor.saturating_add(pulled.missed);
            self.lags += 1;
            self.say(context, "lagged", json!({ "missed": pulled.missed }));
            if self.lags >= LAGS {
                return self.end(context, CloseCode::Policy, "this reader is too slow");
            }
        }
        let is_full = pulled.more;
        if !is_full && pulled.missed == 0 {
            self.lags = 0;
        }
        if let Some(last) = pulled.frames.last() {
            self.cursor = last.seq;
        }
        let mine: Vec<Arc<Numbered>> = pulled.frames.into_iter().filter(|frame| self.wants(frame)).collect();
        let frames = coalesce(mine);
        for frame in &frames {
            context.text(frame.text.as_str());
        }
        if !frames.is_empty() {
            self.batch += 1;
            self.unacknowledged += 1;
            context.ping(&self.batch.to_be_bytes());
        }
        if is_full || self.has_news {
            self.pull(context);
        }
    }

    fn wants(&self, frame: &Numbered) -> bool {
        let subscribed = self.topics.as_ref().is_none_or(|topics| frame.topics.iter().any(|topic| topics.contains(topic)));
        subscribed && frame.min_role <= self.caller.role
    }

    fn command(&mut self, text: &str, context: &mut WebsocketContext<Self>) {
        let command: Command = match serde_json::from_str(text) {
            Ok(command) => command,
            Err(e) => return self.say(context, "error", json!({"error": format!("the frame cannot be read: {e}"), "code": "bad_request"})),
        };
        if let Some(unknown) = command.topics.iter().find(|topic| !is_topic(topic)) {
            let known = "jobs, job:JOB-ID, metrics, alerts, agents";
            let shown: String = unknown.chars().take(60).collect();
            return self.say(
                context,
                "error",
                json!({"error": format!("topic `{shown}` is unknown; known: {known}"), "code": "bad_request"}),
            );
        }
        match command.action {
            Action::Subscribe => {
                let topics = self.topics.get_or_insert_with(HashSet::new);
                if topics.len() + command.topics.len() > TOPICS {
                    return self.say(context, "error", json!({"error": format!("at most {TOPICS} topics"), "code": "bad_request"}));
                }
                topics.extend(command.topics);
                if let Some(since) = command.since {
                    // A number from before the server's start says nothing about what was missed since.
                    if since > self.cursor {
                        self.say(context, "lagged", json!({ "missed": null }));
                    }
                    self.cursor = self.cursor.min(since);
                }
            }
            Action::Unsubscribe => {
                let topics = self.topics.get_or_insert_with(|| ["jobs", "metrics", "alerts", "agents"].map(str::to_owned).into());
                for topic in &command.topics {
                    topics.remove(topic);
                }
            }
        }
        self.pull(context);
    }

    /// A revoked or expired token ends its sessions too.
    fn look_after(&mut self, context: &mut WebsocketContext<Self>) {
        if self.heard.elapsed() > SILENCE {
            return self.end(context, CloseCode::Policy, "no answer to pings");
        }
        if self.unacknowledged == 0 {
            context.ping(b"");
        }
        let (app, caller) = (self.app.clone(), self.caller.clone());
        let check = async move { app.access.is_alive(&caller).await };
        context.spawn(check.into_actor(self).map(|alive, session, context| {
            if !alive {
                session.end(context, CloseCode::Policy, "the token is no longer valid");
            }
        }));
    }
}

fn is_topic(topic: &str) -> bool {
    matches!(topic, "jobs" | "metrics" | "alerts" | "agents")
        || topic.strip_prefix("job:").is_some_and(|id| id.parse::<shared::ids::JobId>().is_ok())
}

/// Of frames that replace one another only the last stays.
fn coalesce(frames: Vec<Arc<Numbered>>) -> Vec<Arc<Numbered>> {
    let mut last: HashMap<String, u64> = HashMap::new();
    for frame in &frames {
        if let Some(key) = &frame.coalesce {
            last.insert(key.clone(), frame.seq);
        }
    }
    frames.into_iter().filter(|frame| frame.coalesce.as_ref().is_none_or(|key| last.get(key) == Some(&frame.seq))).collect()
}

impl Actor for Session {
    type Context = WebsocketContext<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.run_interval(TICK, |session, context| session.look_after(context));
        let join = self.hub.send(Join(context.address().recipient()));
        let then = |joined: Result<super::hub::Joined, MailboxError>, session: &mut Self, context: &mut WebsocketContext<Self>| {
            let Ok(joined) = joined else { return session.end(context, CloseCode::Away, "the server goes away") };
            session.id = joined.id;
            session.cursor = joined.head;
            let data = json!({
                "user": session.caller.name,
                "role": session.caller.role,
                "version": env!("CARGO_PKG_VERSION"),
                "started_at": shared::clock::rfc3339(session.app.started_at),
                "oldest": joined.oldest,
                "topics": ["jobs", "job:JOB-ID", "metrics", "alerts", "agents"],
            });
            session.say(context, "hello", data);
            session.pull(context);
        };
        context.wait(join.into_actor(self).map(then));
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        self.hub.do_send(Leave(self.id));
    }
}

impl Handler<Wake> for Session {
    type Result = ();

    fn handle(&mut self, wake: Wake, context: &mut Self::Context) {
        if wake.close {
            return self.end(context, CloseCode::Away, "the server goes away");
        }
        self.pull(context);
    }
}

impl StreamHandler<Result<ws::Message, ProtocolError>> for Session {
    fn handle(&mut self, message: Result<ws::Message, ProtocolError>, context: &mut Self::Context) {
        self.heard = Instant::now();
        match message {
            Ok(ws::Message::Text(text)) => self.command(&text, context),
            Ok(ws::Message::Ping(bytes)) => context.pong(&bytes),
            Ok(ws::Message::Pong(bytes)) => {
                let Ok(number) = <[u8; 8]>::try_from(bytes.as_ref()) else { return };
                // A pong answers its batch and all before it.
                let open = self.batch.saturating_sub(u64::from_be_bytes(number));
                self.unacknowledged = self.unacknowledged.min(u32::try_from(open).unwrap_or(u32::MAX));
                if self.has_news {
                    self.pull(context);
                }
            }
            Ok(ws::Message::Close(_)) => {
                context.close(None);
                context.stop();
            }
            Ok(ws::Message::Binary(_) | ws::Message::Continuation(_)) => {
                self.end(context, CloseCode::Unsupported, "send JSON text in one frame")
            }
            Ok(ws::Message::Nop) => {}
            Err(_) => self.end(context, CloseCode::Protocol, "malformed frame"),
        }
    }
}
