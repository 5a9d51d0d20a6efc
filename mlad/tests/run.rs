//! `mlad run` and `mlad wait` as processes, against a gateway that does as it is told.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "all of it is tests"
)]

use rustix::process::{Pid, Signal, kill_process};
use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::Duration,
};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

/// What the one job of this gateway is, and what was asked about it.
struct State {
    job: &'static str,
    exit_code: Option<i32>,
    /// What a cancelled job comes to.
    when_cancelled: &'static str,
    /// Whether a submission is answered.
    accepts: bool,
    /// Whether the log never ends.
    endless: bool,
    calls: Vec<String>,
}

struct Gateway {
    _folder: TempDir,
    socket: PathBuf,
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Gateway {
    fn start(change: impl FnOnce(&mut State)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut state = State {
            job: "running",
            exit_code: None,
            when_cancelled: "cancelled",
            accepts: true,
            endless: false,
            calls: Vec::new(),
        };
        change(&mut state);
        let shared = Arc::new((Mutex::new(state), Condvar::new()));
        let served = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&served);
                // Whoever calls may go at any time.
                thread::spawn(move || drop(answer(stream.unwrap(), &shared)));
            }
        });
        Self { _folder: folder, socket, shared }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.0.lock().unwrap());
        self.shared.1.notify_all();
    }

    /// Waits until somebody has asked for this.
    fn called(&self, what: &str) {
        let calls = |state: &mut State| !state.calls.iter().any(|call| call.starts_with(what));
        let waited = self.shared.1.wait_timeout_while(self.shared.0.lock().unwrap(), PATIENCE, calls).unwrap();
        assert!(!waited.1.timed_out(), "{what} was never called: {:?}", waited.0.calls);
    }

    fn mlad(&self, arguments: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_mlad"))
            .arg(format!("--api=unix:{}", self.socket.display()))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

fn until(shared: &(Mutex<State>, Condvar), wanted: impl Fn(&State) -> bool) {
    drop(shared.1.wait_timeout_while(shared.0.lock().unwrap(), PATIENCE, |state| !wanted(state)).unwrap());
}

fn ended(state: &State) -> bool {
    ["succeeded", "failed", "cancelled"].contains(&state.job)
}

fn answer(mut stream: UnixStream, shared: &(Mutex<State>, Condvar)) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        head.push(line);
    }
    let call = head[0].trim_end().trim_end_matches(" HTTP/1.1").to_owned();
    shared.0.lock().unwrap().calls.push(call.clone());
    shared.1.notify_all();
    if call == "POST /v1/jobs" {
        until(shared, |state| state.accepts);
        return json(&mut stream, 201, r#"{"id": 1}"#);
    }
    if call.contains("/log?") {
        stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nline\n\r\n")?;
        while shared.0.lock().unwrap().endless {
            stream.write_all(b"5\r\nline\n\r\n")?;
        }
        until(shared, ended);
        return stream.write_all(b"6\r\nended\n\r\n0\r\n\r\n");
    }
    if call.contains("/wait?") {
        until(shared, |state| ended(state) || (call.contains("seen=") && !call.contains(state.job)));
    }
    if call.ends_with("/cancel") {
        let mut state = shared.0.lock().unwrap();
        if ended(&state) {
            return json(&mut stream, 409, r#"{"code": "conflict", "message": "it has ended"}"#);
        }
        state.job = state.when_cancelled;
        shared.1.notify_all();
    }
    let state = shared.0.lock().unwrap();
    let id = call.split('/').nth(3).unwrap().parse::<u32>().unwrap();
    let code = state.exit_code.map(|code| format!(r#""exit_code": {code},"#)).unwrap_or_default();
    let body = format!(
        r#"{{"id": {id}, "user": "alice", "name": "x", "state": "{}", "reason": "Exit", {code}
            "spec": {{"command": ["x"]}}, "submitted_at": "2026-01-01T00:00:00Z", "attempts": [], "directory": "/"}}"#,
        state.job
    );
    drop(state);
    json(&mut stream, 200, &body)
}

fn json(stream: &mut UnixStream, status: u16, body: &str) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn end(child: Child) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn the_output_of_a_job_that_runs_already_is_shown_before_it_ends() {
    let gateway = Gateway::start(|_| {});
    let mut child = gateway.mlad(&["run", "--", "x"]);
    let mut line = [0; 5];
    child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    gateway.change(|state| (state.job, state.exit_code) = ("succeeded", Some(0)));
    let (status, out, err) = end(child);
    assert_eq!((&line, status, out.as_str()), (b"line\n", Some(0), "ended\n"), "{err}");
}

#[test]
fn a_signal_cancels_the_job_and_its_last_words_are_shown() {
    for (sent, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let gateway = Gateway::start(|_| {});
        let child = gateway.mlad(&["run", "--", "x"]);
        gateway.called("GET /v1/jobs/1/log");
        signal(&child, sent);
        let (status, out, err) = end(child);
        assert_eq!((status, out.as_str()), (Some(code), "line\nended\n"), "{err}");
        assert!(err.contains("cancelling job 1"), "{err}");
    }
}

#[test]
fn a_signal_before_the_job_has_a_number_leaves_no_job() {
    let gateway = Gateway::start(|state| state.accepts = false);
    let child = gateway.mlad(&["run", "--", "x"]);
    gateway.called("POST /v1/jobs");
    signal(&child, Signal::INT);
    gateway.change(|state| state.accepts = true);
    let (status, _, err) = end(child);
    assert_eq!(status, Some(130), "{err}");
    gateway.called("POST /v1/jobs/1/cancel");
}

#[test]
fn a_signal_just_as_the_job_ends_gives_the_jobs_code() {
    // It ends by itself when it is to be cancelled.
    let gateway = Gateway::start(|state| (state.when_cancelled, state.exit_code) = ("failed", Some(7)));
    let child = gateway.mlad(&["run", "--", "x"]);
    gateway.called("GET /v1/jobs/1/log");
    signal(&child, Signal::INT);
    let (status, _, err) = end(child);
    assert_eq!(status, Some(7), "{err}");

    // It has ended, and only then is it to be cancelled.
    let gateway = Gateway::start(|state| (state.job, state.exit_code, state.accepts) = ("failed", Some(7), false));
    let child = gateway.mlad(&["run", "--", "x"]);
    gateway.called("POST /v1/jobs");
    signal(&child, Signal::INT);
    gateway.change(|state| state.accepts = true);
    let (status, _, err) = end(child);
    assert_eq!(status, Some(7), "{err}");
}

#[test]
fn a_reader_who_goes_ends_the_job() {
    let gateway = Gateway::start(|state| state.endless = true);
    let mut child = gateway.mlad(&["run", "--", "x"]);
    let mut line = [0; 5];
    child.stdout.take().unwrap().read_exact(&mut line).unwrap();
    gateway.called("POST /v1/jobs/1/cancel");
    let (status, _, err) = end(child);
    assert_eq!((status, err.as_str()), (Some(1), ""));
}

#[test]
fn json_is_one_document_whatever_was_asked_for() {
    let gateway = Gateway::start(|state| (state.job, state.exit_code) = ("failed", Some(3)));
    let document = |arguments: &[&str]| {
        let (status, out, err) = end(gateway.mlad(&[&["--json"], arguments].concat()));
        let document: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{err}"));
        (status, document)
    };
    let (status, job) = document(&["run", "--", "x"]);
    assert_eq!((status, &job["state"], &job["reason"]), (Some(3), &"failed".into(), &"Exit".into()));
    let (status, job) = document(&["wait", "1"]);
    assert_eq!((status, &job["id"]), (Some(3), &1.into()));
    let (status, jobs) = document(&["wait", "1", "2"]);
    assert_eq!((status, &jobs[0]["id"], &jobs[1]["id"]), (Some(3), &1.into(), &2.into()));
    let (status, jobs) = document(&["hold", "1", "2"]);
    assert_eq!((status, jobs.as_array().map(Vec::len)), (Some(0), Some(2)));
}
