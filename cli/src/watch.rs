//! Following jobs: one to its end with a bar, all in a table that redraws itself, a log as it grows.
//!
//! Owns: polling and its patience: a controller that restarts does not end the following, since the job goes on without it.
//! Never: stops a job; an interrupt ends the watching only. A crash here costs the display.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::args::{Logs, Style, Watch};
use crate::client::Client;
use crate::failure::{Exit, Failure, Outcome};
use crate::jobs;
use crate::output;
use crate::progress::{Display, Reading};

/// Between two looks at a job.
pub const POLL: Duration = Duration::from_millis(500);
/// Between two looks at all jobs.
const POLL_ALL: Duration = Duration::from_secs(1);
/// A controller may be away this long while it is watched.
const AWAY: Duration = Duration::from_secs(120);
/// Longest line of a log that is put together.
const LINE_LIMIT: usize = 1 << 20;
/// Most bytes of a log that is shown beside the progress.
const LOG_LIMIT: usize = 16 << 20;
/// What a shell answers for a command that an interrupt ended.
const INTERRUPTED: i32 = 130;

/// One job to its end, or all until interrupted.
pub async fn watch(client: &Client, watch: &Watch, style: Style) -> Outcome {
    match &watch.id {
        Some(id) => jobs::conclude(&follow(client, id.as_str(), POLL).await?, style),
        None => all(client, style).await,
    }
}

/// Shows a job's progress until it has ended; answers the ended job.
pub async fn follow(client: &Client, id: &str, poll: Duration) -> Result<Value, Failure> {
    follow_with(client, id, poll, None).await
}

/// The same with the lines of its log.
pub async fn follow_log(client: &Client, id: &str, poll: Duration) -> Result<Value, Failure> {
    follow_with(client, id, poll, Some(0)).await
}

async fn follow_with(client: &Client, id: &str, poll: Duration, log: Option<usize>) -> Result<Value, Failure> {
    let mut display = Display::new(false);
    tokio::select! {
        ended = until_end(client, id, poll, &mut display, log) => {
            display.clear();
            ended
        }
        _ = tokio::signal::ctrl_c() => {
            output::remark(format!("\nThe job goes on.  Watch it: hypersdk watch {id}\n                  Stop it:  hypersdk jobs cancel {id}"));
            std::process::exit(INTERRUPTED)
        }
    }
}

/// The same for a caller that minds interrupts itself.
///
/// `log`: lines of its log are shown as well, but for so many.
pub async fn until_end(client: &Client, id: &str, poll: Duration, display: &mut Display, mut log: Option<usize>) -> Result<Value, Failure> {
    let mut patience = Patience::default();
    let mut waited_for = String::new();
    loop {
        let job = match client.get(&format!("/jobs/{id}"), &[]).await {
            Ok(job) => job,
            Err(failure) => {
                if let Some(news) = patience.bear(failure)? {
                    display.remark(&format!("{news}; the job goes on, trying again"));
                }
                tokio::time::sleep(POLL_ALL).await;
                continue;
            }
        };
        patience = Patience { reached: true, since: None };
        if let Some(shown) = &mut log {
            show_log(client, id, display, shown).await;
        }
        if is_final(&job) {
            return Ok(job);
        }
        let waits = output::text(&job, "waiting_for");
        if waits != waited_for && !waits.is_empty() {
            display.remark(&format!("waiting for {waits}"));
        }
        waited_for = waits;
        display.show(&reading(&job));
        tokio::time::sleep(poll).await;
    }
}

/// Shows the lines of a job's log behind the first `shown`; where there is no answer now, later.
async fn show_log(client: &Client, id: &str, display: &mut Display, shown: &mut usize) {
    let Ok(mut response) = client.stream(&format!("/jobs/{id}/logs"), &[]).await else { return };
    let mut text = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        if text.len() + chunk.len() > LOG_LIMIT {
            return;
        }
        text.extend_from_slice(&chunk);
    }
    for line in String::from_utf8_lossy(&text).lines().filter(|line| !line.is_empty()).skip(*shown) {
        *shown += 1;
        let Ok(entry) = serde_json::from_str::<Value>(line) else { continue };
        let (time, stage, message) = (output::text(&entry, "time"), output::text(&entry, "stage"), output::text(&entry, "message"));
        display.remark(&format!("{}  {stage:<10}  {message}", time.get(11..19).unwrap_or_default()));
    }
}

/// How long a controller that was reached once has been away.
#[derive(Default)]
struct Patience {
    reached: bool,
    since: Option<Instant>,
}

impl Patience {
    /// Takes a failure: gives it back when it must end the command, else says it once.
    fn bear(&mut self, failure: Failure) -> Result<Option<String>, Failure> {
        if failure.exit != Exit::NotReachable || !self.reached {
            return Err(failure);
        }
        match self.since {
            None => {
                self.since = Some(Instant::now());
                Ok(Some(failure.message))
            }
            Some(since) if since.elapsed() < AWAY => Ok(None),
            Some(_) => Err(failure),
        }
    }
}

fn is_final(job: &Value) -> bool {
    matches!(output::text(job, "status").as_str(), "completed" | "failed" | "cancelled")
}

/// A job's numbers as the display takes them. While it is read back, the bytes read back are what moves.
pub fn reading(job: &Value) -> Reading {
    let stage = output::text(job, "stage");
    let counted = if matches!(stage.as_str(), "verifying" | "publishing") { "bytes_verified" } else { "bytes_done" };
    Reading {
        percent: output::number(job, "progress").min(100) as u8,
        done: output::number(job, counted),
        total: output::number(job, "bytes_total"),
        rate: output::number(job, "rate_bps"),
        eta: job.get("eta_seconds").and_then(Value::as_u64),
        stage,
    }
}

async fn all(client: &Client, style: Style) -> Outcome {
    let live = output::is_live() && style == Style::Table;
    let watching = async {
        match live {
            true => redraw(client).await,
            false => events(client, style).await,
        }
    };
    tokio::select! {
        ended = watching => ended,
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

/// Draws the newest jobs over themselves each second.
async fn redraw(client: &Client) -> Outcome {
    let mut patience = Patience::default();
    let mut drawn = 0;
    loop {
        let rows = output::size().map_or(24, |(_, rows)| rows).max(5);
        let limit = (rows - 3) as u32;
        let lines = match client.list("/jobs", &[], limit).await {
            Ok(listing) => {
                patience = Patience { reached: true, since: None };
                let mut lines = jobs::table(&listing.rows).render(output::width());
                lines.push(format!("{} of {} jobs; Ctrl-C ends the watching, not the jobs", listing.rows.len(), listing.total));
                lines
            }
            Err(failure) => {
                let news = failure.message.clone();
                patience.bear(failure)?;
                vec![output::shorten(&format!("{news}; trying again"), output::width())]
            }
        };
        // Up to where the last drawing began, and away with it.
        let up = if drawn > 0 { format!("\x1b[{drawn}A\x1b[J") } else { String::new() };
        output::raw(format!("{up}{}\n", lines.join("\n")).as_bytes());
        drawn = lines.len();
        tokio::time::sleep(POLL_ALL).await;
    }
}

/// Prints a line for each change that a person would care about; with JSON the job itself, one a line.
async fn events(client: &Client, style: Style) -> Outcome {
    let mut patience = Patience::default();
    let mut known: HashMap<String, (String, u64)> = HashMap::new();
    let mut first = true;
    loop {
        match client.list("/jobs", &[], 200).await {
            Ok(listing) => {
                patience = Patience { reached: true, since: None };
                // Oldest first, as they happened; what had ended before the watching began is no news.
                for job in listing.rows.iter().rev() {
                    let id = output::text(job, "id");
                    let state = (output::text(job, "stage"), output::number(job, "progress") / 10);
                    let is_news = known.get(&id) != Some(&state);
                    known.insert(id, state);
                    if is_news && !(first && is_final(job)) {
                        event(job, style)?;
                    }
                }
                first = false;
            }
            Err(failure) => {
                if let Some(news) = patience.bear(failure)? {
                    output::remark(format!("{news}; trying again"));
                }
            }
        }
        tokio::time::sleep(POLL_ALL).await;
    }
}

fn event(job: &Value, style: Style) -> Outcome {
    if style == Style::Json {
        output::line(job.to_string());
        return Ok(());
    }
    let time = shared::clock::now().format("%H:%M:%S");
    let (id, vm) = (output::text(job, "id"), output::text(job, "vm_name"));
    let error = output::text(job, "error");
    let tail = if error.is_empty() { String::new() } else { format!("  {error}") };
    output::line(format!("{time}  {id}  {}  {vm}{tail}", reading(job).sentence().trim_end()));
    Ok(())
}

/// Prints a job's log; with `--follow` until the job has ended.
pub async fn logs(client: &Client, logs: &Logs, style: Style) -> Outcome {
    let printing = async {
        let mut printed = 0;
        let mut patience = Patience::default();
        loop {
            let broken = print_log(client, logs, style, &mut printed, &mut patience).await;
            match broken {
                Ok(()) if !logs.follow => return Ok(()),
                Ok(()) => {}
                Err(failure) => {
                    if let Some(news) = patience.bear(failure)? {
                        output::remark(format!("{news}; trying again"));
                    }
                }
            }
            // A stream may end because the job has, or because the controller went away.
            if let Ok(job) = client.get(&format!("/jobs/{}", logs.id), &[]).await
                && is_final(&job)
                && broken_off(&patience)
            {
                return Ok(());
            }
            tokio::time::sleep(POLL_ALL).await;
        }
    };
    tokio::select! {
        ended = printing => ended,
        _ = tokio::signal::ctrl_c() => std::process::exit(INTERRUPTED),
    }
}

/// True when the last stream was read to its end.
fn broken_off(patience: &Patience) -> bool {
    patience.since.is_none()
}

/// Prints the lines after the first `printed` ones, which an earlier stream has brought.
async fn print_log(client: &Client, logs: &Logs, style: Style, printed: &mut usize, patience: &mut Patience) -> Outcome {
    let query: &[(&str, String)] = if logs.follow { &[("follow", "true".to_owned())] } else { &[] };
    let mut response = client.stream(&format!("/jobs/{}/logs", logs.id), query).await?;
    *patience = Patience { reached: true, since: None };
    let mut line = 0;
    let mut buffer: Vec<u8> = Vec::new();
    let broken = |_| Failure::new(Exit::NotReachable, "the log broke off");
    while let Some(chunk) = response.chunk().await.map_err(broken)? {
        for part in chunk.split_inclusive(|byte| *byte == b'\n') {
            if buffer.len() + part.len() > LINE_LIMIT {
                return Err(Failure::failed("a line of the log is longer than 1 MiB"));
            }
            buffer.extend_from_slice(part);
            if !part.ends_with(b"\n") {
                continue;
            }
            line += 1;
            if line > *printed {
                print_line(&buffer, style);
                *printed = line;
            }
            buffer.clear();
        }
    }
    Ok(())
}

fn print_line(line: &[u8], style: Style) {
    let text = String::from_utf8_lossy(line);
    let text = text.trim_end();
    let entry: Value = match serde_json::from_str(text) {
        Ok(entry) if style == Style::Table => entry,
        // An empty line keeps the connection alive.
        _ if text.is_empty() => return,
        _ => return output::line(text),
    };
    let time = output::text(&entry, "time");
    let time = time.get(..19).unwrap_or(&time).replace('T', " ");
    let (level, stage, message) = (output::text(&entry, "level"), output::text(&entry, "stage"), output::text(&entry, "message"));
    output::line(format!("{time}  {level:<5}  {stage:<10}  {message}"));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_a_controller_that_was_reached_is_waited_for() {
        let away = || Failure::new(Exit::NotReachable, "away");
        assert!(Patience::default().bear(away()).is_err());
        let mut patience = Patience { reached: true, since: None };
        assert_eq!(patience.bear(away()).unwrap().as_deref(), Some("away"));
        assert_eq!(patience.bear(away()).unwrap(), None);
        assert!(patience.bear(Failure::failed("no such job")).is_err());
    }

    #[test]
    fn a_job_is_read_by_its_stage() {
        let job = serde_json::json!({"stage": "verifying", "progress": 74, "bytes_done": 100, "bytes_verified": 50, "bytes_total": 100, "rate_bps": 0, "eta_seconds": null});
        let reading = reading(&job);
        assert_eq!((reading.percent, reading.done, reading.total, reading.eta), (74, 50, 100, None));
    }
}
