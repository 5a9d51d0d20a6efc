//! The header of the PROXY protocol (versions 1 and 2), by which a load balancer says from where a connection comes.
//!
//! It is read only of sources that the settings name, and there it has to be: whoever could choose whether to send one
//! could choose their address. Not a byte beyond it is read.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// What version 2 begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// What version 1 begins with.
const TEXT: &[u8] = b"PROXY ";
/// Longest header of version 1, in bytes, as its specification has it.
const MAX_TEXT: usize = 107;
/// Longest rest of a header of version 2 that is taken, in bytes: its addresses, and whatever follows them.
const MAX_REST: usize = 4096;

/// Where a connection comes from and went to, as its header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Header {
    /// From somebody.
    Forwarded {
        /// The client's address.
        source: SocketAddr,
        /// The address it has connected to.
        destination: SocketAddr,
    },
    /// From the load balancer itself (a health check, say), or from what has no address.
    Own,
}

/// Why a header is none.
#[derive(Debug, thiserror::Error)]
pub(super) enum HeaderError {
    /// It breaks off, or the connection fails.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// There is none.
    #[error("it does not begin with a header of the PROXY protocol")]
    Absent,
    /// It is too long.
    #[error("its header is longer than {0} bytes")]
    Long(usize),
    /// It says nothing sensible.
    #[error("its header cannot be read")]
    Malformed,
}

/// Reads a header, and nothing after it. The caller bounds the time.
pub(super) async fn read_header(stream: &mut (impl AsyncRead + Unpin)) -> Result<Header, HeaderError> {
    // Shorter than any header.
    let mut begin = [0; SIGNATURE.len()];
    stream.read_exact(&mut begin).await?;
    if begin == SIGNATURE {
        return read_binary(stream).await;
    }
    if !begin.starts_with(TEXT) {
        return Err(HeaderError::Absent);
    }
    let mut line = begin.to_vec();
    while !line.ends_with(b"\r\n") {
        if line.len() == MAX_TEXT {
            return Err(HeaderError::Long(MAX_TEXT));
        }
        line.push(stream.read_u8().await?);
    }
    parse_text(&line).ok_or(HeaderError::Malformed)
}

/// `PROXY TCP4 192.0.2.7 198.51.100.1 56324 22\r\n`
fn parse_text(line: &[u8]) -> Option<Header> {
    let line = std::str::from_utf8(line).ok()?.strip_prefix("PROXY ")?.strip_suffix("\r\n")?;
    let mut words = line.split(' ');
    let family = words.next()?;
    if family == "UNKNOWN" {
        // Whatever follows is to be ignored.
        return Some(Header::Own);
    }
    let words: Vec<&str> = words.collect();
    let &[source, destination, source_port, destination_port] = words.as_slice() else { return None };
    let ends = (number(source_port)?, number(destination_port)?);
    match family {
        "TCP4" => forwarded::<Ipv4Addr>(source, destination, ends),
        "TCP6" => forwarded::<Ipv6Addr>(source, destination, ends),
        _ => None,
    }
}

fn forwarded<A: FromStr + Into<IpAddr>>(source: &str, destination: &str, ports: (u16, u16)) -> Option<Header> {
    let (source, destination) = (source.parse::<A>().ok()?.into(), destination.parse::<A>().ok()?.into());
    Some(Header::Forwarded {
        source: SocketAddr::new(source, ports.0),
        destination: SocketAddr::new(destination, ports.1),
    })
}

/// Without sign, blanks and leading zeroes.
fn number(text: &str) -> Option<u16> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text.len() == 1 || !text.starts_with('0'));
    if plain { text.parse().ok() } else { None }
}

async fn read_binary(stream: &mut (impl AsyncRead + Unpin)) -> Result<Header, HeaderError> {
    let (version, family) = (stream.read_u8().await?, stream.read_u8().await?);
    let length = usize::from(stream.read_u16().await?);
    if length > MAX_REST {
        return Err(HeaderError::Long(MAX_REST));
    }
    let mut rest = vec![0; length];
    stream.read_exact(&mut rest).await?;
    parse_binary(version, family, &rest).ok_or(HeaderError::Malformed)
}

/// What follows the addresses (TLVs) says nothing that is needed here.
fn parse_binary(version: u8, family: u8, rest: &[u8]) -> Option<Header> {
    match version {
        // LOCAL
        0x20 => return Some(Header::Own),
        // PROXY
        0x21 => {}
        _ => return None,
    }
    match family {
        // AF_INET, AF_INET6; over a stream
        0x11 => addresses::<4>(rest),
        0x21 => addresses::<16>(rest),
        // AF_UNSPEC, and AF_UNIX over a stream
        0x00 | 0x31 => Some(Header::Own),
        _ => None,
    }
}

fn addresses<const N: usize>(rest: &[u8]) -> Option<Header>
where
    [u8; N]: Into<IpAddr>,
{
    let (source, rest) = rest.split_first_chunk::<N>()?;
    let (destination, rest) = rest.split_first_chunk::<N>()?;
    let (source_port, rest) = rest.split_first_chunk::<2>()?;
    let (destination_port, _) = rest.split_first_chunk::<2>()?;
    Some(Header::Forwarded {
        source: SocketAddr::new((*source).into(), u16::from_be_bytes(*source_port)),
        destination: SocketAddr::new((*destination).into(), u16::from_be_bytes(*destination_port)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The header, and what is left after it.
    fn read(bytes: &[u8]) -> Result<(Header, Vec<u8>), HeaderError> {
        let mut stream = bytes;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let header = runtime.block_on(read_header(&mut stream))?;
        Ok((header, stream.to_vec()))
    }

    fn forwarded(source: &str, destination: &str) -> Header {
        Header::Forwarded { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
    }

    fn binary(version: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[version, family], &length, rest].concat()
    }

    #[test]
    fn a_line_says_who_and_nothing_after_it_is_read() {
        for (line, header) in [
            ("PROXY TCP4 192.0.2.7 198.51.100.1 56324 22\r\n", forwarded("192.0.2.7:56324", "198.51.100.1:22")),
            ("PROXY TCP6 2001:db8::1 ::1 0 65535\r\n", forwarded("[2001:db8::1]:0", "[::1]:65535")),
            ("PROXY UNKNOWN\r\n", Header::Own),
            ("PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", Header::Own),
        ] {
            let (read, left) = read(&[line.as_bytes(), b"SSH-2.0-x\r\n"].concat()).unwrap();
            assert_eq!((read, left.as_slice()), (header, &b"SSH-2.0-x\r\n"[..]), "{line}");
        }
    }

    #[test]
    fn a_line_that_is_none_is_refused() {
        for bad in [
            "SSH-2.0-OpenSSH_9.2\r\n",
            "GET / HTTP/1.1\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 56324\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 56324 22 1\r\n",
            "PROXY TCP4 2001:db8::1 ::1 1 2\r\n",
            "PROXY TCP6 192.0.2.7 198.51.100.1 1 2\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 65536 22\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 +1 22\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 01 22\r\n",
            "PROXY TCP4  192.0.2.7 198.51.100.1 1 22\r\n",
            "PROXY UDP4 192.0.2.7 198.51.100.1 1 22\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 1 22\n",
            "PROXY TCP4 192.0",
        ] {
            assert!(read(bad.as_bytes()).is_err(), "{bad}");
        }
        let endless = [TEXT, "UNKNOWN ".as_bytes(), &[b'x'; 1000]].concat();
        assert!(matches!(read(&endless), Err(HeaderError::Long(MAX_TEXT))));
    }

    #[test]
    fn the_binary_form_says_the_same() {
        let four = [192, 0, 2, 7, 198, 51, 100, 1, 0xdc, 0x04, 0, 22];
        let header = forwarded("192.0.2.7:56324", "198.51.100.1:22");
        assert_eq!(read(&binary(0x21, 0x11, &four)).unwrap(), (header, vec![]));
        let more = [&four[..], &[0x04, 0, 3, 1, 2, 3]].concat();
        let (read_of_more, left) = read(&[&binary(0x21, 0x11, &more)[..], b"SSH"].concat()).unwrap();
        assert_eq!((read_of_more, left.as_slice()), (header, &b"SSH"[..]));
        let six = [&Ipv6Addr::LOCALHOST.octets()[..], &Ipv6Addr::UNSPECIFIED.octets(), &[0, 1, 0, 2]].concat();
        assert_eq!(read(&binary(0x21, 0x21, &six)).unwrap().0, forwarded("[::1]:1", "[::]:2"));
        for own in [
            binary(0x20, 0x00, &[]),
            binary(0x20, 0x11, &four),
            binary(0x21, 0x00, b"x"),
            binary(0x21, 0x31, &[0; 216]),
        ] {
            assert_eq!(read(&own).unwrap().0, Header::Own);
        }
        for bad in [
            binary(0x21, 0x11, &four[1..]),
            binary(0x21, 0x21, &six[1..]),
            binary(0x11, 0x11, &four),
            binary(0x22, 0x11, &four),
            binary(0x21, 0x12, &four),
            binary(0x21, 0x11, &four)[..20].to_vec(),
            SIGNATURE.to_vec(),
        ] {
            assert!(read(&bad).is_err(), "{bad:?}");
        }
        let long = [&SIGNATURE[..], &[0x21, 0x11, 0xff, 0xff]].concat();
        assert!(matches!(read(&long), Err(HeaderError::Long(MAX_REST))), "before it is waited for");
    }

    proptest! {
        #[test]
        fn no_header_is_too_strange(bytes in any::<Vec<u8>>(), form in 0..3_usize) {
            let begin = [&b""[..], TEXT, &SIGNATURE][form];
            let _ = read(&[begin, bytes.as_slice()].concat());
        }

        #[test]
        fn every_address_comes_through(source in any::<SocketAddr>(), destination in any::<SocketAddr>()) {
            let family = match (source, destination) {
                (SocketAddr::V4(_), SocketAddr::V4(_)) => "TCP4",
                (SocketAddr::V6(_), SocketAddr::V6(_)) => "TCP6",
                _ => return Ok(()),
            };
            let (from, to) = (source.ip(), destination.ip());
            let line = format!("PROXY {family} {from} {to} {} {}\r\n", source.port(), destination.port());
            let source = SocketAddr::new(from, source.port());
            let destination = SocketAddr::new(to, destination.port());
            prop_assert_eq!(read(line.as_bytes()).unwrap().0, Header::Forwarded { source, destination });
            let octets = |ip| match ip {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            let ports = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
            let rest = [octets(from), octets(to), ports].concat();
            let family = if from.is_ipv4() { 0x11 } else { 0x21 };
            let read = read(&binary(0x21, family, &rest)).unwrap().0;
            prop_assert_eq!(read, Header::Forwarded { source, destination });
        }
    }
}
