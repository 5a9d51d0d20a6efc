//! GPUs of other machines, on the command line: `serve --nodes-listen`, `mlad-allocator node`, and
//! `mlad-allocator certificate`.

use anyhow::Context;
use clap::{Args, Subcommand};
use mlad_allocator::{
    AllocatorError, Gpus,
    remote::{Credentials, Daemon, DaemonSettings, LEASE, NodeSettings, issue, make_authority},
};
use serde::Deserialize;
use std::{io::Write, net::SocketAddr, path::PathBuf, time::Duration};
use tokio_util::sync::CancellationToken;

/// How daemons of other machines are heard. In the file these are the keys of `[nodes]`, without `nodes-`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NodeFlags {
    /// Where daemons of other machines connect to: ADDRESS:PORT [default: nowhere].
    #[arg(id = "nodes-listen", long = "nodes-listen", value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// The allocator's certificate for them.
    #[arg(id = "nodes-certificate", long = "nodes-certificate", value_name = "FILE")]
    certificate: Option<PathBuf>,
    /// The key of that certificate.
    #[arg(id = "nodes-key", long = "nodes-key", value_name = "FILE")]
    key: Option<PathBuf>,
    /// The certificate of the authority that signs for nodes.
    #[arg(id = "nodes-authority", long = "nodes-authority", value_name = "FILE")]
    authority: Option<PathBuf>,
    /// A node that may join; can be given several times [default: all that the authority signs for].
    #[arg(id = "nodes-allow", long = "nodes-allow", value_name = "NAME")]
    allow: Vec<String>,
    /// Seconds a node's lease lasts unless it is renewed: after so long without the allocator it ends what runs
    /// [default: 120].
    #[arg(id = "nodes-lease-seconds", long = "nodes-lease-seconds", value_name = "SECONDS")]
    lease_seconds: Option<u64>,
}

impl NodeFlags {
    /// These, and what another says where they are silent.
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            listen: self.listen.or(other.listen),
            certificate: self.certificate.or(other.certificate),
            key: self.key.or(other.key),
            authority: self.authority.or(other.authority),
            allow: if self.allow.is_empty() { other.allow } else { self.allow },
            lease_seconds: self.lease_seconds.or(other.lease_seconds),
        }
    }

    /// What they come to; none if nobody is to be heard.
    ///
    /// # Errors
    /// [`AllocatorError::Settings`] when something is missing or wrong.
    pub(crate) fn settings(self) -> Result<Option<NodeSettings>, AllocatorError> {
        let Some(listen) = self.listen else { return Ok(None) };
        let lease = self.lease_seconds.unwrap_or(LEASE.as_secs());
        if !(5..=86_400).contains(&lease) {
            return Err(AllocatorError::Settings("lease_seconds of [nodes] has to be from 5 to 86400".to_owned()));
        }
        let (Some(certificate), Some(key), Some(authority)) = (self.certificate, self.key, self.authority) else {
            let how = "certificate, key and authority (`mlad-allocator certificate` makes them)";
            return Err(AllocatorError::Settings(format!("[nodes] needs {how}")));
        };
        Ok(Some(NodeSettings {
            listen,
            credentials: Credentials { certificate, key, authority },
            allow: self.allow.into_iter().collect(),
            lease: Duration::from_secs(lease),
        }))
    }
}

/// Flags of `mlad-allocator node`.
#[derive(Debug, Args)]
pub(crate) struct DaemonFlags {
    /// Where the allocator hears nodes: HOST:PORT.
    #[arg(long, value_name = "ADDRESS")]
    allocator: String,
    /// The name of this machine, as in its certificate.
    #[arg(long)]
    node: String,
    /// The name in the allocator's certificate [default: the host's].
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    /// This machine's certificate.
    #[arg(long, value_name = "FILE")]
    certificate: PathBuf,
    /// The key of that certificate.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// The certificate of the authority.
    #[arg(long, value_name = "FILE")]
    authority: PathBuf,
    /// The GPUs: `system` for the system's NVML, or the path of a libnvidia-ml.so.
    #[arg(long, default_value = "system")]
    nvml: String,
    /// A folder for what has to be known after a restart of the daemon.
    #[arg(long, default_value = "/run/mlad-node", value_name = "FOLDER")]
    state: PathBuf,
    /// A program that ends every workload of MLAD on this machine, run when the node's lease has run out, beside
    /// killing what uses the GPUs.
    #[arg(long, value_name = "FILE")]
    stop_command: Option<PathBuf>,
}

/// Runs the daemon until `stop`.
pub(crate) async fn run(flags: &DaemonFlags, stop: CancellationToken) -> anyhow::Result<()> {
    let gpus = match flags.nvml.as_str() {
        "system" => Gpus::System,
        path => Gpus::Library(path.into()),
    };
    let daemon = Daemon::start(DaemonSettings {
        node: flags.node.clone(),
        allocator: flags.allocator.clone(),
        server_name: flags.server_name.clone(),
        credentials: Credentials {
            certificate: flags.certificate.clone(),
            key: flags.key.clone(),
            authority: flags.authority.clone(),
        },
        gpus,
        state: flags.state.clone(),
        stop_command: flags.stop_command.clone(),
    })?;
    daemon.run(stop).await;
    Ok(())
}

/// What `mlad-allocator certificate` does.
#[derive(Debug, Subcommand)]
pub(crate) enum CertificateCommand {
    /// Make an authority: its certificate for every machine, and its key, which stays where it is.
    Authority {
        /// The folder for authority.pem and authority.key.
        #[arg(long)]
        folder: PathBuf,
    },
    /// Sign a certificate for a node, or for the allocator.
    Issue {
        /// The name of the node, or the host name of the allocator.
        name: String,
        /// Further names or addresses under which it is reached; can be given several times.
        #[arg(long = "also", value_name = "NAME")]
        names: Vec<String>,
        /// The folder of the authority.
        #[arg(long, value_name = "FOLDER")]
        authority: PathBuf,
        /// The folder for NAME.pem and NAME.key.
        #[arg(long)]
        folder: PathBuf,
        /// Days the certificate is good for.
        #[arg(long, default_value_t = 398)]
        days: u16,
    },
}

/// Makes certificates, and prints where they are.
pub(crate) fn certificate(command: &CertificateCommand) -> anyhow::Result<()> {
    let made = match command {
        CertificateCommand::Authority { folder } => vec![make_authority(folder)?],
        CertificateCommand::Issue { name, names, authority, folder, days } => {
            issue(authority, name, names, *days, folder)?.into()
        }
    };
    let mut output = std::io::stdout();
    for path in made {
        writeln!(output, "{}", path.display()).context("standard output")?;
    }
    Ok(())
}
