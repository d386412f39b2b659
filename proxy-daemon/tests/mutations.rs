//! The fuzz targets on the corpus of configuration files and on seeded mutations of it: no panic, and bounded time.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use culvert_proxy_daemon::config::fuzz;
use culvert_xds_client::json::{self, Format, UnknownFields};
use envoy_types::pb::envoy::config::{bootstrap::v3::Bootstrap, route::v3::RouteConfiguration};
use prost::Message as _;

/// How many mutations each target gets.
const MUTATIONS: u32 = 1_000;

/// The longest that one input may take, unoptimised and on a busy machine.
const LIMIT: Duration = Duration::from_secs(10);

/// Pieces that mean something to a parser.
const WORDS: [&[u8]; 24] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"\"",
    b"'",
    b"\n",
    b"- ",
    b"*a",
    b"&a ",
    b"!!str ",
    b"!ignore ",
    b"<<: ",
    b"null",
    b"\"@type\"",
    b"1e400",
    b"-0",
    b"\\ud800",
    b"0x",
    b"9223372037s",
    b"\xff\xfe",
    b"\0",
];

fn corpus(dir: &Path, found: &mut Vec<Vec<u8>>) {
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            corpus(&path, found);
        } else {
            found.push(fs::read(&path).unwrap());
        }
    }
}

fn inputs() -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    corpus(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/corpus"), &mut found);
    assert!(found.len() >= 150, "the corpus has {} files", found.len());
    // Long files say nothing new here.
    found.retain(|text| text.len() < 8_000);
    found
}

fn mutate(random: &mut fastrand::Rng, inputs: &[Vec<u8>]) -> Vec<u8> {
    let mut text = random.choice(inputs).unwrap().clone();
    for _ in 0..random.usize(1..4) {
        let at = random.usize(..=text.len());
        match random.u8(..5) {
            0 => drop(text.splice(at..at, random.choice(WORDS).unwrap().iter().copied())),
            1 => drop(text.drain(at..(at + random.usize(..20)).min(text.len()))),
            2 => {
                let other = random.choice(inputs).unwrap();
                let from = random.usize(..=other.len());
                let piece = &other[from..(from + random.usize(..200)).min(other.len())];
                drop(text.splice(at..at, piece.iter().copied()));
            }
            3 => text.truncate(at),
            _ => {
                if let Some(byte) = text.get_mut(at) {
                    *byte ^= 1 << random.u8(..8);
                }
            }
        }
    }
    text
}

fn run(target: fn(&[u8]), input: &[u8]) {
    let started = Instant::now();
    target(input);
    let took = started.elapsed();
    assert!(took < LIMIT, "{took:?} for {:?}", String::from_utf8_lossy(input));
}

/// `name` is the target's. What it begins with is also written into the directory that `CULVERT_FUZZ_CORPUS` names, for libFuzzer to begin with.
fn with_mutations(name: &str, seed: u64, inputs: &[Vec<u8>], target: fn(&[u8])) {
    if let Some(corpus) = std::env::var_os("CULVERT_FUZZ_CORPUS") {
        let directory = Path::new(&corpus).join(name);
        fs::create_dir_all(&directory).unwrap();
        for (index, input) in inputs.iter().enumerate() {
            fs::write(directory.join(format!("example-{index}")), input).unwrap();
        }
    }
    for input in inputs {
        run(target, input);
    }
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..MUTATIONS {
        run(target, &mutate(&mut random, inputs));
    }
}

#[test]
fn yaml() {
    with_mutations("yaml", 1, &inputs(), fuzz::yaml);
}

#[test]
fn json_texts() {
    let mut inputs = inputs();
    // Most of the corpus is YAML: the same in JSON.
    let printed = inputs.iter().filter_map(|text| json::from_yaml::<Bootstrap>(std::str::from_utf8(text).ok()?).ok());
    let printed: Vec<_> = printed.map(|message| json::to_json(&message).to_string().into_bytes()).collect();
    inputs.extend(printed);
    with_mutations("json", 2, &inputs, fuzz::json);
}

#[test]
fn anys() {
    let bootstraps = inputs();
    let messages =
        bootstraps.iter().filter_map(|text| json::from_yaml::<Bootstrap>(std::str::from_utf8(text).ok()?).ok());
    let mut inputs = vec![b"\x02{\"stat_prefix\": \"a\", \"route_config\": {\"virtual_hosts\": []}}".to_vec()];
    for message in messages {
        let listeners = message.static_resources.into_iter().flat_map(|resources| resources.listeners);
        for filter in listeners.flat_map(|listener| listener.filter_chains).flat_map(|chain| chain.filters) {
            use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
            let Some(ConfigType::TypedConfig(config)) = filter.config_type else { continue };
            let kind = u8::from(config.type_url.ends_with("TypedStruct"));
            inputs.push([&[kind], config.value.as_slice()].concat());
        }
    }
    assert!(inputs.len() > 50);
    with_mutations("any", 3, &inputs, fuzz::any);
}

#[test]
fn rules() {
    let read = |text: &Vec<u8>| {
        json::read::<Bootstrap>(std::str::from_utf8(text).ok()?, Format::Yaml, UnknownFields::Ignore).ok()
    };
    let inputs: Vec<_> = inputs().iter().filter_map(read).map(|message| message.encode_to_vec()).collect();
    with_mutations("rules", 4, &inputs, fuzz::rules);
}

#[test]
fn http1_messages() {
    use culvert_proxy_daemon::http::codec::fuzz::{chunks, request_head, response_head};
    let requests = bytes(&[
        "GET / HTTP/1.1\r\nhost: a\r\n\r\n",
        "\r\nPOST http://b/x?y HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc",
        "PUT /a HTTP/1.0\r\ntransfer-encoding: chunked\r\nx: y\r\n\r\n",
        "CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nhost: a\r\nx-folded: a\r\n b\r\n\r\n",
    ]);
    with_mutations("request_head", 5, &requests, request_head);
    let responses = bytes(&[
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.0 404\r\nconnection: close\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    ]);
    with_mutations("response_head", 6, &responses, response_head);
    let bodies = bytes(&[
        "5;a=b\r\nhello\r\n0\r\n\r\n",
        "00a\r\n0123456789\r\n1 \r\nx\r\n0\r\nx-t: 1\r\n\r\nGET",
        "fffffffffffffff\r\nx",
    ]);
    with_mutations("chunks", 7, &bodies, chunks);
}

fn bytes(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

#[test]
fn http2_messages() {
    use culvert_proxy_daemon::http::codec::fuzz::{http2_blocks, http2_frames, http2_head};
    let heads = bytes(&[
        "GET\nhttp://a/x?y\nx-a:b",
        "POST\n/x\nhost:a\ncontent-length:3\ncontent-length:3\ncookie:a=b\ncookie:c=d",
        "CONNECT\na:80\n",
        "OPTIONS\n*\nhost:a\nhost:b",
        "GET\nhttp://user@a/x\nhost:a",
    ]);
    with_mutations("http2_head", 8, &heads, http2_head);
    let frame = |kind: u8, payload: &[u8]| [&[0, 0, payload.len() as u8, kind, 0, 0, 0, 0, 1], payload].concat();
    let frames = [frame(0, b"data"), frame(3, &[0, 0, 0, 8]), frame(7, &[0, 0, 0, 1, 0, 0, 0, 11, 9]), frame(0, b"")];
    let head = [frame(1, b"\x82\x86\x84\x41\x01a"), frame(1, b"\x82\0\x03X-A\x01b"), frame(9, b"\x40\x01a\x01b")];
    with_mutations("http2_frames", 9, &[frames.concat(), frames[2].clone(), head.concat()], http2_frames);
    let blocks = [
        // Indexed fields, an authority in Huffman's code, an entry for the table, and others that refer to it.
        &b"\x11\x82\x86\x84\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff\x06\x40\x01a\x01b\x82\x01\xbe"[..],
        b"\x08\x40\x03X-A\x01b\x82\x02\xbe\x82\x05\x7e\x03GET",
        b"\x03\x20\x3f\xe1\x08\x3f\xe1\x1f\x82\x40\x01a\x01b\x03\x84\xbe\xbf",
        b"\x0e\x10\x07:method\x03G T\x08\x08\x03101\x04\x02/#",
    ];
    with_mutations("http2_blocks", 18, &blocks.map(<[u8]>::to_vec), http2_blocks);
}

#[test]
fn paths_templates_and_formats() {
    use culvert_proxy_daemon::http::fuzz::{header_format, path, uri_template};
    let paths = bytes(&[
        "\x03/a/%2e%2e/b//c/./%41?d=%2e",
        "\x01/%%32e%%32e/a",
        "\x03/a\\..\\b",
        "\x02//a///b",
        "\x03/a/..;/b/%2f..%5c",
        "\x01*",
    ]);
    with_mutations("path", 10, &paths, path);
    let templates = bytes(&[
        "/api/{version}/*\n/v/{version}\n/api/1/x",
        "/files/{rest=**}.png\n/{rest}/a\n/files/a/b.png",
        "/{a=x/*}/{b}\n/{b}-{a}\n/x/1/2",
    ]);
    with_mutations("uri_template", 11, &templates, uri_template);
    let formats = bytes(&[
        "%REQ(x-a?:path):5% and %RESP(X-A)%\nvalue",
        "%START_TIME(%s.%3f)%%%\n",
        "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %PROTOCOL%\n\u{e9}",
        "%DYNAMIC_METADATA(a:b:c):3%%BYTES_RECEIVED%\nx",
    ]);
    with_mutations("header_format", 12, &formats, header_format);
}

#[test]
fn routes_and_matchers() {
    use culvert_proxy_daemon::http::fuzz::routes;
    let route = |matched: &str| format!(r#"{{"match": {{{matched}}}, "direct_response": {{"status": 200}}}}"#);
    let host = |routes: &[String]| {
        format!(
            r#"{{"name": "r", "virtual_hosts": [{{"name": "v", "domains": ["*"], "routes": [{}]}}]}}"#,
            routes.join(", ")
        )
    };
    // So many that there is an index.
    let many = [
        r#""prefix": "/a""#,
        r#""path": "/a/b""#,
        r#""prefix": "/a/", "case_sensitive": false"#,
        r#""path_separated_prefix": "/a/b""#,
        r#""safe_regex": {"regex": "/a/[bc]+"}"#,
        r#""prefix": "/", "headers": [{"name": "x-a", "string_match": {"contains": "b", "ignore_case": true}}]"#,
        r#""prefix": "/", "headers": [{"name": "x-a", "range_match": {"start": "1", "end": "9"}, "invert_match": true}]"#,
        r#""prefix": "/", "query_parameters": [{"name": "q", "present_match": true}]"#,
        r#""prefix": "/", "cookies": [{"name": "c", "string_match": {"exact": "d"}}]"#,
        r#""prefix": "/", "grpc": {}"#,
        r#""connect_matcher": {}"#,
        r#""prefix": "/", "runtime_fraction": {"default_value": {"numerator": 50}}"#,
    ];
    let many = host(&many.map(route));
    let input = |name: &str| {
        format!(
            r#"{{"name": "i", "typed_config": {{"@type": "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput", "header_name": "{name}"}}}}"#
        )
    };
    let action = |matched: &str| {
        let route = route(matched).replacen('{', r#"{"@type": "type.googleapis.com/envoy.config.route.v3.Route", "#, 1);
        format!(r#"{{"action": {{"name": "a", "typed_config": {route}}}}}"#)
    };
    let (path, header) = (input(":path"), input("x-a"));
    let single = |input: &str, value: &str| {
        format!(r#"{{"single_predicate": {{"input": {input}, "value_match": {{{value}}}}}}}"#)
    };
    let tree = format!(
        r#"{{"matcher_tree": {{"input": {path}, "prefix_match_map": {{"map": {{"/a": {}, "/a/b": {{"matcher": {{"matcher_tree":
           {{"input": {header}, "exact_match_map": {{"map": {{"b": {}}}}}}}}}}}}}}}}}, "on_no_match": {}}}"#,
        action(r#""prefix": "/a""#),
        action(r#""path": "/a/b""#),
        action(r#""prefix": "/""#)
    );
    let list = format!(
        r#"{{"matcher_list": {{"matchers": [{{"predicate": {{"or_matcher": {{"predicate": [{}, {{"not_matcher": {}}}]}}}}, "on_match": {}}}]}}}}"#,
        single(&header, r#""exact": "b""#),
        single(&path, r#""safe_regex": {"google_re2": {}, "regex": "/a.*"}"#),
        action(r#""prefix": "/a""#)
    );
    let hosts = [tree, list].map(|matcher| {
        format!(r#"{{"name": "r", "virtual_hosts": [{{"name": "v", "domains": ["*", "a.*", "*.b"], "matcher": {matcher}}}]}}"#)
    });
    let requests = [
        "GET\n/a/b?q=1\nhost:a.b\nx-a:b\ncookie:c=d; e=f",
        "POST\nhttp://a.c/A/b\nx-a:5\ncontent-type:application/grpc",
        "CONNECT\na:80\nhost:a:80",
    ];
    let configs = [many, hosts[0].clone(), hosts[1].clone()];
    let texts = configs.iter().flat_map(|config| requests.map(|request| format!("{config}\n\n{request}")));
    let inputs: Vec<_> = texts.map(String::into_bytes).collect();
    for config in &configs {
        let message = json::read::<RouteConfiguration>(config, Format::Json, UnknownFields::Reject).unwrap();
        culvert_proxy_daemon::config::parse::route_config(&message, "").unwrap();
    }
    with_mutations("routes", 13, &inputs, routes);
}

#[test]
fn tokens_and_messages() {
    use culvert_proxy_daemon::http::fuzz::{grpc_messages, grpc_web, token};
    // {"alg":"HS256","kid":"k"} and {"iss":"i","aud":["a"],"exp":1,"nbf":2.5}
    let signed = "eyJhbGciOiJIUzI1NiIsImtpZCI6ImsifQ.eyJpc3MiOiJpIiwiYXVkIjpbImEiXSwiZXhwIjoxLCJuYmYiOjIuNX0.c2ln";
    let keys = [
        r#"{"keys":[{"kty":"oct","kid":"k","k":"c2VjcmV0"}]}"#,
        r#"{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"},{"kty":"EC","crv":"P-256","x":"AQ","y":"AQ"}]}"#,
        r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AQ"}]}"#,
    ];
    let tokens = keys.map(|keys| format!("{signed}\n{keys}"));
    with_mutations("token", 14, &bytes(&tokens.each_ref().map(String::as_str)), token);
    let messages = bytes(&["\x03\0\0\0\0\x02ab\x01\0\0\0\0", "\x01\0\0\0\0\x01a\x02", "\x02\0\x7f\0\0\0"]);
    with_mutations("grpc_messages", 15, &messages, grpc_messages);
    let bodies =
        bytes(&["\x01AAAAAAVoZWxsbw==", "\x05AAAAAAA=gAAAAA9ncnBjLXN0YXR1czowDQo=", "\x02\0\0\0\0\x02ab\0\0\0\0\0"]);
    with_mutations("grpc_web", 19, &bodies, grpc_web);
}

#[test]
fn first_bytes_of_clients() {
    use culvert_proxy_daemon::listener::fuzz_client_hello;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};
    let config = ClientConfig::builder().with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    let mut client = ClientConnection::new(std::sync::Arc::new(config), "a.example".try_into().unwrap()).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    assert!(hello.len() > 100);
    with_mutations(
        "client_hello",
        16,
        &[hello, b"GET / HTTP/1.1\r\n".to_vec(), b"\x16\x03\x01\0\x04\x01\0\0\0".to_vec()],
        fuzz_client_hello,
    );
}

#[test]
fn load_reports() {
    let reports = bytes(&[
        "TEXT rps_fractional=100, cpu_utilization:0.5, named_metrics.a=1",
        r#"JSON {"rpsFractional": 100, "cpu_utilization": "0.5", "named_metrics": {"a": 1}}"#,
        "BIN CQAAAAAAAOA/MQAAAAAAAFlA",
        "CQAAAAAAAOA/MQAAAAAAAFlAOQAAAAAAAABAQg4KA3JpZhEAAAAAAAAQQA",
    ]);
    with_mutations("load_report", 17, &reports, culvert_proxy_daemon::upstream::fuzz_load_report);
}

#[test]
fn requests_and_sessions() {
    use culvert_proxy_daemon::http::fuzz::{request, session};
    let requests = bytes(&[
        "\0GET\n/a?b=c\nhost:a\nx-forwarded-for:10.0.0.1, 1.2.3.4\nconnection:close, x-a\nx-a:b\nte:trailers",
        "\x01POST\nhttp://a:80/b\nx-envoy-retry-on:5xx\nx-request-id:1\ncookie:a=b\ngrpc-timeout:10S",
        "\x0cGET\n/\nhost:a\nx-ip:10.1.2.3\nx-forwarded-for:1.2.3.4,10.0.0.8\nlocation:https://u@b/c#d",
        "\x40CONNECT\na:80\nhost:a:80\nupgrade:websocket\nconnection:upgrade",
    ]);
    with_mutations("request", 20, &requests, request);
    let sessions =
        ["s=\"Cg4xMjcuMC4wLjE6ODA4MBCAgICABg==\"", "MTI3LjAuMC4xOjgw", "MTI3LjAuMC4xOjgw;UV:b3du", "127.0.0.1:80"];
    with_mutations("session", 21, &bytes(&sessions), session);
}

#[test]
fn bodies_that_are_compressed() {
    use std::io::Write as _;
    const TEXT: &[u8] = b"hello hello hello";
    // As Python's `gzip` has it.
    let gzip = b"\x1f\x8b\x08\0\0\0\0\0\x02\x03\xcb\x48\xcd\xc9\xc9\x57\xc8\x40\x90\0\x80\x88\xf9\xe5\x11\0\0\0";
    let mut brotli = brotli::CompressorWriter::new(Vec::new(), 4096, 3, 18);
    brotli.write_all(TEXT).unwrap();
    let zstd = zstd::encode_all(TEXT, 3).unwrap();
    // In pieces of five bytes, and with more behind the end.
    let inputs = [[b"\x0c", &gzip[..]], [b"\x0d", &brotli.into_inner()], [b"\x0e", &zstd], [b"\0", TEXT]]
        .map(|parts| parts.concat());
    let twice = [&inputs[2][..], &inputs[2][1..]].concat();
    let inputs: Vec<_> = inputs.into_iter().chain([twice]).collect();
    with_mutations("compression", 22, &inputs, culvert_proxy_daemon::http::fuzz::compression);
}

#[test]
fn certificates() {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};
    let mut params = CertificateParams::new(["a.example".to_owned(), "10.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "a, b");
    params.distinguished_name.push(DnType::OrganizationName, "\u{e9} <c>");
    for uri in ["spiffe://a/b", "http://c"] {
        params.subject_alt_names.push(SanType::URI(uri.try_into().unwrap()));
    }
    params.subject_alt_names.push(SanType::Rfc822Name("a@b".try_into().unwrap()));
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap().der().to_vec();
    with_mutations("certificate", 23, &[certificate], culvert_proxy_daemon::tls::fuzz_certificate);
}

#[test]
fn overrides() {
    use culvert_xds_client::overrides::Overrides;
    let item = Overrides::new([("users", "feature-x"), ("a.b", "c")]).unwrap().to_baggage_item();
    let baggage = format!("\0k=v,{item};p=1");
    with_mutations(
        "overrides",
        24,
        &bytes(&[&baggage, &format!("\x01{item}"), "\x02AA=="]),
        culvert_xds_client::overrides::fuzz,
    );
}
