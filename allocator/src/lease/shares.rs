//! Whose limits and whose share a lease counts for.

use super::{
    ledger::Ledger,
    line::steady,
    record::{Ending, LeaseRow, Now, Status, UsedRow, Write},
    store::Loaded,
};
use crate::{
    Account, AccountName, AccountState, AllocatorError, LeaseRequest, Limits,
    geometry::Resolution,
    placement::{Gang, Pool, Space, plan_all},
    queue::{Accounts, Charge, Entry, wanted_on},
};
use std::{sync::Arc, time::Duration};

/// The most accounts that are set by one call.
const MOST_SET: usize = 20_000;
/// The longest name of a project, in bytes.
const LONGEST_PROJECT: usize = 128;
/// GPU time that is going to be used up is looked at again after this, if nothing else happens before.
const LOOK: Duration = Duration::from_secs(3600);

impl Ledger {
    /// Sets shares and limits of users and projects.
    pub(super) fn set_accounts(&mut self, accounts: &[Account], now: Now) -> Result<(), AllocatorError> {
        if accounts.len() > MOST_SET {
            return Err(AllocatorError::Invalid(format!("{MOST_SET} accounts are the most that one call sets")));
        }
        if let Some(wrong) = accounts.iter().find(|account| !is_sound(account)) {
            let text = "an account has a name of 1 to 128 bytes, shares from 1 to 1000000, and no user a parent";
            return Err(AllocatorError::Invalid(format!("{:?}: {text}", wrong.name)));
        }
        let others = |account: &&Account| self.accounts.get(&account.name) != Some(account);
        let changed: Vec<Account> = accounts.iter().filter(others).cloned().collect();
        let new: Vec<Account> =
            accounts.iter().filter(|account| !self.stored.contains(&account.name)).cloned().collect();
        self.accounts.set(&changed, now.wall).map_err(AllocatorError::Invalid)?;
        let mut writes: Vec<Account> = changed;
        writes.extend(new.into_iter().filter(|account| !writes.contains(account)).collect::<Vec<_>>());
        for account in writes {
            self.stored.insert(account.name.clone());
            self.effects.writes.push(Write::Account(account));
            self.stir();
        }
        Ok(())
    }

    /// Takes what a request says of its user's limits: the last that is told counts.
    pub(super) fn tell_limits(&mut self, user: &Arc<str>, limits: Limits) {
        if !self.accounts.tell(user, limits) {
            return;
        }
        let name = AccountName::User(user.to_string());
        let account = self.accounts.get(&name).filter(|_| self.stored.contains(&name)).cloned();
        self.effects.writes.extend(account.map(Write::Account));
        self.stir();
    }

    /// Every user and project, and what of its limits is used.
    pub(super) fn account_states(&self, now: Now) -> Vec<AccountState> {
        self.accounts.states(now.wall)
    }

    /// Begins the accounts anew with what the database says.
    pub(super) fn open_accounts(&mut self, loaded: &Loaded, now: Now) {
        self.accounts = Accounts::new(self.half_life());
        self.stored = loaded.accounts.iter().map(|account| account.name.clone()).collect();
        if let Err(error) = self.accounts.set(&loaded.accounts, now.wall) {
            tracing::error!(error, "the database has accounts that cannot be; they are left out");
        }
        for UsedRow { day, user, project, gpu_us, .. } in &loaded.used {
            let leaf = self.accounts.leaf(user, project.as_ref());
            self.accounts.spend(leaf, i64::from(*day), *gpu_us, false, now.wall);
        }
    }

    /// Counts a lease that holds slices.
    pub(super) fn count(&mut self, lease: &LeaseRow, now: Now) {
        if let Some(charge) = charge(lease) {
            let leaf = self.accounts.leaf(&lease.request.user, lease.request.project.as_ref());
            self.accounts.add(leaf, &charge, now.wall);
        }
    }

    /// Counts it no longer, but for what it has used.
    pub(super) fn count_out(&mut self, lease: &LeaseRow, used: &[UsedRow], now: Now) {
        let Some(charge) = charge(lease) else { return };
        let leaf = self.accounts.leaf(&lease.request.user, lease.request.project.as_ref());
        self.accounts.take(leaf, &charge, now.wall);
        for row in used {
            self.accounts.spend(leaf, i64::from(row.day), row.gpu_us, true, now.wall);
        }
    }

    /// What is wrong with how many slices are asked for, with what priority and for which project; and whether
    /// limits, or the GPUs there are, could ever allow it.
    pub(super) fn check_gang(&mut self, request: &LeaseRequest, resolution: &Resolution) -> Result<(), AllocatorError> {
        let LeaseRequest { slices, nodes, priority, project, need, user, .. } = request;
        let wrong = |why: String| Err(AllocatorError::Invalid(why));
        if !(1..=LeaseRequest::MOST_SLICES).contains(slices) {
            return wrong(format!("a request is for 1 to {} slices, and not {slices}", LeaseRequest::MOST_SLICES));
        }
        if nodes.is_some_and(|nodes| nodes == 0 || slices % nodes != 0) {
            return wrong(format!("{slices} slices cannot lie in equal numbers on {} nodes", nodes.unwrap_or(0)));
        }
        let greatest = LeaseRequest::GREATEST_PRIORITY;
        if !(-greatest..=greatest).contains(priority) {
            return wrong(format!("a priority is from -{greatest} to {greatest}, and not {priority}"));
        }
        if project.as_ref().is_some_and(|project| !is_name(project, LONGEST_PROJECT)) {
            return wrong("this cannot name a project".to_owned());
        }
        if !resolution.needs_gpu() {
            let text = "a request without a GPU is for one of it, on no node in particular";
            return if *slices == 1 && nodes.is_none_or(|nodes| nodes == 1) { Ok(()) } else { wrong(text.to_owned()) };
        }
        let user: Arc<str> = user.as_str().into();
        let project: Option<Arc<str>> = project.as_deref().map(Into::into);
        let entry = Entry {
            seq: 0,
            leaf: self.accounts.leaf(&user, project.as_ref()),
            priority: 0,
            since: jiff::Timestamp::UNIX_EPOCH,
            wanted: Some(Arc::new(resolution.clone())),
            gang: Gang { slices: *slices, nodes: *nodes },
            only_on: self.only_on(request.node.as_deref()),
            share: 0,
            preparing: false,
            expected_seconds: request.expected_seconds,
            booking: None,
        };
        self.within_accounts(&entry)?;
        if *slices > 1 && !self.could_fit(&entry, resolution) {
            let text = "more than the GPUs here have room for, however empty they are";
            return Err(AllocatorError::Impossible(format!("{slices} times {need} at once are {text}; ask for fewer")));
        }
        Ok(())
    }

    /// Refuses what alone is over the limits of its user or project: it would wait for ever.
    fn within_accounts(&self, entry: &Entry) -> Result<(), AllocatorError> {
        let serving = (0..self.pool.models().len()).filter_map(|model| wanted_on(&self.pool, model, entry));
        let mut over = None;
        for wanted in serving {
            match self.accounts.could_allow(entry.leaf, &wanted) {
                Ok(()) => return Ok(()),
                Err(account) => over = over.or(Some(account)),
            }
        }
        let Some(account) = over.and_then(|id| self.accounts.name(id)) else { return Ok(()) };
        Err(AllocatorError::Quota(format!("it alone is over the limits of {account}; ask for less")))
    }

    /// Whether all slices fit on the GPUs there are, were they empty.
    fn could_fit(&self, entry: &Entry, resolution: &Resolution) -> bool {
        let gpus = self.pool.gpus().iter().map(|space| Space::empty(space.model)).collect();
        let nodes = (0..self.pool.gpus().len()).map(|gpu| self.pool.node(gpu)).collect();
        let mut empty = Pool::new(self.pool.models().to_vec(), gpus).on_nodes(nodes);
        plan_all(&mut empty, resolution, entry.gang, &self.policy, &|_, _, _| true).is_some()
    }

    /// Gives notice to what has no known end and whose GPU time is going to be used up.
    pub(super) fn notice_exhaustion(&mut self, now: Now) {
        let told = now.wall.checked_add(self.rules.notice).unwrap_or(now.wall);
        let due: Vec<_> = self.accounts.exhausted(now.wall).filter(|(_, at)| *at <= told).collect();
        for (account, at) in due {
            let Some(name) = self.accounts.name(account) else { continue };
            let ending = Ending { at: at.max(now.wall), reason: format!("the GPU hours of {name} are used up") };
            let mut fences = Vec::new();
            for lease in self.leases.values().filter(|lease| lease.ending.is_none() && !lease.slices.is_empty()) {
                let leaf = self.accounts.leaf(&lease.request.user, lease.request.project.as_ref());
                let open = lease.request.expected_seconds.is_none() && !matches!(lease.status, Status::Over(_));
                if open && self.accounts.is_of(leaf, account) {
                    fences.push(lease.fence);
                }
            }
            fences.into_iter().for_each(|fence| self.give_notice(fence, ending.clone(), now));
        }
        let next = self.accounts.exhausted(now.wall).map(|(_, at)| at).filter(|at| *at > told).min();
        let notice = Duration::try_from(self.rules.notice).unwrap_or_default();
        self.notice_at = next.map(|at| steady(at, now).saturating_sub(notice).min(now.steady + LOOK));
    }

    /// When notice has to be given, or what has had it ends.
    pub(super) fn next_notice(&self) -> Option<Duration> {
        self.endings.next().into_iter().chain(self.notice_at).min()
    }
}

/// What a lease counts for; nothing if it holds no slice.
fn charge(lease: &LeaseRow) -> Option<Charge> {
    let slices = u32::try_from(lease.slices.len()).unwrap_or(u32::MAX);
    (slices > 0).then(|| Charge {
        slices,
        memory_mib: lease.memory_mib.saturating_mul(u64::from(slices)),
        share: u64::from(lease.share.greater()) * u64::from(slices),
        since: lease.granted_at,
        expected_seconds: lease.request.expected_seconds,
    })
}

fn is_sound(account: &Account) -> bool {
    let (name, is_user) = match &account.name {
        AccountName::User(name) => (name, true),
        AccountName::Project(name) => (name, false),
    };
    let parent = account.parent.as_ref();
    is_name(name, LONGEST_PROJECT)
        && parent.is_none_or(|parent| !is_user && is_name(parent, LONGEST_PROJECT))
        && (1..=1_000_000).contains(&account.shares)
}

fn is_name(text: &str, longest: usize) -> bool {
    (1..=longest).contains(&text.len()) && !text.contains(char::is_control)
}
