//! API tokens: what programs log in with.
//!
//! Owns: their shape, their rows, who may make, see and revoke them.
//! Never: keeps a token (only its SHA-256: 256 random bits need no slow hash), lets one do more than its owner may at that moment,
//! lets one make another, or revoke any but itself.
//! A crash here costs nothing: each change is one statement.

pub mod routes;
pub mod service;
pub mod store;

use shared::secret::Secret;

use crate::http::body::digest;

/// What every API token begins with, so that secret scanners find it.
pub const PREFIX: &str = "hsdk_";
/// What a session that is an API token's is called: this and the token's id.
pub const SESSION: &str = "token:";
/// Hex digits of 32 random bytes.
const RANDOM: usize = 64;
/// Hex digits of the check sum behind them: a typing error or a guess is told without asking the database.
const CHECK: usize = 8;

/// A new token.
pub fn generate() -> Secret {
    let random = shared::ids::random_hex::<32>();
    Secret::new(format!("{PREFIX}{random}{}", check(&random)))
}

fn check(random: &str) -> String {
    let mut sum = digest(format!("{PREFIX}{random}").as_bytes());
    sum.truncate(CHECK);
    sum
}

/// The hash of what can be a token; nothing for what cannot.
pub fn hash(token: &str) -> Option<String> {
    let (random, sum) = token.strip_prefix(PREFIX)?.split_at_checked(RANDOM)?;
    let is_hex = random.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    (is_hex && sum == check(random)).then(|| digest(token.as_bytes()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_told_by_its_shape_and_an_altered_one_never_reaches_the_database() {
        let token = generate().expose().to_owned();
        assert!(token.starts_with("hsdk_") && token.len() == 5 + 64 + 8, "{token}");
        assert_eq!(hash(&token).unwrap().len(), 64);
        assert_ne!(hash(&token), hash(generate().expose()));
        for at in 0..token.len() {
            let mut altered = token.clone().into_bytes();
            altered[at] = if altered[at] == b'0' { b'1' } else { b'0' };
            assert_eq!(hash(std::str::from_utf8(&altered).unwrap()), None, "byte {at}");
        }
        for bad in ["", "hsdk_", &token[1..], &format!("{token}0"), &token.to_uppercase(), "hsdk_é"] {
            assert_eq!(hash(bad), None, "{bad}");
        }
    }
}
