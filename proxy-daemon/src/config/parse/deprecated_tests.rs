use std::collections::BTreeSet;

use super::{super::honoured::all, *};

/// The deprecated fields that are honoured and the deprecated values of honoured fields: all that a warning can be of.
fn honoured_and_deprecated() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (message, taken) in all() {
        let message = json::pool().get_message_by_name(message).unwrap();
        for field in message.fields().filter(|field| taken == ALL || taken.contains(&field.name())) {
            if is_deprecated(&field) && !is_disallowed(&field.options()) {
                found.insert(field.full_name().to_owned());
            }
            let kind = field.kind();
            let values = kind.as_enum().into_iter().flat_map(|desc| desc.values());
            let values = values.filter(|value| is_deprecated_value(value) && !is_disallowed(&value.options()));
            found.extend(values.map(|value| full_name(&value)));
        }
    }
    found
}

#[test]
fn every_honoured_deprecated_field_and_value_names_its_replacement() {
    let named: BTreeSet<_> = REPLACEMENTS.iter().map(|it| it.of.to_owned()).collect();
    assert_eq!(honoured_and_deprecated(), named);
    assert_eq!(REPLACEMENTS.len(), named.len(), "one is there twice");
}

#[test]
fn replacements_are_in_the_api_and_not_deprecated() {
    for Replacement { by, .. } in REPLACEMENTS.iter().filter(|it| !it.by.is_empty()) {
        if json::pool().get_message_by_name(by).is_some() {
            continue;
        }
        let (message, field) = by.rsplit_once('.').unwrap();
        let message = json::pool().get_message_by_name(message).unwrap_or_else(|| panic!("no message {message}"));
        let field = message.get_field_by_name(field).unwrap_or_else(|| panic!("no field {by}"));
        assert!(!is_deprecated(&field), "{by}");
    }
}

#[test]
fn a_replacement_that_is_refused_is_not_advised() {
    let advice = |of: &str| instead(of);
    assert_eq!(advice("envoy.config.core.v3.ConfigSource.path"), "; write path_config_source instead");
    for Replacement { of, by, .. } in REPLACEMENTS {
        let refused = !by.is_empty() && !is_honoured(by);
        assert_eq!(advice(of).ends_with("is not supported by culvert yet"), refused, "{of}");
        assert_eq!(advice(of).starts_with("; write "), !refused, "{of}");
    }
}

#[test]
fn every_use_is_counted() {
    use envoy_types::pb::envoy::config::core::v3::ConfigSource;

    let uses = stats::counter("runtime.deprecated_feature_use");
    let before = uses.value();
    let source: ConfigSource = json::from_yaml("{ path: /a }").unwrap();
    super::super::support::check(&source, "").unwrap();
    // Other tests count as well.
    assert!(uses.value() > before);
}
