//! What every room stands on: folders, waiting, and the words for processes, clients, fleets and images.
//!
//! Owns: the life of whatever a test starts. Never: knows what is right (the rooms do). A crash here costs the test that hit it.

pub mod client;
pub mod double;
pub mod faults;
pub mod fleet;
pub mod images;
pub mod libvirtd;
pub mod live;
pub mod postgres;
pub mod process;
pub mod rfb;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The workspace's root.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lies in the workspace").to_owned()
}

/// Where the cargo profile that built this test put the product's binaries.
pub fn binary(name: &str) -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let path = me.parent().and_then(Path::parent).expect("a test binary lies in target/PROFILE/deps").join(name);
    assert!(path.is_file(), "{} is not built: run tests/run, or `cargo build --workspace --bins` first", path.display());
    path
}

/// Folder for what tests make: beside the binaries, so that hard links work and `cargo clean` takes it along.
pub fn lab() -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let target = me.ancestors().nth(3).expect("a test binary lies in target/PROFILE/deps");
    target.join("lab")
}

/// A folder that goes with its owner; after a failure it stays and is named.
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new one below `target/lab/runs`.
    pub fn new(name: &str) -> Self {
        let path = lab().join("runs").join(format!("{name}-{}", shared::ids::random_hex::<4>()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A folder inside it, made.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// A path inside it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("kept for a look: {}", self.0.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// Asks every 50 ms until the answer is Ok; after `limit` it panics with what was waited for and the last state seen.
pub async fn wait_for<T>(what: &str, limit: Duration, mut probe: impl AsyncFnMut() -> Result<T, String>) -> T {
    let start = Instant::now();
    loop {
        match probe().await {
            Ok(value) => return value,
            Err(state) if start.elapsed() > limit => panic!("waited {limit:?} for {what}; last seen: {state}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Seconds, for people who read the tests.
pub const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// A seeded source of random moments; the seed is printed so that a failure can be run again (`HYPERSDK_TEST_SEED`).
pub fn random(name: &str) -> rand::rngs::StdRng {
    use rand::{RngExt as _, SeedableRng as _};
    let seed = match std::env::var("HYPERSDK_TEST_SEED") {
        Ok(text) => text.parse().expect("HYPERSDK_TEST_SEED is a number"),
        Err(_) => rand::rng().random::<u64>(),
    };
    println!("{name}: HYPERSDK_TEST_SEED={seed}");
    rand::rngs::StdRng::seed_from_u64(seed)
}
