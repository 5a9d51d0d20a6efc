//! What a person does with OpenSSH's `sftp`.

use crate::harness::{ALICE, Site, SmallDisk, noise, shown};
use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{MetadataExt as _, PermissionsExt as _},
    },
};

#[test]
fn a_large_file_comes_back_as_it_went() {
    let site = Site::new();
    let bytes = noise(200_000_000);
    fs::write(site.path("large"), &bytes).unwrap();
    let output = site.sftp(&[], b"put large\nget large back\n");
    assert!(output.status.success(), "{}", shown(&output));
    assert!(fs::read(site.path("back")).unwrap() == bytes, "the copy differs");
    let status = fs::metadata(site.home("large")).unwrap();
    assert_eq!((status.uid(), status.gid(), status.permissions().mode() & 0o7777), (ALICE, ALICE, 0o644));
    assert_eq!(status.size(), 200_000_000);
}

#[test]
fn many_small_files_come_back_as_they_went() {
    let site = Site::new();
    for number in 0..2000 {
        let folder = site.path(&format!("many/{}", number % 7));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{number}")), format!("file {number}\n")).unwrap();
    }
    let output = site.sftp(&[], b"put -Rp many\nget -R many back\n");
    assert!(output.status.success(), "{}", shown(&output));
    for number in 0..2000 {
        let name = format!("{}/{number}", number % 7);
        assert_eq!(fs::read_to_string(site.path("back").join(&name)).unwrap(), format!("file {number}\n"));
        assert_eq!(fs::metadata(site.home("many").join(&name)).unwrap().uid(), ALICE);
    }
}

#[test]
fn an_interrupted_transfer_is_taken_up_again() {
    let site = Site::new();
    let bytes = noise(3_000_000);
    fs::write(site.path("file"), &bytes).unwrap();
    site.write("file", &bytes[..1_234_567]);
    fs::write(site.path("back"), &bytes[..2_222_222]).unwrap();
    let output = site.sftp(&[], b"reput file\nreget file back\n");
    assert!(output.status.success(), "{}", shown(&output));
    assert!(fs::read(site.home("file")).unwrap() == bytes);
    assert!(fs::read(site.path("back")).unwrap() == bytes);
}

#[test]
fn everyday_commands_do_what_they_say() {
    let site = Site::new();
    fs::write(site.path("file"), "hello\n").unwrap();
    let commands = b"pwd\nmkdir d\nput file d/f\nchmod 640 d/f\nrename d/f d/g\nln -s g d/link\nln d/g d/hard\n\
        cp d/g d/copy\nls -l d\nrm d/copy\nget d/link got\ndf\nls /\nls /datasets/images\ncd ..\npwd\n";
    let output = site.sftp(&[], commands);
    assert!(output.status.success(), "{}", shown(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("Remote working directory: /home/alice\n"), "{text}");
    assert!(text.contains("Remote working directory: /home\n"), "{text}");
    assert!(text.contains("-rw-r-----    ? alice    alice "), "{text}");
    for shown in ["/datasets/images/one", "/projects", "/home", "/datasets"] {
        assert!(text.contains(shown), "{shown}: {text}");
    }
    assert_eq!(fs::read_to_string(site.path("got")).unwrap(), "hello\n");
    assert_eq!(fs::read_link(site.home("d/link")).unwrap(), OsStr::new("g"));
    assert_eq!(fs::metadata(site.home("d/hard")).unwrap().nlink(), 2);
    assert_eq!(fs::metadata(site.home("d/g")).unwrap().permissions().mode() & 0o7777, 0o640);
    assert!(!site.home("d/copy").exists());
}

#[test]
fn times_and_modes_are_kept_where_asked() {
    let site = Site::new();
    let file = fs::File::create(site.path("tool")).unwrap();
    file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_500_000_000)).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o755)).unwrap();
    let output = site.sftp(&[], b"put -p tool\n");
    assert!(output.status.success(), "{}", shown(&output));
    let status = fs::metadata(site.home("tool")).unwrap();
    assert_eq!((status.mtime(), status.permissions().mode() & 0o7777), (1_500_000_000, 0o755));
}

#[test]
fn a_hundred_thousand_entries_are_listed() {
    let site = Site::new();
    fs::create_dir(site.home("many")).unwrap();
    std::os::unix::fs::chown(site.home("many"), Some(ALICE), Some(ALICE)).unwrap();
    for number in 0..100_000 {
        fs::File::create(site.home(&format!("many/entry-{number:06}"))).unwrap();
    }
    let output = site.sftp(&[], b"ls -1f many\n");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let mut names: Vec<_> = text.lines().filter(|line| line.starts_with("many/entry-")).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 100_000);
}

#[test]
fn names_are_bytes() {
    let site = Site::new();
    let name = b"na\xffme \xe9\x80";
    fs::write(site.path("").join(OsStr::from_bytes(name)), "odd").unwrap();
    let mut commands = Vec::new();
    for line in [&b"put \"NAME\"\n"[..], b"rename \"NAME\" \"NAME2\"\n", b"get \"NAME2\" back\n", b"mkdir \"NAME\"\n"] {
        let line = String::from_utf8(line.to_vec()).unwrap();
        let mut parts = line.split("NAME");
        commands.extend_from_slice(parts.next().unwrap().as_bytes());
        for part in parts {
            commands.extend_from_slice(name);
            commands.extend_from_slice(part.as_bytes());
        }
    }
    let output = site.sftp(&[], &commands);
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(fs::read_to_string(site.path("back")).unwrap(), "odd");
    assert!(site.home("").join(OsStr::from_bytes(name)).is_dir());
    let listed = site.connect().list(".");
    assert!(listed.iter().any(|(listed, line)| listed == name && line.ends_with(name)));
}

#[test]
fn a_full_disk_is_named_and_spoils_nothing() {
    let site = Site::new();
    let disk = SmallDisk::mount(&site.home(""), 4 << 20);
    fs::write(site.path("small"), noise(1 << 20)).unwrap();
    fs::write(site.path("large"), noise(8 << 20)).unwrap();
    let output = site.sftp(&[], b"put small\n-put large\nls -l\nget small back\nrm large\nput small again\n");
    assert!(output.status.success(), "{}", shown(&output));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("/home/alice/large: No space left on device"), "{error}");
    assert_eq!(error.matches("No space left").count(), 1, "once is enough: {error}");
    assert!(fs::read(site.path("back")).unwrap() == noise(1 << 20), "what was there before is whole");
    assert!(fs::read(site.home("again")).unwrap() == noise(1 << 20), "and there is room again");
    drop(disk);
}

#[test]
fn datasets_are_read_and_never_written() {
    let site = Site::new();
    fs::write(site.path("file"), "mine").unwrap();
    let output = site.sftp(&[], b"get /datasets/images/one got\n");
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(fs::read_to_string(site.path("got")).unwrap(), "dataset");
    for command in [
        "put file /datasets/images/two",
        "put file /datasets/images/one",
        "rm /datasets/images/one",
        "mkdir /datasets/x",
        "rename /datasets/images/one /datasets/images/two",
        "chmod 777 /datasets/images/one",
        "rename /datasets/images/one stolen",
        "put file /x",
        "mkdir /home/x",
        "mkdir /projects/x",
        "rmdir /projects",
        "rename /home /h",
        "ln -s / /home/x",
    ] {
        let output = site.sftp(&[], format!("{command}\n").as_bytes());
        assert!(!output.status.success(), "{command}: {}", shown(&output));
    }
    assert_eq!(fs::read_to_string(site.path("data/datasets/images/one")).unwrap(), "dataset");
    assert_eq!(fs::read_dir(site.path("data/datasets/images")).unwrap().count(), 1);
}
