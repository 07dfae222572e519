#![allow(clippy::unwrap_used)]

use std::panic::catch_unwind;
use std::str::FromStr as _;
use std::time::{SystemTime, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

fn time(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

/// The next times of an expression in a zone.
fn times(cron: &str, zone: &str, after: &str, count: usize) -> Vec<String> {
    let (cron, zone) = (Cron::parse(cron).unwrap(), zone.parse::<Tz>().unwrap());
    let mut at = time(after);
    let mut next = || {
        at = cron.next_after(zone, at)?;
        Some(at.format("%Y-%m-%dT%H:%MZ").to_string())
    };
    (0..count).filter_map(|_| next()).collect()
}

/// A seeded source; the seed is printed, so that a failure can be run again (`HYPERSDK_TEST_SEED`).
fn random(name: &str) -> StdRng {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = std::env::var("HYPERSDK_TEST_SEED").map_or(now, |text| text.parse().unwrap());
    println!("{name}: HYPERSDK_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

#[test]
fn standard_cron_is_spoken_and_not_quartz() {
    // 2026-01-01 is a Thursday.
    let first = |cron: &str| times(cron, "UTC", "2026-01-01T00:00:00Z", 1).pop().unwrap();
    for sunday in ["0 12 * * 0", "0 12 * * 7", "0 12 * * SUN", "0 12 * * sun", "0 12 * * 7-7"] {
        assert_eq!(first(sunday), "2026-01-04T12:00Z", "{sunday}");
    }
    assert_eq!(first("0 12 * * 1"), "2026-01-05T12:00Z");
    assert_eq!(first("0 12 * * MON-FRI"), "2026-01-01T12:00Z");
    assert_eq!(first("0 12 * * SAT-SUN"), "2026-01-03T12:00Z");
    assert_eq!(first("0 12 * * 5-7"), "2026-01-02T12:00Z");
    assert_eq!(first("0 0 1 jul *"), "2026-07-01T00:00Z");
    assert_eq!(first("  */15\t* * *  * "), "2026-01-01T00:15Z");
    assert_eq!(first("7-59/20 3,5 * 2-3 *"), "2026-02-01T03:07Z");
    assert_eq!(first("0 0 29 2 *"), "2028-02-29T00:00Z");
    // Both days are restricted: either counts. One is `*`: the other alone counts.
    assert_eq!(times("0 0 13 * 5", "UTC", "2026-01-01T00:00:00Z", 3), ["2026-01-02T00:00Z", "2026-01-09T00:00Z", "2026-01-13T00:00Z"]);
    assert_eq!(times("0 0 13 * *", "UTC", "2026-01-01T00:00:00Z", 2), ["2026-01-13T00:00Z", "2026-02-13T00:00Z"]);
    // A day that the month never has, beside a weekday that it has.
    assert_eq!(first("0 0 30 2 MON"), "2026-02-02T00:00Z");
    for (nickname, at) in [
        ("@hourly", "2026-01-01T01:00Z"),
        ("@daily", "2026-01-02T00:00Z"),
        ("@midnight", "2026-01-02T00:00Z"),
        ("@weekly", "2026-01-04T00:00Z"),
        ("@monthly", "2026-02-01T00:00Z"),
        ("@yearly", "2027-01-01T00:00Z"),
        ("@Annually", "2027-01-01T00:00Z"),
    ] {
        assert_eq!(first(nickname), at, "{nickname}");
    }
}

#[test]
fn what_is_wrong_is_named_with_its_field() {
    for (cron, words) in [
        ("60 * * * *", ["field 1 (minute)", "`60`", "0 to 59"]),
        ("* 24 * * *", ["field 2 (hour)", "`24`", "0 to 23"]),
        ("* * 0 * *", ["field 3 (day of month)", "`0`", "1 to 31"]),
        ("* * L * *", ["field 3 (day of month)", "`L`", "1 to 31"]),
        ("* * * 13 *", ["field 4 (month)", "`13`", "JAN to DEC"]),
        ("* * * * 8", ["field 5 (day of week)", "`8`", "0 and 7 are Sunday"]),
        ("* * * * 5#2", ["field 5 (day of week)", "`5#2`", "0 to 7"]),
        ("* * * * ?", ["field 5 (day of week)", "`?`", "0 to 7"]),
        ("5/15 * * * *", ["field 1 (minute)", "`5/15`", "`5-59/15`"]),
        ("*/0 * * * *", ["field 1 (minute)", "`*/0`", "1 or more"]),
        ("1,,2 * * * *", ["field 1 (minute)", "empty", "comma"]),
        ("* 22-2 * * *", ["field 2 (hour)", "`22-2` goes backwards", "`22-23,0-2`"]),
        ("* * * * *,1", ["field 5 (day of week)", "`*` inside a list", "`*/5`"]),
        ("* * * * * *", ["five fields", "not 6", "@hourly"]),
        ("", ["five fields", "not 0", "@hourly"]),
        ("@reboot", ["`@reboot`", "unknown", "@daily"]),
        ("0 0 30 2 *", ["never comes", "`2`", "`30`"]),
        ("0 0 31 4,6,9,11 *", ["never comes", "`4,6,9,11`", "`31`"]),
    ] {
        let message = Cron::parse(cron).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{cron}: {word} in {message}");
        }
    }
    assert!(Cron::parse(&"1,".repeat(1000)).unwrap_err().to_string().contains("longer"));
}

#[test]
fn a_time_that_the_clocks_skip_runs_after_the_gap_and_one_that_comes_twice_runs_once() {
    // Berlin, 2026-03-29: 02:00 is 03:00 (01:00 UTC). 2026-10-25: 03:00 is 02:00 (01:00 UTC).
    let berlin = |cron, after, count| times(cron, "Europe/Berlin", after, count);
    assert_eq!(
        berlin("30 2 * * *", "2026-03-28T00:00:00Z", 3),
        ["2026-03-28T01:30Z", "2026-03-29T01:00Z", "2026-03-30T00:30Z"],
        "02:30 does not exist on the 29th"
    );
    // Four that fall into the gap and the one at its end are one run.
    assert_eq!(berlin("*/15 2,3 29 3 *", "2026-03-29T00:00:00Z", 3), ["2026-03-29T01:00Z", "2026-03-29T01:15Z", "2026-03-29T01:30Z"]);
    assert_eq!(berlin("0 * * * *", "2026-03-28T23:30:00Z", 3), ["2026-03-29T00:00Z", "2026-03-29T01:00Z", "2026-03-29T02:00Z"]);
    assert_eq!(
        berlin("30 2 * * *", "2026-10-24T12:00:00Z", 2),
        ["2026-10-25T00:30Z", "2026-10-26T01:30Z"],
        "02:30 comes twice on the 25th and runs the first time"
    );
    assert_eq!(berlin("*/30 1-3 25 10 *", "2026-10-25T00:20:00Z", 2), ["2026-10-25T00:30Z", "2026-10-25T02:00Z"]);
    // From within the second pass.
    assert_eq!(berlin("*/30 * * * *", "2026-10-25T01:10:00Z", 1), ["2026-10-25T02:00Z"]);
    // New York, Lord Howe (half an hour), and Samoa, which left out a whole day.
    assert_eq!(times("30 2 8 3 *", "America/New_York", "2026-01-01T00:00:00Z", 1), ["2026-03-08T07:00Z"]);
    assert_eq!(times("15 2 4 10 *", "Australia/Lord_Howe", "2026-09-01T00:00:00Z", 1), ["2026-10-03T15:30Z"]);
    assert_eq!(times("0 12 30 12 *", "Pacific/Apia", "2011-12-01T00:00:00Z", 1), ["2011-12-30T10:00Z"]);
}

/// A part of a field, from values between `least` and `most`.
fn part(random: &mut StdRng, least: u8, most: u8) -> String {
    let value = random.random_range(least..=most);
    let end = random.random_range(value..=most);
    let step = random.random_range(1..=most);
    match random.random_range(0..6) {
        0 => format!("*/{step}"),
        1 => format!("{value}-{end}"),
        2 => format!("{value}-{end}/{step}"),
        _ => value.to_string(),
    }
}

fn field(random: &mut StdRng, least: u8, most: u8, names: &[&str]) -> String {
    match random.random_range(0..10) {
        0..4 => "*".to_owned(),
        4 if !names.is_empty() => {
            let first = random.random_range(0..names.len());
            // SUN-SUN is one day for some and a week for others; it is left out.
            let last = random.random_range(first.max(1)..names.len());
            if random.random_bool(0.5) { format!("{}-{}", names[first], names[last]) } else { names[first].to_lowercase() }
        }
        _ => (0..random.random_range(1..4)).map(|_| part(random, least, most)).collect::<Vec<_>>().join(","),
    }
}

#[test]
fn it_agrees_with_another_parser_on_ten_thousand_expressions() {
    let mut random = random("croner");
    let (mut compared, mut refused) = (0, 0);
    while compared < 10_000 {
        let mut text = [
            field(&mut random, 0, 59, &[]),
            field(&mut random, 0, 23, &[]),
            field(&mut random, 1, 31, &[]),
            field(&mut random, 1, 12, MONTHS),
            field(&mut random, 0, 7, DAYS),
        ]
        .join(" ");
        if random.random_bool(0.005) {
            text = format!("0 0 {} {} *", random.random_range(29..32), ["2", "4,6", "9-11/2", "feb"][random.random_range(0..4)]);
        }
        let theirs = croner::Cron::from_str(&text).unwrap_or_else(|e| panic!("croner refuses `{text}`: {e}"));
        // From any second of eighty years, so that leap years and every weekday of every date come up.
        let mut at = DateTime::from_timestamp(random.random_range(0..80 * 365 * 86_400), 0).unwrap();
        let ours = match Cron::parse(&text) {
            Ok(ours) => ours,
            Err(wrong) => {
                assert!(wrong.to_string().contains("never comes"), "`{text}`: {wrong}");
                assert!(theirs.find_next_occurrence(&at, false).is_err(), "`{text}` comes");
                refused += 1;
                continue;
            }
        };
        for _ in 0..4 {
            let (ours, theirs) = (ours.next_after(Tz::UTC, at), theirs.find_next_occurrence(&at, false));
            assert_eq!(ours, theirs.ok(), "`{text}` after {at}");
            at = ours.unwrap();
        }
        compared += 1;
    }
    assert!(refused > 0, "none that never comes was met");
    println!("{compared} expressions agree in 4 times each; {refused} never come, for both");
}

#[test]
fn no_text_makes_it_panic_and_every_zone_has_an_answer() {
    let mut random = random("noise");
    const LETTERS: &[u8] = b"0123456789*/,-?LW# \t@adefijlmnoprstuyMONSUJA\0\xc3";
    let mut accepted = 0;
    for round in 0..200_000 {
        let text: Vec<u8> = (0..random.random_range(0..24)).map(|_| LETTERS[random.random_range(0..LETTERS.len())]).collect();
        let mut text = String::from_utf8_lossy(&text).into_owned();
        // Every other one has the shape of an expression, so that more than the first check is met.
        if round % 2 == 0 {
            let fields = [(0, 61), (0, 25), (0, 32), (0, 13), (0, 8)];
            text = fields.map(|(least, most)| part(&mut random, least, most)).join(" ");
        }
        let zone = chrono_tz::TZ_VARIANTS[random.random_range(0..chrono_tz::TZ_VARIANTS.len())];
        let after = DateTime::from_timestamp(random.random_range(-4_000_000_000..300_000_000_000), 0).unwrap();
        let outcome = catch_unwind(|| Cron::parse(&text).ok().map(|cron| cron.next_after(zone, after)));
        let outcome = outcome.unwrap_or_else(|_| panic!("`{text}` in {zone} after {after} panicked"));
        if let Some(next) = outcome {
            accepted += 1;
            let known = (1900..9900).contains(&after.year());
            assert!(!known || next.is_some_and(|next| next > after), "`{text}` in {zone} after {after}: {next:?}");
        }
    }
    println!("{accepted} of 200000 texts are expressions");
    let cron = Cron::parse("* * * * *").unwrap();
    for edge in [DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC, time("9999-12-31T23:59:59Z"), time("1900-01-01T00:00:00Z")] {
        for zone in [Tz::UTC, Tz::Pacific__Kiritimati, Tz::America__New_York] {
            cron.next_after(zone, edge);
        }
    }
}
