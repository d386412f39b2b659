//! The v1 REST API: requests to [`Call`]s, and answers as lyft/discovery wrote them.
//!
//! Paths, status codes and bodies are those of that service, so that the cron jobs made for it work unchanged. Where it
//! answered `{}` and left the caller guessing, the reason is in the response header `x-culvert-error`.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use bytes::Bytes;
use futures_util::{FutureExt as _, stream};
use percent_encoding::percent_decode_str;
use serde::Serialize as _;
use serde_json::ser::{CharEscape, Formatter};
use serde_json::{Map, Value, json};

use super::WEIGHT_TAG;
use super::host::{Host, HostKey, MAX_NAME, MAX_TAGS, tags_fit};

/// The largest request body that is read, in bytes.
pub const MAX_BODY: usize = 64 * 1024;
/// Where the API is.
pub const PREFIX: &str = "/v1/";

/// What a request asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Call {
    /// The hosts of a service.
    OfService(String),
    /// The hosts of all services of a repository.
    OfRepository(String),
    /// A host registers, or says that it is still there.
    CheckIn(Host),
    /// A host goes.
    Remove(HostKey),
    /// One host, or all hosts of a service, are to get this share of the requests.
    SetWeight {
        /// The service.
        service: String,
        /// The host, or all of them.
        ip_address: Option<Ipv4Addr>,
        /// 1 to 100.
        weight: u32,
    },
}

/// Why a request is not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    status: u16,
    reason: String,
    /// Whether the body is `{}`, as it always was for this fault.
    bare: bool,
    /// The methods that this path does have.
    allow: Option<&'static str>,
}

impl Refusal {
    /// A refusal with the reason in its body.
    pub fn new(status: u16, reason: impl Into<String>) -> Self {
        Self { status, reason: reason.into(), bare: false, allow: None }
    }

    /// A refusal with status 400 and the body `{}`.
    pub fn bare(reason: impl Into<String>) -> Self {
        Self { status: 400, reason: reason.into(), bare: true, allow: None }
    }
}

/// What a request is answered with.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// The JSON text. Empty with status 204.
    pub body: String,
    /// Why the request was refused, for a header: printable ASCII.
    pub error: Option<String>,
    /// The value of the header `allow`.
    pub allow: Option<&'static str>,
}

impl Reply {
    /// Status 200.
    #[must_use]
    pub fn ok(body: Value) -> Self {
        Self { status: 200, body: python_json(&body), error: None, allow: None }
    }

    /// Status 204.
    #[must_use]
    pub fn no_content() -> Self {
        Self { status: 204, body: String::new(), error: None, allow: None }
    }
}

impl From<Refusal> for Reply {
    fn from(Refusal { status, reason, bare, allow }: Refusal) -> Self {
        let body = if bare { json!({}) } else { json!({ "error": reason }) };
        let printable = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
        let error = Some(reason.chars().take(MAX_NAME).map(printable).collect());
        Self { status, body: python_json(&body), error, allow }
    }
}

/// What is known of a request besides its path and method.
#[derive(Debug, Clone, Copy)]
pub struct Sent<'a> {
    /// The header `content-type`.
    pub content_type: &'a str,
    /// The body.
    pub body: &'a [u8],
    /// Who sent it: the last address in `x-forwarded-for`, else the address of the connection.
    pub remote: &'a str,
}

/// Reads a request.
///
/// # Errors
/// What is wrong with it.
pub fn parse(method: &str, path: &str, sent: Sent<'_>) -> Result<Call, Refusal> {
    let segments = segments(path)?;
    let form = Form::new(sent);
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    match (method, &*segments) {
        ("GET" | "HEAD", ["registration", "repo", repository]) => Ok(Call::OfRepository(name(repository)?)),
        ("GET" | "HEAD", ["registration", service]) => Ok(Call::OfService(name(service)?)),
        ("POST", ["registration", service]) => check_in(name(service)?, &form, sent.remote).map(Call::CheckIn),
        ("DELETE", ["registration", service, ip_address]) => {
            let ip_address = ip_address.parse().map_err(|_| Refusal::bare("the path has no IPv4 address"))?;
            Ok(Call::Remove(HostKey { service: name(service)?, ip_address }))
        }
        ("POST", ["loadbalancing", service]) => {
            Ok(Call::SetWeight { service: name(service)?, ip_address: None, weight: weight(&form)? })
        }
        ("POST", ["loadbalancing", service, ip_address]) => {
            let (service, weight) = (name(service)?, weight(&form)?);
            let ip_address = ip_address.parse().map_err(|_| Refusal::new(404, "Host not found"))?;
            Ok(Call::SetWeight { service, ip_address: Some(ip_address), weight })
        }
        (_, ["registration", "repo", _]) => Err(not_allowed("GET, HEAD, DELETE")),
        (_, ["registration", _]) => Err(not_allowed("GET, HEAD, POST")),
        (_, ["registration", _, _]) => Err(not_allowed("DELETE")),
        (_, ["loadbalancing", _] | ["loadbalancing", _, _]) => Err(not_allowed("POST")),
        _ => Err(Refusal::new(
            404,
            "the paths are /v1/registration/SERVICE[/IP], /v1/registration/repo/NAME and /v1/loadbalancing/SERVICE[/IP]",
        )),
    }
}

fn not_allowed(allow: &'static str) -> Refusal {
    Refusal { allow: Some(allow), ..Refusal::new(405, format!("this path has {allow}")) }
}

/// The parts of the path after [`PREFIX`], decoded.
fn segments(path: &str) -> Result<Vec<String>, Refusal> {
    let rest = path.strip_prefix(PREFIX).unwrap_or_default();
    let decode = |part: &str| {
        let decoded = percent_decode_str(part).decode_utf8();
        decoded.map(|text| text.into_owned()).map_err(|_| Refusal::new(400, "the path is not UTF-8"))
    };
    rest.split('/').map(decode).collect()
}

/// Checks a service's or repository's name.
fn name(text: &str) -> Result<String, Refusal> {
    if text.is_empty() || text.len() > MAX_NAME {
        return Err(Refusal::new(400, format!("the name in the path is empty or longer than {MAX_NAME} bytes")));
    }
    if text.chars().any(|c| c.is_control() || c == '/') {
        return Err(Refusal::new(400, "the name in the path has a control character or a slash"));
    }
    Ok(text.to_owned())
}

/// The fields of a form: of a repeated one the first counts.
struct Form(Vec<(String, String)>);

impl Form {
    fn new(sent: Sent<'_>) -> Self {
        let kind = sent.content_type.split(';').next().unwrap_or_default().trim();
        if kind.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
            return Self(form_urlencoded::parse(sent.body).into_owned().collect());
        }
        // Without one of these types there are no fields, as in Flask, nor in one that breaks off.
        Self(multipart(sent).unwrap_or_default())
    }

    /// A field, `None` if it is missing or empty.
    fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(key, _)| key == name)
    }
}

/// The fields of a body of the type `multipart/form-data`. Files are none, as in Flask.
fn multipart(sent: Sent<'_>) -> Option<Vec<(String, String)>> {
    let boundary = multer::parse_boundary(sent.content_type).ok()?;
    let body = Bytes::copy_from_slice(sent.body);
    let mut parts = multer::Multipart::new(stream::iter([Ok::<_, Infallible>(body)]), boundary);
    let read = async move {
        let mut fields = Vec::new();
        while let Some(part) = parts.next_field().await.ok()? {
            let Some(name) = part.name().filter(|_| part.file_name().is_none()).map(str::to_owned) else { continue };
            let value = part.bytes().await.ok()?;
            fields.push((name, String::from_utf8_lossy(&value).into_owned()));
        }
        Some(fields)
    };
    // The whole body is there: nothing is waited for.
    read.now_or_never().flatten()
}

/// A number as Python's `int` reads it.
fn integer(text: &str) -> Option<i64> {
    text.trim().parse().ok()
}

fn check_in(service: String, form: &Form, remote: &str) -> Result<Host, Refusal> {
    // The tags first, as ever: their error is the one with a text in its body.
    let tags = if form.has("tags") { form.get("tags").unwrap_or_default() } else { "{}" };
    let tags: Value = serde_json::from_str(tags).map_err(|_| Refusal::new(400, "Invalid json supplied in tags"))?;
    let Value::Object(tags) = tags else { return Err(Refusal::bare("tags is not a JSON object")) };
    let ip_address = match form.get("ip") {
        Some(text) => text.parse().map_err(|_| Refusal::bare(format!("ip `{text}` is not an IPv4 address")))?,
        None if form.get("auto_ip").is_some() => automatic(remote)?,
        None if form.0.is_empty() => {
            return Err(Refusal::bare(
                "the body is no form (content-type application/x-www-form-urlencoded or multipart/form-data)",
            ));
        }
        None => return Err(Refusal::bare("ip is missing, and so is auto_ip")),
    };
    let port = form.get("port").ok_or_else(|| Refusal::bare("port is missing"))?;
    let port = integer(port).and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
    let port = port.ok_or_else(|| Refusal::bare("port is not a number of 1 to 65535"))?;
    let revision = form.get("revision").ok_or_else(|| Refusal::bare("revision is missing"))?;
    let service_repo_name = form.get("service_repo_name").unwrap_or_default();
    for (field, text) in [("revision", revision), ("service_repo_name", service_repo_name)] {
        if text.len() > MAX_NAME {
            return Err(Refusal::bare(format!("{field} is longer than {MAX_NAME} bytes")));
        }
    }
    check_tags(&tags)?;
    Ok(Host {
        service,
        ip_address,
        service_repo_name: service_repo_name.to_owned(),
        port,
        revision: revision.to_owned(),
        last_check_in: 0,
        tags,
    })
}

fn check_tags(tags: &Map<String, Value>) -> Result<(), Refusal> {
    for name in ["az", "instance_id", "region"] {
        if !tags.contains_key(name) {
            return Err(Refusal::bare(format!("tags.{name} is missing")));
        }
    }
    // One host with these of another type makes Envoy's SDS refuse the answer for all hosts.
    if !tags.get("az").is_some_and(Value::is_string) || !tags.get("region").is_some_and(Value::is_string) {
        return Err(Refusal::bare("tags.az and tags.region must be text"));
    }
    if tags.get("canary").is_some_and(|canary| !canary.is_boolean()) {
        return Err(Refusal::bare("tags.canary must be true or false"));
    }
    if tags.get(WEIGHT_TAG).is_some_and(|weight| weight.as_u64().is_none_or(|weight| !(1..=100).contains(&weight))) {
        return Err(Refusal::bare("tags.load_balancing_weight must be an integer between 1 and 100"));
    }
    if !tags_fit(tags) {
        return Err(Refusal::bare(format!("tags are longer than {MAX_TAGS} bytes")));
    }
    Ok(())
}

/// The caller's own address. Only in 192.168.0.0/16: elsewhere it may be that of a proxy on the way.
fn automatic(remote: &str) -> Result<Ipv4Addr, Refusal> {
    match remote.parse::<Ipv4Addr>() {
        Ok(address) if address.octets()[..2] == [192, 168] => Ok(address),
        _ => Err(Refusal::bare(format!("auto_ip: the caller's address {remote} is not in 192.168.0.0/16"))),
    }
}

fn weight(form: &Form) -> Result<u32, Refusal> {
    let text = form.get(WEIGHT_TAG).ok_or_else(|| Refusal::new(400, "Required parameter 'weight' is missing."))?;
    let weight =
        integer(text).and_then(|weight| u32::try_from(weight).ok()).filter(|weight| (1..=100).contains(weight));
    weight.ok_or_else(|| Refusal::new(400, "Invalid load_balancing_weight. Supply an integer between 1 and 100."))
}

/// JSON as Python writes it: a space after `,` and `:`, only ASCII, and a newline at the end.
fn python_json(value: &Value) -> String {
    struct Python;
    impl Formatter for Python {
        fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, to: &mut W, first: bool) -> std::io::Result<()> {
            if first { Ok(()) } else { to.write_all(b", ") }
        }
        fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, to: &mut W, first: bool) -> std::io::Result<()> {
            if first { Ok(()) } else { to.write_all(b", ") }
        }
        fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, to: &mut W) -> std::io::Result<()> {
            to.write_all(b": ")
        }
        fn write_string_fragment<W: ?Sized + std::io::Write>(
            &mut self,
            to: &mut W,
            fragment: &str,
        ) -> std::io::Result<()> {
            let mut escaped = String::with_capacity(fragment.len());
            for c in fragment.chars() {
                if c.is_ascii() && c != '\u{7f}' {
                    escaped.push(c);
                } else {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a String cannot fail.
                        let _ = write!(escaped, "\\u{unit:04x}");
                    }
                }
            }
            to.write_all(escaped.as_bytes())
        }
        fn write_char_escape<W: ?Sized + std::io::Write>(
            &mut self,
            to: &mut W,
            escape: CharEscape,
        ) -> std::io::Result<()> {
            serde_json::ser::CompactFormatter.write_char_escape(to, escape)
        }
    }
    let mut text = Vec::new();
    // Writing to a Vec cannot fail, nor can a Value.
    let _ = value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, Python));
    text.push(b'\n');
    String::from_utf8(text).unwrap_or_default()
}

/// What the fuzzer feeds: any bytes as a path and a body. What is accepted must be answered and stored as JSON.
pub fn fuzz(bytes: &[u8]) {
    let (path, body) = bytes.split_at(bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len()));
    let path = String::from_utf8_lossy(path);
    // What begins as a multipart body does is one.
    let multipart = body.starts_with(b"\n--x");
    let content_type = if multipart { "multipart/form-data; boundary=x" } else { "application/x-www-form-urlencoded" };
    let sent = Sent { content_type, body, remote: &path };
    for method in ["GET", "POST", "DELETE", "PUT"] {
        match parse(method, &format!("{PREFIX}{path}"), sent) {
            Ok(Call::CheckIn(host)) => {
                let text = serde_json::to_string(&host).unwrap_or_default();
                assert_eq!(serde_json::from_str::<Host>(&text).ok().as_ref(), Some(&host), "stored as {text}");
                let shown = python_json(&host.as_answer());
                assert!(shown.is_ascii(), "{shown}");
                assert_eq!(serde_json::from_str::<Value>(&shown).ok(), Some(host.as_answer()));
                let settings = super::Settings::new(super::store::Storage::Memory);
                let mut joiner = crate::mesh::Joiner::default();
                joiner.register(super::join::Registered::new(&[host.into()], &settings));
                let (mesh, _) = joiner.update(&crate::registry::Registry::default());
                let _ = crate::resources::Snapshot::build(mesh, &crate::resources::Options::default());
            }
            Ok(_) => {}
            Err(refusal) => {
                let reply = Reply::from(refusal);
                assert!(reply.error.is_some_and(|error| error.bytes().all(|byte| (0x20..0x7f).contains(&byte))));
            }
        }
    }
}

#[cfg(test)]
#[path = "api_tests.rs"]
mod tests;
