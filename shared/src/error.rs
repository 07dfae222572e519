//! The stable words for what can go wrong, with the one map to HTTP.
//!
//! Owns: [`Code`] and its status. Never: carries a path, a secret or a stack. A crash here costs nothing.

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $word:literal $status:literal,)*) => {
        /// A stable word for a kind of failure, as it stands in `code` of every error answer.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Code { $($(#[$doc])* $name,)* }

        impl Code {
            /// Every code, for the documentation and the tests.
            pub const ALL: &[Code] = &[$(Code::$name,)*];
            /// The word on the wire.
            pub fn word(self) -> &'static str { match self { $(Code::$name => $word,)* } }
            /// Its HTTP status.
            pub fn status(self) -> u16 { match self { $(Code::$name => $status,)* } }
            /// The code of a word.
            pub fn from_word(word: &str) -> Option<Code> { match word { $($word => Some(Code::$name),)* _ => None } }
        }
    };
}

codes! {
    /// A parameter, field or body that cannot be read.
    BadRequest = "bad_request" 400,
    /// No valid token.
    Unauthorized = "unauthorized" 401,
    /// Wrong user or password.
    BadCredentials = "bad_credentials" 401,
    /// Too small a role.
    Forbidden = "forbidden" 403,
    /// A path outside the configured roots.
    OutsideRoots = "outside_roots" 403,
    /// No such path, job, VM, …
    NotFound = "not_found" 404,
    /// The path exists, the method does not.
    MethodNotAllowed = "method_not_allowed" 405,
    /// The state does not allow it.
    Conflict = "conflict" 409,
    /// A name that several VMs bear.
    Ambiguous = "ambiguous" 409,
    /// The same key with another body.
    IdempotencyMismatch = "idempotency_mismatch" 409,
    /// The body is over the limit.
    TooLarge = "too_large" 413,
    /// Not JSON where JSON is due.
    UnsupportedMediaType = "unsupported_media_type" 415,
    /// The file has no such bytes.
    RangeNotSatisfiable = "range_not_satisfiable" 416,
    /// Understood, and cannot be done as asked.
    Unprocessable = "unprocessable" 422,
    /// Part of the contract, and not there yet.
    NotBuilt = "not_built" 422,
    /// The image, archive or disk was refused or is damaged.
    BadImage = "bad_image" 422,
    /// Not enough room at the destination.
    NoSpace = "no_space" 422,
    /// The output read back is not what was read from the source.
    VerificationFailed = "verification_failed" 422,
    /// Too many requests.
    RateLimited = "rate_limited" 429,
    /// Our defect.
    Internal = "internal" 500,
    /// A provider or agent did not answer as it should.
    BadGateway = "bad_gateway" 502,
    /// The database or an agent is away; try again.
    Unavailable = "unavailable" 503,
}
