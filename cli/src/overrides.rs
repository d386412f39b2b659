//! `culvert override`: makes and reads the headers that carry overrides.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use culvert_xds_client::overrides::{
    BAGGAGE_ITEM, Overrides, SpanContext, decode_ot_span_context, encode_ot_span_context, format_baggage, parse_baggage,
};
use serde_json::{Value, json};

const OT_SPAN_CONTEXT: &str = "x-ot-span-context";
const OT_BAGGAGE_OVERRIDES: &str = "ot-baggage-overrides";
const BAGGAGE: &str = "baggage";

const HEADER_HELP: &str = "\
Examples:
  culvert override header --set users=feature-x
  culvert override header --set users=feature-x --set orders.shop=r2 --format baggage
  curl $(culvert override header --set users=feature-x --output curl) http://front/

The request's hop to the service `users` then goes to the offloaded pod whose label culvert.dev/revision is feature-x,
at every place the header reaches: services must pass it on, as they do with their other trace headers. A service or
revision that discovery does not list is ignored. `culvert status` shows what can be named; docs/overrides.md has the
format.";

/// The subcommands of `culvert override`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the header that names revisions of services
    #[command(after_help = HEADER_HELP)]
    Header(HeaderFlags),
    /// Say what a header means
    Decode(DecodeFlags),
}

/// Flags of `culvert override header`.
#[derive(Debug, Args)]
pub struct HeaderFlags {
    /// A service (name, or name.namespace) and the revision it is to be. May be repeated.
    #[arg(long = "set", value_name = "SERVICE=REVISION", required = true, value_parser = parse_set)]
    set: Vec<(String, String)>,

    /// Which header to make; both by default, as a service may pass on only one of them
    #[arg(long, alias = "header")]
    format: Option<Format>,

    /// How to print it
    #[arg(long, default_value = "text")]
    output: Output,

    /// The trace id of x-ot-span-context, in hexadecimal; random by default
    #[arg(long, value_name = "HEX", value_parser = parse_hex)]
    trace_id: Option<u64>,

    /// The span id of x-ot-span-context, in hexadecimal; random by default
    #[arg(long, value_name = "HEX", value_parser = parse_hex)]
    span_id: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// The span context of Envoy's original tracers
    #[value(name = OT_SPAN_CONTEXT)]
    OtSpanContext,
    /// The W3C baggage header
    Baggage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A line `name: value` a header
    #[value(alias = "plain")]
    Text,
    /// Arguments for curl, which need no quotes
    Curl,
    /// A JSON object of names and values
    Json,
}

/// Flags of `culvert override decode`.
#[derive(Debug, Args)]
pub struct DecodeFlags {
    /// The header as `name: value`, or only its value
    #[arg(value_name = "HEADER", allow_hyphen_values = true)]
    header: String,

    /// How to print what it says
    #[arg(long, default_value = "text")]
    output: DecodeOutput,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DecodeOutput {
    /// For people
    #[value(alias = "plain")]
    Text,
    /// For programs
    Json,
}

/// Runs a subcommand; gives what is to be printed.
///
/// # Errors
/// With what is wrong with the flags or the header.
pub fn run(command: Command) -> anyhow::Result<String> {
    match command {
        Command::Header(flags) => header(&flags),
        Command::Decode(flags) => decode(&flags),
    }
}

fn header(flags: &HeaderFlags) -> anyhow::Result<String> {
    let overrides = Overrides::new(flags.set.iter().cloned())
        .context("--set (overrides are numbered from 0, in the order of the flags)")?;
    let item = overrides.to_baggage_item();
    let mut headers = Vec::new();
    if flags.format != Some(Format::Baggage) {
        let context = SpanContext {
            trace_id: flags.trace_id.unwrap_or_else(|| fastrand::u64(1..)),
            span_id: flags.span_id.unwrap_or_else(|| fastrand::u64(1..)),
            sampled: false,
            baggage: BTreeMap::from([(BAGGAGE_ITEM.to_owned(), item.clone())]),
        };
        headers.push((OT_SPAN_CONTEXT, encode_ot_span_context(&context)));
    }
    if flags.format != Some(Format::OtSpanContext) {
        headers.push((BAGGAGE, format_baggage([(BAGGAGE_ITEM, &*item)])));
    }
    Ok(match flags.output {
        Output::Text => headers.iter().map(|(name, value)| format!("{name}: {value}\n")).collect(),
        // Neither space nor quote nor pattern is in it, so that it survives `$(...)` as well as being pasted.
        Output::Curl => {
            let arguments: Vec<_> = headers.iter().map(|(name, value)| format!("-H {name}:{value}")).collect();
            arguments.join(" ") + "\n"
        }
        Output::Json => {
            let object: serde_json::Map<_, _> =
                headers.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
            format!("{:#}\n", Value::Object(object))
        }
    })
}

/// What a header says.
struct Decoded {
    header: &'static str,
    /// The ids of the trace and the span, and whether the trace is recorded.
    span: Option<(u64, u64, bool)>,
    overrides: Option<Overrides>,
    other_baggage: Vec<(String, String)>,
}

fn decode(flags: &DecodeFlags) -> anyhow::Result<String> {
    let decoded = decode_header(flags.header.trim())?;
    Ok(match flags.output {
        DecodeOutput::Text => in_words(&decoded),
        DecodeOutput::Json => format!("{:#}\n", as_json(&decoded)),
    })
}

fn decode_header(text: &str) -> anyhow::Result<Decoded> {
    if let Some((name, value)) = text.split_once(':') {
        let value = value.trim();
        return match name.trim().to_ascii_lowercase().as_str() {
            OT_SPAN_CONTEXT => span_context(value),
            OT_BAGGAGE_OVERRIDES => bare_item(value),
            BAGGAGE => w3c(value),
            other => bail!(
                "`{other}` carries no overrides; the headers that do are {OT_SPAN_CONTEXT}, {OT_BAGGAGE_OVERRIDES} and {BAGGAGE}"
            ),
        };
    }
    // Without a name: a span context and a bare item are base64, where `=` can only be at the end.
    match span_context(text) {
        Ok(decoded) => Ok(decoded),
        Err(_) if text.trim_end_matches('=').contains('=') => w3c(text),
        Err(error) => {
            bare_item(text).map_err(|_| error.context("neither a span context nor an Overrides message nor baggage"))
        }
    }
}

fn span_context(value: &str) -> anyhow::Result<Decoded> {
    let SpanContext { trace_id, span_id, sampled, mut baggage } = decode_ot_span_context(value.as_bytes())?;
    let overrides = baggage.remove(BAGGAGE_ITEM).map(|item| Overrides::from_baggage_item(&item)).transpose()?;
    let span = Some((trace_id, span_id, sampled));
    Ok(Decoded { header: OT_SPAN_CONTEXT, span, overrides, other_baggage: baggage.into_iter().collect() })
}

fn bare_item(value: &str) -> anyhow::Result<Decoded> {
    let overrides = Some(Overrides::from_baggage_item(value)?);
    Ok(Decoded { header: OT_BAGGAGE_OVERRIDES, span: None, overrides, other_baggage: Vec::new() })
}

fn w3c(value: &str) -> anyhow::Result<Decoded> {
    let baggage = parse_baggage(value.as_bytes())?;
    let (items, other_baggage): (Vec<_>, Vec<_>) =
        baggage.members.into_iter().partition(|(key, _)| key == BAGGAGE_ITEM);
    // The first one counts, as in the proxy.
    let overrides = items.first().map(|(_, item)| Overrides::from_baggage_item(item)).transpose()?;
    Ok(Decoded { header: BAGGAGE, span: None, overrides, other_baggage })
}

fn in_words(decoded: &Decoded) -> String {
    let mut text = format!("{}\n", decoded.header);
    if let Some((trace, span, sampled)) = decoded.span {
        let sampled = if sampled { "sampled" } else { "not sampled" };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  trace {trace:016x}, span {span:016x}, {sampled}");
    }
    match &decoded.overrides {
        None => text.push_str("  no overrides\n"),
        Some(overrides) if overrides.overrides.is_empty() => text.push_str("  an empty list of overrides\n"),
        Some(overrides) => {
            for entry in &overrides.overrides {
                let _ = writeln!(text, "  {} -> revision {}", entry.service, entry.revision);
            }
        }
    }
    for (key, value) in &decoded.other_baggage {
        let _ = writeln!(text, "  other baggage: {key} = {value}");
    }
    text
}

fn as_json(decoded: &Decoded) -> Value {
    let overrides = decoded.overrides.as_ref().map(|overrides| {
        let entries: Vec<_> = overrides
            .overrides
            .iter()
            .map(|entry| json!({ "service": entry.service, "revision": entry.revision }))
            .collect();
        json!({ "version": overrides.version, "overrides": entries })
    });
    let span = decoded.span.map(|(trace, span, sampled)| {
        json!({ "trace_id": format!("{trace:016x}"), "span_id": format!("{span:016x}"), "sampled": sampled })
    });
    let baggage: serde_json::Map<_, _> =
        decoded.other_baggage.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
    json!({ "header": decoded.header, "span": span, "overrides": overrides, "other_baggage": baggage })
}

fn parse_set(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((service, revision)) if !service.is_empty() && !revision.is_empty() => {
            Ok((service.to_owned(), revision.to_owned()))
        }
        _ => Err("expected SERVICE=REVISION, for example users=feature-x".to_owned()),
    }
}

fn parse_hex(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16)
        .map_err(|_| "expected up to 16 hexadecimal digits".to_owned())
}

#[cfg(test)]
#[path = "overrides_tests.rs"]
mod tests;
