//! One thing at a time per workload, any number of workloads at once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};
use tokio::sync::OwnedMutexGuard;

/// Who waits for which name. Holds an entry only while somebody does.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Turns {
    /// Waits until nobody else has this name's turn; it ends when the guard is dropped.
    pub(super) async fn take(&self, name: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, lock| lock.strong_count() > 0);
            let lock = turns.get(name).and_then(Weak::upgrade).unwrap_or_default();
            turns.insert(name.to_owned(), Arc::downgrade(&lock));
            lock
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[tokio::test]
    async fn one_name_waits_and_others_do_not() {
        let turns = Turns::default();
        let first = turns.take("w-1-1").await;
        assert!(turns.take("w-2-1").now_or_never().is_some());
        assert!(turns.take("w-1-1").now_or_never().is_none());
        drop(first);
        assert!(turns.take("w-1-1").now_or_never().is_some());
        drop(turns.take("w-3-1").await);
        assert_eq!(turns.0.lock().unwrap().len(), 1);
    }
}
