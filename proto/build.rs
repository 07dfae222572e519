//! Compiles the protocol without a protoc binary: protox parses, tonic-prost-build writes.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=hypersdk/v1/fleet.proto");
    let descriptors = protox::compile(["hypersdk/v1/fleet.proto"], ["."])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
