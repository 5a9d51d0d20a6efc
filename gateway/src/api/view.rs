//! What there is and who has it: GPUs, leases, waits, images, quota. Of others' work only the name, the slice
//! and the time are shown: people need to know whom to ask.

use super::{
    Rooms,
    caller::{Account, Caller},
    failure::{Answer, Failure},
};
use axum::{Json, extract::State};
use mlad::api::{GpuMap, Identity, ImageList, Lease, Quota, Wait};
use std::sync::PoisonError;
use utoipa_axum::{router::OpenApiRouter, routes};

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new()
        .routes(routes!(whoami))
        .routes(routes!(list_gpus))
        .routes(routes!(list_leases))
        .routes(routes!(list_waits))
        .routes(routes!(list_images))
        .routes(routes!(get_quota))
}

/// Who the gateway takes the caller for.
#[utoipa::path(get, path = "/v1/whoami", tag = "view", responses((status = 200, body = Identity)))]
async fn whoami(caller: Caller) -> Json<Identity> {
    Json(caller.0)
}

/// Every GPU and what is on it. While the allocator does not answer: what it said last, and `late` says why.
#[utoipa::path(get, path = "/v1/gpus", tag = "view", responses((status = 200, body = GpuMap)))]
async fn list_gpus(State(state): State<Rooms>, caller: Caller) -> Answer<Json<GpuMap>> {
    let mut map = current_or_last(&state).await?;
    for slice in map.gpus.iter_mut().flat_map(|gpu| &mut gpu.slices) {
        if let Some(holder) = slice.holder.as_mut().filter(|holder| !caller.may_see(&holder.user)) {
            holder.workload = kind(&holder.workload).into();
        }
    }
    Ok(Json(map))
}

/// The map; while the allocator does not answer, what it said last, marked as such.
async fn current_or_last(state: &Rooms) -> Answer<GpuMap> {
    let last = || state.last_map.lock().unwrap_or_else(PoisonError::into_inner);
    match state.allocator.map().await {
        Ok(map) => {
            *last() = Some(map.clone());
            Ok(map)
        }
        Err(error) => {
            let known = last().clone().ok_or_else(|| Failure::from(error.clone()))?;
            Ok(GpuMap { late: Some(error.to_string()), ..known })
        }
    }
}

/// Every lease in force: `mlad who`. Of others' leases, `workload` is only its kind and `fence` 0.
#[utoipa::path(get, path = "/v1/leases", tag = "view", responses((status = 200, body = Vec<Lease>)))]
async fn list_leases(State(state): State<Rooms>, caller: Caller) -> Answer<Json<Vec<Lease>>> {
    let mut leases = state.allocator.leases().await?;
    for lease in leases.iter_mut().filter(|lease| !caller.may_see(&lease.user)) {
        lease.workload = kind(&lease.workload).into();
        lease.fence = 0;
    }
    Ok(Json(leases))
}

/// Every waiting request, first in line first. Of others' requests, `workload` is only its kind and `detail`
/// empty.
#[utoipa::path(get, path = "/v1/waits", tag = "view", responses((status = 200, body = Vec<Wait>)))]
async fn list_waits(State(state): State<Rooms>, caller: Caller) -> Answer<Json<Vec<Wait>>> {
    let mut waits = state.allocator.waits().await?;
    for wait in waits.iter_mut().filter(|wait| !caller.may_see(&wait.user)) {
        wait.workload = kind(&wait.workload).into();
        wait.detail.clear();
    }
    Ok(Json(waits))
}

/// What of the name of somebody else's workload is shown.
pub(super) fn kind(workload: &str) -> &'static str {
    if workload.starts_with("j-") { "job" } else { "workspace" }
}

/// The images the caller may use.
#[utoipa::path(get, path = "/v1/images", tag = "view", responses((status = 200, body = ImageList)))]
async fn list_images(State(state): State<Rooms>, caller: Caller) -> Answer<Json<ImageList>> {
    let images = state.catalog.list_for(&caller.0.user, caller.0.role, &*state.runtime).await?;
    Ok(Json(ImageList { images }))
}

/// What the caller may hold at once, and holds.
#[utoipa::path(get, path = "/v1/quota", tag = "view", responses((status = 200, body = Quota)))]
async fn get_quota(State(state): State<Rooms>, account: Account) -> Answer<Json<Quota>> {
    let leases = state.allocator.leases().await?;
    let mine = || leases.iter().filter(|lease| lease.user == account.user.name);
    let slices: usize = mine().map(|lease| lease.uuids.len()).sum();
    let memory: u64 = mine().map(|lease| lease.memory_mib.saturating_mul(lease.uuids.len() as u64)).sum();
    Ok(Json(Quota {
        slices_used: u32::try_from(slices).unwrap_or(u32::MAX),
        gpu_memory_mib_used: memory,
        jobs_used: state.store.count_live_jobs(account.user.id).await?,
        ..account.user.quota
    }))
}
