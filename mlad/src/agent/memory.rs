//! Whether the kernel killed something in this container for want of memory: SIGKILL alone does not say.

use std::path::Path;

/// The container's own control group: version 2, then version 1.
const GROUPS: [Group; 2] = [
    Group { events: "/sys/fs/cgroup/memory.events", limit: "/sys/fs/cgroup/memory.max" },
    Group { events: "/sys/fs/cgroup/memory/memory.oom_control", limit: "/sys/fs/cgroup/memory/memory.limit_in_bytes" },
];
/// Above this a limit is none: version 1 writes a number near the largest.
const NO_LIMIT: u64 = 1 << 60;

struct Group {
    events: &'static str,
    limit: &'static str,
}

/// How many processes had been killed for want of memory when something began.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kills(Option<u64>);

impl Kills {
    pub(super) fn now() -> Self {
        Self(GROUPS.iter().find_map(|group| kills(&read(group.events)?)))
    }

    /// A line for a person, if there have been more since then.
    pub(super) fn since(self) -> Option<String> {
        let more = Self::now().0? > self.0?;
        let limit = GROUPS.iter().find_map(|group| limit(&read(group.limit)?));
        more.then(|| match limit {
            Some(bytes) => format!("out of memory: the container may use {} MiB; ask for more", bytes >> 20),
            None => "out of memory: the machine has none left".to_owned(),
        })
    }
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

fn kills(events: &str) -> Option<u64> {
    events.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}

fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|bytes| *bytes < NO_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_read() {
        assert_eq!(kills("low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\noom_group_kill 0\n"), Some(1));
        assert_eq!(kills("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), Some(3));
        assert_eq!(kills("oom_kill_disable 0\nunder_oom 0\n"), None, "an old kernel does not count");
        assert_eq!(limit("1073741824\n"), Some(1 << 30));
        assert_eq!(limit("max\n"), None);
        assert_eq!(limit("9223372036854771712\n"), None);
    }
}
