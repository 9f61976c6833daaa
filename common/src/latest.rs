//! The last result of work that a service repeats in the background, for all who ask: an answer costs nothing,
//! however many ask.

use std::sync::Arc;

use tokio::sync::watch;

/// The last result; there is none before the first work has ended.
#[derive(Debug)]
pub struct Latest<T>(watch::Sender<Option<Arc<T>>>);

impl<T> Default for Latest<T> {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl<T> Latest<T> {
    /// Replaces the last result.
    pub fn publish(&self, result: T) {
        self.0.send_replace(Some(Arc::new(result)));
    }

    /// The last result; waits for the first.
    pub async fn get(&self) -> Arc<T> {
        let mut results = self.0.subscribe();
        loop {
            let last = results.borrow_and_update().clone();
            if let Some(result) = last {
                return result;
            }
            results.changed().await.expect("this has the sender");
        }
    }
}
