//! People with a terminal and the real login room: its picker, and what is typed while a workspace starts.

use super::common::{Outcome, Site};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

const SOON: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn a_picker_nobody_is_at_gives_up() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    site.open_lobby().await;
    let ended = timeout(SOON, alice.ssh_with(&["-tt"], &[])).await.expect("it does not wait for ever").exits(2);
    let screen = ended.text();
    assert!(screen.contains("Which image?"), "{screen}");
    assert!(
        screen.contains("mlad: the input ended before image and slice were chosen; name them: ssh -o "),
        "{screen}"
    );
    // Who chooses before the end gets in.
    let chosen = timeout(SOON, alice.ssh_input(&["-tt"], &[], b"2\rexit 6\r")).await.unwrap().exits(6);
    assert!(chosen.text().contains("Which image? torch"), "{}", chosen.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_was_typed_ahead_runs_whole() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let lobby = site.open_lobby().await;
    lobby.open.send_replace(false);
    let mut shell = alice.start(&["-tt", "-o", "SetEnv=MLAD_IMAGE=base"], &[]);
    let mut screen = shell.stdout.take().unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("starting the container") {
        assert_ne!(timeout(SOON, screen.read_buf(&mut seen)).await.unwrap().unwrap(), 0, "{seen:?}");
    }
    // More than the pipe to the client holds, so that when it is written the server has some of it; much more than is
    // taken before the shell is there.
    const LINES: usize = 1500;
    let file = site.backend.agent.home().join("ran");
    let lines = (0..LINES).map(|number| format!("echo line {number} of the script >> {}\n", file.display()));
    let script: String = lines.chain(["exit 7\n".to_owned()]).collect();
    assert!(script.len() > 90_000);
    let mut keyboard = shell.stdin.take().unwrap();
    timeout(SOON, keyboard.write_all(script.as_bytes())).await.expect("the client takes it").unwrap();
    drop(keyboard);
    lobby.open.send_replace(true);
    let rest = async {
        let mut rest = Vec::new();
        let _ = screen.read_to_end(&mut rest).await;
        Outcome::from(shell.wait_with_output().await.unwrap())
    };
    timeout(SOON * 2, rest).await.expect("the script comes to its end").exits(7);
    let ran = std::fs::read_to_string(&file).unwrap();
    let expected: String = (0..LINES).map(|number| format!("line {number} of the script\n")).collect();
    assert!(ran == expected, "{} of {LINES} lines ran", ran.lines().count());
}
