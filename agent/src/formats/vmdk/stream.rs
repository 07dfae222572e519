//! A streamOptimized VMDK as it comes over a connection: front to back, once, without its length.
//!
//! ```text
//! header ─► descriptor ─► { grain · table · directory · footer }* ─► end of stream
//! ```
//! Owns: the order of a stream and that it is whole: one that stops before its end-of-stream marker is an error, never a shorter disk.
//! Never: inflates a grain, trusts a table (the markers say where a grain belongs). A crash here costs the stream: it is asked for again.
//! Source: Virtual Disk Format 5.0, "Stream-Optimized Compressed Sparse Extents".

use std::io::{self, Read};

use super::NAME;
use super::descriptor::{self, MAX_BYTES};
use super::header::{Header, SECTOR, le32, le64, marker};
use crate::formats::{FormatError, Result};

/// Bytes of a grain's marker before its data: LBA (u64) and size (u32).
const MARKER: usize = 12;

/// Cuts a stream into its grains.
pub struct Splitter<R> {
    input: R,
    header: Header,
    /// Bytes read so far.
    at: u64,
    /// The grain that came last.
    last: Option<u64>,
    ended: bool,
}

impl<R: Read> Splitter<R> {
    /// Reads as far as the first grain.
    pub fn open(input: R) -> Result<Self> {
        let mut splitter = Self { input, header: empty(), at: 0, last: None, ended: false };
        let mut sector = [0u8; SECTOR as usize];
        splitter.fill(&mut sector)?;
        let header = Header::parse(&sector, "header", 0)?;
        if !header.compressed {
            return Err(FormatError::Unsupported("vmdk: the stream's grains are not compressed".to_owned()));
        }
        // `overHead`: where the first grain or marker lies.
        let ahead = le64(&sector, 64).saturating_mul(SECTOR).saturating_sub(SECTOR);
        if ahead > MAX_BYTES + (64 << 10) {
            return Err(splitter.corrupt(format!("its first grain lies {ahead} bytes behind the header")));
        }
        // Bounded above.
        let mut head = vec![0u8; ahead as usize];
        splitter.fill(&mut head)?;
        if header.descriptor > 0 {
            let start = (header.descriptor - 1).saturating_mul(SECTOR);
            let end = start.saturating_add(header.descriptor_size.saturating_mul(SECTOR));
            let text = usize::try_from(start).ok().zip(usize::try_from(end).ok()).and_then(|(start, end)| head.get(start..end));
            let text = text.ok_or_else(|| splitter.corrupt("its descriptor lies behind its first grain".to_owned()))?;
            descriptor::parse(text)?.complete()?;
        }
        splitter.header = header;
        Ok(splitter)
    }

    /// Bytes of the disk.
    pub fn capacity(&self) -> u64 {
        // The header's parser has refused what overflows.
        self.header.capacity * SECTOR
    }

    /// Bytes of a grain.
    pub fn grain(&self) -> u64 {
        self.header.grain * SECTOR
    }

    /// The next grain: its number, and its bytes as they are stored (RFC 1950). `None` behind the end-of-stream marker.
    pub fn next_grain(&mut self) -> Result<Option<(u64, Vec<u8>)>> {
        let mut sector = [0u8; SECTOR as usize];
        while !self.ended {
            self.fill(&mut sector)?;
            let (value, size) = (le64(&sector, 0), le32(&sector, 8) as usize);
            if size > 0 {
                return self.grain_at(value, size, &sector).map(Some);
            }
            match le32(&sector, 12) {
                marker::EOS if value == 0 => self.ended = true,
                marker::GRAIN_TABLE | marker::GRAIN_DIRECTORY | marker::FOOTER => self.skip(value)?,
                kind => return Err(self.corrupt(format!("a marker of kind {kind} with {value} sectors"))),
            }
        }
        Ok(None)
    }

    fn grain_at(&mut self, lba: u64, size: usize, sector: &[u8]) -> Result<(u64, Vec<u8>)> {
        let grain = self.header.grain;
        let number = lba / grain;
        if !lba.is_multiple_of(grain) || lba >= self.header.capacity {
            return Err(self.corrupt(format!("a grain of sector {lba}, of a disk of {} in grains of {grain}", self.header.capacity)));
        }
        if self.last.is_some_and(|last| number <= last) {
            return Err(self.corrupt(format!("grain {number} comes behind grain {}", self.last.unwrap_or_default())));
        }
        // What deflate makes of incompressible bytes at worst; a grain has 1 MiB at most.
        let plain = (grain * SECTOR) as usize;
        if size > plain + plain / 8 + 64 {
            return Err(self.corrupt(format!("grain {number} has {size} compressed bytes")));
        }
        let stored = (MARKER + size).next_multiple_of(SECTOR as usize);
        let mut bytes = vec![0u8; stored];
        bytes[..SECTOR as usize].copy_from_slice(sector);
        self.fill(&mut bytes[SECTOR as usize..])?;
        bytes.truncate(MARKER + size);
        bytes.drain(..MARKER);
        self.last = Some(number);
        Ok((number, bytes))
    }

    /// Tables, directory, footer: the markers have said it all.
    fn skip(&mut self, sectors: u64) -> Result<()> {
        let bytes = sectors.saturating_mul(SECTOR);
        let skipped = io::copy(&mut (&mut self.input).take(bytes), &mut io::sink())?;
        self.at += skipped;
        if skipped < bytes { Err(self.cut()) } else { Ok(()) }
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<()> {
        match self.input.read_exact(buf) {
            Ok(()) => {
                self.at += buf.len() as u64;
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(self.cut()),
            Err(e) => Err(e.into()),
        }
    }

    /// A connection that ends like this may be made again.
    fn cut(&self) -> FormatError {
        FormatError::Io(io::Error::new(
            io::ErrorKind::ConnectionAborted,
            format!("the stream ends behind byte {}, before its end", self.at),
        ))
    }

    fn corrupt(&self, reason: String) -> FormatError {
        FormatError::Corrupt { format: NAME, what: "stream", index: 0, offset: self.at, reason }
    }
}

/// In place until the real one was read.
fn empty() -> Header {
    Header {
        capacity: 0,
        grain: 1,
        descriptor: 0,
        descriptor_size: 0,
        redundant: None,
        directory: 0,
        zeroed: false,
        compressed: true,
        gtes: 0,
        first: 0,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A header, no descriptor, two grains, a table, the end.
    fn stream() -> Vec<u8> {
        let mut head = vec![0u8; 512];
        head[..4].copy_from_slice(b"KDMV");
        head[4..8].copy_from_slice(&3u32.to_le_bytes());
        head[8..12].copy_from_slice(&0x3_0001u32.to_le_bytes());
        head[12..20].copy_from_slice(&1024u64.to_le_bytes());
        head[20..28].copy_from_slice(&128u64.to_le_bytes());
        head[44..48].copy_from_slice(&512u32.to_le_bytes());
        head[56..64].copy_from_slice(&u64::MAX.to_le_bytes());
        head[64..72].copy_from_slice(&1u64.to_le_bytes());
        head[73..77].copy_from_slice(b"\n \r\n");
        head[77..79].copy_from_slice(&1u16.to_le_bytes());
        for (lba, size) in [(0u64, 600usize), (256, 40)] {
            let mut grain = vec![0xabu8; (MARKER + size).next_multiple_of(512)];
            grain[..8].copy_from_slice(&lba.to_le_bytes());
            grain[8..12].copy_from_slice(&(size as u32).to_le_bytes());
            head.extend(grain);
        }
        head.extend(marker::sector(4, marker::GRAIN_TABLE));
        head.extend(vec![0u8; 4 * 512]);
        head.extend(marker::sector(0, marker::EOS));
        head
    }

    fn grains(bytes: &[u8]) -> Result<Vec<(u64, usize)>> {
        let mut splitter = Splitter::open(bytes)?;
        let mut found = Vec::new();
        while let Some((number, bytes)) = splitter.next_grain()? {
            found.push((number, bytes.len()));
        }
        Ok(found)
    }

    #[test]
    fn a_stream_gives_its_grains_and_one_that_is_cut_anywhere_is_an_error() {
        let whole = stream();
        assert_eq!(grains(&whole).unwrap(), [(0, 600), (2, 40)]);
        for length in (0..whole.len()).step_by(128) {
            let cut = grains(&whole[..length]);
            assert!(matches!(cut, Err(FormatError::Io(_))), "{length}: {cut:?}");
        }
    }

    #[test]
    fn a_stream_that_contradicts_itself_is_refused() {
        let whole = stream();
        let with = |at: usize, bytes: &[u8]| {
            let mut other = whole.clone();
            other[at..at + bytes.len()].copy_from_slice(bytes);
            other
        };
        // The second grain's marker begins at byte 512 + 1024.
        for (what, bytes) in [
            ("backwards", with(1536, &0u64.to_le_bytes())),
            ("past the capacity", with(1536, &1024u64.to_le_bytes())),
            ("between grains", with(1536, &130u64.to_le_bytes())),
            ("an enormous grain", with(1544, &(1u32 << 20).to_le_bytes())),
            ("a marker nobody knows", with(2048 + 12, &9u32.to_le_bytes())),
        ] {
            assert!(matches!(grains(&bytes), Err(FormatError::Corrupt { .. })), "{what}: {:?}", grains(&bytes));
        }
    }
}
