//! Decisions about API tokens: what may be made, by whom, and who may see and revoke it.
//!
//! Owns: the rules. Never: lets a caller make a token that is larger than the caller; lets a token make tokens, or revoke others than
//! itself: one that leaked is over when it is revoked.
//! A crash here costs one answer.

use chrono::{DateTime, TimeDelta, Utc};
use shared::error::Code;
use shared::secret::Secret;

use super::store::{self, Inserted};
use super::{SESSION, generate, hash};
use crate::access::{Caller, Role};
use crate::http::reply::Error;
use crate::store::entities::api_tokens;
use crate::store::{Error as StoreError, Store};

/// `last_used_at` is written at most this often, in milliseconds.
pub const USED_EVERY: i64 = 60_000;
/// Longest name in characters.
const NAME: usize = 100;
/// Longest life of a token that has an end.
const LONGEST: TimeDelta = TimeDelta::days(3650);

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// What its owner calls it.
    pub name: String,
    /// RFC 3339.
    pub expires_at: Option<String>,
    /// `30m`, `12h`, `90d`.
    pub ttl: Option<String>,
    /// The largest role that it gives; absent: the caller's.
    pub role: Option<Role>,
}

/// Checks a wish and makes the row and the token, which nobody sees again.
pub fn draft(caller: &Caller, wish: Wish) -> Result<(api_tokens::Model, Secret), Error> {
    if caller.session.starts_with(SESSION) {
        return Err(Error::new(Code::Forbidden, "an API token makes no tokens; log in with a password to make tokens"));
    }
    let name = name_of(&wish.name)?;
    let role = wish.role.unwrap_or(caller.role);
    if role > caller.role {
        let message = format!("a token may do no more than who makes it: you are `{}`, not `{}`", caller.role.word(), role.word());
        return Err(Error::new(Code::Forbidden, message));
    }
    let now = shared::clock::now();
    let expires_at = end_of(now, wish.expires_at.as_deref(), wish.ttl.as_deref())?.map(|end| end.timestamp_millis());
    let token = generate();
    let row = api_tokens::Model {
        id: format!("tok-{}", shared::ids::random_hex::<8>()),
        user_name: caller.name.clone(),
        name,
        role: role.word().to_owned(),
        hash: hash(token.expose()).ok_or_else(|| Error::internal("a new token has the wrong shape"))?,
        created_at: now.timestamp_millis(),
        expires_at,
        last_used_at: None,
    };
    Ok((row, token))
}

/// Stores it.
pub async fn keep(store: &Store, row: api_tokens::Model) -> Result<(), Error> {
    let name = row.name.clone();
    match store::insert(store, row).await {
        Ok(Inserted::Done) => Ok(()),
        Ok(Inserted::TooMany) => Err(Error::new(Code::Conflict, format!("you have {} tokens; revoke some first", store::MOST))),
        Ok(Inserted::NoOwner) => Err(Error::new(Code::Unauthorized, "the token is not valid or no longer; log in again")),
        Err(StoreError::Conflict(_)) => {
            Err(Error::new(Code::Conflict, format!("you have a token named `{name}` already; take another name")))
        }
        Err(e) => Err(e.into()),
    }
}

/// One that this caller may see: their own, or any for an admin. What they may not see is not there.
pub async fn visible(store: &Store, caller: &Caller, id: &str) -> Result<api_tokens::Model, Error> {
    let shown: String = id.chars().take(60).collect();
    let missing = || Error::not_found(format!("no token `{shown}`; GET /auth/tokens lists them"));
    if id.len() > 64 || id.contains('\0') {
        return Err(missing());
    }
    let row = store::find(store, id).await?.filter(|row| caller.role == Role::Admin || row.user_name == caller.name);
    row.ok_or_else(missing)
}

/// One that this caller may revoke: one that they may see; a token only itself.
pub async fn revocable(store: &Store, caller: &Caller, id: &str) -> Result<api_tokens::Model, Error> {
    let row = visible(store, caller, id).await?;
    match caller.session.strip_prefix(SESSION) {
        Some(own) if own != row.id => {
            Err(Error::new(Code::Forbidden, "an API token revokes only itself; log in with a password to revoke others"))
        }
        _ => Ok(row),
    }
}

/// Whose tokens a list shows: an admin's everybody's or one user's, all others' their own.
pub fn owner_of_list(caller: &Caller, user: Option<&str>) -> Result<Option<String>, Error> {
    match user {
        Some(user) if caller.role == Role::Admin || user == caller.name => Ok(Some(user.to_owned())),
        Some(_) => Err(Error::new(Code::Forbidden, "the tokens of others are for admins; leave `user` out")),
        None if caller.role == Role::Admin => Ok(None),
        None => Ok(Some(caller.name.clone())),
    }
}

fn name_of(text: &str) -> Result<String, Error> {
    let name = text.trim();
    let is_good = (1..=NAME).contains(&name.chars().count()) && !name.chars().any(char::is_control);
    is_good
        .then(|| name.to_owned())
        .ok_or_else(|| Error::bad_request(format!("name must be 1 to {NAME} characters, none of them control characters")))
}

/// When a token ends, by one of the two ways to say it.
fn end_of(now: DateTime<Utc>, expires_at: Option<&str>, ttl: Option<&str>) -> Result<Option<DateTime<Utc>>, Error> {
    let end = match (expires_at, ttl) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => return Err(Error::bad_request("give `expires_at` or `ttl`, not both")),
        (Some(text), None) => {
            let time = DateTime::parse_from_rfc3339(text)
                .map_err(|_| Error::bad_request("expires_at must be a time like 2030-01-31T00:00:00Z"))?;
            time.with_timezone(&Utc)
        }
        (None, Some(text)) => {
            let life = life_of(text).filter(|life| *life <= LONGEST);
            now + life.ok_or_else(|| Error::bad_request("ttl must be a number with s, m, h or d: 30m, 12h, 90d; at most 3650d"))?
        }
    };
    if end <= now || end - now > LONGEST {
        return Err(Error::bad_request("expires_at must lie in the future, and at most 3650 days from now"));
    }
    Ok(Some(end))
}

fn life_of(text: &str) -> Option<TimeDelta> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number = number.parse::<u32>().ok().filter(|number| *number > 0 && !text.starts_with('+'))?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    TimeDelta::try_seconds(i64::from(number).checked_mul(seconds)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_end_lies_ahead_and_is_said_in_one_way() {
        let now: DateTime<Utc> = "2030-01-01T00:00:00Z".parse().unwrap();
        assert_eq!(end_of(now, None, None).unwrap(), None);
        assert_eq!(end_of(now, None, Some("90d")).unwrap().unwrap().to_rfc3339(), "2030-04-01T00:00:00+00:00");
        assert_eq!(end_of(now, None, Some("30m")).unwrap().unwrap() - now, TimeDelta::minutes(30));
        assert_eq!(end_of(now, Some("2030-01-01T02:00:00+01:00"), None).unwrap().unwrap() - now, TimeDelta::hours(1));
        for (at, ttl) in [
            (Some("2030-01-01T00:00:00Z"), None),
            (Some("2029-01-01T00:00:00Z"), None),
            (Some("9999-01-01T00:00:00Z"), None),
            (Some("tomorrow"), None),
            (Some("2031-01-01T00:00:00Z"), Some("1d")),
            (None, Some("")),
            (None, Some("d")),
            (None, Some("0d")),
            (None, Some("-1d")),
            (None, Some("+1d")),
            (None, Some("1w")),
            (None, Some("1.5h")),
            (None, Some("1é")),
            (None, Some("3651d")),
            (None, Some("4294967295d")),
            (None, Some("99999999999999999999s")),
        ] {
            assert!(end_of(now, at, ttl).is_err(), "{at:?} {ttl:?}");
        }
    }

    #[test]
    fn only_an_admin_sees_the_tokens_of_others() {
        let caller = |role| Caller { name: "ann".into(), role, session: "s".into() };
        assert_eq!(owner_of_list(&caller(Role::Admin), None).unwrap(), None);
        assert_eq!(owner_of_list(&caller(Role::Admin), Some("bob")).unwrap().as_deref(), Some("bob"));
        assert_eq!(owner_of_list(&caller(Role::Operator), None).unwrap().as_deref(), Some("ann"));
        assert_eq!(owner_of_list(&caller(Role::Viewer), Some("ann")).unwrap().as_deref(), Some("ann"));
        assert!(owner_of_list(&caller(Role::Operator), Some("bob")).is_err());
    }
}
