//! libvirt's client, asked for one connection.
//!
//! Owns: which URIs are taken, and how many questions go into one process. Never: passes on what a URI could make libvirt start; puts a name
//! into a command line (domains are called by their UUID). A crash here costs one answer.
//! Source: libvirt, virsh(1) and Connection URIs.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::domain::Facts;
use crate::egress;
use crate::exec::{self, Following, Tool};

/// Longest time for a question.
const TIME: Duration = Duration::from_secs(25);
/// Longest time for the sizes of some domains' disks.
const SIZES: Duration = Duration::from_secs(5);
/// Most bytes of an answer.
const MOST: usize = 64 << 20;
/// Domains asked about in one process.
const AT_ONCE: usize = 100;
/// How long one process listens.
pub const LISTEN: Duration = Duration::from_secs(60);

/// Sizes are asked for while this is read, backup jobs begin while it is written: QEMU 7.2 ends with a failed assertion (`qcow2_get_specific_info`)
/// where it is asked about its nodes while it opens the scratch files of a backup, and takes the guest with it.
pub static OPENING: RwLock<()> = RwLock::new(());

/// For how long sizes are taken as they were told: disks seldom grow.
const FRESH: Duration = Duration::from_secs(600);
/// Domains whose sizes are remembered.
const MOST_KNOWN: usize = 20_000;

/// Which sizes of disks will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// Those that were told a while ago: for whoever looks.
    Known,
    /// Those of now: for whoever reads the disks.
    Fresh,
}

/// Sizes of a domain's disks, as they were told.
struct Known {
    /// Of these disks, in this state.
    of: blake3::Hash,
    at: Instant,
    capacities: HashMap<String, u64>,
}

/// By URI and domain.
static KNOWN: LazyLock<Mutex<HashMap<(String, String), Known>>> = LazyLock::new(Mutex::default);

/// What a domain's sizes belong to: its state, and which disks it has.
fn disks_key(of_one: &[&str]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let of_disks = |line: &&str| line.contains("<source ") || line.contains("<target ");
    if let [xml, state, ..] = of_one {
        hasher.update(state.trim().as_bytes());
        xml.lines().filter(of_disks).for_each(|line| {
            hasher.update(line.as_bytes());
        });
    }
    hasher.finalize()
}

/// Where a libvirt is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    text: String,
    /// Whether its disks' files are this host's.
    pub is_here: bool,
}

impl Uri {
    /// Takes a URI: `qemu:///system`, `qemu:///session`, `qemu+ssh://[USER@]HOST[:PORT]/system`, `qemu+tls://HOST[:PORT]/system`, and libvirt's
    /// own `test:///default`. Parameters are refused: some of them start programs.
    ///
    /// # Errors
    /// A sentence that says what would be taken.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            let shown: String = text.chars().take(80).collect();
            format!("{shown:?} is no libvirt URI that is taken: qemu:///system, qemu+ssh://USER@HOST/system or qemu+tls://HOST/system")
        };
        if matches!(text, "qemu:///system" | "qemu:///session" | "test:///default") {
            return Ok(Self { text: text.to_owned(), is_here: text != "test:///default" });
        }
        let (transport, rest) = text.strip_prefix("qemu+").and_then(|rest| rest.split_once("://")).ok_or_else(wrong)?;
        let (authority, path) = rest.split_once('/').ok_or_else(wrong)?;
        if !matches!(transport, "ssh" | "tls") || !matches!(path, "system" | "session") {
            return Err(wrong());
        }
        let (user, place) = authority.rsplit_once('@').map_or((None, authority), |(user, place)| (Some(user), place));
        let (host, port) = place.split_once(':').map_or((place, None), |(host, port)| (host, Some(port)));
        let is_word = |word: &str| {
            let first = word.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
            first && word.len() <= 253 && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
        };
        let good = is_word(host) && user.is_none_or(is_word) && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0));
        if !good {
            return Err(wrong());
        }
        if !egress::permits(host) {
            return Err(format!("{host} may not be dialled: it is a link-local, metadata or unspecified address"));
        }
        // Nobody is there to type a password.
        let text = if transport == "ssh" { format!("{text}?no_tty=1") } else { text.to_owned() };
        Ok(Self { text, is_here: false })
    }

    /// Asks a question; answers what virsh says.
    pub fn ask(&self, arguments: &[&str]) -> Result<String, exec::Error> {
        self.ask_within(arguments, TIME)
    }

    /// The same where virsh tells a figure only in the sentence that it leaves out otherwise.
    pub fn ask_aloud(&self, arguments: &[&str]) -> Result<String, exec::Error> {
        self.said(&["-c", self.text.as_str()], arguments, TIME)
    }

    /// The same for an order that may take longer than a question.
    pub fn ask_within(&self, arguments: &[&str], time: Duration) -> Result<String, exec::Error> {
        self.said(&["-q", "-c", self.text.as_str()], arguments, time)
    }

    fn said(&self, first: &[&str], arguments: &[&str], time: Duration) -> Result<String, exec::Error> {
        let said = exec::run(Tool::Virsh, &[first, arguments].concat(), time, MOST)?;
        Ok(String::from_utf8_lossy(&said).into_owned())
    }

    /// UUIDs of all domains.
    pub fn domains(&self) -> Result<Vec<String>, exec::Error> {
        let said = self.ask(&["list", "--all", "--uuid"])?;
        Ok(said.lines().map(str::trim).filter(|line| is_uuid(line)).map(str::to_owned).collect())
    }

    /// XML and facts of domains; one that has gone meanwhile is not among them.
    pub fn describe(&self, domains: &[String], sizes: Sizes) -> Result<Vec<(String, Facts)>, exec::Error> {
        let mut described = Vec::with_capacity(domains.len());
        let mut pools = HashMap::new();
        for some in domains.chunks(AT_ONCE) {
            // Parts are told apart by a word that nobody can have put into a description.
            let mark = shared::ids::random_hex::<16>();
            let about =
                |id: &String| ["dumpxml", "domstate", "snapshot-list --name"].map(|what| format!("{what} {id}; echo {mark}; ")).concat();
            let commands: String = some.iter().filter(|id| is_uuid(id)).map(about).collect();
            // What fails for one domain is left out, and the rest is told all the same: the last word decides, which is `echo`.
            let said = self.ask(&[&commands])?;
            let parts: Vec<&str> = said.split(&mark).collect();
            // Sizes are QEMU's word; one that hangs costs only these, and none is disturbed for what is known.
            let wants = |id: &String, of_one: &[&str]| sizes == Sizes::Fresh || self.known(id, of_one).is_none();
            let asked = some.iter().filter(|id| is_uuid(id)).zip(parts.chunks_exact(3)).filter(|(id, of_one)| wants(id, of_one));
            let asked: Vec<&String> = asked.map(|(id, _)| id).collect();
            let about: String = asked.iter().map(|id| format!("domblkinfo --all {id}; echo {mark}; ")).collect();
            let told = if asked.is_empty() {
                String::new()
            } else {
                let _nothing_opens = OPENING.read().unwrap_or_else(PoisonError::into_inner);
                self.ask_within(&[&about], SIZES).unwrap_or_default()
            };
            let told: HashMap<&String, &str> = asked.into_iter().zip(told.split(&mark)).collect();
            for (id, of_one) in some.iter().filter(|id| is_uuid(id)).zip(parts.chunks_exact(3)) {
                if let [xml, state, snapshots] = of_one
                    && !xml.trim().is_empty()
                {
                    let (xml, mut facts) = (xml.trim().to_owned(), facts(state, snapshots, told.get(id).copied().unwrap_or_default()));
                    if told.contains_key(id) {
                        self.learn(id, of_one, &facts.capacities);
                    } else {
                        facts.capacities = self.known(id, of_one).unwrap_or_default();
                    }
                    facts.volumes = self.paths(&xml, &mut pools);
                    described.push((xml, facts));
                }
            }
        }
        Ok(described)
    }

    /// The sizes of a domain's disks, where they were told a while ago and the domain has had the same disks and state since.
    fn known(&self, id: &str, of_one: &[&str]) -> Option<HashMap<String, u64>> {
        let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get(&(self.text.clone(), id.to_owned()))?;
        (known.of == disks_key(of_one) && known.at.elapsed() < FRESH).then(|| known.capacities.clone())
    }

    fn learn(&self, id: &str, of_one: &[&str], capacities: &HashMap<String, u64>) {
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST_KNOWN {
            known.clear();
        }
        if !capacities.is_empty() {
            let now = Known { of: disks_key(of_one), at: Instant::now(), capacities: capacities.clone() };
            known.insert((self.text.clone(), id.to_owned()), now);
        }
    }

    /// Where the volumes lie that a domain's disks are; those that are found. `pools`: what was heard of pools so far.
    fn paths(&self, xml: &str, pools: &mut HashMap<String, String>) -> HashMap<(String, String), String> {
        // Most domains have none, and are not parsed for that.
        if !xml.contains(" volume=") {
            return HashMap::new();
        }
        let path = |(pool, volume): (String, String)| {
            // One that hangs or is off is asked once.
            let ask = |pool: &String| self.ask_within(&["vol-list", "--pool", pool], SIZES).unwrap_or_default();
            let listed = pools.entry(pool.clone()).or_insert_with_key(ask);
            let path = path_of(listed, &volume)?;
            Some(((pool, volume), path))
        };
        super::domain::volumes(xml).into_iter().filter_map(path).collect()
    }

    /// Listens to everything that happens; ends by itself after a while.
    pub fn listen(&self) -> Result<Following, exec::Error> {
        let seconds = LISTEN.as_secs().to_string();
        Following::start(Tool::Virsh, &["-q", "-c", self.text.as_str(), "event", "--all", "--loop", "--timeout", seconds.as_str()])
    }
}

/// Whether a text is a UUID and nothing else.
pub fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| if matches!(at, 8 | 13 | 18 | 23) { byte == b'-' } else { byte.is_ascii_hexdigit() })
}

/// The path of a volume in what `vol-list` says: name, blanks, path.
fn path_of(listed: &str, volume: &str) -> Option<String> {
    let path = |line: &str| {
        let rest = line.trim().strip_prefix(volume)?;
        Some(rest.trim_start().to_owned()).filter(|path| path.starts_with('/') && rest.starts_with(' '))
    };
    listed.lines().find_map(path)
}

fn facts(state: &str, snapshots: &str, sizes: &str) -> Facts {
    let lines = |text: &str| text.lines().filter(|line| !line.trim().is_empty()).count();
    let size = |line: &str| {
        // Target, capacity, allocation, physical.
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    let capacities: HashMap<String, u64> = sizes.lines().filter_map(size).collect();
    Facts {
        state: state.trim().to_owned(),
        snapshots: u32::try_from(lines(snapshots)).unwrap_or(u32::MAX),
        capacities,
        volumes: HashMap::new(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_starts_nothing_but_a_connection() {
        for (good, here) in [
            ("qemu:///system", true),
            ("qemu+ssh://root@kvm-1.example.org/system", false),
            ("qemu+ssh://kvm1:2222/system", false),
            ("qemu+tls://10.0.0.5/system", false),
        ] {
            assert_eq!(Uri::parse(good).map(|uri| uri.is_here), Ok(here), "{good}");
        }
        for bad in [
            "",
            "qemu:///system?socket=/tmp/x",
            "qemu+ext:///system?command=/bin/sh",
            "qemu+ssh://host/system?command=/bin/sh",
            "qemu+ssh://-oProxyCommand=x/system",
            "qemu+ssh://a b/system",
            "qemu+ssh://host/system#x",
            "qemu+ssh://host/",
            "qemu+ssh://host:0/system",
            "qemu+ssh://host:99999/system",
            "qemu+tcp://host/system",
            "qemu+tls://169.254.169.254/system",
            "xen:///",
            "lxc:///",
            "test:///etc/passwd",
        ] {
            assert!(Uri::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn facts_are_what_virsh_says() {
        let said = facts("\nshut off\n\n", "a\nb c\n\n", "\n vda  268435456 30000000 30000000\n vdb  - - -\n");
        assert_eq!((said.state.as_str(), said.snapshots), ("shut off", 2));
        assert_eq!(said.capacities, HashMap::from([("vda".to_owned(), 268_435_456)]));
        let listed = " a b.qcow2   /srv/p/a b.qcow2\n a    /srv/p/a\n";
        assert_eq!(path_of(listed, "a").as_deref(), Some("/srv/p/a"));
        assert_eq!(path_of(listed, "a b.qcow2").as_deref(), Some("/srv/p/a b.qcow2"));
        assert_eq!((path_of(listed, "b"), path_of(listed, "")), (None, None));
        assert!(is_uuid("6695eb01-f6a4-8304-79aa-97f2502e193f") && !is_uuid("6695eb01-f6a4-8304-79aa-97f2502e193;"));
    }
}
