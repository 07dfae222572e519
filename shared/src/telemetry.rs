//! Logs: one subscriber for every process, JSON or text, to standard error.
//!
//! Owns: the format and the filter (`HYPERSDK_LOG`, default `info`). Never: logs a secret (see [`crate::secret`]). A crash here costs the last line.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

/// Starts logging; a second call does nothing. `json` for machines, else text for people. `more` layers (tracing export) go beside it.
pub fn start(json: bool, default_filter: &str, more: Option<Box<dyn Layer<Registry> + Send + Sync>>) {
    let filter = EnvFilter::try_from_env("HYPERSDK_LOG").unwrap_or_else(|_| EnvFilter::new(default_filter));
    let lines = if json {
        tracing_subscriber::fmt::layer().json().with_writer(std::io::stderr).with_filter(filter).boxed()
    } else {
        tracing_subscriber::fmt::layer()
            .with_target(false)
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(std::io::stderr)
            .with_filter(filter)
            .boxed()
    };
    let layers: Vec<Box<dyn Layer<Registry> + Send + Sync>> = more.into_iter().chain([lines]).collect();
    // A second subscriber in one process (tests, `hypersdk up`) is no failure: the first goes on.
    let _ = tracing_subscriber::registry().with(layers).try_init();
}
