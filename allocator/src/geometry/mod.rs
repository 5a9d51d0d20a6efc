//! GPU models, their profiles and where instances may lie: pure data and functions, read from the driver.
//!
//! Nothing here asks a driver, holds a lease or looks at a clock.

mod columns;
#[cfg(test)]
pub(crate) mod facts;
mod layout;
mod model;
mod name;
mod need;

pub use columns::Columns;
pub use layout::{Placed, is_legal, legal_layouts, maximal_layouts};
pub use model::{Model, Profile, Resources, Share};
pub use name::ProfileName;
pub use need::{Impossible, Resolution, resolve};
