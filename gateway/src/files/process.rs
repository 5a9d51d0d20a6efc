//! Starting a worker: the gateway's own program again, as another process, with pipes.

use super::{FilesError, Jail, scp_command};
use crate::{config::Config, store::UserRecord};
use rustix::{
    pipe::fcntl_setpipe_size,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    panic::{self, AssertUnwindSafe},
    path::Path,
    process::Stdio,
    sync::{OnceLock, mpsc},
    thread,
};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};

/// The hidden subcommand of the gateway's program that is a worker.
pub const WORKER: &str = "worker";
/// Bytes a pipe to or from a worker holds (if the system's limit allows).
const PIPE_BYTES: usize = 1 << 20;
/// Bytes of a command's arguments, all together.
const MAX_ARGUMENTS: usize = 64 * 1024;
/// What of its surroundings `mlad` may be told by the client.
const ENVIRONMENT: [&str; 8] = ["TERM", "COLORTERM", "NO_COLOR", "LANG", "LC_ALL", "TZ", "COLUMNS", "LINES"];
/// Bytes of one such value.
const MAX_VALUE: usize = 256;

/// A worker and the gateway's ends of its pipes. Dropping it kills the worker.
///
/// The worker ends by itself, with an exit status, when its input ends.
#[derive(Debug)]
pub struct WorkerProcess {
    /// Its input.
    pub stdin: ChildStdin,
    /// Its output.
    pub stdout: ChildStdout,
    /// What it has to say to the person.
    pub stderr: ChildStderr,
    /// The process; killed on drop.
    pub child: Child,
}

/// A worker on a terminal. Dropping it kills the worker.
#[derive(Debug)]
pub struct TerminalProcess {
    /// The terminal's other side, non-blocking; reading fails with `EIO` when the worker is gone.
    pub terminal: OwnedFd,
    /// The process; killed on drop.
    pub child: Child,
}

/// Serves sftp (version 3, with the extensions of OpenSSH) to `user`.
///
/// Must be called in a Tokio runtime.
///
/// # Errors
/// When the process cannot be started. That it cannot confine itself shows in its standard error and status.
pub fn spawn_sftp(config: &Config, user: &UserRecord) -> Result<WorkerProcess, FilesError> {
    start(command(config, &Jail::new(config, user, Vec::new())?, [OsStr::new("sftp")])?)
}

/// Serves the old protocol of scp if `command` is `scp -t …` or `scp -f …`; `None` if it is another command,
/// or one that needs a shell.
///
/// Must be called in a Tokio runtime.
///
/// # Errors
/// When the process cannot be started or the command is too long.
pub fn spawn_scp(config: &Config, user: &UserRecord, line: &[u8]) -> Result<Option<WorkerProcess>, FilesError> {
    if line.len() > MAX_ARGUMENTS {
        return Ok(None);
    }
    let Some(words) = scp_command::parse(line) else { return Ok(None) };
    let words: Vec<OsString> = words.into_iter().map(OsString::from_vec).collect();
    let arguments = [OsString::from("scp")].into_iter().chain(words);
    start(command(config, &Jail::new(config, user, Vec::new())?, arguments)?).map(Some)
}

/// Runs `mlad` with `arguments` in the jail, with the API's socket `api_socket` at `/run/mlad/api.sock`.
/// Of `environment` only what concerns the terminal and the language is passed on.
///
/// Must be called in a Tokio runtime.
///
/// # Errors
/// When the process cannot be started or the arguments are too long.
pub fn spawn_mlad(
    config: &Config,
    user: &UserRecord,
    arguments: &[String],
    api_socket: &Path,
    environment: &[(String, String)],
) -> Result<WorkerProcess, FilesError> {
    start(mlad_command(config, user, arguments, api_socket, environment)?)
}

/// [`spawn_mlad`] on a terminal of `columns` × `rows`; it can be resized with `tcsetwinsize`.
///
/// # Errors
/// When the process cannot be started, the arguments are too long, or there is no terminal left.
pub fn spawn_mlad_on_terminal(
    config: &Config,
    user: &UserRecord,
    arguments: &[String],
    api_socket: &Path,
    environment: &[(String, String)],
    (columns, rows): (u16, u16),
) -> Result<TerminalProcess, FilesError> {
    let mut command = mlad_command(config, user, arguments, api_socket, environment)?;
    let (terminal, its_side) = open_terminal(columns, rows).map_err(FilesError::Spawn)?;
    command.stdin(its_side.try_clone().map_err(FilesError::Spawn)?);
    command.stdout(its_side.try_clone().map_err(FilesError::Spawn)?);
    command.stderr(its_side);
    let child = on_lasting_thread(move || command.spawn())?;
    Ok(TerminalProcess { terminal, child })
}

fn mlad_command(
    config: &Config,
    user: &UserRecord,
    arguments: &[String],
    api_socket: &Path,
    environment: &[(String, String)],
) -> Result<Command, FilesError> {
    let jail = Jail::new(config, user, Vec::new())?;
    let fixed = [OsStr::new("mlad"), config.agent_binary.as_os_str(), api_socket.as_os_str()];
    let mut command = command(config, &jail, fixed.into_iter().chain(arguments.iter().map(OsStr::new)))?;
    let told = environment.iter().filter(|(name, value)| {
        ENVIRONMENT.contains(&name.as_str()) && value.len() <= MAX_VALUE && !value.contains('\0')
    });
    command.envs(told.map(|(name, value)| (name, value)));
    Ok(command)
}

fn command<A: AsRef<OsStr>>(
    config: &Config,
    jail: &Jail,
    task: impl IntoIterator<Item = A>,
) -> Result<Command, FilesError> {
    // Through /proc, so that a newer program put in its place while this one runs is not taken.
    let program = config.files.worker_binary.as_deref().unwrap_or(Path::new("/proc/self/exe"));
    let description = serde_json::to_string(jail).map_err(|error| FilesError::Spawn(error.into()))?;
    let mut command = Command::new(program);
    command.arg(WORKER).arg(description);
    let mut bytes = 0;
    for argument in task {
        bytes += argument.as_ref().len();
        if bytes > MAX_ARGUMENTS || argument.as_ref().as_bytes().contains(&0) {
            return Err(FilesError::TooLong { limit: MAX_ARGUMENTS });
        }
        command.arg(argument);
    }
    command.env_clear().kill_on_drop(true);
    Ok(command)
}

fn start(mut command: Command) -> Result<WorkerProcess, FilesError> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = on_lasting_thread(move || command.spawn())?;
    let (Some(stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(FilesError::Spawn(io::ErrorKind::BrokenPipe.into()));
    };
    // Larger pipes are fewer wake-ups; without them it only goes slower.
    let _ = fcntl_setpipe_size(&stdin, PIPE_BYTES);
    let _ = fcntl_setpipe_size(&stdout, PIPE_BYTES);
    Ok(WorkerProcess { stdin, stdout, stderr, child })
}

fn open_terminal(columns: u16, rows: u16) -> io::Result<(OwnedFd, File)> {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&terminal)?;
    unlockpt(&terminal)?;
    let name = ptsname(&terminal, Vec::new())?;
    let its_side = rustix::fs::open(
        name.as_c_str(),
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&terminal, size)?;
    rustix::io::ioctl_fionbio(&terminal, true)?;
    Ok((terminal, File::from(its_side)))
}

/// Runs `spawn` on a thread that lasts as long as the program. A worker asks the kernel to be killed when its
/// parent dies, and the kernel means the thread: one of a pool would take its workers with it.
fn on_lasting_thread(spawn: impl FnOnce() -> io::Result<Child> + Send + 'static) -> Result<Child, FilesError> {
    type Task = Box<dyn FnOnce() + Send>;
    static THREAD: OnceLock<mpsc::Sender<Task>> = OnceLock::new();
    let sender = match THREAD.get() {
        Some(sender) => sender,
        None => {
            let (sender, tasks) = mpsc::channel::<Task>();
            thread::Builder::new()
                .name("workers".into())
                .spawn(move || {
                    for task in tasks {
                        // What fails for one user must not fail for all; theirs sees that no answer comes.
                        let _ = panic::catch_unwind(AssertUnwindSafe(task));
                    }
                })
                .map_err(FilesError::Spawn)?;
            // If two came here at once, the thread of the second ends with its sender.
            THREAD.get_or_init(|| sender)
        }
    };
    let runtime = tokio::runtime::Handle::try_current().map_err(|error| FilesError::Spawn(io::Error::other(error)))?;
    let (answer, answers) = mpsc::sync_channel(1);
    let task: Task = Box::new(move || {
        let _guard = runtime.enter();
        let _ = answer.send(spawn());
    });
    let gone = || FilesError::Spawn(io::Error::other("the thread that starts workers is gone"));
    sender.send(task).map_err(|_| gone())?;
    answers.recv().map_err(|_| gone())?.map_err(FilesError::Spawn)
}
