//! Projects: `/v1/projects` for their members, `/v1/admin/projects` for administrators. Who is not a member does not
//! learn that a project exists.

use super::{
    Rooms,
    caller::{Account, Admin, Body, Named},
    failure::{Answer, Failure},
};
use crate::store::ProjectRecord;
use axum::{Json, extract::State, http::StatusCode};
use mlad::api::{DefaultProject, NewProject, Project, ProjectLimits, ProjectList, ProjectUse};
use mlad_allocator::{AccountName, AccountState};
use std::collections::{BTreeMap, HashMap};
use utoipa_axum::{router::OpenApiRouter, routes};

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new()
        .routes(routes!(list_projects))
        .routes(routes!(set_default_project))
        .routes(routes!(list_all_projects, add_project))
        .routes(routes!(get_project, remove_project))
        .routes(routes!(set_project_limits))
        .routes(routes!(add_project_member, remove_project_member))
}

/// The projects the caller is a member of.
#[utoipa::path(get, path = "/v1/projects", tag = "projects", responses((status = 200, body = ProjectList)))]
async fn list_projects(State(state): State<Rooms>, me: Account) -> Answer<Json<ProjectList>> {
    let mut projects = shown(&state, state.store.projects().await?).await?;
    projects.retain(|project| project.members.contains(&me.user.name));
    let mine: Vec<String> = projects.iter().map(|project| project.name.clone()).collect();
    for project in &mut projects {
        // One whose parent they are no member of does not tell them of it.
        project.parent = project.parent.take().filter(|parent| mine.contains(parent));
    }
    Ok(Json(ProjectList { projects, default: state.store.default_project(me.user.id).await? }))
}

/// Says what the caller's requests count for that name no project.
#[utoipa::path(put, path = "/v1/projects/default", tag = "projects", request_body = DefaultProject, responses((status = 200, body = DefaultProject)))]
async fn set_default_project(
    State(state): State<Rooms>,
    me: Account,
    Body(wish): Body<DefaultProject>,
) -> Answer<Json<DefaultProject>> {
    state.store.set_default_project(me.user.id, wish.project.as_deref()).await?;
    Ok(Json(wish))
}

/// Every project.
#[utoipa::path(get, path = "/v1/admin/projects", tag = "admin", responses((status = 200, body = ProjectList)))]
async fn list_all_projects(State(state): State<Rooms>, _: Admin) -> Answer<Json<ProjectList>> {
    let projects = shown(&state, state.store.projects().await?).await?;
    Ok(Json(ProjectList { projects, default: None }))
}

/// Makes a project without members and limits.
#[utoipa::path(post, path = "/v1/admin/projects", tag = "admin", request_body = NewProject, responses((status = 201, body = Project)))]
async fn add_project(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Body(new): Body<NewProject>,
) -> Answer<(StatusCode, Json<Project>)> {
    let parent = new.parent.as_ref().map(|parent| format!("within {parent}"));
    state.store.audit(&by.user, "project.add", &new.name, parent.as_deref()).await?;
    state.store.add_project(&new).await?;
    Ok((StatusCode::CREATED, Json(one(&state, &new.name).await?)))
}

/// One project.
#[utoipa::path(get, path = "/v1/admin/projects/{name}", tag = "admin", params(("name" = String, Path)), responses((status = 200, body = Project)))]
async fn get_project(State(state): State<Rooms>, _: Admin, Named(name): Named<String>) -> Answer<Json<Project>> {
    Ok(Json(one(&state, &name).await?))
}

/// Removes a project that no other lies in. What runs goes on; its queued jobs are held.
#[utoipa::path(delete, path = "/v1/admin/projects/{name}", tag = "admin", params(("name" = String, Path)), responses((status = 204)))]
async fn remove_project(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named(name): Named<String>,
) -> Answer<StatusCode> {
    let project = state.store.project(&name).await?;
    state.store.audit(&by.user, "project.remove", &name, None).await?;
    let members = state.store.project_members().await?.remove(&project.id).unwrap_or_default();
    state.store.remove_project(&name).await?;
    for member in members {
        look_again(&state, &member).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Changes what the members of a project may hold together; what is absent is without limit. What they hold already
/// they keep.
#[utoipa::path(put, path = "/v1/admin/projects/{name}/limits", tag = "admin", params(("name" = String, Path)), request_body = ProjectLimits, responses((status = 200, body = Project)))]
async fn set_project_limits(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named(name): Named<String>,
    Body(limits): Body<ProjectLimits>,
) -> Answer<Json<Project>> {
    let limit = |limit: Option<u64>| limit.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
    let detail = format!(
        "slices {}, GPU memory {} MiB, GPU seconds {}",
        limit(limits.slices.map(u64::from)),
        limit(limits.gpu_memory_mib),
        limit(limits.gpu_seconds)
    );
    state.store.audit(&by.user, "project.quota", &name, Some(&detail)).await?;
    state.store.set_project_limits(&name, &limits).await?;
    Ok(Json(one(&state, &name).await?))
}

/// Makes a user a member of a project. Repeatable.
#[utoipa::path(put, path = "/v1/admin/projects/{name}/members/{user}", tag = "admin", params(("name" = String, Path), ("user" = String, Path)), responses((status = 200, body = Project)))]
async fn add_project_member(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named((name, user)): Named<(String, String)>,
) -> Answer<Json<Project>> {
    let member = state.store.user_by_name(&user).await?;
    state.store.audit(&by.user, "project.member.add", &name, Some(&user)).await?;
    state.store.add_member(&name, member.id).await?;
    Ok(Json(one(&state, &name).await?))
}

/// Ends a membership. What runs goes on; their queued jobs for the project are held.
#[utoipa::path(delete, path = "/v1/admin/projects/{name}/members/{user}", tag = "admin", params(("name" = String, Path), ("user" = String, Path)), responses((status = 204)))]
async fn remove_project_member(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named((name, user)): Named<(String, String)>,
) -> Answer<StatusCode> {
    let member = state.store.user_by_name(&user).await?;
    state.store.audit(&by.user, "project.member.remove", &name, Some(&user)).await?;
    state.store.remove_member(&name, member.id).await?;
    state.jobs.limits_changed(member.id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Somebody's queued jobs may not be theirs to run any more.
async fn look_again(state: &Rooms, user: &str) -> Answer<()> {
    let user = state.store.user_by_name(user).await?;
    Ok(state.jobs.limits_changed(user.id).await?)
}

async fn one(state: &Rooms, name: &str) -> Answer<Project> {
    let project = state.store.project(name).await?;
    let shown = shown(state, vec![project]).await?.pop();
    shown.ok_or_else(|| Failure::not_found("project", name))
}

/// Projects with their members and, if the allocator says so, with what they hold.
async fn shown(state: &Rooms, records: Vec<ProjectRecord>) -> Answer<Vec<Project>> {
    let mut members = state.store.project_members().await?;
    let used = match state.allocator.accounts().await {
        Ok(accounts) => Some(uses(accounts)),
        Err(error) => {
            tracing::warn!(%error, "the allocator does not say what projects hold");
            None
        }
    };
    Ok(records.into_iter().map(|record| show(record, &mut members, used.as_ref())).collect())
}

fn uses(accounts: Vec<AccountState>) -> HashMap<String, ProjectUse> {
    let of_project = |state: AccountState| match state.account.name {
        AccountName::Project(name) => {
            let AccountState { slices, gpu_memory_mib, gpu_seconds, .. } = state;
            Some((name, ProjectUse { slices, gpu_memory_mib, gpu_seconds }))
        }
        AccountName::User(_) => None,
    };
    accounts.into_iter().filter_map(of_project).collect()
}

fn show(
    record: ProjectRecord,
    members: &mut BTreeMap<i64, Vec<String>>,
    used: Option<&HashMap<String, ProjectUse>>,
) -> Project {
    let ProjectRecord { id, name, parent, limits, created_at } = record;
    // One that the allocator has not heard of holds nothing.
    let used = used.map(|used| used.get(&name).copied().unwrap_or_default());
    Project { name, parent, limits, used, members: members.remove(&id).unwrap_or_default(), created_at }
}
