//! A WebSocket client: whatever the server sends, in order, with the moment it came.
//!
//! Owns: one connection, read all the time, because a client that does not read is a slow one to the server. Never: loses a frame. A crash here costs one test.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::SplitSink;
use futures_util::{SinkExt as _, StreamExt as _};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error, Message};

/// An open connection.
pub type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// An open session.
pub struct Live {
    sender: SplitSink<Socket, Message>,
    frames: UnboundedReceiver<Value>,
    /// All frames so far.
    pub seen: Vec<Value>,
}

impl Live {
    /// Opens `path` of `https://HOST:PORT` with these headers; Err holds the HTTP status of a refusal.
    pub async fn open(base: &str, path: &str, headers: &[(&'static str, String)]) -> Result<Self, u16> {
        let (sender, mut receiver) = connect(base, path, headers).await?.split();
        let (deliver, frames) = unbounded_channel();
        tokio::spawn(async move {
            // Reading answers the server's pings, too. It ends with the connection or with its reader.
            while let Some(Ok(message)) = receiver.next().await {
                let Message::Text(text) = message else { continue };
                if deliver.send(serde_json::from_str(&text).unwrap()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { sender, frames, seen: Vec::new() })
    }

    /// Says something.
    pub async fn say(&mut self, command: Value) {
        self.sender.send(Message::text(command.to_string())).await.unwrap();
    }

    /// Reads frames until one fits; answers it. Panics with all that came when none does in time.
    pub async fn until(&mut self, what: &str, limit: Duration, fits: impl Fn(&Value) -> bool) -> Value {
        let found = tokio::time::timeout(limit, async {
            while let Some(frame) = self.frames.recv().await {
                self.seen.push(frame.clone());
                if fits(&frame) {
                    return Some(frame);
                }
            }
            None
        })
        .await;
        match found {
            Ok(Some(frame)) => frame,
            Ok(None) => panic!("the server closed before {what}; seen: {:#?}", self.seen),
            Err(_) => panic!("no {what} within {limit:?}; seen: {:#?}", self.seen),
        }
    }
}

/// A connection that nobody reads; Err holds the HTTP status of a refusal.
pub async fn connect(base: &str, path: &str, headers: &[(&'static str, String)]) -> Result<Socket, u16> {
    let host = base.strip_prefix("https://").expect("the base is https");
    let stream = TcpStream::connect(host).await.unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
    let config = config.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider))).with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let mut request = format!("wss://{host}{path}").into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    match tokio_tungstenite::client_async(request, stream).await {
        Ok((socket, _)) => Ok(socket),
        Err(Error::Http(response)) => Err(response.status().as_u16()),
        Err(e) => panic!("the WebSocket does not open: {e}"),
    }
}

/// Takes any certificate: which one is right is the CLI's test.
#[derive(Debug)]
struct Anybody(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
