//! The ledger: who asked, who holds what, who did; kept in memory and, before anything is answered, in the
//! database.
//!
//! * [`Embedded`] — the allocator in this process; [`Settings`] says how.
//! * `engine` — the one task that owns the ledger, its database and its GPUs.
//! * `ledger` — the state and its transitions: no I/O, the time as an argument.
//! * `line` — who of those that wait is served; `shares` — whose limits and whose share a lease counts for.
//! * `idle` — leases that nobody uses.
//! * `nodes` — the machines with GPUs: which answer, which are lost.
//! * `quarantine` — GPUs that are not to be trusted.
//! * `reserve` — space that is set aside for a time.
//! * `usage` — what a lease has used, day by day: pure.
//! * `store` — SQL.

mod admit;
mod deadlines;
mod embedded;
mod engine;
mod gpu;
mod idle;
mod ledger;
mod line;
mod machine;
mod nodes;
mod quarantine;
mod record;
mod reserve;
mod shares;
mod store;
mod usage;
mod view;

pub use embedded::{Embedded, Gpus, QueueSettings, Settings};
pub(crate) use nodes::{Joining, Unwelcome};
pub use store::read_records;

#[cfg(test)]
mod tests;
