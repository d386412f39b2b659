use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::*;

impl Joinable for tokio::io::DuplexStream {
    fn take_error(&self) -> Option<io::Error> {
        None
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// Of the client, and of the host.
fn flows(test: &str) -> [Flow; 2] {
    ["up", "down"].map(|name| {
        let scope = crate::stats::Scope::tcp(&format!("relay_tests_{test}_{name}"));
        Flow { paused: scope.counter("paused"), resumed: scope.counter("resumed") }
    })
}

#[test]
fn counts_when_it_does_not_read_on() {
    // All that is at hand is read and written in one turn.
    run(tokio::task::unconstrained(async {
        let (mut client, mut downstream) = duplex(100_000);
        let (mut upstream, mut server) = duplex(100);
        let ([up, down], mut relay) = (flows("counts"), Relay::new(None, None, flows("counts")));
        let counted = |flow: Flow| (flow.paused.value(), flow.resumed.value());
        let (before, other) = (counted(up), counted(down));
        client.write_all(&[0; 90_000]).await.unwrap();
        {
            let mut proxy = std::pin::pin!(std::future::poll_fn(|cx| relay.poll(cx, &mut downstream, &mut upstream)));
            let mut poll =
                || assert!(proxy.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop())).is_pending());
            poll();
            poll();
            assert_eq!(counted(up), (before.0 + 1, before.1), "once for as long as it lasts");
            // What had been read goes, and more is read.
            for _ in 0..BUFFER / 100 + 1 {
                server.read_exact(&mut [0; 100]).await.unwrap();
                poll();
            }
        }
        assert_eq!(counted(up), (before.0 + 2, before.1 + 1));
        assert_eq!(counted(down), other);
    }));
}

#[test]
fn carries_both_ways_and_keeps_half_close() {
    run(async {
        let (mut client, mut downstream) = duplex(100);
        let (mut upstream, mut server) = duplex(100);
        let mut relay = Relay::new(None, None, flows("carries"));
        let sent: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
        let expected = sent.clone();
        let proxy = async { std::future::poll_fn(|cx| relay.poll(cx, &mut downstream, &mut upstream)).await };
        let client_side = async {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let server_side = async {
            let mut got = Vec::new();
            server.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, expected);
            // The client has closed its half: the other one still works.
            server.write_all(b"answer").await.unwrap();
            server.shutdown().await.unwrap();
        };
        let (ended, answer, ()) = futures_util::join!(proxy, client_side, server_side);
        assert_eq!(ended, Ended::Whole);
        assert_eq!(answer, b"answer");
        assert_eq!((relay.up.bytes, relay.down.bytes), (100_000, 6));
    });
}

#[test]
fn ends_when_nothing_passes_for_too_long() {
    run(async {
        let (mut client, mut downstream) = duplex(100);
        let (mut upstream, _server) = duplex(100);
        client.write_all(b"x").await.unwrap();
        let mut relay = Relay::new(Some(Duration::from_millis(20)), None, flows("idle"));
        let ended = std::future::poll_fn(|cx| relay.poll(cx, &mut downstream, &mut upstream)).await;
        assert_eq!(ended, Ended::Idle);
    });
}

#[test]
fn tells_which_side_broke() {
    run(async {
        let (mut client, mut downstream) = duplex(100);
        let (mut upstream, server) = duplex(100);
        drop(server);
        client.write_all(b"x").await.unwrap();
        let mut relay = Relay::new(None, None, flows("breaks"));
        let ended = std::future::poll_fn(|cx| relay.poll(cx, &mut downstream, &mut upstream)).await;
        assert_eq!(ended, Ended::Upstream);
    });
}

/// A connection of a pod that is gone does not look whole to the other side.
#[test]
fn what_was_ended_is_passed_on_as_a_reset() {
    let is_reset = |kind: io::ErrorKind| Broken::new(Side::Read, &kind.into()).reset;
    assert!(is_reset(io::ErrorKind::ConnectionReset) && is_reset(io::ErrorKind::ConnectionAborted));
    assert!(!is_reset(io::ErrorKind::BrokenPipe));
}
