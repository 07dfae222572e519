//! `Range` and `If-Range`, and the headers of a file (RFC 9110).
//!
//! Owns: pure functions. Never: reads anything. A crash here costs one answer.

use std::time::{Duration, SystemTime};

use actix_web::http::header::HttpDate;

/// Which part of a file is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// All of it: 200.
    Whole,
    /// `length` bytes from `offset`: 206.
    Part {
        /// First byte.
        offset: u64,
        /// Bytes, 1 or more.
        length: u64,
    },
    /// Nothing of it: 416.
    Nothing,
}

/// What a `Range` header asks of a file of `size` bytes. What cannot be read, other units and several ranges at once get the whole file, as
/// the standard allows.
pub fn wanted(header: Option<&str>, size: u64) -> Wanted {
    let Some(spec) = header.and_then(|text| text.trim().strip_prefix("bytes=")) else { return Wanted::Whole };
    let Some((first, last)) = spec.split_once('-') else { return Wanted::Whole };
    let (first, last) = (first.trim(), last.trim());
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().unwrap_or(u64::MAX));
    match (first, last) {
        ("", "") => Wanted::Whole,
        // The last bytes.
        ("", last) => match number(last) {
            None => Wanted::Whole,
            Some(0) => Wanted::Nothing,
            Some(_) if size == 0 => Wanted::Nothing,
            Some(length) => Wanted::Part { offset: size.saturating_sub(length), length: length.min(size) },
        },
        (first, last) => {
            let last = if last.is_empty() { Some(u64::MAX) } else { number(last) };
            match (number(first), last) {
                (Some(first), Some(last)) if first > last => Wanted::Whole,
                (Some(first), Some(_)) if first >= size => Wanted::Nothing,
                (Some(first), Some(last)) => Wanted::Part { offset: first, length: last.min(size - 1) - first + 1 },
                _ => Wanted::Whole,
            }
        }
    }
}

/// Whether what the client has a part of is still this file: its strong tag, or the very time of its last change.
pub fn is_same(if_range: &str, tag: &str, modified: &str) -> bool {
    let given = if_range.trim();
    given == tag || (!given.starts_with(['"', 'W']) && given == modified)
}

/// Whether a list of tags (`If-None-Match`) holds this one; weakly compared.
pub fn names(list: &str, tag: &str) -> bool {
    list.trim() == "*" || list.split(',').any(|one| one.trim().trim_start_matches("W/") == tag)
}

/// Milliseconds since 1970 as HTTP writes them.
pub fn http_date(milliseconds: i64) -> String {
    let since = Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0));
    HttpDate::from(SystemTime::UNIX_EPOCH + since).to_string()
}

/// A download's name: plain for old clients, whole for all others; nothing in it can end the header or lead into a folder.
pub fn disposition(name: &str) -> String {
    let plain: String = name
        .chars()
        .map(|c| if c.is_ascii_graphic() && !matches!(c, '"' | '\\' | '/' | '%' | ';') || c == ' ' { c } else { '_' })
        .collect();
    let whole: String = name.bytes().fold(String::new(), |mut text, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' | b'_' => text.push(char::from(byte)),
            other => text.push_str(&format!("%{other:02X}")),
        }
        text
    });
    format!("attachment; filename=\"{plain}\"; filename*=UTF-8''{whole}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_standard_says() {
        let part = |offset, length| Wanted::Part { offset, length };
        for (header, expected) in [
            ("bytes=0-0", part(0, 1)),
            ("bytes=10-19", part(10, 10)),
            ("bytes=90-", part(90, 10)),
            ("bytes=90-500", part(90, 10)),
            ("bytes=-10", part(90, 10)),
            ("bytes=-500", part(0, 100)),
            ("bytes=99-99999999999999999999999", part(99, 1)),
            ("bytes=100-", Wanted::Nothing),
            ("bytes=99999999999999999999999-", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
            ("bytes=5-4", Wanted::Whole),
            ("bytes=0-1,5-6", Wanted::Whole),
            ("bytes=a-b", Wanted::Whole),
            ("bytes=+1-2", Wanted::Whole),
            ("bytes=-", Wanted::Whole),
            ("lines=1-2", Wanted::Whole),
            ("", Wanted::Whole),
        ] {
            assert_eq!(wanted(Some(header), 100), expected, "{header}");
        }
        assert_eq!(
            (wanted(None, 100), wanted(Some("bytes=0-"), 0), wanted(Some("bytes=-1"), 0)),
            (Wanted::Whole, Wanted::Nothing, Wanted::Nothing)
        );
    }

    #[test]
    fn a_part_goes_on_only_of_the_same_file() {
        let date = http_date(1_700_000_000_123);
        assert_eq!(date, "Tue, 14 Nov 2023 22:13:20 GMT");
        assert!(is_same("\"a\"", "\"a\"", &date) && is_same(&date, "\"a\"", &date));
        assert!(
            !is_same("W/\"a\"", "\"a\"", &date)
                && !is_same("\"b\"", "\"a\"", &date)
                && !is_same("Tue, 14 Nov 2023 22:13:21 GMT", "\"a\"", &date)
        );
        assert!(names("\"x\", W/\"a\"", "\"a\"") && names("*", "\"a\"") && !names("\"x\"", "\"a\""));
    }

    #[test]
    fn a_name_cannot_end_its_header() {
        assert_eq!(disposition("a b.raw"), "attachment; filename=\"a b.raw\"; filename*=UTF-8''a%20b.raw");
        let text = disposition("gr\u{f6}\u{df}e\"\r\n;x.raw");
        assert!(text.is_ascii() && !text.contains(['\r', '\n']) && text.matches('"').count() == 2, "{text}");
    }
}
