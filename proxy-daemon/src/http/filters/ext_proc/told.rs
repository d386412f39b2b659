//! What routes tell the filter.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::core::v3::HeaderValue as ProtoHeader,
        extensions::filters::http::ext_proc::v3::{ExtProcOverrides, ExtProcPerRoute, ext_proc_per_route::Override},
    },
    google::protobuf::Any,
};
use http::{HeaderName, HeaderValue};

use super::{config::Settings, mode::Mode};
use crate::http::filters::shared::{Kept, Shared};
use crate::{
    config::FieldError,
    http::{
        call::grpc::Service,
        filters::{PerRoute, PerRouteConfig},
        metadata::read_from,
    },
};

/// What one level tells.
#[derive(Debug, Default)]
pub(super) struct Told {
    disabled: bool,
    mode: Option<Mode>,
    service: Option<Shared<Service>>,
    metadata: Vec<(HeaderName, HeaderValue)>,
    forwarded: Option<Shared<Box<[Box<str>]>>>,
    received: Option<Shared<Box<[Box<str>]>>>,
    failure_mode_allow: Option<bool>,
}

/// What all levels and the filter's own configuration come to.
#[derive(Debug)]
pub(super) struct Merged {
    pub(super) mode: Option<Mode>,
    pub(super) service: Kept<Service>,
    /// Further headers of the stream.
    pub(super) metadata: Vec<(HeaderName, HeaderValue)>,
    /// Which metadata the processor is told.
    pub(super) forwarded: Kept<Box<[Box<str>]>>,
    /// Which it may write.
    pub(super) received: Kept<Box<[Box<str>]>>,
    pub(super) failure_mode_allow: bool,
}

impl Merged {
    /// `None`: the filter has no part in the stream.
    pub(super) fn new(settings: &Settings, route: PerRoute<'_>) -> Option<Merged> {
        let mut merged = Merged {
            mode: None,
            service: settings.service.keep(),
            metadata: Vec::new(),
            forwarded: settings.forwarded.keep(),
            received: settings.received.keep(),
            failure_mode_allow: settings.failure_mode_allow,
        };
        let mut disabled = false;
        for told in route.all::<Told>() {
            disabled = told.disabled;
            if disabled {
                // As in Envoy, what a level before it says of modes is forgotten.
                merged.mode = None;
                continue;
            }
            merged.mode = told.mode.or(merged.mode);
            let replace = |into: &mut Kept<Box<[Box<str>]>>, from: &Option<Shared<Box<[Box<str>]>>>| {
                if let Some(from) = from {
                    *into = from.keep();
                }
            };
            replace(&mut merged.forwarded, &told.forwarded);
            replace(&mut merged.received, &told.received);
            if let Some(service) = &told.service {
                merged.service = service.keep();
            }
            merged.failure_mode_allow = told.failure_mode_allow.unwrap_or(merged.failure_mode_allow);
            for (name, value) in &told.metadata {
                merged.metadata.retain(|(known, _)| known != name);
                merged.metadata.push((name.clone(), value.clone()));
            }
        }
        (!disabled).then_some(merged)
    }
}

pub(in crate::http::filters) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let ExtProcPerRoute { r#override } = unpack(config, path)?;
    Ok(Arc::new(match r#override {
        Some(Override::Disabled(true)) => Told { disabled: true, ..Told::default() },
        Some(Override::Disabled(false)) => {
            return Err(FieldError::new(format!("{path}.disabled"), "value must equal true"));
        }
        Some(Override::Overrides(overrides)) => told(&overrides, &format!("{path}.overrides"))?,
        None => return Err(FieldError::new(format!("{path}.override"), "value is required")),
    }))
}

fn told(overrides: &ExtProcOverrides, path: &str) -> Result<Told, FieldError> {
    let mode = overrides.processing_mode.as_ref();
    let mode = mode.map(|mode| Mode::parse(mode, &format!("{path}.processing_mode"))).transpose()?;
    let service = overrides.grpc_service.as_ref();
    let service = service.map(|service| Service::parse(service, None, &format!("{path}.grpc_service"))).transpose()?;
    let metadata = overrides.grpc_initial_metadata.iter().enumerate();
    let metadata = metadata.map(|(index, header)| {
        header_of(header).ok_or_else(|| {
            let path = format!("{path}.grpc_initial_metadata[{index}]");
            FieldError::new(path, format!("{:?} with {:?} is no header", header.key, header.value))
        })
    });
    let options = overrides.metadata_options.clone().unwrap_or_default();
    Ok(Told {
        disabled: false,
        mode,
        service: service.map(Shared::new),
        metadata: metadata.collect::<Result<_, _>>()?,
        forwarded: options
            .forwarding_namespaces
            .map(|names| names.untyped.iter().map(|name| read_from(name)).collect()),
        received: options.receiving_namespaces.map(|names| names.untyped.into_iter().map(Into::into).collect()),
        failure_mode_allow: overrides.failure_mode_allow.map(|allow| allow.value),
    })
}

fn header_of(header: &ProtoHeader) -> Option<(HeaderName, HeaderValue)> {
    let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
    Some((HeaderName::try_from(&header.key).ok()?, HeaderValue::from_bytes(value).ok()?))
}
