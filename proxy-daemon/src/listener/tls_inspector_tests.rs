use std::sync::Arc;

use rustls::{ClientConfig, ClientConnection, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::*;

/// A client's first message, as rustls writes it.
fn client_hello(name: &str, alpn: &[&str]) -> Vec<u8> {
    let builder = ClientConfig::builder_with_provider(Arc::clone(crate::tls::provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// The message in records of `size` bytes.
fn fragmented(hello: &[u8], size: usize) -> Vec<u8> {
    let record = |part: &[u8]| {
        let mut record = vec![22, 3, 1];
        record.extend_from_slice(&u16::try_from(part.len()).unwrap().to_be_bytes());
        record.extend_from_slice(part);
        record
    };
    hello[5..].chunks(size).flat_map(record).collect()
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    client.set_nodelay(true).unwrap();
    (client, listener.accept().await.unwrap().0)
}

async fn inspect_after(parts: &[&[u8]], max: usize) -> (io::Result<Hello>, TcpStream) {
    let (mut client, server) = pair().await;
    let stats = TlsInspectorStats::new();
    let send = async {
        for part in parts {
            client.write_all(part).await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    let (hello, ()) = tokio::join!(inspect(&server, max, None, &stats), send);
    (hello, server)
}

#[test]
fn what_is_not_tls_is_seen_at_its_first_bytes() {
    for bytes in
        [&b"G"[..], b"GET / HTTP/1.1", b"\x16\x02", b"\x16\x03\x01\x00\x00", b"\x16\x03\x01\x00\x05\x02", b"\x15\x03"]
    {
        assert_eq!(look(bytes), Seen::NotTls, "{bytes:?}");
    }
    for bytes in [&b""[..], b"\x16", b"\x16\x03\x01\x00", b"\x16\x03\x01\x00\x05\x01\x00"] {
        assert_eq!(look(bytes), Seen::Part, "{bytes:?}");
    }
}

#[test]
fn a_message_is_whole_with_its_last_byte_however_it_is_cut() {
    let hello = client_hello("a.test", &["h2"]);
    for bytes in [hello.clone(), fragmented(&hello, 1), fragmented(&hello, 3), fragmented(&hello, 100)] {
        for end in 0..bytes.len() {
            assert_eq!(look(&bytes[..end]), Seen::Part, "{end} of {}", bytes.len());
        }
        assert_eq!(look(&bytes), Seen::Whole);
        assert_eq!(read_hello(&bytes).unwrap().server_name.as_deref(), Some("a.test"));
    }
}

#[tokio::test]
async fn the_first_message_is_read_and_left_where_it_is() {
    let sent = client_hello("A.Test", &["h2", "http/1.1"]);
    let (hello, mut server) = inspect_after(&[&sent], 16384).await;
    let hello = hello.unwrap();
    assert!(hello.tls);
    assert_eq!(hello.server_name.as_deref(), Some("a.test"));
    assert_eq!(hello.alpn, [b"h2".to_vec(), b"http/1.1".to_vec()]);
    let mut still_there = vec![0; sent.len()];
    server.read_exact(&mut still_there).await.unwrap();
    assert_eq!(still_there, sent);
}

#[tokio::test]
async fn a_message_may_come_byte_by_byte() {
    let sent = client_hello("a.test", &[]);
    let parts: Vec<&[u8]> = sent.chunks(1).collect();
    let (hello, _) = inspect_after(&parts, 16384).await;
    assert_eq!(hello.unwrap().server_name.as_deref(), Some("a.test"));
}

#[tokio::test]
async fn other_protocols_pass() {
    let (hello, mut server) = inspect_after(&[b"GET /"], 16384).await;
    assert_eq!(hello.unwrap(), Hello::default());
    let mut still_there = [0; 5];
    server.read_exact(&mut still_there).await.unwrap();
    assert_eq!(&still_there, b"GET /");
}

#[tokio::test]
async fn a_message_has_a_bound() {
    let sent = client_hello("a.test", &["h2"]);
    let (hello, _) = inspect_after(&[&sent], 200).await;
    assert!(hello.unwrap_err().to_string().contains("too large"));
}

#[tokio::test]
async fn a_client_that_leaves_is_let_go() {
    let sent = client_hello("a.test", &[]);
    for part in [&sent[..0], &sent[..50]] {
        let (mut client, server) = pair().await;
        client.write_all(part).await.unwrap();
        drop(client);
        let stats = TlsInspectorStats::new();
        let left = inspect(&server, 16384, Some(Duration::from_secs(10)), &stats).await;
        assert_eq!(left.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[tokio::test]
async fn a_silent_client_is_waited_for_only_so_long() {
    let (_client, server) = pair().await;
    let stats = TlsInspectorStats::new();
    let silent = inspect(&server, 16384, Some(Duration::from_millis(20)), &stats).await;
    assert_eq!(silent.unwrap_err().kind(), io::ErrorKind::TimedOut);
}
