//! An authority for those who have none, and what it signs.

use super::identity::is_node_name;
use crate::AllocatorError;
use jiff::{Timestamp, ToSpan, tz::TimeZone};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// How long an authority is good for, in days.
const AUTHORITY_DAYS: i64 = 3650;
/// A clock that is behind by less takes what was signed just now.
const BEFORE_DAYS: i64 = 1;

/// Makes an authority in a folder: `authority.pem`, and its key `authority.key`.
///
/// # Errors
/// [`AllocatorError::Settings`] when there is one already, or it cannot be written.
pub fn make_authority(folder: &Path) -> Result<PathBuf, AllocatorError> {
    let key = KeyPair::generate().map_err(unsigned)?;
    let certificate = authority()?.self_signed(&key).map_err(unsigned)?;
    fs::create_dir_all(folder).map_err(|error| unwritten(folder, &error))?;
    write_new(&folder.join("authority.key"), &key.serialize_pem(), 0o600)?;
    let path = folder.join("authority.pem");
    write_new(&path, &certificate.pem(), 0o644)?;
    Ok(path)
}

/// Signs a certificate for a node, or for the allocator, good for so many days: `NAME.pem`, and its key `NAME.key`,
/// in a folder. `names` are further names or addresses under which it is reached.
///
/// # Errors
/// [`AllocatorError::Settings`] when the name cannot be, the authority cannot be read, or the files cannot be written.
pub fn issue(
    authority: &Path,
    name: &str,
    names: &[String],
    days: u16,
    folder: &Path,
) -> Result<[PathBuf; 2], AllocatorError> {
    if !is_node_name(name) {
        let what = "a name is as that of a host: lower-case letters, digits, `-` and `.`";
        return Err(AllocatorError::Settings(format!("`{}` cannot name a node: {what}", name.escape_debug())));
    }
    let path = authority.join("authority.key");
    let text = fs::read_to_string(&path).map_err(|error| unwritten(&path, &error))?;
    let wrong = |error| AllocatorError::Settings(format!("{}: {error}", path.display()));
    let issuer = Issuer::new(self::authority()?, KeyPair::from_pem(&text).map_err(wrong)?);
    let all: Vec<String> = std::iter::once(name.to_owned()).chain(names.iter().cloned()).collect();
    let mut params = CertificateParams::new(all).map_err(unsigned)?;
    params.distinguished_name = named(name);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    good_for(&mut params, i64::from(days))?;
    let key = KeyPair::generate().map_err(unsigned)?;
    let certificate = params.signed_by(&key, &issuer).map_err(unsigned)?;
    fs::create_dir_all(folder).map_err(|error| unwritten(folder, &error))?;
    let [certificate_path, key_path] = [folder.join(format!("{name}.pem")), folder.join(format!("{name}.key"))];
    write_new(&key_path, &key.serialize_pem(), 0o600)?;
    write_new(&certificate_path, &certificate.pem(), 0o644)?;
    Ok([certificate_path, key_path])
}

/// What an authority's certificate says, but for its dates always the same: who signs needs its key only.
fn authority() -> Result<CertificateParams, AllocatorError> {
    let mut params = CertificateParams::new(Vec::new()).map_err(unsigned)?;
    params.distinguished_name = named("MLAD nodes");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    good_for(&mut params, AUTHORITY_DAYS)?;
    Ok(params)
}

fn named(name: &str) -> DistinguishedName {
    let mut full = DistinguishedName::new();
    full.push(DnType::CommonName, name);
    full
}

/// From a little before now, for so many days; both ends at midnight, UTC.
fn good_for(params: &mut CertificateParams, days: i64) -> Result<(), AllocatorError> {
    let day = |from_now: i64| -> Result<(i32, u8, u8), AllocatorError> {
        let wrong = |error: jiff::Error| AllocatorError::Settings(error.to_string());
        let then = Timestamp::now().checked_add(from_now.saturating_mul(24).hours()).map_err(wrong)?;
        let then = then.to_zoned(TimeZone::UTC);
        let part = |part: i8| u8::try_from(part).unwrap_or(1);
        Ok((i32::from(then.year()), part(then.month()), part(then.day())))
    };
    let ((from_year, from_month, from_day), (year, month, day)) = (day(-BEFORE_DAYS)?, day(days)?);
    params.not_before = date_time_ymd(from_year, from_month, from_day);
    params.not_after = date_time_ymd(year, month, day);
    Ok(())
}

/// Writes a file that is not there yet: a key that is in use is never written over.
fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), AllocatorError> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| unwritten(path, &error))
}

fn unsigned(error: rcgen::Error) -> AllocatorError {
    AllocatorError::Settings(format!("the certificate cannot be made: {error}"))
}

fn unwritten(path: &Path, error: &std::io::Error) -> AllocatorError {
    AllocatorError::Settings(format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::{super::identity::is_for, *};
    use crate::remote::Credentials;
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_is_signed_is_taken_by_both_sides() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let authority = make_authority(at).unwrap();
        let [certificate, key] = issue(at, "dgx-1", &["10.0.0.1".to_owned()], 30, &at.join("dgx-1")).unwrap();
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        let credentials = Credentials { certificate: certificate.clone(), key: key.clone(), authority };
        credentials.server().unwrap();
        credentials.client().unwrap();
        let certificate = CertificateDer::from_pem_file(certificate).unwrap();
        assert!(is_for(&certificate, "dgx-1") && is_for(&certificate, "10.0.0.1"));
        assert!(!is_for(&certificate, "dgx-2"));
        let again = issue(at, "dgx-1", &[], 30, &at.join("dgx-1")).unwrap_err();
        assert!(again.to_string().contains("exists"), "{again}");
        assert!(make_authority(at).is_err());
        assert!(issue(at, "../x", &[], 30, at).is_err());
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        let open = credentials.client().unwrap_err();
        assert!(open.to_string().contains("chmod 600"), "{open}");
    }
}
