//! Whether a CDI specification names a slice, so that the engine can be asked for it.
//!
//! Specifications are files. NVIDIA's tool writes them when it is told to, and nobody tells it when a slice is
//! made (NVIDIA/nvidia-container-toolkit#1828). So they are looked at before a container is started, and made
//! anew where they do not name its slices.

use super::{super::RuntimeError, lifecycle::blocking};
use crate::config::Container as Settings;
use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{
    io::AsyncReadExt as _,
    process::{ChildStderr, Command},
    sync::Mutex,
};

/// Deadline of the command that makes specifications: it asks the driver about every GPU.
const DEADLINE: Duration = Duration::from_secs(60);
/// What the devices are called in a specification.
const KIND: &str = "nvidia.com/gpu";
/// Most specifications of one folder that are read, and most bytes of each.
const MAX_FILES: usize = 256;
const MAX_BYTES: u64 = 4 << 20;
/// How much of the command's complaints is kept, in bytes: the end of it.
const LAST_WORDS: usize = 1024;

/// The CDI specifications of the host.
#[derive(Debug)]
pub(super) struct Cdi {
    directories: Vec<PathBuf>,
    command: Vec<String>,
    deadline: Duration,
    /// One at a time: two would write the same file.
    making: Mutex<()>,
}

impl Cdi {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            directories: settings.cdi_directories.clone(),
            command: settings.cdi_command.clone(),
            deadline: DEADLINE,
            making: Mutex::new(()),
        }
    }

    /// Makes sure that specifications name each of these devices.
    pub(super) async fn ensure(&self, uuids: &[String]) -> Result<(), RuntimeError> {
        if self.missing(uuids).await?.is_empty() {
            return Ok(());
        }
        let _turn = self.making.lock().await;
        // Whoever had the turn before may have made them.
        let missing = self.missing(uuids).await?;
        if missing.is_empty() {
            return Ok(());
        }
        tracing::info!(devices = ?missing, command = ?self.command, "no CDI specification names them; making them anew");
        let made = self.make().await;
        let missing = self.missing(uuids).await?;
        if missing.is_empty() {
            return Ok(());
        }
        Err(self.refusal(&missing, made.err()))
    }

    /// Those of the devices that no specification names.
    async fn missing(&self, uuids: &[String]) -> Result<Vec<String>, RuntimeError> {
        let (directories, mut missing) = (self.directories.clone(), uuids.to_vec());
        let look = blocking(move || {
            for directory in &directories {
                for specification in specifications(directory)? {
                    missing.retain(|uuid| !names(&specification, uuid));
                }
            }
            Ok(missing)
        });
        look.await.map_err(|error| RuntimeError::Host(format!("container.cdi_directories cannot be read: {error}")))
    }

    /// Runs the command; what it complained about if it failed.
    async fn make(&self) -> Result<(), String> {
        let Some((program, arguments)) = self.command.split_first() else {
            return Err("container.cdi_command is empty".to_owned());
        };
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("it cannot be started: {error}"))?;
        let attend = async move {
            let words = match child.stderr.take() {
                Some(stderr) => last_words(stderr).await,
                None => String::new(),
            };
            (child.wait().await, words)
        };
        match tokio::time::timeout(self.deadline, attend).await {
            Err(_) => Err(format!("it did not end within {} s", self.deadline.as_secs())),
            Ok((Err(error), _)) => Err(error.to_string()),
            Ok((Ok(status), _)) if status.success() => Ok(()),
            Ok((Ok(status), words)) => Err(format!("{status}: {words}")),
        }
    }

    fn refusal(&self, missing: &[String], failure: Option<String>) -> RuntimeError {
        let directories: Vec<_> = self.directories.iter().map(|path| path.display().to_string()).collect();
        let failure = failure.unwrap_or_else(|| "it ended well, and they are still not named by their UUID".to_owned());
        RuntimeError::Host(format!(
            "container.gpu_binding is \"cdi\", and no CDI specification in {} names {}. They were to be made by `{}`: \
             {failure}. Run it by hand to see why, correct container.cdi_command, or set container.gpu_binding to \
             \"device-request\"",
            directories.join(" or "),
            missing.join(", "),
            self.command.join(" "),
        ))
    }
}

/// The texts of the specifications in a folder; none if there is no such folder.
fn specifications(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut texts = Vec::new();
    for entry in entries.take(MAX_FILES) {
        let path = entry?.path();
        // As the engine: other names are not looked at.
        if path.extension().is_none_or(|extension| extension != "json" && extension != "yaml") {
            continue;
        }
        // One that vanished, or is no text, names nothing.
        let mut text = String::new();
        let read = File::open(&path).and_then(|file| file.take(MAX_BYTES).read_to_string(&mut text));
        if read.is_ok() && text.contains(KIND) {
            texts.push(text);
        }
    }
    Ok(texts)
}

/// Whether a specification has a device of this name: `name: X` in YAML, `"name": "X"` in JSON.
///
/// It is only searched, not parsed: a UUID stands in no other `name`, and if this is mistaken all the same, the
/// engine says so when it is asked for the device.
fn names(specification: &str, device: &str) -> bool {
    let filling = [' ', '\t', '"', '\''];
    specification.match_indices(device).any(|(start, found)| {
        let before = specification.get(..start).unwrap_or_default().trim_end_matches(filling);
        let key = before.strip_suffix(':').map(|key| key.trim_end_matches(filling));
        let after = specification.get(start + found.len()..).unwrap_or_default();
        let is_end = |next: char| !next.is_alphanumeric() && !matches!(next, '-' | '_' | '.' | ':');
        let is_key = |key: &str| {
            key.strip_suffix("name").is_some_and(|rest| !rest.ends_with(|last: char| last.is_alphanumeric()))
        };
        key.is_some_and(is_key) && after.chars().next().is_none_or(is_end)
    })
}

/// The last line of what a program complains about, when it has ended.
async fn last_words(mut stderr: ChildStderr) -> String {
    let mut end = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = stderr.read(&mut chunk).await {
        end.extend_from_slice(chunk.get(..count).unwrap_or_default());
        end.drain(..end.len().saturating_sub(LAST_WORDS));
    }
    let text = String::from_utf8_lossy(&end);
    let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it did not say why");
    line.chars().filter(|letter| !letter.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLICE: &str = "MIG-5fa1c8e2-0000-5000-8000-000000000001";
    const YAML: &str = "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n- containerEdits:\n    deviceNodes:\n    - \
                        path: /dev/nvidia0\n  name: NAME\n";

    struct Host {
        folder: tempfile::TempDir,
        cdi: Cdi,
    }

    impl Host {
        /// A host whose command is this script of a shell, in a folder of its own.
        fn new(script: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let script = format!("cd '{}' && {script}", folder.path().display());
            let cdi = Cdi {
                directories: vec![folder.path().join("etc"), folder.path().join("run")],
                command: ["sh", "-c", &script].map(str::to_owned).to_vec(),
                deadline: Duration::from_secs(30),
                making: Mutex::new(()),
            };
            Self { folder, cdi }
        }

        /// A host on which slices can be named, as often as somebody asks; `run/made` has a line for each time.
        fn with_tool() -> Self {
            let host = Self::new("mkdir -p run && echo >> run/made && cp specification run/nvidia.yaml");
            std::fs::write(host.folder.path().join("specification"), YAML.replace("NAME", SLICE)).unwrap();
            host
        }

        fn times_made(&self) -> usize {
            std::fs::read_to_string(self.folder.path().join("run/made")).map_or(0, |text| text.lines().count())
        }

        async fn ensure(&self, slice: &str) -> Result<(), String> {
            self.cdi.ensure(&[slice.to_owned()]).await.map_err(|error| error.to_string())
        }
    }

    #[tokio::test]
    async fn a_slice_made_after_the_specifications_gets_one() {
        let host = Host::with_tool();
        let old = host.folder.path().join("etc");
        std::fs::create_dir(&old).unwrap();
        std::fs::write(old.join("nvidia.yaml"), YAML.replace("NAME", "MIG-old")).unwrap();
        host.ensure("MIG-old").await.unwrap();
        assert_eq!(host.times_made(), 0);
        host.ensure(SLICE).await.unwrap();
        assert_eq!(host.times_made(), 1);
        host.ensure(SLICE).await.unwrap();
        assert_eq!(host.times_made(), 1, "it is named already");
    }

    #[tokio::test]
    async fn many_starts_at_once_make_specifications_once() {
        let host = Host::with_tool();
        let all = (0..16).map(|_| host.ensure(SLICE));
        for result in futures::future::join_all(all).await {
            result.unwrap();
        }
        assert_eq!(host.times_made(), 1);
    }

    #[tokio::test]
    async fn a_slice_that_stays_without_specification_is_an_error_that_says_what_to_do() {
        let host = Host::new("echo starting >&2; echo 'no driver' >&2; exit 3");
        let error = host.ensure(SLICE).await.unwrap_err();
        for said in [SLICE, "sh -c", "exit status: 3: no driver", "device-request", "etc or "] {
            assert!(error.contains(said), "{said}: {error}");
        }
        let error = Host::new("true").ensure(SLICE).await.unwrap_err();
        assert!(error.contains("it ended well"), "{error}");

        let mut host = Host::new("true");
        // Without a shell, which would leave it behind when it is killed.
        host.cdi.command = ["sleep", "600"].map(str::to_owned).to_vec();
        host.cdi.deadline = Duration::ZERO;
        let error = host.ensure(SLICE).await.unwrap_err();
        assert!(error.contains("did not end within 0 s"), "{error}");
        host.cdi.command = vec!["/no/such/program".to_owned()];
        let error = host.ensure(SLICE).await.unwrap_err();
        assert!(error.contains("it cannot be started"), "{error}");
        host.cdi.command = Vec::new();
        let error = host.ensure(SLICE).await.unwrap_err();
        assert!(error.contains("container.cdi_command is empty"), "{error}");
    }

    #[test]
    fn a_device_is_named_by_its_whole_name_only() {
        for text in [
            "- name: MIG-1\n",
            "-   name:   \"MIG-1\"\n",
            "  name: 'MIG-1'",
            "{\"devices\":[{\"name\":\"MIG-1\",\"containerEdits\":{}}]}",
            "{\"name\" : \"MIG-1\"}",
            "name: MIG-12\nname: MIG-1\n",
        ] {
            assert!(names(text, "MIG-1"), "{text}");
        }
        for text in [
            "",
            "name: MIG-12",
            "name: MIG-1-2",
            "name: X-MIG-1",
            "hostname: MIG-1",
            "args:\n- --device\n- MIG-1",
            "path: MIG-1",
            "name: \"0:1\" # MIG-1",
        ] {
            assert!(!names(text, "MIG-1"), "{text}");
        }
    }

    #[test]
    fn only_specifications_of_nvidias_devices_are_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("a.yaml", YAML);
        write("b.yaml.new", YAML);
        write("c.json", "{\"kind\":\"vendor.com/net\"}");
        std::fs::write(folder.path().join("d.json"), [0xff]).unwrap();
        std::fs::create_dir(folder.path().join("e.yaml")).unwrap();
        assert_eq!(specifications(folder.path()).unwrap(), [YAML]);
        assert!(specifications(&folder.path().join("none")).unwrap().is_empty());
    }
}
