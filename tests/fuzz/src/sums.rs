//! Checksums made right, so that what the fuzzer changes gets past them: VHD's sums and VHDX's CRC-32C.
//!
//! Owns: the two formats' checksums, and unfolding a few KiB into a VHDX of several MiB. Never: parses more than it takes to find a sum.
//! A crash here is a mistake of the harness, not a finding.

use std::collections::BTreeMap;

/// Bytes of a slot, the alignment of VHDX's fixed structures.
const SLOT: usize = 64 << 10;

fn be64(bytes: &[u8], at: usize) -> usize {
    bytes.get(at..at + 8).map_or(usize::MAX, |word| word.iter().fold(0usize, |value, b| value << 8 | usize::from(*b)))
}

/// The sum of a VHD structure of `len` bytes at `at`, whose checksum lies at `place` in it, where it is there.
fn add_up(bytes: &mut [u8], at: usize, len: usize, place: usize) {
    let Some(part) = at.checked_add(len).and_then(|end| bytes.get_mut(at..end)) else { return };
    part[place..place + 4].fill(0);
    let sum = !part.iter().map(|b| u32::from(*b)).sum::<u32>();
    part[place..place + 4].copy_from_slice(&sum.to_be_bytes());
}

/// A VHD: both footers and the dynamic header get their sums.
pub fn vhd(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let header = be64(&out, 16);
    add_up(&mut out, header, 1024, 36);
    if out.starts_with(b"conectix") {
        add_up(&mut out, 0, 512, 64);
    }
    let last = out.len().saturating_sub(512);
    if out[last..].starts_with(b"conectix") {
        add_up(&mut out, last, 512, 64);
    }
    out
}

/// A VHDX from records of `slot (u8), offset (u16), length (u16), bytes`, all little-endian: pieces at `slot * 64 KiB + offset`, with the
/// checksums of headers, region tables and log entries made right. Gives the 64 KiB slots that hold anything.
pub fn vhdx(mut records: &[u8]) -> BTreeMap<u64, Vec<u8>> {
    let mut slots: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    while let [slot, a, b, c, d, rest @ ..] = records {
        let (at, len) = (usize::from(u16::from_le_bytes([*a, *b])), usize::from(u16::from_le_bytes([*c, *d])));
        let len = len.min(rest.len()).min(SLOT - at);
        let piece = slots.entry(u64::from(*slot)).or_insert_with(|| vec![0; SLOT]);
        piece[at..at + len].copy_from_slice(&rest[..len]);
        records = &rest[len..];
    }
    for (slot, piece) in &mut slots {
        match slot {
            1 | 2 if piece.starts_with(b"head") => crc(&mut piece[..4096]),
            3 | 4 if piece.starts_with(b"regi") => crc(piece),
            _ => {
                for at in (0..SLOT).step_by(4096).filter(|at| *slot > 4 && *at < SLOT) {
                    if piece[at..].starts_with(b"loge") {
                        let len = u32::from_le_bytes([piece[at + 8], piece[at + 9], piece[at + 10], piece[at + 11]]) as usize;
                        if (64..=SLOT - at).contains(&len) {
                            crc(&mut piece[at..at + len]);
                        }
                    }
                }
            }
        }
    }
    slots
}

/// Writes the CRC-32C of a structure into its bytes 4 to 8.
fn crc(bytes: &mut [u8]) {
    const TABLE: [u32; 256] = {
        let mut table = [0u32; 256];
        let mut k = 0;
        while k < 256 {
            let (mut value, mut bit) = (k as u32, 0);
            while bit < 8 {
                value = if value & 1 == 1 { value >> 1 ^ 0x82f6_3b78 } else { value >> 1 };
                bit += 1;
            }
            table[k] = value;
            k += 1;
        }
        table
    };
    bytes[4..8].fill(0);
    let sum = !bytes.iter().fold(!0u32, |sum, b| sum >> 8 ^ TABLE[usize::from(sum as u8 ^ b)]);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}
