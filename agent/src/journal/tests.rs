//! The journal cut and damaged at every byte.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use super::*;

fn identity(job: &str) -> Identity {
    let disk = DiskIdentity { name: "disk-0".into(), capacity: 512, identity: "1:2".into() };
    Identity { job: job.into(), vm: "web".into(), format: "raw".into(), compression: None, disks: vec![disk] }
}

fn records() -> Vec<Record> {
    let checkpoint = Checkpoint {
        disk: 1,
        next_block: 7,
        data: 1 << 33,
        from: 65_536,
        position: 131_072,
        hash: [3; 32],
        digests: vec![(5, [1; 32]), (6, [2; 32])],
        piece: vec![9, 8, 7],
    };
    vec![
        Record::DiskStarted { disk: 1, base: 512, front: 65_536 },
        Record::Checkpoint(checkpoint),
        Record::DiskFinished { disk: 1, length: 99, data: 98, front: [4; 32], tail: [5; 32] },
        Record::AllWritten { files: vec![("web.raw".into(), 7), ("b".into(), u64::MAX)] },
        Record::Verified { disk: 1, next_block: 8, data: 4, blocks: 2 },
        Record::Hashed { file: "web.raw".into(), position: 64, state: vec![1; 40], done: true },
        Record::Granted { epoch: 3 },
        Record::Published,
    ]
}

fn scratch(name: &str) -> File {
    let path = std::env::temp_dir().join(format!("hypersdk-journal-{name}-{}", std::process::id()));
    let file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file
}

#[test]
fn a_journal_cut_or_damaged_at_any_byte_gives_the_records_before_and_takes_new_ones() {
    let file = scratch("cut");
    let mut journal = Journal::open(file.try_clone().unwrap(), &identity("a")).unwrap();
    assert!(!journal.adopted());
    records().iter().for_each(|record| journal.append(record).unwrap());
    let mut whole = vec![0u8; journal.end as usize];
    file.read_exact_at(&mut whole, 0).unwrap();
    let ends: Vec<u64> = journal.index.iter().map(|(offset, len)| offset + u64::from(*len)).collect();
    for at in 0..whole.len() {
        for flip in [false, true] {
            file.set_len(0).unwrap();
            file.write_all_at(&whole, 0).unwrap();
            match flip {
                true => file.write_all_at(&[whole[at] ^ 0x10], at as u64).unwrap(),
                false => file.set_len(at as u64).unwrap(),
            }
            let mut journal = Journal::open(file.try_clone().unwrap(), &identity("a")).unwrap();
            let keep = ends.iter().filter(|end| **end <= at as u64).count();
            let found: Vec<Record> = (0..journal.len()).map(|i| journal.read(i).unwrap()).collect();
            assert_eq!(found, records()[..keep], "byte {at}, flipped: {flip}");
            journal.append(&Record::Published).unwrap();
            let again = Journal::open(file.try_clone().unwrap(), &identity("a")).unwrap();
            assert_eq!((again.len(), again.read(keep).unwrap()), (keep + 1, Record::Published));
        }
    }
}

#[test]
fn another_identity_starts_anew_and_cut_keeps_the_first_records() {
    let file = scratch("identity");
    let mut journal = Journal::open(file.try_clone().unwrap(), &identity("a")).unwrap();
    records().iter().for_each(|record| journal.append(record).unwrap());
    journal.cut(2).unwrap();
    assert_eq!(Journal::open(file.try_clone().unwrap(), &identity("a")).unwrap().len(), 2);
    assert!(Journal::open(file.try_clone().unwrap(), &identity("b")).unwrap().is_empty());
    assert!(Journal::open(file, &identity("a")).unwrap().is_empty());
}
