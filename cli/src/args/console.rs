//! `hypersdk console`: what it takes.
//!
//! Owns: its part of the clap tree. Never: does anything. A crash here costs nothing.

use std::net::SocketAddr;

use clap::Args;

/// `hypersdk console`
#[derive(Args)]
#[command(next_line_help = true, after_help = "Whoever may connect to that port of this host is let through to the VM.")]
pub struct Console {
    /// Name, inventory path or id of the VM
    pub vm: String,
    /// Connection or kind; default: the one that has a VM of this name
    #[arg(long)]
    pub provider: Option<String>,
    /// Loopback address for your viewer; port 0: any
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDR", value_parser = loopback)]
    pub listen: SocketAddr,
}

/// What goes over it is not encrypted until it is in the hands of this command.
fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text.parse().map_err(|_| "an address is IP:PORT, as 127.0.0.1:5901".to_owned())?;
    match address.ip().is_loopback() {
        true => Ok(address),
        false => Err("only addresses of this host's loopback: VNC is not encrypted; from elsewhere come by ssh -L".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_else_reaches_the_port() {
        assert!(loopback("127.0.0.1:5901").is_ok() && loopback("[::1]:0").is_ok());
        for bad in ["0.0.0.0:5901", "10.0.0.1:5901", "[::]:1", "5901", "localhost:1"] {
            assert!(loopback(bad).is_err(), "{bad}");
        }
    }
}
