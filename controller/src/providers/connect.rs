//! `POST /providers/connect`.
//!
//! Owns: which fields a kind wants, and that a connection is kept only after its agent has shown that it can serve it.
//! Never: opens a host itself, answers a password. A crash between the probe and the row costs nothing: the client asks again.

use actix_web::{HttpRequest, HttpResponse, web};
use proto::v1;
use proto::v1::browse::Question;
use serde::Deserialize;
use shared::error::Code;
use shared::secret::Secret;
use utoipa::ToSchema;

use super::account::{self, Kept, Settings};
use super::routes::Connection;
use super::service;
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::Admin;
use crate::http::idempotency::Idempotency;
use crate::http::reply::{Error, ErrorBody};
use crate::store::entities::connections;
use crate::system::audit;

/// What is to be connected. `local` takes `path`; `vsphere` takes `host`, `username`, `password` and perhaps `fingerprint` or `insecure`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"provider": "local", "name": "lab", "path": "/srv/vms"}))]
pub struct Connect {
    /// The kind: `local`, `libvirt` or `vsphere`.
    provider: String,
    /// Absent: the kind, with a number where that is taken.
    #[serde(default)]
    name: Option<String>,
    /// `local`: absolute path of a folder on the agent's host.
    #[serde(default)]
    path: Option<String>,
    /// `vsphere`: HOST[:PORT] of a vCenter or ESXi, as the agent reaches it.
    #[serde(default)]
    host: Option<String>,
    /// `vsphere`: who logs in.
    #[serde(default)]
    username: Option<String>,
    /// `vsphere`: the password; kept sealed, never shown.
    #[serde(default, deserialize_with = "shared::secret::optional")]
    #[schema(value_type = Option<String>, format = Password)]
    password: Option<Secret>,
    /// `vsphere`: take any certificate. A fingerprint is better.
    #[serde(default)]
    insecure: Option<bool>,
    /// `vsphere`: SHA-256 of the one certificate that will do; 64 hex digits, with or without colons.
    #[serde(default)]
    fingerprint: Option<String>,
    /// Id or name of the agent; absent: the only one that is connected.
    #[serde(default)]
    agent: Option<String>,
    /// `libvirt`: `qemu:///system` on the agent's host, `qemu+ssh://USER@HOST/system` or `qemu+tls://HOST/system`; without parameters.
    #[serde(default)]
    uri: Option<String>,
}

/// Connects: asks the agent whether it can serve the connection (at a hypervisor by a real log-in), then keeps it.
#[utoipa::path(post, path = "/providers/connect", tag = "Providers", security(("token" = [])), request_body = Connect, responses(
    (status = 201, description = "the connection", body = Connection),
    (status = 400, description = "the body cannot be read, or a field is wrong", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin, or the folder is outside what the agent may read", body = ErrorBody),
    (status = 409, description = "the name exists", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 422, description = "a kind that is not built yet, a folder that cannot be read, a wrong user or password, or a certificate that \
        is not trusted: then with its fingerprint", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the agent or the host did not answer", body = ErrorBody),
    (status = 503, description = "the database or the agent is away", body = ErrorBody),
))]
pub async fn connect(caller: Admin, request: HttpRequest, app: web::Data<App>, body: Json<Connect>) -> Result<HttpResponse, Error> {
    let key = Idempotency::of(&request, &caller, &body.digest)?;
    if let Some(key) = &key
        && let Some(first) = key.replay(&app.store).await?
    {
        return Ok(first);
    }
    let mut wanted = body.value;
    let named = wanted.name.take();
    let (path, account) = place(&mut wanted)?;
    let agent_id = choose_agent(&app, wanted.agent.as_deref()).await?;
    let name = match named {
        Some(name) if service::is_name(&name) => name,
        Some(_) => return Err(Error::bad_request("name must be 1 to 63 of a-z, 0-9, `-`, `_`, `.`, beginning with a letter or digit")),
        None => free_name(&app, &wanted.provider).await?,
    };
    let kept = match &account {
        Some((settings, password)) => Some(account::keep(&app.sealer, &name, settings, password)?),
        None => None,
    };
    let account = account.map(|(settings, password)| account::wire(&settings, &password));
    let connection = v1::Connection { name: name.clone(), kind: wanted.provider, path, account };
    let act = audit::begin(&app.store, &caller.name, "provider.connect", &name).await?;
    let made = probe_and_add(&app, &agent_id, connection, kept, key).await;
    act.finish(&made).await;
    let made = first_inventory(&app, made?).await;
    let location = format!("/api/v1/providers/{}", made.name);
    Ok(HttpResponse::Created().insert_header(("Location", location)).json(Connection::from(made)))
}

/// What a kind is reached by: its path or host, and the account where it wants one.
fn place(wanted: &mut Connect) -> Result<(String, Option<(Settings, Secret)>), Error> {
    let foreign = |field: &str, kind: &str| Err(Error::bad_request(format!("`{field}` is not for provider `{kind}`")));
    match wanted.provider.as_str() {
        "local" => {
            let path = wanted.path.take().filter(|path| is_path(path));
            let path =
                path.ok_or_else(|| Error::bad_request("provider `local` needs `path`, the absolute path of a folder on the agent's host"))?;
            match wanted.account_field().or(wanted.uri.as_ref().map(|_| "uri")) {
                Some(field) => foreign(field, "local"),
                None => Ok((path, None)),
            }
        }
        "libvirt" => {
            let uri = wanted.uri.take().filter(|uri| is_uri(uri));
            let uri = uri.ok_or_else(|| Error::bad_request(format!("provider `libvirt` needs `uri`, {URIS}")))?;
            match wanted.account_field().or(wanted.path.as_ref().map(|_| "path")) {
                Some(field) => foreign(field, "libvirt"),
                None => Ok((uri, None)),
            }
        }
        "vsphere" => {
            if wanted.path.is_some() || wanted.uri.is_some() {
                return foreign(if wanted.path.is_some() { "path" } else { "uri" }, "vsphere");
            }
            let needs = |field: &str, what: &str| Error::bad_request(format!("provider `vsphere` needs `{field}`, {what}"));
            let host = wanted.host.take().ok_or_else(|| needs("host", "HOST or HOST:PORT of a vCenter or ESXi"))?;
            account::check_host(&host)?;
            let username = wanted.username.take().ok_or_else(|| needs("username", "who logs in"))?;
            account::check_username(&username)?;
            let password = wanted.password.take().ok_or_else(|| needs("password", "which is kept sealed and never shown"))?;
            account::check_password(&password)?;
            let fingerprint = wanted.fingerprint.as_deref().map(account::fingerprint).transpose()?.unwrap_or_default();
            let insecure = wanted.insecure.unwrap_or(false);
            if insecure && !fingerprint.is_empty() {
                return Err(Error::bad_request("`insecure` takes any certificate and `fingerprint` just one; give one of the two"));
            }
            Ok((host, Some((Settings { username, insecure, fingerprint }, password))))
        }
        other => {
            let shown: String = other.chars().take(40).collect();
            Err(Error::not_built(format!("provider `{shown}`")).detail(serde_json::json!({ "built": ["local", "libvirt", "vsphere"] })))
        }
    }
}

impl Connect {
    /// A field of an account that is there.
    fn account_field(&self) -> Option<&'static str> {
        let fields = [
            ("host", self.host.is_some()),
            ("username", self.username.is_some()),
            ("password", self.password.is_some()),
            ("insecure", self.insecure.is_some()),
            ("fingerprint", self.fingerprint.is_some()),
        ];
        fields.into_iter().find(|(_, is_there)| *is_there).map(|(field, _)| field)
    }
}

/// Which URIs are taken, for a message.
pub(super) const URIS: &str =
    "qemu:///system on the agent's host, qemu+ssh://USER@HOST/system or qemu+tls://HOST/system, without parameters";

/// Whether a text can be the URI of a `libvirt` connection; its agent looks at it again.
pub(super) fn is_uri(uri: &str) -> bool {
    uri.contains("://") && uri.len() <= 300 && uri.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Whether a text can be a folder of a `local` connection.
pub(super) fn is_path(path: &str) -> bool {
    path.starts_with('/') && path.len() <= 4096 && !path.contains('\0')
}

async fn probe_and_add(
    app: &App,
    agent_id: &str,
    connection: v1::Connection,
    kept: Option<Kept>,
    key: Option<Idempotency>,
) -> Result<connections::Model, Error> {
    if service::all(&app.store).await?.iter().any(|row| row.name == connection.name) {
        return Err(Error::new(Code::Conflict, format!("a connection `{}` exists already", connection.name)));
    }
    app.fleet.ask_within(agent_id, Question::Probe(connection.clone()), service::patience(&connection.kind)).await?;
    let remember = move |made: &connections::Model| {
        let answer = serde_json::to_string(&Connection::from(made.clone())).ok()?;
        key.map(|key| key.row(201, &format!("/api/v1/providers/{}", made.name), answer))
    };
    Ok(service::add(&app.store, agent_id, &connection, kept, remember).await?)
}

/// The connection stands; its inventory comes when it comes, and a failure shows as its status.
///
/// An agent learns its connections from `Welcome`. One that has no inventory to send yet does not know of this one, so its session is
/// closed: it comes back within seconds, its copies go on meanwhile.
async fn first_inventory(app: &App, made: connections::Model) -> connections::Model {
    if let Err(e) = app.fleet.ask_within(&made.agent_id, Question::Refresh(made.name.clone()), service::patience(&made.kind)).await {
        tracing::warn!(connection = made.name, cause = %e, "first inventory did not come");
    }
    let row = service::by_name(&app.store, &made.name).await.unwrap_or(made);
    if row.last_seen.is_none() && row.last_error.is_none() {
        app.fleet.close(&row.agent_id, tonic::Status::aborted("a connection was added; come back for it"));
    }
    row
}

/// The agent that is meant: by id or name, or the only one that is connected.
pub(super) async fn choose_agent(app: &App, wanted: Option<&str>) -> Result<String, Error> {
    let agents = app.connected_agents().await?;
    let listed = agents.iter().map(|agent| format!("`{}` ({})", agent.name, agent.id)).collect::<Vec<_>>().join(", ");
    if agents.is_empty() {
        return Err(Error::new(Code::Unavailable, "no agent is connected; POST /agents/tokens gives a join token for one").retry_after(10));
    }
    match (wanted, agents.as_slice()) {
        (None, [only]) => Ok(only.id.clone()),
        (None, _) => Err(Error::bad_request(format!("several agents are connected; name one in `agent`: {listed}"))),
        (Some(wanted), _) => {
            let found = agents.iter().find(|agent| agent.id == wanted || agent.name == wanted);
            let unknown = || Error::bad_request(format!("agent `{wanted}` is not connected; connected: {listed}"));
            found.map(|agent| agent.id.clone()).ok_or_else(unknown)
        }
    }
}

async fn free_name(app: &App, kind: &str) -> Result<String, Error> {
    let rows = service::all(&app.store).await?;
    let is_free = |name: &String| !rows.iter().any(|row| row.name == *name);
    let mut names = std::iter::once(kind.to_owned()).chain((2..=rows.len() + 2).map(|n| format!("{kind}-{n}")));
    names.find(is_free).ok_or_else(|| Error::internal("no free name among more names than connections"))
}
