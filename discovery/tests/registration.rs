//! The registration API of the built program, with each storage.

mod support;

use std::io::Write as _;

use serde_json::{Value, json};
use support::{Program, RedisServer};

/// A registration as a cron job sends it: `curl -d ip=... --data-urlencode tags=...`.
fn form(ip: &str, tags: &str) -> String {
    let tags = format!(r#"{{"az": "eu-1a", "region": "eu", "instance_id": "i-1"{tags}}}"#);
    let escaped: String = tags.bytes().map(|byte| format!("%{byte:02X}")).collect();
    format!("ip={ip}&port=9211&revision=0123abcd&service_repo_name=users-repo&tags={escaped}")
}

fn ok() -> (u16, String) {
    (200, "{}\n".to_owned())
}

/// The addresses of a service's endpoints in the mesh.
fn endpoints(status: &Value, cluster: &str) -> Vec<String> {
    let services = status["services"].as_array().unwrap().iter();
    let found = services.filter(|service| service["envoy_cluster"] == cluster);
    found
        .flat_map(|service| service["endpoints"].as_array().unwrap())
        .map(|e| e["address"].as_str().unwrap().to_owned())
        .collect()
}

/// What every storage has to do.
fn exercise(program: &Program) {
    let empty = json!({ "service": "users", "env": "development", "hosts": [] });
    assert_eq!(program.json("/v1/registration/users"), empty);
    assert_eq!(program.post("/v1/registration/users", &form("10.0.0.1", "")), ok());
    assert_eq!(program.post("/v1/registration/users", &form("10.0.0.2", r#", "canary": true"#)), ok());
    assert_eq!(program.post("/v1/registration/users", "ip=10.0.0.3"), (400, "{}\n".to_owned()));
    assert_eq!(program.post("/v1/loadbalancing/users/10.0.0.1", "load_balancing_weight=9"), (204, String::new()));
    assert_eq!(program.post("/v1/loadbalancing/users/10.0.0.9", "load_balancing_weight=9").0, 404);
    // The heartbeat after it.
    assert_eq!(program.post("/v1/registration/users", &form("10.0.0.1", "")), ok());

    // As `curl -F` sends it, by curl itself.
    let tags = r#"tags={"az": "eu-1a", "region": "eu", "instance_id": "i-1"}"#;
    let fields =
        ["-F", "ip=10.0.0.2", "-F", "port=9211", "-F", "revision=0123abcd", "-F", "service_repo_name=users-repo"];
    let curl = std::process::Command::new("curl")
        .args(["-sS", "-m", "20", "-w", "%{http_code}"])
        .args(fields)
        .args(["-F", tags, &format!("http://{}/v1/registration/users", program.http)])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&curl.stdout), "{}\n200", "{curl:?}");

    let answer = program.json("/v1/registration/users");
    let mut host = answer["hosts"][0].clone();
    let heard = host.as_object_mut().unwrap().remove("last_check_in").unwrap();
    assert!(heard.as_str().unwrap().ends_with("+00:00"), "{heard}");
    let tags = json!({ "az": "eu-1a", "region": "eu", "instance_id": "i-1", "load_balancing_weight": 9 });
    let expected = json!({
        "service": "users", "ip_address": "10.0.0.1", "port": 9211, "revision": "0123abcd",
        "service_repo_name": "users-repo", "tags": tags,
    });
    assert_eq!(host, expected);
    assert_eq!(answer["hosts"][1]["tags"]["canary"], true);
    assert_eq!(program.json("/v1/registration/repo/users-repo")["hosts"].as_array().unwrap().len(), 2);

    let status = program.until("/status", "both endpoints", |status| {
        endpoints(status, "users.default:80") == ["10.0.0.1:9211", "10.0.0.2:9211"]
            && status["services"][0]["endpoints"][0]["weight"] == 9
    });
    let endpoint = json!({
        "address": "10.0.0.2:9211", "health": "healthy", "cluster": "registered", "region": "eu", "zone": "eu-1a",
        "weight": 1, "canary": true,
    });
    assert_eq!(status["services"][0]["endpoints"][1], endpoint);

    assert_eq!(program.request("DELETE", "/v1/registration/users/10.0.0.2", "", "").0, 200);
    let again = program.request("DELETE", "/v1/registration/users/10.0.0.2", "", "");
    assert_eq!((again.0, &*again.2), (400, "{}\n"));
    program.until("/status", "one endpoint", |status| endpoints(status, "users.default:80") == ["10.0.0.1:9211"]);
}

#[test]
fn in_memory() {
    let program = Program::start(&["--registration", "memory"]);
    exercise(&program);
    let (_, head, body) = program.request("GET", "/v1/registration/nobody", "", "");
    assert!(head.to_ascii_lowercase().contains("content-type: application/json"), "{head}");
    assert_eq!(body, "{\"env\": \"development\", \"hosts\": [], \"service\": \"nobody\"}\n");
    assert_eq!(program.page("/healthcheck"), "OK");
}

#[test]
fn without_the_flag_there_is_no_such_api() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(&["--cluster", &format!("east={}", directory.path().display())]);
    assert_eq!(program.request("GET", "/v1/registration/users", "", "").0, 404);
    assert_eq!(program.post("/v1/registration/users", &form("10.0.0.1", "")).0, 405);
    assert_eq!(program.json("/status")["registrations"], Value::Null);
}

#[test]
fn in_a_file_that_outlives_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let storage = format!("redb:{}", directory.path().join("registrations.redb").display());
    let program = Program::start(&["--registration", &storage]);
    exercise(&program);
    let before = program.json("/v1/registration/users");
    // Not asked to end, but killed.
    program.kill();
    let program = Program::start(&["--registration", &storage]);
    assert_eq!(program.json("/v1/registration/users")["hosts"][0]["tags"], before["hosts"][0]["tags"]);
    assert_eq!(endpoints(&program.json("/status"), "users.default:80"), ["10.0.0.1:9211"]);
    // The file has one owner.
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_culvert-discovery"))
        .args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--registration", &storage])
        .output()
        .unwrap();
    let error = String::from_utf8(second.stderr).unwrap();
    assert!(!second.status.success() && error.contains("one process can use it at a time"), "{error}");
}

#[test]
fn in_redis_shared_by_replicas_and_through_the_loss_of_its_data() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("redis.sock");
    let storage = format!("redis+unix://{}", socket.display());
    let server = RedisServer::start(&socket);
    let one = Program::start(&["--registration", &storage]);
    exercise(&one);
    let two = Program::start(&["--registration", &storage]);
    assert_eq!(endpoints(&two.json("/status"), "users.default:80"), ["10.0.0.1:9211"]);
    // What one replica was told the other one answers at once, and its mesh follows.
    assert_eq!(one.post("/v1/registration/orders", &form("10.0.0.5", "")), ok());
    assert_eq!(two.json("/v1/registration/orders")["hosts"][0]["ip_address"], "10.0.0.5");
    two.until("/status", "the other replica's host", |status| {
        endpoints(status, "orders.default:80") == ["10.0.0.5:9211"]
    });
    assert_eq!(two.post("/v1/loadbalancing/orders", "load_balancing_weight=3").0, 204);
    assert_eq!(one.json("/v1/registration/orders")["hosts"][0]["tags"]["load_balancing_weight"], 3);
    // What a replica has not heard of yet it cannot write back.
    one.until("/status", "the weight", |status| {
        status["services"].as_array().unwrap().iter().any(|service| service["endpoints"][0]["weight"] == 3)
    });

    drop(server);
    one.until("/status", "the loss of the server", |status| status["registrations"]["stale"] == true);
    let (status, body) = one.post("/v1/registration/orders", &form("10.0.0.6", ""));
    assert!(status == 503 && body.contains("cannot be written at present"), "{status} {body}");
    assert_eq!(one.json("/v1/registration/orders")["hosts"].as_array().unwrap().len(), 1);
    assert_eq!(endpoints(&one.json("/status"), "orders.default:80"), ["10.0.0.5:9211"]);

    // The new server is empty: nobody is forgotten.
    std::fs::remove_file(&socket).ok();
    let _server = RedisServer::start(&socket);
    two.until("/status", "the server's return", |status| status["registrations"]["stale"] == false);
    two.until("/v1/registration/orders", "what was written back", |answer| {
        answer["hosts"][0]["tags"]["load_balancing_weight"] == 3
    });
    assert_eq!(endpoints(&two.json("/status"), "orders.default:80"), ["10.0.0.5:9211"]);
}

#[test]
fn hosts_that_fall_silent_go() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("discovery.yaml");
    std::fs::write(
        &config,
        "registration: {storage: memory, ttl: 1, env: staging, namespace: vms, port: 81, protocol: grpc}\n",
    )
    .unwrap();
    let program = Program::start(&["--config", config.to_str().unwrap()]);
    assert_eq!(program.post("/v1/registration/users", &form("10.0.0.1", "")), ok());
    let status = program.until("/status", "the endpoint", |status| !endpoints(status, "users.vms:81").is_empty());
    assert_eq!(status["services"][0]["protocol"], "grpc");
    program.until("/status", "the endpoint to go", |status| endpoints(status, "users.vms:81").is_empty());
    let none = json!({ "service": "users", "env": "staging", "hosts": [] });
    assert_eq!(program.json("/v1/registration/users"), none);
}

#[test]
fn the_caller_s_address_is_the_last_proxy_s_word() {
    let program = Program::start(&["--registration", "memory"]);
    let form = form("", "").replace("ip=&", "auto_ip=True&");
    let post = |forwarded: &str| {
        let headers = format!("Content-Type: application/x-www-form-urlencoded\r\n{forwarded}");
        let (status, head, _) = program.request("POST", "/v1/registration/users", &headers, &form);
        (status, head)
    };
    assert_eq!(post("X-Forwarded-For: 192.168.0.0,192.168.216.186\r\n").0, 200);
    assert_eq!(program.json("/v1/registration/users")["hosts"][0]["ip_address"], "192.168.216.186");
    let (status, head) = post("X-Forwarded-For: 192.168.216.186, 192.169.1.1\r\n");
    assert!(status == 400 && head.contains("192.169.1.1 is not in 192.168.0.0/16"), "{head}");
    let (status, head) = post("");
    assert!(status == 400 && head.contains("127.0.0.1 is not in"), "{head}");
}

#[test]
fn large_and_endless_bodies_are_refused() {
    let program = Program::start(&["--registration", "memory"]);
    let (status, body) = program.post("/v1/registration/users", &"x".repeat(64 * 1024 + 1));
    assert_eq!((status, &*body), (413, "{\"error\": \"the body is larger than 65536 bytes\"}\n"));
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    let request =
        format!("POST /v1/registration/users HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}{chunk}");
    let (status, head, _) = program.raw(&request);
    assert!(status == 413 && head.to_ascii_lowercase().contains("connection: close"), "{head}");
    // Who is refused leaves nothing behind.
    assert_eq!(program.json("/status")["registrations"]["hosts"], 0);
    let mut half = std::net::TcpStream::connect(program.http).unwrap();
    half.write_all(b"POST /v1/registration/users HTTP/1.1\r\nHost: d\r\nContent-Length: 100\r\n\r\nip=").unwrap();
    drop(half);
    assert_eq!(program.page("/healthcheck"), "OK");
}
