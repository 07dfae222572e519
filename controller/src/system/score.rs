//! The score of `GET /system/health`, pure.
//!
//! | part | 100 | falls to | weight |
//! |---|---|---|---|
//! | cpu | up to 80 % busy | 30 at 100 % | 5 |
//! | memory | 20 % available | 0 at 2 % | 10 |
//! | disk | the worst volume has 15 % or 50 GiB free | 0 at 1 % | 15 |
//! | network | at most 1 of 1,000 packets in error | 50 at 5 % | 5 |
//! | database | answers within 50 ms | 20 at 2 s, 0 when away | 25 |
//! | agents | all are connected | the connected share; 50 where none has joined | 20 |
//! | queue | nothing that could run waits longer than a minute | 30 at an hour | 10 |
//! | actors | messages are handled within 50 ms | 0 at 5 s | 10 |
//!
//! The whole is the weighted mean, and never better than the database and the actors, without which nothing works.
//! `healthy` from 80 on, `degraded` from 50 on, else `unhealthy`.
//! Owns: these numbers. Never: reads anything. A crash here costs nothing.

/// What is scored.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// 0–100.
    pub cpu_percent: f64,
    /// 0–100; `None` where nobody knows.
    pub memory_available_percent: Option<f64>,
    /// Free percent and bytes of each volume that is written to.
    pub volumes: Vec<(f64, u64)>,
    /// Errors for each packet on the worst interface, 0–1.
    pub network_errors: f64,
    /// Milliseconds; `None`: away.
    pub database_ms: Option<f64>,
    /// Agents that are connected, and all.
    pub agents: (u64, u64),
    /// Seconds that the oldest job that could run waits.
    pub ready_seconds: u64,
    /// Milliseconds of the slowest actor; `None`: one does not answer.
    pub actors_ms: Option<f64>,
}

/// The scores, each 0–100.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scores {
    /// Processors.
    pub cpu: u8,
    /// Memory.
    pub memory: u8,
    /// Disks.
    pub disk: u8,
    /// Network.
    pub network: u8,
    /// Database.
    pub database: u8,
    /// Agents.
    pub agents: u8,
    /// Queue.
    pub queue: u8,
    /// Actors.
    pub actors: u8,
    /// The whole.
    pub total: u8,
}

/// 100 up to `good`, `floor` from `bad` on, a straight line between; either may be the larger one.
fn fall(value: f64, good: f64, bad: f64, floor: f64) -> u8 {
    let part = ((value - good) / (bad - good)).clamp(0.0, 1.0);
    (100.0 - part * (100.0 - floor)).round() as u8
}

/// Scores it.
pub fn score(inputs: &Inputs) -> Scores {
    const ROOMY: u64 = 50 << 30;
    let disk = |(percent, bytes): &(f64, u64)| if *bytes >= ROOMY { 100 } else { fall(*percent, 15.0, 1.0, 0.0) };
    let (connected, all) = inputs.agents;
    let mut scores = Scores {
        cpu: fall(inputs.cpu_percent, 80.0, 100.0, 30.0),
        memory: inputs.memory_available_percent.map_or(100, |percent| fall(percent, 20.0, 2.0, 0.0)),
        disk: inputs.volumes.iter().map(disk).min().unwrap_or(100),
        network: fall(inputs.network_errors, 0.001, 0.05, 50.0),
        database: inputs.database_ms.map_or(0, |ms| fall(ms, 50.0, 2000.0, 20.0)),
        agents: (connected.min(all) * 100).checked_div(all).map_or(50, |share| u8::try_from(share).unwrap_or(100)),
        queue: fall(inputs.ready_seconds as f64, 60.0, 3600.0, 30.0),
        actors: inputs.actors_ms.map_or(0, |ms| fall(ms, 50.0, 5000.0, 0.0)),
        total: 0,
    };
    let weighted = [
        (scores.cpu, 5u32),
        (scores.memory, 10),
        (scores.disk, 15),
        (scores.network, 5),
        (scores.database, 25),
        (scores.agents, 20),
        (scores.queue, 10),
        (scores.actors, 10),
    ];
    let sum: u32 = weighted.iter().map(|(score, weight)| u32::from(*score) * weight).sum();
    let mean = u8::try_from((sum + 50) / 100).unwrap_or(100);
    scores.total = mean.min(scores.database).min(scores.actors);
    scores
}

/// The word for a whole score.
pub fn word(total: u8) -> &'static str {
    match total {
        80.. => "healthy",
        50.. => "degraded",
        _ => "unhealthy",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn well() -> Inputs {
        Inputs {
            cpu_percent: 10.0,
            memory_available_percent: Some(60.0),
            volumes: vec![(40.0, 100 << 30)],
            network_errors: 0.0,
            database_ms: Some(1.0),
            agents: (2, 2),
            ready_seconds: 0,
            actors_ms: Some(0.2),
        }
    }

    #[test]
    fn a_well_installation_has_100_and_each_part_takes_its_weight() {
        assert_eq!((score(&well()).total, word(100)), (100, "healthy"));
        let total = |change: &dyn Fn(&mut Inputs)| {
            let mut inputs = well();
            change(&mut inputs);
            score(&inputs).total
        };
        assert_eq!(total(&|inputs| inputs.agents = (0, 2)), 80);
        assert_eq!(total(&|inputs| inputs.agents = (1, 2)), 90);
        assert_eq!(total(&|inputs| inputs.agents = (0, 0)), 90);
        assert_eq!(total(&|inputs| inputs.volumes.push((1.0, 1 << 30))), 85);
        assert_eq!(total(&|inputs| inputs.memory_available_percent = Some(1.0)), 90);
        assert_eq!(total(&|inputs| inputs.ready_seconds = 100_000), 93);
        assert_eq!(total(&|inputs| inputs.cpu_percent = 100.0), 97);
        // Nothing works without these two, whatever the others say.
        assert_eq!((total(&|inputs| inputs.database_ms = None), word(0)), (0, "unhealthy"));
        assert_eq!(total(&|inputs| inputs.actors_ms = None), 0);
        assert_eq!(total(&|inputs| inputs.database_ms = Some(2000.0)), 20);
    }

    #[test]
    fn parts_fall_in_a_line_and_stay_between_0_and_100() {
        assert_eq!((fall(15.0, 15.0, 1.0, 0.0), fall(8.0, 15.0, 1.0, 0.0), fall(0.0, 15.0, 1.0, 0.0)), (100, 50, 0));
        assert_eq!((fall(-1e300, 50.0, 2000.0, 20.0), fall(1e300, 50.0, 2000.0, 20.0)), (100, 20));
        assert!(score(&Inputs { cpu_percent: f64::NAN, ..well() }).total <= 100);
        assert_eq!((word(79), word(50), word(49)), ("degraded", "degraded", "unhealthy"));
    }
}
