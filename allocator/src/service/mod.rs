//! The allocator over HTTP: a server around any [`Allocate`](crate::Allocate), and a client that is one.
//!
//! Spoken between machines of one installation, not with users: HTTP/1.1 with JSON, over a Unix socket that
//! only its owner can open, or over TCP with a bearer token. Every call can be repeated.

mod client;
mod server;
mod wire;

pub use client::HttpAllocator;
pub use server::{Listen, Listener, Token, serve};
