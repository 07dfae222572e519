//! When a job may begin and by when it should be done, as a person asks for it.
//!
//! Owns: the checks of `not_before` and `deadline`. Never: holds a job (`holds` does). A crash here costs one answer.

use chrono::{DateTime, Utc};

use crate::http::reply::Error;

/// Checks both times; answers them as they are stored: RFC 3339 in UTC.
///
/// # Errors
/// 400 for what is no time, for a deadline that has passed, and for one that is not after `not_before`.
pub fn check(not_before: Option<String>, deadline: Option<String>, now: DateTime<Utc>) -> Result<(Option<String>, Option<String>), Error> {
    let not_before = time("not_before", not_before)?;
    let deadline = time("deadline", deadline)?;
    if let Some(end) = deadline {
        let show = shared::clock::rfc3339;
        if end <= now {
            return Err(Error::bad_request(format!("deadline must be later than now ({}), not {}", show(now), show(end))));
        }
        if let Some(start) = not_before
            && end <= start
        {
            return Err(Error::bad_request(format!("deadline must be later than not_before ({}), not {}", show(start), show(end))));
        }
    }
    Ok((not_before.map(shared::clock::rfc3339), deadline.map(shared::clock::rfc3339)))
}

fn time(name: &str, text: Option<String>) -> Result<Option<DateTime<Utc>>, Error> {
    let Some(text) = text else { return Ok(None) };
    let clipped: String = text.chars().take(60).collect();
    let wrong = || Error::bad_request(format!("{name} must be a time like 2025-01-31T22:00:00Z, not `{clipped}`"));
    let parsed = DateTime::parse_from_rfc3339(&text).map_err(|_| wrong())?.with_timezone(&Utc);
    DateTime::from_timestamp_millis(parsed.timestamp_millis()).map(Some).ok_or_else(wrong)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_ordered_and_stored_in_utc() {
        let now = "2030-01-01T12:00:00Z".parse().unwrap();
        let check = |a: Option<&str>, b: Option<&str>| check(a.map(str::to_owned), b.map(str::to_owned), now);
        let (start, end) = check(Some("2030-01-01T14:00:00+01:00"), Some("2030-01-01T15:00:00.5Z")).unwrap();
        assert_eq!((start.as_deref(), end.as_deref()), (Some("2030-01-01T13:00:00.000Z"), Some("2030-01-01T15:00:00.500Z")));
        assert!(check(Some("2020-01-01T00:00:00Z"), None).is_ok(), "a time that has come holds nothing");
        for (start, end) in [
            (Some("tomorrow"), None),
            (Some(""), None),
            (None, Some("2030-01-01")),
            (None, Some("2030-01-01T12:00:00Z")),
            (None, Some("2029-12-31T23:59:59Z")),
            (Some("2030-01-02T00:00:00Z"), Some("2030-01-02T00:00:00Z")),
            (Some("2030-01-02T00:00:00Z"), Some("2030-01-01T23:00:00Z")),
        ] {
            assert!(check(start, end).is_err(), "{start:?} {end:?}");
        }
    }
}
