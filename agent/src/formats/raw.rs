//! Raw disks: the file is the disk, its holes are the disk's holes.
//!
//! Owns: reader, encoder and writer of the raw format, and [`split`], the copy-free encoder of every format that stores units as they are.
//! Never: guesses that a file is raw (the declared format rules), writes zeros where a hole will do.
//! A crash here costs what was written since the last checkpoint.

use std::io;

use super::disk::{
    Disk, DiskWriter, EncodeState, Encoded, Encoder as Encode, Extent, FormatError, Hot, Output, Result, Run, Scratch, UNIT, Unit, Window,
    is_zero,
};

/// Bytes in a sector: every disk is a whole number of them.
const SECTOR: u64 = 512;

/// A raw file as a disk. A last sector that is cut short reads as if it were filled up with zeros, as QEMU does.
#[derive(Debug)]
pub struct Reader {
    window: Window,
    capacity: u64,
}

impl Reader {
    /// Takes the window's length, rounded up to whole sectors of 512 bytes, as the capacity. Refused above 8 EiB.
    pub fn open(window: Window) -> Result<Self> {
        let capacity = window
            .len()
            .checked_next_multiple_of(SECTOR)
            .filter(|capacity| *capacity <= i64::MAX as u64)
            .ok_or_else(|| FormatError::Refused { format: "raw", reason: "longer than 8 EiB".to_owned() })?;
        Ok(Self { window, capacity })
    }
}

impl Disk for Reader {
    fn format(&self) -> &'static str {
        "raw"
    }

    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        let to = to.min(self.capacity);
        if from >= to {
            return Ok(Vec::new());
        }
        Ok(self.window.data_runs(from, to)?)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], _scratch: &mut Scratch) -> Result<()> {
        check_range("raw", offset, buf.len(), self.capacity)?;
        let stored = usize::try_from(self.window.len().saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        let (head, tail) = buf.split_at_mut(stored);
        tail.fill(0);
        if head.is_empty() {
            return Ok(());
        }
        Ok(self.window.read_exact_at(head, offset)?)
    }
}

/// Refuses a read that does not lie inside the capacity, as [`Disk::read_at`] promises.
pub(crate) fn check_range(format: &str, offset: u64, len: usize, capacity: u64) -> Result<()> {
    match offset.checked_add(len as u64) {
        Some(end) if end <= capacity => Ok(()),
        _ => {
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{format}: bytes {offset}+{len} lie past the capacity of {capacity}"))
                .into())
        }
    }
}

/// Encodes a block for a format that stores units as they are, without copying it: the block's bytes change places with `out.bytes`.
///
/// `data` starts at logical byte `offset` (a multiple of [`UNIT`]) and is filled up with zeros to a whole unit; afterwards it holds the old
/// buffer of `out`, with unspecified content, for the next block.
pub fn split(offset: u64, data: &mut Vec<u8>, out: &mut Encoded) {
    out.units.clear();
    data.resize(data.len().next_multiple_of(UNIT), 0);
    let first = offset / UNIT as u64;
    for (i, unit) in data.chunks_exact(UNIT).enumerate() {
        if !is_zero(unit) {
            out.units.push(Unit { index: first + i as u64, start: i * UNIT, len: UNIT, compressed: false });
        }
    }
    std::mem::swap(data, &mut out.bytes);
}

/// The encoder of raw and of every format that stores its units as they are.
#[derive(Debug, Default)]
pub struct Encoder;

/// State of [`Encoder`]: none.
struct State;

impl Encode for Encoder {
    fn state(&self) -> Result<Box<dyn EncodeState>> {
        Ok(Box::new(State))
    }
}

impl EncodeState for State {
    fn append(&mut self, index: u64, unit: &[u8], out: &mut Encoded) -> Result<()> {
        let room = out.room(UNIT);
        room[..unit.len()].copy_from_slice(unit);
        room[unit.len()..].fill(0);
        out.take(index, UNIT, false);
        Ok(())
    }
}

/// The units of `block` as runs that are adjacent on the disk and in memory: (first unit, where their bytes start in the block's, their bytes).
pub(crate) fn runs(block: &Encoded) -> impl Iterator<Item = (u64, usize, &[u8])> {
    let mut rest = block.units.as_slice();
    std::iter::from_fn(move || {
        let first = rest.first()?;
        let mut count = 1;
        while let Some(next) = rest.get(count)
            && next.index == first.index + count as u64
            && next.start == first.start + count * UNIT
        {
            count += 1;
        }
        rest = &rest[count..];
        Some((first.index, first.start, block.bytes.get(first.start..first.start + count * UNIT)?))
    })
}

/// Writes units at their own offsets; what is not written stays a hole.
#[derive(Debug)]
pub struct Writer {
    output: Output,
    capacity: u64,
    /// End of the last unit written, at most the capacity.
    position: u64,
}

impl Writer {
    /// A writer of an empty disk of `capacity` bytes; the output must hold nothing from its base on.
    pub fn new(output: Output, capacity: u64) -> Self {
        Self { output, capacity, position: 0 }
    }

    /// A writer that goes on at `position`, a [`DiskWriter::position`] of an earlier one.
    pub fn resume(output: Output, capacity: u64, position: u64) -> Self {
        Self { output, capacity, position }
    }
}

impl Writer {
    /// Where a run of units goes: its offset and how many of its `len` bytes are inside the capacity.
    fn place(&mut self, first: u64, len: usize) -> Result<(u64, usize)> {
        let offset = first.saturating_mul(UNIT as u64);
        let room = self.capacity.checked_sub(offset).filter(|room| *room > 0).ok_or_else(|| {
            let text = format!("unit {first} lies past the capacity of {}", self.capacity);
            FormatError::Io(io::Error::new(io::ErrorKind::InvalidInput, text))
        })?;
        let len = usize::try_from(room).unwrap_or(usize::MAX).min(len);
        self.position = offset + len as u64;
        Ok((offset, len))
    }
}

impl DiskWriter for Writer {
    fn write_block(&mut self, block: &Encoded) -> Result<()> {
        for (first, _, bytes) in runs(block) {
            let (offset, len) = self.place(first, bytes.len())?;
            self.output.write_all_at(&bytes[..len], offset)?;
        }
        Ok(())
    }

    fn place_block(&mut self, block: &Encoded, out: &mut Vec<Run>) -> Result<bool> {
        out.clear();
        for (first, start, bytes) in runs(block) {
            let (offset, len) = self.place(first, bytes.len())?;
            out.push(Run { start, len, offset });
        }
        Ok(true)
    }

    fn hot(&self) -> Option<Hot> {
        Some(Hot::Offsets)
    }

    fn took_block(&mut self, block: &Encoded) -> Result<()> {
        for unit in &block.units {
            self.place(unit.index, unit.len)?;
        }
        Ok(())
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn finish(&mut self) -> Result<u64> {
        let end = self.output.base.checked_add(self.capacity).ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?;
        self.output.file.set_len(end)?;
        Ok(self.capacity)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn scratch_file(name: &str) -> std::fs::File {
        let path = std::env::temp_dir().join(format!("hypersdk-raw-{name}-{}", std::process::id()));
        let file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file
    }

    #[test]
    fn a_short_last_sector_is_filled_up_and_reads_past_the_capacity_are_refused() {
        let file = scratch_file("short");
        std::os::unix::fs::FileExt::write_all_at(&file, b"abc", 0).unwrap();
        let reader = Reader::open(Window::whole(file).unwrap()).unwrap();
        assert_eq!(reader.capacity(), 512);
        let mut buf = [9u8; 512];
        reader.read_at(0, &mut buf, &mut Scratch::default()).unwrap();
        assert_eq!(&buf[..4], b"abc\0");
        assert!(is_zero(&buf[3..]));
        assert!(reader.read_at(1, &mut buf, &mut Scratch::default()).is_err());
        assert!(reader.read_at(u64::MAX, &mut buf, &mut Scratch::default()).is_err());
    }

    #[test]
    fn split_and_encode_give_the_same_units_and_the_writer_leaves_holes() {
        let mut data = vec![0u8; 5 * UNIT + 512];
        data[UNIT + 7] = 1;
        data[2 * UNIT] = 2;
        data[5 * UNIT + 511] = 3;
        let mut encoded = Encoded::default();
        Encoder.state().unwrap().encode(0, &data, &mut encoded).unwrap();
        let plain: Vec<u64> = encoded.units.iter().map(|unit| unit.index).collect();
        assert_eq!(plain, [1, 2, 5]);
        assert_eq!(
            runs(&encoded).map(|(first, start, bytes)| (first, start, bytes.len())).collect::<Vec<_>>(),
            [(1, 0, 2 * UNIT), (5, 2 * UNIT, UNIT)]
        );

        let capacity = data.len() as u64;
        let file = Arc::new(scratch_file("split"));
        let mut writer = Writer::new(Output { file: file.clone(), base: 0 }, capacity);
        let mut owned = data.clone();
        let mut out = Encoded::default();
        split(0, &mut owned, &mut out);
        assert_eq!(out.units.iter().map(|unit| unit.index).collect::<Vec<_>>(), plain);
        writer.write_block(&out).unwrap();
        assert_eq!(writer.position(), capacity);
        assert_eq!(writer.finish().unwrap(), capacity);
        let mut back = vec![9u8; data.len()];
        std::os::unix::fs::FileExt::read_exact_at(&*file, &mut back, 0).unwrap();
        assert_eq!(back, data);
    }
}
