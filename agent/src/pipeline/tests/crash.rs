//! Whatever moment a job ends at, and whatever is cut off part and journal, the next attempt gives the right output or an honest error.

use std::io::Read;
use std::process::Stdio;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::*;
use crate::formats::{Extent, FormatError, ova};
use crate::journal::Record;

/// How a source ends an attempt, at its n-th read.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Never,
    /// The read fails, as it does when the host goes away.
    Fail,
    /// The caller stops the job; the read goes on once it has.
    Stop(Stop),
}

/// The state that the disks of an attempt and its caller share.
struct Attempt {
    reads: AtomicU64,
    end: End,
    hit: AtomicBool,
    taken: AtomicBool,
    last: Mutex<Option<Snapshot>>,
    /// Stop in the read-back, at so many verified bytes.
    verified: u64,
}

impl Attempt {
    fn new(reads: u64, end: End, verified: u64) -> Arc<Self> {
        let (hit, taken) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { reads: AtomicU64::new(reads), end, hit, taken, last: Mutex::new(None), verified })
    }

    fn last(&self) -> Snapshot {
        self.last.lock().unwrap().unwrap()
    }
}

impl Watch for Attempt {
    fn progress(&self, snapshot: &Snapshot) {
        *self.last.lock().unwrap() = Some(*snapshot);
        if snapshot.verified >= self.verified {
            self.hit.store(true, Ordering::Relaxed);
        }
    }
    fn log(&self, _: tracing::Level, _: Stage, _: &str) {}
    fn stop(&self) -> Option<Stop> {
        if !self.hit.load(Ordering::Relaxed) {
            return None;
        }
        self.taken.store(true, Ordering::Relaxed);
        Some(if let End::Stop(stop) = self.end { stop } else { Stop::Park })
    }
}

/// A disk that ends the attempt at a read.
struct Ending {
    inner: Arc<dyn Disk>,
    attempt: Arc<Attempt>,
    /// MiB that were begun: how big the pieces are that are read is not the test's business.
    begun: Mutex<std::collections::BTreeSet<u64>>,
}

impl Disk for Ending {
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
        let first = self.begun.lock().unwrap().insert(offset >> 20);
        let spent = first && self.attempt.reads.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err();
        match self.attempt.end {
            End::Fail if spent => return Err(FormatError::Io(std::io::Error::from(std::io::ErrorKind::ConnectionReset))),
            End::Stop(_) if spent => {
                self.attempt.hit.store(true, Ordering::Relaxed);
                while !self.attempt.taken.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            _ => {}
        }
        self.inner.read_at(offset, buf, scratch)
    }
}

fn ending(disks: &[Arc<dyn Disk>], attempt: &Arc<Attempt>) -> Vec<Arc<dyn Disk>> {
    disks
        .iter()
        .map(|disk| Arc::new(Ending { inner: disk.clone(), attempt: attempt.clone(), begun: Mutex::default() }) as Arc<dyn Disk>)
        .collect()
}

/// Cuts up to `most` bytes off a file's end.
fn cut(path: &Path, most: u64, next: &mut impl FnMut() -> u64) {
    let Ok(file) = OpenOptions::new().write(true).open(path) else { return };
    let len = file.metadata().unwrap().len();
    file.set_len(len - (next() % most).min(len)).unwrap();
}

/// Writes the contents as raw files and opens them.
fn raw_disks(folder: &Folder, contents: &[Vec<u8>]) -> Vec<Arc<dyn Disk>> {
    let disk = |(i, data): (usize, &Vec<u8>)| {
        let path = folder.path(&format!("{i}.raw"));
        write_sparse(&path, data);
        open_raw(&path)
    };
    contents.iter().enumerate().map(disk).collect()
}

/// The output's disks equal `contents`.
fn assert_right(folder: &Folder, job: &Job, outcome: &Outcome, contents: &[Vec<u8>], what: &str) {
    for (n, data) in contents.iter().enumerate() {
        let window = Window::whole(File::open(folder.part_path(&job.disk_file(n))).unwrap()).unwrap();
        let window = match &outcome.disks[n].member {
            None => window,
            Some(_) => ova::open(&window).unwrap().disks[n].window.clone(),
        };
        let disk = super::super::target::open_output(job.format.disk_format(), window).unwrap();
        assert!(read_all(disk.as_ref()) == *data, "{what}: disk {n} is another");
        if job.format == Format::Qcow2 {
            let check = qemu_img(&["check", "-f", "qcow2", text(&folder.part_path(&job.disk_file(n)))]);
            assert!(check.contains("No errors were found"), "{what}: disk {n}: {check}");
        }
    }
}

/// Interrupts one job over and over; answers with the number of interruptions.
fn survive(seed: u64, folder: &Folder, disks: &[Arc<dyn Disk>], contents: &[Vec<u8>]) -> u64 {
    let mut next = noise(seed + 1);
    let targets = targets();
    let (format, mut compression) = targets[seed as usize % targets.len()];
    if matches!(format, Format::Vmdk | Format::Ovf | Format::Ova) && !seed.is_multiple_of(4) {
        // Most of them stored: what is tested here is not deflate, which would take most of the time.
        compression = Some(Compression::new(Method::Deflate, 0));
    }
    let what = format!("seed {seed}, {format:?} {compression:?}");
    folder.clear();
    // What the next attempt must find durable: nothing was cut since.
    let mut promised = 0;
    for attempt in 0.. {
        let ends = [End::Never, End::Fail, End::Stop(Stop::Cancel), End::Stop(Stop::Park)];
        let end = if attempt < 8 { ends[(next() % 4) as usize] } else { End::Never };
        let verified = if attempt < 8 && next().is_multiple_of(4) { next() % (9 << 20) + 1 } else { u64::MAX };
        let watch = Attempt::new(next() % 5, end, verified);
        let mut job = job(&ending(disks, &watch), format, compression);
        job.verify = !seed.is_multiple_of(3);
        let result = folder.run(&job, &*watch);
        assert!(watch.last().resumed >= promised, "{what}: {promised} bytes were durable, {} were taken up", watch.last().resumed);
        match result {
            Ok(outcome) => {
                assert_eq!(outcome.bytes_read + outcome.resumed_from, outcome.data_bytes, "{what}");
                assert_right(folder, &job, &outcome, contents, &what);
                if (seed / targets.len() as u64).is_multiple_of(8) {
                    let report =
                        super::super::verify_files(&manifest(&outcome), &|name| File::open(folder.part_path(name)), &|_| true).unwrap();
                    assert!(report.intact(), "{what}: {report:?}");
                    assert_same_as_uninterrupted(folder, disks, &job, &outcome, &what);
                }
                return attempt;
            }
            Err(Error::Source { .. } | Error::Cancelled | Error::Parked) => {}
            Err(e) => panic!("{what}: {e}"),
        }
        promised = if watch.last().data_bytes > 0 { watch.last().durable } else { promised };
        for (one_in, path, most) in [
            (3, folder.path("journal"), 700),
            (4, folder.part_path(&job.disk_file(0)), 5 << 20),
            (4, folder.part_path(&job.disk_file(1)), 600),
        ] {
            if next().is_multiple_of(one_in) {
                cut(&path, most, &mut next);
                promised = 0;
            }
        }
        if next().is_multiple_of(16) {
            std::fs::remove_file(folder.part_path(&job.disk_file(0))).ok();
            promised = 0;
        }
    }
    unreachable!("the loop ends with the job")
}

/// The files are those of a run without interruption, but for a plain qcow2, whose clusters lie as the threads came to them.
fn assert_same_as_uninterrupted(folder: &Folder, disks: &[Arc<dyn Disk>], done: &Job, outcome: &Outcome, what: &str) {
    if (done.format, done.compression) == (Format::Qcow2, None) {
        return;
    }
    let names: Vec<String> = outcome.files.iter().map(|file| file.path.clone()).collect();
    let read = |name: &String| std::fs::read(folder.part_path(name)).unwrap();
    let interrupted: Vec<Vec<u8>> = names.iter().map(read).collect();
    folder.clear();
    folder.run(&job(disks, done.format, done.compression), &Listener::default()).unwrap();
    for (name, before) in names.iter().zip(interrupted) {
        assert!(read(name) == before, "{what}: {name} differs from an uninterrupted run's");
    }
}

#[test]
fn jobs_stopped_at_random_moments_with_random_tails_cut_off_end_right() {
    let contents = [sample((9 << 20) + 512, 34), sample(3 << 20, 32)];
    let first: u64 = std::env::var("HYPERSDK_SEED").map_or(0, |seed| seed.parse().unwrap());
    let (seeds, stops) = (AtomicU64::new(first), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let folder = Folder::fast("crash");
                let disks = raw_disks(&folder, &contents);
                loop {
                    let seed = seeds.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + 210 {
                        return;
                    }
                    stops.fetch_add(survive(seed, &folder, &disks, &contents), Ordering::Relaxed);
                }
            });
        }
    });
    let stops = stops.into_inner();
    assert!(stops > 250, "only {stops} interruptions");
}

/// Runs the job that the environment names in this process, until it ends or somebody kills it.
fn be_killed(folder: &str) {
    let path = PathBuf::from(folder);
    let folder = std::mem::ManuallyDrop::new(Folder(path));
    let disks: Vec<Arc<dyn Disk>> = (0..2).map(|i| open_raw(&folder.path(&format!("{i}.raw")))).collect();
    let target: usize = std::env::var("HYPERSDK_TEST_TARGET").unwrap().parse().unwrap();
    let (format, compression) = targets()[target];
    let mut job = job(&disks, format, compression);
    let rate: u64 = std::env::var("HYPERSDK_TEST_RATE").unwrap().parse().unwrap();
    job.bandwidth = Some(rate << 20);
    println!("started");
    folder.run(&job, &Listener::default()).unwrap();
}

#[test]
fn processes_killed_at_random_moments_leave_what_the_next_one_ends_right() {
    if let Ok(folder) = std::env::var("HYPERSDK_TEST_KILL") {
        return be_killed(&folder);
    }
    let contents = [sample(21 << 20, 41), sample(5 << 20, 42)];
    let folder = Folder::fast("kill");
    let disks = raw_disks(&folder, &contents);
    let mut next = noise(99);
    let mut kills = 0;
    for round in 0..targets().len() * 2 {
        let target = round % targets().len();
        // MiB a second: slow, so that the kills meet the copy on any machine, then faster, so that they meet what follows it.
        let rate = if round < targets().len() { 50 } else { 200 };
        folder.clear();
        for _ in 0..4 {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args([
                "--exact",
                "--nocapture",
                "pipeline::tests::crash::processes_killed_at_random_moments_leave_what_the_next_one_ends_right",
            ]);
            child.env("HYPERSDK_TEST_KILL", &folder.0).env("HYPERSDK_TEST_TARGET", target.to_string());
            child.env("HYPERSDK_TEST_RATE", rate.to_string()).stdout(Stdio::piped());
            let mut child = child.spawn().unwrap();
            let mut told = [0u8; 64];
            // The test's own banner comes first; after "started" the job runs.
            let mut text = String::new();
            while !text.contains("started") {
                let n = child.stdout.as_mut().unwrap().read(&mut told).unwrap();
                assert!(n > 0, "the child ended: {text}");
                text.push_str(&String::from_utf8_lossy(&told[..n]));
            }
            std::thread::sleep(Duration::from_millis(next() % 120));
            child.kill().unwrap();
            kills += u32::from(!child.wait().unwrap().success());
        }
        let (format, compression) = targets()[target];
        let last = job(&disks, format, compression);
        let outcome = folder.run(&last, &Listener::default()).unwrap();
        assert_right(&folder, &last, &outcome, &contents, &format!("round {round} {format:?}"));
        if round < targets().len() {
            assert_same_as_uninterrupted(&folder, &disks, &last, &outcome, &format!("round {round} {format:?}"));
        }
    }
    println!("{kills} kills hit a running job");
    assert!(kills > 20, "only {kills} kills hit a running job");
}

#[test]
fn a_source_that_fails_costs_what_was_in_flight() {
    let folder = Folder::fast("repeat");
    let data = sample(64 << 20, 8);
    let disk = raw_disks(&folder, &[data]).remove(0);
    let total: u64 = disk.extents(0, u64::MAX).unwrap().iter().map(|extent| extent.len).sum();
    for (format, compression) in targets() {
        folder.clear();
        let (mut read, mut failed) = (0, 0);
        for reads in [7, 6, 9, 5, u64::MAX] {
            let watch = Attempt::new(reads, End::Fail, u64::MAX);
            match folder.run(&job(&ending(std::slice::from_ref(&disk), &watch), format, compression), &*watch) {
                Ok(_) => {}
                Err(Error::Source { .. }) => failed += 1,
                Err(e) => panic!("{e}"),
            }
            read += watch.last().read;
        }
        // What was in order is sealed: only what the second worker held behind the failed block is read again.
        assert!(failed > 0 && read <= total + failed * BLOCK, "{format:?}: {read} of {total} bytes were read with {failed} failures");
    }
}

#[test]
fn a_damaged_piece_is_found_at_resume_and_only_what_is_behind_it_is_copied_again() {
    let folder = Folder::fast("piece");
    let mut next = noise(3);
    let data: Vec<u8> = (0..(32 << 20) / 8).flat_map(|_| (next() & 0x0f0f_0f0f_0f0f_0f0f).to_le_bytes()).collect();
    let disk = raw_disks(&folder, &[data]).remove(0);
    for (format, compression) in targets() {
        folder.clear();
        let watch = Attempt::new(28, End::Fail, u64::MAX);
        let broken = job(&ending(std::slice::from_ref(&disk), &watch), format, compression);
        assert!(matches!(folder.run(&broken, &*watch), Err(Error::Source { .. })));
        // In the middle of what was written: seven blocks of eight at most.
        let path = folder.part_path(&broken.disk_file(0));
        let len = std::fs::metadata(&path).unwrap().len();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0u8; 9000], len / 2).unwrap();
        let outcome = folder.run(&job(std::slice::from_ref(&disk), format, compression), &Listener::default()).unwrap();
        let (sealed, resumed) = (watch.last().durable, outcome.resumed_from);
        assert!(resumed < sealed && resumed + BLOCK >= sealed / 2, "{format:?}: {resumed} of {sealed}");
        assert_eq!(outcome.bytes_read + outcome.resumed_from, outcome.data_bytes);
    }
}

#[test]
fn another_source_starts_anew_and_a_finished_job_answers_again_without_reading() {
    let folder = Folder::new("again");
    let disk = raw_disks(&folder, &[sample(9 << 20, 2)]).remove(0);
    let first = job(std::slice::from_ref(&disk), Format::Qcow2, None);
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

#[test]
fn a_read_back_goes_on_where_it_stood_and_a_package_cut_short_is_closed_again() {
    let folder = Folder::new("verified");
    let contents = [sample(24 << 20, 17), sample(6 << 20, 18)];
    let disks = raw_disks(&folder, &contents);
    for (format, compression) in targets() {
        folder.clear();
        let job = job(&disks, format, compression);
        let whole = folder.run(&job, &Listener::default()).unwrap();
        let mut journal = folder.journal(&job);
        let first =
            (0..journal.len()).find(|i| matches!(journal.read(*i).unwrap(), Record::Verified { .. } | Record::Hashed { .. })).unwrap();
        journal.cut(first).unwrap();
        journal.append(&Record::Verified { disk: 0, next_block: 4, data: 1, blocks: 99 }).unwrap();
        if matches!(format, Format::Ova) {
            let path = folder.part_path("web.ova");
            File::options().write(true).open(&path).unwrap().set_len(std::fs::metadata(&path).unwrap().len() - 700).unwrap();
        }
        let again = folder.run(&job, &Listener::default()).unwrap();
        assert_eq!(again.files, whole.files, "{format:?}");
        assert!(again.receipt.blocks_verified >= 99, "the four blocks before were compared again");
        assert_right(&folder, &job, &again, &contents, "again");
    }
}

#[test]
fn a_stop_in_the_first_moment_leaves_nothing_that_disturbs() {
    let folder = Folder::new("first");
    let disk = raw_disks(&folder, &[sample(5 << 20, 2)]).remove(0);
    let job = job(&[disk], Format::Raw, None);
    let started = Instant::now();
    let at_once = Listener { stop: Some((0, Stop::Cancel)), ..Listener::default() };
    assert!(matches!(folder.run(&job, &at_once), Err(Error::Cancelled)));
    assert!(started.elapsed() < Duration::from_secs(1));
    folder.run(&job, &Listener::default()).unwrap();
}
