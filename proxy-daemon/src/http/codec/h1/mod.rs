//! HTTP/1.1 (RFC 9112), on both sides of the proxy. What is read is copied once, into the buffer that the other side is written
//! from; buffers are borrowed from the worker while there is something in them; no request has a task of its own.

mod buffers;
mod case;
mod client;
mod decode;
mod encode;
mod error;
mod head;
mod server;

pub use client::{ClientConnection, ResponseBody, SendError};
pub use decode::{Decoder, Item};
pub use encode::Upgrade;
pub use error::CodecError;
pub use head::{Framing, Kind, Limits, Scanner, request, response, response_framing};
pub use server::RequestBody;
pub(in crate::http) use server::ServerConnection;
