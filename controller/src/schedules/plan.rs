//! What is due: pure, with the clock as an argument.
//!
//! ```text
//!  next_run ───────────── missed ─────────────┤ on time (60 s) ├─ now ─► next
//!             one row for all: run or skipped      a row each
//! ```
//! Owns: which due times get a row at `now`, and what becomes of those that nobody was there for. Never: reads a clock or a row.
//! A crash here costs nothing: the same question is asked again in a second.

use chrono::{DateTime, Duration, Utc};
use chrono_tz::Tz;

use super::cron::{Cron, Wrong};

/// How late a due time may be found and still count as met.
pub const LATE: Duration = Duration::seconds(60);
/// How far missed times are counted.
const COUNTED: u64 = 1000;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$of:meta])* $variant:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$of])* $variant),* }

        impl $name {
            /// Every word.
            pub const ALL: &[&str] = &[$($word),*];
            /// The word in the API and in the store.
            pub fn word(self) -> &'static str { match self { $(Self::$variant => $word),* } }
            /// What a word means.
            pub fn from_word(word: &str) -> Option<Self> { match word { $($word => Some(Self::$variant),)* _ => None } }
        }
    };
}

words! {
    /// What becomes of a run while the job of the last one is not finished.
    Overlap {
        /// It is left out.
        Skip = "skip",
        /// It waits.
        Queue = "queue",
        /// Both run.
        Allow = "allow",
    }
}

words! {
    /// What becomes of the due times at which no controller was there.
    CatchUp {
        /// They are left out.
        Skip = "skip",
        /// One run for all of them.
        Once = "once",
    }
}

/// When a schedule comes.
#[derive(Clone, Debug)]
pub struct Timetable {
    cron: Cron,
    zone: Tz,
}

/// Why a timetable cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Unreadable {
    /// The expression.
    #[error(transparent)]
    Cron(#[from] Wrong),
    /// The zone.
    #[error("timezone `{0}` is no name of the IANA database; `UTC`, `Europe/Berlin` and `America/New_York` are such names")]
    Zone(String),
}

impl Timetable {
    /// Of an expression and the IANA name of a zone.
    pub fn of(cron: &str, zone: &str) -> Result<Self, Unreadable> {
        let zone = zone.parse().map_err(|_| Unreadable::Zone(zone.chars().take(60).collect()))?;
        Ok(Self { cron: Cron::parse(cron)?, zone })
    }

    /// The first due time after `after`.
    pub fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.cron.next_after(self.zone, after)
    }

    /// The next due times.
    pub fn next(&self, after: DateTime<Utc>, count: usize) -> Vec<DateTime<Utc>> {
        std::iter::successors(self.next_after(after), |at| self.next_after(*at)).take(count).collect()
    }

    /// The last due time before `end`, where `first` is one. By halving: years of minutes must not be walked.
    fn last_before(&self, first: DateTime<Utc>, end: DateTime<Utc>) -> DateTime<Utc> {
        let (mut low, mut high) = (first, end);
        while high - low > Duration::seconds(30) {
            let middle = low + (high - low) / 2;
            if self.next_after(middle).is_some_and(|next| next < end) {
                low = middle;
            } else {
                high = middle;
            }
        }
        match self.next_after(low) {
            Some(next) if next < end => next,
            _ => first,
        }
    }
}

/// Why a due time gets a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It is now.
    OnTime,
    /// It stands for this many that were missed, and runs.
    CatchUp(u64),
    /// It stands for this many that were missed, and does not run.
    Missed(u64),
}

/// A due time that gets a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    /// When.
    pub at: DateTime<Utc>,
    /// Why.
    pub kind: Kind,
}

/// What is due now, and when to look again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In order of time.
    pub due: Vec<Due>,
    /// The first time after now.
    pub next: Option<DateTime<Utc>>,
}

/// What is due at `now`, where `next_run` is the first due time without a row.
///
/// Where a run is on time, those that were missed before it need none of their own.
pub fn due(timetable: &Timetable, next_run: DateTime<Utc>, catch_up: CatchUp, now: DateTime<Utc>) -> Plan {
    if next_run > now {
        return Plan { due: Vec::new(), next: Some(next_run) };
    }
    let begin = now - LATE;
    let from = if next_run >= begin { Some(next_run) } else { timetable.next_after(begin - Duration::milliseconds(1)) };
    let on_time: Vec<_> = std::iter::successors(from, |at| timetable.next_after(*at)).take_while(|at| *at <= now).collect();
    let mut due = Vec::new();
    if next_run < begin {
        let at = timetable.last_before(next_run, begin);
        let all = std::iter::successors(Some(next_run), |at| timetable.next_after(*at)).take_while(|one| *one <= at);
        let count = u64::try_from(all.take(usize::try_from(COUNTED).unwrap_or(usize::MAX)).count()).unwrap_or(COUNTED);
        let runs = catch_up == CatchUp::Once && on_time.is_empty();
        due.push(Due { at, kind: if runs { Kind::CatchUp(count) } else { Kind::Missed(count) } });
    }
    due.extend(on_time.into_iter().map(|at| Due { at, kind: Kind::OnTime }));
    Plan { due, next: timetable.next_after(now) }
}

/// The due time to wait for after the clock went back or the controller came up: `None` where what is stored holds.
pub fn rewind(timetable: &Timetable, next_run: DateTime<Utc>, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
    timetable.next_after(now).filter(|next| *next < next_run)
}

/// How many were missed, in words.
pub fn missed_words(count: u64) -> String {
    match count {
        1 => "1 due time was".to_owned(),
        COUNTED.. => format!("{COUNTED} or more due times were"),
        _ => format!("{count} due times were"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn time(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    fn plan(cron: &str, next_run: &str, catch_up: CatchUp, now: &str) -> (Vec<(String, Kind)>, String) {
        let timetable = Timetable::of(cron, "UTC").unwrap();
        let plan = due(&timetable, time(next_run), catch_up, time(now));
        let show = |at: DateTime<Utc>| at.format("%m-%dT%H:%M").to_string();
        (plan.due.iter().map(|due| (show(due.at), due.kind)).collect(), show(plan.next.unwrap()))
    }

    #[test]
    fn what_is_on_time_runs_and_what_was_missed_is_one_row() {
        let daily = |next: &str, catch_up, now: &str| plan("0 2 * * *", next, catch_up, now);
        let at = |text: &str, kind| vec![(text.to_owned(), kind)];
        assert_eq!(daily("2026-01-05T02:00:00Z", CatchUp::Skip, "2026-01-05T01:59:59.999Z"), (vec![], "01-05T02:00".into()));
        for now in ["2026-01-05T02:00:00Z", "2026-01-05T02:01:00Z"] {
            assert_eq!(daily("2026-01-05T02:00:00Z", CatchUp::Skip, now), (at("01-05T02:00", Kind::OnTime), "01-06T02:00".into()));
        }
        // Down from the 5th to the morning of the 9th: five were missed, the last of them stands for all.
        let down = "2026-01-09T08:00:00Z";
        assert_eq!(daily("2026-01-05T02:00:00Z", CatchUp::Skip, down), (at("01-09T02:00", Kind::Missed(5)), "01-10T02:00".into()));
        assert_eq!(daily("2026-01-05T02:00:00Z", CatchUp::Once, down), (at("01-09T02:00", Kind::CatchUp(5)), "01-10T02:00".into()));
        // Where one is on time, the missed ones need no run of their own.
        let (due, next) = plan("* * * * *", "2026-01-05T02:00:00Z", CatchUp::Once, "2026-01-05T02:05:30Z");
        assert_eq!(due, [("01-05T02:04".into(), Kind::Missed(5)), ("01-05T02:05".into(), Kind::OnTime)]);
        assert_eq!(next, "01-05T02:06");
        // Ten years of minutes are not walked.
        let (due, _) = plan("* * * * *", "2016-01-05T02:00:00Z", CatchUp::Skip, "2026-01-05T02:05:30Z");
        assert_eq!(due[0], ("01-05T02:04".into(), Kind::Missed(1000)));
        // Every due time is found by halving where it is found by walking.
        let timetable = Timetable::of("*/7 3-5 * * 1,4", "Europe/Berlin").unwrap();
        let first = timetable.next_after(time("2026-03-25T00:00:00Z")).unwrap();
        for end in timetable.next(first, 200) {
            let walked = std::iter::successors(Some(first), |at| timetable.next_after(*at)).take_while(|at| *at < end).last();
            assert_eq!(Some(timetable.last_before(first, end)), walked, "before {end}");
        }
    }

    #[test]
    fn a_clock_that_went_back_is_followed() {
        let timetable = Timetable::of("0 2 * * *", "UTC").unwrap();
        let stored = time("2027-01-05T02:00:00Z");
        assert_eq!(rewind(&timetable, stored, time("2026-01-05T08:00:00Z")), Some(time("2026-01-06T02:00:00Z")));
        assert_eq!(rewind(&timetable, stored, time("2027-01-04T08:00:00Z")), None);
        assert_eq!(rewind(&timetable, stored, time("2027-02-04T08:00:00Z")), None);
    }
}
