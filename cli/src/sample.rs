//! The demo's sample VM: a sparse raw image whose content is the same each time.
//!
//! Owns: its layout. 256 MiB with a partition table; of each 16 MiB, 5 MiB hold data: random bytes (as encrypted or packed files are), log
//! lines (as text is) and a mix; the rest is holes, as in any real disk.
//! Never: pretends to boot. A crash here costs the demo.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use shared::manifest::{BLOCK, Blocks, block_digest};

/// Size of the logical disk.
pub const CAPACITY: u64 = 256 << 20;
/// Data is laid out in units of this.
const UNIT: u64 = 1 << 20;

/// Splitmix64: small, fast, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Writes the sample into an empty file.
pub fn write(file: &File) -> io::Result<()> {
    file.set_len(CAPACITY)?;
    for unit in 0..CAPACITY / UNIT {
        let mut random = Random(unit);
        let mut bytes = match unit % 16 {
            0 | 1 => noise(&mut random, UNIT as usize),
            2 | 3 => lines(&mut random, unit, UNIT as usize),
            4 => [noise(&mut random, UNIT as usize / 2), lines(&mut random, unit, UNIT as usize / 2)].concat(),
            _ => continue,
        };
        if unit == 0 {
            partition_table(&mut bytes[..512]);
        }
        file.write_all_at(&bytes, unit * UNIT)?;
    }
    Ok(())
}

fn noise(random: &mut Random, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn lines(random: &mut Random, unit: u64, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 128);
    let mut number = 0u64;
    while bytes.len() < length {
        let value = random.next();
        let (minute, second) = (number / 60 % 60, number % 60);
        let line = format!(
            "2026-01-01T00:{minute:02}:{second:02}Z web-{unit} nginx[{}]: GET /orders/{} {} {}us\n",
            1000 + unit,
            value % 100_000,
            if value.is_multiple_of(50) { 500 } else { 200 },
            value >> 44,
        );
        bytes.extend_from_slice(line.as_bytes());
        number += 1;
    }
    bytes.truncate(length);
    bytes
}

/// A master boot record with one Linux partition from sector 2048 to the end.
fn partition_table(sector: &mut [u8]) {
    sector.fill(0);
    let first: u32 = 2048;
    let count = (CAPACITY / 512) as u32 - first;
    sector[446 + 4] = 0x83;
    sector[446 + 8..446 + 12].copy_from_slice(&first.to_le_bytes());
    sector[446 + 12..446 + 16].copy_from_slice(&count.to_le_bytes());
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
}

/// The root digest of a raw image, by reading it once more: a second opinion that shares no code with the engine's reader.
pub fn root(file: &File) -> io::Result<String> {
    let capacity = file.metadata()?.len();
    let mut blocks = Blocks::default();
    let mut buffer = vec![0u8; BLOCK as usize];
    for index in 0..capacity.div_ceil(BLOCK) {
        let offset = index * BLOCK;
        let length = (capacity - offset).min(BLOCK) as usize;
        file.read_exact_at(&mut buffer[..length], offset)?;
        if buffer[..length].iter().any(|byte| *byte != 0) {
            blocks.0.insert(index, block_digest(&buffer[..length]));
        }
    }
    Ok(hex::encode(blocks.root(capacity)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_is_the_same_each_time_and_has_holes() {
        let folder = shared::vault::temporary_dir("sample").unwrap();
        let dir = shared::vault::open_data_dir(&folder).unwrap();
        let mut roots = Vec::new();
        for name in ["a.raw", "b.raw"] {
            write(&dir.create(name).unwrap().into_std()).unwrap();
            let file = dir.open(name).unwrap().into_std();
            roots.push(root(&file).unwrap());
            let mut sector = [0u8; 2];
            file.read_exact_at(&mut sector, 510).unwrap();
            assert_eq!((file.metadata().unwrap().len(), sector), (CAPACITY, [0x55, 0xaa]));
        }
        assert_eq!(roots[0], roots[1]);
        dir.remove_open_dir_all().unwrap();
    }
}
