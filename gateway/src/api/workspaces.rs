//! Workspaces: `/v1/workspaces`. They begin with a login; here they are seen, extended and stopped.

use super::{
    Rooms,
    caller::{Account, Asked, Body, Caller, Named},
    failure::{Answer, Failure},
};
use axum::{Json, extract::State};
use mlad::api::{ErrorCode, Workspace, WorkspaceExtension, WorkspaceList};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new()
        .routes(routes!(list_workspaces))
        .routes(routes!(get_workspace))
        .routes(routes!(stop_workspace))
        .routes(routes!(extend_workspace))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    /// Everybody's: for administrators.
    #[serde(default)]
    all: bool,
}

/// The caller's workspaces; everybody's for an administrator with `all`.
#[utoipa::path(get, path = "/v1/workspaces", tag = "workspaces", params(ListQuery), responses((status = 200, body = WorkspaceList)))]
async fn list_workspaces(
    State(state): State<Rooms>,
    caller: Caller,
    Asked(query): Asked<ListQuery>,
) -> Answer<Json<WorkspaceList>> {
    let everybody = query.all || caller.0.user == super::caller::ROOT;
    if everybody && !caller.is_admin() {
        return Err(Failure::new(ErrorCode::Denied, "only an administrator sees what belongs to others"));
    }
    let user = if everybody { None } else { Some(caller.0.user.as_str()) };
    Ok(Json(WorkspaceList { workspaces: state.workspaces.list(user).await? }))
}

/// One workspace of the caller.
#[utoipa::path(get, path = "/v1/workspaces/{name}", tag = "workspaces", params(("name" = String, Path)), responses((status = 200, body = Workspace)))]
async fn get_workspace(State(state): State<Rooms>, me: Account, Named(name): Named<String>) -> Answer<Json<Workspace>> {
    Ok(Json(state.workspaces.get(&me.user.name, &name).await?))
}

/// Ends a workspace's container and gives its slice back.
#[utoipa::path(post, path = "/v1/workspaces/{name}/stop", tag = "workspaces", params(("name" = String, Path)), responses((status = 200, body = Workspace)))]
async fn stop_workspace(
    State(state): State<Rooms>,
    me: Account,
    Named(name): Named<String>,
) -> Answer<Json<Workspace>> {
    Ok(Json(state.workspaces.stop(&me.user.name, &name, &me.user.name).await?))
}

/// Moves a workspace's idle deadline.
#[utoipa::path(post, path = "/v1/workspaces/{name}/extend", tag = "workspaces", params(("name" = String, Path)), request_body = WorkspaceExtension, responses((status = 200, body = Workspace)))]
async fn extend_workspace(
    State(state): State<Rooms>,
    me: Account,
    Named(name): Named<String>,
    Body(extension): Body<WorkspaceExtension>,
) -> Answer<Json<Workspace>> {
    Ok(Json(state.workspaces.extend(&me.user.name, &name, extension.minutes).await?))
}
