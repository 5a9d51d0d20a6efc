//! `doctor`: looks for what is missing or broken, from inside a container or on the server, and says what
//! mends it.

use super::{
    Outcome,
    output::{self, Output},
};
use crate::{
    api::{ExitCode, Identity, Role},
    channel::API_SOCKET,
    client::{Client, ClientError, Endpoint},
};
use serde::Serialize;
use std::path::Path;

/// Least free space in a home, in bytes, below which things begin to fail.
const LITTLE_SPACE: u64 = 256 * 1024 * 1024;

/// One thing looked at.
#[derive(Debug, Serialize)]
struct Check {
    /// What.
    what: &'static str,
    /// Whether it is as it should be.
    ok: bool,
    /// What was found.
    found: String,
    /// What mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Check {
    fn good(what: &'static str, found: impl Into<String>) -> Self {
        Self { what, ok: true, found: found.into(), mend: None }
    }

    fn bad(what: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { what, ok: false, found: found.into(), mend: Some(mend.into()) }
    }

    fn of(what: &'static str, ok: bool, found: impl Into<String>, mend: &str) -> Self {
        if ok { Self::good(what, found) } else { Self::bad(what, found, mend) }
    }
}

pub(super) async fn run(api: Option<Endpoint>, token_file: Option<&Path>, output: &Output) -> Outcome {
    let mut checks = Vec::new();
    let identity = gateway(api, token_file, &mut checks).await;
    if Path::new(API_SOCKET).exists() {
        container(&mut checks);
    } else if identity.is_none_or(|identity| identity.role == Role::Admin) && rustix::process::getuid().is_root() {
        server(&mut checks);
    }
    let healthy = checks.iter().all(|check| check.ok);
    output.show(&checks, |checks| checks.iter().map(line).collect())?;
    Ok(if healthy { ExitCode::Success } else { ExitCode::Failure } as u8)
}

fn line(check: &Check) -> String {
    let mark = if check.ok { "ok  " } else { "FAIL" };
    let mend = check.mend.as_ref().map(|mend| format!("\n       -> {mend}")).unwrap_or_default();
    format!("{mark}  {}: {}{mend}\n", check.what, output::plain(&check.found))
}

async fn gateway(api: Option<Endpoint>, token_file: Option<&Path>, checks: &mut Vec<Check>) -> Option<Identity> {
    match ask(api, token_file).await {
        Ok((endpoint, identity)) => {
            let found = format!("{endpoint} answers; you are {} ({})", identity.user, output::word(&identity.role));
            checks.push(Check::good("gateway", found));
            Some(identity)
        }
        Err(error) => {
            let mend = match &error {
                ClientError::Unreachable { .. } => "on the server: start mlad-gateway and read its log",
                ClientError::Endpoint(_) => "run this in a container or on the server, or give --api",
                ClientError::Api(_) | ClientError::Answer { .. } => "check --api and --token-file",
            };
            checks.push(Check::bad("gateway", error.to_string(), mend));
            None
        }
    }
}

async fn ask(api: Option<Endpoint>, token_file: Option<&Path>) -> Result<(Endpoint, Identity), ClientError> {
    let endpoint = match api {
        Some(endpoint) => endpoint,
        None => Endpoint::from_environment()?,
    };
    let mut client = Client::new(endpoint.clone());
    if let Some(path) = token_file {
        client = client.with_token_file(path)?;
    }
    Ok((endpoint, client.whoami().await?))
}

/// What a user's container should have.
fn container(checks: &mut Vec<Check>) {
    let slice = std::env::var("NVIDIA_VISIBLE_DEVICES").unwrap_or_default();
    checks.push(match slice.as_str() {
        "" | "void" | "none" => Check::good("slice", "none (this workload asked for no GPU)"),
        "all" => Check::bad("slice", "all GPUs are visible", "tell your administrator: only one slice should be"),
        uuid => Check::good("slice", uuid),
    });
    let home = std::env::var("HOME").unwrap_or_else(|_| "/".into());
    match rustix::fs::statvfs(home.as_str()) {
        Ok(space) => {
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            let found = format!("{} MiB free in {home}", free / 1024 / 1024);
            checks.push(Check::of(
                "disk",
                free > LITTLE_SPACE,
                found,
                "remove what you do not need: du -xh ~ | sort -h | tail",
            ));
        }
        Err(error) => checks.push(Check::bad("disk", format!("{home}: {error}"), "tell your administrator")),
    }
}

/// What a server should have.
fn server(checks: &mut Vec<Check>) {
    let program = |name: &str| {
        ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/bin", "/usr/local/sbin"]
            .iter()
            .any(|folder| Path::new(folder).join(name).exists())
    };
    let engine = Path::new("/var/run/docker.sock").exists();
    checks.push(Check::of(
        "container engine",
        engine,
        if engine { "/var/run/docker.sock is there" } else { "/var/run/docker.sock is not there" },
        "apt-get install docker.io && systemctl start docker (or name another socket under [docker] in the settings)",
    ));
    let nft = program("nft");
    checks.push(Check::of(
        "nftables",
        nft,
        if nft { "nft is there" } else { "nft is missing" },
        "apt-get install nftables",
    ));
    let driver = Path::new("/proc/driver/nvidia/version").exists();
    checks.push(Check::of(
        "NVIDIA driver",
        driver,
        if driver { "loaded" } else { "not loaded" },
        "install NVIDIA's driver 525 or later; without GPUs give [allocator] a simulated machine",
    ));
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let overlay = filesystems.lines().any(|line| line.trim_end().ends_with("overlay"));
    checks.push(Check::of(
        "overlay file system",
        overlay,
        if overlay { "there" } else { "missing" },
        "modprobe overlay",
    ));
}
