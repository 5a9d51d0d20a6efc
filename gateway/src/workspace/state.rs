//! The life of a workspace: its states and the only transitions between them. Pure.

use jiff::Timestamp;
use mlad::api::WorkspaceState;

/// Where a workspace is in its life, and what that state carries.
///
/// ```text
///             begin           granted            started
///  Stopped ─────────▶ Waiting ────────▶ Starting ────────▶ Running ⟲ idle, keep
///     ▲ ▲                │                  │                  │
///     │ └────────────────┘                  └───────┬──────────┘
///     │      give_up                                │ stop
///     └────────────────────────── Stopping ◀────────┘
///               stopped
/// ```
///
/// No container of a generation exists before `Starting` or after `Stopping`; a lease, or a place in the
/// queue, only from `Waiting` to `Stopping`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Life {
    /// Counts the starts. The workload's name is made of it, so that every start has a name of its own.
    pub generation: u64,
    /// The state.
    pub state: State,
}

/// A state of a workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// No container and no lease.
    Stopped {
        /// Why, if that is worth knowing.
        detail: Option<String>,
    },
    /// A lease was asked for, or will be in a moment.
    Waiting,
    /// The lease is there; the container is being made.
    Starting {
        /// Fence of the lease.
        fence: u64,
    },
    /// The container runs.
    Running {
        /// Fence of the lease.
        fence: u64,
        /// When the container was ready.
        started_at: Timestamp,
        /// When it is to be stopped; none while somebody is connected.
        idle_deadline: Option<Timestamp>,
        /// Not to be stopped before this time for being idle.
        keep_until: Option<Timestamp>,
    },
    /// The container is being removed; the lease is given back after that.
    Stopping {
        /// Fence of the lease.
        fence: u64,
        /// Why.
        detail: String,
    },
}

/// A transition that is not allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a workspace that is {from:?} cannot be {verb}")]
pub struct TransitionError {
    /// The state it is in.
    pub from: WorkspaceState,
    /// What was to be done.
    pub verb: &'static str,
}

impl Default for Life {
    fn default() -> Self {
        Self { generation: 0, state: State::Stopped { detail: None } }
    }
}

impl Life {
    /// Stopped → Waiting, under a new generation.
    ///
    /// # Errors
    /// In any other state.
    pub fn begin(&self) -> Result<Self, TransitionError> {
        match self.state {
            State::Stopped { .. } => Ok(Self { generation: self.generation.saturating_add(1), state: State::Waiting }),
            _ => Err(self.refuse("begun")),
        }
    }

    /// Waiting → Stopped: the place in the queue has been given back.
    ///
    /// # Errors
    /// In any other state.
    pub fn give_up(&self, detail: Option<String>) -> Result<Self, TransitionError> {
        match self.state {
            State::Waiting => Ok(self.to(State::Stopped { detail })),
            _ => Err(self.refuse("given up")),
        }
    }

    /// Waiting → Starting, with the lease of this fence.
    ///
    /// # Errors
    /// In any other state.
    pub fn granted(&self, fence: u64) -> Result<Self, TransitionError> {
        match self.state {
            State::Waiting => Ok(self.to(State::Starting { fence })),
            _ => Err(self.refuse("granted a lease")),
        }
    }

    /// Starting → Running.
    ///
    /// # Errors
    /// In any other state.
    pub fn started(&self, started_at: Timestamp) -> Result<Self, TransitionError> {
        match self.state {
            State::Starting { fence } => {
                Ok(self.to(State::Running { fence, started_at, idle_deadline: None, keep_until: None }))
            }
            _ => Err(self.refuse("started")),
        }
    }

    /// Running → Running with another idle deadline; none while somebody is connected.
    ///
    /// # Errors
    /// In any other state.
    pub fn idle(&self, deadline: Option<Timestamp>) -> Result<Self, TransitionError> {
        match self.state {
            State::Running { fence, started_at, keep_until, .. } => {
                Ok(self.to(State::Running { fence, started_at, idle_deadline: deadline, keep_until }))
            }
            _ => Err(self.refuse("idle")),
        }
    }

    /// Running → Running, not to be stopped for being idle before `until`; an earlier promise is kept.
    ///
    /// # Errors
    /// In any other state.
    pub fn keep(&self, until: Timestamp) -> Result<Self, TransitionError> {
        match self.state {
            State::Running { fence, started_at, idle_deadline, keep_until } => Ok(self.to(State::Running {
                fence,
                started_at,
                idle_deadline: idle_deadline.map(|deadline| deadline.max(until)),
                keep_until: Some(keep_until.map_or(until, |kept| kept.max(until))),
            })),
            _ => Err(self.refuse("kept")),
        }
    }

    /// Starting or Running → Stopping.
    ///
    /// # Errors
    /// In any other state.
    pub fn stop(&self, detail: impl Into<String>) -> Result<Self, TransitionError> {
        match self.state {
            State::Starting { fence } | State::Running { fence, .. } => {
                Ok(self.to(State::Stopping { fence, detail: detail.into() }))
            }
            _ => Err(self.refuse("stopped")),
        }
    }

    /// Stopping → Stopped: the container is proven gone and the lease given back.
    ///
    /// # Errors
    /// In any other state.
    pub fn stopped(&self) -> Result<Self, TransitionError> {
        match &self.state {
            State::Stopping { detail, .. } => Ok(self.to(State::Stopped { detail: Some(detail.clone()) })),
            _ => Err(self.refuse("said to be stopped")),
        }
    }

    /// The name of the state.
    pub fn name(&self) -> WorkspaceState {
        match self.state {
            State::Stopped { .. } => WorkspaceState::Stopped,
            State::Waiting => WorkspaceState::Waiting,
            State::Starting { .. } => WorkspaceState::Starting,
            State::Running { .. } => WorkspaceState::Running,
            State::Stopping { .. } => WorkspaceState::Stopping,
        }
    }

    /// Whether a container of this generation, or a lease, may still exist.
    pub fn active(&self) -> bool {
        !matches!(self.state, State::Stopped { .. })
    }

    fn to(&self, state: State) -> Self {
        Self { generation: self.generation, state }
    }

    fn refuse(&self, verb: &'static str) -> TransitionError {
        TransitionError { from: self.name(), verb }
    }
}

/// The name of the workload that is the `generation`th start of workspace `id`.
pub fn workload_name(id: i64, generation: u64) -> String {
    format!("w-{id}-{generation}")
}

/// Workspace and generation of a workload's name; none if it is no workspace's.
pub fn parse_workload_name(name: &str) -> Option<(i64, u64)> {
    let (id, generation) = name.strip_prefix("w-")?.split_once('-')?;
    let (id, generation) = (id.parse().ok()?, generation.parse().ok()?);
    (workload_name(id, generation) == name).then_some((id, generation))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    enum Verb {
        Begin,
        GiveUp,
        Granted,
        Started,
        Idle,
        Keep,
        Stop,
        Stopped,
    }

    fn apply(life: &Life, verb: Verb, at: i64) -> Result<Life, TransitionError> {
        let time = Timestamp::from_second(at).unwrap();
        match verb {
            Verb::Begin => life.begin(),
            Verb::GiveUp => life.give_up(None),
            Verb::Granted => life.granted(at.unsigned_abs()),
            Verb::Started => life.started(time),
            Verb::Idle => life.idle(Some(time)),
            Verb::Keep => life.keep(time),
            Verb::Stop => life.stop("because"),
            Verb::Stopped => life.stopped(),
        }
    }

    fn verbs() -> impl Strategy<Value = Verb> {
        prop_oneof![
            Just(Verb::Begin),
            Just(Verb::GiveUp),
            Just(Verb::Granted),
            Just(Verb::Started),
            Just(Verb::Idle),
            Just(Verb::Keep),
            Just(Verb::Stop),
            Just(Verb::Stopped),
        ]
    }

    fn allowed(from: WorkspaceState, to: WorkspaceState) -> bool {
        use WorkspaceState::{Running, Starting, Stopped, Stopping, Waiting};
        matches!(
            (from, to),
            (Stopped, Waiting)
                | (Waiting, Starting | Stopped)
                | (Starting, Running | Stopping)
                | (Running, Running | Stopping)
                | (Stopping, Stopped)
        )
    }

    fn fence(life: &Life) -> Option<u64> {
        match life.state {
            State::Stopped { .. } | State::Waiting => None,
            State::Starting { fence } | State::Running { fence, .. } | State::Stopping { fence, .. } => Some(fence),
        }
    }

    proptest! {
        #[test]
        fn only_the_drawn_transitions_happen(steps in prop::collection::vec((verbs(), 1i64..1_000_000), 0..64)) {
            let mut life = Life::default();
            for (verb, at) in steps {
                let Ok(next) = apply(&life, verb, at) else { continue };
                prop_assert!(allowed(life.name(), next.name()), "{life:?} → {next:?}");
                // The generation grows at a start and at no other time.
                let begun = u64::from(life.name() == WorkspaceState::Stopped);
                prop_assert_eq!(next.generation, life.generation + begun);
                // One generation has one fence.
                if let (Some(before), Some(after)) = (fence(&life), fence(&next)) {
                    prop_assert_eq!(before, after);
                }
                life = next;
            }
        }

        #[test]
        fn a_promise_to_keep_is_never_shortened(times in prop::collection::vec(1i64..1_000_000, 1..8)) {
            let life = Life::default().begin().unwrap().granted(1).unwrap();
            let mut life = life.started(Timestamp::UNIX_EPOCH).unwrap();
            for at in &times {
                life = life.keep(Timestamp::from_second(*at).unwrap()).unwrap();
            }
            let State::Running { keep_until, idle_deadline, .. } = life.state else { panic!("it runs") };
            prop_assert_eq!(keep_until, Some(Timestamp::from_second(*times.iter().max().unwrap()).unwrap()));
            prop_assert_eq!(idle_deadline, None);
        }

        #[test]
        fn workload_names_read_back(id in 1i64.., generation: u64) {
            prop_assert_eq!(parse_workload_name(&workload_name(id, generation)), Some((id, generation)));
        }
    }

    #[test]
    fn other_names_are_no_workspaces() {
        for name in ["", "w-", "w-1", "w-1-", "w--1", "j-1-1", "w-1-1-1", "w-01-1", "w-1-+1", "w-1-1 "] {
            assert_eq!(parse_workload_name(name), None, "{name}");
        }
    }
}
