use std::sync::Arc;

use culvert_xds_client::ads::xdstp;
use envoy_types::pb::envoy::{
    config::route::v3::{
        ScopedRouteConfiguration,
        scoped_route_configuration::key::{Fragment, fragment::Type},
    },
    extensions::filters::network::http_connection_manager::v3::{
        ScopedRoutes as ProtoScoped,
        scoped_routes::{
            ConfigSpecifier, ScopeKeyBuilder,
            scope_key_builder::{
                FragmentBuilder as ProtoBuilder,
                fragment_builder::{Type as BuilderType, header_value_extractor::ExtractType},
            },
        },
    },
};

use super::{
    common::{Result, required},
    config_source::config_source,
    matcher::matched_header,
    route::{routes, without_vhds},
    support::{self, join},
};
use crate::config::{
    FieldError,
    model::{FragmentBuilder, FragmentPick, Scope, ScopeRoutes, ScopeSource, ScopedRoutes},
};

/// A checked scope, of SRDS.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn scoped_route(scope: &ScopedRouteConfiguration, path: &str) -> Result<Scope> {
    support::check(scope, path)?;
    let named = &*scope.route_configuration_name;
    match (&scope.route_configuration, named) {
        (Some(_), "") => inline_scope(scope, path),
        (Some(_), _) => {
            let text = "Only one of route_configuration_name or route_configuration can be set.";
            Err(FieldError::new(join(path, "route_configuration"), text))
        }
        (None, "") => {
            let text = "At least one of route_configuration_name or route_configuration must be set.";
            Err(FieldError::new(join(path, "route_configuration_name"), text))
        }
        (None, named) => Ok(Scope {
            name: scope.name.as_str().into(),
            key: key(scope, path)?,
            routes: ScopeRoutes::Named { name: xdstp::normalise(named).into(), on_demand: scope.on_demand },
        }),
    }
}

fn inline_scope(scope: &ScopedRouteConfiguration, path: &str) -> Result<Scope> {
    let field = "route_configuration";
    let config = scope.route_configuration.as_ref().ok_or_else(|| required(path, field))?;
    let field = join(path, field);
    let routes = ScopeRoutes::Inline(Arc::new(without_vhds(routes(config, &field)?, &field)?));
    Ok(Scope { name: scope.name.as_str().into(), key: key(scope, path)?, routes })
}

fn key(scope: &ScopedRouteConfiguration, path: &str) -> Result<Box<[Box<str>]>> {
    let path = join(path, "key");
    let key = scope.key.as_ref().ok_or_else(|| FieldError::new(&path, "value is required"))?;
    let fragment = |(index, fragment): (usize, &Fragment)| match &fragment.r#type {
        Some(Type::StringKey(text)) => Ok(text.as_str().into()),
        None => Err(required(&format!("{path}.fragments[{index}]"), "string_key")),
    };
    key.fragments.iter().enumerate().map(fragment).collect()
}

/// `HttpConnectionManager.scoped_routes`
pub(super) fn scoped_routes(scoped: &ProtoScoped, path: &str) -> Result<ScopedRoutes> {
    let builder = scoped.scope_key_builder.as_ref().ok_or_else(|| required(path, "scope_key_builder"))?;
    let scopes = match &scoped.config_specifier {
        Some(ConfigSpecifier::ScopedRds(srds)) => {
            let from = &join(path, "scoped_rds.scoped_rds_config_source");
            ScopeSource::Srds {
                scopes: config_source(srds.scoped_rds_config_source.as_ref(), from)?,
                routes: config_source(scoped.rds_config_source.as_ref(), &join(path, "rds_config_source"))?,
            }
        }
        Some(ConfigSpecifier::ScopedRouteConfigurationsList(list)) => {
            let path = join(path, "scoped_route_configurations_list.scoped_route_configurations");
            let scope = |(index, scope): (usize, &ScopedRouteConfiguration)| {
                let path = format!("{path}[{index}]");
                if !scope.route_configuration_name.is_empty() {
                    let text = "Fetching routes via RDS (route_configuration_name) is not supported with inline scoped \
                                routes.";
                    return Err(FieldError::new(join(&path, "route_configuration_name"), text));
                }
                if scope.route_configuration.is_none() {
                    let text = "You must specify a route_configuration with inline scoped routes.";
                    return Err(FieldError::new(join(&path, "route_configuration"), text));
                }
                inline_scope(scope, &path).map(Arc::new)
            };
            let scopes = list.scoped_route_configurations.iter().enumerate().map(scope);
            ScopeSource::Inline(scopes.collect::<Result<_>>()?)
        }
        None => return Err(required(path, "scoped_rds")),
    };
    Ok(ScopedRoutes {
        name: scoped.name.as_str().into(),
        key_builder: key_builder(builder, &join(path, "scope_key_builder"))?,
        scopes,
    })
}

fn key_builder(builder: &ScopeKeyBuilder, path: &str) -> Result<Vec<FragmentBuilder>> {
    let parse = |(index, fragment): (usize, &ProtoBuilder)| {
        let path = format!("{path}.fragments[{index}]");
        let path = join(&path, "header_value_extractor");
        let Some(BuilderType::HeaderValueExtractor(extractor)) = &fragment.r#type else {
            return Err(FieldError::new(path, "value is required"));
        };
        let pick = match &extractor.extract_type {
            Some(ExtractType::Index(index)) => {
                if *index > 0 && extractor.element_separator.is_empty() {
                    let text = "Index > 0 for empty string element separator.";
                    return Err(FieldError::new(join(&path, "index"), text));
                }
                // What does not fit is larger than any number of elements.
                FragmentPick::Index(usize::try_from(*index).unwrap_or(usize::MAX))
            }
            Some(ExtractType::Element(element)) => {
                FragmentPick::Element { separator: element.separator.as_str().into(), key: element.key.as_str().into() }
            }
            None => return Err(FieldError::new(path, "HeaderValueExtractor extract_type not set.")),
        };
        Ok(FragmentBuilder {
            header: matched_header(&extractor.name, &join(&path, "name"))?,
            element_separator: extractor.element_separator.as_str().into(),
            pick,
        })
    };
    builder.fragments.iter().enumerate().map(parse).collect()
}
