//! Damage to an output is found and named, by the job that made it and by a check years later.

use std::os::unix::fs::FileExt;

use super::*;

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0u8];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
}

/// A disk of random bytes, so that each output byte matters.
fn random(folder: &Folder, capacity: usize) -> Arc<dyn Disk> {
    let mut next = noise(12);
    let data: Vec<u8> = (0..capacity / 8).flat_map(|_| (next() & 0x0f0f_0f0f_0f0f_0f0f).to_le_bytes()).collect();
    write_sparse(&folder.path("random.raw"), &data);
    open_raw(&folder.path("random.raw"))
}

/// One worker, so that the clusters of a plain qcow2 lie in the order of the disk, too, and the test knows which block a byte is of.
fn in_order(mut job: Job) -> Job {
    job.tuning.workers = Some(1);
    job
}

#[test]
fn a_check_names_each_bad_block_and_goes_on_behind_it() {
    let folder = Folder::new("check");
    let disk = random(&folder, 20 << 20);
    for (format, compression) in targets() {
        folder.clear();
        let outcome = folder.run(&in_order(job(std::slice::from_ref(&disk), format, compression)), &Listener::default()).unwrap();
        let manifest = manifest(&outcome);
        let path = folder.part_path(&outcome.disks[0].file);
        let len = std::fs::metadata(&path).unwrap().len();
        // Three and seven tenths into the data, behind the tables of a plain format: in the second and in the fourth of five blocks.
        let front = len.saturating_sub(20 << 20);
        flip(&path, front + (len - front) * 3 / 10);
        flip(&path, front + (len - front) * 7 / 10);
        let report = super::super::verify_files(&manifest, &|name| File::open(folder.part_path(name)), &|_| true).unwrap();
        let bad: Vec<u64> = report.disks[0].bad.iter().map(|bad| bad.block).collect();
        assert_eq!(bad, [1, 3], "{format:?} {compression:?}: {report:?}");
        assert_eq!(report.disks[0].bad[1].offset, 3 * BLOCK);
        assert_eq!((report.disks[0].blocks_checked, report.disks[0].bad_blocks), (5, 2));
        assert!(report.files[0].problem.as_ref().is_some_and(|problem| problem.contains("SHA-256")));
        assert!(!report.intact());
        File::options().write(true).open(&path).unwrap().set_len(len / 2).unwrap();
        let report = super::super::verify_files(&manifest, &|name| File::open(folder.part_path(name)), &|_| true).unwrap();
        assert!(!report.intact() && report.files[0].problem.is_some(), "{format:?}: {report:?}");
        std::fs::remove_file(&path).unwrap();
        let report = super::super::verify_files(&manifest, &|name| File::open(folder.part_path(name)), &|_| true).unwrap();
        assert!(report.disks[0].unreadable.is_some());
    }
}

#[test]
fn a_hole_that_should_be_one_and_data_that_should_not_be_there_are_found() {
    let folder = Folder::new("extra");
    let mut data = vec![0u8; 20 << 20];
    data[..100].fill(7);
    write_sparse(&folder.path("a.raw"), &data);
    let outcome = folder.run(&job(&[open_raw(&folder.path("a.raw"))], Format::Raw, None), &Listener::default()).unwrap();
    flip(&folder.part_path("web.raw"), 9 << 20);
    let report = super::super::verify_files(&manifest(&outcome), &|name| File::open(folder.part_path(name)), &|_| true).unwrap();
    assert_eq!(report.disks[0].bad.iter().map(|bad| bad.block).collect::<Vec<_>>(), [2]);
    let mut other = manifest(&outcome);
    other.disks[0].file = "../a.raw".into();
    other.files[0].path = "../a.raw".into();
    let report = super::super::verify_files(&other, &|name| File::open(folder.part_path(name)), &|_| true).unwrap();
    assert!(report.disks[0].unreadable.as_ref().is_some_and(|reason| reason.contains("bare")), "{report:?}");
    assert!(matches!(super::super::verify_files(&other, &|name| File::open(folder.part_path(name)), &|_| false), Err(Error::Cancelled)));
}

#[test]
fn a_byte_that_changes_between_writing_and_reading_back_fails_the_job() {
    let folder = Folder::new("mismatch");
    let disk = random(&folder, 12 << 20);
    for (format, compression) in targets() {
        folder.clear();
        let job = in_order(job(std::slice::from_ref(&disk), format, compression));
        let name = job.disk_file(0);
        // Asked to stop as soon as the copy is complete, resumed after the flip: only the read-back is left.
        let path = folder.part_path(&name);
        struct UntilDone(std::sync::Mutex<bool>);
        impl Watch for UntilDone {
            fn progress(&self, snapshot: &Snapshot) {
                *self.0.lock().unwrap() |= snapshot.stage == Stage::Verifying;
            }
            fn log(&self, _: tracing::Level, _: Stage, _: &str) {}
            fn stop(&self) -> Option<Stop> {
                self.0.lock().unwrap().then_some(Stop::Park)
            }
        }
        assert!(matches!(folder.run(&job, &UntilDone(Mutex::new(false))), Err(Error::Parked)));
        let len = std::fs::metadata(&path).unwrap().len();
        flip(&path, len / 2);
        // What was verified before the flip is not read again: forget it.
        let mut journal = folder.journal(&job);
        let keep = (0..journal.len()).position(|i| matches!(journal.read(i).unwrap(), crate::journal::Record::Verified { .. }));
        journal.cut(keep.unwrap_or(journal.len())).unwrap();
        let error = folder.run(&job, &Listener::default()).unwrap_err();
        assert!(matches!(error, Error::Mismatch { block: 1, offset: BLOCK, .. }), "{format:?} {compression:?}: {error}");
    }
}
