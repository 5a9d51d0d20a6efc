//! `admin user forwarding`, `admin project forwarding`: what may be forwarded over SSH connections.

use super::{
    Outcome,
    output::{self, Output},
};
use crate::{
    api::Forwarding,
    client::{Client, ClientError},
};
use clap::{Args, ValueEnum};

/// What is to change; what is left out stays.
#[derive(Debug, Args)]
pub(super) struct ForwardingArguments {
    /// Connections into the workspace (-L, -D, -W, -J).
    #[arg(long, value_enum, value_name = "YES/NO")]
    local: Option<Permission>,
    /// Listeners in the workspace (-R).
    #[arg(long, value_enum, value_name = "YES/NO")]
    remote: Option<Permission>,
    /// The client's key agent (-A).
    #[arg(long, value_enum, value_name = "YES/NO")]
    agent: Option<Permission>,
    /// X11 (-X, -Y).
    #[arg(long, value_enum, value_name = "YES/NO")]
    x11: Option<Permission>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Permission {
    /// It may be.
    Yes,
    /// It may not.
    No,
}

/// Of whom.
#[derive(Debug, Clone, Copy)]
pub(super) enum Whose<'a> {
    /// A user by name.
    User(&'a str),
    /// The members of a project.
    Project(&'a str),
}

pub(super) async fn run(
    client: &Client,
    output: &Output,
    whose: Whose<'_>,
    arguments: &ForwardingArguments,
) -> Outcome {
    let now = get(client, whose).await?;
    let wanted = arguments.applied_to(now);
    let now = if wanted == now { now } else { set(client, whose, wanted).await? };
    output.show(&now, table)
}

async fn get(client: &Client, whose: Whose<'_>) -> Result<Forwarding, ClientError> {
    match whose {
        Whose::User(name) => client.user_forwarding(name).await,
        Whose::Project(name) => client.project_forwarding(name).await,
    }
}

async fn set(client: &Client, whose: Whose<'_>, forwarding: Forwarding) -> Result<Forwarding, ClientError> {
    match whose {
        Whose::User(name) => client.set_user_forwarding(name, forwarding).await,
        Whose::Project(name) => client.set_project_forwarding(name, forwarding).await,
    }
}

impl ForwardingArguments {
    fn applied_to(&self, now: Forwarding) -> Forwarding {
        let pick = |wanted: Option<Permission>, now| wanted.map_or(now, |wanted| wanted == Permission::Yes);
        Forwarding {
            local: pick(self.local, now.local),
            remote: pick(self.remote, now.remote),
            agent: pick(self.agent, now.agent),
            x11: pick(self.x11, now.x11),
        }
    }
}

fn table(forwarding: &Forwarding) -> String {
    let word = |allowed: bool| if allowed { "yes" } else { "no" }.to_owned();
    let Forwarding { local, remote, agent, x11 } = *forwarding;
    output::table(["LOCAL", "REMOTE", "AGENT", "X11"], vec![[word(local), word(remote), word(agent), word(x11)]], "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_stays() {
        let arguments =
            ForwardingArguments { local: None, remote: Some(Permission::No), agent: None, x11: Some(Permission::Yes) };
        let now = Forwarding { x11: false, agent: false, ..Forwarding::default() };
        let wanted = Forwarding { local: true, remote: false, agent: false, x11: true };
        assert_eq!(arguments.applied_to(now), wanted);
    }
}
