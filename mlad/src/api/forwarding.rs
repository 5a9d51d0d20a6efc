//! What may be forwarded over SSH connections.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What may be forwarded; what is absent may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Forwarding {
    /// Connections into the workspace (`-L`, `-D`, `-W`, `-J`), to ports and sockets.
    pub local: bool,
    /// Listeners in the workspace (`-R`), on ports and sockets.
    pub remote: bool,
    /// The client's key agent (`-A`).
    pub agent: bool,
    /// X11 (`-X`, `-Y`).
    pub x11: bool,
}

impl Default for Forwarding {
    fn default() -> Self {
        Self { local: true, remote: true, agent: true, x11: true }
    }
}

impl Forwarding {
    /// What both allow.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            local: self.local && other.local,
            remote: self.remote && other.remote,
            agent: self.agent && other.agent,
            x11: self.x11 && other.x11,
        }
    }
}
