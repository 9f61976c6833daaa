//! Discovery of the logging instances. A host name counts as one instance per resolved address, so
//! a service behind one name can be scaled without configuration.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::client::{Clients, LoggingApi, LoggingClient};
use crate::config::LoggingUrl;
use crate::names::Naming;
use crate::pool::Pool;

/// Pause between two look-ups of a host name.
const LOOK_UP_INTERVAL: Duration = Duration::from_secs(3);

/// A slower look-up is logged; the last addresses stay in use.
const LONG_LOOK_UP: Duration = Duration::from_secs(6);

/// Puts the instances at these addresses into the pool, and looks host names up repeatedly until
/// the pool is dropped.
///
/// # Errors
/// A line for the operator, when two URLs have one name, a URL needs more flags, or a look-up thread cannot be
/// started.
pub(crate) fn start(
    pool: &Arc<Pool>,
    clients: &Clients,
    urls: &[LoggingUrl],
    try_timeout: Duration,
) -> Result<(), String> {
    let mut given = HashSet::new();
    for name in urls.iter().filter_map(|one| one.name.as_ref()) {
        if !given.insert(name) {
            return Err(format!(
                "two URLs of --logging have the name {name}: name each otherwise"
            ));
        }
    }
    // Those with names come first: a number that is a given name is left out.
    let (named, unnamed): (Vec<_>, Vec<_>) = urls.iter().partition(|one| one.name.is_some());
    for LoggingUrl { name, url } in named.into_iter().chain(unnamed) {
        let host = url.host_str().unwrap_or_default().to_owned();
        let clients = match url.scheme() {
            "https" => clients.securely(&host, try_timeout / 2)?,
            _ => clients.clone(),
        };
        let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
        let naming = match (name.clone(), &address) {
            (None, _) => Naming::default(),
            (Some(name), Ok(_)) => Naming::Exactly(name),
            (Some(name), Err(_)) => Naming::Numbered(name),
        };
        let origin = Origin {
            naming,
            clients,
            host,
            port: url.port_or_known_default().unwrap_or_default(),
            try_timeout,
        };
        match address {
            Ok(address) => origin.publish(pool, vec![(address, origin.port).into()]),
            Err(_) => {
                let look_ups = look_up_repeatedly(origin.host.clone(), origin.port)
                    .map_err(|error| error.to_string())?;
                tokio::spawn(publish_look_ups(Arc::downgrade(pool), origin, look_ups));
            }
        }
    }
    Ok(())
}

/// One configured address.
struct Origin {
    naming: Naming,
    clients: Clients,
    host: String,
    port: u16,
    try_timeout: Duration,
}

impl Origin {
    fn publish(&self, pool: &Pool, addresses: Vec<SocketAddr>) {
        let found = addresses.into_iter().map(|address| {
            let (clients, served) = (self.clients.clone(), pool.served_map.clone());
            let client = LoggingClient::new(clients, address, self.try_timeout, served);
            (address.to_string(), Arc::new(client) as Arc<dyn LoggingApi>)
        });
        let origin = format!("{}:{}", self.host, self.port);
        pool.set_instances(&origin, &self.naming, found.collect());
    }
}

type LookUp = io::Result<Vec<SocketAddr>>;

/// Looks a name up repeatedly until the receiver is dropped, on its own thread: a resolver may hang
/// for a minute, and a stopping runtime would wait for a thread of its pool.
fn look_up_repeatedly(host: String, port: u16) -> io::Result<mpsc::Receiver<LookUp>> {
    let (found, look_ups) = mpsc::channel(1);
    let name = "look-up".to_owned();
    thread::Builder::new().name(name).spawn(move || {
        let look_up = || (&*host, port).to_socket_addrs().map(Iterator::collect);
        while found.blocking_send(look_up()).is_ok() {
            thread::sleep(LOOK_UP_INTERVAL);
        }
    })?;
    Ok(look_ups)
}

async fn publish_look_ups(pool: Weak<Pool>, origin: Origin, mut look_ups: mpsc::Receiver<LookUp>) {
    let host = origin.host.as_str();
    loop {
        let looked_up = timeout(LONG_LOOK_UP, look_ups.recv()).await;
        let Some(pool) = pool.upgrade() else {
            return;
        };
        match looked_up {
            Ok(Some(Ok(addresses))) => {
                let instances = instances_of(host, addresses);
                if instances.is_empty() {
                    tracing::warn!(
                        host,
                        "a look-up returned no address: the last addresses stay in use"
                    );
                } else {
                    origin.publish(&pool, instances);
                }
            }
            Ok(Some(Err(error))) => {
                tracing::warn!(host, %error, "a look-up failed: the last addresses stay in use");
            }
            Err(_) => {
                tracing::warn!(host, "a look-up takes long: the last addresses stay in use");
            }
            Ok(None) => return,
        }
    }
}

/// The addresses of a name that count as instances. A scoped link-local address cannot be written
/// in a URL. The two loopback addresses are one instance; services default to the IPv4 one.
fn instances_of(host: &str, addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let has_loopback = addresses
        .iter()
        .any(|address| address.ip() == Ipv4Addr::LOCALHOST);
    let is_instance = |address: &SocketAddr| match address {
        SocketAddr::V6(scoped) if scoped.scope_id() != 0 => {
            let address = scoped.to_string();
            tracing::warn!(
                host,
                address,
                "a scoped link-local address is ignored: it cannot be written in a URL"
            );
            false
        }
        _ => !(has_loopback && address.ip() == Ipv6Addr::LOCALHOST),
    };
    addresses.into_iter().filter(is_instance).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instances(addresses: &[&str]) -> Vec<String> {
        let parsed = addresses.iter().map(|address| address.parse());
        let parsed: Result<Vec<SocketAddr>, _> = parsed.collect();
        let instances = instances_of("name", parsed.expect("addresses"));
        instances.iter().map(SocketAddr::to_string).collect()
    }

    #[test]
    fn both_loopback_addresses_are_one_instance() {
        let both = ["[::1]:8082", "127.0.0.1:8082"];
        assert_eq!(instances(&both), ["127.0.0.1:8082"]);
        assert_eq!(instances(&both[..1]), ["[::1]:8082"]);
    }

    #[test]
    fn link_local_address_with_a_scope_is_left_out() {
        let both = ["[fe80::1%2]:8082", "10.0.0.1:8082"];
        assert_eq!(instances(&both), ["10.0.0.1:8082"]);
    }
}
