//! Two byte streams joined: bytes and ends of file both ways, until both ways have ended.

use super::limits;
use crate::channel::Stream;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;

/// Bytes under way in each direction.
const BUFFER: usize = 64 * 1024;

/// Anything that can be joined to the gateway.
pub(super) trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// Joins the gateway's stream to a target. When the gateway closes wholly, what it sent is still delivered. When
/// the target is lost in both directions, the gateway's stream is closed wholly, which tells it so.
///
/// # Errors
/// When the gateway's closing cannot be watched.
pub(super) async fn join(gateway: Stream, target: Box<dyn ByteStream>) -> io::Result<()> {
    let gone = gateway.hang_up()?;
    let (from_gateway, to_gateway) = tokio::io::split(gateway);
    let (from_target, to_target) = tokio::io::split(target);
    let refused = CancellationToken::new();
    let mut delivery = std::pin::pin!(deliver(from_gateway, to_target, &refused));
    let mut answer = std::pin::pin!(answer(from_target, to_gateway));
    let (mut delivered, mut answered) = (false, false);
    while !(delivered && answered) {
        tokio::select! {
            end = &mut answer, if !answered => match end {
                End::Eof => answered = true,
                End::Lost => return Ok(()),
            },
            () = &mut delivery, if !delivered => delivered = true,
            () = refused.cancelled(), if answered => return Ok(()),
            () = gone.wait() => {
                if !delivered {
                    drop(tokio::time::timeout(limits::LINGER, delivery).await);
                }
                return Ok(());
            }
        }
    }
    Ok(())
}

/// How what the target says came to its end.
enum End {
    /// By its end of file, which was passed on.
    Eof,
    /// It was reset, or has failed: it takes no more either.
    Lost,
}

/// Copies to the gateway. Never returns if that takes no more: it is gone, and was watched.
async fn answer(mut target: impl AsyncRead + Unpin, mut gateway: impl AsyncWrite + Unpin) -> End {
    match copy(&mut target, &mut gateway).await {
        Ok(()) => End::Eof,
        Err(Broken::Source) => {
            // What was heard before is not held back by anything; its end is known at once.
            let _ = gateway.shutdown().await;
            End::Lost
        }
        Err(Broken::Sink) => std::future::pending().await,
    }
}

/// Copies to the target. If that takes no more, says so, and the rest is thrown away, so that the gateway never
/// waits for it.
async fn deliver(
    mut gateway: impl AsyncRead + Unpin,
    mut target: impl AsyncWrite + Unpin,
    refused: &CancellationToken,
) {
    if let Err(Broken::Sink) = copy(&mut gateway, &mut target).await {
        refused.cancel();
        let _ = tokio::io::copy(&mut gateway, &mut tokio::io::sink()).await;
    }
}

/// Which side of a copy has failed.
enum Broken {
    Source,
    Sink,
}

async fn copy(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> Result<(), Broken> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await.map_err(|_| Broken::Source)?;
        if count == 0 {
            return to.shutdown().await.map_err(|_| Broken::Sink);
        }
        to.write_all(buffer.get(..count).unwrap_or_default()).await.map_err(|_| Broken::Sink)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::Connection;
    use std::time::Duration;
    use tokio::{
        net::{TcpListener, TcpStream, UnixStream},
        time::timeout,
    };

    const SOON: Duration = Duration::from_secs(10);

    fn joined() -> (UnixStream, UnixStream, tokio::task::JoinHandle<io::Result<()>>) {
        let (target, far) = UnixStream::pair().unwrap();
        let (gateway, task) = joined_to(far);
        (gateway, target, task)
    }

    fn joined_to(far: impl ByteStream + 'static) -> (UnixStream, tokio::task::JoinHandle<io::Result<()>>) {
        let (gateway, inner) = UnixStream::pair().unwrap();
        (gateway, tokio::spawn(join(Connection::new(inner, true).into_stream(), Box::new(far))))
    }

    async fn tcp_pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (listener.accept().await.unwrap().0, far)
    }

    /// The gateway neither speaks nor closes: it learns of the loss all the same.
    #[tokio::test]
    async fn a_target_that_is_reset_ends_the_whole_connection() {
        let (mut target, far) = tcp_pair().await;
        let (mut gateway, task) = joined_to(far);
        target.write_all(b"last words").await.unwrap();
        let mut text = [0; 10];
        timeout(SOON, gateway.read_exact(&mut text)).await.unwrap().unwrap();
        rustix::net::sockopt::set_socket_linger(&target, Some(Duration::ZERO)).unwrap();
        drop(target);
        timeout(SOON, task).await.expect("the loss was noticed").unwrap().unwrap();
        assert_eq!((timeout(SOON, gateway.read(&mut text)).await.unwrap().unwrap(), &text), (0, b"last words"));
        assert_eq!(gateway.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    /// It had said all it had to say; that it takes no more is known when something is sent.
    #[tokio::test]
    async fn a_target_that_is_reset_after_its_end_of_file_ends_the_whole_connection() {
        let (mut target, far) = tcp_pair().await;
        let (mut gateway, task) = joined_to(far);
        target.shutdown().await.unwrap();
        assert_eq!(timeout(SOON, gateway.read(&mut [0; 1])).await.unwrap().unwrap(), 0);
        rustix::net::sockopt::set_socket_linger(&target, Some(Duration::ZERO)).unwrap();
        drop(target);
        let noticed = async {
            while gateway.write_all(b"x").await.is_ok() {
                tokio::task::yield_now().await
            }
        };
        timeout(SOON, noticed).await.expect("the loss was noticed");
        timeout(SOON, task).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_target_that_takes_nothing_may_still_speak() {
        let (mut gateway, target, task) = joined();
        let mut target = target.into_std().unwrap();
        target.shutdown(std::net::Shutdown::Read).unwrap();
        // Thrown away, however much it is: the gateway does not wait.
        timeout(SOON, gateway.write_all(&vec![0; 1 << 20])).await.unwrap().unwrap();
        std::io::Write::write_all(&mut target, b"answer").unwrap();
        let mut text = [0; 6];
        timeout(SOON, gateway.read_exact(&mut text)).await.unwrap().unwrap();
        assert_eq!(&text, b"answer");
        drop(target);
        timeout(SOON, task).await.unwrap().unwrap().unwrap();
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
