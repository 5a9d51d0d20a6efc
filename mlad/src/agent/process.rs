//! A process of the user and its warden: the one task that waits for it and signals it, so that a signal never
//! goes to a process id that has become somebody else's.

use super::memory::Kills;
use crate::channel::Exit;
use rustix::process::{Pid, Signal};
use std::{io, os::unix::process::ExitStatusExt as _, process::ExitStatus};
use tokio::{
    process::Child,
    sync::{mpsc, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Signals on their way to one process.
const SIGNALS: usize = 16;

/// The stages of the agent's end.
#[derive(Debug, Clone, Default)]
pub(super) struct Ending {
    /// Processes are told to end; nothing new begins.
    pub(super) hang_up: CancellationToken,
    /// Processes get SIGKILL.
    pub(super) kill: CancellationToken,
    /// Connections are closed.
    pub(super) close: CancellationToken,
}

/// A running process, by its warden.
#[derive(Debug, Clone)]
pub(super) struct Process {
    signals: mpsc::Sender<Signal>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Process {
    /// Puts a child that leads its session under a warden. `farewell` tells it that the container ends.
    pub(super) fn guard(child: Child, farewell: Signal, ending: Ending, tasks: &TaskTracker) -> io::Result<Self> {
        let leader = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let leader = leader.ok_or_else(|| io::Error::other("the process has no id"))?;
        let kills = Kills::now();
        let (signals, received) = mpsc::channel(SIGNALS);
        let (sender, exit) = watch::channel(None);
        tasks.spawn(async move {
            let ended = with_reason(ward(child, leader, received, farewell, ending).await, kills);
            sender.send_replace(Some(ended));
        });
        Ok(Self { signals, exit })
    }

    /// Signals the process group. Nothing happens if the leader has ended, or if too many are on their way.
    pub(super) fn signal(&self, signal: Signal) {
        let _ = self.signals.try_send(signal);
    }

    /// How it ended, once it has. Cancel-safe.
    pub(super) async fn exit(&mut self) -> Exit {
        match self.exit.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(exit)) => exit.clone(),
            _ => Exit::Status(255),
        }
    }
}

async fn ward(
    mut child: Child,
    leader: Pid,
    mut signals: mpsc::Receiver<Signal>,
    farewell: Signal,
    ending: Ending,
) -> Exit {
    let (mut hung_up, mut killed) = (false, false);
    loop {
        tokio::select! {
            biased;
            status = child.wait() => return status.map_or(Exit::Status(255), exit_of),
            Some(signal) = signals.recv() => send(leader, signal),
            () = ending.hang_up.cancelled(), if !hung_up => {
                hung_up = true;
                [farewell, Signal::CONT].into_iter().for_each(|signal| send(leader, signal));
            }
            () = ending.kill.cancelled(), if !killed => {
                killed = true;
                send(leader, Signal::KILL);
            }
        }
    }
}

/// Says why, where a process was killed for want of memory.
fn with_reason(exit: Exit, kills: Kills) -> Exit {
    match exit {
        Exit::Signal { name, core_dumped, message } if name == "KILL" => {
            Exit::Signal { name, core_dumped, message: kills.since().unwrap_or(message) }
        }
        exit => exit,
    }
}

/// To the group; to the leader alone while it is too young to have one.
fn send(leader: Pid, signal: Signal) {
    if rustix::process::kill_process_group(leader, signal).is_err() {
        let _ = rustix::process::kill_process(leader, signal);
    }
}

/// What the protocol says of an exit status.
fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Status(u32::try_from(code).unwrap_or(255)),
        (None, Some(number)) => {
            Exit::Signal { name: name_of(number), core_dumped: status.core_dumped(), message: String::new() }
        }
        (None, None) => Exit::Status(255),
    }
}

const NAMES: [(&str, Signal); 12] = [
    ("ABRT", Signal::ABORT),
    ("ALRM", Signal::ALARM),
    ("FPE", Signal::FPE),
    ("HUP", Signal::HUP),
    ("INT", Signal::INT),
    ("KILL", Signal::KILL),
    ("PIPE", Signal::PIPE),
    ("QUIT", Signal::QUIT),
    ("SEGV", Signal::SEGV),
    ("TERM", Signal::TERM),
    ("USR1", Signal::USR1),
    ("USR2", Signal::USR2),
];

/// The signal of a name of RFC 4254 section 6.9.
pub(super) fn signal_of(name: &str) -> Option<Signal> {
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, signal)| *signal)
}

/// The name RFC 4254 section 6.10 has for a signal, or as OpenSSH says it otherwise.
fn name_of(number: i32) -> String {
    let known = NAMES.iter().find(|(_, signal)| signal.as_raw() == number);
    known.map_or_else(|| format!("SIG{number}@openssh.com"), |(name, _)| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_signals_agree() {
        assert_eq!(signal_of("TERM"), Some(Signal::TERM));
        assert_eq!(signal_of("STOP"), None);
        assert_eq!(name_of(9), "KILL");
        assert_eq!(name_of(31), "SIG31@openssh.com");
    }

    #[test]
    fn exits_are_told_apart() {
        assert_eq!(exit_of(ExitStatus::from_raw(7 << 8)), Exit::Status(7));
        let dumped = Exit::Signal { name: "ABRT".into(), core_dumped: true, message: String::new() };
        assert_eq!(exit_of(ExitStatus::from_raw(6 | 0x80)), dumped);
    }
}
