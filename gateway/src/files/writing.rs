//! How the gateway, which is root, writes into a home: as the user, so that their rights and quota hold, and by
//! the walk of `reading`, so that no symbolic link turns it elsewhere.

use super::{
    FilesError,
    reading::{open_home, refusal, resolve},
};
use crate::{config::Config, store::UserRecord};
use rustix::{
    fs::{AtFlags, Mode, OFlags},
    io::Errno,
    thread::{CapabilitySet, Gid, Uid, capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Write as _},
    os::fd::OwnedFd,
    path::{Component, Path},
    thread,
};

/// Writes a file in the home of `user`, as them, whole or not at all and durably; folders on the way are made,
/// and what was at its place before is replaced. It blocks as files do.
///
/// # Errors
/// When the user could not write it either (their disk or quota is full), or a symbolic link is on the way.
pub fn write_in_home(config: &Config, user: &UserRecord, relative: &Path, contents: &[u8]) -> Result<(), FilesError> {
    // By root: the way to the homes may not be the user's to walk.
    let home = open_home(config, user)?;
    let uid = user.uid;
    let written = thread::scope(|scope| {
        // A thread's ids are its own, and this one is nobody else's afterwards.
        let write = || lower(uid).and_then(|()| write(&home, relative, contents));
        let writer = thread::Builder::new().name("user-rights".into()).spawn_scoped(scope, write)?;
        writer.join().unwrap_or_else(|_| Err(io::Error::other("the thread that writes panicked")))
    });
    written.map_err(|source| refusal(relative, source))
}

/// Gives this thread the user's effective ids, no supplementary groups and no effective capability. Real and
/// saved ids stay, so that no process of the user can touch the thread.
fn lower(uid: u32) -> io::Result<()> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    set_thread_groups(&[])?;
    set_thread_res_gid(None, group, None)?;
    set_thread_res_uid(None, user, None)?;
    if capabilities(None)?.effective != CapabilitySet::empty() {
        return Err(io::Error::other("rights of the gateway are left"));
    }
    Ok(())
}

fn write(home: &OwnedFd, relative: &Path, contents: &[u8]) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let (folder, name) = relative.parent().zip(relative.file_name()).ok_or_else(invalid)?;
    let folder = make_folders(home, folder)?;
    let mut new = OsString::from(".");
    new.push(name);
    new.push(".new");
    // What a crash left.
    remove(&folder, &new)?;
    let replaced = fill(&folder, &new, contents).and_then(|()| Ok(rustix::fs::renameat(&folder, &new, &folder, name)?));
    if let Err(error) = replaced {
        let _ = remove(&folder, &new);
        return Err(error);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::fsync(rustix::fs::openat(&folder, ".", flags, Mode::empty())?)?)
}

fn make_folders(home: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let mut folder = home.try_clone()?;
    for part in path.components() {
        let Component::Normal(name) = part else { return Err(io::ErrorKind::InvalidInput.into()) };
        let name = Path::new(name);
        folder = match resolve(&folder, name, OFlags::DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => resolve(&folder, name, OFlags::DIRECTORY)?,
                    Err(error) => return Err(error.into()),
                }
            }
            found => found?,
        };
    }
    Ok(folder)
}

fn remove(folder: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn fill(folder: &OwnedFd, name: &OsStr, contents: &[u8]) -> io::Result<()> {
    // Nothing that is there is opened: no link, no pipe.
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(folder, name, flags, Mode::from_raw_mode(0o644))?);
    file.write_all(contents)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::{config, user};
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, chown, symlink},
        path::PathBuf,
    };

    const UID: u32 = 20_001;

    struct Home {
        folder: tempfile::TempDir,
        config: Config,
    }

    impl Home {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let config = config(folder.path());
            crate::files::ensure_home(&config, &user("alice", UID)).unwrap();
            Self { folder, config }
        }

        fn path(&self, relative: &str) -> PathBuf {
            self.folder.path().join("home/alice").join(relative)
        }

        fn write(&self, relative: &str, text: &str) -> Result<(), FilesError> {
            write_in_home(&self.config, &user("alice", UID), Path::new(relative), text.as_bytes())
        }
    }

    #[test]
    fn what_is_written_is_the_users_and_can_be_written_again() {
        let home = Home::new();
        for text in ["first", "second"] {
            home.write("a/b/result", text).unwrap();
            assert_eq!(fs::read_to_string(home.path("a/b/result")).unwrap(), text);
        }
        for path in ["a", "a/b", "a/b/result"] {
            let status = fs::metadata(home.path(path)).unwrap();
            assert_eq!((status.uid(), status.gid()), (UID, UID), "{path}");
        }
        assert_eq!(fs::read_dir(home.path("a/b")).unwrap().count(), 1, "nothing is left beside it");
        assert!(rustix::process::geteuid().is_root(), "only that thread was changed");
    }

    #[test]
    fn no_link_in_a_hostile_home_turns_it_elsewhere() {
        let home = Home::new();
        let outside = tempfile::tempdir().unwrap();
        chown(outside.path(), Some(UID), Some(UID)).unwrap();
        let victim = outside.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        chown(&victim, Some(UID), Some(UID)).unwrap();
        symlink(outside.path(), home.path("link")).unwrap();
        for bad in ["link/result", "link/a/result", "../eve/result", "a/../../eve/result", "/etc/result", "", ".."] {
            assert!(home.write(bad, "x").is_err(), "{bad}");
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);

        // Links in the place of the file, and of the one it is written to first, are replaced and not followed.
        fs::create_dir(home.path("jobs")).unwrap();
        chown(home.path("jobs"), Some(UID), Some(UID)).unwrap();
        symlink(&victim, home.path("jobs/result")).unwrap();
        symlink(&victim, home.path("jobs/.result.new")).unwrap();
        home.write("jobs/result", "mine").unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert_eq!(fs::read_to_string(home.path("jobs/result")).unwrap(), "mine");
        assert!(fs::symlink_metadata(home.path("jobs/result")).unwrap().is_file());
    }

    #[test]
    fn what_the_user_may_not_write_is_not_written_for_them() {
        let home = Home::new();
        fs::create_dir(home.path("roots")).unwrap();
        let error = home.write("roots/result", "x").unwrap_err();
        assert!(matches!(&error, FilesError::Path { source, .. } if source.kind() == io::ErrorKind::PermissionDenied));
        fs::create_dir_all(home.path("full/result")).unwrap();
        for path in ["full", "full/result"] {
            chown(home.path(path), Some(UID), Some(UID)).unwrap();
        }
        assert!(home.write("full/result", "x").is_err(), "a folder is in its place");
        assert_eq!(fs::read_dir(home.path("full")).unwrap().count(), 1, "nothing is left beside it");
    }
}
