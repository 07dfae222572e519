//! What an export leaves at a vCenter: nothing, wherever its agent is killed and whatever goes wrong in between.
//!
//! Owns: kill -9 at every step of the ledger, and that a copy goes on inside the disk; the storm's room, seeded faults.
//! Never: knows how the product keeps its ledger: it asks the double. A crash here costs the test.

mod storm;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::harness::client::{Client, file_of};
use crate::harness::double::{self, Double, Kind, USER};
use crate::harness::faults::{Fault, Faults, Release, Rule, Trap};
use crate::harness::fleet::{Fleet, Plan, Service};
use crate::harness::images::{identical, pattern, untar};
use crate::harness::{Scratch, seconds, wait_for};

const MIB: u64 = 1 << 20;
/// The disk: small, because it is copied some hundred times.
const DISK: u64 = 12 * MIB;
/// Bytes of a disk, and where data lies in it.
type Content = (u64, &'static [(u64, u64)]);
const SMALL: Content = (DISK, &[(0, 3 * MIB), (DISK / 2, 2 * MIB), (DISK - MIB, MIB)]);
/// One that takes a while, of data only.
const LONG: Content = (160 * MIB, &[(0, 160 * MIB)]);
/// What may be done again after a kill, as `survival` has it, and what was asked for ahead of a reader.
const AGAIN: u64 = (64 + 18) * MIB;
/// The VM that is off, and the one that is on.
const OFF: &str = "DC0_H0_VM0";
const ON: &str = "DC0_H0_VM1";

/// An agent with a vCenter and a fault proxy of its own.
struct Lane<'a> {
    number: usize,
    client: Client,
    agent: &'a mut Service,
    double: Double,
    proxy: Faults,
    /// The disk as it lies on the datastore.
    datastore: PathBuf,
    scratch: Scratch,
}

impl<'a> Lane<'a> {
    async fn new(number: usize, client: Client, agent: &'a mut Service, id: &str, (capacity, areas): Content) -> Self {
        let scratch = Scratch::new(&format!("no-trace-{number}"));
        let image = scratch.join("disk.raw");
        pattern(&image, capacity, areas, 7 + number as u64);
        // Orphans end soon, and what a real server needs time for needs some.
        let double = Double::start_with(&scratch, Kind::Vcenter, &image, &["-lease", "4s", "-task", "150ms"]).await;
        let proxy = Faults::before(&double.host).await;
        let datastore = double.disk(Kind::Vcenter, &scratch);
        let wish = json!({
            "provider": "vsphere", "name": format!("vc{number}"), "host": proxy.host, "username": USER, "password": double::PASSWORD,
            "fingerprint": proxy.fingerprint, "agent": id,
        });
        client.post("/providers/connect", wish).await.expect(201);
        Self { number, client, agent, double, proxy, datastore, scratch }
    }

    async fn export(&self, vm: &str, format: &str) -> String {
        let provider = format!("vc{}", self.number);
        self.client.create_job(json!({"type": "export", "provider": provider, "vm_name": vm, "format": format})).await
    }

    fn is_true(&self, job: &Value, format: &str) {
        let mut file = file_of(job, &format!(".{format}"));
        let mut kind = format;
        if format == "ova" {
            let unpacked = self.scratch.dir(&format!("unpacked-{}", job["id"].as_str().unwrap()));
            let members = untar(&file, &unpacked);
            (file, kind) = (unpacked.join(members.iter().find(|name| name.ends_with(".vmdk")).expect("a disk in the OVA")), "vmdk");
        }
        let kind = if kind == "vhd" { "vpc" } else { kind };
        identical(("raw", &self.datastore), (kind, &file));
    }

    /// Nothing is left at the source: the reaper comes by every ten seconds.
    async fn nothing_left(&self, what: &str) {
        wait_for(&format!("nothing to be left at the source: {what}"), seconds(60), async || {
            let left = self.double.left().await;
            if left == (0, 0) { Ok(()) } else { Err(format!("leases and snapshots: {left:?}\n{}", tail(self.agent.home()))) }
        })
        .await;
    }

    fn published(&self, id: &str) -> bool {
        self.agent.home().join("exports").join(id).exists()
    }
}

/// The last words of an agent.
fn tail(home: &Path) -> String {
    let name = format!("{}.log", home.file_name().unwrap().to_string_lossy());
    let text = std::fs::read_to_string(home.join(name)).unwrap_or_default();
    let lines: Vec<_> = text.lines().rev().take(12).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

/// Lanes over the agents of a fleet, one each.
async fn lanes(fleet: &mut Fleet, content: Content) -> Vec<Lane<'_>> {
    let listed = fleet.client.get("/agents").await.expect(200).body;
    let client = fleet.client.clone();
    let mut lanes = Vec::new();
    for (number, agent) in fleet.agents.iter_mut().enumerate() {
        let name = format!("agent-{number}");
        let row = listed["data"].as_array().unwrap().iter().find(|row| row["name"] == *name).expect("the agent is listed");
        lanes.push(Lane::new(number, client.clone(), agent, row["id"].as_str().unwrap(), content).await);
    }
    lanes
}

fn rule(matches: &'static str, after: usize, times: usize, fault: Fault) -> Rule {
    Rule { matches, after, times, fault }
}

/// How a VM's disks are read, and what leads there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Ranges,
    Lease,
    Hot,
}

impl Way {
    fn vm(self) -> &'static str {
        if self == Way::Hot { ON } else { OFF }
    }

    fn rules(self) -> Vec<Rule> {
        // Where no ranges are given, a VM that is off goes by a lease.
        if self == Way::Lease { vec![rule("/folder/", 0, usize::MAX, Fault::Status(404, None))] } else { Vec::new() }
    }
}

/// What becomes of the job whose agent was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// The agent comes back and finishes it.
    Finished,
    /// It is cancelled while the agent is dead.
    Cancelled,
    /// It has ended before the agent comes back, which never hears of it again.
    GivenUp,
    /// The held request reaches the server after all, when the next process has long looked for what it makes.
    Late,
}

/// One kill -9.
#[derive(Clone, Copy, Debug)]
struct Kill {
    way: Way,
    trap: Trap,
    then: Then,
    /// How long a snapshot's task takes, milliseconds.
    task: u64,
}

const TREE: &str = "<type>VirtualMachine</type><pathSet>snapshot</pathSet></propSet>";
const LEASE: &str = "<type>HttpNfcLease</type>";
const PROGRESS: &str = "<HttpNfcLeaseProgress";
const CREATE: &str = "<CreateSnapshot_Task";
const REMOVE: &str = "<RemoveSnapshot_Task";

fn kills() -> Vec<Kill> {
    // What is asked of the server, in order: the request, and the one that it comes behind.
    let taken = [(LEASE, ""), ("/fakenfc/", ""), (PROGRESS, ""), ("<HttpNfcLeaseComplete", ""), ("<HttpNfcLeaseAbort", "")];
    let before = [(CREATE, ""), ("info.state", CREATE), (TREE, CREATE), ("<ExportSnapshot", "")];
    let behind = [(REMOVE, ""), ("info.state", REMOVE), (TREE, REMOVE)];
    let hot = before.iter().chain(&taken).chain(&behind).map(|step| (Way::Hot, *step));
    let off = std::iter::once(&("<ExportVm", "")).chain(&taken).map(|step| (Way::Lease, *step));
    let ranges = [("disk1.vmdk", ""), ("disk1-flat.vmdk", "")].into_iter().map(|step| (Way::Ranges, step));
    let mut kills = Vec::new();
    for (way, (matches, after)) in hot.chain(off).chain(ranges) {
        for before in [true, false] {
            let trap = Trap { matches, behind: after, after: 0, before };
            kills.push(Kill { way, trap, then: Then::Finished, task: 150 });
        }
    }
    let at = |way, matches, before| (way, Trap { matches, behind: "", after: 0, before });
    for (way, trap) in [
        at(Way::Hot, CREATE, false),
        at(Way::Hot, "<ExportSnapshot", false),
        at(Way::Hot, "/fakenfc/", false),
        at(Way::Hot, REMOVE, true),
        at(Way::Lease, "<ExportVm", false),
        at(Way::Ranges, "disk1-flat.vmdk", true),
    ] {
        kills.push(Kill { way, trap, then: Then::Cancelled, task: 150 });
    }
    // A server that is still at it when the next process looks.
    for (matches, task) in [(CREATE, 2500), (REMOVE, 2500)] {
        let (way, trap) = at(Way::Hot, matches, false);
        kills.push(Kill { way, trap, then: Then::Finished, task });
        kills.push(Kill { way, trap, then: Then::Cancelled, task });
    }
    let (way, trap) = at(Way::Hot, CREATE, true);
    kills.push(Kill { way, trap, then: Then::Late, task: 150 });
    kills
}

async fn killed(lane: &mut Lane<'_>, kill: Kill) {
    let what = format!("{kill:?}");
    lane.double.task_time(Duration::from_millis(kill.task)).await;
    let mut rules = kill.way.rules();
    if kill.trap.matches == PROGRESS {
        // The lease must be kept for a while before there is progress to tell.
        rules.push(rule("/fakenfc/", 0, 1, Fault::Slow(seconds(3))));
    }
    lane.proxy.script(rules);
    let mut trap = lane.proxy.trap(kill.trap);
    let id = lane.export(kill.way.vm(), "raw").await;
    if !trap.hit(seconds(30)).await {
        panic!("{what}: no such request came: {}\n{}", lane.client.job(&id).await, lane.client.log(&id).await);
    }
    lane.agent.kill();
    if matches!(kill.then, Then::Cancelled | Then::GivenUp) {
        let answer = lane.client.delete(&format!("/jobs/{id}")).await;
        // What was published before the kill cannot be cancelled any more.
        assert!(matches!(answer.status, 202 | 409), "{what}: {}", answer.text);
    }
    if kill.then == Then::GivenUp {
        let job = lane.client.ended(&id, seconds(90)).await;
        assert_eq!(job["status"], "cancelled", "{what}: {job:#}");
    }
    trap.release(Release::Lost);
    lane.agent.start();
    match kill.then {
        Then::Finished | Then::Late => {
            let job = lane.client.completed(&id, seconds(90)).await;
            lane.is_true(&job, "raw");
        }
        Then::Cancelled => {
            let job = lane.client.ended(&id, seconds(60)).await;
            let published = lane.published(&id);
            assert!(job["status"] == "cancelled" && !published || job["status"] == "completed" && published, "{what}: {job:#}");
        }
        Then::GivenUp => {}
    }
    lane.nothing_left(&what).await;
}

async fn late(lane: &mut Lane<'_>, kill: Kill) {
    lane.double.task_time(Duration::from_millis(kill.task)).await;
    lane.proxy.script(Vec::new());
    let mut trap = lane.proxy.trap(kill.trap);
    let id = lane.export(kill.way.vm(), "raw").await;
    assert!(trap.hit(seconds(30)).await, "no snapshot was asked for");
    lane.agent.kill();
    lane.agent.start();
    let job = lane.client.completed(&id, seconds(90)).await;
    lane.is_true(&job, "raw");
    lane.nothing_left("before the late request").await;
    trap.release(Release::GoesOn);
    wait_for("the late request to make a snapshot", seconds(10), async || {
        let left = lane.double.left().await;
        if left.1 == 1 { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    lane.nothing_left("a request that came late").await;
}

/// What a dead attempt has left cannot be removed when the next one begins: that one makes its own, and forgets neither.
async fn stubborn(lane: &mut Lane<'_>) {
    lane.double.task_time(Duration::from_millis(150)).await;
    lane.proxy.script(Vec::new());
    let mut trap = lane.proxy.trap(Trap { matches: "<ExportSnapshot", behind: "", after: 0, before: true });
    let id = lane.export(ON, "raw").await;
    assert!(trap.hit(seconds(30)).await, "no lease was asked for");
    lane.agent.kill();
    trap.release(Release::Lost);
    // Longer than the next attempt tries before it begins.
    lane.proxy.script(vec![rule(REMOVE, 0, usize::MAX, Fault::Status(503, None)), rule("/fakenfc/", 0, 1, Fault::Slow(seconds(2)))]);
    lane.agent.start();
    wait_for("a second snapshot beside the first", seconds(60), async || {
        let left = lane.double.left().await;
        if left.1 == 2 { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    lane.proxy.script(Vec::new());
    let job = lane.client.completed(&id, seconds(90)).await;
    lane.is_true(&job, "raw");
    lane.nothing_left("two attempts' snapshots").await;
}

/// Before and after every request of an export that the ledger is about, the agent is killed: the next process finishes the job, byte for
/// byte, and neither a lease nor a snapshot is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_at_every_step_of_the_ledger_leaves_nothing_at_the_source() {
    let mut fleet = Fleet::start("no-trace", Plan { agents: 3, ..Plan::plain() }, |_| {}).await;
    let mut lanes = lanes(&mut fleet, SMALL).await;
    let count = lanes.len();
    let began = Instant::now();
    let mut kills = kills();
    // The one that waits long goes by itself in the last lane.
    let (way, trap) = (Way::Hot, Trap { matches: CREATE, behind: "", after: 0, before: false });
    kills.insert(0, Kill { way, trap, then: Then::GivenUp, task: 150 });
    let queue = std::sync::Mutex::new(std::collections::VecDeque::from(kills.clone()));
    let work = lanes.iter_mut().map(async |lane| {
        let mut done = 0;
        loop {
            let Some(kill) = queue.lock().unwrap().pop_front() else { return done };
            match kill.then {
                Then::Late => late(lane, kill).await,
                _ => killed(lane, kill).await,
            }
            done += 1;
        }
    });
    let done: usize = join_all(work).await.into_iter().sum();
    assert_eq!(done, kills.len());
    stubborn(&mut lanes[0]).await;
    println!("{done} kills at the steps of the ledger, {count} agents side by side: {} s, nothing left", began.elapsed().as_secs());
}

fn bytes(job: &Value, field: &str) -> u64 {
    job[field].as_u64().unwrap_or_default()
}

/// An agent that is killed in the middle of a disk goes on inside it, by ranges and by a lease; a stream that is cut costs no block twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_export_goes_on_inside_the_disk() {
    let mut fleet = Fleet::start("goes-on", Plan::plain(), |_| {}).await;
    let mut lanes = lanes(&mut fleet, LONG).await;
    let lane = &mut lanes[0];
    for (way, format) in [(Way::Ranges, "raw"), (Way::Lease, "qcow2")] {
        lane.proxy.script(way.rules());
        let wish = json!({
            "type": "export", "provider": "vc0", "vm_name": OFF, "format": format, "options": {"bandwidth_limit": 48 * MIB},
        });
        let id = lane.client.create_job(wish).await;
        let before = wait_for("more than half of the disk to be safe", seconds(60), async || {
            let job = lane.client.try_get(&format!("/jobs/{id}")).await?;
            if bytes(&job, "bytes_done") > LONG.0 / 2 { Ok(job) } else { Err(job["bytes_done"].to_string()) }
        })
        .await;
        assert_eq!((&before["status"], &before["attempt"]), (&json!("running"), &json!(1)), "{before:#}");
        let safe = bytes(&before, "bytes_done");
        lane.agent.kill();
        let first = lane.proxy.asked();
        lane.proxy.script(way.rules());
        lane.agent.start();
        let job = lane.client.completed(&id, seconds(90)).await;
        let (resumed, read, second) = (bytes(&job, "bytes_resumed"), bytes(&job, "bytes_read"), lane.proxy.asked());
        assert_eq!(job["attempt"], 2, "{job:#}");
        assert!(resumed >= safe && resumed + read == LONG.0, "{safe} bytes were safe, {resumed} were found, {read} read: {job:#}");
        lane.is_true(&job, format);
        if way == Way::Ranges {
            let again = (first + second).saturating_sub(LONG.0);
            assert!(first > safe && again <= AGAIN, "{first} bytes were asked for, then {second}, of {}", LONG.0);
            println!("by ranges: {} MiB asked for again after a kill at {} MiB", again / MIB, safe / MIB);
        } else {
            println!("by a lease: {} MiB of {} found again after a kill at {} MiB", resumed / MIB, LONG.0 / MIB, safe / MIB);
        }
        lane.nothing_left("goes on").await;
    }
    // Cut twice in the middle of the disk.
    for way in [Way::Lease, Way::Hot] {
        let mut rules = way.rules();
        rules.push(rule("/fakenfc/", 0, 2, Fault::Cut(40 << 20)));
        lane.proxy.script(rules);
        let id = lane.export(way.vm(), "raw").await;
        let job = lane.client.completed(&id, seconds(90)).await;
        assert!(lane.proxy.met() >= 2, "nothing was cut");
        let counters = (&job["attempt"], bytes(&job, "bytes_read"), bytes(&job, "bytes_resumed"));
        assert_eq!(counters, (&json!(1), LONG.0, 0), "{job:#}");
        lane.is_true(&job, "raw");
        lane.nothing_left("cut").await;
    }
}
