//! One worker of a copy: reads a block, hashes it, encodes it, and writes it where the output lets it.
//!
//! Owns: a thread's buffers, and the order in which a block's bytes are touched: read, hashed, encoded and, for raw and plain qcow2, written a
//! piece at a time, while the piece is still in the core's cache.
//! Never: knows of other blocks. A crash here costs the block.

use std::io;

use shared::manifest::Digest;

use super::Base;
use super::plan::{Task, block_len};
use crate::formats::places::{Places, Span};
use crate::formats::{
    Disk, EncodeState, Encoded, Extent, FormatError, Hot, Output, Packing, Place, Result, Scratch, UNIT, Unit, is_zero, raw,
};

/// Bytes of a plain block that are read and hashed at a time: they fit the second-level cache of a core.
const STEP: usize = 256 << 10;

static ZEROS: [u8; UNIT] = [0; UNIT];

/// How a worker leaves its blocks.
pub(super) enum Form {
    /// Units as they are.
    Plain,
    /// Written here and now; only which they are, and where, is left.
    Direct(Output, Hot),
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
    base: Option<&'a Base>,
    form: Form,
    scratch: Scratch,
    data: Vec<u8>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(disk: &'a dyn Disk, base: Option<&'a Base>, form: Form) -> Self {
        Self { disk, base, form, scratch: Scratch::default(), data: Vec::new() }
    }

    /// Reads the block and leaves its units in `out`; answers its digest, `None` when it is all zeros.
    pub(super) fn block(&mut self, task: &Task, out: &mut Encoded) -> Result<Option<Digest>, Fault> {
        out.clear();
        let Self { disk, base, form, scratch, data } = self;
        match form {
            Form::Encoded(state, _) if base.is_some() => Ok(differing(*disk, *base, task, state.as_mut(), data, out, scratch)?),
            Form::Plain => Ok(plain(*disk, task, data, out, scratch)?),
            Form::Direct(output, hot) => direct(*disk, task, output, hot, data, out, scratch),
            Form::Encoded(state, want) => Ok(encoded(*disk, task, state.as_mut(), *want, data, out, scratch)?),
        }
    }
}

fn direct(
    disk: &dyn Disk,
    task: &Task,
    output: &Output,
    hot: &Hot,
    data: &mut Vec<u8>,
    out: &mut Encoded,
    scratch: &mut Scratch,
) -> Result<Option<Digest>, Fault> {
    data.resize(STEP, 0);
    let mut hasher = blake3::Hasher::new();
    let end = task.offset() + block_len(task.block, disk.capacity()) as u64;
    let mut shelf = match hot {
        Hot::Offsets => None,
        Hot::Places(places) => Some(Shelf { places, room: Span { first: 0, count: 0 }, wanted: units_of(&task.extents) }),
    };
    let mut at = task.offset();
    while at < end {
        let len = (end - at).min(STEP as u64) as usize;
        fill(disk, &task.extents, at, &mut data[..len], scratch)?;
        data[len..len.next_multiple_of(UNIT)].fill(0);
        hasher.update(&data[..len]);
        let first = out.units.len();
        for (i, _) in data[..len].chunks(UNIT).enumerate().filter(|(_, unit)| !is_zero(unit)) {
            out.units.push(Unit { index: at / UNIT as u64 + i as u64, start: i * UNIT, len: UNIT, compressed: false });
        }
        let Encoded { placed, units, .. } = out;
        for run in units[first..].chunk_by(|a, b| a.index + 1 == b.index) {
            let (from, to) = (run[0].start, run[run.len() - 1].start + UNIT);
            let written = match &mut shelf {
                None => output.write_all_at(&data[from..to.min(len)], at + from as u64),
                Some(shelf) => shelf.write(output, run[0].index, &data[from..to], placed),
            };
            written.map_err(Fault::Output)?;
        }
        at += len as u64;
    }
    if let Some(shelf) = shelf {
        shelf.places.give_back(shelf.room);
    }
    Ok((!out.units.is_empty()).then(|| *hasher.finalize().as_bytes()))
}

/// Places of one block: taken for all that it may need at once, so that it lies in one piece where it can.
struct Shelf<'a> {
    places: &'a Places,
    /// Taken and not written.
    room: Span,
    /// Units that may still come.
    wanted: u64,
}

impl Shelf<'_> {
    fn write(&mut self, output: &Output, mut index: u64, mut bytes: &[u8], placed: &mut Vec<Place>) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = (bytes.len() / UNIT) as u64;
            if self.room.count == 0 {
                self.room = self.places.take(self.wanted.max(count));
            }
            let span = Span { first: self.room.first, count: count.min(self.room.count) };
            let (now, later) = bytes.split_at(span.count as usize * UNIT);
            output.write_all_at(now, span.offset())?;
            match placed.last_mut() {
                Some(last) if last.index + last.span.count == index && last.span.first + last.span.count == span.first => {
                    last.span.count += span.count;
                }
                _ => placed.push(Place { index, span }),
            }
            self.room = Span { first: span.first + span.count, count: self.room.count - span.count };
            self.wanted = self.wanted.saturating_sub(span.count);
            index += span.count;
            bytes = later;
        }
        Ok(())
    }
}

/// Units that the extents touch.
fn units_of(extents: &[Extent]) -> u64 {
    let (mut count, mut next) = (0, 0);
    for extent in extents {
        let (from, to) = (extent.offset / UNIT as u64, (extent.offset + extent.len).div_ceil(UNIT as u64));
        count += to.saturating_sub(next.max(from));
        next = to;
    }
    count
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

/// Leaves the units that differ from the base, those that became zeros among them, and all that hold data where the copy is to be whole.
/// The base is held against its own digests: nothing is built on what is damaged.
fn differing(
    disk: &dyn Disk,
    base: Option<&Base>,
    task: &Task,
    state: &mut dyn EncodeState,
    data: &mut Vec<u8>,
    out: &mut Encoded,
    scratch: &mut Scratch,
) -> Result<Option<Digest>> {
    let Some(base) = base else { return encoded(disk, task, state, None, data, out, scratch) };
    data.resize(2 * UNIT, 0);
    let (unit, earlier) = data.split_at_mut(UNIT);
    let (mut now, mut before) = (blake3::Hasher::new(), blake3::Hasher::new());
    let (mut is_empty, mut was_empty) = (true, true);
    let end = task.offset() + block_len(task.block, disk.capacity()) as u64;
    let mut at = task.offset();
    while at < end {
        let len = (end - at).min(UNIT as u64) as usize;
        let (unit, earlier) = (&mut unit[..len], &mut earlier[..len]);
        fill(disk, &task.extents, at, unit, scratch)?;
        base.disk.read_at(at, earlier, scratch)?;
        now.update(unit);
        before.update(earlier);
        let empty = is_zero(unit);
        (is_empty, was_empty) = (is_empty && empty, was_empty && is_zero(earlier));
        let is_wanted = if base.over.is_some() { unit != earlier } else { !empty };
        if is_wanted {
            state.append(at / UNIT as u64, unit, out)?;
        }
        at += len as u64;
    }
    let held = (!was_empty).then(|| *before.finalize().as_bytes());
    if held.as_ref() != base.blocks.0.get(&task.block) {
        let reason = "the earlier state does not hold what its manifest says; `full` begins anew without it".to_owned();
        return Err(FormatError::Corrupt { format: "qcow2", what: "block", index: task.block, offset: task.offset(), reason });
    }
    Ok((!is_empty).then(|| *now.finalize().as_bytes()))
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
