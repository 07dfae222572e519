//! The database: what must survive any kill of any process.
//!
//! Stored: users, sessions, settings, idempotency keys, audit, connections, VMs (this room and its neighbours), jobs, agents (their
//! rooms). Not stored: heartbeats, progress counters, WebSocket positions; they are said again by whoever knows them.
//!
//! Owns: the connection, the retry at the start, the translation of database errors into the three that matter.
//! Never: is used on an actix worker: [`Store::run`] carries the work over to the tokio runtime, where the pooled connections live.
//! A crash here costs nothing that was answered: SQLite runs with WAL and `synchronous=FULL`, Postgres as it is configured.
//!
//! SQLite has one writer: [`Store::run`] takes a lock on it, so a transaction that reads and then writes never finds the database
//! busy. [`Store::read`] goes beside it. On Postgres both are the same.

pub mod entities;
pub mod migrations;
pub mod presence;
pub mod sealing;

use std::future::Future;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use sea_orm::sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous};
use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, RuntimeErr, SqlErr,
    TransactionError, sqlx,
};
use sea_orm_migration::{MigrationStatus, MigratorTrait};
use tokio::sync::Mutex;

/// How long the start waits for a database that is not up yet.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long reads fail at once after one found the database away.
const AWAY: Duration = Duration::from_millis(500);

/// What went wrong, in the three kinds that callers tell apart.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The database is not reachable or busy; the same call may work in a moment.
    #[error("the database is away: {0}")]
    Away(String),
    /// A unique key is taken.
    #[error("already there: {0}")]
    Conflict(String),
    /// Our defect, or a broken database.
    #[error("database: {0}")]
    Other(String),
}

/// The database, for any thread to use.
#[derive(Clone)]
pub struct Store {
    db: DatabaseConnection,
    runtime: tokio::runtime::Handle,
    writer: Option<Arc<Mutex<()>>>,
    /// When a read found the database away; see [`Store::read`].
    away: Arc<std::sync::Mutex<Option<Instant>>>,
}

impl Store {
    /// Connects, waiting up to a minute for a database that is not up yet, and brings its tables up to date.
    /// `url`: `sqlite://FILE?mode=rwc` or `postgres://…`. `runtime` is where all its work will run.
    pub async fn open(url: &str, runtime: tokio::runtime::Handle) -> Result<Self, Error> {
        let options = options(url)?;
        let connect = async move { patiently(|| connect(options.clone())).await };
        let db = runtime.spawn(connect).await.map_err(|e| Error::Other(e.to_string()))??;
        let writer = (db.get_database_backend() == DbBackend::Sqlite).then(|| Arc::new(Mutex::new(())));
        Ok(Self { db, runtime, writer, away: Arc::default() })
    }

    /// Connects to a database that has just the tables of this version, and leaves them as they are: beside a controller that runs.
    pub async fn attach(url: &str, runtime: tokio::runtime::Handle) -> Result<Self, Error> {
        // A file that is not there is not to be made.
        let mut options = options(&url.replace("mode=rwc", "mode=rw"))?;
        options.max_connections(2);
        let connect = async move {
            let db = Database::connect(options).await?;
            let own = migrations::Migrator::get_migration_with_status_read_only(&db).await;
            let is_ours = own.is_ok_and(|all| all.iter().all(|one| one.status() == MigrationStatus::Applied));
            if is_ours { Ok(db) } else { Err(Error::Other("it has the tables of another version, or none; use that version".to_owned())) }
        };
        let db = runtime.spawn(connect).await.map_err(|e| Error::Other(e.to_string()))??;
        let writer = (db.get_database_backend() == DbBackend::Sqlite).then(|| Arc::new(Mutex::new(())));
        Ok(Self { db, runtime, writer, away: Arc::default() })
    }

    /// Runs work that may write. One at a time on SQLite.
    pub async fn run<T, F, Fut>(&self, work: F) -> Result<T, Error>
    where
        F: FnOnce(DatabaseConnection) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, Error>> + Send,
        T: Send + 'static,
    {
        let (db, writer) = (self.db.clone(), self.writer.clone());
        let task = self.runtime.spawn(async move {
            let _turn = match &writer {
                Some(writer) => Some(writer.lock().await),
                None => None,
            };
            work(db).await
        });
        task.await.map_err(|e| Error::Other(e.to_string()))?
    }

    /// Runs work that only reads, beside the writer. For half a second after one read has waited in vain the others do not wait: they
    /// say at once that the database is away, so that a caller gets its 503 after one wait and not after several.
    pub async fn read<T, F, Fut>(&self, work: F) -> Result<T, Error>
    where
        F: FnOnce(DatabaseConnection) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, Error>> + Send,
        T: Send + 'static,
    {
        let noted = *self.away.lock().unwrap_or_else(PoisonError::into_inner);
        if noted.is_some_and(|when| when.elapsed() < AWAY) {
            return Err(Error::Away("it was a moment ago".to_owned()));
        }
        let db = self.db.clone();
        let task = self.runtime.spawn(async move { work(db).await });
        let answer = task.await.map_err(|e| Error::Other(e.to_string()))?;
        let is_away = matches!(answer, Err(Error::Away(_)));
        if is_away || noted.is_some() {
            *self.away.lock().unwrap_or_else(PoisonError::into_inner) = is_away.then(Instant::now);
        }
        answer
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), Error> {
        self.read(|db| async move { Ok(db.ping().await?) }).await
    }

    /// Bytes that the database takes on its disk, its log left out.
    pub async fn size(&self) -> Result<u64, Error> {
        let sql = if self.is_postgres() {
            "SELECT pg_database_size(current_database()) AS size"
        } else {
            "SELECT page_count * page_size AS size FROM pragma_page_count(), pragma_page_size()"
        };
        let ask = move |db: DatabaseConnection| async move {
            let row = db.query_one_raw(sea_orm::Statement::from_string(db.get_database_backend(), sql)).await?;
            let size: i64 = row.ok_or_else(|| Error::Other("no size".to_owned()))?.try_get("", "size")?;
            Ok(u64::try_from(size).unwrap_or(0))
        };
        self.read(ask).await
    }

    /// Whether this is Postgres, where several controllers may share the tables.
    pub fn is_postgres(&self) -> bool {
        self.writer.is_none()
    }

    /// Closes the connections; what was committed stays.
    pub async fn close(self) -> Result<(), Error> {
        let db = self.db;
        let task = self.runtime.spawn(async move { db.close().await });
        Ok(task.await.map_err(|e| Error::Other(e.to_string()))??)
    }
}

/// Tries until the database is up, a minute at most.
async fn patiently<T, Fut: Future<Output = Result<T, Error>>>(connect: impl Fn() -> Fut) -> Result<T, Error> {
    let started = Instant::now();
    loop {
        match connect().await {
            Err(Error::Away(reason)) if started.elapsed() < START_PATIENCE => {
                tracing::warn!(reason, "database is not reachable yet");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            connected => return connected,
        }
    }
}

/// Lets the statements of a transaction take as long as they take; elsewhere Postgres ends them after 15 s.
pub async fn no_time_limit(transaction: &DatabaseTransaction) -> Result<(), DbErr> {
    if transaction.get_database_backend() == DbBackend::Postgres {
        transaction.execute_unprepared("SET LOCAL statement_timeout = 0").await?;
    }
    Ok(())
}

/// Names of this version's migrations: which tables it has.
pub fn migrations() -> Vec<String> {
    migrations::Migrator::migrations().iter().map(|migration| migration.name().to_owned()).collect()
}

/// Text as it is stored for searching: lower case, so that both databases find the same rows.
pub fn fold(text: &str) -> String {
    text.to_lowercase()
}

/// A folded search word as the pattern of `LIKE … ESCAPE '\'`, its own wildcards made plain.
pub fn like(word: &str) -> sea_orm::sea_query::LikeExpr {
    let escaped = fold(word).replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_");
    sea_orm::sea_query::LikeExpr::new(format!("%{escaped}%")).escape('\\')
}

fn options(url: &str) -> Result<ConnectOptions, Error> {
    let mut options = ConnectOptions::new(url);
    options.sqlx_logging(false).acquire_timeout(Duration::from_secs(3)).connect_timeout(Duration::from_secs(3));
    if url.starts_with("sqlite:") {
        options.max_connections(5).min_connections(1).idle_timeout(None).max_lifetime(None);
        options.map_sqlx_sqlite_opts(|sqlite| {
            sqlite
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
                .foreign_keys(true)
                .busy_timeout(Duration::from_secs(5))
        });
    } else if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        options.max_connections(16).statement_timeout(Duration::from_secs(15));
    } else {
        return Err(Error::Other("database_url must begin with sqlite:// or postgres://".to_owned()));
    }
    Ok(options)
}

async fn connect(options: ConnectOptions) -> Result<DatabaseConnection, Error> {
    let db = Database::connect(options.clone()).await?;
    if db.get_database_backend() == DbBackend::Sqlite {
        migrate(&db).await?;
        return Ok(db);
    }
    // On connections of its own: the migration of a large table takes as long as it takes.
    let mut patient = options;
    patient.max_connections(2).statement_timeout(Duration::ZERO);
    let patient = Database::connect(patient).await?;
    migrate(&patient).await?;
    patient.close().await?;
    Ok(db)
}

async fn migrate(db: &DatabaseConnection) -> Result<(), DbErr> {
    // Several controllers that start at once: the loser's migration fails on the winner's table, and passes at the second look.
    if migrations::Migrator::up(db, None).await.is_err() {
        tokio::time::sleep(Duration::from_millis(500)).await;
        migrations::Migrator::up(db, None).await?;
    }
    Ok(())
}

impl From<DbErr> for Error {
    fn from(error: DbErr) -> Self {
        if let Some(SqlErr::UniqueConstraintViolation(what)) = error.sql_err() {
            return Error::Conflict(what);
        }
        let text = error.to_string();
        match &error {
            DbErr::ConnectionAcquire(_) | DbErr::Conn(_) => Error::Away(text),
            DbErr::Exec(RuntimeErr::SqlxError(e)) | DbErr::Query(RuntimeErr::SqlxError(e)) if is_away(e) => Error::Away(text),
            _ => Error::Other(text),
        }
    }
}

impl From<TransactionError<DbErr>> for Error {
    fn from(error: TransactionError<DbErr>) -> Self {
        match error {
            TransactionError::Connection(e) | TransactionError::Transaction(e) => e.into(),
        }
    }
}

impl From<TransactionError<Error>> for Error {
    fn from(error: TransactionError<Error>) -> Self {
        match error {
            TransactionError::Connection(e) => e.into(),
            TransactionError::Transaction(e) => e,
        }
    }
}

fn is_away(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => true,
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed | sqlx::Error::BeginFailed => true,
        sqlx::Error::Database(e) => e.code().is_some_and(|code| is_away_code(&code)),
        _ => false,
    }
}

/// Postgres: connection trouble, shutdown, start-up, too many clients, serialisation; SQLite: busy, locked, I/O, full, cannot open.
fn is_away_code(code: &str) -> bool {
    let postgres = code.len() == 5 && (code.starts_with("08") || code.starts_with("57P") || code.starts_with("53"));
    // An extended SQLite code carries the plain one in its low byte.
    let sqlite = code.len() < 5 && code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 5 | 6 | 10 | 13 | 14));
    postgres || sqlite || matches!(code, "40001" | "40P01" | "57014")
}
