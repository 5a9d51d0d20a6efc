//! The allocator as a service of its own: `mlad-allocator serve`; and how good its policies are:
//! `mlad-allocator simulate`.

mod config;
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
}

/// How long what still runs may take when everything has been stopped.
const LEFT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let ended = match &command {
        Command::Simulate(flags) => simulate::run(flags),
        Command::Serve(flags) => {
            let runtime = match tokio::runtime::Runtime::new() {
                Ok(runtime) => runtime,
                Err(error) => {
                    eprintln!("mlad-allocator: the system gives no threads: {error}");
                    return ExitCode::FAILURE;
                }
            };
            let ended = runtime.block_on(run(flags));
            // Not waited for without end: a call of the driver may never return.
            runtime.shutdown_timeout(LEFT);
            ended
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mlad-allocator: {error:#}");
            let settings = matches!(error.downcast_ref(), Some(AllocatorError::Settings(_)));
            ExitCode::from(if settings { 2 } else { 1 })
        }
    }
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
