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
        let name = match naming {
            Naming::Exactly(name) => name.clone(),
            Naming::Numbered(prefix) => {
                let mut numbered = (1..).map(|number| format!("{prefix}-{number}"));
                let known = numbered
                    .clone()
                    .map_while(|name| self.0.get_key_value(&name));
                let mut own = known.filter(|(_, holder)| holder.address == address);
                let own = own.next().map(|(name, _)| name.clone());
                own.or_else(|| numbered.find(|name| self.is_free(name)))
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

    fn is_free(&self, name: &str) -> bool {
        let holder = self.0.get(name);
        holder.is_none_or(|holder| holder.left.is_some_and(|left| left.elapsed() >= KEPT))
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
}
