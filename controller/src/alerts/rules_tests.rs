//! The rules one by one: when they take hold, when they let go, and that nothing is told twice.
#![allow(clippy::unwrap_used)]

use super::*;

const NOW: i64 = 1_700_000_000_000;

fn agent() -> AgentFact {
    AgentFact { name: "kvm-1".into(), connected: true, last_heard: Some(NOW), has_room: true, ..AgentFact::default() }
}

fn with_agent(change: impl FnOnce(&mut AgentFact)) -> Facts {
    let mut agent = agent();
    change(&mut agent);
    Facts { now: NOW, agents: vec![agent], ..Facts::default() }
}

fn rules(facts: &Facts, active: &BTreeSet<Key>) -> Vec<(Rule, Severity)> {
    evaluate(facts, &Thresholds::default(), active).into_iter().map(|finding| (finding.key.rule, finding.severity)).collect()
}

fn active(rule: Rule, resource: &str) -> BTreeSet<Key> {
    BTreeSet::from([Key { rule, resource: resource.into() }])
}

#[test]
fn an_agent_is_lost_after_its_time_and_until_it_is_here() {
    let none = BTreeSet::new();
    let away =
        |seconds: i64| with_agent(|agent| (agent.connected, agent.last_heard, agent.has_room) = (false, Some(NOW - seconds * 1000), false));
    assert_eq!(rules(&away(60), &none), []);
    assert_eq!(rules(&away(61), &none), [(Rule::AgentLost, Severity::Critical)]);
    // A controller that was restarted has heard nobody yet: what was lost stays lost, what was not gets its time.
    assert_eq!(rules(&away(0), &active(Rule::AgentLost, "agent kvm-1")), [(Rule::AgentLost, Severity::Critical)]);
    assert_eq!(rules(&with_agent(|_| {}), &active(Rule::AgentLost, "agent kvm-1")), []);
    // One that never came is not lost.
    assert_eq!(rules(&with_agent(|agent| (agent.connected, agent.last_heard) = (false, None)), &none), []);
}

#[test]
fn a_full_disk_is_told_by_percent_or_bytes_and_lets_go_later() {
    let none = BTreeSet::new();
    let disk = |free: u64, total: u64| Facts {
        now: NOW,
        volumes: vec![VolumeFact { resource: "controller data".into(), free, total }],
        ..Facts::default()
    };
    assert_eq!(rules(&disk(100 * GIB, 1000 * GIB), &none), []);
    assert_eq!(rules(&disk(99 * GIB, 1000 * GIB), &none), [(Rule::DiskLow, Severity::Warning)]);
    assert_eq!(rules(&disk(9 * GIB, 20 * GIB), &none), [(Rule::DiskLow, Severity::Warning)]);
    assert_eq!(rules(&disk(GIB - 1, 20 * GIB), &none), [(Rule::DiskLow, Severity::Critical)]);
    let was = active(Rule::DiskLow, "controller data");
    assert_eq!(rules(&disk(119 * GIB, 1000 * GIB), &was), [(Rule::DiskLow, Severity::Warning)]);
    assert_eq!(rules(&disk(120 * GIB, 1000 * GIB), &was), []);
    assert_eq!(rules(&disk(0, 0), &none), [], "what nobody knows is no alert");
}

#[test]
fn a_queue_is_stuck_only_where_there_is_room() {
    let none = BTreeSet::new();
    let waiting = |room: bool, seconds: i64| {
        with_agent(|agent| (agent.has_room, agent.ready, agent.oldest_ready) = (room, 3, Some(NOW - seconds * 1000)))
    };
    assert_eq!(rules(&waiting(true, 600), &none), []);
    assert_eq!(rules(&waiting(true, 601), &none), [(Rule::QueueStuck, Severity::Critical)]);
    assert_eq!(rules(&waiting(false, 10_000), &none), [], "a busy agent is no fault");
}

#[test]
fn certificates_clocks_sources_failures_and_deadlines() {
    let none = BTreeSet::new();
    let rest = |days: i64| Facts { now: NOW, certificate_until: Some(NOW / 1000 + days * DAY), ..Facts::default() };
    assert_eq!(rules(&rest(14), &none), []);
    assert_eq!(rules(&rest(13), &none), [(Rule::CertificateExpiring, Severity::Warning)]);
    assert_eq!(rules(&rest(1), &none), [(Rule::CertificateExpiring, Severity::Critical)]);
    assert_eq!(rules(&rest(-1), &none), [(Rule::CertificateExpiring, Severity::Critical)]);
    // An agent renews with ten days left: that is health, not an alert.
    let of_agent = |days: i64| with_agent(|agent| agent.certificate_until = Some(NOW / 1000 + days * DAY));
    assert_eq!(rules(&of_agent(9), &none), []);
    assert_eq!(rules(&of_agent(6), &none), [(Rule::CertificateExpiring, Severity::Warning)]);
    for (skew, wrong) in [(30_000, false), (-30_001, true), (30_001, true), (i64::MIN, true)] {
        assert_eq!(!rules(&with_agent(|agent| agent.skew_ms = Some(skew)), &none).is_empty(), wrong, "{skew}");
    }
    let failing = |failures| Facts {
        now: NOW,
        failing: vec![FailingFact { resource: "vm lab/web".into(), failures, error: "no space".into() }],
        ..Facts::default()
    };
    assert_eq!(rules(&failing(2), &none), []);
    assert_eq!(rules(&failing(3), &none), [(Rule::JobFailing, Severity::Warning)]);
    let source = Facts { now: NOW, sources: vec![SourceFact { name: "lab".into(), error: "gone".into() }], ..Facts::default() };
    assert_eq!(rules(&source, &none), [(Rule::SourceUnreachable, Severity::Warning)]);
    let late =
        Facts { now: NOW, late: vec![LateFact { job: "job-1".into(), vm_name: "web".into(), deadline: NOW - 1 }], ..Facts::default() };
    assert_eq!(rules(&late, &none), [(Rule::DeadlineMissed, Severity::Critical)]);
    let slow = |ms| Facts { now: NOW, database_ms: Some(ms), ..Facts::default() };
    assert_eq!(rules(&slow(500), &none), []);
    assert_eq!(rules(&slow(501), &none), [(Rule::DatabaseSlow, Severity::Warning)]);
    assert_eq!(rules(&slow(401), &active(Rule::DatabaseSlow, "database")), [(Rule::DatabaseSlow, Severity::Warning)]);
    assert_eq!(rules(&slow(400), &active(Rule::DatabaseSlow, "database")), []);
}

#[test]
fn an_alert_is_raised_once_and_a_blind_look_resolves_nothing() {
    let lost = with_agent(|agent| (agent.connected, agent.last_heard) = (false, Some(NOW - 100_000)));
    let found = evaluate(&lost, &Thresholds::default(), &BTreeSet::new());
    let raised = changes(&lost, &BTreeMap::new(), &found);
    assert!(matches!(raised.as_slice(), [Change::Raise(finding)] if finding.key.resource == "agent kvm-1"), "{raised:?}");
    let known = BTreeMap::from([(found[0].key.clone(), Known { id: "alert-1".into(), severity: Severity::Critical })]);
    assert_eq!(changes(&lost, &known, &found), [], "it is told once");
    assert_eq!(changes(&with_agent(|_| {}), &known, &[]), [Change::Resolve("alert-1".into(), found[0].key.clone())]);
    let milder = Finding { severity: Severity::Warning, ..found[0].clone() };
    assert_eq!(changes(&lost, &known, std::slice::from_ref(&milder)), [Change::Restate("alert-1".into(), milder)]);
    let twice = [found[0].clone(), found[0].clone()];
    assert_eq!(changes(&lost, &BTreeMap::new(), &twice).len(), 1, "one alert for a rule and a resource");
    let blind = evaluate(&Facts { now: NOW, database_away: Some("gone".into()), ..lost.clone() }, &Thresholds::default(), &BTreeSet::new());
    let changed = changes(&lost, &known, &blind);
    assert!(matches!(changed.as_slice(), [Change::Raise(finding)] if finding.key.rule == Rule::DatabaseAway), "{changed:?}");
}

#[test]
fn what_cannot_be_seen_of_an_agent_that_is_away_is_not_over() {
    let keys = [
        Key::new(Rule::DiskLow, "agent kvm-1 root exports"),
        Key::new(Rule::CertificateExpiring, "certificate kvm-1"),
        Key::new(Rule::ClockSkew, "agent kvm-1"),
        Key::new(Rule::QueueStuck, "queue kvm-1"),
    ];
    let known: BTreeMap<Key, Known> =
        keys.iter().map(|key| (key.clone(), Known { id: key.resource.clone(), severity: Severity::Warning })).collect();
    let over = |facts: &Facts| changes(facts, &known, &[]).len();
    let here = |agent: &mut AgentFact| agent.skew_ms = Some(0);
    assert_eq!(over(&with_agent(|agent| agent.connected = false)), 0);
    assert_eq!(over(&with_agent(here)), 4);
    // Connected only after its file systems were looked at: nothing is known of these.
    assert_eq!(over(&Facts { unseen: BTreeSet::from(["kvm-1".to_owned()]), ..with_agent(here) }), 0);
    // Here, and its clock was not told yet.
    assert_eq!(over(&with_agent(|_| {})), 3);
    // Another one that is away, and one that was removed.
    assert_eq!(over(&with_agent(|agent| (agent.name, agent.connected) = ("kvm-10".into(), false))), 4);
    assert_eq!(over(&Facts { now: NOW, ..Facts::default() }), 4);
}

#[test]
fn an_alert_of_a_long_resource_is_known_again() {
    let resource = format!("agent kvm-1 root {}\0", "é".repeat(600));
    let facts = Facts { now: NOW, volumes: vec![VolumeFact { resource, free: 119 * GIB, total: 1000 * GIB }], ..Facts::default() };
    let first = evaluate(
        &Facts { volumes: vec![VolumeFact { free: 0, ..facts.volumes[0].clone() }], ..facts.clone() },
        &Thresholds::default(),
        &BTreeSet::new(),
    );
    let row = super::super::store::row(&first[0], NOW);
    let key = Key { rule: Rule::DiskLow, resource: row.resource };
    assert_eq!(key, first[0].key);
    // Also by the rule that lets go later than it takes hold.
    assert_eq!(rules(&facts, &BTreeSet::from([key])), [(Rule::DiskLow, Severity::Warning)]);
}
