//! What is one's own: `whoami`, `workspace`, `key`, `token`.

use super::{
    CliError, Outcome, bad_request, completion,
    expiry::parse_expiry,
    output::{self, Output, ago, local_time, or_dash, plain},
};
use crate::{
    api::{ApiError, ErrorCode, Identity, NewKey, NewToken, SshKey, Token, Workspace},
    client::{Client, ClientError},
};
use clap::{Args, Subcommand, builder::ValueParser};
use clap_complete::ArgValueCandidates;
use jiff::Timestamp;
use std::path::{Path, PathBuf};

/// What can be done with workspaces.
#[derive(Debug, Subcommand)]
pub(super) enum WorkspaceCommand {
    /// List them.
    Ls {
        /// Everybody's (administrators).
        #[arg(long)]
        all: bool,
    },
    /// End one's container and give its slice back; the home stays.
    Stop {
        /// Its name.
        #[arg(default_value = "default", add = ArgValueCandidates::new(completion::workspaces))]
        name: String,
    },
    /// Keep one for longer after its last connection.
    Extend {
        /// Its name.
        #[arg(default_value = "default", add = ArgValueCandidates::new(completion::workspaces))]
        name: String,
        /// Minutes from now.
        #[arg(long, default_value_t = 60)]
        minutes: u64,
    },
}

/// What can be done with keys.
#[derive(Debug, Subcommand)]
pub(super) enum KeyCommand {
    /// List them.
    Ls,
    /// Add one.
    Add(KeyArguments),
    /// Remove one, and end the connections it let in.
    Rm {
        /// `SHA256:…` as `mlad key ls` shows it, or a label that only one has.
        key: String,
        /// Also the last one that lets you in.
        #[arg(long)]
        force: bool,
    },
}

/// A key to add.
#[derive(Debug, Args)]
pub(super) struct KeyArguments {
    /// A public key file (`id_ed25519.pub`), or - for standard input.
    file: PathBuf,
    /// A label instead of the key's comment.
    #[arg(long)]
    label: Option<String>,
    /// When it stops letting in: a length of time (90d, 12h) or a date (2027-03-01) [default: never].
    #[arg(long, value_parser = ValueParser::new(parse_expiry), value_name = "WHEN")]
    expires: Option<Timestamp>,
}

/// What can be done with tokens.
#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// List them.
    Ls,
    /// Make one; its secret is printed once.
    Add {
        /// What it is for.
        label: String,
        /// Days it works.
        #[arg(long, default_value_t = 90)]
        days: u64,
    },
    /// Revoke one.
    Rm {
        /// Its number, as `mlad token ls` shows it.
        id: i64,
    },
}

pub(super) async fn whoami(client: &Client, output: &Output) -> Outcome {
    output.say(&client.whoami().await?, |Identity { user, role, workload }| {
        let from = workload.as_ref().map(|workload| format!(", from workload {workload}")).unwrap_or_default();
        format!("{user} ({}){from}", output::word(role))
    })
}

pub(super) async fn workspace(client: &Client, output: &Output, command: WorkspaceCommand) -> Outcome {
    match command {
        WorkspaceCommand::Ls { all } => output.show(&client.workspaces(all).await?, |list| table(&list.workspaces)),
        WorkspaceCommand::Stop { name } => output.say(&client.stop_workspace(&name).await?, |workspace| {
            format!("workspace {}: {}", workspace.name, output::word(&workspace.state))
        }),
        WorkspaceCommand::Extend { name, minutes } => {
            output.say(&client.extend_workspace(&name, minutes).await?, |workspace| match workspace.idle_deadline {
                Some(deadline) => format!("workspace {} stays until {}", workspace.name, local_time(deadline)),
                None => format!("workspace {} stays while somebody is connected", workspace.name),
            })
        }
    }
}

fn table(workspaces: &[Workspace]) -> String {
    let now = Timestamp::now();
    let rows = workspaces.iter().map(|workspace| {
        [
            workspace.user.clone(),
            workspace.name.clone(),
            output::word(&workspace.state),
            workspace.image.clone(),
            workspace.need.to_string(),
            workspace.connections.to_string(),
            or_dash(workspace.idle_deadline.map(|deadline| ago(deadline, now))),
            workspace.detail.as_deref().map(plain).unwrap_or_default(),
        ]
    });
    let head = ["USER", "NAME", "STATE", "IMAGE", "GPU", "CONNECTIONS", "STOPS", "NOTE"];
    output::table(head, rows.collect(), "no workspaces: `ssh mlad@SERVER` makes one")
}

pub(super) async fn key(client: &Client, output: &Output, command: KeyCommand) -> Outcome {
    match command {
        KeyCommand::Ls => output.show(&client.keys().await?, |keys| keys_table(keys)),
        KeyCommand::Add(arguments) => {
            let key = read_key(arguments)?;
            output.say(&client.add_key(&key).await?, added_key)
        }
        KeyCommand::Rm { key, force } => {
            let fingerprint = which_key(&key, || client.keys()).await?;
            client.remove_key(&fingerprint, force).await?;
            output.done("key.remove", &fingerprint, "removed")
        }
    }
}

/// What is said of a key that was added.
pub(super) fn added_key(key: &SshKey) -> String {
    let end = key.expires_at.map(|time| format!(", until {}", local_time(time))).unwrap_or_default();
    format!("added {} ({}){end}", key.fingerprint, plain(&key.label))
}

/// Reads a public key file.
pub(super) fn read_key(arguments: KeyArguments) -> Result<NewKey, CliError> {
    let KeyArguments { file, label, expires } = arguments;
    Ok(NewKey { public_key: read_public_key(&file)?, label, expires_at: expires })
}

/// The line in a public key file.
pub(super) fn read_public_key(file: &Path) -> Result<String, CliError> {
    let text =
        if file == Path::new("-") { std::io::read_to_string(std::io::stdin()) } else { std::fs::read_to_string(file) };
    let text = text.map_err(|source| CliError::Io { doing: format!("reading {}", file.display()), source })?;
    let text = text.trim();
    if text.contains("PRIVATE KEY") {
        let file = file.display();
        return Err(bad_request(format!("{file} is a private key, which never leaves your machine: give {file}.pub")));
    }
    Ok(text.to_owned())
}

/// The fingerprint of the key that is meant; the list is asked for if a label is given.
pub(super) async fn which_key<F>(key: &str, list: impl FnOnce() -> F) -> Result<String, CliError>
where
    F: Future<Output = Result<Vec<SshKey>, ClientError>>,
{
    if key.starts_with("SHA256:") {
        return Ok(key.into());
    }
    Ok(labelled(key, &list().await?)?.into())
}

fn labelled<'a>(label: &str, keys: &'a [SshKey]) -> Result<&'a str, ApiError> {
    let found: Vec<&SshKey> = keys.iter().filter(|key| key.label == label).collect();
    match found.as_slice() {
        [one] => Ok(&one.fingerprint),
        [] => Err(ApiError::new(ErrorCode::NotFound, format!("there is no key {label:?}; `key ls` lists them"))),
        several => {
            let message = format!("{} keys have the label {label:?}; give a fingerprint (SHA256:…)", several.len());
            Err(ApiError::new(ErrorCode::BadRequest, message))
        }
    }
}

/// Keys for people.
pub(super) fn keys_table(keys: &[SshKey]) -> String {
    let now = Timestamp::now();
    let rows = keys.iter().map(|key| {
        let kind = key.public_key.split(' ').next().unwrap_or_default().to_owned();
        let used = key.last_used_at.map_or_else(|| "never".into(), |time| ago(time, now));
        let ends = key.expires_at.map_or_else(|| "never".into(), |time| expiry(time, now));
        let from = or_dash(key.last_used_from.as_deref());
        [key.fingerprint.clone(), kind, key.label.clone(), ago(key.created_at, now), ends, used, from]
    });
    let head = ["FINGERPRINT", "TYPE", "LABEL", "AGE", "EXPIRES", "USED", "FROM"];
    output::table(head, rows.collect(), "no keys")
}

fn expiry(time: Timestamp, now: Timestamp) -> String {
    if time <= now { "expired".into() } else { ago(time, now) }
}

pub(super) async fn token(client: &Client, output: &Output, command: TokenCommand) -> Outcome {
    match command {
        TokenCommand::Ls => output.show(&client.tokens().await?, |tokens| tokens_table(tokens)),
        TokenCommand::Add { label, days } => {
            output.say(&client.add_token(&new_token(label, days)).await?, token_secret)
        }
        TokenCommand::Rm { id } => {
            client.remove_token(id).await?;
            output.done("token.remove", &id.to_string(), "revoked token")
        }
    }
}

/// A token to ask for.
pub(super) fn new_token(label: String, days: u64) -> NewToken {
    NewToken { label, valid_seconds: Some(days.saturating_mul(86_400)) }
}

/// The one line that shows a token's secret.
pub(super) fn token_secret(token: &Token) -> String {
    token.secret.clone().unwrap_or_default()
}

/// Tokens for people.
pub(super) fn tokens_table(tokens: &[Token]) -> String {
    let now = Timestamp::now();
    let rows = tokens.iter().map(|token| {
        let used = token.last_used_at.map_or_else(|| "never".into(), |time| ago(time, now));
        [token.id.to_string(), token.label.clone(), local_time(token.expires_at), used]
    });
    output::table(["ID", "LABEL", "EXPIRES", "USED"], rows.collect(), "no tokens")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_named_by_a_label_that_only_one_has() {
        let key = |fingerprint: &str, label: &str| SshKey {
            fingerprint: fingerprint.into(),
            user: "alice".into(),
            public_key: "ssh-ed25519 AAAA".into(),
            label: label.into(),
            created_at: Timestamp::UNIX_EPOCH,
            expires_at: None,
            last_used_at: None,
            last_used_from: None,
        };
        let keys = [key("SHA256:1", "laptop"), key("SHA256:2", "desk"), key("SHA256:3", "desk")];
        assert_eq!(labelled("laptop", &keys).unwrap(), "SHA256:1");
        assert_eq!(labelled("desk", &keys).unwrap_err().code, ErrorCode::BadRequest);
        assert_eq!(labelled("phone", &keys).unwrap_err().code, ErrorCode::NotFound);
    }
}
