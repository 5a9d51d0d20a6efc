//! What users and the members of projects may forward over SSH: `/v1/admin/{users,projects}/{name}/forwarding`.

use super::{
    Rooms,
    caller::{Admin, Body, Named},
    failure::Answer,
};
use axum::{Json, extract::State};
use mlad::api::Forwarding;
use utoipa_axum::{router::OpenApiRouter, routes};

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new()
        .routes(routes!(get_user_forwarding, set_user_forwarding))
        .routes(routes!(get_project_forwarding, set_project_forwarding))
}

/// What a user may forward by themselves; their projects may forbid more.
#[utoipa::path(get, path = "/v1/admin/users/{name}/forwarding", tag = "admin", params(("name" = String, Path)), responses((status = 200, body = Forwarding)))]
async fn get_user_forwarding(
    State(state): State<Rooms>,
    _: Admin,
    Named(name): Named<String>,
) -> Answer<Json<Forwarding>> {
    let user = state.store.user_by_name(&name).await?;
    Ok(Json(state.store.user_forwarding(user.id).await?))
}

/// Changes what a user may forward; what is absent they may. What listens for them and may not any more ends.
#[utoipa::path(put, path = "/v1/admin/users/{name}/forwarding", tag = "admin", params(("name" = String, Path)), request_body = Forwarding, responses((status = 200, body = Forwarding)))]
async fn set_user_forwarding(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named(name): Named<String>,
    Body(forwarding): Body<Forwarding>,
) -> Answer<Json<Forwarding>> {
    let user = state.store.user_by_name(&name).await?;
    state.store.audit(&by.user, "user.forwarding", &name, Some(&in_words(forwarding))).await?;
    state.store.set_user_forwarding(user.id, forwarding).await?;
    Ok(Json(forwarding))
}

/// What the members of a project may forward, also of those that lie in it.
#[utoipa::path(get, path = "/v1/admin/projects/{name}/forwarding", tag = "admin", params(("name" = String, Path)), responses((status = 200, body = Forwarding)))]
async fn get_project_forwarding(
    State(state): State<Rooms>,
    _: Admin,
    Named(name): Named<String>,
) -> Answer<Json<Forwarding>> {
    let project = state.store.project(&name).await?;
    Ok(Json(state.store.project_forwarding(project.id).await?))
}

/// Changes what the members of a project may forward, wherever they are; what is absent they may.
#[utoipa::path(put, path = "/v1/admin/projects/{name}/forwarding", tag = "admin", params(("name" = String, Path)), request_body = Forwarding, responses((status = 200, body = Forwarding)))]
async fn set_project_forwarding(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named(name): Named<String>,
    Body(forwarding): Body<Forwarding>,
) -> Answer<Json<Forwarding>> {
    let project = state.store.project(&name).await?;
    state.store.audit(&by.user, "project.forwarding", &name, Some(&in_words(forwarding))).await?;
    state.store.set_project_forwarding(project.id, forwarding).await?;
    Ok(Json(forwarding))
}

fn in_words(Forwarding { local, remote, agent, x11 }: Forwarding) -> String {
    let word = |allowed| if allowed { "yes" } else { "no" };
    format!("local {}, remote {}, agent {}, x11 {}", word(local), word(remote), word(agent), word(x11))
}
