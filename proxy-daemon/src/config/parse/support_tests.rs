use std::{collections::BTreeSet, path::Path};

use super::{
    super::honoured::{all, table},
    *,
};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/support.md");
const BEGIN: &str = "<!-- table: begin -->\n";
const END: &str = "<!-- table: end -->\n";

#[test]
fn every_listed_message_and_field_exists() {
    for (name, fields) in all() {
        let message = json::pool().get_message_by_name(name).unwrap_or_else(|| panic!("no message {name}"));
        for field in fields.iter().filter(|field| **field != "*") {
            assert!(message.get_field_by_name(field).is_some(), "{name} has no field {field}");
        }
    }
}

/// A newer API may give such a message a field that nobody has read: it is to be honoured, and then added to the file, or the
/// others are to be listed instead of [`ALL`].
#[test]
fn all_fields_of_a_message_are_those_that_were_read() {
    let mut found = BTreeSet::new();
    for (name, _) in all().filter(|(_, fields)| *fields == ALL) {
        let message = json::pool().get_message_by_name(name).unwrap();
        let fields: BTreeSet<_> = message.fields().map(|field| field.name().to_owned()).collect();
        found.insert(format!("{name}: {}", Vec::from_iter(fields).join(", ")));
    }
    let known: BTreeSet<_> = include_str!("honoured/all_fields.txt").lines().map(str::to_owned).collect();
    let (new, old) = (found.difference(&known), known.difference(&found));
    assert_eq!(found, known, "new: {:#?}\nold: {:#?}", new.collect::<Vec<_>>(), old.collect::<Vec<_>>());
}

#[test]
fn what_files_are_not_watched_by_is_refused() {
    use envoy_types::pb::envoy::config::core::v3::ConfigSource;

    for (field, value, refused) in [
        ("poll_interval", "1s", "poll_interval"),
        ("watched_directory", "{ path: /a, watch_modify: true }", "watched_directory.watch_modify"),
    ] {
        let source = format!("path_config_source: {{ path: /a, {field}: {value} }}");
        let source: ConfigSource = json::from_yaml(&source).unwrap();
        let error = check(&source, "").unwrap_err().to_string();
        assert_eq!(error, format!("path_config_source.{refused}: not supported by culvert yet"));
    }
}

/// Whoever lists a field and forgets to read it accepts and ignores it: each name has to occur in the code, also as the name of a
/// variant, or in the document's paragraph of what has no effect. (That it occurs does not show that it is obeyed.)
#[test]
fn every_honoured_field_is_read_or_said_to_have_no_effect() {
    let mut words = BTreeSet::new();
    for folder in ["src", "../xds-client/src"] {
        words_of_code(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &mut words);
    }
    let document = std::fs::read_to_string(DOCUMENT).unwrap();
    let (_, rest) = document.split_once("\nNo effect, here as in Envoy: ").unwrap();
    let (paragraph, _) = rest.split_once("\n## ").unwrap();
    words.extend(words_of(paragraph));
    let mut unread = Vec::new();
    for (name, fields) in all() {
        let message = json::pool().get_message_by_name(name).unwrap();
        let listed = |field: &str| fields == ALL || fields.contains(&field);
        for field in message.fields().filter(|field| listed(field.name())) {
            let variant: String = field.name().split('_').map(capitalised).collect();
            if !words.contains(field.name()) && !words.contains(&variant) {
                unread.push(format!("{name}.{}", field.name()));
            }
        }
    }
    assert!(unread.is_empty(), "nobody reads {unread:#?}");
}

fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_ascii_uppercase()).into_iter().chain(letters).collect()
}

fn words_of(text: &str) -> impl Iterator<Item = String> {
    text.split(|letter: char| !letter.is_alphanumeric() && letter != '_').map(str::to_owned)
}

/// The words of all code below `folder` but tests and comments, and but lists of names.
fn words_of_code(folder: &Path, words: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && !["honoured", "tests"].contains(&name) {
            words_of_code(&path, words);
        } else if name.ends_with(".rs")
            && !name.ends_with("tests.rs")
            && !["deprecated.rs", "support_doc.rs"].contains(&name)
        {
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
            lines.for_each(|line| words.extend(words_of(line)));
        }
    }
}

#[test]
fn no_message_is_listed_twice() {
    let names: BTreeSet<_> = all().map(|(name, _)| name).collect();
    assert_eq!(names.len(), all().count());
}

#[test]
fn the_document_holds_the_table() {
    let text = std::fs::read_to_string(DOCUMENT).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (found, after) = rest.split_once(END).unwrap();
    let expected = format!("{}\n{}\n{}", extensions(), table(), super::super::support_doc::text());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(DOCUMENT, format!("{before}{BEGIN}{expected}{END}{after}")).unwrap();
        return;
    }
    assert!(found == expected, "docs/support.md is out of date: run this test with UPDATE_DOCS=1");
}

/// The filters that there are, with the types of their configuration.
fn extensions() -> String {
    let mut text = "| Extension | Type |\n|---|---|\n".to_owned();
    let kinds = [
        ("listener filter", "envoy.extensions.filters.listener."),
        ("network filter", "envoy.extensions.filters.network."),
    ];
    for (kind, prefix) in kinds {
        let types = all().map(|(name, _)| name).filter(|name| name.starts_with(prefix));
        // What stands in such a message is no filter.
        for name in types.filter(|name| name.rsplit('.').nth(1).is_some_and(|part| part == "v3")) {
            let descriptor = json::pool().get_message_by_name(name).unwrap();
            if is_extension(descriptor.full_name()) {
                text.push_str(&format!("| {kind} | `{name}` |\n"));
            }
        }
    }
    for filter in filters::REGISTRY {
        text.push_str(&format!("| HTTP filter `{}` | `{}` |\n", filter.name, filter.type_name));
    }
    text
}

/// Whether Envoy has an extension that is configured by this message.
fn is_extension(name: &str) -> bool {
    include_str!("envoy_type_urls.txt").lines().any(|line| line.ends_with(name))
}

#[test]
fn a_typed_struct_is_refused_by_the_name_of_its_inner_type() {
    use culvert_xds_client::json::UnknownFields;
    use envoy_types::pb::envoy::config::listener::v3::Listener;

    let redis = "envoy.extensions.filters.network.redis_proxy.v3.RedisProxy";
    for (inner, value, expected) in [
        (redis, "{ stat_prefix: a }", format!("type {redis} is not supported by culvert yet")),
        ("com.example.Unknown", "{ a: 1 }", "unknown type \"com.example.Unknown\"".to_owned()),
    ] {
        let config = format!(
            "{{ '@type': type.googleapis.com/xds.type.v3.TypedStruct, type_url: type.googleapis.com/{inner}, value: {value} }}"
        );
        let filter = format!("{{ name: a, typed_config: {config} }}");
        let listener: Listener = json::from_yaml(&format!("filter_chains: [{{ filters: [{filter}] }}]")).unwrap();
        let listener = json::resolve_typed_structs(&listener, UnknownFields::Reject).unwrap();
        let refused = check(&*listener, "").unwrap_err().to_string();
        assert_eq!(refused, format!("filter_chains[0].filters[0].typed_config: {expected}"));
    }
}
