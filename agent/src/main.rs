//! The binary `hypersdk-agent`: settings, logs, signals.
//!
//! Owns: the process. Never: anything that the library does. A crash here costs one checkpoint of each running job.

use std::path::PathBuf;
use std::process::ExitCode;

use agent::config::{Config, Overrides};
use clap::Parser;
use shared::secret::Secret;
use tokio::signal::unix::{SignalKind, signal};

/// HyperSDK agent: runs beside the hypervisor and dials its controller.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// TOML file with settings; every one also as HYPERSDK_*
    #[arg(long)]
    config: Option<PathBuf>,
    /// The controller's gRPC address, https://HOST:5443
    #[arg(long)]
    controller: Option<String>,
    /// Join token for the first start; better given as HYPERSDK_TOKEN or HYPERSDK_TOKEN_FILE, which no process list shows
    #[arg(long)]
    token: Option<String>,
    /// Log as JSON lines
    #[arg(long, env = "HYPERSDK_LOG_JSON")]
    log_json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    shared::telemetry::start(arguments.log_json, "info", None);
    // A core dump would hold keys.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, rustix::process::Rlimit { current: Some(0), maximum: Some(0) });
    let _ = rustls::crypto::ring::default_provider().install_default();
    let overrides = Overrides { file: arguments.config, controller: arguments.controller, token: arguments.token.map(Secret::new) };
    let config = match Config::load(overrides) {
        Ok(config) => config,
        Err(message) => {
            eprintln!("hypersdk-agent: {message}");
            return ExitCode::from(2);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("hypersdk-agent: {e}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(async {
        let (stop, shutdown) = tokio::sync::watch::channel(false);
        let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
            return Err("signals cannot be caught".to_owned());
        };
        tokio::spawn(async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            tracing::info!("draining: running jobs are parked at their checkpoints");
            let _ = stop.send(true);
        });
        agent::run(config, shutdown).await.map_err(|e| e.to_string())
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(3));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("hypersdk-agent: {message}");
            ExitCode::FAILURE
        }
    }
}
