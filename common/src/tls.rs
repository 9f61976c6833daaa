//! TLS: the certificate of a service, and those that a client trusts.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};

use crate::files::{Followed, follow};

/// The certificate that a service shows, for the connections to come.
pub type Certificate = Followed<ServerConfig>;

/// Follows the files of a certificate, with those of its issuers, and of its private key; both are PEM.
///
/// # Errors
/// A line for the operator, when a file cannot be read or is wrong, or they do not fit.
pub fn follow_certificate(certificate: PathBuf, key: PathBuf) -> Result<Certificate, String> {
    follow(vec![certificate, key], |contents| {
        let chain = certificates(&contents[0])?;
        check_chain(&chain)?;
        let key = PrivateKeyDer::from_pem_slice(contents[1].as_bytes())
            .map_err(|_| "the second holds no private key")?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|config| {
                let config = config.with_no_client_auth();
                config.with_single_cert(chain, key)
            });
        config.map_err(|error| error.to_string())
    })
}

/// Checks that each certificate of a file was issued by the next one, which is an authority's and has not expired.
fn check_chain(chain: &[CertificateDer<'_>]) -> Result<(), String> {
    let [leaf, issuers @ ..] = chain else {
        return Ok(());
    };
    let algorithms = ring::default_provider().signature_verification_algorithms;
    for (before, issuer) in issuers.iter().enumerate() {
        check_authority(issuer)
            .map_err(|error| format!("its certificate {}: {error}", before + 2))?;
        let mut trusted = RootCertStore::empty();
        let checked = trusted.add(issuer.clone()).and_then(|()| {
            let leaf = ParsedCertificate::try_from(leaf)?;
            let (between, now) = (&issuers[..before], UnixTime::now());
            verify_server_cert_signed_by_trust_anchor(&leaf, &trusted, between, now, algorithms.all)
        });
        checked.map_err(|error| {
            let number = before + 2;
            format!("its certificate {number} does not vouch for those before it ({error})")
        })?;
    }
    Ok(())
}

/// Checks what clients check of an issuer, and not of a certificate that they trust: here it is one that is trusted.
fn check_authority(issuer: &CertificateDer<'_>) -> Result<(), String> {
    let described = |error: webpki::Error| error.to_string();
    let anchors = [webpki::anchor_from_trusted_cert(issuer).map_err(described)?];
    let checked = webpki::EndEntityCert::try_from(issuer).map_err(described)?;
    let verified = checked.verify_for_usage(
        ring::default_provider()
            .signature_verification_algorithms
            .all,
        &anchors,
        &[],
        UnixTime::now(),
        webpki::KeyUsage::server_auth(),
        None,
        None,
    );
    match verified {
        // The check after that of its dates, and before that of its own issuer.
        Err(webpki::Error::CaUsedAsEndEntity) => Ok(()),
        Ok(_) | Err(webpki::Error::UnknownIssuer) => Err("it is not an authority's".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Follows a file with the certificates of authorities: a client that trusts them, and no others, with the
/// connections to come.
///
/// # Errors
/// A line for the operator, when it cannot be read or holds no certificate of an authority.
pub fn follow_trusted(authorities: PathBuf) -> Result<Followed<ClientConfig>, String> {
    follow(vec![authorities], |contents| trusting(&contents[0]))
}

/// A client that trusts the authorities in this PEM, and no others.
///
/// # Errors
/// A line for the operator, when it holds no certificate of an authority.
fn trusting(authorities: &str) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(authorities)? {
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    if roots.is_empty() {
        return Err("it holds no certificate".to_owned());
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// A client that takes any certificate: for a question without secrets to the own machine, where the
/// certificate is for other names.
pub(crate) fn trusting_anyone() -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone());
    let config = config.with_safe_default_protocol_versions()?;
    let config = config.dangerous();
    let config = config.with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)));
    Ok(config.with_no_client_auth())
}

#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<_, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    all.map_err(|error| error.to_string())
}
