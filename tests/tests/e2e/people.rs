//! Rows A2, H2: enrolment with a one-time code, and what an administrator does is written down.

use mlad_tests::{Outcome, Person, Site, eventually};
use std::{fs, time::Duration};

const LONG: Duration = Duration::from_secs(120);

/// Logs in on a terminal, types the code when asked, and leaves at the shell's prompt.
fn enrol(person: &Person, code: &str) -> Outcome {
    person.at_a_terminal(&format!(
        "expect \"Enrolment code: \" {{}} timeout {{ exit 10 }} eof {{ exit 11 }}\n\
         send \"{code}\\r\"\n\
         expect \"Enrolment code: \" {{ exit 12 }} -re {{\\$ $}} {{}} eof {{ exit 13 }} timeout {{ exit 14 }}\n\
         send \"exit 0\\r\""
    ))
}

#[test]
fn a_one_time_code_enrols_a_key_once() {
    let site = Site::start();
    let invite = site.admin(&["invite", "carol", "--json"]).success().json();
    let code = invite["code"].as_str().unwrap();
    let carol = site.stranger("carol");
    let wrong = enrol(&carol, "AAAAA-AAAAA-AAAAA-AAAAA");
    assert_eq!(wrong.code, 12, "asked again: {}", wrong.text());
    enrol(&carol, code).success();
    assert_eq!(carol.ssh("id -un").success().text(), "carol");
    let mallory = site.stranger("mallory");
    let again = enrol(&mallory, code);
    assert_eq!(again.code, 11, "a code works once, and without an invitation nobody is asked: {}", again.text());
    assert_eq!(mallory.ssh("id -un").code, 255);
    let audit = site.admin(&["audit"]).success().text();
    assert!(audit.contains("carol") && !audit.contains(code), "written down, without the code:\n{audit}");
}

#[test]
fn what_an_administrator_does_is_written_down() {
    let site = Site::start();
    let alice = site.person("alice");
    site.admin(&["user", "quota", "alice", "--slices", "1"]).success();
    site.admin(&["user", "disable", "alice"]).success();
    site.admin(&["user", "enable", "alice"]).success();
    let events = site.mlad_json(&["admin", "audit"]);
    let actions: Vec<&str> =
        events["events"].as_array().unwrap().iter().map(|event| event["action"].as_str().unwrap()).collect();
    assert!(actions.len() >= 5, "{actions:?}");
    alice.ssh("true").success();
    for (action, target) in [("user.add", "alice"), ("key.add", "alice"), ("user.disable", "alice")] {
        assert!(actions.contains(&action), "{action} of {target}: {actions:?}");
    }
}

#[test]
fn people_manage_their_own_keys() {
    let site = Site::start();
    let alice = site.person("alice");
    let laptop = site.stranger("alice-laptop");
    let public = fs::read_to_string(laptop.public_key()).unwrap();
    alice.ssh_with_input("mlad key add -", public.as_bytes()).success();
    assert_eq!(laptop.ssh("id -un").success().text(), "alice");
    let keys = alice.ssh("mlad key ls --json").success().json();
    let added =
        keys.as_array().unwrap().iter().find(|key| public.starts_with(key["public_key"].as_str().unwrap())).unwrap();
    assert_eq!(added["last_used_from"].as_str(), Some("127.0.0.1"));
    let fingerprint = added["fingerprint"].as_str().unwrap();
    alice.ssh(&format!("mlad key rm {fingerprint}")).success();
    assert_eq!(laptop.ssh("id -un").code, 255);
    // From inside the container as well, with a label and an end.
    let add = "cat > new.pub; mlad key add new.pub --label laptop --expires 90d";
    let said = alice.ssh_with_input(add, public.as_bytes()).success().text();
    assert!(said.contains(&format!("added {fingerprint} (laptop), until ")), "{said}");
    assert_eq!(laptop.ssh("id -un").success().text(), "alice");
    let listed = alice.ssh("sh -c 'mlad key ls'").success().text();
    assert!(listed.contains("laptop") && listed.contains("in 89d"), "{listed}");
    alice.ssh("sh -c 'mlad key rm laptop'").success();
    assert_eq!(laptop.ssh("id -un").code, 255);
    let actions = site.mlad_json(&["admin", "audit"]);
    let removed =
        actions["events"].as_array().unwrap().iter().filter(|event| {
            event["action"] == "key.remove" && event["actor"] == "alice" && event["detail"] == fingerprint
        });
    assert_eq!(removed.count(), 2);
}

#[test]
fn nobody_locks_themselves_out_by_mistake() {
    let site = Site::start();
    let alice = site.person("alice");
    let keys = alice.ssh("mlad key ls --json").success().json();
    let own = keys[0]["fingerprint"].as_str().unwrap().to_owned();
    for inside in ["", "sh -c ' "] {
        let end = if inside.is_empty() { "" } else { "'" };
        let refused = alice.ssh(&format!("{inside}mlad key rm {own}{end}"));
        assert_eq!(refused.code, 1, "{}", refused.stderr);
        assert!(refused.stderr.contains("the last key that lets you in") && refused.stderr.contains("--force"));
    }
    assert_eq!(alice.ssh("id -un").success().text(), "alice");
    // An administrator may, and gives another; one that has expired never was.
    let laptop = site.stranger("alice-laptop");
    let file = laptop.public_key();
    let over = site.admin(&["key", "add", "alice", file.to_str().unwrap(), "--expires", "2020-01-01"]);
    assert_eq!(over.code, 2, "{}", over.stderr);
    site.admin(&["key", "rm", "alice", &own]).success();
    assert_eq!(alice.ssh("true").code, 255);
    site.admin(&["key", "add", "alice", file.to_str().unwrap(), "--label", "lent", "--expires", "2w"]).success();
    assert_eq!(laptop.ssh("id -un").success().text(), "alice");
    // Who insists is out, at once.
    laptop.ssh("mlad key rm lent --force");
    assert_eq!(laptop.ssh("true").code, 255);
    assert_eq!(site.mlad_json(&["admin", "key", "ls", "alice"]).as_array().unwrap().len(), 0);
}

#[test]
fn a_quota_is_kept_and_told() {
    let site = Site::builder().setting("workspace", "wait_without_terminal_seconds = 2").start();
    let alice = site.person("alice");
    site.admin(&["user", "quota", "alice", "--slices", "1"]).success();
    alice.ssh("true").success();
    let second = Outcome::of(&mut alice.ssh_command(&["-l", "mlad+second"], &["true"]));
    assert_ne!(second.code, 0);
    assert!(second.stderr.to_lowercase().contains("quota"), "{}", second.stderr);
    let quota = alice.ssh("mlad quota --json").success().json();
    assert_eq!((quota["slices"].as_u64(), quota["slices_used"].as_u64()), (Some(1), Some(1)));
}

#[test]
fn a_certificate_lets_in_whom_it_names_until_it_is_revoked() {
    let site = Site::start();
    site.admin(&["user", "add", "dora"]).success();
    let laptop = site.stranger("dora-laptop");
    let public = laptop.public_key();
    let authority = public.with_file_name("ca");
    let keygen = |arguments: &[&str]| {
        let made = std::process::Command::new("ssh-keygen").arg("-q").args(arguments).status();
        assert!(made.unwrap().success(), "{arguments:?}");
    };
    keygen(&["-t", "ed25519", "-N", "", "-C", "campus", "-f", authority.to_str().unwrap()]);
    let sign = ["-s", authority.to_str().unwrap(), "-I", "dora@laptop", "-n", "dora", "-z", "41"];
    keygen(&[&sign[..], &["-O", "no-port-forwarding", public.to_str().unwrap()]].concat());
    assert_eq!(laptop.ssh("id -un").code, 255);
    let file = authority.with_extension("pub");
    site.admin(&["ca", "add", file.to_str().unwrap()]).success();
    assert_eq!(laptop.ssh("id -un").success().text(), "dora");
    let refused = Outcome::of(&mut laptop.ssh_command(&["-o", "LogLevel=INFO", "-W", "127.0.0.1:1"], &[]));
    assert!(refused.stderr.contains("administratively prohibited"), "{}", refused.stderr);
    let listed = site.admin(&["ca", "ls"]).success().text();
    assert!(listed.contains("campus") && listed.contains("everybody"), "{listed}");
    site.admin(&["ca", "revoke", "--serial", "41"]).success();
    assert_eq!(laptop.ssh("true").code, 255);
    let made = site.mlad_json(&["admin", "ca", "revocations"]);
    assert_eq!(made[0]["revoked"], serde_json::json!({"kind": "serial", "value": 41}));
    site.admin(&["ca", "restore", &made[0]["id"].to_string()]).success();
    laptop.ssh("true").success();
    let id = site.mlad_json(&["admin", "ca", "ls"])[0]["id"].to_string();
    site.admin(&["ca", "rm", &id]).success();
    assert_eq!(laptop.ssh("true").code, 255);
    assert_eq!(site.admin(&["ca", "revoke"]).code, 2, "what is to be revoked must be said");
    let audit = site.admin(&["audit"]).success().text();
    for action in ["authority.add", "authority.remove", "certificate.revoke", "certificate.restore"] {
        assert!(audit.contains(action), "{action}:\n{audit}");
    }
}

#[test]
fn what_somebody_may_forward_is_decided_by_an_administrator() {
    let site = Site::start();
    let alice = site.person("alice");
    let shown = site.admin(&["user", "forwarding", "alice", "--local", "no"]).success().text();
    assert!(shown.contains("LOCAL") && shown.contains("no"), "{shown}");
    let reach = || Outcome::of(&mut alice.ssh_command(&["-o", "LogLevel=INFO", "-W", "127.0.0.1:1"], &[])).stderr;
    assert!(reach().contains("administratively prohibited"));
    site.admin(&["project", "add", "secret"]).success();
    site.admin(&["project", "forwarding", "secret", "--local", "no", "--agent", "no"]).success();
    site.admin(&["project", "member", "add", "secret", "alice"]).success();
    site.admin(&["user", "forwarding", "alice", "--local", "yes"]).success();
    assert!(reach().contains("administratively prohibited"), "her project forbids it");
    site.admin(&["project", "member", "rm", "secret", "alice"]).success();
    let told = reach();
    assert!(!told.contains("administratively prohibited") && told.contains("open failed"), "{told}");
    let now = site.mlad_json(&["admin", "project", "forwarding", "secret"]);
    assert_eq!((now["local"].as_bool(), now["remote"].as_bool()), (Some(false), Some(true)));
}

#[test]
fn changed_settings_are_read_anew_without_dropping_anybody() {
    let site =
        Site::builder().setting("ssh", "max_connections_per_user = 50").setting("job", "max_attempts = 3").start();
    let alice = site.person("alice");
    let mut session = alice.start(&[], &["echo up; cat"]);
    assert_eq!(session.lines().next(LONG), "up");
    site.change_setting("max_connections_per_user = 50", "max_connections_per_user = 1");
    eventually("the new limit holds", LONG, || alice.ssh("true").code == 255);
    // What is wrong changes nothing, and says why; what cannot change now is named.
    site.change_setting("max_connections_per_user = 1", "max_connections_per_user = 0");
    eventually("the mistake is said", LONG, || site.log().contains("the settings stay as they are"));
    assert_eq!(alice.ssh("true").code, 255);
    site.change_setting("max_attempts = 3", "max_attempts = 5");
    site.change_setting("max_connections_per_user = 0", "max_connections_per_user = 50");
    eventually("the old limit holds again", LONG, || alice.ssh("true").code == 0);
    assert!(site.log().contains("holds from the next start only") && site.log().contains("job"));
    assert_eq!(session.child.try_wait().unwrap(), None, "who was there is there");
}
