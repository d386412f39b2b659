//! Which fields of Envoy's API are honoured: the table that [`support::check`](super::support::check) refuses by. docs/support.md
//! holds it, and a test holds it to that.

mod clusters;
mod http;
mod listeners;
mod routes;
mod sources;

use std::{collections::HashMap, sync::LazyLock};

/// The honoured fields of a message.
pub type Fields = &'static [&'static str];

/// All fields of the message are honoured.
pub(super) const ALL: Fields = &["*"];

/// Messages and their honoured fields. A message that is not in here is refused wherever it is set.
///
/// Some listed fields have no effect of their own, here as in Envoy: names, metadata, `traffic_direction`.
const HONOURED: [&[(&str, Fields)]; 5] =
    [sources::FIELDS, listeners::FIELDS, http::FIELDS, routes::FIELDS, clusters::FIELDS];

/// Messages, by their full names, and their honoured fields.
pub fn all() -> impl Iterator<Item = (&'static str, Fields)> {
    HONOURED.into_iter().flatten().copied()
}

/// The honoured fields of a message, by its full name; `None` where it is not honoured at all.
pub(super) fn honoured(message: &str) -> Option<Fields> {
    // Every message of every resource is looked up.
    static BY_NAME: LazyLock<HashMap<&str, Fields>> = LazyLock::new(|| all().collect());
    BY_NAME.get(message).copied()
}

/// [`all`] as a Markdown table: the message, and its fields.
pub fn table() -> String {
    let mut table = "| Message | Fields |\n|---|---|\n".to_owned();
    for (message, fields) in all() {
        let fields = match fields {
            ALL => "all".to_owned(),
            [] => "none: it may stand there empty".to_owned(),
            fields => fields.iter().map(|field| format!("`{field}`")).collect::<Vec<_>>().join(", "),
        };
        table.push_str(&format!("| `{message}` | {fields} |\n"));
    }
    table
}
