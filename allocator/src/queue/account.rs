//! Users and projects: what each may hold and use up, and how much of the GPUs each has had.
//!
//! A request counts for its user, and for its project and every project that one lies in; each of them has limits
//! of its own, and all have to allow it. For the fair share users are told apart within each project, and those
//! outside projects stand beside the projects.

use super::meter::{Charge, Meter};
use crate::{Account, AccountName, AccountState, Limits};
use jiff::Timestamp;
use std::{collections::HashMap, sync::Arc, time::Duration};

/// Projects lie in one another at most so deep.
pub const DEEPEST: usize = 8;
/// The most users and projects that are kept.
pub const MOST_ACCOUNTS: usize = 100_000;

/// A user or project, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AccountId(u32);

/// A user within a project, or outside of any, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeafId(u32);

/// Where in the tree of shares something stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Node {
    Project(AccountId),
    Leaf(LeafId),
}

/// Every user and project.
#[derive(Debug, Clone)]
pub struct Accounts {
    half_life: f64,
    accounts: Vec<Record>,
    by_name: HashMap<AccountName, AccountId>,
    leaves: Vec<Leaf>,
    by_leaf: HashMap<(Arc<str>, Option<Arc<str>>), LeafId>,
}

#[derive(Debug, Clone)]
struct Record {
    account: Account,
    meter: Meter,
}

#[derive(Debug, Clone)]
struct Leaf {
    user: AccountId,
    project: Option<AccountId>,
    meter: Meter,
}

/// What a request comes to, for limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Slices.
    pub slices: u32,
    /// GPU memory of them all, in MiB.
    pub memory_mib: u64,
    /// What of whole GPUs they are together, in millionths.
    pub share: u64,
    /// Seconds they are wanted for at most, if that is known.
    pub expected_seconds: Option<u64>,
}

impl Accounts {
    /// Nobody yet; what was used counts half after every `half_life`.
    pub fn new(half_life: Duration) -> Self {
        Self {
            half_life: half_life.as_secs_f64().max(1.0),
            accounts: Vec::new(),
            by_name: HashMap::new(),
            leaves: Vec::new(),
            by_leaf: HashMap::new(),
        }
    }

    /// The number of a user within a project.
    pub fn leaf(&mut self, user: &Arc<str>, project: Option<&Arc<str>>) -> LeafId {
        let key = (Arc::clone(user), project.map(Arc::clone));
        if let Some(known) = self.by_leaf.get(&key) {
            return *known;
        }
        let leaf = LeafId(u32::try_from(self.leaves.len()).unwrap_or(u32::MAX));
        let user = self.account(&AccountName::User(user.to_string()));
        let project = project.map(|project| self.account(&AccountName::Project(project.to_string())));
        self.leaves.push(Leaf { user, project, meter: Meter::default() });
        self.by_leaf.insert(key, leaf);
        leaf
    }

    /// Sets shares and limits of these. A parent that is not known is made, without limits.
    ///
    /// # Errors
    /// When a project would lie within itself, or too deep.
    pub fn set(&mut self, accounts: &[Account], now: Timestamp) -> Result<(), String> {
        if self.accounts.len() + accounts.len() > MOST_ACCOUNTS {
            return Err(format!("{MOST_ACCOUNTS} users and projects are the most there can be"));
        }
        let new: HashMap<&AccountName, &Account> = accounts.iter().map(|account| (&account.name, account)).collect();
        let parent = |name: &AccountName| match new.get(name) {
            Some(account) => account.parent.clone(),
            None => self.get(name)?.parent.clone(),
        };
        let is_rooted = |account: &&Account| {
            let up = |name: &AccountName| parent(name).map(AccountName::Project);
            std::iter::successors(up(&account.name), up).take(DEEPEST + 1).count() <= DEEPEST
        };
        if let Some(wrong) = accounts.iter().find(|account| !is_rooted(account)) {
            return Err(format!("{} lies within itself, or in more than {DEEPEST} projects", name_of(&wrong.name)));
        }
        accounts.iter().for_each(|account| self.put(account, now));
        Ok(())
    }

    /// Sets the limits of a user. True if they were others.
    pub fn tell(&mut self, user: &Arc<str>, limits: Limits) -> bool {
        let id = self.account(&AccountName::User(user.to_string()));
        let Some(record) = self.record_mut(id) else { return false };
        std::mem::replace(&mut record.account.limits, limits) != limits
    }

    /// What is wanted of a user or project.
    pub fn get(&self, name: &AccountName) -> Option<&Account> {
        self.by_name.get(name).and_then(|id| self.record(*id)).map(|record| &record.account)
    }

    /// The name of one, in words.
    pub fn name(&self, id: AccountId) -> Option<String> {
        self.record(id).map(|record| name_of(&record.account.name))
    }

    /// Counts something that is held now.
    pub fn add(&mut self, leaf: LeafId, charge: &Charge, now: Timestamp) {
        let half_life = self.half_life;
        self.each(leaf, |meter| meter.add(charge, now, half_life));
    }

    /// Counts it no longer.
    pub fn take(&mut self, leaf: LeafId, charge: &Charge, now: Timestamp) {
        let half_life = self.half_life;
        self.each(leaf, |meter| meter.take(charge, now, half_life));
    }

    /// Counts GPU time, in microseconds, that was used on a day (since 1970) by what is over. `faded`: it was
    /// counted for the fair share while it was held.
    pub fn spend(&mut self, leaf: LeafId, day: i64, gpu_us: u64, faded: bool, now: Timestamp) {
        let half_life = self.half_life;
        self.each(leaf, |meter| meter.spend(day, gpu_us, faded, now, half_life));
    }

    /// Whether the limits allow something more; if not, whose do not.
    ///
    /// # Errors
    /// The first user or project whose limits do not allow it.
    pub fn allow(&self, leaf: LeafId, wanted: &Wanted, now: Timestamp) -> Result<(), AccountId> {
        self.allow_beside(leaf, wanted, std::iter::empty(), now)
    }

    /// The same, beside what others have been promised and do not hold yet.
    ///
    /// # Errors
    /// The first user or project whose limits do not allow it.
    pub(super) fn allow_beside<'a>(
        &self,
        leaf: LeafId,
        wanted: &Wanted,
        promised: impl Iterator<Item = (LeafId, &'a Wanted)> + Clone,
        now: Timestamp,
    ) -> Result<(), AccountId> {
        let is_over = |id: &AccountId| {
            let Some(Record { account, meter }) = self.record(*id) else { return false };
            let limits = account.limits;
            if limits == Limits::default() {
                return false;
            }
            let promised = promised.clone().filter(|(leaf, _)| self.is_of(*leaf, *id));
            let (mut slices, mut memory, mut time) = (meter.slices, meter.memory_mib, 0u64);
            for (_, promised) in promised {
                slices = slices.saturating_add(promised.slices);
                memory = memory.saturating_add(promised.memory_mib);
                time = time.saturating_add(promised.share.saturating_mul(promised.expected_seconds.unwrap_or(0)));
            }
            limits.slices.is_some_and(|most| slices.saturating_add(wanted.slices) > most)
                || limits.gpu_memory_mib.is_some_and(|most| memory.saturating_add(wanted.memory_mib) > most)
                || limits.gpu_seconds.is_some_and(|most| is_used_up(meter, time, most, wanted, now))
        };
        self.chain(leaf).find(is_over).map_or(Ok(()), Err)
    }

    /// Whether something would be allowed if nobody held anything: if not, it waits for ever.
    ///
    /// # Errors
    /// The first user or project whose limits it is over alone.
    pub fn could_allow(&self, leaf: LeafId, wanted: &Wanted) -> Result<(), AccountId> {
        let over = self.chain(leaf).find(|id| {
            self.record(*id).is_some_and(|record| {
                let Limits { slices, gpu_memory_mib, gpu_seconds } = record.account.limits;
                let time = wanted.expected_seconds.map(|seconds| wanted.share.saturating_mul(seconds) / 1_000_000);
                slices.is_some_and(|most| wanted.slices > most)
                    || gpu_memory_mib.is_some_and(|most| wanted.memory_mib > most)
                    || gpu_seconds.is_some_and(|most| time.unwrap_or(1) > most)
            })
        });
        over.map_or(Ok(()), Err)
    }

    /// Every user and project whose GPU time is going to be used up by what has no known end, and when.
    pub fn exhausted(&self, now: Timestamp) -> impl Iterator<Item = (AccountId, Timestamp)> + '_ {
        let ids = (0..).map(AccountId).zip(&self.accounts);
        ids.filter_map(move |(id, record)| {
            Some((id, record.meter.exhausted_at(record.account.limits.gpu_seconds?, now)?))
        })
    }

    /// Whether what counts for a leaf counts for an account.
    pub fn is_of(&self, leaf: LeafId, account: AccountId) -> bool {
        self.chain(leaf).any(|id| id == account)
    }

    /// One of them, and what of its limits is used.
    pub fn state(&self, id: AccountId, now: Timestamp) -> Option<AccountState> {
        let Record { account, meter } = self.record(id)?;
        let seconds = |micros: u64| micros.div_ceil(1_000_000);
        Some(AccountState {
            account: account.clone(),
            slices: meter.slices,
            gpu_memory_mib: meter.memory_mib,
            gpu_seconds: seconds(meter.used_us(now)),
            committed_gpu_seconds: seconds(meter.committed_us()),
            faded_gpu_seconds: meter.faded(now, self.half_life).0,
        })
    }

    /// All of them.
    pub fn states(&self, now: Timestamp) -> Vec<AccountState> {
        let ids = (0..).map(AccountId).zip(&self.accounts);
        let mut states: Vec<AccountState> = ids.filter_map(|(id, _)| self.state(id, now)).collect();
        states.sort_by(|a, b| a.account.name.cmp(&b.account.name));
        states
    }

    /// Slices and memory in MiB that a user holds.
    pub fn held_by(&self, user: &str) -> (u32, u64) {
        let id = self.by_name.get(&AccountName::User(user.to_owned()));
        id.and_then(|id| self.record(*id)).map_or((0, 0), |record| (record.meter.slices, record.meter.memory_mib))
    }

    /// Where a leaf stands in the tree of shares, from the root down, itself included.
    pub(super) fn path(&self, leaf: LeafId) -> Vec<Node> {
        let project = self.leaves.get(leaf.0 as usize).and_then(|leaf| leaf.project);
        let mut path: Vec<Node> = self.projects(project).map(Node::Project).collect();
        path.reverse();
        path.push(Node::Leaf(leaf));
        path
    }

    /// The share of something, and the GPU time it has had by it.
    pub(super) fn turn(&self, node: Node, now: Timestamp) -> (f64, f64) {
        let shares = |id: AccountId| self.record(id).map_or(1, |record| record.account.shares).max(1);
        let (shares, meter) = match node {
            Node::Project(id) => (shares(id), self.record(id).map(|record| &record.meter)),
            Node::Leaf(leaf) => {
                let leaf = self.leaves.get(leaf.0 as usize);
                (leaf.map_or(1, |leaf| shares(leaf.user)), leaf.map(|leaf| &leaf.meter))
            }
        };
        let used = meter.map_or(0.0, |meter| meter.faded(now, self.half_life).1);
        (f64::from(shares), used / f64::from(shares))
    }

    fn account(&mut self, name: &AccountName) -> AccountId {
        if let Some(known) = self.by_name.get(name) {
            return *known;
        }
        let id = AccountId(u32::try_from(self.accounts.len()).unwrap_or(u32::MAX));
        let account = Account { name: name.clone(), parent: None, shares: 1, limits: Limits::default() };
        self.accounts.push(Record { account, meter: Meter::default() });
        self.by_name.insert(name.clone(), id);
        id
    }

    /// Puts what is wanted in place. What a project holds and has used moves with it, to where it lies now.
    fn put(&mut self, account: &Account, now: Timestamp) {
        if let Some(parent) = &account.parent {
            self.account(&AccountName::Project(parent.clone()));
        }
        let id = self.account(&account.name);
        let before: Vec<AccountId> = self.projects(Some(id)).skip(1).collect();
        let Some(record) = self.record_mut(id) else { return };
        record.account = Account { shares: account.shares.clamp(1, 1_000_000), ..account.clone() };
        let own = record.meter.clone();
        let after: Vec<AccountId> = self.projects(Some(id)).skip(1).collect();
        if before == after {
            return;
        }
        let half_life = self.half_life;
        for id in before {
            self.record_mut(id).into_iter().for_each(|above| above.meter.minus(&own, now, half_life));
        }
        for id in after {
            self.record_mut(id).into_iter().for_each(|above| above.meter.plus(&own, now, half_life));
        }
    }

    fn record(&self, id: AccountId) -> Option<&Record> {
        self.accounts.get(id.0 as usize)
    }

    fn record_mut(&mut self, id: AccountId) -> Option<&mut Record> {
        self.accounts.get_mut(id.0 as usize)
    }

    /// A project, and those that it lies in.
    fn projects(&self, project: Option<AccountId>) -> impl Iterator<Item = AccountId> + '_ {
        let parent = |id: &AccountId| {
            let parent = self.record(*id)?.account.parent.clone()?;
            self.by_name.get(&AccountName::Project(parent)).copied()
        };
        // Bounded, whatever was set.
        std::iter::successors(project, parent).take(DEEPEST + 1)
    }

    /// Every account that a leaf counts for.
    fn chain(&self, leaf: LeafId) -> impl Iterator<Item = AccountId> + '_ {
        let leaf = self.leaves.get(leaf.0 as usize);
        let user = leaf.map(|leaf| leaf.user);
        user.into_iter().chain(self.projects(leaf.and_then(|leaf| leaf.project)))
    }

    fn each(&mut self, leaf: LeafId, count: impl Fn(&mut Meter)) {
        let chain: Vec<AccountId> = self.chain(leaf).collect();
        for id in chain {
            self.record_mut(id).into_iter().for_each(|record| count(&mut record.meter));
        }
        self.leaves.get_mut(leaf.0 as usize).into_iter().for_each(|leaf| count(&mut leaf.meter));
    }
}

/// Whether GPU time is over its limit with what is wanted, beside so many microseconds that are promised.
fn is_used_up(meter: &Meter, promised_us: u64, limit_seconds: u64, wanted: &Wanted, now: Timestamp) -> bool {
    let limit = limit_seconds.saturating_mul(1_000_000);
    let before = meter.used_us(now).saturating_add(meter.committed_us()).saturating_add(promised_us);
    match wanted.expected_seconds {
        Some(seconds) => before.saturating_add(wanted.share.saturating_mul(seconds)) > limit,
        // It is ended when the time is used up; there has to be some.
        None => before >= limit,
    }
}

/// A user or project in words.
pub(crate) fn name_of(name: &AccountName) -> String {
    match name {
        AccountName::User(user) => user.clone(),
        AccountName::Project(project) => format!("the project {project}"),
    }
}
