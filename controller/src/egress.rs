//! The controller's one dialer.
//!
//! Owns: every HTTP client of this process, and the rule which addresses each may reach. The rule is applied to the addresses that a name
//! resolves to, at the moment of dialling: what the client connects to has passed it, whatever the name answered before.
//! Never: follows a redirect, asks a proxy, reaches link-local and metadata addresses, sends a secret in clear to a stranger.
//! A crash here costs one call.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use shared::address::{is_metadata, may_be_dialled};

use crate::config::Network;

/// Longest time to connect.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest time for a whole call.
const WHOLE: Duration = Duration::from_secs(15);

/// Who chose the address that is dialled.
#[derive(Clone, Debug)]
pub enum Reach {
    /// The operator, in the settings: anything but link-local and metadata addresses; plain HTTP where the setting says so.
    Configured,
    /// A person, by REST: public addresses over HTTPS, and those that the settings allow (these over HTTP too).
    Public {
        /// Networks allowed beside the public ones.
        allowed: Vec<Network>,
    },
}

/// Why something is not dialled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It cannot be read.
    #[error("`{0}` is no URL like https://host/path")]
    NoUrl(String),
    /// The scheme.
    #[error("the URL must begin with https://{0}")]
    Scheme(&'static str),
    /// User and password in a URL end up in logs.
    #[error("the URL may not carry a user or password")]
    Credentials,
    /// The address.
    #[error("{0} may not be called: it is no public address and not allowed by the settings")]
    Address(String),
}

impl Reach {
    /// Whether an address may be connected to.
    pub fn permits(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        match self {
            Reach::Configured => may_be_dialled(address),
            Reach::Public { allowed } => {
                is_public(address) || allowed.iter().any(|network| network.contains(address) && !is_metadata(address))
            }
        }
    }

    /// Checks what can be checked of a URL before a name is resolved.
    ///
    /// # Errors
    /// [`Refused`] says what would have been right.
    pub fn check(&self, url: &str) -> Result<Url, Refused> {
        let parsed = Url::parse(url).map_err(|_| Refused::NoUrl(url.chars().take(200).collect()))?;
        if !parsed.username().is_empty() || parsed.password().is_some() {
            return Err(Refused::Credentials);
        }
        let literal = match parsed.host() {
            Some(url_host) => url_host.to_string().trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok(),
            None => return Err(Refused::NoUrl(url.chars().take(200).collect())),
        };
        match (parsed.scheme(), self) {
            ("https", _) | ("http", Reach::Configured) => {}
            ("http", Reach::Public { allowed }) if literal.is_some_and(|ip| allowed.iter().any(|network| network.contains(ip))) => {}
            (_, Reach::Configured) => return Err(Refused::Scheme(" or http://")),
            (_, Reach::Public { .. }) => return Err(Refused::Scheme("")),
        }
        match literal {
            Some(ip) if !self.permits(ip) => Err(Refused::Address(ip.to_string())),
            _ => Ok(parsed),
        }
    }

    /// Refuses a host that resolves to nothing but addresses that may not be connected to. A name that does not resolve passes: it may later.
    ///
    /// # Errors
    /// [`Refused::Address`].
    pub async fn check_name(&self, url: &Url) -> Result<(), Refused> {
        let Some(host) = url.host_str() else { return Ok(()) };
        let Ok(found) = tokio::net::lookup_host((host.trim_start_matches('[').trim_end_matches(']'), 443)).await else { return Ok(()) };
        let found: Vec<SocketAddr> = found.collect();
        let is_refused = !found.is_empty() && !found.iter().any(|address| self.permits(address.ip()));
        if is_refused { Err(Refused::Address(host.to_owned())) } else { Ok(()) }
    }

    /// A client that connects only to what this permits. A URL goes through [`Reach::check`] first: a literal address needs no resolver.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn client(&self) -> Result<reqwest::Client, reqwest::Error> {
        // TLS needs a provider for the process; where one stands already, that one is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .connect_timeout(CONNECT)
            .timeout(WHOLE)
            .user_agent(concat!("hypersdk/", env!("CARGO_PKG_VERSION")))
            .dns_resolver(Arc::new(Resolver(self.clone())))
            .build()
    }
}

struct Resolver(Reach);

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let reach = self.0.clone();
        Box::pin(async move {
            let host = name.as_str().to_owned();
            let found: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            let permitted: Vec<SocketAddr> = found.iter().copied().filter(|address| reach.permits(address.ip())).collect();
            if permitted.is_empty() && !found.is_empty() {
                return Err(Box::new(Refused::Address(host)) as Box<dyn std::error::Error + Send + Sync>);
            }
            Ok(Box::new(permitted.into_iter()) as Addrs)
        })
    }
}

/// Addresses of the open internet (IANA's special-purpose registries left out).
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            let special = v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_broadcast()
                || v4.is_documentation()
                || v4.is_unspecified()
                || v4.is_multicast()
                || a == 0
                || a >= 240
                || (a == 100 && (64..128).contains(&b))
                || (a == 198 && (b == 18 || b == 19))
                || (a, b, c) == (192, 0, 0);
            !special
        }
        IpAddr::V6(v6) => {
            let s = v6.segments();
            // Global unicast without documentation, Teredo and 6to4 (which carry IPv4 addresses inside).
            (s[0] & 0xe000) == 0x2000 && !(s[0] == 0x2001 && (s[1] == 0x0db8 || s[1] == 0)) && s[0] != 0x2002
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_person_reaches_public_addresses_and_what_is_allowed() {
        let public = Reach::Public { allowed: vec![Network::try_from("10.1.0.0/16".to_owned()).unwrap()] };
        for good in
            ["https://example.org/hook", "https://8.8.8.8/x", "https://10.1.2.3/x", "http://10.1.2.3:8080/x", "https://[2606:4700::1]/"]
        {
            assert!(public.check(good).is_ok(), "{good}");
        }
        for bad in [
            "http://example.org/",
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://[::ffff:127.0.0.1]/",
            "https://10.2.0.1/",
            "https://169.254.169.254/latest/meta-data",
            "https://0x7f000001/",
            "https://2130706433/",
            "https://100.64.0.1/",
            "https://[2002:7f00:1::]/",
            "https://user:pw@example.org/",
            "ftp://example.org/",
            "nonsense",
        ] {
            assert!(public.check(bad).is_err(), "{bad}");
        }
        let metadata = Reach::Public { allowed: vec![Network::try_from("0.0.0.0/0".to_owned()).unwrap()] };
        assert!(metadata.check("https://169.254.169.254/").is_err(), "no setting allows the metadata service");
        assert!(Reach::Configured.check("http://127.0.0.1:9/v3").is_ok());
        assert!(Reach::Configured.check("http://169.254.169.254/").is_err());
    }

    #[test]
    fn a_name_that_resolves_to_a_private_address_is_not_connected_to() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let resolver = Resolver(Reach::Public { allowed: Vec::new() });
        let refused = runtime.block_on(resolver.resolve("localhost".parse().unwrap()));
        assert!(refused.is_err(), "localhost was resolved");
    }
}
