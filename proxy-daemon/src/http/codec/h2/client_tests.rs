use std::{
    io::{self, ErrorKind},
    task::Context,
};

use bytes::Bytes;
use tokio::{
    io::{DuplexStream, ReadBuf},
    task::LocalSet,
};

use super::*;

/// Nothing can be written to it, once that is said.
struct Breaking(DuplexStream, Rc<Cell<bool>>);

impl Breaking {
    fn broken<V>(&self) -> Option<Poll<io::Result<V>>> {
        self.1.get().then(|| Poll::Ready(Err(ErrorKind::BrokenPipe.into())))
    }
}

impl AsyncRead for Breaking {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Breaking {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.broken().unwrap_or_else(|| Pin::new(&mut this.0).poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.broken().unwrap_or_else(|| Pin::new(&mut this.0).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_shutdown(cx)
    }
}

fn request() -> Request<Body> {
    Request::post("http://host/").body(Body::Full(Bytes::from_static(b"body"))).unwrap()
}

/// A host that has gone silently: of what is swallowed then, only the first request cannot be sent elsewhere.
#[tokio::test(start_paused = true)]
async fn a_connection_that_cannot_be_written_to_has_no_further_requests() {
    let tasks = LocalSet::new();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let host = async move {
        let mut host = h2::server::handshake(far).await.unwrap();
        while let Some(Ok((_, mut respond))) = host.accept().await {
            respond.send_response(Response::new(()), true).unwrap();
        }
    };
    let client = async {
        tokio::task::spawn_local(host);
        let broken = Rc::default();
        let io = Breaking(near, Rc::clone(&broken));
        let (client, driver) =
            ClientConnection::start(io, &Http2Options::default(), 1 << 20, HeadLimits::default()).await.ok().unwrap();
        tokio::task::spawn_local(driver);
        assert!(client.send(request(), |_, _| {}).await.is_ok());
        assert!(!client.is_closed());
        broken.set(true);
        let sent = std::pin::pin!(client.send(request(), |_, _| {}));
        let (mut sent, mut looks) = (sent, 0);
        // Written by the connection's task.
        while !client.is_closed() {
            assert!(looks < 1000, "nobody is told");
            looks += 1;
            tokio::select! {
                biased;
                _ = &mut sent => panic!("it has an answer"),
                () = tokio::task::yield_now() => {}
            }
        }
        let next = client.send(request(), |_, _| {}).await;
        assert!(matches!(next, Err(SendError::Unsent(again, None)) if !http_body::Body::is_end_stream(again.body())));
        assert!(matches!(sent.await, Err(SendError::Reset(_))), "some of it may have gone");
    };
    tasks.run_until(client).await;
}
