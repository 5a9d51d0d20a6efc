//! `admin ca`: certificate authorities that let people in, and certificates that were revoked.

use super::{
    CliError, Outcome, completion,
    output::{self, Output, ago, or_dash, plain},
    own,
};
use crate::{
    api::{CertificateAuthority, NewCertificateAuthority, NewRevocation, Revocation, Revoked},
    client::Client,
};
use clap::{Args, Subcommand};
use clap_complete::ArgValueCandidates;
use jiff::Timestamp;
use std::path::PathBuf;

/// Certificate authorities for users.
#[derive(Debug, Subcommand)]
pub(super) enum AuthorityCommand {
    /// List those that are trusted.
    Ls,
    /// Trust one: its user certificates let in whom they name.
    Add {
        /// Its public key file, or - for standard input.
        file: PathBuf,
        /// Whom alone it may let in [default: everybody].
        #[arg(long, add = ArgValueCandidates::new(completion::users))]
        user: Option<String>,
        /// A label instead of the key's comment.
        #[arg(long)]
        label: Option<String>,
    },
    /// Trust one no more, and end the connections that its certificates let in.
    Rm {
        /// Its number, as `mlad admin ca ls` shows it.
        id: i64,
    },
    /// Revoke certificates, and end the connections that they let in.
    Revoke(RevokeArguments),
    /// List what was revoked.
    Revocations,
    /// Withdraw a revocation.
    Restore {
        /// Its number, as `mlad admin ca revocations` shows it.
        id: i64,
    },
}

/// Certificates to revoke.
#[derive(Debug, Args)]
#[group(id = "certificates", required = true, multiple = true, args = ["serial", "key_id", "key"])]
pub(super) struct RevokeArguments {
    /// Those with this serial number; can be given several times.
    #[arg(long, value_name = "NUMBER")]
    serial: Vec<u64>,
    /// Those with this key id; can be given several times.
    #[arg(long, value_name = "ID")]
    key_id: Vec<String>,
    /// Those of this key: its fingerprint (SHA256:…); can be given several times.
    #[arg(long, value_name = "FINGERPRINT")]
    key: Vec<String>,
    /// Only those of the authority with this fingerprint [default: those of all].
    #[arg(long, value_name = "FINGERPRINT")]
    ca: Option<String>,
}

pub(super) async fn run(client: &Client, output: &Output, command: AuthorityCommand) -> Outcome {
    match command {
        AuthorityCommand::Ls => output.show(&client.authorities().await?, |list| authorities_table(list)),
        AuthorityCommand::Add { file, user, label } => {
            let public_key = own::read_public_key(&file)?;
            let added = client.add_authority(&NewCertificateAuthority { public_key, label, user }).await?;
            output.say(&added, |added| {
                let whom = added.user.as_deref().unwrap_or("everybody");
                format!("certificates of {} ({}) let in: {whom}", added.fingerprint, plain(&added.label))
            })
        }
        AuthorityCommand::Rm { id } => {
            client.remove_authority(id).await?;
            output.done("authority.remove", &id.to_string(), "trusted no more: authority")
        }
        AuthorityCommand::Revoke(arguments) => {
            let made = revoke(client, arguments).await?;
            output.say(&made, |made| {
                let count = made.len();
                format!("{count} {}", if count == 1 { "revocation holds" } else { "revocations hold" })
            })
        }
        AuthorityCommand::Revocations => output.show(&client.revocations().await?, |list| revocations_table(list)),
        AuthorityCommand::Restore { id } => {
            client.withdraw_revocation(id).await?;
            output.done("certificate.restore", &id.to_string(), "withdrew revocation")
        }
    }
}

async fn revoke(client: &Client, arguments: RevokeArguments) -> Result<Vec<Revocation>, CliError> {
    let RevokeArguments { serial, key_id, key, ca } = arguments;
    let serials = serial.into_iter().map(Revoked::Serial);
    let all = serials.chain(key_id.into_iter().map(Revoked::KeyId)).chain(key.into_iter().map(Revoked::Key));
    let mut made = Vec::new();
    for revoked in all {
        made.push(client.revoke(&NewRevocation { revoked, authority: ca.clone() }).await?);
    }
    Ok(made)
}

fn authorities_table(authorities: &[CertificateAuthority]) -> String {
    let now = Timestamp::now();
    let rows = authorities.iter().map(|authority| {
        [
            authority.id.to_string(),
            authority.fingerprint.clone(),
            authority.label.clone(),
            authority.user.clone().unwrap_or_else(|| "everybody".into()),
            ago(authority.created_at, now),
            authority.last_used_at.map_or_else(|| "never".into(), |time| ago(time, now)),
        ]
    });
    let head = ["ID", "FINGERPRINT", "LABEL", "FOR", "AGE", "USED"];
    output::table(head, rows.collect(), "no authorities: certificates let nobody in")
}

fn revocations_table(revocations: &[Revocation]) -> String {
    let now = Timestamp::now();
    let rows = revocations.iter().map(|revocation| {
        let (kind, value) = match &revocation.revoked {
            Revoked::Serial(serial) => ("serial", serial.to_string()),
            Revoked::KeyId(id) => ("key id", id.clone()),
            Revoked::Key(fingerprint) => ("key", fingerprint.clone()),
        };
        let authority = or_dash(revocation.authority.as_deref());
        [revocation.id.to_string(), kind.into(), value, authority, ago(revocation.created_at, now)]
    });
    output::table(["ID", "KIND", "VALUE", "AUTHORITY", "AGE"], rows.collect(), "nothing is revoked")
}
