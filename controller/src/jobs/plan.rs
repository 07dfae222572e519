//! `dry_run`: what a job would do, without doing it.
//!
//! Owns: the plan: steps, sizes, time by the agent's measured rates, room at the destination as the agent sees it now, warnings.
//! Never: makes a row, a folder or a file; guesses a time where nothing was measured. A crash here costs one answer.

use proto::v1;
use proto::v1::browse::Question;
use serde::Serialize;
use shared::migrate::{Adapt, Cutover};
use shared::options::{Format, JobType, Options};
use utoipa::ToSchema;

use super::places::{self, Disk, Found, Room};
use super::record::{NewJob, rate_word};
use super::{sources, store};
use crate::app::App;
use crate::http::reply::Error;
use crate::jobs::core::Outbox;

/// A stage of the job.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = PlanStep)]
pub struct Step {
    /// As the job will show it.
    #[schema(example = "copying")]
    pub stage: &'static str,
    /// In words.
    pub does: String,
    /// Bytes that it moves; null where it moves none or nobody knows how many.
    pub bytes: Option<u64>,
}

/// What a job would do.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = Plan, example = json!({
    "dry_run": true, "type": "export", "provider": "local", "vm_name": "web-server-01", "format": "qcow2", "agent": "local",
    "steps": [
        {"stage": "preparing", "does": "open 1 disk of web-server-01", "bytes": null},
        {"stage": "copying", "does": "read the data, hash it and write it as qcow2", "bytes": 5368709120u64},
        {"stage": "verifying", "does": "read the output back from the disk and compare every block", "bytes": 5368709120u64},
        {"stage": "publishing", "does": "sign the manifest and give the folder its name", "bytes": null}
    ],
    "disks": [{"name": "disk-0", "capacity": 10737418240u64, "data_bytes": 5368709120u64, "format": "vmdk"}],
    "capacity_bytes": 10737418240u64, "data_bytes": 5368709120u64,
    "destination": {"root": "exports", "path": "exports", "free_bytes": 64424509440u64, "total_bytes": 107374182400u64},
    "needed_bytes": 5368709120u64, "fits": true, "files": ["web-server-01.qcow2", "web-server-01.qcow2.manifest.json"],
    "estimated_seconds": 15, "estimated_duration": "15s", "warnings": [], "options": {}
}))]
pub struct Plan {
    /// Always true: nothing was made.
    pub dry_run: bool,
    /// What kind of work.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Name of the connection; null where a file is read.
    pub provider: Option<String>,
    /// The VM's name, or what the output is named after.
    pub vm_name: String,
    /// The file that is read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Output format.
    pub format: &'static str,
    /// Name of the agent that would do it.
    pub agent: String,
    /// In order.
    pub steps: Vec<Step>,
    /// What is read.
    pub disks: Vec<Disk>,
    /// Bytes of all disks.
    pub capacity_bytes: u64,
    /// Bytes of their data; null where counting would have taken too long.
    pub data_bytes: Option<u64>,
    /// Where it would be written; null for `verify`.
    pub destination: Option<Room>,
    /// Most bytes that the output takes: its data; what compresses takes less. Null where that is not known, and for `verify`.
    pub needed_bytes: Option<u64>,
    /// Whether that is free now; null where it is not known.
    pub fits: Option<bool>,
    /// Files that the job would make in a folder of its own.
    pub files: Vec<String>,
    /// By what was measured at this agent; null before the first measurement.
    pub estimated_seconds: Option<u64>,
    /// The same in words.
    pub estimated_duration: Option<String>,
    /// What somebody should know before.
    pub warnings: Vec<String>,
    /// What lies on the disks, as /vms/browse tells it; null where nobody could look, and for `verify`.
    #[schema(value_type = Option<Object>)]
    pub guest: Option<shared::guest::Guest>,
    /// Why nobody could look.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_unknown: Option<String>,
    /// As the job would have them.
    #[schema(value_type = Object)]
    pub options: Options,
}

/// Makes the plan of a checked job. Its agent must be connected.
pub async fn of(app: &App, new: NewJob) -> Result<Plan, Error> {
    let found = match app.vault.locate(&new.source) {
        Ok(_) => of_upload(app, &new).await?,
        Err(_) => places::look(app, &new.owner, question(&new)).await?,
    };
    let rates = store::load_rates(&app.store).await?;
    let rate = rates.get(&new.owner).and_then(|rates| rates.get(rate_word(new.kind, new.format))).copied().unwrap_or_default();
    let capacity = found.capacity();
    let by_capacity = || rate.seconds(capacity).filter(|_| capacity > 0);
    let measured = found.data_bytes.and_then(|data| rate.seconds_of_data(data)).or_else(by_capacity);
    let limited = new.options.bandwidth_limit.and_then(|limit| found.data_bytes.map(|data| data / limit.max(1)));
    let seconds = measured.map(|seconds| seconds.max(limited.unwrap_or(0)));
    let agent = app.fleet.name(&new.owner);
    let needed = found.data_bytes.filter(|_| new.kind != JobType::Verify);
    let fits = needed.zip(found.destination.as_ref()).map(|(needed, room)| needed <= room.free_bytes);
    let mut warnings = new.notes.clone();
    warnings.extend(doubts(&new, &found, fits, seconds, &agent));
    let steps = steps(&new, &found);
    let manifests: Vec<String> = manifests(new.format, &found.files);
    Ok(Plan {
        dry_run: true,
        kind: new.kind.word(),
        provider: (!new.provider.is_empty()).then_some(new.provider),
        vm_name: new.vm_name,
        source: (!new.source.is_empty()).then_some(new.source),
        format: new.format.word(),
        agent,
        steps,
        capacity_bytes: capacity,
        data_bytes: found.data_bytes,
        destination: found.destination,
        needed_bytes: needed,
        fits,
        files: if new.kind == JobType::Verify { Vec::new() } else { found.files.into_iter().chain(manifests).collect() },
        disks: found.disks,
        estimated_seconds: seconds,
        estimated_duration: seconds.map(shared::clock::duration_words),
        warnings,
        guest: found.guest,
        guest_unknown: found.guest_unknown,
        options: new.options,
    })
}

/// What can be said of an upload before an agent has fetched it: where it would go.
async fn of_upload(app: &App, new: &NewJob) -> Result<Found, Error> {
    let destination = match new.kind {
        JobType::Verify => None,
        JobType::Import => Some(places::IMAGES.to_owned()),
        _ => Some(new.options.destination.clone().unwrap_or_else(|| places::EXPORTS.to_owned())),
    };
    let mut found = Found { vm: new.vm_name.clone(), source: new.source.clone(), ..Found::default() };
    if let Some(path) = destination {
        let room = app.fleet.ask(&new.owner, Question::FreeSpace(path)).await?;
        found.destination = serde_json::from_value(room).ok();
    }
    Ok(found)
}

fn question(new: &NewJob) -> v1::Inspect {
    let mut question = sources::question(new.kind, &new.source, new.format, &new.options);
    question.count = true;
    question.guest = new.kind != JobType::Verify;
    if new.source.is_empty() {
        let connection =
            v1::Connection { name: new.provider.clone(), kind: new.provider_kind.clone(), path: new.provider_path.clone(), account: None };
        question.connection = Some(connection);
        question.vm_id.clone_from(&new.vm_id);
    } else if new.kind == JobType::Import {
        question.name.clone_from(&new.vm_name);
    }
    question
}

fn compresses(new: &NewJob) -> bool {
    matches!(new.format, Format::Vmdk | Format::Ova | Format::Ovf) || (new.format == Format::Qcow2 && new.options.compress == Some(true))
}

fn doubts(new: &NewJob, found: &Found, fits: Option<bool>, seconds: Option<u64>, agent: &str) -> Vec<String> {
    let mut doubts = Vec::new();
    if fits == Some(false) {
        let (needed, free) = (found.data_bytes.unwrap_or(0), found.destination.as_ref().map_or(0, |room| room.free_bytes));
        let hope = if compresses(new) { "; compressed it may fit" } else { ": the job would fail" };
        doubts.push(format!("{} MiB of data and {} MiB free at the destination{hope}", needed.div_ceil(1 << 20), free >> 20));
    }
    if found.disks.is_empty() {
        doubts.push(
            "an upload is opened when its agent has fetched it: its disks and the names of the files are not known before".to_owned(),
        );
    } else if found.data_bytes.is_none() {
        doubts.push("the data was not counted: that would have taken too long".to_owned());
    }
    if seconds.is_none() {
        doubts.push(format!("no estimate: nothing like it was measured at agent {agent} yet"));
    }
    if new.kind == JobType::Verify && found.manifest.is_none() {
        doubts.push("there is no manifest beside it: its structure would be checked, its content compared with nothing".to_owned());
    }
    if new.kind != JobType::Verify && !new.options.verifies() {
        doubts.push("verify is false: the output would not be read back".to_owned());
    }
    doubts
}

fn steps(new: &NewJob, found: &Found) -> Vec<Step> {
    let step = |stage, does: String, bytes| Step { stage, does, bytes };
    let disks = if found.disks.len() == 1 { "1 disk".to_owned() } else { format!("{} disks", found.disks.len()) };
    let subject = if new.source.is_empty() { &new.vm_name } else { &new.source };
    let mut steps = Vec::new();
    if new.options.power_off == Some(true) && new.source.is_empty() {
        steps.push(step("preparing", format!("shut down {subject}, where it runs, by asking its guest"), None));
    }
    let calm = if new.options.quiesce == Some(true) && new.source.is_empty() {
        "; where it runs, its guest freezes its file systems for that moment"
    } else {
        ""
    };
    steps.push(step("preparing", format!("open {disks} of {subject}{calm}"), None));
    if new.kind == JobType::Verify {
        let does = match &found.manifest {
            Some(manifest) => format!("check the signature of {manifest}, and every block and file against it"),
            None => "check the structure, read every block, take the digests".to_owned(),
        };
        steps.push(step("verifying", does, found.data_bytes));
        return steps;
    }
    steps.push(match new.kind {
        JobType::Backup => {
            let does = "read what changed since the newest restore point in the destination, all of it where there is none";
            step("copying", does.to_owned(), None)
        }
        _ => step("copying", format!("read the data, hash it and write it as {}", new.format), found.data_bytes),
    });
    if new.options.verifies() {
        steps.push(step("verifying", "read the output back from the disk and compare every block".to_owned(), found.data_bytes));
    }
    if let Some(target) = &new.options.target {
        if let Some(warm) = &new.options.warm {
            let when = match warm.cutover {
                Cutover::Auto => format!("until at most {} s of downtime are to be expected", warm.max_downtime_seconds),
                Cutover::Manual => "until somebody says so".to_owned(),
            };
            let does = format!("copy what the running VM has changed, pass by pass, {when}; stop it, and copy the rest");
            steps.push(step("syncing", does, None));
        }
        if new.options.adapt != Some(Adapt::Never) {
            let does = "make the guest ready for its new hardware with virt-v2v-in-place, on an overlay over the verified disks, unless it is ready";
            steps.push(step("adapting", does.to_owned(), None));
        }
        let proof = new.options.boot_proof.clone().unwrap_or_default();
        if proof.enabled {
            let network = if proof.network { ", an address by DHCP and an answer to a ping" } else { "" };
            let does =
                format!("boot it apart from everything, on overlays, and wait {} s for a sign of life{network}", proof.timeout_seconds);
            steps.push(step("deploying", does, None));
        }
        if let Some(pool) = &target.wish.pool {
            steps.push(step("deploying", format!("copy the disks into the pool `{pool}` and read them back"), None));
        }
        let last = format!(
            "sign the manifest, give the folder its name, define `{}` at `{}`, sign the receipt",
            target.wish.name, target.connection
        );
        steps.push(step("publishing", last, None));
        return steps;
    }
    let last = match new.kind {
        JobType::Export | JobType::Backup if new.options.power_off == Some(true) => {
            "sign the manifest and give the folder its name; switch the VM on again, where it ran".to_owned()
        }
        JobType::Import => format!("sign the manifest and put it into the catalogue as {}", new.vm_name),
        _ => "sign the manifest and give the folder its name".to_owned(),
    };
    steps.push(step("publishing", last, None));
    steps
}

/// One for each file of a disk, one for a package.
fn manifests(format: Format, files: &[String]) -> Vec<String> {
    let of = |name: &String| format!("{name}.manifest.json");
    match format {
        Format::Ova | Format::Ovf => files.first().map(of).into_iter().collect(),
        _ => files.iter().map(of).collect(),
    }
}
