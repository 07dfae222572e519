//! The journal of one job: what of its output is on the disk for good, so that a crash costs one checkpoint.
//!
//! Owns: the file format, the cut of a torn tail, the identity that decides whether an old journal may be adopted.
//! Never: opens a path (it is handed an opened file), touches the output (the pipeline does), keeps more than an index in memory.
//! A crash here costs the record being written: it is cut off at the next open.
//!
//! ```text
//!  worker          writer            sealer                                     run / publish
//!  read, hash ──►  pwrite ──piece──► hash the appended region where it is compressed
//!                  (goes on)         fdatasync(part)
//!                                    append Checkpoint ─► fdatasync(journal)
//!                  finish: tables, header ──────────────► fdatasync(part), append DiskFinished, fdatasync(journal)
//!                                    … next disk …        package written and synced, append AllWritten
//!                                    read back, compare   append Verified each 64 MiB
//!                                                         append Granted ─► rename without replacing ─► fsync(parent) ─► append Published
//! ```
//! Hence, whatever the moment of a crash: a record stands for bytes that were synced before it. Bytes that no record stands for are cut off
//! the part at resume. A record whose bytes are not there (a part restored from elsewhere, a disk that lied about a sync) is found by
//! hashing and everything from it on is cut off the journal, so the copy goes on from the last record that holds.
//!
//! File: 8 bytes of magic with the version, then records: length of the payload (u32 LE), its CRC-32 (u32 LE), payload. The payload's first
//! byte is its kind. The first record is the identity, as JSON; numbers in the others are little endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use shared::manifest::Digest;

use crate::formats::Compression;

/// Magic and version. Another version is another magic: such a journal is not adopted.
const MAGIC: &[u8; 8] = b"HSJRNL\x00\x01";

/// Longest payload in bytes. A checkpoint of [`MAX_DIGESTS`] blocks with all their units stays far below.
const MAX_RECORD: usize = 16 << 20;

/// Blocks that one checkpoint may name.
pub const MAX_DIGESTS: usize = 16 << 10;

/// What a journal belongs to. When any of it differs the journal is not adopted and the job starts from the beginning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The job's id.
    pub job: String,
    /// The VM's name, from which the files have theirs.
    pub vm: String,
    /// Output format as the API spells it.
    pub format: String,
    /// Compression asked for.
    pub compression: Option<Compression>,
    /// The sources, in order.
    pub disks: Vec<DiskIdentity>,
}

/// What makes a source the same source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIdentity {
    /// `disk-0`.
    pub name: String,
    /// Capacity in bytes.
    pub capacity: u64,
    /// The provider's word for this content: inode and change time, snapshot and change id, …
    pub identity: String,
}

/// The state of one disk's output at a moment at which all of it was synced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Which disk of the job.
    pub disk: u32,
    /// All blocks below this one are done.
    pub next_block: u64,
    /// Data bytes of the disk in those blocks.
    pub data: u64,
    /// Where the region begins that was appended since the last checkpoint, counted from the disk's base in the file.
    pub from: u64,
    /// Where it ends: the writer's position.
    pub position: u64,
    /// BLAKE3 of that region; zeros for raw and plain qcow2, where the blocks' digests say it.
    pub hash: Digest,
    /// Digests of the non-zero blocks done since the last checkpoint.
    pub digests: Vec<(u64, Digest)>,
    /// The writer's piece.
    pub piece: Vec<u8>,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A disk's file is there, empty from `base` on.
    DiskStarted {
        /// Which disk of the job.
        disk: u32,
        /// First byte of the disk inside its file.
        base: u64,
        /// Bytes from the base on that `finish` writes again.
        front: u64,
    },
    /// A part of a disk is done.
    Checkpoint(Checkpoint),
    /// A disk's output is complete.
    DiskFinished {
        /// Which disk of the job.
        disk: u32,
        /// Bytes of output, counted from the base.
        length: u64,
        /// Data bytes of the whole disk.
        data: u64,
        /// BLAKE3 of the front region, as `finish` wrote it.
        front: Digest,
        /// BLAKE3 of what `finish` appended behind the last checkpoint.
        tail: Digest,
    },
    /// Everything around the disks is written, too: name and length of every file.
    AllWritten {
        /// In the package's order.
        files: Vec<(String, u64)>,
    },
    /// Blocks of a disk were read back and compared.
    Verified {
        /// Which disk of the job.
        disk: u32,
        /// All blocks below this one are compared.
        next_block: u64,
        /// Data bytes in those blocks.
        data: u64,
        /// Blocks read for it.
        blocks: u64,
    },
    /// SHA-256 of an output file, as far as it is known.
    Hashed {
        /// Bare name of the file.
        file: String,
        /// Bytes hashed.
        position: u64,
        /// The hash function's state there; the digest itself when `done`.
        state: Vec<u8>,
        /// Whether the whole file is hashed.
        done: bool,
    },
    /// The controller granted the publication under this epoch.
    Granted {
        /// The job's epoch.
        epoch: u64,
    },
    /// The output is published and the parent folder is synced.
    Published,
}

/// An open journal. One writer; the agent's lock on its data directory sees to that.
#[derive(Debug)]
pub struct Journal {
    file: File,
    identity: Identity,
    /// Offset and length of each record's payload.
    index: Vec<(u64, u32)>,
    /// Where the next record goes.
    end: u64,
    adopted: bool,
}

impl Journal {
    /// Takes over an opened file (read and write; empty when the job is new). A journal of another identity or version, or one whose
    /// beginning is damaged, is emptied; a torn tail is cut at the last good record. The caller has synced the file's directory.
    pub fn open(file: File, identity: &Identity) -> io::Result<Self> {
        let mut journal = Self { file, identity: identity.clone(), index: Vec::new(), end: 0, adopted: false };
        if !journal.load()? {
            journal.reset()?;
        }
        Ok(journal)
    }

    /// Whether records of an earlier attempt were found.
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// What it belongs to.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Record `i`, read from the file.
    pub fn read(&self, i: usize) -> io::Result<Record> {
        let (offset, len) = *self.index.get(i).ok_or_else(|| invalid("there is no such record"))?;
        let mut payload = vec![0u8; len as usize];
        self.file.read_exact_at(&mut payload, offset)?;
        decode(&payload).ok_or_else(|| invalid("a record changed after it was checked"))
    }

    /// Appends a record and syncs. When that fails the record is taken back as far as the disk lets us, and the next open cuts the rest.
    pub fn append(&mut self, record: &Record) -> io::Result<()> {
        let payload = encode(record);
        match self.write(&payload) {
            Ok(()) => Ok(()),
            Err(e) => {
                self.file.set_len(self.end).ok();
                Err(e)
            }
        }
    }

    /// Keeps the first `keep` records and drops the rest, for good when it returns.
    pub fn cut(&mut self, keep: usize) -> io::Result<()> {
        let Some((offset, _)) = self.index.get(keep) else { return Ok(()) };
        self.end = offset - 8;
        self.index.truncate(keep);
        self.file.set_len(self.end)?;
        self.file.sync_data()
    }

    fn write(&mut self, payload: &[u8]) -> io::Result<()> {
        if payload.len() > MAX_RECORD {
            return Err(invalid("a record is longer than 16 MiB"));
        }
        let mut bytes = Vec::with_capacity(payload.len() + 8);
        bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(payload).to_le_bytes());
        bytes.extend_from_slice(payload);
        self.file.write_all_at(&bytes, self.end)?;
        self.file.sync_data()?;
        self.index.push((self.end + 8, payload.len() as u32));
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Empties the file and writes magic and identity.
    fn reset(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.write_all_at(MAGIC, 0)?;
        self.end = MAGIC.len() as u64;
        self.index.clear();
        let payload = serde_json::to_vec(&self.identity).map_err(io::Error::other)?;
        self.write(&payload)?;
        // The identity is not a record for the reader.
        self.index.clear();
        Ok(())
    }

    /// Indexes the records that are there; false when the file is not this job's journal.
    fn load(&mut self) -> io::Result<bool> {
        let len = self.file.metadata()?.len();
        let mut magic = [0u8; 8];
        if len < 8 {
            return Ok(false);
        }
        self.file.read_exact_at(&mut magic, 0)?;
        self.end = 8;
        let mut payload = Vec::new();
        if &magic != MAGIC || !self.next(len, &mut payload)? {
            return Ok(false);
        }
        match serde_json::from_slice::<Identity>(&payload) {
            Ok(found) if found == self.identity => self.index.clear(),
            _ => return Ok(false),
        }
        while self.next(len, &mut payload)? {
            if decode(&payload).is_none() {
                if let Some((offset, _)) = self.index.pop() {
                    self.end = offset - 8;
                }
                break;
            }
        }
        if self.end < len {
            self.file.set_len(self.end)?;
            self.file.sync_data()?;
        }
        self.adopted = !self.index.is_empty();
        Ok(true)
    }

    /// Reads the record at the end; false when there is no whole one.
    fn next(&mut self, len: u64, payload: &mut Vec<u8>) -> io::Result<bool> {
        let mut head = [0u8; 8];
        if len - self.end < 8 {
            return Ok(false);
        }
        self.file.read_exact_at(&mut head, self.end)?;
        let size = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        if size as usize > MAX_RECORD || u64::from(size) > len - self.end - 8 {
            return Ok(false);
        }
        payload.resize(size as usize, 0);
        self.file.read_exact_at(payload, self.end + 8)?;
        if crc32fast::hash(payload) != u32::from_le_bytes([head[4], head[5], head[6], head[7]]) {
            return Ok(false);
        }
        self.index.push((self.end + 8, size));
        self.end += 8 + u64::from(size);
        Ok(true)
    }
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("journal: {reason}"))
}

fn put(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&number.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn encode(record: &Record) -> Vec<u8> {
    let mut out = Vec::new();
    match record {
        Record::DiskStarted { disk, base, front } => {
            out.push(1);
            [u64::from(*disk), *base, *front].iter().for_each(|n| put(&mut out, *n));
        }
        Record::Checkpoint(c) => {
            out.reserve(c.digests.len() * 40 + c.piece.len() + 128);
            out.push(2);
            [u64::from(c.disk), c.next_block, c.data, c.from, c.position].iter().for_each(|n| put(&mut out, *n));
            out.extend_from_slice(&c.hash);
            put(&mut out, c.digests.len() as u64);
            for (block, digest) in &c.digests {
                put(&mut out, *block);
                out.extend_from_slice(digest);
            }
            put_bytes(&mut out, &c.piece);
        }
        Record::DiskFinished { disk, length, data, front, tail } => {
            out.push(3);
            [u64::from(*disk), *length, *data].iter().for_each(|n| put(&mut out, *n));
            out.extend_from_slice(front);
            out.extend_from_slice(tail);
        }
        Record::AllWritten { files } => {
            out.push(4);
            put(&mut out, files.len() as u64);
            for (name, len) in files {
                put_bytes(&mut out, name.as_bytes());
                put(&mut out, *len);
            }
        }
        Record::Verified { disk, next_block, data, blocks } => {
            out.push(5);
            [u64::from(*disk), *next_block, *data, *blocks].iter().for_each(|n| put(&mut out, *n));
        }
        Record::Hashed { file, position, state, done } => {
            out.push(6);
            put_bytes(&mut out, file.as_bytes());
            put(&mut out, *position);
            put_bytes(&mut out, state);
            put(&mut out, u64::from(*done));
        }
        Record::Granted { epoch } => {
            out.push(7);
            put(&mut out, *epoch);
        }
        Record::Published => out.push(8),
    }
    out
}

/// What is left of a payload while it is decoded. Every step answers `None` at its end.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn number(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(8)?.try_into().ok()?))
    }

    fn small(&mut self) -> Option<u32> {
        self.number()?.try_into().ok()
    }

    fn digest(&mut self) -> Option<Digest> {
        self.bytes(32)?.try_into().ok()
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.counted()?.to_vec()).ok()
    }

    fn counted(&mut self) -> Option<&'a [u8]> {
        let len = self.number()?.try_into().ok()?;
        self.bytes(len)
    }
}

fn decode(payload: &[u8]) -> Option<Record> {
    let (kind, rest) = payload.split_first()?;
    let mut rest = Rest(rest);
    let record = match kind {
        1 => Record::DiskStarted { disk: rest.small()?, base: rest.number()?, front: rest.number()? },
        2 => Record::Checkpoint(decode_checkpoint(&mut rest)?),
        3 => Record::DiskFinished {
            disk: rest.small()?,
            length: rest.number()?,
            data: rest.number()?,
            front: rest.digest()?,
            tail: rest.digest()?,
        },
        4 => {
            let mut files = Vec::new();
            for _ in 0..rest.number()? {
                files.push((rest.text()?, rest.number()?));
            }
            Record::AllWritten { files }
        }
        5 => Record::Verified { disk: rest.small()?, next_block: rest.number()?, data: rest.number()?, blocks: rest.number()? },
        6 => Record::Hashed { file: rest.text()?, position: rest.number()?, state: rest.counted()?.to_vec(), done: rest.number()? != 0 },
        7 => Record::Granted { epoch: rest.number()? },
        8 => Record::Published,
        _ => return None,
    };
    rest.0.is_empty().then_some(record)
}

fn decode_checkpoint(rest: &mut Rest<'_>) -> Option<Checkpoint> {
    let (disk, next_block, data) = (rest.small()?, rest.number()?, rest.number()?);
    let (from, position, hash) = (rest.number()?, rest.number()?, rest.digest()?);
    let count = usize::try_from(rest.number()?).ok().filter(|count| *count <= rest.0.len() / 40)?;
    let mut digests = Vec::with_capacity(count);
    for _ in 0..count {
        digests.push((rest.number()?, rest.digest()?));
    }
    Some(Checkpoint { disk, next_block, data, from, position, hash, digests, piece: rest.counted()?.to_vec() })
}

#[cfg(test)]
mod tests;
