//! What a call is signed with.
//!
//! ```text
//! X-HyperSDK-Signature: t=1767323045,v1=HEX      HEX = HMAC-SHA256(secret, "1767323045.BODY")
//! ```
//! The receiver computes the same over the bytes as they came, compares in constant time, and refuses a `t` that is some minutes old.
//! Owns: the header's value, the schedule of tries. Never: keeps the secret. A crash here costs nothing.

use ring::hmac;
use shared::secret::Secret;

/// Calls of one delivery before it is given up.
pub const MOST_ATTEMPTS: i32 = 12;
/// Longest pause between two of them, in milliseconds.
const MOST_PAUSE: i64 = 3_600_000;

/// The header's value for a body at a moment (seconds since 1970).
pub fn header(secret: &Secret, seconds: i64, body: &str) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.expose().as_bytes());
    let tag = hmac::sign(&key, format!("{seconds}.{body}").as_bytes());
    format!("t={seconds},v1={}", hex::encode(tag.as_ref()))
}

/// Milliseconds until the next call after `attempt` calls failed: 1 s, 2 s, 4 s … an hour at most; nothing when it is to be given up.
pub fn pause(attempt: i32) -> Option<i64> {
    if attempt >= MOST_ATTEMPTS {
        return None;
    }
    let doubled = 1000i64.checked_shl(u32::try_from(attempt.saturating_sub(1)).unwrap_or(0)).unwrap_or(MOST_PAUSE);
    Some(doubled.clamp(1000, MOST_PAUSE))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_the_documented_one() {
        // echo -n '1767323045.{"type":"test"}' | openssl dgst -sha256 -hmac 'correct horse'
        let value = header(&Secret::new("correct horse"), 1_767_323_045, r#"{"type":"test"}"#);
        assert_eq!(value, "t=1767323045,v1=bb20148623e5cda91dad6b1f0512b19f207ed528e99c9d38de06ce738f519d0a");
        let other = header(&Secret::new("correct horse"), 1_767_323_046, r#"{"type":"test"}"#);
        assert_ne!(value[12..], other[12..], "the moment is signed, too");
    }

    #[test]
    fn tries_grow_rarer_and_end() {
        let pauses: Vec<i64> = (1..MOST_ATTEMPTS).map_while(pause).collect();
        assert_eq!(pauses[..4], [1000, 2000, 4000, 8000]);
        assert!(pauses.is_sorted() && pauses.len() == 11 && pauses.iter().sum::<i64>() < 75 * 60 * 1000, "{pauses:?}");
        assert_eq!(pause(MOST_ATTEMPTS), None);
    }
}
