//! The gRPC server that agents dial.
//!
//! Owns: the listener, who may call what: Enroll needs no certificate, Renewal one of a known key (whose time may have run out),
//! Session, Transfer, Pull and Console a current one. Never: believes a name in a message; who calls is what the certificate says.
//! A crash here costs the connections.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use proto::v1::fleet_server::{Fleet, FleetServer};
use proto::v1::{
    AgentMessage, ConsolePiece, ControllerMessage, EnrollReply, EnrollRequest, Piece, PullRequest, RenewalRequest, TransferReply,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use super::registry::Handle;
use super::session::{OUTGOING, Session};
use super::transfer::{self, Shelf};
use super::{ca, console, enroll, store, tls};
use crate::jobs::queue;
use crate::store::entities::agents;

/// Largest message; an inventory of ten thousand VMs fits.
const MESSAGE: usize = 32 << 20;
const KEEPALIVE: Duration = Duration::from_secs(10);
/// How long sessions may take to end when the gateway stops.
const STOP: Duration = Duration::from_secs(5);

/// Bytes of a transfer that may be under way and not yet taken.
const WINDOW: u32 = 2 << 20;
/// Largest HTTP/2 frame: a piece of a transfer in one.
const FRAME: u32 = 512 << 10;

struct Service {
    registry: Handle,
    queue: queue::Handle,
    shelf: Arc<dyn Shelf>,
}

impl Service {
    /// The agent that calls, by its certificate.
    async fn caller<T>(&self, request: &Request<T>) -> Result<(agents::Model, ca::Bearer), Status> {
        let certificates = request.peer_certs().unwrap_or_default();
        let first = certificates
            .first()
            .ok_or_else(|| Status::unauthenticated("this call needs the agent's client certificate; Enroll gives one"))?;
        let bearer = ca::bearer(first).map_err(|e| Status::unauthenticated(e.to_string()))?;
        let agent = store::by_id(self.registry.store(), &bearer.agent).await.map_err(enroll::away)?;
        let agent = agent.ok_or_else(|| Status::permission_denied("this controller knows no such agent; it needs a join token"))?;
        if agent.key_sha256 != bearer.key_sha256 {
            return Err(enroll::rejoined());
        }
        Ok((agent, bearer))
    }

    /// The agent that calls, where it may do more than renew its certificate.
    async fn member<T>(&self, request: &Request<T>) -> Result<agents::Model, Status> {
        let (agent, bearer) = self.caller(request).await?;
        if !bearer.is_current {
            return Err(Status::unauthenticated("the certificate has run out; Renewal gives a new one"));
        }
        if agent.revoked {
            return Err(Status::permission_denied("this agent was removed from the fleet; it needs a new join token"));
        }
        Ok(agent)
    }
}

#[tonic::async_trait]
impl Fleet for Service {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollReply>, Status> {
        let request = request.into_inner();
        let name = request.name.clone();
        let reply = enroll::enroll(self.registry.store(), self.registry.authority(), request).await?;
        self.registry.note_name(&reply.agent_id, &name);
        // A known agent with a new key: whoever holds the old one is put out.
        self.registry.close(&reply.agent_id, enroll::rejoined());
        Ok(Response::new(reply))
    }

    async fn renewal(&self, request: Request<RenewalRequest>) -> Result<Response<EnrollReply>, Status> {
        let (agent, _) = self.caller(&request).await?;
        if agent.revoked {
            return Err(Status::permission_denied("this agent was removed from the fleet; it needs a new join token"));
        }
        enroll::renew(self.registry.authority(), &agent, &request.into_inner().csr_pem).map(Response::new)
    }

    type SessionStream = ReceiverStream<Result<ControllerMessage, Status>>;

    async fn session(&self, request: Request<Streaming<AgentMessage>>) -> Result<Response<Self::SessionStream>, Status> {
        let (agent, bearer) = self.caller(&request).await?;
        if !bearer.is_current {
            return Err(Status::unauthenticated("the certificate has run out; Renewal gives a new one"));
        }
        let certificate_until = request.peer_certs().and_then(|certificates| ca::last_second(certificates.first()?).ok());
        let certificate_until = certificate_until.and_then(|until| i64::try_from(until).ok());
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let (registry, queue) = (self.registry.clone(), self.queue.clone());
        let session = Session { registry, queue, agent, outgoing, key_sha256: bearer.key_sha256, certificate_until };
        // The answer's head goes out at once: an agent may wait for it before it says Hello.
        tokio::spawn(session.run(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn transfer(&self, request: Request<Streaming<Piece>>) -> Result<Response<TransferReply>, Status> {
        let agent = self.member(&request).await?;
        transfer::take(self.registry.transfers(), &agent.id, request.into_inner()).await.map(Response::new)
    }

    type PullStream = ReceiverStream<Result<Piece, Status>>;

    async fn pull(&self, request: Request<PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        let agent = self.member(&request).await?;
        let wanted = request.into_inner();
        let shelved = self.shelf.open(&agent.id, &wanted.job, wanted.epoch, &wanted.path).await;
        let shelved = shelved.map_err(|error| transfer::status(&error))?;
        Ok(Response::new(ReceiverStream::new(transfer::give(shelved, wanted.offset, &wanted.version))))
    }

    type ConsoleStream = console::ToScreen;

    async fn console(&self, request: Request<Streaming<ConsolePiece>>) -> Result<Response<Self::ConsoleStream>, Status> {
        let agent = self.member(&request).await?;
        console::take(self.registry.consoles(), (&agent.id, &agent.name), request.into_inner()).await.map(Response::new)
    }
}

/// A running gateway.
pub struct Gateway {
    /// Where it listens.
    pub address: SocketAddr,
    registry: Handle,
    stop: watch::Sender<bool>,
    served: tokio::task::JoinHandle<()>,
}

impl Gateway {
    /// Starts serving on a bound listener. `names` are the DNS names and addresses that agents dial; `runtime` is where it runs.
    pub fn start(
        listener: std::net::TcpListener,
        names: &[String],
        registry: Handle,
        queue: queue::Handle,
        shelf: Arc<dyn Shelf>,
        runtime: &tokio::runtime::Handle,
    ) -> Result<Self, Error> {
        let config = tls::server_config(registry.authority(), names)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let _inside = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (accepted, connections) = mpsc::channel(64);
        let (stop, mut stopped) = watch::channel(false);
        let service = FleetServer::new(Service { registry: registry.clone(), queue, shelf }).max_decoding_message_size(MESSAGE);
        let server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .max_concurrent_streams(16)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(2 * WINDOW)
            .max_frame_size(FRAME)
            .add_service(service)
            .serve_with_incoming_shutdown(ReceiverStream::new(connections), async move {
                // A sender that is gone means the same.
                let _ = stopped.wait_for(|stop| *stop).await;
            });
        runtime.spawn(tls::accept(listener, config, accepted));
        let served = runtime.spawn(async move {
            if let Err(error) = server.await {
                tracing::error!(%error, "gateway stopped serving");
            }
        });
        Ok(Self { address, registry, stop, served })
    }

    /// Stops: no new connections, every session is told to come back, and a moment for them to end.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        self.registry.close_all();
        let aborter = self.served.abort_handle();
        if tokio::time::timeout(STOP, self.served).await.is_err() {
            aborter.abort();
        }
    }
}

/// Why the gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its certificate.
    #[error(transparent)]
    Certificate(#[from] ca::Error),
    /// The listener.
    #[error("gateway: {0}")]
    Io(#[from] io::Error),
}
