//! GPUs of other machines: the real programs, each with a simulated machine of its own.

use crate::{ask, ended, granted, machine::Machine, until};
use mlad::api::NodeState;
use mlad_allocator::{
    Allocate, LeaseRequest,
    remote::{issue, make_authority},
    service::HttpAllocator,
};
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::{Instant, timeout},
};

/// Far more than anything here takes.
const BOUND: Duration = Duration::from_secs(120);
/// Seconds a node's lease lasts here.
const LEASE: &str = "8";

/// An authority, and the allocator that hears nodes.
struct Center {
    folder: TempDir,
    machine: Machine,
    /// Where nodes connect to; the first start chooses the port.
    address: String,
    program: Option<Killed>,
    client: HttpAllocator,
}

/// A program that is killed when it is dropped.
struct Killed(Child);

impl Killed {
    fn spawn(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    fn signal(&mut self, signal: &str) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended.
        drop(self.0.kill());
        self.0.wait().unwrap();
    }
}

impl Center {
    async fn start(listen: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        make_authority(folder.path()).unwrap();
        issue(folder.path(), "allocator", &[], 30, folder.path()).unwrap();
        let machine = Machine::new("A30-24GB", 1);
        let url = format!("unix:{}/socket", machine.path().display());
        let client = HttpAllocator::new(&url, None).unwrap();
        let mut center = Self { folder, machine, address: listen.to_owned(), program: None, client };
        center.begin().await;
        center
    }

    /// Starts the program, again at the same address.
    async fn begin(&mut self) {
        let at = |name: &str| self.folder.path().join(name);
        let log = File::options().create(true).append(true).open(at("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mlad-allocator"));
        command.args(["serve", "--node", "node-1", "--nodes-lease-seconds", LEASE, "--nodes-listen", &self.address]);
        command.arg("--listen").arg(format!("unix:{}/socket", self.machine.path().display()));
        command.arg("--nvml").arg(self.machine.library()).arg("--database").arg(self.machine.database());
        command.arg("--nodes-certificate").arg(at("allocator.pem")).arg("--nodes-key").arg(at("allocator.key"));
        command.arg("--nodes-authority").arg(at("authority.pem")).args(["--nodes-allow", "dgx-2"]);
        command.args(["--nodes-allow", "dgx-3"]);
        let mut program = Killed::spawn(command.stdout(Stdio::piped()).stderr(log));
        let mut output = BufReader::new(program.0.stdout.take().unwrap());
        let lines = tokio::task::spawn_blocking(move || {
            let mut lines = [String::new(), String::new()];
            lines.each_mut().into_iter().for_each(|line| drop(output.read_line(line)));
            lines
        });
        let [_, nodes] = timeout(BOUND, lines).await.expect("it does not begin").unwrap();
        let log = || fs::read_to_string(at("log")).unwrap();
        self.address = nodes.trim().strip_prefix("nodes ").unwrap_or_else(|| panic!("no nodes: {}", log())).to_owned();
        self.program = Some(program);
    }

    fn node(&self, name: &str, model: &str) -> Far {
        issue(self.folder.path(), name, &[], 30, &self.folder.path().join(name)).unwrap();
        Far {
            name: name.to_owned(),
            machine: Machine::new(model, 1),
            address: self.address.clone(),
            authority: self.folder.path().join("authority.pem"),
            certificates: self.folder.path().join(name),
            namespace: None,
            program: None,
        }
    }

    async fn is(&self, node: &str, state: NodeState) {
        until(&self.client, async || {
            let nodes = self.client.nodes().await.unwrap();
            let is = nodes.iter().any(|known| known.name == node && known.state == state && known.gpus == 1);
            // One that is ready has been read, too.
            let gpus = self.client.map().await.unwrap().gpus;
            let read = gpus.iter().any(|gpu| gpu.node == node && gpu.fault.is_none());
            (is && (read || state != NodeState::Ready)).then_some(())
        })
        .await;
    }

    /// Asks for a slice of a node, and waits until it is granted.
    async fn get(&self, workload: &str, need: &str, node: &str) -> mlad::api::Lease {
        let request = LeaseRequest { node: Some(node.to_owned()), ..ask(workload, "alice", need) };
        self.client.request(&request).await.unwrap();
        granted(&self.client, workload).await
    }

    async fn stop(mut self) {
        let mut program = self.program.take().unwrap();
        program.signal("-TERM");
        let status = tokio::task::spawn_blocking(move || program.0.wait().unwrap());
        assert!(timeout(BOUND, status).await.expect("it does not end").unwrap().success());
        crate::host::sound(&self.machine.database()).await;
    }
}

/// A machine with a daemon.
struct Far {
    name: String,
    machine: Machine,
    address: String,
    authority: PathBuf,
    certificates: PathBuf,
    namespace: Option<String>,
    program: Option<Killed>,
}

impl Far {
    /// Starts the daemon; one that runs is killed first.
    fn begin(&mut self) {
        self.program = None;
        let at = |end: &str| self.certificates.join(format!("{}.{end}", self.name));
        let log = File::options().create(true).append(true).open(self.log()).unwrap();
        let program = env!("CARGO_BIN_EXE_mlad-allocator");
        let mut command = match &self.namespace {
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace, program]);
                command
            }
            None => Command::new(program),
        };
        command.args(["node", "--allocator", &self.address, "--server-name", "allocator", "--node", &self.name]);
        command.arg("--certificate").arg(at("pem")).arg("--key").arg(at("key"));
        command.arg("--authority").arg(&self.authority).arg("--nvml").arg(self.machine.library());
        command.arg("--state").arg(self.machine.path().join("state"));
        self.program = Some(Killed::spawn(command.stderr(log)));
    }

    fn log(&self) -> PathBuf {
        self.machine.path().join("log")
    }

    /// Waits until the daemon says something.
    async fn says(&self, what: &str) {
        let said = async {
            while !fs::read_to_string(self.log()).unwrap().contains(what) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let log = || fs::read_to_string(self.log()).unwrap();
        timeout(BOUND, said).await.unwrap_or_else(|_| panic!("it does not say `{what}`: {}", log()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slices_of_another_machine_outlive_both_programs() {
    let mut center = Center::start("127.0.0.1:0").await;
    let mut far = center.node("dgx-2", "A100-40GB");
    far.begin();
    center.is("dgx-2", NodeState::Ready).await;
    let lease = center.get("w-1-1", "3g.20gb", "dgx-2").await;
    assert_eq!(lease.node, "dgx-2");
    assert_eq!(far.machine.slices(), [(0, lease.uuids[0].clone())]);
    // The daemon is killed, and started again.
    far.begin();
    center.is("dgx-2", NodeState::Ready).await;
    assert_eq!(granted(&center.client, "w-1-1").await.uuids, lease.uuids);
    // So is the allocator.
    center.program = None;
    center.begin().await;
    center.is("dgx-2", NodeState::Ready).await;
    assert_eq!(granted(&center.client, "w-1-1").await.fence, lease.fence);
    let other = center.get("w-2-1", "3g.20gb", "dgx-2").await;
    assert!(other.fence > lease.fence && other.uuids != lease.uuids);
    center.client.release("w-1-1").await.unwrap();
    let again = center.get("w-3-1", "3g.20gb", "dgx-2").await;
    assert_eq!(far.machine.slices().len(), 2);
    assert!(far.machine.slices().contains(&(0, again.uuids[0].clone())));
    center.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_joins_without_the_right_certificate() {
    let center = Center::start("127.0.0.1:0").await;
    // Signed by somebody else.
    let elsewhere = tempfile::tempdir().unwrap();
    make_authority(elsewhere.path()).unwrap();
    let mut stranger = center.node("dgx-2", "A100-40GB");
    issue(elsewhere.path(), "dgx-2", &[], 30, elsewhere.path()).unwrap();
    stranger.certificates = elsewhere.path().to_owned();
    stranger.begin();
    stranger.says("not connected").await;
    // For another name; and not among those that are let in.
    let mut liar = center.node("dgx-3", "A100-40GB");
    issue(center.folder.path(), "dgx-9", &[], 30, &liar.certificates).unwrap();
    let own = |end: &str| liar.certificates.join(format!("dgx-3.{end}"));
    for end in ["pem", "key"] {
        fs::copy(liar.certificates.join(format!("dgx-9.{end}")), own(end)).unwrap();
    }
    liar.begin();
    liar.says("its certificate is not for dgx-3").await;
    let mut other = center.node("dgx-4", "A100-40GB");
    other.begin();
    other.says("dgx-4 is not among the nodes that may join").await;
    // An allocator that is signed by somebody else is not obeyed, and one who speaks no TLS is not heard.
    let mut careful = center.node("dgx-2x", "A100-40GB");
    careful.authority = elsewhere.path().join("authority.pem");
    careful.begin();
    careful.says("not connected").await;
    let address = center.address.clone();
    let garbage = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        std::io::Write::write_all(&mut stream, &[b'x'; 64 << 10]).ok();
        let mut answer = Vec::new();
        // It is cut off.
        drop(stream.read_to_end(&mut answer));
        assert!(answer.len() < 64, "{answer:?}");
    });
    timeout(BOUND, garbage).await.expect("it is listened to for ever").unwrap();
    let nodes = center.client.nodes().await.unwrap();
    assert_eq!(nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>(), ["node-1"]);
    center.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_daemons_do_not_share_a_machine() {
    let center = Center::start("127.0.0.1:0").await;
    let mut far = center.node("dgx-2", "A100-40GB");
    far.begin();
    center.is("dgx-2", NodeState::Ready).await;
    let mut first = far.program.take().unwrap();
    far.begin();
    let second = far.program.as_mut().unwrap();
    let status = second.0.wait().unwrap();
    assert_eq!(status.code(), Some(2));
    far.says("another daemon runs").await;
    first.signal("-TERM");
    assert!(first.0.wait().unwrap().success());
    center.stop().await;
}

/// Two network namespaces and a cable between them: a machine's, and ours.
struct Cable {
    namespace: String,
    near: String,
}

impl Cable {
    fn lay() -> Self {
        // No two tests at once have the same: names and addresses are made of the process's number.
        let number = std::process::id();
        let cable = Self { namespace: format!("mlad-node-{number}"), near: format!("mn{number}") };
        let (space, near, far) = (&cable.namespace, &cable.near, format!("mf{number}"));
        ip(&format!("netns add {space}"));
        ip(&format!("link add {near} type veth peer name {far} netns {space}"));
        ip(&format!("addr add {} dev {near}", cable.address("1/30")));
        ip(&format!("link set {near} up"));
        ip(&format!("-n {space} addr add {} dev {far}", cable.address("2/30")));
        ip(&format!("-n {space} link set {far} up"));
        cable
    }

    fn address(&self, end: &str) -> String {
        let number = std::process::id();
        format!("10.{}.{}.{end}", 128 + number / 256 % 64, number % 256)
    }

    fn cut(&self) {
        ip(&format!("link set {} down", self.near));
    }

    fn mend(&self) {
        ip(&format!("link set {} up", self.near));
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        // The cable goes with it.
        drop(Command::new("ip").args(["netns", "delete", &self.namespace]).status());
    }
}

fn ip(words: &str) {
    assert!(Command::new("ip").args(words.split(' ')).status().unwrap().success(), "ip {words}");
}

/// A stretch of the way to the allocator on which everything takes its time, each way.
async fn slow_stretch(from: &str, to: &str) -> String {
    const DELAY: Duration = Duration::from_millis(400);
    async fn one_way(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
        let (sender, mut pieces) = tokio::sync::mpsc::channel::<(Instant, Vec<u8>)>(1024);
        let reading = async {
            let mut buffer = vec![0; 16 << 10];
            while let Ok(read @ 1..) = from.read(&mut buffer).await {
                let piece = (Instant::now() + DELAY, buffer[..read].to_vec());
                if sender.send(piece).await.is_err() {
                    break;
                }
            }
            drop(sender);
        };
        let writing = async {
            while let Some((at, piece)) = pieces.recv().await {
                tokio::time::sleep_until(at).await;
                if to.write_all(&piece).await.is_err() {
                    break;
                }
            }
        };
        tokio::join!(reading, writing);
    }
    let (listener, to) = (tokio::net::TcpListener::bind(from).await.unwrap(), to.to_owned());
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = tokio::net::TcpStream::connect(&to).await else { continue };
            let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
            tokio::spawn(one_way(near_read, far_write));
            tokio::spawn(one_way(far_read, near_write));
        }
    });
    address
}

/// A process that uses a slice; when it ends, the simulated machine knows.
fn use_slice(far: &Far, uuid: &str) -> tokio::task::JoinHandle<()> {
    let mut child = Command::new("sleep").arg("100000").spawn().unwrap();
    let pid = child.id();
    let process = nvidia_ml_sim::state::Process { pid, memory_mib: 1 };
    far.machine.change(|state| {
        let device = state.device_by_uuid(uuid).unwrap();
        state.start_process(device, process).unwrap();
    });
    let path = far.machine.path().to_owned();
    tokio::task::spawn_blocking(move || {
        child.wait().unwrap();
        end_process(&path, pid);
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_cut_off_ends_what_runs_before_its_leases_are_over() {
    let cable = Cable::lay();
    let center = Center::start("127.0.0.1:0").await;
    let mut far = center.node("dgx-2", "A100-40GB");
    far.namespace = Some(cable.namespace.clone());
    // What is late is not lost.
    far.address = slow_stretch(&format!("{}:0", cable.address("1")), &center.address).await;
    far.begin();
    center.is("dgx-2", NodeState::Ready).await;
    let lease = center.get("w-1-1", "3g.20gb", "dgx-2").await;
    let running = use_slice(&far, &lease.uuids[0]);
    let second = center.get("w-2-1", "2g.10gb", "dgx-2").await;
    assert!(!running.is_finished());

    cable.cut();
    center.is("dgx-2", NodeState::Away).await;
    let told = until(&center.client, async || {
        let state = center.client.state("w-1-1").await.unwrap();
        matches!(state, mlad_allocator::LeaseState::Ended { .. }).then(|| running.is_finished())
    });
    assert!(timeout(BOUND, told).await.unwrap(), "the lease was over while its process ran");
    assert!(ended(&center.client, "w-1-1").await.contains("dgx-2 is lost"));
    assert!(ended(&center.client, "w-2-1").await.contains("dgx-2 is lost"));
    assert_eq!(far.machine.slices(), [], "what was leased is not there any more: {second:?}");

    cable.mend();
    center.is("dgx-2", NodeState::Ready).await;
    // Held until somebody says that no container is left.
    let request = LeaseRequest { node: Some("dgx-2".to_owned()), ..ask("w-3-1", "bob", "7g.40gb") };
    center.client.request(&request).await.unwrap();
    crate::waiting(&center.client, "w-3-1").await;
    for workload in ["w-1-1", "w-2-1"] {
        center.client.release(workload).await.unwrap();
    }
    granted(&center.client, "w-3-1").await;
    center.stop().await;
}

/// Ends a process on the machine with these files.
fn end_process(folder: &Path, pid: u32) {
    let description = nvidia_ml_sim::machine::Machine::load(&folder.join("libnvidia-ml.so.toml")).unwrap();
    let driver = nvidia_ml_sim::driver::Driver::start(description).unwrap();
    driver.change(|state| Ok(state.end_process(pid))).unwrap();
}
