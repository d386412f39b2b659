//! HTTP/2: frames, header blocks and flow control are the crate `h2`'s. What is here joins its streams to the proxy's: bodies that
//! are read as fast as somebody takes them, and written as fast as the other side and the socket do.

mod body;
mod client;
pub(super) mod fuzz;
mod goaways;
pub(super) mod head;
mod hpack;
mod huffman;
mod keepalive;
mod last_words;
pub(super) mod scrub;
mod send;
mod server;
pub(super) mod watch;

pub use body::ReceivedBody;
pub use client::{ClientConnection, SendError};
pub use goaways::Goaways;
pub(in crate::http) use server::ServerConnection;
pub(in crate::http) use watch::Watch;
