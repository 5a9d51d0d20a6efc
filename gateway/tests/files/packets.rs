//! Every request, and what is none.

use crate::harness::{
    ALICE, BAD_MESSAGE, FAILURE, Fields, NO_SUCH_FILE, NONE, PERMISSION_DENIED, Reply, Site, SmallDisk, UNSUPPORTED,
    noise, string,
};
use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
};

const READ: u32 = 1;
const WRITE: u32 = 2;
const APPEND: u32 = 4;
const CREATE: u32 = 8;
const TRUNCATE: u32 = 16;
const EXCLUSIVE: u32 = 32;

#[test]
fn the_extensions_are_announced() {
    let site = Site::new();
    let mut connection = site.connect_raw();
    connection.send(&[1, 0, 0, 0, 3]);
    let version = connection.receive();
    let mut fields = Fields(&version[5..]);
    let mut announced = Vec::new();
    while !fields.0.is_empty() {
        announced.push((fields.string(), fields.string()));
    }
    let announced: Vec<_> = announced
        .iter()
        .map(|(name, version)| format!("{} {}", String::from_utf8_lossy(name), String::from_utf8_lossy(version)))
        .collect();
    assert_eq!(
        announced,
        [
            "posix-rename@openssh.com 1",
            "statvfs@openssh.com 2",
            "fstatvfs@openssh.com 2",
            "hardlink@openssh.com 1",
            "fsync@openssh.com 1",
            "lsetstat@openssh.com 1",
            "limits@openssh.com 1",
            "expand-path@openssh.com 1",
            "copy-data 1",
            "home-directory 1",
            "users-groups-by-id@openssh.com 1",
        ]
    );
}

#[test]
fn files_are_opened_as_asked() {
    let site = Site::new();
    let mut c = site.connect();
    let handle = c.open("f", WRITE | CREATE | EXCLUSIVE).handle();
    c.write(&handle, 0, b"hello").ok();
    c.write(&handle, 3, b"p me").ok();
    assert!(matches!(c.read(&handle, 0, 5), Reply::Status(NO_SUCH_FILE, _)), "it was not opened for reading");
    c.close(&handle).ok();
    assert_eq!(c.open("f", WRITE | CREATE | EXCLUSIVE).status(), FAILURE);
    assert_eq!(fs::read(site.home("f")).unwrap(), b"help me");

    let handle = c.open("f", WRITE | APPEND).handle();
    c.write(&handle, 0, b"!").ok();
    c.close(&handle).ok();
    assert_eq!(fs::read(site.home("f")).unwrap(), b"help me!");

    let handle = c.open("f", READ).handle();
    assert_eq!(c.read(&handle, 5, 100), Reply::Data(b"me!".to_vec()));
    assert_eq!(c.read(&handle, 8, 100).status(), 1);
    assert_eq!(c.write(&handle, 0, b"x").status(), NO_SUCH_FILE);
    let attributes = c.call(8, &[&string(&handle)]).attributes();
    assert_eq!((attributes.size, attributes.uid, attributes.gid, attributes.mode), (8, ALICE, ALICE, 0o100_644));
    c.close(&handle).ok();

    let handle = c.open("f", READ | WRITE | TRUNCATE).handle();
    assert_eq!(c.read(&handle, 0, 10).status(), 1);
    c.close(&handle).ok();
    assert_eq!(c.open("missing", READ).status(), NO_SUCH_FILE);
    assert_eq!(c.open("missing", WRITE).status(), NO_SUCH_FILE);
}

#[test]
fn large_and_sparse_files_work() {
    let site = Site::new();
    let mut c = site.connect();
    let handle = c.open("sparse", READ | WRITE | CREATE).handle();
    let far = 5 << 30;
    c.write(&handle, far, b"end").ok();
    assert_eq!(c.call(8, &[&string(&handle)]).attributes().size, far + 3);
    assert_eq!(c.read(&handle, far - 2, 10), Reply::Data(b"\0\0end".to_vec()));
    let status = fs::metadata(site.home("sparse")).unwrap();
    assert!(status.blocks() * 512 < 1 << 20, "the hole takes no room");
    // Beyond what files can be.
    assert_eq!(c.write(&handle, u64::MAX - 1, b"x").status(), BAD_MESSAGE);
    // A read as long as a reply can be, and longer.
    c.write(&handle, 0, &noise(200_000)).ok();
    assert_eq!(c.read(&handle, 0, u32::MAX), {
        let mut all = noise(200_000);
        all.resize(261_120, 0);
        Reply::Data(all)
    });
}

#[test]
fn attributes_are_set() {
    let site = Site::new();
    site.write("f", b"0123456789");
    let mut c = site.connect();
    let size = [&1_u32.to_be_bytes()[..], &4_u64.to_be_bytes()].concat();
    c.call(9, &[&string("f"), &size]).ok();
    let mode = [4_u32.to_be_bytes(), 0o600_u32.to_be_bytes()].concat();
    c.call(9, &[&string("f"), &mode]).ok();
    let times = [8_u32.to_be_bytes(), 1000_u32.to_be_bytes(), 2000_u32.to_be_bytes()].concat();
    c.call(9, &[&string("f"), &times]).ok();
    let attributes = c.call(17, &[&string("f")]).attributes();
    assert_eq!((attributes.size, attributes.mode), (4, 0o100_600));
    assert_eq!((attributes.accessed, attributes.modified), (1000, 2000));
    let owner = |uid: u32, gid: u32| [2_u32.to_be_bytes(), uid.to_be_bytes(), gid.to_be_bytes()].concat();
    c.call(9, &[&string("f"), &owner(ALICE, ALICE)]).ok();
    for (uid, gid) in [(0, 0), (ALICE, 0), (20_002, ALICE), (u32::MAX, u32::MAX)] {
        assert_eq!(c.call(9, &[&string("f"), &owner(uid, gid)]).status(), PERMISSION_DENIED);
    }
    let handle = c.open("f", WRITE).handle();
    let size = [&1_u32.to_be_bytes()[..], &100_u64.to_be_bytes()].concat();
    c.call(10, &[&string(&handle), &size]).ok();
    c.call(10, &[&string(&handle), &mode]).ok();
    c.call(10, &[&string(&handle), &times]).ok();
    assert_eq!(c.call(10, &[&string(&handle), &owner(0, 0)]).status(), PERMISSION_DENIED);
    assert_eq!(fs::metadata(site.home("f")).unwrap().len(), 100);
    // A set-uid bit is the user's own affair, on files of their own.
    let mode = [4_u32.to_be_bytes(), 0o4711_u32.to_be_bytes()].concat();
    c.call(14, &[&string("d"), &mode]).ok();
    assert_eq!(fs::metadata(site.home("d")).unwrap().permissions().mode() & 0o777, 0o711);
}

#[test]
fn links_and_names_are_handled_as_in_openssh() {
    let site = Site::new();
    site.write("f", b"x");
    let mut c = site.connect();
    c.call(20, &[&string("f"), &string("link")]).ok();
    assert_eq!(fs::read_link(site.home("link")).unwrap().to_str(), Some("f"));
    assert_eq!(c.call(19, &[&string("link")]).name(), b"f");
    assert_eq!(c.call(7, &[&string("link")]).attributes().mode & 0o170_000, 0o120_000);
    assert_eq!(c.call(17, &[&string("link")]).attributes().mode & 0o170_000, 0o100_000);
    assert_eq!(c.call(16, &[&string("link/../.")]).name(), b"/home/alice");
    assert_eq!(c.call(16, &[&string(".")]).name(), b"/home/alice");
    assert_eq!(c.call(16, &[&string("")]).name(), b"/home/alice");
    assert_eq!(c.call(16, &[&string("link")]).name(), b"/home/alice/f");
    assert_eq!(c.call(16, &[&string("new")]).name(), b"/home/alice/new");
    assert_eq!(c.call(16, &[&string("/../../..")]).name(), b"/");
    assert_eq!(c.call(16, &[&string("new/new")]).status(), NO_SUCH_FILE);

    site.write("g", b"y");
    assert_eq!(c.call(18, &[&string("f"), &string("g")]).status(), FAILURE, "rename replaces nothing");
    c.call(18, &[&string("f"), &string("h")]).ok();
    c.extension("posix-rename@openssh.com", &[&string("h"), &string("g")]).ok();
    assert_eq!(fs::read(site.home("g")).unwrap(), b"x", "posix-rename does");
    c.extension("hardlink@openssh.com", &[&string("g"), &string("g2")]).ok();
    assert_eq!(fs::metadata(site.home("g")).unwrap().nlink(), 2);
    assert_eq!(c.extension("hardlink@openssh.com", &[&string("g"), &string("g2")]).status(), FAILURE);

    c.call(14, &[&string("d"), &NONE]).ok();
    assert_eq!(fs::metadata(site.home("d")).unwrap().permissions().mode() & 0o7777, 0o755);
    assert_eq!(c.call(14, &[&string("d"), &NONE]).status(), FAILURE);
    assert_eq!(c.call(13, &[&string("d")]).status(), FAILURE);
    c.call(18, &[&string("d"), &string("e")]).ok();
    c.call(18, &[&string("g"), &string("e/g")]).ok();
    assert_eq!(c.call(15, &[&string("e")]).status(), FAILURE, "not empty");
    c.call(13, &[&string("e/g")]).ok();
    c.call(15, &[&string("e")]).ok();
    assert_eq!(c.call(15, &[&string("e")]).status(), NO_SUCH_FILE);
}

#[test]
fn every_extension_answers() {
    let site = Site::new();
    site.write("f", &noise(1_000_000));
    let mut c = site.connect();

    let space = c.extension("statvfs@openssh.com", &[&string(".")]).extended();
    assert_eq!(space.len(), 11 * 8);
    let mut space = Fields(&space);
    let (block, _, blocks) = (space.u64(), space.u64(), space.u64());
    assert!(block > 0 && blocks > 0);
    assert_eq!(c.extension("statvfs@openssh.com", &[&string("missing")]).status(), NO_SUCH_FILE);

    let from = c.open("f", READ).handle();
    let space = c.extension("fstatvfs@openssh.com", &[&string(&from)]).extended();
    assert_eq!(space.len(), 11 * 8);
    let read_only = c.call(11, &[&string("/datasets")]).handle();
    let space = c.extension("fstatvfs@openssh.com", &[&string(&read_only)]).extended();
    assert_eq!(space[9 * 8..10 * 8], 3_u64.to_be_bytes(), "read-only, no set-uid");
    c.close(&read_only).ok();

    let to = c.open("copy", READ | WRITE | CREATE).handle();
    let copy = |c: &mut crate::harness::Connection, from: &[u8], at: u64, length: u64, to: &[u8], into: u64| {
        let fields = [string(from), at.to_be_bytes().into(), length.to_be_bytes().into(), string(to)].concat();
        c.extension("copy-data", &[&fields, &into.to_be_bytes()])
    };
    copy(&mut c, &from, 0, 0, &to, 0).ok();
    c.extension("fsync@openssh.com", &[&string(&to)]).ok();
    assert!(fs::read(site.home("copy")).unwrap() == noise(1_000_000));
    copy(&mut c, &from, 10, 20, &to, 1_000_000).ok();
    assert_eq!(fs::read(site.home("copy")).unwrap()[1_000_000..], noise(1_000_000)[10..30]);
    assert_eq!(copy(&mut c, &from, 999_990, 100, &to, 0).status(), 1, "the end came before");
    assert_eq!(copy(&mut c, &from, 0, 0, &from, 0).status(), BAD_MESSAGE, "not within a file");
    assert_eq!(copy(&mut c, &from, 0, 0, b"none", 0).status(), FAILURE);
    assert_eq!(copy(&mut c, &to, 0, 0, &from, 0).status(), NO_SUCH_FILE, "it is open for reading only");

    let limits = c.extension("limits@openssh.com", &[]).extended();
    let mut limits = Fields(&limits);
    assert_eq!([(); 4].map(|()| limits.u64()), [262_144, 261_120, 261_120, 1024]);

    for (path, expected) in
        [("~", "/home/alice"), ("~/x", "/home/alice/x"), ("~alice", "/home/alice"), ("f", "/home/alice/f")]
    {
        assert_eq!(c.extension("expand-path@openssh.com", &[&string(path)]).name(), expected.as_bytes());
    }
    assert_eq!(c.extension("expand-path@openssh.com", &[&string("~bob")]).status(), NO_SUCH_FILE);
    assert_eq!(c.extension("home-directory", &[&string("")]).name(), b"/home/alice");
    assert_eq!(c.extension("home-directory", &[&string("alice")]).name(), b"/home/alice");
    assert_eq!(c.extension("home-directory", &[&string("bob")]).status(), NO_SUCH_FILE);

    let ids = [ALICE.to_be_bytes(), 0_u32.to_be_bytes(), 12_345_u32.to_be_bytes()].concat();
    let names = c.extension("users-groups-by-id@openssh.com", &[&string(&ids), &string(&ids[..4])]).extended();
    let mut names = Fields(&names);
    assert_eq!(names.string(), [string("alice"), string("root"), string("")].concat());
    assert_eq!(names.string(), string("alice"));
    assert_eq!(c.extension("users-groups-by-id@openssh.com", &[&string("123"), &string("")]).status(), BAD_MESSAGE);

    c.call(20, &[&string("/etc/passwd"), &string("link")]).ok();
    let times = [8_u32.to_be_bytes(), 1000_u32.to_be_bytes(), 2000_u32.to_be_bytes()].concat();
    c.extension("lsetstat@openssh.com", &[&string("link"), &times]).ok();
    assert_eq!(fs::symlink_metadata(site.home("link")).unwrap().mtime(), 2000);
    let size = [&1_u32.to_be_bytes()[..], &4_u64.to_be_bytes()].concat();
    assert_eq!(c.extension("lsetstat@openssh.com", &[&string("link"), &size]).status(), BAD_MESSAGE);
    let mode = [4_u32.to_be_bytes(), 0o640_u32.to_be_bytes()].concat();
    assert_eq!(c.extension("lsetstat@openssh.com", &[&string("link"), &mode]).status(), FAILURE, "links have none");
    c.extension("lsetstat@openssh.com", &[&string("copy"), &mode]).ok();
    assert_eq!(fs::metadata(site.home("copy")).unwrap().permissions().mode() & 0o7777, 0o640);
    assert_eq!(c.extension("no-such@example.com", &[]).status(), UNSUPPORTED);
    assert_eq!(c.end().1.code(), Some(0));
}

#[test]
fn listings_read_as_in_ls() {
    let site = Site::new();
    site.write("d/old", b"123");
    let modified = std::time::UNIX_EPOCH + std::time::Duration::from_secs(86_400 * 365);
    fs::File::options().write(true).open(site.home("d/old")).unwrap().set_modified(modified).unwrap();
    let mut c = site.connect();
    let listed = c.list("d");
    let names: Vec<_> = listed.iter().map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect();
    assert!(names.contains(&".".into()) && names.contains(&"..".into()), "{names:?}");
    let line = listed.iter().find(|(name, _)| name == b"old").unwrap().1.clone();
    let line = String::from_utf8(line).unwrap();
    let expected = ["Jan  1  1971 old", "Dec 31  1970 old"];
    assert!(line.starts_with("-rw-r--r--   1 alice    alice           3 "), "{line}");
    assert!(expected.iter().any(|end| line.ends_with(end)), "{line}");
    assert_eq!(c.call(11, &[&string("d/old")]).status(), NO_SUCH_FILE);
    let file = c.open("d/old", READ).handle();
    assert_eq!(c.call(12, &[&string(&file)]).status(), FAILURE, "no folder");
}

#[test]
fn many_requests_may_be_in_flight() {
    let site = Site::new();
    let bytes = noise(64 * 100_000);
    site.write("f", &bytes);
    let mut c = site.connect();
    let handle = c.open("f", READ).handle();
    let read = |offset: u64| [string(&handle), offset.to_be_bytes().into(), 100_000_u32.to_be_bytes().into()].concat();
    let asked: Vec<_> = (0..64).map(|number| c.ask(5, &[&read(number * 100_000)])).collect();
    for (id, chunk) in asked.into_iter().zip(bytes.chunks(100_000)) {
        assert!(c.reply(id) == Reply::Data(chunk.to_vec()));
    }
}

#[test]
fn handles_are_bounded_and_never_mixed_up() {
    let site = Site::new();
    site.write("f", b"x");
    let mut c = site.connect();
    let mut handles = Vec::new();
    let refused = loop {
        match c.open("f", READ) {
            Reply::Handle(handle) => handles.push(handle),
            other => break other,
        }
    };
    assert_eq!((handles.len(), refused.status()), (1024, FAILURE));
    let first = handles.remove(0);
    c.close(&first).ok();
    let again = c.open("f", READ).handle();
    assert_ne!(first, again);
    for stale in [&first[..], b"", b"nonsense", &[0xff; 8], &[0; 300]] {
        assert_eq!(c.close(stale).status(), FAILURE);
        assert_eq!(c.read(stale, 0, 1).status(), FAILURE);
        assert_eq!(c.call(8, &[&string(stale)]).status(), FAILURE);
    }
    assert_eq!(c.read(&again, 0, 9), Reply::Data(b"x".to_vec()));
}

#[test]
fn a_pipe_does_not_stop_the_session() {
    let site = Site::new();
    rustix::fs::mkfifoat(rustix::fs::CWD, site.home("pipe"), rustix::fs::Mode::from_raw_mode(0o666)).unwrap();
    std::os::unix::fs::chown(site.home("pipe"), Some(ALICE), Some(ALICE)).unwrap();
    let mut c = site.connect();
    for flags in [READ, WRITE, READ | WRITE] {
        assert_eq!(c.open("pipe", flags).status(), FAILURE);
    }
    let size = [&1_u32.to_be_bytes()[..], &4_u64.to_be_bytes()].concat();
    assert_ne!(c.call(9, &[&string("pipe"), &size]).status(), 0);
    c.call(13, &[&string("pipe")]).ok();
}

#[test]
fn a_full_disk_is_an_answer() {
    let site = Site::new();
    let disk = SmallDisk::mount(&site.home(""), 1 << 20);
    let mut c = site.connect();
    let handle = c.open("f", WRITE | CREATE).handle();
    let mut offset = 0;
    let refused = loop {
        match c.write(&handle, offset, &noise(100_000)) {
            Reply::Status(0, _) => offset += 100_000,
            other => break other,
        }
    };
    assert_eq!(refused, Reply::Status(FAILURE, "No space left on device".into()));
    assert!(fs::metadata(site.home("f")).unwrap().len() >= offset);
    c.close(&handle).ok();
    let (error, status) = c.end();
    assert_eq!(error, "/home/alice/f: No space left on device\n");
    assert_eq!(status.code(), Some(0));
    drop(disk);
}

#[test]
fn malformed_requests_are_answered_and_the_session_goes_on() {
    let site = Site::new();
    let mut c = site.connect();
    for kind in 3..=20 {
        let id = c.ask(kind, &[&[0xff; 7]]);
        assert_eq!(c.reply(id).status(), BAD_MESSAGE, "kind {kind}");
    }
    assert_eq!(c.call(99, &[b"whatever"]).status(), UNSUPPORTED);
    assert_eq!(c.call(17, &[&string("a\0b")]).status(), BAD_MESSAGE);
    assert_eq!(c.call(17, &[&string(vec![b'x'; 5000])]).status(), BAD_MESSAGE);
    assert_eq!(c.call(17, &[&string(vec![b'x'; 300])]).status(), BAD_MESSAGE);
    c.call(16, &[&string(".")]).name();
    assert_eq!(c.end().1.code(), Some(0));
}

#[test]
fn what_is_no_packet_ends_the_session_only() {
    let site = Site::new();
    let bystander = site.connect();
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: example\r\n\r\n"[..],
        &[0; 64],
        &[0xff; 64],
        &[0, 4, 0, 1, 3],
        &[0, 0, 0, 1, 5],
        &[0, 0, 0, 5, 1, 0, 0, 0, 3, 0, 0, 0, 5, 1, 0, 0, 0, 3],
        &[0, 0, 0, 5, 17, 0, 0, 0, 3],
    ] {
        let mut c = site.connect_raw();
        c.stdin.as_mut().unwrap().write_all(garbage).unwrap();
        let mut rest = Vec::new();
        c.stdout.read_to_end(&mut rest).unwrap();
        let mut error = String::new();
        c.child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        assert!(error.contains("does not speak the protocol"), "{garbage:?}: {error}");
        assert_eq!(c.child.wait().unwrap().code(), Some(1));
    }
    let mut bystander = bystander;
    assert_eq!(bystander.call(16, &[&string(".")]).name(), b"/home/alice");
}

/// Requests made of plausible parts in every combination chance brings: each is answered, once.
#[test]
fn whatever_is_asked_is_answered() {
    let site = Site::new();
    site.write("f", b"some bytes");
    site.write("d/g", b"more bytes");
    let mut c = site.connect();
    let file = c.open("f", READ | WRITE).handle();
    let folder = c.call(11, &[&string("d")]).handle();
    let mut dice = noise(200_000).into_iter();
    let mut roll = |sides: usize| usize::from(dice.next().unwrap()) % sides;
    let extensions = [
        "posix-rename@openssh.com",
        "statvfs@openssh.com",
        "fstatvfs@openssh.com",
        "hardlink@openssh.com",
        "fsync@openssh.com",
        "lsetstat@openssh.com",
        "limits@openssh.com",
        "expand-path@openssh.com",
        "copy-data",
        "home-directory",
        "users-groups-by-id@openssh.com",
        "unknown@example.com",
    ];
    for _ in 0..5000 {
        let kind = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 200, 200, 200, 77][roll(22)];
        let mut fields = if kind == 200 { vec![string(extensions[roll(12)])] } else { Vec::new() };
        for _ in 0..roll(6) {
            fields.push(match roll(9) {
                0 => string(&file),
                1 => string(&folder),
                2 => string(["", ".", "..", "/", "f", "d", "d/g", "new", "~", "/datasets", "/etc/passwd"][roll(11)]),
                3 => string([0_u8, 1, 0xff, b'/'].repeat(roll(200))),
                4 => [0_u32, 1, 2, 15, 63, 255, 1 << 31, u32::MAX][roll(8)].to_be_bytes().to_vec(),
                5 => [0_u64, 1, 10, 4096, 1 << 40, i64::MAX as u64, u64::MAX][roll(7)].to_be_bytes().to_vec(),
                6 => NONE.to_vec(),
                7 => [0x8000_000f_u32, 1000, 1000, 0, 0].map(u32::to_be_bytes).concat(),
                _ => noise(roll(64)),
            });
        }
        // `close` would leave nothing to ask about.
        if kind != 4 {
            c.call(kind, &[&fields.concat()]);
        }
    }
    let (error, status) = c.end();
    assert_eq!(status.code(), Some(0), "{error}");
}
