//! What of the settings can change while the gateway runs.

use super::{Config, Ssh};

impl Config {
    /// These settings with what `new` changes of them that can change now (all of `ssh` but its listeners and the
    /// tries with enrolment codes); and the keys and sections that differ and hold from the next start only.
    pub fn reloaded(&self, new: Self) -> (Self, Vec<&'static str>) {
        let now = Self {
            ssh: Ssh {
                listen: self.ssh.listen.clone(),
                enrolment_tries_per_minute: self.ssh.enrolment_tries_per_minute,
                ..new.ssh.clone()
            },
            ..self.clone()
        };
        let differing = [
            ("data_directory", self.data_directory != new.data_directory),
            ("run_directory", self.run_directory != new.run_directory),
            ("instance", self.instance != new.instance),
            ("agent_binary", self.agent_binary != new.agent_binary),
            ("catalog", self.catalog != new.catalog),
            ("ssh.listen", self.ssh.listen != new.ssh.listen),
            (
                "ssh.enrolment_tries_per_minute",
                self.ssh.enrolment_tries_per_minute != new.ssh.enrolment_tries_per_minute,
            ),
            ("api", self.api != new.api),
            ("workspace", self.workspace != new.workspace),
            ("job", self.job != new.job),
            ("container", self.container != new.container),
            ("docker", self.docker != new.docker),
            ("files", self.files != new.files),
            ("allocator", self.allocator != new.allocator),
        ];
        let later = differing.into_iter().filter_map(|(key, differs)| differs.then_some(key)).collect();
        (now, later)
    }
}
