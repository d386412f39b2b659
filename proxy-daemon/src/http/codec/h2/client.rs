//! The side that hosts are spoken to: a task for the connection, and one for each request's body that does not pass at once.

use std::{
    cell::Cell,
    future::poll_fn,
    pin::Pin,
    rc::{Rc, Weak},
    task::Poll,
};

use h2::{
    client::{Connection, SendRequest},
    ext::Protocol,
};
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{CONNECTION, CONTENT_LENGTH, UPGRADE},
};
use http_body::Body as _;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    body::ReceivedBody,
    keepalive::Keepalive,
    last_words::LastWords,
    scrub::Scrubbed,
    send::{Outbox, Piece, Sending},
};
use crate::{
    config::model::{HeadLimits, Http2Options},
    http::{
        body::Body,
        codec::{Incoming, h1::Upgrade},
        headers::{self, names::X_REQUEST_ID},
        look::Look as _,
    },
};

/// `max_response_headers_kb` where nothing else is said.
const KILOBYTES: u32 = 60;

/// Why there is no response.
pub enum SendError {
    /// The connection takes no more requests; here it is again, and why, where the crate says that.
    Unsent(Box<Request<Body>>, Option<h2::Error>),
    /// The stream or the connection broke.
    Reset(h2::Error),
    /// The response has more headers than it may.
    TooMany,
}

/// A connection to a host, which carries many requests at a time.
pub struct ClientConnection {
    sender: SendRequest<Piece>,
    outbox: Rc<Outbox>,
    closed: Cell<bool>,
    /// Nothing can be written on it any more, though its end has not come.
    deaf: Rc<Cell<bool>>,
    /// How many streams the host takes at a time; `None` before it has said so.
    limit: Cell<Option<usize>>,
    /// The limit is another one than before.
    new_limit: Cell<bool>,
    /// How many headers a response may have.
    most_headers: usize,
}

impl ClientConnection {
    /// Begins a connection: what sends on it, and what drives it, which ends with the connection. `buffer`: how many bytes of bodies
    /// may wait for the socket.
    ///
    /// # Errors
    /// The host does not take it.
    pub async fn start<T: AsyncRead + AsyncWrite + Unpin + 'static>(
        io: T,
        options: &Http2Options,
        buffer: u32,
        heads: HeadLimits,
    ) -> Result<(Rc<ClientConnection>, impl Future<Output = Result<(), h2::Error>> + use<T>), h2::Error> {
        let most_headers = heads.count.unwrap_or(HeadLimits::COUNT);
        // The crate counts 32 bytes more for each field.
        let list =
            heads.kilobytes.unwrap_or(KILOBYTES).saturating_mul(1024).saturating_add(most_headers.saturating_mul(32));
        let mut builder = h2::client::Builder::new();
        builder
            .enable_push(false)
            .initial_window_size(options.initial_stream_window_size)
            .initial_connection_window_size(options.initial_connection_window_size)
            .max_header_list_size(list)
            .max_send_buffer_size((buffer as usize).clamp(16 * 1024, 256 * 1024));
        if let Some(size) = options.hpack_table_size {
            builder.header_table_size(size);
        }
        let deaf = Rc::default();
        let (sender, mut connection): (_, Connection<Scrubbed<LastWords<T>>, Piece>) =
            builder.handshake(Scrubbed::host(LastWords::new(io, &deaf), list)).await?;
        let pings = options.keepalive.and_then(|_| connection.ping_pong());
        let mut keepalive = Keepalive::new(options.keepalive, pings);
        let client = Rc::new(ClientConnection {
            sender,
            outbox: Outbox::new(buffer),
            closed: Cell::new(false),
            deaf,
            limit: Cell::new(None),
            new_limit: Cell::new(false),
            most_headers: most_headers as usize,
        });
        let (watched, mut known): (Weak<ClientConnection>, _) =
            (Rc::downgrade(&client), connection.max_concurrent_send_streams());
        let driver = poll_fn(move |cx| {
            if keepalive.as_mut().is_some_and(|keepalive| keepalive.poll(cx).is_ready()) {
                // What is under way on it breaks off.
                tracing::debug!("an HTTP/2 host answers no pings");
                return Poll::Ready(Ok(()));
            }
            let polled = Pin::new(&mut connection).poll(cx);
            let limit = connection.max_concurrent_send_streams();
            if std::mem::replace(&mut known, limit) != limit
                && let Some(client) = watched.upgrade()
            {
                client.limit.set(Some(limit));
                client.new_limit.set(true);
            }
            polled
        });
        Ok((client, driver))
    }

    /// It takes no further requests.
    pub fn is_closed(&self) -> bool {
        self.closed.get() || self.deaf.get()
    }

    /// Its end has come: nothing is sent on it from now on.
    pub fn close(&self) {
        self.closed.set(true);
    }

    /// How many streams the host takes at a time. Before it has said so there is no limit, as in Envoy: what is too much waits inside.
    pub fn limit(&self) -> usize {
        self.limit.get().unwrap_or(usize::MAX)
    }

    /// Whether the limit has changed since this was last asked.
    pub fn has_new_limit(&self) -> bool {
        self.new_limit.take()
    }

    /// Sends a request and waits for its response's head. `interim` is told of the 1xx that come before it.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn send(
        &self,
        request: Request<Body>,
        mut interim: impl FnMut(StatusCode, HeaderMap),
    ) -> Result<Response<Incoming>, SendError> {
        let mut sender = match self.sender.clone().ready().await {
            Ok(_) if self.deaf.get() => return Err(SendError::Unsent(Box::new(request), None)),
            Ok(sender) => sender,
            Err(error) => {
                self.close();
                return Err(SendError::Unsent(Box::new(request), Some(error)));
            }
        };
        let (mut parts, mut body) = request.into_parts();
        let upgrade = parts.extensions.remove::<Upgrade>().is_some();
        // RFC 8441: what is an upgrade in HTTP/1.1.
        let protocol = parts.headers.first(&UPGRADE).filter(|_| upgrade && parts.method != Method::CONNECT).cloned();
        headers::strip_hop_by_hop(&mut parts.headers);
        if let Some(protocol) = protocol.as_ref().and_then(|protocol| protocol.to_str().ok()) {
            parts.method = Method::CONNECT;
            parts.extensions.insert(Protocol::from(protocol));
        }
        if let Some(id) = parts.headers.get_mut(X_REQUEST_ID) {
            // No other request has it: in the host's table of fields (RFC 7541, section 6.2.3) it would be of no use to any, and
            // would be compared with the one of each.
            id.set_sensitive(true);
        }
        let end = body.is_end_stream() && !upgrade;
        if let Some(length) = body.size_hint().exact().filter(|length| !end && *length > 0) {
            parts.headers.entry(CONTENT_LENGTH).or_insert_with(|| length.into());
        }
        let sent = sender.send_request(Request::from_parts(parts, ()), end);
        let (mut response, stream) = sent.map_err(SendError::Reset)?;
        let mut stream = Some(stream).filter(|_| !end);
        let mut sending = None;
        if !upgrade && let Some(stream) = stream.take() {
            sending = Sending::start(std::mem::take(&mut body), stream, &self.outbox);
        }
        let response = poll_fn(|cx| {
            while let Poll::Ready(Some(Ok(early))) = response.poll_informational(cx) {
                let (parts, ()) = early.into_parts();
                interim(parts.status, parts.headers);
            }
            Pin::new(&mut response).poll(cx)
        });
        let (mut parts, received) = response.await.map_err(SendError::Reset)?.into_parts();
        // `:status` counts as one.
        if parts.headers.len() + 1 > self.most_headers {
            return Err(SendError::TooMany);
        }
        if self.limit.get().is_none() {
            // The host's settings come before anything else: its limit is the one that is presumed.
            self.limit.set(Some(self.sender.current_max_send_streams()));
        }
        if let Some(mut stream) = stream {
            // Nothing is said in another protocol before the host has agreed to it.
            if parts.status.is_success() {
                sending = Sending::start(body, stream, &self.outbox);
            } else {
                let _ = stream.send_data(Piece::none(), true);
            }
        }
        if let Some(protocol) = protocol.filter(|_| parts.status == StatusCode::OK) {
            parts.status = StatusCode::SWITCHING_PROTOCOLS;
            parts.headers.insert(UPGRADE, protocol);
            parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        }
        // Nobody waits for the rest of a request that has its response.
        let body = match received.is_end_stream() {
            true => Incoming::Empty,
            false => Incoming::Http2(ReceivedBody::response(received, &parts.headers, sending)),
        };
        Ok(Response::from_parts(parts, body))
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
