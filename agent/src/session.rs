//! The one stream to the controller: dial, Hello, listen and tell, and again after a loss.
//!
//! ```text
//! dial ─► Hello ─► Welcome ─► { heartbeat each 5 s · what the table has to say · what the controller wants } ─loss─► wait (full jitter) ─► dial
//!                     │ refused: the reason is logged, tried again each minute
//! ```
//! Owns: the connection and the silence watch: without an answer for 20 s every worker is parked, before the lease of 30 s ends.
//! Never: touches a disk, decides about a job. Bytes never ride here.
//! A crash here costs nothing: the table is said again in the next session.

use std::sync::Arc;
use std::time::Duration;

use proto::v1::controller_message::Kind as FromController;
use proto::v1::fleet_client::FleetClient;
use proto::v1::{self, agent_message};
use shared::error::Code;
use shared::lease;
use shared::options::Action;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::held::Stop;
use crate::identity::{self, Identity};
use crate::{Agent, browse, console, hypervisors, inspect, pull, snapshots, touched, transfer, worker};

/// Longest pause between two tries.
const MAX_BACKOFF: Duration = Duration::from_secs(15);
/// Pause after a refusal, which a person has to mend.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);
/// Between two progress reports of one job.
const TELL: Duration = Duration::from_millis(300);
/// Between two looks at the inventory for changes.
const RESCAN: Duration = Duration::from_secs(30);
/// Between two looks at what earlier attempts have left at their sources.
const REAP: Duration = Duration::from_secs(10);

/// A session is not ended for a renewal before this time, so that a renewal that fails costs one session an hour.
const RENEWAL: Duration = Duration::from_secs(3600);

/// Why a session ended.
enum Loss {
    /// The process is to end.
    Shutdown,
    /// The connection broke or could not be made.
    Away(String),
    /// The controller does not want this agent.
    Refused(String),
}

/// Keeps a session until shutdown is asked for.
pub async fn keep(agent: &Arc<Agent>, identity: Identity, shutdown: watch::Receiver<bool>) {
    let mut identity = Arc::new(identity);
    let mut failures = 0u32;
    let silence = tokio::spawn(watch_silence(agent.clone()));
    while !*shutdown.borrow() {
        match agent.home.renew(&agent.config, &identity).await {
            Ok(Some(renewed)) => identity = Arc::new(renewed),
            Ok(None) => {}
            Err(e) => tracing::warn!(error = %e, "the certificate could not be renewed yet"),
        }
        agent.go_by(identity.clone());
        let began = Instant::now();
        let loss = session(agent, &identity, shutdown.clone()).await;
        let pause = match loss {
            Loss::Shutdown => break,
            Loss::Away(reason) => {
                failures = if began.elapsed() > Duration::from_secs(30) { 1 } else { failures.saturating_add(1) };
                tracing::warn!(reason, "no session with the controller");
                // Full jitter: a thousand agents that lost one controller do not come back in one moment.
                let most = MAX_BACKOFF.min(Duration::from_millis(250) * 2u32.saturating_pow(failures.min(10)));
                most.mul_f64(rand::random::<f64>())
            }
            Loss::Refused(reason) => {
                tracing::error!(reason, "the controller refuses this agent");
                REFUSED_PAUSE
            }
        };
        let mut stop = shutdown.clone();
        tokio::select! { () = sleep(pause) => {}, _ = stop.wait_for(|stop| *stop) => {} }
    }
    silence.abort();
    // Nothing answers for a session that stays: at its idle time it goes.
    let _ = timeout(Duration::from_secs(3), hypervisors::leave(agent)).await;
}

/// Parks all workers when the controller has been silent for long: somebody else may be given their jobs soon.
async fn watch_silence(agent: Arc<Agent>) {
    let mut tick = interval(Duration::from_secs(1));
    loop {
        tick.tick().await;
        if agent.table.any_running() && agent.silence() > lease::AGENT_STOPS {
            tracing::warn!(
                "no answer from the controller for {} s: the jobs are parked at their checkpoints",
                lease::AGENT_STOPS.as_secs()
            );
            agent.table.stop_all(Stop::Park);
        }
    }
}

async fn session(agent: &Arc<Agent>, identity: &Identity, mut shutdown: watch::Receiver<bool>) -> Loss {
    let channel = tokio::select! {
        channel = identity.dial(&agent.config) => channel,
        _ = shutdown.wait_for(|stop| *stop) => return Loss::Shutdown,
    };
    let channel = match channel {
        Ok(channel) => channel,
        Err(identity::Error::Refused(reason)) => return Loss::Refused(reason),
        Err(e) => return Loss::Away(e.to_string()),
    };
    let (tell, told) = mpsc::channel(256);
    if tell.send(message(agent_message::Kind::Hello(hello(agent)))).await.is_err() {
        return Loss::Away("the stream closed before Hello".to_owned());
    }
    let mut client = FleetClient::new(channel).max_decoding_message_size(16 << 20).max_encoding_message_size(64 << 20);
    let mut stream = match timeout(Duration::from_secs(15), client.session(ReceiverStream::new(told))).await {
        Ok(Ok(reply)) => reply.into_inner(),
        Ok(Err(status)) if matches!(status.code(), tonic::Code::Unauthenticated | tonic::Code::PermissionDenied) => {
            return Loss::Refused(status.message().to_owned());
        }
        Ok(Err(status)) => return Loss::Away(status.message().to_owned()),
        Err(_) => return Loss::Away("no answer to the session call within 15 s".to_owned()),
    };
    agent.table.new_session();
    agent.forget_questions();

    let began = Instant::now();
    let mut heartbeat = interval(lease::HEARTBEAT);
    let mut telling = interval(TELL);
    let mut rescan = interval(RESCAN);
    let mut reaping = interval(REAP);
    for timer in [&mut heartbeat, &mut telling, &mut rescan, &mut reaping] {
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    }
    let mut sequence = 0u64;
    let mut welcomed = false;
    loop {
        let mut with_progress = false;
        tokio::select! {
            received = stream.next() => {
                let kind = match received {
                    Some(Ok(v1::ControllerMessage { kind: Some(kind) })) => kind,
                    Some(Ok(_)) => continue,
                    Some(Err(status)) => return Loss::Away(status.message().to_owned()),
                    None => return Loss::Away("the controller closed the stream".to_owned()),
                };
                agent.heard();
                if let FromController::Welcome(welcome) = &kind {
                    if !welcome.refused.is_empty() {
                        return Loss::Refused(welcome.refused.clone());
                    }
                    welcomed = true;
                    tracing::info!(agent = welcome.agent_id, "session with the controller");
                }
                handle(agent, kind, &tell).await;
            }
            _ = heartbeat.tick() => {
                sequence += 1;
                let beat = v1::Heartbeat {
                    sequence,
                    roots: roots(agent),
                    resident_bytes: resident_bytes(),
                    time_ms: now_ms(),
                    source_hosts: agent.hypervisors.hosts(),
                };
                if tell.try_send(message(agent_message::Kind::Heartbeat(beat))).is_err() {
                    return Loss::Away("the stream does not take heartbeats".to_owned());
                }
                if agent.silence() > lease::LEASE {
                    return Loss::Away(format!("no answer for {} s", agent.silence().as_secs()));
                }
            }
            _ = telling.tick() => with_progress = true,
            _ = rescan.tick() => {
                // A certificate is renewed between two sessions; one that never ends would outlive it. Workers go on meanwhile.
                if began.elapsed() > RENEWAL && identity.is_due() {
                    return Loss::Away("the certificate is due for renewal".to_owned());
                }
                if welcomed {
                    agent.scan(&tell, None, false);
                }
            }
            _ = reaping.tick() => if welcomed { reap(agent) },
            () = agent.table.news.notified() => {}
            () = agent.catalogue.notified() => if welcomed {
                agent.scan(&tell, Some(agent.config.images_connection.clone()), false);
                for (name, what) in agent.hypervisors.take_stale() {
                    match what {
                        hypervisors::Stale::All => agent.scan(&tell, Some(name), false),
                        hypervisors::Stale::Vms(vms) => agent.scan_some(&tell, name, vms),
                    }
                }
            },
            _ = shutdown.wait_for(|stop| *stop) => {
                drain(agent, &tell, &mut stream).await;
                return Loss::Shutdown;
            }
        }
        // Before Welcome the controller does not know what we hold and would refuse it.
        if welcomed {
            for said in agent.table.to_say(with_progress) {
                if tell.send(said).await.is_err() {
                    return Loss::Away("the stream closed".to_owned());
                }
            }
        }
    }
}

/// SIGTERM: no new work comes from here on; workers seal what is in order and park; the process goes when the controller has their ends in its store.
async fn drain(agent: &Arc<Agent>, tell: &mpsc::Sender<v1::AgentMessage>, stream: &mut tonic::Streaming<v1::ControllerMessage>) {
    // A stream that does not take it will not take the ends either; the jobs are parked all the same.
    let _ = timeout(Duration::from_secs(1), tell.send(message(agent_message::Kind::Leaving(v1::Leaving {})))).await;
    agent.table.stop_all(Stop::Park);
    let patience = Instant::now() + Duration::from_secs(15);
    while agent.table.any_running() && Instant::now() < patience {
        let _ = timeout(Duration::from_millis(200), agent.table.news.notified()).await;
    }
    for said in agent.table.to_say(true) {
        if tell.send(said).await.is_err() {
            return;
        }
    }
    // An end that is not acknowledged is said by the next process's Hello; until then its job would seem to run.
    let patience = Instant::now() + Duration::from_secs(5);
    while agent.table.any_unacknowledged() {
        match tokio::time::timeout_at(patience, stream.next()).await {
            Ok(Some(Ok(v1::ControllerMessage { kind: Some(FromController::Acknowledge(ack)) }))) => acknowledge(agent, &ack),
            Ok(Some(Ok(_))) => {}
            Ok(Some(Err(_)) | None) | Err(_) => return,
        }
    }
}

async fn handle(agent: &Arc<Agent>, kind: FromController, tell: &mpsc::Sender<v1::AgentMessage>) {
    match kind {
        FromController::Welcome(welcome) => {
            agent.serve(welcome.connections);
            hypervisors::attend(agent);
            reap(agent);
            for held in agent.table.all() {
                if !welcome.keep.iter().any(|keep| keep.job == held.job && keep.epoch == held.epoch) {
                    held.ask_to_stop(Stop::Park);
                }
            }
            agent.scan(tell, None, true);
        }
        FromController::Assign(assign) => match agent.table.take(&assign.job, assign.epoch) {
            Some((held, replaced)) => {
                tracing::info!(job = assign.job, epoch = assign.epoch, format = assign.format, "assignment");
                worker::start(agent, held, replaced, assign);
            }
            None => tracing::debug!(job = assign.job, epoch = assign.epoch, "this assignment is held already"),
        },
        FromController::Cancel(cancel) => stop(agent, &cancel),
        FromController::CommitReply(reply) => agent.table.commit_reply(&reply),
        FromController::Acknowledge(ack) => acknowledge(agent, &ack),
        FromController::Drain(_) => agent.table.stop_all(Stop::Park),
        FromController::Browse(browse) => answer(agent, browse, tell),
        FromController::Fetch(fetch) => transfer::serve(agent, fetch),
        FromController::OpenConsole(wanted) => console::serve(agent, wanted),
        FromController::Cutover(cutover) => {
            if let Some(held) = agent.table.get(&cutover.job).filter(|held| held.epoch == cutover.epoch) {
                held.ask_to_cut_over();
            }
        }
        FromController::Forget(forget) => agent.forget_question(forget.id),
        FromController::Renew(_) => {}
    }
}

/// Undoes what earlier attempts have left at their sources; in the background, one at a time.
fn reap(agent: &Arc<Agent>) {
    let agent = agent.clone();
    tokio::task::spawn_blocking(move || {
        if let Ok(_alone) = agent.reaping.try_lock() {
            touched::reap(&agent);
        }
    });
}

fn stop(agent: &Arc<Agent>, cancel: &v1::Cancel) {
    let held = agent.table.get(&cancel.job).filter(|held| cancel.epoch == 0 || held.epoch == cancel.epoch);
    let running = held.as_ref().is_some_and(|held| !held.is_over());
    if let Some(held) = held {
        held.ask_to_stop(if cancel.discard { Stop::Discard } else { Stop::Park });
        agent.table.forget(&held.job, held.epoch);
    }
    if !running && cancel.discard && agent.table.get(&cancel.job).is_none() {
        let (agent, job) = (agent.clone(), cancel.job.clone());
        tokio::task::spawn_blocking(move || {
            if let Err(e) = worker::discard(&agent, &job) {
                tracing::error!(job, error = %e, "a part folder could not be removed; the ledger keeps it");
            }
        });
    }
}

/// The controller has it in its store: an end may be forgotten, and with a published job what was fetched for it, its journal and its
/// ledger entry. What is parked or tried again goes on from them; what has ended otherwise was discarded, or is when the controller says so.
fn acknowledge(agent: &Arc<Agent>, ack: &v1::Acknowledge) {
    let Some(held) = agent.table.get(&ack.job).filter(|held| held.epoch == ack.epoch) else { return };
    // The ledger last: what it names is looked after at the next Hello.
    if held.is_completed()
        && let Err(e) = pull::forget(agent, &ack.job).and_then(|()| agent.ledger.remove(&ack.job))
    {
        tracing::warn!(job = ack.job, error = %e, "what a published job needed could not be removed; the ledger keeps it");
    }
    agent.table.forget(&ack.job, ack.epoch);
}

fn answer(agent: &Arc<Agent>, browse: v1::Browse, tell: &mpsc::Sender<v1::AgentMessage>) {
    use v1::browse::Question;
    let (agent, tell) = (agent.clone(), tell.clone());
    // Noted here, in the order of the stream: a word that nobody waits any more comes later.
    let stop = match browse.question {
        Some(Question::Digests(_) | Question::Deploy(_) | Question::TakeSnapshot(_) | Question::RemoveSnapshot(_)) => {
            agent.begin_question(browse.id)
        }
        _ => Arc::default(),
    };
    tokio::task::spawn_blocking(move || {
        let answered = match browse.question {
            Some(Question::Probe(connection)) => {
                let counted = match connection.kind.as_str() {
                    hypervisors::VSPHERE => hypervisors::probe(&agent, &connection),
                    _ => agent.source(&connection).and_then(|source| source.inventory()).map(|vms| serde_json::json!({"vms": vms.len()})),
                };
                if counted.is_ok() && (connection.kind != hypervisors::VSPHERE || connection.account.is_some()) {
                    agent.remember(connection);
                    hypervisors::attend(&agent);
                }
                counted
            }
            Some(Question::Refresh(name)) => {
                agent.scan_now(&tell, Some(&name), true);
                Ok(serde_json::json!({}))
            }
            Some(Question::FreeSpace(path)) => agent.free_space(&path),
            Some(Question::Inspect(asked)) => inspect::inspect(&agent, &asked),
            Some(Question::Describe(asked)) => describe(&agent, &asked),
            Some(Question::LookInside(asked)) => inspect::look_inside(&agent, &asked),
            Some(Question::List(list)) => browse::list(&agent.vault, &list),
            Some(Question::Stat(path)) => browse::stat(&agent.vault, &path),
            Some(Question::Power(wanted)) => power(&agent, &wanted),
            Some(Question::Deploy(wanted)) => {
                let answered = crate::deploy::deploy(&agent, &wanted, &stop);
                agent.end_question(browse.id, &stop);
                answered
            }
            Some(Question::Snapshots(asked)) => snapshots::list(&agent, &asked),
            Some(Question::TakeSnapshot(wanted)) => {
                let answered = snapshots::take(&agent, &tell, &wanted, &stop);
                agent.end_question(browse.id, &stop);
                answered
            }
            Some(Question::RemoveSnapshot(wanted)) => {
                let answered = snapshots::remove(&agent, &tell, &wanted, &stop);
                agent.end_question(browse.id, &stop);
                answered
            }
            Some(Question::RemoveExport(wanted)) => browse::remove_export(&agent, &wanted),
            Some(Question::Digests(question)) => {
                let answered = crate::digests::answer(&agent, &question, &stop);
                agent.end_question(browse.id, &stop);
                answered
            }
            None => Err(crate::sources::Error::fatal(Code::BadRequest, "a question this agent does not know")),
        };
        let reply = match answered {
            Ok(json) => v1::BrowseReply { id: browse.id, json: json.to_string(), failure: None },
            Err(e) => {
                let failure =
                    v1::Failure { code: e.code.word().to_owned(), message: e.message, retryable: e.retryable, ..Default::default() };
                v1::BrowseReply { id: browse.id, json: String::new(), failure: Some(failure) }
            }
        };
        // A closed stream: the asker has its time-out.
        let _ = tell.blocking_send(message(agent_message::Kind::BrowseReply(reply)));
    });
}

fn power(agent: &Agent, wanted: &v1::Power) -> Result<serde_json::Value, crate::sources::Error> {
    let action = Action::from_word(&wanted.action).zip(wanted.connection.as_ref());
    let (action, connection) = action.ok_or_else(|| crate::sources::Error::fatal(Code::BadRequest, "how to switch which VM?"))?;
    let state = agent.source(connection)?.power(&wanted.vm_id, action)?;
    Ok(serde_json::json!({ "power_state": state }))
}

fn describe(agent: &Agent, asked: &v1::Describe) -> Result<serde_json::Value, crate::sources::Error> {
    let connection = crate::sources::named(asked.connection.as_ref())?;
    let details = agent.source(connection)?.describe(&asked.vm_id, asked.privileges)?;
    serde_json::to_value(details).map_err(|e| crate::sources::Error::fatal(Code::Internal, e.to_string()))
}

fn hello(agent: &Agent) -> v1::Hello {
    let parked = agent.ledger.all().unwrap_or_default();
    let running = agent.table.hello();
    v1::Hello {
        protocol: proto::PROTOCOL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        instance: agent.instance.clone(),
        hostname: crate::config::default_name(),
        cpus: std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
        roots: roots(agent),
        connections: agent.own_connections(),
        formats: crate::OUTPUT_FORMATS.iter().map(|format| (*format).to_owned()).collect(),
        draining: false,
        parked: parked
            .into_iter()
            .filter(|entry| running.iter().all(|held| held.job != entry.job))
            .map(|entry| v1::Held { job: entry.job, epoch: entry.epoch })
            .collect(),
        held: running,
    }
}

fn roots(agent: &Agent) -> Vec<v1::Root> {
    let root = |root: &shared::vault::Root| {
        let (free_bytes, total_bytes) = root.space().unwrap_or_default();
        v1::Root { name: root.name.clone(), path: root.path.display().to_string(), free_bytes, total_bytes, writable: root.writable }
    };
    agent.vault.roots().map(root).collect()
}

/// This host's clock, so that the controller sees how far the two are apart.
fn now_ms() -> i64 {
    shared::clock::now().timestamp_millis()
}

/// Resident memory of this process, from /proc/self/statm (pages), 0 where it cannot be read.
fn resident_bytes() -> u64 {
    let statm = shared::vault::read_config(std::path::Path::new("/proc/self/statm")).unwrap_or_default();
    let pages = String::from_utf8_lossy(&statm).split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    pages.saturating_mul(rustix::param::page_size() as u64)
}

/// Wraps a message.
pub fn message(kind: agent_message::Kind) -> v1::AgentMessage {
    v1::AgentMessage { kind: Some(kind) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use v1::finished::Outcome;

    use super::*;
    use crate::ledger::Entry;

    #[tokio::test]
    async fn what_was_fetched_stays_until_its_job_is_published() {
        let base = shared::vault::temporary_dir("session").unwrap();
        let agent = Arc::new(Agent::open(crate::config::Config::in_folder(&base)).unwrap());
        let job = "job-0123456789abcdef";
        let entry = Entry { job: job.to_owned(), epoch: 1, destination: "exports".to_owned(), created: 0 };
        agent.ledger.write(&entry).unwrap();
        let whole = base.join("data/pulled").join(job).join("whole");
        std::fs::create_dir_all(&whole).unwrap();
        std::fs::write(whole.join("disk.raw"), b"x").unwrap();
        let failure =
            v1::Failure { code: Code::BadGateway.word().to_owned(), message: String::new(), retryable: true, ..Default::default() };
        let ends = [Outcome::Parked(true), Outcome::Failed(failure), Outcome::Completed("{}".to_owned())];
        for (epoch, outcome) in (1..).zip(ends) {
            let is_completed = matches!(outcome, Outcome::Completed(_));
            let (held, _) = agent.table.take(job, epoch).unwrap();
            agent.table.end(&held, outcome);
            acknowledge(&agent, &v1::Acknowledge { job: job.to_owned(), epoch });
            assert!(agent.table.get(job).is_none());
            assert_eq!((whole.join("disk.raw").exists(), agent.ledger.read(job).unwrap().is_some()), (!is_completed, !is_completed));
        }
        assert!(!base.join("data/pulled").join(job).exists());
        std::fs::remove_dir_all(base).unwrap();
    }
}
