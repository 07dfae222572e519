//! Wiring: what the rooms share, the order in which they start, and the order in which they stop.
//!
//! ```text
//! start: keys ▸ store ▸ access ▸ live ▸ fleet ▸ queue ▸ gateway ▸ REST        drain: not ready ▸ no new work ▸ gateway ▸ REST ▸ store
//! ```
//! Owns: [`App`], [`run`], [`Running`]. Never: decides what a room does. A crash here costs nothing: every start is a recovery.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use actix_web::dev::ServerHandle;
use actix_web::{HttpServer, web};
use chrono::{DateTime, Utc};
use shared::secret::Secret;
use shared::vault::{self, Root, Vault};

use crate::config::{self, Config};
use crate::fleet::gateway::{self, Gateway};
use crate::http::{self, limits, tls};
use crate::live::Frame;
use crate::store::sealing::{self, Sealer};
use crate::store::{self, Store, presence};
use crate::system::{host::Sampler, metrics::Metrics, process};
use crate::{access, admin, alerts, carbon, files, fleet, jobs, live, schedules, uploads, webhooks};

/// How long a drain waits for requests that are under way.
const REQUESTS: Duration = Duration::from_secs(15);
/// How often the system's figures are told to the watchers.
const FIGURES: Duration = Duration::from_secs(5);
/// How often the operator's certificate is looked at.
const CERTIFICATE: Duration = Duration::from_secs(2);
/// How often the join token in `join_token_out` is renewed; it lives an hour.
const TOKEN_RENEWAL: Duration = Duration::from_secs(45 * 60);

/// What the rooms share; handlers get it as `web::Data<App>`.
pub struct App {
    /// Settings.
    pub config: Arc<Config>,
    /// The database.
    pub store: Store,
    /// Seals secrets at rest.
    pub sealer: Sealer,
    /// Users, passwords, tokens.
    pub access: access::service::Service,
    /// News.
    pub live: live::Handle,
    /// The job queue.
    pub queue: jobs::queue::Handle,
    /// The agents.
    pub fleet: fleet::registry::Handle,
    /// The roots of this controller.
    pub vault: Arc<Vault>,
    /// The grid.
    pub carbon: carbon::service::Service,
    /// What people send.
    pub uploads: uploads::service::Service,
    /// Figures.
    pub metrics: Metrics,
    /// The host's figures.
    pub sampler: Sampler,
    /// The runtime of tonic and the database.
    pub runtime: tokio::runtime::Handle,
    /// When this process started.
    pub started_at: DateTime<Utc>,
    /// Set by the drain: no new work is taken.
    pub draining: AtomicBool,
}

impl App {
    /// Whether the drain has begun.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Names and ids of the agents that are connected to this controller, by name.
    pub async fn connected_agents(&self) -> Result<Vec<store::entities::agents::Model>, store::Error> {
        let mut agents = self.fleet.agents().await?;
        agents.retain(|agent| self.fleet.is_connected(&agent.id));
        Ok(agents)
    }
}

/// Why the controller did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The data directory.
    #[error("data directory {0}: {1}")]
    Data(PathBuf, std::io::Error),
    /// Another controller uses it.
    #[error("data directory {0} is in use by another controller")]
    InUse(PathBuf),
    /// The sealing key.
    #[error(transparent)]
    Sealing(#[from] sealing::Error),
    /// The database.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// TLS.
    #[error("TLS: {0}")]
    Tls(#[from] tls::Error),
    /// A restore that was cut off.
    #[error(transparent)]
    Restore(#[from] admin::Error),
    /// The CA.
    #[error("certificate authority: {0}")]
    Authority(#[from] fleet::ca::Error),
    /// The gateway.
    #[error(transparent)]
    Gateway(#[from] gateway::Error),
    /// An address cannot be listened at.
    #[error("cannot listen at {0}: {1}")]
    Listen(SocketAddr, std::io::Error),
    /// The rest.
    #[error("{0}")]
    Start(String),
}

impl From<http::reply::Error> for Error {
    fn from(error: http::reply::Error) -> Self {
        Error::Start(error.message().to_owned())
    }
}

/// A running controller. It goes on until [`Running::drain`]; dropped without, the process's end ends it.
pub struct Running {
    /// Where REST listens.
    pub rest_addr: SocketAddr,
    /// Where agents dial in.
    pub grpc_addr: SocketAddr,
    /// SHA-256 of the REST certificate, hex.
    pub fingerprint: String,
    /// The first admin's password, only when it was made just now.
    pub admin_password: Option<Secret>,
    /// What the rooms share.
    pub app: web::Data<App>,
    server: ServerHandle,
    gateway: Gateway,
    runtime: tokio::runtime::Runtime,
    /// Both held while the controller runs.
    _lock: std::fs::File,
    _presence: presence::Shared,
}

impl Running {
    /// A join token for one agent, good for an hour.
    pub async fn join_token(&self) -> Result<Secret, Error> {
        Ok(self.app.fleet.join_token("installation", None, fleet::enroll::LONGEST).await?.text)
    }

    /// Stops in order: `/readyz` says no, no new work, agents are told to come back, requests under way are finished, the store is closed.
    pub async fn drain(self) {
        self.app.draining.store(true, Ordering::Relaxed);
        tracing::info!("draining");
        self.app.queue.drain().await;
        self.app.live.close();
        self.gateway.stop().await;
        if tokio::time::timeout(REQUESTS, self.server.stop(true)).await.is_err() {
            self.server.stop(false).await;
        }
        if let Err(e) = self.app.store.clone().close().await {
            tracing::warn!(cause = %e, "database was not closed cleanly");
        }
        self.runtime.shutdown_background();
        tracing::info!("stopped");
    }
}

/// Starts everything. To be called inside a running actix system, whose thread runs the actors.
pub async fn run(config: Config) -> Result<Running, Error> {
    config.check()?;
    let config = Arc::new(config);
    let data = vault::open_data_dir(&config.data_dir).map_err(|e| Error::Data(config.data_dir.clone(), e))?;
    vault::make_private(&config.data_dir).map_err(|e| Error::Data(config.data_dir.clone(), e))?;
    let lock = vault::lock(&data, "controller.lock").map_err(|e| Error::Data(config.data_dir.clone(), e))?;
    let lock = lock.ok_or_else(|| Error::InUse(config.data_dir.clone()))?;
    // Listening first: an address that is taken should not cost a migration.
    let (rest_listener, rest_addr) = listen(config.listen)?;
    let (grpc_listener, grpc_addr) = listen(config.grpc_listen)?;

    let runtime = tokio::runtime::Builder::new_multi_thread().thread_name("controller").enable_all().build();
    let runtime = runtime.map_err(|e| Error::Start(format!("cannot start threads: {e}")))?;
    let handle = runtime.handle().clone();
    let presence = presence::share(config.database().expose(), &handle).await?;
    let store = Store::open(config.database().expose(), handle.clone()).await?;
    // Keys are read after a restore that was cut off is finished or forgotten.
    admin::restore::complete(&data, &store).await?;
    let (tls, fingerprint, certificate) = tls::server(&config, &data)?;
    let sealer = Sealer::open(config.sealing_key.as_ref(), &data)?;
    let access = access::service::Service::open(store.clone(), &sealer, &config).await?;
    let admin_password = access.first_admin(config.admin_password.clone()).await?;
    let metrics = Metrics::new().map_err(|e| Error::Start(e.to_string()))?;
    let live = live::Handle::start();
    let fleet = fleet::registry::Handle::open(store.clone(), &sealer, live.clone(), metrics.clone()).await?;
    let queue = jobs::queue::Handle::start(store.clone(), Arc::new(fleet.clone()), live.clone(), metrics.clone()).await?;
    let carbon = carbon::service::Service::open(&config.carbon, handle.clone()).map_err(Error::Start)?;
    let names = grpc_names(&config);
    let mut vault = Vault::default();
    vault.add(Root::open("uploads", &config.uploads(), true).map_err(|e| Error::Data(config.uploads(), e))?);
    let vault = Arc::new(vault);
    let shelf = Arc::new(uploads::shelf::Shelf { store: store.clone(), vault: vault.clone() });
    let gateway = Gateway::start(grpc_listener, &names, fleet.clone(), queue.clone(), shelf, &handle)?;
    let app = web::Data::new(App {
        uploads: uploads::service::Service::new(store.clone(), vault.clone(), &config),
        config: Arc::clone(&config),
        store,
        sealer,
        access,
        live,
        queue,
        fleet,
        vault,
        carbon,
        metrics,
        sampler: Sampler::default(),
        runtime: handle,
        started_at: shared::clock::now(),
        draining: AtomicBool::new(false),
    });
    let server = serve(&config, app.clone(), rest_listener, tls)?;
    actix::spawn(tell_figures(app.clone()));
    actix::spawn(schedules::ticker::run(app.clone()));
    actix::spawn(carbon::waiter::run(app.clone()));
    actix::spawn(files::sweep::uploads(app.clone()));
    actix::spawn(files::sweep::exports(app.clone()));
    alerts::watch::start(app.clone());
    webhooks::courier::start(app.clone());
    if let Some(path) = config.join_token_out.clone() {
        write_join_token(&app, &path).await?;
        actix::spawn(renew_join_token(app.clone(), path));
    }
    let endpoints = Endpoints { data, rest_addr, grpc_addr };
    endpoints.write(&fingerprint).map_err(|e| Error::Data(config.data_dir.clone(), e))?;
    if let Some(certificate) = certificate {
        actix::spawn(watch_certificate(app.clone(), certificate, endpoints));
    }
    tracing::info!(%rest_addr, %grpc_addr, fingerprint, version = env!("CARGO_PKG_VERSION"), "controller is up");
    Ok(Running { rest_addr, grpc_addr, fingerprint, admin_password, app, server, gateway, runtime, _lock: lock, _presence: presence })
}

/// Port 0 takes a free one; whoever started this process, and whoever restarts it, finds here which.
struct Endpoints {
    data: vault::Dir,
    rest_addr: SocketAddr,
    grpc_addr: SocketAddr,
}

impl Endpoints {
    fn write(&self, fingerprint: &str) -> std::io::Result<()> {
        let Self { data, rest_addr, grpc_addr } = self;
        let text = serde_json::json!({"rest": format!("https://{rest_addr}"), "grpc": grpc_addr.to_string(), "fingerprint": fingerprint});
        vault::write_whole(data, "endpoints.json", text.to_string().as_bytes())
    }
}

/// Takes a renewed certificate of the operator's within a few seconds.
async fn watch_certificate(app: web::Data<App>, mut watch: tls::Watch, endpoints: Endpoints) {
    while !app.is_draining() {
        tokio::time::sleep(CERTIFICATE).await;
        let look = move || {
            let renewed = watch.look();
            (watch, renewed)
        };
        let renewed;
        (watch, renewed) = match web::block(look).await {
            Ok(looked) => looked,
            Err(e) => return tracing::error!(cause = %e, "nobody looks after the certificate any more"),
        };
        if let Some(fingerprint) = renewed
            && let Err(e) = endpoints.write(&fingerprint)
        {
            tracing::warn!(cause = %e, "endpoints.json names the certificate of before");
        }
    }
}

fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let bound = TcpListener::bind(address).and_then(|listener| {
        let bound = listener.local_addr()?;
        Ok((listener, bound))
    });
    bound.map_err(|e| Error::Listen(address, e))
}

/// What agents may dial this controller by.
fn grpc_names(config: &Config) -> Vec<String> {
    if !config.grpc_names.is_empty() {
        return config.grpc_names.clone();
    }
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    names.extend(tls::hostname());
    let address = config.grpc_listen.ip();
    if !address.is_unspecified() && !address.is_loopback() {
        names.push(address.to_string());
    }
    names
}

fn serve(config: &Config, app: web::Data<App>, listener: TcpListener, tls: rustls::ServerConfig) -> Result<ServerHandle, Error> {
    let (anonymous, users) = limits::limiters(config).map_err(Error::Start)?;
    let mut server = HttpServer::new(move || http::application(app.clone(), &anonymous, &users))
        .disable_signals()
        .client_request_timeout(Duration::from_secs(5))
        .client_disconnect_timeout(Duration::from_secs(2))
        .keep_alive(Duration::from_secs(75))
        .tls_handshake_timeout(Duration::from_secs(5))
        .shutdown_timeout(REQUESTS.as_secs());
    if config.workers > 0 {
        server = server.workers(config.workers);
    }
    let server = server.listen_rustls_0_23(listener, tls).map_err(|e| Error::Listen(config.listen, e))?.run();
    let handle = server.handle();
    actix::spawn(async move {
        if let Err(e) = server.await {
            tracing::error!(cause = %e, "REST server stopped");
        }
    });
    Ok(handle)
}

/// Tells the system's figures until the drain.
async fn tell_figures(app: web::Data<App>) {
    let mut ticks = tokio::time::interval(FIGURES);
    let mut before = (std::time::Instant::now(), process::cpu_seconds());
    while !app.is_draining() {
        ticks.tick().await;
        let now = (std::time::Instant::now(), process::cpu_seconds());
        let elapsed = now.0.duration_since(before.0).as_secs_f64();
        let cpu_percent = if elapsed > 0.0 { ((now.1 - before.1) / elapsed * 1000.0).round() / 10.0 } else { 0.0 };
        before = now;
        let data = serde_json::json!({
            "resident_bytes": process::resident_bytes(),
            "cpu_percent": cpu_percent,
            "uptime_seconds": (shared::clock::now() - app.started_at).num_seconds(),
            "agents_connected": app.metrics.agents_connected.get(),
            "queue_depth": app.metrics.queue_depth.get(),
            "jobs": app.queue.by_public_status(),
        });
        app.live.publish(Frame::new("system.metrics", vec!["metrics".to_owned()], data));
    }
}

async fn write_join_token(app: &App, path: &std::path::Path) -> Result<(), Error> {
    let token = app.fleet.join_token("installation", None, fleet::enroll::LONGEST).await?;
    vault::write_private(path, token.text.expose().as_bytes()).map_err(|e| Error::Start(format!("{}: {e}", path.display())))
}

/// Puts a fresh token where the installation's agents look for one; the one before stays good until its hour is over.
async fn renew_join_token(app: web::Data<App>, path: PathBuf) {
    loop {
        tokio::time::sleep(TOKEN_RENEWAL).await;
        if app.is_draining() {
            return;
        }
        if let Err(e) = write_join_token(&app, &path).await {
            tracing::warn!(cause = %e, "join token was not renewed");
        }
    }
}
