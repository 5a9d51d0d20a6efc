//! Who may speak to whose agent: an authority of this instance, kept as a secret of the cluster so that several
//! gateways share it, and certificates for every pod made by it.

use super::super::{RuntimeError, workload::LABEL_INSTANCE};
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Api, api::PostParams};
use mlad::channel::AgentNetwork;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
        version::TLS13,
    },
};

/// Keys of the secret.
const KEY: &str = "key.pem";
const CERTIFICATE: &str = "certificate.pem";

/// The authority, and this gateway as one of its clients.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
    connector: TlsConnector,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Authority {
    /// That of the cluster; made if there is none yet.
    ///
    /// # Errors
    /// When the cluster does not answer, or what is there is no authority.
    pub(super) async fn of(secrets: &Api<Secret>, instance: &str) -> Result<Self, RuntimeError> {
        let name = format!("{instance}-agent-authority");
        let secret = match super::answered(secrets.get_opt(&name)).await? {
            Some(secret) => secret,
            None => {
                let made = secret(&name, instance).map_err(|error| broken(&name, &error))?;
                match super::answered(secrets.create(&PostParams::default(), &made)).await {
                    // Another gateway was first.
                    Err(error) if error.is_conflict() => super::answered(secrets.get(&name)).await?,
                    result => result?,
                }
            }
        };
        let part = |key: &str| {
            let bytes = secret.data.as_ref().and_then(|data| data.get(key));
            let text = bytes.and_then(|bytes| String::from_utf8(bytes.0.clone()).ok());
            text.ok_or_else(|| broken(&name, &format!("it has no {key}")))
        };
        Self::from_pem(&part(KEY)?, part(CERTIFICATE)?).map_err(|error| broken(&name, &error))
    }

    fn from_pem(key: &str, certificate: String) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let issuer = Issuer::new(authority(), KeyPair::from_pem(key)?);
        let own_key = KeyPair::generate()?;
        let own = leaf("gateway", ExtendedKeyUsagePurpose::ClientAuth)?.signed_by(&own_key, &issuer)?;
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(certificate.as_bytes())?)?;
        let key = PrivateKeyDer::try_from(own_key.serialize_der())?;
        let config = ClientConfig::builder_with_protocol_versions(&[&TLS13])
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![own.der().clone()], key)?;
        Ok(Self { issuer, certificate, connector: TlsConnector::from(Arc::new(config)) })
    }

    /// What the agent of a workload needs to be reached at `listen`.
    ///
    /// # Errors
    /// When the workload's name cannot stand in a certificate.
    pub(super) fn network(&self, workload: &str, listen: SocketAddr) -> Result<AgentNetwork, rcgen::Error> {
        let key = KeyPair::generate()?;
        let certificate = leaf(workload, ExtendedKeyUsagePurpose::ServerAuth)?.signed_by(&key, &self.issuer)?;
        Ok(AgentNetwork {
            listen,
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            authority: self.certificate.clone(),
        })
    }

    /// Connects to agents as this gateway.
    pub(super) fn connector(&self) -> &TlsConnector {
        &self.connector
    }
}

fn secret(name: &str, instance: &str) -> Result<Secret, rcgen::Error> {
    let key = KeyPair::generate()?;
    let certificate = authority().self_signed(&key)?;
    let part = |key: &str, text: String| (key.to_owned(), ByteString(text.into_bytes()));
    let mut secret = Secret {
        data: Some(BTreeMap::from([part(KEY, key.serialize_pem()), part(CERTIFICATE, certificate.pem())])),
        ..Secret::default()
    };
    secret.metadata.name = Some(name.to_owned());
    secret.metadata.labels = Some(BTreeMap::from([(LABEL_INSTANCE.to_owned(), instance.to_owned())]));
    Ok(secret)
}

fn authority() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "MLAD agents");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn leaf(name: &str, purpose: ExtendedKeyUsagePurpose) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![purpose];
    Ok(params)
}

fn broken(name: &str, reason: &dyn std::fmt::Display) -> RuntimeError {
    RuntimeError::Host(format!(
        "the secret {name} of the cluster is no authority for agents: {reason}; delete it, and it is made anew (the \
         workloads that run have to be started again)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::{
        TlsAcceptor,
        rustls::{ServerConfig, pki_types::ServerName, server::WebPkiClientVerifier},
    };

    fn made() -> Authority {
        let secret = secret("a", "mlad").unwrap();
        let part = |key: &str| String::from_utf8(secret.data.as_ref().unwrap()[key].0.clone()).unwrap();
        Authority::from_pem(&part(KEY), part(CERTIFICATE)).unwrap()
    }

    fn agent(network: &AgentNetwork) -> TlsAcceptor {
        let certificate = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate(&network.authority)).unwrap();
        let clients = WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap();
        let key = PrivateKeyDer::from_pem_slice(network.key.as_bytes()).unwrap();
        let config = ServerConfig::builder_with_protocol_versions(&[&TLS13])
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![certificate(&network.certificate)], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    async fn meet(connector: &TlsConnector, name: &str, agent: TlsAcceptor) -> (bool, bool) {
        use tokio::io::AsyncReadExt as _;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = async { agent.accept(listener.accept().await.unwrap().0).await.is_ok() };
        let come = async {
            let stream = TcpStream::connect(address).await.unwrap();
            let name = ServerName::try_from(name.to_owned()).unwrap();
            let Ok(mut stream) = connector.connect(name, stream).await else { return false };
            // In TLS 1.3 a client hears of its refusal only when it reads.
            stream.read(&mut [0]).await.is_ok_and(|count| count == 0)
        };
        tokio::join!(come, serve)
    }

    #[tokio::test]
    async fn a_gateway_and_the_agent_of_that_workload_know_each_other() {
        let ours = made();
        let network = ours.network("w-1-1", "0.0.0.0:1".parse().unwrap()).unwrap();
        assert!(meet(ours.connector(), "w-1-1", agent(&network)).await.1);
        assert!(!meet(ours.connector(), "w-2-1", agent(&network)).await.0, "another workload's agent");
        let others = made();
        let (came, let_in) = meet(others.connector(), "w-1-1", agent(&network)).await;
        assert!(!came && !let_in, "another instance's gateway");
    }

    #[tokio::test]
    async fn an_agent_cannot_pose_as_a_gateway() {
        let ours = made();
        let network = ours.network("w-1-1", "0.0.0.0:1".parse().unwrap()).unwrap();
        let victim = ours.network("w-2-1", "0.0.0.0:1".parse().unwrap()).unwrap();
        let certificate = CertificateDer::from_pem_slice(network.certificate.as_bytes()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(network.authority.as_bytes()).unwrap()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(network.key.as_bytes()).unwrap();
        let config = ClientConfig::builder_with_protocol_versions(&[&TLS13])
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![certificate], key)
            .unwrap();
        assert!(!meet(&TlsConnector::from(Arc::new(config)), "w-2-1", agent(&victim)).await.1);
    }
}
