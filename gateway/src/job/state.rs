//! The life of a job: its states and the only transitions between them. Pure: no I/O, no clock.

use jiff::Timestamp;
use mlad::{
    api::{JobId, JobReason, JobState},
    channel::Exit,
};
use std::{fmt, str::FromStr};

/// Everything about a job that changes.
///
/// ```text
///  submit ─→ held ⇄ queued ─→ starting ─→ running ─→ collecting ─→ succeeded
///     └───→ blocked ──↑ ↑        │  │       │ │ ↑         └──────→ failed
///                       ├─ fault ┘  │       │ │ │
///                       ├─ fault ───│───────┘ │ │ the same fence returns
///                       │           ↓         ↓ │
///                       └─ dead ── lost ←───── ─┘        starting, lost ─→ failed
///
///  blocked ─→ cancelled;   any that has not ended ─→ cancelling ─→ cancelled
/// ```
///
/// Every transition is a method that gives the life after it, or says why it cannot be; succeeded, failed
/// and cancelled never change. State and reason are two fields. While a job collects, reason, exit code and
/// signal already hold its verdict: [`Life::settled`] only has to read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Life {
    /// Where the job is.
    pub state: JobState,
    /// Why.
    pub reason: Option<JobReason>,
    /// The reason in words.
    pub detail: Option<String>,
    /// Number of the latest attempt that asked for a lease and got one, or lost its place; 0 before the first.
    pub attempt: u32,
    /// When the command of that attempt started.
    pub started_at: Option<Timestamp>,
    /// When the job ended.
    pub ended_at: Option<Timestamp>,
    /// Exit code of the command.
    pub exit_code: Option<i32>,
    /// Signal that ended the command, without SIG.
    pub signal: Option<String>,
    /// Who cancelled it.
    pub cancelled_by: Option<String>,
}

/// A transition that is not in the drawing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a job that is {} cannot {verb}", word(*from))]
pub struct Illegal {
    /// The state it was in.
    pub from: JobState,
    /// What it was to do: completes "a job that is running cannot …".
    pub verb: &'static str,
}

impl Life {
    /// States in which the current attempt, if there is one, may have a container or a lease.
    pub(super) const WITH_ATTEMPT: [JobState; 5] =
        [JobState::Starting, JobState::Running, JobState::Collecting, JobState::Lost, JobState::Cancelling];

    /// A job that was just accepted.
    pub fn submitted(hold: bool) -> Self {
        let (state, reason) = if hold { (JobState::Held, Some(JobReason::Held)) } else { (JobState::Queued, None) };
        Self {
            state,
            reason,
            detail: None,
            attempt: 0,
            started_at: None,
            ended_at: None,
            exit_code: None,
            signal: None,
            cancelled_by: None,
        }
    }

    /// queued → held.
    pub fn held(&self, detail: Option<String>) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Queued], "be held")?;
        Ok(self.to(JobState::Held, Some(JobReason::Held), detail))
    }

    /// held → queued.
    pub fn released(&self) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Held], "be released")?;
        Ok(self.to(JobState::Queued, None, None))
    }

    /// blocked → queued: what it waited for is done.
    pub fn unblocked(&self) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Blocked], "be unblocked")?;
        Ok(self.to(JobState::Queued, None, None))
    }

    /// queued → queued under the next number: the allocator has ended the request of this one (the job was
    /// held in between, or the gateway was away too long), and will not hear of it again.
    pub fn renumbered(&self) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Queued], "take another number")?;
        Ok(Self { attempt: self.attempt.saturating_add(1), ..self.clone() })
    }

    /// queued → starting: the lease of the next attempt is granted.
    pub fn granted(&self) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Queued], "start")?;
        let next = self.to(JobState::Starting, None, None);
        Ok(Self { attempt: self.attempt.saturating_add(1), started_at: None, ..next })
    }

    /// starting → running.
    pub fn started(&self, now: Timestamp) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Starting], "run")?;
        Ok(Self { started_at: Some(now), ..self.to(JobState::Running, None, None) })
    }

    /// running → running: its time is up, and it has been (or is about to be) told to end.
    pub fn overdue(&self, limit_seconds: u64) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Running], "exceed its time limit")?;
        let detail = format!("its time limit of {limit_seconds} seconds was reached");
        Ok(self.to(JobState::Running, Some(JobReason::TimeLimit), Some(detail)))
    }

    /// running → running: its lease is going to end, and it has been (or is about to be) told to end.
    pub fn noticed(&self, detail: String) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Running], "have notice")?;
        Ok(self.to(JobState::Running, Some(JobReason::Preempted), Some(detail)))
    }

    /// running → collecting: the command ended, and this is how.
    pub fn ended(&self, exit: &Exit, out_of_memory: Option<String>) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Running], "end")?;
        let (exit_code, signal) = match exit {
            Exit::Status(code) => (Some(i32::try_from(*code).unwrap_or(i32::MAX)), None),
            Exit::Signal { name, .. } => (None, Some(name.clone())),
        };
        let (reason, detail) = match (self.reason, out_of_memory) {
            (Some(JobReason::TimeLimit), _) => (JobReason::TimeLimit, self.detail.clone()),
            (_, Some(detail)) if exit_code != Some(0) => (JobReason::OutOfMemory, Some(detail)),
            _ => (JobReason::Exit, None),
        };
        Ok(Self { exit_code, signal, ..self.to(JobState::Collecting, Some(reason), detail) })
    }

    /// running → collecting: the container is over and its command told nobody how it ended, but the reason is
    /// known all the same: its memory was used up, or its time.
    pub fn killed(&self, out_of_memory: Option<String>) -> Result<Self, Illegal> {
        self.ended(&Exit::Signal { name: "KILL".into(), core_dumped: false, message: String::new() }, out_of_memory)
    }

    /// collecting → succeeded or failed, as its verdict says.
    pub fn settled(&self, now: Timestamp) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Collecting], "be settled")?;
        let success = self.reason == Some(JobReason::Exit) && self.exit_code == Some(0);
        let state = if success { JobState::Succeeded } else { JobState::Failed };
        Ok(Self { ended_at: Some(now), ..self.to(state, self.reason, self.detail.clone()) })
    }

    /// starting, running → lost: nobody knows whether it still has its slice.
    pub fn lost(&self, reason: JobReason, detail: String) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Starting, JobState::Running], "be lost")?;
        Ok(self.to(JobState::Lost, Some(reason), Some(detail)))
    }

    /// lost → running: the same fence holds again.
    pub fn returned(&self, now: Timestamp) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Lost], "come back")?;
        let started_at = self.started_at.or(Some(now));
        Ok(Self { started_at, ..self.to(JobState::Running, None, None) })
    }

    /// starting, running, lost → queued: the attempt is proven dead, and not by its own fault.
    pub fn requeued(&self, reason: JobReason, detail: String) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Starting, JobState::Running, JobState::Lost], "go back to the queue")?;
        Ok(Self { started_at: None, ..self.to(JobState::Queued, Some(reason), Some(detail)) })
    }

    /// starting, lost → failed: another attempt would not help, or too many were made.
    pub fn failed(&self, reason: JobReason, detail: String, now: Timestamp) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Starting, JobState::Lost], "fail")?;
        Ok(Self { ended_at: Some(now), ..self.to(JobState::Failed, Some(reason), Some(detail)) })
    }

    /// Any that has not ended → cancelling.
    pub fn cancelling(&self, by: &str) -> Result<Self, Illegal> {
        if self.state.has_ended() || self.state == JobState::Cancelling {
            return Err(Illegal { from: self.state, verb: "be cancelled" });
        }
        let next = self.to(JobState::Cancelling, Some(JobReason::Cancelled), Some(format!("cancelled by {by}")));
        Ok(Self { cancelled_by: Some(by.into()), exit_code: None, signal: None, ..next })
    }

    /// cancelling, blocked → cancelled.
    pub fn cancelled(&self, now: Timestamp) -> Result<Self, Illegal> {
        self.only_from(&[JobState::Cancelling, JobState::Blocked], "be cancelled")?;
        let next = self.to(JobState::Cancelled, Some(JobReason::Cancelled), self.detail.clone());
        Ok(Self { ended_at: Some(now), ..next })
    }

    /// Whether the current attempt may have a container or a lease.
    pub fn has_attempt(&self) -> bool {
        self.attempt > 0 && Self::WITH_ATTEMPT.contains(&self.state)
    }

    fn only_from(&self, states: &[JobState], verb: &'static str) -> Result<(), Illegal> {
        if states.contains(&self.state) { Ok(()) } else { Err(Illegal { from: self.state, verb }) }
    }

    fn to(&self, state: JobState, reason: Option<JobReason>, detail: Option<String>) -> Self {
        Self { state, reason, detail, ..self.clone() }
    }
}

/// The state in the words of the API.
pub fn word(state: JobState) -> &'static str {
    match state {
        JobState::Held => "held",
        JobState::Blocked => "blocked",
        JobState::Queued => "queued",
        JobState::Starting => "starting",
        JobState::Running => "running",
        JobState::Collecting => "collecting",
        JobState::Lost => "lost",
        JobState::Cancelling => "cancelling",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

/// The workload of one attempt: `j-<job>-<number>`. The name is what keeps an attempt from starting twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AttemptName {
    /// The job.
    pub job: JobId,
    /// Which attempt.
    pub number: u32,
}

impl fmt::Display for AttemptName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "j-{}-{}", self.job, self.number)
    }
}

/// A text that is not the name of a job's attempt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not the workload of a job")]
pub struct NotAnAttempt;

impl FromStr for AttemptName {
    type Err = NotAnAttempt;

    fn from_str(text: &str) -> Result<Self, NotAnAttempt> {
        let (job, number) = text.strip_prefix("j-").and_then(|rest| rest.split_once('-')).ok_or(NotAnAttempt)?;
        let name =
            Self { job: job.parse().map_err(|_| NotAnAttempt)?, number: number.parse().map_err(|_| NotAnAttempt)? };
        // Only the one spelling: `j-+1-01` is somebody else's.
        if name.to_string() == text { Ok(name) } else { Err(NotAnAttempt) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use JobState::*;
    use proptest::prelude::*;

    /// The drawing, as pairs.
    fn allowed(from: JobState, to: JobState) -> bool {
        let edges = [
            (Held, Queued),
            (Queued, Held),
            (Blocked, Queued),
            (Blocked, Cancelled),
            (Queued, Queued),
            (Queued, Starting),
            (Starting, Running),
            (Starting, Queued),
            (Starting, Failed),
            (Starting, Lost),
            (Running, Running),
            (Running, Collecting),
            (Running, Queued),
            (Running, Lost),
            (Collecting, Succeeded),
            (Collecting, Failed),
            (Lost, Running),
            (Lost, Queued),
            (Lost, Failed),
            (Cancelling, Cancelled),
        ];
        edges.contains(&(from, to)) || (to == Cancelling && !from.has_ended() && from != Cancelling)
    }

    fn transition(life: &Life, choice: usize) -> Result<Life, Illegal> {
        let now = Timestamp::UNIX_EPOCH;
        let text = || "because".to_string();
        match choice {
            0 => life.held(None),
            1 => life.released(),
            2 => life.unblocked(),
            3 => life.renumbered(),
            4 => life.granted(),
            5 => life.started(now),
            6 => life.overdue(60),
            7 => life.ended(&Exit::Status(0), None),
            8 => life.ended(&Exit::Status(3), Some(text())),
            9 => life.killed(Some(text())),
            10 => life.settled(now),
            11 => life.lost(JobReason::Infrastructure, text()),
            12 => life.returned(now),
            13 => life.requeued(JobReason::Infrastructure, text()),
            14 => life.failed(JobReason::Infrastructure, text(), now),
            15 => life.noticed(text()),
            16 => life.cancelling("alice"),
            _ => life.cancelled(now),
        }
    }

    proptest! {
        #[test]
        fn only_drawn_edges_occur_and_ended_states_stay(
            hold in any::<bool>(), choices in proptest::collection::vec(0usize..18, 0..60)
        ) {
            let mut life = Life::submitted(hold);
            for choice in choices {
                let Ok(next) = transition(&life, choice) else { continue };
                prop_assert!(!life.state.has_ended(), "{:?} changed", life.state);
                prop_assert!(allowed(life.state, next.state), "{:?} → {:?}", life.state, next.state);
                prop_assert!(next.attempt >= life.attempt, "numbers only grow");
                prop_assert_eq!(next.ended_at.is_some(), next.state.has_ended());
                prop_assert_eq!(next.attempt > life.attempt, choice == 3 || choice == 4);
                if next.state == Succeeded {
                    prop_assert_eq!((next.reason, next.exit_code), (Some(JobReason::Exit), Some(0)));
                }
                life = next;
            }
        }
    }

    #[test]
    fn every_drawn_edge_is_there() {
        let states =
            [Held, Blocked, Queued, Starting, Running, Collecting, Lost, Cancelling, Succeeded, Failed, Cancelled];
        for from in states {
            for to in states.into_iter().filter(|to| allowed(from, *to)) {
                let reachable = (0..18).any(|choice| {
                    [Some(0), Some(1)].into_iter().any(|exit_code| {
                        let reason = Some(JobReason::Exit);
                        let life = Life { state: from, exit_code, reason, ..Life::submitted(false) };
                        transition(&life, choice).is_ok_and(|next| next.state == to)
                    })
                });
                assert!(reachable, "{from:?} → {to:?}");
            }
        }
    }

    #[test]
    fn the_verdict_names_memory_and_time_before_the_exit_code() {
        let running = Life { state: Running, attempt: 1, ..Life::submitted(false) };
        let memory = Some("16 MiB were used up".to_string());
        let killed = Exit::Signal { name: "KILL".into(), core_dumped: false, message: String::new() };
        let life = running.ended(&killed, memory.clone()).unwrap().settled(Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!((life.state, life.reason, life.detail), (Failed, Some(JobReason::OutOfMemory), memory.clone()));
        assert_eq!(life.signal.as_deref(), Some("KILL"));
        // A child was killed for memory, but the command coped.
        let life = running.ended(&Exit::Status(0), memory).unwrap().settled(Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!((life.state, life.reason), (Succeeded, Some(JobReason::Exit)));
        // Told to end and did so tidily: still out of time.
        let overdue = running.overdue(60).unwrap();
        let life = overdue.ended(&Exit::Status(0), None).unwrap().settled(Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!((life.state, life.reason), (Failed, Some(JobReason::TimeLimit)));
    }

    #[test]
    fn an_attempt_has_one_name() {
        let name = AttemptName { job: 12, number: 3 };
        assert_eq!(name.to_string().parse(), Ok(name));
        for other in ["w-12-3", "j-12", "j-12-", "j-+12-3", "j-012-3", "j-12-3-4", "j--12-3", "", "j-12-99999999999"] {
            assert_eq!(other.parse::<AttemptName>(), Err(NotAnAttempt), "{other}");
        }
    }
}
