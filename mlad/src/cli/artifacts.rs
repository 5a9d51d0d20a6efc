//! `get`: fetches what a job left, checks it, and puts it in place whole or not at all.

use super::{
    CliError, Outcome, bad_request, completion,
    follow::{self, Patience},
    output::{Output, plain},
};
use crate::{
    api::{Artifact, JobId},
    client::{Client, ClientError, Digest},
};
use clap::Args;
use clap_complete::ArgValueCandidates;
use sha2::{Digest as _, Sha256};
use std::{
    fs, io,
    io::Write as _,
    path::{Component, Path, PathBuf},
};

/// What to fetch, and whereto.
#[derive(Debug, Args)]
pub(super) struct GetArguments {
    /// The job's number.
    #[arg(add = ArgValueCandidates::new(completion::job_ids))]
    id: JobId,
    /// Folder to put the files in; made if it is absent [default: job-ID].
    folder: Option<PathBuf>,
    /// Only list the files.
    #[arg(long)]
    list: bool,
}

pub(super) async fn get(client: &Client, output: &Output, arguments: GetArguments) -> Outcome {
    let GetArguments { id, folder, list } = arguments;
    let mut patience = Patience::of_a_person();
    let artifacts = follow::persist(&mut patience, || client.artifacts(id)).await?;
    if !list {
        let folder = folder.unwrap_or_else(|| PathBuf::from(format!("job-{id}")));
        for artifact in &artifacts.artifacts {
            fetch(client, &mut patience, id, artifact, &folder).await?;
        }
    }
    output.show(&artifacts, |list| {
        list.artifacts.iter().map(|artifact| format!("{:>12}  {}\n", artifact.size, plain(&artifact.path))).collect()
    })
}

async fn fetch(
    client: &Client,
    patience: &mut Patience,
    id: JobId,
    artifact: &Artifact,
    folder: &Path,
) -> Result<(), CliError> {
    let target = folder.join(inside(&artifact.path)?);
    let parent = target.parent().unwrap_or(folder);
    fs::create_dir_all(parent).map_err(|source| failed("making", parent, source))?;
    let part = part_name(&target);
    let result = write(client, patience, id, artifact, &part).await;
    let result = result.and_then(|()| fs::rename(&part, &target).map_err(|source| failed("writing", &target, source)));
    if result.is_err() {
        drop(fs::remove_file(&part));
    }
    result
}

async fn write(
    client: &Client,
    patience: &mut Patience,
    id: JobId,
    artifact: &Artifact,
    part: &Path,
) -> Result<(), CliError> {
    let mut file = fs::File::create(part).map_err(|source| failed("making", part, source))?;
    let mut answer = follow::persist(patience, || client.artifact(id, &artifact.path)).await?;
    let mut hash = Sha256::new();
    while let Some(bytes) = answer.next().await? {
        hash.update(&bytes);
        file.write_all(&bytes).map_err(|source| failed("writing", part, source))?;
    }
    file.sync_all().map_err(|source| failed("writing", part, source))?;
    let wrong = match answer.digest() {
        Digest::Sum(sum) if sum == hash.finalize().as_slice() => return Ok(()),
        // Whoever stands between passes no checksum on; that it is all of one answer is known by its length.
        Digest::NotPromised => return Ok(()),
        Digest::Sum(_) => "was damaged on its way",
        Digest::Missing => "was written to while it was fetched",
    };
    Err(CliError::Client(ClientError::Answer {
        endpoint: client.endpoint().to_string(),
        reason: format!("{} {wrong}; fetch it again", plain(&artifact.path)),
    }))
}

/// A path that stays below the folder it is joined to, whatever the other side says.
fn inside(path: &str) -> Result<&Path, CliError> {
    let relative = Path::new(path);
    let stays = !path.is_empty() && relative.components().all(|part| matches!(part, Component::Normal(_)));
    if stays { Ok(relative) } else { Err(bad_request(format!("the file name {} is refused", plain(path)))) }
}

fn part_name(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    target.with_file_name(name)
}

fn failed(doing: &str, path: &Path, source: io::Error) -> CliError {
    CliError::Io { doing: format!("{doing} {}", path.display()), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_folder() {
        for path in ["a", "a/b.txt", "..a", "a/..b"] {
            assert!(inside(path).is_ok(), "{path}");
        }
        for path in ["", "/etc/passwd", "../a", "a/../../b", "./a"] {
            assert!(inside(path).is_err(), "{path}");
        }
    }
}
