//! What the GPUs of a daemon's machine report, connected or not: forwarded to who listens, and what of it the next
//! connection begins with is kept.

use crate::node::{Change, DriverError, Failure, Listed, Node, Order, Report, Stage};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{Notify, mpsc, oneshot};

/// Reports that may wait to be sent.
const REPORTS: usize = 256;

/// The GPUs of this machine, and what they report.
pub(super) struct Desk {
    node: Node,
    kept: Arc<Kept>,
}

#[derive(Default)]
struct Kept {
    state: Mutex<State>,
    /// A change was finished.
    finished: Notify,
}

#[derive(Default)]
struct State {
    /// The driver's list, or why there is none; none before it was asked.
    listed: Option<Result<Vec<Listed>, DriverError>>,
    /// Changes that were ordered and are not finished.
    changes: BTreeSet<u64>,
    /// Who listens.
    listener: Option<mpsc::Sender<Report>>,
}

impl Kept {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Desk {
    /// Takes care of a machine's GPUs and what they report.
    pub(super) fn new(node: Node, reports: mpsc::Receiver<Report>) -> Self {
        let kept = Arc::new(Kept::default());
        // Ends with the GPUs' threads.
        tokio::spawn(keep(Arc::clone(&kept), reports));
        Self { node, kept }
    }

    /// Listens from now on, in place of who did before: to the list first, then to each GPU anew.
    pub(super) fn listen(&self) -> mpsc::Receiver<Report> {
        let (sender, reports) = mpsc::channel(REPORTS);
        let listed = {
            let mut state = self.kept.lock();
            let first = state.listed.clone().map(|listed| listed.map_or_else(Report::Down, Report::Listed));
            // There is room: it is new.
            first.into_iter().for_each(|report| drop(sender.try_send(report)));
            state.listener = Some(sender);
            state.listed.clone()
        };
        let there = listed.and_then(Result::ok).into_iter().flatten().filter_map(|gpu| gpu.uuid.ok());
        there.for_each(|gpu| self.read(&gpu));
        reports
    }

    /// Nobody listens any more.
    pub(super) fn leave(&self) {
        self.kept.lock().listener = None;
    }

    /// Has a GPU read.
    pub(super) fn read(&self, gpu: &str) {
        self.node.order(gpu, Order::Read);
    }

    /// Has a GPU changed. What comes at once is that it cannot be.
    pub(super) fn change(&self, gpu: &str, change: Change) -> Option<Report> {
        let id = change.id;
        self.kept.lock().changes.insert(id);
        if self.node.order(gpu, Order::Change(change)) {
            return None;
        }
        self.kept.lock().changes.remove(&id);
        let error = DriverError::Other("its thread takes no orders".to_owned());
        let change = Some((id, Err(Failure { stage: Stage::Read, error: error.clone() })));
        Some(Report::Gpu { uuid: gpu.to_owned(), reading: Err(error), change })
    }

    /// Waits until every change that was ordered is finished.
    pub(super) async fn settled(&self) {
        loop {
            let finished = self.kept.finished.notified();
            if self.kept.lock().changes.is_empty() {
                return;
            }
            finished.await;
        }
    }

    /// Ends everything that uses the GPUs and destroys what is on them, after what their threads are at. What comes
    /// is why that is not so of some.
    pub(super) async fn clear(&self) -> Vec<String> {
        let listed = self.kept.lock().listed.clone();
        let there = listed.and_then(Result::ok).into_iter().flatten().filter_map(|gpu| gpu.uuid.ok());
        let clearing: Vec<_> = there
            .map(|gpu| {
                let (reply, done) = oneshot::channel();
                let ordered = self.node.order(&gpu, Order::Clear(reply));
                (gpu, ordered, done)
            })
            .collect();
        let mut left = Vec::new();
        for (gpu, ordered, done) in clearing {
            match done.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => left.push(format!("{gpu}: {error}")),
                Err(_) if ordered => left.push(format!("{gpu}: its thread ended")),
                Err(_) => left.push(format!("{gpu}: its thread takes no orders")),
            }
        }
        left
    }

    /// Ends the GPUs' threads.
    pub(super) fn stop(self, patience: std::time::Duration) {
        self.node.stop(patience);
    }
}

async fn keep(kept: Arc<Kept>, mut reports: mpsc::Receiver<Report>) {
    while let Some(report) = reports.recv().await {
        let listener = {
            let mut state = kept.lock();
            match &report {
                Report::Listed(listed) => state.listed = Some(Ok(listed.clone())),
                Report::Down(error) => state.listed = Some(Err(error.clone())),
                Report::Gpu { change: Some((id, _)), .. } => {
                    state.changes.remove(id);
                }
                Report::Gpu { .. } | Report::Xid { .. } => {}
            }
            state.listener.clone()
        };
        kept.finished.notify_waiters();
        if let Some(listener) = listener
            && listener.send(report).await.is_err()
        {
            // It is gone, and its successor begins with everything anew.
            tracing::debug!("a report that nobody listens to");
        }
    }
}
