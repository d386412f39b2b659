//! What requests make of the TLS handshakes with their hosts.

use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;

use super::{common::Result, matcher::matched_header, support::join};
use crate::config::model::{Discovery, PeerNameOptions};

/// `upstream_http_protocol_options` of the `http` options at `path`.
pub(super) fn options(
    discovery: &Discovery,
    http: Option<&HttpProtocolOptions>,
    path: &str,
) -> Result<Option<PeerNameOptions>> {
    let Some(http) = http else {
        // As by Envoy, forward proxies do so where nothing is said.
        let forwards = matches!(discovery, Discovery::DynamicForwardProxy { .. });
        return Ok(forwards.then_some(PeerNameOptions { sent: true, checked: true, header: None }));
    };
    let Some(options) = &http.upstream_http_protocol_options else { return Ok(None) };
    let header = match options.override_auto_sni_header.as_str() {
        "" => None,
        name => {
            let path = join(path, "upstream_http_protocol_options.override_auto_sni_header");
            Some(matched_header(name, &path)?)
        }
    };
    let (sent, checked) = (options.auto_sni, options.auto_san_validation);
    Ok((sent || checked).then_some(PeerNameOptions { sent, checked, header }))
}
