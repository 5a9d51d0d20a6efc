//! Carries a connection of this protocol over a network: a local socket on one side, an encrypted stream on the other.
//!
//! A byte stream over TCP cannot tell "I write no more" from "I am gone", and gateway and agent live by the
//! difference. So the bytes travel in records: two bytes of length, most significant first, and that many bytes. A
//! record of no bytes is the end of one direction; the end of the stream is the end of the connection.

use super::connection::HangUp;
use std::{io, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixStream, unix},
};

/// Most bytes of one record: two TLS records, and a pipe's usual content.
const RECORD: usize = 32 * 1024;
/// Bytes of a record's length.
const LENGTH: usize = 2;
/// How long what was sent before a connection was closed may take to leave; then it is cut off, so that the far side
/// hears of the end although nobody there reads.
const LINGER: Duration = Duration::from_secs(10);

/// Carries everything between `local` and `far`, whose TCP connection is watched by `line`, until either is closed.
/// Then both are.
///
/// # Errors
/// When the far side breaks off, or says what is no record.
pub async fn relay(local: UnixStream, far: impl AsyncRead + AsyncWrite + Unpin, line: Line) -> io::Result<()> {
    let closed = HangUp::watch(&local)?;
    let (local_reader, local_writer) = local.into_split();
    let (far_reader, mut far_writer) = tokio::io::split(far);
    let leaving = async {
        outward(local_reader, &mut far_writer).await?;
        // Nothing more goes out; what comes in is still wanted, as long as somebody is there.
        closed.wait().await;
        // The far side closes in return, and then nothing that was sent is lost by closing here.
        far_writer.shutdown().await
    };
    let too_long = async {
        closed.wait().await;
        tokio::time::sleep(LINGER).await;
    };
    tokio::select! {
        result = inward(far_reader, local_writer) => result,
        () = line.broken.wait() => Err(io::ErrorKind::ConnectionReset.into()),
        Err(error) = leaving => Err(error),
        () = too_long => {
            line.cut();
            Ok(())
        }
    }
}

/// The TCP connection below an encrypted stream.
#[derive(Debug)]
pub struct Line {
    socket: std::net::TcpStream,
    broken: HangUp,
}

impl Line {
    /// Watches a connection, before it is given away.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn of(stream: &TcpStream) -> io::Result<Self> {
        // Terminals send single bytes.
        stream.set_nodelay(true)?;
        let socket = rustix::io::dup(stream)?;
        Ok(Self { broken: HangUp::watch(&socket)?, socket: socket.into() })
    }

    /// Closes without waiting for what the far side has not taken.
    fn cut(&self) {
        let _ = rustix::net::sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
    }
}

async fn outward(mut local: unix::OwnedReadHalf, far: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut record = vec![0; LENGTH + RECORD];
    loop {
        let count = match record.get_mut(LENGTH..) {
            Some(room) => local.read(room).await.unwrap_or(0),
            None => 0,
        };
        let length = u16::try_from(count).map_err(io::Error::other)?;
        record.iter_mut().zip(length.to_be_bytes()).for_each(|(place, byte)| *place = byte);
        far.write_all(record.get(..LENGTH + count).unwrap_or_default()).await?;
        far.flush().await?;
        if count == 0 {
            return Ok(());
        }
    }
}

async fn inward(mut far: impl AsyncRead + Unpin, mut local: unix::OwnedWriteHalf) -> io::Result<()> {
    let mut record = vec![0; usize::from(u16::MAX)];
    loop {
        let mut length = [0; LENGTH];
        match far.read_exact(&mut length).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
        let count = usize::from(u16::from_be_bytes(length));
        if count == 0 {
            // Fails only if nobody is there, which the other direction sees.
            let _ = local.shutdown().await;
            continue;
        }
        let Some(bytes) = record.get_mut(..count) else { return Err(io::ErrorKind::InvalidData.into()) };
        far.read_exact(bytes).await?;
        // If nobody is there, what was sent here meanwhile may still be on its way out.
        let _ = local.write_all(bytes).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// Two local sockets with a relay each and TCP between them.
    async fn pair() -> (UnixStream, UnixStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        let carry = |tcp: TcpStream| {
            let (theirs, ours) = UnixStream::pair().unwrap();
            let line = Line::of(&tcp).unwrap();
            tokio::spawn(relay(ours, tcp, line));
            theirs
        };
        (carry(near.unwrap()), carry(far.unwrap().0))
    }

    #[tokio::test]
    async fn bytes_arrive_in_order_both_ways() {
        let (near, far) = pair().await;
        let bytes: Vec<u8> = (0..300_000_u32).map(|number| number.to_le_bytes()[0]).collect();
        let (sent, expected) = (bytes.clone(), bytes);
        let send = |stream: UnixStream, bytes: Vec<u8>| async move {
            let (mut reader, mut writer) = stream.into_split();
            let write = async {
                writer.write_all(&bytes).await.unwrap();
                writer.shutdown().await.unwrap();
            };
            let mut got = Vec::new();
            tokio::join!(write, async { reader.read_to_end(&mut got).await.unwrap() });
            got
        };
        let (back, there) = tokio::join!(send(near, sent.clone()), send(far, sent));
        assert!(back == expected && there == expected);
    }

    #[tokio::test]
    async fn the_end_of_one_direction_is_not_the_end() {
        let (mut near, mut far) = pair().await;
        near.write_all(b"question").await.unwrap();
        near.shutdown().await.unwrap();
        let mut question = String::new();
        far.read_to_string(&mut question).await.unwrap();
        far.write_all(b"answer").await.unwrap();
        drop(far);
        let mut answer = String::new();
        near.read_to_string(&mut answer).await.unwrap();
        assert_eq!((question.as_str(), answer.as_str()), ("question", "answer"));
    }

    #[tokio::test]
    async fn closing_shows_at_the_far_side() {
        let (near, far) = pair().await;
        let closed = HangUp::watch(&far).unwrap();
        drop(near);
        closed.wait().await;
    }

    #[tokio::test]
    async fn what_was_sent_before_closing_arrives() {
        for _ in 0..50 {
            let (near, mut far) = pair().await;
            // Unread, so that closing without care would reset the connection.
            far.write_all(&[7; 100_000]).await.unwrap();
            let (sent, bytes) = (near, vec![5; 2_000_000]);
            tokio::spawn(async move {
                let mut sent = sent;
                sent.write_all(&bytes).await.unwrap();
            });
            let mut got = Vec::new();
            let _ = far.read_to_end(&mut got).await;
            assert_eq!(got.len(), 2_000_000);
        }
    }

    #[tokio::test]
    async fn closing_shows_although_nobody_reads() {
        let (near, far) = pair().await;
        let closed = HangUp::watch(&far).unwrap();
        // The relays and the system have taken what they can when nothing is taken for a while.
        while tokio::time::timeout(Duration::from_millis(500), near.writable()).await.is_ok() {
            let _ = near.try_write(&[0; 65536]);
        }
        drop(near);
        closed.wait().await;
    }

    #[tokio::test]
    async fn half_a_record_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (mut near, far) = tokio::join!(
            async { TcpStream::connect(listener.local_addr().unwrap()).await.unwrap() },
            listener.accept()
        );
        let far = far.unwrap().0;
        let (_local, ours) = UnixStream::pair().unwrap();
        let line = Line::of(&far).unwrap();
        near.write_all(&[0, 9, 1]).await.unwrap();
        drop(near);
        assert_eq!(relay(ours, far, line).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
