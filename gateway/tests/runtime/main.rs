//! The runtime, with real containers.
//!
//! * [`conformance`] — what every [`mlad_gateway::runtime::Runtime`] must do, with the real agent.
//! * [`kubernetes`] — the same for pods of a real cluster.
//! * [`docker`] — what is Docker's own: hostile containers, isolation, an engine that goes away.
//!
//! They need a Docker engine (`MLAD_TEST_DOCKER_SOCKET`), the static `mlad` (`MLAD_TEST_MLAD`), root, and
//! `busybox-static`; `scripts/test unit` has them; pods need what
//! `scripts/test kubernetes` has. Where the variables are not set, they say so and pass.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod conformance;
mod docker;
mod kubernetes;
mod stage;
