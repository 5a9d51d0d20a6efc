//! Doing something in the file system with the user's rights, so that the kernel decides and no check can be raced.

use super::{account::User, limits};
use rustix::thread::{CapabilitySet, capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use rustix::{fs::Gid, fs::Uid};
use std::{io, sync::Arc};
use tokio::sync::{Semaphore, oneshot};

/// The user's rights, to be used by threads that live for one piece of work.
#[derive(Debug, Clone)]
pub(super) struct Rights {
    uid: Uid,
    gid: Gid,
    threads: Arc<Semaphore>,
}

impl Rights {
    pub(super) fn of(user: &User) -> Self {
        Self {
            uid: Uid::from_raw(user.uid),
            gid: Gid::from_raw(user.gid),
            threads: Arc::new(Semaphore::new(limits::RIGHTS_THREADS)),
        }
    }

    /// Does `work`, which may block, in a thread of its own with the user's effective ids, no supplementary
    /// groups and no effective capability. Real and saved ids stay, so that no process of the user can touch
    /// the thread. If the caller is cancelled the work still ends by itself.
    ///
    /// # Errors
    /// Those of `work`, and when the ids cannot be changed.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let permit = Arc::clone(&self.threads).acquire_owned().await.map_err(io::Error::other)?;
        let (sender, receiver) = oneshot::channel();
        let (uid, gid) = (self.uid, self.gid);
        std::thread::Builder::new().name("user-rights".into()).spawn(move || {
            let _permit = permit;
            let _ = sender.send(lower(uid, gid).and_then(|()| work()));
        })?;
        receiver.await.map_err(io::Error::other)?
    }
}

/// Changes the effective ids of this thread alone.
fn lower(uid: Uid, gid: Gid) -> io::Result<()> {
    if rustix::process::geteuid() == uid && !uid.is_root() {
        return Ok(());
    }
    set_thread_groups(&[])?;
    set_thread_res_gid(None, gid, None)?;
    set_thread_res_uid(None, uid, None)?;
    let kept = capabilities(None)?.effective;
    if kept != CapabilitySet::empty() {
        return Err(io::Error::other(format!("capabilities stay with the user's ids: {kept:?}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::MetadataExt as _, path::PathBuf};

    fn user() -> User {
        User { name: "kim".into(), uid: 12345, gid: 12346, home: PathBuf::from("/"), shell: PathBuf::from("/bin/sh") }
    }

    #[tokio::test]
    async fn files_belong_to_the_user_and_roots_are_out_of_reach() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(folder.path(), Some(12345), None).unwrap();
        let (own, private) = (folder.path().join("own"), tempfile::tempdir().unwrap());
        let rights = Rights::of(&user());
        let path = own.clone();
        rights.run(move || fs::write(path, "x")).await.unwrap();
        let metadata = fs::metadata(&own).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (12345, 12346));
        let path = private.path().join("own");
        let error = rights.run(move || fs::write(path, "x")).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(rustix::process::geteuid().is_root(), "only that thread was changed");
    }
}
