//! What a job may cost: time, bandwidth, memory, and how fast it stops.

use std::time::Instant;

use super::*;
use crate::formats::{Extent, FormatError};

/// A disk that is made up: data everywhere, or nowhere.
struct Made {
    capacity: u64,
    data: Option<u64>,
    pause: Duration,
}

impl Disk for Made {
    fn format(&self) -> &'static str {
        "raw"
    }
    fn capacity(&self) -> u64 {
        self.capacity
    }
    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>, FormatError> {
        let to = to.min(self.data.unwrap_or(0));
        Ok(if from < to { vec![Extent { offset: from, len: to - from }] } else { Vec::new() })
    }
    fn read_at(&self, offset: u64, buf: &mut [u8], _: &mut Scratch) -> Result<(), FormatError> {
        std::thread::sleep(self.pause);
        buf.fill(1 + (offset / BLOCK % 255) as u8);
        Ok(())
    }
}

#[test]
fn an_empty_disk_of_four_tebibytes_takes_seconds_in_every_format() {
    let folder = Folder::new("empty");
    for (format, compression) in targets() {
        folder.clear();
        let disk: Arc<dyn Disk> = Arc::new(Made { capacity: 4 << 40, data: None, pause: Duration::ZERO });
        let started = Instant::now();
        let outcome = folder.run(&job(&[disk], format, compression), &Listener::default());
        if format == Format::Vhd {
            let said = outcome.unwrap_err().to_string();
            assert!(said.contains("limit of 2040 GiB") && said.contains("vhdx"), "{said}");
            continue;
        }
        let outcome = outcome.unwrap();
        assert!(started.elapsed() < Duration::from_secs(3), "{format:?} took {:?}", started.elapsed());
        assert!(outcome.disks[0].blocks.0.is_empty());
        if format == Format::Qcow2 {
            let info = qemu_img(&["info", "-f", "qcow2", text(&folder.part_path("web.qcow2"))]);
            assert!(info.contains("4 TiB"), "{info}");
        }
    }
}

#[test]
fn the_bandwidth_limit_holds_within_five_per_cent() {
    let folder = Folder::fast("bandwidth");
    let disk: Arc<dyn Disk> = Arc::new(Made { capacity: 30 << 20, data: Some(30 << 20), pause: Duration::ZERO });
    let mut limited = job(&[disk], Format::Raw, None);
    limited.verify = false;
    limited.bandwidth = Some(20 << 20);
    // A busy machine may make a job slower than its limit, but never faster.
    let rate = || {
        folder.clear();
        let started = Instant::now();
        let outcome = folder.run(&limited, &Listener::default()).unwrap();
        let rate = outcome.bytes_read as f64 / started.elapsed().as_secs_f64() / f64::from(20 << 20);
        assert!(rate <= 1.05 && outcome.receipt.read_back == "not_verified", "{rate} of the limit");
        rate
    };
    assert!((0..5).any(|_| rate() >= 0.95));
}

#[test]
fn a_stop_ends_the_bytes_within_a_second_even_in_a_long_wait_for_bandwidth() {
    for stop in [Stop::Cancel, Stop::Park] {
        let folder = Folder::new("stop");
        let disk: Arc<dyn Disk> = Arc::new(Made { capacity: 1 << 30, data: Some(1 << 30), pause: Duration::ZERO });
        let mut slow = job(&[disk], Format::Qcow2, None);
        // A block takes 40 s.
        slow.bandwidth = Some(100 << 10);
        let listener = Listener { stop: Some((6, stop)), ..Listener::default() };
        let started = Instant::now();
        let error = folder.run(&slow, &listener).unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        assert!(matches!((stop, error), (Stop::Cancel, Error::Cancelled) | (Stop::Park, Error::Parked)));
    }
}

/// Peak resident memory of this process in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn memory_does_not_follow_the_disk() {
    // In a process of its own, because a peak is the whole process's.
    if std::env::var_os("HYPERSDK_TEST_MEMORY").is_none() {
        let this = std::env::current_exe().unwrap();
        let mut child = Command::new(this);
        child.args(["--exact", "--nocapture", "pipeline::tests::limits::memory_does_not_follow_the_disk"]);
        let output = child.env("HYPERSDK_TEST_MEMORY", "1").output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && told.contains("1 passed"), "{told}{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let folder = Folder::fast("memory");
    let before = peak();
    for (format, compression) in [(Format::Raw, None), (Format::Qcow2, Some(Compression::new(Method::Zstd, 1))), (Format::Vmdk, None)] {
        folder.clear();
        let disk: Arc<dyn Disk> = Arc::new(Made { capacity: 320 << 20, data: Some(320 << 20), pause: Duration::ZERO });
        let mut large = job(&[disk], format, compression);
        large.tuning.workers = Some(12);
        large.tuning.checkpoint_bytes = 64 << 20;
        folder.run(&large, &Listener::default()).unwrap();
    }
    let used = peak() - before;
    println!("peak {} MiB", used >> 20);
    assert!(used < 128 << 20, "{} MiB", used >> 20);
}

/// Runs this one test in a mount namespace with a tmpfs of 24 MiB, where that is allowed (root, or unprivileged namespaces).
#[test]
fn a_disk_that_fills_up_is_told_as_such_and_the_job_goes_on_once_there_is_room() {
    if let Some(path) = std::env::var_os("HYPERSDK_TEST_FULL") {
        return fill_up(Path::new(&path));
    }
    let folder = Folder::new("full");
    let name = "pipeline::tests::limits::a_disk_that_fills_up_is_told_as_such_and_the_job_goes_on_once_there_is_room";
    let script = format!("mount -t tmpfs -o size=24m none '{}' || exit 77; exec \"$0\" --exact --nocapture {name}", text(&folder.0));
    let mut child = Command::new("unshare");
    child.args(["-rm", "sh", "-c", &script]).arg(std::env::current_exe().unwrap()).env("HYPERSDK_TEST_FULL", &folder.0);
    let output = child.output().expect("this test needs unshare (Debian: util-linux)");
    let told = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.code() == Some(77) || told.contains("unshare:") {
        eprintln!("NOT TESTED: a full disk; no mount namespace is allowed here: {told}");
        return;
    }
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
}

fn fill_up(path: &Path) {
    std::fs::create_dir(path.join("part")).unwrap();
    let folder = std::mem::ManuallyDrop::new(Folder(path.to_owned()));
    let disk: Arc<dyn Disk> = Arc::new(Made { capacity: 20 << 20, data: Some(20 << 20), pause: Duration::ZERO });
    // What else fills the disk: at the start, in the middle, at the end (the journal's turn comes in between).
    for ballast in [24 << 20, (24 << 20) - 8192, 14 << 20, 6 << 20, (4 << 20) - 16_384] {
        folder.clear();
        for format in [Format::Raw, Format::Qcow2] {
            let other = folder.file("ballast");
            let fill =
                |other: &File| (0..ballast / 4096).all(|i| std::os::unix::fs::FileExt::write_all_at(other, &[1; 4096], i * 4096).is_ok());
            fill(&other);
            let job = job(std::slice::from_ref(&disk), format, None);
            let error = match Journal::open(folder.file("journal"), &job.identity()) {
                Ok(mut journal) => run(&job, &folder.part(), &mut journal, &Listener::default()).err(),
                // Not even room for the journal's first line.
                Err(e) if e.kind() == std::io::ErrorKind::StorageFull => Some(Error::NoSpace("the journal".into())),
                Err(e) => panic!("{e}"),
            };
            assert!(matches!(error, Some(Error::NoSpace(_))) || ballast < 4 << 20, "{ballast} {format:?}: {error:?}");
            drop(other);
            std::fs::remove_file(folder.path("ballast")).unwrap();
            let outcome = folder.run(&job, &Listener::default()).unwrap();
            assert_eq!(outcome.bytes_read + outcome.resumed_from, 20 << 20);
            folder.clear();
        }
    }
}
