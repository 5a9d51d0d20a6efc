//! Where the gateway's API is.

use crate::channel::API_SOCKET;
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
};

/// The administration socket of a gateway with the default folders.
const ADMIN_SOCKET: &str = "/run/mlad/admin.sock";

/// An address of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket: `unix:/path`.
    Unix(PathBuf),
    /// TCP: `http://127.0.0.1:8022`. An address, not a name: this program is static and does not resolve.
    Tcp(SocketAddr),
}

/// Why a text is no endpoint, or why there is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// The text is neither form.
    #[error("`{0}` is neither unix:/PATH nor http://ADDRESS:PORT (a numeric address or localhost)")]
    Malformed(String),
    /// No address was given and no socket is where it should be.
    #[error(
        "there is no gateway here: {API_SOCKET} does not exist. Inside a container it should; elsewhere say \
         --api unix:/PATH or --api http://ADDRESS:PORT, or use `ssh mlad@SERVER mlad …`"
    )]
    Missing,
}

impl Endpoint {
    /// The address `MLAD_API` names, else the in-container socket, else the administration socket of this
    /// machine.
    ///
    /// # Errors
    /// When `MLAD_API` is malformed, or it is unset and neither socket exists.
    pub fn from_environment() -> Result<Self, EndpointError> {
        if let Some(text) = std::env::var("MLAD_API").ok().filter(|text| !text.is_empty()) {
            return text.parse();
        }
        [API_SOCKET, ADMIN_SOCKET]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .map(|path| Self::Unix(path.into()))
            .ok_or(EndpointError::Missing)
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let malformed = || EndpointError::Malformed(text.chars().take(256).collect());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(malformed()) } else { Ok(Self::Unix(path.into())) };
        }
        let address = text.strip_prefix("http://").ok_or_else(malformed)?.trim_end_matches('/');
        if let Some(port) = address.strip_prefix("localhost:") {
            let port = port.parse().map_err(|_| malformed())?;
            return Ok(Self::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)));
        }
        address.parse().map(Self::Tcp).map_err(|_| malformed())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "http://{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_read_from_text() {
        for text in ["unix:/run/mlad/api.sock", "http://127.0.0.1:8022", "http://[::1]:8022"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        assert_eq!("http://localhost:80/".parse::<Endpoint>().unwrap().to_string(), "http://127.0.0.1:80");
        for text in ["", "unix:", "http://", "http://server:80", "http://127.0.0.1", "ftp://127.0.0.1:1"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }
}
