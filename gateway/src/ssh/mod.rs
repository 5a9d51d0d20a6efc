//! The SSH server: listens, authenticates, bridges channels to agents. The only room that names russh.
//!
//! It ends SSH: who is calling is known from a key ([`auth`]), and every channel a client opens is served by
//! a task and an agent connection of its own, so that one that stalls stalls alone ([`flow`]). What is
//! behind the door — workspaces, workers for files — is a contract ([`Backend`]). Not here: which workspace
//! somebody gets, and what it is made of.
//!
//! * [`serve`] — the whole server, until it is told to stop.
//! * [`raise_descriptor_limit`] — what a process that serves needs of its system.
//! * [`parse_key`] — a public key as people give it.

mod agent;
mod algorithms;
mod auth;
mod backend;
mod callbacks;
mod certificate;
mod client;
mod connection;
mod descriptors;
#[cfg(test)]
mod flood;
mod flow;
mod forward;
mod framed_session;
mod gateway;
mod grant;
mod host_keys;
mod inbox;
mod key;
mod limits;
mod listening;
mod outlet;
mod penalties;
mod person;
mod piped_session;
mod proxy_header;
mod pump;
mod server;
mod session;
mod setup;
mod words;
mod worker_session;
mod workplace;

pub use backend::{Backend, Entered, Place, Refusal, Worker, WorkerKind};
pub use descriptors::raise_descriptor_limit;
pub use gateway::Gateway;
pub use host_keys::{HostKeyError, make_host_keys};
pub use key::{KeyError, parse_key};
pub use server::{SshState, serve};
