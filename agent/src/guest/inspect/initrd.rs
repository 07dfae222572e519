//! What an initrd holds: the names of its kernel modules.
//!
//! ```text
//! file ─► zeros │ cpio (070701) ─► names … TRAILER!!! │ gzip, zstd, xz, lz4 ─► the same, unpacked │ … and again until the end
//! ```
//! Owns: walking through archives that lie one behind the other, packed or not, by a stream that is never kept. Never: unpacks more than its
//! bound, believes a size (what is skipped is read), gives a decompressor more than 32 MiB for its window. A crash here costs nothing.

use std::collections::BTreeSet;
use std::io::{self, BufRead, Read};

use super::volume::Blocks;

/// Most bytes that are unpacked of all initrds of one look.
pub const MAX_UNPACKED: u64 = 2 << 30;
/// Longest name in an archive.
const MAX_NAME: usize = 4096;
/// Window of a decompressor: zstd as a power of two, xz in bytes.
const ZSTD_WINDOW: u32 = 25;
const XZ_WINDOW: usize = 32 << 20;
/// Most bytes that xz is shown at once.
const XZ_INPUT: usize = 256 << 10;
/// Bytes of a block of lz4's older frame, unpacked; packed it may be a little more.
const LZ4_BLOCK: usize = 8 << 20;
/// How deep archives lie in one another.
const MAX_DEPTH: u32 = 2;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Those of the wanted modules that are there, written with `_`.
    pub modules: BTreeSet<String>,
    /// How its parts are packed, in order.
    pub compression: Vec<String>,
    /// Names that were seen.
    pub entries: u64,
    /// Why not all of it was looked through.
    pub unknown: Option<String>,
}

/// A look through one initrd.
pub struct Look<'l> {
    /// Module names, written with `_`.
    pub wanted: &'l [&'l str],
    /// For its time.
    pub blocks: &'l Blocks,
    /// Bytes that may still be unpacked.
    pub left: &'l mut u64,
}

impl Look<'_> {
    /// Looks through it; ends early once all that is wanted was seen.
    pub fn through(mut self, file: Box<dyn Read + '_>) -> Contents {
        let mut contents = Contents::default();
        let outcome = self.archives(&mut Peek::new(file), &mut contents, 0);
        // What was found is there, whatever came behind it.
        if let Err(e) = outcome
            && !self.is_complete(&contents)
        {
            contents.unknown = Some(e.to_string());
        }
        if contents.entries == 0 && contents.unknown.is_none() {
            contents.unknown = Some("it holds nothing".to_owned());
        }
        contents
    }

    fn is_complete(&self, contents: &Contents) -> bool {
        contents.modules.len() == self.wanted.len()
    }

    /// Archives one behind the other, until the end.
    fn archives(&mut self, stream: &mut Peek<'_>, contents: &mut Contents, depth: u32) -> io::Result<()> {
        let odd = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        if depth > MAX_DEPTH {
            return odd("packed archives lie in one another too deep".to_owned());
        }
        while !self.is_complete(contents) {
            self.zeros(stream)?;
            let magic = stream.peek(6)?.to_vec();
            if magic.is_empty() {
                return Ok(());
            }
            let packed = packing(&magic);
            if packed != Some("none") {
                contents.compression.push(packed.unwrap_or("unknown").to_owned());
            } else if contents.compression.last().is_none_or(|last| last != "none") && depth == 0 {
                contents.compression.push("none".to_owned());
            }
            match packed {
                Some("none") => self.members(stream, contents)?,
                Some("gzip") => {
                    let inner = flate2::bufread::GzDecoder::new(&mut *stream);
                    self.archives(&mut Peek::new(Box::new(inner)), contents, depth + 1)?;
                }
                Some("zstd") => {
                    let mut inner = zstd::stream::read::Decoder::with_buffer(&mut *stream)?.single_frame();
                    inner.window_log_max(ZSTD_WINDOW)?;
                    self.archives(&mut Peek::new(Box::new(inner)), contents, depth + 1)?;
                }
                Some("xz") => self.archives(&mut Peek::new(Box::new(Xz::new(stream))), contents, depth + 1)?,
                Some("lz4") => {
                    stream.consume(4);
                    self.archives(&mut Peek::new(Box::new(Lz4::new(stream))), contents, depth + 1)?;
                }
                Some(packed) => return odd(format!("it is packed by {packed}, which is not unpacked here")),
                None if contents.entries == 0 => return odd("it is no archive that is known".to_owned()),
                None => return odd("what lies behind its archives is not known".to_owned()),
            }
        }
        Ok(())
    }

    fn zeros(&mut self, stream: &mut Peek<'_>) -> io::Result<()> {
        loop {
            let bytes = stream.fill_buf()?;
            let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
            let is_over = zeros < bytes.len() || bytes.is_empty();
            stream.consume(zeros);
            self.spend(zeros as u64)?;
            if is_over {
                return Ok(());
            }
        }
    }

    fn spend(&mut self, bytes: u64) -> io::Result<()> {
        self.blocks.in_time()?;
        *self.left = self
            .left
            .checked_sub(bytes)
            .ok_or_else(|| io::Error::other(format!("more than {} MiB would have to be unpacked", MAX_UNPACKED >> 20)))?;
        Ok(())
    }

    /// The members of one cpio, to its trailer.
    fn members(&mut self, stream: &mut Peek<'_>, contents: &mut Contents) -> io::Result<()> {
        let odd = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, format!("its archive is damaged: {what}")));
        loop {
            let mut head = [0u8; 110];
            stream.read_exact(&mut head)?;
            if packing(&head[..6]) != Some("none") {
                return odd("a header is none");
            }
            let (Some(size), Some(length)) = (hex(&head[54..62]), hex(&head[94..102])) else { return odd("a number is none") };
            if length == 0 || length as usize > MAX_NAME {
                return odd("a name is too long");
            }
            let padded = (110 + length as usize).next_multiple_of(4) - 110;
            let mut name = vec![0u8; padded];
            stream.read_exact(&mut name)?;
            let name = String::from_utf8_lossy(&name[..length as usize - 1]).into_owned();
            self.spend(110 + padded as u64)?;
            if name == "TRAILER!!!" {
                return Ok(());
            }
            contents.entries += 1;
            if let Some(module) = module(&name).filter(|module| self.wanted.contains(&module.as_str())) {
                contents.modules.insert(module);
                if self.is_complete(contents) {
                    return Ok(());
                }
            }
            self.skip(stream, u64::from(size).next_multiple_of(4))?;
        }
    }

    fn skip(&mut self, stream: &mut Peek<'_>, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 {
            let there = stream.fill_buf()?.len();
            if there == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "its archive is cut short"));
            }
            let count = (there as u64).min(bytes);
            stream.consume(count as usize);
            self.spend(count)?;
            bytes -= count;
        }
        Ok(())
    }
}

fn hex(digits: &[u8]) -> Option<u32> {
    u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// How what begins like this is packed.
fn packing(magic: &[u8]) -> Option<&'static str> {
    let begins = |with: &[u8]| magic.starts_with(with);
    match () {
        () if begins(b"070701") || begins(b"070702") => Some("none"),
        () if begins(&[0x1f, 0x8b]) => Some("gzip"),
        () if begins(&[0x28, 0xb5, 0x2f, 0xfd]) => Some("zstd"),
        () if begins(&[0xfd, b'7', b'z', b'X', b'Z', 0]) => Some("xz"),
        () if begins(&[0x02, 0x21, 0x4c, 0x18]) => Some("lz4"),
        () if begins(&[0x04, 0x22, 0x4d, 0x18]) => Some("lz4 (frame)"),
        () if begins(&[0x5d, 0, 0]) => Some("lzma"),
        () if begins(b"BZh") => Some("bzip2"),
        () if begins(&[0x89, b'L', b'Z', b'O']) => Some("lzo"),
        () => None,
    }
}

/// The module that a file is: `usr/lib/modules/6.1/kernel/drivers/block/virtio_blk.ko.xz` is `virtio_blk`.
pub fn module(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let (name, packed) = file.split_once(".ko")?;
    matches!(packed, "" | ".xz" | ".zst" | ".gz").then(|| name.replace('-', "_"))
}

/// A stream of which the next bytes can be looked at.
struct Peek<'s> {
    inner: Box<dyn Read + 's>,
    buffer: Vec<u8>,
    at: usize,
}

impl<'s> Peek<'s> {
    fn new(inner: Box<dyn Read + 's>) -> Self {
        Self { inner, buffer: Vec::new(), at: 0 }
    }

    /// The next bytes without taking them; fewer at the end.
    fn peek(&mut self, count: usize) -> io::Result<&[u8]> {
        while self.buffer.len() - self.at < count {
            if self.more()? == 0 {
                break;
            }
        }
        Ok(&self.buffer[self.at..(self.at + count).min(self.buffer.len())])
    }

    fn more(&mut self) -> io::Result<usize> {
        const MORE: usize = 64 << 10;
        self.buffer.drain(..self.at);
        self.at = 0;
        let before = self.buffer.len();
        self.buffer.resize(before + MORE, 0);
        let read = self.inner.read(&mut self.buffer[before..]);
        self.buffer.truncate(before + *read.as_ref().unwrap_or(&0));
        read
    }
}

impl Read for Peek<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let there = self.fill_buf()?;
        let count = there.len().min(buf.len());
        buf[..count].copy_from_slice(&there[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Peek<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.buffer.len() {
            self.more()?;
        }
        Ok(&self.buffer[self.at..])
    }

    fn consume(&mut self, count: usize) {
        self.at = (self.at + count).min(self.buffer.len());
    }
}

/// One xz stream.
struct Xz<'x, 's> {
    from: &'x mut Peek<'s>,
    decoder: Box<xz4rust::XzDecoder<'static>>,
    is_over: bool,
}

impl<'x, 's> Xz<'x, 's> {
    fn new(from: &'x mut Peek<'s>) -> Self {
        Self { from, decoder: xz4rust::XzDecoder::in_heap_with_alloc_dict_size(64 << 10, XZ_WINDOW), is_over: false }
    }
}

impl Read for Xz<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        use xz4rust::{XzError, XzNextBlockResult};
        let mut wanted = 0;
        while !self.is_over {
            // It may want more at once than is there.
            let input = if wanted == 0 { self.from.fill_buf()? } else { self.from.peek(wanted)? };
            let (before, is_end) = (input.len(), input.is_empty() || (wanted > 0 && input.len() < wanted));
            match self.decoder.decode(input, buf) {
                Ok(XzNextBlockResult::EndOfStream(taken, given)) => {
                    self.from.consume(taken);
                    self.is_over = true;
                    return Ok(given);
                }
                Ok(XzNextBlockResult::NeedMoreData(taken, given)) => {
                    self.from.consume(taken);
                    if given > 0 {
                        return Ok(given);
                    }
                    if taken == 0 && (is_end || before > XZ_INPUT) {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    wanted = if taken == 0 { before + 1 } else { 0 };
                }
                Err(XzError::NeedsLargerInputBuffer) if !is_end && before < XZ_INPUT => wanted = before + 1,
                Err(e) => return Err(io::Error::new(io::ErrorKind::InvalidData, format!("xz: {e:?}"))),
            }
        }
        Ok(0)
    }
}

/// One stream of lz4's older frame, behind its magic number: blocks, each with its packed length before it.
struct Lz4<'x, 's> {
    from: &'x mut Peek<'s>,
    packed: Vec<u8>,
    plain: Vec<u8>,
    /// What was unpacked, and how much of it was given.
    there: usize,
    given: usize,
}

impl<'x, 's> Lz4<'x, 's> {
    fn new(from: &'x mut Peek<'s>) -> Self {
        Self { from, packed: Vec::new(), plain: vec![0; LZ4_BLOCK], there: 0, given: 0 }
    }
}

impl Read for Lz4<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.given == self.there {
            let head: [u8; 4] = match self.from.peek(4)?.try_into() {
                Ok(head) => head,
                Err(_) => return Ok(0),
            };
            let length = u32::from_le_bytes(head) as usize;
            // Padding, or the mark of what lies behind.
            if length == 0 || length > LZ4_BLOCK + LZ4_BLOCK / 255 + 16 {
                return Ok(0);
            }
            self.from.consume(4);
            self.packed.resize(length, 0);
            self.from.read_exact(&mut self.packed)?;
            let unpacked = lz4_flex::block::decompress_into(&self.packed, &mut self.plain);
            self.there = unpacked.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("lz4: {e}")))?;
            self.given = 0;
        }
        let count = buf.len().min(self.there - self.given);
        buf[..count].copy_from_slice(&self.plain[self.given..self.given + count]);
        self.given += count;
        Ok(count)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
pub mod tests {
    use std::io::Cursor;

    use super::super::volume::tests::wide;
    use super::*;
    use crate::guest::inspect::tests::filter;

    /// An archive of names with this many bytes each.
    pub fn cpio(names: &[&str], size: usize) -> Vec<u8> {
        let mut archive = Vec::new();
        for name in names.iter().chain(&["TRAILER!!!"]) {
            let size = if *name == "TRAILER!!!" { 0 } else { size };
            archive.extend(format!("070701{:048x}{size:08x}{:032x}{:08x}{:08x}", 0, 0, name.len() + 1, 0).bytes());
            archive.extend(name.bytes().chain([0]));
            archive.resize(archive.len().next_multiple_of(4), 0);
            archive.resize(archive.len() + size.next_multiple_of(4), b'x');
        }
        archive
    }

    fn look(bytes: &[u8], left: u64) -> Contents {
        let blocks = Blocks::new(&[], wide());
        let mut left = left;
        let look = Look { wanted: &["virtio_blk", "virtio_pci"], blocks: &blocks, left: &mut left };
        look.through(Box::new(Cursor::new(bytes.to_vec())))
    }

    const NAMES: &[&str] = &["init", "usr/lib/modules/6.1/kernel/drivers/block/virtio-blk.ko.zst", "lib/modules/virtio_net.ko", "x.kos"];

    #[test]
    fn archives_are_walked_through_however_they_are_packed() {
        let main = cpio(NAMES, 100_001);
        let early = [cpio(&["kernel/x86/microcode/GenuineIntel.bin"], 5000), vec![0; 700]].concat();
        let tools: [(&str, &[&str], &str); 5] = [
            ("gzip", &["-c"], "gzip"),
            ("zstd", &["-q", "-19", "-c"], "zstd"),
            ("xz", &["--check=crc32", "-c"], "xz"),
            ("xz", &["--check=crc64", "--x86", "--lzma2=dict=1MiB", "-c"], "xz"),
            ("lz4", &["-l", "-q", "-c"], "lz4"),
        ];
        for (tool, options, named) in tools {
            let packed = filter(tool, options, &main);
            for bytes in [packed.clone(), [early.clone(), packed.clone()].concat(), [early.clone(), packed.clone(), vec![0; 512]].concat()]
            {
                let found = look(&bytes, MAX_UNPACKED);
                assert_eq!(
                    (found.modules.iter().map(String::as_str).collect::<Vec<_>>(), &found.unknown),
                    (vec!["virtio_blk"], &None),
                    "{tool}"
                );
                assert_eq!(found.compression.last().map(String::as_str), Some(named));
            }
            // Packed, and another archive behind it.
            let found = look(&[packed.clone(), cpio(&["virtio_pci.ko"], 4)].concat(), MAX_UNPACKED);
            assert!(found.modules.len() == 2 && found.unknown.is_none(), "{tool}: {found:?}");
            // Cut short.
            let found = look(&packed[..packed.len() / 2], MAX_UNPACKED);
            assert!(found.unknown.is_some(), "{tool}: {found:?}");
        }
        assert_eq!(look(&main, MAX_UNPACKED).compression, ["none"]);
        for (tool, options) in [("bzip2", &["-c"][..]), ("xz", &["--format=lzma", "-c"]), ("lz4", &["-q", "-c"])] {
            let said = look(&filter(tool, options, &main), MAX_UNPACKED).unknown.unwrap();
            assert!(said.contains("not unpacked"), "{tool}: {said}");
        }
    }

    #[test]
    fn archives_that_lie_end() {
        let with = |at: usize, digits: &[u8]| {
            let mut bytes = cpio(NAMES, 10);
            bytes[at..at + digits.len()].copy_from_slice(digits);
            look(&bytes, MAX_UNPACKED)
        };
        for found in [with(54, b"ffffffff"), with(94, b"ffffffff"), with(94, b"00000000"), with(54, b"-0000001"), with(112, b"070701")] {
            assert!(found.unknown.is_some() || found.entries > 0, "{found:?}");
        }
        assert!(with(54, b"ffffffff").unknown.unwrap().contains("cut short"));
        // 1 GiB of zeros behind a name, in a megabyte.
        let bomb = filter("sh", &["-c", "head -c 1073741824 /dev/zero | zstd -q -c"], &[]);
        let bomb = [filter("zstd", &["-q", "-c"], &cpio(&["a"], 4)), bomb].concat();
        let said = look(&bomb, 64 << 20).unknown.unwrap();
        assert!(said.contains("MiB"), "{said}");
        // A window of 128 MiB.
        let wide = filter("sh", &["-c", "head -c 200000000 /dev/zero | zstd -q --long=27 -c"], &[]);
        assert!(look(&wide, MAX_UNPACKED).unknown.is_some());
        // Packed in packed in packed.
        let nested = (0..6).fold(cpio(NAMES, 10), |bytes, _| filter("gzip", &["-c"], &bytes));
        assert!(look(&nested, MAX_UNPACKED).unknown.unwrap().contains("deep"));
        // Noise behind every mark.
        let noise: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for magic in [
            &b"070701"[..],
            &[0x1f, 0x8b, 8, 0],
            &[0x28, 0xb5, 0x2f, 0xfd],
            &[0xfd, b'7', b'z', b'X', b'Z', 0],
            &[2, 0x21, 0x4c, 0x18],
            b"",
        ] {
            assert!(look(&[magic, &noise].concat(), MAX_UNPACKED).unknown.is_some());
        }
    }
}
