//! `forward_client_cert_details`, `set_current_client_cert_details`, and the matcher that finds others.

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::filters::network::http_connection_manager::v3::{
        HttpConnectionManager,
        http_connection_manager::{
            ForwardClientCertConfig, ForwardClientCertDetails as ProtoForward, ForwardClientCertFormat,
        },
    },
    google::protobuf::Any,
};
use prost::Name as _;

use super::{
    common::{Result, type_name},
    match_tree::{MatchParts, match_tree},
    matcher::unknown_action,
    support::join,
};
use crate::{
    config::{
        FieldError,
        model::{ClientCertDetails, ForwardClientCert, ForwardedCert, MatchTree},
    },
    http::match_input::{RequestInput, any_request_input},
};

/// What the manager says itself.
pub(super) fn of_manager(manager: &HttpConnectionManager) -> ForwardClientCertConfig {
    ForwardClientCertConfig {
        forward_client_cert_details: manager.forward_client_cert_details,
        set_current_client_cert_details: manager.set_current_client_cert_details,
    }
}

pub(super) fn forwarded_cert(config: &ForwardClientCertConfig, path: &str) -> Result<ForwardedCert> {
    let mode = match ProtoForward::try_from(config.forward_client_cert_details) {
        Ok(ProtoForward::Sanitize) => ForwardClientCert::Sanitize,
        Ok(ProtoForward::ForwardOnly) => ForwardClientCert::ForwardOnly,
        Ok(ProtoForward::AppendForward) => ForwardClientCert::AppendForward,
        Ok(ProtoForward::SanitizeSet) => ForwardClientCert::SanitizeSet,
        Ok(ProtoForward::AlwaysForwardOnly) => ForwardClientCert::AlwaysForwardOnly,
        Err(_) => return Err(FieldError::unsupported(join(path, "forward_client_cert_details"))),
    };
    let details = config.set_current_client_cert_details.unwrap_or_default();
    let details = ClientCertDetails {
        subject: details.subject.is_some_and(|subject| subject.value),
        cert: details.cert,
        chain: details.chain,
        dns: details.dns,
        uri: details.uri,
        issuer: details.issuer,
        json: details.format == ForwardClientCertFormat::Json as i32,
    };
    Ok(ForwardedCert { mode, details })
}

/// `forward_client_cert_matcher`
pub(super) fn matcher(
    manager: &HttpConnectionManager,
    path: &str,
) -> Result<Option<MatchTree<RequestInput, ForwardedCert>>> {
    let path = join(path, "forward_client_cert_matcher");
    manager.forward_client_cert_matcher.as_ref().map(|matcher| match_tree(matcher, &path, &mut Parts)).transpose()
}

struct Parts;

impl MatchParts for Parts {
    type Input = RequestInput;
    type Action = ForwardedCert;

    fn input(&mut self, config: &Any, path: &str) -> Result<Option<RequestInput>> {
        any_request_input(config, path)
    }

    fn action(&mut self, config: &Any, path: &str) -> Result<ForwardedCert> {
        if type_name(config) != ForwardClientCertConfig::full_name() {
            return Err(unknown_action(config, path));
        }
        forwarded_cert(&unpack(config, path)?, path)
    }
}
