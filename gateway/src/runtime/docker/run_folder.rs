//! The folder a container shares with the gateway: its configuration goes in, its agent's socket and result
//! come out.
//!
//! Once the container runs its root can put anything there, so nothing in it is opened by path: every
//! descriptor is found beneath the folder's own, through no link, and looked at before it is used.

use mlad::channel::{AgentConfig, JobResult};
use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, fchmod, fstat, mkdirat, openat, openat2, renameat,
        unlinkat,
    },
    io::Errno,
};
use std::{
    ffi::CString,
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};
use tokio::net::UnixStream;

const CONFIG: &str = "config.json";
const SOCKET: &str = "agent.sock";
const RESULT: &str = "result.json";
/// Prefix of a folder that is being deleted; no workload's name begins so.
const DELETED: &str = ".deleted-";
/// Longest result that is read, in bytes.
const MAX_RESULT: u64 = 64 * 1024;
/// Names of a folder that are held at once while it is deleted.
const BATCH: usize = 1024;

/// The run folders of all workloads: `<run directory>/workloads`.
#[derive(Debug, Clone)]
pub(super) struct RunFolders {
    root: PathBuf,
}

impl RunFolders {
    /// Makes the folder of folders, for root alone.
    pub(super) fn open(root: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&root)?;
        let folders = Self { root };
        fchmod(folders.directory()?, Mode::RWXU)?;
        Ok(folders)
    }

    /// A new folder for a container that does not run yet; what is left of an older one goes.
    pub(super) fn make(&self, name: &str, config: &AgentConfig) -> io::Result<RunFolder> {
        self.remove(name)?;
        let directory = self.directory()?;
        mkdirat(&directory, name, Mode::RWXU)?;
        let folder = self.find(name)?;
        // Whatever the umask.
        fchmod(open_for_reading(&directory, name)?, Mode::RWXU)?;
        write_config(&folder.directory, config)?;
        Ok(folder)
    }

    /// The folder of a container that was made.
    pub(super) fn find(&self, name: &str) -> io::Result<RunFolder> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat2(self.directory()?, name, flags, Mode::empty(), beneath())?;
        Ok(RunFolder { path: self.path(name), directory })
    }

    /// Where it is on the host.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Deletes the folder with what is in it. No such folder is no error.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        self.retire(name)?;
        delete(&self.directory()?, &format!("{DELETED}{name}"))
    }

    /// Takes the folder out of the way, at once: from then on it holds no result and no socket. [`Self::remove`]
    /// deletes it, or [`Self::leftovers`] does if this process is killed before.
    pub(super) fn retire(&self, name: &str) -> io::Result<()> {
        let directory = self.directory()?;
        let deleted = format!("{DELETED}{name}");
        match renameat(&directory, name, &directory, &deleted) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            // An older one of that name was not deleted to its end.
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                delete(&directory, &deleted)?;
                Ok(renameat(&directory, name, &directory, &deleted)?)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Deletes folders half deleted, and names those that hold no result: nobody wants them if they have no
    /// container.
    pub(super) fn leftovers(&self) -> io::Result<Vec<String>> {
        let directory = self.directory()?;
        let mut left = Vec::new();
        for name in names(&directory).collect::<Result<Vec<_>, _>>()? {
            let Ok(name) = name.into_string() else { continue };
            if name.starts_with(DELETED) {
                delete(&directory, &name)?;
            } else if !self.find(&name).is_ok_and(|folder| folder.has_result()) {
                left.push(name);
            }
        }
        Ok(left)
    }

    fn directory(&self) -> io::Result<OwnedFd> {
        Ok(openat(CWD, &self.root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
    }
}

/// The run folder of one container.
#[derive(Debug)]
pub(super) struct RunFolder {
    path: PathBuf,
    directory: OwnedFd,
}

impl RunFolder {
    /// Where it is on the host.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor of the folder itself, whatever stands at its path.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// A new connection to what listens at the agent's socket.
    pub(super) async fn connect(&self) -> io::Result<UnixStream> {
        let socket = openat2(&self.directory, SOCKET, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), beneath())?;
        if FileType::from_raw_mode(fstat(&socket)?.st_mode) != FileType::Socket {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "agent.sock is not a socket"));
        }
        UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
    }

    /// What the agent wrote down about its job; none if it is absent or not a result.
    pub(super) fn result(&self) -> io::Result<Option<JobResult>> {
        // A FIFO must not hold us up.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match openat2(&self.directory, RESULT, flags, Mode::empty(), beneath()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP | Errno::XDEV | Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        File::from(file).take(MAX_RESULT).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes).ok())
    }

    /// Whether the agent was there: it made its socket, or wrote a result.
    pub(super) fn was_used(&self) -> bool {
        self.has(SOCKET) || self.has_result()
    }

    fn has_result(&self) -> bool {
        self.has(RESULT)
    }

    fn has(&self, name: &str) -> bool {
        rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }
}

fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

/// Whole or not at all: the container starts only afterwards, but this process may be killed in between.
fn write_config(directory: &OwnedFd, config: &AgentConfig) -> io::Result<()> {
    let part = "config.json.part";
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(openat(directory, part, flags, Mode::RUSR | Mode::WUSR)?);
    file.write_all(&serde_json::to_vec(config)?)?;
    Ok(renameat(directory, part, directory, CONFIG)?)
}

fn open_for_reading(directory: impl AsFd, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat2(directory, name, flags, Mode::empty(), beneath())?)
}

/// Deletes a folder. Flattens it instead of walking down: a container could nest folders deeper than there
/// are descriptors or stack.
fn delete(parent: &OwnedFd, name: &str) -> io::Result<()> {
    let top = match open_for_reading(parent, name) {
        Ok(top) => top,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut moved = 0_u64;
    loop {
        let entries = some_names(&top)?;
        if entries.is_empty() {
            return Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?);
        }
        for entry in &entries {
            if !unlink(&top, entry)? {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                flatten(&openat(&top, entry, flags, Mode::empty())?, &top, &mut moved)?;
                unlinkat(&top, entry, AtFlags::REMOVEDIR)?;
            }
        }
    }
}

/// Empties a folder: its files go, its folders move to the top.
fn flatten(folder: &OwnedFd, top: &OwnedFd, moved: &mut u64) -> io::Result<()> {
    loop {
        let children = some_names(folder)?;
        if children.is_empty() {
            return Ok(());
        }
        for child in &children {
            if !unlink(folder, child)? {
                move_up(folder, child, top, moved)?;
            }
        }
    }
}

/// Deletes a file or an empty folder; false if it is a folder with something in it.
fn unlink(directory: &OwnedFd, name: &CString) -> io::Result<bool> {
    match unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(true),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error.into()),
    }
    match unlinkat(directory, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Moves a folder to the top, under a number that is free there.
fn move_up(from: &OwnedFd, name: &CString, top: &OwnedFd, moved: &mut u64) -> io::Result<()> {
    loop {
        *moved += 1;
        match renameat(from, name, top, format!("{moved}")) {
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
            result => return Ok(result?),
        }
    }
}

/// Some of the names in a folder: there may be more than memory holds.
fn some_names(directory: &OwnedFd) -> io::Result<Vec<CString>> {
    names(directory).take(BATCH).collect()
}

fn names(directory: &OwnedFd) -> impl Iterator<Item = io::Result<CString>> {
    let (entries, error) = match Dir::read_from(directory) {
        Ok(entries) => (Some(entries), None),
        Err(error) => (None, Some(Err(error.into()))),
    };
    let names = entries.into_iter().flatten().map(|entry| Ok(entry?.file_name().to_owned()));
    let own = |name: &CString| matches!(name.to_bytes(), b"." | b"..");
    error.into_iter().chain(names.filter(move |name| !name.as_ref().is_ok_and(own)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlad::channel::Exit;
    use std::os::unix::{
        fs::{PermissionsExt as _, symlink},
        net::UnixListener,
    };

    fn config() -> AgentConfig {
        AgentConfig {
            workload: "j-1-1".into(),
            user: "alice".into(),
            uid: 20000,
            gid: 20000,
            home: "/home/alice".into(),
            environment: Default::default(),
            job: None,
            network: None,
        }
    }

    fn folders() -> (tempfile::TempDir, RunFolders) {
        let folder = tempfile::tempdir().unwrap();
        let folders = RunFolders::open(folder.path().join("workloads")).unwrap();
        (folder, folders)
    }

    #[test]
    fn the_configuration_is_for_root_alone() {
        let (_keep, folders) = folders();
        let folder = folders.make("j-1-1", &config()).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(folder.path()), 0o700);
        assert_eq!(mode(&folder.path().join("config.json")), 0o600);
        let read: AgentConfig =
            serde_json::from_slice(&std::fs::read(folder.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(read, config());
    }

    #[test]
    fn a_new_folder_has_nothing_of_the_old_one() {
        let (_keep, folders) = folders();
        let old = folders.make("j-1-1", &config()).unwrap();
        std::fs::write(old.path().join("result.json"), "{\"status\":0}").unwrap();
        assert_eq!(old.result().unwrap().unwrap().exit, Exit::Status(0));
        let new = folders.make("j-1-1", &config()).unwrap();
        assert_eq!(new.result().unwrap(), None);
    }

    #[tokio::test]
    async fn a_socket_that_is_not_the_containers_own_is_not_reached() {
        let (keep, folders) = folders();
        let folder = folders.make("j-1-1", &config()).unwrap();
        let other = keep.path().join("other.sock");
        let _others = UnixListener::bind(&other).unwrap();
        let socket = folder.path().join("agent.sock");
        symlink(&other, &socket).unwrap();
        assert_eq!(folder.connect().await.unwrap_err().raw_os_error(), Some(Errno::LOOP.raw_os_error()));
        std::fs::remove_file(&socket).unwrap();
        std::fs::write(&socket, "").unwrap();
        assert_eq!(folder.connect().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        std::fs::remove_file(&socket).unwrap();
        let own = UnixListener::bind(&socket).unwrap();
        folder.connect().await.unwrap();
        own.accept().unwrap();
    }

    #[test]
    fn only_a_plain_small_result_is_read() {
        let (keep, folders) = folders();
        let folder = folders.make("j-1-1", &config()).unwrap();
        let path = folder.path().join("result.json");
        let secret = keep.path().join("secret");
        std::fs::write(&secret, "{\"status\":1}").unwrap();
        symlink(&secret, &path).unwrap();
        assert_eq!(folder.result().unwrap(), None);
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert_eq!(folder.result().unwrap(), None);
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert_eq!(folder.result().unwrap(), None);
        std::fs::remove_dir(&path).unwrap();
        let _socket = UnixListener::bind(&path).unwrap();
        assert_eq!(folder.result().unwrap(), None);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, format!("{}{}", "{\"status\":0}", " ".repeat(1 << 20))).unwrap();
        assert_eq!(folder.result().unwrap().unwrap().exit, Exit::Status(0));
        std::fs::write(&path, format!("{}{}", " ".repeat(1 << 20), "{\"status\":0}")).unwrap();
        assert_eq!(folder.result().unwrap(), None);
        std::fs::write(&path, "{\"signal\":{\"name\":\"KILL\",\"core_dumped\":false,\"message\":\"\"}}").unwrap();
        assert!(matches!(folder.result().unwrap().unwrap().exit, Exit::Signal { .. }));
    }

    #[test]
    fn a_folder_nested_deeper_than_descriptors_allow_is_deleted() {
        let (_keep, folders) = folders();
        let folder = folders.make("w-1-1", &config()).unwrap();
        let mut at = folder.as_fd().try_clone_to_owned().unwrap();
        for _ in 0..2_000 {
            mkdirat(&at, "1", Mode::RWXU).unwrap();
            at = openat(&at, "1", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
            drop(openat(&at, "file", OFlags::WRONLY | OFlags::CREATE, Mode::RWXU).unwrap());
        }
        symlink("/", folder.path().join("link")).unwrap();
        folders.remove("w-1-1").unwrap();
        assert!(!folder.path().exists());
        assert_eq!(names(&folders.directory().unwrap()).count(), 0);
        folders.remove("w-1-1").unwrap();
    }

    #[test]
    fn leftovers_are_what_holds_no_result() {
        let (_keep, folders) = folders();
        for name in ["w-1-1", "w-2-1", "j-3-1"] {
            folders.make(name, &config()).unwrap();
        }
        std::fs::write(folders.path("j-3-1").join("result.json"), "{}").unwrap();
        folders.retire("w-2-1").unwrap();
        assert!(folders.path(".deleted-w-2-1").exists());
        assert_eq!(folders.leftovers().unwrap(), ["w-1-1"]);
        assert!(!folders.path(".deleted-w-2-1").exists());
    }
}
