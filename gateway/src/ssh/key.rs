//! Public keys of users: which kinds are taken, and what is kept of one.

use crate::store::KeyToAdd;
use mlad::api::NewKey;
use russh::keys::{
    Algorithm, HashAlg, PublicKey,
    ssh_key::public::{KeyData, RsaPublicKey},
};

/// Longest line of a key, in bytes; an RSA key of 16,384 bits has about 3,000.
const MAX_LINE: usize = 8 * 1024;
/// Smallest RSA key, in bits.
const MIN_RSA_BITS: u32 = 2048;

/// Why a key is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It is no public key.
    #[error("this is no public key: give one line as in ~/.ssh/id_ed25519.pub ({0})")]
    Malformed(String),
    /// Its kind is too weak or unknown.
    #[error("keys of kind {0} are not taken; make one with `ssh-keygen -t ed25519`")]
    Kind(String),
    /// It is too short.
    #[error(
        "an RSA key of {0} bits is too weak: {MIN_RSA_BITS} at least; better make one with `ssh-keygen -t ed25519`"
    )]
    Short(u32),
}

/// Reads and checks a key as an administrator or user gives it: one line as in `authorized_keys`, without options.
///
/// # Errors
/// When it is no key, or one that would not be let in.
pub fn parse_key(new: &NewKey) -> Result<KeyToAdd, KeyError> {
    let line = new.public_key.trim();
    if line.len() > MAX_LINE || line.contains(['\n', '\r', '\0']) {
        return Err(KeyError::Malformed("one line is expected".into()));
    }
    let mut words = line.splitn(3, [' ', '\t']);
    let kind = words.next().unwrap_or_default();
    let data = words.next().unwrap_or_default();
    let comment = words.next().unwrap_or_default().trim();
    let key =
        PublicKey::from_openssh(&format!("{kind} {data}")).map_err(|error| KeyError::Malformed(error.to_string()))?;
    check_key(&key)?;
    let label = new.label.as_deref().unwrap_or(comment);
    Ok(KeyToAdd { label: label.into(), expires_at: new.expires_at, ..key_to_add(&key)? })
}

/// What is kept of a key that was offered, without label.
pub(super) fn key_to_add(key: &PublicKey) -> Result<KeyToAdd, KeyError> {
    let bare = PublicKey::new(key.key_data().clone(), "");
    let public_key = bare.to_openssh().map_err(|error| KeyError::Malformed(error.to_string()))?;
    Ok(KeyToAdd { fingerprint: fingerprint(key), public_key, label: String::new(), expires_at: None })
}

/// `SHA256:…`, as `ssh-keygen -l` prints it.
pub(super) fn fingerprint(key: &PublicKey) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

/// Whether a key of this kind and size may log in.
pub(super) fn check_key(key: &PublicKey) -> Result<(), KeyError> {
    match key.key_data() {
        KeyData::Ed25519(_) | KeyData::Ecdsa(_) | KeyData::SkEd25519(_) | KeyData::SkEcdsaSha2NistP256(_) => Ok(()),
        KeyData::Rsa(rsa) => check_rsa(rsa),
        _ => Err(KeyError::Kind(key.algorithm().to_string())),
    }
}

/// Whether signatures of this algorithm are taken: all but those with SHA-1.
pub(super) fn is_signature_taken(algorithm: &Algorithm) -> bool {
    !matches!(algorithm, Algorithm::Rsa { hash: None } | Algorithm::Dsa)
}

fn check_rsa(key: &RsaPublicKey) -> Result<(), KeyError> {
    if key.key_size() < MIN_RSA_BITS { Err(KeyError::Short(key.key_size())) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti";

    fn parse(line: &str, label: Option<&str>) -> Result<KeyToAdd, KeyError> {
        parse_key(&NewKey { public_key: line.into(), label: label.map(Into::into), expires_at: None })
    }

    #[test]
    fn a_line_of_authorized_keys_is_taken_with_its_comment() {
        let key = parse(&format!(" {KEY} alice on her laptop\n"), None).unwrap();
        assert_eq!(key.public_key, KEY);
        assert_eq!(key.label, "alice on her laptop");
        assert!(key.fingerprint.starts_with("SHA256:"));
        assert_eq!(parse(KEY, Some("laptop")).unwrap().label, "laptop");
    }

    #[test]
    fn what_is_no_key_or_a_weak_one_is_refused() {
        let short = "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQC9"; // cut short
        for bad in ["", "ssh-ed25519", "ssh-ed25519 AAAA", short, &format!("{KEY}\n{KEY}"), "-----BEGIN"] {
            assert!(parse(bad, None).is_err(), "{bad}");
        }
    }
}
