use std::collections::BTreeSet;

use super::*;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/support.md");
const BEGIN: &str = "<!-- table: begin -->\n";
const END: &str = "<!-- table: end -->\n";

#[test]
fn every_listed_message_and_field_exists() {
    for (name, fields) in HONOURED {
        let message = json::pool().get_message_by_name(name).unwrap_or_else(|| panic!("no message {name}"));
        for field in fields.iter().filter(|field| **field != "*") {
            assert!(message.get_field_by_name(field).is_some(), "{name} has no field {field}");
        }
    }
}

#[test]
fn no_message_is_listed_twice() {
    let names: BTreeSet<_> = HONOURED.iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), HONOURED.len());
}

#[test]
fn the_document_holds_the_table() {
    let text = std::fs::read_to_string(DOCUMENT).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (found, after) = rest.split_once(END).unwrap();
    let expected = format!("{}\n{}", table(), super::super::support_doc::text());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(DOCUMENT, format!("{before}{BEGIN}{expected}{END}{after}")).unwrap();
        return;
    }
    assert!(found == expected, "docs/support.md is out of date: run this test with UPDATE_DOCS=1");
}
