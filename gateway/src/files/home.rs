//! Making a user's home.

use crate::{config::Config, files::FilesError, store::UserRecord};
use rustix::{
    fs::{CWD, RenameFlags},
    io::Errno,
};
use std::{
    fs::{self, File},
    io,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown},
    path::Path,
};

/// What lies in a new home. Files with these names in `/etc/skel` of an image have no part in it: the home is
/// the same in every image.
const SKELETON: [(&str, &str); 2] = [
    (
        ".profile",
        "# Read by login shells.\n\
         if [ -n \"$BASH_VERSION\" ] && [ -f \"$HOME/.bashrc\" ]; then . \"$HOME/.bashrc\"; fi\n\
         if [ -d \"$HOME/.local/bin\" ]; then PATH=\"$HOME/.local/bin:$PATH\"; fi\n",
    ),
    (
        ".bashrc",
        "# Read by interactive bash.\n\
         case $- in *i*) ;; *) return ;; esac\n\
         HISTCONTROL=ignoreboth\n\
         HISTSIZE=10000\n\
         shopt -s histappend checkwinsize\n\
         PS1='\\u@\\h:\\w\\$ '\n\
         alias ls='ls --color=auto'\n\
         alias ll='ls -l'\n",
    ),
];

/// Makes the home of `user` if it does not exist: mode 0700, owned by the user, with a small skeleton. It
/// appears complete or not at all. An existing home is left as it is, but it must be a folder of the user's.
///
/// # Errors
/// When it cannot be made, or something else lies in its place.
pub fn ensure_home(config: &Config, user: &UserRecord) -> Result<(), FilesError> {
    let home = config.home_of(&user.name);
    // Checks the name, too.
    super::Jail::new(config, user, Vec::new())?;
    let refuse = |source| FilesError::Path { path: home.clone(), source };
    let Some(homes) = home.parent() else { return Err(refuse(io::ErrorKind::InvalidInput.into())) };
    fs::create_dir_all(homes).map_err(refuse)?;
    match rustix::fs::lstat(&home) {
        Ok(status) => return check(&status, user, &home),
        Err(Errno::NOENT) => {}
        Err(error) => return Err(refuse(error.into())),
    }
    make(homes, user).map_err(refuse)?;
    let status = rustix::fs::lstat(&home).map_err(|error| refuse(error.into()))?;
    check(&status, user, &home)
}

fn check(status: &rustix::fs::Stat, user: &UserRecord, home: &Path) -> Result<(), FilesError> {
    let refuse = |reason| Err(FilesError::Refused { path: home.to_path_buf(), reason });
    if !rustix::fs::FileType::from_raw_mode(status.st_mode).is_dir() {
        return refuse("it is in the place of a home and not a folder");
    }
    if status.st_uid != user.uid {
        return refuse("it is in the place of a home and belongs to another uid");
    }
    Ok(())
}

/// Makes the home under another name and gives it the right one when it is complete. If it exists by then,
/// somebody else made it.
fn make(homes: &Path, user: &UserRecord) -> io::Result<()> {
    // Not a name a user can have, and of this call only.
    let making = homes.join(format!(".making-{}-{:016x}", user.name, rand::random::<u64>()));
    let made = fill(&making, user.uid).and_then(|()| publish(homes, &making, &user.name));
    if made.is_err() || making.exists() {
        let _ = fs::remove_dir_all(&making);
    }
    made
}

fn fill(making: &Path, uid: u32) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(making)?;
    for (name, text) in SKELETON {
        let path = making.join(name);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&path)?;
        file.write_all(text.as_bytes())?;
        // What the mask of the gateway took away.
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        fchown(&file, Some(uid), Some(uid))?;
        file.sync_all()?;
    }
    let folder = File::open(making)?;
    folder.set_permissions(fs::Permissions::from_mode(0o700))?;
    fchown(&folder, Some(uid), Some(uid))?;
    folder.sync_all()
}

fn publish(homes: &Path, making: &Path, name: &str) -> io::Result<()> {
    let home = homes.join(name);
    match rustix::fs::renameat_with(CWD, making, CWD, &home, RenameFlags::NOREPLACE) {
        Ok(()) | Err(Errno::EXIST) => {}
        // Some network file systems cannot; and a plain rename replaces no folder with something in it.
        Err(Errno::INVAL | Errno::NOSYS) => match rustix::fs::rename(making, &home) {
            Ok(()) | Err(Errno::EXIST | Errno::NOTEMPTY) => {}
            Err(error) => return Err(error.into()),
        },
        Err(error) => return Err(error.into()),
    }
    File::open(homes)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn a_home_is_made_once_and_belongs_to_the_user() {
        let folder = tempfile::tempdir().unwrap();
        let config = crate::files::tests::config(folder.path());
        let user = crate::files::tests::user("alice", 20_001);
        ensure_home(&config, &user).unwrap();
        let home = folder.path().join("home/alice");
        let status = std::fs::metadata(&home).unwrap();
        assert_eq!((status.uid(), status.gid(), status.permissions().mode() & 0o7777), (20_001, 20_001, 0o700));
        assert_eq!(std::fs::metadata(home.join(".bashrc")).unwrap().uid(), 20_001);

        std::fs::write(home.join(".bashrc"), "mine").unwrap();
        ensure_home(&config, &user).unwrap();
        assert_eq!(std::fs::read_to_string(home.join(".bashrc")).unwrap(), "mine");
        assert_eq!(std::fs::read_dir(folder.path().join("home")).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn what_is_not_the_users_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let config = crate::files::tests::config(folder.path());
        fs::create_dir_all(folder.path().join("home/bob")).unwrap();
        std::os::unix::fs::symlink("/etc", folder.path().join("home/eve")).unwrap();
        for name in ["bob", "eve", "..", "a/b", ""] {
            assert!(ensure_home(&config, &crate::files::tests::user(name, 20_002)).is_err(), "{name}");
        }
    }
}
