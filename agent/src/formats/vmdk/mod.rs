//! VMDK: VMware's disk format, read in every kind that exports and datastores carry, written as streamOptimized.
//!
//! Owns: descriptors, hosted sparse extents, ESXi's vmfsSparse deltas, flat extents, the stream writer (VMware "Virtual Disk Format 5.0").
//! Never: opens a path: extents come through a callback that takes bare names. Never follows a parent: a delta is refused, or by
//! [`open_layer`] given to `chain` as the layer that it is.
//! A crash here costs nothing on the reading side; the writer is resumed from its checkpoints.

mod descriptor;
mod encode;
mod header;
mod sparse;
pub mod stream;
#[cfg(test)]
mod tests;
mod writer;

use std::io;

use super::disk::{Disk, Extent, FormatError, Packing, Result, Scratch, UNIT, Window};
use descriptor::{Body, Descriptor, MAX_BYTES};
pub use descriptor::{Kind, MAX_EXTENTS, Parent};
pub use encode::StreamEncoder;
use header::{COWD, MAGIC, SECTOR};
use sparse::{MAX_DIRECTORY, Place, Sparse};
pub use writer::{FILE_LIMIT, MAX_CAPACITY, StreamWriter, worst_case};

/// The format's name as the API spells it.
const NAME: &str = "vmdk";

/// Opens an extent by the bare name that a descriptor gives; a vault or an archive stands behind it.
pub type Opener<'a> = &'a dyn Fn(&str) -> io::Result<Window>;

/// One run of the disk and what stands behind it.
struct Part {
    start: u64,
    len: u64,
    data: Data,
}

enum Data {
    Sparse(Sparse),
    /// A flat file from this byte on.
    Flat(Window),
    Zero,
}

/// A VMDK disk of one or more extents.
pub struct Image {
    kind: Kind,
    capacity: u64,
    /// Ascending, without gaps, from 0 to the capacity.
    parts: Vec<Part>,
    cid: Option<u32>,
    parent: Option<Parent>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("kind", &self.kind).field("capacity", &self.capacity).field("parts", &self.parts.len()).finish()
    }
}

/// Opens a VMDK: a sparse file with its descriptor inside, or a descriptor whose extents `opener` opens. A delta is refused.
/// Everything but grain tables and grains is checked here; those when they are read.
pub fn open(window: Window, opener: Opener<'_>) -> Result<Image> {
    let text = described(&window)?;
    text.descriptor().complete()?;
    assemble(window, text, opener)
}

/// Opens a VMDK that may be a delta ([`Image::parent`]). Where it is one, what it does not say itself reads as zeros: such an image is a
/// layer for `chain::Chain` and no disk of its own.
pub fn open_layer(window: Window, opener: Opener<'_>) -> Result<Image> {
    let text = described(&window)?;
    assemble(window, text, opener)
}

/// Opens a VMDK that must be a single file, as the members of an OVA are.
pub fn open_single(window: Window) -> Result<Image> {
    open(window, &|name| Err(io::Error::new(io::ErrorKind::NotFound, format!("extent {name:?}: only a disk of one file is accepted here"))))
}

/// The bare names of the files that a VMDK has its bytes in beside itself; none for a disk of one file.
pub fn extent_names(window: &Window) -> Result<Vec<String>> {
    Ok(match described(window)? {
        Text::Embedded(..) => Vec::new(),
        Text::Beside(text) => text.extents.iter().filter_map(|line| line.body.file()).map(str::to_owned).collect(),
    })
}

/// An extent of a flat disk.
pub struct FlatExtent {
    /// Bytes.
    pub len: u64,
    /// The file's bare name and where the extent begins in it; none: zeros.
    pub file: Option<(String, u64)>,
}

/// The extents of a descriptor that stands alone, of a disk that is complete in itself and of which every extent is flat.
pub fn flat_extents(descriptor: &[u8]) -> Result<Vec<FlatExtent>> {
    let text = descriptor::parse(descriptor)?;
    text.complete()?;
    let flat = |line: descriptor::Line| {
        let file = match line.body {
            Body::Flat(name, offset) => Some((name, offset)),
            Body::Zero => None,
            Body::Sparse(name) | Body::Cowd(name) => return Err(refused(format!("its extent {name:?} is sparse, a flat one is wanted"))),
        };
        // The parser has added the extents up without an overflow.
        Ok(FlatExtent { len: line.sectors * SECTOR, file })
    };
    text.extents.into_iter().map(flat).collect()
}

fn refused(reason: impl Into<String>) -> FormatError {
    FormatError::Refused { format: NAME, reason: reason.into() }
}

/// A descriptor, and where it stood.
enum Text {
    /// Inside the sparse file with this header.
    Embedded(header::Header, Descriptor),
    /// In a file of its own.
    Beside(Descriptor),
}

impl Text {
    fn descriptor(&self) -> &Descriptor {
        match self {
            Text::Embedded(_, text) | Text::Beside(text) => text,
        }
    }
}

/// Reads and checks the descriptor. Opens no extent.
fn described(window: &Window) -> Result<Text> {
    const EXTENT: &str = "it is one extent of a split disk; give the descriptor file instead";
    let magic = magic(window)?;
    if magic == COWD {
        return Err(refused(EXTENT));
    }
    if magic == MAGIC {
        let header = Sparse::header(window)?;
        let bytes = embedded_text(window, header.descriptor, header.descriptor_size)?.ok_or_else(|| refused(EXTENT))?;
        let text = descriptor::parse(&bytes)?;
        if !text.kind.embedded() || (text.kind == Kind::StreamOptimized) != header.compressed {
            return Err(refused(format!("its descriptor says createType {}, its header says otherwise", text.kind.name())));
        }
        return Ok(Text::Embedded(header, text));
    }
    if window.len() > MAX_BYTES {
        return Err(refused(format!("it starts neither with KDMV nor is it a descriptor of at most {MAX_BYTES} bytes")));
    }
    let mut bytes = vec![0u8; window.len() as usize];
    window.read_exact_at(&mut bytes, 0)?;
    let text = descriptor::parse(&bytes)?;
    if text.kind.embedded() {
        return Err(refused(format!("createType {} keeps its descriptor inside the disk file; give that file instead", text.kind.name())));
    }
    Ok(Text::Beside(text))
}

/// The first four bytes; zeros where there are fewer.
fn magic(window: &Window) -> Result<[u8; 4]> {
    let mut magic = [0u8; 4];
    if window.len() >= 4 {
        window.read_exact_at(&mut magic, 0)?;
    }
    Ok(magic)
}

fn assemble(window: Window, text: Text, opener: Opener<'_>) -> Result<Image> {
    let mut budget = MAX_DIRECTORY;
    let (text, parts) = match text {
        Text::Embedded(header, text) => {
            let sparse = Sparse::open(window, "", header, text.sectors, &mut budget)?;
            let part = Part { start: 0, len: text.sectors * SECTOR, data: Data::Sparse(sparse) };
            (text, vec![part])
        }
        Text::Beside(text) => {
            let parts = parts(&text, opener, &mut budget)?;
            (text, parts)
        }
    };
    Ok(Image { kind: text.kind, capacity: text.sectors * SECTOR, parts, cid: text.cid, parent: text.parent })
}

/// The embedded descriptor's bytes; `None` where there is none or its room is empty.
fn embedded_text(window: &Window, sector: u64, sectors: u64) -> Result<Option<Vec<u8>>> {
    if sector == 0 || sectors == 0 {
        return Ok(None);
    }
    let (Some(at), Some(len)) = (sector.checked_mul(SECTOR), sectors.checked_mul(SECTOR).filter(|len| *len <= MAX_BYTES)) else {
        return Err(refused(format!("its descriptor is over {MAX_BYTES} bytes")));
    };
    if at.checked_add(len).is_none_or(|end| end > window.len()) {
        let reason = format!("{len} bytes from there lie past the file's end at {}", window.len());
        return Err(FormatError::Corrupt { format: NAME, what: "descriptor", index: 0, offset: at, reason });
    }
    let mut bytes = vec![0u8; len as usize];
    window.read_exact_at(&mut bytes, at)?;
    Ok(bytes.first().is_some_and(|b| *b != 0).then_some(bytes))
}

/// The parts of a disk whose descriptor stands beside its extents.
fn parts(text: &Descriptor, opener: Opener<'_>, budget: &mut u64) -> Result<Vec<Part>> {
    let mut parts = Vec::with_capacity(text.extents.len());
    let mut start = 0u64;
    for line in &text.extents {
        let len = line.sectors * SECTOR;
        let data = match &line.body {
            Body::Zero => Data::Zero,
            Body::Flat(name, from) => Data::Flat(flat(opener(name)?, name, *from, len)?),
            Body::Sparse(name) => Data::Sparse(part(opener(name)?, name, MAGIC, line.sectors, budget)?),
            Body::Cowd(name) => Data::Sparse(part(opener(name)?, name, COWD, line.sectors, budget)?),
        };
        parts.push(Part { start, len, data });
        start += len;
    }
    Ok(parts)
}

fn flat(window: Window, name: &str, from: u64, len: u64) -> Result<Window> {
    window.part(from, len).map_err(|_| {
        let reason = format!("{name:?} has {} bytes, {} would be right", window.len(), from.saturating_add(len));
        FormatError::Corrupt { format: NAME, what: "flat extent", index: 0, offset: from, reason }
    })
}

fn part(window: Window, name: &str, wanted: [u8; 4], sectors: u64, budget: &mut u64) -> Result<Sparse> {
    if window.len() < SECTOR || magic(&window)? != wanted {
        return Err(FormatError::Corrupt {
            format: NAME,
            what: "header",
            index: 0,
            offset: 0,
            reason: format!("the extent {name:?} does not start with {}", wanted.escape_ascii()),
        });
    }
    let header = Sparse::header(&window)?;
    Sparse::open(window, name, header, sectors, budget)
}

/// Appends an extent, merged with the last where they touch.
fn push(out: &mut Vec<Extent>, extent: Extent) {
    match out.last_mut() {
        Some(last) if last.offset + last.len == extent.offset => last.len += extent.len,
        _ => out.push(extent),
    }
}

impl Image {
    /// The `createType`.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The disk beneath that its descriptor names; only [`open_layer`] lets one in.
    pub fn parent(&self) -> Option<&Parent> {
        self.parent.as_ref()
    }

    /// The content identifier that a child names as its `parentCID`; `None` where the descriptor has none.
    pub fn cid(&self) -> Option<u32> {
        self.cid
    }

    /// The runs of `[from, to)` that this image itself answers for, with data or with zeros (see `chain::Layer`).
    pub fn covered(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        let to = to.min(self.capacity);
        let mut out = Vec::new();
        for part in self.parts[self.at(from)..].iter().take_while(|part| part.start < to) {
            let (first, last) = (from.max(part.start) - part.start, to.min(part.start + part.len) - part.start);
            match &part.data {
                Data::Sparse(sparse) => sparse.runs(first, last, part.start, |place| place != Place::Hole, &mut out)?,
                Data::Flat(_) | Data::Zero => push(&mut out, Extent { offset: part.start + first, len: last - first }),
            }
        }
        Ok(out)
    }

    /// Bytes of grain directories that it holds in memory.
    pub fn table_bytes(&self) -> u64 {
        let sparse = |part: &Part| if let Data::Sparse(sparse) = &part.data { sparse.directory_bytes() } else { 0 };
        self.parts.iter().map(sparse).sum()
    }

    /// Index of the part that holds `offset`.
    fn at(&self, offset: u64) -> usize {
        self.parts.partition_point(|part| part.start + part.len <= offset)
    }
}

impl Disk for Image {
    fn format(&self) -> &'static str {
        NAME
    }

    fn subformat(&self) -> &str {
        self.kind.name()
    }

    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        let to = to.min(self.capacity);
        let mut out = Vec::new();
        for part in &self.parts[self.at(from)..] {
            if part.start >= to {
                break;
            }
            let (first, last) = (from.max(part.start) - part.start, to.min(part.start + part.len) - part.start);
            match &part.data {
                Data::Zero => {}
                Data::Sparse(sparse) => sparse.runs(first, last, part.start, |place| matches!(place, Place::Sector(_)), &mut out)?,
                Data::Flat(window) => {
                    for run in window.data_runs(first, last)? {
                        push(&mut out, Extent { offset: run.offset + part.start, len: run.len });
                    }
                }
            }
        }
        Ok(out)
    }

    fn read_at(&self, mut offset: u64, mut buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.capacity) {
            let reason = format!("bytes {offset}+{} lie past the disk's end at {}", buf.len(), self.capacity);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason).into());
        }
        while !buf.is_empty() {
            let part = &self.parts[self.at(offset)];
            let within = offset - part.start;
            let here = usize::try_from(part.len - within).unwrap_or(usize::MAX).min(buf.len());
            let (head, rest) = buf.split_at_mut(here);
            match &part.data {
                Data::Zero => head.fill(0),
                Data::Flat(window) => window.read_exact_at(head, within)?,
                Data::Sparse(sparse) => sparse.read_at(within, head, scratch)?,
            }
            offset += here as u64;
            buf = rest;
        }
        Ok(())
    }

    fn packs(&self, _: Packing) -> bool {
        self.parts.iter().any(|part| matches!(&part.data, Data::Sparse(sparse) if sparse.is_compressed()))
    }

    fn packed<'s>(&self, unit: u64, want: Packing, plain: &mut [u8], scratch: &'s mut Scratch) -> Result<Option<&'s [u8]>> {
        let offset = unit.saturating_mul(UNIT as u64);
        if offset.checked_add(UNIT as u64).is_none_or(|end| end > self.capacity) {
            return Ok(None);
        }
        let part = &self.parts[self.at(offset)];
        let within = offset - part.start;
        let Data::Sparse(sparse) = &part.data else { return Ok(None) };
        if !within.is_multiple_of(UNIT as u64) {
            return Ok(None);
        }
        let stream = sparse.packed(within / UNIT as u64, plain, scratch)?;
        Ok(match want {
            Packing::Zlib => stream,
            // Behind the header's two bytes and before the Adler-32, both of which the inflating has checked.
            Packing::Deflate => stream.and_then(|stream| stream.get(2..stream.len().checked_sub(4)?)),
        })
    }
}
