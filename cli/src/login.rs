//! `hypersdk login` and `logout`: from a password to a session file.
//!
//! Owns: the first contact (whose certificate is it?), where the password comes from. Never: takes a password from the command line, keeps
//! it longer than the one request, sends it before the certificate was accepted. A crash here costs a new login.

use std::io::{BufRead, IsTerminal, Read, Write};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use serde_json::{Value, json};
use shared::secret::Secret;

use crate::args::{Login, Server, Style};
use crate::client::Client;
use crate::failure::{Exit, Failure, Outcome};
use crate::output;
use crate::session::{self, Saved, Session};
use crate::tls::Trust;

/// Longest password line that is read; the server refuses over 72 bytes.
const PASSWORD_LIMIT: u64 = 4096;

/// Logs in and writes the session file.
pub async fn login(server: &Server, login: &Login, style: Style) -> Outcome {
    let saved = session::load()?;
    let address = login.address.as_deref().or(server.url.as_deref()).map(session::normal_url).transpose()?;
    let url = address.or_else(|| saved.as_ref().map(|saved| saved.url.clone()));
    let url = url.ok_or_else(|| Failure::usage("which controller? hypersdk login https://HOST:5080"))?;
    let known = saved.filter(|saved| saved.url == url).and_then(|saved| saved.fingerprint);
    let trust = match (&server.fingerprint, server.insecure, known) {
        (Some(pin), _, _) => Trust::Pinned(pin.clone()),
        (None, true, _) => Trust::Insecure,
        (None, false, Some(pin)) => Trust::Pinned(pin),
        (None, false, None) => first_contact(&url).await?,
    };
    let mut client = Client::new(Session { url: url.clone(), trust: trust.clone(), token: None })?;
    // Reach it before asking a person for anything.
    if !matches!(trust, Trust::System) {
        client.get("/health", &[]).await?;
    }
    let password = password("HYPERSDK_PASSWORD", &login.username)?;
    let answer = authenticate(&mut client, &login.username, &password).await?;
    drop(password);
    let saved = Saved {
        url,
        fingerprint: match &trust {
            Trust::Pinned(pin) => Some(pin.clone()),
            _ => None,
        },
        insecure: trust == Trust::Insecure,
        username: login.username.clone(),
        token: answer.get("token").and_then(Value::as_str).unwrap_or_default().to_owned(),
        expires_at: output::text(&answer, "expires_at"),
    };
    let path = session::save(&saved)?;
    let role = answer.get("user").map(|user| output::text(user, "role")).unwrap_or_default();
    if style == Style::Json {
        return output::json(&json!({
            "url": saved.url, "fingerprint": saved.fingerprint, "username": saved.username, "role": role,
            "expires_at": saved.expires_at, "session": path.display().to_string(),
        }));
    }
    output::line(format!("Logged in to {} as {} ({role}).", saved.url, saved.username));
    output::line(format!("Session in {}, until {}.", path.display(), saved.expires_at));
    Ok(())
}

/// Trades the password for a token, which the client uses from then on; answers the server's answer.
pub async fn authenticate(client: &mut Client, username: &str, password: &Secret) -> Result<Value, Failure> {
    let body = json!({ "username": username, "password": password.expose() });
    let answer = client.post("/auth/login", Some(&body)).await?;
    match answer.get("token").and_then(Value::as_str) {
        Some(token) => client.set_token(Secret::new(token)),
        None => return Err(Failure::failed("the answer to the login holds no token; is this server a HyperSDK controller?")),
    }
    Ok(answer)
}

/// Ends the session on the controller and removes the file.
pub async fn logout(server: &Server) -> Outcome {
    if session::load()?.is_none() {
        output::line("Not logged in.");
        return Ok(());
    }
    let ended = match Client::new(session::current(server)?) {
        Ok(client) => client.post("/auth/logout", None).await.map(|_| ()),
        Err(failure) => Err(failure),
    };
    session::forget()?;
    match ended {
        Ok(()) => output::line("Logged out."),
        // A token that is no longer good needs no ending.
        Err(failure) if failure.exit == Exit::NotAllowed => output::line("Logged out."),
        Err(failure) => {
            output::remark(format!("The session file is gone; the token lives on until it ends by itself: {failure}"));
            return Err(Failure::new(failure.exit, "the controller was not told"));
        }
    }
    Ok(())
}

/// Whom to trust when nothing is known: the system's authorities if they vouch for it, else the person at the terminal.
async fn first_contact(url: &str) -> Result<Trust, Failure> {
    let by_system = Client::new(Session { url: url.to_owned(), trust: Trust::System, token: None });
    if let Ok(client) = by_system
        && client.get("/health", &[]).await.is_ok()
    {
        return Ok(Trust::System);
    }
    let client = Client::new(Session { url: url.to_owned(), trust: Trust::Insecure, token: None })?;
    let answered = client.get("/health", &[]).await;
    let Some(shown) = client.seen() else {
        answered?;
        return Err(Failure::new(Exit::NotReachable, format!("{url} showed no certificate")));
    };
    output::remark(format!("{url} shows a certificate that no authority of this system vouches for:\n  {shown}"));
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage(format!(
            "compare it with the fingerprint that the controller printed at its start, then run:\n  hypersdk login {url} --fingerprint {shown}"
        )));
    }
    eprint!("Is it the fingerprint that the controller printed at its start? [y/N] ");
    let mut answer = String::new();
    std::io::stdin().lock().take(64).read_line(&mut answer).map_err(|e| Failure::failed(format!("standard input: {e}")))?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(Trust::Pinned(shown)),
        _ => Err(Failure::new(Exit::NotAllowed, "not trusted, nothing was sent")),
    }
}

/// From the environment variable, the terminal (without echo) or the first line of standard input.
pub fn password(variable: &str, username: &str) -> Result<Secret, Failure> {
    if let Some(password) = session::secret_variable(variable)? {
        return Ok(password);
    }
    let stdin = std::io::stdin();
    let _silence = match stdin.is_terminal() {
        true => {
            eprint!("Password of {username}: ");
            let _ = std::io::stderr().flush();
            Some(Silence::start().map_err(|e| Failure::failed(format!("the terminal's echo cannot be switched off: {e}")))?)
        }
        false => None,
    };
    let mut text = String::new();
    stdin.lock().take(PASSWORD_LIMIT).read_line(&mut text).map_err(|e| Failure::failed(format!("standard input: {e}")))?;
    let password = Secret::new(text.trim_end_matches(['\r', '\n']));
    match password.is_empty() {
        true => Err(Failure::usage(format!("no password: set {variable}, type it, or give it as the first line of standard input"))),
        false => Ok(password),
    }
}

/// The terminal's echo is off while this lives.
struct Silence(Termios);

impl Silence {
    fn start() -> std::io::Result<Self> {
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        silent.local_modes.insert(LocalModes::ECHONL);
        tcsetattr(&stdin, OptionalActions::Flush, &silent)?;
        Ok(Self(before))
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Fingerprint check without a session, for the demo, which knows the certificate.
pub fn pinned(url: &str, fingerprint: &str) -> Result<Client, Failure> {
    let pin = crate::tls::parse_fingerprint(fingerprint).map_err(Failure::failed)?;
    Client::new(Session { url: url.to_owned(), trust: Trust::Pinned(pin), token: None })
}
