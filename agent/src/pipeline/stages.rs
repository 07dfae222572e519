//! A job from its first stage to its last.
//!
//! Owns: the sequence, and what one stage hands to the next.
//! Never: moves a byte itself. A crash here costs nothing that was sealed: the same sequence finds it and goes on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use shared::manifest::{Blocks, FileEntry, Receipt};

use super::control::{Control, Crew};
use super::copy::{Copied, DiskCopy, Start};
use super::files::{Growing, Hashing, Input, drop_cache, mostly_holes};
use super::package::{Package, Place};
use super::part::PartDir;
use super::plan::{Plan, Task, data_bytes};
use super::resume::{Found, Partial, Verified, survey};
use super::target::{Target, open_layer, open_output};
use super::throttle::Throttle;
use super::verify::{Proof, damaged};
use super::{DiskOutcome, Error, Format, Job, Outcome, SourceDisk, Stage, Watch, output_error};
use crate::formats::Output;
use crate::journal::{Journal, Record};

/// Runs a job in `part`, an open folder that is its own, with a journal that was opened with [`Job::identity`]. Answers when the output is
/// complete, synced and (unless the job says otherwise) read back and found equal. May be called again with the same job, folder and journal
/// after any error and any crash: it goes on where that left off. A journal that was not adopted goes with an empty folder
/// ([`PartDir::clear`]); files that the job writes are emptied, others stay.
pub fn run(job: &Job, part: &PartDir, journal: &mut Journal, watch: &dyn Watch) -> Result<Outcome, Error> {
    let control = Control::new(watch);
    control.report();
    let outcome = go(job, part, journal, &control);
    // The caller's last word on what is durable, also when the job ended early.
    control.report();
    outcome
}

fn go(job: &Job, part: &PartDir, journal: &mut Journal, control: &Control<'_>) -> Result<Outcome, Error> {
    let mut run = Run::new(job, part, control)?;
    if *journal.identity() != job.identity() {
        return Err(Error::Journal(std::io::Error::other("it was opened for another job")));
    }
    let data = run.count()?;
    let found = survey(job, part, journal, &run.package, run.target, control)?;
    let Found { finished, partial, all_written, verified, hashed } = found;
    let hashing = Hashing::new(hashed);
    let resumed = finished.iter().map(|disk| disk.data).sum::<u64>() + partial.as_ref().map_or(0, |partial| partial.data);
    for (counter, value) in [(&control.counters.total, data), (&control.counters.resumed, resumed), (&control.counters.durable, resumed)] {
        counter.store(value, Ordering::Relaxed);
    }
    if resumed > 0 {
        control.log(tracing::Level::INFO, &format!("going on behind {resumed} of {data} data bytes of an earlier attempt"));
    }

    control.enter(Stage::Copying);
    // With the figures in hand the caller may want none of it: then not a byte is written.
    control.check()?;
    for disk in finished {
        run.keep(Copied { blocks: disk.blocks, length: disk.length, data: disk.data });
    }
    run.copy(partial, &hashing, journal)?;
    let inputs = match all_written.filter(|files| run.package.is_whole(part, files)) {
        Some(_) => run.package.files(part, &run.places)?,
        None => {
            run.package.finish(part, &run.places, &hashing, control)?;
            let inputs = run.package.files(part, &run.places)?;
            let files = inputs.iter().map(|input| (input.name.clone(), input.size)).collect();
            journal.append(&Record::AllWritten { files }).map_err(Error::journal)?;
            inputs
        }
    };

    control.enter(Stage::Verifying);
    let receipt = run.prove(&inputs, &hashing, &verified, journal)?;
    let entry = |input: &Input| FileEntry {
        path: input.name.clone(),
        size: input.size,
        sha256: hashing.digest(&input.name),
        format: input.format.to_owned(),
    };
    Ok(Outcome {
        files: inputs.iter().map(entry).collect(),
        disks: run.outcomes()?,
        receipt,
        data_bytes: data,
        bytes_read: control.counters.read.load(Ordering::Relaxed),
        resumed_from: resumed,
    })
}

/// A job on its way.
struct Run<'a> {
    job: &'a Job,
    part: &'a PartDir,
    control: &'a Control<'a>,
    target: Target,
    package: Package<'a>,
    throttle: Throttle,
    /// By disk, as far as they are complete.
    places: Vec<Place>,
    blocks: Vec<Blocks>,
    /// Data bytes by disk.
    data: Vec<u64>,
}

impl<'a> Run<'a> {
    fn new(job: &'a Job, part: &'a PartDir, control: &'a Control<'a>) -> Result<Self, Error> {
        Ok(Self {
            job,
            part,
            control,
            target: Target::new(job).map_err(Error::Output)?,
            package: Package::new(job)?,
            throttle: Throttle::new(job.bandwidth),
            places: Vec::new(),
            blocks: Vec::new(),
            data: Vec::new(),
        })
    }

    /// Data bytes of all disks.
    fn count(&mut self) -> Result<u64, Error> {
        let control = self.control;
        let stop = || {
            control.poll();
            control.stopped()
        };
        for source in &self.job.disks {
            let data = data_bytes(source.disk.as_ref(), &stop).map_err(|e| Error::Source { disk: source.name.clone(), source: e })?;
            self.data.push(data);
        }
        self.control.check()?;
        Ok(self.data.iter().sum())
    }

    /// Takes note of a complete disk.
    fn keep(&mut self, disk: Copied) {
        let base = self.package.base(self.places.len(), &self.places);
        self.places.push(Place { base, length: disk.length, data: disk.data });
        self.blocks.push(disk.blocks);
    }

    /// Copies what is not complete, the first of it from `partial` on.
    fn copy(&mut self, mut partial: Option<Partial>, hashing: &Hashing, journal: &mut Journal) -> Result<(), Error> {
        for number in self.places.len()..self.job.disks.len() {
            let copied = self.copy_disk(number, partial.take(), hashing, journal)?;
            self.keep(copied);
        }
        Ok(())
    }

    fn copy_disk(&self, number: usize, partial: Option<Partial>, hashing: &Hashing, journal: &mut Journal) -> Result<Copied, Error> {
        let source = &self.job.disks[number];
        let name = self.job.disk_file(number);
        let fail = |e: std::io::Error| output_error(e.into(), &name);
        let file = Arc::new(self.part.open_or_create(&name).map_err(fail)?);
        let base = self.package.base(number, &self.places);
        let output = Output { file: file.clone(), base };
        let capacity = source.disk.capacity();
        let backing = source.base.as_ref().and_then(super::Base::backing);
        let (start, front) = match partial {
            Some(partial) => self.take_up(output, capacity, number, partial, journal)?,
            None => {
                file.set_len(base).map_err(fail)?;
                let writer = self.target.create(output, capacity, number, backing.as_deref()).map_err(|e| output_error(e, &name))?;
                file.sync_all().map_err(fail)?;
                self.part.sync().map_err(fail)?;
                let front = self.target.front(writer.position());
                journal.append(&Record::DiskStarted { disk: number as u32, base, front }).map_err(Error::journal)?;
                (Start { writer, next_block: 0, data: 0, from: front, blocks: Blocks::default() }, front)
            }
        };
        let growing = Growing::new();
        let copy = DiskCopy {
            control: self.control,
            throttle: &self.throttle,
            tuning: &self.job.tuning,
            target: self.target,
            number: number as u32,
            name: &source.name,
            disk: source.disk.as_ref(),
            base_disk: source.base.as_ref(),
            file_name: &name,
            file: file.clone(),
            base,
            front,
            durable_before: self.places.iter().map(|place| place.data).sum(),
            pass_on: self.job.pass_on,
            growing: &growing,
        };
        // Behind the writer where its bytes stay as they are: what a package's `.mf` says, and the file itself unless it is left out in the end.
        let raw = self.job.format == Format::Raw;
        let followed = match self.job.format {
            Format::Ova => self.package.member(number),
            Format::Ovf => Some(name.clone()),
            _ if !self.job.sha256 || !self.target.is_stream() || (raw && mostly_holes(capacity, self.data[number])) => None,
            _ => Some(name.clone()),
        };
        let Some(followed) = followed else { return copy.run(start, journal) };
        thread::scope(|scope| {
            scope.spawn(|| hashing.follow(&followed, &file, base, raw, &growing));
            let copied = copy.run(start, journal);
            growing.close();
            copied
        })
    }

    /// A writer that goes on at a checkpoint.
    fn take_up(&self, output: Output, capacity: u64, number: usize, partial: Partial, journal: &Journal) -> Result<(Start, u64), Error> {
        let Partial { front, next_block, data, position, blocks, records } = partial;
        let backing = self.job.disks[number].base.as_ref().and_then(super::Base::backing);
        let mut pieces = records.filter_map(|i| match journal.read(i) {
            Ok(Record::Checkpoint(checkpoint)) => Some(Ok(checkpoint.piece)),
            Ok(_) => None,
            Err(e) => Some(Err(e.into())),
        });
        let writer = self.target.resume(output, capacity, number, backing.as_deref(), &mut pieces, position).map_err(Error::Output)?;
        Ok((Start { writer, next_block, data, from: position, blocks }, front))
    }

    /// Reads everything back: blocks and files side by side.
    fn prove(&self, inputs: &[Input], hashing: &Hashing, found: &BTreeMap<u32, Verified>, journal: &mut Journal) -> Result<Receipt, Error> {
        for input in inputs {
            if self.job.verify {
                drop_cache(&input.file).map_err(|e| output_error(e.into(), &input.name))?;
            }
        }
        let halted = AtomicBool::new(false);
        let crew = Crew::new(1);
        thread::scope(|scope| {
            let hasher = scope.spawn(|| {
                let _member = crew.member();
                let wanted = if self.job.sha256 { inputs } else { &[] };
                hashing.run(wanted, &|| halted.load(Ordering::Relaxed) || self.control.stopped())
            });
            let compared = if self.job.verify { self.compare(hashing, found, journal) } else { Ok(unproven()) };
            let mut noted = Ok(());
            if compared.is_err() {
                halted.store(true, Ordering::Relaxed);
            }
            crew.wait(|| {
                self.control.poll();
                for record in hashing.records() {
                    if noted.is_ok() {
                        noted = journal.append(&record).map_err(Error::journal);
                    }
                }
            });
            let hashed = hasher.join().unwrap_or_else(|_| Err(Error::Output(std::io::Error::other("the hashing thread panicked").into())));
            let receipt = compared?;
            noted?;
            hashed?;
            self.control.check()?;
            Ok(receipt)
        })
    }

    /// Compares each disk with the digests made while it was read.
    fn compare(&self, hashing: &Hashing, found: &BTreeMap<u32, Verified>, journal: &mut Journal) -> Result<Receipt, Error> {
        let mut sum = Verified::default();
        let windows = self.package.disks(self.part)?;
        for ((number, source), window) in self.job.disks.iter().enumerate().zip(windows) {
            let start = found.get(&(number as u32)).copied().unwrap_or_default();
            self.control.counters.verified.store(sum.data + start.data, Ordering::Relaxed);
            let output = match source.base.as_ref().filter(|base| base.over.is_some()) {
                Some(base) => open_layer(window, base.disk.clone(), false),
                None => open_output(self.job.format.disk_format(), window),
            };
            let output = output.map_err(|e| damaged(e, &source.name, start.next_block))?;
            let proof = Proof {
                control: self.control,
                tuning: &self.job.tuning,
                number: number as u32,
                name: &source.name,
                source: source.disk.as_ref(),
                output: output.as_ref(),
                blocks: &self.blocks[number],
                reads_all: source.base.is_some(),
                verified_before: sum.data,
            };
            let reached = proof.run(start, hashing, journal)?;
            sum.data += reached.data;
            sum.blocks += reached.blocks;
        }
        Ok(Receipt { read_back: "cache_dropped".to_owned(), blocks_verified: sum.blocks, bytes_verified: sum.data })
    }

    fn outcomes(self) -> Result<Vec<DiskOutcome>, Error> {
        let Self { job, package, blocks, .. } = self;
        let outcome = |(number, copied): (usize, Blocks)| {
            let source = &job.disks[number];
            let capacity = source.disk.capacity();
            let blocks = with_base(source, copied).map_err(|e| Error::Source { disk: source.name.clone(), source: e })?;
            Ok(DiskOutcome {
                name: source.name.clone(),
                snapshot: source.snapshot.clone(),
                file: job.disk_file(number),
                member: package.member(number),
                capacity,
                root: blocks.root(capacity),
                blocks,
                over: source.base.as_ref().and_then(|base| base.over.clone()),
            })
        };
        blocks.into_iter().enumerate().map(outcome).collect()
    }
}

/// The digests of the whole disk: those of the base where nothing was looked at, and those of the copy.
fn with_base(source: &SourceDisk, copied: Blocks) -> crate::formats::Result<Blocks> {
    let Some(base) = &source.base else { return Ok(copied) };
    let mut blocks = base.blocks.as_ref().clone();
    let (mut plan, mut task) = (Plan::new(source.disk.as_ref(), 0), Task::default());
    while plan.next(&mut task)? {
        blocks.0.remove(&task.block);
    }
    blocks.0.extend(copied.0);
    Ok(blocks)
}

/// The receipt of an output that nobody read back.
fn unproven() -> Receipt {
    Receipt { read_back: "not_verified".to_owned(), blocks_verified: 0, bytes_verified: 0 }
}
