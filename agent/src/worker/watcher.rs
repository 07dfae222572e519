//! What a pipeline tells its assignment, and what it is told.
//!
//! Owns: counters and log lines on their way to the table, stops on their way back, the space check once the data is counted.
//! Never: touches a file. A crash here costs what was not told yet.

use shared::progress::Progress;
use shared::vault::{self, Dir};

use crate::Agent;
use crate::held::{Assignment, Stop};
use crate::pipeline::{self, Snapshot, Stage, Watch};

/// The pipeline's ear and hand: counters to the table, stops from it, and the space check once the data is counted.
pub(super) struct Watcher<'a> {
    pub(super) agent: &'a Agent,
    pub(super) held: &'a Assignment,
    pub(super) folder: &'a Dir,
    pub(super) job: &'a pipeline::Job,
    /// What is shown in place of the pipeline's own counters: those of the whole disks, while only what has changed is copied.
    pub(super) shown: Option<Progress>,
    /// Set once the data is counted: the sentence when there is too little space.
    pub(super) checked: std::sync::OnceLock<Option<String>>,
}

impl Watcher<'_> {
    /// Space that the rest needs for certain. What compresses cannot be known beforehand; a full disk on the way is an error of its own.
    fn lack_of_space(&self, snapshot: &Snapshot) -> Option<String> {
        let compresses = self.job.compression.is_some()
            || matches!(self.job.format, pipeline::Format::Vmdk | pipeline::Format::Ovf | pipeline::Format::Ova);
        let left = snapshot.data_bytes.saturating_sub(snapshot.durable);
        // Where holes are not known, data is a guess from above.
        let is_guess = self.job.disks.iter().any(|source| !source.disk.knows_holes());
        let needed = if compresses || is_guess { 0 } else { left };
        let (free, _) = vault::space(self.folder).ok()?;
        let sentence =
            || format!("no space at the destination: {} MiB are needed and {} MiB are free", needed.div_ceil(1 << 20), free >> 20);
        (needed > free).then(sentence)
    }
}

impl Watch for Watcher<'_> {
    fn progress(&self, snapshot: &Snapshot) {
        if snapshot.data_bytes > 0 && snapshot.stage != Stage::Preparing {
            self.checked.get_or_init(|| self.lack_of_space(snapshot));
        }
        let progress = Progress {
            data: snapshot.data_bytes,
            read: snapshot.read,
            durable: snapshot.durable,
            verified: snapshot.verified,
            resumed: snapshot.resumed,
        };
        match self.shown {
            Some(shown) => self.agent.table.progress(self.held, SYNCING, shown),
            None => self.agent.table.progress(self.held, stage_word(snapshot.stage), progress),
        }
    }

    fn log(&self, level: tracing::Level, stage: Stage, text: &str) {
        let stage = if self.shown.is_some() { SYNCING } else { stage_word(stage) };
        self.agent.table.log(self.held, &level.to_string().to_ascii_lowercase(), stage, text.to_owned());
    }

    fn stop(&self) -> Option<pipeline::Stop> {
        if self.checked.get().is_some_and(Option::is_some) {
            return Some(pipeline::Stop::Cancel);
        }
        self.held.stop().map(|stop| match stop {
            Stop::Park => pipeline::Stop::Park,
            Stop::Discard => pipeline::Stop::Cancel,
        })
    }
}

/// The stage in which what has changed follows.
pub(super) const SYNCING: &str = "syncing";

fn stage_word(stage: Stage) -> &'static str {
    match stage {
        Stage::Preparing => "preparing",
        Stage::Copying => "copying",
        Stage::Verifying => "verifying",
    }
}
