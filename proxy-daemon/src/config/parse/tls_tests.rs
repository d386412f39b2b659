use envoy_types::pb::envoy::{
    config::{cluster::v3::Cluster, listener::v3::FilterChain},
    extensions::transport_sockets::tls::v3::Secret as ProtoSecret,
};

use super::*;
use crate::{
    config::{
        model::{SecretType, UpstreamProtocol},
        parse,
    },
    tls::testing::{Authority, yaml},
};

const DOWNSTREAM: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
const UPSTREAM: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";

/// `$CERT`, `$KEY`, `$OTHER_KEY` and `$CA` stand for PEM texts.
fn filled(text: &str) -> String {
    let authority = Authority::new("ca");
    let (server, other) = (authority.issue(&["a.test"], &[]), authority.issue(&["b.test"], &[]));
    text.replace("$CERT", &yaml(&server.chain))
        .replace("$KEY", &yaml(&server.key))
        .replace("$OTHER_KEY", &yaml(&other.key))
        .replace("$CA", &yaml(&authority.pem))
}

fn downstream(context: &str) -> std::result::Result<Arc<DownstreamTlsContext>, String> {
    let text =
        filled(&format!("transport_socket: {{ name: tls, typed_config: {{ '@type': {DOWNSTREAM}, {context} }} }}"));
    let chain: FilterChain = culvert_xds_client::json::from_yaml(&text).map_err(|error| error.to_string())?;
    support::check(&chain, "").map_err(|error| error.to_string())?;
    let context = downstream_socket(chain.transport_socket.as_ref(), "").map_err(|error| error.to_string())?;
    Ok(context.unwrap())
}

fn upstream(context: &str) -> std::result::Result<Arc<UpstreamTlsContext>, String> {
    cluster(context, "").map(|cluster| cluster.tls.unwrap())
}

fn cluster(context: &str, more: &str) -> std::result::Result<crate::config::model::ClusterConfig, String> {
    let text = filled(&format!(
        "name: c\n{more}\ntransport_socket: {{ name: tls, typed_config: {{ '@type': {UPSTREAM}, {context} }} }}"
    ));
    let cluster: Cluster = culvert_xds_client::json::from_yaml(&text).map_err(|error| error.to_string())?;
    parse::cluster(&cluster, "").map_err(|error| error.to_string())
}

const CERTIFICATE: &str = "{ certificate_chain: { inline_string: $CERT }, private_key: { inline_string: $KEY } }";

#[test]
fn a_downstream_context_is_read() {
    let context = downstream(&format!(
        "require_client_certificate: true, require_sni: true, disable_stateless_session_resumption: true,
         disable_stateful_session_resumption: true, common_tls_context: {{
           alpn_protocols: [h2, http/1.1], tls_certificates: [{CERTIFICATE}],
           tls_params: {{ tls_minimum_protocol_version: TLSv1_3, ecdh_curves: [X25519, P-256] }},
           validation_context: {{ trusted_ca: {{ inline_string: $CA }}, trust_chain_verification: ACCEPT_UNTRUSTED,
             verify_certificate_hash: ['{hash}'], verify_certificate_spki: ['{spki}'], suppress_client_ca_list: true,
             match_typed_subject_alt_names: [{{ san_type: URI, matcher: {{ prefix: 'spiffe://' }} }}] }} }}",
        hash = ["ab"; 32].join(":"),
        spki = STANDARD.encode([7; 32]),
    ))
    .unwrap();
    assert!(context.require_client_certificate && context.require_sni);
    assert!(matches!(context.session_tickets, SessionTickets::Disabled) && !context.session_ids);
    assert_eq!(context.common.alpn_protocols, [b"h2".to_vec(), b"http/1.1".to_vec()]);
    let params = &context.common.params;
    assert_eq!((params.tls12, params.tls13), (false, true));
    assert_eq!(params.ecdh_curves, [NamedGroup::X25519, NamedGroup::secp256r1]);
    let Certificates::Inline(certificates) = &context.common.certificates else { panic!() };
    assert_eq!(certificates[0].dns_names, ["a.test"]);
    assert_eq!(certificates[0].chain_path, "<inline>");
    let Validation::Inline(validation) = &context.common.validation else { panic!() };
    assert_eq!(validation.verify_certificate_hash, [[0xab; 32]]);
    assert_eq!(validation.verify_certificate_spki, [[7; 32]]);
    assert!(validation.accept_untrusted && validation.suppress_client_ca_list);
    assert_eq!(validation.match_typed_subject_alt_names[0].san_type, Some(SanType::Uri));
}

#[test]
fn keys_of_session_tickets_are_read_or_refused() {
    let context =
        |text: &str| downstream(&format!("{text}, common_tls_context: {{ tls_certificates: [{CERTIFICATE}] }}"));
    let (good, bad) = (STANDARD.encode([1; 80]), STANDARD.encode([1; 48]));
    let of = |keys: &str| context(&format!("session_timeout: 90.5s, session_ticket_keys: {{ keys: [{keys}] }}"));
    let read = of(&format!("{{ inline_bytes: {good} }}, {{ inline_bytes: {good} }}")).unwrap();
    assert!(matches!(&read.session_tickets, SessionTickets::Keys(keys) if keys.keys.len() == 2));
    assert_eq!(read.session_timeout, Some(std::time::Duration::from_millis(90_500)));
    let plain = context("disable_stateless_session_resumption: false, session_timeout: 0s").unwrap();
    assert!(matches!(plain.session_tickets, SessionTickets::OwnKeys) && plain.session_ids);
    assert_eq!(plain.session_timeout, None, "none is the default, as in BoringSSL");
    let secret = context("session_ticket_keys_sds_secret_config: { name: tickets }").unwrap();
    let secrets: Vec<_> = secret.secrets().map(|(kind, secret)| (kind, secret.name().name)).collect();
    assert_eq!(secrets, [(SecretType::SessionTicketKeys, "tickets".into())]);

    let length = "Incorrect TLS session ticket key length. Length 48, expected length 80.";
    let error = of(&format!("{{ inline_bytes: {good} }}, {{ inline_bytes: {bad} }}")).unwrap_err();
    assert_eq!(error, format!("transport_socket.typed_config.session_ticket_keys.keys[1]: {length}"));
    let error = of("").unwrap_err();
    assert!(error.starts_with("transport_socket.typed_config.session_ticket_keys.keys: "), "{error}");
    let error = context("session_timeout: -1s").unwrap_err();
    assert!(error.starts_with("transport_socket.typed_config.session_timeout: "), "{error}");
}

#[test]
fn an_issuer_that_cannot_be_trusted_is_refused_with_its_path() {
    // A reader of certificates takes what it knows and leaves the rest; what chains are verified by wants nothing left.
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let der = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der().to_vec();
    let longer = STANDARD.encode([der, vec![0]].concat());
    let pem = format!("-----BEGIN CERTIFICATE-----\n{longer}\n-----END CERTIFICATE-----\n");
    let message: ProtoSecret = culvert_xds_client::json::from_yaml(&format!(
        "name: v\nvalidation_context: {{ trusted_ca: {{ inline_string: {} }} }}",
        yaml(&pem)
    ))
    .unwrap();
    let error = secret(&message, "").unwrap_err().to_string();
    let expected = "validation_context.trusted_ca: Failed to load trusted CA certificates from <inline>: ";
    assert!(error.starts_with(expected) && error.len() > expected.len(), "{error}");
}

#[test]
fn an_upstream_context_is_read() {
    let context = upstream("sni: a.test, auto_host_sni: true, max_session_keys: 0").unwrap();
    assert_eq!(context.sni.as_ref().unwrap().to_str(), "a.test");
    assert!(context.auto_host_sni && !context.auto_sni_san_validation);
    assert_eq!(context.max_session_keys, 0);
    let params = &context.common.params;
    assert_eq!((params.tls12, params.tls13), (true, false), "Envoy's clients stop at 1.2 by default");
    let newest = "common_tls_context: { tls_params: { tls_maximum_protocol_version: TLSv1_3 } }";
    assert!(upstream(newest).unwrap().common.params.tls13);
    assert!(*upstream("sni: a.test").unwrap() == *upstream("sni: a.test").unwrap());
    assert!(*upstream("sni: a.test").unwrap() != *upstream("sni: b.test").unwrap());
}

#[test]
fn the_host_may_choose_the_protocol() {
    let options = "typed_extension_protocol_options: { envoy.extensions.upstreams.http.v3.HttpProtocolOptions: { '@type': \
                   type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, auto_config: {} } }";
    assert!(matches!(cluster("sni: a", options).unwrap().protocol, UpstreamProtocol::Auto(_)));
    let plain: Cluster = culvert_xds_client::json::from_yaml(&format!("name: c\n{options}")).unwrap();
    let error = parse::cluster(&plain, "").unwrap_err().to_string();
    assert!(
        error.ends_with(
            "auto_config: lets the TLS handshake choose the protocol: the cluster needs a TLS transport_socket, and no match with another"
        ),
        "{error}"
    );
}

#[test]
fn what_a_downstream_context_cannot_do_is_named() {
    let inline = |context: &str| format!("common_tls_context: {{ tls_certificates: [{CERTIFICATE}], {context} }}");
    let certificate = |text: &str| format!("common_tls_context: {{ tls_certificates: [{text}] }}");
    for (context, path, message) in [
        (String::new(), "", "No TLS certificates found for server context"),
        (
            certificate("{ private_key: { inline_string: $KEY } }"),
            ".tls_certificates[0].certificate_chain",
            "value is required",
        ),
        (
            certificate("{ certificate_chain: { inline_string: hello }, private_key: { inline_string: $KEY } }"),
            ".tls_certificates[0].certificate_chain",
            "Failed to load certificate chain from <inline>",
        ),
        (
            certificate("{ certificate_chain: { inline_string: $CERT }, private_key: { inline_string: $OTHER_KEY } }"),
            ".tls_certificates[0].private_key",
            "Failed to load private key from <inline>, Cause: it does not belong to the certificate",
        ),
        (
            certificate("{ certificate_chain: { filename: /nonexistent }, private_key: { inline_string: $KEY } }"),
            ".tls_certificates[0].certificate_chain.filename",
            "cannot read /nonexistent: No such file or directory (os error 2)",
        ),
        (
            certificate("{ certificate_chain: { filename: /dev/zero }, private_key: { inline_string: $KEY } }"),
            ".tls_certificates[0].certificate_chain.filename",
            "cannot read /dev/zero: it is not a regular file",
        ),
        (
            certificate(
                "{ certificate_chain: { inline_string: $CERT }, private_key: { inline_string: $KEY }, password: { inline_string: x } }",
            ),
            ".tls_certificates[0].password",
            "not supported by culvert yet",
        ),
        (
            inline("validation_context: { trusted_ca: { inline_string: x } }"),
            ".validation_context.trusted_ca",
            "Failed to load trusted CA certificates from <inline>",
        ),
        (
            inline("validation_context: { match_typed_subject_alt_names: [{ san_type: DNS, matcher: { exact: a } }] }"),
            ".validation_context",
            "SAN-based verification of peer certificates without trusted CA is insecure and not allowed",
        ),
        (
            inline("validation_context: { verify_certificate_hash: [zz] }"),
            ".validation_context.verify_certificate_hash[0]",
            "Invalid hex-encoded SHA-256 zz",
        ),
        (
            inline("validation_context: { verify_certificate_spki: [AAAA] }"),
            ".validation_context.verify_certificate_spki[0]",
            "Invalid base64-encoded SHA-256 AAAA",
        ),
        (
            inline("validation_context: { allow_expired_certificate: true }"),
            ".validation_context.allow_expired_certificate",
            "not supported by culvert yet",
        ),
        (
            inline("tls_params: { cipher_suites: [FOO] }"),
            ".tls_params.cipher_suites[0]",
            "the cipher suite \"FOO\" is not supported by culvert yet",
        ),
        (
            inline("tls_params: { ecdh_curves: [FOO] }"),
            ".tls_params.ecdh_curves[0]",
            "the curve \"FOO\" is not supported by culvert yet",
        ),
        (
            inline("tls_params: { tls_minimum_protocol_version: TLSv1_0 }"),
            ".tls_params.tls_minimum_protocol_version",
            "versions before TLSv1_2 are not supported by culvert yet",
        ),
        (
            inline("tls_params: { tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_2 }"),
            ".tls_params.tls_maximum_protocol_version",
            "is below the minimum: no version is left",
        ),
        (
            inline("tls_certificate_sds_secret_configs: [{ name: s }]"),
            ".tls_certificate_sds_secret_configs",
            "SDS and non-SDS TLS certificates may not be mixed in server contexts",
        ),
        (inline("key_log: { path: /tmp/x }"), ".key_log", "not supported by culvert yet"),
    ] {
        let path = format!("transport_socket.typed_config.common_tls_context{path}");
        assert_eq!(downstream(&context).unwrap_err(), format!("{path}: {message}"), "{context}");
    }
}

#[test]
fn what_an_upstream_context_cannot_do_is_named() {
    for (context, expected) in [
        ("sni: 'a b'", "sni: \"a b\" is not a DNS name"),
        (
            "auto_sni_san_validation: true",
            "auto_sni_san_validation: 'auto_sni_san_validation' was configured without a validation context",
        ),
        ("allow_renegotiation: true", "allow_renegotiation: not supported by culvert yet"),
        (
            &format!("common_tls_context: {{ tls_certificates: [{CERTIFICATE}, {CERTIFICATE}] }}"),
            "common_tls_context: Multiple TLS certificates are not supported for client contexts",
        ),
    ] {
        assert_eq!(upstream(context).unwrap_err(), format!("transport_socket.typed_config.{expected}"), "{context}");
    }
}

#[test]
fn secrets_are_read_or_refused() {
    let read = |text: &str| {
        let message: ProtoSecret = culvert_xds_client::json::from_yaml(&filled(text)).unwrap();
        secret(&message, "")
    };
    let certificate = read(&format!("name: s\ntls_certificate: {CERTIFICATE}")).unwrap();
    assert!(matches!(certificate, Secret::TlsCertificate(certificate) if certificate.name == "s"));
    let context = read("name: v\nvalidation_context: { trusted_ca: { inline_string: $CA } }").unwrap();
    assert!(matches!(context, Secret::ValidationContext(context) if context.trusted_ca.is_some()));
    for (text, expected) in [
        (
            "name: g\ngeneric_secret: { secret: { inline_string: x } }",
            "generic_secret.secret: not supported by culvert yet",
        ),
        ("name: g\ngeneric_secret: {}", "generic_secret.secrets: value is required"),
        (
            "name: g\ngeneric_secret: { secrets: { k: { inline_string: short } } }",
            "generic_secret.secrets[\"k\"]: a key of at least 32 bytes is needed",
        ),
        (
            "name: t\nsession_ticket_keys: { keys: [{ inline_string: x }] }",
            "session_ticket_keys.keys[0]: Incorrect TLS session ticket key length. Length 1, expected length 80.",
        ),
        ("name: e", "tls_certificate: value is required"),
    ] {
        assert_eq!(read(text).unwrap_err().to_string(), expected);
    }
}

#[test]
fn a_combined_context_is_both() {
    let default = CertificateValidationContext {
        match_typed_subject_alt_names: vec![Arc::new(SubjectAltNameMatcher {
            san_type: Some(SanType::Dns),
            matcher: crate::config::model::StringMatcher {
                pattern: crate::config::model::StringPattern::Exact("a".into()),
                ignore_case: false,
            },
        })],
        verify_certificate_hash: vec![[1; 32]],
        ..Default::default()
    };
    let over =
        CertificateValidationContext { verify_certificate_hash: vec![[2; 32]], name: "s".into(), ..Default::default() };
    let merged = default.merged(&over);
    assert_eq!(merged.verify_certificate_hash, [[1; 32], [2; 32]]);
    assert_eq!((merged.match_typed_subject_alt_names.len(), &*merged.name), (1, "s"));
}
