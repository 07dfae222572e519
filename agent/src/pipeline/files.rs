//! SHA-256 of the output files, for people and tools that know nothing of our manifest.
//!
//! Owns: one thread that reads the files front to back: behind the writer where no byte is written twice, else while the blocks are compared.
//! Its state is journalled, so that a crash in the read-back does not start the hash again.
//! Never: hashes a sparse raw image whose holes would make the time follow the size.
//! A crash here costs what was hashed since the last journalled state.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Condvar, Mutex, PoisonError};

use sha2::digest::common::hazmat::SerializableState;
use sha2::{Digest as _, Sha256};

use super::resume::Hashed;
use super::seal::read_padded;
use super::{Error, output_error};
use crate::journal::Record;

/// Bytes read at a time.
pub(super) const STEP: usize = 1 << 20;

/// Bytes between two published states.
const PUBLISH: u64 = 64 << 20;

/// Holes that are hashed in any case.
const FREE_HOLES: u64 = 2 << 30;

/// A file to hash.
pub(super) struct Input {
    pub(super) name: String,
    pub(super) file: File,
    /// Where it begins: 0, or a member's place in an archive.
    pub(super) base: u64,
    /// Bytes.
    pub(super) size: u64,
    /// As the API spells it.
    pub(super) format: &'static str,
    /// Whether it is left out.
    pub(super) skip: bool,
}

/// Whether hashing the holes of a raw image would take longer than hashing its data and 2 GiB.
pub(super) fn mostly_holes(capacity: u64, data: u64) -> bool {
    capacity.saturating_sub(data) > data.saturating_add(FREE_HOLES)
}

/// A file, or a member of an archive, that grows while it is hashed.
pub(super) struct Growing {
    /// Bytes that are final, and whether nobody will say more.
    state: Mutex<(u64, bool)>,
    news: Condvar,
}

impl Growing {
    pub(super) fn new() -> Self {
        Self { state: Mutex::new((0, false)), news: Condvar::new() }
    }

    /// The first `bytes` are final.
    pub(super) fn grow(&self, bytes: u64) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 = bytes;
        self.news.notify_all();
    }

    /// The follower shall leave now.
    pub(super) fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.news.notify_all();
    }

    /// Final bytes once they are more than `at`; `None` when closed.
    fn wait(&self, at: u64) -> Option<u64> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = self.news.wait_while(state, |state| state.0 <= at && !state.1).unwrap_or_else(PoisonError::into_inner);
        (!state.1).then_some(state.0)
    }
}

/// How far behind the copy its hashing stands where both want the processor (nice value).
const BEHIND: i32 = 15;

/// The hashing of a job's files.
pub(super) struct Hashing {
    /// States and digests, by file: those of an earlier attempt first, then ours.
    states: Mutex<BTreeMap<String, Hashed>>,
    /// What is not in the journal yet.
    news: Mutex<Vec<String>>,
}

impl Hashing {
    /// Goes on from what an earlier attempt had.
    pub(super) fn new(found: BTreeMap<String, Hashed>) -> Self {
        Self { states: Mutex::new(found), news: Mutex::default() }
    }

    /// Hashes the files in order, until done or `stop`.
    pub(super) fn run(&self, inputs: &[Input], stop: &dyn Fn() -> bool) -> Result<(), Error> {
        for input in inputs {
            self.hash(input, stop).map_err(|e| output_error(e.into(), &input.name))?;
        }
        Ok(())
    }

    /// Hashes what begins at `base` of a file behind its writer until `growing` is closed; [`Hashing::hash`] goes on from there. An error is left
    /// for it to find. For a thread of its own, which takes only what time the copy leaves.
    pub(super) fn follow(&self, name: &str, file: &File, base: u64, sparse: bool, growing: &Growing) {
        // Of this thread alone (Linux). Where it may not, it is as fast as the others.
        let _ = rustix::process::setpriority_process(None, BEHIND);
        let mut stream = Stream::new(base, 0, Sha256::new());
        while let Some(end) = growing.wait(stream.at) {
            if stream.step(file, end, sparse).is_err() {
                return;
            }
        }
        self.publish(name, stream.state());
    }

    /// Hashes one file, or the rest of it.
    pub(super) fn hash(&self, input: &Input, stop: &dyn Fn() -> bool) -> io::Result<()> {
        let earlier = self.states.lock().unwrap_or_else(PoisonError::into_inner).get(&input.name).cloned();
        if input.skip || earlier.as_ref().is_some_and(|earlier| earlier.done && earlier.position == input.size) {
            return Ok(());
        }
        let (at, hasher) = earlier.and_then(|earlier| revive(&earlier, input.size)).unwrap_or((0, Sha256::new()));
        let mut stream = Stream::new(input.base, at, hasher);
        let mut published = at;
        while stream.at < input.size {
            if stop() {
                return Ok(());
            }
            stream.step(&input.file, input.size, input.format == "raw")?;
            if stream.at - published >= PUBLISH {
                published = stream.at;
                self.publish(&input.name, stream.state());
            }
        }
        self.publish(&input.name, Hashed { position: stream.at, state: stream.hasher.finalize().to_vec(), done: true });
        Ok(())
    }

    fn publish(&self, name: &str, state: Hashed) {
        self.states.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), state);
        let mut news = self.news.lock().unwrap_or_else(PoisonError::into_inner);
        if !news.iter().any(|known| known == name) {
            news.push(name.to_owned());
        }
    }

    /// Records for the journal, of what changed since the last call.
    pub(super) fn records(&self) -> Vec<Record> {
        let names = std::mem::take(&mut *self.news.lock().unwrap_or_else(PoisonError::into_inner));
        let states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let record = |name: String| {
            let Hashed { position, state, done } = states.get(&name)?.clone();
            Some(Record::Hashed { file: name, position, state, done })
        };
        names.into_iter().filter_map(record).collect()
    }

    /// The digest of a file, hex; `None` when it was left out.
    pub(super) fn digest(&self, name: &str) -> Option<String> {
        let states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states.get(name).filter(|state| state.done).map(|state| hex::encode(&state.state))
    }
}

/// The hash function as it stood; `None` when that is not a state of it.
fn revive(earlier: &Hashed, size: u64) -> Option<(u64, Sha256)> {
    if earlier.done || earlier.position > size {
        return None;
    }
    let state = earlier.state.as_slice().try_into().ok()?;
    Some((earlier.position, Sha256::deserialize(state).ok()?))
}

/// A hash in the making.
struct Stream {
    base: u64,
    /// Bytes hashed, counted from the base.
    at: u64,
    hasher: Sha256,
    buf: Vec<u8>,
    /// The buffer holds zeros.
    blank: bool,
}

impl Stream {
    fn new(base: u64, at: u64, hasher: Sha256) -> Self {
        Self { base, at, hasher, buf: vec![0; STEP], blank: true }
    }

    /// Hashes the next bytes, at most up to `end`. Holes of a sparse file are not read.
    fn step(&mut self, file: &File, end: u64, sparse: bool) -> io::Result<()> {
        let part = (end - self.at).min(STEP as u64) as usize;
        if !(sparse && is_hole(file, self.base + self.at, part as u64)) {
            self.blank = false;
            read_padded(file, &mut self.buf[..part], self.base + self.at)?;
        } else if !self.blank {
            self.buf.fill(0);
            self.blank = true;
        }
        self.hasher.update(&self.buf[..part]);
        self.at += part as u64;
        Ok(())
    }

    fn state(&self) -> Hashed {
        Hashed { position: self.at, state: self.hasher.serialize().to_vec(), done: false }
    }
}

/// Whether `[at, at + len)` is a hole, as far as the file system tells.
fn is_hole(file: &File, at: u64, len: u64) -> bool {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(data) => data >= at + len,
        Err(e) => e == rustix::io::Errno::NXIO,
    }
}

/// SHA-256 of a file, hex; `None` when `stop` said so first.
pub(super) fn sha256(file: &File, stop: &dyn Fn() -> bool) -> io::Result<Option<String>> {
    let hashing = Hashing::new(BTreeMap::new());
    let input = Input { name: String::new(), file: file.try_clone()?, base: 0, size: file.metadata()?.len(), format: "", skip: false };
    hashing.hash(&input, stop)?;
    Ok(hashing.digest(""))
}

/// Syncs a file and has the kernel forget its pages, so that reading it back reads the disk.
pub(super) fn drop_cache(file: &File) -> io::Result<()> {
    file.sync_all()?;
    // Where the file system does not care (tmpfs) there is no disk to read back from.
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).map_err(io::Error::from)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_hash_goes_on_from_its_journalled_state_and_behind_a_writer() {
        let path = std::env::temp_dir().join(format!("hypersdk-hash-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all_at(b"beginning", 0).unwrap();
        file.write_all_at(b"end", 70 << 20).unwrap();
        let input = |format| Input {
            name: "a".into(),
            file: file.try_clone().unwrap(),
            base: 0,
            size: file.metadata().unwrap().len(),
            format,
            skip: false,
        };
        let expected = sha256(&file, &|| false).unwrap().unwrap();

        let reads = Cell::new(0);
        let stop = || {
            reads.set(reads.get() + 1);
            reads.get() > 66
        };
        let first = Hashing::new(BTreeMap::new());
        first.run(&[input("vmdk")], &stop).unwrap();
        assert_eq!(first.digest("a"), None);
        let Some(Record::Hashed { position, state, done: false, .. }) = first.records().pop() else { panic!("no state") };
        assert_eq!(position, PUBLISH);
        let second = Hashing::new(BTreeMap::from([("a".to_owned(), Hashed { position, state, done: false })]));
        reads.set(0);
        second.run(&[input("vmdk")], &stop).unwrap();
        assert_eq!((second.digest("a"), reads.get()), (Some(expected), 7));

        // The same by following a writer, and without reading the holes.
        let third = Hashing::new(BTreeMap::new());
        let growing = Growing::new();
        std::thread::scope(|scope| {
            let follower = scope.spawn(|| third.follow("a", &file, 0, true, &growing));
            for end in [1 << 20, 5 << 20, 70 << 20] {
                growing.grow(end);
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            growing.close();
            follower.join().unwrap();
        });
        assert!(third.states.lock().unwrap()["a"].position >= 5 << 20);
        third.run(&[input("raw")], &|| false).unwrap();
        assert_eq!(third.digest("a"), second.digest("a"));
        assert!(mostly_holes(3 << 30, 1 << 20) && !mostly_holes(2 << 30, 1 << 20) && !mostly_holes(30 << 30, 14 << 30));
    }
}
