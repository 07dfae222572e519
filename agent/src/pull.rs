//! Uploads on their way from the controller to the worker that needs one.
//!
//! ```text
//! worker ─► pull ─► Pull ─► pulled/JOB/VERSION.part ─► SHA-256 ─► fsync ─► pulled/JOB/whole/NAME
//! ```
//! Owns: the folder `pulled` of the data directory. Never: takes a file for whole before its digest is the controller's.
//! A crash here costs nothing: a pull goes on where its part ends, and the digest at the end covers all of it.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::time::{Duration, Instant};

use proto::v1::fleet_client::FleetClient;
use proto::v1::piece::Kind;
use proto::v1::{self, Piece};
use sha2::{Digest as _, Sha256};
use shared::error::Code;
use shared::vault;

use crate::Agent;
use crate::sources::Error;

/// How long a pull waits for the next piece.
const STALL: Duration = Duration::from_secs(60);
/// How long a pull tries on without a byte.
const PATIENCE: Duration = Duration::from_secs(300);
/// Between two tries.
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes that are hashed at a time.
const STEP: usize = 1 << 20;
/// The folder of pulled files in the data directory.
const PULLED: &str = "pulled";
/// The folder of a job's whole files below that.
const WHOLE: &str = "whole";

/// A file that was pulled: whole, on the disk, its digest compared.
pub struct Pulled {
    /// The folder that it lies in; nothing else does.
    pub dir: vault::Dir,
    /// Its name there: the upload's.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// SHA-256 in hex.
    pub sha256: String,
}

/// Why a pull ended without its file.
pub enum Ended {
    /// It was told to stop.
    Stopped,
    /// The controller has been away for minutes, after it had given more than there was: this attempt brought something.
    Away(String),
    /// It cannot be done, or brought nothing for minutes.
    Failed(Error),
}

/// Fetches the upload `path` that the assignment (`job`, `epoch`) names as its source, and goes on where an earlier try ended. `go_on` is
/// asked often. A controller that is away is waited for. For a worker's thread: it blocks.
pub fn pull(agent: &Agent, job: &str, epoch: u64, path: &str, go_on: &dyn Fn() -> bool) -> Result<Pulled, Ended> {
    let name = path.rsplit('/').next().unwrap_or_default().to_owned();
    let broken = |e: io::Error| match e.kind() {
        io::ErrorKind::Interrupted => Ended::Stopped,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Ended::Failed(Error::fatal(Code::NoSpace, "no space left in the data directory"))
        }
        _ => Ended::Failed(Error { code: Code::Internal, message: format!("{PULLED}/{job}: {e}"), retryable: true }),
    };
    let below = format!("{PULLED}/{job}");
    agent.home.dir.create_dir_all(&below).map_err(broken)?;
    let dir = agent.home.dir.open_dir(&below).map_err(broken)?;
    dir.create_dir_all(WHOLE).map_err(broken)?;
    let whole = dir.open_dir(WHOLE).map_err(broken)?;
    if let Some(part) = Part::read(&whole, &name, go_on).map_err(broken)? {
        return Ok(Pulled { sha256: part.digest(), size: part.size, dir: whole, name });
    }
    let mut part = Part::find(&dir, go_on).map_err(broken)?;
    let mut patience = Patience::new(part.size, Instant::now());
    loop {
        let request =
            v1::PullRequest { job: job.to_owned(), epoch, path: path.to_owned(), offset: part.size, version: part.version.clone() };
        let received = agent.runtime.block_on(async {
            tokio::select! {
                received = receive(agent, request, &dir, &mut part) => received,
                () = told_to_stop(go_on) => Err(Lost::Stopped),
            }
        });
        match received {
            Ok(opened) => {
                let sha256 = part.digest();
                if sha256 != opened.sha256 {
                    part.remove(&dir).map_err(broken)?;
                    let message = format!("{path} arrived as {sha256} and is {}; it is fetched again", opened.sha256);
                    return Err(Ended::Failed(Error { code: Code::VerificationFailed, message, retryable: true }));
                }
                part.keep(&dir, &whole, &name).map_err(broken)?;
                return Ok(Pulled { dir: whole, name, size: opened.size, sha256 });
            }
            Err(Lost::Stopped) => return Err(Ended::Stopped),
            Err(Lost::Refused(error)) => return Err(Ended::Failed(error)),
            Err(Lost::Io(error)) => return Err(broken(error)),
            Err(Lost::Away(reason)) => {
                if let Some(brought) = patience.lost(part.size, Instant::now()) {
                    let message = format!("{path} could not be fetched: {reason}");
                    let error = |message| Error { code: Code::Unavailable, message, retryable: true };
                    return Err(if brought { Ended::Away(message) } else { Ended::Failed(error(message)) });
                }
                tracing::warn!(job, path, reason, have = part.size, "a pull was interrupted and goes on");
                std::thread::sleep(PAUSE);
            }
        }
    }
}

/// For how long a pull has waited in vain.
struct Patience {
    /// Bytes at the beginning of this attempt.
    found: u64,
    /// Bytes at the last loss.
    had: u64,
    /// When there were more than before.
    since: Instant,
}

impl Patience {
    fn new(found: u64, now: Instant) -> Self {
        Self { found, had: found, since: now }
    }

    /// Takes a loss; where it was the last one, whether the attempt has brought something.
    fn lost(&mut self, have: u64, now: Instant) -> Option<bool> {
        if have > self.had {
            self.since = now;
        }
        self.had = have;
        (now.saturating_duration_since(self.since) >= PATIENCE).then_some(have > self.found)
    }
}

/// Removes what was pulled for a job.
pub fn forget(agent: &Agent, job: &str) -> io::Result<()> {
    match agent.home.dir.remove_dir_all(format!("{PULLED}/{job}")) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

enum Lost {
    /// The connection; the same may work in a moment.
    Away(String),
    /// The worker is to stop.
    Stopped,
    /// A clear no.
    Refused(Error),
    /// Our own disk.
    Io(io::Error),
}

impl From<tonic::Status> for Lost {
    fn from(status: tonic::Status) -> Self {
        let fatal = |code| Lost::Refused(Error::fatal(code, status.message()));
        match status.code() {
            tonic::Code::NotFound => fatal(Code::NotFound),
            tonic::Code::PermissionDenied => fatal(Code::OutsideRoots),
            tonic::Code::InvalidArgument => fatal(Code::BadRequest),
            tonic::Code::FailedPrecondition => fatal(Code::Conflict),
            tonic::Code::Unimplemented => fatal(Code::NotBuilt),
            _ => Lost::Away(status.message().to_owned()),
        }
    }
}

/// Comes back when a pull is to stop.
async fn told_to_stop(go_on: &dyn Fn() -> bool) {
    while go_on() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn receive(agent: &Agent, request: v1::PullRequest, dir: &vault::Dir, part: &mut Part) -> Result<v1::Opened, Lost> {
    let slow = |_| Lost::Away(format!("nothing came for {} s", STALL.as_secs()));
    let channel = agent.dial().await.map_err(|e| Lost::Away(e.to_string()))?;
    let mut client = FleetClient::new(channel);
    let mut pieces = tokio::time::timeout(STALL, client.pull(request)).await.map_err(slow)??.into_inner();
    let first = tokio::time::timeout(STALL, pieces.message()).await.map_err(slow)??;
    let Some(Piece { kind: Some(Kind::Opened(opened)), .. }) = first else {
        return Err(Lost::Away("the first piece does not say what follows".to_owned()));
    };
    part.begin(dir, &opened).map_err(Lost::Io)?;
    let (free, _) = vault::space(dir).map_err(Lost::Io)?;
    if free < opened.size.saturating_sub(part.size) {
        let message = format!("the upload has {} bytes, the data directory has room for {free}", opened.size);
        return Err(Lost::Refused(Error::fatal(Code::NoSpace, message)));
    }
    while part.size < opened.size {
        match tokio::time::timeout(STALL, pieces.message()).await.map_err(slow)?? {
            Some(Piece { kind: Some(Kind::Data(bytes)), .. }) => part.append(&bytes).map_err(Lost::Io)?,
            Some(Piece { kind: Some(Kind::Failed(failed)), .. }) => return Err(Lost::Away(failed.message)),
            Some(_) => {}
            None => return Err(Lost::Away("the stream ended early".to_owned())),
        }
    }
    if part.size > opened.size {
        part.remove(dir).map_err(Lost::Io)?;
        return Err(Lost::Away("more came than was announced".to_owned()));
    }
    Ok(opened)
}

/// What has arrived. Its file bears the version of what it is a part of.
#[derive(Default)]
struct Part {
    version: String,
    size: u64,
    file: Option<File>,
    hasher: Sha256,
}

impl Part {
    /// What an earlier try left, hashed again.
    fn find(dir: &vault::Dir, go_on: &dyn Fn() -> bool) -> io::Result<Self> {
        for entry in dir.entries()? {
            let Ok(name) = entry?.file_name().into_string() else { continue };
            let Some(version) = name.strip_suffix(".part") else { continue };
            if let Some(part) = Part::read(dir, &name, go_on)? {
                return Ok(Part { version: version.to_owned(), ..part });
            }
        }
        Ok(Part::default())
    }

    /// A file with its digest; none where it is not there. Told to stop, it is interrupted.
    fn read(dir: &vault::Dir, name: &str, go_on: &dyn Fn() -> bool) -> io::Result<Option<Self>> {
        let mut file = match open_part(dir, name, false) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut part = Part::default();
        let mut buffer = vec![0; STEP];
        loop {
            if !go_on() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            match file.read(&mut buffer)? {
                0 => break,
                length => {
                    part.hasher.update(&buffer[..length]);
                    part.size += length as u64;
                }
            }
        }
        part.file = Some(file);
        Ok(Some(part))
    }

    /// Makes ready for what follows; another version, or another place than ours, begins anew.
    fn begin(&mut self, dir: &vault::Dir, opened: &v1::Opened) -> io::Result<()> {
        let version = opened.version.as_bytes();
        if !(1..=128).contains(&version.len()) || !version.iter().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(b)) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the controller says a version that is none"));
        }
        if self.file.is_some() && self.version == opened.version && self.size == opened.offset {
            return Ok(());
        }
        if opened.offset != 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the controller begins where nobody asked it to"));
        }
        self.remove(dir)?;
        let file = open_part(dir, &format!("{}.part", opened.version), true)?;
        *self = Part { version: opened.version.clone(), file: Some(file), ..Part::default() };
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let file = self.file.as_mut().ok_or_else(|| io::Error::other("no part is open"))?;
        if let Err(e) = file.write_all(bytes) {
            // What was half written is not counted; the next try begins at what is.
            file.set_len(self.size)?;
            file.seek(io::SeekFrom::Start(self.size))?;
            return Err(e);
        }
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }

    fn digest(&self) -> String {
        hex::encode(self.hasher.clone().finalize())
    }

    fn remove(&mut self, dir: &vault::Dir) -> io::Result<()> {
        let taken = std::mem::take(self);
        match taken.file {
            Some(_) => dir.remove_file(format!("{}.part", taken.version)),
            None => Ok(()),
        }
    }

    /// Whole and durable under its own name.
    fn keep(&self, dir: &vault::Dir, whole: &vault::Dir, name: &str) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.sync_all()?;
        }
        dir.rename(format!("{}.part", self.version), whole, name)?;
        vault::sync_dir(whole)
    }
}

fn open_part(dir: &vault::Dir, name: &str, new: bool) -> io::Result<File> {
    let mut options = vault::file_options();
    options.read(true).write(true).create(new);
    if new {
        options.truncate(true);
    }
    Ok(dir.open_with(name, &options)?.into_std())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::*;

    fn opened(version: &str, offset: u64) -> v1::Opened {
        v1::Opened { size: 10, version: version.to_owned(), offset, sha256: String::new() }
    }

    #[test]
    fn a_part_goes_on_where_it_ends_and_another_version_begins_anew() {
        let base = vault::temporary_dir("pull").unwrap();
        let dir = vault::open_data_dir(&base).unwrap();
        dir.create_dir(WHOLE).unwrap();
        let mut part = Part::find(&dir, &|| true).unwrap();
        part.begin(&dir, &opened("a-1", 0)).unwrap();
        part.append(b"0123").unwrap();
        drop(part);
        // As the next process finds it.
        let mut part = Part::find(&dir, &|| true).unwrap();
        assert_eq!((part.size, part.version.as_str()), (4, "a-1"));
        assert!(part.begin(&dir, &opened("a-1", 6)).is_err(), "a gap");
        part.begin(&dir, &opened("a-1", 4)).unwrap();
        part.append(b"456789").unwrap();
        assert_eq!(part.digest(), hex::encode(Sha256::digest(b"0123456789")));
        part.begin(&dir, &opened("b-2", 0)).unwrap();
        assert_eq!((part.size, Part::find(&dir, &|| true).unwrap().version.as_str()), (0, "b-2"));
        assert!(part.begin(&dir, &opened("../escape", 0)).is_err());
        part.append(b"new").unwrap();
        let whole = dir.open_dir(WHOLE).unwrap();
        part.keep(&dir, &whole, "disk.raw").unwrap();
        assert_eq!(std::fs::read(base.join("whole/disk.raw")).unwrap(), b"new");
        assert_eq!(Part::find(&dir, &|| true).unwrap().size, 0);
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn hashing_ends_when_it_is_told_to() {
        let base = vault::temporary_dir("pull-stop").unwrap();
        let dir = vault::open_data_dir(&base).unwrap();
        std::fs::write(base.join("disk.raw"), vec![7; 3 * STEP]).unwrap();
        let asked = std::cell::Cell::new(0);
        let twice = || {
            asked.set(asked.get() + 1);
            asked.get() <= 2
        };
        let error = Part::read(&dir, "disk.raw", &twice).err().unwrap();
        assert_eq!((error.kind(), asked.get()), (io::ErrorKind::Interrupted, 3));
        assert_eq!(Part::read(&dir, "disk.raw", &|| true).unwrap().unwrap().size, 3 * STEP as u64);
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn a_controller_that_is_away_is_waited_for_by_the_clock() {
        let start = Instant::now();
        let mut patience = Patience::new(10, start);
        for second in 0..299 {
            assert_eq!(patience.lost(10, start + Duration::from_secs(second)), None);
        }
        assert_eq!(patience.lost(10, start + PATIENCE), Some(false), "nothing came");
        let mut patience = Patience::new(10, start);
        assert_eq!(patience.lost(11, start + PATIENCE), None, "each byte begins the wait anew");
        assert_eq!(patience.lost(11, start + PATIENCE * 2), Some(true));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_pull_that_waits_for_its_controller_stops_when_it_is_told_to() {
        let base = vault::temporary_dir("pull-away").unwrap();
        let agent = Agent::open(crate::config::Config::in_folder(&base)).unwrap();
        let asked = std::sync::atomic::AtomicU32::new(0);
        let told = tokio::task::spawn_blocking(move || {
            let twice = || asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < 2;
            matches!(pull(&agent, "job-0123456789abcdef", 1, "uploads/x/disk.raw", &twice), Err(Ended::Stopped))
        });
        assert!(told.await.unwrap());
        std::fs::remove_dir_all(base).unwrap();
    }
}
