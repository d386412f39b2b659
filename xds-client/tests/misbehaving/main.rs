//! Control planes that misbehave, on real sockets. Whatever they do: what is in force stays, nothing panics, and the client is
//! there again when they behave.

mod server;

use std::time::Duration;

use culvert_xds_client::source::BackoffLimits;
use h2::Reason;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use self::server::{Client, Server, Session, frame, response};

/// Reconnects are quick where a test is not about them.
const QUICK: Option<BackoffLimits> =
    Some(BackoffLimits { base: Duration::from_millis(1), max: Duration::from_millis(20) });

/// A client that has taken the cluster `a`, version 1, and whose server is gone since.
async fn settled() -> (Server, Client) {
    let mut server = Server::start().await;
    let client = Client::start(&server, QUICK);
    let mut session = server.session().await;
    assert_eq!(session.request().await.version_info, "");
    session.push("1", "n1", "a").await;
    assert_eq!(session.request().await.response_nonce, "n1");
    client.expect(&["+a -"]).await;
    (server, client)
}

/// The server behaves again: the client says what it has, and takes something else.
async fn recovers(mut server: Server, client: Client) {
    let mut session = server.session().await;
    let first = session.request().await;
    assert_eq!((first.version_info.as_str(), first.response_nonce.as_str()), ("1", ""));
    assert!(first.node.is_some());
    client.expect(&["+a -"]).await;
    session.push("2", "n2", "b").await;
    let ack = session.request().await;
    assert_eq!((ack.version_info.as_str(), ack.response_nonce.as_str(), ack.error_detail), ("2", "n2", None));
    client.expect(&["+a -", "+b -a"]).await;
    assert!(client.failures() >= 1);
    client.is_running();
}

/// What a server does on a stream that has begun, having read the first request.
async fn on_stream(misbehave: impl AsyncFnOnce(&mut Session)) {
    let (mut server, client) = settled().await;
    let mut session = server.session().await;
    session.request().await;
    misbehave(&mut session).await;
    drop(session);
    recovers(server, client).await;
}

/// What a server writes instead of HTTP/2; it closes the connection then. `said`: what the operator is told.
async fn on_connection(bytes: &'static [u8], said: &str) {
    let (mut server, client) = settled().await;
    let mut stream = server.accept().await;
    stream.write_all(bytes).await.unwrap();
    // The client may be gone first.
    let _ = stream.shutdown().await;
    let _ = stream.read_to_end(&mut Vec::new()).await;
    client.is_told(said).await;
    recovers(server, client).await;
}

#[tokio::test]
async fn a_stream_that_the_server_half_closes() {
    on_stream(async |session| session.send(&[], true).await).await;
}

#[tokio::test]
async fn a_stream_that_ends_well() {
    on_stream(async |session| session.trailers("0")).await;
}

#[tokio::test]
async fn a_status_of_an_error_after_the_headers() {
    on_stream(async |session| session.trailers("14")).await;
}

#[tokio::test]
async fn a_connection_that_breaks_within_a_message() {
    on_stream(async |session| {
        let whole = frame(0, &response("9", "n9", "x"));
        session.send(&whole[..whole.len() / 2], false).await;
    })
    .await;
}

#[tokio::test]
async fn a_stream_that_ends_within_a_message() {
    on_stream(async |session| {
        let whole = frame(0, &response("9", "n9", "x"));
        session.send(&whole[..whole.len() / 2], false).await;
        session.trailers("0");
    })
    .await;
}

#[tokio::test]
async fn a_stream_that_ends_within_the_length_of_a_message() {
    on_stream(async |session| session.send(&[0, 0, 0], true).await).await;
}

#[tokio::test]
async fn a_reset_stream() {
    for reason in [Reason::INTERNAL_ERROR, Reason::NO_ERROR, Reason::REFUSED_STREAM, Reason::CANCEL] {
        on_stream(async |session| session.reset(reason)).await;
    }
}

#[tokio::test]
async fn a_connection_that_is_told_to_go_away() {
    on_stream(async |session| session.go_away(Reason::ENHANCE_YOUR_CALM)).await;
}

#[tokio::test]
async fn a_message_that_says_it_is_compressed() {
    on_stream(async |session| {
        session.send(&frame(1, &response("9", "n9", "x")), false).await;
        session.gives_up().await;
    })
    .await;
}

#[tokio::test]
async fn a_message_with_a_flag_that_nobody_knows() {
    on_stream(async |session| {
        session.send(&frame(7, &response("9", "n9", "x")), false).await;
        session.gives_up().await;
    })
    .await;
}

#[tokio::test]
async fn a_message_that_is_no_discovery_response() {
    on_stream(async |session| {
        session.send(&frame(0, &[0xff; 40]), false).await;
        session.gives_up().await;
    })
    .await;
}

#[tokio::test]
async fn a_message_that_says_it_is_too_large() {
    on_stream(async |session| {
        let length = u32::try_from(64 * 1024 * 1024 + 1).unwrap().to_be_bytes();
        session.send(&[&[0], length.as_slice()].concat(), false).await;
        // It does not wait for what it is not going to take.
        session.gives_up().await;
    })
    .await;
}

#[tokio::test]
async fn an_error_right_away() {
    let (mut server, client) = settled().await;
    server.answer(200, &[("content-type", "application/grpc"), ("grpc-status", "13")]).await;
    recovers(server, client).await;
}

#[tokio::test]
async fn http_that_is_no_grpc() {
    for (status, headers) in
        [(503, &[][..]), (200, &[("content-type", "text/html")][..]), (204, &[][..]), (301, &[("location", "/x")][..])]
    {
        let (mut server, client) = settled().await;
        server.answer(status, headers).await;
        recovers(server, client).await;
    }
}

#[tokio::test]
async fn an_answer_in_http1() {
    on_connection(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n", "the server does not speak HTTP/2").await;
}

#[tokio::test]
async fn an_alert_of_tls() {
    // What a TLS server has to say to HTTP/2 without TLS: fatal, unexpected_message.
    on_connection(&[0x15, 3, 3, 0, 2, 2, 10], "the server wants TLS").await;
}

#[tokio::test]
async fn nothing_at_all() {
    on_connection(b"", "the server hung up without a word of HTTP/2").await;
}

#[tokio::test]
async fn frames_that_http2_does_not_allow() {
    // Settings, and then DATA on stream 0.
    on_connection(&[0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1], "the stream to the control plane broke")
        .await;
}

#[tokio::test]
async fn a_message_that_comes_byte_by_byte_is_taken() {
    let (mut server, client) = settled().await;
    let mut session = server.session().await;
    session.request().await;
    for byte in frame(0, &response("2", "n2", "b")) {
        session.send(&[byte], false).await;
    }
    assert_eq!(session.request().await.response_nonce, "n2");
    client.expect(&["+a -", "+b -a"]).await;
}

#[tokio::test]
async fn a_stream_goes_on_after_a_graceful_go_away() {
    let (mut server, client) = settled().await;
    let mut session = server.session().await;
    session.request().await;
    session.drain();
    session.push("2", "n2", "b").await;
    assert_eq!(session.request().await.response_nonce, "n2");
    session.trailers("0");
    let first = server.session().await.request().await;
    assert_eq!((first.version_info.as_str(), first.response_nonce.as_str()), ("2", ""));
    client.expect(&["+a -", "+b -a"]).await;
}

#[tokio::test]
async fn a_type_that_nobody_asked_for_and_nonces_of_old_leave_the_stream_alone() {
    let (mut server, client) = settled().await;
    let mut session = server.session().await;
    session.request().await;
    session.push_type("type.googleapis.com/x.Unknown", "9", "n9").await;
    // A repeated nonce is a response like any other.
    for _ in 0..2 {
        session.push("2", "n1", "b").await;
        assert_eq!(session.request().await.response_nonce, "n1");
    }
    assert_eq!(client.updates()[1], "+b -a");
}

/// Neither headers nor messages: the client does not give the stream up, and nothing is lost when the server does.
#[tokio::test]
async fn a_server_that_never_answers() {
    let (mut server, client) = settled().await;
    let silent = server.silent().await;
    client.expect(&["+a -"]).await;
    drop(silent);
    recovers(server, client).await;
}

#[tokio::test]
async fn a_server_that_hangs_up_on_everyone_is_not_pestered() {
    let mut server = Server::start().await;
    let limits = BackoffLimits { base: Duration::from_millis(40), max: Duration::from_secs(30) };
    let client = Client::start(&server, Some(limits));
    let ends = tokio::time::Instant::now() + Duration::from_secs(2);
    let mut attempts = 0;
    while let Ok(stream) = tokio::time::timeout_at(ends, server.accept()).await {
        attempts += 1;
        drop(stream);
    }
    // The waits double: about seven fit in. Without waits it would be thousands.
    assert!((2..40).contains(&attempts), "{attempts} attempts");
    client.is_running();
    // The last one may be under way.
    let failures = client.failures();
    assert!(failures + 1 >= attempts, "{failures} of {attempts}");
}

#[tokio::test]
async fn a_server_that_answers_and_hangs_up_each_time_is_not_pestered() {
    let mut server = Server::start().await;
    let limits = BackoffLimits { base: Duration::from_millis(200), max: Duration::from_secs(30) };
    let client = Client::start(&server, Some(limits));
    let ends = tokio::time::Instant::now() + Duration::from_secs(2);
    let mut attempts = 0;
    while let Ok(mut session) = tokio::time::timeout_at(ends, server.session()).await {
        attempts += 1;
        session.request().await;
        session.push("1", "n1", "a").await;
        session.request().await;
    }
    // One in 100 ms on average.
    assert!((3..80).contains(&attempts), "{attempts} attempts");
    client.is_running();
}

#[tokio::test]
async fn a_connection_without_an_answer_is_told_of_as_such() {
    let mut server = Server::start().await;
    let client = Client::start(&server, QUICK);
    let _silent = server.silent().await;
    client.is_told("connected, but nothing has been answered yet").await;
}

/// What is answered does not make up for what is asked for and never comes.
#[tokio::test]
async fn a_server_that_answers_a_part_and_hangs_up_each_time_is_not_pestered() {
    let mut server = Server::start().await;
    let limits = BackoffLimits { base: Duration::from_millis(40), max: Duration::from_secs(30) };
    let client = Client::start(&server, Some(limits));
    client.wants("type.googleapis.com/x.Never");
    let ends = tokio::time::Instant::now() + Duration::from_secs(2);
    let mut attempts = 0;
    while let Ok(mut session) = tokio::time::timeout_at(ends, server.session()).await {
        attempts += 1;
        session.request().await;
        session.request().await;
        session.push("1", "n1", "a").await;
        session.request().await;
    }
    // The waits double: about seven fit in, where it would be a hundred of 20 ms on average.
    assert!((2..25).contains(&attempts), "{attempts} attempts");
    assert!(!client.connection().is_well());
    client.is_running();
}
