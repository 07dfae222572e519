//! How a connection to a hypervisor logs in: what of it may be shown, and the password, sealed.
//!
//! Owns: the checks of host, user and fingerprint, and the one place where a password is opened: on its way to the agent that logs in.
//! Never: shows a password. A crash here costs nothing.

use proto::v1;
use serde::{Deserialize, Serialize};
use shared::secret::Secret;

use crate::http::reply::Error;
use crate::store::entities::connections;
use crate::store::sealing::Sealer;

/// Kinds that log in.
pub const KINDS: &[&str] = &["vsphere"];

/// What of an account may be shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Whose session it is.
    pub username: String,
    /// Any certificate will do.
    pub insecure: bool,
    /// SHA-256 of the certificate that will do, hex in lower case without colons; empty: the system's authorities decide.
    pub fingerprint: String,
}

/// What the row keeps of an account.
#[derive(Clone)]
pub struct Kept {
    /// [`Settings`] as JSON.
    pub settings: String,
    /// The password, sealed under the connection's name.
    pub secret: String,
}

fn sealed_name(connection: &str) -> String {
    format!("connection.{connection}")
}

/// Seals a password for a connection.
pub fn keep(sealer: &Sealer, connection: &str, settings: &Settings, password: &Secret) -> Result<Kept, Error> {
    Ok(Kept {
        settings: serde_json::to_string(settings).map_err(Error::internal)?,
        secret: sealer.seal(&sealed_name(connection), password.expose().as_bytes()).map_err(Error::internal)?,
    })
}

/// What may be shown of a row's account; none where its kind has none.
pub fn settings(row: &connections::Model) -> Option<Settings> {
    row.settings.as_deref().and_then(|text| serde_json::from_str(text).ok())
}

/// The password of a row.
pub fn password(sealer: &Sealer, row: &connections::Model) -> Result<Secret, Error> {
    let sealed = row.secret.as_deref().ok_or_else(|| Error::internal(format!("the connection {} has no password", row.name)))?;
    let opened = sealer.open_sealed(&sealed_name(&row.name), sealed).map_err(Error::internal)?;
    String::from_utf8(opened).map(Secret::new).map_err(|_| Error::internal("a password that is no text"))
}

/// An account on its way to an agent.
pub fn wire(settings: &Settings, password: &Secret) -> v1::Account {
    v1::Account {
        username: settings.username.clone(),
        password: password.expose().to_owned(),
        insecure: settings.insecure,
        fingerprint: settings.fingerprint.clone(),
    }
}

/// A row as its agent is told it: with its account, where it has one.
pub fn told(sealer: &Sealer, row: connections::Model) -> Result<v1::Connection, Error> {
    let account = match settings(&row) {
        Some(settings) => Some(wire(&settings, &password(sealer, &row)?)),
        None => None,
    };
    Ok(v1::Connection { name: row.name, kind: row.kind, path: row.path, account })
}

/// Checks HOST[:PORT]; a bare IPv6 address stands in brackets.
pub fn check_host(host: &str) -> Result<(), Error> {
    let wrong =
        || Error::bad_request("`host` must be HOST or HOST:PORT, as `vcenter.example.org` or `[2001:db8::1]:8443`; no scheme, no path");
    let (name, rest) = match host.strip_prefix('[') {
        Some(bracketed) => {
            let (address, rest) = bracketed.split_once(']').ok_or_else(wrong)?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| wrong())?;
            ("v6", rest)
        }
        None => host.find(':').map_or((host, ""), |colon| host.split_at(colon)),
    };
    let is_port = rest.is_empty() || rest.strip_prefix(':').and_then(|port| port.parse::<u16>().ok()).is_some_and(|port| port > 0);
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    if is_port && is_name && host.len() <= 255 { Ok(()) } else { Err(wrong()) }
}

/// Checks a user's name.
pub fn check_username(username: &str) -> Result<(), Error> {
    let good = (1..=256).contains(&username.len()) && !username.chars().any(char::is_control);
    if good {
        Ok(())
    } else {
        Err(Error::bad_request("`username` must be 1 to 256 bytes without control characters, as `backup@vsphere.local`"))
    }
}

/// Checks a password.
pub fn check_password(password: &Secret) -> Result<(), Error> {
    let good = (1..=1024).contains(&password.expose().len()) && !password.expose().chars().any(char::is_control);
    if good { Ok(()) } else { Err(Error::bad_request("`password` must be 1 to 1024 bytes without control characters")) }
}

/// A certificate's SHA-256, with or without colons, as it is kept.
pub fn fingerprint(text: &str) -> Result<String, Error> {
    let plain = text.replace(':', "").to_ascii_lowercase();
    if plain.len() == 64 && plain.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(plain);
    }
    Err(Error::bad_request("`fingerprint` must be the SHA-256 of the server's certificate: 64 hex digits, with or without colons"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_host_and_perhaps_a_port() {
        for good in ["vc", "vcenter.example.org", "10.0.0.1:8443", "[2001:db8::1]", "[::1]:443"] {
            assert!(check_host(good).is_ok(), "{good}");
        }
        for bad in
            ["", "https://vc", "vc/sdk", "user@vc", "vc:", "vc:0", "vc:99999", "::1", "[::1", "[vc]", "v c", "vc?x", &"a".repeat(256)]
        {
            assert!(check_host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_fingerprint_is_kept_in_one_form() {
        let colons = vec!["AB"; 32].join(":");
        assert_eq!(fingerprint(&colons).unwrap(), "ab".repeat(32));
        assert!(fingerprint("ab").is_err() && fingerprint(&"x".repeat(64)).is_err());
    }
}
