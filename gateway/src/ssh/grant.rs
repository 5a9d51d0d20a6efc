//! What a login may do: everything, unless its certificate or a policy says otherwise.

use super::setup::{Setup, Start};
use bytes::Bytes;
use mlad::api::Forwarding;

/// The forced command that is the file service, as sshd knows it.
const INTERNAL_SFTP: &str = "internal-sftp";
/// Longest command of a client that a forced one is told of, in bytes: an environment variable holds it.
const MAX_ORIGINAL: usize = 64 * 1024;
/// Variables that a client may set all the same where a command is forced: others (`LD_PRELOAD`, `BASH_ENV`, …)
/// would make it do something else.
const HARMLESS: [&str; 6] = ["LANG", "LANGUAGE", "COLORTERM", "MLAD_IMAGE", "MLAD_GPU", "MLAD_PROJECT"];

/// What a login may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Grant {
    /// Whether it may have a terminal.
    pub(super) terminal: bool,
    /// What it may forward.
    pub(super) forwarding: Forwarding,
    /// What is run whatever it asks for.
    pub(super) command: Option<String>,
}

impl Grant {
    /// What a key of one's own gives.
    pub(super) fn everything() -> Self {
        Self { terminal: true, forwarding: Forwarding::default(), command: None }
    }

    /// Whether a session may set this variable.
    pub(super) fn allows_variable(&self, name: &str) -> bool {
        self.command.is_none() || name.starts_with("LC_") || HARMLESS.contains(&name)
    }

    /// What is started when this is asked for; none if it cannot be. A forced command finds in
    /// `SSH_ORIGINAL_COMMAND` what it stands for.
    pub(super) fn start(&self, setup: &mut Setup, start: Start) -> Option<Start> {
        let Some(forced) = &self.command else { return Some(start) };
        let original = match start {
            Start::Shell => None,
            Start::Exec(command) => Some(command),
            Start::Subsystem(name) => Some(name.into()),
        };
        if let Some(original) = original {
            if original.len() > MAX_ORIGINAL {
                return None;
            }
            let text = String::from_utf8_lossy(&original).replace('\0', "");
            setup.environment.push(("SSH_ORIGINAL_COMMAND".into(), text));
        }
        Some(if forced == INTERNAL_SFTP {
            Start::Subsystem(super::session::SFTP.into())
        } else {
            Start::Exec(Bytes::copy_from_slice(forced.as_bytes()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forced(command: &str) -> Grant {
        Grant { command: Some(command.into()), ..Grant::everything() }
    }

    #[test]
    fn what_is_forced_is_run_and_learns_what_was_asked_for() {
        let exec = |command: &'static str| Start::Exec(Bytes::from_static(command.as_bytes()));
        let mut setup = Setup::default();
        assert_eq!(Grant::everything().start(&mut setup, exec("ls")), Some(exec("ls")));
        assert_eq!(setup, Setup::default());
        for (asked, original) in
            [(Start::Shell, None), (exec("l\0s"), Some("ls")), (Start::Subsystem("sftp".into()), Some("sftp"))]
        {
            let mut setup = Setup::default();
            assert_eq!(forced("backup").start(&mut setup, asked), Some(exec("backup")));
            assert_eq!(setup.variable("SSH_ORIGINAL_COMMAND"), original);
        }
        let sftp = Some(Start::Subsystem("sftp".into()));
        assert_eq!(forced("internal-sftp").start(&mut Setup::default(), Start::Shell), sftp);
        let long = Start::Exec(vec![b'x'; MAX_ORIGINAL + 1].into());
        assert_eq!(forced("backup").start(&mut Setup::default(), long), None);
    }

    #[test]
    fn a_forced_command_is_not_led_astray_by_variables() {
        for name in ["LD_PRELOAD", "BASH_ENV", "PATH", "SSH_ORIGINAL_COMMAND", "MLAD_API", "LC"] {
            assert!(!forced("backup").allows_variable(name) && Grant::everything().allows_variable(name), "{name}");
        }
        assert!(["LANG", "LC_ALL", "MLAD_GPU"].iter().all(|name| forced("backup").allows_variable(name)));
    }
}
