//! The login that outlives a command: which server, what it is trusted by, and the token.
//!
//! Owns: the session file (`$HYPERSDK_HOME/session.json`, else `$XDG_CONFIG_HOME/hypersdk/session.json`, else below `~/.config`), for its
//! owner alone, and the order in which flags, environment and file speak. Never: holds a password. A crash here costs a new login.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use shared::secret::Secret;
use shared::vault;

use crate::args::Server;
use crate::failure::{Exit, Failure};
use crate::tls::Trust;

/// The file's content.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// `https://HOST:PORT`.
    pub url: String,
    /// The pinned certificate, 64 hex digits; absent when the system's authorities vouch for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// The login was made with `--insecure`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub insecure: bool,
    /// Who logged in.
    pub username: String,
    /// The bearer token; the file's mode is what protects it.
    pub token: String,
    /// Until when, RFC 3339.
    #[serde(default)]
    pub expires_at: String,
}

/// Where to talk to and as whom.
pub struct Session {
    /// `https://HOST:PORT`.
    pub url: String,
    /// By what the server is trusted.
    pub trust: Trust,
    /// The bearer token.
    pub token: Option<Secret>,
}

/// The session file's path.
pub fn path() -> Result<PathBuf, Failure> {
    if let Some(home) = variable("HYPERSDK_HOME") {
        return Ok(PathBuf::from(home).join("session.json"));
    }
    if let Some(config) = variable("XDG_CONFIG_HOME") {
        return Ok(PathBuf::from(config).join("hypersdk/session.json"));
    }
    match variable("HOME") {
        Some(home) => Ok(PathBuf::from(home).join(".config/hypersdk/session.json")),
        None => Err(Failure::usage("no place for the session file: set HYPERSDK_HOME to a folder")),
    }
}

/// An environment variable that is set to something.
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A secret from `NAME`, or from the file that `NAME_FILE` names.
pub fn secret_variable(name: &str) -> Result<Option<Secret>, Failure> {
    if let Some(text) = variable(name) {
        return Ok(Some(Secret::new(text)));
    }
    let Some(file) = variable(&format!("{name}_FILE")) else { return Ok(None) };
    let bytes = vault::read_config(file.as_ref()).map_err(|e| Failure::usage(format!("{name}_FILE: {file}: {e}")))?;
    let text = String::from_utf8(bytes).map_err(|_| Failure::usage(format!("{name}_FILE: {file} is not text")))?;
    Ok(Some(Secret::new(text.trim_end_matches(['\r', '\n']))))
}

/// The saved session, where there is one.
pub fn load() -> Result<Option<Saved>, Failure> {
    let path = path()?;
    let bytes = match vault::read_config(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Failure::failed(format!("{}: {e}", path.display()))),
    };
    let saved = serde_json::from_slice(&bytes);
    saved.map(Some).map_err(|e| Failure::failed(format!("{} is damaged ({e}); run `hypersdk login URL` again", path.display())))
}

/// Writes the session file.
pub fn save(saved: &Saved) -> Result<PathBuf, Failure> {
    let path = path()?;
    let bytes = serde_json::to_vec_pretty(saved).map_err(|e| Failure::failed(e.to_string()))?;
    vault::write_private(&path, &bytes).map_err(|e| Failure::failed(format!("{}: {e}", path.display())))?;
    Ok(path)
}

/// Removes the session file; false when there was none.
pub fn forget() -> Result<bool, Failure> {
    let path = path()?;
    let (dir, name) = match vault::open_user_dir_of(&path, false) {
        Ok(opened) => opened,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Failure::failed(format!("{}: {e}", path.display()))),
    };
    match dir.remove_file(name) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Failure::failed(format!("{}: {e}", path.display()))),
    }
}

/// What flags and environment say, over what the file says. The file's token and pin go only to the file's server.
pub fn current(server: &Server) -> Result<Session, Failure> {
    let saved = load()?;
    let given = server.url.as_deref().map(normal_url).transpose()?;
    let url = given.or_else(|| saved.as_ref().map(|saved| saved.url.clone()));
    let Some(url) = url else {
        return Err(Failure::new(
            Exit::NotAllowed,
            "not logged in; run `hypersdk login https://HOST:5080`, or set HYPERSDK_URL and HYPERSDK_AUTH_TOKEN",
        ));
    };
    let saved = saved.filter(|saved| saved.url == url);
    let from_file = || match &saved {
        Some(Saved { insecure: true, .. }) => Trust::Insecure,
        Some(Saved { fingerprint: Some(pin), .. }) => Trust::Pinned(pin.clone()),
        _ => Trust::System,
    };
    let trust = match (&server.fingerprint, server.insecure) {
        (Some(pin), _) => Trust::Pinned(pin.clone()),
        (None, true) => Trust::Insecure,
        (None, false) => from_file(),
    };
    let token = match secret_variable("HYPERSDK_AUTH_TOKEN")? {
        Some(token) => Some(token),
        None => saved.map(|saved| Secret::new(saved.token)),
    };
    Ok(Session { url, trust, token })
}

/// `https://HOST:PORT` without a path; HTTPS and the port 5080 where nothing is said.
pub fn normal_url(text: &str) -> Result<String, Failure> {
    let bad = |why: &str| Failure::usage(format!("{text} is not a server's address ({why}); it should look like https://HOST:5080"));
    let scheme_given = text.contains("://");
    let full = if scheme_given { text.to_owned() } else { format!("https://{text}") };
    let url = reqwest::Url::parse(&full).map_err(|e| bad(&e.to_string()))?;
    if url.scheme() != "https" {
        return Err(bad("the scheme must be https"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("credentials do not belong into it"));
    }
    let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(|| bad("it has no host"))?;
    // `https://HOST` means 443 to everybody; a bare `HOST` means our own port.
    let port = url.port().unwrap_or(if scheme_given { 443 } else { 5080 });
    Ok(format!("https://{host}:{port}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_one_spelling() {
        assert_eq!(normal_url("host").unwrap(), "https://host:5080");
        assert_eq!(normal_url("https://host").unwrap(), "https://host:443");
        assert_eq!(normal_url("https://[::1]:5080/api/v1/").unwrap(), "https://[::1]:5080");
        for bad in ["http://host", "https://a:b@host", "https://", ""] {
            assert!(normal_url(bad).is_err(), "{bad}");
        }
    }
}
