//! A flat disk of a datastore, read by ranges over `/folder`.
//!
//! ```text
//! read_at ─► chunk there? ─yes─► copy            up to AHEAD chunks are fetched before they are asked for,
//!                 └─no─► fetch, and those behind it        each by a request of its own: so many connections at most
//! ```
//! Owns: which chunks are in memory (at most KEPT of 2 MiB a disk), how often a request is tried again and how long.
//! Never: takes a byte that is not of the range that was asked for: 206 with that range and length, or it is no answer.
//! A crash here costs the chunks in memory; the journal says where a copy goes on.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, LAST_MODIFIED};
use shared::segment::segment;
use tokio::runtime::Handle;

use super::client::{Client, Error};
use super::wire::Fault;
use crate::formats::over::clipped;
use crate::formats::{Disk, Extent, FormatError, Scratch};
use crate::sources::{Moved, Stopping};

/// Bytes of a request.
const CHUNK: u64 = 2 << 20;
/// Chunks that are asked for before they are needed.
const AHEAD: u64 = 8;
/// Chunks kept in memory, those on their way among them.
const KEPT: usize = 16;
/// Longest time for a request.
const REQUEST: Duration = Duration::from_secs(60);
/// How long a chunk is tried again.
const PATIENCE: Duration = Duration::from_secs(180);
/// How often a file is asked for again before it is read.
const OPENING: u32 = 4;
/// How many sessions may run out under one request.
const RENEWALS: u32 = 3;
/// How often a reader that waits looks whether its job is to stop.
const LOOK: Duration = Duration::from_millis(300);
/// How often a server may answer something else than the range before that is its last word.
const WRONG: u32 = 5;

/// `[datastore] folder/file` as people and the API write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatastorePath {
    /// The datastore's name.
    pub datastore: String,
    /// The path in it.
    pub path: String,
}

impl DatastorePath {
    /// Parses one.
    pub fn parse(text: &str) -> Option<Self> {
        let (datastore, path) = text.strip_prefix('[')?.split_once(']')?;
        let path = path.trim_start();
        let clean = !datastore.is_empty() && !path.is_empty() && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
        clean.then(|| Self { datastore: datastore.to_owned(), path: path.to_owned() })
    }

    /// A file beside it, by its bare name.
    pub fn beside(&self, name: &str) -> Self {
        let path = self.path.rsplit_once('/').map_or_else(|| name.to_owned(), |(folder, _)| format!("{folder}/{name}"));
        Self { datastore: self.datastore.clone(), path }
    }

    /// Path and query of its URL.
    pub fn url(&self, datacenter: &str) -> String {
        let path: Vec<String> = self.path.split('/').map(segment).collect();
        format!("/folder/{}?dcPath={}&dsName={}", path.join("/"), segment(datacenter), segment(&self.datastore))
    }
}

/// Where a fetched chunk will lie.
struct Slot {
    bytes: Mutex<Option<Result<Vec<u8>, Arc<str>>>>,
    there: Condvar,
    spare: Arc<Spare>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(Ok(bytes)) = self.bytes.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            self.spare.put(bytes);
        }
    }
}

/// Buffers of chunks that nobody needs any more: memory that is there costs no page faults.
#[derive(Default)]
struct Spare(Mutex<Vec<Vec<u8>>>);

impl Spare {
    fn take(&self) -> Vec<u8> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        bytes.clear();
        bytes
    }

    fn put(&self, bytes: Vec<u8>) {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < KEPT {
            spare.push(bytes);
        }
    }
}

/// A file of a datastore that does not change while it is read.
pub struct Remote {
    client: Arc<Client>,
    runtime: Handle,
    /// Path and query.
    url: String,
    /// For messages.
    name: String,
    size: u64,
    /// `Last-Modified` of the first answer: another one later is another file.
    modified: Option<String>,
}

impl Remote {
    /// Looks at the file: its size, and when it was written.
    pub async fn open(client: Arc<Client>, runtime: Handle, url: String, name: String) -> Result<Self, Error> {
        let mut tries = 0;
        let answer = loop {
            // Who gives up here goes another way and begins anew: what passes is waited for.
            match client.within(async |session| client.folder(session, &url, Some((0, 0)), REQUEST).await).await {
                Err(e) if e.is_passing() && tries < OPENING => {
                    tries += 1;
                    let asked = if let Error::Busy(wait) = e { wait } else { Duration::ZERO };
                    tokio::time::sleep((Duration::from_millis(300) * tries).max(asked.min(Duration::from_secs(5)))).await;
                }
                answered => break answered?,
            }
        };
        let total = answer.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()?.strip_prefix("bytes 0-0/")?.parse().ok());
        let (StatusCode::PARTIAL_CONTENT, Some(size)) = (answer.status(), total) else {
            return Err(Error::Odd(format!("{name} is not given by ranges (HTTP {})", answer.status().as_u16())));
        };
        let modified = answer.headers().get(LAST_MODIFIED).and_then(|value| value.to_str().ok()).map(str::to_owned);
        Ok(Self { client, runtime, url, name, size, modified })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What makes it the same file later.
    pub fn identity(&self) -> String {
        format!("{}:{}:{}", self.name, self.size, self.modified.as_deref().unwrap_or("unknown"))
    }

    /// A small file, whole.
    pub async fn read_whole(&self, most: u64) -> Result<Vec<u8>, String> {
        if self.size > most {
            return Err(format!("{} has {} bytes, {most} would be the most", self.name, self.size));
        }
        if self.size == 0 { Ok(Vec::new()) } else { self.fetch(0, self.size, Vec::new()).await }
    }

    /// `length` bytes from `offset` in `bytes`, however often it takes.
    async fn fetch(&self, offset: u64, length: u64, mut bytes: Vec<u8>) -> Result<Vec<u8>, String> {
        let end = Instant::now() + PATIENCE;
        let (mut pause, mut wrong, mut renewed) = (Duration::from_millis(200), 0, 0);
        loop {
            let asked = match self.client.session().await {
                Ok(session) => {
                    let _turn = self.client.budget().turn().await;
                    self.range(&session, offset, length, &mut bytes).await.map_err(|e| (e, Some(session)))
                }
                Err(e) => Err((e, None)),
            };
            let (error, session) = match asked {
                Ok(()) => return Ok(bytes),
                Err(failed) => failed,
            };
            let wait = match (&error, &session) {
                (Error::Busy(wait), _) => {
                    self.client.budget().slow_down();
                    (*wait).max(pause)
                }
                // The session ran out under the copy; where new ones are refused as well, that is an answer.
                (Error::Fault(Fault::NotAuthenticated), Some(session)) if renewed < RENEWALS => {
                    self.client.forget(session).await;
                    renewed += 1;
                    continue;
                }
                // Something in between may have cut it short or lost the range.
                (Error::Odd(_), _) if wrong < WRONG => {
                    wrong += 1;
                    pause
                }
                (error, _) if error.is_passing() => pause,
                _ => return Err(format!("{}: {}", self.name, error.told(self.client.host()).message)),
            };
            if Instant::now() + wait > end {
                return Err(format!("{}: {}, for {} s", self.name, error.told(self.client.host()).message, PATIENCE.as_secs()));
            }
            tracing::debug!(file = self.name, offset, ?error, "a range is asked for again");
            tokio::time::sleep(wait.mul_f64(0.5 + rand::random::<f64>() / 2.0)).await;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
    }

    async fn range(&self, session: &super::client::Session, offset: u64, length: u64, bytes: &mut Vec<u8>) -> Result<(), Error> {
        let last = offset + length - 1;
        let mut answer = self.client.folder(session, &self.url, Some((offset, last)), REQUEST).await?;
        if answer.status() != StatusCode::PARTIAL_CONTENT {
            return Err(Error::Odd(format!("it answered {} to a range, 206 is the answer", answer.status().as_u16())));
        }
        let header = |name| answer.headers().get(name).and_then(|value: &reqwest::header::HeaderValue| value.to_str().ok());
        let expected = format!("bytes {offset}-{last}/{}", self.size);
        if header(CONTENT_RANGE) != Some(&expected) {
            return Err(Error::Odd(format!("it gave {:?} of {expected}", header(CONTENT_RANGE).unwrap_or("no range"))));
        }
        if self.modified.is_some() && header(LAST_MODIFIED) != self.modified.as_deref() {
            let message = "it was written while it was read; is the VM on?".to_owned();
            return Err(Error::Fault(Fault::Other("FileChanged".to_owned(), message)));
        }
        // Lengths are of CHUNK or less.
        bytes.clear();
        bytes.reserve(usize::try_from(length).unwrap_or_default());
        while let Some(piece) = answer.chunk().await.map_err(|e| self.client.unreachable(&e))? {
            if (bytes.len() + piece.len()) as u64 > length {
                return Err(Error::Odd(format!("it sent more than the {length} bytes of the range")));
            }
            bytes.extend_from_slice(&piece);
        }
        if bytes.len() as u64 != length {
            return Err(Error::Unreachable(format!("{} of {length} bytes came", bytes.len())));
        }
        Ok(())
    }
}

/// A file, and where in it something begins.
pub type FileAt = (Arc<Remote>, u64);

/// The disk behind a descriptor: its flat extents in order.
pub struct Flat {
    extents: Vec<Part>,
    capacity: u64,
}

struct Part {
    /// Where it begins on the disk.
    start: u64,
    len: u64,
    /// None: zeros.
    file: Option<Chunked>,
}

struct Chunked {
    remote: Arc<Remote>,
    /// Where the extent begins in its file.
    base: u64,
    /// What of it is read, in chunks; none: all of it.
    pieces: Option<Vec<Extent>>,
    /// Bytes that came.
    moved: Moved,
    slots: Mutex<BTreeMap<u64, Arc<Slot>>>,
    spare: Arc<Spare>,
    stopping: Stopping,
}

impl Flat {
    /// Of extents in order: length in bytes, and the file with the offset in it.
    ///
    /// With `areas` (tidy) only these are read, and nothing beside them is asked for. `moved` counts the bytes that come.
    pub fn new(extents: Vec<(u64, Option<FileAt>)>, areas: Option<&[Extent]>, moved: &Moved, stopping: &Stopping) -> Self {
        let mut start = 0;
        let mut parts = Vec::with_capacity(extents.len());
        for (len, file) in extents {
            let file = file.map(|(remote, base)| Chunked {
                remote,
                base,
                pieces: areas.map(|areas| pieces(areas, start, len)),
                moved: moved.clone(),
                slots: Mutex::default(),
                spare: Arc::default(),
                stopping: stopping.clone(),
            });
            parts.push(Part { start, len, file });
            start += len;
        }
        Self { extents: parts, capacity: start }
    }
}

/// The areas inside `[start, start + len)` of a disk, counted from `start`, in chunks.
fn pieces(areas: &[Extent], start: u64, len: u64) -> Vec<Extent> {
    let inside = clipped(areas, start, start + len);
    let cut = |area: Extent| {
        let from = area.offset - start;
        (0..area.len.div_ceil(CHUNK)).map(move |n| Extent { offset: from + n * CHUNK, len: CHUNK.min(area.len - n * CHUNK) })
    };
    inside.into_iter().flat_map(cut).collect()
}

impl Chunked {
    /// Chunk `number` of a part of `end` bytes; none behind the last.
    fn chunk(&self, number: u64, end: u64) -> Option<Extent> {
        match &self.pieces {
            Some(pieces) => pieces.get(usize::try_from(number).ok()?).copied(),
            None => {
                let offset = number.checked_mul(CHUNK).filter(|offset| *offset < end)?;
                Some(Extent { offset, len: CHUNK.min(end - offset) })
            }
        }
    }

    /// The chunk that holds a byte.
    fn number(&self, offset: u64) -> u64 {
        match &self.pieces {
            Some(pieces) => pieces.partition_point(|piece| piece.offset + piece.len <= offset) as u64,
            None => offset / CHUNK,
        }
    }

    /// The chunk of this number, on its way if it was not there; those behind it are sent for as well, up to `end` of the extent.
    fn slot(&self, number: u64, end: u64) -> Option<Arc<Slot>> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever reads here and there wants no more than what he asks for.
        let is_in_order = slots.contains_key(&number) || number == 0 || slots.contains_key(&(number - 1));
        for wanted in number..number + if is_in_order { AHEAD } else { 1 } {
            let Some(chunk) = self.chunk(wanted, end) else { break };
            slots.entry(wanted).or_insert_with(|| self.begin(chunk));
        }
        // Small areas are many; their bytes are what counts.
        let held =
            |slots: &BTreeMap<u64, Arc<Slot>>| slots.keys().filter_map(|kept| self.chunk(*kept, end)).map(|chunk| chunk.len).sum::<u64>();
        while slots.len() > KEPT && held(&slots) > KEPT as u64 * CHUNK {
            let Some(far) = slots.keys().copied().max_by_key(|kept| kept.abs_diff(number)) else { break };
            slots.remove(&far);
        }
        slots.get(&number).cloned()
    }

    fn begin(&self, chunk: Extent) -> Arc<Slot> {
        let slot = Arc::new(Slot { bytes: Mutex::default(), there: Condvar::new(), spare: self.spare.clone() });
        let (remote, filled, moved) = (self.remote.clone(), slot.clone(), self.moved.clone());
        let from = self.base + chunk.offset;
        self.remote.runtime.spawn(async move {
            let fetched = remote.fetch(from, chunk.len, filled.spare.take()).await.map_err(Arc::from);
            moved.fetch_add(fetched.as_ref().map_or(0, |bytes| bytes.len() as u64), Ordering::Relaxed);
            *filled.bytes.lock().unwrap_or_else(PoisonError::into_inner) = Some(fetched);
            filled.there.notify_all();
        });
        slot
    }

    fn read(&self, mut offset: u64, mut buf: &mut [u8], end: u64) -> Result<(), FormatError> {
        while !buf.is_empty() {
            let number = self.number(offset);
            let begins = self.chunk(number, end).map(|chunk| chunk.offset).filter(|begins| *begins <= offset);
            let (Some(begins), Some(slot)) = (begins, self.slot(number, end)) else {
                let text = format!("byte {offset} of {} is not among what was to be read", self.remote.name);
                return Err(FormatError::Io(std::io::Error::other(text)));
            };
            let mut bytes = slot.bytes.lock().unwrap_or_else(PoisonError::into_inner);
            while bytes.is_none() {
                // A server that says nothing must not keep a job from being cancelled.
                if self.stopping.load(Ordering::Acquire) != 0 {
                    return Err(FormatError::Io(std::io::ErrorKind::Interrupted.into()));
                }
                bytes = slot.there.wait_timeout(bytes, LOOK).unwrap_or_else(PoisonError::into_inner).0;
            }
            let chunk = match bytes.as_ref() {
                Some(Ok(chunk)) => chunk,
                Some(Err(message)) => {
                    let message = message.to_string();
                    drop(bytes);
                    // Whoever asks again gets another try.
                    self.slots.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
                    return Err(FormatError::Io(std::io::Error::other(message)));
                }
                None => continue,
            };
            // Within a chunk of 2 MiB.
            let within = usize::try_from(offset - begins).unwrap_or_default();
            let count = buf.len().min(chunk.len().saturating_sub(within));
            if count == 0 {
                return Err(FormatError::Io(std::io::ErrorKind::UnexpectedEof.into()));
            }
            let (now, rest) = buf.split_at_mut(count);
            now.copy_from_slice(&chunk[within..within + count]);
            (buf, offset) = (rest, offset + count as u64);
        }
        Ok(())
    }
}

impl Disk for Flat {
    fn format(&self) -> &'static str {
        "vmdk"
    }

    fn subformat(&self) -> &str {
        "vmfs"
    }

    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn knows_holes(&self) -> bool {
        false
    }

    /// A datastore does not tell its holes: all of a file may be data.
    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>, FormatError> {
        let mut runs: Vec<Extent> = Vec::new();
        for part in self.extents.iter().filter(|part| part.file.is_some()) {
            let (start, end) = (part.start.max(from), (part.start + part.len).min(to.min(self.capacity)));
            if start >= end {
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.offset + last.len == start => last.len += end - start,
                _ => runs.push(Extent { offset: start, len: end - start }),
            }
        }
        Ok(runs)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], _: &mut Scratch) -> Result<(), FormatError> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.capacity);
        let Some(end) = end else { return Err(FormatError::Io(std::io::ErrorKind::UnexpectedEof.into())) };
        for part in &self.extents {
            let (from, to) = (part.start.max(offset), (part.start + part.len).min(end));
            if from >= to {
                continue;
            }
            // Both lie inside `buf`, whose length is a usize.
            let within = usize::try_from(from - offset).unwrap_or_default()..usize::try_from(to - offset).unwrap_or_default();
            match &part.file {
                Some(file) => file.read(from - part.start, &mut buf[within], part.len)?,
                None => buf[within].fill(0),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::DatastorePath;

    #[test]
    fn a_datastore_path_becomes_a_url_and_nothing_leads_out_of_it() {
        let path = DatastorePath::parse("[SAN 1/a] My VM & co/d%isk ü.vmdk").map(|path| path.beside("d%isk ü-flat.vmdk").url("DC/ö"));
        assert_eq!(path.as_deref(), Some("/folder/My%20VM%20%26%20co/d%25isk%20%C3%BC-flat.vmdk?dcPath=DC%2F%C3%B6&dsName=SAN%201%2Fa"));
        for bad in ["", "x/y", "[] a", "[d]", "[d] ../a", "[d] a//b", "[d] a/./b", "[d] /etc"] {
            assert_eq!(DatastorePath::parse(bad), None, "{bad}");
        }
    }
}
