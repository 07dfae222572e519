//! The file as it is after the log's replay: its bytes, with what the log holds laid over them.
//!
//! Owns: the overlay (where a replay would write, never the data itself, which stays in the log), and the holes of the host file.
//! Never: writes. Memory: at most [`MAX_PIECES`] pieces and [`MAX_HOST_RUNS`] runs, 20 MiB in all.
//! A crash here costs nothing.

use std::collections::BTreeMap;
use std::io;

use super::super::disk::{Extent, Result, Window};

/// Pieces that an overlay may have.
pub(super) const MAX_PIECES: usize = 128 << 10;

/// Data runs of the host file that are remembered; a file with more is taken as full of data.
const MAX_HOST_RUNS: usize = 256 << 10;

/// Length of the host file up to which its runs are looked up: a quarter of a million steps.
const MAX_HOST_LEN: u64 = 256 << 40;

/// Bytes of a log sector, and of what a data descriptor writes.
pub(super) const SECTOR: u64 = 4096;

/// What a replay writes at one place.
#[derive(Clone, Copy, Debug)]
pub(super) enum Content {
    Zeros,
    /// One sector: its first and last bytes are the descriptor's, the others lie in the data sector at byte `stored` of the file (2.3.1.3).
    Sector {
        stored: u64,
        leading: [u8; 8],
        trailing: [u8; 4],
    },
}

/// What a replay would write, by place: not overlapping, the later write won. Places and lengths are multiples of [`SECTOR`].
#[derive(Debug, Default)]
pub(super) struct Overlay {
    pieces: BTreeMap<u64, (u64, Content)>,
    /// Length that the file has after the replay, at least.
    pub(super) end: u64,
}

impl Overlay {
    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Writes `content` over `[start, end)`; both are multiples of [`SECTOR`].
    pub(super) fn write(&mut self, start: u64, end: u64, content: Content) {
        if start >= end {
            return;
        }
        // Whatever reaches over an edge is zeros: a sector is aligned and has just one sector's length.
        if let Some((from, (to, before))) = self.pieces.range(..start).next_back().map(|(from, piece)| (*from, *piece))
            && to > start
        {
            self.pieces.insert(from, (start, before));
            if to > end {
                self.pieces.insert(end, (to, before));
            }
        }
        while let Some((from, (to, covered))) = self.pieces.range(start..end).next().map(|(from, piece)| (*from, *piece)) {
            self.pieces.remove(&from);
            if to > end {
                self.pieces.insert(end, (to, covered));
            }
        }
        self.pieces.insert(start, (end, content));
        self.end = self.end.max(end);
    }

    /// The pieces that touch `[start, end)`, last first: (from, to, content).
    fn touching(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64, Content)> {
        let before = self.pieces.range(..end).rev().map(|(from, (to, content))| (*from, *to, *content));
        before.take_while(move |(_, to, _)| *to > start)
    }
}

/// The file after the replay. Shared between threads.
#[derive(Debug)]
pub(super) struct Image {
    window: Window,
    overlay: Overlay,
    /// Where the host file has data, ascending; `None` when that is not worth knowing.
    host_runs: Option<Vec<Extent>>,
}

impl Image {
    pub(super) fn new(window: Window, overlay: Overlay) -> Result<Self> {
        let host_runs = host_runs(&window)?;
        Ok(Self { window, overlay, host_runs })
    }

    /// Length in bytes, as the replay would leave it.
    pub(super) fn len(&self) -> u64 {
        self.window.len().max(self.overlay.end)
    }

    /// Fills `buf` from `offset`; what only the replay would have made part of the file is zeros, unless the log says what it is.
    pub(super) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.len()).ok_or_else(|| {
            let reason = format!("bytes {offset}+{} lie past the end at {}", buf.len(), self.len());
            io::Error::new(io::ErrorKind::UnexpectedEof, reason)
        })?;
        let stored = usize::try_from(self.window.len().saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        let (head, tail) = buf.split_at_mut(stored);
        tail.fill(0);
        if !head.is_empty() {
            self.window.read_exact_at(head, offset)?;
        }
        for (from, to, content) in self.overlay.touching(offset, end) {
            let (start, stop) = (from.max(offset), to.min(end));
            let part = &mut buf[(start - offset) as usize..(stop - offset) as usize];
            match content {
                Content::Zeros => part.fill(0),
                Content::Sector { stored, leading, trailing } => {
                    let mut sector = [0u8; SECTOR as usize];
                    self.window.read_exact_at(&mut sector, stored)?;
                    sector[..8].copy_from_slice(&leading);
                    sector[SECTOR as usize - 4..].copy_from_slice(&trailing);
                    part.copy_from_slice(&sector[(start - from) as usize..(stop - from) as usize]);
                }
            }
        }
        Ok(())
    }

    /// Whether `[offset, offset + len)` is known to hold nothing but zeros, without reading it.
    pub(super) fn in_hole(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        if let Some((from, to, content)) = self.overlay.touching(offset, end).next() {
            return from <= offset && to >= end && matches!(content, Content::Zeros);
        }
        if offset >= self.window.len() {
            return true;
        }
        let Some(runs) = &self.host_runs else { return false };
        let next = runs.partition_point(|run| run.offset + run.len <= offset);
        runs.get(next).is_none_or(|run| run.offset >= end)
    }

    /// The parts of `[offset, offset + len)` that may hold something else than zeros, ascending.
    pub(super) fn data_parts(&self, offset: u64, len: u64, mut each: impl FnMut(u64, u64)) {
        let end = offset.saturating_add(len);
        if self.overlay.touching(offset, end).next().is_some() {
            return each(offset, end);
        }
        let Some(runs) = &self.host_runs else { return each(offset, end) };
        let first = runs.partition_point(|run| run.offset + run.len <= offset);
        for run in runs[first..].iter().take_while(|run| run.offset < end) {
            each(run.offset.max(offset), (run.offset + run.len).min(end));
        }
    }
}

/// The data runs of the host file; `None` when it has no holes, or is so long or has so many runs that looking them up is not worth it.
fn host_runs(window: &Window) -> Result<Option<Vec<Extent>>> {
    const STEP: u64 = 1 << 30;
    if window.len() > MAX_HOST_LEN {
        return Ok(None);
    }
    let mut runs: Vec<Extent> = Vec::new();
    for at in (0..window.len()).step_by(STEP as usize) {
        for run in window.data_runs(at, at + STEP)? {
            match runs.last_mut() {
                Some(last) if last.offset + last.len == run.offset => last.len += run.len,
                _ => runs.push(run),
            }
        }
        if runs.len() > MAX_HOST_RUNS {
            return Ok(None);
        }
    }
    let whole = runs.len() == 1 && runs[0].offset == 0 && runs[0].len == window.len();
    Ok(if whole { None } else { Some(runs) })
}
