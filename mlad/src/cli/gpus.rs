//! `who`, `gpu`, `why`, `image ls`, `quota`: what there is, who has it, what blocks.

use super::{
    CliError, Outcome,
    output::{self, Output, ago, local_time, memory, or_dash, plain},
};
use crate::{
    api::{Gpu, GpuMap, Job, JobId, JobState, Lease, Slice, SliceState, Wait, Workspace},
    client::{Client, JobQuery},
};
use jiff::Timestamp;
use serde::Serialize;

/// Characters a column of the placement axis takes in the map.
const COLUMN_WIDTH: usize = 9;

/// Who holds slices and who waits for them.
#[derive(Debug, Serialize)]
struct Who {
    leases: Vec<Lease>,
    waits: Vec<Wait>,
}

pub(super) async fn who(client: &Client, output: &Output) -> Outcome {
    let who = Who { leases: client.leases().await?, waits: client.waits().await? };
    let now = Timestamp::now();
    output.show(&who, |who| {
        let rows = who.leases.iter().map(|lease| lease_row(lease, now)).collect();
        let head = ["USER", "WORKLOAD", "SLICE", "MEMORY", "NODE", "GPU", "HELD", "UUID"];
        let mut text = output::table(head, rows, "nobody holds a slice");
        for lease in &who.leases {
            if let Some(trouble) = &lease.trouble {
                text += &format!("{}: not well: {}\n", lease.workload, plain(trouble));
            }
        }
        if !who.waits.is_empty() {
            let rows = who.waits.iter().map(|wait| wait_row(wait, now)).collect();
            text += "\n";
            text += &output::table(["PLACE", "USER", "WORKLOAD", "WANTS", "WAITS", "PERHAPS", "REASON"], rows, "");
        }
        text
    })
}

fn lease_row(lease: &Lease, now: Timestamp) -> [String; 8] {
    [
        lease.user.clone(),
        lease.workload.clone(),
        lease.profile.clone(),
        memory(lease.memory_mib),
        lease.node.clone(),
        or_dash(lease.slices.first().map(|slice| slice.gpu_index)),
        ago(lease.granted_at, now),
        or_dash(lease.uuids.first()),
    ]
}

fn wait_row(wait: &Wait, now: Timestamp) -> [String; 7] {
    [
        wait.place.to_string(),
        wait.user.clone(),
        wait.workload.clone(),
        wait.need.to_string(),
        ago(wait.since, now),
        or_dash(wait.estimate.map(|time| ago(time, now))),
        output::word(&wait.reason),
    ]
}

pub(super) async fn map(client: &Client, output: &Output) -> Outcome {
    let map = client.gpus().await?;
    output.show(&map, draw)
}

/// One strip a GPU: every instance with its profile and holder, free columns as dots.
fn draw(map: &GpuMap) -> String {
    if map.gpus.is_empty() {
        return "no GPUs\n".into();
    }
    let mut text = String::new();
    for gpu in &map.gpus {
        text += &format!("{} GPU {}  {}  {}{}\n", gpu.node, gpu.index, gpu.model, memory(gpu.memory_mib), note(gpu));
        text += &format!("  {}\n", strip(gpu));
    }
    text + &format!("as of {}\n", local_time(map.as_of))
}

fn note(gpu: &Gpu) -> String {
    match &gpu.fault {
        Some(fault) => format!("  OUT OF SERVICE: {}", plain(fault)),
        None if !gpu.mig => "  whole (MIG is off)".into(),
        None => String::new(),
    }
}

fn strip(gpu: &Gpu) -> String {
    if gpu.columns == 0 {
        let holder = gpu.slices.iter().find_map(|slice| slice.holder.as_ref());
        return holder.map_or_else(|| "[free]".into(), |holder| format!("[{} {}]", holder.user, holder.workload));
    }
    let mut slices: Vec<&Slice> = gpu.slices.iter().filter(|slice| slice.placement.is_some()).collect();
    slices.sort_by_key(|slice| slice.placement);
    let mut text = String::from("|");
    let mut column = 0;
    for slice in slices {
        let Some(placement) = slice.placement else { continue };
        text += &free(placement.start.saturating_sub(column));
        text += &cell(&label(slice), placement.size);
        column = placement.start + placement.size;
    }
    text + &free(gpu.columns.saturating_sub(column))
}

fn free(columns: u32) -> String {
    (0..columns).map(|_| cell(".", 1)).collect()
}

fn label(slice: &Slice) -> String {
    match (&slice.holder, slice.state) {
        (Some(holder), _) => format!("{} {}", slice.profile, holder.user),
        (None, SliceState::Quarantined) => format!("{} ?", slice.profile),
        (None, _) => format!("{} -", slice.profile),
    }
}

/// A label cut or padded to its columns, with a bar behind it.
fn cell(label: &str, columns: u32) -> String {
    let width = (columns as usize * COLUMN_WIDTH).saturating_sub(1);
    let label: String = label.chars().take(width).collect();
    format!("{label:<width$}|")
}

/// What waits, and why.
#[derive(Debug, Default, Serialize)]
struct Waiting {
    jobs: Vec<Job>,
    workspaces: Vec<Workspace>,
}

pub(super) async fn why(client: &Client, output: &Output, what: Option<&str>) -> Outcome {
    let waiting = match what.map(|what| (what, what.parse::<JobId>())) {
        Some((_, Ok(id))) => Waiting { jobs: vec![client.job(id).await?], ..Waiting::default() },
        Some((name, Err(_))) => Waiting { workspaces: vec![client.workspace(name).await?], ..Waiting::default() },
        None => all_waiting(client).await?,
    };
    let now = Timestamp::now();
    output.show(&waiting, |waiting| {
        let jobs = waiting.jobs.iter().map(|job| explain_job(job, now));
        let workspaces = waiting.workspaces.iter().map(|workspace| explain_workspace(workspace, now));
        let text: String = jobs.chain(workspaces).collect();
        if text.is_empty() { "nothing of yours waits\n".into() } else { text }
    })
}

async fn all_waiting(client: &Client) -> Result<Waiting, CliError> {
    let jobs = client.jobs(&JobQuery::default()).await?.jobs;
    let workspaces = client.workspaces(false).await?.workspaces;
    Ok(Waiting {
        jobs: jobs.into_iter().filter(|job| job.state != JobState::Running).collect(),
        workspaces: workspaces.into_iter().filter(|workspace| workspace.wait.is_some()).collect(),
    })
}

fn explain_job(job: &Job, now: Timestamp) -> String {
    let mut text = format!("job {} ({}): {}", job.id, plain(&job.name), super::jobs::state_text(job));
    if let Some(place) = job.place {
        text += &format!(", place {place} in the queue");
    }
    if let Some(estimate) = job.estimate {
        text += &format!(", perhaps {}", ago(estimate, now));
    }
    text + &job.detail.as_deref().map(|detail| format!("\n  {}", plain(detail))).unwrap_or_default() + "\n"
}

fn explain_workspace(workspace: &Workspace, now: Timestamp) -> String {
    let mut text = format!("workspace {}: {}", workspace.name, output::word(&workspace.state));
    if let Some(wait) = &workspace.wait {
        text += &format!(" ({}), place {} of {}", output::word(&wait.reason), wait.place, wait.waiting);
        if let Some(estimate) = wait.estimate {
            text += &format!(", perhaps {}", ago(estimate, now));
        }
        text += &format!("\n  {}", plain(&wait.detail));
    } else if let Some(detail) = &workspace.detail {
        text += &format!("\n  {}", plain(detail));
    }
    text + "\n"
}

pub(super) async fn images(client: &Client, output: &Output) -> Outcome {
    let images = client.images().await?;
    output.show(&images, |list| {
        let rows = list.images.iter().map(|image| {
            let ready = if image.available { "yes" } else { "not built" };
            let least = if image.min_gpu_memory_mib == 0 { "-".into() } else { memory(image.min_gpu_memory_mib) };
            [image.name.clone(), ready.into(), least, image.reference.clone(), image.description.clone()]
        });
        output::table(
            ["NAME", "READY", "GPU MEMORY", "REFERENCE", "DESCRIPTION"],
            rows.collect(),
            "the catalog is empty",
        )
    })
}

pub(super) async fn quota(client: &Client, output: &Output) -> Outcome {
    let quota = client.quota().await?;
    output.show(&quota, |quota| {
        let limit = |value: Option<String>| value.unwrap_or_else(|| "no limit".into());
        let rows = vec![
            ["slices".into(), quota.slices_used.to_string(), limit(quota.slices.map(|n| n.to_string()))],
            ["GPU memory".into(), memory(quota.gpu_memory_mib_used), limit(quota.gpu_memory_mib.map(memory))],
            ["jobs".into(), quota.jobs_used.to_string(), limit(quota.jobs.map(|n| n.to_string()))],
        ];
        output::table(["", "HELD", "LIMIT"], rows, "")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Holder, Placement};

    fn slice(profile: &str, start: u32, size: u32, user: Option<&str>) -> Slice {
        Slice {
            profile: profile.into(),
            uuid: "MIG-1".into(),
            placement: Some(Placement { start, size }),
            memory_mib: 4864,
            state: if user.is_some() { SliceState::Leased } else { SliceState::Idle },
            holder: user.map(|user| Holder {
                user: user.into(),
                workload: "w-1-1".into(),
                since: Timestamp::UNIX_EPOCH,
            }),
        }
    }

    #[test]
    fn a_gpu_is_a_strip_of_its_columns() {
        let gpu = Gpu {
            node: "n".into(),
            index: 0,
            uuid: "GPU-1".into(),
            model: "A100".into(),
            memory_mib: 40_960,
            mig: true,
            columns: 8,
            slices: vec![slice("3g.20gb", 4, 4, None), slice("1g.5gb", 0, 1, Some("alice"))],
            profiles: vec![],
            fault: None,
        };
        let strip = strip(&gpu);
        assert_eq!(strip.chars().count(), 1 + 8 * COLUMN_WIDTH, "{strip}");
        assert!(strip.starts_with("|1g.5gb a|.       |"), "{strip}");
        assert!(strip.contains("|3g.20gb -  "), "{strip}");
    }
}
