//! What comes before a container where nobody can mount files into it: `mlad` is copied to where the container finds it,
//! and the image's tables of accounts get the user as one more, for agents that are not root.

use super::{
    AgentError,
    account::{self, User},
};
use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Name of the program in the folder it is copied to.
const PROGRAM: &str = "mlad";

/// `mlad agent install FOLDER`: copies this program into a folder.
pub(super) fn copy(arguments: impl Iterator<Item = OsString>) -> Result<ExitCode, AgentError> {
    let [folder] = exactly(arguments)?;
    let target = Path::new(&folder).join(PROGRAM);
    let write = || {
        // Under another name first: whoever finds it finds it whole.
        let part = target.with_extension("part");
        std::fs::copy("/proc/self/exe", &part)?;
        std::fs::set_permissions(&part, std::fs::Permissions::from_mode(0o755))?;
        std::fs::rename(&part, &target)
    };
    write().map_err(AgentError::system(format!("cannot copy mlad to {}", target.display())))?;
    Ok(ExitCode::SUCCESS)
}

/// `mlad agent accounts CONFIG FOLDER`: writes the image's `passwd` and `group` with the user in them, and what keeps
/// the image's `PATH` (`profile`), into a folder, to be mounted over those of the image.
pub(super) fn accounts(arguments: impl Iterator<Item = OsString>) -> Result<ExitCode, AgentError> {
    let [config, folder] = exactly(arguments)?;
    let (config, folder) = (PathBuf::from(config), PathBuf::from(folder));
    let settings = account::read_config(&config)?;
    let user = User::of(&settings).map_err(|reason| AgentError::Config { path: config, reason })?;
    let environment = account::environment(&user, &settings.environment);
    let path = environment.get(OsStr::new("PATH")).map(OsString::as_os_str);
    write_tables(&user, Path::new("/etc"), path, &folder)
        .map_err(AgentError::system(format!("cannot write accounts to {}", folder.display())))?;
    Ok(ExitCode::SUCCESS)
}

fn write_tables(user: &User, etc: &Path, path: Option<&OsStr>, folder: &Path) -> io::Result<()> {
    for (name, table) in account::tables(user, etc)? {
        std::fs::write(folder.join(name), table)?;
    }
    std::fs::write(folder.join("profile"), account::profile(path.and_then(OsStr::to_str).unwrap_or_default()))
}

fn exactly<const N: usize>(mut arguments: impl Iterator<Item = OsString>) -> Result<[OsString; N], AgentError> {
    let taken: Vec<OsString> = arguments.by_ref().take(N).collect();
    let given = match arguments.next() {
        Some(surplus) => Err(surplus),
        None => taken.try_into().map_err(|few: Vec<OsString>| few.last().cloned().unwrap_or_default()),
    };
    given.map_err(AgentError::Argument)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_is_one_more_of_the_images_accounts() {
        let (etc, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(etc.path().join("passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
        let home = PathBuf::from("/home/kim");
        let user = User { name: "kim".into(), uid: 20001, gid: 20001, home, shell: "/bin/sh".into() };
        write_tables(&user, etc.path(), Some(OsStr::new("/opt/conda/bin:/bin")), folder.path()).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(read("passwd"), "root:x:0:0:root:/root:/bin/sh\nkim:x:20001:20001::/home/kim:/bin/sh\n");
        assert_eq!(read("group"), "kim:x:20001:\n", "an image without a table gets one");
        assert!(read("profile").contains("/opt/conda/bin"));
    }

    #[test]
    fn arguments_are_counted() {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>().into_iter();
        assert!(exactly::<1>(words(&[])).is_err());
        assert!(exactly::<1>(words(&["a", "b"])).is_err());
        assert_eq!(exactly::<2>(words(&["a", "b"])).unwrap(), ["a", "b"]);
    }
}
