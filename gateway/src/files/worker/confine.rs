//! A process, started as root, gives up everything but one user's view of their files.
//!
//! In this order: the umask of users' files; no descriptor but the standard ones; a session and a mount
//! namespace of its own, whose root is an empty tmpfs with the user's folders bound into it; bounds; the
//! user's uid and no capability, for good; Landlock, as a second wall in front of the same view. Whatever
//! fails ends the process: there is no weaker way.

use super::{super::Jail, WorkerError};
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus, Scope,
};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
    process::{Resource, Rlimit, Signal},
    thread::{CapabilitySet, Gid, Uid},
};
use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{
            ffi::OsStringExt as _,
            fs::{DirBuilderExt as _, OpenOptionsExt as _},
        },
    },
    path::{Path, PathBuf},
};

/// Where the program lies in the view of a worker that becomes `mlad`.
pub(super) const PROGRAM: &str = "/run/mlad/mlad";
/// Where its API socket lies.
const SOCKET: &str = "/run/mlad/api.sock";
/// What the user's new files are never allowed to others, as in the containers.
pub(super) const MASK: u32 = 0o022;
/// Open files.
pub(super) const MAX_OPEN_FILES: u64 = 1100;
/// Bytes of address space of a worker that serves files: it holds a few buffers, and names up to a bound.
const MAX_ADDRESS_SPACE: u64 = 512 << 20;
/// Bytes of address space of one that becomes `mlad`.
const MAX_ADDRESS_SPACE_OF_PROGRAM: u64 = 4 << 30;
/// The tmpfs that carries the view holds mount points only.
const ROOT_OPTIONS: &std::ffi::CStr = c"mode=0755,size=64k,nr_inodes=512";

/// What a worker that becomes `mlad` sees besides.
pub(super) struct Program<'a> {
    /// The static binary, on the host.
    pub(super) binary: &'a Path,
    /// The API's socket, on the host.
    pub(super) socket: &'a Path,
}

/// Confines this process to `jail`; its working directory is the home afterwards.
pub(super) fn confine(jail: &Jail, program: Option<&Program<'_>>) -> Result<(), WorkerError> {
    if jail.uid == 0 {
        return Err(failed("the uid", io::Error::other("files are never served as root")));
    }
    if !rustix::process::geteuid().is_root() {
        return Err(failed("mount a view of the files", io::Error::other("the gateway must run as root for this")));
    }
    if fs::read_dir("/proc/self/task").map_or(0, Iterator::count) != 1 {
        return Err(failed("be alone", io::Error::other("the process has several threads already")));
    }
    // First, because it concerns the folders of the view, too: a gateway may run with a mask that nobody passes.
    rustix::process::umask(Mode::from_raw_mode(MASK));
    close_all_but_standard().map_err(|source| failed("close descriptors", source))?;
    own_session().map_err(|source| failed("start a session", source))?;
    let view = View::of(jail, program);
    enter_view(&view)?;
    let space = if program.is_some() { MAX_ADDRESS_SPACE_OF_PROGRAM } else { MAX_ADDRESS_SPACE };
    bound_resources(space).map_err(|source| failed("set limits", source))?;
    become_user(jail.uid)?;
    restrict_with_landlock(&view, jail.require_landlock)?;
    let home = jail.virtual_home();
    rustix::process::chdir(&home).map_err(|source| failed("enter the home", source.into()))?;
    die_with_parent().map_err(|source| failed("follow the gateway", source))
}

fn failed(step: impl Into<String>, source: io::Error) -> WorkerError {
    WorkerError::Confine { step: step.into(), source }
}

fn close_all_but_standard() -> io::Result<()> {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|number| *number > 2)
        .collect();
    for number in open {
        match nix::unistd::close(number) {
            // That of the listing itself is gone already.
            Ok(()) | Err(nix::errno::Errno::EBADF) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn own_session() -> io::Result<()> {
    rustix::process::setsid()?;
    if rustix::termios::isatty(io::stdin()) {
        rustix::process::ioctl_tiocsctty(io::stdin())?;
    }
    Ok(())
}

/// A folder or file of the host and where it is seen.
struct Seen {
    host: PathBuf,
    at: PathBuf,
    kind: Kind,
    /// Whether a view without it will do, because it does not exist on the host.
    optional: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Writable,
    ReadOnly,
    Executable,
    Socket,
}

impl Kind {
    fn mount_flags(self) -> MountFlags {
        let always = MountFlags::NOSUID | MountFlags::NODEV;
        match self {
            Self::Writable => always | MountFlags::NOEXEC,
            Self::ReadOnly => always | MountFlags::NOEXEC | MountFlags::RDONLY,
            Self::Executable => always | MountFlags::RDONLY,
            // Connecting to a socket is writing to it.
            Self::Socket => always | MountFlags::NOEXEC,
        }
    }

    fn is_folder(self) -> bool {
        matches!(self, Self::Writable | Self::ReadOnly)
    }
}

struct View {
    seen: Vec<Seen>,
}

impl View {
    fn of(jail: &Jail, program: Option<&Program<'_>>) -> Self {
        let folder = |host: &Path, at: PathBuf, writable, optional| Seen {
            host: host.to_path_buf(),
            at,
            kind: if writable { Kind::Writable } else { Kind::ReadOnly },
            optional,
        };
        let mut seen = vec![
            folder(&jail.home, jail.virtual_home(), true, false),
            folder(&jail.datasets, "/datasets".into(), false, true),
        ];
        for project in &jail.projects {
            let at = Path::new("/projects").join(&project.name);
            seen.push(folder(&project.path, at, project.writable, false));
        }
        if let Some(program) = program {
            let file = |host: &Path, at: &str, kind| Seen { host: host.into(), at: at.into(), kind, optional: false };
            seen.push(file(program.binary, PROGRAM, Kind::Executable));
            seen.push(file(program.socket, SOCKET, Kind::Socket));
        }
        Self { seen }
    }
}

/// Makes the view the whole file system of this process.
fn enter_view(view: &View) -> Result<(), WorkerError> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS | nix::sched::CloneFlags::CLONE_NEWIPC)
        .map_err(|error| failed("make a mount namespace", error.into()))?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|source| failed("keep mounts private", source.into()))?;
    // Opened in the new namespace, as a bind mount wants, and before the tmpfs hides anything.
    let sources = view
        .seen
        .iter()
        .map(|seen| open_source(seen).map_err(|source| failed(format!("open {}", seen.host.display()), source)))
        .collect::<Result<Vec<_>, _>>()?;
    let base = build_on(view).map_err(|source| failed("find a place for the view", source))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("tmpfs", &base, "tmpfs", flags, ROOT_OPTIONS)
        .map_err(|source| failed("mount the root", source.into()))?;
    for (seen, source) in view.seen.iter().zip(&sources) {
        bind(seen, source.as_ref(), &base).map_err(|source| failed(format!("mount {}", seen.at.display()), source))?;
    }
    make_folder(&base.join("projects")).map_err(|source| failed("make /projects", source))?;
    rustix::mount::mount_remount(&base, MountFlags::BIND | flags | MountFlags::RDONLY, c"")
        .map_err(|source| failed("make the root read-only", source.into()))?;
    change_root(&base).map_err(|source| failed("change the root", source))
}

fn open_source(seen: &Seen) -> io::Result<Option<OwnedFd>> {
    let directory = if seen.kind.is_folder() { OFlags::DIRECTORY } else { OFlags::empty() };
    match rustix::fs::open(&seen.host, OFlags::PATH | OFlags::CLOEXEC | directory, Mode::empty()) {
        Ok(source) => Ok(Some(source)),
        Err(rustix::io::Errno::NOENT) if seen.optional => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A folder of the host to build the view on; nobody else sees that. It must exist, and not be one of those
/// that are bound into the view, because a mount on top of a source hides it: that of the homes.
fn build_on(view: &View) -> io::Result<PathBuf> {
    let homes = view.seen.first().and_then(|home| home.host.parent()).ok_or(io::ErrorKind::NotFound)?;
    fs::canonicalize(homes)
}

fn make_folder(path: &Path) -> io::Result<()> {
    // Everybody may list these.
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path)
}

fn bind(seen: &Seen, source: Option<&OwnedFd>, base: &Path) -> io::Result<()> {
    let target = base.join(seen.at.strip_prefix("/").unwrap_or(&seen.at));
    if seen.kind.is_folder() {
        make_folder(&target)?;
    } else {
        make_folder(target.parent().unwrap_or(base))?;
        fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&target)?;
    }
    let Some(source) = source else { return Ok(()) };
    rustix::mount::mount_bind_recursive(format!("/proc/self/fd/{}", source.as_raw_fd()), &target)?;
    for mount in mounts_in(&fs::read("/proc/self/mountinfo")?, &target) {
        let already = rustix::fs::statvfs(&mount)?.f_flag;
        let kept = if already.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
            MountFlags::RDONLY
        } else {
            MountFlags::empty()
        };
        rustix::mount::mount_remount(&mount, MountFlags::BIND | seen.kind.mount_flags() | kept, c"")?;
    }
    Ok(())
}

/// The mount points at and beneath `top`, of the text of `/proc/self/mountinfo`.
fn mounts_in(mountinfo: &[u8], top: &Path) -> Vec<PathBuf> {
    mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|escaped| PathBuf::from(OsString::from_vec(unescape(escaped))))
        .filter(|point| point.starts_with(top))
        .collect()
}

/// Takes the octal escapes (`\040`) out of a field of mountinfo.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let octal = tail.get(..3).filter(|_| byte == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(value) => {
                plain.push(value);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => plain.push(byte),
        }
    }
    plain
}

fn change_root(base: &Path) -> io::Result<()> {
    rustix::process::chdir(base)?;
    // The old root comes to lie on top of the new one, and goes.
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    Ok(())
}

fn bound_resources(address_space: u64) -> io::Result<()> {
    for (resource, bound) in [(Resource::Nofile, MAX_OPEN_FILES), (Resource::Core, 0), (Resource::As, address_space)] {
        rustix::process::setrlimit(resource, Rlimit { current: Some(bound), maximum: Some(bound) })?;
    }
    Ok(())
}

/// Becomes the user for good. These calls change one thread, so there must be no other.
fn become_user(uid: u32) -> Result<(), WorkerError> {
    drop_privileges(uid).map_err(|source| failed("become the user", source))?;
    let ids = [rustix::process::getuid(), rustix::process::geteuid()].map(Uid::as_raw);
    let groups = [rustix::process::getgid(), rustix::process::getegid()].map(Gid::as_raw);
    let none = CapabilitySet::empty();
    let left = rustix::thread::capabilities(None).map_err(|source| failed("look at what is left", source.into()))?;
    let gone = ids == [uid; 2]
        && groups == [uid; 2]
        && rustix::process::getgroups().is_ok_and(|groups| groups.is_empty())
        && (left.effective, left.permitted, left.inheritable) == (none, none, none)
        && rustix::thread::set_thread_uid(Uid::ROOT).is_err();
    if gone { Ok(()) } else { Err(failed("become the user", io::Error::other("rights of the gateway are left"))) }
}

fn drop_privileges(uid: u32) -> io::Result<()> {
    for number in 0..64 {
        match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // Beyond the kernel's last one.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(group, group, group)?;
    rustix::thread::set_thread_res_uid(user, user, user)?;
    let none = CapabilitySet::empty();
    let none = rustix::thread::CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, none)?;
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

/// The same view once more, by rules on files instead of mounts.
fn restrict_with_landlock(view: &View, require: bool) -> Result<(), WorkerError> {
    let status = apply_landlock(view, require).map_err(|error| {
        let advice = "Landlock is missing (Linux 5.19 or later with `landlock` among the security modules); \
                      `files.require_landlock = false` does without it";
        failed("use Landlock", io::Error::other(if require { format!("{error}: {advice}") } else { error.to_string() }))
    })?;
    match status {
        RulesetStatus::NotEnforced if require => Err(failed("use Landlock", io::Error::other("it is not enforced"))),
        _ => Ok(()),
    }
}

fn apply_landlock(view: &View, require: bool) -> Result<RulesetStatus, Box<dyn std::error::Error>> {
    let needed = if require { CompatLevel::HardRequirement } else { CompatLevel::BestEffort };
    // Without the rights of ABI 2 nothing could be moved from one folder to another.
    let mut rules = Ruleset::default()
        .set_compatibility(needed)
        .handle_access(AccessFs::from_all(ABI::V2))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new("/")?, AccessFs::ReadFile | AccessFs::ReadDir))?;
    for seen in &view.seen {
        let rights: BitFlags<AccessFs> = match seen.kind {
            // Special files cannot be made by sftp, but moved.
            Kind::Writable => {
                AccessFs::from_all(ABI::V3) & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock)
            }
            Kind::Executable => AccessFs::Execute | AccessFs::ReadFile,
            Kind::ReadOnly | Kind::Socket => continue,
        };
        rules = rules.add_rule(PathBeneath::new(PathFd::new(&seen.at)?, rights))?;
    }
    Ok(rules.restrict_self()?.ruleset)
}

/// When the gateway dies, so does the worker: nobody is left to speak to. (The kernel forgets this wish when
/// the uid changes, so it comes last.)
fn die_with_parent() -> io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_beneath_are_found() {
        let text = b"22 1 0:1 / / rw - ext4 x rw\n\
            23 22 0:2 / /data/home/alice rw - tmpfs tmpfs rw\n\
            24 23 0:3 / /data/home/alice/with\\040space rw shared:1 - tmpfs tmpfs rw\n\
            25 22 0:4 / /data/home/alice2 rw - tmpfs tmpfs rw\n";
        let found = mounts_in(text, Path::new("/data/home/alice"));
        assert_eq!(found, [Path::new("/data/home/alice"), Path::new("/data/home/alice/with space")]);
    }

    #[test]
    fn a_backslash_that_escapes_nothing_stays() {
        assert_eq!(unescape(b"a\\134b\\9\\"), b"a\\b\\9\\");
    }
}
