//! `admin`: users, keys, invitations, tokens, images, leases; over the root-only socket on the server.

use super::{
    Outcome,
    authorities::{self, AuthorityCommand},
    completion,
    forwarding::{self, ForwardingArguments, Whose},
    nodes::{self, NodeCommand},
    output::{self, Output, ago, local_time, memory, or_dash, plain},
    own, parse_need,
    projects::{self, AdminProjectCommand},
    reservations::{self, ReserveCommand},
};
use crate::{
    api::{Image, Need, NewImage, NewInvite, NewUser, Quota, Role, User},
    client::Client,
};
use clap::{Args, Subcommand, ValueEnum, builder::ValueParser};
use clap_complete::ArgValueCandidates;
use jiff::Timestamp;

/// What an administrator does.
#[derive(Debug, Subcommand)]
pub(super) enum AdminCommand {
    /// People.
    #[command(subcommand)]
    User(UserCommand),
    /// Projects: people who share a quota.
    #[command(subcommand)]
    Project(AdminProjectCommand),
    /// Keys of people.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Certificate authorities that let people in, and certificates that were revoked.
    #[command(subcommand)]
    Ca(AuthorityCommand),
    /// Make a one-time code that enrols somebody's key (and the user, if there is none of that name).
    Invite {
        /// The user's name.
        name: String,
        /// Hours the code can be used.
        #[arg(long, default_value_t = 24)]
        hours: u64,
    },
    /// Tokens of people for the API on TCP.
    #[command(subcommand)]
    Token(TokenCommand),
    /// The catalog of images.
    #[command(subcommand)]
    Image(ImageCommand),
    /// Space on GPUs that is set aside for a time.
    #[command(subcommand)]
    Reserve(ReserveCommand),
    /// Leases of slices.
    #[command(subcommand)]
    Lease(LeaseCommand),
    /// Machines with GPUs.
    #[command(subcommand)]
    Node(NodeCommand),
    /// End a workload (w-… or j-…) now, also one that waits for its slice.
    Stop {
        /// Its name, as `mlad who` shows it.
        workload: String,
    },
    /// The audit log, newest first.
    Audit {
        /// At most so many entries.
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
}

/// People.
#[derive(Debug, Subcommand)]
pub(super) enum UserCommand {
    /// List them.
    Ls,
    /// Add one.
    Add {
        /// Login name.
        name: String,
        /// What they may do.
        #[arg(long, value_enum, default_value_t = RoleArgument::User)]
        role: RoleArgument,
        /// Unix uid [default: the next free one].
        #[arg(long)]
        uid: Option<u32>,
    },
    /// Let somebody log in again.
    Enable(UserName),
    /// Let somebody log in no longer.
    Disable(UserName),
    /// Change what somebody may do.
    Role {
        #[command(flatten)]
        user: UserName,
        /// What they may do.
        #[arg(value_enum)]
        role: RoleArgument,
    },
    /// Change what somebody may hold at once; a limit left out is no limit.
    Quota(QuotaArguments),
    /// Show or change what somebody may forward over SSH; what is left out stays.
    Forwarding {
        #[command(flatten)]
        user: UserName,
        #[command(flatten)]
        forwarding: ForwardingArguments,
    },
    /// Remove somebody who has nothing left here; their home stays on the disk.
    Rm(UserName),
}

/// A user's name.
#[derive(Debug, Args)]
pub(super) struct UserName {
    /// Login name.
    #[arg(add = ArgValueCandidates::new(completion::users))]
    pub(super) name: String,
}

/// Limits of a user.
#[derive(Debug, Args)]
pub(super) struct QuotaArguments {
    #[command(flatten)]
    user: UserName,
    /// Slices and whole GPUs at once.
    #[arg(long)]
    slices: Option<u32>,
    /// GPU memory at once: 80G, or a number of MiB.
    #[arg(long, value_parser = ValueParser::new(projects::parse_gpu_memory), value_name = "MEMORY")]
    gpu_memory: Option<u64>,
    /// Hours of whole GPUs in 30 days.
    #[arg(long, value_name = "HOURS")]
    gpu_hours: Option<u64>,
    /// Greatest priority they may ask for, up to 100 [default: 0].
    #[arg(long, value_name = "NUMBER")]
    priority: Option<i32>,
    /// Jobs that have not ended.
    #[arg(long)]
    jobs: Option<u32>,
    /// Slice of a login or job that names none.
    #[arg(long, value_parser = ValueParser::new(parse_need), value_name = "NEED")]
    default_gpu: Option<Need>,
}

/// What a user may do, as an argument.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum RoleArgument {
    /// Own workspaces and jobs.
    User,
    /// Everything, audited.
    Admin,
}

/// Keys of people.
#[derive(Debug, Subcommand)]
pub(super) enum KeyCommand {
    /// List somebody's.
    Ls(UserName),
    /// Add one.
    Add {
        #[command(flatten)]
        user: UserName,
        #[command(flatten)]
        key: own::KeyArguments,
    },
    /// Remove one, and end the connections it let in.
    Rm {
        #[command(flatten)]
        user: UserName,
        /// `SHA256:…` as `mlad admin key ls` shows it, or a label that only one of theirs has.
        key: String,
    },
}

/// Tokens of people.
#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// List somebody's.
    Ls(UserName),
    /// Make one; its secret is printed once.
    Add {
        #[command(flatten)]
        user: UserName,
        /// What it is for.
        label: String,
        /// Days it works.
        #[arg(long, default_value_t = 90)]
        days: u64,
    },
    /// Revoke one.
    Rm {
        #[command(flatten)]
        user: UserName,
        /// Its number.
        id: i64,
    },
}

/// The catalog.
#[derive(Debug, Subcommand)]
pub(super) enum ImageCommand {
    /// List it.
    Ls,
    /// Add an image, or replace the one of its name; who may use one of catalog.toml stays.
    Add {
        /// The name people will use.
        name: String,
        /// OCI reference, as the engine knows it.
        reference: String,
        /// One line for people.
        #[arg(long, default_value = "")]
        description: String,
        /// Least GPU memory it needs, in MiB.
        #[arg(long, default_value_t = 0, value_name = "MIB")]
        min_gpu_memory: u64,
    },
    /// Take an image out: one that was added is forgotten, one of catalog.toml is hidden until it is restored.
    Rm {
        /// Its name.
        #[arg(add = ArgValueCandidates::new(completion::images))]
        name: String,
    },
    /// Let what catalog.toml says of an image hold again, after it was replaced or taken out.
    Restore {
        /// Its name in catalog.toml.
        name: String,
    },
    /// Read catalog.toml again.
    Reload,
}

/// Leases.
#[derive(Debug, Subcommand)]
pub(super) enum LeaseCommand {
    /// List them.
    Ls,
    /// Take one away; its workload is ended first.
    Revoke {
        /// The workload that holds it, as `mlad who` shows it.
        workload: String,
    },
}

pub(super) async fn run(client: &Client, output: &Output, command: AdminCommand) -> Outcome {
    match command {
        AdminCommand::User(command) => user(client, output, command).await,
        AdminCommand::Project(command) => projects::administer(client, output, command).await,
        AdminCommand::Key(command) => key(client, output, command).await,
        AdminCommand::Ca(command) => authorities::run(client, output, command).await,
        AdminCommand::Invite { name, hours } => invite(client, output, name, hours).await,
        AdminCommand::Token(command) => token(client, output, command).await,
        AdminCommand::Image(command) => image(client, output, command).await,
        AdminCommand::Node(command) => nodes::run(client, output, command).await,
        AdminCommand::Reserve(command) => reservations::administer(client, output, command).await,
        AdminCommand::Lease(LeaseCommand::Ls) => super::gpus::who(client, output).await,
        AdminCommand::Lease(LeaseCommand::Revoke { workload }) => {
            client.revoke_lease(&workload).await?;
            output.done("lease.revoke", &workload, "took back the lease of")
        }
        AdminCommand::Stop { workload } => {
            client.stop_workload(&workload).await?;
            output.done("workload.stop", &workload, "stopped")
        }
        AdminCommand::Audit { limit } => audit(client, output, limit).await,
    }
}

async fn user(client: &Client, output: &Output, command: UserCommand) -> Outcome {
    match command {
        UserCommand::Ls => output.show(&client.users().await?, |list| users_table(&list.users)),
        UserCommand::Add { name, role, uid } => {
            let user = client.add_user(&NewUser { name, role: Some(role.into()), uid }).await?;
            output.say(&user, |user| format!("added {} with uid {}", user.name, user.uid))
        }
        UserCommand::Enable(user) => {
            output.say(&client.enable_user(&user.name, true).await?, |user| format!("{} may log in", user.name))
        }
        UserCommand::Disable(user) => output.say(&client.enable_user(&user.name, false).await?, |user| {
            format!("{} may log in no longer; what runs goes on", user.name)
        }),
        UserCommand::Role { user, role } => output.say(&client.set_role(&user.name, role.into()).await?, |user| {
            format!("{} is now: {}", user.name, output::word(&user.role))
        }),
        UserCommand::Quota(arguments) => {
            let QuotaArguments { user, slices, gpu_memory, gpu_hours, priority, jobs, default_gpu } = arguments;
            let quota = Quota {
                slices,
                gpu_memory_mib: gpu_memory,
                gpu_seconds: gpu_hours.map(|hours| hours.saturating_mul(3600)),
                greatest_priority: priority,
                jobs,
                default_need: default_gpu,
                ..Quota::default()
            };
            let user = client.set_quota(&user.name, &quota).await?;
            output.say(&user, |user| format!("changed the quota of {}", user.name))
        }
        UserCommand::Forwarding { user, forwarding } => {
            forwarding::run(client, output, Whose::User(&user.name), &forwarding).await
        }
        UserCommand::Rm(user) => {
            client.remove_user(&user.name).await?;
            output.done("user.remove", &user.name, "removed")
        }
    }
}

fn users_table(users: &[User]) -> String {
    let now = Timestamp::now();
    let rows = users.iter().map(|user| {
        [
            user.name.clone(),
            user.uid.to_string(),
            output::word(&user.role),
            if user.enabled { "yes" } else { "no" }.into(),
            or_dash(user.quota.slices),
            or_dash(user.quota.gpu_memory_mib.map(memory)),
            or_dash(user.quota.gpu_seconds.map(projects::gpu_hours)),
            or_dash(user.quota.jobs),
            user.quota.greatest_priority.unwrap_or(0).to_string(),
            user.last_seen_at.map_or_else(|| "never".into(), |time| ago(time, now)),
        ]
    });
    let head = ["NAME", "UID", "ROLE", "ENABLED", "SLICES", "GPU MEMORY", "GPU HOURS", "JOBS", "PRIORITY", "SEEN"];
    output::table(head, rows.collect(), "no users: mlad admin invite NAME")
}

async fn key(client: &Client, output: &Output, command: KeyCommand) -> Outcome {
    match command {
        KeyCommand::Ls(user) => output.show(&client.keys_of(&user.name).await?, |keys| own::keys_table(keys)),
        KeyCommand::Add { user, key } => {
            let key = own::read_key(key)?;
            output.say(&client.add_key_of(&user.name, &key).await?, own::added_key)
        }
        KeyCommand::Rm { user, key } => {
            let fingerprint = own::which_key(&key, || client.keys_of(&user.name)).await?;
            client.remove_key_of(&user.name, &fingerprint).await?;
            output.done("key.remove", &fingerprint, "removed")
        }
    }
}

async fn invite(client: &Client, output: &Output, name: String, hours: u64) -> Outcome {
    let invite = client.invite(&NewInvite { user: name, valid_seconds: Some(hours.saturating_mul(3600)) }).await?;
    output.say(&invite, |invite| {
        format!(
            "{}\n\nGive this code to {}: they log in with `ssh mlad@SERVER` and type it when asked.\n\
             It works once, until {}.",
            invite.code,
            invite.user,
            local_time(invite.expires_at)
        )
    })
}

async fn token(client: &Client, output: &Output, command: TokenCommand) -> Outcome {
    match command {
        TokenCommand::Ls(user) => output.show(&client.tokens_of(&user.name).await?, |tokens| own::tokens_table(tokens)),
        TokenCommand::Add { user, label, days } => {
            output.say(&client.add_token_of(&user.name, &own::new_token(label, days)).await?, own::token_secret)
        }
        TokenCommand::Rm { user, id } => {
            client.remove_token_of(&user.name, id).await?;
            output.done("token.remove", &id.to_string(), "revoked token")
        }
    }
}

async fn image(client: &Client, output: &Output, command: ImageCommand) -> Outcome {
    match command {
        ImageCommand::Ls => super::gpus::images(client, output).await,
        ImageCommand::Add { name, reference, description, min_gpu_memory } => {
            let image = NewImage { name, reference, description, min_gpu_memory_mib: min_gpu_memory };
            output.say(&client.add_image(&image).await?, |image| format!("added {}", image_line(image)))
        }
        ImageCommand::Rm { name } => {
            client.remove_image(&name).await?;
            output.done("image.remove", &name, "removed")
        }
        ImageCommand::Restore { name } => {
            output.say(&client.restore_image(&name).await?, |image| format!("restored {}", image_line(image)))
        }
        ImageCommand::Reload => {
            client.reload_images().await?;
            output.done("image.reload", "catalog", "read again: the")
        }
    }
}

fn image_line(image: &Image) -> String {
    let ready = if image.available { "" } else { "; the engine does not have it yet" };
    format!("{} ({}){ready}", plain(&image.name), plain(&image.reference))
}

async fn audit(client: &Client, output: &Output, limit: u32) -> Outcome {
    output.show(&client.audit(limit).await?, |list| {
        let rows = list.events.iter().map(|event| {
            let detail = event.detail.as_deref().map(plain).unwrap_or_default();
            [local_time(event.at), event.actor.clone(), event.action.clone(), event.target.clone(), detail]
        });
        output::table(["TIME", "WHO", "WHAT", "TO", "DETAIL"], rows.collect(), "the audit log is empty")
    })
}

impl From<RoleArgument> for Role {
    fn from(role: RoleArgument) -> Self {
        match role {
            RoleArgument::User => Self::User,
            RoleArgument::Admin => Self::Admin,
        }
    }
}
