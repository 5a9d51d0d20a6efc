//! What the ledger tells.

use super::{
    gpu::{Gpu, key_of},
    ledger::{Ledger, Standing, Waiting},
    line::held_slots,
    nodes::Machine,
    record::{Ending, LeaseRow, Now, SliceRow, Status},
};
use crate::{
    AllocatorError, LeaseState,
    geometry::{Columns, Placed, Profile, Resolution},
    placement::{self, Shortage, plan},
    queue::{self, Block, Entry, Facts, Scene},
};
use jiff::{SignedDuration, Timestamp};
use mlad::api::{GpuMap, Holder, Lease, LeasedSlice, Need, ProfileRoom, Slice, SliceState, Wait};
use std::{collections::HashMap, sync::OnceLock, time::Duration};

/// Estimates are worked out anew this often while a lease is overdue: it may end any moment, and each moment that
/// it does not puts off what comes after it.
const OVERDUE: SignedDuration = SignedDuration::from_secs(5);

/// What there is to tell of all waiting requests together; good until something changes, or until time has shown
/// its estimates wrong.
pub(super) struct Outlook {
    line: queue::Outlook,
    /// Until when the estimates are good.
    until: Timestamp,
    /// Every waiting request, first in line first, and the place of each: worked out when they are first needed.
    order: OnceLock<(Vec<u64>, HashMap<u64, usize>)>,
    /// By need, for those that wait for space: what is missing, and which lease alone is in the way.
    shortages: HashMap<String, (Shortage, Option<String>)>,
    free: Vec<String>,
    faults: Vec<String>,
    troubles: Vec<String>,
}

impl Outlook {
    /// Whether it can still be told.
    pub(super) fn is_good(&self, now: Timestamp) -> bool {
        now <= self.until
    }
}
/// So many leases that are in the way of a request are compared.
const IN_THE_WAY: usize = 1024;

impl Ledger {
    /// What became of the request of a workload; none if it neither waits nor holds anything.
    pub(super) fn state(&self, workload: &str, outlook: &Outlook, now: Timestamp) -> Option<LeaseState> {
        let Some(standing) = self.known.get(workload) else {
            let reason = self.just_ended.get(workload)?.clone();
            return Some(LeaseState::Ended { reason });
        };
        match standing {
            Standing::Waiting(seq) => Some(LeaseState::Waiting(self.wait(
                self.waiting.get(seq)?,
                self.ahead(*seq, outlook, now),
                outlook,
                now,
            ))),
            Standing::Leased(fence) => Some(match self.leases.get(fence)? {
                LeaseRow { status: Status::Over(reason), .. } => LeaseState::Ended { reason: reason.clone() },
                lease => LeaseState::Granted(self.told(lease)),
            }),
        }
    }

    /// How many requests wait ahead of one.
    fn ahead(&self, seq: u64, outlook: &Outlook, now: Timestamp) -> usize {
        if self.waiting.len() <= 1 {
            return 0;
        }
        self.order(outlook, now).1.get(&seq).copied().unwrap_or(0)
    }

    fn order<'a>(&self, outlook: &'a Outlook, now: Timestamp) -> &'a (Vec<u64>, HashMap<u64, usize>) {
        outlook.order.get_or_init(|| {
            let line = self.line.order(&self.waiting, &self.accounts, self.rules.patience, now);
            let order: Vec<u64> = line.map(|entry| entry.seq).collect();
            let places = order.iter().enumerate().map(|(at, seq)| (*seq, at)).collect();
            (order, places)
        })
    }

    /// The lease of a workload.
    pub(super) fn lease(&self, workload: &str) -> Result<Lease, AllocatorError> {
        match self.known.get(workload) {
            Some(Standing::Leased(fence)) => self.leases.get(fence).map(|lease| self.told(lease)),
            None if self.just_ended.contains_key(workload) => {
                return Err(AllocatorError::Ended(workload.to_owned()));
            }
            Some(Standing::Waiting(_)) | None => None,
        }
        .ok_or_else(|| AllocatorError::Unknown(workload.to_owned()))
    }

    /// Every lease that holds a slice, by workload.
    pub(super) fn all_leases(&self) -> Vec<Lease> {
        let mut leases: Vec<Lease> = self.leases.values().map(|lease| self.told(lease)).collect();
        leases.sort_by(|a, b| a.workload.cmp(&b.workload));
        leases
    }

    /// What there is to tell of all waiting requests together.
    pub(super) fn outlook(&self, now: Timestamp) -> Outlook {
        let held = || held_slots(&self.leases, &self.waiting, &self.gpus, Now { wall: now, steady: Duration::ZERO });
        let reserved = self.reserved();
        let scene = Scene { now, policy: &self.policy, rules: self.rules, held: &held, reserved: &reserved };
        let order = || self.line.order(&self.waiting, &self.accounts, self.rules.patience, now);
        let line = queue::Outlook::new(order(), &self.accounts, &mut self.pool.clone(), &scene);
        let ends = self.leases.values().filter(|lease| !lease.slices.is_empty()).filter_map(LeaseRow::known_end);
        let begins = self.reservations.values().flat_map(|row| [row.booking.from, row.booking.until]);
        let begins = begins.filter(|at| *at > now);
        let again = now.checked_add(OVERDUE).unwrap_or(Timestamp::MAX);
        let until = ends.map(|end| if end > now { end } else { again }).chain(begins).min().unwrap_or(Timestamp::MAX);
        let faults = self.faults();
        let troubles = self.gpus.iter().flat_map(|gpu| gpu.troubles(&self.place(&gpu.node, gpu.index)));
        let troubles = troubles.chain(faults.clone()).collect();
        let mut shortages = HashMap::new();
        let near = order().take(queue::LOOK_AHEAD).filter(|entry| entry.gang.slices == 1);
        for entry in near.filter(|entry| self.block(entry, &line, now) == Block::Space) {
            let (Some(waiting), Some(wanted)) = (self.waiting.get(&entry.seq), &entry.wanted) else { continue };
            let told = || (placement::shortage(&self.pool, wanted), self.in_the_way(wanted));
            shortages.entry(waiting.row.need.to_string()).or_insert_with(told);
        }
        let free = self.free_profiles();
        Outlook { line, until, order: OnceLock::new(), shortages, free, faults, troubles }
    }

    fn block(&self, entry: &Entry, line: &queue::Outlook, now: Timestamp) -> Block {
        line.block(entry, &self.accounts, &self.pool, now)
    }

    /// The lease whose end alone makes room, in words; of several the one that is known to end first, then the
    /// oldest.
    fn in_the_way(&self, wanted: &Resolution) -> Option<String> {
        let lease = |(gpu, placed): (usize, Placed)| {
            let gpu = self.gpus.get(gpu)?;
            let fence = self.holders.get(&(gpu.uuid.clone(), gpu.key(placed)?))?;
            self.leases.get(fence)
        };
        let ends = placement::single_ends(&self.pool, wanted);
        let found = ends
            .into_iter()
            .take(IN_THE_WAY)
            .filter_map(lease)
            .min_by_key(|lease| (lease.known_end().unwrap_or(Timestamp::MAX), lease.fence))?;
        let LeaseRow { request, profile, slices, .. } = found;
        let place = slices.first().map(|slice| self.place(&slice.node, slice.gpu_index))?;
        Some(format!("{} of {} ({profile} on {place})", request.workload, request.user))
    }

    /// Every waiting request, first in line first.
    pub(super) fn waits(&self, outlook: &Outlook, now: Timestamp) -> Vec<Wait> {
        let (order, _) = self.order(outlook, now);
        let waiting = order.iter().enumerate().filter_map(|(ahead, seq)| Some((ahead, self.waiting.get(seq)?)));
        waiting.map(|(ahead, waiting)| self.wait(waiting, ahead, outlook, now)).collect()
    }

    fn wait(&self, waiting: &Waiting, ahead: usize, outlook: &Outlook, now: Timestamp) -> Wait {
        let Waiting { row, entry, .. } = waiting;
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let block = self.block(entry, &outlook.line, now);
        let before = match block {
            Block::Behind(seq) => self.waiting.get(&seq).map(|before| (before.row.user.as_ref(), &before.row.need)),
            _ => None,
        };
        let short = outlook.shortages.get(&row.need.to_string()).filter(|_| block == Block::Space);
        let account = match block {
            Block::Quota(account) => self.accounts.state(account, now),
            _ => None,
        };
        let facts = Facts {
            need: &row.need,
            slices: row.slices,
            account: account.as_ref(),
            ahead: before,
            free: &outlook.free,
            shortage: short.map(|(shortage, _)| *shortage),
            reservation: match block {
                Block::Reserved(id) => self.told_of(id),
                _ => entry.reservation().and_then(|id| self.told_of(id)),
            },
            blocker: short.and_then(|(_, lease)| lease.as_deref()),
            faults: &outlook.faults,
            troubles: &outlook.troubles,
        };
        let (reason, detail) = queue::explain(block, &facts);
        Wait {
            workload: row.workload.clone(),
            user: row.user.to_string(),
            project: row.project.as_deref().map(str::to_owned),
            need: row.need.clone(),
            slices: row.slices,
            nodes: row.nodes,
            priority: row.priority,
            since: row.requested_at,
            reason,
            detail,
            place: number(ahead + 1),
            waiting: number(self.waiting.len()),
            // One that has passed may come true any moment.
            estimate: outlook.line.estimate(row.seq).map(|estimate| estimate.max(now)),
        }
    }

    /// Every GPU and what is on it.
    pub(super) fn map(&self) -> GpuMap {
        let mut gpus: Vec<mlad::api::Gpu> = self.gpus.iter().map(|gpu| self.gpu_to_api(gpu)).collect();
        let unread = self.nodes.iter().flat_map(|(name, node)| node.unread.iter().map(move |unread| (name, unread)));
        gpus.extend(unread.map(|(node, (index, unread))| mlad::api::Gpu {
            node: node.clone(),
            index: *index,
            uuid: unread.uuid.clone().unwrap_or_else(|| "unknown".to_owned()),
            model: "unknown".to_owned(),
            memory_mib: 0,
            mig: false,
            columns: 0,
            slices: Vec::new(),
            profiles: Vec::new(),
            read_at: None,
            fault: Some(unread.doubt.reason.clone()),
        }));
        gpus.sort_by(|a, b| (&a.node, a.index).cmp(&(&b.node, b.index)));
        // What is told of a machine that does not answer is older, and says so.
        let as_of = self.nodes.values().map(|node| node.read_at).max().unwrap_or(Timestamp::UNIX_EPOCH);
        GpuMap { gpus, as_of, late: None }
    }

    fn gpu_to_api(&self, gpu: &Gpu) -> mlad::api::Gpu {
        let changing = |key| {
            let change = |change: &crate::node::Change| {
                change.destroy.contains(&key) || change.make.is_some_and(|(profile, at)| (profile, at.start) == key)
            };
            self.changes.values().any(|repartition| repartition.gpu == gpu.uuid && change(&repartition.change))
        };
        let slice = |instance: &crate::node::Instance| {
            let key = key_of(instance);
            let profile = gpu.model.by_id(key.0).and_then(|index| gpu.model.profile(index));
            let lease = self.holders.get(&(gpu.uuid.clone(), key)).and_then(|fence| self.leases.get(fence));
            let state = match lease.map(|lease| &lease.status) {
                Some(Status::Active) => SliceState::Leased,
                Some(Status::Expired | Status::Over(_)) => SliceState::Quarantined,
                None if gpu.doubts.contains_key(&key) || changing(key) => SliceState::Quarantined,
                None => SliceState::Idle,
            };
            Slice {
                profile: profile.map_or_else(|| format!("profile {}", key.0), |profile| profile.name.clone()),
                uuid: gpu.device(key).unwrap_or_default().to_owned(),
                placement: gpu.model.sliced.then_some(instance.placement),
                memory_mib: profile.map_or(0, |profile| profile.memory_mib),
                state,
                holder: lease.map(|lease| Holder {
                    user: lease.request.user.to_string(),
                    workload: lease.request.workload.clone(),
                    since: lease.granted_at,
                    until: lease.known_end(),
                }),
            }
        };
        let mut slices: Vec<Slice> = gpu.instances.iter().map(slice).collect();
        slices.retain(|slice| gpu.model.sliced || slice.state != SliceState::Idle);
        slices.sort_by_key(|slice| slice.placement);
        mlad::api::Gpu {
            node: gpu.node.to_string(),
            index: gpu.index,
            uuid: gpu.uuid.clone(),
            model: gpu.model.name.clone(),
            memory_mib: gpu.model.memory_mib,
            mig: gpu.model.sliced,
            columns: if gpu.model.sliced { gpu.model.columns } else { 0 },
            slices,
            profiles: self.rooms(gpu),
            read_at: Some(gpu.read_at),
            fault: gpu.fault.as_ref().map(|fault| fault.reason.clone()).or_else(|| self.in_quarantine(&gpu.uuid)),
        }
    }

    /// How much room a GPU has for each of its profiles, the smallest first.
    fn rooms(&self, gpu: &Gpu) -> Vec<ProfileRoom> {
        let at = self.gpus.iter().position(|other| other.uuid == gpu.uuid);
        let Some(space) = at.and_then(|at| self.pool.gpus().get(at)).filter(|space| space.usable) else {
            return Vec::new();
        };
        let mut profiles: Vec<_> = gpu.model.profiles().iter().enumerate().collect();
        profiles.sort_by_key(|(_, profile)| (profile.memory_mib, profile.columns, profile.resources.compute));
        let room = |(index, profile): (usize, &Profile)| ProfileRoom {
            profile: profile.name.clone(),
            memory_mib: profile.memory_mib,
            free: space.room(&gpu.model, index),
            most: gpu.model.room(index, Columns::NONE),
        };
        profiles.into_iter().map(room).collect()
    }

    /// Names of the base profiles for which there is space now, largest first.
    fn free_profiles(&self) -> Vec<String> {
        let profiles = self.pool.models().iter().flat_map(|model| model.profiles());
        let plain = profiles.filter(|profile| profile.is_plain());
        let sizes: HashMap<&str, u64> = plain.map(|profile| (profile.name.as_str(), profile.memory_mib)).collect();
        let mut names: Vec<(&str, u64)> = sizes.into_iter().collect();
        names.sort_by_key(|(name, memory)| (std::cmp::Reverse(*memory), *name));
        let fits = |name: &str| {
            let need = if name == "gpu" { Need::Gpu } else { Need::Profile(name.to_owned()) };
            let resolution = crate::geometry::resolve(&need, self.pool.models()).ok();
            resolution.is_some_and(|wanted| plan(&self.pool, &wanted, &self.policy, |_, _| true).is_some())
        };
        names.into_iter().map(|(name, _)| name).filter(|name| fits(name)).map(str::to_owned).collect()
    }

    fn faults(&self) -> Vec<String> {
        let of = |(name, machine): (&String, &Machine)| {
            if let Some(all) = machine.absence(name).or_else(|| machine.down.clone()) {
                return vec![all];
            }
            let here = self.gpus.iter().filter(|gpu| *gpu.node == **name);
            let wrong = |gpu: &Gpu| gpu.fault.as_ref().map(|fault| fault.reason.clone());
            let known = here.filter_map(|gpu| Some((gpu.index, wrong(gpu).or_else(|| self.in_quarantine(&gpu.uuid))?)));
            let unread = machine.unread.iter().map(|(index, unread)| (*index, unread.doubt.reason.clone()));
            known.chain(unread).map(|(index, reason)| format!("{}: {reason}", self.place(name, index))).collect()
        };
        self.nodes.iter().flat_map(of).collect()
    }
}

impl LeaseRow {
    /// When it is known to end at the latest, if that is known.
    pub(super) fn known_end(&self) -> Option<Timestamp> {
        let expected = self.request.expected_seconds.and_then(|seconds| queue::after(self.granted_at, seconds));
        let ending = self.ending.as_ref().map(|ending| ending.at);
        let reserved = self.request.booked.as_ref().map(|booked| booked.booking.until);
        expected.into_iter().chain(ending).chain(reserved).min()
    }

    pub(super) fn to_api(&self) -> Lease {
        let ending = |ending: &Ending| mlad::api::Ending { at: ending.at, reason: ending.reason.clone() };
        Lease {
            workload: self.request.workload.clone(),
            user: self.request.user.to_string(),
            fence: self.fence,
            node: self.node.clone(),
            need: self.request.need.clone(),
            profile: self.profile.clone(),
            uuids: self.slices.iter().map(|slice| slice.uuid.clone()).collect(),
            memory_mib: self.memory_mib,
            slices: self.slices.iter().map(SliceRow::to_api).collect(),
            project: self.request.project.as_deref().map(str::to_owned),
            priority: self.request.priority,
            preemptible: self.request.preemptible,
            expected_end: self.known_end(),
            ending: self.ending.as_ref().map(ending),
            granted_at: self.granted_at,
            expires_at: self.expires_at,
            trouble: None,
            over: match &self.status {
                Status::Over(reason) => Some(reason.clone()),
                Status::Active | Status::Expired => None,
            },
        }
    }
}

impl SliceRow {
    pub(super) fn to_api(&self) -> LeasedSlice {
        LeasedSlice {
            node: self.node.clone(),
            gpu: self.gpu.clone(),
            gpu_index: self.gpu_index,
            uuid: self.uuid.clone(),
            placement: (!self.whole).then_some(self.placement),
        }
    }
}
