//! `PATCH /providers/{name}`.
//!
//! Owns: what of a connection may change, and how its agents learn of it. Never: changes what an agent has configured itself.
//! A crash between the row and the agent costs nothing: the agent's next Hello brings it the row.

use actix_web::web;
use proto::v1;
use proto::v1::browse::Question;
use serde::Deserialize;
use shared::error::Code;
use shared::secret::Secret;
use utoipa::ToSchema;

use super::account::{self, Kept};
use super::connect::{URIS, choose_agent, is_path, is_uri};
use super::routes::Connection;
use super::service;
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::Admin;
use crate::http::reply::{Error, ErrorBody};
use crate::store::entities::connections;
use crate::system::audit;

/// What is to change; what is absent stays.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ChangeConnection, example = json!({"path": "/srv/vms-2"}))]
pub struct Change {
    /// `local`: absolute path of a folder on the agent's host.
    #[serde(default)]
    path: Option<String>,
    /// `libvirt`: another URI.
    #[serde(default)]
    uri: Option<String>,
    /// `vsphere`: HOST[:PORT]; wants the password again, so that none is sent to a host that its owner did not name.
    #[serde(default)]
    host: Option<String>,
    /// `vsphere`: who logs in; wants the password again.
    #[serde(default)]
    username: Option<String>,
    /// `vsphere`: the password.
    #[serde(default, deserialize_with = "shared::secret::optional")]
    #[schema(value_type = Option<String>, format = Password)]
    password: Option<Secret>,
    /// `vsphere`: take any certificate.
    #[serde(default)]
    insecure: Option<bool>,
    /// `vsphere`: SHA-256 of the one certificate that will do; empty: the system's authorities decide.
    #[serde(default)]
    fingerprint: Option<String>,
    /// Id or name of the agent that serves it from now on.
    #[serde(default)]
    agent: Option<String>,
}

/// Changes a connection, after its agent has said that it can serve it so. Jobs that are under way or queued stay with what they were made for.
#[utoipa::path(patch, path = "/providers/{name}", tag = "Providers", security(("token" = [])), params(("name" = String, Path)),
    request_body = Change, responses(
    (status = 200, description = "the connection", body = Connection),
    (status = 400, description = "the body cannot be read, or nothing is to change", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin, or the folder is outside what the agent may read", body = ErrorBody),
    (status = 404, description = "no such connection", body = ErrorBody),
    (status = 409, description = "it is configured on its agent, or changed at the same moment", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 422, description = "the folder cannot be read, a wrong user or password, or a certificate that is not trusted", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the agent or the host did not answer", body = ErrorBody),
    (status = 503, description = "the database or the agent is away", body = ErrorBody),
))]
pub async fn change(
    caller: Admin,
    name: web::Path<String>,
    app: web::Data<App>,
    body: Json<Change>,
) -> Result<web::Json<Connection>, Error> {
    let row = service::by_name(&app.store, &name).await?;
    let wanted = body.value;
    if wanted.is_empty() {
        return Err(Error::bad_request(
            "nothing is to change; give `path`, or `uri`, or `host`, `username`, `password`, `insecure`, `fingerprint`, or `agent`",
        ));
    }
    if row.origin == "agent" {
        return Err(Error::new(Code::Conflict, format!("`{name}` is configured on its agent; change it there")));
    }
    let (path, account) = wanted.place(&app, &row)?;
    let agent_id = match &wanted.agent {
        Some(agent) => choose_agent(&app, Some(agent)).await?,
        None => row.agent_id.clone(),
    };
    let act = audit::begin(&app.store, &caller.name, "provider.change", &name).await?;
    let changed = probe_and_move(&app, &row, &agent_id, path, account).await;
    act.finish(&changed).await;
    changed?;
    if agent_id != row.agent_id {
        // Its old agent learns by its next Hello that it serves it no more; its copies go on meanwhile.
        app.fleet.close(&row.agent_id, tonic::Status::aborted("a connection was moved; come back without it"));
    }
    if let Err(e) = app.fleet.ask_within(&agent_id, Question::Refresh(row.name.clone()), service::patience(&row.kind)).await {
        tracing::warn!(connection = row.name, cause = %e, "the inventory after a change did not come");
    }
    let now = service::by_name(&app.store, &name).await?;
    if now.last_seen.is_none() && now.last_error.is_none() {
        app.fleet.close(&agent_id, tonic::Status::aborted("a connection was changed; come back for it"));
    }
    Ok(web::Json(now.into()))
}

impl Change {
    fn is_empty(&self) -> bool {
        self.path.is_none() && self.uri.is_none() && self.agent.is_none() && !self.is_account()
    }

    /// Whether something of an account is to change.
    fn is_account(&self) -> bool {
        self.host.is_some() || self.username.is_some() || self.password.is_some() || self.insecure.is_some() || self.fingerprint.is_some()
    }

    /// Path or host, and the account, as they are to be.
    fn place(&self, app: &App, row: &connections::Model) -> Result<(String, Option<(account::Settings, Secret)>), Error> {
        let Some(mut settings) = account::settings(row) else {
            let is_libvirt = row.kind == "libvirt";
            let (given, other, wrong) = if is_libvirt { (&self.uri, &self.path, "path") } else { (&self.path, &self.uri, "uri") };
            if other.is_some() {
                return Err(Error::bad_request(format!("`{wrong}` is not for a connection of kind `{}`", row.kind)));
            }
            return match given {
                Some(uri) if is_libvirt && !self.is_account() => match is_uri(uri) {
                    true => Ok((uri.clone(), None)),
                    false => Err(Error::bad_request(format!("`uri` must be {URIS}"))),
                },
                _ if self.is_account() => Err(Error::bad_request(format!("a connection of kind `{}` has no account", row.kind))),
                Some(path) if is_path(path) => Ok((path.clone(), None)),
                Some(_) => Err(Error::bad_request("`path` must be the absolute path of a folder on the agent's host")),
                None => Ok((row.path.clone(), None)),
            };
        };
        if self.path.is_some() || self.uri.is_some() {
            return Err(Error::bad_request(format!("`path` is not for a connection of kind `{}`; it has `host`", row.kind)));
        }
        if self.password.is_none() && (self.host.is_some() || self.username.is_some()) {
            return Err(Error::bad_request("another `host` or `username` wants the `password` again"));
        }
        let host = match &self.host {
            Some(host) => account::check_host(host).map(|()| host.clone())?,
            None => row.path.clone(),
        };
        if let Some(username) = &self.username {
            account::check_username(username)?;
            settings.username.clone_from(username);
        }
        match self.fingerprint.as_deref() {
            Some("") => settings.fingerprint.clear(),
            Some(text) => (settings.fingerprint, settings.insecure) = (account::fingerprint(text)?, false),
            None => {}
        }
        if let Some(insecure) = self.insecure {
            settings.insecure = insecure;
        }
        if settings.insecure && !settings.fingerprint.is_empty() {
            return Err(Error::bad_request("`insecure` takes any certificate and `fingerprint` just one; give one of the two"));
        }
        let password = match &self.password {
            Some(password) => account::check_password(password).map(|()| password.clone())?,
            None => account::password(&app.sealer, row)?,
        };
        Ok((host, Some((settings, password))))
    }
}

async fn probe_and_move(
    app: &App,
    row: &connections::Model,
    agent_id: &str,
    path: String,
    account: Option<(account::Settings, Secret)>,
) -> Result<(), Error> {
    let kept: Option<Kept> = match &account {
        Some((settings, password)) => Some(account::keep(&app.sealer, &row.name, settings, password)?),
        None => None,
    };
    let account = account.map(|(settings, password)| account::wire(&settings, &password));
    let connection = v1::Connection { name: row.name.clone(), kind: row.kind.clone(), path, account };
    app.fleet.ask_within(agent_id, Question::Probe(connection.clone()), service::patience(&connection.kind)).await?;
    service::change(&app.store, row, agent_id, &connection.path, kept).await
}
