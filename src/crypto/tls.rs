//! TLS 1.3 configurations with certificates on both sides, for TCP and QUIC.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde::Deserialize;
use thiserror::Error;

use super::pki::{self, Identity, PkiError, Role};
use super::statement::{Signer, Verifier};

/// Protocol name of the change streams on 9443; a certificate session for one port cannot be used on another.
pub const ALPN_INGEST: &[u8] = b"tidegate-ingest/1";
/// Protocol name of batches on 9444.
pub const ALPN_FORWARD: &[u8] = b"tidegate-forward/1";

/// Protocol name of consistency rounds on 20004.
pub const ALPN_CONSISTENCY: &[u8] = b"tidegate-consistency/1";

/// Where a server's certificates are.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The CA both sides trust.
    pub ca: PathBuf,
    /// This server's certificate.
    pub cert: PathBuf,
    /// Its private key; must not be readable by others.
    pub key: PathBuf,
}

impl TlsFiles {
    /// The three files as `pki issue` lays them out.
    pub fn in_dir(dir: &Path) -> Self {
        Self { ca: dir.join("ca.pem"), cert: dir.join("cert.pem"), key: dir.join("key.pem") }
    }
}

/// Why a configuration cannot be made.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A PEM file cannot be read.
    #[error("{path}: {reason}; issue certificates with `tidegate pki issue`")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The private key is readable by others.
    #[error("{0} can be read by others: run chmod 600 {0}")]
    Exposed(PathBuf),
    /// The certificate is for another role or name.
    #[error("{path} is the certificate of {found}, this server needs one for role {needed}")]
    WrongRole {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What is needed.
        needed: &'static str,
    },
    /// It names nobody.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// rustls refuses the files.
    #[error("the certificates do not fit together: {0}")]
    Rustls(String),
}

/// Loaded certificates of one process.
pub struct Credentials {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// Who this process is.
    pub identity: Identity,
    /// Seconds until its certificate expires.
    pub expires_in_seconds: i64,
}

impl Credentials {
    /// Reads and checks the three files.
    ///
    /// # Errors
    /// [`TlsError`], naming the file.
    pub fn load(files: &TlsFiles, role: Role) -> Result<Self, TlsError> {
        use std::os::unix::fs::PermissionsExt;
        let read = |path: &Path, reason: String| TlsError::Read { path: path.to_owned(), reason };
        let mode = std::fs::metadata(&files.key).map_err(|e| read(&files.key, e.to_string()))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(TlsError::Exposed(files.key.clone()));
        }
        let certificates = |path: &Path| -> Result<Vec<CertificateDer<'static>>, TlsError> {
            let all = CertificateDer::pem_file_iter(path).map_err(|e| read(path, format!("{e:?}")))?;
            let list: Result<Vec<_>, _> = all.collect();
            let list = list.map_err(|e| read(path, format!("{e:?}")))?;
            if list.is_empty() { Err(read(path, "holds no certificate".to_owned())) } else { Ok(list) }
        };
        let mut roots = RootCertStore::empty();
        for ca in certificates(&files.ca)? {
            roots.add(ca).map_err(|e| read(&files.ca, e.to_string()))?;
        }
        let chain = certificates(&files.cert)?;
        let identity = pki::identity_of(&chain[0])?;
        if identity.role != role {
            return Err(TlsError::WrongRole { path: files.cert.clone(), found: identity.to_string(), needed: role.as_str() });
        }
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| read(&files.key, format!("{e:?}")))?;
        let expires_in_seconds = pki::describe(&files.cert)?.expires_in_seconds;
        Ok(Self { roots: Arc::new(roots), chain, key, identity, expires_in_seconds })
    }

    /// A server that demands a client certificate of our CA.
    ///
    /// # Errors
    /// [`TlsError::Rustls`].
    pub fn server(&self, alpn: &[u8]) -> Result<ServerConfig, TlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider.clone())
            .build()
            .map_err(|e| TlsError::Rustls(e.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|b| b.with_client_cert_verifier(verifier).with_single_cert(self.chain.clone(), self.key.clone_key()))
            .map_err(|e| TlsError::Rustls(e.to_string()))?;
        config.alpn_protocols = vec![alpn.to_vec()];
        // No tickets: a resumed session would keep an identity after its certificate is gone.
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// A secret that stays the same over restarts, of one purpose; nothing of the private key can be learnt from it.
    pub(super) fn derived(&self, purpose: &'static str) -> [u8; 32] {
        blake3::derive_key(purpose, self.key.secret_der())
    }

    /// Signs statements as this process.
    ///
    /// # Errors
    /// [`TlsError::Rustls`] for a key of a kind that cannot sign.
    pub fn signer(&self) -> Result<Signer, TlsError> {
        Signer::new(&self.chain, &self.key)
    }

    /// Believes statements that others have signed.
    pub fn verifier(&self) -> Verifier {
        Verifier::new(self.roots.clone())
    }

    /// A client that shows its certificate.
    ///
    /// # Errors
    /// [`TlsError::Rustls`].
    pub fn client(&self, alpn: &[u8]) -> Result<ClientConfig, TlsError> {
        let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|b| b.with_root_certificates(self.roots.clone()).with_client_auth_cert(self.chain.clone(), self.key.clone_key()))
            .map_err(|e| TlsError::Rustls(e.to_string()))?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }
}

/// The name to ask for when connecting to a server of `role`.
pub fn server_name(role: Role) -> ServerName<'static> {
    ServerName::try_from(role.server_name()).expect("role names are legal DNS names")
}

/// The identity of the other side, which must have `role`.
///
/// # Errors
/// [`PkiError`] if it has none or another role.
pub fn peer_identity(certificates: Option<&[CertificateDer<'_>]>, role: Role) -> Result<Identity, PkiError> {
    let leaf = certificates.and_then(<[_]>::first).ok_or_else(|| PkiError::Identity("no certificate".to_owned()))?;
    let identity = pki::identity_of(leaf)?;
    if identity.role == role {
        Ok(identity)
    } else {
        Err(PkiError::Identity(format!("{identity}, which has no business on this port (role {} expected)", role.as_str())))
    }
}
