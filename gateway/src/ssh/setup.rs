//! What a client asks for on a session channel before it starts something: terminal, environment, key agent.

use bytes::{BufMut as _, Bytes, BytesMut};
use mlad::channel::{PtySize, Request};
use russh::Pty;

/// Variables of one session; as many as the agent takes.
const MAX_VARIABLES: usize = 200;
/// Bytes of all variables of one session together.
const MAX_ENVIRONMENT: usize = 96 * 1024;
/// Longest `TERM`, in bytes.
const MAX_TERM: usize = 128;

/// What was asked for so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Setup {
    /// The terminal.
    pub(super) terminal: Option<TerminalRequest>,
    /// Variables in their order; a later one of the same name wins.
    pub(super) environment: Vec<(String, String)>,
    /// Whether the client's key agent is to be reached.
    pub(super) key_agent: bool,
}

/// A terminal, as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TerminalRequest {
    /// Its kind.
    pub(super) term: String,
    /// Its size.
    pub(super) size: PtySize,
    /// Its modes, encoded (RFC 4254 section 8).
    pub(super) modes: Bytes,
}

/// What is to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Start {
    /// The login shell.
    Shell,
    /// A command, as the client sent it.
    Exec(Bytes),
    /// A subsystem.
    Subsystem(String),
}

impl Setup {
    /// Takes a terminal; false if there is one already or its kind is absurd.
    pub(super) fn set_terminal(&mut self, term: &str, size: PtySize, modes: &[(Pty, u32)]) -> bool {
        if self.terminal.is_some() || term.len() > MAX_TERM || term.contains('\0') {
            return false;
        }
        self.terminal = Some(TerminalRequest { term: term.into(), size, modes: encode_modes(modes) });
        true
    }

    /// Takes a variable; false if its name is none, or it is too much.
    pub(super) fn set_variable(&mut self, name: &str, value: &str) -> bool {
        let bytes: usize = self.environment.iter().map(|(name, value)| name.len() + value.len()).sum();
        let fits = self.environment.len() < MAX_VARIABLES && bytes + name.len() + value.len() <= MAX_ENVIRONMENT;
        let taken = fits && is_variable_name(name) && !value.contains('\0');
        if taken {
            self.environment.push((name.into(), value.into()));
        }
        taken
    }

    /// The value of a variable.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        self.environment.iter().rev().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    /// The variables, with the terminal's kind among them.
    pub(super) fn environment_with_term(&self) -> Vec<(String, String)> {
        let term = self.terminal.as_ref().map(|terminal| ("TERM".to_owned(), terminal.term.clone()));
        self.environment.iter().cloned().chain(term).collect()
    }

    /// What the agent is to be asked for, the start last.
    pub(super) fn requests(self, start: Start) -> Vec<Request> {
        let terminal = self.terminal.map(|TerminalRequest { term, size, modes }| Request::Pty { term, size, modes });
        let variables = self.environment.into_iter().map(|(name, value)| Request::Env { name, value: value.into() });
        let key_agent = self.key_agent.then_some(Request::AgentForwarding);
        terminal.into_iter().chain(variables).chain(key_agent).chain([start.into()]).collect()
    }
}

impl From<Start> for Request {
    fn from(start: Start) -> Self {
        match start {
            Start::Shell => Self::Shell,
            Start::Exec(command) => Self::Exec { command },
            Start::Subsystem(name) => Self::Subsystem { name },
        }
    }
}

/// Back into the bytes they came from. russh leaves an end mark where a mode is unknown to it.
fn encode_modes(modes: &[(Pty, u32)]) -> Bytes {
    let mut bytes = BytesMut::new();
    for (mode, value) in modes.iter().filter(|(mode, _)| *mode != Pty::TTY_OP_END) {
        bytes.put_u8(*mode as u8);
        bytes.put_u32(*value);
    }
    bytes.put_u8(Pty::TTY_OP_END as u8);
    bytes.freeze()
}

fn is_variable_name(name: &str) -> bool {
    name.bytes()
        .enumerate()
        .all(|(index, byte)| byte == b'_' || byte.is_ascii_alphabetic() || (index > 0 && byte.is_ascii_digit()))
        && !name.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_replayed_in_order_with_the_start_last() {
        let mut setup = Setup::default();
        assert!(setup.set_terminal("xterm", PtySize { columns: 80, ..PtySize::default() }, &[(Pty::ECHO, 1)]));
        assert!(!setup.set_terminal("xterm", PtySize::default(), &[]));
        assert!(setup.set_variable("LANG", "C") && setup.set_variable("LANG", "ko_KR.UTF-8"));
        setup.key_agent = true;
        assert_eq!(setup.variable("LANG"), Some("ko_KR.UTF-8"));
        let requests = setup.requests(Start::Exec(Bytes::from_static(b"true")));
        assert!(matches!(&requests[0], Request::Pty { modes, .. } if modes[..] == [53, 0, 0, 0, 1, 0]));
        assert!(matches!(&requests[1], Request::Env { value, .. } if value == "C"));
        assert_eq!(requests[3], Request::AgentForwarding);
        assert_eq!(requests[4], Request::Exec { command: Bytes::from_static(b"true") });
    }

    #[test]
    fn variables_are_checked_and_bounded() {
        let mut setup = Setup::default();
        for bad in ["", "1A", "A B", "A=B", "Å", "A-B"] {
            assert!(!setup.set_variable(bad, ""), "{bad}");
        }
        assert!(!setup.set_variable("A", "\0"));
        assert!(!setup.set_variable("A", &"x".repeat(MAX_ENVIRONMENT)));
        for index in 0..MAX_VARIABLES {
            assert!(setup.set_variable(&format!("A{index}"), ""));
        }
        assert!(!setup.set_variable("B", ""));
    }

    #[test]
    fn modes_unknown_to_russh_do_not_cut_off_those_after_them() {
        assert_eq!(encode_modes(&[(Pty::TTY_OP_END, 0), (Pty::ICRNL, 7)])[..], [36, 0, 0, 0, 7, 0]);
    }
}
