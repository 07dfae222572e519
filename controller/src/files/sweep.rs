//! What time removes: uploads that nobody finished, exports whose retention is over.
//!
//! Owns: the two tasks. Never: decides what is over (the rooms do). A crash here costs nothing: the next start sweeps again.

use std::time::Duration;

use actix_web::web;

use super::exports;
use crate::app::App;

/// Sweeps unfinished uploads until the drain.
pub async fn uploads(app: web::Data<App>) {
    while !app.is_draining() {
        if let Err(error) = app.uploads.sweep().await {
            tracing::warn!(cause = %error, "unfinished uploads could not be swept");
        }
        tokio::time::sleep(app.uploads.sweep_every()).await;
    }
}

/// Sweeps exports until the drain, where the settings say for how long they stay.
pub async fn exports(app: web::Data<App>) {
    if app.config.exports_retention_days <= 0.0 {
        return;
    }
    let age = Duration::from_secs_f64(app.config.exports_retention_days * 86_400.0);
    let pause = (age / 4).clamp(Duration::from_secs(1), Duration::from_secs(3600));
    while !app.is_draining() {
        match exports::retire(&app, age).await {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "exports whose retention is over were removed"),
            Err(error) => tracing::warn!(cause = %error, "exports could not be swept"),
        }
        tokio::time::sleep(pause).await;
    }
}
