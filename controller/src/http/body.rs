//! Request bodies: JSON, one reader for all of them.
//!
//! Owns: the limits (1 MiB, depth 64; how slow it may come: `pace`), the media type, messages that name the unknown field.
//! Never: reads on past the limit. A crash here costs one answer.

use std::future::Future;
use std::pin::Pin;

use actix_web::dev::Payload;
use actix_web::http::header;
use actix_web::{FromRequest, HttpMessage, HttpRequest};
use serde::de::DeserializeOwned;
use shared::error::Code;

use super::pace::Pace;
use super::reply::Error;

/// Largest JSON body in bytes.
pub const LIMIT: usize = 1 << 20;
/// Deepest nesting.
const DEPTH: usize = 64;

/// A JSON body, parsed, with the SHA-256 of its bytes in hex (what an `Idempotency-Key` is compared by; never stored as it is).
pub struct Json<T> {
    /// The parsed body.
    pub value: T,
    /// SHA-256 of the bytes as they came, hex.
    pub digest: String,
}

impl<T: DeserializeOwned + 'static> FromRequest for Json<T> {
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self, Error>>>>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let media_type = request.content_type().trim().to_ascii_lowercase();
        let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        let payload = payload.take();
        Box::pin(async move {
            let is_json = media_type == "application/json" || (media_type.starts_with("application/") && media_type.ends_with("+json"));
            if !is_json {
                return Err(Error::new(Code::UnsupportedMediaType, "send JSON with `Content-Type: application/json`"));
            }
            let bytes = read(payload, declared, Pace::new("it")).await?;
            parse(&bytes).map(|value| Self { value, digest: digest(&bytes) })
        })
    }
}

/// SHA-256 in hex.
pub fn digest(bytes: &[u8]) -> String {
    hex::encode(ring::digest::digest(&ring::digest::SHA256, bytes))
}

async fn read(mut payload: Payload, declared: Option<u64>, mut pace: Pace) -> Result<Vec<u8>, Error> {
    let too_large = || Error::new(Code::TooLarge, format!("the body is larger than {LIMIT} bytes"));
    if declared.is_some_and(|length| length > LIMIT as u64) {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = pace.next(&mut payload).await? {
        if bytes.len() + chunk.len() > LIMIT {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Parses bytes as JSON; what is wrong is named.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    if bytes.is_empty() {
        return Err(Error::bad_request("the body is empty; send a JSON object"));
    }
    if depth(bytes) > DEPTH {
        return Err(Error::bad_request(format!("the JSON is nested deeper than {DEPTH}")));
    }
    serde_json::from_slice(bytes).map_err(|e| Error::bad_request(format!("the JSON body cannot be read: {e}")))
}

/// Deepest nesting of brackets outside of strings; an upper bound for what is no JSON at all.
fn depth(bytes: &[u8]) -> usize {
    let (mut open, mut deepest, mut in_string, mut escaped) = (0usize, 0usize, false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                open += 1;
                deepest = deepest.max(open);
            }
            b'}' | b']' if !in_string => open = open.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Login {
        #[allow(dead_code)]
        username: String,
    }

    #[test]
    fn what_is_wrong_with_a_body_is_named() {
        let message = |body: &str| parse::<Login>(body.as_bytes()).unwrap_err().message().to_owned();
        assert!(message(r#"{"username":"a","colour":1}"#).contains("unknown field `colour`, expected `username`"));
        assert!(message("{}").contains("missing field `username`"));
        assert!(message("").contains("empty"));
        assert!(message("{").contains("EOF"));
        assert!(message(&format!("{}{}", "[".repeat(65), "]".repeat(65))).contains("deeper than 64"));
        assert_eq!(depth(br#"{"a":"[[[\"[[","b":[1]}"#), 2);
    }

    #[actix_web::test]
    async fn a_body_that_trickles_is_refused_and_an_old_one_that_came_well_is_not() {
        let bytes = |size: usize| {
            let pieces = futures_util::stream::iter([Ok(actix_web::web::Bytes::from(vec![b' '; size]))]);
            Payload::from(Box::pin(pieces) as Pin<Box<dyn futures_util::Stream<Item = _>>>)
        };
        let minute = std::time::Duration::from_secs(60);
        let refused = read(bytes(1000), None, Pace::since(minute)).await.unwrap_err();
        assert!(refused.message().contains("slower than 16 KiB a second; send it again"), "{}", refused.message());
        assert_eq!(read(bytes(LIMIT), None, Pace::since(minute)).await.unwrap().len(), LIMIT);
    }
}
