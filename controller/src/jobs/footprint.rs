//! What a carbon-aware job waits for, and what waiting saved.
//!
//! ```text
//! energy (kWh) = watts / 1000 × PUE × hours that an agent worked on the job
//! grams        = energy × mean intensity of the grid (gCO2eq/kWh) while it worked, sampled at each poll
//! if_at_once   = the same energy × the mean that was forecast, when the job was first planned, for a run begun there and then
//! saved        = if_at_once − grams                 (negative where the forecast was wrong)
//! ```
//! `watts` is what the job adds to the draw of the agent's host and storage, and `PUE` what the building adds to that: both are settings, so
//! the figures compare runs of one installation; they are no meter. Hours while a job waits or is parked count nothing.
//! Owns: the record in `jobs.carbon`, and these formulas. Never: asks a source (the carbon room does), decides when a job starts.
//! A crash here costs at most one poll's sample: the open interval is counted with the intensity that was known when it began.

use serde::{Deserialize, Serialize};

/// What the grid says of the job's zone, and what the settings say of its draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Grid {
    /// The zone.
    pub zone: String,
    /// Where the figures come from.
    pub source: String,
    /// Whether they are an estimate.
    pub estimated: bool,
    /// gCO2eq/kWh now.
    pub intensity: f64,
    /// Draw of a running job: watts × PUE / 1000.
    pub kilowatts: f64,
}

/// When a job shall start, and what that gives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// Milliseconds since 1970.
    pub start: i64,
    /// Mean intensity forecast for the run.
    pub average: f64,
    /// Mean intensity forecast for a run that begins at once.
    pub at_once: f64,
}

/// The record of a carbon-aware job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Footprint {
    /// The zone; empty until it was planned.
    pub zone: String,
    /// Where the figures come from.
    pub source: String,
    /// Whether any of them was an estimate.
    pub estimated: bool,
    /// Draw while it runs.
    pub kilowatts: f64,
    /// Milliseconds since 1970.
    pub planned_start: Option<i64>,
    /// Mean intensity forecast for the planned run.
    pub planned_average: Option<f64>,
    /// Mean intensity that was forecast for a run at once, when it was first planned.
    pub at_once_average: Option<f64>,
    /// The newest intensity known.
    pub intensity: Option<f64>,
    /// The intensity when its first attempt began.
    pub started_intensity: Option<f64>,
    /// Since when the running attempt's time is not counted yet.
    pub running_since: Option<i64>,
    /// Milliseconds that agents worked on it, without the open interval.
    pub ran: i64,
    /// Sum of intensity × milliseconds over `ran`.
    pub weighted: f64,
    /// How often it was parked because the grid turned dirty.
    pub parks: u32,
    /// A person said that it shall not wait any longer.
    pub by_hand: bool,
}

/// The record as the API shows it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[schema(as = JobCarbon)]
pub struct Shown {
    /// Zone of the grid.
    pub zone: String,
    /// Where the figures come from.
    pub source: String,
    /// Whether any of them is an estimate.
    pub estimated: bool,
    /// gCO2eq/kWh when its first attempt began.
    pub started_intensity: Option<f64>,
    /// RFC 3339; when it is or was planned to start.
    pub planned_start: Option<String>,
    /// gCO2eq/kWh forecast for the planned run.
    pub planned_intensity: Option<f64>,
    /// kWh so far.
    pub energy_kwh: f64,
    /// Grams of CO2eq so far.
    pub grams: Option<f64>,
    /// Grams that the same energy would have cost at once.
    pub grams_if_at_once: Option<f64>,
    /// The difference.
    pub grams_saved: Option<f64>,
    /// How often it was parked because the grid turned dirty.
    pub parked: u32,
}

impl Footprint {
    /// Takes what the grid says now.
    pub fn note(&mut self, grid: &Grid, now: i64) {
        let first = self.zone.is_empty();
        self.count(now);
        self.estimated = grid.estimated || (self.estimated && !first);
        self.zone.clone_from(&grid.zone);
        self.source.clone_from(&grid.source);
        self.kilowatts = grid.kilowatts;
        self.intensity = Some(grid.intensity);
        if self.running_since.is_some() || self.ran > 0 {
            self.started_intensity.get_or_insert(grid.intensity);
        }
    }

    /// Takes a plan; what a run at once would have cost is taken from the first.
    pub fn plan(&mut self, plan: &Plan) {
        (self.planned_start, self.planned_average) = (Some(plan.start), Some(plan.average));
        self.at_once_average.get_or_insert(plan.at_once);
    }

    /// An agent begins to work on it.
    pub fn begin(&mut self, now: i64) {
        self.running_since.get_or_insert(now);
        self.started_intensity = self.started_intensity.or(self.intensity);
    }

    /// The agent's work is over.
    pub fn end(&mut self, now: i64) {
        self.count(now);
        self.running_since = None;
    }

    /// Closes the open interval with the intensity known so far.
    fn count(&mut self, now: i64) {
        if let (Some(since), Some(intensity)) = (self.running_since, self.intensity) {
            let span = now.saturating_sub(since).max(0);
            self.ran = self.ran.saturating_add(span);
            self.weighted += intensity * span as f64;
            self.running_since = Some(since.saturating_add(span));
        }
    }

    /// As the API shows it at `now`; `None` until it was planned.
    pub fn shown(&self, now: i64) -> Option<Shown> {
        if self.zone.is_empty() {
            return None;
        }
        let mut counted = self.clone();
        counted.count(now);
        let hours = counted.ran as f64 / 3_600_000.0;
        let energy = counted.kilowatts * hours;
        let grams = (counted.ran > 0).then(|| energy * counted.weighted / counted.ran as f64);
        let at_once = grams.and(counted.at_once_average).map(|average| energy * average);
        let saved = grams.zip(at_once).map(|(grams, at_once)| at_once - grams);
        Some(Shown {
            zone: counted.zone,
            source: counted.source,
            estimated: counted.estimated,
            started_intensity: counted.started_intensity.map(tenth),
            planned_start: counted.planned_start.map(super::view::time),
            planned_intensity: counted.planned_average.map(tenth),
            energy_kwh: fine(energy),
            grams: grams.map(fine),
            grams_if_at_once: at_once.map(fine),
            grams_saved: saved.map(fine),
            parked: counted.parks,
        })
    }
}

fn tenth(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// Short jobs cost milligrams.
fn fine(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn grid(intensity: f64) -> Grid {
        Grid { zone: "DE".into(), source: "electricity-maps".into(), estimated: false, intensity, kilowatts: 0.3 }
    }

    #[test]
    fn grams_follow_the_formula_and_waiting_costs_nothing() {
        const HOUR: i64 = 3_600_000;
        let mut job = Footprint::default();
        assert!(job.shown(0).is_none());
        job.note(&grid(400.0), 0);
        job.plan(&Plan { start: 2 * HOUR, average: 100.0, at_once: 400.0 });
        assert!(job.shown(HOUR).unwrap().grams.is_none(), "nothing ran yet");
        job.note(&grid(100.0), 2 * HOUR);
        job.begin(2 * HOUR);
        job.note(&grid(200.0), 3 * HOUR); // an hour at 100
        job.end(3 * HOUR + HOUR / 2); // half an hour at 200
        job.note(&grid(900.0), 9 * HOUR); // parked
        job.begin(10 * HOUR);
        job.note(&grid(100.0), 10 * HOUR);
        job.end(10 * HOUR + HOUR / 2); // half an hour at 100
        job.plan(&Plan { start: 0, average: 1.0, at_once: 1.0 }); // later plans do not change what at once would have cost
        let shown = job.shown(20 * HOUR).unwrap();
        assert_eq!((shown.energy_kwh, shown.started_intensity), (0.6, Some(100.0)));
        // 0.3 kW × (1 h × 100 + 0.5 h × 200 + 0.5 h × 100)
        assert_eq!((shown.grams, shown.grams_if_at_once, shown.grams_saved), (Some(75.0), Some(240.0), Some(165.0)));
        let stored: Footprint = serde_json::from_str(&serde_json::to_string(&job).unwrap()).unwrap();
        assert_eq!(stored, job);
    }
}
