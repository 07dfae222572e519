//! Real libvirt, real guests. They need its daemons and the images named below, so they run when somebody asks for them:
//! `HYPERSDK_GUESTS=DIR cargo test -p hypersdk-agent guest::tests -- --ignored --test-threads 1`.
//! What a user can ask for by REST is tested there, in `tests/`.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1;
use shared::deploy::Wish;
use shared::vault::{self, Dir};

use super::boot::{self, Asked, Proof};
use super::{GuestDisk, Subject, adapt};
use crate::Agent;
use crate::held::Stop;

const MAC: &str = "52:54:00:aa:bb:01";

fn guests() -> PathBuf {
    std::env::var_os("HYPERSDK_GUESTS").map(PathBuf::from).expect("HYPERSDK_GUESTS: a folder with tiny.raw and debian.raw")
}

fn virsh(arguments: &[&str]) -> String {
    let said = Command::new("virsh").args(["-q", "-c", "qemu:///system"]).args(arguments).output().unwrap();
    String::from_utf8(said.stdout).unwrap()
}

/// What of a proof is at libvirt.
fn left() -> Vec<String> {
    let all = virsh(&["list", "--all", "--name"]) + &virsh(&["net-list", "--all", "--name"]);
    all.lines().map(str::trim).filter(|name| name.starts_with("hypersdk-proof-")).map(str::to_owned).collect()
}

struct Bench {
    base: PathBuf,
    agent: Arc<Agent>,
    part: PathBuf,
    folder: Dir,
}

impl Bench {
    fn new() -> Self {
        Self::at(vault::temporary_dir("guest").unwrap())
    }

    fn at(base: PathBuf) -> Self {
        let agent = Arc::new(Agent::open(crate::config::Config::in_folder(&base)).unwrap());
        let part = base.join("exports/job-0000000000000001.part");
        std::fs::create_dir_all(&part).unwrap();
        let folder = agent.vault.open_dir("exports/job-0000000000000001.part").unwrap();
        Self { base, agent, part, folder }
    }

    fn prove(&self, disk: &Path, wish: &Wish, asked: &Asked<'_>, stop_after: Option<Duration>) -> Result<Proof, crate::sources::Error> {
        let (held, _) = self.agent.table.take("job-0000000000000001", self.agent.table.all().len() as u64 + 1).unwrap();
        if let Some(after) = stop_after {
            let held = held.clone();
            std::thread::spawn(move || {
                std::thread::sleep(after);
                held.ask_to_stop(Stop::Discard);
            });
        }
        let format = if disk.extension().is_some_and(|ending| ending == "qcow2") { "qcow2" } else { "raw" };
        let disks = [GuestDisk { path: disk.to_owned(), format, capacity: capacity(disk) }];
        let connection = v1::Connection { name: "kvm".into(), kind: "libvirt".into(), path: "qemu:///system".into(), account: None };
        let subject = Subject { wish, disks: &disks, folder: &self.folder, path: &self.part };
        let proof = boot::prove(&self.agent, &held, &connection, &subject, asked);
        self.agent.table.end(&held, v1::finished::Outcome::Parked(true));
        self.agent.table.forget(&held.job, held.epoch);
        proof
    }

    fn adapt(&self, disk: &Path, stop_after: Option<Duration>) -> Result<adapt::Outcome, crate::sources::Error> {
        let (held, _) = self.agent.table.take("job-0000000000000001", self.agent.table.all().len() as u64 + 1).unwrap();
        if let Some(after) = stop_after {
            let held = held.clone();
            std::thread::spawn(move || {
                std::thread::sleep(after);
                held.ask_to_stop(Stop::Discard);
            });
        }
        let disks = [GuestDisk { path: disk.to_owned(), format: "raw", capacity: capacity(disk) }];
        let wish = wish();
        let subject = Subject { wish: &wish, disks: &disks, folder: &self.folder, path: &self.part };
        let outcome = adapt::adapt(&self.agent, &held, &subject, "scsi", &mut |line| println!("  | {line}"));
        self.agent.table.end(&held, v1::finished::Outcome::Parked(true));
        self.agent.table.forget(&held.job, held.epoch);
        outcome
    }

    fn notes(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.base.join("data/jobs")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".touched")).collect()
    }
}

fn capacity(disk: &Path) -> u64 {
    if disk.extension().is_some_and(|ending| ending == "qcow2") {
        let header = std::fs::read(disk).unwrap();
        return u64::from_be_bytes(header[24..32].try_into().unwrap());
    }
    std::fs::metadata(disk).unwrap().len()
}

fn wish() -> Wish {
    Wish { name: "guest".into(), cpu: 1, memory_mb: 512, mac: Some(MAC.into()), bridge: Some("br0".into()), ..Wish::default() }
}

fn asked(seconds: u64) -> Asked<'static> {
    Asked { sign: None, timeout: Duration::from_secs(seconds), network: false }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs libvirt and guests"]
async fn a_guest_proves_that_it_boots_and_leaves_nothing() {
    let bench = Bench::new();
    let tiny = guests().join("tiny.raw");
    let digest = blake3::hash(&std::fs::read(&tiny).unwrap());

    let proof = bench.prove(&tiny, &wish(), &Asked { sign: Some("TINYGUEST-LOGIN ready"), ..asked(90) }, None).unwrap();
    println!("{}", serde_json::to_string_pretty(&proof).unwrap());
    assert!(proof.passed && proof.cause.is_none() && proof.console_tail.contains("TINYGUEST-DATA"), "{proof:?}");
    let console = std::fs::read_to_string(bench.part.join("console.txt")).unwrap();
    assert!(console.contains("SeaBIOS"), "the beginning is there: {console}");
    let picture = std::fs::read(bench.part.join("boot.png")).unwrap();
    assert!(picture.starts_with(b"\x89PNG"), "{:?}", &picture[..8]);

    // It has no login prompt, and nobody said what else to wait for.
    let proof = bench.prove(&tiny, &wish(), &asked(20), None).unwrap();
    assert!(!proof.passed && proof.cause.as_deref().unwrap().contains("no sign of life within 20 s"), "{proof:?}");

    let zeros = bench.part.join("zeros.raw");
    std::fs::File::create(&zeros).unwrap().set_len(64 << 20).unwrap();
    let proof = bench.prove(&zeros, &wish(), &asked(60), None).unwrap();
    println!("zeros: {:?} after {} s", proof.cause, proof.seconds);
    assert!(!proof.passed && proof.cause.as_deref().unwrap().contains("No bootable device"), "{proof:?}");

    for after in [300, 1500, 4000].map(Duration::from_millis) {
        let began = Instant::now();
        let stopped = bench.prove(&tiny, &wish(), &Asked { network: true, ..asked(90) }, Some(after));
        let took = began.elapsed().saturating_sub(after);
        println!("stopped after {after:?}: gone {took:?} later");
        assert!(stopped.is_err() && took < Duration::from_secs(5), "{stopped:?} {took:?}");
        assert_eq!(left(), Vec::<String>::new());
    }
    assert_eq!(bench.notes(), Vec::<String>::new());
    assert!(!bench.part.join("proof").exists());
    assert_eq!(blake3::hash(&std::fs::read(&tiny).unwrap()), digest, "the disk is as it was");
    std::fs::remove_dir_all(&bench.base).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs libvirt and guests"]
async fn a_guest_without_virtio_fails_its_proof_with_its_own_words() {
    let bench = Bench::new();
    let proof = bench.prove(&guests().join("debian.raw"), &wish(), &asked(240), None).unwrap();
    println!("{}", serde_json::to_string_pretty(&proof).unwrap());
    assert!(!proof.passed && proof.cause.as_deref().unwrap().contains("initramfs"), "{proof:?}");
    assert!(proof.console_tail.contains("ALERT!  UUID="), "{}", proof.console_tail);
    assert_eq!((left(), bench.notes()), (Vec::new(), Vec::new()));
    std::fs::remove_dir_all(&bench.base).unwrap();
}

/// The name of a disk in the folder of guests that is adapted already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs libvirt and guests"]
async fn an_adapted_guest_has_its_address_and_answers() {
    let bench = Bench::new();
    let disk = guests().join(std::env::var("HYPERSDK_ADAPTED").unwrap_or_else(|_| "adapted.qcow2".to_owned()));
    let proof = bench.prove(&disk, &wish(), &Asked { network: true, ..asked(180) }, None).unwrap();
    println!("{}", serde_json::to_string_pretty(&proof).unwrap());
    assert!(proof.passed && proof.pinged && proof.address.as_deref().unwrap().starts_with("10."), "{proof:?}");
    assert!(proof.sign.as_deref().unwrap().contains("migguest login:"), "{proof:?}");
    assert_eq!((left(), bench.notes()), (Vec::new(), Vec::new()));
    std::fs::remove_dir_all(&bench.base).unwrap();
}

/// Runs a proof until somebody kills this process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "is killed by the test below"]
async fn victim() {
    let Some(base) = std::env::var_os("HYPERSDK_VICTIM") else { return };
    let bench = Bench::at(PathBuf::from(base));
    let proof = bench.prove(&guests().join("tiny.raw"), &wish(), &Asked { network: true, ..asked(600) }, None);
    panic!("it was not killed: {proof:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs libvirt and guests"]
async fn kill_9_leaves_what_the_reaper_and_the_next_attempt_remove() {
    for (round, after) in [100, 400, 700, 1000, 1500, 3000, 6000, 400].map(Duration::from_millis).into_iter().enumerate() {
        let base = vault::temporary_dir("guest").unwrap();
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "guest::tests::victim", "--ignored", "--nocapture"])
            .env("HYPERSDK_VICTIM", &base)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(after);
        victim.kill().unwrap();
        victim.wait().unwrap();
        let stood = left();
        let bench = Bench::at(base);
        let noted = bench.notes();
        if round % 2 == 0 {
            crate::touched::reap(&bench.agent);
        } else {
            bench.prove(&guests().join("tiny.raw"), &wish(), &asked(1), None).unwrap();
            assert!(!bench.part.join("proof").exists());
        }
        println!("killed after {after:?}: stood {stood:?}, noted {noted:?}");
        assert_eq!((left(), bench.notes()), (Vec::new(), Vec::new()), "killed after {after:?}");
        std::fs::remove_dir_all(&bench.base).unwrap();
    }
}

/// Processes that name the folder.
fn working_on(folder: &Path) -> Vec<String> {
    let all = Command::new("ps").args(["-eo", "pid,args"]).output().unwrap();
    let all = String::from_utf8_lossy(&all.stdout).into_owned();
    all.lines().filter(|line| line.contains(folder.to_str().unwrap())).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs libvirt, virt-v2v and guests; ten minutes"]
async fn a_guest_without_virtio_is_adapted_boots_and_has_its_network() {
    let bench = Bench::new();
    let disk = bench.part.join("disk-0.raw");
    std::fs::copy(guests().join("debian.raw"), &disk).unwrap();
    let digest = blake3::hash(&std::fs::read(&disk).unwrap());
    let began = Instant::now();
    let outcome = bench.adapt(&disk, None).unwrap();
    println!("adapted in {:?}: {outcome:?}", began.elapsed());
    let adapt::Outcome::Adapted(done) = outcome else { panic!("{outcome:?}") };
    assert_eq!(done.pinned, [format!("ens192 {MAC}")]);
    assert_eq!((done.virtio, done.disks.len()), (Some(true), 1));
    assert_eq!(blake3::hash(&std::fs::read(&disk).unwrap()), digest, "the verified disk is as it was");
    assert!(!bench.part.join("adapt").exists() && working_on(&bench.base).is_empty(), "{:?}", working_on(&bench.base));
    let proof = bench.prove(&done.disks[0].path, &wish(), &Asked { network: true, ..asked(240) }, None).unwrap();
    println!("{}", serde_json::to_string_pretty(&proof).unwrap());
    assert!(proof.passed && proof.pinged, "{proof:?}");
    std::fs::remove_dir_all(&bench.base).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs virt-v2v and guests; minutes"]
async fn what_cannot_be_adapted_says_so_and_a_stop_leaves_nothing() {
    let bench = Bench::new();
    let zeros = bench.part.join("disk-0.raw");
    std::fs::File::create(&zeros).unwrap().set_len(64 << 20).unwrap();
    let outcome = bench.adapt(&zeros, None).unwrap();
    println!("zeros: {outcome:?}");
    assert!(matches!(outcome, adapt::Outcome::NotRecognised(_)), "{outcome:?}");
    let outcome = bench.adapt(&guests().join("tiny.raw"), None).unwrap();
    println!("tiny: {outcome:?}");
    assert!(matches!(outcome, adapt::Outcome::NotRecognised(_)), "{outcome:?}");
    for after in [2, 12, 45].map(Duration::from_secs) {
        let began = Instant::now();
        let stopped = bench.adapt(&guests().join("debian.raw"), Some(after));
        let took = began.elapsed().saturating_sub(after);
        println!("stopped after {after:?}: gone {took:?} later");
        assert!(stopped.is_err() && took < Duration::from_secs(1), "{stopped:?} {took:?}");
        assert!(working_on(&bench.base).is_empty(), "{:?}", working_on(&bench.base));
    }
    let names: Vec<_> = std::fs::read_dir(&bench.part).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["disk-0.raw"]);
    std::fs::remove_dir_all(&bench.base).unwrap();
}

/// Adapts a guest until somebody kills this process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "is killed by the test below"]
async fn adapted_victim() {
    let Some(base) = std::env::var_os("HYPERSDK_VICTIM") else { return };
    let bench = Bench::at(PathBuf::from(base));
    let outcome = bench.adapt(&guests().join("debian.raw"), None);
    panic!("it was not killed: {outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs virt-v2v and guests; two minutes"]
async fn kill_9_leaves_no_tool_and_no_child_of_one() {
    for after in [5, 30, 60].map(Duration::from_secs) {
        let base = vault::temporary_dir("guest").unwrap();
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "guest::tests::adapted_victim", "--ignored", "--nocapture"])
            .env("HYPERSDK_VICTIM", &base)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(after);
        let stood = working_on(&base);
        victim.kill().unwrap();
        victim.wait().unwrap();
        let killed = Instant::now();
        while !working_on(&base).is_empty() {
            assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", working_on(&base));
            std::thread::sleep(Duration::from_millis(20));
        }
        println!("killed after {after:?}: {} processes stood, all gone {:?} later", stood.len(), killed.elapsed());
        assert!(!stood.is_empty());
        std::fs::remove_dir_all(&base).unwrap();
    }
}
