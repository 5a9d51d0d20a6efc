//! Whoever controls a home, from a container say, tries to make a worker reach out of it.

use crate::harness::{Connection, NO_SUCH_FILE, NONE, PERMISSION_DENIED, Reply, Site, string};
use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

/// Paths that would lead out, on a machine where they led anywhere.
fn tricks(site: &Site) -> Vec<String> {
    let outside = site.path("outside").display().to_string();
    let data = site.path("data").display().to_string();
    // Links as a container may make them: to the host's paths, relative and absolute.
    for (name, target) in [
        ("absolute", outside.clone()),
        ("relative", format!("../../../../../../../..{outside}")),
        ("passwd", "/etc/passwd".into()),
        ("etc", "/etc".into()),
        ("proc", "/proc/self/root".into()),
        ("bob", "../bob".into()),
        ("bobs", format!("{data}/home/bob")),
        ("twice", "absolute".into()),
    ] {
        symlink(target, site.home(name)).unwrap();
    }
    fs::create_dir(site.home("dir")).unwrap();
    symlink(&outside, site.home("dir/inner")).unwrap();
    let mut paths: Vec<String> = [
        "absolute/secret",
        "relative/secret",
        "passwd",
        "etc/passwd",
        "proc/etc/passwd",
        "bob/secret",
        "bobs/secret",
        "twice/secret",
        "dir/inner/secret",
        "dir/../absolute/secret",
        "absolute/../absolute/secret",
        "/home/bob/secret",
        "../bob/secret",
        "/home/alice/../bob/secret",
        "../../../../etc/passwd",
        "/etc/passwd",
        "/proc/self/root/etc/passwd",
        "/proc/self/fd/0",
        "/proc/self/environ",
        "/proc/1/root/etc/passwd",
        "/dev/null",
        "/sys/kernel",
        "/run/mlad/api.sock",
        "/tmp/x",
        "/datasets/../etc/passwd",
        "/projects/../etc/passwd",
        "/datasets/../home/bob/secret",
        "//etc//passwd",
        "/./etc/./passwd",
    ]
    .map(String::from)
    .to_vec();
    paths.push(format!("{outside}/secret"));
    paths.push(format!("..{outside}/secret"));
    paths.push(format!("{data}/home/alice/.profile"));
    paths
}

/// Every way to name a file in a request.
fn ask_all(c: &mut Connection, path: &str) -> Vec<(&'static str, Reply)> {
    let mode = [4_u32.to_be_bytes(), 0o777_u32.to_be_bytes()].concat();
    let flags = |flags: u32| flags.to_be_bytes();
    let at = string(path);
    vec![
        ("open for reading", c.call(3, &[&at, &flags(1), &NONE])),
        ("open for writing", c.call(3, &[&at, &flags(2), &NONE])),
        ("create", c.call(3, &[&at, &flags(2 | 8 | 16), &NONE])),
        ("stat", c.call(17, &[&at])),
        ("setstat", c.call(9, &[&at, &mode])),
        ("opendir", c.call(11, &[&at])),
        ("statvfs", c.extension("statvfs@openssh.com", &[&at])),
        ("open inside", c.call(3, &[&string(format!("{path}/x")), &flags(1), &NONE])),
        ("mkdir inside", c.call(14, &[&string(format!("{path}/x")), &NONE])),
        ("remove inside", c.call(13, &[&string(format!("{path}/x"))])),
        ("rmdir inside", c.call(15, &[&string(format!("{path}/x"))])),
        ("rename from inside", c.call(18, &[&string(format!("{path}/x")), &string("stolen")])),
        ("rename into", c.call(18, &[&string("mine"), &string(format!("{path}/x"))])),
        (
            "posix-rename into",
            c.extension("posix-rename@openssh.com", &[&string("mine"), &string(format!("{path}/x"))]),
        ),
        ("hardlink into", c.extension("hardlink@openssh.com", &[&string("mine"), &string(format!("{path}/x"))])),
        ("symlink into", c.call(20, &[&string("mine"), &string(format!("{path}/x"))])),
        ("readlink inside", c.call(19, &[&string(format!("{path}/x"))])),
        ("lstat inside", c.call(7, &[&string(format!("{path}/x"))])),
        ("lsetstat inside", c.extension("lsetstat@openssh.com", &[&string(format!("{path}/x")), &mode])),
        ("realpath inside", c.call(16, &[&string(format!("{path}/x"))])),
    ]
}

#[test]
fn no_path_leads_out() {
    let site = Site::new();
    let tricks = tricks(&site);
    site.write("mine", b"mine");
    let mut c = site.connect();
    for path in tricks {
        for (how, reply) in ask_all(&mut c, &path) {
            let status = match reply {
                Reply::Status(status, _) => status,
                other => panic!("{how} {path}: {other:?}"),
            };
            // A first component that could only be made in a read-only folder of the tree is a denial.
            let creates = matches!(how, "create");
            assert!(
                status == NO_SUCH_FILE || (creates && status == PERMISSION_DENIED),
                "{how} {path}: status {status}"
            );
        }
        // A link itself, taken away or moved, is only a link.
        let from = string(&path);
        if path.contains('/') {
            assert_eq!(c.extension("hardlink@openssh.com", &[&from, &string("stolen")]).status(), NO_SUCH_FILE);
            assert_eq!(c.call(18, &[&from, &string("stolen")]).status(), NO_SUCH_FILE);
            assert_eq!(c.call(13, &[&from]).status(), NO_SUCH_FILE);
        }
    }
    untouched(&site);
    assert!(!site.home("stolen").exists());
}

fn untouched(site: &Site) {
    let names =
        |path: &Path| -> Vec<_> { fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect() };
    assert_eq!(names(&site.path("outside")), ["secret"]);
    assert_eq!(fs::read_to_string(site.path("outside/secret")).unwrap(), "of the host");
    assert_eq!(fs::read_to_string(site.path("data/home/bob/secret")).unwrap(), "bob's");
    assert_eq!(names(&site.path("data/datasets/images")), ["one"]);
}

/// While a client works in `dir`, somebody in the container exchanges it for a link to the outside and back,
/// as fast as the kernel can.
#[test]
fn no_race_leads_out() {
    let site = Site::new();
    site.write("dir/secret", b"mine");
    site.write("file", b"mine");
    symlink(site.path("outside"), site.home("evil")).unwrap();
    symlink("../../../../../../../../etc", site.home("evil2")).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also if an assertion fails: a scope waits for its threads.
        let _stopped = Stop(&stop);
        for evil in ["evil", "evil2"] {
            scope.spawn(|| {
                let (dir, evil) = (site.home("dir"), site.home(evil));
                while !stop.load(Ordering::Relaxed) {
                    let flags = rustix::fs::RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(rustix::fs::CWD, &dir, rustix::fs::CWD, &evil, flags).unwrap();
                }
            });
        }
        let mut c = site.connect();
        let (mut inside, mut nowhere) = (0, 0);
        for round in 0..3000 {
            match c.open("dir/secret", 1) {
                Reply::Handle(handle) => {
                    assert_eq!(c.read(&handle, 0, 100), Reply::Data(b"mine".to_vec()));
                    c.close(&handle).ok();
                    inside += 1;
                }
                other => {
                    assert_eq!(other.status(), NO_SUCH_FILE);
                    nowhere += 1;
                }
            }
            for reply in [
                c.open("dir/new", 2 | 8),
                c.call(18, &[&string("file"), &string("dir/stolen")]),
                c.call(18, &[&string("dir/stolen"), &string("file")]),
                c.extension("hardlink@openssh.com", &[&string("dir/secret"), &string(format!("linked-{round}"))]),
                c.extension("hardlink@openssh.com", &[&string("file"), &string("dir/passwd")]),
                c.call(14, &[&string("dir/made"), &NONE]),
                c.call(15, &[&string("dir/made")]),
                c.call(13, &[&string("dir/passwd")]),
                c.call(20, &[&string("x"), &string("dir/symlink")]),
                c.call(13, &[&string("dir/symlink")]),
            ] {
                if let Reply::Handle(handle) = reply {
                    c.write(&handle, 0, b"mine").ok();
                    c.close(&handle).ok();
                }
            }
        }
        assert!(inside > 0 && nowhere > 0, "the race was run: {inside} {nowhere}");
    });
    untouched(&site);
    for entry in fs::read_dir(site.home("")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().to_str().unwrap().starts_with("linked-") {
            assert_eq!(fs::read_to_string(entry.path()).unwrap(), "mine");
        }
    }
}

/// Ends a race when it is dropped.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A container's root may take the place of the home's contents, but the mount stays where it is.
#[test]
fn what_is_renamed_away_stays_inside() {
    let site = Site::new();
    site.write("a/b/c/secret", b"mine");
    let mut c = site.connect();
    let handle = c.call(11, &[&string("a/b/c")]).handle();
    fs::rename(site.home("a/b"), site.home("moved")).unwrap();
    assert_eq!(c.open("a/b/c/../../../../../etc/passwd", 1).status(), NO_SUCH_FILE);
    assert!(matches!(c.call(12, &[&string(&handle)]), Reply::Names(_)));
    assert_eq!(c.call(16, &[&string("moved/c/../../..")]).name(), b"/home");
}
