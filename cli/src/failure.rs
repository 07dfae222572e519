//! Why a command ended without its result, and the exit code that scripts read from it.
//!
//! Owns: the six exit codes (0 done, 1 failed, 2 usage, 3 not reachable, 4 not allowed, 5 verification failed) and the map from the
//! API's code words to them. Never: prints. A crash here costs nothing.

use std::fmt;

use shared::error::Code;

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was tried and did not work.
    Failed = 1,
    /// The command or one of its values is not understood.
    Usage = 2,
    /// No conversation with the server was possible.
    NotReachable = 3,
    /// The server wants a login, or a larger role.
    NotAllowed = 4,
    /// What arrived is not what left.
    VerificationFailed = 5,
}

impl Exit {
    /// The exit code of one of the API's words.
    pub fn of(code: Code) -> Self {
        match code {
            Code::BadRequest => Exit::Usage,
            Code::Unauthorized | Code::BadCredentials | Code::Forbidden | Code::OutsideRoots => Exit::NotAllowed,
            Code::VerificationFailed => Exit::VerificationFailed,
            Code::Unavailable => Exit::NotReachable,
            _ => Exit::Failed,
        }
    }
}

/// One sentence for the person, one code for the script.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// The sentence, without a trailing stop.
    pub message: String,
}

impl Failure {
    /// A failure with its exit code.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    /// It was tried and did not work.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    /// Called in a way that cannot work.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// What every verb answers.
pub type Outcome = Result<(), Failure>;
