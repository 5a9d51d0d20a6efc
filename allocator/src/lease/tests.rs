//! The ledger against machines in memory, and the engine against its own death.

mod crash;
mod ledger;

pub(super) use crash::Crash;
