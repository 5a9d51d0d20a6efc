//! Who gets in: known keys, unknown keys with a code, and nobody else.

use super::common::{Outcome, Person, Site};
use jiff::{Timestamp, ToSpan as _};
use std::{os::unix::fs::PermissionsExt as _, path::PathBuf};

/// Logs in with these answers to the prompts, one after the other.
async fn ssh_answering(person: &Person, answers: &[&str], options: &[&str], command: &str) -> Outcome {
    let file = person.path("answers");
    std::fs::write(&file, answers.iter().map(|answer| format!("{answer}\n")).collect::<String>()).unwrap();
    let mut ssh = person.ssh_command(&[&["-o", "BatchMode=no"], options].concat(), &[command]);
    ssh.env("SSH_ASKPASS", askpass(person)).env("SSH_ASKPASS_REQUIRE", "force").env("ANSWERS", &file);
    ssh.env("PROMPTS", person.path("prompts"));
    ssh.stdin(std::process::Stdio::null()).output().await.unwrap().into()
}

/// A program that gives the next answer and keeps the prompt.
fn askpass(person: &Person) -> PathBuf {
    let path = person.path("askpass");
    let script = "#!/bin/sh\necho \"$1\" >> \"$PROMPTS\"\nhead -n 1 \"$ANSWERS\"\nsed -i 1d \"$ANSWERS\"\n";
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn prompts(person: &Person) -> usize {
    std::fs::read_to_string(person.path("prompts")).unwrap_or_default().lines().count()
}

async fn invite(site: &Site, name: &str) -> String {
    let user = site.store.user_by_name(name).await.unwrap();
    site.store.add_invite(user.id, Timestamp::now() + 1.hour()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_binds_the_key_that_signs_and_the_login_goes_on() {
    let site = Site::start().await;
    site.user("alice").await;
    let code = invite(&site, "alice").await;
    let laptop = site.stranger("laptop");
    laptop.ssh("true").await.exits(255);
    let typed = format!("  {} ", code.to_lowercase().replace('-', " "));
    let first = ssh_answering(&laptop, &["WRONG", &typed], &[], "echo in").await.success();
    assert_eq!(first.text(), "in");
    assert_eq!(prompts(&laptop), 2);
    assert_eq!(laptop.ssh("echo again").await.success().text(), "again");
    // The code is used up; where no invitation is open, nobody is asked for one.
    let thief = site.stranger("thief");
    let told = ssh_answering(&thief, &[&code], &["-o", "LogLevel=INFO"], "true").await.exits(255);
    assert!(told.stderr.contains("ask an administrator for an enrolment code"), "{}", told.stderr);
    assert_eq!(prompts(&thief), 0);
    invite(&site, "alice").await;
    ssh_answering(&thief, &[&code, &code, &code], &[], "true").await.exits(255);
    assert_eq!(prompts(&thief), 3);
    let actions: Vec<_> = site.store.audit_log(100).await.unwrap().into_iter().map(|event| event.action).collect();
    for action in ["login", "key.enrol", "key.enrol-refused"] {
        assert!(actions.iter().any(|done| done == action), "{action}: {actions:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_key_does_not_stand_before_a_known_one() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let others: Vec<_> = (0..7).map(|number| alice.make_key(&format!("other{number}"))).collect();
    let mut options: Vec<String> = others.iter().flat_map(|key| ["-i".into(), key.display().to_string()]).collect();
    // Given on the command line, they come before the one of the configuration.
    options.extend(["-i".into(), alice.path("id_ed25519").display().to_string()]);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    assert_eq!(alice.ssh_with(&options, &["echo in"]).await.success().text(), "in");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_cannot_sign_is_not_bound() {
    let site = Site::start().await;
    site.user("alice").await;
    let code = invite(&site, "alice").await;
    let victim = site.stranger("victim");
    let thief = site.stranger("thief");
    // The thief offers the victim's public key, but has another private one.
    std::fs::copy(victim.path("id_ed25519.pub"), thief.path("id_ed25519.pub")).unwrap();
    ssh_answering(&thief, &[&code], &[], "true").await.exits(255);
    let user = site.store.user_by_name("alice").await.unwrap();
    assert!(site.store.keys_of(user.id).await.unwrap().is_empty());
    ssh_answering(&victim, &[&code], &[], "true").await.success();
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_checked_against_keys() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    site.user("bob").await;
    for name in ["mlad", "alice", "mlad+two", "alice+two"] {
        alice.ssh_with(&["-l", name], &["true"]).await.success();
    }
    for name in ["bob", "root", "nobody", "bob+two", "mlad+../..", "-x", ""] {
        let options = format!("User={name}");
        assert_eq!(alice.ssh_with(&["-o", &options], &["true"]).await.code, 255, "{name}");
    }
    let code = invite(&site, "alice").await;
    let stranger = site.stranger("stranger");
    ssh_answering(&stranger, &[&code], &["-l", "bob"], "true").await.exits(255);
    ssh_answering(&stranger, &[&code], &["-l", "alice"], "true").await.success();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_disabled_is_out_and_learns_why() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let user = site.store.user_by_name("alice").await.unwrap();
    site.store.set_user_enabled(user.id, false).await.unwrap();
    let told = ssh_answering(&alice, &[], &["-o", "LogLevel=INFO"], "true").await.exits(255);
    assert!(told.stderr.contains("mlad: alice may not log in any more"), "{}", told.stderr);
    let code = invite(&site, "alice").await;
    let other = site.stranger("other");
    ssh_answering(&other, &[&code], &[], "true").await.exits(255);
    site.store.set_user_enabled(user.id, true).await.unwrap();
    alice.ssh("true").await.success();
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_are_limited_by_connection() {
    let site = Site::with_settings("max_tries = 2\nenrolment_tries_per_minute = 1000").await;
    site.user("alice").await;
    let code = invite(&site, "alice").await;
    let stranger = site.stranger("stranger");
    let many = ["-o", "NumberOfPasswordPrompts=10"];
    ssh_answering(&stranger, &["A", "B", &code], &many, "true").await.exits(255);
    assert_eq!(prompts(&stranger), 2, "the connection has two tries");
    ssh_answering(&stranger, &["C", &code], &many, "true").await.success();
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_are_limited_by_address() {
    // The next try comes after a minute; this is over long before.
    let site = Site::with_settings("enrolment_tries_per_minute = 1").await;
    site.user("alice").await;
    let code = invite(&site, "alice").await;
    let stranger = site.stranger("stranger");
    ssh_answering(&stranger, &["WRONG", &code], &[], "true").await.exits(255);
    assert_eq!(prompts(&stranger), 3, "the right code came too late, and a third was asked for");
    ssh_answering(&stranger, &[&code], &[], "true").await.exits(255);
    let user = site.store.user_by_name("alice").await.unwrap();
    assert!(site.store.keys_of(user.id).await.unwrap().is_empty());
    // Another address has tries of its own.
    ssh_answering(&stranger, &[&code], &["-b", "127.0.0.2"], "true").await.success();
}
