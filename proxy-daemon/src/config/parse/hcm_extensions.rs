//! Extensions of the connection manager: how clients' addresses are found, request ids, early changes of headers.

use culvert_xds_client::json::unpack;
use envoy_types::pb::envoy::{
    config::core::v3::{TypedExtensionConfig, scheme_header_transformation::Transformation},
    extensions::{
        filters::network::http_connection_manager::v3::{
            HttpConnectionManager,
            http_connection_manager::{ProxyStatusConfig, proxy_status_config::ProxyName as ProtoName},
        },
        http::{
            early_header_mutation::header_mutation::v3::HeaderMutation,
            original_ip_detection::{custom_header::v3::CustomHeaderConfig, xff::v3::XffConfig},
        },
        request_id::uuid::v3::UuidRequestIdConfig,
    },
};
use envoy_types::pb::google::protobuf::Any;
use http::StatusCode;

use super::{
    common::{Result, cidrs, header_name, required},
    support::join,
};
use crate::{
    config::{
        FieldError,
        model::{IpDetection, ProxyName, ProxyStatus, Scheme, TrustedXff},
    },
    http::filters::EarlyMutations,
};

/// `original_ip_detection_extensions`. The texts of errors are Envoy's.
pub(super) fn ip_detection(manager: &HttpConnectionManager, path: &str) -> Result<Box<[IpDetection]>> {
    let (extensions, path) =
        (&manager.original_ip_detection_extensions, join(path, "original_ip_detection_extensions"));
    let mixed =
        |field| FieldError::new(&path, format!("Original IP detection extensions and {field} may not be mixed"));
    if extensions.is_empty() {
        return Ok(Box::default());
    }
    if manager.use_remote_address.is_some_and(|value| value.value) {
        return Err(mixed("use_remote_address"));
    }
    if manager.xff_num_trusted_hops > 0 {
        return Err(mixed("xff_num_trusted_hops"));
    }
    each(extensions, &path, |config, path| match type_of(config) {
        "XffConfig" => xff(&unpack(config, path)?, path),
        _ => custom_header(&unpack(config, path)?, path),
    })
}

fn xff(config: &XffConfig, path: &str) -> Result<IpDetection> {
    let trusted = match &config.xff_trusted_cidrs {
        Some(_) if config.xff_num_trusted_hops > 0 => {
            return Err(FieldError::new(path, "Cannot set both xff_num_trusted_hops and xff_trusted_cidrs"));
        }
        Some(ranges) => TrustedXff::Ranges(cidrs(&ranges.cidrs, path, "xff_trusted_cidrs.cidrs")?),
        None => TrustedXff::Hops(config.xff_num_trusted_hops),
    };
    Ok(IpDetection::Xff { trusted, append: config.skip_xff_append.is_some_and(|skip| !skip.value) })
}

fn custom_header(config: &CustomHeaderConfig, path: &str) -> Result<IpDetection> {
    let reject = config.reject_with_status.as_ref().map(|status| {
        // What is no refusal is 403, as in Envoy.
        let code = u16::try_from(status.code).ok().filter(|code| *code >= 400);
        code.and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(StatusCode::FORBIDDEN)
    });
    Ok(IpDetection::Header {
        name: header_name(&config.header_name, &join(path, "header_name"))?,
        trusted: config.allow_extension_to_set_address_as_trusted,
        reject,
    })
}

/// Whether a kept request id is marked as not traced. The rest of the extension is about tracing.
pub(super) fn packs_trace_reason(manager: &HttpConnectionManager, path: &str) -> Result<bool> {
    let Some(extension) = &manager.request_id_extension else { return Ok(true) };
    let path = join(path, "request_id_extension");
    let Some(config) = &extension.typed_config else { return Err(required(&path, "typed_config")) };
    let uuid: UuidRequestIdConfig = unpack(config, &join(&path, "typed_config"))?;
    Ok(uuid.pack_trace_reason.is_none_or(|pack| pack.value))
}

/// `early_header_mutation_extensions`
pub(super) fn early_mutations(manager: &HttpConnectionManager, path: &str) -> Result<Box<[EarlyMutations]>> {
    each(&manager.early_header_mutation_extensions, &join(path, "early_header_mutation_extensions"), |config, path| {
        let HeaderMutation { mutations } = unpack(config, path)?;
        EarlyMutations::parse(&mutations, &format!("{path}.mutations"))
    })
}

/// `scheme_header_transformation`
pub(super) fn scheme(manager: &HttpConnectionManager) -> Option<Scheme> {
    let Transformation::SchemeToOverwrite(scheme) =
        manager.scheme_header_transformation.as_ref()?.transformation.as_ref()?;
    // Nothing else passes the rules of the message.
    Some(if scheme == "https" { Scheme::Https } else { Scheme::Http })
}

/// `proxy_status_config`
pub(super) fn proxy_status(told: &ProxyStatusConfig) -> ProxyStatus {
    ProxyStatus {
        name: match &told.proxy_name {
            Some(ProtoName::UseNodeId(_)) => ProxyName::Node,
            Some(ProtoName::LiteralProxyName(name)) => ProxyName::Literal(name.clone()),
            None => ProxyName::Server,
        },
        details: !told.remove_details,
        flags: !told.remove_response_flags,
        recommended_status: told.set_recommended_response_code,
    }
}

fn type_of(config: &Any) -> &str {
    config.type_url.rsplit('.').next().unwrap_or_default()
}

fn each<T>(
    extensions: &[TypedExtensionConfig],
    path: &str,
    parse: impl Fn(&Any, &str) -> Result<T>,
) -> Result<Box<[T]>> {
    let parse = |(index, extension): (usize, &TypedExtensionConfig)| {
        let path = format!("{path}[{index}]");
        let Some(config) = &extension.typed_config else { return Err(required(&path, "typed_config")) };
        parse(config, &join(&path, "typed_config"))
    };
    extensions.iter().enumerate().map(parse).collect()
}
