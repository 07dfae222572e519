//! Seeded runs of faults: a disk is right or not there, and the source is as it was.
//!
//! Owns: what a seed means: which faults, how often, when the agent is killed, when the job is cancelled. Never: passes a run of which it does
//! not know how it ended. A crash here costs the test; a run's seed repeats it.
//!
//! `HYPERSDK_TEST_SEED` repeats the runs, `HYPERSDK_TEST_FAULT_SEED` one of them, `HYPERSDK_TEST_FAULT_RUNS` (12) says how many;
//! `tests/run --long` does 300.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};

use super::{CREATE, LEASE, Lane, PROGRESS, REMOVE, SMALL, TREE, Way, lanes, rule, tail};
use crate::harness::faults::{Fault, Release, Rule, Sessions, Trap};
use crate::harness::fleet::{Fleet, Plan};
use crate::harness::{random, seconds, wait_for};

/// A run of faults, as its seed says.
#[derive(Debug)]
struct Run {
    seed: u64,
    way: Way,
    format: &'static str,
    rules: Vec<Rule>,
    sessions: Option<Sessions>,
    /// Where the agent is killed, and for how long it is dead.
    kill: Option<(Trap, Duration)>,
    /// When the job is cancelled.
    cancel: Option<Duration>,
    /// Milliseconds of a snapshot's task.
    task: u64,
}

impl Run {
    fn of(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let random = &mut random;
        let way = *[Way::Ranges, Way::Lease, Way::Hot, Way::Hot].choose(random).unwrap();
        let calls: &[&'static str] = match way {
            Way::Ranges => &["RetrievePropertiesEx", "<Login", "disk1.vmdk"],
            Way::Lease => &["RetrievePropertiesEx", "<Login", "<ExportVm", LEASE, PROGRESS, "<HttpNfcLeaseComplete", "<HttpNfcLeaseAbort"],
            Way::Hot => &[
                "RetrievePropertiesEx",
                "<Login",
                CREATE,
                "info.state",
                TREE,
                "<ExportSnapshot",
                LEASE,
                PROGRESS,
                "<HttpNfcLeaseComplete",
                "<HttpNfcLeaseAbort",
                REMOVE,
            ],
        };
        let bytes = if way == Way::Ranges { "disk1-flat.vmdk" } else { "/fakenfc/" };
        let mut rules = Vec::new();
        for _ in 0..random.random_range(1..=4) {
            let (matches, fault) = if random.random_bool(0.5) {
                (bytes, of_bytes(way, random))
            } else {
                let call = *calls.choose(random).unwrap();
                (call, of_call(call, random))
            };
            // Most pass; some stay until the test ends the storm.
            let times = if random.random_bool(0.1) { usize::MAX } else { random.random_range(1..=6) };
            rules.push(rule(matches, random.random_range(0..4), times, fault));
        }
        let sessions = random.random_bool(0.3).then(|| match random.random_bool(0.5) {
            true => Sessions::Calls(random.random_range(6..40)),
            false => Sessions::Life(Duration::from_millis(random.random_range(300..3000))),
        });
        let at = if random.random_bool(0.4) { bytes } else { calls.choose(random).unwrap() };
        let trap = Trap { matches: at, behind: "", after: random.random_range(0..3), before: random.random_bool(0.5) };
        let dead = Duration::from_millis(random.random_range(0..1500));
        let kill = random.random_bool(0.4).then_some((trap, dead));
        let cancel = random.random_bool(0.1).then(|| Duration::from_millis(random.random_range(100..3000)));
        let format = ["raw", "qcow2", "vmdk", "ova", "vhdx", "vdi", "vhd"].choose(random).unwrap();
        let task = *[0, 50, 400, 1500].choose(random).unwrap();
        Self { seed, way, format, rules, sessions, kill, cancel, task }
    }
}

fn of_bytes(way: Way, random: &mut StdRng) -> Fault {
    let some = random.random_range(1..600_000);
    let moment = Duration::from_millis(random.random_range(50..1500));
    let mut faults = vec![
        Fault::Status(401, None),
        Fault::Status(500, None),
        Fault::Status(503, None),
        Fault::Status(503, Some(1)),
        Fault::Status(429, None),
        Fault::Cut(some),
        Fault::Short(some),
        Fault::Reset,
        Fault::Lost,
        Fault::Hang(moment),
        Fault::Slow(moment),
        Fault::Trickle(moment),
    ];
    faults.extend(if way == Way::Ranges { vec![Fault::Whole, Fault::OtherRange] } else { vec![Fault::Expire, Fault::Status(404, None)] });
    faults.choose(random).unwrap().clone()
}

fn of_call(call: &str, random: &mut StdRng) -> Fault {
    let some = random.random_range(1..400);
    let moment = Duration::from_millis(random.random_range(50..1500));
    let mut faults = vec![
        Fault::Status(500, None),
        Fault::Status(502, None),
        Fault::Status(503, None),
        Fault::Status(503, Some(1)),
        Fault::Soap("NotAuthenticated"),
        Fault::Soap("SystemError"),
        Fault::Cut(some),
        Fault::Short(some),
        Fault::Reset,
        Fault::Lost,
        Fault::Hang(moment),
        Fault::Slow(moment),
    ];
    faults.extend(match call {
        CREATE | REMOVE | "<ExportVm" => vec![Fault::Soap("TaskInProgress"), Fault::Soap("NoPermission"), Fault::Soap("InvalidState")],
        "<ExportSnapshot" => vec![Fault::Soap("InvalidState"), Fault::Soap("FileFault"), Fault::Soap("ManagedObjectNotFound")],
        LEASE => vec![Fault::Rewrite(">ready<", ">error<"), Fault::Rewrite(">ready<", ">initializing<"), Fault::Expire],
        PROGRESS | "<HttpNfcLeaseComplete" => vec![Fault::Expire, Fault::Soap("InvalidState")],
        _ => Vec::new(),
    });
    faults.choose(random).unwrap().clone()
}

/// How a run ended.
#[derive(Debug, Default)]
struct Tally {
    completed: usize,
    failed: usize,
    cancelled: usize,
    killed: usize,
    /// Requests that went wrong.
    met: usize,
}

async fn one_run(lane: &mut Lane<'_>, number: usize, seed: u64, tally: &Mutex<Tally>) {
    let run = Run::of(seed);
    // So that a run that never comes back can be told by the last lines.
    println!("run {number} of seed {} begins in lane {}", run.seed, lane.number);
    lane.double.task_time(Duration::from_millis(run.task)).await;
    let mut rules = run.rules.clone();
    rules.extend(run.way.rules());
    lane.proxy.script(rules);
    if let Some(last) = run.sessions {
        lane.proxy.sessions(last);
    }
    let mut trap = run.kill.map(|(trap, _)| lane.proxy.trap(trap));
    let began = Instant::now();
    let id = lane.export(run.way.vm(), run.format).await;
    let (mut killed, mut cancelled, mut met, mut stormy) = (false, false, 0, true);
    let job = loop {
        if let Some((_, dead)) = run.kill.filter(|_| !killed)
            && let Some(laid) = &mut trap
            && laid.hit(Duration::from_millis(100)).await
        {
            lane.agent.kill();
            killed = true;
            trap.take().unwrap().release(Release::Lost);
            tokio::time::sleep(dead).await;
            lane.agent.start();
        }
        if !cancelled && run.cancel.is_some_and(|at| began.elapsed() > at) {
            lane.client.delete(&format!("/jobs/{id}")).await;
            cancelled = true;
        }
        // The storm is over: what still fails then fails by itself.
        if stormy && began.elapsed() > seconds(12) {
            met = lane.proxy.met();
            lane.proxy.script(run.way.rules());
            stormy = false;
        }
        let job = lane.client.job(&id).await;
        if matches!(job["status"].as_str(), Some("completed" | "failed" | "cancelled")) {
            break job;
        }
        assert!(
            began.elapsed() < seconds(150),
            "run {number} is not over: {run:?}\n{job:#}\n{}\n{}",
            lane.client.log(&id).await,
            tail(lane.agent.home())
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    met = if stormy { lane.proxy.met() } else { met };
    lane.proxy.script(Vec::new());
    let status = job["status"].as_str().unwrap().to_owned();
    let told =
        format!("run {number} of seed {seed}, {status} after {} ms, {met} requests went wrong: {run:?}", began.elapsed().as_millis());
    if status == "completed" {
        lane.is_true(&job, run.format);
    } else {
        assert!(!lane.published(&id), "something was published: {told}\n{job:#}");
        assert!(
            status == "cancelled" && cancelled || job["error"].as_str().is_some_and(|cause| cause.len() > 8),
            "no cause: {told}\n{job:#}"
        );
        let part = lane.agent.home().join("exports").join(format!("{id}.part"));
        wait_for(&format!("the part folder to go: {told}"), seconds(30), async || {
            if part.exists() { Err(part.display().to_string()) } else { Ok(()) }
        })
        .await;
    }
    lane.nothing_left(&told).await;
    println!("{told} {}", job["error"]);
    let mut tally = tally.lock().unwrap();
    tally.met += met;
    tally.killed += usize::from(killed);
    match status.as_str() {
        "completed" => tally.completed += 1,
        "failed" => tally.failed += 1,
        _ => tally.cancelled += 1,
    }
}

/// Whatever goes wrong in whatever order: the disk is right or not there, and the source is as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seeded_faults_make_no_wrong_disk_and_leave_nothing_at_the_source() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap_or_else(|_| panic!("{name} is a number")));
    let seeds: Vec<u64> = match number("HYPERSDK_TEST_FAULT_SEED") {
        Some(seed) => vec![seed],
        None => {
            let mut random = random("seeded faults");
            (0..number("HYPERSDK_TEST_FAULT_RUNS").unwrap_or(12)).map(|_| random.random()).collect()
        }
    };
    let mut fleet = Fleet::start("faults", Plan { agents: seeds.len().min(3), ..Plan::plain() }, |_| {}).await;
    let mut lanes = lanes(&mut fleet, SMALL).await;
    let (began, count) = (Instant::now(), lanes.len());
    let tally = Mutex::new(Tally::default());
    let next = AtomicUsize::new(0);
    join_all(lanes.iter_mut().map(async |lane| {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(seed) = seeds.get(number) else { return };
            one_run(lane, number, *seed, &tally).await;
        }
    }))
    .await;
    let tally = tally.into_inner().unwrap();
    println!("{} runs, {count} side by side, {} s: {tally:?}; 0 wrong disks, nothing left", seeds.len(), began.elapsed().as_secs());
    assert_eq!(tally.completed + tally.failed + tally.cancelled, seeds.len());
    // A machine that is no match for the faults would prove nothing.
    assert!(tally.met > 0 && (seeds.len() < 12 || tally.completed * 2 > seeds.len()), "{tally:?}");
}
