//! The server's own keys: made at the first start, kept in `<data>/ssh/` with access for nobody else. The certificate
//! of one lies beside it, under the name that `ssh-keygen` gives it.

use jiff::Timestamp;
use russh::keys::{
    Algorithm, Certificate, EcdsaCurve, PrivateKey,
    ssh_key::{LineEnding, certificate::CertType, rand_core::CryptoRng},
};
use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

/// Kinds of host keys, in the order of preference. No RSA: nothing needs it, and the `rsa` crate leaks
/// timing when it signs (RUSTSEC-2023-0071).
const KINDS: [(&str, Algorithm); 2] = [
    ("ssh_host_ed25519_key", Algorithm::Ed25519),
    ("ssh_host_ecdsa_key", Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 }),
];

/// Their folder in the data directory.
pub(super) const FOLDER: &str = "ssh";

/// Why there are no host keys.
#[derive(Debug, thiserror::Error)]
pub enum HostKeyError {
    /// A file or folder cannot be used.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others than its owner can read it.
    #[error("{0}: others can read this host key; `chmod 600` it, or remove it to have a new one made")]
    Open(PathBuf),
    /// It is no certificate of its key.
    #[error("{path}: this cannot be shown to clients ({reason}); make another with `ssh-keygen -h -s`, or remove it")]
    Certificate {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It is no key of its kind.
    #[error("{path}: no private key ({reason}); remove it to have a new one made")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// What the server shows that it is.
#[derive(Clone)]
pub(super) struct HostIdentity {
    /// Its keys.
    pub(super) keys: Vec<PrivateKey>,
    /// Certificates of some of them.
    pub(super) certificates: Vec<Certificate>,
}

impl HostIdentity {
    /// Reads keys and certificates in `folder`, and makes the keys that are absent.
    ///
    /// # Errors
    /// When one cannot be read, written, or lies open to others; or a certificate is of no use.
    pub(super) fn load(folder: &Path) -> Result<Self, HostKeyError> {
        let keys = load_host_keys(folder)?;
        let named = keys.iter().zip(KINDS);
        let certificates = named.filter_map(|(key, (name, _))| {
            load_certificate(&folder.join(format!("{name}-cert.pub")), key, Timestamp::now()).transpose()
        });
        let certificates = certificates.collect::<Result<_, _>>()?;
        Ok(Self { keys, certificates })
    }
}

/// Makes the host keys of a data directory that are absent: before anybody is answered, so that whoever finds the
/// gateway there finds them, too.
///
/// # Errors
/// When one cannot be read, written, or lies open to others.
pub fn make_host_keys(data_directory: &Path) -> Result<(), HostKeyError> {
    load_host_keys(&data_directory.join(FOLDER)).map(drop)
}

/// Reads the host keys in `folder`, and makes those that are absent.
///
/// # Errors
/// When one cannot be read, written, or lies open to others.
pub(super) fn load_host_keys(folder: &Path) -> Result<Vec<PrivateKey>, HostKeyError> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at(folder))?;
    KINDS.iter().map(|(name, kind)| load_or_make(&folder.join(name), kind)).collect()
}

fn load_or_make(path: &Path, kind: &Algorithm) -> Result<PrivateKey, HostKeyError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.permissions().mode() & 0o077 != 0 => Err(HostKeyError::Open(path.into())),
        Ok(_) => load(path, kind),
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(path, kind, &mut rand::rng()),
        Err(error) => Err(at(path)(error)),
    }
}

fn load(path: &Path, kind: &Algorithm) -> Result<PrivateKey, HostKeyError> {
    let text = fs::read(path).map_err(at(path))?;
    let key = PrivateKey::from_openssh(text).map_err(|error| malformed(path, &error))?;
    if key.algorithm() != *kind || key.is_encrypted() {
        return Err(malformed(path, &format_args!("an unencrypted {kind} key is expected")));
    }
    Ok(key)
}

/// None if there is none.
fn load_certificate(path: &Path, key: &PrivateKey, now: Timestamp) -> Result<Option<Certificate>, HostKeyError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(path)(error)),
    };
    let wrong =
        |reason: &dyn std::fmt::Display| HostKeyError::Certificate { path: path.into(), reason: reason.to_string() };
    let certificate = Certificate::from_openssh(&text).map_err(|error| wrong(&error))?;
    if certificate.cert_type() != CertType::Host {
        return Err(wrong(&"it is a user's"));
    }
    if certificate.public_key() != key.public_key().key_data() {
        return Err(wrong(&"it is not the certificate of the key beside it"));
    }
    let now = u64::try_from(now.as_second()).unwrap_or(0);
    if now < certificate.valid_after() || now >= certificate.valid_before() {
        tracing::warn!(path = %path.display(), "the host certificate is not valid now: clients will not take it");
    }
    Ok(Some(certificate))
}

/// The key appears under its name whole or not at all.
fn make<R: CryptoRng>(path: &Path, kind: &Algorithm, random: &mut R) -> Result<PrivateKey, HostKeyError> {
    let key = PrivateKey::random(random, kind.clone()).map_err(|error| malformed(path, &error))?;
    let text = key.to_openssh(LineEnding::LF).map_err(|error| malformed(path, &error))?;
    let public = key.public_key().to_openssh().map_err(|error| malformed(path, &error))?;
    write(path, text.as_bytes(), 0o600)?;
    write(&path.with_extension("pub"), format!("{public}\n").as_bytes(), 0o644)?;
    tracing::info!(path = %path.display(), fingerprint = %super::key::fingerprint(key.public_key()), "made a host key");
    Ok(key)
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), HostKeyError> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    let draft = PathBuf::from(draft);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(&draft)
        .map_err(at(&draft))?;
    file.set_permissions(Permissions::from_mode(mode)).map_err(at(&draft))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(at(&draft))?;
    fs::rename(&draft, path).map_err(at(path))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(at(folder))
}

fn at(path: &Path) -> impl Fn(io::Error) -> HostKeyError + '_ {
    move |source| HostKeyError::Io { path: path.into(), source }
}

fn malformed(path: &Path, reason: &dyn std::fmt::Display) -> HostKeyError {
    HostKeyError::Malformed { path: path.into(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn keys_are_made_once_and_for_us_alone() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("ssh");
        let first = load_host_keys(&folder).unwrap();
        let second = load_host_keys(&folder).unwrap();
        assert_eq!(first.len(), 2);
        assert_eq!(
            first.iter().map(PrivateKey::public_key).collect::<Vec<_>>(),
            second.iter().map(PrivateKey::public_key).collect::<Vec<_>>()
        );
        assert_eq!(mode(&folder), 0o700);
        assert_eq!(mode(&folder.join("ssh_host_ed25519_key")), 0o600);
        assert!(fs::read_to_string(folder.join("ssh_host_ed25519_key.pub")).unwrap().starts_with("ssh-ed25519 "));
    }

    #[test]
    fn a_key_that_lies_open_or_is_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        load_host_keys(folder.path()).unwrap();
        let path = folder.path().join("ssh_host_ed25519_key");
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(load_host_keys(folder.path()), Err(HostKeyError::Open(_))));
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "no key").unwrap();
        assert!(matches!(load_host_keys(folder.path()), Err(HostKeyError::Malformed { .. })));
    }
}
