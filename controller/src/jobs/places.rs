//! Where a job may read and write, and what its agent says lies there.
//!
//! Owns: which agent has the root of a path, which destinations are allowed, the question to the agent before a job is made.
//! Never: opens anything: the controller knows an agent's roots by name and path only, the agent opens and refuses once more.
//! A crash here costs one answer.

use std::path::PathBuf;

use proto::v1;
use proto::v1::browse::Question;
use serde::{Deserialize, Serialize};
use shared::error::Code;
use shared::options::Format;
use utoipa::ToSchema;

use super::service::{MOST, clip};
use crate::app::App;
use crate::fleet::store::{RootRow, roots};
use crate::http::reply::Error;
use crate::store::entities::{agents, connections};
use crate::uploads;

/// Root that outputs go to where no destination is named.
pub(super) const EXPORTS: &str = "exports";
/// Root that imports go to.
pub(super) const IMAGES: &str = "images";

/// The agent of a connection may run the job: it is the one that was named, writes the format, and may write at the destination.
pub(super) async fn check_agent(
    app: &App,
    connection: &connections::Model,
    named: Option<&str>,
    format: Format,
    destination: Option<&str>,
) -> Result<(), Error> {
    let agent = app.fleet.resolve(&connection.agent_id).await.map_err(|e| match e.code() {
        Code::NotFound => {
            Error::new(Code::Conflict, format!("the agent of `{}` was removed from the fleet; connect it again", connection.name))
        }
        _ => e,
    })?;
    if let Some(named) = named.filter(|named| *named != agent.id && *named != agent.name) {
        let message = format!("`{}` is served by agent `{}`, not by `{}`; leave `agent` out", connection.name, agent.name, clip(named));
        return Err(Error::bad_request(message));
    }
    check_format(&agent, format)?;
    check_destination(&roots(&agent), destination)
}

/// The agent writes this format.
pub(super) fn check_format(agent: &agents::Model, format: Format) -> Result<(), Error> {
    let formats: Vec<String> = serde_json::from_str(&agent.formats).unwrap_or_default();
    if !formats.is_empty() && !formats.iter().any(|word| word == format.word()) {
        return Err(Error::not_built(format!("format `{format}` at agent `{}` (it writes: {})", agent.name, formats.join(", "))));
    }
    Ok(())
}

/// The destination lies in a root that may be written.
pub(super) fn check_destination(roots: &[RootRow], destination: Option<&str>) -> Result<(), Error> {
    let writable = roots.iter().filter(|root| root.writable).map(|root| format!("{}/", root.name)).collect::<Vec<_>>();
    let usable = if writable.is_empty() { "none: the agent has no writable root".to_owned() } else { writable.join(", ") };
    let Some(destination) = destination else {
        if roots.iter().any(|root| root.name == EXPORTS && root.writable) {
            return Ok(());
        }
        return Err(Error::new(
            Code::Unprocessable,
            format!("the agent has no writable root `{EXPORTS}`; name a `destination` in one of: {usable}"),
        ));
    };
    if destination.starts_with("s3://") {
        return Err(Error::not_built("a destination in an object store"));
    }
    let outside =
        |why: &str| Err(Error::new(Code::OutsideRoots, format!("destination `{}` {why}; use one of: {usable}", clip(destination))));
    if destination.is_empty() || destination.len() > MOST {
        return Err(Error::bad_request(format!("destination must be a path of 1 to {MOST} bytes in one of: {usable}")));
    }
    match locate(roots, destination) {
        None => outside("lies outside the configured roots"),
        Some((name, _)) if !roots.iter().any(|root| root.name == name && root.writable) => outside("lies in a root that is only read"),
        Some(_) => Ok(()),
    }
}

fn locate(roots: &[RootRow], path: &str) -> Option<(String, PathBuf)> {
    shared::vault::locate(roots.iter().map(|root| (root.name.clone(), PathBuf::from(&root.path))), path)
}

/// Where a source lies.
pub(super) struct Place {
    /// The agent that the job runs at.
    pub agent: agents::Model,
    /// As `ROOT/…`.
    pub source: String,
    /// Bytes, of an upload: it lies at the controller, and the agent fetches it.
    pub upload: Option<u64>,
}

/// The place of a source: an upload of this controller, else a file in a root of an agent.
pub(super) async fn place(app: &App, source: &str, named: Option<&str>) -> Result<Place, Error> {
    let Some((source, size)) = upload(app, source).await? else {
        let (agent, source) = agent_of_source(app, source, named).await?;
        return Ok(Place { agent, source, upload: None });
    };
    let mut agents = agents(app, named).await?;
    match agents.len() {
        0 => Err(Error::new(Code::Unavailable, "no agent has joined; POST /agents/tokens gives a join token for one").retry_after(10)),
        1 => Ok(Place { agent: agents.remove(0), source, upload: Some(size) }),
        _ => {
            let names: Vec<&str> = agents.iter().map(|agent| agent.name.as_str()).collect();
            let message = format!("any agent can take `{}`; name one in `agent`: {}", clip(&source), names.join(", "));
            Err(Error::new(Code::Ambiguous, message).detail(serde_json::json!({ "agents": names })))
        }
    }
}

/// Name and size of an upload that is whole; `None` where the path is not one of an upload.
async fn upload(app: &App, source: &str) -> Result<Option<(String, u64)>, Error> {
    let Ok(place) = app.vault.locate(source) else { return Ok(None) };
    let named = place.named();
    let hidden = place.below.components().any(|part| part.as_os_str().to_string_lossy().starts_with('.'));
    if hidden || place.below.as_os_str().is_empty() {
        return Err(Error::not_found(format!("there is no upload `{}`", clip(&named))));
    }
    // `uploads/ID/NAME`; the row says whether it is whole.
    let id = place.below.iter().next().unwrap_or_default().to_string_lossy().into_owned();
    match uploads::store::load(&app.store, &id).await? {
        Some(row) if row.status == uploads::store::COMPLETE => {}
        Some(_) => {
            let message = format!("upload `{}` is not complete; POST /upload/complete ends it", clip(&id));
            return Err(Error::new(Code::Conflict, message));
        }
        None => return Err(Error::not_found(format!("there is no upload `{}`", clip(&named)))),
    }
    let (vault, path) = (app.vault.clone(), named.clone());
    let opened = tokio::task::spawn_blocking(move || vault.open_file(&path).map(|file| file.metadata().map(|m| m.len()).unwrap_or(0)));
    match opened.await.map_err(Error::internal)? {
        Ok(size) => Ok(Some((named, size))),
        Err(shared::vault::Error::Outside { .. }) => {
            Err(Error::new(Code::OutsideRoots, format!("`{}` leads out of its root", clip(&named))))
        }
        Err(shared::vault::Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::InvalidInput => {
            Err(Error::new(Code::Unprocessable, format!("`{}` is a folder, not a file", clip(&named))))
        }
        Err(_) => Err(Error::not_found(format!("there is no upload `{}`", clip(&named)))),
    }
}

async fn agents(app: &App, named: Option<&str>) -> Result<Vec<agents::Model>, Error> {
    let mut agents = app.fleet.agents().await?;
    if let Some(named) = named {
        agents.retain(|agent| agent.id == named || agent.name == named);
        if agents.is_empty() {
            return Err(Error::bad_request(format!("no agent `{}`; GET /agents lists them", clip(named))));
        }
    }
    Ok(agents)
}

/// The agent in whose roots a source lies, and the source as `ROOT/…`.
async fn agent_of_source(app: &App, source: &str, named: Option<&str>) -> Result<(agents::Model, String), Error> {
    choose(agents(app, named).await?, source)
}

fn choose(agents: Vec<agents::Model>, source: &str) -> Result<(agents::Model, String), Error> {
    let mut known: Vec<String> = agents.iter().flat_map(roots).map(|root| format!("{}/", root.name)).collect();
    known.sort();
    known.dedup();
    let places = agents.into_iter().filter_map(|agent| locate(&roots(&agent), source).map(|place| (agent, place)));
    let mut places: Vec<_> = places.collect();
    match places.len() {
        0 => {
            let known = if known.is_empty() { "none: no agent has joined".to_owned() } else { known.join(", ") };
            Err(Error::new(Code::OutsideRoots, format!("source `{}` lies outside the configured roots; use one of: {known}", clip(source))))
        }
        1 => {
            let (agent, (root, below)) = places.remove(0);
            let named = if below.as_os_str().is_empty() { root } else { format!("{root}/{}", below.display()) };
            Ok((agent, named))
        }
        _ => {
            let names: Vec<&str> = places.iter().map(|(agent, _)| agent.name.as_str()).collect();
            let message = format!("several agents have the root of `{}`; name one in `agent`: {}", clip(source), names.join(", "));
            Err(Error::new(Code::Ambiguous, message).detail(serde_json::json!({ "agents": names })))
        }
    }
}

/// Room at a destination.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[schema(as = PlanDestination)]
pub struct Room {
    /// Name of the root.
    pub root: String,
    /// As `ROOT/…`; the job makes a folder of its own in it.
    pub path: String,
    /// Free bytes of the file system, as the agent sees them now.
    pub free_bytes: u64,
    /// Its size.
    pub total_bytes: u64,
}

/// One disk of a source.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[schema(as = PlanDisk)]
pub struct Disk {
    /// `disk-0`; of a snapshot `disk-0-snapshot-1`.
    pub name: String,
    /// Bytes of the logical disk.
    pub capacity: u64,
    /// Bytes of its data extents; null where counting would have taken too long.
    pub data_bytes: Option<u64>,
    /// The format that it is read as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
}

/// What an agent says of a source.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Found {
    /// Name of the VM in it.
    pub vm: String,
    /// As `ROOT/…`.
    pub source: String,
    /// Bytes of the file.
    pub size: u64,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Data of all disks, where it was counted.
    pub data_bytes: Option<u64>,
    /// Names of the files that would be made.
    pub files: Vec<String>,
    /// Name of the manifest beside it.
    pub manifest: Option<String>,
    /// Where the output would go.
    pub destination: Option<Room>,
    /// Of an import: the catalogue has a VM of that name.
    pub taken: bool,
    /// What lies on the disks, where that was asked.
    pub guest: Option<shared::guest::Guest>,
    /// Why nobody could look.
    pub guest_unknown: Option<String>,
}

impl Found {
    /// Bytes of all disks.
    pub fn capacity(&self) -> u64 {
        self.disks.iter().fold(0, |sum, disk| sum.saturating_add(disk.capacity))
    }
}

/// Asks the agent.
pub(super) async fn look(app: &App, agent: &str, question: v1::Inspect) -> Result<Found, Error> {
    let answer = app.fleet.ask(agent, Question::Inspect(question)).await?;
    serde_json::from_value(answer).map_err(|e| Error::new(Code::BadGateway, format!("the agent's answer cannot be read: {e}")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn rows() -> Vec<RootRow> {
        let root =
            |name: &str, path: &str, writable| RootRow { name: name.into(), path: path.into(), free_bytes: 1, total_bytes: 2, writable };
        vec![root("exports", "/srv/exports", true), root("vms", "/srv/vms", false)]
    }

    fn agent(name: &str) -> agents::Model {
        agents::Model {
            id: format!("agent-{name}"),
            name: name.into(),
            key_sha256: String::new(),
            signing_key: String::new(),
            version: String::new(),
            instance: String::new(),
            hostname: String::new(),
            cpus: 1,
            roots: serde_json::to_string(&rows()).unwrap(),
            formats: "[]".into(),
            rates: "{}".into(),
            revoked: false,
            draining: false,
            enrolled_at: 0,
            last_seen: None,
        }
    }

    #[test]
    fn a_destination_lies_in_a_writable_root() {
        for good in [None, Some("exports"), Some("exports/night/1"), Some("/srv/exports/"), Some("/srv/exports/a")] {
            check_destination(&rows(), good).unwrap();
        }
        for bad in ["exports/../vms", "/etc", "vms/x", "/srv/exportsx", "relative", "exports\0"] {
            let error = check_destination(&rows(), Some(bad)).unwrap_err();
            assert!(error.code() == Code::OutsideRoots && error.message().contains("exports/"), "{bad}: {error}");
        }
        assert_eq!(check_destination(&rows(), Some("s3://bucket/x")).unwrap_err().code(), Code::NotBuilt);
        assert_eq!(check_destination(&[], None).unwrap_err().code(), Code::Unprocessable);
    }

    #[test]
    fn a_source_has_one_agent_or_says_which_there_are() {
        for good in ["vms/a.raw", "/srv/vms/a.raw", "vms//a.raw"] {
            assert_eq!(choose(vec![agent("one")], good).unwrap().1, "vms/a.raw");
        }
        for bad in ["/etc/passwd", "vms/../a", "a.raw", "vmsx/a.raw", "vms/a\0"] {
            assert_eq!(choose(vec![agent("one")], bad).unwrap_err().code(), Code::OutsideRoots, "{bad}");
        }
        let error = choose(vec![agent("one"), agent("two")], "vms/a.raw").unwrap_err();
        assert!(error.code() == Code::Ambiguous && error.message().contains("one, two"), "{error}");
    }
}
