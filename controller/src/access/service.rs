//! The access service: log in, know a caller, log out.
//!
//! Owns: sessions in the store with a cache of half a second in front, tickets, the signing key (sealed in the settings table, so that
//! several controllers share it). Never: lets a revoked token live longer than a second, on any controller.
//! A crash here costs the cache.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use sea_orm::sea_query::{IntoCondition, OnConflict};
use sea_orm::{ActiveValue::Set, ColumnTrait, DatabaseConnection, EntityTrait, QueryFilter, TransactionTrait};
use shared::error::Code;
use shared::secret::Secret;

use super::api_tokens;
use super::backoff::Backoff;
use super::password::Passwords;
use super::token::{Purpose, Signing};
use super::{Caller, Role, users};
use crate::config::Config;
use crate::http::guard::Identity;
use crate::http::reply::Error;
use crate::store::entities::{api_tokens as token_rows, idempotency, sessions, settings, users as user_rows};
use crate::store::sealing::Sealer;
use crate::store::{self, Store};

/// How long an answer of the store is believed.
const FRESH: Duration = Duration::from_millis(500);
/// Most sessions in the cache.
const CACHED: usize = 10_000;
const TICKET_LIFE: TimeDelta = TimeDelta::seconds(30);
/// How long an Idempotency-Key is remembered.
const KEYS_LIFE: TimeDelta = TimeDelta::hours(24);
const SIGNING_KEY: &str = "signing_key";

/// A new session.
pub struct LoggedIn {
    /// The token.
    pub token: Secret,
    /// When it ends.
    pub expires_at: DateTime<Utc>,
    /// Whose it is.
    pub caller: Caller,
}

/// What a new session stands on, and what must still be so when it is stored.
enum Ground {
    /// A password that was compared with this hash.
    Password(String),
    /// The session that ends for it.
    Session(String),
}

/// Users, passwords, tokens. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    signing: Signing,
    passwords: Passwords,
    backoff: Backoff,
    life: TimeDelta,
    cache: Mutex<HashMap<String, (Instant, Option<Caller>)>>,
}

impl Service {
    /// Opens the room: reads or makes the signing key.
    pub async fn open(store: Store, sealer: &Sealer, config: &Config) -> Result<Self, Error> {
        let key = signing_key(&store, sealer).await?;
        let passwords = Passwords::new(config.bcrypt_cost).await?;
        if let Some(usual) = users::usual_cost(&store).await? {
            passwords.cost_nobody(usual).await?;
        }
        let inner = Inner {
            store,
            signing: Signing::new(&key),
            passwords,
            backoff: Backoff::new(config.limits.login_free_tries, config.limits.login_free_tries_address),
            life: TimeDelta::minutes(i64::from(config.token_minutes)),
            cache: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes the first admin where there is no user at all. Answers the password if it was made here and now.
    pub async fn first_admin(&self, configured: Option<Secret>) -> Result<Option<Secret>, Error> {
        if users::count(&self.inner.store).await? > 0 {
            return Ok(None);
        }
        let made = configured.is_none();
        let password = configured.unwrap_or_else(|| Secret::new(shared::ids::random_hex::<12>()));
        let hash = self.inner.passwords.hash(password.clone()).await?;
        // Another controller may have been faster; then its password counts.
        let is_ours = users::insert_if_absent(&self.inner.store, "admin", hash, Role::Admin).await?;
        Ok((made && is_ours).then_some(password))
    }

    /// The hasher, for the users' routes.
    pub fn passwords(&self) -> &Passwords {
        &self.inner.passwords
    }

    /// Checks a password and opens a session. Wrong user and wrong password are one answer in one time.
    pub async fn login(&self, username: &str, password: Secret, address: IpAddr) -> Result<LoggedIn, Error> {
        let name = username.to_lowercase();
        // What cannot be a name is counted under one, so that it cannot fill the table.
        let account = if users::is_name(&name) { name.as_str() } else { "" };
        if let Some(wait) = self.inner.backoff.wait(account, address, Instant::now()) {
            let seconds = wait.as_secs() + 1;
            let message = format!("too many failed log-ins; try again in {seconds} s");
            return Err(Error::new(Code::RateLimited, message).retry_after(seconds));
        }
        // Twice: while a password is compared its hash may become another, by a change or by a new cost.
        for _ in 0..2 {
            let user = if account.is_empty() { None } else { users::find(&self.inner.store, account).await? };
            let is_good = self.inner.passwords.matches(password.clone(), user.as_ref().map(|user| user.password_hash.clone())).await?;
            let Some(user) = user.filter(|_| is_good) else { break };
            if let Some(session) = self.begin(&user.name, Ground::Password(user.password_hash.clone())).await? {
                self.inner.backoff.succeeded(account, address);
                if self.inner.passwords.is_outdated(&user.password_hash)
                    && let Err(e) = self.rehash(&user, password).await
                {
                    tracing::warn!(user = user.name, cause = %e, "a password could not be hashed at the new cost");
                }
                tracing::info!(user = user.name, %address, "logged in");
                return Ok(session);
            }
        }
        self.inner.backoff.failed(account, address, Instant::now());
        tracing::warn!(user = account, %address, "log-in failed");
        Err(Error::new(Code::BadCredentials, "wrong username or password"))
    }

    /// A hash at the cost of now, while the password is known; a log-in of nobody then takes what most users' do.
    async fn rehash(&self, user: &user_rows::Model, password: Secret) -> Result<(), Error> {
        let hash = self.inner.passwords.hash(password).await?;
        users::rehash(&self.inner.store, &user.name, &user.password_hash, hash).await?;
        match users::usual_cost(&self.inner.store).await? {
            Some(usual) => self.inner.passwords.cost_nobody(usual).await,
            None => Ok(()),
        }
    }

    /// Opens a session in one transaction with a look at what it stands on; nothing where that is no more.
    async fn begin(&self, name: &str, ground: Ground) -> Result<Option<LoggedIn>, Error> {
        let (now, id, owner) = (shared::clock::now(), shared::ids::random_hex::<16>(), name.to_owned());
        let expires_at = now + self.inner.life;
        let row = sessions::ActiveModel {
            jti: Set(id.clone()),
            user_name: Set(name.to_owned()),
            created_at: Set(now.timestamp_millis()),
            expires_at: Set(expires_at.timestamp_millis()),
        };
        let work = move |db: DatabaseConnection| async move {
            let transaction = db.begin().await?;
            // Whoever changes or removes the user waits for this and ends the session, or is seen here.
            let Some(user) = users::hold(&transaction, &owner).await? else { return Ok(None) };
            let stands = match ground {
                Ground::Password(hash) => user.password_hash == hash,
                Ground::Session(old) => {
                    let old = sessions::Entity::delete_by_id(old).filter(sessions::Column::UserName.eq(&owner));
                    old.exec(&transaction).await?.rows_affected == 1
                }
            };
            if !stands {
                return Ok(None);
            }
            sessions::Entity::insert(row).exec_without_returning(&transaction).await?;
            transaction.commit().await?;
            if let Err(e) = tidy(&db, now).await {
                tracing::debug!(cause = %e, "what is over could not be removed");
            }
            Ok(Some(user.role))
        };
        let Some(role) = self.inner.store.run(work).await? else { return Ok(None) };
        let role = Role::from_word(&role).ok_or_else(|| Error::internal("a user has an unknown role"))?;
        let token = self.inner.signing.sign(Purpose::Session, name, &id, &id, expires_at).map_err(Error::internal)?;
        Ok(Some(LoggedIn { token: Secret::new(token), expires_at, caller: Caller { name: name.to_owned(), role, session: id } }))
    }

    /// A new session for the old one, which ends. An API token gets none: a session would have its owner's whole role.
    pub async fn refresh(&self, caller: &Caller) -> Result<LoggedIn, Error> {
        if caller.session.starts_with(api_tokens::SESSION) {
            return Err(Error::new(Code::Forbidden, "an API token is not refreshed; log in with a password to make a new one"));
        }
        let fresh = self.begin(&caller.name, Ground::Session(caller.session.clone())).await?;
        self.forget(|cached| cached.session == caller.session);
        fresh.ok_or_else(|| Error::new(Code::Unauthorized, "the token is not valid or no longer; log in again"))
    }

    /// Ends a session: here at once, on other controllers within half a second.
    pub async fn logout(&self, caller: &Caller) -> Result<(), Error> {
        if let Some(token) = caller.session.strip_prefix(api_tokens::SESSION) {
            return self.revoke_token(token).await;
        }
        let id = caller.session.clone();
        self.inner.store.run(|db| async move { Ok(sessions::Entity::delete_by_id(id).exec(&db).await.map(drop)?) }).await?;
        self.forget(|cached| cached.session == caller.session);
        Ok(())
    }

    /// Ends an API token: here at once, on other controllers within half a second.
    pub async fn revoke_token(&self, id: &str) -> Result<(), Error> {
        api_tokens::store::delete(&self.inner.store, id).await?;
        let session = format!("{}{id}", api_tokens::SESSION);
        self.forget(|cached| cached.session == session);
        Ok(())
    }

    /// What this controller remembers of a user goes, after a change or a removal that ended their sessions in the store.
    pub fn forget_user(&self, name: &str) {
        self.forget(|cached| cached.name == name);
    }

    fn forget(&self, which: impl Fn(&Caller) -> bool) {
        let mut cache = self.inner.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.retain(|_, (_, caller)| caller.as_ref().is_some_and(|caller| !which(caller)));
    }

    /// What an `Authorization` header is worth.
    pub async fn identify(&self, authorization: Option<&str>) -> Identity {
        let Some(value) = authorization else { return Identity::Nobody };
        let Some((scheme, token)) = value.split_once(' ') else { return Identity::Refused };
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Identity::Refused;
        }
        let found = match api_tokens::hash(token.trim()) {
            Some(hash) => self.caller(&hash, token_rows::Column::Hash.eq(&hash), None).await,
            None => {
                let Some(claims) = self.inner.signing.check(Purpose::Session, token.trim()) else { return Identity::Refused };
                self.session(&claims.jti, &claims.sub).await
            }
        };
        match found {
            Ok(Some(caller)) => Identity::Known(caller),
            Ok(None) => Identity::Refused,
            Err(e) => Identity::Unclear(e.into()),
        }
    }

    /// Whether a session still stands, in the same role; a database that is away ends nobody.
    pub async fn is_alive(&self, caller: &Caller) -> bool {
        match self.session(&caller.session, &caller.name).await {
            Ok(found) => found.as_ref() == Some(caller),
            Err(_) => true,
        }
    }

    async fn session(&self, id: &str, user: &str) -> Result<Option<Caller>, store::Error> {
        if let Some(token) = id.strip_prefix(api_tokens::SESSION) {
            return self.caller(id, token_rows::Column::Id.eq(token), Some(user)).await;
        }
        let (wanted, owner) = (id.to_owned(), user.to_owned());
        let work = move |db: DatabaseConnection| async move {
            let now = Utc::now().timestamp_millis();
            let session = sessions::Entity::find_by_id(&wanted).one(&db).await?;
            if !session.is_some_and(|row| row.user_name == owner && row.expires_at > now) {
                return Ok(None);
            }
            let user = user_rows::Entity::find_by_id(&owner).one(&db).await?;
            Ok(user.and_then(|user| Some(Caller { role: Role::from_word(&user.role)?, name: user.name, session: wanted })))
        };
        self.cached(id, self.inner.store.read(work)).await
    }

    /// Who an API token stands for: its owner, with the smaller of the two roles. `key` is what the answer is remembered under.
    async fn caller(&self, key: &str, which: impl IntoCondition, owner: Option<&str>) -> Result<Option<Caller>, store::Error> {
        let (find, owner, service) = (token_rows::Entity::find().filter(which), owner.map(str::to_owned), self.clone());
        let work = async move {
            let now = Utc::now().timestamp_millis();
            let find = move |db: DatabaseConnection| async move {
                let Some(token) = find.one(&db).await? else { return Ok(None) };
                if token.expires_at.is_some_and(|end| end <= now) || owner.is_some_and(|owner| owner != token.user_name) {
                    return Ok(None);
                }
                let Some(user) = user_rows::Entity::find_by_id(&token.user_name).one(&db).await? else { return Ok(None) };
                let (Some(own), Some(owners)) = (Role::from_word(&token.role), Role::from_word(&user.role)) else { return Ok(None) };
                let session = format!("{}{}", api_tokens::SESSION, token.id);
                Ok(Some((Caller { role: own.min(owners), name: user.name, session }, token)))
            };
            let Some((caller, token)) = service.inner.store.read(find).await? else { return Ok(None) };
            if token.last_used_at.is_none_or(|used| used <= now.saturating_sub(api_tokens::service::USED_EVERY)) {
                // Nobody waits for that.
                actix_web::rt::spawn(async move {
                    if let Err(e) = api_tokens::store::used(&service.inner.store, &token.id, now).await {
                        tracing::warn!(token = token.id, cause = %e, "the use of a token is not noted");
                    }
                });
            }
            Ok(Some(caller))
        };
        self.cached(key, work).await
    }

    /// An answer of the store, at most half a second old.
    async fn cached(
        &self,
        id: &str,
        ask: impl Future<Output = Result<Option<Caller>, store::Error>>,
    ) -> Result<Option<Caller>, store::Error> {
        let cached = self.inner.cache.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
        if let Some((_, caller)) = cached.filter(|(seen, _)| seen.elapsed() < FRESH) {
            return Ok(caller);
        }
        // The age counts from before the question, so a revocation that comes between is not missed for longer.
        let asked = Instant::now();
        let caller = ask.await?;
        let mut cache = self.inner.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= CACHED {
            cache.retain(|_, (seen, _)| seen.elapsed() < FRESH);
        }
        // Only what stands is remembered: a session that was just ended is not brought back by a slower answer.
        if let Some(found) = &caller
            && cache.len() < CACHED
        {
            cache.insert(id.to_owned(), (asked, Some(found.clone())));
        }
        Ok(caller)
    }

    /// A ticket for one WebSocket of this caller.
    pub fn ticket(&self, caller: &Caller) -> Result<(String, DateTime<Utc>), Error> {
        let expires_at = shared::clock::now() + TICKET_LIFE;
        let id = shared::ids::random_hex::<16>();
        let ticket = self.inner.signing.sign(Purpose::Ticket, &caller.name, &id, &caller.session, expires_at).map_err(Error::internal)?;
        Ok((ticket, expires_at))
    }

    /// Takes a ticket: once, on whichever controller.
    pub async fn redeem(&self, ticket: &str) -> Result<Caller, Error> {
        let refused = || Error::new(Code::Unauthorized, "the ticket is not valid, used or over; POST /ws/ticket gives one");
        let claims = self.inner.signing.check(Purpose::Ticket, ticket).ok_or_else(refused)?;
        let caller = self.session(&claims.sid, &claims.sub).await?.ok_or_else(refused)?;
        let row = idempotency::ActiveModel {
            id: Set(format!("ticket:{}", claims.jti)),
            digest: Set(String::new()),
            status: Set(101),
            location: Set(String::new()),
            body: Set(String::new()),
            created_at: Set(shared::clock::now().timestamp_millis()),
        };
        match self
            .inner
            .store
            .run(|db| async move { Ok(idempotency::Entity::insert(row).exec_without_returning(&db).await.map(drop)?) })
            .await
        {
            Ok(()) => Ok(caller),
            Err(store::Error::Conflict(_)) => Err(refused()),
            Err(e) => Err(e.into()),
        }
    }
}

/// What is over goes with the next log-in; nobody needs a sweeper for it.
async fn tidy(db: &DatabaseConnection, now: DateTime<Utc>) -> Result<(), store::Error> {
    let yesterday = (now - KEYS_LIFE).timestamp_millis();
    idempotency::Entity::delete_many().filter(idempotency::Column::CreatedAt.lt(yesterday)).exec(db).await?;
    sessions::Entity::delete_many().filter(sessions::Column::ExpiresAt.lt(now.timestamp_millis())).exec(db).await?;
    Ok(())
}

/// The installation's signing key: made once, sealed in the settings table.
async fn signing_key(store: &Store, sealer: &Sealer) -> Result<Vec<u8>, Error> {
    let made = hex::decode(shared::ids::random_hex::<32>()).map_err(Error::internal)?;
    let row = settings::ActiveModel {
        name: Set(SIGNING_KEY.to_owned()),
        value: Set(sealer.seal(SIGNING_KEY, &made).map_err(Error::internal)?),
        updated_at: Set(shared::clock::now().timestamp_millis()),
    };
    let work = move |db: DatabaseConnection| async move {
        let keep_first = OnConflict::column(settings::Column::Name).do_nothing().to_owned();
        settings::Entity::insert(row).on_conflict(keep_first).exec_without_returning(&db).await?;
        Ok(settings::Entity::find_by_id(SIGNING_KEY).one(&db).await?)
    };
    let kept = store.run(work).await?.ok_or_else(|| Error::internal("the signing key was not kept"))?;
    sealer.open_sealed(SIGNING_KEY, &kept.value).map_err(Error::internal)
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
