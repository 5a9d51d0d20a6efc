//! One at a time for every user: for calls that look at a lot.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Whose turn it is. At most one entry for every user who waits or works.
#[derive(Clone, Default)]
pub(crate) struct Turns(Arc<Mutex<HashMap<i64, Weak<AsyncMutex<()>>>>>);

impl Turns {
    /// Waits until no other call of this user has its turn.
    pub(super) async fn turn(&self, user_id: i64) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| turn.strong_count() > 0);
            let known = turns.get(&user_id).and_then(Weak::upgrade);
            let turn = known.unwrap_or_default();
            turns.insert(user_id, Arc::downgrade(&turn));
            turn
        };
        turn.lock_owned().await
    }
}
