//! How the gateway, which is root, reads in a home: a place where the user, or a hostile container, may put
//! symbolic links, pipes and devices, and exchange one for the other at any moment.
//!
//! Paths are walked by the kernel from the home's own descriptor and may neither leave it nor pass through a
//! symbolic link (openat2); what is found is looked at before it is opened, by a descriptor that pins it.

use super::FilesError;
use crate::{config::Config, store::UserRecord};
use rustix::{
    fs::{Dir, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::Errno,
};
use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// No `..` above the home, no symbolic link, no `/proc/…/fd`.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
/// How often a path is tried while somebody keeps renaming what it passes through.
const TRIES: usize = 128;

/// How much of a folder is listed.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Entries looked at, of whatever kind.
    pub entries: usize,
    /// Folders inside one another.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 10_000, depth: 32 }
    }
}

/// A file found in a home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Relative to the folder that was listed.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// When it was last written.
    pub modified: SystemTime,
}

/// Opens a file in the home of `user` for reading. It blocks as files do: not on pipes.
///
/// # Errors
/// When there is no such file, the path leaves the home or passes through a symbolic link, or what is there
/// is not a regular file of the user's.
pub fn open_in_home(config: &Config, user: &UserRecord, relative: &Path) -> Result<File, FilesError> {
    let home = open_home(config, user)?;
    let refuse = |source| refusal(relative, source);
    let found = resolve(&home, relative, OFlags::empty()).map_err(refuse)?;
    let status = rustix::fs::fstat(&found).map_err(|error| refuse(error.into()))?;
    check(&status, user.uid, FileType::RegularFile)
        .map_err(|reason| FilesError::Refused { path: relative.to_path_buf(), reason })?;
    let reopened = format!("/proc/self/fd/{}", found.as_raw_fd());
    File::open(reopened).map_err(refuse)
}

/// The folder in the home of `user` in which the next part of a path will appear: the last one on its way that
/// is there. Pinned, not opened: to be watched.
///
/// # Errors
/// When there is no home, or the path passes through a symbolic link.
pub fn last_folder_in_home(config: &Config, user: &UserRecord, relative: &Path) -> Result<OwnedFd, FilesError> {
    let home = open_home(config, user)?;
    for folder in relative.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty()) {
        match resolve(&home, folder, OFlags::DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            found => return found.map_err(|source| refusal(folder, source)),
        }
    }
    Ok(home)
}

/// The regular files of the user's in a folder of their home and in the folders within, in the order of
/// their paths. Symbolic links and special files are left out.
///
/// # Errors
/// As [`open_in_home`], and when there is more than `limits` allow.
pub fn list_in_home(
    config: &Config,
    user: &UserRecord,
    relative: &Path,
    limits: Limits,
) -> Result<Vec<Listed>, FilesError> {
    let home = open_home(config, user)?;
    let mut listing = Listing { uid: user.uid, top: relative, limits, looked_at: 0, files: Vec::new() };
    let top = listing.open_folder(&home, relative, relative)?;
    listing.walk(&top, Path::new(""), 1)?;
    listing.files.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(listing.files)
}

/// What a person is told of a path that cannot be walked.
pub(super) fn refusal(path: &Path, source: io::Error) -> FilesError {
    let path = path.to_path_buf();
    if source.raw_os_error() == Some(Errno::LOOP.raw_os_error()) {
        return FilesError::Refused { path, reason: "a symbolic link is on the way to it, and none is followed here" };
    }
    FilesError::Path { path, source }
}

pub(super) fn open_home(config: &Config, user: &UserRecord) -> Result<OwnedFd, FilesError> {
    super::Jail::new(config, user, Vec::new())?;
    let home = config.home_of(&user.name);
    rustix::fs::open(&home, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| FilesError::Path { path: home, source: error.into() })
}

/// The thing at `relative`, pinned but not opened.
pub(super) fn resolve(from: impl AsFd, relative: &Path, extra: OFlags) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC | extra;
    for _ in 0..TRIES {
        match rustix::fs::openat2(from.as_fd(), relative, flags, Mode::empty(), BENEATH) {
            Ok(found) => return Ok(found),
            // A rename nearby made the kernel unsure; it asks to try again.
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

fn check(status: &Stat, uid: u32, kind: FileType) -> Result<(), &'static str> {
    let found = FileType::from_raw_mode(status.st_mode);
    if found != kind {
        return Err(match (found, kind) {
            (FileType::Symlink, _) => "symbolic links are not followed here",
            (_, FileType::Directory) => "not a folder",
            _ => "not a regular file",
        });
    }
    if status.st_uid != uid {
        return Err("it belongs to somebody else");
    }
    Ok(())
}

struct Listing<'a> {
    uid: u32,
    top: &'a Path,
    limits: Limits,
    looked_at: usize,
    files: Vec<Listed>,
}

impl Listing<'_> {
    fn open_folder(&self, from: impl AsFd, name: &Path, shown: &Path) -> Result<OwnedFd, FilesError> {
        let refuse = |source: io::Error| refusal(shown, source);
        let found = resolve(from, name, OFlags::DIRECTORY).map_err(refuse)?;
        let status = rustix::fs::fstat(&found).map_err(|error| refuse(error.into()))?;
        check(&status, self.uid, FileType::Directory)
            .map_err(|reason| FilesError::Refused { path: shown.to_path_buf(), reason })?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(&found, ".", flags, Mode::empty()).map_err(|error| refuse(error.into()))
    }

    fn walk(&mut self, folder: &OwnedFd, inside: &Path, depth: usize) -> Result<(), FilesError> {
        if depth > self.limits.depth {
            return Err(self.bound(self.limits.depth, "folders inside one another"));
        }
        let shown = self.top.join(inside);
        let refuse = |error: Errno| FilesError::Path { path: shown.clone(), source: error.into() };
        for entry in Dir::read_from(folder).map_err(refuse)? {
            let entry = entry.map_err(refuse)?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            self.looked_at += 1;
            if self.looked_at > self.limits.entries {
                return Err(self.bound(self.limits.entries, "entries"));
            }
            self.entry(folder, inside, OsStr::from_bytes(name), depth)?;
        }
        Ok(())
    }

    /// One entry. What vanished, cannot be entered or is not the user's is left out.
    fn entry(&mut self, folder: &OwnedFd, inside: &Path, name: &OsStr, depth: usize) -> Result<(), FilesError> {
        let path = inside.join(name);
        let Ok(found) = resolve(folder, Path::new(name), OFlags::empty()) else { return Ok(()) };
        let Ok(status) = rustix::fs::fstat(&found) else { return Ok(()) };
        if check(&status, self.uid, FileType::RegularFile).is_ok() {
            let size = u64::try_from(status.st_size).unwrap_or(0);
            self.files.push(Listed { path, size, modified: modified(&status) });
        } else if check(&status, self.uid, FileType::Directory).is_ok() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            if let Ok(folder) = rustix::fs::openat(&found, ".", flags, Mode::empty()) {
                drop(found);
                self.walk(&folder, &path, depth + 1)?;
            }
        }
        Ok(())
    }

    fn bound(&self, limit: usize, what: &'static str) -> FilesError {
        FilesError::Bound { path: self.top.to_path_buf(), limit, what }
    }
}

fn modified(status: &Stat) -> SystemTime {
    let since = Duration::from_secs(u64::try_from(status.st_mtime).unwrap_or(0));
    SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::{config, user};
    use std::{
        io::Read as _,
        os::unix::fs::{MetadataExt as _, chown, symlink},
    };

    struct Home {
        folder: tempfile::TempDir,
        config: Config,
        user: UserRecord,
    }

    impl Home {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let config = config(folder.path());
            let user = user("alice", 20_001);
            crate::files::ensure_home(&config, &user).unwrap();
            Self { folder, config, user }
        }

        fn path(&self, relative: &str) -> PathBuf {
            self.folder.path().join("home/alice").join(relative)
        }

        fn write(&self, relative: &str, text: &str) {
            let path = self.path(relative);
            let parent = path.parent().unwrap();
            std::fs::create_dir_all(parent).unwrap();
            chown(parent, Some(20_001), Some(20_001)).unwrap();
            std::fs::write(&path, text).unwrap();
            chown(&path, Some(20_001), Some(20_001)).unwrap();
        }

        /// A folder outside the home with a `file` in it, both the user's.
        fn outside(&self) -> PathBuf {
            let outside = self.folder.path().join("outside");
            std::fs::create_dir(&outside).unwrap();
            std::fs::write(outside.join("file"), "outside").unwrap();
            for path in [outside.join("file"), outside.clone()] {
                chown(path, Some(20_001), Some(20_001)).unwrap();
            }
            outside
        }

        fn read(&self, relative: &str) -> Result<String, FilesError> {
            let mut text = String::new();
            open_in_home(&self.config, &self.user, Path::new(relative))?.read_to_string(&mut text).unwrap();
            Ok(text)
        }
    }

    #[test]
    fn a_file_of_the_users_is_read() {
        let home = Home::new();
        home.write("jobs/1/log", "hello");
        assert_eq!(home.read("jobs/1/log").unwrap(), "hello");
    }

    #[test]
    fn the_last_folder_on_the_way_is_found_and_no_link_is_followed_to_it() {
        let home = Home::new();
        home.write("jobs/1/log", "hello");
        symlink("jobs", home.path("link")).unwrap();
        let last = |path: &str| {
            let found = last_folder_in_home(&home.config, &home.user, Path::new(path))?;
            Ok::<_, FilesError>(rustix::fs::fstat(found).unwrap().st_ino)
        };
        let number = |path: &str| std::fs::metadata(home.path(path)).unwrap().ino();
        for (path, folder) in
            [("jobs/1/other", "jobs/1"), ("jobs/2/log", "jobs"), ("away/2/log", ""), ("log", ""), ("jobs/1", "jobs")]
        {
            assert_eq!(last(path).unwrap(), number(folder), "{path}");
        }
        let error = last("link/2/log").unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{error}");
    }

    #[test]
    fn nothing_but_the_users_files_is_opened() {
        let home = Home::new();
        home.write("jobs/1/log", "hello");
        std::fs::write(home.path("roots"), "secret").unwrap();
        // What the links lead to is the user's, so that only the way there is wrong.
        let outside = home.outside();
        symlink(outside.join("file"), home.path("absolute")).unwrap();
        symlink("../../outside/file", home.path("relative")).unwrap();
        symlink("jobs", home.path("link")).unwrap();
        symlink(&outside, home.path("folder")).unwrap();
        symlink("/", home.path("root")).unwrap();
        let from_root = format!("root{}/file", outside.display());
        let as_absolute = outside.join("file").display().to_string();
        let pipe = rustix::fs::CWD;
        rustix::fs::mkfifoat(pipe, home.path("pipe"), Mode::from_raw_mode(0o666)).unwrap();
        chown(home.path("pipe"), Some(20_001), Some(20_001)).unwrap();
        for away in [
            "absolute",
            "relative",
            "link/1/log",
            "folder/file",
            &from_root,
            "../../outside/file",
            "jobs/../../../outside/file",
            &as_absolute,
            "jobs/../../alice/jobs/1/log",
        ] {
            assert!(std::fs::read(home.path(away)).is_ok(), "{away} leads to nothing");
            assert!(home.read(away).is_err(), "{away}");
        }
        for bad in ["roots", "pipe", "jobs", "missing", ""] {
            assert!(home.read(bad).is_err(), "{bad}");
        }
        assert_eq!(home.read("jobs/../jobs/1/log").unwrap(), "hello");
    }

    #[test]
    fn listing_is_recursive_sorted_and_bounded() {
        let home = Home::new();
        for name in ["out/b", "out/a/deep", "out/c"] {
            home.write(name, "12345");
        }
        let outside = home.outside();
        symlink(&outside, home.path("out/folder")).unwrap();
        symlink(outside.join("file"), home.path("out/file")).unwrap();
        std::fs::write(home.path("out/roots"), "secret").unwrap();
        let list = |limits| list_in_home(&home.config, &home.user, Path::new("out"), limits);
        let found = list(Limits::default()).unwrap();
        let names: Vec<_> = found.iter().map(|listed| (listed.path.to_str().unwrap(), listed.size)).collect();
        assert_eq!(names, [("a/deep", 5), ("b", 5), ("c", 5)]);
        assert!(matches!(list(Limits { entries: 6, depth: 9 }), Err(FilesError::Bound { .. })));
        assert!(matches!(list(Limits { entries: 99, depth: 1 }), Err(FilesError::Bound { .. })));
        assert!(list_in_home(&home.config, &home.user, Path::new("out/folder"), Limits::default()).is_err());
    }

    #[test]
    fn a_swapped_folder_is_never_followed() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let home = Home::new();
        home.write("dir/file", "mine");
        // As it is outside: the user's, and with another text.
        symlink(home.outside(), home.path("evil")).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Also if an assertion fails: a scope waits for its threads.
            let _stopped = Stop(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let (dir, evil) = (home.path("dir"), home.path("evil"));
                    let flags = rustix::fs::RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(rustix::fs::CWD, &dir, rustix::fs::CWD, &evil, flags).unwrap();
                }
            });
            let (mut inside, mut nowhere) = (0, 0);
            for _ in 0..20_000 {
                match home.read("dir/file") {
                    Ok(text) => {
                        assert_eq!(text, "mine");
                        inside += 1;
                    }
                    Err(_) => nowhere += 1,
                }
            }
            assert!(inside > 0 && nowhere > 0, "the race was run: {inside} {nowhere}");
        });
    }

    /// Ends a race when it is dropped.
    struct Stop<'a>(&'a std::sync::atomic::AtomicBool);

    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }
}
