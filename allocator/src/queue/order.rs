//! The order of the line.
//!
//! 1. Who has waited longer than the patience, first come first: so nobody waits for ever, whoever else comes.
//! 2. Greater priority.
//! 3. Fair share: the turn is with the project, and in it with the user, that has had the least GPU time for its
//!    share. Who is ahead once is charged for what they ask, so that the line alternates between users of equal
//!    standing.
//! 4. First come.

use super::{
    Entry,
    account::{Accounts, LeafId, Node},
    meter::CREDIT_SECONDS,
};
use jiff::{SignedDuration, Timestamp};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap},
    iter::Peekable,
    ops::Bound,
};

/// Who waits, by priority and by user.
#[derive(Debug, Clone, Default)]
pub struct Line(BTreeMap<Reverse<i32>, HashMap<LeafId, BTreeSet<u64>>>);

impl Line {
    /// Puts a request into the line.
    pub fn insert(&mut self, entry: &Entry) {
        let of_priority = self.0.entry(Reverse(entry.priority)).or_default();
        of_priority.entry(entry.leaf).or_default().insert(entry.seq);
    }

    /// Takes one out.
    pub fn remove(&mut self, entry: &Entry) {
        let Some(of_priority) = self.0.get_mut(&Reverse(entry.priority)) else { return };
        if let Some(seqs) = of_priority.get_mut(&entry.leaf) {
            seqs.remove(&entry.seq);
            if seqs.is_empty() {
                of_priority.remove(&entry.leaf);
            }
        }
        if of_priority.is_empty() {
            self.0.remove(&Reverse(entry.priority));
        }
    }

    /// Everybody in the line, first in line first. `waiting` are the same requests, by arrival.
    pub fn order<'a, W: AsRef<Entry>>(
        &'a self,
        waiting: &'a BTreeMap<u64, W>,
        accounts: &Accounts,
        patience: SignedDuration,
        now: Timestamp,
    ) -> impl Iterator<Item = &'a Entry> + use<'a, W> {
        let is_old = move |entry: &&Entry| now.duration_since(entry.since) >= patience;
        let old = move || waiting.values().map(AsRef::as_ref).take_while(is_old);
        let first_young = old().last().map_or(Bound::Unbounded, |last| Bound::Excluded(last.seq));
        let turns = |leaves| Turns::new(leaves, first_young, waiting, accounts, now);
        // Made at once, so that the accounts may change while the line is gone through.
        let young: Vec<Turns<'a, W>> = self.0.values().map(turns).collect();
        old().chain(young.into_iter().flatten().filter_map(move |seq| waiting.get(&seq).map(AsRef::as_ref)))
    }
}

/// The requests of one priority, by fair share.
struct Turns<'a, W> {
    branches: Vec<Branch<'a>>,
    waiting: &'a BTreeMap<u64, W>,
}

/// A place in the tree of shares; the first is the root.
struct Branch<'a> {
    shares: f64,
    /// GPU time it has had for its share.
    had: f64,
    /// By GPU time had, then arrival.
    below: BinaryHeap<Reverse<(Had, u64, usize)>>,
    requests: Peekable<Box<dyn Iterator<Item = u64> + 'a>>,
}

/// GPU time had for a share: never negative, so that its bits are in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Had(u64);

impl Had {
    fn new(seconds: f64) -> Self {
        Self(seconds.max(0.0).to_bits())
    }

    fn seconds(self) -> f64 {
        f64::from_bits(self.0)
    }
}

impl<'a, W: AsRef<Entry>> Turns<'a, W> {
    fn new(
        leaves: &'a HashMap<LeafId, BTreeSet<u64>>,
        from: Bound<u64>,
        waiting: &'a BTreeMap<u64, W>,
        accounts: &Accounts,
        now: Timestamp,
    ) -> Self {
        let mut tree = vec![Branch::new(1.0, 0.0)];
        let mut parents: Vec<usize> = vec![0];
        let mut known: HashMap<Node, usize> = HashMap::new();
        for (leaf, seqs) in leaves {
            let mut at = 0;
            for node in accounts.path(*leaf) {
                at = *known.entry(node).or_insert_with(|| {
                    let (shares, had) = accounts.turn(node, now);
                    tree.push(Branch::new(shares, had));
                    parents.push(at);
                    tree.len() - 1
                });
            }
            tree.get_mut(at).into_iter().for_each(|branch| branch.requests = requests_of(seqs, from));
        }
        let mut turns = Self { branches: tree, waiting };
        // Those below stand behind those above in the list.
        for (at, parent) in parents.into_iter().enumerate().skip(1).rev() {
            turns.put(parent, at);
        }
        turns
    }

    /// Puts a branch among those below its parent, if somebody waits there.
    fn put(&mut self, parent: usize, at: usize) {
        let Some((had, first)) = self.branches.get_mut(at).and_then(|branch| Some((branch.had, branch.first()?)))
        else {
            return;
        };
        if let Some(parent) = self.branches.get_mut(parent) {
            parent.below.push(Reverse((Had::new(had), first, at)));
        }
    }

    /// The next request at or below a branch, and what it is charged.
    fn take(&mut self, at: usize) -> Option<(u64, f64)> {
        let branch = self.branches.get_mut(at)?;
        if let Some(seq) = branch.requests.next() {
            return Some((seq, self.waiting.get(&seq).map_or(0.0, |entry| charge(entry.as_ref()))));
        }
        let Reverse((had, _, below)) = branch.below.pop()?;
        let (seq, charge) = self.take(below)?;
        if let Some(branch) = self.branches.get_mut(below) {
            branch.had = had.seconds() + charge / branch.shares;
        }
        self.put(at, below);
        Some((seq, charge))
    }
}

impl<W: AsRef<Entry>> Iterator for Turns<'_, W> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.take(0).map(|(seq, _)| seq)
    }
}

impl Branch<'_> {
    fn new(shares: f64, had: f64) -> Self {
        let none: Box<dyn Iterator<Item = u64>> = Box::new(std::iter::empty());
        Self { shares, had, below: BinaryHeap::new(), requests: none.peekable() }
    }

    /// The request that is its next.
    fn first(&mut self) -> Option<u64> {
        self.requests.peek().copied().or_else(|| self.below.peek().map(|Reverse((_, first, _))| *first))
    }
}

fn requests_of<'a>(seqs: &'a BTreeSet<u64>, from: Bound<u64>) -> Peekable<Box<dyn Iterator<Item = u64> + 'a>> {
    let requests: Box<dyn Iterator<Item = u64> + 'a> = Box::new(seqs.range((from, Bound::Unbounded)).copied());
    requests.peekable()
}

/// Seconds of a GPU that a request is taken to use: at least what everything that is held counts for.
fn charge(entry: &Entry) -> f64 {
    let seconds = entry.expected_seconds.map_or(CREDIT_SECONDS, |seconds| (seconds as f64).max(CREDIT_SECONDS));
    entry.share as f64 / 1_000_000.0 * seconds.min(MOST_CHARGED)
}

/// A long request is not charged for more than this, in seconds, before it has been granted.
const MOST_CHARGED: f64 = 86_400.0;
