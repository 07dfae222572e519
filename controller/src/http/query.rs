//! Query strings, parsed at the door: what is unknown or malformed never gets further.
//!
//! Owns: `offset`, `limit`, `sort`, `order`, filters. Never: ignores a parameter it does not know: 400 lists the known ones.
//! A crash here costs one answer.
//!
//! ```ignore
//! let query = Query::of(&request, &["status", "search"])?;          // paging and sorting are always known
//! let paging = query.paging()?;
//! let sort = query.sort(&["created_at", "name"], "created_at", Order::Desc)?;
//! let status = query.word("status", &["queued", "running"])?;
//! ```

use std::collections::BTreeMap;

use actix_web::HttpRequest;
use chrono::{DateTime, Utc};

use super::reply::{Error, Page};

/// Parameters that every list takes.
pub const PAGING: &[&str] = &["offset", "limit", "sort", "order"];
/// Rows of a page where none is asked for.
pub const DEFAULT_LIMIT: u64 = 50;
/// Most rows of a page.
pub const MAX_LIMIT: u64 = 200;
/// Longest value of a parameter in bytes.
const MAX_VALUE: usize = 1024;

/// A parsed query string: each parameter once, all of them known.
#[derive(Clone, Debug, Default)]
pub struct Query {
    values: BTreeMap<String, String>,
}

/// Which part of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// Rows to skip.
    pub offset: u64,
    /// Most rows to answer.
    pub limit: u64,
}

impl Paging {
    /// The page of these rows.
    pub fn page<T>(self, rows: Vec<T>, total: u64) -> Page<T> {
        Page::new(rows, self.offset, self.limit, total)
    }

    /// Cuts the page out of a whole list.
    pub fn cut<T>(self, all: Vec<T>) -> Page<T> {
        let total = all.len() as u64;
        let skip = usize::try_from(self.offset).unwrap_or(usize::MAX);
        let take = usize::try_from(self.limit).unwrap_or(usize::MAX);
        self.page(all.into_iter().skip(skip).take(take).collect(), total)
    }
}

/// Direction of a sort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Small first.
    Asc,
    /// Large first.
    Desc,
}

impl From<Order> for sea_orm::Order {
    fn from(order: Order) -> Self {
        match order {
            Order::Asc => sea_orm::Order::Asc,
            Order::Desc => sea_orm::Order::Desc,
        }
    }
}

/// By what a list is sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sort {
    /// The field.
    pub field: &'static str,
    /// The direction.
    pub order: Order,
}

impl Query {
    /// The query of a list: paging, sorting and these filters are known, all else is refused.
    pub fn of(request: &HttpRequest, filters: &[&str]) -> Result<Self, Error> {
        let known: Vec<&str> = filters.iter().chain(PAGING).copied().collect();
        Self::parse(request.query_string(), &known)
    }

    /// The query of what is no list: only these parameters are known.
    pub fn only(request: &HttpRequest, known: &[&str]) -> Result<Self, Error> {
        Self::parse(request.query_string(), known)
    }

    /// Parses; a parameter that is unknown, comes twice or is too long is refused.
    pub fn parse(text: &str, known: &[&str]) -> Result<Self, Error> {
        let mut values = BTreeMap::new();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decode(name)?, decode(value)?);
            if !known.contains(&name.as_str()) {
                let list = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                return Err(Error::bad_request(format!("unknown parameter `{}`; known: {list}", clip(&name))));
            }
            if value.len() > MAX_VALUE {
                return Err(Error::bad_request(format!("parameter `{name}` is longer than {MAX_VALUE} bytes")));
            }
            if values.insert(name.clone(), value).is_some() {
                return Err(Error::bad_request(format!("parameter `{name}` comes twice; give it once")));
            }
        }
        Ok(Self { values })
    }

    /// `offset` and `limit`.
    pub fn paging(&self) -> Result<Paging, Error> {
        let offset = self.number("offset")?.unwrap_or(0);
        // Both databases count rows in signed 64 bits.
        if offset > i64::MAX as u64 {
            return Err(Error::bad_request("offset must be a whole number from 0 to 9223372036854775807"));
        }
        let limit = match self.number("limit")? {
            Some(0) => return Err(Error::bad_request(format!("limit must be a whole number from 1 to {MAX_LIMIT}"))),
            Some(limit) => limit.min(MAX_LIMIT),
            None => DEFAULT_LIMIT,
        };
        Ok(Paging { offset, limit })
    }

    /// `sort` and `order`, or the default.
    pub fn sort(&self, fields: &[&'static str], default: &'static str, default_order: Order) -> Result<Sort, Error> {
        let field = match self.word("sort", fields)? {
            Some(word) => fields.iter().copied().find(|field| *field == word).unwrap_or(default),
            None => default,
        };
        let order = match self.word("order", &["asc", "desc"])? {
            Some("asc") => Order::Asc,
            Some(_) => Order::Desc,
            None if self.values.contains_key("sort") => Order::Asc,
            None => default_order,
        };
        Ok(Sort { field, order })
    }

    /// The query without its place in the list, in one spelling: what it filters and how it sorts.
    pub fn without_place(&self) -> String {
        let rest = self.values.iter().filter(|(name, _)| !matches!(name.as_str(), "offset" | "limit" | "after"));
        rest.map(|(name, value)| format!("{name}={value:?}")).collect::<Vec<_>>().join("&")
    }

    /// Whether a parameter was given.
    pub fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// A parameter that takes one of these words.
    pub fn word(&self, name: &str, known: &[&str]) -> Result<Option<&str>, Error> {
        match self.values.get(name) {
            None => Ok(None),
            Some(value) if known.contains(&value.as_str()) => Ok(Some(value)),
            Some(value) => Err(Error::bad_request(format!("{name} `{}` is unknown; known: {}", clip(value), known.join(", ")))),
        }
    }

    /// A parameter with free text; an empty one counts as absent.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// A whole number.
    pub fn number(&self, name: &str) -> Result<Option<u64>, Error> {
        let Some(value) = self.values.get(name) else { return Ok(None) };
        let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
        match value.parse::<u64>() {
            Ok(number) if digits => Ok(Some(number)),
            _ => Err(Error::bad_request(format!("{name} must be a whole number, not `{}`", clip(value)))),
        }
    }

    /// A point in time, RFC 3339.
    pub fn time(&self, name: &str) -> Result<Option<DateTime<Utc>>, Error> {
        let Some(value) = self.values.get(name) else { return Ok(None) };
        // A `+` that was not escaped arrives as a space.
        let time = DateTime::parse_from_rfc3339(&value.replace(' ', "+"));
        let wrong = || Error::bad_request(format!("{name} must be a time like 2025-01-31T00:00:00Z, not `{}`", clip(value)));
        time.map(|time| Some(time.with_timezone(&Utc))).map_err(|_| wrong())
    }

    /// `true` or `false`; absent is false.
    pub fn flag(&self, name: &str) -> Result<bool, Error> {
        Ok(self.word(name, &["true", "false"])? == Some("true"))
    }
}

/// A value as it stands in a message: not the whole of a long one.
fn clip(value: &str) -> String {
    match value.char_indices().nth(60) {
        Some((at, _)) => format!("{}…", &value[..at]),
        None => value.to_owned(),
    }
}

fn decode(text: &str) -> Result<String, Error> {
    let wrong = || Error::bad_request("the query string is not percent-encoded UTF-8");
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'+' => out.push(b' '),
            b'%' => {
                let digits = bytes.get(at + 1..at + 3).and_then(|digits| std::str::from_utf8(digits).ok()).ok_or_else(wrong)?;
                out.push(u8::from_str_radix(digits, 16).map_err(|_| wrong())?);
                at += 2;
            }
            other => out.push(other),
        }
        at += 1;
    }
    let text = String::from_utf8(out).map_err(|_| wrong())?;
    // Postgres refuses NUL in text.
    if text.contains('\0') { Err(wrong()) } else { Ok(text) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<Query, Error> {
        Query::parse(text, &["offset", "limit", "sort", "order", "status", "search", "created_after", "refresh"])
    }

    #[test]
    fn paging_follows_the_contract() {
        let paging = |text: &str| list(text).and_then(|query| query.paging());
        assert_eq!(paging("").unwrap(), Paging { offset: 0, limit: 50 });
        assert_eq!(paging("offset=20&limit=500").unwrap(), Paging { offset: 20, limit: 200 });
        for bad in [
            "limit=0",
            "limit=-1",
            "limit=x",
            "limit=",
            "limit=1.5",
            "limit=+1",
            "offset=-1",
            "offset=99999999999999999999",
            "offset=9999999999999999999",
        ] {
            assert!(paging(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_unknown_is_refused_with_what_is_known() {
        let message = list("colour=red").unwrap_err().message().to_owned();
        assert!(message.contains("`colour`") && message.contains("status"), "{message}");
        let query = list("status=blue&sort=size&order=up").unwrap();
        assert!(query.word("status", &["queued", "running"]).unwrap_err().message().contains("queued, running"));
        assert!(query.sort(&["name"], "name", Order::Asc).is_err());
        assert!(list("status=a&status=b").is_err());
    }

    #[test]
    fn values_are_decoded_and_times_read() {
        let query = list("search=web%20server%2B1&created_after=2025-01-01T00:00:00%2B01:00&refresh=true").unwrap();
        assert_eq!(query.text("search"), Some("web server+1"));
        assert_eq!(query.time("created_after").unwrap().unwrap().to_rfc3339(), "2024-12-31T23:00:00+00:00");
        assert!(query.flag("refresh").unwrap());
        for bad in ["search=%", "search=%f", "search=%ff", "search=%00", "created_after=%zz"] {
            assert!(list(bad).is_err(), "{bad}");
        }
        assert!(list("created_after=yesterday").unwrap().time("created_after").is_err());
    }
}
