//! Ending whatever uses a GPU: for a machine whose lease on its GPUs ran out.

use super::{Driver, DriverError};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    path::{Component, Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

/// How long processes may take to end once they are killed: the driver takes its time over their memory.
const END: Duration = Duration::from_secs(10);
/// How often is looked whether they have.
const LOOK: Duration = Duration::from_millis(50);
/// Where the control groups are.
const GROUPS: &str = "/sys/fs/cgroup";

/// Kills everything that uses a GPU, with all of its container, and destroys the instances on it.
///
/// # Errors
/// When processes do not end, or the driver does not tell or does not do it.
pub(super) fn clear(driver: &dyn Driver, gpu: &str) -> Result<(), DriverError> {
    let deadline = Instant::now() + END;
    loop {
        let users = match driver.users(gpu) {
            Ok(users) => users,
            // Nothing runs on what is not there.
            Err(DriverError::Lost(_) | DriverError::NotFound) => return Ok(()),
            Err(error) => return Err(error),
        };
        if users.is_empty() {
            break;
        }
        if Instant::now() >= deadline {
            return Err(DriverError::InUse);
        }
        users.iter().for_each(|pid| end(gpu, *pid));
        sleep(LOOK);
    }
    let reading = driver.read(gpu)?;
    for instance in reading.instances.iter().filter(|_| reading.model.sliced) {
        match driver.destroy(gpu, instance.id) {
            Ok(()) | Err(DriverError::NotFound) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Kills a process, and what is in the same container: it might begin anew there.
fn end(gpu: &str, pid: u32) {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    if let Some(group) = container(&groups) {
        tracing::warn!(gpu, pid, group = %group.display(), "killing a container that uses a GPU");
        let file = Path::new(GROUPS).join(&group).join("cgroup.kill");
        if let Err(error) = fs::write(&file, "1") {
            tracing::debug!(file = %file.display(), %error, "only the process is killed");
        }
    }
    let Some(process) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    match kill_process(process, Signal::KILL) {
        Ok(()) => tracing::warn!(gpu, pid, "killed a process that uses a GPU"),
        Err(error) => tracing::debug!(pid, %error, "it has ended by itself"),
    }
}

/// The control group of the container that a process is in, by what `/proc/PID/cgroup` says of it (version 2 of control
/// groups): the innermost whose name has a container's number of 64 hexadecimal digits.
fn container(groups: &str) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let path = Path::new(path);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    let named = |path: &&Path| path.file_name().and_then(|name| name.to_str()).is_some_and(has_number);
    plain.then(|| path.ancestors().find(named).map(Path::to_owned)).flatten()
}

/// Whether a name is, or contains as a part of its own, a container's number.
fn has_number(name: &str) -> bool {
    let is_number = |part: &str| part.len() == 64 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    name.split(['-', '.', '_', ':']).any(is_number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_container_of_a_process() {
        let number = "0123456789abcdef".repeat(4);
        let found = |path: String| container(&format!("0::{path}\n")).map(|path| format!("/{}", path.display()));
        for group in [
            format!("/system.slice/docker-{number}.scope"),
            format!("/docker/{number}"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-{number}.scope"
            ),
            format!("/machine.slice/libpod-{number}.scope"),
        ] {
            assert_eq!(found(group.clone()), Some(group.clone()));
            assert_eq!(found(format!("{group}/inner/one")), Some(group));
        }
        for other in ["/", "/system.slice/sshd.service", "/user.slice/user-0.slice/session-1.scope"] {
            assert_eq!(found(other.to_owned()), None, "{other}");
        }
        assert_eq!(found(format!("/../docker/{number}")), None);
    }
}
