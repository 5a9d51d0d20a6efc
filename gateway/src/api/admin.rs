//! Administration: `/v1/admin`. Every change is written into the audit log before it is made.

use super::{
    Rooms,
    account::{expiry, put_key, put_token, take_key, take_token},
    caller::{Admin, Asked, Body, Named},
    failure::{Answer, Failure},
};
use crate::{
    files,
    image::CatalogEntry,
    job::AttemptName,
    store::{LastKey, StoreError, UserRecord},
};
use axum::{Json, extract::State, http::StatusCode};
use mlad::api::{
    AuditList, ErrorCode, Image, ImageList, Invite, JobState, Lease, NewImage, NewInvite, NewKey, NewToken, NewUser,
    Quota, Role, SshKey, Token, User, UserChange, UserList,
};
use serde::Deserialize;
use std::{io, sync::Arc, time::Duration};
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

/// How long an invitation works that names no time, in seconds.
const INVITE_LIFE: u64 = 24 * 3600;
/// Longest life of an invitation, in seconds.
const MAX_INVITE_LIFE: u64 = 30 * 24 * 3600;
/// Entries of the audit log in an answer that names no number.
const AUDIT: u32 = 100;
/// Most entries of the audit log in one answer.
const MAX_AUDIT: u32 = 10_000;

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new()
        .routes(routes!(list_users, add_user))
        .routes(routes!(get_user, change_user, remove_user))
        .routes(routes!(set_user_quota))
        .routes(routes!(list_user_keys, add_user_key))
        .routes(routes!(remove_user_key))
        .routes(routes!(list_user_tokens, add_user_token))
        .routes(routes!(remove_user_token))
        .routes(routes!(add_invite))
        .routes(routes!(list_all_images, add_image))
        .routes(routes!(remove_image))
        .routes(routes!(restore_image))
        .routes(routes!(reload_images))
        .routes(routes!(list_all_leases))
        .routes(routes!(revoke_lease))
        .routes(routes!(stop_workload))
        .routes(routes!(list_audit_events))
}

/// Every user.
#[utoipa::path(get, path = "/v1/admin/users", tag = "admin", responses((status = 200, body = UserList)))]
async fn list_users(State(state): State<Rooms>, _: Admin) -> Answer<Json<UserList>> {
    let users = state.store.users().await?.into_iter().map(User::from).collect();
    Ok(Json(UserList { users }))
}

/// Adds a user and makes their home.
#[utoipa::path(post, path = "/v1/admin/users", tag = "admin", request_body = NewUser, responses((status = 201, body = User)))]
async fn add_user(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Body(new): Body<NewUser>,
) -> Answer<(StatusCode, Json<User>)> {
    let role = if new.role == Some(Role::Admin) { "admin" } else { "user" };
    state.store.audit(&by.user, "user.add", &new.name, Some(role)).await?;
    let user = make_user(&state, &new).await?;
    Ok((StatusCode::CREATED, Json(user.into())))
}

async fn make_user(state: &Rooms, new: &NewUser) -> Answer<UserRecord> {
    let user = state.store.add_user(new).await?;
    let (config, owner) = (Arc::clone(&state.config), user.clone());
    tokio::task::spawn_blocking(move || files::ensure_home(&config, &owner)).await.map_err(io::Error::other)??;
    Ok(user)
}

/// One user.
#[utoipa::path(get, path = "/v1/admin/users/{name}", tag = "admin", params(("name" = String, Path)), responses((status = 200, body = User)))]
async fn get_user(State(state): State<Rooms>, _: Admin, Named(name): Named<String>) -> Answer<Json<User>> {
    Ok(Json(state.store.user_by_name(&name).await?.into()))
}

/// Lets a user log in or no longer, or changes what they may do. What runs goes on.
#[utoipa::path(patch, path = "/v1/admin/users/{name}", tag = "admin", params(("name" = String, Path)), request_body = UserChange, responses((status = 200, body = User)))]
async fn change_user(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named(name): Named<String>,
    Body(change): Body<UserChange>,
) -> Answer<Json<User>> {
    let mut user = state.store.user_by_name(&name).await?;
    if let Some(enabled) = change.enabled {
        let action = if enabled { "user.enable" } else { "user.disable" };
        state.store.audit(&by.user, action, &name, None).await?;
        user = state.store.set_user_enabled(user.id, enabled).await?;
    }
    if let Some(role) = change.role {
        let word = if role == Role::Admin { "admin" } else { "user" };
        state.store.audit(&by.user, "user.role", &name, Some(word)).await?;
        user = state.store.set_user_role(user.id, role).await?;
    }
    Ok(Json(user.into()))
}

/// Changes what a user may hold at once; what is absent is without limit. What they hold already they keep.
#[utoipa::path(put, path = "/v1/admin/users/{name}/quota", tag = "admin", params(("name" = String, Path)), request_body = Quota, responses((status = 200, body = User)))]
async fn set_user_quota(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named(name): Named<String>,
    Body(quota): Body<Quota>,
) -> Answer<Json<User>> {
    let user = state.store.user_by_name(&name).await?;
    let limit = |limit: Option<u64>| limit.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
    let detail = format!(
        "slices {}, GPU memory {} MiB, GPU seconds {}, jobs {}, priority {}",
        limit(quota.slices.map(u64::from)),
        limit(quota.gpu_memory_mib),
        limit(quota.gpu_seconds),
        limit(quota.jobs.map(u64::from)),
        quota.greatest_priority.unwrap_or(0)
    );
    state.store.audit(&by.user, "user.quota", &name, Some(&detail)).await?;
    let user = state.store.set_user_quota(user.id, &quota).await?;
    state.jobs.limits_changed(user.id).await?;
    Ok(Json(user.into()))
}

/// Removes a user with their keys and tokens; their home stays. One with workspaces or jobs on record can only
/// be disabled.
#[utoipa::path(delete, path = "/v1/admin/users/{name}", tag = "admin", params(("name" = String, Path)), responses((status = 204)))]
async fn remove_user(State(state): State<Rooms>, Admin(by): Admin, Named(name): Named<String>) -> Answer<StatusCode> {
    let user = state.store.user_by_name(&name).await?;
    state.store.audit(&by.user, "user.remove", &name, None).await?;
    state.store.remove_user(user.id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The SSH keys of a user.
#[utoipa::path(get, path = "/v1/admin/users/{name}/keys", tag = "admin", params(("name" = String, Path)), responses((status = 200, body = Vec<SshKey>)))]
async fn list_user_keys(State(state): State<Rooms>, _: Admin, Named(name): Named<String>) -> Answer<Json<Vec<SshKey>>> {
    let user = state.store.user_by_name(&name).await?;
    Ok(Json(state.store.keys_of(user.id).await?))
}

/// Adds an SSH key of a user.
#[utoipa::path(post, path = "/v1/admin/users/{name}/keys", tag = "admin", params(("name" = String, Path)), request_body = NewKey, responses((status = 201, body = SshKey)))]
async fn add_user_key(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named(name): Named<String>,
    Body(key): Body<NewKey>,
) -> Answer<(StatusCode, Json<SshKey>)> {
    let user = state.store.user_by_name(&name).await?;
    put_key(&state, &by.user, &user, &key).await
}

/// Removes an SSH key of a user, and ends the connections it let in.
#[utoipa::path(delete, path = "/v1/admin/users/{name}/keys/{fingerprint}", tag = "admin", params(("name" = String, Path), ("fingerprint" = String, Path)), responses((status = 204)))]
async fn remove_user_key(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named((name, fingerprint)): Named<(String, String)>,
) -> Answer<StatusCode> {
    let user = state.store.user_by_name(&name).await?;
    take_key(&state, &by.user, &user, &fingerprint, LastKey::MayGo).await
}

/// The tokens of a user, without their secrets.
#[utoipa::path(get, path = "/v1/admin/users/{name}/tokens", tag = "admin", params(("name" = String, Path)), responses((status = 200, body = Vec<Token>)))]
async fn list_user_tokens(
    State(state): State<Rooms>,
    _: Admin,
    Named(name): Named<String>,
) -> Answer<Json<Vec<Token>>> {
    let user = state.store.user_by_name(&name).await?;
    Ok(Json(state.store.tokens(user.id).await?))
}

/// Makes a token for a user; its secret is in this answer alone.
#[utoipa::path(post, path = "/v1/admin/users/{name}/tokens", tag = "admin", params(("name" = String, Path)), request_body = NewToken, responses((status = 201, body = Token)))]
async fn add_user_token(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named(name): Named<String>,
    Body(token): Body<NewToken>,
) -> Answer<(StatusCode, Json<Token>)> {
    let user = state.store.user_by_name(&name).await?;
    put_token(&state, &by.user, &user, &token).await
}

/// Revokes a token of a user.
#[utoipa::path(delete, path = "/v1/admin/users/{name}/tokens/{id}", tag = "admin", params(("name" = String, Path), ("id" = i64, Path)), responses((status = 204)))]
async fn remove_user_token(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named((name, id)): Named<(String, i64)>,
) -> Answer<StatusCode> {
    let user = state.store.user_by_name(&name).await?;
    take_token(&state, &by.user, &user, id).await
}

/// Makes a one-time code with which a user enrols a key, and the user if there is none of that name.
#[utoipa::path(post, path = "/v1/admin/invites", tag = "admin", request_body = NewInvite, responses((status = 201, body = Invite)))]
async fn add_invite(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Body(new): Body<NewInvite>,
) -> Answer<(StatusCode, Json<Invite>)> {
    let expires_at = expiry(new.valid_seconds.unwrap_or(INVITE_LIFE), MAX_INVITE_LIFE)?;
    state.store.audit(&by.user, "invite.add", &new.user, Some(&format!("until {expires_at}"))).await?;
    let user = match state.store.user_by_name(&new.user).await {
        Err(StoreError::NotFound { .. }) => {
            let new = NewUser { name: new.user.clone(), role: None, uid: None };
            state.store.audit(&by.user, "user.add", &new.name, Some("user")).await?;
            make_user(&state, &new).await?
        }
        user => user?,
    };
    let code = state.store.add_invite(user.id, expires_at).await?;
    Ok((StatusCode::CREATED, Json(Invite { user: user.name, code, expires_at })))
}

/// The whole catalog.
#[utoipa::path(get, path = "/v1/admin/images", tag = "admin", responses((status = 200, body = ImageList)))]
async fn list_all_images(State(state): State<Rooms>, _: Admin) -> Answer<Json<ImageList>> {
    Ok(Json(ImageList { images: state.catalog.list(&*state.runtime).await? }))
}

/// Adds an image to the catalog, or replaces the entry of its name. It need not be there yet.
#[utoipa::path(post, path = "/v1/admin/images", tag = "admin", request_body = NewImage, responses((status = 201, body = Image)))]
async fn add_image(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Body(new): Body<NewImage>,
) -> Answer<(StatusCode, Json<Image>)> {
    state.store.audit(&by.user, "image.add", &new.name, Some(&new.reference)).await?;
    let entry = CatalogEntry {
        name: new.name,
        reference: new.reference,
        description: new.description,
        min_gpu_memory_mib: new.min_gpu_memory_mib,
        allowed_users: Vec::new(),
    };
    state.catalog.add(&entry).await?;
    Ok((StatusCode::CREATED, Json(shown(&state, entry).await)))
}

/// An entry that has just changed. Whether the engine has its image is told if the engine answers: the change
/// stands in either case.
async fn shown(state: &Rooms, entry: CatalogEntry) -> Image {
    let digest = state.runtime.image_present(&entry.reference).await.unwrap_or(None);
    Image {
        name: entry.name,
        reference: entry.reference,
        available: digest.is_some(),
        digest,
        description: entry.description,
        min_gpu_memory_mib: entry.min_gpu_memory_mib,
    }
}

/// Takes an image out of the catalog: one that was added is forgotten, one of `catalog.toml` is hidden until it
/// is restored. The engine keeps it, and what runs goes on.
#[utoipa::path(delete, path = "/v1/admin/images/{name}", tag = "admin", params(("name" = String, Path)), responses((status = 204)))]
async fn remove_image(State(state): State<Rooms>, Admin(by): Admin, Named(name): Named<String>) -> Answer<StatusCode> {
    state.store.audit(&by.user, "image.remove", &name, None).await?;
    state.catalog.remove(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Lets what `catalog.toml` says of an image hold again, after it was replaced or taken out.
#[utoipa::path(post, path = "/v1/admin/images/{name}/restore", tag = "admin", params(("name" = String, Path)), responses((status = 200, body = Image)))]
async fn restore_image(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named(name): Named<String>,
) -> Answer<Json<Image>> {
    state.store.audit(&by.user, "image.restore", &name, None).await?;
    let entry = state.catalog.restore(&name).await?;
    Ok(Json(shown(&state, entry).await))
}

/// Reads `catalog.toml` again.
#[utoipa::path(post, path = "/v1/admin/images/reload", tag = "admin", responses((status = 204)))]
async fn reload_images(State(state): State<Rooms>, Admin(by): Admin) -> Answer<StatusCode> {
    state.store.audit(&by.user, "image.reload", "catalog", None).await?;
    state.catalog.reload()?;
    Ok(StatusCode::NO_CONTENT)
}

/// Every lease, with all that is known of it.
#[utoipa::path(get, path = "/v1/admin/leases", tag = "admin", responses((status = 200, body = Vec<Lease>)))]
async fn list_all_leases(State(state): State<Rooms>, _: Admin) -> Answer<Json<Vec<Lease>>> {
    Ok(Json(state.allocator.leases().await?))
}

/// Takes a lease away from its workload, which is ended first: a workspace is stopped, a job is held.
#[utoipa::path(delete, path = "/v1/admin/leases/{workload}", tag = "admin", params(("workload" = String, Path)), responses((status = 204)))]
async fn revoke_lease(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named(workload): Named<String>,
) -> Answer<StatusCode> {
    state.store.audit(&by.user, "lease.revoke", &workload, None).await?;
    match owner_of(&state, &workload).await? {
        Owner::Job(name) => drop(state.jobs.revoke(name.job, &by.user).await?),
        Owner::Waiting(_) => {
            return Err(Failure::not_found("lease", &workload).hint("it waits for one; `mlad admin stop` ends it"));
        }
        Owner::Workspace => drop(state.workspaces.stop_workload(&workload, &by.user).await?),
        Owner::Nobody => free(&state, &workload, &by.user).await?,
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Ends a workload now: a workspace is stopped, a job cancelled, also one that waits for its slice.
#[utoipa::path(post, path = "/v1/admin/workloads/{workload}/stop", tag = "admin", params(("workload" = String, Path)), responses((status = 204)))]
async fn stop_workload(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named(workload): Named<String>,
) -> Answer<StatusCode> {
    state.store.audit(&by.user, "workload.stop", &workload, None).await?;
    match owner_of(&state, &workload).await? {
        Owner::Job(name) | Owner::Waiting(name) => drop(state.jobs.cancel(name.job, &by.user).await?),
        Owner::Workspace => drop(state.workspaces.stop_workload(&workload, &by.user).await?),
        Owner::Nobody => free(&state, &workload, &by.user).await?,
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Who answers for a workload.
enum Owner {
    Job(AttemptName),
    /// A job, and this is the attempt it waits to make.
    Waiting(AttemptName),
    Workspace,
    /// No controller knows it any more, but a container or lease of that name is there.
    Nobody,
}

async fn owner_of(state: &Rooms, workload: &str) -> Answer<Owner> {
    if let Ok(name) = workload.parse::<AttemptName>() {
        match state.jobs.record(name.job).await {
            Ok(job) if job.current() == Some(name) && job.life.has_attempt() => return Ok(Owner::Job(name)),
            Ok(job) if job.next() == name && job.life.state == JobState::Queued => return Ok(Owner::Waiting(name)),
            Ok(_) | Err(crate::job::JobError::Store(StoreError::NotFound { .. })) => {}
            Err(error) => return Err(error.into()),
        }
    } else if state.workspaces.list(None).await?.iter().any(|workspace| {
        let lease = workspace.lease.as_ref().map(|lease| &lease.workload);
        let wait = workspace.wait.as_ref().map(|wait| &wait.workload);
        lease.or(wait).is_some_and(|name| name == workload)
    }) {
        return Ok(Owner::Workspace);
    }
    let leased = state.allocator.leases().await?.iter().any(|lease| lease.workload == workload);
    if leased || state.runtime.inspect(workload).await?.is_some() {
        return Ok(Owner::Nobody);
    }
    Err(Failure::not_found("workload", workload).hint("`mlad who` lists those that hold a slice or wait for one"))
}

/// Ends what nobody answers for, and then frees its slice.
async fn free(state: &Rooms, workload: &str, by: &str) -> Answer<()> {
    state.runtime.remove(workload, Duration::ZERO).await?;
    Ok(state.allocator.revoke(workload, &format!("revoked by {by}"), true).await?)
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct AuditQuery {
    /// At most so many: 1 to 10,000, 100 if absent.
    limit: Option<u32>,
}

/// The audit log, newest first.
#[utoipa::path(get, path = "/v1/admin/audit", tag = "admin", params(AuditQuery), responses((status = 200, body = AuditList)))]
async fn list_audit_events(
    State(state): State<Rooms>,
    _: Admin,
    Asked(query): Asked<AuditQuery>,
) -> Answer<Json<AuditList>> {
    let limit = query.limit.unwrap_or(AUDIT).clamp(1, MAX_AUDIT);
    if query.limit == Some(0) {
        return Err(Failure::new(ErrorCode::BadRequest, "the limit is at least 1"));
    }
    Ok(Json(AuditList { events: state.store.audit_log(limit).await? }))
}
