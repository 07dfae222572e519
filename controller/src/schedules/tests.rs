//! Runs of schedules against a real database with a clock that the test turns: two controllers, crashes, jumps, overlaps, agents.
//! On SQLite; on Postgres too where `HYPERSDK_TEST_POSTGRES` names an empty database.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sea_orm::sea_query::Expr;
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder};
use shared::error::Code;
use shared::ids::JobId;
use shared::options::{Format, JobType, Options};

use super::claims::{self, Claim, Outcome};
use super::plan::{CatchUp, Overlap, Timetable};
use super::runner::{Door, Planner, Runner};
use super::store;
use crate::http::idempotency::Idempotency;
use crate::http::reply::Error;
use crate::jobs;
use crate::jobs::record::{Job, NewJob};
use crate::jobs::service::Create;
use crate::jobs::tests::{database, runtime};
use crate::store::entities::{jobs as job_rows, schedule_runs as runs, schedules};
use crate::store::{Error as StoreError, Store};

/// How the world stands, as the runners see it.
#[derive(Default)]
struct World {
    refused: Mutex<Option<Error>>,
    elsewhere: Mutex<bool>,
    /// Whose check never ends: the agent behind it hangs.
    hangs: Mutex<Option<String>>,
    /// Owners whose job was checked, in order.
    checked: Mutex<Vec<String>>,
}

/// One controller's door: its jobs go into the store as the queue puts them there, key and job in one transaction.
struct Stage {
    store: Store,
    world: Arc<World>,
    has_agent: bool,
}

fn new_job(owner: &str) -> NewJob {
    NewJob {
        kind: JobType::Export,
        provider: "vms".into(),
        provider_kind: "local".into(),
        provider_path: String::new(),
        owner: "agent-a".into(),
        vm_id: "web".into(),
        vm_name: "web".into(),
        source: String::new(),
        capacity: 1,
        format: Format::Raw,
        options: Options::default(),
        created_by: owner.into(),
        notes: vec![],
    }
}

#[async_trait(?Send)]
impl Door for Stage {
    async fn check(&self, owner: &str, _: Create) -> Result<NewJob, Error> {
        self.world.checked.lock().unwrap().push(owner.to_owned());
        if self.world.hangs.lock().unwrap().as_deref() == Some(owner) {
            std::future::pending::<()>().await;
        }
        self.world.refused.lock().unwrap().clone().map_or_else(|| Ok(new_job(owner)), Err)
    }
    async fn submit(&self, new: NewJob, key: Idempotency) -> Result<Job, jobs::core::Error> {
        let job = Job::new(JobId::generate().to_string(), new);
        let answer = key.row(201, &format!("/api/v1/jobs/{}", job.id), "{}".into());
        let row = jobs::store::NewRow { job: job.clone(), answer: Some(answer), lines: Vec::new() };
        jobs::store::insert_all(&self.store, &[row]).await?;
        Ok(job)
    }
    fn has(&self, _: &str) -> bool {
        self.has_agent
    }
    async fn is_elsewhere(&self, _: &str) -> Result<bool, StoreError> {
        Ok(*self.world.elsewhere.lock().unwrap())
    }
}

/// A controller: what it plans and what it runs.
struct Controller {
    planner: Planner,
    runner: Runner<Stage>,
}

impl Controller {
    async fn tick(&mut self, now: DateTime<Utc>, clock: Instant) -> Result<(), StoreError> {
        self.planner.tick(now).await?;
        self.runner.tick(now, clock).await
    }
}

struct Bench {
    store: Store,
    world: Arc<World>,
    schedule: String,
    start: Instant,
}

fn time(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

/// A schedule of `ann`, made at `now`.
pub fn schedule(cron: &str, overlap: Overlap, catch_up: CatchUp, now: DateTime<Utc>) -> schedules::Model {
    let next = Timetable::of(cron, "UTC").unwrap().next_after(now).unwrap();
    schedules::Model {
        id: format!("sched-{}", shared::ids::random_hex::<8>()),
        name: "Nightly".into(),
        folded: "nightly".into(),
        cron: cron.into(),
        timezone: "UTC".into(),
        job: "{}".into(),
        provider: "vms".into(),
        provider_kind: "local".into(),
        enabled: true,
        overlap: overlap.word().into(),
        catch_up: catch_up.word().into(),
        carbon_aware: false,
        next_run: Some(next.timestamp_millis()),
        last_run: None,
        last_status: None,
        last_job: None,
        version: 0,
        turn: 0,
        created_by: "ann".into(),
        created_at: now.timestamp_millis(),
        updated_at: now.timestamp_millis(),
    }
}

async fn stores() -> Vec<Store> {
    let mut stores = vec![database().await];
    if let Ok(url) = std::env::var("HYPERSDK_TEST_POSTGRES") {
        stores.push(Store::open(&url, runtime()).await.unwrap());
    }
    stores
}

impl Bench {
    /// A schedule that was made at `now`.
    async fn new(store: Store, cron: &str, overlap: Overlap, catch_up: CatchUp, now: DateTime<Utc>) -> Self {
        // A database that tests share holds the schedules of the others, which must keep still.
        let rest = schedules::Entity::delete_many();
        store.run(|db| async move { Ok(rest.exec(&db).await.map(drop)?) }).await.unwrap();
        let row = schedule(cron, overlap, catch_up, now);
        store::insert(&store, row.clone(), None).await.unwrap();
        Self { store, world: Arc::default(), schedule: row.id, start: Instant::now() }
    }

    /// Another schedule in the same world.
    async fn beside(&self, row: schedules::Model) -> Self {
        store::insert(&self.store, row.clone(), None).await.unwrap();
        Self { store: self.store.clone(), world: self.world.clone(), schedule: row.id, start: self.start }
    }

    /// A controller that comes up.
    fn runner(&self, has_agent: bool) -> Controller {
        let stage = Stage { store: self.store.clone(), world: self.world.clone(), has_agent };
        let runner = Runner::new(self.store.clone(), stage, shared::ids::random_hex::<4>());
        Controller { planner: Planner::new(self.store.clone()), runner }
    }

    fn after(&self, seconds: u64) -> Instant {
        self.start + Duration::from_secs(seconds)
    }

    async fn tick(&self, runner: &mut Controller, now: &str) {
        runner.tick(time(now), self.start).await.unwrap();
    }

    async fn schedule(&self) -> schedules::Model {
        store::by_id(&self.store, &self.schedule).await.unwrap().unwrap()
    }

    async fn runs(&self) -> Vec<runs::Model> {
        let find = runs::Entity::find().filter(runs::Column::Schedule.eq(&self.schedule)).order_by_asc(runs::Column::DueAt);
        self.store.read(|db| async move { Ok(find.all(&db).await?) }).await.unwrap()
    }

    /// Due time, status and cause of each run.
    async fn story(&self) -> Vec<String> {
        let show = |run: &runs::Model| {
            let at = DateTime::from_timestamp_millis(run.due_at).unwrap().format("%d %H:%M");
            format!("{at} {} {}", run.cause, run.status)
        };
        self.runs().await.iter().map(show).collect()
    }

    /// Jobs that this schedule's runs made, and that every one of them is another.
    async fn jobs(&self) -> Vec<String> {
        let jobs: Vec<String> = self.runs().await.into_iter().filter_map(|run| run.job).collect();
        assert_eq!(jobs.iter().collect::<HashSet<_>>().len(), jobs.len(), "{jobs:?}");
        for job in &jobs {
            assert!(jobs::store::load(&self.store, job).await.unwrap().is_some_and(|job| job.created_by == "ann"));
        }
        jobs
    }

    async fn all_jobs(&self) -> usize {
        let all = |db| async move { Ok(job_rows::Entity::find().all(&db).await?.len()) };
        self.store.read(all).await.unwrap()
    }

    async fn finish(&self, job: &str) {
        let done = job_rows::Entity::update_many()
            .col_expr(job_rows::Column::Status, Expr::value("completed"))
            .filter(job_rows::Column::Id.eq(job));
        self.store.run(|db| async move { Ok(done.exec(&db).await.map(drop)?) }).await.unwrap();
    }

    async fn change(&self, change: impl FnOnce(&mut schedules::Model)) {
        let mut row = self.schedule().await;
        change(&mut row);
        assert!(store::update(&self.store, row).await.unwrap());
    }
}

#[actix_web::test]
async fn two_controllers_make_one_run_and_one_job_of_each_due_time() {
    for store in stores().await {
        let now = time("2026-01-05T00:00:30Z");
        let bench = Bench::new(store, "*/5 * * * *", Overlap::Allow, CatchUp::Skip, now).await;
        let before = bench.all_jobs().await;
        let (mut a, mut b) = (bench.runner(true), bench.runner(true));
        for seconds in (0..3600).step_by(20) {
            let (now, clock) = (now + chrono::Duration::seconds(seconds), bench.after(u64::try_from(seconds).unwrap()));
            // Each in a task of its own, so that they meet in the middle of each other's transactions.
            let (one, other) = tokio::join!(a.tick(now, clock), b.tick(now, clock));
            one.and(other).unwrap();
            if seconds == 1800 {
                // One of them is started again.
                b = bench.runner(true);
            }
        }
        let story = bench.story().await;
        assert_eq!(story.len(), 12, "{story:?}");
        assert!(story.iter().all(|run| run.ends_with("cron started")), "{story:?}");
        assert_eq!((bench.jobs().await.len(), bench.all_jobs().await - before), (12, 12));
        let row = bench.schedule().await;
        assert_eq!(row.last_run, Some(time("2026-01-05T01:00:00Z").timestamp_millis()));
        assert_eq!((row.last_status.as_deref(), row.last_job), (Some("started"), bench.jobs().await.pop()));
    }
}

#[actix_web::test]
async fn a_clock_that_jumps_runs_nothing_twice_and_forgets_nothing() {
    for store in stores().await {
        let bench = Bench::new(store, "0 * * * *", Overlap::Allow, CatchUp::Skip, time("2026-01-05T08:30:00Z")).await;
        let mut runner = bench.runner(true);
        for now in ["2026-01-05T09:00:00Z", "2026-01-05T10:00:01Z", "2026-01-05T11:00:02Z"] {
            bench.tick(&mut runner, now).await;
        }
        // Back by two hours: nine is past, ten and eleven were met.
        for now in ["2026-01-05T09:05:00Z", "2026-01-05T10:00:00Z", "2026-01-05T11:00:00Z", "2026-01-05T11:59:59Z"] {
            bench.tick(&mut runner, now).await;
        }
        assert_eq!(bench.story().await, ["05 09:00 cron started", "05 10:00 cron started", "05 11:00 cron started"]);
        bench.tick(&mut runner, "2026-01-05T12:00:00Z").await;
        // A year ahead, by mistake: what lies between was missed. Then put right while the controller is down.
        bench.tick(&mut runner, "2027-01-05T12:30:00Z").await;
        let story = bench.story().await;
        assert_eq!((story.len(), story[4].as_str()), (5, "05 12:00 cron skipped"), "{story:?}");
        let mut runner = bench.runner(true);
        for now in ["2026-01-05T12:30:00Z", "2026-01-05T13:00:00Z", "2026-01-05T14:00:00Z"] {
            bench.tick(&mut runner, now).await;
        }
        let story = bench.story().await;
        let expected = ["12:00", "13:00", "14:00"].map(|at| format!("05 {at} cron started"));
        assert_eq!(story[3..6], expected, "{story:?}");
        assert_eq!(bench.jobs().await.len(), 6);
        // What a clock ahead counted as missed comes after all, once.
        let mut runner = bench.runner(true);
        bench.tick(&mut runner, "2026-01-05T17:30:00Z").await;
        bench.tick(&mut runner, "2026-01-05T16:59:00Z").await;
        bench.tick(&mut runner, "2026-01-05T17:00:00Z").await;
        bench.tick(&mut runner, "2026-01-05T17:00:01Z").await;
        let story = bench.story().await;
        assert_eq!(story[6], "05 17:00 cron started", "{story:?}");
        assert_eq!(bench.jobs().await.len(), 7);
    }
}

#[actix_web::test]
async fn what_was_missed_while_down_is_left_out_or_caught_up_once() {
    for store in stores().await {
        for (catch_up, ends) in [(CatchUp::Skip, "cron skipped"), (CatchUp::Once, "catch_up started")] {
            let bench = Bench::new(store.clone(), "0 2 * * *", Overlap::Skip, catch_up, time("2026-01-05T00:00:00Z")).await;
            let mut runner = bench.runner(true);
            bench.tick(&mut runner, "2026-01-09T08:00:00Z").await;
            let mut again = bench.runner(true);
            bench.tick(&mut again, "2026-01-09T08:00:05Z").await;
            assert_eq!(bench.story().await, [format!("09 02:00 {ends}")]);
            let run = bench.runs().await.remove(0);
            assert_eq!(run.missed, 5);
            assert_eq!(run.reason.is_some_and(|reason| reason.contains("5 due times were missed")), catch_up == CatchUp::Skip);
            for job in bench.jobs().await {
                bench.finish(&job).await;
            }
            bench.tick(&mut again, "2026-01-10T02:00:00Z").await;
            assert_eq!(bench.story().await[1], "10 02:00 cron started");
        }
    }
}

#[actix_web::test]
async fn overlap_skips_queues_or_allows() {
    for store in stores().await {
        for overlap in [Overlap::Skip, Overlap::Queue, Overlap::Allow] {
            let bench = Bench::new(store.clone(), "0 * * * *", overlap, CatchUp::Skip, time("2026-01-05T00:30:00Z")).await;
            let mut runner = bench.runner(true);
            for now in ["2026-01-05T01:00:00Z", "2026-01-05T02:00:00Z", "2026-01-05T03:00:00Z"] {
                bench.tick(&mut runner, now).await;
            }
            let story: Vec<String> = bench.runs().await.into_iter().map(|run| run.status).collect();
            let first = bench.jobs().await.remove(0);
            let reason = bench.runs().await.remove(1).reason.unwrap_or_default();
            match overlap {
                Overlap::Skip => {
                    assert_eq!(story, ["started", "skipped", "skipped"]);
                    assert_eq!(reason, format!("{first} of another run is not finished"));
                    bench.finish(&first).await;
                    bench.tick(&mut runner, "2026-01-05T04:00:00Z").await;
                    assert_eq!(bench.jobs().await.len(), 2);
                }
                Overlap::Queue => {
                    assert_eq!(story, ["started", "pending", "pending"]);
                    assert_eq!(reason, format!("{first} of another run is not finished"));
                    // One after the other, the oldest first.
                    for done in 1..3 {
                        let job = bench.jobs().await.pop().unwrap();
                        bench.finish(&job).await;
                        bench.tick(&mut runner, "2026-01-05T03:30:00Z").await;
                        bench.tick(&mut runner, "2026-01-05T03:30:01Z").await;
                        assert_eq!(bench.runs().await.iter().filter(|run| run.job.is_some()).count(), done + 1);
                        assert!(bench.runs().await[done].job.is_some());
                    }
                    // No more than ten wait.
                    for hour in 4..20 {
                        bench.tick(&mut runner, &format!("2026-01-05T{hour:02}:00:00Z")).await;
                    }
                    let waiting = bench.runs().await.iter().filter(|run| run.status == store::PENDING).count();
                    let left_out = bench.runs().await.into_iter().find(|run| run.status == store::SKIPPED).unwrap();
                    assert_eq!((waiting, left_out.reason.as_deref()), (10, Some("10 runs wait already")));
                    // Switched off, what waits is left out.
                    bench.change(|row| (row.enabled, row.next_run) = (false, None)).await;
                    bench.tick(&mut runner, "2026-01-05T20:00:00Z").await;
                    assert!(bench.runs().await.iter().all(|run| run.status != store::PENDING));
                }
                Overlap::Allow => assert_eq!(story, ["started"; 3]),
            }
        }
    }
}

#[actix_web::test]
async fn a_crash_between_claim_and_job_makes_one_job() {
    for store in stores().await {
        for job_was_made in [false, true] {
            let bench = Bench::new(store.clone(), "0 * * * *", Overlap::Skip, CatchUp::Skip, time("2026-01-05T00:30:00Z")).await;
            let before = bench.all_jobs().await;
            let now = time("2026-01-05T01:00:00Z");
            // The row is there; its controller claims it, perhaps makes the job, and is killed.
            let mut without_agent = bench.runner(false);
            without_agent.tick(now, bench.start).await.unwrap();
            let run = bench.runs().await.remove(0);
            assert_eq!(run.status, store::PENDING);
            assert!(matches!(claims::claim(&bench.store, &run, "killed").await.unwrap(), Claim::Mine(_)));
            assert_eq!(claims::claim(&bench.store, &run, "other").await.unwrap(), Claim::Gone);
            let key = Idempotency::derived("schedule run", &format!("{}\n{}", run.schedule, run.due_at));
            if job_was_made {
                let stage = Stage { store: bench.store.clone(), world: bench.world.clone(), has_agent: true };
                stage.submit(new_job("ann"), key).await.unwrap();
                // The VM is gone by now: the job that was made counts all the same.
                *bench.world.refused.lock().unwrap() = Some(Error::not_found("no such VM"));
            }
            let (mut a, mut b) = (bench.runner(true), bench.runner(true));
            for seconds in [0, 9, 10, 11] {
                let (one, other) = tokio::join!(a.tick(now, bench.after(seconds)), b.tick(now, bench.after(seconds)));
                one.and(other).unwrap();
                assert_eq!(bench.jobs().await.len(), usize::from(seconds >= 10), "after {seconds} s");
            }
            assert_eq!((bench.story().await, bench.all_jobs().await - before), (vec!["05 01:00 cron started".to_owned()], 1));
            // The killed one was only slow: what it says now is of no account.
            claims::settle(&bench.store, &run, "killed", Outcome::Failed("late".into()), 0).await.unwrap();
            assert_eq!(bench.story().await, ["05 01:00 cron started"]);
        }
    }
}

#[actix_web::test]
async fn a_refused_job_fails_its_run_and_a_run_goes_where_its_agent_is() {
    for store in stores().await {
        let bench = Bench::new(store, "0 * * * *", Overlap::Skip, CatchUp::Skip, time("2026-01-05T00:30:00Z")).await;
        let mut runner = bench.runner(true);
        *bench.world.refused.lock().unwrap() = Some(Error::not_found("no VM `web`"));
        bench.tick(&mut runner, "2026-01-05T01:00:00Z").await;
        let run = bench.runs().await.remove(0);
        assert_eq!((run.status.as_str(), run.reason.as_deref(), run.job), (store::FAILED, Some("no VM `web`"), None));
        assert_eq!(bench.schedule().await.last_status.as_deref(), Some("failed"));
        // What passes is waited for.
        *bench.world.refused.lock().unwrap() = Some(Error::new(Code::Unavailable, "the database is away"));
        bench.tick(&mut runner, "2026-01-05T02:00:00Z").await;
        assert_eq!(bench.story().await[1], "05 02:00 cron pending");
        *bench.world.refused.lock().unwrap() = None;
        bench.tick(&mut runner, "2026-01-05T02:00:30Z").await;
        assert_eq!(bench.story().await[1], "05 02:00 cron started");
        bench.finish(&bench.jobs().await[0]).await;
        // Without its agent, twenty seconds; while another controller hears it, for good.
        let mut without = bench.runner(false);
        let three = time("2026-01-05T03:00:00Z");
        *bench.world.elsewhere.lock().unwrap() = true;
        for (seconds, elsewhere, status) in [(0, true, "pending"), (19, false, "pending"), (60, true, "pending"), (61, false, "started")] {
            *bench.world.elsewhere.lock().unwrap() = elsewhere;
            without.tick(three, bench.after(seconds)).await.unwrap();
            assert_eq!(bench.story().await[2], format!("05 03:00 cron {status}"), "after {seconds} s");
        }
        // A person's change and a due time at the same moment: the second looks again.
        let stale = bench.schedule().await;
        bench.change(|row| row.name = "Weekly".into()).await;
        assert!(!store::advance(&bench.store, &stale, None, vec![]).await.unwrap());
        assert!(!store::update(&bench.store, stale).await.unwrap());
    }
}

#[actix_web::test]
async fn an_agent_that_hangs_costs_no_other_schedule_its_time() {
    for store in stores().await {
        let made = time("2026-01-05T08:59:30Z");
        let bench = Bench::new(store, "* * * * *", Overlap::Skip, CatchUp::Skip, made).await;
        let slow = schedules::Model { created_by: "slow".into(), ..schedule("* * * * *", Overlap::Skip, CatchUp::Skip, made) };
        let slow = bench.beside(slow).await;
        *bench.world.hangs.lock().unwrap() = Some("slow".into());
        let checks = || bench.world.checked.lock().unwrap().iter().filter(|owner| *owner == "slow").count();
        let Controller { mut planner, mut runner } = bench.runner(true);
        let nine = time("2026-01-05T09:00:00Z");
        planner.tick(nine).await.unwrap();
        let meanwhile = async {
            for minute in 1..=5 {
                planner.tick(nine + chrono::Duration::minutes(minute)).await.unwrap();
            }
            while bench.jobs().await.is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            _ = runner.tick(nine, bench.start) => panic!("the check hangs"),
            done = tokio::time::timeout(Duration::from_secs(20), meanwhile) => done.expect("the other schedule's job"),
        }
        let minutes = |ends: &str| (0..6).map(|minute| format!("05 09:0{minute} cron {ends}")).collect::<Vec<_>>();
        assert_eq!((slow.story().await, checks()), (minutes("pending"), 1));
        assert_eq!(bench.story().await[..2], ["05 09:00 cron started", "05 09:01 cron pending"]);

        // What passes is asked once a look, and what another run stands before is not asked for.
        *bench.world.hangs.lock().unwrap() = None;
        *bench.world.refused.lock().unwrap() = Some(Error::new(Code::BadGateway, "no answer in 10 s"));
        runner.tick(nine, bench.start).await.unwrap();
        assert_eq!((slow.story().await, checks()), (minutes("pending"), 2));
        *bench.world.refused.lock().unwrap() = None;
        runner.tick(nine, bench.start).await.unwrap();
        let mut story = minutes("skipped");
        story[0] = "05 09:00 cron started".into();
        assert_eq!((slow.story().await, checks()), (story, 4), "before the claim and after it");

        // However many runs of one schedule wait, another's are seen.
        let row = |n: i64| runs::Model {
            id: format!("run-{n:016x}"),
            schedule: slow.schedule.clone(),
            due_at: made.timestamp_millis() - n * 60_000,
            cause: store::cause::CRON.into(),
            status: store::PENDING.into(),
            claimed_by: None,
            missed: 0,
            job: None,
            reason: None,
            created_at: 0,
            started_at: None,
        };
        store::advance(&bench.store, &slow.schedule().await, None, (1..=600).map(row).collect()).await.unwrap();
        planner.tick(time("2026-01-05T09:06:00Z")).await.unwrap();
        let open = claims::open(&bench.store).await.unwrap();
        assert_eq!(open.iter().filter(|run| run.schedule == slow.schedule).count(), 20);
        assert_eq!(open.iter().filter(|run| run.schedule == bench.schedule).count(), 1);
    }
}
