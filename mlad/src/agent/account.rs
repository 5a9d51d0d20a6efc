//! The user inside the container: the entries of `passwd` and `group`, the home, the shell, the environment.

use super::{AgentError, Paths};
use crate::channel::AgentConfig;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

/// Shells in the order of preference.
const SHELLS: [&str; 2] = ["/bin/bash", "/bin/sh"];
/// `PATH` where the image sets none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Longest `passwd` or `group` that is read, in bytes.
const MAX_TABLE: u64 = 4 * 1024 * 1024;

/// Whose container this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) home: PathBuf,
    pub(super) shell: PathBuf,
}

impl User {
    /// The user of a configuration, checked: what is in it becomes lines of `passwd`.
    ///
    /// # Errors
    /// When the name or home cannot stand in `passwd`, or the user would be root.
    pub(super) fn of(config: &AgentConfig) -> Result<Self, String> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        if config.user.is_empty()
            || config.user.len() > 32
            || config.user.starts_with('-')
            || !config.user.bytes().all(good)
        {
            return Err(format!("user {:?} is no login name", config.user));
        }
        if config.uid == 0 || config.gid == 0 || config.user == "root" {
            return Err("the user is root; a container's user never is".into());
        }
        let home = config.home.to_str().filter(|home| home.starts_with('/') && !home.contains([':', '\n']));
        let Some(home) = home else { return Err(format!("home {:?} is no absolute path", config.home)) };
        let shell = SHELLS.iter().find(|shell| Path::new(shell).exists()).copied().unwrap_or("/bin/sh");
        Ok(Self { name: config.user.clone(), uid: config.uid, gid: config.gid, home: home.into(), shell: shell.into() })
    }

    fn passwd_line(&self) -> String {
        format!("{}:x:{}:{}::{}:{}", self.name, self.uid, self.gid, self.home.display(), self.shell.display())
    }

    fn group_line(&self) -> String {
        format!("{}:x:{}:", self.name, self.gid)
    }
}

/// Makes the user known to the container: `passwd`, `group`, the image's `PATH` for login shells, and the home.
/// What cannot be done (a read-only image) is logged; a session works without.
pub(super) fn install(user: &User, paths: &Paths, path: Option<&OsStr>) {
    let tables = [("passwd", user.passwd_line(), user.uid), ("group", user.group_line(), user.gid)];
    match open_folder(&paths.etc) {
        Ok(etc) => {
            for (name, line, id) in &tables {
                report(name, replace_entry(&etc, name, line, *id));
            }
            report("profile.d", keep_path(&etc, path.and_then(OsStr::to_str)));
        }
        Err(error) => report(&paths.etc.display().to_string(), Err(error)),
    }
    report(&user.home.display().to_string(), make_home(user));
}

/// The image's `passwd` and `group` with the user in them; an image without them has the user's entries alone.
///
/// # Errors
/// When one cannot be read.
pub(super) fn tables(user: &User, etc: &Path) -> io::Result<[(&'static str, Vec<u8>); 2]> {
    let etc = open_folder(etc)?;
    let table = |name| match read_file(&etc, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result,
    };
    let passwd = with_entry(&table("passwd")?, &user.passwd_line(), user.uid);
    Ok([("passwd", passwd), ("group", with_entry(&table("group")?, &user.group_line(), user.gid))])
}

fn report(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::warn!(what, %error, "the user cannot be made known to the image; going on without");
    }
}

/// A folder of the image, not by way of a symbolic link: the image is not trusted, and who made it must not
/// have the agent, which is root, write somewhere else.
fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

fn replace_entry(etc: &OwnedFd, name: &str, line: &str, id: u32) -> io::Result<()> {
    let table = read_file(etc, name)?;
    let wanted = with_entry(&table, line, id);
    // Where the agent is not root, the tables were written for it, and it could not change them.
    if wanted == table { Ok(()) } else { replace_file(etc, name, &wanted) }
}

/// The table without entries of the line's name or of this id, and with the line.
fn with_entry(table: &[u8], line: &str, id: u32) -> Vec<u8> {
    let name = line.split(':').next().unwrap_or_default().as_bytes();
    let id = id.to_string();
    let clashes = |entry: &[u8]| {
        let mut fields = entry.split(|byte| *byte == b':');
        fields.next() == Some(name) || fields.nth(1) == Some(id.as_bytes())
    };
    let mut result = Vec::with_capacity(table.len() + line.len() + 1);
    for entry in table.split(|byte| *byte == b'\n').filter(|entry| !entry.is_empty() && !clashes(entry)) {
        result.extend_from_slice(entry);
        result.push(b'\n');
    }
    result.extend_from_slice(line.as_bytes());
    result.push(b'\n');
    result
}

/// A login shell reads `/etc/profile`, which on Debian sets `PATH` anew and so loses the image's own (where its
/// conda or CUDA is); this puts it back.
fn keep_path(etc: &OwnedFd, path: Option<&str>) -> io::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(etc, "profile.d", flags, Mode::empty()) {
        Ok(folder) => replace_file(&folder, "00-mlad.sh", &profile(path)),
        Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn profile(path: &str) -> Vec<u8> {
    format!("# Written by MLAD: the image's own PATH.\nPATH='{}'\nexport PATH\n", path.replace('\'', r"'\''"))
        .into_bytes()
}

fn read_file(folder: &OwnedFd, name: &str) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(folder, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut contents = Vec::new();
    if !file.metadata()?.is_file() || file.take(MAX_TABLE + 1).read_to_end(&mut contents)? as u64 > MAX_TABLE {
        return Err(io::Error::other(format!("{name} is no file of a sensible size")));
    }
    Ok(contents)
}

/// Replaces a file at once; in place where it cannot be renamed over (a file mounted by itself).
fn replace_file(folder: &OwnedFd, name: &str, contents: &[u8]) -> io::Result<()> {
    let new = format!("{name}.mlad");
    let _ = rustix::fs::unlinkat(folder, &new, AtFlags::empty());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o644);
    File::from(rustix::fs::openat(folder, &new, flags, mode)?).write_all(contents)?;
    match rustix::fs::renameat(folder, &new, folder, name) {
        Err(rustix::io::Errno::BUSY) => {
            rustix::fs::unlinkat(folder, &new, AtFlags::empty())?;
            let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            File::from(rustix::fs::openat(folder, name, flags, mode)?).write_all(contents)
        }
        result => Ok(result?),
    }
}

/// Makes the home if nobody mounted one. No symbolic link is followed on the way.
fn make_home(user: &User) -> io::Result<()> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mut folder = root.try_clone()?;
    let mut made = false;
    for name in user.home.iter().skip(1) {
        made = match rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => true,
            Err(rustix::io::Errno::EXIST) => false,
            Err(error) => return Err(error.into()),
        };
        folder = enter(folder.as_fd(), Path::new(name))?;
    }
    if made {
        rustix::fs::chmodat(&folder, ".", Mode::from_raw_mode(0o700), AtFlags::empty())?;
        let (uid, gid) = (rustix::fs::Uid::from_raw(user.uid), rustix::fs::Gid::from_raw(user.gid));
        rustix::fs::chownat(&folder, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    }
    Ok(())
}

fn enter(folder: impl AsFd, name: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(folder, name, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?)
}

/// What every process of the user starts from: the image's environment (the agent's own), then the
/// configuration's, then what the account is.
pub(super) fn environment(user: &User, configured: &BTreeMap<String, String>) -> BTreeMap<OsString, OsString> {
    let mut environment: BTreeMap<OsString, OsString> =
        std::env::vars_os().filter(|(name, _)| !is_of_a_shell(name.to_str())).collect();
    environment.entry("PATH".into()).or_insert_with(|| DEFAULT_PATH.into());
    environment.entry("LANG".into()).or_insert_with(|| "C.UTF-8".into());
    environment.extend(configured.iter().map(|(name, value)| (name.into(), value.into())));
    environment.extend(account_variables(user));
    environment
}

/// The variables that say who the user is; no client may say otherwise.
pub(super) fn account_variables(user: &User) -> [(OsString, OsString); 4] {
    [
        ("HOME".into(), user.home.clone().into()),
        ("USER".into(), user.name.clone().into()),
        ("LOGNAME".into(), user.name.clone().into()),
        ("SHELL".into(), user.shell.clone().into()),
    ]
}

/// What belongs to the process the agent was started by, not to the image.
fn is_of_a_shell(name: Option<&str>) -> bool {
    matches!(name, Some("TERM" | "PWD" | "OLDPWD" | "SHLVL" | "_"))
}

/// Reads the configuration.
pub(super) fn read_config(path: &Path) -> Result<AgentConfig, AgentError> {
    let wrong = |reason: String| AgentError::Config { path: path.to_owned(), reason };
    let text = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/bash\nubuntu:x:1000:1000::/home/ubuntu:/bin/sh\n+nis\n\nkim:x:7:7::/:\nlast:x:10:10::/:/bin/sh";

    #[test]
    fn an_entry_replaces_those_of_its_name_and_id() {
        let text = String::from_utf8(with_entry(PASSWD, "kim:x:1000:1000::/home/kim:/bin/sh", 1000)).unwrap();
        assert_eq!(
            text,
            "root:x:0:0:root:/root:/bin/bash\n+nis\nlast:x:10:10::/:/bin/sh\nkim:x:1000:1000::/home/kim:/bin/sh\n"
        );
        let again = with_entry(text.as_bytes(), "kim:x:1000:1000::/home/kim:/bin/sh", 1000);
        assert_eq!(again, text.as_bytes(), "it can be repeated");
        assert_eq!(with_entry(b"", "kim:x:5:", 5), b"kim:x:5:\n");
    }

    #[test]
    fn a_profile_is_quoted() {
        assert!(profile("/a b:/it's").ends_with(b"PATH='/a b:/it'\\''s'\nexport PATH\n"));
    }

    #[test]
    fn tables_are_replaced_and_links_are_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("elsewhere");
        std::fs::write(&target, "kept").unwrap();
        std::os::unix::fs::symlink(&target, folder.path().join("passwd")).unwrap();
        let etc = open_folder(folder.path()).unwrap();
        replace_entry(&etc, "group", "kim:x:5:", 5).unwrap();
        replace_entry(&etc, "group", "kim:x:6:", 6).unwrap();
        assert_eq!(std::fs::read_to_string(folder.path().join("group")).unwrap(), "kim:x:6:\n");
        assert!(replace_entry(&etc, "passwd", "kim:x:5:5::/:/bin/sh", 5).is_err());
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "kept");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).unwrap();
        assert!(open_folder(&link).is_err());
    }

    #[test]
    fn names_that_would_break_passwd_are_refused() {
        let config = |user: &str, uid, home: &str| AgentConfig {
            workload: "w".into(),
            user: user.into(),
            uid,
            gid: 5,
            home: home.into(),
            environment: BTreeMap::new(),
            job: None,
            network: None,
        };
        assert!(User::of(&config("kim", 5, "/home/kim")).is_ok());
        for (user, uid, home) in [
            ("", 5, "/"),
            ("a:b", 5, "/"),
            ("a\nb", 5, "/"),
            ("root", 5, "/"),
            ("kim", 0, "/"),
            ("kim", 5, "x"),
            ("kim", 5, "/a:b"),
        ] {
            assert!(User::of(&config(user, uid, home)).is_err(), "{user:?} {uid} {home:?}");
        }
    }
}
