//! Requests of SFTP version 3 (draft-ietf-secsh-filexfer-02) and of OpenSSH's extensions (its `PROTOCOL`),
//! parsed in place. Paths and names are bytes, whatever encoding they are in.

use super::attributes::Attributes;

/// Bytes of a packet, without its length: as OpenSSH's server.
pub(super) const MAX_PACKET: usize = 256 * 1024;
/// The version spoken.
pub(super) const VERSION: u32 = 3;

/// Extensions, as announced: name and version.
pub(super) const EXTENSIONS: [(&[u8], &[u8]); 11] = [
    (b"posix-rename@openssh.com", b"1"),
    (b"statvfs@openssh.com", b"2"),
    (b"fstatvfs@openssh.com", b"2"),
    (b"hardlink@openssh.com", b"1"),
    (b"fsync@openssh.com", b"1"),
    (b"lsetstat@openssh.com", b"1"),
    (b"limits@openssh.com", b"1"),
    (b"expand-path@openssh.com", b"1"),
    (b"copy-data", b"1"),
    (b"home-directory", b"1"),
    (b"users-groups-by-id@openssh.com", b"1"),
];

/// A packet from the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Packet<'a> {
    /// The first one: the client's version.
    Init(u32),
    /// Every other one.
    Request {
        /// The client's number for it, which the reply repeats.
        id: u32,
        /// What is asked for.
        request: Request<'a>,
    },
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request<'a> {
    Open {
        path: &'a [u8],
        flags: u32,
        attributes: Attributes,
    },
    Close {
        handle: &'a [u8],
    },
    Read {
        handle: &'a [u8],
        offset: u64,
        length: u32,
    },
    Write {
        handle: &'a [u8],
        offset: u64,
        data: &'a [u8],
    },
    Lstat {
        path: &'a [u8],
    },
    Fstat {
        handle: &'a [u8],
    },
    Setstat {
        path: &'a [u8],
        attributes: Attributes,
    },
    Fsetstat {
        handle: &'a [u8],
        attributes: Attributes,
    },
    Opendir {
        path: &'a [u8],
    },
    Readdir {
        handle: &'a [u8],
    },
    Remove {
        path: &'a [u8],
    },
    Mkdir {
        path: &'a [u8],
        attributes: Attributes,
    },
    Rmdir {
        path: &'a [u8],
    },
    Realpath {
        path: &'a [u8],
    },
    Stat {
        path: &'a [u8],
    },
    Rename {
        from: &'a [u8],
        to: &'a [u8],
    },
    Readlink {
        path: &'a [u8],
    },
    /// In the order OpenSSH sends them, which is not that of the draft.
    Symlink {
        target: &'a [u8],
        link: &'a [u8],
    },
    Extended(Extended<'a>),
    Unknown,
}

/// Requests of the extensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Extended<'a> {
    PosixRename {
        from: &'a [u8],
        to: &'a [u8],
    },
    Statvfs {
        path: &'a [u8],
    },
    Fstatvfs {
        handle: &'a [u8],
    },
    Hardlink {
        from: &'a [u8],
        to: &'a [u8],
    },
    Fsync {
        handle: &'a [u8],
    },
    Lsetstat {
        path: &'a [u8],
        attributes: Attributes,
    },
    Limits,
    ExpandPath {
        path: &'a [u8],
    },
    /// `length` 0 is up to the end.
    CopyData {
        from: &'a [u8],
        from_offset: u64,
        length: u64,
        to: &'a [u8],
        to_offset: u64,
    },
    HomeDirectory {
        user: &'a [u8],
    },
    /// Lists of 32-bit numbers.
    UsersGroupsById {
        uids: &'a [u8],
        gids: &'a [u8],
    },
    Unknown,
}

/// A packet that ends too early or contradicts itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed {
    /// Its number, if it got that far.
    pub(super) id: Option<u32>,
}

/// Parses a packet, given without its length. What follows the known fields is ignored, as OpenSSH does.
pub(super) fn parse(packet: &[u8]) -> Result<Packet<'_>, Malformed> {
    let mut fields = Fields(packet);
    let kind = fields.u8().ok_or(Malformed { id: None })?;
    let number = fields.u32().ok_or(Malformed { id: None })?;
    if kind == 1 {
        return Ok(Packet::Init(number));
    }
    let request = parse_request(kind, &mut fields).ok_or(Malformed { id: Some(number) })?;
    Ok(Packet::Request { id: number, request })
}

fn parse_request<'a>(kind: u8, fields: &mut Fields<'a>) -> Option<Request<'a>> {
    Some(match kind {
        3 => Request::Open { path: fields.string()?, flags: fields.u32()?, attributes: Attributes::parse(fields)? },
        4 => Request::Close { handle: fields.string()? },
        5 => Request::Read { handle: fields.string()?, offset: fields.u64()?, length: fields.u32()? },
        6 => Request::Write { handle: fields.string()?, offset: fields.u64()?, data: fields.string()? },
        7 => Request::Lstat { path: fields.string()? },
        8 => Request::Fstat { handle: fields.string()? },
        9 => Request::Setstat { path: fields.string()?, attributes: Attributes::parse(fields)? },
        10 => Request::Fsetstat { handle: fields.string()?, attributes: Attributes::parse(fields)? },
        11 => Request::Opendir { path: fields.string()? },
        12 => Request::Readdir { handle: fields.string()? },
        13 => Request::Remove { path: fields.string()? },
        14 => Request::Mkdir { path: fields.string()?, attributes: Attributes::parse(fields)? },
        15 => Request::Rmdir { path: fields.string()? },
        16 => Request::Realpath { path: fields.string()? },
        17 => Request::Stat { path: fields.string()? },
        18 => Request::Rename { from: fields.string()?, to: fields.string()? },
        19 => Request::Readlink { path: fields.string()? },
        20 => Request::Symlink { target: fields.string()?, link: fields.string()? },
        200 => Request::Extended(parse_extended(fields)?),
        _ => Request::Unknown,
    })
}

fn parse_extended<'a>(fields: &mut Fields<'a>) -> Option<Extended<'a>> {
    Some(match fields.string()? {
        b"posix-rename@openssh.com" => Extended::PosixRename { from: fields.string()?, to: fields.string()? },
        b"statvfs@openssh.com" => Extended::Statvfs { path: fields.string()? },
        b"fstatvfs@openssh.com" => Extended::Fstatvfs { handle: fields.string()? },
        b"hardlink@openssh.com" => Extended::Hardlink { from: fields.string()?, to: fields.string()? },
        b"fsync@openssh.com" => Extended::Fsync { handle: fields.string()? },
        b"lsetstat@openssh.com" => {
            Extended::Lsetstat { path: fields.string()?, attributes: Attributes::parse(fields)? }
        }
        b"limits@openssh.com" => Extended::Limits,
        b"expand-path@openssh.com" => Extended::ExpandPath { path: fields.string()? },
        b"copy-data" => Extended::CopyData {
            from: fields.string()?,
            from_offset: fields.u64()?,
            length: fields.u64()?,
            to: fields.string()?,
            to_offset: fields.u64()?,
        },
        b"home-directory" => Extended::HomeDirectory { user: fields.string()? },
        b"users-groups-by-id@openssh.com" => {
            let (uids, gids) = (fields.string()?, fields.string()?);
            if uids.len() % 4 != 0 || gids.len() % 4 != 0 {
                return None;
            }
            Extended::UsersGroupsById { uids, gids }
        }
        _ => Extended::Unknown,
    })
}

/// What is left of a packet.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn string(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.u32()?).ok()?;
        let (string, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(string)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn string(bytes: &[u8]) -> Vec<u8> {
        [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
    }

    proptest! {
        #[test]
        fn no_packet_is_a_panic(packet in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&packet);
        }

        #[test]
        fn no_packet_of_a_known_kind_is_a_panic(kind in 0_u8..=21, rest in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&[&[kind, 0, 0, 0, 9][..], &rest].concat());
        }

        #[test]
        fn a_write_is_read_back(id: u32, handle: Vec<u8>, offset: u64, data: Vec<u8>) {
            let packet = [&[6][..], &id.to_be_bytes(), &string(&handle), &offset.to_be_bytes(), &string(&data)].concat();
            let request = Request::Write { handle: &handle, offset, data: &data };
            prop_assert_eq!(parse(&packet), Ok(Packet::Request { id, request }));
        }

        #[test]
        fn two_paths_are_read_back(id: u32, one: Vec<u8>, other: Vec<u8>) {
            let paths = [string(&one), string(&other)].concat();
            let rename = [&[18][..], &id.to_be_bytes(), &paths].concat();
            let request = Request::Rename { from: &one, to: &other };
            prop_assert_eq!(parse(&rename), Ok(Packet::Request { id, request }));
            let link = [&[200][..], &id.to_be_bytes(), &string(b"hardlink@openssh.com"), &paths].concat();
            let request = Request::Extended(Extended::Hardlink { from: &one, to: &other });
            prop_assert_eq!(parse(&link), Ok(Packet::Request { id, request }));
        }

        #[test]
        fn a_packet_cut_short_says_whose_it_was(id: u32, path in "[a-z]{1,20}", cut in 1_usize..24) {
            let packet = [&[17][..], &id.to_be_bytes(), &string(path.as_bytes())].concat();
            let cut = packet.len() - cut.min(path.len() + 4);
            prop_assert_eq!(parse(&packet[..cut]), Err(Malformed { id: Some(id) }));
        }
    }

    #[test]
    fn the_first_packet_has_a_version_and_no_number() {
        assert_eq!(parse(&[1, 0, 0, 0, 3]), Ok(Packet::Init(3)));
        assert_eq!(parse(&[1, 0, 0]), Err(Malformed { id: None }));
        assert_eq!(parse(&[]), Err(Malformed { id: None }));
    }

    #[test]
    fn what_is_unknown_is_told_apart_from_what_is_malformed() {
        assert_eq!(parse(&[99, 0, 0, 0, 7]), Ok(Packet::Request { id: 7, request: Request::Unknown }));
        let packet = [&[200, 0, 0, 0, 7][..], &string(b"no-such@example.com")].concat();
        assert_eq!(parse(&packet), Ok(Packet::Request { id: 7, request: Request::Extended(Extended::Unknown) }));
    }
}
