//! A disk behind a running QEMU: a network block device over a local socket.
//!
//! ```text
//! connect ─► options: structured replies, contexts (allocation, dirty bitmap), GO ─► READ, BLOCK_STATUS … ─► DISC
//! ```
//! Owns: the protocol's client side, a few connections to one export, the map of what holds data. Never: writes, dials another host.
//! A crash here costs nothing: the server notices the closed socket.
//! Source: the NBD protocol (doc/proto.md of NetworkBlockDevice), fixed newstyle; QEMU, `docs/interop/nbd.txt` for `qemu:dirty-bitmap:`.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::egress;
use crate::formats::over::{clipped, tidy};
use crate::formats::{Disk, Extent, FormatError, Scratch};
use crate::sources::Moved;

const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const STRUCTURED: u32 = 0x668e_33ef;
/// Options.
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const SET_META_CONTEXT: u32 = 10;
/// Replies to options.
const ACK: u32 = 1;
const INFO: u32 = 3;
const META_CONTEXT: u32 = 4;
/// Commands.
const READ: u16 = 0;
const DISCONNECT: u16 = 2;
const BLOCK_STATUS: u16 = 7;
/// Kinds of reply chunks.
const NONE: u16 = 0;
const DATA: u16 = 1;
const HOLE: u16 = 2;
const STATUS: u16 = 5;

/// Longest silence of a server that was asked something.
const SILENCE: Duration = Duration::from_secs(60);
/// Most bytes of one chunk or option reply.
const CHUNK: u32 = 33 << 20;
/// Most replies to an option, and chunks of an answer.
const REPLIES: usize = 64;
const CHUNKS: usize = 100_000;
/// Longest time for an answer.
const COMMAND: Duration = Duration::from_secs(180);
/// Bytes of one READ.
const PIECE: usize = 4 << 20;
/// Bytes of disk that one BLOCK_STATUS asks about.
const ASKED: u64 = 1 << 30;
/// Most areas that a map holds.
const AREAS: usize = 8 << 20;
/// The context that tells holes from data.
const ALLOCATION: &str = "base:allocation";

fn odd(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("NBD: {}", what.into()))
}

/// One connection.
struct Connection {
    stream: UnixStream,
    size: u64,
    /// Ids of the wanted contexts, in their order.
    contexts: Vec<u32>,
    cookie: u64,
}

impl Connection {
    /// Opens an export with these contexts.
    fn open(socket: &Path, export: &str, contexts: &[&str]) -> io::Result<Self> {
        let stream = egress::local(socket)?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        let mut connection = Self { stream, size: 0, contexts: Vec::new(), cookie: 0 };
        let mut greeting = [0u8; 18];
        connection.stream.read_exact(&mut greeting)?;
        if &greeting[..8] != b"NBDMAGIC" || greeting[8..16] != IHAVEOPT.to_be_bytes() || greeting[17] & 1 == 0 {
            return Err(odd("that is no server of the fixed newstyle"));
        }
        // No zeroes behind the greeting.
        connection.stream.write_all(&(1u32 | u32::from(greeting[17] & 2)).to_be_bytes())?;
        connection.option(STRUCTURED_REPLY, &[], |_, _| Ok(()))?;
        let mut query = text(export);
        query.extend((contexts.len() as u32).to_be_bytes());
        contexts.iter().for_each(|context| query.extend(text(context)));
        let mut given: Vec<(String, u32)> = Vec::new();
        connection.option(SET_META_CONTEXT, &query, |kind, data| {
            if let (META_CONTEXT, Some((id, name))) = (kind, data.split_first_chunk::<4>()) {
                given.push((String::from_utf8_lossy(name).into_owned(), u32::from_be_bytes(*id)));
            }
            Ok(())
        })?;
        for context in contexts {
            let id = given.iter().find(|(name, _)| name == context).map(|(_, id)| *id);
            connection.contexts.push(id.ok_or_else(|| odd(format!("the export {export:?} has no {context}")))?);
        }
        let mut go = text(export);
        go.extend(0u16.to_be_bytes());
        let mut size = None;
        connection.option(GO, &go, |kind, data| {
            // NBD_INFO_EXPORT: type 0, the size, flags.
            if let (INFO, Some((0, rest))) = (kind, data.split_first_chunk::<2>().map(|(kind, rest)| (u16::from_be_bytes(*kind), rest))) {
                size = rest.first_chunk::<8>().map(|size| u64::from_be_bytes(*size));
            }
            Ok(())
        })?;
        connection.size = size.ok_or_else(|| odd("the server told no size"))?;
        Ok(connection)
    }

    /// Sends an option and shows its replies to `see` until it is acknowledged.
    fn option(&mut self, option: u32, data: &[u8], mut see: impl FnMut(u32, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut sent = IHAVEOPT.to_be_bytes().to_vec();
        sent.extend(option.to_be_bytes());
        sent.extend((data.len() as u32).to_be_bytes());
        sent.extend(data);
        self.stream.write_all(&sent)?;
        for _ in 0..REPLIES {
            let mut head = [0u8; 20];
            self.stream.read_exact(&mut head)?;
            let (magic, told, kind, length) = (be64(&head[0..]), be32(&head[8..]), be32(&head[12..]), be32(&head[16..]));
            if magic != OPTION_REPLY || told != option || length > CHUNK {
                return Err(odd(format!("an answer to option {option} that cannot be read")));
            }
            let mut data = vec![0u8; length as usize];
            self.stream.read_exact(&mut data)?;
            match kind {
                ACK => return Ok(()),
                kind if kind & (1 << 31) != 0 => {
                    let words = String::from_utf8_lossy(&data).into_owned();
                    return Err(odd(format!("the server refuses option {option} ({:#x}) {words}", kind & !(1 << 31))));
                }
                kind => see(kind, &data)?,
            }
        }
        Err(odd(format!("over {REPLIES} answers to option {option}")))
    }

    /// Sends a command and shows the chunks of its reply to `see`: kind, and payload.
    fn command(&mut self, kind: u16, offset: u64, length: u32, mut see: impl FnMut(u16, &[u8]) -> io::Result<()>) -> io::Result<()> {
        self.cookie += 1;
        let mut sent = REQUEST.to_be_bytes().to_vec();
        sent.extend(0u16.to_be_bytes());
        sent.extend(kind.to_be_bytes());
        sent.extend(self.cookie.to_be_bytes());
        sent.extend(offset.to_be_bytes());
        sent.extend(length.to_be_bytes());
        self.stream.write_all(&sent)?;
        let (mut payload, mut failed) = (Vec::new(), None);
        let end = Instant::now() + COMMAND;
        for _ in 0..CHUNKS {
            if Instant::now() > end {
                return Err(odd(format!("an answer that takes over {} s", COMMAND.as_secs())));
            }
            let mut head = [0u8; 20];
            self.stream.read_exact(&mut head)?;
            let (magic, flags, kind) = (be32(&head[0..]), be16(&head[4..]), be16(&head[6..]));
            let (cookie, length) = (be64(&head[8..]), be32(&head[16..]));
            if magic != STRUCTURED || cookie != self.cookie || length > CHUNK {
                return Err(odd("a reply that cannot be read"));
            }
            payload.resize(length as usize, 0);
            self.stream.read_exact(&mut payload)?;
            match kind {
                NONE => {}
                kind if kind & (1 << 15) != 0 => {
                    let number = payload.first_chunk::<4>().map_or(0, |number| u32::from_be_bytes(*number));
                    let words = payload.get(6..).map(String::from_utf8_lossy).unwrap_or_default();
                    failed = Some(io::Error::other(format!("NBD: the server could not read (error {number}) {words}")));
                }
                kind => see(kind, &payload)?,
            }
            if flags & 1 != 0 {
                return failed.map_or(Ok(()), Err);
            }
        }
        Err(odd(format!("an answer of over {CHUNKS} chunks")))
    }

    /// Fills `buf` from `offset`.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (start, length) = (offset, buf.len());
        // QEMU answers from the beginning to the end. What is left out or comes twice is no answer.
        let mut filled = 0usize;
        let inside = |at: u64, len: usize, filled: usize| {
            let next = at.checked_sub(start).is_some_and(|from| from == filled as u64);
            let fits = filled.checked_add(len).is_some_and(|end| end <= length);
            if next && fits { Ok(filled) } else { Err(odd("bytes that nobody asked for, or not in their order")) }
        };
        self.command(READ, offset, length as u32, |kind, payload| {
            let (at, rest) = payload.split_first_chunk::<8>().ok_or_else(|| odd("a chunk without its place"))?;
            let at = u64::from_be_bytes(*at);
            match kind {
                DATA => {
                    let from = inside(at, rest.len(), filled)?;
                    buf[from..from + rest.len()].copy_from_slice(rest);
                    filled += rest.len();
                }
                HOLE => {
                    let len = rest.first_chunk::<4>().map_or(0, |len| u32::from_be_bytes(*len)) as usize;
                    let from = inside(at, len, filled)?;
                    buf[from..from + len].fill(0);
                    filled += len;
                }
                other => return Err(odd(format!("a chunk of kind {other} in an answer to READ"))),
            }
            Ok(())
        })?;
        if filled == length { Ok(()) } else { Err(odd(format!("{filled} of {length} bytes came"))) }
    }

    /// What the context says of the disk: the areas whose flags `is_wanted`.
    fn map(&mut self, context: usize, is_wanted: impl Fn(u32) -> bool, stop: &dyn Fn() -> bool) -> io::Result<Vec<Extent>> {
        let id = self.contexts.get(context).copied().ok_or_else(|| odd("a context that was not asked for"))?;
        let (mut areas, mut at, size) = (Vec::new(), 0u64, self.size);
        while at < size {
            if stop() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            // Whole sectors, which fit a u32.
            let asked = (size - at).min(ASKED);
            let mut next = at;
            self.command(BLOCK_STATUS, at, asked as u32, |kind, payload| {
                let (told, rest) = payload.split_first_chunk::<4>().ok_or_else(|| odd("a status without its context"))?;
                if kind != STATUS || u32::from_be_bytes(*told) != id {
                    return Ok(());
                }
                for descriptor in rest.as_chunks::<8>().0 {
                    let (len, flags) = (u64::from(be32(descriptor)), be32(&descriptor[4..]));
                    let len = len.min(size - next);
                    if len == 0 || areas.len() > AREAS {
                        return Err(odd("a status of nothing, or of too many areas"));
                    }
                    if is_wanted(flags) {
                        areas.push(Extent { offset: next, len });
                    }
                    next += len;
                }
                Ok(())
            })?;
            if next == at {
                return Err(odd(format!("the server says nothing of byte {at}")));
            }
            at = next;
        }
        Ok(tidy(areas, size))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A server that is gone needs no farewell.
        let _ = self.stream.set_write_timeout(Some(Duration::from_millis(200)));
        let mut sent = REQUEST.to_be_bytes().to_vec();
        sent.extend([0u8; 2]);
        sent.extend(DISCONNECT.to_be_bytes());
        sent.extend([0u8; 20]);
        let _ = self.stream.write_all(&sent);
    }
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

// Of slices that are long enough: their callers read them whole before.
fn be16(bytes: &[u8]) -> u16 {
    bytes.first_chunk::<2>().map_or(0, |bytes| u16::from_be_bytes(*bytes))
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// An export as a disk, frozen as long as its backup job stands.
pub struct Exported {
    socket: PathBuf,
    export: String,
    size: u64,
    /// What holds data.
    data: Vec<Extent>,
    /// What was written since the checkpoint whose bitmap was asked for.
    dirty: Option<Vec<Extent>>,
    moved: Moved,
    idle: Mutex<Vec<Connection>>,
}

impl Exported {
    /// Opens an export and asks once what holds data and, where a bitmap is named, what is dirty in it.
    ///
    /// # Errors
    /// When the server is not there, has no such export or bitmap, or speaks otherwise than the protocol says.
    pub fn open(socket: &Path, export: &str, bitmap: Option<&str>, moved: Moved, stop: &dyn Fn() -> bool) -> io::Result<Self> {
        let bitmap = bitmap.map(|name| format!("qemu:dirty-bitmap:{name}"));
        let contexts: Vec<&str> = std::iter::once(ALLOCATION).chain(bitmap.as_deref()).collect();
        let mut connection = Connection::open(socket, export, &contexts)?;
        // NBD_STATE_ZERO: reads as zeros.
        let data = connection.map(0, |flags| flags & 2 == 0, stop)?;
        let dirty = match bitmap {
            Some(_) => Some(connection.map(1, |flags| flags & 1 != 0, stop)?),
            None => None,
        };
        let size = connection.size;
        let idle = Mutex::new(vec![connection]);
        Ok(Self { socket: socket.to_owned(), export: export.to_owned(), size, data, dirty, moved, idle })
    }

    /// What was written since the checkpoint whose bitmap was asked for.
    pub fn dirty(&self) -> Option<&[Extent]> {
        self.dirty.as_deref()
    }

    /// What holds data.
    pub fn data(&self) -> &[Extent] {
        &self.data
    }

    fn idle(&self) -> Option<Connection> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

impl Disk for Exported {
    fn format(&self) -> &'static str {
        "nbd"
    }

    fn capacity(&self) -> u64 {
        self.size
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>, FormatError> {
        Ok(clipped(&self.data, from, to))
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], _: &mut Scratch) -> Result<(), FormatError> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.size) {
            return Err(FormatError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        let mut connection = match self.idle() {
            Some(connection) => connection,
            None => Connection::open(&self.socket, &self.export, &[ALLOCATION])?,
        };
        let mut at = offset;
        for piece in buf.chunks_mut(PIECE) {
            connection.read(at, piece)?;
            at += piece.len() as u64;
            self.moved.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        // One that failed is not used again.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    struct Server(Child);

    impl Drop for Server {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn an_export_of_qemu_reads_as_its_image_and_tells_its_holes() {
        let folder = shared::vault::temporary_dir("nbd").unwrap();
        let (raw, image, socket) = (folder.join("a.raw"), folder.join("a.qcow2"), folder.join("s"));
        let capacity = 9 * (1 << 20) + 512;
        let mut bytes = vec![0u8; capacity];
        for (at, byte) in bytes.iter_mut().enumerate().filter(|(at, _)| (at >> 20).is_multiple_of(3) || *at == capacity - 1) {
            *byte = (at % 253) as u8 + 1;
        }
        std::fs::write(&raw, &bytes).unwrap();
        let convert = ["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), image.to_str().unwrap()];
        assert!(Command::new("qemu-img").args(convert).status().unwrap().success());
        let mut serve = Command::new("qemu-nbd");
        serve.args(["-r", "-t", "-e", "8", "-f", "qcow2", "-x", "vda", "-k"]).arg(&socket).arg(&image).stdout(Stdio::null());
        let _server = Server(serve.spawn().unwrap());
        let began = Instant::now();
        while !socket.exists() {
            assert!(began.elapsed() < Duration::from_secs(10), "qemu-nbd is not there");
            std::thread::yield_now();
        }
        let moved = Moved::default();
        let disk = Exported::open(&socket, "vda", None, moved.clone(), &|| false).unwrap();
        assert_eq!(disk.capacity(), capacity as u64);
        let mib = |n: u64| Extent { offset: n << 20, len: 1 << 20 };
        assert_eq!(disk.data(), [mib(0), mib(3), mib(6), Extent { offset: 9 << 20, len: 512 }]);
        let mut read = vec![0u8; capacity];
        disk.read_at(0, &mut read, &mut Scratch::default()).unwrap();
        assert!(read == bytes && moved.load(Ordering::Relaxed) == capacity as u64);
        // Several at once, and past the end.
        std::thread::scope(|scope| {
            for n in 0..4 {
                let (disk, bytes) = (&disk, &bytes);
                scope.spawn(move || {
                    let mut part = vec![0u8; 300_000];
                    disk.read_at(n * 2_000_003, &mut part, &mut Scratch::default()).unwrap();
                    assert!(part == bytes[n as usize * 2_000_003..][..300_000]);
                });
            }
        });
        assert!(disk.read_at(capacity as u64 - 1, &mut [0; 2], &mut Scratch::default()).is_err());
        assert!(Exported::open(&socket, "vdb", None, Moved::default(), &|| false).is_err());
        let missing = Exported::open(&socket, "vda", Some("nope"), Moved::default(), &|| false);
        assert!(missing.is_err_and(|e| e.to_string().contains("nope")));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
