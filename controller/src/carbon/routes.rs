//! `/carbon`: the grid now, and the best windows ahead.
//!
//! Owns: the HTTP side. Never: calls a source itself (the service does). A crash here costs one answer.

use actix_web::{HttpRequest, web};
use serde::Serialize;
use utoipa::ToSchema;

use super::service::rating;
use super::windows::{Bounds, Window};
use crate::app::App;
use crate::http::guard::Viewer;
use crate::http::query::Query;
use crate::http::reply::{Error, ErrorBody};
use crate::http::rfc3339;
use crate::jobs::record::now_millis;

/// Windows that are answered at most.
const MOST: usize = 5;
/// The length of a window where none is asked for, in seconds.
const DEFAULT: u64 = 3600;
const UNIT: &str = "gCO2eq/kWh";

/// The grid of a zone.
#[derive(Serialize, ToSchema)]
#[schema(as = CarbonIntensity, example = json!({
    "zone": "DE", "intensity": 312.0, "unit": "gCO2eq/kWh", "rating": "moderate", "source": "electricity-maps", "estimated": false,
    "updated_at": "2025-06-15T10:00:00.000Z", "forecast_source": "electricity-maps",
    "forecast": [{"time": "2025-06-15T10:00:00.000Z", "intensity": 312.0}, {"time": "2025-06-15T11:00:00.000Z", "intensity": 285.0}]
}))]
pub struct Intensity {
    /// The zone, as Electricity Maps names it.
    zone: String,
    /// gCO2eq/kWh now, over the life cycle of the plants.
    intensity: f64,
    /// `gCO2eq/kWh`.
    unit: &'static str,
    /// `very_low` (below 100), `low` (200), `moderate` (350), `high` (500), `very_high`.
    rating: &'static str,
    /// `electricity-maps`, `uk-carbon-intensity` or `embedded-profile`.
    source: &'static str,
    /// Whether the figure is an estimate; always true of the embedded profile and of what a source said before it went away.
    estimated: bool,
    /// When the figure was made, RFC 3339.
    updated_at: String,
    /// Where the forecast comes from; the embedded profile where the source tells the present only.
    forecast_source: &'static str,
    /// What is ahead.
    forecast: Vec<Point>,
}

/// A step of the forecast: from this time up to the next.
#[derive(Serialize, ToSchema)]
#[schema(as = CarbonPoint)]
pub struct Point {
    /// RFC 3339.
    time: String,
    /// gCO2eq/kWh.
    intensity: f64,
}

/// The best windows.
#[derive(Serialize, ToSchema)]
#[schema(as = CarbonSchedule, example = json!({
    "zone": "DE", "duration": "2h", "source": "electricity-maps", "estimated": false, "unit": "gCO2eq/kWh",
    "windows": [{"start": "2025-06-15T12:00:00.000Z", "end": "2025-06-15T14:00:00.000Z", "average_intensity": 187.5, "savings_percent": 39.9, "rank": 1}],
    "now": {"start": "2025-06-15T10:20:00.000Z", "end": "2025-06-15T12:20:00.000Z", "average_intensity": 312.0, "intensity": 318.0, "rating": "moderate"}
}))]
pub struct Schedule {
    /// The zone.
    zone: String,
    /// The length in words, `2h`.
    duration: String,
    /// Best first; none overlaps a better one, so that each is a choice of its own.
    windows: Vec<Ranked>,
    /// What to start at once would mean.
    now: Now,
    /// Where the forecast comes from.
    source: &'static str,
    /// Whether it is an estimate.
    estimated: bool,
    /// `gCO2eq/kWh`.
    unit: &'static str,
}

/// A window for a run.
#[derive(Serialize, ToSchema)]
#[schema(as = CarbonWindow)]
pub struct Ranked {
    /// RFC 3339.
    start: String,
    /// RFC 3339.
    end: String,
    /// Mean over the window.
    average_intensity: f64,
    /// Against a start at once; negative where that is better.
    savings_percent: f64,
    /// From 1.
    rank: usize,
}

/// A run that begins at once.
#[derive(Serialize, ToSchema)]
#[schema(as = CarbonNow)]
pub struct Now {
    /// RFC 3339.
    start: String,
    /// RFC 3339.
    end: String,
    /// Mean over that run.
    average_intensity: f64,
    /// At this moment.
    intensity: f64,
    /// Its word.
    rating: &'static str,
}

fn tenth(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// How clean the grid is, now and ahead.
#[utoipa::path(get, path = "/carbon/intensity", tag = "Carbon", security(("token" = [])), params(
    ("zone" = Option<String>, Query, description = "DE, GB, US-CAL-CISO, …; default: the configuration's"),
), responses(
    (status = 200, description = "the grid", body = Intensity),
    (status = 400, description = "an unknown zone or parameter; the known ones are listed", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
))]
pub async fn intensity(_: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Intensity>, Error> {
    let query = Query::only(&request, &["zone"])?;
    let zone = app.carbon.zone(query.text("zone"))?;
    let reading = app.carbon.reading(&zone).await;
    let ahead = reading.forecast(now_millis());
    let forecast = ahead.slots().iter().map(|slot| Point { time: rfc3339(slot.start), intensity: tenth(slot.intensity) }).collect();
    Ok(web::Json(Intensity {
        zone,
        intensity: tenth(reading.intensity),
        unit: UNIT,
        rating: rating(reading.intensity),
        source: reading.source,
        estimated: reading.estimated,
        updated_at: rfc3339(reading.updated_at),
        forecast_source: reading.forecast_source,
        forecast,
    }))
}

/// When a run of some length would meet the cleanest grid.
#[utoipa::path(get, path = "/carbon/schedule", tag = "Carbon", security(("token" = [])), params(
    ("zone" = Option<String>, Query, description = "DE, GB, US-CAL-CISO, …; default: the configuration's"),
    ("duration" = Option<String>, Query, description = "2h, 90m, 1h30m; default 1h"),
    ("deadline" = Option<String>, Query, description = "RFC 3339; windows end before it; default: the forecast's end"),
), responses(
    (status = 200, description = "at most five windows, best first", body = Schedule),
    (status = 400, description = "an unknown zone or parameter, no duration, or no room for it before the deadline", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
))]
pub async fn schedule(_: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Schedule>, Error> {
    let query = Query::only(&request, &["zone", "duration", "deadline"])?;
    let zone = app.carbon.zone(query.text("zone"))?;
    let seconds = query.text("duration").map_or(Ok(DEFAULT), duration)?;
    let length = i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX);
    let now = now_millis();
    let deadline = query.time("deadline")?.map(|time| time.timestamp_millis());
    let words = shared::clock::duration_words(seconds);
    if let Some(deadline) = deadline.filter(|deadline| deadline.saturating_sub(now) < length) {
        let (deadline, earliest) = (rfc3339(deadline), rfc3339(now.saturating_add(length)));
        return Err(Error::bad_request(format!("deadline {deadline} leaves no room for {words}: it must be {earliest} or later")));
    }
    let reading = app.carbon.reading(&zone).await;
    let forecast = reading.forecast(now);
    let at_once = forecast.average(now, now.saturating_add(length)).ok_or_else(|| {
        let hours = forecast.end().unwrap_or(now).saturating_sub(now) / 3_600_000;
        Error::bad_request(format!("duration {words} is longer than the forecast of {zone}, which reaches {hours} h ahead"))
    })?;
    let until = deadline.unwrap_or(i64::MAX);
    let found = forecast.best(Bounds { from: now, latest: i64::MAX, until }, length, MOST);
    let windows = found.iter().enumerate().map(|(at, window)| ranked(at + 1, window, at_once)).collect();
    Ok(web::Json(Schedule {
        duration: words,
        windows,
        now: Now {
            start: rfc3339(now),
            end: rfc3339(now.saturating_add(length)),
            average_intensity: tenth(at_once),
            intensity: tenth(reading.intensity),
            rating: rating(reading.intensity),
        },
        source: reading.forecast_source,
        estimated: reading.estimated,
        unit: UNIT,
        zone,
    }))
}

fn ranked(rank: usize, window: &Window, at_once: f64) -> Ranked {
    let savings = if at_once > 0.0 { (at_once - window.average) / at_once * 100.0 } else { 0.0 };
    Ranked {
        start: rfc3339(window.start),
        end: rfc3339(window.end),
        average_intensity: tenth(window.average),
        savings_percent: tenth(savings),
        rank,
    }
}

/// `2h`, `90m`, `1h30m`, `45s`, `1d`, `1.5h`: seconds, from a minute to the forecast's end.
pub fn duration(text: &str) -> Result<u64, Error> {
    let wrong = || {
        let shown: String = text.chars().take(40).collect();
        Error::bad_request(format!("duration must be like 2h, 90m or 1h30m, from 1m to {}h, not `{shown}`", super::service::AHEAD))
    };
    let (mut seconds, mut number) = (0.0f64, String::new());
    for letter in text.chars().filter(|letter| *letter != ' ') {
        let unit = match letter {
            '0'..='9' | '.' => {
                number.push(letter);
                continue;
            }
            's' => 1.0,
            'm' => 60.0,
            'h' => 3600.0,
            'd' => 86_400.0,
            _ => return Err(wrong()),
        };
        seconds += number.parse::<f64>().map_err(|_| wrong())? * unit;
        number.clear();
    }
    let longest = (super::service::AHEAD * 3600) as f64;
    if !number.is_empty() || !(60.0..=longest).contains(&seconds) {
        return Err(wrong());
    }
    Ok(seconds.round() as u64)
}
