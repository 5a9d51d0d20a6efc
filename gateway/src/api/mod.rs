//! The HTTP API `/v1`, the same on the in-container socket, the administration socket and TCP.
//!
//! Who calls is an [`Identity`](mlad::api::Identity) that the connection carries: a workload's own on its
//! control connection, `root` on the administration socket; on TCP it is the bearer token's user. Handlers
//! take it by the extractors of `caller`, which deny by default.
//!
//! * [`serve_stream`] — one connection of a known caller.
//! * [`serve_tcp`], [`serve_admin`] — the listeners.
//! * [`ControlHub`] — the calls that come out of running workloads.
//! * [`openapi`] — the document that describes it all.

mod account;
mod admin;
mod artifacts;
mod authorities;
mod caller;
mod control;
mod failure;
mod forwarding;
mod history;
mod jobs;
mod listener;
mod nodes;
mod openapi;
mod projects;
mod range;
mod reservations;
mod server;
#[cfg(test)]
mod tests;
mod turns;
mod view;
mod workspaces;

pub use control::ControlHub;
pub use listener::{bind_admin, serve_admin, serve_tcp};
pub use openapi::openapi;
pub use server::serve_stream;

use crate::{config::Config, image::Catalog, job::Jobs, runtime::Runtime, store::Store, workspace::Workspaces};
use axum::Router;
use mlad::api::GpuMap;
use mlad_allocator::Allocate;
use std::sync::{Arc, Mutex};
use turns::Turns;

/// What the API answers from.
#[derive(Clone)]
pub struct Rooms {
    /// The settings.
    pub config: Arc<Config>,
    /// The database.
    pub store: Store,
    /// Who holds which slice.
    pub allocator: Arc<dyn Allocate>,
    /// What runs containers.
    pub runtime: Arc<dyn Runtime>,
    /// The images.
    pub catalog: Arc<Catalog>,
    /// The controller of workspaces.
    pub workspaces: Workspaces,
    /// The controller of jobs.
    pub jobs: Jobs,
    /// What the allocator said last of the GPUs.
    last_map: Arc<Mutex<Option<GpuMap>>>,
    /// Who may list files now.
    pub(crate) listings: Turns,
}

impl Rooms {
    /// All rooms together.
    pub fn new(
        config: Arc<Config>,
        store: Store,
        allocator: Arc<dyn Allocate>,
        runtime: Arc<dyn Runtime>,
        catalog: Arc<Catalog>,
        workspaces: Workspaces,
        jobs: Jobs,
    ) -> Self {
        Self {
            config,
            store,
            allocator,
            runtime,
            catalog,
            workspaces,
            jobs,
            last_map: Arc::default(),
            listings: Turns::default(),
        }
    }
}

/// The API, ready to be served on any number of connections.
#[derive(Clone)]
pub struct ApiState {
    rooms: Rooms,
    router: Router,
}

impl ApiState {
    /// Makes it.
    pub fn new(rooms: Rooms) -> Self {
        let router = server::router(rooms.clone());
        Self { rooms, router }
    }
}
