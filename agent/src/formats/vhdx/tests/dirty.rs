//! Logs that are to be replayed, made by hand and judged by QEMU's own replay.

use super::*;

/// What `changes` would make of an image, with the log emptied.
fn replayed(image: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut image = image.to_vec();
    for change in changes {
        match change {
            Change::Zeros(from, len) => image[*from as usize..(from + len) as usize].fill(0),
            Change::Sector(from, data) => image[*from as usize..*from as usize + 4096].copy_from_slice(data),
        }
    }
    patch_headers(&mut image, 48, &[0; 16]);
    image
}

fn read(dir: &Dir, image: &[u8]) -> Result<Vec<u8>, FormatError> {
    std::fs::write(dir.path("r.vhdx"), image).unwrap();
    let data = open(&dir.path("r.vhdx")).map(|reader| read_all(&reader))?;
    assert!(std::fs::read(dir.path("r.vhdx")).unwrap() == image, "the file was changed");
    Ok(data)
}

/// What QEMU reads after it has replayed the log.
fn qemu_reads(dir: &Dir, image: &[u8]) -> Vec<u8> {
    let (copy, raw) = (dir.path("q.vhdx"), dir.path("q.raw"));
    std::fs::write(&copy, image).unwrap();
    qemu_img(&["check", "-T", "unsafe", "-f", "vhdx", "-r", "all", text(&copy)]);
    qemu_img(&["convert", "-f", "vhdx", "-O", "raw", text(&copy), text(&raw)]);
    std::fs::read(raw).unwrap()
}

fn bat_sector(entries: &[u64]) -> Vec<u8> {
    let mut sector: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    sector.resize(4096, 0);
    sector
}

/// The BAT of [`small`] with block 1 at 12 MiB.
fn with_block_1() -> Change {
    Change::Sector(BAT_AT as u64, bat_sector(&[(4 << 20) | 6, (12 << 20) | 6, (8 << 20) | 6]))
}

#[test]
fn random_logs_read_as_qemu_reads_them_after_its_replay() {
    let dir = Dir::new("dirty");
    let (mut image, _) = small(&dir);
    image.extend(sample(4 << 20, 50 << 10, 123));
    let mut next = noise(17);
    let mut judged = 0;
    for seed in 0..32u64 {
        let mut image = image.clone();
        patch_headers(&mut image, 48, &LOG_GUID);
        // Old entries of another log, and bytes that mean nothing.
        let mut stale =
            LogEntry { sequence: 900, tail: 0, flushed: 1 << 20, last: 1 << 20, changes: vec![Change::Zeros(4 << 20, 8 << 20)] }.bytes();
        stale[32..48].copy_from_slice(&[0xee; 16]);
        crc::seal(&mut stale);
        for at in (0..LOG_LEN).step_by(5 * 4096) {
            put_log(&mut image, at, &stale);
        }
        // QEMU 7.2 cannot read descriptors beyond an entry's first sector, which holds 126 (it reads the second over the first).
        let most = if seed % 5 == 4 { 180 } else { 45 };
        let count = if seed % 4 == 0 || most > 126 { 1 } else { next() % 5 + 1 };
        let mut entries: Vec<LogEntry> = (0..count)
            .map(|i| {
                let changes = (0..next() % most + 1)
                    .map(|_| {
                        let at = (4 << 20) + next() % 3000 * 4096;
                        match next() % 8 {
                            0 => with_block_1(),
                            1..4 => Change::Zeros(at, (next() % 60 * 4096).min((16 << 20) - at)),
                            _ => Change::Sector(at, sample(4096, 2000, next())),
                        }
                    })
                    .collect();
                LogEntry { sequence: (seed << 31) + 50 + i, tail: 0, flushed: 16 << 20, last: 16 << 20, changes }
            })
            .collect();
        // QEMU finds a sequence of several entries only when it does not wrap; one entry may, and the next test wraps more.
        let total: usize = entries.iter().map(|entry| entry.bytes().len()).sum();
        assert!(total < LOG_LEN, "too much for the log");
        let room = (LOG_LEN - total) / 4096;
        let start = if count == 1 { LOG_LEN - 4096 } else { (next() as usize % room) * 4096 };
        let mut at = start;
        for entry in &mut entries {
            entry.tail = start as u32;
            put_log(&mut image, at, &entry.bytes());
            at += entry.bytes().len();
        }
        // A last entry that did not reach the disk whole.
        let mut torn =
            LogEntry { sequence: (seed << 31) + 50 + count, changes: vec![Change::Zeros(4 << 20, 4 << 20)], ..entries[0].clone() }.bytes();
        torn[100] ^= 1;
        if at < LOG_LEN {
            put_log(&mut image, at, &torn);
        }
        let for_qemu = entries.iter().all(|entry| entry.changes.len() <= 126);
        judged += u32::from(for_qemu);
        let changes: Vec<Change> = entries.into_iter().flat_map(|entry| entry.changes).collect();
        let ours = read(&dir, &image).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        assert!(ours == read(&dir, &replayed(&image, &changes)).unwrap(), "seed {seed}: not as the replayed image");
        assert!(!for_qemu || ours == qemu_reads(&dir, &image), "seed {seed}: not as qemu");
    }
    assert!(judged > 24, "qemu judged {judged} logs only");
}

#[test]
fn a_sequence_that_wraps_is_replayed_from_its_tail_on_and_older_ones_are_not() {
    let dir = Dir::new("wrap");
    let (image, _) = small(&dir);
    let sector = |n: u8| vec![n; 4096];
    let entry = |sequence, tail, changes: Vec<Change>| LogEntry { sequence, tail, flushed: 4 << 20, last: 12 << 20, changes };
    let mut image = image;
    patch_headers(&mut image, 48, &LOG_GUID);
    let at = |n: usize| (LOG_LEN - 3 * 8192 + n * 8192) % LOG_LEN;
    // Entry 10 was applied long ago (its bytes have changed since), 11 to 15 were not; 15 says so.
    for n in 0..6u64 {
        let place = Change::Sector((4 << 20) + (n.max(1) % 4) * 4096, sector(10 + n as u8));
        let tail = if n < 5 { at(0) } else { at(1) };
        put_log(&mut image, at(n as usize), &entry(10 + n, tail as u32, vec![place]).bytes());
    }
    // An older sequence elsewhere.
    put_log(&mut image, 512 << 10, &entry(7, 512 << 10, vec![Change::Zeros(4 << 20, 8 << 20)]).bytes());
    let data = read(&dir, &image).unwrap();
    let first: Vec<u8> = (0..4).map(|i| data[i * 4096]).collect();
    assert_eq!(first, [14, 15, 12, 13]);
    // Entry 10 alone wrote the same sector as 11: had it come after it, that sector would be 10.
    assert!(read(&dir, &replayed(&image, &[])).unwrap()[16384..] == data[16384..]);
}

#[test]
fn a_log_that_makes_the_file_longer_gives_zeros_there() {
    let dir = Dir::new("longer");
    let (mut image, data) = small(&dir);
    patch_headers(&mut image, 48, &LOG_GUID);
    let fill = Change::Sector((12 << 20) + 8192, vec![5; 4096]);
    // Not a whole MiB: QEMU lengthens the file for such a one only.
    let log = LogEntry { sequence: 1, tail: 0, flushed: 12 << 20, last: (16 << 20) - 4096, changes: vec![with_block_1(), fill] };
    put_log(&mut image, 0, &log.bytes());
    let read_back = read(&dir, &image).unwrap();
    let mut expected = data;
    expected[(4 << 20) + 8192..][..4096].fill(5);
    assert!(read_back == expected && qemu_reads(&dir, &image) == expected);
}

#[test]
fn what_qemu_leaves_in_its_log_is_found() {
    let dir = Dir::new("qemu-log");
    let (image, raw) = (dir.path("i.vhdx"), dir.path("i.raw"));
    qemu_img(&["create", "-f", "vhdx", "-o", "block_size=1M", text(&image), "20M"]);
    run("qemu-io", &["-t", "unsafe", "-f", "vhdx", "-c", "write -P 3 0 5M", "-c", "write -P 4 9M 3M", text(&image)]);
    qemu_img(&["convert", "-f", "vhdx", "-O", "raw", text(&image), text(&raw)]);
    let mut bytes = std::fs::read(&image).unwrap();
    // The last entry of the log is still there; its mark makes it one that is to be replayed, over the sector that it wrote.
    let entries: Vec<usize> = (LOG_AT..LOG_AT + LOG_LEN).step_by(4096).filter(|at| bytes[*at..].starts_with(b"loge")).collect();
    let newest = *entries.iter().max_by_key(|at| u64::from_le_bytes(bytes[**at + 16..][..8].try_into().unwrap())).unwrap();
    let mark: [u8; 16] = bytes[newest + 32..][..16].try_into().unwrap();
    patch_headers(&mut bytes, 48, &mark);
    let target = u64::from_le_bytes(bytes[newest + 64 + 16..][..8].try_into().unwrap()) as usize;
    bytes[target..target + 4096].fill(0);
    assert!(read(&dir, &bytes).unwrap() == std::fs::read(&raw).unwrap());
    assert!(qemu_reads(&dir, &bytes) == std::fs::read(&raw).unwrap());
}
