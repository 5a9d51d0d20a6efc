//! What a job left in its `artifacts` folder: `/v1/jobs/{id}/artifacts`.

use super::{
    Rooms,
    caller::{Caller, Named},
    failure::{Answer, Failure},
    jobs::visible,
    range::{self, Range},
};
use crate::{
    config::Config,
    files::{self, FilesError, Limits},
    job::artifacts_folder,
    store::UserRecord,
};
use axum::{
    Json,
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use data_encoding::BASE64;
use futures::{Stream, stream};
use http_body_util::StreamBody;
use hyper::body::Frame;
use mlad::api::{Artifact, ArtifactList, JobId};
use sha2::{Digest as _, Sha256};
use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Component, Path, PathBuf},
    sync::Arc,
};
use utoipa_axum::{router::OpenApiRouter, routes};

/// Bytes sent at once.
const CHUNK: usize = 128 * 1024;
/// The trailer with the checksum of what was sent (RFC 9530).
const DIGEST: HeaderName = HeaderName::from_static("content-digest");

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new().routes(routes!(list_artifacts)).routes(routes!(get_artifact))
}

/// The files a job left.
#[utoipa::path(get, path = "/v1/jobs/{id}/artifacts", tag = "jobs", params(("id" = JobId, Path)), responses((status = 200, body = ArtifactList)))]
async fn list_artifacts(
    State(state): State<Rooms>,
    caller: Caller,
    Named(id): Named<JobId>,
) -> Answer<Json<ArtifactList>> {
    let record = visible(&state, &caller, id).await?;
    let owner = state.store.user_by_id(record.user_id).await?;
    let turn = state.listings.turn(owner.id).await;
    let config = Arc::clone(&state.config);
    let look = move || {
        // Kept until the thread is done, which it is not when the caller goes.
        let _turn = turn;
        look(&config, &owner, &artifacts_folder(id))
    };
    Ok(Json(ArtifactList { artifacts: tokio::task::spawn_blocking(look).await.map_err(io::Error::other)?? }))
}

fn look(config: &Config, owner: &UserRecord, folder: &Path) -> Answer<Vec<Artifact>> {
    let listed = match files::list_in_home(config, owner, folder, Limits::default()) {
        Err(FilesError::Path { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    // One whose name is not text can be fetched by sftp only.
    let named =
        |file: files::Listed| Some(Artifact { path: file.path.into_os_string().into_string().ok()?, size: file.size });
    Ok(listed.into_iter().filter_map(named).collect())
}

/// The content of one of them, or a range of it. A client that says `TE: trailers` gets the SHA-256 of what was
/// sent behind it, in the trailer `Content-Digest` (RFC 9530); if the file was written to meanwhile, and what was
/// sent may be of two minds, that trailer is missing.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/artifacts/{*path}", tag = "jobs",
    params(
        ("id" = JobId, Path),
        ("path" = String, Path, description = "Path below `artifacts`; may have slashes"),
        ("Range" = Option<String>, Header, description = "`bytes=FIRST-LAST`"),
        ("TE" = Option<String>, Header, description = "`trailers`: a checksum is to follow")
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
    let open = move || {
        let file = files::open_in_home(&config, &owner, &whole)?;
        let version = Version::of(&file)?;
        Answer::Ok((file, version))
    };
    let (file, version) = tokio::task::spawn_blocking(open).await.map_err(io::Error::other)??;
    serve(file, version, &headers)
}

fn serve(file: File, version: Version, headers: &HeaderMap) -> Answer<Response> {
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    let size = version.size;
    let (status, start, length) = match range::parse(range, size) {
        Range::Whole => (StatusCode::OK, 0, size),
        Range::Part { start, length } => (StatusCode::PARTIAL_CONTENT, start, length),
        Range::Beyond => {
            let headers = [(header::CONTENT_RANGE, format!("bytes */{size}"))];
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, headers).into_response());
        }
    };
    let digest = wants_trailers(headers).then(Sha256::new);
    // A trailer goes with chunks, and those without a length.
    let (framing, value) = match &digest {
        Some(_) => (header::TRAILER, HeaderValue::from_static("content-digest")),
        None => (header::CONTENT_LENGTH, length.into()),
    };
    let sending = Sending { file: Arc::new(file), version, offset: start, left: length, digest };
    let body = Body::new(StreamBody::new(sending.frames()));
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (header::ACCEPT_RANGES, HeaderValue::from_static("bytes")),
        (framing, value),
    ];
    let mut response = (status, headers, body).into_response();
    if status == StatusCode::PARTIAL_CONTENT {
        let last = start + length - 1;
        if let Ok(value) = format!("bytes {start}-{last}/{size}").parse() {
            response.headers_mut().insert(header::CONTENT_RANGE, value);
        }
    }
    Ok(response)
}

fn wants_trailers(headers: &HeaderMap) -> bool {
    let said = headers.get_all(header::TE).iter().filter_map(|value| value.to_str().ok());
    said.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case("trailers"))
}

/// What tells one content of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    size: u64,
    modified: (i64, i64),
}

impl Version {
    fn of(file: &File) -> io::Result<Self> {
        let status = file.metadata()?;
        Ok(Self { size: status.len(), modified: (status.mtime(), status.mtime_nsec()) })
    }
}

/// A file on its way. It is read and summed in one go, at the pace of whoever takes it, and not at all when they
/// have gone.
struct Sending {
    file: Arc<File>,
    version: Version,
    offset: u64,
    left: u64,
    /// None if no checksum is wanted, or it was sent.
    digest: Option<Sha256>,
}

impl Sending {
    fn frames(self) -> impl Stream<Item = io::Result<Frame<Bytes>>> + Send + 'static {
        stream::try_unfold(self, |this| async move {
            tokio::task::spawn_blocking(move || this.frame()).await.map_err(io::Error::other)?
        })
    }

    fn frame(mut self) -> io::Result<Option<(Frame<Bytes>, Self)>> {
        let mut chunk = vec![0; usize::try_from(self.left).map_or(CHUNK, |left| left.min(CHUNK))];
        let count = read_at(&self.file, &mut chunk, self.offset)?;
        chunk.truncate(count);
        if count > 0 {
            if let Some(digest) = &mut self.digest {
                digest.update(&chunk);
            }
            self.offset += count as u64;
            self.left -= count as u64;
            return Ok(Some((Frame::data(chunk.into()), self)));
        }
        if self.left > 0 && self.digest.is_none() {
            return Err(io::Error::other("the file has become shorter while it was sent"));
        }
        let Some(digest) = self.digest.take() else { return Ok(None) };
        if self.left > 0 || Version::of(&self.file)? != self.version {
            return Ok(None);
        }
        let value = format!("sha-256=:{}:", BASE64.encode(&digest.finalize()));
        let trailers = HeaderMap::from_iter([(DIGEST, HeaderValue::try_from(value).map_err(io::Error::other)?)]);
        Ok(Some((Frame::trailers(trailers), self)))
    }
}

fn read_at(file: &File, chunk: &mut [u8], offset: u64) -> io::Result<usize> {
    loop {
        match file.read_at(chunk, offset) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
