//! What a job left in its `artifacts` folder: `/v1/jobs/{id}/artifacts`.

use super::{
    Rooms,
    caller::{Caller, Named},
    failure::{Answer, Failure},
    jobs::visible,
    range::{self, Range},
};
use crate::{
    files::{self, FilesError, Limits},
    job::artifacts_folder,
    store::UserRecord,
};
use axum::{
    Json,
    body::Body,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use mlad::api::{Artifact, ArtifactList, ErrorCode, JobId};
use std::{
    fs::File,
    io::{self, Seek as _},
    path::{Component, Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::io::AsyncReadExt as _;
use tokio_util::io::ReaderStream;
use utoipa_axum::{router::OpenApiRouter, routes};

/// Bytes sent at once.
const CHUNK: usize = 128 * 1024;
/// Bytes of all artifacts of a job whose checksums are counted: beyond that it would be a matter of hours.
const MAX_BYTES: u64 = 1 << 40;

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new().routes(routes!(list_artifacts)).routes(routes!(get_artifact))
}

/// The files a job left, with their checksums.
#[utoipa::path(get, path = "/v1/jobs/{id}/artifacts", tag = "jobs", params(("id" = JobId, Path)), responses((status = 200, body = ArtifactList)))]
async fn list_artifacts(
    State(state): State<Rooms>,
    caller: Caller,
    Named(id): Named<JobId>,
) -> Answer<Json<ArtifactList>> {
    let record = visible(&state, &caller, id).await?;
    let owner = state.store.user_by_id(record.user_id).await?;
    // One listing at a time for a user: it reads everything there is.
    let _turn = state.listings.turn(owner.id).await;
    let given_up = GivenUp::default();
    let stop = Arc::clone(&given_up.0);
    let config = Arc::clone(&state.config);
    let folder = artifacts_folder(id);
    let listed = tokio::task::spawn_blocking(move || look(&config, &owner, &folder, &stop)).await;
    drop(given_up);
    Ok(Json(ArtifactList { artifacts: listed.map_err(|error| Failure::from(io::Error::other(error)))?? }))
}

/// Set when the caller has gone: what is counted for them need not be counted to the end.
#[derive(Default)]
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn look(config: &crate::config::Config, owner: &UserRecord, folder: &Path, stop: &AtomicBool) -> Answer<Vec<Artifact>> {
    let listed = match files::list_in_home(config, owner, folder, Limits::default()) {
        Err(FilesError::Path { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    if listed.iter().map(|file| file.size).fold(0_u64, u64::saturating_add) > MAX_BYTES {
        let message = "the artifacts are larger than 1 TiB: no checksums are counted over them";
        return Err(Failure::new(ErrorCode::Conflict, message).hint("fetch them by sftp"));
    }
    let mut artifacts = Vec::new();
    for file in listed {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        // One whose name is not text can be fetched by sftp only; one that has just vanished is left out.
        let Some(path) = file.path.to_str() else { continue };
        let Ok(open) = files::open_in_home(config, owner, &folder.join(&file.path)) else { continue };
        let size = open.metadata()?.len();
        artifacts.push(Artifact { path: path.into(), size, sha256: files::checksum(&open)? });
    }
    Ok(artifacts)
}

/// The content of one of them, or a range of it.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/artifacts/{*path}", tag = "jobs",
    params(
        ("id" = JobId, Path),
        ("path" = String, Path, description = "Path below `artifacts`; may have slashes"),
        ("Range" = Option<String>, Header, description = "`bytes=FIRST-LAST`")
    ),
    responses(
        (status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 206, body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 416, description = "No byte of the range is there")
    )
)]
async fn get_artifact(
    State(state): State<Rooms>,
    caller: Caller,
    Named((id, path)): Named<(JobId, String)>,
    headers: HeaderMap,
) -> Answer<Response> {
    let record = visible(&state, &caller, id).await?;
    let owner = state.store.user_by_id(record.user_id).await?;
    let relative = PathBuf::from(&path);
    if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(Failure::not_found("artifact", path));
    }
    let config = Arc::clone(&state.config);
    let whole = artifacts_folder(id).join(relative);
    let open =
        move || files::open_in_home(&config, &owner, &whole).map(|file| (file.metadata().map(|m| m.len()), file));
    let (size, file) = tokio::task::spawn_blocking(open).await.map_err(io::Error::other)??;
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    serve(file, size?, range)
}

fn serve(mut file: File, size: u64, range: Option<&str>) -> Answer<Response> {
    let (status, start, length) = match range::parse(range, size) {
        Range::Whole => (StatusCode::OK, 0, size),
        Range::Part { start, length } => (StatusCode::PARTIAL_CONTENT, start, length),
        Range::Beyond => {
            let headers = [(header::CONTENT_RANGE, format!("bytes */{size}"))];
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, headers).into_response());
        }
    };
    file.seek(io::SeekFrom::Start(start))?;
    let body = ReaderStream::with_capacity(tokio::fs::File::from_std(file).take(length), CHUNK);
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, length.to_string()),
        (header::ACCEPT_RANGES, "bytes".to_owned()),
    ];
    let mut response = (status, headers, Body::from_stream(body)).into_response();
    if status == StatusCode::PARTIAL_CONTENT {
        let last = start + length - 1;
        if let Ok(value) = format!("bytes {start}-{last}/{size}").parse() {
            response.headers_mut().insert(header::CONTENT_RANGE, value);
        }
    }
    Ok(response)
}
