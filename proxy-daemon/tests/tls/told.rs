//! What hosts and access logs are told of certificates and handshakes.

use super::*;

/// What the access log of a connection manager says of a request with and one without a certificate, each with a header
/// `x-forwarded-client-cert: By=old`, an empty line of it, and `By=older`.
async fn logged(
    manager: &str,
    format: &str,
    clients: &[Option<&Issued>],
    servers: &[&Issued],
    ca: &Authority,
) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let log = format!(
        "access_log: [{{ name: f, typed_config: {{ '@type': type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, \
         path: {}, log_format: {{ text_format_source: {{ inline_string: {} }} }} }} }}]",
        path.display(),
        yaml(&format!("{format}\n"))
    );
    let filters = says("hello").replace("stat_prefix: tls,", &format!("stat_prefix: tls, {log}, {manager}"));
    let validation = format!("validation_context: {{ trusted_ca: {{ inline_string: {} }} }}", yaml(&ca.pem));
    let (plane, addresses) = start(&bootstrap("xfcc", &[chain("", servers, &validation, "", &filters)], &[])).await;
    for (index, own) in clients.iter().enumerate() {
        let mut stream = connect(addresses[0], "a.test", client_config(ca, *own, &[])).await.unwrap();
        let request = "GET / HTTP/1.1\r\nhost: a.test\r\nx-forwarded-client-cert: By=old\r\nx-forwarded-client-cert:\r\nx-forwarded-client-cert: By=older\r\n\r\n";
        assert!(ask(&mut stream, request).await.unwrap().ends_with("hello"));
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while std::fs::read_to_string(&path).unwrap_or_default().lines().count() <= index {
            assert!(tokio::time::Instant::now() < deadline, "no line {index} in the access log");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    plane.stop();
    std::fs::read_to_string(&path).unwrap()
}

#[test]
fn what_a_client_shows_is_told_to_hosts_as_configured() {
    run(async {
        let authority = Authority::new("ca");
        let server = authority.issue(&["a.test"], &["spiffe://td/a", "spiffe://td/b"]);
        let client = authority.issue(&["c.test", "d.test"], &["spiffe://td/c", "spiffe://td/x,y"]);
        let bare = authority.issue(&[], &[]);
        let hash = |issued: &Issued| {
            let digest = culvert_proxy_daemon::tls::sha256(&der(issued).0[0]);
            digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        let of = |issued: &Issued| format!("By=spiffe://td/a;By=spiffe://td/b;Hash={}", hash(issued));
        let pem = client.chain.replace("\r\n", "\n");
        let pem =
            pem.replace('\n', "%0A").replace(' ', "%20").replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
        let all = format!(
            "{};Cert=\"{pem}\";Chain=\"{pem}\";Subject=\"O=Org\\, Inc,CN=c.test\";URI=spiffe://td/c;URI=spiffe://td/x,y;DNS=c.test;\
             DNS=d.test",
            of(&client)
        );
        let details =
            "set_current_client_cert_details: { subject: true, cert: true, chain: true, dns: true, uri: true },";
        let (issuer, by) = ("set_current_client_cert_details: { issuer: true },", "CN=ca");
        let json = "set_current_client_cert_details: { format: JSON, subject: true, cert: true, chain: true, dns: true, uri: true, issuer: true },";
        let plain = client.chain.replace("\r\n", "\n").replace('\n', "\\n");
        let all_json = format!(
            r#"{{"by":["spiffe://td/a","spiffe://td/b"],"hash":"{}","cert":"{plain}","chain":["{plain}"],"subject":"O=Org\\, Inc,CN=c.test","uri":["spiffe://td/c","spiffe://td/x,y"],"dns":["c.test","d.test"],"issuer":"{by}"}}"#,
            hash(&client)
        );
        let uri = "set_current_client_cert_details: { subject: false, uri: true, dns: true },";
        for (mode, details, with, without, barely) in [
            ("SANITIZE", details, "-".to_owned(), "-", "-".to_owned()),
            ("FORWARD_ONLY", details, "By=old,By=older".to_owned(), "-", "By=old,By=older".to_owned()),
            (
                "ALWAYS_FORWARD_ONLY",
                details,
                "By=old,By=older".to_owned(),
                "By=old,By=older",
                "By=old,By=older".to_owned(),
            ),
            ("SANITIZE_SET", "", of(&client), "-", of(&bare)),
            (
                "APPEND_FORWARD",
                uri,
                format!("By=old,By=older,{};URI=spiffe://td/c;URI=spiffe://td/x,y;DNS=c.test;DNS=d.test", of(&client)),
                "-",
                format!("By=old,By=older,{};URI=", of(&bare)),
            ),
            ("SANITIZE_SET", details, all.clone(), "-", String::new()),
            ("SANITIZE_SET", issuer, format!("{};Issuer=\"{by}\"", of(&client)), "-", String::new()),
            ("SANITIZE_SET", json, format!("[{all_json}]"), "-", String::new()),
            // What the client says is in the other format.
            (
                "APPEND_FORWARD",
                "set_current_client_cert_details: { format: JSON },",
                format!("By=old,By=older,{}", of(&client)),
                "-",
                String::new(),
            ),
        ] {
            let manager = format!("forward_client_cert_details: {mode}, {details}");
            let format = "%REQ(X-FORWARDED-CLIENT-CERT)%";
            let lines = logged(&manager, format, &[Some(&client), None, Some(&bare)], &[&server], &authority).await;
            let lines: Vec<_> = lines.lines().collect();
            assert_eq!(lines[..2], [with.as_str(), without], "{mode} {details}");
            assert!(barely.is_empty() || lines[2] == barely, "{mode} {details}: {}", lines[2]);
        }
    });
}

#[test]
fn certificates_of_both_ends_are_logged() {
    run(async {
        let authority = Authority::new("ca");
        let other = authority.issue(&["b.test"], &["spiffe://td/other"]);
        let server = authority.issue(&["a.test"], &["spiffe://td/a"]);
        let client = authority.issue(&["c.test"], &["spiffe://td/c"]);
        let format = "%DOWNSTREAM_LOCAL_SUBJECT%|%DOWNSTREAM_LOCAL_URI_SAN%|%DOWNSTREAM_LOCAL_DNS_SAN%|\
                      %DOWNSTREAM_PEER_IP_SAN%|%DOWNSTREAM_PEER_EMAIL_SAN%|%DOWNSTREAM_PEER_FINGERPRINT_1%|%DOWNSTREAM_PEER_CERT%";
        // With one certificate and with several, of which the client's name chooses.
        for servers in [&[&server][..], &[&other, &server]] {
            let lines = logged("", format, &[Some(&client), None], servers, &authority).await;
            let lines: Vec<Vec<&str>> = lines.lines().map(|line| line.split('|').collect()).collect();
            let own = ["O=Org\\, Inc,CN=a.test", "spiffe://td/a", "a.test", "-", "-"];
            assert_eq!(lines[0][..5], own);
            assert_eq!(lines[0][5].len(), 40);
            assert!(lines[0][6].starts_with("-----BEGIN%20CERTIFICATE-----%0A"), "{}", lines[0][6]);
            assert_eq!(lines[1][..5], own);
            assert_eq!(lines[1][5..], ["-", "-"]);
        }
    });
}

#[test]
fn why_a_handshake_failed_is_in_the_listeners_log() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let authority = Authority::new("ca");
        let server = authority.issue(&["a.test"], &[]);
        let text = bootstrap("failing", &[chain("", &[&server], "", "", &says("hello"))], &[]);
        let log = format!(
            "name: failing, access_log: [{{ name: f, typed_config: {{ '@type': \
             type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: {{ text_format_source: {{ \
             inline_string: \"%DOWNSTREAM_TRANSPORT_FAILURE_REASON%\\n\" }} }} }} }}]",
            path.display()
        );
        let (plane, addresses) = start(&text.replace("name: failing", &log)).await;
        let mut garbage = TcpStream::connect(addresses[0]).await.unwrap();
        garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        loop {
            let line = std::fs::read_to_string(&path).unwrap_or_default();
            if line.ends_with('\n') {
                assert!(line.starts_with("TLS_error:") && line.trim_end().ends_with(":TLS_error_end"), "{line}");
                assert!(!line.trim_end().contains(' ') && line.len() > 30, "one word: {line}");
                break;
            }
            assert!(tokio::time::Instant::now() < deadline, "no line in the access log");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        plane.stop();
    });
}
