//! The gateway program: its life on one page.

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use mlad::api::ExitCode;
use mlad_allocator::{
    Allocate, Embedded, Gpus, QueueSettings, Settings,
    service::{HttpAllocator, Token},
};
use mlad_gateway::{
    api::{self, ApiState, ControlHub, Rooms},
    config::{self, Config, ConfigError},
    files,
    image::Catalog,
    job::Jobs,
    quota::Quotas,
    runtime::{Docker, Kubernetes, Runtime},
    ssh::{self, Gateway, SshState},
    store::Store,
    workspace::Workspaces,
};
use std::{
    fs::File,
    io::{IsTerminal as _, Write as _},
    net::SocketAddr,
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing_subscriber::EnvFilter;

/// SSH server, HTTP API and controllers of MLAD.
#[derive(Debug, Parser)]
#[command(name = "mlad-gateway", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM; workloads go on without the gateway. SIGHUP has the settings of SSH read anew.
    Serve {
        /// The settings.
        #[arg(long, default_value = "/etc/mlad/gateway.toml", value_name = "FILE")]
        config: PathBuf,
        /// Write the log as JSON lines.
        #[arg(long)]
        json_log: bool,
    },
    /// Read the settings and say what is wrong with them.
    CheckConfig {
        /// The settings.
        #[arg(long, default_value = "/etc/mlad/gateway.toml", value_name = "FILE")]
        config: PathBuf,
    },
    /// Print the OpenAPI document of the HTTP API.
    Openapi,
}

/// Time for everything to end after the last connection.
const DRAIN: Duration = Duration::from_secs(20);

fn main() -> std::process::ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    // Before anything else: a worker must be alone in its process when it gives up its rights.
    if arguments.next().is_some_and(|first| first == files::WORKER) {
        return files::worker::main(arguments);
    }
    let result = match Arguments::parse().command {
        Command::Serve { config, json_log } => serve(config, json_log),
        Command::CheckConfig { config } => check(&config),
        Command::Openapi => print_openapi(),
    };
    match result {
        Ok(()) => ExitCode::Success.into(),
        Err(error) => {
            eprintln!("mlad-gateway: {error:#}");
            if error.is::<ConfigError>() { ExitCode::Usage.into() } else { ExitCode::Failure.into() }
        }
    }
}

#[tokio::main]
async fn serve(path: PathBuf, json_log: bool) -> anyhow::Result<()> {
    let config = Arc::new(Config::read(&path)?);
    log(json_log);
    for doubt in config.doubts() {
        tracing::warn!("{doubt}");
    }
    ssh::raise_descriptor_limit(&config.ssh);
    config::make_folders(&config).context("the folders of the settings cannot be made")?;
    let _lock = lock(&config)?;
    let stop = stop_on_signal()?;
    let settings = reload_on_signal(path, Arc::clone(&config))?;
    ssh::make_host_keys(&config.data_directory)?;
    // Callers wait from here on; should an address be taken, nothing has been begun.
    let Listeners { ssh: listeners, tcp, admin } = listen(&config).await?;
    let store = Store::open(&config.data_directory.join("gateway.db")).await.context("gateway.db")?;
    let (allocator, embedded) = allocator(&config).await.context("the allocator cannot start")?;
    let runtime = runtime(&config).await?;
    let catalog = Arc::new(Catalog::load(&config, store.clone())?);
    let hub = ControlHub::new(Arc::clone(&runtime));
    let workspaces = Workspaces::start(
        Arc::clone(&config),
        store.clone(),
        Arc::clone(&allocator),
        Arc::clone(&runtime),
        Arc::clone(&catalog),
        Arc::new(hub.clone()),
    )
    .await?;
    let jobs = Jobs::start(
        Arc::clone(&config),
        store.clone(),
        Arc::clone(&allocator),
        Arc::clone(&runtime),
        Arc::clone(&catalog),
        Arc::new(hub.clone()),
    )
    .await?;
    let quotas = Quotas::start(store.clone(), Arc::clone(&allocator));
    let rooms =
        Rooms::new(Arc::clone(&config), store.clone(), allocator, runtime, catalog, workspaces.clone(), jobs.clone());
    let state = ApiState::new(rooms);
    hub.serve(state.clone());

    let servers = TaskTracker::new();
    servers.spawn(api::serve_admin(state.clone(), admin, stop.clone()));
    if let Some(tcp) = tcp {
        servers.spawn(api::serve_tcp(state.clone(), tcp, stop.clone()));
    }
    let backend = Arc::new(Gateway::new(Arc::clone(&config), store.clone(), workspaces.clone(), state));
    let served = ssh::serve(SshState { config: settings, store, backend }, listeners, stop.clone()).await;

    tracing::info!("ending; workloads go on");
    stop.cancel();
    servers.close();
    let ending = async {
        jobs.shutdown().await;
        servers.wait().await;
        hub.shutdown().await;
        workspaces.shutdown().await;
        quotas.shutdown().await;
        if let Some(embedded) = embedded {
            embedded.stop().await;
        }
    };
    if tokio::time::timeout(DRAIN, ending).await.is_err() {
        tracing::warn!("not everything ended in time; the next start takes it up");
    }
    Ok(served?)
}

fn check(path: &Path) -> anyhow::Result<()> {
    let config = Config::read(path)?;
    // The catalog belongs to the settings: what is wrong with it is to be known before the start, too.
    Catalog::check(&config)?;
    Ok(())
}

fn print_openapi() -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{}", api::openapi().to_pretty_json()?)?;
    Ok(())
}

/// One gateway a data folder: held until the process ends, however it does.
fn lock(config: &Config) -> anyhow::Result<File> {
    let path = config.data_directory.join("gateway.lock");
    let file = File::options().create(true).append(true).open(&path).with_context(|| path.display().to_string())?;
    file.try_lock().with_context(|| format!("{}: another gateway serves this folder", path.display()))?;
    Ok(file)
}

fn log(json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if json { lines.json().init() } else { lines.with_ansi(std::io::stderr().is_terminal()).init() }
}

/// What runs containers: the cluster of the settings, or Docker.
async fn runtime(config: &Config) -> anyhow::Result<Arc<dyn Runtime>> {
    Ok(match &config.kubernetes {
        Some(cluster) => Arc::new(Kubernetes::connect(config, cluster).await?),
        None => Arc::new(Docker::connect(config).await?),
    })
}

/// The allocator the settings name; and, if it runs in this process, what ends it.
async fn allocator(config: &Config) -> anyhow::Result<(Arc<dyn Allocate>, Option<Arc<Embedded>>)> {
    if let Some(url) = &config.allocator.url {
        let token = config.allocator.token_file.as_deref().map(Token::read).transpose()?;
        let there = HttpAllocator::new(url, token.as_ref())?.on_node(config.allocator.node.clone());
        return Ok((Arc::new(there), None));
    }
    let mut settings = Settings::new(
        config.data_directory.join("allocator.db"),
        config.allocator.node_name.clone().unwrap_or_else(node_name),
    );
    if let Some(library) = &config.allocator.nvml_library {
        settings.gpus = Gpus::Library(library.clone());
    }
    if let Some(seconds) = config.allocator.lease_seconds {
        settings.lease = Duration::from_secs(seconds);
    }
    settings.policy = config.allocator.policy.unwrap_or_default();
    settings.objective = config.allocator.objective.unwrap_or_default();
    settings.queue = queue_settings(&config.allocator);
    let embedded = Embedded::start(settings).await?;
    Ok((Arc::clone(&embedded) as _, Some(embedded)))
}

/// The name of this machine.
fn node_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

struct Listeners {
    ssh: Vec<TcpListener>,
    tcp: Option<TcpListener>,
    admin: UnixListener,
}

async fn listen(config: &Config) -> anyhow::Result<Listeners> {
    let mut ssh = Vec::new();
    for address in &config.ssh.listen {
        ssh.push(bind("ssh.listen", *address).await?);
    }
    let tcp = match config.api.listen {
        Some(address) => Some(bind("api.listen", address).await?),
        None => None,
    };
    let path = config.admin_socket();
    let admin = api::bind_admin(&path).with_context(|| format!("{} cannot be made", path.display()))?;
    Ok(Listeners { ssh, tcp, admin })
}

async fn bind(key: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("{key}: {address} cannot be listened on"))
}

/// Cancelled by SIGTERM or SIGINT.
fn stop_on_signal() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let cancelled = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        cancelled.cancel();
    });
    Ok(stop)
}

/// The settings, read anew at every SIGHUP. What cannot change while the gateway runs stays as it is, and is said; a
/// file that is wrong changes nothing.
fn reload_on_signal(path: PathBuf, config: Arc<Config>) -> anyhow::Result<watch::Receiver<Arc<Config>>> {
    let mut hangup = signal(SignalKind::hangup())?;
    let (settings, followers) = watch::channel(config);
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            let new = match Config::read(&path) {
                Ok(new) => new,
                Err(error) => {
                    tracing::error!(%error, "the settings stay as they are");
                    continue;
                }
            };
            let (now, later) = settings.borrow().reloaded(new);
            for key in later {
                tracing::warn!(key, "this setting has changed, and holds from the next start only");
            }
            ssh::raise_descriptor_limit(&now.ssh);
            settings.send_replace(Arc::new(now));
        }
    });
    Ok(followers)
}

/// How the allocator in this process serves those who wait.
fn queue_settings(config: &mlad_gateway::config::Allocator) -> QueueSettings {
    let usual = QueueSettings::default();
    let time = |count: Option<u32>, unit: u64, usual: Duration| {
        count.map_or(usual, |count| Duration::from_secs(u64::from(count) * unit))
    };
    QueueSettings {
        backfill: config.backfill.unwrap_or_default(),
        half_life: time(config.half_life_days.map(NonZeroU32::get), 86_400, usual.half_life),
        patience: time(config.patience_hours, 3600, usual.patience),
        notice: time(config.notice_seconds, 1, usual.notice),
    }
}
