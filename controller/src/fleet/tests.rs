//! The gateway over real TLS: who gets in, with what, and what they are told.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::time::Duration;

use proto::v1::agent_message::Kind as FromAgent;
use proto::v1::controller_message::Kind;
use proto::v1::fleet_client::FleetClient;
use proto::v1::{AgentMessage, ControllerMessage, EnrollReply, EnrollRequest, Heartbeat, Hello, RenewalRequest, Root};
use rcgen::{CertificateParams, KeyPair};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Streaming};

use super::enroll::Content;
use super::gateway::Gateway;
use super::registry::Handle;
use crate::jobs::core::Outbox;
use crate::jobs::queue;
use crate::jobs::record::NewJob;
use crate::jobs::tests::{database, runtime};
use crate::live;
use crate::store::Store;
use crate::store::sealing::Sealer;
use crate::system::metrics::Metrics;
use crate::uploads::shelf::Shelf;
use shared::options::{Format, JobType, Options};

mod transfer;

struct Bench {
    store: Store,
    registry: Handle,
    queue: queue::Handle,
    gateway: Gateway,
    /// The root `uploads`.
    uploads: std::path::PathBuf,
}

impl Bench {
    async fn new() -> Self {
        let store = database().await;
        let folder = shared::vault::temporary_dir("hypersdk-fleet").unwrap();
        let sealer = Sealer::open(None, &shared::vault::open_data_dir(&folder).unwrap()).unwrap();
        let (live, metrics) = (live::Handle::start(), Metrics::new().unwrap());
        let registry = Handle::open(store.clone(), &sealer, live.clone(), metrics.clone()).await.unwrap();
        let queue = queue::Handle::start(store.clone(), std::sync::Arc::new(registry.clone()), live, metrics).await.unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let uploads = folder.join("uploads");
        let mut vault = shared::vault::Vault::default();
        vault.add(shared::vault::Root::open("uploads", &uploads, true).unwrap());
        let shelf = std::sync::Arc::new(Shelf { store: store.clone(), vault: std::sync::Arc::new(vault) });
        let gateway = Gateway::start(listener, &names, registry.clone(), queue.clone(), shelf, &runtime()).unwrap();
        Self { store, registry, queue, gateway, uploads }
    }

    async fn token(&self, name: Option<&str>, ttl: Duration) -> Content {
        let token = self.registry.join_token("tester", name.map(str::to_owned), ttl).await.unwrap();
        use base64::Engine;
        let json = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(token.text.expose()).unwrap();
        serde_json::from_slice(&json).unwrap()
    }

    async fn dial(&self, identity: Option<(&str, &KeyPair)>) -> FleetClient<Channel> {
        let mut tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.registry.authority().pem())).domain_name("localhost");
        if let Some((certificate, key)) = identity {
            tls = tls.identity(Identity::from_pem(certificate, key.serialize_pem()));
        }
        let endpoint = Endpoint::from_shared(format!("https://{}", self.gateway.address)).unwrap().tls_config(tls).unwrap();
        FleetClient::new(endpoint.connect().await.unwrap())
    }

    async fn enroll(&self, token: &str, name: &str, key: &KeyPair) -> Result<EnrollReply, tonic::Status> {
        let csr_pem = CertificateParams::default().serialize_request(key).unwrap().pem().unwrap();
        let request = EnrollRequest {
            protocol: proto::PROTOCOL,
            token: token.to_owned(),
            name: name.to_owned(),
            csr_pem,
            signing_key: "ab".repeat(32),
        };
        Ok(self.dial(None).await.enroll(request).await?.into_inner())
    }

    async fn joined(&self, name: &str) -> (EnrollReply, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let token = self.token(None, Duration::from_secs(60)).await;
        (self.enroll(&token.secret, name, &key).await.unwrap(), key)
    }
}

fn hello(held: Vec<proto::v1::Held>) -> AgentMessage {
    let root = Root { name: "exports".into(), path: "/srv/exports".into(), free_bytes: 10, total_bytes: 20, writable: true };
    let connection = proto::v1::Connection { name: "vms".into(), kind: "local".into(), path: "/srv/vms".into(), account: None };
    let hello = Hello {
        protocol: proto::PROTOCOL,
        version: "1".into(),
        instance: "i".into(),
        hostname: "h".into(),
        cpus: 2,
        roots: vec![root],
        connections: vec![connection],
        held,
        formats: vec!["raw".into()],
        draining: false,
        parked: vec![],
    };
    AgentMessage { kind: Some(FromAgent::Hello(hello)) }
}

fn new_job(owner: &str) -> NewJob {
    NewJob {
        kind: JobType::Export,
        provider: "vms".into(),
        provider_kind: "local".into(),
        provider_path: "/srv/vms".into(),
        owner: owner.to_owned(),
        vm_id: "web.raw".into(),
        vm_name: "web".into(),
        source: String::new(),
        capacity: 100,
        format: Format::Raw,
        options: Options::default(),
        created_by: "tester".into(),
        notes: vec![],
    }
}

struct Talk {
    say: mpsc::Sender<AgentMessage>,
    hear: Streaming<ControllerMessage>,
}

impl Talk {
    async fn open(client: &mut FleetClient<Channel>, first: AgentMessage) -> Result<Self, tonic::Status> {
        let (say, words) = mpsc::channel(16);
        say.send(first).await.unwrap();
        let hear = client.session(ReceiverStream::new(words)).await?.into_inner();
        Ok(Self { say, hear })
    }

    async fn hear(&mut self) -> Result<Kind, tonic::Status> {
        let message =
            tokio::time::timeout(Duration::from_secs(10), self.hear.message()).await.expect("the controller says something within 10 s")?;
        message.and_then(|message| message.kind).ok_or_else(|| tonic::Status::ok("the stream ended"))
    }
}

#[actix_web::test]
async fn a_join_token_lets_one_agent_in_once() {
    let bench = Bench::new().await;
    let (first, second) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let token = bench.token(None, Duration::from_secs(60)).await;
    assert_eq!(token.ca_pem, bench.registry.authority().pem());
    assert_eq!(bench.enroll(&token.secret, "No Such Name", &first).await.unwrap_err().code(), Code::InvalidArgument);
    let reply = bench.enroll(&token.secret, "kvm-1", &first).await.unwrap();
    assert!(reply.agent_id.starts_with("agent-") && reply.certificate_pem.contains("CERTIFICATE"));
    let again = bench.enroll(&token.secret, "kvm-2", &second).await.unwrap_err();
    assert_eq!((again.code(), again.message()), (Code::PermissionDenied, "this join token was already used"));
    assert_eq!(bench.enroll("wrong", "kvm-2", &second).await.unwrap_err().code(), Code::PermissionDenied);
    let expired = bench.token(None, Duration::ZERO).await;
    assert!(bench.enroll(&expired.secret, "kvm-2", &second).await.unwrap_err().message().contains("expired"));
    // A name is nobody else's, unless the token was made for it: then the agent has a new key, and the old one is worth nothing.
    let token = bench.token(None, Duration::from_secs(60)).await;
    assert_eq!(bench.enroll(&token.secret, "kvm-1", &second).await.unwrap_err().code(), Code::AlreadyExists);
    assert!(bench.enroll(&token.secret, "kvm-3", &second).await.is_ok(), "a refusal used the token up");
    let token = bench.token(Some("kvm-1"), Duration::from_secs(60)).await;
    assert_eq!(bench.enroll(&token.secret, "kvm-4", &second).await.unwrap_err().code(), Code::PermissionDenied);
    let third = KeyPair::generate().unwrap();
    assert_eq!(bench.enroll(&token.secret, "kvm-1", &third).await.unwrap().agent_id, reply.agent_id);
    let mut old = bench.dial(Some((&reply.certificate_pem, &first))).await;
    assert_eq!(Talk::open(&mut old, hello(vec![])).await.err().unwrap().code(), Code::PermissionDenied);
}

#[actix_web::test]
async fn a_session_needs_the_certificate_of_an_agent_that_was_not_removed() {
    let bench = Bench::new().await;
    let mut nobody = bench.dial(None).await;
    assert_eq!(Talk::open(&mut nobody, hello(vec![])).await.err().unwrap().code(), Code::Unauthenticated);
    // A certificate of another CA does not pass the handshake.
    let foreign = super::ca::Authority::generate().unwrap();
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let certificate = foreign.certify_agent(&csr, "agent-0000000000000000").unwrap();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(bench.registry.authority().pem()))
        .domain_name("localhost")
        .identity(Identity::from_pem(certificate, key.serialize_pem()));
    let endpoint = Endpoint::from_shared(format!("https://{}", bench.gateway.address)).unwrap().tls_config(tls).unwrap();
    let refused = match endpoint.connect().await {
        Ok(channel) => Talk::open(&mut FleetClient::new(channel), hello(vec![])).await.is_err(),
        Err(_) => true,
    };
    assert!(refused);
    let (reply, key) = bench.joined("kvm-1").await;
    let mut client = bench.dial(Some((&reply.certificate_pem, &key))).await;
    let mut talk = Talk::open(&mut client, hello(vec![])).await.unwrap();
    assert!(
        matches!(talk.hear().await.unwrap(), Kind::Welcome(welcome) if welcome.refused.is_empty() && welcome.agent_id == reply.agent_id)
    );
    talk.say.send(AgentMessage { kind: Some(FromAgent::Heartbeat(Heartbeat { sequence: 7, ..Default::default() })) }).await.unwrap();
    assert!(matches!(talk.hear().await.unwrap(), Kind::Renew(renew) if renew.sequence == 7));
    assert!(bench.registry.last_heard(&reply.agent_id).is_some());
    assert_eq!(bench.registry.roots(&reply.agent_id).await.unwrap()[0].name, "exports");
    // The same agent again: the older session ends.
    let mut newer = Talk::open(&mut bench.dial(Some((&reply.certificate_pem, &key))).await, hello(vec![])).await.unwrap();
    assert!(matches!(newer.hear().await.unwrap(), Kind::Welcome(_)));
    assert_eq!(talk.hear().await.unwrap_err().code(), Code::Aborted);
    // Removed: put out, and told why at the next try.
    let row = bench.registry.resolve("kvm-1").await.unwrap();
    super::store::revoke(&bench.store, &row).await.unwrap();
    bench.registry.close(&row.id, tonic::Status::permission_denied("removed"));
    assert_eq!(newer.hear().await.unwrap_err().code(), Code::PermissionDenied);
    let mut talk = Talk::open(&mut client, hello(vec![])).await.unwrap();
    assert!(matches!(talk.hear().await.unwrap(), Kind::Welcome(welcome) if welcome.refused.contains("removed")));
    assert!(talk.hear().await.is_err());
}

#[actix_web::test]
async fn another_protocol_is_refused_with_the_reason_and_a_questions_answer_comes_back() {
    let bench = Bench::new().await;
    let (reply, key) = bench.joined("kvm-1").await;
    let mut client = bench.dial(Some((&reply.certificate_pem, &key))).await;
    let mut old = hello(vec![]);
    if let Some(FromAgent::Hello(hello)) = &mut old.kind {
        hello.protocol = 0;
    }
    let mut talk = Talk::open(&mut client, old).await.unwrap();
    assert!(matches!(talk.hear().await.unwrap(), Kind::Welcome(welcome) if welcome.refused.contains("protocol")));
    let mut talk = Talk::open(&mut client, hello(vec![])).await.unwrap();
    assert!(matches!(talk.hear().await.unwrap(), Kind::Welcome(_)));
    while !bench.registry.is_connected(&reply.agent_id) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let question = proto::v1::browse::Question::Refresh("vms".into());
    let asked = bench.registry.ask(&reply.agent_id, question);
    let answer = async {
        let Kind::Browse(browse) = talk.hear().await.unwrap() else { panic!("no question came") };
        let reply = proto::v1::BrowseReply { id: browse.id, json: r#"{"vms":3}"#.into(), failure: None };
        talk.say.send(AgentMessage { kind: Some(FromAgent::BrowseReply(reply)) }).await.unwrap();
    };
    let (asked, ()) = futures_util::future::join(asked, answer).await;
    assert_eq!(asked.unwrap(), serde_json::json!({"vms": 3}));
    assert!(bench.registry.ask("agent-none", proto::v1::browse::Question::Refresh("x".into())).await.is_err());
}

#[actix_web::test]
async fn a_job_goes_to_the_agent_over_the_wire_and_is_adopted_by_a_new_session() {
    let bench = Bench::new().await;
    let (reply, key) = bench.joined("kvm-1").await;
    let mut client = bench.dial(Some((&reply.certificate_pem, &key))).await;
    let mut talk = Talk::open(&mut client, hello(vec![])).await.unwrap();
    assert!(matches!(talk.hear().await.unwrap(), Kind::Welcome(_)));
    let job = bench.queue.submit(new_job(&reply.agent_id), None).await.unwrap();
    let Kind::Assign(assign) = talk.hear().await.unwrap() else { panic!("no assignment came") };
    assert_eq!((assign.job.as_str(), assign.epoch, assign.vm_id.as_str()), (job.id.as_str(), 1, "web.raw"));
    let held = vec![proto::v1::Held { job: job.id.clone(), epoch: 1 }];
    let mut talk = Talk::open(&mut client, hello(held.clone())).await.unwrap();
    assert!(matches!(talk.hear().await.unwrap(), Kind::Welcome(welcome) if welcome.keep == held));
    let request = proto::v1::CommitRequest { job: job.id.clone(), epoch: 1 };
    talk.say.send(AgentMessage { kind: Some(FromAgent::CommitRequest(request)) }).await.unwrap();
    assert!(matches!(talk.hear().await.unwrap(), Kind::CommitReply(reply) if reply.granted));
    let outcome = Some(proto::v1::finished::Outcome::Completed("{\"verified\":true}".into()));
    let finished = proto::v1::Finished { job: job.id.clone(), epoch: 1, data: 100, durable: 100, verified: 100, outcome };
    talk.say.send(AgentMessage { kind: Some(FromAgent::Finished(finished)) }).await.unwrap();
    assert!(matches!(talk.hear().await.unwrap(), Kind::Acknowledge(ack) if ack.job == job.id));
    let stored = crate::jobs::store::load(&bench.store, &job.id).await.unwrap().unwrap();
    assert_eq!(stored.state.status, shared::job::Status::Completed);
    // The drain tells every agent to come back.
    bench.gateway.stop().await;
    assert_eq!(talk.hear().await.unwrap_err().code(), Code::Unavailable);
}

#[actix_web::test]
async fn a_certificate_that_has_run_out_renews_and_does_nothing_else() {
    let bench = Bench::new().await;
    let (reply, key) = bench.joined("kvm-1").await;
    let csr = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let expired = bench.registry.authority().certify_expired(&csr, &reply.agent_id).unwrap();
    let mut client = bench.dial(Some((&expired, &key))).await;
    assert_eq!(Talk::open(&mut client, hello(vec![])).await.err().unwrap().code(), Code::Unauthenticated);
    let renewed = client.renewal(RenewalRequest { csr_pem: csr }).await.unwrap().into_inner();
    assert_eq!(renewed.agent_id, reply.agent_id);
    let mut client = bench.dial(Some((&renewed.certificate_pem, &key))).await;
    assert!(Talk::open(&mut client, hello(vec![])).await.is_ok());
    let other = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&other).unwrap().pem().unwrap();
    assert_eq!(client.renewal(RenewalRequest { csr_pem: csr }).await.unwrap_err().code(), Code::PermissionDenied);
}

#[actix_web::test]
async fn an_agent_that_is_removed_or_joins_again_before_its_hello_does_not_stay() {
    let bench = Bench::new().await;
    for rejoins in [false, true] {
        let name = if rejoins { "kvm-2" } else { "kvm-1" };
        let (reply, key) = bench.joined(name).await;
        let (say, words) = mpsc::channel(16);
        let mut client = bench.dial(Some((&reply.certificate_pem, &key))).await;
        // The call has passed the door when its answer's head is here.
        let hear = client.session(ReceiverStream::new(words)).await.unwrap().into_inner();
        let row = bench.registry.resolve(name).await.unwrap();
        if rejoins {
            let token = bench.token(Some(name), Duration::from_secs(60)).await;
            bench.enroll(&token.secret, name, &KeyPair::generate().unwrap()).await.unwrap();
        } else {
            super::store::revoke(&bench.store, &row).await.unwrap();
            bench.registry.close(&row.id, tonic::Status::permission_denied("removed"));
        }
        say.send(hello(vec![])).await.unwrap();
        let mut talk = Talk { say, hear };
        let end = loop {
            match talk.hear().await {
                Ok(_) => {}
                Err(status) => break status,
            }
        };
        assert_eq!(end.code(), Code::PermissionDenied, "{end}");
        assert!(!bench.registry.is_connected(&row.id));
    }
}
