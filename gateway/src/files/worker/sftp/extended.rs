//! What each request of OpenSSH's extensions does.

use super::{
    handles::{MAX_HANDLES, Open},
    packet::{Extended, MAX_PACKET},
    paths,
    reply::{Replies, Status},
    requests::{MAX_TRANSFER, Server, invalid_handle, reply_name, retry},
};
use rustix::{
    fs::{AtFlags, CWD, StatVfs, StatVfsMountFlags},
    io::Errno,
};
use std::os::fd::{AsFd, BorrowedFd};

/// Bytes copied at once by `copy-data` where the kernel does it.
const COPY: usize = 16 << 20;

impl Server<'_> {
    pub(super) fn answer_extended(&mut self, id: u32, request: Extended<'_>, replies: &mut Replies) {
        match request {
            Extended::PosixRename { from, to } => replies.result(id, rustix::fs::rename(from, to)),
            Extended::Hardlink { from, to } => {
                replies.result(id, rustix::fs::linkat(CWD, from, CWD, to, AtFlags::empty()));
            }
            Extended::Statvfs { path } => reply_space(id, rustix::fs::statvfs(path), replies),
            Extended::Fstatvfs { handle } => match self.handles.any(handle) {
                Some(Open::File(file)) => reply_space(id, rustix::fs::fstatvfs(&file.file), replies),
                Some(Open::Folder(folder)) => reply_space(id, folder.statvfs(), replies),
                None => invalid_handle(id, replies),
            },
            Extended::Fsync { handle } => {
                let Some(file) = self.handles.file(handle) else { return invalid_handle(id, replies) };
                let synced = retry(|| rustix::fs::fsync(&file.file));
                let path = file.path.clone();
                self.tell(&path, synced.as_ref().err());
                replies.result(id, synced);
            }
            Extended::Lsetstat { path, attributes } => replies.result(id, attributes.set_on_link(path)),
            Extended::Limits => replies.extended(id, |reply| {
                for limit in [MAX_PACKET, MAX_TRANSFER, MAX_TRANSFER, MAX_HANDLES] {
                    reply.put(&(limit as u64).to_be_bytes());
                }
            }),
            Extended::ExpandPath { path } => {
                let path = paths::expand_home(&self.jail.user, &self.home, path);
                reply_name(id, path.and_then(|path| paths::real(&self.home, &path)), replies);
            }
            Extended::CopyData { from, from_offset, length, to, to_offset } => {
                self.copy(id, (from, from_offset), length, (to, to_offset), replies);
            }
            Extended::HomeDirectory { user } if user.is_empty() || user == self.jail.user.as_bytes() => {
                replies.name(id, &self.home);
            }
            Extended::HomeDirectory { .. } => replies.status(id, Status::NoSuchFile, "No such user"),
            Extended::UsersGroupsById { uids, gids } => self.reply_users_and_groups(id, uids, gids, replies),
            Extended::Unknown => replies.status(id, Status::OpUnsupported, "Operation unsupported"),
        }
    }

    fn copy(&mut self, id: u32, from: (&[u8], u64), length: u64, to: (&[u8], u64), replies: &mut Replies) {
        let open = |this: &mut Self, handle| {
            let file = this.handles.file(handle)?;
            // A second descriptor, because the table lends one file at a time.
            Some((file.file.try_clone().map_err(|_| Errno::MFILE), file.path.clone()))
        };
        let (Some((source, _)), Some((target, path))) = (open(self, from.0), open(self, to.0)) else {
            return invalid_handle(id, replies);
        };
        let copied = source
            .and_then(|source| target.map(|target| (source, target)))
            .and_then(|(source, target)| copy_data(source.as_fd(), from.1, length, target.as_fd(), to.1));
        match copied {
            Ok(true) => replies.ok(id),
            Ok(false) => replies.status(id, Status::Eof, "End of file"),
            Err(error) => {
                self.tell(&path, Some(&error));
                replies.error(id, error);
            }
        }
    }

    fn reply_users_and_groups(&self, id: u32, uids: &[u8], gids: &[u8], replies: &mut Replies) {
        let names = |ids: &[u8]| -> Vec<u8> {
            let mut list = Vec::new();
            for number in ids.as_chunks::<4>().0 {
                let name = self.names.of(u32::from_be_bytes(*number)).unwrap_or_default();
                list.extend_from_slice(&u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
                list.extend_from_slice(name.as_bytes());
            }
            list
        };
        let (users, groups) = (names(uids), names(gids));
        if users.len() + groups.len() > MAX_TRANSFER {
            return replies.status(id, Status::BadMessage, "Too many ids at once");
        }
        replies.extended(id, |reply| {
            reply.string(&users);
            reply.string(&groups);
        });
    }
}

fn reply_space(id: u32, space: Result<StatVfs, Errno>, replies: &mut Replies) {
    let space = match space {
        Ok(space) => space,
        Err(error) => return replies.error(id, error),
    };
    let has = |flag, bit| if space.f_flag.contains(flag) { bit } else { 0_u64 };
    let flags = has(StatVfsMountFlags::RDONLY, 1) | has(StatVfsMountFlags::NOSUID, 2);
    replies.extended(id, |reply| {
        for number in [
            space.f_bsize,
            space.f_frsize,
            space.f_blocks,
            space.f_bfree,
            space.f_bavail,
            space.f_files,
            space.f_ffree,
            space.f_favail,
            space.f_fsid,
            flags,
            space.f_namemax,
        ] {
            reply.put(&number.to_be_bytes());
        }
    });
}

/// Copies `length` bytes, or up to the end if it is 0; false if the end came before. As in OpenSSH, not
/// within one file.
fn copy_data(
    source: BorrowedFd<'_>,
    mut from: u64,
    length: u64,
    target: BorrowedFd<'_>,
    mut to: u64,
) -> Result<bool, Errno> {
    let identity = |file| rustix::fs::fstat(file).map(|status| (status.st_dev, status.st_ino));
    if identity(source)? == identity(target)? {
        return Err(Errno::INVAL);
    }
    let mut left = if length == 0 { u64::MAX } else { length };
    let mut by_kernel = true;
    let mut buffer = Vec::new();
    while left > 0 {
        let chunk = usize::try_from(left).unwrap_or(COPY).min(COPY);
        let copied = if by_kernel {
            let (mut read_at, mut write_at) = (from, to);
            match retry(|| rustix::fs::copy_file_range(source, Some(&mut read_at), target, Some(&mut write_at), chunk))
            {
                // Not between these file systems, or not into a file opened for appending.
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::BADF) => {
                    by_kernel = false;
                    buffer.resize(MAX_TRANSFER, 0);
                    continue;
                }
                copied => copied?,
            }
        } else {
            copy_chunk(source, from, target, to, buffer.get_mut(..chunk.min(MAX_TRANSFER)).unwrap_or_default())?
        };
        if copied == 0 {
            return Ok(length == 0);
        }
        (from, to, left) = (from + copied as u64, to + copied as u64, left - copied as u64);
    }
    Ok(true)
}

fn copy_chunk(
    source: BorrowedFd<'_>,
    from: u64,
    target: BorrowedFd<'_>,
    to: u64,
    buffer: &mut [u8],
) -> Result<usize, Errno> {
    let count = retry(|| rustix::io::pread(source, &mut *buffer, from))?;
    let mut rest = buffer.get(..count).unwrap_or_default();
    let mut at = to;
    while !rest.is_empty() {
        let written = retry(|| rustix::io::pwrite(target, rest, at))?;
        if written == 0 {
            return Err(Errno::IO);
        }
        at += written as u64;
        rest = rest.get(written..).unwrap_or_default();
    }
    Ok(count)
}
