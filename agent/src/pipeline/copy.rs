//! Copying one disk: read, hash, encode on all cores; write in order; seal checkpoints beside it.
//!
//! Owns: the threads of one disk's copy and what flows between them.
//! ```text
//!  plan ─► worker × N ─► queue (in order, bounded) ─► writer ─► sealer (hash, fdatasync, journal)
//!             ▲ units of raw and plain qcow2, and plain blocks that the writer has placed, go to the file from here
//!  caller's thread: polls stop, reports progress
//! ```
//! Never: holds more than the slots of the queue and one block a worker, goes on after a failed write or sync.
//! A crash here costs what was not sealed: the slots, one checkpoint being sealed and one that waits for it. With an agent's checkpoints of
//! 8 MiB that is at most 64 MiB, however slowly the disk syncs and however many cores read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use shared::manifest::{BLOCK, Blocks, Digest};

use super::control::{Control, Crew};
use super::files::Growing;
use super::plan::{Plan, Task, block_count};
use super::queue::{Alarm, Done, Next, Placed, Queue, Turn};
use super::seal::{hash_region, seal};
use super::target::{Evidence, Target};
use super::throttle::Throttle;
use super::work::{Fault, Form, Worker};
use super::{Base, Error, Stop, Tuning, output_error};
use crate::formats::{Disk, DiskWriter, Encoded, FormatError, Hot, Output};
use crate::journal::{Checkpoint, Journal, MAX_DIGESTS, Record};

/// One disk and where it goes.
pub(super) struct DiskCopy<'a> {
    pub(super) control: &'a Control<'a>,
    pub(super) throttle: &'a Throttle,
    pub(super) tuning: &'a Tuning,
    pub(super) target: Target,
    /// Number of the disk in the job.
    pub(super) number: u32,
    pub(super) name: &'a str,
    pub(super) disk: &'a dyn Disk,
    /// What the copy is laid over.
    pub(super) base_disk: Option<&'a Base>,
    /// Bare name of the file, for messages.
    pub(super) file_name: &'a str,
    pub(super) file: Arc<File>,
    /// First byte of the disk in its file.
    pub(super) base: u64,
    /// Bytes from the base on that `finish` writes again.
    pub(super) front: u64,
    /// Durable data bytes of the disks before this one.
    pub(super) durable_before: u64,
    /// Whether units that are compressed at the source as they are wanted here are passed on as they are.
    pub(super) pass_on: bool,
    /// Told which bytes of the file are final, for who hashes it.
    pub(super) growing: &'a Growing,
}

/// Where a copy starts: at the beginning, or at a checkpoint.
pub(super) struct Start {
    pub(super) writer: Box<dyn DiskWriter>,
    pub(super) next_block: u64,
    pub(super) data: u64,
    /// Where the next sealed region begins.
    pub(super) from: u64,
    pub(super) blocks: Blocks,
}

/// A disk whose output is complete and synced.
pub(super) struct Copied {
    pub(super) blocks: Blocks,
    /// Bytes of output, counted from the base.
    pub(super) length: u64,
    /// Data bytes of the disk.
    pub(super) data: u64,
}

/// Most slots of 4 MiB: what is read and not sealed.
const SLOTS: usize = 12;

/// Threads that read and encode: all cores, but no more than there are slots for, with two for the writer.
pub(super) fn workers(tuning: &Tuning) -> usize {
    let cores = thread::available_parallelism().map_or(2, |cores| cores.get());
    tuning.workers.unwrap_or(cores).clamp(1, SLOTS - 2)
}

impl DiskCopy<'_> {
    /// Copies from `start` to the end of the disk, finishes the output and syncs it.
    pub(super) fn run(&self, start: Start, journal: &mut Journal) -> Result<Copied, Error> {
        let workers = workers(self.tuning);
        let queue = Queue::new((workers * 2).clamp(workers + 2, SLOTS));
        let crew = Crew::new(workers + 2);
        let plan = Mutex::new((Plan::new(self.disk, start.next_block), 0u64));
        let hot = start.writer.hot();
        // No room: a checkpoint waits in the writer, which then takes no further block.
        let (send, receive) = sync_channel(0);
        let written = thread::scope(|scope| {
            let sealer = scope.spawn(|| {
                let (_member, _alarm) = (crew.member(), Alarm(&queue));
                self.seal_all(&queue, &receive, journal);
                drop(receive);
            });
            let writer = scope.spawn(|| {
                let (_member, _alarm) = (crew.member(), Alarm(&queue));
                self.write_all(&queue, start, hot.is_some(), send)
            });
            let readers: Vec<_> = (0..workers)
                .map(|_| {
                    scope.spawn(|| {
                        let (_member, _alarm) = (crew.member(), Alarm(&queue));
                        if let Err(error) = self.work(&queue, &plan, hot.as_ref()) {
                            queue.fail(error);
                            // Else nobody might: the others may have failed, too, and the writer may wait for the sealer, which waits for these.
                            self.drain(&queue);
                        }
                    })
                })
                .collect();
            crew.wait(|| {
                self.control.poll();
                if self.control.stopped() {
                    queue.halt();
                }
            });
            let sound = readers.into_iter().map(|reader| reader.join()).chain([sealer.join()]).all(|joined| joined.is_ok());
            writer.join().ok().filter(|_| sound)
        });
        if let Some(error) = queue.failure() {
            return Err(error);
        }
        self.control.check()?;
        let written = written.ok_or_else(|| Error::Output(FormatError::Io(std::io::Error::other("a thread of the copy panicked"))))?;
        self.finish(written, journal)
    }

    /// One worker: reads, hashes and encodes blocks until there are none, and writes those that have their place.
    fn work(&self, queue: &Queue, plan: &Mutex<(Plan<'_>, u64)>, hot: Option<&Hot>) -> Result<(), Error> {
        let mut worker = Worker::new(self.disk, self.base_disk, self.form(hot)?);
        let mut task = Task::default();
        let mut exhausted = false;
        let stop = || self.control.stopped() || queue.halted();
        loop {
            let mut encoded = match queue.turn(exhausted) {
                Turn::Leave => return Ok(()),
                Turn::Write(placed) => {
                    self.write_placed(queue, placed)?;
                    continue;
                }
                Turn::Slot(slot) => slot,
            };
            let seq = {
                let mut plan = plan.lock().unwrap_or_else(PoisonError::into_inner);
                if plan.0.next(&mut task).map_err(|e| self.source(e))? {
                    plan.1 += 1;
                    Some(plan.1 - 1)
                } else {
                    queue.end(plan.1);
                    None
                }
            };
            let Some(seq) = seq else {
                queue.give_back(encoded);
                exhausted = true;
                continue;
            };
            if !self.throttle.take(task.data, &stop) {
                // Not without what is still to be written.
                queue.halt();
                continue;
            }
            let digest = worker.block(&task, &mut encoded).map_err(|fault| match fault {
                Fault::Source(e) => self.source(e),
                Fault::Output(e) => output_error(e.into(), self.file_name),
            })?;
            self.control.counters.read.fetch_add(task.data, Ordering::Relaxed);
            queue.deliver(seq, Done { block: task.block, data: task.data, digest, encoded });
        }
    }

    fn form(&self, hot: Option<&Hot>) -> Result<Form, Error> {
        if let Some(hot) = hot {
            return Ok(Form::Direct(Output { file: self.file.clone(), base: self.base }, hot.clone()));
        }
        if self.target.plain() {
            return Ok(Form::Plain);
        }
        let state = self.target.encoder().and_then(|encoder| encoder.state()).map_err(Error::Output)?;
        let want = self.target.packing().filter(|want| self.pass_on && self.disk.packs(*want));
        Ok(Form::Encoded(state, want))
    }

    /// Writes a block where the writer said.
    fn write_placed(&self, queue: &Queue, placed: Placed) -> Result<(), Error> {
        for run in &placed.runs {
            let bytes = &placed.encoded.bytes[run.start..run.start + run.len];
            self.file.write_all_at(bytes, self.base + run.offset).map_err(|e| output_error(e.into(), self.file_name))?;
        }
        queue.written(placed);
        Ok(())
    }

    /// Writes what was placed and nobody has taken; false when that fails.
    fn drain(&self, queue: &Queue) -> bool {
        while let Some(placed) = queue.take_placed() {
            if let Err(error) = self.write_placed(queue, placed) {
                queue.fail(error);
                return false;
            }
        }
        true
    }

    /// Lays a block down, takes note of one that its worker has written (`hot`), or gives it its place and leaves the writing to the workers.
    /// Under a bandwidth limit they sleep, so that it is done here.
    fn lay(&self, queue: &Queue, seq: u64, encoded: Encoded, hot: bool, writer: &mut dyn DiskWriter) -> Result<(), Error> {
        let fail = |e| output_error(e, self.file_name);
        if hot {
            writer.took_block(&encoded).map_err(fail)?;
            queue.give_back(encoded);
            return Ok(());
        }
        let mut runs = Vec::new();
        if !self.throttle.limits() && writer.place_block(&encoded, &mut runs).map_err(fail)? {
            queue.place(Placed { seq, encoded, runs });
            return Ok(());
        }
        writer.write_block(&encoded).map_err(fail)?;
        queue.give_back(encoded);
        Ok(())
    }

    fn source(&self, source: FormatError) -> Error {
        Error::Source { disk: self.name.to_owned(), source }
    }

    /// The writer: lays blocks down in order and hands over checkpoints. Answers with what it has when all blocks are written.
    fn write_all(&self, queue: &Queue, start: Start, hot: bool, seals: SyncSender<Sealing>) -> Written {
        let mut written = Written { writer: start.writer, blocks: start.blocks, from: start.from, data: start.data, next_seq: 0 };
        let mut pending = Pending { next_block: start.next_block, ..Pending::new() };
        loop {
            let until = pending.dirty.then(|| pending.since + self.tuning.checkpoint_every);
            let ended = match queue.next(until) {
                Next::Block(seq, done) => {
                    pending.add(&done, &mut written);
                    written.next_seq = seq + 1;
                    if let Err(error) = self.lay(queue, seq, done.encoded, hot, written.writer.as_mut()) {
                        queue.fail(error);
                        return written;
                    }
                    false
                }
                Next::Late => false,
                Next::End => true,
                // What is in order is kept, unless the output is going to be thrown away or cannot be trusted.
                Next::Halted if self.control.stop() == Some(Stop::Cancel) || !queue.output_is_sound() => return written,
                Next::Halted => true,
            };
            // Once the queue has halted or ended the workers leave, and whoever waits for these bytes would wait for ever.
            if (ended || queue.halted()) && !self.drain(queue) {
                return written;
            }
            // Before the next block would make it more.
            let full = pending.data + BLOCK > self.tuning.checkpoint_bytes || pending.digests.len() >= MAX_DIGESTS;
            if pending.dirty && (ended || full || until.is_some_and(|until| Instant::now() >= until)) {
                match self.checkpoint(&mut written, &mut pending) {
                    Ok(checkpoint) => {
                        // A sealer that is gone has said why.
                        if seals.send(checkpoint).is_err() {
                            return written;
                        }
                    }
                    Err(error) => {
                        queue.fail(error);
                        return written;
                    }
                }
            }
            if ended {
                return written;
            }
        }
    }

    fn checkpoint(&self, written: &mut Written, pending: &mut Pending) -> Result<Sealing, Error> {
        let piece = written.writer.checkpoint().map_err(|e| output_error(e, self.file_name))?;
        let (from, position) = (written.from, written.writer.position());
        written.from = position;
        let end = if self.target.is_raw() { (pending.next_block * BLOCK).min(self.disk.capacity()) } else { position };
        let done = std::mem::replace(pending, Pending { next_block: pending.next_block, ..Pending::new() });
        let (disk, next_block, data) = (self.number, done.next_block, written.data);
        let checkpoint = Checkpoint { disk, next_block, data, from, position, hash: [0; 32], digests: done.digests, piece };
        Ok(Sealing { checkpoint, before: written.next_seq, end })
    }

    /// The sealer: makes checkpoints durable, one after the other, while the writer goes on.
    fn seal_all(&self, queue: &Queue, seals: &Receiver<Sealing>, journal: &mut Journal) {
        for Sealing { mut checkpoint, before, end } in seals {
            if !queue.wait_written(before) {
                return;
            }
            self.growing.grow(end);
            let data = checkpoint.data;
            if self.tuning.resumable {
                let hashed = self.target.evidence() == Evidence::Region;
                if let Err(error) = seal(&self.file, self.base, hashed, self.file_name, &mut checkpoint) {
                    return queue.fail(error);
                }
                if let Err(e) = journal.append(&Record::Checkpoint(checkpoint)) {
                    return queue.fail(Error::journal(e));
                }
            }
            self.control.counters.durable.store(self.durable_before + data, Ordering::Relaxed);
        }
    }

    /// Writes the rest of the output, syncs it and says so in the journal.
    fn finish(&self, mut written: Written, journal: &mut Journal) -> Result<Copied, Error> {
        let io = |e: std::io::Error| output_error(e.into(), self.file_name);
        let length = written.writer.finish().map_err(|e| output_error(e, self.file_name))?;
        self.file.sync_data().map_err(io)?;
        let (front, tail) = match self.tuning.resumable && self.target.evidence() != Evidence::Blocks {
            true => (
                hash_region(&self.file, self.base, self.base + self.front).map_err(io)?,
                hash_region(&self.file, self.base + written.from, self.base + length).map_err(io)?,
            ),
            false => ([0; 32], [0; 32]),
        };
        let data = written.data;
        journal.append(&Record::DiskFinished { disk: self.number, length, data, front, tail }).map_err(Error::journal)?;
        self.control.counters.durable.store(self.durable_before + data, Ordering::Relaxed);
        debug_assert!(written.blocks.0.keys().next_back().is_none_or(|last| *last < block_count(self.disk.capacity())));
        Ok(Copied { blocks: written.blocks, length, data })
    }
}

/// A checkpoint on its way to the journal.
struct Sealing {
    checkpoint: Checkpoint,
    /// All blocks before this one in the writer's order must be written first.
    before: u64,
    /// Bytes of the disk's output that are final then, counted from its base.
    end: u64,
}

/// What the writer has so far.
struct Written {
    writer: Box<dyn DiskWriter>,
    blocks: Blocks,
    from: u64,
    data: u64,
    /// Number of the next block in its order.
    next_seq: u64,
}

/// What the next checkpoint will hold.
struct Pending {
    dirty: bool,
    since: Instant,
    next_block: u64,
    data: u64,
    digests: Vec<(u64, Digest)>,
}

impl Pending {
    fn new() -> Self {
        Self { dirty: false, since: Instant::now(), next_block: 0, data: 0, digests: Vec::new() }
    }

    fn add(&mut self, done: &Done, written: &mut Written) {
        if !self.dirty {
            self.dirty = true;
            self.since = Instant::now();
        }
        self.next_block = done.block + 1;
        self.data += done.data;
        written.data += done.data;
        if let Some(digest) = done.digest {
            self.digests.push((done.block, digest));
            written.blocks.0.insert(done.block, digest);
        }
    }
}
