//! kill -9 of the agent, of the controller and of `hypersdk up`, at random moments of copies held to 64 MB/s.
//!
//! Owns: the promise that a kill loses no job, changes no byte and costs one checkpoint. Each kill counts only when it is proven to have hit:
//! just before it a job was copying, verifying or publishing, and that job's end, as the store has it, lies behind the moment of the kill.
//! Never: decides by a log line. A crash here costs the test; the seed it printed repeats its moments.
//!
//! `HYPERSDK_TEST_KILLS` sets the kills of each campaign (20); `tests/run --long` sets 300.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::RngExt as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use crate::harness::client::{Client, brief, file_of};
use crate::harness::fleet::{Database, Fleet, Plan, Up, ready};
use crate::harness::images::{identical, pattern, untar};
use crate::harness::{random, seconds, wait_for};

const MIB: u64 = 1 << 20;
/// Data of the disk that is copied.
const DATA: u64 = 512 * MIB;
/// What holds each copy.
const RATE: u64 = 64 * MIB;
/// What may be done again after a kill, beside what was cut off: the promised checkpoint.
const REPEATED: u64 = 64 * MIB;
/// What a copy may have read since the agent's last report, which comes every 300 ms.
const UNREPORTED: u64 = RATE / 10 * 4;
/// Most that is cut off a part.
const CUT: u64 = 48 * MIB;

/// Who is killed, and where its work lies.
enum Victim {
    Agent(Fleet),
    Controller(Fleet),
    Up(Up),
}

impl Victim {
    fn client(&self) -> &Client {
        match self {
            Victim::Agent(fleet) | Victim::Controller(fleet) => &fleet.client,
            Victim::Up(up) => &up.client,
        }
    }

    fn kill(&mut self) {
        match self {
            Victim::Agent(fleet) => fleet.agents[0].kill(),
            Victim::Controller(fleet) => fleet.controller.kill(),
            Victim::Up(up) => up.service.kill(),
        }
    }

    async fn restart(&mut self) {
        match self {
            Victim::Agent(fleet) => fleet.agents[0].start(),
            Victim::Controller(fleet) => {
                fleet.controller.start();
                ready(&mut fleet.controller, &fleet.client).await;
            }
            Victim::Up(up) => up.restart().await,
        }
    }

    /// Whether the process that moves the bytes dies: then a kill ends the attempt.
    fn moves_bytes(&self) -> bool {
        !matches!(self, Victim::Controller(_))
    }

    /// Folder of the exports and folder of the journals.
    fn folders(&self) -> (PathBuf, PathBuf) {
        match self {
            Victim::Agent(fleet) | Victim::Controller(fleet) => (fleet.exports(), fleet.agents[0].home().join("data/jobs")),
            Victim::Up(up) => (up.service.home().join("data/exports"), up.service.home().join("data/agent/jobs")),
        }
    }
}

/// What a campaign has found.
#[derive(Default)]
struct Tally {
    /// Kills proven to have hit.
    proven: u32,
    /// Kills that hit nothing.
    missed: u32,
    cuts: u32,
    jobs: u32,
    /// Jobs in each stage at a proven kill.
    stages: BTreeMap<String, u32>,
    /// Bytes done again, for each job and kill.
    repeated: Vec<u64>,
}

/// A kill, and what was seen just before it.
struct Kill {
    /// As the API writes a time, so that both compare as text.
    at: String,
    before: Vec<Value>,
    /// How much was cut off, by job.
    cut: BTreeMap<String, u64>,
}

fn is_active(job: &Value) -> bool {
    matches!(job["stage"].as_str(), Some("copying" | "verifying" | "publishing"))
}

fn is_over(job: &Value) -> bool {
    matches!(job["status"].as_str(), Some("completed" | "failed" | "cancelled"))
}

fn number(job: &Value, field: &str) -> u64 {
    job[field].as_u64().unwrap_or_default()
}

fn name(job: &Value) -> String {
    job["id"].as_str().unwrap().to_owned()
}

/// Kills of a campaign.
fn kills() -> u32 {
    std::env::var("HYPERSDK_TEST_KILLS").map_or(20, |text| text.parse().expect("HYPERSDK_TEST_KILLS is a number"))
}

async fn campaign(mut victim: Victim, source: &Path, title: &str, kills: u32) {
    let mut random = random(title);
    let (mut tally, start) = (Tally::default(), Instant::now());
    let mut ended: BTreeMap<String, String> = BTreeMap::new();
    while tally.proven < kills {
        round(&mut victim, source, &mut random, &mut tally, &mut ended).await;
        assert!(tally.missed < kills * 3, "{title}: most kills hit nothing");
    }
    // Everything ever accepted is still there, as it ended, with its log.
    let total = victim.client().get("/jobs?limit=1").await.expect(200).body["pagination"]["total"].as_u64();
    assert_eq!(total, Some(u64::from(tally.jobs)), "no accepted job is lost");
    for (id, log) in &ended {
        assert_eq!(victim.client().job(id).await["status"], "completed");
        assert_eq!(&victim.client().log(id).await, log, "the log of an ended job stays as it was");
    }
    tally.repeated.sort_unstable();
    let most = tally.repeated.last().copied().unwrap_or_default() / MIB;
    let middle = tally.repeated.get(tally.repeated.len() / 2).copied().unwrap_or_default() / MIB;
    println!(
        "{title}: {} kills hit ({} missed), {} cuts, {} jobs, 0 lost, hit in {:?}, repeated after a kill: median {middle} MiB, most {most} MiB; {:.0} s",
        tally.proven,
        tally.missed,
        tally.cuts,
        tally.jobs,
        tally.stages,
        start.elapsed().as_secs_f64()
    );
}

/// Three copies at once, and kills until all have ended.
async fn round(victim: &mut Victim, source: &Path, random: &mut StdRng, tally: &mut Tally, ended: &mut BTreeMap<String, String>) {
    let client = victim.client().clone();
    let mut jobs = Vec::new();
    for (format, options) in [("raw", json!({})), ("qcow2", json!({"compress": true})), ("ova", json!({}))] {
        let mut options = options;
        options["bandwidth_limit"] = json!(RATE);
        jobs.push((client.export("disk", format, options).await, format));
        tally.jobs += 1;
    }
    let ids: Vec<String> = jobs.iter().map(|(id, _)| id.clone()).collect();
    let mut kills: Vec<Kill> = Vec::new();
    loop {
        aim(&client, &ids, random).await;
        let before = look(&client, &ids).await.unwrap();
        if before.iter().all(is_over) {
            break;
        }
        let logs = logs(&client, &ids).await;
        let at = shared::clock::rfc3339(shared::clock::now());
        victim.kill();
        let mut kill = Kill { at, before, cut: BTreeMap::new() };
        if victim.moves_bytes() && kills.len() % 2 == 1 {
            cut(victim, &mut kill, random).await;
            tally.cuts += u32::from(!kill.cut.is_empty());
        }
        victim.restart().await;
        after(victim, &kill, tally).await;
        for (id, log) in &logs {
            let now = client.log(id).await;
            assert!(now.starts_with(log), "{id}: a line that was shown is gone.\nbefore:\n{log}\nafter:\n{now}");
        }
        kills.push(kill);
    }
    let mut finished = BTreeMap::new();
    for (id, format) in &jobs {
        let job = client.completed(id, seconds(300)).await;
        judge(&job, format, source);
        if !victim.moves_bytes() {
            assert_eq!(job["attempt"], 1, "a controller's restart does not restart a copy: {job:#}\n{}", client.log(id).await);
        }
        finished.insert(id.clone(), job["finished_at"].as_str().unwrap().to_owned());
        ended.insert(id.clone(), client.log(id).await);
        std::fs::remove_dir_all(victim.folders().0.join(id)).unwrap();
    }
    let left = std::fs::read_dir(victim.folders().0).unwrap().count();
    assert_eq!(left, 0, "published folders only, no part stays behind");
    for kill in &kills {
        let hit = kill.before.iter().filter(|job| is_active(job) && finished[&name(job)] > kill.at).collect::<Vec<_>>();
        if hit.is_empty() {
            tally.missed += 1;
            continue;
        }
        tally.proven += 1;
        for job in hit {
            *tally.stages.entry(job["stage"].as_str().unwrap().to_owned()).or_default() += 1;
        }
    }
}

/// Waits for a random moment of the copies; now and then for one inside the short stages.
async fn aim(client: &Client, ids: &[String], random: &mut StdRng) {
    let in_any = async |stages: &[&str], pause: u64| {
        wait_for(&format!("a job to be {stages:?}"), seconds(180), async || {
            let jobs = look(client, ids).await?;
            let hit = jobs.iter().any(|job| stages.iter().any(|stage| job["stage"] == *stage));
            // The short stages are looked for more often than the harness's 50 ms.
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if hit || jobs.iter().all(is_over) { Ok(()) } else { Err(jobs.iter().map(brief).collect::<Vec<_>>().join("; ")) }
        })
        .await;
    };
    match random.random_range(0..10u32) {
        0 | 1 => in_any(&["verifying", "publishing"], 0).await,
        2 => in_any(&["publishing"], 0).await,
        _ => {
            in_any(&["copying", "verifying", "publishing"], 0).await;
            tokio::time::sleep(Duration::from_millis(random.random_range(100..2500))).await;
        }
    }
}

async fn look(client: &Client, ids: &[String]) -> Result<Vec<Value>, String> {
    let mut jobs = Vec::new();
    for id in ids {
        jobs.push(client.try_get(&format!("/jobs/{id}")).await?);
    }
    Ok(jobs)
}

async fn logs(client: &Client, ids: &[String]) -> Vec<(String, String)> {
    let mut logs = Vec::new();
    for id in ids {
        logs.push((id.clone(), client.log(id).await));
    }
    logs
}

/// Cuts a random tail off the part and off the journal of each job that was not granted publication when it was killed: what was granted was
/// synced and proven before, and a disk that loses that has not been promised anything.
async fn cut(victim: &Victim, kill: &mut Kill, random: &mut StdRng) {
    let (exports, journals) = victim.folders();
    for job in &kill.before {
        let part = exports.join(format!("{}.part", name(job)));
        if !part.is_dir() || !is_ungranted(victim, job).await {
            continue;
        }
        let largest =
            std::fs::read_dir(&part).unwrap().map(|entry| entry.unwrap().path()).max_by_key(|path| std::fs::metadata(path).unwrap().len());
        let Some(file) = largest else { continue };
        let (written, amount) = (end_of_data(&file), random.random_range(1..CUT));
        truncate(&file, written.saturating_sub(amount));
        truncate_by(&journals.join(format!("{}.journal", name(job))), random.random_range(0..400));
        kill.cut.insert(name(job), amount);
    }
}

/// Whether a job whose agent is dead had not been granted its publication.
async fn is_ungranted(victim: &Victim, job: &Value) -> bool {
    if let Victim::Agent(fleet) = victim {
        // The controller lives and knows; a request that the dead agent had just sent is answered by then.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = fleet.client.job(&name(job)).await;
        return is_active(job) && !is_over(&now) && now["stage"] != "publishing";
    }
    // Nobody can be asked: it must have been too far from its end to get there between the look and the kill.
    match job["stage"].as_str() {
        Some("copying") => number(job, "bytes_done") + 48 * MIB < DATA,
        Some("verifying") => number(job, "bytes_verified") + 256 * MIB < DATA,
        _ => false,
    }
}

/// Where the last byte that is not zero lies, to a MiB: a raw image is as long as its disk from the start.
fn end_of_data(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let (zeros, mut piece) = (vec![0u8; MIB as usize], vec![0u8; MIB as usize]);
    let mut end = length;
    while end > 0 {
        let from = (end - 1) / MIB * MIB;
        let size = (end - from) as usize;
        file.read_exact_at(&mut piece[..size], from).unwrap();
        if piece[..size] != zeros[..size] {
            return end;
        }
        end = from;
    }
    0
}

fn truncate(path: &Path, length: u64) {
    File::options().write(true).open(path).unwrap().set_len(length).unwrap();
}

fn truncate_by(path: &Path, amount: u64) {
    let length = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    // The first record says whose journal it is; without it a journal is none, which is another test's matter.
    if length > 4096 {
        truncate(path, length - amount);
    }
}

/// What every job must show after the restart.
async fn after(victim: &Victim, kill: &Kill, tally: &mut Tally) {
    let client = victim.client();
    for before in kill.before.iter().filter(|job| !is_over(job)) {
        let id = name(before);
        let now = wait_for(&format!("{id} to go on"), seconds(60), async || {
            let job = client.try_get(&format!("/jobs/{id}")).await?;
            let next_attempt = number(&job, "attempt") > number(before, "attempt") || !victim.moves_bytes();
            // Before `copying` the resumed bytes are not known yet.
            if is_over(&job) || (next_attempt && is_active(&job) && job["bytes_total"].is_u64()) { Ok(job) } else { Err(brief(&job)) }
        })
        .await;
        assert!(now["status"] != "failed" && now["status"] != "cancelled", "{now:#}\n{}", client.log(&id).await);
        if !victim.moves_bytes() || !is_active(before) || number(&now, "attempt") == number(before, "attempt") {
            continue;
        }
        let (had, resumed) = (number(before, "bytes_done"), number(&now, "bytes_resumed"));
        // A byte of output stands for two of this disk at least where it is compressed; a cut record costs its checkpoint.
        let cut = kill.cut.get(&id).map_or(0, |amount| 3 * amount + 64 * MIB);
        assert!(
            resumed + cut >= had,
            "{id}: {had} bytes were on the disk for good, {resumed} were taken over (cut {cut}): {before:#} {now:#}"
        );
        // What was read since the agent's last report is not known, but held by the limit.
        let at = (number(before, "bytes_resumed") + number(before, "bytes_read") + UNREPORTED).min(DATA);
        let again = at.saturating_sub(resumed);
        assert!(again <= REPEATED + cut, "{id}: {again} bytes are done again, {REPEATED} + {cut} may be: {before:#} {now:#}");
        if cut == 0 {
            tally.repeated.push(again);
        }
    }
}

fn judge(job: &Value, format: &str, source: &Path) {
    assert_eq!(job["result"]["verified"], true, "{job:#}");
    match format {
        "ova" => {
            let file = file_of(job, ".ova");
            let opened = file.with_extension("opened");
            let members = untar(&file, &opened);
            let disk = members.iter().find(|member| member.ends_with(".vmdk")).unwrap_or_else(|| panic!("{members:?}"));
            identical(("raw", source), ("vmdk", &opened.join(disk)));
        }
        _ => identical(("raw", source), (format, &file_of(job, &format!(".{format}")))),
    }
}

/// A disk of 640 MiB with 512 MiB of data in three areas.
fn fill(vms: &Path) -> PathBuf {
    let path = vms.join("disk.raw");
    pattern(&path, 640 * MIB, &[(0, 200 * MIB), (230 * MIB, 200 * MIB), (500 * MIB, 112 * MIB)], 77);
    path
}

async fn fleet(name: &str, database: Database) -> (Fleet, PathBuf) {
    fleet_as(name, Plan { database, ..Plan::plain() }).await
}

async fn fleet_as(name: &str, plan: Plan) -> (Fleet, PathBuf) {
    let mut source = PathBuf::new();
    let fleet = Fleet::start(name, plan, |vms| source = fill(vms)).await;
    (fleet, source)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_of_the_agent() {
    let (fleet, source) = fleet("kill-agent", Database::Sqlite).await;
    campaign(Victim::Agent(fleet), &source, "kill -9 of the agent", kills()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_of_the_controller() {
    let (fleet, source) = fleet("kill-controller", Database::Postgres).await;
    campaign(Victim::Controller(fleet), &source, "kill -9 of the controller", kills()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_of_up() {
    let mut source = PathBuf::new();
    let up = Up::start("kill-up", |vms| source = fill(vms)).await;
    campaign(Victim::Up(up), &source, "kill -9 of up", kills()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_drains_and_the_next_process_goes_on() {
    let (fleet, source) = fleet("drain", Database::Sqlite).await;
    drain(fleet, &source).await;
}

/// On a machine that takes 0.3 s for a sync all of this failed once, in places that a fast disk never shows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_syncs_slowly_costs_time_and_nothing_else() {
    let plan = Plan { slow_sync: 250, ..Plan::plain() };
    let (mut fleet, source) = fleet_as("slow-drain", plan.clone()).await;
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", fleet.agents[0].process().pid())).unwrap();
    assert!(maps.contains("slow-sync.so"), "nothing slows the agent's syncs:\n{maps}");
    drain(fleet, &source).await;
    let (fleet, source) = fleet_as("slow-kill", plan).await;
    campaign(Victim::Agent(fleet), &source, "kill -9 of the agent on a slow disk", 5).await;
}

async fn drain(mut fleet: Fleet, source: &Path) {
    let client = fleet.client.clone();
    let id = client.export("disk", "qcow2", json!({"bandwidth_limit": RATE})).await;
    wait_for("a checkpoint", seconds(120), async || {
        let job = client.job(&id).await;
        if number(&job, "bytes_done") >= 64 * MIB { Ok(()) } else { Err(brief(&job)) }
    })
    .await;
    let status = fleet.agents[0].process().terminate(seconds(25)).await;
    assert!(status.success(), "a drained agent ends with 0: {status}");
    let waits = client.job(&id).await;
    assert!(waits["status"] == "queued" && waits["stage"] == "waiting", "{waits:#}");
    fleet.agents[0].start();
    let status = {
        client.in_stage(&id, &["copying"], seconds(30)).await;
        fleet.controller.process().terminate(seconds(25)).await
    };
    assert!(status.success(), "a drained controller ends with 0: {status}");
    fleet.controller.start();
    ready(&mut fleet.controller, &client).await;
    let job = client.completed(&id, seconds(300)).await;
    assert_eq!(job["attempt"], 2, "a drain costs no strike, a controller's restart no attempt: {job:#}");
    judge(&job, "qcow2", source);
}
