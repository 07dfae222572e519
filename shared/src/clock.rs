//! Time as the API writes it, and a clock that a test can turn.
//!
//! Owns: the one spelling of a point in time (RFC 3339, UTC, `Z`, milliseconds). Never: sleeps. A crash here costs nothing.

use chrono::{DateTime, SecondsFormat, Utc};

/// Now, cut to milliseconds so that what is stored equals what is answered.
pub fn now() -> DateTime<Utc> {
    let now = Utc::now();
    DateTime::from_timestamp_millis(now.timestamp_millis()).unwrap_or(now)
}

/// `2026-01-02T03:04:05.678Z`.
pub fn rfc3339(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// A length in the words of the API's `estimated_duration`: `"45s"`, `"12m"`, `"3h 5m"`.
pub fn duration_words(seconds: u64) -> String {
    match seconds {
        0..=59 => format!("{}s", seconds.max(1)),
        60..=3599 => format!("{}m", seconds.div_ceil(60)),
        _ if seconds % 3600 / 60 == 0 => format!("{}h", seconds / 3600),
        _ => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
    }
}
