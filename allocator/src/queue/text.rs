//! What a waiting person is told.

use super::{Block, account::name_of};
use crate::{AccountState, PERIOD_DAYS, placement::Shortage};
use jiff::Timestamp;
use mlad::api::{Need, WaitReason};

/// The most troubles that are told at once.
pub(crate) const TROUBLES: usize = 3;

/// What there is to tell of one waiting request.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// What it asked for.
    pub need: &'a Need,
    /// How many of that, all at once.
    pub slices: u32,
    /// The user or project whose limits are in the way, if that is it.
    pub account: Option<&'a AccountState>,
    /// User and need of the request that it is behind, if it is behind one.
    pub ahead: Option<(&'a str, &'a Need)>,
    /// Names of the profiles for which space is free now.
    pub free: &'a [String],
    /// Whether what is free would be enough in one piece, if that is known.
    pub shortage: Option<Shortage>,
    /// A lease whose end alone makes room for it, in words, if there is one.
    pub blocker: Option<&'a str>,
    /// The reservation that it waits for, or that has what is free.
    pub reservation: Option<Told<'a>>,
    /// Why GPUs cannot be used now.
    pub faults: &'a [String],
    /// Why space that is free is not used: faults, instances in doubt, refusals of the driver.
    pub troubles: &'a [String],
}

/// What is told of a reservation.
#[derive(Debug, Clone, Copy)]
pub struct Told<'a> {
    /// Its name.
    pub name: &'a str,
    /// When it begins.
    pub from: Timestamp,
    /// When it ends.
    pub until: Timestamp,
}

/// The reason, and the reason in words: what blocks, who is ahead, what would fit now.
pub fn explain(block: Block, facts: &Facts<'_>) -> (WaitReason, String) {
    let need = facts.need;
    match block {
        Block::Space => {
            let troubles = facts.troubles.iter().take(TROUBLES).map(|trouble| format!("; {trouble}"));
            let (free, short) = (free(facts), short(facts));
            let troubles = troubles.collect::<String>();
            let text = match facts.slices {
                1 => format!("no {} is free; {free}{short}{troubles}", named(need)),
                slices => format!("{slices} times {} at once are not free; {free}{troubles}", named(need)),
            };
            (WaitReason::NoSlice, text)
        }
        Block::Behind(_) => {
            let ahead = facts.ahead.map_or_else(
                || "an earlier request waits for the same space".to_owned(),
                |(user, need)| format!("{user} asked for {need}, is ahead and waits for the same space"),
            );
            (WaitReason::Priority, format!("{ahead}; {}", free(facts)))
        }
        Block::Quota(_) => {
            let over = facts.account.map_or_else(|| "a limit is reached".to_owned(), over_quota);
            (WaitReason::Quota, over)
        }
        Block::Preparing => (WaitReason::Repartitioning, format!("a GPU is being repartitioned to make the {need}")),
        Block::NoGpu => {
            let why = match facts.faults {
                [] => "no GPU that could serve it is here".to_owned(),
                faults => faults.join("; "),
            };
            (WaitReason::NodeUnavailable, format!("no GPU can serve {} now: {why}", named(need)))
        }
        Block::Reserved(_) => {
            let whose = facts.reservation.map_or_else(
                || "a reservation".to_owned(),
                |Told { name, from, until }| format!("the reservation {name} ({from:.0} to {until:.0})"),
            );
            let help = "what ends before that by its time limit can start now";
            (WaitReason::Reserved, format!("space for {} is free, but set aside for {whose}; {help}", named(need)))
        }
        Block::NotYet => {
            let text = facts.reservation.map_or_else(
                || "its reservation begins later".to_owned(),
                |Told { name, from, until }| format!("its reservation {name} is from {from:.0} to {until:.0}"),
            );
            (WaitReason::Reserved, text)
        }
        Block::Full => {
            let name = facts.reservation.map_or("", |told| told.name);
            let text =
                format!("no {} is free within its reservation {name}: others of it use what it has", named(need));
            (WaitReason::Reserved, text)
        }
    }
}

fn named(need: &Need) -> String {
    match need {
        Need::MemoryMib(_) => format!("slice of {need}"),
        Need::Gpu => "whole GPU".to_owned(),
        Need::Profile(_) | Need::Cpu => need.to_string(),
        Need::On { need, model } => format!("{} on a GPU of the model {model}", named(need)),
    }
}

fn free(facts: &Facts<'_>) -> String {
    match facts.free {
        [] => "every slice is taken".to_owned(),
        names => format!("space is free for {}", names.join(", ")),
    }
}

/// Whether space is what is missing, or one lease is in the way.
fn short(facts: &Facts<'_>) -> String {
    let Some(shortage) = facts.shortage else { return String::new() };
    match (shortage, facts.blocker) {
        (Shortage::Fragmented, Some(lease)) => {
            format!("; enough is free in all but not in one piece: {lease} alone is in the way")
        }
        (Shortage::Fragmented, None) => {
            "; enough is free in all but not in one piece, and more than one lease is in the way".to_owned()
        }
        (_, Some(lease)) => format!("; it fits as soon as {lease} ends"),
        (_, None) => "; it fits when more than one lease has ended".to_owned(),
    }
}

fn over_quota(state: &AccountState) -> String {
    let AccountState { account, slices, gpu_memory_mib, gpu_seconds, committed_gpu_seconds, .. } = state;
    let (mut parts, mut used) = (Vec::new(), None);
    if let Some(most) = account.limits.slices {
        parts.push(format!("{slices} of {most} slices"));
    }
    if let Some(most) = account.limits.gpu_memory_mib {
        let gib = |mib: u64| mib as f64 / 1024.0;
        parts.push(format!("{:.1} of {:.1} GiB of GPU memory", gib(*gpu_memory_mib), gib(most)));
    }
    if let Some(most) = account.limits.gpu_seconds {
        let hours = |seconds: u64| seconds as f64 / 3600.0;
        let all = hours(gpu_seconds.saturating_add(*committed_gpu_seconds));
        used = Some(format!("has used or claimed {all:.1} of {:.1} GPU hours in {PERIOD_DAYS} days", hours(most)));
    }
    let then = "it is granted when enough of that is given back, or the limit is raised";
    let holds = (!parts.is_empty()).then(|| format!("holds {}", parts.join(" and ")));
    let told: Vec<String> = holds.into_iter().chain(used).collect();
    format!("{} {}; {then}", name_of(&account.name), told.join(" and "))
}
