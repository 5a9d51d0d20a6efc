//! `mlad`: the user's command, and the agent of every container (`mlad agent`).

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    // Before anything else: the agent's launcher runs once for every command a user starts.
    if arguments.next().is_some_and(|first| first == "agent") {
        return mlad::agent::run(arguments);
    }
    mlad::cli::main()
}
