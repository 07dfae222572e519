//! What a job's words mean to the pipeline: its format, how it compresses.
//!
//! Owns: these meanings. Never: refuses what a provider cannot do. A crash here costs nothing.

use shared::error::Code;
use shared::options::{Algorithm, Format, Options};

use super::Failure;
use crate::formats::{Compression, Method, deflate};
use crate::pipeline;

/// The pipeline's format for the API's word.
pub fn output_format(word: &str) -> Result<pipeline::Format, Failure> {
    match Format::from_word(word) {
        Some(Format::Raw) => Ok(pipeline::Format::Raw),
        Some(Format::Qcow2) => Ok(pipeline::Format::Qcow2),
        Some(Format::Vhdx) => Ok(pipeline::Format::Vhdx),
        Some(Format::Vhd) => Ok(pipeline::Format::Vhd),
        Some(Format::Vdi) => Ok(pipeline::Format::Vdi),
        Some(Format::Vmdk) => Ok(pipeline::Format::Vmdk),
        Some(Format::Ovf) => Ok(pipeline::Format::Ovf),
        Some(Format::Ova) => Ok(pipeline::Format::Ova),
        _ => Err(Failure::fatal(Code::NotBuilt, format!("the output format {word:?} is not built yet"))),
    }
}

/// The format that a file's name declares, as the API spells it; empty where it declares none.
pub fn declared_word(name: &str) -> &'static str {
    Format::of_name(name).map_or("", Format::word)
}

/// What the options mean for a format. VMDK is always deflate; raw never compresses; the fast level is the default.
pub fn compression(format: pipeline::Format, options: &Options) -> Option<Compression> {
    let narrow = options.narrow_window == Some(true);
    let asked = options.compress == Some(true) || options.compression.is_some() || options.level.is_some() || narrow;
    let method = match (format, options.compression) {
        (pipeline::Format::Raw | pipeline::Format::Vhdx | pipeline::Format::Vhd | pipeline::Format::Vdi, _) => return None,
        (pipeline::Format::Qcow2, _) if !asked || options.compress == Some(false) => return None,
        (pipeline::Format::Qcow2, Some(Algorithm::Zstd)) => Method::Zstd,
        _ => Method::Deflate,
    };
    let fast = if method == Method::Zstd { 1 } else { deflate::FAST };
    Some(Compression { method, level: options.level.unwrap_or(fast), narrow })
}
