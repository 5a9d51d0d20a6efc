//! Shell completion, with names that live on the gateway.

use super::{Outcome, output::print_text};
use crate::client::{Client, JobQuery};
use clap::ValueEnum;
use clap_complete::CompletionCandidate;
use std::time::Duration;

/// Longest time a completion may take: somebody has just pressed a key.
const PATIENCE: Duration = Duration::from_millis(800);

/// Shells that can complete.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Shell {
    /// GNU Bash.
    Bash,
    /// Z shell.
    Zsh,
    /// fish.
    Fish,
}

/// What goes into the shell's start-up file.
pub(super) fn print(shell: Shell) -> Outcome {
    print_text(match shell {
        Shell::Bash => "source <(COMPLETE=bash mlad)\n",
        Shell::Zsh => "source <(COMPLETE=zsh mlad)\n",
        Shell::Fish => "COMPLETE=fish mlad | source\n",
    })?;
    super::DONE
}

/// Numbers of the caller's latest jobs, with their names.
pub(super) fn job_ids() -> Vec<CompletionCandidate> {
    let query = JobQuery { all: true, limit: Some(50), ..JobQuery::default() };
    ask(async move |client| {
        let jobs = client.jobs(&query).await.ok()?.jobs;
        Some(
            jobs.into_iter()
                .map(|job| CompletionCandidate::new(job.id.to_string()).help(Some(job.name.into())))
                .collect(),
        )
    })
}

/// Names of the images.
pub(super) fn images() -> Vec<CompletionCandidate> {
    ask(async |client| {
        let images = client.images().await.ok()?.images;
        Some(
            images
                .into_iter()
                .map(|image| CompletionCandidate::new(image.name).help(Some(image.description.into())))
                .collect(),
        )
    })
}

/// Names of the caller's workspaces.
pub(super) fn workspaces() -> Vec<CompletionCandidate> {
    ask(async |client| {
        let workspaces = client.workspaces(false).await.ok()?.workspaces;
        Some(workspaces.into_iter().map(|workspace| CompletionCandidate::new(workspace.name)).collect())
    })
}

/// Names of the caller's projects.
pub(super) fn projects() -> Vec<CompletionCandidate> {
    ask(async |client| {
        let projects = client.projects().await.ok()?.projects;
        Some(projects.into_iter().map(|project| CompletionCandidate::new(project.name)).collect())
    })
}

/// Names of users (administrators).
pub(super) fn users() -> Vec<CompletionCandidate> {
    ask(async |client| {
        let users = client.users().await.ok()?.users;
        Some(users.into_iter().map(|user| CompletionCandidate::new(user.name)).collect())
    })
}

/// Asks the gateway; no answer in time means no candidates, never an error in somebody's prompt.
fn ask(question: impl AsyncFnOnce(Client) -> Option<Vec<CompletionCandidate>>) -> Vec<CompletionCandidate> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return Vec::new() };
    let Ok(client) = Client::from_environment() else { return Vec::new() };
    runtime
        .block_on(async { tokio::time::timeout(PATIENCE, question(client)).await.ok().flatten().unwrap_or_default() })
}
