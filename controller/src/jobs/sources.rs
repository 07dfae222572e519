//! Checks of the jobs that read a file: `convert`, `import`, `verify`.
//!
//! Owns: which fields such a job takes and what its agent must say of the file before it is made. An agent that is away is not asked: its job
//! waits for it, as an export does, and fails there if the file is none.
//! Never: makes a job, reads the file. A crash here costs one answer.

use proto::v1;
use shared::error::Code;
use shared::ids::JobId;
use shared::options::{Format, JobType, Options};
use shared::vm::is_catalogue_name;

use super::places::{self, Found};
use super::record::NewJob;
use super::service::{Create, Wishes, clip, options, output_format, required};
use crate::app::App;
use crate::fleet::store::roots;
use crate::http::reply::Error;
use crate::providers;
use crate::store::entities::agents;

/// Checks a request and makes of it what the queue takes.
pub(super) async fn check(app: &App, caller: &str, kind: JobType, wanted: Create) -> Result<NewJob, Error> {
    if wanted.provider.is_some() {
        return Err(Error::bad_request(format!("`provider` is for exports; {kind} names a `source`, a path in a root of an agent")));
    }
    if wanted.vm_name.is_some() && kind != JobType::Import {
        return Err(Error::bad_request(format!(
            "`vm_name` is for exports and imports; {kind} names a `source`, a path in a root of an agent"
        )));
    }
    let source =
        required("source", wanted.source, "the path of a file, ROOT/… or absolute, in a root of an agent; GET /agents lists them")?;
    let mut notes = Vec::new();
    let wishes = wanted.options.unwrap_or_default();
    let (format, options) = match kind {
        JobType::Verify => verify_format(&source, wanted.format.as_deref(), wishes, &mut notes)?,
        _ => {
            let format = output_format(wanted.format.as_deref())?;
            (format, options(kind, wishes, format, &mut notes)?)
        }
    };
    let places::Place { agent, source, upload } = places::place(app, &source, wanted.agent.as_deref()).await?;
    match kind {
        JobType::Convert => {
            places::check_format(&agent, format)?;
            places::check_destination(&roots(&agent), options.destination.as_deref())?;
        }
        JobType::Import => {
            places::check_format(&agent, format)?;
            check_catalogue(app, &agent, &options).await?;
        }
        _ => {}
    }
    for (option, _) in [("power_off", options.power_off), ("quiesce", options.quiesce)].iter().filter(|(_, given)| *given == Some(true)) {
        notes.push(format!("{option} does nothing here: a file does not run"));
    }
    let mut question = question(kind, &source, format, &options);
    question.name = wanted.vm_name.clone().unwrap_or_default();
    let found = match upload {
        // Its agent has not got it yet, and nobody else reads images: it is opened, or refused, when it was fetched.
        Some(_) => None,
        None => found(app, kind, &agent, question, &mut notes).await?,
    };
    let stem = stem(&source);
    let (vm_id, vm_name) = match (kind, wanted.vm_name) {
        (JobType::Import, named) => {
            let name = named.or_else(|| found.as_ref().map(|found| found.vm.clone())).unwrap_or(stem);
            check_name(&name, found.as_ref())?;
            (name.clone(), name)
        }
        _ => (String::new(), found.as_ref().map(|found| found.vm.clone()).filter(|name| !name.is_empty()).unwrap_or(stem)),
    };
    Ok(NewJob {
        kind,
        provider: String::new(),
        provider_kind: String::new(),
        provider_path: String::new(),
        owner: agent.id,
        vm_id,
        // What a file says of itself may hold anything, and Postgres refuses NUL.
        vm_name: vm_name.replace('\0', "\u{fffd}"),
        source,
        capacity: found.as_ref().map_or(0, Found::capacity),
        format,
        options,
        created_by: caller.to_owned(),
        notes,
    })
}

/// The question to the agent about such a job.
pub(super) fn question(kind: JobType, source: &str, format: Format, options: &Options) -> v1::Inspect {
    v1::Inspect {
        r#type: kind.word().to_owned(),
        source: source.to_owned(),
        format: format.word().to_owned(),
        destination: options.destination.clone().unwrap_or_default(),
        include_snapshots: options.include_snapshots == Some(true),
        ..v1::Inspect::default()
    }
}

async fn found(
    app: &App,
    kind: JobType,
    agent: &agents::Model,
    question: v1::Inspect,
    notes: &mut Vec<String>,
) -> Result<Option<Found>, Error> {
    if !app.fleet.is_connected(&agent.id) {
        notes.push(format!("the source was not looked at: agent `{}` is away, and the job waits for it", agent.name));
        return Ok(None);
    }
    match places::look(app, &agent.id, question).await {
        // What is damaged is what a check is for: the job says where.
        Err(e) if kind == JobType::Verify && matches!(e.code(), Code::BadImage | Code::VerificationFailed) => {
            notes.push(e.message().to_owned());
            Ok(None)
        }
        found => found.map(Some),
    }
}

/// A check writes nothing, so it takes few options; its format is the one that the file's name declares.
fn verify_format(source: &str, given: Option<&str>, wishes: Wishes, notes: &mut Vec<String>) -> Result<(Format, Options), Error> {
    let unused = [
        (wishes.compress.is_some(), "compress"),
        (wishes.compression.is_some(), "compression"),
        (wishes.level.is_some(), "level"),
        (wishes.narrow_window.is_some(), "narrow_window"),
        (wishes.include_snapshots.is_some(), "include_snapshots"),
        (wishes.destination.is_some(), "destination"),
        (wishes.verify.is_some(), "verify"),
        (wishes.power_off.is_some(), "power_off"),
        (wishes.quiesce.is_some(), "quiesce"),
    ];
    if let Some((_, name)) = unused.iter().find(|(given, _)| *given) {
        return Err(Error::new(Code::Unprocessable, format!("a verify job writes nothing: leave `{name}` out")));
    }
    let file = source.strip_suffix(".manifest.json").unwrap_or(source);
    // The folder of a job is looked at as a restore point, whose disks are qcow2.
    let folder = source.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let of_point = folder.parse::<JobId>().is_ok().then_some(Format::Qcow2);
    let declared = Format::of_name(file).or(of_point).ok_or_else(|| {
        let known = Format::ALL.join(", ");
        Error::new(
            Code::Unprocessable,
            format!(
                "`{}` does not say its format: name a file that ends in one of {known}, its manifest, or the folder of a restore point",
                clip(source)
            ),
        )
    })?;
    if let Some(given) = given {
        let given = output_format(Some(given))?;
        if given != declared {
            let message = format!("`{}` is read as {declared}, as its name says, not as {given}; leave `format` out", clip(source));
            return Err(Error::new(Code::Unprocessable, message));
        }
    }
    Ok((declared, options(JobType::Verify, wishes, declared, notes)?))
}

/// The agent has a catalogue, and its VMs are listed.
async fn check_catalogue(app: &App, agent: &agents::Model, options: &Options) -> Result<(), Error> {
    if options.destination.is_some() {
        let message = format!("an import goes into the root `{}`: leave `destination` out, or choose type `convert`", places::IMAGES);
        return Err(Error::new(Code::Unprocessable, message));
    }
    let rows = roots(agent);
    let root = rows.iter().find(|root| root.name == places::IMAGES && root.writable);
    let root = root.ok_or_else(|| Error::new(Code::Unprocessable, format!("agent `{}` has no root `{}`", agent.name, places::IMAGES)))?;
    let connections = providers::service::for_agent(&app.store, &agent.id).await?;
    if connections.iter().any(|row| row.kind == "local" && row.path == root.path) {
        return Ok(());
    }
    let message = format!(
        "what is imported at agent `{0}` would be listed nowhere: another agent has the connection `images`. Connect it under another name: \
         POST /providers/connect {{\"provider\":\"local\",\"name\":\"images-{0}\",\"path\":\"{1}\",\"agent\":\"{0}\"}}",
        agent.name, root.path
    );
    Err(Error::new(Code::Unprocessable, message))
}

fn check_name(name: &str, found: Option<&Found>) -> Result<(), Error> {
    if !is_catalogue_name(name) {
        return Err(Error::bad_request(format!(
            "`{}` cannot be a VM's name in the catalogue: give `vm_name` with 1 to 120 bytes, no `/`, no control characters and no leading dot",
            clip(&name.replace(char::is_control, "?"))
        )));
    }
    if found.is_some_and(|found| found.taken) {
        let message = format!("the catalogue has a VM `{}` already; give another `vm_name`", clip(name));
        return Err(Error::new(Code::Conflict, message));
    }
    Ok(())
}

/// The bare name of a path without its ending.
pub(super) fn stem(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or(path);
    let name = name.strip_suffix(".manifest.json").unwrap_or(name);
    name.rsplit_once('.').map_or(name, |(stem, _)| stem).to_owned()
}
