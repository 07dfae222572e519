//! The agent's format parsers and the functions that feed them, built for a fuzzer.
//!
//! Owns: nothing; the sources are the agent's own. Never: part of the product. A crash here costs nothing.
#![allow(dead_code, missing_docs, reason = "the parsers' writers come along and are not called")]

// The parsers say `shared::vm`: here that is this crate, with the one file of `shared` that they use.
extern crate self as shared;

pub mod entry;
#[path = "../../../agent/src/formats/mod.rs"]
pub mod formats;
#[path = "../../../shared/src/vm.rs"]
pub mod vm;
