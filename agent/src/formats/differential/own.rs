//! Images that no tool writes: valid by the formats' specifications, with maps in any order.
//!
//! Owns: the layout. A crash here costs nothing: tests only.

use libdeflater::{CompressionLvl, Compressor};

use super::{Random, SECTORS};

/// A file under construction.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let end = at as usize + bytes.len();
        if self.0.len() < end {
            self.0.resize(end, 0);
        }
        self.0[at as usize..end].copy_from_slice(bytes);
    }
}

/// A deflate stream, wrapped after RFC 1950 or bare.
fn deflate(plain: &[u8], wrapped: bool) -> Vec<u8> {
    let mut compressor = Compressor::new(CompressionLvl::new(6).unwrap());
    let mut out = vec![0; compressor.zlib_compress_bound(plain.len())];
    let len = if wrapped { compressor.zlib_compress(plain, &mut out) } else { compressor.deflate_compress(plain, &mut out) };
    out.truncate(len.unwrap());
    out
}

/// A qcow2 whose tables and clusters lie in any order, with gaps, absent tables, zero clusters of both kinds, and streams at any byte.
pub(super) fn qcow2(random: &mut Random) -> (String, Vec<u8>) {
    let bits = 9 + random.below(8) as u32;
    let (version, cluster) = (if random.one_in(3) { 2u32 } else { 3 }, 1u64 << bits);
    let zstd = version == 3 && random.one_in(3);
    let capacity = random.sectors(SECTORS.min(1024 * cluster / 512)) * 512;
    let (clusters, entries) = (capacity.div_ceil(cluster), cluster / 8);
    let tables = clusters.div_ceil(entries);
    let l1_clusters = (tables * 8).div_ceil(cluster);
    // Places behind header and L1 table, more than are needed, in any order.
    let first = 1 + l1_clusters;
    let mut places: Vec<u64> = (first..first + (clusters + tables + 2) * 5 / 4 + 1).collect();
    random.shuffle(&mut places);
    let mut place = || places.pop().expect("more places than clusters") << bits;
    let (reftable, refblock) = (place(), place());
    let mut file = Bytes::default();
    let mut put32 = |at: u64, value: u32| file.put(at, &value.to_be_bytes());
    put32(0, 0x5146_49fb);
    put32(4, version);
    put32(20, bits);
    put32(36, tables as u32);
    put32(56, 1);
    put32(60, 0);
    if version == 3 {
        put32(76, if zstd { 8 } else { 0 });
        // Lazy refcounts; autoclear bits of nobody.
        put32(84, random.below(2) as u32);
        put32(92, random.next() as u32 & 0xff00);
        put32(96, random.below(7) as u32);
        put32(100, if zstd || random.one_in(2) { 112 } else { 104 });
        put32(104, if zstd { 1 << 24 } else { 0 });
    }
    file.put(24, &capacity.to_be_bytes());
    file.put(40, &cluster.to_be_bytes());
    file.put(48, &reftable.to_be_bytes());
    file.put(cluster, &vec![0; (l1_clusters * cluster) as usize]);
    file.put(reftable, &refblock.to_be_bytes());
    file.put(refblock, &vec![0; cluster as usize]);
    let mut packed: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut block = vec![0u8; cluster as usize];
    let holes = 2 + random.below(4);
    for t in 0..tables {
        if random.one_in(5) {
            continue;
        }
        let table = place();
        let copied = random.below(2) << 63;
        file.put(cluster + t * 8, &(table | copied).to_be_bytes());
        file.put(table, &vec![0; cluster as usize]);
        for k in t * entries..clusters.min((t + 1) * entries) {
            let at = table + k % entries * 8;
            if random.one_in(holes) {
                continue;
            }
            random.fill(&mut block);
            match random.below(4) {
                0 if version == 3 => file.put(at, &1u64.to_be_bytes()),
                1 if version == 3 => {
                    let kept = place();
                    file.put(kept, &block);
                    file.put(at, &(kept | 1 | copied).to_be_bytes());
                }
                2 => {
                    let stream = if zstd { zstd::bulk::compress(&block, 1).unwrap() } else { deflate(&block, false) };
                    if stream.len() < block.len() {
                        packed.push((at, stream));
                    }
                }
                _ => {
                    let host = place();
                    file.put(host, &block);
                    file.put(at, &(host | copied).to_be_bytes());
                }
            }
        }
    }
    // Streams share clusters with one another and with nothing else: they lie behind all places.
    let mut host = (first + (clusters + tables + 2) * 5 / 4 + 1) << bits;
    random.shuffle(&mut packed);
    for (at, stream) in &packed {
        host += if random.one_in(2) { 0 } else { random.below(700) };
        let more = (host % 512 + stream.len() as u64 - 1) / 512;
        file.put(host, stream);
        file.put(*at, &(1 << 62 | more << (62 - (bits - 8)) | host).to_be_bytes());
        host += stream.len() as u64;
    }
    // Whole clusters for tables; a last data cluster that is nothing but zeros behind some point may be cut short, as QEMU leaves it.
    if !(file.0.len() as u64).is_multiple_of(cluster) && (packed.is_empty() || random.one_in(2)) {
        let whole = (file.0.len() as u64).next_multiple_of(cluster);
        file.0.resize(whole as usize, 0);
    }
    (format!("own qcow2 v{version}, clusters of {cluster}, zstd {zstd}, {} sectors", capacity / 512), file.0)
}

/// A sparse or stream VMDK whose tables and grains lie in any order, with absent tables, zeroed grains and any grain size.
pub(super) fn vmdk(random: &mut Random) -> (String, Vec<u8>) {
    let stream = random.one_in(2);
    let grain = 8u64 << random.below(9);
    let capacity = random.sectors(SECTORS.min(2048 * grain));
    let (grains, tables) = (capacity.div_ceil(grain), capacity.div_ceil(grain * 512));
    let (zeroed, footer) = (random.one_in(2), stream && random.one_in(2));
    let kind = if stream { "streamOptimized" } else { "monolithicSparse" };
    let room = 1 + random.below(20);
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"{kind}\"\n\nRW {capacity} SPARSE \"a\"\n"
    );
    let room = room.max((text.len() as u64).div_ceil(512));
    let mut file = Bytes::default();
    file.put(512, text.as_bytes());
    let mut next = 1 + room + random.below(9);
    let mut directory = vec![0u32; tables as usize];
    let mut take = |sectors: u64, random: &mut Random| {
        let at = next;
        next += sectors + if random.one_in(4) { random.below(9) } else { 0 };
        at
    };
    let mut order: Vec<u64> = (0..tables).collect();
    random.shuffle(&mut order);
    let mut table_bytes = vec![Vec::new(); tables as usize];
    for t in &order {
        if !random.one_in(6) {
            // Some tables before the grains, their entries filled in below.
            directory[*t as usize] = take(4, random) as u32;
            table_bytes[*t as usize] = vec![0u8; 2048];
        }
    }
    let mut order: Vec<u64> = (0..grains).filter(|g| directory[(g / 512) as usize] != 0).collect();
    random.shuffle(&mut order);
    let holes = 2 + random.below(4);
    let mut block = vec![0u8; (grain * 512) as usize];
    for g in order.into_iter().take(600) {
        if random.one_in(holes) {
            continue;
        }
        let entry = if zeroed && random.one_in(4) {
            1
        } else {
            random.fill(&mut block);
            let bytes = if stream {
                let data = deflate(&block, true);
                [&(g * grain).to_le_bytes()[..], &(data.len() as u32).to_le_bytes(), &data].concat()
            } else {
                block.clone()
            };
            let at = take((bytes.len() as u64).div_ceil(512), random);
            file.put(at * 512, &bytes);
            at as u32
        };
        table_bytes[(g / 512) as usize][(g % 512 * 4) as usize..][..4].copy_from_slice(&entry.to_le_bytes());
    }
    for (table, bytes) in directory.iter().zip(&table_bytes).filter(|(table, _)| **table != 0) {
        file.put(u64::from(*table) * 512, bytes);
    }
    let gd_sectors = (tables * 4).div_ceil(512);
    let mut gd_bytes: Vec<u8> = directory.iter().flat_map(|table| table.to_le_bytes()).collect();
    gd_bytes.resize((gd_sectors * 512) as usize, 0);
    let (gd, rgd) = (take(gd_sectors, random), take(gd_sectors, random));
    file.put(gd * 512, &gd_bytes);
    file.put(rgd * 512, &gd_bytes);
    let redundant = !stream && random.one_in(2);
    let flags = 1 | u32::from(redundant) << 1 | u32::from(zeroed) << 2 | if stream { 0x3_0000 } else { 0 };
    let mut header = vec![0u8; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"KDMV");
    put(4, &if stream { 3u32 } else { 1 }.to_le_bytes());
    put(8, &flags.to_le_bytes());
    put(44, &512u32.to_le_bytes());
    for (at, value) in [(12, capacity), (20, grain), (28, 1), (36, room), (48, if redundant { rgd } else { 0 }), (56, gd), (64, 1 + room)] {
        put(at, &value.to_le_bytes());
    }
    put(73, b"\n \r\n");
    put(77, &u16::from(stream).to_le_bytes());
    let end = (file.0.len() as u64).next_multiple_of(512);
    file.0.resize(end as usize, 0);
    if footer {
        let mut marker = [0u8; 512];
        marker[0] = 1;
        marker[12] = 3;
        file.put(end, &marker);
        file.put(end + 512, &header);
        file.put(end + 1024, &[0; 512]);
        header[56..64].fill(0xff);
    }
    file.put(0, &header);
    (format!("own vmdk {kind}, grains of {grain} sectors, zeroed {zeroed}, footer {footer}, {capacity} sectors"), file.0)
}
