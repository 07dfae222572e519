//! What an upload may be, and the order of its steps.
//!
//! ```text
//! init ─► open ──chunk, again, in any order──► open ──complete: all there, digest right──► complete
//!           └── nothing came for a day, or DELETE ──► gone                                    └── DELETE ──► gone
//! ```
//! Owns: names, sizes, quota, expiry, whose turn it is (chunks of one upload go side by side, all else alone). Never: reads a body.
//! A crash here costs the step that was not answered; each can be made again.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use shared::error::Code;
use shared::vault::Vault;
use tokio::sync::RwLock;

use super::receive::{Body, Place, blocking, wrong_length};
use super::{part, store};
use crate::config::Config;
use crate::http::reply::Error;
use crate::jobs;
use crate::store::Store;
use crate::store::entities::{idempotency, uploads};

/// Bytes of every chunk but the last.
pub const CHUNK: u64 = 10_000_000;
/// Largest upload: 64 TiB, the largest disk of the formats that we read.
pub const LARGEST: u64 = 64 << 40;
/// Longest name in bytes.
const LONGEST_NAME: usize = 200;
/// Free space that no upload takes.
const RESERVE: u64 = 64 << 20;
/// Missing chunks that a message names; its detail names all.
const NAMED: usize = 20;

/// The uploads of this controller.
pub struct Service {
    store: Store,
    vault: Arc<Vault>,
    quota: u64,
    expiry: Duration,
    turns: Mutex<HashMap<String, Weak<RwLock<()>>>>,
}

/// A chunk that was taken.
pub struct Taken {
    /// Its bytes.
    pub size: u64,
    /// SHA-256 in hex.
    pub sha256: String,
}

/// How many chunks a file of this size has.
pub fn count(size: u64) -> u64 {
    size.div_ceil(CHUNK)
}

/// Bytes of a chunk.
pub fn length(size: u64, number: u64) -> u64 {
    size.saturating_sub(number.saturating_mul(CHUNK)).min(CHUNK)
}

/// The chunks that are missing; `have` is in order.
pub fn missing(size: u64, have: &[i64]) -> Vec<u64> {
    let mut have = have.iter().filter_map(|number| u64::try_from(*number).ok()).peekable();
    (0..count(size)).filter(|number| have.next_if_eq(number).is_none()).collect()
}

/// A bare file name that any file system and any log takes.
pub fn check_name(name: &str) -> Result<(), Error> {
    let good = !name.is_empty()
        && name.len() <= LONGEST_NAME
        && !name.starts_with('.')
        && name.trim() == name
        && !name.chars().any(|c| c.is_control() || matches!(c, '/' | '\\'));
    let message = format!(
        "filename must be a bare name of 1 to {LONGEST_NAME} bytes, without `/`, `\\` and control characters, not beginning with a dot"
    );
    if good { Ok(()) } else { Err(Error::bad_request(message)) }
}

/// A SHA-256 as somebody wrote it, in lower case.
pub fn check_digest(what: &str, text: &str) -> Result<String, Error> {
    let is_hex = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_hex { Ok(text.to_ascii_lowercase()) } else { Err(Error::bad_request(format!("{what} must be a SHA-256 as 64 hex digits"))) }
}

fn chunks_missing(missing: &[u64]) -> Error {
    let named = missing.iter().take(NAMED).map(u64::to_string).collect::<Vec<_>>().join(", ");
    let more = if missing.len() > NAMED { format!(" and {} more", missing.len() - NAMED) } else { String::new() };
    let error = Error::new(Code::Conflict, format!("chunks are missing: {named}{more}"));
    error.detail(serde_json::json!({ "missing": missing }))
}

fn now() -> i64 {
    shared::clock::now().timestamp_millis()
}

impl Service {
    /// Over the controller's roots.
    pub fn new(store: Store, vault: Arc<Vault>, config: &Config) -> Self {
        let expiry = Duration::from_secs_f64(config.uploads_expiry_hours * 3600.0);
        Self { store, vault, quota: config.uploads_quota_bytes, expiry, turns: Mutex::default() }
    }

    fn root(&self) -> Result<shared::vault::Dir, Error> {
        let root = self.vault.root("uploads").ok_or_else(|| Error::internal("the root `uploads` is missing"))?;
        root.dir().try_clone().map_err(Error::internal)
    }

    fn turn(&self, id: &str) -> Arc<RwLock<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(id).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::new(RwLock::new(()));
        turns.insert(id.to_owned(), Arc::downgrade(&turn));
        turn
    }

    fn expires_at(&self) -> i64 {
        now().saturating_add(i64::try_from(self.expiry.as_millis()).unwrap_or(i64::MAX))
    }

    /// A row for a new upload, where its name, size and digest can be.
    pub fn draft(&self, caller: &str, filename: String, size: i64, sha256: Option<&str>) -> Result<uploads::Model, Error> {
        check_name(&filename)?;
        if size < 1 || size as u64 > LARGEST {
            let message = format!("size must be from 1 to {LARGEST} bytes: an empty file is no disk image");
            return Err(Error::bad_request(message));
        }
        let expected = sha256.map(|text| check_digest("sha256", text)).transpose()?;
        let id = format!("upload-{}", shared::ids::random_hex::<16>());
        let status = store::OPEN.to_owned();
        let (created_at, expires_at) = (now(), self.expires_at());
        Ok(uploads::Model {
            id,
            filename,
            size,
            expected,
            sha256: None,
            status,
            created_by: caller.to_owned(),
            created_at,
            expires_at,
            finished_at: None,
        })
    }

    /// Begins it: within the quota, and with room on the disk, which is taken now.
    pub async fn begin(&self, row: uploads::Model, answer: Option<idempotency::ActiveModel>) -> Result<(), Error> {
        let size = row.size.unsigned_abs();
        let root = self.root()?;
        let (free, _) = blocking({
            let root = root.try_clone().map_err(Error::internal)?;
            move || shared::vault::space(&root)
        })
        .await?;
        if size.saturating_add(RESERVE) > free {
            return Err(Error::new(Code::NoSpace, format!("the upload has {size} bytes, the root `uploads` has room for {free}")));
        }
        let id = row.id.clone();
        let key = answer.as_ref().and_then(|answer| answer.id.try_as_ref().cloned());
        if let Err(taken) = store::begin(&self.store, row, self.quota, answer).await? {
            let message = format!("uploads may have {} bytes together and have {taken}; delete some, or send at most the rest", self.quota);
            return Err(Error::new(Code::TooLarge, message));
        }
        let made = {
            let id = id.clone();
            blocking(move || part::create(&root, &id, size)).await
        };
        if let Err(error) = made {
            // Where no part could be made there may be none to remove: the rows go all the same.
            let (root, owned) = (self.root()?, id.clone());
            if let Err(error) = blocking(move || part::remove(&root, &owned)).await {
                tracing::warn!(upload = id, %error, "the part of an upload that could not begin was not removed");
            }
            store::remove(&self.store, &id, key).await?;
            return Err(error);
        }
        Ok(())
    }

    /// An upload by its id.
    pub async fn get(&self, id: &str) -> Result<uploads::Model, Error> {
        let unknown = || Error::not_found(format!("no upload `{}`; it may have expired", id.chars().take(60).collect::<String>()));
        let hex = id.strip_prefix("upload-").unwrap_or_default();
        if hex.len() != 32 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(unknown());
        }
        store::load(&self.store, id).await?.ok_or_else(unknown)
    }

    /// An upload with the chunks that it has.
    pub async fn status(&self, id: &str) -> Result<(uploads::Model, Vec<i64>), Error> {
        let row = self.get(id).await?;
        let have = if row.status == store::OPEN {
            store::chunks(&self.store, id).await?
        } else {
            (0..i64::try_from(count(row.size.unsigned_abs())).unwrap_or(i64::MAX)).collect()
        };
        Ok((row, have))
    }

    /// Takes a chunk. The same chunk again replaces it; until the new one is whole it is missing.
    pub async fn chunk(
        &self,
        id: &str,
        number: u64,
        declared: Option<u64>,
        expected: Option<String>,
        body: &mut Body,
    ) -> Result<Taken, Error> {
        let beside_others = self.turn(id).read_owned().await;
        let alone = self.turn(&format!("{id}/{number}")).write_owned().await;
        let row = self.get(id).await?;
        if row.status != store::OPEN {
            return Err(Error::new(Code::Conflict, "this upload is complete; begin another"));
        }
        let size = row.size.unsigned_abs();
        if number >= count(size) {
            return Err(Error::bad_request(format!("index must be from 0 to {}, not {number}", count(size).saturating_sub(1))));
        }
        let length = length(size, number);
        if let Some(declared) = declared.filter(|declared| *declared != length) {
            return Err(wrong_length(declared, length, CHUNK));
        }
        let stored = i64::try_from(number).map_err(Error::internal)?;
        let file = match self.part(&row).await? {
            Some(file) => file,
            None => self.part_again(&row).await?,
        };
        let place = Arc::new(Place { file, beside_others, alone });
        store::lack(&self.store, id, stored).await?;
        let sha256 = body.write(place.clone(), number.saturating_mul(CHUNK), length, CHUNK).await?;
        if let Some(expected) = expected.filter(|expected| *expected != sha256) {
            let message = format!("chunk {number} arrived as {sha256}, not as {expected}; send it again");
            return Err(Error::new(Code::VerificationFailed, message));
        }
        store::have(&self.store, id, stored, sha256.clone(), self.expires_at()).await?;
        drop(place);
        Ok(Taken { size: length, sha256 })
    }

    async fn part(&self, row: &uploads::Model) -> Result<Option<File>, Error> {
        let (root, id, size) = (self.root()?, row.id.clone(), row.size.unsigned_abs());
        blocking(move || part::open(&root, &id, size)).await
    }

    /// A part that is not there: a crash cut the beginning, the completion or the removal off. A completion is to be asked for again; else
    /// no chunk is there any more, and the rows must not say so when the file is made anew.
    async fn part_again(&self, row: &uploads::Model) -> Result<File, Error> {
        // Chunks come side by side; one of them makes it.
        let turn = self.turn(&format!("{}/part", row.id));
        let _alone = turn.write().await;
        if let Some(file) = self.part(row).await? {
            return Ok(file);
        }
        let (root, id, name) = (self.root()?, row.id.clone(), row.filename.clone());
        if blocking(move || part::is_published(&root, &id, &name)).await? {
            return Err(Error::new(Code::Conflict, "every chunk of this upload is there; complete it: POST /upload/complete"));
        }
        store::lack_all(&self.store, &row.id).await?;
        let (root, id, size) = (self.root()?, row.id.clone(), row.size.unsigned_abs());
        blocking(move || part::create(&root, &id, size)).await
    }

    /// Completes an upload: everything there, the digest right, on the disk under its own name. Again, it answers the same.
    pub async fn complete(&self, id: &str) -> Result<uploads::Model, Error> {
        let turn = self.turn(id);
        let _alone = turn.write().await;
        let row = self.get(id).await?;
        if row.status != store::OPEN {
            return Ok(row);
        }
        let size = row.size.unsigned_abs();
        let lacking = missing(size, &store::chunks(&self.store, id).await?);
        if !lacking.is_empty() {
            return Err(chunks_missing(&lacking));
        }
        let (root, owned, name) = (self.root()?, id.to_owned(), row.filename.clone());
        let Some(sha256) = blocking(move || part::digest(&root, &owned, &name)).await? else {
            // A crash in its removal: the file is gone, the rows are not.
            store::lack_all(&self.store, id).await?;
            return Err(chunks_missing(&missing(size, &[])));
        };
        if let Some(expected) = row.expected.as_ref().filter(|expected| **expected != sha256) {
            let message =
                format!("the file arrived as {sha256}, not as {expected}; send the chunks that differ again, or delete the upload");
            return Err(Error::new(Code::VerificationFailed, message));
        }
        let (root, owned, name) = (self.root()?, id.to_owned(), row.filename.clone());
        blocking(move || part::publish(&root, &owned, &name)).await?;
        store::complete(&self.store, id, &sha256, now()).await?;
        self.get(id).await
    }

    /// Removes an upload, whole or not, unless a job that is not finished needs it.
    pub async fn remove(&self, id: &str) -> Result<(), Error> {
        let turn = self.turn(id);
        let _alone = turn.write().await;
        let (path, absolute) = self.paths(&self.get(id).await?);
        if let Some(job) = jobs::store::live_by_source(&self.store, vec![path, absolute]).await? {
            return Err(Error::new(Code::Conflict, format!("{job} needs this upload and is not finished")));
        }
        self.remove_all(id).await
    }

    async fn remove_all(&self, id: &str) -> Result<(), Error> {
        let (root, owned) = (self.root()?, id.to_owned());
        blocking(move || part::remove(&root, &owned)).await?;
        Ok(store::remove(&self.store, id, None).await?)
    }

    /// Removes what nobody has sent a chunk for in too long. Answers how many.
    pub async fn sweep(&self) -> Result<usize, Error> {
        let mut removed = 0;
        for row in store::expired(&self.store, now()).await? {
            let turn = self.turn(&row.id);
            let _alone = turn.write().await;
            // A chunk may have come while we waited for our turn.
            let Some(row) = store::load(&self.store, &row.id).await? else { continue };
            if row.status == store::OPEN && row.expires_at < now() {
                self.remove_all(&row.id).await?;
                tracing::info!(upload = row.id, filename = row.filename, "an upload that nobody finished is removed");
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// How often to sweep.
    pub fn sweep_every(&self) -> Duration {
        (self.expiry / 4).clamp(Duration::from_secs(1), Duration::from_secs(600))
    }

    /// Where a complete upload lies: as `uploads/…`, and on this host.
    pub fn paths(&self, row: &uploads::Model) -> (String, String) {
        let named = format!("uploads/{}/{}", row.id, row.filename);
        let absolute = self.vault.locate(&named).map(|place| place.absolute().display().to_string()).unwrap_or_default();
        (named, absolute)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_counted_and_what_is_missing_is_named() {
        assert_eq!((count(1), count(CHUNK), count(CHUNK + 1)), (1, 1, 2));
        assert_eq!((length(25_000_000, 0), length(25_000_000, 2), length(25_000_000, 3)), (CHUNK, 5_000_000, 0));
        assert_eq!(missing(25_000_000, &[]), [0, 1, 2]);
        assert_eq!(missing(25_000_000, &[0, 2]), [1]);
        assert!(missing(25_000_000, &[0, 1, 2]).is_empty());
    }

    #[test]
    fn a_name_is_bare() {
        for good in ["disk.raw", "Web Server (1).ova", "größe.vmdk", "a..b"] {
            check_name(good).unwrap();
        }
        let long = "x".repeat(201);
        for bad in ["", ".", "..", ".hidden", "a/b", "../x", "a\\b", "a\0", "a\nb", " a", "a ", long.as_str()] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_digest("sha256", &"A".repeat(64)).unwrap().starts_with('a') && check_digest("sha256", "ab").is_err());
    }

    /// Uploads over a folder of their own.
    async fn service() -> (Service, std::path::PathBuf) {
        let folder = shared::vault::temporary_dir("uploads").unwrap();
        let mut vault = Vault::default();
        vault.add(shared::vault::Root::open("uploads", &folder, true).unwrap());
        (Service::new(jobs::tests::database().await, Arc::new(vault), &Config::default()), folder)
    }

    async fn send(service: &Service, id: &str, number: u64, bytes: &[u8]) -> Result<Taken, Error> {
        let (request, mut payload) = actix_web::test::TestRequest::default().set_payload(bytes.to_vec()).to_http_parts();
        let payload = <actix_web::web::Payload as actix_web::FromRequest>::from_request(&request, &mut payload).await.unwrap();
        service.chunk(id, number, None, None, &mut Body::new(payload)).await
    }

    #[actix_web::test]
    async fn a_crash_at_the_end_of_an_upload_never_makes_a_file_of_zeros() {
        let (service, folder) = service().await;
        let content = vec![7u8; CHUNK as usize + 1];
        let (first, last) = content.split_at(CHUNK as usize);
        let row = service.draft("ann", "disk.raw".into(), content.len() as i64, None).unwrap();
        let id = row.id.clone();
        service.begin(row, None).await.unwrap();
        for (number, bytes) in [(0, first), (1, last)] {
            send(&service, &id, number, bytes).await.unwrap();
        }
        // Killed in its removal: the file is gone, the rows say that both chunks are there.
        let root = service.root().unwrap();
        part::remove(&root, &id).unwrap();
        send(&service, &id, 1, last).await.unwrap();
        assert_eq!(service.status(&id).await.unwrap().1, [1], "what went with the file is missing");
        assert_eq!(service.complete(&id).await.unwrap_err().code(), Code::Conflict);
        part::remove(&root, &id).unwrap();
        store::have(&service.store, &id, 0, String::new(), now()).await.unwrap();
        assert_eq!(service.complete(&id).await.unwrap_err().code(), Code::Conflict);
        assert!(service.status(&id).await.unwrap().1.is_empty());
        // One that was made with less than its size counts as none.
        part::create(&root, &id, 5).unwrap();
        for (number, bytes) in [(0, first), (1, last)] {
            send(&service, &id, number, bytes).await.unwrap();
        }
        // Killed in its completion: the file has its name, the row is open.
        part::publish(&root, &id, "disk.raw").unwrap();
        let refused = send(&service, &id, 1, last).await.err().unwrap();
        assert!(refused.code() == Code::Conflict && refused.message().contains("complete it"), "{refused}");
        let done = service.complete(&id).await.unwrap();
        let digest = hex::encode(ring::digest::digest(&ring::digest::SHA256, &content));
        assert_eq!((done.status.as_str(), done.sha256), (store::COMPLETE, Some(digest)));
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[actix_web::test]
    async fn an_upload_that_could_not_begin_leaves_no_answer_behind() {
        let (service, folder) = service().await;
        let key = crate::http::idempotency::Idempotency::derived("test", "begin");
        let begin = async || {
            let row = service.draft("ann", "disk.raw".into(), 5, None).unwrap();
            let id = row.id.clone();
            (service.begin(row, Some(key.row(201, "/", String::new()))).await, id)
        };
        std::fs::write(folder.join(part::PARTS), b"").unwrap();
        let (refused, id) = begin().await;
        assert!(refused.is_err() && service.get(&id).await.is_err());
        assert_eq!(key.first_location(&service.store).await.unwrap(), None);
        std::fs::remove_file(folder.join(part::PARTS)).unwrap();
        begin().await.0.unwrap();
        assert!(key.first_location(&service.store).await.unwrap().is_some());
        std::fs::remove_dir_all(folder).unwrap();
    }
}
