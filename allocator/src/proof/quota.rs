//! Whether grants went over limits.
//!
//! The ledger keeps what every request said of its user's limits, and what administrators want now; not what they
//! wanted before. So a grant is held to the most generous limits that its user had been told until then, and to those
//! that its projects have now. GPU time is not looked at: what runs uses it up while others are still being granted.

use super::{Finding, Findings, Lease, Records, Request, Rule};
use crate::{Account, AccountName, Limits};
use std::collections::{HashMap, HashSet};

/// The deepest nesting of projects that is followed.
const DEEPEST: usize = 64;

/// What happens at a moment; what ends does so before anything else, and who asks before they are granted.
enum Event<'a> {
    Released(&'a Lease, &'a Request),
    Asked(&'a Request),
    Granted(&'a Lease, &'a Request),
}

#[derive(Default)]
struct State<'a> {
    accounts: HashMap<&'a AccountName, &'a Account>,
    /// Slices and memory that are held, by account.
    held: HashMap<AccountName, (i64, i64)>,
    /// The most generous limits that each user has been told.
    told: HashMap<&'a str, Limits>,
}

pub(super) fn check(records: &Records, findings: &mut Findings) {
    let requests: HashMap<&str, &Request> =
        records.requests.iter().map(|request| (request.workload.as_str(), request)).collect();
    let mut events: Vec<(i64, u8, i64, Event<'_>)> = Vec::new();
    for request in &records.requests {
        events.push((request.requested_at, 1, request.seq, Event::Asked(request)));
    }
    for lease in &records.leases {
        let Some(request) = requests.get(lease.workload.as_str()).filter(|_| lease.profile != "cpu") else { continue };
        events.push((lease.granted_at, 2, lease.fence, Event::Granted(lease, request)));
        if let Some(at) = lease.released_at {
            // Not before its grant, whatever the clock said.
            let (at, order) = if at > lease.granted_at { (at, 0) } else { (lease.granted_at, 3) };
            events.push((at, order, lease.fence, Event::Released(lease, request)));
        }
    }
    events.sort_by_key(|(at, order, number, _)| (*at, *order, *number));
    let accounts = records.accounts.iter().map(|account| (&account.name, account)).collect();
    let mut state = State { accounts, ..State::default() };
    for (.., event) in events {
        state.apply(&event, findings);
    }
}

impl<'a> State<'a> {
    fn apply(&mut self, event: &Event<'a>, findings: &mut Findings) {
        match event {
            Event::Asked(request) => {
                let told = self.told.entry(&request.user).or_insert(request.limits);
                *told = most(*told, request.limits);
            }
            Event::Granted(lease, request) => {
                for account in self.chain(request) {
                    let held = self.add(&account, lease, request, 1);
                    self.judge(&account, held, lease, findings);
                }
            }
            Event::Released(lease, request) => {
                for account in self.chain(request) {
                    self.add(&account, lease, request, -1);
                }
            }
        }
    }

    fn add(&mut self, account: &AccountName, lease: &Lease, request: &Request, sign: i64) -> (i64, i64) {
        let held = self.held.entry(account.clone()).or_default();
        held.0 += sign * request.slices;
        held.1 += sign * request.slices.saturating_mul(lease.memory_mib);
        *held
    }

    /// Whose limits hold for a request: its user, its project, and what that lies in.
    fn chain(&self, request: &Request) -> Vec<AccountName> {
        let mut chain = vec![AccountName::User(request.user.clone())];
        let mut project = request.project.clone();
        let mut seen = HashSet::new();
        while let Some(name) = project.filter(|name| seen.insert(name.clone()) && seen.len() <= DEEPEST) {
            let account = AccountName::Project(name);
            project = self.accounts.get(&account).and_then(|account| account.parent.clone());
            chain.push(account);
        }
        chain
    }

    fn judge(&self, account: &AccountName, (slices, memory): (i64, i64), lease: &Lease, findings: &mut Findings) {
        let wanted = self.accounts.get(account).map(|account| account.limits);
        let (name, limits) = match account {
            AccountName::User(user) => {
                let told = self.told.get(user.as_str()).copied();
                (user, told.into_iter().chain(wanted).reduce(most).unwrap_or_default())
            }
            AccountName::Project(project) => (project, wanted.unwrap_or_default()),
        };
        let over_slices = limits.slices.is_some_and(|most| slices > i64::from(most));
        let over_memory = limits.gpu_memory_mib.is_some_and(|most| u64::try_from(memory).is_ok_and(|held| held > most));
        if over_slices || over_memory {
            let detail = format!(
                "with the grant to {} (fence {}) {name} held {slices} slices and {memory} MiB; the limits are {limits:?}",
                lease.workload, lease.fence
            );
            let explained = findings.allowance.limits_changed && wanted.is_some();
            findings.found.push(Finding { rule: Rule::Quota, explained, detail });
        }
    }
}

/// The more generous of two limits, each for itself.
fn most(a: Limits, b: Limits) -> Limits {
    Limits {
        slices: a.slices.zip(b.slices).map(|(a, b)| a.max(b)),
        gpu_memory_mib: a.gpu_memory_mib.zip(b.gpu_memory_mib).map(|(a, b)| a.max(b)),
        gpu_seconds: a.gpu_seconds.zip(b.gpu_seconds).map(|(a, b)| a.max(b)),
    }
}
