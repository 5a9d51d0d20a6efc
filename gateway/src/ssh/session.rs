//! One session from its start to its close: who serves it, and what the person is told if nobody can.

use super::{
    agent::{self, PROMPTLY, dial},
    backend::{Entered, Place, Refusal, Worker},
    client::Client,
    forward::{Announcements, listen_pending},
    outlet::{Gone, Outlet},
    person::Person,
    piped_session::{self, Pipes},
    setup::{Setup, Start},
    terminal_session,
    words::mlad_arguments,
    worker_session,
};
use crate::{login::Terminal, workspace::Wish};
use futures::FutureExt as _;
use mlad::{
    api::{ExitCode, Need},
    channel::{Exit, Open},
};
use std::{io, sync::Arc, time::Duration};

/// The variable that names the image of the workspace.
const IMAGE: &str = "MLAD_IMAGE";
/// The variable that says which slice the workspace is to have.
const GPU: &str = "MLAD_GPU";
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

/// Serves a session to its end and closes its channel.
pub(super) async fn serve(client: Arc<Client>, outlet: Outlet, setup: Setup, start: Start) {
    let line_end = if setup.terminal.is_some() { "\r\n" } else { "\n" };
    let ended = match run(&client, &outlet, setup, start).await {
        Ok(exit) => outlet.finish(&exit).await,
        Err(Stop::Refused(refusal)) => tell(&outlet, &refusal, line_end).await,
        Err(Stop::Gone) => Err(Gone),
    };
    if ended.is_err() {
        tracing::debug!("the client ended a session");
    }
}

async fn run(client: &Arc<Client>, outlet: &Outlet, setup: Setup, start: Start) -> Result<Exit, Stop> {
    match worker(client, &setup, &start).await? {
        Some(worker) => Ok(worker_session::serve(worker, outlet).await?),
        None => run_in_workspace(client, outlet, setup, start).await,
    }
}

/// A worker on this host if one serves this, with no container.
async fn worker(client: &Client, setup: &Setup, start: &Start) -> Result<Option<Worker>, Refusal> {
    let (backend, user) = (client.workplace.backend(), client.workplace.user());
    match start {
        Start::Subsystem(name) if name == "sftp" => backend.sftp(user).await.map(Some),
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

async fn run_in_workspace(client: &Arc<Client>, outlet: &Outlet, mut setup: Setup, start: Start) -> Result<Exit, Stop> {
    let wish = wish(client, &setup)?;
    let Entered { place, typed } = enter(client, outlet, &mut setup, wish).await?;
    outlet.inbox().unread(&typed);
    let line_end = if setup.terminal.is_some() { "\r\n" } else { "\n" };
    for line in listen_pending(client, &*place).await {
        outlet.error(format!("mlad: {line}{line_end}")).await?;
    }
    setup.environment.splice(0..0, connection_variables(client));
    let ended = match setup.terminal {
        Some(_) => on_terminal(client, outlet, &*place, setup, start).await?,
        None => on_pipes(client, outlet, &*place, setup, start).await?,
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

fn wish(client: &Client, setup: &Setup) -> Result<Wish, Refusal> {
    let need = setup.variable(GPU).filter(|text| !text.is_empty()).map(str::parse::<Need>).transpose();
    let need = need.map_err(|error| Refusal::new(format!("{GPU}: {error}"), ExitCode::Usage))?;
    let image = setup.variable(IMAGE).filter(|name| !name.is_empty()).map(Into::into);
    Ok(Wish { image, need, ..client.workplace.wish() })
}

/// Brings the session to its workspace; if the client leaves meanwhile, its place is given back.
async fn enter(client: &Client, outlet: &Outlet, setup: &mut Setup, wish: Wish) -> Result<Entered, Stop> {
    let mut person = setup.terminal.take().map(|terminal| Person::new(outlet, terminal));
    let terminal = person.as_mut().map(|person| person as &mut dyn Terminal);
    let entered = tokio::select! {
        entered = client.workplace.enter(wish, terminal) => entered,
        _ = outlet.inbox().ended() => return Err(Stop::Gone),
    };
    setup.terminal = person.map(Person::into_request);
    Ok(entered?)
}

async fn on_terminal(
    client: &Arc<Client>,
    outlet: &Outlet,
    place: &dyn Place,
    setup: Setup,
    start: Start,
) -> Result<Option<Exit>, Stop> {
    let announcements = Announcements::of_session(client, place, setup.key_agent);
    let mut connection = open(place).await?;
    agent::start(&mut connection, &setup.requests(start), &[]).await?;
    Ok(terminal_session::serve(connection, outlet, &announcements).await?)
}

async fn on_pipes(
    client: &Arc<Client>,
    outlet: &Outlet,
    place: &dyn Place,
    setup: Setup,
    start: Start,
) -> Result<Option<Exit>, Stop> {
    let announcements = Announcements::of_session(client, place, setup.key_agent);
    let mut connection = open(place).await?;
    let (pipes, theirs) = Pipes::new().map_err(|error| no_pipes(&error))?;
    agent::start(&mut connection, &setup.requests(start), &theirs).await?;
    // Its outputs end when the process and its children have closed them, and nobody else holds them.
    drop(theirs);
    Ok(piped_session::serve(connection, pipes, outlet, &announcements).await?)
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

async fn tell(outlet: &Outlet, refusal: &Refusal, line_end: &str) -> Result<(), Gone> {
    for line in &refusal.lines {
        outlet.error(format!("mlad: {line}{line_end}")).await?;
    }
    outlet.finish(&Exit::Status(refusal.exit_status)).await
}

fn narrow(value: u32) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}
