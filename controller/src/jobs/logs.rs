//! A job's log as a stream: NDJSON for programs, server-sent events for browsers.
//!
//! Owns: the two forms, following until the end. Never: holds lines for a slow reader: each page is read from the store when the last
//! one was sent. A crash here costs one answer; an event stream goes on by `Last-Event-ID`.

use std::collections::VecDeque;
use std::time::Duration;

use actix_web::web::Bytes;
use futures_util::Stream;
use tokio::sync::watch;

use super::logbook::Seen;
use super::store;
use super::view::time;
use crate::http::reply::Error;
use crate::store::Store;
use crate::store::entities::job_logs::Model as Line;

/// Lines read at a time.
const PAGE: u64 = 500;
/// A silent event stream says that it lives, so that proxies keep it.
const ALIVE: Duration = Duration::from_secs(15);

/// In which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One JSON object a line.
    Lines,
    /// `text/event-stream`.
    Events,
}

impl Form {
    fn write(self, line: &Line) -> String {
        let json = serde_json::json!({
            "time": time(line.time), "level": line.level, "stage": line.stage, "message": line.message, "seq": line.seq,
        });
        match self {
            Form::Lines => format!("{json}\n"),
            Form::Events => format!("id: {}\nevent: log\ndata: {json}\n\n", line.seq),
        }
    }
}

struct Reader {
    store: Store,
    job: String,
    form: Form,
    seq: i64,
    ready: VecDeque<Bytes>,
    follow: Option<watch::Receiver<Seen>>,
    done: bool,
}

/// The log after line `after`. With `follow` it goes on until the job ends.
pub fn stream(
    store: Store,
    job: String,
    form: Form,
    after: i64,
    follow: Option<watch::Receiver<Seen>>,
) -> impl Stream<Item = Result<Bytes, Error>> {
    let reader = Reader { store, job, form, seq: after, ready: VecDeque::new(), follow, done: false };
    futures_util::stream::unfold(reader, |mut reader| async move {
        let item = reader.next().await?;
        // A store that is away in the middle ends the stream with an error; the reader goes on where it was.
        reader.done |= item.is_err();
        Some((item, reader))
    })
}

impl Reader {
    async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Some(Ok(chunk));
            }
            if self.done {
                return None;
            }
            // Looked at before reading: what is stored after it is found at the next round.
            // Nobody wakes us any more: this controller is ending, or the job did, which is the last thing that was said.
            let left = self.follow.as_ref().is_some_and(|follow| follow.has_changed().is_err());
            let ended = self.follow.as_mut().is_none_or(|follow| follow.borrow_and_update().ended);
            let lines = match store::logs_after(&self.store, &self.job, self.seq, PAGE).await {
                Ok(lines) => lines,
                Err(error) => return Some(Err(error.into())),
            };
            if let Some(last) = lines.last() {
                self.seq = last.seq;
                let text: String = lines.iter().map(|line| self.form.write(line)).collect();
                self.ready.push_back(Bytes::from(text));
                continue;
            }
            if ended || left {
                self.done = true;
                if ended && self.form == Form::Events {
                    self.ready.push_back(Bytes::from_static(b"event: end\ndata: {}\n\n"));
                }
                continue;
            }
            let Some(follow) = &mut self.follow else { continue };
            let woken = tokio::time::timeout(ALIVE, follow.changed()).await;
            if woken.is_err() && self.form == Form::Events {
                self.ready.push_back(Bytes::from_static(b": alive\n\n"));
            }
        }
    }
}
