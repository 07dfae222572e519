//! Cron expressions as crontab(5) reads them, and when they come next in a time zone.
//!
//! ```text
//! text ─► five sets of numbers (here, fully checked) ─► plain lists ─► saffron ─► next local time ─► the zone ─► UTC
//! ```
//! Owns: the language: `*`, numbers, names, ranges, steps, lists, `@hourly` and its like; weekdays 0–7 with Sunday twice; daylight saving.
//! Never: gives saffron anything but lists of plain numbers: it counts weekdays as Quartz does (1 is Sunday) and overflows on some ranges.
//! A crash here costs one answer; nothing in it can panic on what people send.
//!
//! Where day of month and day of week are both other than `*`, a day counts that matches either, as in every cron. A time that the clocks
//! skip runs at the first time after the gap, once, however many fell into it; a time that comes twice runs the first time.

#[cfg(test)]
mod tests;

use chrono::{DateTime, Datelike, Duration, LocalResult, NaiveDateTime, TimeZone, Utc};
use chrono_tz::Tz;

/// Longest expression in bytes: every minute of an hour and every hour of a day, spelled out, is shorter.
const LONGEST: usize = 512;
/// Candidates that are looked at for one answer. Only what the second pass of a repeated hour leaves out is stepped over.
const CANDIDATES: usize = 2000;
/// Longest gap that a zone ever made, in minutes: Samoa left a day out.
const GAP: i64 = 26 * 60;

/// What is wrong with an expression: which field, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Wrong(String);

/// One of the five fields.
struct Field {
    /// Its place and name, for messages.
    name: &'static str,
    least: u8,
    most: u8,
    /// Names of its values, the first of which is `first`.
    names: &'static [&'static str],
    first: u8,
}

const MONTHS: &[&str] = &["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"];
const DAYS: &[&str] = &["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"];
const FIELDS: [Field; 5] = [
    Field { name: "field 1 (minute)", least: 0, most: 59, names: &[], first: 0 },
    Field { name: "field 2 (hour)", least: 0, most: 23, names: &[], first: 0 },
    Field { name: "field 3 (day of month)", least: 1, most: 31, names: &[], first: 0 },
    Field { name: "field 4 (month)", least: 1, most: 12, names: MONTHS, first: 1 },
    Field { name: "field 5 (day of week)", least: 0, most: 7, names: DAYS, first: 0 },
];
const WEEKDAY: usize = 4;
const NICKNAMES: &[(&str, &str)] = &[
    ("@hourly", "0 * * * *"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@weekly", "0 0 * * 0"),
    ("@monthly", "0 0 1 * *"),
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
];

/// An expression that comes at least once in four hundred years.
#[derive(Clone, Debug)]
pub struct Cron {
    inner: saffron::Cron,
}

impl Cron {
    /// Reads an expression. What is wrong is named with its field.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        if text.len() > LONGEST {
            return Err(Wrong(format!("cron is longer than {LONGEST} bytes")));
        }
        let text = text.trim_matches([' ', '\t']);
        let text = if text.starts_with('@') { nickname(text)? } else { text };
        let parts: Vec<&str> = text.split([' ', '\t']).filter(|part| !part.is_empty()).collect();
        if parts.len() != FIELDS.len() {
            return Err(Wrong(format!(
                "cron has five fields (minute, hour, day of month, month, day of week), not {}; `0 2 * * 1-5` is 02:00 from Monday to \
                 Friday, and {} are known",
                parts.len(),
                NICKNAMES.map_names()
            )));
        }
        let mut lists = Vec::with_capacity(FIELDS.len());
        for (place, (field, part)) in FIELDS.iter().zip(&parts).enumerate() {
            lists.push(match *part {
                "*" => "*".to_owned(),
                part => plain(place, field.set(part)?),
            });
        }
        let lists = lists.join(" ");
        // Every list is numbers in range, so saffron has no reason to refuse it.
        let inner: saffron::Cron = lists.parse().map_err(|_| Wrong(format!("cron `{}` cannot be read", clip(text))))?;
        if !inner.any() {
            let (day, month) = (parts.get(2).unwrap_or(&""), parts.get(3).unwrap_or(&""));
            return Err(Wrong(format!(
                "cron never comes: no month of field 4 (`{}`) has a day of field 3 (`{}`); give a day that the month has",
                clip(month),
                clip(day)
            )));
        }
        Ok(Self { inner })
    }

    /// The first time after `after`, by the clocks of `zone`. `None` beyond the year 9999 only.
    pub fn next_after(&self, zone: Tz, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        if !(1900..=9999).contains(&after.year()) {
            return None;
        }
        // saffron knows no zones: the local time goes through it dressed as UTC.
        let mut local = after.with_timezone(&zone).naive_local().and_utc();
        for _ in 0..CANDIDATES {
            local = self.inner.next_after(local)?;
            let at = instant(zone, local.naive_utc())?;
            if at > after {
                return Some(at);
            }
        }
        None
    }
}

/// When a local time is: of two the first, and where the clocks skip it the first minute after the gap.
fn instant(zone: Tz, local: NaiveDateTime) -> Option<DateTime<Utc>> {
    for minutes in 0..=GAP {
        let local = local.checked_add_signed(Duration::minutes(minutes))?;
        match zone.from_local_datetime(&local) {
            LocalResult::Single(at) => return Some(at.with_timezone(&Utc)),
            LocalResult::Ambiguous(one, other) => return Some(one.min(other).with_timezone(&Utc)),
            LocalResult::None => {}
        }
    }
    None
}

fn nickname(text: &str) -> Result<&'static str, Wrong> {
    let known = NICKNAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
    let unknown = || Wrong(format!("cron `{}` is unknown; known: {}, or five fields", clip(text), NICKNAMES.map_names()));
    known.map(|(_, meaning)| *meaning).ok_or_else(unknown)
}

trait Names {
    fn map_names(&self) -> String;
}

impl Names for [(&str, &str)] {
    fn map_names(&self) -> String {
        self.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    }
}

/// A set as a list of plain numbers; weekdays in saffron's count.
fn plain(place: usize, set: u64) -> String {
    let (set, shift) = if place == WEEKDAY { ((set & 0x7f) | (set >> 7), 1) } else { (set, 0) };
    (0..60u32).filter(|value| set & (1 << value) != 0).map(|value| (value + shift).to_string()).collect::<Vec<_>>().join(",")
}

impl Field {
    /// The values that a field's text names, one bit each.
    fn set(&self, text: &str) -> Result<u64, Wrong> {
        let mut set = 0u64;
        for part in text.split(',') {
            set |= self.part(part)?;
        }
        Ok(set)
    }

    fn part(&self, part: &str) -> Result<u64, Wrong> {
        if part.is_empty() {
            return Err(self.wrong("an empty item of a list", "remove the comma"));
        }
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => (range, Some(self.step(part, step)?)),
            None => (part, None),
        };
        let (first, last) = match range.split_once('-') {
            _ if range == "*" && step.is_some() => (self.least, self.most),
            _ if range == "*" => return Err(self.wrong("`*` inside a list", "use `*` alone, or with a step such as `*/5`")),
            Some((first, last)) => self.range(range, first, last)?,
            None => {
                let value = self.value(range)?;
                if let Some(step) = step {
                    let right = format!("a step follows `*` or a range, write `{range}-{}/{step}`", self.most);
                    return Err(self.wrong(&quote(part), &right));
                }
                (value, value)
            }
        };
        Ok((first..=last).step_by(step.unwrap_or(1)).fold(0, |set, value| set | 1 << value))
    }

    fn range(&self, range: &str, first: &str, last: &str) -> Result<(u8, u8), Wrong> {
        let (from, mut to) = (self.value(first)?, self.value(last)?);
        // A week may end on a Sunday: SAT-SUN is 6-7.
        if self.most == 7 && to == 0 && from > 0 && last.eq_ignore_ascii_case("SUN") {
            to = 7;
        }
        if from > to {
            let right = format!("write `{first}-{},{}-{last}`", self.most, self.least);
            return Err(self.wrong(&format!("{} goes backwards", quote(range)), &right));
        }
        Ok((from, to))
    }

    fn step(&self, part: &str, step: &str) -> Result<usize, Wrong> {
        let digits = (1..=3).contains(&step.len()) && step.bytes().all(|byte| byte.is_ascii_digit());
        match step.parse::<usize>() {
            Ok(step) if digits && step > 0 => Ok(step),
            _ => Err(self.wrong(&format!("{} has no step", quote(part)), "a step is a whole number of 1 or more, as in `*/5`")),
        }
    }

    fn value(&self, text: &str) -> Result<u8, Wrong> {
        if let Some(place) = self.names.iter().position(|name| name.eq_ignore_ascii_case(text)) {
            return u8::try_from(place).map(|place| place + self.first).map_err(|_| self.wrong(&quote(text), &self.right()));
        }
        let digits = (1..=2).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
        match text.parse::<u8>() {
            Ok(value) if digits && (self.least..=self.most).contains(&value) => Ok(value),
            _ => Err(self.wrong(&quote(text), &self.right())),
        }
    }

    /// What its values may be.
    fn right(&self) -> String {
        let names = match (self.names.first(), self.names.last()) {
            (Some(first), Some(last)) => format!(" or {first} to {last}"),
            _ => String::new(),
        };
        let sunday = if self.most == 7 { " (0 and 7 are Sunday)" } else { "" };
        format!("values are {} to {}{names}{sunday}, with `*`, `,`, `-` and `/`", self.least, self.most)
    }

    fn wrong(&self, what: &str, right: &str) -> Wrong {
        Wrong(format!("cron, {}: {what} is wrong; {right}", self.name))
    }
}

fn quote(text: &str) -> String {
    format!("`{}`", clip(text))
}

fn clip(text: &str) -> String {
    text.chars().take(40).collect()
}
