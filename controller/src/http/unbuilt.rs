//! What the contract names and this version has not: every such operation stands here, documented, and answers 422 `not_built`.
//!
//! Owns: the one list that has to become empty. Never: pretends: nothing is read of the request but who asks.
//! A crash here costs one answer.
//!
//! | operation | what it waits for |
//! |---|---|
//! | `GET`, `POST /vms/{provider}/{id}/snapshots`, `DELETE …/{snapshot}` | vSphere, libvirt |

use actix_web::HttpRequest;

use super::guard::{Operator, Viewer};
use super::reply::{Error, ErrorBody};

fn say(request: &HttpRequest) -> Error {
    let pattern = request.match_pattern().unwrap_or_default();
    let path = pattern.strip_prefix("/api/v1").unwrap_or(&pattern);
    Error::not_built(format!("{} {path}", request.method()))
}

macro_rules! unbuilt {
    ($($(#[$doc:meta])* $name:ident: $method:ident $path:literal, ($($parameter:literal),*);)*) => {
        $($(#[$doc])*
        #[utoipa::path($method, path = $path, tag = "VMs", security(("token" = [])), params($(($parameter = String, Path)),*), responses(
            (status = 401, description = "no valid token", body = ErrorBody),
            (status = 403, description = "not an operator", body = ErrorBody),
            (status = 422, description = "not built yet", body = ErrorBody),
        ))]
        pub async fn $name(_: Operator, request: HttpRequest) -> Result<&'static str, Error> {
            Err(say(&request))
        })*
    };
}
unbuilt! {
    /// Takes a snapshot. Not built yet.
    snapshot: post "/vms/{provider}/{id}/snapshots", ("provider", "id");
    /// Removes a snapshot. Not built yet.
    snapshot_remove: delete "/vms/{provider}/{id}/snapshots/{snapshot}", ("provider", "id", "snapshot");
}

/// A VM's snapshots. Not built yet.
#[utoipa::path(get, path = "/vms/{provider}/{id}/snapshots", tag = "VMs", security(("token" = [])),
    params(("provider" = String, Path), ("id" = String, Path)), responses(
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 422, description = "not built yet", body = ErrorBody),
))]
pub async fn snapshots(_: Viewer, request: HttpRequest) -> Result<&'static str, Error> {
    Err(say(&request))
}
