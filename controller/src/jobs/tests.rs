//! The queue against a real SQLite: what the store holds after each message, what agents are told, what a restart finds.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod holds;
mod logs;
mod retention;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use proto::v1::controller_message::Kind;
use proto::v1::finished::Outcome;
use proto::v1::{self as wire, Held};
use shared::job::{Event, Hold, Status};
use shared::lease;
use shared::options::{Format, JobType, Options};

use super::board::Board;
use super::core::{Core, Error, Outbox, PER_AGENT, Ports};
use super::leases::Arrival;
use super::record::{Job, NewJob};
use super::reports::Report;
use super::store;
use crate::store::Store;
use crate::system::metrics::Metrics;

/// The runtime of the databases under test.
pub fn runtime() -> tokio::runtime::Handle {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()).handle().clone()
}

/// A new database in a folder of its own, below the build's: connections may outlive the test, so nobody knows when it could be removed.
pub async fn database() -> Store {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tmp").join(shared::ids::random_hex::<6>());
    shared::vault::open_data_dir(&folder).unwrap();
    Store::open(&format!("sqlite://{}/test.db?mode=rwc", folder.display()), runtime()).await.unwrap()
}

#[derive(Default)]
struct Wire {
    sent: Mutex<Vec<(String, Kind)>>,
    heard: Mutex<HashMap<String, Instant>>,
}

impl Outbox for Wire {
    fn send(&self, agent: &str, message: Kind) -> bool {
        self.sent.lock().unwrap().push((agent.to_owned(), message));
        true
    }
    fn last_heard(&self, agent: &str) -> Option<Instant> {
        self.heard.lock().unwrap().get(agent).copied()
    }
    fn name(&self, agent: &str) -> String {
        agent.trim_start_matches("agent-").to_owned()
    }
}

struct Bench {
    core: Core,
    wire: Arc<Wire>,
    news: Arc<Mutex<Vec<&'static str>>>,
    store: Store,
    session: u64,
}

impl Bench {
    async fn new() -> Self {
        Self::over(database().await).await
    }

    /// A controller that starts on this store.
    async fn over(store: Store) -> Self {
        let (wire, news) = (Arc::new(Wire::default()), Arc::new(Mutex::new(Vec::new())));
        let told = news.clone();
        let ports = Ports { store: store.clone(), outbox: wire.clone(), news: Arc::new(move |kind, _, _| told.lock().unwrap().push(kind)) };
        let core = Core::load(ports, Board::new(Metrics::new().unwrap()), PER_AGENT).await.unwrap();
        Self { core, wire, news, store, session: 0 }
    }

    fn new_job(&self) -> NewJob {
        NewJob {
            kind: JobType::Export,
            provider: "vms".into(),
            provider_kind: "local".into(),
            provider_path: "/srv/vms".into(),
            owner: "agent-a".into(),
            vm_id: "web.vmdk".into(),
            vm_name: "Web".into(),
            source: String::new(),
            capacity: 1 << 30,
            format: Format::Qcow2,
            options: Options::default(),
            created_by: "tester".into(),
            notes: vec![],
        }
    }

    async fn submit(&mut self, priority: u8) -> Job {
        let options = Options { priority: Some(priority), ..Options::default() };
        let new = NewJob { options, ..self.new_job() };
        self.core.submit(new, None).await.unwrap()
    }

    /// The agent says Hello with what it holds; answers what it shall keep and is told right after Welcome.
    async fn hello(&mut self, held: &[(&str, u64)]) -> super::leases::Keep {
        self.session += 1;
        let held = held.iter().map(|(job, epoch)| Held { job: (*job).to_owned(), epoch: *epoch }).collect();
        let arrival = Arrival { agent: "agent-a".into(), session: self.session, held, draining: false, parked: vec![] };
        let keep = self.core.agent_up(arrival).await.unwrap();
        self.core.agent_ready("agent-a", self.session).await.unwrap();
        keep
    }

    async fn stored(&self, id: &str) -> Job {
        store::load(&self.store, id).await.unwrap().unwrap()
    }

    fn take_sent(&self) -> Vec<Kind> {
        std::mem::take(&mut *self.wire.sent.lock().unwrap()).into_iter().map(|(_, kind)| kind).collect()
    }

    fn take_assigned(&self) -> Vec<(String, u64)> {
        let sent = self.take_sent();
        sent.into_iter().filter_map(|kind| if let Kind::Assign(assign) = kind { Some((assign.job, assign.epoch)) } else { None }).collect()
    }

    async fn report(&mut self, report: Report) -> Vec<Kind> {
        self.take_sent();
        self.core.report("agent-a".into(), report).await;
        self.take_sent()
    }

    async fn progress(&mut self, job: &str, epoch: u64, stage: &str, durable: u64, verified: u64) -> Vec<Kind> {
        let progress =
            wire::Progress { job: job.into(), epoch, stage: stage.into(), data: 100, read: durable, durable, verified, resumed: 0 };
        self.report(Report::Progress(progress)).await
    }

    async fn finish(&mut self, job: &str, epoch: u64, outcome: Outcome) -> Vec<Kind> {
        let finished = wire::Finished { job: job.into(), epoch, data: 100, durable: 100, verified: 100, outcome: Some(outcome) };
        self.report(Report::Finished(finished)).await
    }

    async fn commit(&mut self, job: &str, epoch: u64) -> Vec<Kind> {
        self.report(Report::Commit(wire::CommitRequest { job: job.into(), epoch })).await
    }
}

fn granted(sent: &[Kind]) -> Option<bool> {
    sent.iter().find_map(|kind| if let Kind::CommitReply(reply) = kind { Some(reply.granted) } else { None })
}

fn cancelled(sent: &[Kind]) -> Option<(u64, bool)> {
    sent.iter().find_map(|kind| if let Kind::Cancel(cancel) = kind { Some((cancel.epoch, cancel.discard)) } else { None })
}

fn acknowledged(sent: &[Kind]) -> bool {
    sent.iter().any(|kind| matches!(kind, Kind::Acknowledge(_)))
}

#[actix_web::test]
async fn a_job_waits_for_its_agent_runs_is_granted_and_completes_once() {
    let mut bench = Bench::new().await;
    let job = bench.submit(50).await;
    assert_eq!((job.state.status, job.state.hold), (Status::Queued, Hold::Agent));
    assert_eq!(bench.stored(&job.id).await.state, job.state);
    bench.hello(&[]).await;
    assert_eq!(bench.take_assigned(), [(job.id.clone(), 1)]);
    bench.progress(&job.id, 1, "copying", 50, 0).await;
    let shown = super::view::View::of(&bench.core.find(&job.id).await.unwrap().unwrap(), str::to_owned);
    assert_eq!((shown.stage, shown.progress, shown.bytes_done, shown.bytes_total), ("copying", 24, 50, Some(100)));
    // Nothing may be published before it is granted, nobody else may ask, and asking twice is answered the same.
    assert_eq!(granted(&bench.commit(&job.id, 2).await), Some(false));
    assert_eq!(granted(&bench.commit(&job.id, 1).await), Some(true));
    assert_eq!(bench.stored(&job.id).await.state.stage, shared::job::Stage::Publishing);
    assert_eq!(granted(&bench.commit(&job.id, 1).await), Some(true));
    assert!(matches!(bench.core.person(&job.id, Event::Cancel, "").await, Err(Error::Refused(_))));
    assert!(acknowledged(&bench.finish(&job.id, 1, Outcome::Completed(r#"{"verified":true}"#.into())).await));
    let done = bench.stored(&job.id).await;
    assert_eq!(
        (done.state.status, done.result, super::view::progress(&bench.stored(&job.id).await)),
        (Status::Completed, Some(serde_json::json!({"verified": true})), 100)
    );
    assert!(done.finished_at.is_some() && done.started_at.is_some());
    // Said again, it is acknowledged again and changes nothing.
    assert!(acknowledged(&bench.finish(&job.id, 1, Outcome::Completed("{}".into())).await));
    assert_eq!(bench.stored(&job.id).await.result, Some(serde_json::json!({"verified": true})));
    assert_eq!(bench.news.lock().unwrap().iter().filter(|kind| **kind == "job.completed").count(), 1);
    bench.core.flush_logs().await;
    let lines = store::logs_after(&bench.store, &job.id, 0, 100).await.unwrap();
    let numbers: Vec<i64> = lines.iter().map(|line| line.seq).collect();
    assert_eq!(numbers, (1..=lines.len() as i64).collect::<Vec<_>>());
    assert!(lines.iter().any(|line| line.message.contains("attempt 1 begins at agent a")) && lines.last().unwrap().message == "completed");
    // The next one is estimated from what this one took.
    assert!(bench.submit(50).await.estimate.is_some());
}

#[actix_web::test]
async fn what_was_granted_stays_shown_as_done_when_its_agent_comes_back_without_it() {
    let mut bench = Bench::new().await;
    bench.hello(&[]).await;
    let id = bench.submit(50).await.id;
    bench.progress(&id, 1, "verifying", 100, 100).await;
    assert_eq!(granted(&bench.commit(&id, 1).await), Some(true));
    let mut after = Bench::over(bench.store.clone()).await;
    after.hello(&[]).await;
    assert_eq!(after.take_assigned(), [(id.clone(), 2)]);
    let nothing_yet = wire::Progress { job: id.clone(), epoch: 2, stage: "preparing".into(), ..Default::default() };
    after.report(Report::Progress(nothing_yet)).await;
    let shown = super::view::View::of(&after.core.find(&id).await.unwrap().unwrap(), str::to_owned);
    assert_eq!((shown.stage, shown.attempt, shown.progress), ("publishing", 2, 99));
    assert_eq!((shown.bytes_done, shown.bytes_total, shown.bytes_verified, shown.bytes_resumed), (100, Some(100), 100, 100));
    let parked = wire::Finished { job: id.clone(), epoch: 2, outcome: Some(Outcome::Parked(true)), ..Default::default() };
    after.report(Report::Finished(parked)).await;
    let shown = super::view::View::of(&after.core.find(&id).await.unwrap().unwrap(), str::to_owned);
    assert_eq!((shown.bytes_done, shown.bytes_total, shown.bytes_verified, shown.bytes_resumed), (100, Some(100), 100, 100));
}

#[actix_web::test]
async fn the_better_priority_goes_first_and_an_agent_gets_four() {
    let mut bench = Bench::new().await;
    let mut jobs = Vec::new();
    for priority in [10, 90, 50, 50, 70, 20] {
        jobs.push(bench.submit(priority).await.id);
    }
    bench.hello(&[]).await;
    let order: Vec<String> = bench.take_assigned().into_iter().map(|(job, _)| job).collect();
    let mut expected = vec![jobs[1].clone(), jobs[4].clone(), jobs[2].clone(), jobs[3].clone()];
    // The two fifties may be of one millisecond; then the id decides.
    expected[2..].sort_by_key(|id| (bench.core.jobs[id].job.created_at, id.clone()));
    assert_eq!(order, expected);
    let failure = wire::Failure { code: "bad_image".into(), message: "broken".into(), retryable: false, ..Default::default() };
    let sent = bench.finish(&jobs[1], 1, Outcome::Failed(failure)).await;
    assert!(sent.iter().any(|kind| matches!(kind, Kind::Assign(assign) if assign.job == jobs[5])), "{sent:?}");
    let failed = bench.stored(&jobs[1]).await;
    assert_eq!(
        (failed.state.status, failed.error.as_deref(), failed.error_code.as_deref()),
        (Status::Failed, Some("broken"), Some("bad_image"))
    );
}

#[actix_web::test]
async fn a_restarted_controller_adopts_what_is_held_and_takes_back_what_is_not() {
    let mut bench = Bench::new().await;
    let (kept, lost, old) = (bench.submit(50).await.id, bench.submit(50).await.id, bench.submit(50).await.id);
    bench.hello(&[]).await;
    bench.take_sent();
    let mut after = Bench::over(bench.store.clone()).await;
    assert_eq!(after.core.jobs.len(), 3);
    let keep = after.hello(&[(&kept, 1), (&old, 7), ("job-00000000", 1)]).await;
    assert_eq!(keep.keep.iter().map(|held| held.job.as_str()).collect::<Vec<_>>(), [kept.as_str()]);
    assert_eq!(keep.then.iter().filter(|kind| matches!(kind, Kind::Cancel(cancel) if !cancel.discard)).count(), 2);
    let mut again = after.take_assigned();
    again.sort();
    let mut expected = [(lost.clone(), 2), (old.clone(), 2)];
    expected.sort();
    assert_eq!(again, expected);
    // The old assignment's late words change nothing, and its speaker is told to stop.
    assert_eq!(cancelled(&after.progress(&lost, 1, "copying", 99, 0).await), Some((1, false)));
    assert_eq!(granted(&after.commit(&lost, 1).await), Some(false));
    assert!(acknowledged(&after.finish(&lost, 1, Outcome::Parked(true)).await));
    assert_eq!(after.stored(&lost).await.state.epoch, 2);
    assert!(after.progress(&kept, 1, "copying", 10, 0).await.is_empty());
    // Numbers of log lines go on where the first controller stopped.
    bench.core.flush_logs().await;
    after.core.flush_logs().await;
    let lines = store::logs_after(&after.store, &kept, 0, 100).await.unwrap();
    assert!(lines.len() >= 2, "{lines:?}");
}

#[actix_web::test]
async fn cancel_stops_the_bytes_and_repeats_itself_until_it_is_known() {
    let mut bench = Bench::new().await;
    bench.hello(&[]).await;
    let (running, silent) = (bench.submit(50).await.id, bench.submit(50).await.id);
    bench.take_sent();
    let job = bench.core.person(&running, Event::Cancel, "cancelled by x").await.unwrap();
    assert_eq!((job.state.status.public(), job.state.public_stage()), ("running", "cancelling"));
    assert_eq!(cancelled(&bench.take_sent()), Some((1, true)));
    assert!(bench.core.person(&running, Event::Cancel, "again").await.is_ok());
    // Too late to publish.
    assert_eq!(granted(&bench.commit(&running, 1).await), Some(false));
    bench.finish(&running, 1, Outcome::Cancelled(true)).await;
    assert_eq!(bench.stored(&running).await.state.status, Status::Cancelled);
    assert!(matches!(bench.core.person(&running, Event::Cancel, "").await, Err(Error::Refused(_))));
    // One whose agent never answers is cancelled when its lease is lost, and the agent hears of it when it is back.
    bench.core.person(&silent, Event::Cancel, "").await.unwrap();
    bench.core.tick(Instant::now() + lease::REASSIGN + Duration::from_secs(1)).await;
    assert_eq!(bench.stored(&silent).await.state.status, Status::Cancelled);
    let keep = bench.hello(&[(&silent, 1)]).await;
    assert!(keep.keep.is_empty());
    assert!(keep.then.iter().any(|kind| matches!(kind, Kind::Cancel(cancel) if cancel.job == silent && cancel.discard)));
    let parked = vec![Held { job: silent.clone(), epoch: 1 }, Held { job: "job-00000000".into(), epoch: 1 }];
    let arrival = Arrival { agent: "agent-a".into(), session: bench.session + 1, held: vec![], draining: false, parked };
    let keep = bench.core.agent_up(arrival).await.unwrap();
    bench.hello(&[]).await;
    assert_eq!(keep.then.len(), 1);
    assert!(keep.then.iter().any(|kind| matches!(kind, Kind::Cancel(cancel) if cancel.job == silent && cancel.discard)));
    // A retry begins a new attempt under a new epoch.
    bench.take_sent();
    bench.core.person(&silent, Event::Retry, "").await.unwrap();
    assert_eq!(bench.take_assigned(), [(silent.clone(), 2)]);
}

#[actix_web::test]
async fn a_silent_agent_loses_its_jobs_at_forty_seconds_and_not_before() {
    let mut bench = Bench::new().await;
    bench.hello(&[]).await;
    let id = bench.submit(50).await.id;
    let start = Instant::now();
    bench.wire.heard.lock().unwrap().insert("agent-a".into(), start);
    bench.core.tick(start + Duration::from_secs(39)).await;
    assert_eq!(bench.stored(&id).await.state.status, Status::Running);
    bench.core.agent_down("agent-a", bench.session).await.unwrap();
    bench.core.tick(start + Duration::from_secs(42)).await;
    let state = bench.stored(&id).await.state;
    assert_eq!((state.status, state.hold, state.epoch), (Status::Queued, Hold::Agent, 1));
    bench.take_sent();
    bench.hello(&[]).await;
    assert_eq!(bench.take_assigned(), [(id.clone(), 2)]);
    // The end of an older session says nothing about the new one.
    bench.core.agent_down("agent-a", bench.session - 1).await.unwrap();
    assert_eq!(bench.stored(&id).await.state.status, Status::Running);
}

#[actix_web::test]
async fn a_leaving_agent_gets_nothing_more_and_what_it_parks_waits_for_the_next_one() {
    let mut bench = Bench::new().await;
    bench.hello(&[]).await;
    let id = bench.submit(50).await.id;
    bench.take_sent();
    // What an older session says last is of no account.
    bench.core.agent_leaving("agent-a", bench.session - 1).await.unwrap();
    let other = bench.submit(50).await.id;
    assert_eq!(bench.take_assigned(), [(other.clone(), 1)]);
    bench.core.agent_leaving("agent-a", bench.session).await.unwrap();
    let late = bench.submit(50).await.id;
    for job in [&id, &other] {
        assert!(acknowledged(&bench.finish(job, 1, Outcome::Parked(true)).await));
    }
    bench.core.tick(Instant::now() + Duration::from_secs(30)).await;
    assert_eq!(bench.take_assigned(), []);
    for (job, attempt) in [(&id, 1), (&other, 1), (&late, 0)] {
        let state = bench.stored(job).await.state;
        assert_eq!((state.status, state.hold, state.attempt), (Status::Queued, Hold::Agent, attempt));
    }
    bench.core.agent_down("agent-a", bench.session).await.unwrap();
    bench.hello(&[]).await;
    assert_eq!(bench.take_assigned().len(), 3);
}

#[actix_web::test]
async fn pause_parks_resume_goes_on_and_progress_never_falls_within_an_attempt() {
    let mut bench = Bench::new().await;
    bench.hello(&[]).await;
    let id = bench.submit(50).await.id;
    bench.progress(&id, 1, "copying", 80, 0).await;
    bench.progress(&id, 1, "copying", 60, 0).await;
    assert_eq!(bench.core.find(&id).await.unwrap().unwrap().shown, 39);
    bench.take_sent();
    let paused = bench.core.person(&id, Event::Pause, "").await.unwrap();
    assert_eq!((paused.state.public_stage(), cancelled(&bench.take_sent())), ("paused", Some((1, false))));
    assert!(acknowledged(&bench.finish(&id, 1, Outcome::Parked(true)).await));
    bench.core.person(&id, Event::Resume, "").await.unwrap();
    assert_eq!(bench.take_assigned(), [(id.clone(), 2)]);
    assert_eq!(bench.core.find(&id).await.unwrap().unwrap().shown, 0);
}

#[actix_web::test]
async fn another_controller_that_was_quicker_is_noticed() {
    let mut bench = Bench::new().await;
    let id = bench.submit(50).await.id;
    let mut other = Bench::over(bench.store.clone()).await;
    other.core.person(&id, Event::Cancel, "").await.unwrap();
    assert!(matches!(bench.core.person(&id, Event::Cancel, "").await, Err(Error::Raced)));
    assert!(bench.core.jobs.is_empty());
}

#[actix_web::test]
async fn a_pause_at_another_controller_is_not_overwritten() {
    let mut bench = Bench::new().await;
    let [given, told] = [bench.submit(50).await.id, bench.submit(50).await.id];
    let mut other = Bench::over(bench.store.clone()).await;
    for id in [&given, &told] {
        other.core.person(id, Event::Pause, "").await.unwrap();
    }
    // Neither epoch nor status has moved: the hold alone tells.
    let late = Job { deadline_missed: true, ..bench.core.find(&told).await.unwrap().unwrap() };
    assert!(!store::save_hold(&bench.store, &late).await.unwrap());
    bench.hello(&[]).await;
    assert_eq!(bench.take_assigned(), []);
    for id in [&given, &told] {
        let (stored, known) = (bench.stored(id).await, bench.core.find(id).await.unwrap().unwrap());
        assert_eq!((stored.state.hold, known.state.hold, stored.deadline_missed), (Hold::Paused, Hold::Paused, false));
    }
}

#[actix_web::test]
async fn a_job_whose_commit_had_no_answer_runs_where_it_is_there() {
    let mut bench = Bench::new().await;
    let away = || crate::store::Error::Away("the connection was lost".into());
    let mut ids = Vec::new();
    // The answer to one commit is lost; the other commit did not come about.
    for commits in [true, false] {
        let draft = bench.core.draft(bench.new_job(), None).unwrap();
        let row = bench.core.with_lines(draft);
        if commits {
            store::insert_all(&bench.store, std::slice::from_ref(&row)).await.unwrap();
        }
        ids.push(row.job.id.clone());
        let (tell, answer) = tokio::sync::oneshot::channel();
        bench.core.admit(row, tell, Err(away()));
        assert!(matches!(answer.await.unwrap(), Err(Error::Store(crate::store::Error::Away(_)))));
    }
    // Its agent has come meanwhile.
    bench.hello(&[]).await;
    assert_eq!(bench.take_assigned(), []);
    let now = Instant::now();
    bench.core.tick(now).await;
    assert_eq!(bench.take_assigned(), [(ids[0].clone(), 1)]);
    assert_eq!(bench.core.unsure.keys().collect::<Vec<_>>(), [&ids[1]]);
    assert_eq!(bench.core.board.observe().running, 1);
    bench.core.flush_logs().await;
    let lines = store::logs_after(&bench.store, &ids[0], 0, 100).await.unwrap();
    assert_eq!(lines.iter().map(|line| line.seq).collect::<Vec<_>>(), [1, 2], "{lines:?}");
    // Only a read that succeeded says that there is none.
    let all_gone = |bench: &Bench| bench.core.unsure.is_empty();
    bench.core.tick(now + Duration::from_secs(61)).await;
    assert!(all_gone(&bench));
    bench.core.doubt(&ids[1], &away());
    bench.store.clone().close().await.unwrap();
    bench.core.tick(now + Duration::from_secs(61)).await;
    assert!(!all_gone(&bench));
}

#[actix_web::test]
async fn a_retryable_failure_rests_and_five_in_a_row_fail_the_job() {
    let mut bench = Bench::new().await;
    bench.hello(&[]).await;
    let id = bench.submit(50).await.id;
    let mut now = Instant::now();
    for epoch in 1..=5 {
        let failure = wire::Failure { code: "bad_gateway".into(), message: "reset".into(), retryable: true, ..Default::default() };
        let finished =
            wire::Finished { job: id.clone(), epoch, data: 100, durable: 0, verified: 0, outcome: Some(Outcome::Failed(failure)) };
        let sent = bench.report(Report::Finished(finished)).await;
        assert!(!sent.iter().any(|kind| matches!(kind, Kind::Assign(_))), "it was given out again at once");
        now += Duration::from_secs(60);
        bench.wire.heard.lock().unwrap().insert("agent-a".into(), now);
        bench.core.tick(now).await;
    }
    let job = bench.stored(&id).await;
    assert_eq!((job.state.status, job.error.as_deref()), (Status::Failed, Some("reset")));
}

#[actix_web::test]
async fn a_key_makes_one_job_and_what_the_store_cannot_take_now_waits() {
    let mut bench = Bench::new().await;
    bench.hello(&[]).await;
    let request = actix_web::test::TestRequest::post().uri("/api/v1/jobs").insert_header(("Idempotency-Key", "k")).to_http_request();
    let caller = crate::access::Caller { name: "x".into(), role: crate::access::Role::Operator, session: "s".into() };
    let key = crate::http::idempotency::Idempotency::of(&request, &caller, "digest").unwrap().unwrap();
    let template = bench.submit(1).await;
    let new = || NewJob {
        kind: template.kind,
        provider: template.provider.clone(),
        provider_kind: template.provider_kind.clone(),
        provider_path: String::new(),
        owner: template.owner.clone(),
        vm_id: template.vm_id.clone(),
        vm_name: template.vm_name.clone(),
        source: String::new(),
        capacity: 1,
        format: template.format,
        options: Options::default(),
        created_by: "x".into(),
        notes: vec![],
    };
    let first = bench.core.submit(new(), Some(key.clone())).await.unwrap();
    assert!(matches!(bench.core.submit(new(), Some(key.clone())).await, Err(Error::Store(crate::store::Error::Conflict(_)))));
    assert_eq!(bench.core.jobs.len(), 2);
    let answer = key.replay(&bench.store).await.unwrap().unwrap();
    assert_eq!(answer.headers().get("location").unwrap().to_str().unwrap(), format!("/api/v1/jobs/{}", first.id));
    bench.commit(&first.id, 1).await;
    bench.store.clone().close().await.unwrap();
    let sent = bench.finish(&first.id, 1, Outcome::Completed("{}".into())).await;
    assert!(!acknowledged(&sent) && bench.core.deferred.len() == 1);
    bench.core.tick(Instant::now()).await;
    assert_eq!(bench.core.deferred.len(), 1);
    assert!(matches!(bench.core.person(&first.id, Event::Pause, "").await, Err(Error::Refused(_))));
    assert!(matches!(bench.core.person(&template.id, Event::Pause, "").await, Err(Error::Store(crate::store::Error::Away(_)))));
}
