//! The sources as a server of ours plays them, the windows against brute force, and the decisions at their margins.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::decision::{Decision, Task, decide};
use super::service::{Reading, Service, rating};
use super::windows::{Bounds, Forecast, Slot};
use crate::config::carbon::{Carbon, Source};
use crate::jobs::record::now_millis;
use crate::jobs::tests::runtime;

const HOUR: i64 = 3_600_000;

/// What the server says next: status, more headers, body; status 0 says nothing for a long time.
type Script = Arc<Mutex<(u16, &'static str, String)>>;

struct Server {
    url: String,
    script: Script,
    calls: Arc<AtomicUsize>,
    keys: Arc<AtomicUsize>,
    forecast: Arc<Mutex<Option<String>>>,
}

impl Server {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v3", listener.local_addr().unwrap());
        let script: Script = Arc::new(Mutex::new((200, "", String::new())));
        let (calls, keys, forecast) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(None)));
        let server = Self { url, script: script.clone(), calls: calls.clone(), keys: keys.clone(), forecast: forecast.clone() };
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    if stream.read(&mut byte).await.unwrap_or(0) == 0 {
                        break;
                    }
                    head.push(byte[0]);
                }
                let head = String::from_utf8(head).unwrap().to_lowercase();
                calls.fetch_add(1, Ordering::SeqCst);
                keys.fetch_add(usize::from(head.contains("auth-token: sesame")), Ordering::SeqCst);
                let (mut status, more, mut body) = script.lock().unwrap().clone();
                if head.contains("/forecast?") || head.contains("/fw48h") {
                    match forecast.lock().unwrap().clone() {
                        Some(text) => body = text,
                        None => status = 403,
                    }
                }
                tokio::spawn(async move {
                    if status == 0 {
                        tokio::time::sleep(Duration::from_secs(60)).await;
                    }
                    let length = body.len();
                    let answer = format!("HTTP/1.1 {status} X\r\n{more}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}");
                    let _ = stream.write_all(answer.as_bytes()).await;
                });
            }
        });
        server
    }

    fn say(&self, status: u16, more: &'static str, body: impl Into<String>) {
        *self.script.lock().unwrap() = (status, more, body.into());
    }

    fn calls(&self) -> usize {
        self.calls.swap(0, Ordering::SeqCst)
    }

    fn service(&self, source: Source, poll_seconds: u64) -> Service {
        let settings = Carbon {
            source,
            electricity_maps_url: self.url.clone(),
            electricity_maps_key: Some(shared::secret::Secret::new("sesame")),
            uk_url: self.url.clone(),
            poll_seconds,
            ..Carbon::default()
        };
        Service::open(&settings, runtime()).unwrap()
    }
}

fn at(millis: i64) -> String {
    crate::http::rfc3339(millis)
}

/// Electricity Maps' answer as its documentation shows it.
fn latest(intensity: f64, when: i64) -> String {
    format!(
        r#"{{"zone":"DE","carbonIntensity":{intensity},"datetime":"{}","updatedAt":"{}","createdAt":"{}","emissionFactorType":"lifecycle","isEstimated":false,"estimationMethod":null}}"#,
        at(when),
        at(when),
        at(when)
    )
}

fn is_embedded(reading: &Reading) -> bool {
    (reading.source, reading.forecast_source, reading.estimated) == ("embedded-profile", "embedded-profile", true)
}

#[actix_web::test]
async fn electricity_maps_is_believed_cached_and_left_alone_when_it_says_so() {
    let server = Server::start().await;
    let service = server.service(Source::ElectricityMaps, 300);
    let hour = now_millis() / HOUR * HOUR;
    server.say(200, "", latest(302.0, hour));
    let steps: Vec<String> =
        (0..24).map(|n| format!(r#"{{"carbonIntensity":{},"datetime":"{}"}}"#, 300 - n, at(hour + n * HOUR))).collect();
    *server.forecast.lock().unwrap() = Some(format!(r#"{{"zone":"DE","forecast":[{}],"updatedAt":"{}"}}"#, steps.join(","), at(hour)));
    let reading = service.reading("DE").await;
    assert_eq!((reading.source, reading.forecast_source, reading.estimated), ("electricity-maps", "electricity-maps", false));
    assert_eq!((reading.intensity, reading.updated_at), (302.0, hour));
    let ahead = reading.forecast(hour + 1000);
    assert_eq!((ahead.slots().len(), ahead.at(hour + 1000), ahead.at(hour + HOUR)), (24, Some(302.0), Some(299.0)));
    assert_eq!(service.reading("DE").await, reading);
    assert_eq!((server.calls(), server.keys.load(Ordering::SeqCst)), (2, 2), "two calls with the key, and the cache after that");
    // A hundred that ask at once make one pair of calls.
    let asked = (0..100).map(|_| service.reading("FR"));
    futures_util::future::join_all(asked).await;
    assert_eq!(server.calls(), 2);
    // Too many requests: from then on no zone is asked for, however often it is wanted.
    server.say(429, "Retry-After: 3600\r\n", "{}");
    for zone in ["ES", "IT", "ES"] {
        assert!(is_embedded(&service.reading(zone).await), "{zone}");
    }
    assert_eq!(server.calls(), 1);
    // A key for the present only: the profile's shape, at the height of what is measured.
    let other = server.service(Source::ElectricityMaps, 300);
    *server.forecast.lock().unwrap() = None;
    server.say(200, "", latest(1000.0, hour));
    let reading = other.reading("DE").await;
    assert_eq!((reading.source, reading.forecast_source, reading.estimated), ("electricity-maps", "embedded-profile", true));
    assert!((reading.forecast.at(now_millis()).unwrap() - 1000.0).abs() < 1e-6);
}

#[actix_web::test]
async fn what_is_wrong_slow_or_old_is_answered_by_the_profile() {
    let now = now_millis();
    let answers = [
        (200, "no JSON at all".to_owned()),
        (200, "{}".to_owned()),
        (200, latest(-5.0, now)),
        (200, latest(1e9, now)),
        (200, latest(300.0, now - 3 * HOUR)),
        (200, latest(300.0, now).replace("20", "XX")),
        (200, "9".repeat(2 << 20)),
        (500, "{}".to_owned()),
        (401, "{}".to_owned()),
        (302, String::new()),
        (0, String::new()),
    ];
    let tries = answers.into_iter().map(|(status, body)| async move {
        let server = Server::start().await;
        server.say(status, "Location: http://127.0.0.1:1/\r\n", body.clone());
        let reading = server.service(Source::ElectricityMaps, 300).reading("DE").await;
        assert!(is_embedded(&reading) && reading.intensity > 0.0, "{status} {body:.60}: {reading:?}");
        assert!(server.calls() > 0);
    });
    futures_util::future::join_all(tries).await;
    // Nobody listens there.
    let gone = Carbon { source: Source::UkCarbonIntensity, uk_url: "http://127.0.0.1:1".into(), ..Carbon::default() };
    assert!(is_embedded(&Service::open(&gone, runtime()).unwrap().reading("GB").await));
}

#[actix_web::test]
async fn the_uk_tells_half_hours_for_its_own_zone_and_what_it_said_serves_while_it_is_away() {
    let server = Server::start().await;
    let service = server.service(Source::UkCarbonIntensity, 1);
    let half = now_millis() / (HOUR / 2) * (HOUR / 2);
    let uk = |millis: i64| chrono::DateTime::from_timestamp_millis(millis).unwrap().format("%Y-%m-%dT%H:%MZ").to_string();
    let slot = |n: i64, actual: &str| {
        let (from, to) = (uk(half + n * HOUR / 2), uk(half + (n + 1) * HOUR / 2));
        format!(r#"{{"from":"{from}","to":"{to}","intensity":{{"forecast":{},"actual":{actual},"index":"moderate"}}}}"#, 200 + n)
    };
    server.say(200, "", format!(r#"{{"data":[{}]}}"#, slot(0, "263")));
    *server.forecast.lock().unwrap() = Some(format!(r#"{{"data":[{}]}}"#, (0..96).map(|n| slot(n, "null")).collect::<Vec<_>>().join(",")));
    let reading = service.reading("GB").await;
    assert_eq!((reading.source, reading.intensity, reading.estimated), ("uk-carbon-intensity", 263.0, false));
    assert_eq!(reading.forecast(half + 1).end(), Some(half + 48 * HOUR));
    assert_eq!(server.calls(), 2);
    assert!(is_embedded(&service.reading("DE").await) && server.calls() == 0, "it knows its own zone only");
    // Away: what it said serves on, as an estimate, and it is not asked at each call.
    server.say(503, "", "");
    tokio::time::sleep(Duration::from_millis(600)).await;
    for _ in 0..5 {
        let kept = service.reading("GB").await;
        assert_eq!((kept.source, kept.estimated, kept.intensity), ("uk-carbon-intensity", true, 200.0), "the forecast tells of now");
    }
    assert_eq!(server.calls(), 1, "it rests after a failure");
    assert_eq!(service.zone(Some("gb")).unwrap(), "GB");
    assert!(service.zone(Some("XX")).unwrap_err().message().contains("US-CAL-CISO"));
}

/// A small generator, so that a failure can be run again from the seed in its message.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: i64) -> i64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as i64 % below
    }
}

#[test]
fn the_best_windows_are_those_of_brute_force() {
    const MINUTE: i64 = 60_000;
    for seed in 1..=300 {
        let mut dice = Dice(seed);
        let now = dice.roll(100_000) * MINUTE;
        let (mut slots, mut start) = (Vec::new(), now - dice.roll(60) * MINUTE);
        for _ in 0..3 + dice.roll(40) {
            let end = start + (1 + dice.roll(120)) * MINUTE;
            slots.push(Slot { start, end, intensity: dice.roll(6) as f64 * 100.0 });
            start = end;
        }
        let forecast = Forecast::new(slots).from(now, None);
        let length = (1 + dice.roll(300)) * MINUTE;
        let bounds =
            Bounds { from: now + dice.roll(50) * MINUTE, latest: now + dice.roll(3000) * MINUTE, until: now + dice.roll(3000) * MINUTE };
        let found = forecast.best(bounds, length, 4);
        // Everything is on whole minutes here, so the corners are, and brute force over minutes meets the optimum.
        let all: Vec<(i64, f64)> = (bounds.from..=bounds.latest.min(bounds.until - length))
            .step_by(MINUTE as usize)
            .filter_map(|start| Some((start, forecast.average(start, start + length)?)))
            .collect();
        for rank in 0..4 {
            let apart = |start: i64| found[..rank.min(found.len())].iter().all(|w| start + length <= w.start || start >= w.end);
            let best = all.iter().filter(|(start, _)| apart(*start)).map(|(_, average)| *average).min_by(f64::total_cmp);
            match (best, found.get(rank)) {
                (Some(best), Some(window)) => {
                    assert!((window.average - best).abs() < 1e-5, "seed {seed} rank {rank}: {window:?} against {best}");
                    let earliest = all.iter().find(|(start, average)| apart(*start) && (average - best).abs() < 1e-7).unwrap().0;
                    assert_eq!(
                        (window.start, window.end - window.start),
                        (earliest, length),
                        "seed {seed} rank {rank}: of equal ones the earliest"
                    );
                }
                (None, None) => break,
                other => panic!("seed {seed} rank {rank}: {other:?}"),
            }
        }
    }
}

#[test]
fn a_mean_weighs_fractions_of_hours_and_needs_the_whole_span() {
    let slots = [(0, 100.0), (1, 400.0)].map(|(n, intensity)| Slot { start: n * HOUR, end: (n + 1) * HOUR, intensity });
    let forecast = Forecast::new(slots.to_vec());
    assert_eq!(forecast.average(HOUR / 2, HOUR / 2 + HOUR * 3 / 4), Some((0.5 * 100.0 + 0.25 * 400.0) / 0.75));
    assert_eq!((forecast.average(-1, HOUR), forecast.average(HOUR, 2 * HOUR + 1)), (None, None));
    let measured = forecast.from(HOUR / 2, Some(900.0));
    assert_eq!((measured.at(HOUR / 2), measured.at(HOUR), measured.at(0)), (Some(900.0), Some(400.0), None));
    assert_eq!(["very_low", "low", "moderate", "high", "very_high"], [99.9, 100.0, 200.0, 350.0, 500.0].map(rating));
}

#[test]
fn a_job_waits_for_what_is_worth_it_and_never_past_its_latest_start() {
    let forecast = |hours: &[f64]| {
        let slots = hours.iter().zip(0..).map(|(intensity, n)| Slot { start: n * HOUR, end: (n + 1) * HOUR, intensity: *intensity });
        Forecast::new(slots.collect())
    };
    let task =
        Task { not_before: i64::MIN, latest_start: 5 * HOUR, done_by: 8 * HOUR, length: HOUR, copies: false, planned: None, parks: 0 };
    let dirty = forecast(&[500.0, 450.0, 100.0, 300.0, 90.0, 90.0, 10.0, 10.0]);
    let start = |decision: Decision| match decision {
        Decision::Go(plan) => (0, plan.start / HOUR),
        Decision::Wait(plan) => (1, plan.start / HOUR),
        Decision::Stay(_) => (2, 0),
    };
    assert_eq!(start(decide(&task, &dirty, 0)), (1, 4), "hour 6 is cleaner, and behind the latest start");
    assert_eq!(start(decide(&Task { latest_start: 3 * HOUR, ..task }, &dirty, 0)), (1, 2));
    assert_eq!(start(decide(&Task { latest_start: 0, ..task }, &dirty, 0)), (0, 0), "the deadline stands above the grid");
    assert_eq!(start(decide(&Task { latest_start: -HOUR, ..task }, &dirty, 0)), (0, 0));
    assert_eq!(start(decide(&task, &forecast(&[100.0, 97.0, 96.0]), 0)), (0, 0), "4 % are not worth waiting for");
    assert_eq!(start(decide(&Task { not_before: 2 * HOUR, ..task }, &forecast(&[100.0; 8]), 0)), (1, 2));
    assert_eq!(start(decide(&Task { not_before: 5 * HOUR, latest_start: HOUR, ..task }, &dirty, 0)), (1, 5));
    assert_eq!(start(decide(&Task { length: 20 * HOUR, ..task }, &dirty, 0)), (0, 0), "nothing to compare with");
    assert_eq!(start(decide(&task, &Forecast::default(), 0)), (0, 0));
    let running = Task { copies: true, planned: Some(390.0), ..task };
    assert_eq!(start(decide(&running, &dirty, 0)), (1, 4), "500 is more than 1.25 × 390");
    assert_eq!(start(decide(&Task { planned: Some(401.0), ..running }, &dirty, 0)), (2, 0));
    assert_eq!(start(decide(&Task { parks: 10, ..running }, &dirty, 0)), (2, 0));
    assert_eq!(start(decide(&Task { latest_start: 0, ..running }, &dirty, 0)), (2, 0));
    assert_eq!(start(decide(&running, &forecast(&[500.0; 8]), 0)), (2, 0), "to wait would not help");
}
