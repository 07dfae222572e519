//! What the parsers of foreign images must refuse, as one table: each case with the kind and the words of its own error.
//!
//! A `#[cfg(test)]` module, so it may open files and start processes.
//!
//! Owns: the runner (a child process a table, so that the limits bite), the small builders' [`Image`], the replay of the fuzz corpus.
//! Never: needs qemu, a network or a file of its own: images live in memfds. A crash here is the finding that it looks for.
//!
//! The limits are the promise's: an error inside a second, without a panic, with less than 64 MiB. The memory limit is `RLIMIT_DATA`, set
//! anew before each case to what the child has plus 64 MiB: it counts reserved memory, too, so `vec![0; huge]` is caught though nobody
//! touches it (a resident-set peak would not show that). An allocation over it aborts the child, and the case's name is the last it said.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod bounded;
mod descriptor;
#[path = "../../../../tests/fuzz/src/entry.rs"]
mod entry;
mod manifest;
mod ova;
mod ovf;
mod qcow2;
mod raw_and_sniff;
mod stream;
mod vmdk;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::disk::{Disk, Extent, FormatError, Scratch, Window};
use super::{ova as ova_format, qcow2 as qcow2_format, sniff, vmdk as vmdk_format};

/// Which table a child runs.
const TABLE: &str = "HYPERSDK_REFUSED_TABLE";
/// Most that one case may allocate.
const MEMORY: u64 = 64 << 20;
/// Longest that one case may take.
const TIME: Duration = Duration::from_secs(1);
/// Most bytes of one disk that are read.
const READ: u64 = 16 << 20;

/// Bytes of a file as pieces at offsets: later ones lie over earlier ones, what none covers is a hole.
#[derive(Clone, Default)]
struct Image {
    parts: Vec<(u64, Vec<u8>)>,
    len: u64,
}

impl Image {
    fn of(bytes: impl AsRef<[u8]>) -> Self {
        Self::default().put(0, bytes)
    }

    /// Writes these bytes at `at`.
    fn put(mut self, at: u64, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref().to_vec();
        self.len = self.len.max(at + bytes.len() as u64);
        self.parts.push((at, bytes));
        self
    }

    /// Cuts the file off, or lengthens it by a hole.
    fn cut(mut self, len: u64) -> Self {
        self.len = len;
        self
    }

    fn window(&self) -> Window {
        let file = memory_file();
        for (at, bytes) in &self.parts {
            file.write_all_at(bytes, *at).unwrap();
        }
        file.set_len(self.len).unwrap();
        Window::whole(file).unwrap()
    }
}

fn memory_file() -> File {
    File::from(rustix::fs::memfd_create("refused", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
}

/// What is given to which parser.
#[derive(Clone)]
enum Input {
    /// The file that is opened, and those beside it.
    Vmdk(Image, Vec<(&'static str, Image)>),
    Qcow2(Image),
    /// Any other disk, by the function that opens it.
    Disk(fn(Window) -> Result<Box<dyn Disk>, FormatError>, Image),
    /// Opened, and its manifest checked.
    Ova(Image),
    /// A description and the files beside it, opened as `a.ovf`, and its manifest checked.
    Folder(Image, Vec<(&'static str, Image)>),
    Ovf(Vec<u8>),
    Manifest(Vec<u8>),
    /// Sniffed; something that is known and not read counts as an error, with its own sentence.
    Sniff(Image),
    /// Not a parser: allocates this many bytes and does not touch them. For the runner's own test.
    Allocates(usize),
    /// Not a parser: panics, or takes more than a second.
    Panics,
    Sleeps,
}

/// What has to come of it.
#[derive(Clone, PartialEq, Debug)]
enum Expected {
    /// Opens and reads, as these bytes where they are given.
    Good(Option<Vec<u8>>),
    /// [`FormatError::Refused`] with these words.
    Refused(&'static str),
    /// [`FormatError::Corrupt`] with these words.
    Damaged(&'static str),
    /// [`FormatError::Unsupported`] with these words.
    Unbuilt(&'static str),
    /// [`FormatError::Io`] with these words.
    Io(&'static str),
}
use Expected::{Damaged, Good, Io, Refused, Unbuilt};

struct Case {
    name: &'static str,
    input: Input,
    expected: Expected,
}

fn case(name: &'static str, input: Input, expected: Expected) -> Case {
    Case { name, input, expected }
}

fn table(name: &str) -> Vec<Case> {
    match name {
        "vmdk" => vmdk::cases(),
        "stream" => stream::cases(),
        "descriptor" => descriptor::cases(),
        "qcow2" => qcow2::cases(),
        "ova" => ova::cases(),
        "ovf" => ovf::cases(),
        "manifest" => manifest::cases(),
        "raw_and_sniff" => raw_and_sniff::cases(),
        "bounded" => bounded::cases(),
        "bomb" => vec![case("the bomb", Input::Allocates(256 << 20), Good(None))],
        "panic" => vec![case("the panic", Input::Panics, Good(None))],
        "slow" => vec![case("the slow one", Input::Sleeps, Good(None))],
        other => panic!("no table {other}"),
    }
}

/// Opens what the case gives and reads all of it.
fn run(input: &Input) -> Result<Option<Vec<u8>>, FormatError> {
    let open = |beside: &[(&str, Image)], name: &str| {
        assert!(!name.contains(['/', '\\']) && name != "..", "the parser asked for {name:?}");
        let found = beside.iter().find(|(known, _)| *known == name).map(|(_, image)| image.window());
        found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{name} is not there")))
    };
    match input {
        Input::Vmdk(main, beside) => read_all(&vmdk_format::open(main.window(), &|name| open(beside, name))?),
        Input::Folder(ovf, beside) => {
            ova_format::open_folder("a.ovf", &ovf.window(), &|name| open(beside, name))?.check_manifest(&mut |_| Ok(()))?;
            Ok(None)
        }
        Input::Qcow2(image) => read_all(&qcow2_format::Reader::open(image.window())?),
        Input::Disk(open, image) => read_all(&*open(image.window())?),
        Input::Ova(image) => {
            ova_format::open(&image.window())?.check_manifest(&mut |_| Ok(()))?;
            Ok(None)
        }
        Input::Ovf(text) => ova_format::parse(text).map(|_| None),
        Input::Manifest(text) => ova_format::mf::parse(text).map(|_| None),
        Input::Sniff(image) => match sniff::sniff(&image.window())? {
            kind @ sniff::Kind::Other(_) => Err(FormatError::Unsupported(kind.describe())),
            _ => Ok(None),
        },
        Input::Allocates(len) => {
            assert!(std::hint::black_box(vec![0u8; *len]).len() == *len);
            Ok(None)
        }
        Input::Panics => panic!("as it should"),
        Input::Sleeps => {
            std::thread::sleep(TIME * 6 / 5);
            Ok(None)
        }
    }
}

/// Reads every extent (at most [`READ`] bytes), and gives back the whole disk where it is that small.
fn read_all(disk: &dyn Disk) -> Result<Option<Vec<u8>>, FormatError> {
    let mut scratch = Scratch::default();
    let mut left = READ;
    let mut whole = (disk.capacity() <= READ).then(|| vec![0u8; disk.capacity() as usize]);
    let mut buf = vec![0u8; 1 << 20];
    for Extent { offset, len } in disk.extents(0, u64::MAX)? {
        let end = offset + len.min(left);
        for at in (offset..end).step_by(buf.len()) {
            let piece = &mut buf[..((end - at) as usize).min(1 << 20)];
            disk.read_at(at, piece, &mut scratch)?;
            if let Some(whole) = &mut whole {
                whole[at as usize..at as usize + piece.len()].copy_from_slice(piece);
            }
        }
        left -= len.min(left);
    }
    Ok(whole)
}

/// What is wrong with this answer; `None` when it is the expected one.
fn judge(expected: &Expected, found: &Result<Option<Vec<u8>>, FormatError>) -> Option<String> {
    let error = match (expected, found) {
        (Good(None), Ok(_)) => return None,
        (Good(Some(bytes)), Ok(Some(read))) => return (bytes != read).then(|| "reads as other bytes".to_owned()),
        (Good(Some(_)), Ok(None)) => return Some("is too large to compare".to_owned()),
        (_, Ok(_)) => return Some("was accepted".to_owned()),
        (_, Err(error)) => error,
    };
    let right = match (expected, error) {
        (Refused(words), FormatError::Refused { .. })
        | (Damaged(words), FormatError::Corrupt { .. })
        | (Unbuilt(words), FormatError::Unsupported(_))
        | (Io(words), FormatError::Io(_)) => error.to_string().contains(words),
        _ => false,
    };
    (!right).then(|| format!("expected {expected:?}, got {error:?} ({error})"))
}

/// A number of kB from `/proc/self/status`, in bytes.
fn status(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().unwrap() << 10
}

/// Runs one table inside this process, when it was started for that: see [`start`].
#[test]
fn child() {
    let Ok(name) = std::env::var(TABLE) else { return };
    let cases = table(&name);
    // Whoever never comes back is ended by the kernel.
    setrlimit(Resource::Cpu, Rlimit { current: Some(60), maximum: Some(60) }).unwrap();
    let hard = getrlimit(Resource::Data).maximum;
    let (mut failures, mut texts) = (Vec::new(), Vec::new());
    let (mut slowest, mut largest) = (Duration::ZERO, 0);
    for Case { name, input, expected } in &cases {
        println!("\n@case {name}");
        // The peak of the resident set starts anew.
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = status("VmRSS:");
        setrlimit(Resource::Data, Rlimit { current: Some(status("VmData:") + MEMORY), maximum: hard }).unwrap();
        let attempt = || {
            let started = Instant::now();
            (catch_unwind(AssertUnwindSafe(|| run(input))), started.elapsed())
        };
        // On a busy machine anything may be slow once; what is slow three times is slow.
        let (mut found, mut took) = attempt();
        for _ in 0..2 {
            if took > TIME {
                (found, took) = attempt();
            }
        }
        setrlimit(Resource::Data, Rlimit { current: hard, maximum: hard }).unwrap();
        largest = largest.max(status("VmHWM:").saturating_sub(before));
        slowest = slowest.max(took);
        if took > TIME {
            failures.push(format!("{name} took {took:?}"));
        }
        let Ok(found) = found else {
            failures.push(format!("{name} panicked"));
            continue;
        };
        failures.extend(judge(expected, &found).map(|wrong| format!("{name} {wrong}")));
        if let Err(error) = found {
            texts.push((error.to_string(), *name));
        }
    }
    texts.sort_unstable();
    for pair in texts.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
        failures.push(format!("{} and {} have the same text: {}", pair[0].1, pair[1].1, pair[0].0));
    }
    for failure in &failures {
        println!("\n@failed {failure}");
    }
    println!("\n@done {} {} {} {}", cases.len(), texts.len(), slowest.as_millis(), largest >> 10);
}

/// Runs a table in a child. Allocations go straight to the kernel, so that what one case freed does not feed the next.
fn start(table: &str) -> Output {
    let (_, module) = module_path!().split_once("::").unwrap();
    Command::new(std::env::current_exe().unwrap())
        .args([&format!("{module}::child"), "--exact", "--nocapture", "--test-threads=1"])
        .env(TABLE, table)
        // A backtrace under the limit runs out of memory inside its own lock and never ends.
        .env("RUST_BACKTRACE", "0")
        .env("MALLOC_ARENA_MAX", "1")
        .env("MALLOC_MMAP_THRESHOLD_", "131072")
        .env("MALLOC_TRIM_THRESHOLD_", "131072")
        .output()
        .unwrap()
}

/// Runs a table in a child and gives back (cases, refusals among them); anything wrong fails the test.
fn check(name: &str, least: usize) {
    let output = start(name);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let last = text.lines().rev().find_map(|line| line.strip_prefix("@case ")).unwrap_or("none");
    let noise = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{name}: the child ended with {} at {last:?}: {noise}", output.status);
    let failures: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("@failed ")).collect();
    assert!(failures.is_empty(), "{name}: {} failed:\n{}", failures.len(), failures.join("\n"));
    let done = text.lines().find_map(|line| line.strip_prefix("@done ")).expect("the child says how many it ran");
    let figures: Vec<usize> = done.split(' ').map(|figure| figure.parse().unwrap()).collect();
    let [cases, refused, millis, kib] = figures[..] else { panic!("{done}") };
    println!("{name}: {cases} cases, {refused} refused, slowest {millis} ms, largest {kib} KiB resident");
    assert!(refused >= least, "{name} has {refused} refusals, {least} would be right");
}

#[test]
fn hosted_vmdks() {
    check("vmdk", 60);
}

#[test]
fn vmdk_streams() {
    check("stream", 40);
}

#[test]
fn vmdk_descriptors() {
    check("descriptor", 57);
}

#[test]
fn qcow2_images() {
    check("qcow2", 103);
}

#[test]
fn archives() {
    check("ova", 66);
}

#[test]
fn ovf_descriptions() {
    check("ovf", 55);
}

#[test]
fn manifests() {
    check("manifest", 13);
}

#[test]
fn other_formats() {
    check("raw_and_sniff", 18);
}

#[test]
fn what_is_large_and_allowed_stays_inside_the_limits() {
    check("bounded", 0);
}

#[test]
fn the_limits_themselves_bite() {
    let bomb = start("bomb");
    assert_eq!(bomb.status.signal(), Some(6), "256 MiB were allocated: {}", String::from_utf8_lossy(&bomb.stdout));
    assert!(String::from_utf8_lossy(&bomb.stdout).contains("@case the bomb"));
    for (table, words) in [("panic", "@failed the panic panicked"), ("slow", "@failed the slow one took 1.2")] {
        let output = start(table);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains(words), "{table}: {text}");
    }
}

/// Every input that the fuzzers kept, seeds and crashes, through the same entry functions.
#[test]
fn replay() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus");
    let mut inputs = 0;
    for (target, enter) in entry::TARGETS {
        let folder = root.join(target);
        let files = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        for file in files {
            let path = file.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            let started = Instant::now();
            let ended = catch_unwind(|| enter(&bytes));
            assert!(ended.is_ok(), "{} panicked", path.display());
            // Microseconds in truth; the machine may be busy.
            assert!(started.elapsed() < TIME * 5, "{} took {:?}", path.display(), started.elapsed());
            inputs += 1;
        }
    }
    println!("replay: {inputs} inputs of {} targets", entry::TARGETS.len());
    assert!(inputs >= entry::TARGETS.len());
}
