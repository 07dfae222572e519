//! Who is at a Postgres: any number of controllers, or one restore. Beside each other they would spoil what the other holds to be true.
//!
//! ```text
//! controller: shared ─lost with its connection─► taken again ─not to be had, a restore is here─► the process ends
//! restore:    alone, or not at all
//! ```
//! Owns: an advisory lock on a connection of its own for as long as somebody is there; it ends with that connection, so with a kill, too.
//! Never: asks for SQLite, where the lock on the data directory says the same. A crash here costs nothing that the lock's end does not.

use std::str::FromStr;
use std::time::Duration;

use sea_orm::sqlx::postgres::PgConnectOptions;
use sea_orm::sqlx::{self, ConnectOptions, PgConnection};

use super::{Error, patiently};

/// The lock: `HyperSDK`. It is one of the database, not of the whole server.
const LOCK: i64 = 0x4879_7065_7253_444b;
const SHARED: &str = "SELECT pg_try_advisory_lock_shared($1)";
const ALONE: &str = "SELECT pg_try_advisory_lock($1)";
/// How often a controller looks whether its connection still stands.
const LOOK: Duration = Duration::from_secs(5);
/// How long a connection or an answer may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a restore waits for the lock of a controller that ended just now.
const AFTERMATH: Duration = Duration::from_secs(3);

/// A controller is here until this is dropped.
pub struct Shared(Option<tokio::task::AbortHandle>);

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(keeper) = &self.0 {
            keeper.abort();
        }
    }
}

/// A restore is here until this is dropped.
pub struct Alone {
    _held: Option<PgConnection>,
}

fn is_postgres(url: &str) -> bool {
    url.starts_with("postgres")
}

/// A controller comes. It waits a minute for a database that is not up yet, and for the end of a restore.
pub async fn share(url: &str, runtime: &tokio::runtime::Handle) -> Result<Shared, Error> {
    if !is_postgres(url) {
        return Ok(Shared(None));
    }
    let url = url.to_owned();
    let first = url.clone();
    let take = async move {
        patiently(|| async {
            let held = lock(&first, SHARED).await?;
            held.ok_or_else(|| Error::Away("a restore is running on it".to_owned()))
        })
        .await
    };
    let held = runtime.spawn(take).await.map_err(|e| Error::Other(e.to_string()))??;
    Ok(Shared(Some(runtime.spawn(keep(url, held)).abort_handle())))
}

/// A restore comes; nothing where a controller or another restore is here.
pub async fn alone(url: &str, runtime: &tokio::runtime::Handle) -> Result<Option<Alone>, Error> {
    if !is_postgres(url) {
        return Ok(Some(Alone { _held: None }));
    }
    let url = url.to_owned();
    let take = async move {
        let began = tokio::time::Instant::now();
        loop {
            let held = lock(&url, ALONE).await?;
            if held.is_some() || began.elapsed() > AFTERMATH {
                return Ok::<_, Error>(held);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let held = runtime.spawn(take).await.map_err(|e| Error::Other(e.to_string()))??;
    Ok(held.map(|held| Alone { _held: Some(held) }))
}

/// Holds a controller's share: who lost it takes it again, unless a restore is there, under which no controller may go on.
async fn keep(url: String, mut held: PgConnection) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Err(cause) = answer(sqlx::query_scalar::<_, i32>("SELECT 1").fetch_one(&mut held)).await else { continue };
        tracing::warn!(%cause, "the connection that says that this controller runs is lost; it is made again");
        held = loop {
            match lock(&url, SHARED).await {
                Ok(Some(held)) => break held,
                Ok(None) => {
                    tracing::error!("a restore has the database; this controller ends, since what it knows is no longer so");
                    std::process::exit(1);
                }
                Err(error) => tracing::debug!(%error, "the database is away still"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
    }
}

/// A new connection that has the lock, where it is to be had.
async fn lock(url: &str, sql: &'static str) -> Result<Option<PgConnection>, Error> {
    let options = PgConnectOptions::from_str(url).map_err(|e| Error::Other(e.to_string()))?.disable_statement_logging();
    let mut connection = answer(options.connect()).await?;
    let is_held: bool = answer(sqlx::query_scalar(sql).bind(LOCK).fetch_one(&mut connection)).await?;
    Ok(is_held.then_some(connection))
}

async fn answer<T>(question: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Error> {
    match tokio::time::timeout(PATIENCE, question).await {
        Ok(answer) => answer.map_err(|e| Error::Away(e.to_string())),
        Err(_) => Err(Error::Away(format!("no answer in {} s", PATIENCE.as_secs()))),
    }
}
