//! Whatever moment a job ends at, and whatever is cut off part and journal, the next attempt gives the right output or an honest error.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::formats::{Extent, FormatError};

/// Hands out a disk's bytes and fails after a number of reads, as a source does whose host goes away.
struct Failing {
    inner: Arc<dyn Disk>,
    left: AtomicU64,
}

impl Disk for Failing {
    fn format(&self) -> &'static str {
        self.inner.format()
    }
    fn capacity(&self) -> u64 {
        self.inner.capacity()
    }
    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>, FormatError> {
        self.inner.extents(from, to)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<(), FormatError> {
        if self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err() {
            return Err(FormatError::Io(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
        }
        self.inner.read_at(offset, buf, scratch)
    }
}

/// Stops when a number of data bytes was read or verified.
struct At {
    read: u64,
    verified: u64,
    stop: Stop,
    hit: AtomicBool,
}

impl Watch for At {
    fn progress(&self, snapshot: &Snapshot) {
        if snapshot.read >= self.read || snapshot.verified >= self.verified {
            self.hit.store(true, Ordering::Relaxed);
        }
    }
    fn log(&self, _: tracing::Level, _: Stage, _: &str) {}
    fn stop(&self) -> Option<Stop> {
        self.hit.load(Ordering::Relaxed).then_some(self.stop)
    }
}

/// Cuts up to `most` bytes off a file's end.
fn cut(path: &Path, most: u64, next: &mut impl FnMut() -> u64) -> u64 {
    let Ok(file) = OpenOptions::new().write(true).open(path) else { return 0 };
    let len = file.metadata().unwrap().len();
    let cut = (next() % most.max(1)).min(len);
    file.set_len(len - cut).unwrap();
    cut
}

/// What one seed did: bytes read in all attempts, and attempts.
fn survive(seed: u64, folder: &Folder, disks: &[Arc<dyn Disk>], contents: &[Vec<u8>], totals: &mut (u64, u64)) {
    let mut next = noise(seed + 1);
    let targets = targets();
    let (format, compression) = targets[seed as usize % targets.len()];
    folder.clear();
    let mut outcome = None;
    for attempt in 0..40 {
        let failing: Vec<Arc<dyn Disk>> = disks
            .iter()
            .map(|disk| {
                let left = AtomicU64::new(if next() % 2 == 0 { next() % 8 } else { u64::MAX });
                Arc::new(Failing { inner: disk.clone(), left }) as Arc<dyn Disk>
            })
            .collect();
        let source = if attempt < 12 { &failing[..] } else { disks };
        let mut job = job(source, format, compression);
        job.verify = seed % 3 != 0;
        let stop = if next() % 2 == 0 { Stop::Cancel } else { Stop::Park };
        let never = attempt >= 12 || next() % 2 == 0;
        let at = At {
            read: if never { u64::MAX } else { next() % (20 << 20) },
            verified: if never { u64::MAX } else { next() % (30 << 20) + 1 },
            stop,
            hit: AtomicBool::new(false),
        };
        match folder.run(&job, &at) {
            Ok(done) => {
                outcome = Some((done, job));
                break;
            }
            Err(Error::Source { .. } | Error::Cancelled | Error::Parked) => {}
            Err(e) => panic!("seed {seed}: {e}"),
        }
        totals.1 += 1;
        if next() % 2 == 0 {
            cut(&folder.path("journal"), 600, &mut next);
        }
        if next() % 3 == 0 {
            for n in 0..disks.len() {
                cut(&folder.part_path(&job.disk_file(n)), 5 << 20, &mut next);
            }
        }
        if next() % 16 == 0 {
            std::fs::remove_file(folder.part_path(&job.disk_file(0))).ok();
        }
    }
    let (outcome, job) = outcome.unwrap_or_else(|| panic!("seed {seed} never ended"));
    totals.0 += outcome.bytes_read + outcome.resumed_from - outcome.data_bytes;
    assert_eq!(outcome.bytes_read + outcome.resumed_from, outcome.data_bytes, "seed {seed}: the last attempt read what it had");
    let manifest = manifest(&outcome);
    let report = super::super::verify_files(&manifest, &|name| File::open(folder.part_path(name)), &|_| true).unwrap();
    assert!(report.intact(), "seed {seed} {format:?}: {report:?}");
    for (n, data) in contents.iter().enumerate() {
        let window = Window::whole(File::open(folder.part_path(&job.disk_file(n))).unwrap()).unwrap();
        let window = match &outcome.disks[n].member {
            None => window,
            Some(member) => {
                let entries = crate::formats::ova::tar::entries(&window).unwrap();
                let found = entries.iter().find(|entry| entry.name == *member).unwrap();
                window.part(found.offset, found.size).unwrap()
            }
        };
        let disk = super::super::target::open_output(format.disk_format(), window).unwrap();
        assert!(read_all(disk.as_ref()) == *data, "seed {seed}: disk {n} is another");
    }
    // The same job without interruptions gives the same bytes.
    if seed % 8 == 0 {
        let names: Vec<String> = outcome.files.iter().map(|file| file.path.clone()).collect();
        let read = |name: &String| std::fs::read(folder.part_path(name)).unwrap();
        let interrupted: Vec<Vec<u8>> = names.iter().map(read).collect();
        folder.clear();
        folder.run(&job_like(&job, disks), &Listener::default()).unwrap();
        for (name, before) in names.iter().zip(interrupted) {
            assert!(read(name) == before, "seed {seed}: {name} differs from an uninterrupted run's");
        }
    }
}

fn job_like(other: &Job, disks: &[Arc<dyn Disk>]) -> Job {
    Job { verify: true, ..job(disks, other.format, other.compression) }
}

#[test]
fn two_hundred_jobs_killed_at_random_moments_with_random_tails_cut_off_end_right() {
    let contents = [sample(17 << 20, 31), sample((9 << 20) + 512, 32)];
    let folder = Folder::new("crash");
    let disks: Vec<Arc<dyn Disk>> = contents
        .iter()
        .enumerate()
        .map(|(i, data)| {
            let path = folder.path(&format!("{i}.raw"));
            write_sparse(&path, data);
            open_raw(&path)
        })
        .collect();
    let first: u64 = std::env::var("HYPERSDK_SEED").map_or(0, |seed| seed.parse().unwrap());
    let mut totals = (0, 0);
    for seed in first..first + 210 {
        survive(seed, &folder, &disks, &contents, &mut totals);
    }
    assert!(totals.1 > 200, "only {} attempts were interrupted", totals.1);
}

#[test]
fn a_killed_copy_repeats_no_more_than_a_checkpoint() {
    let folder = Folder::new("repeat");
    let data = sample(64 << 20, 8);
    write_sparse(&folder.path("a.raw"), &data);
    let disk = open_raw(&folder.path("a.raw"));
    for (format, compression) in targets() {
        folder.clear();
        let total: u64 = disk.extents(0, u64::MAX).unwrap().iter().map(|extent| extent.len).sum();
        let (mut read, mut kills) = (0, 0);
        for reads in [7, 6, 9, 5, u64::MAX] {
            let failing: Arc<dyn Disk> = Arc::new(Failing { inner: disk.clone(), left: AtomicU64::new(reads) });
            let job = job(&[failing], format, compression);
            let listener = Listener::default();
            let result = folder.run(&job, &listener);
            read += listener.snapshots.lock().unwrap().last().unwrap().read;
            match result {
                Ok(outcome) => read += outcome.bytes_read - listener.snapshots.lock().unwrap().last().unwrap().read,
                Err(Error::Source { .. }) => kills += 1,
                Err(e) => panic!("{e}"),
            }
        }
        // A failed source keeps what is in order; what other workers held behind the failed block is read again.
        assert!(kills == 4 && read <= total + kills * 2 * BLOCK, "{format:?}: {read} of {total} read with {kills} kills");
    }
}

#[test]
fn a_damaged_piece_is_found_at_resume_and_only_what_is_behind_it_is_copied_again() {
    let folder = Folder::new("piece");
    let mut next = noise(3);
    let data: Vec<u8> = (0..(32 << 20) / 8).flat_map(|_| (next() & 0x0f0f_0f0f_0f0f_0f0f).to_le_bytes()).collect();
    write_sparse(&folder.path("a.raw"), &data);
    let disk = open_raw(&folder.path("a.raw"));
    for (format, compression) in targets() {
        folder.clear();
        let failing: Arc<dyn Disk> = Arc::new(Failing { inner: disk.clone(), left: AtomicU64::new(7) });
        let broken = job(&[failing], format, compression);
        assert!(matches!(folder.run(&broken, &Listener::default()), Err(Error::Source { .. })));
        // In the middle of the fourth block of eight.
        let path = folder.part_path(&broken.disk_file(0));
        let len = std::fs::metadata(&path).unwrap().len();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0u8; 9000], len / 2).unwrap();
        let outcome = folder.run(&job(&[disk.clone()], format, compression), &Listener::default()).unwrap();
        assert!((2 * BLOCK..=4 * BLOCK).contains(&outcome.resumed_from), "{format:?}: {}", outcome.resumed_from);
        assert_eq!(outcome.bytes_read + outcome.resumed_from, outcome.data_bytes);
    }
}

#[test]
fn another_source_starts_anew_and_a_finished_job_answers_again_without_reading() {
    let folder = Folder::new("again");
    write_sparse(&folder.path("a.raw"), &sample(9 << 20, 2));
    let disk = open_raw(&folder.path("a.raw"));
    let first = job(&[disk.clone()], Format::Qcow2, None);
    let done = folder.run(&first, &Listener::default()).unwrap();
    let again = folder.run(&first, &Listener::default()).unwrap();
    assert_eq!((again.bytes_read, again.resumed_from, &again.files, &again.disks), (0, done.data_bytes, &done.files, &done.disks));
    let mut changed = first.clone();
    changed.disks[0].identity = "2".into();
    let anew = folder.run(&changed, &Listener::default()).unwrap();
    assert_eq!((anew.bytes_read, anew.resumed_from), (done.data_bytes, 0));
    let mut journal = folder.journal(&first);
    assert!(matches!(run(&changed, &folder.part(), &mut journal, &Listener::default()), Err(Error::Journal(_))));
}
