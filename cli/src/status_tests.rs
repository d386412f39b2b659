use std::io::{Read as _, Write as _};
use std::net::TcpListener;

use serde_json::json;

use super::*;

fn status() -> Value {
    json!({
        "clusters": [{
            "name": "east", "region": "eu", "zone": "", "services": 1, "pods": 2,
            "source": {
                "location": "/m/east", "stale": false, "error": null, "warnings": [],
                "file_errors": [{"file": "/m/east/a.yaml", "error": "not valid YAML", "last_good_in_force": true}],
            },
        }],
        "services": [{
            "envoy_cluster": "users.default:80", "protocol": "http", "vips": ["10.0.0.1"], "clusters": ["east", "west"],
            "endpoints": [{"health": "healthy"}, {"health": "draining"}],
            "offloaded": [{"revision": "x", "address": "10.1.0.9:80", "pod": "default/u", "cluster": "east"}],
        }],
        "warnings": ["something is odd"],
        "clients": [{
            "node": "n1", "peer": "127.0.0.1:5", "user_agent": "envoy", "role": "edge", "variant": "delta",
            "types": {"a.v3.Cluster": {"sent": "2", "acked": "1", "nack": {"version": "2", "reason": "no"}}},
        }],
    })
}

/// Answers one request with these bytes.
fn serve_once(response: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            connection.read_exact(&mut byte).unwrap();
            request.extend(byte);
        }
        assert!(request.starts_with(b"GET /status HTTP/1.0\r\n"));
        connection.write_all(response.as_bytes()).unwrap();
    });
    url
}

#[test]
fn tables_show_what_matters() {
    let text = tables(&status());
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    for row in [
        &["east", "eu", "-", "1", "2", "/m/east", "1", "bad", "file"][..],
        &["users.default:80", "http", "10.0.0.1", "1", "(+1", "draining)", "east,west"],
        &["users.default:80", "x", "10.1.0.9:80", "default/u", "east"],
        &["n1", "127.0.0.1:5", "envoy", "edge", "delta", "rejected", "the", "newest", "configuration"],
    ] {
        assert!(rows.iter().any(|found| found == row), "{row:?} is not in\n{text}");
    }
    assert!(text.contains("/m/east/a.yaml: not valid YAML (the last good version stays in force)"), "{text}");
    assert!(text.contains("n1 rejected Cluster version 2: no") && text.contains("something is odd"), "{text}");
}

#[test]
fn what_was_never_read_does_not_stay_in_force() {
    let cluster = |name: &str, read: bool| json!({ "name": name, "read": read, "source": { "error": "refused" } });
    let status = json!({
        "clusters": [cluster("east", true), cluster("west", false), { "name": "slow", "read": false, "source": {} }],
        "client_problems": [{ "node": "n1", "problem": "is a gateway" }],
    });
    assert_eq!(
        problems(&status),
        [
            "cluster east: refused; its last objects stay in force",
            "cluster west: refused; it has never been read, and is left out",
            "cluster slow: not all of it has been read yet; it is left out",
            "node n1: is a gateway",
        ]
    );
}

#[test]
fn an_empty_mesh_is_not_an_error() {
    assert_eq!(
        tables(&json!({})),
        "CLUSTERS: none\n\nSERVICES: none\n\nOFFLOADED: none\n\nTUNNELS: none\n\nSHARES: none\n\nPROXIES: none\n"
    );
}

#[test]
fn the_status_is_fetched() {
    let body = status().to_string();
    let url = serve_once(format!("HTTP/1.0 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    let text = run(&Flags { discovery: url, output: Output::Json }).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), status());
}

#[test]
fn failures_say_what_to_do_next() {
    // Nobody listens there any more once the listener is dropped.
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let cases = [
        (format!("http://{unused}"), "is culvert-discovery running with --http at that address?"),
        ("https://localhost".to_owned(), "`https` URLs are not supported"),
        ("http://".to_owned(), "is not of the form http://HOST:PORT"),
        (serve_once("HTTP/1.0 404 Not Found\r\n\r\nno such page".to_owned()), "404: no such page"),
        (serve_once("HTTP/1.0 200 OK\r\n\r\n<html>".to_owned()), "is not the status page of culvert-discovery"),
        (serve_once("HTTP/1.0 200 OK\r\n\r\n".to_owned()), "is that its --http address? It answered with nothing"),
        (serve_once("HTTP/1.0 200 OK\r\ncontent-length: 9\r\n\r\n{}".to_owned()), "too early"),
        (serve_once("SSH-2.0-OpenSSH\r\n".to_owned()), "does not speak HTTP"),
    ];
    for (discovery, expected) in cases {
        let error = format!("{:#}", run(&Flags { discovery, output: Output::Text }).unwrap_err());
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
    }
}
