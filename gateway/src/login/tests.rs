//! Whole logins on a terminal that remembers what it was sent.

use super::{Entered, Input, LoginEnd, Terminal, console::MAX_AHEAD, enter_silently, enter_with_terminal, error_line};
use crate::workspace::{
    Wish, WorkspaceError,
    tests::{Bench, eventually, wish, wish_for},
};
use async_trait::async_trait;
use mlad::{api::WorkspaceState, channel::PtySize};
use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{sync::mpsc, task::JoinHandle};

/// A terminal's far end.
struct Person {
    keys: Option<mpsc::UnboundedSender<Input>>,
    seen: Arc<Mutex<Vec<u8>>>,
}

struct FakeTerminal {
    keys: mpsc::UnboundedReceiver<Input>,
    /// Typed, and not taken yet.
    left: Vec<u8>,
    seen: Arc<Mutex<Vec<u8>>>,
    size: PtySize,
    term: &'static str,
}

fn terminal(term: &'static str, columns: u32) -> (Person, FakeTerminal) {
    let (sender, keys) = mpsc::unbounded_channel();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let size = PtySize { columns, rows: 24, width: 0, height: 0 };
    (Person { keys: Some(sender), seen: Arc::clone(&seen) }, FakeTerminal { keys, left: Vec::new(), seen, size, term })
}

#[async_trait]
impl Terminal for FakeTerminal {
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.seen.lock().unwrap().extend_from_slice(bytes);
        Ok(())
    }

    async fn read(&mut self, room: usize) -> io::Result<Option<Input>> {
        loop {
            if room == 0 && self.left.contains(&3) {
                return Ok(Some(Input::Interrupt));
            }
            if room > 0 && !self.left.is_empty() {
                return Ok(Some(Input::Bytes(self.left.drain(..room.min(self.left.len())).collect())));
            }
            match self.keys.recv().await {
                Some(Input::Bytes(bytes)) => self.left.extend(bytes),
                other => return Ok(other),
            }
        }
    }

    fn size(&self) -> PtySize {
        self.size
    }

    fn term(&self) -> &str {
        self.term
    }
}

impl Person {
    fn types(&self, bytes: &[u8]) {
        self.keys.as_ref().unwrap().send(Input::Bytes(bytes.to_vec())).unwrap();
    }

    fn resizes(&self, columns: u32) {
        let size = PtySize { columns, rows: 24, width: 0, height: 0 };
        self.keys.as_ref().unwrap().send(Input::Resize(size)).unwrap();
    }

    fn types_no_more(&self) {
        self.keys.as_ref().unwrap().send(Input::End).unwrap();
    }

    fn hangs_up(&mut self) {
        self.keys = None;
    }

    fn screen(&self) -> String {
        String::from_utf8(self.seen.lock().unwrap().clone()).unwrap()
    }

    async fn sees(&self, text: &str) {
        eventually(|| async { self.screen().contains(text).then_some(()) }).await;
    }
}

/// A login in a task of its own.
async fn log_in(
    bench: &Bench,
    user: &str,
    wish: Wish,
    mut terminal: FakeTerminal,
) -> JoinHandle<Result<Entered, LoginEnd>> {
    let (workspaces, user) = (bench.workspaces.clone(), bench.user(user).await);
    tokio::spawn(async move { enter_with_terminal(&mut terminal, &workspaces, &user, wish).await })
}

const GREETING: &str = "MLAD: alice, workspace default, image base\r\n\
                        GPU    1g.5gb, 4864 MiB, UUID …000000000001\r\n\
                        Quota  1 slice, 4864 MiB of GPU memory in use\r\n\
                        Queue  nobody waits for a slice\r\n\
                        Idle   stops 30 minutes after the last connection (`mlad workspace extend`)\r\n\
                        Help   `mlad help`; your files are in your home and stay\r\n";

#[tokio::test]
async fn with_defaults_there_is_a_line_while_it_starts_and_then_the_greeting() {
    let bench = Bench::new(1).await;
    bench.world.close("start");
    let (person, terminal) = terminal("xterm-256color", 80);
    let login = log_in(&bench, "alice", wish("default"), terminal).await;
    person.sees("starting the container, 0:00").await;
    bench.world.clock().advance(Duration::from_secs(1));
    person.sees("starting the container, 0:01").await;
    person.types(b"ls\r");
    bench.world.open("start");
    let entered = login.await.unwrap().ok().unwrap();
    assert_eq!(entered.typed, b"ls\r");
    assert_eq!(entered.attached.workload(), "w-1-1");
    let screen = person.screen();
    assert!(screen.starts_with("starting the container, 0:00\r\x1b[Jstarting the container, 0:0"), "{screen:?}");
    assert!(screen.ends_with(&format!("starting the container, 0:01\r\x1b[J{GREETING}")), "{screen:?}");
    // A second connection gets in without a word of waiting.
    let (person, terminal) = self::terminal("xterm", 80);
    log_in(&bench, "alice", wish("default"), terminal).await.await.unwrap().ok().unwrap();
    assert_eq!(person.screen(), GREETING);
}

#[tokio::test]
async fn a_picker_asks_what_nothing_says() {
    let bench = Bench::with(3, "idle_minutes = 30").await;
    let (person, terminal) = terminal("xterm", 80);
    let login = log_in(&bench, "alice", wish("default"), terminal).await;
    let help = "(arrows or a number, Enter; Ctrl-C gives up)";
    let images = format!(
        "Which image?  {help}\r\n> 1  base   Debian with Python\r\n  2  torch  PyTorch\r\n\
         \x20 3  far    Elsewhere (to be fetched first)\r\n  4  lost   Nowhere (to be fetched first)"
    );
    person.sees(&images).await;
    assert_eq!(person.screen(), images);
    // Down, then what comes later is typed ahead.
    person.types(b"\x1b[B");
    person.sees("> 2  torch").await;
    person.types(b"\rj\r");
    let entered = login.await.unwrap().ok().unwrap();
    assert_eq!((entered.attached.workspace().image.as_str(), entered.typed.as_slice()), ("torch", &b""[..]));
    assert_eq!(entered.attached.workspace().need.to_string(), "3g.20gb");
    let screen = person.screen();
    assert!(screen.contains("\r\x1b[4A\x1b[JWhich image? torch\r\n"), "{screen:?}");
    assert!(screen.contains("Which GPU slice? 3g.20gb\r\n"), "{screen:?}");
    // What was picked is remembered.
    let (person, terminal) = self::terminal("xterm", 80);
    log_in(&bench, "alice", wish("default"), terminal).await.await.unwrap().ok().unwrap();
    assert!(!person.screen().contains("Which"));
}

#[tokio::test]
async fn the_picker_of_slices_shows_what_is_free_and_what_the_image_can_use() {
    let bench = Bench::with(1, "idle_minutes = 30").await;
    let (first, terminal) = terminal("xterm", 80);
    let mut image_only = wish("default");
    image_only.image = Some("base".into());
    let login = log_in(&bench, "alice", image_only.clone(), terminal).await;
    let help = "(arrows or a number, Enter; Ctrl-C gives up)";
    first
        .sees(&format!(
            "Which GPU slice?  {help}\r\n\
             > 1  1g.5gb    4864 MiB  1 of 1 free\r\n\
             \x20 2  2g.10gb   9856 MiB  1 of 1 free\r\n\
             \x20 3  3g.20gb  19968 MiB  1 of 1 free\r\n\
             \x20 4  cpu         no GPU  always free"
        ))
        .await;
    first.types(b"1\r");
    let _alice = login.await.unwrap().ok().unwrap();
    let (second, terminal) = self::terminal("xterm", 80);
    image_only.image = Some("torch".into());
    let login = log_in(&bench, "bob", image_only, terminal).await;
    // torch needs 8000 MiB.
    second
        .sees(&format!(
            "Which GPU slice?  {help}\r\n\
             > 1  2g.10gb   9856 MiB  all in use: you would wait\r\n\
             \x20 2  3g.20gb  19968 MiB  all in use: you would wait"
        ))
        .await;
    second.types(b"\x03");
    assert!(matches!(login.await.unwrap().err(), Some(LoginEnd::GaveUp)));
    assert!(second.screen().ends_with("\r\x1b[2A\x1b[JGiven up.\r\n"), "{:?}", second.screen());
}

#[tokio::test]
async fn a_terminal_that_cannot_redraw_gets_plain_lines_and_only_changes() {
    let bench = Bench::with(1, "idle_minutes = 30").await;
    let _alice =
        crate::workspace::tests::ready(bench.enter("alice", wish_for("default", "base", "1g.5gb")).await.unwrap())
            .await
            .unwrap();
    let (person, terminal) = terminal("dumb", 80);
    let login = log_in(&bench, "bob", wish("default"), terminal).await;
    person.sees("Number, 1 to 4, and Enter: ").await;
    person.types(b"1");
    person.types(b"\r");
    person.sees("Which GPU slice?").await;
    person.types(b"2\r");
    person.sees("place 1 of 1").await;
    bench.world.clock().advance(Duration::from_secs(5));
    bench.world.bump();
    person.types(b"\x03");
    assert!(matches!(login.await.unwrap().err(), Some(LoginEnd::GaveUp)));
    assert_eq!(
        person.screen(),
        "Which image?  (arrows or a number, Enter; Ctrl-C gives up)\r\n\
         > 1  base   Debian with Python\r\n\
         \x20 2  torch  PyTorch\r\n\
         \x20 3  far    Elsewhere (to be fetched first)\r\n\
         \x20 4  lost   Nowhere (to be fetched first)\r\n\
         Number, 1 to 4, and Enter: 1\r\n\
         Which image? base\r\n\
         Which GPU slice?  (arrows or a number, Enter; Ctrl-C gives up)\r\n\
         > 1  1g.5gb    4864 MiB  all in use: you would wait\r\n\
         \x20 2  2g.10gb   9856 MiB  all in use: you would wait\r\n\
         \x20 3  3g.20gb  19968 MiB  all in use: you would wait\r\n\
         \x20 4  cpu         no GPU  always free\r\n\
         Number, 1 to 4, and Enter: 2\r\n\
         Which GPU slice? 2g.10gb\r\n\
         waiting for 2g.10gb: none is free, place 1 of 1 (Ctrl-C gives up)\r\n\
         Given up; the place in the queue is given back.\r\n"
    );
    bench.until_state("bob", WorkspaceState::Stopped).await;
}

#[tokio::test]
async fn who_waits_sees_reason_place_and_time_in_one_line() {
    let bench = Bench::new(1).await;
    let alice = bench.attach("alice").await;
    let _bob = bench.enter("bob", wish("default")).await.unwrap();
    bench.until_state("bob", WorkspaceState::Waiting).await;
    eventually(|| async { (bench.world.lock().queue.len() == 1).then_some(()) }).await;
    let (person, terminal) = terminal("xterm", 100);
    let login = log_in(&bench, "carol", wish("default"), terminal).await;
    let line = |reason, place: u32, of: u32, clock| {
        format!("waiting for 1g.5gb: {reason}, place {place} of {of}, {clock}, Ctrl-C gives up")
    };
    person.sees(&line("others came first", 2, 2, "0:00")).await;
    bench.world.clock().advance(Duration::from_secs(1));
    person.sees(&line("others came first", 2, 2, "0:01")).await;
    let screen = person.screen();
    let detail = "every slice is held\r\n";
    assert_eq!(screen.matches(detail).count(), 1, "{screen:?}");
    // Narrower: what was drawn stays where it is, the next line fits.
    person.resizes(30);
    person.sees("\r\x1b[J\r\nplace 2 of 2, 0:01").await;
    // The queue moves on.
    bench.workspaces.stop("alice", "default", "alice").await.unwrap();
    person.sees("place 1 of 1, 0:01").await;
    bench.workspaces.stop("bob", "default", "bob").await.unwrap();
    let entered = login.await.unwrap().ok().unwrap();
    assert_eq!(entered.attached.workload(), "w-3-1");
    drop(alice);
}

#[tokio::test]
async fn control_c_and_a_hang_up_give_the_place_back() {
    let bench = Bench::new(1).await;
    let _alice = bench.attach("alice").await;
    for hang_up in [false, true] {
        let (mut person, terminal) = terminal("xterm", 80);
        let login = log_in(&bench, "bob", wish("default"), terminal).await;
        person.sees("place 1 of 1").await;
        if hang_up {
            person.hangs_up()
        } else {
            person.types(b"xx\x03")
        }
        let end = login.await.unwrap().err().unwrap();
        match (hang_up, &end) {
            (false, LoginEnd::GaveUp) => {
                assert_eq!(end.exit_code(), 130);
                assert!(person.screen().ends_with("\r\x1b[JGiven up; the place in the queue is given back.\r\n"));
            }
            (true, LoginEnd::HungUp) => {}
            (_, other) => panic!("{other:?}"),
        }
        bench.until_state("bob", WorkspaceState::Stopped).await;
        assert!(bench.world.lock().queue.is_empty());
    }
}

#[tokio::test]
async fn what_is_typed_ahead_is_taken_up_to_a_limit_and_the_rest_is_left_where_it_is() {
    let bench = Bench::new(1).await;
    bench.world.close("start");
    let (person, mut terminal) = terminal("xterm", 80);
    let script: Vec<u8> = (0..3 * MAX_AHEAD).map(|at| b'a' + (at % 26) as u8).collect();
    let (workspaces, user) = (bench.workspaces.clone(), bench.user("alice").await);
    let login = enter_with_terminal(&mut terminal, &workspaces, &user, wish("default"));
    let typing = async {
        person.sees("starting").await;
        person.types(&script[..10]);
        person.types(&script[10..]);
        person.types_no_more();
        bench.world.open("start");
    };
    let typed = tokio::join!(login, typing).0.ok().unwrap().typed;
    assert!(typed.len() <= MAX_AHEAD);
    drop(person);
    let mut whole = typed;
    while let Some(input) = terminal.read(1000).await.unwrap() {
        match input {
            Input::Bytes(bytes) => whole.extend(bytes),
            other => assert_eq!(other, Input::End),
        }
    }
    assert!(whole == script, "{} of {} bytes", whole.len(), script.len());
}

#[tokio::test]
async fn control_c_gets_through_whatever_was_typed_ahead() {
    let bench = Bench::new(1).await;
    bench.world.close("start");
    let (person, terminal) = terminal("xterm", 80);
    let login = log_in(&bench, "alice", wish("default"), terminal).await;
    person.sees("starting").await;
    person.types(&[b'a'; 3 * MAX_AHEAD]);
    person.types(b"\x03");
    assert!(matches!(login.await.unwrap().err(), Some(LoginEnd::GaveUp)));
    bench.world.open("start");
}

#[tokio::test]
async fn a_picker_nobody_is_at_gives_up_and_says_what_to_do() {
    let bench = Bench::with(1, "idle_minutes = 30").await;
    for term in ["xterm", "dumb"] {
        let (person, terminal) = terminal(term, 80);
        person.types_no_more();
        let login = log_in(&bench, "alice", wish("default"), terminal).await;
        let end = login.await.unwrap().err().unwrap();
        assert_eq!((end.exit_code(), matches!(end, LoginEnd::NobodyChose)), (2, true));
        let screen = person.screen();
        let told = "\nmlad: the input ended before image and slice were chosen; name them: ssh -o SetEnv=";
        assert!(screen.contains(told) || screen.contains(&told.replace('\n', "\x1b[J")), "{screen:?}");
    }
    // What was typed before the end counts.
    let (person, terminal) = terminal("xterm", 80);
    person.types(b"1\r1\rexit\r");
    person.types_no_more();
    let entered = log_in(&bench, "alice", wish("default"), terminal).await.await.unwrap().ok().unwrap();
    assert_eq!((entered.attached.workspace().image.as_str(), entered.typed.as_slice()), ("base", &b"exit\r"[..]));
}

#[tokio::test]
async fn who_waits_may_have_said_all_they_have_to_say() {
    let bench = Bench::new(1).await;
    let alice = bench.attach("alice").await;
    let (person, terminal) = terminal("xterm", 80);
    person.types(b"train\r");
    person.types_no_more();
    let login = log_in(&bench, "bob", wish("default"), terminal).await;
    person.sees("place 1 of 1").await;
    drop(alice);
    bench.workspaces.stop("alice", "default", "alice").await.unwrap();
    assert_eq!(login.await.unwrap().ok().unwrap().typed, b"train\r");
}

#[tokio::test]
async fn an_error_is_told_with_what_to_do_next() {
    let bench = Bench::new(1).await;
    let (person, terminal) = terminal("xterm", 80);
    let login = log_in(&bench, "alice", wish_for("default", "b\x1b[31m", "1g.5gb"), terminal).await;
    let end = login.await.unwrap().err().unwrap();
    assert_eq!(end.exit_code(), 3);
    assert_eq!(
        person.screen(),
        "mlad: there is no image b[31m; there are: base, torch, far, lost; name another: ssh -o SetEnv=MLAD_IMAGE=IMAGE …\r\n"
    );
}

#[tokio::test]
async fn without_a_terminal_a_login_waits_so_long_and_no_longer() {
    let bench = Bench::new(1).await;
    let alice = bench.attach("alice").await;
    let (workspaces, bob) = (bench.workspaces.clone(), bench.user("bob").await);
    let limit = Duration::from_secs(60);
    let login = tokio::spawn(async move { enter_silently(&workspaces, &bob, wish("default"), limit).await });
    eventually(|| async { (bench.world.lock().queue.len() == 1).then_some(()) }).await;
    eventually(|| async { bench.get("bob").await.wait }).await;
    bench.pass_time(1).await;
    let error = login.await.unwrap().err().unwrap();
    assert!(matches!(error, WorkspaceError::Timeout { .. }), "{error}");
    assert_eq!(
        error_line(&error),
        "mlad: no slice within 60 seconds: waiting for 1g.5gb: none is free, place 1 of 1; \
         `mlad why` says what blocks it; `mlad submit` waits for you"
    );
    bench.until_state("bob", WorkspaceState::Stopped).await;
    drop(alice);
    bench.workspaces.stop("alice", "default", "alice").await.unwrap();
    let bob = bench.user("bob").await;
    let attached = enter_silently(&bench.workspaces, &bob, wish("default"), limit).await.unwrap();
    assert_eq!(attached.workload(), "w-2-2");
}
