//! What is true whatever the gateway does: containers, slices, leases, the queue.

use crate::runtime::{Ended, FoundState, RuntimeError, RuntimeEvent, WorkloadSpec};
use jiff::{SignedDuration, Timestamp};
use mlad::{
    api::{Ending, Lease, Need, Wait, WaitReason},
    channel::{Exit, JobResult},
};
use mlad_allocator::{Account, AccountName, AccountState, LeaseRequest, LeaseState, Limits};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::sync::{broadcast, watch};

/// How long a lease lasts in this world.
const LEASE: SignedDuration = SignedDuration::from_secs(60);
/// Longest wait for a change of this world.
const PATIENCE: Duration = Duration::from_secs(60);

/// The world. Clones are the same one.
#[derive(Clone)]
pub(crate) struct World {
    inner: Arc<Mutex<Inner>>,
    pub(crate) events: broadcast::Sender<RuntimeEvent>,
    pub(super) version: watch::Sender<u64>,
    changes: watch::Sender<()>,
}

/// The world in somebody's hands. If they change it, those who wait for a change hear of it.
pub(super) struct Held<'a> {
    inner: MutexGuard<'a, Inner>,
    changed: bool,
    changes: &'a watch::Sender<()>,
}

/// A container of this world.
#[derive(Debug, Clone)]
pub(crate) struct Container {
    pub(crate) spec: WorkloadSpec,
    pub(crate) state: FoundState,
    pub(crate) result: Option<JobResult>,
    /// How often it was told to end.
    pub(crate) terminated: u32,
}

pub(super) struct Inner {
    pub(super) containers: BTreeMap<String, Container>,
    /// How often the process of a container was started, ever.
    pub(super) starts: HashMap<String, u32>,
    /// Slices of `1g.5gb` there are.
    slices: usize,
    pub(super) leases: BTreeMap<String, Lease>,
    pub(super) queue: Vec<LeaseRequest>,
    pub(super) ended: BTreeSet<String>,
    pub(super) accounts: Vec<Account>,
    pub(super) reservations: Vec<mlad::api::Reservation>,
    fence: u64,
    pub(super) engine: Result<(), RuntimeError>,
    pub(super) allocator_away: bool,
    /// How often it was asked for while it was away.
    pub(super) refused: u64,
    /// How often the leases could not be listed.
    pub(super) refused_listings: u32,
    /// What the next starts answer instead of starting.
    pub(super) failing_starts: Vec<RuntimeError>,
    /// Images the engine has.
    pub(super) images: BTreeSet<String>,
    /// Whether containers ignore SIGTERM.
    pub(super) stubborn: bool,
    violations: Vec<String>,
}

impl World {
    /// A machine with so many slices of 4864 MiB, and an engine that has every image of the catalog.
    pub(crate) fn new(slices: usize) -> Self {
        let inner = Inner {
            containers: BTreeMap::new(),
            starts: HashMap::new(),
            slices,
            leases: BTreeMap::new(),
            queue: Vec::new(),
            ended: BTreeSet::new(),
            accounts: Vec::new(),
            reservations: Vec::new(),
            fence: 0,
            engine: Ok(()),
            allocator_away: false,
            refused: 0,
            refused_listings: 0,
            failing_starts: Vec::new(),
            images: BTreeSet::from(["mlad/base:1".into(), "mlad/torch:1".into()]),
            stubborn: false,
            violations: Vec::new(),
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
            events: broadcast::Sender::new(1024),
            version: watch::Sender::new(1),
            changes: watch::Sender::default(),
        }
    }

    pub(super) fn lock(&self) -> Held<'_> {
        Held { inner: self.inner.lock().unwrap(), changed: false, changes: &self.changes }
    }

    /// Waits until the world is as wanted.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&Self) -> bool) {
        let mut changes = self.changes.subscribe();
        let look = async {
            while !wanted(self) {
                changes.changed().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, look).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    /// The containers there are.
    pub(crate) fn containers(&self) -> BTreeMap<String, Container> {
        self.lock().containers.clone()
    }

    /// Names of the containers that run.
    pub(crate) fn running(&self) -> Vec<String> {
        let inner = self.lock();
        let running = inner.containers.iter().filter(|(_, container)| container.state == FoundState::Running);
        running.map(|(name, _)| name.clone()).collect()
    }

    /// How often the process of this container was started.
    pub(crate) fn starts(&self, name: &str) -> u32 {
        self.lock().starts.get(name).copied().unwrap_or(0)
    }

    /// Workloads with a lease.
    pub(crate) fn leases(&self) -> Vec<String> {
        self.lock().leases.keys().cloned().collect()
    }

    /// Workloads that wait, first in line first.
    pub(crate) fn waits(&self) -> Vec<String> {
        self.lock().queue.iter().map(|request| request.workload.clone()).collect()
    }

    /// How often the leases could not be listed.
    pub(crate) fn refused_listings(&self) -> u32 {
        self.lock().refused_listings
    }

    /// What must never happen and did.
    pub(crate) fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// The container's command ends like this; the engine knows whether its memory was used up.
    pub(crate) fn end(&self, name: &str, exit: Exit, out_of_memory: bool) {
        self.end_as_told(name, JobResult { exit, out_of_memory: false }, out_of_memory);
    }

    /// The container's command ends like this in its agent's words, and the engine's on its memory are these.
    pub(crate) fn end_as_told(&self, name: &str, result: JobResult, out_of_memory: bool) {
        let mut inner = self.lock();
        let Some(container) = inner.containers.get_mut(name) else { return };
        if container.state == FoundState::Running {
            let exit_code = if let Exit::Status(code) = &result.exit { i64::from(*code) } else { 137 };
            container.state = FoundState::Ended(Ended { exit_code, out_of_memory, taken_away: None });
            container.result = Some(result);
        }
        drop(inner);
        self.changed(name);
    }

    /// The container ends without leaving a result.
    pub(crate) fn kill(&self, name: &str, exit_code: i64, out_of_memory: bool) {
        if let Some(container) = self.lock().containers.get_mut(name) {
            container.state = FoundState::Ended(Ended { exit_code, out_of_memory, taken_away: None });
        }
        self.changed(name);
    }

    /// The container vanishes without a trace.
    pub(crate) fn vanish(&self, name: &str) {
        self.lock().containers.remove(name);
        self.changed(name);
    }

    /// A container that is just there.
    pub(crate) fn put(&self, spec: WorkloadSpec) {
        let container = Container { state: FoundState::Running, result: None, terminated: 0, spec };
        self.lock().containers.insert(container.spec.name.clone(), container);
    }

    /// Engine there or not.
    pub(crate) fn set_engine(&self, there: bool) {
        self.lock().engine = if there { Ok(()) } else { Err(RuntimeError::Unavailable("it is stopped".into())) };
        if there {
            let _ = self.events.send(RuntimeEvent::Resync);
        }
    }

    /// Allocator there or not.
    pub(crate) fn set_allocator(&self, there: bool) {
        self.lock().allocator_away = !there;
        self.bump();
    }

    /// How often the allocator was asked for while it was away.
    pub(crate) fn refused(&self) -> u64 {
        self.lock().refused
    }

    /// Limits of a user or project, as the allocator was told them.
    pub(crate) fn limits_of(&self, name: &AccountName) -> Option<Limits> {
        self.lock().accounts.iter().find(|account| account.name == *name).map(|account| account.limits)
    }

    /// How many requests wait for a reservation.
    pub(crate) fn waits_within(&self, reservation: &str) -> usize {
        let inner = self.lock();
        inner.queue.iter().filter(|request| request.reservation.as_deref() == Some(reservation)).count()
    }

    /// The allocator has lost what it was told of users and projects.
    pub(crate) fn forget_accounts(&self) {
        self.lock().accounts.clear();
    }

    /// The next starts fail like this, first come first.
    pub(crate) fn fail_starts(&self, errors: impl IntoIterator<Item = RuntimeError>) {
        self.lock().failing_starts.extend(errors);
    }

    /// Whether containers ignore SIGTERM.
    pub(crate) fn set_stubborn(&self, stubborn: bool) {
        self.lock().stubborn = stubborn;
    }

    /// Takes an image away.
    pub(crate) fn remove_image(&self, reference: &str) {
        self.lock().images.remove(reference);
    }

    /// The lease of a workload is going to end after this, or not any more.
    pub(crate) fn notice(&self, workload: &str, after: Option<SignedDuration>) {
        let reason = "somebody of greater priority waits for its space";
        let ending = after.map(|after| Ending { at: Timestamp::now() + after, reason: reason.into() });
        self.lock().leases.get_mut(workload).unwrap().ending = ending;
        self.bump();
    }

    /// The lease of a workload is over, whether or not it still runs.
    pub(crate) fn expire(&self, workload: &str) {
        let mut inner = self.lock();
        inner.leases.remove(workload);
        inner.ended.insert(workload.into());
        drop(inner);
        self.bump();
    }

    pub(super) fn changed(&self, name: &str) {
        let _ = self.events.send(RuntimeEvent::Changed(name.into()));
    }

    pub(super) fn bump(&self) {
        self.version.send_modify(|version| *version += 1);
    }
}

impl Deref for Held<'_> {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.inner
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Inner {
        self.changed = true;
        &mut self.inner
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.changed {
            self.changes.send_replace(());
        }
    }
}

impl Inner {
    pub(super) fn violation(&mut self, text: String) {
        self.violations.push(text);
    }

    pub(super) fn is_alive(&self, name: &str) -> bool {
        self.containers.get(name).is_some_and(|container| !matches!(container.state, FoundState::Ended(_)))
    }

    /// Starts the process of a container that was made.
    pub(super) fn start_process(&mut self, name: &str) {
        let owner = |name: &str| name.rsplit_once('-').map(|(owner, _)| owner.to_owned());
        let others = self.containers.keys().filter(|other| owner(other) == owner(name) && *other != name).cloned();
        let others: Vec<String> = others.filter(|other| self.is_alive(other)).collect();
        if !others.is_empty() {
            self.violation(format!("{name} was started while {others:?} run"));
        }
        if !self.leases.contains_key(name) {
            self.violation(format!("{name} was started without a lease"));
        }
        let starts = self.starts.entry(name.into()).or_default();
        *starts += 1;
        if *starts > 1 {
            let text = format!("{name} was started {starts} times");
            self.violation(text);
        }
        if let Some(container) = self.containers.get_mut(name) {
            container.state = FoundState::Running;
        }
    }

    pub(super) fn state_of(&self, workload: &str) -> Option<LeaseState> {
        if let Some(lease) = self.leases.get(workload) {
            return Some(LeaseState::Granted(lease.clone()));
        }
        if let Some(wait) = self.waits().into_iter().find(|wait| wait.workload == workload) {
            return Some(LeaseState::Waiting(wait));
        }
        self.ended.contains(workload).then(|| LeaseState::Ended { reason: "it was released".into() })
    }

    pub(super) fn waits(&self) -> Vec<Wait> {
        let waiting = u32::try_from(self.queue.len()).unwrap();
        let wait = |(place, request): (usize, &LeaseRequest)| Wait {
            project: request.project.clone(),
            slices: request.slices,
            nodes: request.nodes,
            priority: request.priority,
            workload: request.workload.clone(),
            user: request.user.clone(),
            need: request.need.clone(),
            since: Timestamp::UNIX_EPOCH,
            reason: match place {
                _ if !self.project_allows(request) => WaitReason::Quota,
                0 => WaitReason::NoSlice,
                _ => WaitReason::Priority,
            },
            detail: format!("{place} are before it"),
            place: u32::try_from(place).unwrap() + 1,
            waiting,
            estimate: None,
        };
        self.queue.iter().enumerate().map(wait).collect()
    }

    /// Grants what fits, first come first.
    pub(super) fn grant(&mut self) {
        while let Some(at) = self.queue.iter().position(|request| self.fits(request)) {
            if at > 0 && self.queue[..at].iter().any(|before| before.need != Need::Cpu) && !self.is_cpu(at) {
                return;
            }
            let request = self.queue.remove(at);
            self.fence += 1;
            let cpu = request.need == Need::Cpu;
            let slice = (0..self.slices).find(|slice| !self.holds(*slice));
            let now = Timestamp::now();
            let lease = Lease {
                workload: request.workload.clone(),
                user: request.user,
                fence: self.fence,
                node: "node".into(),
                need: request.need,
                profile: if cpu { "cpu".into() } else { "1g.5gb".into() },
                uuids: if cpu { Vec::new() } else { vec![format!("MIG-{}", slice.unwrap())] },
                memory_mib: if cpu { 0 } else { 4864 },
                slices: Vec::new(),
                project: request.project,
                priority: request.priority,
                preemptible: request.preemptible,
                expected_end: None,
                ending: None,
                trouble: None,
                granted_at: now,
                expires_at: now + LEASE,
                over: None,
            };
            self.leases.insert(request.workload, lease);
        }
    }

    /// What is known of users and projects, and what they hold.
    pub(super) fn account_states(&self) -> Vec<AccountState> {
        let state = |account: &Account| {
            let of = |lease: &&Lease| match &account.name {
                AccountName::User(user) => lease.user == *user,
                AccountName::Project(project) => lease.project.as_ref() == Some(project),
            };
            let held = self.leases.values().filter(of).map(|lease| lease.uuids.len()).sum::<usize>();
            AccountState {
                account: account.clone(),
                slices: u32::try_from(held).unwrap(),
                gpu_memory_mib: 4864 * u64::try_from(held).unwrap(),
                gpu_seconds: 0,
                committed_gpu_seconds: 0,
                faded_gpu_seconds: 0.0,
            }
        };
        self.accounts.iter().map(state).collect()
    }

    fn project_allows(&self, request: &LeaseRequest) -> bool {
        let Some(project) = &request.project else { return true };
        let name = AccountName::Project(project.clone());
        let state = self.account_states().into_iter().find(|state| state.account.name == name);
        state.is_none_or(|state| state.account.limits.slices.is_none_or(|most| state.slices < most))
    }

    fn is_cpu(&self, at: usize) -> bool {
        self.queue[at].need == Need::Cpu
    }

    fn holds(&self, slice: usize) -> bool {
        self.leases.values().any(|lease| lease.uuids.contains(&format!("MIG-{slice}")))
    }

    fn fits(&self, request: &LeaseRequest) -> bool {
        let mine = self.leases.values().filter(|lease| lease.user == request.user && !lease.uuids.is_empty()).count();
        let free = (0..self.slices).any(|slice| !self.holds(slice));
        let allowed = request.limits.slices.is_none_or(|most| mine < usize::try_from(most).unwrap());
        let allowed = allowed && self.project_allows(request);
        request.need == Need::Cpu || (free && allowed)
    }
}
