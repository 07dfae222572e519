//! What an operator does at the machine, beside a controller or in its place: a lost password, a backup, a restore.
//!
//! ```text
//! backup:  database (one snapshot, every table as JSON lines) + key files ─► one file, 0600, SHA-256 at its end
//! restore: check the sum ─► stage the key files ─► one transaction over all tables ─► put the files in place
//! ```
//! Owns: the backup's format and the order of a restore. Never: prints a key; changes anything before the whole backup was checked.
//! A crash here costs the attempt: a backup has no name before it is whole, a restore is finished or forgotten by the next start
//! ([`restore::complete`]).
//!
//! A backup is logical, so SQLite's restores into Postgres and the other way round; only by the version that made it, since rows fit
//! one set of tables. It holds the database (users, hashed tokens, jobs, logs, audit, the sealed CA), the sealing key and the
//! self-signed TLS pair. Not in it: exports and uploads, and a certificate that the operator keeps elsewhere (`tls_cert`, `tls_key`).

pub mod archive;
pub mod backup;
pub mod restore;
pub mod tables;

use shared::error::Code;
use shared::secret::Secret;
use shared::vault;

use crate::access::{password, users};
use crate::config::Config;
use crate::http::reply::Error as Refused;
use crate::store::{self, Store};
use crate::system::audit;

/// Files of the data directory that belong to the installation.
pub const FILES: [&str; 3] = ["sealing.key", "rest-key.pem", "rest-cert.pem"];

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file.
    #[error("{0}: {1}")]
    Io(String, std::io::Error),
    /// The database.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The controller runs.
    #[error("a controller runs on {0}; stop it first")]
    Running(String),
    /// It cannot be done, and why.
    #[error("{0}")]
    Refused(String),
}

impl From<sea_orm::DbErr> for Error {
    fn from(error: sea_orm::DbErr) -> Self {
        Error::Store(error.into())
    }
}

pub(super) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    move |e| Error::Io(what.into(), e)
}

/// The data directory, which must be there.
pub(super) fn data_dir(config: &Config) -> Result<vault::Dir, Error> {
    let shown = config.data_dir.display().to_string();
    if vault::real_user_path(&config.data_dir).is_err() {
        return Err(Error::Refused(format!("no data directory {shown}; name it with --data-dir or --config")));
    }
    vault::open_data_dir(&config.data_dir).map_err(io(shown))
}

/// Gives a user a new password and ends their sessions; beside a running controller, too. Answers the password where one was made.
pub async fn reset_password(
    config: &Config,
    user: &str,
    given: Option<Secret>,
    runtime: tokio::runtime::Handle,
) -> Result<Option<Secret>, Error> {
    data_dir(config)?;
    let store = Store::attach(config.database().expose(), runtime).await?;
    let made = given.is_none();
    let secret = given.unwrap_or_else(|| Secret::new(shared::ids::random_hex::<12>()));
    let length = secret.expose().chars().count();
    if length < password::MIN_CHARS || secret.expose().len() > password::MAX_BYTES || secret.expose().contains('\0') {
        let rule = format!("the password must have {} characters or more and {} bytes or fewer", password::MIN_CHARS, password::MAX_BYTES);
        return Err(Error::Refused(rule));
    }
    let hasher = password::Passwords::new(config.bcrypt_cost).await.map_err(refused)?;
    let hash = hasher.hash(secret.clone()).await.map_err(refused)?;
    let act = audit::begin(&store, "hypersdk admin", "user.reset_password", user).await.map_err(refused)?;
    let done = reset(&store, user, hash).await;
    act.finish(&done).await;
    done.map_err(|e| match e.code() {
        Code::NotFound => Error::Refused(format!("no user `{user}` in this installation")),
        _ => refused(e),
    })?;
    store.close().await?;
    Ok(made.then_some(secret))
}

async fn reset(store: &Store, user: &str, hash: String) -> Result<(), Refused> {
    if !users::is_name(user) {
        return Err(Refused::not_found("no such user"));
    }
    users::update(store, user, Some(hash), None).await.map(drop)
}

fn refused(error: Refused) -> Error {
    Error::Refused(error.message().to_owned())
}
