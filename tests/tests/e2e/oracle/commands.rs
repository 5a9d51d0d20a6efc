//! Commands and shells by the OpenSSH client: words, variables, input and output, exit codes, terminals.

use super::{Both, Seen, seen, ssh};
use mlad_tests::{Outcome, Site};
use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, process::Command};

/// Commands whose outcome is compared without a terminal and on one.
const ON_BOTH: &[&str] = &[
    "true",
    "exit 255",
    "echo out; echo err >&2; exit 3",
    "kill -KILL $$",
    "kill -TERM $$",
    "kill -SEGV $$",
    "exec kill -HUP $$",
    "no-such-command",
    "/etc/passwd",
    "cd /nowhere && true",
    "printf 'a\\000b\\377\\r\\n'",
    "printf '%s|' \"a  b\" 'c\"d' e\\ f $((1+2)) `echo x`; echo \"$HOME\" '$HOME' \\$HOME ~",
    "echo first\necho second; exit 5",
    "echo 안녕 | od -c",
    "umask; pwd; id; echo $USER $LOGNAME $HOME $SHELL $PATH $LANG $SHLVL $0 $-; ulimit -s -c -f",
    // (Above 31 are signals of the C library's own, which its way to start a program ignores.)
    "grep -E '^(SigBlk|CapEff)' /proc/self/status; echo $(( 0x$(sed -n 's/^SigIgn:.//p' /proc/self/status) & 0x7fffffff ))",
    "echo $(( $$ == $(ps -o sid= -p $$) )) $(( $$ == $(ps -o pgid= -p $$) ))",
    "set | grep -c '^SSH_CONNECTION'; echo ${SSH_CLIENT:+set} ${SSH_TTY:+set} ${TERM:-none} ${SSH_ORIGINAL_COMMAND:-none}",
    "ls /proc/self/fd | wc -l",
    "exec 1>&- 2>&-; exit 7",
    "nohup sh -c 'sleep 1; echo done > late' > /dev/null 2>&1 < /dev/null & exit 4",
    "head -c 300000 /dev/zero | tr '\\0' x",
    "for n in 1 2 3; do echo $n; echo e$n >&2; done; exit 2",
];

/// Commands with what they are given on standard input.
const WITH_INPUT: &[(&str, &[u8])] = &[
    ("wc -c; echo after", b"12345"),
    ("cat", b""),
    ("cat; echo err >&2; exit 9", b"\0\xff\r\n"),
    ("true", &[b'x'; 1_000_000]),
    ("head -c 3; exit 6", &[b'y'; 1_000_000]),
    ("exec 0<&-; sleep 0.3; echo closed", b"unread"),
    ("sha256sum", &[b'z'; 5_000_000]),
    ("exec 1>&-; sleep 0.3; echo err >&2; exit 3", b""),
    ("exec 2>&-; cat; exit 8", b"in"),
    ("(sleep 0.5; echo late) & exit 4", b""),
    ("(sleep 0.5; echo late >&2) & kill -KILL $$", b""),
    ("yes | head -1", b""),
    ("bash -s a b", b"echo $1 $2; exit 11\n"),
    ("sh", b"read line; echo got $line\nthe line\nexit 12\n"),
];

#[test]
fn commands_end_as_with_sshd() {
    let site = Site::start();
    let both = Both::new(&site);
    for command in ON_BOTH {
        both.case(command, |person| seen(ssh(person, &[], &[command]), b""));
        let terminal = format!("on a terminal: {command}");
        both.case(&terminal, |person| seen(ssh(person, &["-tt"], &[command]), b""));
    }
    for (command, input) in WITH_INPUT {
        both.case(&format!("with input: {command}"), |person| seen(ssh(person, &[], &[command]), input));
    }
    both.case("words are joined", |person| seen(ssh(person, &[], &["printf", "%s|", "a b", "'c  d'", ""]), b""));
    both.case("bytes that are no text", |person| {
        let mut command = ssh(person, &[], &["printf %s"]);
        command.arg(OsStr::from_bytes(b"'\xff\xfe\x80\x01\x7f' | od -c"));
        seen(command, b"")
    });
    for kilobytes in [100, 130, 190] {
        both.case(&format!("a command of {kilobytes} kB"), |person| {
            let words = vec!["x".repeat(10_000); kilobytes / 10];
            let words: Vec<&str> = ["echo"].into_iter().chain(words.iter().map(String::as_str)).collect();
            seen(ssh(person, &[], &words), b"")
        });
    }
    for set in ["A=1", "LC_ALL=ko_KR.UTF-8", "A='q \"d\" $x' B=2", "EMPTY=", "TERM=dumb", "HOME=/tmp USER=root"] {
        let option = format!("SetEnv=LANG=C {set}");
        for options in [vec!["-o", &option], vec!["-o", &option, "-tt"]] {
            both.case(&format!("{options:?}"), |person| {
                let report = "echo \"[$A][$B][${EMPTY-unset}][$LANG][$LC_ALL][$HOME][$USER][$TERM]\"; date -d @0 +%A";
                seen(ssh(person, &options, &[report]), b"")
            });
        }
    }
    both.case("a shell without a terminal", |person| {
        seen(ssh(person, &[], &[]), b"echo $0 $-; shopt -q login_shell && echo login; exit 13\n")
    });
    both.case("-T", |person| seen(ssh(person, &["-T"], &[]), b"tty; exit 14\n"));
    both.case("-n", |person| seen(ssh(person, &["-n"], &["cat"]), b"unread"));
    both.case("a subsystem that is not there", |person| seen(ssh(person, &["-s"], &["nothing"]), b""));
    both.case("no new privileges", |person| seen(ssh(person, &[], &["grep NoNewPrivs /proc/self/status"]), b""));
    both.case("a client that has closed its output", |person| {
        let line = format!("{} server 'yes | head -c 30000000' | head -c 1", person.ssh_words());
        Seen::from(Outcome::of(Command::new("bash").args(["-c", &format!("{line}; echo ${{PIPESTATUS[0]}}")])))
    });
    both.case("nothing runs on", |person| {
        mlad_tests::eventually("yes is gone", super::SOON, || person.ssh("pgrep -x yes; true").text().is_empty());
    });
    both.case("what was left behind", |person| {
        mlad_tests::eventually("the late file", super::SOON, || person.ssh("cat late").text() == "done");
        Seen::from(person.ssh("find . \\( -name .ssh -o -name .mlad -o -name .bashrc -o -name .profile \\) -prune -o -type f -printf '%p %m %s\\n' | sort"))
    });
    both.agree();
}
