//! The machines with GPUs: which of them answer, and which are lost. No I/O, the time as an argument.
//!
//! A node elsewhere holds a lease of its own on its GPUs, which its daemon renews. One that cannot do so ends by
//! itself what its GPUs are used for, before [`Ledger::lose`] says so of it: nothing that ran there runs on then.
//! What was leased there stays held, as after any lease that is over, until it is released.

use super::{
    gpu::{Doubt, Unread},
    ledger::Ledger,
    record::{NodeRow, Now, Purpose, Write},
};
use crate::node::Report;
use jiff::Timestamp;
use mlad::api::{NodeInfo, NodeState};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// The most nodes.
pub(super) const MOST_NODES: usize = 4096;
/// How long a daemon may take to end what runs, or as long as its lease, if that is shorter.
const STOP: Duration = Duration::from_secs(60);
/// Beside a node's lease and the time its daemon has to end what runs: for clocks that do not run alike.
const SKEW: Duration = Duration::from_secs(3);

/// A machine with GPUs, as the ledger knows it.
#[derive(Debug)]
pub(super) struct Machine {
    /// Its number in the pool.
    pub(super) number: u32,
    pub(super) presence: Presence,
    /// What of it is written down; nothing of our own machine.
    pub(super) row: Option<NodeRow>,
    /// GPUs that are listed and could not be read yet, by index.
    pub(super) unread: BTreeMap<u32, Unread>,
    /// Why its driver does not answer at all.
    pub(super) down: Option<String>,
    /// When its driver last answered.
    pub(super) read_at: Timestamp,
}

/// Whether a node answers.
///
/// ```text
/// (unknown) → Present          its daemon joins
/// Present   → Away             its connection ends
/// Away      → Present          its daemon joins again in time
/// Present, Away → Lost         nobody renewed its lease in time, or it began anew
/// Lost      → Present          its daemon joins, having ended what ran
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Presence {
    /// It is our own machine.
    Own,
    /// Its daemon is connected, under this fence, and has time until then to renew.
    Present { fence: u64, until: Duration },
    /// It has time until then to come back.
    Away { until: Duration, since: Timestamp },
    /// What ran there has ended.
    Lost { since: Timestamp },
}

/// A daemon that wants to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Joining {
    /// The node's name.
    pub(crate) node: String,
    /// What tells the machine from others, whatever its name.
    pub(crate) machine: String,
    /// Changes with every start of the machine.
    pub(crate) boot: String,
    /// Its lease ran out, or it has none: whatever ran under one has been ended.
    pub(crate) stopped: bool,
}

/// Why a daemon may not join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unwelcome {
    /// In words.
    pub(crate) reason: String,
    /// It may, once it has ended what runs.
    pub(crate) stop_first: bool,
}

impl Machine {
    fn new(number: u32, presence: Presence) -> Self {
        Self { number, presence, row: None, unread: BTreeMap::new(), down: None, read_at: Timestamp::UNIX_EPOCH }
    }

    /// Our own.
    pub(super) fn own() -> Self {
        Self::new(0, Presence::Own)
    }

    /// Why nothing of it can be granted, if so.
    pub(super) fn absence(&self, name: &str) -> Option<String> {
        match &self.presence {
            Presence::Own | Presence::Present { .. } => None,
            Presence::Away { .. } => Some(format!("the node {name} does not answer")),
            Presence::Lost { .. } => Some(format!("the node {name} is lost")),
        }
    }

    fn deadline(&self) -> Option<Duration> {
        match self.presence {
            Presence::Present { until, .. } | Presence::Away { until, .. } => Some(until),
            Presence::Own | Presence::Lost { .. } => None,
        }
    }
}

impl Ledger {
    /// How long after its last renewal a node is lost: its lease, the time for ending what runs, and what clocks may
    /// differ by.
    fn grace(&self) -> Duration {
        let lease = self.node_lease;
        lease + lease / 10 + STOP.min(lease) + SKEW
    }

    /// Takes over the nodes that the database knows. Those that are not known yet may be there and at work: they
    /// have time to say so.
    pub(super) fn load_nodes(&mut self, rows: Vec<NodeRow>, now: Now) {
        let until = now.steady + self.grace();
        for row in rows {
            if row.name == self.node || self.nodes.contains_key(&row.name) {
                continue;
            }
            let presence = match row.lost {
                true => Presence::Lost { since: row.at },
                false => Presence::Away { until, since: now.wall },
            };
            let machine = self.number_node();
            let name = row.name.clone();
            self.nodes.insert(name, Machine { row: Some(row), ..Machine::new(machine, presence) });
        }
    }

    /// A daemon joins: it gets a fence, and its GPUs are used as soon as they are read.
    pub(crate) fn join(&mut self, joining: &Joining, now: Now) -> Result<u64, Unwelcome> {
        let Joining { node, machine, boot, stopped } = joining;
        let refuse = |reason: String, stop_first| Err(Unwelcome { reason, stop_first });
        if *node == self.node {
            return refuse(format!("{node} is the name of the allocator's own machine; give this one another"), false);
        }
        if !self.nodes.contains_key(node) && self.nodes.len() >= MOST_NODES {
            return refuse(format!("there are {MOST_NODES} nodes, and no more can be"), false);
        }
        let known = self.nodes.get(node).and_then(|known| Some((known.presence.clone(), known.row.clone()?)));
        if let Some((presence, row)) = known {
            let same = row.machine == *machine;
            match presence {
                Presence::Present { .. } | Presence::Away { .. } if !same => {
                    return refuse(
                        format!("another machine is {node}, or was until lately; give this one another name, or wait"),
                        false,
                    );
                }
                Presence::Lost { .. } if same && !stopped && row.boot == *boot => {
                    let reason = "its lease ran out; what it was used for has to be ended first";
                    return refuse(reason.to_owned(), true);
                }
                Presence::Present { .. } | Presence::Away { .. } if *stopped || row.boot != *boot => {
                    self.lose(node, "it began anew, and what ran there has ended", now);
                }
                _ => {}
            }
        }
        if self.nodes.get(node).and_then(|known| known.row.as_ref()).is_some_and(|row| row.boot != *boot) {
            self.trust_node(node);
        }
        self.part(node, "its daemon connects anew", now);
        self.fence += 1;
        let (fence, until) = (self.fence, now.steady + self.grace());
        let row = NodeRow {
            name: node.clone(),
            machine: machine.clone(),
            boot: boot.clone(),
            fence,
            at: now.wall,
            lost: false,
        };
        let number = self.number_node();
        let machine = self.nodes.entry(node.clone()).or_insert_with(|| Machine::new(number, Presence::Own));
        machine.presence = Presence::Present { fence, until };
        machine.row = Some(row.clone());
        tracing::info!(node, fence, "a node joined");
        self.effects.writes.push(Write::Node(row));
        self.rebuild_all();
        Ok(fence)
    }

    /// A node's daemon renews its lease. False if it does not hold it.
    pub(crate) fn renew_node(&mut self, node: &str, session: u64, now: Now) -> bool {
        let grace = self.grace();
        match self.nodes.get_mut(node).map(|machine| &mut machine.presence) {
            Some(Presence::Present { fence, until }) if *fence == session => {
                *until = now.steady + grace;
                true
            }
            _ => false,
        }
    }

    /// The connection of a node's daemon ended.
    pub(crate) fn leave(&mut self, node: &str, session: u64, now: Now) {
        let presence = self.nodes.get(node).map(|machine| &machine.presence);
        if matches!(presence, Some(Presence::Present { fence, .. }) if *fence == session) {
            tracing::warn!(node, fence = session, "a node does not answer: nothing is granted there until it does");
            self.part(node, "its connection ended", now);
        }
    }

    /// Takes in what a node's daemon reports, if it is the one that is heard.
    pub(crate) fn report_from(&mut self, node: &str, session: u64, report: Report, now: Now) {
        let presence = self.nodes.get(node).map(|machine| &machine.presence);
        if matches!(presence, Some(Presence::Present { fence, .. }) if *fence == session) {
            self.take_in(node, report, now);
        }
    }

    /// Declares nodes lost that were not heard of in time.
    pub(super) fn tick_nodes(&mut self, now: Now) {
        let late = |machine: &Machine| machine.deadline().is_some_and(|until| until <= now.steady);
        let lost: Vec<String> =
            self.nodes.iter().filter(|(_, machine)| late(machine)).map(|(name, _)| name.clone()).collect();
        for node in lost {
            self.lose(&node, "it did not answer in time, and has ended by itself what ran there", now);
        }
    }

    /// When the next node is lost.
    pub(super) fn next_loss(&self) -> Option<Duration> {
        self.nodes.values().filter_map(Machine::deadline).min()
    }

    /// Which node a GPU sits in, and under which fence its daemon is heard; none for our own machine.
    pub(super) fn route(&self, gpu: &str) -> Option<(&str, u64)> {
        let listed = |machine: &Machine| machine.unread.values().any(|unread| unread.uuid.as_deref() == Some(gpu));
        let known = self.gpus.iter().find(|known| known.uuid == gpu).map(|gpu| &*gpu.node);
        let name = known.or_else(|| self.nodes.iter().find(|(_, node)| listed(node)).map(|(name, _)| name.as_str()))?;
        match self.nodes.get(name)?.presence {
            Presence::Own => None,
            Presence::Present { fence, .. } => Some((name, fence)),
            // Nobody is there to take an order.
            Presence::Away { .. } | Presence::Lost { .. } => Some((name, 0)),
        }
    }

    /// Whether changes of our own GPUs are under way.
    pub(super) fn has_own_changes(&self) -> bool {
        self.changes.values().any(|change| self.route(&change.gpu).is_none())
    }

    /// Forgets a node that does not answer and has no leases.
    pub(crate) fn forget_node(&mut self, node: &str) -> Result<(), crate::AllocatorError> {
        let invalid = |why: String| Err(crate::AllocatorError::Invalid(why));
        match self.nodes.get(node).map(|machine| &machine.presence) {
            None => return Err(crate::AllocatorError::Unknown(node.to_owned())),
            Some(Presence::Own | Presence::Present { .. }) => {
                return invalid(format!("the node {node} answers; stop its daemon first"));
            }
            Some(Presence::Away { .. }) => {
                return invalid(format!("the node {node} may come back; it can be forgotten once it is lost"));
            }
            Some(Presence::Lost { .. }) => {}
        }
        let held = self.leases.values().filter(|lease| lease.slices.iter().any(|slice| slice.node == node)).count();
        if held > 0 {
            return invalid(format!("{held} leases hold slices of the node {node}; they have to be released first"));
        }
        tracing::info!(node, "a node is forgotten");
        self.nodes.remove(node);
        self.gpus.retain(|gpu| &*gpu.node != node);
        self.effects.writes.push(Write::Forget { node: node.to_owned() });
        self.rebuild_all();
        Ok(())
    }

    /// The nodes there are.
    pub(super) fn node_infos(&self) -> Vec<NodeInfo> {
        let info = |(name, machine): (&String, &Machine)| {
            let gpus = self.gpus.iter().filter(|gpu| *gpu.node == **name).count() + machine.unread.len();
            let on = |lease: &&super::record::LeaseRow| lease.slices.iter().any(|slice| slice.node == **name);
            NodeInfo {
                name: name.clone(),
                state: match machine.presence {
                    Presence::Own | Presence::Present { .. } if machine.down.is_some() => NodeState::NoDriver,
                    Presence::Own | Presence::Present { .. } => NodeState::Ready,
                    Presence::Away { .. } => NodeState::Away,
                    Presence::Lost { .. } => NodeState::Lost,
                },
                since: match machine.presence {
                    Presence::Away { since, .. } | Presence::Lost { since } => Some(since),
                    Presence::Own | Presence::Present { .. } => machine.row.as_ref().map(|row| row.at),
                },
                gpus: u32::try_from(gpus).unwrap_or(u32::MAX),
                leases: u32::try_from(self.leases.values().filter(on).count()).unwrap_or(u32::MAX),
                detail: machine.absence(name).or_else(|| machine.down.clone()),
            }
        };
        self.nodes.iter().map(info).collect()
    }

    /// A GPU for people: with its node, if there are several.
    pub(super) fn place(&self, node: &str, index: u32) -> String {
        match self.nodes.len() {
            0 | 1 => format!("GPU {index}"),
            _ => format!("GPU {index} of {node}"),
        }
    }

    /// The numbers of the nodes that a request may be served from.
    pub(super) fn only_on(&self, node: Option<&str>) -> Option<std::sync::Arc<BTreeSet<u32>>> {
        let numbers = |node: &str| self.nodes.get(node).map(|machine| machine.number).into_iter().collect();
        node.map(|node| std::sync::Arc::new(numbers(node)))
    }

    /// A number for another node.
    fn number_node(&self) -> u32 {
        self.nodes.values().map(|machine| machine.number + 1).max().unwrap_or(0)
    }

    /// Whoever spoke for a node does not any more: nothing is granted there, and what was being changed is looked
    /// at when it is back.
    fn part(&mut self, node: &str, reason: &str, now: Now) {
        let Some(machine) = self.nodes.get_mut(node) else { return };
        if let Presence::Present { until, .. } = machine.presence {
            machine.presence = Presence::Away { until, since: now.wall };
        }
        machine.unread.clear();
        machine.down = None;
        let absence = format!("the node {node} does not answer: {reason}");
        let mut here: BTreeSet<String> = BTreeSet::new();
        for gpu in self.gpus.iter_mut().filter(|gpu| *gpu.node == *node) {
            gpu.fault = Some(Doubt::until_told(absence.clone()));
            here.insert(gpu.uuid.clone());
        }
        let cut: Vec<u64> =
            self.changes.iter().filter(|(_, change)| here.contains(&change.gpu)).map(|(id, _)| *id).collect();
        for id in cut {
            let Some(cut) = self.changes.remove(&id) else { continue };
            tracing::warn!(node, change = ?cut.change, "a repartition is cut off; what it leaves is looked at later");
            self.effects.writes.push(Write::Finish { id });
            self.unfinished.extend(cut.change.destroy.iter().map(|key| (cut.gpu.clone(), *key)));
            if let Purpose::Grant(seq, _) = cut.purpose {
                self.wait_on(seq, now);
            }
        }
        self.rebuild_all();
    }

    /// A node is lost: nothing runs there any more, and its leases are over.
    fn lose(&mut self, node: &str, reason: &str, now: Now) {
        self.part(node, reason, now);
        let Some(machine) = self.nodes.get_mut(node) else { return };
        machine.presence = Presence::Lost { since: now.wall };
        if let Some(row) = &mut machine.row {
            (row.lost, row.at) = (true, now.wall);
            self.effects.writes.push(Write::Node(row.clone()));
        }
        tracing::error!(node, reason, "a node is lost");
        let on = self.leases.values().filter(|lease| lease.slices.iter().any(|slice| slice.node == node));
        for fence in on.map(|lease| lease.fence).collect::<Vec<_>>() {
            self.end(fence, &format!("the node {node} is lost: {reason}"), now);
        }
        self.stir();
    }
}
