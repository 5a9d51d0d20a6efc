//! Jobs: what is submitted, what it is doing, what came of it.

use super::Need;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// A job's number: 1, 2, 3, … on one installation.
pub type JobId = i64;

/// What is submitted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// Program and arguments; the first is looked up in `PATH`. 1 to 1,024 words, 128 KiB in all.
    pub command: Vec<String>,
    /// Name for people; the command's first word if absent. At most 128 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Slice wanted; that of the workspace which sends it (or `cpu`) if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub need: Option<Need>,
    /// Image by catalog name; that of the workspace which sends it (or the default) if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Working directory in the container; the home if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_directory: Option<String>,
    /// Environment in addition to the image's. At most 256 variables, 64 KiB in all.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
    /// Longest run, in seconds; the configured limit if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_limit_seconds: Option<u64>,
    /// Memory of the container, in MiB; the configured one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Submit, but do not start until released.
    #[serde(default)]
    pub hold: bool,
    /// The project it counts for, of which the user is a member; that of the workspace which sends it, else the
    /// user's default, if absent; `none` for no project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// So many slices, all at once and on one node; 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slices: Option<u32>,
    /// On so many nodes; only 1 is served so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<u32>,
    /// Who asks with more is ahead: -100 up to what the user may ask for; 0 if absent.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub priority: i32,
    /// It may be ended, with notice, for a request of greater priority; it then waits to start again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub preemptible: bool,
    /// The reservation in whose space, and time, it runs: it starts when that has begun, and ends with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation: Option<String>,
    /// The same key from the same user within a day gives the same job back. At most 128 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
}

fn is_zero(priority: &i32) -> bool {
    *priority == 0
}

/// Where a job is in its life (design, "A job, step by step"). Ended states never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// Waits for its owner to release it.
    Held,
    /// Waits for other jobs.
    Blocked,
    /// Waits for a slice.
    Queued,
    /// Has a lease; its container is being made.
    Starting,
    /// Its command runs.
    Running,
    /// Its command ended; the result is being written down.
    Collecting,
    /// Its node or lease is gone and it is not known whether it still runs.
    Lost,
    /// Was told to end and has not yet.
    Cancelling,
    /// Ended with exit code 0.
    Succeeded,
    /// Ended otherwise.
    Failed,
    /// Ended because somebody wanted it to.
    Cancelled,
}

impl JobState {
    /// Whether nothing can change any more.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// Why a job is in its state; a second field beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum JobReason {
    /// Others came first.
    Priority,
    /// No space of that size is free.
    NoSlice,
    /// A quota is used up.
    Quota,
    /// Held by its owner.
    Held,
    /// The free space is being repartitioned.
    Repartitioning,
    /// The container engine, node or driver does not answer.
    NodeUnavailable,
    /// What is free is set aside for others, or its own reservation has not begun or is in use.
    Reserved,
    /// The image cannot be had.
    Image,
    /// The command ended by itself; see the exit code or signal.
    Exit,
    /// Killed because the container's memory was used up.
    OutOfMemory,
    /// Killed because the time limit was reached.
    TimeLimit,
    /// Its slice is, or was, wanted for something of greater priority, or its GPU time is used up: it was told to end.
    Preempted,
    /// Cancelled by its owner or an administrator.
    Cancelled,
    /// MLAD's fault or the machine's; another attempt was or is made.
    Infrastructure,
}

/// A job as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Its number.
    pub id: JobId,
    /// The user it belongs to.
    pub user: String,
    /// Name for people.
    pub name: String,
    /// Where it is in its life.
    pub state: JobState,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<JobReason>,
    /// The reason in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What was submitted, with the defaults filled in.
    pub spec: JobSpec,
    /// When it was accepted.
    pub submitted_at: Timestamp,
    /// When the latest attempt's command started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// Exit code of the command, if it exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Signal that ended the command (`KILL`, `TERM`, …; RFC 4254 section 6.10 names), if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// The attempts so far, first to last.
    pub attempts: Vec<Attempt>,
    /// Place in the queue while it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<u32>,
    /// When it may start at the earliest, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Timestamp>,
    /// Its folder as the user sees it: `/home/<user>/.mlad/jobs/<id>`.
    pub directory: String,
}

impl Job {
    /// The exit code `mlad run` and `mlad wait` end with: the command's own, 128 + signal number, or 1.
    pub fn own_exit_code(&self) -> u8 {
        match (self.exit_code, self.signal.as_deref()) {
            // Its command ended well, but was out of time or cancelled.
            (Some(0), _) if self.state != JobState::Succeeded => 1,
            (Some(code), _) => u8::try_from(code & 0xff).unwrap_or(1),
            (None, Some(signal)) => 128_u8.saturating_add(signal_number(signal)),
            (None, None) if self.state == JobState::Succeeded => 0,
            (None, None) => 1,
        }
    }
}

/// Linux numbers of the signals named in RFC 4254 section 6.10; 0 for an unknown name.
fn signal_number(name: &str) -> u8 {
    match name {
        "HUP" => 1,
        "INT" => 2,
        "QUIT" => 3,
        "ILL" => 4,
        "ABRT" => 6,
        "FPE" => 8,
        "KILL" => 9,
        "USR1" => 10,
        "SEGV" => 11,
        "USR2" => 12,
        "PIPE" => 13,
        "ALRM" => 14,
        "TERM" => 15,
        _ => 0,
    }
}

/// One try at running a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Attempt {
    /// 1, 2, …
    pub number: u32,
    /// The workload's name: `j-<id>-<number>`.
    pub workload: String,
    /// Fence of its lease.
    pub fence: u64,
    /// Node it ran on.
    pub node: String,
    /// UUIDs of its slices.
    pub uuids: Vec<String>,
    /// When the lease was granted.
    pub granted_at: Timestamp,
    /// When its command started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// Whether it was ended with notice, for no fault: the job waits again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub preempted: bool,
}

/// How a job ended: its file `result`, beside log and artifacts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobEnd {
    /// The job's number.
    pub id: JobId,
    /// Its name for people.
    pub name: String,
    /// Succeeded, failed or cancelled.
    pub state: JobState,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<JobReason>,
    /// The reason in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Exit code of the command, if it exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Signal that ended the command, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// Number of its last attempt; 0 if none was made.
    pub attempt: u32,
    /// When it was accepted.
    pub submitted_at: Timestamp,
    /// When the last attempt's command started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
}

/// The answer to a submission.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobSubmitted {
    /// The job's number.
    pub id: JobId,
}

/// Jobs, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobList {
    /// At most the limit asked for.
    pub jobs: Vec<Job>,
    /// Pass as `before` to see the next page; none at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_before: Option<JobId>,
}

/// A file a job left in its `artifacts` folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Artifact {
    /// Path below `artifacts`.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
}

/// The files a job left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ArtifactList {
    /// By path.
    pub artifacts: Vec<Artifact>,
}
