//! End-to-end tests: real clients against the real programs, as separate processes.
//!
//! A [`Site`] is one installation: a gateway with its own folders, ports, simulated machine and containers, all
//! gone when it is dropped. A [`Person`] is somebody with a key who logs in there. `scripts/test e2e` builds the
//! programs, starts the engine, and says in the environment where they are ([`Programs`]).

mod clients;
mod cluster;
mod site;
mod sshd;
mod wait;

pub use clients::{Lines, Outcome, Person, RunningClient, inside};
pub use cluster::OnCluster;
pub use site::{Programs, Site, SiteBuilder, ends_with_this_test};
pub use sshd::Sshd;
pub use wait::{eventually, eventually_some, within};
