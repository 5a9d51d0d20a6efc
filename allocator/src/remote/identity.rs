//! Who is who: certificates of one authority on both sides, TLS 1.3.

use crate::AllocatorError;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::verify_server_name,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::{ParsedCertificate, WebPkiClientVerifier},
    version::TLS13,
};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The longest name of a node, as in DNS.
const LONGEST_NAME: usize = 63;

/// Files by which one side shows who it is, and knows the other: PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Its certificate, with those between it and the authority.
    pub certificate: PathBuf,
    /// The key of it, which nobody else may read.
    pub key: PathBuf,
    /// The certificate of the authority that both sides trust.
    pub authority: PathBuf,
}

/// Whether a text can name a node: as a host in DNS, in lower case.
pub fn is_node_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    text.len() <= LONGEST_NAME && text.bytes().all(allowed) && ServerName::try_from(text).is_ok_and(is_dns)
}

fn is_dns(name: ServerName<'_>) -> bool {
    matches!(name, ServerName::DnsName(_))
}

impl Credentials {
    /// For the allocator, which hears only who shows a certificate of the authority.
    ///
    /// # Errors
    /// [`AllocatorError::Settings`] naming the file that cannot be used.
    pub(super) fn server(&self) -> Result<ServerConfig, AllocatorError> {
        let (chain, key) = (self.chain()?, self.key()?);
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()?), provider()).build();
        let clients = clients.map_err(|error| wrong(&self.authority, error))?;
        let config = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
        let config = config.map_err(|error| wrong(&self.certificate, error))?.with_client_cert_verifier(clients);
        config.with_single_cert(chain, key).map_err(|error| wrong(&self.certificate, error))
    }

    /// For a daemon, which speaks only to who shows a certificate of the authority for the name it connects to.
    ///
    /// # Errors
    /// [`AllocatorError::Settings`] naming the file that cannot be used.
    pub(super) fn client(&self) -> Result<ClientConfig, AllocatorError> {
        let (chain, key) = (self.chain()?, self.key()?);
        let config = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
        let config = config.map_err(|error| wrong(&self.certificate, error))?.with_root_certificates(self.roots()?);
        config.with_client_auth_cert(chain, key).map_err(|error| wrong(&self.certificate, error))
    }

    fn chain(&self) -> Result<Vec<CertificateDer<'static>>, AllocatorError> {
        let chain =
            CertificateDer::pem_file_iter(&self.certificate).map_err(|error| wrong(&self.certificate, error))?;
        chain.collect::<Result<_, _>>().map_err(|error| wrong(&self.certificate, error))
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>, AllocatorError> {
        let mode = fs::metadata(&self.key).map_err(|error| wrong(&self.key, error))?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(wrong(
                &self.key,
                format!("others than its owner have access to it (mode {mode:04o}); chmod 600 it"),
            ));
        }
        PrivateKeyDer::from_pem_file(&self.key).map_err(|error| wrong(&self.key, error))
    }

    fn roots(&self) -> Result<RootCertStore, AllocatorError> {
        let mut roots = RootCertStore::empty();
        let authorities =
            CertificateDer::pem_file_iter(&self.authority).map_err(|error| wrong(&self.authority, error))?;
        for authority in authorities {
            let authority = authority.map_err(|error| wrong(&self.authority, error))?;
            roots.add(authority).map_err(|error| wrong(&self.authority, error))?;
        }
        Ok(roots)
    }
}

/// Whether a certificate is for a node of this name.
pub(super) fn is_for(certificate: &CertificateDer<'_>, node: &str) -> bool {
    let (Ok(name), Ok(certificate)) = (ServerName::try_from(node), ParsedCertificate::try_from(certificate)) else {
        return false;
    };
    verify_server_name(&certificate, &name).is_ok()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn wrong(path: &Path, why: impl std::fmt::Display) -> AllocatorError {
    AllocatorError::Settings(format!("{}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_nodes() {
        for name in ["dgx-1", "gpu01.example.org", "n"] {
            assert!(is_node_name(name), "{name}");
        }
        for name in ["", "DGX", "a b", "-", "10.0.0.1", "a/b", "x".repeat(64).as_str(), "ä"] {
            assert!(!is_node_name(name), "{name}");
        }
    }
}
