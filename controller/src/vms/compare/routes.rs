//! `POST /vms/compare`.
//!
//! Owns: the HTTP side. Never: ranks. A crash here costs one answer.

use actix_web::web;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::rank::{self, Difference};
use super::service::{self, Digest};
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::Viewer;
use crate::http::reply::{Error, ErrorBody};
use crate::vms::routes::Which;
use crate::vms::service::Found;

/// Two VMs.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = CompareVms, example = json!({
    "source": {"provider": "vms", "vm_name": "web-server-01"}, "target": {"provider": "exports", "vm_name": "web-server-01"}, "content": true
}))]
pub struct Compare {
    source: Which,
    target: Which,
    /// Compare what the disks hold, by digest: from the manifest beside a disk, else by reading it at its agent (at most 300 s, and only
    /// while the caller waits). No data leaves the agents.
    #[serde(default)]
    content: bool,
}

/// What differs.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "match": false,
    "differences": [{"field": "firmware", "source": "uefi", "target": "bios", "severity": "critical"}],
    "disks": [{
        "name": "disk-0", "content": "equal",
        "source": {"name": "disk-0", "size_bytes": 10737418240u64, "format": "vmdk", "digest": "5f0c2a9be1d34c77", "how": "read"},
        "target": {"name": "disk-0", "size_bytes": 10737418240u64, "format": "qcow2", "digest": "5f0c2a9be1d34c77", "how": "manifest"}
    }]
}))]
pub struct Compared {
    /// Whether nothing differs but what is `info`.
    #[serde(rename = "match")]
    matches: bool,
    /// What breaks a boot first.
    differences: Vec<Difference>,
    /// The disks in the order the guest sees them.
    disks: Vec<Pair>,
}

/// The same disk on both sides.
#[derive(Serialize, ToSchema)]
#[schema(as = DiskPair)]
pub struct Pair {
    name: String,
    /// `equal`, `different`, `not compared`, or `missing` on one side.
    content: &'static str,
    source: Option<Side>,
    target: Option<Side>,
}

/// A disk on one side.
#[derive(Serialize, ToSchema)]
#[schema(as = DiskSide)]
pub struct Side {
    name: String,
    size_bytes: u64,
    format: String,
    /// BLAKE3 root over the disk's blocks, the one of manifests; null where it was not asked for.
    digest: Option<String>,
    /// `manifest` (nothing was read) or `read`.
    how: Option<String>,
}

fn side(found: &Found, digests: Option<&[Digest]>, n: usize) -> Option<Side> {
    let disk = found.vm.disks.get(n)?;
    let digest = digests.and_then(|digests| digests.get(n));
    Some(Side {
        name: disk.name.clone(),
        size_bytes: digest.map_or(disk.capacity, |digest| digest.capacity),
        format: disk.format.clone(),
        digest: digest.map(|digest| digest.root.clone()),
        how: digest.map(|digest| digest.how.clone()),
    })
}

/// Compares two VMs: their hardware, ranked by what breaks a boot, and with `content` what their disks hold.
#[utoipa::path(post, path = "/vms/compare", tag = "VMs", security(("token" = [])), request_body = Compare, responses(
    (status = 200, description = "what differs", body = Compared),
    (status = 400, description = "the body cannot be read, or no or several connections of that kind", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such VM", body = ErrorBody),
    (status = 409, description = "several bear the name", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 422, description = "a disk cannot be read, or not in time", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "an agent did not answer", body = ErrorBody),
    (status = 503, description = "the database or an agent is away, or reads for others", body = ErrorBody),
))]
pub async fn compare(_: Viewer, app: web::Data<App>, body: Json<Compare>) -> Result<web::Json<Compared>, Error> {
    let Compare { source, target, content } = body.value;
    let source = service::find(&app, &source.provider, &source.vm_name).await?;
    let target = service::find(&app, &target.provider, &target.vm_name).await?;
    let (ours, theirs) = if content {
        let both = futures_util::future::join(service::digests(&app, &source), service::digests(&app, &target)).await;
        (Some(both.0?), Some(both.1?))
    } else {
        (None, None)
    };
    let count = source.vm.disks.len().max(target.vm.disks.len());
    let pairs: Vec<Pair> = (0..count)
        .map(|n| {
            let (a, b) = (side(&source, ours.as_deref(), n), side(&target, theirs.as_deref(), n));
            let content = match (&a, &b) {
                (Some(Side { digest: Some(a), .. }), Some(Side { digest: Some(b), .. })) if a == b => "equal",
                (Some(Side { digest: Some(_), .. }), Some(Side { digest: Some(_), .. })) => "different",
                (Some(_), Some(_)) => "not compared",
                _ => "missing",
            };
            Pair { name: format!("disk-{n}"), content, source: a, target: b }
        })
        .collect();
    let same = |pair: &Pair| match pair.content {
        "equal" => Some(true),
        "different" => Some(false),
        _ => None,
    };
    let contents: Vec<Option<bool>> = pairs.iter().map(same).collect();
    let differences = rank::differences(&source.vm, &target.vm, &contents);
    Ok(web::Json(Compared { matches: rank::matches(&differences), differences, disks: pairs }))
}
