//! A forecast as a step function of time, and the windows in which a run of some length meets the least carbon.
//!
//! The mean over a window of fixed length is piecewise linear in its start, with corners where the window's start or end meets a step.
//! So the best start is one of those corners (or a bound), and looking at them alone finds the true optimum, fractions of hours included.
//! Owns: [`Forecast`]. Pure. Never: looks at the clock. A crash here costs one answer.

/// One step: from `start` up to `end`, milliseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slot {
    /// Inclusive.
    pub start: i64,
    /// Exclusive.
    pub end: i64,
    /// gCO2eq/kWh.
    pub intensity: f64,
}

/// Steps without gaps, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Forecast(Vec<Slot>);

/// A candidate for a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// Milliseconds since 1970.
    pub start: i64,
    /// Milliseconds since 1970.
    pub end: i64,
    /// Mean intensity over it.
    pub average: f64,
}

/// Where a window may lie.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Earliest start.
    pub from: i64,
    /// Latest start.
    pub latest: i64,
    /// Latest end.
    pub until: i64,
}

impl Forecast {
    /// Of steps in any order; what comes after a gap, or overlaps what came before, is left out.
    pub fn new(mut slots: Vec<Slot>) -> Self {
        slots.sort_by_key(|slot| slot.start);
        let mut kept: Vec<Slot> = Vec::with_capacity(slots.len());
        for slot in slots.into_iter().filter(|slot| slot.start < slot.end) {
            match kept.last() {
                Some(last) if slot.start > last.end => break,
                Some(last) if slot.start < last.end => {}
                _ => kept.push(slot),
            }
        }
        Self(kept)
    }

    /// The steps.
    pub fn slots(&self) -> &[Slot] {
        &self.0
    }

    /// Where it ends; `None` where it is empty.
    pub fn end(&self) -> Option<i64> {
        self.0.last().map(|slot| slot.end)
    }

    /// The intensity at a time; `None` outside.
    pub fn at(&self, time: i64) -> Option<f64> {
        self.0.iter().find(|slot| slot.start <= time && time < slot.end).map(|slot| slot.intensity)
    }

    /// The same from `now` on, with what was measured now in place of the step that was forecast for it.
    pub fn from(&self, now: i64, measured: Option<f64>) -> Self {
        let ahead = self.0.iter().filter(|slot| slot.end > now).map(|slot| Slot { start: slot.start.max(now), ..*slot });
        let mut slots: Vec<Slot> = ahead.collect();
        if let (Some(first), Some(intensity)) = (slots.first().copied(), measured) {
            if first.start == now {
                slots[0].intensity = intensity;
            } else {
                slots.insert(0, Slot { start: now, end: first.start, intensity });
            }
        }
        Self(slots)
    }

    /// The same with every intensity times a factor.
    pub fn scaled(&self, factor: f64) -> Self {
        Self(self.0.iter().map(|slot| Slot { intensity: slot.intensity * factor, ..*slot }).collect())
    }

    /// Mean over a span, each step by its share; `None` where the forecast does not cover it.
    pub fn average(&self, start: i64, end: i64) -> Option<f64> {
        if start >= end || self.0.first()?.start > start || self.end()? < end {
            return None;
        }
        let share = |slot: &Slot| (slot.end.min(end).saturating_sub(slot.start.max(start))).max(0) as f64;
        let sum: f64 = self.0.iter().map(|slot| share(slot) * slot.intensity).sum();
        Some(sum / (end - start) as f64)
    }

    /// The best windows of `length` milliseconds, best first, none overlapping a better one; of equal ones the earliest.
    pub fn best(&self, bounds: Bounds, length: i64, most: usize) -> Vec<Window> {
        let mut found: Vec<Window> = Vec::new();
        let edges: Vec<i64> = self.0.iter().flat_map(|slot| [slot.start, slot.end]).collect();
        let until = bounds.until.min(self.end().unwrap_or(i64::MIN));
        while found.len() < most {
            let around = found.iter().flat_map(|window| [window.start, window.end]);
            let corners = edges.iter().copied().chain(around).flat_map(|edge| [edge, edge.saturating_sub(length)]);
            let starts = corners.chain([bounds.from, bounds.latest, until.saturating_sub(length)]);
            let next = starts
                .filter(|start| *start >= bounds.from && *start <= bounds.latest)
                .filter_map(|start| Some(Window { start, end: start.checked_add(length)?, average: 0.0 }))
                .filter(|window| window.end <= until && found.iter().all(|better| window.end <= better.start || window.start >= better.end))
                .filter_map(|window| Some(Window { average: self.average(window.start, window.end)?, ..window }))
                // Sums of the same steps differ in the last bits: what differs by less than a millionth is equal.
                .min_by_key(|window| ((window.average * 1e6).round() as i64, window.start));
            match next {
                Some(window) => found.push(window),
                None => break,
            }
        }
        found
    }
}
