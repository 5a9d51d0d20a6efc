//! A real agent, as a process of this host instead of a container's.

use mlad::channel::AgentConfig;
use std::{
    collections::BTreeMap,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::OnceLock,
    time::Duration,
};
use tokio::net::UnixStream;

/// The user it serves. No such uid is on a usual host.
const UID: u32 = 20_000;

/// The agent.
pub struct Agent {
    process: Child,
    folder: PathBuf,
}

impl Agent {
    /// Starts one with its files in `folder`; returns when it listens.
    pub async fn start(folder: &Path) -> Self {
        let home = folder.join("home");
        for part in ["agent", "etc", "home"] {
            std::fs::create_dir_all(folder.join(part)).unwrap();
        }
        chown(&home, Some(UID), Some(UID)).unwrap();
        for part in [folder, &home] {
            std::fs::set_permissions(part, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let config = AgentConfig {
            workload: "w-1-1".into(),
            user: "tester".into(),
            uid: UID,
            gid: UID,
            home,
            environment: BTreeMap::new(),
            job: None,
            network: None,
        };
        std::fs::write(folder.join("agent/config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
        let process = Command::new(binary())
            .args(["agent", "--folder"])
            .arg(folder)
            .arg("--etc")
            .arg(folder.join("etc"))
            .spawn()
            .unwrap();
        let agent = Self { process, folder: folder.into() };
        agent.listens().await;
        agent
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("agent/agent.sock")
    }

    /// The home of its user.
    pub fn home(&self) -> PathBuf {
        self.folder.join("home")
    }

    /// Kills it at once with all that it runs, as a container's end would.
    pub fn kill(&self) {
        let mut all = vec![self.process.id().to_string()];
        let mut seen = 0;
        while let Some(parent) = all.get(seen).cloned() {
            all.extend(children(&parent));
            seen += 1;
        }
        // The youngest first: nobody is there to start more.
        for id in all.iter().rev() {
            let id = rustix::process::Pid::from_raw(id.parse().unwrap()).unwrap();
            let _ = rustix::process::kill_process(id, rustix::process::Signal::KILL);
        }
    }

    async fn listens(&self) {
        for _ in 0..1000 {
            if UnixStream::connect(self.socket()).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the agent does not listen");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_raw(self.process.id().try_into().unwrap()).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.process.wait();
    }
}

/// The processes that this one's threads have started; none if it is gone.
fn children(process: &str) -> Vec<String> {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// `mlad`: the one that `scripts/test` built, or built here from this workspace.
fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(built) = std::env::var_os("MLAD_TEST_MLAD") {
            return built.into();
        }
        let folder = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned();
        let built = Command::new(env!("CARGO"))
            .args(["build", "-q", "--workspace", "--bin", "mlad"])
            .args(folder.ends_with("release").then_some("--release"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(built.success());
        folder.join("mlad")
    })
}
