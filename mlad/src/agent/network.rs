//! The way in for a gateway on another machine: TLS on a TCP port, where both sides show certificates.
//!
//! The agent's certificate and key were made for this workload alone. Whoever may come in is whoever the authority in
//! its configuration has named a client; the certificates of agents are for servers only, so that no agent passes for
//! a gateway at another.

use super::{
    AgentError,
    incoming::accept_each,
    limits,
    server::{Shared, open},
};
use crate::channel::{AgentNetwork, Line, relay};
use std::{io, sync::Arc};
use tokio::{
    net::{TcpListener, TcpStream, UnixStream},
    sync::OwnedSemaphorePermit,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
        server::WebPkiClientVerifier,
        version::TLS13,
    },
};

/// Where gateways on other machines come in.
pub(super) struct Door {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Door {
    /// Listens.
    ///
    /// # Errors
    /// When the port is taken, or a certificate or the key is none.
    pub(super) async fn open(network: &AgentNetwork) -> Result<Self, AgentError> {
        let failed = || AgentError::system(format!("cannot listen on {}", network.listen));
        let settings = settings(network).map_err(failed())?;
        let listener = TcpListener::bind(network.listen).await.map_err(failed())?;
        Ok(Self { listener, acceptor: TlsAcceptor::from(Arc::new(settings)) })
    }

    /// Takes connections for as long as the agent lives.
    pub(super) async fn accept(self, shared: &Arc<Shared>) {
        let accept = async || self.listener.accept().await.map(|(stream, _)| stream);
        let serve = |stream, permit| {
            let (task, acceptor) = (Arc::clone(shared), self.acceptor.clone());
            shared.spawn(async move { serve(stream, acceptor, &task, permit).await });
        };
        accept_each(limits::CONNECTIONS, "the network", accept, serve).await;
    }
}

/// Serves one connection to its end, as if it had come by the socket.
async fn serve(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    shared: &Arc<Shared>,
    permit: OwnedSemaphorePermit,
) -> io::Result<()> {
    let line = Line::of(&stream)?;
    let far = tokio::time::timeout(limits::OPEN_TIME, acceptor.accept(stream)).await??;
    let (inside, outside) = UnixStream::pair()?;
    let (opened, carried) = tokio::join!(open(inside, shared, permit), relay(outside, far, line));
    opened.and(carried)
}

fn settings(network: &AgentNetwork) -> io::Result<ServerConfig> {
    let wrong = |error: &dyn std::fmt::Display| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
    let certificate = CertificateDer::from_pem_slice(network.certificate.as_bytes()).map_err(|error| wrong(&error))?;
    let key = PrivateKeyDer::from_pem_slice(network.key.as_bytes()).map_err(|error| wrong(&error))?;
    let authority = CertificateDer::from_pem_slice(network.authority.as_bytes()).map_err(|error| wrong(&error))?;
    let mut authorities = RootCertStore::empty();
    authorities.add(authority).map_err(|error| wrong(&error))?;
    let clients = WebPkiClientVerifier::builder(Arc::new(authorities)).build().map_err(|error| wrong(&error))?;
    ServerConfig::builder_with_protocol_versions(&[&TLS13])
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![certificate], key)
        .map_err(|error| wrong(&error))
}
