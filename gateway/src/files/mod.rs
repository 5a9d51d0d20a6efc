//! Users' files: the confined worker that serves sftp, scp and `mlad`, and how the gateway itself reads what
//! a user may have tampered with. Not here: what lies in a container beside home and datasets.
//!
//! * [`spawn_sftp`], [`spawn_scp`], [`spawn_mlad`] start a worker: a child process with the user's uid that
//!   the kernel holds in a [`Jail`] (mount namespace, no capabilities, Landlock).
//! * [`ensure_home`] makes a home.
//! * [`open_in_home`], [`list_in_home`], [`last_folder_in_home`] read in a home from the gateway, which is root,
//!   safely; [`write_in_home`] writes there as the user.
//! * [`worker`] is the process side: `main` calls [`worker::main`] before anything else.

mod home;
mod jail;
mod process;
mod reading;
mod scp_command;
pub mod worker;
mod writing;

pub use home::ensure_home;
pub use jail::{Jail, Project};
pub use process::{TerminalProcess, WORKER, WorkerProcess, spawn_mlad, spawn_mlad_on_terminal, spawn_scp, spawn_sftp};
pub use reading::{Limits, Listed, last_folder_in_home, list_in_home, open_in_home};
pub use writing::write_in_home;

use std::path::PathBuf;

/// Why a user's files cannot be served or read.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A name that cannot be that of a folder.
    #[error("{0:?} cannot be the name of a folder")]
    Name(String),
    /// Root has no jail.
    #[error("files are never served with the uid of root")]
    Root,
    /// The worker cannot be started.
    #[error("the worker for files cannot be started: {0}")]
    Spawn(std::io::Error),
    /// A command with too many or too long arguments.
    #[error("the command is too long: at most {limit} bytes")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// A file or folder cannot be used.
    #[error("{path}: {source}")]
    Path {
        /// Which, as the user sees it.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file that is not what it should be: a symbolic link, a device, somebody else's.
    #[error("{path}: {reason}")]
    Refused {
        /// Which, as the user sees it.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A folder with more in it than is listed.
    #[error("{path}: more than {limit} {what}")]
    Bound {
        /// Which folder.
        path: PathBuf,
        /// The limit.
        limit: usize,
        /// Of what.
        what: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use crate::{config::Config, store::UserRecord};
    use mlad::api::{Quota, Role};
    use std::path::Path;

    /// Settings with their data in `folder`.
    pub(super) fn config(folder: &Path) -> Config {
        let folder = folder.display();
        toml::from_str(&format!(
            "data_directory = '{folder}'\nrun_directory = '{folder}/run'\nagent_binary = '/x'\ncatalog = '/x'\n"
        ))
        .unwrap()
    }

    /// A user.
    pub(super) fn user(name: &str, uid: u32) -> UserRecord {
        UserRecord {
            id: 1,
            name: name.into(),
            uid,
            role: Role::User,
            enabled: true,
            quota: Quota::default(),
            created_at: jiff::Timestamp::UNIX_EPOCH,
            last_seen_at: None,
        }
    }
}
