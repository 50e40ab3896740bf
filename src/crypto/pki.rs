//! The built-in certificate authority: one CA, a certificate for each role and name.
//!
//! A certificate carries exactly one SPIFFE URI, `spiffe://tidegate/ROLE/NAME`, which is the identity, and one DNS name,
//! `ROLE.tidegate.internal`, by which clients check that they reached a server of the role they meant.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;
use thiserror::Error;
use time::{Duration, OffsetDateTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::keyring::write_private;
use crate::clock;
use crate::model::Name;

/// Trust domain of every identity.
const TRUST_DOMAIN: &str = "tidegate";
const CA_DAYS: i64 = 3650;
/// Days a leaf is valid.
pub const LEAF_DAYS: i64 = 365;

/// What a certificate's holder may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Sends changes.
    Agent,
    /// Receives, caches and forwards them.
    ProcessServer,
    /// Keeps the replicas.
    MasterTarget,
    /// Makes groups consistent.
    Coordinator,
    /// A person.
    Admin,
}

impl Role {
    /// Name in identities, command lines and host names.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Agent => "agent",
            Role::ProcessServer => "process-server",
            Role::MasterTarget => "master-target",
            Role::Coordinator => "coordinator",
            Role::Admin => "admin",
        }
    }

    /// The name a client asks for when it connects to a server of this role.
    pub fn server_name(self) -> String {
        format!("{}.{TRUST_DOMAIN}.internal", self.as_str())
    }
}

impl FromStr for Role {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<Self, PkiError> {
        [Role::Agent, Role::ProcessServer, Role::MasterTarget, Role::Coordinator, Role::Admin]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| PkiError::Role(text.to_owned()))
    }
}

/// Who a certificate says its holder is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Identity {
    /// What it may do.
    pub role: Role,
    /// Its name; for an agent the machine's.
    pub name: Name,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{TRUST_DOMAIN}/{}/{}", self.role.as_str(), self.name)
    }
}

/// Why certificates cannot be made or read.
#[derive(Debug, Error)]
pub enum PkiError {
    /// An unknown role.
    #[error("{0:?} is not a role: use agent, process-server, master-target, coordinator or admin")]
    Role(String),
    /// The certificate names nobody, or several.
    #[error("the certificate must carry exactly one URI of the form spiffe://{TRUST_DOMAIN}/ROLE/NAME, found {0}")]
    Identity(String),
    /// There is a CA already.
    #[error("{0} exists already: remove it if you really want a new CA, every certificate must then be issued again")]
    Exists(PathBuf),
    /// The folder is somebody else's.
    #[error("{path} is the certificate of {found}: choose another folder, or remove it if {found} does not need it any more")]
    Taken {
        /// The certificate there.
        path: PathBuf,
        /// Whom it names.
        found: String,
    },
    /// No CA where one is needed.
    #[error("there is no CA in {0}: run `tidegate pki init {0}` first")]
    NoCa(PathBuf),
    /// Not a certificate.
    #[error("{path} is not a PEM certificate: {reason}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Making it failed.
    #[error("could not make the certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// The file system failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
}

/// Makes a new CA in `dir`: `ca.pem` for everybody, `ca.key` for this folder only.
///
/// # Errors
/// [`PkiError::Exists`] rather than replacing one.
pub fn init(dir: &Path) -> Result<(), PkiError> {
    let io = |source| PkiError::Io { path: dir.to_owned(), source };
    std::fs::create_dir_all(dir).map_err(io)?;
    let key_path = dir.join("ca.key");
    if key_path.exists() || dir.join("ca.pem").exists() {
        return Err(PkiError::Exists(dir.join("ca.pem")));
    }
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Tidegate CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, CA_DAYS);
    let certificate = params.self_signed(&key)?;
    write_private(&key_path, key.serialize_pem().as_bytes()).map_err(io)?;
    write_public(&dir.join("ca.pem"), &certificate.pem())
}

/// Issues a certificate with a key of its own into `out`: `cert.pem`, `key.pem` and a copy of `ca.pem`. Replaces one of the same
/// identity, which renews it.
///
/// # Errors
/// [`PkiError::NoCa`] if `ca_dir` holds none, [`PkiError::Taken`] if `out` has the certificate of another.
pub fn issue(ca_dir: &Path, identity: &Identity, out: &Path) -> Result<(), PkiError> {
    let read = |name: &str| std::fs::read_to_string(ca_dir.join(name)).map_err(|_| PkiError::NoCa(ca_dir.to_owned()));
    let (ca_pem, ca_key) = (read("ca.pem")?, read("ca.key")?);
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, KeyPair::from_pem(&ca_key)?)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, identity.name.as_str());
    params.subject_alt_names =
        vec![SanType::URI(identity.to_string().try_into()?), SanType::DnsName(identity.role.server_name().try_into()?)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    set_validity(&mut params, LEAF_DAYS);
    let certificate = params.signed_by(&key, &issuer)?;
    let (io, there) = (|source| PkiError::Io { path: out.to_owned(), source }, out.join("cert.pem"));
    if let Ok(Description { identity: Some(found), .. }) = describe(&there)
        && found != identity.to_string()
    {
        return Err(PkiError::Taken { path: there, found });
    }
    std::fs::create_dir_all(out).map_err(io)?;
    write_private(&out.join("key.pem"), key.serialize_pem().as_bytes()).map_err(io)?;
    write_public(&out.join("cert.pem"), &certificate.pem())?;
    write_public(&out.join("ca.pem"), &ca_pem)
}

fn set_validity(params: &mut CertificateParams, days: i64) {
    let now = OffsetDateTime::from_unix_timestamp(clock::wall_ms() / 1000).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    // A day of tolerance for hosts whose clocks are behind.
    params.not_before = now - Duration::days(1);
    params.not_after = now + Duration::days(days);
}

fn write_public(path: &Path, pem: &str) -> Result<(), PkiError> {
    std::fs::write(path, pem).map_err(|source| PkiError::Io { path: path.to_owned(), source })
}

/// The identity a verified certificate carries.
///
/// # Errors
/// [`PkiError::Identity`] unless it has exactly one URI and that is one of ours.
pub fn identity_of(certificate: &CertificateDer<'_>) -> Result<Identity, PkiError> {
    let bad = |found: &str| PkiError::Identity(found.to_owned());
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| bad("bytes that are not a certificate"))?;
    let names = parsed.subject_alternative_name().ok().flatten().ok_or_else(|| bad("no alternative names"))?;
    let uris: Vec<&str> =
        names.value.general_names.iter().filter_map(|n| if let GeneralName::URI(u) = n { Some(*u) } else { None }).collect();
    let [uri] = uris[..] else { return Err(bad(&format!("{} URIs", uris.len()))) };
    let rest = uri.strip_prefix("spiffe://").and_then(|r| r.strip_prefix(TRUST_DOMAIN)).and_then(|r| r.strip_prefix('/'));
    let (role, name) = rest.and_then(|r| r.split_once('/')).ok_or_else(|| bad(uri))?;
    Ok(Identity { role: role.parse()?, name: name.parse().map_err(|_| bad(uri))? })
}

/// What `pki show` prints.
#[derive(Debug, Serialize)]
pub struct Description {
    /// The identity, if it is not a CA.
    pub identity: Option<String>,
    /// Whether it may sign others.
    pub is_ca: bool,
    /// RFC 3339.
    pub not_before: String,
    /// RFC 3339.
    pub not_after: String,
    /// Seconds until it expires; negative when it has.
    pub expires_in_seconds: i64,
    /// Its number, in hexadecimal.
    pub serial: String,
}

/// Describes a PEM certificate file.
///
/// # Errors
/// [`PkiError::Parse`].
pub fn describe(path: &Path) -> Result<Description, PkiError> {
    let parse = |reason: String| PkiError::Parse { path: path.to_owned(), reason };
    let der = CertificateDer::from_pem_file(path).map_err(|e| parse(format!("{e:?}")))?;
    let (_, parsed) = X509Certificate::from_der(&der).map_err(|e| parse(e.to_string()))?;
    let validity = parsed.validity();
    let label = |t: x509_parser::time::ASN1Time| clock::rfc3339(t.timestamp().saturating_mul(1000));
    Ok(Description {
        identity: identity_of(&der).ok().map(|i| i.to_string()),
        is_ca: parsed.is_ca(),
        not_before: label(validity.not_before),
        not_after: label(validity.not_after),
        expires_in_seconds: validity.not_after.timestamp() - clock::wall_ms() / 1000,
        serial: parsed.raw_serial_as_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_issued_certificate_names_its_holder_and_the_key_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        init(dir.path()).unwrap();
        assert!(matches!(init(dir.path()), Err(PkiError::Exists(_))));
        let identity = Identity { role: Role::Agent, name: "web01".parse().unwrap() };
        let out = dir.path().join("web01");
        issue(dir.path(), &identity, &out).unwrap();
        let der = CertificateDer::from_pem_file(out.join("cert.pem")).unwrap();
        assert_eq!(identity_of(&der).unwrap(), identity);
        let mode = std::fs::metadata(out.join("key.pem")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let shown = describe(&out.join("cert.pem")).unwrap();
        assert_eq!(shown.identity.as_deref(), Some("spiffe://tidegate/agent/web01"));
        assert!(shown.expires_in_seconds > 300 * 86400);
        issue(dir.path(), &identity, &out).unwrap();
        assert_ne!(describe(&out.join("cert.pem")).unwrap().serial, shown.serial, "renewed");
        let another = Identity { role: Role::Agent, name: "web02".parse().unwrap() };
        assert!(matches!(issue(dir.path(), &another, &out), Err(PkiError::Taken { .. })));
    }
}
