//! The jobs' logs on their way into the store, and who follows them.
//!
//! Owns: numbering of lines, batching, waking of followers. Never: keeps a line once it is stored, waits for a follower (they read
//! from the store at their own pace and are only told how far it goes).
//! A crash here costs the lines of the last quarter second.

use std::collections::{HashMap, HashSet};

use tokio::sync::watch;

use super::record::now_millis;
use super::store;
use crate::store::entities::job_logs::Model as Line;
use crate::store::{Error, Store};

/// Longest message in bytes.
const MESSAGE: usize = 4096;
/// Most lines of one job: a log is for people.
const LINES: i64 = 20_000;
/// Most lines that wait for a store that is away.
const WAITING: usize = 50_000;

/// How far a job's log goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Number of the last stored line.
    pub seq: i64,
    /// The job ended and everything about it is stored.
    pub ended: bool,
}

/// The book.
#[derive(Default)]
pub struct Logbook {
    next: HashMap<String, i64>,
    waiting: Vec<Line>,
    ended: HashSet<String>,
    followers: HashMap<String, watch::Sender<Seen>>,
    closed: bool,
}

impl Logbook {
    /// Whether the next number of this job's log is known.
    pub fn knows(&self, job: &str) -> bool {
        self.next.contains_key(job)
    }

    /// The last number that is in the store.
    pub fn resume_at(&mut self, job: &str, last: i64) {
        self.next.entry(job.to_owned()).or_insert(last + 1);
    }

    /// The first lines of a new job, which are stored with the job itself.
    pub fn begin(&mut self, job: &str, stage: &str, lines: impl Iterator<Item = (&'static str, String)>) -> Vec<Line> {
        let (time, mut next) = (now_millis(), 1);
        let lines = lines.map(|(level, message)| {
            let line = Line {
                job: job.to_owned(),
                seq: next,
                time,
                level: level.to_owned(),
                stage: clip(stage, 32),
                message: clip(&message, MESSAGE),
            };
            next += 1;
            line
        });
        let lines = lines.collect();
        self.next.insert(job.to_owned(), next);
        lines
    }

    /// A job that was not stored after all.
    pub fn forget(&mut self, job: &str) {
        self.next.remove(job);
    }

    /// Takes a line; answers it as it will be stored, or nothing where this job has said enough.
    pub fn write(&mut self, job: &str, time: Option<i64>, level: &str, stage: &str, message: &str) -> Option<Line> {
        let next = self.next.entry(job.to_owned()).or_insert(1);
        let seq = *next;
        if seq > LINES || self.waiting.len() >= WAITING {
            return None;
        }
        *next += 1;
        let level = if matches!(level, "debug" | "info" | "warn" | "error") { level } else { "info" };
        let message = if seq == LINES { "this log is full; later lines are dropped" } else { message };
        let line = Line {
            job: job.to_owned(),
            seq,
            time: time.unwrap_or_else(now_millis),
            level: level.to_owned(),
            stage: clip(stage, 32),
            message: clip(message, MESSAGE),
        };
        self.waiting.push(line.clone());
        Some(line)
    }

    /// The job ended: once its lines are stored, followers are told so.
    pub fn end(&mut self, job: &str) {
        self.ended.insert(job.to_owned());
    }

    /// The job goes on after all (retry).
    pub fn reopen(&mut self, job: &str) {
        self.ended.remove(job);
    }

    /// Follows a job's log from now on. `ended` says whether the job is final already.
    pub fn follow(&mut self, job: &str, ended: bool) -> watch::Receiver<Seen> {
        if ended {
            self.end(job);
        }
        if self.closed {
            return watch::channel(Seen::default()).1;
        }
        self.followers.entry(job.to_owned()).or_insert_with(|| watch::channel(Seen::default()).0).subscribe()
    }

    /// The controller is about to end: lets the followers go, whose jobs go on. They come back to the next one.
    pub fn close(&mut self) {
        self.closed = true;
        self.followers.clear();
    }

    /// Whether something waits to be stored or told.
    pub fn is_dirty(&self) -> bool {
        !self.waiting.is_empty() || !self.ended.is_empty()
    }

    /// Stores what waits and wakes the followers. Lines stay here while the store is away.
    pub async fn flush(&mut self, to: &Store) -> Result<(), Error> {
        if !self.waiting.is_empty() {
            store::append_logs(to, self.waiting.clone()).await?;
            for line in self.waiting.drain(..) {
                if let Some(follower) = self.followers.get(&line.job) {
                    follower.send_modify(|seen| seen.seq = line.seq);
                }
            }
        }
        for job in self.ended.drain() {
            self.next.remove(&job);
            if let Some(follower) = self.followers.remove(&job) {
                follower.send_modify(|seen| seen.ended = true);
            }
        }
        self.followers.retain(|_, follower| follower.receiver_count() > 0);
        Ok(())
    }
}

/// The text up to a number of bytes, cut between characters, without NUL (Postgres refuses it).
fn clip(text: &str, most: usize) -> String {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].replace('\0', "\u{fffd}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_numbered_cut_between_characters_and_end_somewhere() {
        let mut book = Logbook::default();
        book.resume_at("job", 7);
        let line = book.write("job", None, "loud", "copying", &"ä".repeat(4000)).unwrap();
        assert_eq!((line.seq, line.level.as_str(), line.message.len()), (8, "info", 4096));
        book.next.insert("job".into(), LINES);
        assert!(book.write("job", None, "info", "copying", "x").unwrap().message.contains("full"));
        assert!(book.write("job", None, "info", "copying", "x").is_none());
    }
}
