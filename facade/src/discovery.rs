//! Finds the logging instances behind the configured addresses. A host name that resolves to
//! several addresses is several instances, so scaling a service behind one name is enough.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use reqwest::{Client, Url};

use crate::client::{Logging, LoggingClient};
use crate::pool::Pool;

/// How often host names are looked up again.
const LOOK_UP_INTERVAL: Duration = Duration::from_secs(3);

/// A look-up that takes longer has failed; the last good answer stays.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(3);

/// Puts the instances at these addresses into the pool, and keeps looking up those that are host
/// names for as long as the pool is there.
pub(crate) fn start(pool: &Arc<Pool>, http: &Client, urls: &[Url], try_timeout: Duration) {
    for url in urls {
        let origin = Origin {
            http: http.clone(),
            host: url.host_str().unwrap_or_default().to_owned(),
            port: url.port_or_known_default().unwrap_or_default(),
            try_timeout,
        };
        match origin.host.trim_matches(['[', ']']).parse::<IpAddr>() {
            Ok(address) => origin.publish(pool, &[(address, origin.port).into()]),
            Err(_) => drop(tokio::spawn(look_up_again(Arc::downgrade(pool), origin))),
        }
    }
}

/// One configured address.
struct Origin {
    http: Client,
    host: String,
    port: u16,
    try_timeout: Duration,
}

impl Origin {
    fn publish(&self, pool: &Pool, addresses: &[SocketAddr]) {
        let found = addresses.iter().map(|address| {
            let (http, served) = (self.http.clone(), pool.served_map.clone());
            let client = LoggingClient::new(http, *address, self.try_timeout, served);
            (address.to_string(), Arc::new(client) as Arc<dyn Logging>)
        });
        let origin = format!("{}:{}", self.host, self.port);
        pool.set_instances(&origin, found.collect());
    }
}

async fn look_up_again(pool: Weak<Pool>, origin: Origin) {
    loop {
        let looking_up = tokio::net::lookup_host((origin.host.as_str(), origin.port));
        let looked_up = tokio::time::timeout(LOOK_UP_TIMEOUT, looking_up).await;
        let addresses = match looked_up {
            Ok(Ok(addresses)) => addresses.collect(),
            Ok(Err(_)) | Err(_) => Vec::new(),
        };
        let Some(pool) = pool.upgrade() else {
            return;
        };
        if addresses.is_empty() {
            tracing::warn!(
                host = origin.host,
                "a look-up failed, the last good answer stays"
            );
        } else {
            origin.publish(&pool, &addresses);
        }
        drop(pool);
        tokio::time::sleep(LOOK_UP_INTERVAL).await;
    }
}
