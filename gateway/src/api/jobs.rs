//! Jobs: `/v1/jobs`.

use super::{
    Rooms,
    caller::{Account, Asked, Body, Caller, Named},
    failure::{Answer, Failure},
};
use crate::{
    job::{AttemptName, JobError, Origin},
    store::{JobFilter, JobRecord},
};
use axum::{
    Json,
    body::Body as HttpBody,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use futures::TryStreamExt as _;
use mlad::api::{ErrorCode, Identity, Job, JobId, JobList, JobSpec, JobState, JobSubmitted};
use serde::Deserialize;
use std::{io, time::Duration};
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

/// Jobs in a list that names no number.
const LIST: u32 = 100;
/// Most jobs in a list.
const MAX_LIST: u32 = 1000;
/// Longest wait of one call, in seconds: callers ask again.
const MAX_WAIT: u64 = 60;
/// Largest offset into a file: the kernel knows none beyond.
const MAX_OFFSET: u64 = i64::MAX.unsigned_abs();

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new()
        .routes(routes!(list_jobs, submit_job))
        .routes(routes!(get_job))
        .routes(routes!(cancel_job))
        .routes(routes!(hold_job))
        .routes(routes!(release_job))
        .routes(routes!(wait_for_job))
        .routes(routes!(get_job_log))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    /// Those that have ended too; without it, and without `state`, only those that have not.
    #[serde(default)]
    all: bool,
    /// Those in one of these states only, separated by commas.
    state: Option<String>,
    /// Those of this user, `*` for everybody's: for administrators. The caller's own if absent.
    user: Option<String>,
    /// At most so many: 1 to 1,000, 100 if absent.
    limit: Option<u32>,
    /// Those with a smaller number than this.
    before: Option<JobId>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct WaitQuery {
    /// Longest time the call is held, in seconds: at most 60, 30 if absent.
    timeout_seconds: Option<u64>,
    /// The state the caller knows: the call ends when the job is not in it any more, not only at the job's end.
    seen: Option<JobState>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct LogQuery {
    /// Byte to begin with, at most 2⁶³ − 1; 0 if absent.
    #[serde(default)]
    offset: u64,
    /// Whether to go on until the job has ended.
    #[serde(default)]
    follow: bool,
}

/// Jobs, newest first.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", params(ListQuery), responses((status = 200, body = JobList)))]
async fn list_jobs(
    State(state): State<Rooms>,
    caller: Caller,
    Asked(query): Asked<ListQuery>,
) -> Answer<Json<JobList>> {
    let limit = query.limit.unwrap_or(LIST).clamp(1, MAX_LIST);
    let states = match &query.state {
        Some(words) => parse_states(words)?,
        None if query.all => Vec::new(),
        None => STATES.into_iter().filter(|state| !state.has_ended()).collect(),
    };
    let user_id = owner_filter(&state, &caller, query.user.as_deref()).await?;
    // One more, to know whether there are more.
    let filter = JobFilter { user_id, states, before: query.before, limit: limit + 1 };
    let mut jobs = state.jobs.list(&filter).await?;
    let more = jobs.len() > limit as usize;
    jobs.truncate(limit as usize);
    let next_before = jobs.last().map(|job| job.id).filter(|_| more);
    Ok(Json(JobList { jobs, next_before }))
}

const STATES: [JobState; 11] = [
    JobState::Held,
    JobState::Blocked,
    JobState::Queued,
    JobState::Starting,
    JobState::Running,
    JobState::Collecting,
    JobState::Lost,
    JobState::Cancelling,
    JobState::Succeeded,
    JobState::Failed,
    JobState::Cancelled,
];

fn parse_states(words: &str) -> Answer<Vec<JobState>> {
    let parse = |word: &str| {
        STATES.into_iter().find(|state| crate::job::word(*state) == word).ok_or_else(|| {
            let known = STATES.map(crate::job::word).join(", ");
            Failure::new(ErrorCode::BadRequest, format!("a job cannot be {word:?}; it can be: {known}"))
        })
    };
    words.split(',').take(STATES.len()).map(parse).collect()
}

/// Whose things are meant; none for everybody's.
pub(super) async fn owner_filter(state: &Rooms, caller: &Caller, user: Option<&str>) -> Answer<Option<i64>> {
    let name = user.unwrap_or(&caller.0.user);
    let root = user.is_none() && caller.0.user == super::caller::ROOT;
    if caller.is_admin() && (name == "*" || root) {
        return Ok(None);
    }
    if !caller.may_see(name) {
        return Err(Failure::new(ErrorCode::Denied, "only an administrator sees what belongs to others"));
    }
    Ok(Some(state.store.user_by_name(name).await?.id))
}

/// Hands in a job. When this answers it is accepted and survives any crash.
#[utoipa::path(post, path = "/v1/jobs", tag = "jobs", request_body = JobSpec, responses((status = 201, body = JobSubmitted)))]
async fn submit_job(
    State(state): State<Rooms>,
    account: Account,
    Body(spec): Body<JobSpec>,
) -> Answer<(StatusCode, Json<JobSubmitted>)> {
    let origin = origin(&state, &account.identity).await?;
    let id = state.jobs.submit(&account.user, spec, origin).await?;
    Ok((StatusCode::CREATED, Json(JobSubmitted { id })))
}

/// Image and slice of the workspace or job that calls.
async fn origin(state: &Rooms, identity: &Identity) -> Answer<Origin> {
    let Some(workload) = &identity.workload else { return Ok(Origin::default()) };
    if let Ok(name) = workload.parse::<AttemptName>() {
        let job = state.jobs.record(name.job).await?;
        return Ok(Origin { image: job.spec.image, need: job.spec.need, project: job.spec.project });
    }
    let workspaces = state.workspaces.list(Some(&identity.user)).await?;
    let holds = |lease: &mlad::api::Lease| lease.workload == *workload;
    let workspace = workspaces.into_iter().find(|workspace| workspace.lease.as_ref().is_some_and(holds));
    Ok(workspace.map_or_else(Origin::default, |workspace| Origin {
        image: Some(workspace.image),
        need: Some(workspace.need),
        project: workspace.lease.and_then(|lease| lease.project),
    }))
}

/// One job.
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = JobId, Path)), responses((status = 200, body = Job)))]
async fn get_job(State(state): State<Rooms>, caller: Caller, Named(id): Named<JobId>) -> Answer<Json<Job>> {
    let record = visible(&state, &caller, id).await?;
    Ok(Json(state.jobs.view(record).await?))
}

/// The job, if the caller may see it.
pub(super) async fn visible(state: &Rooms, caller: &Caller, id: JobId) -> Answer<JobRecord> {
    let record = state.jobs.record(id).await?;
    if caller.may_see(&record.user) { Ok(record) } else { Err(Failure::not_found("job", id)) }
}

/// Asks a job to end. One that is on its way there, or was cancelled before, is no error.
#[utoipa::path(post, path = "/v1/jobs/{id}/cancel", tag = "jobs", params(("id" = JobId, Path)), responses((status = 200, body = Job)))]
async fn cancel_job(State(state): State<Rooms>, caller: Caller, Named(id): Named<JobId>) -> Answer<Json<Job>> {
    audited(&state, &caller, id, "job.cancel").await?;
    let record = state.jobs.cancel(id, &caller.0.user).await?;
    Ok(Json(state.jobs.view(record).await?))
}

/// Keeps a queued job from starting.
#[utoipa::path(post, path = "/v1/jobs/{id}/hold", tag = "jobs", params(("id" = JobId, Path)), responses((status = 200, body = Job)))]
async fn hold_job(State(state): State<Rooms>, caller: Caller, Named(id): Named<JobId>) -> Answer<Json<Job>> {
    audited(&state, &caller, id, "job.hold").await?;
    let record = state.jobs.hold(id).await?;
    Ok(Json(state.jobs.view(record).await?))
}

/// Lets a held job start.
#[utoipa::path(post, path = "/v1/jobs/{id}/release", tag = "jobs", params(("id" = JobId, Path)), responses((status = 200, body = Job)))]
async fn release_job(State(state): State<Rooms>, caller: Caller, Named(id): Named<JobId>) -> Answer<Json<Job>> {
    audited(&state, &caller, id, "job.release").await?;
    let record = state.jobs.release(id).await?;
    Ok(Json(state.jobs.view(record).await?))
}

/// What an administrator does to another's job is written down before it is done.
async fn audited(state: &Rooms, caller: &Caller, id: JobId, action: &str) -> Answer<()> {
    let record = visible(state, caller, id).await?;
    if record.user != caller.0.user {
        let detail = format!("of {}", record.user);
        state.store.audit(&caller.0.user, action, &format!("job {id}"), Some(&detail)).await?;
    }
    Ok(())
}

/// The job once it has ended (or is not in the state `seen` any more), or after a while as it is.
#[utoipa::path(get, path = "/v1/jobs/{id}/wait", tag = "jobs", params(("id" = JobId, Path), WaitQuery), responses((status = 200, body = Job)))]
async fn wait_for_job(
    State(state): State<Rooms>,
    caller: Caller,
    Named(id): Named<JobId>,
    Asked(query): Asked<WaitQuery>,
) -> Answer<Json<Job>> {
    visible(&state, &caller, id).await?;
    let timeout = Duration::from_secs(query.timeout_seconds.unwrap_or(30).min(MAX_WAIT));
    let record = state.jobs.wait(id, query.seen, timeout).await?;
    Ok(Json(state.jobs.view(record).await?))
}

/// A job's output from byte `offset` on; with `follow` until the job has ended. A reader whose connection
/// broke goes on at the byte it came to.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/log", tag = "jobs", params(("id" = JobId, Path), LogQuery),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"))
)]
async fn get_job_log(
    State(state): State<Rooms>,
    caller: Caller,
    Named(id): Named<JobId>,
    Asked(query): Asked<LogQuery>,
) -> Answer<Response> {
    let record = visible(&state, &caller, id).await?;
    if query.offset > MAX_OFFSET {
        let message = format!("no log has a byte {}: the offset is at most {MAX_OFFSET}", query.offset);
        return Err(Failure::new(ErrorCode::BadRequest, message));
    }
    let owner = state.store.user_by_id(record.user_id).await?;
    let pieces = state.jobs.log(owner, record, query.offset, query.follow).await?;
    let body = HttpBody::from_stream(pieces.map_err(broken));
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

fn broken(error: JobError) -> io::Error {
    tracing::debug!(%error, "a log cannot be read on");
    io::Error::other(error)
}
