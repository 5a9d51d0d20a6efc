//! The process side: `mlad-gateway worker JAIL TASK…`, started as root by the gateway, confined before it
//! reads the first byte from the user. One thread, no runtime.
//!
//! * `sftp` — the file transfer protocol on standard input and output.
//! * `scp ARGUMENTS` — the old protocol of scp.
//! * `mlad BINARY SOCKET ARGUMENTS` — becomes `mlad`.

mod confine;
mod names;
mod output;
mod scp;
mod sftp;

use super::Jail;
use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::{ffi::OsStringExt as _, process::CommandExt as _},
    path::Path,
    process::{Command, ExitCode},
};

/// Why a worker ends before its time. It is written on standard error, for the person.
#[derive(Debug, thiserror::Error)]
enum WorkerError {
    /// Started with other arguments than the gateway gives.
    #[error("the worker is started by the gateway only: {0}")]
    Usage(String),
    /// It could not be confined, so it did not begin.
    #[error("the server cannot confine this session: {step}: {source}; please tell the administrator")]
    Confine {
        /// What failed.
        step: String,
        /// Why.
        source: io::Error,
    },
    /// The connection to the gateway failed.
    #[error("the connection: {0}")]
    Connection(#[from] io::Error),
    /// The command asks for more than a worker holds in its memory.
    #[error("{0}")]
    Bound(String),
    /// The client does not speak the protocol.
    #[error("the client does not speak the protocol: {0}")]
    Protocol(String),
}

/// The whole life of a worker; `arguments` are those after `worker`. Must be called before any other thread
/// is started.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match run(&mut arguments.into_iter()) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            output::complain(format!("mlad: {error}").as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &mut dyn Iterator<Item = OsString>) -> Result<u8, WorkerError> {
    let mut next = |what: &str| arguments.next().ok_or_else(|| WorkerError::Usage(format!("{what} is missing")));
    let jail = next("the jail")?.into_string().map_err(|_| WorkerError::Usage("the jail is not UTF-8".into()))?;
    let jail: Jail = serde_json::from_str(&jail).map_err(|error| WorkerError::Usage(error.to_string()))?;
    let task = next("the task")?;
    match task.to_str() {
        Some("sftp") => {
            let names = names::Names::new(&jail);
            confine::confine(&jail, None)?;
            sftp::serve(&jail, &names)?;
            Ok(0)
        }
        Some("scp") => {
            confine::confine(&jail, None)?;
            let words: Vec<Vec<u8>> = arguments.map(OsString::into_vec).collect();
            scp::serve(&jail, &words)
        }
        Some("mlad") => {
            let (binary, socket) = (next("the binary")?, next("the socket")?);
            let program = confine::Program { binary: Path::new(&binary), socket: Path::new(&socket) };
            confine::confine(&jail, Some(&program))?;
            Err(become_mlad(&jail, arguments))
        }
        _ => Err(WorkerError::Usage(format!("there is no task {}", task.display()))),
    }
}

fn become_mlad(jail: &Jail, arguments: &mut dyn Iterator<Item = OsString>) -> WorkerError {
    let source = Command::new(confine::PROGRAM)
        .arg0(OsStr::new("mlad"))
        .args(arguments)
        .env("HOME", jail.virtual_home())
        .env("USER", &jail.user)
        .exec();
    WorkerError::Confine { step: "run mlad".into(), source }
}
