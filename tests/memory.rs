//! Memory and time follow the data, not the size: a 64 GiB disk with 1 GiB of data.
//!
//! Owns: the bounds of the README's table. Never: measures anything else at the same time (it runs alone).
//! A crash here costs the test.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::client::file_of;
use crate::harness::fleet::{Fleet, Plan};
use crate::harness::images::{identical, pattern};
use crate::harness::seconds;

const GIB: u64 = 1 << 30;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_64_gib_disk_with_1_gib_of_data_costs_as_1_gib() {
    // 64 areas of 16 MiB, spread over the whole disk.
    let areas: Vec<(u64, u64)> = (0..64).map(|n| (n * GIB + n * 12_345 * 512, GIB / 64)).collect();
    let mut fleet = Fleet::start("memory", Plan::plain(), |vms| pattern(&vms.join("large.raw"), 64 * GIB, &areas, 21)).await;
    for (format, options) in [("qcow2", json!({})), ("raw", json!({})), ("qcow2", json!({"compress": true})), ("ova", json!({}))] {
        let start = Instant::now();
        let id = fleet.client.export("large", format, options.clone()).await;
        let job = fleet.client.completed(&id, seconds(180)).await;
        let took = start.elapsed();
        let (agent, controller) = (fleet.agents[0].process().peak_mib(), fleet.controller.process().peak_mib());
        println!(
            "64 GiB with 1 GiB of data to {format} {options}: {:.1} s, agent {agent} MiB, controller {controller} MiB",
            took.as_secs_f64()
        );
        assert!(agent < 256 && controller < 128, "agent {agent} MiB of 256, controller {controller} MiB of 128");
        // Sixty-four times the data would take minutes.
        assert!(took < Duration::from_secs(60), "{took:?}");
        assert!(job["bytes_total"].as_u64().is_some_and(|data| data < GIB + GIB / 8), "holes are no data: {job:#}");
        if format != "ova" {
            identical(("raw", &fleet.vms().join("large.raw")), (format, &file_of(&job, &format!(".{format}"))));
        }
        std::fs::remove_dir_all(fleet.exports().join(&id)).unwrap();
    }
}
