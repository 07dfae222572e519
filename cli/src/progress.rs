//! How far a job is: a bar for people, plain lines where standard error is a file or a pipe.
//!
//! Owns: the display. Never: counts anything itself: percent, bytes, rate and remaining time are the job's own numbers.
//! A crash here costs the display, not the job.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output;

/// Without a terminal a line is printed after so long at the latest, if anything moved.
const LINE_EACH: Duration = Duration::from_secs(5);
/// Or after so many percent.
const LINE_PERCENT: u8 = 10;

/// One reading of a job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// `copying`, `verifying`, …
    pub stage: String,
    /// 0–100.
    pub percent: u8,
    /// Bytes done in this stage.
    pub done: u64,
    /// Of so many.
    pub total: u64,
    /// Bytes a second.
    pub rate: u64,
    /// Seconds that remain, where it can be said.
    pub eta: Option<u64>,
}

impl Reading {
    fn numbers(&self) -> String {
        let mut text = format!("{} / {}", output::bytes(self.done), output::bytes(self.total));
        if self.rate > 0 {
            text.push_str(&format!("  {}/s", output::bytes(self.rate)));
        }
        if let Some(eta) = self.eta {
            text.push_str(&format!("  {} left", shared::clock::duration_words(eta)));
        }
        text
    }

    /// The same as a line of its own.
    pub fn sentence(&self) -> String {
        let stage = &self.stage;
        match self.total {
            0 => format!("{stage:<10}"),
            _ => format!("{stage:<10} {:>3} %  {}", self.percent, self.numbers()),
        }
    }
}

/// A bar, or lines.
pub struct Display {
    bar: Option<ProgressBar>,
    last: Option<(Reading, Instant)>,
    quiet: bool,
}

impl Display {
    /// A display on standard error; `quiet` shows nothing.
    pub fn new(quiet: bool) -> Self {
        let live = !quiet && std::io::stderr().is_terminal();
        Self { bar: live.then(bar), last: None, quiet }
    }

    /// Shows a reading.
    pub fn show(&mut self, reading: &Reading) {
        if self.quiet {
            return;
        }
        if let Some(bar) = &self.bar {
            bar.set_position(u64::from(reading.percent));
            bar.set_prefix(reading.stage.clone());
            bar.set_message(if reading.total == 0 { String::new() } else { reading.numbers() });
            return;
        }
        let due = match &self.last {
            None => true,
            Some((last, at)) => {
                last.stage != reading.stage
                    || reading.percent / LINE_PERCENT != last.percent / LINE_PERCENT
                    || (last != reading && at.elapsed() >= LINE_EACH)
            }
        };
        if due {
            output::remark(reading.sentence().trim_end());
            self.last = Some((reading.clone(), Instant::now()));
        }
    }

    /// Says something without tearing the bar.
    pub fn remark(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::remark(text)),
            None => output::remark(text),
        }
    }

    /// Takes the bar away.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr_with_hz(10));
    // 10 + 1 + 16 + 1 + 5 + 2 leave 45 of 80 columns for `1000.0 MiB / 1000.0 MiB  100.0 MiB/s  12m left`.
    let style = ProgressStyle::with_template("{prefix:10} {bar:16.cyan/blue} {pos:>3} %  {wide_msg}");
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("━━─"));
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}
