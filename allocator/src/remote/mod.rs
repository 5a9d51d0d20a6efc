//! GPUs of other machines: the daemon on each, and who hears it here.
//!
//! A daemon (`mlad-allocator node`) owns its machine's driver, reports what it reads and does what it is ordered, over
//! one TLS connection on which both sides show a certificate of one authority. It holds a lease on the GPUs of its
//! machine and renews it. If it cannot, it ends what they are used for by itself, so that nothing runs there any more
//! when the allocator says that the node is lost.
//!
//! * `daemon` — the daemon: connects, obeys, and ends what runs when its lease runs out; `session` — one connection of
//!   it; `desk` — what its GPUs report meanwhile.
//! * `hub` — the allocator's side: accepts daemons and hands what they say to the ledger's task.
//! * `lease_clock` — when a daemon's lease runs out, by a clock that nobody sets, also over restarts of the daemon.
//! * `identity`, `certificates` — who is who.
//! * `wire` — what travels.
//!
//! A daemon is believed about its own machine only. What it sends is bounded in size, and checked.

mod certificates;
mod daemon;
mod desk;
mod hub;
mod identity;
mod lease_clock;
mod session;
mod wire;

pub use certificates::{issue, make_authority};
pub(crate) use daemon::boot;
pub use daemon::{Daemon, DaemonSettings};
pub use hub::NodeSettings;
pub(crate) use hub::{Hub, NodeEvent, order, unwritten};
pub use identity::{Credentials, is_node_name};
pub(crate) use wire::ToNode;

use std::time::Duration;

/// How long a node's own lease lasts, usually: the allocator may be away for so long without anything being ended. Its
/// daemon renews it three times as often.
pub const LEASE: Duration = Duration::from_secs(120);
