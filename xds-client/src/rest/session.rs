//! A connection that polls take turns with.

use bytes::Bytes;
use http::{HeaderValue, Request, Response, Uri, header, uri::PathAndQuery};
use http_body_util::Full;
use hyper::{body::Incoming, client::conn};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::Failed;
use crate::{connect, source::Server};

/// An open connection, and who speaks on it.
pub(super) struct Session {
    sender: Sender,
    address: String,
    _driver: AbortOnDrop,
}

enum Sender {
    Http1(conn::http1::SendRequest<Full<Bytes>>),
    Http2(conn::http2::SendRequest<Full<Bytes>>),
}

impl Session {
    /// Connects to one of the server's addresses.
    pub(super) async fn open(server: &Server, address: &str, authority: &str) -> Result<Session, Failed> {
        let protocol = if server.http2 { "h2" } else { "http/1.1" };
        let stream = TokioIo::new(connect::connect(server, address, authority, protocol).await?);
        let (sender, driver) = if server.http2 {
            let (sender, connection) = conn::http2::handshake(TokioExecutor::new(), stream).await?;
            (Sender::Http2(sender), tokio::spawn(async move { drop(connection.await) }))
        } else {
            let (sender, connection) = conn::http1::handshake(stream).await?;
            (Sender::Http1(sender), tokio::spawn(async move { drop(connection.await) }))
        };
        Ok(Session { sender, address: address.to_owned(), _driver: AbortOnDrop(driver) })
    }

    /// Whether it leads to this address and is still open.
    pub(super) async fn leads_to(&mut self, address: &str) -> bool {
        if self.address != address {
            return false;
        }
        match &mut self.sender {
            Sender::Http1(sender) => sender.ready().await.is_ok(),
            Sender::Http2(sender) => sender.ready().await.is_ok(),
        }
    }

    /// Sends a JSON document, and waits for the head of the answer.
    pub(super) async fn post(
        &mut self,
        server: &Server,
        authority: &str,
        path: &'static str,
        body: Bytes,
    ) -> Result<Response<Incoming>, Failed> {
        let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
        Ok(match &mut self.sender {
            Sender::Http1(sender) => {
                let host = HeaderValue::from_str(authority).map_err(http::Error::from)?;
                sender.send_request(request.header(header::HOST, host).body(Full::new(body))?).await?
            }
            Sender::Http2(sender) => {
                let scheme = if server.tls.is_some() { "https" } else { "http" };
                let path = PathAndQuery::from_static(path);
                let uri = Uri::builder().scheme(scheme).authority(authority).path_and_query(path).build()?;
                sender.send_request(request.uri(uri).body(Full::new(body))?).await?
            }
        })
    }
}

/// A task that ends with its owner.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
