//! What is in memory of a workspace that has something to do: who waits for it, who is connected, and what
//! its actor should know. Nothing here outlives the process or needs to.
//!
//! Everything is behind one lock that is held for no longer than a look. The people's side ([`Live::join`],
//! [`Seat`], [`Presence`]) changes the counts and wakes the actor; the actor's side decides, under the same
//! lock, so that nobody attaches to a container whose end has been decided.

use super::{
    Clock, WorkspaceError,
    clock::later,
    state::{Life, State},
};
use crate::store::{UserRecord, WorkspaceRecord};
use jiff::Timestamp;
use mlad::api::{Ending, Lease, Need, Project, Wait, Workspace, WorkspaceState};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::{Notify, watch};

/// What one login wants the workspace to be made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Choice {
    /// The image, and whether the login named it.
    pub(super) image: String,
    pub(super) image_named: bool,
    /// The slice, and whether the login named it.
    pub(super) need: Need,
    pub(super) need_named: bool,
    /// The project it counts for, and whether the login named it (or none).
    pub(super) project: Option<String>,
    pub(super) project_named: bool,
    /// What the slice comes to, if that is known.
    pub(super) profile: Option<String>,
}

/// How far a start is, for those who wait. The last two are final.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Pending,
    Stopping,
    Pulling(u64, Option<u64>),
    Waiting(Wait),
    Starting,
    Ready,
    Failed(WorkspaceError),
}

/// A container that runs, for those who are attached to it.
#[derive(Debug)]
pub(super) struct Instance {
    pub(super) workload: String,
    /// The reason of its end, once it is decided.
    pub(super) ended: watch::Sender<Option<String>>,
    /// What those in it should know.
    pub(super) notice: watch::Sender<Notice>,
}

/// What those in a workspace should know of its lease.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notice {
    /// It is going to end.
    pub ending: Option<Ending>,
    /// Something is wrong with a GPU of it.
    pub trouble: Option<String>,
}

impl From<&Lease> for Notice {
    fn from(lease: &Lease) -> Self {
        Self { ending: lease.ending.clone(), trouble: lease.trouble.clone() }
    }
}

impl Instance {
    fn give_notice(&self, notice: Notice) {
        self.notice.send_if_modified(|known| {
            let other = *known != notice;
            *known = notice;
            other
        });
    }
}

/// A workspace that has something to do.
pub(super) struct Live {
    pub(super) user: UserRecord,
    clock: Arc<dyn Clock>,
    shared: Mutex<Shared>,
    /// For its actor alone.
    wake: Notify,
    /// Counts the changes of the record, for those who wait for one.
    version: watch::Sender<u64>,
}

struct Shared {
    record: WorkspaceRecord,
    round: Option<Round>,
    rounds: u64,
    running: Option<Running>,
    lease: Option<Lease>,
    wait: Option<Wait>,
    /// Why this generation is to end.
    stop: Option<String>,
    /// Taken over from an earlier process, and nobody has come back yet.
    adopted: bool,
    /// Whether this process has started the container, so that it need not ask whether it runs.
    started: bool,
    keep: Option<Timestamp>,
    /// The runtime has news.
    look: bool,
}

/// Those who wait for the next time it runs.
struct Round {
    number: u64,
    choice: Choice,
    waiters: u32,
    steps: watch::Sender<Step>,
}

struct Running {
    instance: Arc<Instance>,
    /// The round that waited for it: its seats count as connections until they are taken or given up.
    round: Option<u64>,
    connections: u32,
    /// When the last one left.
    left_at: Option<Timestamp>,
}

/// What a login found.
pub(super) enum Joined {
    /// It runs.
    Attached(Box<(Presence, Workspace)>),
    /// It is waited for.
    Seated(Seat, watch::Receiver<Step>),
}

impl Live {
    pub(super) fn new(record: WorkspaceRecord, user: UserRecord, clock: Arc<dyn Clock>, adopted: bool) -> Arc<Self> {
        Arc::new(Self {
            user,
            clock,
            shared: Mutex::new(Shared {
                record,
                round: None,
                rounds: 0,
                running: None,
                lease: None,
                wait: None,
                stop: None,
                adopted,
                started: false,
                keep: None,
                look: false,
            }),
            wake: Notify::new(),
            version: watch::Sender::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ── The people's side ──

    /// Attaches to it, or joins those who wait for it.
    pub(super) fn join(self: &Arc<Self>, choice: &Choice) -> Result<Joined, WorkspaceError> {
        let mut shared = self.lock();
        if let Err(error) = shared.check(choice) {
            if !shared.waits_for_nobody() {
                return Err(error);
            }
            // Nobody is left who wants what it waits for: give that place back and begin anew.
            shared.round = None;
            shared.stop = Some("something else was asked for".to_owned());
        }
        shared.adopted = false;
        if let Some((instance, workspace)) = shared.attach() {
            drop(shared);
            self.wake.notify_one();
            let presence = Presence { live: Arc::clone(self), instance };
            return Ok(Joined::Attached(Box::new((presence, workspace))));
        }
        let (number, steps) = shared.sit_down(choice);
        drop(shared);
        self.wake.notify_one();
        Ok(Joined::Seated(Seat { live: Arc::clone(self), number, held: true }, steps))
    }

    /// Attaches to it if it runs, whatever it is made of; else changes nothing.
    pub(super) fn attach(self: &Arc<Self>) -> Option<(Presence, Workspace)> {
        let mut shared = self.lock();
        let (instance, workspace) = shared.attach()?;
        shared.adopted = false;
        drop(shared);
        self.wake.notify_one();
        Some((Presence { live: Arc::clone(self), instance }, workspace))
    }

    /// Whether a login that names nothing can attach at once.
    pub(super) fn runs(&self) -> bool {
        let shared = self.lock();
        shared.running.is_some() && shared.stop.is_none()
    }

    /// Asks for its end. Those who wait for this start are told at once.
    pub(super) fn request_stop(&self, reason: &str) {
        let mut shared = self.lock();
        if shared.record.life.active() && shared.stop.is_none() {
            shared.stop = Some(reason.to_owned());
        }
        if let Some(round) = shared.round.take() {
            round.steps.send_replace(Step::Failed(WorkspaceError::Stopped(reason.to_owned())));
        }
        drop(shared);
        self.wake.notify_one();
    }

    /// Asks that it is not stopped for being idle before this time; false if it does not run.
    pub(super) fn request_keep(&self, until: Timestamp) -> bool {
        let mut shared = self.lock();
        let runs = shared.running.is_some() && shared.stop.is_none();
        if runs {
            shared.keep = shared.keep.max(Some(until));
        }
        drop(shared);
        self.wake.notify_one();
        runs
    }

    /// Says that the runtime has news of it.
    pub(super) fn request_look(&self) {
        self.lock().look = true;
        self.wake.notify_one();
    }

    /// Returns when `done` holds for the record as it was last written.
    pub(super) async fn until(&self, done: impl Fn(&WorkspaceRecord) -> bool + Send) {
        let mut versions = self.version.subscribe();
        while !done(&self.record()) && versions.changed().await.is_ok() {}
    }

    /// As the API shows it.
    pub(super) fn show(&self) -> Workspace {
        self.lock().show()
    }

    pub(super) fn record(&self) -> WorkspaceRecord {
        self.lock().record.clone()
    }

    // ── The actor's side ──

    /// Returns when something changed since it last returned.
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Notes what was written to the database.
    pub(super) fn set_record(&self, record: WorkspaceRecord) {
        let mut shared = self.lock();
        if !record.life.active() {
            shared.stop = None;
            shared.lease = None;
            shared.wait = None;
            shared.keep = None;
            shared.adopted = false;
            shared.started = false;
        }
        shared.record = record;
        drop(shared);
        self.version.send_modify(|version| *version = version.wrapping_add(1));
    }

    /// What the next start is to be made of; none if nobody waits.
    pub(super) fn next_choice(&self) -> Option<Choice> {
        let mut shared = self.lock();
        shared.round.take_if(|round| round.waiters == 0);
        shared.round.as_ref().map(|round| round.choice.clone())
    }

    /// Why this generation is to end, if it is: somebody stopped it, or nobody waits for it any more. Decides
    /// it, if so. One that was taken over is nobody's until `patience`.
    pub(super) fn given_up(&self, patience: Timestamp) -> Option<String> {
        let mut shared = self.lock();
        if shared.stop.is_none() {
            let wanted = match &shared.round {
                Some(round) => round.waiters > 0,
                None => shared.adopted && self.clock.now() < patience,
            };
            if wanted {
                return None;
            }
            shared.round = None;
            shared.stop = Some("nobody waits for it any more".to_owned());
        }
        shared.stop.clone()
    }

    /// Why it is to end, if somebody decided that.
    pub(super) fn stop_reason(&self) -> Option<String> {
        self.lock().stop.clone()
    }

    /// Decides that it is to end.
    pub(super) fn decide_stop(&self, reason: impl Into<String>) {
        let mut shared = self.lock();
        if shared.stop.is_none() {
            shared.stop = Some(reason.into());
        }
    }

    /// Tells those who wait how far it is.
    pub(super) fn report(&self, step: Step) {
        let mut shared = self.lock();
        shared.wait = match &step {
            Step::Waiting(wait) => Some(wait.clone()),
            _ => None,
        };
        if let Some(round) = &shared.round {
            round.steps.send_replace(step);
        }
    }

    /// Tells those who wait that they wait in vain. What is going on goes on.
    pub(super) fn fail(&self, error: &WorkspaceError) {
        if let Some(round) = self.lock().round.take() {
            round.steps.send_replace(Step::Failed(error.clone()));
        }
    }

    /// The container was started. Whether nobody wants it any more: its start is then to be undone.
    pub(super) fn started(&self) -> bool {
        let mut shared = self.lock();
        shared.started = true;
        let wanted = shared.round.as_ref().map_or(shared.adopted, |round| round.waiters > 0);
        shared.stop.is_some() || !wanted
    }

    /// Whether this process has started the container.
    pub(super) fn started_here(&self) -> bool {
        self.lock().started
    }

    pub(super) fn lease(&self) -> Option<Lease> {
        self.lock().lease.clone()
    }

    pub(super) fn set_lease(&self, lease: Lease) {
        let mut shared = self.lock();
        if let Some(running) = &shared.running {
            running.instance.give_notice(Notice::from(&lease));
        }
        shared.lease = Some(lease);
    }

    /// It runs: those who waited are connected. Returns the instance.
    pub(super) fn ready(&self) -> Arc<Instance> {
        let mut shared = self.lock();
        let notice = watch::Sender::new(shared.lease.as_ref().map(Notice::from).unwrap_or_default());
        let instance =
            Arc::new(Instance { workload: shared.record.workload(), ended: watch::Sender::new(None), notice });
        let round = shared.round.take();
        let connections = round.as_ref().map_or(0, |round| round.waiters);
        shared.wait = None;
        shared.running = Some(Running {
            instance: Arc::clone(&instance),
            round: round.as_ref().map(|round| round.number),
            connections,
            left_at: None,
        });
        if let Some(round) = round {
            round.steps.send_replace(Step::Ready);
        }
        instance
    }

    /// When it is to be stopped for being idle, as things are; none while somebody is connected.
    pub(super) fn idle_deadline(&self, idle: Duration) -> Option<Timestamp> {
        let now = self.clock.now();
        self.lock().idle_deadline(now, idle)
    }

    /// Decides its end if `deadline` is still the one.
    pub(super) fn stop_if_idle(&self, idle: Duration, deadline: Timestamp, reason: &str) {
        let now = self.clock.now();
        let mut shared = self.lock();
        if shared.stop.is_none() && shared.idle_deadline(now, idle) == Some(deadline) {
            shared.stop = Some(reason.to_owned());
        }
    }

    /// Nobody can attach to it any more; those who are attached are told why.
    pub(super) fn end_instance(&self, reason: &str) {
        if let Some(running) = self.lock().running.take() {
            running.instance.ended.send_replace(Some(reason.to_owned()));
        }
    }

    /// Takes the wish to keep it, if there is one.
    pub(super) fn take_keep(&self) -> Option<Timestamp> {
        self.lock().keep.take()
    }

    /// Whether the runtime had news since the last time this was asked.
    pub(super) fn take_look(&self) -> bool {
        std::mem::take(&mut self.lock().look)
    }

    /// Whether there is nothing to do.
    pub(super) fn at_rest(&self) -> bool {
        let mut shared = self.lock();
        shared.round.take_if(|round| round.waiters == 0);
        shared.round.is_none() && !shared.record.life.active()
    }

    // ── Presence ──

    fn arrive(&self, instance: &Arc<Instance>) {
        let mut shared = self.lock();
        if let Some(running) = shared.running.as_mut().filter(|running| Arc::ptr_eq(&running.instance, instance)) {
            running.connections = running.connections.saturating_add(1);
        }
    }

    fn leave(&self, of: impl FnOnce(&Running) -> bool) {
        let now = self.clock.now();
        let mut shared = self.lock();
        let Some(running) = shared.running.as_mut().filter(|running| of(running)) else { return };
        running.connections = running.connections.saturating_sub(1);
        if running.connections == 0 {
            running.left_at = Some(now);
            drop(shared);
            self.wake.notify_one();
        }
    }
}

impl Shared {
    /// Counts a connection if it runs.
    fn attach(&mut self) -> Option<(Arc<Instance>, Workspace)> {
        let running = self.running.as_mut().filter(|_| self.stop.is_none())?;
        running.connections = running.connections.saturating_add(1);
        let instance = Arc::clone(&running.instance);
        Some((instance, self.show()))
    }

    fn waits_for_nobody(&self) -> bool {
        self.record.life.state == State::Waiting && self.round.as_ref().is_none_or(|round| round.waiters == 0)
    }

    /// What was stored before counts if nobody has come since this process began.
    fn idle_deadline(&self, now: Timestamp, idle: Duration) -> Option<Timestamp> {
        let running = self.running.as_ref().filter(|running| running.connections == 0)?;
        let State::Running { idle_deadline, keep_until, .. } = self.record.life.state else { return None };
        let deadline = match (running.left_at, idle_deadline) {
            (Some(left_at), _) => later(left_at, idle),
            (None, Some(stored)) => stored,
            (None, None) => later(now, idle),
        };
        Some(keep_until.map_or(deadline, |kept| kept.max(deadline)))
    }

    /// Whether `choice` contradicts what the workspace is made of, or is about to be.
    fn check(&self, choice: &Choice) -> Result<(), WorkspaceError> {
        let ending = self.stop.is_some() || matches!(self.record.life.state, State::Stopping { .. });
        let going = self.record.life.active() && !ending;
        let (image, need, project, profile, state) = match (&self.round, going) {
            (_, true) => {
                let profile = self.lease.as_ref().map(|lease| &lease.profile);
                let waited = self.round.as_ref().and_then(|round| round.choice.profile.as_ref());
                let state = match self.record.life.name() {
                    WorkspaceState::Running => "running",
                    WorkspaceState::Starting => "starting",
                    _ => "waiting",
                };
                (&self.record.image, &self.record.need, &self.record.project, profile.or(waited), state)
            }
            (Some(round), false) if round.waiters > 0 => {
                let Choice { image, need, project, profile, .. } = &round.choice;
                (image, need, project, profile.as_ref(), "waiting")
            }
            _ => return Ok(()),
        };
        let differs = |what, has: &str, wished: &str| WorkspaceError::Differs {
            name: self.record.name.clone(),
            state,
            what,
            has: has.to_owned(),
            wished: wished.to_owned(),
        };
        if choice.image_named && choice.image != *image {
            return Err(differs("the image", image, &choice.image));
        }
        if choice.project_named && choice.project != *project {
            let name = |project: &Option<String>| project.clone().unwrap_or_else(|| Project::NONE.to_owned());
            return Err(differs("the project", &name(project), &name(&choice.project)));
        }
        let same_profile = profile.is_some() && profile == choice.profile.as_ref();
        if choice.need_named && choice.need != *need && !same_profile {
            return Err(differs("the slice", &need.to_string(), &choice.need.to_string()));
        }
        Ok(())
    }

    /// Joins the round of those who wait, or opens one.
    fn sit_down(&mut self, choice: &Choice) -> (u64, watch::Receiver<Step>) {
        if let Some(round) = &mut self.round {
            // A round that everybody left and that was not noticed yet goes on with the choice of who comes,
            // unless it has begun.
            if round.waiters == 0 {
                round.choice = choice.clone();
            }
            round.waiters = round.waiters.saturating_add(1);
            return (round.number, round.steps.subscribe());
        }
        let step = match (&self.record.life.state, &self.wait) {
            _ if self.stop.is_some() => Step::Stopping,
            (State::Stopping { .. }, _) => Step::Stopping,
            (State::Waiting, Some(wait)) => Step::Waiting(wait.clone()),
            (State::Starting { .. }, _) => Step::Starting,
            _ => Step::Pending,
        };
        let (steps, receiver) = watch::channel(step);
        self.rounds = self.rounds.wrapping_add(1);
        let number = self.rounds;
        self.round = Some(Round { number, choice: choice.clone(), waiters: 1, steps });
        (number, receiver)
    }

    fn show(&self) -> Workspace {
        let mut workspace = show(&self.record);
        workspace.lease.clone_from(&self.lease);
        workspace.wait.clone_from(&self.wait);
        workspace.connections = self.running.as_ref().map_or(0, |running| running.connections);
        if workspace.connections > 0 {
            workspace.idle_deadline = None;
        }
        if let Some(reason) = &self.stop {
            workspace.detail = Some(reason.clone());
        }
        workspace
    }
}

/// A workspace as the API shows it, from the database alone.
pub(super) fn show(record: &WorkspaceRecord) -> Workspace {
    let Life { state, .. } = &record.life;
    let (detail, started_at, idle_deadline) = match state {
        State::Stopped { detail } => (detail.clone(), None, None),
        State::Waiting | State::Starting { .. } => (None, None, None),
        State::Running { started_at, idle_deadline, .. } => (None, Some(*started_at), *idle_deadline),
        State::Stopping { detail, .. } => (Some(detail.clone()), None, None),
    };
    Workspace {
        name: record.name.clone(),
        user: record.user.clone(),
        state: record.life.name(),
        detail,
        image: record.image.clone(),
        need: record.need.clone(),
        project: record.project.clone(),
        lease: None,
        wait: None,
        connections: 0,
        idle_deadline,
        created_at: record.created_at,
        started_at,
    }
}

/// A place among those who wait. Given back when dropped.
pub(super) struct Seat {
    live: Arc<Live>,
    number: u64,
    held: bool,
}

impl Seat {
    /// Turns the place into a connection, now that the workspace runs.
    pub(super) fn attach(mut self) -> Result<(Presence, Workspace), WorkspaceError> {
        let live = Arc::clone(&self.live);
        let shared = live.lock();
        let stopped = || WorkspaceError::Stopped("it ended right after its start".to_owned());
        if let Some(reason) = &shared.stop {
            return Err(WorkspaceError::Stopped(reason.clone()));
        }
        let running = shared.running.as_ref().filter(|running| running.round == Some(self.number));
        let instance = Arc::clone(&running.ok_or_else(stopped)?.instance);
        let workspace = shared.show();
        drop(shared);
        self.held = false;
        Ok((Presence { live, instance }, workspace))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if !self.held {
            return;
        }
        let mut shared = self.live.lock();
        if let Some(round) = shared.round.as_mut().filter(|round| round.number == self.number) {
            round.waiters = round.waiters.saturating_sub(1);
            if round.waiters == 0 {
                drop(shared);
                self.live.wake.notify_one();
            }
            return;
        }
        drop(shared);
        self.live.leave(|running| running.round == Some(self.number));
    }
}

/// A connection that counts: while one is left, its container is not idle.
pub(super) struct Presence {
    live: Arc<Live>,
    pub(super) instance: Arc<Instance>,
}

impl Clone for Presence {
    fn clone(&self) -> Self {
        self.live.arrive(&self.instance);
        Self { live: Arc::clone(&self.live), instance: Arc::clone(&self.instance) }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.live.leave(|running| Arc::ptr_eq(&running.instance, &self.instance));
    }
}
