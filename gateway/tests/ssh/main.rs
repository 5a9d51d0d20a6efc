//! The SSH server against the real OpenSSH client, with a real agent on this host where a container would be.
//!
//! Needs root, since the agent serves another user.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a panic is how tests say no"
)]

#[path = "../common/mod.rs"]
mod common;

mod access;
mod certificates;
mod door;
mod enrolment;
mod forwarding;
mod hostile_agent;
mod hostile_client;
mod listening;
mod permissions;
mod picker;
mod protection;
mod sessions;
mod subsystems;
