//! One session from its start to its close: who serves it, and what the person is told if nobody can.

use super::{
    agent::{self, PROMPTLY, dial},
    backend::{Entered, Place, Refusal, Worker},
    client::Client,
    forward::Announcements,
    framed_session,
    listening::listen_pending,
    outlet::{Gone, Outlet},
    person::Person,
    piped_session::{self, Pipes},
    setup::{Setup, Start, TerminalRequest},
    words::mlad_arguments,
    worker_session,
    workplace::OnTheWay,
};
use crate::{
    login::Terminal,
    workspace::{Notice, Wish},
};
use futures::FutureExt as _;
use mlad::{
    api::{Ending, ExitCode, Need},
    channel::{Exit, Open},
};
use std::{io, sync::Arc, time::Duration};
use tokio::sync::watch;

/// The subsystem that the gateway serves itself.
pub(super) const SFTP: &str = "sftp";
/// The variable that names the image of the workspace.
const IMAGE: &str = "MLAD_IMAGE";
/// The variable that says which slice the workspace is to have.
const GPU: &str = "MLAD_GPU";
/// The variable that names the project the workspace counts for.
const PROJECT: &str = "MLAD_PROJECT";
/// Exit status of a session that broke off: the one `ssh` itself has for a broken connection.
const BROKEN: u32 = 255;
/// Time to wait for the reason of a workspace's end once its agent is lost.
const REASON_COMES: Duration = Duration::from_secs(2);

/// Why a session ended before its process.
enum Stop {
    /// The client has closed it, or is gone.
    Gone,
    /// It cannot be.
    Refused(Refusal),
}

impl From<Gone> for Stop {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Whether the client knows that what it asked for was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// It was told so.
    Given,
    /// It waits for the answer.
    Owed,
}

/// Serves a session to its end and closes its channel.
pub(super) async fn serve(client: Arc<Client>, outlet: Outlet, setup: Setup, start: Start, mut answer: Answer) {
    let line_end = if setup.terminal.is_some() { "\r\n" } else { "\n" };
    let ended = match run(&client, &outlet, setup, start, &mut answer).await {
        Ok(exit) => outlet.finish(&exit).await,
        Err(Stop::Refused(refusal)) if answer == Answer::Owed => refuse(&outlet, &refusal).await,
        Err(Stop::Refused(refusal)) => tell(&outlet, &refusal, line_end).await,
        Err(Stop::Gone) => Err(Gone),
    };
    if ended.is_err() {
        tracing::debug!("the client ended a session");
    }
}

async fn run(
    client: &Arc<Client>,
    outlet: &Outlet,
    setup: Setup,
    start: Start,
    answer: &mut Answer,
) -> Result<Exit, Stop> {
    match worker(client, &setup, &start).await? {
        Some(worker) => Ok(worker_session::serve(worker, outlet).await?),
        None => run_in_workspace(client, outlet, setup, start, answer).await,
    }
}

/// A worker on this host if one serves this, with no container.
async fn worker(client: &Client, setup: &Setup, start: &Start) -> Result<Option<Worker>, Refusal> {
    let (backend, user) = (client.workplace.backend(), client.workplace.user());
    match start {
        Start::Subsystem(name) if name == SFTP => backend.sftp(user).await.map(Some),
        Start::Exec(command) => match mlad_arguments(command) {
            Some(arguments) => {
                let size =
                    setup.terminal.as_ref().map(|terminal| (narrow(terminal.size.columns), narrow(terminal.size.rows)));
                backend.mlad(user, &arguments, &setup.environment_with_term(), size).await.map(Some)
            }
            None => backend.scp(user, command).await,
        },
        _ => Ok(None),
    }
}

async fn run_in_workspace(
    client: &Arc<Client>,
    outlet: &Outlet,
    mut setup: Setup,
    start: Start,
    answer: &mut Answer,
) -> Result<Exit, Stop> {
    let line_end = if setup.terminal.is_some() { "\r\n" } else { "\n" };
    let wish = wish(client, &setup)?;
    let on_the_way = client.workplace.set_out();
    // Nothing is said to a client before its answer.
    let shown = if *answer == Answer::Given { setup.terminal.take() } else { None };
    let shown = shown.map(|terminal| Person::new(outlet, terminal, matches!(start, Start::Shell)));
    let (Entered { place, typed }, shown) = enter(client, outlet, &on_the_way, shown, wish).await?;
    setup.terminal = setup.terminal.or(shown);
    outlet.inbox().unread(&typed);
    let failed = listen_pending(client, &*place).await;
    drop(on_the_way);

    setup.environment.splice(0..0, connection_variables(client));
    let announcements = Announcements::of_session(client, &*place, setup.key_agent);
    let mut connection = open(&*place).await?;
    // A terminal's bytes travel in frames, and everything does where the agent is on another machine.
    let framed = setup.terminal.is_some() || !place.passes_descriptors();
    let pipes = if framed { None } else { Some(Pipes::new().map_err(|error| no_pipes(&error))?) };
    let (pipes, theirs) = pipes.map_or((None, Vec::new()), |(ours, theirs)| (Some(ours), theirs.into()));
    agent::start(&mut connection, &setup.requests(start), &theirs).await?;
    // Its outputs end when the process and its children have closed them, and nobody else holds them.
    drop(theirs);
    if *answer == Answer::Owed {
        outlet.answer(true).await?;
        *answer = Answer::Given;
    }
    for line in failed.iter().flat_map(|failed| failed.lines()) {
        outlet.error(format!("{line}{line_end}")).await?;
    }
    let ended = match pipes {
        Some(pipes) => piped_session::serve(connection, pipes, outlet, &announcements).await?,
        None => tokio::select! {
            ended = framed_session::serve(connection, outlet, &announcements) => ended?,
            gone = tell_notices(outlet, place.notices()) => return Err(gone.into()),
        },
    };
    match ended {
        Some(exit) => {
            // The end of the workspace ends its processes: who was in one of them is told why.
            if let Some(reason) = place.ended().now_or_never() {
                outlet.error(format!("{line_end}mlad: {}{line_end}", ended_line(&reason))).await?;
            }
            Ok(exit)
        }
        None => Err(broken(&*place).await.into()),
    }
}

/// Tells a terminal when its workspace is going to end, or its GPU is not well; returns when nobody is there to be told.
async fn tell_notices(outlet: &Outlet, mut notices: watch::Receiver<Notice>) -> Gone {
    let mut told = Notice::default();
    loop {
        let notice = notices.borrow_and_update().clone();
        for line in lines(&told, &notice) {
            if let Err(gone) = outlet.error(format!("\r\nmlad: {line}\r\n")).await {
                return gone;
            }
        }
        told = notice;
        if notices.changed().await.is_err() {
            // It has ended: the session hears of that from its agent.
            return std::future::pending().await;
        }
    }
}

/// What is new in a notice.
fn lines(told: &Notice, now: &Notice) -> Vec<String> {
    let mut lines = Vec::new();
    if told.ending != now.ending {
        let back = || "your workspace does not have to end after all".to_owned();
        lines.push(now.ending.as_ref().map_or_else(back, ending_line));
    }
    if let Some(trouble) = now.trouble.as_ref().filter(|_| told.trouble != now.trouble) {
        lines.push(format!(
            "your GPU is not well: {}. What runs goes on, and may fail or compute wrongly; save your work and begin anew \
             (`mlad workspace stop`, and log in again).",
            plain(trouble)
        ));
    }
    lines
}

fn plain(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control()).collect()
}

fn ending_line(ending: &Ending) -> String {
    let reason = plain(&ending.reason);
    format!(
        "your workspace ends at {} UTC: {reason}. Save your work; your home stays, and the next login begins anew.",
        ending.at.strftime("%H:%M:%S")
    )
}

fn wish(client: &Client, setup: &Setup) -> Result<Wish, Refusal> {
    let need = setup.variable(GPU).filter(|text| !text.is_empty()).map(str::parse::<Need>).transpose();
    let need = need.map_err(|error| Refusal::new(format!("{GPU}: {error}"), ExitCode::Usage))?;
    let image = setup.variable(IMAGE).filter(|name| !name.is_empty()).map(Into::into);
    let project = setup.variable(PROJECT).filter(|name| !name.is_empty()).map(Into::into);
    Ok(Wish { image, need, project, ..client.workplace.wish() })
}

/// Brings the session to its workspace; if the client leaves meanwhile, its place is given back. The terminal, if
/// it is shown anything, comes back as it is then.
async fn enter(
    client: &Client,
    outlet: &Outlet,
    on_the_way: &OnTheWay<'_>,
    mut person: Option<Person<'_>>,
    wish: Wish,
) -> Result<(Entered, Option<TerminalRequest>), Stop> {
    let shown = person.as_mut().map(|person| person as &mut dyn Terminal);
    let entered = tokio::select! {
        entered = client.workplace.enter(on_the_way, wish, shown) => entered,
        _ = outlet.inbox().ended() => return Err(Stop::Gone),
    };
    Ok((entered?, person.map(Person::into_request)))
}

async fn open(place: &dyn Place) -> Result<mlad::channel::Connection, Refusal> {
    let dialled = dial(place, Open::Session, PROMPTLY).await;
    Ok(dialled.map_err(|refused| Refusal::new(format!("{}; log in again", refused.message), ExitCode::TryLater))?.0)
}

/// As sshd sets them; Debian's bash reads `~/.bashrc` for commands only with one of them.
fn connection_variables(client: &Client) -> [(String, String); 2] {
    let (peer, local) = (client.peer, client.local);
    let (from, to) = (peer.ip().to_canonical(), local.ip().to_canonical());
    [
        ("SSH_CLIENT".into(), format!("{from} {} {}", peer.port(), local.port())),
        ("SSH_CONNECTION".into(), format!("{from} {} {to} {}", peer.port(), local.port())),
    ]
}

async fn broken(place: &dyn Place) -> Refusal {
    let reason = tokio::time::timeout(REASON_COMES, place.ended()).await;
    let line = match reason {
        Ok(reason) => ended_line(&reason),
        Err(_) => "the connection to your workspace broke; log in again".into(),
    };
    Refusal { lines: vec![line], exit_status: BROKEN }
}

fn ended_line(reason: &str) -> String {
    format!("your workspace has ended: {reason}")
}

fn no_pipes(error: &io::Error) -> Refusal {
    tracing::error!(%error, "no pipes for a session");
    Refusal::new("the server is too busy (no file descriptors left); try again in a moment", ExitCode::TryLater)
}

/// Answers no, and closes a channel that is of no more use: `ssh -s` says so in its own words.
async fn refuse(outlet: &Outlet, refusal: &Refusal) -> Result<(), Gone> {
    tracing::info!(reason = refusal.lines.join("; "), "a subsystem was refused");
    outlet.answer(false).await?;
    outlet.close().await;
    Ok(())
}

async fn tell(outlet: &Outlet, refusal: &Refusal, line_end: &str) -> Result<(), Gone> {
    for line in &refusal.lines {
        outlet.error(format!("mlad: {line}{line_end}")).await?;
    }
    outlet.finish(&Exit::Status(refusal.exit_status)).await
}

fn narrow(value: u32) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}
