//! What the transport offers: which algorithms, to which client, with which timers.

use super::{flow, host_keys::HostIdentity};
use crate::config;
use russh::{
    MethodKind, MethodSet, Preferred, SshId, cipher, compression, kex,
    keys::{Algorithm, EcdsaCurve, HashAlg, PrivateKey},
    mac, server,
};
use std::{borrow::Cow, sync::Arc, time::Duration};

/// How the server names itself.
pub(super) const IDENTIFICATION: &str = concat!("SSH-2.0-MLAD_", env!("CARGO_PKG_VERSION"));
/// Keepalives without an answer after which a client counts as gone.
const KEEPALIVES: u32 = 10;
/// Largest packet, in bytes: what OpenSSH uses.
const PACKET: u32 = 32 * 1024;
/// Messages of all channels that wait for the connection's loop; at most a packet each.
const EVENTS: usize = 32;

const KEY_EXCHANGES: &[kex::Name] = &[
    kex::MLKEM768X25519_SHA256,
    kex::CURVE25519,
    kex::CURVE25519_PRE_RFC_8731,
    kex::EXTENSION_SUPPORT_AS_CLIENT,
    kex::EXTENSION_SUPPORT_AS_SERVER,
    kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
    kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
];

/// Host keys and the users' signatures that are taken (`server-sig-algs`). The RSA ones are for users only:
/// there is no RSA host key.
const SIGNATURES: &[Algorithm] = &[
    Algorithm::Ed25519,
    Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
    Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
    Algorithm::Ecdsa { curve: EcdsaCurve::NistP521 },
    Algorithm::SkEd25519,
    Algorithm::SkEcdsaSha2NistP256,
    Algorithm::Rsa { hash: Some(HashAlg::Sha512) },
    Algorithm::Rsa { hash: Some(HashAlg::Sha256) },
];

/// For everybody. CTR is for clients without an AEAD (Paramiko before 4), with encrypt-then-MAC only.
const CIPHERS: &[cipher::Name] =
    &[cipher::AES_128_GCM, cipher::AES_256_GCM, cipher::CHACHA20_POLY1305, cipher::AES_256_CTR, cipher::AES_128_CTR];

/// For clients known to have them: the client's order decides, OpenSSH's begins with ChaCha20, and with
/// AES-GCM the same connection is two to three times as fast.
const FAST_CIPHERS: &[cipher::Name] = &[cipher::AES_128_GCM, cipher::AES_256_GCM];

const MACS: &[mac::Name] = &[mac::HMAC_SHA256_ETM, mac::HMAC_SHA512_ETM];

/// The settings of russh, one for each kind of client.
pub(super) struct Transport {
    everybody: Arc<server::Config>,
    fast: Arc<server::Config>,
}

impl Transport {
    pub(super) fn new(settings: &config::Ssh, identity: &HostIdentity) -> Self {
        let with = |ciphers| {
            let mut config = server_config(settings, identity.keys.clone(), ciphers);
            config.certificates = identity.certificates.clone();
            Arc::new(config)
        };
        Self { everybody: with(CIPHERS), fast: with(FAST_CIPHERS) }
    }

    /// Without cipher and code of authenticity, so that a test can change what is said on the way.
    #[cfg(test)]
    pub(super) fn open_to_all(settings: &config::Ssh, keys: &[PrivateKey]) -> Self {
        let mut config = server_config(settings, keys.to_vec(), &[cipher::NONE]);
        config.preferred.mac = Cow::Borrowed(&[mac::NONE]);
        let config = Arc::new(config);
        Self { everybody: Arc::clone(&config), fast: config }
    }

    /// What to offer to the client of this identification string.
    pub(super) fn for_client(&self, identification: &str) -> Arc<server::Config> {
        Arc::clone(if has_fast_ciphers(identification) { &self.fast } else { &self.everybody })
    }
}

fn server_config(settings: &config::Ssh, keys: Vec<PrivateKey>, ciphers: &'static [cipher::Name]) -> server::Config {
    let keepalive = Duration::from_secs(settings.keepalive_seconds.max(1));
    server::Config {
        server_id: SshId::Standard(Cow::Borrowed(IDENTIFICATION)),
        methods: MethodSet::from([MethodKind::PublicKey, MethodKind::KeyboardInteractive].as_slice()),
        // Nothing is kept from a guesser by waiting: keys are no secrets, and codes have 120 bits and their
        // own limit. A client with five keys would wait four seconds.
        auth_rejection_time: Duration::ZERO,
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys,
        window_size: flow::INITIAL_WINDOW,
        maximum_packet_size: PACKET,
        // The read halves are dropped at once; nothing is ever queued there but the answer to an open.
        channel_buffer_size: 4,
        event_buffer_size: EVENTS,
        preferred: Preferred {
            kex: Cow::Borrowed(KEY_EXCHANGES),
            key: Cow::Borrowed(SIGNATURES),
            host_key_certificates: Cow::Borrowed(&[]),
            cipher: Cow::Borrowed(ciphers),
            mac: Cow::Borrowed(MACS),
            compression: Cow::Borrowed(&[compression::NONE]),
        },
        // Ours count codes and keys each; this one only ends a client that goes on regardless.
        max_auth_attempts: settings.max_tries.saturating_add(super::auth::MAX_OFFERS).saturating_add(2),
        keepalive_interval: Some(keepalive),
        keepalive_max: KEEPALIVES as usize,
        // A keepalive's answer is a sign of life, so this meets only those who answer none, or take no bytes.
        inactivity_timeout: Some(keepalive * (KEEPALIVES + 2)),
        nodelay: true,
        ..server::Config::default()
    }
}

/// OpenSSH has AES-GCM from 6.2 on.
fn has_fast_ciphers(identification: &str) -> bool {
    let Some(version) = identification.strip_prefix("SSH-2.0-OpenSSH_") else { return false };
    let mut numbers = version.split(|symbol: char| !symbol.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (6, 2),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::has_fast_ciphers;

    #[test]
    fn aes_gcm_alone_is_offered_to_those_known_to_have_it() {
        for fast in ["SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u10", "SSH-2.0-OpenSSH_6.2", "SSH-2.0-OpenSSH_10.0p2"] {
            assert!(has_fast_ciphers(fast), "{fast}");
        }
        let others =
            ["SSH-2.0-OpenSSH_6.1p1", "SSH-2.0-PuTTY_Release_0.78", "SSH-2.0-OpenSSH_", "SSH-2.0-paramiko_3.4"];
        for other in others {
            assert!(!has_fast_ciphers(other), "{other}");
        }
    }
}
