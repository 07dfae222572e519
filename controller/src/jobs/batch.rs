//! `POST /jobs/batch`: many jobs in one request, a result for each, at most so many of them at once.
//!
//! Owns: the shape of the request and of its answer. Never: makes some of the good ones only: those that pass their checks are made in one
//! transaction, together with the answer of an `Idempotency-Key`. A crash here costs one answer.

use futures_util::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use shared::error::Code;
use utoipa::ToSchema;

use super::record::NewJob;
use super::service::{self, Create, Wishes};
use super::view::View;
use crate::app::App;
use crate::http::reply::{Error, ErrorBody};

/// Jobs in one request.
pub const MOST: usize = 500;
/// Checks that run at a time: each may ask an agent.
const CHECKS: usize = 16;

/// Many jobs. What stands beside `jobs`, `vms` and `concurrency` is the default for each of them; an `options` of a job's own replaces the
/// common one as a whole.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = JobBatch, example = json!({
    "type": "export", "provider": "local", "format": "qcow2", "options": {"compress": true}, "concurrency": 2,
    "vms": ["web-server-01", "web-server-02"], "jobs": [{"vm_name": "db-server-01", "format": "raw", "options": {}}]
}))]
pub struct Batch {
    /// VMs by name, path or id: each as good as `{"vm_name": …}` in `jobs`, before which they come.
    #[serde(default)]
    pub vms: Vec<String>,
    /// Jobs, as POST /jobs takes them.
    #[serde(default)]
    pub jobs: Vec<Create>,
    /// How many of them may run at once, 1 to 500; absent: as many as the agents take.
    pub concurrency: Option<i64>,
    /// Default for each job.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Default for each job that names no `source`.
    pub provider: Option<String>,
    /// Default for each job.
    pub format: Option<String>,
    /// Default for each job.
    pub agent: Option<String>,
    /// Default for each job.
    pub options: Option<Wishes>,
}

/// What became of one of them.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = JobBatchResult)]
pub struct Outcome {
    /// Its place in the request: `vms` first, then `jobs`.
    pub index: usize,
    /// 201, or the status of the error.
    pub status: u16,
    /// The job, queued.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<View>,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
}

/// The whole answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = JobBatchAnswer)]
pub struct Answer {
    /// `batch-…`; its jobs bear it in `batch`.
    pub batch_id: String,
    /// As it was asked for.
    pub concurrency: Option<u32>,
    /// Jobs that were made.
    pub created: usize,
    /// Those that were not.
    pub failed: usize,
    /// A result for each, in the order of the request.
    pub results: Vec<Outcome>,
}

impl Answer {
    /// 201 where all were made, else 207.
    pub fn status(&self) -> u16 {
        if self.failed == 0 { 201 } else { 207 }
    }
}

/// A batch after its checks: what will be made, and why the rest will not.
pub struct Checked {
    /// `batch-…`.
    pub id: String,
    /// How many run at once.
    pub limit: Option<u32>,
    /// For each of the request, whether it is made; the error where not.
    fates: Vec<Option<ErrorBody>>,
}

impl Checked {
    /// The answer with these jobs, in their order.
    pub fn answer(self, views: Vec<View>) -> Answer {
        let (created, failed) = (views.len(), self.fates.iter().filter(|fate| fate.is_some()).count());
        let mut views = views.into_iter();
        let result = |(index, fate): (usize, Option<ErrorBody>)| match fate {
            Some(error) => Outcome { index, status: error.status, job: None, error: Some(error) },
            None => Outcome { index, status: 201, job: views.next(), error: None },
        };
        let results = self.fates.into_iter().enumerate().map(result).collect();
        Answer { batch_id: self.id, concurrency: self.limit, created, failed, results }
    }
}

/// Checks all of them.
pub async fn check(app: &App, caller: &str, batch: Batch) -> Result<(Checked, Vec<NewJob>), Error> {
    let limit = match batch.concurrency {
        None => None,
        Some(limit) => match u32::try_from(limit) {
            Ok(limit) if (1..=MOST as u32).contains(&limit) => Some(limit),
            _ => return Err(Error::bad_request(format!("concurrency must be 1 to {MOST}, not {limit}"))),
        },
    };
    let wanted = spread(batch)?;
    let checks = stream::iter(wanted.into_iter().map(|wanted| service::check(app, caller, wanted))).buffered(CHECKS);
    let checked: Vec<Result<NewJob, Error>> = checks.collect().await;
    let (mut fates, mut new) = (Vec::with_capacity(checked.len()), Vec::new());
    for checked in checked {
        match checked {
            Ok(job) => {
                fates.push(None);
                new.push(job);
            }
            // One that is away is away for all of them: nothing is made, and the caller comes again.
            Err(e) if matches!(e.code(), Code::Internal | Code::Unavailable) => return Err(e),
            Err(e) => fates.push(Some(e.body())),
        }
    }
    Ok((Checked { id: format!("batch-{}", shared::ids::random_hex::<8>()), limit, fates }, new))
}

/// Each job with the defaults.
fn spread(batch: Batch) -> Result<Vec<Create>, Error> {
    let count = batch.vms.len() + batch.jobs.len();
    if count == 0 {
        return Err(Error::bad_request("the batch is empty: name VMs in `vms`, or jobs in `jobs`"));
    }
    if count > MOST {
        return Err(Error::bad_request(format!("a batch has at most {MOST} jobs, not {count}")));
    }
    let named = batch.vms.into_iter().map(|vm| Create { vm_name: Some(vm), ..Create::default() });
    let fill = |job: Create| Create {
        kind: job.kind.or_else(|| batch.kind.clone()),
        provider: job.provider.or_else(|| batch.provider.clone().filter(|_| job.source.is_none())),
        vm_name: job.vm_name,
        source: job.source,
        agent: job.agent.or_else(|| batch.agent.clone()),
        format: job.format.or_else(|| batch.format.clone()),
        options: job.options.or_else(|| batch.options.clone()),
    };
    Ok(named.chain(batch.jobs).map(fill).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_beside_the_jobs_is_their_default() {
        let batch = serde_json::from_value::<Batch>(serde_json::json!({
            "type": "export", "provider": "local", "format": "raw", "vms": ["a"], "options": {"priority": 7},
            "jobs": [{"vm_name": "b", "format": "qcow2", "options": {}}, {"type": "verify", "source": "exports/x.raw"}],
        }));
        let jobs = spread(batch.unwrap()).unwrap();
        let seen: Vec<_> =
            jobs.iter().map(|job| (job.kind.as_deref(), job.provider.as_deref(), job.vm_name.as_deref(), job.format.as_deref())).collect();
        assert_eq!(seen[0], (Some("export"), Some("local"), Some("a"), Some("raw")));
        assert_eq!(seen[1], (Some("export"), Some("local"), Some("b"), Some("qcow2")));
        assert_eq!((seen[2].0, seen[2].1, jobs[2].source.as_deref()), (Some("verify"), None, Some("exports/x.raw")));
        assert_eq!((jobs[0].options.as_ref().unwrap().priority, jobs[1].options.as_ref().unwrap().priority), (Some(7), None));
        assert!(spread(Batch::default()).is_err());
        assert!(spread(Batch { vms: vec![String::new(); MOST + 1], ..Batch::default() }).is_err());
    }
}
