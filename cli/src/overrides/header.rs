//! `culvert override header`: makes the headers.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use culvert_xds_client::overrides::{
    BAGGAGE_ITEM, ConfigValue, Fault, Override, Overrides, SpanContext, encode_ot_span_context, format_baggage,
    key_of_file, split_service,
};
use serde_json::{Value, json};

use super::offered::Look;
use super::{BAGGAGE, BAGGAGE_OVERRIDES, OT_BAGGAGE_OVERRIDES, OT_SPAN_CONTEXT, UBERCTX_OVERRIDES, by_flag};

/// What is printed below the flags.
pub const HELP: &str = "\
Examples:
  culvert override header --set users=feature-x
  culvert override header --set users=feature-x --set orders.shop=r2 --format baggage
  curl $(culvert override header --set users=feature-x --output curl) http://front/
  culvert override header --delay orders=300ms --timeout orders=1s --config orders:new-checkout=on
  culvert override header --fault users=503 --expires 1h --sign-key dev=/etc/culvert/override.key

The request's hop to the service `users` then goes to the offloaded pod whose label culvert.dev/revision is feature-x,
at every place the header reaches: services must pass it on, as they do with their other trace headers. A service or
revision that discovery does not list is ignored, and so is what the mesh or the service does not allow. `culvert status`
shows what can be named, `culvert override explain` what would be done; docs/overrides.md has the format.";

/// Without `--expires`, what is signed ends after this, in seconds.
pub(super) const SIGNED_FOR: u64 = 3600;
/// How long a signed header may hold where daemons are told nothing else, in seconds.
const SIGNED_AT_MOST: u64 = 86_400;
/// How long any header may hold, in seconds: as long as a share.
const LONGEST: u64 = 30 * 86_400;

/// Flags of `culvert override header`.
#[derive(Debug, Args)]
pub struct HeaderFlags {
    /// A service (name, or name.namespace) and the revision it is to be. May be repeated, as all flags that name a service
    #[arg(long = "set", value_name = "SERVICE=REVISION", value_parser = parse_set)]
    set: Vec<(String, String)>,

    /// The token of a share (`culvert override share`); what the other flags say counts before what the share says
    #[arg(long, value_name = "TOKEN")]
    share: Option<String>,

    /// The same by the address of an offloaded pod that discovery lists
    #[arg(long, value_name = "SERVICE=IP[:PORT]", value_parser = parse_set)]
    address: Vec<(String, String)>,

    /// Have the proxy answer in the place of the service
    #[arg(long, value_name = "SERVICE=STATUS|grpc:STATUS", value_parser = parse_set)]
    fault: Vec<(String, String)>,

    /// Have the request wait before it goes on: 300ms, 1.5s
    #[arg(long, value_name = "SERVICE=TIME", value_parser = parse_set)]
    delay: Vec<(String, String)>,

    /// How long the service has for its answer: 300ms, 1.5s
    #[arg(long, value_name = "SERVICE=TIME", value_parser = parse_set)]
    timeout: Vec<(String, String)>,

    /// Have proxies log what they decide about the request
    #[arg(long, value_name = "SERVICE")]
    debug: Vec<String>,

    /// Have the request's trace recorded, or not
    #[arg(long, value_name = "SERVICE[=false]")]
    sample: Vec<String>,

    /// Tell the service a setting, in the header x-culvert-config
    #[arg(long, value_name = "SERVICE:NAME=VALUE")]
    config: Vec<String>,

    /// After what time the header means nothing any more: 30m, 8h. With --sign-key 1h unless stated
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    expires: Option<u64>,

    /// Sign what is asked for with the key in this file, which proxies know by this id
    #[arg(long, value_name = "ID=FILE", value_parser = parse_key)]
    sign_key: Option<(String, String)>,

    /// Which header to make; span context and W3C baggage by default, as a service may pass on only one of them
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

    #[command(flatten)]
    look: Look,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// The span context of Envoy's original tracers
    #[value(name = OT_SPAN_CONTEXT)]
    OtSpanContext,
    /// The text form of the same
    #[value(name = OT_BAGGAGE_OVERRIDES)]
    OtBaggage,
    /// The W3C baggage header
    Baggage,
    /// Jaeger's
    #[value(name = UBERCTX_OVERRIDES, alias = "jaeger")]
    Uber,
    /// The one beside B3
    #[value(name = BAGGAGE_OVERRIDES, alias = "b3")]
    B3,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A line `name: value` a header, which browser extensions for headers take
    #[value(alias = "plain")]
    Text,
    /// Arguments for curl, which need no quotes
    Curl,
    /// A JSON object of names and values, as ghz takes for metadata
    Json,
    /// A call of fetch() for a browser's console
    #[value(alias = "fetch")]
    Browser,
    /// Arguments for grpcurl, which need no quotes
    #[value(alias = "grpcurl")]
    Grpc,
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Makes the headers; gives what is to be printed.
pub fn run(flags: &HeaderFlags) -> anyhow::Result<String> {
    let item = message(flags)?.to_baggage_item();
    // Beside the headers, which other programs read.
    for warning in flags.look.warnings(&flags.set, flags.share.as_deref()) {
        eprintln!("warning: {warning}");
    }
    let wants = |format| flags.format == Some(format);
    let mut headers = Vec::new();
    if flags.format.is_none() || wants(Format::OtSpanContext) {
        let context = SpanContext {
            trace_id: flags.trace_id.unwrap_or_else(|| fastrand::u64(1..)),
            span_id: flags.span_id.unwrap_or_else(|| fastrand::u64(1..)),
            sampled: false,
            baggage: BTreeMap::from([(BAGGAGE_ITEM.to_owned(), item.clone())]),
        };
        headers.push((OT_SPAN_CONTEXT, encode_ot_span_context(&context)));
    }
    let w3c = format_baggage([(BAGGAGE_ITEM, &*item)]);
    if wants(Format::Uber) {
        // The same escapes.
        let escaped = w3c.strip_prefix("overrides=").unwrap_or_default();
        headers.push((UBERCTX_OVERRIDES, escaped.to_owned()));
    }
    if flags.format.is_none() || wants(Format::Baggage) {
        headers.push((BAGGAGE, w3c));
    }
    for (format, name) in [(Format::OtBaggage, OT_BAGGAGE_OVERRIDES), (Format::B3, BAGGAGE_OVERRIDES)] {
        if wants(format) {
            headers.push((name, item.clone()));
        }
    }
    let object = || -> Value {
        let pairs = headers.iter().map(|(name, value)| ((*name).to_owned(), value.clone().into()));
        Value::Object(pairs.collect())
    };
    Ok(match flags.output {
        Output::Text => headers.iter().map(|(name, value)| format!("{name}: {value}\n")).collect(),
        // Neither space nor quote nor pattern is in it, so that it survives `$(...)` as well as being pasted.
        Output::Curl | Output::Grpc => {
            let arguments: Vec<_> = headers.iter().map(|(name, value)| format!("-H {name}:{value}")).collect();
            arguments.join(" ") + "\n"
        }
        Output::Json => format!("{:#}\n", object()),
        Output::Browser => format!("fetch(location.href, {})\n", json!({ "headers": object() })),
    })
}

/// The message that the flags ask for.
fn message(flags: &HeaderFlags) -> anyhow::Result<Overrides> {
    let mut entries = Entries::default();
    for (service, revision) in &flags.set {
        let entry = entries.of(service);
        ensure!(entry.revision.is_empty(), "--set: `{service}` is overridden twice");
        entry.revision.clone_from(revision);
    }
    for (service, address) in &flags.address {
        let entry = entries.of(service);
        ensure!(entry.address.is_empty(), "--address: `{service}` is overridden twice");
        entry.address.clone_from(address);
    }
    for (service, status) in &flags.fault {
        let number = |text: &str| text.parse::<u32>().with_context(|| format!("--fault: `{status}` is no status"));
        entries.of(service).fault = Some(match status.strip_prefix("grpc:") {
            Some(status) => Fault { http_status: None, grpc_status: Some(number(status)?) },
            None => Fault { http_status: Some(number(status)?), grpc_status: None },
        });
    }
    for (service, time) in &flags.delay {
        entries.of(service).delay_ms = milliseconds(time).context("--delay")?;
    }
    for (service, time) in &flags.timeout {
        entries.of(service).timeout_ms = milliseconds(time).context("--timeout")?;
    }
    for service in &flags.debug {
        entries.of(service).debug = true;
    }
    for text in &flags.sample {
        let (service, sample) = match text.split_once('=') {
            None => (text.as_str(), true),
            Some((service, sample)) => (service, sample.parse().context("--sample: true or false is needed")?),
        };
        entries.of(service).sample = Some(sample);
    }
    for text in &flags.config {
        let parts = text.split_once(':').and_then(|(service, rest)| Some((service, rest.split_once('=')?)));
        let Some((service, (name, value))) = parts else {
            bail!("--config: expected SERVICE:NAME=VALUE, for example users:new-checkout=on");
        };
        entries.of(service).config.push(ConfigValue { name: name.to_owned(), value: value.to_owned() });
    }
    ensure!(
        !entries.0.is_empty() || flags.share.is_some(),
        "nothing is asked for: name a service with --set, --fault, --delay or another flag"
    );
    let lasts = flags.expires.or_else(|| flags.sign_key.is_some().then_some(SIGNED_FOR));
    ensure!(lasts.is_none_or(|seconds| seconds <= LONGEST), "--expires: at most 30d are possible, as of a share");
    if flags.sign_key.is_some() && lasts.is_some_and(|seconds| seconds > SIGNED_AT_MOST) {
        eprintln!(
            "warning: daemons refuse what is signed for more than 24h (lasts_too_long), unless their filters' \
             signing.max_lifetime_s says otherwise"
        );
    }
    let expires = lasts.map_or(0, |seconds| now().saturating_add(seconds));
    let services: Vec<_> = entries.0.iter().map(|entry| entry.service.clone()).collect();
    let message = Overrides::of(entries.0, expires)
        .map_err(|error| by_flag(&error, &services, |service, field| flag_of(flags, service, field)))?;
    let message = match &flags.share {
        Some(token) => message.with_share(token).context("--share (`culvert override share list` shows the tokens)")?,
        None => message,
    };
    let Some((id, file)) = &flags.sign_key else { return Ok(message) };
    message.sign(id, &read_key(file)?).context("--sign-key")
}

/// The key in a file.
pub(super) fn read_key(file: &str) -> anyhow::Result<Vec<u8>> {
    let key = std::fs::read(file).with_context(|| format!("--sign-key: cannot read {file}"))?;
    Ok(key_of_file(&key).to_vec())
}

/// The flag that asked for a field of what is said of a service, as it was given; the first one of that service if no flag is the field's.
fn flag_of(flags: &HeaderFlags, service: &str, field: &str) -> String {
    let HeaderFlags { set, address, fault, delay, timeout, .. } = flags;
    let pairs = [("set", set), ("address", address), ("fault", fault), ("delay", delay), ("timeout", timeout)];
    let pairs = pairs.into_iter().flat_map(|(flag, all)| all.iter().map(move |(of, value)| (flag, of, value)));
    let mut of_service: Vec<_> = pairs.filter(|(_, of, _)| of == &service).collect();
    of_service.sort_by_key(|(flag, _, _)| !field.starts_with(flag));
    match of_service.first() {
        Some((flag, of, value)) => format!("--{flag} {of}={value}"),
        None => service.to_owned(),
    }
}

/// What is asked for, a service each, in the order in which they are first named.
#[derive(Default)]
struct Entries(Vec<Override>);

impl Entries {
    fn of(&mut self, service: &str) -> &mut Override {
        let known = self.0.iter().position(|entry| split_service(&entry.service) == split_service(service));
        let at = known.unwrap_or_else(|| {
            self.0.push(Override { service: service.to_owned(), ..Override::default() });
            self.0.len() - 1
        });
        &mut self.0[at]
    }
}

pub(super) fn parse_set(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((service, revision)) if !service.is_empty() && !revision.is_empty() => {
            Ok((service.to_owned(), revision.to_owned()))
        }
        _ => Err("expected SERVICE=REVISION, for example users=feature-x".to_owned()),
    }
}

pub(super) fn parse_key(text: &str) -> Result<(String, String), String> {
    parse_set(text).map_err(|_| "expected ID=FILE, for example 2026-11=/etc/culvert/keys/2026-11".to_owned())
}

fn parse_hex(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16)
        .map_err(|_| "expected up to 16 hexadecimal digits".to_owned())
}

/// `300ms`, `1.5s`, `2m`, `1h` in milliseconds.
fn time(text: &str) -> Option<f64> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(unit);
    let factor = match unit {
        "ms" => 1.0,
        "s" => 1000.0,
        "m" => 60_000.0,
        "h" => 3_600_000.0,
        "d" => 86_400_000.0,
        _ => return None,
    };
    // Neither signs nor exponents.
    let plain = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let number: f64 = number.parse().ok().filter(|_| plain)?;
    Some(number * factor)
}

fn milliseconds(text: &str) -> anyhow::Result<u32> {
    let time = time(text).map(f64::round).filter(|time| (1.0..=f64::from(u32::MAX)).contains(time));
    // In range.
    time.map(|time| time as u32).with_context(|| format!("`{text}` is not a time such as 300ms, 1.5s or 2m"))
}

fn parse_time(text: &str) -> Result<u64, String> {
    let seconds = time(text).map(|time| (time / 1000.0).ceil()).filter(|time| (1.0..=1e9).contains(time));
    // In range.
    seconds.map(|seconds| seconds as u64).ok_or_else(|| format!("`{text}` is not a time such as 30m, 8h or 2d"))
}
