//! What a login holds: a place among those who wait, then a connection.

use super::{
    WorkspaceError,
    live::{Joined, Notice, Presence, Seat, Step},
};
use crate::runtime::{Runtime, RuntimeError};
use mlad::api::{Wait, Workspace};
use std::sync::Arc;
use tokio::{net::UnixStream, sync::watch};

/// How far a start is.
pub enum Progress {
    /// The workspace's last container is being removed first.
    Stopping,
    /// The image is being fetched: bytes so far and in all, where known.
    Pulling {
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        total: Option<u64>,
    },
    /// A slice is waited for.
    Waiting(Wait),
    /// The slice is there; the container is being made.
    Starting,
    /// It runs.
    Ready(Attached),
}

/// Somebody who waits for a workspace. Dropping it gives the place back if nobody else waits for it.
pub struct Entering {
    place: Place,
    runtime: Arc<dyn Runtime>,
    /// Why the workspace ended the last time, if it was at rest when this began.
    last_end: Option<String>,
}

enum Place {
    Waiting(Seat, watch::Receiver<Step>),
    Ready(Box<(Presence, Workspace)>),
    Over,
}

impl Entering {
    pub(super) fn new(joined: Joined, runtime: Arc<dyn Runtime>, last_end: Option<String>) -> Self {
        let place = match joined {
            Joined::Attached(attached) => Place::Ready(attached),
            Joined::Seated(seat, mut steps) => {
                steps.mark_changed();
                Place::Waiting(seat, steps)
            }
        };
        Self { place, runtime, last_end }
    }

    /// The next news; only the latest if there was more than one since. Cancel-safe.
    ///
    /// # Errors
    /// Why there will be no workspace. It is over then, as it is after [`Progress::Ready`].
    pub async fn next(&mut self) -> Result<Progress, WorkspaceError> {
        let step = match &mut self.place {
            Place::Waiting(_, steps) => next_step(steps).await,
            Place::Ready(_) | Place::Over => Step::Ready,
        };
        match step {
            Step::Stopping => Ok(Progress::Stopping),
            Step::Pulling(done, total) => Ok(Progress::Pulling { done, total }),
            Step::Waiting(wait) => Ok(Progress::Waiting(wait)),
            Step::Starting | Step::Pending => Ok(Progress::Starting),
            Step::Failed(error) => {
                self.place = Place::Over;
                Err(error)
            }
            Step::Ready => {
                let (presence, workspace) = match std::mem::replace(&mut self.place, Place::Over) {
                    Place::Waiting(seat, _) => seat.attach()?,
                    Place::Ready(ready) => *ready,
                    Place::Over => return Err(WorkspaceError::Internal),
                };
                let attached = Attached::new(presence, workspace, Arc::clone(&self.runtime));
                Ok(Progress::Ready(Attached { last_end: self.last_end.take().map(Into::into), ..attached }))
            }
        }
    }
}

/// The next step that says something.
async fn next_step(steps: &mut watch::Receiver<Step>) -> Step {
    loop {
        if steps.changed().await.is_err() {
            // The last word was read before: the gateway ends.
            return Step::Failed(WorkspaceError::ShuttingDown);
        }
        let step = steps.borrow_and_update().clone();
        if !matches!(step, Step::Pending) {
            return step;
        }
    }
}

/// A connection to a running workspace: while one is left, the workspace is not idle. Clones count.
#[derive(Clone)]
pub struct Attached {
    presence: Presence,
    workspace: Arc<Workspace>,
    runtime: Arc<dyn Runtime>,
    last_end: Option<Arc<str>>,
}

impl Attached {
    pub(super) fn new(presence: Presence, workspace: Workspace, runtime: Arc<dyn Runtime>) -> Self {
        Self { presence, workspace: Arc::new(workspace), runtime, last_end: None }
    }

    /// A new connection to its agent.
    ///
    /// # Errors
    /// When the container does not run any more or its agent does not answer.
    pub async fn connect(&self) -> Result<UnixStream, RuntimeError> {
        self.runtime.connect(self.workload()).await
    }

    /// Whether descriptors reach the agent over such a connection.
    pub fn passes_descriptors(&self) -> bool {
        self.runtime.passes_descriptors()
    }

    /// The workload's name.
    pub fn workload(&self) -> &str {
        &self.presence.instance.workload
    }

    /// The workspace as it was when this connection was made.
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    /// Why the workspace ended the last time, in words, if this login has started it anew.
    pub fn last_end(&self) -> Option<&str> {
        self.last_end.as_deref()
    }

    /// What those in the workspace should know of its lease, whenever that changes.
    pub fn notices(&self) -> watch::Receiver<Notice> {
        self.presence.instance.notice.subscribe()
    }

    /// Returns, with the reason in words, when the workspace is being stopped or its container is gone.
    pub async fn ended(&self) -> String {
        let mut ended = self.presence.instance.ended.subscribe();
        match ended.wait_for(Option::is_some).await.map(|reason| reason.clone()) {
            Ok(Some(reason)) => reason,
            // Neither can be: the sender is in what `self` holds, and the value was waited for.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }
}
