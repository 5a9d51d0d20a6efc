//! Absolute paths without symbolic links, as OpenSSH's server makes them.

use rustix::{fs::FileType, io::Errno};
use std::collections::VecDeque;

/// Symbolic links on the way, as in the kernel.
const MAX_LINKS: usize = 40;
/// Bytes of a path, as in the kernel.
const MAX_PATH: usize = 4096;

/// The absolute path that `path` leads to, starting from `folder`. Its last component need not exist.
pub(super) fn real(folder: &[u8], path: &[u8]) -> Result<Vec<u8>, Errno> {
    let mut left = VecDeque::new();
    let mut resolved = Vec::new();
    if !path.starts_with(b"/") {
        resolved.extend_from_slice(folder);
    }
    push_front(&mut left, path);
    let mut links = 0;
    while let Some(component) = left.pop_front() {
        match component.as_slice() {
            b"" | b"." => continue,
            b".." => {
                resolved.truncate(resolved.iter().rposition(|byte| *byte == b'/').unwrap_or(0));
                continue;
            }
            _ => {}
        }
        let parent = resolved.len();
        resolved.push(b'/');
        resolved.extend_from_slice(&component);
        if resolved.len() >= MAX_PATH {
            return Err(Errno::NAMETOOLONG);
        }
        let status = match rustix::fs::lstat(resolved.as_slice()) {
            Ok(status) => status,
            Err(Errno::NOENT) if left.iter().all(|rest| rest.is_empty() || rest == b".") => return Ok(resolved),
            Err(error) => return Err(error),
        };
        if FileType::from_raw_mode(status.st_mode).is_symlink() {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP);
            }
            let target = rustix::fs::readlink(resolved.as_slice(), Vec::new())?.into_bytes();
            resolved.truncate(if target.starts_with(b"/") { 0 } else { parent });
            push_front(&mut left, &target);
        }
    }
    if resolved.is_empty() {
        resolved.push(b'/');
    }
    Ok(resolved)
}

fn push_front(left: &mut VecDeque<Vec<u8>>, path: &[u8]) {
    for component in path.rsplit(|byte| *byte == b'/') {
        left.push_front(component.to_vec());
    }
}

/// `path` with a leading `~` or `~user` replaced by `home`.
pub(super) fn expand_home(user: &str, home: &[u8], path: &[u8]) -> Result<Vec<u8>, Errno> {
    let Some(rest) = path.strip_prefix(b"~") else { return Ok(path.to_vec()) };
    let end = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
    let (name, rest) = rest.split_at_checked(end).unwrap_or((rest, b""));
    if !name.is_empty() && name != user.as_bytes() {
        return Err(Errno::NOENT);
    }
    Ok([home, rest].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::{ffi::OsStrExt as _, fs::symlink};

    #[test]
    fn links_and_dots_are_resolved() {
        let folder = tempfile::tempdir().unwrap();
        let top = std::fs::canonicalize(folder.path()).unwrap();
        std::fs::create_dir_all(top.join("a/b")).unwrap();
        symlink("a/b", top.join("relative")).unwrap();
        symlink(top.join("a"), top.join("absolute")).unwrap();
        symlink("loop", top.join("loop")).unwrap();
        symlink("nowhere", top.join("dangling")).unwrap();
        let top = top.as_os_str().as_bytes();
        let real = |path: &str| real(top, path.as_bytes());
        let inside = |path: &str| Ok([top, path.as_bytes()].concat());
        assert_eq!(real("."), inside(""));
        assert_eq!(real(""), inside(""));
        assert_eq!(real("relative/../x"), inside("/a/x"));
        assert_eq!(real("absolute/b//./.."), inside("/a"));
        assert_eq!(real("new"), inside("/new"));
        assert_eq!(real("new/"), inside("/new"));
        assert_eq!(real("dangling"), inside("/nowhere"));
        assert_eq!(real("new/new"), Err(Errno::NOENT));
        assert_eq!(real("loop"), Err(Errno::LOOP));
        assert_eq!(real("/../.."), Ok(b"/".to_vec()));
        assert_eq!(real("/"), Ok(b"/".to_vec()));
    }

    #[test]
    fn the_tilde_is_the_home() {
        let expand = |path: &str| expand_home("alice", b"/home/alice", path.as_bytes());
        assert_eq!(expand("~"), Ok(b"/home/alice".to_vec()));
        assert_eq!(expand("~/x"), Ok(b"/home/alice/x".to_vec()));
        assert_eq!(expand("~alice/x"), Ok(b"/home/alice/x".to_vec()));
        assert_eq!(expand("~bob/x"), Err(Errno::NOENT));
        assert_eq!(expand("x~"), Ok(b"x~".to_vec()));
    }
}
