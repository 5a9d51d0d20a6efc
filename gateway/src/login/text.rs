//! Every sentence a login shows. One file, so that another language is another file.

use super::width::clean;
use crate::workspace::WorkspaceError;
use jiff::SignedDuration;
use mlad::api::{Image, Need, Quota, Wait, WaitReason};

/// Most characters of an error that are shown.
const MAX_ERROR: usize = 1000;
/// Most characters of any other text that comes from elsewhere.
const MAX_TEXT: usize = 200;

pub(super) const WHICH_IMAGE: &str = "Which image?";
pub(super) const WHICH_SLICE: &str = "Which GPU slice?";
pub(super) const MENU_HELP: &str = "arrows or a number, Enter; Ctrl-C gives up";
pub(super) const GAVE_UP: &str = "Given up.";
pub(super) const NOBODY_CHOSE: &str = "mlad: the input ended before image and slice were chosen; name them: \
     ssh -o SetEnv='MLAD_IMAGE=IMAGE MLAD_GPU=1g.5gb' …; `mlad image ls` and `mlad gpu` show what there is";
pub(super) const GAVE_PLACE_BACK: &str = "Given up; the place in the queue is given back.";
pub(super) const STOPPING: &str = "waiting for this workspace's last container to end";
pub(super) const STARTING: &str = "starting the container";
pub(super) const PULLING: &str = "fetching the image";
pub(super) const CTRL_C: &str = "Ctrl-C gives up";

/// An error and what to do about it, in one line.
pub(super) fn error(error: &WorkspaceError) -> String {
    let text = clean(&error.to_string(), MAX_ERROR);
    match error.hint() {
        Some(hint) => format!("mlad: {text}; {}", clean(&hint, MAX_TEXT)),
        None => format!("mlad: {text}"),
    }
}

/// What was chosen in a menu.
pub(super) fn chosen(question: &str, answer: &str) -> String {
    format!("{question} {answer}")
}

/// The prompt of a menu on a terminal that cannot redraw.
pub(super) fn number_prompt(most: usize) -> String {
    format!("Number, 1 to {most}, and Enter: ")
}

/// An image in the menu: name, then what there is to say.
pub(super) fn image_item(image: &Image) -> (String, String) {
    let mut note = clean(&image.description, MAX_TEXT);
    if !image.available {
        note.push_str(if note.is_empty() { "(to be fetched first)" } else { " (to be fetched first)" });
    }
    (clean(&image.name, MAX_TEXT), note)
}

/// A slice in the menu: name, then what there is to say.
pub(super) fn slice_item(profile: &str, memory_mib: u64, free: u32, most: u32) -> (String, String) {
    let room = match free {
        0 => "all in use: you would wait".to_owned(),
        _ => format!("{free} of {most} free"),
    };
    (clean(profile, MAX_TEXT), format!("{:>9}  {room}", memory(memory_mib)))
}

/// No slice, in the menu.
pub(super) fn no_slice_item() -> (String, String) {
    ("cpu".to_owned(), format!("{:>9}  always free", "no GPU"))
}

/// What is waited for: the parts of the line, each with its rank; 0 is the last to be left out.
pub(super) fn waiting(wait: &Wait, left: Option<SignedDuration>, elapsed: SignedDuration) -> Vec<(u8, String)> {
    let mut parts = vec![(2, waiting_for(wait)), (0, place(wait))];
    parts.extend(left.map(|left| (3, estimate(left))));
    parts.extend([(1, clock(elapsed)), (4, CTRL_C.to_owned())]);
    parts
}

/// The place in the queue.
pub(super) fn place(wait: &Wait) -> String {
    format!("place {} of {}", wait.place, wait.waiting)
}

/// What is waited for and why.
pub(super) fn waiting_for(wait: &Wait) -> String {
    let reason = match wait.reason {
        WaitReason::Priority => "others came first",
        WaitReason::NoSlice => "none is free",
        WaitReason::Quota => "your quota is used up",
        WaitReason::Repartitioning => "it is being made",
        WaitReason::NodeUnavailable => "a GPU node does not answer",
        WaitReason::Reserved => "what is free is reserved",
    };
    format!("waiting for {}: {reason}", need(&wait.need))
}

/// The allocator's own words about a wait.
pub(super) fn wait_detail(wait: &Wait) -> String {
    clean(&wait.detail, MAX_TEXT)
}

/// A wait in one line, for a login without a terminal that waited too long.
pub(super) fn wait_summary(wait: &Wait) -> String {
    format!("{}, {}", waiting_for(wait), place(wait))
}

fn need(wanted: &Need) -> String {
    match wanted {
        Need::Profile(profile) => clean(profile, MAX_TEXT),
        Need::MemoryMib(_) => format!("{wanted} of GPU memory"),
        Need::Gpu => "a whole GPU".to_owned(),
        Need::Cpu => "CPU time".to_owned(),
        Need::On { need: inner, model } => format!("{} on a GPU of the model {}", need(inner), clean(model, MAX_TEXT)),
    }
}

fn estimate(left: SignedDuration) -> String {
    match left.as_mins() {
        ..1 => "less than a minute".to_owned(),
        minutes @ 1..60 => format!("about {minutes} min"),
        minutes => format!("about {} h {} min", minutes / 60, minutes % 60),
    }
}

/// `0:07`, `12:03`, `1:00:00`.
pub(super) fn clock(elapsed: SignedDuration) -> String {
    let seconds = elapsed.as_secs().max(0);
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        _ => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

/// How far the image has been fetched.
pub(super) fn pulling(done: u64, total: Option<u64>) -> String {
    let mib = |bytes: u64| bytes / (1 << 20);
    match total.filter(|total| *total > 0) {
        Some(total) => format!("{PULLING}: {} of {} MiB", mib(done.min(total)), mib(total)),
        None if done > 0 => format!("{PULLING}: {} MiB", mib(done)),
        None => PULLING.to_owned(),
    }
}

fn memory(mib: u64) -> String {
    format!("{mib} MiB")
}

/// The greeting's title.
pub(super) fn title(user: &str, workspace: &str, image: &str) -> String {
    format!(
        "MLAD: {}, workspace {}, image {}",
        clean(user, MAX_TEXT),
        clean(workspace, MAX_TEXT),
        clean(image, MAX_TEXT)
    )
}

/// The slice of the workspace.
pub(super) fn slice(profile: &str, memory_mib: u64, uuid: Option<&str>) -> String {
    match uuid {
        Some(uuid) => {
            let uuid = clean(uuid, MAX_TEXT);
            let tail: String = uuid.chars().skip(uuid.chars().count().saturating_sub(12)).collect();
            format!("GPU    {}, {}, UUID …{tail}", clean(profile, MAX_TEXT), memory(memory_mib))
        }
        None => "GPU    none (log in with MLAD_GPU=1g.5gb or another slice to get one)".to_owned(),
    }
}

/// What the workspace counts for.
pub(super) fn project(name: &str) -> String {
    format!("For    project {}", clean(name, MAX_TEXT))
}

/// Why the workspace ended the last time.
pub(super) fn last_end(reason: &str) -> String {
    format!("Last   ended: {}", clean(reason, MAX_TEXT))
}

/// What of the quota is used.
pub(super) fn quota(quota: &Quota) -> String {
    let of = |most: Option<u64>| most.map_or(String::new(), |most| format!(" of {most}"));
    let slices = if quota.slices.unwrap_or(quota.slices_used) == 1 { "slice" } else { "slices" };
    format!(
        "Quota  {}{} {slices}, {}{} MiB of GPU memory in use",
        quota.slices_used,
        of(quota.slices.map(u64::from)),
        quota.gpu_memory_mib_used,
        of(quota.gpu_memory_mib)
    )
}

/// How many wait.
pub(super) fn queue(waiting: usize) -> String {
    match waiting {
        0 => "Queue  nobody waits for a slice".to_owned(),
        1 => "Queue  1 request waits for a slice".to_owned(),
        _ => format!("Queue  {waiting} requests wait for slices"),
    }
}

/// When the workspace ends.
pub(super) fn idle(minutes: u64) -> String {
    let minutes = match minutes {
        0 => "with the last connection".to_owned(),
        1 => "1 minute after the last connection".to_owned(),
        _ => format!("{minutes} minutes after the last connection"),
    };
    format!("Idle   stops {minutes} (`mlad workspace extend`)")
}

/// Where to get help.
pub(super) const HELP: &str = "Help   `mlad help`; your files are in your home and stay";
