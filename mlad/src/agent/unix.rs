//! Unix sockets of the user: bound and connected with the user's rights, whatever the path.

use super::{limits, rights::Rights};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::{
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};
use tokio::net::{UnixListener, UnixStream};

/// Connects to a socket as the user.
///
/// # Errors
/// When the user may not, nobody listens, or who listens does not accept in time.
pub(super) async fn connect(rights: &Rights, path: PathBuf) -> io::Result<UnixStream> {
    let stream = rights.run(move || connect_blocking(&path)).await?;
    UnixStream::from_std(stream)
}

fn connect_blocking(path: &Path) -> io::Result<std::os::unix::net::UnixStream> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(limits::CONNECT_TIME))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, None)?;
    let stream = std::os::unix::net::UnixStream::from(socket);
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// A socket the user listens on.
#[derive(Debug)]
pub(super) struct UserListener {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Device and inode of what was made, so that nothing else is removed.
    identity: (u64, u64),
    /// A folder made for it alone, to be removed with it.
    folder: Option<PathBuf>,
}

impl UserListener {
    /// Listens as the user, for the user alone.
    ///
    /// # Errors
    /// When the user may not, or there is something at the path.
    pub(super) async fn bind(rights: &Rights, path: PathBuf) -> io::Result<Self> {
        Self::bind_in(rights, path, None).await
    }

    /// Listens in a new folder that only the user can enter; returns also the socket's path.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub(super) async fn bind_in_new_folder(rights: &Rights) -> io::Result<(Self, PathBuf)> {
        let folder = rights.run(new_folder).await?;
        let path = folder.join("agent.sock");
        Ok((Self::bind_in(rights, path.clone(), Some(folder)).await?, path))
    }

    async fn bind_in(rights: &Rights, path: PathBuf, folder: Option<PathBuf>) -> io::Result<Self> {
        let at = path.clone();
        let (listener, identity) = rights.run(move || bind_blocking(&at)).await?;
        Ok(Self { listener: UnixListener::from_std(listener)?, path, identity, folder })
    }

    /// Removes the socket, if it is still the one that was made.
    pub(super) async fn remove(self, rights: &Rights) {
        let Self { listener, path, identity, folder } = self;
        drop(listener);
        let removed = rights.run(move || {
            if identity_of(&path)? == identity {
                std::fs::remove_file(&path)?;
            }
            folder.map_or(Ok(()), std::fs::remove_dir)
        });
        if let Err(error) = removed.await {
            tracing::debug!(%error, "a socket of the user is left behind");
        }
    }
}

fn bind_blocking(path: &Path) -> io::Result<(std::os::unix::net::UnixListener, (u64, u64))> {
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    // Nobody but the user could write to it before this either: the umask takes that from others.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok((listener, identity_of(path)?))
}

fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn new_folder() -> io::Result<PathBuf> {
    use std::{
        hash::{BuildHasher as _, RandomState},
        os::unix::fs::DirBuilderExt as _,
    };
    loop {
        // Need not be secret: only a folder that was not there before is taken.
        let name = format!("ssh-{:016x}", RandomState::new().hash_one(0));
        let folder = std::env::temp_dir().join(name);
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => return result.map(|()| folder),
        }
    }
}
