//! compressor, decompressor.

use super::harness::{By, Case, case};

const COMPRESSOR: &str = "compressor.v3.Compressor";
const COMPRESSOR_PER_ROUTE: &str = "compressor.v3.CompressorPerRoute";
const DECOMPRESSOR: &str = "decompressor.v3.Decompressor";

pub fn cases() -> Vec<Case> {
    let all = [responses(), chains(), requests(), decompressed()].concat();
    all.into_iter().map(Case::of_own_lengths).collect()
}

fn library(direction: &str, name: &str, fields: &str) -> String {
    let message = match name {
        "gzip" => "Gzip",
        "brotli" => "Brotli",
        _ => "Zstd",
    };
    format!(
        "{direction}_library: {{name: text, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.compression.{name}.{direction}.v3.{message}, {fields}}}}}"
    )
}

fn compressor(name: &str, fields: &str) -> String {
    format!("{}, {fields}", library("compressor", name, ""))
}

fn responses() -> Vec<Case> {
    let gzip = |fields: &str| compressor("gzip", fields);
    let long = "x-do: 200+bytes=5000";
    let asked = |words: &str| format!("GET /\naccept-encoding: gzip\nx-do: 200+bytes=5000{words}");
    let accepts = [
        "gzip",
        "br",
        "*",
        "identity",
        "gzip;q=0",
        "*;q=0",
        "gzip;q=0.5, identity",
        "identity;q=0.5, gzip;q=0.6",
        "GZIP",
        "gzip;q=x",
        "deflate, gzip;q=1.0, *;q=0.5",
        "",
        ",",
        "gzip;v=1",
        " gzip ; q = 0.1 ",
    ];
    let accepts = accepts.map(|accept| format!("GET /\naccept-encoding: {accept}\n{long}"));
    let accepts: Vec<&str> = accepts.iter().map(String::as_str).collect();
    let kinds = [
        asked(""),
        asked("+bytes=29"),
        asked("+bytes=30"),
        asked("+bytes=0"),
        asked("+etag=W/\"1\""),
        asked("+etag=\"strong\""),
        asked("+vary=accept-encoding"),
        asked("+vary=x-a"),
        asked("+cache-control=private; no-transform"),
        asked("+cache-control=no-transform"),
        asked("+content-encoding=deflate"),
        format!("HEAD /\naccept-encoding: gzip\n{long}"),
        "GET /direct\naccept-encoding: gzip".to_owned(),
        "GET /\naccept-encoding: gzip\nx-do: 404+bytes=100".to_owned(),
        "GET /\naccept-encoding: gzip\nx-do: 206+bytes=100".to_owned(),
        "GET /\naccept-encoding: gzip\nx-do: reset".to_owned(),
        "GET /\naccept-encoding: gzip\nx-do: 200+bytes=200000".to_owned(),
        format!("GET /\naccept-encoding: br\naccept-encoding: gzip\n{long}"),
        format!("GET /\n{long}"),
    ];
    let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
    let response = |fields: &str| gzip(&format!("response_direction_config: {{{fields}}}"));
    let json = "common_config: {content_type: [application/json]}";
    let mut cases = vec![
        case("accept-encoding", COMPRESSOR, &gzip(""), &accepts),
        case("responses", COMPRESSOR, &gzip(""), &kinds),
        case("responses, by their direction", COMPRESSOR, &response(""), &kinds),
        case("min_content_length", COMPRESSOR, &response("common_config: {min_content_length: 5001}"), &kinds),
        case("content_type", COMPRESSOR, &response(json), &kinds),
        case(
            "content_type_matcher",
            COMPRESSOR,
            &response("common_config: {content_type_matcher: [{prefix: text/}, {exact: a/b}]}"),
            &kinds,
        ),
        case("disable_on_etag_header", COMPRESSOR, &response("disable_on_etag_header: true"), &kinds),
        case(
            "weaken_etag_on_compress",
            COMPRESSOR,
            &response("disable_on_etag_header: true, weaken_etag_on_compress: true"),
            &kinds,
        ),
        case("uncompressible_response_codes", COMPRESSOR, &response("uncompressible_response_codes: [206]"), &kinds),
        case("remove_accept_encoding_header", COMPRESSOR, &response("remove_accept_encoding_header: true"), &kinds),
        case("disabled", COMPRESSOR, &response("common_config: {enabled: {default_value: false}}"), &kinds[..4]),
    ];
    for (name, fields) in [
        (
            "gzip",
            "memory_level: 9, window_bits: 15, compression_level: BEST_COMPRESSION, compression_strategy: FILTERED",
        ),
        ("gzip", "compression_level: BEST_SPEED, window_bits: 9, memory_level: 1, chunk_size: 65536"),
        ("brotli", ""),
        ("brotli", "quality: 11, window_bits: 10, input_block_bits: 16, encoder_mode: TEXT, chunk_size: 4096"),
        ("zstd", ""),
        ("zstd", "compression_level: 19, enable_checksum: true, strategy: BTULTRA2"),
    ] {
        let requests = ["gzip", "br", "zstd"].map(|coding| {
            [100, 300_000].map(|bytes| format!("GET /\naccept-encoding: {coding}\nx-do: 200+bytes={bytes}"))
        });
        let requests: Vec<&str> = requests.iter().flatten().map(String::as_str).collect();
        cases.push(case("libraries", COMPRESSOR, &library("compressor", name, fields), &requests));
    }
    let routes = ["/", "/plain", "/direct"].map(|path| format!("GET {path}\naccept-encoding: gzip\n{long}"));
    let routes: Vec<&str> = routes.iter().map(String::as_str).collect();
    cases.extend([
        case("by route", COMPRESSOR, &gzip(""), &routes).told(By::Route, COMPRESSOR_PER_ROUTE, "disabled: true"),
        case(
            "by route only",
            COMPRESSOR,
            &response("common_config: {enabled: {default_value: false}}, remove_accept_encoding_header: true"),
            &routes,
        )
        .told(By::Route, COMPRESSOR_PER_ROUTE, "overrides: {response_direction_config: {}}"),
        case("by route, keeps accept-encoding", COMPRESSOR, &response("remove_accept_encoding_header: true"), &routes)
            .told(
                By::Route,
                COMPRESSOR_PER_ROUTE,
                "overrides: {response_direction_config: {remove_accept_encoding_header: false}}",
            ),
    ]);
    cases
}

fn chains() -> Vec<Case> {
    let requests = ["gzip, br", "br;q=0.5, gzip;q=0.4", "*", "gzip;q=0, *", "zstd", "br, gzip, zstd"]
        .map(|accept| format!("GET /\naccept-encoding: {accept}\nx-do: 200+bytes=5000"));
    let requests: Vec<&str> = requests.iter().map(String::as_str).collect();
    vec![
        case("chain", COMPRESSOR, &compressor("gzip", ""), &requests).then(COMPRESSOR, &compressor("brotli", "")),
        case("chain, choose_first", COMPRESSOR, &compressor("gzip", ""), &requests)
            .then(COMPRESSOR, &compressor("brotli", "choose_first: true"))
            .then(COMPRESSOR, &compressor("zstd", "choose_first: true")),
        case(
            "chain, by content type",
            COMPRESSOR,
            &compressor("gzip", "response_direction_config: {common_config: {content_type: [text/html]}}"),
            &requests,
        )
        .then(COMPRESSOR, &compressor("brotli", "")),
        // What answers in between keeps the request from the second.
        case("chain, answered in between", COMPRESSOR, &compressor("gzip", ""), &requests)
            .then("fault.v3.HTTPFault", "abort: {http_status: 418, percentage: {numerator: 100}, response_body: \"a long text, longer than thirty\"}")
            .then(COMPRESSOR, &compressor("brotli", "")),
    ]
}

/// They are sent on and come back through a decompressor, so that what the service gets is compared.
fn requests() -> Vec<Case> {
    let text = "a text that is a good deal longer than thirty bytes: more or less";
    let requests = [
        format!("POST /\ncontent-type: text/plain\n\n{text}"),
        format!("POST /\n\n{text}"),
        "POST /\ncontent-type: text/plain\n\nshort".to_owned(),
        format!("POST /\ncontent-type: image/png\n\n{text}"),
        format!("POST /\ncontent-type: text/plain\ncontent-encoding: br\n\n{text}"),
        "POST /\ntransfer-encoding: chunked\n\n5\r\nabcde\r\n5\r\nfghij\r\n0\r\n\r\n".to_owned(),
        format!("POST /direct\n\n{text}"),
        "GET /".to_owned(),
    ];
    let requests: Vec<&str> = requests.iter().map(String::as_str).collect();
    let of = |fields: &str| compressor("gzip", &format!("request_direction_config: {{{fields}}}"));
    vec![
        case("requests", COMPRESSOR, &of(""), &requests).then(DECOMPRESSOR, &library("decompressor", "gzip", "")),
        case("requests, disabled", COMPRESSOR, &of("common_config: {enabled: {default_value: false}}"), &requests),
        case("requests, short ones too", COMPRESSOR, &of("common_config: {min_content_length: 1}"), &requests)
            .then(DECOMPRESSOR, &library("decompressor", "gzip", "")),
    ]
}

fn decompressed() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, coding) in [("gzip", "gzip"), ("brotli", "br"), ("zstd", "zstd")] {
        let requests = [
            format!("GET /\nx-do: 200+{coding}=1000"),
            format!("GET /\nx-do: 200+{coding}=1000\naccept-encoding: deflate, {coding};q=0.5"),
            format!("GET /\nx-do: 200+{coding}=1000+cache-control=no-transform"),
            format!("GET /\nx-do: 200+bytes=200+content-encoding={coding}"),
            "GET /\nx-do: 200+content-encoding=deflate".to_owned(),
            format!("HEAD /\nx-do: 200+{coding}=1000"),
            "GET /".to_owned(),
            "GET /direct".to_owned(),
        ];
        let mut requests: Vec<&str> = requests.iter().map(String::as_str).collect();
        // Envoy counts what is no brotli once more for every piece that comes.
        requests.retain(|request| name != "brotli" || !request.contains("bytes="));
        let of = |fields: &str| format!("{}, {fields}", library("decompressor", name, ""));
        cases.extend([
            case("decompressed", DECOMPRESSOR, &of(""), &requests),
            case(
                "decompressed, no-transform, not advertised",
                DECOMPRESSOR,
                &of("response_direction_config: {common_config: {ignore_no_transform_header: true}}, \
                     request_direction_config: {advertise_accept_encoding: false}"),
                &requests,
            ),
            case(
                "decompressed, disabled",
                DECOMPRESSOR,
                &of("response_direction_config: {common_config: {enabled: {default_value: false}}}"),
                &requests,
            ),
        ]);
    }
    let gzip = library("decompressor", "gzip", "max_inflate_ratio: 1, window_bits: 15, chunk_size: 4096");
    cases.push(case(
        "max_inflate_ratio",
        DECOMPRESSOR,
        &gzip,
        &["GET /\nx-do: 200+gzip=60000", "GET /\nx-do: 200+gzip=3000000", "GET /\nx-do: 200+gzip=100"],
    ));
    cases
}
