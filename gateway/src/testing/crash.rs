//! Ends a gateway at a chosen call.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};
use tokio::sync::Notify;

/// Every call of the fakes passes it twice: before it has its effect, and after. When the chosen passing is
/// reached, that call and all later ones never return: to the world, the gateway is dead.
#[derive(Clone)]
pub(crate) struct CrashPoint(Arc<Inner>);

struct Inner {
    left: AtomicUsize,
    dead: AtomicBool,
    died: Notify,
}

impl CrashPoint {
    /// Dies at the passing of this number, from 0.
    pub(crate) fn at(passing: usize) -> Self {
        Self(Arc::new(Inner { left: AtomicUsize::new(passing), dead: AtomicBool::new(false), died: Notify::new() }))
    }

    /// Never dies.
    pub(crate) fn never() -> Self {
        Self::at(usize::MAX)
    }

    /// Resolves when it has died.
    pub(crate) async fn died(&self) {
        let died = self.0.died.notified();
        if !self.0.dead.load(Ordering::SeqCst) {
            died.await;
        }
    }

    pub(super) async fn pass(&self) {
        let last = self.0.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_err();
        if last {
            self.0.dead.store(true, Ordering::SeqCst);
        }
        if self.0.dead.load(Ordering::SeqCst) {
            self.0.died.notify_waiters();
            std::future::pending::<()>().await;
        }
    }
}
