//! What finished jobs left on their agents' disks: the manifest, the removal, and for how long it stays.
//!
//! Owns: these decisions. Never: removes what a job still writes, or what lies in an object store.
//! A crash here costs nothing: a removal that was cut off is finished by the next.

use std::collections::BTreeSet;
use std::time::Duration;

use proto::v1;
use proto::v1::browse::Question;
use serde_json::{Value, json};
use shared::error::Code;
use shared::job::Status;
use shared::options::JobType;

use super::body::Body;
use super::service::{self, Place};
use crate::app::App;
use crate::http::reply::Error;
use crate::jobs;
use crate::jobs::core::Outbox as _;
use crate::jobs::record::Job;
use crate::system::audit;

/// Where an output goes that names no destination.
const EXPORTS: &str = "exports";
/// How long an agent may take to see that nobody runs from an export, and to remove it.
const ASKING: Duration = Duration::from_secs(60);
/// What a job's result says once its files are gone.
const REMOVED: &str = "removed_at";
/// Whose files go when their time is over. What was imported is the catalogue's, what was migrated a VM's: these stay.
const RETIRED: [JobType; 3] = [JobType::Export, JobType::Convert, JobType::Backup];
/// Largest manifest that is served.
const LARGEST_MANIFEST: u64 = 256 << 20;

/// A job that ended well, with its result; else why it has no files.
fn published(job: &Job) -> Result<&Value, Error> {
    is_over(job)?;
    let result = job.result.as_ref().filter(|_| job.state.status == Status::Completed);
    let result = result.filter(|_| job.kind != JobType::Verify);
    let result = result.ok_or_else(|| Error::not_found(format!("{} is {} and published nothing", job.id, job.state.status.public())))?;
    is_there(job, result).map(|()| result)
}

fn is_over(job: &Job) -> Result<(), Error> {
    if job.state.status.is_final() {
        return Ok(());
    }
    Err(Error::new(Code::Conflict, format!("{} is not finished; DELETE /jobs/{} cancels it", job.id, job.id)))
}

fn is_there(job: &Job, result: &Value) -> Result<(), Error> {
    match result.get(REMOVED).and_then(Value::as_str) {
        Some(when) => Err(Error::not_found(format!("the files of {} were removed at {when}", job.id))),
        None => Ok(()),
    }
}

/// The result of a job whose files may go: what it published, or what a migration that failed has published or kept for a retry.
fn removable(job: &Job) -> Result<Value, Error> {
    if job.kind != JobType::Migrate || job.state.status != Status::Failed {
        return published(job).cloned();
    }
    let result = job.result.clone().filter(Value::is_object).unwrap_or_else(|| json!({}));
    is_there(job, &result).map(|()| result)
}

fn place_of(app: &App, job: &Job) -> Result<Place, Error> {
    let id = job.state.agent.clone().ok_or_else(|| Error::not_found(format!("{} ran at no agent", job.id)))?;
    Ok(Place::Agent { name: app.fleet.name(&id), id })
}

/// The signed manifest of a job's output: of the first file, or of the one that `file` names.
pub async fn manifest(app: &App, job: &Job, file: Option<&str>) -> Result<(u64, Body), Error> {
    let result = published(job)?;
    let all = result.get("manifests").and_then(Value::as_array).into_iter().flatten().chain(result.get("manifest"));
    let all: Vec<&str> = all.filter_map(Value::as_str).collect();
    let bare = |path: &&str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let path = match file {
        None => all.first(),
        Some(file) => all.iter().find(|path| bare(path) == file || bare(path) == format!("{file}.manifest.json")),
    };
    let Some(path) = path.copied() else {
        let known = all.iter().map(bare).collect::<Vec<_>>().join(", ");
        return Err(Error::not_found(match known.is_empty() {
            true => format!("{} has no manifest", job.id),
            false => format!("{} has no such manifest; it has: {known}", job.id),
        }));
    };
    let place = place_of(app, job)?;
    let entry = service::file(app, &place, path).await?;
    if entry.size > LARGEST_MANIFEST {
        return Err(Error::new(Code::Unprocessable, format!("{} has {} bytes; download it", entry.path, entry.size)));
    }
    Ok((entry.size, service::open(app, &place, path, &entry, 0, entry.size).await?))
}

/// Removes a job's files from its agent's disk, unless a VM runs from them; the job and its result stay, and say when that was.
pub async fn remove(app: &App, caller: &str, job: &Job) -> Result<(), Error> {
    let result = removable(job)?;
    if job.kind == JobType::Import {
        let message = format!("what {} imported belongs to the catalogue of its agent, and is no export", job.id);
        return Err(Error::new(Code::Unprocessable, message));
    }
    still_run_from(app, job, &result).await?;
    let destination = job.options.destination.as_deref().unwrap_or(EXPORTS);
    if destination.contains("://") {
        return Err(Error::not_built("removing an export from an object store"));
    }
    let Place::Agent { id, .. } = place_of(app, job)? else { return Err(Error::internal("an export lies at an agent")) };
    let act = audit::begin(&app.store, caller, "export.delete", &job.id).await?;
    let removed = remove_at(app, &id, job, destination, result).await;
    act.finish(&removed).await;
    match removed? {
        true => Ok(()),
        false => Err(Error::not_found(format!("the files of {} are not on the disk of its agent any more", job.id))),
    }
}

/// Refuses where a VM runs from these files, as far as the inventory knows. The agent asks the hypervisor itself.
async fn still_run_from(app: &App, job: &Job, result: &Value) -> Result<(), Error> {
    let (Some(uuid), Some(target)) = (result.pointer("/domain/uuid").and_then(Value::as_str), &job.options.target) else { return Ok(()) };
    let Ok(connection) = crate::providers::service::resolve(&app.store, &target.connection).await else { return Ok(()) };
    match crate::vms::service::resolve(&app.store, &connection, uuid).await {
        // Disks that were copied into a pool need no other files.
        Ok(found) if !found.vm.disks.iter().any(|disk| disk.source.split('/').any(|part| part == job.id)) => Ok(()),
        Ok(found) => {
            let message =
                format!("the files of {} are the disks of `{}` at `{}`; remove that first", job.id, found.vm.name, connection.name);
            Err(Error::new(Code::Conflict, message))
        }
        Err(e) if e.code() == Code::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

async fn remove_at(app: &App, agent: &str, job: &Job, destination: &str, mut result: Value) -> Result<bool, Error> {
    let target = job.options.target.as_ref().filter(|_| job.kind == JobType::Migrate);
    let domain_at = target.map(|target| target.path.clone()).unwrap_or_default();
    let question = v1::RemoveExport { job: job.id.clone(), destination: destination.to_owned(), domain_at };
    // The agent asks its hypervisors first.
    let answer = app.fleet.ask_within(agent, Question::RemoveExport(question), ASKING).await?;
    if let Some(result) = result.as_object_mut() {
        result.insert(REMOVED.to_owned(), shared::clock::rfc3339(shared::clock::now()).into());
    }
    jobs::store::save_result(&app.store, &job.id, &result).await?;
    Ok(answer.get("removed").and_then(Value::as_bool).unwrap_or(false))
}

/// Restore points that later ones lie over: they stay as long as these.
async fn lain_over(app: &App, agents: &[String]) -> Result<BTreeSet<String>, Error> {
    let (mut needed, mut behind) = (BTreeSet::new(), None);
    loop {
        let jobs = jobs::store::with_files(&app.store, &[JobType::Backup], agents.to_vec(), i64::MAX, behind, REMOVED).await?;
        let Some(last) = jobs.last() else { return Ok(needed) };
        behind = Some((last.finished_at.unwrap_or_default(), last.id.clone()));
        let parent = |job: &Job| job.result.as_ref()?.pointer("/restore_point/parent")?.as_str().map(str::to_owned);
        needed.extend(jobs.iter().filter_map(parent));
    }
}

/// Removes the files of jobs that ended longer ago than `age`, where their agents are connected. Answers how many.
pub async fn retire(app: &App, age: Duration) -> Result<usize, Error> {
    let before = shared::clock::now().timestamp_millis().saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
    let mut agents: Vec<String> = app.fleet.connected().into_iter().map(|agent| agent.id).collect();
    let (mut removed, mut behind) = (0, None);
    let needed = lain_over(app, &agents).await?;
    loop {
        let jobs = jobs::store::with_files(&app.store, &RETIRED, agents.clone(), before, behind, REMOVED).await?;
        // What could not be removed stands in nobody's way.
        let Some(last) = jobs.last() else { return Ok(removed) };
        behind = Some((last.finished_at.unwrap_or_default(), last.id.clone()));
        for job in jobs {
            let agent = job.state.agent.clone().unwrap_or_default();
            if app.is_draining() {
                return Ok(removed);
            }
            if !agents.contains(&agent) || needed.contains(&job.id) {
                continue;
            }
            match remove(app, "retention", &job).await {
                Ok(()) => removed += 1,
                // Somebody was quicker.
                Err(error) if error.code() == Code::NotFound => {}
                Err(error) => {
                    tracing::warn!(job = job.id, cause = %error, "an export whose time is over could not be removed yet");
                    // An agent that left or hangs is asked again by the next sweep.
                    if matches!(error.code(), Code::Unavailable | Code::BadGateway) {
                        agents.retain(|other| *other != agent);
                    }
                }
            }
        }
    }
}
