//! What an OpenSSH user certificate says: whom it is for, until when, from where, and what it allows.
//!
//! That it was signed by the key it names, and that whoever shows it holds the key it certifies, russh has checked
//! when it comes here. Whether that authority is trusted, and who the user is, is [`auth`](super::auth)'s. Nothing
//! here does I/O; the time is an argument.

use super::{
    grant::Grant,
    key::{KeyError, check_key, fingerprint, is_signature_taken},
};
use crate::{config::IpNetwork, store::CertificateName};
use jiff::Timestamp;
use mlad::api::Forwarding;
use russh::keys::{Certificate, PublicKey, ssh_key::certificate::CertType};
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// Principals of one certificate.
const MAX_PRINCIPALS: usize = 64;
/// Longest principal and key id that are repeated to somebody, in characters.
const MAX_SHOWN: usize = 64;
/// Longest forced command, in bytes.
const MAX_COMMAND: usize = 64 * 1024;
/// The critical option that says what is run.
const FORCE_COMMAND: &str = "force-command";
/// The critical option that says where it may be used.
const SOURCE_ADDRESS: &str = "source-address";

/// A certificate that could let somebody in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Certified {
    /// What can be revoked of it.
    pub(super) name: CertificateName,
    /// Whom it is for, each once; never none.
    pub(super) principals: Vec<String>,
    /// When it ends; never if absent.
    pub(super) expires_at: Option<Timestamp>,
    /// What it allows.
    pub(super) grant: Grant,
}

/// Why a certificate lets nobody in, whoever signed it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum CertificateError {
    /// It is a server's.
    #[error("this certificate is a host's, not a user's (ssh-keygen makes those with -h)")]
    Host,
    /// Its time has not come, or is over.
    #[error("your certificate is not valid {0}; ask for another, and look at the clocks")]
    Time(&'static str),
    /// Somebody signed with SHA-1.
    #[error(
        "your certificate is signed with {0}, which is too weak; ask for one made with `ssh-keygen -t rsa-sha2-512`"
    )]
    Signature(String),
    /// Its key would not be let in, either.
    #[error("your certificate is of no use: {0}")]
    Key(#[from] KeyError),
    /// It is for everybody, or for too many.
    #[error("your certificate names {0} principals, and must name 1 to {MAX_PRINCIPALS} (ssh-keygen -n)")]
    Principals(usize),
    /// It asks for something to be seen to that is not known here.
    #[error("your certificate has the critical option {0}, which this server does not know")]
    Option(String),
    /// A critical option cannot be read.
    #[error("the critical option {0} of your certificate cannot be read")]
    Malformed(&'static str),
    /// It is not for there.
    #[error("your certificate is not for use from your address {0}")]
    Source(IpAddr),
}

impl fmt::Display for Certified {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CertificateName { authority, serial, key_id, key } = &self.name;
        write!(formatter, "certificate {} (serial {serial}) of {authority} for {key}", shown(key_id))
    }
}

/// What a certificate says, if it could let somebody in from there, now.
pub(super) fn examine(certificate: &Certificate, peer: IpAddr, now: Timestamp) -> Result<Certified, CertificateError> {
    if certificate.cert_type() != CertType::User {
        return Err(CertificateError::Host);
    }
    check_time(certificate, now)?;
    let algorithm = certificate.signature().algorithm();
    if !is_signature_taken(&algorithm) {
        return Err(CertificateError::Signature(algorithm.to_string()));
    }
    let key = PublicKey::new(certificate.public_key().clone(), "");
    let authority = PublicKey::new(certificate.signature_key().clone(), "");
    check_key(&key)?;
    check_key(&authority)?;
    Ok(Certified {
        name: CertificateName {
            authority: fingerprint(&authority),
            serial: certificate.serial(),
            key_id: certificate.key_id().into(),
            key: fingerprint(&key),
        },
        principals: principals(certificate)?,
        expires_at: i64::try_from(certificate.valid_before())
            .ok()
            .and_then(|seconds| Timestamp::from_second(seconds).ok()),
        grant: grant(certificate, peer)?,
    })
}

/// Text of a certificate as it can be repeated to somebody.
pub(super) fn shown(text: &str) -> String {
    text.chars().filter(|symbol| !symbol.is_control()).take(MAX_SHOWN).collect()
}

/// From the first second of its time to before the last (PROTOCOL.certkeys).
fn check_time(certificate: &Certificate, now: Timestamp) -> Result<(), CertificateError> {
    let now = u64::try_from(now.as_second()).unwrap_or(0);
    if now < certificate.valid_after() {
        return Err(CertificateError::Time("yet"));
    }
    if now >= certificate.valid_before() {
        return Err(CertificateError::Time("any more"));
    }
    Ok(())
}

/// One without principals would be everybody's: it is nobody's here.
fn principals(certificate: &Certificate) -> Result<Vec<String>, CertificateError> {
    let mut principals = certificate.valid_principals().to_vec();
    if principals.is_empty() || principals.len() > MAX_PRINCIPALS {
        return Err(CertificateError::Principals(principals.len()));
    }
    principals.sort_unstable();
    principals.dedup();
    Ok(principals)
}

fn grant(certificate: &Certificate, peer: IpAddr) -> Result<Grant, CertificateError> {
    let mut command = None;
    for (name, value) in certificate.critical_options().iter() {
        match name.as_str() {
            FORCE_COMMAND if !value.is_empty() && value.len() <= MAX_COMMAND && !value.contains('\0') => {
                command = Some(value.clone());
            }
            FORCE_COMMAND => return Err(CertificateError::Malformed(FORCE_COMMAND)),
            SOURCE_ADDRESS => check_source(value, peer.to_canonical())?,
            other => return Err(CertificateError::Option(shown(other))),
        }
    }
    let permits = |extension: &str| certificate.extensions().contains_key(extension);
    let ports = permits("permit-port-forwarding");
    let forwarding = Forwarding {
        local: ports,
        remote: ports,
        agent: permits("permit-agent-forwarding"),
        x11: permits("permit-X11-forwarding"),
    };
    // `permit-user-rc` allows what is never done here: to run ~/.ssh/rc.
    Ok(Grant { terminal: permits("permit-pty"), forwarding, command })
}

/// The list is read to its end: one with a mistake in it holds nowhere.
fn check_source(list: &str, peer: IpAddr) -> Result<(), CertificateError> {
    let networks: Option<Vec<IpNetwork>> = list.split(',').map(network).collect();
    let networks = networks.ok_or(CertificateError::Malformed(SOURCE_ADDRESS))?;
    if networks.iter().any(|network| network.contains(peer)) { Ok(()) } else { Err(CertificateError::Source(peer)) }
}

/// An address alone is a network of one.
fn network(text: &str) -> Option<IpNetwork> {
    let text = text.trim();
    let whole = match text.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => format!("{text}/{}", Ipv4Addr::BITS),
        Ok(IpAddr::V6(_)) => format!("{text}/{}", Ipv6Addr::BITS),
        Err(_) => text.into(),
    };
    whole.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::ToSpan as _;
    use proptest::prelude::*;
    use russh::keys::{Algorithm, PrivateKey, ssh_key::certificate::Builder};

    const PEER: &str = "192.0.2.7";

    fn key() -> PrivateKey {
        PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap()
    }

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    /// A certificate for alice, and what a test makes of it.
    fn certificate(change: impl FnOnce(&mut Builder)) -> Certificate {
        let mut builder =
            Builder::new_with_random_nonce(&mut rand::rng(), key().public_key(), 1_700_000_000, 1_900_000_000).unwrap();
        builder.serial(7).unwrap().key_id("alice@laptop").unwrap();
        change(&mut builder);
        builder.sign(&key()).unwrap()
    }

    fn for_alice(change: impl FnOnce(&mut Builder)) -> Result<Certified, CertificateError> {
        let certificate = certificate(|builder| {
            builder.valid_principal("alice").unwrap();
            change(builder);
        });
        examine(&certificate, PEER.parse().unwrap(), now())
    }

    #[test]
    fn a_certificate_allows_what_it_says_and_no_more() {
        let bare = for_alice(|_| {}).unwrap();
        assert_eq!((bare.principals.as_slice(), bare.name.serial), (&["alice".to_owned()][..], 7));
        assert_eq!(bare.expires_at, Some(Timestamp::from_second(1_900_000_000).unwrap()));
        let nothing = Forwarding { local: false, remote: false, agent: false, x11: false };
        assert_eq!(bare.grant, Grant { terminal: false, forwarding: nothing, command: None });
        let extensions = ["permit-pty", "permit-port-forwarding", "permit-agent-forwarding", "permit-X11-forwarding"];
        let full = for_alice(|builder| {
            for extension in extensions.into_iter().chain(["unknown@example.org"]) {
                builder.extension(extension, "").unwrap();
            }
        });
        assert_eq!(full.unwrap().grant, Grant::everything());
    }

    #[test]
    fn what_is_critical_is_kept_or_refused() {
        let forced = for_alice(|builder| {
            builder.critical_option("force-command", "backup --now").unwrap();
        });
        assert_eq!(forced.unwrap().grant.command.as_deref(), Some("backup --now"));
        for (name, value, refused) in [
            ("force-command", "", CertificateError::Malformed(FORCE_COMMAND)),
            ("verify-required", "", CertificateError::Option("verify-required".into())),
            ("source-address", "192.0.2.8,10.0.0.0/8", CertificateError::Source(PEER.parse().unwrap())),
            ("source-address", "192.0.2.7,nonsense", CertificateError::Malformed(SOURCE_ADDRESS)),
            ("source-address", "!192.0.2.7", CertificateError::Malformed(SOURCE_ADDRESS)),
            ("source-address", "192.0.2.7/24", CertificateError::Malformed(SOURCE_ADDRESS)),
            ("source-address", "", CertificateError::Malformed(SOURCE_ADDRESS)),
        ] {
            let made = for_alice(|builder| {
                builder.critical_option(name, value).unwrap();
            });
            assert_eq!(made, Err(refused), "{name} {value:?}");
        }
        for list in [PEER, "10.0.0.0/8,192.0.2.0/24", "0.0.0.0/0", "2001:db8::1, 192.0.2.7"] {
            let made = for_alice(|builder| {
                builder.critical_option("source-address", list).unwrap();
            });
            assert!(made.is_ok(), "{list}");
        }
    }

    #[test]
    fn it_is_for_users_by_name_in_its_time() {
        let peer = PEER.parse().unwrap();
        let good = certificate(|builder| {
            builder.valid_principal("alice").unwrap().valid_principal("bob").unwrap();
        });
        assert_eq!(examine(&good, peer, now()).unwrap().principals, ["alice", "bob"]);
        let at = |second| Timestamp::from_second(second).unwrap();
        for (time, refused) in [(at(1_699_999_999), "yet"), (at(1_900_000_000), "any more")] {
            assert_eq!(examine(&good, peer, time), Err(CertificateError::Time(refused)));
        }
        assert!(examine(&good, peer, at(1_700_000_000)).is_ok());
        assert!(examine(&good, peer, at(1_900_000_000) - 1.nanosecond()).is_ok());
        let anybody = certificate(|builder| {
            builder.all_principals_valid().unwrap();
        });
        assert_eq!(examine(&anybody, peer, now()), Err(CertificateError::Principals(0)));
        let host = for_alice(|builder| {
            builder.cert_type(CertType::Host).unwrap();
        });
        assert_eq!(host, Err(CertificateError::Host));
        let many = for_alice(|builder| {
            for number in 0..MAX_PRINCIPALS {
                builder.valid_principal(format!("user{number}")).unwrap();
            }
        });
        assert_eq!(many, Err(CertificateError::Principals(MAX_PRINCIPALS + 1)));
    }

    #[test]
    fn what_is_repeated_of_it_plays_no_tricks() {
        let certified = for_alice(|_| {}).unwrap();
        let name = CertificateName { key_id: "a\x1b[2J\r\n".to_owned() + &"b".repeat(500), ..certified.name.clone() };
        let text = Certified { name, ..certified }.to_string();
        assert!(!text.contains(char::is_control) && text.len() < 300, "{text:?}");
    }

    proptest! {
        #[test]
        fn no_source_list_is_too_strange(list in "[0-9a-f.:/,! ]{0,60}|\\PC{0,40}") {
            let _ = check_source(&list, PEER.parse().unwrap());
        }

        #[test]
        fn a_list_with_the_peer_in_it_holds(others in proptest::collection::vec(any::<std::net::IpAddr>(), 0..4)) {
            let list = others.iter().map(|ip| format!("{ip},")).collect::<String>() + PEER;
            prop_assert!(check_source(&list, PEER.parse().unwrap()).is_ok());
            let others = list.trim_end_matches(PEER).trim_end_matches(',');
            let held = check_source(others, PEER.parse().unwrap()).is_ok();
            prop_assert_eq!(held, list.matches(PEER).count() > 1 && others.split(',').any(|ip| ip == PEER));
        }
    }
}
