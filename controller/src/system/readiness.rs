//! Whether this installation is ready for a migration: real checks, each with what would mend it.
//!
//! Owns: the checks of `GET /readiness`. Never: changes anything, promises what was not looked at. A crash here costs one answer.

use serde::Serialize;
use utoipa::ToSchema;

use super::health::Report;
use crate::access::{Role, users};
use crate::alerts;
use crate::app::App;
use crate::http::reply::Error;
use crate::http::tls;
use crate::providers;

const DAY: i64 = 24 * 3600;
/// Passwords that everybody tries first.
const KNOWN: &[&str] = &["admin", "password", "changeme", "hypersdk", "secret", "123456", "12345678", "letmein"];

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = ReadinessCheck, example = json!({"check": "agents", "status": "pass", "message": "2 of 2 agents are connected", "fix": ""}))]
pub struct Check {
    /// What was looked at.
    pub check: &'static str,
    /// `pass`, `warn` or `fail`.
    pub status: &'static str,
    /// What was found.
    pub message: String,
    /// What would mend it; empty where nothing is to be mended.
    pub fix: String,
}

/// It is right.
pub fn pass(check: &'static str, message: impl Into<String>) -> Check {
    Check { check, status: "pass", message: message.into(), fix: String::new() }
}

/// It works, and should be mended.
pub fn warn(check: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Check {
    Check { check, status: "warn", message: message.into(), fix: fix.into() }
}

/// It does not work.
pub fn fail(check: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Check {
    Check { check, status: "fail", message: message.into(), fix: fix.into() }
}

/// All checks of the installation.
pub async fn checks(app: &App) -> Result<Vec<Check>, Error> {
    let report = super::health::gather(app).await;
    let agents = app.fleet.agents().await?;
    let mut checks = vec![database(&report), agents_here(app, &agents), versions(&agents)];
    checks.extend(exports(&report));
    checks.push(data_directory(&report));
    checks.push(connections(app).await?);
    checks.push(certificate(app));
    checks.push(clocks(app, &agents).await);
    checks.push(admins(app).await?);
    checks.push(password(app));
    checks.push(metrics(app));
    checks.push(open_alerts(app).await?);
    Ok(checks)
}

fn database(report: &Report) -> Check {
    match (&report.database.error, report.database.ping_ms) {
        (Some(error), _) => fail("database", format!("it does not answer: {error}"), "start it; jobs wait meanwhile"),
        (None, Some(ms)) if ms > 500.0 => {
            warn("database", format!("it takes {ms:.0} ms to answer"), "look at its load and its disk; a local one takes under 10 ms")
        }
        (None, ms) => pass("database", format!("it answers in {:.1} ms", ms.unwrap_or(0.0))),
    }
}

type Agent = crate::store::entities::agents::Model;

fn agents_here(app: &App, agents: &[Agent]) -> Check {
    let away: Vec<&str> = agents.iter().filter(|row| !app.fleet.is_connected(&row.id)).map(|row| row.name.as_str()).collect();
    let draining = agents.iter().filter(|row| row.draining && app.fleet.is_connected(&row.id)).count();
    let here = agents.len() - away.len();
    let message = format!("{here} of {} agents are connected", agents.len());
    match (here, away.as_slice()) {
        (0, []) => fail("agents", "no agent has joined", "POST /agents/tokens gives a join token; start hypersdk-agent with it"),
        (0, _) => fail("agents", format!("{message}; away: {}", away.join(", ")), "start them again, or look at their logs"),
        _ if draining == here => fail("agents", format!("{message}, and all of them drain"), "POST /agents/{id}/resume"),
        (_, []) => pass("agents", message),
        _ => warn("agents", format!("{message}; away: {}", away.join(", ")), "start them again, or remove them: DELETE /agents/{id}"),
    }
}

fn versions(agents: &[Agent]) -> Check {
    let ours = env!("CARGO_PKG_VERSION");
    let other = |row: &&Agent| !row.version.is_empty() && row.version != ours;
    let others: Vec<String> = agents.iter().filter(other).map(|row| format!("{} ({})", row.name, row.version)).collect();
    if others.is_empty() {
        return pass("versions", format!("controller and agents are {ours}"));
    }
    warn(
        "versions",
        format!("the controller is {ours}; others: {}", others.join(", ")),
        "update the older ones; the protocol is checked, features may differ",
    )
}

fn exports(report: &Report) -> Vec<Check> {
    let roots: Vec<_> = report.disk.volumes.iter().filter(|volume| volume.host != "controller" && volume.name == "exports").collect();
    if roots.is_empty() {
        return vec![fail("exports", "no connected agent has a root `exports`", "set EXPORTS_DIR on an agent, and start it")];
    }
    let check = |volume: &&super::health::Volume| {
        let (gib, percent) = (volume.free_bytes as f64 / (1u64 << 30) as f64, volume.percent_free());
        let message = format!("{} at agent {}: {gib:.1} GiB free ({percent:.0} %)", volume.path, volume.host);
        let fix = "remove old exports, or give it more room";
        match () {
            () if !volume.writable => fail("exports", format!("{message}, and it is only read"), "let the agent's user write there"),
            () if gib < 1.0 => fail("exports", message, fix),
            () if gib < 10.0 || percent < 10.0 => warn("exports", message, fix),
            () => pass("exports", message),
        }
    };
    roots.iter().map(check).collect()
}

fn data_directory(report: &Report) -> Check {
    let Some(volume) = report.disk.volumes.iter().find(|volume| volume.host == "controller") else {
        return fail("data_directory", "the controller's data directory cannot be looked at", "let the controller's user read it");
    };
    let gib = volume.free_bytes as f64 / (1u64 << 30) as f64;
    let message = format!("{gib:.1} GiB free for keys and the database");
    if gib < 1.0 { fail("data_directory", message, "make room: a full disk stops the database") } else { pass("data_directory", message) }
}

async fn connections(app: &App) -> Result<Check, Error> {
    let rows = providers::service::all(&app.store).await?;
    let bad: Vec<String> = rows
        .iter()
        .filter(|row| row.status != "connected")
        .map(|row| format!("`{}` is {}{}", row.name, row.status, row.last_error.as_ref().map(|e| format!(" ({e})")).unwrap_or_default()))
        .collect();
    Ok(match (rows.len(), bad.len()) {
        (0, _) => fail("providers", "nothing is connected", "POST /providers/connect"),
        (all, 0) => pass("providers", format!("{all} of {all} connections are connected")),
        (all, bad_ones) if all == bad_ones => fail("providers", bad.join("; "), "POST /providers/{name}/test says more"),
        _ => warn("providers", bad.join("; "), "POST /providers/{name}/test says more"),
    })
}

fn certificate(app: &App) -> Check {
    let Some(until) = tls::valid_until(&app.config) else {
        return fail(
            "certificate",
            "the REST certificate cannot be read",
            "give tls_cert and tls_key as PEM files that the controller may read",
        );
    };
    let days = until.saturating_sub(shared::clock::now().timestamp()) / DAY;
    let own = app.config.tls_cert.is_some();
    let mend = if own { "replace tls_cert and tls_key" } else { "remove rest-cert.pem and rest-key.pem and start again" };
    match days {
        ..0 => fail("certificate", "the REST certificate has run out", mend),
        0..14 => warn("certificate", format!("the REST certificate runs out in {days} days"), mend),
        _ if !own => warn(
            "certificate",
            format!("the REST certificate is self-signed, good for {days} days"),
            "clients must pin its fingerprint; give tls_cert and tls_key of your own CA",
        ),
        _ => pass("certificate", format!("the REST certificate is good for {days} days")),
    }
}

async fn clocks(app: &App, agents: &[Agent]) -> Check {
    let (mut worst, mut who, mut known) = (0i64, "", false);
    for row in agents {
        let Some(skew) = app.fleet.snapshot(&row.id).await.and_then(|live| live.skew_ms) else { continue };
        known = true;
        if skew.saturating_abs() > worst.saturating_abs() {
            (worst, who) = (skew, row.name.as_str());
        }
    }
    let most = i64::try_from(app.config.alerts.clock_skew_seconds).unwrap_or(i64::MAX).saturating_mul(1000);
    let message = format!("the clocks of controller and agents differ by {} ms at most", worst.saturating_abs());
    match known {
        false => warn("clock", "no agent has said its time yet", "look again when an agent is connected for some seconds"),
        true if worst.saturating_abs() > most => {
            warn("clock", format!("{message} ({who})"), "run NTP on all hosts: certificates and schedules depend on it")
        }
        true => pass("clock", message),
    }
}

async fn admins(app: &App) -> Result<Check, Error> {
    let count = users::count_role(&app.store, Role::Admin).await?;
    Ok(match count {
        0 => fail("admins", "there is no admin", "start the controller once with HYPERSDK_ADMIN_PASSWORD"),
        1 => warn("admins", "there is one admin", "make a second one, so that a lost password locks nobody out: POST /users"),
        _ => pass("admins", format!("there are {count} admins")),
    })
}

fn password(app: &App) -> Check {
    match &app.config.admin_password {
        None => pass("admin_password", "no password stands in the settings"),
        Some(secret) if KNOWN.contains(&secret.expose().to_lowercase().as_str()) => fail(
            "admin_password",
            "the first admin's password in the settings is one that everybody tries",
            "change it: PATCH /users/admin",
        ),
        Some(_) => warn(
            "admin_password",
            "the first admin's password still stands in the settings; it is used at the very first start only",
            "take admin_password (HYPERSDK_ADMIN_PASSWORD) out",
        ),
    }
}

fn metrics(app: &App) -> Check {
    let local = app.config.listen.ip().is_loopback();
    match (app.config.metrics_public, local) {
        (true, false) => warn(
            "metrics",
            "/metrics answers without a token, and not on this host alone",
            "set metrics.public = false, and give Prometheus a token",
        ),
        (true, true) => pass("metrics", "/metrics answers without a token, on this host alone"),
        (false, _) => pass("metrics", "/metrics wants a token"),
    }
}

async fn open_alerts(app: &App) -> Result<Check, Error> {
    let active = alerts::store::active(&app.store).await?;
    let critical = active.iter().filter(|row| row.severity == "critical").count();
    let message = format!("{} alerts are active, {critical} of them critical", active.len());
    Ok(match (active.len(), critical) {
        (0, _) => pass("alerts", "no alert is active"),
        (_, 0) => warn("alerts", message, "GET /system/alerts"),
        _ => fail("alerts", message, "GET /system/alerts"),
    })
}
