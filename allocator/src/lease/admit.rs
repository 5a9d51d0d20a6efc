//! What the ledger lets in, and what it refuses at once.

use super::{
    ledger::Ledger,
    record::{Booked, Now, RequestRow, Write},
};
use crate::{
    AllocatorError, LeaseRequest, Resolved,
    geometry::{Resolution, resolve},
    is_workload_name,
};
use mlad::api::Need;

/// The most requests that may wait; each takes a few hundred bytes.
const MOST_WAITING: usize = 200_000;
/// The most leases without a slice; nothing else bounds those, and each takes a few hundred bytes.
pub(super) const MOST_SLICELESS: usize = 50_000;
/// So many nodes are named to somebody who names one that is not there.
const MOST_NAMED: usize = 16;
/// The longest name of a user, in bytes.
const LONGEST_USER: usize = 128;

impl Ledger {
    /// What a need comes to on the GPUs there are.
    pub(super) fn resolve(&self, need: &Need) -> Result<Resolution, AllocatorError> {
        resolve(need, self.pool.models()).map_err(|impossible| match self.unsure() {
            None => AllocatorError::Impossible(impossible.0),
            Some(why) if self.pool.models().is_empty() => {
                AllocatorError::Driver(format!("{why}; until that is over, only `cpu` (no GPU) can be had"))
            }
            Some(why) => AllocatorError::Driver(format!(
                "{why}; until that is over it cannot be said whether {need} can be had here: {}",
                impossible.0
            )),
        })
    }

    /// A new request; one of a workload that is known changes nothing.
    pub(super) fn request(&mut self, request: &LeaseRequest, now: Now) -> Result<(), AllocatorError> {
        if self.known.contains_key(&request.workload) {
            return Ok(());
        }
        let (resolution, booked) = self.admit(request).inspect_err(|error| {
            let LeaseRequest { workload, user, need, .. } = request;
            tracing::info!(workload = workload.escape_debug().to_string(), user, %need, reason = %error, "refused");
        })?;
        self.seq += 1;
        let row = RequestRow {
            workload: request.workload.clone(),
            seq: self.seq,
            user: request.user.as_str().into(),
            need: request.need.clone(),
            slices: request.slices,
            nodes: request.nodes,
            project: request.project.as_deref().map(Into::into),
            idle_seconds: request.idle_seconds,
            on_node: request.node.as_deref().map(Into::into),
            priority: request.priority,
            preemptible: request.preemptible,
            profile: Resolved::from(&resolution).profile,
            limits: request.limits,
            expected_seconds: request.expected_seconds,
            requested_at: now.wall,
            booked,
        };
        if resolution.needs_gpu() {
            self.policy.see(&row.profile);
        }
        tracing::debug!(workload = row.workload, user = %row.user, need = %row.need, seq = row.seq, "asked");
        self.effects.writes.push(Write::Request(row.clone()));
        self.enqueue(row);
        self.stir();
        Ok(())
    }

    /// What a request comes to, if it may wait.
    fn admit(&mut self, request: &LeaseRequest) -> Result<(Resolution, Option<Booked>), AllocatorError> {
        check_names(request)?;
        self.tell_limits(&request.user.as_str().into(), request.limits);
        if self.waiting.len() >= MOST_WAITING {
            let most = format!("{MOST_WAITING} requests wait already, and no more can; try again later");
            return Err(AllocatorError::TooMany(most));
        }
        if request.need == Need::Cpu && self.sliceless_leases() >= MOST_SLICELESS {
            let most = format!("{MOST_SLICELESS} workloads without a GPU hold leases already; try again later");
            return Err(AllocatorError::TooMany(most));
        }
        let resolution = self.resolve(&request.need)?;
        self.check_node(request, &resolution)?;
        within_limits(request, &resolution)?;
        self.check_gang(request, &resolution)?;
        let booked = self.booked_for(request, &resolution)?;
        Ok((resolution, booked))
    }

    /// Refuses what the one node that may serve a request can never serve.
    fn check_node(&self, request: &LeaseRequest, resolution: &Resolution) -> Result<(), AllocatorError> {
        let Some(name) = request.node.as_deref().filter(|_| resolution.needs_gpu()) else { return Ok(()) };
        let Some(node) = self.nodes.get(name) else {
            let known: Vec<&str> = self.nodes.keys().map(String::as_str).take(MOST_NAMED).collect();
            let known = known.join(", ");
            return Err(AllocatorError::Impossible(format!("there is no node {name}; there are {known}")));
        };
        let mut here = self.pool.gpus().iter().enumerate().filter(|(gpu, _)| self.pool.node(*gpu) == node.number);
        if here.any(|(_, space)| resolution.on(space.model).is_some()) {
            return Ok(());
        }
        let why = node.absence(name).or_else(|| node.down.clone());
        let why = why.or_else(|| node.unread.values().next().map(|unread| unread.doubt.reason.clone()));
        let need = &request.need;
        Err(match why {
            Some(why) => AllocatorError::Driver(format!("{why}; it cannot be said whether {need} can be had there")),
            None => AllocatorError::Impossible(format!("no GPU of the node {name} can serve {need}; others can")),
        })
    }
}

fn check_names(request: &LeaseRequest) -> Result<(), AllocatorError> {
    let LeaseRequest { workload, user, .. } = request;
    if !is_workload_name(workload) {
        return Err(AllocatorError::Invalid(format!("`{}` cannot name a workload", workload.escape_debug())));
    }
    if user.is_empty() || user.len() > LONGEST_USER || user.contains(char::is_control) {
        return Err(AllocatorError::Invalid(format!("`{}` cannot name a user", user.escape_debug())));
    }
    Ok(())
}

/// Refuses what alone is over its user's limits: it would wait for ever.
fn within_limits(request: &LeaseRequest, resolution: &Resolution) -> Result<(), AllocatorError> {
    let LeaseRequest { user, need, limits, .. } = request;
    if !resolution.needs_gpu() {
        return Ok(());
    }
    if limits.slices == Some(0) {
        return Err(AllocatorError::Quota(format!("{user} may not hold any slice")));
    }
    match limits.gpu_memory_mib {
        Some(most) if resolution.memory_mib > most => Err(AllocatorError::Quota(format!(
            "{need} has {:.1} GiB; {user} may hold {:.1} GiB of GPU memory in all",
            resolution.memory_mib as f64 / 1024.0,
            most as f64 / 1024.0
        ))),
        _ => Ok(()),
    }
}

impl From<&Resolution> for Resolved {
    fn from(resolution: &Resolution) -> Self {
        Self { profile: resolution.profile.clone(), memory_mib: resolution.memory_mib }
    }
}
