//! Checks before a job is made: what is asked for exists, is built, is allowed, and fits together.
//!
//! Owns: the body of `POST /jobs` and every reason to refuse it. Never: makes a job (the queue does), touches an agent's disk.
//! A crash here costs one answer.

use serde::Deserialize;
use shared::error::Code;
use shared::migrate::{Adapt, BootProofWish, WarmWish};
use shared::options::{Algorithm, Format, JobType, Options};
use shared::vm::Vm;
use utoipa::ToSchema;

use super::record::NewJob;
use super::{core, migrate, places, sources, state};
use crate::app::App;
use crate::http::reply::Error;
use crate::{providers, vms};

/// Longest path or name.
pub(super) const MOST: usize = 4096;

/// What a job shall do.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "type": "export", "provider": "local", "vm_name": "web-server-01", "format": "qcow2",
    "options": {"compress": true, "include_snapshots": false, "destination": "exports/"}
}))]
pub struct Create {
    /// `export` (VM → files); `convert` (file → file), `import` (file → a VM of the connection `images`) and `verify` (read an artifact again)
    /// name a `source`; `backup` (what changed since the newest restore point); `migrate` (VM → a VM at another hypervisor that has booted).
    #[serde(rename = "type")]
    #[schema(example = "export")]
    pub kind: Option<String>,
    /// Of an export: a connection's name, or its kind where just one of that kind is connected.
    #[schema(example = "local")]
    pub provider: Option<String>,
    /// Name, inventory path or id; of an import the name that the VM gets (default: the one that the source has).
    #[schema(example = "web-server-01")]
    pub vm_name: Option<String>,
    /// The file that `convert`, `import` and `verify` read: `ROOT/…` or absolute, inside a root of an agent; of a package the `.ova` or the
    /// `.ovf`. The format is the one that its name declares. `verify` takes a manifest as well.
    #[schema(example = "exports/job-5f0c2a9be1d34c77/web-server-01.qcow2")]
    pub source: Option<String>,
    /// Id or name of the agent whose file `source` is, where several have such a root.
    pub agent: Option<String>,
    /// `ova`, `ovf`, `vmdk`, `qcow2`, `raw`, `vhdx`, `vhd` or `vdi`; `verify` needs none.
    #[schema(example = "qcow2")]
    pub format: Option<String>,
    /// How.
    pub options: Option<Wishes>,
}

/// Options of a job.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(as = JobOptions)]
pub struct Wishes {
    /// Compress where the format can (vmdk, ova and ovf always do).
    pub compress: Option<bool>,
    /// `deflate`, or `zstd` for qcow2.
    #[schema(value_type = Option<String>, example = "zstd")]
    pub compression: Option<Algorithm>,
    /// 1–12 for deflate, 1–22 for zstd.
    pub level: Option<i64>,
    /// Deflate in qcow2 with distances of at most 4 KiB, as qemu-img writes it, for readers that know no other; slower. Levels 1–9.
    pub narrow_window: Option<bool>,
    /// Bring the snapshots along, each as a disk of its own; not with ova and ovf.
    pub include_snapshots: Option<bool>,
    /// Folder inside a root of the agent, `ROOT/…` or absolute; default: the root `exports`. An import goes into the root `images`. `s3://…` is
    /// not built yet.
    #[schema(example = "exports/night")]
    pub destination: Option<String>,
    /// Backups only: begin anew, over no earlier restore point; default false.
    pub full: Option<bool>,
    /// Read the output back and compare; default true.
    pub verify: Option<bool>,
    /// Have the guest of a running VM shut down before it is read (within 120 s, or the job fails: nobody pulls the plug); default false. When
    /// the job has ended the VM is switched on again, unless it was migrated well. Not with `warm`, which stops it by itself.
    pub power_off: Option<bool>,
    /// Have the guest of a running VM flush and freeze its file systems for the moment that is read, by VMware Tools or the QEMU guest agent;
    /// default false. Where that cannot be, the job fails: it never becomes crash-consistent silently. `result.consistency` says what was:
    /// `off`, `crash-consistent` or `application-consistent`.
    pub quiesce: Option<bool>,
    /// Bytes a second.
    pub bandwidth_limit: Option<i64>,
    /// 0–100, higher first; default 50.
    pub priority: Option<i64>,
    /// Not to begin before this time, RFC 3339; `resume` begins at once.
    #[schema(example = "2025-06-15T22:00:00Z")]
    pub not_before: Option<String>,
    /// To be done by this time, RFC 3339. One that is missed ends nothing: the job goes on, its log and an alert say so.
    #[schema(example = "2025-06-16T06:00:00Z")]
    pub deadline: Option<String>,
    /// Wait for a clean grid, within the deadline (where none is named: within 24 h).
    pub carbon_aware: Option<bool>,
    /// Migrations only: where the VM goes. Default: the only connection of kind `libvirt`, all else as at the source.
    pub target: Option<migrate::Wanted>,
    /// Migrations only: whether the guest is made ready for its new hardware, by virt-v2v-in-place: `auto` (default: unless it is seen to be
    /// ready as it is), `always` or `never`.
    #[schema(value_type = Option<String>, example = "auto")]
    pub adapt: Option<Adapt>,
    /// Migrations only: `true` (default), `false`, or `{"enabled", "sign", "timeout_seconds", "network"}`. The guest is started apart from
    /// everything and must show a sign of life on its serial console (`sign`: a text; default: a login prompt) or through its guest agent,
    /// within `timeout_seconds` (300); with `network` also get an address by DHCP and answer a ping.
    #[schema(value_type = Option<Object>, example = json!({"sign": "login:", "timeout_seconds": 300}))]
    pub boot_proof: Option<BootProofWish>,
    /// Migrations only: `true`, `false` (default), or `{"max_downtime_seconds", "cutover"}`. The VM runs on while it is copied, and what it
    /// changes follows in passes; it is stopped for the last one, once the downtime to expect is at most `max_downtime_seconds` (30), or, with
    /// `cutover: "manual"`, at `POST /jobs/{id}/cutover`. Where the new VM is not made, the old one goes on.
    #[schema(value_type = Option<Object>, example = json!({"max_downtime_seconds": 30, "cutover": "auto"}))]
    pub warm: Option<WarmWish>,
    /// Answers 200 with the plan and makes nothing.
    pub dry_run: Option<bool>,
}

/// A queue's refusal as an answer.
impl From<core::Error> for Error {
    fn from(error: core::Error) -> Self {
        match error {
            core::Error::NotFound(id) => Error::not_found(format!("no job `{id}`; GET /jobs lists them")),
            core::Error::Refused(_) | core::Error::Raced => Error::new(Code::Conflict, error.to_string()),
            core::Error::Draining | core::Error::Gone | core::Error::Away(_) => {
                Error::new(Code::Unavailable, error.to_string()).retry_after(5)
            }
            core::Error::Store(error) => error.into(),
        }
    }
}

/// Checks a request and makes of it what the queue takes.
pub async fn check(app: &App, caller: &str, wanted: Create) -> Result<NewJob, Error> {
    match job_type(wanted.kind.as_deref())? {
        kind @ (JobType::Export | JobType::Backup | JobType::Migrate) => export(app, caller, kind, wanted).await,
        kind @ (JobType::Convert | JobType::Import | JobType::Verify) => sources::check(app, caller, kind, wanted).await,
    }
}

/// An export, a backup, which is one over an earlier one, or a migration, which begins with one.
async fn export(app: &App, caller: &str, kind: JobType, wanted: Create) -> Result<NewJob, Error> {
    if wanted.source.is_some() {
        return Err(Error::bad_request(
            "`source` is for convert, import and verify; exports, backups and migrations name `provider` and `vm_name`",
        ));
    }
    let is_backup = kind == JobType::Backup;
    let format = match kind {
        JobType::Migrate => migrate::format(wanted.format.as_deref())?,
        JobType::Backup if wanted.format.is_none() => Format::Qcow2,
        _ => output_format(wanted.format.as_deref())?,
    };
    let mut wishes = wanted.options.unwrap_or_default();
    if is_backup {
        check_backup(format, &mut wishes)?;
    }
    let mut notes = Vec::new();
    let provider = required("provider", wanted.provider, "a connection's name or kind; GET /providers lists them")?;
    let vm_name = required("vm_name", wanted.vm_name, "a VM's name, path or id; GET /vms/list lists them")?;
    let connection = providers::service::resolve(&app.store, &provider).await?;
    if is_backup && connection.kind == "local" {
        return Err(Error::not_built(format!("{kind} from `{}`", connection.kind)));
    }
    let found = vms::service::resolve(&app.store, &connection, &vm_name).await?;
    if !found.vm.problem.is_empty() {
        return Err(Error::new(Code::BadImage, format!("`{}` cannot be exported: {}", found.vm.name, found.vm.problem)));
    }
    if found.vm.disks.is_empty() {
        return Err(Error::new(Code::Unprocessable, format!("`{}` has no disks", found.vm.name)));
    }
    let plan = match kind {
        JobType::Migrate => Some(migrate::check(app, &connection, &found.vm, &mut wishes, &mut notes).await?),
        _ => None,
    };
    let mut options = options(kind, wishes, format, &mut notes)?;
    if plan.as_ref().is_some_and(|plan| plan.warm.is_some()) && format != Format::Qcow2 {
        return Err(Error::new(Code::Unprocessable, format!("a warm migration is made of qcow2 layers: leave `format` out, not {format}")));
    }
    if let Some(plan) = plan {
        (options.target, options.adapt, options.boot_proof) = (Some(plan.target), Some(plan.adapt), Some(plan.boot_proof));
        options.warm = plan.warm;
    }
    if connection.kind == "vsphere" {
        check_vsphere(&found.vm, &options)?;
    } else if connection.kind == "libvirt" {
        check_libvirt(&connection.path, &found.vm, &options)?;
    }
    state::check(kind, &connection.kind, &found.vm, &options, &mut notes)?;
    if options.include_snapshots == Some(true) && found.vm.snapshots == 0 {
        notes.push(format!("include_snapshots adds nothing: {} has no snapshots", found.vm.name));
    }
    places::check_agent(app, &connection, wanted.agent.as_deref(), format, options.destination.as_deref()).await?;
    Ok(NewJob {
        kind,
        capacity: found.vm.disks.iter().fold(0u64, |sum, disk| sum.saturating_add(disk.capacity)),
        provider: connection.name,
        provider_kind: connection.kind,
        provider_path: connection.path,
        owner: connection.agent_id,
        vm_id: found.vm.id,
        vm_name: found.vm.name,
        source: String::new(),
        format,
        options,
        created_by: caller.to_owned(),
        notes,
    })
}

/// What a restore point is: qcow2, compressed, of one state.
fn check_backup(format: Format, wishes: &mut Wishes) -> Result<(), Error> {
    let refused = |message: String| Err(Error::new(Code::Unprocessable, message));
    if format != Format::Qcow2 {
        return refused(format!(
            "a restore point is qcow2, one over the other: leave `format` out; for {format} convert a point (`source`: its folder)"
        ));
    }
    if wishes.compress == Some(false) {
        return refused("a restore point is always compressed: leave `compress` out".to_owned());
    }
    if wishes.include_snapshots == Some(true) {
        return refused("a restore point is of one state of the VM: leave `include_snapshots` out".to_owned());
    }
    wishes.compress = Some(true);
    Ok(())
}

/// What an export from vSphere cannot do yet, told before a job is made. Its agent looks again when it begins.
fn check_vsphere(vm: &Vm, options: &Options) -> Result<(), Error> {
    if options.include_snapshots == Some(true) && vm.snapshots > 0 {
        return Err(Error::not_built(format!("include_snapshots of `{}`: at vSphere the present state is exported", clip(&vm.path))));
    }
    Ok(())
}

/// The same of libvirt.
fn check_libvirt(uri: &str, vm: &Vm, options: &Options) -> Result<(), Error> {
    if options.include_snapshots == Some(true) && vm.snapshots > 0 {
        return Err(Error::not_built(format!("include_snapshots of `{}`: of a domain the present state is exported", clip(&vm.path))));
    }
    if !uri.starts_with("qemu:///") {
        return Err(Error::not_built("reading the disks of another host: run an agent there and connect qemu:///system"));
    }
    Ok(())
}

pub(super) fn required(name: &str, value: Option<String>, what: &str) -> Result<String, Error> {
    match value.filter(|value| !value.trim().is_empty()) {
        Some(value) if value.len() <= MOST => Ok(value),
        Some(_) => Err(Error::bad_request(format!("`{name}` is longer than {MOST} bytes"))),
        None => Err(Error::bad_request(format!("`{name}` is missing: {what}"))),
    }
}

fn job_type(word: Option<&str>) -> Result<JobType, Error> {
    let known = || JobType::ALL.join(", ");
    let word = word.ok_or_else(|| Error::bad_request(format!("`type` is missing; known: {}", known())))?;
    match JobType::from_word(word) {
        Some(kind) => Ok(kind),
        None => Err(Error::bad_request(format!("type `{}` is unknown; known: {}", clip(word), known()))),
    }
}

pub(super) fn output_format(word: Option<&str>) -> Result<Format, Error> {
    let known = || Format::ALL.join(", ");
    let word = word.ok_or_else(|| Error::bad_request(format!("`format` is missing; known: {}", known())))?;
    match Format::from_word(word) {
        Some(format) => Ok(format),
        None => Err(Error::bad_request(format!("format `{}` is unknown; known: {}", clip(word), known()))),
    }
}

/// Numbers in range, combinations that make sense, and nothing that is silently left out.
pub(super) fn options(kind: JobType, wishes: Wishes, format: Format, notes: &mut Vec<String>) -> Result<Options, Error> {
    let unprocessable = |message: String| Err(Error::new(Code::Unprocessable, message));
    if wishes.dry_run == Some(true) {
        return Err(Error::bad_request("`dry_run` belongs to POST /jobs: leave it out here"));
    }
    migrate::only_here(&wishes)?;
    if wishes.full.is_some() && kind != JobType::Backup {
        return Err(Error::bad_request(format!("`full` is for backups; {kind} is always of all of it")));
    }
    if wishes.include_snapshots == Some(true) && matches!(format, Format::Ova | Format::Ovf) {
        return unprocessable(format!(
            "{format} describes one state of a VM: leave `include_snapshots` out, or choose a disk format, qcow2 say"
        ));
    }
    let priority = match wishes.priority {
        None => None,
        Some(priority) => match u8::try_from(priority) {
            Ok(priority) if priority <= 100 => Some(priority),
            _ => return Err(Error::bad_request(format!("priority must be 0 to 100, not {priority}"))),
        },
    };
    let bandwidth_limit = match wishes.bandwidth_limit {
        None => None,
        Some(limit) => match u64::try_from(limit) {
            Ok(limit) if limit > 0 => Some(limit),
            _ => return Err(Error::bad_request(format!("bandwidth_limit must be bytes a second, 1 or more, not {limit}"))),
        },
    };
    let algorithm = match format {
        format if format.is_plain() && (wishes.compression.is_some() || wishes.level.is_some()) => {
            return unprocessable(format!("{format} has no compression: leave `compression` and `level` out, or choose qcow2 or vmdk"));
        }
        Format::Qcow2 if wishes.compress == Some(false) && (wishes.compression.is_some() || wishes.level.is_some()) => {
            return unprocessable("`compress` is false, but `compression` or `level` is given; leave one of them out".to_owned());
        }
        Format::Qcow2 => wishes.compression.unwrap_or(Algorithm::Deflate),
        _ if wishes.compression == Some(Algorithm::Zstd) => {
            return unprocessable(format!("zstd is for qcow2 only; {format} is always deflate"));
        }
        _ => Algorithm::Deflate,
    };
    let narrow = wishes.narrow_window == Some(true);
    if narrow && (format != Format::Qcow2 || algorithm != Algorithm::Deflate || wishes.compress == Some(false)) {
        return unprocessable("narrow_window is for qcow2 with deflate; leave it out, or choose these".to_owned());
    }
    let highest = if algorithm == Algorithm::Zstd {
        22
    } else if narrow {
        9
    } else {
        12
    };
    let level = match wishes.level {
        None => None,
        Some(level) => match i32::try_from(level) {
            Ok(level) if (1..=highest).contains(&level) => Some(level),
            _ => return Err(Error::bad_request(format!("level must be 1 to {highest} for {algorithm}, not {level}"))),
        },
    };
    match (format, wishes.compress) {
        (format, Some(true)) if format.is_plain() => notes.push(format!("compress does nothing here: {format} has no compression")),
        (Format::Vmdk | Format::Ova | Format::Ovf, Some(false)) => {
            notes.push(format!("compress: false does nothing here: {format} is always deflate"))
        }
        _ => {}
    }
    let (not_before, deadline) = super::timing::check(wishes.not_before, wishes.deadline, shared::clock::now())?;
    // Naming an algorithm or a level means to use it.
    let implied = format == Format::Qcow2 && (wishes.compression.is_some() || level.is_some() || narrow);
    Ok(Options {
        compress: wishes.compress.or(implied.then_some(true)),
        compression: wishes.compression,
        level,
        narrow_window: wishes.narrow_window,
        include_snapshots: wishes.include_snapshots,
        destination: wishes.destination,
        full: wishes.full,
        verify: wishes.verify,
        power_off: wishes.power_off,
        quiesce: wishes.quiesce,
        bandwidth_limit,
        priority,
        not_before,
        deadline,
        carbon_aware: wishes.carbon_aware,
        target: None,
        adapt: None,
        boot_proof: None,
        warm: None,
    })
}

/// What somebody sent, as it stands in a message.
pub(super) fn clip(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn options_fit_the_format_or_are_refused_with_what_would_fit() {
        let check =
            |format, json: serde_json::Value| options(JobType::Export, serde_json::from_value(json).unwrap(), format, &mut Vec::new());
        let code = |format, json| check(format, json).unwrap_err().code();
        assert_eq!(check(Format::Qcow2, serde_json::json!({"compression": "zstd", "level": 19})).unwrap().compress, Some(true));
        assert_eq!(code(Format::Qcow2, serde_json::json!({"level": 19})), Code::BadRequest);
        assert_eq!(code(Format::Vmdk, serde_json::json!({"compression": "zstd"})), Code::Unprocessable);
        assert_eq!(code(Format::Raw, serde_json::json!({"compression": "deflate"})), Code::Unprocessable);
        assert!(check(Format::Raw, serde_json::json!({"compress": true})).is_ok());
        assert_eq!(code(Format::Qcow2, serde_json::json!({"compress": false, "compression": "zstd"})), Code::Unprocessable);
        assert_eq!(check(Format::Qcow2, serde_json::json!({"narrow_window": true, "level": 9})).unwrap().compress, Some(true));
        assert_eq!(code(Format::Qcow2, serde_json::json!({"narrow_window": true, "level": 10})), Code::BadRequest);
        assert_eq!(code(Format::Qcow2, serde_json::json!({"narrow_window": true, "compression": "zstd"})), Code::Unprocessable);
        assert_eq!(code(Format::Vmdk, serde_json::json!({"narrow_window": true})), Code::Unprocessable);
        for bad in [serde_json::json!({"priority": 101}), serde_json::json!({"priority": -1}), serde_json::json!({"bandwidth_limit": 0})] {
            assert_eq!(code(Format::Raw, bad), Code::BadRequest);
        }
        assert!(check(Format::Raw, serde_json::json!({"include_snapshots": true})).is_ok());
        assert_eq!(code(Format::Ova, serde_json::json!({"include_snapshots": true})), Code::Unprocessable);
        for elsewhere in
            [serde_json::json!({"target": {}}), serde_json::json!({"adapt": "never"}), serde_json::json!({"boot_proof": false})]
        {
            assert_eq!(code(Format::Raw, elsewhere), Code::BadRequest);
        }
        assert_eq!(code(Format::Qcow2, serde_json::json!({"full": true})), Code::BadRequest);
        // POST /jobs takes it off before it asks here.
        assert_eq!(code(Format::Raw, serde_json::json!({"dry_run": true})), Code::BadRequest);
        assert!(check(Format::Raw, serde_json::json!({"include_snapshots": false, "carbon_aware": false})).is_ok());
        let unknown = serde_json::from_value::<Wishes>(serde_json::json!({"colour": "red"})).unwrap_err().to_string();
        assert!(unknown.contains("colour") && unknown.contains("bandwidth_limit"), "{unknown}");
    }
}
