//! The one type for secrets: it cannot be printed, compared by accident or serialised, and it is wiped when dropped.
//!
//! Owns: passwords, tokens and keys in memory. Never: writes one anywhere. A crash here costs nothing (core dumps are switched off by the binaries).

use serde::{Deserialize, Deserializer};
use zeroize::Zeroizing;

/// For `#[serde(deserialize_with)]`: a secret that somebody may send.
///
/// # Errors
/// When it is no text.
pub fn optional<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Secret>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(Secret::new))
}

/// Text that must not be seen. No Debug, no Display, no Serialize: the compiler keeps it out of logs.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes the text over.
    pub fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    /// The text, for the one call that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// True when there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
