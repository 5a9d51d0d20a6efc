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
    OpenApiRouter::new().routes(routes!(list_nodes)).routes(routes!(forget_node)).routes(routes!(trust_gpu))
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

/// Takes a GPU, by its UUID, out of quarantine: slices of it are granted again.
#[utoipa::path(post, path = "/v1/admin/gpus/{uuid}/trust", tag = "admin", params(("uuid" = String, Path)), responses((status = 204)))]
async fn trust_gpu(State(state): State<Rooms>, Admin(by): Admin, Named(uuid): Named<String>) -> Answer<StatusCode> {
    state.store.audit(&by.user, "gpu.trust", &uuid, None).await?;
    state.allocator.trust_gpu(&uuid).await?;
    Ok(StatusCode::NO_CONTENT)
}
