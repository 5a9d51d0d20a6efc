//! What a person is greeted with: at most 12 lines of at most 80 columns. Pure.

use super::{text, width::fit};
use mlad::api::{Lease, Quota, Workspace};

/// Widest a line gets, however wide the terminal is.
const MAX_COLUMNS: usize = 80;

/// What the greeting tells of the queue and the quota, where the allocator said it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Situation {
    pub(super) quota: Quota,
    pub(super) waiting: usize,
}

impl Situation {
    pub(super) fn new(limits: &Quota, user: &str, leases: &[Lease], waiting: usize) -> Self {
        let held = leases.iter().filter(|lease| lease.user == user);
        let mut quota = Quota { slices_used: 0, gpu_memory_mib_used: 0, ..limits.clone() };
        for lease in held {
            let slices = u32::try_from(lease.uuids.len()).unwrap_or(u32::MAX);
            quota.slices_used = quota.slices_used.saturating_add(slices);
            let memory = lease.memory_mib.saturating_mul(u64::from(slices));
            quota.gpu_memory_mib_used = quota.gpu_memory_mib_used.saturating_add(memory);
        }
        Self { quota, waiting }
    }
}

/// The lines.
pub(super) fn greeting(
    workspace: &Workspace,
    last_end: Option<&str>,
    situation: Option<&Situation>,
    idle_minutes: u64,
    columns: usize,
) -> Vec<String> {
    let mut lines = vec![text::title(&workspace.user, &workspace.name, &workspace.image)];
    if let Some(lease) = &workspace.lease {
        let uuid = lease.uuids.first().map(String::as_str);
        lines.push(text::slice(&lease.profile, lease.memory_mib, uuid));
    }
    lines.extend(workspace.project.as_deref().map(text::project));
    lines.extend(last_end.map(text::last_end));
    if let Some(situation) = situation {
        lines.push(text::quota(&situation.quota));
        lines.push(text::queue(situation.waiting));
    }
    lines.push(text::idle(idle_minutes));
    lines.push(text::HELP.to_owned());
    let columns = columns.min(MAX_COLUMNS);
    lines.iter().map(|line| fit(line, columns)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::login::width::width;
    use jiff::Timestamp;
    use mlad::api::{Need, WorkspaceState};
    use proptest::prelude::*;

    fn lease(user: &str, uuids: &[&str]) -> Lease {
        Lease {
            workload: "w-1-1".into(),
            user: user.into(),
            fence: 7,
            node: "here".into(),
            need: Need::Profile("2g.10gb".into()),
            profile: if uuids.is_empty() { "cpu".into() } else { "2g.10gb".into() },
            uuids: uuids.iter().map(|uuid| (*uuid).to_owned()).collect(),
            memory_mib: if uuids.is_empty() { 0 } else { 9856 },
            slices: Vec::new(),
            project: None,
            priority: 0,
            preemptible: false,
            expected_end: None,
            ending: None,
            trouble: None,
            granted_at: Timestamp::UNIX_EPOCH,
            expires_at: Timestamp::UNIX_EPOCH,
            over: None,
        }
    }

    fn workspace(lease: Lease) -> Workspace {
        Workspace {
            name: "default".into(),
            user: "alice".into(),
            state: WorkspaceState::Running,
            detail: None,
            image: "pytorch".into(),
            need: lease.need.clone(),
            project: None,
            lease: Some(lease),
            wait: None,
            connections: 1,
            idle_deadline: None,
            created_at: Timestamp::UNIX_EPOCH,
            started_at: Some(Timestamp::UNIX_EPOCH),
        }
    }

    #[test]
    fn it_looks_like_this() {
        let mine = lease("alice", &["MIG-1f2e3d4c-0000-1111-2222-0123456789ab"]);
        let leases = [mine.clone(), lease("alice", &[]), lease("bob", &["MIG-2"])];
        let limits = Quota { slices: Some(2), gpu_memory_mib: Some(20480), ..Quota::default() };
        let situation = Situation::new(&limits, "alice", &leases, 16);
        let mine = Workspace { project: Some("vision".into()), ..workspace(mine) };
        assert_eq!(
            greeting(&mine, Some("its lease is over: it gave way"), Some(&situation), 30, 132),
            [
                "MLAD: alice, workspace default, image pytorch",
                "GPU    2g.10gb, 9856 MiB, UUID …0123456789ab",
                "For    project vision",
                "Last   ended: its lease is over: it gave way",
                "Quota  1 of 2 slices, 9856 of 20480 MiB of GPU memory in use",
                "Queue  16 requests wait for slices",
                "Idle   stops 30 minutes after the last connection (`mlad workspace extend`)",
                "Help   `mlad help`; your files are in your home and stay",
            ]
        );
    }

    #[test]
    fn without_a_slice_quota_or_allocator_it_says_so_or_nothing() {
        let situation = Situation::new(&Quota::default(), "alice", &[], 0);
        assert_eq!(
            greeting(&workspace(lease("alice", &[])), None, Some(&situation), 0, 80)[1..5],
            [
                "GPU    none (log in with MLAD_GPU=1g.5gb or another slice to get one)",
                "Quota  0 slices, 0 MiB of GPU memory in use",
                "Queue  nobody waits for a slice",
                "Idle   stops with the last connection (`mlad workspace extend`)",
            ]
        );
        assert_eq!(greeting(&workspace(lease("alice", &[])), None, None, 1, 80).len(), 4);
    }

    proptest! {
        #[test]
        fn it_is_never_too_long_or_too_wide_and_nothing_a_terminal_obeys_gets_through(
            image in "(?s).{0,80}",
            uuid in "(?s).{0,80}",
            columns in 1usize..200,
            waiting: usize,
            minutes: u64,
        ) {
            let mut workspace = workspace(lease("alice", &[&uuid]));
            workspace.image = image.clone();
            let situation = Situation::new(&Quota::default(), "alice", &[], waiting);
            let lines = greeting(&workspace, Some(&image), Some(&situation), minutes, columns);
            prop_assert!(lines.len() <= 12);
            for line in lines {
                prop_assert!(width(&line) <= columns.min(80), "{line:?}");
                prop_assert!(!line.chars().any(char::is_control), "{line:?}");
            }
        }
    }
}
