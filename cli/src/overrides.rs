//! `culvert override`: makes and reads the headers that carry overrides, and what goes with them.

mod access;
mod connect;
mod doctor;
mod explain;
mod header;
mod list;
mod offered;
mod proxy;
mod share;
mod terminal;

use std::fmt::Write as _;

use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use culvert_xds_client::overrides::{
    BAGGAGE_ITEM, ContextError, Override, Overrides, SpanContext, decode_ot_span_context, find, parse_baggage,
};
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};

pub use self::terminal::time;

const OT_SPAN_CONTEXT: &str = "x-ot-span-context";
const OT_BAGGAGE_OVERRIDES: &str = "ot-baggage-overrides";
const BAGGAGE: &str = "baggage";
const UBERCTX_OVERRIDES: &str = "uberctx-overrides";
const JAEGER_BAGGAGE: &str = "jaeger-baggage";
const BAGGAGE_OVERRIDES: &str = "baggage-overrides";

/// The subcommands of `culvert override`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the header that names revisions of services
    #[command(after_help = header::HELP)]
    Header(Box<header::HeaderFlags>),
    /// Say what a header means
    Decode(DecodeFlags),
    /// Say what a header means, and what proxies would do about it
    #[command(after_help = explain::HELP)]
    Explain(explain::ExplainFlags),
    /// Say which services do not pass on what they are sent
    #[command(after_help = doctor::HELP)]
    Doctor(doctor::DoctorFlags),
    /// Show what can be named: the offloaded revisions of services
    #[command(after_help = list::HELP)]
    List(list::ListFlags),
    /// Run a local HTTP proxy that adds the header to everything
    #[command(after_help = proxy::HELP)]
    Proxy(proxy::Flags),
    /// Keep sets of overrides at discovery, each with a short token that stands for it
    #[command(subcommand, after_help = share::HELP)]
    Share(share::Command),
    /// Have a program on this machine answer for a revision of a service, through a tunnel
    #[command(after_help = connect::HELP)]
    Connect(connect::Flags),
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
        Command::Header(flags) => header::run(&flags),
        Command::Decode(flags) => decode(&flags),
        Command::Explain(flags) => explain::run(&flags),
        Command::Doctor(flags) => doctor::run(&flags),
        Command::List(flags) => list::run(&flags),
        Command::Proxy(flags) => proxy::run(flags),
        Command::Share(command) => share::run(command),
        Command::Connect(flags) => connect::run(flags),
    }
}

/// The message of some revisions and a share.
fn message(set: &[(String, String)], share: Option<&str>) -> anyhow::Result<Overrides> {
    let services: Vec<_> = set.iter().map(|(service, _)| service.clone()).collect();
    let flag = |service: &str, _: &str| {
        let revision = set.iter().find(|(of, _)| of == service).map_or("", |(_, revision)| revision);
        format!("--set {service}={revision}")
    };
    let overrides = Overrides::new(set.iter().cloned()).map_err(|error| by_flag(&error, &services, flag))?;
    match share {
        Some(token) => overrides.with_share(token).context("--share (`culvert override share list` shows the tokens)"),
        None => Ok(overrides),
    }
}

/// What is wrong with a message, which numbers what it says of services, by the flags that said so. `flag` gives the one of a service and
/// a field.
fn by_flag(error: &ContextError, services: &[String], flag: impl Fn(&str, &str) -> String) -> anyhow::Error {
    let text = error.to_string();
    let numbered = text.strip_prefix("overrides[").and_then(|rest| rest.split_once(']'));
    let found = numbered.and_then(|(index, rest)| Some((services.get(index.parse::<usize>().ok()?)?, rest)));
    match found {
        Some((service, rest)) => {
            let rest = rest.trim_start_matches(['.', ' ']);
            anyhow::anyhow!("{}: {rest}", flag(service, rest))
        }
        None => anyhow::anyhow!(text),
    }
}

/// What a header says.
struct Decoded {
    header: &'static str,
    /// The key of the signature that it has, which nothing here verifies.
    key_id: Option<String>,
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
            UBERCTX_OVERRIDES => item_of(UBERCTX_OVERRIDES, value),
            JAEGER_BAGGAGE => item_of(JAEGER_BAGGAGE, value),
            BAGGAGE_OVERRIDES => item_of(BAGGAGE_OVERRIDES, value),
            other => bail!(
                "`{other}` carries no overrides; the headers that do are {OT_SPAN_CONTEXT}, {OT_BAGGAGE_OVERRIDES}, {BAGGAGE}, \
                 {UBERCTX_OVERRIDES}, {JAEGER_BAGGAGE} and {BAGGAGE_OVERRIDES}"
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
    let item = baggage.remove(BAGGAGE_ITEM);
    let span = Some((trace_id, span_id, sampled));
    decoded(OT_SPAN_CONTEXT, span, item.as_deref(), baggage.into_iter().collect())
}

fn bare_item(value: &str) -> anyhow::Result<Decoded> {
    decoded(OT_BAGGAGE_OVERRIDES, None, Some(value), Vec::new())
}

/// A header that the proxy's own reader takes apart.
fn item_of(header: &'static str, value: &str) -> anyhow::Result<Decoded> {
    let mut headers = HeaderMap::new();
    headers.insert(HeaderName::from_static(header), HeaderValue::from_str(value)?);
    let found = find(&headers, usize::MAX).transpose()?;
    decoded(header, None, found.as_ref().map(|found| &*found.value), Vec::new())
}

fn w3c(value: &str) -> anyhow::Result<Decoded> {
    // It says what is wrong with the item, as the proxy would.
    let mut decoded = item_of(BAGGAGE, value)?;
    let members = parse_baggage(value.as_bytes())?.members;
    decoded.other_baggage = members.into_iter().filter(|(key, _)| key != BAGGAGE_ITEM).collect();
    Ok(decoded)
}

fn decoded(
    header: &'static str,
    span: Option<(u64, u64, bool)>,
    item: Option<&str>,
    other_baggage: Vec<(String, String)>,
) -> anyhow::Result<Decoded> {
    let overrides = item.map(Overrides::from_baggage_item).transpose()?;
    let signed = overrides.as_ref().and_then(|overrides| overrides.signed.as_ref());
    let key_id = signed.map(|signed| signed.key_id.clone());
    let inner = signed.map(|signed| signed.message()).transpose()?;
    Ok(Decoded { header, key_id, span, overrides: inner.or(overrides), other_baggage })
}

fn in_words(decoded: &Decoded) -> String {
    let mut text = format!("{}\n", decoded.header);
    if let Some((trace, span, sampled)) = decoded.span {
        let sampled = if sampled { "sampled" } else { "not sampled" };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  trace {trace:016x}, span {span:016x}, {sampled}");
    }
    if let Some(key) = &decoded.key_id {
        let _ = writeln!(text, "  signed with key {key} (not verified here)");
    }
    match &decoded.overrides {
        None => text.push_str("  no overrides\n"),
        Some(overrides) => {
            if overrides.expires != 0 {
                let _ = writeln!(text, "  {}", expiry(overrides.expires, header::now()));
            }
            if !overrides.share.is_empty() {
                let _ = writeln!(text, "  share {}", overrides.share);
            } else if overrides.overrides.is_empty() {
                text.push_str("  an empty list of overrides\n");
            }
            for entry in &overrides.overrides {
                for action in entry.actions() {
                    let _ = writeln!(text, "  {} -> {}", entry.service, entry.in_words(action));
                }
            }
        }
    }
    for (key, value) in &decoded.other_baggage {
        let _ = writeln!(text, "  other baggage: {key} = {value}");
    }
    text
}

/// When a message ends.
fn expiry(expires: u64, now: u64) -> String {
    match expires.checked_sub(now) {
        Some(left) if left > 0 => format!("expires in {left} s"),
        _ => format!("expired {} s ago", now.saturating_sub(expires)),
    }
}

/// One override; what it does not ask for is left out.
fn entry_json(entry: &Override) -> Value {
    let mut object = serde_json::Map::from_iter([("service".to_owned(), entry.service.clone().into())]);
    let mut put = |name: &str, value: Value| drop(object.insert(name.to_owned(), value));
    if !entry.revision.is_empty() {
        put("revision", entry.revision.clone().into());
    }
    if !entry.address.is_empty() {
        put("address", entry.address.clone().into());
    }
    if let Some(fault) = &entry.fault {
        put("fault", json!({ "http_status": fault.http_status, "grpc_status": fault.grpc_status }));
    }
    if entry.delay_ms != 0 {
        put("delay_ms", entry.delay_ms.into());
    }
    if entry.timeout_ms != 0 {
        put("timeout_ms", entry.timeout_ms.into());
    }
    if entry.debug {
        put("debug", true.into());
    }
    if let Some(sample) = entry.sample {
        put("sample", sample.into());
    }
    if !entry.config.is_empty() {
        let values = entry.config.iter().map(|it| (it.name.clone(), it.value.clone().into()));
        put("config", Value::Object(values.collect()));
    }
    Value::Object(object)
}

fn as_json(decoded: &Decoded) -> Value {
    let overrides = decoded.overrides.as_ref().map(|overrides| {
        let entries: Vec<_> = overrides.overrides.iter().map(entry_json).collect();
        let mut object = json!({ "version": overrides.version, "overrides": entries });
        if overrides.expires != 0 {
            object["expires"] = overrides.expires.into();
        }
        if let Some(key) = &decoded.key_id {
            object["signed_with"] = key.clone().into();
        }
        if !overrides.share.is_empty() {
            object["share"] = overrides.share.as_str().into();
        }
        object
    });
    let span = decoded.span.map(|(trace, span, sampled)| {
        json!({ "trace_id": format!("{trace:016x}"), "span_id": format!("{span:016x}"), "sampled": sampled })
    });
    let baggage: serde_json::Map<_, _> =
        decoded.other_baggage.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
    json!({ "header": decoded.header, "span": span, "overrides": overrides, "other_baggage": baggage })
}

#[cfg(test)]
#[path = "overrides_tests.rs"]
mod tests;
