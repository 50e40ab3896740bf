//! Statements that a role signs with its certificate, so that those who carry them can neither make nor change them.
//!
//! A proof is the certificates of the signer, the leaf first, the TLS signature scheme and the signature over
//! `"tidegate statement\0"`, the subject and the statement.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::sign::SigningKey;
use rustls::{RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, SignatureVerificationAlgorithm, UnixTime};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use webpki::aws_lc_rs as algorithms;

use super::pki::{self, Role};
use super::tls::TlsError;
use crate::clock;
use crate::model::change::PROOF_BYTES_MAX;

const CONTEXT: &[u8] = b"tidegate statement\0";

const SCHEMES: [(SignatureScheme, &dyn SignatureVerificationAlgorithm); 4] = [
    (SignatureScheme::ECDSA_NISTP256_SHA256, algorithms::ECDSA_P256_SHA256),
    (SignatureScheme::ECDSA_NISTP384_SHA384, algorithms::ECDSA_P384_SHA384),
    (SignatureScheme::ED25519, algorithms::ED25519),
    (SignatureScheme::RSA_PSS_SHA256, algorithms::RSA_PSS_2048_8192_SHA256_LEGACY_KEY),
];

#[derive(Serialize, Deserialize)]
struct Proof {
    certificates: Vec<Vec<u8>>,
    scheme: u16,
    signature: Vec<u8>,
}

/// Why a statement is not believed.
#[derive(Debug, Error)]
pub enum StatementError {
    /// Too long, or not a proof.
    #[error("its proof cannot be read")]
    Malformed,
    /// Not signed by our CA, or expired, or of another role.
    #[error("the certificate of its signer is not accepted: {0}")]
    Certificate(String),
    /// It says something else than what was signed.
    #[error("its signature is wrong")]
    Signature,
}

/// Signs statements.
pub struct Signer {
    certificates: Vec<Vec<u8>>,
    key: Arc<dyn SigningKey>,
}

impl Signer {
    pub(super) fn new(chain: &[CertificateDer<'_>], key: &PrivateKeyDer<'_>) -> Result<Self, TlsError> {
        let key = any_supported_type(key).map_err(|e| TlsError::Rustls(e.to_string()))?;
        Ok(Self { certificates: chain.iter().map(|c| c.to_vec()).collect(), key })
    }

    /// The proof of a statement.
    ///
    /// # Errors
    /// [`TlsError::Rustls`] for a key that cannot sign, or certificates that are too long for a proof.
    pub fn sign(&self, subject: &str, statement: &[u8]) -> Result<Vec<u8>, TlsError> {
        let failed = |what: &str| TlsError::Rustls(what.to_owned());
        let signer = self.key.choose_scheme(&SCHEMES.map(|(scheme, _)| scheme)).ok_or_else(|| failed("the key cannot sign"))?;
        let signature = signer.sign(&message(subject, statement)).map_err(|e| failed(&e.to_string()))?;
        let proof = Proof { certificates: self.certificates.clone(), scheme: signer.scheme().into(), signature };
        let bytes = postcard::to_stdvec(&proof).map_err(|e| failed(&e.to_string()))?;
        if bytes.len() <= PROOF_BYTES_MAX { Ok(bytes) } else { Err(failed("the certificates are too long to sign statements")) }
    }
}

/// Believes statements that are signed.
pub struct Verifier {
    roots: Arc<RootCertStore>,
    accepted: Mutex<Option<Accepted>>,
}

/// Certificates that were accepted: a chain is looked at again after a while.
struct Accepted {
    certificates: Vec<Vec<u8>>,
    role: Role,
    at: clock::Mono,
}

/// A chain of certificates is looked at again after so long.
const ACCEPTED_FOR: Duration = Duration::from_secs(60);

impl Verifier {
    pub(super) fn new(roots: Arc<RootCertStore>) -> Self {
        Self { roots, accepted: Mutex::default() }
    }

    /// Checks that somebody of `role` has signed exactly this.
    ///
    /// # Errors
    /// [`StatementError`].
    pub fn verify(&self, role: Role, subject: &str, statement: &[u8], proof: &[u8]) -> Result<(), StatementError> {
        if proof.len() > PROOF_BYTES_MAX {
            return Err(StatementError::Malformed);
        }
        let proof: Proof = postcard::from_bytes(proof).map_err(|_| StatementError::Malformed)?;
        let leaf = CertificateDer::from(proof.certificates.first().ok_or(StatementError::Malformed)?.as_slice());
        let refused = |e: &dyn std::fmt::Display| StatementError::Certificate(e.to_string());
        let entity = webpki::EndEntityCert::try_from(&leaf).map_err(|e| refused(&e))?;
        if !self.is_known(&proof.certificates, role) {
            let between: Vec<CertificateDer<'_>> = proof.certificates[1..].iter().map(|c| CertificateDer::from(c.as_slice())).collect();
            let seconds = u64::try_from(clock::wall_ms() / 1000).unwrap_or(0);
            let now = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
            entity
                .verify_for_usage(
                    webpki::ALL_VERIFICATION_ALGS,
                    &self.roots.roots,
                    &between,
                    now,
                    webpki::KeyUsage::client_auth(),
                    None,
                    None,
                )
                .map_err(|e| refused(&e))?;
            let identity = pki::identity_of(&leaf).map_err(|e| refused(&e))?;
            if identity.role != role {
                return Err(refused(&format!("{identity} is no {}", role.as_str())));
            }
        }
        let algorithm = SCHEMES.iter().find(|(scheme, _)| u16::from(*scheme) == proof.scheme).ok_or(StatementError::Malformed)?.1;
        entity.verify_signature(algorithm, &message(subject, statement), &proof.signature).map_err(|_| StatementError::Signature)?;
        let mut accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        if accepted.as_ref().is_none_or(|a| !a.covers(&proof.certificates, role)) {
            *accepted = Some(Accepted { certificates: proof.certificates, role, at: clock::now() });
        }
        Ok(())
    }

    fn is_known(&self, certificates: &[Vec<u8>], role: Role) -> bool {
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        accepted.as_ref().is_some_and(|a| a.covers(certificates, role))
    }
}

impl Accepted {
    fn covers(&self, certificates: &[Vec<u8>], role: Role) -> bool {
        self.certificates == certificates && self.role == role && clock::now().since(self.at) < ACCEPTED_FOR
    }
}

fn message(subject: &str, statement: &[u8]) -> Vec<u8> {
    [CONTEXT, subject.as_bytes(), b"\0", statement].concat()
}

#[cfg(test)]
mod tests {
    use super::super::pki::Identity;
    use super::super::tls::{Credentials, TlsFiles};
    use super::*;

    #[test]
    fn only_what_the_right_role_signed_is_believed() {
        let dir = tempfile::tempdir().unwrap();
        let credentials = |ca: &str, role: Role| {
            let (ca, out) = (dir.path().join(ca), dir.path().join(format!("{ca}-{}", role.as_str())));
            if !ca.exists() {
                pki::init(&ca).unwrap();
            }
            pki::issue(&ca, &Identity { role, name: "n".parse().unwrap() }, &out).unwrap();
            Credentials::load(&TlsFiles::in_dir(&out), role).unwrap()
        };
        let coordinator = credentials("ours", Role::Coordinator);
        let verifier = credentials("ours", Role::MasterTarget).verifier();
        let proof = coordinator.signer().unwrap().sign("group", b"a point").unwrap();
        for _ in 0..2 {
            verifier.verify(Role::Coordinator, "group", b"a point", &proof).unwrap();
        }
        let wrong = |statement: &[u8], proof: &[u8]| verifier.verify(Role::Coordinator, "group", statement, proof).unwrap_err();
        assert!(matches!(wrong(b"another point", &proof), StatementError::Signature));
        assert!(matches!(wrong(b"a point", &proof[..proof.len() / 2]), StatementError::Malformed));
        assert!(matches!(wrong(b"a point", &[]), StatementError::Malformed));
        assert!(matches!(wrong(b"a point", &vec![0; PROOF_BYTES_MAX + 1]), StatementError::Malformed));
        assert!(verifier.verify(Role::Coordinator, "other", b"a point", &proof).is_err());
        let agent = credentials("ours", Role::Agent).signer().unwrap().sign("group", b"a point").unwrap();
        assert!(matches!(wrong(b"a point", &agent), StatementError::Certificate(_)));
        let foreign = credentials("theirs", Role::Coordinator).signer().unwrap().sign("group", b"a point").unwrap();
        assert!(matches!(wrong(b"a point", &foreign), StatementError::Certificate(_)));
    }
}
