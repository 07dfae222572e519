//! SHA-256 of the output files, for people and tools that know nothing of our manifest.
//!
//! Owns: one thread that reads the files front to back while the blocks are compared, and its state, which is journalled so that a crash
//! does not start the hash again.
//! Never: hashes a sparse raw image whose holes would make the time follow the size.
//! A crash here costs what was hashed since the last journalled state.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Mutex, PoisonError};

use sha2::digest::common::hazmat::SerializableState;
use sha2::{Digest as _, Sha256};

use super::resume::Hashed;
use super::{Error, output_error};
use crate::journal::Record;

/// Bytes read at a time.
const STEP: usize = 1 << 20;

/// Bytes between two published states.
const PUBLISH: u64 = 64 << 20;

/// Holes that are hashed in any case.
const FREE_HOLES: u64 = 2 << 30;

/// A file to hash.
pub(super) struct Input {
    pub(super) name: String,
    pub(super) file: File,
    /// Bytes.
    pub(super) size: u64,
    /// As the API spells it. A raw image may be left out for its holes.
    pub(super) format: &'static str,
}

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

    fn hash(&self, input: &Input, stop: &dyn Fn() -> bool) -> io::Result<()> {
        if input.format == "raw" && holes_are_too_many(&input.file)? {
            return Ok(());
        }
        let earlier = self.states.lock().unwrap_or_else(PoisonError::into_inner).get(&input.name).cloned();
        if earlier.as_ref().is_some_and(|earlier| earlier.done && earlier.position == input.size) {
            return Ok(());
        }
        let (mut at, mut hasher) = earlier.and_then(|earlier| revive(&earlier, input.size)).unwrap_or((0, Sha256::new()));
        let mut buf = vec![0u8; STEP];
        let mut published = at;
        while at < input.size {
            if stop() {
                return Ok(());
            }
            let part = (input.size - at).min(STEP as u64) as usize;
            input.file.read_exact_at(&mut buf[..part], at)?;
            hasher.update(&buf[..part]);
            at += part as u64;
            if at - published >= PUBLISH {
                published = at;
                self.publish(&input.name, Hashed { position: at, state: hasher.serialize().to_vec(), done: false });
            }
        }
        self.publish(&input.name, Hashed { position: at, state: hasher.finalize().to_vec(), done: true });
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

/// Whether reading the holes would take longer than reading the data and 2 GiB.
fn holes_are_too_many(file: &File) -> io::Result<bool> {
    let meta = file.metadata()?;
    let data = meta.blocks().saturating_mul(512);
    Ok(meta.len().saturating_sub(data) > data.saturating_add(FREE_HOLES))
}

/// SHA-256 of a file, hex; `None` when `stop` said so first.
pub(super) fn sha256(file: &File, stop: &dyn Fn() -> bool) -> io::Result<Option<String>> {
    let hashing = Hashing::new(BTreeMap::new());
    let input = Input { name: String::new(), file: file.try_clone()?, size: file.metadata()?.len(), format: "" };
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

    use super::*;

    #[test]
    fn a_hash_goes_on_from_its_journalled_state_and_a_sparse_raw_image_is_left_out() {
        let path = std::env::temp_dir().join(format!("hypersdk-hash-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all_at(b"beginning", 0).unwrap();
        file.write_all_at(b"end", 70 << 20).unwrap();
        let input = |format| Input { name: "a".into(), file: file.try_clone().unwrap(), size: file.metadata().unwrap().len(), format };
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

        file.set_len(3 << 30).unwrap();
        let third = Hashing::new(BTreeMap::new());
        third.run(&[input("raw")], &|| false).unwrap();
        assert_eq!(third.digest("a"), None);
    }
}
