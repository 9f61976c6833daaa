//! The names of the instances, by which log, errors and statistics tell them apart: those of `--logging`, or
//! numbers. An instance that is in DNS again within an hour has its number again.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// How long the number of an instance that is no longer in DNS is kept for it.
const KEPT: Duration = Duration::from_secs(3600);

/// How the instances behind a configured URL are named.
#[derive(Clone, Debug)]
pub enum Naming {
    /// There is one, with this name.
    Exactly(String),
    /// `PREFIX-1`, `PREFIX-2`, …, in the order first seen.
    Numbered(String),
}

impl Default for Naming {
    fn default() -> Self {
        Self::Numbered("logging".to_owned())
    }
}

/// The names that are taken.
#[derive(Debug, Default)]
pub(crate) struct Names(HashMap<String, Holder>);

#[derive(Debug)]
struct Holder {
    address: String,
    /// Since when the instance is no longer in DNS.
    left: Option<Instant>,
}

impl Names {
    /// The name of an instance that is new in the pool.
    pub(crate) fn take(&mut self, naming: &Naming, address: &str) -> String {
        self.0
            .retain(|_, holder| holder.left.is_none_or(|left| left.elapsed() < KEPT));
        let name = match naming {
            Naming::Exactly(name) => name.clone(),
            Naming::Numbered(prefix) => {
                let is_own = |(name, holder): &(&String, &Holder)| {
                    let numbered = name.rsplit_once('-');
                    holder.address == address && numbered.is_some_and(|(begin, _)| begin == prefix)
                };
                let own = self.0.iter().find(is_own).map(|(name, _)| name.clone());
                let mut numbered = (1..).map(|number| format!("{prefix}-{number}"));
                own.or_else(|| numbered.find(|name| !self.0.contains_key(name)))
                    .expect("numbers do not end")
            }
        };
        let holder = Holder {
            address: address.to_owned(),
            left: None,
        };
        self.0.insert(name.clone(), holder);
        name
    }

    /// Notes that the instance left the pool.
    pub(crate) fn leave(&mut self, name: &str) {
        if let Some(holder) = self.0.get_mut(name) {
            holder.left = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn number_is_kept_for_an_hour() {
        let mut names = Names::default();
        let (logging, named) = (Naming::default(), Naming::Numbered("red".to_owned()));
        assert_eq!(
            names.take(&Naming::Exactly("logging-2".to_owned()), "a:1"),
            "logging-2"
        );
        assert_eq!(names.take(&logging, "b:1"), "logging-1");
        assert_eq!(names.take(&logging, "c:1"), "logging-3");
        assert_eq!(names.take(&named, "d:1"), "red-1");
        names.leave("logging-1");
        assert_eq!(names.take(&logging, "e:1"), "logging-4");
        tokio::time::advance(KEPT - Duration::from_secs(1)).await;
        assert_eq!(names.take(&logging, "b:1"), "logging-1");
        names.leave("logging-1");
        tokio::time::advance(KEPT).await;
        assert_eq!(names.take(&logging, "f:1"), "logging-1");
        assert_eq!(names.take(&logging, "b:1"), "logging-5");
    }

    /// Those that stay, or have not left for so long, keep their numbers.
    #[tokio::test(start_paused = true)]
    async fn addresses_that_left_an_hour_ago_are_forgotten() {
        let (mut names, logging) = (Names::default(), Naming::default());
        let address = |number: usize| format!("a:{number}");
        for number in 1..=100 {
            let name = names.take(&logging, &address(number));
            assert_eq!(name, format!("logging-{number}"));
        }
        for number in 1..=98 {
            names.leave(&format!("logging-{number}"));
        }
        tokio::time::advance(KEPT / 2).await;
        names.leave("logging-99");
        tokio::time::advance(KEPT / 2).await;
        assert_eq!(names.take(&logging, &address(99)), "logging-99");
        assert_eq!(names.take(&logging, &address(1)), "logging-1");
        assert_eq!(names.take(&logging, &address(98)), "logging-2");
        let mut kept: Vec<&String> = names.0.keys().collect();
        kept.sort();
        let expected = [1, 100, 2, 99].map(|number| format!("logging-{number}"));
        assert_eq!(kept, expected.iter().collect::<Vec<_>>());
    }
}
