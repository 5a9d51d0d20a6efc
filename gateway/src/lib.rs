//! The gateway: SSH server, HTTP API, and the controllers of workspaces and jobs.
//!
//! * [`config`] — the settings, read from TOML.
//! * [`ssh`] — listen, authenticate, bridge channels to agents.
//! * [`login`] — who you are → which workspace; picker, progress, greeting.
//! * [`files`] — the confined worker that serves sftp and scp; reading users' files safely.
//! * [`workspace`] — the controller of workspaces.
//! * [`job`] — the controller of jobs.
//! * [`quota`] — what users and projects may hold, as the allocator is told it.
//! * [`runtime`] — what runs containers: the trait, and Docker.
//! * [`image`] — the catalog.
//! * [`api`] — the HTTP API.
//! * [`store`] — the database.

pub mod api;
pub mod config;
pub mod files;
pub mod image;
pub mod job;
pub mod login;
pub mod quota;
pub mod runtime;
pub mod ssh;
pub mod store;
#[cfg(test)]
mod testing;
pub mod workspace;
