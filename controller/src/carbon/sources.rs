//! The two services that know: Electricity Maps (v3) and the UK Carbon Intensity API.
//!
//! ```text
//! Electricity Maps   GET BASE/carbon-intensity/latest?zone=Z     {"zone","carbonIntensity","datetime","isEstimated",…}
//!                    GET BASE/carbon-intensity/forecast?zone=Z   {"zone","forecast":[{"carbonIntensity","datetime"},…],…}   header auth-token
//! UK                 GET BASE/intensity                          {"data":[{"from","to","intensity":{"forecast","actual","index"}}]}
//!                    GET BASE/intensity/{from}/fw48h             the same, many
//! ```
//! Owns: their words and which of their answers are believed. Never: keeps anything (the service does), follows a redirect, shows the key.
//! A crash here costs one call.

use std::time::Duration;

use chrono::{DateTime, NaiveDateTime, Utc};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use shared::secret::Secret;

use super::windows::{Forecast, Slot};
use crate::config::carbon::{Carbon, Source};
use crate::egress::Reach;

/// Longest time for one call.
const CALL: Duration = Duration::from_secs(6);
/// Longest answer in bytes.
const LONGEST: usize = 1 << 20;
/// Most steps of a forecast.
const MOST: usize = 1000;
/// Above this it is no intensity: lignite is at 1,200.
const HIGHEST: f64 = 5000.0;
/// What was measured longer ago is not used as current.
pub const STALE: Duration = Duration::from_secs(2 * 3600);
/// A step of a forecast that is longer than this is a gap.
const LONGEST_STEP: i64 = 3 * 3600 * 1000;
/// The length of a last step where nothing tells it.
const HOUR: i64 = 3600 * 1000;

/// Why a source did not tell.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It wants to be left alone.
    #[error("it answered 429, too many requests")]
    Limited(Option<Duration>),
    /// It was not reached, or answered with a status that is no success.
    #[error("{0}")]
    Away(String),
    /// It answered something else than its documentation says.
    #[error("its answer cannot be used: {0}")]
    Garbage(String),
    /// What it says is old.
    #[error("its newest figure is of {0}, more than two hours ago")]
    Stale(String),
}

/// What a source said.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// gCO2eq/kWh.
    pub intensity: f64,
    /// When that was; milliseconds since 1970.
    pub updated_at: i64,
    /// Whether the source calls it an estimate or a forecast.
    pub estimated: bool,
    /// What is ahead; `None` where the source tells the present only.
    pub forecast: Option<Forecast>,
}

/// A client of one of them.
pub struct Client {
    http: reqwest::Client,
    base: String,
    key: Option<Secret>,
    source: Source,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Latest {
    carbon_intensity: f64,
    datetime: String,
    #[serde(default)]
    is_estimated: Option<bool>,
}

#[derive(Deserialize)]
struct Ahead {
    forecast: Vec<Point>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Point {
    carbon_intensity: f64,
    datetime: String,
}

#[derive(Deserialize)]
struct Uk {
    data: Vec<UkSlot>,
}

#[derive(Deserialize)]
struct UkSlot {
    from: String,
    to: String,
    intensity: UkIntensity,
}

#[derive(Deserialize)]
struct UkIntensity {
    forecast: Option<f64>,
    actual: Option<f64>,
}

impl Client {
    /// A client of the configured source; `None` where that is the embedded profile.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn of(settings: &Carbon) -> Result<Option<Self>, reqwest::Error> {
        let (base, key) = match settings.source {
            Source::EmbeddedProfile => return Ok(None),
            Source::ElectricityMaps => (&settings.electricity_maps_url, settings.electricity_maps_key.clone()),
            Source::UkCarbonIntensity => (&settings.uk_url, None),
        };
        let http = Reach::Configured.client()?;
        Ok(Some(Self { http, base: base.trim_end_matches('/').to_owned(), key, source: settings.source }))
    }

    /// Its name.
    pub fn source(&self) -> Source {
        self.source
    }

    /// Whether it can tell anything of this zone.
    pub fn covers(&self, zone: &str) -> bool {
        match self.source {
            Source::EmbeddedProfile => false,
            Source::ElectricityMaps => zone != super::profile::WORLD,
            Source::UkCarbonIntensity => zone == "GB",
        }
    }

    /// Asks for a zone.
    ///
    /// # Errors
    /// [`Failure`]; nothing of an answer that is partly wrong is used.
    pub async fn ask(&self, zone: &str, now: DateTime<Utc>) -> Result<Told, Failure> {
        let told = match self.source {
            Source::UkCarbonIntensity => self.uk(now).await?,
            _ => self.electricity_maps(zone, now).await?,
        };
        let age = now.timestamp_millis().saturating_sub(told.updated_at);
        if u128::try_from(age).is_ok_and(|age| age > STALE.as_millis()) {
            return Err(Failure::Stale(crate::http::rfc3339(told.updated_at)));
        }
        Ok(told)
    }

    async fn electricity_maps(&self, zone: &str, now: DateTime<Utc>) -> Result<Told, Failure> {
        let latest: Latest = self.get(&format!("/carbon-intensity/latest?zone={zone}")).await?;
        let forecast = match self.get::<Ahead>(&format!("/carbon-intensity/forecast?zone={zone}")).await {
            Ok(ahead) => Some(steps(ahead.forecast)?).filter(|forecast| forecast.end() > Some(now.timestamp_millis())),
            Err(limited @ Failure::Limited(_)) => return Err(limited),
            // Many keys may ask for the present only.
            Err(failure) => {
                tracing::debug!(%failure, zone, "no forecast from electricity-maps");
                None
            }
        };
        Ok(Told {
            intensity: plausible(latest.carbon_intensity)?,
            updated_at: time(&latest.datetime)?,
            estimated: latest.is_estimated == Some(true),
            forecast,
        })
    }

    async fn uk(&self, now: DateTime<Utc>) -> Result<Told, Failure> {
        let current: Uk = self.get("/intensity").await?;
        let current = current.data.first().ok_or_else(|| Failure::Garbage("no half-hour in `data`".to_owned()))?;
        let (intensity, estimated) = match (current.intensity.actual, current.intensity.forecast) {
            (Some(actual), _) => (actual, false),
            (None, Some(forecast)) => (forecast, true),
            (None, None) => return Err(Failure::Garbage("neither `actual` nor `forecast`".to_owned())),
        };
        let ahead: Uk = self.get(&format!("/intensity/{}/fw48h", now.format("%Y-%m-%dT%H:%MZ"))).await?;
        if ahead.data.len() > MOST {
            return Err(Failure::Garbage(format!("more than {MOST} steps")));
        }
        let mut slots = Vec::with_capacity(ahead.data.len());
        for slot in ahead.data {
            let Some(intensity) = slot.intensity.forecast.or(slot.intensity.actual) else { continue };
            slots.push(Slot { start: time(&slot.from)?, end: time(&slot.to)?, intensity: plausible(intensity)? });
        }
        let forecast = Some(Forecast::new(slots)).filter(|forecast| forecast.end() > Some(now.timestamp_millis()));
        Ok(Told { intensity: plausible(intensity)?, updated_at: time(&current.from)?, estimated, forecast })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let url = Reach::Configured.check(&format!("{}{path}", self.base)).map_err(|e| Failure::Away(e.to_string()))?;
        let mut request = self.http.get(url).timeout(CALL).header("Accept", "application/json");
        if let Some(key) = &self.key {
            request = request.header("auth-token", key.expose());
        }
        // The error's own text holds the URL, which holds no secret; it is left out all the same.
        let away = |e: reqwest::Error| Failure::Away(if e.is_timeout() { "it did not answer in time".to_owned() } else { root(&e) });
        let mut response = request.send().await.map_err(away)?;
        let status = response.status().as_u16();
        if status == 429 {
            let wait = response.headers().get("Retry-After").and_then(|value| value.to_str().ok());
            return Err(Failure::Limited(wait.and_then(|text| retry_after(text, Utc::now()))));
        }
        if status != 200 {
            return Err(Failure::Away(format!("it answered {status}")));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(away)? {
            if body.len() + chunk.len() > LONGEST {
                return Err(Failure::Garbage(format!("more than {LONGEST} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        serde_json::from_slice(&body).map_err(|e| Failure::Garbage(e.to_string()))
    }
}

/// The innermost cause, which names no URL.
fn root(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    if std::ptr::addr_eq(cause, error) { "it could not be reached".to_owned() } else { cause.to_string() }
}

/// `Retry-After`: seconds, or a date.
fn retry_after(text: &str, now: DateTime<Utc>) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = DateTime::parse_from_rfc2822(text.trim()).ok()?;
    Some((date.with_timezone(&Utc) - now).to_std().unwrap_or_default())
}

fn plausible(intensity: f64) -> Result<f64, Failure> {
    if (0.0..=HIGHEST).contains(&intensity) { Ok(intensity) } else { Err(Failure::Garbage(format!("an intensity of {intensity}"))) }
}

/// RFC 3339, or without seconds as the UK writes it.
fn time(text: &str) -> Result<i64, Failure> {
    let whole = DateTime::parse_from_rfc3339(text).map(|time| time.timestamp_millis());
    let short = || NaiveDateTime::parse_from_str(text, "%Y-%m-%dT%H:%MZ").map(|time| time.and_utc().timestamp_millis());
    whole.or_else(|_| short()).map_err(|_| Failure::Garbage(format!("the time `{}`", text.chars().take(40).collect::<String>())))
}

/// Points in time become steps: each lasts until the next, the last as long as the one before it.
fn steps(points: Vec<Point>) -> Result<Forecast, Failure> {
    if points.len() > MOST {
        return Err(Failure::Garbage(format!("more than {MOST} steps")));
    }
    let mut starts = Vec::with_capacity(points.len());
    for point in points {
        starts.push((time(&point.datetime)?, plausible(point.carbon_intensity)?));
    }
    starts.sort_by_key(|(start, _)| *start);
    let mut slots: Vec<Slot> = Vec::with_capacity(starts.len());
    for (at, (start, intensity)) in starts.iter().enumerate() {
        let usual = slots.last().map_or(HOUR, |slot: &Slot| slot.end - slot.start);
        let end = match starts.get(at + 1) {
            Some((next, _)) if next - start <= LONGEST_STEP => *next,
            _ => start.saturating_add(usual),
        };
        slots.push(Slot { start: *start, end, intensity: *intensity });
    }
    Ok(Forecast::new(slots))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn times_waits_and_steps_are_read_as_documented() {
        assert_eq!(time("2018-01-20T12:00Z").unwrap(), time("2018-01-20T12:00:00.000Z").unwrap());
        assert!(time("noon").is_err());
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        assert_eq!(retry_after("120", now), Some(Duration::from_secs(120)));
        assert_eq!(retry_after("Thu, 01 Jan 2026 00:01:00 GMT", now), Some(Duration::from_secs(60)));
        assert_eq!(retry_after("Wed, 31 Dec 2025 00:00:00 GMT", now), Some(Duration::ZERO));
        assert_eq!(retry_after("soon", now), None);
        let point = |datetime: &str, carbon_intensity: f64| Point { datetime: datetime.to_owned(), carbon_intensity };
        let forecast = steps(vec![
            point("2026-01-01T01:00:00Z", 200.0),
            point("2026-01-01T00:00:00Z", 100.0),
            point("2026-01-01T09:00:00Z", 300.0), // after a gap
        ])
        .unwrap();
        let ends: Vec<i64> = forecast.slots().iter().map(|slot| slot.end / HOUR - time("2026-01-01T00:00:00Z").unwrap() / HOUR).collect();
        assert_eq!(ends, [1, 2]);
        assert!(steps(vec![point("2026-01-01T00:00:00Z", -1.0)]).is_err());
    }
}
