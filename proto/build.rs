//! Compiles the protocol without a protoc binary: protox parses, tonic-prost-build writes.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=hypersdk/v1/fleet.proto");
    let descriptors = protox::compile(["hypersdk/v1/fleet.proto"], ["."])?;
    // The bytes of disks are handed on as they came, without a copy.
    tonic_prost_build::configure()
        .bytes(".hypersdk.v1.Piece.data")
        .bytes(".hypersdk.v1.ConsolePiece.data")
        // A password must not come into a log by a derived Debug, nor what somebody types.
        .skip_debug([".hypersdk.v1.Account", ".hypersdk.v1.ConsolePiece"])
        .compile_fds(descriptors)?;
    Ok(())
}
