//! Who calls, and may they: permission stands in the handler's signature as [`Viewer`], [`Operator`] or [`Admin`].
//!
//! Owns: the three extractors, and [`Identity`], which [`super::finish`] finds out once per request before anything else looks.
//! Never: trusts a token that was not checked against the store. A crash here costs one answer.

use std::future::{Ready, ready};
use std::ops::Deref;

use actix_web::dev::Payload;
use actix_web::{FromRequest, HttpMessage, HttpRequest};
use shared::error::Code;

use super::reply::Error;
use crate::access::{Caller, Role};

/// What the bearer token of a request is worth.
#[derive(Clone, Debug)]
pub enum Identity {
    /// A good token.
    Known(Caller),
    /// No token at all.
    Nobody,
    /// A token that is forged, expired or revoked.
    Refused,
    /// Nobody could say: the database is away.
    Unclear(Error),
}

impl Identity {
    /// The caller, where there is a good token.
    pub fn caller(&self) -> Option<&Caller> {
        match self {
            Identity::Known(caller) => Some(caller),
            _ => None,
        }
    }

    /// The caller, or the answer that is due.
    pub fn require(&self, least: Role) -> Result<Caller, Error> {
        match self {
            Identity::Known(caller) if caller.role >= least => Ok(caller.clone()),
            Identity::Known(caller) => {
                Err(Error::new(Code::Forbidden, format!("this needs the role `{}`; you are `{}`", least.word(), caller.role.word())))
            }
            Identity::Nobody => Err(Error::new(Code::Unauthorized, "send `Authorization: Bearer TOKEN`; POST /auth/login gives a token")),
            Identity::Refused => Err(Error::new(Code::Unauthorized, "the token is not valid or no longer; log in again")),
            Identity::Unclear(error) => Err(error.clone()),
        }
    }
}

/// The identity that was found out for this request.
pub fn identity(request: &HttpRequest) -> Identity {
    request.extensions().get::<Identity>().cloned().unwrap_or(Identity::Nobody)
}

macro_rules! guards {
    ($($(#[$doc:meta])* $name:ident = $role:expr,)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug)]
            pub struct $name(pub Caller);

            impl Deref for $name {
                type Target = Caller;
                fn deref(&self) -> &Caller { &self.0 }
            }

            impl FromRequest for $name {
                type Error = Error;
                type Future = Ready<Result<Self, Error>>;
                fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
                    ready(identity(request).require($role).map($name))
                }
            }
        )*
    };
}

guards! {
    /// Anybody with a good token.
    Viewer = Role::Viewer,
    /// Who may run jobs.
    Operator = Role::Operator,
    /// Who may manage users, providers and agents.
    Admin = Role::Admin,
}
