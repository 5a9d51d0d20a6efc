//! The allocator as a service of its own: `mlad-allocator serve`; how good its policies are:
//! `mlad-allocator simulate`; whether a ledger is as it must be: `mlad-allocator check`; the daemon of a machine with
//! GPUs: `mlad-allocator node`.

mod check;
mod config;
mod nodes;
mod simulate;

use anyhow::Context;
use clap::{Parser, Subcommand};
use config::{Config, Flags};
use mlad_allocator::{
    Allocate, AllocatorError, Embedded,
    service::{self, Listener, Token},
};
use std::{io::Write, process::ExitCode, sync::Arc, time::Duration};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Who holds which slice of which GPU: MLAD's allocator as a service.
#[derive(Parser)]
#[command(name = "mlad-allocator", version, max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the GPUs of this machine to gateways.
    Serve(Flags),
    /// Simulate requests for GPUs and tell how many each placement policy accepts.
    Simulate(simulate::Flags),
    /// Check the ledger in a database: that no slice ever had two holders, limits held, fences grew. Exit code 1
    /// if not.
    Check(check::Flags),
    /// Serve the GPUs of this machine to an allocator elsewhere.
    Node(nodes::DaemonFlags),
    /// Make the certificates by which nodes and the allocator know each other.
    #[command(subcommand)]
    Certificate(nodes::CertificateCommand),
}

/// How long what still runs may take when everything has been stopped.
const LEFT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let ended = match &command {
        Command::Simulate(flags) => simulate::run(flags).map(|()| true),
        Command::Serve(flags) => on_threads(async { run(flags).await.map(|()| true) }),
        Command::Check(flags) => on_threads(check::run(flags)),
        Command::Node(flags) => on_threads(async { nodes::run(flags, stopped()?).await.map(|()| true) }),
        Command::Certificate(command) => nodes::certificate(command).map(|()| true),
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mlad-allocator: {error:#}");
            let settings = matches!(error.downcast_ref(), Some(AllocatorError::Settings(_)));
            ExitCode::from(if settings { 2 } else { 1 })
        }
    }
}

fn on_threads<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Runtime::new().context("the system gives no threads")?;
    let ended = runtime.block_on(work);
    // Not waited for without end: a call of the driver may never return.
    runtime.shutdown_timeout(LEFT);
    ended
}

async fn run(flags: &Flags) -> anyhow::Result<()> {
    let config = Config::read(flags)?;
    let token = config.token_file.as_deref().map(Token::read).transpose()?;
    config.check()?;
    // Before anything that takes time, so that no signal is missed.
    let stop = stopped()?;
    let allocator = tokio::select! {
        started = Embedded::start(config.settings()?) => started?,
        // It may be waiting for a GPU that does not answer; what it has begun, it does again at the next start.
        () = stop.cancelled() => return Ok(()),
    };
    let listener = Listener::bind(&config.listen).await?;
    let url = listener.url();
    tracing::info!(url, "serving");
    // For whoever started us and waits: one line, once we can be reached.
    writeln!(std::io::stdout(), "serving {url}").context("standard output")?;
    if let Some(address) = allocator.nodes_address() {
        writeln!(std::io::stdout(), "nodes {address}").context("standard output")?;
    }
    let serving: Arc<dyn Allocate> = Arc::clone(&allocator) as _;
    service::serve(serving, listener, token, stop).await;
    allocator.stop().await;
    tracing::info!("stopped");
    Ok(())
}

/// A token that is cancelled by the first SIGTERM or SIGINT.
fn stopped() -> anyhow::Result<CancellationToken> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let told = stop.clone();
    // Ends with the program.
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tracing::info!("stopping: calls under way are answered first");
        told.cancel();
    });
    Ok(stop)
}
