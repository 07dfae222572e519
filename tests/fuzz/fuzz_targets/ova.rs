//! Feeds the fuzzer's bytes to `entry::ova`. Owns nothing. A crash here is a finding.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hypersdk_fuzz::entry::ova(bytes));
