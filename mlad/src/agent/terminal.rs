//! A pseudo-terminal: its making, its modes (RFC 4254 section 8), its size, and its bytes.

use super::account::User;
use crate::channel::{PtySize, register};
use bytes::{Buf, Bytes};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    pty::OpenptFlags,
    termios::{ControlModes, InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, Winsize},
};
use std::{
    ffi::OsString,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStringExt as _},
};
use tokio::io::{Interest, unix::AsyncFd};

/// The master side. When it is dropped, the terminal is hung up.
#[derive(Debug)]
pub(super) struct Terminal {
    master: AsyncFd<OwnedFd>,
    name: OsString,
}

impl Terminal {
    /// Makes a terminal that belongs to the user; also returns the slave side.
    pub(super) fn open(user: &User, size: PtySize, modes: Bytes) -> io::Result<(Self, OwnedFd)> {
        let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        rustix::pty::grantpt(&master)?;
        rustix::pty::unlockpt(&master)?;
        let name = OsString::from_vec(rustix::pty::ptsname(&master, Vec::new())?.into_bytes());
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        if rustix::process::geteuid().is_root() {
            rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(user.uid)), None)?;
        }
        rustix::fs::fchmod(&slave, Mode::from_raw_mode(0o620))?;
        let mut settings = rustix::termios::tcgetattr(&slave)?;
        apply(&mut settings, modes);
        rustix::termios::tcsetattr(&slave, OptionalActions::Now, &settings)?;
        rustix::fs::fcntl_setfl(&master, rustix::fs::fcntl_getfl(&master)? | OFlags::NONBLOCK)?;
        let terminal = Self { master: register(master, Interest::READABLE | Interest::WRITABLE)?, name };
        terminal.resize(size)?;
        Ok((terminal, slave))
    }

    /// The path of the slave side.
    pub(super) fn name(&self) -> &OsString {
        &self.name
    }

    pub(super) fn resize(&self, size: PtySize) -> io::Result<()> {
        let clamp = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let size = Winsize {
            ws_row: clamp(size.rows),
            ws_col: clamp(size.columns),
            ws_xpixel: clamp(size.width),
            ws_ypixel: clamp(size.height),
        };
        Ok(rustix::termios::tcsetwinsize(&self.master, size)?)
    }

    /// Reads what there is, at least a byte; 0 once nobody has the terminal open any more, also if somebody opens it
    /// again later. Cancel-safe.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.master.readable().await?;
            let hung_up = guard.ready().is_read_closed();
            match guard.try_io(|master| read_available(master.get_ref(), buffer)) {
                Ok(result) => return result,
                Err(_) if hung_up => return Ok(0),
                Err(_) => {}
            }
        }
    }

    /// Reads what there is now; 0 when there is nothing.
    pub(super) fn read_now(&self, buffer: &mut [u8]) -> usize {
        read_available(self.master.get_ref(), buffer).unwrap_or(0)
    }

    /// Writes some of `bytes`, waiting while the terminal takes none. Cancel-safe.
    ///
    /// # Errors
    /// When nobody has the terminal open any more. (The kernel itself then says "try again", for ever.)
    pub(super) async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.master.writable().await?;
            let hung_up = guard.ready().is_write_closed();
            match guard.try_io(|master| Ok(rustix::io::write(master.get_ref(), bytes)?)) {
                Ok(result) => return result,
                Err(_) if hung_up => return Err(io::ErrorKind::BrokenPipe.into()),
                Err(_) => {}
            }
        }
    }
}

/// A terminal gives a few kilobytes at a time: as many times as fit. `EIO` is its end of file.
fn read_available(master: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(room) = buffer.get_mut(filled..).filter(|room| !room.is_empty()) {
        match rustix::io::read(master, room) {
            Ok(0) | Err(Errno::IO) => break,
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(_) if filled > 0 => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(filled)
}

/// Applies encoded modes, as far as they are known. An unknown one is skipped, as OpenSSH does; one of which
/// the length cannot be known ends them.
fn apply(settings: &mut Termios, mut modes: Bytes) {
    while let Ok(opcode @ 1..160) = modes.try_get_u8() {
        let Ok(value) = modes.try_get_u32() else { return };
        apply_one(settings, opcode, value);
    }
}

fn apply_one(settings: &mut Termios, opcode: u8, value: u32) {
    let on = value != 0;
    if let Some(index) = special_code(opcode) {
        // 255 is "no such character" on the wire, 0 is here.
        let byte = u8::try_from(value).ok().filter(|byte| *byte != 255).unwrap_or(0);
        settings.special_codes[index] = byte;
    } else if let Some(mode) = input_mode(opcode) {
        settings.input_modes.set(mode, on);
    } else if let Some(mode) = local_mode(opcode) {
        settings.local_modes.set(mode, on);
    } else if let Some(mode) = output_mode(opcode) {
        settings.output_modes.set(mode, on);
    } else {
        apply_control(settings, opcode, value);
    }
}

fn apply_control(settings: &mut Termios, opcode: u8, value: u32) {
    let modes = &mut settings.control_modes;
    match (opcode, value) {
        (90, 1..) if !modes.contains(ControlModes::CS8) => {
            modes.remove(ControlModes::CSIZE);
            modes.insert(ControlModes::CS7);
        }
        (91, 1..) => {
            modes.remove(ControlModes::CSIZE);
            modes.insert(ControlModes::CS8);
        }
        (92, _) => modes.set(ControlModes::PARENB, value != 0),
        (93, _) => modes.set(ControlModes::PARODD, value != 0),
        // A speed no terminal has is not worth refusing a terminal for.
        (128, _) => drop(settings.set_input_speed(value)),
        (129, _) => drop(settings.set_output_speed(value)),
        _ => {}
    }
}

fn special_code(opcode: u8) -> Option<SpecialCodeIndex> {
    Some(match opcode {
        1 => SpecialCodeIndex::VINTR,
        2 => SpecialCodeIndex::VQUIT,
        3 => SpecialCodeIndex::VERASE,
        4 => SpecialCodeIndex::VKILL,
        5 => SpecialCodeIndex::VEOF,
        6 => SpecialCodeIndex::VEOL,
        7 => SpecialCodeIndex::VEOL2,
        8 => SpecialCodeIndex::VSTART,
        9 => SpecialCodeIndex::VSTOP,
        10 => SpecialCodeIndex::VSUSP,
        12 => SpecialCodeIndex::VREPRINT,
        13 => SpecialCodeIndex::VWERASE,
        14 => SpecialCodeIndex::VLNEXT,
        16 => SpecialCodeIndex::VSWTC,
        18 => SpecialCodeIndex::VDISCARD,
        _ => return None,
    })
}

fn input_mode(opcode: u8) -> Option<InputModes> {
    Some(match opcode {
        30 => InputModes::IGNPAR,
        31 => InputModes::PARMRK,
        32 => InputModes::INPCK,
        33 => InputModes::ISTRIP,
        34 => InputModes::INLCR,
        35 => InputModes::IGNCR,
        36 => InputModes::ICRNL,
        37 => InputModes::IUCLC,
        38 => InputModes::IXON,
        39 => InputModes::IXANY,
        40 => InputModes::IXOFF,
        41 => InputModes::IMAXBEL,
        42 => InputModes::IUTF8,
        _ => return None,
    })
}

fn local_mode(opcode: u8) -> Option<LocalModes> {
    Some(match opcode {
        50 => LocalModes::ISIG,
        51 => LocalModes::ICANON,
        52 => LocalModes::XCASE,
        53 => LocalModes::ECHO,
        54 => LocalModes::ECHOE,
        55 => LocalModes::ECHOK,
        56 => LocalModes::ECHONL,
        57 => LocalModes::NOFLSH,
        58 => LocalModes::TOSTOP,
        59 => LocalModes::IEXTEN,
        60 => LocalModes::ECHOCTL,
        61 => LocalModes::ECHOKE,
        62 => LocalModes::PENDIN,
        _ => return None,
    })
}

fn output_mode(opcode: u8) -> Option<OutputModes> {
    Some(match opcode {
        70 => OutputModes::OPOST,
        71 => OutputModes::OLCUC,
        72 => OutputModes::ONLCR,
        73 => OutputModes::OCRNL,
        74 => OutputModes::ONOCR,
        75 => OutputModes::ONLRET,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::{BufMut as _, BytesMut};
    use proptest::prelude::*;

    fn settings() -> Termios {
        let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        rustix::termios::tcgetattr(&master).unwrap()
    }

    fn encoded(modes: &[(u8, u32)]) -> Bytes {
        let mut bytes = BytesMut::new();
        for (opcode, value) in modes {
            bytes.put_u8(*opcode);
            bytes.put_u32(*value);
        }
        bytes.put_u8(0);
        bytes.freeze()
    }

    #[test]
    fn modes_are_applied() {
        let mut it = settings();
        apply(
            &mut it,
            encoded(&[(1, 7), (3, 255), (36, 0), (42, 1), (53, 0), (72, 0), (91, 1), (90, 1), (17, 5), (128, 9600)]),
        );
        assert_eq!(it.special_codes[SpecialCodeIndex::VINTR], 7);
        assert_eq!(it.special_codes[SpecialCodeIndex::VERASE], 0);
        assert!(!it.input_modes.contains(InputModes::ICRNL));
        assert!(it.input_modes.contains(InputModes::IUTF8));
        assert!(!it.local_modes.contains(LocalModes::ECHO));
        assert!(!it.output_modes.contains(OutputModes::ONLCR));
        assert_eq!(it.control_modes & ControlModes::CSIZE, ControlModes::CS8);
        assert_eq!(it.input_speed(), 9600);
    }

    #[test]
    fn modes_end_at_what_has_no_known_length() {
        let mut it = settings();
        let mut modes = BytesMut::from(&[160, 0, 0, 0, 0][..]);
        modes.extend_from_slice(&encoded(&[(53, 0)]));
        apply(&mut it, modes.freeze());
        assert!(it.local_modes.contains(LocalModes::ECHO));
    }

    proptest! {
        #[test]
        fn any_modes_are_taken(modes in proptest::collection::vec(any::<u8>(), 0..64)) {
            apply(&mut settings(), modes.into());
        }
    }
}
