//! Bytes between a channel and a pipe or stream, in both directions, with no more on the way than one piece.

use super::{
    inbox::Inbox,
    outlet::{Gone, Outlet},
};
use bytes::BytesMut;
use std::{convert::Infallible, time::Duration};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Time a process has to take input that is whole, and to come to its end, when its client is gone.
pub(super) const FINISHING: Duration = Duration::from_secs(10);

/// Bytes asked of a pipe at once, at first: enough for a terminal's line.
const SMALL_READ: usize = 8 * 1024;
/// Bytes asked of a pipe at once when there is always more. Copies of 8 KiB cost 14 to 47 % CPU.
const LARGE_READ: usize = 128 * 1024;

/// Which of a session's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    /// Standard output, or the bytes of a stream.
    Data,
    /// Standard error.
    Error,
}

/// Writes what the client sends, to its end. If the other side wants no more, the rest is dropped as it
/// comes: it must not hold up the connection.
pub(super) async fn pump_in<W: AsyncWrite + Unpin>(inbox: &Inbox, mut writer: W) {
    while let Some(piece) = inbox.next_data().await {
        if writer.write_all(&piece).await.is_err() {
            inbox.discard();
            return;
        }
    }
    _ = writer.shutdown().await;
}

/// Takes what nobody is there for any more, and never returns: a process that is to finish its input must not be
/// held up by its output.
pub(super) async fn throw_away<R: AsyncRead + Unpin, S: AsyncRead + Unpin>(mut stdout: R, mut stderr: S) -> Infallible {
    let (mut no_output, mut no_errors) = (tokio::io::sink(), tokio::io::sink());
    _ = tokio::join!(tokio::io::copy(&mut stdout, &mut no_output), tokio::io::copy(&mut stderr, &mut no_errors));
    std::future::pending().await
}

/// Sends the client what there is to read, to its end. A failed read is an end.
pub(super) async fn pump_out<R: AsyncRead + Unpin>(mut reader: R, outlet: &Outlet, output: Output) -> Result<(), Gone> {
    let mut size = SMALL_READ;
    let mut buffer = BytesMut::new();
    loop {
        if buffer.capacity() < size / 2 {
            buffer.reserve(size);
        }
        let room = buffer.capacity();
        let count = reader.read_buf(&mut buffer).await.unwrap_or(0);
        if count == 0 {
            return Ok(());
        }
        if count == room {
            size = (size * 2).min(LARGE_READ);
        }
        let piece = buffer.split().freeze();
        match output {
            Output::Data => outlet.data(piece).await?,
            Output::Error => outlet.error(piece).await?,
        }
    }
}
