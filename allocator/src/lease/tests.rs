//! The ledger against machines in memory; the engine against its own death, batches and GPUs that hang.

mod crash;
mod engine;
mod idle;
mod ledger;
mod line;
mod nodes;
mod quarantine;
mod reserve;
mod told;

pub(super) use crash::Crash;
