//! Certificates made by `ssh-keygen`, shown by `ssh`.

use super::{
    access::Master,
    common::{Outcome, Person, Site},
    forwarding::tcp_service,
};
use jiff::{Timestamp, ToSpan as _};
use mlad::api::{NewKey, Revoked};
use mlad_gateway::{ssh::parse_key, store::KeyToAdd};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Whoever signs certificates.
struct Authority {
    key: PathBuf,
}

impl Authority {
    fn new(site: &Site, name: &str, kind: &[&str]) -> Self {
        let key = site.path(name);
        let made =
            Command::new("ssh-keygen").args(["-q", "-N", "", "-C", name, "-t"]).args(kind).arg("-f").arg(&key).status();
        assert!(made.unwrap().success());
        Self { key }
    }

    /// Its certificates let in everybody.
    async fn trusted(site: &Site) -> Self {
        let authority = Self::new(site, "ca", &["ed25519"]);
        site.store.add_authority(&authority.public(), None).await.unwrap();
        authority
    }

    fn public(&self) -> KeyToAdd {
        let public_key = std::fs::read_to_string(self.key.with_extension("pub")).unwrap();
        parse_key(&NewKey { public_key, label: None, expires_at: None }).unwrap()
    }

    /// Certifies a person's key: `ssh` shows the certificate from now on, and the key after it.
    fn certify(&self, person: &Person, options: &[&str]) -> PathBuf {
        let (made, certificate) = self.sign(&person.path("id_ed25519.pub"), options);
        assert!(made);
        certificate
    }

    fn sign(&self, key: &Path, options: &[&str]) -> (bool, PathBuf) {
        let mut command = Command::new("ssh-keygen");
        command.args(["-q", "-I", "the laptop"]).args(options).arg("-s").arg(&self.key).arg(key);
        let name = key.file_name().unwrap().to_str().unwrap().replace(".pub", "-cert.pub");
        (command.status().unwrap().success(), key.with_file_name(name))
    }
}

/// Who somebody is taken for, if they are let in.
async fn who(person: &Person, options: &[&str]) -> Option<String> {
    // The `mlad` of these tests prints its user and exits with 3.
    let said = person.ssh_with(options, &["mlad", "x"]).await;
    (said.code == 3).then(|| said.text().lines().next().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_the_user_it_names() {
    let site = Site::start().await;
    site.user("alice").await;
    site.user("bob").await;
    let laptop = site.stranger("laptop");
    let authority = Authority::trusted(&site).await;
    assert_eq!(who(&laptop, &[]).await, None);
    authority.certify(&laptop, &["-n", "alice", "-z", "7"]);
    for name in ["mlad", "alice", "mlad+two", "alice+two"] {
        assert_eq!(who(&laptop, &["-l", name]).await.as_deref(), Some("alice"), "{name}");
    }
    assert_eq!(who(&laptop, &["-l", "bob"]).await, None);
    let log = site.store.audit_log(10).await.unwrap();
    let login = log.iter().find(|event| event.action == "login").unwrap();
    let detail = login.detail.as_deref().unwrap();
    assert!(detail.starts_with("certificate the laptop (serial 7) of SHA256:"), "{detail}");
    assert!(site.store.authorities().await.unwrap()[0].last_used_at.is_some());
    // Who is several users says which by the login name.
    authority.certify(&laptop, &["-n", "bob,alice,carol"]);
    for (name, expected) in [("mlad", None), ("mlad+two", None), ("alice", Some("alice")), ("bob+two", Some("bob"))] {
        assert_eq!(who(&laptop, &["-l", name]).await.as_deref(), expected, "{name}");
    }
    // A principal that is no user stands in nobody's way.
    authority.certify(&laptop, &["-n", "carol,bob,root"]);
    assert_eq!(who(&laptop, &[]).await.as_deref(), Some("bob"));
    let user = site.store.user_by_name("bob").await.unwrap();
    site.store.set_user_enabled(user.id, false).await.unwrap();
    assert_eq!(who(&laptop, &[]).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_good_certificate_lets_nobody_in() {
    let site = Site::start().await;
    let alice = site.user("alice").await;
    let laptop = site.stranger("laptop");
    let authority = Authority::trusted(&site).await;
    for options in [
        &["-n", "alice", "-V", "-2d:-1d"][..],
        &["-n", "alice", "-V", "+1d:+2d"],
        &["-n", "alice", "-h"],
        &["-n", "carol"],
        &[],
        &["-n", "alice", "-O", "critical:tell@example.org=x"],
        &["-n", "alice", "-O", "source-address=192.0.2.0/24"],
    ] {
        authority.certify(&laptop, options);
        assert_eq!(who(&laptop, &["-l", "alice"]).await, None, "{options:?}");
    }
    authority.certify(&laptop, &["-n", "alice", "-V", "-1d:forever"]);
    assert_eq!(who(&laptop, &[]).await.as_deref(), Some("alice"));
    // One that is signed by somebody else, or by a certified key, or with SHA-1.
    let stranger = Authority::new(&site, "stranger", &["ed25519"]);
    stranger.certify(&laptop, &["-n", "alice"]);
    assert_eq!(who(&laptop, &[]).await, None);
    let below = authority.sign(&stranger.key.with_extension("pub"), &["-n", "alice"]).1;
    let line = NewKey { public_key: std::fs::read_to_string(below).unwrap(), label: None, expires_at: None };
    assert!(parse_key(&line).is_err(), "a certificate is no authority");
    let old = Authority::new(&site, "old", &["rsa", "-b", "2048"]);
    site.store.add_authority(&old.public(), Some(alice.id)).await.unwrap();
    old.certify(&laptop, &["-n", "alice"]);
    assert_eq!(who(&laptop, &[]).await.as_deref(), Some("alice"), "with SHA-2, as it is by default");
    let (made, _) = old.sign(&laptop.path("id_ed25519.pub"), &["-n", "alice", "-t", "ssh-rsa"]);
    if made {
        assert_eq!(who(&laptop, &["-o", "CASignatureAlgorithms=+ssh-rsa"]).await, None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_of_one_user_lets_in_no_other() {
    let site = Site::start().await;
    let alice = site.user("alice").await;
    site.user("bob").await;
    let laptop = site.stranger("laptop");
    let authority = Authority::new(&site, "ca", &["ecdsa"]);
    site.store.add_authority(&authority.public(), Some(alice.id)).await.unwrap();
    authority.certify(&laptop, &["-n", "alice,bob"]);
    assert_eq!(who(&laptop, &[]).await.as_deref(), Some("alice"), "for bob it is not trusted");
    assert_eq!(who(&laptop, &["-l", "bob"]).await, None);
    // A code binds a key all the same while there is an authority, and a key that is known needs none.
    let bob = site.person("robert").await;
    assert_eq!(who(&bob, &[]).await.as_deref(), Some("robert"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_command_is_run_whatever_is_asked_for() {
    let site = Site::start().await;
    site.user("alice").await;
    let laptop = site.stranger("laptop");
    let authority = Authority::trusted(&site).await;
    let forced = "force-command=echo \"forced: $SSH_ORIGINAL_COMMAND$EVIL\"";
    authority.certify(&laptop, &["-n", "alice", "-O", forced]);
    let set = ["-o", "SetEnv=EVIL=1 LC_X=2"];
    assert_eq!(laptop.ssh_with(&set, &["ls", "-l; true"]).await.success().text(), "forced: ls -l; true");
    assert_eq!(laptop.ssh_with(&set, &[]).await.success().text(), "forced: ");
    assert_eq!(laptop.ssh_with(&["-s"], &["sftp"]).await.success().text(), "forced: sftp");
    assert_eq!(laptop.ssh_with(&["-s"], &["other"]).await.success().text(), "forced: other");
    authority.certify(&laptop, &["-n", "alice", "-O", "force-command=internal-sftp"]);
    let file = laptop.path("sent");
    std::fs::write(&file, "for sftp").unwrap();
    let copied: Outcome = laptop
        .command("sftp")
        .args(["-q", "-b", "-", "server"])
        .stdin(std::process::Stdio::from(batch(&laptop, &format!("get {0} {0}.back\n", file.display()))))
        .output()
        .await
        .unwrap()
        .into();
    copied.success();
    assert_eq!(std::fs::read_to_string(laptop.path("sent.back")).unwrap(), "for sftp");
}

fn batch(person: &Person, text: &str) -> std::fs::File {
    let path = person.path("batch");
    std::fs::write(&path, text).unwrap();
    std::fs::File::open(path).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_certificate_does_not_permit_it_does_not_give() {
    let site = Site::start().await;
    site.user("alice").await;
    let laptop = site.stranger("laptop");
    let authority = Authority::trusted(&site).await;
    let service = tcp_service().await;
    let through = format!("127.0.0.1:{service}");
    let back = format!("{}:localhost:{service}", site.backend.agent.home().join("back.sock").display());
    let loud = ["-o", "LogLevel=INFO"];
    let with =
        |options: &[&'static str]| -> Vec<String> { loud.iter().chain(options).map(|&option| option.into()).collect() };
    let try_all = async || {
        let terminal = with(&["-tt"]);
        let terminal: Vec<_> = terminal.iter().map(String::as_str).collect();
        let terminal = laptop.ssh_with(&terminal, &["test -t 0 && echo terminal"]).await;
        let local = laptop.ssh_input(&[&loud[..], &["-W", &through]].concat(), &[], b"word").await;
        let remote = laptop.ssh_with(&[&loud[..], &["-R", &back]].concat(), &["true"]).await;
        (terminal, local, remote)
    };
    authority.certify(&laptop, &["-n", "alice"]);
    let (terminal, local, remote) = try_all().await;
    assert!(terminal.text().contains("terminal"), "{terminal:?}");
    assert_eq!(local.success().text(), "WORD");
    assert!(!remote.success().stderr.contains("failed"));
    authority.certify(&laptop, &["-n", "alice", "-O", "clear"]);
    let (terminal, local, remote) = try_all().await;
    assert!(terminal.stderr.contains("PTY allocation request failed"), "{terminal:?}");
    assert!(local.stderr.contains("administratively prohibited: this login may not forward"), "{local:?}");
    assert!(remote.stderr.contains("remote port forwarding failed"), "{remote:?}");
    assert_eq!(laptop.ssh("echo in").await.success().text(), "in");
    authority.certify(&laptop, &["-n", "alice", "-O", "clear", "-O", "permit-pty"]);
    assert!(try_all().await.0.text().contains("terminal"));
    // It is for use from there, and from nowhere else.
    authority.certify(&laptop, &["-n", "alice", "-O", "source-address=127.0.0.2,10.0.0.0/8"]);
    assert_eq!(who(&laptop, &["-b", "127.0.0.2"]).await.as_deref(), Some("alice"));
    assert_eq!(who(&laptop, &[]).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_revoked_or_trusted_no_more_is_out_at_once() {
    let site = Site::start().await;
    site.user("alice").await;
    let (laptop, desk) = (site.stranger("laptop"), site.stranger("desk"));
    let authority = Authority::trusted(&site).await;
    authority.certify(&laptop, &["-n", "alice", "-z", "7"]);
    authority.certify(&desk, &["-n", "alice", "-z", "8"]);
    let kept = Master::open(&desk, "control", &[]).await;
    let lost = Master::open(&laptop, "control", &[]).await;
    let made = site.store.revoke(&Revoked::Serial(7), Some(&authority.public().fingerprint)).await.unwrap();
    let told = lost.ended().await;
    assert!(told.contains("(serial 7)") && told.contains("was revoked; ask for another"), "{told}");
    assert_eq!(who(&laptop, &[]).await, None);
    assert_eq!(kept.session(&desk).await.success().text(), "in");
    site.store.withdraw_revocation(made.id).await.unwrap();
    assert_eq!(who(&laptop, &[]).await.as_deref(), Some("alice"));
    site.store.revoke(&Revoked::KeyId("the laptop".into()), None).await.unwrap();
    let told = kept.ended().await;
    assert!(told.contains("was revoked"), "every certificate of these tests has that key id: {told}");
    let all = site.store.revocations().await.unwrap();
    site.store.withdraw_revocation(all[0].id).await.unwrap();
    let lost = Master::open(&laptop, "again", &[]).await;
    site.store.remove_authority(site.store.authorities().await.unwrap()[0].id).await.unwrap();
    let told = lost.ended().await;
    assert!(told.contains("is not trusted any more"), "{told}");
    assert_eq!(who(&laptop, &[]).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_ends_ends_its_connections() {
    let site = Site::start().await;
    site.user("alice").await;
    let laptop = site.stranger("laptop");
    let authority = Authority::trusted(&site).await;
    // On a machine that is busy it may be over before anybody is in.
    let mut lost = None;
    for seconds in [10, 60, 300] {
        let end = (Timestamp::now() + seconds.seconds()).strftime("%Y%m%d%H%M%SZ").to_string();
        authority.certify(&laptop, &["-n", "alice", "-V", &format!("-1d:{end}")]);
        lost = Master::try_open(&laptop, "control", &[]).await;
        if lost.is_some() {
            break;
        }
    }
    let told = lost.expect("a minute is enough").ended().await;
    assert!(told.contains("your certificate has expired; ask for another"), "{told}");
    assert_eq!(who(&laptop, &[]).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_shows_the_certificate_that_lies_beside_its_key() {
    let keys = tempfile::tempdir().unwrap();
    let ca = keys.path().join("ca");
    let run = |arguments: &[&str], key: &Path| {
        assert!(Command::new("ssh-keygen").arg("-q").args(arguments).arg(key).status().unwrap().success());
    };
    run(&["-t", "ed25519", "-N", "", "-f"], &ca);
    let site = Site::prepared("", |data| {
        let folder = data.join("ssh");
        std::fs::create_dir(&folder).unwrap();
        for (kind, name) in [("ed25519", "ssh_host_ed25519_key"), ("ecdsa", "ssh_host_ecdsa_key")] {
            run(&["-t", kind, "-N", "", "-f"], &folder.join(name));
        }
        let sign = ["-h", "-I", "server", "-n", "127.0.0.1", "-s", ca.to_str().unwrap()];
        run(&sign, &folder.join("ssh_host_ed25519_key.pub"));
    })
    .await;
    let alice = site.person("alice").await;
    let trusted = std::fs::read_to_string(ca.with_extension("pub")).unwrap();
    let known = alice.path("known_authority");
    std::fs::write(&known, format!("@cert-authority * {trusted}")).unwrap();
    let known = format!("UserKnownHostsFile={}", known.display());
    let strict = ["-o", "StrictHostKeyChecking=yes", "-o", &known];
    alice.ssh_with(&strict, &["true"]).await.success();
    let ecdsa = [&strict[..], &["-o", "HostKeyAlgorithms=ecdsa-sha2-nistp256"]].concat();
    alice.ssh_with(&ecdsa, &["true"]).await.exits(255);
    // Who knows the key, and not the authority, goes on with that.
    alice.ssh("true").await.success();
    alice.ssh_with(&["-o", "StrictHostKeyChecking=yes"], &["true"]).await.success();
}
