//! What is known of a zone: from the source while it answers, from the cache for an hour after, else from the embedded profile.
//!
//! ```text
//! fresh in the cache ─► it
//! else, unless the source rests (Retry-After, back-off) ─► ask ─ ok ─► cache
//!                                                            └ not ─► rest longer each time ─► cache of the last hour ─► embedded profile
//! ```
//! Owns: the cache, the back-off, the fall-back, the words of [`rating`]. Never: fails: the profile always answers.
//! A crash here costs the cache.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::profile;
use super::sources::{Client, Failure, Told};
use super::windows::Forecast;
use crate::config::carbon::{Carbon, Source};
use crate::http::reply::Error;
use crate::jobs::record::now_millis;

/// How long an answer is not asked for again, at most; less where jobs are looked at more often.
const FRESH: Duration = Duration::from_secs(300);
/// How long an answer serves while the source is away.
const KEPT: Duration = Duration::from_secs(3600);
/// The longest rest of a source that fails.
const LONGEST_REST: Duration = Duration::from_secs(900);
/// The longest rest that a source can ask for.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(24 * 3600);
/// How far the embedded profile is drawn, in hours.
pub const AHEAD: i64 = 72;

/// What is known of a zone.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// The zone.
    pub zone: String,
    /// Where the intensity of now comes from.
    pub source: &'static str,
    /// Where the forecast comes from: the source, or the profile (scaled to what the source says now) where that tells the present only.
    pub forecast_source: &'static str,
    /// Whether any of it is an estimate.
    pub estimated: bool,
    /// gCO2eq/kWh now.
    pub intensity: f64,
    /// Milliseconds since 1970.
    pub updated_at: i64,
    pub(super) forecast: Forecast,
}

impl Reading {
    /// What is ahead of `now`, beginning with what is known of now.
    pub fn forecast(&self, now: i64) -> Forecast {
        self.forecast.from(now, Some(self.intensity))
    }

    fn embedded(zone: &str, now: i64) -> Self {
        let forecast = profile::forecast(zone, now, AHEAD);
        let embedded = Source::EmbeddedProfile.word();
        Self {
            zone: zone.to_owned(),
            source: embedded,
            forecast_source: embedded,
            estimated: true,
            intensity: forecast.at(now).unwrap_or_default(),
            updated_at: forecast.slots().first().map_or(now, |slot| slot.start),
            forecast,
        }
    }

    fn told(zone: &str, source: &'static str, told: Told, now: i64) -> Self {
        let (forecast, forecast_source, estimated) = match told.forecast {
            Some(forecast) => (forecast, source, told.estimated),
            None => {
                let profile = profile::forecast(zone, now, AHEAD);
                let usual = profile.at(now).filter(|usual| *usual > 0.0);
                (profile.scaled(usual.map_or(1.0, |usual| told.intensity / usual)), Source::EmbeddedProfile.word(), true)
            }
        };
        Self { zone: zone.to_owned(), source, forecast_source, estimated, intensity: told.intensity, updated_at: told.updated_at, forecast }
    }
}

/// The word for an intensity in gCO2eq/kWh: below 100 `very_low`, 200 `low`, 350 `moderate`, 500 `high`, else `very_high`.
pub fn rating(intensity: f64) -> &'static str {
    match intensity {
        x if x < 100.0 => "very_low",
        x if x < 200.0 => "low",
        x if x < 350.0 => "moderate",
        x if x < 500.0 => "high",
        _ => "very_high",
    }
}

#[derive(Default)]
struct Entry {
    last: Option<(Instant, Reading)>,
    failures: u32,
    rests_until: Option<Instant>,
}

struct Inner {
    client: Option<Client>,
    default_zone: String,
    fresh: Duration,
    /// A zone's entry is locked while it is asked for, so that a hundred callers make one call.
    entries: std::sync::Mutex<HashMap<String, Arc<Mutex<Entry>>>>,
    /// Until when the source, whatever the zone, wants to be left alone.
    limited_until: std::sync::Mutex<Option<Instant>>,
    runtime: tokio::runtime::Handle,
}

/// The room's service; clones share the cache.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

impl Service {
    /// With these settings; calls run on `runtime`.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn open(settings: &Carbon, runtime: tokio::runtime::Handle) -> Result<Self, String> {
        let client = Client::of(settings).map_err(|e| e.to_string())?;
        let fresh = FRESH.min(Duration::from_secs(settings.poll_seconds) / 2);
        Ok(Self(Arc::new(Inner {
            client,
            default_zone: settings.zone.clone(),
            fresh,
            entries: Default::default(),
            limited_until: Default::default(),
            runtime,
        })))
    }

    /// The zone that a caller names, or the configured one.
    ///
    /// # Errors
    /// 400 that lists the known zones.
    pub fn zone(&self, named: Option<&str>) -> Result<String, Error> {
        let zone = named.map_or_else(|| self.0.default_zone.clone(), str::to_ascii_uppercase);
        if profile::is_known(&zone) {
            return Ok(zone);
        }
        let shown: String = zone.chars().take(40).collect();
        Err(Error::bad_request(format!("zone `{shown}` is unknown; known: {}", profile::known())))
    }

    /// What is known of a zone now.
    pub async fn reading(&self, zone: &str) -> Reading {
        let now = now_millis();
        if !self.0.client.as_ref().is_some_and(|client| client.covers(zone)) {
            return Reading::embedded(zone, now);
        }
        let (inner, zone) = (Arc::clone(&self.0), zone.to_owned());
        let asked = zone.clone();
        // On the runtime whose connections live as long as the process.
        let task = self.0.runtime.spawn(async move { inner.known(&asked).await });
        task.await.ok().flatten().unwrap_or_else(|| Reading::embedded(&zone, now))
    }
}

impl Inner {
    async fn known(&self, zone: &str) -> Option<Reading> {
        let client = self.client.as_ref()?;
        let entry = Arc::clone(self.entries.lock().unwrap_or_else(PoisonError::into_inner).entry(zone.to_owned()).or_default());
        let mut entry = entry.lock().await;
        let now = Instant::now();
        if let Some((when, reading)) = &entry.last
            && now.saturating_duration_since(*when) < self.fresh
        {
            return Some(reading.clone());
        }
        let limited = *self.limited_until.lock().unwrap_or_else(PoisonError::into_inner);
        if entry.rests_until.max(limited).is_none_or(|until| until <= now) {
            match client.ask(zone, shared::clock::now()).await {
                Ok(told) => {
                    let reading = Reading::told(zone, client.source().word(), told, now_millis());
                    *entry = Entry { last: Some((Instant::now(), reading.clone())), failures: 0, rests_until: None };
                    return Some(reading);
                }
                Err(failure) => self.rest(&mut entry, zone, client.source(), &failure),
            }
        }
        // What was measured then is not now any more; what was forecast for now still is.
        let kept = entry.last.as_ref().filter(|(when, _)| now.saturating_duration_since(*when) < KEPT);
        kept.and_then(|(_, reading)| {
            let intensity = reading.forecast.at(now_millis())?;
            Some(Reading { estimated: true, intensity, ..reading.clone() })
        })
    }

    /// Leaves a source that failed alone for a while: twice as long each time, or as long as it says.
    fn rest(&self, entry: &mut Entry, zone: &str, source: Source, failure: &Failure) {
        entry.failures = entry.failures.saturating_add(1);
        let first = self.fresh.max(Duration::from_millis(500));
        let backed_off = first.saturating_mul(1 << entry.failures.min(10).saturating_sub(1)).min(LONGEST_REST);
        let rest = match failure {
            Failure::Limited(Some(wait)) => (*wait).min(LONGEST_RETRY_AFTER).max(first),
            _ => backed_off,
        };
        let until = Instant::now() + rest;
        if let Failure::Limited(_) = failure {
            *self.limited_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
        }
        entry.rests_until = Some(until);
        tracing::warn!(%failure, source = source.word(), zone, rest_seconds = rest.as_secs(), "no intensity from the source");
    }
}
