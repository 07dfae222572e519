//! The Queue actor: the only writer of job state.
//!
//! Owns: the mailbox and its order. A message is finished, store commit included, before the next is looked at: every handler answers
//! with an [`AtomicResponse`], and [`Core`] is taken out of the actor while it works.
//! Never: is blocked by an agent or a watcher; both get their messages by calls that do not wait.
//! A crash here ends the process, since nobody else may write job state: started again, it comes up from the store (see [`super::core`]).

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::dev::SendError;
use actix::{Actor, ActorFutureExt, Addr, AsyncContext, AtomicResponse, Context, Handler, Message, WrapFuture};
use shared::job::Event;
use tokio::sync::watch;

use super::batches::Answer;
use super::board::{Board, Observation};
use super::core::{Core, Error, News, Outbox, PER_AGENT, Ports};
use super::footprint::{Grid, Plan};
use super::intake::Intake;
use super::leases::{Arrival, Keep};
use super::logbook::Seen;
use super::record::{Batch, Job, NewJob};
use super::reports::Report;
use crate::http::idempotency::Idempotency;
use crate::live::{self, Frame};
use crate::store::{Error as StoreError, Store};
use crate::system::metrics::Metrics;

/// Messages that wait before senders are held up.
const MAILBOX: usize = 1024;
/// How often waiting log lines go to the store.
const FLUSH: Duration = Duration::from_millis(250);
/// How often leases are looked at.
const TICK: Duration = Duration::from_secs(1);

type Work<T> = Box<dyn for<'a> FnOnce(&'a mut Core) -> Pin<Box<dyn Future<Output = T> + 'a>> + Send>;

/// Work for the core, answered with its result.
struct Do<T>(Work<T>);

impl<T: Send + 'static> Message for Do<T> {
    type Result = Option<T>;
}

struct Queue {
    /// Absent only while a message is being worked on.
    core: Option<Box<Core>>,
}

impl Drop for Queue {
    fn drop(&mut self) {
        // A panic in the middle of a message: what was in memory is of no more worth. Better no controller than one without a queue.
        if self.core.is_none() && std::thread::panicking() {
            tracing::error!("the queue panicked; the process ends and comes up from the store");
            std::process::abort();
        }
    }
}

impl Actor for Queue {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX);
        // `wait` holds the mailbox up until the future is done, as AtomicResponse does.
        ctx.run_interval(TICK, |actor, ctx| {
            actor.hold(ctx, |mut core| {
                Box::pin(async move {
                    core.tick(Instant::now()).await;
                    core
                })
            })
        });
        ctx.run_interval(FLUSH, |actor, ctx| {
            actor.hold(ctx, |mut core| {
                Box::pin(async move {
                    core.flush_logs().await;
                    core
                })
            })
        });
    }
}

impl Queue {
    fn hold(&mut self, ctx: &mut Context<Self>, work: impl FnOnce(Box<Core>) -> Pin<Box<dyn Future<Output = Box<Core>>>>) {
        if let Some(core) = self.core.take() {
            ctx.wait(work(core).into_actor(self).map(|core, actor, _| actor.core = Some(core)));
        }
    }
}

impl<T: Send + 'static> Handler<Do<T>> for Queue {
    type Result = AtomicResponse<Self, Option<T>>;

    fn handle(&mut self, message: Do<T>, _: &mut Self::Context) -> Self::Result {
        let core = self.core.take();
        let work = async move {
            let mut core = core?;
            let answer = (message.0)(&mut core).await;
            Some((core, answer))
        };
        AtomicResponse::new(Box::pin(work.into_actor(self).map(|done, actor, _| {
            let (core, answer) = done?;
            actor.core = Some(core);
            Some(answer)
        })))
    }
}

/// The way to the Queue, from any thread.
#[derive(Clone)]
pub struct Handle {
    addr: Addr<Queue>,
    board: Board,
    intake: Intake,
}

/// Boxes an async block over the core.
macro_rules! work {
    (|$core:ident| $body:expr) => {
        Box::new(move |$core: &mut Core| Box::pin(async move { $body }) as Pin<Box<dyn Future<Output = _> + '_>>)
    };
}

impl Handle {
    /// Loads the live jobs and starts the actor on this thread's actix system.
    pub async fn start(store: Store, outbox: Arc<dyn Outbox>, live: live::Handle, metrics: Metrics) -> Result<Self, StoreError> {
        let news: News = Arc::new(move |kind, job, data| {
            let topics = if kind == "alert" { vec!["alerts".to_owned()] } else { vec!["jobs".to_owned(), format!("job:{job}")] };
            live.publish(Frame::new(kind, topics, data));
        });
        let board = Board::new(metrics);
        let core = Core::load(Ports { store, outbox, news }, board.clone(), PER_AGENT).await?;
        let addr = Queue { core: Some(Box::new(core)) }.start();
        Ok(Self { addr, board, intake: Intake::default() })
    }

    async fn ask<T: Send + 'static>(&self, work: Work<T>) -> Result<T, Error> {
        self.addr.send(Do(work)).await.ok().flatten().ok_or(Error::Gone)
    }

    /// Takes a new job; when it answers, the job is in the store. A unique violation on the key means that a twin request won.
    pub async fn submit(&self, new: NewJob, key: Option<Idempotency>) -> Result<Job, Error> {
        let (is_first, answer) = self.intake.push(new, key);
        if is_first {
            let intake = self.intake.clone();
            // Those who come until the queue gets there go along: one transaction for all. This call must not wait: who hangs up here
            // would leave the others behind.
            let take: Work<()> = work!(|core| core.take_in(intake.take()).await);
            match self.addr.try_send(Do(take)) {
                Ok(()) => {}
                Err(SendError::Full(take)) => self.addr.do_send(take),
                Err(SendError::Closed(_)) => drop(self.intake.take()),
            }
        }
        answer.await.map_err(|_| Error::Gone)?
    }

    /// Takes jobs that were made together, all or none; see [`Handle::submit`].
    pub async fn submit_all(&self, new: Vec<NewJob>, batch: Option<Batch>, answer: Option<Answer>) -> Result<Vec<Job>, Error> {
        self.ask(work!(|core| core.submit_all(new, batch, answer).await)).await?
    }

    /// Cancels.
    pub async fn cancel(&self, id: String, who: String) -> Result<Job, Error> {
        self.ask(work!(|core| core.person(&id, Event::Cancel, &format!("cancelled by {who}")).await)).await?
    }

    /// Another try for a failed or cancelled job.
    pub async fn retry(&self, id: String, who: String) -> Result<Job, Error> {
        self.ask(work!(|core| core.person(&id, Event::Retry, &format!("queued again by {who}")).await)).await?
    }

    /// Stops a job with its checkpoint kept.
    pub async fn pause(&self, id: String, who: String) -> Result<Job, Error> {
        self.ask(work!(|core| core.person(&id, Event::Pause, &format!("paused by {who}")).await)).await?
    }

    /// Tells a warm migration to cut over.
    pub async fn cutover(&self, id: String, _: String) -> Result<Job, Error> {
        self.ask(work!(|core| core.cutover(&id).await)).await?
    }

    /// Lets a paused job go on.
    pub async fn resume(&self, id: String, who: String) -> Result<Job, Error> {
        self.ask(work!(|core| core.person(&id, Event::Resume, &format!("resumed by {who}")).await)).await?
    }

    /// Lets a carbon-aware job wait until a planned start; one that runs is parked.
    pub async fn hold(&self, id: String, plan: Plan, grid: Grid, why: String) -> Result<(), Error> {
        self.ask(work!(|core| core.hold(&id, plan, grid, &why).await)).await?
    }

    /// Ends its wait for the grid.
    pub async fn release(&self, id: String, plan: Plan, grid: Grid, why: String) -> Result<(), Error> {
        self.ask(work!(|core| core.release(&id, plan, grid, &why).await)).await?
    }

    /// Takes what the grid says into its record.
    pub async fn note_grid(&self, id: String, plan: Option<Plan>, grid: Grid) -> Result<(), Error> {
        self.ask(work!(|core| core.note_grid(&id, plan, grid).await)).await?
    }

    /// Follows a job's log: what to read is in the store, how far it goes comes here.
    pub async fn follow(&self, id: String) -> Result<watch::Receiver<Seen>, Error> {
        self.ask(work!(|core| core.follow(&id).await)).await?
    }

    /// Stores waiting log lines now, so that who reads sees all.
    pub async fn flush_logs(&self) -> Result<(), Error> {
        self.ask(work!(|core| core.flush_logs().await)).await
    }

    /// An agent's message about a job.
    pub async fn report(&self, agent: String, report: Report) -> Result<(), Error> {
        self.ask(work!(|core| core.report(agent, report).await)).await
    }

    /// An agent said Hello; answers what Welcome must say.
    pub async fn agent_up(&self, arrival: Arrival) -> Result<Keep, Error> {
        self.ask(work!(|core| core.agent_up(arrival).await.map_err(Error::from))).await?
    }

    /// Welcome is on its way; from now on messages may be sent to this session.
    pub async fn agent_ready(&self, agent: String, session: u64) -> Result<(), Error> {
        self.ask(work!(|core| core.agent_ready(&agent, session).await.map_err(Error::from))).await?
    }

    /// A session ended.
    pub async fn agent_down(&self, agent: String, session: u64) -> Result<(), Error> {
        self.ask(work!(|core| core.agent_down(&agent, session).await.map_err(Error::from))).await?
    }

    /// An agent's process is about to end; its next session begins anew.
    pub async fn agent_leaving(&self, agent: String, session: u64) -> Result<(), Error> {
        self.ask(work!(|core| core.agent_leaving(&agent, session).await.map_err(Error::from))).await?
    }

    /// An agent takes no new work, or does again.
    pub async fn agent_draining(&self, agent: String, draining: bool) -> Result<(), Error> {
        self.ask(work!(|core| core.agent_draining(&agent, draining).await.map_err(Error::from))).await?
    }

    /// How long a message waits for the queue now, its handling included.
    pub async fn ping(&self) -> Result<Duration, Error> {
        let sent = Instant::now();
        self.ask::<()>(work!(|_core| ())).await?;
        Ok(sent.elapsed())
    }

    /// No new work from now on.
    pub async fn drain(&self) {
        if self.ask(work!(|core| core.drain().await)).await.is_err() {
            tracing::warn!("the queue was gone before it could drain");
        }
    }

    /// The readers' copy of the live jobs.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Totals.
    pub fn observe(&self) -> Observation {
        self.board.observe()
    }

    /// Jobs by the status that the API shows.
    pub fn by_public_status(&self) -> BTreeMap<&'static str, u64> {
        let mut counts = BTreeMap::new();
        for (word, count) in self.observe().by_status {
            let public = shared::job::Status::from_word(word).map_or(word, shared::job::Status::public);
            *counts.entry(public).or_default() += count;
        }
        counts
    }
}
