//! Rate limits by actix-governor: one for anonymous addresses, one for users. Only a valid token moves a client into the second.
//!
//! Owns: the keys and the answer 429. Never: counts a request twice: each limiter waves the other's clients through.
//! A crash here costs the counters.
//!
//! `X-RateLimit-Limit` and `-Remaining` come from the limiter, `-Reset` (seconds since 1970, when all of it is back) from [`super::outer`].

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use actix_governor::governor::NotUntil;
use actix_governor::governor::clock::{Clock, DefaultClock, QuantaInstant};
use actix_governor::governor::middleware::StateInformationMiddleware;
use actix_governor::{GovernorConfig, GovernorConfigBuilder, KeyExtractor};
use actix_web::dev::ServiceRequest;
use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder, ResponseError};
use shared::error::Code;

use super::guard;
use super::reply::Error;
use crate::config::{Config, Limits, Network};

/// The limiter of anonymous addresses.
pub type Anonymous = GovernorConfig<AnonymousKey, StateInformationMiddleware>;
/// The limiter of users.
pub type Users = GovernorConfig<UserKey, StateInformationMiddleware>;

/// Both, from the settings; made once, shared by all workers.
pub fn limiters(config: &Config) -> Result<(Anonymous, Users), String> {
    let limits = &config.limits;
    let anonymous = GovernorConfigBuilder::default()
        .period(Duration::from_millis(limits.anonymous_replenish_ms))
        .burst_size(limits.anonymous_burst)
        .key_extractor(AnonymousKey { proxies: Arc::from(config.trusted_proxies.clone()) })
        .use_headers()
        .finish();
    let users = GovernorConfigBuilder::default()
        .period(user_period(limits))
        .burst_size(limits.user_per_minute)
        .key_extractor(UserKey)
        .use_headers()
        .finish();
    match (anonymous, users) {
        (Some(anonymous), Some(users)) => Ok((anonymous, users)),
        _ => Err("limits must be 1 or more".to_owned()),
    }
}

fn user_period(limits: &Limits) -> Duration {
    (Duration::from_secs(60) / limits.user_per_minute.max(1)).max(Duration::from_nanos(1))
}

/// Seconds until all of a limit is back, when `used` of it are gone.
pub fn reset_seconds(limits: &Limits, is_user: bool, used: u32) -> u64 {
    let period = if is_user { user_period(limits) } else { Duration::from_millis(limits.anonymous_replenish_ms) };
    period.saturating_mul(used).as_secs_f64().ceil() as u64
}

/// Address of an anonymous client; `None`, which is waved through, for users.
#[derive(Clone)]
pub struct AnonymousKey {
    proxies: Arc<[Network]>,
}

impl KeyExtractor for AnonymousKey {
    type Key = Option<IpAddr>;
    type KeyExtractionError = Error;

    fn extract(&self, request: &ServiceRequest) -> Result<Self::Key, Error> {
        if guard::identity(request.request()).caller().is_some() {
            return Ok(None);
        }
        Ok(Some(neighbourhood(client_address(request.request(), &self.proxies))))
    }

    fn whitelisted_keys(&self) -> Vec<Self::Key> {
        vec![None]
    }

    fn exceed_rate_limit_response(&self, negative: &NotUntil<QuantaInstant>, response: HttpResponseBuilder) -> HttpResponse {
        exceeded(negative, response, "an address")
    }
}

/// Name of a user; `None`, which is waved through, for everybody else.
#[derive(Clone)]
pub struct UserKey;

impl KeyExtractor for UserKey {
    type Key = Option<String>;
    type KeyExtractionError = Error;

    fn extract(&self, request: &ServiceRequest) -> Result<Self::Key, Error> {
        Ok(guard::identity(request.request()).caller().map(|caller| caller.name.clone()))
    }

    fn whitelisted_keys(&self) -> Vec<Self::Key> {
        vec![None]
    }

    fn exceed_rate_limit_response(&self, negative: &NotUntil<QuantaInstant>, response: HttpResponseBuilder) -> HttpResponse {
        exceeded(negative, response, "a user")
    }
}

fn exceeded(negative: &NotUntil<QuantaInstant>, mut response: HttpResponseBuilder, whom: &str) -> HttpResponse {
    let wait = negative.wait_time_from(DefaultClock::default().now());
    let seconds = (wait.as_secs_f64().ceil() as u64).max(1);
    let message = format!("too many requests for {whom}; try again in {seconds} s");
    let mut answer = Error::new(Code::RateLimited, message).retry_after(seconds).error_response();
    // The limiter's own headers stand on the builder that it gives.
    for (name, value) in response.finish().headers() {
        if name.as_str().starts_with("x-ratelimit-") && name != "x-ratelimit-after" {
            answer.headers_mut().insert(name.clone(), value.clone());
        }
    }
    answer
}

/// Address of the client: the peer's, or what a trusted proxy says.
///
/// The list in `X-Forwarded-For` is read from its end, because only there our own proxies wrote; the first address that is not one of
/// them is the client. What a client wrote there itself counts for nothing.
pub fn client_address(request: &HttpRequest, proxies: &[Network]) -> IpAddr {
    let peer = request.peer_addr().map_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED), |peer| peer.ip().to_canonical());
    let is_proxy = |address: IpAddr| proxies.iter().any(|network| network.contains(address));
    if !is_proxy(peer) {
        return peer;
    }
    let lists: Vec<&str> = request.headers().get_all(header::X_FORWARDED_FOR).filter_map(|value| value.to_str().ok()).collect();
    let mut nearest = peer;
    for text in lists.iter().rev().flat_map(|list| list.rsplit(',')) {
        let Ok(address) = text.trim().parse::<IpAddr>() else { break };
        nearest = address.to_canonical();
        if !is_proxy(nearest) {
            break;
        }
    }
    nearest
}

/// One IPv6 client has a whole /64.
fn neighbourhood(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        v4 => v4,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn a_forwarded_address_counts_only_from_a_proxy_of_ours() {
        let proxies = [Network::try_from("10.0.0.0/8".to_owned()).unwrap()];
        let from = |peer: &str, forwarded: &str| {
            let request = TestRequest::default().peer_addr(peer.parse().unwrap()).insert_header(("X-Forwarded-For", forwarded));
            client_address(&request.to_http_request(), &proxies).to_string()
        };
        assert_eq!(from("203.0.113.9:1", "192.0.2.1"), "203.0.113.9", "a client made its address up");
        assert_eq!(from("10.0.0.1:1", "192.0.2.1"), "192.0.2.1");
        assert_eq!(
            from("10.0.0.1:1", "198.51.100.7, 192.0.2.1, 10.0.0.2"),
            "192.0.2.1",
            "what stands left of the client is the client's own"
        );
        assert_eq!(from("10.0.0.1:1", "nonsense"), "10.0.0.1");
        let key = neighbourhood("2001:db8::1:2:3:4".parse().unwrap());
        assert_eq!(key, neighbourhood("2001:db8::ffff:2:3:4".parse().unwrap()));
        assert_ne!(key, neighbourhood("2001:db8:0:1::1".parse().unwrap()));
    }

    #[test]
    fn the_reset_is_when_all_of_it_is_back() {
        let limits = Limits::default();
        assert_eq!(reset_seconds(&limits, false, 100), 60);
        assert_eq!(reset_seconds(&limits, true, 1000), 60);
        assert_eq!(reset_seconds(&limits, false, 1), 1);
    }
}
