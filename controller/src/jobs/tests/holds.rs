//! Waiting for a time and for the grid: by the clock, over a restart, under a person's hands, never past the deadline.

use super::*;
use crate::jobs::footprint::{Grid, Plan};
use crate::jobs::record::now_millis;
use crate::jobs::{holds, view};

fn grid(intensity: f64) -> Grid {
    Grid { zone: "DE".into(), source: "electricity-maps".into(), estimated: false, intensity, kilowatts: 0.3 }
}

fn plan(start: i64) -> Plan {
    Plan { start, average: 100.0, at_once: 400.0 }
}

impl Bench {
    async fn submit_with(&mut self, options: Options) -> Job {
        let new = NewJob { options, ..self.new_job() };
        self.core.submit(new, None).await.unwrap()
    }

    async fn stage(&self, id: &str) -> &'static str {
        self.stored(id).await.state.public_stage()
    }
}

fn rfc3339(millis: i64) -> Option<String> {
    Some(view::time(millis))
}

#[actix_web::test]
async fn a_job_whose_time_has_not_come_waits_over_a_restart_and_starts_when_it_has() {
    let mut bench = Bench::new().await;
    bench.hello(&[]).await;
    let start = now_millis() + 60_000;
    let id = bench.submit_with(Options { not_before: rfc3339(start), ..Options::default() }).await.id;
    assert_eq!((bench.stage(&id).await, bench.take_assigned()), ("not_before", vec![]));
    let mut after = Bench::over(bench.store.clone()).await;
    after.hello(&[]).await;
    after.core.tick_holds(start - 1).await.unwrap();
    after.core.dispatch().await;
    assert_eq!((after.stage(&id).await, after.take_assigned()), ("not_before", vec![]));
    // A pause stands above it; what is resumed before its time waits on; resumed once more, it starts now.
    after.core.person(&id, Event::Pause, "").await.unwrap();
    after.core.tick_holds(start - 1).await.unwrap();
    assert_eq!(after.stage(&id).await, "paused");
    after.core.person(&id, Event::Resume, "").await.unwrap();
    assert_eq!(after.stage(&id).await, "not_before");
    let other = after.submit_with(Options { not_before: rfc3339(start), ..Options::default() }).await.id;
    after.core.person(&other, Event::Resume, "").await.unwrap();
    assert_eq!(after.take_assigned(), [(other.clone(), 1)]);
    after.core.tick_holds(start).await.unwrap();
    after.core.dispatch().await;
    assert_eq!(after.take_assigned(), [(id.clone(), 1)]);
    // Cancelled and tried again before its time, it waits again.
    let third = after.submit_with(Options { not_before: rfc3339(start), ..Options::default() }).await.id;
    after.core.person(&third, Event::Cancel, "").await.unwrap();
    after.core.person(&third, Event::Retry, "").await.unwrap();
    assert_eq!((after.stage(&third).await, after.take_assigned()), ("not_before", vec![]));
    // Without its agent it waits for the time first, then for the agent.
    after.core.agent_down("agent-a", after.session).await.unwrap();
    assert_eq!(after.stage(&third).await, "not_before");
    after.core.tick_holds(start).await.unwrap();
    assert_eq!(after.stage(&third).await, "waiting");
}

#[actix_web::test]
async fn a_carbon_aware_job_is_planned_parked_and_never_later_than_its_latest_start() {
    let mut bench = Bench::new().await;
    bench.hello(&[]).await;
    let deadline = now_millis() + 3_600_000;
    let options = Options { carbon_aware: Some(true), deadline: rfc3339(deadline), bandwidth_limit: Some(1 << 24), ..Options::default() };
    let job = bench.submit_with(options.clone()).await;
    let id = job.id.clone();
    // 1 GiB at 16 MiB a second are 64 s.
    let latest = deadline - 76_800;
    assert_eq!((bench.stage(&id).await, job.hold_until, holds::latest_start(&job)), ("carbon", Some(latest), latest));
    bench.core.hold(&id, plan(deadline), grid(400.0), "waits").await.unwrap();
    assert_eq!(bench.stored(&id).await.hold_until, Some(latest), "a plan behind the latest start is moved to it");
    let start = now_millis() + 600_000;
    bench.core.hold(&id, plan(start), grid(400.0), "waits").await.unwrap();
    let mut after = Bench::over(bench.store.clone()).await;
    after.hello(&[]).await;
    let stored = after.stored(&id).await;
    let shown = view::View::of(&stored, str::to_owned);
    let carbon = shown.carbon.unwrap();
    assert_eq!((shown.stage, stored.hold_until, carbon.zone.as_str(), carbon.planned_start), ("carbon", Some(start), "DE", rfc3339(start)));
    assert_eq!(after.take_assigned(), []);
    after.core.release(&id, plan(now_millis()), grid(90.0), "clean").await.unwrap();
    assert_eq!(after.take_assigned(), [(id.clone(), 1)]);
    after.progress(&id, 1, "copying", 50, 0).await;
    // Dirty again: parked without its checkpoint being thrown away, and the agent's late report is refused.
    after.take_sent();
    after.core.hold(&id, plan(start), grid(900.0), "parked").await.unwrap();
    assert_eq!((cancelled(&after.take_sent()), after.stage(&id).await), (Some((1, false)), "carbon"));
    let parked = after.stored(&id).await;
    assert_eq!((parked.state.strikes, parked.carbon.as_ref().unwrap().parks), (0, 1));
    assert_eq!(holds::latest_start(&parked), deadline - 57_600, "a quarter of the work is done");
    // Whatever the grid says: at the latest start it goes on.
    after.core.tick_holds(deadline - 57_601).await.unwrap();
    after.core.dispatch().await;
    assert_eq!(after.stage(&id).await, "preparing", "the planned start has passed, too");
    after.take_sent();
    // A person who resumes it means now, for good.
    let second = after.submit_with(options).await.id;
    after.core.person(&second, Event::Resume, "").await.unwrap();
    assert_eq!(after.take_assigned(), [(second.clone(), 1)]);
    after.progress(&second, 1, "copying", 50, 0).await;
    after.core.hold(&second, plan(start), grid(900.0), "parked").await.unwrap();
    assert_eq!(after.stage(&second).await, "copying");
    // No time to wait at all: it starts at once.
    let hasty = Options { carbon_aware: Some(true), deadline: rfc3339(now_millis() + 5_000), ..Options::default() };
    assert_eq!(after.submit_with(hasty).await.hold_until, None);
}

#[actix_web::test]
async fn a_deadline_that_passes_is_told_once_and_ends_nothing() {
    let mut bench = Bench::new().await;
    let deadline = now_millis() + 1000;
    let id = bench.submit_with(Options { deadline: rfc3339(deadline), ..Options::default() }).await.id;
    bench.core.tick_holds(deadline).await.unwrap();
    assert!(!bench.stored(&id).await.deadline_missed);
    bench.core.tick_holds(deadline + 1).await.unwrap();
    let mut after = Bench::over(bench.store.clone()).await;
    after.core.tick_holds(deadline + 2).await.unwrap();
    assert_eq!((after.stored(&id).await.deadline_missed, after.stage(&id).await), (true, "waiting"));
    let alerts = |bench: &Bench| bench.news.lock().unwrap().iter().filter(|kind| **kind == "alert").count();
    assert_eq!((alerts(&bench), alerts(&after)), (1, 0));
    bench.core.flush_logs().await;
    let lines = store::logs_after(&bench.store, &id, 0, 100).await.unwrap();
    assert!(lines.iter().any(|line| line.level == "warn" && line.message.contains("deadline")), "{lines:?}");
}
