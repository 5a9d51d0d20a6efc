//! What a user's worker may see: a description, told to the worker on its command line.

use crate::{config::Config, files::FilesError, store::UserRecord};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

/// The virtual tree of one user: `/home/<user>`, `/datasets` (read-only) and `/projects/<name>`. Nothing
/// else exists in it, so there is nothing a path trick could reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jail {
    /// Login name.
    pub user: String,
    /// Uid, and gid, of the worker.
    pub uid: u32,
    /// The home on the host.
    pub home: PathBuf,
    /// The datasets on the host.
    pub datasets: PathBuf,
    /// The projects the user belongs to.
    pub projects: Vec<Project>,
    /// Names for the uids (and gids) that a listing may meet.
    pub names: BTreeMap<u32, String>,
    /// Whether a kernel without Landlock is refused.
    pub require_landlock: bool,
}

/// A project's folder, seen as `/projects/<name>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Project {
    /// Its name.
    pub name: String,
    /// Its folder on the host.
    pub path: PathBuf,
    /// Whether the user may write there.
    pub writable: bool,
}

impl Jail {
    /// What `user` may see.
    ///
    /// # Errors
    /// When a name cannot be that of a folder, or the uid is root's.
    pub fn new(config: &Config, user: &UserRecord, projects: Vec<Project>) -> Result<Self, FilesError> {
        for name in projects.iter().map(|project| &project.name).chain([&user.name]) {
            if !is_file_name(name) {
                return Err(FilesError::Name(name.clone()));
            }
        }
        if user.uid == 0 {
            return Err(FilesError::Root);
        }
        Ok(Self {
            user: user.name.clone(),
            uid: user.uid,
            home: config.home_of(&user.name),
            datasets: config.datasets(),
            projects,
            names: BTreeMap::from([(0, "root".into()), (user.uid, user.name.clone())]),
            require_landlock: config.files.require_landlock,
        })
    }

    /// The home in the virtual tree, and in the containers.
    pub fn virtual_home(&self) -> PathBuf {
        Path::new("/home").join(&self.user)
    }
}

/// Whether `name` is exactly one component of a path.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name)
        && !name.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::is_file_name;

    #[test]
    fn only_single_components_are_names() {
        for good in ["alice", "a.b", "..a"] {
            assert!(is_file_name(good), "{good}");
        }
        for bad in ["", ".", "..", "/", "a/b", "a/", "/a", "a/..", "./a", "a\0b"] {
            assert!(!is_file_name(bad), "{bad:?}");
        }
    }
}
