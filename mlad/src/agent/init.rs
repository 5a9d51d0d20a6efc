//! Process 1: starts the agent proper, reaps orphans, passes SIGTERM on, and ends when the agent ends.
//!
//! A process of its own because reaping "any child" and waiting for a particular one do not go together in
//! one process: whoever reaps first takes the other's exit status. The agent proper waits for the processes
//! it started; their orphans come here.

use super::{AgentError, limits};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use std::{
    ffi::OsString,
    io,
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode},
};
use tokio::signal::unix::{SignalKind, signal};

/// Tells the agent proper that its parent is process 1 of a PID namespace: whatever runs there is the container's.
pub(super) const IN_CONTAINER: &str = "--in-container";

/// Runs until the agent has ended; returns its exit code.
pub(super) fn run(arguments: &[OsString]) -> Result<ExitCode, AgentError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .and_then(|runtime| runtime.block_on(supervise(arguments)))
        .map_err(AgentError::system("process 1 failed"))
}

async fn supervise(arguments: &[OsString]) -> io::Result<ExitCode> {
    forget_ignored_signals();
    if rustix::process::getpid() != Pid::INIT {
        // Outside a PID namespace of its own, orphans come here all the same.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    }
    let mut children = signal(SignalKind::child())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let agent = start(arguments)?;
    let mut ending = false;
    loop {
        tokio::select! {
            _ = children.recv() => {}
            _ = terminate.recv() => ending = true,
            _ = interrupt.recv() => ending = true,
        }
        if ending {
            // Once more with every signal does no harm, and it is gone if there is no such process.
            let _ = rustix::process::kill_process(agent, Signal::TERM);
        }
        if let Some(status) = reap(agent).status {
            if ending {
                let _ = tokio::time::timeout(limits::GRACE, reap_all(&mut children, agent)).await;
            }
            // What is left of the container now ends with process 1, by the kernel's hand.
            return Ok(exit_code(status));
        }
    }
}

fn start(arguments: &[OsString]) -> io::Result<Pid> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("mlad").args(["agent", "serve"]);
    if rustix::process::getpid() == Pid::INIT {
        command.arg(IN_CONTAINER);
    }
    let explain =
        |error| io::Error::other(format!("cannot start the agent from /proc/self/exe (is /proc there?): {error}"));
    let child = command.args(arguments).spawn().map_err(explain)?;
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

struct Reaped {
    /// The agent's status, if it was among them.
    status: Option<WaitStatus>,
    /// Whether any child is left.
    more: bool,
}

/// Reaps all that have ended.
fn reap(agent: Pid) -> Reaped {
    let mut status = None;
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, ended))) if pid == agent => status = Some(ended),
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) => return Reaped { status, more: true },
            Err(_) => return Reaped { status, more: false },
        }
    }
}

/// Waits until there is no child any more: they have all been told to end.
async fn reap_all(children: &mut tokio::signal::unix::Signal, agent: Pid) {
    while reap(agent).more && children.recv().await.is_some() {}
}

fn exit_code(status: WaitStatus) -> ExitCode {
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// An ignored signal stays ignored through exec, a handled one does not: a handler for each that is ignored
/// now gives every process of the container the default, as if from a login.
fn forget_ignored_signals() {
    let ignored = std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| ignored_signals(&status))
        .unwrap_or_default();
    for number in (1..=31).filter(|number| ignored & (1 << (number - 1)) != 0) {
        // Not all can be handled (SIGKILL, SIGSEGV); those are never inherited as ignored in practice.
        let _ = signal(SignalKind::from_raw(number));
    }
}

fn ignored_signals(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_status() {
        assert_eq!(ignored_signals("Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\t0\n"), Some(0x1001));
        assert_eq!(ignored_signals("Name:\tx\n"), None);
    }
}
