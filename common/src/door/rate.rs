//! Limits the requests of each client address.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU32;

use axum::http::StatusCode;
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

use crate::client::Client;
use crate::problem::Problem;

/// Addresses are divided among so many cells, and those of one cell share its rate: memory is bounded, however
/// many addresses there are, and two of 100 clients meet in one with a probability of 7 %.
type Cell = u16;

#[derive(Debug)]
pub(super) struct Rate {
    limiter: DefaultKeyedRateLimiter<Cell>,
    /// Random, so that nobody can choose an address in another one's cell.
    cells: RandomState,
    clock: DefaultClock,
}

impl Rate {
    pub(super) fn new(per_second: NonZeroU32) -> Self {
        Self {
            limiter: RateLimiter::keyed(Quota::per_second(per_second)),
            cells: RandomState::new(),
            clock: DefaultClock::default(),
        }
    }

    pub(super) fn check(&self, client: Client) -> Result<(), Problem> {
        let cell = self.cells.hash_one(client.network()) as Cell;
        self.limiter.check_key(&cell).map_err(|until| {
            let wait = until.wait_time_from(self.clock.now());
            let detail =
                "too many requests from this address; nothing was done: send them more slowly";
            Problem::new(StatusCode::TOO_MANY_REQUESTS, detail).retry_after(wait)
        })
    }
}

/// Parses a rate, such as `50/s`.
///
/// # Errors
/// A sentence that says what to write instead.
pub fn rate(text: &str) -> Result<NonZeroU32, String> {
    let number = text
        .strip_suffix("/s")
        .and_then(|number| number.parse().ok());
    number.ok_or_else(|| "write requests a second, for example 50/s".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_and_its_network_have_one_rate() {
        let rate = Rate::new(NonZeroU32::MIN);
        let passes = |address: &str| {
            let client = Client(address.parse().expect("an address"));
            rate.check(client).is_ok()
        };
        assert!(passes("192.0.2.1"));
        assert!(!passes("192.0.2.1"));
        assert!(!passes("::ffff:192.0.2.1"));
        assert!(passes("2001:db8::1"));
        assert!(!passes("2001:db8::2:3:4:5"));
    }
}
