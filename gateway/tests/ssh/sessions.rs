//! Sessions: what a person and their tools expect of an sshd.

use super::common::{Outcome, Site};
use mlad_gateway::ssh::Refusal;
use std::{process::Stdio, time::Duration};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};

fn noise(bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    rand::Rng::fill_bytes(&mut rand::rng(), &mut noise);
    noise
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_come_back_and_streams_stay_apart() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let codes = futures::future::join_all([0, 1, 7, 127, 128, 200, 254, 255].map(|code| {
        let alice = &alice;
        async move { (code, alice.ssh(&format!("exit {code}")).await.code) }
    }));
    for (wanted, code) in codes.await {
        assert_eq!(code, wanted);
    }
    let both = alice.ssh("echo out; echo err >&2").await.success();
    assert_eq!((both.text().as_str(), both.stderr.as_str()), ("out", "err\n"));
    // 255 is also what the client says of a connection that broke: it must have been told of a signal.
    let killed = alice.ssh_with(&["-v"], &["kill -TERM $$"]).await.exits(255);
    assert!(killed.stderr.contains("rtype exit-signal"), "{}", killed.stderr);
    assert!(!killed.stderr.contains("rtype exit-status"), "{}", killed.stderr);
    let late = alice.ssh("sh -c 'exec 1>&-; sleep 0.2; echo late >&2'; exit 5").await.exits(5);
    assert_eq!(late.stderr, "late\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_exit_code_comes_back_over_one_connection() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let control = format!("ControlPath={}", alice.path("control").display());
    let master = ["-o", &control, "-o", "ControlMaster=yes", "-N", "-f"];
    alice.ssh_command(&master, &[]).stdin(Stdio::null()).status().await.unwrap();
    for code in 0..=255 {
        assert_eq!(alice.ssh_with(&["-o", &control], &[&format!("exit {code}")]).await.code, code);
    }
    alice.ssh_with(&["-o", &control, "-O", "exit"], &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn standard_input_half_closes() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let counted = alice.ssh_input(&[], &["wc -c; echo done"], &noise(1_000_000)).await.success();
    assert_eq!(counted.text(), "1000000\ndone");
    assert_eq!(alice.ssh("cat; echo end").await.success().text(), "end");
    // A process that wants no input does not hold the rest up.
    let picky = alice.ssh_input(&[], &["head -c 3; exec 0<&-; sleep 0.1; echo x"], &noise(30_000_000)).await.success();
    assert_eq!(picky.stdout.len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_through_cat_comes_back_whole() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    // Ten windows' worth; a hundred megabytes are for the end-to-end tests.
    let input = noise(20_000_000);
    let back = alice.ssh_input(&[], &["cat"], &input).await.success();
    assert!(back.stdout == input, "{} bytes came back", back.stdout.len());
    let back = alice.ssh_input(&["-c", "aes256-ctr"], &["cat"], &input[..1_000_000]).await;
    assert_eq!(back.code, 255, "OpenSSH is offered AES-GCM alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_renewed_under_way() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let input = noise(20_000_000);
    let back = alice.ssh_input(&["-o", "RekeyLimit=256K"], &["cat"], &input).await.success();
    assert!(back.stdout == input, "{} bytes came back", back.stdout.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_environment_arrives_and_chooses_the_workspace() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let options = ["-o", "SetEnv=MLAD_IMAGE=pytorch MLAD_GPU=1g.5gb LANG=ko_KR.UTF-8 X_1=a", "-o", "User=mlad+two"];
    let shown = alice.ssh_with(&options, &["echo $MLAD_IMAGE $LANG $X_1; echo $SSH_CONNECTION"]).await.success();
    let lines: Vec<_> = shown.text().lines().map(str::to_owned).collect();
    assert_eq!(lines[0], "pytorch ko_KR.UTF-8 a");
    assert!(lines[1].ends_with(&format!("127.0.0.1 {}", site.address.port())), "{}", lines[1]);
    let wish = site.backend.wishes.lock().unwrap().pop().unwrap();
    assert_eq!((wish.name.as_str(), wish.image.as_deref()), ("two", Some("pytorch")));
    assert_eq!(wish.need, Some("1g.5gb".parse().unwrap()));
    let wrong = alice.ssh_with(&["-o", "SetEnv=MLAD_GPU=1x"], &["true"]).await.exits(2);
    assert!(wrong.stderr.starts_with("mlad: MLAD_GPU: "), "{}", wrong.stderr);
    assert_eq!(wrong.stdout, b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_its_size_and_its_changes() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    // `script` gives the client a terminal whose size can be changed from beside it.
    let ssh = format!("ssh -F {} -tt server", alice.path("config").display());
    let remote = "stty size; trap \"stty size; exit 9\" WINCH; echo ready; while :; do sleep 0.05; done";
    let command = format!(
        "stty rows 30 cols 100; (until grep -q ^ready \"$0\"; do sleep 0.05; done; stty rows 31 cols 101 </dev/tty) & \
         {ssh} {}; echo code $?",
        shell_quote(remote)
    );
    let log = alice.path("typescript");
    std::fs::write(&log, "").unwrap();
    let inner = format!("sh -c {} {}", shell_quote(&command), log.display());
    let mut script = tokio::process::Command::new("script");
    script.args(["-q", "-f", "-c", &inner]).arg(&log).stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true);
    let mut script = script.spawn().unwrap();
    let keyboard = script.stdin.take();
    let ended = tokio::time::timeout(Duration::from_secs(30), script.wait()).await;
    drop(keyboard);
    ended.unwrap_or_else(|_| panic!("{}", std::fs::read_to_string(&log).unwrap())).unwrap();
    let seen = std::fs::read_to_string(&log).unwrap();
    assert!(seen.contains("welcome") && seen.contains("30 100") && seen.contains("31 101"), "{seen}");
    assert!(seen.contains("code 9"), "{seen}");
}

fn shell_quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_takes_what_is_typed() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let mut shell = alice.start(&["-tt"], &["stty -echo; read line; echo got $line; tty >/dev/null && exit 4"]);
    let mut typed = shell.stdin.take().unwrap();
    typed.write_all(b"hello\n").await.unwrap();
    let outcome = Outcome::from(shell.wait_with_output().await.unwrap()).exits(4);
    assert!(outcome.text().contains("got hello"), "{outcome:?}");
    // Ctrl-C reaches the foreground process.
    let mut shell = alice.start(&["-tt"], &["trap 'exit 6' INT; echo up; while :; do sleep 0.05; done"]);
    let mut lines = BufReader::new(shell.stdout.take().unwrap()).lines();
    while !lines.next_line().await.unwrap().unwrap().contains("up") {}
    let mut typed = shell.stdin.take().unwrap();
    typed.write_all(&[3]).await.unwrap();
    assert_eq!(shell.wait().await.unwrap().code(), Some(6));
}

#[tokio::test(flavor = "multi_thread")]
async fn output_nobody_reads_waits_and_nothing_is_lost() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    for options in [&[][..], &["-tt"]] {
        let mut stalled = alice.start(options, &["yes"]);
        let mut out = stalled.stdout.take().unwrap();
        assert_eq!(alice.ssh("echo other").await.success().text(), "other");
        let mut some = vec![0; 20_000_000];
        out.read_exact(&mut some).await.unwrap();
        stalled.kill().await.unwrap();
    }
    assert_eq!(alice.ssh("yes | head -c 50000000 | wc -c").await.success().text(), "50000000");
    assert_eq!(alice.ssh("yes | head -1").await.success().text(), "y");
}

#[tokio::test(flavor = "multi_thread")]
async fn mlad_and_scp_and_sftp_need_no_workspace() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let called = alice.ssh_input(&[], &["mlad run -- 'a b' \"c\""], b"input").await.exits(3);
    assert_eq!(called.text(), "alice\nrun\n--\na b\nc\ninput");
    let file = site.path("file");
    std::fs::write(&file, noise(5_000_000)).unwrap();
    for (flag, copy) in [("-O", "old"), ("-s", "new")] {
        let copy = site.path(copy);
        let mut scp = alice.command("scp");
        scp.arg(flag).arg(&file).arg(format!("server:{}", copy.display()));
        let copied = scp.output().await.unwrap();
        assert!(copied.status.success(), "{copied:?}");
        assert!(std::fs::read(&copy).unwrap() == std::fs::read(&file).unwrap());
    }
    assert!(site.backend.wishes.lock().unwrap().is_empty());
    // What needs a shell runs in the workspace.
    assert_eq!(alice.ssh("echo mlad ps | cat").await.success().text(), "mlad ps");
    assert_eq!(site.backend.wishes.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_gives_up_gives_the_place_back() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    site.backend.ready.send_replace(false);
    let mut waiting = alice.start(&[], &["true"]);
    let wishes = &site.backend.wishes;
    while wishes.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    waiting.kill().await.unwrap();
    let given_up = &site.backend.given_up;
    let all = async {
        while *given_up.lock().unwrap() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), all).await.unwrap();
    site.backend.ready.send_replace(true);
    alice.ssh("true").await.success();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_gets_no_workspace_is_told_on_standard_error() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let refusal = Refusal { lines: vec!["no slice is free".into(), "try again later".into()], exit_status: 75 };
    *site.backend.refusal.lock().unwrap() = Some(refusal);
    let told = alice.ssh("true").await.exits(75);
    assert_eq!((told.stdout.len(), told.stderr.as_str()), (0, "mlad: no slice is free\nmlad: try again later\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_that_ends_says_why() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let mut session = alice.start(&[], &["echo up; sleep 1000"]);
    let mut lines = BufReader::new(session.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().unwrap(), "up");
    site.backend.ended.cancel();
    site.backend.agent.kill();
    let outcome = Outcome::from(session.wait_with_output().await.unwrap()).exits(255);
    assert_eq!(outcome.stderr, "mlad: your workspace has ended: stopped by a test\n");
}
