//! What each request does.

use super::{
    super::{names::Names, output},
    attributes::{self, Attributes},
    handles::{Handles, Open, OpenFile},
    listing,
    packet::{MAX_PACKET, Request},
    paths,
    reply::{Replies, Status, text_of},
};
use crate::files::Jail;
use rustix::{
    fs::{Advice, AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags},
    io::Errno,
};
use std::os::unix::ffi::OsStringExt as _;

/// Bytes of one read or write.
pub(super) const MAX_TRANSFER: usize = MAX_PACKET - 1024;

const READ: u32 = 1;
const WRITE: u32 = 2;
const APPEND: u32 = 4;
const CREATE: u32 = 8;
const TRUNCATE: u32 = 16;
const EXCLUSIVE: u32 = 32;

/// The state of a session.
pub(super) struct Server<'a> {
    pub(super) jail: &'a Jail,
    pub(super) names: &'a Names,
    /// As the user sees it.
    pub(super) home: Vec<u8>,
    pub(super) handles: Handles,
}

impl<'a> Server<'a> {
    pub(super) fn new(jail: &'a Jail, names: &'a Names) -> Self {
        let home = jail.virtual_home().into_os_string().into_vec();
        Self { jail, names, home, handles: Handles::default() }
    }

    /// Does what is asked for and answers exactly once.
    pub(super) fn answer(&mut self, id: u32, request: Request<'_>, replies: &mut Replies) {
        match request {
            Request::Open { path, flags, attributes } => {
                let opened = self.open(path, flags, &attributes);
                self.tell(path, opened.as_ref().err());
                reply_handle(id, opened, replies);
            }
            Request::Close { handle } => match self.handles.remove(handle) {
                None => invalid_handle(id, replies),
                Some(Open::Folder(_)) => replies.ok(id),
                // On network file systems this is where a write may fail.
                Some(Open::File(file)) => {
                    let closed = nix::unistd::close(file.file).map_err(|error| Errno::from_raw_os_error(error as i32));
                    self.tell(&file.path, closed.as_ref().err());
                    replies.result(id, closed);
                }
            },
            Request::Read { handle, offset, length } => self.read(id, handle, offset, length, replies),
            Request::Write { handle, offset, data } => self.write(id, handle, offset, data, replies),
            Request::Lstat { path } => reply_status(id, rustix::fs::lstat(path), replies),
            Request::Stat { path } => reply_status(id, rustix::fs::stat(path), replies),
            Request::Fstat { handle } => match self.handles.any(handle) {
                Some(Open::File(file)) => reply_status(id, rustix::fs::fstat(&file.file), replies),
                Some(Open::Folder(folder)) => reply_status(id, folder.stat(), replies),
                None => invalid_handle(id, replies),
            },
            Request::Setstat { path, attributes } => replies.result(id, attributes.set_on_path(path)),
            Request::Fsetstat { handle, attributes } => match self.handles.any(handle) {
                Some(Open::File(file)) => replies.result(id, attributes.set_on_file(&file.file)),
                Some(Open::Folder(folder)) => {
                    replies.result(id, folder.fd().and_then(|folder| attributes.set_on_file(folder)));
                }
                None => invalid_handle(id, replies),
            },
            Request::Opendir { path } => reply_handle(id, self.open_folder(path), replies),
            Request::Readdir { handle } => self.read_folder(id, handle, replies),
            Request::Remove { path } => replies.result(id, rustix::fs::unlink(path)),
            Request::Mkdir { path, attributes } => {
                let made = rustix::fs::mkdir(path, attributes.mode_or(0o777));
                self.tell(path, made.as_ref().err());
                replies.result(id, made);
            }
            Request::Rmdir { path } => replies.result(id, rustix::fs::rmdir(path)),
            Request::Realpath { path } => reply_name(id, paths::real(&self.home, path), replies),
            Request::Rename { from, to } => replies.result(id, rename_to_new(from, to)),
            Request::Readlink { path } => {
                let target = rustix::fs::readlink(path, Vec::new());
                reply_name(id, target.map(|target| target.into_bytes()), replies);
            }
            Request::Symlink { target, link } => replies.result(id, rustix::fs::symlink(target, link)),
            Request::Extended(extended) => self.answer_extended(id, extended, replies),
            Request::Unknown => replies.status(id, Status::OpUnsupported, "Operation unsupported"),
        }
    }

    fn open(&mut self, path: &[u8], flags: u32, attributes: &Attributes) -> Result<[u8; 8], Errno> {
        self.handles.check_room()?;
        let has = |flag| flags & flag != 0;
        let mut open = match (has(READ), has(WRITE)) {
            (true, true) => OFlags::RDWR,
            (false, true) => OFlags::WRONLY,
            _ => OFlags::RDONLY,
        };
        open.set(OFlags::APPEND, has(APPEND));
        open.set(OFlags::CREATE, has(CREATE));
        open.set(OFlags::TRUNC, has(TRUNCATE));
        open.set(OFlags::EXCL, has(EXCLUSIVE));
        // A pipe must not stop the session.
        open |= OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, open, attributes.mode_or(0o666))?;
        match FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
            FileType::RegularFile if has(READ) => {
                // Only advice.
                let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
            }
            FileType::RegularFile | FileType::Directory => {}
            _ => return Err(Errno::NXIO),
        }
        self.handles.add(Open::File(OpenFile { file, path: path.to_vec(), complained: false }))
    }

    fn open_folder(&mut self, path: &[u8]) -> Result<[u8; 8], Errno> {
        self.handles.check_room()?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(path, flags, Mode::empty())?;
        self.handles.add(Open::Folder(Dir::new(folder)?))
    }

    fn read(&mut self, id: u32, handle: &[u8], offset: u64, length: u32, replies: &mut Replies) {
        let Some(file) = self.handles.file(handle) else { return invalid_handle(id, replies) };
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(MAX_TRANSFER);
        let read =
            replies.data(id, length, |place| match retry(|| rustix::io::pread(&file.file, &mut *place, offset))? {
                0 if length > 0 => Err(END),
                count => Ok(count),
            });
        match read {
            Ok(()) => {}
            Err(END) => replies.status(id, Status::Eof, "End of file"),
            Err(error) => replies.error(id, error),
        }
    }

    fn write(&mut self, id: u32, handle: &[u8], offset: u64, data: &[u8], replies: &mut Replies) {
        let Some(file) = self.handles.file(handle) else { return invalid_handle(id, replies) };
        let written = write_all(file, offset, data);
        if let Err(error) = &written
            && !file.complained
        {
            file.complained = true;
            let path = file.path.clone();
            self.tell(&path, Some(error));
        }
        replies.result(id, written);
    }

    fn read_folder(&mut self, id: u32, handle: &[u8], replies: &mut Replies) {
        let Some(folder) = self.handles.folder(handle) else { return invalid_handle(id, replies) };
        match listing::next_batch(folder, self.names) {
            Ok(batch) if batch.count == 0 => replies.status(id, Status::Eof, "End of file"),
            Ok(batch) => replies.names(id, batch.count, &batch.encoded),
            Err(error) => replies.error(id, error),
        }
    }

    /// OpenSSH's client shows `Failure` for what version 3 has no number for. That a disk is full the person
    /// is told by standard error, which clients show.
    pub(super) fn tell(&self, path: &[u8], error: Option<&Errno>) {
        if let Some(error @ &(Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::IO | Errno::MFILE)) = error {
            let path = if path.starts_with(b"/") { path.to_vec() } else { [&self.home, &b"/"[..], path].concat() };
            output::complain(&[&path, &b": "[..], text_of(*error).as_bytes()].concat());
        }
    }
}

/// Never an error of a read; stands for its end.
const END: Errno = Errno::NODATA;

fn write_all(file: &OpenFile, mut offset: u64, mut data: &[u8]) -> Result<(), Errno> {
    while !data.is_empty() {
        let count = retry(|| rustix::io::pwrite(&file.file, data, offset))?;
        if count == 0 {
            return Err(Errno::IO);
        }
        offset = offset.saturating_add(count as u64);
        data = data.get(count..).unwrap_or_default();
    }
    Ok(())
}

/// Again if a signal interrupted it.
pub(super) fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// The rename of version 3, which replaces nothing.
fn rename_to_new(from: &[u8], to: &[u8]) -> Result<(), Errno> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system can; then as OpenSSH does.
        Err(Errno::INVAL | Errno::NOSYS) => {}
        result => return result,
    }
    if FileType::from_raw_mode(rustix::fs::lstat(from)?.st_mode).is_file() {
        rustix::fs::linkat(CWD, from, CWD, to, AtFlags::empty())?;
        return rustix::fs::unlink(from);
    }
    match rustix::fs::lstat(to) {
        Err(Errno::NOENT) => rustix::fs::rename(from, to),
        Err(error) => Err(error),
        Ok(_) => Err(Errno::EXIST),
    }
}

pub(super) fn invalid_handle(id: u32, replies: &mut Replies) {
    replies.status(id, Status::Failure, "Invalid handle");
}

pub(super) fn reply_name(id: u32, name: Result<Vec<u8>, Errno>, replies: &mut Replies) {
    match name {
        Ok(name) => replies.name(id, &name),
        Err(error) => replies.error(id, error),
    }
}

fn reply_handle(id: u32, handle: Result<[u8; 8], Errno>, replies: &mut Replies) {
    match handle {
        Ok(handle) => replies.handle(id, &handle),
        Err(error) => replies.error(id, error),
    }
}

fn reply_status(id: u32, status: Result<rustix::fs::Stat, Errno>, replies: &mut Replies) {
    match status {
        Ok(status) => replies.attributes(id, &attributes::encode(&status)),
        Err(error) => replies.error(id, error),
    }
}
