//! A gRPC server for whatever filters ask: it notes what it is asked, and answers as the request that the filter has was told to.

use std::collections::HashMap;
use std::io::BufReader;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use culvert_tests::{http1, server};
use culvert_xds_client::json::pool;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response};
use prost::Message as _;
use prost_reflect::{DynamicMessage, MessageDescriptor};
use serde_json::Value;

/// What the services of one proxy were asked, by the `x-id` of the request that they were asked about.
#[derive(Debug, Default)]
pub struct Asked(Mutex<HashMap<String, Vec<String>>>);

impl Asked {
    /// What belongs to this `x-id`, in its order.
    pub fn of(&self, id: &str) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned().unwrap_or_default()
    }

    fn note(&self, id: &str, text: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(id.to_owned()).or_default().push(text);
    }
}

/// Starts the server; returns its port.
///
/// What it answers stands in the request's header `x-answer` (of rate limits: in the descriptor entry `answer`): the response's
/// message as JSON, for streams a list of them, one for each message that comes (in its place a list of several, or `"end"`, which ends the stream); or `status N` (gRPC's), `http N`, `hang`,
/// `garbage`. Without one the answer is an empty message.
pub fn start(asked: Arc<Asked>) -> Result<u16> {
    server::start_async(move |stream| {
        let asked = Arc::clone(&asked);
        async move {
            let mut connection = h2::server::handshake(stream).await?;
            while let Some(request) = connection.accept().await {
                let (request, respond) = request?;
                let asked = Arc::clone(&asked);
                // A proxy that breaks off is no failure of the service.
                tokio::spawn(async move { drop(serve(request, respond, &asked).await) });
            }
            Ok(())
        }
    })
}

/// Starts a service that has a set of keys at `/keys`, an empty one at `/none`, and nothing else; returns its port.
pub fn start_keys(keys: String) -> Result<u16> {
    server::start(move |mut stream| {
        let mut reader = BufReader::new(stream.try_clone()?);
        while let Some(request) = http1::Request::read(&mut reader)? {
            let (status, body) = match request.target.as_str() {
                "/keys" => (200, keys.clone()),
                "/none" => (200, "{\"keys\": []}".to_owned()),
                _ => (404, String::new()),
            };
            http1::Response::new(status, "application/json", body.into_bytes()).write(&mut stream, false)?;
        }
        Ok(())
    })
}

/// Finds the value of a header, or of a descriptor's entry, wherever a message has it.
fn find(message: &Value, name: &str) -> Option<String> {
    match message {
        Value::Object(fields) => {
            if let Some(Value::String(value)) = fields.get(name) {
                return Some(value.clone());
            }
            if fields.get("key").is_some_and(|key| key == name) {
                let text = fields.get("value").and_then(Value::as_str).map(str::to_owned);
                return text.or_else(|| Some(decoded(fields.get("rawValue")?.as_str()?)));
            }
            fields.values().find_map(|value| find(value, name))
        }
        Value::Array(items) => items.iter().find_map(|item| find(item, name)),
        _ => None,
    }
}

/// Base64's text.
fn decoded(text: &str) -> String {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Hides what is different every time.
fn hide(message: &mut Value) {
    match message {
        Value::Object(fields) => {
            // Of a header in a list.
            if let (Some(Value::String(key)), Some(Value::String(raw))) = (fields.get("key"), fields.get("rawValue")) {
                let value = if super::harness::is_own_value(key) { String::new() } else { decoded(raw) };
                fields.insert("rawValue".to_owned(), value.into());
            }
            if let Some(Value::Object(source)) = fields.get_mut("source") {
                hide_port(source);
            }
            super::entries::hide(fields);
            for (name, value) in fields.iter_mut() {
                if let (true, Value::Array(list)) = (name == "headers", &mut *value) {
                    // Their order is a proxy's own, but for values of one name.
                    list.sort_by_key(|header| header.get("key").map(Value::to_string));
                }
                if let ("source.address" | "source.port" | "request.id", false) = (name.as_str(), value.is_null()) {
                    *value = "".into();
                }
                if super::harness::is_own_value(name) || name == "time" || name == "id" && value.as_str().is_some() {
                    *value = "".into();
                } else {
                    hide(value);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(hide),
        _ => {}
    }
}

pub fn hide_port(fields: &mut serde_json::Map<String, Value>) {
    for (name, value) in fields.iter_mut() {
        match value {
            Value::Object(inner) => hide_port(inner),
            value if name == "portValue" => *value = "".into(),
            _ => {}
        }
    }
}

pub fn decode(descriptor: &MessageDescriptor, bytes: &[u8]) -> Result<Value> {
    let message = DynamicMessage::decode(descriptor.clone(), bytes)?;
    Ok(serde_json::to_value(&message)?)
}

pub fn encode(descriptor: &MessageDescriptor, json: &Value) -> Result<Bytes> {
    let message = DynamicMessage::deserialize(descriptor.clone(), json).context("the answer of a case")?;
    let message = message.encode_to_vec();
    let mut frame = vec![0];
    frame.extend_from_slice(&u32::try_from(message.len())?.to_be_bytes());
    frame.extend_from_slice(&message);
    Ok(frame.into())
}

/// The next message of a stream.
pub async fn next(body: &mut h2::RecvStream, read: &mut BytesMut) -> Result<Option<Bytes>> {
    loop {
        if read.len() >= 5 {
            let length = u32::from_be_bytes(read[1..5].try_into()?) as usize;
            if read.len() >= 5 + length {
                return Ok(Some(read.split_to(5 + length).freeze().slice(5..)));
            }
        }
        let Some(data) = body.data().await.transpose()? else { return Ok(None) };
        body.flow_control().release_capacity(data.len())?;
        read.extend_from_slice(&data);
    }
}

async fn serve(request: Request<h2::RecvStream>, mut respond: SendResponse<Bytes>, asked: &Asked) -> Result<()> {
    let (head, mut body) = request.into_parts();
    let path = head.uri.path().trim_start_matches('/');
    let (service, method) = path.split_once('/').context("no method")?;
    let service = pool().services().find(|known| known.full_name() == service).context("an unknown service")?;
    let method = service.methods().find(|known| known.name() == method).context("an unknown method")?;
    let mut headers: Vec<_> = head
        .headers
        .iter()
        .map(|(name, value)| super::harness::shown(name.as_str(), &String::from_utf8_lossy(value.as_bytes())))
        .collect();
    headers.sort();
    let mut text = format!("asked: {} {}\n    {}", head.method, head.uri, headers.join("\n    "));
    let (mut id, mut answers, mut count) = (String::new(), None, 0);
    let mut stream = None;
    let mut read = BytesMut::new();
    while let Some(message) = next(&mut body, &mut read).await? {
        let mut message = decode(&method.input(), &message)?;
        let answer = find(&message, "x-answer").or_else(|| find(&message, "answer"));
        id = find(&message, "x-id").or_else(|| find(&message, "id")).unwrap_or(id);
        hide(&mut message);
        asked.note(&id, format!("{}{message:#}", std::mem::take(&mut text) + "\n    "));
        let answer = match answer {
            Some(answer) if answers.is_none() => answers.insert(answer).clone(),
            _ => answers.clone().unwrap_or_default(),
        };
        let mut words = answer.split(' ');
        let number = |words: &mut std::str::Split<'_, char>| words.next().and_then(|word| word.parse::<u16>().ok());
        match words.next() {
            Some("hang") => tokio::time::sleep(Duration::from_secs(5)).await,
            Some("http") => {
                let status = number(&mut words).unwrap_or(500);
                respond.send_response(Response::builder().status(status).body(())?, true)?;
                return Ok(());
            }
            Some("status") => {
                let status = number(&mut words).unwrap_or(2);
                let response = Response::builder().header("content-type", "application/grpc");
                respond.send_response(response.header("grpc-status", status).body(())?, true)?;
                return Ok(());
            }
            _ => {}
        }
        let mut ends = false;
        let bodies = if answer == "garbage" {
            vec![Bytes::from_static(b"\0\0\0\0\x02\xff\xff")]
        } else {
            let json: Value =
                if answer.is_empty() { Value::Object(Default::default()) } else { serde_json::from_str(&answer)? };
            let all = match json {
                Value::Array(list) => match list.get(count).cloned().unwrap_or_default() {
                    Value::Array(several) => several,
                    Value::Null => Vec::new(),
                    Value::String(word) => {
                        ends = word == "end";
                        Vec::new()
                    }
                    one => vec![one],
                },
                one => vec![one],
            };
            all.iter().map(|answer| encode(&method.output(), answer)).collect::<Result<_>>()?
        };
        count += 1;
        if stream.is_none() {
            let response = Response::builder().header("content-type", "application/grpc").body(())?;
            stream = Some(respond.send_response(response, false)?);
        }
        if let Some(stream) = &mut stream {
            for body in bodies {
                ensure!(body.len() < 60_000, "an answer longer than a window");
                stream.send_data(body, false)?;
            }
        }
        if ends {
            break;
        }
        if !method.is_client_streaming() {
            break;
        }
    }
    if let Some(mut stream) = stream {
        stream.send_trailers(HeaderMap::from_iter([(
            http::HeaderName::from_static("grpc-status"),
            HeaderValue::from_static("0"),
        )]))?;
    }
    Ok(())
}
