//! The task `healthcheck` of every service: asks a running one whether it is ready, for where there
//! is no curl, as in the image.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use clap::Subcommand;

/// How long the service may be silent. Docker's own limit for a check has to be longer.
const TIMEOUT: Duration = Duration::from_secs(4);

/// What a service's binary does instead of serving.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Task {
    /// Ask the service that listens on --listen whether it is ready, print what it says, and end
    /// with code 0 if it is, 1 if not
    Healthcheck,
}

/// Prints what the service on `listen` says about its readiness.
///
/// # Errors
/// Why it is not ready, in one line.
pub fn healthcheck(listen: SocketAddr) -> Result<(), String> {
    let address = reachable(listen);
    let answer = readiness(address).map_err(|error| {
        format!("{address}: {error}; is the service running, and on this --listen?")
    })?;
    let (head, text) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.split(' ').nth(1) == Some("200") {
        println!("{}", text.trim_end());
        return Ok(());
    }
    Err(format!("not ready: {}", text.trim_end()))
}

/// The whole answer of `/readyz`. HTTP/1.0 has it come in one piece, at whose end the connection closes.
fn readiness(address: SocketAddr) -> io::Result<String> {
    let mut connection = TcpStream::connect_timeout(&address, TIMEOUT)?;
    connection.set_read_timeout(Some(TIMEOUT))?;
    let request = format!("GET /readyz?verbose HTTP/1.0\r\nhost: {address}\r\n\r\n");
    connection.write_all(request.as_bytes())?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Where a service that listens on all addresses is reached from its own machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
