//! A connection that carries frames over a Unix socket, with descriptors beside them where the peer sends any.

use super::codec::{DecodeError, Frame};
use bytes::{Buf, BytesMut};
use rustix::event::epoll;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd},
    net::UnixStream,
};

/// Most descriptors that travel with one frame.
pub const MAX_DESCRIPTORS: usize = 3;
/// Bytes asked of the socket at once.
const READ_SIZE: usize = 64 * 1024;

/// Both directions of a connection.
#[derive(Debug)]
pub struct Connection {
    /// What comes in.
    pub reader: ConnectionReader,
    /// What goes out.
    pub writer: ConnectionWriter,
}

impl Connection {
    /// Wraps a connected socket. `receive_descriptors` is for the agent alone: the gateway takes none from
    /// a container, since an open file shares its flags with whoever sent it.
    pub fn new(stream: UnixStream, receive_descriptors: bool) -> Self {
        let stream = Arc::new(stream);
        Self {
            reader: ConnectionReader {
                stream: Arc::clone(&stream),
                buffer: BytesMut::new(),
                descriptors: VecDeque::new(),
                receive_descriptors,
            },
            writer: ConnectionWriter { stream, buffer: BytesMut::new() },
        }
    }

    /// The byte stream this connection has become: what was read ahead comes first.
    pub fn into_stream(self) -> Stream {
        let Self { reader: ConnectionReader { stream, buffer, .. }, writer } = self;
        drop(writer);
        Stream { stream, ahead: buffer }
    }
}

/// Reads frames.
#[derive(Debug)]
pub struct ConnectionReader {
    stream: Arc<UnixStream>,
    buffer: BytesMut,
    descriptors: VecDeque<OwnedFd>,
    receive_descriptors: bool,
}

impl ConnectionReader {
    /// The next frame; `None` when the peer closed between two frames. Cancel-safe.
    ///
    /// # Errors
    /// When the socket fails, the bytes are no frame ([`DecodeError`] within), or the end comes inside one.
    pub async fn read(&mut self) -> io::Result<Option<Frame>> {
        loop {
            match Frame::decode(&mut self.buffer) {
                Ok(Some(frame)) => return Ok(Some(frame)),
                Ok(None) => {}
                Err(error) => return Err(decode_error(error)),
            }
            let stream = Arc::clone(&self.stream);
            let count = stream.async_io(Interest::READABLE, || self.receive()).await?;
            if count == 0 {
                return if self.buffer.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    /// The descriptors that came so far and were not taken: those of the frame just read, and of none before
    /// it if they are taken after every frame that can carry some.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        self.descriptors.drain(..).collect()
    }

    /// Watches for the peer's closing of the whole connection, which shows at once, also while there is much that
    /// was not read.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn hang_up(&self) -> io::Result<HangUp> {
        HangUp::of(&self.stream)
    }

    fn receive(&mut self) -> io::Result<usize> {
        let old = self.buffer.len();
        self.buffer.resize(old + READ_SIZE, 0);
        let result = self.receive_at(old);
        self.buffer.truncate(old + *result.as_ref().unwrap_or(&0));
        result
    }

    fn receive_at(&mut self, at: usize) -> io::Result<usize> {
        let target = self.buffer.get_mut(at..).unwrap_or_default();
        if !self.receive_descriptors {
            return Ok(rustix::net::recv(self.stream.as_fd(), target, RecvFlags::DONTWAIT)?.0);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message = rustix::net::recvmsg(
            self.stream.as_fd(),
            &mut [IoSliceMut::new(target)],
            &mut ancillary,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        )?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors.take(MAX_DESCRIPTORS));
                // Those that nobody took are dropped rather than piled up.
                let surplus = self.descriptors.len().saturating_sub(MAX_DESCRIPTORS);
                self.descriptors.drain(..surplus);
            }
        }
        Ok(message.bytes)
    }
}

/// Writes frames.
#[derive(Debug)]
pub struct ConnectionWriter {
    stream: Arc<UnixStream>,
    buffer: BytesMut,
}

impl ConnectionWriter {
    /// Writes one frame, waiting while the peer does not read. If cancelled, the connection is of no more
    /// use: part of a frame may be out.
    ///
    /// # Errors
    /// When the socket fails.
    pub async fn write(&mut self, frame: &Frame) -> io::Result<()> {
        self.write_with_descriptors(frame, &[]).await
    }

    /// Writes one frame with at most [`MAX_DESCRIPTORS`] descriptors beside it.
    ///
    /// # Errors
    /// When the socket fails or there are too many descriptors.
    pub async fn write_with_descriptors(&mut self, frame: &Frame, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.buffer.clear();
        frame.encode(&mut self.buffer);
        let mut descriptors = descriptors;
        while !self.buffer.is_empty() {
            let stream = Arc::clone(&self.stream);
            let sent = stream.async_io(Interest::WRITABLE, || send(&self.stream, &self.buffer, descriptors)).await?;
            descriptors = &[];
            self.buffer.advance(sent);
        }
        Ok(())
    }
}

impl ConnectionWriter {
    /// Nothing more will be written: the peer's reader comes to an end, and it may still write.
    pub fn finish(&self) {
        // Fails only if the peer is gone.
        let _ = rustix::net::shutdown(self.stream.as_fd(), rustix::net::Shutdown::Write);
    }
}

/// Notices when the peer has closed a connection wholly.
#[derive(Debug)]
pub struct HangUp {
    /// Watches the socket for nothing but what is always reported, errors and hang-ups, so that traffic on the
    /// socket wakes nobody here.
    epoll: AsyncFd<OwnedFd>,
    /// Kept open, if it is ours to keep: a closed descriptor is watched no more.
    _stream: Option<Arc<UnixStream>>,
}

impl HangUp {
    fn of(stream: &Arc<UnixStream>) -> io::Result<Self> {
        Ok(Self { _stream: Some(Arc::clone(stream)), ..Self::watch(stream)? })
    }

    /// Watches a socket that the caller keeps open for as long as it is watched.
    pub(super) fn watch(socket: &impl AsFd) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, socket.as_fd(), epoll::EventData::new_u64(0), epoll::EventFlags::empty())?;
        Ok(Self { epoll: register(epoll, Interest::READABLE)?, _stream: None })
    }

    /// Returns once the peer has closed both directions, or this side its own and the peer the other.
    pub async fn wait(&self) {
        // An error would mean that the runtime ends.
        let _ = self.epoll.readable().await;
    }
}

/// Has the runtime watch a descriptor, which should be non-blocking.
///
/// # Errors
/// When it is of a kind that cannot be watched, or there are no descriptors left.
#[expect(
    deprecated,
    reason = "the successor is `unsafe` for types that may lend a closed descriptor; OwnedFd does not"
)]
pub fn register(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(descriptor, interest)
}

fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    if descriptors.is_empty() {
        return Ok(rustix::net::send(stream.as_fd(), bytes, flags)?);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(rustix::net::sendmsg(stream.as_fd(), &[IoSlice::new(bytes)], &mut ancillary, flags)?)
}

fn decode_error(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// A connection that has become a byte stream.
#[derive(Debug)]
pub struct Stream {
    stream: Arc<UnixStream>,
    ahead: BytesMut,
}

impl Stream {
    /// Watches for the peer's closing of the whole connection.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn hang_up(&self) -> io::Result<HangUp> {
        HangUp::of(&self.stream)
    }

    /// The peer, for who may have to watch it once the stream itself is in other hands. Costs no descriptor yet.
    pub fn peer(&self) -> Peer {
        Peer(Arc::clone(&self.stream))
    }
}

/// The far end of a connection.
#[derive(Debug, Clone)]
pub struct Peer(Arc<UnixStream>);

impl Peer {
    /// Watches for its closing of the whole connection.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn hang_up(&self) -> io::Result<HangUp> {
        HangUp::of(&self.0)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        target: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() {
            let count = self.ahead.len().min(target.remaining());
            target.put_slice(&self.ahead.split_to(count));
            return Poll::Ready(Ok(()));
        }
        loop {
            std::task::ready!(self.stream.poll_read_ready(context))?;
            let room = target.initialize_unfilled();
            match self.stream.try_io(Interest::READABLE, || {
                Ok(rustix::net::recv(self.stream.as_fd(), &mut *room, RecvFlags::DONTWAIT)?.0)
            }) {
                Ok(count) => {
                    target.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            std::task::ready!(self.stream.poll_write_ready(context))?;
            match self.stream.try_io(Interest::WRITABLE, || send(&self.stream, bytes, &[])) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(match rustix::net::shutdown(self.stream.as_fd(), rustix::net::Shutdown::Write) {
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => Ok(()),
            Err(error) => Err(error.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::{MAX_FRAME, Open, Request};
    use bytes::Bytes;
    use proptest::prelude::*;
    use std::io::{Read as _, Write as _};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn descriptors_travel_with_their_frame() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut gateway = Connection::new(ours, false);
        let mut agent = Connection::new(theirs, true);
        let (mut read, write) = std::io::pipe().unwrap();
        let exec = Frame::Request(Request::Exec { command: Bytes::from_static(b"true") });
        gateway.writer.write(&Frame::Open(Open::Session)).await.unwrap();
        gateway.writer.write_with_descriptors(&exec, &[write.as_fd()]).await.unwrap();
        drop(write);
        assert_eq!(agent.reader.read().await.unwrap(), Some(Frame::Open(Open::Session)));
        assert_eq!(agent.reader.read().await.unwrap(), Some(exec));
        let mut descriptors = agent.reader.take_descriptors();
        assert_eq!(descriptors.len(), 1);
        std::fs::File::from(descriptors.remove(0)).write_all(b"through").unwrap();
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[tokio::test]
    async fn a_stream_begins_with_what_was_read_ahead_and_half_closes() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut gateway = Connection::new(ours, false);
        let mut bytes = BytesMut::new();
        Frame::Opened { port: 0 }.encode(&mut bytes);
        bytes.extend_from_slice(b"early");
        theirs.write_all(&bytes).await.unwrap();
        assert_eq!(gateway.reader.read().await.unwrap(), Some(Frame::Opened { port: 0 }));
        let mut stream = gateway.into_stream();
        theirs.write_all(b" late").await.unwrap();
        theirs.shutdown().await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "early late");
        stream.write_all(b"answer").await.unwrap();
        stream.shutdown().await.unwrap();
        text.clear();
        theirs.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "answer");
    }

    /// What a peer says, in pieces of any size, until it closes.
    async fn read_all(bytes: &[u8], piece: usize) -> (usize, io::Result<()>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(ours, false);
        let say = async {
            for piece in bytes.chunks(piece.max(1)) {
                if theirs.write_all(piece).await.is_err() {
                    return;
                }
            }
            let _ = theirs.shutdown().await;
        };
        let hear = async {
            let mut frames = 0;
            loop {
                match connection.reader.read().await {
                    Ok(Some(_)) => frames += 1,
                    end => return (frames, end.map(drop)),
                }
                // Of whatever comes, a frame is held and what was read behind it.
                assert!(connection.reader.buffer.len() <= MAX_FRAME + 4 + READ_SIZE);
            }
        };
        tokio::select! {
            heard = hear => heard,
            heard = async { say.await; std::future::pending().await } => heard,
        }
    }

    /// Bytes that are frames, nearly frames, and none at all.
    fn hostile() -> impl Strategy<Value = Vec<u8>> {
        let framed =
            (0u8..20, proptest::collection::vec(any::<u8>(), 0..64), -2i32..3).prop_map(|(kind, rest, off)| {
                let length = (rest.len() as i32 + 1 + off).max(0) as u32;
                [&length.to_be_bytes()[..], &[kind], &rest].concat()
            });
        let frame = proptest::sample::select(vec![
            Frame::Opened { port: 7 },
            Frame::Success,
            Frame::Data(Bytes::from_static(b"data")),
            Frame::WindowAdjust { bytes: u32::MAX },
            Frame::Incoming { ticket: 1, originator: "x".into(), originator_port: 2 },
        ]);
        let good = frame.prop_map(|frame| {
            let mut bytes = BytesMut::new();
            frame.encode(&mut bytes);
            bytes.to_vec()
        });
        let noise = proptest::collection::vec(any::<u8>(), 0..32);
        let part = prop_oneof![4 => good, 2 => framed, 1 => noise];
        proptest::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
    }

    proptest! {
        /// The gateway's side of an agent that says whatever it likes.
        #[test]
        fn whatever_a_container_says_is_frames_and_then_an_end(bytes in hostile(), piece in 1usize..40) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (frames, end) = runtime.block_on(read_all(&bytes, piece));
            // The same as if it had come at once.
            let (mut rest, mut expected) = (BytesMut::from(&bytes[..]), 0);
            let last = loop {
                match Frame::decode(&mut rest) {
                    Ok(Some(_)) => expected += 1,
                    Ok(None) => break rest.is_empty(),
                    Err(_) => break false,
                }
            };
            prop_assert_eq!((frames, end.is_ok()), (expected, last));
        }
    }

    #[tokio::test]
    async fn a_frame_that_is_announced_too_large_is_not_waited_for() {
        let mut bytes = (MAX_FRAME as u32 + 1).to_be_bytes().to_vec();
        bytes.resize(1 << 20, 0);
        let (frames, end) = read_all(&bytes, 1000).await;
        assert_eq!((frames, end.unwrap_err().kind()), (0, io::ErrorKind::InvalidData));
    }

    /// An open file shares its flags with whoever sent it.
    #[tokio::test]
    async fn descriptors_that_a_container_sends_are_not_taken() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut gateway = Connection::new(ours, false);
        let mut agent = Connection::new(theirs, true);
        let (mut read, write) = std::io::pipe().unwrap();
        agent.writer.write_with_descriptors(&Frame::Success, &[write.as_fd()]).await.unwrap();
        drop((write, agent));
        assert_eq!(gateway.reader.read().await.unwrap(), Some(Frame::Success));
        assert!(gateway.reader.take_descriptors().is_empty());
        // Nobody holds the other end.
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "");
    }
}
