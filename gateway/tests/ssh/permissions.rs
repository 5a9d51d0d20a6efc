//! What users and members of projects may forward.

use super::{
    common::{Person, Site, free_port, until},
    forwarding::{dial, nobody_listens, talk, tcp_service},
};
use mlad::api::{Forwarding, NewProject};
use std::process::Stdio;

const ALL: Forwarding = Forwarding { local: true, remote: true, agent: true, x11: true };

/// Whether somebody reaches into their workspace, listens there, and has their key agent there.
async fn may(site: &Site, person: &Person, service: u16) -> (bool, bool, bool) {
    let through = format!("127.0.0.1:{service}");
    let local = person.ssh_input(&["-W", &through], &[], b"word").await;
    let back = format!("{}:localhost:{service}", site.backend.agent.home().join("back.sock").display());
    let remote = person.ssh_with(&["-o", "LogLevel=INFO", "-R", &back], &["rm -f back.sock"]).await.success();
    let socket = person.path("agent.sock");
    let agent = person
        .ssh_command(&["-A"], &["ssh-add -l"])
        .env("SSH_AUTH_SOCK", &socket)
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let listed = String::from_utf8_lossy(&agent.stdout).contains("a key (ED25519)");
    (local.text() == "WORD", !remote.stderr.contains("remote port forwarding failed"), listed)
}

/// A key agent with the person's key.
async fn key_agent(person: &Person) -> tokio::process::Child {
    let socket = person.path("agent.sock");
    let mut command = tokio::process::Command::new("ssh-agent");
    let agent = command.arg("-D").arg("-a").arg(&socket).stdout(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    until("the key agent", || std::os::unix::net::UnixStream::connect(&socket).is_ok()).await;
    let added = std::process::Command::new("ssh-add")
        .arg("-q")
        .arg(person.path("id_ed25519"))
        .env("SSH_AUTH_SOCK", &socket)
        .status();
    assert!(added.unwrap().success());
    agent
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_be_forwarded_is_the_users_and_their_projects() {
    let site = Site::start().await;
    let (alice, bob) = (site.person("alice").await, site.person("bob").await);
    let user = site.store.user_by_name("alice").await.unwrap();
    let service = tcp_service().await;
    let (_hers, _his) = (key_agent(&alice).await, key_agent(&bob).await);
    assert_eq!(may(&site, &alice, service).await, (true, true, true));
    for (policy, expected) in [
        (Forwarding { local: false, ..ALL }, (false, true, true)),
        (Forwarding { remote: false, ..ALL }, (true, false, true)),
        (Forwarding { agent: false, ..ALL }, (true, true, false)),
    ] {
        site.store.set_user_forwarding(user.id, policy).await.unwrap();
        assert_eq!(may(&site, &alice, service).await, expected, "{policy:?}");
    }
    let project = site.store.add_project(&NewProject { name: "secret".into(), parent: None }).await.unwrap();
    site.store.set_project_forwarding(project.id, Forwarding { local: false, remote: false, ..ALL }).await.unwrap();
    site.store.add_member("secret", user.id).await.unwrap();
    assert_eq!(may(&site, &alice, service).await, (false, false, false));
    assert_eq!(may(&site, &bob, service).await, (true, true, true));
    site.store.remove_member("secret", user.id).await.unwrap();
    site.store.set_user_forwarding(user.id, ALL).await.unwrap();
    assert_eq!(may(&site, &alice, service).await, (true, true, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_not_be_any_more_ends_and_the_connection_stays() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let user = site.store.user_by_name("alice").await.unwrap();
    let (service, there, here) = (tcp_service().await, free_port(), free_port());
    let (remote, local) = (format!("{there}:localhost:{service}"), format!("{here}:localhost:{service}"));
    let mut ssh = alice.start(&["-N", "-R", &remote, "-L", &local], &[]);
    assert_eq!(talk(dial(there).await).await, "HELLO");
    assert_eq!(talk(dial(here).await).await, "HELLO");
    site.store.set_user_forwarding(user.id, Forwarding { remote: false, ..ALL }).await.unwrap();
    nobody_listens(there).await;
    assert_eq!(talk(dial(here).await).await, "HELLO");
    assert!(ssh.try_wait().unwrap().is_none());
}
