//! Shares and tunnels of the built program: its API, each storage, and who may use it.

mod support;

use serde_json::{Value, json};
use support::{Program, RedisServer};

const SHARE: &str = r#"{"name": "checkout", "overrides": [{"service": "users", "revision": "x"}], "expires_in": 600}"#;
const JSON: &str = "Content-Type: application/json\r\n";

/// Makes a share; gives what is answered.
fn create(program: &Program, share: &str) -> (u16, Value) {
    let (status, _, body) = program.request("POST", "/overrides/shares", JSON, share);
    (status, serde_json::from_str(&body).unwrap())
}

/// How many shares proxies are told of.
fn served(status: &Value) -> u64 {
    let kind = "type.googleapis.com/culvert.overrides.v1.OverrideShare";
    status["served"]["culvert"][kind]["resources"].as_u64().unwrap()
}

#[test]
fn in_memory() {
    let program = Program::start(&["--registration", "memory"]);
    assert_eq!(program.json("/overrides/shares"), json!([]));
    let (status, made) = create(&program, SHARE);
    assert_eq!((status, &made["name"], &made["unlisted"]), (201, &json!("checkout"), &json!(["users=x"])));
    let token = made["token"].as_str().unwrap();
    for name in ["checkout", token] {
        let found = program.json(&format!("/overrides/shares/{name}"));
        assert_eq!((&found["token"], &found["expired"]), (&json!(token), &json!(false)));
    }
    program.until("/status", "proxies to be told", |status| served(status) == 1);
    let (status, refused) = create(&program, SHARE);
    assert!(status == 409 && refused["error"].as_str().unwrap().contains("there is a share `checkout`"), "{refused}");
    assert_eq!(program.request("DELETE", "/overrides/shares/checkout", "", "").0, 200);
    assert_eq!(program.request("DELETE", "/overrides/shares/checkout", "", "").0, 404);
    program.until("/status", "proxies to be told", |status| served(status) == 0);
}

#[test]
fn what_is_wrong_is_said() {
    let program = Program::start(&["--registration", "memory"]);
    let large = "x".repeat(64 * 1024 + 1);
    for (method, path, headers, body, expected, reason) in [
        ("POST", "/overrides/shares", "", SHARE, 415, "content-type application/json"),
        ("POST", "/overrides/shares", JSON, "{", 400, "the body is not a share"),
        ("POST", "/overrides/shares", JSON, r#"{"name": "a", "more": 1}"#, 400, "unknown field `more`"),
        ("POST", "/overrides/shares", JSON, &large, 413, "larger than 65536"),
        ("PUT", "/overrides/shares", JSON, SHARE, 405, "GET, POST and DELETE"),
        ("GET", "/overrides/shares/nobody", "", "", 404, "there is no share `nobody`"),
        ("GET", "/overrides/other", "", "", 404, "the paths are /overrides/shares"),
        ("GET", "/overrides/tunnels", "", "", 403, "tunnels need `overrides.token_file`"),
    ] {
        let (status, _, body) = program.request(method, path, headers, body);
        assert!(status == expected && body.contains(reason), "{method} {path}: {status} {body}");
    }
}

#[test]
fn with_a_token_only_who_has_it_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, "secret\n").unwrap();
    let flags = ["--registration", "memory", "--developer-token-file", file.to_str().unwrap()];
    let program = Program::start(&[&flags[..], &["--tunnels", "127.0.0.1:20000-32000"]].concat());
    let ask = |path: &str, headers: &str| program.request("GET", path, headers, "");
    assert_eq!(ask("/overrides/shares", "").0, 401);
    assert_eq!(ask("/overrides/shares", "Authorization: Bearer wrong\r\n").0, 401);
    assert_eq!(ask("/overrides/shares", "Authorization: Bearer secret\r\n").0, 200);
    assert_eq!(ask("/overrides/tunnels", "").0, 401);
    let (status, _, body) = ask("/overrides/tunnels", "Authorization: Bearer secret\r\n");
    assert!(status == 426 && body.contains("Upgrade: culvert-tunnel"), "{status} {body}");
    let upgrade = "Authorization: Bearer secret\r\nConnection: Upgrade\r\nUpgrade: culvert-tunnel\r\n";
    let (status, _, body) = ask("/overrides/tunnels", upgrade);
    assert!(status == 400 && body.contains("the header x-culvert-service is missing"), "{status} {body}");
    // Whoever opens one and says nothing has no tunnel.
    let named = "x-culvert-service: users\r\nx-culvert-revision: me\r\nx-culvert-session: 1\r\n";
    let (status, _, body) = ask("/overrides/tunnels", &format!("{upgrade}{named}"));
    assert!(status == 404 && body.contains("there is no service users.default"), "{status} {body}");
}

#[test]
fn in_redis_shared_by_replicas_and_through_the_loss_of_its_data() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("redis.sock");
    let storage = format!("redis+unix://{}", socket.display());
    let server = RedisServer::start(&socket);
    let flags = ["--registration", "memory", "--shares", &storage];
    let (one, two) = (Program::start(&flags), Program::start(&flags));
    let (status, made) = create(&one, SHARE);
    assert_eq!(status, 201);
    two.until("/status", "the other replica to tell of it", |status| served(status) == 1);
    assert_eq!(two.json("/overrides/shares/checkout")["token"], made["token"]);
    assert_eq!(create(&two, SHARE).0, 409);
    let other = SHARE.replace("checkout", "other");
    assert_eq!(create(&two, &other).0, 201);
    assert_eq!(two.request("DELETE", "/overrides/shares/other", "", "").0, 200);
    one.until("/status", "one share", |status| status["shares"].as_array().unwrap().len() == 1);

    drop(server);
    one.until("/status", "the loss of the server", |status| !status["share_storage"]["error"].is_null());
    let (status, refused) = create(&one, &other);
    assert!(status == 503 && refused["error"].as_str().unwrap().contains("cannot be written at present"), "{refused}");
    // What was told stays.
    assert_eq!(served(&one.json("/status")), 1);

    std::fs::remove_file(&socket).ok();
    let _server = RedisServer::start(&socket);
    two.until("/status", "the server's return", |status| status["share_storage"]["error"].is_null());
    assert_eq!(two.json("/overrides/shares/checkout")["token"], made["token"]);
    // It was written back: one that comes now has it too.
    let three = Program::start(&flags);
    three.until("/status", "what was written back", |status| served(status) == 1);
}
