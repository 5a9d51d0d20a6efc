//! The agent as a real process, driven over its sockets as the gateway does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "all of it is tests"
)]

mod forward;
mod harness;
mod job;
mod process_1;
mod session;
