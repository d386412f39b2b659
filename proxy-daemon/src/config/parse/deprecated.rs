//! Deprecated fields and enum values: they work, with a warning that names them; those that Envoy refuses by default are
//! refused.

use std::sync::LazyLock;

use culvert_xds_client::json;
use prost_reflect::{DynamicMessage, ExtensionDescriptor, FieldDescriptor, Value};

use crate::config::FieldError;

/// What to write instead, for the deprecated fields that are honoured. The others are gone without one.
pub(super) const REPLACEMENTS: &[(&str, &str)] = &[
    ("envoy.config.bootstrap.v3.Admin.access_log_path", "access_log"),
    ("envoy.config.cluster.v3.Cluster.dns_refresh_rate", "cluster_type of envoy.extensions.clusters.dns.v3.DnsCluster"),
    ("envoy.config.cluster.v3.Cluster.http2_protocol_options", "typed_extension_protocol_options"),
    ("envoy.config.cluster.v3.Cluster.max_requests_per_connection", "typed_extension_protocol_options"),
    ("envoy.config.core.v3.HeaderValueOption.append", "append_action"),
    ("envoy.config.core.v3.SubstitutionFormatString.text_format", "text_format_source"),
    ("envoy.config.route.v3.HeaderMatcher.contains_match", "string_match"),
    ("envoy.config.route.v3.HeaderMatcher.exact_match", "string_match"),
    ("envoy.config.route.v3.HeaderMatcher.prefix_match", "string_match"),
    ("envoy.config.route.v3.HeaderMatcher.safe_regex_match", "string_match"),
    ("envoy.config.route.v3.HeaderMatcher.suffix_match", "string_match"),
    ("envoy.config.route.v3.WeightedCluster.total_weight", "the sum of the weights, which always counts"),
    ("envoy.extensions.access_loggers.file.v3.FileAccessLog.format", "log_format"),
    ("envoy.type.matcher.v3.RegexMatcher.google_re2", "nothing: it is the default"),
];

static DISALLOWED_FIELD: LazyLock<Option<ExtensionDescriptor>> =
    LazyLock::new(|| json::pool().get_extension_by_name("envoy.annotations.disallowed_by_default"));
static DISALLOWED_VALUE: LazyLock<Option<ExtensionDescriptor>> =
    LazyLock::new(|| json::pool().get_extension_by_name("envoy.annotations.disallowed_by_default_enum"));

/// Whether a field is deprecated.
pub(super) fn is_deprecated(field: &FieldDescriptor) -> bool {
    field.field_descriptor_proto().options.as_ref().is_some_and(|options| options.deprecated())
}

/// The deprecated fields of one message, while it is walked over.
#[derive(Debug, Default)]
pub(super) struct Deprecated {
    found: Vec<(String, String)>,
}

impl Deprecated {
    /// Looks at a field that is set.
    ///
    /// # Errors
    /// Envoy refuses the field, or its value, unless a runtime key allows it.
    pub(super) fn field(&mut self, field: &FieldDescriptor, value: &Value, path: &str) -> Result<(), FieldError> {
        if is_deprecated(field) {
            if is_set(&field.options(), DISALLOWED_FIELD.as_ref()) {
                return Err(FieldError::new(path, "is deprecated and disallowed, as in Envoy"));
            }
            let replacement = REPLACEMENTS.iter().find(|(name, _)| *name == field.full_name()).map(|(_, text)| *text);
            let text = replacement.map_or_else(String::new, |text| format!("; write {text} instead"));
            self.found.push((path.to_owned(), format!("the field is deprecated{text}")));
        }
        let Value::EnumNumber(number) = value else { return Ok(()) };
        let kind = field.kind();
        let Some(value) = kind.as_enum().and_then(|desc| desc.get_value(*number)) else { return Ok(()) };
        let deprecated =
            value.enum_value_descriptor_proto().options.as_ref().is_some_and(|options| options.deprecated());
        if field.name() == "transport_api_version" && value.name() == "V2" {
            return Err(FieldError::new(path, "version 2 of xDS has been removed, as in Envoy"));
        }
        if deprecated && is_set(&value.options(), DISALLOWED_VALUE.as_ref()) {
            let text = format!("the value {} is deprecated and disallowed, as in Envoy", value.name());
            return Err(FieldError::new(path, text));
        }
        if deprecated {
            self.found.push((path.to_owned(), format!("the value {} is deprecated", value.name())));
        }
        Ok(())
    }

    /// One line in the log for each.
    pub(super) fn warn(&self) {
        for (path, text) in &self.found {
            tracing::warn!("{path}: {text}");
        }
    }
}

fn is_set(options: &DynamicMessage, extension: Option<&ExtensionDescriptor>) -> bool {
    extension.is_some_and(|extension| {
        options.has_extension(extension) && options.get_extension(extension).as_bool() == Some(true)
    })
}
