//! Whether the rows agree with one another.

use super::{Findings, Lease, Records, Request, Rule, Slice};
use std::collections::{BTreeMap, HashMap};

const DAY_US: i64 = 86_400_000_000;

pub(super) fn check(records: &Records, findings: &mut Findings) {
    let requests: HashMap<&str, &Request> =
        records.requests.iter().map(|request| (request.workload.as_str(), request)).collect();
    let mut slices: HashMap<i64, Vec<&Slice>> = HashMap::new();
    for slice in &records.slices {
        slices.entry(slice.fence).or_default().push(slice);
    }
    for lease in &records.leases {
        let held = slices.remove(&lease.fence).unwrap_or_default();
        match requests.get(lease.workload.as_str()) {
            None => findings.add(Rule::Asked, format!("{}: nobody asked for it", name(lease))),
            Some(request) => of_request(lease, request, &held, findings),
        }
        of_lease(lease, &held, findings);
    }
    for (fence, slices) in slices {
        findings.add(Rule::Held, format!("{} slices belong to fence {fence}, which no lease has", slices.len()));
    }
    numbers(records, findings);
    used(records, &requests, findings);
}

fn name(lease: &Lease) -> String {
    format!("the lease of {} (fence {})", lease.workload, lease.fence)
}

/// A lease against the request it was granted to.
fn of_request(lease: &Lease, request: &Request, held: &[&Slice], findings: &mut Findings) {
    let name = name(lease);
    if !findings.in_order(request.requested_at, lease.granted_at) {
        findings.add(Rule::Asked, format!("{name} was granted before it was asked for"));
    }
    match (lease.released_at, request.ended_at) {
        (None, Some(_)) => {
            findings.add(Rule::Held, format!("{name} is not released, and its request is over"));
        }
        (Some(_), None) => findings.add(Rule::Held, format!("{name} is released, and its request is not over")),
        _ => {}
    }
    let wanted = if lease.profile == "cpu" { 0 } else { request.slices };
    if i64::try_from(held.len()).ok() != Some(wanted) {
        findings.add(Rule::Held, format!("{name} has {} slices of {wanted}", held.len()));
    }
}

/// A lease by itself, with its slices.
fn of_lease(lease: &Lease, held: &[&Slice], findings: &mut Findings) {
    let name = name(lease);
    if held.iter().any(|slice| slice.released_at.is_some() != lease.released_at.is_some()) {
        let (is, are) = if lease.released_at.is_some() { ("released", "not") } else { ("not released", "free") };
        findings.add(Rule::Held, format!("{name} is {is}, and slices of it are {are}"));
    }
    let ends = [("renewed", Some(lease.renewed_at)), ("over", lease.over_at), ("released", lease.released_at)];
    for (what, at) in ends {
        if at.is_some_and(|at| !findings.in_order(lease.granted_at, at)) {
            findings.add(Rule::Times, format!("{name} was {what} before it was granted"));
        }
    }
    if lease.expires_at < lease.renewed_at {
        findings.add(Rule::Times, format!("{name} expires before it was renewed"));
    }
}

/// Fences, and the numbers of requests and changes.
fn numbers(records: &Records, findings: &mut Findings) {
    let leases = records.leases.iter().map(|lease| (lease.fence, lease.granted_at, lease.workload.as_str()));
    grows("fence", leases.collect(), records.counters.fence, findings);
    let requests =
        records.requests.iter().map(|request| (request.seq, request.requested_at, request.workload.as_str()));
    grows("request number", requests.collect(), records.counters.seq, findings);
    for change in records.changes.iter().filter(|change| change.id > records.counters.change) {
        let (id, last) = (change.id, records.counters.change);
        findings.add(Rule::Fences, format!("change {id} has a greater number than the last that was given ({last})"));
    }
}

/// Numbers with their times and names: later ones are greater, none is met twice, none is beyond the last.
fn grows(what: &str, mut numbers: Vec<(i64, i64, &str)>, last: i64, findings: &mut Findings) {
    numbers.sort_by_key(|(number, ..)| *number);
    for pair in numbers.windows(2) {
        let [(before, at, first), (number, later, second)] = pair else { continue };
        if before == number {
            findings.add(Rule::Fences, format!("{first} and {second} have the same {what}, {number}"));
        } else if !findings.in_order(*at, *later) {
            let text = format!(
                "{what} {number} ({second}) was given before {before} ({first}); fences do not grow, or the clock was set back"
            );
            findings.add(Rule::Fences, text);
        }
    }
    if let Some((number, _, name)) = numbers.last().filter(|(number, ..)| *number > last) {
        findings
            .add(Rule::Fences, format!("{what} {number} ({name}) is greater than the last that was given ({last})"));
    }
}

/// What leases that are over have used is written down. (More may be: leases are forgotten before their use is.)
fn used(records: &Records, requests: &HashMap<&str, &Request>, findings: &mut Findings) {
    let mut written: BTreeMap<(i64, &str, &str), i64> = BTreeMap::new();
    for used in &records.used {
        *written.entry((used.day, &used.user, &used.project)).or_default() += used.slice_us;
    }
    let mut expected: BTreeMap<(i64, &str, &str), i64> = BTreeMap::new();
    // Those without a share are from before use was written down.
    for lease in records.leases.iter().filter(|lease| lease.share > 0) {
        let (Some(end), Some(request)) = (lease.released_at, requests.get(lease.workload.as_str())) else { continue };
        let project = request.project.as_deref().unwrap_or_default();
        let mut from = lease.granted_at;
        while from < end {
            let day = from.div_euclid(DAY_US);
            let to = end.min(day.saturating_add(1).saturating_mul(DAY_US));
            *expected.entry((day, &request.user, project)).or_default() += (to - from).saturating_mul(request.slices);
            from = to;
        }
    }
    for ((day, user, project), slice_us) in expected {
        let told = written.get(&(day, user, project)).copied().unwrap_or(0);
        if told < slice_us {
            let detail = format!(
                "day {day}: {user} used {slice_us} µs of slices for project `{project}`, and {told} are written down"
            );
            findings.add(Rule::Use, detail);
        }
    }
}
