//! Settings of the carbon room: `carbon.*` in the file, `HYPERSDK_CARBON_*` in the environment.
//!
//! Owns: their names, defaults and checks. Never: prints the key. A crash here costs nothing: it is read once, before anything starts.

use serde::Deserialize;
use shared::secret::Secret;

use super::{Error, wrong};
use crate::egress::Reach;

/// Where intensities come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The hour-of-day profiles in this program; nothing is called.
    #[default]
    EmbeddedProfile,
    /// Electricity Maps, which wants a key.
    ElectricityMaps,
    /// The UK Carbon Intensity API, for zone GB; other zones have the profile.
    UkCarbonIntensity,
}

impl Source {
    /// The word in settings and answers.
    pub fn word(self) -> &'static str {
        match self {
            Source::EmbeddedProfile => "embedded-profile",
            Source::ElectricityMaps => "electricity-maps",
            Source::UkCarbonIntensity => "uk-carbon-intensity",
        }
    }
}

impl std::str::FromStr for Source {
    type Err = ();
    fn from_str(word: &str) -> Result<Self, ()> {
        let all = [Source::EmbeddedProfile, Source::ElectricityMaps, Source::UkCarbonIntensity];
        all.into_iter().find(|source| source.word() == word).ok_or(())
    }
}

/// The settings.
#[derive(Clone)]
pub struct Carbon {
    /// Zone of the grid that the agents stand in; `WORLD`, the mean of all, says nothing about an hour.
    pub zone: String,
    /// Where intensities come from.
    pub source: Source,
    /// Base URL of Electricity Maps, version included.
    pub electricity_maps_url: String,
    /// Its key.
    pub electricity_maps_key: Option<Secret>,
    /// Base URL of the UK Carbon Intensity API.
    pub uk_url: String,
    /// What a running job adds to the draw of its agent's host and storage, in watts.
    pub watts: f64,
    /// What the building adds to that: total draw over the computers' draw.
    pub pue: f64,
    /// Seconds between two looks at the grid for jobs that wait for it or run.
    pub poll_seconds: u64,
}

impl Default for Carbon {
    fn default() -> Self {
        Self {
            zone: "WORLD".to_owned(),
            source: Source::EmbeddedProfile,
            electricity_maps_url: "https://api.electricitymaps.com/v3".to_owned(),
            electricity_maps_key: None,
            uk_url: "https://api.carbonintensity.org.uk".to_owned(),
            watts: 200.0,
            pue: 1.5,
            poll_seconds: 300,
        }
    }
}

/// As it is written in the file.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    zone: Option<String>,
    source: Option<Source>,
    electricity_maps_url: Option<String>,
    electricity_maps_key: Option<String>,
    uk_url: Option<String>,
    watts: Option<f64>,
    pue: Option<f64>,
    poll_seconds: Option<u64>,
}

impl Carbon {
    pub(super) fn take(&mut self, file: File) {
        macro_rules! take {
            ($($field:ident),*) => { $(if let Some(value) = file.$field { self.$field = value; })* };
        }
        take!(zone, source, electricity_maps_url, uk_url, watts, pue, poll_seconds);
        if let Some(key) = file.electricity_maps_key {
            self.electricity_maps_key = Some(Secret::new(key));
        }
    }

    pub(super) fn take_environment(&mut self, get: &dyn Fn(&str) -> Option<String>) -> Result<(), Error> {
        macro_rules! parsed {
            ($($field:ident, $name:literal, $right:literal;)*) => {
                $(if let Some(text) = get(concat!("CARBON_", $name)) {
                    self.$field = text.parse().map_err(|_| wrong(concat!("HYPERSDK_CARBON_", $name), $right))?;
                })*
            };
        }
        parsed! {
            zone, "ZONE", "must be a zone";
            source, "SOURCE", "must be embedded-profile, electricity-maps or uk-carbon-intensity";
            electricity_maps_url, "ELECTRICITY_MAPS_URL", "must be a URL";
            uk_url, "UK_URL", "must be a URL";
            watts, "WATTS", "must be a number of watts";
            pue, "PUE", "must be a number like 1.5";
            poll_seconds, "POLL_SECONDS", "must be a whole number of seconds";
        }
        if let Some(key) = super::secret(get, "CARBON_ELECTRICITY_MAPS_KEY")? {
            self.electricity_maps_key = Some(key);
        }
        Ok(())
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        if !crate::carbon::profile::is_known(&self.zone) {
            return Err(wrong("carbon.zone", format!("must be one of {}", crate::carbon::profile::known())));
        }
        for (name, url) in [("carbon.electricity_maps_url", &self.electricity_maps_url), ("carbon.uk_url", &self.uk_url)] {
            Reach::Configured.check(url).map_err(|e| wrong(name, e.to_string()))?;
        }
        if self.source == Source::ElectricityMaps && self.electricity_maps_key.as_ref().is_none_or(Secret::is_empty) {
            return Err(wrong("carbon.electricity_maps_key", "must be given for the source electricity-maps"));
        }
        if !(self.watts > 0.0 && self.watts <= 1e6) {
            return Err(wrong("carbon.watts", "must be more than 0 and at most 1000000"));
        }
        if !(1.0..=10.0).contains(&self.pue) {
            return Err(wrong("carbon.pue", "must be from 1 to 10"));
        }
        if !(1..=86_400).contains(&self.poll_seconds) {
            return Err(wrong("carbon.poll_seconds", "must be from 1 to 86400"));
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_work_is_refused_by_name() {
        let with = |pairs: &[(&str, &str)]| {
            let mut carbon = Carbon::default();
            let find = |name: &str| pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
            carbon.take_environment(&find).and_then(|()| carbon.check()).map(|()| carbon)
        };
        let good = with(&[("CARBON_ZONE", "GB"), ("CARBON_SOURCE", "uk-carbon-intensity"), ("CARBON_POLL_SECONDS", "1")]).unwrap();
        assert_eq!((good.zone.as_str(), good.source, good.poll_seconds), ("GB", Source::UkCarbonIntensity, 1));
        for (name, value) in [
            ("ZONE", "XX"),
            ("SOURCE", "tea-leaves"),
            ("SOURCE", "electricity-maps"),
            ("UK_URL", "ftp://example.org"),
            ("UK_URL", "http://169.254.169.254/"),
            ("WATTS", "0"),
            ("WATTS", "NaN"),
            ("PUE", "0.5"),
            ("POLL_SECONDS", "0"),
        ] {
            assert!(with(&[(&format!("CARBON_{name}"), value)]).is_err(), "{name}={value}");
        }
        assert!(toml::from_str::<File>("zoone = 'DE'").is_err());
        let mut carbon = Carbon::default();
        carbon.take(toml::from_str("zone = 'FR'\nsource = 'electricity-maps'\nelectricity_maps_key = 'k'").unwrap());
        carbon.check().unwrap();
    }
}
