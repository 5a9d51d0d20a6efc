//! Sessions: commands, shells, terminals, and the bytes between.

use crate::harness::{Agent, exec, is_root, process_exists, soon, until, user_id};
use bytes::Bytes;
use mlad::channel::{Exit, Frame, PtySize, Request};
use std::{
    io::{Read as _, Write as _},
    os::fd::OwnedFd,
};

#[tokio::test]
async fn a_command_gives_its_output_and_its_exit_code() {
    let agent = Agent::start().await;
    let outcome = agent.run("echo out; echo err >&2; exit 7").await;
    assert_eq!(outcome.stdout, b"out\n");
    assert_eq!(outcome.stderr, b"err\n");
    assert_eq!(outcome.exit, Exit::Status(7));
}

#[tokio::test]
async fn a_command_runs_as_the_user_with_nothing_left_of_root() {
    let agent = Agent::start().await;
    let outcome =
        agent.run("id -u; id -g; id -G; umask; pwd; grep -E '^(Cap(Eff|Prm)|SigBlk|SigIgn)' /proc/self/status").await;
    let id = user_id();
    let home = agent.path("home");
    let mut lines = outcome.text().lines();
    assert_eq!(lines.next(), Some(&*id.to_string()));
    assert_eq!(lines.next(), Some(&*id.to_string()));
    if is_root() {
        assert_eq!(lines.next(), Some(&*id.to_string()), "no supplementary groups");
    } else {
        lines.next();
    }
    assert_eq!(lines.next(), Some("0022"));
    assert_eq!(lines.next(), home.to_str());
    for line in lines {
        // glibc's posix_spawn leaves its own two signals, 32 and 33, ignored; it handles them itself again.
        let bits = u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap();
        assert_eq!(bits & !(0b11 << 31), 0, "{line}");
    }
}

#[tokio::test]
async fn the_environment_is_the_images_the_workloads_the_clients_and_the_accounts() {
    let agent = Agent::builder()
        .image_variable("CUDA_VERSION", "12.4")
        .image_variable("HOME", "/root")
        .image_variable("TERM", "dumb")
        .start()
        .await;
    let mut session = agent.session().await;
    session.env("LANG", "ko_KR.UTF-8").await;
    session.env("USER", "root").await;
    session.exec("env").await;
    let outcome = session.outcome().await;
    let home = agent.path("home");
    for line in [
        "CUDA_VERSION=12.4",
        "MLAD_WORKLOAD=w-test",
        "LANG=ko_KR.UTF-8",
        "USER=kim",
        "LOGNAME=kim",
        &format!("HOME={}", home.display()),
        "PATH=/usr/local/bin:/usr/bin:/bin",
    ] {
        assert!(outcome.text().lines().any(|known| known == line), "{line} in {}", outcome.text());
    }
    assert!(!outcome.text().contains("TERM="));
    let passwd = std::fs::read_to_string(agent.path("etc/passwd")).unwrap();
    assert!(passwd.ends_with(&format!("kim:x:{id}:{id}::{}:/bin/bash\n", home.display(), id = user_id())), "{passwd}");
}

#[tokio::test]
async fn a_signal_ends_a_command_and_is_named() {
    let agent = Agent::start().await;
    let outcome = agent.run("kill -TERM $$").await;
    assert!(matches!(outcome.exit, Exit::Signal { ref name, .. } if name == "TERM"), "{:?}", outcome.exit);
    let mut session = agent.session().await;
    session.exec("trap 'echo got; exit 3' USR1; echo ready; while :; do sleep 0.01; done").await;
    session.expect("ready").await;
    session.send(&Frame::Request(Request::Signal { name: "NONSENSE".into() })).await;
    session.send(&Frame::Request(Request::Signal { name: "USR1".into() })).await;
    let outcome = session.outcome().await;
    assert_eq!((outcome.text(), outcome.exit.clone()), ("got\n", Exit::Status(3)));
}

#[tokio::test]
async fn standard_input_half_closes() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    session.exec("cat; echo end").await;
    session.input(b"in ").await;
    session.send(&Frame::Eof).await;
    assert_eq!(session.outcome().await.text(), "in end\n");
}

/// 100 MB through `cat` in the gateway's own pipes.
#[tokio::test]
async fn descriptors_carry_every_byte() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    let (child_in, mut to_child) = std::io::pipe().unwrap();
    let (mut from_child, child_out) = std::io::pipe().unwrap();
    let (mut errors, child_err) = std::io::pipe().unwrap();
    let descriptors: [OwnedFd; 3] = [child_in.into(), child_out.into(), child_err.into()];
    session.request_with(exec("cat; echo done >&2; exit 5"), &descriptors).await.unwrap();
    drop(descriptors);
    let writer = std::thread::spawn(move || (0..1600).for_each(|n| to_child.write_all(block(n)).unwrap()));
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        for n in 0..1600 {
            from_child.read_exact(&mut buffer).unwrap();
            assert!(buffer == block(n), "block {n}");
        }
        from_child.read(&mut buffer).unwrap()
    });
    let copied = tokio::task::spawn_blocking(|| (writer.join(), reader.join()));
    let (written, end) = tokio::time::timeout(std::time::Duration::from_secs(120), copied).await.unwrap().unwrap();
    written.unwrap();
    assert_eq!(session.read().await, Frame::Exit(Exit::Status(5)));
    assert_eq!(end.unwrap(), 0, "the end of the pipe: the agent keeps no copy");
    let mut text = String::new();
    errors.read_to_string(&mut text).unwrap();
    assert_eq!(text, "done\n");
}

/// 64 KiB that differ from block to block, all bytes below 0x03 among them. Cheap, since there are many.
fn block(n: usize) -> &'static [u8] {
    static PATTERN: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    let pattern = PATTERN.get_or_init(|| (0..131_072usize).map(|i| ((i * 31 + (i >> 8) * 7) % 251) as u8).collect());
    &pattern[(n * 97) % 65_536..][..65_536]
}

#[tokio::test]
async fn frames_carry_every_byte_in_both_directions_within_the_window() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    session.exec("cat").await;
    let total = 1600 * 65_536usize;
    let (mut sent, mut received) = (0usize, 0usize);
    let (mut out, mut back) = (Bytes::new(), bytes::BytesMut::new());
    let mut window = session.window;
    let mlad::channel::Connection { mut reader, mut writer } = session.connection;
    let (grants, mut granted) = tokio::sync::mpsc::unbounded_channel();
    let send = async {
        while sent < total {
            if out.is_empty() {
                out = Bytes::from_static(block(sent / 65_536));
            }
            while window == 0 {
                window += granted.recv().await.unwrap();
            }
            let count = out.len().min(window);
            writer.write(&Frame::Data(out.split_to(count))).await.unwrap();
            (window, sent) = (window - count, sent + count);
        }
        writer.write(&Frame::Eof).await.unwrap();
    };
    let receive = async {
        loop {
            match reader.read().await.unwrap().unwrap() {
                Frame::WindowAdjust { bytes } => grants.send(bytes as usize).unwrap_or(()),
                Frame::Data(bytes) => {
                    back.extend_from_slice(&bytes);
                    while back.len() >= 65_536 {
                        assert!(back.split_to(65_536) == block(received / 65_536), "at {received}");
                        received += 65_536;
                    }
                }
                Frame::Eof => {}
                Frame::Exit(exit) => break assert_eq!(exit, Exit::Status(0)),
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(120), async { tokio::join!(send, receive) }).await.unwrap();
    assert_eq!(received, total);
}

#[tokio::test]
async fn a_login_shell_on_a_terminal() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    session.pty().await;
    session.request(Request::Shell).await.unwrap();
    session.input(b"echo $0:$TERM:$(tty):$SSH_TTY; stty size; exit 9\n").await;
    let outcome = session.outcome().await;
    let text = String::from_utf8_lossy(&outcome.stdout).into_owned();
    assert!(text.contains("-bash:xterm:/dev/pts/"), "{text}");
    assert!(text.contains("24 80"), "{text}");
    assert_eq!(outcome.exit, Exit::Status(9));
}

#[tokio::test]
async fn modes_are_set_before_the_command_starts() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    let modes = Bytes::from_static(&[53, 0, 0, 0, 0, 72, 0, 0, 0, 0, 3, 0, 0, 0, 8, 0]);
    let size = PtySize { columns: 100, rows: 40, width: 0, height: 0 };
    session.request(Request::Pty { term: "vt100".into(), size, modes }).await.unwrap();
    session.exec("stty -a; ls -ln $SSH_TTY").await;
    let outcome = session.outcome().await;
    for setting in ["-echo ", "-onlcr", "erase = ^H", "rows 40; columns 100"] {
        assert!(outcome.text().contains(setting), "{setting} in {}", outcome.text());
    }
    assert!(outcome.text().contains(&format!("crw--w---- 1 {} ", user_id())), "{}", outcome.text());
}

#[tokio::test]
async fn a_storm_of_window_changes_ends_with_the_last() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    session.pty().await;
    let change = |columns| Frame::Request(Request::WindowChange(PtySize { columns, rows: 50, width: 0, height: 0 }));
    session.send(&change(81)).await;
    session.exec("trap 'changed=1' WINCH; stty size; echo ready; while read line; do stty size; done").await;
    session.expect("ready").await;
    for columns in 100..1100 {
        session.send(&change(columns)).await;
    }
    session.input(b"go\n").await;
    session.expect("50 1099").await;
}

#[tokio::test]
async fn a_terminal_passes_low_bytes_and_a_big_paste() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    session.pty().await;
    session.exec("stty raw -echo; echo ready; head -c 1000000 | sha256sum; head -c 3 | od -An -tx1").await;
    session.expect("ready").await;
    let paste: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
    let mut rest = &paste[..];
    while !rest.is_empty() {
        while session.window == 0 {
            let Ok(Some(Frame::WindowAdjust { bytes })) = soon(session.connection.reader.read()).await else {
                panic!()
            };
            session.window += bytes as usize;
        }
        let (now, later) = rest.split_at(rest.len().min(session.window).min(10_000));
        session.input(now).await;
        session.window -= now.len();
        rest = later;
    }
    session.input(&[0, 1, 2]).await;
    let outcome = session.outcome().await;
    let digest = {
        use sha2::Digest as _;
        data_encoding::HEXLOWER.encode(&sha2::Sha256::digest(&paste))
    };
    assert!(outcome.text().contains(&digest), "{}", outcome.text());
    assert!(outcome.text().contains("00 01 02"), "{}", outcome.text());
}

/// The window full of input nobody reads: a window change, a signal and a close come through all the same.
#[tokio::test]
async fn control_overtakes_input_that_is_not_taken() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    session.pty().await;
    session.exec("stty raw -echo; trap 'stty size' WINCH; trap 'echo hup; exit 4' USR1; echo ready; while :; do sleep 0.01; done").await;
    session.expect("ready").await;
    for _ in 0..8 {
        session.input(&[b'x'; 32 * 1024]).await;
    }
    let size = PtySize { columns: 77, rows: 33, width: 0, height: 0 };
    session.send(&Frame::Request(Request::WindowChange(size))).await;
    session.expect("33 77").await;
    session.send(&Frame::Request(Request::Signal { name: "USR1".into() })).await;
    session.expect("hup").await;
}

/// A terminal that is gone says "try again" to whoever writes: that must not become a loop.
#[tokio::test]
async fn input_to_a_terminal_that_is_gone_costs_nothing() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    session.pty().await;
    session.exec("stty raw -echo; echo ready; sleep 0.2").await;
    session.expect("ready").await;
    for _ in 0..8 {
        session.input(&[b'x'; 32 * 1024]).await;
    }
    session.outcome().await;
    let before = agent.cpu_time();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(agent.cpu_time() - before < 10, "hundredths of a second");
}

#[tokio::test]
async fn close_overtakes_input_that_is_not_taken() {
    let agent = Agent::start().await;
    for pty in [false, true] {
        let mut session = agent.session().await;
        if pty {
            session.pty().await;
        }
        session.exec("echo $$; exec sleep 1000").await;
        let pid = session.expect("\n").await;
        for _ in 0..8 {
            session.input(&[b'x'; 32 * 1024]).await;
        }
        session.send(&Frame::Close).await;
        until("the hang-up", || !process_exists(&pid)).await;
    }
}

/// A lost connection hangs the terminal up; without one, a command runs on, as with sshd.
#[tokio::test]
async fn a_lost_connection_ends_terminals_only() {
    let agent = Agent::start().await;
    let mut with = agent.session().await;
    with.pty().await;
    with.exec("echo $$; exec sleep 1000").await;
    let with_terminal = with.expect("\n").await;
    let mut without = agent.session().await;
    without.exec("echo $$; exec sleep 1000").await;
    let without_terminal = without.expect("\n").await;
    drop((with, without));
    until("the hang-up", || !process_exists(&with_terminal)).await;
    assert!(process_exists(&without_terminal));
    agent.run(&format!("kill {without_terminal}")).await;
}

#[tokio::test]
async fn a_session_that_stalls_does_not_hold_up_another() {
    let agent = Agent::start().await;
    let mut stalled = agent.session().await;
    stalled.exec("yes").await;
    let mut asleep = agent.session().await;
    asleep.exec("sleep 1000").await;
    for _ in 0..8 {
        asleep.input(&[b'x'; 32 * 1024]).await;
    }
    assert_eq!(agent.run("echo quick").await.text(), "quick\n");
}

#[tokio::test]
async fn a_terminal_ends_with_its_leader_and_loses_nothing() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    session.pty().await;
    session.exec("stty -onlcr; (trap '' HUP; exec sleep 1000) & echo pid $!; seq 1 100000").await;
    let outcome = session.outcome().await;
    let text = outcome.text();
    assert!(text.ends_with("99999\n100000\n"), "{:?}", &text[text.len().saturating_sub(100)..]);
    assert_eq!(text.lines().filter(|line| line.parse::<u32>().is_ok()).count(), 100_000);
    let pid = text.lines().find_map(|line| line.strip_prefix("pid ")).unwrap();
    assert!(process_exists(pid));
    agent.run(&format!("kill -9 {pid}")).await;
}

#[tokio::test]
async fn pipes_end_when_the_background_has_closed_them() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    agent.run("mkfifo fifo").await;
    session.exec("(read line < fifo; echo later) & exit 6").await;
    agent.run("echo go > fifo").await;
    let outcome = session.outcome().await;
    assert_eq!((outcome.text(), outcome.exit.clone()), ("later\n", Exit::Status(6)));
}

#[tokio::test]
async fn each_session_leads_its_own_and_inherits_no_descriptor() {
    let agent = Agent::start().await;
    let outcome = agent.run("ps -o sid=,pgid= -p $$ | xargs; echo $$; ls /proc/self/fd | xargs").await;
    let lines: Vec<&str> = outcome.text().lines().collect();
    assert_eq!(lines[0], format!("{0} {0}", lines[1]));
    // 3 is the folder ls reads. Others can only be what the test was started with.
    for descriptor in lines[2].split(' ').filter(|number| number.parse::<u32>().unwrap() > 3) {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).expect("it is the test's");
        assert_eq!(u32::from_str_radix(flags.trim(), 8).unwrap() & 0o2_000_000, 0, "{descriptor} is the test's");
    }
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_a_reason() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    let subsystem = session.request(Request::Subsystem { name: "sftp".into() }).await.unwrap_err();
    assert!(subsystem.contains("subsystem"), "{subsystem}");
    session.pty().await;
    let size = PtySize::default();
    let again = Request::Pty { term: String::new(), size, modes: Bytes::new() };
    assert!(session.request(again).await.is_err());
    let (one, _) = std::io::pipe().unwrap();
    let mut other = agent.session().await;
    assert!(other.request_with(exec("true"), &[one.into()]).await.is_err());
    session.exec("cat").await;
    assert!(session.request(Request::Shell).await.is_err());
}

#[tokio::test]
async fn a_home_that_is_gone_does_not_keep_anybody_out() {
    let agent = Agent::start().await;
    std::fs::remove_dir(agent.path("home")).unwrap();
    let outcome = agent.run("pwd").await;
    assert_eq!(outcome.text(), "/\n");
    assert!(outcome.error().contains("home"), "{}", outcome.error());
}

#[tokio::test]
async fn a_home_nobody_mounted_is_made() {
    let builder = Agent::builder();
    let home = builder.path("home/new/kim");
    let agent = builder.change(|config| config.home = home.clone()).start().await;
    let outcome = agent.run("pwd; touch file; stat -c '%a %u %g' .").await;
    assert_eq!(outcome.text(), format!("{}\n700 {id} {id}\n", home.display(), id = user_id()));
}

/// `/etc/profile` of Debian sets `PATH` anew; the image's own comes back.
#[tokio::test]
async fn login_shells_keep_the_images_path() {
    let agent = Agent::builder().image_variable("PATH", "/opt/it's conda/bin:/usr/bin:/bin").start().await;
    let script = agent.path("etc/profile.d/00-mlad.sh");
    let outcome = agent.run(&format!("PATH=/bin; . {}; echo \"$PATH\"", script.display())).await;
    assert_eq!(outcome.text(), "/opt/it's conda/bin:/usr/bin:/bin\n");
}

#[tokio::test]
async fn many_at_once_get_their_own_answers() {
    let agent = Agent::start().await;
    let commands = (0..60).map(|n| {
        let agent = &agent;
        async move {
            let outcome = agent.run(&format!("echo {n}; exit {n}")).await;
            assert_eq!((outcome.text(), outcome.exit.clone()), (&*format!("{n}\n"), Exit::Status(n)));
        }
    });
    futures::future::join_all(commands).await;
}
