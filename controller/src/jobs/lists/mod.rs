//! Lists of jobs: `GET /jobs` over hundreds of thousands of rows, in pages that hold together while jobs are made and move.
//!
//! ```text
//! service ─► memory: known total? the mark that the last page ended at?
//!         └► store: what does the provider's word mean? few matches or many? ─► one query for the page, one for an unknown total
//! ```
//! Owns: the queries of the list, the totals that are still right, the marks of pages that were answered.
//! Never: reads a table to its end for a page; lets a page depend on rows that came or went before it.
//! A crash here costs the marks: the next page of a walk that was under way is found by counting rows.
//!
//! **Pages under writes.** `offset` alone counts rows, and rows move while somebody pages: a new job shifts all others, a job that starts
//! leaves the list of queued ones. So the controller remembers, for a caller and a query, the last row of each page that it answered. A
//! request that goes on at the end of such a page goes on behind that row by its sort key, wherever it stands by then. So nothing is
//! shown twice and nothing that stood all along is skipped. An offset that no page ended at counts rows, but only rows as old as the
//! first page. `pagination.next` says the mark itself, for `?after=`: it needs no memory and works on every controller.
//! What no page can promise: a row whose own sort key changes meanwhile (`updated_at`, `status`) moves in the list, as it should.

pub mod memory;
pub mod service;
pub mod store;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests;
