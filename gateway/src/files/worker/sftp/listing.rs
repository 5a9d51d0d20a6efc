//! Folders: the next entries, each with a line as of `ls -l`.

use super::{super::names::Names, attributes};
use jiff::Timestamp;
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, Stat},
    io::Errno,
};

/// Bytes of entries in one reply: what every client can take.
const BATCH: usize = 32 * 1024;

/// The next entries of a folder, encoded.
pub(super) struct Batch {
    pub(super) count: u32,
    pub(super) encoded: Vec<u8>,
}

/// Reads the next entries; none at the end. Those that vanish meanwhile are left out.
pub(super) fn next_batch(folder: &mut Dir, names: &Names) -> Result<Batch, Errno> {
    let mut batch = Batch { count: 0, encoded: Vec::with_capacity(BATCH + 1024) };
    let now = Timestamp::now();
    while batch.encoded.len() < BATCH {
        let Some(entry) = folder.read() else { break };
        let entry = match entry {
            Ok(entry) => entry,
            // What was read already must not be lost; the error comes again.
            Err(_) if batch.count > 0 => break,
            Err(error) => return Err(error),
        };
        let name = entry.file_name();
        let Ok(status) = rustix::fs::statat(folder.fd()?, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        let name = name.to_bytes();
        push_string(&mut batch.encoded, &[name]);
        push_string(&mut batch.encoded, &[long_line(&status, names, now).as_bytes(), name]);
        batch.encoded.extend_from_slice(&attributes::encode(&status));
        batch.count += 1;
    }
    Ok(batch)
}

fn push_string(encoded: &mut Vec<u8>, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    encoded.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    parts.iter().for_each(|part| encoded.extend_from_slice(part));
}

/// The line of `ls -l`, up to the name.
fn long_line(status: &Stat, names: &Names, now: Timestamp) -> String {
    let owner = |id: u32| names.of(id).map_or_else(|| id.to_string(), str::to_owned);
    format!(
        "{} {:>3} {:<8} {:<8} {:>8} {} ",
        mode_text(status.st_mode),
        status.st_nlink,
        owner(status.st_uid),
        owner(status.st_gid),
        status.st_size,
        names.time(status.st_mtime, now),
    )
}

/// `-rwxr-xr-x`.
fn mode_text(raw: u32) -> String {
    let kind = match FileType::from_raw_mode(raw) {
        FileType::Directory => 'd',
        FileType::Symlink => 'l',
        FileType::Fifo => 'p',
        FileType::Socket => 's',
        FileType::CharacterDevice => 'c',
        FileType::BlockDevice => 'b',
        FileType::RegularFile => '-',
        FileType::Unknown => '?',
    };
    let mode = Mode::from_raw_mode(raw);
    let rights = [
        (Mode::RUSR, Mode::WUSR, Mode::XUSR, Mode::SUID, 's', 'S'),
        (Mode::RGRP, Mode::WGRP, Mode::XGRP, Mode::SGID, 's', 'S'),
        (Mode::ROTH, Mode::WOTH, Mode::XOTH, Mode::SVTX, 't', 'T'),
    ];
    let mut text = String::from(kind);
    for (read, write, execute, special, with, without) in rights {
        text.push(if mode.contains(read) { 'r' } else { '-' });
        text.push(if mode.contains(write) { 'w' } else { '-' });
        text.push(match (mode.contains(special), mode.contains(execute)) {
            (true, true) => with,
            (true, false) => without,
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::mode_text;

    #[test]
    fn modes_read_as_in_ls() {
        assert_eq!(mode_text(0o100_644), "-rw-r--r--");
        assert_eq!(mode_text(0o041_777), "drwxrwxrwt");
        assert_eq!(mode_text(0o104_755), "-rwsr-xr-x");
        assert_eq!(mode_text(0o102_640), "-rw-r-S---");
        assert_eq!(mode_text(0o120_777), "lrwxrwxrwx");
    }
}
