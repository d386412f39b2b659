//! Transport sockets: `envoy.transport_sockets.tls` and `envoy.transport_sockets.raw_buffer`.

use std::{path::Path, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use culvert_xds_client::{
    json::unpack,
    overrides::{MIN_KEY_BYTES, key_of_file},
    regular_file,
};
use envoy_types::pb::envoy::{
    config::{
        cluster::v3::{Cluster, cluster::TransportSocketMatch},
        core::v3::{DataSource, TransportSocket, data_source::Specifier, transport_socket::ConfigType},
    },
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext as ProtoValidation, CommonTlsContext as ProtoCommon,
        DownstreamTlsContext as ProtoDownstream, GenericSecret as ProtoGenericSecret, SdsSecretConfig,
        Secret as ProtoSecret, SubjectAltNameMatcher as ProtoMatcher, TlsCertificate as ProtoCertificate,
        TlsParameters as ProtoParameters, TlsSessionTicketKeys as ProtoTicketKeys, UpstreamTlsContext as ProtoUpstream,
        certificate_validation_context::TrustChainVerification,
        common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
        downstream_tls_context::SessionTicketKeysType,
        secret, subject_alt_name_matcher,
        tls_parameters::TlsProtocol,
    },
};
use prost::Message;
use rustls::{CipherSuite, NamedGroup, pki_types::ServerName};

use super::{
    common::{Result, duration, required},
    config_source::config_source,
    matcher,
    secret_files::not_watched,
    support::{self, join},
};
use crate::{
    config::{
        FieldError,
        model::{
            CertificateValidationContext, Certificates, CommonTlsContext, DownstreamTlsContext, GenericSecret,
            ResourceRef, SanType, Secret, SecretRef, SessionTicketKeys, SessionTickets, SocketMatch, SocketMatches,
            SubjectAltNameMatcher, TlsCertificate, TlsParameters, UpstreamTlsContext, Validation,
        },
    },
    http::metadata::object,
    tls::{self, Material, TicketKey},
};

/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// A filter chain's transport socket; `None`: plain.
pub(super) fn downstream_socket(
    socket: Option<&TransportSocket>,
    path: &str,
) -> Result<Option<Arc<DownstreamTlsContext>>> {
    let Some((config, path)) = tls_config(socket, "DownstreamTlsContext", path)? else { return Ok(None) };
    let message: ProtoDownstream = unpack(config, &path)?;
    let common_path = join(&path, "common_tls_context");
    let common = common_tls_context(message.common_tls_context.as_ref(), TlsProtocol::TlSv13, &common_path)?;
    match &common.certificates {
        Certificates::Inline(certificates) if certificates.is_empty() => {
            return Err(FieldError::new(common_path, "No TLS certificates found for server context"));
        }
        _ => {}
    }
    let session_tickets = match &message.session_ticket_keys_type {
        Some(SessionTicketKeysType::DisableStatelessSessionResumption(true)) => SessionTickets::Disabled,
        None | Some(SessionTicketKeysType::DisableStatelessSessionResumption(false)) => SessionTickets::OwnKeys,
        Some(SessionTicketKeysType::SessionTicketKeys(keys)) => {
            SessionTickets::Keys(Arc::new(session_ticket_keys(keys, &join(&path, "session_ticket_keys"))?))
        }
        Some(SessionTicketKeysType::SessionTicketKeysSdsSecretConfig(config)) => {
            SessionTickets::Secret(secret_ref(config, &join(&path, "session_ticket_keys_sds_secret_config"))?)
        }
    };
    let session_timeout = duration(message.session_timeout, &path, "session_timeout")?;
    Ok(Some(Arc::new(DownstreamTlsContext {
        common,
        require_client_certificate: message.require_client_certificate.is_some_and(|value| value.value),
        require_sni: message.require_sni.is_some_and(|value| value.value),
        session_tickets,
        session_ids: !message.disable_stateful_session_resumption,
        // As BoringSSL takes it, none is the default.
        session_timeout: session_timeout.filter(|timeout| timeout.as_secs() > 0),
    })))
}

/// A cluster's transport socket; `None`: plain.
pub(super) fn upstream_socket(socket: Option<&TransportSocket>, path: &str) -> Result<Option<Arc<UpstreamTlsContext>>> {
    let Some((config, path)) = tls_config(socket, "UpstreamTlsContext", path)? else { return Ok(None) };
    let message: ProtoUpstream = unpack(config, &path)?;
    let common_path = join(&path, "common_tls_context");
    // Envoy's clients stop at 1.2 where nothing else is said.
    let common = common_tls_context(message.common_tls_context.as_ref(), TlsProtocol::TlSv12, &common_path)?;
    let several = match &common.certificates {
        Certificates::Inline(certificates) => certificates.len() > 1,
        Certificates::Secrets(names) => names.len() > 1,
    };
    if several {
        return Err(FieldError::new(common_path, "Multiple TLS certificates are not supported for client contexts"));
    }
    if message.auto_sni_san_validation && matches!(common.validation, Validation::None) {
        let text = "'auto_sni_san_validation' was configured without a validation context";
        return Err(FieldError::new(join(&path, "auto_sni_san_validation"), text));
    }
    let sni = match message.sni.as_str() {
        "" => None,
        name => match ServerName::try_from(name.to_owned()) {
            Ok(name @ ServerName::DnsName(_)) => Some(name),
            _ => return Err(FieldError::new(join(&path, "sni"), format!("{name:?} is not a DNS name"))),
        },
    };
    let kept = message.max_session_keys.map_or(1, |value| value.value);
    Ok(Some(Arc::new(UpstreamTlsContext {
        digest: digest(&message, &common),
        common,
        sni,
        auto_host_sni: message.auto_host_sni,
        auto_sni_san_validation: message.auto_sni_san_validation,
        max_session_keys: kept.min(10_000) as usize,
    })))
}

/// The transport sockets that a cluster has for some of its hosts.
pub(super) fn socket_matches(cluster: &Cluster, path: &str) -> Result<SocketMatches> {
    let all = join(path, "transport_socket_matches");
    let parse = |(index, item): (usize, &TransportSocketMatch)| {
        let path = format!("{all}[{index}]");
        if item.transport_socket.is_none() {
            return Err(required(&path, "transport_socket"));
        }
        Ok(SocketMatch {
            name: item.name.as_str().into(),
            labels: item.r#match.as_ref().map(object).unwrap_or_default(),
            tls: upstream_socket(item.transport_socket.as_ref(), &path)?,
        })
    };
    let matches: Arc<[_]> = cluster.transport_socket_matches.iter().enumerate().map(parse).collect::<Result<_>>()?;
    if matches.len() >= usize::from(u16::MAX) {
        return Err(FieldError::new(all, "there are more than 65,534 of them"));
    }
    Ok(SocketMatches(matches))
}

/// The typed configuration of a TLS socket, with its path.
fn tls_config<'a>(
    socket: Option<&'a TransportSocket>,
    wanted: &str,
    path: &str,
) -> Result<Option<(&'a envoy_types::pb::google::protobuf::Any, String)>> {
    let Some(socket) = socket else { return Ok(None) };
    let Some(ConfigType::TypedConfig(config)) = &socket.config_type else {
        return Err(required(path, "transport_socket.typed_config"));
    };
    let path = join(path, "transport_socket.typed_config");
    match config.type_url.rsplit('.').next() {
        Some("RawBuffer") => Ok(None),
        Some(name) if name == wanted => Ok(Some((config, path))),
        _ => Err(FieldError::new(path, format!("this socket takes a {wanted} or a RawBuffer"))),
    }
}

fn digest(message: &ProtoUpstream, common: &CommonTlsContext) -> [u8; 32] {
    let mut bytes = message.encode_to_vec();
    if let Certificates::Inline(certificates) = &common.certificates {
        certificates.iter().flat_map(|it| &it.key.cert).for_each(|der| bytes.extend_from_slice(der));
    }
    if let Validation::Inline(context) | Validation::Combined(context, _) = &common.validation {
        let certificates = context.trusted_ca.iter().flat_map(|ca| &ca.certificates);
        certificates.for_each(|der| bytes.extend_from_slice(der));
    }
    tls::sha256(&bytes)
}

fn common_tls_context(message: Option<&ProtoCommon>, newest: TlsProtocol, path: &str) -> Result<CommonTlsContext> {
    let default = ProtoCommon::default();
    let message = message.unwrap_or(&default);
    let inline = message.tls_certificates.iter().enumerate();
    let inline = inline.map(|(index, item)| {
        let path = format!("{}[{index}]", join(path, "tls_certificates"));
        not_watched(item.watched_directory.as_ref(), &path)?;
        tls_certificate(item, "", &path).map(Arc::new)
    });
    let inline: Vec<_> = inline.collect::<Result<_>>()?;
    let secrets_path = join(path, "tls_certificate_sds_secret_configs");
    let secrets = message.tls_certificate_sds_secret_configs.iter().enumerate();
    let secrets = secrets.map(|(index, item)| secret_ref(item, &format!("{secrets_path}[{index}]")));
    let secrets: Vec<_> = secrets.collect::<Result<_>>()?;
    let certificates = match (inline.is_empty(), secrets.is_empty()) {
        (false, false) => {
            let text = "SDS and non-SDS TLS certificates may not be mixed in server contexts";
            return Err(FieldError::new(secrets_path, text));
        }
        (true, false) => Certificates::Secrets(secrets),
        (_, true) => Certificates::Inline(inline),
    };
    let validation = match &message.validation_context_type {
        None => Validation::None,
        Some(ValidationContextType::ValidationContext(context)) => {
            let path = join(path, "validation_context");
            not_watched(context.watched_directory.as_ref(), &path)?;
            let context = validation_context(context, "", &path)?;
            names_need_an_issuer(&context, &path)?;
            Validation::Inline(Arc::new(context))
        }
        Some(ValidationContextType::ValidationContextSdsSecretConfig(config)) => {
            Validation::Secret(secret_ref(config, &join(path, "validation_context_sds_secret_config"))?)
        }
        Some(ValidationContextType::CombinedValidationContext(combined)) => {
            combined_validation(combined, &join(path, "combined_validation_context"))?
        }
        Some(_) => return Err(FieldError::unsupported(join(path, "validation_context_type"))),
    };
    let alpn = message.alpn_protocols.iter().enumerate().map(|(index, name)| match name.len() {
        1..=255 => Ok(name.as_bytes().to_vec()),
        _ => Err(FieldError::new(
            format!("{}[{index}]", join(path, "alpn_protocols")),
            "a protocol's name has 1 to 255 bytes",
        )),
    });
    Ok(CommonTlsContext {
        params: tls_parameters(message.tls_params.as_ref(), newest, &join(path, "tls_params"))?,
        certificates,
        validation,
        alpn_protocols: alpn.collect::<Result<_>>()?,
    })
}

fn combined_validation(combined: &CombinedCertificateValidationContext, path: &str) -> Result<Validation> {
    let default = combined.default_validation_context.as_ref();
    let default = default.ok_or_else(|| required(path, "default_validation_context"))?;
    let default_path = join(path, "default_validation_context");
    not_watched(default.watched_directory.as_ref(), &default_path)?;
    let default = validation_context(default, "", &default_path)?;
    let secret = combined.validation_context_sds_secret_config.as_ref();
    let secret = secret.ok_or_else(|| required(path, "validation_context_sds_secret_config"))?;
    let secret = secret_ref(secret, &join(path, "validation_context_sds_secret_config"))?;
    Ok(Validation::Combined(Arc::new(default), secret))
}

fn secret_ref(config: &SdsSecretConfig, path: &str) -> Result<SecretRef> {
    if config.name.is_empty() {
        return Err(required(path, "name"));
    }
    Ok(match &config.sds_config {
        Some(source) => {
            let from = config_source(Some(source), &join(path, "sds_config"))?;
            SecretRef::Discovered(ResourceRef::new(&config.name, from))
        }
        None => SecretRef::Static(config.name.as_str().into()),
    })
}

/// A checked secret.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn secret(message: &ProtoSecret, path: &str) -> Result<Secret> {
    support::check(message, path)?;
    match &message.r#type {
        Some(secret::Type::TlsCertificate(certificate)) => {
            let path = join(path, "tls_certificate");
            Ok(Secret::TlsCertificate(Arc::new(tls_certificate(certificate, &message.name, &path)?)))
        }
        Some(secret::Type::ValidationContext(context)) => {
            let path = join(path, "validation_context");
            Ok(Secret::ValidationContext(Arc::new(validation_context(context, &message.name, &path)?)))
        }
        Some(secret::Type::SessionTicketKeys(keys)) => {
            Ok(Secret::SessionTicketKeys(Arc::new(session_ticket_keys(keys, &join(path, "session_ticket_keys"))?)))
        }
        Some(secret::Type::GenericSecret(generic)) => {
            Ok(Secret::Generic(Arc::new(generic_secret(generic, &join(path, "generic_secret"))?)))
        }
        None => Err(required(path, "tls_certificate")),
    }
}

/// Keys of signatures: what else a generic secret may be is not honoured.
fn generic_secret(message: &ProtoGenericSecret, path: &str) -> Result<GenericSecret> {
    if message.secrets.is_empty() {
        return Err(required(path, "secrets"));
    }
    let keys = message.secrets.iter().map(|(id, source)| {
        let path = format!("{path}.secrets[\"{id}\"]");
        let bytes = material(source, &path)?.bytes;
        let key = key_of_file(&bytes);
        if key.len() < MIN_KEY_BYTES {
            return Err(FieldError::new(path, format!("a key of at least {MIN_KEY_BYTES} bytes is needed")));
        }
        Ok((id.clone(), key.into()))
    });
    Ok(GenericSecret { keys: keys.collect::<Result<_>>()? })
}

fn session_ticket_keys(message: &ProtoTicketKeys, path: &str) -> Result<SessionTicketKeys> {
    let path = join(path, "keys");
    if message.keys.is_empty() {
        return Err(FieldError::new(path, "value must contain at least 1 item(s)"));
    }
    let keys = message.keys.iter().enumerate().map(|(index, source)| {
        let path = format!("{path}[{index}]");
        let bytes = material(source, &path)?.bytes;
        TicketKey::new(&bytes).map_err(|error| FieldError::new(path, error))
    });
    Ok(SessionTicketKeys { keys: keys.collect::<Result<_>>()? })
}

fn tls_certificate(certificate: &ProtoCertificate, name: &str, path: &str) -> Result<TlsCertificate> {
    let read = |source: &Option<DataSource>, field: &str| match source {
        Some(source) => material(source, &join(path, field)),
        None => Err(required(path, field)),
    };
    let chain = read(&certificate.certificate_chain, "certificate_chain")?;
    let key = read(&certificate.private_key, "private_key")?;
    tls::tls_certificate(name, &chain, &key, tls::provider())
        .map_err(|(field, message)| FieldError::new(join(path, field), message))
}

fn validation_context(context: &ProtoValidation, name: &str, path: &str) -> Result<CertificateValidationContext> {
    let trusted_ca = match &context.trusted_ca {
        Some(source) => {
            let path = join(path, "trusted_ca");
            let ca = tls::trusted_ca(&material(source, &path)?).map_err(|error| FieldError::new(path, error))?;
            Some(Arc::new(ca))
        }
        None => None,
    };
    let typed = context.match_typed_subject_alt_names.iter().enumerate();
    let mut matchers: Vec<_> = typed
        .map(|(index, item)| alt_name(item, &format!("{}[{index}]", join(path, "match_typed_subject_alt_names"))))
        .collect::<Result<_>>()?;
    #[expect(deprecated, reason = "the field that match_typed_subject_alt_names replaced, which Envoy still takes")]
    for (index, item) in context.match_subject_alt_names.iter().enumerate() {
        let path = format!("{}[{index}]", join(path, "match_subject_alt_names"));
        let matcher = matcher::string(item, &path)?;
        matchers.push(Arc::new(SubjectAltNameMatcher { san_type: None, matcher }));
    }
    let pins = |list: &[String], field: &str, parse: fn(&str) -> Option<[u8; 32]>, kind: &str| {
        let parse = |(index, text): (usize, &String)| {
            let path = format!("{}[{index}]", join(path, field));
            parse(text).ok_or_else(|| FieldError::new(path, format!("Invalid {kind}-encoded SHA-256 {text}")))
        };
        list.iter().enumerate().map(parse).collect::<Result<Vec<_>>>()
    };
    let untrusted = TrustChainVerification::AcceptUntrusted as i32;
    Ok(CertificateValidationContext {
        name: name.to_owned(),
        trusted_ca,
        match_typed_subject_alt_names: matchers,
        verify_certificate_hash: pins(&context.verify_certificate_hash, "verify_certificate_hash", hash, "hex")?,
        verify_certificate_spki: pins(&context.verify_certificate_spki, "verify_certificate_spki", spki, "base64")?,
        accept_untrusted: context.trust_chain_verification == untrusted,
        suppress_client_ca_list: context.suppress_client_ca_list,
    })
}

/// Anybody can make a certificate with any name.
fn names_need_an_issuer(context: &CertificateValidationContext, path: &str) -> Result<()> {
    if context.trusted_ca.is_some() || context.match_typed_subject_alt_names.is_empty() {
        return Ok(());
    }
    let text = "SAN-based verification of peer certificates without trusted CA is insecure and not allowed";
    Err(FieldError::new(path, text))
}

fn alt_name(message: &ProtoMatcher, path: &str) -> Result<Arc<SubjectAltNameMatcher>> {
    use subject_alt_name_matcher::SanType as Proto;
    let san_type = match Proto::try_from(message.san_type) {
        Ok(Proto::Email) => SanType::Email,
        Ok(Proto::Dns) => SanType::Dns,
        Ok(Proto::Uri) => SanType::Uri,
        Ok(Proto::IpAddress) => SanType::IpAddress,
        san_type => {
            let name = san_type.map_or("a type that is not known", |it| it.as_str_name());
            return Err(FieldError::unsupported_value(join(path, "san_type"), name, "EMAIL, DNS, URI and IP_ADDRESS"));
        }
    };
    let text = message.matcher.as_ref().ok_or_else(|| required(path, "matcher"))?;
    let matcher = matcher::string(text, &join(path, "matcher"))?;
    Ok(Arc::new(SubjectAltNameMatcher { san_type: Some(san_type), matcher }))
}

/// 64 hexadecimal digits, with or without colons between the bytes.
fn hash(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u8> = match text.len() {
        64 => text.bytes().collect(),
        95 if text.bytes().skip(2).step_by(3).all(|byte| byte == b':') => {
            text.bytes().enumerate().filter(|(index, _)| index % 3 != 2).map(|(_, byte)| byte).collect()
        }
        _ => return None,
    };
    let mut pin = [0; 32];
    for (byte, pair) in pin.iter_mut().zip(digits.chunks_exact(2)) {
        let value = |digit: u8| char::from(digit).to_digit(16);
        *byte = u8::try_from(value(pair[0])? * 16 + value(pair[1])?).ok()?;
    }
    Some(pin)
}

fn spki(text: &str) -> Option<[u8; 32]> {
    STANDARD.decode(text).ok()?.try_into().ok()
}

fn tls_parameters(message: Option<&ProtoParameters>, newest: TlsProtocol, path: &str) -> Result<TlsParameters> {
    let default = ProtoParameters::default();
    let message = message.unwrap_or(&default);
    let version = |value: i32, auto: TlsProtocol, field: &str| match TlsProtocol::try_from(value) {
        Ok(TlsProtocol::TlsAuto) => Ok(auto),
        Ok(version @ (TlsProtocol::TlSv12 | TlsProtocol::TlSv13)) => Ok(version),
        _ => {
            let text = "versions before TLSv1_2 are not supported by culvert yet";
            Err(FieldError::new(join(path, field), text))
        }
    };
    let minimum = "tls_minimum_protocol_version";
    let maximum = "tls_maximum_protocol_version";
    let from = version(message.tls_minimum_protocol_version, TlsProtocol::TlSv12, minimum)?;
    // A minimum of 1.3 alone means 1.3, whatever the default of the maximum.
    let to = version(message.tls_maximum_protocol_version, newest.max(from), maximum)?;
    if from > to {
        return Err(FieldError::new(join(path, maximum), "is below the minimum: no version is left"));
    }
    let groups = message.cipher_suites.iter().enumerate().flat_map(|(index, text)| {
        let names = text.trim_start_matches('[').trim_end_matches(']').split(['|', ':']);
        names.map(move |name| (index, name))
    });
    let suites = groups.map(|(index, name)| {
        let path = format!("{}[{index}]", join(path, "cipher_suites"));
        let unknown = || FieldError::new(path, format!("the cipher suite {name:?} is not supported by culvert yet"));
        cipher_suite(name).ok_or_else(unknown)
    });
    let curves =
        message.ecdh_curves.iter().enumerate().flat_map(|(index, text)| text.split(':').map(move |name| (index, name)));
    let curves = curves.map(|(index, name)| {
        let path = format!("{}[{index}]", join(path, "ecdh_curves"));
        let unknown = || FieldError::new(path, format!("the curve {name:?} is not supported by culvert yet"));
        curve(name).ok_or_else(unknown)
    });
    Ok(TlsParameters {
        tls12: from == TlsProtocol::TlSv12,
        tls13: to == TlsProtocol::TlSv13,
        cipher_suites: suites.collect::<Result<_>>()?,
        ecdh_curves: curves.collect::<Result<_>>()?,
    })
}

fn cipher_suite(name: &str) -> Option<CipherSuite> {
    Some(match name {
        "ECDHE-ECDSA-AES128-GCM-SHA256" => CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        "ECDHE-ECDSA-AES256-GCM-SHA384" => CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        "ECDHE-ECDSA-CHACHA20-POLY1305" => CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        "ECDHE-RSA-AES128-GCM-SHA256" => CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        "ECDHE-RSA-AES256-GCM-SHA384" => CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        "ECDHE-RSA-CHACHA20-POLY1305" => CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        _ => return None,
    })
}

fn curve(name: &str) -> Option<NamedGroup> {
    Some(match name {
        "X25519" => NamedGroup::X25519,
        "P-256" => NamedGroup::secp256r1,
        "P-384" => NamedGroup::secp384r1,
        "P-521" => NamedGroup::secp521r1,
        "X25519MLKEM768" => NamedGroup::X25519MLKEM768,
        _ => return None,
    })
}

/// What a `DataSource` holds.
pub(crate) fn data_source(source: &DataSource, path: &str) -> Result<Vec<u8>> {
    material(source, path).map(|material| material.bytes)
}

/// Reads a `DataSource`.
pub(super) fn material(source: &DataSource, path: &str) -> Result<Material> {
    let inline = |bytes: Vec<u8>| Ok(Material { bytes, origin: "<inline>".to_owned() });
    match &source.specifier {
        Some(Specifier::InlineString(text)) => inline(text.clone().into_bytes()),
        Some(Specifier::InlineBytes(bytes)) => inline(bytes.clone()),
        Some(Specifier::Filename(name)) => match regular_file::read(Path::new(name), MAX_FILE) {
            Ok(bytes) => Ok(Material { bytes, origin: name.clone() }),
            Err(error) => Err(FieldError::new(join(path, "filename"), format!("cannot read {name}: {error}"))),
        },
        Some(Specifier::EnvironmentVariable(name)) => match std::env::var(name) {
            Ok(text) => inline(text.into_bytes()),
            Err(_) => {
                let text = format!("Environment variable doesn't exist: {name}");
                Err(FieldError::new(join(path, "environment_variable"), text))
            }
        },
        None => Err(required(path, "filename")),
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
