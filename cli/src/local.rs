//! `convert` and `verify`: the engine in this process, without a server.
//!
//! Owns: what is printed about them. Never: touches a disk itself (the engine does). A crash here costs the conversion; OUT appears whole or not at all.

use std::time::Instant;

use agent::convert::{self, Report, Request, Verdict};
use serde_json::json;
use shared::progress::Progress;

use crate::args::{Convert, Style, Verify};
use crate::failure::{Exit, Failure, Outcome};
use crate::output;
use crate::progress::{Display, Reading};

/// Converts a file.
pub fn convert(args: &Convert, style: Style) -> Outcome {
    let request = Request {
        input: args.input.clone(),
        output: args.output_file.clone(),
        format: args.format,
        compression: args.compression,
        level: args.level,
        narrow_window: args.narrow_window,
        verify: args.verify,
        sha256: args.sha256,
        follow_chain: args.follow_chain,
        snapshot: args.snapshot.clone(),
    };
    let display = std::sync::Mutex::new(Display::new(args.quiet));
    let started = Instant::now();
    let verify = args.verify;
    let show = |progress: &Progress, stage: &str| {
        if let Ok(mut display) = display.lock() {
            display.show(&reading(progress, stage, verify, started));
        }
    };
    let converted = convert::convert(&request, &show);
    if let Ok(display) = display.lock() {
        display.clear();
    }
    let report = converted.map_err(|e| engine_failure(&e))?;
    if style == Style::Json {
        return output::json(&report_json(&report));
    }
    if !args.quiet {
        print_report(&report);
    }
    Ok(())
}

/// Checks an export.
pub fn verify(args: &Verify, style: Style) -> Outcome {
    let verdict = convert::verify(&args.file, args.trust.as_deref()).map_err(|e| engine_failure(&e))?;
    if style == Style::Json {
        output::json(&verdict_json(&verdict))?;
    } else {
        print_verdict(&verdict);
    }
    conclude(&verdict, args.trust.is_some())
}

/// A verdict as an exit code.
pub fn conclude(verdict: &Verdict, must_be_trusted: bool) -> Outcome {
    if !verdict.intact {
        return Err(Failure::new(Exit::VerificationFailed, "damaged: the content is not what the manifest says"));
    }
    if must_be_trusted && !verdict.trusted {
        return Err(Failure::new(
            Exit::VerificationFailed,
            format!("intact, but signed by {}, whom --trust does not name", verdict.signer),
        ));
    }
    Ok(())
}

/// The engine's error as this command's own.
pub fn engine_failure(error: &convert::Error) -> Failure {
    Failure::new(Exit::of(error.code()), output::clean(&error.to_string()))
}

fn print_report(report: &Report) {
    for file in &report.files {
        output::pairs(
            8,
            &[
                ("file", output::clean(&file.path)),
                ("size", format!("{}, {}", output::bytes(file.size), file.format)),
                ("sha256", file.sha256.clone().unwrap_or_default()),
            ],
        );
    }
    for (name, root) in &report.roots {
        output::pairs(8, &[("disk", output::clean(name)), ("digest", root.clone())]);
    }
    output::pairs(
        8,
        &[
            ("manifest", report.manifest.display().to_string()),
            ("time", format!("{:.1} s, {} of data, {}", report.seconds, output::bytes(report.bytes), speed(report.bytes, report.seconds))),
        ],
    );
}

/// `812.4 MB/s`: the unit that disks and networks are sold in.
pub fn speed(bytes: u64, seconds: f64) -> String {
    format!("{:.1} MB/s", bytes as f64 / seconds.max(0.001) / 1e6)
}

fn report_json(report: &Report) -> serde_json::Value {
    let disks: Vec<_> = report.roots.iter().map(|(name, root)| json!({ "name": name, "root": root })).collect();
    json!({
        "files": report.files, "disks": disks, "manifest": report.manifest.display().to_string(),
        "bytes": report.bytes, "seconds": report.seconds,
    })
}

fn print_verdict(verdict: &Verdict) {
    for sentence in &verdict.damage {
        output::line(output::clean(sentence));
    }
    if verdict.intact {
        let (disks, files) = (count(verdict.disks.len(), "disk"), count(verdict.files.len(), "file"));
        output::line(format!("Intact, as it was signed: {disks} ({}) in {files}.", bytes_of(verdict)));
    }
    for (name, root, capacity) in &verdict.disks {
        output::pairs(8, &[("disk", format!("{}, {}", output::clean(name), output::bytes(*capacity))), ("digest", root.clone())]);
    }
    let known = if verdict.trusted { "trusted" } else { "unknown; --trust names the one that you know" };
    output::pairs(8, &[("signer", format!("{} ({known})", verdict.signer))]);
}

fn bytes_of(verdict: &Verdict) -> String {
    output::bytes(verdict.disks.iter().fold(0u64, |sum, (_, _, capacity)| sum.saturating_add(*capacity)))
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn verdict_json(verdict: &Verdict) -> serde_json::Value {
    let disks: Vec<_> =
        verdict.disks.iter().map(|(name, root, capacity)| json!({ "name": name, "root": root, "capacity": capacity })).collect();
    json!({
        "intact": verdict.intact, "signer": verdict.signer, "trusted": verdict.trusted,
        "damage": verdict.damage, "disks": disks, "files": verdict.files,
    })
}

fn reading(progress: &Progress, stage: &str, verify: bool, started: Instant) -> Reading {
    let done = if stage == "verifying" { progress.verified } else { progress.durable };
    let work = progress.durable.saturating_add(progress.verified).saturating_sub(progress.resumed);
    let seconds = started.elapsed().as_secs_f64();
    let rate = if seconds > 0.2 { (work as f64 / seconds) as u64 } else { 0 };
    let all = progress.data.saturating_mul(if verify { 2 } else { 1 });
    let left = all.saturating_sub(progress.durable.saturating_add(progress.verified));
    Reading {
        stage: stage.to_owned(),
        percent: progress.percent(verify),
        done,
        total: progress.data,
        rate,
        eta: left.checked_div(rate).filter(|_| rate > 0),
    }
}
