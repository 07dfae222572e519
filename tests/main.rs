//! One test binary over real parts: the processes that people run, real disk images, qemu-img, QEMU and Postgres as the oracles.
//!
//! Owns: the proof of what the project promises (one file per room) and the harness under it.
//! Never: links the product (only its vocabulary), fakes a part, skips silently: what is missing fails and says what to install.
//! A crash here costs a test run; processes die with it (parent-death signal), folders of failed tests stay under `target/lab/runs`.
// The harness is the one place outside the product that opens paths, dials and starts processes: it stands for the people who do.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

mod harness;

mod access;
mod architecture;
mod backup;
mod bad_input;
mod boot;
mod carbon;
mod cli;
mod consistency;
mod console;
mod contract;
mod deploy;
mod files;
mod guest;
mod identity;
mod inventory;
mod jobs;
mod jobtypes;
mod libvirt;
mod load;
mod long;
mod memory;
mod migrate;
mod no_trace;
mod operations;
mod pools;
mod schedules;
mod snapshots;
mod survival;
mod system;
mod uploads;
mod vsphere;
