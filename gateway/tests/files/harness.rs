//! A data directory with users in it, and ways to reach a worker.

use mlad::api::{Quota, Role};
use mlad_gateway::{
    config::Config,
    files::{Jail, WORKER, ensure_home},
    store::UserRecord,
};
use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio},
};

/// The uid of alice.
pub const ALICE: u32 = 20_001;
/// The gateway's program.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_mlad-gateway");

/// A gateway's data with alice, bob and a dataset.
pub struct Site {
    pub folder: tempfile::TempDir,
    pub config: Config,
    pub alice: UserRecord,
}

impl Site {
    pub fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests start workers, which only root can");
        let folder = tempfile::Builder::new().prefix("mlad-files-").tempdir().unwrap();
        // As that of a system service: others may pass through.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = folder.path().display();
        let mut config: Config = toml::from_str(&format!(
            "data_directory = '{path}/data'\nrun_directory = '{path}/run'\nagent_binary = '{path}/mlad'\n\
             catalog = '{path}/catalog.toml'\n"
        ))
        .unwrap();
        config.files.worker_binary = Some(PROGRAM.into());
        let alice = user("alice", ALICE);
        ensure_home(&config, &alice).unwrap();
        ensure_home(&config, &user("bob", 20_002)).unwrap();
        let site = Self { folder, config, alice };
        fs::write(site.path("data/home/bob/secret"), "bob's").unwrap();
        fs::create_dir_all(site.path("data/datasets/images")).unwrap();
        fs::write(site.path("data/datasets/images/one"), "dataset").unwrap();
        fs::create_dir(site.path("outside")).unwrap();
        fs::write(site.path("outside/secret"), "of the host").unwrap();
        // Even for those who may write there, on the host.
        for path in ["data/datasets", "data/datasets/images", "data/datasets/images/one", "outside", "outside/secret"] {
            fs::set_permissions(site.path(path), fs::Permissions::from_mode(0o777)).unwrap();
        }
        site
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.folder.path().join(relative)
    }

    /// A path in alice's home, on the host.
    pub fn home(&self, relative: &str) -> PathBuf {
        self.path("data/home/alice").join(relative)
    }

    /// A file of alice's.
    pub fn write(&self, relative: &str, bytes: &[u8]) {
        let path = self.home(relative);
        for folder in path.ancestors().skip(1).take_while(|folder| *folder != self.home("").as_path()) {
            if !folder.exists() {
                fs::create_dir_all(folder).unwrap();
            }
            chown(folder, Some(ALICE), Some(ALICE)).unwrap();
        }
        fs::write(&path, bytes).unwrap();
        chown(&path, Some(ALICE), Some(ALICE)).unwrap();
    }

    /// The command that is a worker for alice.
    pub fn worker(&self, task: &[&str]) -> Command {
        let jail = Jail::new(&self.config, &self.alice, Vec::new()).unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg(WORKER).arg(serde_json::to_string(&jail).unwrap()).args(task);
        command
    }

    /// A program that is a worker with the arguments it is given.
    pub fn worker_script(&self) -> PathBuf {
        let jail = serde_json::to_string(&Jail::new(&self.config, &self.alice, Vec::new()).unwrap()).unwrap();
        let path = self.path("worker");
        if !path.exists() {
            fs::write(&path, format!("#!/bin/sh\nexec '{PROGRAM}' {WORKER} '{jail}' \"$@\"\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        path
    }

    /// Runs OpenSSH's `sftp` with these commands.
    pub fn sftp(&self, options: &[&str], commands: &[u8]) -> Output {
        let server = format!("{} sftp", self.worker_script().display());
        let batch = self.path("batch");
        fs::write(&batch, commands).unwrap();
        Command::new("sftp")
            .args(["-q", "-D", &server, "-b"])
            .arg(&batch)
            .args(options)
            .arg("server")
            .current_dir(self.folder.path())
            .output()
            .unwrap()
    }

    /// A connection of hand-made packets.
    pub fn connect(&self) -> Connection {
        let mut connection = self.connect_raw();
        connection.send(&[1, 0, 0, 0, 3]);
        let version = connection.receive();
        assert_eq!(version[..5], [2, 0, 0, 0, 3]);
        connection
    }

    /// The same, before the first packet.
    pub fn connect_raw(&self) -> Connection {
        let mut child =
            self.worker(&["sftp"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().unwrap());
        Connection { child, stdin, stdout, next: 0 }
    }
}

pub fn user(name: &str, uid: u32) -> UserRecord {
    UserRecord {
        id: 1,
        name: name.into(),
        uid,
        role: Role::User,
        enabled: true,
        quota: Quota::default(),
        created_at: jiff::Timestamp::UNIX_EPOCH,
        last_seen_at: None,
    }
}

/// Standard output and error, for the message of a failed test.
pub fn shown(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A client of sftp that says exactly what it is told to.
pub struct Connection {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    pub stdout: ChildStdout,
    next: u32,
}

pub const NO_SUCH_FILE: u32 = 2;
pub const PERMISSION_DENIED: u32 = 3;
pub const FAILURE: u32 = 4;
pub const BAD_MESSAGE: u32 = 5;
pub const UNSUPPORTED: u32 = 8;

/// A reply.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    Status(u32, String),
    Handle(Vec<u8>),
    Data(Vec<u8>),
    /// Names and the lines of `ls -l`.
    Names(Vec<(Vec<u8>, Vec<u8>)>),
    /// Flags, size, uid, gid, mode, times.
    Attributes(Attributes),
    Extended(Vec<u8>),
}

#[derive(Debug, PartialEq, Eq)]
pub struct Attributes {
    pub size: u64,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    pub accessed: u32,
    pub modified: u32,
}

impl Reply {
    pub fn ok(&self) {
        assert!(matches!(self, Self::Status(0, _)), "{self:?}");
    }

    pub fn status(&self) -> u32 {
        match self {
            Self::Status(status, _) => *status,
            other => panic!("{other:?}"),
        }
    }

    pub fn handle(self) -> Vec<u8> {
        match self {
            Self::Handle(handle) => handle,
            other => panic!("{other:?}"),
        }
    }

    pub fn name(self) -> Vec<u8> {
        match self {
            Self::Names(mut names) if names.len() == 1 => names.remove(0).0,
            other => panic!("{other:?}"),
        }
    }

    pub fn attributes(self) -> Attributes {
        match self {
            Self::Attributes(attributes) => attributes,
            other => panic!("{other:?}"),
        }
    }

    pub fn extended(self) -> Vec<u8> {
        match self {
            Self::Extended(fields) => fields,
            other => panic!("{other:?}"),
        }
    }
}

/// A string of the protocol.
pub fn string(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

/// No attributes.
pub const NONE: [u8; 4] = [0; 4];

impl Connection {
    /// Sends a packet.
    pub fn send(&mut self, packet: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(&string(packet)).unwrap();
    }

    /// Receives a packet.
    pub fn receive(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.stdout.read_exact(&mut length).unwrap();
        let mut packet = vec![0; usize::try_from(u32::from_be_bytes(length)).unwrap()];
        self.stdout.read_exact(&mut packet).unwrap();
        packet
    }

    /// Sends a request and returns its number.
    pub fn ask(&mut self, kind: u8, fields: &[&[u8]]) -> u32 {
        self.next += 1;
        let packet = [&[kind][..], &self.next.to_be_bytes(), &fields.concat()].concat();
        self.send(&packet);
        self.next
    }

    /// Receives the reply with this number, which must be the next.
    pub fn reply(&mut self, id: u32) -> Reply {
        let packet = self.receive();
        assert_eq!(u32::from_be_bytes(packet[1..5].try_into().unwrap()), id);
        let mut fields = Fields(&packet[5..]);
        match packet[0] {
            101 => Reply::Status(fields.u32(), String::from_utf8(fields.string()).unwrap()),
            102 => Reply::Handle(fields.string()),
            103 => Reply::Data(fields.string()),
            104 => {
                let count = fields.u32();
                Reply::Names(
                    (0..count)
                        .map(|_| {
                            let names = (fields.string(), fields.string());
                            if fields.u32() != 0 {
                                fields.attributes();
                            }
                            names
                        })
                        .collect(),
                )
            }
            105 => {
                assert_eq!(fields.u32(), 15);
                Reply::Attributes(fields.attributes())
            }
            201 => Reply::Extended(fields.0.to_vec()),
            kind => panic!("a reply of kind {kind}"),
        }
    }

    /// Asks and waits for the answer.
    pub fn call(&mut self, kind: u8, fields: &[&[u8]]) -> Reply {
        let id = self.ask(kind, fields);
        self.reply(id)
    }

    pub fn extension(&mut self, name: &str, fields: &[&[u8]]) -> Reply {
        self.call(200, &[&string(name), &fields.concat()])
    }

    /// Opens a file: 1 read, 2 write, 4 append, 8 create, 16 truncate, 32 exclusive.
    pub fn open(&mut self, path: &str, flags: u32) -> Reply {
        self.call(3, &[&string(path), &flags.to_be_bytes(), &NONE])
    }

    pub fn read(&mut self, handle: &[u8], offset: u64, length: u32) -> Reply {
        self.call(5, &[&string(handle), &offset.to_be_bytes(), &length.to_be_bytes()])
    }

    pub fn write(&mut self, handle: &[u8], offset: u64, data: &[u8]) -> Reply {
        self.call(6, &[&string(handle), &offset.to_be_bytes(), &string(data)])
    }

    pub fn close(&mut self, handle: &[u8]) -> Reply {
        self.call(4, &[&string(handle)])
    }

    /// All names of a folder.
    pub fn list(&mut self, path: &str) -> Vec<(Vec<u8>, Vec<u8>)> {
        let handle = self.call(11, &[&string(path)]).handle();
        let mut all = Vec::new();
        loop {
            match self.call(12, &[&string(&handle)]) {
                Reply::Names(names) => all.extend(names),
                Reply::Status(1, _) => break,
                other => panic!("{other:?}"),
            }
        }
        self.close(&handle).ok();
        all
    }

    /// Ends the session; what the worker wrote on standard error, and its status.
    pub fn end(mut self) -> (String, ExitStatus) {
        drop(self.stdin.take());
        let mut rest = Vec::new();
        self.stdout.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty(), "nothing is said that was not asked for");
        let mut error = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        (error, self.child.wait().unwrap())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    pub fn u32(&mut self) -> u32 {
        let (number, rest) = self.0.split_first_chunk().unwrap();
        self.0 = rest;
        u32::from_be_bytes(*number)
    }

    pub fn u64(&mut self) -> u64 {
        let (number, rest) = self.0.split_first_chunk().unwrap();
        self.0 = rest;
        u64::from_be_bytes(*number)
    }

    pub fn string(&mut self) -> Vec<u8> {
        let length = usize::try_from(self.u32()).unwrap();
        let (string, rest) = self.0.split_at(length);
        self.0 = rest;
        string.to_vec()
    }

    fn attributes(&mut self) -> Attributes {
        Attributes {
            size: self.u64(),
            uid: self.u32(),
            gid: self.u32(),
            mode: self.u32(),
            accessed: self.u32(),
            modified: self.u32(),
        }
    }
}

/// A small file system in place of a folder, until it is dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    pub fn mount(at: &Path, bytes: usize) -> Self {
        let options = std::ffi::CString::new(format!("size={bytes},uid={ALICE},gid={ALICE},mode=0700")).unwrap();
        rustix::mount::mount("tmpfs", at, "tmpfs", rustix::mount::MountFlags::empty(), options.as_c_str()).unwrap();
        Self(at.to_path_buf())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Bytes that do not repeat.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
