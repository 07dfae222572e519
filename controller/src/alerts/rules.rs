//! The rules, pure: what is wrong by these facts, and what that changes.
//!
//! ```text
//! (none) ─found─► active ─found, more or less severe, or not to be seen─► active ─not found─► resolved (a new finding is a new alert)
//! ```
//! Owns: every decision of the room. Never: reads or writes anything. A crash here costs one look.

use std::collections::{BTreeMap, BTreeSet};

use super::thresholds::Thresholds;

const GIB: u64 = 1 << 30;
const DAY: i64 = 24 * 3600;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }
        impl $name {
            /// Every word.
            pub const ALL: &[&str] = &[$($word,)*];
            /// The word as it is stored and shown.
            pub fn word(self) -> &'static str { match self { $($name::$variant => $word,)* } }
            /// The variant of a word.
            pub fn from_word(word: &str) -> Option<Self> { match word { $($word => Some($name::$variant),)* _ => None } }
        }
    };
}

words! {
    /// How bad it is.
    Severity {
        /// Worth knowing.
        Info = "info",
        /// To be mended soon.
        Warning = "warning",
        /// Work stands still, or will.
        Critical = "critical",
    }
}

words! {
    /// What was looked at.
    Rule {
        /// An agent was here and is away too long.
        AgentLost = "agent_lost",
        /// A file system that we write to is nearly full.
        DiskLow = "disk_low",
        /// Jobs are ready, their agent has room, and nothing happens.
        QueueStuck = "queue_stuck",
        /// One VM's jobs fail again and again.
        JobFailing = "job_failing",
        /// A certificate runs out.
        CertificateExpiring = "certificate_expiring",
        /// A connection's inventory cannot be read.
        SourceUnreachable = "source_unreachable",
        /// An agent's clock is wrong, or ours is.
        ClockSkew = "clock_skew",
        /// The database answers late.
        DatabaseSlow = "database_slow",
        /// The database does not answer.
        DatabaseAway = "database_away",
        /// A job is not done and its deadline is over.
        DeadlineMissed = "deadline_missed",
    }
}

/// What is known of an agent.
#[derive(Clone, Debug, Default)]
pub struct AgentFact {
    /// Its name.
    pub name: String,
    /// It has a session.
    pub connected: bool,
    /// When it was heard last, or when we began to listen; `None` where it never said Hello.
    pub last_heard: Option<i64>,
    /// Live jobs that only it can run.
    pub jobs: u64,
    /// End of its certificate, seconds since 1970.
    pub certificate_until: Option<i64>,
    /// Its clock less ours, in milliseconds.
    pub skew_ms: Option<i64>,
    /// It could take a job now.
    pub has_room: bool,
    /// Jobs that could be given to it.
    pub ready: u64,
    /// Since when the oldest of them could.
    pub oldest_ready: Option<i64>,
}

/// A file system that we write to.
#[derive(Clone, Debug)]
pub struct VolumeFact {
    /// `agent kvm-1 root exports`, `controller data`.
    pub resource: String,
    /// Bytes.
    pub free: u64,
    /// Bytes; 0 where nobody knows.
    pub total: u64,
}

/// A VM whose last jobs failed.
#[derive(Clone, Debug)]
pub struct FailingFact {
    /// `vm PROVIDER/NAME`.
    pub resource: String,
    /// Failures in a row.
    pub failures: u64,
    /// What the last one said.
    pub error: String,
}

/// A connection whose inventory cannot be read.
#[derive(Clone, Debug)]
pub struct SourceFact {
    /// Its name.
    pub name: String,
    /// What its agent said.
    pub error: String,
}

/// A job that is not done in time.
#[derive(Clone, Debug)]
pub struct LateFact {
    /// Its id.
    pub job: String,
    /// Its VM.
    pub vm_name: String,
    /// Milliseconds since 1970.
    pub deadline: i64,
}

/// Everything that the rules look at.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Milliseconds since 1970.
    pub now: i64,
    /// The agents that were not removed.
    pub agents: Vec<AgentFact>,
    /// Names of those whose file systems are not among the volumes, since they were not connected when these were gathered.
    pub unseen: BTreeSet<String>,
    /// File systems.
    pub volumes: Vec<VolumeFact>,
    /// VMs whose jobs fail.
    pub failing: Vec<FailingFact>,
    /// End of the REST certificate, seconds since 1970.
    pub certificate_until: Option<i64>,
    /// Connections in error.
    pub sources: Vec<SourceFact>,
    /// Jobs past their deadline.
    pub late: Vec<LateFact>,
    /// The quickest of the last three answers of the database, milliseconds.
    pub database_ms: Option<u64>,
    /// Why the database could not be asked; then nothing else is known that comes from it.
    pub database_away: Option<String>,
}

impl Facts {
    /// Whether this look could not see how it is with a resource: what is not seen is neither wrong nor over. An agent that was removed
    /// is nobody's, and its alerts are over.
    fn is_unknown(&self, key: &Key) -> bool {
        let agent = |which: &dyn Fn(&AgentFact) -> bool| self.agents.iter().any(which);
        let silent = |agent: &AgentFact| !agent.connected || self.unseen.contains(&agent.name);
        match key.rule {
            Rule::DiskLow => {
                let volume = self.volumes.iter().any(|volume| volume.total == 0 && Key::new(key.rule, &volume.resource) == *key);
                volume || agent(&|agent| silent(agent) && key.resource.starts_with(&format!("agent {} ", agent.name)))
            }
            Rule::CertificateExpiring => agent(&|agent| silent(agent) && key.resource == format!("certificate {}", agent.name)),
            Rule::ClockSkew => {
                agent(&|agent| (silent(agent) || agent.skew_ms.is_none()) && key.resource == format!("agent {}", agent.name))
            }
            Rule::QueueStuck => agent(&|agent| silent(agent) && key.resource == format!("queue {}", agent.name)),
            // Three answers are needed, also after a restart.
            Rule::DatabaseSlow => self.database_ms.is_none(),
            _ => false,
        }
    }
}

/// Longest resource in characters.
const RESOURCE: usize = 500;

/// What an alert is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The rule.
    pub rule: Rule,
    /// The resource.
    pub resource: String,
}

impl Key {
    /// Of what a rule found. The resource is as the store keeps it, or an alert would not be known again.
    pub fn new(rule: Rule, resource: &str) -> Self {
        Self { rule, resource: resource.chars().filter(|letter| *letter != '\0').take(RESOURCE).collect() }
    }
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What about.
    pub key: Key,
    /// How bad.
    pub severity: Severity,
    /// A sentence with what is wrong and what would mend it.
    pub message: String,
}

fn finding(rule: Rule, resource: &str, severity: Severity, message: String) -> Finding {
    Finding { key: Key::new(rule, resource), severity, message }
}

/// What is wrong. `active` is what was wrong a moment ago: some rules let go later than they take hold, so that nothing flaps.
pub fn evaluate(facts: &Facts, at: &Thresholds, active: &BTreeSet<Key>) -> Vec<Finding> {
    if let Some(cause) = &facts.database_away {
        let message = format!("the database does not answer: {cause}; jobs that run go on, nothing new can be stored");
        return vec![finding(Rule::DatabaseAway, "database", Severity::Critical, message)];
    }
    let was = |rule: Rule, resource: &str| active.contains(&Key::new(rule, resource));
    let mut found = Vec::new();
    for agent in &facts.agents {
        let resource = format!("agent {}", agent.name);
        found.extend(agent_rules(facts, at, agent, &resource, &was));
    }
    for volume in facts.volumes.iter().filter(|volume| volume.total > 0) {
        // A fifth more room is wanted back before it is over.
        let scale = if was(Rule::DiskLow, &volume.resource) { 6 } else { 5 };
        let percent_low = u128::from(volume.free) * 500 < u128::from(volume.total) * u128::from(at.disk_free_percent) * scale;
        let bytes_low = u128::from(volume.free) * 5 < u128::from(at.disk_free_gib) * u128::from(GIB) * scale;
        if percent_low || bytes_low {
            let percent = volume.free as f64 * 100.0 / volume.total as f64;
            let severity = if volume.free < GIB || percent < 2.0 { Severity::Critical } else { Severity::Warning };
            let free = volume.free as f64 / GIB as f64;
            let message = format!("{} has {free:.1} GiB free ({percent:.0} %); remove old exports or give it more room", volume.resource);
            found.push(finding(Rule::DiskLow, &volume.resource, severity, message));
        }
    }
    for failing in facts.failing.iter().filter(|failing| failing.failures >= at.job_failures) {
        let message = format!("{} jobs in a row failed, the last with: {}", failing.failures, failing.error);
        found.push(finding(Rule::JobFailing, &failing.resource, Severity::Warning, message));
    }
    if let Some(until) = facts.certificate_until {
        let what = "the REST certificate";
        let mend =
            "replace it (tls_cert, tls_key), or remove rest-cert.pem and rest-key.pem from the data directory for a new self-signed one";
        found.extend(expiring("certificate rest", what, mend, until, facts.now, at.certificate_days));
    }
    for source in &facts.sources {
        let message = format!("the inventory of `{}` cannot be read: {}", source.name, source.error);
        found.push(finding(Rule::SourceUnreachable, &format!("connection {}", source.name), Severity::Warning, message));
    }
    if let Some(ms) = facts.database_ms.filter(|ms| slow(*ms, at, was(Rule::DatabaseSlow, "database"))) {
        let message = format!("the database takes {ms} ms and longer to answer; look at its load and its disk");
        found.push(finding(Rule::DatabaseSlow, "database", Severity::Warning, message));
    }
    for late in &facts.late {
        let hours = (facts.now.saturating_sub(late.deadline)) as f64 / 3_600_000.0;
        let message = format!("{} of `{}` is not done {hours:.1} h after its deadline", late.job, late.vm_name);
        found.push(finding(Rule::DeadlineMissed, &format!("job {}", late.job), Severity::Critical, message));
    }
    found
}

/// Slow above the threshold, and no longer below four fifths of it.
fn slow(ms: u64, at: &Thresholds, already: bool) -> bool {
    if already { ms.saturating_mul(5) > at.database_slow_ms.saturating_mul(4) } else { ms > at.database_slow_ms }
}

fn agent_rules(facts: &Facts, at: &Thresholds, agent: &AgentFact, resource: &str, was: &dyn Fn(Rule, &str) -> bool) -> Vec<Finding> {
    let mut found = Vec::new();
    let limit = |seconds: u64| i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(1000);
    if let (false, Some(last)) = (agent.connected, agent.last_heard) {
        let away = facts.now.saturating_sub(last);
        // After a restart nobody was heard yet; what was lost before stays lost until it is here.
        if was(Rule::AgentLost, resource) || away > limit(at.agent_lost_seconds) {
            let jobs = if agent.jobs > 0 { format!("; {} jobs wait for it", agent.jobs) } else { String::new() };
            let message = format!("agent `{}` is away for {} s{jobs}; start it again, or remove it", agent.name, away / 1000);
            found.push(finding(Rule::AgentLost, resource, Severity::Critical, message));
        }
    }
    if let (true, Some(oldest)) = (agent.has_room, agent.oldest_ready)
        && facts.now.saturating_sub(oldest) > limit(at.queue_stuck_seconds)
    {
        let minutes = facts.now.saturating_sub(oldest) / 60_000;
        let message = format!("{} jobs could run at agent `{}`, which has room, the oldest for {minutes} min", agent.ready, agent.name);
        found.push(finding(Rule::QueueStuck, &format!("queue {}", agent.name), Severity::Critical, message));
    }
    if let Some(until) = agent.certificate_until {
        let (what, mend) = (format!("the certificate of agent `{}`", agent.name), "restart the agent, it renews at its start");
        found.extend(expiring(&format!("certificate {}", agent.name), &what, mend, until, facts.now, at.agent_certificate_days));
    }
    if let Some(skew) = agent.skew_ms {
        let most = if was(Rule::ClockSkew, resource) { limit(at.clock_skew_seconds) / 5 * 4 } else { limit(at.clock_skew_seconds) };
        if skew.saturating_abs() > most {
            let (seconds, side) = (skew.saturating_abs() / 1000, if skew > 0 { "ahead of" } else { "behind" });
            let message = format!("the clock of agent `{}` is {seconds} s {side} ours; run NTP on both hosts", agent.name);
            found.push(finding(Rule::ClockSkew, resource, Severity::Warning, message));
        }
    }
    found
}

fn expiring(resource: &str, what: &str, mend: &str, until: i64, now: i64, days: u64) -> Option<Finding> {
    let left = until.saturating_sub(now / 1000);
    if left >= i64::try_from(days).unwrap_or(i64::MAX).saturating_mul(DAY) {
        return None;
    }
    let (severity, when) = match left {
        ..0 => (Severity::Critical, "has run out".to_owned()),
        0..172_800 => (Severity::Critical, format!("runs out in {} h", left / 3600)),
        _ => (Severity::Warning, format!("runs out in {} days", left / DAY)),
    };
    Some(finding(Rule::CertificateExpiring, resource, severity, format!("{what} {when}; {mend}")))
}

/// An alert that is active.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its id.
    pub id: String,
    /// How bad it was when it was raised or last changed.
    pub severity: Severity,
}

/// What a look changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new alert.
    Raise(Finding),
    /// It got worse or better.
    Restate(String, Finding),
    /// It is over.
    Resolve(String, Key),
}

/// Compares what is wrong now with what was. What this look could not see stays as it is, and where the database is away all the rest.
pub fn changes(facts: &Facts, active: &BTreeMap<Key, Known>, found: &[Finding]) -> Vec<Change> {
    let blind = found.iter().any(|finding| finding.key.rule == Rule::DatabaseAway);
    let mut seen = BTreeSet::new();
    let mut changes = Vec::new();
    for finding in found.iter().filter(|finding| seen.insert(&finding.key)) {
        match active.get(&finding.key) {
            None => changes.push(Change::Raise(finding.clone())),
            Some(known) if known.severity != finding.severity => changes.push(Change::Restate(known.id.clone(), finding.clone())),
            Some(_) => {}
        }
    }
    for (key, known) in active.iter().filter(|(key, _)| !blind && !seen.contains(key) && !facts.is_unknown(key)) {
        changes.push(Change::Resolve(known.id.clone(), key.clone()));
    }
    changes
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
