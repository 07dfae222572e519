//! A lossy server in front of a good one: TLS, HTTP/1.1, and whatever a test scripts to go wrong.
//!
//! Owns: which answer goes wrong and how often. Never: goes wrong by chance. A crash here costs one test.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;

/// What happens in place of the answer.
#[derive(Clone, Debug)]
pub enum Fault {
    /// This status, with `Retry-After` where that is given; the good server is not asked.
    Status(u16, Option<u64>),
    /// A SOAP fault of this type; the good server is not asked.
    Soap(&'static str),
    /// 200 in place of 206, with the same bytes.
    Whole,
    /// The headers and so many bytes of the body, then the connection ends.
    Cut(usize),
    /// The connection ends before an answer.
    Reset,
    /// The good server does it, and its answer is lost.
    Lost,
    /// Nothing comes, for so long.
    Hang(Duration),
    /// The answer comes so much later.
    Slow(Duration),
    /// Another range than the one that was asked for.
    OtherRange,
    /// So many bytes of the body, as if they were all of it.
    Short(usize),
    /// The body in pieces, all of it after so long.
    Trickle(Duration),
    /// All leases end at the good server, which is asked then.
    Expire,
    /// The first text of the answer's body is replaced by the second.
    Rewrite(&'static str, &'static str),
}

/// How long a session is known to the server.
#[derive(Clone, Copy, Debug)]
pub enum Sessions {
    /// For so many requests.
    Calls(usize),
    /// For so long.
    Life(Duration),
}

/// Which request is held, and where on its way.
#[derive(Clone, Copy, Debug)]
pub struct Trap {
    /// What the request's first line or body holds.
    pub matches: &'static str,
    /// It must have come behind a request that holds this; empty: behind any.
    pub behind: &'static str,
    /// So many matching requests pass first.
    pub after: usize,
    /// Held before the good server sees it, or else when it has answered and before the answer goes out.
    pub before: bool,
}

/// What becomes of a held request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// It and its answer are lost.
    Lost,
    /// It goes on, whether or not its client still lives.
    GoesOn,
}

/// A trap that was laid.
pub struct Laid {
    hit: oneshot::Receiver<()>,
    /// It was taken up: nothing will fall into it.
    is_gone: bool,
    release: oneshot::Sender<Release>,
}

impl Laid {
    /// Waits until a request is held; false where none came in time.
    pub async fn hit(&mut self, limit: Duration) -> bool {
        if self.is_gone {
            return false;
        }
        let hit = tokio::time::timeout(limit, &mut self.hit).await;
        self.is_gone = hit.is_ok();
        matches!(hit, Ok(Ok(())))
    }

    /// Lets it go.
    pub fn release(self, how: Release) {
        // One that held nothing holds nothing back.
        let _ = self.release.send(how);
    }
}

struct Armed {
    trap: Trap,
    is_behind: bool,
    seen: usize,
    hit: oneshot::Sender<()>,
    release: oneshot::Receiver<Release>,
}

/// One thing that goes wrong.
#[derive(Clone, Debug)]
pub struct Rule {
    /// What the request's first line or body holds.
    pub matches: &'static str,
    /// So many matching requests pass first.
    pub after: usize,
    /// Then so many go wrong.
    pub times: usize,
    /// How.
    pub fault: Fault,
}

#[derive(Default)]
struct Script {
    trap: Option<Armed>,
    sessions: Option<Sessions>,
    /// Requests of each session, and when the first one came.
    used: BTreeMap<String, (usize, Instant)>,
    /// Sessions that the server does not know any more.
    over: BTreeSet<String>,
    rules: Vec<(Rule, usize)>,
    met: usize,
    /// Bytes of the ranges that were asked for.
    asked: u64,
    /// Requests for bytes that are being served, and the most there were.
    serving: usize,
    peak: usize,
}

/// The proxy.
pub struct Faults {
    /// HOST:PORT.
    pub host: String,
    /// SHA-256 of its certificate, hex.
    pub fingerprint: String,
    script: Arc<Mutex<Script>>,
    task: tokio::task::JoinHandle<()>,
}

impl Faults {
    /// Stands in front of HOST:PORT.
    pub async fn before(upstream: &str) -> Self {
        let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = made.cert.der().clone();
        let fingerprint = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(&certificate));
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let tls = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let script = Arc::new(Mutex::new(Script::default()));
        let http = reqwest::Client::builder().tls_danger_accept_invalid_certs(true).http1_only().build().unwrap();
        let (rules, upstream) = (script.clone(), upstream.to_owned());
        let task = tokio::spawn(async move {
            loop {
                let Ok((socket, _)) = listener.accept().await else { continue };
                let (acceptor, rules, http, upstream) = (acceptor.clone(), rules.clone(), http.clone(), upstream.clone());
                tokio::spawn(async move {
                    if let Ok(stream) = acceptor.accept(socket).await {
                        // An end of the connection is an end.
                        let _ = serve(stream, &rules, &http, &upstream).await;
                    }
                });
            }
        });
        Self { host, fingerprint, script, task }
    }

    /// Scripts what goes wrong from here on; what was scripted before is forgotten.
    pub fn script(&self, rules: Vec<Rule>) {
        let mut script = self.script.lock().unwrap();
        let (over, serving) = (std::mem::take(&mut script.over), script.serving);
        *script = Script { rules: rules.into_iter().map(|rule| (rule, 0)).collect(), over, serving, peak: serving, ..Script::default() };
    }

    /// From here on sessions do not last, until the next script.
    pub fn sessions(&self, last: Sessions) {
        self.script.lock().unwrap().sessions = Some(last);
    }

    /// Lays a trap, which holds one request, until the next script.
    pub fn trap(&self, trap: Trap) -> Laid {
        let ((hit, was_hit), (release, released)) = (oneshot::channel(), oneshot::channel());
        self.script.lock().unwrap().trap = Some(Armed { trap, is_behind: trap.behind.is_empty(), seen: 0, hit, release: released });
        Laid { hit: was_hit, is_gone: false, release }
    }

    /// The most requests for bytes that were served at a time since the last script.
    pub fn peak(&self) -> usize {
        self.script.lock().unwrap().peak
    }

    /// Bytes of all ranges that were asked for since the last script.
    pub fn asked(&self) -> u64 {
        self.script.lock().unwrap().asked
    }

    /// How many requests went wrong since the last script.
    pub fn met(&self) -> usize {
        self.script.lock().unwrap().met
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn fault_for(script: &Mutex<Script>, request: &str) -> Option<Fault> {
    let mut script = script.lock().unwrap();
    let mut found = None;
    for (rule, seen) in &mut script.rules {
        if request.contains(rule.matches) {
            *seen += 1;
            if found.is_none() && *seen > rule.after && *seen <= rule.after.saturating_add(rule.times) {
                found = Some(rule.fault.clone());
            }
        }
    }
    script.met += usize::from(found.is_some());
    found
}

/// The trap, where this request has fallen into it.
fn trapped(script: &Mutex<Script>, request: &str) -> Option<Armed> {
    let mut script = script.lock().unwrap();
    let armed = script.trap.as_mut()?;
    if armed.is_behind && request.contains(armed.trap.matches) {
        armed.seen += 1;
    }
    armed.is_behind |= request.contains(armed.trap.behind);
    if armed.seen > armed.trap.after { script.trap.take() } else { None }
}

/// Whether the request comes with a session that is over.
fn is_over(script: &Mutex<Script>, head: &str) -> bool {
    let cookie = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("cookie:").map(|value| value.trim().to_owned()));
    let Some(cookie) = cookie else { return false };
    let mut script = script.lock().unwrap();
    if script.over.contains(&cookie) {
        return true;
    }
    let Some(last) = script.sessions else { return false };
    let (calls, since) = script.used.entry(cookie.clone()).or_insert((0, Instant::now()));
    *calls += 1;
    let ends = match last {
        Sessions::Calls(most) => *calls > most,
        Sessions::Life(longest) => since.elapsed() > longest,
    };
    if ends {
        script.over.insert(cookie);
        script.met += 1;
    }
    ends
}

/// Bytes of the range that a request asks for.
fn range(head: &str) -> u64 {
    let ranges = head.lines().filter_map(|line| line.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
    let ends = ranges.filter_map(|range| range.split_once('-').map(|(first, last)| (first.parse::<u64>(), last.trim().parse::<u64>())));
    ends.map(|(first, last)| last.unwrap() + 1 - first.unwrap()).sum()
}

fn soap_fault(kind: &str) -> String {
    let text = format!(
        "<?xml version=\"1.0\"?><s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\" xmlns:i=\"http://www.w3.org/2001/XMLSchema-instance\">\
         <s:Body><s:Fault><faultstring>scripted</faultstring><detail><{kind}Fault xmlns=\"urn:vim25\" i:type=\"{kind}\"/></detail></s:Fault></s:Body></s:Envelope>"
    );
    format!("HTTP/1.1 500 Fault\r\nContent-Type: text/xml\r\nContent-Length: {}\r\n\r\n{text}", text.len())
}

type Stream = tokio_rustls::server::TlsStream<tokio::net::TcpStream>;

async fn serve(mut stream: Stream, script: &Mutex<Script>, http: &reqwest::Client, upstream: &str) -> std::io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let Some((head, body)) = request(&mut stream, &mut buffer).await? else { return Ok(()) };
        let line = head.lines().next().unwrap_or_default().to_owned();
        let mut parts = line.split(' ');
        let (method, path) = (parts.next().unwrap_or_default().to_owned(), parts.next().unwrap_or_default().to_owned());
        let asked = format!("{line}\n{}", String::from_utf8_lossy(&body));
        script.lock().unwrap().asked += range(&head);
        let mut held = trapped(script, &asked);
        if let Some(armed) = held.take_if(|armed| armed.trap.before) {
            let _ = armed.hit.send(());
            if armed.release.await != Ok(Release::GoesOn) {
                return Ok(());
            }
        }
        if is_over(script, &head) {
            let refused = "HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n".to_owned();
            let refused = if path == "/sdk" { soap_fault("NotAuthenticated") } else { refused };
            stream.write_all(refused.as_bytes()).await?;
            continue;
        }
        let fault = fault_for(script, &asked);
        match &fault {
            Some(Fault::Status(status, wait)) => {
                let wait = wait.map(|seconds| format!("Retry-After: {seconds}\r\n")).unwrap_or_default();
                stream.write_all(format!("HTTP/1.1 {status} No\r\n{wait}Content-Length: 0\r\n\r\n").as_bytes()).await?;
                continue;
            }
            Some(Fault::Soap(kind)) => {
                stream.write_all(soap_fault(kind).as_bytes()).await?;
                continue;
            }
            Some(Fault::Reset) => return Ok(()),
            Some(Fault::Hang(time)) => {
                tokio::time::sleep(*time).await;
                return Ok(());
            }
            _ => {}
        }
        let serving = Serving::begin(script, path.starts_with("/folder/") || path.starts_with("/fakenfc/"));
        if let Some(Fault::Slow(time)) = &fault {
            tokio::time::sleep(*time).await;
        }
        if let Some(Fault::Expire) = &fault {
            http.get(format!("https://{upstream}/expire")).send().await.map_err(std::io::Error::other)?;
        }
        let mut asked = http.request(method.parse().unwrap(), format!("https://{upstream}{path}")).body(body);
        for field in head.lines().skip(1) {
            let Some((name, value)) = field.split_once(':') else { continue };
            if !["host", "content-length", "connection"].contains(&name.to_ascii_lowercase().as_str()) {
                asked = asked.header(name, value.trim());
            }
        }
        let answer = asked.send().await.map_err(std::io::Error::other)?;
        let mut status = answer.status().as_u16();
        let headers = answer.headers().clone();
        let mut bytes = answer.bytes().await.map_err(std::io::Error::other)?;
        if let Some(armed) = held {
            let _ = armed.hit.send(());
            if armed.release.await != Ok(Release::GoesOn) {
                return Ok(());
            }
        }
        match &fault {
            Some(Fault::Short(most)) => bytes.truncate(*most),
            Some(Fault::Rewrite(from, to)) => bytes = String::from_utf8_lossy(&bytes).replace(from, to).into_bytes().into(),
            _ => {}
        }
        if matches!(fault, Some(Fault::Whole)) {
            status = 200;
        }
        if matches!(fault, Some(Fault::Lost)) {
            return Ok(());
        }
        let mut reply = format!("HTTP/1.1 {status} Answer\r\nContent-Length: {}\r\n", bytes.len());
        for (name, value) in &headers {
            if ["content-length", "transfer-encoding", "connection"].contains(&name.as_str()) {
                continue;
            }
            let value = value.to_str().unwrap_or_default();
            let value = match &fault {
                Some(Fault::OtherRange) if name == "content-range" => value.replacen("bytes ", "bytes 1", 1),
                _ => value.to_owned(),
            };
            reply.push_str(&format!("{name}: {value}\r\n"));
        }
        reply.push_str("\r\n");
        stream.write_all(reply.as_bytes()).await?;
        if let Some(Fault::Cut(after)) = fault {
            stream.write_all(&bytes[..after.min(bytes.len())]).await?;
            stream.flush().await?;
            return Ok(());
        }
        if let Some(Fault::Trickle(time)) = &fault {
            let pieces = bytes.chunks(bytes.len().div_ceil(20).max(1));
            for piece in pieces {
                tokio::time::sleep(*time / 20).await;
                stream.write_all(piece).await?;
                stream.flush().await?;
            }
        } else {
            stream.write_all(&bytes).await?;
        }
        stream.flush().await?;
        drop(serving);
    }
}

/// Counts a request while it is served.
struct Serving<'a>(Option<&'a Mutex<Script>>);

impl<'a> Serving<'a> {
    fn begin(script: &'a Mutex<Script>, counts: bool) -> Self {
        if counts {
            let mut script = script.lock().unwrap();
            script.serving += 1;
            script.peak = script.peak.max(script.serving);
        }
        Self(counts.then_some(script))
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        if let Some(script) = self.0 {
            let mut script = script.lock().unwrap();
            script.serving = script.serving.saturating_sub(1);
        }
    }
}

/// One request's head and body; none where the client has gone.
async fn request(stream: &mut Stream, buffer: &mut Vec<u8>) -> std::io::Result<Option<(String, Vec<u8>)>> {
    let mut piece = vec![0u8; 64 << 10];
    let end = loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        match stream.read(&mut piece).await? {
            0 => return Ok(None),
            count => buffer.extend_from_slice(&piece[..count]),
        }
    };
    let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
    let length =
        head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:").map(|v| v.trim().parse().unwrap_or(0)));
    let length: usize = length.unwrap_or(0);
    while buffer.len() < end + length {
        match stream.read(&mut piece).await? {
            0 => return Ok(None),
            count => buffer.extend_from_slice(&piece[..count]),
        }
    }
    let body = buffer[end..end + length].to_vec();
    buffer.drain(..end + length);
    Ok(Some((head, body)))
}
