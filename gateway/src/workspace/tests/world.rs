//! A world for the tests of this room: an engine with containers, a machine with slices and a clock that
//! outlive the gateway, ways to break each, and a gateway that can be ended between any two of its calls.
//!
//! Written down as a violation is what must never happen, whatever the gateway goes through.

use crate::{
    runtime::{Ended, FoundState, RuntimeError, RuntimeEvent, WorkloadSpec},
    workspace::{Clock, later, parse_workload_name},
};
use async_trait::async_trait;
use jiff::Timestamp;
use mlad::api::{Ending, Lease, Need, Wait, WaitReason};
use mlad_allocator::{AllocatorError, LeaseRequest, LeaseState, Resolved};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::sync::{broadcast, watch};

/// Seconds a lease lasts.
pub(crate) const LEASE_SECONDS: u64 = 90;

/// When the world begins.
const BEGINNING: Timestamp = Timestamp::constant(1_000_000, 0);

/// A clock that stands until it is told to go on.
pub(crate) struct TestClock(watch::Sender<Timestamp>);

impl TestClock {
    pub(crate) fn advance(&self, by: Duration) {
        self.0.send_modify(|now| *now = later(*now, by));
    }
}

#[async_trait]
impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        *self.0.borrow()
    }

    async fn until(&self, time: Timestamp) {
        let _ = self.0.subscribe().wait_for(|now| *now >= time).await;
    }
}

/// What outlives the gateway.
#[derive(Clone)]
pub(crate) struct World(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) clock: Arc<TestClock>,
    state: Mutex<State>,
    pub(super) events: broadcast::Sender<RuntimeEvent>,
    pub(super) version: watch::Sender<u64>,
    /// Closed while the gateway is to be kept in a call of this name.
    pub(super) gates: watch::Sender<BTreeSet<&'static str>>,
    /// The calls that have begun, by name; for tests that wait for one.
    pub(super) calls: watch::Sender<BTreeMap<&'static str, u32>>,
}

pub(crate) struct State {
    pub(crate) engine_up: bool,
    pub(crate) allocator_up: bool,
    pub(crate) containers: BTreeMap<String, Container>,
    pub(crate) images: BTreeSet<&'static str>,
    /// Images that can be fetched.
    pub(crate) registry: BTreeSet<&'static str>,
    pub(crate) failing_starts: Vec<RuntimeError>,
    pub(crate) panics: u32,
    /// Who holds each slot.
    pub(super) slots: Vec<Option<String>>,
    pub(crate) leases: BTreeMap<String, Lease>,
    pub(crate) queue: Vec<(LeaseRequest, Timestamp)>,
    ended: BTreeMap<String, String>,
    fence: u64,
    /// The workloads that were published as running.
    pub(crate) observed: BTreeMap<String, String>,
    pub(crate) violations: Vec<String>,
}

pub(crate) struct Container {
    pub(crate) spec: WorkloadSpec,
    pub(crate) state: FoundState,
}

impl World {
    pub(crate) fn new(slots: usize) -> Self {
        let state = State {
            engine_up: true,
            allocator_up: true,
            containers: BTreeMap::new(),
            images: BTreeSet::from(["mlad/base:1", "mlad/torch:1"]),
            registry: BTreeSet::from(["registry.example/far:1"]),
            failing_starts: Vec::new(),
            panics: 0,
            slots: vec![None; slots],
            leases: BTreeMap::new(),
            queue: Vec::new(),
            ended: BTreeMap::new(),
            fence: 0,
            observed: BTreeMap::new(),
            violations: Vec::new(),
        };
        Self(Arc::new(Inner {
            clock: Arc::new(TestClock(watch::Sender::new(BEGINNING))),
            state: Mutex::new(state),
            events: broadcast::channel(1024).0,
            version: watch::Sender::new(1),
            gates: watch::Sender::default(),
            calls: watch::Sender::default(),
        }))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    pub(crate) fn clock(&self) -> Arc<TestClock> {
        Arc::clone(&self.0.clock)
    }

    /// Keeps every call of this name waiting.
    pub(crate) fn close(&self, call: &'static str) {
        self.0.gates.send_modify(|gates| {
            gates.insert(call);
        });
    }

    pub(crate) fn open(&self, call: &'static str) {
        self.0.gates.send_modify(|gates| {
            gates.remove(call);
        });
    }

    /// Returns when a call of this name has begun for the `count`th time.
    pub(crate) async fn called(&self, call: &'static str, count: u32) {
        let mut calls = self.0.calls.subscribe();
        let wait = calls.wait_for(|calls| calls.get(call).is_some_and(|seen| *seen >= count));
        tokio::time::timeout(super::PATIENCE, wait).await.expect("the call is made").unwrap();
    }

    pub(crate) fn calls(&self, call: &'static str) -> u32 {
        self.0.calls.borrow().get(call).copied().unwrap_or(0)
    }

    pub(crate) fn set_engine(&self, up: bool) {
        self.lock().engine_up = up;
        if up {
            let _ = self.0.events.send(RuntimeEvent::Resync);
        }
    }

    pub(crate) fn set_allocator(&self, up: bool) {
        self.lock().allocator_up = up;
        self.bump();
    }

    /// A container ends by itself.
    pub(crate) fn end_container(&self, name: &str, exit_code: i64, out_of_memory: bool) {
        let ended = FoundState::Ended(Ended { exit_code, out_of_memory, taken_away: None });
        self.lock().containers.get_mut(name).expect("it is there").state = ended;
        let _ = self.0.events.send(RuntimeEvent::Changed(name.to_owned()));
    }

    /// A lease, or a place in the queue, is taken away. Its slice stays held until it is released.
    pub(crate) fn revoke(&self, workload: &str, reason: &str) {
        self.lock().revoke(workload, reason);
        self.bump();
    }

    /// A lease is going to end at this time, or not any more.
    pub(crate) fn notice(&self, workload: &str, at: Option<Timestamp>) {
        let ending = at.map(|at| Ending { at, reason: "its project has used up its GPU time".into() });
        self.lock().leases.get_mut(workload).expect("it is granted").ending = ending;
        self.bump();
    }

    /// A container that somebody else left, and perhaps its lease.
    pub(crate) fn leave_container(&self, name: &str, spec: WorkloadSpec) {
        let container = Container { spec: WorkloadSpec { name: name.into(), ..spec }, state: FoundState::Running };
        self.lock().containers.insert(name.to_owned(), container);
    }

    pub(super) fn take_panic(&self) -> bool {
        let mut state = self.lock();
        let panics = state.panics > 0;
        state.panics = state.panics.saturating_sub(1);
        panics
    }

    pub(crate) fn bump(&self) {
        self.lock().grant(self.0.clock.now());
        self.0.version.send_modify(|version| *version += 1);
    }
}

impl State {
    pub(super) fn end(&mut self, workload: &str, reason: &str) {
        let lease = self.leases.remove(workload);
        let waiting = self.queue.iter().any(|(request, _)| request.workload == workload);
        self.queue.retain(|(request, _)| request.workload != workload);
        for slot in self.slots.iter_mut().filter(|slot| slot.as_deref() == Some(workload)) {
            *slot = None;
        }
        if lease.is_some() || waiting {
            self.ended.insert(workload.to_owned(), reason.to_owned());
        }
    }

    pub(super) fn revoke(&mut self, workload: &str, reason: &str) {
        match self.leases.get_mut(workload) {
            Some(lease) => lease.over = Some(reason.to_owned()),
            None => self.end(workload, reason),
        }
    }

    /// First come, first served; a need without a GPU does not wait.
    pub(super) fn grant(&mut self, now: Timestamp) {
        let mut index = 0;
        while let Some((request, _)) = self.queue.get(index) {
            let resolved = resolve(&request.need).unwrap();
            let free = self.slots.iter().position(Option::is_none);
            let slot = match (resolved.memory_mib, free) {
                (0, _) => None,
                (_, Some(slot)) => Some(slot),
                (_, None) => {
                    index += 1;
                    continue;
                }
            };
            let (request, _) = self.queue.remove(index);
            self.fence += 1;
            if let Some(slot) = slot {
                self.slots[slot] = Some(request.workload.clone());
            }
            let lease = Lease {
                workload: request.workload.clone(),
                user: request.user,
                fence: self.fence,
                node: "here".into(),
                need: request.need,
                profile: resolved.profile,
                uuids: slot.map(|slot| format!("MIG-{slot:04}-000000000000-{:012}", self.fence)).into_iter().collect(),
                memory_mib: resolved.memory_mib,
                slices: Vec::new(),
                project: request.project,
                priority: request.priority,
                preemptible: false,
                expected_end: None,
                ending: None,
                trouble: None,
                granted_at: now,
                expires_at: later(now, Duration::from_secs(LEASE_SECONDS)),
                over: None,
            };
            self.leases.insert(request.workload, lease);
        }
    }

    pub(super) fn waits(&self) -> Vec<Wait> {
        let waiting = u32::try_from(self.queue.len()).unwrap();
        let wait = |(at, (request, since)): (usize, &(LeaseRequest, Timestamp))| Wait {
            project: None,
            slices: 1,
            nodes: None,
            priority: 0,
            workload: request.workload.clone(),
            user: request.user.clone(),
            need: request.need.clone(),
            since: *since,
            reason: if at == 0 { WaitReason::NoSlice } else { WaitReason::Priority },
            detail: "every slice is held".into(),
            place: u32::try_from(at).unwrap() + 1,
            waiting,
            estimate: None,
        };
        self.queue.iter().enumerate().map(wait).collect()
    }

    pub(super) fn state_of(&self, workload: &str) -> Option<LeaseState> {
        if let Some(lease) = self.leases.get(workload) {
            return Some(match lease.over.clone() {
                Some(reason) => LeaseState::Ended { reason },
                None => LeaseState::Granted(lease.clone()),
            });
        }
        if let Some(wait) = self.waits().into_iter().find(|wait| wait.workload == workload) {
            return Some(LeaseState::Waiting(wait));
        }
        self.ended.get(workload).map(|reason| LeaseState::Ended { reason: reason.clone() })
    }

    /// What must never be when a container is started.
    pub(super) fn check_start(&mut self, spec: &WorkloadSpec) {
        let mut wrong = Vec::new();
        match self.leases.get(&spec.name) {
            Some(lease) if lease.fence == spec.fence && lease.uuids == spec.gpu_uuids => {}
            _ => wrong.push("it has no lease, or another's slice"),
        }
        for other in self.containers.values().filter(|other| other.spec.name != spec.name) {
            if other.spec.gpu_uuids.iter().any(|uuid| spec.gpu_uuids.contains(uuid)) {
                wrong.push("its slice is in another container");
            }
            if parse_workload_name(&other.spec.name).map(|name| name.0)
                == parse_workload_name(&spec.name).map(|name| name.0)
            {
                wrong.push("another container of its workspace is left");
            }
        }
        let wrong = wrong.into_iter().map(|what| format!("{} was started, but {what}", spec.name));
        self.violations.extend(wrong);
    }

    pub(super) fn check_release(&mut self, workload: &str) {
        if self.containers.contains_key(workload) {
            self.violations.push(format!("the lease of {workload} was released while its container was there"));
        }
    }
}

pub(super) fn resolve(need: &Need) -> Result<Resolved, AllocatorError> {
    let known = [("1g.5gb", 4864), ("2g.10gb", 9856), ("3g.20gb", 19968), ("7g.40gb", 40192)];
    let found = match need {
        Need::Cpu => Some(("cpu", 0)),
        Need::Gpu => Some(("7g.40gb", 40192)),
        Need::Profile(name) => known.into_iter().find(|(profile, _)| profile == name),
        Need::MemoryMib(mib) => known.into_iter().find(|(_, memory)| memory >= mib),
        Need::On { .. } => None,
    };
    let (profile, memory_mib) = found.ok_or_else(|| {
        AllocatorError::Impossible(format!("no GPU here has {need}; 1g.5gb, 2g.10gb, 3g.20gb, 7g.40gb would fit"))
    })?;
    Ok(Resolved { profile: profile.to_owned(), memory_mib })
}
