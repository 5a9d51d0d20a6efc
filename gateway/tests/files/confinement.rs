//! What a worker is to the system, and how it begins and ends.

use crate::harness::{ALICE, Site, user};
use mlad_gateway::files::{Jail, WorkerProcess, spawn_sftp};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Read as _},
    os::{fd::OwnedFd, unix::fs::PermissionsExt as _},
    process::Stdio,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

fn status_of(pid: u32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines().filter_map(|line| line.split_once(':')).map(|(key, value)| (key.into(), value.trim().into())).collect()
}

#[test]
fn a_worker_has_no_rights_but_the_users() {
    let site = Site::new();
    let mut connection = site.connect();
    let pid = connection.child.id();
    let status = status_of(pid);
    let ids = format!("{ALICE}\t{ALICE}\t{ALICE}\t{ALICE}");
    assert_eq!((status["Uid"].as_str(), status["Gid"].as_str()), (ids.as_str(), ids.as_str()));
    assert_eq!((status["Groups"].as_str(), status["NoNewPrivs"].as_str()), ("", "1"));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!((status["Umask"].as_str(), status["Threads"].as_str()), ("0022", "1"));
    assert_eq!(fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), 3, "only the standard descriptors");
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/mnt")).unwrap();
    assert_ne!(namespace(&pid.to_string()), namespace("self"));
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    assert!(limits.contains("Max core file size        0                    0"), "{limits}");
    assert!(limits.contains("Max open files            1100"), "{limits}");
    assert!(limits.contains(&format!("Max address space         {0}            {0}", 512 << 20)), "{limits}");

    // The whole of its world.
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let mut points: Vec<_> = mounts.lines().map(|line| line.split(' ').nth(4).unwrap()).collect();
    points.sort_unstable();
    assert_eq!(points, ["/", "/datasets", "/home/alice"]);
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(4);
        let (point, options) = (fields.next().unwrap(), fields.next().unwrap());
        assert!(options.contains("nosuid") && options.contains("nodev") && options.contains("noexec"), "{line}");
        assert_eq!(options.split(',').any(|option| option == "ro"), point != "/home/alice", "{line}");
    }
    let names: Vec<_> = connection.list("/").into_iter().map(|(name, _)| String::from_utf8(name).unwrap()).collect();
    let mut names: Vec<_> = names.iter().filter(|name| !name.starts_with('.')).collect();
    names.sort();
    assert_eq!(names, ["datasets", "home", "projects"]);
}

#[test]
fn nothing_is_mounted_outside() {
    let site = Site::new();
    let mut connection = site.connect();
    assert_eq!(connection.call(16, &[&crate::harness::string(".")]).name(), b"/home/alice");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(site.path("data").to_str().unwrap()), "{mounts}");
    assert!(site.path("data/home/bob/secret").exists(), "the homes are not hidden");
}

#[test]
fn the_end_of_input_is_the_end_with_status_0() {
    let site = Site::new();
    let (error, status) = site.connect().end();
    assert_eq!((error.as_str(), status.code()), ("", Some(0)));
    let (error, status) = site.connect_raw().end();
    assert_eq!((error.as_str(), status.code()), ("", Some(0)), "also before a first word");
}

#[test]
fn a_worker_dies_with_its_parent() {
    let site = Site::new();
    // The worker's input stays open, so that only the parent's death can end it.
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let script = format!("exec 3<&0; {} sftp <&3 >&2 & echo $!; wait", site.worker_script().display());
    let mut shell = std::process::Command::new("bash")
        .args(["-c", &script])
        .stdin(reader)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let pid = Pid::from_raw(line.trim().parse().unwrap()).unwrap();
    let worker = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    // It answers when it is ready; the wish to die is made before.
    rustix::io::write(&writer, &[0, 0, 0, 5, 1, 0, 0, 0, 3]).unwrap();
    shell.stderr.take().unwrap().read_exact(&mut [0; 9]).unwrap();
    shell.kill().unwrap();
    shell.wait().unwrap();
    assert!(ends(&worker), "the worker outlives its parent");
    drop(writer);
}

/// Whether a process ends within half a minute.
fn ends(process: &OwnedFd) -> bool {
    let limit = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&limit)).unwrap() == 1
}

/// A gateway may run with a mask that lets nobody but root into the folders it makes.
#[test]
fn a_gateway_with_umask_077_serves_files() {
    let site = Site::new();
    let script = site.worker_script();
    let plain = fs::read_to_string(&script).unwrap();
    fs::write(&script, plain.replace("\nexec", "\numask 077\nexec")).unwrap();

    fs::write(site.path("file"), "hello").unwrap();
    let output = site.sftp(&[], b"put file\nls /\nls /datasets/images\nls /projects\nget /datasets/images/one got\n");
    assert!(output.status.success(), "{}", crate::harness::shown(&output));
    assert_eq!(fs::read_to_string(site.path("got")).unwrap(), "dataset");
    let mode = |name: &str| fs::metadata(site.home(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode("file"), 0o644, "and the mask of the user's files is that of every worker");

    let output = crate::scp::scp(&site, &["file", "server:copy"]);
    assert!(output.status.success(), "{}", crate::harness::shown(&output));
    assert_eq!(mode("copy"), 0o644);
}

#[test]
fn without_root_there_is_no_worker() {
    let site = Site::new();
    let output = std::process::Command::new("setpriv")
        .args(["--reuid=20001", "--regid=20001", "--clear-groups", "--"])
        .arg(site.worker(&["sftp"]).get_program())
        .args(site.worker(&["sftp"]).get_args())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("cannot confine this session") && error.contains("must run as root"), "{error}");
    assert!(output.stdout.is_empty());
}

#[test]
fn root_is_never_served() {
    let site = Site::new();
    assert!(Jail::new(&site.config, &user("alice", 0), Vec::new()).is_err());
    let jail = Jail { uid: 0, ..Jail::new(&site.config, &site.alice, Vec::new()).unwrap() };
    let output = std::process::Command::new(crate::harness::PROGRAM)
        .args(["worker", &serde_json::to_string(&jail).unwrap(), "sftp"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!output.status.success() && output.stdout.is_empty());
}

#[test]
fn a_home_that_is_missing_is_an_error_a_person_can_read() {
    let site = Site::new();
    fs::remove_dir_all(site.home("")).unwrap();
    let output = site.worker(&["sftp"]).stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("No such file") && error.contains("administrator"), "{error}");
}

#[test]
fn projects_are_seen_as_far_as_allowed() {
    use mlad_gateway::files::Project;
    let site = Site::new();
    for name in ["ours", "theirs"] {
        fs::create_dir_all(site.path(name)).unwrap();
        std::os::unix::fs::chown(site.path(name), Some(ALICE), Some(ALICE)).unwrap();
    }
    let project = |name: &str, writable| Project { name: name.into(), path: site.path(name), writable };
    let jail = Jail::new(&site.config, &site.alice, vec![project("ours", true), project("theirs", false)]).unwrap();
    let script = site.worker_script();
    fs::write(
        &script,
        format!(
            "#!/bin/sh\nexec '{}' worker '{}' \"$@\"\n",
            crate::harness::PROGRAM,
            serde_json::to_string(&jail).unwrap()
        ),
    )
    .unwrap();
    let output = site.sftp(&[], b"mkdir /projects/ours/new\nls /projects\n");
    assert!(output.status.success(), "{}", crate::harness::shown(&output));
    assert!(!site.sftp(&[], b"mkdir /projects/theirs/new\n").status.success());
    assert!(site.path("ours/new").is_dir());
    assert!(Jail::new(&site.config, &site.alice, vec![project("../x", true)]).is_err());
}

#[tokio::test]
async fn the_gateway_speaks_through_pipes() {
    let site = Site::new();
    let mut worker = spawn_sftp(&site.config, &site.alice).unwrap();
    worker.stdin.write_all(&[0, 0, 0, 5, 1, 0, 0, 0, 3]).await.unwrap();
    let mut start = [0; 9];
    worker.stdout.read_exact(&mut start).await.unwrap();
    assert_eq!(start[4..], [2, 0, 0, 0, 3]);
    assert_eq!(rustix::pipe::fcntl_getpipe_size(&worker.stdout).unwrap(), 1 << 20);
    let WorkerProcess { stdin, mut child, .. } = worker;
    drop(stdin);
    assert_eq!(child.wait().await.unwrap().code(), Some(0));
}

/// A thread of the pool that starts a worker ends soon; the worker must not end with it.
#[test]
fn a_worker_outlives_the_thread_that_asked_for_it() {
    let site = Site::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (config, alice) = (site.config.clone(), site.alice.clone());
    let guard = runtime.enter();
    let handle = runtime.handle().clone();
    let thread = std::thread::spawn(move || {
        let _guard = handle.enter();
        spawn_sftp(&config, &alice).unwrap()
    });
    let mut worker = thread.join().unwrap();
    drop(guard);
    runtime.block_on(async {
        worker.stdin.write_all(&[0, 0, 0, 5, 1, 0, 0, 0, 3]).await.unwrap();
        let mut start = [0; 9];
        worker.stdout.read_exact(&mut start).await.unwrap();
        drop(worker.stdin);
        assert_eq!(worker.child.wait().await.unwrap().code(), Some(0));
    });
}

#[tokio::test]
async fn a_dropped_worker_is_killed() {
    let site = Site::new();
    let worker = spawn_sftp(&site.config, &site.alice).unwrap();
    let pid = Pid::from_raw(i32::try_from(worker.child.id().unwrap()).unwrap()).unwrap();
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    // Its pipes stay open, so that only the signal can end it.
    let WorkerProcess { stdin, stdout, stderr, child } = worker;
    drop(child);
    assert!(ends(&process));
    drop((stdin, stdout, stderr));
}
