//! Users' files through the real worker process, driven by the clients of OpenSSH and by hand-made packets.
//!
//! A worker is started as root, so these tests must be run as root.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    unreachable_pub,
    reason = "all of this is a test"
)]

mod clients;
mod confinement;
mod harness;
mod mlad;
mod packets;
mod scp;
mod tricks;
