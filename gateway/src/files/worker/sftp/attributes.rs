//! Attributes of files: what a client asks to be set, what it is told.

use super::packet::Fields;
use rustix::{
    fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid},
    io::Errno,
};
use std::os::fd::AsFd;

const SIZE: u32 = 1;
const OWNER: u32 = 2;
const PERMISSIONS: u32 = 4;
const TIMES: u32 = 8;
const EXTENDED: u32 = 1 << 31;
/// Pairs of extended attributes; they are read and ignored.
const MAX_EXTENDED: u32 = 64;

/// What a client asks to be set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) size: Option<u64>,
    /// Uid and gid.
    pub(super) owner: Option<(u32, u32)>,
    /// Permissions without the kind of file.
    pub(super) permissions: Option<u32>,
    /// Of last access and last change, in seconds since 1970.
    pub(super) times: Option<(u32, u32)>,
}

impl Attributes {
    pub(super) fn parse(fields: &mut Fields<'_>) -> Option<Self> {
        let flags = fields.u32()?;
        let has = |flag| flags & flag != 0;
        let size = if has(SIZE) { Some(fields.u64()?) } else { None };
        let owner = if has(OWNER) { Some((fields.u32()?, fields.u32()?)) } else { None };
        let permissions = if has(PERMISSIONS) { Some(fields.u32()? & 0o7777) } else { None };
        let times = if has(TIMES) { Some((fields.u32()?, fields.u32()?)) } else { None };
        if has(EXTENDED) {
            let count = fields.u32()?;
            if count > MAX_EXTENDED {
                return None;
            }
            for _ in 0..count {
                fields.string()?;
                fields.string()?;
            }
        }
        Some(Self { size, owner, permissions, times })
    }

    /// The mode of something to be made; the mask applies to it.
    pub(super) fn mode_or(&self, default: u32) -> Mode {
        Mode::from_raw_mode(self.permissions.unwrap_or(default))
    }

    /// Sets them on what `path` leads to. All are tried; the last error counts, as in OpenSSH.
    pub(super) fn set_on_path(&self, path: &[u8]) -> Result<(), Errno> {
        let size = self.size.map_or(Ok(()), |size| {
            // Not blocked by a pipe; truncating one is an error.
            let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            rustix::fs::ftruncate(rustix::fs::open(path, flags, Mode::empty())?, size)
        });
        let permissions = self.set_permissions(|mode| rustix::fs::chmod(path, mode));
        let times = self.set_times(|times| rustix::fs::utimensat(CWD, path, times, AtFlags::empty()));
        let owner = self.set_owner(|uid, gid| rustix::fs::chownat(CWD, path, uid, gid, AtFlags::empty()));
        last_error([size, permissions, times, owner])
    }

    /// Sets them on `path` itself, be it a symbolic link. A size cannot be set so.
    pub(super) fn set_on_link(&self, path: &[u8]) -> Result<(), Errno> {
        let size = self.size.map_or(Ok(()), |_| Err(Errno::INVAL));
        let permissions = self.set_permissions(|mode| match rustix::fs::lstat(path)? {
            link if FileType::from_raw_mode(link.st_mode).is_symlink() => Err(Errno::OPNOTSUPP),
            // Should it become a link just now, a file of the user's own gets the mode.
            _ => rustix::fs::chmod(path, mode),
        });
        let times = self.set_times(|times| rustix::fs::utimensat(CWD, path, times, AtFlags::SYMLINK_NOFOLLOW));
        let owner = self.set_owner(|uid, gid| rustix::fs::chownat(CWD, path, uid, gid, AtFlags::SYMLINK_NOFOLLOW));
        last_error([size, permissions, times, owner])
    }

    /// Sets them on an open file.
    pub(super) fn set_on_file(&self, file: impl AsFd) -> Result<(), Errno> {
        let file = file.as_fd();
        let size = self.size.map_or(Ok(()), |size| rustix::fs::ftruncate(file, size));
        let permissions = self.set_permissions(|mode| rustix::fs::fchmod(file, mode));
        let times = self.set_times(|times| rustix::fs::futimens(file, times));
        let owner = self.set_owner(|uid, gid| rustix::fs::fchown(file, uid, gid));
        last_error([size, permissions, times, owner])
    }

    fn set_permissions(&self, set: impl FnOnce(Mode) -> Result<(), Errno>) -> Result<(), Errno> {
        self.permissions.map_or(Ok(()), |mode| set(Mode::from_raw_mode(mode)))
    }

    fn set_times(&self, set: impl FnOnce(&Timestamps) -> Result<(), Errno>) -> Result<(), Errno> {
        let at = |seconds: u32| Timespec { tv_sec: seconds.into(), tv_nsec: 0 };
        self.times.map_or(Ok(()), |(access, change)| {
            set(&Timestamps { last_access: at(access), last_modification: at(change) })
        })
    }

    /// The kernel refuses any but the present ones.
    fn set_owner(&self, set: impl FnOnce(Option<Uid>, Option<Gid>) -> Result<(), Errno>) -> Result<(), Errno> {
        self.owner.map_or(Ok(()), |(uid, gid)| {
            if uid == u32::MAX || gid == u32::MAX {
                return Err(Errno::PERM);
            }
            set(Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
        })
    }
}

fn last_error(results: [Result<(), Errno>; 4]) -> Result<(), Errno> {
    results.into_iter().rev().find(Result::is_err).unwrap_or(Ok(()))
}

/// What a client is told of a file: all four.
pub(super) fn encode(status: &Stat) -> [u8; 32] {
    let mut bytes = [0; 32];
    let size = u64::try_from(status.st_size).unwrap_or(0);
    let fields: [&[u8]; 7] = [
        &(SIZE | OWNER | PERMISSIONS | TIMES).to_be_bytes(),
        &size.to_be_bytes(),
        &status.st_uid.to_be_bytes(),
        &status.st_gid.to_be_bytes(),
        &status.st_mode.to_be_bytes(),
        &seconds(status.st_atime).to_be_bytes(),
        &seconds(status.st_mtime).to_be_bytes(),
    ];
    let mut rest = &mut bytes[..];
    for field in fields {
        let Some((head, tail)) = rest.split_at_mut_checked(field.len()) else { break };
        head.copy_from_slice(field);
        rest = tail;
    }
    bytes
}

/// A time in the 32 bits version 3 has for it: until 2106.
fn seconds<T: TryInto<u32> + PartialOrd + Default>(time: T) -> u32 {
    if time < T::default() { 0 } else { time.try_into().unwrap_or(u32::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_clamped() {
        assert_eq!((seconds(-1_i64), seconds(5_i64), seconds(i64::MAX)), (0, 5, u32::MAX));
    }
}
