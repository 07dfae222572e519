//! Passwords: bcrypt on the blocking pool, two at a time.
//!
//! Owns: hashing and comparing. Never: cuts a long password (bcrypt reads 72 bytes; longer ones are refused), answers faster for a user
//! who does not exist. A crash here costs one log-in.

use std::sync::Arc;

use actix_web::web;
use shared::secret::Secret;
use tokio::sync::Semaphore;

use crate::http::reply::Error;

/// bcrypt reads this many bytes.
pub const MAX_BYTES: usize = 72;
/// Shortest password that is taken for a new user.
pub const MIN_CHARS: usize = 8;

/// The hasher.
#[derive(Clone)]
pub struct Passwords {
    cost: u32,
    turns: Arc<Semaphore>,
    /// Compared with where there is no such user.
    dummy: Arc<str>,
}

impl Passwords {
    /// With bcrypt's cost; makes the dummy hash.
    pub async fn new(cost: u32) -> Result<Self, Error> {
        let unset = Self { cost, turns: Arc::new(Semaphore::new(2)), dummy: Arc::from("") };
        let dummy = unset.hash(Secret::new(shared::ids::random_hex::<16>())).await?;
        Ok(Self { dummy: Arc::from(dummy), ..unset })
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
        let (is_user, dummy) = (hash.is_some(), Arc::clone(&self.dummy));
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
