//! Machines with GPUs, for administrators: `/v1/admin/nodes`.

use super::{
    Rooms,
    caller::{Admin, Named},
    failure::Answer,
};
use axum::{Json, extract::State, http::StatusCode};
use mlad::api::NodeList;
use utoipa_axum::{router::OpenApiRouter, routes};

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new().routes(routes!(list_nodes)).routes(routes!(forget_node))
}

/// Every machine with GPUs.
#[utoipa::path(get, path = "/v1/admin/nodes", tag = "admin", responses((status = 200, body = NodeList)))]
async fn list_nodes(State(state): State<Rooms>, _: Admin) -> Answer<Json<NodeList>> {
    Ok(Json(NodeList { nodes: state.allocator.nodes().await? }))
}

/// Forgets a machine that is lost and that nothing is held of any more. Its daemon may join again.
#[utoipa::path(delete, path = "/v1/admin/nodes/{name}", tag = "admin", params(("name" = String, Path)), responses((status = 204)))]
async fn forget_node(State(state): State<Rooms>, Admin(by): Admin, Named(name): Named<String>) -> Answer<StatusCode> {
    state.store.audit(&by.user, "node.remove", &name, None).await?;
    state.allocator.forget_node(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
