//! A disk that comes as a stream of an export lease.
//!
//! ```text
//! connection ─► splitter (a thread) ─► grains between FLOOR and AHEAD of the furthest reader ─► read_at: wait, inflate
//! ```
//! Owns: the grains in memory, and that a stream that breaks is asked for again from its beginning. Never: gives a byte of a grain that has
//! not come. What no grain holds is zeros only once a later grain or the end of the stream has come.
//! A crash here costs the grains in memory: the stream is asked for again.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;

use super::client::Error;
use super::lease::{DeviceUrl, Lease};
use super::wire::Fault;
use crate::formats::vmdk::stream::Splitter;
use crate::formats::{Disk, Extent, FormatError, Packing, Scratch, UNIT};
use crate::sources::{Moved, Stopping};

/// Bytes of the disk that are kept behind the furthest reader, for those that are slower.
const FLOOR: u64 = 64 << 20;
/// Bytes of the disk that may be in memory before somebody asks for them.
const AHEAD: u64 = 32 << 20;
/// How often a reader that waits looks whether its job is to stop.
const LOOK: Duration = Duration::from_millis(300);
/// How often a stream may break.
const TRIES: u32 = 5;

struct State {
    grains: BTreeMap<u64, Arc<Vec<u8>>>,
    /// Every grain below this number has come or never will.
    passed: u64,
    /// The furthest grain that somebody asked for.
    wanted: u64,
    /// Set at the end: what went wrong, if anything.
    ended: Option<Result<(), String>>,
    /// Nobody reads any more.
    closed: bool,
}

struct Shared {
    /// Bytes of the stream that came.
    moved: Moved,
    state: Mutex<State>,
    news: Condvar,
}

/// A disk read from a lease's URL. The stream begins when somebody reads.
pub struct Streamed {
    lease: Arc<Lease>,
    device: DeviceUrl,
    capacity: u64,
    shared: Arc<Shared>,
    started: AtomicBool,
    stopping: Stopping,
}

/// Bytes of a grain; the specification allows others, nobody streams them.
const GRAIN: u64 = UNIT as u64;

impl Streamed {
    /// The lease's disk number `index`, which has so many bytes. `moved` counts what comes of the stream.
    pub fn new(lease: Arc<Lease>, index: usize, capacity: u64, moved: Moved, stopping: Stopping) -> Option<Self> {
        let device = lease.disks.get(index).cloned()?;
        let state = State { grains: BTreeMap::new(), passed: 0, wanted: 0, ended: None, closed: false };
        let shared = Arc::new(Shared { moved, state: Mutex::new(state), news: Condvar::new() });
        Some(Self { lease, device, capacity, shared, started: AtomicBool::new(false), stopping })
    }

    fn start(&self) {
        if self.started.swap(true, Ordering::AcqRel) {
            return;
        }
        let (lease, device, capacity, shared) = (self.lease.clone(), self.device.clone(), self.capacity, self.shared.clone());
        let spawned = std::thread::Builder::new().name("stream".to_owned()).spawn(move || {
            let outcome = pump(&lease, &device, capacity, &shared);
            let is_whole = outcome.is_ok();
            shared.state.lock().unwrap_or_else(PoisonError::into_inner).ended = Some(outcome);
            shared.news.notify_all();
            if is_whole {
                lease.passed_whole();
            }
        });
        if let Err(e) = spawned {
            self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).ended = Some(Err(format!("no thread for a stream: {e}")));
        }
    }

    /// The grain as it is stored, once it is certain; none: zeros.
    fn grain(&self, number: u64) -> Result<Option<Arc<Vec<u8>>>, FormatError> {
        self.start();
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.wanted < number {
            state.wanted = number;
            let floor = number.saturating_sub(FLOOR / GRAIN);
            while state.grains.first_key_value().is_some_and(|(oldest, _)| *oldest < floor) {
                state.grains.pop_first();
            }
            self.shared.news.notify_all();
        }
        loop {
            if let Some(grain) = state.grains.get(&number) {
                return Ok(Some(grain.clone()));
            }
            if number < state.wanted.saturating_sub(FLOOR / GRAIN) {
                let message = format!("the stream has passed grain {number} long ago");
                return Err(FormatError::Io(io::Error::other(message)));
            }
            if number < state.passed {
                return Ok(None);
            }
            match &state.ended {
                Some(Ok(())) => return Ok(None),
                Some(Err(message)) => return Err(FormatError::Io(io::Error::other(message.clone()))),
                // A server that says nothing must not keep a job from being cancelled.
                None if self.stopping.load(Ordering::Acquire) != 0 => return Err(FormatError::Io(io::ErrorKind::Interrupted.into())),
                None => state = self.shared.news.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0,
            }
        }
    }

    fn inflate(&self, number: u64, packed: &[u8], plain: &mut [u8], scratch: &mut Scratch) -> Result<(), FormatError> {
        let wrong = |reason: String| FormatError::Corrupt { format: "vmdk", what: "grain", index: number, offset: number * GRAIN, reason };
        let inflate = scratch.inflate.get_or_insert_with(libdeflater::Decompressor::new);
        let length = inflate.zlib_decompress(packed, plain).map_err(|e| wrong(format!("it does not inflate: {e}")))?;
        let logical = self.capacity.saturating_sub(number * GRAIN).min(GRAIN);
        if length as u64 != GRAIN && length as u64 != logical {
            return Err(wrong(format!("it unpacks to {length} bytes, {GRAIN} would be right")));
        }
        plain[length..].fill(0);
        Ok(())
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.shared.news.notify_all();
    }
}

/// Reads the stream to its end, again where it breaks; what has been passed is passed by.
fn pump(lease: &Lease, device: &DeviceUrl, capacity: u64, shared: &Shared) -> Result<(), String> {
    let mut tries = 0;
    loop {
        let error = match attempt(lease, device, capacity, shared) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        tries += 1;
        if shared.state.lock().unwrap_or_else(PoisonError::into_inner).closed {
            return Err("nobody reads any more".to_owned());
        }
        match error {
            Broken::Passing(message) if tries < TRIES => {
                tracing::debug!(message, tries, "a stream is asked for again");
                std::thread::sleep(Duration::from_millis(300) * tries);
            }
            Broken::Passing(message) => return Err(format!("{message}, {tries} times")),
            Broken::Fatal(message) => return Err(message),
        }
    }
}

enum Broken {
    Passing(String),
    Fatal(String),
}

fn attempt(lease: &Lease, device: &DeviceUrl, capacity: u64, shared: &Shared) -> Result<(), Broken> {
    let broken = |e: FormatError| match e {
        FormatError::Io(e) => Broken::Passing(format!("the stream broke: {e}")),
        e => Broken::Fatal(e.to_string()),
    };
    let body = Body::open(lease, device, shared.moved.clone()).map_err(|e| match e {
        // The next try has a new session.
        e if e.is_passing() || matches!(e, Error::Fault(Fault::NotAuthenticated)) => Broken::Passing(e.told(lease.client.host()).message),
        e => Broken::Fatal(e.told(lease.client.host()).message),
    })?;
    let mut splitter = Splitter::open(io::BufReader::with_capacity(256 << 10, body)).map_err(broken)?;
    if splitter.capacity() != capacity || splitter.grain() != GRAIN {
        let (found, grain) = (splitter.capacity(), splitter.grain());
        return Err(Broken::Fatal(format!("the stream is of {found} bytes in grains of {grain}, the disk has {capacity}")));
    }
    while let Some((number, packed)) = splitter.next_grain().map_err(broken)? {
        let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        if number < state.passed {
            continue;
        }
        // What lies before it is certain now, whether or not there is room for it: whoever waits for zeros must not wait for room.
        lease.passed.fetch_add((number + 1 - state.passed) * GRAIN, Ordering::Relaxed);
        state.passed = number;
        shared.news.notify_all();
        while !state.closed && number > state.wanted + AHEAD / GRAIN {
            state = shared.news.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return Err(Broken::Fatal("nobody reads any more".to_owned()));
        }
        if number >= state.wanted.saturating_sub(FLOOR / GRAIN) {
            state.grains.insert(number, Arc::new(packed));
        }
        state.passed = number + 1;
        shared.news.notify_all();
    }
    Ok(())
}

/// A response's body as a reader.
struct Body {
    moved: Moved,
    pieces: mpsc::Receiver<Result<bytes::Bytes, String>>,
    piece: bytes::Bytes,
}

impl Body {
    fn open(lease: &Lease, device: &DeviceUrl, moved: Moved) -> Result<Self, Error> {
        let client = lease.client.clone();
        let opened = lease.runtime.block_on(async {
            let turn = client.budget().turn().await;
            let session = client.session().await?;
            let answer = client.nfc(&session, &device.url, &device.thumbprint).await;
            match answer {
                Err(Error::Busy(_)) => client.budget().slow_down(),
                Err(Error::Fault(Fault::NotAuthenticated)) => client.forget(&session).await,
                _ => {}
            }
            answer.map(|answer| (answer, turn))
        });
        let (mut answer, turn) = opened?;
        let (send, pieces) = mpsc::channel(16);
        lease.runtime.spawn(async move {
            // It ends with the stream.
            let _turn = turn;
            loop {
                let piece = match answer.chunk().await {
                    Ok(Some(piece)) => Ok(piece),
                    Ok(None) => return,
                    Err(e) => Err(match client.unreachable(&e) {
                        Error::Unreachable(cause) => cause,
                        other => format!("{other:?}"),
                    }),
                };
                let is_last = piece.is_err();
                if send.send(piece).await.is_err() || is_last {
                    return;
                }
            }
        });
        Ok(Self { moved, pieces, piece: bytes::Bytes::new() })
    }
}

impl Read for Body {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(Ok(piece)) => {
                    self.moved.fetch_add(piece.len() as u64, Ordering::Relaxed);
                    self.piece = piece;
                }
                Some(Err(message)) => return Err(io::Error::new(io::ErrorKind::ConnectionAborted, message)),
                None => return Ok(0),
            }
        }
        let count = buf.len().min(self.piece.len());
        buf[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}

impl Disk for Streamed {
    fn format(&self) -> &'static str {
        "vmdk"
    }

    fn subformat(&self) -> &str {
        "streamOptimized"
    }

    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn knows_holes(&self) -> bool {
        false
    }

    /// What a stream holds is known when it has come: all of it may be data.
    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>, FormatError> {
        let end = to.min(self.capacity);
        Ok(if from < end { vec![Extent { offset: from, len: end - from }] } else { Vec::new() })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<(), FormatError> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.capacity) {
            return Err(FormatError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (number, within) = (at / GRAIN, (at % GRAIN) as usize);
            let count = rest.len().min(UNIT - within);
            let (now, later) = rest.split_at_mut(count);
            match self.grain(number)? {
                None => now.fill(0),
                Some(packed) if count == UNIT => self.inflate(number, &packed, now, scratch)?,
                Some(packed) => {
                    let mut plain = std::mem::take(&mut scratch.plain);
                    plain.resize(plain.len().max(UNIT), 0);
                    let inflated = self.inflate(number, &packed, &mut plain[..UNIT], scratch);
                    now.copy_from_slice(&plain[within..within + count]);
                    scratch.plain = plain;
                    inflated?;
                }
            }
            (rest, at) = (later, at + count as u64);
        }
        Ok(())
    }

    fn packs(&self, want: Packing) -> bool {
        matches!(want, Packing::Zlib | Packing::Deflate)
    }

    fn packed<'s>(&self, unit: u64, want: Packing, plain: &mut [u8], scratch: &'s mut Scratch) -> Result<Option<&'s [u8]>, FormatError> {
        if unit.saturating_add(1).saturating_mul(GRAIN) > self.capacity {
            return Ok(None);
        }
        let Some(packed) = self.grain(unit)? else { return Ok(None) };
        self.inflate(unit, &packed, plain, scratch)?;
        // What lies behind the checksum is nobody's data and is not passed on.
        let is_whole = packed.last_chunk::<4>().is_some_and(|told| u32::from_be_bytes(*told) == libdeflater::adler32(plain));
        if !is_whole || packed.len() < 6 {
            return Ok(None);
        }
        scratch.packed.clear();
        scratch.packed.extend_from_slice(match want {
            Packing::Zlib => &packed,
            Packing::Deflate => &packed[2..packed.len() - 4],
        });
        Ok(Some(&scratch.packed))
    }
}
