//! Control connections: through them the API is served inside containers.
//!
//! For every workload that runs, one connection to its agent announces those who connect to the API socket in
//! the container; each is fetched by a connection of its own and served as that workload's user. What the
//! agent says is taken for nothing but that: its tickets, at most so many at once.

use super::{ApiState, serve_stream};
use crate::runtime::{Runtime, RuntimeError, WorkloadObserver};
use mlad::{
    api::{Identity, Role},
    channel::{Connection, Frame, Open, Stream},
};
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Semaphore, SetOnce},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// API connections of one workload at once; the next waits in the agent.
const MAX_CONNECTIONS: usize = 32;
/// Longest time an agent may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Pauses between tries to reach an agent that does not answer.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// A connection that held for so long makes the pauses begin anew.
const STEADY: Duration = Duration::from_secs(60);

/// Keeps the control connections. Clones are the same one.
#[derive(Clone)]
pub struct ControlHub(Arc<Hub>);

struct Hub {
    runtime: Arc<dyn Runtime>,
    /// Set when everything the API answers from has started.
    state: SetOnce<ApiState>,
    workloads: Mutex<HashMap<String, CancellationToken>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl ControlHub {
    /// A hub without workloads; they come through [`WorkloadObserver`].
    pub fn new(runtime: Arc<dyn Runtime>) -> Self {
        Self(Arc::new(Hub {
            runtime,
            state: SetOnce::new(),
            workloads: Mutex::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }))
    }

    /// From now on calls are answered; those that came before have waited in the agents.
    pub fn serve(&self, state: ApiState) {
        // A second state would be the same one.
        drop(self.0.state.set(state));
    }

    /// Ends all control connections; the workloads go on.
    pub async fn shutdown(&self) {
        self.0.stop.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }
}

impl WorkloadObserver for ControlHub {
    fn running(&self, workload: &str, user: &str) {
        let mut workloads = self.0.workloads.lock().unwrap_or_else(PoisonError::into_inner);
        if workloads.contains_key(workload) || self.0.stop.is_cancelled() {
            return;
        }
        let end = self.0.stop.child_token();
        workloads.insert(workload.to_owned(), end.clone());
        let identity = Identity { user: user.to_owned(), role: Role::User, workload: Some(workload.to_owned()) };
        let (hub, name) = (Arc::clone(&self.0), workload.to_owned());
        self.0.tasks.spawn(async move { end.run_until_cancelled(hub.keep(&name, identity)).await });
    }

    fn gone(&self, workload: &str) {
        let mut workloads = self.0.workloads.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(end) = workloads.remove(workload) {
            end.cancel();
        }
    }
}

impl Hub {
    /// Holds the control connection of one workload, anew whenever it breaks.
    async fn keep(&self, workload: &str, identity: Identity) {
        let state = self.state.wait().await;
        let (shortest, longest) = PAUSES;
        let mut pause = shortest;
        loop {
            let begun = Instant::now();
            if let Err(error) = self.listen(state, workload, &identity).await {
                tracing::debug!(workload, %error, "the control connection broke; it is made again");
            }
            pause = if begun.elapsed() > STEADY { shortest } else { (pause * 2).min(longest) };
            sleep(pause).await;
        }
    }

    /// One control connection, to its end. Dropping it ends the calls it brought.
    async fn listen(&self, state: &ApiState, workload: &str, identity: &Identity) -> Result<(), ControlError> {
        let mut connection = self.open(workload, Open::Control).await?;
        let calls = Calls { end: CancellationToken::new(), permits: Arc::new(Semaphore::new(MAX_CONNECTIONS)) };
        loop {
            let Some(frame) = connection.reader.read().await? else { return Ok(()) };
            let Frame::Incoming { ticket, .. } = frame else { return Err(ControlError::Unexpected) };
            let Ok(permit) = Arc::clone(&calls.permits).acquire_owned().await else { return Ok(()) };
            let stream = match self.open(workload, Open::Accept { ticket }).await {
                Ok(accepted) => accepted.into_stream(),
                // Whoever connected may have gone again.
                Err(error) => {
                    tracing::debug!(workload, %error, "an API connection could not be fetched");
                    continue;
                }
            };
            let (state, identity, end) = (state.clone(), identity.clone(), calls.end.clone());
            self.tasks.spawn(async move {
                end.run_until_cancelled(serve(&state, stream, identity)).await;
                drop(permit);
            });
        }
    }

    async fn open(&self, workload: &str, open: Open) -> Result<Connection, ControlError> {
        let opening = async {
            let mut connection = Connection::new(self.runtime.connect(workload).await?, false);
            connection.writer.write(&Frame::Open(open)).await?;
            match connection.reader.read().await? {
                Some(Frame::Opened { .. }) => Ok(connection),
                Some(Frame::OpenFailure { message, .. }) => Err(ControlError::Refused(message)),
                _ => Err(ControlError::Unexpected),
            }
        };
        timeout(ANSWER_TIME, opening).await.map_err(|_| ControlError::Silent)?
    }
}

async fn serve(state: &ApiState, stream: Stream, identity: Identity) {
    serve_stream(state, stream, identity).await;
}

/// The calls a control connection brought; they end with it.
struct Calls {
    end: CancellationToken,
    permits: Arc<Semaphore>,
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

/// Why a control connection, or the fetching of a call, ended.
#[derive(Debug, thiserror::Error)]
enum ControlError {
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the agent refuses: {0}")]
    Refused(String),
    #[error("the agent says what it should not here")]
    Unexpected,
    #[error("the agent does not answer")]
    Silent,
}
