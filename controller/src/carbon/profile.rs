//! The embedded profiles: what a zone's grid is like at this hour of a usual day, for installations without a source and for when it is away.
//!
//! They are estimates of ours, and every answer from them says so. How they were made: `mean` is the order of a zone's annual mean of life-cycle
//! emissions in the years 2022 to 2024 as public statistics report it (rounded by hand, not copied from a data set); the day's shape is
//! drawn from what the zone's generation is known for, as three bumps over the hour of the local day (daylight saving time included):
//!
//! ```text
//! shape(h) = 1 − solar·bump(h, 13, 2.8) + evening·bump(h, 19.5, 2.2) + evening/2·bump(h, 7.5, 1.8) − night·bump(h, 3.5, 2.8)
//! bump(h, centre, width) = exp(−(distance on the clock / width)² / 2)        intensity(h) = mean × shape(h) / mean of shape over the day
//! ```
//! `solar`, `evening` and `night` are percent: how far the midday sun pushes fossil plants out, how far the peaks bring them in, and how far
//! low demand at night spares them. Seasons, weekdays and the weather are not in them: a real day is off by a third and more, in windy
//! or solar zones by half. They rank hours of a usual day; they measure nothing. The zones' codes are those of Electricity Maps.
//! Owns: the zones that are known. Pure. Never: claims to be measured. A crash here costs one answer.

use chrono::{DateTime, Timelike};
use chrono_tz::Tz;

use super::windows::{Forecast, Slot};

/// The mean of all grids: the zone of an installation that named none.
pub const WORLD: &str = "WORLD";
const HOUR: i64 = 3600 * 1000;

/// A zone and its usual day.
struct Zone {
    code: &'static str,
    /// Its name in English; also what the codes are documented by.
    name: &'static str,
    clock: Tz,
    /// gCO2eq/kWh.
    mean: f64,
    /// Percent: solar, evening, night.
    shape: [u8; 3],
}

const fn zone(code: &'static str, name: &'static str, clock: Tz, mean: f64, shape: [u8; 3]) -> Zone {
    Zone { code, name, clock, mean, shape }
}

const ZONES: &[Zone] = &[
    zone("WORLD", "World average", Tz::UTC, 480.0, [0, 0, 0]),
    zone("AE", "United Arab Emirates", Tz::Asia__Dubai, 420.0, [16, 4, 4]),
    zone("AR", "Argentina", Tz::America__Argentina__Buenos_Aires, 330.0, [6, 8, 6]),
    zone("AT", "Austria", Tz::Europe__Vienna, 150.0, [18, 10, 4]),
    zone("AU-NSW", "Australia, New South Wales", Tz::Australia__Sydney, 600.0, [28, 8, 2]),
    zone("AU-QLD", "Australia, Queensland", Tz::Australia__Brisbane, 650.0, [28, 8, 2]),
    zone("AU-SA", "Australia, South Australia", Tz::Australia__Adelaide, 230.0, [55, 20, 4]),
    zone("AU-VIC", "Australia, Victoria", Tz::Australia__Melbourne, 560.0, [24, 6, 2]),
    zone("BE", "Belgium", Tz::Europe__Brussels, 150.0, [18, 12, 4]),
    zone("BG", "Bulgaria", Tz::Europe__Sofia, 400.0, [18, 8, 2]),
    zone("BR", "Brazil", Tz::America__Sao_Paulo, 100.0, [10, 14, 6]),
    zone("CA-AB", "Canada, Alberta", Tz::America__Edmonton, 470.0, [10, 5, 3]),
    zone("CA-ON", "Canada, Ontario", Tz::America__Toronto, 65.0, [8, 18, 22]),
    zone("CA-QC", "Canada, Quebec", Tz::America__Montreal, 30.0, [0, 3, 2]),
    zone("CH", "Switzerland", Tz::Europe__Zurich, 55.0, [14, 12, 4]),
    zone("CL", "Chile", Tz::America__Santiago, 280.0, [40, 16, 2]),
    zone("CN", "China", Tz::Asia__Shanghai, 570.0, [8, 3, 2]),
    zone("CZ", "Czechia", Tz::Europe__Prague, 440.0, [14, 6, 3]),
    zone("DE", "Germany", Tz::Europe__Berlin, 370.0, [26, 14, 4]),
    zone("DK", "Denmark", Tz::Europe__Copenhagen, 150.0, [18, 16, 6]),
    zone("EE", "Estonia", Tz::Europe__Tallinn, 380.0, [16, 12, 6]),
    zone("EG", "Egypt", Tz::Africa__Cairo, 460.0, [5, 5, 4]),
    zone("ES", "Spain", Tz::Europe__Madrid, 160.0, [30, 18, 4]),
    zone("FI", "Finland", Tz::Europe__Helsinki, 80.0, [6, 8, 6]),
    zone("FR", "France", Tz::Europe__Paris, 50.0, [10, 14, 6]),
    zone("GB", "Great Britain", Tz::Europe__London, 220.0, [14, 16, 14]),
    zone("GR", "Greece", Tz::Europe__Athens, 350.0, [34, 16, 2]),
    zone("HR", "Croatia", Tz::Europe__Zagreb, 220.0, [14, 10, 4]),
    zone("HU", "Hungary", Tz::Europe__Budapest, 220.0, [28, 14, 4]),
    zone("ID", "Indonesia", Tz::Asia__Jakarta, 680.0, [1, 3, 2]),
    zone("IE", "Ireland", Tz::Europe__Dublin, 320.0, [8, 12, 8]),
    zone("IL", "Israel", Tz::Asia__Jerusalem, 540.0, [20, 6, 2]),
    zone("IN", "India", Tz::Asia__Kolkata, 700.0, [14, 5, 2]),
    zone("IS", "Iceland", Tz::Atlantic__Reykjavik, 28.0, [0, 1, 1]),
    zone("IT", "Italy", Tz::Europe__Rome, 300.0, [24, 12, 4]),
    zone("JP", "Japan", Tz::Asia__Tokyo, 470.0, [18, 6, 2]),
    zone("KE", "Kenya", Tz::Africa__Nairobi, 95.0, [6, 20, 10]),
    zone("KR", "South Korea", Tz::Asia__Seoul, 430.0, [10, 4, 3]),
    zone("LT", "Lithuania", Tz::Europe__Vilnius, 180.0, [22, 14, 6]),
    zone("LV", "Latvia", Tz::Europe__Riga, 170.0, [18, 12, 6]),
    zone("MA", "Morocco", Tz::Africa__Casablanca, 620.0, [10, 6, 3]),
    zone("MX", "Mexico", Tz::America__Mexico_City, 420.0, [12, 6, 3]),
    zone("MY", "Malaysia", Tz::Asia__Kuala_Lumpur, 560.0, [3, 3, 3]),
    zone("NG", "Nigeria", Tz::Africa__Lagos, 400.0, [2, 4, 3]),
    zone("NL", "Netherlands", Tz::Europe__Amsterdam, 280.0, [30, 16, 4]),
    zone("NO", "Norway", Tz::Europe__Oslo, 30.0, [1, 3, 2]),
    zone("NZ", "New Zealand", Tz::Pacific__Auckland, 110.0, [4, 14, 12]),
    zone("PH", "Philippines", Tz::Asia__Manila, 610.0, [4, 3, 3]),
    zone("PL", "Poland", Tz::Europe__Warsaw, 680.0, [16, 5, 3]),
    zone("PT", "Portugal", Tz::Europe__Lisbon, 140.0, [22, 16, 6]),
    zone("RO", "Romania", Tz::Europe__Bucharest, 250.0, [18, 12, 4]),
    zone("RS", "Serbia", Tz::Europe__Belgrade, 650.0, [4, 4, 3]),
    zone("SA", "Saudi Arabia", Tz::Asia__Riyadh, 570.0, [6, 3, 3]),
    zone("SE", "Sweden", Tz::Europe__Stockholm, 25.0, [3, 5, 3]),
    zone("SG", "Singapore", Tz::Asia__Singapore, 480.0, [2, 2, 2]),
    zone("SI", "Slovenia", Tz::Europe__Ljubljana, 220.0, [16, 10, 4]),
    zone("SK", "Slovakia", Tz::Europe__Bratislava, 140.0, [12, 10, 4]),
    zone("TH", "Thailand", Tz::Asia__Bangkok, 480.0, [6, 4, 3]),
    zone("TR", "Turkey", Tz::Europe__Istanbul, 420.0, [12, 6, 4]),
    zone("TW", "Taiwan", Tz::Asia__Taipei, 560.0, [14, 5, 3]),
    zone("UA", "Ukraine", Tz::Europe__Kiev, 250.0, [12, 12, 4]),
    zone("US", "United States, average", Tz::America__Chicago, 370.0, [10, 5, 4]),
    zone("US-CAL-CISO", "United States, California (CAISO)", Tz::America__Los_Angeles, 240.0, [42, 18, 2]),
    zone("US-MIDA-PJM", "United States, PJM", Tz::America__New_York, 380.0, [6, 5, 4]),
    zone("US-MIDW-MISO", "United States, MISO", Tz::America__Chicago, 460.0, [6, 4, 4]),
    zone("US-NE-ISNE", "United States, New England", Tz::America__New_York, 280.0, [16, 10, 8]),
    zone("US-NW-BPAT", "United States, Bonneville Power", Tz::America__Los_Angeles, 110.0, [8, 10, 8]),
    zone("US-NY-NYIS", "United States, New York", Tz::America__New_York, 270.0, [8, 8, 8]),
    zone("US-SE-SOCO", "United States, Southern Company", Tz::America__New_York, 400.0, [12, 6, 6]),
    zone("US-TEX-ERCO", "United States, Texas (ERCOT)", Tz::America__Chicago, 380.0, [16, 8, 8]),
    zone("VN", "Vietnam", Tz::Asia__Ho_Chi_Minh, 480.0, [14, 6, 3]),
    zone("ZA", "South Africa", Tz::Africa__Johannesburg, 710.0, [8, 3, 1]),
];

/// Whether a zone has a profile.
pub fn is_known(code: &str) -> bool {
    find(code).is_some()
}

/// Every zone, for messages.
pub fn known() -> String {
    ZONES.iter().map(|zone| zone.code).collect::<Vec<_>>().join(", ")
}

/// Codes and names, for people who look for theirs.
pub fn names() -> impl Iterator<Item = (&'static str, &'static str)> {
    ZONES.iter().map(|zone| (zone.code, zone.name))
}

fn find(code: &str) -> Option<&'static Zone> {
    ZONES.iter().find(|zone| zone.code == code)
}

/// The usual hours from the one that `now` lies in, as steps of an hour. Empty for a zone that is not known.
pub fn forecast(code: &str, now: i64, hours: i64) -> Forecast {
    let Some(zone) = find(code) else { return Forecast::default() };
    let first = now.div_euclid(HOUR) * HOUR;
    let day: f64 = (0..24).map(|hour| zone.shape_at(f64::from(hour))).sum::<f64>() / 24.0;
    let slot = |number: i64| {
        let start = first + number * HOUR;
        let local = DateTime::from_timestamp_millis(start).unwrap_or_default().with_timezone(&zone.clock);
        let hour = f64::from(local.hour()) + f64::from(local.minute()) / 60.0;
        Slot { start, end: start + HOUR, intensity: zone.mean * zone.shape_at(hour) / day }
    };
    // One more than asked for, since the first has begun already.
    Forecast::new((0..=hours).map(slot).collect())
}

impl Zone {
    fn shape_at(&self, hour: f64) -> f64 {
        let [solar, evening, night] = self.shape.map(|percent| f64::from(percent) / 100.0);
        1.0 - solar * bump(hour, 13.0, 2.8) + evening * bump(hour, 19.5, 2.2) + evening / 2.0 * bump(hour, 7.5, 1.8)
            - night * bump(hour, 3.5, 2.8)
    }
}

/// A bell on the clock.
fn bump(hour: f64, centre: f64, width: f64) -> f64 {
    let apart = (hour - centre).abs();
    let distance = apart.min(24.0 - apart);
    (-(distance / width).powi(2) / 2.0).exp()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_zone_has_a_plausible_day_whose_mean_is_the_years() {
        let codes: std::collections::BTreeSet<_> = names().map(|(code, _)| code).collect();
        assert!(codes.len() == ZONES.len() && codes.len() >= 30, "{} zones", codes.len());
        // A day without a change of the clock anywhere.
        let midnight = "2026-01-14T00:00:00Z".parse::<DateTime<chrono::Utc>>().unwrap().timestamp_millis();
        for zone in ZONES {
            let day = forecast(zone.code, midnight + 1, 24);
            assert_eq!((day.slots().len(), day.end()), (25, Some(midnight + 25 * HOUR)));
            let mean = day.average(midnight, midnight + 24 * HOUR).unwrap();
            assert!((mean - zone.mean).abs() < zone.mean * 0.01, "{}: {mean}", zone.code);
            assert!(day.slots().iter().all(|slot| slot.intensity > 10.0 && slot.intensity < 1200.0), "{}", zone.code);
        }
    }

    #[test]
    fn the_sun_stands_over_the_zones_own_clock() {
        let cleanest = |code: &str, day: &str| {
            let start = day.parse::<DateTime<chrono::Utc>>().unwrap().timestamp_millis();
            let day = forecast(code, start, 23);
            let best = day.slots().iter().min_by(|a, b| a.intensity.total_cmp(&b.intensity)).unwrap();
            DateTime::from_timestamp_millis(best.start).unwrap().hour()
        };
        assert_eq!((cleanest("DE", "2026-01-14T00:00:00Z"), cleanest("DE", "2026-07-14T00:00:00Z")), (12, 11));
        assert_eq!(cleanest("US-CAL-CISO", "2026-01-14T00:00:00Z"), 21);
        assert!(forecast("XX", 0, 24).slots().is_empty());
    }
}
