//! An agent as a hostile container could have it: it says what a test says.

use mlad::channel::{Connection, Exit, Frame, Open, Request};
use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};
use tokio::{
    net::UnixListener,
    task::{AbortHandle, JoinSet},
};

/// The agent.
pub struct Scripted {
    socket: PathBuf,
    /// What it was asked to open, in order.
    pub opened: Arc<Mutex<Vec<Open>>>,
    task: AbortHandle,
}

impl Scripted {
    /// One that serves every connection as `serve` does, once its first frame is read.
    pub fn start<F: Future<Output = ()> + Send + 'static>(
        socket: &Path,
        serve: impl Fn(Open, Connection) -> F + Send + 'static,
    ) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let opened: Arc<Mutex<Vec<Open>>> = Arc::default();
        let heard = Arc::clone(&opened);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let mut connection = Connection::new(stream, true);
                let Ok(Some(Frame::Open(open))) = connection.reader.read().await else { continue };
                heard.lock().unwrap().push(open.clone());
                connections.spawn(serve(open, connection));
            }
        });
        Self { socket: socket.into(), opened, task: task.abort_handle() }
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Says yes to the opening of a session and to everything it asks for, the start of its process included; the
/// descriptors that came with that.
pub async fn agree(connection: &mut Connection) -> Option<Vec<OwnedFd>> {
    connection.writer.write(&Frame::Opened { port: 0 }).await.ok()?;
    loop {
        let frame = connection.reader.read().await.ok()??;
        let descriptors = connection.reader.take_descriptors();
        let Frame::Request(request) = frame else { continue };
        if request.is_answered() {
            connection.writer.write(&Frame::Success).await.ok()?;
        }
        if matches!(request, Request::Shell | Request::Exec { .. } | Request::Subsystem { .. }) {
            return Some(descriptors);
        }
    }
}

/// A session of a process that ends at once, without a word.
pub async fn end_at_once(mut connection: Connection) {
    let Some(descriptors) = agree(&mut connection).await else { return };
    drop(descriptors);
    let _ = connection.writer.write(&Frame::Exit(Exit::Status(0))).await;
    until_closed(connection).await;
}

/// Reads until the gateway closes.
pub async fn until_closed(mut connection: Connection) {
    while let Ok(Some(_)) = connection.reader.read().await {}
}
