use std::time::{Duration, SystemTime};

use culvert_xds_client::json::from_yaml;
use serde_json::Value;

use super::*;

const RESPONSE: &str = r#"
config:
- node: { id: n1 }
  xds_config:
  - cluster_config:
      dynamic_warming_clusters:
      - { version_info: "8", cluster: { "@type": type.googleapis.com/envoy.config.cluster.v3.Cluster, name: cold },
          last_updated: "2023-11-14T22:13:20Z", error_state: { details: "waits for the endpoints \"cold\"" } }
  - route_config:
      dynamic_route_configs:
      - { version_info: "2", route_config: { "@type": type.googleapis.com/envoy.config.route.v3.RouteConfiguration,
          name: web }, error_state: { details: "waits for the cluster \"cold\"" } }
  - listener_config:
      dynamic_listeners:
      - { name: in, warming_state: { version_info: "9", last_updated: "2023-11-14T22:13:25Z" } }
      - { name: fixed, warming_state: {} }
      - { name: bare, active_state: {}, error_state: { details: "serves without the secret \"own\"" } }
  generic_xds_configs:
  - { type_url: type.googleapis.com/envoy.config.route.v3.RouteConfiguration, name: later, client_status: REQUESTED }
  - { type_url: type.googleapis.com/envoy.config.route.v3.RouteConfiguration, name: gone, client_status: DOES_NOT_EXIST,
      error_state: { details: not sent } }
  - { type_url: type.googleapis.com/envoy.config.route.v3.RouteConfiguration, name: web, version_info: "1",
      client_status: ACKED }
  - { type_url: type.googleapis.com/envoy.config.listener.v3.Listener, name: in, version_info: "7", client_status: ACKED,
      last_updated: "2023-11-14T22:13:20Z" }
  - { type_url: type.googleapis.com/envoy.config.listener.v3.Listener, name: fixed, is_static_resource: true,
      last_updated: "2023-11-14T22:13:20Z" }
  - { type_url: type.googleapis.com/envoy.config.listener.v3.Listener, name: bare, version_info: "7", client_status: ACKED }
  - { type_url: type.googleapis.com/envoy.config.cluster.v3.Cluster, name: users, version_info: "7", client_status: ACKED,
      last_updated: "2023-11-14T22:13:20Z" }
  - { type_url: type.googleapis.com/envoy.config.cluster.v3.Cluster, name: cold, version_info: "8", client_status: ACKED,
      last_updated: "2023-11-14T22:13:20Z" }
  - { type_url: type.googleapis.com/envoy.config.cluster.v3.Cluster, name: xds, is_static_resource: true }
  - type_url: type.googleapis.com/envoy.config.cluster.v3.Cluster
    name: bad
    version_info: "6"
    client_status: NACKED
    last_updated: "2023-11-14T21:13:20Z"
    error_state:
      version_info: "8"
      details: "lb_policy: not supported\n\e[31m by culvert yet, and a very long explanation of why that is so"
  - { type_url: type.googleapis.com/culvert.overrides.v1.OffloadedService, name: o, version_info: a, client_status: ACKED }
"#;

fn some_rows() -> Vec<Row> {
    rows::of(&from_yaml(RESPONSE).unwrap())
}

fn parse(arguments: &[&str]) -> Result<Flags, clap::Error> {
    use clap::Parser;
    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        flags: Flags,
    }
    Command::try_parse_from([&["status"], arguments].concat()).map(|command| command.flags)
}

fn flags(arguments: &[&str]) -> Flags {
    parse(arguments).unwrap()
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_090)
}

#[test]
fn every_state_in_the_order_of_services() {
    let rows = some_rows();
    let shown: Vec<_> = rows
        .iter()
        .map(|row| (rows::service(&row.type_url), row.name.as_str(), row.version.as_str(), row.state))
        .collect();
    assert_eq!(
        shown,
        [
            ("CDS", "bad", "6", State::Rejected),
            ("CDS", "cold", "8", State::Warming),
            ("CDS", "users", "7", State::Serving),
            ("CDS", "xds", "", State::Static),
            ("LDS", "bare", "7", State::Incomplete),
            ("LDS", "fixed", "", State::Warming),
            ("LDS", "in", "7", State::Updating),
            ("RDS", "gone", "", State::Missing),
            ("RDS", "later", "", State::Requested),
            ("RDS", "web", "1", State::Updating),
            ("OffloadedService", "o", "a", State::Serving),
        ]
    );
}

#[test]
fn the_whole_table() {
    let text = table::text(&some_rows(), now(), None, false);
    assert_eq!(
        text,
        "\
TYPE              NAME   VERSION  STATE       AGE  REASON
CDS               bad    6        rejected    1h   8: lb_policy: not supported  [31m by culvert yet, and a very long explanation of why that is so
CDS               cold   8        warming     1m   waits for the endpoints \"cold\"
CDS               users  7        serving     1m
CDS               xds    -        static      -
LDS               bare   7        incomplete  -    serves without the secret \"own\"
LDS               fixed  -        warming     1m
LDS               in     7        updating    1m
RDS               gone   -        missing     -    not sent
RDS               later  -        requested   -
RDS               web    1        updating    -    waits for the cluster \"cold\"
OffloadedService  o      a        serving     -

11 resources: 2 serving, 2 updating, 2 warming, 1 incomplete, 1 rejected, 1 requested, 1 missing, 1 static
"
    );
}

#[test]
fn lines_fit_the_terminal() {
    let mut rows = some_rows();
    rows[2].name = "a-name-that-is-longer-than-all-that-there-is-room-for.default.svc.cluster.local".to_owned();
    rows[2].version = "4f2c9a0d3b7e41558f60c3a1".to_owned();
    for width in [20, 40, 60, 80, 100, 120, 200] {
        let text = table::text(&rows, now(), Some(width), false);
        let table = text.split("\n\n").next().unwrap();
        let longest = table.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(longest <= width, "{longest} > {width}:\n{text}");
        assert_eq!(table.lines().count(), 12);
    }
    let text = table::text(&some_rows(), now(), Some(80), false);
    assert!(text.lines().nth(1).unwrap().ends_with("…"), "{text}");
    assert!(text.contains("8: lb_policy: not supported"), "{text}");
}

#[test]
fn colours_only_when_asked_for_and_reset() {
    assert!(!table::text(&some_rows(), now(), None, false).contains('\x1b'));
    let text = table::text(&some_rows(), now(), Some(100), true);
    assert!(text.contains("\x1b[31mrejected\x1b[0m") && text.starts_with("\x1b[1mTYPE"), "{text}");
    assert!(text.contains("serving") && !text.contains("mserving"), "what is well has no colour");
}

#[test]
fn servers_are_told_of_above_the_resources_and_counted_by_themselves() {
    const SOURCES: &str = r#"
config:
- generic_xds_configs:
  - { type_url: type.googleapis.com/envoy.config.cluster.v3.Cluster, name: users, version_info: "7", client_status: ACKED }
  - { type_url: type.googleapis.com/envoy.config.core.v3.ConfigSource, name: "ads: cluster xds", version_info: GRPC,
      client_status: NACKED, last_updated: "2023-11-14T22:13:20Z", error_state: { details: "Connection refused" } }
  - { type_url: type.googleapis.com/envoy.config.core.v3.ConfigSource, name: "Secret: cluster sds",
      version_info: DELTA_GRPC, client_status: ACKED, last_updated: "2023-11-14T22:13:20Z" }
"#;
    let rows = rows::of(&from_yaml(SOURCES).unwrap());
    assert_eq!(
        table::text(&rows, now(), None, false),
        "\
TYPE    NAME                 VERSION     STATE         AGE  REASON
SOURCE  Secret: cluster sds  DELTA_GRPC  connected     1m
SOURCE  ads: cluster xds     GRPC        disconnected  1m   Connection refused
CDS     users                7           serving       -

1 resource: 1 serving; 2 sources: 1 connected, 1 disconnected
"
    );
    assert!(rows::is_of_type(&rows[0].type_url, "source"));
    assert_eq!(checked(&flags(&[]), &rows), 3);
    assert_eq!(checked(&flags(&[]), &rows[..1]), 0);
    let json: Value = serde_json::from_str(&rows::json(&rows)).unwrap();
    assert_eq!((&json[1]["transport"], &json[1]["error"]), (&"GRPC".into(), &"Connection refused".into()));
}

#[test]
fn what_is_refused_or_incomplete_fails_the_check() {
    for (state, code) in [
        (State::Rejected, 3),
        (State::Incomplete, 3),
        (State::Serving, 0),
        (State::Warming, 0),
        (State::Updating, 0),
        (State::Requested, 0),
        (State::Missing, 0),
        (State::Static, 0),
    ] {
        let rows: Vec<_> = some_rows().into_iter().filter(|row| row.state == state).collect();
        assert!(!rows.is_empty(), "{state:?}");
        assert_eq!(checked(&flags(&[]), &rows), code, "{state:?}");
    }
}

#[test]
fn nothing_to_look_at_fails_the_check() {
    assert_eq!(checked(&flags(&[]), &[]), 4);
    // Nothing in a state is another matter.
    let refused = flags(&["--state", "rejected"]);
    assert_eq!((checked(&refused, &some_rows()), checked(&refused, &some_rows()[1..])), (3, 0));
    assert_eq!(checked(&flags(&["--state", "serving"]), &some_rows()), 0);
}

#[test]
fn nothing_to_show() {
    assert_eq!(table::text(&[], now(), None, true), "no resources\n");
    let serving: Vec<_> = some_rows().into_iter().filter(|row| row.rejected.is_none() && row.waits.is_none()).collect();
    assert!(!table::text(&serving, now(), None, false).contains("REASON"));
}

#[test]
fn several_types_can_be_asked_for() {
    let count = |arguments: &[&str]| {
        let flags = flags(arguments);
        some_rows().iter().filter(|row| is_meant(&flags, row)).count()
    };
    assert_eq!(count(&[]), 11);
    assert_eq!(count(&["--type", "cds", "--type", "LDS"]), 7);
    assert_eq!(count(&["--type", "cds", "--type", "LDS", "--name", "users"]), 1);
}

#[test]
fn types_that_there_are_not_cannot_be_asked_for() {
    for known in
        ["Lds", "listener", "source", "OffloadedService", "type.googleapis.com/envoy.config.cluster.v3.Cluster"]
    {
        assert!(parse(&["--type", known]).is_ok(), "{known}");
    }
    for unknown in ["clusters", "", "type.googleapis.com/envoy.config.cluster.v3.Clusters"] {
        let error = parse(&["--type", unknown]).unwrap_err().to_string();
        assert!(error.contains("there are source, cds, eds,"), "{error}");
    }
}

#[test]
fn filters() {
    for (wanted, count) in
        [("cds", 4), ("Cluster", 4), ("LDS", 3), ("type.googleapis.com/envoy.config.listener.v3.Listener", 3), ("x", 0)]
    {
        assert_eq!(some_rows().iter().filter(|row| rows::is_of_type(&row.type_url, wanted)).count(), count, "{wanted}");
    }
    for (pattern, text, fits) in [
        ("users", "users", true),
        ("users", "users2", false),
        ("users*", "users.default", true),
        ("*default*", "users.default:80", true),
        ("u*s*t", "users.default", true),
        ("u*x*t", "users.default", false),
        ("*", "", true),
        ("a*a", "a", false),
        ("", "a", false),
    ] {
        assert_eq!(rows::matches(pattern, text), fits, "{pattern} {text}");
    }
}

#[test]
fn json_for_programs() {
    let json: Value = serde_json::from_str(&rows::json(&some_rows())).unwrap();
    assert_eq!(json[0]["state"], "rejected");
    assert_eq!(json[0]["rejected"]["version"], "8");
    assert_eq!(
        json[2],
        serde_json::json!({
            "type": "CDS", "type_url": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "users",
            "version": "7", "state": "serving", "since": 1_700_000_000,
        })
    );
}

#[test]
fn what_cannot_be_asked_is_said() {
    let refused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = format!("{:#}", fetch(&refused.to_string()).unwrap_err());
    assert!(error.contains("is that culvertd's admin address?"), "{error}");
    assert!(format!("{:#}", fetch("ftp://x").unwrap_err()).contains("http://HOST:PORT"));
}

#[test]
fn what_is_missing_is_not_rejected() {
    let rows = some_rows();
    let gone = rows.iter().find(|row| row.name == "gone").unwrap();
    assert_eq!((gone.state, &gone.rejected, gone.waits.as_deref()), (State::Missing, &None, Some("not sent")));
}

#[test]
fn something_else_at_that_address_is_said_to_be() {
    use std::io::{Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // The client hangs up, in one way or another.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let error = format!("{:#}", fetch(&address).unwrap_err());
    assert!(error.contains("is not culvertd's admin address: something else answers"), "{error}");
    server.join().unwrap();
    let page = "protocol error: received message with invalid compression flag: 105 (valid flags are 0 and 1)";
    let error = no_answer("here", &tonic::Status::internal(page)).to_string();
    assert!(error.starts_with("here is not culvertd's") && !error.contains("flag"), "{error}");
    let error = no_answer("here", &tonic::Status::internal("see the log of culvertd")).to_string();
    assert!(error.contains("see the log of culvertd"), "{error}");
}

#[test]
fn the_help_says_what_a_version_is() {
    assert!(STATUS_HELP.contains("VERSION is the version in which the resource last changed"));
}
