//! What people may ask of a schedule.
//!
//! Owns: the bodies of `POST` and `PATCH`, every reason to refuse them, and a run by hand. Never: makes a job by itself (the runner does).
//! A crash here costs one answer; a run by hand that it cut off is taken over by the ticker.

use actix_web::web;
use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::Value;
use shared::error::Code;
use utoipa::ToSchema;

use super::claims;
use super::plan::{CatchUp, Overlap, Timetable};
use super::runner::{self, Made};
use super::store::{self, cause};
use super::ticker;
use crate::app::App;
use crate::http::idempotency::Idempotency;
use crate::http::reply::Error;
use crate::jobs;
use crate::jobs::record::Job;
use crate::store::Error as StoreError;
use crate::store::entities::{schedule_runs as runs, schedules};

/// Longest name in characters.
const NAME: usize = 200;

/// A new schedule.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ScheduleCreate, example = json!({
    "name": "nightly web", "cron": "30 2 * * 1-5", "timezone": "Europe/Berlin",
    "job": {"type": "export", "provider": "local", "vm_name": "web-server-01", "format": "qcow2", "options": {"compress": true}},
    "overlap": "skip", "catch_up": "once"
}))]
pub struct Create {
    /// What people call it; several may bear one name.
    pub name: String,
    /// Minute, hour, day of month, month, day of week; or `@hourly`, `@daily`, `@weekly`, `@monthly`, `@yearly`. Sunday is 0 and 7.
    #[schema(example = "30 2 * * 1-5")]
    pub cron: String,
    /// IANA name; default `UTC`.
    #[schema(example = "Europe/Berlin")]
    pub timezone: Option<String>,
    /// The body of `POST /jobs`; it is checked now and again at each run.
    #[schema(value_type = jobs::service::Create)]
    pub job: Value,
    /// Default true.
    pub enabled: Option<bool>,
    /// `skip` (default), `queue` or `allow`: what becomes of a run while the job of the last one is not finished.
    #[schema(example = "skip")]
    pub overlap: Option<String>,
    /// `skip` (default) or `once`: what becomes of due times at which no controller was there.
    #[schema(example = "once")]
    pub catch_up: Option<String>,
    /// Sets `options.carbon_aware` of its jobs; default false.
    pub carbon_aware: Option<bool>,
}

/// What shall be another way; what is absent stays.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(as = ScheduleUpdate, example = json!({"enabled": false}))]
pub struct Update {
    /// What people call it.
    pub name: Option<String>,
    /// The expression.
    pub cron: Option<String>,
    /// IANA name.
    pub timezone: Option<String>,
    /// The whole job.
    #[schema(value_type = Option<jobs::service::Create>)]
    pub job: Option<Value>,
    /// Switched on, its times count from now on.
    pub enabled: Option<bool>,
    /// `skip`, `queue` or `allow`.
    pub overlap: Option<String>,
    /// `skip` or `once`.
    pub catch_up: Option<String>,
    /// Sets `options.carbon_aware` of its jobs.
    pub carbon_aware: Option<bool>,
}

/// Makes a schedule.
pub async fn create(app: &App, owner: &str, wanted: Create, key: Option<(&Idempotency, Show)>) -> Result<schedules::Model, Error> {
    let now = shared::clock::now();
    let row = schedules::Model {
        id: format!("sched-{}", shared::ids::random_hex::<8>()),
        name: String::new(),
        folded: String::new(),
        cron: String::new(),
        timezone: "UTC".to_owned(),
        job: String::new(),
        provider: String::new(),
        provider_kind: String::new(),
        enabled: true,
        overlap: Overlap::Skip.word().to_owned(),
        catch_up: CatchUp::Skip.word().to_owned(),
        carbon_aware: false,
        next_run: None,
        last_run: None,
        last_status: None,
        last_job: None,
        version: 0,
        turn: 0,
        created_by: owner.to_owned(),
        created_at: now.timestamp_millis(),
        updated_at: now.timestamp_millis(),
    };
    let all = Update {
        name: Some(wanted.name),
        cron: Some(wanted.cron),
        timezone: wanted.timezone,
        job: Some(wanted.job),
        enabled: wanted.enabled,
        overlap: wanted.overlap,
        catch_up: wanted.catch_up,
        carbon_aware: wanted.carbon_aware,
    };
    let row = apply(app, row, all, now).await?;
    let answer = match key {
        Some((key, show)) => Some(key.row(201, &location(&row.id), show(row.clone())?)),
        None => None,
    };
    store::insert(&app.store, row.clone(), answer).await?;
    Ok(row)
}

/// How a schedule's answer is written, for the row of its key.
pub type Show = fn(schedules::Model) -> Result<String, Error>;

/// Where a schedule is.
pub fn location(id: &str) -> String {
    format!("/api/v1/schedules/{id}")
}

/// Changes a schedule.
pub async fn update(app: &App, row: schedules::Model, wanted: Update) -> Result<schedules::Model, Error> {
    let row = apply(app, row, wanted, shared::clock::now()).await?;
    if store::update(&app.store, row.clone()).await? {
        return Ok(row);
    }
    by_id(app, &row.id).await?;
    Err(Error::new(Code::Conflict, "the schedule changed at the same moment; look again and repeat"))
}

/// A row with the changes, all of them checked.
async fn apply(app: &App, mut row: schedules::Model, wanted: Update, now: DateTime<Utc>) -> Result<schedules::Model, Error> {
    // Only what somebody changes is checked: a schedule whose VM is gone can still be switched off or renamed.
    let job_changes = wanted.job.is_some() || wanted.carbon_aware.is_some_and(|aware| aware != row.carbon_aware);
    let times_change = changes_times(&row, &wanted);
    if let Some(name) = wanted.name {
        row.name = name_of(&name)?;
    }
    if let Some(cron) = wanted.cron {
        row.cron = cron;
    }
    if let Some(zone) = wanted.timezone {
        row.timezone = zone;
    }
    if let Some(overlap) = wanted.overlap {
        row.overlap = word("overlap", Overlap::ALL, overlap)?;
    }
    if let Some(catch_up) = wanted.catch_up {
        row.catch_up = word("catch_up", CatchUp::ALL, catch_up)?;
    }
    row.enabled = wanted.enabled.unwrap_or(row.enabled);
    row.carbon_aware = wanted.carbon_aware.unwrap_or(row.carbon_aware);
    if times_change {
        let timetable = Timetable::of(&row.cron, &row.timezone).map_err(|e| Error::bad_request(e.to_string()))?;
        let next = timetable.next_after(now).ok_or_else(|| Error::bad_request("cron does not come before the year 9999"))?;
        row.next_run = row.enabled.then(|| next.timestamp_millis());
    }
    if let Some(job) = wanted.job {
        if !job.is_object() {
            return Err(Error::bad_request("job must be an object: the body of POST /jobs"));
        }
        row.job = job.to_string();
    }
    if job_changes {
        (row.provider, row.provider_kind) = check_job(app, &row).await?;
    }
    row.folded = crate::store::fold(&format!("{}\n{}", row.name, row.id));
    row.updated_at = now.timestamp_millis();
    Ok(row)
}

/// Whether its due times are others than before. What is given as it was drops none that has come and has no row yet.
fn changes_times(row: &schedules::Model, wanted: &Update) -> bool {
    // A new one has no times yet.
    row.cron.is_empty()
        || wanted.cron.as_ref().is_some_and(|cron| *cron != row.cron)
        || wanted.timezone.as_ref().is_some_and(|zone| *zone != row.timezone)
        || wanted.enabled.is_some_and(|enabled| enabled != row.enabled)
}

/// The check of `POST /jobs`; answers the connection's name and kind.
async fn check_job(app: &App, row: &schedules::Model) -> Result<(String, String), Error> {
    let wanted = runner::wanted(&row.job, row.carbon_aware)?;
    let options = wanted.options.as_ref();
    if options.is_some_and(|options| options.dry_run == Some(true)) {
        return Err(Error::bad_request("job: `dry_run` answers a plan and makes no job; leave it out of a schedule"));
    }
    if options.is_some_and(|options| options.not_before.is_some()) {
        return Err(Error::bad_request("job: `not_before` is one point in time; a schedule's `cron` says when its jobs begin"));
    }
    if options.is_some_and(|options| options.deadline.is_some()) {
        return Err(Error::bad_request(
            "job: `deadline` is one point in time, and the jobs of a schedule begin again and again; leave it out",
        ));
    }
    let new = jobs::service::check(app, &row.created_by, wanted).await.map_err(|error| prefixed(&error))?;
    Ok((new.provider, new.provider_kind))
}

/// The same refusal, said of the field `job`.
fn prefixed(error: &Error) -> Error {
    let said = Error::new(error.code(), format!("job: {}", error.message()));
    if error.code() == Code::Unavailable { said.retry_after(5) } else { said }
}

fn name_of(name: &str) -> Result<String, Error> {
    let name = name.trim();
    let good = (1..=NAME).contains(&name.chars().count()) && !name.chars().any(char::is_control);
    if good {
        Ok(name.to_owned())
    } else {
        Err(Error::bad_request(format!("name must be 1 to {NAME} characters, none of them a control character")))
    }
}

fn word(field: &str, known: &[&str], value: String) -> Result<String, Error> {
    if known.contains(&value.as_str()) {
        return Ok(value);
    }
    let shown: String = value.chars().take(40).collect();
    Err(Error::bad_request(format!("{field} `{shown}` is unknown; known: {}", known.join(", "))))
}

/// A schedule by id; what is no id is no schedule.
pub async fn by_id(app: &App, id: &str) -> Result<schedules::Model, Error> {
    let hex = id.strip_prefix("sched-").unwrap_or_default();
    let is_id = (8..=32).contains(&hex.len()) && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    let row = if is_id { store::by_id(&app.store, id).await? } else { None };
    row.ok_or_else(|| Error::not_found(format!("no schedule `{}`; GET /schedules lists them", id.chars().take(60).collect::<String>())))
}

/// Runs a schedule now, whatever its times and its overlap say. A key makes it the same run when it is asked for again.
pub async fn run_now(app: &web::Data<App>, schedule: &schedules::Model, key: Option<&Idempotency>) -> Result<(runs::Model, Job), Error> {
    let runner = ticker::runner(app);
    let now = shared::clock::now();
    let id = key.map_or_else(runner::new_id, |key| format!("run-{}", key.id().chars().take(16).collect::<String>()));
    let run = runs::Model {
        id: id.clone(),
        schedule: schedule.id.clone(),
        due_at: now.timestamp_millis(),
        cause: cause::MANUAL.to_owned(),
        status: store::CLAIMED.to_owned(),
        claimed_by: Some(runner.me().to_owned()),
        missed: 0,
        job: None,
        reason: None,
        created_at: now.timestamp_millis(),
        started_at: None,
    };
    let run = insert(app, run).await?;
    let made = match &run.job {
        Some(job) => Made::Job(job.clone()),
        None if run.status == store::FAILED => {
            return Err(Error::new(Code::Conflict, format!("the run of this key failed: {}", run.reason.unwrap_or_default())));
        }
        None => runner.make(schedule, &run, now).await?,
    };
    let job = match made {
        Made::Job(job) => job,
        Made::Refused(error) => return Err(prefixed(&error)),
        // The ticker goes on with it; who asked learns that.
        Made::NotNow(error) => return Err(Error::new(error.code(), format!("{}; run `{id}` waits for it", error.message())).retry_after(5)),
    };
    let run = claims::by_id(&app.store, &id).await?.unwrap_or(run);
    let job = jobs::store::load(&app.store, &job).await?.ok_or_else(|| Error::internal("the job just made is not there"))?;
    Ok((run, app.queue.board().freshen(job)))
}

/// Inserts a run by hand, a moment later where its millisecond is taken; one that is there already under its id is that one.
async fn insert(app: &App, mut run: runs::Model) -> Result<runs::Model, Error> {
    for _ in 0..100 {
        match claims::insert(&app.store, run.clone()).await {
            Ok(()) => return Ok(run),
            Err(StoreError::Conflict(_)) => {
                if let Some(first) = claims::by_id(&app.store, &run.id).await? {
                    return Ok(first);
                }
                run.due_at = run.due_at.saturating_add(1);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(Error::new(Code::Conflict, "too many runs of this schedule were asked for at once"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::schedules::tests::schedule;

    #[test]
    fn what_is_given_as_it_was_changes_no_due_time() {
        let row = schedule("0 2 * * *", Overlap::Skip, CatchUp::Skip, shared::clock::now());
        let changes = |json: Value| changes_times(&row, &serde_json::from_value(json).unwrap());
        for same in [serde_json::json!({"enabled": true}), serde_json::json!({"cron": "0 2 * * *", "timezone": "UTC", "name": "x"})] {
            assert!(!changes(same));
        }
        for other in
            [serde_json::json!({"enabled": false}), serde_json::json!({"cron": "@daily"}), serde_json::json!({"timezone": "Europe/Berlin"})]
        {
            assert!(changes(other));
        }
        let new = schedules::Model { cron: String::new(), ..row.clone() };
        assert!(changes_times(&new, &Update::default()));
    }
}
