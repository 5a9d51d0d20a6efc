//! Two byte streams joined: bytes and ends of file both ways, until both ways have ended.

use super::limits;
use crate::channel::Stream;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Bytes under way in each direction.
const BUFFER: usize = 64 * 1024;

/// Anything that can be joined to the gateway.
pub(super) trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// Joins the gateway's stream to a target. When the gateway closes wholly, what it sent is still delivered.
///
/// # Errors
/// When the gateway's closing cannot be watched.
pub(super) async fn join(gateway: Stream, target: Box<dyn ByteStream>) -> io::Result<()> {
    let gone = gateway.hang_up()?;
    let (from_gateway, to_gateway) = tokio::io::split(gateway);
    let (from_target, to_target) = tokio::io::split(target);
    let mut delivery = std::pin::pin!(deliver(from_gateway, to_target));
    let answer = async {
        if copy(from_target, to_gateway).await.is_err() {
            // The target or the gateway is gone; the latter is noticed below, the former by delivery.
            std::future::pending::<()>().await;
        }
    };
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        () = &mut answer => delivery.await,
        () = &mut delivery => tokio::select! {
            () = answer => {}
            () = gone.wait() => {}
        },
        () = gone.wait() => drop(tokio::time::timeout(limits::LINGER, delivery).await),
    }
    Ok(())
}

/// Copies to the target. If that takes no more, the rest is thrown away, so that the gateway never waits for it.
async fn deliver(mut gateway: impl AsyncRead + Unpin, target: impl AsyncWrite + Unpin) {
    if copy(&mut gateway, target).await.is_err() {
        let _ = tokio::io::copy(&mut gateway, &mut tokio::io::sink()).await;
    }
}

async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(buffer.get(..count).unwrap_or_default()).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::Connection;
    use tokio::net::UnixStream;

    fn joined() -> (UnixStream, UnixStream, tokio::task::JoinHandle<io::Result<()>>) {
        let (gateway, inner) = UnixStream::pair().unwrap();
        let (target, far) = UnixStream::pair().unwrap();
        let task = tokio::spawn(join(Connection::new(inner, true).into_stream(), Box::new(far)));
        (gateway, target, task)
    }

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        let (mut gateway, mut target, task) = joined();
        let mut text = String::new();
        gateway.write_all(b"question").await.unwrap();
        gateway.shutdown().await.unwrap();
        target.read_to_string(&mut text).await.unwrap();
        target.write_all(b" answer").await.unwrap();
        target.shutdown().await.unwrap();
        gateway.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "question answer");
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_other_direction_may_end_first() {
        let (mut gateway, mut target, task) = joined();
        let mut text = String::new();
        target.write_all(b"greeting").await.unwrap();
        target.shutdown().await.unwrap();
        gateway.read_to_string(&mut text).await.unwrap();
        gateway.write_all(b" reply").await.unwrap();
        gateway.shutdown().await.unwrap();
        target.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "greeting reply");
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn when_the_gateway_closes_what_it_sent_arrives_and_the_target_is_let_go() {
        let (mut gateway, mut target, task) = joined();
        let sent = vec![7; 300_000];
        let mut received = Vec::new();
        let read = async {
            target.read_to_end(&mut received).await.unwrap();
        };
        let write = async {
            gateway.write_all(&sent).await.unwrap();
            drop(gateway);
        };
        tokio::join!(read, write);
        assert_eq!(received, sent);
        task.await.unwrap().unwrap();
        assert_eq!(target.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
