//! Whose root a path lies in, and what lies there.
//!
//! Owns: that decision. Never: opens anything but through the vault, here or at the agent. A crash here costs one answer.

use std::path::{Path, PathBuf};

use proto::v1;
use proto::v1::browse::Question;
use serde::Deserialize;
use shared::error::Code;
use shared::folder::{self, Ask, Entry, Kind, Sort};
use shared::ids::JobId;
use shared::{sniff, vault};

use super::body::{Body, Local};
use crate::app::App;
use crate::fleet::{store as fleet_store, transfer};
use crate::http::reply::Error;
use crate::store::entities::agents;
use crate::{jobs, store};

/// Longest path in bytes.
const LONGEST: usize = 4096;

/// Where a path lies.
#[derive(Clone, Debug)]
pub enum Place {
    /// In a root of this controller.
    Here,
    /// In a root of an agent.
    Agent {
        /// Its id.
        id: String,
        /// Its name.
        name: String,
    },
}

impl Place {
    /// The agent's name.
    pub fn agent(&self) -> Option<&str> {
        match self {
            Place::Here => None,
            Place::Agent { name, .. } => Some(name),
        }
    }

    fn of(agent: &agents::Model) -> Self {
        Place::Agent { id: agent.id.clone(), name: agent.name.clone() }
    }
}

/// A root that people may look into.
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Whose it is.
    pub place: Place,
    /// Where it lies on its host.
    pub path: String,
    /// Free bytes.
    pub free_bytes: u64,
    /// Bytes of its file system.
    pub total_bytes: u64,
    /// Whether jobs, or uploads, may write into it.
    pub writable: bool,
}

fn refused(error: vault::Error) -> Error {
    // What the system said of a path is for the log; what the caller should know is in the code.
    let code = error.code();
    Error::new(code, error.to_string())
}

/// Every root of the controller and of its agents.
pub async fn roots(app: &App) -> Result<Vec<Listed>, Error> {
    let mut all = Vec::new();
    for root in app.vault.roots() {
        let (free_bytes, total_bytes) = root.space().unwrap_or_default();
        let path = root.path.display().to_string();
        all.push(Listed { name: root.name.clone(), place: Place::Here, path, free_bytes, total_bytes, writable: root.writable });
    }
    for agent in app.fleet.agents().await? {
        for root in fleet_store::roots(&agent) {
            let fleet_store::RootRow { name, path, free_bytes, total_bytes, writable } = root;
            all.push(Listed { name, place: Place::of(&agent), path, free_bytes, total_bytes, writable });
        }
    }
    Ok(all)
}

/// Whose root a path lies in. `agent` is the id or name of the one that is meant, where several have such a root.
pub async fn locate(app: &App, path: &str, agent: Option<&str>) -> Result<Place, Error> {
    if path.len() > LONGEST {
        return Err(Error::bad_request(format!("path is longer than {LONGEST} bytes")));
    }
    let has = |agent: &agents::Model| {
        let roots = fleet_store::roots(agent).into_iter().map(|root| (root.name, PathBuf::from(root.path)));
        vault::locate(roots, path).is_some()
    };
    if let Some(agent) = agent {
        let agent = app.fleet.resolve(agent).await?;
        return if has(&agent) { Ok(Place::of(&agent)) } else { Err(outside(app, path).await?) };
    }
    if app.vault.locate(path).is_ok() {
        return Ok(Place::Here);
    }
    let candidates: Vec<agents::Model> = app.fleet.agents().await?.into_iter().filter(has).collect();
    // What a job made lies where the job was.
    if candidates.len() > 1
        && let Some(job) = Path::new(path).iter().find_map(|part| part.to_str()?.parse::<JobId>().ok())
        && let Some(job) = jobs::store::load(&app.store, job.as_str()).await?
        && let Some(agent) = candidates.iter().find(|agent| job.state.agent.as_ref() == Some(&agent.id))
    {
        return Ok(Place::of(agent));
    }
    let connected: Vec<&agents::Model> = candidates.iter().filter(|agent| app.fleet.is_connected(&agent.id)).collect();
    match (connected.as_slice(), candidates.as_slice()) {
        (_, []) => Err(outside(app, path).await?),
        ([only], _) => Ok(Place::of(only)),
        ([], [away, ..]) => Err(Error::new(Code::Unavailable, format!("agent `{}` is not connected", away.name)).retry_after(5)),
        (several, _) => {
            let names = several.iter().map(|agent| format!("`{}`", agent.name)).collect::<Vec<_>>().join(", ");
            Err(Error::bad_request(format!("several agents have such a root; name one in `agent`: {names}")))
        }
    }
}

async fn outside(app: &App, path: &str) -> Result<Error, store::Error> {
    let mut names: Vec<String> = app.vault.roots().map(|root| format!("{}/", root.name)).collect();
    for agent in app.fleet.agents().await? {
        names.extend(fleet_store::roots(&agent).into_iter().map(|root| format!("{}/", root.name)));
    }
    names.sort_unstable();
    names.dedup();
    let shown: String = path.chars().take(120).collect();
    Ok(Error::new(Code::OutsideRoots, format!("{shown} lies outside the configured roots; use one of: {}", names.join(", "))))
}

#[derive(Deserialize)]
struct Listing {
    entries: Vec<Entry>,
    total: u64,
}

/// One page of a folder.
pub async fn list(app: &App, place: &Place, path: &str, ask: Ask) -> Result<(Vec<Entry>, u64), Error> {
    match place {
        Place::Here => {
            let (vault, path) = (app.vault.clone(), path.to_owned());
            blocking(move || folder::list(&vault, &path, &ask, &sniff::format_of)).await
        }
        Place::Agent { id, .. } => {
            let sort = match ask.sort {
                Sort::Name => "name",
                Sort::Size => "size",
                Sort::Modified => "modified_at",
                Sort::Kind => "type",
            };
            let limit = u32::try_from(ask.limit).unwrap_or(u32::MAX);
            let (path, sort) = (path.to_owned(), sort.to_owned());
            let question = v1::List { path, offset: ask.offset, limit, sort, descending: ask.descending, search: ask.search };
            let answer = app.fleet.ask(id, Question::List(question)).await?;
            let listing: Listing = serde_json::from_value(answer).map_err(odd)?;
            Ok((listing.entries, listing.total))
        }
    }
}

/// One path.
pub async fn stat(app: &App, place: &Place, path: &str) -> Result<Entry, Error> {
    match place {
        Place::Here => {
            let (vault, path) = (app.vault.clone(), path.to_owned());
            // What it holds is nobody's question here.
            blocking(move || folder::stat(&vault, &path, &|_| None)).await
        }
        Place::Agent { id, .. } => serde_json::from_value(app.fleet.ask(id, Question::Stat(path.to_owned())).await?).map_err(odd),
    }
}

/// A regular file at a path; what else lies there is refused.
pub async fn file(app: &App, place: &Place, path: &str) -> Result<Entry, Error> {
    let entry = stat(app, place, path).await?;
    match entry.kind {
        Kind::File => Ok(entry),
        Kind::Folder | Kind::Root => {
            Err(Error::new(Code::Unprocessable, format!("{} is a folder; GET /browse/files lists what is in it", entry.path)))
        }
        Kind::Link | Kind::Other => Err(Error::new(Code::Unprocessable, format!("{} is no regular file", entry.path))),
    }
}

/// A range of a file that [`file`] described; it must still be that file.
pub async fn open(app: &App, place: &Place, path: &str, entry: &Entry, offset: u64, length: u64) -> Result<Body, Error> {
    match place {
        Place::Here => {
            let (vault, path) = (app.vault.clone(), path.to_owned());
            let opened = blocking(move || {
                let file = vault.open_file(&path)?;
                let version = file.metadata().map(|metadata| folder::version(&metadata));
                let version = version.map_err(|source| vault::Error::Io { path, source })?;
                Ok((file, version))
            });
            let (file, version) = opened.await?;
            if version != entry.version {
                return Err(changed(entry));
            }
            Ok(Body::Local(Local::new(file, offset, length)))
        }
        Place::Agent { id, .. } => {
            let remote = transfer::fetch(&app.fleet, id, path, offset, length, &entry.version).await;
            let remote = remote.map_err(|error| if error.code() == Code::Conflict { changed(entry) } else { error })?;
            Ok(Body::Remote(length, remote))
        }
    }
}

/// Between the look and the opening somebody wrote.
fn changed(entry: &Entry) -> Error {
    Error::new(Code::Unavailable, format!("{} is being written; ask again", entry.path)).retry_after(1)
}

fn odd(error: serde_json::Error) -> Error {
    Error::new(Code::BadGateway, format!("the agent's answer cannot be read: {error}"))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, vault::Error> + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(Error::internal)?.map_err(refused)
}
