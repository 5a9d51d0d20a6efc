//! The launcher: the first step of every process of the user. It is started with the user's ids, makes a session of
//! its own, takes the controlling terminal, goes to the working folder, and becomes the program.
//!
//! A step of its own because between fork and exec nothing safe can be done, while after exec everything can.
//! Nothing here has rights: what the user's environment does to it, it does to the user.

use super::account::User;
use rustix::fs::{Mode, OFlags};
use std::{
    ffi::OsString,
    fs::File,
    io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Exit code of a command that was not found, as in every shell.
const NOT_FOUND: u8 = 127;
/// Exit code of a command that could not be started for another reason.
const CANNOT_START: u8 = 126;

/// What is to be started, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Launch {
    /// Standard input is a terminal, and is to be the controlling one.
    pub(super) terminal: bool,
    /// Where it starts.
    pub(super) directory: Directory,
    /// Where the output of a job goes.
    pub(super) job: Option<JobFiles>,
    /// The program: a path, or a name to be found in `PATH`.
    pub(super) program: OsString,
    /// Its arguments, the zeroth included.
    pub(super) arguments: Vec<OsString>,
}

/// Where a program starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Directory {
    /// The home; a session starts in `/` if it is not there.
    Home(PathBuf),
    /// This one; a job does not start elsewhere.
    Exactly(PathBuf),
}

/// What a job writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct JobFiles {
    /// Takes standard output and standard error.
    pub(super) log: PathBuf,
    /// Folder for what it wants to keep.
    pub(super) artifacts: PathBuf,
}

impl Launch {
    /// The command that starts the launcher as this user, with nothing but this environment.
    pub(super) fn command(&self, user: &User, environment: Vec<(OsString, OsString)>) -> tokio::process::Command {
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command.args(["agent", "launch"]).args(self.to_arguments()).env_clear().envs(environment);
        if rustix::process::geteuid().is_root() {
            // This also clears the supplementary groups, and with the uid go all capabilities.
            command.gid(user.gid).uid(user.uid);
        }
        command
    }

    fn to_arguments(&self) -> Vec<OsString> {
        let mut arguments = Vec::new();
        if self.terminal {
            arguments.push("--terminal".into());
        }
        match &self.directory {
            Directory::Home(path) => arguments.extend(["--home".into(), path.into()]),
            Directory::Exactly(path) => arguments.extend(["--directory".into(), path.into()]),
        }
        if let Some(JobFiles { log, artifacts }) = &self.job {
            arguments.extend(["--job".into(), log.into(), artifacts.into()]);
        }
        arguments.extend(["--".into(), self.program.clone()]);
        arguments.extend(self.arguments.iter().cloned());
        arguments
    }

    fn from_arguments(mut arguments: impl Iterator<Item = OsString>) -> Option<Self> {
        let (mut terminal, mut directory, mut job) = (false, Directory::Home("/".into()), None);
        loop {
            match arguments.next()?.to_str()? {
                "--terminal" => terminal = true,
                "--home" => directory = Directory::Home(arguments.next()?.into()),
                "--directory" => directory = Directory::Exactly(arguments.next()?.into()),
                "--job" => {
                    job = Some(JobFiles { log: arguments.next()?.into(), artifacts: arguments.next()?.into() });
                }
                "--" => break,
                _ => return None,
            }
        }
        Some(Self { terminal, directory, job, program: arguments.next()?, arguments: arguments.collect() })
    }
}

/// Becomes the program; returns only if that fails, after a line on standard error or in the job's log.
pub(super) fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(launch) = Launch::from_arguments(arguments) else {
        eprintln!("mlad agent launch: started wrongly; only the agent starts it");
        return ExitCode::from(CANNOT_START);
    };
    let (code, message) = match launch.job.clone() {
        None => launch.become_program(None),
        Some(files) => match open_log(&files.log) {
            Ok(log) => {
                let (code, message) = launch.become_job(&files, &log);
                let _ = io::Write::write_all(&mut &log, format!("mlad: {message}\n").as_bytes());
                (code, format!("{message} (also in {})", files.log.display()))
            }
            Err(error) => (CANNOT_START, format!("cannot make the log {}: {error}", files.log.display())),
        },
    };
    eprintln!("mlad: {message}");
    ExitCode::from(code)
}

/// What kept a program from being started: an exit code and a line for a person.
type Failure = (u8, String);

impl Launch {
    fn become_job(&self, files: &JobFiles, log: &File) -> Failure {
        if let Err(error) = std::fs::create_dir_all(&files.artifacts) {
            let path = files.artifacts.display();
            return (CANNOT_START, format!("cannot make the folder of the artifacts {path}: {error}"));
        }
        self.become_program(Some(log))
    }

    fn become_program(&self, output: Option<&File>) -> Failure {
        match self.prepare(output) {
            Ok(mut command) => self.explain(&command.exec()),
            Err((what, error)) => (CANNOT_START, format!("{what}: {error}")),
        }
    }

    fn prepare(&self, output: Option<&File>) -> Result<std::process::Command, (String, io::Error)> {
        rustix::process::umask(Mode::WGRP | Mode::WOTH);
        rustix::process::setsid().map_err(|error| ("cannot make a session".to_owned(), error.into()))?;
        if self.terminal {
            rustix::process::ioctl_tiocsctty(std::io::stdin())
                .map_err(|error| ("cannot take the terminal".to_owned(), error.into()))?;
        }
        self.enter_directory()?;
        let mut command = std::process::Command::new(&self.program);
        if let Some((zeroth, rest)) = self.arguments.split_first() {
            command.arg0(zeroth).args(rest);
        }
        if let Some(log) = output {
            let log = |_| log.try_clone().map_err(|error| ("cannot use the log".to_owned(), error));
            command.stdout(log(())?).stderr(log(())?);
        }
        Ok(command)
    }

    fn enter_directory(&self) -> Result<(), (String, io::Error)> {
        let (path, required) = match &self.directory {
            Directory::Home(path) => (path, false),
            Directory::Exactly(path) => (path, true),
        };
        match std::env::set_current_dir(path) {
            Ok(()) => Ok(()),
            Err(error) if required => Err((format!("cannot start in {}", path.display()), error)),
            Err(error) => {
                eprintln!("mlad: cannot go to the home {}: {error}; starting in /", path.display());
                std::env::set_current_dir("/").map_err(|error| ("cannot start in /".to_owned(), error))
            }
        }
    }

    fn explain(&self, error: &io::Error) -> Failure {
        let program = self.program.to_string_lossy();
        match error.kind() {
            io::ErrorKind::NotFound if program.contains('/') => (NOT_FOUND, format!("{program}: no such file")),
            io::ErrorKind::NotFound => (NOT_FOUND, format!("{program}: command not found")),
            _ => (CANNOT_START, format!("cannot start {program}: {error}")),
        }
    }
}

/// Opens the log for appending. It must be a regular file, and not by way of a symbolic link: the gateway,
/// who reads it, follows none. Not to block on a FIFO somebody put there.
pub(super) fn open_log(path: &Path) -> io::Result<File> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let log = File::from(rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))?);
    if !log.metadata()?.is_file() {
        return Err(io::Error::other("it is there and no regular file"));
    }
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt as _;

    #[test]
    fn a_launch_survives_its_arguments() {
        let session = Launch {
            terminal: true,
            directory: Directory::Home("/home/kim".into()),
            job: None,
            program: "/bin/bash".into(),
            arguments: vec!["-bash".into()],
        };
        let job = Launch {
            terminal: false,
            directory: Directory::Exactly("--".into()),
            job: Some(JobFiles { log: "--terminal".into(), artifacts: "a b".into() }),
            program: "python3".into(),
            arguments: vec!["python3".into(), "--".into(), OsString::from_vec(vec![0xff, b'\n'])],
        };
        for launch in [session, job] {
            assert_eq!(Launch::from_arguments(launch.to_arguments().into_iter()), Some(launch));
        }
        assert_eq!(Launch::from_arguments(["--other".into()].into_iter()), None);
        assert_eq!(Launch::from_arguments(["--".into()].into_iter()), None);
    }
}
