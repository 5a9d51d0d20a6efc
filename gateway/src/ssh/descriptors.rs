//! File descriptors: the server's limit, and what the settings need.

use crate::config;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors of a session: the agent's connection and three pipes, of which both ends are ours while it starts;
/// and its connection's socket.
const PER_SESSION: u64 = 8;
/// Descriptors of everything else: databases, engine, API, workers.
const REST: u64 = 1024;

/// Raises the limit of this process to what its system allows (`LimitNOFILE=` under systemd), and warns if that is
/// too little for the settings. The soft limit is 1024 nearly everywhere, for the sake of programs with `select`.
pub fn raise_descriptor_limit(settings: &config::Ssh) {
    let before = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: before.maximum, maximum: before.maximum };
    let limit = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => before.maximum,
        Err(error) => {
            tracing::warn!(%error, "the limit of file descriptors cannot be raised");
            before.current
        }
    };
    let needed = needed(settings);
    match limit {
        Some(limit) if limit < needed => tracing::warn!(
            limit,
            needed,
            "the limit of file descriptors is too low for ssh.max_connections and ssh.max_channels_per_user: \
             people may be refused before; raise it (`LimitNOFILE=` of the systemd unit), or lower the settings"
        ),
        limit => tracing::debug!(?limit, needed, "file descriptors"),
    }
}

/// Enough for a session on every connection, and for one user with all the channels they may have.
fn needed(settings: &config::Ssh) -> u64 {
    let sessions = settings.max_connections.saturating_add(settings.max_channels_per_user);
    u64::try_from(sessions).unwrap_or(u64::MAX).saturating_mul(PER_SESSION).saturating_add(REST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_settings_fit_the_hard_limit_that_systemd_gives() {
        let needed = needed(&config::Ssh::default());
        assert!((10_000..100_000).contains(&needed), "{needed}");
    }
}
