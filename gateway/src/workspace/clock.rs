//! What time it is, so that a test can say so.

use async_trait::async_trait;
use jiff::Timestamp;
use std::time::Duration;

/// A clock.
#[async_trait]
pub trait Clock: Send + Sync + 'static {
    /// The time now.
    fn now(&self) -> Timestamp;

    /// Returns when it is `time` or later. Cancel-safe.
    async fn until(&self, time: Timestamp);
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

/// Longest nap before the clock is looked at again, so that a clock that was set does not delay by days.
const NAP: Duration = Duration::from_secs(600);

#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    async fn until(&self, time: Timestamp) {
        while let Ok(left) = Duration::try_from(time.duration_since(self.now())) {
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(NAP)).await;
        }
    }
}

/// A time that is `by` later; the last there is if that is beyond.
pub(crate) fn later(time: Timestamp, by: Duration) -> Timestamp {
    time.saturating_add(by).unwrap_or(Timestamp::MAX)
}

/// From `earlier` to `time`; zero if that is not later.
pub(crate) fn between(earlier: Timestamp, time: Timestamp) -> Duration {
    Duration::try_from(time.duration_since(earlier)).unwrap_or_default()
}
