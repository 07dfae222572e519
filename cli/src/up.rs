//! `hypersdk up`: controller and one agent in this process, on the embedded database.
//!
//! Owns: the order in which both start and stop, and what the operator is told at the start. The agent talks to the controller by gRPC as
//! any other agent would; only the join token takes a short way.
//! Never: shares memory between the two. A crash here costs what a power cut costs: the next start goes on from store and journal.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use shared::secret::Secret;
use shared::vault;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};

use crate::args::Up;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::session::variable;

/// What is logged where `HYPERSDK_LOG` does not say: our own news, and of the frameworks what is wrong.
const LOGS: &str = "info,sea_orm_migration=warn,actix_server=warn";
/// The agent parks its jobs within this time.
const AGENT_STOP: Duration = Duration::from_secs(8);
/// And the controller closes within this; together 25 s, under the 30 s after which an orchestrator kills.
const CONTROLLER_STOP: Duration = Duration::from_secs(17);

/// What an installation needs to know.
pub struct Settings {
    /// REST and web page.
    pub listen: SocketAddr,
    /// The agent's door.
    pub grpc_listen: SocketAddr,
    /// Everything that is kept: `controller/`, `agent/`, `exports/`.
    pub data_dir: PathBuf,
    /// Folder of images and OVAs.
    pub vms: Option<PathBuf>,
    /// The rest of the controller's settings.
    pub controller: controller::Config,
}

/// Controller and agent, running.
pub struct Installation {
    /// The controller's side.
    pub running: controller::Running,
    /// `https://HOST:PORT` of the REST API, as reached from this host.
    pub url: String,
    /// Where exports go.
    pub exports: PathBuf,
    agent: oneshot::Receiver<Result<(), agent::Error>>,
    stop_agent: watch::Sender<bool>,
}

impl Installation {
    /// Starts both; must be called inside an actix system. The REST API answers when this returns, the agent may still be on its way.
    pub async fn start(settings: Settings) -> Result<Self, Failure> {
        let data_dir = std::path::absolute(&settings.data_dir).map_err(|e| at(&settings.data_dir, &e))?;
        let vms = settings.vms.as_deref().map(|vms| std::path::absolute(vms).map_err(|e| at(vms, &e))).transpose()?;
        if let Some(vms) = &vms {
            // A wrong folder is said here and now, not by an agent that ends a moment later.
            vault::Root::open("vms", vms, false).map_err(|e| at(vms, &e))?;
        }
        let mut config = settings.controller;
        config.listen = settings.listen;
        config.grpc_listen = settings.grpc_listen;
        config.data_dir = data_dir.join("controller");
        let agent_host = reachable(settings.grpc_listen.ip());
        // Names that somebody set may leave out the one that the agent in here dials.
        if !config.grpc_names.is_empty() {
            config.grpc_names.push(agent_host.to_string());
        }
        let running = controller::run(config).await.map_err(|e| Failure::failed(format!("the controller does not start: {e}")))?;
        match with_agent(&running, agent_host, &data_dir, vms).await {
            Ok((agent, stop_agent)) => {
                let address = SocketAddr::new(reachable(running.rest_addr.ip()), running.rest_addr.port());
                Ok(Self { url: format!("https://{address}"), exports: data_dir.join("exports"), running, agent, stop_agent })
            }
            Err(failure) => {
                // Its threads must not be dropped on an actor's thread.
                running.drain().await;
                Err(failure)
            }
        }
    }

    /// Waits until the agent ends by itself, which it does for a reason.
    pub async fn agent_ended(&mut self) -> Failure {
        match (&mut self.agent).await {
            Ok(Ok(())) => Failure::failed("the agent has ended"),
            Ok(Err(e)) => Failure::failed(format!("the agent has ended: {e}")),
            Err(_) => Failure::failed("the agent has crashed"),
        }
    }

    /// Agent first, so that it can still say how far its jobs are; then the controller.
    pub async fn stop(mut self) {
        let _ = self.stop_agent.send(true);
        if !self.agent.is_terminated() && tokio::time::timeout(AGENT_STOP, &mut self.agent).await.is_err() {
            tracing::warn!("the agent did not stop in time; its jobs go on from their last checkpoint");
        }
        let mut drain = Box::pin(self.running.drain());
        if tokio::time::timeout(CONTROLLER_STOP, &mut drain).await.is_err() {
            tracing::warn!("the controller did not stop in time; the store is whole anyway");
            // It holds threads that must not be dropped on an actor's thread; the process ends now anyway.
            std::mem::forget(drain);
        }
    }
}

/// How the agent ended, once it has; and what asks it to.
type Agent = (oneshot::Receiver<Result<(), agent::Error>>, watch::Sender<bool>);

/// Starts the agent on threads of its own.
async fn with_agent(running: &controller::Running, host: IpAddr, data_dir: &Path, vms: Option<PathBuf>) -> Result<Agent, Failure> {
    let config = agent::config::Config {
        controller: format!("https://{}", SocketAddr::new(host, running.grpc_addr.port())),
        token: token_for(running, &data_dir.join("agent")).await?,
        token_file: None,
        data_dir: data_dir.join("agent"),
        name: agent::config::default_name(),
        exports_dir: data_dir.join("exports"),
        images_dir: data_dir.join("images"),
        images_connection: agent::config::IMAGES.to_owned(),
        local_root: vms,
        roots: Default::default(),
        vsphere_streams: agent::config::VSPHERE_STREAMS,
        libvirt_accel: std::env::var("HYPERSDK_LIBVIRT_ACCEL").unwrap_or_else(|_| "auto".to_owned()),
        libvirt_dir: std::env::var_os("HYPERSDK_LIBVIRT_DIR").map_or_else(|| agent::config::LIBVIRT_DIR.into(), Into::into),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("agent").build();
    let runtime = runtime.map_err(|e| Failure::failed(format!("the agent's threads do not start: {e}")))?;
    let (stop, stopped) = watch::channel(false);
    let (tell, ended) = oneshot::channel();
    let thread = std::thread::Builder::new().name("agent-main".to_owned()).spawn(move || {
        let result = runtime.block_on(agent::run(config, stopped));
        // A blocking read that hangs must not hold the end of the process up.
        runtime.shutdown_background();
        let _ = tell.send(result);
    });
    thread.map_err(|e| Failure::failed(format!("the agent's thread does not start: {e}")))?;
    Ok((ended, stop))
}

/// A join token where the agent has no certificate yet.
async fn token_for(running: &controller::Running, agent_dir: &Path) -> Result<Option<Secret>, Failure> {
    let enrolled = vault::open_data_dir(agent_dir).and_then(|dir| vault::read_optional(&dir, "agent.id")).map_err(|e| at(agent_dir, &e))?;
    if enrolled.is_some() {
        return Ok(None);
    }
    running.join_token().await.map(Some).map_err(|e| Failure::failed(format!("no join token for the agent: {e}")))
}

/// An address that this host can dial: "all addresses" is the loopback one.
fn reachable(ip: IpAddr) -> IpAddr {
    if ip.is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { ip }
}

fn at(path: &Path, error: &std::io::Error) -> Failure {
    Failure::failed(format!("{}: {error}", path.display()))
}

/// SIGTERM or SIGINT.
pub struct Stops(Signal, Signal);

impl Stops {
    /// From now on the signals no longer kill.
    pub fn listen() -> Result<Self, Failure> {
        let failed = |e: std::io::Error| Failure::failed(format!("signals cannot be heard: {e}"));
        Ok(Self(signal(SignalKind::terminate()).map_err(failed)?, signal(SignalKind::interrupt()).map_err(failed)?))
    }

    /// The next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

/// Runs until a signal.
pub fn up(args: &Up) -> Outcome {
    let mut config = controller::Config::default();
    config.take_environment(&|name| std::env::var(name).ok()).map_err(|e| Failure::usage(e.to_string()))?;
    config.listen = args.listen;
    config.check().map_err(|e| Failure::usage(e.to_string()))?;
    shared::telemetry::start(config.log_json, LOGS, None);
    let data_dir = args.data_dir.clone().map_or_else(default_data_dir, Ok)?;
    let settings = Settings { listen: args.listen, grpc_listen: args.grpc_listen, data_dir, vms: args.vms.clone(), controller: config };
    actix::System::new().block_on(async move {
        let mut stops = Stops::listen()?;
        let mut installation = Installation::start(settings).await?;
        announce(&installation, args);
        let ended = tokio::select! {
            () = stops.next() => Ok(()),
            failure = installation.agent_ended() => Err(failure),
        };
        tracing::info!("stopping; a second signal ends at once");
        tokio::select! {
            () = installation.stop() => ended,
            () = stops.next() => std::process::exit(1),
        }
    })
}

fn announce(installation: &Installation, args: &Up) {
    let password = installation.running.admin_password.as_ref();
    let vms = args.vms.as_ref().map(|vms| std::path::absolute(vms).unwrap_or_else(|_| vms.clone()).display().to_string());
    output::line(concat!("HyperSDK ", env!("CARGO_PKG_VERSION"), " is up."));
    output::pairs(
        11,
        &[
            ("address", installation.url.clone()),
            ("fingerprint", installation.running.fingerprint.clone()),
            ("user", "admin".to_owned()),
            ("password", password.map(|password| format!("{} (made now, shown once)", password.expose())).unwrap_or_default()),
            ("VMs from", vms.unwrap_or_else(|| "nowhere yet; restart with --vms DIR, or connect a provider".to_owned())),
            ("exports to", installation.exports.display().to_string()),
        ],
    );
    output::line(format!("Log in: hypersdk login {}", installation.url));
}

/// Where `hypersdk up` keeps its data where nobody says.
pub fn default_data_dir() -> Result<PathBuf, Failure> {
    if let Some(data) = variable("XDG_DATA_HOME") {
        return Ok(PathBuf::from(data).join("hypersdk"));
    }
    match variable("HOME") {
        Some(home) => Ok(PathBuf::from(home).join(".local/share/hypersdk")),
        None => Err(Failure::usage("no place for the data: give --data-dir DIR")),
    }
}
