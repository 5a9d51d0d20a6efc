//! Forwarding: connections into the container, and listeners in it.

use super::{
    incoming::{self, Listener, announce},
    limits,
    resolve::bind_addresses,
    server::{CONNECT_FAILED, PROHIBITED, Shared, refuse},
    splice::ByteStream,
    ticket::Guest,
    unix::{self, UserListener},
};
use crate::channel::{Connection, ConnectionReader, Frame};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use std::{
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

/// First port that is nobody's privilege.
const FIRST_FREE_PORT: u32 = 1024;
/// Tries to get the same free port on both families.
const PORT_TRIES: u32 = 16;
/// Frames on their way to the writer.
const FRAMES: usize = 16;

/// Connects to a TCP port and joins the gateway to it.
///
/// # Errors
/// When the connection of the gateway fails.
pub(super) async fn direct_tcpip(guest: Guest, host: &str, port: u32, shared: &Shared) -> io::Result<()> {
    let connect = async {
        let within = tokio::time::timeout(limits::CONNECT_ALL_TIME, connect_tcp(host, port, shared));
        within.await.unwrap_or_else(|_| Err(format!("{host} port {port} does not answer")))
    };
    direct(guest, connect).await
}

/// Connects to a Unix socket as the user and joins the gateway to it.
///
/// # Errors
/// When the connection of the gateway fails.
pub(super) async fn direct_streamlocal(guest: Guest, path: &str, shared: &Shared) -> io::Result<()> {
    let at = from_home(path, shared);
    let connect = async {
        let stream = unix::connect(&shared.rights, at).await.map_err(|error| format!("{path}: {error}"))?;
        Ok(Box::new(stream) as Box<dyn ByteStream>)
    };
    direct(guest, connect).await
}

/// sshd takes a relative path from where it happens to run; the home is what people mean.
fn from_home(path: &str, shared: &Shared) -> PathBuf {
    shared.user.home.join(path)
}

async fn direct(guest: Guest, connect: impl Future<Output = Result<Box<dyn ByteStream>, String>>) -> io::Result<()> {
    let gone = guest.connection.reader.hang_up()?;
    tokio::select! {
        connected = connect => match connected {
            Ok(stream) => incoming::join(guest, stream).await,
            Err(message) => refuse(guest.connection, CONNECT_FAILED, &message).await,
        },
        () = gone.wait() => Ok(()),
    }
}

async fn connect_tcp(host: &str, port: u32, shared: &Shared) -> Result<Box<dyn ByteStream>, String> {
    let port = u16::try_from(port).ok().filter(|port| *port > 0).ok_or_else(|| format!("{port} is no port"))?;
    let mut failure = format!("{host} has no address");
    for address in shared.names.addresses(host).await? {
        let address = SocketAddr::new(address, port);
        match tokio::time::timeout(limits::CONNECT_TIME, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                let _ = stream.set_nodelay(true);
                return Ok(Box::new(stream));
            }
            Ok(Err(error)) => failure = format!("{address}: {error}"),
            Err(_) => failure = format!("{address} does not answer"),
        }
    }
    Err(failure)
}

/// Listens on TCP for as long as the connection lives.
///
/// # Errors
/// When the connection fails.
pub(super) async fn tcpip_forward(
    mut connection: Connection,
    address: &str,
    port: u32,
    shared: &Arc<Shared>,
) -> io::Result<()> {
    let listeners = match bind_tcp(address, port, shared).await {
        Ok(listeners) => listeners,
        Err((reason, message)) => return refuse(connection, reason, &message).await,
    };
    let port = listeners.first().and_then(|first| first.local_addr().ok()).map_or(0, |address| address.port());
    connection.writer.write(&Frame::Opened { port: port.into() }).await?;
    let (sender, frames) = mpsc::channel(FRAMES);
    let announcing = futures::future::join_all(
        listeners.iter().map(|listener| announce(Listener::Tcp(listener), sender.clone(), shared)),
    );
    listen(connection, frames, async { drop(announcing.await) }).await;
    Ok(())
}

/// Listens on a Unix socket as the user for as long as the connection lives.
///
/// # Errors
/// When the connection fails.
pub(super) async fn streamlocal_forward(
    mut connection: Connection,
    path: &str,
    shared: &Arc<Shared>,
) -> io::Result<()> {
    let _before_the_end = shared.tasks.token();
    let bound = match UserListener::bind(&shared.rights, from_home(path, shared)).await {
        Ok(bound) => bound,
        Err(error) => return refuse(connection, CONNECT_FAILED, &format!("cannot listen on {path}: {error}")).await,
    };
    let opened = connection.writer.write(&Frame::Opened { port: 0 }).await;
    if opened.is_ok() {
        let (sender, frames) = mpsc::channel(FRAMES);
        tokio::select! {
            () = listen(connection, frames, announce(Listener::Unix(&bound.listener), sender, shared)) => {}
            () = shared.ending.hang_up.cancelled() => {}
        }
    }
    bound.remove(&shared.rights).await;
    opened
}

/// Announces until the gateway closes.
async fn listen(connection: Connection, mut frames: mpsc::Receiver<Frame>, announcing: impl Future<Output = ()>) {
    let Connection { mut reader, mut writer } = connection;
    let write = async {
        while let Some(frame) = frames.recv().await {
            if writer.write(&frame).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = closed(&mut reader) => {}
        () = write => {}
        () = announcing => {}
    }
}

/// Returns when the gateway closes, or sends anything: nothing is expected of it here.
pub(super) async fn closed(reader: &mut ConnectionReader) {
    let _ = reader.read().await;
}

async fn bind_tcp(address: &str, port: u32, shared: &Shared) -> Result<Vec<TcpListener>, (u32, String)> {
    let number = u16::try_from(port).map_err(|_| (CONNECT_FAILED, format!("{port} is no port")))?;
    if (1..FIRST_FREE_PORT).contains(&port) {
        return Err((PROHIBITED, format!("port {port} is privileged; take one from {FIRST_FREE_PORT} up, or 0")));
    }
    let addresses = match bind_addresses(address) {
        Some(addresses) => addresses,
        None => shared.names.addresses(address).await.map_err(|message| (CONNECT_FAILED, message))?,
    };
    bind_all(&addresses, number).map_err(|error| (CONNECT_FAILED, format!("cannot listen on port {port}: {error}")))
}

/// Binds as many of the addresses as can be, all to the same port; at least one.
fn bind_all(addresses: &[IpAddr], port: u16) -> io::Result<Vec<TcpListener>> {
    let mut tries = 0;
    loop {
        tries += 1;
        let (mut bound, mut failure) = (Vec::<TcpListener>::new(), io::Error::from(io::ErrorKind::AddrNotAvailable));
        let mut taken = false;
        for address in addresses {
            let port = bound.first().map_or(Ok(port), |first| Ok(first.local_addr()?.port()));
            match port.and_then(|port: u16| bind_one(SocketAddr::new(*address, port))) {
                Ok(listener) => bound.push(listener),
                Err(error) => {
                    taken |= error.kind() == io::ErrorKind::AddrInUse;
                    failure = error;
                }
            }
        }
        // A port the system chose for one family may be somebody's on the other.
        if port == 0 && taken && tries < PORT_TRIES {
            continue;
        }
        return if bound.is_empty() { Err(failure) } else { Ok(bound) };
    }
}

fn bind_one(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, 128)?;
    TcpListener::from_std(socket.into())
}
