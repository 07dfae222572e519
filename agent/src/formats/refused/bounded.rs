//! What is large, odd and allowed: it opens inside the same limits as what is refused.
//!
//! A crash here costs nothing: tests only.

use super::super::disk::{Disk, FormatError, Window};
use super::super::{vdi, vhd};
use super::qcow2::{deflate, header};
use super::vmdk::{header as vmdk_header, text};
use super::{Case, Damaged, Good, Image, Input, case};

/// A qcow2 whose 4 Mi L1 entries (the limit) name L2 tables that all lie in one hole.
fn hollow_qcow2() -> Image {
    let entries = 4u64 << 20;
    let tables: Vec<u8> = (0..entries).flat_map(|k| ((64 << 20) + k * 65_536).to_be_bytes()).collect();
    header(16, 2 << 50, (4 << 20, 16 << 20), (1, 65_536)).put(16 << 20, tables).cut((64 << 20) + entries * 65_536)
}

/// A qcow2 that makes the audit remember as much as it allows itself: an L1 table of 30 MiB, 2,000 places of the host file that lie 16 MiB
/// apart, and at each five L2 tables of 64 compressed clusters, 640,000 in all.
fn scattered_qcow2() -> Image {
    let (l1, page, entries) = (16u64 << 20, 16u64 << 20, 3_900_000u32);
    let mut image = header(9, u64::from(entries) * 64 * 512, (entries, l1), (1, 512));
    let mut table = vec![0u8; entries as usize * 8];
    let stream = deflate(&[0; 512]);
    let streams = [&stream[..], &[0; 8][stream.len()..]].concat().repeat(64);
    for k in 0..10_000u64 {
        let host = (64 << 20) + k / 5 * page + k % 5 * 1024;
        table[k as usize * 8..][..8].copy_from_slice(&host.to_be_bytes());
        let entries = (0..64u64).flat_map(|i| (1u64 << 62 | (host + 512 + i * 8)).to_be_bytes());
        image = image.put(host, entries.chain(streams.iter().copied()).collect::<Vec<u8>>());
    }
    image.put(l1, table).cut((64 << 20) + 2_001 * page)
}

/// A VMDK of 4 TiB whose 2 Mi grain tables (the limit) all lie in one hole.
fn hollow_vmdk() -> Image {
    let tables = 2u64 << 20;
    let sectors = tables * 512 * 8;
    let directory: Vec<u8> = (0..tables).flat_map(|k| u32::to_le_bytes((20_000 + k * 4) as u32)).collect();
    Image::of(vmdk_header(1, sectors, 8))
        .put(512, text(&format!("createType=\"monolithicSparse\"\nRW {sectors} SPARSE \"a\"")))
        .put(8 * 512, directory)
        .cut((20_000 + tables * 4) * 512)
}

/// A dynamic VHD of 4 Mi blocks (the limit) of 512 bytes that all lie in one hole.
fn hollow_vhd() -> Image {
    let (blocks, first) = (4u32 << 20, 64 << 10);
    let mut footer = vec![0u8; 512];
    let mut put = |at: usize, bytes: &[u8]| footer[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"conectix");
    put(12, &0x1_0000u32.to_be_bytes());
    put(16, &512u64.to_be_bytes());
    put(28, b"win ");
    put(48, &(u64::from(blocks) * 512).to_be_bytes());
    put(60, &3u32.to_be_bytes());
    let footer = summed(footer, 64);
    let mut dynamic = vec![0u8; 1024];
    let mut put = |at: usize, bytes: &[u8]| dynamic[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"cxsparse");
    put(16, &1536u64.to_be_bytes());
    put(24, &0x1_0000u32.to_be_bytes());
    put(28, &blocks.to_be_bytes());
    put(32, &512u32.to_be_bytes());
    let table: Vec<u8> = (0..blocks).flat_map(|k| (first + k * 2).to_be_bytes()).collect();
    let end = u64::from(first + blocks * 2) * 512;
    Image::of(&footer).put(512, summed(dynamic, 36)).put(1536, table).put(end, &footer)
}

/// The structure with its VHD checksum, which lies at `place`.
fn summed(mut bytes: Vec<u8>, place: usize) -> Vec<u8> {
    let sum = !bytes.iter().map(|b| u32::from(*b)).sum::<u32>();
    bytes[place..place + 4].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// A VDI header for `entries` blocks of 1 MiB, its map at 512.
fn vdi_header(entries: u32, data: u32) -> Image {
    let le = u32::to_le_bytes;
    let size = (u64::from(entries) << 20).to_le_bytes();
    let fields =
        [(64, 0xbeda_107f), (68, 0x1_0001), (72, 0x180), (76, 1), (340, 512), (344, data), (360, 512), (376, 1 << 20), (384, entries)];
    fields.into_iter().fold(Image::default().cut(512).put(368, size), |image, (at, value)| image.put(at, le(value)))
}

/// A VDI of 1 Mi blocks, a TiB in a hole.
fn hollow_vdi() -> Image {
    let entries = 1u32 << 20;
    let map: Vec<u8> = (0..entries).flat_map(u32::to_le_bytes).collect();
    vdi_header(entries, 8 << 20).put(512, map).cut((8 << 20) + (u64::from(entries) << 20))
}

/// A VDI of the largest size QEMU knows, map and all in a hole: every block lies at the first's place.
fn vdi_of_nothing() -> Image {
    vdi_header(0x1fff_ff80, 2 << 30).cut((2 << 30) + (0x1fff_ff80 << 20))
}

fn open_vhd(window: Window) -> Result<Box<dyn Disk>, FormatError> {
    Ok(Box::new(vhd::Reader::open(window)?))
}

fn open_vdi(window: Window) -> Result<Box<dyn Disk>, FormatError> {
    Ok(Box::new(vdi::Reader::open(window)?))
}

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("qcow2 of 2 PiB in a hole", Input::Qcow2(hollow_qcow2()), Good(None)),
        case("qcow2 scattered over 31 GiB of holes", Input::Qcow2(scattered_qcow2()), Good(None)),
        case("VMDK of 4 TiB in a hole", Input::Vmdk(hollow_vmdk(), Vec::new()), Good(None)),
        case("VHD of 4 Mi blocks in a hole", Input::Disk(open_vhd, hollow_vhd()), Good(None)),
        case("VDI of a TiB in a hole", Input::Disk(open_vdi, hollow_vdi()), Good(None)),
        case("VDI of 512 TiB of nothing", Input::Disk(open_vdi, vdi_of_nothing()), Damaged("another block's")),
    ]
}
