use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa, date_time_ymd};
use rustls::pki_types::pem::PemObject;

use super::*;
use crate::{
    stats::Scope,
    tls::{
        self, Material,
        testing::{Authority, Issued},
    },
};

fn now() -> UnixTime {
    UnixTime::now()
}

fn trusting(pem: &str) -> CertificateValidationContext {
    let material = Material { bytes: pem.as_bytes().to_vec(), origin: "<inline>".to_owned() };
    CertificateValidationContext {
        trusted_ca: Some(Arc::new(tls::trusted_ca(&material).unwrap())),
        ..CertificateValidationContext::default()
    }
}

fn named(san_type: SanType, pattern: StringPattern) -> Arc<SubjectAltNameMatcher> {
    Arc::new(SubjectAltNameMatcher { san_type: Some(san_type), matcher: StringMatcher { pattern, ignore_case: false } })
}

fn verifier(peer: Peer, context: Option<CertificateValidationContext>) -> PeerVerifier {
    let stats = Arc::new(SslStats::new(&Scope::new("verify_tests"), "factory"));
    PeerVerifier::new(peer, context.map(Arc::new), Arc::clone(tls::provider()), stats)
}

fn der(issued: &Issued) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(issued.chain.as_bytes()).unwrap()
}

const SERVER: Peer = Peer::Server { by_name: false };
const CLIENT: Peer = Peer::Client { required: true };

fn verdict(peer: Peer, context: CertificateValidationContext, issued: &Issued) -> Result<(), CertificateError> {
    match verifier(peer, Some(context)).verify(&der(issued), &[], Names::default(), now()) {
        Ok(()) => Ok(()),
        Err(Error::InvalidCertificate(error)) => Err(error),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_chain_must_lead_to_a_trusted_issuer_in_time_and_for_the_purpose() {
    let (authority, stranger) = (Authority::new("ca"), Authority::new("ca"));
    let plain = authority.issue(&["a.test"], &[]);
    for peer in [SERVER, CLIENT] {
        assert_eq!(verdict(peer, trusting(&authority.pem), &plain), Ok(()));
        assert_eq!(
            verdict(peer, trusting(&stranger.pem), &plain),
            Err(CertificateError::BadSignature),
            "of the same name, with another key"
        );
        assert_eq!(verdict(peer, trusting(&Authority::new("x").pem), &plain), Err(CertificateError::UnknownIssuer));
        let expired = authority.issue_with(&["a.test"], &[], |params| params.not_after = date_time_ymd(2020, 1, 1));
        assert_eq!(verdict(peer, trusting(&authority.pem), &expired), Err(CertificateError::Expired));
        let early = authority.issue_with(&["a.test"], &[], |params| params.not_before = date_time_ymd(3000, 1, 1));
        assert_eq!(verdict(peer, trusting(&authority.pem), &early), Err(CertificateError::NotValidYet));
    }
    let for_servers = authority.issue_with(&["a.test"], &[], |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    assert_eq!(verdict(SERVER, trusting(&authority.pem), &for_servers), Ok(()));
    assert_eq!(verdict(CLIENT, trusting(&authority.pem), &for_servers), Err(CertificateError::InvalidPurpose));
}

#[test]
fn a_certificate_may_be_trusted_by_itself() {
    let authority = Authority::new("ca");
    let itself = Issued { chain: authority.pem.clone(), key: String::new() };
    assert_eq!(verdict(SERVER, trusting(&authority.pem), &itself), Ok(()));
    let pinned = authority.issue_with(&["a.test"], &[], |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    assert_eq!(verdict(CLIENT, trusting(&pinned.chain), &pinned), Ok(()));
    assert_eq!(verdict(SERVER, trusting(&pinned.chain), &pinned), Err(CertificateError::InvalidPurpose));
    let expired = authority.issue_with(&["a.test"], &[], |params| params.not_after = date_time_ymd(2020, 1, 1));
    assert_eq!(verdict(SERVER, trusting(&expired.chain), &expired), Err(CertificateError::Expired));
}

#[test]
fn one_name_must_match_one_matcher() {
    let authority = Authority::new("ca");
    let issued = authority.issue(&["a.test", "*.wild.test"], &["spiffe://td/ns/x/sa/client"]);
    let verdict = |matchers: Vec<Arc<SubjectAltNameMatcher>>| {
        let context =
            CertificateValidationContext { match_typed_subject_alt_names: matchers, ..trusting(&authority.pem) };
        verdict(CLIENT, context, &issued).is_ok()
    };
    let exact = |text: &str| StringPattern::Exact(text.into());
    let uri = SanType::Uri;
    assert!(verdict(vec![named(uri, exact("spiffe://td/ns/x/sa/client"))]));
    assert!(!verdict(vec![named(uri, exact("spiffe://td/ns/x/sa/clien"))]));
    assert!(verdict(vec![named(uri, exact("no")), named(uri, StringPattern::Prefix("spiffe://td/".into()))]));
    assert!(verdict(vec![named(uri, StringPattern::Suffix("/client".into()))]));
    assert!(verdict(vec![named(uri, StringPattern::Contains("/sa/".into()))]));
    let regex = StringPattern::Regex(regex::Regex::new("^(?:spiffe://td/.*)$").unwrap());
    assert!(verdict(vec![named(uri, regex)]));
    assert!(!verdict(vec![named(SanType::Dns, exact("spiffe://td/ns/x/sa/client"))]), "of another kind");
    assert!(verdict(vec![named(SanType::Dns, exact("A.test"))]));
    assert!(verdict(vec![named(SanType::Dns, exact("x.wild.test"))]), "the certificate's wildcard covers it");
    assert!(!verdict(vec![named(SanType::Dns, exact("x.y.wild.test"))]));
    assert!(!verdict(vec![named(SanType::Dns, exact("wild.test"))]));
    assert!(verdict(vec![named(SanType::Dns, StringPattern::Suffix(".wild.test".into()))]));
}

#[test]
fn pins_stand_beside_the_chain_or_alone() {
    let authority = Authority::new("ca");
    let (issued, other) = (authority.issue(&["a.test"], &[]), authority.issue(&["b.test"], &[]));
    let hash = tls::sha256(&der(&issued));
    let parsed = der(&issued);
    let spki = tls::sha256(X509Certificate::from_der(&parsed).unwrap().1.public_key().raw);
    let by_hash = |hash| CertificateValidationContext { verify_certificate_hash: vec![hash], ..Default::default() };
    let by_spki = |spki| CertificateValidationContext { verify_certificate_spki: vec![spki], ..Default::default() };
    for context in [by_hash(hash), by_spki(spki)] {
        assert!(verdict(CLIENT, context.clone(), &issued).is_ok());
        assert!(verdict(CLIENT, context.clone(), &other).is_err());
        let both = CertificateValidationContext { trusted_ca: trusting(&authority.pem).trusted_ca, ..context };
        assert!(verdict(CLIENT, both.clone(), &issued).is_ok());
        assert!(verdict(CLIENT, both.clone(), &other).is_err());
        let stranger =
            CertificateValidationContext { trusted_ca: trusting(&Authority::new("x").pem).trusted_ca, ..both };
        assert!(verdict(CLIENT, stranger.clone(), &issued).is_err(), "the pin is right, the issuer is not");
        let accepting = CertificateValidationContext { accept_untrusted: true, ..stranger };
        assert!(verdict(CLIENT, accepting, &issued).is_ok());
    }
}

#[test]
fn without_anything_to_verify_by_hosts_pass_and_demanded_clients_do_not() {
    let issued = Authority::new("ca").issue(&["a.test"], &[]);
    for context in [None, Some(CertificateValidationContext::default())] {
        assert!(verifier(SERVER, context.clone()).verify(&der(&issued), &[], Names::default(), now()).is_ok());
        assert!(verifier(CLIENT, context).verify(&der(&issued), &[], Names::default(), now()).is_err());
    }
}

#[test]
fn a_host_is_asked_for_by_name() {
    let authority = Authority::new("ca");
    let issued = authority.issue(&["a.test", "*.wild.test"], &[]);
    let context = CertificateValidationContext {
        match_typed_subject_alt_names: vec![named(SanType::Uri, StringPattern::Exact("spiffe://nobody".into()))],
        ..trusting(&authority.pem)
    };
    let verifier = verifier(Peer::Server { by_name: true }, Some(context));
    let ask = |name: &str| {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        verifier.verify_server_cert(&der(&issued), &[], &name, &[], now()).is_ok()
    };
    assert!(ask("a.test") && ask("x.wild.test"), "the name takes the matchers' place");
    assert!(!ask("b.test") && !ask("wild.test"));
    assert!(!ask("10.0.0.1"), "no name was sent: the matchers count");
}

#[test]
fn a_wrong_name_is_told_in_words_and_within_bounds() {
    let authority = Authority::new("ca");
    let long = "x".repeat(500);
    let issued = authority.issue(&["a.test", "b.test"], &["spiffe://td/\u{7f}", &format!("spiffe://{long}")]);
    let certificate = der(&issued);
    let known = names(&certificate).unwrap();
    let text = Mismatch::San(other_names(Some("c.test"), &known)).to_string();
    let expected = format!(
        "verify cert failed: SAN matcher: the certificate is for DNS:a.test, DNS:b.test, URI:spiffe://td/\\u{{7f}}, URI:spiffe://{}..., \
         not for \"c.test\"",
        "x".repeat(91)
    );
    assert_eq!(text, expected);
    let many: Known = (0..100).map(|n| (SanType::Dns, format!("{n}.test"))).collect();
    let text = other_names(None, &many);
    assert!(text.ends_with("DNS:4.test and 95 more") && text.len() < 120, "{text}");
    assert_eq!(other_names(None, &Known::new()), "the certificate has no alternative names");
    // As it is logged.
    let error = std::io::Error::other(Mismatch::San("it is another".to_owned()).error());
    let described = culvert_xds_client::tls_error::describe(&error);
    assert_eq!(described, "invalid peer certificate: verify cert failed: SAN matcher: it is another");
}
