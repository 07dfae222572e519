//! One worker of a copy: reads a block, hashes it, encodes it, and writes it where it lies in the output as on the disk.
//!
//! Owns: a thread's buffers, and the order in which a block's bytes are touched: read, hashed, encoded and, for raw, written a piece at a
//! time, while the piece is still in the core's cache.
//! Never: knows of other blocks. A crash here costs the block.

use std::io;

use shared::manifest::Digest;

use super::plan::{Task, block_len};
use crate::formats::{Disk, EncodeState, Encoded, Extent, FormatError, Output, Packing, Result, Scratch, UNIT, Unit, is_zero, raw};

/// Bytes of a plain block that are read and hashed at a time: they fit the second-level cache of a core.
const STEP: usize = 256 << 10;

static ZEROS: [u8; UNIT] = [0; UNIT];

/// How a worker leaves its blocks.
pub(super) enum Form {
    /// Units as they are.
    Plain,
    /// Written at their own offsets here and now; only which they are is left.
    Direct(Output),
    /// Encoded; units that are stored in the given packing at the source are passed on.
    Encoded(Box<dyn EncodeState>, Option<Packing>),
}

/// Which side of a block failed.
pub(super) enum Fault {
    Source(FormatError),
    Output(io::Error),
}

impl From<FormatError> for Fault {
    fn from(error: FormatError) -> Self {
        Self::Source(error)
    }
}

/// A thread's state.
pub(super) struct Worker<'a> {
    disk: &'a dyn Disk,
    form: Form,
    scratch: Scratch,
    data: Vec<u8>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(disk: &'a dyn Disk, form: Form) -> Self {
        Self { disk, form, scratch: Scratch::default(), data: Vec::new() }
    }

    /// Reads the block and leaves its units in `out`; answers its digest, `None` when it is all zeros.
    pub(super) fn block(&mut self, task: &Task, out: &mut Encoded) -> Result<Option<Digest>, Fault> {
        out.clear();
        let Self { disk, form, scratch, data } = self;
        match form {
            Form::Plain => Ok(plain(*disk, task, data, out, scratch)?),
            Form::Direct(output) => direct(*disk, task, output, data, out, scratch),
            Form::Encoded(state, want) => Ok(encoded(*disk, task, state.as_mut(), *want, data, out, scratch)?),
        }
    }
}

fn direct(
    disk: &dyn Disk,
    task: &Task,
    output: &Output,
    data: &mut Vec<u8>,
    out: &mut Encoded,
    scratch: &mut Scratch,
) -> Result<Option<Digest>, Fault> {
    data.resize(STEP, 0);
    let mut hasher = blake3::Hasher::new();
    let end = task.offset() + block_len(task.block, disk.capacity()) as u64;
    let mut at = task.offset();
    while at < end {
        let step = &mut data[..(end - at).min(STEP as u64) as usize];
        fill(disk, &task.extents, at, step, scratch)?;
        hasher.update(step);
        let first = out.units.len();
        for (i, _) in step.chunks(UNIT).enumerate().filter(|(_, unit)| !is_zero(unit)) {
            out.units.push(Unit { index: at / UNIT as u64 + i as u64, start: i * UNIT, len: UNIT, compressed: false });
        }
        for units in out.units[first..].chunk_by(|a, b| a.index + 1 == b.index) {
            let (from, to) = (units[0].start, (units[units.len() - 1].start + UNIT).min(step.len()));
            output.write_all_at(&step[from..to], at + from as u64).map_err(Fault::Output)?;
        }
        at += step.len() as u64;
    }
    Ok((!out.units.is_empty()).then(|| *hasher.finalize().as_bytes()))
}

fn plain(disk: &dyn Disk, task: &Task, data: &mut Vec<u8>, out: &mut Encoded, scratch: &mut Scratch) -> Result<Option<Digest>> {
    data.resize(block_len(task.block, disk.capacity()), 0);
    let mut hasher = blake3::Hasher::new();
    let mut at = task.offset();
    let mut zero = true;
    for step in data.chunks_mut(STEP) {
        fill(disk, &task.extents, at, step, scratch)?;
        hasher.update(step);
        zero = zero && is_zero(step);
        at += step.len() as u64;
    }
    if zero {
        return Ok(None);
    }
    raw::split(task.offset(), data, out);
    Ok(Some(*hasher.finalize().as_bytes()))
}

fn encoded(
    disk: &dyn Disk,
    task: &Task,
    state: &mut dyn EncodeState,
    want: Option<Packing>,
    data: &mut Vec<u8>,
    out: &mut Encoded,
    scratch: &mut Scratch,
) -> Result<Option<Digest>> {
    data.resize(UNIT, 0);
    let mut hasher = blake3::Hasher::new();
    let end = task.offset() + block_len(task.block, disk.capacity()) as u64;
    let mut at = task.offset();
    while at < end {
        let index = at / UNIT as u64;
        let len = (end - at).min(UNIT as u64) as usize;
        let unit = &mut data[..len];
        at += len as u64;
        if !meets(&task.extents, at - len as u64, at) {
            hasher.update(&ZEROS[..len]);
            continue;
        }
        let packed = match want.filter(|_| len == UNIT) {
            Some(want) => disk.packed(index, want, unit, scratch)?,
            None => None,
        };
        if let Some(stream) = packed {
            // A unit that deflate made longer is stored as it is, where that can be.
            let stream = if want == Some(Packing::Deflate) && stream.len() >= UNIT { None } else { Some(stream) };
            if !is_zero(unit) {
                let bytes = stream.unwrap_or(unit);
                out.room(bytes.len()).copy_from_slice(bytes);
                out.take(index, bytes.len(), stream.is_some());
            }
            hasher.update(unit);
            continue;
        }
        fill(disk, &task.extents, at - len as u64, unit, scratch)?;
        hasher.update(unit);
        if !is_zero(unit) {
            state.append(index, unit, out)?;
        }
    }
    Ok((!out.units.is_empty()).then(|| *hasher.finalize().as_bytes()))
}

/// Whether any of the extents lies in `[from, to)`.
fn meets(extents: &[Extent], from: u64, to: u64) -> bool {
    let next = extents.partition_point(|extent| extent.offset + extent.len <= from);
    extents.get(next).is_some_and(|extent| extent.offset < to)
}

/// Fills `buf` from `offset`: extents are read, what lies between them is zeros.
fn fill(disk: &dyn Disk, extents: &[Extent], offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
    let end = offset + buf.len() as u64;
    let mut at = 0;
    let first = extents.partition_point(|extent| extent.offset + extent.len <= offset);
    for extent in extents[first..].iter().take_while(|extent| extent.offset < end) {
        let from = (extent.offset.max(offset) - offset) as usize;
        let to = ((extent.offset + extent.len).min(end) - offset) as usize;
        buf[at..from].fill(0);
        disk.read_at(offset + from as u64, &mut buf[from..to], scratch)?;
        at = to;
    }
    buf[at..].fill(0);
    Ok(())
}
