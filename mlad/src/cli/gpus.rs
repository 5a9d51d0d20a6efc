//! `who`, `gpu`, `why`, `image ls`, `quota`: what there is, who has it, what blocks.

use super::{
    CliError, Outcome,
    output::{self, Output, ago, local_time, memory, or_dash, plain},
};
use crate::{
    api::{Gpu, GpuMap, Job, JobId, JobState, Lease, ProfileRoom, Slice, SliceState, Wait, Workspace},
    client::{Client, JobQuery},
};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

/// Characters a column of the placement axis takes in the map.
const COLUMN_WIDTH: usize = 9;
/// A GPU that was not read for so long is marked; it is read every minute.
const LATE: SignedDuration = SignedDuration::from_mins(3);

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
    let (now, width) = (Timestamp::now(), output::width());
    output.show(&map, |map| draw(map, now, width))
}

/// A strip for each GPU, with every instance, and below it who holds them and what would fit beside them.
fn draw(map: &GpuMap, now: Timestamp, width: Option<usize>) -> String {
    if map.gpus.is_empty() {
        return "no GPUs\n".into();
    }
    let mut text = String::new();
    for gpu in &map.gpus {
        let note = note(gpu, now);
        text += &format!("{} GPU {}  {}  {}{note}\n", gpu.node, gpu.index, plain(&gpu.model), memory(gpu.memory_mib));
        text += &format!("  {}\n", strip(gpu, width));
        let holders: String = gpu.slices.iter().filter_map(|slice| holder(slice, now)).collect();
        text += &holders;
        let fits: Vec<String> = gpu.profiles.iter().rev().filter(|room| room.free > 0).map(room).collect();
        if !fits.is_empty() {
            text += &format!("  fits now: {}\n", fits.join(", "));
        }
    }
    if let Some(late) = &map.late {
        text += &format!("NOT CURRENT: {}\n", plain(late));
    }
    text + &format!("as of {}\n", local_time(map.as_of))
}

fn note(gpu: &Gpu, now: Timestamp) -> String {
    let late = gpu.read_at.filter(|read_at| now.duration_since(*read_at) > LATE);
    let late = late.map(|read_at| format!("  READ LAST {} AGO", ago(read_at, now))).unwrap_or_default();
    match &gpu.fault {
        Some(fault) => format!("  OUT OF SERVICE: {}{late}", plain(fault)),
        None if !gpu.mig => format!("  whole (MIG is off){late}"),
        None => late,
    }
}

fn room(room: &ProfileRoom) -> String {
    match room.free {
        1 => room.profile.clone(),
        free => format!("{} x{free}", room.profile),
    }
}

fn holder(slice: &Slice, now: Timestamp) -> Option<String> {
    let holder = slice.holder.as_ref()?;
    let until = holder.until.map(|until| format!(", ends {}", ago(until, now))).unwrap_or_default();
    let doubt = if slice.state == SliceState::Quarantined { " (in doubt)" } else { "" };
    Some(format!(
        "  {}  {}  {}  {}  for {}{until}{doubt}\n",
        slice.profile,
        memory(slice.memory_mib),
        plain(&holder.user),
        plain(&holder.workload),
        ago(holder.since, now)
    ))
}

fn strip(gpu: &Gpu, width: Option<usize>) -> String {
    if gpu.columns == 0 {
        let holder = gpu.slices.iter().find_map(|slice| slice.holder.as_ref());
        return holder.map_or_else(|| "[free]".into(), |holder| format!("[{}]", plain(&holder.user)));
    }
    // Three for the margin and the first bar; a narrow terminal gets narrow columns.
    let fits = width.map(|width| width.saturating_sub(3) / gpu.columns as usize);
    let column_width = fits.map_or(COLUMN_WIDTH, |fits| fits.clamp(2, COLUMN_WIDTH));
    let free = |columns: u32| -> String { (0..columns).map(|_| cell(".", 1, column_width)).collect() };
    let mut slices: Vec<&Slice> = gpu.slices.iter().filter(|slice| slice.placement.is_some()).collect();
    slices.sort_by_key(|slice| slice.placement);
    let mut text = String::from("|");
    let mut column = 0;
    for slice in slices {
        let Some(placement) = slice.placement else { continue };
        text += &free(placement.start.saturating_sub(column));
        text += &cell(&label(slice), placement.size, column_width);
        column = placement.start + placement.size;
    }
    text + &free(gpu.columns.saturating_sub(column))
}

fn label(slice: &Slice) -> String {
    match (&slice.holder, slice.state) {
        (Some(holder), _) => format!("{} {}", slice.profile, plain(&holder.user)),
        (None, SliceState::Quarantined) => format!("{} ?", slice.profile),
        (None, _) => format!("{} -", slice.profile),
    }
}

/// A label cut or padded to its columns, with a bar behind it.
fn cell(label: &str, columns: u32, column_width: usize) -> String {
    let width = (columns as usize * column_width).saturating_sub(1);
    let label: String = label.chars().take(width).collect();
    format!("{label:<width$}|")
}

/// What waits, and why.
#[derive(Debug, Default, Serialize)]
struct Waiting {
    jobs: Vec<Job>,
    workspaces: Vec<Workspace>,
    /// Who is ahead of it, where one thing waits for a slice: first in line first.
    ahead: Vec<Wait>,
    /// Profiles there is room for now.
    fits_now: Vec<String>,
}

/// So many of those ahead are named.
const AHEAD: usize = 5;

pub(super) async fn why(client: &Client, output: &Output, what: Option<&str>) -> Outcome {
    let mut waiting = match what.map(|what| (what, what.parse::<JobId>())) {
        Some((_, Ok(id))) => Waiting { jobs: vec![client.job(id).await?], ..Waiting::default() },
        Some((name, Err(_))) => Waiting { workspaces: vec![client.workspace(name).await?], ..Waiting::default() },
        None => all_waiting(client).await?,
    };
    if let Some(place) = waiting.place() {
        let mut waits = client.waits().await?;
        waits.retain(|wait| wait.place < place);
        (waiting.ahead, waiting.fits_now) = (waits, fits_now(&client.gpus().await?));
    }
    let now = Timestamp::now();
    output.show(&waiting, |waiting| {
        let jobs = waiting.jobs.iter().map(|job| explain_job(job, now));
        let workspaces = waiting.workspaces.iter().map(|workspace| explain_workspace(workspace, now));
        let text: String = jobs.chain(workspaces).collect();
        if text.is_empty() { "nothing of yours waits\n".into() } else { text + &explain_line(waiting, now) }
    })
}

impl Waiting {
    /// The place in the queue of the one thing that waits for a slice, if it is one.
    fn place(&self) -> Option<u32> {
        let jobs = self.jobs.iter().filter_map(|job| job.place);
        let workspaces = self.workspaces.iter().filter_map(|workspace| Some(workspace.wait.as_ref()?.place));
        let mut places = jobs.chain(workspaces);
        places.next().filter(|_| places.next().is_none())
    }
}

/// Names of the profiles there is room for, the largest first, each once.
fn fits_now(map: &GpuMap) -> Vec<String> {
    let mut rooms: Vec<&ProfileRoom> =
        map.gpus.iter().flat_map(|gpu| &gpu.profiles).filter(|room| room.free > 0).collect();
    rooms.sort_by(|a, b| (b.memory_mib, &a.profile).cmp(&(a.memory_mib, &b.profile)));
    let mut names: Vec<String> = rooms.into_iter().map(|room| room.profile.clone()).collect();
    names.dedup();
    names
}

fn explain_line(waiting: &Waiting, now: Timestamp) -> String {
    if waiting.place().is_none() {
        return String::new();
    }
    let one = |wait: &Wait| format!("{} for {} ({})", plain(&wait.user), wait.need, ago(wait.since, now));
    let mut names: Vec<String> = waiting.ahead.iter().take(AHEAD).map(one).collect();
    if let Some(more @ 1..) = waiting.ahead.len().checked_sub(AHEAD) {
        names.push(format!("{more} more"));
    }
    let ahead = if names.is_empty() { "nobody".into() } else { names.join(", ") };
    let fits = match waiting.fits_now.as_slice() {
        [] => "nothing".into(),
        fits => fits.join(", "),
    };
    format!("  ahead of it: {ahead}\n  space is free now for: {fits}\n")
}

async fn all_waiting(client: &Client) -> Result<Waiting, CliError> {
    let jobs = client.jobs(&JobQuery::default()).await?.jobs;
    let workspaces = client.workspaces(false).await?.workspaces;
    Ok(Waiting {
        jobs: jobs.into_iter().filter(|job| job.state != JobState::Running).collect(),
        workspaces: workspaces.into_iter().filter(|workspace| workspace.wait.is_some()).collect(),
        ..Waiting::default()
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
                until: Timestamp::from_second(3660).ok(),
            }),
        }
    }

    fn gpu() -> Gpu {
        Gpu {
            node: "n".into(),
            index: 0,
            uuid: "GPU-1".into(),
            model: "A100".into(),
            memory_mib: 40_960,
            mig: true,
            columns: 8,
            slices: vec![slice("3g.20gb", 4, 4, None), slice("1g.5gb", 0, 1, Some("alice"))],
            profiles: vec![
                ProfileRoom { profile: "1g.5gb".into(), memory_mib: 4864, free: 3, most: 7 },
                ProfileRoom { profile: "7g.40gb".into(), memory_mib: 40_192, free: 0, most: 1 },
            ],
            read_at: Some(Timestamp::UNIX_EPOCH),
            fault: None,
        }
    }

    #[test]
    fn a_gpu_is_a_strip_of_its_columns() {
        let wide = strip(&gpu(), None);
        assert_eq!(wide.chars().count(), 1 + 8 * COLUMN_WIDTH, "{wide}");
        assert!(wide.starts_with("|1g.5gb a|.       |"), "{wide}");
        assert!(wide.contains("|3g.20gb -  "), "{wide}");
        for width in [20, 40, 60, 200] {
            let strip = strip(&gpu(), Some(width));
            assert!(strip.chars().count() + 2 <= width.max(19), "{width}: {strip}");
        }
    }

    fn workspace(wait: Option<Wait>) -> Workspace {
        Workspace {
            name: "default".into(),
            user: "alice".into(),
            state: crate::api::WorkspaceState::Waiting,
            detail: None,
            image: "base".into(),
            need: "3g.20gb".parse().unwrap(),
            project: None,
            lease: None,
            wait,
            connections: 1,
            idle_deadline: None,
            created_at: Timestamp::UNIX_EPOCH,
            started_at: None,
        }
    }

    #[test]
    fn who_is_ahead_is_named_up_to_a_number() {
        let wait = |place| Wait {
            workload: "job".into(),
            user: format!("user{place}"),
            project: None,
            need: "3g.20gb".parse().unwrap(),
            slices: 1,
            nodes: None,
            priority: 0,
            since: Timestamp::UNIX_EPOCH,
            reason: crate::api::WaitReason::NoSlice,
            detail: String::new(),
            place,
            waiting: 8,
            estimate: None,
        };
        let mut waiting = Waiting { ahead: (1..=7).map(wait).collect(), ..Waiting::default() };
        assert_eq!(explain_line(&waiting, Timestamp::UNIX_EPOCH), "", "nothing waits");
        waiting.workspaces = vec![workspace(Some(wait(8)))];
        waiting.fits_now = fits_now(&GpuMap { gpus: vec![gpu(), gpu()], as_of: Timestamp::UNIX_EPOCH, late: None });
        let text = explain_line(&waiting, Timestamp::from_second(60).unwrap());
        assert!(
            text.contains("ahead of it: user1 for 3g.20gb (1m00s), user2") && text.contains(", 2 more\n"),
            "{text}"
        );
        assert!(text.ends_with("space is free now for: 1g.5gb\n"), "{text}");
    }

    #[test]
    fn a_map_names_holders_and_room_and_marks_what_is_late() {
        let map = GpuMap { gpus: vec![gpu()], as_of: Timestamp::UNIX_EPOCH, late: None };
        let now = Timestamp::from_second(60).unwrap();
        let text = draw(&map, now, None);
        assert!(text.contains("  1g.5gb  4.7 GiB  alice  w-1-1  for 1m00s, ends in 1h00m\n"), "{text}");
        assert!(
            text.contains("  fits now: 1g.5gb x3\n") && !text.contains("CURRENT") && !text.contains("READ"),
            "{text}"
        );
        let later =
            draw(&GpuMap { late: Some("it is away".into()), ..map }, Timestamp::from_second(600).unwrap(), None);
        assert!(later.contains("NOT CURRENT: it is away") && later.contains("READ LAST 10m00s AGO"), "{later}");
    }
}
