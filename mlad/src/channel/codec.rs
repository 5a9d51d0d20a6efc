//! Frames and their bytes: `uint32 length, byte kind, payload`, with the encodings of RFC 4251 section 5.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

/// Version of the protocol; the first field of every `Open`.
pub const VERSION: u32 = 1;
/// Longest frame, in bytes, without its length field. A peer that announces more is cut off.
pub const MAX_FRAME: usize = 256 * 1024;
/// Bytes of [`Frame::Data`] the gateway may send in a session before the first [`Frame::WindowAdjust`].
pub const WINDOW: usize = 256 * 1024;

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The length field is 0 or above [`MAX_FRAME`].
    #[error("a frame of {0} bytes (1 to {MAX_FRAME} are allowed)")]
    Length(usize),
    /// No such kind.
    #[error("frame kind {0} is unknown")]
    Kind(u8),
    /// The payload is too short, too long, or not what its kind says.
    #[error("frame kind {0} is malformed")]
    Malformed(u8),
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Gateway → agent, first: what this connection is for.
    Open(Open),
    /// Agent → gateway: it is open. `port` is the port a TCP listener got, else 0.
    Opened {
        /// Port that was bound.
        port: u32,
    },
    /// Agent → gateway: it is not; the connection ends. Reasons are those of RFC 4254 section 5.1.
    OpenFailure {
        /// 1 prohibited, 2 connect failed, 3 unknown type, 4 resource shortage.
        reason: u32,
        /// For a person.
        message: String,
    },
    /// Gateway → agent, in a session.
    Request(Request),
    /// Agent → gateway: the oldest unanswered request that is answered (see [`Request::is_answered`]) was done.
    Success,
    /// Agent → gateway: it was not.
    Failure {
        /// For a person.
        message: String,
    },
    /// Bytes of standard input (to the agent) or standard output (from it).
    Data(Bytes),
    /// Bytes of standard error.
    ExtendedData(Bytes),
    /// No more data will follow from this side.
    Eof,
    /// Agent → gateway: the session's process ended.
    Exit(Exit),
    /// The channel is over, whatever data is still under way.
    Close,
    /// Agent → gateway, on a listener, control or session connection: somebody connected; take it with
    /// [`Open::Accept`].
    Incoming {
        /// Names the waiting connection; single use.
        ticket: u64,
        /// Address (or path) it came from.
        originator: String,
        /// Port it came from; 0 for a Unix socket.
        originator_port: u32,
    },
    /// Agent → gateway, in a session: so many more bytes of `Data` may come (RFC 4254 section 5.2). Because
    /// the gateway never has more than the window under way, the agent can always read on, and a window
    /// change, a signal or a close is not stuck behind input that the process does not take.
    WindowAdjust {
        /// Bytes to add to the window, which begins at [`WINDOW`].
        bytes: u32,
    },
}

/// What a connection is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Open {
    /// A session: shell, command or subsystem. Speaks frames to its end.
    Session,
    /// A TCP connection from inside the container. Then a byte stream.
    DirectTcpip {
        /// Name or address, resolved in the container.
        host: String,
        /// Port.
        port: u32,
    },
    /// A connection to a Unix socket in the container, made with the user's rights. Then a byte stream.
    DirectStreamlocal {
        /// Its path.
        path: String,
    },
    /// Listen on TCP in the container for as long as this connection lives; connections are `Incoming`.
    TcpipForward {
        /// Address to bind; as RFC 4254 section 7.1 says: empty and `*` for all, `localhost` for loopback.
        address: String,
        /// Port to bind; 0 lets the agent choose.
        port: u32,
    },
    /// Listen on a Unix socket in the container, likewise.
    StreamlocalForward {
        /// Its path.
        path: String,
    },
    /// Take a connection that was announced as `Incoming`. Then a byte stream.
    Accept {
        /// Its ticket.
        ticket: u64,
    },
    /// The workload's control connection, one at a time (a new one replaces the old): connections to the
    /// API socket are `Incoming` on it.
    Control,
    /// The container is to end, as if process 1 had got SIGTERM; answered when that has begun. For engines that cannot
    /// send signals.
    Terminate,
}

/// A terminal's size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PtySize {
    /// Columns.
    pub columns: u32,
    /// Rows.
    pub rows: u32,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
}

/// What a session asks of the agent (RFC 4254 section 6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Allocate a terminal. Answered.
    Pty {
        /// `TERM`.
        term: String,
        /// Its size.
        size: PtySize,
        /// Encoded modes (RFC 4254 section 8).
        modes: Bytes,
    },
    /// Set a variable for the process to come. Answered.
    Env {
        /// Its name.
        name: String,
        /// Its value.
        value: Bytes,
    },
    /// Start the user's login shell. Answered. Without a terminal, three descriptors may travel with it.
    Shell,
    /// Start a command by the user's shell. Answered. Without a terminal, three descriptors (standard
    /// input, output and error of the process) may travel with it; then no data frames follow.
    Exec {
        /// As the client sent it.
        command: Bytes,
    },
    /// Start a subsystem. Answered.
    Subsystem {
        /// Its name.
        name: String,
    },
    /// The terminal changed its size. Not answered.
    WindowChange(PtySize),
    /// Send a signal to the session's process. Not answered.
    Signal {
        /// Name without SIG.
        name: String,
    },
    /// Make a socket for the client's key agent and set `SSH_AUTH_SOCK`; connections are `Incoming` on
    /// this session. Answered.
    AgentForwarding,
}

impl Request {
    /// Whether the agent answers this request with `Success` or `Failure`.
    pub fn is_answered(&self) -> bool {
        !matches!(self, Self::WindowChange(_) | Self::Signal { .. })
    }
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// It exited.
    Status(u32),
    /// A signal ended it.
    Signal {
        /// Name without SIG.
        name: String,
        /// Whether it left a core dump.
        core_dumped: bool,
        /// For a person.
        message: String,
    },
}

mod kind {
    pub(super) const OPEN: u8 = 1;
    pub(super) const OPENED: u8 = 2;
    pub(super) const OPEN_FAILURE: u8 = 3;
    pub(super) const REQUEST: u8 = 4;
    pub(super) const SUCCESS: u8 = 5;
    pub(super) const FAILURE: u8 = 6;
    pub(super) const DATA: u8 = 7;
    pub(super) const EXTENDED_DATA: u8 = 8;
    pub(super) const EOF: u8 = 9;
    pub(super) const EXIT: u8 = 10;
    pub(super) const CLOSE: u8 = 11;
    pub(super) const INCOMING: u8 = 12;
    pub(super) const WINDOW_ADJUST: u8 = 13;
}

impl Frame {
    /// Appends the frame, with its length, to `out`.
    pub fn encode(&self, out: &mut BytesMut) {
        let at = out.len();
        out.put_u32(0);
        match self {
            Self::Open(open) => {
                out.put_u8(kind::OPEN);
                out.put_u32(VERSION);
                open.encode(out);
            }
            Self::Opened { port } => {
                out.put_u8(kind::OPENED);
                out.put_u32(*port);
            }
            Self::OpenFailure { reason, message } => {
                out.put_u8(kind::OPEN_FAILURE);
                out.put_u32(*reason);
                put_string(out, message.as_bytes());
            }
            Self::Request(request) => {
                out.put_u8(kind::REQUEST);
                request.encode(out);
            }
            Self::Success => out.put_u8(kind::SUCCESS),
            Self::Failure { message } => {
                out.put_u8(kind::FAILURE);
                put_string(out, message.as_bytes());
            }
            Self::Data(data) => {
                out.put_u8(kind::DATA);
                out.put_slice(data);
            }
            Self::ExtendedData(data) => {
                out.put_u8(kind::EXTENDED_DATA);
                out.put_slice(data);
            }
            Self::Eof => out.put_u8(kind::EOF),
            Self::Exit(exit) => {
                out.put_u8(kind::EXIT);
                exit.encode(out);
            }
            Self::Close => out.put_u8(kind::CLOSE),
            Self::Incoming { ticket, originator, originator_port } => {
                out.put_u8(kind::INCOMING);
                out.put_u64(*ticket);
                put_string(out, originator.as_bytes());
                out.put_u32(*originator_port);
            }
            Self::WindowAdjust { bytes } => {
                out.put_u8(kind::WINDOW_ADJUST);
                out.put_u32(*bytes);
            }
        }
        let length = u32::try_from(out.len() - at - 4).unwrap_or(u32::MAX);
        if let Some(field) = out.get_mut(at..at + 4) {
            field.copy_from_slice(&length.to_be_bytes());
        }
    }

    /// Takes one frame off the front of `input`; `None` if it is not all there yet.
    ///
    /// # Errors
    /// When the bytes can never become a frame; the connection is of no use then.
    pub fn decode(input: &mut BytesMut) -> Result<Option<Self>, DecodeError> {
        let Some((header, _)) = input.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*header) as usize;
        if length == 0 || length > MAX_FRAME {
            return Err(DecodeError::Length(length));
        }
        if input.len() < 4 + length {
            return Ok(None);
        }
        input.advance(4);
        let mut payload = input.split_to(length).freeze();
        let kind = payload.get_u8();
        Self::decode_payload(kind, &mut payload).filter(|_| payload.is_empty()).map(Some).ok_or(
            if kind == 0 || kind > kind::WINDOW_ADJUST {
                DecodeError::Kind(kind)
            } else {
                DecodeError::Malformed(kind)
            },
        )
    }

    fn decode_payload(kind: u8, input: &mut Bytes) -> Option<Self> {
        Some(match kind {
            kind::OPEN => {
                if get_u32(input)? != VERSION {
                    return None;
                }
                Self::Open(Open::decode(input)?)
            }
            kind::OPENED => Self::Opened { port: get_u32(input)? },
            kind::OPEN_FAILURE => Self::OpenFailure { reason: get_u32(input)?, message: get_text(input)? },
            kind::REQUEST => Self::Request(Request::decode(input)?),
            kind::SUCCESS => Self::Success,
            kind::FAILURE => Self::Failure { message: get_text(input)? },
            kind::DATA => Self::Data(input.split_to(input.len())),
            kind::EXTENDED_DATA => Self::ExtendedData(input.split_to(input.len())),
            kind::EOF => Self::Eof,
            kind::EXIT => Self::Exit(Exit::decode(input)?),
            kind::CLOSE => Self::Close,
            kind::INCOMING => Self::Incoming {
                ticket: input.try_get_u64().ok()?,
                originator: get_text(input)?,
                originator_port: get_u32(input)?,
            },
            kind::WINDOW_ADJUST => Self::WindowAdjust { bytes: get_u32(input)? },
            _ => return None,
        })
    }
}

impl Open {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Session => out.put_u8(1),
            Self::DirectTcpip { host, port } => {
                out.put_u8(2);
                put_string(out, host.as_bytes());
                out.put_u32(*port);
            }
            Self::DirectStreamlocal { path } => {
                out.put_u8(3);
                put_string(out, path.as_bytes());
            }
            Self::TcpipForward { address, port } => {
                out.put_u8(4);
                put_string(out, address.as_bytes());
                out.put_u32(*port);
            }
            Self::StreamlocalForward { path } => {
                out.put_u8(5);
                put_string(out, path.as_bytes());
            }
            Self::Accept { ticket } => {
                out.put_u8(6);
                out.put_u64(*ticket);
            }
            Self::Control => out.put_u8(7),
            Self::Terminate => out.put_u8(8),
        }
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        Some(match input.try_get_u8().ok()? {
            1 => Self::Session,
            2 => Self::DirectTcpip { host: get_text(input)?, port: get_u32(input)? },
            3 => Self::DirectStreamlocal { path: get_text(input)? },
            4 => Self::TcpipForward { address: get_text(input)?, port: get_u32(input)? },
            5 => Self::StreamlocalForward { path: get_text(input)? },
            6 => Self::Accept { ticket: input.try_get_u64().ok()? },
            7 => Self::Control,
            8 => Self::Terminate,
            _ => return None,
        })
    }
}

impl PtySize {
    fn encode(self, out: &mut BytesMut) {
        for value in [self.columns, self.rows, self.width, self.height] {
            out.put_u32(value);
        }
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        Some(Self { columns: get_u32(input)?, rows: get_u32(input)?, width: get_u32(input)?, height: get_u32(input)? })
    }
}

impl Request {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Pty { term, size, modes } => {
                out.put_u8(1);
                put_string(out, term.as_bytes());
                size.encode(out);
                put_string(out, modes);
            }
            Self::Env { name, value } => {
                out.put_u8(2);
                put_string(out, name.as_bytes());
                put_string(out, value);
            }
            Self::Shell => out.put_u8(3),
            Self::Exec { command } => {
                out.put_u8(4);
                put_string(out, command);
            }
            Self::Subsystem { name } => {
                out.put_u8(5);
                put_string(out, name.as_bytes());
            }
            Self::WindowChange(size) => {
                out.put_u8(6);
                size.encode(out);
            }
            Self::Signal { name } => {
                out.put_u8(7);
                put_string(out, name.as_bytes());
            }
            Self::AgentForwarding => out.put_u8(8),
        }
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        Some(match input.try_get_u8().ok()? {
            1 => Self::Pty { term: get_text(input)?, size: PtySize::decode(input)?, modes: get_string(input)? },
            2 => Self::Env { name: get_text(input)?, value: get_string(input)? },
            3 => Self::Shell,
            4 => Self::Exec { command: get_string(input)? },
            5 => Self::Subsystem { name: get_text(input)? },
            6 => Self::WindowChange(PtySize::decode(input)?),
            7 => Self::Signal { name: get_text(input)? },
            8 => Self::AgentForwarding,
            _ => return None,
        })
    }
}

impl Exit {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Status(status) => {
                out.put_u8(1);
                out.put_u32(*status);
            }
            Self::Signal { name, core_dumped, message } => {
                out.put_u8(2);
                put_string(out, name.as_bytes());
                out.put_u8(u8::from(*core_dumped));
                put_string(out, message.as_bytes());
            }
        }
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        Some(match input.try_get_u8().ok()? {
            1 => Self::Status(get_u32(input)?),
            2 => Self::Signal {
                name: get_text(input)?,
                core_dumped: input.try_get_u8().ok()? != 0,
                message: get_text(input)?,
            },
            _ => return None,
        })
    }
}

fn put_string(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    out.put_slice(bytes);
}

fn get_u32(input: &mut Bytes) -> Option<u32> {
    input.try_get_u32().ok()
}

fn get_string(input: &mut Bytes) -> Option<Bytes> {
    let length = get_u32(input)? as usize;
    (length <= input.len()).then(|| input.split_to(length))
}

fn get_text(input: &mut Bytes) -> Option<String> {
    String::from_utf8(get_string(input)?.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn samples() -> Vec<Frame> {
        let size = PtySize { columns: 80, rows: 24, width: 0, height: 65535 };
        let requests = [
            Request::Pty { term: "xterm".into(), size, modes: Bytes::from_static(&[53, 0, 0, 0, 1, 0]) },
            Request::Env { name: "LANG".into(), value: Bytes::from_static(b"ko_KR.UTF-8") },
            Request::Shell,
            Request::Exec { command: Bytes::from_static(b"exit 7\xff") },
            Request::Subsystem { name: "x".into() },
            Request::WindowChange(size),
            Request::Signal { name: "TERM".into() },
            Request::AgentForwarding,
        ];
        let opens = [
            Open::Session,
            Open::DirectTcpip { host: "localhost".into(), port: 80 },
            Open::DirectStreamlocal { path: "/tmp/s".into() },
            Open::TcpipForward { address: String::new(), port: 0 },
            Open::StreamlocalForward { path: "/tmp/s".into() },
            Open::Accept { ticket: u64::MAX },
            Open::Control,
            Open::Terminate,
        ];
        let mut frames = vec![
            Frame::Opened { port: 8080 },
            Frame::WindowAdjust { bytes: 131_072 },
            Frame::OpenFailure { reason: 2, message: "refused".into() },
            Frame::Success,
            Frame::Failure { message: "no".into() },
            Frame::Data(Bytes::from_static(b"abc")),
            Frame::Data(Bytes::new()),
            Frame::ExtendedData(Bytes::from_static(b"err")),
            Frame::Eof,
            Frame::Exit(Exit::Status(7)),
            Frame::Exit(Exit::Signal { name: "KILL".into(), core_dumped: false, message: String::new() }),
            Frame::Close,
            Frame::Incoming { ticket: 3, originator: "127.0.0.1".into(), originator_port: 9 },
        ];
        frames.extend(requests.into_iter().map(Frame::Request));
        frames.extend(opens.into_iter().map(Frame::Open));
        frames
    }

    #[test]
    fn every_frame_survives_its_bytes() {
        let mut bytes = BytesMut::new();
        for frame in samples() {
            frame.encode(&mut bytes);
        }
        for frame in samples() {
            assert_eq!(Frame::decode(&mut bytes), Ok(Some(frame)));
        }
        assert!(bytes.is_empty());
    }

    #[test]
    fn a_frame_cut_anywhere_is_waited_for() {
        for frame in samples() {
            let mut whole = BytesMut::new();
            frame.encode(&mut whole);
            for cut in 0..whole.len() {
                let mut part = BytesMut::from(&whole[..cut]);
                assert_eq!(Frame::decode(&mut part), Ok(None));
                assert_eq!(part.len(), cut, "nothing is consumed");
            }
        }
    }

    #[test]
    fn lengths_out_of_bounds_are_refused() {
        for length in [0, MAX_FRAME + 1, u32::MAX as usize] {
            let mut bytes = BytesMut::new();
            bytes.put_u32(length as u32);
            bytes.put_u8(9);
            assert_eq!(Frame::decode(&mut bytes), Err(DecodeError::Length(length)));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..256), kind in 0u8..20) {
            let mut framed = BytesMut::new();
            framed.put_u32(bytes.len() as u32 + 1);
            framed.put_u8(kind);
            framed.put_slice(&bytes);
            if let Ok(Some(frame)) = Frame::decode(&mut framed) {
                let mut again = BytesMut::new();
                frame.encode(&mut again);
                prop_assert_eq!(Frame::decode(&mut again), Ok(Some(frame)));
            }
        }
    }
}
