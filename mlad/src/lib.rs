//! `mlad`: the user's command, the agent that is process 1 of every container, and the Rust SDK.
//!
//! * [`api`] — the types of the HTTP API, shared by gateway, allocator and client.
//! * [`client`] — the SDK: calls the API over the in-container socket or TCP.
//! * [`channel`] — the protocol between gateway and agent (see `docs/agent-protocol.md`).
//! * [`agent`] — the agent itself.
//! * [`cli`] — the commands a person types.

pub mod agent;
pub mod api;
pub mod channel;
pub mod cli;
pub mod client;
