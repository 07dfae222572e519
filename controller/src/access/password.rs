//! Passwords: bcrypt on the blocking pool, two at a time.
//!
//! Owns: hashing and comparing. Never: cuts a long password (bcrypt reads 72 bytes; longer ones are refused), answers faster for a user
//! who does not exist. A crash here costs one log-in.

use std::sync::{Arc, PoisonError, RwLock};

use actix_web::web;
use shared::secret::Secret;
use tokio::sync::Semaphore;

use crate::http::reply::Error;

/// bcrypt reads this many bytes.
pub const MAX_BYTES: usize = 72;
/// Dearest hash that anybody waits for, as in the settings.
const MOST_COST: u32 = 16;
/// Shortest password that is taken for a new user.
pub const MIN_CHARS: usize = 8;

/// The hasher.
#[derive(Clone)]
pub struct Passwords {
    cost: u32,
    turns: Arc<Semaphore>,
    /// Compared with where there is no such user. It costs what most users' hashes cost, or the time would tell who is none.
    dummy: Arc<RwLock<Arc<str>>>,
}

impl Passwords {
    /// With bcrypt's cost; makes the dummy hash.
    pub async fn new(cost: u32) -> Result<Self, Error> {
        let made = Self { cost, turns: Arc::new(Semaphore::new(2)), dummy: Arc::new(RwLock::new(Arc::from(""))) };
        made.cost_nobody(cost).await?;
        Ok(made)
    }

    /// Makes a comparison with nobody cost this, unless it does already. What is no cost is left out.
    pub async fn cost_nobody(&self, cost: u32) -> Result<(), Error> {
        if !(4..=MOST_COST).contains(&cost) || cost_of(&self.dummy()) == Some(cost) {
            return Ok(());
        }
        let random = shared::ids::random_hex::<16>();
        let dummy = self.in_turn(move || bcrypt::hash(random, cost)).await?.map_err(Error::internal)?;
        *self.dummy.write().unwrap_or_else(PoisonError::into_inner) = Arc::from(dummy);
        Ok(())
    }

    pub(super) fn dummy(&self) -> Arc<str> {
        Arc::clone(&self.dummy.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a hash costs something else than new ones do.
    pub fn is_outdated(&self, hash: &str) -> bool {
        cost_of(hash) != Some(self.cost)
    }

    /// The hash of a password of at most 72 bytes.
    pub async fn hash(&self, password: Secret) -> Result<String, Error> {
        if password.expose().len() > MAX_BYTES {
            return Err(Error::bad_request(format!("the password is longer than {MAX_BYTES} bytes; take a shorter one")));
        }
        let cost = self.cost;
        let hashed = self.in_turn(move || bcrypt::hash(password.expose(), cost)).await?;
        hashed.map_err(Error::internal)
    }

    /// Whether a password belongs to a hash; without one it takes as long and is false.
    pub async fn matches(&self, password: Secret, hash: Option<String>) -> Result<bool, Error> {
        let (is_user, dummy) = (hash.is_some(), self.dummy());
        let is_too_long = password.expose().len() > MAX_BYTES;
        let compare = move || {
            let hash = hash.as_deref().unwrap_or(&dummy);
            // A password that cannot be one still takes its time.
            let text = if is_too_long { "" } else { password.expose() };
            bcrypt::verify(text, hash).unwrap_or(false)
        };
        Ok(self.in_turn(compare).await? && is_user && !is_too_long)
    }

    async fn in_turn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
        let turn = Arc::clone(&self.turns).acquire_owned().await.map_err(Error::internal)?;
        // The turn goes along: a caller who hangs up does not free it before the work is done.
        let timed = move || {
            let _turn = turn;
            work()
        };
        web::block(timed).await.map_err(Error::internal)
    }
}

/// bcrypt's cost, as a hash says it: `$2b$12$…`.
pub fn cost_of(hash: &str) -> Option<u32> {
    hash.split('$').nth(2)?.parse().ok()
}
